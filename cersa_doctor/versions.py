"""Compares installed versions with the required and the tested ones, and finds packages that do not work together."""

from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, requires, version

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name
from packaging.version import Version

DISTRIBUTION = "cersa-diffusion"
# The versions that `make test` installs, from constraints.txt (tests/test_doctor.py compares the two).
TESTED = {
    "accelerate": "1.15.0",
    "datasets": "5.2.0",
    "diffusers": "0.42.1",
    "gradio": "6.31.0",
    "huggingface-hub": "2.4.0",
    "open-clip-torch": "3.3.0",
    "peft": "0.21.2",
    "safetensors": "0.8.0",
    "tokenizers": "0.23.3",
    "torch": ">=2.14,<2.15",
    "torchmetrics": "1.9.0",
    "torchvision": ">=0.29,<0.30",
    "transformers": "5.23.0",
}
# Extra in pyproject.toml -> its purpose.
EXTRAS = {
    "score": "scoring pictures, comparing methods, the demo",
    "train": "data sets from the hub, training logs, classification",
    "plot": "figures of plans and analyses",
    "app": "the page in a browser",
    "ray": "comparing methods on several machines",
    "8bit": "the optimizer adamw8bit",
    "prodigy": "the optimizer prodigy",
    "quantised": "bases whose linear layers are quantised",
    "base": "rebuilding the embedded models",
    "test": "the test suite",
    "browser": "the page's tests in a browser",
}


@dataclass(frozen=True)
class Package:
    """A package that this one requires.

    Attributes:
        name: its name in the package registry.
        wanted: the versions that pyproject.toml allows.
        installed: the installed version, or None.
        extra: the extra that requires it; "" if no extra is needed.
    """

    name: str
    wanted: SpecifierSet
    installed: Version | None
    extra: str

    @property
    def tested(self) -> str:
        """The version that the tests use, or ""."""
        return TESTED.get(self.name, "")

    @property
    def fits(self) -> bool:
        """Whether an allowed version is installed."""
        return self.installed is not None and self.wanted.contains(self.installed, prereleases=True)


@dataclass(frozen=True)
class BadPair:
    """Two packages that do not work together.

    Attributes:
        packages: their names and installed versions.
        symptom: what fails.
        remedy: how to repair it.
        stops_training: whether training is impossible with them.
    """

    packages: str
    symptom: str
    remedy: str
    stops_training: bool

    def __str__(self) -> str:
        return f"{self.packages}: {self.symptom}; {self.remedy}"


def installed_version(name: str) -> Version | None:
    """The version of an installed distribution, or None."""
    try:
        return Version(version(name))
    except PackageNotFoundError:
        return None


def required_packages() -> list[Package]:
    """The packages that the metadata of this distribution requires, sorted by extra and name.

    Raises:
        PackageNotFoundError: cersa-diffusion is not installed and therefore has no metadata.
    """
    packages: dict[tuple[str, str], Package] = {}
    for requirement in map(Requirement, requires(DISTRIBUTION) or []):
        name = canonicalize_name(requirement.name)
        for extra in ("", *EXTRAS):
            # A requirement belongs to an extra if its marker is true with the extra and false without it.
            applies = requirement.marker is None or requirement.marker.evaluate({"extra": extra})
            belongs = not extra or (requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}))
            if applies and belongs and name != DISTRIBUTION:
                packages[extra, name] = Package(name, requirement.specifier, installed_version(name), extra)
    return [packages[key] for key in sorted(packages)]


def bad_pairs() -> list[BadPair]:
    """The installed packages that are known not to work together."""
    return [*_transformers_and_peft(), *_torch_and_torchvision()]


def _transformers_and_peft() -> Iterator[BadPair]:
    transformers, peft = installed_version("transformers"), installed_version("peft")
    if transformers and peft and transformers >= Version("5.24") and peft < Version("0.22"):
        yield BadPair(
            f"transformers {transformers} with peft {peft}",
            "transformers 5.24 and newer refuse peft below 0.22 in their own add_adapter, set_adapter, active_adapters and "
            "delete_adapter, which change and save a text encoder with a LoRA; cersa_diffusion itself uses none of them",
            "pip install 'transformers<5.24', or peft 0.22 when it is released",
            stops_training=False,
        )


def _torch_and_torchvision() -> Iterator[BadPair]:
    torch, torchvision = installed_version("torch"), installed_version("torchvision")
    if not torch or not torchvision:
        return
    made_for = next((r.specifier for r in map(Requirement, requires("torchvision") or []) if r.name == "torch"), SpecifierSet())
    if not made_for.contains(torch.public, prereleases=True):
        remedy = "pip install --upgrade torch torchvision"
    elif torch.local == "cpu" and torchvision.local != "cpu":
        remedy = "install both from the same source: the package registry, or PyTorch's index of CPU builds"
    else:
        return
    yield BadPair(
        f"torch {torch} with torchvision {torchvision}",
        "the operators of torchvision only load into the torch that it was built for (operator torchvision::nms does not exist), "
        "so transformers and diffusers cannot be imported",
        remedy,
        stops_training=True,
    )
