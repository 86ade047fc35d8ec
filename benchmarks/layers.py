#!/usr/bin/env python
"""Single layers with shapes of Stable Diffusion 2.1: CERSA, peft LoRA and full fine-tuning in one run; the figures are ratios.

The spectra are synthetic (exponential decay), such that alpha = 0.95 keeps the given share k/n of the rank. The shares of real
checkpoints lie in this range: small models near 0.6, the attention of ViT-Large near 0.35.
"""

import argparse
import json
import math
import os
import platform
import time
from pathlib import Path

import torch
from peft import LoraConfig, inject_adapter_in_model
from torch import Tensor, nn
from torch.utils.benchmark import Timer
from tqdm.auto import tqdm

from cersa_diffusion import CersaConfig, inject_cersa, trainable_parameters

ALPHA, LORA_RANK = 0.95, 32
# (name, outputs, inputs, tokens at 512 x 512 and batch 1) of the UNet's attention and feed-forward layers at its three widths.
SHAPES = (
    ("attention 320", 320, 320, 4096),
    ("feed-forward in 320", 2560, 320, 4096),
    ("attention 640", 640, 640, 1024),
    ("feed-forward in 640", 5120, 640, 1024),
    ("attention 1280", 1280, 1280, 256),
    ("feed-forward out 1280", 1280, 5120, 256),
)
SHARES = (0.2, 0.35, 0.5, 0.65)


def decay_for(share: float, size: int) -> Tensor:
    """Singular values of a spectrum in which the first `share` of the components has `ALPHA` of the energy."""

    def kept_energy(rate: float) -> float:
        return (1 - math.exp(-2 * rate * share)) / (1 - math.exp(-2 * rate))

    low, high = 1e-6, 50.0
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if kept_energy(middle) < ALPHA else (low, middle)
    return torch.exp(-low * torch.arange(size) / size)


def synthetic_linear(outputs: int, inputs: int, share: float) -> nn.Sequential:
    """A linear layer with random singular vectors and the spectrum of `decay_for`."""
    generator = torch.Generator().manual_seed(0)
    p = min(outputs, inputs)
    left, right = (torch.linalg.qr(torch.randn(size, p, generator=generator)).Q for size in (outputs, inputs))
    model = nn.Sequential(nn.Linear(inputs, outputs))
    model[0].weight.data = (left * decay_for(share, p)) @ right.T
    return model


def methods(outputs: int, inputs: int, share: float) -> dict[str, nn.Module]:
    """Method -> the layer, in which only the parameters of this method are trainable."""
    cersa, lora, full = (synthetic_linear(outputs, inputs, share) for _ in range(3))
    inject_cersa(cersa, CersaConfig(alpha=ALPHA), show_progress=False)
    lora.requires_grad_(False)
    inject_adapter_in_model(LoraConfig(r=LORA_RANK, lora_alpha=LORA_RANK, target_modules=["0"]), lora)
    full.requires_grad_(False)[0].weight.requires_grad_(True)
    return {"cersa": cersa, "lora": lora, "full": full}


def saved_bytes(model: nn.Module, x: Tensor) -> int:
    """Bytes that autograd saves for the backward pass, without parameters and buffers."""
    storages_of_model = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *model.buffers())}
    saved = {}

    def record(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in storages_of_model:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(record, lambda tensor: tensor):
        model(x).sum()
    return sum(saved.values())


def state_bytes(model: nn.Module) -> int:
    """Bytes of the weights, and three times four bytes (gradient, two Adam moments) for each trained parameter."""
    weight_bytes = sum(tensor.numel() * tensor.element_size() for tensor in (*model.parameters(), *model.buffers()))
    return weight_bytes + 3 * sum(parameter.numel() * parameter.element_size() for parameter in trainable_parameters(model))


def step_seconds(model: nn.Module, x: Tensor, seconds: float) -> float:
    """Median time of a training step: forward pass, backward pass (also for the input, as inside a network), AdamW."""
    optimizer = torch.optim.AdamW(trainable_parameters(model), 1e-4)

    def step() -> None:
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()

    return (
        Timer("step()", globals={"step": step}, num_threads=torch.get_num_threads())
        .blocked_autorange(min_run_time=seconds)
        .median
    )


@torch.no_grad()
def forward_seconds(model: nn.Module, x: Tensor, seconds: float) -> float:
    """Median time of a forward pass."""
    timer = Timer("model(x)", globals={"model": model, "x": x}, num_threads=torch.get_num_threads())
    return timer.blocked_autorange(min_run_time=seconds).median


def measure(seconds: float) -> list[dict]:
    """All shapes and spectra: figures of CERSA divided by those of LoRA and of full fine-tuning."""
    rows = []
    cases = [(shape, share) for shape in SHAPES for share in SHARES]
    for (name, outputs, inputs, tokens), share in tqdm(cases, unit="case"):
        models = methods(outputs, inputs, share)
        x = torch.randn(tokens, inputs, generator=torch.Generator().manual_seed(1)).requires_grad_()
        figures = {
            method: {
                "state": state_bytes(model),
                "saved": saved_bytes(model, x),
                "step": step_seconds(model, x, seconds),
                "forward": forward_seconds(model, x, seconds),
            }
            for method, model in models.items()
        }
        row = {"layer": name, "m": outputs, "n": inputs, "tokens": tokens, "share": share, "k": models["cersa"][0].kept_rank}
        for other in ("lora", "full"):
            row |= {f"{figure}/{other}": figures["cersa"][figure] / figures[other][figure] for figure in figures["cersa"]}
        rows.append(row | {"figures": figures})
    return rows


def as_table(rows: list[dict]) -> str:
    """The ratios as text; below 1, CERSA needs less."""
    columns = [f"{figure}/{other}" for other in ("lora", "full") for figure in ("state", "saved", "step", "forward")]
    lines = [f"{'layer':<24}{'k/n':>6}" + "".join(f"{column:>14}" for column in columns)]
    for row in rows:
        share = row["k"] / min(row["m"], row["n"])
        lines.append(f"{row['layer']:<24}{share:>6.2f}" + "".join(f"{row[column]:>14.2f}" for column in columns))
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=0.4, help="time spent on each timing (default: %(default)s)")
    parser.add_argument("--output", type=Path, default=Path("outputs/benchmarks/layers.json"), help="JSON (default: %(default)s)")
    arguments = parser.parse_args()
    os.environ["CERSA_CACHE"] = "off"  # The matrices are random, so no later run can use their decompositions.
    start = time.perf_counter()
    rows = measure(arguments.seconds)
    machine = {"threads": torch.get_num_threads(), "torch": torch.__version__, "machine": platform.machine()}
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(
        json.dumps({"machine": machine, "alpha": ALPHA, "lora_rank": LORA_RANK, "rows": rows}, indent=1) + "\n"
    )
    print(as_table(rows))
    print(f"\nCERSA (alpha = {ALPHA}) divided by peft LoRA (r = {LORA_RANK}) and by full fine-tuning; below 1: CERSA needs less")
    print("state: weights, gradients and AdamW; saved: saved for the backward pass; step and forward: time")
    print(f"{machine}; {time.perf_counter() - start:.0f} s; figures in {arguments.output}")


if __name__ == "__main__":
    main()
