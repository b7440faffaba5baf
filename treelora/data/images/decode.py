"""Encoded bytes to RGB: eight formats, every image judged before it is believed."""

import io
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from PIL.Image import Image

FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF", "PPM")
MAX_PIXELS = 64_000_000
"""Larger images are taken for decompression bombs: 64 million pixels are 192 MB as RGB."""

_DIRECT_MODES = ("1", "L", "LA", "La", "P", "PA", "RGB", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr")
_SIXTEEN_BITS = ("I;16", "I;16L", "I;16B", "I;16N")
_TIFF_STARTS = (b"II*\0", b"MM\0*")
_SAMPLES_PER_PIXEL, _EXTRA_SAMPLES, _ORIENTATION = 277, 338, 0x0112
_ALPHA = (1, 2)
_CHANNELS_TOLD = 64
_UNDECODABLE = "image can't be decoded"
_TOO_LARGE = f"image is larger than {MAX_PIXELS:,} pixels"


class ImageProblem(Exception):  # noqa: N818 - a row's trouble, not the program's
    """Why an image can't be used: ``reason`` is short and equal for all images of one trouble."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


def decode(data: bytes) -> "Image":
    """The image as RGB, upright by its EXIF orientation; of several frames the first.

    Transparency is dropped, 16 bits become their upper 8. Raises ImageProblem for anything but a whole image
    of ``FORMATS`` with 1, 3 or 4 channels (2 where the second is transparency) and at most ``MAX_PIXELS``.
    """
    image = _opened(data)
    try:
        image.load()
        turned = _upright(image)
        if turned.mode in _SIXTEEN_BITS or turned.mode == "I":
            from PIL import Image

            upper = (np.asarray(turned).astype(np.uint16) >> 8).astype(np.uint8)
            return Image.fromarray(upper).convert("RGB")
        return turned.convert("RGB")
    except Exception as error:  # decoders of hostile bytes raise whatever they stumble over
        raise ImageProblem(_UNDECODABLE) from error


def image_size(data: bytes) -> tuple[int, int]:
    """(height, width) of the upright image, from its header where the format lets one; raises as ``decode``."""
    image = _opened(data)
    if image.format == "TIFF":
        # Pillow turns a TIFF while it loads it.
        upright = decode(data)
        return upright.height, upright.width
    sideways = _orientation(image) in (5, 6, 7, 8)
    return (image.width, image.height) if sideways else (image.height, image.width)


def _opened(data: bytes) -> "Image":
    """The image with its header read and judged, its pixels not yet."""
    from PIL import Image

    if not data:
        raise ImageProblem("image is empty")
    _check_tiff_channels(data)
    try:
        image = Image.open(io.BytesIO(data), formats=FORMATS)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise ImageProblem(_TOO_LARGE) from error
    except Exception as error:  # decoders of hostile bytes raise whatever they stumble over
        raise ImageProblem(_UNDECODABLE) from error
    if image.width * image.height > MAX_PIXELS:
        raise ImageProblem(_TOO_LARGE)
    if not image.width * image.height:
        raise ImageProblem("image is empty")
    # Pillow holds a PGM of 16 bits in 32; elsewhere 32 bits are measurements.
    deep = image.mode in _SIXTEEN_BITS or (image.mode == "I" and image.format == "PPM")
    if image.mode not in _DIRECT_MODES and not deep:
        raise ImageProblem(f"image mode {image.mode} is not a picture's")
    return image


def _check_tiff_channels(data: bytes) -> None:
    """Refuse channel counts that Pillow would cut down to a picture, or call unknown."""
    if data[:4] not in _TIFF_STARTS:
        return
    from PIL.TiffImagePlugin import ImageFileDirectory_v2

    try:
        directory = ImageFileDirectory_v2(data[:8])
        source = io.BytesIO(data)
        source.seek(directory.next)
        directory.load(source)
        channels = int(directory.get(_SAMPLES_PER_PIXEL, 1))
        extra = directory.get(_EXTRA_SAMPLES, ())
        extra = tuple(extra) if isinstance(extra, tuple | list) else (extra,)
    except Exception as error:  # decoders of hostile bytes raise whatever they stumble over
        raise ImageProblem(_UNDECODABLE) from error
    if channels not in (1, 3, 4) and not (channels == 2 and extra and extra[0] in _ALPHA):
        many = f"more than {_CHANNELS_TOLD}" if channels > _CHANNELS_TOLD else channels
        raise ImageProblem(f"image has {many} channels")


def _orientation(image: "Image") -> int:
    try:
        found = image.getexif().get(_ORIENTATION, 1)
    except Exception:  # noqa: BLE001 - a camera's broken notes don't spoil its picture
        return 1
    return found if isinstance(found, int) else 1


def _upright(image: "Image") -> "Image":
    from PIL.Image import Transpose

    turns = {
        2: Transpose.FLIP_LEFT_RIGHT,
        3: Transpose.ROTATE_180,
        4: Transpose.FLIP_TOP_BOTTOM,
        5: Transpose.TRANSPOSE,
        6: Transpose.ROTATE_270,
        7: Transpose.TRANSVERSE,
        8: Transpose.ROTATE_90,
    }
    turn = turns.get(_orientation(image))
    return image if turn is None else image.transpose(turn)
