"""The utility benchmark's grid names every method once, and its tables say what their lines say."""

import importlib.util
import sys
from pathlib import Path
from typing import get_args

import pytest

from common.config import RunConfig

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture(scope="module")
def benchmark():
    """Both modules, loaded from their files: benchmarks are scripts and no package."""
    found = {}
    for name in ("utility_grid", "utility_table"):
        spec = importlib.util.spec_from_file_location(name, BENCHMARKS / f"{name}.py")
        found[name] = sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(found[name])
    yield found
    for name in found:
        del sys.modules[name]


def line(row, seed, score, **more):
    task, arm, _ = row.split("/")
    fixed = {"unit": "record", "relation": "zero_out", "sampler": "poisson", "accountant": "PLD", "spent": 2.99}
    fixed["delta"] = 5.9e-6
    own = {"row": row, "task": task, "arm": arm, "seed": seed, "score": score, "loss": 1 - score, "cpu_seconds": 60}
    return fixed | own | more


def test_every_method_has_a_row_of_its_own(benchmark):
    rows = [
        dict(zip(options[::2], options[1::2], strict=True)) for options in benchmark["utility_grid"].METHODS.values()
    ]
    for name, plain in {
        "noise_schedule": "constant", "clipping": "fixed", "noise_allocation": "uniform", "subspace": "none",
        "aggregation": "ffa", "shrinkage": "none", "averaging": "none", "weights": "uniform",
    }.items():  # fmt: skip
        flag = "--" + name.replace("_", "-")
        values = set(get_args(RunConfig.model_fields[name].annotation)) - {plain}
        assert {row[flag] for row in rows if flag in row} == values, flag
    assert any("--smoothing" in row for row in rows)


def test_every_row_of_the_demo_is_a_run_of_the_command(benchmark):
    demo = [cell for cell in benchmark["utility_grid"].cells() if cell.task == "demo"]
    assert {cell.arm for cell in demo} == {"none", "rdp", "pld", "best"}
    for cell in demo:
        words = cell.options(1)
        assert words[-2:] == ["--public-seed", "1"]
        assert ("--no-privacy" in words) == (cell.epsilon is None)


def test_a_row_within_two_standard_errors_of_the_majority_class_is_chance(benchmark):
    cell = benchmark["utility_grid"].Cell("sst2", "pld", 3.0, (0, 1))
    for score, marked in ((0.53, True), (0.55, False)):  # 872 rows, share .51: one standard error is .017
        lines = [line(cell.name, seed, score, evaluated=872, majority=0.51) for seed in (0, 1)]
        table = benchmark["utility_table"].full_table(lines, [cell])
        assert ("(chance)" in table) == marked
        assert "| 3 | 2.99 | record, zero_out, poisson, PLD, δ 5.9e-06 | 2 |" in table


def test_methods_are_compared_in_pairs_of_one_seed(benchmark):
    grid = benchmark["utility_grid"]
    plain, method = grid.Cell("sst2-short", "pld", 3.0, (0, 1)), grid.Cell("sst2-short", "rolora", 3.0, (0, 1))
    lines = [
        line(plain.name, 0, 0.70), line(plain.name, 1, 0.80), line(method.name, 0, 0.73), line(method.name, 1, 0.81),
        line(method.name, 2, 0.99),  # no partner
    ]  # fmt: skip
    table = benchmark["utility_table"].full_table(lines, [plain, method])
    assert "| 2 | +0.0200 ± 0.0100 | -0.0200 ± 0.0100 |" in table


def test_the_newest_line_of_a_seed_counts(benchmark):
    cell = benchmark["utility_grid"].Cell("sst2", "pld", 3.0, (0,))
    lines = [line(cell.name, 0, 0.60), line(cell.name, 0, 0.75)]
    assert "| 0.750 |" in benchmark["utility_table"].full_table(lines, [cell])
    assert "| sst2 | 3 | – | – | 0.750 | – |" in benchmark["utility_table"].short_table(lines, [cell])


def test_delta_stands_beside_every_epsilon(benchmark):
    """It is a setting, and follows the declared size where nobody sets it: whoever compares two rows must see it."""
    cell, peer = (benchmark["utility_grid"].Cell("sst2-short", arm, 3.0, (0,)) for arm in ("pld", "flower-local-dp"))
    runs = [line(cell.name, 0, 0.7), line(peer.name, 0, 0.6, delta=1e-5)]
    table = benchmark["utility_table"].full_table(runs, [cell, peer]).splitlines()
    assert "δ 5.9e-06" in table[2]
    assert "δ 1e-05" in table[3]
