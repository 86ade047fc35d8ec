"""Which layers an analysis looks at, and what the paper calls them."""

import re
from collections.abc import Mapping

from torch import nn

from cersa_diffusion.classification.targets import LAYERS, target_pattern
from cersa_diffusion.memory.plan import layer_kind

# As the trainer has it: all linear layers of a denoiser, the attention of text encoders.
_TEXT_ENCODER = ["q_proj", "k_proj", "v_proj", "out_proj"]


def targets_by_component(
    components: Mapping[str, nn.Module], target_modules: list[str] | None, default: str
) -> dict[str, str | list[str]]:
    """A target specification for each component, as `cersa_diffusion.inject.match_targets` takes them.

    Args:
        components: the models by name.
        target_modules: QV, QKV, QKVP, all, name endings or one regular expression; "all-linear"; None: the default.
        default: the one of these presets that is meant for a classifier whose layers are known by the paper's names; for other
            models it is all linear layers, of a pipeline's text encoders those of the attention.

    Raises:
        ConfigError: a preset, and an architecture whose layers are not known by these names.
    """
    return {name: _targets(name, model, target_modules, default) for name, model in components.items()}


def _targets(component: str, model: nn.Module, target_modules: list[str] | None, default: str) -> str | list[str]:
    if target_modules == ["all-linear"]:
        return "all-linear"
    model_type = getattr(getattr(model, "config", None), "model_type", None)
    if target_modules is not None:
        return target_pattern(model_type, target_modules)
    if component.startswith("text_encoder"):
        return _TEXT_ENCODER
    return target_pattern(model_type, [default]) if model_type in LAYERS else "all-linear"


def paper_kind(name: str, model: nn.Module | None = None) -> str:
    """What the paper calls a layer (Q, K, V, P, UP, DN: Fig. 3), or the last part of its name where it has no name for it.

    Args:
        name: of the layer.
        model: the one it belongs to; None: as in any of the architectures whose layers are known.
    """
    model_type = getattr(getattr(model, "config", None), "model_type", None)
    for endings in [LAYERS[model_type]] if model_type in LAYERS else LAYERS.values():
        for kind, ending in endings.items():
            if re.fullmatch(rf"(.*\.)?{ending}", name):
                return kind
    return layer_kind(name)
