"""Reads what lmms-eval 0.7.3 and VLMEvalKit (e8e78f0) leave behind: scores, and which samples.

lmms-eval: OUT/MODEL/DATE_results.json has results.TASK."METRIC,FILTER" (and METRIC_stderr),
n-samples, group_subtasks, configs.TASK.test_split and config.model_args;
beside it lies DATE_samples_TASK.jsonl (--log_samples) with doc_id, filtered_resps and token_counts.
VLMEvalKit: WORK/MODEL/EVAL_ID/status.json has model_name, created_at and, under datasets.NAME,
status, updated_at, metrics (flattened: "split=none|Overall"), skip_reason, error_message and
prediction_file, a table with a row a sample (PRED_FORMAT=tsv or json).
"""

import csv
import json
import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

from megatron_vico.errors import ConfigError
from megatron_vico.evaluation.benchmarks import Benchmark, Metric
from megatron_vico.files import read_json, read_json_lines

LMMS_FAILED = "[LMMS_EVAL_REQUEST_FAILED"
KIT_FAILED = "Failed to obtain answer"
"""What the harnesses score in the place of an answer that they did not get."""


@dataclass(frozen=True, kw_only=True)
class Result:
    """One benchmark's score of one model."""

    source: Path
    model: str
    """As it was asked for, with its plan: internvl@vir."""

    score: float
    """On the paper's scale."""

    standard_error: float
    """Of the score: the harness's own, else sqrt(p (1 - p) / n) of p = score / full scale."""

    num_samples: int
    num_failed: int
    """Samples that were scored without an answer."""

    tasks: tuple[str, ...] = ()
    """Names before the slash in ids of requests, where the client sent such ids (lmms-eval)."""

    ids: frozenset[str] = frozenset()
    """TASK/SPLIT/DOC_ID of each sample (lmms-eval)."""

    prompt_tokens: tuple[int, ...] = ()
    """Of the answers, sorted, as the client was told (lmms-eval)."""

    windows: tuple[tuple[float, float], ...] = ()
    """Unix seconds, from start to end of the runs that asked (VLMEvalKit)."""

    def __str__(self) -> str:
        return f"{self.source} ({self.model})"


@dataclass(frozen=True, kw_only=True)
class Harness:
    """All results below some folders."""

    folders: Sequence[Path]
    lmms: list[tuple[Path, dict[str, Any]]] = field(default_factory=list)
    kit: list[tuple[Path, dict[str, Any]]] = field(default_factory=list)

    def __post_init__(self) -> None:
        """Find and read them; ConfigError if a folder holds none."""
        for folder in self.folders:
            lmms = sorted(folder.rglob("*_results.json"))
            kit = sorted(folder.rglob("status.json"))
            if not (lmms or kit):
                raise ConfigError(
                    f"{folder}: no *_results.json of lmms-eval and no status.json of VLMEvalKit in"
                    " it; give the folder of its --output_path or --work-dir."
                )
            self.lmms.extend((path, read_json(path)) for path in lmms)
            self.kit.extend((path, read_json(path)) for path in kit)

    def result(self, model: str, benchmark: Benchmark) -> Result | None:
        """The newest result of a model in a benchmark; None if there is none.

        Raises:
            ConfigError: if there are results by both harnesses, or it is not whole.
        """
        by_lmms = self._lmms_result(model, benchmark)
        by_kit = self._kit_result(model, benchmark)
        if by_lmms and by_kit:
            raise ConfigError(
                f"{benchmark.title} of {model}: {by_lmms.source} and {by_kit.source}; two harnesses"
                " score differently, give --results of one."
            )
        return by_lmms or by_kit

    @property
    def models(self) -> list[str]:
        """Whose results there are."""
        lmms = {_lmms_model(contents) for _, contents in self.lmms}
        return sorted(lmms | {str(contents.get("model_name")) for _, contents in self.kit})

    def _lmms_result(self, model: str, benchmark: Benchmark) -> Result | None:
        metric = benchmark.lmms
        found = [
            (path, contents)
            for path, contents in self.lmms
            if metric and _lmms_model(contents) == model and metric.name in contents["results"]
        ]
        return _read_lmms(*found[-1], metric, benchmark.full) if metric and found else None

    def _kit_result(self, model: str, benchmark: Benchmark) -> Result | None:
        name = benchmark.vlmevalkit.name
        runs = [
            (path, contents)
            for path, contents in self.kit
            if contents.get("model_name") == model and name in contents.get("datasets", {})
        ]
        done = [run for run in runs if run[1]["datasets"][name].get("metrics")]
        if runs and not done:
            path, contents = runs[-1]
            state = contents["datasets"][name]
            why = state.get("error_message") or state.get("skip_reason") or state.get("status")
            raise ConfigError(f"{path}: {name} has no score ({why}); finish it with --reuse.")
        if not done:
            return None
        windows = tuple(_window(path, contents, name) for path, contents in runs)
        return _read_kit(*done[-1], benchmark, windows)


def _lmms_model(contents: Mapping[str, Any]) -> str:
    """The name that was sent: of model_args "model=internvl@vir,base_url=..."."""
    arguments = contents.get("config", {}).get("model_args") or ""
    if isinstance(arguments, Mapping):
        return str(arguments.get("model") or arguments.get("model_version"))
    pairs = dict(word.partition("=")[::2] for word in str(arguments).split(","))
    return pairs.get("model") or pairs.get("model_version") or str(contents.get("model_name"))


def _read_lmms(path: Path, contents: dict[str, Any], metric: Metric, full: float) -> Result:
    results = contents["results"][metric.name]
    values, errors = [], []
    for key in metric.keys:
        full_key = next((each for each in results if each.split(",")[0] == key), None)
        if full_key is None:
            raise ConfigError(f"{path}: {metric.name} has no {key}, but {sorted(results)}.")
        values.append(float(results[full_key]) * metric.scale)
        own = results.get(full_key.replace(key, f"{key}_stderr", 1))
        errors.append(own * metric.scale if isinstance(own, int | float) else math.nan)
    tasks = _leaves(contents, metric.name)
    ids, tokens, failed = set(), [], 0
    date = path.name.removesuffix("_results.json")
    for task in tasks:
        samples = path.with_name(f"{date}_samples_{task}.jsonl")
        try:
            rows, _ = read_json_lines(samples)
        except OSError as error:
            raise ConfigError(
                f"{samples}: {error.strerror}; run lmms-eval with --log_samples."
            ) from error
        split = contents["configs"][task].get("test_split")
        ids |= {f"{task}/{split}/{row['doc_id']}" for row in rows}
        failed += sum(LMMS_FAILED in str(row.get("filtered_resps")) for row in rows)
        counts = [count for row in rows for count in row.get("token_counts") or () if count]
        tokens += [int(count["input_tokens"]) for count in counts]
    expected = sum(contents["n-samples"][task]["effective"] for task in tasks)
    if len(ids) != expected:
        raise ConfigError(
            f"{path}: {expected} samples of {metric.name}, but {len(ids)} in its samples files;"
            " run it again into a new folder."
        )
    score, standard_error = sum(values), math.hypot(*errors)
    return Result(
        source=path,
        model=_lmms_model(contents),
        score=score,
        standard_error=(
            _binomial(score, full, expected) if math.isnan(standard_error) else standard_error
        ),
        num_samples=expected,
        num_failed=failed,
        tasks=tasks,
        ids=frozenset(ids),
        prompt_tokens=tuple(sorted(tokens)),
    )


def _leaves(contents: dict[str, Any], task: str) -> tuple[str, ...]:
    """The tasks of a group, or the task itself."""
    below = contents.get("group_subtasks", {}).get(task) or ()
    return tuple(leaf for each in below for leaf in _leaves(contents, each)) or (task,)


def _read_kit(
    path: Path,
    contents: dict[str, Any],
    benchmark: Benchmark,
    windows: tuple[tuple[float, float], ...],
) -> Result:
    metric = benchmark.vlmevalkit
    state = contents["datasets"][metric.name]
    score = sum(_kit_values(state["metrics"], metric, path)) * metric.scale
    predictions = list(_predictions(path.parent / str(state.get("prediction_file"))))
    return Result(
        source=path,
        model=contents["model_name"],
        score=score,
        standard_error=_binomial(score, benchmark.full, len(predictions)),
        num_samples=len(predictions),
        num_failed=sum(KIT_FAILED in text for text in predictions),
        windows=windows,
    )


def _kit_values(metrics: Mapping[str, float], metric: Metric, path: Path) -> Iterator[float]:
    for key in metric.keys:
        head, _, name = key.rpartition("|")
        if key not in metrics and head:  # a file without splits
            head, key = "split=none", f"split=none|{name}"
        if key not in metrics:
            raise ConfigError(f"{path}: {metric.name} has no {key!r}, but {sorted(metrics)[:12]}.")
        others = [
            float(value)
            for each, value in metrics.items()
            if each.startswith(f"{head}|") and each != key
        ]
        if metric.mean_of_others and not others:
            raise ConfigError(f"{path}: {metric.name} has no categories beside {key!r}.")
        yield sum(others) / len(others) if metric.mean_of_others else float(metrics[key])


def _window(path: Path, contents: dict[str, Any], name: str) -> tuple[float, float]:
    datasets = contents["datasets"]
    if len(datasets) > 1:
        raise ConfigError(
            f"{path}: {len(datasets)} data sets in one run ({', '.join(datasets)}), so that"
            " requests in the log cannot be told apart; run one --data at a time."
        )
    start, end = contents["created_at"], datasets[name]["updated_at"]
    return datetime.fromisoformat(start).timestamp(), datetime.fromisoformat(end).timestamp()


def _predictions(path: Path) -> Iterator[str]:
    """The answers of VLMEvalKit's file of predictions."""
    if path.suffix not in (".tsv", ".json"):
        raise ConfigError(
            f"{path}: predictions in {path.suffix or 'no format'}; run VLMEvalKit with"
            " PRED_FORMAT=tsv."
        )
    try:
        with path.open(encoding="utf-8", newline="") as file:
            if path.suffix == ".tsv":
                csv.field_size_limit(sys.maxsize)
                rows = list(csv.DictReader(file, delimiter="\t"))
            else:
                rows = json.load(file)
    except (OSError, ValueError, csv.Error) as error:
        raise ConfigError(f"{path}: {error}; expected VLMEvalKit's predictions.") from error
    return (str(row.get("prediction")) for row in rows)


def _binomial(score: float, full: float, count: int) -> float:
    """Of right or wrong answers; at least that of graded ones, and near that of F1 and MME."""
    share = min(max(score / full, 0.0), 1.0)
    return full * math.sqrt(share * (1 - share) / max(count, 1))
