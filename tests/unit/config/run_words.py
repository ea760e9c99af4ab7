"""Command lines of tests in short: `30b TP=2 EP=8` for --model-size internvl3_5-30b-a3b ..."""

import re

from megatron_vico.config.flags import parse
from megatron_vico.config.schema import RunConfig

SHORT = {
    "TP": "--tensor-model-parallel-size",
    "SP": "--sequence-parallel",
    "PP": "--pipeline-model-parallel-size",
    "VPP": "--num-layers-per-virtual-pipeline-stage",
    "GROUP": "--microbatch-group-size-per-virtual-pipeline-stage",
    "FIRST": "--decoder-first-pipeline-num-layers",
    "LAST": "--decoder-last-pipeline-num-layers",
    "EMBEDDING": "--account-for-embedding-in-pipeline-split",
    "LOSS": "--account-for-loss-in-pipeline-split",
    "LAYOUT": "--pipeline-model-parallel-layout",
    "CP": "--context-parallel-size",
    "EP": "--expert-model-parallel-size",
    "ETP": "--expert-tensor-parallel-size",
    "BATCH": "--global-batch-size",
    "FULL": "--recompute-granularity full --recompute-method uniform --recompute-num-layers",
    "SELECTIVE": "--recompute-granularity selective --recompute-modules",
    "8b": "--model-size internvl3_5-8b",
    "30b": "--model-size internvl3_5-30b-a3b",
    "38b": "--model-size internvl3_5-38b",
    "241b": "--model-size internvl3_5-241b-a28b",
}
_WORD = re.compile(r"(?<![\w-])(" + "|".join(SHORT) + r")(?![\w-])")


def long(text: str) -> str:
    """The text with every short word written out."""
    return _WORD.sub(lambda found: SHORT[found[1]], text)


def run(words: str) -> RunConfig:
    """The run that a short command line asks for; `TP=2` is `TP 2`."""
    return parse(long(re.sub(r"\b([A-Z]+)=", r"\1 ", words)).split())
