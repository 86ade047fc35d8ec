"""Prints the lowest versions in pyproject.toml as constraints for pip; `make test-lowest` installs them."""

import tomllib
from pathlib import Path

from packaging.requirements import Requirement
from packaging.version import Version

PYPROJECT = Path(__file__).resolve().parents[1] / "pyproject.toml"


def lowest_versions(project: dict) -> dict[str, Version]:
    """The lower bound of each package in the requirements of a project and of all its extras.

    Args:
        project: the table `project` of a pyproject.toml.

    Raises:
        ValueError: a requirement has no lower bound.
    """
    requirements = [*project["dependencies"], *(text for extra in project["optional-dependencies"].values() for text in extra)]
    lowest: dict[str, Version] = {}
    for requirement in map(Requirement, requirements):
        if requirement.name == project["name"]:
            continue  # an extra that consists of other extras
        bounds = [Version(bound.version) for bound in requirement.specifier if bound.operator == ">="]
        if not bounds:
            raise ValueError(f"{PYPROJECT.name}: {requirement} has no lower bound, expected {requirement.name}>=VERSION")
        lowest[requirement.name] = max([*bounds, lowest.get(requirement.name, bounds[0])])
    return lowest


if __name__ == "__main__":
    for name, version in lowest_versions(tomllib.loads(PYPROJECT.read_text())["project"]).items():
        print(f"{name}=={version}")
