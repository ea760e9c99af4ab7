"""The demo's data: disjoint splits, stated shares, reproducible bytes, the official chat format."""

import json
import re
from collections import Counter

import make_data
import numpy as np
import pytest
import tiles
from PIL import Image

from megatron_vico.data.encode.tiling import tile


@pytest.fixture(scope="module")
def cells():
    return tiles.photo_cells()


def test_no_photo_cell_is_in_two_splits(cells):
    owner = {}
    for split, classes in cells.items():
        for name, found in classes.items():
            assert len(found) >= 2, (split, name)
            for cell in found:
                assert owner.setdefault(cell.tobytes(), split) == split
    assert Counter(owner.values())["train"] > 100


def test_cells_of_one_photo_never_overlap(monkeypatch):
    # Give every pixel of a photo its own colour, so that a shared pixel would show up as a shared
    # colour.
    height, width = 240, 300
    index = np.arange(height * width, dtype=np.uint32).reshape(height, width)
    pixels = np.stack([index & 255, (index >> 8) & 255, index >> 16], axis=-1).astype(np.uint8)
    monkeypatch.setattr(tiles.Image, "open", lambda _: Image.fromarray(pixels))
    found = tiles._cut("any", shrink=False)
    colours = np.concatenate([cell.reshape(-1, 3) for cell in found])
    assert len(found) == 5 * 6
    assert len(np.unique(colours, axis=0)) == len(colours)


@pytest.mark.parametrize(
    ("kind", "pattern"),
    [
        ("dense", r"\d{4}"),
        ("glyph", r"\d"),
        ("chart", r"[234] bars"),
        ("blank", "blank"),
        ("photo", "[a-z]+"),
    ],
)
def test_tiles_have_the_size_and_answer_of_their_kind(cells, kind, pattern):
    maker = tiles.TileMaker(cells["val"], rng=np.random.default_rng(0))
    for _ in range(20):
        made = maker.make(kind)
        assert made.pixels.shape == (32, 32, 3)
        assert made.pixels.dtype == np.uint8
        assert made.kind == kind
        assert re.fullmatch(pattern, made.answer)
        assert kind != "photo" or made.answer in tiles.PHOTOS


def test_dense_digits_stay_inside_the_tile(cells):
    # Paper at the border on all four sides: nothing of a digit is cut off by jitter.
    maker = tiles.TileMaker(cells["val"], rng=np.random.default_rng(1))
    for kind in ("dense", "glyph"):
        for _ in range(300):
            pixels = maker.make(kind).pixels
            border = np.concatenate([pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]])
            assert (border == border[0]).all()


def test_composition_is_a_third_dense_and_u_shaped():
    rng = np.random.default_rng(0)
    images = [make_data.image_composition(rng) for _ in range(8000)]
    dense = np.array([image.count("dense") for image in images])
    # Exact values of Beta-binomial(4; 0.4, 0.8): mean 1/3, P(0) = 0.430, P(4) = 0.127. Measured:
    # 0.3306, 0.432, 0.124.
    assert abs(dense.mean() / 4 - 1 / 3) < 0.015
    assert abs((dense == 0).mean() - 0.430) < 0.02
    assert abs((dense == 4).mean() - 0.127) < 0.015
    # The router's labels call 60 % of tiles compressible: there must be more easy tiles than that.
    assert 1 - dense.mean() / 4 > 0.60


def test_image_is_taken_apart_into_the_same_tiles(cells):
    maker = tiles.TileMaker(cells["val"], rng=np.random.default_rng(2))
    made = [maker.make(kind) for kind in ("dense", "photo", "blank", "chart")]
    found = tile(make_data.image_of(made), image_size=32, max_dynamic_patch=4, use_thumbnail=False)
    assert np.array_equal(found, np.stack([each.pixels.transpose(2, 0, 1) for each in made]))


def test_same_seed_gives_same_bytes_and_another_seed_does_not(tmp_path):
    def make(name, seed):
        make_data.make_split(
            "val", num_images=4, num_pool_tiles=40, out_dir=tmp_path / name, seed=seed
        )
        files = sorted(path for path in (tmp_path / name).rglob("*") if path.is_file())
        return [path.read_bytes() for path in files]

    first, again, other = make("a", 7), make("b", 7), make("c", 8)
    assert len(first) == 5
    assert first == again
    assert first != other


def test_rows_are_in_the_official_chat_format(tmp_path):
    make_data.make_split("val", num_images=3, num_pool_tiles=40, out_dir=tmp_path, seed=0)
    rows = [json.loads(line) for line in (tmp_path / "val.jsonl").read_text().splitlines()]
    assert len(rows) == 3
    for row in rows:
        turns = row["conversations"]
        assert [turn["from"] for turn in turns] == ["system"] + ["human", "gpt"] * 4
        assert [turn["value"].count("<image>") for turn in turns] == [0, 1] + [0] * 7
        assert all(turn["value"] for turn in turns)
        assert len(row["kinds"]) == 4
        assert Image.open(tmp_path / row["image"]).size == (row["width"], row["height"]) == (64, 64)


def test_tokenizer_text_holds_conversations_and_english(tmp_path):
    rows = make_data.make_split("val", num_images=2, num_pool_tiles=40, out_dir=tmp_path, seed=0)
    lines = list(make_data.tokenizer_text(rows))
    assert all("\n" not in line for line in lines)
    text = "\n".join(lines)
    assert make_data.SYSTEM_TEXT in text
    assert "tile four?" in text
    assert "Command-line parsing library" in text
    assert "Bitstream Vera" in text
