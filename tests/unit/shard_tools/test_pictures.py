"""Contact sheets show each image where they say, with its grid; plots show given numbers."""

import itertools

import numpy as np
import pytest
from PIL import Image, ImageFont

from megatron_vico.data.encode.sample_encoder import EncodingSettings
from megatron_vico.data.pack.packing import PackLimits
from megatron_vico.data.samples import ConversationSample, Turn
from megatron_vico.shard_tools.contact_sheet import CARD_WIDTH, contact_sheet, wrap
from megatron_vico.shard_tools.plots import shard_figure
from megatron_vico.shard_tools.report import PackingFill, ShardStatistics
from megatron_vico.shard_tools.sample_view import view_image
from tests.toy_data import COLOURS
from tests.unit.shard_tools.test_sources import picture

SETTINGS = EncodingSettings(image_size=32)


def png(colour, width, height):
    return picture(COLOURS[colour], size=(width, height))


def make_sample(*images, tiles=(), question="What colour?", key="key"):
    turns = (Turn("human", "<image>\n" * len(images) + question), Turn("gpt", "answer"))
    sample = ConversationSample(key=key, turns=turns, images=images)
    counts = tiles or (1,) * len(images)
    return sample, [view_image(*each, SETTINGS) for each in zip(images, counts, strict=True)]


def test_each_image_is_where_the_sheet_says_with_its_grid():
    samples = [
        make_sample(png("red", 96, 64), tiles=(7,)),
        make_sample(png("green", 64, 64), png("blue", 32, 64), tiles=(1, 3)),
        make_sample(),
    ]
    sheet, sheet_boxes = contact_sheet(samples)
    pixels = np.asarray(sheet)
    assert [len(boxes) for boxes in sheet_boxes] == [1, 2, 0]
    assert sheet.width == 2 * CARD_WIDTH + 3 * 16
    drawn = [("red", 3, 2), ("green", 1, 1), ("blue", 1, 2)]
    boxes = [box for of_sample in sheet_boxes for box in of_sample]
    for (left, top, right, bottom), (colour, columns, rows) in zip(boxes, drawn, strict=True):
        inside = pixels[top:bottom, left:right]
        height, width, _ = inside.shape
        assert height == 150
        for row, column in itertools.product(range(rows), range(columns)):
            y, x = int((row + 0.5) * height / rows), int((column + 0.5) * width / columns)
            assert tuple(inside[y, x]) == COLOURS[colour]
        white = (inside == 255).all(axis=-1)
        assert white[5].sum() == columns - 1  # lines that run down
        assert white[:, 5].sum() == rows - 1
        assert (pixels[top - 2, left:right] == 255).all()  # the card above it


def test_no_image_overlaps_another_or_leaves_its_card():
    frames = [png(colour, 64, 36) for colour in COLOURS] * 20
    samples = [
        make_sample(*frames),
        make_sample(png("red", 2000, 20)),
        make_sample(png("red", 20, 2000), *frames[:6]),
    ]
    sheet, sheet_boxes = contact_sheet(samples)
    boxes = [box for each in sheet_boxes for box in each]
    assert len(sheet_boxes[0]) == 56  # of 80
    drawn = np.zeros((sheet.height, sheet.width), dtype=int)
    for left, top, right, bottom in boxes:
        assert right > left
        assert bottom > top
        drawn[top:bottom, left:right] += 1
        card = (left - 16) // (CARD_WIDTH + 16)
        assert 16 + card * (CARD_WIDTH + 16) <= left < right <= (card + 1) * (CARD_WIDTH + 16)
    assert drawn.max() == 1
    pixels = np.asarray(sheet)
    assert (pixels[-15:] == pixels[-1, -1]).all()  # nothing in the margin


def test_text_only_and_broken_images_have_a_card():
    samples = [make_sample(question="word " * 400), make_sample(b"no image")]
    sheet, sheet_boxes = contact_sheet(samples, columns=1)
    assert sheet.width == CARD_WIDTH + 32
    pixels = np.asarray(sheet)
    right_edge = (pixels[:, -28:-20] == pixels[30, -24]).all(axis=-1)
    assert right_edge.mean() > 0.9  # the text ends before it
    assert (pixels[20:120] < 100).any()  # and is there
    ((left, top, right, bottom),) = sheet_boxes[1]
    assert (pixels[top:bottom, left:right] == (0xF3, 0xC9, 0xC9)).all()


@pytest.mark.parametrize("text", ["", "one", "a few words, more than one", "x" * 300, "y " * 300])
def test_wrapped_lines_fit_and_lose_nothing_but_what_is_cut(text):
    font = ImageFont.load_default(14)
    lines = wrap(text, font, width=120, limit=3)
    assert len(lines) <= 3
    assert all(font.getlength(line) <= 120 for line in lines)
    whole = "".join(wrap(text, font, width=120, limit=10_000)).replace(" ", "")
    assert whole == text.replace(" ", "")
    if lines and lines[-1].endswith("..."):
        assert text.replace(" ", "").startswith("".join(lines).removesuffix("...").replace(" ", ""))
    else:
        assert "".join(lines).replace(" ", "") == whole


def make_statistics(num_images, *, packing=None):
    images = np.array(num_images)
    return ShardStatistics(
        num_tokens=10 + 100 * images,
        num_responses=np.arange(len(images)),
        num_tiles=3 * images,
        num_images=images,
        lengths=None if packing is None else 10 + 255 * 3 * images,
        packing=packing,
    )


def heights(panel):
    """Samples in a panel, by kind; stacked bars lie on those of the kinds before."""
    return [round(sum(patch.get_height() for patch in bars)) for bars in panel.containers]


def test_panels_count_every_sample_by_kind(tmp_path):
    limits = PackLimits(capacity=1000, max_tiles=10)
    columns = {"tokens": [900, 500], "tiles": [10, 2], "samples": [2, 4]}
    packs = {name: np.array(column) for name, column in columns.items()}
    fill = PackingFill(limits=limits, num_too_large=0, **packs)
    figure = shard_figure(make_statistics([0, 0, 1, 1, 1, 5], packing=fill), title="a folder")
    assert [panel.get_title() for panel in figure.axes] == [
        "tokens, uncompressed",
        "trained tokens",
        "packs, 70.0 % full in tokens",
        "tiles",
        "images",
        "packs, 60.0 % full in tiles",
    ]
    for number in (0, 1, 3, 4):
        assert heights(figure.axes[number]) == [2, 3, 1]
    bars = [patch for patch in figure.axes[2].patches if patch.get_height()]
    assert [(round(bar.get_x(), 1), bar.get_height()) for bar in bars] == [(50.0, 1), (90.0, 1)]
    assert figure.axes[2].get_xlabel() == "% of 1,000 tokens\n2 packs, 3.0 samples each"
    figure.savefig(tmp_path / "shards.png")
    assert Image.open(tmp_path / "shards.png").size == (1320, 660)


def test_a_data_set_without_packs_says_so():
    sums = dict.fromkeys(("tokens", "tiles", "samples"), np.array([], dtype=np.int64))
    fill = PackingFill(limits=PackLimits(capacity=1, max_tiles=1), num_too_large=2, **sums)
    figure = shard_figure(make_statistics([0, 1], packing=fill))
    titles = [figure.axes[number].get_title() for number in (2, 5)]
    assert titles == ["no packs, in tokens", "no packs, in tiles"]


@pytest.mark.parametrize("num_images", [[0], [0, 0], [64, 0, 1000]])
def test_odd_data_sets_are_drawn(tmp_path, num_images):
    figure = shard_figure(make_statistics(num_images))
    assert len(figure.axes) == 4
    for panel in figure.axes:
        assert sum(heights(panel)) == len(num_images)
    figure.savefig(tmp_path / "shards.png")
