"""What ``cloister simulate`` runs on when it is given nothing: a tiny backbone and generated silos.

Both are for smoke tests. The backbone (``backbone/``, its card says what it was made of) is a small
language model that knows nothing of use; the records are made from templates in ``records``.
"""

from __future__ import annotations

from pathlib import Path

__all__ = ["BACKBONE"]

BACKBONE = Path(__file__).resolve().parent / "backbone"
"""Folder of the embedded backbone, ready for ``AutoModelForCausalLM.from_pretrained`` without a network."""
