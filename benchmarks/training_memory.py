#!/usr/bin/env python
"""Peak memory of training steps: CERSA with three alphas, LoRA with r = 32 and full fine-tuning of the same layers.

Each row runs in a new process, for two models: the embedded base in the trainer (UNet and text encoder, 64 pixels, batch 4), and
a UNet with the shapes of Stable Diffusion 2.1 (batch 1) whose layers have a spectrum in which alpha = 0.95 keeps k/n = 0.35; its
factors are random, because the memory depends only on the shapes. On a CPU the figure is the resident memory minus that of the
process before the weights; on a GPU it is the allocated memory. The table also shows the bytes of the memory plan
(`docs/method.md`) or of the tensors.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from accelerate import Accelerator
from diffusers import UNet2DConditionModel
from layers import ALPHA, LORA_RANK, decay_for
from peft import LoraConfig, inject_adapter_in_model
from torch import nn
from whole_model import MIB, forget_peak, used

from cersa_diffusion import CersaConfig, CersaLinear, trainable_parameters
from cersa_diffusion.functional import Decomposition
from cersa_diffusion.layers.core import MatrixCore
from cersa_diffusion.pipelines.open import load_base
from cersa_diffusion.training import DreamBoothConfig
from cersa_diffusion.training.data.captions import read_examples
from cersa_diffusion.training.run.loop import DreamBoothRun

REPOSITORY = Path(__file__).resolve().parents[1]
ROWS = ("cersa 0.8", "cersa 0.9", "cersa 0.95", "lora", "full")
SHARE = 0.35


def embedded_base(row: str, device: str, precision: str) -> dict:
    """Peak memory of four steps of the trainer on the embedded base."""
    method, _, alpha = row.partition(" ")
    subject = REPOSITORY / "assets" / "subjects" / "fluent-robot"
    with tempfile.TemporaryDirectory() as output:
        config = DreamBoothConfig(
            str(REPOSITORY / "assets" / "emoji-base"),
            "a 3d emoji of a sks robot",
            str(subject / "instance"),
            method=method,
            rank=LORA_RANK,
            resolution=64,
            center_crop=True,
            max_train_steps=4,
            output_dir=output,
            **({"alpha": float(alpha)} if alpha else {}),
        )
        accelerator = Accelerator(mixed_precision=precision, cpu=device == "cpu")
        before = used(device, peak=False)
        base = load_base(config.pretrained_model_name_or_path).to(accelerator.device)
        run = DreamBoothRun(config, base, accelerator, read_examples(config))
        forget_peak(device)
        run.fit(Path(output))
        planned = next(iter(run.preparation.planned.values())).total
        return {"peak": used(device, peak=True) - before, "planned": planned}


def replace_by_random_factors(layer: nn.Linear, alpha: float) -> CersaLinear:
    """A CERSA layer of the same shape, with the rank that alpha gives for the spectrum, and with random factors."""
    m, n = layer.weight.shape
    spectrum = decay_for(SHARE, min(m, n))
    rank = CersaConfig(alpha=alpha).kept_rank(spectrum)
    # With this scale the activations of 216 layers in a row neither explode nor vanish.
    factors = Decomposition(torch.randn(m, rank) / m**0.5, torch.ones(rank), torch.randn(rank, n) / n**0.5)
    factored = CersaLinear(factors, rank, layer.bias, layer.weight.dtype)
    factored.add_core("default", MatrixCore(rank))
    return factored


def shaped_unet(row: str) -> UNet2DConditionModel:
    """A UNet with the shapes of Stable Diffusion 2.1, in which only the parameters of the row's method are trainable."""
    method, _, alpha = row.partition(" ")
    unet = UNet2DConditionModel(
        sample_size=64, cross_attention_dim=1024, attention_head_dim=(5, 10, 20, 20), use_linear_projection=True
    ).requires_grad_(False)
    names = [name for name, layer in unet.named_modules() if type(layer) is nn.Linear]
    if method == "lora":
        inject_adapter_in_model(LoraConfig(r=LORA_RANK, lora_alpha=LORA_RANK, target_modules=names), unet)
    for name in names if method != "lora" else ():
        if method == "full":
            unet.get_submodule(name).weight.requires_grad_(True)
        else:
            unet.set_submodule(name, replace_by_random_factors(unet.get_submodule(name), float(alpha)))
    return unet


def shaped(row: str, device: str, precision: str, side: int, checkpointing: bool) -> dict:
    """Peak memory of two steps of the UNet of `shaped_unet`."""
    before = used(device, peak=False)
    unet = shaped_unet(row).to(device)
    if checkpointing:
        unet.enable_gradient_checkpointing()
    unet.train()
    trained = trainable_parameters(unet)
    optimizer = torch.optim.AdamW(trained, 1e-5)
    dtype = {"no": torch.float32, "bf16": torch.bfloat16}[precision]
    if dtype != torch.float32 and not row.startswith("full"):
        unet.to(dtype)
        for parameter in trained:
            parameter.data = parameter.data.float()
    latents, prompt = torch.randn(1, 4, side, side, device=device), torch.randn(1, 77, 1024, device=device)
    forget_peak(device)
    for _ in range(2):
        with torch.autocast(device, dtype, enabled=dtype != torch.float32):
            loss = unet(latents.to(unet.dtype), 500, prompt.to(unet.dtype)).sample.float().square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    tensors_of_unet = {id(t): t for t in (*unet.parameters(), *unet.buffers())}
    state = [t for states in optimizer.state.values() for t in states.values() if isinstance(t, torch.Tensor)]
    tensors = sum(t.numel() * t.element_size() for t in (*tensors_of_unet.values(), *trained, *state))
    return {"peak": used(device, peak=True) - before, "tensors": tensors, "trained": sum(p.numel() for p in trained)}


def measure(model: str, arguments: argparse.Namespace) -> dict[str, dict]:
    """Measures every row in its own process."""
    figures = {}
    for row in arguments.rows:
        case = json.dumps([model, row, arguments.device, arguments.precision, arguments.side, arguments.gradient_checkpointing])
        process = subprocess.run([sys.executable, __file__, "--case", case], check=True, stdout=subprocess.PIPE, text=True)
        figures[row] = json.loads(process.stdout.splitlines()[-1])
        print(f"  {model}, {row}: {figures[row]['peak'] / MIB:.0f} MiB", flush=True)
    return figures


def run_case(model: str, row: str, device: str, precision: str, side: int, checkpointing: bool) -> dict:
    """The measurement of one row in a new process."""
    return embedded_base(row, device, precision) if model == "base" else shaped(row, device, precision, side, checkpointing)


def table(model: str, figures: dict[str, dict]) -> str:
    """A Markdown table of the bytes, and of their ratios to LoRA and to full fine-tuning."""
    lines = [f"| {model} | peak MiB | of LoRA | of full | plan or tensors MiB | of LoRA | of full |", "|---" * 7 + "|"]
    for row, measured in figures.items():
        cells = [row]
        for name in ("peak", "planned" if "planned" in measured else "tensors"):
            cells.append(f"{measured[name] / MIB:.0f}")
            cells += [f"{measured[name] / figures[other][name]:.2f}" if other in figures else "" for other in ("lora", "full")]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=["base", "sd21"], default=["base", "sd21"])
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=list(ROWS))
    parser.add_argument(
        "--side", type=int, default=32, help="side of the latents of sd21; 64 is 512 pixels (default: %(default)s)"
    )
    parser.add_argument("--precision", choices=["no", "bf16"], default="no", help="default: float32")
    parser.add_argument("--gradient_checkpointing", action="store_true", help="for sd21")
    parser.add_argument("--device", default="cpu", help="cpu or cuda (default: %(default)s)")
    parser.add_argument(
        "--output", type=Path, default=Path("outputs/benchmarks/training_memory.json"), help="default: %(default)s"
    )
    parser.add_argument("--case", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.case:
        print(json.dumps(run_case(*json.loads(arguments.case))))
        return
    results = {model: measure(model, arguments) for model in arguments.models}
    machine = {"threads": torch.get_num_threads(), "torch": torch.__version__, "machine": platform.machine()}
    settings = {"alpha": ALPHA, "share": SHARE, "side": arguments.side, "precision": arguments.precision}
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(json.dumps({"machine": machine, "settings": settings, "results": results}, indent=1) + "\n")
    print("\n\n".join(table(model, figures) for model, figures in results.items()))
    print(f"{machine} {settings}; figures in {arguments.output}; {os.cpu_count()} cores")


if __name__ == "__main__":
    main()
