"""Make the stubs of this folder from ``proto/``: ``python -m common.wire.generate`` (needs the extra ``dev``).

The generated files are committed; a test fails when they are not what the schemas give.
"""

from __future__ import annotations

import re
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SCHEMAS = ROOT / "proto" / "cloister" / "v1"
HERE = Path(__file__).resolve().parent


def generate() -> dict[str, str]:
    """File name to content of every stub that the schemas give."""
    import grpc_tools
    from grpc_tools import protoc

    with tempfile.TemporaryDirectory() as folder:
        arguments = [
            "protoc",
            f"-I{ROOT / 'proto'}",
            f"-I{Path(grpc_tools.__file__).parent / '_proto'}",
            f"--python_out={folder}",
            f"--grpc_python_out={folder}",
            *(str(path) for path in sorted(SCHEMAS.glob("*.proto"))),
        ]
        if protoc.main(arguments) != 0:
            raise RuntimeError("protoc refused the schemas; see its message above")
        made = sorted((Path(folder) / "cloister" / "v1").iterdir())
        return {path.name: _in_our_package(path.read_text("utf-8")) for path in made if _has_content(path)}


def _in_our_package(text: str) -> str:
    """The stubs live in ``common.wire``: no import package may be called ``proto`` or ``cloister``."""
    return re.sub(r"^from cloister\.v1 import ", "from common.wire import ", text, flags=re.MULTILINE)


def _has_content(path: Path) -> bool:
    """Schemas without a service give an empty gRPC stub, which is left out."""
    return not path.name.endswith("_grpc.py") or "class " in path.read_text("utf-8")


def main() -> None:
    """Write the stubs."""
    for name, text in generate().items():
        (HERE / name).write_text(text, "utf-8")


if __name__ == "__main__":
    main()
