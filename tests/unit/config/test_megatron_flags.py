"""The table of Megatron's flags against the oracle: Megatron's own parser."""

import argparse
import dataclasses
import fnmatch
from typing import Any

import pytest

from megatron_vico.config import arguments, megatron_flags
from megatron_vico.config.options import Option
from megatron_vico.errors import ConfigError

# Upstream takes a list, one value a layer or a loss; ours take the one value that all of them
# share.
SAME_FIELD_OTHER_FORM = {"cp_comm_type", "moe_router_load_balancing_type"}


@pytest.fixture(scope="module")
def upstream() -> argparse.ArgumentParser:
    from megatron.training.arguments import add_megatron_arguments

    return add_megatron_arguments(argparse.ArgumentParser(allow_abbrev=False, exit_on_error=False))


@pytest.fixture(scope="module")
def upstream_flags(upstream: argparse.ArgumentParser) -> dict[str, argparse.Action]:
    return {
        flag: action
        for action in upstream._actions
        for flag in action.option_strings
        if flag.startswith("--") and flag != "--help"
    }


def taken(flag: str) -> Option | None:
    """The option that takes a flag: of that name, or a boolean that this is the --no- or --disable-
    form of."""
    name = flag.removeprefix("--").replace("-", "_")
    known = arguments.all_options()
    bare = name.removeprefix("no_").removeprefix("disable_")
    if name in known:
        return known[name]
    return known[bare] if bare in known and known[bare].kind is bool else None


def test_each_upstream_flag_is_taken_or_refused_with_a_reason(
    upstream_flags: dict[str, argparse.Action],
) -> None:
    assert len(upstream_flags) > 700  # the oracle is there
    neither = [
        flag
        for flag in upstream_flags
        if taken(flag) is None and megatron_flags.refusal(flag[2:].replace("-", "_")) is None
    ]
    assert neither == []


def test_each_refused_flag_says_why_on_the_command_line(
    upstream_flags: dict[str, argparse.Action],
) -> None:
    for flag in upstream_flags:
        if taken(flag) is None:
            with pytest.raises(ConfigError, match=f"command line: {flag} is refused: .{{10,}}"):
                arguments.parse([flag])


def test_no_row_of_the_table_is_dead(upstream_flags: dict[str, argparse.Action]) -> None:
    names = {flag[2:].replace("-", "_") for flag in upstream_flags} | set(megatron_fields())
    names |= {name.removeprefix("no_").removeprefix("disable_") for name in names}
    dead = [
        row
        for row in megatron_flags.REFUSED
        if not any(fnmatch.fnmatchcase(name, row) for name in names)
    ]
    assert dead == []


def test_each_field_of_megatron_is_passed_on_refused_or_our_own() -> None:
    passed = {
        target[1] for option in megatron_flags.passed_on().values() for target in option.targets
    }
    own = {target[1] for option in arguments.own_options().values() for target in option.targets}
    left = [
        name
        for name in megatron_fields()
        if name not in passed | own and megatron_flags.refusal(name) is None
    ]
    assert left == []


def test_renamed_options_are_named_as_upstream_names_them(
    upstream_flags: dict[str, argparse.Action],
) -> None:
    for name in megatron_flags.RENAMED:
        flag = name.replace("_", "-")
        assert f"--{flag}" in upstream_flags or f"--no-{flag}" in upstream_flags, name


def test_passed_on_flags_set_the_field_that_upstream_sets(
    upstream: argparse.ArgumentParser, upstream_flags: dict[str, argparse.Action]
) -> None:
    own, compared = arguments.own_options(), 0
    for flag, action in upstream_flags.items():
        option = taken(flag)
        if option is None or option.name in own or option.name in SAME_FIELD_OTHER_FORM:
            continue
        words = [flag, *example_words(action)]
        theirs = vars(upstream.parse_args(words))
        config = arguments.parse(words)
        for section, field in option.targets:
            if field in theirs:
                ours = getattr(config, section)[field]
                assert plain(ours) == plain(theirs[field]), words
                compared += 1
    assert compared > 50


def test_words_of_our_own_megatron_flags_are_read_as_upstream_reads_them(
    upstream: argparse.ArgumentParser, upstream_flags: dict[str, argparse.Action]
) -> None:
    compared = 0
    for name, option in arguments.own_options().items():
        action = upstream_flags.get(option.flag)
        if action is None or name in (
            "data_path",
            "lr_decay_style",
            "fp8_recipe",
            "moe_token_dispatcher_type",
            "moe_aux_loss_coeff",
        ):
            continue  # ours take fewer words
        words = [option.flag, *example_words(action)]
        ((section, field),) = option.targets
        ours = getattr(getattr(arguments.parse(words), section), field)
        assert plain(ours) == plain(getattr(upstream.parse_args(words), action.dest)), words
        compared += 1
    assert compared > 35


def example_words(action: argparse.Action) -> list[str]:
    if action.nargs == 0:
        return []
    if action.choices:
        first = next(iter(action.choices))
        return [getattr(first, "name", None) or str(first)]
    return {int: ["7"], float: ["0.5"]}.get(action.type, ["word"])  # type: ignore[call-overload]


def plain(value: Any) -> Any:
    value = getattr(value, "name", value)
    return list(value) if isinstance(value, tuple | list) else value


def megatron_fields() -> list[str]:
    from megatron.core.distributed import DistributedDataParallelConfig
    from megatron.core.optimizer import OptimizerConfig
    from megatron.core.transformer import TransformerConfig

    classes = (TransformerConfig, OptimizerConfig, DistributedDataParallelConfig)
    return [field.name for config_class in classes for field in dataclasses.fields(config_class)]
