"""What a network keeps for its backward pass, found without computing anything: on torch's meta device. And what its workers take."""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from linearsr.backbone import Backbone
from linearsr.codec_memory import CodecMemory
from linearsr.codec_source import CodecError
from linearsr.conditioning import TextEmbedding
from linearsr_platform.recipe.schema import ModelSection, Recipe
from linearsr_platform.recipe.train_schema import TrainConfig
from linearsr_platform.train.footprint import Footprint, footprint

TAGS = 100
"""Size of a vocabulary where the data has not been looked at: its embeddings are a small part of the parameters."""


@dataclass(frozen=True, kw_only=True)
class NetworkSize:
    """What a training step of one micro-batch is about."""

    parameters: int
    activation_bytes: int
    """Saved for the backward pass by the forward of one micro-batch, parameters apart."""
    tokens: int
    """Latent positions of one crop."""
    codec_weight_bytes: int = 0
    """Of a DC-AE."""
    coding_bytes: int = 0
    """What it holds while it codes the larger of a micro-batch and a batch of validation crops."""
    codec_counted: bool = True
    """False for a DC-AE whose settings are not here."""

    def footprint(self, train: TrainConfig, *, gpu: bool) -> Footprint:
        """Return what one worker takes that trains it."""
        return footprint(
            train,
            parameters=self.parameters,
            activation_bytes=self.activation_bytes,
            codec_weight_bytes=self.codec_weight_bytes,
            coding_bytes=self.coding_bytes,
            gpu=gpu,
        )


def worker_bytes(recipe: Recipe, train: TrainConfig) -> dict[int, float]:
    """Return the host memory to keep for a worker of a training stage, by how many it has, from its fewest; see `reserved_bytes`."""
    gpu = recipe.cluster.gpus_per_worker > 0
    trains = {workers: train.on_workers(workers) for workers in range(train.least_workers, train.workers + 1)}
    # In a thread, because a Ctrl-C may be lost here: the interpreter drops what is raised while a weak reference goes, and importing
    # diffusers and counting let go of thousands.
    with ThreadPoolExecutor(max_workers=1) as aside:
        sizes = {workers: aside.submit(training_size, recipe, one).result() for workers, one in trains.items()}
    return {workers: sizes[workers].footprint(one, gpu=gpu).reserved_bytes(workers, gpu=gpu) for workers, one in trains.items()}


def training_size(recipe: Recipe, train: TrainConfig) -> NetworkSize:
    """Return the size of a stage's network with its codec."""
    size = network_size(recipe.model, train)
    try:
        codec = CodecMemory.of(recipe.model.codec)
    except CodecError:
        return replace(size, codec_counted=False)
    if codec is None:
        return size
    factor, validation = recipe.model.codec.factor, recipe.validation
    crop, shown = ((px // factor, px // factor) for px in (train.crop_px, validation.crop_px))
    coding = max(
        codec.at_once(crop, train.micro_batch_size) * codec.encode(crop),
        codec.at_once(shown, validation.batch_size) * max(codec.encode(shown), codec.decode(shown)),
    )
    return replace(size, codec_weight_bytes=codec.weight_bytes, coding_bytes=coding)


def network_size(model: ModelSection, train: TrainConfig, *, num_tags: int = TAGS) -> NetworkSize:
    """Return parameters and activations of a training stage's network; takes a third of a second for 1.6 G parameters."""
    shape, codec, count = model.resolved_backbone, model.codec, train.micro_batch_size
    side, lr_side = train.crop_px // codec.factor, train.crop_px // model.scale
    with torch.device("meta"):
        network = Backbone(
            shape,
            latent_channels=codec.latent_channels,
            lr_pixels_per_token=max(1, codec.factor // model.scale),
            num_tags=num_tags,
            caption_encoder="learned" if model.text is None else "text",
        )
        if train.precision == "bfloat16":
            network = network.bfloat16()
        latent, low = torch.empty(count, codec.latent_channels, side, side), torch.empty(count, 3, lr_side, lr_side)
        captions = _captions(model, count)
        saved: dict[int, Tensor] = {}
        own = {_storage(parameter) for parameter in network.parameters()}

        def pack(tensor: Tensor) -> Tensor:
            if _storage(tensor) not in own:
                # The tensor is kept, so that no other can get its address.
                saved[_storage(tensor)] = tensor
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            network(latent, torch.empty(count), network.prepare(low, captions))
    held = sum(tensor.untyped_storage().nbytes() for tensor in saved.values())
    return NetworkSize(parameters=sum(one.numel() for one in network.parameters()), activation_bytes=held, tokens=side * side)


def _captions(model: ModelSection, count: int) -> Tensor | TextEmbedding:
    if model.text is None:
        return torch.ones(count, model.max_tags, dtype=torch.int64)
    tokens = model.text.max_tokens
    return TextEmbedding(torch.empty(count, tokens, model.resolved_backbone.caption_width), torch.ones(count, tokens, dtype=torch.bool))


def _storage(tensor: Tensor) -> int:
    """Return the identity of a tensor's memory, which a meta tensor has too."""
    return int(tensor.untyped_storage()._cdata)  # noqa: SLF001 (`data_ptr` is 0 for every meta tensor)
