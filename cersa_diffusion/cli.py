"""The `cersa` command: plan the memory of a training run, look into adapter files and into the decomposition cache."""

import argparse
import json
import sys
from collections import defaultdict
from dataclasses import fields

import torch

from cersa_diffusion.adapter_file import AdapterFile, read_adapter_file
from cersa_diffusion.cache import DecompositionCache
from cersa_diffusion.config import CersaConfig
from cersa_diffusion.errors import CersaError
from cersa_diffusion.memory import OPTIMIZERS
from cersa_diffusion.plan_report import plot_plan
from cersa_diffusion.planner import plan_memory
from cersa_diffusion.tokens import pipeline_tokens


def describe_adapter(adapter: AdapterFile) -> str:
    """What an adapter file is, for people: base, settings, training, layers by component."""
    lines = []
    for title, part in (("base model", adapter.base_model), ("settings", adapter.config), ("training", adapter.training)):
        lines.append(title)
        lines += [f"  {name}: {json.dumps(value)}" for name, value in part.items()] or ["  (nothing stored)"]
    by_component = defaultdict(list)
    for name, layer in adapter.layers.items():
        by_component[name.partition(".")[0]].append(layer)
    lines.append("layers")
    for component, layers in by_component.items():
        trained = sum(layer.core_rank**2 for layer in layers)
        shares = sorted(layer.kept_rank / min(layer.out_features, layer.in_features) for layer in layers)
        lines.append(
            f"  {component}: {len(layers)} layers, {trained / 1e6:.2f} M numbers in {layers[0].block.dtype}; "
            f"kept rank / full rank {shares[0]:.2f} to {shares[-1]:.2f}, median {shares[len(shares) // 2]:.2f}"
        )
    return "\n".join(lines)


def _info(arguments: argparse.Namespace) -> None:
    print(describe_adapter(read_adapter_file(arguments.file)))


def _cache(arguments: argparse.Namespace) -> None:
    cache = DecompositionCache.default()
    if cache is None:
        print("the cache is off (CERSA_CACHE=off)")
        return
    if arguments.action == "clear":
        cache.clear()
    info = cache.info()
    print(f"{info.folder}: {info.entries} entries, {info.size_bytes / 2**30:.2f} of at most {info.limit_bytes / 2**30:.1f} GiB")


def _plan(arguments: argparse.Namespace) -> None:
    # Imported here: the trainer and all it needs are slow to import, and the other commands do without.
    from cersa_diffusion.training.base import TARGET_MODULES, load_base

    configs = {
        component: CersaConfig(alpha=arguments.alpha, beta=arguments.beta, target_modules=targets)
        for component, targets in TARGET_MODULES.items()
    }
    pipeline = load_base(arguments.model)
    tokens = None
    if arguments.batch is not None or arguments.resolution is not None:
        tokens = pipeline_tokens(pipeline, 1 if arguments.batch is None else arguments.batch, arguments.resolution)
    plan = plan_memory(
        {component: getattr(pipeline, component) for component in configs},
        configs,
        lora_rank=arguments.rank,
        optimizer=arguments.optimizer,
        weight_dtype=getattr(torch, arguments.dtype),
        tokens=tokens,
    )
    formats = {"table": str, "markdown": lambda plan: plan.to_markdown(), "json": lambda plan: json.dumps(plan.to_dict())}
    print(formats[arguments.format](plan))
    if arguments.plot:
        plot_plan(plan, arguments.plot)


def _add_plan(commands) -> None:
    help_texts = {field.name: field.metadata["help"] for field in fields(CersaConfig)}
    plan = commands.add_parser("plan", help="say what CERSA, LoRA and full fine-tuning cost in memory, before any training")
    plan.add_argument("model", help="a Stable Diffusion pipeline: a folder or a model id on the hub")
    plan.add_argument("--alpha", type=float, default=CersaConfig.alpha, help=help_texts["alpha"])
    plan.add_argument("--beta", type=float, help=help_texts["beta"])
    plan.add_argument("--rank", type=int, default=32, help="rank of LoRA")
    plan.add_argument("--optimizer", choices=list(OPTIMIZERS), default="adamw", help="whose state is counted")
    plan.add_argument("--dtype", choices=["float32", "float16", "bfloat16"], default="float32", help="compute dtype of training")
    plan.add_argument("--format", choices=["table", "json", "markdown"], default="table", help="json is in bytes")
    plan.add_argument("--plot", metavar="FILE", help="also draw ranks and compression against alpha into this picture")
    plan.add_argument("--batch", type=int, help="pictures per step: counts saved activations (default 1 with --resolution)")
    plan.add_argument("--resolution", type=int, help="size of the pictures in pixels (default with --batch: the model's own)")
    plan.set_defaults(run=_plan)


def main(argv: list[str] | None = None) -> None:
    """Entry point of the `cersa` command."""
    parser = argparse.ArgumentParser(prog="cersa", description=__doc__)
    commands = parser.add_subparsers(required=True)
    _add_plan(commands)
    info = commands.add_parser("info", help="say what an adapter file holds")
    info.add_argument("file", help="a CERSA adapter (safetensors)")
    info.set_defaults(run=_info)
    cache = commands.add_parser("cache", help="the decomposition cache: where it is and how big, or empty it")
    cache.add_argument("action", choices=["info", "clear"])
    cache.set_defaults(run=_cache)
    arguments = parser.parse_args(argv)
    try:
        arguments.run(arguments)
    except CersaError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
