"""Evaluate the demo's models on its held-out images: the rows of Table 3, and the pictures.

Run, after the training stages and the export:
python examples/quickstart/evaluate.py --run runs/demo
"""

import argparse
import io
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from PIL import Image

from megatron_vico import cpu_stand_in

if TYPE_CHECKING:
    from megatron_vico.evaluation.runner import Evaluation, EvaluationSample
    from megatron_vico.parallel.groups import Groups

STAGE_TITLES = {
    "pretrain": "pretrain",
    "warmup": "warm-up",
    "consistency": "consistency",
    "router": "router (tile)",
    "router_image": "router (image)",
}
MAX_NEW_TOKENS = 8
NUM_PICTURED = 12


def main() -> None:
    """Write results.json, details.json, table.txt, table.md and pictures."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument(
        "--run", type=Path, default=Path("runs/demo"), help="folder of the demo's run"
    )
    parser.add_argument("--split", choices=("val", "test"), default="test", help="which images")
    parser.add_argument("--seed", type=int, default=1234, help="of the random row")
    args = parser.parse_args()
    cpu_stand_in.install()  # before megatron is imported, which the functions below do
    from megatron_vico.config.schema import ParallelOptions
    from megatron_vico.parallel import groups as process_groups

    with process_groups.started(ParallelOptions(), seed=args.seed, timeout_minutes=10) as groups:
        evaluate(args.run, groups=groups, split=args.split, seed=args.seed)


def evaluate(run: Path, *, groups: "Groups", split: str, seed: int) -> None:
    """Do what `main` says, on one rank; `run` has data/, the stages' checkpoints and flash/."""
    from megatron_vico.config.registry import get_model_config
    from megatron_vico.data.encode.sample_encoder import EncodingSettings
    from megatron_vico.data.encode.tokenizer import load_tokenizer
    from megatron_vico.evaluation import tables
    from megatron_vico.evaluation.ablations import Weights, details, run_ablations, table_rows
    from megatron_vico.evaluation.runner import read_evaluation_set
    from megatron_vico.files import write_json
    from megatron_vico.inference.engine import Engine
    from megatron_vico.inference.loading import build_engine, load_weights

    # The tokenizer travels with the export; the one that trained the model has the same ids.
    engine = build_engine(
        get_model_config("toy"),
        groups=groups,
        tokenizer=load_tokenizer(run / "flash"),
        settings=EncodingSettings(
            image_size=32, max_dynamic_patch=4, use_thumbnail=False, tile_tags="numbered"
        ),
        batch_size=128,
    )
    folders: dict[Weights, str] = {
        "vanilla": "pretrain",
        "warmed": "warmup",
        "image_level": "router_image",
        "vico": "flash",
    }

    def engine_with(weights: Weights) -> Engine:
        load_weights(engine, run / folders[weights])
        return engine

    samples = read_evaluation_set(run / "data" / f"{split}.jsonl", image_root=run / "data")
    evaluations = run_ablations(engine_with, samples, seed=seed, max_new_tokens=MAX_NEW_TOKENS)
    rows = table_rows(evaluations)
    grid = tables.ablation_grid(rows)
    write_json(run / "details.json", details(evaluations), sort_keys=False)
    num_questions = sum(evaluations[0].result.num_questions_by_kind.values())
    counts = f"{len(samples)} {split} images, {num_questions} questions"
    text = f"{counts}\n\n{tables.as_text(grid)}\n"
    (run / "table.txt").write_text(text, encoding="utf-8")
    (run / "table.md").write_text(tables.as_markdown(grid) + "\n", encoding="utf-8")
    draw(run, next(each for each in evaluations if each.result.row == "vico"), samples)
    # Last: whoever finds the results finds all else too.
    tables.write_results(rows, run / "results.json")
    print(f"\n{text}")


def draw(run: Path, vico: "Evaluation", samples: "Sequence[EvaluationSample]") -> None:
    """The demo's pictures."""
    from megatron_vico.evaluation import figures, overlays, plots

    # The first images of the set, whatever they show.
    pictured = [
        overlays.RoutedImage(
            picture=Image.open(io.BytesIO(sample.conversation.images[0])),
            columns=2,
            compressed=answer.compressed_N.tolist(),
            probability=[] if answer.probability_N is None else answer.probability_N.tolist(),
        )
        for sample, answer in zip(samples[:NUM_PICTURED], vico.answers, strict=False)
    ]
    overlays.routing_picture(pictured, tokens=(4, 1)).save(run / "routing.png")
    figures.compression_by_content(vico.result).savefig(run / "by_content.png", dpi=110)
    metrics = {title: run / stage / "metrics.jsonl" for stage, title in STAGE_TITLES.items()}
    plots.loss_curves(metrics).savefig(run / "loss.png", dpi=110)
    figures.ratio_window(run / "router" / "metrics.jsonl").savefig(run / "window.png", dpi=110)


if __name__ == "__main__":
    main()
