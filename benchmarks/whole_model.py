#!/usr/bin/env python
"""The UNet of Stable Diffusion 2.1 base: decompositions of its 216 linear layers, and training steps of whole transformer blocks.

Decomposition: without and with the cache, on weights with random singular vectors that are written to disk before and are read
layer by layer. `--fraction` measures some layers of every shape and extrapolates from the seconds of each shape.

Steps: real transformer blocks at 512 x 512 and batch 1 with CERSA, peft LoRA (r = 32) and full fine-tuning, each in a new
process, with attention, norms and the gradient of the input. The figures are seconds, and the peak of the resident memory (on a
GPU of the allocated memory) minus the memory of the process before the weights. benchmarks/layers.py leaves out attention and
norms.
"""

import argparse
import ctypes
import json
import math
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import torch
from accelerate import init_empty_weights
from diffusers import UNet2DConditionModel
from diffusers.models.attention import BasicTransformerBlock
from layers import ALPHA, LORA_RANK, decay_for
from peft import LoraConfig, inject_adapter_in_model
from torch import Tensor, nn

from cersa_diffusion import CersaConfig, inject_cersa, trainable_parameters
from cersa_diffusion.compressed.tensors import TensorFileWriter, read_tensor
from cersa_diffusion.weights.cache import DecompositionCache, leading_factors
from cersa_diffusion.weights.decompose import LayerJob, decompose_layers
from cersa_diffusion.weights.stored import FinestWeight

METHODS = ("cersa", "lora", "full")
# (width, tokens) of the transformer blocks of the UNet.
BLOCKS = ((320, 4096), (640, 1024), (1280, 256))
MIB = 2**20


def layer_shapes() -> dict[str, tuple[int, int]]:
    """Name -> (outputs, inputs) of the linear layers of the UNet."""
    with init_empty_weights():
        unet = UNet2DConditionModel(
            sample_size=64, cross_attention_dim=1024, attention_head_dim=(5, 10, 20, 20), use_linear_projection=True
        )
    return {name: tuple(layer.weight.shape) for name, layer in unet.named_modules() if isinstance(layer, nn.Linear)}


class Weights:
    """Weights of any shape in which alpha = 0.95 keeps one share of the rank; all weights of a shape have the same spectrum."""

    def __init__(self, share: float):
        self.share, self.made = share, 0
        self.originals: dict[tuple[int, int], Tensor] = {}

    def next(self, shape: tuple[int, int]) -> Tensor:
        """A new weight: one weight per shape with shuffled rows and random signs; orthogonal factors are slow to compute."""
        generator = torch.Generator().manual_seed(self.made)
        self.made += 1
        if shape not in self.originals:
            p = min(shape)
            left, right = (torch.linalg.qr(torch.randn(size, p, generator=generator)).Q for size in shape)
            self.originals[shape] = (left * decay_for(self.share, p)) @ right.T
        signs = torch.randint(0, 2, (shape[0], 1), generator=generator) * 2.0 - 1
        return self.originals[shape][torch.randperm(shape[0], generator=generator)] * signs


def in_parallel(jobs: list[LayerJob]) -> float:
    """Seconds for the decompositions, computed in parallel as in an injection."""
    start = time.perf_counter()
    with decompose_layers(jobs, show_progress=False) as results:
        for _ in results:
            pass
    return time.perf_counter() - start


def one_by_one(jobs: list[LayerJob]) -> float:
    """Seconds for the decompositions of one layer after the other, each with all threads."""
    start = time.perf_counter()
    for job in jobs:
        leading_factors(job.load().tensor, job.choose_rank, None)
    return time.perf_counter() - start


def decomposition(fraction: float, share: float, device: str, serial: bool) -> dict:
    """Seconds for all layers: cold, cached, and with `serial` also one by one.

    The shapes are timed one after the other, so that the figures of some layers of a shape can be extrapolated to all of them.
    """
    shapes, config, weights = layer_shapes(), CersaConfig(alpha=ALPHA), Weights(share)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        os.environ["CERSA_CACHE"] = f"{folder}/cache"
        for shape, count in sorted(Counter(shapes.values()).items(), key=lambda item: math.prod(item[0]) * min(item[0])):
            names = [name for name in shapes if shapes[name] == shape][: max(1, round(fraction * count))]
            path = Path(folder, "weights.safetensors")
            writer = TensorFileWriter(path)
            for name in names:
                writer.add(name, weights.next(shape))
            writer.finish()

            def load(name: str, path: Path = path) -> Tensor:
                return read_tensor(path, name).to(device)

            jobs = [LayerJob(name, shape, lambda name=name: FinestWeight(load(name)), config.kept_rank) for name in names]
            row = {"m": shape[0], "n": shape[1], "layers": count, "measured": len(names)}
            row["one_by_one"] = one_by_one(jobs) if serial else None
            row |= {"cold": in_parallel(jobs), "cached": in_parallel(jobs)}
            row["cache_bytes"] = DecompositionCache.default().info().size_bytes
            DecompositionCache.default().clear()
            rows.append(row)
            print(f"  {shape[0]:>6} x {shape[1]:<6}{len(names):>4} of {count:<4}cold {row['cold']:.2f} s", flush=True)
    figures = ("cold", "cached", "cache_bytes") + (("one_by_one",) if serial else ())
    totals = {name: sum(row[name] * row["layers"] / row["measured"] for row in rows) for name in figures}
    return {"totals": totals, "shapes": rows}


def resident(peak: bool) -> int:
    """Resident bytes of this process: the current number, or the peak since `forget_peak`."""
    field = "VmHWM:" if peak else "VmRSS:"
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith(field))


def forget_peak(device: str) -> None:
    """Resets the peak, so that memory which the decomposition has freed does not count."""
    if device == "cpu":
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")
    else:
        torch.cuda.reset_peak_memory_stats()


def used(device: str, peak: bool) -> int:
    if device == "cpu":
        return resident(peak)
    return torch.cuda.max_memory_allocated() if peak else torch.cuda.memory_allocated()


def prepared_block(method: str, width: int, share: float, device: str) -> nn.Module:
    """A transformer block of the UNet, in which only the parameters of the method are trainable."""
    block = BasicTransformerBlock(width, width // 64, 64, cross_attention_dim=1024)
    weights = Weights(share)
    linears = [layer for layer in block.modules() if isinstance(layer, nn.Linear)]
    for layer in linears:
        layer.weight.data = weights.next(tuple(layer.weight.shape))
    block.to(device).requires_grad_(False)
    if method == "cersa":
        inject_cersa(block, CersaConfig(alpha=ALPHA), show_progress=False)
    elif method == "lora":
        targets = [name for name, layer in block.named_modules() if isinstance(layer, nn.Linear)]
        inject_adapter_in_model(LoraConfig(r=LORA_RANK, lora_alpha=LORA_RANK, target_modules=targets), block)
    else:
        for layer in linears:
            layer.weight.requires_grad_(True)
    return block


def one_step(block: nn.Module, width: int, tokens: int, device: str) -> Callable[[], None]:
    """A training step: forward pass, backward pass (also for the input, as inside the UNet), AdamW."""
    x = torch.randn(1, tokens, width, device=device).requires_grad_()
    prompt = torch.randn(1, 77, 1024, device=device)
    optimizer = torch.optim.AdamW(trainable_parameters(block), 1e-4)

    def step() -> None:
        optimizer.zero_grad()
        block(x, encoder_hidden_states=prompt).square().mean().backward()
        optimizer.step()
        if device != "cpu":
            torch.cuda.synchronize()

    return step


def measure_steps(method: str, width: int, tokens: int, share: float, device: str, repeats: int) -> dict:
    """Figures of one method on one block; runs in a new process."""
    before = used(device, peak=False)
    block = prepared_block(method, width, share, device)
    step = one_step(block, width, tokens, device)
    forget_peak(device)
    step()
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        step()
        seconds.append(time.perf_counter() - start)
    return {"peak": used(device, peak=True) - before, "step": sorted(seconds)[len(seconds) // 2]}


def steps(share: float, device: str, repeats: int, widths: list[int]) -> list[dict]:
    """All blocks and methods: figures of CERSA divided by those of LoRA and of full fine-tuning."""
    rows = []
    for width, tokens in (block for block in BLOCKS if block[0] in widths):
        figures = {}
        for method in METHODS:
            case = json.dumps([method, width, tokens, share, device, repeats])
            command = [sys.executable, __file__, "--case", case]
            environment = os.environ | {"CERSA_CACHE": "off"}
            process = subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE, text=True)
            figures[method] = json.loads(process.stdout.splitlines()[-1])
        row = {"width": width, "tokens": tokens, "figures": figures}
        for other in ("lora", "full"):
            row |= {f"{figure}/{other}": figures["cersa"][figure] / figures[other][figure] for figure in ("peak", "step")}
        rows.append(row)
    return rows


def report(results: dict) -> str:
    """All figures as text."""
    lines = []
    if "decomposition" in results:
        totals = results["decomposition"]["totals"]
        measured = sum(row["measured"] for row in results["decomposition"]["shapes"])
        layers = sum(row["layers"] for row in results["decomposition"]["shapes"])
        note = "" if measured == layers else f", extrapolated from {measured}"
        lines.append(f"decomposing {layers} layers{note}: cold {totals['cold']:.1f} s, cached {totals['cached']:.1f} s")
        lines[-1] += f" ({totals['cache_bytes'] / 2**30:.2f} GiB)"
        if "one_by_one" in totals:
            lines.append(f"one layer after the other, each with all threads: {totals['one_by_one']:.1f} s")
    if "steps" in results:
        columns = [f"{figure}/{other}" for other in ("lora", "full") for figure in ("peak", "step")]
        lines.append(f"{'block':<16}{'cersa MiB':>12}{'cersa s':>10}" + "".join(f"{column:>12}" for column in columns))
        for row in results["steps"]:
            cersa = row["figures"]["cersa"]
            figures = f"{cersa['peak'] / MIB:>12.0f}{cersa['step']:>10.3f}"
            ratios = "".join(f"{row[column]:>12.2f}" for column in columns)
            lines.append(f"{row['width']:>4} x {row['tokens']:<9}{figures}{ratios}")
        lines.append("CERSA divided by peft LoRA and by full fine-tuning; below 1: CERSA needs less")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fraction", type=float, default=1.0, help="fraction of the layers of every shape to decompose")
    parser.add_argument("--share", type=float, default=0.35, help=f"k/n at alpha = {ALPHA} (default: %(default)s)")
    parser.add_argument("--serial", action="store_true", help="also one layer after the other, each with all threads")
    parser.add_argument("--blocks", type=int, nargs="*", default=[b[0] for b in BLOCKS], help="widths to train; none: no steps")
    parser.add_argument("--repeats", type=int, default=5, help="timed steps (default: %(default)s)")
    parser.add_argument("--device", default="cpu", help="cpu or cuda (default: %(default)s)")
    parser.add_argument("--steps-only", action="store_true", help="no decomposition")
    parser.add_argument("--output", type=Path, default=Path("outputs/benchmarks/whole_model.json"), help="default: %(default)s")
    parser.add_argument("--case", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.case:
        print(json.dumps(measure_steps(*json.loads(arguments.case))))
        return
    machine = {"threads": torch.get_num_threads(), "torch": torch.__version__, "machine": platform.machine()}
    machine["device"] = torch.cuda.get_device_name() if arguments.device.startswith("cuda") else "cpu"
    results = {"machine": machine, "alpha": ALPHA, "lora_rank": LORA_RANK, "share": arguments.share}
    if not arguments.steps_only:
        results["decomposition"] = decomposition(arguments.fraction, arguments.share, arguments.device, arguments.serial)
    if arguments.blocks:
        results["steps"] = steps(arguments.share, arguments.device, arguments.repeats, arguments.blocks)
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(json.dumps(results, indent=1) + "\n")
    print(f"{report(results)}\n{machine}; figures in {arguments.output}")


if __name__ == "__main__":
    main()
