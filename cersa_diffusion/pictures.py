"""Picture files in folders: which of them can be used, and how they are read as upright RGB."""

import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

from cersa_diffusion.errors import ConfigError

PICTURE_SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff"}
# One row of metadata per picture, in the format that `datasets` uses for image folders.
METADATA_FILE = "metadata.jsonl"
# A smaller picture contains nothing to learn: it is a tracking pixel or the icon of a folder view.
SMALLEST_SIDE = 8
# A longer picture, scaled to cover a square, would fill the memory and then be cropped almost completely.
LONGEST_RATIO = 20


def picture_paths(folder: str | Path, what: str) -> list[Path]:
    """The usable pictures of a folder, sorted by name; one warning names all other files and the reasons to skip them.

    A text file with the name of a picture (its caption) and `METADATA_FILE` are skipped without a warning.

    Args:
        folder: the folder; sub-folders are not searched.
        what: the name of the folder in messages, e.g. "instance_data_dir".

    Raises:
        ConfigError: the folder does not exist or contains no usable picture.
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
    """Gives one warning that begins with `opening` and lists all (name, reason) pairs; no warning if nothing was skipped."""
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
    """Reads a whole picture and returns why it cannot be used, or None if it can; `source` is a path or an open binary file."""
    try:
        with warnings.catch_warnings():
            # Pillow warns above its limit and raises above twice its limit; neither picture is usable for training.
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
    """The first frame of a picture as 8-bit RGB, turned upright, with transparent areas on white.

    Raises:
        ValueError: the picture has 32-bit pixels, whose value for white is unknown.
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
    # Pillow's own conversion clips values at 255 instead of scaling them.
    levels = np.asarray(picture).astype(np.float32) / 257
    return Image.fromarray(levels.round().astype(np.uint8))


def picture_size(source: Path | BinaryIO) -> tuple[int, int]:
    """Height and width in pixels of what `load_picture` returns, read only from the header of the file."""
    with Image.open(source) as picture:
        width, height = picture.size
        # For TIFF files, Pillow itself applies the orientation to the size.
        sideways = picture.format != "TIFF" and picture.getexif().get(ExifTags.Base.Orientation, 1) >= 5
        return (width, height) if sideways else (height, width)
