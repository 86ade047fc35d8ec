"""`cersa compress`: writes a checkpoint in factored form."""

import argparse
from dataclasses import fields, replace

import torch

from cersa_diffusion.compressed.write import compress
from cersa_diffusion.config import CersaConfig
from cersa_diffusion.families.names import default_targets

# Options that are settings of `CersaConfig`.
_SETTINGS = ("alpha", "rank_multiple", "uniform_blocks", "unprofitable")


def _compress(arguments: argparse.Namespace) -> None:
    config = CersaConfig(**{name: getattr(arguments, name) for name in _SETTINGS})
    if arguments.components:
        # The layers that the trainer trains by default are factored.
        config = {name: replace(config, target_modules=default_targets(name)) for name in arguments.components}
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


def add_compress(commands) -> None:
    """Adds the command."""
    help_texts = {field.name: field.metadata["help"] for field in fields(CersaConfig)}
    parser = commands.add_parser("compress", help="write a checkpoint in factored form, which loads without a decomposition")
    parser.add_argument("model", help="folder of a pipeline or model, or hub id of a pipeline")
    parser.add_argument("output", help="folder to write")
    parser.add_argument("--alpha", type=float, default=CersaConfig.alpha, help=help_texts["alpha"])
    parser.add_argument("--rank_multiple", type=int, default=CersaConfig.rank_multiple, help=help_texts["rank_multiple"])
    parser.add_argument("--uniform_blocks", action="store_true", help=help_texts["uniform_blocks"])
    parser.add_argument("--unprofitable", choices=["factor", "skip"], default="factor", help=help_texts["unprofitable"])
    parser.add_argument("--components", nargs="+", metavar="NAME", help="unet, text_encoder, ... (default: the denoiser)")
    parser.add_argument(
        "--dtype", choices=["float32", "float16", "bfloat16"], help="stored dtype (default: as in the checkpoint)"
    )
    parser.add_argument("--device", help="device of the decomposition (default: cpu)")
    parser.add_argument("--revision", help="revision of a model on the hub")
    parser.add_argument("--variant", help="variant of the weight files, such as fp16")
    parser.set_defaults(run=_compress)
