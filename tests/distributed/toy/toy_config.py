"""Settings of the toy task, without torch: what starts a trainer unpickles them."""

from dataclasses import dataclass


@dataclass(frozen=True)
class ToyConfig:
    """How slow the toy is, and where its workers say who they are."""

    pause_s: float = 0.0
    pids: str | None = None
    """Folder in which each worker leaves a file named by its process."""
