"""Names of the emoji: which there are, which a vocabulary holds, and what else they are called."""

import unicodedata
from dataclasses import dataclass
from pathlib import Path

from .fetch import package_folder, read_json
from .settings import HELD_BACK_NAMES, HELD_BACK_STYLES, KEYWORDS_PACKAGE, NAMES_PACKAGE, Folders

# The files that a vocabulary's names stand in; one that is not listed holds every name.
VOCABULARIES = {"small": ("small",), "medium": ("small", "medium")}


@dataclass(frozen=True)
class Emoji:
    """One emoji.

    Args:
        name: Its name in lower-case ASCII.
        code: Its code points in hexadecimal, joined by hyphens, without variation selectors.
        full_code: The same with variation selectors.
        group: The Unicode group it belongs to, e.g. "Food & Drink".
        keywords: Other words for it.
    """

    name: str
    code: str
    full_code: str
    group: str
    keywords: tuple[str, ...]


def plain(text: str) -> str:
    """Text in lower-case ASCII.

    Args:
        text: Any text.
    """
    text = text.replace("’", "'")
    return unicodedata.normalize("NFKD", text).encode("ascii", "ignore").decode().lower()


def all_emoji(folders: Folders) -> list[Emoji]:
    """Every emoji that may be learned: no flags, families, keycaps or mirrored variants.

    Args:
        folders: Where the build works.
    """
    names = read_json(package_folder(folders, *NAMES_PACKAGE) / "data-by-emoji.json")
    keywords = read_json(package_folder(folders, *KEYWORDS_PACKAGE) / "dist/emoji-en-US.json")
    result = []
    for character, entry in names.items():
        name = plain(entry["name"])
        if entry["group"] == "Flags" or name.startswith(("family", "keycap")) or "facing right" in name:
            continue
        code = "-".join(f"{ord(point):x}" for point in character if ord(point) != 0xFE0F)
        full_code = "-".join(f"{ord(point):x}" for point in character)
        words = [plain(word).replace("_", " ").strip() for word in keywords.get(character, [])]
        words = [word for word in words if word != name and word.replace(" ", "").isalpha()]
        result.append(Emoji(name, code, full_code, entry["group"], tuple(dict.fromkeys(words))))
    return result


def read_vocabulary(kind: str, emoji: list[Emoji]) -> list[str]:
    """Names that the base and CLIP learn.

    Args:
        kind: "small", "medium", or "full" for all.
        emoji: All emoji.
    """
    known = [item.name for item in emoji]
    if kind == "full":
        return known
    paths = [Path(__file__).parent / f"vocabulary_{part}.txt" for part in VOCABULARIES[kind]]
    lines = [line.split("#")[0].strip() for path in paths for line in path.read_text().splitlines()]
    names = [line for line in lines if line]
    unknown = sorted(set(names) - set(known))
    if unknown:
        raise SystemExit(f"the vocabulary {kind} holds names that no emoji has: {', '.join(unknown)}")
    return names


def is_held_back(name: str, style: str) -> bool:
    """Whether a picture is kept out of all training.

    Args:
        name: Name of the emoji.
        style: Look of the picture.
    """
    return style in HELD_BACK_STYLES and name in HELD_BACK_NAMES
