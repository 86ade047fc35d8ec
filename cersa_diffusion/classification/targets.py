"""The layers that the paper calls Q, K, V, P, UP and DN (Fig. 3), in the architectures of transformers."""

from torch import nn

from cersa_diffusion.config import listed_targets
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
# Model type -> kind of layer -> ending of the layer name. DeBERTaV3 has the model type deberta-v2.
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
PRESETS = {"QV": ("Q", "V"), "QKV": ("Q", "K", "V"), "QKVP": ("Q", "K", "V", "P"), "all": ("Q", "K", "V", "P", "UP", "DN")}


def target_pattern(model_type: str, target_modules: list[str] | None) -> str | list[str]:
    """Turns the setting `target_modules` into the form that `match_targets` takes.

    Args:
        model_type: `model_type` of the model's configuration.
        target_modules: a preset, name endings or one regular expression; None: QKV.

    Raises:
        ConfigError: a preset was given, but the layers of this architecture are not listed here.
    """
    targets = ["QKV"] if target_modules is None else target_modules
    if len(targets) == 1 and targets[0] in PRESETS:
        if model_type not in LAYERS:
            raise ConfigError(
                f"target_modules: the layers {targets[0]} are known for the model types {', '.join(LAYERS)}, but not for "
                f"{model_type!r}: give name endings or a regular expression"
            )
        endings = "|".join(LAYERS[model_type][kind] for kind in PRESETS[targets[0]])
        return rf".*\.(?:{endings})"
    return listed_targets(targets)


def check_outside_head(model: nn.Module, target_modules: str | list[str], head: list[str]) -> None:
    """Refuses target layers that lie in the classifier, which every method trains as a dense layer.

    Args:
        model: the model.
        target_modules: as `match_targets` takes them.
        head: names of the modules of the classifier.

    Raises:
        ConfigError: no layer matches, or a matching layer lies in the head.
    """
    inside = [layer for layer in match_targets(model, target_modules) if is_inside(layer, head)]
    if inside:
        raise ConfigError(f"target_modules: {inside} is part of the classifier, which is trained dense anyway: leave it out")


def is_inside(name: str, modules: list[str]) -> bool:
    """Whether a parameter or module is one of these modules or lies in one of them."""
    return any(f"{name}.".startswith(f"{module}.") for module in modules)
