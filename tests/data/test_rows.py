"""Rows from files of every kind; and for every kind of bad file an error that says where."""

import gzip
import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from client.data import read_rows, rows_by_file
from client.data.rows import column, data_files
from common.errors import InvalidInput

ROWS = [{"prompt": "a?", "completion": "ä!", "n": 1}, {"prompt": "b?", "completion": "日本", "n": 2}]


def jsonl(path: Path, rows=ROWS) -> Path:
    data = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()
    path.write_bytes(gzip.compress(data) if path.name.endswith(".gz") else data)
    return path


def write(path: Path, data: bytes) -> Path:
    path.write_bytes(data)
    return path


@pytest.mark.parametrize("name", ["d.jsonl", "d.jsonl.gz", "d.ndjson", "D.JSONL"])
def test_json_lines_are_read(tmp_path, name):
    assert read_rows(str(jsonl(tmp_path / name))) == ROWS


def test_blank_lines_and_a_missing_last_newline_do_not_matter(tmp_path):
    path = write(tmp_path / "d.jsonl", b'\n{"a": 1}\n   \n{"a": 2}')
    assert read_rows(str(path)) == [{"a": 1}, {"a": 2}]


@pytest.fixture(scope="module")
def frame():
    datasets = pytest.importorskip("datasets")
    return datasets.Dataset.from_list(ROWS)


def test_parquet_is_read(tmp_path, frame):
    frame.to_parquet(tmp_path / "d.parquet")
    assert read_rows(str(tmp_path / "d.parquet")) == ROWS


@pytest.mark.parametrize("name", ["d.csv", "d.csv.gz"])
def test_csv_is_read(tmp_path, name):
    text = 'prompt,completion,n\n"a, with comma?",ä!,1\n"two\nlines",日本,2\n'.encode()
    path = write(tmp_path / name, gzip.compress(text) if name.endswith(".gz") else text)
    assert read_rows(str(path)) == [
        {"prompt": "a, with comma?", "completion": "ä!", "n": 1},
        {"prompt": "two\nlines", "completion": "日本", "n": 2},
    ]


def test_a_saved_data_set_is_read_whole_or_from_its_training_split(tmp_path, frame):
    import datasets

    frame.save_to_disk(tmp_path / "one")
    datasets.DatasetDict({"train": frame, "test": frame.select([0])}).save_to_disk(tmp_path / "splits")
    assert read_rows(str(tmp_path / "one")) == ROWS
    assert read_rows(str(tmp_path / "splits")) == ROWS
    assert data_files(tmp_path / "one") == []


def test_a_saved_data_set_without_a_training_split_lists_what_there_is(tmp_path, frame):
    import datasets

    datasets.DatasetDict({"validation": frame}).save_to_disk(tmp_path / "splits")
    with pytest.raises(InvalidInput, match="no split 'train', only validation"):
        read_rows(str(tmp_path / "splits"))


def test_private_rows_leave_no_cache_behind(tmp_path, monkeypatch, frame):
    import datasets

    home = tmp_path / "home"
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", home)
    monkeypatch.setenv("TMPDIR", str(tmp_path / "scratch"))
    (tmp_path / "scratch").mkdir()
    import tempfile

    monkeypatch.setattr(tempfile, "tempdir", None)
    frame.to_parquet(tmp_path / "d.parquet")
    read_rows(str(tmp_path / "d.parquet"))
    left = [
        file for root in (home, tmp_path / "scratch") if root.exists() for file in root.rglob("*") if file.is_file()
    ]
    assert left == []


def test_a_folder_is_one_silo_per_file(tmp_path):
    jsonl(tmp_path / "north.jsonl", ROWS[:1])
    jsonl(tmp_path / "south.jsonl.gz", ROWS[1:])
    (tmp_path / "notes.txt").write_text("not data")
    assert rows_by_file(str(tmp_path)) == {"north": ROWS[:1], "south": ROWS[1:]}
    assert read_rows(str(tmp_path)) == ROWS


def test_two_files_of_one_silo_name_are_refused(tmp_path):
    jsonl(tmp_path / "north.jsonl")
    jsonl(tmp_path / "north.jsonl.gz")
    with pytest.raises(InvalidInput, match="silo name 'north'"):
        rows_by_file(str(tmp_path))


def test_what_is_no_folder_has_no_silos_by_file(tmp_path):
    assert rows_by_file(str(jsonl(tmp_path / "d.jsonl"))) == {}


@pytest.mark.parametrize("source", ["./none.jsonl", "/nowhere/at/all", "~/none.csv", "none.parquet"])
def test_a_missing_file_is_named(source):
    with pytest.raises(InvalidInput, match="no such file or folder"):
        read_rows(source)


def test_a_name_that_is_neither_file_nor_data_set_is_refused():
    with pytest.raises(InvalidInput, match="neither a readable file or folder nor a data set"):
        read_rows("no-such-name-anywhere")


def test_an_empty_folder_is_refused(tmp_path):
    with pytest.raises(InvalidInput):
        read_rows(str(tmp_path))


@pytest.mark.parametrize("name", ["d.jsonl", "d.jsonl.gz"])
def test_an_empty_file_holds_no_rows(tmp_path, name):
    with pytest.raises(InvalidInput, match="no rows"):
        read_rows(str(jsonl(tmp_path / name, [])))


def test_an_unknown_ending_lists_the_known_ones(tmp_path):
    with pytest.raises(InvalidInput, match=r"unknown kind of file; use one of \.jsonl"):
        read_rows(str(write(tmp_path / "d.xlsx", b"x")))


@pytest.mark.parametrize(
    ("line", "match"),
    [
        (b'{"a": "\xff"}', "not UTF-8"),
        (b"{'a': 1}", "not JSON"),
        (b'{"a": 1} {"a": 2}', "not JSON"),
        (b"[1, 2]", "a JSON object is needed, this is list"),
        (b"3", "a JSON object is needed, this is int"),
        (b"[" * 100_000, "not JSON"),
        (b'{"a": ' + b"7" * 5000 + b"}", "not JSON"),
    ],
    ids=["latin-1", "python", "two on a line", "a list", "a number", "nested without end", "a number of 5000 digits"],
)
@pytest.mark.parametrize("ending", [".jsonl", ".jsonl.gz"])
def test_a_line_that_is_no_json_object_is_named_with_its_file(tmp_path, line, match, ending):
    data = b'{"a": 1}\n\n' + line + b'\n{"a": 2}\n'
    path = write(tmp_path / f"d{ending}", gzip.compress(data) if ending.endswith("gz") else data)
    with pytest.raises(InvalidInput, match=rf"d\.jsonl(\.gz)?, line 3: .*{match}"):
        read_rows(str(path))


def test_a_csv_that_is_not_utf_8_names_the_line(tmp_path):
    with pytest.raises(InvalidInput, match=r"d\.csv, line 3: not UTF-8"):
        read_rows(str(write(tmp_path / "d.csv", b"a,b\n1,2\n\xfc,3\n")))


@pytest.mark.parametrize("name", ["d.jsonl.gz", "d.csv.gz"])
def test_a_damaged_gz_is_named(tmp_path, name):
    whole = gzip.compress(b'{"a": 1}\n' * 2000)
    broken = (whole[: len(whole) // 2], b"no gzip", whole[:20] + b"\xff" * 20 + whole[40:])
    for data in broken:
        with pytest.raises(InvalidInput, match=r"d\.(jsonl|csv)\.gz"):
            read_rows(str(write(tmp_path / name, data)))


def test_a_damaged_parquet_is_named(tmp_path):
    with pytest.raises(InvalidInput, match=r"d\.parquet: not a readable parquet file"):
        read_rows(str(write(tmp_path / "d.parquet", b"PAR1 no")))


def test_a_missing_column_lists_the_columns_there_are():
    with pytest.raises(
        InvalidInput, match="no column 'questions' for the prompt: there are 'prompt', 'completion', 'n'"
    ):
        column(ROWS, "questions", ("prompt",), "prompt", "--prompt-column")
    with pytest.raises(InvalidInput, match="there are 'prompt', 'completion', 'n'; name one with --label-column"):
        column(ROWS, None, ("label",), "class", "--label-column")


texts = st.text(alphabet=st.characters(exclude_categories=["Cs"]))
rows = st.lists(st.dictionaries(texts, texts | st.integers() | st.none() | st.booleans()), min_size=1, max_size=5)


@given(rows)
def test_any_rows_survive_json_lines(tmp_path_factory, rows):
    path = jsonl(tmp_path_factory.mktemp("rows") / "d.jsonl", rows)
    assert read_rows(str(path)) == rows


@given(st.binary(max_size=60))
def test_any_bytes_are_rows_or_a_named_error(tmp_path_factory, data):
    path = write(tmp_path_factory.mktemp("bytes") / "d.jsonl", data)
    try:
        found = read_rows(str(path))
    except InvalidInput as error:
        found = [{"error": error}] if "d.jsonl" in str(error) else []
    assert found
    assert all(isinstance(row, dict) for row in found)
