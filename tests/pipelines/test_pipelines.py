"""Adapters on diffusers pipelines: the embedded base, arguments and their errors, LoRA beside CERSA, saving whole pipelines."""

import json
import shutil
from pathlib import Path

import huggingface_hub
import pytest
import torch
from accelerate import Accelerator
from diffusers import FluxPipeline, StableDiffusionPipeline, StableDiffusionXLPipeline, UNet2DConditionModel
from diffusers.utils import convert_state_dict_to_diffusers
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict

import cersa_diffusion as cersa
from cersa_diffusion import AdapterFormatError, BaseMismatchError, CersaConfig, CersaLinear, ConfigError
from cersa_diffusion.families.stable_diffusion import STABLE_DIFFUSION
from cersa_diffusion.layers.model import cersa_layers
from cersa_diffusion.pipelines.open import load_base
from cersa_diffusion.training import DreamBoothConfig
from cersa_diffusion.training.data.captions import read_examples
from cersa_diffusion.training.run.loop import DreamBoothRun

from .. import pipelines_small as small
from ..conftest import DEVICE, raises
from ..pipelines_small import cersa_modules, differ

METHODS = (
    "load_cersa_weights", "save_cersa_weights", "cersa_state_dict", "unload_cersa_weights", "fuse_cersa", "unfuse_cersa",
    "enable_cersa", "disable_cersa", "set_cersa_adapters", "delete_cersa_adapters", "get_active_cersa_adapters",
    "get_list_cersa_adapters",
)  # fmt: skip


def picture(pipeline, prompt="a 3d emoji of a fox") -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    pipeline.set_progress_bar_config(disable=True)
    result = pipeline(prompt, num_inference_steps=3, guidance_scale=4.0, generator=generator, output_type="pt")
    return result.images[0]


def parts(pipeline) -> dict[str, torch.nn.Module]:
    return {name: getattr(pipeline, name) for name in STABLE_DIFFUSION.trained}


@pytest.fixture(scope="module")
def changed(base_path, subject_path, subject, tmp_path_factory):
    """A trained adapter on the embedded base: (file, weight changes by layer). A fresh one is zero and hides mistakes."""
    folder = tmp_path_factory.mktemp("adapter")
    config = DreamBoothConfig(
        pretrained_model_name_or_path=str(base_path),
        instance_data_dir=str(subject_path / "instance"),
        instance_prompt=subject["instance_prompt"],
        output_dir=str(folder),
        alpha=0.9,
        resolution=64,
        train_batch_size=2,
        max_train_steps=12,
        learning_rate=1e-3,
    )
    run = DreamBoothRun(config, load_base(str(base_path)), Accelerator(), read_examples(config))
    run.fit(folder)
    result = run.save(folder)
    return Path(result.weights_path), weight_changes(run.components)


def weight_changes(components: dict[str, torch.nn.Module]) -> dict[str, torch.Tensor]:
    return {
        f"{name}.{layer_name}": layer.weight_change()
        for name, model in components.items()
        for layer_name, layer in model.named_modules()
        if isinstance(layer, CersaLinear)
    }


@pytest.mark.parametrize(("dtype", "limit"), [(torch.float32, 0.005), (torch.float16, 0.01)])
def test_weight_changes_of_every_layer_survive_the_dtype_of_the_base(base_path, changed, dtype, limit):
    path, changes = changed
    pipeline = load_base(str(base_path), dtype=dtype)
    pipeline.load_cersa_weights(path)
    found = weight_changes(parts(pipeline))
    assert found.keys() == changes.keys() and len(found) > 90
    worst = max(float((found[name] - change).norm() / change.norm()) for name, change in changes.items())
    assert worst <= limit


def test_load_changes_the_picture_and_unload_restores_it_bit_for_bit(base_path, changed):
    pipeline = load_base(str(base_path))
    before = picture(pipeline)
    pipeline.load_cersa_weights(changed[0])
    adapted = picture(pipeline)
    pipeline.unload_cersa_weights()
    assert not torch.allclose(adapted, before, atol=1e-2)
    assert torch.equal(picture(pipeline), before)
    assert not any(isinstance(module, CersaLinear) for model in parts(pipeline).values() for module in model.modules())
    pipeline.load_cersa_weights(changed[0])
    assert torch.equal(picture(pipeline), adapted)


def test_alpha_one_reproduces_the_picture(base_path):
    pipeline = load_base(str(base_path))
    before = picture(pipeline)
    for name, model in parts(pipeline).items():
        cersa.inject_cersa(model, CersaConfig(alpha=1.0, target_modules=STABLE_DIFFUSION.trained[name]), show_progress=False)
    torch.testing.assert_close(picture(pipeline), before, rtol=0, atol=1e-3)


def test_the_readme_way_without_naming_a_dtype(base_path, changed):
    pipeline = StableDiffusionPipeline.from_pretrained(base_path)
    assert pipeline.unet.dtype == pipeline.text_encoder.dtype == torch.float32
    before = picture(pipeline)
    pipeline.load_cersa_weights(changed[0].parent, strength=1.0)
    assert not torch.allclose(picture(pipeline), before, atol=1e-2)
    pipeline.unload_cersa_weights()
    assert torch.equal(picture(pipeline), before)


def test_strength_zero_is_the_truncated_base(base_path, changed):
    pipeline, truncated = load_base(str(base_path)), load_base(str(base_path))
    pipeline.load_cersa_weights(changed[0], strength=0.0)
    for name, model in parts(truncated).items():
        cersa.inject_cersa(model, CersaConfig(alpha=0.9, target_modules=STABLE_DIFFUSION.trained[name]), show_progress=False)
    assert torch.equal(picture(pipeline), picture(truncated))


def test_dtype_move_after_loading_keeps_the_cores(base_path, changed):
    pipeline = load_base(str(base_path))
    pipeline.load_cersa_weights(changed[0])
    pipeline.to(torch.bfloat16)
    assert pipeline.unet.dtype == pipeline.text_encoder.dtype == torch.bfloat16
    layers = [module for module in pipeline.unet.modules() if isinstance(module, CersaLinear)]
    assert all(layer.cores["default_0"].D.dtype == layer.s.dtype == torch.float32 for layer in layers)
    assert torch.isfinite(picture(pipeline).float()).all()


def test_folder_file_name_and_adapter_names(base_path, changed, tmp_path):
    pipeline = load_base(str(base_path))
    pipeline.load_cersa_weights(changed[0].parent, strength=0.5)
    (tmp_path / "sub").mkdir()
    for name in ("one", "other"):
        shutil.copy(changed[0], tmp_path / "sub" / f"{name}.safetensors")
    with raises(AdapterFormatError, str(tmp_path / "sub"), "['one.safetensors', 'other.safetensors']", "weight_name"):
        pipeline.load_cersa_weights(tmp_path, subfolder="sub")
    pipeline.load_cersa_weights(tmp_path / "sub", weight_name="other.safetensors", strength=0.5)
    layer = pipeline.unet.mid_block.attentions[0].transformer_blocks[0].attn1.to_q
    assert set(layer.cores) == {"default_0", "default_1"}
    with raises(ConfigError, "'default_1'", "adapter_name", "hotswap"):
        pipeline.load_cersa_weights(changed[0], adapter_name="default_1")


def test_hub_ids_go_through_huggingface_hub(base_path, changed, monkeypatch):
    calls = []

    def download(repo_id, filename, **kwargs):
        calls.append((repo_id, filename, kwargs))
        return str(changed[0])

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    pipeline = load_base(str(base_path))
    pipeline.load_cersa_weights("someone/a-cat", revision="v2", subfolder="cat")
    assert calls == [("someone/a-cat", "pytorch_cersa_weights.safetensors", {"revision": "v2", "subfolder": "cat"})]
    assert isinstance(pipeline.unet.mid_block.attentions[0].transformer_blocks[0].attn1.to_q, CersaLinear)


@pytest.mark.parametrize("path", ["/no/such/file.safetensors", "no-such-thing", "some/where/deep"])
def test_paths_that_do_not_exist(base_path, path):
    with raises(AdapterFormatError, path, "owner/name"):
        load_base(str(base_path)).load_cersa_weights(path)


def test_another_base_is_refused_and_the_pipeline_is_as_before(base_path, changed):
    pipeline = load_base(str(base_path))
    torch.manual_seed(3)
    for parameter in pipeline.unet.mid_block.parameters():
        parameter.data.add_(0.1 * torch.randn_like(parameter))
    before = picture(pipeline)
    with raises(BaseMismatchError, changed[0].name, "unet.mid_block", "allow_base_mismatch"):
        pipeline.load_cersa_weights(changed[0])
    assert torch.equal(picture(pipeline), before)


def test_a_pipeline_without_the_text_encoder_is_told_what_is_missing(base_path, changed):
    pipeline = load_base(str(base_path))
    pipeline.text_encoder = None
    with raises(BaseMismatchError, changed[0].name, "'text_encoder'", "['unet']"):
        pipeline.load_cersa_weights(changed[0])


def test_keys_are_canonical_across_transformers_versions(changed):
    from safetensors import safe_open

    with safe_open(changed[0], "pt") as file:
        keys = list(file.keys())
    text_keys = [key for key in keys if key.startswith("text_encoder.")]
    assert text_keys and all(key.startswith("text_encoder.text_model.encoder.layers.") for key in text_keys)


def test_every_pipeline_class_has_the_methods():
    for pipeline_class in (StableDiffusionPipeline, StableDiffusionXLPipeline, FluxPipeline):
        assert all(callable(getattr(pipeline_class, name)) for name in METHODS)


def test_misspelt_arguments_and_impossible_names_are_refused(adapter_file, tmp_path):
    pipe = small.pipeline("sd1")
    with raises(TypeError, "strenght"):
        pipe.load_cersa_weights(adapter_file("sd1"), strenght=0.5)
    for name in ("v1.5", "", "keys"):
        with raises(ConfigError, repr(name), "adapter_name", "torch"):
            pipe.load_cersa_weights(adapter_file("sd1"), adapter_name=name)
    with raises(ConfigError, "'vae'", "StableDiffusionPipeline", "['unet', 'text_encoder']"):
        pipe.fuse_cersa(components=["vae"])
    with raises(ConfigError, "CERSA layers", "fuse"):
        pipe.fuse_cersa()
    with raises(ConfigError, "[]", "adapter_name"):
        pipe.save_cersa_weights(tmp_path)
    assert not cersa_modules(pipe)


def test_saving_needs_a_name_where_there_are_several(adapter_file, tmp_path):
    pipe = small.pipeline("sd1")
    for seed, name in enumerate("ab"):
        pipe.load_cersa_weights(adapter_file("sd1", seed=seed), adapter_name=name)
    with raises(ConfigError, "['a', 'b']", "adapter_name"):
        pipe.save_cersa_weights(tmp_path)
    pipe.save_cersa_weights(tmp_path, "b", is_main_process=False)
    assert not list(tmp_path.iterdir())
    pipe.save_cersa_weights(tmp_path / "new" / "folder", "b")
    assert (tmp_path / "new" / "folder" / "pytorch_cersa_weights.safetensors").is_file()
    with raises(ConfigError, str(adapter_file("sd1")), "weight_name"):
        pipe.save_cersa_weights(adapter_file("sd1"), "b")


def test_saving_takes_the_options_of_a_single_model(adapter_file, tmp_path):
    pipe = small.pipeline("sd1")
    pipe.load_cersa_weights(adapter_file("sd1"))
    for name, options in {"plain": {}, "less": {"save_energy": 0.1}, "bases": {"save_bases": True}}.items():
        pipe.save_cersa_weights(tmp_path, weight_name=f"{name}.safetensors", **options)
    size = {path.stem: path.stat().st_size for path in tmp_path.iterdir()}
    assert size["less"] < size["plain"] < size["bases"]
    with raises(ConfigError, "save_energy", "2"):
        pipe.save_cersa_weights(tmp_path / "none", save_energy=2)
    assert not (tmp_path / "none").exists()


def test_a_trained_pipeline_saves_what_it_came_from(base_path, tmp_path):
    pipe = load_base(str(base_path))
    cersa.inject_cersa(pipe.text_encoder, CersaConfig(target_modules=["q_proj"]), show_progress=False)
    pipe.save_cersa_weights(tmp_path)
    assert json.loads(pipe.cersa_state_dict(tmp_path)["cersa"])["base_model"] == {"name_or_path": base_path.name}


def test_a_disabled_pipeline_stays_disabled_when_another_adapter_is_loaded(adapter_file):
    pipe, truncated = small.pipeline("sd1"), small.pipeline("sd1")
    pipe.load_cersa_weights(adapter_file("sd1", components=("unet",)), adapter_name="a")
    pipe.disable_cersa()
    pipe.load_cersa_weights(adapter_file("sd1"), adapter_name="b")
    truncated.load_cersa_weights(adapter_file("sd1", components=("unet",)), strength=0)
    pipe.set_cersa_adapters("b", {"unet": 1.0, "text_encoder": 0.0})
    assert pipe.get_active_cersa_adapters() == []
    pipe.enable_cersa()
    assert pipe.get_active_cersa_adapters() == ["b"] and differ(small.picture(pipe), small.picture(truncated))


def test_deleting_gives_layers_without_an_adapter_their_weight_back(adapter_file):
    pipe, only_text = small.pipeline("sd1"), small.pipeline("sd1")
    pipe.load_cersa_weights(adapter_file("sd1"), adapter_name="a")
    for each in (pipe, only_text):
        each.load_cersa_weights(adapter_file("sd1", components=("text_encoder",)), adapter_name="b")
    pipe.delete_cersa_adapters("a")
    assert pipe.get_list_cersa_adapters() == {"text_encoder": ["b"]} and not cersa_layers(pipe.unet)
    assert torch.equal(small.picture(pipe), small.picture(only_text))


@pytest.mark.parametrize("form", ["dense", "factors"])
def test_fused_layers_are_not_changed_behind_the_back(adapter_file, tmp_path, form):
    pipe = small.pipeline("sd1")
    pipe.load_cersa_weights(adapter_file("sd1"), adapter_name="a")
    pipe.fuse_cersa(form=form)
    fused = small.picture(pipe)
    for change in (
        lambda: pipe.load_cersa_weights(adapter_file("sd1"), adapter_name="b"),
        lambda: pipe.load_cersa_weights(adapter_file("sd1"), adapter_name="a", hotswap=True),
        lambda: pipe.set_cersa_adapters("a", 0.5),
        lambda: pipe.delete_cersa_adapters("a"),
        pipe.disable_cersa,
        pipe.enable_cersa,
        lambda: cersa.add_adapter(pipe.unet, "c", like="a"),
        lambda: cersa.load_adapter({"unet": pipe.unet, "text_encoder": pipe.text_encoder}, adapter_file("sd1")),
    ):
        with raises(ConfigError, "fused", "unfuse_cersa()"):
            change()
    assert torch.equal(small.picture(pipe), fused) and pipe.get_active_cersa_adapters() == ["a"]
    pipe.save_cersa_weights(tmp_path, "a", dtype=torch.float32)
    assert torch.equal(small.picture(pipe), fused)
    pipe.unload_cersa_weights()
    pipe.load_cersa_weights(tmp_path)
    torch.testing.assert_close(small.picture(pipe), fused, rtol=0, atol=1e-4)


@pytest.mark.parametrize("form", ["dense", "factors"])
@pytest.mark.parametrize("moved", [torch.float16, torch.float32])
def test_unfuse_after_a_dtype_move(adapter_file, moved, form):
    pipe, expected = small.pipeline("sd1"), small.pipeline("sd1")
    for each in (pipe, expected):
        each.load_cersa_weights(adapter_file("sd1"))
    pipe.fuse_cersa(form=form)
    pipe.to(moved)
    pipe.unfuse_cersa()
    expected.to(moved)
    assert torch.equal(small.picture(pipe), small.picture(expected))


@pytest.mark.parametrize("form", ["dense", "factors"])
def test_fused_and_merged_pipelines_are_plain_to_stock_diffusers(adapter_file, tmp_path, form):
    pipe = small.pipeline("sdxl")
    pipe.load_cersa_weights(adapter_file("sdxl"), strength=0.5)
    pipe.fuse_cersa(form=form)
    adapted = small.picture(pipe)
    pipe.save_pretrained(tmp_path / "fused")
    assert torch.equal(small.picture(pipe), adapted)
    for model in small.adapted_components(pipe).values():
        cersa.merge(model)
        assert all(type(module) is torch.nn.Linear for name, module in model.named_modules() if name.endswith("to_q"))
    pipe.save_pretrained(tmp_path / "merged")
    for folder in ("fused", "merged"):
        stock = StableDiffusionXLPipeline.from_pretrained(tmp_path / folder).to(DEVICE)
        torch.testing.assert_close(small.picture(stock), adapted, rtol=0, atol=1e-5)


def test_a_single_model_saves_dense_weights_and_its_own_state_dict_stays_factored(adapter_file, tmp_path):
    pipe = small.pipeline("sd1")
    untouched = set(pipe.unet.state_dict())
    pipe.load_cersa_weights(adapter_file("sd1"), adapter_name="a")
    factored = set(pipe.unet.state_dict())
    pipe.unet.save_pretrained(tmp_path)
    assert set(pipe.unet.state_dict()) == factored
    stock, loading = UNet2DConditionModel.from_pretrained(tmp_path, output_loading_info=True)
    stock.to(DEVICE)
    assert not any(loading.values()) and set(stock.state_dict()) == untouched
    weight = stock.mid_block.attentions[0].transformer_blocks[0].attn1.to_q.weight
    assert torch.equal(weight, pipe.unet.mid_block.attentions[0].transformer_blocks[0].attn1.to_q.effective_weight())


@pytest.fixture
def lora_file(tmp_path):
    """A LoRA with values on the attention of the UNet."""
    unet = small.pipeline("sd1").unet
    torch.manual_seed(3)
    unet.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_v"], init_lora_weights=False))
    layers = convert_state_dict_to_diffusers(get_peft_model_state_dict(unet))
    StableDiffusionPipeline.save_lora_weights(tmp_path, unet_lora_layers=layers)
    return tmp_path / "pytorch_lora_weights.safetensors"


def test_a_layer_with_a_lora_is_refused_with_the_order_that_works(adapter_file, lora_file):
    pipe = small.pipeline("sd1")
    pipe.load_lora_weights(lora_file)
    before = small.picture(pipe)
    with raises(ConfigError, "attn1.to_q", "LoRA", "unload_lora_weights()", "fuse_cersa()"):
        pipe.load_cersa_weights(adapter_file("sd1"))
    assert torch.equal(small.picture(pipe), before) and not cersa_modules(pipe)
    pipe.load_cersa_weights(adapter_file("sd1", components=("text_encoder",)))
    assert differ(small.picture(pipe), before)


def test_a_lora_goes_on_top_of_a_fused_adapter(adapter_file, lora_file):
    pipe = small.pipeline("sd1")
    base = small.picture(pipe)
    pipe.load_cersa_weights(adapter_file("sd1"))
    adapted = small.picture(pipe)
    with raises(ValueError, "CersaLinear"):
        pipe.load_lora_weights(lora_file)
    assert torch.equal(small.picture(pipe), adapted)
    pipe.fuse_cersa(form="factors")
    with raises(ValueError, "FusedFactors"):
        pipe.load_lora_weights(lora_file)
    pipe.unfuse_cersa()
    pipe.fuse_cersa()
    fused = small.picture(pipe)
    pipe.load_lora_weights(lora_file)
    assert differ(small.picture(pipe), fused)
    for change in (pipe.unfuse_cersa, pipe.unload_cersa_weights):
        with raises(ConfigError, "fused", "attn1.to_q", "LoRA", "unload_lora_weights()"):
            change()
    pipe.unload_lora_weights()
    assert torch.equal(small.picture(pipe), fused)
    pipe.unfuse_cersa()
    assert torch.equal(small.picture(pipe), adapted)
    pipe.unload_cersa_weights()
    assert torch.equal(small.picture(pipe), base)
