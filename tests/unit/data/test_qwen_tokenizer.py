"""The InternVL3.5 tokenizer from a tiktoken file: ids as tiktoken gives them, added tokens in the
released order."""

import base64
import random
import runpy
from pathlib import Path
from types import SimpleNamespace

import pytest
import tiktoken
from transformers import AutoTokenizer

from megatron_vico.data.encode.tokenizer import load_tokenizer
from megatron_vico.errors import ConfigError

tool = SimpleNamespace(
    **runpy.run_path(str(Path(__file__).parents[3] / "tools" / "build_tokenizer.py"))
)

# In Qwen's file the first added token is 151643; here it follows these. A token may be reached in
# one way only ("lo" + "w", never "l" + "ow" though both have a rank), and " lower" merges two
# longer ones.
MERGED = [*"lo er ow low".split(), " low", " lower", "  ", "\n\n", "\u00e9"]
MERGED += [*"12 th the".split(), " the", "aa", "aaaa"]


@pytest.fixture(scope="module")
def tiktoken_file(tmp_path_factory) -> Path:
    tokens = [bytes([byte]) for byte in range(256)] + [text.encode() for text in MERGED]
    path = tmp_path_factory.mktemp("qwen") / "qwen.tiktoken"
    path.write_text(
        "".join(f"{base64.b64encode(token).decode()} {rank}\n" for rank, token in enumerate(tokens))
    )
    return path


@pytest.fixture(scope="module")
def folder(tiktoken_file) -> Path:
    target = tiktoken_file.parent / "built"
    tool.write_tokenizer(tool.build_tokenizer(tool.read_tiktoken(tiktoken_file)), target)
    return target


def test_ids_equal_tiktoken(tiktoken_file, folder):
    ranks = tool.read_tiktoken(tiktoken_file)
    oracle = tiktoken.Encoding(
        "toy", pat_str=tool.PRE_TOKENIZER_PATTERN, mergeable_ranks=ranks, special_tokens={}
    )
    built = load_tokenizer(folder)
    rng = random.Random(0)
    pieces = [*"lower the12 \n\taA'.\u00e9\u4f60\U0001f600", "  ", "lower", " the", "aaaaa", "'s"]
    for _ in range(2000):
        text = "".join(rng.choices(pieces, k=rng.randint(0, 20)))
        assert built.encode(text) == oracle.encode(text), repr(text)
        assert built.decode(built.encode(text)) == text


def test_added_tokens_follow_in_the_released_order(folder):
    built = load_tokenizer(folder)
    first = 256 + len(MERGED)
    # Qwen3: <|endoftext|> 151643, <|im_end|> 151645, <think> 151667; InternVL3.5: <IMG_CONTEXT>
    # 151671, </box> 151677.
    for text, released in {
        "<|endoftext|>": 151643,
        "<|im_start|>": 151644,
        "<|im_end|>": 151645,
        "<think>": 151667,
        "</think>": 151668,
        "<img>": 151669,
        "</img>": 151670,
        "<IMG_CONTEXT>": 151671,
        "<quad>": 151672,
        "<ref>": 151674,
        "<box>": 151676,
        "</box>": 151677,
    }.items():
        assert built.token_id(text) == first + released - 151643
    assert built.vocab_size == first + 35


def test_transformers_loads_it_with_the_same_ids(folder):
    built, loaded = load_tokenizer(folder), AutoTokenizer.from_pretrained(folder)
    text = "<|im_start|>user\n<img><IMG_CONTEXT></img>\nthe lower <think>12<|im_end|>\n"
    assert loaded(text).input_ids == built.encode(text)
    assert (loaded.eos_token_id, loaded.pad_token_id) == (built.eos_id, built.pad_id)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"bm90aGluZw==\n", "tiktoken:1: expected 'base64 rank'"),
        (b"!!! 0\n", "tiktoken:1: expected 'base64 rank'"),
        (b"YQ== 0\nYg== 2\n", "2 tokens, but ranks are not 0, 1, 2"),
    ],
)
def test_broken_files_are_refused(tmp_path, content, message):
    path = tmp_path / "qwen.tiktoken"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=message):
        tool.read_tiktoken(path)


def test_missing_file_names_the_packages(tmp_path):
    with pytest.raises(ConfigError, match="qwen-agent"):
        tool.read_tiktoken(tmp_path / "none")


def test_the_tool_prints_ids_and_writes_a_tokenizer(tiktoken_file, folder, tmp_path, capsys):
    tool.main(["--from-tiktoken", str(tiktoken_file), "--out", str(tmp_path / "out")])
    assert f"{256 + len(MERGED) + 28}  <IMG_CONTEXT>" in capsys.readouterr().out
    assert load_tokenizer(tmp_path / "out").fingerprint == load_tokenizer(folder).fingerprint
