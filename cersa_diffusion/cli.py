"""The `cersa` command: look into adapter files and into the decomposition cache."""

import argparse
import json
import sys
from collections import defaultdict

from cersa_diffusion.adapter_file import AdapterFile, read_adapter_file
from cersa_diffusion.cache import DecompositionCache
from cersa_diffusion.errors import CersaError


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


def main(argv: list[str] | None = None) -> None:
    """Entry point of the `cersa` command."""
    parser = argparse.ArgumentParser(prog="cersa", description=__doc__)
    commands = parser.add_subparsers(required=True)
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
