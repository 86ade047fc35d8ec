"""The report of `cersa doctor`: what is installed, and what will not work."""

import platform
import sys
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError

from cersa_doctor.folders import Folder, cache_folders
from cersa_doctor.probes import IMPORTS, Device, devices, import_errors
from cersa_doctor.versions import DISTRIBUTION, EXTRAS, BadPair, Package, bad_pairs, installed_version, required_packages

MIB, GIB = 2**20, 2**30


@dataclass(frozen=True)
class Report:
    """The results of the doctor.

    Attributes:
        packages: the required packages.
        pairs: installed packages that do not work together.
        import_errors: distribution -> error, or None if the import works.
        devices: the devices of torch.
        device_error: the error that ended the search for devices, or None.
        folders: the cache folders.
        problems: what will not work, one line each.
    """

    packages: list[Package]
    pairs: list[BadPair]
    import_errors: dict[str, str | None]
    devices: list[Device]
    device_error: str | None
    folders: list[Folder]
    problems: list[str]

    def to_dict(self) -> dict:
        """The report as plain values for JSON."""
        return {
            "python": platform.python_version(),
            "platform": platform.platform(),
            "executable": sys.executable,
            "packages": [
                {
                    "name": package.name,
                    "extra": package.extra,
                    "installed": package.installed and str(package.installed),
                    "wanted": str(package.wanted),
                    "tested": package.tested,
                    "fits": package.fits,
                }
                for package in self.packages
            ],
            "bad_pairs": [asdict(pair) for pair in self.pairs],
            "import_errors": self.import_errors,
            "devices": [asdict(device) for device in self.devices],
            "device_error": self.device_error,
            "folders": [asdict(folder) | {"path": folder.path and str(folder.path)} for folder in self.folders],
            "missing_extras": missing_extras(self.packages),
            "problems": self.problems,
        }

    def __str__(self) -> str:
        sections = {
            f"Python {platform.python_version()} on {platform.platform()} ({sys.executable})": [],
            "Packages: installed, allowed, tested": [_package_line(package) for package in self.packages if _is_shown(package)],
            "Incomplete extras": _extra_lines(self.packages),
            "Devices, and the dtypes that work on them": [_device_line(device) for device in self.devices],
            "Caches": [f"{folder.content}: {folder.path or 'off'}, {_size(folder.size_bytes)}" for folder in self.folders],
            "Will not work": self.problems or ["no known problems"],
        }
        return "\n".join(line for title, lines in sections.items() for line in (title, *(f"  {line}" for line in lines)))


def examine() -> Report:
    """Examines everything; this takes as long as importing all libraries."""
    try:
        packages, problems = required_packages(), []
    except PackageNotFoundError:
        packages, problems = [], [f"{DISTRIBUTION} is not installed: pip install -c constraints.txt -e ."]
    pairs = bad_pairs()
    errors = import_errors([name for name in IMPORTS if installed_version(name)])
    torch_devices, device_error = devices() if errors.get("torch", "not installed") is None else ([], "torch cannot be imported")
    problems += [_version_problem(package) for package in packages if not package.fits and _is_needed(package)]
    problems += map(str, pairs)
    problems += [f"{name}: {error}" for name, error in errors.items() if error]
    problems += [f"devices: {device_error}"] if device_error else []
    problems += [f"{device.device}: float32 does not work" for device in torch_devices if not device.dtypes["float32"]]
    return Report(packages, pairs, errors, torch_devices, device_error, cache_folders(), list(dict.fromkeys(problems)))


def missing_extras(packages: list[Package]) -> dict[str, list[str]]:
    """Extra -> its packages that are not installed."""
    missing: dict[str, list[str]] = {}
    for package in packages:
        if package.extra and package.installed is None:
            missing.setdefault(package.extra, []).append(package.name)
    return missing


def _is_needed(package: Package) -> bool:
    return not package.extra or package.installed is not None


def _is_shown(package: Package) -> bool:
    return not package.extra or (package.installed is not None and bool(package.tested or not package.fits))


def _version_problem(package: Package) -> str:
    state = "is not installed" if package.installed is None else f"is {package.installed}"
    return f"{package.name} {state}, expected {package.wanted}: pip install '{package.name}{package.wanted}'"


def _package_line(package: Package) -> str:
    line = f"{package.name} {package.installed or 'not installed'} ({package.wanted})"
    return f"{line}, tested {package.tested}" if package.tested else line


def _extra_lines(packages: list[Package]) -> list[str]:
    return [
        f"{extra} ({EXTRAS[extra]}) lacks {', '.join(names)}: pip install '{DISTRIBUTION}[{extra}]'"
        for extra, names in missing_extras(packages).items()
    ]


def _device_line(device: Device) -> str:
    dtypes = ", ".join(f"{dtype}{'' if works else ' does not work'}" for dtype, works in device.dtypes.items())
    memory = "" if device.total_bytes is None else f", {_size(device.free_bytes)} of {_size(device.total_bytes)} free"
    return f"{device.device} ({device.name}){memory}: {dtypes}"


def _size(size_bytes: int) -> str:
    return f"{size_bytes / GIB:.1f} GiB" if size_bytes >= GIB else f"{size_bytes / MIB:.1f} MiB"
