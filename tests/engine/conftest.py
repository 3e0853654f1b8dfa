"""Small models of the families the engine must know, and the plain witness: a loop over batches of one."""

import warnings
from collections.abc import Callable

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    RobertaConfig,
    RobertaForSequenceClassification,
)

from client.engine import Example

VOCAB = 61
COMMON = {
    "vocab_size": VOCAB,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 40,
    "pad_token_id": 0,
}
TOKENS = {"bos_token_id": 1, "eos_token_id": 2}
GROUPED = {**COMMON, **TOKENS, "num_key_value_heads": 2}

FAMILIES: dict[str, Callable[[], torch.nn.Module]] = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**GROUPED)),
    "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**GROUPED, tie_word_embeddings=True)),
    "mistral": lambda: MistralForCausalLM(MistralConfig(**GROUPED, sliding_window=5)),
    "gemma": lambda: Gemma2ForCausalLM(
        Gemma2Config(**GROUPED, head_dim=4, query_pre_attn_scalar=4, tie_word_embeddings=True, sliding_window=8)
    ),
    "gpt2": lambda: GPT2LMHeadModel(
        GPT2Config(vocab_size=VOCAB, n_embd=16, n_layer=2, n_head=4, n_positions=40, pad_token_id=0, **TOKENS)
    ),
    "opt": lambda: OPTForCausalLM(
        OPTConfig(
            vocab_size=VOCAB, hidden_size=16, ffn_dim=24, num_hidden_layers=2, num_attention_heads=4,
            max_position_embeddings=40, word_embed_proj_dim=16, pad_token_id=0, **TOKENS,
        )
    ),
    "bert": lambda: BertForSequenceClassification(BertConfig(**COMMON, num_labels=3)),
    "roberta": lambda: RobertaForSequenceClassification(RobertaConfig(**COMMON, **TOKENS, num_labels=3)),
}  # fmt: skip
CLASSIFIERS = ("bert", "roberta")
QUERY_VALUE = {"gpt2": ["c_attn"], "bert": ["query", "value"], "roberta": ["query", "value"]}
ALL = {
    "gpt2": ["c_attn", "c_proj", "c_fc"],
    "bert": ["query", "key", "value", "dense"],
    "roberta": ["query", "key", "value", "output.dense", "intermediate.dense"],
    "opt": ["q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"],
}
DECODER = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def task_of(family):
    return "classification" if family in CLASSIFIERS else "causal-lm"


@pytest.fixture
def build():
    """build(family, targets="qv" | "all" | list, dtype=..., freeze_a=False, **lora) -> PeftModel, B away from zero."""

    def make(family, targets="qv", *, dtype=torch.float64, freeze_a=False, model=None, **lora):
        torch.manual_seed(sum(map(ord, family)))
        backbone = FAMILIES[family]() if model is None else model
        if targets == "qv":
            targets = QUERY_VALUE.get(family, ["q_proj", "v_proj"])
        elif targets == "all":
            targets = ALL.get(family, DECODER)
        settings = {"r": 4, "lora_alpha": 8, "target_modules": targets, "fan_in_fan_out": family == "gpt2"} | lora
        if family in CLASSIFIERS:
            settings.setdefault("task_type", "SEQ_CLS")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # peft reads a property that transformers renames
            warnings.filterwarnings("ignore", message=".*tie_word_embeddings.*")
            adapted = get_peft_model(backbone, LoraConfig(**settings))
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.2)
            if freeze_a and "lora_A" in name:
                parameter.requires_grad_(False)
        return adapted.to(dtype)

    return make


@pytest.fixture
def make_examples():
    """make_examples(task, lengths) -> public random examples; completions are the last two thirds."""

    def make(task, lengths=(12, 7, 9, 12, 3), *, seed=0, labels=3):
        rng = np.random.default_rng(seed)
        out = []
        for length in lengths:
            ids = rng.integers(3, VOCAB, length)
            target = ids.copy()
            target[: length // 3] = -100
            out.append(Example(ids, target if task == "causal-lm" else int(rng.integers(labels))))
        return out

    return make


def one_gradient(model, example):
    """The witness: stock model, batch of one, no padding, full logits; flat over trainable parameters.

    The loss is written out because transformers computes its own in float32 (``test_losses`` compares the two).
    """
    was = {module: module.training for module in model.modules()}
    model.eval()
    parameters = [p for p in model.parameters() if p.requires_grad]
    ids = torch.as_tensor(example.input_ids)[None]
    labels = torch.as_tensor(example.labels)
    # Without a cache: a layer used twice would find its own first keys in it.
    logits = model(input_ids=ids, use_cache=False).logits[0] if labels.ndim else model(input_ids=ids).logits
    loss = F.cross_entropy(logits[:-1], labels[1:]) if labels.ndim else F.cross_entropy(logits, labels.reshape(1))
    found = torch.autograd.grad(loss, parameters, allow_unused=True)
    for module, flag in was.items():
        module.training = flag
    return torch.cat(
        [
            torch.zeros(p.numel(), dtype=p.dtype) if g is None else g.reshape(-1)
            for p, g in zip(parameters, found, strict=True)
        ]
    )


@pytest.fixture
def loop():
    """loop(model, examples) -> rows [n, P] from batches of one."""
    return lambda model, examples: torch.stack([one_gradient(model, example) for example in examples])


@pytest.fixture
def clipped():
    """clipped(rows, C) -> the sum of clipped rows, by its definition."""

    def total(rows, clipping_norm):
        norms = rows.norm(dim=1, keepdim=True)
        return (rows * torch.clamp(clipping_norm / norms, max=1.0)).sum(0)

    return total


def relative(found, wanted):
    return float((found.double() - wanted.double()).norm() / wanted.double().norm())


@pytest.fixture
def error():
    """error(found, wanted) -> relative L2 difference."""
    return relative
