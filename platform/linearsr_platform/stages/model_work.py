"""What the models take that work on photographs beside training: how long and how much memory, and so who does it, and where."""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from math import prod
from pathlib import Path

from linearsr.artefacts import evaluation_tiles
from linearsr.codec_memory import CodecMemory
from linearsr.codec_source import CodecError
from linearsr.config import ModelConfig, TextEncoderConfig
from linearsr.memory import MemoryModel
from linearsr.residency import Residency
from linearsr.text import encoder_bytes, encoder_parameters
from linearsr.upscaler import token_grid
from linearsr_platform.cluster.capacity import Room, Share
from linearsr_platform.recipe.schema import Recipe
from linearsr_platform.stages.activations import network_size
from linearsr_platform.stages.measuring import ESTIMATES
from linearsr_platform.train.footprint import FLOAT32, PROCESS_BYTES

ANY_BYTES = 2**62
"""A budget that nothing exceeds."""
ALONE_FLOP = 1e13
"""As much as one process does alone: it takes a CPU core two minutes and more, where workers take a quarter of one to start."""
DC_AE_FLOP = 8.0e6
"""Of decoding a pixel by SANA's DC-AE: 8.4 TFLOP for 1024 x 1024 px, see tests/benchmarks/README.md. Encoding, which was not counted, is
taken to be as much."""
PHOTOGRAPH_PX = 1024**2
"""Of a photograph that nobody has looked at yet."""


@dataclass(frozen=True, kw_only=True)
class ModelWork:
    """What models have to do with each of some photographs."""

    flop: float = 0.0
    """For one photograph; 0 where no model works on them."""
    memory_bytes: float = 0.0
    """Host memory of a worker, its process included; 0 reserves none."""

    def gpus(self, recipe: Recipe) -> float:
        """Return the GPUs of a worker: none where no model works on photographs."""
        return recipe.cluster.gpus_per_picture_worker if self.flop else 0.0

    def device(self, recipe: Recipe) -> str:
        """Return where a worker of the cluster has the models."""
        return "cuda" if self.gpus(recipe) else "cpu"

    def wants_cluster(self, recipe: Recipe, count: int) -> bool:
        """Say whether so many photographs are worth a cluster: many, or slow, or such as a GPU is meant for."""
        return count >= recipe.data.parallel_from or count * self.flop > ALONE_FLOP or (count > 0 and self.gpus(recipe) > 0)

    def share(self, recipe: Recipe, room: Room) -> Share:
        """Return what one worker reserves; one CPU, because sums run on one thread, to be the same on any machine."""
        own = recipe.cluster.memory_gb_per_worker
        memory = self.memory_bytes if own is None or not self.flop else own * 1e9
        return room.attainable(Share(cpus=1.0, gpus=self.gpus(recipe), memory_bytes=memory), 1)


def preparing_work(recipe: Recipe) -> ModelWork:
    """Return what it takes to embed the prompts of a photograph and to encode it, where the recipe's shards have that.

    Raises:
        TextEncoderError: if the text encoder's files are damaged.
    """
    flop = memory = 0.0
    if (text := recipe.model.text) is not None:
        reading = reading_work(text)
        flop += reading.flop * (2 if recipe.model.tags_from_lr else 1)
        memory += reading.memory_bytes - PROCESS_BYTES
    if recipe.data.latents and (codec := _codec(recipe)) is not None:
        flop += DC_AE_FLOP * PHOTOGRAPH_PX
        # A whole photograph, in tiles if it is larger.
        memory += codec.weight_bytes + codec.encode((codec.tile, codec.tile))
    return ModelWork(flop=flop, memory_bytes=PROCESS_BYTES + memory if flop else 0.0)


def reading_work(text: TextEncoderConfig) -> ModelWork:
    """Return what it takes to read the tags of a photograph by a text encoder, whose weights are in host memory before a GPU has them.

    Raises:
        TextEncoderError: if its files are damaged.
    """
    if not Path(text.folder).is_dir():
        return ModelWork()
    return ModelWork(flop=2.0 * encoder_parameters(text) * text.max_tokens, memory_bytes=PROCESS_BYTES + encoder_bytes(text))


def measuring_work(recipe: Recipe, lr_size_px: tuple[int, int], residency: Residency = "all") -> ModelWork:
    """Return what it takes to measure a run's bundle: experts held by `residency`, and pictures made whole.

    Args:
        recipe: of the run.
        lr_size_px: (height, width) of the largest LR picture.
        residency: whether all experts are in memory; on a GPU the host reads one after the other.
    """
    memory, on_gpu = _memory_model(recipe), recipe.cluster.gpus_per_picture_worker > 0
    grid = token_grid(*lr_size_px, memory.config.lr_pixels_per_token)
    steps = recipe.sampler.num_steps
    sweep = [other for other in recipe.evaluate.step_sweep if other != steps]
    # Each estimate is made whole and, where tiles cut it, in tiles.
    times = 2 if evaluation_tiles(grid).num_tiles > 1 else 1
    forwards = times * (1 + steps) + sum(sweep)
    guided = 1 if recipe.sampler.guidance_scale == 1 else 2
    flop = 2.0 * memory.expert_parameters * prod(grid) * forwards * guided
    if recipe.model.codec.kind == "dc-ae":
        flop += DC_AE_FLOP * prod(grid) * recipe.model.codec.factor**2 * (times * len(ESTIMATES) + len(sweep))
    held = memory.plan(lr_size_px, ANY_BYTES, residency=residency).peak_bytes
    return ModelWork(flop=flop, memory_bytes=PROCESS_BYTES + (memory.weights("one") if on_gpu else held))


def measuring_share(recipe: Recipe, lr_size_px: tuple[int, int], room: Room) -> Share:
    """Return what a worker reserves that measures: memory for all experts, or for one where no machine has room for all."""
    work = measuring_work(recipe, lr_size_px)
    if room.nodes and work.memory_bytes > max(node.memory_bytes for node in room.nodes):
        work = measuring_work(recipe, lr_size_px, "one")
    return work.share(recipe, room)


def _memory_model(recipe: Recipe) -> MemoryModel:
    model, train = recipe.model, recipe.finetune.train
    # In a thread, because a Ctrl-C may be lost here; see `activations.worker_bytes`.
    with ThreadPoolExecutor(max_workers=1) as aside:
        parameters = aside.submit(network_size, model, train).result().parameters
    return MemoryModel(
        config=ModelConfig(scale=model.scale, codec=model.codec, backbone=model.resolved_backbone, flow=model.flow, prior=model.prior),
        num_experts=len(recipe.experts.resolved_boundaries) + 1,
        expert_parameters=parameters,
        dtype_bytes=2 if train.precision == "bfloat16" else FLOAT32,
        caption_tokens=1 + model.max_tags if model.text is None else model.text.max_tokens,
        codec=_codec(recipe),
    )


def _codec(recipe: Recipe) -> CodecMemory | None:
    """Return what the DC-AE takes; None if there is none, or it is not here, which is said when it is needed."""
    try:
        return CodecMemory.of(recipe.model.codec)
    except CodecError:
        return None
