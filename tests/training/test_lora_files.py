"""LoRA files: what training writes opens through peft alone as it does with diffusers, and what does not fit is named."""

import json
from pathlib import Path

import diffusers.loaders.peft
import peft
import pytest
import torch
import transformers.integrations.peft
from accelerate import Accelerator
from peft import LoraConfig, get_peft_model_state_dict, inject_adapter_in_model
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from cersa_diffusion import AdapterFormatError, BaseMismatchError, ConfigError
from cersa_diffusion.methods.lora_files import load_lora
from cersa_diffusion.pipelines.open import load_base
from cersa_diffusion.training import DreamBoothConfig, load_result
from cersa_diffusion.training.data.captions import read_examples
from cersa_diffusion.training.run.loop import DreamBoothRun
from cersa_diffusion.training.settings.config import DreamBoothXLConfig

from .. import pipelines_small as small
from ..conftest import raises


def outputs(pipeline) -> tuple[torch.Tensor, torch.Tensor]:
    """What the text encoder makes of two prompts, and the UNet of that and fixed noise."""
    tokens = pipeline.tokenizer(["a sks cat", "a mat"], padding="max_length", return_tensors="pt").input_ids
    latents = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        states = pipeline.text_encoder(tokens)[0]
        sample = latents.to(states.dtype)
        return states, pipeline.unet(sample, torch.tensor([10, 500]), states).sample


def equal(first, second) -> bool:
    return all(torch.equal(a, b) for a, b in zip(outputs(first), outputs(second), strict=True))


def trained(method: str, settings: dict, folder: Path, config_class=DreamBoothConfig) -> tuple[object, Path]:
    """The models after two steps of training, and the file."""
    config = config_class(**settings | {"max_train_steps": 2}, method=method, rank=4, learning_rate=1e-2)
    base = load_base(config.pretrained_model_name_or_path)
    run = DreamBoothRun(config, base, Accelerator(), read_examples(config))
    run.fit(folder)
    return base, Path(run.save(folder).weights_path)


@pytest.fixture
def lora(small_settings, tmp_path) -> tuple[str, Path]:
    """A base, and a LoRA that was trained on it."""
    return small_settings["pretrained_model_name_or_path"], trained("lora", small_settings, tmp_path)[1]


@pytest.fixture
def peft_is_refused(monkeypatch):
    """diffusers and transformers want a version of peft that is not installed."""
    for module in (diffusers.loaders.peft, transformers.integrations.peft):
        monkeypatch.setattr(module, "MIN_PEFT_VERSION", "99")
    mixin, check = transformers.integrations.peft.PeftAdapterMixin, transformers.integrations.peft.check_peft_version
    # This method checks in some versions only.
    monkeypatch.setattr(mixin, "load_adapter", lambda *_, **__: check(min_version="99"))


@pytest.mark.parametrize("method", ["lora", "pissa", "dora"])
def test_other_libraries_need_not_accept_the_installed_peft(method, small_settings, peft_is_refused, tmp_path):
    base, path = trained(method, small_settings, tmp_path)
    opened = load_result(method, path, small_settings["pretrained_model_name_or_path"])
    for found, expected in zip(outputs(opened), outputs(base), strict=True):
        assert (found - expected).norm() <= 1e-5 * expected.norm()
    untouched = load_base(small_settings["pretrained_model_name_or_path"])
    assert min((a - b).norm() / b.norm() for a, b in zip(outputs(opened), outputs(untouched), strict=True)) > 1e-3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("method", ["lora", "pissa", "dora"])
def test_opens_to_what_the_loader_of_diffusers_makes_of_it(method, dtype, small_settings, tmp_path):
    _, path = trained(method, small_settings, tmp_path)
    base = small_settings["pretrained_model_name_or_path"]
    stock = load_base(base, dtype=dtype)
    try:
        stock.load_lora_weights(path)
    except ValueError as error:
        pytest.skip(f"transformers {transformers.__version__} refuses peft {peft.__version__}: {error}")
    assert equal(load_result(method, path, base, dtype=dtype), stock)


def test_opened_it_is_a_lora_like_any_other_to_diffusers(lora):
    base, path = lora
    untouched, opened = load_base(base), load_result("lora", path, base)
    full = outputs(opened)
    assert opened.get_list_adapters() == {"unet": ["default_0"], "text_encoder": ["default_0"]}
    assert opened.get_active_adapters() == ["default_0"]
    opened.set_adapters("default_0", 0.0)
    assert equal(opened, untouched)
    opened.set_adapters("default_0")
    load_lora(opened, path, "again")
    assert opened.get_active_adapters() == ["again"]
    opened.set_adapters(["default_0", "again"], [0.5, 0.5])
    for found, expected in zip(outputs(opened), full, strict=True):
        assert (found - expected).norm() <= 1e-5 * expected.norm()
    opened.delete_adapters("again")
    opened.set_adapters("default_0")
    opened.fuse_lora(components=["unet", "text_encoder"])
    for found, expected in zip(outputs(opened), full, strict=True):
        assert (found - expected).norm() <= 1e-5 * expected.norm()
    opened.unfuse_lora(components=["unet", "text_encoder"])
    opened.unload_lora_weights()
    assert not opened.get_list_adapters() and set(opened.unet.state_dict()) == set(untouched.unet.state_dict())
    load_lora(opened, path)
    assert all((a - b).norm() <= 1e-5 * b.norm() for a, b in zip(outputs(opened), full, strict=True))


def test_both_text_encoders_of_sdxl(small_base, small_settings, tmp_path):
    """The second one still has the prefix that transformers took from the first."""
    settings = small_settings | {"pretrained_model_name_or_path": str(small_base("sdxl"))}
    base, path = trained("dora", settings, tmp_path, DreamBoothXLConfig)
    opened = load_result("dora", path, settings["pretrained_model_name_or_path"])
    tokens = torch.arange(2, 12)[None]
    for name in ("text_encoder", "text_encoder_2"):
        with torch.no_grad():
            found, expected = (getattr(pipeline, name)(tokens, output_hidden_states=True)[0] for pipeline in (opened, base))
        assert (found - expected).norm() <= 1e-5 * expected.norm()
    assert set(opened.get_list_adapters()) == {"unet", "text_encoder", "text_encoder_2"}


def test_the_file_is_as_peft_and_diffusers_write_it(lora):
    base, path = lora
    with safe_open(path, "pt") as file:
        settings = json.loads(file.metadata()["lora_adapter_metadata"])
    assert settings["unet.r"] == settings["text_encoder.lora_alpha"] == 4 and settings["unet.peft_type"] == "LORA"
    # No folder of the machine that it was trained on.
    assert str(Path(base)).encode() not in path.read_bytes()
    assert [entry.name for entry in path.parent.iterdir() if entry.name.startswith(".")] == []


def changed(path: Path, change) -> Path:
    """A copy of a LoRA file with other tensors and settings."""
    with safe_open(path, "pt") as file:
        settings = json.loads(file.metadata()["lora_adapter_metadata"])
    tensors = load_file(path)
    change(tensors, settings)
    copy = path.with_name("changed.safetensors")
    save_file(tensors, copy, metadata={"lora_adapter_metadata": json.dumps(settings)})
    return copy


LAYER = "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q"


def rename(tensors: dict, old: str, new: str) -> None:
    for name in [name for name in tensors if name.startswith(old)]:
        tensors[name.replace(old, new)] = tensors.pop(name)


@pytest.mark.parametrize(
    ("change", "error", "named"),
    [
        (
            lambda tensors, _: rename(tensors, LAYER, "unet.mid_block.nothing"),
            BaseMismatchError,
            "unet mid_block.nothing.lora_A.weight",
        ),
        (
            lambda tensors, _: rename(tensors, "text_encoder.", "text_encoder_2."),
            BaseMismatchError,
            "text_encoder_2 self_attn.k_proj.lora_A.weight",
        ),
        (lambda tensors, _: tensors.pop(f"{LAYER}.lora_B.weight"), BaseMismatchError, "unet attn1.to_q.lora_B"),
        (
            lambda tensors, _: tensors.update({f"{LAYER}.lora_A.weight": torch.zeros(4, 3)}),
            BaseMismatchError,
            "UNet2DConditionModel attn1.to_q.lora_A",
        ),
        (
            lambda tensors, _: tensors.update({f"{LAYER}.lora_C.weight": torch.zeros(1)}),
            BaseMismatchError,
            "unet attn1.to_q.lora_C.weight",
        ),
        (lambda _, settings: settings.update({"text_encoder.r": 3}), BaseMismatchError, "CLIPTextModel self_attn.k_proj.lora_A"),
        (lambda _, settings: settings.update({"unet.peft_type": "NONE"}), AdapterFormatError, "unet 'NONE'"),
        (lambda _, settings: [settings.pop(key) for key in list(settings) if key[0] == "t"], AdapterFormatError, "text_encoder"),
    ],
)
def test_what_does_not_fit_is_named_and_nothing_is_loaded(change, error, named, lora):
    base, path = lora
    pipeline = load_base(base)
    with raises(error, "changed.safetensors", *named.split()):
        load_lora(pipeline, changed(path, change))
    assert not any(pipeline.get_list_adapters().values()) and equal(pipeline, load_base(base))
    load_lora(pipeline, path)
    assert equal(pipeline, load_result("lora", path, base))


def test_files_that_are_none(lora):
    base, path = lora
    pipeline = load_base(base)
    with raises(ConfigError, "nothing.safetensors"):
        load_lora(pipeline, path.with_name("nothing.safetensors"))
    broken = path.with_name("broken.safetensors")
    broken.write_bytes(path.read_bytes()[:-100])
    with raises(AdapterFormatError, "broken.safetensors"):
        load_lora(pipeline, broken)
    load_lora(pipeline, path, "mine")
    with raises(ConfigError, "'mine'", "adapter_name"):
        load_lora(pipeline, path, "mine")


def test_files_of_other_programs_go_to_the_loader_of_diffusers(lora):
    base, path = lora
    unet = load_base(base).unet
    torch.manual_seed(0)
    inject_adapter_in_model(LoraConfig(r=2, target_modules=["to_q"], init_lora_weights=False), unet)
    other = path.with_name("other.safetensors")
    save_file({f"unet.{name}": tensor for name, tensor in get_peft_model_state_dict(unet).items()}, other)
    pipeline = small.pipeline("sd1")
    before = outputs(pipeline)
    load_lora(pipeline, other)
    assert pipeline.get_list_adapters() == {"unet": ["default_0"]} and not torch.equal(outputs(pipeline)[1], before[1])
    save_file({"unet.to_q.lora_A.weight": torch.zeros(2, 2), "something": torch.zeros(1)}, other)
    with raises(ConfigError, "other.safetensors"):
        load_lora(pipeline, other)
