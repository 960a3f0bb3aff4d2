"""A process group whose second worker dies while the first waits for it, at the first start. Controllers and workers import it."""

import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from linearsr_platform.cluster.process_group import LateTorch, _LateTorchBackend

MARK = "a-worker-died"


@dataclass(frozen=True, slots=True)
class DyingJoin(LateTorch):
    """Leaves a file in `folder` when it has let the worker die."""

    folder: str

    @property
    def backend_cls(self) -> type["_DyingJoinBackend"]:
        return _DyingJoinBackend


class _DyingJoinBackend(_LateTorchBackend):
    def on_start(self, worker_group: Any, backend_config: DyingJoin) -> None:
        if not Path(backend_config.folder, MARK).exists():
            worker_group.execute_single(1, _die_instead, backend_config.folder)
        super().on_start(worker_group, backend_config)


def _die_instead(folder: str) -> None:
    from ray.train.torch import config

    def die(*_: Any, **__: Any) -> None:
        # The other one waits by then.
        time.sleep(1)
        Path(folder, MARK).touch()
        os._exit(1)

    config._setup_torch_process_group = die
