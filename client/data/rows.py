"""Rows from a file, a folder or a data set: plain dictionaries, or an error that names the file and the line.

JSON Lines are read here, line by line, because the people who own the data must be told which line is wrong.
Parquet, CSV and Hugging Face data sets go through the ``datasets`` library, with its cache in a folder that is
deleted at once: private rows must not stay behind in a home directory.
"""

from __future__ import annotations

import gzip
import json
import tempfile
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common.errors import InvalidInput

Row = dict[str, Any]
ENDINGS = (".jsonl", ".jsonl.gz", ".ndjson", ".csv", ".csv.gz", ".parquet")

PROMPT_NAMES = ("prompt", "question", "instruction", "input")
COMPLETION_NAMES = ("completion", "answer", "response", "output")
TEXT_NAMES = ("text", "sentence")
LABEL_NAMES = ("label", "labels", "class")


@dataclass(frozen=True)
class ColumnNames:
    """Which columns hold what; a name that is None was not given by the user."""

    prompt: str | None = None
    completion: str | None = None
    label: str | None = None
    silo: str | None = None


def read_rows(source: str) -> list[Row]:
    """All rows of ``source``: a JSONL (also gz), CSV or Parquet file, a folder of them, a data set folder or hub id.

    Raises:
        InvalidInput: the source is missing, empty or unreadable; for JSONL and CSV with file and line.
    """
    path = Path(source)
    if path.is_file():
        rows = _read_file(path)
    elif path.is_dir():
        files = data_files(path)
        rows = [row for file in files for row in _read_file(file)] if files else _read_dataset(source)
    elif _looks_like_path(source):
        raise InvalidInput(f"{source}: no such file or folder")
    else:
        rows = _read_dataset(source)
    if not rows:
        raise InvalidInput(f"{source}: holds no rows")
    return rows


def rows_by_file(source: str) -> dict[str, list[Row]]:
    """One silo per file of the folder ``source``, named by the file without its ending; none if it is no folder."""
    path = Path(source)
    if not path.is_dir():
        return {}
    silos: dict[str, list[Row]] = {}
    for file in data_files(path):
        name = _stem(file)
        if name in silos:
            raise InvalidInput(f"{file}: another file of this folder gives the silo name {name!r} too; rename one")
        silos[name] = _read_file(file)
    return silos


def data_files(folder: Path) -> list[Path]:
    """The readable data files directly in ``folder``, by name; none if it is a saved Hugging Face data set."""
    if any((folder / marker).exists() for marker in ("dataset_info.json", "state.json", "dataset_dict.json")):
        return []
    return sorted(file for file in folder.iterdir() if file.is_file() and file.name.lower().endswith(ENDINGS))


def column(rows: Sequence[Row], given: str | None, candidates: Sequence[str], what: str, option: str) -> str:
    """The column to use for ``what``: the given one, or the first candidate that exists.

    Raises:
        InvalidInput: it is not there; the message lists the columns there are.
    """
    present = list(rows[0])
    if given is not None:
        if given not in present:
            raise InvalidInput(f"no column {given!r} for the {what}: there are {', '.join(map(repr, present))}")
        return given
    for name in candidates:
        if name in present:
            return name
    raise InvalidInput(
        f"no column for the {what} found: there are {', '.join(map(repr, present))}; name one with {option}"
    )


def _looks_like_path(source: str) -> bool:
    return source.startswith((".", "/", "~")) or source.lower().endswith((*ENDINGS, ".json", ".txt")) or "\\" in source


def _stem(file: Path) -> str:
    for ending in sorted(ENDINGS, key=len, reverse=True):
        if file.name.lower().endswith(ending):
            return file.name[: -len(ending)]
    return file.stem


def _read_file(path: Path) -> list[Row]:
    name = path.name.lower()
    if name.endswith((".jsonl", ".jsonl.gz", ".ndjson")):
        return list(_json_lines(path))
    if name.endswith((".csv", ".csv.gz")):
        for _ in _lines(path):  # names the line that is not UTF-8 before the library does without it
            pass
        return _through_datasets("csv", path)
    if name.endswith(".parquet"):
        return _through_datasets("parquet", path)
    raise InvalidInput(
        f"{path}: unknown kind of file; use one of {', '.join(ENDINGS)} or a Hugging Face data set folder"
    )


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    number = 0
    try:
        with gzip.open(path, "rb") if path.name.lower().endswith(".gz") else path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                yield number, line.decode("utf-8")
    except UnicodeDecodeError as error:
        raise InvalidInput(f"{path}, line {number}: not UTF-8 ({error.reason})") from error
    except (OSError, EOFError, zlib.error) as error:
        raise InvalidInput(f"{path}: cannot be read beyond line {number} ({error})") from error


def _json_lines(path: Path) -> Iterator[Row]:
    for number, line in _lines(path):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise InvalidInput(f"{path}, line {number}: not JSON ({error.msg}, column {error.colno})") from error
        except (ValueError, RecursionError) as error:  # a number of thousands of digits, lists in lists in lists
            raise InvalidInput(f"{path}, line {number}: not JSON that can be read ({_first_line(error)})") from error
        if not isinstance(row, dict):
            raise InvalidInput(f"{path}, line {number}: a JSON object is needed, this is {type(row).__name__}")
        yield row


def _through_datasets(kind: str, path: Path) -> list[Row]:
    import datasets

    datasets.disable_progress_bars()
    with tempfile.TemporaryDirectory(prefix="cloister-") as cache:
        try:
            loaded = datasets.load_dataset(
                kind, data_files=str(path), split="train", cache_dir=cache, keep_in_memory=True
            )
        except Exception as error:  # the library raises whatever the format's parser raises
            cause = error.__cause__ or error
            raise InvalidInput(f"{path}: not a readable {kind} file ({_first_line(cause)})") from error
        return list(loaded)


def _read_dataset(source: str) -> list[Row]:
    import datasets

    datasets.disable_progress_bars()
    with tempfile.TemporaryDirectory(prefix="cloister-") as cache:
        try:
            if Path(source).is_dir() and data_files(Path(source)) == [] and _is_saved(Path(source)):
                loaded = datasets.load_from_disk(source, keep_in_memory=True)
            else:
                loaded = datasets.load_dataset(source, cache_dir=cache, keep_in_memory=True)
        except Exception as error:  # offline hubs, missing repositories and broken folders all differ
            raise InvalidInput(
                f"{source}: neither a readable file or folder nor a data set that can be loaded ({_first_line(error)})"
            ) from error
        if isinstance(loaded, dict):
            if "train" not in loaded:
                raise InvalidInput(f"{source}: has no split 'train', only {', '.join(loaded)}")
            loaded = loaded["train"]
        return list(loaded)


def _is_saved(folder: Path) -> bool:
    return (folder / "state.json").exists() or (folder / "dataset_dict.json").exists()


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0][:200] if lines else type(error).__name__
