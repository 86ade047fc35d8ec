"""A strength for each block of a UNet, in the form of diffusers' LoRA loader: {"down": 0.5, "up": {"block_1": [0, 1, 1]}}."""

import re
from collections.abc import Mapping, Sequence
from numbers import Real
from typing import TypeAlias

from cersa_diffusion.errors import ConfigError

Strength: TypeAlias = float | Mapping[str, object]
REGIONS = ("down", "mid", "up")
_LAYER = re.compile(r"(?:(down|up)_blocks\.(\d+)|(mid)_block)\.(?:(?:attentions|resnets|motion_modules)\.(\d+)\.)?")


def layer_strengths(strength: Strength, layer_names: Sequence[str], module_names: Sequence[str]) -> dict[str, float]:
    """The strength of every layer.

    Args:
        strength: a number for all layers, or a mapping with the keys "down", "mid" and "up". Its values are numbers, or lists
            with a number for each attention of a block (and the residual block beside it), or, for "down" and "up", mappings
            from "block_0", "block_1", ... to such values. Missing blocks and layers outside of all blocks get strength 1.
        layer_names: the layers.
        module_names: all modules of the model, which determine how many attentions a block has.

    Raises:
        ConfigError: the model has no block for a key, a list has another length, or a value is not a number.
    """
    if not isinstance(strength, Mapping):
        return dict.fromkeys(layer_names, _number(strength, "strength"))
    sizes = _block_sizes(module_names)
    if not sizes:
        raise ConfigError(f"strengths by block ({dict(strength)}) need a model with down, mid and up blocks: give one number")
    unknown = set(strength) - set(REGIONS)
    if unknown:
        raise ConfigError(f"unknown blocks {sorted(map(str, unknown))} in the strengths, expected {', '.join(REGIONS)}")
    block_strengths = {block: _block_strengths(strength, *block, size) for block, size in sizes.items()}
    _check_block_names(strength, sizes)
    return {name: _layer_strength(name, block_strengths) for name in layer_names}


def _block_sizes(module_names: Sequence[str]) -> dict[tuple[str, int], int]:
    """(region, index) of each block -> the number of its attentions, or of its residual blocks if it has no attention."""
    indices: dict[tuple[str, int], dict[str, set[int]]] = {}
    for name in module_names:
        match = re.fullmatch(r"(?:(down|up)_blocks\.(\d+)|(mid)_block)\.(attentions|resnets)\.(\d+)", name)
        if match:
            block = (match[1] or match[3], int(match[2] or 0))
            indices.setdefault(block, {}).setdefault(match[4], set()).add(int(match[5]))
    return {block: len(submodules.get("attentions") or submodules["resnets"]) for block, submodules in indices.items()}


def _block_strengths(strength: Mapping[str, object], region: str, index: int, size: int) -> list[float]:
    value = strength.get(region, 1.0)
    where = region if region == "mid" else f"{region}.block_{index}"
    if isinstance(value, Mapping) and region != "mid":
        value = value.get(f"block_{index}", 1.0)
    if not isinstance(value, list | tuple):
        return [_number(value, where)] * size
    if len(value) not in (1, size):
        raise ConfigError(f"{len(value)} strengths for {where}, which has {size} attentions: give 1 or {size}")
    numbers = [_number(number, where) for number in value]
    return numbers * size if len(numbers) == 1 else numbers


def _check_block_names(strength: Mapping[str, object], sizes: Mapping[tuple[str, int], int]) -> None:
    for region in ("down", "up"):
        value = strength.get(region)
        known = [f"block_{index}" for block_region, index in sizes if block_region == region]
        unknown = sorted(map(str, set(value) - set(known))) if isinstance(value, Mapping) else []
        if unknown:
            raise ConfigError(f"unknown blocks {unknown} in {region!r}, expected some of {known}")


def _layer_strength(name: str, block_strengths: Mapping[tuple[str, int], list[float]]) -> float:
    match = _LAYER.match(name)
    if not match:
        return 1.0
    numbers = block_strengths[match[1] or match[3], int(match[2] or 0)]
    # A block may have one more residual block than attentions (the mid block has): it gets the last strength.
    return numbers[min(int(match[4] or 0), len(numbers) - 1)]


def _number(value: object, where: str) -> float:
    if isinstance(value, bool) or not isinstance(value, Real):
        raise ConfigError(f"{where}: {value!r} is not a number")
    return float(value)
