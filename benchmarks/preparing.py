#!/usr/bin/env python
"""Peak memory of preparing and of training a whole model: a pipeline with the shapes of Stable Diffusion 2.1, on CPU or GPU.

The weights of the linear layers have a heavy-tailed spectrum in which alpha keeps the wanted share of the rank, and everything
else is random: the figures are about memory, not about pictures. The pipeline is written to a folder once and loaded from there,
as a user does it. Every case runs in a new process. On a CPU the peak is the resident memory, pages of the checkpoint that are
mapped into memory included; on a GPU it is the allocated memory.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from accelerate import Accelerator
from diffusers import AutoencoderKL, DDPMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from layers import ALPHA
from PIL import Image
from torch import nn
from transformers import AutoTokenizer, CLIPTextConfig, CLIPTextModel
from whole_model import Weights

from cersa_diffusion.pipelines.open import load_base
from cersa_diffusion.text import mib, table
from cersa_diffusion.training.data.captions import read_examples
from cersa_diffusion.training.run.loop import DreamBoothRun
from cersa_diffusion.training.run.peaks import PREPARING, TRAINING, PeakMemory
from cersa_diffusion.training.settings.config import DreamBoothConfig

EMBEDDED_BASE = Path(__file__).parents[1] / "assets" / "emoji-base"
SHOWN = ("preparing", "planned preparing", "training", "planned training")
# Sizes for a check of this script.
SMALL = {"block_out_channels": (64, 128, 256, 256), "attention_head_dim": (2, 4, 8, 8), "layers_per_block": 1}


def write_base(folder: Path, share: float, small: bool) -> None:
    """Writes the pipeline: a UNet and a text encoder of the shapes of SD 2.1, a small autoencoder, the embedded tokenizer."""
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(EMBEDDED_BASE / "tokenizer")
    text = {"hidden_size": 256, "num_hidden_layers": 2} if small else {"hidden_size": 1024, "num_hidden_layers": 23}
    text |= {"intermediate_size": 4 * text["hidden_size"], "num_attention_heads": text["hidden_size"] // 64}
    special = {
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    text_encoder = CLIPTextModel(
        CLIPTextConfig(vocab_size=len(tokenizer), max_position_embeddings=tokenizer.model_max_length, **text, **special)
    )
    shape = SMALL if small else {"attention_head_dim": (5, 10, 20, 20)}
    unet = UNet2DConditionModel(sample_size=64, cross_attention_dim=text["hidden_size"], use_linear_projection=True, **shape)
    weights = Weights(share)
    for model in (unet, text_encoder):
        for layer in model.modules():
            if type(layer) is nn.Linear:
                layer.weight.data = weights.next(tuple(layer.weight.shape))
    vae = AutoencoderKL(
        block_out_channels=(32, 32, 32, 32),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        sample_size=512,
    )
    StableDiffusionPipeline(
        vae=vae, text_encoder=text_encoder, tokenizer=tokenizer, unet=unet, scheduler=DDPMScheduler(),
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    ).save_pretrained(folder)  # fmt: skip


def measure(base: str, method: str, precision: str, resolution: int, steps: int, checkpointing: bool) -> dict:
    """The peaks of one run in bytes."""
    with tempfile.TemporaryDirectory() as folder:
        pictures = Path(folder, "pictures")
        pictures.mkdir()
        Image.effect_noise((resolution, resolution), 60).convert("RGB").save(pictures / "0.png")
        config = DreamBoothConfig(
            pretrained_model_name_or_path=base,
            instance_data_dir=str(pictures),
            instance_prompt="a robot",
            output_dir=str(Path(folder, "run")),
            method=method,
            alpha=ALPHA,
            rank=32,
            resolution=resolution,
            center_crop=True,
            mixed_precision=precision,
            train_batch_size=1,
            gradient_checkpointing=checkpointing,
            max_train_steps=steps,
        )
        accelerator = Accelerator(mixed_precision=precision)
        peaks = PeakMemory(accelerator.device)
        base = load_base(base, family=config.family)
        run = DreamBoothRun(config, base, accelerator, read_examples(config), peaks=peaks)
        run.fit(Path(folder, "run"))
    return {
        "preparing": peaks.of(PREPARING),
        "planned preparing": peaks.at_start + run.preparation.planned_preparing,
        "training": peaks.of(TRAINING),
        "planned training": peaks.at_start + run.preparation.planned_training,
        "seconds": run.preparation.seconds,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="+", default=["cersa", "lora"])
    parser.add_argument("--precisions", nargs="+", default=["no", "bf16"], choices=["no", "bf16", "fp16"])
    parser.add_argument("--resolution", type=int, default=512)
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--share", type=float, default=0.35, help="share of the rank that CERSA keeps (k/n)")
    parser.add_argument("--checkpointing", action="store_true", help="recompute activations in the backward pass")
    parser.add_argument("--small", action="store_true", help="a small model, to check this script")
    parser.add_argument("--folder", help="keeps the pipeline here for the next call; default: a temporary folder")
    parser.add_argument("--output", help="writes the figures to this JSON file")
    parser.add_argument("--case", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.case:
        print(json.dumps(measure(*json.loads(arguments.case))))
        return
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(arguments.folder or temporary, "base")
        if not folder.is_dir():
            write_base(folder, arguments.share, arguments.small)
        environment = os.environ | {"CERSA_CACHE": str(folder.parent / "cache")}
        rows, results = [], []
        for method in arguments.methods:
            for precision in arguments.precisions:
                case = json.dumps(
                    [str(folder), method, precision, arguments.resolution, arguments.steps, arguments.checkpointing]
                )
                command = [sys.executable, __file__, "--case", case]
                process = subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE, text=True)
                figures = json.loads(process.stdout.splitlines()[-1])
                results.append({"method": method, "precision": precision, **figures})
                ratio = figures["preparing"] / figures["training"]
                rows.append([method, precision, *(mib(figures[name]) for name in SHOWN), f"{ratio:.2f}"])
                print(table(["method", "precision", *SHOWN, "preparing / training"], rows), flush=True)
    if arguments.output:
        Path(arguments.output).write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
