"""A backbone is code: only plain safetensors folders are read, and their hash names all that matters."""

import json
import shutil

import pytest
import torch

from client.backbone import backbone_hash, check, context_length, load_model, load_tokenizer, resolve, seeded
from common.errors import InvalidInput, Unavailable


@pytest.fixture
def folder(tiny_llama, tmp_path):
    return shutil.copytree(tiny_llama, tmp_path / "model")


def change(file, **values):
    file.write_text(json.dumps(json.loads(file.read_text("utf-8")) | values), "utf-8")


def test_a_plain_folder_is_taken(folder):
    assert resolve(str(folder)) == folder


@pytest.mark.parametrize("name", ["config.json", "tokenizer_config.json"])
def test_a_folder_that_asks_for_its_own_code_is_refused(folder, name):
    change(folder / name, auto_map={"AutoModelForCausalLM": "modeling.Evil"})
    (folder / "modeling.py").write_text("raise SystemExit('code of a backbone ran')")
    with pytest.raises(InvalidInput, match=rf"{name}: asks for code of its own \(auto_map\)"):
        resolve(str(folder))


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "model.pth"])
def test_a_pickle_is_refused_by_name_and_never_opened(folder, name):
    (folder / "model.safetensors").unlink()
    (folder / name).write_bytes(b"cos\nsystem\n(S'exit 1'\ntR.")
    with pytest.raises(InvalidInput, match=rf"{name} is a pickle and is not read: convert it"):
        resolve(str(folder))


def test_a_pickle_beside_safetensors_is_not_read(folder):
    before = backbone_hash(folder)
    (folder / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'exit 1'\ntR.")
    load_model(resolve(str(folder)), task="causal-lm")
    assert backbone_hash(folder) == before


@pytest.mark.parametrize("content", ["{", "[]", "3", "\udcff".encode("utf-8", "surrogateescape"), "[" * 100_000])
@pytest.mark.parametrize("name", ["config.json", "tokenizer_config.json"])
def test_a_configuration_that_is_no_json_object_is_named(folder, name, content):
    (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(InvalidInput, match=rf"{name}: not"):
        check(folder)


def test_what_is_no_model_folder_is_named(tmp_path, folder):
    with pytest.raises(InvalidInput, match="no such model folder"):
        resolve(str(tmp_path / "none"))
    with pytest.raises(InvalidInput, match="no such model folder"):
        resolve("a/b/c")
    (tmp_path / "empty").mkdir()
    with pytest.raises(InvalidInput, match=r"no config\.json"):
        resolve(str(tmp_path / "empty"))
    (folder / "model.safetensors").unlink()
    with pytest.raises(InvalidInput, match=r"no \*\.safetensors file"):
        resolve(str(folder))


def test_a_hub_id_without_a_hub_says_what_helps(monkeypatch, tmp_path):
    import huggingface_hub.constants as constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(Unavailable, match="give the folder of a downloaded model"):
        resolve("someone/some-model")


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json", "chat_template.jinja"])
def test_the_hash_sees_every_file_that_matters(folder, name):
    before = backbone_hash(folder)
    file = folder / name
    file.write_bytes(file.read_bytes() + b" ")
    assert backbone_hash(folder) != before


def test_the_hash_does_not_see_the_folders_name_or_other_files(folder, tmp_path):
    before = backbone_hash(folder)
    (folder / "README.md").write_text("words")
    (folder / ".git").mkdir()
    folder.rename(tmp_path / "elsewhere")
    assert backbone_hash(tmp_path / "elsewhere") == before


def test_a_damaged_weights_file_is_named(folder):
    (folder / "model.safetensors").write_bytes(b"\x10" * 50)
    with pytest.raises(InvalidInput, match="cannot be loaded for causal-lm"):
        load_model(folder, task="causal-lm")


def test_a_folder_without_a_tokenizer_is_named(folder):
    for file in folder.glob("tokenizer*"):
        file.unlink()
    with pytest.raises(InvalidInput, match="no readable tokenizer"):
        load_tokenizer(folder)


def test_a_loaded_model_is_frozen_and_a_head_comes_from_the_public_seed(tiny_bert):
    def head(seed):
        model = load_model(tiny_bert, task="classification", classes=("x", "y"), public_seed=seed)
        assert not any(parameter.requires_grad for parameter in model.parameters())
        assert model.config.id2label == {0: "x", 1: "y"}
        return model.classifier.weight

    assert torch.equal(head(1), head(1))
    assert not torch.equal(head(1), head(2))


def test_a_seed_is_given_back():
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    with seeded(9):
        torch.rand(100)
    assert torch.equal(torch.rand(3), expected)


def test_the_context_is_the_models(fresh_llama):
    assert context_length(fresh_llama) == 64
