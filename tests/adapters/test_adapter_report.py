"""`cersa info`, `diff`, `export-lora` and `merge` on real files."""

import copy

import pytest
import torch
from diffusers import DiffusionPipeline
from safetensors.torch import load_file

import cersa_diffusion as cersa
from cersa_diffusion.adapters.file import read_adapter_file
from cersa_diffusion.adapters.report import compare_adapters, describe_adapter
from cersa_diffusion.cli.command import main
from cersa_diffusion.layers.model import cersa_layers
from cersa_diffusion.pipelines.open import load_base

from ..conftest import raises, train


@pytest.fixture
def two(trained, tmp_path):
    """Two adapters of one network, the second trained on, and the network: (network, files, models)."""
    base, first = trained
    second = copy.deepcopy(first)
    train(second, steps=10)
    paths = [tmp_path / "first.safetensors", tmp_path / "second.safetensors"]
    for model, path in zip((first, second), paths, strict=True):
        cersa.save_adapter(model, path, dtype=torch.float32)
    return base, paths, (first, second)


def relative_differences(first, second) -> dict[str, float]:
    changes = {name: layer.weight_change() for name, layer in cersa_layers(first).items()}
    return {
        f"model.{name}": float((changes[name] - layer.weight_change()).norm() / changes[name].norm())
        for name, layer in cersa_layers(second).items()
    }


def test_differences_with_a_base_are_those_of_the_weight_changes(two):
    base, paths, models = two
    a, b = map(read_adapter_file, paths)
    for row in compare_adapters(a, b, {"model": base}, show_progress=False):
        assert row.exact and row.difference == pytest.approx(relative_differences(*models)[row.name], rel=1e-3)
    for row in compare_adapters(a, b):
        assert not row.exact and 0.2 < row.difference / relative_differences(*models)[row.name] < 5
    assert all(row.difference == 0 for row in compare_adapters(a, a))


def test_adapters_of_other_ranks_and_layers(two, tmp_path):
    base, paths, _ = two
    other = copy.deepcopy(base)
    cersa.inject_cersa(other, cersa.CersaConfig(alpha=0.7, target_modules=["0", "2"]), show_progress=False)
    train(other)
    cersa.save_adapter(other, tmp_path / "other.safetensors")
    a, b = read_adapter_file(paths[0]), read_adapter_file(tmp_path / "other.safetensors")
    notes = {row.name: row.note for row in compare_adapters(a, b)}
    assert "a base is needed" in notes["model.0"] and notes["model.4"] == "only in the first"
    known = {row.name for row in compare_adapters(a, b, {"model": base}, show_progress=False) if row.difference is not None}
    assert known == {"model.0", "model.2"}


def test_diff_and_info_as_commands(two, tmp_path, capsys):
    _, paths, models = two
    main(["diff", *map(str, paths)])
    shown = capsys.readouterr().out
    assert "model.2: " in shown and "3 layers, relative difference of their stored blocks" in shown
    cersa.save_adapter(models[0], paths[1], save_energy=0.6, save_bases=True)
    main(["info", str(paths[1])])
    shown = capsys.readouterr().out
    assert "stored as thin factors" in shown and "with their bases" in shown and "error of the weight changes" in shown


def test_thin_factors_hold_the_energy_they_were_asked_for(two):
    base, paths, models = two
    errors = cersa.save_adapter(models[0], paths[1], save_energy=0.8, dtype=torch.float32)
    assert paths[1].stat().st_size < paths[0].stat().st_size
    thin = [name for name, layer in read_adapter_file(paths[1]).layers.items() if len(layer.factors) == 2]
    assert thin
    assert all(0 < errors[name] <= 0.2**0.5 for name in thin)
    loaded = copy.deepcopy(base)
    cersa.load_adapter(loaded, paths[1], show_progress=False)
    for name, error in relative_differences(models[0], loaded).items():
        assert error == pytest.approx(errors[name], abs=1e-5)
    assert f"{len(thin)} of them stored as thin" in describe_adapter(read_adapter_file(paths[1]))
    with raises(cersa.ConfigError, "save_energy", "1.5"):
        cersa.save_adapter(models[0], paths[1], save_energy=1.5)


@pytest.fixture(scope="module")
def text_adapter(base_path, tmp_path_factory):
    """An adapter of the embedded base's text encoder, which names its base: (file, adapted pipeline)."""
    pipeline = load_base(str(base_path))
    cersa.inject_cersa(pipeline.text_encoder, cersa.CersaConfig(target_modules=["q_proj", "k_proj"]), show_progress=False)
    torch.manual_seed(0)
    for layer in cersa_layers(pipeline.text_encoder).values():
        layer.cores["default"].D.data.normal_(std=0.02)
    path = tmp_path_factory.mktemp("text") / "adapter.safetensors"
    parts = {"text_encoder": pipeline.text_encoder}
    cersa.save_adapter(parts, path, dtype=torch.float32, base_model={"name_or_path": str(base_path)})
    return path, pipeline


def test_export_lora_as_a_command(text_adapter, base_path, tmp_path, capsys):
    command = ["export-lora", str(text_adapter[0]), str(tmp_path / "lora.safetensors"), "--rank", "16", "--format", "kohya"]
    main([*command, "--base", str(base_path)])
    shown = capsys.readouterr().out
    assert "8 layers, rank 16" in shown and "on the original base" in shown and "text_encoder q_proj" in shown
    assert len(load_file(tmp_path / "lora.safetensors")) == 24


def test_merge_as_a_command(text_adapter, base_path, tmp_path, capsys):
    with raises(SystemExit, "adapter.safetensors", "--base", base_path.name):
        main(["merge", str(text_adapter[0]), str(tmp_path / "merged")])
    main(["merge", str(text_adapter[0]), str(tmp_path / "merged"), "--base", str(base_path)])
    assert "8 layers merged" in capsys.readouterr().out
    merged = DiffusionPipeline.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    ids = torch.arange(24)[None]
    with torch.no_grad():
        torch.testing.assert_close(merged.text_encoder(ids)[0], text_adapter[1].text_encoder(ids)[0], rtol=1e-3, atol=1e-3)


def test_a_base_that_is_not_there_is_one_line(text_adapter, tmp_path):
    with raises(SystemExit, "base", str(tmp_path / "nowhere")):
        main(["merge", str(text_adapter[0]), str(tmp_path / "merged"), "--base", str(tmp_path / "nowhere")])
