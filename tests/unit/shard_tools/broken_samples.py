"""Conversations that cannot be a sample, each with the cause under which it is counted."""

import io
import json
import os

from PIL import Image

from megatron_vico.data.records import MAX_LINE_BYTES


def picture(colour=(200, 30, 30), size=(32, 32), kind="PNG"):
    written = io.BytesIO()
    Image.new("RGB", size, colour).save(written, kind)
    return written.getvalue()


def row(question="What?", *, answer="red", **media):
    turns = [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
    return json.dumps({**media, "conversations": turns}).encode()


def frames_of(tmp_path, name="clip", number=40):
    folder = tmp_path / name
    folder.mkdir(parents=True)
    for i in range(number):
        (folder / f"{i}.png").write_bytes(picture((i, 0, 0), size=(64, 32)))


def make_media(folder):
    """The files that the conversations below name."""
    frames_of(folder, number=2)
    (folder / "a.png").write_bytes(picture())
    (folder / "bad.png").write_bytes(picture()[:40])
    os.mkfifo(folder / "pipe")
    (folder / "link.png").symlink_to("/etc/passwd")


BROKEN = [
    (row(video="none"), "broken video", "none"),
    (row(video="clip", clip=3), "broken video", r"'clip' is 3; expected \[start, end\]"),
    (row(video=["clip"]), "broken line", r"'video' is \['clip'\]"),
    (row(video="clip", image="a.png"), "broken line", "expected the path of one video, or images"),
    (row("<video><video>", video="clip"), "wrong conversation", "2 <video> tags"),
    (row(image="x.png"), "missing file", "image 'x.png' cannot be read"),
    (row(image="\0"), "broken path", "null byte"),
    (row(image="/etc/passwd"), "broken path", "leads out of .*--allow-outside-root"),
    (row(image="clip/../../x.png"), "broken path", "leads out of"),
    (row(image="link.png"), "broken path", "'link.png' leads out of"),
    (row(video="../clip"), "broken path", "leads out of"),
    (row(image="pipe"), "missing file", "not a plain file but a device or a pipe"),
    (row(video="pipe"), "broken video", "not a plain file but a device or a pipe"),
    (row(images=["a.png"]), "broken line", "media under 'images'.*rename the key 'image'"),
    (row(img_path="a.png"), "broken line", "media under 'img_path'"),
    (row(image=["a.png"] * 1025), "broken line", "1025 images; expected at most 1024"),
    (row(max_dynamic_patch=10**9), "broken line", "whole number from 1 to 256"),
    (b"[" * 100_000, "broken line", "broken JSON"),
    (b"[" + b" " * MAX_LINE_BYTES, "broken line", r"more than \d+ bytes of JSON"),
    (
        row("<video> <image>", video="clip"),
        "wrong conversation",
        "1 <video> and 1 <image> tags in 1",
    ),
    (row(image="clip"), "missing file", "Is a directory"),
    (row(image="bad.png"), "broken image", "cannot be decoded"),
    (row("<image><image>", image="a.png"), "wrong conversation", "2 <image> tags but 1 images"),
    (row("<image>", image=["a.png"] * 2), "wrong conversation", "1 <image> tags but 2 images"),
    (row(answer=""), "wrong conversation", "turn 2 is an empty answer"),
    (row(image={"path": "a.png"}), "broken line", "expected a path or a list of paths"),
    (b"{", "broken line", "broken JSON"),
]
"""Line of JSONL, cause, words of the message as a regular expression."""
