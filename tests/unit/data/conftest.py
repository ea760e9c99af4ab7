"""A tokenizer and a folder of shards that the data tests share."""

from pathlib import Path

import pytest

from megatron_vico.data.encoding import EncodingSettings
from megatron_vico.data.shard_writer import WriterOptions, make_shards
from megatron_vico.data.tokenizer import Tokenizer, load_tokenizer, train_sentencepiece
from tests.toy_data import write_conversations

NUM_SAMPLES = 42
SETTINGS = EncodingSettings(image_size=32, max_dynamic_patch=4, use_thumbnail=True)


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory) -> Tokenizer:
    texts = ["Answer in few words.", "What colour?", "red and green", "system user assistant", "aaaa aa ------ 12 345"]
    return load_tokenizer(train_sentencepiece(texts * 4, model_prefix=tmp_path_factory.mktemp("tok") / "toy"))


@pytest.fixture(scope="session")
def conversations(tmp_path_factory) -> Path:
    """A JSONL file with text-only, one-image and two-image samples; images lie beside it."""
    return write_conversations(tmp_path_factory.mktemp("conversations"), num_samples=NUM_SAMPLES)


@pytest.fixture(scope="session")
def shards(conversations, tokenizer, tmp_path_factory) -> Path:
    """The same samples as shards: three tar files."""
    folder = tmp_path_factory.mktemp("data") / "shards"
    make_shards(
        conversations,
        image_root=conversations.parent,
        out_dir=folder,
        tokenizer=tokenizer,
        settings=SETTINGS,
        options=WriterOptions(samples_per_shard=16, show_progress=False),
    )
    return folder
