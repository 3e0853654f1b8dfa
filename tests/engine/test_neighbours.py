"""A row does not move when its neighbours do, whatever they are: long, loud, malformed or not finite."""

import numpy as np
import pytest
import torch

from client.engine import Example, FlatClipping, make_engine

FAMILIES = ("llama", "qwen2", "mistral", "gemma", "gpt2", "opt", "bert", "roberta")


def task_of(family):
    return "classification" if family in ("bert", "roberta") else "causal-lm"


def rows_of(engine, examples):
    return engine.source.rows(engine.batch(examples), engine.loss)[:, : engine.num_parameters].clone()


@pytest.mark.parametrize("dropout", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_row_is_unmoved_by_adversarial_neighbours(build, make_examples, error, family, dropout):
    task = task_of(family)
    model = build(family, "all", lora_dropout=0.1)
    engine = make_engine(model, task=task, pad_token_id=0, max_length=20, dropout=dropout, dropout_seed=3)
    victim = make_examples(task, (7,))[0]
    alone = rows_of(engine, [victim])[0]
    quiet = make_examples(task, (7, 7, 7), seed=1)
    loud = [Example(np.full(20, 60), np.full(20, 59) if task == "causal-lm" else 2) for _ in range(3)]
    # Gemma's own attention takes its softmax in float32, whose rounding depends on the padded width.
    rounding = 1e-5 if family == "gemma" else 1e-9
    for neighbours in (quiet, loud, [*loud, *quiet]):
        assert error(rows_of(engine, [*neighbours, victim])[-1], alone) < rounding
        assert error(rows_of(engine, [victim, *neighbours])[0], alone) < rounding


@pytest.mark.parametrize("precision", ["bf16", "float32"])
@pytest.mark.parametrize("family", ["llama", "gpt2", "bert"])
def test_a_record_moves_the_sum_by_its_own_row_whatever_the_precision(build, make_examples, family, precision):
    """Its length decides how its neighbours are padded and cut; what that rounds must not count beside C."""
    model = build(family, "all", dtype=torch.float32)
    for parameter in model.parameters():
        if precision == "bf16" and not parameter.requires_grad:
            parameter.data = parameter.data.to(torch.bfloat16)
    task = task_of(family)
    engine = make_engine(model, task=task, pad_token_id=0, max_length=40, micro_batch_size=2, precision=precision)
    rest = make_examples(task, tuple(range(3, 20)) * 3)
    clipping_norm = float(rows_of(engine, rest[:9]).norm(dim=1).median())
    without = engine.clipped_sum(rest, clipping_norm).double()
    for record in make_examples(task, (3, 11, 40), seed=5):
        moved = engine.clipped_sum([*rest, record], clipping_norm).double() - without
        own = engine.clipped_sum([record], clipping_norm).double()
        others = float((moved - own).norm()) / clipping_norm
        assert others < (1e-4 if precision == "bf16" else 1e-5), others


def poison(model, token):
    """Make every record that holds ``token`` non-finite."""
    with torch.no_grad():
        model.get_input_embeddings().weight[token] = float("inf")


@pytest.mark.parametrize("family", ["llama", "mistral", "bert"])
@pytest.mark.parametrize("kind", ["fused", "opacus"])
def test_a_row_that_is_not_finite_counts_zero_and_touches_nobody(build, make_examples, error, family, kind):
    task = task_of(family)
    model, good = build(family), make_examples(task, (9, 6, 11), seed=2)
    for example in good:
        example.input_ids[example.input_ids == 7] = 8
    bad = Example(np.array([9, 7, 9, 9, 9]), np.array([9, 9, 9, 9, 9]) if task == "causal-lm" else 1)
    engine = make_engine(model, task=task, kind=kind, pad_token_id=0, max_length=12)
    wanted = engine.clipped_sum(good, 0.3)
    plain = engine.plain_sum(good)
    poison(model, 7)
    assert torch.isfinite(engine.clipped_sum([bad], 0.3)).all()
    assert not engine.clipped_sum([bad], 0.3).any()
    assert error(engine.clipped_sum([good[0], bad, *good[1:]], 0.3), wanted) < 1e-6
    assert error(engine.plain_sum([good[0], bad, *good[1:]]), plain) < 1e-6


MALFORMED = {
    "empty": Example(np.zeros(0, dtype=int), np.zeros(0, dtype=int)),
    "no completion token": Example(np.array([5, 6, 7]), np.array([-100, -100, -100])),
    "only the first token is labelled": Example(np.array([5, 6, 7]), np.array([5, -100, -100])),
    "too long": Example(np.full(99, 5), np.full(99, 5)),
    "token outside the vocabulary": Example(np.array([5, 61, 7]), np.array([5, 6, 7])),
    "negative token": Example(np.array([5, -1, 7]), np.array([5, 6, 7])),
    "label outside the vocabulary": Example(np.array([5, 6, 7]), np.array([5, 6, 61])),
    "labels of another length": Example(np.array([5, 6, 7]), np.array([5, 6])),
    "not numbers": Example(np.array(["a", "b"]), np.array([1, 2])),
    "floats": Example(np.array([1.0, 2.0]), np.array([1, 2])),
    "nothing": Example(None, None),
    "two axes": Example(np.ones((2, 2), dtype=int), np.ones((2, 2), dtype=int)),
    "huge": Example(np.array([2**63 - 1, 5]), np.array([5, 6])),
    "text": Example("some text", 1),
}


@pytest.mark.parametrize("what", MALFORMED)
def test_a_malformed_record_counts_zero_and_raises_nothing(build, make_examples, what):
    model, good = build("llama"), make_examples("causal-lm")
    engine = make_engine(model, task="causal-lm", pad_token_id=0, max_length=12)
    wanted = engine.clipped_sum(good, 0.3)
    assert torch.equal(engine.clipped_sum([*good, MALFORMED[what]], 0.3), wanted)
    assert engine.set_aside == 1
    assert not engine.clipped_sum([MALFORMED[what]], 0.3).any()


@pytest.mark.parametrize("label", [3, -1, 10**9, 0.5, None, "1", np.array([0])])
def test_a_class_that_does_not_exist_counts_zero(build, make_examples, label):
    model, good = build("bert"), make_examples("classification")
    engine = make_engine(model, task="classification", pad_token_id=0, max_length=12)
    wanted = engine.clipped_sum(good, 0.3)
    assert torch.equal(engine.clipped_sum([*good, Example(np.array([5, 6]), label)], 0.3), wanted)


def test_an_empty_draw_gives_zeros(build):
    engine = make_engine(build("llama"), task="causal-lm", pad_token_id=0, max_length=12)
    assert engine.clipped_sum([], 1.0).shape == (engine.num_parameters,)
    assert not engine.clipped_sum([], 1.0).any()
    assert not engine.plain_sum([]).any()


@pytest.mark.parametrize("limit", [1, 2, 3])
def test_running_out_of_memory_halves_and_changes_nothing(build, make_examples, error, limit, monkeypatch):
    model, examples = build("llama"), make_examples("causal-lm", (12, 7, 9, 12, 3, 8, 8))
    engine = make_engine(model, task="causal-lm", pad_token_id=0, max_length=12)
    wanted, rows = engine.clipped_sum(examples, 0.3), engine.source.rows
    asked = []

    def rationed(batch, loss):
        asked.append(batch.size)
        if batch.size > limit:
            raise torch.OutOfMemoryError("made up")
        return rows(batch, loss)

    monkeypatch.setattr(engine.source, "rows", rationed)
    assert error(engine.clipped_sum(examples, 0.3), wanted) < 1e-6
    assert asked[0] > limit
    assert engine.set_aside == 0
    asked.clear()
    assert error(engine.clipped_sum(examples, 0.3), wanted) < 1e-6
    assert max(asked) <= limit  # what did not fit once is not tried again


def test_a_record_that_fits_at_no_size_counts_zero_and_is_only_counted(
    build, make_examples, error, monkeypatch, caplog
):
    model, examples = build("llama"), make_examples("causal-lm", (12, 7, 9, 11, 3))
    engine = make_engine(model, task="causal-lm", pad_token_id=0, max_length=12)
    wanted, rows = engine.clipped_sum(examples[1:], 0.3), engine.source.rows

    def short_only(batch, loss):
        if batch.length > 11:
            raise MemoryError("secret: " + str(batch.input_ids))
        return rows(batch, loss)

    monkeypatch.setattr(engine.source, "rows", short_only)
    with caplog.at_level("WARNING"):
        assert error(engine.clipped_sum(examples, 0.3), wanted) < 1e-6
    assert engine.set_aside == 1
    assert "secret" not in caplog.text
    assert "1" not in caplog.text.split("record")[1]


def test_a_failure_between_rows_and_sum_adds_no_row_twice(build, make_examples, error):
    class Brittle(FlatClipping):
        def add(self, rows, layout, total):
            ratio = super().add(rows, layout, total)
            if len(rows) > 2:
                raise torch.OutOfMemoryError("after the sum was changed")
            return ratio

    examples = make_examples("causal-lm", (12, 7, 9, 12, 3, 8, 8))
    engine = make_engine(build("llama"), task="causal-lm", pad_token_id=0, max_length=12)
    wanted, bits = engine.clipped_sum_and_bits(examples, 0.3)
    found, again = engine.clipped_sum_and_bits(examples, Brittle(0.3))
    assert error(found, wanted) < 1e-6
    assert again == bits
