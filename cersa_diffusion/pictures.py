"""Picture files as they lie about in folders: which of them can be used, and what they look like as upright RGB."""

import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

from cersa_diffusion.errors import ConfigError

PICTURE_SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff"}
# One row of metadata per picture, as `datasets` reads it for image folders.
METADATA_FILE = "metadata.jsonl"
# Below this a picture has nothing to learn: it is a tracking pixel or an icon of a folder view.
SMALLEST_SIDE = 8
# Beyond this a picture that is scaled to cover a square would be mostly cut away, after filling the memory.
LONGEST_RATIO = 20


def picture_paths(folder: str | Path, what: str) -> list[Path]:
    """The usable pictures of a folder, sorted by name; everything else is skipped with one warning that says why.

    A text file of a picture's name (its caption) and `METADATA_FILE` belong to the pictures and are passed over in silence.

    Args:
        folder: the folder; sub-folders are not entered.
        what: how messages call it, e.g. "instance_data_dir".

    Raises:
        ConfigError: no such folder, or no usable picture in it.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ConfigError(f"{what}: {folder} is not a folder")
    entries = sorted(folder.iterdir())
    captioned = {path.stem for path in entries if path.suffix.lower() in PICTURE_SUFFIXES}
    paths, skipped = [], []
    for path in entries:
        if path.name == METADATA_FILE or (path.suffix.lower() == ".txt" and path.stem in captioned):
            continue
        fault = _fault_of_file(path)
        if fault is None:
            paths.append(path)
        else:
            skipped.append((path.name, fault))
    warn_of_skipped(skipped, f"{what}: skipped in {folder}")
    if not paths:
        raise ConfigError(f"{what}: no pictures in {folder}, expected some of {', '.join(sorted(PICTURE_SUFFIXES))}")
    return paths


def warn_of_skipped(skipped: Iterable[tuple[str, str]], opening: str) -> None:
    """One warning that names everything skipped with its reason; none if nothing was.

    Args:
        skipped: (name, reason) pairs.
        opening: what the warning begins with.
    """
    listed = ", ".join(f"{name} ({reason})" for name, reason in skipped)
    if listed:
        warnings.warn(f"{opening}: {listed}", stacklevel=3)


def _fault_of_file(path: Path) -> str | None:
    if path.is_dir():
        return "a folder"
    if path.suffix.lower() not in PICTURE_SUFFIXES:
        return "not a picture"
    return picture_fault(path)


def picture_fault(source: Path | BinaryIO) -> str | None:
    """Why a picture cannot be used, found by reading all of it; None if it can.

    Args:
        source: a path, or an open binary file.
    """
    try:
        with warnings.catch_warnings():
            # From its first limit on Pillow warns, from twice that on it refuses: training on either is a mistake.
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            width, height = load_picture(source).size
    except UnidentifiedImageError:
        return "not a picture"
    except (Image.DecompressionBombWarning, Image.DecompressionBombError):
        return f"more than {Image.MAX_IMAGE_PIXELS / 1e6:.0f} million pixels, make it smaller"
    except Exception as error:  # damaged files make Pillow's decoders raise nearly anything
        return f"cannot be read: {error}" if str(error) else f"cannot be read: {type(error).__name__}"
    if min(width, height) < SMALLEST_SIDE:
        return f"{width}x{height} pixels, expected at least {SMALLEST_SIDE} a side"
    if max(width, height) > LONGEST_RATIO * min(width, height):
        return f"{width}x{height} pixels, expected at most {LONGEST_RATIO} to 1: crop it"
    return None


def load_picture(source: Path | BinaryIO) -> Image.Image:
    """A picture as RGB of 8 bit: the first frame, turned upright, transparency put on white.

    Args:
        source: a path, or an open binary file.

    Raises:
        ValueError: 32-bit pixels, which do not say what is white.
    """
    with Image.open(source) as picture:
        picture = _eight_bit(ImageOps.exif_transpose(picture))
        if picture.has_transparency_data:
            picture = picture.convert("RGBA")
            picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture)
        return picture.convert("RGB")


def _eight_bit(picture: Image.Image) -> Image.Image:
    if picture.mode in ("I", "F"):
        raise ValueError("32-bit pixels, save it with 8 or 16")
    if not picture.mode.startswith("I;16"):
        return picture
    # Pillow's own conversion cuts values off at 255 instead of scaling them.
    levels = np.asarray(picture).astype(np.float32) / 257
    return Image.fromarray(levels.round().astype(np.uint8))


def picture_size(source: Path | BinaryIO) -> tuple[int, int]:
    """Height and width in pixels as `load_picture` gives them, from the file's header alone."""
    with Image.open(source) as picture:
        width, height = picture.size
        # Pillow turns TIFF files itself, and says so in their size.
        sideways = picture.format != "TIFF" and picture.getexif().get(ExifTags.Base.Orientation, 1) >= 5
        return (width, height) if sideways else (height, width)
