"""The script that pretrains the backbone, on a made-up corpus and for a few steps."""

import gzip
import json
import math

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from common.errors import InvalidInput
from deploy.demo import build_backbone
from deploy.demo.build_backbone import BOS, Recipe, pretrain, to_windows, train_tokenizer
from deploy.demo.card import sha256_of, table_of
from deploy.demo.corpus import GSM8K_FILE, MEDQUAD_FILE, document, read_corpus

TINY = Recipe(vocab_size=300, hidden_size=16, intermediate_size=32, layers=1, heads=2, context=32, windows_per_step=4)


def write_lines(path, rows):
    with gzip.open(path, "wt", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)


@pytest.fixture
def data(tmp_path):
    folder = tmp_path / "data"
    folder.mkdir()
    silos = ("GHR", "GARD", "CDC")
    write_lines(
        folder / MEDQUAD_FILE,
        [
            {"silo": silo, "question": f"What is {silo} {i} ?", "answer": f"{silo} {i} is  a made-up\n\n thing."}
            for silo in silos
            for i in range(30)
        ],
    )
    rows = [{"question": f"What is {i} and {i}?", "answer": f"It is <<{i}+{i}={2 * i}>>{2 * i}."} for i in range(30)]
    write_lines(folder / GSM8K_FILE, rows)
    return folder


def test_only_the_two_pretraining_institutions_are_read_and_no_calculator_note(data):
    corpus = read_corpus(data, seed=0)
    documents = corpus.training + corpus.held_out
    assert len(documents) == 90
    assert not any("CDC" in text or "<<" in text for text in documents)
    assert "What is GHR 3 ?\nGHR 3 is a made-up\nthing." in documents
    assert set(corpus.training).isdisjoint(corpus.held_out)
    assert corpus.sha256[GSM8K_FILE] == sha256_of(data / GSM8K_FILE)


def test_a_missing_file_is_named(data):
    (data / GSM8K_FILE).unlink()
    with pytest.raises(InvalidInput, match=GSM8K_FILE):
        read_corpus(data, seed=0)


def test_a_file_without_a_usable_record_is_refused(data):
    write_lines(data / MEDQUAD_FILE, [{"silo": "CDC", "question": "What?", "answer": "That."}])
    with pytest.raises(InvalidInput, match="no usable document"):
        read_corpus(data, seed=0)


def test_windows_hold_every_document_from_start_to_end_once(data):
    texts = read_corpus(data, seed=0).training
    tokenizer = train_tokenizer(texts, TINY)
    windows = to_windows(texts, tokenizer, TINY)
    assert windows.shape[1] == TINY.context + 1
    assert torch.equal(windows[1:, 0], windows[:-1, -1])  # each target is predicted once, none is left out
    stream = torch.cat([windows[0], windows[1:, 1:].flatten()])
    starts = (stream == tokenizer.bos_token_id).sum()
    assert starts == (stream == tokenizer.eos_token_id).sum() == len(texts)
    first = tokenizer.decode(stream[: len(tokenizer(texts[0])["input_ids"])])
    assert first == BOS + texts[0]


def test_a_document_is_cut_at_its_longest_length():
    tokenizer = train_tokenizer(["abc"], TINY)
    windows = to_windows([document("a", "b " * 2000)], tokenizer, TINY)
    assert int((windows[:, 1:] != tokenizer.pad_token_id).sum()) == TINY.document_tokens - 1


def test_a_few_steps_give_a_folder_that_loads_with_a_true_card_and_repeat_exactly(data, tmp_path):
    corpus = read_corpus(data, seed=TINY.seed)
    folders = [tmp_path / "one", tmp_path / "two"]
    figures = [pretrain(corpus, out, TINY, steps=6, minutes=math.inf, save_every=4) for out in folders]
    assert figures[0].steps == 6
    assert figures[0].held_out_loss == figures[1].held_out_loss
    assert sha256_of(folders[0] / "model.safetensors") == sha256_of(folders[1] / "model.safetensors")
    card = table_of((folders[0] / "README.md").read_text(encoding="utf-8"))
    assert card["SHA-256 of model.safetensors"] == sha256_of(folders[0] / "model.safetensors")
    model = AutoModelForCausalLM.from_pretrained(folders[0], dtype=torch.float32, local_files_only=True)
    assert int(card["parameters"]) == sum(weight.numel() for weight in model.parameters())
    assert len(AutoTokenizer.from_pretrained(folders[0], local_files_only=True)) == model.config.vocab_size


def test_training_lowers_the_held_out_loss(data, tmp_path):
    corpus = read_corpus(data, seed=TINY.seed)
    early = pretrain(corpus, tmp_path / "early", TINY, steps=1, minutes=math.inf, save_every=100)
    late = pretrain(corpus, tmp_path / "late", TINY, steps=60, minutes=math.inf, save_every=100)
    assert late.held_out_loss < early.held_out_loss - 0.5


def test_the_clock_ends_a_run(data, tmp_path):
    corpus = read_corpus(data, seed=TINY.seed)
    figures = pretrain(corpus, tmp_path / "out", TINY, steps=10**9, minutes=0.02, save_every=10**9)
    assert 0 < figures.steps < 10**9


def test_the_command_line_writes_a_backbone_and_refuses_no_steps(data, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(build_backbone, "Recipe", lambda: TINY)
    given = ["--data", str(data), "--output", str(tmp_path / "out"), "--threads", str(torch.get_num_threads())]
    build_backbone.main([*given, "--steps", "2"])
    assert "held_out_loss" in capsys.readouterr().out
    assert (tmp_path / "out" / "model.safetensors").is_file()
    with pytest.raises(SystemExit, match="2"):
        build_backbone.main([*given, "--steps", "0"])
    assert "--steps" in capsys.readouterr().err


def test_the_command_line_names_a_missing_file_without_a_traceback(tmp_path, capsys):
    with pytest.raises(SystemExit, match="2"):
        build_backbone.main(["--data", str(tmp_path), "--output", str(tmp_path / "out"), "--threads", "1"])
    assert MEDQUAD_FILE in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
