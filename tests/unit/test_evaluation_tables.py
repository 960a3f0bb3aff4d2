"""Tables of an evaluation: means with intervals that do not depend on order, and evaluations of earlier releases are still read."""

import json
import math

import numpy as np
import pytest

from linearsr_platform.registry.evaluation import Evaluation, ProtocolTable
from linearsr_platform.registry.gate import why_not_comparable
from linearsr_platform.registry.intervals import mean_intervals


def test_intervals_cover_the_mean_as_often_as_they_say():
    rng = np.random.default_rng(0)
    covered = 0
    for _ in range(200):
        low, high = mean_intervals({"m": {f"{i}": float(x) for i, x in enumerate(rng.exponential(1, 60))}})["m"]
        covered += low <= 1 <= high
    # The percentile interval of a skewed metric covers a little less than 95 %.
    assert 0.88 <= covered / 200 <= 0.98


def test_intervals_are_those_of_the_normal_distribution_and_the_same_in_any_order():
    rng = np.random.default_rng(1)
    values = {f"image-{i}": float(x) for i, x in enumerate(rng.normal(25, 2, 400))}
    backwards = dict(reversed(values.items()))
    found = mean_intervals({"a": values, "b": dict.fromkeys(values, 3.0)})
    assert found == mean_intervals({"b": dict.fromkeys(values, 3.0), "a": backwards})
    mean, error = np.mean(list(values.values())), np.std(list(values.values())) / 20
    assert found["a"] == pytest.approx((mean - 1.96 * error, mean + 1.96 * error), abs=0.15 * error)
    assert found["b"] == pytest.approx((3, 3))
    assert mean_intervals({}) == {}


def test_a_table_counts_its_images_and_misses_none():
    values = {"routed": {"psnr_y": {"a": 20.0, "b": 22.0}, "fsim": {"a": 0.5, "b": 0.7}}}
    table = ProtocolTable.of(protocol={"name": "classic"}, test_set="t", values=values, of_the_set={"routed": {"fid": 12.5}})
    assert table.images == 2
    assert table.rows["routed"] == pytest.approx({"psnr_y": 21, "fsim": 0.6, "fid": 12.5})
    assert set(table.intervals["routed"]) == {"psnr_y", "fsim"}
    values["routed"]["fsim"].pop("b")
    with pytest.raises(ValueError, match="no fsim of routed for b"):
        ProtocolTable.of(protocol={}, test_set="t", values=values)


def test_json_keeps_everything_and_has_no_word_for_nan():
    values = {"routed": {"niqe": {"a": math.nan, "b": 4.0}}}
    table = ProtocolTable.of(protocol={"name": "osediff"}, test_set="t", values=values)
    plain = table.to_plain(with_values=True, strict=True)
    read = Evaluation.from_plain(json.loads(json.dumps({"osediff": plain}, allow_nan=False))).tables["osediff"]
    assert read.images == 2
    assert math.isnan(read.rows["routed"]["niqe"])
    assert math.isnan(read.values["routed"]["niqe"]["a"])
    assert read.values["routed"]["niqe"]["b"] == 4
    sound = ProtocolTable.of(protocol={"name": "x"}, test_set="t", values={"routed": {"psnr_y": {"a": 1.0, "b": 2.0}}})
    evaluation = Evaluation(tables={"x": sound})
    assert Evaluation.from_json(evaluation.to_json(with_values=True)) == evaluation


def test_an_evaluation_from_before_there_were_intervals_is_still_read():
    old = {"protocol": {"metrics": "classic: 8 bit", "seed": 0}, "test_set": "t", "rows": {"routed": {"psnr_y": 24.0}}}
    for text in (json.dumps(old), json.dumps({"tables": {"classic": {**old, "values": {}}}})):
        table = Evaluation.from_json(text).tables["classic"]
        assert (table.rows, table.intervals, table.images) == ({"routed": {"psnr_y": 24.0}}, {}, 0)


def test_other_weights_are_not_comparable_and_fewer_metrics_are():
    def table(**weights: str) -> ProtocolTable:
        return ProtocolTable(protocol={"name": "seesr", "weights": weights}, test_set="t", rows={})

    assert why_not_comparable(table(lpips="a", musiq="m"), table(lpips="a", psnr_y="none")) == ""
    assert "weights" in why_not_comparable(table(lpips="a"), table(lpips="b"))
