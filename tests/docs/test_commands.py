"""Every command of README and docs is run, page by page and in order, as a reader would.

The fast test shortens runs where the page's comment says so and leaves out what is marked slow; the slow test runs such
pages as they are written. What neither runs is counted, with its reason, so that it does not grow unseen.
"""

import json
import os
import shutil
import socket
import subprocess
from collections import Counter
from pathlib import Path

import pytest
from blocks import KINDS, ROOT, blocks_of, pages
from sandbox import records

pytestmark = pytest.mark.timeout(1800)  # a busy machine is no failure

PAGES = pages()
WITH_COMMANDS = [name for name, blocks in PAGES.items() if any(block.is_shell for block in blocks)]
WITH_MORE = [name for name in WITH_COMMANDS if any(b.is_slow or b.mark == "in the test" for b in PAGES[name])]
NOT_RUN = {"install": 2, "containers": 5, "machines": 3, "database": 1, "data": 1}
"""How many blocks of each kind are not run here. A new one belongs into this line, with a reason in its comment."""


def prepare(page, sandbox, finished_run):
    """The files that the page's reader has before it begins."""
    sandbox.write("records.jsonl", records(60))
    public = [json.loads(line) for line in records(10).splitlines()]
    sandbox.write(
        "public.jsonl",
        "".join(json.dumps({"prompt": row["question"], "completion": row["answer"]}) + "\n" for row in public),
    )
    shutil.copytree(finished_run, sandbox.folder / "runs" / "001")
    if page == "docs/accountant.md":
        for name in ("certificate.json", "ledger.sqlite"):
            shutil.copy(finished_run / name, sandbox.folder)
        shutil.copy(finished_run / "state" / "clients" / "0001" / "ledger.sqlite", sandbox.folder / "own.sqlite")
        shutil.copy(finished_run / "state" / "keys" / "accountant.key", sandbox.folder)
        signed = json.loads((finished_run / "certificate.json").read_text("utf-8"))["certificate"]
        sandbox.write("coordinator.pub", signed["coordinator_key"])
        sandbox.write("clinic-a.pub", signed["parts"][0]["part"]["public_key"])
        (block,) = blocks_of("before the page", KIT)
        sandbox.play(block)
    if page == "docs/operations.md":
        sandbox.write("clinic-a/records.jsonl", records(60))
        shutil.copy(finished_run / "ledger.sqlite", sandbox.folder)


KIT = """\
```sh
cloister provision init federation --coordinator coordinator.example.org:8443
cloister provision add-client clinic-a
cp -r federation/kits/clinic-a kit
```
"""


@pytest.mark.parametrize("page", WITH_COMMANDS)
def test_the_commands_of_a_page_do_what_it_says(page, sandbox, finished_run):
    play(page, sandbox(), finished_run, slow=False)


@pytest.mark.slow  # runs as long as a reader's, and services between processes
@pytest.mark.parametrize("page", WITH_MORE)
def test_a_page_as_it_is_written(page, sandbox, finished_run):
    if page == "docs/operations.md" and is_taken(8000):
        pytest.skip("somebody listens on port 8000, which the page uses")
    play(page, sandbox(), finished_run, slow=True)


@pytest.mark.slow
@pytest.mark.data
def test_the_tutorial_on_the_real_records(sandbox, finished_run):
    import gzip

    source = Path(os.environ.get("CLOISTER_DATA", ROOT.parent / "shared" / "data")) / "medquad_by_institution.jsonl.gz"
    if not source.exists():
        pytest.skip(f"{source} is not there: set CLOISTER_DATA to the folder with MedQuAD")
    box = sandbox()
    with gzip.open(source, "rt", encoding="utf-8") as file:
        rows = [json.loads(line) for line in file]
    box.write(
        "medquad.jsonl",
        "".join(
            json.dumps({"institution": row["silo"], "question": row["question"], "answer": row["answer"]}) + "\n"
            for row in rows
            if row["silo"] not in ("GARD", "GHR")
        ),
    )
    play("docs/tutorial.md", box, finished_run, slow=True, data=True)


def play(page, box, finished_run, *, slow, data=False):
    prepare(page, box, finished_run)
    for block in PAGES[page]:
        if block.mark == "not run" or (block.is_slow and not slow) or (block.mark == "stand-in" and data):
            continue
        box.play(block, added="" if slow or block.mark != "in the test" else block.value)


def is_taken(port):
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def test_what_is_not_run_is_counted():
    found = Counter(block.kind for blocks in PAGES.values() for block in blocks if block.mark == "not run")
    assert found == Counter(NOT_RUN)


def test_most_commands_are_run():
    shell = [block for blocks in PAGES.values() for block in blocks if block.is_shell]
    assert len(shell) > 30
    assert sum(block.mark != "not run" for block in shell) > 0.7 * len(shell)


def test_a_failing_command_is_noticed(sandbox):
    for text in ("cloister certificate verify nothing.json", "true\ncloister no-such-command\ntrue"):
        (block,) = blocks_of("a page", f"```sh\n{text}\n```\n")
        with pytest.raises(AssertionError, match="exit code 2"):
            sandbox().play(block)
    (block,) = blocks_of("a page", "<!-- exit: 2 -->\n```sh\ncloister certificate verify nothing.json\n```\n")
    assert "nothing.json" in sandbox().play(block)


def test_a_comment_without_a_reason_is_refused():
    for text in ("<!-- not run: laziness: no time -->", "<!-- not run: containers -->", "<!-- maybe: later -->"):
        with pytest.raises(ValueError, match="a page:2"):
            blocks_of("a page", f"{text}\n```sh\ntrue\n```\n")
    assert all(reason for reason in KINDS.values())


def test_the_converter_reads_what_the_archive_holds(tmp_path):
    document = (
        "<Document><QAPairs><QAPair><Question> What is {0}? </Question><Answer>An {0}.</Answer></QAPair>"
        "<QAPair><Question>And then?</Question><Answer></Answer></QAPair></QAPairs></Document>"
    )
    for folder in ("1_CancerGov_QA", "8_NHLBI_QA_XML", "2_GARD_QA", "other"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "0000001.xml").write_text(document.format(folder[0]), "utf-8")
    script, output = ROOT / "docs" / "examples" / "medquad.py", tmp_path / "out.jsonl"
    done = subprocess.run(["python3", script, tmp_path, output], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert [json.loads(line) for line in output.read_text("utf-8").splitlines()] == [
        {"institution": "CancerGov", "question": "What is 1?", "answer": "An 1."},
        {"institution": "NHLBI", "question": "What is 8?", "answer": "An 8."},
    ]
    (tmp_path / "empty").mkdir()
    done = subprocess.run(["python3", script, tmp_path / "empty", output], capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    assert "is it a clone of MedQuAD" in done.stderr
