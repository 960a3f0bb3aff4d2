"""Small tensors that do not change, on every device that asks for them."""

import torch
from torch import Tensor


class Constant:
    """Copied to a device once: while a copy from ordinary host memory is made, the host waits for all work that is queued on the device.

    Not a buffer of a module: a module cast to bfloat16 would round it.
    """

    def __init__(self, value: Tensor) -> None:
        """Keep the value, on the CPU."""
        self.value = value
        self._copies: dict[torch.device, Tensor] = {}

    def on(self, device: torch.device) -> Tensor:
        """Return the value on a device."""
        if device == self.value.device:
            return self.value
        if device not in self._copies:
            # Made once: in inference mode it would be of no use to whoever wants a gradient later.
            with torch.inference_mode(mode=False):
                self._copies[device] = self.value.to(device)
        return self._copies[device]

    def __reduce__(self) -> tuple[type["Constant"], tuple[Tensor]]:
        """Travel without copies: processes that read data unpickle a task too, and none of them shall open a device."""
        return Constant, (self.value,)
