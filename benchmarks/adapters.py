"""Shared by the timings of saving and of loading an adapter: the command line, and an adapter to save."""

import argparse
from pathlib import Path

import torch
from torch import nn

import cersa_diffusion as cersa
from cersa_diffusion.families.stable_diffusion import STABLE_DIFFUSION
from cersa_diffusion.layers.model import cersa_layers
from cersa_diffusion.pipelines.open import load_base

# Rank of the LoRA that is compared with CERSA.
LORA_RANK = 32


def make_parser(description: str) -> argparse.ArgumentParser:
    """A parser with the options of both benchmarks."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--base", default=str(Path(__file__).resolve().parents[1] / "assets" / "emoji-base"))
    parser.add_argument("--alpha", type=float, default=0.95)
    parser.add_argument("--repeats", type=int, default=5)
    return parser


def injected(base: str, alpha: float) -> dict[str, nn.Module]:
    """The UNet and the text encoder of a base with CERSA in every target layer; the core of each layer is changed."""
    torch.manual_seed(0)
    pipeline = load_base(base)
    for name, targets in STABLE_DIFFUSION.trained.items():
        model = getattr(pipeline, name)
        cersa.inject_cersa(model, cersa.CersaConfig(alpha=alpha, target_modules=targets), show_progress=False)
        for layer in cersa_layers(model).values():
            layer.cores["default"].D.data.normal_(std=0.01)
    return {name: getattr(pipeline, name) for name in STABLE_DIFFUSION.trained}
