"""A strength per block of a UNet, in the form of diffusers' LoRA loader: {"down": .5, "mid": 1, "up": {"block_1": [0, 1, 1]}}."""

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
        strength: a number for all layers, or a mapping with the keys "down", "mid" and "up". Its values are numbers, lists with
            a number for each attention (and the residual block beside it) of a block, or for "down" and "up" mappings from
            "block_0", "block_1", ... to these. What is left out is 1, and so are layers outside of all blocks.
        layer_names: the layers.
        module_names: all modules of the model, which say how many attentions a block has.

    Raises:
        ConfigError: a key that the model has no block for, a list of another length, or a value that is no number.
    """
    if not isinstance(strength, Mapping):
        return dict.fromkeys(layer_names, _number(strength, "strength"))
    sizes = _block_sizes(module_names)
    if not sizes:
        raise ConfigError(f"strengths by block ({dict(strength)}) need a model with down, mid and up blocks: give one number")
    unknown = set(strength) - set(REGIONS)
    if unknown:
        raise ConfigError(f"unknown blocks {sorted(map(str, unknown))} in the strengths, expected {', '.join(REGIONS)}")
    table = {place: _block_list(strength, *place, size) for place, size in sizes.items()}
    _check_block_names(strength, sizes)
    return {name: _of_layer(name, table) for name in layer_names}


def _block_sizes(module_names: Sequence[str]) -> dict[tuple[str, int], int]:
    """(region, index) -> how many attentions (in a block without any: residual blocks) it has."""
    counts: dict[tuple[str, int], dict[str, set[int]]] = {}
    for name in module_names:
        found = re.fullmatch(r"(?:(down|up)_blocks\.(\d+)|(mid)_block)\.(attentions|resnets)\.(\d+)", name)
        if found:
            place = (found[1] or found[3], int(found[2] or 0))
            counts.setdefault(place, {}).setdefault(found[4], set()).add(int(found[5]))
    return {place: len(kinds.get("attentions") or kinds["resnets"]) for place, kinds in counts.items()}


def _block_list(strength: Mapping[str, object], region: str, index: int, size: int) -> list[float]:
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
        known = [f"block_{index}" for found, index in sizes if found == region]
        unknown = sorted(map(str, set(value) - set(known))) if isinstance(value, Mapping) else []
        if unknown:
            raise ConfigError(f"unknown blocks {unknown} in {region!r}, expected some of {known}")


def _of_layer(name: str, table: Mapping[tuple[str, int], list[float]]) -> float:
    found = _LAYER.match(name)
    if not found:
        return 1.0
    numbers = table[found[1] or found[3], int(found[2] or 0)]
    # Residual blocks can outnumber the attentions by one (the mid block): the last strength holds for the rest.
    return numbers[min(int(found[4] or 0), len(numbers) - 1)]


def _number(value: object, where: str) -> float:
    if isinstance(value, bool) or not isinstance(value, Real):
        raise ConfigError(f"{where}: {value!r} is no number")
    return float(value)
