"""The families by pipeline class. A new family needs its own file and an entry here."""

from cersa_diffusion.families.base import Family
from cersa_diffusion.families.sdxl import STABLE_DIFFUSION_XL
from cersa_diffusion.families.stable_diffusion import STABLE_DIFFUSION

FAMILIES: tuple[Family, ...] = (STABLE_DIFFUSION, STABLE_DIFFUSION_XL)


def family_of(class_name: str) -> Family | None:
    """The family of a pipeline class, whose name is in `model_index.json`; None if there is no such family."""
    return {family.pipeline_class.__name__: family for family in FAMILIES}.get(class_name)
