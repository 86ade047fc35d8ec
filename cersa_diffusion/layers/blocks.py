"""Equal layers of the repeated blocks of a model, which share their ranks so that torch.compile sees equal blocks."""

from collections.abc import Hashable, Mapping
from typing import TypeAlias

from torch import nn

from cersa_diffusion.config import LayerRanks
from cersa_diffusion.private_names import repeated_blocks

# Equal for layers that share their ranks.
Group: TypeAlias = Hashable


def block_groups(model: nn.Module, shapes: Mapping[str, tuple[int, int]]) -> dict[str, Group]:
    """Layer name -> group: equal for layers of one shape at the same place in blocks of one class.

    Of blocks inside blocks the outermost counts, because it is compiled as a whole. A layer outside the blocks is alone.

    Args:
        model: a model that names its repeated blocks (see `repeated_blocks`).
        shapes: layer name -> (m, n).

    Raises:
        ConfigError: the model does not name its repeated blocks.
    """
    blocks = repeated_blocks(model)
    groups: dict[str, Group] = {}
    for name, shape in shapes.items():
        parts = name.split(".")
        parents = (".".join(parts[:length]) for length in range(1, len(parts)))
        block = next((parent for parent in parents if parent in blocks), None)
        groups[name] = name if block is None else (blocks[block], name.removeprefix(f"{block}."), shape)
    return groups


def share_ranks(ranks: Mapping[str, LayerRanks], groups: Mapping[str, Group]) -> dict[str, LayerRanks]:
    """Layer name -> the largest k and the largest r of the layers of its group.

    Args:
        ranks: layer name -> ranks of the layer alone.
        groups: layer name -> group.
    """
    largest: dict[Group, LayerRanks] = {}
    for name, own in ranks.items():
        largest[groups[name]] = LayerRanks(*map(max, own, largest.get(groups[name], own)))
    return {name: largest[groups[name]] for name in ranks}
