"""Arguments and options that several commands share."""

from typing import Annotated

import typer

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
Verbose = Annotated[bool, typer.Option("--verbose", help="Show tracebacks and the logs of libraries.")]
