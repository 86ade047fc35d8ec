"""The commands of `cersa` for adapter files: info, diff, export-lora, merge."""

import argparse

import torch

from cersa_diffusion.adapters.file import AdapterFile, read_adapter_file
from cersa_diffusion.adapters.report import compare_adapters, describe_adapter, difference_table
from cersa_diffusion.pipelines.hub import find_adapter_file


def _read(name: str) -> AdapterFile:
    return read_adapter_file(find_adapter_file(name))


def _info(arguments: argparse.Namespace) -> None:
    print(describe_adapter(_read(arguments.file)))


def _diff(arguments: argparse.Namespace) -> None:
    first, second, base = _read(arguments.first), _read(arguments.second), None
    if arguments.base:
        # Imported here and below: diffusers is slow to import, and other commands do not need it.
        from cersa_diffusion.pipelines.methods import pipeline_components
        from cersa_diffusion.pipelines.open import base_pipeline

        base = pipeline_components(base_pipeline(first, arguments.base))
    print(difference_table(compare_adapters(first, second, base)))


def _export_lora(arguments: argparse.Namespace) -> None:
    from cersa_diffusion.interop.lora import export_lora
    from cersa_diffusion.pipelines.open import base_pipeline

    adapter, dtype = _read(arguments.file), getattr(torch, arguments.dtype)
    options = {"rank": arguments.rank, "format": arguments.format, "prompt": arguments.prompt}
    print(export_lora(adapter, arguments.output, dtype=dtype, base=base_pipeline(adapter, arguments.base), **options))


def _merge(arguments: argparse.Namespace) -> None:
    from cersa_diffusion.adapters.load import load_adapter
    from cersa_diffusion.inject import merge
    from cersa_diffusion.pipelines.methods import pipeline_components
    from cersa_diffusion.pipelines.open import base_pipeline

    adapter = _read(arguments.file)
    pipeline = base_pipeline(adapter, arguments.base)
    components = pipeline_components(pipeline)
    load_adapter(components, adapter, strength=arguments.strength, keep_base=False)
    for model in components.values():
        merge(model)
    # The merge is in float32, and the weights are rounded only once.
    pipeline.to(getattr(torch, arguments.dtype)).save_pretrained(arguments.output)
    print(f"{arguments.output}: {type(pipeline).__name__} in {arguments.dtype}, {len(adapter.layers)} layers merged")


def add_adapter_commands(commands) -> None:
    """Adds the commands."""
    info = commands.add_parser("info", help="describe an adapter file")
    info.add_argument("file", help="a CERSA adapter: a file, a folder that holds one, or an id on the hub")
    info.set_defaults(run=_info)

    diff = commands.add_parser("diff", help="compare the weight changes of two adapters, layer by layer")
    diff.add_argument("first", help="the reference")
    diff.add_argument("second", help="another adapter of the same base")
    diff.add_argument("--base", help="folder or hub id of their pipeline: for an exact comparison, also of different ranks")
    diff.set_defaults(run=_diff)

    export = commands.add_parser("export-lora", help="write an adapter as a LoRA, and measure the difference of the outputs")
    export.add_argument("--rank", type=int, default=64, help="rank of every layer; higher ranks are truncated (default: 64)")
    export.add_argument("--format", choices=["diffusers", "kohya"], default="diffusers", help="key convention")
    export.add_argument("--prompt", default="a photo", help="prompt for the measurement of the output difference")
    export.set_defaults(run=_export_lora)
    merge = commands.add_parser("merge", help="write the adapted pipeline as a dense one that does not need CERSA")
    merge.add_argument("--strength", type=float, default=1.0, help="factor of the adapter")
    merge.set_defaults(run=_merge)
    for parser, output, dtype in ((export, "safetensors file to write", "float16"), (merge, "folder to write", "float32")):
        parser.add_argument("file", help="a CERSA adapter")
        parser.add_argument("output", help=output)
        parser.add_argument("--base", help="folder or hub id of its pipeline; the base that the file names is never loaded")
        parser.add_argument("--dtype", choices=["float32", "float16", "bfloat16"], default=dtype, help="dtype of the weights")
