#!/usr/bin/env python3
"""Builds the exact InternVL3.5 tokenizer from a qwen.tiktoken file, offline.

    pip download --no-deps qwen-agent==0.0.34
    unzip qwen_agent-*.whl qwen_agent/utils/qwen.tiktoken
    python tools/build_tokenizer.py --from-tiktoken qwen_agent/utils/qwen.tiktoken \\
        --out tokenizers/internvl3_5

Without --from-tiktoken, the file of an installed qwen-agent or dashscope is used.
"""

import argparse
import importlib.util
from collections.abc import Sequence
from pathlib import Path

from megatron_vico.data.encode.qwen_tokenizer import build_tokenizer, read_tiktoken, write_tokenizer
from megatron_vico.data.encode.tokenizer import SPECIAL_STRINGS, load_tokenizer
from megatron_vico.errors import ConfigError

PACKAGED_FILES = (("qwen_agent", "utils/qwen.tiktoken"), ("dashscope", "resources/qwen.tiktoken"))


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
