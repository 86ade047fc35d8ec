"""Adapters on real diffusers pipelines: the embedded base."""

import shutil
from pathlib import Path

import huggingface_hub
import pytest
import torch
from accelerate import Accelerator
from diffusers import (
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
)

import cersa_diffusion as cersa
from cersa_diffusion import AdapterFormatError, BaseMismatchError, CersaConfig, CersaLinear, ConfigError
from cersa_diffusion.training import DreamBoothConfig
from cersa_diffusion.training.base import TARGET_MODULES, load_base
from cersa_diffusion.training.data import picture_paths
from cersa_diffusion.training.dreambooth import DreamBoothRun


def picture(pipeline, prompt="a 3d emoji of a fox") -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    pipeline.set_progress_bar_config(disable=True)
    result = pipeline(prompt, num_inference_steps=3, guidance_scale=4.0, generator=generator, output_type="pt")
    return result.images[0]


def parts(pipeline) -> dict[str, torch.nn.Module]:
    return {name: getattr(pipeline, name) for name in TARGET_MODULES}


@pytest.fixture(scope="module")
def changed(base_path, subject_path, subject, tmp_path_factory):
    """A trained adapter on the embedded base: (file, weight changes by layer). A fresh one is zero and hides mistakes."""
    folder = tmp_path_factory.mktemp("adapter")
    config = DreamBoothConfig(
        str(base_path),
        str(subject_path / "instance"),
        subject["instance_prompt"],
        output_dir=str(folder),
        alpha=0.9,
        resolution=64,
        train_batch_size=2,
        max_train_steps=12,
        learning_rate=1e-3,
    )
    run = DreamBoothRun(config, load_base(str(base_path)), Accelerator())
    run.fit(picture_paths(config.instance_data_dir, "instance_data_dir"), [], folder, None)
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
        cersa.inject_cersa(model, CersaConfig(alpha=1.0, target_modules=TARGET_MODULES[name]), show_progress=False)
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
        cersa.inject_cersa(model, CersaConfig(alpha=0.9, target_modules=TARGET_MODULES[name]), show_progress=False)
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
    shutil.copy(changed[0], tmp_path / "other.safetensors")
    with pytest.raises(AdapterFormatError, match=r"other\.safetensors.*weight_name"):
        pipeline.load_cersa_weights(tmp_path)
    pipeline.load_cersa_weights(tmp_path, weight_name="other.safetensors", strength=0.5)
    layer = pipeline.unet.mid_block.attentions[0].transformer_blocks[0].attn1.to_q
    assert set(layer.cores) == {"default_0", "default_1"}
    with pytest.raises(ConfigError, match="'default_1' is already loaded"):
        pipeline.load_cersa_weights(changed[0], adapter_name="default_1")


def test_hub_ids_go_through_huggingface_hub(base_path, changed, monkeypatch):
    calls = []

    def download(repo_id, filename, **kwargs):
        calls.append((repo_id, filename, kwargs))
        return str(changed[0])

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    pipeline = load_base(str(base_path))
    pipeline.load_cersa_weights("someone/a-cat", revision="v2")
    assert calls == [("someone/a-cat", "pytorch_cersa_weights.safetensors", {"revision": "v2"})]
    assert isinstance(pipeline.unet.mid_block.attentions[0].transformer_blocks[0].attn1.to_q, CersaLinear)


@pytest.mark.parametrize("path", ["/no/such/file.safetensors", "no-such-thing", "some/where/deep"])
def test_paths_that_do_not_exist(base_path, path):
    with pytest.raises(AdapterFormatError, match="no such file or folder"):
        load_base(str(base_path)).load_cersa_weights(path)


def test_another_base_is_refused_and_the_pipeline_is_as_before(base_path, changed):
    pipeline = load_base(str(base_path))
    torch.manual_seed(3)
    for parameter in pipeline.unet.mid_block.parameters():
        parameter.data.add_(0.1 * torch.randn_like(parameter))
    before = picture(pipeline)
    with pytest.raises(BaseMismatchError, match=r"another base model.*unet\.mid_block"):
        pipeline.load_cersa_weights(changed[0])
    assert torch.equal(picture(pipeline), before)


def test_a_pipeline_without_the_text_encoder_is_told_what_is_missing(base_path, changed):
    pipeline = load_base(str(base_path))
    pipeline.text_encoder = None
    with pytest.raises(BaseMismatchError, match="component 'text_encoder'"):
        pipeline.load_cersa_weights(changed[0])


def test_keys_are_canonical_across_transformers_versions(changed):
    from safetensors import safe_open

    with safe_open(changed[0], "pt") as file:
        keys = list(file.keys())
    text_keys = [key for key in keys if key.startswith("text_encoder.")]
    assert text_keys and all(key.startswith("text_encoder.text_model.encoder.layers.") for key in text_keys)


def test_every_pipeline_class_has_the_methods():
    for pipeline_class in (StableDiffusionPipeline, StableDiffusionXLPipeline, FluxPipeline):
        assert callable(pipeline_class.load_cersa_weights) and callable(pipeline_class.unload_cersa_weights)


def flux_pipeline() -> FluxPipeline:
    torch.manual_seed(0)
    transformer = FluxTransformer2DModel(
        patch_size=1, in_channels=4, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=32, pooled_projection_dim=32, axes_dims_rope=[4, 4, 8],
    )  # fmt: skip
    return FluxPipeline(
        FlowMatchEulerDiscreteScheduler(), vae=None, text_encoder=None, tokenizer=None, text_encoder_2=None,
        tokenizer_2=None, transformer=transformer,
    )  # fmt: skip


def flux_latents(pipeline) -> torch.Tensor:
    pipeline.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    embeddings = {"prompt_embeds": torch.ones(1, 5, 32), "pooled_prompt_embeds": torch.ones(1, 32)}
    size = {"height": 32, "width": 32, "num_inference_steps": 2}
    return pipeline(**embeddings, **size, generator=generator, output_type="latent").images


def test_pipelines_with_a_transformer(tmp_path):
    trained = flux_pipeline()
    cersa.inject_cersa(trained.transformer, CersaConfig(alpha=0.9), show_progress=False)
    for core in cersa.trainable_parameters(trained.transformer):
        core.data.normal_(std=0.02)
    cersa.save_adapter({"transformer": trained.transformer}, tmp_path / "a.safetensors", dtype=torch.float32)
    pipeline = flux_pipeline()
    before = flux_latents(pipeline)
    pipeline.load_cersa_weights(tmp_path / "a.safetensors")
    torch.testing.assert_close(flux_latents(pipeline), flux_latents(trained), rtol=1e-3, atol=1e-3)
    assert not torch.allclose(flux_latents(pipeline), before, atol=1e-2)
    pipeline.unload_cersa_weights()
    assert torch.equal(flux_latents(pipeline), before)
