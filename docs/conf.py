"""Sphinx settings. ``make docs`` builds the site without a network, and a warning is an error.

Pages are Markdown. ``<!-- generated: NAME -->`` in a page is replaced by what ``docs/generated.py`` says about the code
that is being documented: settings, commands, exit codes and metrics are never written by hand.
"""

import re
import sys
import tomllib
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
sys.path[:0] = [str(ROOT), str(HERE)]

_about = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
project = "Cloister"
version = release = _about["version"]
author = "the Cloister authors"
project_copyright = ""

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
root_doc = "index"
exclude_patterns = ["_build"]
myst_heading_anchors = 3
nitpicky = True
# An offline build cannot look up other libraries' types, nor our own private or unshown ones; every other reference is
# checked: a page, a heading, a file.
nitpick_ignore_regex = [("py:.*", ".*")]

autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_default_options = {"members": True, "show-inheritance": True}
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_rtype = False
napoleon_use_ivar = True

html_theme = "furo"
html_title = f"Cloister {version}"
html_copy_source = False
html_show_sourcelink = False
html_show_copyright = False

_GENERATED = re.compile(r"^<!-- generated: (?P<name>[a-z-]+) -->$", re.MULTILINE)
_LITERAL = re.compile(r"(``.*?``)")


def _fill_in(app, docname, source):
    """Put the generated parts into a page before it is parsed."""
    import generated

    source[0] = _GENERATED.sub(lambda found: generated.PARTS[found["name"]](), source[0])


def _norms(app, what, name, obj, options, lines):
    """Docstrings write a norm between two bars, which reST would read as a substitution."""
    for number, line in enumerate(lines):
        parts = _LITERAL.split(line)
        lines[number] = "".join(part if part.startswith("``") else part.replace("|", "\\|") for part in parts)


def setup(app):
    """Called by Sphinx."""
    app.connect("source-read", _fill_in)
    app.connect("autodoc-process-docstring", _norms)
