"""The benchmarks of the ViCO paper: what the harnesses call them, and which table has which.

Names and metrics were read in lmms-eval 0.7.3 (its task files) and in VLMEvalKit e8e78f0
(`report_primary_metric` and `evaluate` of each dataset class).
"""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Metric:
    """Where a harness keeps a benchmark's score."""

    name: str
    """Of the task or dataset."""

    keys: tuple[str, ...]
    """Names of the metric; several are added up."""

    scale: float = 1.0
    """From the harness's number to the paper's."""

    mean_of_others: bool = False
    """Not the metric itself, but the mean of all others that share its beginning up to "|"."""


@dataclass(frozen=True, kw_only=True)
class Benchmark:
    """A column of the paper's tables."""

    title: str
    vlmevalkit: Metric
    lmms: Metric | None = None
    """None where lmms-eval has no such task."""

    full: float = 100.0
    """Highest score: what scores are divided by, times 100, in averages."""


def _lmms(name: str, *keys: str, scale: float = 100.0) -> Metric:
    return Metric(name=name, keys=keys, scale=scale)


def _kit(name: str, *keys: str, scale: float = 1.0, mean_of_others: bool = False) -> Metric:
    return Metric(name=name, keys=keys, scale=scale, mean_of_others=mean_of_others)


def _choices(name: str, split: str = "none") -> Metric:
    """Multiple choice: accuracy in [0, 1], by the split that the file names ("none": none)."""
    return _kit(name, f"split={split}|Overall", scale=100.0)


_MME_LMMS = _lmms("mme", "mme_perception_score", "mme_cognition_score", scale=1.0)

_OCRBENCH = Benchmark(
    title="OCRBench",
    vlmevalkit=_kit("OCRBench", "Final Score Norm"),
    lmms=_lmms("ocrbench", "ocrbench_accuracy"),
)
_CHARTQA = Benchmark(
    title="ChartQA",
    vlmevalkit=_kit("ChartQA_TEST", "Overall"),
    lmms=_lmms("chartqa", "relaxed_overall"),
)
_TEXTVQA = Benchmark(
    title="TextVQA",
    vlmevalkit=_kit("TextVQA_VAL", "Overall"),
    lmms=_lmms("textvqa_val", "exact_match"),
)
_DOCVQA = Benchmark(
    title="DocVQA", vlmevalkit=_kit("DocVQA_VAL", "Overall"), lmms=_lmms("docvqa_val", "anls")
)
_INFOVQA = Benchmark(
    title="InfoVQA", vlmevalkit=_kit("InfoVQA_VAL", "Overall"), lmms=_lmms("infovqa_val", "anls")
)
_AI2D = Benchmark(title="AI2D", vlmevalkit=_choices("AI2D_TEST"), lmms=_lmms("ai2d", "exact_match"))
_MMSTAR = Benchmark(title="MMStar", vlmevalkit=_choices("MMStar"), lmms=_lmms("mmstar", "average"))
_POPE = Benchmark(
    title="POPE",
    vlmevalkit=_kit("POPE", "split=Overall|Overall"),
    lmms=_lmms("pope", "pope_f1_score"),
)
_MME = Benchmark(
    title="MME", vlmevalkit=_kit("MME", "perception", "reasoning"), lmms=_MME_LMMS, full=2800.0
)
_MMBENCH = Benchmark(title="MMBench V1.1", vlmevalkit=_choices("MMBench_DEV_EN_V11", "dev"))
_REALWORLDQA = Benchmark(
    title="RWQA", vlmevalkit=_choices("RealWorldQA"), lmms=_lmms("realworldqa", "exact_match")
)
_MMMU = Benchmark(
    title="MMMU",
    vlmevalkit=_choices("MMMU_DEV_VAL", "validation"),
    lmms=_lmms("mmmu_val", "mmmu_acc"),
)
_BLINK = Benchmark(
    title="BLINK", vlmevalkit=_choices("BLINK", "val"), lmms=_lmms("blink", "blink_acc")
)
_MMT = Benchmark(
    title="MMT-Bench",
    vlmevalkit=_choices("MMT-Bench_VAL", "ALL"),
    lmms=_lmms("mmt_val", "accuracy"),
)
_MMIU = Benchmark(
    title="MMIU",
    # A multiple-choice set of one's own, made by tools/make_mmiu.py; InternVL takes the mean over
    # tasks, which are its categories.
    vlmevalkit=_kit("MMIU", "split=none|Overall", scale=100.0, mean_of_others=True),
)
_VIDEO_MME = Benchmark(
    title="Video-MME",
    vlmevalkit=_kit("Video-MME_64frame", "overall|overall", scale=100.0),
    lmms=_lmms("videomme", "videomme_perception_score", scale=1.0),
)
_VIDEO_MME_SUBTITLES = Benchmark(
    title="Video-MME (sub)",
    # No preset has 64 frames and subtitles: --data-config, under this name (docs/evaluation.md).
    vlmevalkit=_kit("Video-MME_64frame_subs", "overall|overall", scale=100.0),
    lmms=_lmms("videomme_w_subtitle", "videomme_perception_score", scale=1.0),
)

_GENERAL = (
    *(_OCRBENCH, _CHARTQA, _TEXTVQA, _MMSTAR, _POPE),
    *(_MME, _MMBENCH, _REALWORLDQA),
)
_MULTI_IMAGE = (_BLINK, _MMT, _MMIU, _VIDEO_MME, _VIDEO_MME_SUBTITLES)

TABLES: dict[int, tuple[Benchmark, ...]] = {
    1: (*_GENERAL, _MMMU),
    2: _MULTI_IMAGE,
    3: (_DOCVQA, _CHARTQA, _INFOVQA, _TEXTVQA, _OCRBENCH, _AI2D, _MMSTAR, _BLINK),
    5: _GENERAL,
    6: _MULTI_IMAGE,
}
"""Columns of the paper's tables of scores, by their numbers."""

ABLATIONS = {
    "vanilla": "Vanilla",
    "vanilla_vir": "Vanilla + ViR",
    "vanilla_one_tile": "Vanilla w/o dynamic res.",
    "fastv": "FastV",
    "fastv_default": "FastV (default setting)",
    "sparsevlm": "SparseVLM",
    "sparsevlm_default": "SparseVLM (default setting)",
    "all_compress": "ViCO (all compressed)",
    "random_compress": "ViCO (random)",
    "image_level": "ViCO (image-level ViR)",
    "vico": "ViCO",
}
"""Rows of Table 3, in its order; those of other methods also in the other reading of "comparable
compression": with as many visual tokens as ViCO gives, mean over layers, and in their own setting.
The last two come with a row of ratios each."""
