"""Logits at completion positions only: the full computation's gradient, bitwise; in vocabulary pieces, to 1e-6."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from client.engine import Example, clipped_gradient_sum, make_engine
from client.engine.batches import collate
from client.engine.losses import ChunkedCrossEntropy, causal_lm_loss, classification_loss
from common.errors import InvalidInput

CAUSAL = ("llama", "qwen2", "mistral", "gemma", "gpt2", "opt")


def full_loss(model, batch):
    """All logits, all positions; the definition."""
    logits = model(input_ids=batch.input_ids, use_cache=False).logits
    logits = logits if logits.dtype == torch.float64 else logits.float()
    targets = F.pad(batch.labels, (0, 1), value=-100)[:, 1:]
    each = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-100, reduction="none").view(
        targets.shape
    )
    return (each.sum(1) / (targets != -100).sum(1)).sum()


def gradient(model, loss, batch):
    model.eval()
    model.zero_grad()
    value = loss(model, batch)
    value.backward()
    return value.detach(), torch.cat([p.grad.reshape(-1) for p in model.parameters() if p.requires_grad])


@pytest.mark.parametrize("family", CAUSAL)
def test_completion_only_is_the_full_computation(build, make_examples, error, family):
    model = build(family, "all")
    batch = collate(make_examples("causal-lm"), pad_token_id=0, device=torch.device("cpu"))
    value, found = gradient(model, causal_lm_loss(head_is_trained=False), batch)
    wanted_value, wanted = gradient(model, full_loss, batch)
    assert float(value) == pytest.approx(float(wanted_value), rel=1e-13)
    assert error(found, wanted) < 1e-12


def test_completion_only_is_bitwise_where_the_products_are(build, make_examples):
    # With few features, products of a row do not depend on how many rows there are; so nothing may differ at all.
    model = build("llama", "qv", dtype=torch.float32)
    batch = collate(make_examples("causal-lm", (16, 16)), pad_token_id=0, device=torch.device("cpu"))
    batch.labels[:, :1] = batch.input_ids[:, :1]
    batch.labels[batch.labels == -100] = batch.input_ids[batch.labels == -100]
    batch.labels[:, ::2] = -100

    def weighted_full(model, batch):
        logits = model(input_ids=batch.input_ids, use_cache=False).logits.float()
        targets = F.pad(batch.labels, (0, 1), value=-100)[:, 1:]
        each = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-100, reduction="none")
        weights = (1.0 / (targets != -100).sum(1).double()).repeat_interleave(targets.shape[1])
        return (each * weights.float()).sum()

    _, found = gradient(model, causal_lm_loss(head_is_trained=False), batch)
    _, wanted = gradient(model, weighted_full, batch)
    assert torch.equal(found, wanted)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("family", ["llama", "qwen2", "gpt2"])
@pytest.mark.parametrize("chunk", [1, 17, 61, 1000])
def test_pieces_of_the_vocabulary_change_nothing(build, make_examples, error, family, chunk, dtype):
    model, examples = build(family, dtype=dtype), make_examples("causal-lm")
    whole = make_engine(model, task="causal-lm", pad_token_id=0, max_length=12)
    pieces = make_engine(model, task="causal-lm", pad_token_id=0, max_length=12, vocabulary_chunk=chunk)
    assert error(pieces.clipped_sum(examples, 0.5), whole.clipped_sum(examples, 0.5)) < 1e-6
    batch = whole.batch(examples)
    with torch.no_grad():
        model.eval()
        assert float(pieces.loss(model, batch)) == pytest.approx(float(whole.loss(model, batch)), rel=1e-6)


def test_chunked_cross_entropy_has_the_right_gradient():
    torch.manual_seed(0)
    hidden = torch.randn(5, 6, dtype=torch.float64, requires_grad=True)
    weight, bias = torch.randn(11, 6, dtype=torch.float64), torch.randn(11, dtype=torch.float64)
    target, scale = torch.tensor([0, 10, 3, 4, 7]), torch.rand(5, dtype=torch.float64)
    assert torch.autograd.gradcheck(
        lambda h: ChunkedCrossEntropy.apply(h, weight, bias, target, scale, 4), (hidden,), atol=1e-8
    )
    wanted = (F.cross_entropy(hidden @ weight.t() + bias, target, reduction="none") * scale).sum()
    assert float(ChunkedCrossEntropy.apply(hidden, weight, bias, target, scale, 3).detach()) == pytest.approx(
        float(wanted.detach())
    )


def test_a_model_that_scales_its_logits_is_not_chunked(build):
    with pytest.raises(InvalidInput, match="final_logit_softcapping"):
        make_engine(build("gemma"), task="causal-lm", pad_token_id=0, max_length=12, vocabulary_chunk=16)


def test_a_trained_head_is_not_chunked(build):
    model = build("llama", ["q_proj"], modules_to_save=["lm_head"])
    with pytest.raises(InvalidInput, match="frozen output head"):
        make_engine(model, task="causal-lm", pad_token_id=0, max_length=12, vocabulary_chunk=16)


def test_the_loss_is_each_example_s_own_mean(build, make_examples):
    model, examples = build("llama", dtype=torch.float32), make_examples("causal-lm")
    engine = make_engine(model, task="causal-lm", pad_token_id=0, max_length=12)
    model.eval()
    stock = [
        model(input_ids=torch.as_tensor(e.input_ids)[None], labels=torch.as_tensor(e.labels)[None]).loss
        for e in examples
    ]
    assert float(engine.loss(model, engine.batch(examples)).detach()) == pytest.approx(
        float(sum(stock).detach()), rel=1e-5
    )


def test_the_class_loss_is_the_model_s(build, make_examples):
    model, examples = build("bert", dtype=torch.float32).eval(), make_examples("classification")
    batch = collate(examples, pad_token_id=0, device=torch.device("cpu"))
    stock = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, labels=batch.labels).loss
    assert float(classification_loss(model, batch).detach()) == pytest.approx(
        float(stock.detach()) * len(examples), rel=1e-5
    )


def test_repeating_completion_tokens_does_not_raise_a_record_s_weight(build):
    # the mean, not the sum: a long completion counts like a short one
    model = build("llama")
    ids = np.array([5, 9, 9, 9, 9, 9, 9, 9])
    batch = {"input_ids": torch.as_tensor(ids)[None], "labels": torch.as_tensor(ids)[None]}
    one = clipped_gradient_sum(model, batch, clipping_norm=1e9)
    two = clipped_gradient_sum(model, {k: v.repeat(2, 1) for k, v in batch.items()}, clipping_norm=1e9)
    assert all(torch.allclose(two[name], 2 * one[name], rtol=1e-5, atol=1e-9) for name in one)
    assert isinstance(Example(ids, ids), Example)
