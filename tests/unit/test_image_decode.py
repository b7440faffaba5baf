"""Decoding: every mode against pixels worked by hand, every fault against its reason."""

import io
import struct
import zlib
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from tests.support.images import encoded, noise, tiff
from treelora.data.images import ImageProblem, decode
from treelora.data.images.decode import MAX_PIXELS, image_size


def pixels(data: bytes) -> np.ndarray:
    image = decode(data)
    assert image.mode == "RGB"
    return np.asarray(image)


def reason(data: bytes) -> str:
    with pytest.raises(ImageProblem) as caught:
        decode(data)
    return caught.value.reason


def saved(image: Image.Image, format: str, **options: Any) -> bytes:
    sink = io.BytesIO()
    image.save(sink, format=format, **options)
    return sink.getvalue()


class TestModes:
    @pytest.mark.parametrize("format", ["PNG", "BMP", "TIFF", "PPM"])
    def test_rgb_without_loss(self, format: str) -> None:
        want = noise(1, 5, 3)
        assert np.array_equal(pixels(encoded(want, format)), want)

    def test_webp_without_loss(self) -> None:
        want = noise(1, 5, 3)
        assert np.array_equal(pixels(encoded(want, "WEBP", lossless=True)), want)

    def test_jpeg_is_what_pillow_reads(self) -> None:
        data = encoded(noise(2, 16, 16), "JPEG")
        assert np.array_equal(pixels(data), np.asarray(Image.open(io.BytesIO(data))))

    def test_grey_is_three_equal_channels(self) -> None:
        grey = noise(3)[:, :, 0]
        assert np.array_equal(pixels(encoded(grey)), np.repeat(grey[:, :, None], 3, 2))
        assert np.array_equal(pixels(encoded(grey, "PPM")), np.repeat(grey[:, :, None], 3, 2))

    def test_one_bit_is_black_and_white(self) -> None:
        bits = np.array([[0, 255], [255, 0]], np.uint8)
        assert pixels(encoded(bits, mode="1")).tolist() == [[[0] * 3, [255] * 3], [[255] * 3, [0] * 3]]

    def test_palette(self) -> None:
        image = Image.fromarray(np.array([[0, 1], [2, 1]], np.uint8), "P")
        image.putpalette([10, 20, 30, 40, 50, 60, 70, 80, 90])
        want = [[[10, 20, 30], [40, 50, 60]], [[70, 80, 90], [40, 50, 60]]]
        assert pixels(saved(image, "PNG")).tolist() == want
        assert pixels(saved(image, "GIF")).tolist() == want
        assert pixels(saved(image, "PNG", transparency=1)).tolist() == want

    def test_transparency_is_dropped(self) -> None:
        rgb, alpha = noise(4), noise(5)[:, :, :1]
        assert np.array_equal(pixels(encoded(np.concatenate([rgb, alpha], 2))), rgb)
        both = Image.fromarray(np.concatenate([rgb[:, :, :1], alpha], 2), "LA")
        assert np.array_equal(pixels(saved(both, "PNG")), np.repeat(rgb[:, :, :1], 3, 2))
        assert np.array_equal(pixels(saved(both, "TIFF")), np.repeat(rgb[:, :, :1], 3, 2))

    def test_cmyk(self) -> None:
        image = Image.new("CMYK", (1, 1), (255, 0, 0, 0))
        assert pixels(saved(image, "TIFF")).tolist() == [[[0, 255, 255]]]

    @pytest.mark.parametrize("format", ["PNG", "TIFF", "PPM"])
    def test_sixteen_bits_become_their_upper_eight(self, format: str) -> None:
        deep = np.array([[0, 255, 256], [0x8001, 0xFFFF, 0x12FF]], np.uint16)
        want = [[0, 0, 1], [0x80, 0xFF, 0x12]]
        assert pixels(encoded(deep, format))[:, :, 1].tolist() == want

    def test_of_frames_the_first(self) -> None:
        frames = [Image.new("L", (2, 2), value) for value in (7, 200)]
        for format in ("GIF", "TIFF"):
            data = saved(frames[0], format, save_all=True, append_images=frames[1:])
            assert (pixels(data) == 7).all()

    @pytest.mark.parametrize("orientation", range(1, 9))
    @pytest.mark.parametrize("format", ["JPEG", "TIFF", "PNG", "WEBP"])
    def test_upright_by_exif(self, orientation: int, format: str) -> None:
        upright = np.zeros((16, 8), np.uint8)
        upright[:8, :4] = 255
        # What the camera stored, so that turning it as the standard says gives `upright`.
        stored = {
            1: upright,
            2: upright[:, ::-1],
            3: upright[::-1, ::-1],
            4: upright[::-1],
            5: upright.T,
            6: np.rot90(upright),
            7: upright[::-1, ::-1].T,
            8: np.rot90(upright, -1),
        }[orientation]
        exif = Image.Exif()
        exif[0x0112] = orientation
        image = Image.fromarray(np.ascontiguousarray(stored)).convert("RGB")
        options = {"quality": 100} if format == "JPEG" else {"lossless": True} if format == "WEBP" else {}
        data = saved(image, format, exif=exif, **options)
        assert image_size(data) == (16, 8)
        assert np.abs(pixels(data)[:, :, 0].astype(int) - upright).max() <= 8


class TestRefused:
    def test_empty_and_not_an_image(self) -> None:
        assert reason(b"") == "image is empty"
        for data in (b"\0", b"not an image", b"%PDF-1.4", b"<svg/>", b"GIF89a", b"\x89PNG\r\n\x1a\n"):
            assert reason(data) == "image can't be decoded"

    @pytest.mark.parametrize("format", ["PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF", "PPM"])
    def test_truncated(self, format: str) -> None:
        data = encoded(noise(6, 40, 40), format)
        for keep in (0.2, 0.5, 0.8):
            assert reason(data[: int(len(data) * keep)]) == "image can't be decoded"

    @pytest.mark.parametrize("format", ["ICO", "TGA", "PCX", "SGI", "IM"])
    def test_other_formats(self, format: str) -> None:
        assert reason(encoded(noise(7, 16, 16), format)) == "image can't be decoded"

    def test_channels(self) -> None:
        assert pixels(tiff(3)).tolist() == [[[0, 1, 2], [3, 4, 5]], [[6, 7, 8], [9, 10, 11]]]
        for data, channels in ((tiff(2, [0], 1), 2), (tiff(2, None, 1), 2), (tiff(5, [0, 0]), 5), (tiff(7), 7)):
            assert reason(data) == f"image has {channels} channels"
        assert reason(tiff(65)) == "image has more than 64 channels"
        assert pixels(tiff(2, [2], 1))[:, :, 0].tolist() == [[0, 2], [4, 6]]

    def test_numbers_that_are_no_colours(self) -> None:
        assert reason(encoded(np.ones((2, 2), np.float32), "TIFF")) == "image mode F is not a picture's"
        assert reason(encoded(np.ones((2, 2), np.int32), "TIFF")) == "image mode I is not a picture's"

    @pytest.mark.parametrize("side", [8_001, 30_000, 2**31 - 1])
    def test_decompression_bomb(self, side: int) -> None:
        header = struct.pack(">IIBBBBB", side, side, 8, 0, 0, 0, 0)
        chunks = [(b"IHDR", header), (b"IDAT", zlib.compress(bytes(1000))), (b"IEND", b"")]
        data = b"\x89PNG\r\n\x1a\n" + b"".join(
            struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
            for kind, body in chunks
        )
        assert MAX_PIXELS == 64_000_000
        assert reason(data) == "image is larger than 64,000,000 pixels"

    @settings(max_examples=300, deadline=None)
    @given(
        data=st.one_of(
            st.binary(max_size=200),
            st.tuples(
                st.sampled_from(["PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF", "PPM"]),
                st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 255)), min_size=1, max_size=6),
            ).map(lambda drawn: damaged(*drawn)),
        )
    )
    def test_damage_gives_an_image_or_a_reason(self, data: bytes) -> None:
        try:
            image = decode(data)
        except ImageProblem as problem:
            found = problem
            image = None
        if image is None:
            assert found.reason.startswith("image ")
            return
        assert image.mode == "RGB"
        assert 0 < image.width * image.height <= MAX_PIXELS
        assert image_size(data) == (image.height, image.width)


def damaged(format: str, changes: list[tuple[float, int]]) -> bytes:
    data = bytearray(encoded(noise(8, 9, 7), format))
    for place, value in changes:
        data[int(place * len(data))] = value
    return bytes(data)
