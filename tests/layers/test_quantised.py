"""Models with quantised linear layers: each layer is dequantised by its own library when its turn comes, and it comes back."""

import shutil

import numpy as np
import pytest
import torch
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from transformers import BitsAndBytesConfig, CLIPTextModel

import cersa_diffusion as cersa
from cersa_diffusion import BaseMismatchError, CersaConfig, CersaLinear, ConfigError, NonFiniteError
from cersa_diffusion.memory.plan import plan_memory
from cersa_diffusion.methods.settings import MethodSettings
from cersa_diffusion.methods.table import METHODS
from cersa_diffusion.training import DreamBoothConfig, train_dreambooth
from cersa_diffusion.weights import cache

from ..conftest import DEVICE, raises, randn, warns
from ..pipelines_small import pipeline
from ..quantised_models import WAYS, dense_model, linear_layers, output, quantised_model

# One way of each library, where the way does not matter.
EACH_LIBRARY = ["bitsandbytes nf4", "bitsandbytes int8", "gguf Q8_0", "torchao int8"]
RANK = 6


def inject(model: nn.Module, **options):
    config = CersaConfig(rank=RANK, target_modules="all-linear")
    return cersa.inject_cersa(model, config, show_progress=False, **options)


def stored(name: str, layers: dict[str, nn.Module]) -> dict[str, list[torch.Tensor]]:
    """Layer -> copies of all that its weight is stored in."""
    return {layer_name: [tensor.detach().clone() for tensor in WAYS[name].state(layer)] for layer_name, layer in layers.items()}


def truncated(weight: torch.Tensor, rank: int) -> np.ndarray:
    U, s, Vh = np.linalg.svd(weight.detach().double().cpu().numpy(), full_matrices=False)
    return (U[:, :rank] * s[:rank]) @ Vh[:rank]


def train(model: nn.Module, steps: int = 2) -> list[float]:
    optimizer, losses = torch.optim.AdamW(cersa.trainable_parameters(model), 1e-2), []
    target = randn(*output(model).shape, generator=torch.Generator().manual_seed(5))
    for _ in range(steps):
        loss = (output(model).float() - target).square().mean()
        losses.append(float(loss.detach()))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return losses


@pytest.mark.parametrize("name", WAYS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_layers_are_what_their_library_dequantises_truncated(name, dtype, tmp_path):
    model = quantised_model(name, tmp_path, dtype)
    layers = linear_layers(model)
    expected = {layer_name: truncated(WAYS[name].dequantised(layer), RANK) for layer_name, layer in layers.items()}
    report = inject(model)
    assert [row.name for row in report.layers] == list(layers) and len(layers) > 10
    for layer_name, weight in expected.items():
        layer = model.get_submodule(layer_name)
        assert type(layer) is CersaLinear and layer.U.dtype == dtype == model.dtype
        found = (layer.U.double() * layer.s.double()) @ layer.Vh.double()
        error = np.linalg.norm(found.detach().cpu().numpy() - weight) / np.linalg.norm(weight)
        assert error < (1e-5 if dtype == torch.float32 else 0.01)
    losses = train(model)
    assert losses[1] < losses[0]


@pytest.mark.parametrize("name", WAYS)
def test_the_kept_residual_adds_up_to_the_dequantised_weight(name, tmp_path):
    model = quantised_model(name, tmp_path)
    expected = {layer_name: WAYS[name].dequantised(layer) for layer_name, layer in linear_layers(model).items()}
    cersa.inject_cersa(model, CersaConfig(rank=RANK, residual="keep"), show_progress=False)
    for layer_name, weight in expected.items():
        torch.testing.assert_close(model.get_submodule(layer_name).effective_weight(), weight.float(), rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", WAYS)
@pytest.mark.parametrize("computed_before", [False, True])
def test_the_layers_come_back_themselves(name, computed_before, tmp_path):
    model = quantised_model(name, tmp_path, torch.bfloat16)
    if computed_before:  # bitsandbytes then moves its scales, and casts its biases
        output(model)
    layers = linear_layers(model)
    before = stored(name, layers)
    inject(model, keep_base=True)
    train(model)
    cersa.restore_base(model)
    assert linear_layers(model) == layers
    after = stored(name, layers)
    assert all(torch.equal(a, b) for layer in layers for a, b in zip(before[layer], after[layer], strict=True))
    reference = quantised_model(name, tmp_path, torch.bfloat16)
    assert torch.equal(output(model), output(reference))


@pytest.mark.parametrize("name", EACH_LIBRARY)
def test_a_failure_half_way_puts_all_layers_back(name, tmp_path, monkeypatch):
    model = quantised_model(name, tmp_path)
    layers, expected = linear_layers(model), output(model)
    decompose, left = cache.decompose, [5]

    def fail_later(weight):
        left[0] -= 1
        if left[0] < 0:
            raise torch.linalg.LinAlgError("not converged")
        return decompose(weight)

    monkeypatch.setenv("CERSA_CACHE", "off")
    monkeypatch.setattr("cersa_diffusion.weights.cache.decompose", fail_later)
    with raises(cersa.CersaError, "not converged"):
        inject(model)
    assert linear_layers(model) == layers
    assert torch.equal(output(model), expected)


@pytest.mark.parametrize("name", WAYS)
def test_an_adapter_loads_into_the_same_quantised_base(name, tmp_path):
    model = quantised_model(name, tmp_path)
    inject(model)
    train(model)
    expected, path = output(model), tmp_path / "adapter.safetensors"
    cersa.save_adapter(model, path, dtype=torch.float32)
    loaded = quantised_model(name, tmp_path)
    layers = linear_layers(loaded)
    cersa.load_adapter(loaded, path, show_progress=False)
    torch.testing.assert_close(output(loaded), expected, rtol=1e-3, atol=1e-4)
    cersa.restore_base(loaded)
    assert linear_layers(loaded) == layers


@pytest.mark.parametrize("name", WAYS)
def test_the_base_before_quantisation_is_another_one(name, tmp_path):
    model = quantised_model(name, tmp_path)
    inject(model)
    path = tmp_path / "adapter.safetensors"
    cersa.save_adapter(model, path)
    dense = dense_model(WAYS[name], tmp_path)
    with raises(BaseMismatchError, "adapter.safetensors", "allow_base_mismatch"):
        cersa.load_adapter(dense, path, show_progress=False)
    with warns(UserWarning, "allow_base_mismatch"):
        cersa.load_adapter(dense, path, allow_base_mismatch=True, show_progress=False)


@pytest.mark.parametrize("name", WAYS)
def test_the_plan_counts_quantised_weights_as_they_are_stored(name, tmp_path):
    model = quantised_model(name, tmp_path)
    layers = linear_layers(model)
    attention = {layer_name: layer for layer_name, layer in layers.items() if "attn" in layer_name}
    config = CersaConfig(rank=RANK, target_modules=list({layer_name.rsplit(".", 1)[-1] for layer_name in attention} - {"0"}))
    plan = plan_memory(model, config, lora_rank=4, weight_dtype=torch.float32, show_progress=False)
    for row in plan.layers:
        layer = layers[row.name.removeprefix("model.")]
        m, n = layer.out_features, layer.in_features
        assert (row.out_features, row.in_features) == (m, n)
        bias = 0 if layer.bias is None else 4 * m
        assert row.memory["cersa"].frozen == 4 * (m + n + 1) * RANK + bias
        assert row.memory["full"].trained == 4 * m * n
        weight = sum(tensor.nbytes for tensor in WAYS[name].state(layer))
        assert row.memory["lora"].frozen == weight + bias
    targets = {row.name.removeprefix("model.") for row in plan.layers}
    others = sum(sum(tensor.nbytes for tensor in WAYS[name].state(layer)) for key, layer in layers.items() if key not in targets)
    dense = sum(parameter.numel() for key, parameter in model.named_parameters() if key.removesuffix(".weight") not in layers)
    targets_biases = sum(layers[key].bias.numel() for key in targets if layers[key].bias is not None)
    buffers = sum(buffer.nbytes for buffer in model.buffers())
    rest = others + 4 * (dense - targets_biases) + buffers
    assert plan.untouched["lora"] == rest


@pytest.mark.parametrize("name", EACH_LIBRARY)
def test_a_damaged_weight_is_named(name, tmp_path):
    model = quantised_model(name, tmp_path)
    layer_name, layer = list(linear_layers(model).items())[3]
    *_, scales = WAYS[name].state(layer)[:2]
    if name.startswith("gguf"):
        scales.view(torch.float16)[0, 0] = torch.nan  # a block begins with its scale
    elif name.endswith("nf4"):
        layer.weight.quant_state.offset.fill_(torch.nan)
    else:
        scales.view(-1)[0] = torch.nan
    with raises(NonFiniteError, layer_name):
        inject(model)
    assert not any(isinstance(module, CersaLinear) for module in model.modules())


@pytest.mark.parametrize("name", EACH_LIBRARY)
def test_dense_weights_are_not_saved_beside_quantised_ones(name, tmp_path):
    model = quantised_model(name, tmp_path)
    inject(model)
    with raises(ConfigError, type(model).__name__, "save_adapter"):
        model.save_pretrained(tmp_path / "saved")
    assert not (tmp_path / "saved").exists()


def test_a_pipeline_draws_with_an_adapter_on_a_quantised_base_and_gets_it_back(tmp_path):
    pipe = pipeline("sd2")
    pipe.register_modules(unet=quantised_model("gguf Q8_0", tmp_path))
    pipe.text_encoder = None
    layers = linear_layers(pipe.unet)
    trained = quantised_model("gguf Q8_0", tmp_path)
    inject(trained)
    train(trained)
    expected = output(trained)
    cersa.save_adapter({"unet": trained}, tmp_path / "adapter.safetensors", dtype=torch.float32)
    pipe.load_cersa_weights(tmp_path / "adapter.safetensors", adapter_name="cat")
    torch.testing.assert_close(output(pipe.unet), expected, rtol=1e-3, atol=1e-4)
    pipe.fuse_cersa()
    torch.testing.assert_close(output(pipe.unet), expected, rtol=1e-3, atol=1e-4)
    pipe.unload_cersa_weights()
    assert linear_layers(pipe.unet) == layers


def test_the_trainer_refuses_a_base_that_was_saved_quantised(base_path, subject_path, tmp_path):
    pytest.importorskip("bitsandbytes")
    base = shutil.copytree(base_path, tmp_path / "base")
    settings = BitsAndBytesConfig(load_in_4bit=True)
    CLIPTextModel.from_pretrained(base / "text_encoder", quantization_config=settings).save_pretrained(base / "text_encoder")
    config = DreamBoothConfig(
        pretrained_model_name_or_path=str(base),
        instance_data_dir=str(subject_path / "instance"),
        instance_prompt="a cat",
        output_dir=str(tmp_path / "out"),
        max_train_steps=1,
    )
    with raises(ConfigError, "text_encoder", "quantised", "inject_cersa"):
        train_dreambooth(config)


@pytest.mark.parametrize("name", EACH_LIBRARY)
@pytest.mark.parametrize("method", ["full", "pissa"])
def test_methods_that_would_change_the_weights_refuse_them(name, method, tmp_path):
    model = quantised_model(name, tmp_path)
    layers = linear_layers(model)
    trainer = METHODS[method](MethodSettings(), {"unet": "all-linear"})
    with raises(ConfigError, next(iter(layers)), "cersa"):
        trainer.prepare("unet", model)
    assert linear_layers(model) == layers


@pytest.mark.parametrize(("class_name", "settings"), [("Linear4bit", {}), ("Linear8bitLt", {"has_fp16_weights": False})])
def test_a_layer_that_bitsandbytes_has_not_quantised_yet(class_name, settings):
    library = pytest.importorskip("bitsandbytes")
    model = nn.Sequential(getattr(library.nn, class_name)(64, 32, **settings))
    with raises(ConfigError, "layer 0", class_name, "device"):
        inject(model)
    model.to(DEVICE)
    inject(model)
    assert model[0].U.dtype == torch.float32


def test_weights_that_a_forward_pass_has_packed_for_the_cpu():
    """As on a CPU with AVX-512 for bfloat16: the function that Linear4bit.forward calls there."""
    functional = pytest.importorskip("bitsandbytes.functional")
    from bitsandbytes.nn import Linear4bit

    if not hasattr(functional, "_convert_weight_packed_for_cpu"):
        pytest.skip("this bitsandbytes packs no weights")
    model = nn.Sequential(Linear4bit(64, 32)).to("cpu")
    weight = model[0].weight
    weight.data, weight.quant_state = functional._convert_weight_packed_for_cpu(weight.data, weight.quant_state)
    with raises(ConfigError, "layer 0", "Linear4bit", "CPU", "load"):
        inject(model)


def test_a_weight_that_torchao_cannot_dequantise():
    """An opaque tensor of torchao holds numbers in an order that only a kernel knows."""
    torchao = pytest.importorskip("torchao.utils")

    class Opaque(torchao.TorchAOBaseTensor):
        tensor_data_names = ["packed"]  # noqa: RUF012
        tensor_attribute_names = []  # noqa: RUF012

        def __new__(cls, packed):
            return torch.Tensor._make_wrapper_subclass(cls, packed.shape, dtype=torch.float32, device=packed.device)

        def __init__(self, packed):
            super().__init__()
            self.packed = packed

    Opaque.__module__ = "torchao.quantization"
    model = nn.Sequential(nn.Linear(8, 6))
    model[0].weight = nn.Parameter(Opaque(torch.zeros(6, 8)), requires_grad=False)
    with raises(ConfigError, "layer 0", "Opaque", "torchao"):
        inject(model)


def test_only_the_layers_in_work_are_dequantised(tmp_path, monkeypatch):
    model = quantised_model("gguf Q8_0", tmp_path)
    from diffusers.quantizers.gguf import utils

    dequantise, results, alive = utils.dequantize_gguf_tensor, [], []

    def watched(weight):
        results.append(StorageWeakRef((matrix := dequantise(weight)).untyped_storage()))
        alive.append(sum(not result.expired() for result in results))
        return matrix

    monkeypatch.setenv("CERSA_CACHE", "off")
    monkeypatch.setattr(utils, "dequantize_gguf_tensor", watched)
    layers = len(inject(model).layers)
    assert len(alive) >= layers > 20
    assert max(alive) <= torch.get_num_threads() + 1
