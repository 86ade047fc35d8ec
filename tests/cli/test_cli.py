"""The `cersa` command."""

import json

import pytest
import torch

import cersa_diffusion as cersa
from cersa_diffusion.cli.command import main
from cersa_diffusion.weights.cache import LATENTS, DecompositionCache, TensorCache, leading_factors

from ..conftest import raises


def test_info_tells_base_settings_training_and_layers(trained, tmp_path, capsys):
    path = tmp_path / "a.safetensors"
    cersa.save_adapter(trained[1], path, base_model={"name_or_path": "emoji"}, training={"steps": 20})
    main(["info", str(path)])
    shown = capsys.readouterr().out
    numbers = sum(parameter.numel() for parameter in cersa.trainable_parameters(trained[1]))
    assert '"emoji"' in shown and "steps: 20" in shown and "model: 3 layers" in shown and f"{numbers / 1e6:.2f} M" in shown


def test_info_of_something_else_is_one_line(tmp_path):
    (tmp_path / "a.safetensors").write_bytes(b"\x00" * 40)
    with raises(SystemExit, "error", "a.safetensors"):
        main(["info", str(tmp_path / "a.safetensors")])


def test_cache_info_and_clear(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("CERSA_CACHE", str(tmp_path))
    leading_factors(torch.randn(9, 5), lambda s: 3, DecompositionCache.default())
    TensorCache.default(LATENTS).write_tensors("ab" * 32, {"mean": torch.ones(2)})
    main(["cache", "info"])
    shown = capsys.readouterr().out
    assert shown.count("1 entries") == 2 and f"{tmp_path / LATENTS}: 1 entries" in shown
    main(["cache", "clear"])
    assert "1 entries" not in capsys.readouterr().out and not list(tmp_path.rglob("*.safetensors"))
    monkeypatch.setenv("CERSA_CACHE", "off")
    main(["cache", "info"])
    assert "off" in capsys.readouterr().out


def test_plan_of_a_pipeline_as_json_and_picture(base_path, tmp_path, capsys):
    picture = tmp_path / "plan.png"
    options = ["--alpha", "0.9", "--beta", "0.8", "--rank", "8", "--batch", "2", "--dtype", "bfloat16"]
    options += ["--rank_multiple", "5", "--uniform_blocks"]
    main(["plan", str(base_path), *options, "--format", "json", "--plot", str(picture)])
    plan = json.loads(capsys.readouterr().out)
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert {layer["name"].partition(".")[0] for layer in plan["layers"]} == {"unet", "text_encoder"}
    assert all(0 < layer["core_rank"] <= layer["kept_rank"] for layer in plan["layers"])
    for layer in plan["layers"]:
        full = min(layer["out_features"], layer["in_features"])
        assert layer["kept_rank"] % 5 == 0 or layer["kept_rank"] == full
    encoder = [layer for layer in plan["layers"] if layer["name"].startswith("text_encoder") and layer["kind"] == "q_proj"]
    assert len(encoder) > 1 and len({(layer["kept_rank"], layer["core_rank"]) for layer in encoder}) == 1
    assert all(layer["memory"]["lora"]["activations"] > 0 for layer in plan["layers"])
    assert (plan["lora_rank"], plan["weight_dtype"], plan["activations_counted"]) == (8, "bfloat16", True)
    weights = sum(path.stat().st_size for path in base_path.rglob("*.safetensors"))
    # The files hold 16 bits per number, the pipeline is opened in 32.
    assert plan["peaks"]["system"] == pytest.approx(2 * weights, rel=0.05)
    totals = plan["totals"]["whole_model"]
    assert all(totals[method]["total"] < peak for method, peak in plan["peaks"]["steps"].items())
    assert totals["cersa"]["frozen"] < plan["peaks"]["preparing"]


def test_plan_as_tables(base_path, capsys):
    main(["plan", str(base_path), "--optimizer", "adafactor"])
    shown = capsys.readouterr().out
    assert "unet to_out.0" in shown and "LoRA r=32" in shown and "optimizer adafactor" in shown
    assert "activations are not counted" in shown
    assert "preparing CERSA" in shown and "system memory" in shown and "steps, " not in shown
    main(["plan", str(base_path), "--format", "markdown", "--resolution", "32"])
    shown = capsys.readouterr().out
    assert "| text_encoder q_proj" in shown and "| saved activations" in shown and "| steps, LoRA r=32 " in shown


def test_plan_with_a_budget(base_path, tmp_path, capsys):
    for shown_as in ("json", "table", "markdown"):
        options = ["--memory_budget", "60MB", "--format", shown_as, "--plot", str(tmp_path / "plan.png")]
        main(["plan", str(base_path), *options])
        shown = capsys.readouterr().out
        if shown_as == "json":
            plan = json.loads(shown)
            total = plan["totals"]["whole_model"]["cersa"]["total"]
            assert 59.9e6 < total <= plan["memory_budget"] == 60_000_000
            assert 0 < plan["alpha_by_kind"]["unet to_q"]["lowest"] < 1
        else:
            assert (
                "The budget of 57.22 MiB chose the ranks" in shown
                and f"{plan['alpha_by_kind']['unet to_q']['mean']:.3f}" in shown
            )


@pytest.mark.parametrize(
    ("options", "names"),
    [
        (["--memory_budget", "1MB"], "memory_budget 1000000"),
        (["--alpha", "2"], "alpha 2.0"),
        (["--batch", "0"], "batch 0"),
        (["--rank", "0"], "lora_rank 0"),
    ],
)
def test_plan_with_settings_that_cannot_be_is_one_line(base_path, options, names):
    with raises(SystemExit, "error", *names.split()):
        main(["plan", str(base_path), *options])
