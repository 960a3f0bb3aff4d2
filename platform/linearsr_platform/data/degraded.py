"""The LR image of a photograph that is held out: the same for whoever makes it, the evaluation that measures or the tagger that looks."""

import hashlib

import numpy as np
from numpy.typing import NDArray

from linearsr.degradation import degrade
from linearsr.degradation_config import Degradation
from linearsr_platform.data.images import BadImageError

Pixels = NDArray[np.uint8]
"""A picture, (H, W, 3)."""


def lr_image(photograph: Pixels, *, scale: int, degradation: Degradation, seed: int, name: str) -> tuple[Pixels, Pixels]:
    """Cut a photograph to a multiple of the scale and degrade it, by a draw of its own; return both.

    The draw is known by the name and not by a place in a split, so that it is the same before the photographs are split, and stays when
    others are added.

    Args:
        photograph: whole, as `prepare` stores it.
        scale: HR side over LR side.
        degradation: what happens to it.
        seed: `evaluate.seed` of the recipe.
        name: of the file, without folder and suffix.

    Raises:
        BadImageError: if a side is shorter than `scale`.
    """
    height, width = (side // scale * scale for side in photograph.shape[:2])
    if not height or not width:
        raise BadImageError(f"{photograph.shape[1]}x{photograph.shape[0]} px is too small to reduce {scale} times")
    original = np.ascontiguousarray(photograph[:height, :width])
    place = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big")
    return original, degrade(original, scale, degradation, np.random.default_rng([seed, place]))
