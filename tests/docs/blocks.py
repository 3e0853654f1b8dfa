"""The code blocks of a Markdown page, with what the comment above each says about running it.

A block in the language ``sh`` is commands, run in order in one folder per page. A comment on the lines right above its
fence changes that, and is invisible to readers:

    <!-- not run: KIND: why -->     never run here; KIND is one of ``KINDS``, and the test counts them
    <!-- slow: why -->              run by ``make test-slow`` only; also ``slow, background: TEXT``
    <!-- in the test: --rounds 2 -->  these words are added to its ``cloister simulate``; the slow test adds nothing
    <!-- background: TEXT -->       a service: it is ready when it has printed TEXT, and stopped at the page's end
    <!-- exit: N -->                the last command fails with N
    <!-- stand-in -->               makes data that a test with the real data does not need
    <!-- file: NAME -->             no commands: the text of the file NAME
"""

import re
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
KINDS = {
    "install": "makes an environment, or runs the tests that would run this one",
    "containers": "needs a container engine",
    "machines": "needs a second machine or a person's secret",
    "database": "needs a PostgreSQL server",
    "time": "takes many minutes, and has a test of its own",
    "data": "needs a download",
}
MARKS = ("not run", "slow", "in the test", "background", "exit", "stand-in", "file")
_BLOCK = re.compile(
    r"(?:^ *<!-- (?P<mark>[^>]*?) -->\n)?"
    r"^(?P<indent> *)```(?P<language>[a-z{}-]*)[^\n]*\n(?P<text>.*?)^(?P=indent)```$",
    re.MULTILINE | re.DOTALL,
)


@dataclass(frozen=True)
class Block:
    """One fenced block.

    Attributes:
        page, line: where it is.
        mark, value: what the comment above it says; both empty without one.
        is_slow: whether ``make test-slow`` runs it only.
    """

    page: str
    line: int
    language: str
    text: str
    mark: str = ""
    value: str = ""
    is_slow: bool = False

    @property
    def place(self) -> str:
        return f"{self.page}:{self.line}"

    @property
    def is_shell(self) -> bool:
        return self.language == "sh"

    @property
    def kind(self) -> str:
        """Why it is not run: one word."""
        return self.value.partition(":")[0] if self.mark == "not run" else ""

    def commands(self) -> list[str]:
        """Its lines with continuations joined, without comments."""
        lines = (line.strip() for line in self.text.replace("\\\n", " ").splitlines())
        return [line for line in lines if line and not line.startswith("#")]


def blocks_of(page: str, text: str) -> list[Block]:
    """Every block of a page in order.

    Raises:
        ValueError: a comment above a block is none of ``MARKS``, or has no reason.
    """
    found = []
    for match in _BLOCK.finditer(text):
        mark, _, value = (match["mark"] or "").partition(": ")
        is_slow, mark = mark.startswith("slow"), mark.removeprefix("slow, ")
        line = text.count("\n", 0, match.start("language")) + 1
        if mark and mark not in MARKS:
            raise ValueError(f"{page}:{line}: what does {mark!r} mean? known are {', '.join(MARKS)}")
        kind, _, reason = value.partition(": ")
        if mark == "not run" and (kind not in KINDS or not reason):
            raise ValueError(f"{page}:{line}: write <!-- not run: KIND: why -->, KIND one of {', '.join(KINDS)}")
        indent = len(match["indent"])
        body = "".join(row[indent:] if row.strip() else "\n" for row in match["text"].splitlines(keepends=True))
        found.append(Block(page, line, match["language"], body, mark, value.strip(), is_slow))
    return found


def pages() -> dict[str, list[Block]]:
    """Every page with commands that this project keeps: README and docs."""
    files = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
    names = [str(file.relative_to(ROOT)) for file in files if "_build" not in file.parts]
    return {name: blocks_of(name, (ROOT / name).read_text("utf-8")) for name in names}
