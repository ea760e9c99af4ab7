"""Shards give back what went in, and any WebDataset reader reads them."""

import json

import numpy as np
import pytest
import webdataset

from megatron_vico.data.encode.sample_encoder import EncodingSettings, SampleEncoder
from megatron_vico.data.samples import ConversationSample, Turn
from megatron_vico.data.shards.reader import ShardFolder, parse_sample, sample_json
from megatron_vico.errors import ConfigError, SampleError
from megatron_vico.shard_tools.reindex import index_shards
from tests.unit.conftest import NUM_SAMPLES, SETTINGS
from tests.unit.shard_tools.test_sources import picture, row


def test_samples_come_back_in_any_order(shards, conversations, tokenizer):
    folder = ShardFolder.open(shards)
    lines = [json.loads(line) for line in conversations.read_text().splitlines()]
    assert len(folder) == len(lines) == NUM_SAMPLES
    assert len(folder.index.shards) == 3
    encoder = SampleEncoder(tokenizer=tokenizer, settings=SETTINGS)
    for number in np.random.default_rng(0).permutation(NUM_SAMPLES).tolist():
        sample, line = folder.read(number), lines[number]
        assert [(turn.role, turn.text) for turn in sample.turns] == [
            (turn["from"], turn["value"]) for turn in line["conversations"]
        ]
        names = line.get("image", [])
        names = [names] if isinstance(names, str) else names
        assert sample.images == tuple((conversations.parent / name).read_bytes() for name in names)
        encoded = encoder.encode(sample)
        assert encoded.key == folder.describe(number).key
        assert encoded.tiles_per_image == folder.describe(number).tiles_per_image
        assert encoded.num_tiles == folder.num_tiles[number]
        assert encoded.token_ids.size == folder.num_tokens[number]
        assert encoded.labels.size == folder.num_responses[number]
        blank = encoder.encode_blank(sample)
        assert blank.tiles_per_image == encoded.tiles_per_image
        assert blank.tiles.shape == encoded.tiles.shape
        assert blank.token_ids.tolist() == encoded.token_ids.tolist()
        assert blank.is_response.tolist() == encoded.is_response.tolist()


def test_any_webdataset_reader_reads_the_shards(shards, conversations):
    folder = ShardFolder.open(shards)
    files = sorted(str(path) for path in shards.glob("*.tar"))
    samples = list(webdataset.WebDataset(files, shardshuffle=False))
    keys = [folder.describe(number).key for number in range(len(folder))]
    assert [sample["__key__"] for sample in samples] == keys
    second_images = sum("_1.png" in line for line in conversations.open())
    assert sum("1.png" in sample for sample in samples) == second_images


def test_more_than_ten_images_keep_their_order(tmp_path, make, tokenizer):
    names = [f"{i}.png" for i in range(12)]
    for i, name in enumerate(names):
        (tmp_path / name).write_bytes(picture((i, 0, 0), size=(8, 8)))
    (tmp_path / "data.jsonl").write_bytes(row("<image>" * 12, image=names))
    make(tmp_path / "data.jsonl", tmp_path / "out")
    encoder = SampleEncoder(tokenizer=tokenizer, settings=SETTINGS)
    encoded = encoder.encode(ShardFolder.open(tmp_path / "out").read(0))
    assert encoded.tiles[:, 0, 0, 0].tolist() == list(range(12))


@pytest.mark.parametrize("stem", ["\u6570\u636e", "long" * 30, "n" * 86])
def test_names_that_a_tar_header_cannot_hold(tmp_path, make, stem):
    source = tmp_path / f"{stem}.jsonl"
    source.write_bytes(b"\n".join(row(f"{n}?") for n in range(3)))
    make(source, tmp_path / "out")
    folder = ShardFolder.open(tmp_path / "out")
    assert [folder.read(number).turns[0].text for number in range(3)] == ["0?", "1?", "2?"]
    assert folder.read(2).key == f"{stem}-00000003"


def test_an_index_of_another_tokenizer_or_tiling_is_refused(copy, tokenizer):
    folder = ShardFolder.open(copy)
    folder.check_encoding(tokenizer=tokenizer, settings=SETTINGS)
    other = EncodingSettings(image_size=32, max_dynamic_patch=1, use_thumbnail=True)
    with pytest.raises(ConfigError, match=r"max_dynamic_patch=4.*not.*max_dynamic_patch=1"):
        folder.check_encoding(tokenizer=tokenizer, settings=other)
    index_shards(copy, tokenizer=tokenizer, settings=other)
    again = ShardFolder.open(copy)
    again.check_encoding(tokenizer=tokenizer, settings=other)
    assert again.num_tiles.max() == 2
    assert folder.num_tiles.max() > 2


@pytest.mark.parametrize("fields", [{}, {"max_dynamic_patch": 1, "data_augment": True}])
def test_the_json_of_a_sample_is_read_back(fields):
    turns = (Turn("human", "Hi \u00e9"), Turn("gpt", "yes"))
    sample = ConversationSample(key="k", turns=turns, images=(b"1",), **fields)
    content = sample_json(sample)
    assert parse_sample(content, key="k", images=[b"1"], where="f") == sample
    said = [{"from": "human", "value": "Hi \u00e9"}, {"from": "gpt", "value": "yes"}]
    assert json.loads(content) == {"conversations": said, **fields}


BAD_JSON = {
    "cut": b"{",
    "no UTF-8": b"\xff",
    "nested too deep": b"[" * 100_000,
    "a number too long": b'{"n": 1' + b"0" * 5000 + b"}",
    "half a character": row("\ud800"),
}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        *((content, r"broken JSON \(") for content in BAD_JSON.values()),
        *(
            (row(max_dynamic_patch=wrong), "'max_dynamic_patch' is")
            for wrong in (0, -1, 1.0, "2", True, [1])
        ),
        *((row(data_augment=wrong), "'data_augment' is") for wrong in (None, 1, "true")),
        (b"[1, 2]", "no list 'conversations'"),
        (b'{"conversations": [{"from": "gpd", "value": "x"}]}', "turn 1 .* did you mean 'gpt'"),
        (b'{"conversations": [{"from": "gpt"}]}', "turn 1 has no text 'value'"),
        (b'{"conversations": ["x"]}', "turn 1 is from None"),
    ],
)
def test_what_is_no_conversation_is_named(content, message):
    with pytest.raises(SampleError, match=f"^f:1: sample 'k': {message}"):
        parse_sample(content, key="k", images=(), where="f:1")
