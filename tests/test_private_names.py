"""Every private name that the package takes from another library, one test each: the failure says which version took it away."""

import subprocess
import sys
from importlib import import_module
from importlib.metadata import version
from inspect import signature

import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module
from accelerate.utils import DistributedDataParallelKwargs
from torch import nn

from cersa_diffusion.errors import ConfigError
from cersa_diffusion.private_names import PRIVATE_NAMES, PrivateName, enable_gradient_checkpointing

from .conftest import raises
from .pipelines_small import pipeline


@pytest.mark.parametrize("private", PRIVATE_NAMES, ids=lambda private: f"{private.module}.{private.name}")
def test_name_is_there(private):
    pytest.importorskip(private.module.partition(".")[0])
    if ".gguf." in private.module:
        pytest.importorskip("gguf")
    assert callable(private.get())


@pytest.mark.parametrize("missing", [PrivateName("torch.nn", "Module._gone", "x"), PrivateName("torch._gone", "name", "x")])
def test_a_name_that_is_gone_names_the_library_its_version_and_the_name(missing):
    with raises(ConfigError, f"torch {torch.__version__}", f"{missing.module}.{missing.name}"):
        missing.get()


def took_away(library: str, name: str) -> str:
    return f"{library} {version(library)} took away {name}"


@pytest.mark.parametrize("library, class_name", [("transformers", "PreTrainedModel"), ("diffusers", "ModelMixin")])
def test_models_name_the_modules_that_stay_in_float32(library, class_name):
    model_class = getattr(import_module(library), class_name)
    assert hasattr(model_class, "_keep_in_fp32_modules"), took_away(library, f"{class_name}._keep_in_fp32_modules")


def test_models_name_their_repeated_blocks():
    small = pipeline("sd1")
    classes = {type(module).__name__ for module in small.unet.modules()}
    assert classes & set(small.unet._repeated_blocks), took_away("diffusers", "UNet2DConditionModel._repeated_blocks")
    assert "CLIPEncoderLayer" in small.text_encoder._no_split_modules, took_away(
        "transformers", "CLIPTextModel._no_split_modules"
    )


def test_configs_name_where_a_model_came_from(base_path):
    from diffusers import DiffusionPipeline

    loaded = DiffusionPipeline.from_pretrained(base_path)
    assert str(loaded.config._name_or_path) == str(base_path), took_away("diffusers", "DiffusionPipeline.config._name_or_path")
    assert loaded.unet.config._name_or_path, took_away("diffusers", "ModelMixin.config._name_or_path")
    assert loaded.text_encoder.config._name_or_path, took_away("transformers", "PretrainedConfig._name_or_path")


def test_a_pipeline_remembers_that_its_progress_bar_is_off():
    small = pipeline("sd1")
    small.set_progress_bar_config(disable=True)
    assert getattr(small, "_progress_bar_config", {}).get("disable"), took_away("diffusers", "_progress_bar_config")


def test_a_compiled_module_holds_the_original():
    layer = nn.Linear(2, 2)
    assert getattr(torch.compile(layer), "_orig_mod", None) is layer, took_away("torch", "OptimizedModule._orig_mod")


def test_an_offloaded_module_holds_its_hook():
    hook = ModelHook()
    layer = add_hook_to_module(nn.Linear(2, 2), hook)
    assert getattr(layer, "_hf_hook", None) is hook, took_away("accelerate", "_hf_hook")


def test_processes_can_be_told_not_to_exchange_buffers():
    handler = DistributedDataParallelKwargs(broadcast_buffers=False)
    assert handler.to_kwargs() == {"broadcast_buffers": False}, took_away("accelerate", "broadcast_buffers")
    assert "broadcast_buffers" in signature(nn.parallel.DistributedDataParallel).parameters, took_away(
        "torch", "DistributedDataParallel(broadcast_buffers=)"
    )


def test_gradient_checkpointing_is_switched_on_in_models_of_both_libraries(recwarn):
    small = pipeline("sd1")
    for model in (small.unet, small.text_encoder):
        enable_gradient_checkpointing(model)
        assert model.is_gradient_checkpointing
    assert not [warning for warning in recwarn if "checkpointing_enable" in str(warning.message)]


def test_a_model_without_gradient_checkpointing_is_named():
    with raises(ConfigError, "Sequential", "gradient_checkpointing"):
        enable_gradient_checkpointing(nn.Sequential())


# Where diffusers is installed, importing the package imports it: without, nothing may ask for it or for its companions.
WITHOUT_DIFFUSERS = """
import sys
from importlib.machinery import PathFinder

find = PathFinder.find_spec
PathFinder.find_spec = lambda name, *rest: None if name == "diffusers" else find(name, *rest)
import cersa_diffusion.private_names, cersa_diffusion.memory.tokens, cersa_diffusion.compressed.folder
import cersa_diffusion.pipelines.offload
print(sorted({"diffusers", "transformers", "torchmetrics"} & set(sys.modules)))
"""


def test_the_names_are_looked_up_late():
    done = subprocess.run([sys.executable, "-c", WITHOUT_DIFFUSERS], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
