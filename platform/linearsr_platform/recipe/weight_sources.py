"""Where publishers keep the weights that recipes need, as data. Nothing of it is shipped, and nothing is fetched unless asked for.

The addresses are those in the source of pyiqa 0.1.16, torchvision and SeeSR's and RAM's own pages.
"""

import re
from dataclasses import dataclass

PYIQA_HUB = "https://huggingface.co/chaofengc/IQA-PyTorch-Weights/resolve/main"
PYIQA_GITHUB = "https://github.com/chaofengc/IQA-PyTorch/releases/download/v0.1-weights"
TORCHVISION = "https://download.pytorch.org/models"
CLIP_RN50 = "afeb0e10f9e5a86da6080e35cf09123aca3b358a0c3e3b6c78a7b63bc04b6762"
"""SHA-256 of CLIP's ResNet-50, as OpenAI writes it into its address."""
RAM_DATA = "https://raw.githubusercontent.com/xinyu1205/recognize-anything/main/ram/data"
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
"""What names a repository on the Hugging Face hub."""
_HASH_IN_NAME = re.compile(r"-([0-9a-f]{8})\.\w+$")


@dataclass(frozen=True, kw_only=True, slots=True)
class FileSource:
    """Where one file of weights is published."""

    urls: tuple[str, ...] = ()
    """Addresses of the same file; the first that answers is taken. None: its publisher has no address for programs, see `page`."""
    page: str = ""
    """Where a person finds it."""
    licence: str
    """What its publisher says; to be read before use."""
    sha256: str | None = None
    """Of the whole file, where the publisher says it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class HubSource:
    """A repository of the Hugging Face hub that holds a folder of weights."""

    repository: str
    licence: str


def _pyiqa(name: str, licence: str) -> FileSource:
    return FileSource(urls=(f"{PYIQA_HUB}/{name}", f"{PYIQA_GITHUB}/{name}"), licence=licence)


def _torchvision(name: str) -> FileSource:
    return FileSource(urls=(f"{TORCHVISION}/{name}",), licence="BSD-3-Clause; trained on ImageNet")


METRIC_FILES: dict[str, FileSource] = {
    "niqe_modelparameters.mat": _pyiqa("niqe_modelparameters.mat", "LIVE, University of Texas: research, with its notice"),
    "LPIPS_v0.1_alex-df73285e.pth": _pyiqa("LPIPS_v0.1_alex-df73285e.pth", "BSD-2-Clause"),
    "DISTS_weights-f5e65c96.pth": _pyiqa("DISTS_weights-f5e65c96.pth", "MIT"),
    "musiq_koniq_ckpt-e95806b9.pth": _pyiqa("musiq_koniq_ckpt-e95806b9.pth", "Apache-2.0"),
    "ckpt_koniq10k.pt": FileSource(
        urls=(f"{PYIQA_HUB}/ckpt_koniq10k.pt", "https://github.com/IIGROUP/MANIQA/releases/download/Koniq10k/ckpt_koniq10k.pt"),
        licence="Apache-2.0",
    ),
    "MANIQA_PIPAL-ae6d356b.pth": _pyiqa("MANIQA_PIPAL-ae6d356b.pth", "Apache-2.0"),
    "pt_inception-2015-12-05-6726825d.pth": _pyiqa("pt_inception-2015-12-05-6726825d.pth", "Apache-2.0"),
    "alexnet-owt-7be5be79.pth": _torchvision("alexnet-owt-7be5be79.pth"),
    "vgg16-397923af.pth": _torchvision("vgg16-397923af.pth"),
    "RN50.pt": FileSource(urls=(f"https://openaipublic.azureedge.net/clip/models/{CLIP_RN50}/RN50.pt",), licence="MIT", sha256=CLIP_RN50),
}
"""Files of learned metrics by name; every name in `linearsr.metric_table` is here."""

TAGGER_FILES: dict[str, FileSource] = {
    "ram_swin_large_14m.pth": FileSource(
        urls=("https://huggingface.co/xinyu1205/recognize_anything_model/resolve/main/ram_swin_large_14m.pth",), licence="Apache-2.0"
    ),
    "ram_tag_list.txt": FileSource(urls=(f"{RAM_DATA}/ram_tag_list.txt",), licence="Apache-2.0"),
    "ram_tag_list_threshold.txt": FileSource(urls=(f"{RAM_DATA}/ram_tag_list_threshold.txt",), licence="Apache-2.0"),
    "DAPE.pth": FileSource(page="https://github.com/cswry/SeeSR (Google Drive or OneDrive, by hand)", licence="Apache-2.0"),
}
"""Files of the taggers `ram` and `dape` by the names that their authors gave them."""

DC_AE = HubSource(repository="mit-han-lab/dc-ae-f32c32-sana-1.0-diffusers", licence="see the model card")
"""SANA 1.0's autoencoder."""
AUTOENCODERS = re.compile(r"dc-ae-f32c32-[\w.-]+-diffusers")
"""Names of the autoencoders of its kind that mit-han-lab publishes."""
CLIP = HubSource(repository="openai/clip-vit-large-patch14", licence="MIT")
"""What `linearsr tag --tagger clip` is usually given."""
TEXT_ENCODERS: dict[str, HubSource] = {
    "gemma-2-2b-it": HubSource(repository="google/gemma-2-2b-it", licence="Gemma Terms of Use; accept them on the hub, then log in"),
    "all-MiniLM-L6-v2": HubSource(repository="sentence-transformers/all-MiniLM-L6-v2", licence="Apache-2.0"),
}
"""Text encoders by the name of their folder."""


def hash_beginning(name: str, source: FileSource | None) -> str:
    """Return how the SHA-256 of a file begins, all 64 digits or the 8 that are in its name, or "" if its publisher does not say."""
    if source is not None and source.sha256 is not None:
        return source.sha256
    found = _HASH_IN_NAME.search(name)
    return found[1] if found else ""
