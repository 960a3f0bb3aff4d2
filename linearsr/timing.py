"""Where the time of an enlargement goes: named sections that add up to the whole."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from time import perf_counter

import torch
from torch import nn


@dataclass(frozen=True, slots=True)
class Section:
    """Time spent under one name."""

    name: str
    count: int
    """Times it was entered."""
    seconds: float
    """Without the sections entered inside it."""


class Stopwatch:
    """Measures nested sections; a section's time leaves out those inside it, so all of them add up.

    On CUDA it waits for the device at every border, which costs a little: leave it off unless the split is wanted.
    """

    def __init__(self, device: torch.device | str = "cpu", *, enabled: bool = True, clock: Callable[[], float] = perf_counter) -> None:
        """Start now; `clock` counts seconds. When not `enabled` sections cost nothing and nothing is kept."""
        self.device, self.enabled, self._clock = torch.device(device), enabled, clock
        self._seconds: dict[str, float] = {}
        self._counts: dict[str, int] = {}
        self._inside: list[float] = []
        self._started_s = clock()

    @contextmanager
    def section(self, name: str) -> Iterator[None]:
        """Count what runs inside under `name`."""
        if not self.enabled:
            yield
            return
        self._counts[name] = self._counts.get(name, 0) + 1
        self._seconds.setdefault(name, 0.0)  # Rows come in the order in which sections were entered first.
        self._inside.append(0.0)
        started_s = self._now()
        try:
            yield
        finally:
            elapsed_s = self._now() - started_s
            self._seconds[name] += elapsed_s - self._inside.pop()
            if self._inside:
                self._inside[-1] += elapsed_s

    @contextmanager
    def following(self, **modules: nn.Module) -> Iterator[None]:
        """Count the forward passes of some modules under the given names, while the block runs."""
        if not self.enabled:
            yield
            return
        with ExitStack() as hooks:
            for name, module in modules.items():
                self._follow(name, module, hooks)
            yield

    def report(self) -> tuple[list[Section], float]:
        """Return all sections in their order, `other` for what none covers, and the seconds since the start: the sum of them."""
        total_s = self._now() - self._started_s
        sections = [Section(name, self._counts[name], seconds) for name, seconds in self._seconds.items()]
        return [*sections, Section("other", 1, total_s - sum(one.seconds for one in sections))], total_s

    def _follow(self, name: str, module: nn.Module, hooks: ExitStack) -> None:
        entered = ExitStack()

        def enter(*_: object) -> None:
            entered.enter_context(self.section(name))

        def leave(*_: object) -> None:
            entered.close()

        hooks.callback(module.register_forward_pre_hook(enter).remove)
        hooks.callback(module.register_forward_hook(leave, always_call=True).remove)

    def _now(self) -> float:
        if self.enabled and self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return self._clock()
