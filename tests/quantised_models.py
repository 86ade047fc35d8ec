"""Small models that the quantising libraries themselves have quantised, as users load them, and what the libraries dequantise.

A test that asks for a way whose library is not installed is skipped, and says so.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import diffusers
import pytest
import torch
import transformers
from torch import Tensor, nn

from .conftest import DEVICE, randn
from .pipelines_small import decay_spectra


@dataclass(frozen=True)
class Way:
    """A way to quantise a model.

    Args:
        library: the package that it needs.
        load: (folder, dtype) -> the model of this folder with all linear layers quantised.
        dequantised: the (m, n) weight of one of its layers as the library dequantises it.
        state: everything that such a weight is stored in.
        build: makes the model that is quantised.
    """

    library: str
    load: Callable[[Path, torch.dtype], nn.Module]
    dequantised: Callable[[nn.Module], Tensor]
    state: Callable[[nn.Module], list[Tensor]]
    build: Callable[[], nn.Module]


def unet() -> nn.Module:
    # Rows of GGUF files consist of blocks of 32 numbers.
    return diffusers.UNet2DConditionModel(
        sample_size=8, block_out_channels=(32, 64), layers_per_block=1, norm_num_groups=4, attention_head_dim=8,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=32,
    )  # fmt: skip


def text_encoder() -> nn.Module:
    config = transformers.CLIPTextConfig(
        vocab_size=54, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=16, bos_token_id=52, eos_token_id=53, pad_token_id=53,
    )  # fmt: skip
    return transformers.CLIPTextModel(config)


def _bitsandbytes(**settings) -> Callable[[Path, torch.dtype], nn.Module]:
    def load(folder: Path, dtype: torch.dtype) -> nn.Module:
        config = transformers.BitsAndBytesConfig(**settings)
        return transformers.CLIPTextModel.from_pretrained(folder, quantization_config=config, dtype=dtype)

    return load


def _dequantised_4bit(layer: nn.Module) -> Tensor:
    import bitsandbytes

    return bitsandbytes.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state)


def _state_4bit(layer: nn.Module) -> list[Tensor]:
    state = layer.weight.quant_state
    return [layer.weight.data, state.absmax, state.code, *([state.state2.absmax, state.state2.code] if state.nested else [])]


def _scales_8bit(layer: nn.Module) -> Tensor:
    return layer.weight.SCB if layer.state.SCB is None else layer.state.SCB


def _dequantised_8bit(layer: nn.Module) -> Tensor:
    import bitsandbytes

    return bitsandbytes.functional.int8_vectorwise_dequant(layer.weight.data, _scales_8bit(layer))


def _gguf(kind: str) -> Callable[[Path, torch.dtype], nn.Module]:
    def load(folder: Path, dtype: torch.dtype) -> nn.Module:
        import gguf

        path, quantised = folder / f"{kind}.gguf", gguf.GGMLQuantizationType[kind]
        writer = gguf.GGUFWriter(str(path), "unet")
        model = diffusers.UNet2DConditionModel.from_pretrained(folder)
        weights = {f"{name}.weight" for name, layer in model.named_modules() if type(layer) is nn.Linear}
        for name, tensor in model.state_dict().items():
            if name in weights:
                writer.add_tensor(name, gguf.quants.quantize(tensor.numpy(), quantised), raw_dtype=quantised)
            else:
                writer.add_tensor(name, tensor.numpy())
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        config = diffusers.GGUFQuantizationConfig(compute_dtype=dtype)
        return diffusers.UNet2DConditionModel.from_single_file(
            str(path), config=str(folder), quantization_config=config, torch_dtype=dtype
        )

    return load


def _dequantised_gguf(layer: nn.Module) -> Tensor:
    from diffusers.quantizers.gguf.utils import dequantize_gguf_tensor

    return dequantize_gguf_tensor(layer.weight)


def _torchao(config_name: str) -> Callable[[Path, torch.dtype], nn.Module]:
    def load(folder: Path, dtype: torch.dtype) -> nn.Module:
        import torchao.quantization

        config = diffusers.TorchAoConfig(getattr(torchao.quantization, config_name)())
        return diffusers.UNet2DConditionModel.from_pretrained(folder, quantization_config=config, torch_dtype=dtype)

    return load


def _plain_tensors(tensor: Tensor) -> list[Tensor]:
    if type(tensor) in (Tensor, nn.Parameter):
        return [tensor]
    return [part for name in tensor.__tensor_flatten__()[0] for part in _plain_tensors(getattr(tensor, name))]


def _bitsandbytes_4bit(**settings) -> Way:
    load = _bitsandbytes(load_in_4bit=True, **settings)
    return Way("bitsandbytes", load, _dequantised_4bit, _state_4bit, text_encoder)


def _of_gguf(kind: str) -> Way:
    return Way("gguf", _gguf(kind), _dequantised_gguf, lambda layer: [layer.weight.as_tensor()], unet)


def _of_torchao(config_name: str) -> Way:
    return Way(
        "torchao",
        _torchao(config_name),
        lambda layer: layer.weight.detach().dequantize(),
        lambda layer: _plain_tensors(layer.weight),
        unet,
    )


WAYS = {
    "bitsandbytes nf4": _bitsandbytes_4bit(bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True),
    "bitsandbytes fp4": _bitsandbytes_4bit(bnb_4bit_quant_type="fp4"),
    "bitsandbytes int8": Way(
        "bitsandbytes",
        _bitsandbytes(load_in_8bit=True),
        _dequantised_8bit,
        lambda layer: [layer.weight.data, _scales_8bit(layer)],
        text_encoder,
    ),
    "gguf Q8_0": _of_gguf("Q8_0"),
    "gguf Q4_0": _of_gguf("Q4_0"),
    "torchao int8": _of_torchao("Int8WeightOnlyConfig"),
    "torchao float8": _of_torchao("Float8WeightOnlyConfig"),
}


def dense_model(way: Way, folder: Path) -> nn.Module:
    """The model before it is quantised, saved into the folder."""
    torch.manual_seed(0)
    model = way.build().eval()
    decay_spectra(model)
    model.save_pretrained(folder)
    return model.to(DEVICE)


def quantised_model(name: str, folder: Path, dtype: torch.dtype = torch.float32) -> nn.Module:
    """A model that is quantised in one of the `WAYS`; always with the same numbers."""
    way = WAYS[name]
    pytest.importorskip(way.library)
    dense_model(way, folder)
    return way.load(folder, dtype).to(DEVICE).eval()


def output(model: nn.Module) -> Tensor:
    """What a model makes of fixed inputs."""
    if isinstance(model, diffusers.UNet2DConditionModel):
        torch.manual_seed(3)
        latents, text = randn(2, 4, 8, 8).to(model.dtype), randn(2, 7, 32).to(model.dtype)
        return model(latents, torch.tensor([1, 500], device=DEVICE), text).sample
    return model(torch.arange(12, device=DEVICE).reshape(2, 6)).last_hidden_state


def linear_layers(model: nn.Module) -> dict[str, nn.Module]:
    """Name -> linear layer, of whatever subclass."""
    return {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
