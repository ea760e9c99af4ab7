"""Shards give back what went in, any WebDataset reader reads them, and each kind of damage is
named."""

import io
import json
import pickle
import shutil

import numpy as np
import pytest
import webdataset
from PIL import Image

from megatron_vico.data.encode.sample_encoder import EncodingSettings, SampleEncoder
from megatron_vico.data.samples import ConversationSample, Turn
from megatron_vico.data.shards.reader import ShardFolder, parse_sample, sample_json
from megatron_vico.errors import ConfigError, SampleError
from megatron_vico.shard_tools.options import WriterOptions
from megatron_vico.shard_tools.reindex import index_shards
from megatron_vico.shard_tools.writer import make_shards
from tests.unit.conftest import NUM_SAMPLES, SETTINGS

QUIET = WriterOptions(show_progress=False)


def keys_of(path):
    folder = ShardFolder.open(path)
    return [folder.describe(number).key for number in range(len(folder))]


def jpeg():
    written = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(
        written, "JPEG"
    )
    return written.getvalue()


def row(image="a.jpg", question="<image>\nWhat?", answer="red"):
    turns = [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
    return json.dumps({"conversations": turns, **({"image": image} if image else {})})


def write(tmp_path, lines, *, tokenizer, **options):
    """make_shards of these lines, with one good image a.jpg and one truncated image cut.jpg."""
    (tmp_path / "a.jpg").write_bytes(jpeg())
    (tmp_path / "cut.jpg").write_bytes(jpeg()[:700])
    (tmp_path / "data.jsonl").write_text("\n".join(lines) + "\n")
    return make_shards(
        tmp_path / "data.jsonl",
        image_root=tmp_path,
        out_dir=tmp_path / "out",
        tokenizer=tokenizer,
        settings=SETTINGS,
        options=WriterOptions(show_progress=False, **options),
    )


def test_samples_come_back_in_any_order(shards, conversations, tokenizer):
    folder = ShardFolder.open(shards, verify="sha256")
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
    files = sorted(str(path) for path in shards.glob("*.tar"))
    samples = list(webdataset.WebDataset(files, shardshuffle=False))
    assert [sample["__key__"] for sample in samples] == keys_of(shards)
    assert sum("1.png" in sample for sample in samples) == sum(
        "_1.png" in line for line in conversations.open()
    )


def test_a_pickled_folder_reads_on(shards):
    folder = ShardFolder.open(shards)
    first = folder.read(0)
    assert pickle.loads(pickle.dumps(folder)).read(0) == first


def test_more_than_ten_images_keep_their_order(tmp_path, tokenizer):
    colours = [bytes([i, 0, 0]) for i in range(12)]
    for i, colour in enumerate(colours):
        Image.frombytes("RGB", (8, 8), colour * 64).save(tmp_path / f"{i}.png")
    lines = [row(image=[f"{i}.png" for i in range(12)], question="<image>" * 12)]
    write(tmp_path, lines, tokenizer=tokenizer)
    encoder = SampleEncoder(tokenizer=tokenizer, settings=SETTINGS)
    encoded = encoder.encode(ShardFolder.open(tmp_path / "out").read(0))
    assert encoded.tiles[:, 0, 0, 0].tolist() == list(range(12))


@pytest.mark.parametrize("stem", ["\u6570\u636e", "long" * 30, "n" * 86])
def test_names_that_a_tar_header_cannot_hold(tmp_path, tokenizer, stem):
    source = tmp_path / f"{stem}.jsonl"
    source.write_text("".join(row(image=None, question=f"{n}?") + "\n" for n in range(3)))
    make_shards(
        source,
        image_root=tmp_path,
        out_dir=tmp_path / "out",
        tokenizer=tokenizer,
        settings=SETTINGS,
        options=QUIET,
    )
    folder = ShardFolder.open(tmp_path / "out")
    assert [folder.read(number).turns[0].text for number in range(3)] == ["0?", "1?", "2?"]
    assert folder.read(2).key == f"{stem}-00000003"


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (row(image="none.jpg"), r"data.jsonl:2: .*image 'none.jpg' cannot be read"),
        (
            row(image="cut.jpg"),
            r"data.jsonl:2: sample 'data-00000002': image 0 .* cannot be decoded",
        ),
        (row()[:40], r"data.jsonl:2: .*broken JSON"),
        (row(question="<image><image>"), r"data.jsonl:2: .*2 <image> tags but 1 images"),
        (row(image=None), r"data.jsonl:2: .*1 <image> tags but 0 images"),
        (row(image=["a.jpg", "a.jpg"]), r"data.jsonl:2: .*1 <image> tags but 2 images"),
        (row(answer=""), r"data.jsonl:2: .*turn 2 is an empty answer"),
        ("[1, 2]", r"data.jsonl:2: .*no list 'conversations'"),
        (
            json.dumps({"conversations": [{"from": "gpd", "value": "x"}]}),
            r"data.jsonl:2: .*did you mean 'gpt'",
        ),
        (json.dumps({"conversations": [{"from": "gpt"}]}), r"data.jsonl:2: .*turn 1 has no text"),
        (
            json.dumps({"video": "v.mp4", "conversations": [{"from": "gpt", "value": "x"}]}),
            r"broken video: .*v.mp4",
        ),
        (row(image={"path": "a.jpg"}), "expected a path or a list of paths"),
    ],
)
def test_a_bad_line_is_named_or_left_out_and_counted(tmp_path, tokenizer, line, message):
    lines = [row(), line, row()]
    with pytest.raises(SampleError, match=message):
        write(tmp_path, lines, tokenizer=tokenizer)
    assert not (tmp_path / "out").exists()  # nothing half-made under its name
    index = write(tmp_path, lines, tokenizer=tokenizer, max_skipped=1)
    assert len(index.skipped) == 1
    assert keys_of(tmp_path / "out") == ["data-00000001", "data-00000003"]


def test_nothing_is_overwritten_and_an_empty_file_is_refused(tmp_path, tokenizer):
    write(tmp_path, [row()], tokenizer=tokenizer)
    with pytest.raises(
        ConfigError, match="not empty, and made from something else: sha256 of the JSONL was"
    ):
        write(tmp_path, [row(), row()], tokenizer=tokenizer)
    (tmp_path / "out" / "made.json").unlink()
    with pytest.raises(ConfigError, match="not empty; give a folder that does not exist"):
        write(tmp_path, [row()], tokenizer=tokenizer)
    shutil.rmtree(tmp_path / "out")
    with pytest.raises(SampleError, match="no sample in it"):
        write(tmp_path, [""], tokenizer=tokenizer)
    with pytest.raises(ConfigError, match="no such file"):
        make_shards(
            tmp_path / "x",
            image_root=tmp_path,
            out_dir=tmp_path / "out",
            tokenizer=tokenizer,
            settings=SETTINGS,
        )


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


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        (
            {},
            {
                "conversations": [
                    {"from": "human", "value": "Hi \u00e9"},
                    {"from": "gpt", "value": "yes"},
                ]
            },
        ),
        (
            {"max_dynamic_patch": 1, "data_augment": True},
            {"max_dynamic_patch": 1, "data_augment": True},
        ),
    ],
)
def test_the_json_of_a_sample_is_read_back(fields, expected):
    sample = ConversationSample(
        key="k", turns=(Turn("human", "Hi \u00e9"), Turn("gpt", "yes")), images=(b"1",), **fields
    )
    content = sample_json(sample)
    assert parse_sample(content, key="k", images=[b"1"], where="f") == sample
    record = json.loads(content)
    assert expected.items() <= record.items()
    assert record.keys() == {"conversations", *fields}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        *[
            ({"max_dynamic_patch": wrong}, "'max_dynamic_patch' is")
            for wrong in (0, -1, 1.0, "2", True, [1])
        ],
        *[({"data_augment": wrong}, "'data_augment' is") for wrong in (None, 1, "true")],
    ],
)
def test_fields_of_the_wrong_kind_are_refused(fields, message):
    with pytest.raises(SampleError, match=f"f:1: sample 'k': {message}"):
        parse_sample(
            json.dumps({**json.loads(row()), **fields}).encode(), key="k", images=(), where="f:1"
        )


@pytest.mark.parametrize(
    "content",
    [b"{", b"\xff", b"[" * 100_000, b'{"n": 1' + b"0" * 5000 + b"}", row(answer="\ud800").encode()],
)
def test_broken_json_is_refused(content):
    """Cut, no UTF-8, nested too deep, a number too long, half a character."""
    with pytest.raises(SampleError, match="f:1: sample 'k': broken JSON"):
        parse_sample(content, key="k", images=(), where="f:1")


def test_shards_keep_what_a_data_set_says_of_its_samples(tmp_path, tokenizer):
    line = json.dumps({**json.loads(row()), "max_dynamic_patch": 1, "data_augment": True})
    write(tmp_path, [line], tokenizer=tokenizer)
    folder = ShardFolder.open(tmp_path / "out")
    sample = folder.read(0)
    assert (sample.max_dynamic_patch, sample.data_augment) == (1, True)
    assert folder.num_tiles[0] == 1
