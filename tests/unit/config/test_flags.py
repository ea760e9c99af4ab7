"""Flags and recipes to a RunConfig and back."""

import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_vico.config.flags import PASSED_ON, help_text, options, parse, to_yaml
from megatron_vico.config.schema import RunConfig
from megatron_vico.errors import ConfigError

ROOT = Path(__file__).parents[3]


def recipe(folder: Path, text: str, name: str = "recipe.yaml") -> str:
    (folder / name).write_text(text, encoding="utf-8")
    return str(folder / name)


def test_nothing_given_is_the_default() -> None:
    assert parse([]) == RunConfig()


def test_command_line_wins_over_recipe_wins_over_default(tmp_path: Path) -> None:
    file = recipe(tmp_path, "lr: 2.0e-5\nseed: 7\n")
    config = parse(["--seed", "8", "--recipe", file])
    assert (config.optimizer.lr, config.training.seed, config.optimizer.min_lr) == (2e-5, 8, 1e-7)


@pytest.mark.parametrize(
    ("words", "option", "value"),
    [
        ("--data-path a b", "data_path", ("a", "b")),
        ("--data-path --seed 3", "data_path", ()),
        ("--no-use-thumbnail", "use_thumbnail", False),
        ("--bf16", "bf16", True),
        ("--use-distributed-optimizer --disable-use-distributed-optimizer", "bf16", False),
        ("--max_skipped_share=1e-2", "max_skipped_share", 0.01),
        ("--max-samples-per-pack 3", "max_samples_per_pack", 3),
        ("--data-retries -1", "data_retries", -1),
        ("--train-modules vit vir", "train_modules", ("vit", "vir")),
        ("--lr-mult vit=0.1 vir=2", "lr_mult", ("vit=0.1", "vir=2")),
        ("--lr=1e-5 --lr 2e-5", "lr", 2e-5),
        ("--no-rope-fusion", "rope_fusion", False),
        ("--flash-attention-version 3", "flash_attention_version", 3),
        ("--moe-router-load-balancing-type none", "moe_router_load_balancing_type", "none"),
        ("--disable-bf16-reduced-precision-matmul", "disable_bf16_reduced_precision_matmul", True),
        ("--save a=b", "save", "a=b"),
        ("--save=a=b", "save", "a=b"),
        ("--save=", "save", ""),
        ("--exp-avg-dtype bf16", "exp_avg_dtype", "bf16"),
        ("--ddp-bucket-size 1000", "ddp_bucket_size", 1000),
        ("--moe-token-dispatcher-type alltoall", "moe_token_dispatcher_type", "alltoall"),
    ],
)
def test_every_form_of_flag(words: str, option: str, value: object) -> None:
    section = getattr(parse(words.split()), options()[option].section)
    assert getattr(section, option) == value


def test_none_takes_back_what_the_recipe_sets(tmp_path: Path) -> None:
    file = recipe(tmp_path, "recompute_granularity: full\nsave: somewhere\n")
    config = parse(["--recipe", file, "--recompute-granularity", "none"])
    assert (config.parallel.recompute_granularity, config.checkpoint.save) == (None, "somewhere")
    over = recipe(tmp_path, "include: recipe.yaml\nsave: null\n", "over.yaml")
    assert parse(["--recipe", over]).checkpoint.save is None


def test_include_is_relative_to_the_including_file_and_comes_first(tmp_path: Path) -> None:
    (tmp_path / "size").mkdir()
    recipe(tmp_path, "lr: 1.0e-5\nseed: 1\nseq_length: 64\n", "root.yaml")
    recipe(tmp_path, "include: root.yaml\nseed: 2\n", "base.yaml")
    file = recipe(tmp_path / "size", "include: ../base.yaml\nseq_length: 128\n")
    config = parse(["--recipe", file])
    assert (config.optimizer.lr, config.training.seed, config.data.seq_length) == (1e-5, 2, 128)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("lr_decai_style: a", "unknown option --lr-decai-style; did you mean '--lr-decay-style'?"),
        ("no_bf16: true", "unknown option --no-bf16; did you mean '--bf16'?"),
        ("num_experts: 8", "--num-experts is not an option here: fixed by --model-size"),
        ("micro_batch_size: 1", "--micro-batch-size is not an option here: a microbatch"),
        ("tp_comm_overlap: true", "--tp-comm-overlap is an option of Megatron that"),
        ("seed: 1.5", "--seed is 1.5, expected a whole number"),
        ("seed: true", "--seed is True, expected a whole number"),
        ("seed: [1]", "--seed is [1], expected a whole number"),
        ("seed: null", "--seed is None, expected a whole number"),
        ("bf16: 1", "--bf16 is 1, expected true or false"),
        ("lr: fast", "--lr is 'fast', expected a number"),
        ("save: true", "--save is True, expected text"),
        ("stage: warm", "--stage is 'warm', expected one of pretrain, warmup, consistency, router"),
        ("train_modules: [vit, vat]", "--train-modules is 'vat', expected one of vit,"),
        ("data_path: [{a: b}]", "--data-path is {'a': 'b'}, expected text"),
        ("data_path: [a, -b]", "expected no dash at its start; for a path write ./-b"),
        ("- lr", "a recipe is a flat mapping"),
        ("lr: [", "not YAML"),
        ("include: [a, b]", "include is ['a', 'b'], expected the path of one recipe"),
        ("include: recipe.yaml", "recipe includes itself"),
        ("include: no_such.yaml", "no_such.yaml: cannot read the recipe"),
    ],
)
def test_errors_of_a_recipe_name_the_file_and_the_fix(
    tmp_path: Path, text: str, message: str
) -> None:
    with pytest.raises(ConfigError) as error:
        parse(["--recipe", recipe(tmp_path, text)])
    assert message in str(error.value)
    assert str(tmp_path) in str(error.value)


@pytest.mark.parametrize(
    ("text", "words", "expected"),
    [
        ("save: a\nload: a", "", ("a", "a")),
        ("save: a\nload: a", "--save b", ("b", "b")),
        ("save: a\nload: a", "--save none", (None, None)),
        ("save: a\nload: a", "--save b --load c", ("b", "c")),
        ("save: a\nload: a", "--save b --load none", ("b", None)),
        ("save: a\nload: c", "--save b", ("b", "c")),
        ("save: a", "--save b", ("b", None)),
    ],
)
def test_a_recipe_that_resumes_its_own_folder_does_so_in_another(
    text: str, words: str, expected: tuple[str | None, str | None], tmp_path: Path
) -> None:
    files = parse(["--recipe", recipe(tmp_path, text), *words.split()]).checkpoint
    assert (files.save, files.load) == expected


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--lrr 3", "unknown option --lrr; did you mean '--lr'?"),
        ("--no-lr 3", "unknown option --no-lr"),
        ("--unknown 3", "unknown option --unknown$"),  # not `did you mean '--kl-chunk-rows'`
        ("--lr", "--lr is given no value, expected one"),
        ("--lr 3 word", "--lr is given the 2 values '3 word', expected one"),
        ("--lr x", "--lr is 'x', expected a number"),
        ("--data-path a -b", "expected no dash at its start; for a path write ./-b"),
        ("--profile-ranks 1 -x", "--profile-ranks is '-x', expected a whole number"),
        ("--train-modules -x", "--train-modules is '-x', expected one of vit,"),
        ("--lr 1e-5 --seed 1 --stage warm", "--stage is 'warm', expected one of pretrain"),
        ("--recipe", "--recipe is given no value, expected one"),
        ("word", "'word' belongs to no flag"),
        ("--num-layers=3", "--num-layers is not an option here: fixed by --model-size"),
        ("--trace-step 3", "--trace-step is not an option here: for step N use --profile "),
        ("--moe-grouped-gem", "did you mean '--moe-grouped-gemm'?"),
        ("--no-rope-fusion 3", "'3' belongs to no flag"),
        ("--use-megatron-fsdp", "--use-megatron-fsdp is an option of Megatron that this trainer"),
        ("--exp-avg-dtype bf15", "--exp-avg-dtype is 'bf15', expected one of fp32, bf16,"),
    ],
)
def test_errors_of_the_command_line(words: str, message: str) -> None:
    with pytest.raises(ConfigError, match=r"^command line: ") as error:
        parse(words.split())
    assert message in f"{error.value}$"


def test_a_run_is_immutable_and_travels_between_processes() -> None:
    config = parse(["--fp8-param-gather", "--data-path", "a"])
    assert pickle.loads(pickle.dumps(config)) == config
    assert hash(config) == hash(parse(["--data-path", "a", "--fp8-param-gather"]))
    with pytest.raises(AttributeError):
        config.training.seed = 3  # type: ignore[misc]


def test_resolved_yaml_is_complete_and_gives_the_same_run(tmp_path: Path) -> None:
    config = parse(
        "--data-path a b --lr 3e-6 --train-modules vit --no-rope-fusion --fp8-param-gather"
        " --offload-modules moe_act --save x:y --exp-avg-dtype bf16 --max-dynamic-patch 6".split()
    )
    text = to_yaml(config)
    printed = yaml.safe_load(text)
    passed = {"rope_fusion", "fp8_param_gather", "offload_modules", "exp_avg_dtype"}
    own = {name for name, option in options().items() if option.section not in PASSED_ON}
    assert printed.keys() == own | passed
    assert parse(["--recipe", recipe(tmp_path, text)]) == config


@pytest.mark.slow
@settings(deadline=None, max_examples=30)
@given(
    lr=st.floats(1e-12, 1.0),
    seed=st.integers(0, 2**62),
    paths=st.lists(
        st.text(st.characters(categories=["L", "N", "P", "Zs"]), min_size=1, max_size=9).filter(
            lambda text: not text.startswith("-")
        ),
        max_size=3,
    ),
    save=st.text(st.characters(categories=["L", "N", "P", "Zs"]), max_size=9).filter(
        lambda text: text != "none"
    ),
)
def test_any_value_survives_the_round_trip(
    tmp_path_factory: pytest.TempPathFactory, lr: float, seed: int, paths: list[str], save: str
) -> None:
    folder = tmp_path_factory.getbasetemp()
    written = {"lr": lr, "seed": seed, "data_path": paths, "save": save}
    config = parse(["--recipe", recipe(folder, yaml.safe_dump(written))])
    assert (config.optimizer.lr, config.training.seed) == (lr, seed)
    assert (config.data.data_path, config.checkpoint.save) == (tuple(paths), save)
    assert parse(["--recipe", recipe(folder, to_yaml(config))]) == config


def test_yaml_reads_an_exponent_without_a_dot_as_text(tmp_path: Path) -> None:
    assert parse(["--recipe", recipe(tmp_path, "lr: 4e-6\n")]).optimizer.lr == 4e-6


def test_help_shows_every_flag() -> None:
    text = " ".join(help_text().split())
    assert [name for name in options() if f" --{name.replace('_', '-')}" not in f" {text}"] == []
    for words in (
        "Percentile of the window that is the threshold of Eq. 3, in [0, 100]. (default: 60.0)",
        "--rope-fusion, --no-rope-fusion",
        "--router-granularity {tile,image}",
    ):
        assert words in text


@pytest.mark.parametrize("words", ["--help", "--print-config", "--check --world-size 32"])
def test_what_trains_nothing_needs_neither_torch_nor_megatron(words: str) -> None:
    file = ROOT / "examples" / "recipes" / "internvl3_5_8b" / "consistency.yaml"
    code = (
        "import sys; from megatron_vico.cli.main import main\n"
        f"assert main(['train', '--recipe', {str(file)!r}, *{words.split()}]) == 0\n"
        "sys.exit('torch' in sys.modules or 'megatron' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
