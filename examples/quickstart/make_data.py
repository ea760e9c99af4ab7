"""Make the demo's data: images of four tiles, conversations about them, tokenizer text.

Each image is a 2x2 grid of tiles with one question per tile. How much of an image is dense text
varies strongly from image to image (a U-shaped Beta), as it does between a page and a photo, so
that choosing per tile can beat choosing per image. The same seed gives the same bytes.

Run: python examples/quickstart/make_data.py --out runs/demo/data
"""

import argparse
import importlib
import inspect
import json
import zlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image
from tiles import FONT_FOLDER, SPLITS, TILE_SIZE, Tile, TileMaker, photo_cells
from tqdm import tqdm

SYSTEM_TEXT = "Read the tiles."
QUESTIONS = ("tile one?", "tile two?", "tile three?", "tile four?")

# Share of each kind in a split's pool of tiles, and among the tiles of an image that are not dense.
POOL_SHARES = {"dense": 0.38, "glyph": 0.30, "photo": 0.20, "chart": 0.07, "blank": 0.05}
EASY_SHARES = {"glyph": 0.375, "photo": 0.40, "chart": 0.075, "blank": 0.15}
# Beta(0.4, 0.8) has mean 1/3 and its mass at both ends: two images in five have no dense tile.
DENSE_BETA = (0.4, 0.8)

DOCSTRING_MODULES = (
    "argparse",
    "collections",
    "csv",
    "datetime",
    "json",
    "logging",
    "random",
    "shutil",
    "textwrap",
)
MAX_TEXT_ROWS = 4000
TEMPLATE_ROLES = {"system": "system", "human": "user", "gpt": "assistant"}


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """How much of each split is made."""

    images: dict[str, int]
    pool_tiles: dict[str, int]


FULL = Sizes(
    images={"train": 20000, "val": 512, "test": 1536},
    pool_tiles={"train": 60000, "val": 8000, "test": 8000},
)
QUICK = Sizes(
    images={"train": 2000, "val": 64, "test": 96},
    pool_tiles={"train": 6000, "val": 256, "test": 384},
)


def make_split(
    split: str, *, num_images: int, num_pool_tiles: int, out_dir: Path, seed: int
) -> list[dict[str, object]]:
    """Draw a split's tiles, put them together into images, and write these with conversations.

    Args:
        split: train, val or test.
        num_images: images to write.
        num_pool_tiles: tiles drawn first; every image is a random combination of them.
        out_dir: gets SPLIT.jsonl and SPLIT/000000.png, ...
        seed: together with the split's name, decides everything.

    Returns:
        The rows of the JSONL file.
    """
    rng = np.random.default_rng([seed, zlib.crc32(split.encode())])
    maker = TileMaker(photo_cells()[split], rng=rng)
    pool = {
        kind: [maker.make(kind) for _ in range(max(1, round(num_pool_tiles * share)))]
        for kind, share in tqdm(POOL_SHARES.items(), desc=f"{split} tiles", leave=False)
    }
    (out_dir / split).mkdir(parents=True, exist_ok=True)
    rows = []
    for index in tqdm(range(num_images), desc=f"{split} images", mininterval=1.0):
        tiles = [pool[kind][rng.integers(len(pool[kind]))] for kind in image_composition(rng)]
        name = f"{split}/{index:06d}.png"
        # Level 1: files are read far more often than written, and noise does not compress anyway.
        image_of(tiles).save(out_dir / name, compress_level=1)
        rows.append(row_of(name, tiles=tiles))
    with open(out_dir / f"{split}.jsonl", "w", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
    return rows


def image_composition(rng: np.random.Generator) -> list[str]:
    """Kinds of an image's tiles: each dense with the image's own probability, else an easy kind."""
    dense_probability = rng.beta(*DENSE_BETA)
    easy = rng.choice(list(EASY_SHARES), size=4, p=list(EASY_SHARES.values()))
    is_dense = rng.random(4) < dense_probability
    return [("dense" if dense else str(kind)) for dense, kind in zip(is_dense, easy, strict=True)]


def image_of(tiles: list[Tile]) -> Image.Image:
    """Put four tiles into a 2x2 grid, row by row, as the official tiling takes it apart again."""
    top = np.concatenate([tiles[0].pixels, tiles[1].pixels], axis=1)
    bottom = np.concatenate([tiles[2].pixels, tiles[3].pixels], axis=1)
    return Image.fromarray(np.concatenate([top, bottom], axis=0))


def row_of(name: str, *, tiles: list[Tile]) -> dict[str, object]:
    """A line of the JSONL file: the official chat format, with `kinds` and `metrics`."""
    turns = [{"from": "system", "value": SYSTEM_TEXT}]
    for index, tile in enumerate(tiles):
        prefix = "<image>\n" if index == 0 else ""
        turns.append({"from": "human", "value": prefix + QUESTIONS[index]})
        turns.append({"from": "gpt", "value": tile.answer})
    return {
        "id": name.removesuffix(".png"),
        "image": name,
        "width": 2 * TILE_SIZE,
        "height": 2 * TILE_SIZE,
        "conversations": turns,
        "kinds": [tile.kind for tile in tiles],
        "metrics": ["anls" if tile.kind == "dense" else "exact" for tile in tiles],
    }


def tokenizer_text(rows: list[dict[str, object]]) -> Iterator[str]:
    """Lines to train the tokenizer on: the conversations, and English that comes with Python."""
    for row in rows[:MAX_TEXT_ROWS]:
        turns = row["conversations"]
        assert isinstance(turns, list)
        for turn in turns:
            # The template puts these names before each turn; turns are tokenized one by one.
            yield TEMPLATE_ROLES[turn["from"]]
            yield turn["value"].removeprefix("<image>\n")
    yield from (FONT_FOLDER / "LICENSE_DEJAVU").read_text(encoding="utf-8").splitlines()
    for name in DOCSTRING_MODULES:
        module = importlib.import_module(name)
        members = [
            module,
            *(
                member
                for _, member in sorted(inspect.getmembers(module, callable), key=lambda m: m[0])
            ),
        ]
        for member in members:
            yield from (inspect.getdoc(member) or "").splitlines()


def main() -> None:
    """Write all splits, the tokenizer's text, and last a summary: it says that all is there."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument(
        "--out", type=Path, default=Path("runs/demo/data"), help="folder to write to"
    )
    parser.add_argument(
        "--seed",
        type=int,
        default=1234,
        help="another seed draws other tiles, not other photo cells",
    )
    parser.add_argument(
        "--quick", action="store_true", help="a tenth of the data: mechanics, not quality"
    )
    args = parser.parse_args()
    sizes = QUICK if args.quick else FULL
    summary: dict[str, object] = {"seed": args.seed, "images": sizes.images}
    for split in SPLITS:
        rows = make_split(
            split,
            num_images=sizes.images[split],
            num_pool_tiles=sizes.pool_tiles[split],
            out_dir=args.out,
            seed=args.seed,
        )
        kinds = Counter(str(kind) for row in rows for kind in row["kinds"])  # type: ignore[attr-defined]
        shares = {kind: round(count / kinds.total(), 4) for kind, count in sorted(kinds.items())}
        summary[f"{split}_tile_shares"] = shares
        print(
            f"{split}: {len(rows)} images; tiles: "
            + ", ".join(f"{k} {v:.1%}" for k, v in shares.items())
        )
        if split == "train":
            (args.out / "text.txt").write_text(
                "\n".join(tokenizer_text(rows)) + "\n", encoding="utf-8"
            )
    (args.out / "summary.json").write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
