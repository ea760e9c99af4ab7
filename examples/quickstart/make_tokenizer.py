"""Train the demo's SentencePiece tokenizer: 512 pieces, as many as the toy has embeddings.

Run: python examples/quickstart/make_tokenizer.py --text runs/demo/data/text.txt \\
         --out runs/demo/tokenizer/demo.model
"""

import argparse
from pathlib import Path

from megatron_vico.data.encode.tokenizer import load_tokenizer, train_sentencepiece

VOCAB_SIZE = 512


def main() -> None:
    """Train, load once as a check, and say how many pieces there are."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument(
        "--text", type=Path, default=Path("runs/demo/data/text.txt"), help="one sentence a line"
    )
    parser.add_argument(
        "--out", type=Path, default=Path("runs/demo/tokenizer/demo.model"), help="file to write"
    )
    args = parser.parse_args()
    with args.text.open(encoding="utf-8") as lines:
        path = train_sentencepiece(
            lines, model_prefix=args.out.with_suffix(""), vocab_size=VOCAB_SIZE
        )
    print(f"{path}: {load_tokenizer(path).vocab_size} pieces")


if __name__ == "__main__":
    main()
