"""A memory budget: the ranks, layer by layer, that keep the most energy of a model in a given number of bytes."""

import heapq
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn

from cersa_diffusion.config import CersaConfig, LayerRanks, parse_bytes
from cersa_diffusion.errors import ConfigError
from cersa_diffusion.functional import energy_rank, float64
from cersa_diffusion.layers.blocks import Group, block_groups, share_ranks
from cersa_diffusion.layers.kinds import form_of, is_quantised
from cersa_diffusion.layers.model import compute_dtype, finest_matrix
from cersa_diffusion.layers.quantised import stored_bytes
from cersa_diffusion.memory.cost import FLOAT32, OPTIMIZERS, DenseLayer, LayerInput, cersa_memory, is_profitable
from cersa_diffusion.weights.decompose import LayerJob, decompose_layers
from cersa_diffusion.weights.stored import Checkpoint

# How the energies of several layers are combined into one number.
Energy = Literal["product", "sum", "absolute"]


@dataclass(frozen=True)
class TargetLayer:
    """What the selection of ranks needs to know about a target layer.

    Args:
        name: "component.layer name".
        dense: its shape, dtype and input.
        config: the settings of its component.
        spectrum: (p,) singular values, float64, descending.
        block_group: equal for layers that share their ranks (see `block_groups`); None: the layer is alone.
    """

    name: str
    dense: DenseLayer
    config: CersaConfig
    spectrum: Tensor
    block_group: Group = None

    @property
    def full_rank(self) -> int:
        """p, the smaller side of the weight."""
        return len(self.spectrum)

    @property
    def group(self) -> Group:
        """Equal for layers that share their ranks."""
        return self.name if self.block_group is None else self.block_group


def survey(
    components: Mapping[str, nn.Module],
    targets: Mapping[str, tuple[nn.Module, CersaConfig]],
    *,
    weight_dtype: torch.dtype | None = None,
    tokens: Mapping[str, LayerInput] | None = None,
    show_progress: bool = True,
) -> list[TargetLayer]:
    """Decomposes the target layers and returns their spectra; the on-disk cache keeps the factors for a later injection.

    Args:
        components: name -> model.
        targets: "component.layer name" -> layer and settings.
        weight_dtype: compute dtype of training; None: the current dtype of each layer.
        tokens: "component.layer name" -> input of the layer in one step; None: activations are not counted.
        show_progress: show a bar with layer names and remaining time.

    Raises:
        ConfigError: a target layer has no entry in `tokens`, or a model with `uniform_blocks` does not name its blocks.
    """
    groups = _groups_by_name(components, targets)
    checkpoints = {component: Checkpoint.of(model) for component, model in components.items()}

    def job(name: str, linear: nn.Module, config: CersaConfig) -> LayerJob:
        component, _, layer = name.partition(".")
        # The injection also decomposes the weight on disk where that is more exact.
        load = partial(finest_matrix, components[component], layer, checkpoints[component])
        # A budget or another layer of the group may choose any rank, so the cache keeps all singular vectors.
        choose_rank = len if config.needs_all_layers else config.kept_rank
        return LayerJob(name, form_of(linear).shape, load, choose_rank, lambda weight, factors: factors.s)

    dense = dense_layers(components, {name: linear for name, (linear, _) in targets.items()}, weight_dtype, tokens)
    jobs = [job(name, *target) for name, target in targets.items()]
    with decompose_layers(jobs, show_progress=show_progress) as spectra:
        return [TargetLayer(name, dense[name], targets[name][1], spectrum, groups[name]) for name, spectrum in spectra]


def _groups_by_name(
    components: Mapping[str, nn.Module], targets: Mapping[str, tuple[nn.Module, CersaConfig]]
) -> dict[str, Group]:
    """ "component.layer name" -> the layer's group, which lies within one component; None without `uniform_blocks`."""
    groups: dict[str, Group] = dict.fromkeys(targets)
    for component, model in components.items():
        prefix = f"{component}."
        shapes = {
            name.removeprefix(prefix): form_of(linear).shape
            for name, (linear, config) in targets.items()
            if name.startswith(prefix) and config.uniform_blocks
        }
        if shapes:
            groups |= {f"{prefix}{name}": (component, group) for name, group in block_groups(model, shapes).items()}
    return groups


def dense_layers(
    components: Mapping[str, nn.Module],
    linears: Mapping[str, nn.Module],
    weight_dtype: torch.dtype | None,
    tokens: Mapping[str, LayerInput] | None,
) -> dict[str, DenseLayer]:
    """What the memory formulas need to know about the target layers.

    Args:
        components: name -> model.
        linears: "component.layer name" -> layer, in model order.
        weight_dtype, tokens: see `survey`.

    Raises:
        ConfigError: a target layer has no entry in `tokens`.
    """
    sources: set[int | None] = set()
    rows = {}
    for name, linear in linears.items():
        dtype = weight_dtype or compute_dtype(components[name.partition(".")[0]], linear)
        rows[name] = _dense_layer(name, linear, dtype, tokens, sources)
    return rows


def _dense_layer(
    name: str,
    linear: nn.Module,
    dtype: torch.dtype,
    tokens: Mapping[str, LayerInput] | None,
    sources: set[int | None],
) -> DenseLayer:
    """`sources` holds the inputs that earlier target layers keep; the input of this layer is added to it."""
    if tokens is not None and name not in tokens:
        raise ConfigError(
            f"tokens has no entry for layer {name}: count the tokens with count_tokens, or add the layer "
            "(with 0 rows if it does not run)"
        )
    rows, source = (0, None) if tokens is None else (tokens[name].rows, tokens[name].source)
    input_kept = source is not None and source in sources
    sources.add(source)
    quantised_bytes = stored_bytes(linear) if is_quantised(linear) else None
    return DenseLayer(*form_of(linear).shape, linear.bias is not None, dtype, rows, input_kept, quantised_bytes)


def untouched_bytes(
    components: Mapping[str, nn.Module],
    targets: Sequence[nn.Module],
    weight_dtype: torch.dtype | None,
    *,
    trained: Collection[str] = (),
    optimizer: str = "adamw",
) -> dict[str, int]:
    """Bytes of all tensors outside the target layers: "component.tensor name" -> bytes.

    Args:
        components: name -> model; a shared tensor counts once.
        targets: the target layers.
        weight_dtype: compute dtype of training; None: the current dtype of each tensor. Quantised weights keep theirs.
        trained: names of tensors that are trained directly, in float32, with gradient and optimizer state. The others are frozen.
        optimizer: a key of `OPTIMIZERS`.
    """
    counted = {id(tensor) for layer in targets for tensor in layer.parameters()}
    modules = (module for model in components.values() for module in model.modules())
    quantised = {id(module.weight): stored_bytes(module) for module in modules if is_quantised(module)}
    sizes = {}
    for component, model in components.items():
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if id(tensor) not in counted:
                dtype = weight_dtype if weight_dtype and tensor.is_floating_point() else tensor.dtype
                size = quantised.get(id(tensor), tensor.numel() * dtype.itemsize)
                if f"{component}.{name}" in trained:
                    size = 2 * tensor.numel() * FLOAT32 + OPTIMIZERS[optimizer](*tensor.shape)
                sizes[f"{component}.{name}"] = size
                counted.add(id(tensor))
    return sizes


def select_ranks(
    components: Mapping[str, nn.Module],
    targets: Mapping[str, tuple[nn.Module, CersaConfig]],
    *,
    optimizer: str = "adamw",
    weight_dtype: torch.dtype | None = None,
    tokens: Mapping[str, LayerInput] | None = None,
    also_trained: Collection[str] = (),
    show_progress: bool = True,
) -> list[tuple[TargetLayer, LayerRanks | None]]:
    """The ranks of all target layers, from the energy shares in their settings or from the memory budget that they share.

    Args:
        components, targets: see `survey`.
        optimizer, weight_dtype, tokens, also_trained, show_progress: see `choose_ranks`.

    Returns:
        Every target layer with its ranks; None where the layer stays dense and frozen.

    Raises:
        ConfigError: the budget is too small, or the components have different budgets.
    """
    budget = _shared_budget(targets)
    layers = survey(components, targets, weight_dtype=weight_dtype, tokens=tokens, show_progress=show_progress)
    if budget is None:
        return _ranks_from_settings(layers)
    linears = [linear for linear, _ in targets.values()]
    untouched = untouched_bytes(components, linears, weight_dtype, trained=also_trained, optimizer=optimizer)
    ranks = allocate(layers, untouched, budget, optimizer=optimizer)
    return [(layer, ranks[layer.name]) for layer in layers]


def _ranks_from_settings(layers: Sequence[TargetLayer]) -> list[tuple[TargetLayer, LayerRanks | None]]:
    own = {layer.name: layer.config.layer_ranks(layer.spectrum) for layer in layers}
    shared = share_ranks(own, {layer.name: layer.group for layer in layers})

    def ranks_if_factored(layer: TargetLayer) -> LayerRanks | None:
        dense, ranks = layer.dense, shared[layer.name]
        profitable = is_profitable(dense.out_features, dense.in_features, ranks, layer.config)
        return ranks if profitable or layer.config.unprofitable == "factor" else None

    return [(layer, ranks_if_factored(layer)) for layer in layers]


def _shared_budget(targets: Mapping[str, tuple[nn.Module, CersaConfig]]) -> int | None:
    budgets = {name.partition(".")[0]: config.memory_budget for name, (_, config) in targets.items()}
    sizes = {None if budget is None else parse_bytes(budget) for budget in budgets.values()}
    if len(sizes) > 1:
        raise ConfigError(f"memory_budget differs between the components ({budgets}): set the same memory_budget for all of them")
    return sizes.pop()


def allocate(
    layers: Sequence[TargetLayer],
    untouched: Mapping[str, int],
    budget: int,
    *,
    optimizer: str = "adamw",
    energy: Energy = "product",
) -> dict[str, LayerRanks | None]:
    """The ranks that keep the most energy of all layers together within a budget.

    Every target layer is factored and trained, with at least the smallest rank (`rank_multiple`): a dense frozen layer keeps all
    of its energy and needs no gradients, so a large budget would otherwise train nothing. With ``unprofitable="skip"`` a layer
    may also stay dense, where that keeps more energy per byte than the factors. Layers of a group get the same ranks.

    Args:
        layers: the target layers of all components.
        untouched: name -> bytes of everything else in memory (see `untouched_bytes`).
        budget: upper limit in bytes for everything together in training.
        optimizer: a key of `OPTIMIZERS`.
        energy: what is maximised: the "product" or the "sum" over all layers of the share of its energy that a layer keeps, or
            the "absolute" sum of squared singular values, which prefers layers with large weights. docs/memory-budget.md
            compares them: the product leaves the smallest error.

    Returns:
        "component.layer name" -> ranks; None for a layer that stays dense and frozen.

    Raises:
        ConfigError: the budget is too small for the smallest rank in every layer; the message names the smallest possible one.
    """
    by_group: dict[Group, list[TargetLayer]] = {}
    for layer in layers:
        by_group.setdefault(layer.group, []).append(layer)
    groups = list(by_group.values())
    options = [_rank_options(group) for group in groups]
    costs = _costs(groups, options, optimizer)
    energies = [sum(_energies(layer, ranks, energy) for layer in group) for group, ranks in zip(groups, options, strict=True)]
    _check_smallest(groups, [int(bytes_of_options.min()) for bytes_of_options in costs], untouched, budget)
    chosen = most_energy(costs, energies, budget - sum(untouched.values()))
    ranks_by_group = {group: ranks[index] for group, ranks, index in zip(by_group, options, chosen, strict=True)}
    return {layer.name: ranks_by_group[layer.group] for layer in layers}


def _rank_options(group: Sequence[TargetLayer]) -> list[LayerRanks | None]:
    """The ranks that a group of layers of one shape may have: multiples of `rank_multiple`, or the full rank."""
    config, full_rank = group[0].config, group[0].full_rank
    # Components without energy, as a rank-deficient matrix has them, would cost memory and keep nothing.
    useful = max(config.rounded_rank(energy_rank(layer.spectrum, 1.0), full_rank) for layer in group)
    most_trained = max(config.core_rank(layer.spectrum, useful) for layer in group)
    kept_ranks = [*range(config.rank_multiple, useful, config.rank_multiple), useful]
    options: list[LayerRanks | None] = [LayerRanks(kept, min(kept, most_trained)) for kept in kept_ranks]
    return [*options, None] if config.unprofitable == "skip" else options


def _costs(groups: Sequence[list[TargetLayer]], options: list[list[LayerRanks | None]], optimizer: str) -> list[np.ndarray]:
    def cost(layer: TargetLayer, ranks: LayerRanks | None) -> int:
        if ranks is None:
            return layer.dense.dense_bytes()
        return cersa_memory(layer.dense, ranks, layer.config, optimizer).total

    # A large model has hundreds of layers but only a few shapes: equal layers are computed once.
    computed: dict[tuple, np.ndarray] = {}

    def costs_of_layer(layer: TargetLayer, ranks_of_layer: list[LayerRanks | None]) -> np.ndarray:
        key = (layer.dense, id(layer.config), tuple(ranks_of_layer))
        if key not in computed:
            computed[key] = np.array([cost(layer, ranks) for ranks in ranks_of_layer])
        return computed[key]

    return [sum(costs_of_layer(layer, ranks) for layer in group) for group, ranks in zip(groups, options, strict=True)]


def _energies(layer: TargetLayer, options: list[LayerRanks | None], energy: Energy) -> np.ndarray:
    kept = float64(layer.spectrum).square().cumsum(0).cpu().numpy()
    if energy != "absolute":
        kept = kept / kept[-1] if kept[-1] > 0 else np.ones_like(kept)
    if energy == "product":
        kept = np.log(kept)
    return np.array([kept[-1 if ranks is None else ranks.kept - 1] for ranks in options])


def most_energy(costs: Sequence[np.ndarray], energies: Sequence[np.ndarray], budget: int) -> list[int]:
    """Chooses one option for every layer, or group of layers, with a greedy algorithm: the most energy per byte first.

    Every layer starts with its cheapest option. Each step then takes, of the steps that still fit, the one with the most energy
    per byte. The successive best steps of a layer gain less and less energy per byte, whatever the shape of its costs (which fall
    where 8-bit optimizer states begin or where only beta is trained). The result is therefore the fractional optimum except for
    the first step that does not fit: no choice within the budget keeps more than that one step in addition. For the same reason
    a larger budget never keeps less.

    Args:
        costs: per layer (options,) bytes of every option.
        energies: per layer (options,) energy of every option, ascending.
        budget: in bytes, at least the sum of the cheapest options.

    Returns:
        The index of the chosen option of every layer.
    """
    # lexsort sorts by cost; between equal costs the most energy comes first.
    chosen = [int(np.lexsort((-energy, cost))[0]) for cost, energy in zip(costs, energies, strict=True)]
    left = budget - sum(int(cost[index]) for cost, index in zip(costs, chosen, strict=True))
    steps: list[tuple[float, int, int]] = []

    def offer(layer: int) -> None:
        step = _best_step(costs[layer], energies[layer], chosen[layer], left)
        if step is not None:
            heapq.heappush(steps, (-step[0], layer, step[1]))

    for layer in range(len(costs)):
        offer(layer)
    while steps:
        _, layer, option = heapq.heappop(steps)
        price = int(costs[layer][option] - costs[layer][chosen[layer]])
        if price <= left:
            left -= price
            chosen[layer] = option
        offer(layer)
    return chosen


def _best_step(cost: np.ndarray, energy: np.ndarray, current: int, left: int) -> tuple[float, int] | None:
    """Energy per byte and index of the best option above the current one that still fits; of equal options the first."""
    price, gain = cost[current + 1 :] - cost[current], energy[current + 1 :] - energy[current]
    # The current option was chosen by energy per byte, so an option with more energy costs more and no price here is zero.
    possible = np.flatnonzero((gain > 0) & (price <= left))
    if not len(possible):
        return None
    density = gain[possible] / price[possible]
    best = int(density.argmax())
    return float(density[best]), current + 1 + int(possible[best])


def _check_smallest(groups: Sequence[list[TargetLayer]], smallest: list[int], untouched: Mapping[str, int], budget: int) -> None:
    others, count = sum(untouched.values()), sum(map(len, groups))
    least = sum(smallest) + others
    if least <= budget:
        return
    titles = [f"{group[0].name} (with {len(group) - 1} equal ones)" if len(group) > 1 else group[0].name for group in groups]
    sizes = {**untouched, **dict(zip(titles, smallest, strict=True))}
    largest = sorted(sizes, key=sizes.get, reverse=True)[:5]
    raise ConfigError(
        f"memory_budget is {budget} bytes ({_megabytes(budget)}), but the smallest possible is {least} ({_megabytes(least)}): "
        f"{_megabytes(others)} for what CERSA leaves alone and {_megabytes(least - others)} for {count} layers at the "
        f"smallest ranks. Largest: {', '.join(f'{name} {_megabytes(sizes[name])}' for name in largest)}. "
        "Raise the budget, lower rank_multiple, or train in a smaller dtype"
    )


def _megabytes(size: int) -> str:
    return f"{size / 1e6:.3f} MB"
