"""The stopwatch: nested sections leave each other out, and everything adds up to the whole."""

import pytest
import torch
from torch import nn

from linearsr.timing import Stopwatch


class Clock:
    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now


def test_nested_sections_add_up_to_the_whole():
    clock = Clock()
    watch = Stopwatch(clock=clock)
    clock.now = 1
    with watch.section("outer"):
        clock.now = 3
        for _ in range(2):
            with watch.section("inner"):
                clock.now += 5
        clock.now += 1
    clock.now += 4
    sections, total = watch.report()
    assert [(one.name, one.count, one.seconds) for one in sections] == [("outer", 1, 3), ("inner", 2, 10), ("other", 1, 5)]
    assert total == sum(one.seconds for one in sections) == 18


def test_modules_are_followed_and_let_go_and_an_exception_ends_its_section():
    watch, layer = Stopwatch(), nn.Linear(2, 2)
    with watch.following(layer=layer):
        layer(torch.zeros(1, 2))
        with pytest.raises(RuntimeError):
            layer(torch.zeros(1, 3))
    layer(torch.zeros(1, 2))
    assert {one.name: one.count for one in watch.report()[0]}["layer"] == 2
    off = Stopwatch(enabled=False)
    with off.section("a"), off.following(layer=layer):
        layer(torch.zeros(1, 2))
    assert [one.name for one in off.report()[0]] == ["other"]
