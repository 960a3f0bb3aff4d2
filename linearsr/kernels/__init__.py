"""C++ kernels for a CPU, as an option: the parts of a network between its matrix products, and PSNR of luminance.

Nothing here is needed: plain torch computes the same, and is the default. A machine compiles the sources beside this file for itself, once
(`linearsr.kernels.build`); they know nothing of torch or Python, so that a compiler is all it takes.
"""

from linearsr.kernels.functions import compiled_gated_depthwise, compiled_relu_attention
from linearsr.kernels.library import HEAD_WIDTH, Kernels, KernelsError
from linearsr.kernels.users import UsesKernels, use_kernels

__all__ = [
    "HEAD_WIDTH",
    "Kernels",
    "KernelsError",
    "UsesKernels",
    "compiled_gated_depthwise",
    "compiled_relu_attention",
    "use_kernels",
]
