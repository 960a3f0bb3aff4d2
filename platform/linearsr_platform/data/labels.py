"""What people say about photographs: tags, split, quality, licence, from a CSV table or from files beside the image."""

import csv
from collections.abc import Mapping
from dataclasses import dataclass
from io import StringIO
from pathlib import Path

from linearsr.tags import normalise_tag, split_tags
from linearsr_platform import storage
from linearsr_platform.data.members import read_object
from linearsr_platform.errors import UserError

COLUMNS = ("file", "split", "quality", "tags", "licence", "source")
"""Columns of a table; only `file` must be there."""
SPLITS = ("", "train", "held-out")
QUALITIES = ("", "normal", "high")


@dataclass(frozen=True, slots=True, kw_only=True)
class Label:
    """What is known about one photograph beside its pixels."""

    tags: tuple[str, ...] = ()
    tags_lr: tuple[str, ...] | None = None
    """What a tagger sees in the degraded photograph, only in `NAME.json`; None if nobody asked one."""
    held_out: bool = False
    high_quality: bool = False
    licence: str = ""
    source: str = ""
    """Where the photograph comes from, in words or as a link."""


def label_of(fields: Mapping[str, object]) -> Label:
    """Read a label from named fields, `tags` and `tags_lr` being a text or a list; other names are ignored.

    Raises:
        ValueError: if a field has the wrong type or `split` or `quality` an unknown word.
    """
    words = {name: fields.get(name) or "" for name in ("split", "quality", "licence", "source")}
    for name, word in words.items():
        if not isinstance(word, str):
            raise ValueError(f"{name}: got {word!r}; expected a text")  # noqa: TRY004
    for name, allowed in (("split", SPLITS), ("quality", QUALITIES)):
        if words[name] not in allowed:
            raise ValueError(f"{name}: got {words[name]!r}; expected one of {', '.join(filter(None, allowed))} or nothing")
    return Label(
        tags=_tags(fields, "tags"),
        tags_lr=_tags(fields, "tags_lr") if "tags_lr" in fields else None,
        held_out=words["split"] == "held-out",
        high_quality=words["quality"] == "high",
        licence=str(words["licence"]).strip(),
        source=str(words["source"]).strip(),
    )


def _tags(fields: Mapping[str, object], key: str) -> tuple[str, ...]:
    given = fields.get(key, [])
    tags = split_tags(given) if isinstance(given, str) else given
    if not isinstance(tags, list) or not all(isinstance(tag, str) for tag in tags):
        raise ValueError(f"{key}: got {given!r}; expected a list of words")
    return tuple(dict.fromkeys(filter(None, map(normalise_tag, tags))))


def read_table(url: str) -> dict[str, Label]:
    """Read a CSV with the columns `COLUMNS`: file -> label.

    Raises:
        UserError: if the table is missing or broken; all broken lines are in the message.
    """
    try:
        text = storage.read_bytes(url).decode("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"table {url}: cannot be read as UTF-8 text: {error}; fix: data.sources.NAME.table") from error
    # Strict: or a quote that nobody closes would swallow every line behind it.
    rows = csv.DictReader(StringIO(text, newline=""), restkey="more", strict=True)
    try:
        return _labels(url, rows)
    except csv.Error as error:
        raise UserError(
            f"table {url}, line {rows.reader.line_num}: got no table ({error}); expected comma-separated values; fix: close its quotes"
        ) from error


def _labels(url: str, rows: "csv.DictReader[str]") -> dict[str, Label]:
    header = tuple(rows.fieldnames or ())
    if "file" not in header or not set(header) <= set(COLUMNS) or len(set(header)) < len(header):
        known = f"`file` and some of {', '.join(COLUMNS[1:])}, each once"
        raise UserError(f"table {url}: got columns {', '.join(header) or 'none'}; expected {known}")
    labels: dict[str, Label] = {}
    problems = []
    for row in rows:
        try:
            name = (row["file"] or "").strip()
            if "more" in row:
                raise ValueError(f"got more than {len(header)} fields; expected one for each column; fix: quote what holds a comma")
            if not name or name in labels:
                raise ValueError(f"file: got {name!r}; expected a name that no other line has")
            labels[name] = label_of({column: (value or "").strip() for column, value in row.items()})
        except ValueError as error:
            problems.append(f"table {url}, line {rows.line_num}: {error}")
    if problems:
        raise UserError("\n".join(problems))
    return labels


def read_side_file(url: str) -> Label:
    """Read `NAME.txt` or `NAME.json`; see `parse_label`.

    Raises:
        ValueError: if it is neither.
        OSError: if it cannot be read.
    """
    return parse_label(url, storage.read_bytes(url))


def parse_label(name: str, content: bytes) -> Label:
    """Read what stands beside a picture: tags separated by commas or new lines, or `{"tags": [...], "licence": ..., ...}` in a `.json`.

    Raises:
        ValueError: if it is neither.
    """
    text = content.decode("utf-8-sig")
    if not name.endswith(".json"):
        return Label(tags=label_of({"tags": text}).tags)
    return label_of(read_object(text))


def side_fields(image: Path) -> dict[str, object]:
    """Return what the side file of a local image says, as the fields of a `NAME.json`; nothing if there is none.

    Raises:
        ValueError: if it cannot be read as a label.
    """
    table, plain = image.with_suffix(".json"), image.with_suffix(".txt")
    if table.is_file():
        fields = read_object(table.read_text(encoding="utf-8-sig"))
        label_of(fields)
        return fields
    if plain.is_file():
        return {"tags": list(label_of({"tags": plain.read_text(encoding="utf-8-sig")}).tags)}
    return {}


def write_side_file(image: Path, fields: Mapping[str, object]) -> Path:
    """Write `NAME.json` beside a local image, at once; it takes the place of a `NAME.txt`, which stays."""
    target = image.with_suffix(".json")
    storage.write_json(str(target), dict(fields))
    return target
