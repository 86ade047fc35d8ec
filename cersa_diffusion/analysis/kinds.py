"""The layers that an analysis looks at, and their names in the paper."""

import re
from collections.abc import Mapping

from torch import nn

from cersa_diffusion.classification.targets import LAYERS, target_pattern
from cersa_diffusion.memory.plan import layer_kind

# The same layers as in training: all linear layers of a denoiser, the attention layers of text encoders.
_TEXT_ENCODER = ["q_proj", "k_proj", "v_proj", "out_proj"]


def targets_by_component(
    components: Mapping[str, nn.Module], target_modules: list[str] | None, default: str
) -> dict[str, str | list[str]]:
    """The target layers of each component, in the form that `cersa_diffusion.inject.match_targets` takes.

    Args:
        components: component name -> model.
        target_modules: QV, QKV, QKVP, all, name endings or one regular expression; "all-linear"; None: the default.
        default: the preset for a classifier whose layers have names in the paper. The default for other models is all linear
            layers, and for the text encoders of a pipeline their attention layers.

    Raises:
        ConfigError: a preset was given, but the layers of the architecture have no names in the paper.
    """
    return {name: _targets(name, model, target_modules, default) for name, model in components.items()}


def _targets(component: str, model: nn.Module, target_modules: list[str] | None, default: str) -> str | list[str]:
    if target_modules == ["all-linear"]:
        return "all-linear"
    if target_modules is not None:
        return target_pattern(_model_type(model), target_modules)
    if component.startswith("text_encoder"):
        return _TEXT_ENCODER
    return target_pattern(_model_type(model), [default]) if _model_type(model) in LAYERS else "all-linear"


def _model_type(model: nn.Module | None) -> str | None:
    return getattr(getattr(model, "config", None), "model_type", None)


def paper_kind(name: str, model: nn.Module | None = None) -> str:
    """The name of a layer in the paper (Q, K, V, P, UP, DN: Fig. 3), or the last part of its own name if it has none there.

    Args:
        name: name of the layer.
        model: the model of the layer; None: try the layer names of every known architecture.
    """
    model_type = _model_type(model)
    for endings in [LAYERS[model_type]] if model_type in LAYERS else LAYERS.values():
        for kind, ending in endings.items():
            if re.fullmatch(rf"(.*\.)?{ending}", name):
                return kind
    return layer_kind(name)
