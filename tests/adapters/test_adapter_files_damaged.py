"""A thousand damaged files: each is refused with an AdapterFormatError, before the model is touched and before memory is."""

import json
import pickle
import random
import struct
import tracemalloc
from collections.abc import Callable

import pytest
import safetensors
import torch
from safetensors.torch import load_file, save

import cersa_diffusion as cersa
from cersa_diffusion import AdapterFormatError, BaseMismatchError, CersaLinear

from ..adapter_files import MARKER, damage, header_text, with_checksum
from ..conftest import raises

Content = tuple[bytes, dict, dict]  # the good file: its bytes, its header, its tensors


@pytest.fixture(scope="module")
def good(tmp_path_factory) -> Content:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(12, 10), torch.nn.ReLU(), torch.nn.Linear(10, 6))
    cersa.inject_cersa(model, cersa.CersaConfig(alpha=0.8), show_progress=False)
    for parameter in cersa.trainable_parameters(model):
        parameter.data.normal_()
    path = tmp_path_factory.mktemp("good") / "a.safetensors"
    cersa.save_adapter(model, path, training={"steps": 3})
    with safetensors.safe_open(path, "pt") as file:
        header = json.loads(file.metadata()["cersa"])
    return path.read_bytes(), header, load_file(path)


def rebuilt(header: dict, tensors: dict) -> bytes:
    """A file with a fitting checksum, so that what is refused is its content."""
    return with_checksum(save(tensors, metadata={"cersa": header_text(header)}))


def truncated(chance: random.Random, good: Content) -> bytes:
    return good[0][: chance.randrange(len(good[0]))]


def extended(chance: random.Random, good: Content) -> bytes:
    return good[0] + chance.randbytes(chance.choice([1, 8, 1000]))


def flipped_in_header(chance: random.Random, good: Content) -> bytes:
    return flipped(good[0], chance.randrange(8 + int.from_bytes(good[0][:8], "little")), 1 << chance.randrange(8))


def flipped_in_body(chance: random.Random, good: Content) -> bytes:
    return flipped(good[0], chance.randrange(8 + int.from_bytes(good[0][:8], "little"), len(good[0])), chance.randrange(1, 256))


def flipped(content: bytes, place: int, bits: int) -> bytes:
    return content[:place] + bytes([content[place] ^ bits]) + content[place + 1 :]


def overwritten(chance: random.Random, good: Content) -> bytes:
    start, length = chance.randrange(len(good[0])), chance.randrange(1, 200)
    content = good[0][:start] + chance.randbytes(length) + good[0][start + length :]
    return content if content != good[0] else content[:-1]


def noise(chance: random.Random, good: Content) -> bytes:
    return chance.randbytes(chance.choice([0, 1, 7, 8, 9, 100, 10_000]))


def claimed_sizes(chance: random.Random, good: Content) -> bytes:
    """Header lengths and tensor offsets far beyond the file."""
    if chance.random() < 0.5:
        return struct.pack("<Q", chance.choice([2**63, 2**64 - 1, 2**40, len(good[0]) - 7])) + good[0][8:]
    shape = chance.choice([[2**31, 2**31], [2**62], [10**9]])
    entry = {"dtype": "F32", "shape": shape, "data_offsets": [0, 4 * shape[0]]}
    table = json.dumps({"__metadata__": {"cersa": header_text(good[1])}, "model.0.block": entry}).encode()
    return with_checksum(struct.pack("<Q", len(table)) + table + bytes(64))


def foreign(chance: random.Random, good: Content) -> bytes:
    tensors = {f"{chance.choice(['unet', 'model'])}.{i}.weight": torch.zeros(chance.randrange(1, 5), 3) for i in range(3)}
    metadata = chance.choice([None, {"format": "pt"}, {"cersa": "yes"}, {"cersa": "[]"}, {"cersa": "{}"}])
    return save(tensors, metadata=metadata)


def lora(chance: random.Random, good: Content) -> bytes:
    if chance.random() < 0.5:
        layer = "unet.mid_block.attentions.0.to_q"
        tensors = {f"{layer}.lora_A.weight": torch.zeros(4, 8), f"{layer}.lora_B.weight": torch.zeros(8, 4)}
        return save(tensors, metadata={"lora_adapter_metadata": "{}", "format": "pt"})
    layer = "lora_unet_mid_block_attentions_0_to_q"
    tensors = {f"{layer}.lora_down.weight": torch.zeros(4, 8), f"{layer}.alpha": torch.tensor(4.0)}
    return save(tensors, metadata={"ss_network_module": "networks.lora"})


def pickled(chance: random.Random, good: Content) -> bytes:
    return pickle.dumps({"model.0.block": [0.0] * chance.randrange(100)}, protocol=chance.choice([2, 3, 4, 5]))


def wrong_tensors(chance: random.Random, good: Content) -> bytes:
    tensors = dict(good[2])
    name = chance.choice(list(tensors))
    tensor = tensors[name]
    change = chance.choice(["shape", "dtype", "gone", "more", "empty", "nan", "indices"])
    if change == "shape":
        tensors[name] = torch.zeros(*(size + chance.choice([-1, 1, 100]) for size in tensor.shape), dtype=tensor.dtype)
    elif change == "dtype":
        tensors[name] = tensor.to(chance.choice([torch.float64, torch.uint8, torch.bool, torch.int64, torch.float8_e4m3fn]))
    elif change == "gone":
        del tensors[name]
    elif change == "more":
        tensors[chance.choice(["model.7.block", "../../etc/passwd", "x" * 10_000, "model.0.block.rows"])] = tensor.clone()
    elif change == "empty":
        tensors[name] = tensor[:0]
    elif change == "nan":
        name = chance.choice([name for name in tensors if name.endswith("block")])
        tensors[name] = torch.full_like(tensors[name], chance.choice([torch.nan, torch.inf, -torch.inf]))
    else:
        name = chance.choice([name for name in tensors if not name.endswith("block")])
        tensors[name] = torch.full_like(tensors[name], chance.choice([-1, 0, 10**9, 2**31 - 1]))
    return rebuilt(good[1], tensors)


VALUES = [None, "", "1", -1, 0, 1.5, 10**9, 2**63, 10**400, True, [], {}, [None], [[1.0]] * 8, [1.0, 2.0], 1e308, "../../x"]


def wrong_facts(chance: random.Random, good: Content) -> bytes:
    header = json.loads(json.dumps(good[1]))
    layer = header["layers"][chance.choice(list(header["layers"]))]
    # The fingerprint and the reported error may be any numbers, and "bases" and "residual" any truth that fits the tensors.
    name = chance.choice(["m", "n", "k", "r", "q", "o", "scale", "s", "error", "entries", "bases", "residual"])
    sensible = {"m": [10**9, 2**63, 10**400], "n": [10**9, 2**63, 10**400], "q": [None], "bases": [], "residual": [True]}
    sensible |= {"scale": [10**9, 2**63, 1.5], "error": [0, 1.5, 10**9, 2**63], "s": [[1.0, 2.0]], "entries": [[]], "o": [0]}
    values = [value for value in VALUES if value not in sensible.get(name, []) or type(value) is bool]
    layer[name] = chance.choice([value for value in values if not (name == "residual" and value is True)])
    if chance.random() < 0.2:
        del layer[name]
    return rebuilt(header, good[2])


def wrong_entries(chance: random.Random, good: Content) -> bytes:
    header = dict(good[1])
    name = chance.choice(["layers", "config", "base_model", "training", "format_version"])
    if chance.random() < 0.3:
        del header[name]
    else:
        header[name] = chance.choice([value for value in VALUES if not isinstance(value, dict) or name == "layers"])
    return rebuilt(header, good[2])


def wrong_names(chance: random.Random, good: Content) -> bytes:
    """Layers under other names: of paths, of nothing, twice, or too long."""
    name = chance.choice(["../../../etc/passwd", "/dev/zero", "", "..", "model", "C:\\x", "x" * 100_000, "\x00", "model.\u202e"])
    layers = {name: good[1]["layers"]["model.0"], "model.2": good[1]["layers"]["model.2"]}
    tensors = {key.replace("model.0.", f"{name}."): tensor for key, tensor in good[2].items()}
    return rebuilt(good[1] | {"layers": layers}, tensors)


def wrong_json(chance: random.Random, good: Content) -> bytes:
    """Deep, long, repeated or constant JSON, inside and outside."""
    text = header_text(good[1])
    inner = chance.choice(
        [
            "[" * 100_000,
            '{"a":' * 100_000,
            text[:-1],
            text.replace('"training": {', '"training": {"steps": 4, ', 1),
            text[:-1] + ', "format_version": 2}',
            text.replace('"steps": 3', '"steps": NaN'),
            text.replace('"steps": 3', f'"steps": {"9" * 5000}'),
            text.replace('"steps": 3', f'"steps": "{"x" * 10 * 2**20}"'),
            text.encode().hex(),
        ]
    )
    if chance.random() < 0.3:
        table = chance.choice([b"[" * 100_000, b'{"__metadata__":{"cersa":"a","cersa":"b"}}', b"\xff\xfe{}", b"null", b'"x"'])
        return struct.pack("<Q", len(table)) + table
    content = save(good[2], metadata={"cersa": inner})
    return with_checksum(content) if MARKER in content else content


KINDS = {
    truncated: 150,
    extended: 30,
    flipped_in_header: 150,
    flipped_in_body: 150,
    overwritten: 60,
    noise: 30,
    claimed_sizes: 40,
    foreign: 30,
    lora: 20,
    pickled: 20,
    wrong_tensors: 120,
    wrong_facts: 120,
    wrong_entries: 40,
    wrong_names: 30,
    wrong_json: 30,
}


def test_there_are_a_thousand_of_them():
    assert sum(KINDS.values()) >= 1000


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_damaged_file(kind: Callable[[random.Random, Content], bytes], good, tmp_path):
    path = tmp_path / "damaged.safetensors"
    model = torch.nn.Sequential(torch.nn.Linear(12, 10), torch.nn.ReLU(), torch.nn.Linear(10, 6))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    tracemalloc.start()
    for seed in range(KINDS[kind]):
        path.write_bytes(kind(random.Random(f"{kind.__name__} {seed}"), good))
        try:
            with raises(AdapterFormatError, "damaged.safetensors") as caught:
                cersa.load_adapter(model, path, show_progress=False)
        except BaseException as error:
            raise AssertionError(f"{kind.__name__} with seed {seed}") from error
        # A name in the header that does not fit the model would be a BaseMismatchError: these files are refused before that.
        assert not isinstance(caught.value, BaseMismatchError)
    assert tracemalloc.get_traced_memory()[1] < 200 * 2**20
    tracemalloc.stop()
    assert not any(isinstance(module, CersaLinear) for module in model.modules())
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("suffix", [".bin", ".pt", ".ckpt"])
def test_a_pickle_is_never_opened(suffix, tmp_path):
    class Trap:
        def __reduce__(self):
            return (tmp_path.joinpath("sprung").touch, ())

    path = tmp_path / f"adapter{suffix}"
    torch.save({"model.0.block": Trap()}, path)
    with raises(AdapterFormatError, path.name, "pickle"):
        cersa.load_adapter(torch.nn.Linear(2, 2), path)
    renamed = path.rename(tmp_path / "adapter.safetensors")
    with raises(AdapterFormatError, renamed.name, "pickle"):
        cersa.load_adapter(torch.nn.Linear(2, 2), renamed)
    assert not (tmp_path / "sprung").exists()


def test_an_interrupted_save_leaves_the_old_file(trained, tmp_path, monkeypatch):
    path = tmp_path / "a.safetensors"
    cersa.save_adapter(trained[1], path)
    old = path.read_bytes()

    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("os.replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        cersa.save_adapter(trained[1], path, dtype=torch.float32)
    assert path.read_bytes() == old and list(tmp_path.iterdir()) == [path]


def test_a_self_contained_or_thin_file_is_checked_as_well(trained, tmp_path):
    path = tmp_path / "a.safetensors"
    for change in ("U", "s", "Vh", "left", "right"):
        cersa.save_adapter(trained[1], path, save_bases=True, save_energy=0.5)
        damage(path, lambda header, tensors, change=change: tensors.update({f"model.0.{change}": torch.zeros(2, 2)}))
        with raises(AdapterFormatError, path.name, "model.0", change, "(2, 2)"):
            cersa.load_adapter(trained[0], path, show_progress=False)
