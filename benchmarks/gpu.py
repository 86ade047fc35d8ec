#!/usr/bin/env python
"""Everything that one GPU can say in nine minutes: layers and transformer blocks under five methods, then the test suite.

Layers and blocks have the shapes of Stable Diffusion 2.1, SDXL and FLUX.2-klein-4B. CERSA at three shares k/n, LoRA r = 32, LoRA
r = 32 on a 4-bit base (bitsandbytes, NF4) and full fine-tuning run in the same process, in bfloat16. CERSA and both LoRAs have
frozen weights in bfloat16 and trained ones in float32; full fine-tuning has float32 weights under autocast, as in the trainers.
The factors are random: time and memory depend on shapes alone.

`make gpu` writes outputs/gpu/results.json and docs/benchmarks-gpu.md. `make gpu DEVICE=cpu SMALL=1` is a dry run without a GPU:
small shapes, a part of the suite, and no page.
"""

import argparse
import gc
import json
import os
import platform
import re
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

import torch
from diffusers import Flux2Transformer2DModel
from diffusers.models.attention import BasicTransformerBlock
from peft import LoraConfig, inject_adapter_in_model
from torch import Tensor, nn
from whole_model import forget_peak, used

from cersa_diffusion import CersaLinear, trainable_parameters
from cersa_diffusion.functional import Decomposition
from cersa_diffusion.layers.core import MatrixCore
from cersa_diffusion.layers.model import replace_module
from cersa_diffusion.text import table

REPOSITORY = Path(__file__).resolve().parents[1]
SHARES = (0.2, 0.35, 0.5)
LORA_RANK = 32
MIB = 2**20
# The suite's tests that a GPU has a part in.
TESTS = "layers weights memory adapters compressed families pipelines interop training classification metrics analysis".split()


@dataclass(frozen=True)
class Case:
    """What is measured: a model, what it is given, and the tokens in that."""

    name: str
    tokens: int
    build: Callable[[], nn.Module]
    inputs: Callable[[str], dict[str, Tensor]]


@dataclass(frozen=True)
class Row:
    """The figures of one method on one case; seconds are medians, bytes are over what was held before."""

    case: str
    method: str
    step_seconds: float
    forward_seconds: float
    peak_bytes: int
    tokens_per_second: float


class OneLayer(nn.Module):
    """A linear layer with the name of its argument that the measurements give."""

    def __init__(self, outputs: int, inputs: int):
        super().__init__()
        self.layer = nn.Linear(inputs, outputs)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


def layer_case(name: str, outputs: int, inputs: int, tokens: int) -> Case:
    """One linear layer."""
    make = lambda device: {"x": torch.randn(1, tokens, inputs, device=device, dtype=torch.bfloat16).requires_grad_()}  # noqa: E731
    return Case(f"{name} {outputs} x {inputs}", tokens, lambda: OneLayer(outputs, inputs), make)


def unet_block_case(name: str, width: int, tokens: int, prompt_width: int) -> Case:
    """A transformer block of a UNet."""

    def inputs(device: str) -> dict[str, Tensor]:
        states = torch.randn(1, tokens, width, device=device, dtype=torch.bfloat16).requires_grad_()
        prompt = torch.randn(1, 77, prompt_width, device=device, dtype=torch.bfloat16)
        return {"hidden_states": states, "encoder_hidden_states": prompt}

    build = lambda: BasicTransformerBlock(width, width // 64, 64, cross_attention_dim=prompt_width)  # noqa: E731
    return Case(f"{name} block {width}", tokens, build, inputs)


def klein_case(side: int, words: int, heads: int) -> Case:
    """A double and a single block of FLUX.2-klein's shape (24 heads for the 4B model), with the layers around them."""

    def build() -> nn.Module:
        return Flux2Transformer2DModel(
            num_layers=1, num_single_layers=1, num_attention_heads=heads, joint_attention_dim=7680, guidance_embeds=False
        )

    def inputs(device: str) -> dict[str, Tensor]:
        rows, columns = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
        zeros = torch.zeros(side * side, dtype=torch.long)
        image_ids = torch.stack([zeros, rows.flatten(), columns.flatten(), zeros], dim=1).to(device)
        text_ids = torch.zeros(words, 4, dtype=torch.long, device=device)
        text_ids[:, 3] = torch.arange(words, device=device)
        latents, text = (
            torch.randn(1, n, w, device=device, dtype=torch.bfloat16) for n, w in ((side * side, 128), (words, 7680))
        )
        states = {"hidden_states": latents.requires_grad_(), "encoder_hidden_states": text}
        return states | {"img_ids": image_ids, "txt_ids": text_ids, "timestep": torch.tensor([0.5], device=device)}

    return Case(f"FLUX.2-klein blocks {heads * 128}", side * side + words, build, inputs)


def cases(small: bool) -> list[Case]:
    """What is measured; `small` for a machine without a GPU."""
    if small:
        return [
            layer_case("attention", 64, 64, 32),
            unet_block_case("UNet", 64, 16, 32),
            klein_case(side=4, words=4, heads=1),
        ]
    return [
        layer_case("SD 2.1 attention", 1280, 1280, 256),
        layer_case("SD 2.1 attention", 320, 320, 4096),
        layer_case("SDXL attention", 1280, 1280, 1024),
        layer_case("SDXL feed-forward", 10240, 1280, 1024),
        layer_case("klein attention", 3072, 3072, 4608),
        layer_case("klein to_qkv_mlp_proj", 27648, 3072, 4608),
        unet_block_case("SD 2.1", 320, 4096, 1024),
        unet_block_case("SDXL", 1280, 1024, 2048),
        klein_case(side=64, words=512, heads=24),
    ]


def linears(model: nn.Module) -> dict[str, nn.Linear]:
    """Name -> layer of all plain linear layers."""
    return {name: layer for name, layer in model.named_modules() if type(layer) is nn.Linear}


def make_cersa(model: nn.Module, share: float, device: str) -> None:
    """Replaces the linear layers by CERSA layers with random factors, whose rank is a multiple of eight."""
    for name, layer in linears(model).items():
        m, n = layer.weight.shape
        rank = min(m, n, max(8, round(share * min(m, n) / 8) * 8))
        options = {"device": device, "dtype": torch.bfloat16}
        factors = Decomposition(
            torch.randn(m, rank, **options) / m**0.5,
            torch.linspace(1, 0.1, rank, device=device),
            torch.randn(rank, n, **options) / n**0.5,
        )
        bias = None if layer.bias is None else nn.Parameter(layer.bias.detach().to(**options), requires_grad=False)
        cersa = CersaLinear(factors, rank, bias, torch.bfloat16)
        cersa.add_core("default", MatrixCore(rank))
        replace_module(model, name, cersa)


def make_four_bit(model: nn.Module, device: str) -> None:
    """Replaces the linear layers by those of bitsandbytes in four bits (NF4, computing in bfloat16)."""
    import bitsandbytes

    for name, layer in linears(model).items():
        quantised = bitsandbytes.nn.Linear4bit(
            layer.in_features, layer.out_features, layer.bias is not None, compute_dtype=torch.bfloat16, quant_type="nf4"
        )
        quantised.load_state_dict(layer.state_dict())
        replace_module(model, name, quantised.to(device))


def prepare(model: nn.Module, method: str, device: str) -> nn.Module:
    """The model under a method on the device, with only the method's parameters trainable."""
    names = list(linears(model))
    model.requires_grad_(False)
    if method == "full":
        model.to(device)
        for layer in linears(model).values():
            layer.weight.requires_grad_(True)
        return model
    model.to(torch.bfloat16)
    if method.startswith("CERSA"):
        make_cersa(model, float(method.split()[1]), device)
        return model.to(device)
    if method.startswith("4-bit"):
        make_four_bit(model, device)
    model.to(device)
    inject_adapter_in_model(LoraConfig(r=LORA_RANK, lora_alpha=LORA_RANK, target_modules=names), model)
    for parameter in trainable_parameters(model):
        parameter.data = parameter.data.float()
    return model


def methods() -> list[str]:
    """The methods whose packages are installed."""
    names = [f"CERSA {share}" for share in SHARES] + ["LoRA"]
    return [*names, *(["4-bit LoRA"] if find_spec("bitsandbytes") else []), "full"]


def measure(case: Case, method: str, device: str, repeats: int) -> Row:
    """Times training steps (forward, backward also to the input, AdamW) and forward passes."""
    torch.manual_seed(0)
    before = used(device, peak=False)
    model, inputs = prepare(case.build(), method, device), case.inputs(device)
    optimizer = torch.optim.AdamW(trainable_parameters(model), 1e-4, fused=device.startswith("cuda"))

    def forward() -> Tensor:
        with torch.autocast(torch.device(device).type, torch.bfloat16):
            output = model(**inputs)
        return output if isinstance(output, Tensor) else output[0]

    def step() -> None:
        optimizer.zero_grad()
        forward().float().square().mean().backward()
        optimizer.step()

    forget_peak(device)
    step_seconds = timed(step, device, repeats)
    peak = used(device, peak=True) - before
    with torch.no_grad():
        forward_seconds = timed(forward, device, repeats)
    return Row(case.name, method, step_seconds, forward_seconds, max(peak, 0), case.tokens / step_seconds)


def timed(call: Callable[[], object], device: str, repeats: int) -> float:
    """Median seconds of a call, after three that warm up."""
    seconds = []
    for number in range(repeats + 3):
        start = time.perf_counter()
        call()
        if device.startswith("cuda"):
            torch.cuda.synchronize()
        if number >= 3:
            seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


def measure_all(device: str, small: bool) -> Iterator[Row]:
    """All cases under all methods; one that does not fit is left out with a line that says so."""
    for case in cases(small):
        for method in methods():
            try:
                row = measure(case, method, device, repeats=2 if small else 20)
            except torch.OutOfMemoryError:
                print(f"{case.name}, {method}: does not fit", flush=True)
                continue
            finally:
                gc.collect()
                if device.startswith("cuda"):
                    torch.cuda.empty_cache()
            print(f"{case.name}, {method}: step {row.step_seconds * 1e3:.2f} ms, peak {row.peak_bytes / MIB:.0f} MiB", flush=True)
            yield row


def run_suite(device: str, small: bool, seconds: float, output: Path) -> dict:
    """The test suite on the device, ended as by Ctrl-C when the time is up: what it counted, and the names of what failed."""
    folders = [f"tests/{name}" for name in (("layers", "families") if small else TESTS)]
    command = [sys.executable, "-m", "pytest", "-q", "-ra", "-p", "no:cacheprovider", "--tb=short", *folders]
    if find_spec("xdist"):
        command += ["-n", str(min(12, os.cpu_count() or 1)), "--dist", "worksteal"]
    environment = os.environ | {"CERSA_TEST_DEVICE": device, "OMP_NUM_THREADS": "1"}
    with output.open("w") as log:
        process = subprocess.Popen(command, cwd=REPOSITORY, env=environment, stdout=log, stderr=subprocess.STDOUT)
        try:
            process.wait(timeout=seconds)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGINT)
            try:
                process.wait(timeout=30)
            except subprocess.TimeoutExpired:
                process.kill()
    text = output.read_text()
    counts = {
        word: int(number) for number, word in re.findall(r"(\d+) (passed|failed|errors?|skipped)", text.rpartition("\n=")[2])
    }
    failed = re.findall(r"^(?:FAILED|ERROR) (\S+)", text, re.MULTILINE)
    return {"counts": counts, "failed": failed, "stopped": process.returncode in (2, -signal.SIGKILL)}


def machine_facts(device: str) -> dict:
    """What was measured with."""
    machine = {
        "device": torch.cuda.get_device_name() if device.startswith("cuda") else "cpu",
        "python": platform.python_version(),
    }
    if device.startswith("cuda"):
        machine |= {"memory_bytes": torch.cuda.get_device_properties(0).total_memory, "cuda": torch.version.cuda}
    packages = ("torch", "diffusers", "transformers", "peft", "bitsandbytes")
    return machine | {name: version(name) for name in packages if find_spec(name)}


def as_page(results: dict) -> str:
    """docs/benchmarks-gpu.md."""
    machine, suite = results["machine"], results["suite"]
    memory = f", {machine['memory_bytes'] / 2**30:.0f} GiB" if "memory_bytes" in machine else ""
    versions = ", ".join(f"{name} {machine[name]}" for name in machine if name not in ("device", "memory_bytes"))
    rows, lines = [Row(**row) for row in results["rows"]], []
    for case in dict.fromkeys(row.case for row in rows):
        of_case = {row.method: row for row in rows if row.case == case}
        lora = of_case.get("LoRA")
        for row in of_case.values():
            ratio = f"{row.step_seconds / lora.step_seconds:.2f}" if lora else "-"
            peak = f"{row.peak_bytes / lora.peak_bytes:.2f}" if lora and lora.peak_bytes else "-"
            cells = [
                f"{row.step_seconds * 1e3:.2f}",
                ratio,
                f"{row.forward_seconds * 1e3:.2f}",
                f"{row.peak_bytes / MIB:.0f}",
                peak,
            ]
            lines.append([case, row.method, *cells, f"{row.tokens_per_second:,.0f}"])
    header = ["case", "method", "step ms", "/ LoRA", "forward ms", "peak MiB", "/ LoRA", "tokens/s"]
    counts = ", ".join(f"{number} {word}" for word, number in suite["counts"].items())
    ended = " It was stopped when its time was up." if suite["stopped"] else ""
    failed = "".join(f"- `{name}`\n" for name in suite["failed"])
    return f"""# Benchmarks on a GPU

Made by `make gpu` on one {machine["device"]}{memory}; {versions}.

bfloat16, one sample. CERSA's number is the share k/n of the components that are kept and trained. LoRA has rank {LORA_RANK};
4-bit LoRA is the same on a base in NF4. A step is forward, backward (also to the input) and AdamW. The peak is the most that was
allocated, weights and optimizer included. The factors are random: time and memory depend on shapes alone.

{table(header, lines, markdown=True)}

## The test suite

With `CERSA_TEST_DEVICE=cuda`, without the tests of the page, of the scripts and of the comparison: {counts}.{ended}

{failed}"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda", help="cuda or cpu (default: %(default)s)")
    parser.add_argument("--small", action="store_true", help="small shapes and a part of the suite")
    parser.add_argument("--suite_seconds", type=float, default=300, help="most time for the suite (default: %(default)s)")
    parser.add_argument("--output", type=Path, default=REPOSITORY / "outputs" / "gpu", help="folder (default: outputs/gpu)")
    arguments = parser.parse_args()
    if arguments.device.startswith("cuda") and not torch.cuda.is_available():
        sys.exit("error: no GPU here: make gpu DEVICE=cpu SMALL=1 is a dry run without one")
    arguments.output.mkdir(parents=True, exist_ok=True)
    start = time.perf_counter()
    rows = [asdict(row) for row in measure_all(arguments.device, arguments.small)]
    results = {"machine": machine_facts(arguments.device), "rows": rows}
    # Written before the suite runs: whatever happens there, these figures are kept.
    (arguments.output / "results.json").write_text(json.dumps(results, indent=1) + "\n")
    results["suite"] = run_suite(arguments.device, arguments.small, arguments.suite_seconds, arguments.output / "suite.log")
    (arguments.output / "results.json").write_text(json.dumps(results, indent=1) + "\n")
    page = as_page(results)
    (arguments.output / "page.md").write_text(page)
    if arguments.device.startswith("cuda") and not arguments.small:
        (REPOSITORY / "docs" / "benchmarks-gpu.md").write_text(page)
    print(f"{page}\n{time.perf_counter() - start:.0f} s; figures in {arguments.output}")


if __name__ == "__main__":
    main()
