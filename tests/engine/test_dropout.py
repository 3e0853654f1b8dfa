"""Dropout masks belong to the record: right gradients, right rate, no neighbour, fresh in every step."""

import numpy as np
import pytest
import torch
from scipy import stats
from torch import nn

from client.engine import make_engine, self_test
from client.engine.dropout import dropped, keep_mask, record_seeds


def task_of(family):
    return "classification" if family == "bert" else "causal-lm"


def engine_of(model, family, **settings):
    return make_engine(model, task=task_of(family), pad_token_id=0, max_length=12, dropout=True, **settings)


class Given(nn.Module):
    """Stands in for ``nn.Dropout`` in the witness: multiplies by the mask that belongs to this record."""

    def __init__(self, name, rate, seed):
        super().__init__()
        self.name, self.rate, self.seed = name, rate, seed

    def forward(self, x):
        shape = x.shape if x.shape[0] == 1 else (1, *x.shape)  # OPT's fc1 sees [positions, features]
        return x * keep_mask(self.seed, self.name, self.rate, shape).view(x.shape).to(x.dtype) / (1 - self.rate)


def loop_with_masks(model, engine, examples, loop):
    """Batches of one through the stock layers, with the same masks as explicit factors."""
    rows = []
    for example in examples:
        seed, replaced = engine.batch([example]).seeds, []
        for name, module in list(model.named_modules()):
            if isinstance(module, nn.Dropout) and module.p > 0:
                parent, _, leaf = name.rpartition(".")
                layer = name.split(".lora_dropout")[0]
                container = model.get_submodule(parent)
                replaced.append((container, leaf, module))
                setattr(container, leaf, Given(layer, module.p, seed))
        rows.append(loop(model, [example])[0])
        for container, leaf, module in replaced:
            setattr(container, leaf, module)
    return torch.stack(rows)


@pytest.mark.parametrize("checkpoint", [None, False, True])
@pytest.mark.parametrize("family", ["llama", "gpt2", "bert", "opt"])
def test_rows_with_dropout_equal_a_loop_with_the_same_masks(build, make_examples, loop, error, family, checkpoint):
    model, examples = build(family, "all", lora_dropout=0.3), make_examples(task_of(family))
    if family == "gpt2":  # its attention is a kernel without masks of ours
        model.get_base_model().set_attn_implementation("sdpa")
    if family == "bert":
        model.get_base_model().set_attn_implementation("sdpa")
    engine = engine_of(model, family, dropout_seed=1)
    wanted = loop_with_masks(model, engine, examples, loop)
    if checkpoint is not None:
        model.get_base_model().activation_checkpointing_enable({"use_reentrant": checkpoint})
    found = engine.source.rows(engine.batch(examples), engine.loss)[:, : engine.num_parameters]
    assert error(found, wanted) < 1e-9
    off = make_engine(model, task=task_of(family), pad_token_id=0, max_length=12)
    assert error(off.source.rows(off.batch(examples), off.loss)[:, : off.num_parameters], wanted) > 0.1


def test_a_trained_bias_under_lora_dropout_is_right(build, make_examples, loop, error):
    model, examples = build("qwen2", lora_dropout=0.3, bias="lora_only"), make_examples("causal-lm")
    engine = engine_of(model, "qwen2", dropout_seed=1)
    found = engine.source.rows(engine.batch(examples), engine.loss)[:, : engine.num_parameters]
    assert error(found, loop_with_masks(model, engine, examples, loop)) < 1e-9


def test_masks_change_with_the_step_and_repeat_with_the_seed(build, make_examples):
    model, examples = build("llama", lora_dropout=0.3), make_examples("causal-lm")
    one, same = engine_of(model, "llama", dropout_seed=5), engine_of(model, "llama", dropout_seed=5)
    first, second = one.clipped_sum(examples, 0.5), one.clipped_sum(examples, 0.5)
    assert not torch.equal(first, second)
    assert torch.equal(first, same.clipped_sum(examples, 0.5))
    unseeded = [engine_of(model, "llama").clipped_sum(examples, 0.5) for _ in range(2)]
    assert not torch.equal(*unseeded)


def test_the_self_test_passes_with_dropout(build):
    self_test(engine_of(build("llama", "all", lora_dropout=0.3, dtype=torch.float32), "llama"))


def test_masks_keep_the_stated_share_and_are_independent():
    seeds = torch.tensor([1, 2, 3, -4], dtype=torch.int64)
    masks = torch.stack([keep_mask(seeds, layer, 0.1, (4, 50, 64)) for layer in ("a", "b")]).double().reshape(8, -1)
    kept = int(masks.sum())
    assert stats.binomtest(kept, masks.numel(), 0.9).pvalue > 1e-4
    correlations = np.corrcoef(masks.numpy()) - np.eye(8)
    assert np.abs(correlations).max() < 5 / np.sqrt(masks.shape[1])
    along = masks.reshape(8, 50, 64).numpy() - 0.9
    for shift in ((1, 0), (0, 1), (1, 1)):
        moved = np.roll(along, shift, axis=(1, 2))
        assert abs((along * moved).mean() / 0.09) < 5 / np.sqrt(masks.numel())


def test_padding_does_not_move_a_mask():
    seeds = torch.tensor([7, 8], dtype=torch.int64)
    short, long = keep_mask(seeds, "x", 0.5, (2, 3, 5, 4)), keep_mask(seeds, "x", 0.5, (2, 3, 9, 4))
    assert torch.equal(short, long[:, :, :5])


def test_flattened_inputs_get_the_masks_of_their_records():
    seeds, x = torch.tensor([7, 8], dtype=torch.int64), torch.ones(2, 5, 4)
    flat = dropped(x.reshape(10, 4), seeds, "x", 0.5, 5)
    assert torch.equal(flat.view(2, 5, 4), dropped(x, seeds, "x", 0.5, 5))
    assert set(flat.unique().tolist()) == {0.0, 2.0}


def test_a_record_s_seed_depends_on_itself_and_the_secret_alone(make_examples):
    examples = make_examples("causal-lm")
    cpu = torch.device("cpu")
    together = record_seeds(b"s", examples, cpu)
    assert torch.equal(together[2:3], record_seeds(b"s", examples[2:3], cpu))
    assert len(set(together.tolist())) == len(examples)
    assert not torch.equal(together, record_seeds(b"t", examples, cpu))
