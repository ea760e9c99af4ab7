"""Options that Megatron has too, against the oracle: Megatron's own parser and config classes."""

import argparse
import dataclasses
from typing import Any

import pytest
import torch
from megatron.core.distributed import DistributedDataParallelConfig
from megatron.core.optimizer import OptimizerConfig
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.enums import AttnBackend

from megatron_vico.config.flags import PASSED_ON, options, parse
from megatron_vico.config.megatron_kwargs import FIELDS, SECTIONS, fields_of, megatron_kwargs
from megatron_vico.errors import ConfigError

CLASSES = {
    config_class.__name__: config_class
    for config_class in (TransformerConfig, OptimizerConfig, DistributedDataParallelConfig)
}
# Upstream takes a list, one value a layer or a loss; ours take the one value that all of them
# share.
OTHER_FORM = {"cp_comm_type", "moe_router_load_balancing_type", "data_path"}
# Fields of megatron-core that upstream has no flag for.
NO_FLAG = {"fp8_dot_product_attention", "tp_only_amax_red"}
# Ours take fewer of upstream's words.
FEWER_WORDS = {"lr_decay_style", "fp8_recipe", "moe_token_dispatcher_type", "moe_aux_loss_coeff"}


@pytest.fixture(scope="module")
def upstream() -> argparse.ArgumentParser:
    from megatron.training.arguments import add_megatron_arguments

    return add_megatron_arguments(argparse.ArgumentParser(allow_abbrev=False, exit_on_error=False))


@pytest.fixture(scope="module")
def actions(upstream: argparse.ArgumentParser) -> dict[str, argparse.Action]:
    return {flag: action for action in upstream._actions for flag in action.option_strings}


def test_each_option_sets_fields_that_megatron_core_has() -> None:
    known = {
        name: {field.name for field in dataclasses.fields(each)} for name, each in CLASSES.items()
    }
    for option in options().values():
        if option.section in SECTIONS:
            for class_name, field in fields_of(option.section, option.name):
                assert field in known[class_name], option.name
    assert FIELDS.keys() <= options().keys()


def test_an_option_is_passed_on_only_under_a_flag_of_megatrons(
    actions: dict[str, argparse.Action],
) -> None:
    passed = [option for option in options().values() if option.section in PASSED_ON]
    assert len(passed) > 50
    for option in passed:
        forms = {option.flag, f"--no-{option.flag[2:]}", f"--disable-{option.flag[2:]}"}
        assert bool(forms & actions.keys()) != (option.name in NO_FLAG), option.name


@pytest.mark.slow
def test_flags_are_read_and_passed_on_as_upstream_does(
    upstream: argparse.ArgumentParser, actions: dict[str, argparse.Action]
) -> None:
    compared = 0
    for option in options().values():
        for flag in (option.flag, f"--no-{option.flag[2:]}", f"--disable-{option.flag[2:]}"):
            if flag not in actions or option.name in OTHER_FORM | FEWER_WORDS:
                continue
            words = [flag, *example_words(actions[flag])]
            theirs, config = vars(upstream.parse_args(words)), parse(words)
            ours = getattr(getattr(config, option.section), option.name)
            dest = actions[flag].dest
            targets = fields_of(option.section, option.name) if option.section in SECTIONS else ()
            for class_name, field in targets:
                passed = megatron_kwargs(config, CLASSES[class_name])
                if field in theirs:
                    assert plain(passed.get(field, False)) == plain(theirs[field]), words
            if dest == option.name:
                assert plain(ours) == plain(theirs[dest]), words
            compared += 1
    assert compared > 90


def test_a_flag_of_megatrons_that_is_not_passed_on_is_said_to_be_one(
    actions: dict[str, argparse.Action],
) -> None:
    others = [
        flag
        for flag in sorted(actions.keys() - {"-h", "--help"})
        # These get their names from a prefix.
        if not flag.startswith("--fault-injector") and not _is_known(flag)
    ]
    assert len(others) > 400
    for flag in others[::10]:
        with pytest.raises(
            ConfigError, match=f"{flag} is (an option of Megatron|not an option here)"
        ):
            parse([flag])


def _is_known(flag: str) -> bool:
    name = flag.removeprefix("--").replace("-", "_")
    return name in options() or name.removeprefix("no_").removeprefix("disable_") in options()


def test_choices_are_upstreams() -> None:
    assert set(options()["attention_backend"].choices) == set(AttnBackend.__members__)


def test_values_are_in_megatrons_types() -> None:
    config = parse(
        "--attention-backend fused --offload-modules core_attn attn_proj --exp-avg-dtype bf16"
        " --exp-avg-sq-dtype fp8 --moe-router-dtype fp32 --no-rope-fusion --fp8-param-gather"
        " --ddp-bucket-size 1000 --cp-comm-type a2a --recompute-modules moe".split()
    )
    transformer = megatron_kwargs(config, TransformerConfig)
    expected = {
        "attention_backend": AttnBackend.fused,
        "apply_rope_fusion": False,
        "cp_comm_type": "a2a",
        "fp8_param": True,
        "moe_router_dtype": "fp32",
        "offload_modules": ["core_attn", "attn_proj"],
        "recompute_modules": ["moe"],
        "tensor_model_parallel_size": 1,
    }
    assert {name: transformer[name] for name in expected} == expected
    assert not {"fp8", "fp8_recipe", "hidden_dropout", "moe_aux_loss_coeff"} & transformer.keys()
    optimizer = megatron_kwargs(config, OptimizerConfig)
    assert (optimizer["exp_avg_dtype"], optimizer["exp_avg_sq_dtype"]) == (
        torch.bfloat16,
        torch.uint8,
    )
    assert optimizer["adam_beta2"] == 0.999
    patterns = "--ddp-param-name-patterns-for-fp32-local-accumulation a* b*".split()
    ddp = megatron_kwargs(parse([*patterns, "--fp8-param-gather"]), DistributedDataParallelConfig)
    assert ddp == {
        "fp8_param_gather": True,
        "overlap_grad_reduce": False,
        "overlap_param_gather": False,
        "param_name_patterns_for_fp32_local_accumulation": ("a*", "b*"),
        "use_distributed_optimizer": False,
    }
    DistributedDataParallelConfig(**ddp)


def example_words(action: argparse.Action) -> list[str]:
    if action.nargs == 0:
        return []
    if action.choices:
        first = next(iter(action.choices))
        return [getattr(first, "name", None) or str(first)]
    return {int: ["7"], float: ["0.5"]}.get(action.type, ["word"])  # type: ignore[call-overload]


def plain(value: Any) -> Any:
    if isinstance(value, tuple | list):
        return list(value)
    dtypes = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
    return dtypes.get(value, getattr(value, "name", value))
