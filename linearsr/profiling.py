"""Measurement of a noise profile: loss, mean gradient and gradient affinity of a network by level of log-SNR.

Every gradient is reduced at once to a sketch: its coordinates get random signs and are added up in buckets. Inner products of sketches are
unbiased for those of the gradients, and the sketches of S gradients at J levels are all that is kept. Draws are independent between
levels, so the product of two levels' means is unbiased too; a mean's product with itself also holds its noise and is replaced by the mean
over pairs of different draws (a U-statistic).
Source: method.md 5.3 P2; CountSketch of Charikar et al. 2002 with buckets by position; jackknife of Efron 1982.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from linearsr.experts import noise_level
from linearsr.noise_profile import NoiseProfile

Array = NDArray[np.float64]
Sketches = NDArray[np.float32]
"""(J, S, m): m numbers for each of S gradients at J levels."""
LossAt = Callable[[tuple[float, float], torch.Generator], Tensor]
"""From an interval of noise levels and a source of randomness to the mean loss of a fresh minibatch, a scalar."""

SKETCH_SIZE = 4093
"""Prime: where it divided the width of a weight matrix, each column would have its own bucket, and one large column would be all in one."""


def level_intervals(edges: Sequence[float]) -> tuple[tuple[float, float], ...]:
    """Return the (low, high) noise levels of each level between ascending log-SNR `edges`, noisiest first; together they tile [0, 1]."""
    times = [1.0, *(noise_level(edge) for edge in edges[1:-1]), 0.0]
    return tuple((low, high) for high, low in pairwise(times))


def measure_profile(
    loss_at: LossAt,
    parameters: Iterable[Tensor],
    *,
    edges: Sequence[float],
    mass: Sequence[float],
    samples: int,
    sketch_size: int = SKETCH_SIZE,
    seed: int = 0,
    source: dict[str, str] | None = None,
    on_level: Callable[[int, int], None] | None = None,
) -> NoiseProfile:
    """Measure loss and gradients level by level; the network and `.grad` stay as they are.

    Args:
        loss_at: Draws noise levels from the interval as training does; only the level that reaches t = 1 may hold draws put at its end.
        parameters: What the gradients are of; a tensor that the loss does not reach has gradient 0.
        edges: J + 1 ascending log-SNR.
        mass: Share of training draws in each level, as `linearsr.flow.interval_mass` gives it for `level_intervals(edges)`.
        samples: Minibatches a level, at least 3.
        sketch_size: Numbers kept of a gradient. Cosines of one run are off by up to 1 / sqrt(sketch_size), which the errors include.
        seed: Of the generator that `loss_at` gets and of the signs; the same seed gives the same profile.
        source: Free, kept in the profile.
        on_level: Called with (levels done, J) after each level.

    Raises:
        ValueError: if there are too few samples, or a loss or gradient is not finite.
    """
    if samples < 3 or sketch_size < 1:
        raise ValueError(
            f"profiling: got {samples} samples, sketch_size {sketch_size}; expected at least 3 and 1; fix: more samples a level"
        )
    weights, spans = list(parameters), level_intervals(edges)
    generator = torch.Generator().manual_seed(seed)
    # Not `seed` itself, or signs and draws would come from the same stream.
    sign_seed = int(torch.randint(2**62, (), generator=generator))
    losses, sketches = np.zeros((len(spans), samples)), np.zeros((len(spans), samples, sketch_size), dtype=np.float32)
    for level, span in enumerate(spans):
        for sample in range(samples):
            loss = loss_at(span, generator)
            losses[level, sample] = loss.item()
            gradients = torch.autograd.grad(loss, weights, allow_unused=True, materialize_grads=True)
            sketches[level, sample] = sketch(gradients, sketch_size, sign_seed).cpu().numpy()
        if not (np.isfinite(losses[level]).all() and np.isfinite(sketches[level]).all()):
            raise ValueError(f"profiling: got a loss or gradient not finite at noise levels {span}; expected finite; fix: other weights")
        if on_level is not None:
            on_level(level + 1, len(spans))
    moments = _moments(sketches)
    return NoiseProfile(
        edges=tuple(edges),
        mass=tuple(mass),
        loss=_floats(losses.mean(axis=1)),
        loss_error=_floats(losses.std(axis=1, ddof=1) / samples**0.5),
        gradient_norm=_floats(moments.norm),
        gradient_norm_error=_floats(moments.norm_error),
        affinity=tuple(_floats(row) for row in moments.affinity),
        affinity_error=tuple(_floats(row) for row in moments.affinity_error),
        samples=samples,
        source=source or {},
    )


def sketch(tensors: Iterable[Tensor], size: int, seed: int) -> Tensor:
    """Reduce tensors to (size,) float32 whose inner products are, on average over seeds, those of all coordinates of the tensors.

    Coordinates are numbered through all tensors; each gets a random sign, the same in every call with this seed on this kind of device, and
    number i goes into bucket i mod `size`. Costs time in proportion to the coordinates and the memory of the largest tensor.
    Source: Charikar et al. 2002; unbiased for any buckets, because the signs are independent.
    """
    total, start, signs = torch.zeros(size), 0, None
    for tensor in tensors:
        signs = signs or torch.Generator(tensor.device).manual_seed(seed)
        drawn = torch.empty(tensor.numel(), dtype=torch.int8, device=tensor.device).random_(0, 2, generator=signs)
        signed = tensor.detach().reshape(-1).float() * (2 * drawn - 1)
        buckets = torch.nn.functional.pad(signed, (0, -signed.numel() % size)).reshape(-1, size).sum(dim=0)
        total = total.to(tensor.device) + buckets.roll(start % size)
        start += tensor.numel()
    return total


@dataclass(frozen=True)
class _Moments:
    norm: Array  # (J,)
    norm_error: Array  # (J,)
    affinity: Array  # (J, J)
    affinity_error: Array  # (J, J)


def _moments(sketches: Sketches) -> _Moments:
    """Estimate norms and cosines of the mean gradients, and their standard errors by deleting one sample at a time.

    Both deletions of a pair of levels contain the product of the two noises, so it is taken off once. Where all is noise that product is
    the whole error, and without this every error would come out sqrt(2) times too large.
    """
    _, samples, size = sketches.shape
    means = sketches.mean(axis=1, dtype=np.float64)
    products = means @ means.T
    noise = _noise_products(sketches)
    with_means = np.stack([level.astype(np.float64) @ means.T for level in sketches])  # (J, S, J)
    own = np.einsum("jsj->js", with_means)
    energy = np.stack([np.square(level, dtype=np.float64).sum(axis=1) for level in sketches])
    rest = (samples * samples * np.diag(products) - energy.sum(axis=1))[:, None]
    squares = rest[:, 0] / (samples * (samples - 1))
    squares_without = (rest - 2 * samples * own + 2 * energy) / ((samples - 1) * (samples - 2))
    own_noise = 2 * np.diag(noise)
    spread = np.maximum(_jackknife(squares_without) - own_noise, own_noise) + 2 * squares**2 / size
    # No norm below its own error: it would turn an affinity that is nothing but noise into a large number.
    floor = np.sqrt(spread) + np.finfo(np.float64).tiny
    trusted = np.maximum(squares, floor)
    scale = np.sqrt(np.outer(trusted, trusted))
    affinity = np.clip(products / scale, -1, 1)
    without = (samples * products[:, None, :] - with_means) / (samples - 1)
    without /= np.sqrt(np.maximum(squares_without, floor[:, None])[:, :, None] * trusted)
    deleted = _jackknife(without)
    both = noise / scale**2
    error = np.sqrt(np.maximum(deleted + deleted.T - both, both) + (1 - affinity**2) ** 2 / size)
    # Dividing by the floor draws such affinities to 0, which their spread does not tell.
    lost = squares <= floor
    error[lost[:, None] | lost[None, :]] = 1.0
    np.fill_diagonal(affinity, 1.0)
    np.fill_diagonal(error, 0.0)
    return _Moments(np.sqrt(np.maximum(squares, 0)), np.sqrt(spread) / (2 * np.sqrt(trusted)), affinity, error)


def _noise_products(sketches: Sketches) -> Array:
    """Return the variance that noise alone gives to the product of two levels' means, (J, J): trace(Sigma_j Sigma_k) / S^2."""
    levels, samples, size = sketches.shape
    centred = sketches - sketches.mean(axis=1, keepdims=True)
    flat = centred.reshape(-1, size).T
    traces = np.zeros((levels, levels))
    for level in range(levels):
        squares = np.square(centred[level] @ flat, dtype=np.float64).reshape(samples, levels, samples)
        traces[level] = squares.sum(axis=(0, 2)) / (samples - 1) ** 2
        different = squares[:, level].sum() - np.trace(squares[:, level])
        traces[level, level] = different / (samples * (samples - 1))
    both: Array = (traces + traces.T) / (2 * samples**2)
    return both


def _jackknife(without: Array) -> Array:
    """Return the variance of an estimate from its values without each sample, along axis 1."""
    samples = without.shape[1]
    return np.asarray(without.var(axis=1) * (samples - 1), dtype=np.float64)


def _floats(values: Array) -> tuple[float, ...]:
    return tuple(float(value) for value in values)
