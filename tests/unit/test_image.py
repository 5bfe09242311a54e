import contextlib
import io

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, PngImagePlugin

from service.errors import ImageTooLargeError, SegmentError, UnsupportedImageError
from service.image import MAX_SIDE, ImageLimits, digest_of, valid_size_of
from service.image_header import read_header
from service.picture import letterboxed, rgb_from_file, trust_own_limits
from tests.bombs import animation, half_red, png, saved
from tests.conftest import encoded

LIMITS = ImageLimits(max_bytes=1_000_000, max_pixels=1_000_000)


@pytest.fixture(autouse=True)
def own_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    """As a started service has it."""
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", Image.MAX_IMAGE_PIXELS)
    monkeypatch.setattr(PngImagePlugin, "MAX_TEXT_MEMORY", PngImagePlugin.MAX_TEXT_MEMORY)
    trust_own_limits()


def decoded(data: bytes, limits: ImageLimits = LIMITS) -> np.ndarray:
    """What becomes of an upload: its header first, then, in a decode process, its pixels."""
    header = read_header(data, limits)
    rgb = np.asarray(rgb_from_file(io.BytesIO(data), limits))
    assert rgb.shape[:2] in ((header.height, header.width), (header.width, header.height))
    return rgb


@pytest.mark.parametrize(
    ("mode", "image_format"),
    [
        ("RGB", "JPEG"),
        ("RGB", "PNG"),
        ("RGB", "WEBP"),
        ("CMYK", "JPEG"),
        ("RGBA", "PNG"),
        ("RGBA", "WEBP"),
        ("P", "PNG"),
    ],
)
def test_every_colour_mode_becomes_rgb(mode: str, image_format: str) -> None:
    rgb = decoded(saved(half_red().convert(mode), image_format))
    assert rgb.shape == (20, 30, 3)
    assert rgb.dtype == np.uint8
    np.testing.assert_allclose(rgb[10, 3], (255, 0, 0), atol=30)
    np.testing.assert_allclose(rgb[10, 27], (0, 0, 255), atol=30)


@pytest.mark.parametrize("mode", ["L", "LA", "1", "I;16"])
def test_grey_becomes_rgb_of_the_same_brightness(mode: str) -> None:
    grey = np.full((20, 30), 200, np.uint8)
    picture = Image.fromarray(grey.astype(np.uint16) << 8) if mode == "I;16" else Image.fromarray(grey).convert(mode)
    rgb = decoded(saved(picture, "PNG"))
    assert rgb.shape == (20, 30, 3)
    if mode != "1":
        assert (rgb == 200).all()


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(orientation: int) -> None:
    """A viewer sees the same picture whichever way the camera wrote it; so do we."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored = half_red()
    inverse = {
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_90,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270,
    }.get(orientation)
    if inverse is not None:
        stored = stored.transpose(inverse)
    rgb = decoded(saved(stored, "PNG", exif=exif))
    assert rgb.shape == (20, 30, 3)
    np.testing.assert_array_equal(rgb[10, 3], (255, 0, 0))


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (png(1001, 1000), "1000000 pixels"),
        (png(MAX_SIDE + 1, 1), str(MAX_SIDE)),
        (png(60000, 60000), str(MAX_SIDE)),
        (b"\0" * (LIMITS.max_bytes + 1), "1000000 bytes"),
    ],
    ids=["pixels", "side", "bomb", "bytes"],
)
def test_too_large_is_found_before_decoding(data: bytes, says: str) -> None:
    with pytest.raises(ImageTooLargeError, match=says):
        decoded(data)


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (b"", "empty"),
        (b"hello, I am a text renamed to .jpg", "not a JPEG"),
        (b"\xff", "not a JPEG"),
        (saved(half_red(), "GIF"), "not a JPEG"),
        (saved(half_red(), "BMP"), "not a JPEG"),
        (animation("WEBP"), "animated"),
        (animation("PNG"), "animated"),
    ],
    ids=["empty", "text", "one byte", "gif", "bmp", "animated webp", "animated png"],
)
def test_what_is_no_still_picture_is_refused(data: bytes, says: str) -> None:
    with pytest.raises(UnsupportedImageError, match=says):
        decoded(data)


@pytest.mark.parametrize("image_format", ["JPEG", "PNG", "WEBP"])
def test_a_truncated_image_is_refused(image_format: str) -> None:
    data = encoded(np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8), image_format)
    with pytest.raises(UnsupportedImageError):
        decoded(data[: len(data) // 2])


ORIGINALS = {kind: encoded(np.asarray(half_red()), kind) for kind in ("JPEG", "PNG", "WEBP")}


@settings(max_examples=300)
@given(st.sampled_from(sorted(ORIGINALS)), st.data())
def test_mutated_bytes_give_pixels_or_our_own_error(kind: str, data: st.DataObject) -> None:
    mutated = bytearray(ORIGINALS[kind])
    for _ in range(data.draw(st.integers(1, 8))):
        mutated[data.draw(st.integers(0, len(mutated) - 1))] = data.draw(st.integers(0, 255))
    with contextlib.suppress(SegmentError):
        assert decoded(bytes(mutated)).ndim == 3


@given(st.integers(1, 300), st.integers(1, 300))
def test_letterboxing_keeps_the_original_s_sizes_and_pads_with_zeros(height: int, width: int) -> None:
    pixels = np.asarray(letterboxed(Image.new("RGB", (width, height), "white"), 128))
    valid_height, valid_width = valid_size_of((height, width), 128)
    scale = 128 / max(height, width)
    assert max(valid_height, valid_width) == 128
    assert valid_height == max(1, int(height * scale + 0.5))
    assert valid_width == max(1, int(width * scale + 0.5))
    assert (pixels[:valid_height, :valid_width] == 255).all()
    assert not pixels[valid_height:].any()
    assert not pixels[:, valid_width:].any()


def test_the_digest_is_of_the_bytes() -> None:
    assert digest_of(b"abc") == "sha256:ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
