"""What the tests share: the embedded models, small trained models, and starting the real command line."""

import copy
import io
import json
import os
import re
import runpy
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, redirect_stderr
from pathlib import Path

import hypothesis
import pytest
import torch
from torch import nn

import cersa_diffusion as cersa
from cersa_diffusion.functional import Decomposition
from cersa_diffusion.weights import cache

REPOSITORY = Path(__file__).resolve().parents[1]
# Where the tests compute: CERSA_TEST_DEVICE=cuda makes them the tests of a GPU (docs/compatibility.md says what came of it).
DEVICE = torch.device(os.environ.get("CERSA_TEST_DEVICE", "cpu"))
if DEVICE.type == "cpu":
    # Trainers would take a GPU that is there; command lines inherit this.
    os.environ["ACCELERATE_USE_CPU"] = "true"
else:
    # The tests compare results bit for bit, or within what float32 rounds.
    os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.backends.cudnn.allow_tf32 = False

# On a busy or slow machine the time of an example says nothing about the code.
hypothesis.settings.register_profile("tests", deadline=None)
hypothesis.settings.load_profile("tests")


def pytest_addoption(parser):
    parser.addoption("--run-slow", action="store_true", help="also run the tests marked slow")


def pytest_collection_modifyitems(config, items):
    if not torch.cuda.is_available():
        skip = pytest.mark.skip(reason="needs a GPU")
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(skip)
    if not config.getoption("--run-slow"):
        skip = pytest.mark.skip(reason="slow: add --run-slow")
        for item in items:
            if "slow" in item.keywords:
                item.add_marker(skip)


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory):
    """No test touches the user's decomposition cache; command lines inherit the setting."""
    folder = tmp_path_factory.mktemp("decompositions")
    os.environ["CERSA_CACHE"] = str(folder)
    yield folder
    del os.environ["CERSA_CACHE"]


@pytest.fixture(scope="session")
def base_path() -> Path:
    return REPOSITORY / "assets" / "emoji-base"


@pytest.fixture(scope="session")
def clip_path() -> Path:
    return REPOSITORY / "assets" / "emoji-clip"


@pytest.fixture(scope="session")
def subject_path() -> Path:
    return REPOSITORY / "assets" / "subjects" / "fluent-cat"


@pytest.fixture(scope="session")
def subject(subject_path) -> dict:
    return json.loads((subject_path / "subject.json").read_text())


@pytest.fixture(scope="session")
def adapter_file(tmp_path_factory):
    """(family, further arguments of `write_adapter`) -> file of an adapter for a small pipeline, written once."""
    # Imported here: only the tests of pipelines need these models.
    from .pipelines_small import write_adapter

    written = {}

    def file(family: str, **arguments) -> Path:
        key = (family, *sorted(arguments.items()))
        if key not in written:
            written[key] = write_adapter(family, tmp_path_factory.mktemp(family), **arguments)
        return written[key]

    return file


@pytest.fixture
def network() -> nn.Module:
    """A small network whose weights have decaying spectra, as trained weights do."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(48, 40), nn.GELU(), nn.Linear(40, 64, bias=False), nn.GELU(), nn.Linear(64, 24))
    for layer in model:
        if isinstance(layer, nn.Linear):
            U, s, Vh = torch.linalg.svd(layer.weight.detach(), full_matrices=False)
            layer.weight = nn.Parameter((U * s * torch.logspace(0, -1.5, len(s))) @ Vh)
    return model.to(DEVICE)


def script_error(script: str, *arguments: str | Path) -> str:
    """What a script that ends with an error says last; run in this process, which has imported all that it needs."""
    written = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, redirect_stderr(written), pytest.raises(SystemExit) as ended:
        patch.setattr(sys, "argv", [script, *map(str, arguments)])
        runpy.run_path(str(REPOSITORY / script), run_name="__main__")
    # A text is what Python itself prints when it ends; argparse prints its own and ends with a number.
    assert ended.value.code not in (0, None)
    return ended.value.code if isinstance(ended.value.code, str) else written.getvalue().strip().splitlines()[-1]


@contextmanager
def raises(
    error: type[BaseException] | tuple[type[BaseException], ...], *named: str
) -> Iterator[pytest.ExceptionInfo[BaseException]]:
    """As `pytest.raises`, for an error whose message names all of this.

    Args:
        error: its class, or several of which it has one.
        named: settings, layers, files and values, as whole words; never the prose around them.
    """
    with pytest.raises(error) as caught:
        yield caught
    assert_named(str(caught.value), *named)


@contextmanager
def warns(category: type[Warning], *named: str) -> Iterator[pytest.WarningsRecorder]:
    """As `pytest.warns`, for a warning whose message names all of this.

    Args:
        category: its class.
        named: settings, layers, files and values, as whole words; never the prose around them.
    """
    # One pattern that looks ahead for every name, so that pytest decides as ever which warnings are given on.
    with pytest.warns(category, match="(?s)" + "".join(f"(?=.*{_whole_word(name)})" for name in named)) as caught:
        yield caught


def assert_named(message: str, *named: str) -> None:
    """A message names all of this, as whole words."""
    missing = [name for name in named if not re.search(_whole_word(name), message)]
    assert not missing, f"{message[:1000]} does not name {missing}"


def _whole_word(name: str) -> str:
    """The pattern of a name that does not go on to either side."""
    return rf"(?<!\w){re.escape(name)}(?!\w)"


def randn(*shape: int, **options) -> torch.Tensor:
    """Random numbers on the device of the tests, the same ones on every device.

    Args:
        shape: of the tensor.
        options: of `torch.randn`.
    """
    return torch.randn(*shape, **options).to(DEVICE)


def frozen_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Name -> parameter that needs no gradient."""
    return {name: parameter for name, parameter in model.named_parameters() if not parameter.requires_grad}


def train(model: nn.Module, steps: int = 20, learning_rate: float = 1e-2) -> None:
    """Trains whatever is trainable on a fixed random regression."""
    torch.manual_seed(1)
    inputs, targets = randn(64, 48), randn(64, 24)
    optimizer = torch.optim.AdamW(cersa.trainable_parameters(model), learning_rate)
    for _ in range(steps):
        optimizer.zero_grad()
        (model(inputs) - targets).square().mean().backward()
        optimizer.step()


@pytest.fixture
def trained(network) -> tuple[nn.Module, nn.Module]:
    """(the untouched network, the same network injected and trained)."""
    model = copy.deepcopy(network)
    cersa.inject_cersa(model, cersa.CersaConfig(alpha=0.9), show_progress=False)
    train(model)
    return network, model


def run_script(
    *arguments: str | Path, launch: bool = False, environment: Mapping[str, str] | None = None
) -> subprocess.CompletedProcess:
    """Runs a script of the repository as a user would, through `accelerate launch` if asked."""
    command = [sys.executable]
    if launch:
        command += ["-m", "accelerate.commands.launch", "--num_processes", "1", "--num_machines", "1"]
        command += ["--mixed_precision", "no", "--dynamo_backend", "no"]
    environment = {**(environment or os.environ), "TQDM_MININTERVAL": "5"}
    return subprocess.run(
        [*command, *map(str, arguments)], cwd=REPOSITORY, env=environment, capture_output=True, text=True, timeout=900
    )


@pytest.fixture
def other_machine(monkeypatch, tmp_path):
    """A function that changes what another machine changes: an empty cache elsewhere, and other signs of the singular vectors."""

    def move():
        decompose = cache.decompose

        def decompose_differently(weight: torch.Tensor) -> Decomposition:
            U, s, Vh = decompose(weight)
            generator = torch.Generator().manual_seed(weight.shape[0])
            signs = 1.0 - 2.0 * torch.randint(2, (len(s),), generator=generator).to(s)
            return Decomposition(U * signs, s, signs[:, None] * Vh)

        monkeypatch.setattr(cache, "decompose", decompose_differently)
        monkeypatch.setenv("CERSA_CACHE", str(tmp_path / "another-cache"))

    return move
