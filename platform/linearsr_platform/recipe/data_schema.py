"""Settings of the data: which photographs, and how they become shards. Imports no torch."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated

from pydantic import Field

from linearsr_platform.recipe.section import Count, CountOrZero, Positive, Section


class SourceConfig(Section):
    """Where photographs come from."""

    url: str
    """Folder, glob or fsspec URL; `package://NAME/SUBFOLDER` is a folder inside an installed Python package. The photographs inside
    WebDataset tars (`*.tar`) that are found there are taken too, labelled by the `KEY.json`, `KEY.txt` or `KEY.cls` beside them."""
    table: str | None = None
    """CSV beside the recipe: `file,split,quality,tags,licence,source`. With it, only the files it names are taken."""
    halve_jpeg: bool = True
    """Halve JPEG sources by Lanczos so that their 8 px blocks do not teach the network JPEG."""
    limit: Count | None = None
    """Take at most this many images, in order of name."""


class DataConfig(Section):
    """What `prepare` turns into shards."""

    sources: Annotated[dict[str, SourceConfig], Field(min_length=1)]
    """Sources by name; plain text is short for `{url: TEXT}`, so that `--set data.sources.NAME=URL` adds one."""
    held_out: tuple[str, ...] = ()
    """File stems that are never trained on, beside those a table marks `held-out`."""
    validation_px: CountOrZero = 128
    """Width of the strip cut off each training photograph for validation crops, HR pixels; 0 cuts none."""
    min_side_px: Count = 64
    """Images with a shorter side are quarantined."""
    samples_per_shard: Count = 1000
    """Images a `.tar` shard."""
    cache_gb: Annotated[Positive, Field(exclude=True)] = 20.0
    """Room on each machine for copies of remote shards, GB; local ones are read where they are. No part of a result's identity."""
    cache_folder: Annotated[str | None, Field(exclude=True)] = None
    """Where they are, the same on every machine; unset is a folder of the user's own in the system's folder for temporary files."""

    keep_jpeg: bool = False
    """Store a JPEG as it came instead of as PNG, which is about six times larger, wherever its pixels are used as they are: sources with
    `halve_jpeg: false`, upright, grey or RGB."""
    latents: bool = False
    """Also store the latent of every sample by the recipe's codec, float16; training takes its HR latents from there instead of encoding
    crops. Needs augmentation off, and the data prepared again for another codec."""
    parallel_from: Count = 256
    """With at least this many photographs they are prepared by Ray tasks of one CPU each, on the cluster that trains later. Fewer are
    done by the driver alone, sooner than a cluster starts, unless a text encoder or a DC-AE would take it minutes. It decides nothing
    about the result. Sources must be at places that every machine of the cluster sees. As many held-out photographs, or fewer on which a
    large bundle works long, are measured by workers of that cluster."""

    def identity(self) -> dict[str, object]:
        """Return, JSON-able, what decides the shards; of optional contents only those that are asked for."""
        optional = {name for name in ("keep_jpeg", "latents") if not getattr(self, name)}
        return self.model_dump(mode="json", exclude={"parallel_from", *optional})


@dataclass(frozen=True)
class ShardCacheConfig:
    """Where a machine keeps copies of remote shards; picklable."""

    folder: str | None = None
    """None is the user's own in the system's folder for temporary files."""
    gb: float = 20.0
    """Of all copies together."""
    sha256: Mapping[str, str] = field(default_factory=dict)
    """Hashes that shards must have, by URL, where a manifest gives them."""
