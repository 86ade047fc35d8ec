"""The families by the class of their pipeline. A new family is a file of its own and a line here."""

from cersa_diffusion.families.base import Family
from cersa_diffusion.families.sdxl import STABLE_DIFFUSION_XL
from cersa_diffusion.families.stable_diffusion import STABLE_DIFFUSION

FAMILIES: tuple[Family, ...] = (STABLE_DIFFUSION, STABLE_DIFFUSION_XL)


def family_of(class_name: str) -> Family | None:
    """The family that a pipeline class, as `model_index.json` names it, belongs to."""
    return {family.pipeline_class.__name__: family for family in FAMILIES}.get(class_name)
