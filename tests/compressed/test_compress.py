"""Compressed checkpoints: the same model as after an injection, written and read tensor by tensor, or not at all."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline, StableDiffusionPipeline
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertModel,
    CLIPTextConfig,
    CLIPTextModel,
    ViTConfig,
    ViTForImageClassification,
)

import cersa_diffusion as cersa
from cersa_diffusion import AdapterFormatError, CersaConfig, CersaLinear, ConfigError, NonFiniteError
from cersa_diffusion.cli.command import main
from cersa_diffusion.layers.model import cersa_layers

from ..conftest import DEVICE, raises, randn

ATTENTION = ["q_proj", "k_proj", "v_proj", "out_proj"]
CONFIGS = {"unet": CersaConfig(alpha=0.9), "text_encoder": CersaConfig(alpha=0.9, target_modules=ATTENTION)}
WEIGHTS, DESCRIPTION = "cersa_model.safetensors", "cersa_compression.json"


@pytest.fixture(autouse=True)
def no_cache(monkeypatch):
    monkeypatch.setenv("CERSA_CACHE", "off")


@pytest.fixture
def no_solver(monkeypatch):
    """Any decomposition from here on fails the test."""

    def solver(weight):
        raise AssertionError("decomposed")

    return lambda: monkeypatch.setattr("cersa_diffusion.weights.cache.decompose", solver)


@pytest.fixture(scope="module")
def compressed_base(base_path, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("compressed") / "base"
    cersa.compress(base_path, folder, config=CONFIGS, dtype=torch.float32, show_progress=False)
    return folder


def text_model(folder: Path, dtype: torch.dtype = torch.float32, **save_options) -> CLIPTextModel:
    """A small CLIP text model, saved; its linear weights have decaying spectra."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 60}
    model = CLIPTextModel(CLIPTextConfig(**sizes, max_position_embeddings=16)).eval()
    for layer in model.modules():
        if isinstance(layer, torch.nn.Linear):
            U, s, Vh = torch.linalg.svd(torch.randn_like(layer.weight), full_matrices=False)
            layer.weight.data = (U * s * torch.logspace(0, -2, len(s))) @ Vh
    model.to(dtype).save_pretrained(folder, **save_options)
    return model


def factors(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {f"{name}.{part}": getattr(layer, part) for name, layer in cersa_layers(model).items() for part in ("U", "s", "Vh")}


def assert_same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert a.keys() == b.keys() and all(torch.equal(tensor, b[name]) for name, tensor in a.items())


def test_pipeline_loads_to_the_bits_of_an_injection_without_a_solver(base_path, compressed_base, no_solver):
    dense = StableDiffusionPipeline.from_pretrained(base_path, dtype=torch.float32)
    for name, config in CONFIGS.items():
        cersa.inject_cersa(getattr(dense, name), config, show_progress=False)
    dense.to(DEVICE)
    no_solver()
    pipe = cersa.load_compressed(compressed_base).to(DEVICE)
    assert type(pipe) is StableDiffusionPipeline and not pipe.unet.training
    for name in CONFIGS:
        expected, found = getattr(dense, name), getattr(pipe, name)
        assert_same(factors(found), factors(expected))
        assert type(found) is type(expected)
    options = {"num_inference_steps": 2, "output_type": "np", "height": 64, "width": 64}
    pictures = [p("cat", generator=torch.Generator().manual_seed(0), **options).images for p in (dense, pipe)]
    assert (pictures[0] == pictures[1]).all()


def test_folder_holds_everything_but_the_dense_weights(base_path, compressed_base):
    files = {path.relative_to(folder) for folder in (base_path, compressed_base) for path in folder.rglob("*") if path.is_file()}
    dense = {Path("unet/diffusion_pytorch_model.safetensors"), Path("text_encoder/model.safetensors")}
    assert {path for path in files if not (compressed_base / path).is_file()} == dense
    for path in files - dense:
        if (base_path / path).is_file():
            assert (base_path / path).read_bytes() == (compressed_base / path).read_bytes()
    description = json.loads((compressed_base / "unet" / DESCRIPTION).read_text())
    assert CersaConfig.from_dict(description["config"]) == CONFIGS["unet"]
    with safe_open(compressed_base / "unet" / WEIGHTS, "pt") as file:
        assert all(file.get_slice(f"{name}.U").get_shape() == [own["m"], own["k"]] for name, own in description["layers"].items())
        assert not {f"{name}.weight" for name in description["layers"]} & set(file.keys())


def test_stock_diffusers_refuses_the_folder_instead_of_loading_random_weights(compressed_base):
    with raises(OSError, str(compressed_base)) as caught:
        DiffusionPipeline.from_pretrained(compressed_base)
    # The weights of whichever component comes first.
    assert any(name in str(caught.value) for name in ("model.safetensors", "model.bin"))


def test_adapter_of_the_dense_base_loads_on_top_and_unloads(base_path, compressed_base, tmp_path, no_solver):
    dense = StableDiffusionPipeline.from_pretrained(base_path, dtype=torch.float32).to(DEVICE)
    cersa.inject_cersa(dense.unet, CONFIGS["unet"], show_progress=False)
    for number, layer in enumerate(cersa_layers(dense.unet).values()):
        rank = layer.cores["default"].rank
        layer.cores["default"].D.data = 0.01 * randn(rank, rank, generator=torch.Generator().manual_seed(number))
    cersa.save_adapter({"unet": dense.unet}, tmp_path / "adapter.safetensors", dtype=torch.float32)
    no_solver()
    pipe = cersa.load_compressed(compressed_base).to(DEVICE)
    before = factors(pipe.unet)
    pipe.load_cersa_weights(tmp_path / "adapter.safetensors")
    expected, found = cersa_layers(dense.unet), cersa_layers(pipe.unet)
    for name in expected:
        torch.testing.assert_close(found[name].weight_change(), expected[name].weight_change(), rtol=1e-3, atol=1e-6)
    pipe.unload_cersa_weights()
    assert not any(layer.cores for layer in cersa_layers(pipe.unet).values())
    assert_same(factors(pipe.unet), before)


def test_adapter_of_a_larger_energy_share_is_refused_by_name(base_path, compressed_base, tmp_path):
    dense = StableDiffusionPipeline.from_pretrained(base_path, dtype=torch.float32).to(DEVICE)
    cersa.inject_cersa(dense.unet, CersaConfig(alpha=0.99), show_progress=False)
    cersa.save_adapter({"unet": dense.unet}, tmp_path / "adapter.safetensors")
    pipe = cersa.load_compressed(compressed_base).to(DEVICE)
    name = min(cersa_layers(pipe.unet))
    ranks = [str(cersa_layers(unet)[name].kept_rank) for unet in (pipe.unet, dense.unet)]
    with raises(ConfigError, f"unet.{name}", *ranks):
        pipe.load_cersa_weights(tmp_path / "adapter.safetensors")


def test_training_on_a_compressed_model(tmp_path):
    text_model(tmp_path / "dense")
    cersa.compress(tmp_path / "dense", tmp_path / "small", alpha=0.9, show_progress=False)
    model = cersa.load_compressed(tmp_path / "small").to(DEVICE)
    with raises(ConfigError, "CLIPTextModel", "12", "add_adapter"):
        cersa.inject_cersa(model, CersaConfig())
    cersa.add_adapter(model, "mine")
    trained = cersa.trainable_parameters(model)
    assert [tuple(core.shape) for core in trained] == [(layer.kept_rank,) * 2 for layer in cersa_layers(model).values()]
    tokens = torch.arange(10, device=DEVICE).reshape(2, 5)
    before, frozen = model(tokens).last_hidden_state, {name: tensor.clone() for name, tensor in factors(model).items()}
    optimizer = torch.optim.AdamW(trained, 1e-2)
    model(tokens).last_hidden_state.square().mean().backward()
    optimizer.step()
    assert not torch.equal(model(tokens).last_hidden_state, before)
    assert_same(factors(model), frozen)
    cersa.save_adapter(model, tmp_path / "mine.safetensors", adapter_name="mine", dtype=torch.float32)
    dense = CLIPTextModel.from_pretrained(tmp_path / "dense", dtype=torch.float32).to(DEVICE)
    cersa.load_adapter(dense, tmp_path / "mine.safetensors", show_progress=False)
    torch.testing.assert_close(dense(tokens).last_hidden_state, model(tokens).last_hidden_state, rtol=1e-3, atol=1e-4)


def test_an_architecture_whose_files_have_other_names_than_its_modules(tmp_path):
    torch.manual_seed(0)
    sizes = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}
    ViTForImageClassification(ViTConfig(**sizes, image_size=16, patch_size=8)).save_pretrained(tmp_path / "vit")
    model = ViTForImageClassification.from_pretrained(tmp_path / "vit").to(DEVICE)
    cersa.inject_cersa(model, CersaConfig(alpha=0.8), show_progress=False)
    cersa.compress(tmp_path / "vit", tmp_path / "small", alpha=0.8, show_progress=False)
    opened, pixels = cersa.load_compressed(tmp_path / "small").to(DEVICE), randn(2, 3, 16, 16)
    with torch.no_grad():
        assert torch.allclose(opened(pixels).logits, model.eval()(pixels).logits, atol=1e-5)
    assert len(cersa_layers(opened)) == len(cersa_layers(model)) == 13


@pytest.mark.parametrize("stored", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("loaded", [torch.float32, torch.float16, torch.bfloat16])
def test_dtypes(tmp_path, stored, loaded):
    dense = text_model(tmp_path / "dense")
    cersa.compress(tmp_path / "dense", tmp_path / "small", alpha=0.9, dtype=stored, show_progress=False)
    cersa.inject_cersa(dense, CersaConfig(alpha=0.9), show_progress=False)
    model = cersa.load_compressed(tmp_path / "small", dtype=loaded)
    assert model.dtype == loaded
    for name, tensor in factors(dense).items():
        found = factors(model)[name]
        assert torch.equal(found, tensor if name.endswith(".s") else tensor.to(stored).to(loaded))
    assert {p.dtype for p in model.parameters()} == {loaded}


def test_a_half_precision_checkpoint_stays_one(tmp_path):
    text_model(tmp_path / "dense", torch.float16)
    cersa.compress(tmp_path / "dense", tmp_path / "small", alpha=0.9, show_progress=False)
    tensors = load_file(tmp_path / "small" / WEIGHTS)
    assert {t.dtype for name, t in tensors.items() if not name.endswith(".s")} == {torch.float16}
    assert {t.dtype for name, t in tensors.items() if name.endswith(".s")} == {torch.float32}


@pytest.mark.parametrize("prefix", ["", "text_model."])
def test_shards_and_both_spellings_of_clip_keys(tmp_path, prefix):
    dense = text_model(tmp_path / "one")
    tensors = {prefix + name: tensor for name, tensor in load_file(tmp_path / "one" / "model.safetensors").items()}
    (tmp_path / "shards").mkdir()
    shutil.copy(tmp_path / "one" / "config.json", tmp_path / "shards")
    weight_map = {}
    for number in range(3):
        file = f"model-{number}.safetensors"
        part = dict(sorted(tensors.items())[number::3])
        save_file(part, tmp_path / "shards" / file)
        weight_map |= dict.fromkeys(part, file)
    (tmp_path / "shards" / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    cersa.compress(tmp_path / "shards", tmp_path / "small", alpha=0.9, show_progress=False)
    assert sorted(path.name for path in (tmp_path / "small").iterdir()) == [DESCRIPTION, WEIGHTS, "config.json"]
    cersa.inject_cersa(dense, CersaConfig(alpha=0.9), show_progress=False)
    model = cersa.load_compressed(tmp_path / "small").to(DEVICE)
    dense.to(DEVICE)
    assert_same(dict(model.state_dict()), {name: t for name, t in dense.state_dict().items() if ".cores." not in name})


def test_layers_left_dense_stay_bit_for_bit(tmp_path):
    dense = text_model(tmp_path / "dense")
    config = CersaConfig(alpha=0.9, target_modules=["fc1", "fc2"], unprofitable="skip")
    report = cersa.compress(tmp_path / "dense", tmp_path / "small", config=config, show_progress=False)
    model = cersa.load_compressed(tmp_path / "small").to(DEVICE)
    dense.to(DEVICE)
    assert set(cersa_layers(model)) == set(report.layers)
    bases = {f"{name}.{linear}.weight" for name in report.layers for linear in ("up", "down")}
    kept = {name.replace(".up.bias", ".bias"): tensor for name, tensor in model.named_parameters() if name not in bases}
    assert all(torch.equal(kept[name], tensor) for name, tensor in dense.named_parameters() if name in kept)
    assert set(kept) == {name for name, _ in dense.named_parameters()} - {f"{name}.weight" for name in report.layers}


def test_equal_layers_of_uniform_blocks_keep_the_same_number_of_components(tmp_path):
    dense, other = text_model(tmp_path / "dense"), text_model(tmp_path / "other")
    config = CersaConfig(alpha=0.9, rank_multiple=2, uniform_blocks=True)
    report = cersa.compress(tmp_path / "dense", tmp_path / "small", config=config, show_progress=False)
    cersa.inject_cersa(dense, config, show_progress=False)
    assert_same(factors(cersa.load_compressed(tmp_path / "small").to(DEVICE)), factors(dense.to(DEVICE)))
    cersa.inject_cersa(other, CersaConfig(alpha=0.9, rank_multiple=2), show_progress=False)
    alone = {name: layer.kept_rank for name, layer in cersa_layers(other).items()}
    blocks = [{name: k for name, k in report.layers.items() if f"layers.{number}." in name} for number in range(2)]
    assert list(blocks[0].values()) == list(blocks[1].values()) and list(report.layers.values()) != list(alone.values())
    description = json.loads((tmp_path / "small" / DESCRIPTION).read_text())["config"]
    assert (description["rank_multiple"], description["uniform_blocks"]) == (2, True)


def test_tied_weights_are_refused_and_others_survive(tmp_path):
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 30}
    tied = BertForMaskedLM(BertConfig(**sizes)).eval()
    tied.save_pretrained(tmp_path / "tied")
    with raises(ConfigError, "cls.predictions.decoder", "bert.embeddings.word_embeddings.weight", "exclude_modules"):
        cersa.compress(tmp_path / "tied", tmp_path / "small", show_progress=False)
    assert not (tmp_path / "small").exists()
    config = CersaConfig(alpha=1.0, exclude_modules=["decoder"])
    cersa.compress(tmp_path / "tied", tmp_path / "small", config=config, show_progress=False)
    model = cersa.load_compressed(tmp_path / "small").to(DEVICE)
    tokens = torch.arange(8, device=DEVICE).reshape(2, 4)
    assert model.cls.predictions.decoder.weight is model.bert.embeddings.word_embeddings.weight
    torch.testing.assert_close(model(tokens).logits, tied.to(DEVICE)(tokens).logits, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("architecture", ["AutoModel", "CLIPTextConfig", "is_torch_available", 7])
def test_an_architecture_that_is_no_class_of_models_is_refused(architecture, tmp_path):
    text_model(tmp_path / "model")
    config = json.loads((tmp_path / "model" / "config.json").read_text()) | {"architectures": [architecture]}
    (tmp_path / "model" / "config.json").write_text(json.dumps(config))
    with raises(ConfigError, repr(architecture), "PreTrainedModel"):
        cersa.compress(tmp_path / "model", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_nothing_is_left_when_a_weight_is_damaged(tmp_path):
    text_model(tmp_path / "dense")
    tensors = load_file(tmp_path / "dense" / "model.safetensors")
    name = "encoder.layers.1.mlp.fc2.weight"
    tensors[name][3, 4] = torch.nan
    save_file(tensors, tmp_path / "dense" / "model.safetensors", {"format": "pt"})
    with raises(NonFiniteError, "model.safetensors", name.removesuffix(".weight")):
        cersa.compress(tmp_path / "dense", tmp_path / "small", show_progress=False)
    assert [path.name for path in tmp_path.iterdir()] == ["dense"]


def test_bad_input(tmp_path, base_path, compressed_base):
    text_model(tmp_path / "dense")
    out, used = tmp_path / "out", tmp_path / "used"
    used.mkdir()
    (used / "file").touch()
    (tmp_path / "pickle").mkdir()
    shutil.copy(tmp_path / "dense" / "config.json", tmp_path / "pickle")
    (tmp_path / "pickle" / "pytorch_model.bin").touch()
    for arguments, options, named in (
        ((tmp_path / "dense", used), {}, "output_dir used"),
        ((tmp_path / "nowhere", out), {}, "nowhere owner/name"),
        ((used, out), {}, "used model_index.json config.json"),
        ((tmp_path / "pickle", out), {}, "pickle pytorch_model.bin safe_serialization=True"),
        ((tmp_path / "dense", out), {"variant": "fp16"}, "dense variant 'fp16' model.safetensors"),
        ((tmp_path / "dense", out), {"alpha": 0.9, "config": CersaConfig()}, "alpha 0.9 config"),
        ((tmp_path / "dense", out), {"config": {"unet": CersaConfig()}}, "dense ['unet'] config"),
        ((tmp_path / "dense", out), {"config": CersaConfig(residual="keep")}, "config residual='keep'"),
        ((tmp_path / "dense", out), {"config": CersaConfig(target_modules=["to_q"])}, "target_modules=['to_q'] CLIPTextModel"),
        ((base_path, out), {"config": {"prior": CersaConfig()}}, "'prior' 'unet'"),
        ((compressed_base, out), {}, "unet compressed"),
    ):
        with raises(ConfigError, *named.split()):
            cersa.compress(*arguments, show_progress=False, **options)
    assert not out.exists()
    for folder in (base_path, tmp_path / "nowhere", used):
        with pytest.raises(ConfigError):
            cersa.load_compressed(folder)


@pytest.mark.parametrize(
    ("damage", "named"),
    [
        ("truncated", WEIGHTS),
        ("other weights", "encoder.layers.0.self_attn.k_proj"),
        ("not JSON", DESCRIPTION),
        ("newer", f"{DESCRIPTION} 2 1 cersa-diffusion"),
        ("absurd rank", DESCRIPTION),
        ("missing tensor", WEIGHTS),
        ("no file", WEIGHTS),
    ],
)
def test_damaged_folders_are_errors_that_name_the_file(tmp_path, damage, named):
    text_model(tmp_path / "dense")
    small = tmp_path / "small"
    cersa.compress(tmp_path / "dense", small, alpha=0.9, show_progress=False)
    weights, description = small / WEIGHTS, json.loads((small / DESCRIPTION).read_text())
    tensors = load_file(weights)
    layer = next(iter(description["layers"]))
    if damage == "truncated":
        weights.write_bytes(weights.read_bytes()[:-100])
    elif damage == "other weights":
        save_file(tensors | {f"{layer}.s": tensors[f"{layer}.s"] * 1.01}, weights)
    elif damage == "not JSON":
        (small / DESCRIPTION).write_text("{")
    elif damage == "newer":
        (small / DESCRIPTION).write_text(json.dumps(description | {"format_version": 2}))
    elif damage == "absurd rank":
        description["layers"][layer]["k"] = 10**9
        (small / DESCRIPTION).write_text(json.dumps(description))
    elif damage == "missing tensor":
        save_file({name: tensor for name, tensor in tensors.items() if name != f"{layer}.Vh"}, weights)
    else:
        weights.unlink()
    with raises(AdapterFormatError, "small", *named.split()):
        cersa.load_compressed(small)


PEAK = """
import sys, torch, cersa_diffusion as cersa

def now(field):
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(field)) / 1024

def growth(action):
    open("/proc/self/clear_refs", "w").write("5")  # the peak starts from here
    before = now("VmRSS")
    result = action()
    return now("VmHWM") - before, result

tiny, big, out = sys.argv[1:]
config = cersa.CersaConfig(rank=8)
run = lambda source: lambda: cersa.compress(source, out + source.rpartition("/")[2], config=config, show_progress=False)
run(tiny)(), cersa.load_compressed(out + "tiny")  # imports and BLAS buffers
print(growth(run(big))[0], growth(lambda: cersa.load_compressed(out + "big"))[0])
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the peak of a process is read from Linux's /proc")
def test_neither_writing_nor_loading_holds_the_dense_model(tmp_path):
    torch.manual_seed(0)
    for name, layers in (("tiny", 1), ("big", 24)):
        sizes = {"hidden_size": 256, "intermediate_size": 1024, "num_attention_heads": 2, "vocab_size": 30}
        BertModel(BertConfig(**sizes, num_hidden_layers=layers)).save_pretrained(tmp_path / name)
    dense = (tmp_path / "big" / "model.safetensors").stat().st_size / 2**20
    output = subprocess.run(
        [sys.executable, "-c", PEAK, str(tmp_path / "tiny"), str(tmp_path / "big"), f"{tmp_path}/out-"],
        check=True,
        capture_output=True,
        text=True,
    ).stdout
    writing, loading = map(float, output.split())
    assert writing < 0.5 * dense and loading < 0.2 * dense, (writing, loading, dense)


def test_ids_on_the_hub(base_path, compressed_base, tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(DiffusionPipeline, "download", lambda *names, **options: asked.append((names, options)) or str(base_path))
    monkeypatch.setattr(
        "huggingface_hub.snapshot_download", lambda *names, **options: asked.append((names, options)) or compressed_base
    )
    config = CersaConfig(rank=4, target_modules=["to_q"])
    cersa.compress("owner/base", tmp_path / "small", config=config, revision="v1", show_progress=False)
    cersa.load_compressed("owner/small", revision="v2")
    assert [names for names, _ in asked] == [("owner/base",), ("owner/small",)]
    assert [options["revision"] for _, options in asked] == ["v1", "v2"]


def test_command(tmp_path, base_path, capsys):
    arguments = ["compress", str(base_path), str(tmp_path / "small"), "--alpha", ".8", "--dtype", "float16"]
    main([*arguments, "--rank_multiple", "5", "--uniform_blocks", "--components", "text_encoder"])
    assert "16 layers factored" in capsys.readouterr().out
    pipe = cersa.load_compressed(tmp_path / "small", dtype=torch.float16)
    assert not cersa_layers(pipe.unet) and len(cersa_layers(pipe.text_encoder)) == 16
    queries = [layer.self_attn.q_proj for layer in pipe.text_encoder.encoder.layers]
    assert isinstance(queries[0], CersaLinear) and queries[0].kept_rank % 5 == 0
    assert {layer.kept_rank for layer in queries} == {queries[0].kept_rank}
    with raises(SystemExit, "error", "output_dir", "small"):
        main(arguments)
