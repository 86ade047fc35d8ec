"""Prints constraints.txt: the version of every package that all extras need, so that an installation can be repeated.

For each interpreter, pip lists in a new environment what it would install. A package whose version depends on the interpreter
gets a line with a marker for each version. torch and torchvision get ranges (patch releases, and builds for any accelerator);
packages that torch pins for its accelerator are left out.
"""

import argparse
import json
import re
import subprocess
import sys
import tempfile
import tomllib
from pathlib import Path

from packaging.version import Version

REPOSITORY = Path(__file__).resolve().parents[1]
RANGES = ("torch", "torchvision")
OF_TORCH = re.compile(r"(nvidia|cuda)-|triton$")
HEADER = """\
# Made by `make constraints`: do not edit. Use: pip install -c constraints.txt -e '.[EXTRAS]'
"""


def resolve(interpreter: str, extras: list[str], conditions: list[str]) -> dict[str, Version]:
    """Package -> version that pip would install for this repository with extras in a new environment.

    Args:
        interpreter: name or path of a Python interpreter.
        extras: extras of pyproject.toml.
        conditions: further requirements for the versions.
    """
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run([interpreter, "-m", "venv", folder], check=True)
        pip = [str(Path(folder) / "bin" / "python"), "-m", "pip", "--quiet"]
        subprocess.run([*pip, "install", "--upgrade", "pip"], check=True)
        report = Path(folder) / "report.json"
        # constraints.txt is not used here, because this program writes it again.
        requirements = ["--editable", f"{REPOSITORY}[{','.join(extras)}]", *conditions]
        subprocess.run([*pip, "install", "--dry-run", "--report", str(report), *requirements], check=True)
        packages = [package["metadata"] for package in json.loads(report.read_text())["install"]]
    return {canonical(package["name"]): Version(package["version"]) for package in packages}


def canonical(name: str) -> str:
    """The name of a package in the normal form of PEP 503."""
    return re.sub(r"[-_.]+", "-", name).lower()


def lines(resolved: dict[Version, dict[str, Version]]) -> list[str]:
    """The constraints for several interpreters.

    Args:
        resolved: version of Python (3.11) -> package -> its version for this Python.
    """
    result = []
    for name in sorted(set().union(*resolved.values())):
        if OF_TORCH.match(name):
            continue
        versions = {python: packages[name] for python, packages in resolved.items() if name in packages}
        if len(set(versions.values())) == 1:
            result.append(line(name, versions[min(versions)]))
            continue
        changes = [python for python in sorted(versions) if versions[python] != versions.get(previous(python, versions))]
        for start, end in zip(changes, [*changes[1:], None], strict=True):
            markers = [f"python_version >= '{start}'"] * (start != changes[0]) + [f"python_version < '{end}'"] * (end is not None)
            result.append(f"{line(name, versions[start])}; {' and '.join(markers)}")
    return result


def previous(python: Version, versions: dict[Version, Version]) -> Version | None:
    """The version of Python before this one."""
    return max((other for other in versions if other < python), default=None)


def line(name: str, version: Version) -> str:
    """The constraint of a package."""
    if name in RANGES:
        return f"{name}>={version.major}.{version.minor},<{version.major}.{version.minor + 1}"
    return f"{name}=={version.public}"


def main() -> None:
    """Resolves the versions for every interpreter and prints the constraints."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pythons", nargs="+", default=[sys.executable], help="interpreters to resolve for (default: this one)")
    parser.add_argument(
        "--with", nargs="*", default=[], dest="conditions", help="further requirements, such as transformers<5.24"
    )
    arguments = parser.parse_args()
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    resolved = {}
    for interpreter in arguments.pythons:
        code = "import sys; print('%d.%d' % sys.version_info[:2])"
        python = Version(subprocess.run([interpreter, "-c", code], check=True, capture_output=True, text=True).stdout.strip())
        packages = resolve(interpreter, list(project["optional-dependencies"]), arguments.conditions)
        resolved[python] = {name: version for name, version in packages.items() if name != project["name"]}
    print(HEADER + "\n".join(lines(resolved)))


if __name__ == "__main__":
    main()
