"""Which of two sets belong together: the assignment of least total cost, as SciPy's `linear_sum_assignment` finds it.

Shortest augmenting paths (Jonker and Volgenant 1987; for rectangles Crouse 2016, doi 10.1109/TAES.2016.140952), rows in
order. Where several assignments cost the same, the choice is SciPy's: between equally near columns the last free one in
the list of columns to visit, which starts in reverse order; so that published figures come out the same.

    >>> assign(np.array([[4.0, 1.0, 3.0], [2.0, 0.0, 5.0]]))
    [(0, 1), (1, 0)]
"""

from __future__ import annotations

import numpy as np


def assign(cost: np.ndarray) -> list[tuple[int, int]]:
    """Pairs (row, column) of least total cost, min(n, m) of them, in order of rows.

    Args:
        cost: finite, [n, m].
    """
    assert np.isfinite(cost).all(), "a cost that is not finite has no shortest path"
    if cost.shape[0] > cost.shape[1]:
        return sorted((row, column) for column, row in assign(cost.T))
    rows, columns = cost.shape
    column_of = np.full(rows, -1)
    row_of = np.full(columns, -1)
    row_price, column_price = np.zeros(rows), np.zeros(columns)
    for row in range(rows):
        _augment(row, cost, column_of, row_of, row_price, column_price)
    return [(row, int(column)) for row, column in enumerate(column_of)]


def _augment(
    start: int,
    cost: np.ndarray,
    column_of: np.ndarray,
    row_of: np.ndarray,
    row_price: np.ndarray,
    column_price: np.ndarray,
) -> None:
    """Assigns one more row, along the shortest path to a free column, and keeps the prices feasible; in place.

    Args:
        cost: [n, m]; column_of: int [n], -1 without; row_of: int [m], -1 without; prices: [n] and [m].
    """
    columns = cost.shape[1]
    distance = np.full(columns, np.inf)
    came_from = np.full(columns, -1)
    to_visit = np.arange(columns)[::-1].copy()
    left, row, length = columns, start, 0.0
    rows, visited = [start], []
    while True:
        open_ = to_visit[:left]
        reach = length + cost[row, open_] - row_price[row] - column_price[open_]
        nearer = reach < distance[open_]
        distance[open_[nearer]] = reach[nearer]
        came_from[open_[nearer]] = row
        nearest = np.flatnonzero(distance[open_] == distance[open_].min())
        free = nearest[row_of[open_[nearest]] == -1]
        place = int(free[-1] if len(free) else nearest[0])
        column = int(open_[place])
        length = distance[column]
        visited.append(column)
        left -= 1
        to_visit[place] = to_visit[left]
        if row_of[column] == -1:
            break
        row = int(row_of[column])
        rows.append(row)
    row_price[start] += length
    for row in rows[1:]:
        row_price[row] += length - distance[column_of[row]]
    for visited_column in visited:
        column_price[visited_column] -= length - distance[visited_column]
    while True:
        row = int(came_from[column])
        row_of[column] = row
        column, column_of[row] = int(column_of[row]), column
        if row == start:
            return


def nearest_pairs(a: np.ndarray, b: np.ndarray) -> list[tuple[int, int]]:
    """Pairs of points (index in `a`, index in `b`) with the least total Euclidean distance.

    Args:
        a: [n, d]; b: [m, d].
    """
    return assign(np.sqrt(((a[:, None] - b[None]) ** 2).sum(-1))) if len(a) and len(b) else []
