"""The model card of the embedded backbone: what it was made of, and figures measured while making it."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

WEIGHTS = "model.safetensors"


@dataclass(frozen=True)
class Figures:
    """What one pretraining run measured.

    Attributes:
        parameters: trainable numbers in the model, the tied embedding counted once.
        steps, tokens_seen: optimizer steps, and tokens in their windows.
        documents, held_out_documents: documents trained on, and documents kept back.
        held_out_loss: nats per token on the documents kept back, of the fp16 weights computed in float32.
        seconds, threads: wall time of the training loop, and torch threads.
    """

    parameters: int
    steps: int
    tokens_seen: int
    documents: int
    held_out_documents: int
    held_out_loss: float
    seconds: float
    threads: int


_CARD = """---
license: cc-by-4.0
language: en
library_name: transformers
pipeline_tag: text-generation
---

# The demo backbone

A Llama-style causal language model of {millions:.2f} million parameters, pretrained from scratch in minutes on one CPU.
**It is a smoke-test model.** It lets `cloister simulate` show private fine-tuning without a download; it knows nothing
of use. Never take what it says about health, or about anything else, for information.

## Data and licences

Public text only, as `question`, a line break, `answer`:

- **MedQuAD**, institutions GHR and GARD: A. Ben Abacha and D. Demner-Fushman, "A Question-Entailment Approach to
  Question Answering", BMC Bioinformatics 20, 511 (2019), <https://github.com/abachaa/MedQuAD>, CC BY 4.0. Changes:
  repeated records dropped, blanks merged, documents cut at {document_tokens} tokens. No other institution was read.
- **GSM8K**, training split: K. Cobbe et al., "Training Verifiers to Solve Math Word Problems" (2021),
  <https://github.com/openai/grade-school-math>, MIT, Copyright (c) 2021 OpenAI. Change: calculator annotations removed.

| file read | SHA-256 |
|---|---|
{source_rows}

The weights are offered under CC BY 4.0 with the attribution above.

## Figures

| what | value |
|---|---|
| parameters | {parameters} |
| training documents | {documents} |
| optimizer steps | {steps} |
| tokens seen | {tokens_seen} |
| held-out documents | {held_out_documents} |
| held-out loss (nats per token) | {held_out_loss:.4f} |
| training wall time (seconds, {threads} thread(s)) | {seconds:.0f} |
| SHA-256 of {weights} | {digest} |

Recipe: {recipe_text}.

Made by `python -m deploy.demo.build_backbone --data FOLDER --output deploy/demo/backbone --steps {steps}
--threads {threads}`. The same files, seed, steps, threads and torch build on the same kind of processor repeat it;
another processor may round differently.
"""


def sha256_of(path: Path) -> str:
    """Return the SHA-256 of a file, in hexadecimal."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def write_card(folder: Path, figures: Figures, *, recipe: Mapping[str, object], sources: Mapping[str, str]) -> Path:
    """Write ``README.md`` into ``folder``, beside the weights it speaks of, and return its path."""
    text = _CARD.format(
        **vars(figures),
        millions=figures.parameters / 1e6,
        document_tokens=recipe["document_tokens"],
        recipe_text=", ".join(f"{name} {value}" for name, value in recipe.items()),
        source_rows="\n".join(f"| {name} | {digest} |" for name, digest in sources.items()),
        weights=WEIGHTS,
        digest=sha256_of(folder / WEIGHTS),
    )
    path = folder / "README.md"
    path.write_text(text, encoding="utf-8")
    return path


def table_of(card: str) -> dict[str, str]:
    r"""Return the two-column rows of a card's tables, first cell → second cell.

    >>> table_of("| what | value |\n|---|---|\n| steps | 12 |")["steps"]
    '12'
    """
    rows = (line.strip().strip("|").split("|") for line in card.splitlines() if line.startswith("| "))
    return {cells[0].strip(): cells[1].strip() for cells in rows if len(cells) == 2}
