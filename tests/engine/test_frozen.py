"""Kept states of frozen layers: the same gradients as the whole model, for every family; refused where they are not."""

import numpy as np
import pytest
import torch
from torch import nn

from client.engine import Example, make_engine, self_test
from client.engine.frozen import FrozenStates, key_of, transformer_blocks
from common.errors import InvalidInput

SECOND_BLOCK = {
    "llama": ["layers.1.self_attn.q_proj", "layers.1.self_attn.v_proj"],
    "qwen2": ["layers.1.self_attn.v_proj"],
    "mistral": ["layers.1.mlp.down_proj"],
    "gemma": ["layers.1.self_attn.q_proj"],
    "gpt2": ["h.1.attn.c_attn"],
    "opt": ["layers.1.self_attn.v_proj", "layers.1.fc1"],
    "bert": ["layer.1.attention.self.value"],
    "roberta": ["layer.1.attention.self.query"],
}


def task_of(family):
    return "classification" if family in ("bert", "roberta") else "causal-lm"


def engine_of(model, family, **settings):
    return make_engine(model, task=task_of(family), pad_token_id=0, max_length=12, **settings)


def keeping(model, family, states=None):
    engine = engine_of(model, family)
    engine.keep_frozen(states or FrozenStates(), "a backbone")
    return engine


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("family", SECOND_BLOCK)
def test_kept_states_give_the_gradients_of_the_whole_model(build, make_examples, loop, clipped, error, family, dtype):
    model = build(family, SECOND_BLOCK[family], dtype=dtype)
    examples = make_examples(task_of(family))
    wanted, whole = loop(model, examples), engine_of(model, family)
    threshold = float(wanted.norm(dim=1).median())
    plain = whole.clipped_sum(examples, threshold)
    engine = keeping(model, family)
    engine.prepare(examples)
    assert len(engine.source.frozen) == len(examples)
    assert engine.batch(examples).states is not None
    found = engine.clipped_sum(examples, threshold)
    assert error(found, plain) < 1e-6
    # In float32 the threshold itself is lowered by a millionth (``MARGIN``).
    assert error(found, clipped(wanted, threshold)) < (1e-6 if dtype == torch.float64 else 3e-6)
    assert error(engine.plain_sum(examples), wanted.sum(0)) < 1e-6


def test_the_blocks_below_are_not_run_again(build, make_examples):
    model, examples = build("bert", SECOND_BLOCK["bert"]), make_examples("classification")
    engine = keeping(model, "bert")
    engine.prepare(examples)
    below, above = (block.intermediate for block in transformer_blocks(model))
    seen = []
    handles = [part.register_forward_hook(lambda module, *_: seen.append(module)) for part in (below, above)]
    engine.clipped_sum(examples, 1.0)
    for handle in handles:
        handle.remove()
    assert above in seen
    assert below not in seen


def test_a_state_follows_the_adapter_above_it(build, make_examples, loop, error):
    """What is kept stays right while the adapter moves: nothing trained lies below the cut."""
    model, examples = build("llama", SECOND_BLOCK["llama"]), make_examples("causal-lm")
    engine = keeping(model, "llama")
    engine.prepare(examples)
    engine.subtract(torch.full((engine.num_parameters,), 0.05, dtype=torch.float64))
    assert error(engine.plain_sum(examples), loop(model, examples).sum(0)) < 1e-6


def test_a_record_without_a_kept_state_is_computed_in_full(build, make_examples, loop, error):
    model, examples = build("llama", SECOND_BLOCK["llama"]), make_examples("causal-lm")
    engine = keeping(model, "llama")
    engine.prepare(examples[:2])
    assert error(engine.plain_sum(examples), loop(model, examples).sum(0)) < 1e-6


def test_a_bad_record_is_set_aside_and_changes_nothing(build, make_examples, error):
    model, examples = build("bert", SECOND_BLOCK["bert"]), make_examples("classification")
    bad = [Example(np.array([5, 10**6]), 0), Example(np.array([], dtype=np.int64), 0), Example(None, 0)]
    engine = keeping(model, "bert")
    engine.prepare([*bad, *examples])
    assert len(engine.source.frozen) == len(examples)
    wanted = engine_of(model, "bert").clipped_sum(examples, 1.0)
    assert error(engine.clipped_sum([*bad, *examples], 1.0), wanted) < 1e-6
    assert engine.set_aside == len(bad)


def test_the_self_test_passes_and_keeps_nothing_of_its_own(build):
    engine = keeping(build("bert", SECOND_BLOCK["bert"]), "bert")
    self_test(engine)
    assert len(engine.source.frozen) == 0


def test_the_model_is_left_as_found(build, make_examples):
    model, examples = build("gpt2", SECOND_BLOCK["gpt2"]).train(), make_examples("causal-lm")
    before = {name: (set(module.__dict__), module.training) for name, module in model.named_modules()}
    engine = keeping(model, "gpt2")
    engine.prepare(examples)
    engine.clipped_sum(examples, 0.5)
    assert {name: (set(module.__dict__), module.training) for name, module in model.named_modules()} == before
    assert all(not m._forward_hooks for m in model.modules())


def test_states_are_shared_by_what_computed_them_only(build, make_examples):
    states, examples = FrozenStates(), make_examples("classification")
    first, same = (keeping(build("bert", SECOND_BLOCK["bert"]), "bert", states) for _ in range(2))
    first.prepare(examples)
    assert same.source.frozen.missing(examples) == []
    other = engine_of(build("bert", SECOND_BLOCK["bert"]), "bert")
    other.keep_frozen(states, "another backbone")
    assert len(other.source.frozen.missing(examples)) == len(examples)


def test_tokens_of_another_width_are_other_tokens():
    assert key_of(Example(np.array([1, 0], dtype=np.int32), 0)) != key_of(Example(np.array([1], dtype=np.int64), 0))


@pytest.mark.parametrize(
    ("settings", "why"),
    [({"kind": "opacus"}, "fused engine"), ({"dropout": True}, "without dropout"), ({}, "first layer .* is trained")],
)
def test_refused_where_nothing_can_be_kept(build, settings, why):
    engine = engine_of(build("bert"), "bert", **settings)
    with pytest.raises(InvalidInput, match=why):
        engine.keep_frozen(FrozenStates(), "a backbone")


class TwoStates(nn.Module):
    """A block that hands on a second thing beside its state."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, *args, **named):
        state = self.inner(*args, **named)
        return (state[0] if isinstance(state, tuple) else state, 0)


def test_refused_when_a_layer_hands_on_more_than_its_state(build):
    model = build("bert", SECOND_BLOCK["bert"])
    blocks = transformer_blocks(model)
    blocks[0] = TwoStates(blocks[0])
    engine = keeping(model, "bert")
    with pytest.raises(InvalidInput, match="more than one state"):
        engine.remember([Example(np.array([3, 4, 5]), 0)])


def test_refused_when_something_trained_lies_below(build):
    """The self-test sees it: the whole model has a gradient there, the kept states have none."""
    model = build("bert", SECOND_BLOCK["bert"])
    embeddings = model.get_base_model().bert.embeddings
    embeddings.LayerNorm = nn.Sequential(embeddings.LayerNorm, nn.Linear(16, 16).double())
    with pytest.raises(InvalidInput, match="not those of the whole model"):
        self_test(keeping(model, "bert"))
