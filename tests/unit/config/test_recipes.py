"""Every recipe of the released sizes resolves, fits the GPUs it names, and prints a run that is the
same again."""

import itertools
import re
from pathlib import Path

import pytest
import yaml

from megatron_vico.config.flags import parse, to_yaml
from megatron_vico.config.registry import MODELS
from megatron_vico.config.validate import remarks, validate
from megatron_vico.models.build import language_transformer_config

RECIPES = Path(__file__).parents[3] / "examples" / "recipes"
SIZES = [name for name in MODELS if name.startswith("internvl3_5-")]
STAGES = ("warmup", "consistency", "router")
FROZEN = "consistency_frozen_vit"
ALL = [(size, file) for size in SIZES for file in (*STAGES, FROZEN)]


def path_of(size: str, file: str) -> Path:
    return RECIPES / size.replace("-", "_") / f"{file}.yaml"


def num_gpus(path: Path) -> int:
    named = re.match(r"# For (\d+) GPUs \((\d+) nodes? of 8 H[12]00\)", path.read_text())
    assert named is not None, f"{path}: the first line says for how many GPUs"
    assert int(named[1]) == 8 * int(named[2])
    return int(named[1])


def test_eight_sizes_three_stages_a_variant_and_no_other_file() -> None:
    assert len(SIZES) == 8
    assert set(RECIPES.rglob("*/*.yaml")) == {path_of(size, file) for size, file in ALL}


@pytest.mark.parametrize(("size", "file"), ALL)
def test_recipe(size: str, file: str, tmp_path: Path) -> None:
    path, stage = path_of(size, file), file.partition("_")[0]
    config = parse(["--recipe", str(path)])
    assert (config.model.model_size, config.stage.stage) == (size, stage)
    validate(config, num_gpus(path))
    (tmp_path / "resolved.yaml").write_text(to_yaml(config))
    assert parse(["--recipe", str(tmp_path / "resolved.yaml")]) == config
    # The stages follow each other.
    before = {"warmup": "", "consistency": "-warmup", "router": "-consistency"}[stage]
    assert config.checkpoint.pretrained_checkpoint == f"checkpoints/{size}{before}"
    assert config.checkpoint.save == config.checkpoint.load == f"checkpoints/{size}-{stage}"
    assert config.stage.reference_load == (f"checkpoints/{size}" if stage == "router" else None)
    # megatron-core takes the layout.
    built = language_transformer_config(MODELS[size], config)
    assert built.pipeline_model_parallel_size == config.parallel.pipeline_model_parallel_size


@pytest.mark.parametrize("size", SIZES)
def test_settings_of_the_paper(size: str) -> None:
    consistency = parse(["--recipe", str(path_of(size, "consistency"))])
    assert (consistency.data.seq_length, consistency.training.global_batch_size) == (32768, 256)
    # "The entire model is trained", says the InternVL3.5 report.
    frozen = parse(["--recipe", str(path_of(size, FROZEN))]).stage
    assert set(consistency.stage.trained) == {*frozen.trained, "vit"}
    assert consistency.stage.reference_offload == "vit"
    # Communication runs under what is computed.
    assert consistency.parallel.overlap_grad_reduce
    assert consistency.parallel.overlap_param_gather
    optimizer = consistency.optimizer
    assert (optimizer.lr, optimizer.min_lr, optimizer.lr_decay_style) == (4e-6, 1e-7, "cosine")
    router = parse(["--recipe", str(path_of(size, "router"))])
    assert (router.training.global_batch_size, router.stage.router_percentile) == (8, 60.0)
    assert router.stage.train_modules in (None, ("vir",))


@pytest.mark.slow
def test_only_the_router_of_241b_has_less_than_a_full_pipeline() -> None:
    thin = [(size, file) for size, file in ALL if remarks_of(size, file)]
    assert thin == [("internvl3_5-241b-a28b", "router")]


def remarks_of(size: str, file: str) -> list[str]:
    path = path_of(size, file)
    return remarks(parse(["--recipe", str(path)]), num_gpus(path))


def test_recipes_list_only_what_differs_from_their_base() -> None:
    for size, stage in itertools.product(SIZES, STAGES):
        own = [
            line.partition(":")[0]
            for line in path_of(size, stage).read_text().splitlines()
            if ":" in line and line[0] != "#"
        ]
        base = yaml.safe_load((RECIPES / f"base_{stage}.yaml").read_text())
        assert not base.keys() & set(own), path_of(size, stage)
