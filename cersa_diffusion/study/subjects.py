"""A subject of a comparison: pictures to learn, and two disjoint parts of prompts and held-back pictures for the scores."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from cersa_diffusion.errors import ConfigError
from cersa_diffusion.pictures import picture_fault, picture_paths

SUBJECT_FILE = "subject.json"
# The parts of the prompts: validation chooses the learning rates, test gives the table.
VALIDATION, TEST = "validation", "test"


@dataclass(frozen=True)
class PromptSet:
    """Prompts of the subject that are scored together.

    Args:
        prompts: all different.
        held_back: prompt -> the picture that it describes, for some of the prompts; no training sees these pictures.
    """

    prompts: tuple[str, ...]
    held_back: Mapping[str, Path] = field(default_factory=dict)


@dataclass(frozen=True)
class Subject:
    """A subject.

    Args:
        name: name in tables and folders.
        instance_data_dir: folder of the pictures to learn.
        instance_prompt: prompt of these pictures in the training.
        class_prompt: prompt of the class pictures for prior preservation.
        parts: "validation" and "test" -> their prompts.
        drift_prompts: prompts without the subject; may be empty.
        digest: a hash of everything above, including the pictures.
    """

    name: str
    instance_data_dir: Path
    instance_prompt: str
    class_prompt: str
    parts: Mapping[str, PromptSet]
    drift_prompts: tuple[str, ...]
    digest: str

    def references(self, part: str) -> list[Path]:
        """Pictures that show the subject: those held back for this part, or else the pictures to learn."""
        return list(self.parts[part].held_back.values()) or picture_paths(self.instance_data_dir, self.name)


def read_subject(folder: Path) -> Subject:
    """Reads the subject.json of a folder.

    Args:
        folder: a folder with the pictures to learn in `instance/`, and a subject.json with `instance_prompt`, `class_prompt`,
            `evaluation_prompts`, and optionally `held_back` (a list of `prompt` and `file`), `drift_prompts` and `name`.

    Raises:
        ConfigError: one of these is missing or cannot be read.
    """
    path = folder / SUBJECT_FILE
    try:
        entries = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"subject {folder}: {SUBJECT_FILE} cannot be read ({error})") from error
    if not isinstance(entries, dict):
        raise ConfigError(f"subject {folder}: {SUBJECT_FILE} holds a {type(entries).__name__}, expected an object")
    for name in ("instance_prompt", "class_prompt"):
        if not isinstance(entries.get(name), str) or not entries[name].strip():
            raise ConfigError(f"subject {folder}: {SUBJECT_FILE} has no {name}, expected a prompt")
    pictures = picture_paths(folder / "instance", f"subject {folder}")
    held_back = _held_back(entries.get("held_back", []), folder)
    evaluation, drift = (_prompts(entries.get(name, []), name, folder) for name in ("evaluation_prompts", "drift_prompts"))
    return Subject(
        name=entries.get("name", folder.name),
        instance_data_dir=folder / "instance",
        instance_prompt=entries["instance_prompt"],
        class_prompt=entries["class_prompt"],
        parts=_split(evaluation, held_back, folder),
        drift_prompts=tuple(drift),
        digest=_digest([path, *pictures, *held_back.values()]),
    )


def _split(evaluation: list[str], held_back: dict[str, Path], folder: Path) -> dict[str, PromptSet]:
    """Validation gets the first half of the held-back pictures, or, if there are fewer than two, a third of the prompts."""
    if len(held_back) > 1:
        validation = list(held_back)[: len(held_back) // 2]
    else:
        validation = [prompt for prompt in evaluation if prompt not in held_back][: (len(evaluation) + 2) // 3]
    test = [prompt for prompt in dict.fromkeys([*evaluation, *held_back]) if prompt not in validation]
    if not validation or not test:
        raise ConfigError(
            f"subject {folder}: {len(evaluation)} evaluation_prompts and {len(held_back)} held_back pictures do not make two "
            "parts, validation and test: expected at least two different prompts"
        )
    return {
        part: PromptSet(tuple(prompts), {prompt: held_back[prompt] for prompt in prompts if prompt in held_back})
        for part, prompts in ((VALIDATION, validation), (TEST, test))
    }


def _prompts(entries: object, name: str, folder: Path) -> list[str]:
    if not isinstance(entries, list) or not all(isinstance(entry, str) and entry.strip() for entry in entries):
        raise ConfigError(f"subject {folder}: {name} is {entries!r}, expected a list of prompts")
    return list(dict.fromkeys(entries))


def _held_back(entries: object, folder: Path) -> dict[str, Path]:
    if not isinstance(entries, list) or not all(isinstance(e, dict) and {"prompt", "file"} <= set(e) for e in entries):
        raise ConfigError(f"subject {folder}: held_back has to be a list of objects with prompt and file")
    held_back = {entry["prompt"]: folder / entry["file"] for entry in entries}
    if len(held_back) != len(entries):
        raise ConfigError(f"subject {folder}: two held_back pictures have the same prompt, expected different ones")
    for path in held_back.values():
        fault = picture_fault(path)
        if fault:
            raise ConfigError(f"subject {folder}: held_back picture {path.name} cannot be used ({fault})")
    return held_back


def _digest(paths: list[Path]) -> str:
    digest = hashlib.sha256()
    for path in paths:
        digest.update(hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()
