"""A tokenizer, a folder of shards and loaders of it that the data tests share."""

import collections
import dataclasses
import itertools
import shutil
from pathlib import Path

import pytest
import torch

from megatron_vico.config.schema import DataOptions
from megatron_vico.data.encode.sample_encoder import EncodingSettings, SampleEncoder
from megatron_vico.data.encode.tokenizer import Tokenizer, load_tokenizer, train_sentencepiece
from megatron_vico.data.load.loader import Loader, open_plan
from megatron_vico.data.pack.balance import PackCost
from megatron_vico.data.pack.builder import PackBuilder
from megatron_vico.data.samples import map_tensors
from megatron_vico.shard_tools.options import WriterOptions
from megatron_vico.shard_tools.writer import make_shards
from tests.packs import whole_packs
from tests.toy_data import write_conversations

NUM_SAMPLES = 42
SETTINGS = EncodingSettings(image_size=32, max_dynamic_patch=4, use_thumbnail=True)
BUILDER = PackBuilder(
    stage="consistency", seed=7, tokens_kept=4, tokens_compressed=1, image_token_id=5
)
GLOBAL_BATCH = 4
COST = PackCost(
    per_token=20.0,
    per_token_squared=0.5,
    per_tile=300.0,
    full_passes=1.0,
    compressed_passes=3.0,
    saved_per_tile=1.5,
)


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory) -> Tokenizer:
    texts = [
        "Answer in few words.",
        "What colour?",
        "red and green",
        "system user assistant",
        "aaaa aa ------ 12 345",
    ]
    return load_tokenizer(
        train_sentencepiece(texts * 4, model_prefix=tmp_path_factory.mktemp("tok") / "toy")
    )


@pytest.fixture(scope="session")
def conversations(tmp_path_factory) -> Path:
    """A JSONL file with text-only, one-image and two-image samples; images lie beside it."""
    return write_conversations(tmp_path_factory.mktemp("conversations"), num_samples=NUM_SAMPLES)


@pytest.fixture(scope="session")
def make(tokenizer):
    """make(jsonl, out, **WriterOptions): the index of the shards made of it, without a bar."""

    def call(jsonl, out, **options):
        return make_shards(
            jsonl,
            image_root=jsonl.parent,
            out_dir=out,
            tokenizer=tokenizer,
            settings=SETTINGS,
            options=WriterOptions(show_progress=False, **options),
        )

    return call


@pytest.fixture(scope="session")
def shards(conversations, make, tmp_path_factory) -> Path:
    """The same samples as shards: tar files of 16, 16 and 10."""
    folder = tmp_path_factory.mktemp("data") / "shards"
    make(conversations, folder, samples_per_shard=16)
    return folder


@pytest.fixture
def copy(shards, tmp_path) -> Path:
    """A copy of the shards that may be damaged."""
    return shutil.copytree(shards, tmp_path / "shards")


@pytest.fixture(scope="module")
def options(shards):
    return DataOptions(
        data_path=(str(shards),),
        seq_length=400,
        max_tiles_per_pack=20,
        max_samples_per_pack=3,
        packing_window=16,
        max_dynamic_patch=4,
        num_workers=0,
    )


@pytest.fixture(scope="module")
def load(options, tokenizer):
    """loader(**overrides) of the options, of the builder's fields, or of Loader's arguments."""

    def make(**overrides):
        data = {
            k: overrides.pop(k)
            for k in list(overrides)
            if k in {f.name for f in dataclasses.fields(DataOptions)}
        }
        of_builder = {f.name for f in dataclasses.fields(PackBuilder)}
        fields = {k: overrides.pop(k) for k in list(overrides) if k in of_builder}
        changed = dataclasses.replace(options, **data)
        settings = EncodingSettings.from_options(changed, image_size=32)
        builder = dataclasses.replace(BUILDER, **fields)
        batch = overrides.pop("global_batch_size", GLOBAL_BATCH)
        return Loader(
            open_plan(changed, builder=builder, global_batch_size=batch),
            encoder=SampleEncoder(tokenizer=tokenizer, settings=settings),
            builder=builder,
            **overrides,
        )

    return make


def take(loader, steps):
    """The packs of the next steps, each with its tiles."""
    return [whole_packs(blocks) for blocks in itertools.islice(iter(loader), steps)]


def step_plan(plan, step):
    return next(itertools.islice(plan.steps(), step, None))


def flat(batch):
    """Everything in a batch as text, so that == compares it."""
    return repr(
        map_tensors(batch, lambda tensor: (tensor.dtype, tensor.shape, tensor.numpy().tobytes()))
    )


def joined(parts):
    """The parts of one pack as text: what its samples have, wherever it was cut."""
    parts = sorted(parts, key=lambda part: part.first_sample)
    views = [[part.reference for part in parts]]
    views += list(zip(*(part.policies for part in parts), strict=True))
    tensors = [
        *([getattr(part, name) for part in parts] for name in ("labels", "kl_weight", "tiles")),
        *([stream.token_ids for stream in of_parts] for of_parts in views),
        *([view.compressed for view in of_parts] for of_parts in views),
    ]
    return repr(
        [
            parts[0].position,
            parts[0].first_sample,
            sum((part.keys for part in parts), ()),
            sum((part.tiles_per_image for part in parts), ()),
            *(torch.cat(each).numpy().tobytes() for each in tensors),
        ]
    )


def joined_packs(packs):
    """`joined` of each pack of a step, from all of its parts."""
    of_pack = collections.defaultdict(list)
    for pack in packs:
        of_pack[pack.position].append(pack)
    return [joined(of_pack[position]) for position in sorted(of_pack)]


def flat_steps(steps):
    return [[flat(batch) for batch in batches] for batches in steps]
