import contextlib
import io

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, PngImagePlugin

from service.errors import SegmentError, UnsupportedImageError
from service.image import ImageLimits
from service.image_header import JPEG_START, MAX_CHUNKS, PNG_START, ImageHeader, has_too_many_scans, read_header
from service.picture import rgb_from_file, trust_own_limits
from service.status import status_of
from tests.bombs import accepted, half_red, png_chunk, refused_in_a_process, refused_unread, saved, small_png

LIMITS = ImageLimits(32 * 1024 * 1024, 64_000_000)


@pytest.fixture(autouse=True)
def own_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    """As a decode process has it."""
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", Image.MAX_IMAGE_PIXELS)
    monkeypatch.setattr(PngImagePlugin, "MAX_TEXT_MEMORY", PngImagePlugin.MAX_TEXT_MEMORY)
    trust_own_limits()


@pytest.mark.parametrize("options", [{"format": "JPEG"}, {"format": "PNG"}, {"format": "WEBP"}], ids=str)
@pytest.mark.parametrize("more", [{}, {"lossless": True}, {"progressive": True}, {"exif": b"Exif\0\0" + bytes(60_000)}])
@settings(max_examples=20)
@given(width=st.integers(1, 200), height=st.integers(1, 200))
def test_the_header_says_the_size_that_decoding_finds(
    options: dict[str, str], more: dict[str, object], width: int, height: int
) -> None:
    data = saved(half_red(width, height), options["format"], **more)
    assert read_header(data, LIMITS) == ImageHeader(options["format"], width, height)


@pytest.mark.parametrize("name", refused_unread())
def test_a_bomb_is_refused_by_its_header(name: str) -> None:
    data, reason = refused_unread()[name]
    with pytest.raises(SegmentError) as caught:
        read_header(data, LIMITS)
    assert status_of(caught.value).reason == reason


@pytest.mark.parametrize("name", refused_in_a_process())
def test_what_only_a_decoder_can_find_passes(name: str) -> None:
    data = refused_in_a_process()[name]
    assert read_header(data, LIMITS).width
    if not has_too_many_scans(data):
        with pytest.raises(UnsupportedImageError):
            rgb_from_file(io.BytesIO(data), LIMITS)


@pytest.mark.parametrize("name", accepted())
def test_odd_pictures_are_pictures(name: str) -> None:
    data = accepted()[name]
    header = read_header(data, LIMITS)
    assert not has_too_many_scans(data)
    assert rgb_from_file(io.BytesIO(data), LIMITS).size == (header.width, header.height)


def test_a_png_has_as_many_chunks_as_encoders_make_and_no_more() -> None:
    assert read_header(small_png(*[png_chunk(b"tEXt", b"a\0b")] * (MAX_CHUNKS - 3)), LIMITS).width == 2
    with pytest.raises(UnsupportedImageError, match=f"{MAX_CHUNKS} chunks"):
        read_header(small_png(*[png_chunk(b"tEXt", b"a\0b")] * (MAX_CHUNKS - 2)), LIMITS)


@given(st.sampled_from([JPEG_START, PNG_START, PNG_START + b"\0\0\0\x0dIHDR", b"RIFF\0\0\0\0WEBPVP8X"]), st.binary())
def test_any_bytes_have_a_header_or_one_of_our_errors(start: bytes, rest: bytes) -> None:
    with contextlib.suppress(SegmentError):
        read_header(start + rest, LIMITS)
