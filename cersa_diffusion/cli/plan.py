"""`cersa plan`: computes how much memory the methods need, before any training."""

import argparse
import json
from dataclasses import fields

import torch

from cersa_diffusion.config import CersaConfig
from cersa_diffusion.memory.cost import OPTIMIZERS
from cersa_diffusion.memory.plan import MemoryPlan, plan_memory
from cersa_diffusion.memory.plot import plot_plan
from cersa_diffusion.pipelines.peaks import planned_peaks
from cersa_diffusion.pipelines.tokens import pipeline_tokens
from cersa_diffusion.text import mib, table

# Options that are settings of `CersaConfig`.
_SETTINGS = ("alpha", "beta", "memory_budget", "rank_multiple", "uniform_blocks")


def _plan(arguments: argparse.Namespace) -> None:
    # Imported here: diffusers is slow to import, and other commands do not need it.
    from cersa_diffusion.families.table import family_of
    from cersa_diffusion.pipelines.open import load_base

    pipeline = load_base(arguments.model)
    family = family_of(type(pipeline).__name__)
    options = {name: getattr(arguments, name) for name in _SETTINGS}
    configs = {component: CersaConfig(target_modules=targets, **options) for component, targets in family.trained.items()}
    tokens, batch = None, 1 if arguments.batch is None else arguments.batch
    if arguments.batch is not None or arguments.resolution is not None:
        tokens = pipeline_tokens(pipeline, batch, arguments.resolution)
    plan = plan_memory(
        family.components(pipeline),
        configs,
        lora_rank=arguments.rank,
        optimizer=arguments.optimizer,
        weight_dtype=getattr(torch, arguments.dtype),
        tokens=tokens,
    )
    peaks = planned_peaks(pipeline, plan, batch, arguments.resolution)
    if arguments.format == "json":
        print(json.dumps(plan.to_dict() | {"peaks": peaks}))
    else:
        markdown = arguments.format == "markdown"
        print(plan.to_markdown() if markdown else plan, _peaks_table(peaks, plan, markdown), sep="\n\n")
    if arguments.plot:
        plot_plan(plan, arguments.plot)


def _peaks_table(peaks: dict, plan: MemoryPlan, markdown: bool) -> str:
    rows = [
        ["preparing CERSA", mib(peaks["preparing"])],
        ["system memory, beside Python and its libraries", mib(peaks["system"])],
    ]
    titles = {"cersa": "CERSA", "lora": f"LoRA r={plan.lora_rank}", "full": "full fine-tuning"}
    # A step without its activations says nothing.
    steps = peaks["steps"].items() if plan.activations_counted else ()
    rows += [[f"steps, {titles[method]}", mib(size)] for method, size in steps]
    caption = "Peaks of a training on an accelerator, with latents cached and without what its libraries take:"
    return f"{caption}\n\n{table(['', 'MiB'], rows, markdown=markdown)}"


def add_plan(commands) -> None:
    """Adds the command."""
    help_texts = {field.name: field.metadata["help"] for field in fields(CersaConfig)}
    plan = commands.add_parser("plan", help="show how much memory CERSA, LoRA and full fine-tuning need, before any training")
    plan.add_argument("model", help="folder or hub id of a Stable Diffusion or SDXL pipeline")
    plan.add_argument("--alpha", type=float, default=CersaConfig.alpha, help=help_texts["alpha"])
    plan.add_argument("--beta", type=float, help=help_texts["beta"])
    plan.add_argument("--memory_budget", metavar="SIZE", help=help_texts["memory_budget"])
    plan.add_argument("--rank_multiple", type=int, default=CersaConfig.rank_multiple, help=help_texts["rank_multiple"])
    plan.add_argument("--uniform_blocks", action="store_true", help=help_texts["uniform_blocks"])
    plan.add_argument("--rank", type=int, default=32, help="rank of LoRA")
    plan.add_argument("--optimizer", choices=list(OPTIMIZERS), default="adamw", help="optimizer whose state is counted")
    plan.add_argument("--dtype", choices=["float32", "float16", "bfloat16"], default="float32", help="compute dtype of training")
    plan.add_argument("--format", choices=["table", "json", "markdown"], default="table", help="format; json has sizes in bytes")
    plan.add_argument("--plot", metavar="FILE", help="also plot the ranks, and compression against alpha, to this file")
    plan.add_argument("--batch", type=int, help="pictures per step: counts saved activations (default 1 with --resolution)")
    plan.add_argument("--resolution", type=int, help="size of the pictures in pixels (default with --batch: the model's own)")
    plan.set_defaults(run=_plan)
