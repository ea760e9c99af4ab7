"""The rows of Table 3 of the ViCO paper: which weights, and where each row's plan comes from.

row              weights                              plan
vanilla          before consistency training          nothing compressed
vanilla_vir      the same, and the warmed-up 16x      ViCO's final router decisions, replayed
                 connector, which the original lacks
vanilla_one_tile before consistency training          none; an image is one tile
fastv, sparsevlm before consistency training          none; tokens dropped between layers, in the
                                                      mean over them as many as ViCO saved
.._default       the same                             the same, in the method's own setting
all_compress     after consistency training           everything compressed
random_compress  after consistency training           random, as many tiles as ViCO compressed
image_level      with the image-level router          that router's, per image
vico             with the tile-level router           the router's, per tile
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from typing import Any, Literal

import torch
from torch import Tensor

from megatron_vico.evaluation.benchmarks import ABLATIONS
from megatron_vico.evaluation.runner import Evaluation, EvaluationSample, run_evaluation
from megatron_vico.evaluation.tables import TableRow
from megatron_vico.inference.engine import Engine
from megatron_vico.inference.plans import PlanSource, Routing
from megatron_vico.inference.pruning import PUBLISHED, Pruning
from megatron_vico.vico.compression_plan import generator, plan_random_exact

Weights = Literal["vanilla", "warmed", "vico", "image_level"]

ROWS = tuple(ABLATIONS)


def run_ablations(
    engine_with: Callable[[Weights], Engine],
    samples: Sequence[EvaluationSample],
    *,
    seed: int,
    max_new_tokens: int = 64,
) -> list[Evaluation]:
    """Evaluate all rows, in the order of ROWS; `seed` is that of the random row.

    `engine_with` gives an engine with the named weights; it may be one engine whose weights change,
    since a row is finished before the next weights are asked for. "vico" serves three rows: router
    training leaves all else as consistency training made it.
    """
    engine = engine_with("vico")
    prompts = [engine.prompt(sample.conversation) for sample in samples]

    def run(row: str, plan: PlanSource | Sequence[Tensor]) -> Evaluation:
        return run_evaluation(
            engine, samples, row=row, plan=plan, prompts=prompts, max_new_tokens=max_new_tokens
        )

    done = {"vico": run("vico", Routing())}
    decisions = [answer.compressed_N for answer in done["vico"].answers]
    done["random_compress"] = run("random_compress", random_plans(decisions, seed=seed))
    done["all_compress"] = run("all_compress", "all")
    engine = engine_with("image_level")
    done["image_level"] = run("image_level", Routing(granularity="image"))
    engine = engine_with("warmed")
    done["vanilla_vir"] = run("vanilla_vir", decisions)
    engine = engine_with("vanilla")
    done["vanilla"] = run("vanilla", "none")
    num_layers, saved = engine.model.language.num_layers, done["vico"].result.visual_token_reduction
    for rule in PUBLISHED:
        own = Pruning(rule=rule, num_layers=num_layers)
        done[f"{rule}_default"] = run(f"{rule}_default", own)
        done[rule] = run(rule, replace(own, saved=min(saved, own.most)))
    prompts = [
        engine.prompt(replace(sample.conversation, max_dynamic_patch=1)) for sample in samples
    ]
    done["vanilla_one_tile"] = run("vanilla_one_tile", "none")
    return [done[row] for row in ROWS]


def random_plans(decisions: Sequence[Tensor], *, seed: int) -> list[Tensor]:
    """Plans, [N] bool a conversation, with as many compressed tiles in all as `decisions` has.

    Which tiles they are does not depend on what they show.
    """
    everything = torch.cat(list(decisions))
    draw = generator(seed, 0, 0, "random_compress")
    drawn = plan_random_exact(len(everything), int(everything.sum()), generator=draw)
    return list(drawn.split([len(plan) for plan in decisions]))


def table_rows(evaluations: Sequence[Evaluation]) -> list[TableRow]:
    """The table of `run_ablations`: scores against the vanilla row's."""
    vanilla = next(each.result.score for each in evaluations if each.result.row == "vanilla")
    return [
        TableRow(
            row=each.result.row,
            score=each.result.score,
            retention=each.result.score / vanilla if vanilla else 0.0,
            compressed_tiles=each.result.compressed_tiles,
            visual_token_reduction=each.result.visual_token_reduction,
        )
        for each in evaluations
    ]


def details(evaluations: Sequence[Evaluation]) -> list[dict[str, Any]]:
    """All figures of each row, for a JSON file beside the table."""
    return [asdict(each.result) for each in evaluations]
