"""Compiled kernels of this machine, for whoever a recipe or an option tells to use them."""

from typing import TYPE_CHECKING

from linearsr_platform.errors import UserError

if TYPE_CHECKING:
    from linearsr.kernels import Kernels


def kernels_here(*, wanted: bool = True) -> "Kernels | None":
    """Return this machine's kernels, compiled if that was not done before; None if they are not wanted.

    Raises:
        UserError: if they cannot be compiled here.
    """
    if not wanted:
        return None
    # Not before: they import torch.
    from linearsr.kernels import KernelsError
    from linearsr.kernels.build import build_kernels

    try:
        return build_kernels()
    except KernelsError as error:
        raise UserError(str(error)) from error
