"""Cuts of large tensors for a CPU: what is worked on at a time stays in the processor's cache, and in memory that is used again.

Memory that is used for the first time costs the operating system a fault for each page of 4 kB, up to 3 us on a virtual machine, and the
C library gives every block of more than 32 MB back at once. A sum over 65,536 tokens of 384 channels took 32 times that over 16,384.
"""

from itertools import pairwise

from torch import Tensor

CACHED_VALUES = 1 << 20
"""Values of one intermediate that are worked on at a time; the fastest of 2^16 to 2^22 at 1024 and 4096 tokens."""


def bands(count: int, values_each: int, like: Tensor, *, at_least: int = 1) -> list[slice]:
    """Cut `count` rows into even runs whose intermediates, of `values_each` values a row, fit the cache; a GPU takes all at once.

    Args:
        count: Rows, more than 0.
        values_each: Values of an intermediate in one row.
        like: Any tensor on the device that works.
        at_least: Rows of a run, where there are so many.
    """
    most = max(at_least, CACHED_VALUES // max(1, values_each)) if like.device.type == "cpu" else count
    number = -(-count // most)
    edges = [count * index // number for index in range(number + 1)]
    return [slice(low, high) for low, high in pairwise(edges)]
