"""Videos to frames by the official rules: which frames to show, and the text before each.

A video is a file that PyAV reads (the extra `video`) or a folder of frame images. In a shard a
video is nothing but its frames, as images of one tile each; they are drawn once, when the shards
are made.
"""

import io
import re
from collections.abc import Callable, Sequence
from fractions import Fraction
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from megatron_vico.data.encode.conversation import IMAGE_TAG
from megatron_vico.data.samples import Turn
from megatron_vico.errors import ConfigError, SampleError
from megatron_vico.files import read_plain

VIDEO_TAG = "<video>"
# The released models were trained with one text and are asked with another; both are official.
TRAINING_TEXT = f"Frame-{{number}}: {IMAGE_TAG}\n"
INFERENCE_TEXT = f"Frame{{number}}: {IMAGE_TAG}\n"
FRAME_SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".bmp"}
JPEG_QUALITY = 95
MICROSECONDS = 1_000_000
SLACK_S = 0.5  # durations and frame counts in headers may be rounded
EXACT = "mov"  # but not in MP4 and its kin, whose tables list every frame's place
MAX_FRAMES = 1 << 22
"""Of a file: 19 hours at 60 a second."""
MAX_DECODED_PIXELS = 1 << 41
"""Of a file: five hours of full HD at 60 frames a second."""

_LIMITS = {
    # Before memory is taken for a frame; as many as of an image.
    "max_pixels": str(2 * (Image.MAX_IMAGE_PIXELS or 0)),
    # A playlist would have other files read, or URLs.
    "protocol_whitelist": "file",
    "format_whitelist": (
        "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,gif,apng,flv,live_flv,mpeg,mpegts,mpegvideo,ogg,"
        "asf,h264,hevc,av1,ivf,m4v,mjpeg,dv,nut,mxf,rm,wtv,vob"
    ),
}


def video_frames(
    source: str | Path,
    *,
    random: torch.Generator,
    min_frames: int = 8,
    max_frames: int = 32,
    clip: Sequence[float] | None = None,
    read: Callable[[Path], bytes] = read_plain,
) -> list[bytes]:
    """Frames of a video by the official training rule: JPEG files; of a folder, its own files.

    Their number is drawn from `min_frames` to `max_frames`; the video is cut into as many
    intervals, and a frame is drawn from each. A file with fewer frames has its last one repeated; a
    folder or an animated GIF gives all it has.

    Args:
        source: a video file, or a folder of frame images in the natural order of their names.
        clip: (start, end) in seconds of the part to show; what lies after the file's end is not.
        read: gives the content of a folder's frame.

    Raises:
        ConfigError: if PyAV is not installed.
        SampleError: if the video is broken, cut short, empty or too large, or `clip` is not in it.
    """
    path = Path(source)
    num_frames = int(torch.randint(min_frames, max_frames + 1, (), generator=random))
    if path.is_dir():
        if clip:
            raise SampleError(
                f"{path}: 'clip' of a folder of frames, which has no frame rate; give the frames"
                " of it."
            )
        files = frame_files(path)
        drawn = draw_frames(len(files), num_frames=min(num_frames, len(files)), random=random)
        try:
            return [read(files[number]) for number in drawn]
        except OSError as error:
            raise SampleError(
                f"{error.filename}: {error.strerror}; restore the frame or remove the sample."
            ) from error

    def choose(length: int, rate: Fraction | None) -> list[int]:
        start, available = _clip(path, clip, length=length, rate=rate) if clip else (0, length)
        limit = available if path.suffix.lower() == ".gif" else max_frames
        drawn = draw_frames(available, num_frames=min(num_frames, limit), random=random)
        return [start + number for number in drawn]

    return _read_frames(path, choose)


def middle_frames(source: str | Path, *, num_frames: int) -> list[bytes]:
    """`num_frames` JPEG frames of a video file by the rule of the official inference example.

    The middle of each of equal segments; of a shorter video, some come repeatedly. Errors are those
    of `video_frames`.
    """

    def choose(length: int, _rate: Fraction | None) -> list[int]:
        segment = (length - 1) / num_frames
        return [int(segment / 2 + np.round(segment * number)) for number in range(num_frames)]

    return _read_frames(Path(source), choose)


def with_frames(
    turns: Sequence[Turn], num_frames: int, *, frame_text: str = TRAINING_TEXT, key: str = ""
) -> tuple[Turn, ...]:
    """Turns with frames' `<image>` tags for `<video>`; without it, before the first question.

    The official code fails on a tag without a newline after it, and on a system turn before a
    question without the tag; both are taken here as they are meant. So is a single `<image>`, as
    LLaVA-Video writes. `frame_text` stands for one frame; `{number}` in it counts from 1.
    SampleError if there are several tags, or no question.
    """
    holders = [number for number, turn in enumerate(turns) if turn.role in ("human", "pretrain")]
    tagged = {
        tag: [number for number in holders for _ in range(turns[number].text.count(tag))]
        for tag in (VIDEO_TAG, IMAGE_TAG)
    }
    found = [*tagged[VIDEO_TAG], *tagged[IMAGE_TAG]]
    if len(found) > 1 or not holders:
        images = f" and {len(tagged[IMAGE_TAG])} {IMAGE_TAG}" if tagged[IMAGE_TAG] else ""
        raise SampleError(
            f"sample {key!r}: {len(tagged[VIDEO_TAG])} {VIDEO_TAG}{images} tags in {len(holders)}"
            f" questions; expected a question, and one {VIDEO_TAG} for its video or none."
        )
    holder, tag = (found or holders)[0], IMAGE_TAG if tagged[IMAGE_TAG] else VIDEO_TAG
    before, _, after = turns[holder].text.rpartition(tag)
    frames = "".join(frame_text.format(number=number) for number in range(1, num_frames + 1))
    text = before + frames + (after.removeprefix("\n") if found else after)
    return (*turns[:holder], Turn(turns[holder].role, text), *turns[holder + 1 :])


def draw_frames(num_available: int, *, num_frames: int, random: torch.Generator) -> list[int]:
    """Numbers of `num_frames` frames, ascending: one drawn from each of as many intervals.

    That is the official "rand"; of fewer frames it takes all, and the last one repeatedly.
    """
    shown = min(num_frames, num_available)
    edges = np.linspace(0, num_available, num=shown + 1).astype(int).tolist()
    if min(end - start for start, end in pairwise(edges)) > 1:
        # Never the last frame of an interval, as in the official code.
        draws = (torch.randint(a, b - 1, (), generator=random) for a, b in pairwise(edges))
        drawn = [int(number) for number in draws]
    else:
        drawn = sorted(torch.randperm(num_available, generator=random)[:shown].tolist())
    return drawn + drawn[-1:] * (num_frames - shown)


def frame_files(folder: Path) -> list[Path]:
    """The frame images of a folder, at least one: `frame_2.jpg` before `frame_10.jpg`."""
    images = (file for file in folder.iterdir() if file.suffix.lower() in FRAME_SUFFIXES)
    files = [file for file in images if not file.name.startswith(".")]
    if not files:
        raise SampleError(
            f"{folder}: no frame in it; expected images ({', '.join(sorted(FRAME_SUFFIXES))})."
        )

    # Split at numbers, names alternate between text and digits, so that like is compared with like.
    def natural(file: Path) -> list[int | str]:
        return [int(s) if s.isdecimal() else s for s in re.split(r"([0-9]+)", file.name)]

    return sorted(files, key=natural)


def _clip(
    path: Path, clip: Sequence[float], *, length: int, rate: Fraction | None
) -> tuple[int, int]:
    """First frame of a clip of a video of `length` frames, and how many it has."""
    try:
        start, end = (float(second) for second in clip)
    except (TypeError, ValueError):
        start = end = -1.0
    if not 0 <= start < end:
        raise SampleError(f"{path}: 'clip' is {clip!r}; expected [start, end] in seconds.")
    if not rate:
        raise SampleError(
            f"{path}: has no frame rate, so that 'clip' cannot be found; encode it again."
        )
    first = int(min(start * rate, length))
    available = int(min((end - start) * rate, length - first))
    if available < 1:
        seconds = float(length / rate)
        raise SampleError(f"{path}: no frame in 'clip' {clip!r} of a video of {seconds:.2f} s.")
    return first, available


def _read_frames(path: Path, choose: Callable[[int, Fraction | None], list[int]]) -> list[bytes]:
    """The frames with the numbers that `choose` takes from a file's frames and frames a second."""
    try:
        import av
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"{path}: videos are read by PyAV; pip install 'megatron_vico[video]'."
        ) from error
    if path.exists() and not path.is_file():
        raise SampleError(f"{path}: not a plain file but a device or a pipe; remove the sample.")
    try:
        length, rate = _measure(path)
        # Where the codec has hidden frames, fewer come out than packets: choose again among those.
        while length:
            chosen = choose(length, rate)
            frames, length = _decode(path, set(chosen))
            if len(frames) == len(set(chosen)):
                return [frames[number] for number in chosen]
    except (av.FFmpegError, av.codec.codec.UnknownCodecError) as error:
        raise SampleError(
            f"{path}: not a readable video of at most {_LIMITS['max_pixels']} px a frame ({error});"
            " replace the file or remove the sample."
        ) from error
    raise SampleError(f"{path}: no frame can be decoded; replace the file or remove the sample.")


def _measure(path: Path) -> tuple[int, Fraction | None]:
    """Frames in a file, and frames a second, without decoding it."""
    with _open(path) as container:
        if not container.streams.video:
            raise SampleError(f"{path}: no video in it; replace the file or remove the sample.")
        stream = container.streams.video[0]
        num_packets = num_frames = corrupt = 0
        end = 0.0
        for packet in container.demux():
            if packet.dts is None and not packet.size:
                continue  # the mark at the end of a stream
            corrupt += packet.is_corrupt
            end_of_packet = (packet.pts or packet.dts or 0) + (packet.duration or 0)
            end = max(end, float(end_of_packet * packet.time_base))
            if packet.stream_index == stream.index:
                num_packets += 1
                num_frames += packet.size > 0
            if num_packets > MAX_FRAMES:
                raise SampleError(
                    f"{path}: more than {MAX_FRAMES} frames; cut it, or remove the sample."
                )
        # Containers say how many frames or, Matroska, how many seconds there should be.
        seconds = 0.0 if stream.frames else (container.duration or 0) / MICROSECONDS
        rate = 0 if EXACT in container.format.name else stream.average_rate or 0
        fewest = stream.frames - int(SLACK_S * rate)
        if corrupt or num_packets < fewest or end < seconds - SLACK_S:
            raise SampleError(
                f"{path}: damaged or cut short: {num_packets} of {stream.frames or 'unknown'}"
                f" frames, {end:.1f} of {(container.duration or 0) / MICROSECONDS:.1f} s; copy it"
                " again."
            )
        return num_frames, stream.average_rate


def _decode(path: Path, wanted: set[int]) -> tuple[dict[int, bytes], int]:
    """The wanted frames by their number, and how many frames were decoded to find them."""
    frames: dict[int, bytes] = {}
    num_decoded = num_pixels = 0
    with _open(path) as container:
        container.streams.video[0].codec_context.options = {"max_pixels": _LIMITS["max_pixels"]}
        for frame in container.decode(video=0):
            if num_decoded in wanted:
                file = io.BytesIO()
                image = frame.to_image()
                # Phones note how they were held; the official reader turns such videos too.
                if frame.rotation:
                    image = image.rotate(frame.rotation, expand=True)
                image.save(file, "JPEG", quality=JPEG_QUALITY)
                frames[num_decoded] = file.getvalue()
            num_decoded += 1
            num_pixels += frame.width * frame.height
            if num_pixels > MAX_DECODED_PIXELS:
                raise SampleError(
                    f"{path}: more than {MAX_DECODED_PIXELS} pixels up to its frame {num_decoded};"
                    " make it smaller, cut it, or remove the sample."
                )
            if len(frames) == len(wanted):
                break
    return frames, num_decoded


def _open(path: Path) -> Any:
    import av

    # A name with a colon would be taken for a protocol.
    return av.open(f"file:{path}", options=_LIMITS)
