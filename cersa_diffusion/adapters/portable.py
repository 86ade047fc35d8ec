"""Trained cores as tensors that mean the same on every machine, and back: what lets a checkpoint go on elsewhere.

A core is a matrix in the coordinates of one decomposition. Another machine, thread count or release of torch may give other
singular vectors of the same weight; there, raw cores are garbage. What does not depend on them is the block of the weight change
at pivot rows and columns (docs/file-format.md), here in float64, so that nothing is lost in going there and back.
"""

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn

from cersa_diffusion.errors import CersaError
from cersa_diffusion.functional import block_to_core, core_to_block, float64
from cersa_diffusion.layers.core import Core, DiagonalCore, MatrixCore, SparseCore
from cersa_diffusion.layers.linear import CersaLinear
from cersa_diffusion.layers.model import cersa_layers

ParameterValues = Mapping[nn.Parameter, Tensor]


def portable_cores(model: nn.Module, adapter_name: str = "default", values: ParameterValues | None = None) -> dict[str, Tensor]:
    """The cores of an adapter as blocks of the weight change.

    Args:
        model: an injected model.
        adapter_name: which cores.
        values: parameter -> tensor to read in its place, such as its moving average; default: the parameters themselves.

    Returns:
        CPU tensors by "layer name.kind": `block` (r, r) float64, `rows` and `cols` (r,), `components` (the first one that is
        trained, and how many are kept); of sparse cores `places` and `gate` as well.
    """
    tensors = {}
    for name, layer, core in _adapted(model, adapter_name):
        rows, columns = layer.pivots(core.rank, core.offset)
        block = core_to_block(_change(core, values), *_bases(layer, core), rows, columns)
        tensors |= {f"{name}.block": block.cpu(), f"{name}.rows": rows, f"{name}.cols": columns}
        tensors[f"{name}.components"] = torch.tensor([core.offset, layer.kept_rank])
        if isinstance(core, SparseCore):
            tensors |= {f"{name}.places": core.places.cpu(), f"{name}.gate": _value(core.gate, values).cpu()}
    return tensors


def restore_cores(
    model: nn.Module, tensors: Mapping[str, Tensor], adapter_name: str = "default", values: ParameterValues | None = None
) -> dict[str, float]:
    """Solves for the cores in the bases that the model has now, and writes them in place; all or nothing.

    A sparse core also gets its trained places back: which entries a pattern picks may depend on signs of singular vectors.

    Args:
        model: a model that was injected as the one that the tensors are of.
        tensors: what `portable_cores` gave.
        adapter_name: which cores.
        values: parameter -> tensor to write in its place, such as its moving average; default: the parameters themselves.

    Returns:
        Layer name -> relative Frobenius error of the core as it is written. It is rounding where the core is a matrix. A diagonal
        or sparse core has one choice of singular vectors in which it is that: the error tells how far these are from others.

    Raises:
        CersaError: the tensors are of other layers, ranks or kinds of cores, or cannot be solved for; nothing is written.
    """
    layers = list(_adapted(model, adapter_name))
    expected = {f"{name}.{kind}" for name, _, core in layers for kind in _shapes(core)}
    if set(tensors) != expected:
        differing = sorted(set(tensors) ^ expected)
        raise CersaError(
            f"the stored cores and those of adapter {adapter_name!r} differ in {len(differing)} tensors, e.g. {differing[:3]}: "
            "inject the model with the settings that they were trained with"
        )
    errors, writes = {}, []
    for name, layer, core in layers:
        stored = {kind: tensors[f"{name}.{kind}"] for kind in _shapes(core)}
        _check_shapes(name, layer, core, stored)
        solved = _solve(name, layer, core, stored)
        numbers = _numbers(core, solved, stored)
        errors[name] = _relative_error(name, core, numbers, stored, solved)
        writes += [(parameter if values is None else values[parameter], tensor) for parameter, tensor in numbers.items()]
        if isinstance(core, SparseCore):
            writes.append((core.places, stored["places"]))
    with torch.no_grad():
        for target, tensor in writes:
            target.copy_(tensor)
    return errors


def _adapted(model: nn.Module, adapter_name: str) -> Iterator[tuple[str, CersaLinear, Core]]:
    for name, layer in cersa_layers(model).items():
        if adapter_name in layer.cores:
            yield name, layer, layer.cores[adapter_name]


def _bases(layer: CersaLinear, core: Core) -> tuple[Tensor, Tensor]:
    region = slice(core.offset, core.offset + core.rank)
    return layer.U[:, region], layer.Vh[region]


def _value(parameter: nn.Parameter, values: ParameterValues | None) -> Tensor:
    return float64(parameter if values is None else values[parameter])


def _change(core: Core, values: ParameterValues | None) -> Tensor:
    """The (r, r) matrix of a core in float64."""
    if isinstance(core, SparseCore):
        return _scattered(core.rank, core.places, _value(core.gate, values), _value(core.values, values))
    if isinstance(core, DiagonalCore):
        return torch.diag(_value(core.d, values))
    return _value(core.D, values)


def _scattered(rank: int, places: Tensor, gate: Tensor, values: Tensor) -> Tensor:
    matrix = values.new_zeros(rank, rank)
    return matrix.index_put((places[0].to(values.device), places[1].to(values.device)), torch.sigmoid(gate) * values)


def _shapes(core: Core) -> dict[str, tuple[int, ...]]:
    shapes = {"block": (core.rank, core.rank), "rows": (core.rank,), "cols": (core.rank,), "components": (2,)}
    return shapes | ({"places": tuple(core.places.shape), "gate": ()} if isinstance(core, SparseCore) else {})


def _check_shapes(name: str, layer: CersaLinear, core: Core, stored: dict[str, Tensor]) -> None:
    for kind, shape in _shapes(core).items():
        if tuple(stored[kind].shape) != shape:
            raise CersaError(f"layer {name}: the stored {kind} has shape {tuple(stored[kind].shape)}, the core needs {shape}")
    present = [core.offset, layer.kept_rank]
    if stored["components"].tolist() != present:
        raise CersaError(
            f"layer {name}: the stored core starts at component {stored['components'][0]} of {stored['components'][1]}, this one "
            f"at {present[0]} of {present[1]}"
        )
    limits = {"rows": layer.out_features, "cols": layer.in_features, "places": core.rank}
    for kind, limit in limits.items():
        indices = stored.get(kind)
        if indices is not None and not 0 <= int(indices.min()) <= int(indices.max()) < limit:
            raise CersaError(f"layer {name}: the stored {kind} are not all indices below {limit}")


def _solve(name: str, layer: CersaLinear, core: Core, stored: dict[str, Tensor]) -> Tensor:
    try:
        solved = block_to_core(stored["block"], *_bases(layer, core), stored["rows"], stored["cols"])
    except torch.linalg.LinAlgError as error:
        raise CersaError(f"layer {name}: the stored pivot rows or columns are dependent in its bases ({error})") from error
    if not torch.isfinite(solved).all():
        raise CersaError(f"layer {name}: the stored core is not finite in its bases")
    return solved


def _numbers(core: Core, solved: Tensor, stored: dict[str, Tensor]) -> dict[nn.Parameter, Tensor]:
    """What the parameters of a core have to hold, in their dtype."""
    if isinstance(core, MatrixCore):
        numbers = {core.D: solved}
    elif isinstance(core, DiagonalCore):
        numbers = {core.d: solved.diagonal()}
    else:
        rows, columns = stored["places"].to(solved.device)
        gate = stored["gate"].to(solved.device)
        numbers = {core.gate: gate, core.values: solved[rows, columns] / torch.sigmoid(gate)}
    return {parameter: tensor.to(parameter) for parameter, tensor in numbers.items()}


def _relative_error(
    name: str, core: Core, numbers: dict[nn.Parameter, Tensor], stored: dict[str, Tensor], solved: Tensor
) -> float:
    if isinstance(core, SparseCore):
        gate, values = float64(numbers[core.gate]), float64(numbers[core.values])
        written = _scattered(core.rank, stored["places"], gate, values)
    else:
        written = _change(core, numbers)
    if not torch.isfinite(written).all():
        raise CersaError(f"layer {name}: the stored core does not fit into float32")
    size = float(solved.norm())
    return float((written - solved.to(written.device)).norm()) / size if size else 0.0
