"""All private and short-lived names of other libraries that this package needs, in one place.

A release may remove such a name without notice. Each is looked up when it is used, so that importing this package imports none
of these libraries; the error tells which version of which library lacks it. `tests/test_private_names.py` checks all of them.
"""

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module

from torch import nn

from cersa_diffusion.errors import ConfigError


@dataclass(frozen=True)
class PrivateName:
    """A name of another library that may disappear without notice.

    Args:
        module: the module that has it.
        name: its name there; a method is preceded by its class.
        purpose: what this package needs it for.
    """

    module: str
    name: str
    purpose: str

    def get(self) -> Callable:
        """The function or class itself.

        Raises:
            ConfigError: the installed version of the library lacks it.
            ModuleNotFoundError: the library is not installed.
        """
        library = self.module.partition(".")[0]
        version = import_module(library).__version__
        try:
            value = import_module(self.module)
            for attribute in self.name.split("."):
                value = getattr(value, attribute)
        except (ImportError, AttributeError) as error:
            raise ConfigError(
                f"{library} {version} has no {self.module}.{self.name}, which cersa_diffusion needs for {self.purpose}: "
                f"install a version of {library} that docs/compatibility.md lists, or a newer cersa-diffusion"
            ) from error
        return value


# PyTorch.
FAKE_TENSOR_MODE = PrivateName("torch._subclasses.fake_tensor", "FakeTensorMode", "counting the tokens of a step without memory")
MODULE_APPLY = PrivateName("torch.nn", "Module._apply", "keeping cores in float32 when a model is cast (overridden)")

# transformers.
CONVERSION_MAPPING = PrivateName(
    "transformers.conversion_mapping",
    "get_model_conversion_mapping",
    "finding a layer that has another name in the checkpoint",
)
PREFIX_CHANGE = PrivateName("transformers.core_model_loading", "PrefixChange", CONVERSION_MAPPING.purpose)
WEIGHT_RENAMING = PrivateName("transformers.core_model_loading", "WeightRenaming", CONVERSION_MAPPING.purpose)
RENAME_SOURCE_KEY = PrivateName("transformers.core_model_loading", "rename_source_key", CONVERSION_MAPPING.purpose)
LOAD_FROM_CHECKPOINT = PrivateName("transformers", "Trainer._load_from_checkpoint", "resuming a classifier (overridden)")
LOAD_BEST_MODEL = PrivateName("transformers", "Trainer._load_best_model", "going back to the best checkpoint (overridden)")

# peft.
DEQUANTISE = PrivateName("peft.utils.integrations", "dequantize_module_weight", "reading quantised factors")

# diffusers.
DEQUANTIZE_GGUF = PrivateName("diffusers.quantizers.gguf.utils", "dequantize_gguf_tensor", "bases from GGUF files")
GGUF_LINEAR = PrivateName("diffusers.quantizers.gguf.utils", "GGUFLinear", DEQUANTIZE_GGUF.purpose)
REAPPLY_GROUP_OFFLOADING = PrivateName(
    "diffusers.hooks.group_offloading", "_maybe_remove_and_reapply_group_offloading", "changing the layers of an offloaded model"
)

# torchmetrics.
CLIP_SCORE_UPDATE = PrivateName(
    "torchmetrics.functional.multimodal.clip_score", "_clip_score_update", "a CLIPScore for each picture of a batch"
)

PRIVATE_NAMES = tuple(value for value in tuple(globals().values()) if isinstance(value, PrivateName))

# The method of diffusers, that of transformers since 5.24, and that of earlier transformers (deprecated, removed in version 6).
CHECKPOINTING_METHODS = ("enable_gradient_checkpointing", "activation_checkpointing_enable", "gradient_checkpointing_enable")


def enable_gradient_checkpointing(model: nn.Module) -> None:
    """Makes a model of diffusers or transformers recompute its activations in the backward pass.

    Raises:
        ConfigError: the model has no method for it.
    """
    method = next((name for name in CHECKPOINTING_METHODS if hasattr(model, name)), None)
    if method is None:
        raise ConfigError(
            f"a {type(model).__name__} has no gradient checkpointing, expected a method "
            f"{' or '.join(CHECKPOINTING_METHODS)}: train without gradient_checkpointing"
        )
    getattr(model, method)()


# The attributes of a model with the class names of its repeated blocks: that of diffusers, which `compile_repeated_blocks` reads
# and which is empty for some models, and that of transformers, which diffusers' models have for placement on several devices.
REPEATED_BLOCKS = ("_repeated_blocks", "_no_split_modules")


def repeated_blocks(model: nn.Module) -> dict[str, str]:
    """Module name -> class name of the repeated blocks of a model of diffusers or transformers.

    Raises:
        ConfigError: the model names no classes of repeated blocks, or has no module of these classes.
    """
    class_names = next(filter(None, (getattr(model, attribute, None) for attribute in REPEATED_BLOCKS)), ())
    classes = {name: type(module).__name__ for name, module in model.named_modules()}
    blocks = {name: class_name for name, class_name in classes.items() if class_name in class_names}
    if not blocks:
        found = f"names {sorted(class_names)} and has none of them" if class_names else "names none"
        raise ConfigError(
            "uniform_blocks needs the repeated blocks of the model, expected their class names in its "
            f"{' or '.join(REPEATED_BLOCKS)}: a {type(model).__name__} {found}. Set "
            "model._repeated_blocks = ['NameOfTheBlockClass'], or uniform_blocks=False"
        )
    return blocks
