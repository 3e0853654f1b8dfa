"""Containers for the tests of a deployment: an engine, the images, three compose projects, a run of three rounds.

The engine comes from engine.sh unless one answers already; where none can run, its one line is said at the end. Without
the real records those of the demo take their place, which the names of the tests say.
"""

import shutil
import sys
import time
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from containers import DATA, ENGINE, IMAGES, ROOT, SILOS, Deployment, local_wheels, run

SCRIPT = ROOT / "tests" / "deployment" / "engine.sh"
FIGURES = pytest.StashKey[dict[str, str]]()


def _by_script(action, figures):
    """The variables that engine.sh prints; where it cannot, its one line is said at the end."""
    done = run(SCRIPT, action, ENGINE, check=False, limit_s=900)
    if done.returncode == 3:
        figures["engine"] = f"{done.stderr.strip().splitlines()[-1]}; the compose files are validated instead"
        pytest.skip("no container engine can run here (the reason is told at the end)")  # a kernel may forbid it
    assert done.returncode == 0, done.stderr
    return dict(line.split("=", 1) for line in done.stdout.splitlines() if line.startswith("DOCKER_"))


@pytest.fixture(scope="session")
def figures(request):
    """Name to measured value, said at the end."""
    return request.config.stash.setdefault(FIGURES, {})


def pytest_terminal_summary(terminalreporter, config):
    """What was measured, or the one line that says why there was no engine."""
    for name, value in config.stash.get(FIGURES, {}).items():
        terminalreporter.write_line(f"{name}: {value}")


@pytest.fixture(scope="session")
def compose(figures):
    """Variables under which `docker compose` reads files; no engine is needed for that."""
    has_one = shutil.which("docker") and run("docker", "compose", "version", check=False).returncode == 0
    return {} if has_one else _by_script("compose", figures)


@pytest.fixture(scope="session")
def engine(compose, figures):
    """Variables under which `docker` reaches an engine with Compose and the base image."""
    if run("docker", "info", check=False).returncode == 0:
        yield compose
        return
    started = time.monotonic()
    variables = _by_script("up", figures)
    figures["engine"] = f"{time.monotonic() - started:.0f} s"
    yield variables
    run(SCRIPT, "down", ENGINE)


@pytest.fixture(scope="session")
def images(engine, figures):
    """All four, built one after the other from this tree."""
    with local_wheels(engine) as arguments:
        for target in IMAGES:
            started = time.monotonic()
            options = ["--file", ROOT / "deploy" / "Dockerfile", "--target", target, "--tag", f"cloister/{target}:test"]
            run("docker", "buildx", "build", "--load", *options, *arguments, ROOT, env=engine, limit_s=1200)
            seconds = time.monotonic() - started
            size = run("docker", "image", "inspect", "--format", "{{.Size}}", f"cloister/{target}:test", env=engine)
            figures[f"image {target}"] = f"{seconds:.0f} s, {int(size.stdout) / 1e6:.0f} MB"
    return {f"CLOISTER_{name.upper()}_IMAGE": f"cloister/{name}:test" for name in IMAGES}


@pytest.fixture(scope="session", params=["MedQuAD" if DATA.exists() else "made-up records"])
def deployment(engine, images, figures, tmp_path_factory):
    made = Deployment(tmp_path_factory.mktemp("deployment"), {**engine, **images})
    projects = [made.coordinator, *made.clients.values()]
    try:
        for project in reversed(projects):
            project.down()  # of a run that was killed
        for project in projects:
            started = time.monotonic()
            project.up()
            figures[f"{project.name} healthy"] = f"{time.monotonic() - started:.0f} s"
        yield made
    finally:
        for project in reversed(projects):
            project.down()


@pytest.fixture(scope="session")
def finished(deployment, figures):
    """A run of three rounds, to its end."""
    started = time.monotonic()
    run_id = deployment.submit(3, len(SILOS))
    found = deployment.wait(run_id, lambda found: found["state"] in ("finished", "failed"), 1200)
    figures["run of three rounds"] = f"{time.monotonic() - started:.0f} s from submit to certificate"
    assert found["state"] == "finished", found
    return run_id
