"""`cersa cache`: shows the folders and sizes of the caches, or empties them."""

import argparse

from cersa_diffusion.weights.cache import CACHE_PARTS, TensorCache


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


def add_cache(commands) -> None:
    """Adds the command."""
    parser = commands.add_parser("cache", help="show the folder and size of the decomposition cache, or empty it")
    parser.add_argument("action", choices=["info", "clear"])
    parser.set_defaults(run=_cache)
