"""What a network keeps for its backward pass, found without computing anything: on torch's meta device."""

from dataclasses import dataclass

import torch
from torch import Tensor

from linearsr.backbone import Backbone
from linearsr.conditioning import TextEmbedding
from linearsr_platform.recipe.schema import ModelSection
from linearsr_platform.recipe.train_schema import TrainConfig

TAGS = 100
"""Size of a vocabulary where the data has not been looked at: its embeddings are a small part of the parameters."""


@dataclass(frozen=True)
class NetworkSize:
    """What a training step of one micro-batch is about."""

    parameters: int
    activation_bytes: int
    """Saved for the backward pass by the forward of one micro-batch, parameters apart."""
    tokens: int
    """Latent positions of one crop."""


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
    return NetworkSize(sum(parameter.numel() for parameter in network.parameters()), held, side * side)


def _captions(model: ModelSection, count: int) -> Tensor | TextEmbedding:
    if model.text is None:
        return torch.ones(count, model.max_tags, dtype=torch.int64)
    tokens = model.text.max_tokens
    return TextEmbedding(torch.empty(count, tokens, model.resolved_backbone.caption_width), torch.ones(count, tokens, dtype=torch.bool))


def _storage(tensor: Tensor) -> int:
    """Return the identity of a tensor's memory, which a meta tensor has too."""
    return int(tensor.untyped_storage()._cdata)  # noqa: SLF001 (`data_ptr` is 0 for every meta tensor)
