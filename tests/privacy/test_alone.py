"""``common.privacy`` stands alone: numpy, scipy and the standard library."""

import ast
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
HEAVY = ("torch", "flwr", "grpc", "google.protobuf", "sqlalchemy", "pydantic", "dp_accounting", "opacus", "matplotlib")


def test_it_loads_without_any_heavy_package():
    code = (
        "import pkgutil, sys, importlib, common.privacy\n"
        "for module in pkgutil.iter_modules(common.privacy.__path__):\n"
        "    importlib.import_module('common.privacy.' + module.name)\n"
        f"print([name for name in {HEAVY!r} if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_it_imports_nothing_else_of_this_project():
    allowed = set(sys.stdlib_module_names) | {"numpy", "scipy"}
    for path in (ROOT / "common" / "privacy").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                names = [node.module or ""]
            else:
                continue
            for name in names:
                assert name.split(".")[0] in allowed or name.startswith("common.privacy"), f"{path.name}: {name}"
