"""Runs a model over questions under one compression plan; counts what it saw and how it scored."""

import json
import math
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor
from tqdm import tqdm

from megatron_vico.data.records import (
    bounded_lines,
    check_lines,
    media_of,
    path_below,
    within_limit,
)
from megatron_vico.data.samples import ConversationSample
from megatron_vico.data.shards.reader import parse_sample
from megatron_vico.errors import SampleError, nearest
from megatron_vico.evaluation.scorers import SCORERS
from megatron_vico.files import open_plain, read_plain
from megatron_vico.inference.engine import Answers, Engine
from megatron_vico.inference.plans import PlanSource, Prompt


@dataclass(frozen=True, kw_only=True)
class Question:
    """One question of a conversation; its text is in the conversation."""

    answers: tuple[str, ...]
    """Accepted answers."""

    metric: str
    """Name of a scorer."""

    kind: str
    """A group that gets a column of its own, such as what the question is about."""


@dataclass(frozen=True, kw_only=True)
class EvaluationSample:
    """A conversation and how its answers are scored."""

    conversation: ConversationSample
    questions: tuple[Question, ...]
    """One for each `human` turn."""


@dataclass(frozen=True, kw_only=True)
class RowResult:
    """What one row of the table comes from; fractions in [0, 1]."""

    row: str
    score: float
    standard_error: float
    """Of the score, over conversations: the questions of one image are not independent."""

    score_by_kind: Mapping[str, float]
    num_questions_by_kind: Mapping[str, int]
    compressed_by_kind: Mapping[str, float]
    """Share of tiles compressed by the kind of the question about them; empty unless there is a
    question per tile."""

    num_tiles: int
    num_compressed: int
    num_visual_tokens: int
    num_visual_tokens_uncompressed: int

    @property
    def compressed_tiles(self) -> float:
        """Compressed tiles over all tiles."""
        return self.num_compressed / max(self.num_tiles, 1)

    @property
    def visual_token_reduction(self) -> float:
        """1 - visual tokens given / visual tokens without compression."""
        return 1 - self.num_visual_tokens / max(self.num_visual_tokens_uncompressed, 1)


@dataclass(frozen=True, kw_only=True, eq=False)
class Evaluation:
    """A row's figures and the answers behind them."""

    result: RowResult
    answers: tuple[Answers, ...]


def read_evaluation_set(
    jsonl: str | Path,
    *,
    image_root: str | Path,
    limit: int | None = None,
    allow_outside_root: bool = False,
) -> list[EvaluationSample]:
    """Read questions with their scoring: the official chat format, one conversation a line.

    Beside it stand `metrics`, the name of a scorer for each question; `kinds`, a group for each
    (unset, its metric); and `answers`, the accepted ones of each, a text or a list (unset, the
    `gpt` turn after it). Image paths start from `image_root`, and do not leave it unless
    `allow_outside_root`; at most `limit` conversations are read.

    Raises:
        ConfigError: if the file is not there or no JSONL.
        SampleError: if a line is broken, an image is missing, or a list has another length than the
            questions.
    """
    path, samples = Path(jsonl), list[EvaluationSample]()
    check_lines(path, flag="--jsonl")
    with open_plain(path) as file:
        for number, (_, line) in enumerate(bounded_lines(file), start=1):
            if limit is not None and len(samples) >= limit:
                break
            if line.strip():
                where = f"{jsonl}:{number}"
                below = partial(
                    path_below, Path(image_root), where=where, allow_outside=allow_outside_root
                )
                samples.append(_read_line(line, where=where, below=below))
    if not samples:
        raise SampleError(f"{jsonl}: no conversation in it; expected one JSON object a line.")
    return samples


def _read_line(line: bytes, *, where: str, below: Callable[[str], Path]) -> EvaluationSample:
    sample = parse_sample(line, key=where.rpartition(":")[2], images=(), where=where)
    record: dict[str, Any] = json.loads(line)
    media = media_of(record, where=where)
    if media.video is not None:
        raise SampleError(f"{where}: a video; only images are evaluated.")
    try:
        read = (read_plain(below(name)) for name in media.images)
        images = tuple(within_limit(read, where=where))
    except OSError as error:
        raise SampleError(
            f"{where}: {error.filename}: {error.strerror}; restore the image or remove the line."
        ) from error
    num_questions = sum(turn.role == "human" for turn in sample.turns)
    if not num_questions:
        raise SampleError(f"{where}: no question; expected a turn from 'human'.")
    metrics = record.get("metrics")
    answers = record.get("answers") or [turn.text for turn in sample.turns if turn.role == "gpt"]
    kinds = record.get("kinds") or metrics
    for name, values in (("metrics", metrics), ("kinds", kinds), ("answers", answers)):
        if not isinstance(values, list) or len(values) != num_questions:
            found = len(values) if isinstance(values, list) else repr(values)
            raise SampleError(
                f"{where}: {found} {name} for {num_questions} questions; give a list with one for"
                " each."
            )
    questions = tuple(
        _question(accepted, metric, kind, where=where)
        for accepted, metric, kind in zip(answers, metrics or (), kinds or (), strict=True)
    )
    key = str(record.get("id", where))
    return EvaluationSample(
        conversation=replace(sample, key=key, images=images), questions=questions
    )


def _question(accepted: Any, metric: Any, kind: Any, *, where: str) -> Question:
    # One string is one answer, not an answer a letter.
    listed = [accepted] if isinstance(accepted, str) else accepted
    if not isinstance(listed, list) or not all(isinstance(each, str) for each in listed):
        raise SampleError(
            f"{where}: accepted answers {accepted!r}; expected a text, or a list of texts."
        )
    if not isinstance(metric, str) or metric not in SCORERS:
        raise SampleError(f"{where}: unknown metric {metric!r}{nearest(str(metric), SCORERS)}.")
    return Question(answers=tuple(listed), metric=metric, kind=str(kind))


def run_evaluation(
    engine: Engine,
    samples: Sequence[EvaluationSample],
    *,
    row: str,
    plan: PlanSource | Sequence[Tensor],
    prompts: Sequence[Prompt] | None = None,
    max_new_tokens: int = 64,
) -> Evaluation:
    """Answer and score every question; `row` is the result's name, also beside the progress bar.

    `prompts` are those of the samples, in order, where they are encoded already.
    """
    if prompts is None:
        prompts = [engine.prompt(sample.conversation) for sample in samples]
    found = engine.answer(prompts, plan=plan, max_new_tokens=max_new_tokens)
    answers = tuple(tqdm(found, total=len(prompts), desc=f"{row:16}", mininterval=1.0))
    by_kind: dict[str, list[float]] = defaultdict(list)
    compressed_by_kind: dict[str, list[bool]] = defaultdict(list)
    means = []
    for sample, answer in zip(samples, answers, strict=True):
        scores = [
            SCORERS[question.metric](text, question.answers)
            for question, text in zip(sample.questions, answer.texts, strict=True)
        ]
        means.append(sum(scores) / len(scores))
        for question, score in zip(sample.questions, scores, strict=True):
            by_kind[question.kind].append(score)
        if len(sample.questions) == len(answer.compressed_N):
            tiles = zip(sample.questions, answer.compressed_N.tolist(), strict=True)
            for question, compressed in tiles:
                compressed_by_kind[question.kind].append(compressed)
    scores = [score for each in by_kind.values() for score in each]
    mean = sum(means) / len(means)
    variance = sum((each - mean) ** 2 for each in means) / max(len(means) - 1, 1)
    num_tiles = sum(len(answer.compressed_N) for answer in answers)
    result = RowResult(
        row=row,
        score=sum(scores) / len(scores),
        standard_error=math.sqrt(variance / len(means)),
        score_by_kind=_means(by_kind),
        num_questions_by_kind={kind: len(each) for kind, each in sorted(by_kind.items())},
        compressed_by_kind=_means(compressed_by_kind),
        num_tiles=num_tiles,
        num_compressed=sum(int(answer.compressed_N.sum()) for answer in answers),
        num_visual_tokens=sum(answer.num_visual_tokens for answer in answers),
        num_visual_tokens_uncompressed=engine.model.visual_tokens_per_tile * num_tiles,
    )
    return Evaluation(result=result, answers=answers)


def _means(by_kind: Mapping[str, Sequence[float]]) -> dict[str, float]:
    return {kind: sum(each) / len(each) for kind, each in sorted(by_kind.items())}
