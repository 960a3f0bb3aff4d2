"""Output sizes: any ratio, box or longest side, from one pass of a network with a fixed factor."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from linearsr.sizing import Wanted, parse_box, plan_size

SIDE = st.integers(1, 3000)


@pytest.mark.parametrize(
    ("wanted", "sizes", "said"),
    [
        (Wanted(), ((100, 60), (400, 240), (400, 240)), ""),
        (Wanted(ratio=2.5), ((100, 60), (400, 240), (250, 150)), "reduced by Lanczos from 400 x 240 to 250 x 150"),
        (Wanted(ratio=8), ((200, 120), (800, 480), (800, 480)), "enlarged bicubically to 200 x 120 first"),
        (Wanted(box=(300, 1000)), ((100, 60), (400, 240), (300, 180)), "reduced"),
        (Wanted(longest=401), ((101, 61), (404, 244), (401, 241)), "enlarged"),
    ],
)
def test_each_way_to_ask_gives_its_size(wanted, sizes, said):
    plan = plan_size((100, 60), wanted, 4)
    assert (plan.network_input, plan.network_output, plan.output) == sizes
    assert said in plan.note
    assert bool(said) is bool(plan.note)


@given(SIDE, SIDE, st.floats(0.1, 20), st.sampled_from([1, 2, 4, 8]))
def test_the_network_always_gives_at_least_what_is_asked_for_and_is_given_no_less_than_there_is(width, height, ratio, scale):
    plan = plan_size((width, height), Wanted(ratio=ratio), scale)
    assert all(made >= out for made, out in zip(plan.network_output, plan.output, strict=True))
    assert all(given >= side for given, side in zip(plan.network_input, (width, height), strict=True))
    assert plan.output == (max(1, round(width * ratio)), max(1, round(height * ratio)))


def test_mistakes_are_named():
    with pytest.raises(ValueError, match="expected one of them"):
        Wanted(ratio=2, longest=100)
    with pytest.raises(ValueError, match="positive"):
        Wanted(ratio=-1)
    assert parse_box("1920X1080") == (1920, 1080)
    for text in ("1920", "ax3", "0x5", "1x2x3"):
        with pytest.raises(ValueError, match="WIDTHxHEIGHT"):
            parse_box(text)
