#!/usr/bin/env python3
"""Builds the exact InternVL3.5 tokenizer from a qwen.tiktoken file, offline.

    pip download --no-deps qwen-agent==0.0.34
    unzip qwen_agent-*.whl qwen_agent/utils/qwen.tiktoken
    python tools/build_tokenizer.py --from-tiktoken qwen_agent/utils/qwen.tiktoken \\
        --out tokenizers/internvl3_5

Without --from-tiktoken, the file of an installed qwen-agent or dashscope (both Apache-2.0) is used.
A line of it is a token in base64 and its rank. Ranks are ids, and the merge that makes a token has
the token's rank; which two tokens it merges is found by running BPE on the token with only the
merges of lower rank.
"""

import argparse
import base64
import binascii
import importlib.util
import itertools
import json
from collections.abc import Sequence
from pathlib import Path

import tokenizers
from tokenizers import AddedToken, Regex, decoders, normalizers, pre_tokenizers
from tokenizers.models import BPE

from megatron_vico.data.encode.tokenizer import SPECIAL_STRINGS, load_tokenizer
from megatron_vico.errors import ConfigError

PACKAGED_FILES = (("qwen_agent", "utils/qwen.tiktoken"), ("dashscope", "resources/qwen.tiktoken"))

# Qwen2's and Qwen3's pre-tokeniser: how text is cut before BPE.
PRE_TOKENIZER_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
ADDED_TOKENS = """
special <|endoftext|> <|im_start|> <|im_end|> <|object_ref_start|> <|object_ref_end|>
special <|box_start|> <|box_end|> <|quad_start|> <|quad_end|>
special <|vision_start|> <|vision_end|> <|vision_pad|> <|image_pad|> <|video_pad|>
plain   <tool_call> </tool_call>
plain   <|fim_prefix|> <|fim_middle|> <|fim_suffix|> <|fim_pad|> <|repo_name|> <|file_sep|>
plain   <tool_response> </tool_response> <think> </think>
special <img> </img> <IMG_CONTEXT> <quad> </quad> <ref> </ref> <box> </box>
"""
"""Qwen3's 26 and then, in the last line, InternVL's 9, in the order of their ids. Decoding without
special tokens keeps the plain ones."""


def installed_file() -> Path:
    """The qwen.tiktoken of an installed package.

    Raises:
        ConfigError: if no package that has it is installed.
    """
    for package, name in PACKAGED_FILES:
        spec = importlib.util.find_spec(package)
        for folder in (spec.submodule_search_locations or []) if spec else []:
            if (Path(folder) / name).is_file():
                return Path(folder) / name
    raise ConfigError(
        "no qwen.tiktoken found: install qwen-agent or dashscope, or give --from-tiktoken."
    )


def read_tiktoken(path: str | Path) -> dict[bytes, int]:
    """Ranks of a tiktoken file's tokens; ConfigError unless they are 0, 1, 2, ... of all bytes."""
    source = Path(path)
    if not source.is_file():
        raise ConfigError(
            f"{source}: no such file; expected qwen.tiktoken of the package qwen-agent or"
            " dashscope."
        )
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(source.read_bytes().splitlines(), start=1):
        if not line:
            continue
        try:
            token, rank = line.split()
            ranks[base64.b64decode(token, validate=True)] = int(rank)
        except (ValueError, binascii.Error) as error:
            raise ConfigError(
                f"{source}:{number}: expected 'base64 rank', found {line[:40]!r}."
            ) from error
    if sorted(ranks.values()) != list(range(len(ranks))) or not all(
        bytes([byte]) in ranks for byte in range(256)
    ):
        raise ConfigError(
            f"{source}: {len(ranks)} tokens, but ranks are not 0, 1, 2, ... or a byte is missing."
        )
    return ranks


def build_tokenizer(ranks: dict[bytes, int]) -> tokenizers.Tokenizer:
    """A fast tokenizer with the ids of `ranks`, then Qwen3's 26 added tokens, then InternVL's 9.

    With Qwen's file, `<IMG_CONTEXT>` is 151671. The merges are those of the official merges.txt,
    one for each token; transformers' TikTokenConverter makes one of every split of a token, and so
    another file.
    """
    from transformers.convert_slow_tokenizer import bytes_to_unicode  # slow to import

    letters = bytes_to_unicode()

    def spell(token: bytes) -> str:
        return "".join(letters[byte] for byte in token)

    merges = []
    for token in sorted(ranks, key=ranks.__getitem__):
        parts = _split_before(token, ranks)
        # A token that no merge can reach stays without one, as in tiktoken itself.
        if len(parts) == 2:
            merges.append((spell(parts[0]), spell(parts[1])))
    vocabulary = {spell(token): rank for token, rank in ranks.items()}
    fast = tokenizers.Tokenizer(
        BPE(vocab=vocabulary, merges=merges, fuse_unk=False, byte_fallback=False)
    )
    fast.normalizer = normalizers.NFC()
    fast.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PRE_TOKENIZER_PATTERN), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    fast.decoder = decoders.ByteLevel()
    # One by one, since the ids follow the order in which tokens are added.
    for added in _added_tokens():
        fast.add_tokens([added])
    return fast


def write_tokenizer(fast: tokenizers.Tokenizer, folder: str | Path) -> None:
    """Write a folder that transformers' AutoTokenizer and our `load_tokenizer` load."""
    target = Path(folder)
    target.mkdir(parents=True, exist_ok=True)
    fast.save(str(target / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": None,
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
        "unk_token": None,
        "additional_special_tokens": [t.content for t in _added_tokens() if t.special][1:],
        "add_bos_token": False,
        "clean_up_tokenization_spaces": False,
        "model_max_length": 40960,
    }
    (target / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")


def _added_tokens() -> list[AddedToken]:
    return [
        AddedToken(text, normalized=False, special=kind == "special")
        for kind, *texts in map(str.split, ADDED_TOKENS.strip().splitlines())
        for text in texts
    ]


def _split_before(token: bytes, ranks: dict[bytes, int]) -> list[bytes]:
    """What BPE makes of `token` with merges of lower rank only: two parts if it is reachable."""
    limit = ranks[token]
    parts = [bytes([byte]) for byte in token]
    while len(parts) > 1:
        rank, index = min(
            (ranks.get(left + right, limit), i)
            for i, (left, right) in enumerate(itertools.pairwise(parts))
        )
        if rank >= limit:
            break
        parts[index : index + 2] = [parts[index] + parts[index + 1]]
    return parts


def main(arguments: Sequence[str] | None = None) -> None:
    """Build, write, load again and print the ids that matter."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--from-tiktoken",
        type=Path,
        help="a qwen.tiktoken file; unset, that of an installed package",
    )
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    options = parser.parse_args(arguments)
    source = options.from_tiktoken or installed_file()
    write_tokenizer(build_tokenizer(read_tiktoken(source)), options.out)
    tokenizer = load_tokenizer(options.out)
    print(
        f"{options.out}: {tokenizer.vocab_size} tokens from {source}, fingerprint"
        f" {tokenizer.fingerprint}"
    )
    for text in SPECIAL_STRINGS:
        print(f"{tokenizer.token_id(text):>8}  {text}")


if __name__ == "__main__":
    main()
