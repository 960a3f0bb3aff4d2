"""`linearsr evaluate`: measure pictures, or a model on LR pictures, under one or several protocols."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from linearsr_platform.cli.options import CodecTile, CompiledKernels, Verbose
from linearsr_platform.cli.store import existing_store
from linearsr_platform.errors import UserError

if TYPE_CHECKING:
    from linearsr_platform.data.crew import Crew
    from linearsr_platform.registry.evaluation import Evaluation, ProtocolTable
    from linearsr_platform.registry.models import ModelVersion
    from linearsr_platform.stages.measured_set import MakeMeasurer
    from linearsr_platform.stages.measuring import Measured
    from linearsr_platform.stages.pairs import PictureFiles

Model = Annotated[
    str | None,
    typer.Argument(metavar="MODEL", help="Folder of a bundle, models:/NAME@ALIAS or models:/NAME/VERSION; needs --lr.", show_default=False),
]
Restored = Annotated[Path | None, typer.Option(metavar="DIR", help="Pictures to measure, instead of a model's.", show_default=False)]
Original = Annotated[
    Path | None,
    typer.Option(metavar="DIR", help="Originals of the same names; without them no-reference metrics.", show_default=False),
]
Lr = Annotated[
    Path | None,
    typer.Option(
        metavar="DIR",
        help="LR pictures of the same names. A model is told the tags in `test_set.json` among them, which a run's evaluation writes; "
        "side files of the pictures are not read.",
        show_default=False,
    ),
]
Named = Annotated[
    str | None, typer.Option("--test-set", metavar="NAME", help="LR pictures and originals of a known set; see `linearsr test-sets list`.")
]
Root = Annotated[Path, typer.Option("--test-sets-root", metavar="DIR", help="Where `linearsr test-sets` keeps them.")]
Protocols = Annotated[
    list[str] | None,
    typer.Option("--protocol", metavar="NAME", help="classic, stablesr, seesr, osediff or quickstart; may be repeated. Default: classic."),
]
Metrics = Annotated[
    list[str] | None, typer.Option("--metric", metavar="NAME", help="Measure this; may be repeated. Default: the protocols' own.")
]
Weights = Annotated[str | None, typer.Option(metavar="DIR", help="Folder with the weights of learned metrics.", show_default=False)]
Grid = Annotated[
    int | None,
    typer.Option("--grid", metavar="PX", min=2, help="Grid of pixels on which to look for seams in --restored.", show_default=False),
]
Seed = Annotated[int | None, typer.Option(help="Seed of the model's noise; default: the test set's, or 0.", show_default=False)]
Device = Annotated[str, typer.Option(help="Where the model runs: `auto`, `cpu`, `cuda`, `cuda:1`, ...")]
TextEncoder = Annotated[
    str | None, typer.Option(metavar="DIR", help="Text encoder of a model that reads tags; default: where it was.", show_default=False)
]
Codec = Annotated[str | None, typer.Option(metavar="DIR", help="DC-AE of a model that has one; default: where it was.", show_default=False)]
Pictures = Annotated[str | None, typer.Option(metavar="DIR_OR_URL", help="Keep the model's pictures here.", show_default=False)]
Output = Annotated[
    str | None, typer.Option(metavar="FILE_OR_URL", help="Write the evaluation, image by image, as JSON.", show_default=False)
]
Attach = Annotated[bool, typer.Option("--attach", help="Store the numbers with the registered version; the gate reads them.")]
Storage = Annotated[str, typer.Option(metavar="URL", help="Storage root whose MLflow store is asked for models:/...")]
TrackingUri = Annotated[
    str | None, typer.Option(metavar="URI", help="MLflow to ask instead; default: the store under --storage.", show_default=False)
]
AsJson = Annotated[bool, typer.Option("--json", help="Write one JSON object.")]


def evaluate(
    model: Model = None,
    restored: Restored = None,
    original: Original = None,
    lr: Lr = None,
    named: Named = None,
    root: Root = Path("test-sets"),
    protocol: Protocols = None,
    metric: Metrics = None,
    weights: Weights = None,
    grid: Grid = None,
    seed: Seed = None,
    device: Device = "cpu",
    compiled_kernels: CompiledKernels = False,
    text_encoder: TextEncoder = None,
    codec: Codec = None,
    codec_tile: CodecTile = None,
    pictures: Pictures = None,
    output: Output = None,
    attach: Attach = False,
    storage: Storage = "runs",
    tracking_uri: TrackingUri = None,
    as_json: AsJson = False,
    verbose: Verbose = False,
) -> None:
    """Measure pictures, or a model on LR pictures, under each protocol side by side, with 95 % intervals."""
    _check_use(model, restored, lr, grid, codec_tile, attach=attach, named=named, original=original)
    names = _known_protocols(protocol or ["classic"])
    _check_metrics(metric or [])
    from linearsr_platform.cli.environment import prepare_for_models

    prepare_for_models(verbose=verbose)
    from linearsr_platform.registry.evaluation import Evaluation
    from linearsr_platform.stages.choosing import choose
    from linearsr_platform.stages.measured_set import MakeMeasurer
    from linearsr_platform.stages.measuring import Request
    from linearsr_platform.storage import write_text

    version, folder = _find_model(model, storage, tracking_uri)
    facts = _facts(lr)
    test_set = _test_set(restored, original, lr, facts, folder) if named is None else _named_test_set(named, root, restored, folder)
    choice = choose(names, metric or [], weights=weights, count=len(test_set.photographs), originals=test_set.has_originals)
    request = Request(metrics=choice.metrics, weights=weights, seed=facts.seed if seed is None else seed, grid_px=grid)
    make = MakeMeasurer(
        request=request,
        bundle_url=None if folder is None else str(folder),
        codec_source=codec,
        text_encoder=text_encoder,
        codec_tile=codec_tile,
        device=device,
        compiled_kernels=compiled_kernels,
        pictures_url=pictures,
    )
    tables = _tables(test_set, _measure(test_set.photographs, make), make, facts.degradation)
    # First, so that hours of measuring are not lost to a full disk or a server that is away.
    _tell(tables, choice.left_out, as_json=as_json)
    if output is not None:
        write_text(output, Evaluation(tables=tables).to_json(with_values=True) + "\n")
    if attach and version is not None:
        _attach(version, Evaluation(tables=tables), storage, tracking_uri, as_json=as_json)


def _attach(version: "ModelVersion", evaluation: "Evaluation", storage: str, tracking_uri: str | None, *, as_json: bool) -> None:
    from linearsr_platform.registry.register import attach_evaluation

    attach_evaluation(existing_store(storage, tracking_uri), version, evaluation)
    typer.echo(f"stored with {version.label}", err=as_json)


def _tell(tables: "dict[str, ProtocolTable]", left_out: Mapping[str, str], *, as_json: bool) -> None:
    if as_json:
        plain = {name: table.to_plain(with_values=True, strict=True) for name, table in tables.items()}
        typer.echo(json.dumps({"tables": plain, "left_out": left_out}, allow_nan=False))
        return
    from linearsr_platform.cli.evaluate_table import print_tables

    print_tables(tables, left_out)


@dataclass(frozen=True, kw_only=True)
class TestSet:
    """The pictures that are measured."""

    photographs: "list[PictureFiles]"
    scale: int | None
    """Output side over LR side; None where there are no LR pictures."""
    named: Mapping[str, object] = field(default_factory=dict)
    """Name and hash of the files, if it is a known one."""

    @property
    def has_originals(self) -> bool:
        """Whether every picture has an original to compare with."""
        return all("original" in photograph.files for photograph in self.photographs)


@dataclass(frozen=True, kw_only=True)
class LrFacts:
    """What is known about a folder of LR pictures, from `test_set.json` in it, which a run's `evaluate` writes."""

    degradation: object = "as given"
    seed: int = 0
    tags: Mapping[str, tuple[str, ...]]
    lr_tags: frozenset[str] = frozenset()
    """Names of those whose tags are of the LR image."""


def _test_set(restored: Path | None, original: Path | None, lr: Path | None, facts: LrFacts, bundle: Path | None) -> TestSet:
    """Return the test set in the folders that the options name, for the bundle in a folder if there is one."""
    from linearsr_platform.stages.pairs import Kind, check_sizes, match_by_name

    named: dict[Kind, Path | None] = {"restored": restored, "original": original, "lr": lr}
    photographs = match_by_name({kind: folder for kind, folder in named.items() if folder is not None}, facts.tags, facts.lr_tags)
    return TestSet(photographs=photographs, scale=check_sizes(photographs, _scale_of(bundle)))


def _named_test_set(name: str, root: Path, restored: Path | None, bundle: Path | None) -> TestSet:
    """Return a known test set as it lies under `root`, with the restored pictures of its names beside it."""
    from linearsr_platform.data.test_sets import find_test_set
    from linearsr_platform.stages.pairs import Kind, PictureFiles, check_sizes, match_by_name

    found = find_test_set(name, root)
    given = {} if restored is None else {one.name: one.files["restored"] for one in match_by_name({"restored": restored})}
    names = [pair.name for pair in found.pairs]
    if restored is not None and (odd := sorted(set(names) ^ set(given))):
        raise UserError(f"--restored: got other pictures than {found.name} has, such as {odd[0]!r}; expected one of each name")
    photographs = []
    for pair in found.pairs:
        files: dict[Kind, Path | None] = {"lr": pair.lr, "original": pair.hr, "restored": given.get(pair.name)}
        photographs.append(PictureFiles(name=pair.name, files={kind: path for kind, path in files.items() if path is not None}))
    return TestSet(
        photographs=photographs,
        scale=check_sizes(photographs, _scale_of(bundle)),
        named={"test_set_name": found.name, "test_set_files": found.sha256},
    )


def _crew(count: int) -> "Crew":
    """Return who measures that many pictures."""
    from linearsr_platform.data.crew import SerialCrew

    return SerialCrew()


def _measure(photographs: "list[PictureFiles]", make: "MakeMeasurer") -> "list[Measured]":
    """Measure with a progress display on standard error, which leaves the output to the numbers."""
    import time

    from rich.console import Console

    from linearsr_platform.cli.progress import make_display
    from linearsr_platform.stages.measured_set import measure_all, read_tags, tag_reading
    from linearsr_platform.stages.measuring import Piece
    from linearsr_platform.stages.pairs import largest_lr

    make = replace(make, largest_lr_px=largest_lr(photographs))
    reading = None if make.bundle_url is None else tag_reading(Path(make.bundle_url), make.text_encoder, make.device)

    def read(left: Sequence[Piece]) -> Mapping[str, Any]:
        return {} if reading is None else read_tags(left, reading, _crew)

    started_s = time.monotonic()
    with make_display(Console(stderr=True)) as display:
        display.stage_started("evaluate")
        display.task("evaluate", len(photographs), "pictures")
        measured = measure_all(photographs, make, _crew, lambda done, total: display.update("evaluate", done, total), read)
        display.stage_finished("evaluate", time.monotonic() - started_s, f"{len(measured)} pictures")
    return measured


def _tables(test_set: TestSet, measured: "list[Measured]", make: "MakeMeasurer", degradation: object) -> "dict[str, ProtocolTable]":
    from linearsr_platform.stages.evaluate import comparable
    from linearsr_platform.stages.measured_set import tables_of
    from linearsr_platform.stages.measuring import RESTORED, ROWS

    request = make.request
    how: dict[str, Any] = comparable(scale=test_set.scale, degradation=degradation, seed=request.seed, measured=measured)
    how |= test_set.named
    if make.codec_tile is not None:
        # With another tile it is another model: its numbers are compared with those of the same tile only.
        how["codec_tile"] = make.codec_tile
    if make.bundle_url is None:
        how |= {"seed": None, "pictures": "finished: measured as they are, without the protocol's colour fix", "grid_px": request.grid_px}
    rows = ROWS if make.bundle_url is not None else (RESTORED,)
    return tables_of([photograph.name for photograph in test_set.photographs], measured, request, rows, how)


def _find_model(model: str | None, storage: str, tracking_uri: str | None) -> "tuple[ModelVersion | None, Path | None]":
    """Return the registered version, if it is one, and the bundle's folder; what an alias names is looked up once."""
    if model is None:
        return None, None
    from linearsr_platform.registry.models import SCHEME, find_reference, resolve

    if not model.startswith(SCHEME):
        return None, resolve(model, lambda: existing_store(storage, tracking_uri))
    client = existing_store(storage, tracking_uri)
    version = find_reference(client, model)
    return version, resolve(f"{SCHEME}{version.label}", lambda: client)


def _scale_of(folder: Path | None) -> int | None:
    """Return the scale of the bundle in a folder, if there is one."""
    if folder is None:
        return None
    from linearsr.bundle import MANIFEST

    return int(json.loads((folder / MANIFEST).read_text(encoding="utf-8"))["config"]["scale"])


def _facts(lr: Path | None) -> LrFacts:
    """Read how LR pictures were made, if their folder says it.

    Raises:
        UserError: if what it says cannot be read.
    """
    from linearsr_platform.stages.evaluate import TEST_SET_FILE

    file = None if lr is None else lr / TEST_SET_FILE
    if file is None or not file.is_file():
        return LrFacts(tags={})
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
        tags = {str(name): tuple(map(str, words)) for name, words in found["tags"].items()}
        lr_tags = frozenset(map(str, found["lr_tags"])) if "lr_tags" in found else frozenset()
        return LrFacts(degradation=found["degradation"], seed=int(found["seed"]), tags=tags, lr_tags=lr_tags)
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        raise UserError(f"{file}: got something else ({error}); expected degradation, seed and tags; fix: delete it") from error


def _check_use(
    model: str | None,
    restored: Path | None,
    lr: Path | None,
    grid: int | None,
    codec_tile: int | None,
    *,
    attach: bool,
    named: str | None,
    original: Path | None,
) -> None:
    if (model is None) == (restored is None):
        got = "neither" if model is None else "both"
        raise UserError(f"evaluate: got {got}; expected MODEL with --lr DIR, or --restored DIR with pictures that are there")
    if named is not None and (lr is not None or original is not None):
        raise UserError(f"--test-set: got {named!r} beside --lr or --original; expected one of them: a known set has its own")
    if model is not None and lr is None and named is None:
        raise UserError("evaluate: got MODEL without LR pictures; expected --lr DIR or --test-set NAME")
    if codec_tile is not None and model is None:
        raise UserError("--codec-tile: got one with --restored; expected none: no DC-AE decodes pictures that are there")
    if grid is not None and model is not None:
        raise UserError("--grid: got a grid with MODEL; expected none: a model's seams are measured on its own tiles")
    if attach and (model is None or not model.startswith("models:/")):
        raise UserError(f"--attach: got {model or '--restored'}; expected a registered version, models:/NAME@ALIAS or models:/NAME/VERSION")


def _known_protocols(names: list[str]) -> tuple[str, ...]:
    from linearsr.protocols import protocol_named

    try:
        return tuple(dict.fromkeys(protocol_named(name).name for name in names))
    except ValueError as error:
        raise UserError(f"--protocol: {error}") from error


def _check_metrics(names: list[str]) -> None:
    from linearsr.metric_table import metric_spec

    for name in names:
        try:
            metric_spec(name)
        except ValueError as error:
            raise UserError(f"--metric: {error}") from error
