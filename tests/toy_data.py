"""Pictures and questions for the training tests: text only, one image and two images.

And videos whose frames show their number.
"""

import io
import json
import random
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from megatron_vico.data.shards.reader import ShardFolder

COLOURS = {
    "red": (200, 30, 30),
    "green": (30, 180, 40),
    "blue": (40, 60, 210),
    "grey": (128, 128, 128),
}


def write_conversations(
    folder: Path,
    *,
    num_samples: int,
    seed: int = 0,
    images_per_sample: Sequence[int] = (1, 1, 2, 0),
    noisy: bool = False,
) -> Path:
    """Images of stripes, and a JSONL file in the official chat format beside them: its path."""
    rng, noise = random.Random(seed), np.random.default_rng(seed)
    folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for index in range(num_samples):
        num_images = images_per_sample[index % len(images_per_sample)]
        names, words = [], []
        for image in range(num_images):
            size = rng.choice([(32, 32), (64, 64), (96, 32), (64, 32)])
            word = rng.choice(list(COLOURS))
            pixels = np.full((size[1], size[0], 3), COLOURS[word], dtype=np.uint8)
            pixels[:: rng.randint(2, 6)] //= 2
            if noisy:
                pixels = (pixels + noise.integers(0, 256, pixels.shape)).astype(
                    np.uint8
                )  # modulo 256
            names.append(f"{index:03d}_{image}.png")
            words.append(word)
            Image.fromarray(pixels).save(folder / names[-1])
        answer = " and ".join(words) if words else str(rng.randint(10, 999))
        question = f"{'<image>' * num_images}\nWhat colour?" if words else "Say a number."
        rows.append(
            {
                "id": f"toy/{index:03d}",
                **({"image": names if num_images > 1 else names[0]} if names else {}),
                "conversations": [
                    {"from": "system", "value": "Answer in few words."},
                    {"from": "human", "value": question},
                    {"from": "gpt", "value": answer},
                    {"from": "human", "value": "Again?"},
                    {"from": "gpt", "value": answer},
                ],
            }
        )
    path = folder / "conversations.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def noise_png(width: int, height: int, *, seed: int) -> bytes:
    """A file of noise."""
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    written = io.BytesIO()
    Image.fromarray(pixels).save(written, "PNG")
    return written.getvalue()


def break_image(shards: Path, number: int) -> str:
    """Overwrite the first image of a sample, as a bad disk would; returns the sample's key."""
    folder = ShardFolder.open(shards)
    sample, ends = folder.describe(number), np.cumsum(folder.samples_per_shard)
    shard = int(np.searchsorted(ends, number, side="right"))
    offset, size = sample.members[1]
    with (shards / folder.index.shards[shard].name).open("r+b") as file:
        file.seek(offset)
        file.write(b"x" * size)
    return sample.key


FRAME_STEP = 30
"""Grey levels that lie between digits of a frame's number; a lossy codec keeps them apart."""


def write_video(path: Path, num_frames: int, *, codec: str = "mpeg4", rate: int = 10) -> Path:
    """A video of 64 x 48 px that shows each frame's number, at most 63; returns its path.

    The number has two octal digits: a grey level in the left half and one in the right.
    """
    import av

    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=rate)
        stream.width, stream.height, stream.pix_fmt = (
            64,
            48,
            "rgb8" if codec == "gif" else "yuv420p",
        )
        for number in range(num_frames):
            levels = np.repeat(np.array(divmod(number, 8), dtype=np.uint8) * FRAME_STEP, 32)
            pixels = np.broadcast_to(levels[None, :, None], (48, 64, 3)).copy()
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
            container.mux(stream.encode(frame.reformat(format=stream.pix_fmt)))
        container.mux(stream.encode())
    return path


def frame_number(image: Image.Image) -> int:
    """The number that a frame of `write_video` shows."""
    pixels = np.asarray(image.convert("L"), dtype=np.float64)
    left, right = (round(half.mean() / FRAME_STEP) for half in np.split(pixels, 2, axis=1))
    return 8 * left + right
