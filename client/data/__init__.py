"""Records from a file to tokens: reading, splitting into silos, tokenising. All of it stays in the organisation."""

from client.data.rows import ColumnNames, read_rows, rows_by_file
from client.data.silos import Split, set_aside, split_silos
from client.data.tokens import Prepared, prepare_classification, prepare_language

__all__ = [
    "ColumnNames",
    "Prepared",
    "Split",
    "prepare_classification",
    "prepare_language",
    "read_rows",
    "rows_by_file",
    "set_aside",
    "split_silos",
]
