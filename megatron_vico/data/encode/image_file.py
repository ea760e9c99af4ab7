"""Image files of strangers: which formats are opened, how large, what becomes of their depth."""

import io
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress

import numpy as np
from PIL import Image, PngImagePlugin, UnidentifiedImageError

from megatron_vico.errors import SampleError

FORMATS = (*("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "AVIF", "JPEG2000", "TGA", "ICO"),)
"""Pillow tries no other: its EPS reader runs Ghostscript, others read whatever begins like them."""

MAX_TEXT_BYTES = 64 << 20
"""Of a PNG's text, such as XMP; the official trainer allows 1 GB, Pillow by itself 1 MiB."""


MAX_SAMPLE_PIXELS = 1 << 31
"""Of all images of a sample: half a minute of decoding."""


def check_pixels(images: Sequence[bytes], *, key: str) -> None:
    """Raise SampleError if a sample has too many pixels; only headers are read."""
    if len(images) * 2 * (Image.MAX_IMAGE_PIXELS or 0) <= MAX_SAMPLE_PIXELS:
        return
    pixels = 0
    for content in images:
        with suppress(Exception), open_image(content) as image:  # a broken one is named later
            pixels += image.width * image.height
    if pixels > MAX_SAMPLE_PIXELS:
        raise SampleError(
            f"sample {key!r}: {len(images)} images of {pixels} pixels together; expected at most"
            f" {MAX_SAMPLE_PIXELS}: make them smaller, or remove the sample.",
            cause="broken image",
        )


@contextmanager
def open_image(content: bytes) -> Iterator[Image.Image]:
    """An image of which the header is read; pixels are decoded when they are asked for.

    Raises:
        Exception: whatever Pillow meets in broken bytes; DecompressionBombError, before anything is
            decoded, above its limit of 179 megapixels.
    """
    # Pillow has no argument for it.
    PngImagePlugin.MAX_TEXT_CHUNK = PngImagePlugin.MAX_TEXT_MEMORY = MAX_TEXT_BYTES
    Image.init()
    formats = [each for each in FORMATS if each in Image.OPEN]  # some builds lack AVIF
    try:
        image = Image.open(io.BytesIO(content), formats=formats)
    except UnidentifiedImageError:  # whose own words have the address of an object
        raise UnidentifiedImageError(f"no image of {', '.join(formats)}") from None
    with image:
        yield image


def to_rgb(image: Image.Image) -> Image.Image:
    """8 bits a channel; transparency is dropped.

    Pillow's own conversion cuts deeper grey off at 255, and nearly all of it is white then.
    ValueError if numbers have no known range: floating point, or more than 16 bits.
    """
    if image.mode == "F" or image.mode.startswith("I"):
        grey = np.asarray(image)
        if grey.dtype.kind == "f" or grey.min() < 0 or grey.max() > 0xFFFF:
            raise ValueError(
                f"{image.format} of mode {image.mode}, whose numbers have no known range; expected"
                " at most 16 bits a channel"
            )
        image = Image.fromarray((grey >> 8).astype(np.uint8))
    return image.convert("RGB")
