r"""The public text the embedded backbone is pretrained on: questions and answers, one document each.

Two sources, both read from a local folder and both public:

* MedQuAD (Ben Abacha and Demner-Fushman 2019), the institutions ``PRETRAINING_SILOS`` only. The other
  institutions stay unseen, so that they can play private silos of the same field.
* GSM8K (Cobbe et al. 2021), the training split, without its calculator annotations.

>>> document("What is tea?", "A drink.  It is\n\n\nwarm.")
'What is tea?\nA drink. It is\nwarm.'
"""

from __future__ import annotations

import gzip
import hashlib
import json
import random
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common.errors import InvalidInput

PRETRAINING_SILOS = ("GHR", "GARD")
MEDQUAD_FILE = "medquad_by_institution.jsonl.gz"
GSM8K_FILE = "gsm8k_train.jsonl.gz"
HELD_OUT_FRACTION = 0.02

_CALCULATOR = re.compile(r"<<[^<>]*>>")


@dataclass(frozen=True)
class Corpus:
    """Documents to train on, documents held out of training, and where they came from.

    Attributes:
        training: shuffled documents, question, line break, answer.
        held_out: documents no step is taken on.
        sha256: file name → SHA-256 of the file as read.
    """

    training: list[str]
    held_out: list[str]
    sha256: dict[str, str]


def document(question: str, answer: str) -> str:
    """Join a question and its answer as the backbone sees them; runs of blanks become one."""
    answer = re.sub(r"[ \t]+", " ", answer)
    answer = re.sub(r" ?\n[\s]*", "\n", answer)
    return f"{' '.join(question.split())}\n{answer.strip()}"


def _rows(path: Path) -> Iterator[dict[str, Any]]:
    with gzip.open(path, "rt", encoding="utf-8") as lines:
        for line in lines:
            yield json.loads(line)


def _medquad(path: Path) -> list[str]:
    rows = (row for row in _rows(path) if row["silo"] in PRETRAINING_SILOS and row["answer"])
    return [document(row["question"], row["answer"]) for row in rows]


def _gsm8k(path: Path) -> list[str]:
    return [document(row["question"], _CALCULATOR.sub("", row["answer"])) for row in _rows(path)]


def read_corpus(folder: Path, *, seed: int) -> Corpus:
    """Read both sources, drop repeated documents, and hold ``HELD_OUT_FRACTION`` of each one out.

    Args:
        folder: where ``MEDQUAD_FILE`` and ``GSM8K_FILE`` lie.
        seed: order of the documents and choice of those held out.

    Raises:
        InvalidInput: a file is missing, or a source has no usable document.
    """
    random_order = random.Random(seed)  # noqa: S311 - public text in a public order
    training: list[str] = []
    held_out: list[str] = []
    sha256: dict[str, str] = {}
    for name, read in ((MEDQUAD_FILE, _medquad), (GSM8K_FILE, _gsm8k)):
        path = folder / name
        if not path.is_file():
            raise InvalidInput(f"{path} does not exist; --data must be a folder with {MEDQUAD_FILE} and {GSM8K_FILE}")
        sha256[name] = hashlib.sha256(path.read_bytes()).hexdigest()
        documents = list(dict.fromkeys(read(path)))
        if not documents:
            raise InvalidInput(f"{path} holds no usable document")
        random_order.shuffle(documents)
        kept_back = max(1, round(HELD_OUT_FRACTION * len(documents)))
        held_out += documents[:kept_back]
        training += documents[kept_back:]
    random_order.shuffle(training)
    return Corpus(training=training, held_out=held_out, sha256=sha256)
