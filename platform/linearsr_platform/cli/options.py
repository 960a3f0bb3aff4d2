"""Arguments and options that several commands share."""

from collections.abc import Sequence
from difflib import get_close_matches
from typing import Annotated

import typer

from linearsr_platform.errors import UserError

RecipePath = Annotated[str, typer.Argument(metavar="RECIPE", help="The recipe, a YAML file.", show_default=False)]
Profile = Annotated[str | None, typer.Option("--profile", metavar="FILE", help="Settings of the place it runs at, merged over the recipe.")]
Overrides = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="KEY=VALUE",
        help="Set one key, as in pretrain.lr=1e-4; may be repeated, wins over the profile. A mapping {...} replaces the whole section.",
    ),
]
Update = Annotated[
    bool,
    typer.Option(
        "--update",
        help="Go on under the name of an earlier run although settings changed: what a change concerns runs again, the rest stays.",
    ),
]
CodecTile = Annotated[
    int | None,
    typer.Option(
        metavar="POSITIONS",
        min=4,
        show_default=False,
        help="Side of a DC-AE's tiles, 32 px a position; default: the model's. Smaller ones take less memory and change the picture more.",
    ),
]
CompiledKernels = Annotated[
    bool,
    typer.Option(
        "--compiled-kernels",
        help="Have CPUs compute parts of it by C++ that each machine compiles once, with `c++`: faster, the same but for rounding.",
    ),
]
Verbose = Annotated[bool, typer.Option("--verbose", help="Show tracebacks and the logs of libraries.")]


def known_stage(name: str | None, stages: Sequence[str]) -> str | None:
    """Return what `--from` names.

    Raises:
        UserError: if there is no such stage; with the nearest name.
    """
    if name is None or name in stages:
        return name
    near = get_close_matches(name, stages, 1)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    raise UserError(f"--from: got {name!r}; expected one of {', '.join(stages)}{hint}")
