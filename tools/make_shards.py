#!/usr/bin/env python3
"""Writes JSONL files with images and videos as WebDataset shards: `vico shards make`.

    python tools/make_shards.py --jsonl train.jsonl --out shards \\
        --tokenizer-model tokenizer --model-size internvl3_5-1b
    python tools/make_shards.py --meta meta.json --out mixture \\
        --tokenizer-model tokenizer --model-size internvl3_5-1b
"""

import sys

from megatron_vico.cli.shards import main

if __name__ == "__main__":
    main(["make", *sys.argv[1:]])
