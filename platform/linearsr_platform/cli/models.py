"""`linearsr models`: what is in the registry, version by version and side by side."""

import json
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer

from linearsr_platform.cli.options import Verbose
from linearsr_platform.cli.store import existing_store

if TYPE_CHECKING:
    from mlflow import MlflowClient

Reference = Annotated[
    str, typer.Argument(metavar="MODEL", help="NAME@ALIAS or NAME/VERSION; NAME alone means its champion.", show_default=False)
]
Name = Annotated[str, typer.Argument(metavar="NAME", help="Registered model.", show_default=False)]
Storage = Annotated[str, typer.Option(metavar="URL", help="Storage root whose MLflow store is asked.")]
TrackingUri = Annotated[
    str | None, typer.Option(metavar="URI", help="MLflow to ask instead of the store under --storage.", show_default=False)
]
AsJson = Annotated[bool, typer.Option("--json", help="Write JSON.")]


def open_registry(storage: str, tracking_uri: str | None, *, verbose: bool) -> "MlflowClient":
    """Return the client of a registry that is there; MLflow's chatter is off unless `verbose`.

    Raises:
        UserError: if there is none, or it does not answer.
    """
    from linearsr_platform.cli.environment import quiet_libraries

    quiet_libraries(verbose=verbose)
    return existing_store(storage, tracking_uri)


def list_all(
    metric: Annotated[str, typer.Option(metavar="METRIC", help="Metric to show.")] = "psnr_y",
    as_json: AsJson = False,
    storage: Storage = "runs",
    tracking_uri: TrackingUri = None,
    verbose: Verbose = False,
) -> None:
    """List registered models: version, aliases, and the numbers each was released with."""
    from linearsr_platform.errors import UserError
    from linearsr_platform.registry.gate import lower_is_better
    from linearsr_platform.registry.models import list_models

    if lower_is_better(metric) is None:
        from linearsr.metric_table import metric_spec

        try:
            metric_spec(metric)
        except ValueError as error:
            raise UserError(f"--metric: {error}") from error
    found = list_models(open_registry(storage, tracking_uri, verbose=verbose))
    if as_json:
        typer.echo(json.dumps([asdict(version) for version in found], indent=1))
        return
    from linearsr_platform.cli.models_table import print_versions

    print_versions(found, metric)


def show(
    model: Reference, as_json: AsJson = False, storage: Storage = "runs", tracking_uri: TrackingUri = None, verbose: Verbose = False
) -> None:
    """Show one version: its numbers, its experts with their knees and hashes, and what it was made from."""
    from linearsr_platform.registry.models import CHAMPION, find_reference

    client = open_registry(storage, tracking_uri, verbose=verbose)
    version = find_reference(client, model, default=CHAMPION)
    if not as_json:
        from linearsr_platform.cli.models_table import print_version

        print_version(version)
        return
    from linearsr_platform.registry.models import read_evaluation

    evaluation = read_evaluation(client, version)
    tables = {} if evaluation is None else {name: asdict(table) for name, table in evaluation.tables.items()}
    typer.echo(json.dumps({**asdict(version), "evaluation": tables}, indent=1))


def compare(
    first: Reference,
    second: Reference,
    as_json: AsJson = False,
    storage: Storage = "runs",
    tracking_uri: TrackingUri = None,
    verbose: Verbose = False,
) -> None:
    """Compare two versions: each metric image by image with a 95 % interval, and which experts, boundaries and data differ."""
    from linearsr_platform.registry.compare import compare as differences
    from linearsr_platform.registry.models import CHAMPION, find_reference

    client = open_registry(storage, tracking_uri, verbose=verbose)
    versions = [find_reference(client, model, default=CHAMPION) for model in (first, second)]
    found = differences(client, *versions)
    if as_json:
        typer.echo(json.dumps({"first": versions[0].label, "second": versions[1].label, **asdict(found)}, indent=1))
        return
    from linearsr_platform.cli.models_table import print_comparison

    print_comparison(versions[0], versions[1], found)
