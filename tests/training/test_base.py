"""Bases are read from safetensors alone."""

import pytest

from cersa_diffusion import ConfigError
from cersa_diffusion.adapters.file import AdapterFile
from cersa_diffusion.pipelines.open import base_pipeline, load_base

from ..conftest import raises
from ..pipelines_small import pipeline


@pytest.mark.parametrize("load", [load_base, lambda path: base_pipeline(AdapterFile({}, {}, {}, {}), path)])
def test_a_pickled_base_is_refused(load, tmp_path):
    small = pipeline("sd1")
    small.save_pretrained(tmp_path / "base")
    load(str(tmp_path / "base"))
    (tmp_path / "base" / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    small.unet.save_pretrained(tmp_path / "base" / "unet", safe_serialization=False)
    with raises(ConfigError, str(tmp_path / "base"), "safetensors", "pickles"):
        load(str(tmp_path / "base"))
