"""Make the tutorial's records: MedQuAD's questions and answers by institution, or made-up ones in their place.

    python docs/examples/medquad.py MedQuAD medquad.jsonl            from a clone of github.com/abachaa/MedQuAD
    python docs/examples/medquad.py --stand-in medquad.jsonl         made up, same columns, sizes and institutions

MedQuAD (Ben Abacha and Demner-Fushman, BMC Bioinformatics 2019, CC BY 4.0) keeps one XML document per page of an
institution's web site, in a folder per institution. Three folders came without answers, for copyright, and are left
out; so are GARD and GHR, on which the embedded backbone was trained.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from xml.etree import ElementTree

SIZES = {
    "CDC": 270, "CancerGov": 729, "MPlus_Health_Topics": 981, "NHLBI": 559, "NIDDK": 1192, "NINDS": 1088,
    "SeniorHealth": 769,
}  # fmt: skip
"""Institution to number of answered questions (MedQuAD at commit 577bd37)."""

TASKS = ("harbour-hospital", "north-clinic")
"""Whose made-up records stand in, by turns."""


def medquad(clone: Path) -> Iterator[dict[str, str]]:
    """Every answered question of the seven institutions, by folder and document."""
    for folder in sorted(clone.iterdir()):
        name = re.fullmatch(r"\d+_(.+?)_QA(_XML)?", folder.name)
        if name is None or name[1] not in SIZES:
            continue
        for file in sorted(folder.glob("*.xml")):
            for pair in ElementTree.parse(file).iter("QAPair"):  # noqa: S314 - a file the reader downloaded on purpose
                question, answer = ((pair.findtext(tag) or "").strip() for tag in ("Question", "Answer"))
                if question and answer:
                    yield {"institution": name[1], "question": question, "answer": answer}


def stand_in() -> Iterator[dict[str, str]]:
    """As many records for each institution, drawn by the package's generator of made-up records."""
    from deploy.demo.records import generate

    for number, (name, size) in enumerate(SIZES.items()):
        for record in generate(TASKS[number % 2], size, seed=number):
            yield {"institution": name, "question": record["prompt"], "answer": record["completion"]}


def main() -> None:
    """Write the file and say what is in it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("clone", type=Path, nargs="?", help="folder of the clone")
    parser.add_argument("output", type=Path, help="JSONL file to write")
    parser.add_argument("--stand-in", action="store_true", help="make records up instead")
    given = parser.parse_args()
    if given.stand_in == (given.clone is not None):
        parser.error("give the folder of a clone, or --stand-in")
    if given.clone is not None and not given.clone.is_dir():
        parser.error(f"{given.clone}: there is no such folder")
    rows = list(stand_in() if given.stand_in else medquad(given.clone))
    if not rows:
        sys.exit(f"{given.clone}: no folder NUMBER_NAME_QA with answered questions; is it a clone of MedQuAD?")
    given.output.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), "utf-8")
    counts = {name: sum(row["institution"] == name for row in rows) for name in SIZES}
    print(f"{given.output}: {len(rows)} records ({', '.join(f'{name} {count}' for name, count in counts.items())})")


if __name__ == "__main__":
    main()
