"""Any output size from a network with one factor: what it is given, and what is made of what it gives. Imports no torch.

The network runs once. A smaller target is reduced from its output by Lanczos; a larger one is reached by enlarging the LR picture
bicubically first, which adds no detail: the network then restores a blurred picture. Sizes are (width, height) in pixels.
"""

from dataclasses import dataclass
from math import ceil, inf

Size = tuple[int, int]


@dataclass(frozen=True, slots=True)
class Wanted:
    """The size that is asked for; without any of the three it is the network's own factor."""

    ratio: float | None = None
    """Output side over input side."""
    box: Size | None = None
    """The output is the largest that fits into it; its aspect ratio is the picture's."""
    longest: int | None = None
    """Longer side of the output."""

    def __post_init__(self) -> None:
        """Check that at most one is given, and that it is positive."""
        given = {name: value for name in ("ratio", "box", "longest") if (value := getattr(self, name)) is not None}
        if len(given) > 1:
            raise ValueError(f"size: got {', '.join(f'{name} {value}' for name, value in given.items())}; expected one of them")
        for name, value in given.items():
            if not all(0 < one < inf for one in (value if isinstance(value, tuple) else (value,))):
                raise ValueError(f"size: got {name} {value}; expected positive numbers")


@dataclass(frozen=True, slots=True)
class SizePlan:
    """The sizes on the way from a picture to what is asked for."""

    given: Size
    network_input: Size
    network_output: Size
    output: Size

    @property
    def note(self) -> str:
        """Say in words what is done besides the network; empty if nothing is."""
        words = []
        if self.network_input != self.given:
            words.append(f"enlarged bicubically to {_text(self.network_input)} first: the size is beyond the model's factor")
        if self.network_output != self.output:
            words.append(f"reduced by Lanczos from {_text(self.network_output)} to {_text(self.output)}")
        return ", ".join(words)


def plan_size(given: Size, wanted: Wanted, scale: int) -> SizePlan:
    """Return the sizes for a picture of `given` size and a network that enlarges `scale` times.

    Source: method.md 7 #14 for ratios above the network's.
    """
    ratio = float(scale)
    if wanted.ratio is not None:
        ratio = wanted.ratio
    elif wanted.longest is not None:
        ratio = wanted.longest / max(given)
    elif wanted.box is not None:
        ratio = min(wanted.box[0] / given[0], wanted.box[1] / given[1])
    output = (max(1, round(given[0] * ratio)), max(1, round(given[1] * ratio)))
    entered = given if ratio <= scale else (max(given[0], ceil(output[0] / scale)), max(given[1], ceil(output[1] / scale)))
    return SizePlan(given, entered, (entered[0] * scale, entered[1] * scale), output)


def parse_box(text: str) -> Size:
    """Read `1920x1080`.

    Raises:
        ValueError: if it is not two positive whole numbers.
    """
    parts = text.lower().split("x")
    if len(parts) != 2 or not all(part.isdecimal() and int(part) > 0 for part in parts):
        raise ValueError(f"size: got {text!r}; expected WIDTHxHEIGHT in pixels, such as 1920x1080")
    return int(parts[0]), int(parts[1])


def _text(size: Size) -> str:
    return f"{size[0]} x {size[1]}"
