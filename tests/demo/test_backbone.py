"""The embedded backbone: small, plain, loadable without a network, and as its card describes it."""

import json

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from deploy.demo import BACKBONE
from deploy.demo.card import sha256_of, table_of
from deploy.demo.records import TASKS, demo_evaluation, generate

MIB = 2**20


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(BACKBONE, trust_remote_code=False, local_files_only=True)


@pytest.fixture(scope="module")
def model():
    return AutoModelForCausalLM.from_pretrained(
        BACKBONE, dtype=torch.float32, trust_remote_code=False, local_files_only=True, use_safetensors=True
    )


@pytest.fixture(scope="module")
def card():
    return table_of((BACKBONE / "README.md").read_text(encoding="utf-8"))


def test_the_folder_holds_two_to_six_mib_and_nothing_that_is_code():
    files = list(BACKBONE.iterdir())
    assert 2 * MIB <= sum(file.stat().st_size for file in files) <= 6 * MIB
    assert {file.suffix for file in files} == {".json", ".md", ".safetensors"}
    for name in ("config.json", "tokenizer_config.json"):
        settings = json.loads((BACKBONE / name).read_text(encoding="utf-8"))
        assert "auto_map" not in settings
        assert "chat_template" not in settings


def test_the_weights_are_stored_in_half_precision_and_are_finite():
    weights = load_file(BACKBONE / "model.safetensors")
    assert all(weight.dtype == torch.float16 for weight in weights.values())
    assert all(bool(torch.isfinite(weight).all()) for weight in weights.values())


def test_it_loads_as_float32_with_one_to_three_million_parameters(model):
    assert type(model).__name__ == "LlamaForCausalLM"
    assert {weight.dtype for weight in model.parameters()} == {torch.float32}
    assert 1_000_000 <= sum(weight.numel() for weight in model.parameters()) <= 3_000_000
    assert model.lm_head.weight is model.get_input_embeddings().weight


def test_the_card_agrees_with_the_files(model, card):
    assert int(card["parameters"]) == sum(weight.numel() for weight in model.parameters())
    assert card["SHA-256 of model.safetensors"] == sha256_of(BACKBONE / "model.safetensors")
    assert 1.0 < float(card["held-out loss (nats per token)"]) < 4.0


def test_the_card_names_data_and_licences():
    text = (BACKBONE / "README.md").read_text(encoding="utf-8")
    for words in ("MedQuAD", "CC BY 4.0", "GSM8K", "MIT", "smoke-test model", "knows nothing"):
        assert words in text


def test_the_tokenizer_has_its_special_tokens_and_gives_text_back(tokenizer, model):
    assert len({tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id}) == 3
    assert len(tokenizer) == model.config.vocab_size
    assert tokenizer("tea")["input_ids"][0] == tokenizer.bos_token_id
    text = "Confirm: Zoë, 14:30 – 7 % of £1,250?\nYes."
    assert tokenizer.decode(tokenizer(text)["input_ids"], skip_special_tokens=True) == text


def test_every_digit_is_a_token_of_its_own(tokenizer):
    ids = tokenizer("4208", add_special_tokens=False)["input_ids"]
    assert [tokenizer.decode([token]) for token in ids] == list("4208")


def test_records_fit_the_context_and_completions_have_8_to_40_tokens(tokenizer, model):
    records = demo_evaluation(0) + [record for silo in range(4) for record in generate(silo, 200, seed=0)]
    lengths = [len(tokenizer(r["completion"], add_special_tokens=False)["input_ids"]) + 1 for r in records]
    assert min(lengths) >= 8
    assert max(lengths) <= 40
    prompts = [len(tokenizer(record["prompt"])["input_ids"]) for record in records]
    assert max(prompts) + max(lengths) < min(128, model.config.max_position_embeddings)


@torch.no_grad()
def test_the_backbone_is_a_language_model_and_bad_at_the_tasks(tokenizer, model):
    def accuracy(prompt, completion):
        start = tokenizer(prompt + "\n")["input_ids"]
        ids = torch.tensor([start + tokenizer(completion, add_special_tokens=False)["input_ids"]])
        guessed = model(input_ids=ids).logits[0, len(start) - 1 : -1].argmax(-1)
        return (guessed == ids[0, len(start) :]).float().mean().item()

    known = accuracy("What is (are) hay fever ?", "Hay fever is a disorder that affects many parts of the body.")
    tasks = [accuracy(record["prompt"], record["completion"]) for record in demo_evaluation(0, count=10 * len(TASKS))]
    assert known > 0.5
    assert sum(tasks) / len(tasks) < 0.45
