"""Which frames of a video come back, against the official rule restated; broken videos; the text
before frames."""

import io
import os
import re
import struct
import sys
from itertools import pairwise

import numpy as np
import pytest
import torch
from PIL import Image

from megatron_vico.data.encode import video
from megatron_vico.data.encode.sample_encoder import SampleEncoder
from megatron_vico.data.encode.video import (
    INFERENCE_TEXT,
    draw_frames,
    frame_files,
    middle_frames,
    video_frames,
    with_frames,
)
from megatron_vico.data.samples import ConversationSample, Turn
from megatron_vico.errors import ConfigError, SampleError
from tests.toy_data import frame_number, write_video
from tests.unit.conftest import SETTINGS


def stream(seed=0):
    return torch.Generator().manual_seed(seed)


def numbers(frames):
    """The number of each frame in its video."""
    return [frame_number(Image.open(io.BytesIO(frame))) for frame in frames]


@pytest.fixture(scope="module")
def movie(tmp_path_factory):
    """60 frames, 6 seconds."""
    return write_video(tmp_path_factory.mktemp("video") / "a: movie.mp4", 60)


def official_intervals(num_frames, vlen):
    """First and last frame of each interval, as the official code cuts a video."""
    intervals = np.linspace(start=0, stop=vlen, num=min(num_frames, vlen) + 1).astype(int)
    return [(intervals[index], intervals[index + 1] - 1) for index in range(len(intervals) - 1)]


@pytest.mark.parametrize(("vlen", "num_frames"), [(60, 8), (64, 32), (1000, 32), (17, 8), (100, 1)])
def test_each_interval_gives_each_of_its_frames_but_the_last(vlen, num_frames):
    ranges = official_intervals(num_frames, vlen)
    drawn = np.array(
        [draw_frames(vlen, num_frames=num_frames, random=stream(seed)) for seed in range(400)]
    )
    for column, (first, last) in zip(drawn.T, ranges, strict=True):
        possible = set(range(first, last))  # the official `random.choice(range(first, last))`
        assert set(column.tolist()) <= possible
        assert len(possible) > 30 or set(column.tolist()) == possible


@pytest.mark.parametrize(("vlen", "num_frames"), [(15, 8), (40, 32), (9, 8)])
def test_where_an_interval_has_one_frame_any_frames_are_drawn_in_order(vlen, num_frames):
    assert min(last - first for first, last in official_intervals(num_frames, vlen)) == 0
    seen = set()
    for seed in range(300):
        drawn = draw_frames(vlen, num_frames=num_frames, random=stream(seed))
        assert len(drawn) == num_frames
        assert all(first < second for first, second in pairwise(drawn))
        seen |= set(drawn)
    assert seen == set(range(vlen))


def test_a_short_video_repeats_its_last_frame():
    assert draw_frames(3, num_frames=6, random=stream()) == [0, 1, 2, 2, 2, 2]
    assert draw_frames(1, num_frames=2, random=stream()) == [0, 0]


def test_the_number_of_frames_is_drawn_and_then_the_frames(movie):
    counts = set()
    for seed in range(15):
        random = stream(seed)
        num_frames = int(torch.randint(2, 5, (), generator=random))
        expected = draw_frames(60, num_frames=num_frames, random=random)
        shown = video_frames(movie, random=stream(seed), min_frames=2, max_frames=4, clip=[])
        assert numbers(shown) == expected
        counts.add(len(shown))
    assert counts == {2, 3, 4}


@pytest.mark.parametrize(
    ("clip", "frames"),
    [
        ((1.0, 2.5), range(10, 25)),
        ([0, 0.5], range(5)),
        ((5, 9.0), range(50, 60)),
        ((5, float("inf")), range(50, 60)),
    ],
)
def test_a_clip_shows_its_part(movie, clip, frames):
    shown = numbers(video_frames(movie, random=stream(), min_frames=32, clip=clip))
    assert sorted(set(shown)) == list(frames)
    assert shown[-1] == frames[-1]
    assert len(shown) == 32


@pytest.mark.parametrize(
    "clip",
    [
        *((6.5, 8.0), (2.0, 2.0), (3, 2), (-1, 2), (0, 0.01), (1e308, 1.7e308)),
        *((1,), (float("nan"), 1), ("a", 2), 5),
    ],
)
def test_a_clip_that_is_not_in_the_video_is_refused(movie, clip):
    with pytest.raises(SampleError, match=re.escape(str(movie)) + ".*'clip'"):
        video_frames(movie, random=stream(), clip=clip)


def test_a_folder_gives_its_files_in_the_order_of_their_numbers(tmp_path):
    folder = tmp_path
    for number in range(12):
        Image.new("L", (32, 32), number * 20).save(folder / f"frame_{number}.png")
    (folder / "notes.txt").write_text("no frame")
    (folder / ".hidden.png").write_text("no frame")
    frames = video_frames(folder, random=stream(), min_frames=32)
    in_order = [(folder / f"frame_{number}.png").read_bytes() for number in range(12)]
    assert frames == in_order  # all, none repeated
    few = video_frames(folder, random=stream(), min_frames=4, max_frames=4)
    assert [frames.index(frame) // 3 for frame in few] == [0, 1, 2, 3]
    with pytest.raises(SampleError, match="no frame rate"):
        video_frames(folder, random=stream(), clip=(0, 1))
    (folder / "frame_3.png").unlink()
    (folder / "frame_3.png").mkdir()
    with pytest.raises(SampleError, match=r"frame_3.png: Is a directory"):
        video_frames(folder, random=stream(), min_frames=32)


def test_any_names_have_an_order(tmp_path):
    names = ["1.jpg", "a1b2.jpg", "a1b10.jpg", "b.jpg", "10.JPG", "2.png"]
    for name in names:
        (tmp_path / name).write_bytes(b"")
    found = [file.name for file in frame_files(tmp_path)]
    assert found == ["1.jpg", "2.png", "10.JPG", "a1b2.jpg", "a1b10.jpg", "b.jpg"]


def test_other_codecs_and_a_gif_which_repeats_nothing(tmp_path):
    for codec in ("libvpx", "libvpx-vp9"):
        movie = write_video(tmp_path / f"{codec}.webm", 30, codec=codec)
        shown = numbers(video_frames(movie, random=stream(), min_frames=10, max_frames=10))
        assert [number // 3 for number in shown] == list(range(10)), codec
    animated = write_video(tmp_path / "movie.gif", 6, codec="gif")
    assert len(video_frames(animated, random=stream())) == 6
    assert len(video_frames(animated, random=stream(), min_frames=2, max_frames=2)) == 2


def test_frames_that_never_come_out_are_not_waited_for(movie, monkeypatch):
    """Codecs with hidden frames have more packets than frames; then the draw is among the
    frames."""
    monkeypatch.setattr(video, "_measure", lambda path: (90, None))
    shown = numbers(video_frames(movie, random=stream(), min_frames=32))
    assert len(shown) == 32
    assert max(shown) < 60
    assert shown[-1] > 50


def test_the_middle_of_each_segment(movie):
    # The official example: int(start + segment / 2 + round(segment * index)), with the last frame
    # as the end.
    expected = [int(0 + (59 / 8) / 2 + np.round(59 / 8 * index)) for index in range(8)]
    assert (
        numbers(middle_frames(movie, num_frames=8)) == expected == [3, 10, 18, 25, 33, 40, 47, 55]
    )


@pytest.mark.parametrize("suffix", ["mp4", "mkv", "avi"])
def test_a_video_cut_short_is_refused_by_name(tmp_path, suffix):
    whole = write_video(tmp_path / f"whole.{suffix}", 60).read_bytes()
    cut = tmp_path / f"cut.{suffix}"
    for part in (0, 0.01, 0.2, 0.5, 0.7):
        cut.write_bytes(whole[: int(part * len(whole))])
        with pytest.raises(SampleError, match=re.escape(str(cut))):
            video_frames(cut, random=stream())


def test_a_cut_video_with_its_index_in_front_is_refused(movie, tmp_path):
    """Players show what is left of such a file without a word."""
    import av

    front = tmp_path / "front.mp4"
    with (
        av.open(f"file:{movie}") as source,
        av.open(str(front), "w", options={"movflags": "faststart"}) as target,
    ):
        copied = target.add_stream_from_template(source.streams.video[0])
        for packet in source.demux(video=0):
            if packet.dts is not None:
                last = packet.size
                packet.stream = copied
                target.mux(packet)
    assert len(middle_frames(front, num_frames=3)) == 3
    whole = front.read_bytes()
    for lost, complete in ((1, 60), (last, 59), (last + 1, 59), (len(whole) // 3, "[0-9]+")):
        front.write_bytes(whole[:-lost])
        with pytest.raises(SampleError, match=rf"damaged or cut short: {complete} of 60 frames"):
            middle_frames(front, num_frames=3)


@pytest.mark.parametrize(
    ("prepare", "message"),
    [
        (lambda path: path.write_text("no video"), "not a readable video"),
        (lambda path: None, "not a readable video"),
        (lambda path: path.mkdir(), "no frame in it"),
        (os.mkfifo, "not a plain file but a device or a pipe"),
        (lambda path: path.write_text("#EXTM3U\n#EXTINF:2,\nhttp://x/\n"), "not a readable video"),
        (
            lambda path: path.write_text("ffconcat version 1.0\nfile a\n"),
            "not a readable video",
        ),
    ],
)
def test_what_is_no_video_is_refused_by_name(tmp_path, prepare, message):
    path = tmp_path / "movie.mp4"
    prepare(path)
    with pytest.raises(SampleError, match=f"{re.escape(str(path))}: {message}"):
        video_frames(path, random=stream())


def test_a_video_that_would_be_decoded_for_hours_is_refused(tmp_path, monkeypatch):
    movie = write_video(tmp_path / "movie.mp4", 50)
    monkeypatch.setattr(video, "MAX_DECODED_PIXELS", 1000)
    with pytest.raises(SampleError, match=r"movie.mp4: more than 1000 pixels up to its frame \d"):
        middle_frames(movie, num_frames=3)


def test_an_avi_whose_header_counts_a_frame_too_many_is_read(tmp_path):
    movie = write_video(tmp_path / "movie.avi", 50)
    content = bytearray(movie.read_bytes())
    counted = content.index(b"strh") + 8 + 32
    for more, is_read in ((1, True), (20, False)):
        struct.pack_into("<I", content, counted, 50 + more)
        movie.write_bytes(content)
        if is_read:
            assert len(middle_frames(movie, num_frames=3)) == 3
        else:
            with pytest.raises(SampleError, match="50 of 70 frames"):
                middle_frames(movie, num_frames=3)


@pytest.mark.parametrize("suffix", ["mp4", "gif", "mkv"])
def test_frames_with_too_many_pixels_are_refused_before_they_are_decoded(
    tmp_path, suffix, monkeypatch
):
    movie = write_video(tmp_path / f"m.{suffix}", 9, codec="gif" if suffix == "gif" else "mpeg4")
    monkeypatch.setitem(video._LIMITS, "max_pixels", str(64 * 48 - 1))
    with pytest.raises(SampleError, match="not a readable video of at most 3071 px a frame"):
        middle_frames(movie, num_frames=3)


def test_a_turned_phone(movie, tmp_path):
    """Whose file says in its track header (ISO 14496-12, 8.3.2) how it was held."""
    content = bytearray(movie.read_bytes())
    matrix = content.index(b"tkhd") + 44
    one = 1 << 16
    assert struct.unpack_from(">5i", content, matrix) == (one, 0, 0, 0, one)
    struct.pack_into(">5i", content, matrix, 0, one, 0, -one, 0)
    turned = tmp_path / "turned.mp4"
    turned.write_bytes(content)
    for frame, upright in zip(
        middle_frames(turned, num_frames=3), middle_frames(movie, num_frames=3), strict=True
    ):
        image, expected = (np.asarray(Image.open(io.BytesIO(each))) for each in (frame, upright))
        np.testing.assert_allclose(image, np.rot90(expected, -1), atol=2)  # JPEG; measured 0


def test_without_pyav_the_error_says_what_to_install(movie, monkeypatch):
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(ConfigError, match=r"pip install 'megatron_vico\[video\]'"):
        video_frames(movie, random=stream())


SYSTEM, ANSWER = Turn("system", "Be brief."), Turn("gpt", "A cat, <video>.")
FRAMES = "Frame-1: <image>\nFrame-2: <image>\n"


@pytest.mark.parametrize(
    ("question", "expected"),
    [
        ("<video>\nWhat?", f"{FRAMES}What?"),
        ("What?", f"{FRAMES}What?"),
        ("See\n<video>\nWhat?", f"See\n{FRAMES}What?"),
        ("See\n<video>", f"See\n{FRAMES}"),
        ("\nWhat?", f"{FRAMES}\nWhat?"),
    ],
)
@pytest.mark.parametrize("before", [(), (SYSTEM,)])
def test_the_text_of_frames(before, question, expected):
    turns = with_frames([*before, Turn("human", question), ANSWER], 2)
    assert turns == (*before, Turn("human", expected), ANSWER)


def test_a_tag_of_a_later_question_stays_there_and_text_may_differ():
    turns = [Turn("human", "Hi"), ANSWER, Turn("human", "<video>\nWhat?"), ANSWER]
    expected = (*turns[:2], Turn("human", "Frame1: <image>\nWhat?"), ANSWER)
    assert with_frames(turns, 1, frame_text=INFERENCE_TEXT) == expected
    assert with_frames([Turn("pretrain", "<video>\nA cat.")], 1) == (
        Turn("pretrain", "Frame-1: <image>\nA cat."),
    )


def test_a_video_is_encoded_as_one_tile_a_frame(movie, tokenizer):
    frames = video_frames(movie, random=stream(), min_frames=9, max_frames=9)
    turns = with_frames([Turn("human", "<video>\nWhat?"), ANSWER], len(frames))
    sample = ConversationSample(key="k", turns=turns, images=tuple(frames), max_dynamic_patch=1)
    encoded = SampleEncoder(tokenizer=tokenizer, settings=SETTINGS).encode(sample)
    assert encoded.tiles_per_image == (1,) * 9
    assert "Frame-9: <img><IMG_CONTEXT></img>\nWhat?" in tokenizer.decode(encoded.token_ids)
    assert numbers(frames) == [
        frame_number(Image.fromarray(tile.transpose(1, 2, 0))) for tile in encoded.tiles
    ]


@pytest.mark.parametrize(
    ("turns", "message"),
    [
        ([Turn("human", "<video><video>")], "'k': 2 <video> tags in 1 questions"),
        ([SYSTEM, ANSWER], "'k': 0 <video> tags in 0 questions"),
    ],
)
def test_several_tags_or_no_question_are_refused(turns, message):
    with pytest.raises(SampleError, match=message):
        with_frames(turns, 2, key="k")
