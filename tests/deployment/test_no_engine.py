"""Where the kernel forbids a container engine, `make test-deployment` says so in one line and validates what it can."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
FORBIDDEN = 'level=fatal msg="failed to start daemon: iptables: Operation not permitted"'
DAEMON = f"#!/bin/sh\necho '{FORBIDDEN}' >&2\nexit 1\n"
CLIENT = """\
#!/bin/sh
case $1 in
info) exit 1 ;;
{rest}
esac
"""
LINE = "no container engine can run here: the daemon did not start: "


def programs(folder, **scripts):
    """A folder for the front of the PATH, with a daemon that the kernel refuses."""
    folder.mkdir()
    for name, text in {"dockerd": DAEMON, "setsid": '#!/bin/sh\nexec "$@"\n', **scripts}.items():
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)
    return f"{folder}{os.pathsep}{os.environ['PATH']}"


def test_the_script_names_the_daemons_own_reason_and_does_not_wait_for_it(tmp_path):
    nothing = "#!/bin/sh\nexit 0\n"
    path = programs(
        tmp_path / "programs", id="#!/bin/sh\necho 0\n", iptables=nothing, debootstrap=nothing,
        docker=CLIENT.format(rest="*) exit 0 ;;"),
    )  # fmt: skip
    asked = subprocess.run(
        ["sh", HERE / "engine.sh", "up", tmp_path / "engine"],
        capture_output=True,
        text=True,
        env={"PATH": path},
        timeout=60,
    )
    assert asked.returncode == 3, asked.stderr
    assert asked.stdout == ""
    assert asked.stderr.splitlines() == [LINE + FORBIDDEN]


def test_without_apt_and_without_a_client_the_script_says_so_in_one_line(tmp_path):
    folder = tmp_path / "programs"
    folder.mkdir()
    for name in ("sh", "id", "mkdir"):
        (folder / name).symlink_to(shutil.which(name))
    script = ["sh", HERE / "engine.sh", "compose", tmp_path / "engine"]
    asked = subprocess.run(script, capture_output=True, text=True, env={"PATH": str(folder)}, timeout=60)
    assert asked.returncode == 3
    assert re.fullmatch(r"no container engine can run here: .*docker\.io.*\n", asked.stderr), asked.stderr


@pytest.mark.slow  # Compose is unpacked from Debian packages first
@pytest.mark.containers
@pytest.mark.skipif(os.geteuid() != 0, reason="only root may start a daemon; engine.sh says so to everybody else")
def test_the_target_says_so_in_one_line_and_compose_still_reads_every_file(tmp_path):
    ready = Path(os.environ.get("CLOISTER_ENGINE", "/var/tmp/cloister-engine"))
    made = subprocess.run([HERE / "engine.sh", "compose", ready], capture_output=True, text=True, timeout=250)
    if made.returncode == 3:
        pytest.skip(made.stderr.strip())  # no package index: Compose itself cannot be had, the reason is its line
    assert made.returncode == 0, made.stderr
    (tmp_path / "engine").mkdir()
    (tmp_path / "engine" / "config").symlink_to(ready / "config")
    path = programs(tmp_path / "programs", docker=CLIENT.format(rest=f'*) exec {shutil.which("docker")} "$@" ;;'))
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("DOCKER_")}
    variables = {**inherited, "PATH": path, "CLOISTER_ENGINE": str(tmp_path / "engine")}
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-p",
        "no:cacheprovider",
        "-v",
        "-rfE",
        *HERE.glob("test_containers*.py"),
    ]
    done = subprocess.run(command, cwd=HERE.parents[1], env=variables, capture_output=True, text=True, timeout=290)
    assert done.returncode == 0, done.stdout[-3000:]
    said = [line for line in done.stdout.splitlines() if "no container engine" in line]
    assert said == [f"engine: {LINE}{FORBIDDEN}; the compose files are validated instead"]
    assert len(re.findall(r"::test_compose_takes_every_overlay\S+ PASSED", done.stdout)) == 7
    assert not re.search(r"::test_(?!compose_takes)\S+ PASSED", done.stdout)
