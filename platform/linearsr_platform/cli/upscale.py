"""`linearsr upscale`: image files to larger image files, with a bundle or a registered model."""

import json
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from linearsr_platform.cli.options import Verbose
from linearsr_platform.cli.store import existing_store
from linearsr_platform.errors import StageError, UserError

if TYPE_CHECKING:
    from linearsr.bundle import Bundle
    from linearsr.enlarge import Enlargement
    from linearsr_platform.cli.upscale_jobs import Work
    from linearsr_platform.cli.upscale_run import Machine, Outcome, UpscaleRun

Source = Annotated[
    Path, typer.Argument(metavar="IN", help="An image, a folder of them, a glob, or a WebDataset shard (.tar).", show_default=False)
]
Target = Annotated[
    Path | None,
    typer.Argument(metavar="OUT", help="File, folder or shard to write; a file's suffix sets its format.", show_default=False),
]
Model = Annotated[
    str, typer.Option(metavar="MODEL", help="Folder of a bundle, models:/NAME@ALIAS or models:/NAME/VERSION.", show_default=False)
]
Storage = Annotated[str, typer.Option(metavar="URL", help="Storage root whose MLflow store is asked for models:/...")]
TrackingUri = Annotated[
    str | None, typer.Option(metavar="URI", help="MLflow to ask instead; default: the store under --storage.", show_default=False)
]
Scale = Annotated[float | None, typer.Option(metavar="RATIO", help="Output side over input; default: the model's.", show_default=False)]
Size = Annotated[str | None, typer.Option(metavar="WxH", help="Largest output that fits, such as 1920x1080.", show_default=False)]
Longest = Annotated[int | None, typer.Option(metavar="PX", min=1, help="Longer side of the output.", show_default=False)]
Steps = Annotated[int | None, typer.Option(min=1, help="Sampler steps; default: the model's own.", show_default=False)]
Method = Annotated[str, typer.Option(help="`routed` samples through all experts, `one_step` runs the network once.")]
Colour = Annotated[str, typer.Option("--colour-fix", "--color-fix", help="Take colours from the input: wavelet, adain or none.")]
Tags = Annotated[str, typer.Option(help="Comma-separated words for what is in the picture.")]
TextEncoder = Annotated[
    str | None, typer.Option(metavar="DIR", help="Text encoder of a model that reads tags; default: where it was.", show_default=False)
]
Codec = Annotated[str | None, typer.Option(metavar="DIR", help="DC-AE of a model that has one; default: where it was.", show_default=False)]
Seed = Annotated[int, typer.Option(help="Seed of the initial noise; the same seed gives the same picture.")]
Device = Annotated[str, typer.Option(help="`cpu`, `cuda`, `cuda:1`, ...; `auto` is CUDA where there is one.")]
Memory = Annotated[float | None, typer.Option(metavar="GB", help="Memory to use; default: most of what is free.", show_default=False)]
Tile = Annotated[int | None, typer.Option(metavar="TOKENS", min=2, help="Side of a tile; default: by memory.", show_default=False)]
Experts = Annotated[str, typer.Option(help="Experts kept on the device: `all`, `one` at a time, or `auto` by memory.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace files that exist; else they are kept and skipped.")]
Plan = Annotated[bool, typer.Option("--plan", help="Say sizes, tokens, tiles and memory, and do nothing.")]
Timings = Annotated[bool, typer.Option("--timings", help="Show where the time goes, part by part.")]
AsJson = Annotated[bool, typer.Option("--json", help="Write one JSON object.")]


def upscale(
    source: Source,
    model: Model,
    target: Target = None,
    storage: Storage = "runs",
    tracking_uri: TrackingUri = None,
    scale: Scale = None,
    size: Size = None,
    longest: Longest = None,
    steps: Steps = None,
    estimate: Method = "routed",
    colour_fix: Colour = "none",
    tags: Tags = "",
    text_encoder: TextEncoder = None,
    codec: Codec = None,
    seed: Seed = 0,
    device: Device = "auto",
    memory: Memory = None,
    tile: Tile = None,
    residency: Experts = "auto",
    overwrite: Overwrite = False,
    plan: Plan = False,
    timings: Timings = False,
    as_json: AsJson = False,
    verbose: Verbose = False,
) -> None:
    """Enlarge an image, or every image of a folder, a glob or a shard."""
    _check("--estimate", estimate, ("routed", "one_step"))
    _check("--colour-fix", colour_fix, ("wavelet", "adain", "none"))
    _check("--residency", residency, ("auto", "all", "one"))
    if target is None and not plan:
        raise UserError("upscale: got no OUT; expected a file or folder to write; fix: name it, or say --plan")
    from linearsr_platform.cli.environment import quiet_libraries, tell_warnings

    quiet_libraries(verbose=verbose)
    from linearsr.schedule import UnvisitedExpertWarning
    from linearsr.timing import Stopwatch
    from linearsr_platform.cli.upscale_jobs import find_work
    from linearsr_platform.cli.upscale_run import UpscaleRun, failures, timing_table, timings_as_json

    tell_warnings(UnvisitedExpertWarning)
    work = find_work(source, target)
    request = _request(scale=scale, size=size, longest=longest, steps=steps, estimate=estimate, colour_fix=colour_fix, tags=tags, seed=seed)
    machine = _machine(device, memory, residency, tile)
    watch = Stopwatch(machine.device, enabled=timings or as_json)
    with watch.section("load"):
        bundle = load(model, storage, tracking_uri, text_encoder=text_encoder, codec=codec)
    run = UpscaleRun(bundle, request, machine, watch)
    outcomes = _show(run, work, plan=plan, overwrite=overwrite, as_json=as_json)
    failed = failures(outcomes)
    if as_json:
        facts = {"pictures": [outcome.as_json() for outcome in outcomes], "timings": timings_as_json(watch)}
        typer.echo(json.dumps(facts, allow_nan=False))
    elif timings and not plan:
        typer.echo(timing_table(watch))
    if failed:
        if work.single and len(outcomes) == 1:
            raise UserError(failed[0])
        raise StageError("\n".join([f"{len(failed)} of {len(outcomes)} failed", *failed]))


def load(model: str, storage_root: str, tracking_uri: str | None, *, text_encoder: str | None = None, codec: str | None = None) -> "Bundle":
    """Return the bundle that `model` names, checked against its hashes, with text encoder and DC-AE where they are here."""
    from linearsr.bundle import BundleError, load_bundle, with_text_encoder
    from linearsr_platform.registry.models import resolve

    folder = resolve(model, lambda: existing_store(storage_root, tracking_uri))
    try:
        bundle = load_bundle(folder, codec_source=codec)
        return bundle if text_encoder is None else with_text_encoder(bundle, text_encoder)
    except BundleError as error:
        raise UserError(str(error)) from error


def _check(option: str, value: str, known: tuple[str, ...]) -> None:
    if value not in known:
        raise UserError(f"{option}: got {value!r}; expected {', '.join(known[:-1])} or {known[-1]}")


def _request(
    *,
    scale: float | None,
    size: str | None,
    longest: int | None,
    steps: int | None,
    estimate: str,
    colour_fix: str,
    tags: str,
    seed: int,
) -> "Enlargement":
    """Turn options into what is asked of every picture."""
    from linearsr.enlarge import Enlargement
    from linearsr.sizing import Wanted, parse_box

    try:
        wanted = Wanted(ratio=scale, box=None if size is None else parse_box(size), longest=longest)
    except ValueError as error:
        raise UserError(f"{error}; fix: give one of --scale, --size and --longest") from error
    words = tuple(word.strip() for word in tags.split(",") if word.strip())
    return Enlargement(wanted=wanted, tags=words, seed=seed, steps=steps, estimate=estimate, colour_fix=colour_fix)  # type: ignore[arg-type]


def _machine(device: str, memory_gb: float | None, residency: str, tile: int | None) -> "Machine":
    """Turn options into where it runs."""
    import torch

    from linearsr_platform.cli.upscale_run import Machine, usable_memory

    try:
        chosen = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device)
    except RuntimeError as error:
        raise UserError(f"--device: got {device!r}; expected auto, cpu or cuda") from error
    if chosen.type not in ("cpu", "cuda") or (chosen.type == "cuda" and not torch.cuda.is_available()):
        raise UserError(f"--device: got {device!r}; expected a device of this machine; fix: --device cpu")
    if memory_gb is not None and memory_gb <= 0:
        raise UserError(f"--memory: got {memory_gb}; expected gigabytes above 0")
    kept = None if residency == "auto" else residency
    return Machine(chosen, usable_memory(chosen, memory_gb), kept, tile)  # type: ignore[arg-type]


def _show(run: "UpscaleRun", work: "Work", *, plan: bool, overwrite: bool, as_json: bool) -> "list[Outcome]":
    """Go through the jobs with a progress display; in the way of JSON on standard output nothing else is written there."""
    from rich.console import Console

    from linearsr_platform.cli.progress import make_display
    from linearsr_platform.cli.upscale_run import Outcome

    outcomes: list[Outcome] = []
    started_s = time.monotonic()
    with make_display(Console(stderr=True) if as_json else None) as display:
        display.stage_started("upscale")
        display.task("upscale", len(work.jobs), "files")
        for done, job in enumerate(work.jobs, start=1):
            if plan:
                made = run.plan(job)
            elif job.target.exists() and not overwrite:
                made = [Outcome(str(job.source), str(job.target), "skipped")]
            else:
                made = run.enlarge(job)
            outcomes += made
            for line in (line for outcome in made if outcome.status != "failed" for line in outcome.lines()):
                display.message(line)
            display.update("upscale", done, len(work.jobs))
        counts = {status: sum(one.status == status for one in outcomes) for status in ("done", "planned", "skipped", "failed")}
        said = ", ".join(f"{count} {status}" for status, count in counts.items() if count)
        display.stage_finished("upscale", time.monotonic() - started_s, said)
    return outcomes
