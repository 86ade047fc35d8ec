"""Trained cores as tensors with the same meaning on every machine, and back: training can resume on another machine.

A core is a matrix in the coordinates of one decomposition. Another machine, thread count or release of torch may give other
singular vectors of the same weight, for which the raw core is useless. The block of the weight change at pivot rows and columns
(docs/file-format.md) does not depend on them; here it is stored in float64, so that the round trip loses nothing.
"""

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn

from cersa_diffusion.errors import CersaError
from cersa_diffusion.functional import block_to_core, core_to_block, float64
from cersa_diffusion.layers.core import Core, DiagonalCore, MatrixCore, SparseCore, sparse_matrix
from cersa_diffusion.layers.linear import CersaLinear
from cersa_diffusion.layers.model import cersa_layers

ParameterValues = Mapping[nn.Parameter, Tensor]


def portable_cores(model: nn.Module, adapter_name: str = "default", values: ParameterValues | None = None) -> dict[str, Tensor]:
    """The cores of an adapter as blocks of the weight change.

    Args:
        model: an injected model.
        adapter_name: the name of the cores.
        values: parameter -> tensor to read instead of it, such as its moving average; default: the parameters themselves.

    Returns:
        CPU tensors by "layer name.kind": `block` (r, r) float64, `rows` and `cols` (r,), `components` (the first trained one,
        and the number of kept ones); for sparse cores also `places` and `gate`.
    """
    tensors = {}
    for name, layer, core in _layers_with(adapter_name, model):
        rows, columns = layer.pivots(core.rank, core.offset)
        block = core_to_block(_change(core, values), layer.U[:, core.region], layer.Vh[core.region], rows, columns)
        tensors |= {f"{name}.block": block.cpu(), f"{name}.rows": rows, f"{name}.cols": columns}
        tensors[f"{name}.components"] = torch.tensor([core.offset, layer.kept_rank])
        if isinstance(core, SparseCore):
            tensors |= {f"{name}.places": core.places.cpu(), f"{name}.gate": _value(core.gate, values).cpu()}
    return tensors


def restore_cores(
    model: nn.Module, tensors: Mapping[str, Tensor], adapter_name: str = "default", values: ParameterValues | None = None
) -> dict[str, float]:
    """Solves for the cores in the present bases of the model, and writes them in place; all or nothing.

    A sparse core also gets its trained places back, because the pattern may choose places by the signs of singular vectors.

    Args:
        model: a model that was injected with the settings of the stored cores.
        tensors: the result of `portable_cores`.
        adapter_name: the name of the cores.
        values: parameter -> tensor to write instead of it, such as its moving average; default: the parameters themselves.

    Returns:
        Layer name -> relative Frobenius error of the written core. For a matrix core it is only rounding. A diagonal or sparse
        core is diagonal or sparse only for one choice of singular vectors: the error measures how much the present ones differ.

    Raises:
        CersaError: the tensors belong to other layers, ranks or kinds of cores, or cannot be solved for; nothing is written.
    """
    layers = list(_layers_with(adapter_name, model))
    expected = {f"{name}.{kind}" for name, _, core in layers for kind in _shapes(core)}
    if set(tensors) != expected:
        differing = sorted(set(tensors) ^ expected)
        raise CersaError(
            f"the stored cores and those of adapter {adapter_name!r} differ in {len(differing)} tensors, e.g. {differing[:3]}: "
            "inject the model with the settings of the training"
        )
    errors, writes = {}, []
    for name, layer, core in layers:
        stored = {kind: tensors[f"{name}.{kind}"] for kind in _shapes(core)}
        _check_shapes(name, layer, core, stored)
        solved = _solve(name, layer, core, stored)
        new_values = _parameter_values(core, solved, stored)
        written = _change(core, new_values, stored.get("places"))
        if not torch.isfinite(written).all():
            raise CersaError(f"layer {name}: the stored core does not fit into float32")
        size = float(solved.norm())
        errors[name] = float((written - solved.to(written.device)).norm()) / size if size else 0.0
        writes += [(parameter if values is None else values[parameter], tensor) for parameter, tensor in new_values.items()]
        if isinstance(core, SparseCore):
            writes.append((core.places, stored["places"]))
    with torch.no_grad():
        for target, tensor in writes:
            target.copy_(tensor)
    return errors


def _layers_with(adapter_name: str, model: nn.Module) -> Iterator[tuple[str, CersaLinear, Core]]:
    for name, layer in cersa_layers(model).items():
        if adapter_name in layer.cores:
            yield name, layer, layer.cores[adapter_name]


def _value(parameter: nn.Parameter, values: ParameterValues | None) -> Tensor:
    return float64(parameter if values is None else values[parameter])


def _change(core: Core, values: ParameterValues | None, places: Tensor | None = None) -> Tensor:
    """The (r, r) matrix of a core in float64, for given parameter values and places."""
    if isinstance(core, SparseCore):
        places = core.places if places is None else places
        return sparse_matrix(core.rank, places, _value(core.gate, values), _value(core.values, values))
    return torch.diag(_value(core.d, values)) if isinstance(core, DiagonalCore) else _value(core.D, values)


def _shapes(core: Core) -> dict[str, tuple[int, ...]]:
    shapes = {"block": (core.rank, core.rank), "rows": (core.rank,), "cols": (core.rank,), "components": (2,)}
    return shapes | ({"places": tuple(core.places.shape), "gate": ()} if isinstance(core, SparseCore) else {})


def _check_shapes(name: str, layer: CersaLinear, core: Core, stored: dict[str, Tensor]) -> None:
    for kind, shape in _shapes(core).items():
        if tuple(stored[kind].shape) != shape:
            raise CersaError(f"layer {name}: the stored {kind} has shape {tuple(stored[kind].shape)}, the core needs {shape}")
    first, kept_rank = stored["components"].tolist()
    if (first, kept_rank) != (core.offset, layer.kept_rank):
        raise CersaError(
            f"layer {name}: the stored core starts at component {first} of {kept_rank}, but the one in the model at "
            f"{core.offset} of {layer.kept_rank}"
        )
    limits = {"rows": layer.out_features, "cols": layer.in_features, "places": core.rank}
    for kind, limit in limits.items():
        indices = stored.get(kind)
        if indices is not None and not 0 <= int(indices.min()) <= int(indices.max()) < limit:
            raise CersaError(f"layer {name}: the stored {kind} are not all indices below {limit}")


def _solve(name: str, layer: CersaLinear, core: Core, stored: dict[str, Tensor]) -> Tensor:
    try:
        U, Vh = layer.U[:, core.region], layer.Vh[core.region]
        solved = block_to_core(stored["block"], U, Vh, stored["rows"], stored["cols"])
    except torch.linalg.LinAlgError as error:
        raise CersaError(f"layer {name}: the stored pivot rows or columns are dependent in its bases ({error})") from error
    if not torch.isfinite(solved).all():
        raise CersaError(f"layer {name}: the stored core is not finite in its bases")
    return solved


def _parameter_values(core: Core, solved: Tensor, stored: dict[str, Tensor]) -> dict[nn.Parameter, Tensor]:
    """The values for the parameters of a core, in their dtype."""
    if isinstance(core, MatrixCore):
        values = {core.D: solved}
    elif isinstance(core, DiagonalCore):
        values = {core.d: solved.diagonal()}
    else:
        rows, columns = stored["places"].to(solved.device)
        gate = stored["gate"].to(solved.device)
        values = {core.gate: gate, core.values: solved[rows, columns] / torch.sigmoid(gate)}
    return {parameter: tensor.to(parameter) for parameter, tensor in values.items()}
