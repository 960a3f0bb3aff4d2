"""`linearsr models promote, rollback, history, replace-expert`: what changes in the registry, and who changed it."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from linearsr_platform.cli.account import account_name
from linearsr_platform.cli.models import AsJson, Name, Reference, Storage, TrackingUri, open_registry
from linearsr_platform.cli.options import Overrides, Profile, Verbose
from linearsr_platform.errors import StageError, UserError

if TYPE_CHECKING:
    from linearsr_platform.recipe.promote_schema import PromoteSection
    from linearsr_platform.registry.models import ModelVersion

Challenger = Annotated[
    str, typer.Argument(metavar="MODEL", help="NAME@ALIAS or NAME/VERSION; NAME alone means its challenger.", show_default=False)
]


def promote(
    model: Challenger,
    recipe: Annotated[
        str | None,
        typer.Option(metavar="RECIPE", help="Recipe with the rules; default: those it was registered with.", show_default=False),
    ] = None,
    profile: Profile = None,
    overrides: Overrides = None,
    force: Annotated[bool, typer.Option("--force", help="Promote although a rule does not hold; goes into the history.")] = False,
    reason: Annotated[str | None, typer.Option(metavar="TEXT", help="Why, for --force.", show_default=False)] = None,
    as_json: AsJson = False,
    storage: Storage = "runs",
    tracking_uri: TrackingUri = None,
    verbose: Verbose = False,
) -> None:
    """Make a version the champion if every rule of the gate holds; shows each rule with both numbers. Exit code 1 if refused."""
    if force and not (reason or "").strip():
        raise UserError("--force: got no reason; expected why the rules do not count this time; fix: --reason TEXT")
    if reason is not None and not force:
        raise UserError("--reason: got one without --force; expected none, the rules decide; fix: add --force or leave it out")
    if recipe is None and (profile is not None or overrides):
        raise UserError("--set, --profile: got settings of no recipe; expected --recipe with them; fix: --recipe RECIPE")
    client = open_registry(storage, tracking_uri, verbose=verbose)
    from linearsr_platform.registry.models import CHALLENGER, find_reference
    from linearsr_platform.registry.promotion import promote as decide

    version = find_reference(client, model, default=CHALLENGER)
    section, whose = _rules(version, recipe, profile, overrides)
    decision = decide(client, version.name, section=section, by=account_name(), version=version.version, force_reason=reason)
    if as_json:
        typer.echo(json.dumps({"promoted": decision.promoted, **asdict(decision)}, indent=1))
    else:
        from linearsr_platform.cli.models_table import print_decision

        print_decision(version, decision, whose)
    if not decision.promoted:
        failed = sum(not rule.passed for rule in decision.rules)
        why = f"{failed} of {len(decision.rules)} rules failed" if decision.state == "refused" else decision.reason
        raise StageError(f"{decision.state}: {why}; models:/{version.name}@champion stays what it is")
    if not as_json:
        forced = " by force" if decision.forced else ""
        already = " already" if decision.state == "champion already" else ""
        typer.echo(f"models:/{version.name}@champion is version {version.version}{already}{forced}")


def rollback(
    name: Name,
    reason: Annotated[str, typer.Option(metavar="TEXT", help="Why; goes into the history.", show_default=False)] = "",
    storage: Storage = "runs",
    tracking_uri: TrackingUri = None,
    verbose: Verbose = False,
) -> None:
    """Make the previous champion the champion again; doing it twice goes back two."""
    client = open_registry(storage, tracking_uri, verbose=verbose)
    from linearsr_platform.registry.promotion import rollback as go_back

    row = go_back(client, name, by=account_name(), reason=reason)
    typer.echo(f"models:/{name}@champion is version {row.to_version} again; it was {row.from_version}")


def history(
    name: Name, as_json: AsJson = False, storage: Storage = "runs", tracking_uri: TrackingUri = None, verbose: Verbose = False
) -> None:
    """Show who made which version the champion, when and on which numbers; also who came too late."""
    client = open_registry(storage, tracking_uri, verbose=verbose)
    from linearsr_platform.registry.history import read_history

    found = read_history(client, name)
    if as_json:
        typer.echo(json.dumps([row.to_json() for row in found.rows], indent=1))
        return
    from linearsr_platform.cli.models_table import print_history

    print_history(name, found)


def replace_expert(
    model: Reference,
    expert: Annotated[int, typer.Option(min=1, metavar="N", help="Which expert, from 1, the noisiest.", show_default=False)],
    weights: Annotated[
        str,
        typer.Option(metavar="PATH", help="Its new weights: safetensors, a bundle's folder or models:/NAME@ALIAS.", show_default=False),
    ],
    storage: Storage = "runs",
    tracking_uri: TrackingUri = None,
    verbose: Verbose = False,
) -> None:
    """Register a new version with one expert replaced and the others kept; it is the challenger, and says what it is made of."""
    client = open_registry(storage, tracking_uri, verbose=verbose)
    from linearsr_platform.registry.models import CHAMPION, SCHEME, find_reference, resolve
    from linearsr_platform.registry.replace import register_replacement

    base = find_reference(client, model, default=CHAMPION)
    donor = resolve(weights, lambda: client) if weights.startswith(SCHEME) else Path(weights).expanduser()
    version = register_replacement(client, base, number=expert, donor=donor, donor_name=weights)
    typer.echo(f"{version.name} version {version.version}, alias challenger: expert {expert} replaced, the others are {base.label}'s")
    typer.echo(
        "It has no evaluation yet, so the gate refuses it until `linearsr evaluate "
        f"models:/{version.label} --lr DIR --original DIR --attach` has measured it."
    )


def _rules(version: "ModelVersion", recipe: str | None, profile: str | None, overrides: list[str] | None) -> tuple["PromoteSection", str]:
    """Return the gate's rules and whose they are."""
    from linearsr_platform.recipe.load import load_recipe
    from linearsr_platform.recipe.promote_schema import PromoteSection
    from linearsr_platform.registry.models import RULES_TAG

    if recipe is not None:
        return load_recipe(recipe, profile, overrides or []).recipe.gate, f"rules of {recipe}"
    stored = version.tags.get(RULES_TAG)
    if stored is None:
        return PromoteSection(), "the default rules, as the version brings none"
    return PromoteSection.model_validate_json(stored), f"rules that {version.label} was registered with"
