"""Averaged weights of past validations, kept until the knee is known."""

from collections.abc import Sequence

from safetensors.torch import save
from torch import Tensor

from linearsr_platform import storage
from linearsr_platform.train.processes import rank


class Snapshots:
    """The files `step_00000100.safetensors` in one folder. All workers keep the list, worker 0 touches the files."""

    def __init__(self, url: str, keep: int, *, last_step: int | None, codec: str | None = None) -> None:
        """Find what an earlier attempt left.

        Args:
            url: folder of the snapshots.
            keep: how many to keep, beside those that must not go.
            last_step: step that training resumes from, later snapshots are not counted; None starts with an empty folder.
            codec: hash of the codec, written into every file beside the weights; None where there is no codec.
        """
        self._url = url
        self._keep = keep
        self._metadata = None if codec is None else {"codec": codec}
        self._steps: list[int] = []
        if last_step is not None:
            names = (storage.name_of(file) for file in storage.list_files(url, "step_*.safetensors"))
            found = (int(name.removeprefix("step_").removesuffix(".safetensors")) for name in names)
            self._steps = sorted(step for step in found if step <= last_step)
        elif rank() == 0:
            storage.remove(url)

    def url(self, step: int) -> str:
        """Return where the weights after `step` steps are."""
        return storage.join(self._url, f"step_{step:08d}.safetensors")

    def write(self, step: int, weights: dict[str, Tensor]) -> None:
        """Keep the weights after `step` steps; only worker 0's are used."""
        if rank() == 0:
            storage.write_bytes(self.url(step), save(weights, self._metadata))
        if step not in self._steps:
            self._steps.append(step)

    def prune(self, candidates: Sequence[int]) -> None:
        """Delete snapshots over the limit, given the steps that may still become the knee, the likeliest first.

        The others are thinned, then the least likely go; the likeliest and the last stay.
        """
        while len(self._steps) > self._keep:
            step = self._most_dispensable(candidates)
            if rank() == 0:
                storage.remove(self.url(step))
            self._steps.remove(step)

    def drop_after(self, step: int) -> None:
        """Delete the snapshots of steps that were rolled back, those after `step`."""
        for late in [kept for kept in self._steps if kept > step]:
            if rank() == 0:
                storage.remove(self.url(late))
            self._steps.remove(late)

    def nearest(self, step: int) -> int:
        """Return the step of the kept snapshot nearest to `step`, the earlier of two."""
        return min(self._steps, key=lambda kept: (abs(kept - step), kept))

    def _most_dispensable(self, candidates: Sequence[int]) -> int:
        """Return the step whose neighbours are nearest to each other among those that are no candidate, or else the last candidate."""
        steps, others = self._steps, set(self._steps[:-1]) - set(candidates)
        if not others:
            return next(step for step in reversed(candidates) if step in steps[:-1])
        before, after = [steps[0], *steps], [*steps[1:], steps[-1]]
        gaps = {step: late - early for early, step, late in zip(before, steps, after, strict=False) if step in others}
        return min(gaps, key=lambda step: (gaps[step], step))
