"""Averaged weights of past validations, kept until the knee is known."""

from safetensors.torch import save
from torch import Tensor

from linearsr_platform import storage
from linearsr_platform.train.processes import rank


class Snapshots:
    """The files `step_00000100.safetensors` in one folder. All workers keep the list, worker 0 touches the files."""

    def __init__(self, url: str, keep: int, *, last_step: int | None) -> None:
        """Find what an earlier attempt left.

        Args:
            url: folder of the snapshots.
            keep: how many to keep, beside those that must not go.
            last_step: step that training resumes from, later snapshots are not counted; None starts with an empty folder.
        """
        self._url = url
        self._keep = keep
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
            storage.write_bytes(self.url(step), save(weights))
        if step not in self._steps:
            self._steps.append(step)

    def prune(self, candidate: int) -> None:
        """Delete snapshots over the limit, given the step that would be the knee if training ended now.

        The oldest before the candidate go first; when there are none, later ones are thinned, because the knee may still move
        there. The candidate and the last stay.
        """
        while len(self._steps) > self._keep:
            step = self._most_dispensable(candidate)
            if rank() == 0:
                storage.remove(self.url(step))
            self._steps.remove(step)

    def nearest(self, step: int) -> int:
        """Return the step of the kept snapshot nearest to `step`, the earlier of two."""
        return min(self._steps, key=lambda kept: (abs(kept - step), kept))

    def _most_dispensable(self, candidate: int) -> int:
        """Return the first step before the candidate, or else the one whose neighbours are nearest to each other."""
        steps = self._steps
        if steps[0] < candidate:
            return steps[0]
        gaps = {step: after - before for before, step, after in zip(steps, steps[1:], steps[2:], strict=False) if step != candidate}
        return min(gaps, key=lambda step: (gaps[step], step))
