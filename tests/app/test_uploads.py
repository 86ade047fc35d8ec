"""What visitors upload: nothing is decoded that should not be, and their names are never paths."""

import io
import os
import zlib
from dataclasses import replace

import pytest
from PIL import Image

from cersa_diffusion.errors import AdapterFormatError, ConfigError
from gradio_app.settings import Limits
from gradio_app.uploads import check_share, keep, read_upload, save_pictures

from ..conftest import raises

LIMITS = Limits()


def picture(path, size=(32, 24), **arguments):
    Image.new("RGB", size, (200, 30, 40)).save(path, **arguments)
    return str(path)


def png_chunk(kind: bytes, data: bytes) -> bytes:
    return len(data).to_bytes(4, "big") + kind + data + zlib.crc32(kind + data).to_bytes(4, "big")


def bomb(path, side: int) -> str:
    """A small PNG file that would be side x side pixels."""
    header = side.to_bytes(4, "big") * 2 + bytes([1, 0, 0, 0, 0])
    data = zlib.compress(bytes((side // 8 + 1) * 64))
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + png_chunk(b"IHDR", header) + png_chunk(b"IDAT", data) + png_chunk(b"IEND", b""))
    return str(path)


@pytest.fixture
def three(tmp_path):
    folder = tmp_path / "uploaded"
    folder.mkdir()
    return [picture(folder / f"{number}.{suffix}") for number, suffix in enumerate(("png", "jpg", "webp"))]


def test_pictures_are_written_anew_under_other_names(three, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # stored lying, shown upright
    exif[0x8825] = {1: "N"}
    three[1] = picture(tmp_path / "uploaded" / "..%2fhome; rm -rf.jpg", size=(40, 20), exif=exif)
    written = save_pictures(three, tmp_path / "kept", LIMITS)
    assert [path.name for path in written] == ["00.png", "01.png", "02.png"]
    with Image.open(written[1]) as second:
        assert second.size == (20, 40) and not second.getexif() and second.format == "PNG"


def test_number_size_and_pixels_are_limited(three, tmp_path):
    for paths, limits, named in (
        (three[:2], LIMITS, ("2 pictures", "3", "20")),
        (three * 7, LIMITS, ("21 pictures", "3", "20")),
        (three, replace(LIMITS, picture_bytes=10), ("picture 1", "0.png", "MiB")),
        (three, replace(LIMITS, picture_pixels=32 * 24 - 1), ("picture 1", "0.png", "million pixels")),
    ):
        with raises(ConfigError, *named):
            save_pictures(paths, tmp_path / "kept", limits)
    assert not (tmp_path / "kept").exists()


@pytest.mark.parametrize("side", [6_000, 12_000, 60_000])
def test_a_decompression_bomb_is_refused_by_its_header(three, tmp_path, side, monkeypatch):
    def decode(self):
        raise AssertionError("it was decoded")

    path = bomb(tmp_path / "bomb.png", side)
    monkeypatch.setattr(Image.Image, "load", decode)
    with raises(ConfigError, "picture 1", "bomb.png", "24 million pixels"):
        save_pictures([path, *three[:2]], tmp_path / "kept", LIMITS)


def test_other_formats_are_refused_whatever_their_name(three, tmp_path):
    svg = tmp_path / "a.png"
    svg.write_text('<svg xmlns="http://www.w3.org/2000/svg"><image href="file:///etc/passwd"/></svg>')
    bmp = io.BytesIO()
    Image.new("RGB", (32, 32)).save(bmp, "BMP")
    other = tmp_path / "b.png"
    other.write_bytes(bmp.getvalue())
    truncated = tmp_path / "c.png"
    truncated.write_bytes(open(three[0], "rb").read()[:60])
    for path in (svg, other, truncated):
        with raises(ConfigError, "picture 1", path.name):
            save_pictures([str(path), *three[:2]], tmp_path / "kept", LIMITS)


def test_an_adapter_is_a_safetensors_file_or_refused(tmp_path, runs_dir):
    whole = (runs_dir / "cat-cersa" / "pytorch_cersa_weights.safetensors").read_bytes()
    good = tmp_path / "my adapter.safetensors"
    good.write_bytes(whole)
    assert read_upload(str(good), LIMITS).layers
    with raises(ConfigError, "my adapter.safetensors", "0 MiB"):
        read_upload(str(good), replace(LIMITS, adapter_bytes=100))
    kept = keep(str(good), tmp_path / "private")
    assert kept.read_bytes() == whole and kept.name != good.name and kept.parent == tmp_path / "private"
    assert not good.exists()
    for name, content, named in (
        ("a.bin", whole, ".safetensors"),
        ("a.safetensors", whole[:-7], "checksum"),
        ("a.safetensors", b"\x80\x04pickle", "pickle"),
        ("a.safetensors", whole[:-9] + bytes([whole[-9] ^ 1]) + whole[-8:], "checksum"),
    ):
        damaged = tmp_path / name
        damaged.write_bytes(content)
        with raises((AdapterFormatError, ConfigError), name, named) as raised:
            read_upload(str(damaged), LIMITS)
        assert str(tmp_path) not in str(raised.value) and os.sep not in str(raised.value).split(":")[0]


def test_pictures_need_room_on_the_disk(three, tmp_path):
    with raises(ConfigError, "disk", "MiB", str(2**40)):
        save_pictures(three, tmp_path / "kept", replace(LIMITS, free_bytes=2**60))
    assert not (tmp_path / "kept").exists()


def test_one_visitor_keeps_so_many_bytes_of_adapters(tmp_path):
    files = [tmp_path / f"{name}.safetensors" for name in "abc"]
    for file in files:
        file.write_bytes(b"x" * 2**20)
    limits = replace(LIMITS, visitor_bytes=2 * 2**20)
    check_share(str(files[0]), files[1:2], limits)
    with raises(ConfigError, "a.safetensors", "3 MiB", "2"):
        check_share(str(files[0]), files[1:], limits)
