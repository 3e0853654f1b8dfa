"""Every row belongs to one silo, and rows set aside are taken from it."""

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from client.data import set_aside, split_silos
from common.errors import InvalidInput


def rows(count, silo="s"):
    return [{"id": f"{silo}{i}", "silo": silo} for i in range(count)]


def ids(rows):
    return Counter(row["id"] for row in rows)


@given(st.integers(1, 60), st.integers(1, 12), st.integers(0, 9))
def test_a_random_split_gives_every_row_to_one_silo_of_nearly_equal_size(count, silos, seed):
    if silos > count:
        with pytest.raises(InvalidInput, match="without an empty one"):
            split_silos(rows(count), silos=silos, public_seed=seed)
        return
    split = split_silos(rows(count), silos=silos, public_seed=seed)
    assert len(split.silos) == silos
    assert ids(row for own in split.silos.values() for row in own) == ids(rows(count))
    sizes = [len(own) for own in split.silos.values()]
    assert max(sizes) - min(sizes) <= 1
    assert split == split_silos(rows(count), silos=silos, public_seed=seed)


def test_a_column_names_the_silos_in_the_order_of_names():
    every = rows(2, "b") + rows(3, "a") + [{"id": "x", "silo": 7}]
    split = split_silos(every, silo_column="silo")
    assert {name: len(own) for name, own in split.silos.items()} == {"7": 1, "a": 3, "b": 2}
    assert list(split.silos) == ["7", "a", "b"]


@pytest.mark.parametrize("value", [None, "", "  "])
def test_a_row_without_a_silo_is_named(value):
    with pytest.raises(InvalidInput, match="row 3 has no value in the silo column 'silo'"):
        split_silos([*rows(2), {"id": "x", "silo": value}], silo_column="silo")


def test_a_missing_silo_column_lists_the_columns():
    with pytest.raises(InvalidInput, match="there are 'id', 'silo'"):
        split_silos(rows(2), silo_column="hospital")


@given(st.lists(st.integers(1, 40), min_size=1, max_size=5), st.floats(0.01, 0.99), st.integers(0, 9))
def test_rows_set_aside_leave_their_silo_and_none_becomes_empty(sizes, fraction, seed):
    silos = {f"s{i}": rows(size, f"s{i}-") for i, size in enumerate(sizes)}
    expected = sum(min(round(size * fraction), size - 1) for size in sizes)
    if expected == 0:
        with pytest.raises(InvalidInput, match="too few rows"):
            set_aside(silos, fraction, seed)
        return
    kept, aside = set_aside(silos, fraction, seed)
    assert all(kept.values())
    assert ids(row for own in kept.values() for row in own) + ids(aside) == ids(
        r for own in silos.values() for r in own
    )
    assert len(aside) == expected
    assert (kept, aside) == set_aside(silos, fraction, seed)
