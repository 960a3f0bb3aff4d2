"""`linearsr tracking flush`: sends to MLflow what a command could not."""

from typing import Annotated

import typer

from linearsr_platform.cli.options import Verbose
from linearsr_platform.errors import StageError


def flush(
    storage: Annotated[str, typer.Option("--storage", metavar="URL", help="Storage root of the runs.")] = "runs",
    tracking_uri: Annotated[
        str | None,
        typer.Option("--tracking-uri", metavar="URI", help="Send only what is for this MLflow store; needed if its URI has a password."),
    ] = None,
    verbose: Verbose = False,
) -> None:
    """Send what runs logged while their MLflow server was away. The next `linearsr run` of a recipe does it for that recipe by itself."""
    from linearsr_platform.cli.environment import quiet_libraries

    quiet_libraries(verbose=verbose)
    from linearsr_platform.tracking.journal import outbox_folders
    from linearsr_platform.tracking.replay import replay

    results = replay(outbox_folders(storage), uri=tracking_uri, tell=typer.echo)
    for one in results:
        refused = f", {one.refused} were refused" if one.refused else ""
        typer.echo(f"{one.uri}: {one.sent} of {one.writes} writes were sent{refused}")
        if one.away:
            typer.echo(f"  {one.away}")
    if not results:
        typer.echo(f"nothing waits under {storage}")
    left = sum(one.left for one in results)
    if left:
        raise StageError(f"tracking: {left} writes are still to be sent; they are kept; fix: run the same command again later")
