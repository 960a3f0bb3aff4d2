"""What can be seen of a linear attention while it runs, without waiting for the device. Source: method.md 2.4."""

import torch
from torch import Tensor


class AttentionProbe:
    """Records the state of one linear attention; hung into `LinearAttention.probe` for as long as it shall look."""

    def __init__(self) -> None:
        """Start with nothing seen."""
        self._rows: list[Tensor] = []

    @torch.no_grad()
    def __call__(self, x_BNC: Tensor, normaliser_BHN1: Tensor) -> None:
        """Record one forward pass: the attention's input, and the normaliser of each query before the epsilon."""
        magnitude = x_BNC.abs().amax().to(normaliser_BHN1.dtype)
        live = normaliser_BHN1 > 0
        smallest = torch.where(live, normaliser_BHN1, torch.inf).amin()
        dead = (normaliser_BHN1 == 0).to(normaliser_BHN1.dtype).mean()
        self._rows.append(torch.stack([smallest, dead, magnitude, normaliser_BHN1.amax()]))

    def reading(self) -> Tensor:
        """Return (4,): smallest normaliser of a live query, share of dead queries, largest |x|, largest normaliser.

        Over all passes recorded; what is not finite in one of them is not finite here, for `amax` keeps NaN.

        Raises:
            RuntimeError: if nothing was recorded.
        """
        rows = torch.stack(self._rows)
        return torch.stack([rows[:, 0].amin(), rows[:, 1].mean(), rows[:, 2].amax(), rows[:, 3].amax()])
