"""Cuts of large tensors for a CPU: what is worked on at a time stays in the processor's cache, and in memory that is used again.

Memory that is used for the first time costs the operating system a fault for each page of 4 kB, up to 3 us on a virtual machine, and the
C library gives every block of more than 32 MB back at once. A sum over 65,536 tokens of 384 channels took 32 times that over 16,384.
"""

from collections.abc import Iterator
from itertools import pairwise

from torch import Tensor

CACHED_VALUES = 1 << 20
"""Values of one intermediate that are worked on at a time; the fastest of 2^16 to 2^22 at 1024 and 4096 tokens."""

MIN_TOKENS = 256
"""Rows of a matrix product below which reading the weights costs more than the cache spares; four times as many where the weights do not
stay in it either: of N = 1024 tokens, Mix-FFN 2240 wide took 1.14 and 1.33 times as long in pieces of 256 as its modules do, and 1.03 and
1.12 times with as many as this; 1152 wide 0.94, 1.03 and 1.04 against 0.99, 0.94 and 0.87 (the last of 4096 tokens)."""
CACHED_WEIGHTS = 1 << 22
"""Weights that stay in a cache that cores share."""


def bands(count: int, values_each: int, like: Tensor, *, at_least: int = 1) -> list[slice]:
    """Cut `count` rows into even runs whose intermediates, of `values_each` values a row, fit the cache; a GPU takes all at once.

    Args:
        count: Rows, more than 0.
        values_each: Values of an intermediate in one row.
        like: Any tensor on the device that works.
        at_least: Rows of a run, where there are so many.
    """
    return _even(count, _most(values_each, at_least) if like.device.type == "cpu" else count)


def largest_band(count: int, values_each: int) -> int:
    """Return how many of `count` rows a CPU has in one of their `bands` at most."""
    return _largest(count, _most(values_each, 1))


def pieces(batch: int, rows: int, values_each: int, tokens_each: int, weights: int) -> Iterator[tuple[slice, slice]]:
    """Cut a batch of grids into runs whose intermediates fit the cache, each in one piece of memory: whole samples, or rows of one.

    Args:
        batch: Samples.
        rows: Of each sample.
        values_each: Values of an intermediate in one row.
        tokens_each: Tokens in one row.
        weights: How many every piece is multiplied by.
    """
    most = _most_rows(values_each, tokens_each, weights)
    together = max(1, most // rows)
    for samples in _even(batch, together):
        for part in _even(rows, most) if together == 1 else [slice(0, rows)]:
            yield samples, part


def largest_piece(rows: int, values_each: int, tokens_each: int, weights: int) -> int:
    """Return how many rows of one sample `pieces` puts together at most."""
    return _largest(rows, _most_rows(values_each, tokens_each, weights))


def _most(values_each: int, at_least: int) -> int:
    return max(at_least, CACHED_VALUES // max(1, values_each))


def _most_rows(values_each: int, tokens_each: int, weights: int) -> int:
    least = MIN_TOKENS if weights <= CACHED_WEIGHTS else 4 * MIN_TOKENS
    return max(CACHED_VALUES // values_each, -(-least // tokens_each))


def _even(count: int, most: int) -> list[slice]:
    number = -(-count // most)
    edges = [count * index // number for index in range(number + 1)]
    return [slice(low, high) for low, high in pairwise(edges)]


def _largest(count: int, most: int) -> int:
    return -(-count // -(-count // most))
