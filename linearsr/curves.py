"""Curves of anybody's training run: which way each metric is better, and the CSV files they come in. Imports no torch."""

import csv
import difflib
import io
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import inf

from linearsr.config import MIN_POINTS
from linearsr.metric_table import METRICS

Points = list[tuple[int, dict[str, float]]]

_HIGHER = """
    ahiq arniqa arniqa-clive arniqa-csiq arniqa-flive arniqa-kadid arniqa-live arniqa-spaq arniqa-tid ckdn clipiqa clipiqa+
    clipiqa+_rn50_512 clipiqa+_vitl14_512 clipscore cnniqa compare2score cw_ssim dbcnn dmm entropy fgresq fgresq_pair fsim hyperiqa
    inception_score laion_aes liqe liqe_mix maclip maniqa maniqa-kadid maniqa-pipal metaiqa ms_ssim musiq musiq-ava musiq-paq2piq
    musiq-spaq nima nima-koniq nima-spaq nima-vgg16-ava nrqm paq2piq psnr psnry qalign qalign_4bit qalign_8bit qrealign qrealign-lite
    qrealign-mini qrealign-pro qualiclip qualiclip+ qualiclip+-clive qualiclip+-flive qualiclip+-spaq ssim ssimc topiq topiq_fr
    topiq_fr-pipal topiq_iaa topiq_iaa_res50 topiq_nr topiq_nr-face topiq_nr-face-v1 topiq_nr-flive topiq_nr-spaq topiq_nr_swin-face
    tres tres-flive unique uranker vif vsi wadiqam_fr wadiqam_nr
    acc accuracy auc bleu dice f1 iou map miou rouge top1 top5
"""
_LOWER = """
    afine_all afine_all_scale afine_fr afine_nr brisque brisque_matlab deepdc dists fid fid_dinov2 gmsd ilniqe lpips lpips+ lpips-vgg
    lpips-vgg+ mad msswd niqe niqe_matlab nlpd pi pieapp piqe sfid stlpips stlpips-vgg
    cer error kid loss mae mse nll perplexity rmse val_loss wer
"""
HIGHER_IS_BETTER: dict[str, bool] = {
    **dict.fromkeys(_HIGHER.split(), True),
    **dict.fromkeys(_LOWER.split(), False),
    **{name: spec.higher_is_better for name, spec in METRICS.items()},
}
"""Whether a higher value is better, for every metric of this package and of pyiqa, and for what other trainers commonly log."""

_SPLIT_PREFIX = re.compile(r"(?:val|valid|validation|eval|test)_")
_DECLARATION = "NAME:higher or NAME:lower"


@dataclass(frozen=True, slots=True)
class Curves:
    """The evaluations of a run, as `linearsr.knee` takes them."""

    points: Points
    """(step, values) in ascending order of steps, each with a value; what is missing is left out; values may be infinite or NaN."""
    orientations: dict[str, bool]
    """Each metric, and whether a higher value is better."""


def orientation_of(name: str) -> bool | None:
    """Return whether a higher value of a metric is better, or None if that is not known.

    Case does not matter; `validation/psnr_y`, `val_psnr-y` and `PSNR_Y` are one metric. What `train` stands before is not known:
    a metric of the training data goes on improving whatever happens to the network.
    """
    *path, last = name.strip().lower().split("/")
    if any(part.startswith("train") for part in path):
        return None
    bare = _SPLIT_PREFIX.sub("", last, count=1)
    spellings = (last, last.replace("-", "_"), bare, bare.replace("-", "_"))
    return next((HIGHER_IS_BETTER[spelling] for spelling in spellings if spelling in HIGHER_IS_BETTER), None)


def parse_declarations(declarations: Iterable[str]) -> dict[str, bool]:
    """Read `NAME:higher`, `NAME:lower`, or `NAME` alone where its orientation is known.

    Raises:
        ValueError: if one is none of these, or a name comes twice.
    """
    declared: dict[str, bool] = {}
    for declaration in declarations:
        name, colon, word = (part.strip() for part in declaration.rpartition(":"))
        if not colon:
            name = word
        if not name or (colon and word not in ("higher", "lower")):
            raise ValueError(f"--metric: got {declaration!r}; expected {_DECLARATION}; fix: say which way {name or 'the metric'} is better")
        if name in declared:
            raise ValueError(f"--metric: got {name} twice; expected each metric once; fix: leave one out")
        higher = word == "higher" if colon else orientation_of(name)
        if higher is None:
            raise ValueError(_unknown("--metric", name))
        declared[name] = higher
    return declared


def choose_metrics(available: Sequence[str], declared: Mapping[str, bool], where: str) -> dict[str, bool]:
    """Return the orientation of each metric to use: the declared ones, or without any all that are available.

    A declared name may leave out the path before it: `psnr_y` finds `validation/psnr_y` where it is the only one that ends so.

    Args:
        available: names in the file or the run.
        declared: what `parse_declarations` returned.
        where: what to call their place in an error.

    Raises:
        ValueError: if a declared metric is absent or ambiguous, or an available one has no known orientation and nothing is declared.
    """
    if declared:
        return {_find(name, available, where): higher for name, higher in declared.items()}
    chosen: dict[str, bool] = {}
    for name in available:
        higher = orientation_of(name)
        if higher is None:
            raise ValueError(_unknown(where, name))
        chosen[name] = higher
    if not chosen:
        raise ValueError(f"{where}: got no metric; expected a column for each metric beside `step`; fix: add one, such as psnr_y")
    return chosen


def parse_csv(text: str, where: str, declared: Mapping[str, bool]) -> Curves:
    """Read a table with a column `step` and one for each metric.

    Comma, semicolon and tab separate; an empty cell is a missing value, `nan` and `inf` are kept as such. Rows without any value
    of a chosen metric are passed over, so trainers that write training and validation to different rows are understood.

    Args:
        text: the file, decoded.
        where: its name in errors, which also give the line.
        declared: metrics to use, with their orientation; none: every column but `step`, all of which must be known.

    Raises:
        ValueError: if there is no column `step`, a column comes twice, a metric is unknown or absent or has no value, a cell is not a
            number, steps do not ascend, or there are fewer than `MIN_POINTS` evaluations.
    """
    try:
        rows = list(_rows(text.removeprefix("\ufeff")))
    except csv.Error as error:
        raise ValueError(f"{where}: got what is no table ({error}); expected comma-separated values; fix: save it as CSV") from error
    if not rows:
        raise ValueError(f"{where}: got an empty file; expected a header with `step` and a column for each metric; fix: write one")
    (_, header), *body = rows
    columns = _columns(header, where)
    step_column = _step_column(list(columns), where)
    step_index = columns.pop(step_column)
    orientations = choose_metrics(list(columns), declared, where)
    indices = {name: columns[name] for name in orientations}
    points: Points = []
    for line, cells in body:
        at = f"{where}:{line}"
        if any(cells[len(header) :]):
            raise ValueError(
                f"{at}: got {len(cells)} cells; expected {len(header)} as in the header; fix: quote cells that hold a delimiter"
            )
        values = {name: _number(cells[i], at, name) for name, i in indices.items() if i < len(cells) and cells[i]}
        if not values:
            continue
        step = _step(cells[step_index] if step_index < len(cells) else "", at)
        if points and step <= points[-1][0]:
            raise ValueError(f"{at}: got step {step} after {points[-1][0]}; expected ascending steps; fix: sort the rows, one a step")
        points.append((step, values))
    return checked_curves(points, orientations, where)


def checked_curves(points: Points, orientations: dict[str, bool], where: str) -> Curves:
    """Return curves that something can be said about.

    Raises:
        ValueError: if there are fewer than `MIN_POINTS` evaluations, or a metric has no value at all.
    """
    if len(points) < MIN_POINTS:
        raise ValueError(
            f"{where}: got {len(points)} evaluation{'s' if len(points) != 1 else ''}; expected at least {MIN_POINTS}; "
            "fix: evaluate more often or train longer"
        )
    for name in orientations:
        if not any(name in values for _, values in points):
            raise ValueError(f"{where}: got no value of {name}; expected some; fix: name the metrics to use with --metric")
    return Curves(points, orientations)


def _rows(text: str) -> Iterator[tuple[int, list[str]]]:
    """Yield line number and stripped cells of each row that has any."""
    head = next((line for line in text.splitlines() if line.strip()), "")
    delimiter = max(",;\t", key=head.count)
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, skipinitialspace=True, strict=True)
    for cells in reader:
        stripped = [cell.strip() for cell in cells]
        if any(stripped):
            yield reader.line_num, stripped


def _columns(header: list[str], where: str) -> dict[str, int]:
    """Map each named column to its place; columns without a name, such as an index, are left out."""
    columns: dict[str, int] = {}
    for index, name in enumerate(header):
        if name in columns:
            raise ValueError(f"{where}: got two columns {name!r}; expected each once; fix: rename or remove one")
        if name:
            columns[name] = index
    return columns


def _step_column(names: list[str], where: str) -> str:
    if "step" in names:
        return "step"
    found = next((name for name in names if name.lower() == "step"), None)
    if found is None:
        near = next((name for name in names if re.search(r"step|iter|epoch", name.lower())), None)
        fix = f"rename {near!r} to step" if near else "add it"
        raise ValueError(f"{where}: got the columns {', '.join(names) or 'none'}; expected one named `step`; fix: {fix}")
    return found


def _step(cell: str, where: str) -> int:
    value = _number(cell, where, "step")
    if not 0 <= value < inf or value != int(value):
        raise ValueError(f"{where}: got step {cell}; expected a whole number, 0 or more; fix: count optimizer steps")
    return int(value)


def _number(cell: str, where: str, column: str) -> float:
    try:
        return float(cell)
    except ValueError as error:
        fix = "write a decimal point" if re.fullmatch(r"[-+]?\d+,\d+", cell) else "leave the cell empty where there is no value"
        raise ValueError(f"{where}: got {column} {cell!r}; expected a number; fix: {fix}") from error


def _find(name: str, available: Sequence[str], where: str) -> str:
    """Return the available name that a declared one means."""
    if name in available:
        return name
    ending = [other for other in available if other.rsplit("/", 1)[-1] == name]
    if len(ending) == 1:
        return ending[0]
    if ending:
        raise ValueError(f"{where}: got {name!r} for {' and '.join(ending)}; expected one; fix: write its whole name")
    near = difflib.get_close_matches(name, available, n=1)
    hint = f"did you mean {near[0]!r}?" if near else f"choose from {', '.join(available) or 'nothing: there is none'}"
    raise ValueError(f"{where}: got no column {name!r}; expected every metric that --metric names; fix: {hint}")


def _unknown(where: str, name: str) -> str:
    """Say that a metric's orientation is not known, and what to do."""
    near = difflib.get_close_matches(name.lower().rsplit("/", 1)[-1], HIGHER_IS_BETTER, n=1)
    hint = f" (the nearest known name is {near[0]!r})" if near else ""
    return (
        f"{where}: got the metric {name!r}, unknown here{hint}; expected to know which way it is better; "
        f"fix: --metric '{name}:higher' or --metric '{name}:lower'; columns that no --metric names are left out"
    )
