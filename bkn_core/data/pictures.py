"""From the bytes of a picture to a uint8 tensor: opened with suspicion, coloured and resized the one way."""

from __future__ import annotations

import io
import os
import struct
import zlib
from typing import Literal

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor
from torchvision.transforms.v2 import functional

from bkn_core.data.png import has_all_rows
from bkn_core.errors import InputError

Color = Literal["RGB", "L"]
Fit = Literal["stretch", "crop", "pad"]
CHANNELS: dict[Color, int] = {"L": 1, "RGB": 3}

# Only these decoders are tried, whatever the suffix says: EPS would start a program, TGA takes what is no picture.
FORMATS = ("PNG", "JPEG", "BMP", "WEBP", "PPM", "TIFF", "GIF", "AVIF", "JPEG2000", "ICO", "SGI", "QOI")
SUFFIXES = frozenset(suffix for suffix, kind in Image.registered_extensions().items() if kind in (*FORMATS, "MPO"))
BYTE_LIMIT = 2**27
PIXEL_LIMIT = 2**26

ORIENTATION = 0x112  # the EXIF tag that says how the camera was held
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}

GREY_MODES = frozenset({"1", "L", "LA", "La", "I;16", "I;16B", "I;16L", "I;16N"})
# What Pillow's decoders raise on damaged bytes; warnings are errors where the user makes them so.
PICTURE_FAULTS = (
    OSError,
    SyntaxError,
    ValueError,
    EOFError,
    IndexError,
    OverflowError,
    struct.error,
    zlib.error,
    Image.DecompressionBombError,
    Image.DecompressionBombWarning,
    UserWarning,
)


def open_picture(data: bytes, name: str) -> Image.Image:
    """Read the header of an encoded picture; its pixels stay undecoded.

    Raises:
        InputError: The bytes are no picture, or one of more than `PIXEL_LIMIT` pixels.
    """
    try:
        picture = Image.open(io.BytesIO(data), formats=FORMATS)
    except PICTURE_FAULTS as error:
        raise _unreadable(name, error) from error
    width, height = picture.size
    if width * height > PIXEL_LIMIT:
        raise InputError(f"{name} claims {width} x {height} pixels; at most {PIXEL_LIMIT} are decoded", "Remove it.")
    return picture


def decode(picture: Image.Image, color: Color, name: str) -> Tensor:
    """Decode a picture, the first of several, into uint8 (C, H, W), turned as its EXIF orientation says.

    Raises:
        InputError: The picture is cut short, damaged or of more than 16 bits a channel.
    """
    file = getattr(picture, "fp", None)  # gone when it has been read
    try:
        pixels = np.array(_upright(_to_eight_bits(picture).convert(color), _turn(picture)))
        if isinstance(file, io.BytesIO) and _may_lack_rows(picture) and not has_all_rows(file.getvalue()):
            raise EOFError("its image data ends before its last row")
    except PICTURE_FAULTS as error:
        raise _unreadable(name, error) from error
    return torch.from_numpy(pixels.reshape(*pixels.shape[:2], -1)).permute(2, 0, 1)


def is_picture(name: str) -> bool:
    """Whether a file is one of pictures that are read, by its suffix."""
    return os.path.splitext(name)[1].lower() in SUFFIXES


def is_grey(picture: Image.Image) -> bool:
    """Whether a picture has one channel of grey, from its header alone."""
    return picture.mode in GREY_MODES


def recolor(images: Tensor, color: Color) -> Tensor:
    """Turn uint8 images (N, C, H, W) grey or RGB, bit for bit as Pillow's `convert` does."""
    if images.shape[1] == CHANNELS[color]:
        return images
    if color == "RGB":
        return images.expand(-1, 3, -1, -1)
    red, green, blue = images.to(torch.int32).unbind(1)
    luma = red * 19595 + green * 38470 + blue * 7471 + 0x8000  # ITU-R 601 in 16-bit fixed point
    return (luma >> 16).to(torch.uint8).unsqueeze(1)


def resize(images: Tensor, image_size: tuple[int, int], fit: Fit = "stretch") -> Tensor:
    """Resize uint8 images (N, C, H, W), bilinear and antialiased; a batch gives what its images give one by one.

    Args:
        images: The images.
        image_size: Height and width of the result.
        fit: What is done where the aspect differs: "stretch" changes it, "crop" takes the largest middle part of the
            right aspect, "pad" puts the whole image in the middle of black.
    """
    height, width = image_size
    own_height, own_width = images.shape[-2:]
    if fit == "crop":  # before it is resized: a picture of one row would be as long as it is wide
        part = [max(1, round(own_width * height / width)), max(1, round(own_height * width / height))]
        images = functional.center_crop(images, [min(part[0], own_height), min(part[1], own_width)])
    inner = [height, width]
    if fit == "pad":
        whole = [max(1, round(width * own_height / own_width)), max(1, round(height * own_width / own_height))]
        inner = [min(whole[0], height), min(whole[1], width)]
    if inner == [1, 1]:  # in another layout PyTorch's kernel for three channels fails an assertion of its own
        images = images.contiguous(memory_format=torch.channels_last)
    resized: Tensor = functional.resize(images, inner, antialias=True)
    if inner == [height, width]:
        return resized
    top, left = round((height - inner[0]) / 2), round((width - inner[1]) / 2)
    padded: Tensor = functional.pad(resized, [left, top, width - inner[1] - left, height - inner[0] - top])
    return padded


def _to_eight_bits(picture: Image.Image) -> Image.Image:
    if picture.mode.startswith("I;16"):
        # Pillow's own conversion clips at 255 instead of scaling.
        return Image.fromarray((np.asarray(picture) >> 8).astype(np.uint8))
    if picture.mode in ("I", "F"):
        raise ValueError(f"mode {picture.mode} has more than 16 bits a channel")
    # Pillow warns when it drops a palette's transparency on the way to RGB, but not on the way to RGBA.
    return picture.convert("RGBA") if picture.mode == "P" and "transparency" in picture.info else picture


def _turn(picture: Image.Image) -> Image.Transpose | None:
    """What turns a decoded picture upright; some decoders have done it and then say nothing of it."""
    try:
        return TURNS.get(picture.getexif().get(ORIENTATION, 1))
    except (*PICTURE_FAULTS, TypeError, LookupError):  # damaged metadata of a sound picture
        return None


def _upright(picture: Image.Image, turn: Image.Transpose | None) -> Image.Image:
    return picture if turn is None else picture.transpose(turn)


def _may_lack_rows(picture: Image.Image) -> bool:
    if picture.format != "PNG":
        return False
    last = picture.crop((0, picture.height - 1, picture.width, picture.height))
    return bool(picture.info.get("interlace")) or not any(last.tobytes())


def _unreadable(name: str, error: Exception) -> InputError:
    # Pillow's own words for this name a memory address.
    unknown = isinstance(error, UnidentifiedImageError)
    reason = f"it is none of {', '.join(FORMATS)}" if unknown else str(error) or type(error).__name__
    return InputError(f"{name} cannot be decoded: {reason}", "Restore the file or remove it.")
