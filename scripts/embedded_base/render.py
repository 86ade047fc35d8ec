"""Renders the artwork: all pictures to small arrays once, single pictures at full size on demand."""

import io
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

from .fetch import package_folder, read_json
from .names import Emoji, all_emoji
from .settings import ARTWORKS, PICTURE_SIZE, Artwork, Folders

RENDER_SIZE = 256


@dataclass
class Pictures:
    """Pictures with their names.

    Args:
        rgba: Pictures with transparency, `[count, size, size, 4]`, uint8, colours multiplied by their alpha.
        names: Name of each.
        styles: Look of each.
    """

    rgba: np.ndarray
    names: list[str]
    styles: list[str]

    def subset(self, indices: list[int]) -> "Pictures":
        """Some of the pictures.

        Args:
            indices: Which.
        """
        return Pictures(self.rgba[indices], [self.names[i] for i in indices], [self.styles[i] for i in indices])


def vector_source(folder: Path, emoji: Emoji) -> str | None:
    """SVG text of an emoji in a vector set; None where the set lacks it.

    Args:
        folder: The unpacked package of the set.
        emoji: Which.
    """
    icon_name = read_json(folder / "chars.json").get(emoji.code)
    if icon_name is None:
        return None
    return icon_source(folder, icon_name)


def icon_source(folder: Path, icon_name: str) -> str:
    """SVG text of an icon.

    Args:
        folder: The unpacked package of the set.
        icon_name: Its name in the set.
    """
    icons = read_json(folder / "icons.json")
    icon = icons["icons"].get(icon_name) or icons["icons"][icons["aliases"][icon_name]["parent"]]
    width, height = icon.get("width", icons["width"]), icon.get("height", icons["height"])
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
        f'viewBox="{icon.get("left", 0)} {icon.get("top", 0)} {width} {height}">{icon["body"]}</svg>'
    )


def render_emoji(folders: Folders, artwork: Artwork, emoji: Emoji) -> Image.Image | None:
    """A picture at full size with transparency; None where the set lacks it.

    Args:
        folders: Where the build works.
        artwork: The set.
        emoji: Which.
    """
    folder = package_folder(folders, artwork.package, artwork.version)
    if artwork.style == "3d":
        candidates = [folder / "assets" / f"{code}.webp" for code in (emoji.full_code, emoji.code)]
        path = next((path for path in candidates if path.exists()), None)
        if path is None:
            return None
        content = path.read_bytes()
    else:
        source = vector_source(folder, emoji)
        if source is None:
            return None
        return render_vector(source)
    return Image.open(io.BytesIO(content)).convert("RGBA").resize((RENDER_SIZE, RENDER_SIZE))


def render_icon(folders: Folders, artwork: Artwork, icon_name: str) -> Image.Image:
    """A picture of a vector set at full size with transparency, by the icon's own name.

    Args:
        folders: Where the build works.
        artwork: The set.
        icon_name: Its name in the set.
    """
    return render_vector(icon_source(package_folder(folders, artwork.package, artwork.version), icon_name))


def render_vector(source: str) -> Image.Image:
    """A drawing at full size with transparency.

    Args:
        source: SVG text.
    """
    import resvg_py  # an extra that only this function needs

    content = bytes(resvg_py.svg_to_bytes(svg_string=source, width=RENDER_SIZE, height=RENDER_SIZE, skip_system_fonts=True))
    return Image.open(io.BytesIO(content)).convert("RGBA").resize((RENDER_SIZE, RENDER_SIZE))


def premultiplied(picture: Image.Image, size: int) -> np.ndarray:
    """Shrink a picture by averaging whole boxes of pixels; colours come out multiplied by alpha.

    Args:
        picture: Picture with transparency; its size is a multiple of the wanted one.
        size: Wanted width and height.
    """
    pixels = np.array(picture, dtype=np.float32)
    pixels[..., :3] *= pixels[..., 3:] / 255
    factor = pixels.shape[0] // size
    boxes = pixels.reshape(size, factor, size, factor, 4).mean((1, 3))
    return np.round(boxes).astype(np.uint8)


def composite(rgba: np.ndarray, colour: tuple[int, int, int]) -> np.ndarray:
    """Put pictures on a plain background.

    Args:
        rgba: Premultiplied pictures, `[..., 4]`, uint8.
        colour: Background.
    """
    alpha = rgba[..., 3:].astype(np.float32) / 255
    mixed = rgba[..., :3] + (1 - alpha) * np.asarray(colour, dtype=np.float32)
    return np.round(mixed).clip(0, 255).astype(np.uint8)


def _small_picture(emoji: Emoji, folders: Folders, artwork: Artwork) -> np.ndarray | None:
    picture = render_emoji(folders, artwork, emoji)
    return None if picture is None else premultiplied(picture, PICTURE_SIZE)


def render_all(folders: Folders) -> None:
    """Render every emoji of every set into one file, unless it is there.

    Args:
        folders: Where the build works.
    """
    if folders.pictures.exists():
        return
    emoji = all_emoji(folders)
    arrays, names, styles = [], [], []
    with ProcessPoolExecutor() as pool:
        for artwork in ARTWORKS:
            work = pool.map(partial(_small_picture, folders=folders, artwork=artwork), emoji, chunksize=32)
            for item, array in zip(emoji, tqdm(work, desc=f"rendering {artwork.style}", total=len(emoji)), strict=True):
                if array is not None:
                    arrays.append(array)
                    names.append(item.name)
                    styles.append(artwork.style)
    temporary = folders.pictures.with_suffix(".partial.npz")
    np.savez(temporary, rgba=np.stack(arrays), names=np.array(names), styles=np.array(styles))
    temporary.replace(folders.pictures)


def load_pictures(folders: Folders) -> Pictures:
    """All rendered pictures.

    Args:
        folders: Where the build works.
    """
    if not folders.pictures.exists():
        raise SystemExit(f"{folders.pictures} is missing: run the stages fetch and render first.")
    data = np.load(folders.pictures)
    return Pictures(data["rgba"], data["names"].tolist(), data["styles"].tolist())
