"""Per-example gradients equal a loop over batches of one, for every family, checkpointing, padding, precision."""

import pytest
import torch

from client.engine import clipped_gradient_sum, make_engine, self_test
from client.engine.batches import collate

FAMILIES = ("llama", "qwen2", "mistral", "gemma", "gpt2", "opt", "bert", "roberta")
CHECKPOINTS = (None, False, True)


def task_of(family):
    return "classification" if family in ("bert", "roberta") else "causal-lm"


def enable_checkpoints(model, reentrant):
    if reentrant is not None:
        model.get_base_model().activation_checkpointing_enable({"use_reentrant": reentrant})


def engine_rows(engine, examples):
    batch = collate(examples, pad_token_id=0, device=torch.device("cpu"))
    return engine.source.rows(batch, engine.loss)[:, : engine.num_parameters].clone()


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
@pytest.mark.parametrize("checkpoint", CHECKPOINTS)
@pytest.mark.parametrize("targets", ["qv", "all"])
@pytest.mark.parametrize("family", FAMILIES)
def test_rows_equal_a_loop_of_batches_of_one(build, make_examples, loop, error, family, targets, checkpoint):
    model, examples = build(family, targets), make_examples(task_of(family))
    wanted = loop(model, examples)
    enable_checkpoints(model, checkpoint)
    engine = make_engine(model, task=task_of(family), pad_token_id=0, max_length=12)
    found = engine_rows(engine, examples)
    for row in range(len(examples)):
        assert error(found[row], wanted[row]) < 1e-9


@pytest.mark.parametrize("family", FAMILIES)
def test_the_self_test_passes_and_leaves_the_parameters(build, family):
    model = build(family, "all", dtype=torch.float32)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    self_test(make_engine(model, task=task_of(family), pad_token_id=0, max_length=12))
    assert all(torch.equal(before[name], p) for name, p in model.named_parameters())


@pytest.mark.parametrize("family", ["llama", "bert"])
@pytest.mark.parametrize("freeze", ["a", "b"])
def test_a_frozen_factor_has_no_slot_and_the_other_is_right(build, make_examples, loop, error, family, freeze):
    model, examples = build(family, freeze_a=freeze == "a"), make_examples(task_of(family))
    for name, parameter in model.named_parameters():
        if freeze == "b" and "lora_B" in name:
            parameter.requires_grad_(False)
    engine = make_engine(model, task=task_of(family), pad_token_id=0, max_length=12)
    assert not any(f"lora_{freeze.upper()}" in name for name in engine.parameters)
    assert error(engine_rows(engine, examples), loop(model, examples)) < 1e-9


@pytest.mark.parametrize(
    "lora",
    [
        {"use_rslora": True},
        {"lora_bias": True},
        {"bias": "lora_only"},
        {"target_modules": ["q_proj", "lm_head"]},
        {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
        {"rank_pattern": {"v_proj": 2}, "alpha_pattern": {"q_proj": 32}},
        {"layers_to_transform": [1]},
    ],
    ids=lambda lora: "-".join(lora),
)
def test_lora_variations_are_owned(build, make_examples, loop, error, lora):
    model, examples = build("qwen2", **({"target_modules": ["q_proj", "v_proj"]} | lora)), make_examples("causal-lm")
    engine = make_engine(model, task="causal-lm", pad_token_id=0, max_length=12)
    assert error(engine_rows(engine, examples), loop(model, examples)) < 1e-9


def test_a_layer_used_twice_adds_both_uses(build, make_examples, loop, error):
    model, examples = build("llama", "all"), make_examples("causal-lm")
    layers = model.get_base_model().model.layers
    layers[1] = layers[0]
    engine = make_engine(model, task="causal-lm", pad_token_id=0, max_length=12)
    assert error(engine_rows(engine, examples), loop(model, examples)) < 1e-9


@pytest.mark.parametrize("family", ["llama", "gpt2", "bert"])
@pytest.mark.parametrize("rows", [1, 2, 100])
def test_micro_batches_never_change_the_clipped_sum(build, make_examples, loop, clipped, error, family, rows):
    model, examples = build(family), make_examples(task_of(family), (12, 5, 9, 1 + 5, 11, 4, 8))
    wanted = loop(model, examples)
    threshold = float(wanted.norm(dim=1).median())
    engine = make_engine(model, task=task_of(family), pad_token_id=0, max_length=12, micro_batch_size=rows)
    assert error(engine.clipped_sum(examples, threshold), clipped(wanted, threshold)) < 1e-6
    assert error(engine.plain_sum(examples), wanted.sum(0)) < 1e-6


def test_the_public_function_gives_named_sums_and_leaves_the_model_as_found(build, make_examples, loop, clipped, error):
    model, examples = build("llama", "all"), make_examples("causal-lm")
    wanted = clipped(loop(model, examples), 0.5)
    batch = collate(examples, pad_token_id=0, device=torch.device("cpu"))
    model.train()
    marker = next(p for p in model.parameters() if p.requires_grad)
    marker.grad = torch.ones_like(marker)
    before = {name: dict(module.__dict__) for name, module in model.named_modules()}
    found = clipped_gradient_sum(
        model,
        {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask, "labels": batch.labels},
        clipping_norm=0.5,
    )
    assert list(found) == [name for name, p in model.named_parameters() if p.requires_grad]
    assert all(t.dtype == torch.float32 and t.shape == model.get_parameter(name).shape for name, t in found.items())
    assert error(torch.cat([t.reshape(-1) for t in found.values()]), wanted) < 1e-6
    assert torch.equal(marker.grad, torch.ones_like(marker))
    assert sum(p.grad is not None for p in model.parameters()) == 1
    for name, module in model.named_modules():
        assert set(module.__dict__) == set(before[name])
        assert module.training
        assert "forward" not in module.__dict__


def test_the_public_function_takes_a_classifier_and_rows_without_a_label(build, make_examples, loop, clipped, error):
    model, examples = build("bert", freeze_a=True), make_examples("classification")
    batch = collate(examples, pad_token_id=0, device=torch.device("cpu"))
    found = clipped_gradient_sum(
        model,
        {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask, "labels": batch.labels},
        clipping_norm=0.5,
    )
    assert error(torch.cat([t.reshape(-1) for t in found.values()]), clipped(loop(model, examples), 0.5)) < 1e-6
    causal, texts = build("llama"), make_examples("causal-lm")
    batch = collate(texts, pad_token_id=0, device=torch.device("cpu"))
    batch.labels[1:] = -100
    pieces = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask, "labels": batch.labels}
    found = clipped_gradient_sum(causal, pieces, clipping_norm=0.5)
    assert error(torch.cat([t.reshape(-1) for t in found.values()]), clipped(loop(causal, texts[:1]), 0.5)) < 1e-6
    batch.labels[:] = -100
    assert not any(t.any() for t in clipped_gradient_sum(causal, pieces, clipping_norm=0.5).values())


@pytest.mark.parametrize("precision", ["bf16", "float32"])
@pytest.mark.parametrize("base", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("family", ["llama", "gpt2", "bert"])
def test_half_precision_stays_near_the_float32_rows(build, make_examples, loop, error, family, base, precision):
    model, examples = build(family, "all", dtype=torch.float32), make_examples(task_of(family))
    wanted = loop(model, examples)
    for parameter in model.parameters():
        if not parameter.requires_grad:
            parameter.data = parameter.data.to(base)
    engine = make_engine(model, task=task_of(family), pad_token_id=0, max_length=12, precision=precision)
    found = engine_rows(engine, examples)
    assert found.dtype == torch.float32
    assert error(found, wanted) < (1e-5 if base == torch.float32 and precision == "float32" else 0.05)


def test_float16_autocast_uses_no_scaler_and_stays_near(build, make_examples, loop, error):
    model, examples = build("llama", "all", dtype=torch.float32), make_examples("causal-lm")
    engine = make_engine(model, task="causal-lm", pad_token_id=0, max_length=12, precision="fp16")
    assert error(engine_rows(engine, examples), loop(model, examples)) < 0.02
