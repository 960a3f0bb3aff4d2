"""`linearsr boundaries`: where to cut the noise axis into experts, before anything is trained."""

import json
from math import isfinite
from typing import TYPE_CHECKING, Annotated

import typer

from linearsr_platform.cli.options import Verbose
from linearsr_platform.errors import UserError

if TYPE_CHECKING:
    from rich.console import Console

    from linearsr.noise_profile import NoiseProfile
    from linearsr.partition import CutGrid, Proposal

COUNTS = range(1, 7)
"""Numbers of experts whose least conflict is told."""

ProfilePath = Annotated[
    str | None,
    typer.Argument(
        metavar="PROFILE.json", help="A profile of a trained network; path or URL. Adds proposals that need one.", show_default=False
    ),
]


def boundaries(
    profile: ProfilePath = None,
    experts: Annotated[int, typer.Option(metavar="K", help="Number of experts.")] = 4,
    min_width: Annotated[float, typer.Option(metavar="WIDTH", help="Least width of an expert, in log-SNR.")] = 0.5,
    step: Annotated[float, typer.Option(metavar="STEP", help="Spacing of the places a search may cut at, in log-SNR.")] = 0.25,
    plot: Annotated[str | None, typer.Option(metavar="OUT.png", help="Draw the profile and the proposals.", show_default=False)] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Write one JSON object.")] = False,
    verbose: Verbose = False,
) -> None:
    """Propose boundaries between experts without training anything: the paper's, uniform ones, and those a network's gradients suggest."""
    from linearsr.partition import CutGrid, propose
    from linearsr_platform.cli.environment import quiet_libraries

    if plot is not None and not plot.lower().endswith(".png"):
        raise UserError(f"--plot: got {plot!r}; expected a name that ends in .png; fix: --plot profile.png")
    if plot is not None and profile is None:
        raise UserError("--plot: got no profile; expected one to draw; fix: name a PROFILE.json, or leave --plot out")
    for name, value in (("--min-width", min_width), ("--step", step)):
        if not (isfinite(value) and value > 0):
            raise UserError(f"{name}: got {value}; expected a number above 0; fix: {name} 0.5")
    quiet_libraries(verbose=verbose)
    known = None if profile is None else _read(profile)
    try:
        grid = CutGrid(step=step, min_width=min_width)
        proposals = propose(experts, profile=known, grid=grid)
    except ValueError as error:
        raise UserError(str(error)) from error
    if plot is not None and known is not None:
        from linearsr_platform.report.search_plots import plot_profile

        plot_profile(known, proposals, plot)
    if as_json:
        typer.echo(json.dumps(_as_json(experts, proposals, known, grid), allow_nan=False))
    else:
        _tell(experts, proposals, known, grid)


def _read(url: str) -> "NoiseProfile":
    from linearsr.noise_profile import NoiseProfile
    from linearsr_platform import storage

    try:
        return NoiseProfile.from_json(json.loads(storage.read_text(url)))
    except FileNotFoundError as error:
        raise UserError(f"{url}: there is no such file; expected a profile.json; fix: check the path") from error
    except (IsADirectoryError, NotADirectoryError, PermissionError) as error:
        raise UserError(f"{url}: got {error.strerror}; expected a profile.json that can be read; fix: check the path") from error
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise UserError(f"{url}: got {error}; expected a profile.json as a profiling run writes it; fix: check the path") from error
    except ValueError as error:
        raise UserError(f"{url}: {error}") from error


def _draws(profile: "NoiseProfile", cuts: tuple[float, ...]) -> list[float]:
    """Return the share of training draws of each expert, noisiest first; a level that a cut divides counts by width."""
    import numpy as np

    below = np.interp([*sorted(cuts)], profile.edges, np.concatenate([[0.0], np.cumsum(profile.mass)]))
    return [float(share) for share in np.diff([0.0, *below, 1.0])]


def _least_conflicts(profile: "NoiseProfile", grid: "CutGrid") -> dict[int, float]:
    """Return for each number of experts that fits the least conflict that is left inside them."""
    from linearsr.partition import conflict, least_conflict

    found = {}
    for count in COUNTS:
        try:
            grid.slack(count)
            found[count] = conflict(profile, least_conflict(profile, count, grid.min_width))
        except ValueError:
            # More do not fit either.
            break
    return found


def _as_json(experts: int, proposals: "list[Proposal]", profile: "NoiseProfile | None", grid: "CutGrid") -> dict[str, object]:
    from linearsr.experts import intervals, log_snr
    from linearsr.partition import conflict

    told = []
    for proposal in proposals:
        cuts = tuple(log_snr(t) for t in proposal.boundaries)
        told.append(
            {
                "name": proposal.name,
                "boundaries": list(proposal.boundaries),
                "log_snr": list(cuts),
                "intervals": [list(interval) for interval in intervals(proposal.boundaries)],
                "draws": None if profile is None else _draws(profile, cuts),
                "conflict": None if profile is None else conflict(profile, proposal.boundaries),
                "note": proposal.note,
            }
        )
    least = None if profile is None else {str(count): value for count, value in _least_conflicts(profile, grid).items()}
    return {"experts": experts, "proposals": told, "least_conflict": least}


def _tell(experts: int, proposals: "list[Proposal]", profile: "NoiseProfile | None", grid: "CutGrid") -> None:
    """Write the answer for people."""
    from rich.text import Text

    from linearsr_platform.cli.search_table import output_console

    console = output_console()
    for proposal in proposals:
        _tell_proposal(console, proposal, profile)
    if profile is None:
        console.print(
            Text("With the profile of a trained network: equal-loss and least-conflict too, and the share of training draws."),
            soft_wrap=True,
        )
    else:
        _tell_counts(console, profile, grid)


def _tell_proposal(console: "Console", proposal: "Proposal", profile: "NoiseProfile | None") -> None:
    """Write one proposal: its boundaries, and what each expert would own."""
    from rich.padding import Padding
    from rich.table import Column, Table
    from rich.text import Text

    from linearsr.experts import intervals, log_snr

    fragment = f"boundaries: [{', '.join(f'{t:.4g}' for t in proposal.boundaries)}]"
    console.print(Text.assemble((proposal.name, "bold"), f"  {fragment}"), soft_wrap=True)
    if proposal.note:
        console.print(Padding(Text(proposal.note, style="dim"), (0, 0, 0, 2)))
    table = Table("", "", "", Column(justify="right"), box=None, show_header=False, padding=(0, 3, 0, 0), pad_edge=False)
    draws = [] if profile is None else _draws(profile, tuple(log_snr(t) for t in proposal.boundaries))
    for index, (low, high) in enumerate(intervals(proposal.boundaries)):
        share = [f"{draws[index]:.1%} of training draws"] if draws else []
        table.add_row(f"  expert {index + 1}", f"t {low:.3f} to {high:.3f}", f"log-SNR {_range(log_snr(high), log_snr(low))}", *share)
    console.print(table)
    console.print()


def _range(low: float, high: float) -> str:
    if isfinite(low) and isfinite(high):
        return f"{low:.2f} to {high:.2f}"
    return f"below {high:.2f}" if isfinite(high) else f"above {low:.2f}" if isfinite(low) else "all"


def _tell_counts(console: "Console", profile: "NoiseProfile", grid: "CutGrid") -> None:
    """Write how much conflict is left at best for each number of experts."""
    from rich.table import Column, Table
    from rich.text import Text

    least = _least_conflicts(profile, grid)
    columns = [Column(str(count), justify="right") for count in least]
    table = Table("how many experts", *columns, box=None, padding=(0, 2, 0, 0), pad_edge=False, header_style="bold")
    table.add_row("least conflict left", *(f"{value:.0%}" for value in least.values()))
    console.print(table)
    console.print(Text("It falls with every expert, by chance too: what counts is where it stops falling fast."), soft_wrap=True)
