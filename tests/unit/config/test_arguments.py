"""Flags and recipes to a RunConfig and back."""

import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_vico.config.arguments import (
    config_kwargs,
    help_text,
    load_recipe,
    own_options,
    parse,
    to_yaml,
)
from megatron_vico.config.schema import Overrides, RunConfig
from megatron_vico.errors import ConfigError


def recipe(folder: Path, text: str, name: str = "recipe.yaml") -> str:
    (folder / name).write_text(text)
    return str(folder / name)


def test_nothing_given_is_the_default() -> None:
    assert parse([]) == RunConfig()


def test_command_line_wins_over_recipe_wins_over_default(tmp_path: Path) -> None:
    file = recipe(tmp_path, "lr: 2.0e-5\nseed: 7\n")
    config = parse(["--seed", "8", "--recipe", file])
    assert (config.optimizer.lr, config.training.seed, config.optimizer.min_lr) == (2e-5, 8, 1e-7)


def test_every_kind_of_flag() -> None:
    words = (
        "--data-path a b --train-modules vit connector_16x --no-use-thumbnail --bf16"
        " --max-samples-per-pack 3"
    )
    config = parse([*words.split(), "--lr=1e-5", "--lr-mult", "vit=0.1"])
    assert config.data.data_path == ("a", "b")
    assert config.stage.train_modules == ("vit", "connector_16x")
    assert (config.data.use_thumbnail, config.training.bf16, config.data.max_samples_per_pack) == (
        False,
        True,
        3,
    )
    assert (config.optimizer.lr, config.stage.lr_mult) == (1e-5, ("vit=0.1",))


def test_none_takes_back_what_the_recipe_sets(tmp_path: Path) -> None:
    file = recipe(tmp_path, "recompute_granularity: full\nsave: somewhere\n")
    config = parse(["--recipe", file, "--recompute-granularity", "none"])
    assert (config.parallel.recompute_granularity, config.checkpoint.save) == (None, "somewhere")


def test_include_is_relative_to_the_including_file_and_comes_first(tmp_path: Path) -> None:
    (tmp_path / "size").mkdir()
    recipe(tmp_path, "lr: 1.0e-5\nseed: 1\nseq_length: 64\n", "root.yaml")
    recipe(tmp_path, "include: root.yaml\nseed: 2\n", "base.yaml")
    file = recipe(tmp_path / "size", "include: ../base.yaml\nseq_length: 128\n")
    assert load_recipe(file) == {"lr": 1e-5, "seed": 2, "seq_length": 128}


def test_yaml_reads_an_exponent_without_a_dot_as_text(tmp_path: Path) -> None:
    assert load_recipe(recipe(tmp_path, "lr: 4e-6\n")) == {"lr": 4e-6}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "lr_decai_style: cosine",
            "unknown option --lr-decai-style; did you mean '--lr-decay-style'?",
        ),
        ("num_experts: 8", "--num-experts is refused: fixed by --model-size"),
        ("micro_batch_size: 1", "--micro-batch-size is refused: a microbatch is one pack"),
        ("seed: 1.5", "--seed is 1.5, expected a whole number"),
        ("seed: true", "--seed is True, expected a whole number"),
        ("bf16: 1", "--bf16 is 1, expected true or false"),
        ("lr: fast", "--lr is 'fast', expected a number"),
        ("seed: null", "--seed is None, expected a whole number"),
        ("stage: warm", "--stage is 'warm', expected one of pretrain, warmup, consistency, router"),
        ("data_path: [{a: b}]", "--data-path is {'a': 'b'}, expected text"),
        ("- lr", "a recipe is a flat mapping"),
        ("lr: [", "not YAML"),
        ("include: [a, b]", "include is ['a', 'b'], expected the path of one recipe"),
        ("include: recipe.yaml", "recipe includes itself"),
        ("include: no_such.yaml", "no_such.yaml: cannot read the recipe"),
    ],
)
def test_errors_name_the_file_and_the_fix(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ConfigError) as error:
        load_recipe(recipe(tmp_path, text))
    assert message in str(error.value)
    assert str(tmp_path) in str(error.value)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--lrr 3", "unknown option --lrr; did you mean '--lr'?"),
        ("--no-lr 3", "unknown option --no-lr"),
        ("--lr", "expected one argument"),
        ("--lr x", "--lr is 'x', expected a number"),
        ("word", "'word' belongs to no flag"),
        ("--num-layers=3", "--num-layers is refused: fixed by --model-size"),
        ("--moe-grouped-gem", "did you mean '--moe-grouped-gemm'?"),
        ("--no-rope-fusion 3", "'3' belongs to no flag"),
    ],
)
def test_errors_of_the_command_line(words: str, message: str) -> None:
    with pytest.raises(ConfigError) as error:
        parse(words.split())
    assert message in str(error.value)


def test_options_without_a_section_are_passed_on_in_megatrons_types() -> None:
    from megatron.core.distributed import DistributedDataParallelConfig
    from megatron.core.optimizer import OptimizerConfig
    from megatron.core.transformer import TransformerConfig
    from megatron.core.transformer.enums import AttnBackend

    config = parse(
        "--attention-backend fused --offload-modules core_attn attn_proj --exp-avg-dtype bf16"
        " --no-rope-fusion --fp8-param-gather --ddp-bucket-size 1000 --cp-comm-type a2a".split()
    )
    assert config_kwargs(config.transformer_overrides, TransformerConfig) == {
        "attention_backend": AttnBackend.fused,
        "apply_rope_fusion": False,
        "cp_comm_type": "a2a",
        "fp8_param": True,
        "offload_modules": ["core_attn", "attn_proj"],
    }
    assert config_kwargs(config.optimizer_overrides, OptimizerConfig) == {
        "exp_avg_dtype": torch.bfloat16
    }
    ddp = config_kwargs(config.ddp_overrides, DistributedDataParallelConfig)
    assert ddp == {"bucket_size": 1000, "fp8_param_gather": True}
    DistributedDataParallelConfig(**ddp)


def test_overrides_are_immutable_and_travel_between_processes() -> None:
    overrides = parse(["--fp8-param-gather"]).transformer_overrides
    assert isinstance(overrides, Overrides)
    assert dict(**overrides) == {"fp8_param": True}
    assert pickle.loads(pickle.dumps(overrides)) == overrides
    assert hash(overrides) == hash(Overrides((("fp8_param", True),)))
    with pytest.raises(TypeError):
        overrides["fp8_param"] = False  # type: ignore[index]


def test_resolved_yaml_is_complete_and_gives_the_same_run(tmp_path: Path) -> None:
    config = parse(
        "--data-path a b --lr 3e-6 --train-modules vit --no-rope-fusion --fp8-param-gather"
        " --offload-modules moe_act --save x:y --exp-avg-dtype bf16 --max-dynamic-patch 6".split()
    )
    text = to_yaml(config)
    assert own_options().keys() <= yaml.safe_load(text).keys()
    assert parse(["--recipe", recipe(tmp_path, text)]) == config


@settings(deadline=None, max_examples=30)
@given(
    lr=st.floats(1e-12, 1.0),
    seed=st.integers(0, 2**62),
    paths=st.lists(
        st.text(st.characters(categories=["L", "N", "P", "Zs"]), min_size=1, max_size=9), max_size=3
    ),
)
def test_any_value_survives_the_round_trip(
    tmp_path_factory: pytest.TempPathFactory, lr: float, seed: int, paths: list[str]
) -> None:
    file = tmp_path_factory.getbasetemp() / "any.yaml"
    file.write_text(yaml.safe_dump({"lr": lr, "seed": seed, "data_path": paths}), encoding="utf-8")
    config = parse(["--recipe", str(file)])
    assert (config.optimizer.lr, config.training.seed, config.data.data_path) == (
        lr,
        seed,
        tuple(paths),
    )
    file.write_text(to_yaml(config), encoding="utf-8")
    assert parse(["--recipe", str(file)]) == config


def test_help_shows_both_kinds_of_flags() -> None:
    text = help_text()
    for words in (
        "--router-percentile",
        "Percentile of the window",
        "--moe-grouped-gemm",
        "{tile,image}",
        "(default: 60.0)",
    ):
        assert words in text


def test_our_own_options_need_no_megatron(tmp_path: Path) -> None:
    file = recipe(tmp_path, "lr: 1.0e-5\n")
    code = (
        "import sys; from megatron_vico.config.arguments import parse, to_yaml; "
        f"to_yaml(parse(['--recipe', {file!r}, '--seed', '3'])); "
        "sys.exit('torch' in sys.modules or 'megatron' in sys.modules)"
    )
    assert (
        subprocess.run(
            [sys.executable, "-c", code], check=False, cwd=Path(__file__).parents[3]
        ).returncode
        == 0
    )
