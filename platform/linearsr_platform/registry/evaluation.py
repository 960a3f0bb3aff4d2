"""The numbers of a bundle, under each protocol they were measured by: means for lists, values per image for paired comparisons."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from linearsr_platform.json_numbers import nan_for_null, null_for_nan
from linearsr_platform.registry.intervals import mean_intervals

ImageValues = Mapping[str, Mapping[str, Mapping[str, float]]]
"""Row to metric to image to value."""


@dataclass(frozen=True, kw_only=True)
class ProtocolTable:
    """What was measured under one protocol."""

    protocol: Mapping[str, object]
    """How: `name`, `metrics` (a description), `weights` (metric to the hash of its weights), `scale`, `degradation`, `seed`, and `tags` if
    some were those of LR images. JSON; two tables are comparable only if it is equal in both."""
    test_set: str
    """Hash of the images: their names, and the pixels of originals and LR pictures."""
    rows: Mapping[str, Mapping[str, float]]
    """Row (`one_step`, `routed`, `bicubic`) to metric to mean value."""
    values: ImageValues = field(default_factory=dict)
    """Every image's own value; empty where they were not kept or not loaded."""
    intervals: Mapping[str, Mapping[str, tuple[float, float]]] = field(default_factory=dict)
    """Row to metric to the 95 % interval of its mean; none for metrics of a whole set, and in evaluations from before there were any."""
    images: int = 0
    """Number of images behind every mean; 0 where it was not recorded."""

    @classmethod
    def of(
        cls,
        *,
        protocol: Mapping[str, object],
        test_set: str,
        values: ImageValues,
        of_the_set: Mapping[str, Mapping[str, float]] | None = None,
    ) -> "ProtocolTable":
        """Make a table of the values of each image.

        Args:
            protocol, test_set: as the fields.
            values: row to metric to image to value.
            of_the_set: row to metric to the value of the whole set, such as FID.

        Raises:
            ValueError: if a row or metric lacks an image that another has.
        """
        images = {image for metrics in values.values() for numbers in metrics.values() for image in numbers}
        rows: dict[str, dict[str, float]] = {}
        intervals: dict[str, dict[str, tuple[float, float]]] = {}
        for row, metrics in values.items():
            for metric, numbers in metrics.items():
                if missing := sorted(images - numbers.keys()):
                    raise ValueError(f"evaluation: got no {metric} of {row} for {missing[0]}; expected a value of every image")
            rows[row] = {metric: sum(numbers[image] for image in sorted(numbers)) / len(numbers) for metric, numbers in metrics.items()}
            rows[row] |= (of_the_set or {}).get(row, {})
            intervals[row] = mean_intervals(metrics)
        return cls(protocol=protocol, test_set=test_set, rows=rows, values=values, intervals=intervals, images=len(images))

    def to_plain(self, *, with_values: bool, strict: bool = False) -> dict[str, Any]:
        """Return it as JSON's own types.

        Args:
            with_values: whether the values of each image are in it.
            strict: whether numbers that are not finite become null, for which JSON has a word.
        """
        plain: dict[str, object] = {"protocol": dict(self.protocol), "test_set": self.test_set, "images": self.images}
        plain["rows"] = {row: dict(means) for row, means in self.rows.items()}
        plain["intervals"] = {row: {metric: list(ends) for metric, ends in found.items()} for row, found in self.intervals.items()}
        if with_values:
            plain["values"] = {row: {metric: dict(images) for metric, images in metrics.items()} for row, metrics in self.values.items()}
        finite: dict[str, Any] = null_for_nan(plain) if strict else plain
        return finite


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
        except (AttributeError, KeyError, OverflowError, RecursionError, TypeError, ValueError) as error:
            raise ValueError(f"evaluation: got {text[:200]!r}; expected JSON with tables of protocol, test_set and rows") from error

    @classmethod
    def from_plain(cls, tables: Mapping[str, Mapping[str, Any]]) -> "Evaluation":
        """Read it from what `ProtocolTable.to_plain` makes of each table."""
        return cls(tables={name: _table(table) for name, table in tables.items()})

    def to_json(self, *, with_values: bool) -> str:
        """Write it as JSON; NaN and infinity stay what they are."""
        tables = {name: table.to_plain(with_values=with_values) for name, table in self.tables.items()}
        return json.dumps({"tables": tables}, sort_keys=True)

    @property
    def first(self) -> ProtocolTable | None:
        """The first table by name, to have something to show; None if there is none."""
        return next((self.tables[name] for name in sorted(self.tables)), None)


def _old_name(protocol: Mapping[str, object]) -> str:
    """Name the one table of an evaluation from before there were several; its description of the metrics begins with the name."""
    return str(protocol.get("metrics", "unnamed")).partition(":")[0]


def _table(value: Mapping[str, Any]) -> ProtocolTable:
    rows = {row: {metric: nan_for_null(mean) for metric, mean in means.items()} for row, means in value["rows"].items()}
    values: ImageValues = {
        row: {metric: {image: nan_for_null(number) for image, number in images.items()} for metric, images in metrics.items()}
        for row, metrics in value.get("values", {}).items()
    }
    intervals = {
        row: {metric: (nan_for_null(low), nan_for_null(high)) for metric, (low, high) in found.items()}
        for row, found in value.get("intervals", {}).items()
    }
    return ProtocolTable(
        protocol=dict(value["protocol"]),
        test_set=str(value["test_set"]),
        rows=rows,
        values=values,
        intervals=intervals,
        images=int(value.get("images", 0)),
    )


def by_metric(values: Mapping[str, Mapping[str, Mapping[str, float]]]) -> ImageValues:
    """Turn row to image to metric, as evaluation measures, into row to metric to image."""
    turned: dict[str, dict[str, dict[str, float]]] = {}
    for row, images in values.items():
        for image, metrics in images.items():
            for metric, value in metrics.items():
                turned.setdefault(row, {}).setdefault(metric, {})[image] = value
    return turned
