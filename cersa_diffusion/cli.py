"""The `cersa` command: plan the memory of a training run, factor checkpoints, look into adapter files, take them elsewhere."""

import argparse
import json
import sys
from dataclasses import fields, replace

import torch

from cersa_diffusion.cache import CACHE_PARTS, TensorCache
from cersa_diffusion.cli_adapters import add_adapter_commands
from cersa_diffusion.cli_analyse import add_analyse
from cersa_diffusion.cli_doctor import add_doctor
from cersa_diffusion.compress import compress
from cersa_diffusion.config import CersaConfig
from cersa_diffusion.errors import CersaError
from cersa_diffusion.memory import OPTIMIZERS
from cersa_diffusion.plan_report import plot_plan
from cersa_diffusion.planner import plan_memory
from cersa_diffusion.tokens import pipeline_tokens


def _cache(arguments: argparse.Namespace) -> None:
    for part in CACHE_PARTS:
        cache = TensorCache.default(part)
        if cache is None:
            print("the cache is off (CERSA_CACHE=off)")
            return
        if arguments.action == "clear":
            cache.clear()
        info = cache.info()
        print(
            f"{info.folder}: {info.entries} entries, {info.size_bytes / 2**30:.2f} of at most {info.limit_bytes / 2**30:.1f} GiB"
        )


def _plan(arguments: argparse.Namespace) -> None:
    # Imported here: the trainer and all it needs are slow to import, and the other commands do without.
    from cersa_diffusion.families import family_of
    from cersa_diffusion.training.base import default_targets, load_base

    pipeline = load_base(arguments.model)
    configs = {
        component: CersaConfig(
            alpha=arguments.alpha,
            beta=arguments.beta,
            memory_budget=arguments.memory_budget,
            target_modules=default_targets(component),
        )
        for component in ("unet", *family_of(type(pipeline).__name__).text_encoders)
    }
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
    plan.add_argument("model", help="a Stable Diffusion or SDXL pipeline: a folder or a model id on the hub")
    plan.add_argument("--alpha", type=float, default=CersaConfig.alpha, help=help_texts["alpha"])
    plan.add_argument("--beta", type=float, help=help_texts["beta"])
    plan.add_argument("--memory_budget", metavar="SIZE", help=help_texts["memory_budget"])
    plan.add_argument("--rank", type=int, default=32, help="rank of LoRA")
    plan.add_argument("--optimizer", choices=list(OPTIMIZERS), default="adamw", help="whose state is counted")
    plan.add_argument("--dtype", choices=["float32", "float16", "bfloat16"], default="float32", help="compute dtype of training")
    plan.add_argument("--format", choices=["table", "json", "markdown"], default="table", help="json is in bytes")
    plan.add_argument("--plot", metavar="FILE", help="also draw ranks and compression against alpha into this picture")
    plan.add_argument("--batch", type=int, help="pictures per step: counts saved activations (default 1 with --resolution)")
    plan.add_argument("--resolution", type=int, help="size of the pictures in pixels (default with --batch: the model's own)")
    plan.set_defaults(run=_plan)


def _compress(arguments: argparse.Namespace) -> None:
    config = CersaConfig(alpha=arguments.alpha, unprofitable=arguments.unprofitable)
    if arguments.components:
        # Imported here, as for the plan: what the trainer trains of a text encoder is what is factored of it.
        from cersa_diffusion.training.base import TARGET_MODULES

        targets = {name: TARGET_MODULES["text_encoder" if "text" in name else "unet"] for name in arguments.components}
        config = {name: replace(config, target_modules=own) for name, own in targets.items()}
    report = compress(
        arguments.model,
        arguments.output,
        config=config,
        dtype=getattr(torch, arguments.dtype) if arguments.dtype else None,
        device=arguments.device,
        revision=arguments.revision,
        variant=arguments.variant,
    )
    print(f"{arguments.output}: {report}")


def _add_compress(commands) -> None:
    help_texts = {field.name: field.metadata["help"] for field in fields(CersaConfig)}
    parser = commands.add_parser("compress", help="write a checkpoint in factored form: loading it needs no decomposition")
    parser.add_argument("model", help="a pipeline or model: a folder, or a pipeline's id on the hub")
    parser.add_argument("output", help="folder to write")
    parser.add_argument("--alpha", type=float, default=CersaConfig.alpha, help=help_texts["alpha"])
    parser.add_argument("--unprofitable", choices=["factor", "skip"], default="factor", help=help_texts["unprofitable"])
    parser.add_argument("--components", nargs="+", metavar="NAME", help="unet, text_encoder, ... (default: the denoiser)")
    parser.add_argument("--dtype", choices=["float32", "float16", "bfloat16"], help="storage (default: as the checkpoint has it)")
    parser.add_argument("--device", help="where to decompose (default: cpu)")
    parser.add_argument("--revision", help="of a model on the hub")
    parser.add_argument("--variant", help="of the weight files, such as fp16")
    parser.set_defaults(run=_compress)


def main(argv: list[str] | None = None) -> None:
    """Entry point of the `cersa` command."""
    parser = argparse.ArgumentParser(prog="cersa", description=__doc__)
    commands = parser.add_subparsers(required=True)
    _add_plan(commands)
    _add_compress(commands)
    add_adapter_commands(commands)
    add_analyse(commands)
    add_doctor(commands)
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
