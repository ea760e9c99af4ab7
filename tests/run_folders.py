"""Folders as runs leave them, written without a run."""

import json
import math
import random
from pathlib import Path
from typing import Any

import yaml

from megatron_vico.checkpoint.run_folder import (
    iteration_folder,
    metadata_of,
    point_to,
    write_metadata,
)
from megatron_vico.config.registry import MODELS, ModelConfig


def write_run(
    folder: Path,
    *,
    stage: str = "consistency",
    steps: int = 60,
    world_size: int = 128,
    **config: Any,
) -> Path:
    """metrics.jsonl with every figure of a GPU run, and config.yaml."""
    folder.mkdir(parents=True)
    noise = random.Random(0)
    rows: list[dict[str, Any]] = []
    for step in range(1, steps + 1):
        loss = 0.05 * math.exp(-3 * step / steps) * noise.uniform(0.8, 1.2) + 0.005
        row: dict[str, Any] = {
            "iteration": step,
            "loss": loss,
            "grad_norm": 10 * loss,
            "learning_rate": 4e-6 * (1 - step / steps),
            "step_time_s": 40.0 if step == 1 else noise.uniform(26, 28),
            "world_size": world_size,
            "compressed_tiles": noise.uniform(0.49, 0.51),
            "tokens_per_s": 310.0 * world_size,
            "tokens_per_s_per_gpu": noise.uniform(300, 320),
            "tflops_per_gpu": noise.uniform(240, 260),
            "mfu": noise.uniform(0.24, 0.26),
            "fill": noise.uniform(0.98, 0.99),
            "work_imbalance": noise.uniform(1.0, 1.01),
            "memory_allocated_gb": 112.0,
            "memory_reserved_gb": 121.0,
        }
        if step > 1:
            row |= {"encode_s": 4.0, "reference_s": 6.0, "policy_s": 14.0, "optimizer_s": 0.6}
        if stage == "router":
            row |= {"router_accuracy": 1 - loss, "router_auc": 1 - loss / 2}
            row |= {"router_threshold": 1.8, "router_labelled_compress": 0.6}
            row |= {
                f"router_ratio_p{name}": value for name, value in ((10, 1), (50, 1.5), (90, 20))
            }
        else:
            row["encoder_backward_s"] = 1.5
            shares = (0, 25, 50, 75, 100)
            row |= {f"kl_compressed_{share}": loss * (0.1 + share / 50) for share in shares}
        rows.append(row)
        if step % 20 == 0:
            rows.append({"iteration": step, "valid_loss": 1.1 * loss, "valid_samples": 512})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = {"stage": stage, "model_size": "internvl3_5-8b", "train_iters": steps} | config
    (folder / "config.yaml").write_text(yaml.safe_dump(options))
    return folder


def write_step(
    folder: Path, iteration: int, *, model: ModelConfig = MODELS["toy"], stage: str = "warmup"
) -> Path:
    """A finished checkpoint without tensors, the newest of a run; its own folder."""
    step = iteration_folder(folder, iteration)
    step.mkdir(parents=True)
    write_metadata(step, metadata_of(model, stage=stage))
    point_to(folder, iteration)
    return step
