"""Tests imports and devices in separate processes: if such a process crashes, the report says so."""

import json
import subprocess
import sys
from dataclasses import dataclass

SECONDS = 300
# Distribution -> statement to run. `import transformers` and `import diffusers` would load almost nothing of these packages.
IMPORTS = {
    "torch": "import torch",
    "torchvision": "import torchvision",
    "accelerate": "import accelerate",
    "transformers": "from transformers import CLIPTextModel",
    "peft": "import peft",
    "diffusers": "from diffusers import StableDiffusionPipeline",
    "gradio": "import gradio",
    "torchmetrics": "import torchmetrics",
    "open-clip-torch": "import open_clip",
    "datasets": "import datasets",
    "matplotlib": "import matplotlib.pyplot",
    "bitsandbytes": "import bitsandbytes",
    "ray": "import ray",
    "playwright": "import playwright.sync_api",
    "cersa-diffusion": "import cersa_diffusion.training",
}
_TRY_IMPORTS = """
import json, sys, warnings
warnings.simplefilter("ignore")
for name, statement in json.loads(sys.argv[1]).items():
    print(json.dumps(["begin", name]), flush=True)
    try:
        exec(statement, {})
        error = None
    except BaseException as problem:
        lines = str(problem).strip().splitlines() or [""]
        error = f"{type(problem).__name__}: {lines[-1]}"
    print(json.dumps(["end", name, error]), flush=True)
"""
_TRY_DEVICES = """
import json, os, torch

def devices():
    yield f"{os.cpu_count()} cores, {torch.backends.cpu.get_cpu_capability()}", torch.device("cpu"), None
    for number in range(torch.cuda.device_count()):
        yield torch.cuda.get_device_name(number), torch.device("cuda", number), torch.cuda.mem_get_info(number)
    if torch.backends.mps.is_available():
        yield "Apple GPU", torch.device("mps"), None

def works(device, dtype):
    try:
        x = torch.ones(16, 16, device=device, dtype=dtype)
        return bool((x @ x).float().eq(16).all())
    except (RuntimeError, TypeError, NotImplementedError):
        return False

for name, device, memory in devices():
    dtypes = {str(dtype).removeprefix("torch."): works(device, dtype)
              for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64)}
    if device.type == "cpu" and hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:
        page = os.sysconf("SC_PAGE_SIZE")
        memory = [page * os.sysconf("SC_AVPHYS_PAGES"), page * os.sysconf("SC_PHYS_PAGES")]
    free, total = memory or (None, None)
    print(json.dumps({"device": str(device), "name": name, "free_bytes": free, "total_bytes": total, "dtypes": dtypes}))
"""


@dataclass(frozen=True)
class Device:
    """A device of torch.

    Attributes:
        device: torch's name of the device.
        name: name of the hardware.
        free_bytes, total_bytes: its memory; None if the system does not report it.
        dtypes: dtype -> whether a small matrix product is correct.
    """

    device: str
    name: str
    free_bytes: int | None
    total_bytes: int | None
    dtypes: dict[str, bool]


def import_errors(names: list[str]) -> dict[str, str | None]:
    """Imports installed distributions: distribution -> its error in one line, or None if the import works.

    Distributions that are not in `IMPORTS` are ignored.
    """
    errors: dict[str, str | None] = {}
    waiting = {name: statement for name, statement in IMPORTS.items() if name in names}
    while waiting:
        events, problem = _run(_TRY_IMPORTS, json.dumps(waiting))
        current = None
        for event, name, *error in events:
            current = name if event == "begin" else None
            if event == "end":
                errors[name] = error[0]
                waiting.pop(name)
        if waiting:
            # The current import ended the process: the others are tried again without it.
            culprit = current or next(iter(waiting))
            errors[culprit] = f"importing it ends the process ({problem})"
            waiting.pop(culprit)
    return errors


def devices() -> tuple[list[Device], str | None]:
    """The devices that torch finds, and the error that ended the search, or None."""
    lines, problem = _run(_TRY_DEVICES)
    return [Device(**line) for line in lines], problem


def _run(code: str, *arguments: str) -> tuple[list, str | None]:
    """Runs code in a separate process; returns the JSON lines that it prints, and the reason for a failure, or None."""
    try:
        process = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, timeout=SECONDS)
    except subprocess.TimeoutExpired:
        return [], f"no answer in {SECONDS} seconds"
    lines = [json.loads(line) for line in process.stdout.splitlines() if line[:1] in "[{"]
    if process.returncode == 0:
        return lines, None
    messages = process.stderr.strip().splitlines()
    return lines, messages[-1] if messages else f"exit status {process.returncode}"
