"""Planes with a row for several tokens, against a list that names each token's row."""

from __future__ import annotations

from itertools import groupby

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlx_kvq_plugin.codecs import get_codec
from mlx_kvq_plugin.planes import Rows, expanded, shared_planes, with_new_rows, without_newest, without_oldest

SHARED = {"a": 4, "b": 6, "c": 4}  # planes, and tokens to a row
BLOCK = 12  # tokens that fill whole rows of all


class Naive:
    """A row for each token, by the tokens that a row had when it was new; rows are numbered as they come."""

    def __init__(self) -> None:
        self.tokens: dict[int, list[int]] = {t: [] for t in SHARED.values()}
        self.made = dict.fromkeys(SHARED.values(), 0)

    def append(self, count: int) -> None:
        for t, tokens in self.tokens.items():
            tokens += [self.made[t] + i // t for i in range(count)]
            self.made[t] += count // t

    def drop(self, newest: int, oldest: int) -> None:
        for t, tokens in self.tokens.items():
            left = tokens[: max(0, len(tokens) - newest)]
            self.tokens[t] = left[oldest:]

    @property
    def rows(self) -> Rows:
        return {t: tuple(len(list(run)) for _, run in groupby(tokens)) for t, tokens in self.tokens.items()}

    def planes(self) -> dict[str, mx.array]:
        """What a cache stores: a row for each row that has tokens left, and a plane with a row for every token."""
        found = {
            name: np.array([[row, 100 * t + row] for row in dict.fromkeys(self.tokens[t])]).reshape(1, 1, -1, 2)
            for name, t in SHARED.items()
        }
        return {**{name: mx.array(rows) for name, rows in found.items()}, "codes": mx.zeros((1, 1, self.count, 3))}

    @property
    def count(self) -> int:
        return len(self.tokens[4])


OPERATIONS = st.lists(
    st.tuples(st.sampled_from(["append", "newest", "oldest"]), st.integers(0, 40)), min_size=1, max_size=12
)


@settings(max_examples=200, deadline=None, derandomize=True, database=None)
@given(OPERATIONS)
def test_rows_are_those_of_a_list_of_tokens(operations: list[tuple[str, int]]) -> None:
    rows: Rows = {}
    naive = Naive()
    for operation, n in operations:
        if operation == "append":
            rows = with_new_rows(rows, set(SHARED.values()), n * BLOCK)
            naive.append(n * BLOCK)
        elif operation == "newest":
            rows = without_newest(rows, n)
            naive.drop(n, 0)
        else:
            rows = without_oldest(rows, n)
            naive.drop(0, n)
        assert {t: rows.get(t, ()) for t in naive.rows} == naive.rows
    found = expanded(naive.planes(), SHARED, naive.rows)
    for name, t in SHARED.items():
        expected = np.array([[row, 100 * t + row] for row in naive.tokens[t]]).reshape(1, 1, -1, 2)
        np.testing.assert_array_equal(found[name], expected)
    assert found["codes"].shape == (1, 1, naive.count, 3)


def test_expanding_leaves_the_stored_planes_as_they_are() -> None:
    planes = {"step": mx.arange(4).reshape(2, 1, 2, 1), "codes": mx.zeros((2, 1, 5, 1))}
    found = expanded(planes, {"step": 4}, {4: (2, 3)})
    assert planes["step"].shape == (2, 1, 2, 1) and found["codes"] is planes["codes"]
    assert found["step"][..., 0].tolist() == [[[0, 0, 1, 1, 1]], [[2, 2, 3, 3, 3]]]


def test_nothing_is_left_when_more_tokens_go_than_there_are() -> None:
    rows = with_new_rows({}, {4}, 8)
    assert rows == {4: (4, 4)}
    assert without_newest(rows, 9) == without_oldest(rows, 8) == {4: ()}
    assert without_newest(rows, 0) == without_oldest(rows, 0) == rows


@pytest.mark.parametrize(
    ("name", "shared"),
    [
        ("kivi2", {"step": 32, "least": 32}),
        ("tq4", {}),
        ("tq2.5", {}),
        ("tq3+tq2", {}),
        ("affine4+kivi4", {"head1_step": 32, "head1_least": 32}),
    ],
)
def test_shared_planes_of_codecs(name: str, shared: dict[str, int]) -> None:
    codec = get_codec(name)
    assert shared_planes(codec, 64) == shared
    x = mx.random.normal((1, 2, 64, 64))
    rows = {plane: array.shape[2] for plane, array in codec.encode(x, codec.fit(x)).items()}
    assert rows == {plane: 64 // shared.get(plane, 1) for plane in rows}
