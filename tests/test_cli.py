"""The `cersa` command."""

import pytest
import torch

import cersa_diffusion as cersa
from cersa_diffusion.cache import DecompositionCache, leading_factors
from cersa_diffusion.cli import main


def test_info_tells_base_settings_training_and_layers(trained, tmp_path, capsys):
    path = tmp_path / "a.safetensors"
    cersa.save_adapter(trained[1], path, base_model={"name_or_path": "emoji"}, training={"steps": 20})
    main(["info", str(path)])
    shown = capsys.readouterr().out
    numbers = sum(parameter.numel() for parameter in cersa.trainable_parameters(trained[1]))
    assert '"emoji"' in shown and "steps: 20" in shown and "model: 3 layers" in shown and f"{numbers / 1e6:.2f} M" in shown


def test_info_of_something_else_is_one_line(tmp_path):
    (tmp_path / "a.safetensors").write_bytes(b"\x00" * 40)
    with pytest.raises(SystemExit, match=r"error: .*not a readable safetensors file"):
        main(["info", str(tmp_path / "a.safetensors")])


def test_cache_info_and_clear(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("CERSA_CACHE", str(tmp_path))
    leading_factors(torch.randn(9, 5), lambda s: 3, DecompositionCache.default())
    main(["cache", "info"])
    assert "1 entries" in capsys.readouterr().out
    main(["cache", "clear"])
    assert "0 entries" in capsys.readouterr().out and not list(tmp_path.glob("*/*"))
    monkeypatch.setenv("CERSA_CACHE", "off")
    main(["cache", "info"])
    assert "off" in capsys.readouterr().out
