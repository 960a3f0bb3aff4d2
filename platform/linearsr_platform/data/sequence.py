"""A rank's share of a run's one sequence of global batches, whatever the number of ranks. Imports no torch."""

from collections.abc import Mapping, Sequence
from typing import Any

from linearsr_platform.data.lanes import Crop, CropPlan, Cursor, Lane, cursor_state
from linearsr_platform.data.shard_files import ShardFiles
from linearsr_platform.errors import UserError

State = Mapping[str, Any]

WHERE = "reader state"


class CropSequence:
    """Which crops one rank makes, micro-batch after micro-batch.

    A global batch is what all ranks make in one optimizer step. It holds, for each of the run's own micro-steps in turn, a micro-batch of
    every lane in turn; ranks take equal pieces of that list, in the order of micro-step and rank. So any number of ranks that divides the
    batch sees the same global batches in the same order. A rank steps the lanes it needs, and decodes nothing that it leaves out.
    """

    def __init__(
        self, plan: CropPlan, files: ShardFiles, *, batch_size: int, rank: int = 0, world_size: int = 1, accumulation: int = 1
    ) -> None:
        """Stand before the first batch; nothing is read yet.

        Args:
            plan: the run's lanes and what they read.
            files: opens the shards.
            batch_size: crops of this rank's micro-batches.
            rank: its number.
            world_size: ranks.
            accumulation: micro-batches of a rank in one optimizer step.

        Raises:
            UserError: if the global batch is not whole micro-batches of all lanes.
        """
        lanes = plan.lanes
        whole, round_size = batch_size * world_size * accumulation, lanes.batch_size * lanes.count
        if whole % round_size:
            got = f"train: got {whole} crops a step, {world_size} workers and accumulation {accumulation}"
            raise UserError(
                f"{got}; expected a multiple of {round_size}: {lanes.count} lanes of {lanes.batch_size}; fix: the run's batch_size"
            )
        self._plan = plan
        self._rank, self._layout = rank, {"batch_size": batch_size, "world_size": world_size, "accumulation": accumulation}
        self._lane_crops = whole // lanes.count
        self._pieces = [_pieces(plan, (micro * world_size + rank) * batch_size, batch_size) for micro in range(accumulation)]
        self._lanes = {number: Lane(plan, number, files) for number in sorted({lane for piece in self._pieces for lane, _, _ in piece})}
        self._done: dict[int, int] = {}
        self._stand({number: Cursor() for number in self._lanes}, 0, 0)

    def next_batch(self) -> list[Crop]:
        """Return the crops of the next micro-batch; none is decoded."""
        crops: list[Crop] = []
        for number, first, count in self._pieces[self._micro]:
            self._lanes[number].skip(first - self._done[number])
            crops += self._lanes[number].take(count)
            self._done[number] = first + count
        self._micro += 1
        if self._micro == len(self._pieces):
            for number, lane in self._lanes.items():
                lane.skip(self._lane_crops - self._done[number])
            self._begin(self._step + 1)
        return crops

    def state(self) -> dict[str, object]:
        """Return, JSON-able, where the next micro-batch starts, as far as this rank knows: cursors of the lanes it reads."""
        return {
            **self._plan.identity(),
            **self._layout,
            "step": self._step,
            "micro": self._micro,
            "lanes": {str(number): cursor_state(cursor) for number, cursor in self._starts.items()},
        }

    def restore(self, states: State | Sequence[State]) -> None:
        """Go on where the ranks stood that gave some states.

        Args:
            states: those of all ranks, in any order. One of a rank that reads the same lanes is enough.

        Raises:
            UserError: if they are of other data, do not fit each other, or a lane is missing.
        """
        states = [states] if isinstance(states, Mapping) else list(states)
        expected = self._plan.identity()
        for state in states:
            found = {name: state.get(name) for name in expected}
            if found != expected:
                raise UserError(f"{WHERE}: got {found}; expected {expected}; fix: resume with the same data, seed and batch size")
        cursors = merged_lanes(states)
        missing = [number for number in self._lanes if number not in cursors]
        if missing:
            raise UserError(f"{WHERE}: got lanes {sorted(cursors)}; expected {missing} too; fix: give the states of all workers")
        micro, step = int(states[0]["micro"]), int(states[0]["step"])
        layout = {name: states[0][name] for name in self._layout}
        if micro and layout != self._layout:
            got = f"{WHERE}: got one between the micro-batches of a step of {layout}"
            raise UserError(f"{got}; expected {self._layout}; fix: resume with as many workers, or from a checkpoint")
        self._stand({number: cursors[number] for number in self._lanes}, step, micro)

    def _stand(self, starts: Mapping[int, Cursor], step: int, micro: int) -> None:
        """Go to a step's micro-batch, its lanes having begun the step at `starts`."""
        for number, lane in self._lanes.items():
            lane.jump(starts[number])
        self._begin(step)
        for pieces in self._pieces[:micro]:
            for number, first, count in pieces:
                self._lanes[number].skip(first + count - self._done[number])
                self._done[number] = first + count
        self._micro = micro

    def _begin(self, step: int) -> None:
        """Note where the lanes stand at the beginning of a step."""
        self._step, self._micro = step, 0
        self._starts = {number: lane.cursor() for number, lane in self._lanes.items()}
        self._done = dict.fromkeys(self._lanes, 0)


def merged_lanes(states: Sequence[State]) -> dict[int, Cursor]:
    """Return the cursors of all lanes that some ranks' states know.

    Raises:
        UserError: if two of them do not agree: then they are of different moments.
    """
    found: dict[int, Cursor] = {}
    for state in states:
        for name in ("step", "micro"):
            if state[name] != states[0][name]:
                raise UserError(f"{WHERE}: got {name} {state[name]} and {states[0][name]}; expected states of one moment")
        for number, fields in state["lanes"].items():
            cursor = Cursor(**fields)
            if found.setdefault(int(number), cursor) != cursor:
                raise UserError(f"{WHERE}: got {cursor} and {found[int(number)]} for lane {number}; expected states of one moment")
    return found


def _pieces(plan: CropPlan, start: int, count: int) -> list[tuple[int, int, int]]:
    """Return what a range of positions in the global batch is made of: lane, first of its crops in the step, and how many."""
    size, lanes = plan.lanes.batch_size, plan.lanes.count
    pieces, stop = [], start + count
    while start < stop:
        turn, within = divmod(start, size)
        taken = min(size - within, stop - start)
        pieces.append((turn % lanes, turn // lanes * size + within, taken))
        start += taken
    return pieces
