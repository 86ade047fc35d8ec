"""What folders hold: every usable picture upright and RGB, all else skipped with one warning that says why."""

import re
import struct
import warnings
import zlib

import numpy as np
import pytest
from PIL import ExifTags, Image

from cersa_diffusion import ConfigError
from cersa_diffusion.pictures import load_picture, picture_paths, picture_size

from ..conftest import raises, warns

PIXELS = np.random.default_rng(0).integers(0, 256, (20, 31, 3), dtype=np.uint8)
RAMP = np.linspace(0, 65535, 20 * 31).reshape(20, 31).astype(np.uint16)


def png_that_claims(width: int, height: int) -> bytes:
    """A PNG of a few bytes whose header announces a picture of any size."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(100))) + chunk(b"IEND", b"")


@pytest.fixture
def folder(tmp_path):
    Image.fromarray(PIXELS).save(tmp_path / "good.png")
    return tmp_path


def skipped(folder) -> str:
    """The one warning about a folder in which only good.png can be used."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        paths = picture_paths(folder, "instance_data_dir")
    assert [path.name for path in paths] == ["good.png"]
    (warning,) = caught
    assert warning.filename == __file__
    return str(warning.message)


def test_one_warning_names_every_file_with_its_reason(folder):
    (folder / "notes.txt").write_text("x")
    (folder / ".ipynb_checkpoints").mkdir()
    (folder / "more").mkdir()
    Image.fromarray(PIXELS).save(folder / "more" / "inside.png")
    (folder / "page.png").write_text("<html>")
    (folder / "empty.jpg").touch()
    Image.new("RGB", (1, 1)).save(folder / "pixel.png")
    Image.new("RGB", (300, 7)).save(folder / "strip.png")
    Image.new("1", (8, 3000)).save(folder / "thread.png")
    message = skipped(folder)
    assert message.startswith(f"instance_data_dir: skipped in {folder}: ")
    assert message.endswith(
        ": .ipynb_checkpoints (a folder), empty.jpg (not a picture), more (a folder), notes.txt (not a picture), "
        "page.png (not a picture), pixel.png (1x1 pixels, expected at least 8 a side), "
        "strip.png (300x7 pixels, expected at least 8 a side), thread.png (8x3000 pixels, expected at most 20 to 1: crop it)"
    )


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "tif", "gif", "bmp"])
def test_truncated_pictures_are_skipped(folder, suffix):
    path = folder / f"cut.{suffix}"
    Image.fromarray(PIXELS.repeat(8, axis=0).repeat(8, axis=1)).save(path)
    content = path.read_bytes()
    path.write_bytes(content[: len(content) * 2 // 3])
    assert re.search(rf"cut\.{suffix} \((cannot be read: .+|not a picture)\)$", skipped(folder))


@pytest.mark.parametrize("side", [10_000, 20_000])
def test_decompression_bombs_are_skipped(folder, side):
    """10,000 is where Pillow warns, 20,000 where it refuses."""
    (folder / "bomb.png").write_bytes(png_that_claims(side, side))
    assert "bomb.png (more than 89 million pixels, make it smaller)" in skipped(folder)


def test_pixels_of_32_bit_are_skipped(folder):
    Image.fromarray(RAMP.astype(np.float32)).save(folder / "depth.tif")
    assert "depth.tif (cannot be read: 32-bit pixels, save it with 8 or 16)" in skipped(folder)


def test_captions_beside_pictures_are_no_reason_to_warn(folder):
    (folder / "good.txt").write_text("a cat")
    (folder / "metadata.jsonl").write_text("")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        picture_paths(folder, "instance_data_dir")
    (folder / "other.txt").write_text("a cat")
    assert skipped(folder).endswith(": other.txt (not a picture)")


def test_pictures_are_sorted_by_name(folder):
    for name in ("b.PNG", "a.jpeg", "c.png"):
        Image.fromarray(PIXELS).save(folder / name)
    assert [path.name for path in picture_paths(str(folder), "x")] == ["a.jpeg", "b.PNG", "c.png", "good.png"]


def test_empty_and_missing_folders(tmp_path):
    with raises(ConfigError, "instance_data_dir", ".png"):
        picture_paths(tmp_path, "instance_data_dir")
    with raises(ConfigError, "nowhere"):
        picture_paths(tmp_path / "nowhere", "instance_data_dir")
    (tmp_path / "only.png").write_text("x")
    with warns(UserWarning, "only.png"), raises(ConfigError, "instance_data_dir"):
        picture_paths(tmp_path, "instance_data_dir")


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "tif"])
@pytest.mark.parametrize(("orientation", "turns"), [(1, 0), (3, 2), (6, 3), (8, 1)])
def test_pictures_are_turned_upright(tmp_path, suffix, orientation, turns):
    """`turns` quarter turns against the clock undo the orientation."""
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    path = tmp_path / f"a.{suffix}"
    smooth = np.linspace(0, 255, 20 * 32).reshape(20, 32).astype(np.uint8)
    Image.fromarray(smooth).convert("RGB").save(path, exif=exif)
    expected = np.rot90(smooth, turns).astype(float)
    found = load_picture(path)
    assert found.mode == "RGB" and (found.height, found.width) == expected.shape == picture_size(path)
    assert np.abs(np.asarray(found)[..., 0] - expected).max() < 12


@pytest.mark.parametrize("suffix", ["png", "tif"])
@pytest.mark.parametrize("order", ["<u2", ">u2"])
def test_16_bit_is_scaled_to_8(tmp_path, suffix, order):
    Image.fromarray(RAMP.astype(order)).save(tmp_path / f"a.{suffix}")
    found = np.asarray(load_picture(tmp_path / f"a.{suffix}"))
    assert found.shape == (20, 31, 3) and np.abs(found - RAMP[..., None] / 257).max() <= 0.5


def test_transparency_goes_on_white(tmp_path):
    red_and_nothing = np.zeros((8, 8, 4), dtype=np.uint8)
    red_and_nothing[:4] = (255, 0, 0, 255)
    picture = Image.fromarray(red_and_nothing)
    picture.save(tmp_path / "rgba.png")
    picture.quantize(4).save(tmp_path / "palette.png")
    picture.convert("LA").save(tmp_path / "grey.png")
    picture.save(tmp_path / "palette.gif")
    colour_key = Image.new("RGB", (8, 8), (255, 0, 0))
    colour_key.paste((0, 0, 9), (0, 4, 8, 8))
    colour_key.save(tmp_path / "key.png", transparency=(0, 0, 9))
    for name in ("rgba.png", "palette.png", "key.png", "palette.gif"):
        found = load_picture(tmp_path / name)
        assert found.getpixel((0, 0)) == (255, 0, 0) and found.getpixel((0, 7)) == (255, 255, 255), name
    assert load_picture(tmp_path / "grey.png").getpixel((0, 7)) == (255, 255, 255)


def test_cmyk_palettes_and_grey_become_rgb(tmp_path):
    picture = Image.new("RGB", (16, 16), (200, 40, 90))
    picture.convert("CMYK").save(tmp_path / "cmyk.jpg", quality=100)
    picture.convert("CMYK").save(tmp_path / "cmyk.tif")
    picture.quantize(2).save(tmp_path / "palette.png")
    for name in ("cmyk.jpg", "cmyk.tif", "palette.png"):
        found = load_picture(tmp_path / name)
        assert found.mode == "RGB" and np.abs(np.subtract(found.getpixel((5, 5)), (200, 40, 90))).max() <= 3, name
    picture.convert("L").save(tmp_path / "grey.png")
    picture.convert("1").save(tmp_path / "bits.png")
    assert load_picture(tmp_path / "grey.png").mode == load_picture(tmp_path / "bits.png").mode == "RGB"


@pytest.mark.parametrize("suffix", ["gif", "png", "webp"])
def test_the_first_frame_of_an_animation(tmp_path, suffix):
    frames = [Image.new("RGB", (16, 16), colour) for colour in ("red", "blue")]
    frames[0].save(tmp_path / f"a.{suffix}", save_all=True, append_images=frames[1:])
    red, _, blue = load_picture(tmp_path / f"a.{suffix}").getpixel((3, 3))
    assert red > 240 and blue < 15
