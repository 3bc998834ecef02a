"""Which rows of a batch are padded together, so that little of what is computed is padding."""

from __future__ import annotations

from collections.abc import Sequence
from math import inf


def buckets(lengths: Sequence[int], waste: float = 0.1, most: int = 4) -> list[list[int]]:
    """The fewest groups of rows, each padded to its longest, of which at most a share of ``waste`` is padding.

    Where ``most`` groups cannot do that, those with the least padding. Shortest first; rows of a group in their order.
    """
    order = sorted(range(len(lengths)), key=lambda row: lengths[row])
    real, n = sum(lengths), len(order)
    # What the first i rows cost at least in the groups so far, and where the last of these groups begins.
    costs, starts = [[0.0] + [inf] * n], [[0] * (n + 1)]
    for _ in range(min(most, n)):
        before = costs[-1]
        choices = [[(before[j] + (i - j) * lengths[order[i - 1]], j) for j in range(i)] for i in range(1, n + 1)]
        best = [(inf, 0), *map(min, choices)]
        costs.append([cost for cost, _ in best])
        starts.append([start for _, start in best])
    enough = [k for k in range(1, len(costs)) if costs[k][n] - real <= waste * costs[k][n]]
    number = enough[0] if enough else min(range(len(costs)), key=lambda k: costs[k][n])
    groups, end = [], n
    for k in range(number, 0, -1):
        groups.append(sorted(order[starts[k][end] : end]))
        end = starts[k][end]
    return groups[::-1]
