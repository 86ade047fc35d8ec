"""The scripts that write constraints for pip: the lowest versions, and those of an install that repeats."""

import sys

from packaging.version import Version

from ..conftest import REPOSITORY, raises

sys.path.insert(0, str(REPOSITORY / "scripts"))

from lowest_versions import lowest_versions
from make_constraints import lines


def test_lowest_versions_are_the_lower_bounds_of_all_requirements():
    project = {
        "name": "own",
        "dependencies": ["a>=1.5,<2", "b>=3"],
        "optional-dependencies": {"more": ["b>=3.1", "c[x]>=0.1"], "all": ["own[more]"]},
    }
    assert {name: str(version) for name, version in lowest_versions(project).items()} == {"a": "1.5", "b": "3.1", "c": "0.1"}


def test_a_requirement_without_a_lower_bound_is_named():
    with raises(ValueError, "pyproject.toml", "numpy<3"):
        lowest_versions({"name": "own", "dependencies": ["numpy<3"], "optional-dependencies": {}})


def test_constraints_differ_by_interpreter_only_where_they_must():
    resolved = {
        "3.11": {"numpy": "2.4.6", "idna": "3.2", "torch": "2.14.1+cpu", "nvidia-cublas": "13.1", "triton": "3.8", "old": "1"},
        "3.12": {"numpy": "2.5.0", "idna": "3.2", "torch": "2.14.1+cpu"},
        "3.13": {"numpy": "2.5.1", "idna": "3.2", "torch": "2.14.1+cpu"},
    }
    parsed = {
        Version(python): {name: Version(version) for name, version in packages.items()} for python, packages in resolved.items()
    }
    assert lines(parsed) == [
        "idna==3.2",
        "numpy==2.4.6; python_version < '3.12'",
        "numpy==2.5.0; python_version >= '3.12' and python_version < '3.13'",
        "numpy==2.5.1; python_version >= '3.13'",
        "old==1",
        "torch>=2.14,<2.15",
    ]
