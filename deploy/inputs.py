"""From settings to rows: which silos there are, which rows are public, and every complaint about them, in time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from client.data import ColumnNames, read_rows, rows_by_file, set_aside, split_silos
from client.data.rows import Row
from client.data.tokens import Prepared, class_names, prepare_classification, prepare_language
from client.engine.batches import Example
from common.config import RunConfig, round_to_two_digits
from common.errors import InvalidInput
from deploy.demo.records import demo_evaluation, demo_silos

DEMO = "demo"


@dataclass(frozen=True)
class Inputs:
    """Rows per silo, and the public evaluation rows.

    Attributes:
        held_out: how many of the evaluation rows were taken from the silos; those records are covered by no ε.
        declared: sizes come from the settings, not from the data.
    """

    silos: dict[str, list[Row]]
    evaluation: list[Row]
    held_out: int
    declared: bool


def gather(config: RunConfig) -> Inputs:
    """Read what the settings name.

    Raises:
        InvalidInput: a file, a column or a silo is missing or empty; the message names it and what there is.
    """
    silos = _silos(config)
    silos = _chosen(silos, config.only_silos)
    evaluation: list[Row] = []
    held_out = 0
    if config.eval_data is not None:
        evaluation = read_rows(config.eval_data)
    elif config.holdout is not None:
        silos, evaluation = set_aside(silos, config.holdout, config.public_seed)
        held_out = len(evaluation)
    elif config.data == DEMO:
        evaluation = demo_evaluation(config.public_seed)
    for name, rows in silos.items():
        if not rows:
            raise InvalidInput(f"silo {name!r} holds no rows: leave it out with --only-silos, or fill it")
    declared = all(name in config.clients and config.clients[name].declared_records for name in silos)
    return Inputs(dict(sorted(silos.items())), evaluation, held_out, declared)


def column_names(config: RunConfig) -> ColumnNames:
    """The columns the settings name."""
    return ColumnNames(config.prompt_column, config.completion_column, config.label_column, config.silo_column)


def classes_of(config: RunConfig, inputs: Inputs) -> tuple[str, ...]:
    """The names of the classes, from every row: in a simulation they are published with the adapter."""
    if config.task != "classification":
        return ()
    names = {name for rows in [*inputs.silos.values(), inputs.evaluation] if rows for name in _classes(rows, config)}
    if len(names) < 2:
        raise InvalidInput(f"the label column holds one class only ({', '.join(names)}): there is nothing to learn")
    return tuple(sorted(names, key=lambda name: (len(name), name)))


def tokenise(
    config: RunConfig, rows: Sequence[Row], tokenizer: Any, max_length: int, classes: Sequence[str]
) -> Prepared:
    """One silo's rows as examples."""
    columns = column_names(config)
    if config.task == "classification":
        return prepare_classification(rows, tokenizer, max_length, columns, classes)
    return prepare_language(rows, tokenizer, max_length, columns)


def tokenise_silos(
    config: RunConfig, silos: Mapping[str, Sequence[Row]], tokenizer: Any, max_length: int, classes: Sequence[str]
) -> dict[str, Prepared]:
    """Every silo's rows as examples; a silo left without a usable record is an error that names it."""
    prepared = {}
    for name, rows in silos.items():
        try:
            prepared[name] = tokenise(config, rows, tokenizer, max_length, classes)
        except InvalidInput as error:
            raise InvalidInput(f"silo {name!r}: {error}") from error
        if not prepared[name].examples:
            raise InvalidInput(
                f"silo {name!r}: none of its {len(rows)} records keeps a completion token within "
                f"{max_length} tokens: raise --max-length, or check --prompt-column and --completion-column"
            )
    return prepared


def declared_records(config: RunConfig, name: str, examples: Sequence[Example]) -> int:
    """The public constant of one silo: the setting, or (in a simulation) its count rounded down to two digits."""
    own = config.clients.get(name)
    if own is not None and own.declared_records is not None:
        return own.declared_records
    return round_to_two_digits(len(examples))


def _silos(config: RunConfig) -> dict[str, list[Row]]:
    if config.data == DEMO:
        if config.task != "causal-lm":
            raise InvalidInput("the demo's records are for --task causal-lm; name your own --data for classification")
        return demo_silos(config.public_seed)
    if config.silo_column is None and config.silos is None:
        by_file = rows_by_file(config.data)
        if len(by_file) > 1:
            return by_file
    rows = read_rows(config.data)
    return split_silos(rows, silo_column=config.silo_column, silos=config.silos, public_seed=config.public_seed).silos


def _chosen(silos: dict[str, list[Row]], names: Sequence[str] | None) -> dict[str, list[Row]]:
    if names is None:
        return silos
    for name in names:
        if name not in silos:
            raise InvalidInput(f"only-silos: no silo {name!r}; there are {', '.join(sorted(silos))}")
    return {name: silos[name] for name in names}


def _classes(rows: Sequence[Row], config: RunConfig) -> tuple[str, ...]:
    return class_names(rows, column_names(config))


def next_output(root: Path = Path("runs")) -> Path:
    """The first unused folder ``runs/NNN``."""
    number = 1
    while (root / f"{number:03d}").exists():
        number += 1
    return root / f"{number:03d}"
