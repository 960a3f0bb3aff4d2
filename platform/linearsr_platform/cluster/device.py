"""Where a worker of the cluster computes that Ray Train did not start."""

from platform import node

import ray
import torch

from linearsr_platform.errors import StageError


def own_device() -> torch.device:
    """Return the GPU that this worker has reserved, or the CPU if it has reserved none.

    Raises:
        StageError: if it has one and torch cannot use it: on the CPU its work would take a hundred times as long, without a word.
    """
    reserved = ray.get_runtime_context().get_accelerator_ids().get("GPU", [])
    if not reserved:
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise StageError(
            f"workers: got GPU {', '.join(reserved)} of {node()} reserved, but torch {torch.__version__} finds no "
            "CUDA there; fix: the driver or torch's build on that machine, or the number of GPUs that the cluster was started with"
        )
    return torch.device("cuda")
