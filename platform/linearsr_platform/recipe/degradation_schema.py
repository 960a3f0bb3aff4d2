"""Which of the degradations a recipe's `degradation` section is. Imports no torch.

The sections themselves are dataclasses of `linearsr.config` and `linearsr.degradation_config`.
"""

from dataclasses import fields
from typing import Annotated, Any

from pydantic import Discriminator, Tag

from linearsr.config import DegradationConfig
from linearsr.degradation_config import InvSrDegradation, RealEsrganDegradation, SecondOrderDegradation, StableSrDegradation

_SECOND_ORDER_KEYS = frozenset(field.name for field in fields(SecondOrderDegradation))


def preset_of(section: Any) -> str:
    """Return the preset that a section names; without a name it is `real-esrgan` if it has keys of Real-ESRGAN's files, else `quickstart`.

    So a block of such a file works as it was pasted.
    """
    if isinstance(section, (DegradationConfig, RealEsrganDegradation, StableSrDegradation, InvSrDegradation)):
        return section.preset
    if not isinstance(section, dict):
        return "quickstart"
    preset = section.get("preset")
    if isinstance(preset, str):
        return preset
    return "real-esrgan" if preset is None and not _SECOND_ORDER_KEYS.isdisjoint(section) else "quickstart"


DegradationSection = Annotated[
    Annotated[DegradationConfig, Tag("quickstart")]
    | Annotated[RealEsrganDegradation, Tag("real-esrgan")]
    | Annotated[StableSrDegradation, Tag("stablesr")]
    | Annotated[InvSrDegradation, Tag("invsr")],
    Discriminator(preset_of),
]
"""Any degradation, told apart by `preset`."""
