"""The layers that the paper names Q, K, V, P, UP and DN (Fig. 3), in the architectures of transformers."""

import re

from torch import nn

from cersa_diffusion.errors import ConfigError
from cersa_diffusion.layers.model import match_targets

_BERT = {
    "Q": r"attention\.self\.query",
    "K": r"attention\.self\.key",
    "V": r"attention\.self\.value",
    "P": r"attention\.output\.dense",
    "UP": r"intermediate\.dense",
    "DN": r"(?<!attention\.)output\.dense",
}
# Model type -> kind of layer -> ending of its name. DeBERTaV3 is of the type deberta-v2.
LAYERS = {
    "vit": {
        "Q": r"attention\.q_proj",
        "K": r"attention\.k_proj",
        "V": r"attention\.v_proj",
        "P": r"attention\.o_proj",
        "UP": r"mlp\.fc1",
        "DN": r"mlp\.fc2",
    },
    "bert": _BERT,
    "roberta": _BERT,
    "deberta-v2": _BERT
    | {"Q": r"attention\.self\.query_proj", "K": r"attention\.self\.key_proj", "V": r"attention\.self\.value_proj"},
}
PRESETS = {
    "QV": ("Q", "V"),
    "QKV": ("Q", "K", "V"),
    "QKVP": ("Q", "K", "V", "P"),
    "all": ("Q", "K", "V", "P", "UP", "DN"),
}


def target_pattern(model_type: str, target_modules: list[str] | None) -> str | list[str]:
    """A target specification as `match_targets` takes it.

    Args:
        model_type: of the model's configuration.
        target_modules: a preset, name endings or one regular expression; None for QKV.

    Raises:
        ConfigError: a preset, and an architecture whose layers are not known here.
    """
    chosen = ["QKV"] if target_modules is None else target_modules
    if len(chosen) == 1 and chosen[0] in PRESETS:
        if model_type not in LAYERS:
            raise ConfigError(
                f"target_modules: the layers {chosen[0]} of a {model_type!r} model are not known here, only those of "
                f"{', '.join(LAYERS)}: give name endings or a regular expression"
            )
        endings = "|".join(LAYERS[model_type][kind] for kind in PRESETS[chosen[0]])
        return rf".*\.(?:{endings})"
    # One plain name is an ending, as it is among several; anything else that is alone is a pattern for whole names.
    pattern = len(chosen) == 1 and not re.fullmatch(r"[\w.]+", chosen[0])
    return chosen[0] if pattern else chosen


def check_outside_head(model: nn.Module, target_modules: str | list[str], head: list[str]) -> None:
    """Refuses targets in the classifier, which every method trains as it is.

    Args:
        model: the model.
        target_modules: as `match_targets` takes them.
        head: names of the modules of the classifier.

    Raises:
        ConfigError: nothing matches, or a match lies in the head.
    """
    inside = [name for name in match_targets(model, target_modules) if any(f"{name}.".startswith(f"{own}.") for own in head)]
    if inside:
        raise ConfigError(f"target_modules: {inside} is part of the classifier, which is trained dense anyway: leave it out")
