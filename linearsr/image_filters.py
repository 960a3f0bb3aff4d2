"""Blur, resizing, JPEG and sharpening of the second-order degradation, on OpenCV. Imports no torch.

Images are float32 (H, W, 3), blue first as OpenCV has them, 0 to 255 but for the overshoot of a filter; what is said to be uint8 is
rounded and clipped.
"""

from typing import Literal

import numpy as np
from numpy.typing import NDArray

from linearsr.blur_kernels import Kernel, KernelDraw, kernel_of, profile_of
from linearsr.opencv import opencv

Image = NDArray[np.float32]
Pixels = NDArray[np.uint8]
ResizeMode = Literal["area", "bilinear", "bicubic"]
RESIZE_MODES: tuple[ResizeMode, ...] = ("area", "bilinear", "bicubic")

_DIRECT_SIDE_PX = 11
"""Widest kernel that is summed directly; wider ones are quicker by Fourier transform. CPU time at 512 px, one thread: 11 px 2.8 ms, 13 px
12 ms, transform 3.7 ms and as much again for fresh memory; at 256 px .7, 4.8 and .9 ms."""
_USM_SIGMA_PX, _USM_REACH_PX, _USM_WEIGHT, _USM_THRESHOLD = 8, 25, 0.5, 10
"""Source: basicsr/utils/img_process_util.py, USMSharp: OpenCV's rule makes a deviation of 8 px of its 51 px kernel."""


def blur(image: Image, draw: KernelDraw) -> Image:
    """Filter with a drawn kernel; the image is mirrored at its edges, without repeating them."""
    cv2 = opencv()
    profile = profile_of(draw)
    if profile is not None:
        return cv2.sepFilter2D(image, cv2.CV_32F, profile, profile)  # type: ignore[no-any-return]
    kernel = kernel_of(draw)
    if kernel.shape[0] <= _DIRECT_SIDE_PX:
        return cv2.filter2D(image, cv2.CV_32F, kernel)  # type: ignore[no-any-return]
    return _filter_by_transform(image, kernel)


def resize(image: Image, width: int, height: int, mode: ResizeMode) -> Image:
    """Resize without antialiasing but for `area`, which averages all pixels that an output touches, as torch's `interpolate` does."""
    cv2 = opencv()
    if image.shape[:2] == (height, width):
        return image
    if mode == "area":
        return _average(image, width, height)
    kind = cv2.INTER_LINEAR if mode == "bilinear" else cv2.INTER_CUBIC
    return cv2.resize(image, (width, height), interpolation=kind)  # type: ignore[no-any-return]


def compress(image: Pixels, quality: float) -> Pixels:
    """Write as JPEG with colour at half resolution, and read back; `quality` in [1, 100] is rounded. uint8 to uint8."""
    cv2 = opencv()
    written, data = cv2.imencode(".jpg", image, [cv2.IMWRITE_JPEG_QUALITY, round(quality)])
    if not written:
        raise ValueError(f"degradation: got an image of shape {image.shape}; expected one that JPEG can hold")
    return cv2.imdecode(data, cv2.IMREAD_COLOR)  # type: ignore[no-any-return]


def to_pixels(image: Image) -> Pixels:
    """Round and clip to uint8."""
    cv2 = opencv()
    return cv2.add(image, 0.0, dtype=cv2.CV_8U)  # type: ignore[no-any-return]


def sharpen(image: Image) -> Image:
    """Sharpen edges by unsharp masking: where the image differs from its blur by more than 10 levels, by half of that difference.

    Each channel by itself; edges of the mask are soft. Source: Real-ESRGAN, section 3.5, and basicsr's USMSharp, which convolves with 51 x
    51 numbers. This is 71 dB from it (photographs of 512 px): in 8 bits one pixel in a hundred is another.
    """
    cv2 = opencv()
    residual = cv2.subtract(image, _blur_wide(image))
    _, mask = cv2.threshold(cv2.absdiff(residual, 0.0), _USM_THRESHOLD, 1, cv2.THRESH_BINARY)
    sharp = np.clip(cv2.addWeighted(image, 1, residual, _USM_WEIGHT, 0), 0, 255)
    change = cv2.multiply(cv2.subtract(sharp, image), _blur_wide(mask))
    return cv2.add(image, change)  # type: ignore[no-any-return]


def _blur_wide(image: Image) -> Image:
    """Blur with the Gaussian of sharpening, at half the resolution, which so wide a Gaussian leaves nothing out of."""
    cv2 = opencv()
    height, width = image.shape[:2]
    half = cv2.resize(image, (max(1, width // 2), max(1, height // 2)), interpolation=cv2.INTER_AREA)
    # Halving and doubling blur a little themselves: with a variance of 1 px^2, which is taken off here.
    distance = 2.0 * np.arange(-(_USM_REACH_PX // 2), _USM_REACH_PX // 2 + 1)
    profile = np.exp(-(distance**2) / (2 * (_USM_SIGMA_PX**2 - 1)))
    profile = (profile / profile.sum()).astype(np.float32)
    blurred = cv2.sepFilter2D(half, cv2.CV_32F, profile, profile)
    return cv2.resize(blurred, (width, height), interpolation=cv2.INTER_LINEAR)  # type: ignore[no-any-return]


def sharpen_pixels(image: Pixels) -> Pixels:
    """Sharpen uint8 (H, W, 3), in any order of channels, and round."""
    return to_pixels(sharpen(image.astype(np.float32)))


def _filter_by_transform(image: Image, kernel: Kernel) -> Image:
    """Convolve by way of the discrete Fourier transform; kernels here equal their mirror image, so this is correlation too."""
    cv2 = opencv()
    reach = kernel.shape[0] // 2
    height, width = image.shape[:2]
    rows, columns = (cv2.getOptimalDFTSize(side + 2 * reach) for side in (height, width))
    right, bottom = columns - width - reach, rows - height - reach
    window = np.zeros((rows, columns), np.float32)
    window[: kernel.shape[0], : kernel.shape[0]] = kernel
    spectrum = cv2.dft(window, window)
    result = np.empty_like(image)
    # One channel at a time and in place: fresh memory costs more than the transform.
    for channel in range(image.shape[2]):
        plane = cv2.copyMakeBorder(cv2.extractChannel(image, channel), reach, bottom, reach, right, cv2.BORDER_REFLECT_101)
        cv2.dft(plane, plane)
        cv2.mulSpectrums(plane, spectrum, 0, plane)
        cv2.dft(plane, plane, cv2.DFT_INVERSE | cv2.DFT_SCALE | cv2.DFT_REAL_OUTPUT)
        # The kernel's corner, not its centre, lies at the origin: results are shifted by its reach, and start where no wrap reaches.
        cv2.insertChannel(plane[2 * reach : 2 * reach + height, 2 * reach : 2 * reach + width], result, channel)
    return result


def _average(image: Image, width: int, height: int) -> Image:
    """Average over windows that cover what each output pixel touches, all pixels of a window alike."""
    cv2 = opencv()
    # Columns as rows of the transposed image: whole rows are quick to pick.
    rows = _average_rows(image, height)
    return cv2.transpose(_average_rows(cv2.transpose(rows), width))  # type: ignore[no-any-return]


def _average_rows(image: Image, wanted: int) -> Image:
    """Return `wanted` rows, each the mean of the rows that it touches."""
    side = image.shape[0]
    if side == wanted:
        return image
    index = np.arange(wanted)
    first, counts = index * side // wanted, -(-(index + 1) * side // wanted) - index * side // wanted
    total: Image = image[first]
    for step in range(1, counts.max()):
        reached = step < counts
        if reached.all():
            total += image[first + step]
        else:
            total[reached] += image[first[reached] + step]
    total *= (1 / counts).astype(np.float32)[:, None, None]
    return total
