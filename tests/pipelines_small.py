"""Small pipelines of every supported family, built from configs: Stable Diffusion 1.x, 2.x, XL, 3, and Flux. No downloads."""

import copy
import functools
import string
from pathlib import Path

import diffusers
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    PreTrainedTokenizerFast,
    T5Config,
    T5EncoderModel,
)

import cersa_diffusion as cersa

from .conftest import DEVICE

PROMPT = "a cat on a mat"
SIZE = 16
FAMILIES = ("sd1", "sd2", "sdxl", "sd3", "flux")
# What an adapter of these tests changes: all linear layers of the denoiser, the attention of the text encoders.
TARGETS = {
    name: "all-linear" if name in ("unet", "transformer") else ["q_proj", "k_proj", "v_proj", "out_proj"]
    for name in ("unet", "transformer", "text_encoder", "text_encoder_2")
}


def clip_tokenizer() -> CLIPTokenizer:
    letters = [*string.ascii_lowercase, *(f"{letter}</w>" for letter in string.ascii_lowercase)]
    vocabulary = {token: number for number, token in enumerate([*letters, "<|startoftext|>", "<|endoftext|>"])}
    return CLIPTokenizer(vocab=vocabulary, merges=[], model_max_length=16)


def t5_tokenizer() -> PreTrainedTokenizerFast:
    words = ["<pad>", "<unk>", "</s>", *PROMPT.split()]
    tokenizer = Tokenizer(models.WordLevel({word: number for number, word in enumerate(dict.fromkeys(words))}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", unk_token="<unk>", eos_token="</s>", model_max_length=16
    )


def clip_text(with_projection: bool = False) -> nn.Module:
    config = CLIPTextConfig(
        vocab_size=54, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=16, projection_dim=16, bos_token_id=52, eos_token_id=53, pad_token_id=53,
    )  # fmt: skip
    return (CLIPTextModelWithProjection if with_projection else CLIPTextModel)(config)


def t5_text() -> T5EncoderModel:
    return T5EncoderModel(T5Config(vocab_size=16, d_model=32, d_kv=8, d_ff=32, num_layers=1, num_heads=2))


def autoencoder(latent_channels: int = 4, **settings) -> diffusers.AutoencoderKL:
    return diffusers.AutoencoderKL(
        block_out_channels=(8, 8), down_block_types=["DownEncoderBlock2D"] * 2, up_block_types=["UpDecoderBlock2D"] * 2,
        norm_num_groups=4, latent_channels=latent_channels, **settings,
    )  # fmt: skip


def unet(cross_attention_dim: int, **settings) -> diffusers.UNet2DConditionModel:
    return diffusers.UNet2DConditionModel(
        sample_size=SIZE // 2, block_out_channels=(16, 32), layers_per_block=1, norm_num_groups=4, attention_head_dim=8,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=cross_attention_dim, **settings,
    )  # fmt: skip


def ddim(prediction_type: str) -> diffusers.DDIMScheduler:
    return diffusers.DDIMScheduler(prediction_type=prediction_type, clip_sample=False, set_alpha_to_one=False, steps_offset=1)


def stable_diffusion(prediction_type: str, **settings) -> diffusers.StableDiffusionPipeline:
    return diffusers.StableDiffusionPipeline(
        autoencoder(), clip_text(), clip_tokenizer(), unet(16, **settings), ddim(prediction_type),
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip


def stable_diffusion_xl() -> diffusers.StableDiffusionXLPipeline:
    model = unet(
        32, transformer_layers_per_block=(1, 2), use_linear_projection=True, addition_embed_type="text_time",
        addition_time_embed_dim=8, projection_class_embeddings_input_dim=16 + 6 * 8,
    )  # fmt: skip
    return diffusers.StableDiffusionXLPipeline(
        autoencoder(), clip_text(), clip_text(True), clip_tokenizer(), clip_tokenizer(), model, ddim("epsilon"),
        add_watermarker=False,
    )  # fmt: skip


def stable_diffusion_3() -> diffusers.StableDiffusion3Pipeline:
    transformer = diffusers.SD3Transformer2DModel(
        sample_size=SIZE // 2, patch_size=1, in_channels=4, out_channels=4, num_layers=2, attention_head_dim=8,
        num_attention_heads=4, joint_attention_dim=32, caption_projection_dim=32, pooled_projection_dim=32,
    )  # fmt: skip
    return diffusers.StableDiffusion3Pipeline(
        transformer, diffusers.FlowMatchEulerDiscreteScheduler(), autoencoder(shift_factor=0.1), clip_text(True),
        clip_tokenizer(), clip_text(True), clip_tokenizer(), t5_text(), t5_tokenizer(),
    )  # fmt: skip


def flux() -> diffusers.FluxPipeline:
    transformer = diffusers.FluxTransformer2DModel(
        patch_size=1, in_channels=4, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=32, pooled_projection_dim=16, axes_dims_rope=[4, 4, 8],
    )  # fmt: skip
    return diffusers.FluxPipeline(
        diffusers.FlowMatchEulerDiscreteScheduler(), autoencoder(1, shift_factor=0.1), clip_text(), clip_tokenizer(), t5_text(),
        t5_tokenizer(), transformer,
    )  # fmt: skip


BUILDERS = {
    "sd1": lambda: stable_diffusion("epsilon"),
    "sd2": lambda: stable_diffusion("v_prediction", use_linear_projection=True),
    "sdxl": stable_diffusion_xl,
    "sd3": stable_diffusion_3,
    "flux": flux,
}


@functools.cache
def _built(family: str) -> diffusers.DiffusionPipeline:
    torch.manual_seed(0)
    pipeline = BUILDERS[family]()
    for model in pipeline.components.values():
        if isinstance(model, nn.Module):
            decay_spectra(model.eval())
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def decay_spectra(model: nn.Module) -> None:
    """Gives the linear layers the decaying spectra of trained weights: random ones are flat."""
    for layer in model.modules():
        if type(layer) is nn.Linear:
            U, s, Vh = torch.linalg.svd(layer.weight.detach(), full_matrices=False)
            layer.weight = nn.Parameter(2 * (U * s * torch.logspace(0, -1, len(s))) @ Vh)


def pipeline(family: str) -> diffusers.DiffusionPipeline:
    """A pipeline of its own for each call, all with the same weights, on the device of the tests."""
    return copy.deepcopy(_built(family)).to(DEVICE)


def denoiser(pipe) -> nn.Module:
    return pipe.unet if hasattr(pipe, "unet") else pipe.transformer


def adapted_components(pipe, names: tuple[str, ...] | None = None) -> dict[str, nn.Module]:
    """The components that the adapters of these tests change: the denoiser and the text encoders of CLIP."""
    found = {name: getattr(pipe, name, None) for name in TARGETS if names is None or name in names}
    return {name: model for name, model in found.items() if model is not None and not isinstance(model, T5EncoderModel)}


def cersa_modules(pipe) -> list[cersa.CersaLinear]:
    models = adapted_components(pipe).values()
    return [module for model in models for module in model.modules() if isinstance(module, cersa.CersaLinear)]


def write_adapter(family: str, folder: Path, *, seed: int = 0, components=None, alpha: float = 0.9, **settings) -> Path:
    """The file of an adapter for a small pipeline, with random cores (an untrained one is zero and hides mistakes).

    The ranks are exact: in layers as small as these, rounded ones would hardly differ.
    """
    pipe = pipeline(family)
    models = adapted_components(pipe, components)
    generator = torch.Generator().manual_seed(seed)
    for name, model in models.items():
        config = cersa.CersaConfig(alpha=alpha, rank_multiple=1, target_modules=TARGETS[name])
        cersa.inject_cersa(model, config, show_progress=False)
        for core in cersa.trainable_parameters(model):
            core.data.copy_(torch.empty(core.shape).normal_(std=0.4 / len(core) ** 0.5, generator=generator))
    path = folder / "pytorch_cersa_weights.safetensors"
    cersa.save_adapter(models, path, dtype=torch.float32, **settings)
    return path


def picture(pipe, **arguments) -> torch.Tensor:
    """(3, 16, 16) on the CPU: two steps from fixed noise."""
    generator = torch.Generator().manual_seed(0)
    pipe.set_progress_bar_config(disable=True)
    result = pipe(
        PROMPT, height=SIZE, width=SIZE, num_inference_steps=2, generator=generator, output_type="pt", **arguments
    )  # fmt: skip
    return result.images[0].cpu()


def differ(first: torch.Tensor, second: torch.Tensor) -> bool:
    """Whether two pictures differ by more than rounding."""
    return not torch.allclose(first, second, atol=1e-3)
