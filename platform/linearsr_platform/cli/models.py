"""`linearsr models` and `linearsr promote`: the registry from the command line."""

import getpass
from typing import Annotated

import typer

from linearsr_platform.cli.options import Verbose
from linearsr_platform.cli.store import existing_store
from linearsr_platform.errors import StageError

Name = Annotated[str, typer.Argument(metavar="NAME", help="Registered model.", show_default=False)]
Storage = Annotated[str, typer.Option(metavar="URL", help="Storage root whose MLflow store is asked.")]
TrackingUri = Annotated[
    str | None, typer.Option(metavar="URI", help="MLflow to ask instead of the store under --storage.", show_default=False)
]


def models(storage: Storage = "runs", tracking_uri: TrackingUri = None, verbose: Verbose = False) -> None:
    """List registered models: version, aliases, and the numbers each was released with."""
    from rich.console import Console
    from rich.table import Column, Table

    from linearsr_platform.cli.environment import quiet_libraries

    quiet_libraries(verbose=verbose)
    from linearsr_platform.registry.models import list_models

    columns = (Column("model", no_wrap=True), "version", "aliases", "one step", "routed", "bicubic")
    table = Table(*columns, caption="PSNR-Y in dB of the evaluation each version was registered with")
    for found in list_models(existing_store(storage, tracking_uri)):
        rows = found.evaluation.rows if found.evaluation else {}
        numbers = [f"{rows[row]['psnr_y']:.2f}" if "psnr_y" in rows.get(row, {}) else "-" for row in ("one_step", "routed", "bicubic")]
        table.add_row(found.name, str(found.version), ", ".join(found.aliases), *numbers)
    Console().print(table if table.row_count else "no registered models")


def promote(
    name: Name,
    metric: Annotated[str, typer.Option(help="Metric of the stored evaluations that decides.")] = "psnr_y",
    estimate: Annotated[str, typer.Option(help="`one_step` or `routed`.")] = "one_step",
    tolerance: Annotated[float, typer.Option(min=0, help="How much worse than the champion is still promoted.")] = 0.0,
    storage: Storage = "runs",
    tracking_uri: TrackingUri = None,
    verbose: Verbose = False,
) -> None:
    """Make a model's challenger its champion, unless it is worse; says which number decided. Exit code 1 if refused."""
    from linearsr.metric_table import metric_spec
    from linearsr_platform.cli.environment import quiet_libraries
    from linearsr_platform.errors import UserError
    from linearsr_platform.recipe.schema import PromoteSection

    quiet_libraries(verbose=verbose)
    if estimate not in ("one_step", "routed"):
        raise UserError(f"--estimate: got {estimate!r}; expected one_step or routed")
    try:
        metric_spec(metric)
    except ValueError as error:
        raise UserError(f"--metric: {error}") from error
    from linearsr_platform.registry.promotion import promote as decide

    rule = PromoteSection.model_validate({"metric": metric, "estimate": estimate, "tolerance": tolerance})
    decision = decide(existing_store(storage, tracking_uri), name, rule=rule, by=getpass.getuser())
    if not decision.promoted:
        raise StageError(f"refused: {decision.reason}")
    typer.echo(f"models:/{name}@champion is version {decision.challenger_version}: {decision.reason}")
