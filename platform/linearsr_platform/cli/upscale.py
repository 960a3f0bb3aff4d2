"""`linearsr upscale`: image files to larger image files, with a bundle or a registered model, here or on a Ray cluster."""

import json
import math
from typing import TYPE_CHECKING, Annotated

import typer

from linearsr_platform.cli.options import CodecTile, CompiledKernels, Verbose
from linearsr_platform.cli.store import existing_store
from linearsr_platform.errors import StageError, UserError

if TYPE_CHECKING:
    from linearsr.bundle import Bundle
    from linearsr.enlarge import Enlargement
    from linearsr_platform.cli.upscale_where import Here, Pool
    from linearsr_platform.stages.picture_work import Work
    from linearsr_platform.stages.upscaling import Outcome

Source = Annotated[
    str,
    typer.Argument(metavar="IN", help="An image, a folder, a glob or a WebDataset shard (.tar); a path or a URL.", show_default=False),
]
Target = Annotated[
    str | None,
    typer.Argument(metavar="OUT", help="File, folder or shard to write, path or URL; a suffix sets the format.", show_default=False),
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
Threads = Annotated[
    int | None, typer.Option(min=1, help="Threads of a process; a worker has 1 unless told, and as many CPUs.", show_default=False)
]
WORKERS = "Workers (Ray)"
Address = Annotated[
    str | None,
    typer.Option(
        metavar="ADDRESS", rich_help_panel=WORKERS, show_default=False,
        help="Spread files over workers of this Ray cluster. MODEL is sent to them; other paths are paths of its machines.",
    ),
]  # fmt: skip
Workers = Annotated[
    int | None,
    typer.Option(
        metavar="N", min=1, rich_help_panel=WORKERS, show_default=False,
        help="So many workers on this machine; with --address at most so many of the cluster, which by default are all that fit.",
    ),
]  # fmt: skip
Gpus = Annotated[float, typer.Option("--gpus-per-worker", min=0, rich_help_panel=WORKERS, help="GPUs that a worker reserves.")]
Secrets = Annotated[
    list[str] | None,
    typer.Option(
        "--secret", metavar="NAME=REFERENCE", rich_help_panel=WORKERS, show_default=False,
        help="Environment variable by where every machine finds its value: env:NAME or file:PATH; may be repeated.",
    ),
]  # fmt: skip


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
    codec_tile: CodecTile = None,
    seed: Seed = 0,
    device: Device = "auto",
    memory: Memory = None,
    tile: Tile = None,
    residency: Experts = "auto",
    overwrite: Overwrite = False,
    plan: Plan = False,
    timings: Timings = False,
    as_json: AsJson = False,
    threads: Threads = None,
    compiled_kernels: CompiledKernels = False,
    address: Address = None,
    workers: Workers = None,
    gpus_per_worker: Gpus = 0.0,
    secrets: Secrets = None,
    verbose: Verbose = False,
) -> None:
    """Enlarge an image, or every image of a folder, a glob or a shard. Interrupted, the same command does the rest."""
    _check_choices(target, plan=plan, estimate=estimate, colour_fix=colour_fix, residency=residency, memory=memory)
    from linearsr_platform.cli.environment import prepare_for_models

    prepare_for_models(verbose=verbose)
    from linearsr_platform.cli.upscale_where import Asked, Here, Spread, show
    from linearsr_platform.stages.picture_work import find_work

    pool = Spread(address, workers, threads or 1, gpus_per_worker, tuple(secrets or ()), verbose)
    pool.refuse_alone() if pool.alone else pool.prepare(plan=plan, timings=timings)
    work = find_work(source, target)
    asked = Asked(
        open=lambda at, encoder: load(model, storage, tracking_uri, codec=at, text_encoder=encoder, codec_tile=codec_tile),
        codec=codec,
        text_encoder=text_encoder,
        request=_request(scale, size, longest, steps=steps, estimate=estimate, colour_fix=colour_fix, tags=tags, seed=seed),
        device=device,
        memory_gb=memory,
        residency=None if residency == "auto" else residency,  # type: ignore[arg-type]
        tile=tile,
        codec_tile=codec_tile,
        compiled_kernels=compiled_kernels,
    )
    place = Here(asked, threads, plan=plan, measured=timings or as_json) if pool.alone else pool.over(asked, work)
    outcomes = show(work, place.do, skip=not (overwrite or plan), as_json=as_json)
    _report(outcomes, place, timings=timings and not plan, as_json=as_json)
    _raise_failures(outcomes, work)


def load(
    model: str,
    storage_root: str,
    tracking_uri: str | None,
    *,
    text_encoder: str | None = None,
    codec: str | None = None,
    codec_tile: int | None = None,
) -> "Bundle":
    """Return the bundle that `model` names, checked against its hashes, with text encoder and DC-AE where they are here."""
    from linearsr_platform.registry.models import resolve
    from linearsr_platform.stages.upscaling import open_bundle

    return open_bundle(resolve(model, lambda: existing_store(storage_root, tracking_uri)), codec, text_encoder, codec_tile)


def _check_choices(target: str | None, *, plan: bool, estimate: str, colour_fix: str, residency: str, memory: float | None) -> None:
    if memory is not None and not 0 < memory < math.inf:
        raise UserError(f"--memory: got {memory}; expected gigabytes above 0")
    _check("--estimate", estimate, ("routed", "one_step"))
    _check("--colour-fix", colour_fix, ("wavelet", "adain", "none"))
    _check("--residency", residency, ("auto", "all", "one"))
    if target is None and not plan:
        raise UserError("upscale: got no OUT; expected a file or folder to write; fix: name it, or say --plan")


def _check(option: str, value: str, known: tuple[str, ...]) -> None:
    if value not in known:
        raise UserError(f"{option}: got {value!r}; expected {', '.join(known[:-1])} or {known[-1]}")


def _request(
    scale: float | None,
    size: str | None,
    longest: int | None,
    *,
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


def _report(outcomes: "list[Outcome]", place: "Here | Pool", *, timings: bool, as_json: bool) -> None:
    if as_json:
        typer.echo(json.dumps({"pictures": [outcome.as_json() for outcome in outcomes], **place.timings()}, allow_nan=False))
    elif timings:
        typer.echo(place.timing_table())


def _raise_failures(outcomes: "list[Outcome]", work: "Work") -> None:
    from linearsr_platform.stages.upscaling import failures

    failed = failures(outcomes)
    if failed and work.single and len(outcomes) == 1:
        raise UserError(failed[0])
    if failed:
        raise StageError("\n".join([f"{len(failed)} of {len(outcomes)} failed", *failed]))
