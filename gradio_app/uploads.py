"""Files from visitors: checked before they are decoded, and kept under names that the page chooses."""

import secrets
import warnings
from collections.abc import Sequence
from pathlib import Path

from PIL import Image, UnidentifiedImageError

from cersa_diffusion.adapters.file import AdapterFile, read_adapter_file
from cersa_diffusion.errors import AdapterFormatError, ConfigError
from cersa_diffusion.pictures import load_picture, picture_fault
from gradio_app.private_folder import check_free
from gradio_app.settings import Limits

# Only common formats, because faults of image libraries are mostly in the decoders of rare formats.
FORMATS = ("PNG", "JPEG", "WEBP")
SUFFIXES = [".png", ".jpg", ".jpeg", ".webp"]


def save_pictures(paths: Sequence[str], folder: Path, limits: Limits) -> list[Path]:
    """Writes copies of uploaded pictures as 00.png, 01.png, ...: upright, 8 bit, without metadata.

    Args:
        paths: paths of the uploads.
        folder: folder to create; it is not created if a picture is refused.
        limits: limits of number, bytes and pixels.

    Returns:
        The files.

    Raises:
        ConfigError: there are too few or too many pictures, a file is too large or not a picture (the message gives its number),
            or there is no space on the disk.
    """
    if not limits.fewest_pictures <= len(paths) <= limits.most_pictures:
        raise ConfigError(f"{len(paths)} pictures: expected {limits.fewest_pictures} to {limits.most_pictures}")
    for number, path in enumerate(paths, start=1):
        _check_picture(Path(path), f"picture {number} ({shown_name(path)})", limits)
    check_free(folder, 0, limits)
    folder.mkdir(parents=True)
    written = []
    for number, path in enumerate(paths):
        written.append(folder / f"{number:02d}.png")
        load_picture(Path(path)).save(written[-1])
    return written


def _check_picture(path: Path, name: str, limits: Limits) -> None:
    size = path.stat().st_size
    if size > limits.picture_bytes:
        raise ConfigError(f"{name} has {size / 2**20:.0f} MiB, expected at most {limits.picture_bytes / 2**20:.0f}")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            # This reads only the header.
            with Image.open(path, formats=FORMATS) as picture:
                width, height = picture.size
    except (UnidentifiedImageError, OSError, ValueError, SyntaxError) as error:
        raise ConfigError(f"{name} is not a PNG, JPEG or WebP picture") from error
    except Image.DecompressionBombError:
        width = height = Image.MAX_IMAGE_PIXELS
    if width * height > limits.picture_pixels:
        raise ConfigError(
            f"{name} has more than {limits.picture_pixels / 1e6:g} million pixels when it is decoded: make it smaller"
        )
    fault = picture_fault(path)
    if fault is not None:
        raise ConfigError(f"{name}: {fault}")


def read_upload(path: str, limits: Limits) -> AdapterFile:
    """Reads and checks an uploaded adapter.

    Args:
        path: path of the upload.
        limits: limit of its size.

    Raises:
        ConfigError: the file is not a .safetensors file, or it is too large.
        AdapterFormatError: the file is not an adapter, or it is damaged.
    """
    file = Path(path)
    if file.suffix.lower() != ".safetensors":
        raise ConfigError(f"{shown_name(path)}: expected a .safetensors file; other files are not opened")
    size = file.stat().st_size
    if size > limits.adapter_bytes:
        raise ConfigError(f"{shown_name(path)} has {size / 2**20:.0f} MiB, expected at most {limits.adapter_bytes / 2**20:.0f}")
    try:
        return read_adapter_file(file)
    except AdapterFormatError as error:
        # The visitor knows the name of the file, and not its path on the server.
        raise AdapterFormatError(str(error).replace(path, shown_name(path))) from error


def check_share(path: str, held: Sequence[Path], limits: Limits) -> None:
    """Refuses an adapter if the adapters of its visitor become too large.

    Args:
        path: path of the upload.
        held: the adapters that this visitor already has.
        limits: its `visitor_bytes` is used.

    Raises:
        ConfigError: the adapters are too large; the message gives their size.
    """
    size = sum(file.stat().st_size for file in (Path(path), *held))
    if size > limits.visitor_bytes:
        raise ConfigError(
            f"with {shown_name(path)} your adapters have {size / 2**20:.0f} MiB, expected at most "
            f"{limits.visitor_bytes / 2**20:.0f}: open the page again to start without them"
        )


def keep(path: str, folder: Path) -> Path:
    """Moves a checked upload to a new random name, and returns its path.

    Args:
        path: path of the upload.
        folder: a private folder on the same disk.
    """
    folder.mkdir(parents=True, exist_ok=True)
    new_path = folder / f"{secrets.token_hex(8)}.safetensors"
    Path(path).rename(new_path)
    return new_path


def shown_name(path: str) -> str:
    """The name of an upload in messages: the last part of its path, shortened."""
    return Path(path).name[:60]
