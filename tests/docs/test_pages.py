"""What the pages say about files, commands, tests and each other exists; what exists is on a page."""

import re
import shlex
from pathlib import Path

import pytest
import typer
from blocks import ROOT, pages

from deploy.cli import app

PAGES = pages()
TEXTS = {name: (ROOT / name).read_text("utf-8") for name in PAGES}
PROSE = {name: re.sub(r"^( *)```.*?^\1```$", "", text, flags=re.M | re.S) for name, text in TEXTS.items()}
HIDDEN = re.compile(r"(cloister|make|docker|pip|python|git) ")
NAMED = re.compile(r"`((?:tests|benchmarks|common|client|server|deploy|docs)/[\w/.-]+)(?:::(\w+))?`")
COMMAND_LINE = re.compile(r"^(?:sudo )?(?:docker compose .*? )?(cloister [a-z].*)$")


def leaves(command=None, words=()):
    """Every command without commands below it, and its words."""
    found = typer.main.get_command(app) if command is None else command
    if not hasattr(found, "commands"):
        yield words, found
        return
    for name, below in found.commands.items():
        yield from leaves(below, (*words, name))


COMMANDS = dict(leaves())
GROUPS = {words[:depth] for words in COMMANDS for depth in range(1, len(words))}


def in_blocks(name):
    """Every ``cloister …`` line of a page's shell blocks."""
    lines = [line for block in PAGES[name] if block.is_shell for line in block.commands()]
    found = [match[1] for line in lines if (match := COMMAND_LINE.match(line))]
    return [re.split(r" (?:[|>]|&&) ", text)[0] for text in found]


def in_prose(name):
    """Every ``cloister …`` in backticks outside blocks."""
    found = re.findall(r"`(cloister [a-z][^`]*)`", PROSE[name])
    return [" ".join(text.split()) for text in found]


def words_of(text):
    """The command's own words, and the rest."""
    words = shlex.split(text.replace("…", ""), comments=True)[1:]
    depth = next((d for d in range(len(words), 0, -1) if tuple(words[:d]) in COMMANDS or tuple(words[:d]) in GROUPS), 0)
    return tuple(words[:depth]), words[depth:]


@pytest.mark.parametrize("name", [name for name in PAGES if in_blocks(name) + in_prose(name)])
def test_every_command_on_a_page_exists_with_its_options(name):
    for text in in_blocks(name) + in_prose(name):
        command, rest = words_of(text)
        first = command[0] if command else ""
        assert command, f"{name}: cloister has no command {text!r}"
        if command in GROUPS and rest and "|" not in rest[0]:
            assert rest[0].startswith("-"), f"{name}: {text!r}: {' '.join(command)} has no {rest[0]!r}"
        if command in COMMANDS:
            known = {flag for option in COMMANDS[command].params for flag in (*option.opts, *option.secondary_opts)}
            given = {word.partition("=")[0] for word in rest if re.match(r"--?[a-z]", word)}
            assert given <= known | {"--help", "-h"}, f"{name}: {first}: {text!r} has no {given - known}"


def test_every_command_is_shown_on_a_page_by_hand():
    by_hand = [name for name in PAGES if "/reference/" not in name]
    shown = {words_of(text)[0] for name in by_hand for text in in_blocks(name) + in_prose(name)}
    # `runs stop` in the prose of a page stands for `cloister coordinator runs stop`
    short = {match for text in PROSE.values() for match in re.findall(r"`(?:coordinator )?runs (\w+)", text)}
    shown |= {("coordinator", "runs", word) for word in short}
    missing = set(COMMANDS) - shown
    assert not missing, f"no page shows {sorted(' '.join(words) for words in missing)}"


def test_commands_do_not_hide_in_blocks_of_another_language():
    for name, blocks in PAGES.items():
        for block in blocks:
            if not block.is_shell:
                hidden = [line for line in block.commands() if HIDDEN.match(line)]
                assert not hidden, f"{block.place}: write ```sh above {hidden[0]!r}"
            assert block.language, f"{block.place}: a block needs a language: sh, toml, python or text ({name})"


def anchors(text):
    """The headings of a page as a forge and MyST name them."""
    heads = re.findall(r"^#{1,4} (.*)$", re.sub(r"^```.*?^```$", "", text, flags=re.M | re.S), re.M)
    return {re.sub(r"[^\w\- ]", "", head.lower().replace("`", "")).replace(" ", "-") for head in heads}


@pytest.mark.parametrize("name", PAGES)
def test_every_link_leads_somewhere(name):
    for target in re.findall(r"\]\(([^)\s]+)\)", PROSE[name]):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        file = (ROOT / name).parent / path if path else ROOT / name
        assert file.exists(), f"{name}: {target}"
        if anchor:
            assert anchor in anchors(file.read_text("utf-8")), f"{name}: {target}: there is no such heading"


@pytest.mark.parametrize("name", PAGES)
def test_every_test_and_file_that_a_page_names_exists(name):
    for path, test in NAMED.findall(PROSE[name]):
        if path.startswith("benchmarks/results/"):  # appears with the first run that is finished
            continue
        assert (ROOT / path).exists(), f"{name}: {path}"
        if test:
            assert f"def {test}(" in (ROOT / path).read_text("utf-8"), f"{name}: {path}::{test}"


def test_every_page_is_in_the_site():
    listed = set()
    for block in PAGES["docs/index.md"]:
        listed |= set(block.text.split())
    own = {str(Path(name).relative_to("docs").with_suffix("")) for name in PAGES if name.startswith("docs/")}
    assert own - {"index"} <= listed


def test_pages_are_written_with_relative_links_to_this_project():
    for name, text in TEXTS.items():
        assert not re.search(r"\]\((/|file:)", text), name
