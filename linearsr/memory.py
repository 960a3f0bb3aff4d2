"""What a forward needs in memory, and from it whether a picture is enlarged whole or in tiles.

Linear attention keeps no N x N matrix, so every term is linear in the tokens N of the forward. Notation: C width, F hidden channels of
Mix-FFN, c latent channels, S stem channels. A DC-AE codec adds its weights and one of its tiles, see `linearsr.codec_memory`.
`tests/unit/test_memory.py` holds the plan against what was measured.
"""

from dataclasses import dataclass, replace
from math import isqrt
from pathlib import Path
from typing import Self

import torch

from linearsr.attention import absorption_pays
from linearsr.bands import largest_band
from linearsr.bundle import Bundle
from linearsr.codec_memory import CodecMemory
from linearsr.codec_source import CodecError
from linearsr.colour import ColourFix
from linearsr.config import ModelConfig
from linearsr.dcae import tile_size
from linearsr.forward_only import folded_values, mix_ffn_values
from linearsr.linear import product_dtype
from linearsr.residency import Residency, expert_parameters, network_dtype
from linearsr.tiles import Tiling, cut, whole
from linearsr.upscaler import token_grid

LATENT_STATE = 7
"""Latents held while the network runs, float32: noise, start, state, last estimate, prior mean, known part, blended estimate."""
LR_STATE = 2
"""LR pictures held all the time, float32: padded, and in the network's range."""
EMBEDDED_STATE = 4
"""Pictures held while an embedded codec decodes, float32: latent, scaled latent, mixed, and put in place."""
PICTURE_STATE: dict[ColourFix, int] = {"wavelet": 6, "adain": 4, "none": 2}
"""Pictures held after decoding, float32. `none`: decoded, and brought into [0, 1]. `adain`: decoded, source, and two between them.
`wavelet`: decoded, source, and of their difference's low band rows, their sum, columns, and their sum."""
MIN_SIDE = 16
"""Smallest tile: with fewer tokens most of a tile is overlap."""
SMALLEST_CODEC_TILE = 16
"""Smallest tile of a DC-AE that is advised where larger ones do not fit: the last with its full overlap. Mean squared difference to whole
decoding over the picture's variance, 48 x 48 positions, a small autoencoder of SANA's kinds of stages with random weights: of white latents
0.10 at 32, 0.19 at 16, 0.38 at 8, 0.54 at 4; of smooth ones 0.33, 0.48, 0.63, 0.70."""
HUGE = 1 << 16
"""Side of a picture, in tokens, that is larger than any."""
USABLE = 0.8
"""Share of the free memory that a plan may use: allocators fragment, and the plan is an estimate."""
SYSTEM_MEMORY = Path("/proc/meminfo")
CONTAINER_MEMORY = Path("/sys/fs/cgroup")
CONTAINER_FILES = (
    ("memory.max", "memory.current", "memory.stat", "inactive_file"),
    ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes", "memory/memory.stat", "total_inactive_file"),
)
"""Of control groups of the second and the first generation: limit, what is used, and where how much of that is idle page cache."""


class PictureTooLarge(ValueError):
    """A picture does not fit even in tiles; the message has the arithmetic."""


@dataclass(frozen=True, slots=True)
class MemoryPlan:
    """How one picture is enlarged, and what that takes."""

    tiling: Tiling
    residency: Residency
    weight_bytes: int
    """Weights on the device, the codec's too."""
    network_bytes: int
    """Latents and activations while the network runs, at its widest point."""
    picture_bytes: int
    """Pixels while an embedded codec decodes the latent, and while colours are fixed; the network is idle then."""
    codec_weight_bytes: int
    """Those of `weight_bytes` that are a DC-AE's."""
    codec_bytes: int
    """Activations, latents and pixels while a DC-AE codes, at its widest point; the network is idle then too."""
    codec_tile: tuple[int, int] | None
    """Rows and columns of latent positions of a tile that a DC-AE codes at once, at most the picture's; None if there is none to count."""
    codec_counted: bool
    """False if there is a DC-AE that is not on this machine, so that nothing of it is in here."""
    budget_bytes: int

    @property
    def peak_bytes(self) -> int:
        """Most bytes held at once."""
        return self.weight_bytes + max(self.network_bytes, self.picture_bytes, self.codec_bytes)

    @property
    def parts(self) -> str:
        """What `peak_bytes` is made of, in words: the weights, and the largest of what is held beside them, one after the other."""
        codec = f", {shown_bytes(self.codec_weight_bytes)} of them the codec's," if self.codec_bytes else ""
        largest = f"network {shown_bytes(self.network_bytes)}, picture {shown_bytes(self.picture_bytes)}"
        if self.codec_tile is not None:
            shape = "whole" if self.codec_tile == self.tiling.grid else f"in tiles of {self.codec_tile[1]} x {self.codec_tile[0]}"
            largest += f", codec {shown_bytes(self.codec_bytes)} {shape}"
        missing = "" if self.codec_counted else "; the DC-AE is not here and not counted"
        return f"weights {shown_bytes(self.weight_bytes)}{codec} and the largest of {largest}{missing}"

    @property
    def num_tokens(self) -> int:
        """Tokens of the picture."""
        return self.tiling.grid[0] * self.tiling.grid[1]

    @property
    def tile(self) -> int | None:
        """Tokens along a tile's side as `Upscaler.upscale_tensor` takes it; None for the whole picture at once."""
        return None if self.tiling.num_tiles == 1 else max(self.tiling.side)


@dataclass(frozen=True, kw_only=True, slots=True)
class MemoryModel:
    """Bytes that a network takes, by arithmetic on its configuration."""

    config: ModelConfig
    num_experts: int
    expert_parameters: int
    dtype_bytes: int
    """Bytes of a number in the network."""
    device_type: str = "cpu"
    """On `cuda` the next expert is copied beside the running one."""
    caption_tokens: int = 1
    """Tokens of a caption, at most."""
    codec: CodecMemory | None = None
    """Of the DC-AE; None for an embedded codec, which has no weights, and for a DC-AE that is not here."""

    @classmethod
    def of(cls, bundle: Bundle, device_type: str = "cpu") -> Self:
        """Read a bundle's configuration, the header of one expert's file, and the settings of a DC-AE.

        A DC-AE that cannot be had is left out: what is wrong with it is said when it is needed.
        """
        try:
            codec = CodecMemory.of(bundle.config.codec)
        except CodecError:
            codec = None
        return cls(
            config=bundle.config,
            num_experts=len(bundle.experts),
            expert_parameters=expert_parameters(bundle),
            dtype_bytes=network_dtype(bundle).itemsize,
            device_type=device_type,
            caption_tokens=1 + bundle.config.tags.max_tags if bundle.text is None else bundle.text.encoder.max_tokens,
            codec=codec,
        )

    def weights(self, residency: Residency) -> int:
        """Return the bytes of the weights on the device, those of a DC-AE included: it stays there once it was used."""
        slots = self.num_experts if residency == "all" else min(self.num_experts, 2 if self.device_type == "cuda" else 1)
        return self.expert_parameters * self.dtype_bytes * slots + self._codec_weights

    def activations(self, grid: tuple[int, int]) -> int:
        """Return the bytes of one forward at the widest point of a block, with the network's input beside it.

        A GPU. Mix-FFN: stream and modulated input 2 C, its hidden map 2 F, the same activated 2 F and after the depthwise convolution
        2 F, and the product F. Attention: see `_attention`. A CPU has Mix-FFN and attention in pieces, see `linearsr.forward_only`, so
        that stream, modulated input and result, 3 C, are all that all tokens have there, and cross-attention can be wider.
        """
        shape, size, wide = self.config.backbone, self.dtype_bytes, max(self.dtype_bytes, self._copied)
        num_tokens = grid[0] * grid[1]
        inputs = num_tokens * (self.config.codec.latent_channels + 2 * shape.stem_width) * size
        if self.device_type == "cuda":
            return inputs + max(num_tokens * (2 * shape.width + 7 * shape.ffn_width) * size, self._attention(num_tokens))
        stream = num_tokens * 3 * shape.width * size
        weights = 3 * shape.ffn_width * shape.width * self._copied
        feed_forward = stream + mix_ffn_values(grid, shape.width, shape.ffn_width) * wide + weights
        return inputs + max(feed_forward, self._attention(num_tokens), self._cross_attention(num_tokens))

    def _attention(self, num_tokens: int) -> int:
        """Return the bytes of attention.

        Stream and modulated input 2 C, q, k, v 3 C, mixed values C, the normaliser, and of a band in float32 a query's ReLU and its sums
        2 C. QK-norm: q, k, v as they are, normed, and side by side 8 C. Folded: stream, modulated input and result 3 C, the normaliser,
        and what `folded_values` counts.
        """
        shape, size, wide = self.config.backbone, self.dtype_bytes, max(self.dtype_bytes, 4)
        folds = self.device_type == "cpu" and not shape.qk_norm and num_tokens >= shape.width and max(size, self._copied) >= 4
        normaliser = shape.width // shape.head_width * wide
        if not folds:
            band = largest_band(num_tokens, 3 * shape.width) if self.device_type == "cpu" else num_tokens
            mixed = num_tokens * (6 * shape.width * size + normaliser) + band * 2 * shape.width * wide
            return max(mixed, num_tokens * 10 * shape.width * size if shape.qk_norm else 0)
        weights = 4 * shape.width**2 * self._copied
        return num_tokens * (3 * shape.width * size + normaliser) + folded_values(num_tokens, shape.width) * wide + weights

    def _cross_attention(self, num_tokens: int) -> int:
        """Return the bytes of cross-attention on a CPU.

        Stream, queries, mixed values and result 4 C; halves without instructions have float32 copies of queries, and of the last
        projection's input and result. Absorbed: stream and result 2 C, the same in float32, scores and shares 2 H T.
        """
        shape, size, wide = self.config.backbone, self.dtype_bytes, max(self.dtype_bytes, 4)
        plain = shape.width * (4 * size + 3 * self._copied)
        absorbed = shape.width * (2 * size + 2 * self._copied) + 2 * shape.num_cross_heads * self._absorbed(num_tokens) * wide
        return num_tokens * max(plain, absorbed)

    def captions(self, num_tokens: int) -> int:
        """Return the bytes of a caption as all blocks of one expert read it, at its longest for a picture of `num_tokens`.

        Keys and values, 2 T C a block, or absorbed weights, 2 H T C in float32; halves only where a CPU has no instructions for them.
        """
        shape = self.config.backbone
        plain = self.caption_tokens * self.dtype_bytes
        wide = shape.num_cross_heads * self._absorbed(num_tokens) * max(self.dtype_bytes, 4)
        return 2 * shape.num_blocks * shape.width * max(plain, wide)

    def network(self, tiling: Tiling) -> int:
        """Return the bytes of latents and captions, which cover the picture, and of activations, which cover a tile."""
        tokens = tiling.grid[0] * tiling.grid[1]
        latents = LATENT_STATE * 4 * self.config.codec.latent_channels
        held = tokens * (latents + 4 * self.config.backbone.stem_width) + self._low(tiling.grid)
        return held + self.captions(tokens) + self.activations(tiling.side)

    def picture(self, grid: tuple[int, int], colour_fix: ColourFix = "none") -> int:
        """Return the bytes of an embedded codec's decoding, and of a colour fix."""
        state = PICTURE_STATE[colour_fix]
        if self.config.codec.kind != "dc-ae":
            state = max(state, EMBEDDED_STATE)
        return state * self._picture(grid) + self._low(grid)

    def coding(self, grid: tuple[int, int]) -> int:
        """Return the bytes while a DC-AE codes, 0 if there is none: it encodes the bicubic picture for the LR prior, and decodes."""
        if self.codec is None:
            return 0
        encode = self._picture(grid) + self.codec.encode(grid) if self.config.prior == "lr" else 0
        latents = LATENT_STATE * 4 * self.config.codec.latent_channels * grid[0] * grid[1]
        return latents + self._low(grid) + max(encode, self.codec.decode(grid))

    def plan(
        self,
        lr_size_px: tuple[int, int],
        budget_bytes: int,
        *,
        residency: Residency | None = None,
        tile: int | None = None,
        colour_fix: ColourFix = "none",
    ) -> MemoryPlan:
        """Choose whole or tiles, and which experts stay on the device.

        The whole picture with all experts is best, then the whole picture with one expert at a time, then tiles, the largest first.

        Args:
            lr_size_px: (height, width) of the LR picture.
            budget_bytes: memory that may be used.
            residency: None chooses.
            tile: side of a tile in tokens; None chooses.
            colour_fix: what is done to the picture at the end.

        Raises:
            PictureTooLarge: if the smallest tiles do not fit.
        """
        grid = token_grid(*lr_size_px, self.config.lr_pixels_per_token)
        wanted: tuple[Residency, ...] = ("all", "one") if residency is None else (residency,)
        tilings = self._tilings(grid) if tile is None else [cut(grid, tile)]
        plans = [self._plan(tiling, kind, budget_bytes, colour_fix) for tiling in tilings for kind in wanted]
        fitting = next((plan for plan in plans if plan.peak_bytes <= budget_bytes), None)
        if fitting is not None:
            return fitting
        # Where picture or codec decide, every tile takes as much: the smallest shows that tiles do not help.
        least = min(plans, key=lambda plan: (plan.peak_bytes, plan.network_bytes))
        if tile is not None and residency is not None:
            return least
        shape = "whole" if least.tile is None else f"in tiles of {least.tile}"
        codec_tile = self._fitting_codec_tile(least)
        advice = "" if codec_tile is None else f", --codec-tile {codec_tile}, which changes the picture,"
        raise PictureTooLarge(
            f"memory: got {shown_bytes(budget_bytes)}; expected {shown_bytes(least.peak_bytes)} for {grid[1]} x {grid[0]} tokens {shape} "
            f"({least.parts}); fix: a smaller picture{advice or ','} or --memory GB if more is there"
        )

    def residency(self, lr_size_px: tuple[int, int], budget_bytes: int) -> Residency:
        """Return how to hold the experts for a picture, (height, width), that is made whole: all of them if they fit then."""
        tiling = whole(token_grid(*lr_size_px, self.config.lr_pixels_per_token))
        return "all" if self._plan(tiling, "all", budget_bytes, "none").peak_bytes <= budget_bytes else "one"

    def largest_whole_px(self, budget_bytes: int, residency: Residency = "all") -> int:
        """Return the side of the largest square output, in pixels, that fits at once without a colour fix; 0 if none does."""
        room = budget_bytes - self.weights(residency)
        # Of a picture so large that what does not grow with it is nothing; no picture takes less a token.
        per_token = max(self.network(whole((HUGE, HUGE))) // HUGE**2, self.picture((1, 1)))
        side = isqrt(max(0, room // per_token))
        # A codec's tiles get smaller where one more is needed, so its bytes do not only grow; captions take theirs at any size.
        while side > 0 and max(self.network(whole((side, side))), self.coding((side, side))) > room:
            side -= 1
        return side * self.config.codec.factor

    def _fitting_codec_tile(self, plan: MemoryPlan) -> int | None:
        """Return the largest tile of the codec with which a plan would fit that its codec makes too large; None if none does."""
        if self.codec is None:
            return None
        for tile in range(self.codec.tile - 1, SMALLEST_CODEC_TILE - 1, -1):
            coding = replace(self, codec=replace(self.codec, tile=tile)).coding(plan.tiling.grid)
            if plan.weight_bytes + max(plan.network_bytes, plan.picture_bytes, coding) <= plan.budget_bytes:
                return tile
        return None

    def _absorbed(self, num_tokens: int) -> int:
        """Return the most tokens of a caption that are absorbed for so many tokens of a picture."""
        shape = self.config.backbone
        if shape.qk_norm or (self.dtype_bytes < 4 and not self._copied):
            return 0
        lengths = range(self.caption_tokens, 0, -1)
        return next((length for length in lengths if absorption_pays(num_tokens, length, shape.width, shape.num_cross_heads)), 0)

    @property
    def _copied(self) -> int:
        """Bytes of a weight's float32 copy while a CPU multiplies halves that it has no instructions for; else 0."""
        halves = self.device_type == "cpu" and self.dtype_bytes < 4
        return 4 if halves and product_dtype(torch.empty(0, dtype=torch.bfloat16)) == torch.float32 else 0

    @property
    def _codec_weights(self) -> int:
        return 0 if self.codec is None else self.codec.weight_bytes

    def _picture(self, grid: tuple[int, int]) -> int:
        return 4 * 3 * self.config.codec.factor**2 * grid[0] * grid[1]

    def _low(self, grid: tuple[int, int]) -> int:
        return LR_STATE * 4 * 3 * self.config.lr_pixels_per_token**2 * grid[0] * grid[1]

    def _plan(self, tiling: Tiling, residency: Residency, budget_bytes: int, colour_fix: ColourFix) -> MemoryPlan:
        return MemoryPlan(
            tiling=tiling,
            residency=residency,
            weight_bytes=self.weights(residency),
            network_bytes=self.network(tiling),
            picture_bytes=self.picture(tiling.grid, colour_fix),
            codec_weight_bytes=self._codec_weights,
            codec_bytes=self.coding(tiling.grid),
            codec_tile=None if self.codec is None else tile_size(tiling.grid, self.codec.tile),
            codec_counted=self.codec is not None or self.config.codec.kind != "dc-ae",
            budget_bytes=budget_bytes,
        )

    @staticmethod
    def _tilings(grid: tuple[int, int]) -> list[Tiling]:
        """Return the cuts to try, the best first: whole, then sides that shrink by an eighth down to the smallest."""
        found, side = [whole(grid)], max(grid)
        while side > MIN_SIDE:
            side = max(MIN_SIDE, side * 7 // 8)
            found.append(cut(grid, side))
        return found


def shown_bytes(count: int) -> str:
    """Return bytes as a person reads them: GB of 1e9 bytes, or MB where that would be 0.0 and something."""
    return f"{count / 1e9:.2f} GB" if count >= 1e8 else f"{count / 1e6:.1f} MB"


def free_bytes(device: torch.device) -> int:
    """Return the memory that can still be used on a device; on the CPU what system and container leave.

    Raises:
        OSError: if the system does not tell.
    """
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    fields = dict(line.split(":", 1) for line in SYSTEM_MEMORY.read_text(encoding="ascii").splitlines())
    available = int(fields["MemAvailable"].split()[0]) * 1024
    return min([available, *_left_of_container()])


def _left_of_container() -> list[int]:
    """Return what the limit of each generation of Linux's control groups leaves; nothing where there is none."""
    left = []
    for limit, used, stat, cached in CONTAINER_FILES:
        if not (CONTAINER_MEMORY / limit).is_file():
            continue
        allowed = (CONTAINER_MEMORY / limit).read_text(encoding="ascii").strip()
        if allowed.isdigit():
            # gVisor has the first two files alone.
            told = (CONTAINER_MEMORY / stat).read_text(encoding="ascii") if (CONTAINER_MEMORY / stat).is_file() else ""
            fields = dict(line.split() for line in told.splitlines())
            # Files that were read count as used; those that nobody has touched since are given back first.
            taken = int((CONTAINER_MEMORY / used).read_text(encoding="ascii")) - int(fields.get(cached, 0))
            left.append(max(0, int(allowed) - max(0, taken)))
    return left
