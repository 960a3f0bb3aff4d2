"""Which experts are on the device: all of them, or one at a time with the next one fetched ahead.

Both give the same numbers: weights are copied into parameters either way, never used from where the file lies.
"""

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Literal, Protocol, get_args

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file

from linearsr.bundle import Bundle, BundleError
from linearsr.kernels import Kernels, use_kernels
from linearsr.model import SuperResolver

Residency = Literal["all", "one"]
"""`all`: every expert on the device. `one`: the running expert, the next one prefetched while it runs."""
READ_BYTES = 4 * 2**20
"""Block in which a file is read ahead."""


class ExpertSet(Protocol):
    """Experts by their number, noisiest first; a plain list is one."""

    def __len__(self) -> int:
        """Return how many there are."""

    def __getitem__(self, index: int, /) -> SuperResolver:
        """Return an expert, ready to run."""


class ExpertsInTurn:
    """Keeps one expert ready at a time; asking for another one replaces it.

    On the CPU there is room for one expert, and the next one's file is read into the page cache meanwhile. On CUDA there is room for
    two: a thread copies the next one through pinned memory on a stream of its own. An expert returned earlier is not valid any more.
    """

    def __init__(self, bundle: Bundle, device: torch.device, kernels: Kernels | None = None) -> None:
        """Make room and check every file's header; no weights are read yet.

        Raises:
            BundleError: if an expert's weights are not those of the bundle's network.
        """
        self._bundle, self._device = bundle, device
        self._is_cuda = device.type == "cuda"
        self._slots = [_empty_expert(bundle, device, kernels) for _ in range(min(2, len(bundle.experts)) if self._is_cuda else 1)]
        for path in bundle.experts:
            _check_header(path, self._slots[0], bundle)
        self._holds: list[int | None] = [None] * len(self._slots)
        self._current = 0
        self._order: tuple[int, ...] = tuple(range(len(bundle.experts)))
        self._thread = ThreadPoolExecutor(1, "next-expert")
        self._ahead: tuple[int, Future[None]] | None = None
        self._stream = torch.cuda.Stream(device) if self._is_cuda else None  # type: ignore[no-untyped-call]

    def __len__(self) -> int:
        """Return how many experts the bundle has."""
        return len(self._bundle.experts)

    def expect(self, order: Sequence[int]) -> None:
        """Say in which order experts will be asked for, over and over; those left out are never fetched ahead."""
        self._order = tuple(dict.fromkeys(order))

    def __getitem__(self, index: int, /) -> SuperResolver:
        """Return an expert with its weights in place, and begin to fetch the next one.

        Raises:
            BundleError: if its file cannot be read any more.
        """
        if self._holds[self._current] == index:
            return self._slots[self._current]
        ahead, self._ahead = self._ahead, None
        if ahead is not None:
            ahead[1].result()
        target = (self._current + 1) % len(self._slots)
        if self._holds[target] != index:
            self._holds[target] = None
            self._fill(index, target, self._queued())
        self._current = target
        self._fetch_next(index)
        return self._slots[target]

    def _fetch_next(self, index: int) -> None:
        """Start to fetch the expert that follows `index`, if there is another."""
        place = self._order.index(index) if index in self._order else -1
        following = self._order[(place + 1) % len(self._order)]
        if following == index:
            return
        if not self._is_cuda:
            self._ahead = following, self._thread.submit(_read_ahead, self._bundle.experts[following])
            return
        spare = (self._current + 1) % len(self._slots)
        if self._holds[spare] == following:
            return
        self._holds[spare] = None
        self._ahead = following, self._thread.submit(self._fill, following, spare, self._queued())

    def _queued(self) -> "torch.cuda.Event | None":
        """Return what happens when the device is done with all that this thread has queued: until then it may read any slot."""
        return torch.cuda.current_stream(self._device).record_event() if self._is_cuda else None

    @torch.no_grad()
    def _fill(self, index: int, slot: int, after: "torch.cuda.Event | None") -> None:
        """Copy an expert's weights into a slot and wait until they are there."""
        weights = _read(self._bundle.experts[index], self._bundle)
        places = self._slots[slot].state_dict()
        if self._stream is None:
            for name, place in places.items():
                place.copy_(weights[name])
        else:
            with torch.cuda.stream(self._stream):
                if after is not None:
                    self._stream.wait_event(after)
                for name, place in places.items():
                    place.copy_(weights[name].to(place.dtype).pin_memory(), non_blocking=True)
            self._stream.synchronize()
        self._holds[slot] = index


def hold_experts(bundle: Bundle, device: torch.device, residency: Residency, kernels: Kernels | None = None) -> ExpertSet:
    """Return the bundle's experts, kept as `residency` says; on a CPU they compute with `kernels`, if there are some.

    Raises:
        BundleError: if an expert's weights are not those of the bundle's network.
        ValueError: for another residency.
    """
    if residency not in get_args(Residency):
        raise ValueError(f"residency: got {residency!r}; expected one of {', '.join(get_args(Residency))}")
    if residency == "one":
        return ExpertsInTurn(bundle, device, kernels)
    experts = []
    for path in bundle.experts:
        expert = SuperResolver(bundle.config, bundle.statistics)
        try:
            expert.load_state_dict(load_file(path))
        except (RuntimeError, SafetensorError) as error:
            raise _foreign(path, bundle, str(error)) from error
        use_kernels(expert, kernels)
        experts.append(expert.to(device, network_dtype(bundle)).eval())
    return experts


def network_dtype(bundle: Bundle) -> torch.dtype:
    """Return the dtype that the bundle's networks run in."""
    return torch.bfloat16 if bundle.precision == "bfloat16" else torch.float32


def expert_parameters(bundle: Bundle) -> int:
    """Return the parameters of one expert, from the header of its file."""
    with safe_open(bundle.experts[0], "pt") as file:
        return sum(torch.Size(file.get_slice(name).get_shape()).numel() for name in file.keys())  # noqa: SIM118


def _empty_expert(bundle: Bundle, device: torch.device, kernels: Kernels | None) -> SuperResolver:
    expert = SuperResolver(bundle.config, bundle.statistics).to(device, network_dtype(bundle)).eval()
    use_kernels(expert, kernels)
    return expert


def _check_header(path: Path, expert: SuperResolver, bundle: Bundle) -> None:
    expected = {name: list(place.shape) for name, place in expert.state_dict().items()}
    try:
        with safe_open(path, "pt") as file:
            got = {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise _foreign(path, bundle, str(error)) from error
    differing = sorted(name for name in {*got, *expected} if got.get(name) != expected.get(name))
    if differing:
        raise _foreign(path, bundle, f"differing in {', '.join(differing[:3])}")


def _read(path: Path, bundle: Bundle) -> dict[str, torch.Tensor]:
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise _foreign(path, bundle, str(error)) from error


def _foreign(path: Path, bundle: Bundle, reason: str) -> BundleError:
    return BundleError(f"{path}: got other weights ({reason}); expected those of {bundle.config}; fix: assemble again")


def _read_ahead(path: Path) -> None:
    """Read a file into the page cache; a file that cannot be read is told of when its weights are needed."""
    block = bytearray(READ_BYTES)
    try:
        with path.open("rb", buffering=0) as file:
            while file.readinto(block):
                pass
    except OSError:
        return
