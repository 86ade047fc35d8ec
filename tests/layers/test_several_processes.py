"""CERSA layers in two processes over gloo: FSDP2 shards the frozen factors, DDP broadcasts them."""

import copy
import hashlib
import multiprocessing
import socket
from collections.abc import Callable

import torch
from torch import distributed, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

import cersa_diffusion as cersa
from cersa_diffusion import CersaConfig, ConfigError
from cersa_diffusion.layers.model import cersa_layers

STEPS = 5


def injected() -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(48, 40), nn.GELU(), nn.Linear(40, 64, bias=False), nn.GELU(), nn.Linear(64, 24))
    cersa.inject_cersa(model, CersaConfig(alpha=0.9), show_progress=False)
    return model


def losses(model: nn.Module, rank: int = 0, world: int = 1) -> list[float]:
    """Losses over the whole batch, of which every process computes its part."""
    torch.manual_seed(1)
    inputs, targets = (torch.randn(64, width).chunk(world)[rank] for width in (48, 24))
    optimizer = torch.optim.AdamW(cersa.trainable_parameters(model), 1e-2)
    values = []
    for _ in range(STEPS):
        optimizer.zero_grad()
        loss = (model(inputs) - targets).square().mean()
        loss.backward()
        optimizer.step()
        mean = loss.detach() / world
        if world > 1:
            distributed.all_reduce(mean)
        values.append(float(mean))
    return values


def digests(model: nn.Module) -> dict[str, str]:
    return {
        f"{name}.{part}": hashlib.sha256(tensor.detach().numpy().tobytes()).hexdigest()
        for name, layer in cersa_layers(model).items()
        for part, tensor in layer.frozen_tensors().items()
    }


def sharded(rank: int) -> dict:
    model = injected()
    for layer in cersa_layers(model).values():
        fully_shard(layer, mesh=init_device_mesh("cpu", (2,)))
    fully_shard(model, mesh=init_device_mesh("cpu", (2,)))
    shapes = {
        name: (tuple(parameter.shape), tuple(parameter.to_local().shape))
        for name, parameter in model.named_parameters()
        if isinstance(parameter, DTensor)
    }
    frozen = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    values = losses(model, rank, 2)
    try:
        model[0].weight_change()
        refused = None
    except ConfigError as error:
        refused = str(error)
    state = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    state = {name: tensor.tolist() for name, tensor in state.items()}
    return {"shapes": shapes, "frozen": frozen, "losses": values, "refused": refused, "state": state}


def replicated(rank: int) -> dict:
    model = injected()
    if rank == 1:
        with torch.no_grad():
            for layer in cersa_layers(model).values():
                # Other singular vectors of the same weight.
                layer.U[:, ::2] *= -1
                layer.Vh[::2] *= -1
    before = digests(model)
    parallel = DistributedDataParallel(model)
    return {"before": before, "after": digests(model), "losses": losses(parallel, rank, 2), "trained": digests(model)}


def _process(work: Callable, rank: int, port: int, results) -> None:
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    try:
        results.put((rank, work(rank)))
    except Exception as error:
        results.put((rank, error))
    distributed.destroy_process_group()


def by_two(work: Callable) -> tuple[dict, dict]:
    """What `work` returns in each of two processes."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["cersa_diffusion"])
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    results = context.Queue()
    processes = [context.Process(target=_process, args=(work, rank, port, results)) for rank in (0, 1)]
    for process in processes:
        process.start()
    ended = dict(results.get(timeout=300) for _ in processes)
    for process in processes:
        process.join(60)
    for result in ended.values():
        if isinstance(result, Exception):
            raise result
    return ended[0], ended[1]


def test_fsdp_shards_the_frozen_factors_and_trains_as_one_process():
    first, second = by_two(sharded)
    alone = injected()
    parameters = dict(alone.named_parameters())
    frozen = {f"{name}.{linear}.weight" for name in cersa_layers(alone) for linear in ("up", "down")}
    assert first["shapes"].keys() == parameters.keys() and frozen <= first["frozen"] == second["frozen"]
    for name, (shape, part) in first["shapes"].items():
        assert shape == tuple(parameters[name].shape)
        assert part[0] + second["shapes"][name][1][0] == shape[0] and part[0] <= (shape[0] + 1) // 2, name
    expected = losses(alone)
    torch.testing.assert_close(first["losses"], expected, rtol=1e-5, atol=0)
    assert first["losses"] == second["losses"] and expected[-1] < expected[0]
    assert "DTensor" in first["refused"] and "state_dict" in first["refused"]
    gathered = copy.deepcopy(alone)
    gathered.load_state_dict({name: torch.tensor(values) for name, values in first["state"].items()})
    for name, parameter in gathered.named_parameters():
        torch.testing.assert_close(parameter, parameters[name], rtol=1e-4, atol=1e-6)


def test_ddp_broadcasts_the_factors_once_and_trains_as_one_process():
    first, second = by_two(replicated)
    factors = [name for name in first["before"] if not name.endswith(".s")]
    assert all(first["before"][name] != second["before"][name] for name in factors)
    assert first["after"] == first["before"] == second["after"] == first["trained"] == second["trained"]
    torch.testing.assert_close(first["losses"], losses(injected()), rtol=1e-5, atol=0)
