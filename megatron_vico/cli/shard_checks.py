"""`vico shards inspect | verify`: what is in shards, as text and pictures, and what is wrong with them."""

import argparse
import os
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from tqdm import tqdm

from megatron_vico.config.schema import DataOptions
from megatron_vico.data.mixture_file import MixtureFolder, read_mixture
from megatron_vico.data.packing import PackLimits
from megatron_vico.data.shard_index import FolderIndex
from megatron_vico.data.tokenizer import load_tokenizer
from megatron_vico.data.verify import Problem, Verification, VerifyOptions
from megatron_vico.errors import ConfigError, SampleError
from megatron_vico.models.registry import MODELS, get_model_config

HAS_PROBLEMS = 1
"""Exit status of `verify` where something is wrong."""


def add_inspect_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the flags of `inspect`."""
    _add_common(parser)


def inspect(options: argparse.Namespace) -> None:
    """Print."""


def add_verify_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the flags of `verify`."""
    _add_common(parser)
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="processes; 0, none but this one")
    parser.add_argument(
        "--sample-share", type=float, default=1.0, help="share of the samples that are decoded; all are hashed"
    )
    parser.epilog = "Exit status: 0 if nothing is wrong, 1 if something is, 2 after an error."


def verify(options: argparse.Namespace) -> int:
    """Print a line for each problem and a table of causes.

    Returns:
        0, or 1 where there is a problem.
    """
    folders = read_mixture(options.folder)
    tokens_kept = _tokens_kept(options.model_size, folders)
    verification = Verification(
        [folder.path for folder in folders],
        VerifyOptions(
            tokenizer=load_tokenizer(options.tokenizer_model) if options.tokenizer_model else None,
            limits=_limits(options) if tokens_kept else None,
            tokens_kept=tokens_kept or 0,
            sample_share=options.sample_share,
            num_workers=options.workers,
        ),
    )
    problems: list[Problem] = []
    num_samples = 0
    # Drawn on a terminal only, and not for what takes less than a second.
    with tqdm(total=verification.num_bytes, unit="B", unit_scale=True, disable=None, delay=1, file=sys.stderr) as bar:
        for finding in verification:
            for problem in finding.problems:
                bar.write(str(problem), file=sys.stdout)
            problems += finding.problems
            num_samples += finding.num_samples
            bar.update(finding.num_bytes)
    print(
        f"{options.folder}: {len(folders)} folders, {verification.num_shards} shards, {verification.num_bytes:,} bytes, "
        f"{num_samples:,} samples decoded: {len(problems)} problems"
    )
    if problems:
        print(_causes(problems))
    return HAS_PROBLEMS if problems else 0


def _causes(problems: Sequence[Problem]) -> str:
    """The table of causes, the most frequent first."""
    counts = Counter(problem.cause for problem in problems)
    width = max(map(len, counts))
    lines = [f"\n{'cause':{width}}  problems  samples  files"]
    for cause, count in counts.most_common():
        same = [problem for problem in problems if problem.cause == cause]
        num_samples = sum(problem.num_samples for problem in same)
        num_files = len({(problem.folder, problem.file) for problem in same})
        lines.append(f"{cause:{width}}  {count:8}  {num_samples:7}  {num_files:5}")
    return "\n".join(lines)


def _add_common(parser: argparse.ArgumentParser) -> None:
    defaults = DataOptions()
    parser.add_argument("folder", type=Path, help="a folder of shards, or a mixture.json")
    parser.add_argument("--tokenizer-model", help="tokenizer folder, or SentencePiece .model; encodes the samples")
    parser.add_argument("--model-size", help="gives the tokens of a tile; unset, those that all models of its size have")
    parser.add_argument("--seq-length", type=int, default=defaults.seq_length, help="most tokens in a pack")
    parser.add_argument("--max-tiles-per-pack", type=int, default=defaults.max_tiles_per_pack)
    parser.add_argument("--max-samples-per-pack", type=int, default=defaults.max_samples_per_pack)


def _limits(options: argparse.Namespace) -> PackLimits:
    return PackLimits(
        capacity=options.seq_length, max_tiles=options.max_tiles_per_pack, max_samples=options.max_samples_per_pack
    )


def _tokens_kept(model_size: str | None, folders: Sequence[MixtureFolder]) -> int | None:
    """Visual tokens of a tile that is not compressed; None where that is not known."""
    if model_size is not None:
        return get_model_config(model_size).visual_tokens_per_tile
    for folder in folders:
        try:
            image_size = FolderIndex.read(folder.path).settings.image_size
        except (ConfigError, SampleError):
            continue  # `verify` says what is wrong with it
        known = {model.visual_tokens_per_tile for model in MODELS.values() if model.vision.image_size == image_size}
        return known.pop() if len(known) == 1 else None
    return None
