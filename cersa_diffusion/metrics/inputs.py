"""Reads the input of the scores: folders of pictures, and files with prompts (JSON, JSONL, CSV, TXT)."""

import csv
import io
import json
from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from cersa_diffusion.errors import ConfigError
from cersa_diffusion.pictures import PICTURE_SUFFIXES, load_picture, picture_fault

FILE_COLUMN, PROMPT_COLUMNS = "file_name", ("prompt", "text")


def read_pictures(folder: str | Path, what: str) -> dict[str, Image.Image]:
    """File name -> RGB picture for all pictures of a folder, sorted by name. Other files are ignored; damaged pictures are not.

    Args:
        folder: the folder; pictures in its subfolders are not read.
        what: name of the folder in error messages, such as "--images".

    Raises:
        ConfigError: there is no such folder, it holds no picture, or a picture cannot be read.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ConfigError(f"{what}: {folder} is not a folder")
    paths = sorted(path for path in folder.iterdir() if path.suffix.lower() in PICTURE_SUFFIXES and path.is_file())
    if not paths:
        raise ConfigError(f"{what}: no pictures in {folder}, expected some of {', '.join(sorted(PICTURE_SUFFIXES))}")
    unusable = [f"{path.name} ({fault})" for path in paths if (fault := picture_fault(path))]
    if unusable:
        raise ConfigError(
            f"{what}: cannot use {_first_names(unusable)} in {folder}: replace or remove these files, because a score without "
            "them would not be the score of the folder"
        )
    return {path.name: load_picture(path) for path in paths}


def read_prompt_list(path: str | Path, what: str) -> list[str]:
    """A list of prompts.

    Args:
        path: TXT with one prompt per line, a JSON list, JSONL or CSV; entries are strings or have a column `prompt` or `text`.
        what: name of the file in error messages, such as "--prompts".

    Raises:
        ConfigError: the file cannot be read, holds no prompt, or holds an empty prompt.
    """
    entries = _entries(Path(path), what)
    if isinstance(entries, dict):
        raise ConfigError(f"{what}: {path} maps file names to prompts, expected a list of prompts")
    prompts = [_prompt_of(entry, number, path, what) for number, entry in enumerate(entries, start=1)]
    if not prompts:
        raise ConfigError(f"{what}: {path} holds no prompts")
    return prompts


def read_picture_prompts(path: str | Path, names: Sequence[str], what: str) -> list[str]:
    """One prompt for each picture.

    Args:
        path: JSON object of file name -> prompt; JSONL, CSV or a JSON list with `file_name` and `prompt` (or `text`) in each
            entry; or TXT with one prompt per line in the order of the sorted file names.
        names: file names of the pictures, sorted.
        what: name of the file in error messages, such as "--prompts".

    Raises:
        ConfigError: the file cannot be read, a picture has no prompt or several, or a prompt is empty or has no picture.
    """
    entries = _entries(Path(path), what)
    if isinstance(entries, dict):
        pairs = [(name, _prompt_of(prompt, name, path, what)) for name, prompt in entries.items()]
    elif all(isinstance(entry, str) for entry in entries):
        if len(entries) != len(names):
            raise ConfigError(f"{what}: {path} holds {len(entries)} prompts for {len(names)} pictures: expected one for each")
        pairs = list(zip(names, entries, strict=True))
    else:
        pairs = [(_file_of(entry, i, path, what), _prompt_of(entry, i, path, what)) for i, entry in enumerate(entries, start=1)]
    prompts = dict(pairs)
    if len(prompts) != len(pairs):
        repeated = sorted({name for name, _ in pairs if sum(name == other for other, _ in pairs) > 1})
        raise ConfigError(f"{what}: {path} has more than one prompt for {_first_names(repeated)}")
    missing, unknown = [name for name in names if name not in prompts], [name for name in prompts if name not in set(names)]
    if missing:
        raise ConfigError(f"{what}: {path} has no prompt for {_first_names(missing)}")
    if unknown:
        raise ConfigError(f"{what}: {path} has prompts for {_first_names(unknown)}, which are not in the folder")
    return [prompts[name] for name in names]


def _entries(path: Path, what: str) -> list | dict:
    """The content of the file: strings, rows (dicts), or one mapping of file name -> prompt."""
    try:
        text = path.read_text(encoding="utf-8-sig")
        lines = [line for line in text.splitlines() if line.strip()]
        suffix = path.suffix.lower()
        if suffix == ".txt":
            return [line.strip() for line in lines]
        if suffix == ".jsonl":
            return [json.loads(line) for line in lines]
        if suffix == ".csv":
            return list(csv.DictReader(io.StringIO(text, newline="")))
        entries = json.loads(text) if suffix == ".json" else None
    except (OSError, ValueError, csv.Error) as error:
        raise ConfigError(f"{what}: {path} cannot be read ({error})") from error
    if not isinstance(entries, list | dict):
        content = f"holds a JSON {type(entries).__name__}" if suffix == ".json" else f"has the suffix {suffix or '(none)'}"
        raise ConfigError(f"{what}: {path} {content}, expected a JSON object or list, or a .jsonl, .csv or .txt file")
    return entries


def _prompt_of(entry: object, position: int | str, path: str | Path, what: str) -> str:
    if isinstance(entry, dict):
        entry = next((entry[column] for column in PROMPT_COLUMNS if column in entry), None)
    if not isinstance(entry, str) or not entry.strip():
        raise ConfigError(f"{what}: {path} has no prompt in entry {position}: expected words, in {' or '.join(PROMPT_COLUMNS)}")
    return entry.strip()


def _file_of(entry: object, position: int, path: str | Path, what: str) -> str:
    name = entry.get(FILE_COLUMN) if isinstance(entry, dict) else None
    if not isinstance(name, str) or not name:
        raise ConfigError(f"{what}: {path} names no picture in entry {position}: expected its file name in {FILE_COLUMN}")
    return name


def _first_names(names: Sequence[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
