"""One picture from bytes to tensor."""

import io
import struct
import zlib
from collections.abc import Callable

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from bkn_core.data import pictures
from bkn_core.data.pictures import Fit, decode, is_grey, open_picture, recolor, resize
from bkn_core.errors import InputError

PIXELS = np.random.default_rng(0).integers(0, 256, (12, 10, 3), dtype=np.uint8)
WRITABLE = {"PNG": "RGB RGBA L LA P 1", "JPEG": "RGB L CMYK", "BMP": "RGB L P 1", "WEBP": "RGB RGBA", "PPM": "RGB L 1"}
WRITABLE |= {"TIFF": "RGB L P", "GIF": "L P", "AVIF": "RGB RGBA", "JPEG2000": "RGB L", "SGI": "RGB L", "QOI": "RGB"}
MODES = [(kind, mode) for kind, modes in WRITABLE.items() for mode in modes.split()]


def encode(picture: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, kind, **options)
    return buffer.getvalue()


def as_pixels(images: torch.Tensor) -> np.ndarray:
    return images.permute(1, 2, 0).squeeze(-1).numpy()


@pytest.mark.parametrize("color", ["RGB", "L"])
@pytest.mark.parametrize(("kind", "mode"), MODES)
def test_every_mode_and_format_decodes_as_pillow_converts_it(kind: str, mode: str, color: str) -> None:
    source = encode(Image.fromarray(PIXELS).convert(mode), kind)
    expected = np.asarray(Image.open(io.BytesIO(source)).convert(color))
    np.testing.assert_array_equal(as_pixels(decode(open_picture(source, "a"), color, "a")), expected)


def test_sixteen_bit_greys_are_scaled_not_clipped() -> None:
    greys = np.linspace(0, 65535, 120).astype(np.uint16).reshape(12, 10)
    picture = open_picture(encode(Image.fromarray(greys)), "a")
    assert is_grey(picture)
    np.testing.assert_array_equal(as_pixels(decode(picture, "L", "a")), greys // 256)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF", "AVIF"])
def test_a_picture_is_turned_as_its_camera_was_held(kind: str, orientation: int) -> None:
    exif = Image.Exif()
    exif[pictures.ORIENTATION] = orientation
    source = encode(Image.fromarray(PIXELS), kind, exif=exif)
    upright = ImageOps.exif_transpose(Image.open(io.BytesIO(source))).convert("RGB")
    np.testing.assert_array_equal(as_pixels(decode(open_picture(source, "a"), "RGB", "a")), upright)


@pytest.mark.filterwarnings("ignore:.*EXIF")
@pytest.mark.parametrize(
    "damage", [b"Exif\0\0", b"Exif\0\0junk", b"Exif\0\0MM\0*\0\0\xff\xff", b"Exif\0\0II*\0\x08\0\0\0\1"]
)
def test_damaged_metadata_leaves_a_picture_as_it_is(damage: bytes) -> None:
    source = encode(Image.fromarray(PIXELS), exif=damage)
    np.testing.assert_array_equal(as_pixels(decode(open_picture(source, "a"), "RGB", "a")), PIXELS)


def test_the_first_of_several_pictures_is_read() -> None:
    first, second = (Image.new("RGB", (4, 4), color) for color in ("red", "blue"))
    for kind in ("GIF", "TIFF"):
        source = encode(first, kind, save_all=True, append_images=[second])
        assert decode(open_picture(source, "a"), "RGB", "a")[:, 0, 0].tolist() == [255, 0, 0]


def test_transparent_palette_decodes_without_a_warning() -> None:
    palette = Image.fromarray(PIXELS).quantize(8)
    source = encode(palette, transparency=bytes(range(8)))
    np.testing.assert_array_equal(as_pixels(decode(open_picture(source, "a"), "RGB", "a")), palette.convert("RGB"))


@pytest.mark.parametrize(("mode", "grey"), [("L", True), ("LA", True), ("1", True), ("RGB", False), ("P", False)])
def test_grey_is_known_from_the_header(mode: str, grey: bool) -> None:
    assert is_grey(open_picture(encode(Image.fromarray(PIXELS).convert(mode)), "a")) is grey


@pytest.mark.parametrize("kind", pictures.FORMATS)
def test_truncated_picture_is_refused_by_name(kind: str) -> None:
    whole = encode(Image.fromarray(np.tile(PIXELS, (8, 8, 1))), kind)
    for length in (0, 1, 10, len(whole) // 3, len(whole) * 2 // 3):
        with pytest.raises(InputError, match=r"cat/7.x cannot be decoded"):
            decode(open_picture(whole[:length], "cat/7.x"), "RGB", "cat/7.x")


def chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def with_image_data(png: bytes, change: Callable[[bytes], bytes], *, interlaced: bool = False) -> bytes:
    """The same picture with the rows of its image data changed; a sound file in every other way."""
    start, packed, head = 8, b"", b""
    while start < len(png):
        (length,), kind = struct.unpack_from(">I", png, start), png[start + 4 : start + 8]
        content = png[start + 8 : start + 8 + length]
        packed += content if kind == b"IDAT" else b""
        if kind == b"IHDR" and interlaced:
            content = content[:-1] + b"\x01"
        head += chunk(kind, content) if kind not in (b"IDAT", b"IEND") else b""
        start += length + 12
    return png[:8] + head + chunk(b"IDAT", zlib.compress(change(zlib.decompress(packed)))) + chunk(b"IEND", b"")


@pytest.mark.parametrize("mode", [*WRITABLE["PNG"].split(), "I;16"])
def test_png_whose_image_data_ends_after_some_rows_is_refused(mode: str) -> None:
    greys = Image.fromarray(PIXELS[..., 0].astype(np.uint16) << 8)
    whole = encode(greys if mode == "I;16" else Image.fromarray(PIXELS).convert(mode))
    assert decode(open_picture(with_image_data(whole, lambda rows: rows), "a"), "RGB", "a").any()
    with pytest.raises(InputError, match=r"cat/7.png cannot be decoded: its image data ends before its last row"):
        decode(open_picture(with_image_data(whole, lambda rows: rows[: len(rows) // 12 * 10]), "b"), "RGB", "cat/7.png")


@pytest.mark.parametrize("mode", WRITABLE["PNG"].split())
def test_wholly_black_png_is_no_damaged_one(mode: str) -> None:
    assert not decode(open_picture(encode(Image.new(mode, (10, 12))), "a"), "RGB", "a").any()


def test_interlaced_png_lacks_its_last_pass() -> None:
    greys = PIXELS[..., 0]
    steps = ((0, 0, 8, 8), (0, 4, 8, 8), (4, 0, 8, 4), (0, 2, 4, 4), (2, 0, 4, 2), (0, 1, 2, 2), (1, 0, 2, 1))
    passes = [greys[top::down, left::across] for top, left, down, across in steps]
    rows = [b"".join(b"\0" + row.tobytes() for row in part) for part in passes]
    whole = encode(Image.fromarray(greys))
    sound = with_image_data(whole, lambda _: b"".join(rows), interlaced=True)
    np.testing.assert_array_equal(as_pixels(decode(open_picture(sound, "a"), "L", "a")), greys)
    cut = with_image_data(whole, lambda _: b"".join(rows[:-1]), interlaced=True)
    with pytest.raises(InputError, match=r"its image data ends before its last row"):
        decode(open_picture(cut, "a"), "L", "a")


def test_other_formats_are_not_even_tried() -> None:
    for kind in ("EPS", "TGA", "PCX", "PDF"):
        with pytest.raises(InputError, match="it is none of PNG, JPEG"):
            open_picture(encode(Image.fromarray(PIXELS), kind), "a.png")


@pytest.mark.parametrize("size", [(9000, 9000), (12_000, 12_000), (60_000, 60_000)])
def test_claimed_size_beyond_the_limit_is_refused_before_decoding(size: tuple[int, int]) -> None:
    header = f"P6 {size[0]} {size[1]} 255\n".encode()
    with pytest.raises(InputError, match=r"^bomb\.ppm "):
        open_picture(header, "bomb.ppm")


def test_more_than_sixteen_bits_a_channel_is_refused() -> None:
    with pytest.raises(InputError, match=r"a.png cannot be decoded: mode I has more than 16 bits"):
        decode(Image.fromarray(np.zeros((4, 4), np.int32)), "L", "a.png")


@pytest.mark.parametrize(("before", "after"), [("RGB", "L"), ("L", "RGB"), ("RGB", "RGB"), ("L", "L")])
def test_recolor_agrees_with_pillow_to_the_bit(before: str, after: str) -> None:
    picture = Image.fromarray(PIXELS).convert(before)
    images = decode(picture, before, "a").unsqueeze(0)
    np.testing.assert_array_equal(as_pixels(recolor(images, after)[0]), picture.convert(after))


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("size", [(5, 7), (16, 16), (12, 10)])
def test_resize_of_a_batch_is_that_of_its_images(channels: int, size: tuple[int, int]) -> None:
    images = torch.from_numpy(np.random.default_rng(1).integers(0, 256, (33, channels, 12, 10), dtype=np.uint8))
    expected = torch.cat([resize(image.unsqueeze(0), size) for image in images])
    assert torch.equal(resize(images, size), expected)


@pytest.mark.parametrize("size", [(5, 7), (16, 16), (12, 10)])
def test_resize_is_pillows_bilinear_up_to_rounding(size: tuple[int, int]) -> None:
    resized = as_pixels(resize(torch.from_numpy(PIXELS).permute(2, 0, 1).unsqueeze(0), size)[0])
    expected = np.asarray(Image.fromarray(PIXELS).resize((size[1], size[0]), Image.Resampling.BILINEAR))
    assert np.abs(resized.astype(int) - expected).max() <= 1


@pytest.mark.parametrize("size", [(6, 6), (16, 16), (12, 5), (4, 10), (24, 20)])
def test_pad_is_pillows_up_to_rounding(size: tuple[int, int]) -> None:
    found = as_pixels(resize(torch.from_numpy(PIXELS).permute(2, 0, 1).unsqueeze(0), size, "pad")[0])
    expected = np.asarray(ImageOps.pad(Image.fromarray(PIXELS), (size[1], size[0]), Image.Resampling.BILINEAR))
    assert np.abs(found.astype(int) - expected).max() <= 1


# Left, top, right and bottom of what is kept of 12 rows of 10.
@pytest.mark.parametrize(
    ("size", "kept"),
    [
        ((6, 6), (0, 1, 10, 11)),
        ((16, 16), (0, 1, 10, 11)),
        ((12, 5), (2, 0, 7, 12)),
        ((4, 10), (0, 4, 10, 8)),
        ((24, 20), (0, 0, 10, 12)),
    ],
)
def test_crop_resizes_the_middle_as_pillow_does(size: tuple[int, int], kept: tuple[int, int, int, int]) -> None:
    found = as_pixels(resize(torch.from_numpy(PIXELS).permute(2, 0, 1).unsqueeze(0), size, "crop")[0])
    middle = Image.fromarray(PIXELS).crop(kept)
    expected = np.asarray(middle.resize((size[1], size[0]), Image.Resampling.BILINEAR))
    assert np.abs(found.astype(int) - expected).max() <= 1


@pytest.mark.parametrize("shape", [(1, 5000), (5000, 1), (3, 1), (12, 10)])
@pytest.mark.parametrize("size", [(2, 3), (7, 5), (16, 16)])
@pytest.mark.parametrize("fit", ["crop", "pad"])
def test_any_shape_fits_any_size(shape: tuple[int, int], size: tuple[int, int], fit: str) -> None:
    images = torch.full((2, 3, *shape), 200, dtype=torch.uint8)
    found = resize(images, size, fit)
    assert found.shape == (2, 3, *size)
    assert (found == 200).all() if fit == "crop" else ((found == 200) | (found == 0)).all()


@pytest.mark.parametrize("fit", ["stretch", "crop", "pad"])
@pytest.mark.parametrize("shape", [(1, 3, 8, 8), (2, 3, 100, 70), (16, 3, 5, 9), (4, 3, 1, 1)])
def test_a_picture_may_become_one_pixel(shape: tuple[int, ...], fit: Fit) -> None:
    images = torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    channels = [resize(channel, (1, 1), fit) for channel in images.split(1, 1)]
    assert torch.equal(resize(images, (1, 1), fit), torch.cat(channels, 1))
