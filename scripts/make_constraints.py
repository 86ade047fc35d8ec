"""Prints constraints.txt: the version of every package that all extras need, so that an install can be repeated.

For each interpreter it asks pip, in a fresh environment, what it would install. A package whose version depends on the
interpreter gets a line for each, with a marker. torch and torchvision become ranges (patch releases, and builds for any
accelerator); what torch itself pins for its accelerator is left out.
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
    """What pip would install of this repository, with all extras, into a fresh environment of an interpreter.

    Args:
        interpreter: a python, by name or path.
        extras: of pyproject.toml.
        conditions: further requirements that the versions must meet.
    """
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run([interpreter, "-m", "venv", folder], check=True)
        pip = [str(Path(folder) / "bin" / "python"), "-m", "pip", "--quiet"]
        subprocess.run([*pip, "install", "--upgrade", "pip"], check=True)
        report = Path(folder) / "report.json"
        # The constraints of the file that is written here anew are not in force.
        requirements = ["--editable", f"{REPOSITORY}[{','.join(extras)}]", *conditions]
        subprocess.run([*pip, "install", "--dry-run", "--report", str(report), *requirements], check=True)
        packages = [package["metadata"] for package in json.loads(report.read_text())["install"]]
    return {canonical(package["name"]): Version(package["version"]) for package in packages}


def canonical(name: str) -> str:
    """A package's name as PEP 503 spells it."""
    return re.sub(r"[-_.]+", "-", name).lower()


def lines(resolved: dict[Version, dict[str, Version]]) -> list[str]:
    """The constraints for several interpreters.

    Args:
        resolved: Python's version (3.11) -> package -> its version there.
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
    """The interpreter before this one."""
    return max((other for other in versions if other < python), default=None)


def line(name: str, version: Version) -> str:
    """The constraint of a package."""
    if name in RANGES:
        return f"{name}>={version.major}.{version.minor},<{version.major}.{version.minor + 1}"
    return f"{name}=={version.public}"


def main() -> None:
    """Resolves for every interpreter and prints."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pythons", nargs="+", default=[sys.executable], help="interpreters to resolve for (default: this one)")
    parser.add_argument(
        "--with", nargs="*", default=[], dest="conditions", help="further requirements, such as transformers<5.24"
    )
    arguments = parser.parse_args()
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    own = {project["name"]}
    resolved = {}
    for interpreter in arguments.pythons:
        code = "import sys; print('%d.%d' % sys.version_info[:2])"
        python = Version(subprocess.run([interpreter, "-c", code], check=True, capture_output=True, text=True).stdout.strip())
        packages = resolve(interpreter, list(project["optional-dependencies"]), arguments.conditions)
        resolved[python] = {name: version for name, version in packages.items() if name not in own}
    print(HEADER + "\n".join(lines(resolved)))


if __name__ == "__main__":
    main()
