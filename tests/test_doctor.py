"""`cersa doctor`: what it finds here, in a broken environment, and in one with a pair that does not work together."""

import json
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.version import Version

from cersa_diffusion.errors import ConfigError
from cersa_diffusion.versions import check_versions
from cersa_doctor.probes import import_errors
from cersa_doctor.versions import EXTRAS, TESTED, bad_pairs, required_packages

from .conftest import REPOSITORY

PROJECT = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]


def install(folder: Path, name: str, version: str, *requirements: str) -> None:
    """Lays the metadata of a distribution into a folder, which goes before the real ones on the path."""
    metadata = folder / f"{name.replace('-', '_')}-{version}.dist-info" / "METADATA"
    metadata.parent.mkdir()
    extras = sorted({found[1] for text in requirements if (found := re.search(r"extra == '(\w+)'", text))})
    lines = ["Metadata-Version: 2.4", f"Name: {name}", f"Version: {version}"]
    lines += [*(f"Provides-Extra: {extra}" for extra in extras), *(f"Requires-Dist: {text}" for text in requirements)]
    metadata.write_text("\n".join(lines) + "\n")


def doctor(*arguments: str, path: Path | None = None) -> subprocess.CompletedProcess:
    """Runs the doctor, with a folder before everything that is installed."""
    search = os.pathsep.join(map(str, [path, REPOSITORY] if path else [REPOSITORY]))
    command = [sys.executable, "-m", "cersa_doctor", *arguments]
    # Run from that folder: with `-m`, the working folder comes first of all, and a checkout has metadata of its own in it.
    environment = os.environ | {"PYTHONPATH": search}
    return subprocess.run(command, cwd=path or REPOSITORY, env=environment, capture_output=True, text=True)


def test_what_is_found_here():
    done = doctor("--json")
    report = json.loads(done.stdout)
    assert done.returncode == bool(report["problems"])
    versions = {package["name"]: package["installed"] for package in report["packages"]}
    assert {"torch", "transformers", "diffusers", "peft"} <= versions.keys() and all(report["packages"])
    assert report["import_errors"]["cersa-diffusion"] is None
    assert report["devices"][0]["device"] == "cpu" and report["devices"][0]["dtypes"]["float32"]
    decompositions = next(folder for folder in report["folders"] if folder["content"] == "decompositions")
    assert Path(decompositions["path"]) == Path(os.environ["CERSA_CACHE"])


@pytest.fixture
def broken(tmp_path) -> Path:
    """An environment whose torch ends in an error when it is imported, and that lacks a package and an extra."""
    (tmp_path / "torch.py").write_text("raise RuntimeError('operator torchvision::nms does not exist')\n")
    install(
        tmp_path, "cersa-diffusion", "0.1.0", "peft<0.1", "not-to-be-had>=3", "torch>=2.6", "no-such-plot>=1; extra == 'plot'"
    )
    return tmp_path


def test_broken_and_missing_packages_are_lines_of_the_report(broken):
    done = doctor(path=broken)
    assert done.returncode == 1 and "Traceback" not in done.stdout + done.stderr
    problems = done.stdout.partition("Will not work")[2]
    assert "torch: RuntimeError: operator torchvision::nms does not exist" in problems
    assert "not-to-be-had is not installed, expected >=3" in problems and re.search(r"peft is \S+, expected <0.1", problems)
    assert "no-such-plot" not in problems and "no-such-plot" in done.stdout and EXTRAS["plot"] in done.stdout


def test_the_command_reaches_the_doctor_where_the_package_cannot_be_imported(broken):
    code = "import sys; sys.argv[1:] = ['doctor', '--json']; from cersa_doctor.entry import main; main()"
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(broken), str(REPOSITORY)])}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    report = json.loads(done.stdout)
    assert done.returncode == 1 and "nms" in report["import_errors"]["cersa-diffusion"] and report["devices"] == []


def test_an_import_that_ends_the_process_is_named_and_the_others_are_tried(tmp_path, monkeypatch):
    (tmp_path / "accelerate.py").write_text("import os\nos._exit(3)\n")
    (tmp_path / "peft.py").write_text("")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    errors = import_errors(["accelerate", "peft"])
    assert errors["peft"] is None and "3" in errors["accelerate"]


def test_transformers_that_refuse_the_installed_peft_are_named_but_do_not_stop_a_training(tmp_path, monkeypatch):
    install(tmp_path, "transformers", "5.24.0")
    install(tmp_path, "peft", "0.21.2")
    monkeypatch.syspath_prepend(tmp_path)
    pair = next(pair for pair in bad_pairs() if pair.packages == "transformers 5.24.0 with peft 0.21.2")
    assert "add_adapter" in pair.symptom and "transformers<5.24" in pair.remedy and not pair.stops_training
    check_versions()


@pytest.mark.parametrize(
    "torch, torchvision, made_for",
    [("2.15.0", "0.29.1", "torch==2.14.1"), ("2.14.1+cpu", "0.29.1", "torch==2.14.1")],
    ids=["another release", "another build"],
)
def test_a_torchvision_of_another_torch_stops_the_training(tmp_path, monkeypatch, torch, torchvision, made_for):
    install(tmp_path, "torch", torch)
    install(tmp_path, "torchvision", torchvision, made_for)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ConfigError) as error:
        check_versions()
    assert all(text in str(error.value) for text in (f"torch {torch}", f"torchvision {torchvision}", "nms"))


def test_a_torchvision_of_this_torch_is_no_bad_pair(tmp_path, monkeypatch):
    install(tmp_path, "torch", "2.14.1+cpu")
    install(tmp_path, "torchvision", "0.29.1+cpu", "torch==2.14.1")
    monkeypatch.syspath_prepend(tmp_path)
    check_versions()


def test_an_import_that_fails_for_a_bad_pair_names_the_pair(tmp_path):
    (tmp_path / "diffusers.py").write_text("raise RuntimeError('operator torchvision::nms does not exist')\n")
    install(tmp_path, "torchvision", "0.1.0", "torch==1.0")
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(tmp_path), str(REPOSITORY)])}
    done = subprocess.run([sys.executable, "-c", "import cersa_diffusion"], env=environment, capture_output=True, text=True)
    assert done.returncode == 1 and "torchvision 0.1.0" in done.stderr.splitlines()[-1]


def test_extras_are_those_of_the_project_and_their_packages_are_told_apart(tmp_path, monkeypatch):
    assert set(EXTRAS) == set(PROJECT["optional-dependencies"])
    install(
        tmp_path, "cersa-diffusion", "0.1.0", "torch>=2.6", "gradio<7; extra == 'app'", "cersa-diffusion[app]; extra == 'test'"
    )
    monkeypatch.syspath_prepend(tmp_path)
    assert [(package.extra, package.name) for package in required_packages()] == [("", "torch"), ("app", "gradio")]


def constraints() -> list[Requirement]:
    lines = (REPOSITORY / "constraints.txt").read_text().splitlines()
    return [Requirement(line) for line in lines if line and not line.startswith("#")]


def test_the_tested_versions_are_those_of_the_constraints():
    pinned = {constraint.name: constraint.specifier for constraint in constraints()}
    expected = {name: SpecifierSet(text if text[0] in "<>" else f"=={text}") for name, text in TESTED.items()}
    assert expected == {name: pinned[name] for name in TESTED}


def test_constraints_name_versions_only_and_no_build_of_torch():
    for constraint in constraints():
        assert constraint.url is None and not constraint.extras
        assert not re.match(r"nvidia|cuda|triton", constraint.name)
        versions = [clause.version for clause in constraint.specifier]
        assert not any(Version(version).local for version in versions)
        assert (constraint.name.startswith("torch") and "metrics" not in constraint.name) or "==" in str(constraint.specifier)


def test_constraints_are_within_the_bounds_of_the_project():
    pinned = {}
    for constraint in constraints():
        pinned.setdefault(constraint.name, []).append(constraint.specifier)
    wanted = [*PROJECT["dependencies"], *(text for extra in PROJECT["optional-dependencies"].values() for text in extra)]
    for requirement in map(Requirement, wanted):
        name = re.sub(r"[-_.]+", "-", requirement.name).lower()
        if name != PROJECT["name"]:
            for clause in (clause for specifier in pinned[name] for clause in specifier if clause.operator in ("==", ">=")):
                assert requirement.specifier.contains(clause.version), (str(requirement), str(clause))
