"""The numbers of a bundle, under each protocol they were measured by: means for lists, values per image for paired comparisons."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

ImageValues = Mapping[str, Mapping[str, Mapping[str, float]]]
"""Row to metric to image to value."""


@dataclass(frozen=True, kw_only=True)
class ProtocolTable:
    """What was measured under one protocol."""

    protocol: Mapping[str, object]
    """How: degradation, crop, seed, weights of metrics. JSON; two tables are comparable only if it is equal in both."""
    test_set: str
    """Hash of the images."""
    rows: Mapping[str, Mapping[str, float]]
    """Row (`one_step`, `routed`, `bicubic`) to metric to mean value."""
    values: ImageValues = field(default_factory=dict)
    """Every image's own value; empty where they were not kept or not loaded."""


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """Every table of a bundle."""

    tables: Mapping[str, ProtocolTable]
    """By the protocol's name."""

    @classmethod
    def from_json(cls, text: str) -> "Evaluation":
        """Read it from the JSON that `to_json` writes, with values per image or without.

        Raises:
            ValueError: if the text is anything else.
        """
        try:
            value = json.loads(text)
            tables = value["tables"] if "tables" in value else {_old_name(value["protocol"]): value}
            return cls(tables={str(name): _table(table) for name, table in tables.items()})
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise ValueError(f"evaluation: got {text[:200]!r}; expected JSON with tables of protocol, test_set and rows") from error

    def to_json(self, *, with_values: bool) -> str:
        """Write it as JSON; NaN and infinity stay what they are."""
        tables = {name: _plain(table, with_values=with_values) for name, table in self.tables.items()}
        return json.dumps({"tables": tables}, sort_keys=True)

    @property
    def first(self) -> ProtocolTable | None:
        """The first table by name, to have something to show; None if there is none."""
        return next((self.tables[name] for name in sorted(self.tables)), None)


def _old_name(protocol: Mapping[str, object]) -> str:
    """Name the one table of an evaluation from before there were several; its description of the metrics begins with the name."""
    return str(protocol.get("metrics", "unnamed")).partition(":")[0]


def _plain(table: ProtocolTable, *, with_values: bool) -> dict[str, object]:
    plain: dict[str, object] = {"protocol": dict(table.protocol), "test_set": table.test_set}
    plain["rows"] = {row: dict(means) for row, means in table.rows.items()}
    if with_values:
        plain["values"] = {row: {metric: dict(images) for metric, images in metrics.items()} for row, metrics in table.values.items()}
    return plain


def _table(value: Mapping[str, Any]) -> ProtocolTable:
    rows = {row: {metric: float(mean) for metric, mean in means.items()} for row, means in value["rows"].items()}
    values: ImageValues = {
        row: {metric: {image: float(number) for image, number in images.items()} for metric, images in metrics.items()}
        for row, metrics in value.get("values", {}).items()
    }
    return ProtocolTable(protocol=dict(value["protocol"]), test_set=str(value["test_set"]), rows=rows, values=values)


def by_metric(values: Mapping[str, Mapping[str, Mapping[str, float]]]) -> ImageValues:
    """Turn row to image to metric, as evaluation measures, into row to metric to image."""
    turned: dict[str, dict[str, dict[str, float]]] = {}
    for row, images in values.items():
        for image, metrics in images.items():
            for metric, value in metrics.items():
                turned.setdefault(row, {}).setdefault(metric, {})[image] = value
    return turned
