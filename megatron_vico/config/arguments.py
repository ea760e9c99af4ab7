"""From flags and recipes to a RunConfig and back: default < recipe < command line."""

import argparse
import dataclasses
import enum
import functools
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import yaml

from megatron_vico.config import megatron_flags
from megatron_vico.config.options import Option, section_options
from megatron_vico.config.schema import OptionValue, Overrides, RunConfig
from megatron_vico.errors import ConfigError, nearest

INCLUDE = "include"
"""Key of a recipe that names another one, relative to itself, whose values this one adds to."""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ConfigError(message)


def parse(argv: Sequence[str]) -> RunConfig:
    """The run that a command line asks for.

    megatron is imported (seconds) only if an option is used that no section of ours has.

    Args:
        argv: `--recipe R.yaml` and any of Megatron's and ViCO's flags, in any order; the command
            line wins.

    Returns:
        The resolved run.

    Raises:
        ConfigError: for an unknown or refused flag or recipe key, naming the nearest known one or
            the reason, and for a value of the wrong type.
    """
    given, rest = _recipe_parser().parse_known_args(argv)
    values = load_recipe(given.recipe) if given.recipe is not None else {}
    own, rest = _own_parser().parse_known_args(rest)
    flags = vars(own)
    if rest:
        _check_names(
            [word.split("=", 1)[0] for word in rest if word.startswith("--")], origin="command line"
        )
        passed, rest = _passed_on_parser().parse_known_args(rest)
        flags |= vars(passed)
    if rest:
        raise ConfigError(f"command line: {' '.join(rest)!r} belongs to no flag")
    options = own_options() if flags.keys() <= own_options().keys() else all_options()
    values |= {
        name: options[name].value(value, origin="command line") for name, value in flags.items()
    }
    return _run_config(values)


def load_recipe(path: str | Path) -> dict[str, OptionValue]:
    """The values of a recipe and of those it includes.

    Args:
        path: YAML file, a flat mapping of option names with underscores; `include` names another,
            relative to itself.

    Returns:
        Option name -> typed value, only of what the files set.

    Raises:
        ConfigError: if the file is missing or not a mapping, or a key or value is wrong.
    """
    values: dict[str, OptionValue] = {}
    for file, content in reversed(_chain(Path(path), ())):
        _check_names([f"--{key.replace('_', '-')}" for key in content], origin=str(file))
        options = own_options() if content.keys() <= own_options().keys() else all_options()
        values |= {
            key: options[key].value(value, origin=str(file)) for key, value in content.items()
        }
    return values


def to_yaml(config: RunConfig) -> str:
    """The complete run as a recipe that gives the same run again.

    Args:
        config: a resolved run.

    Returns:
        YAML, one section after another, with what goes to megatron-core unread at the end.
    """
    blocks = []
    for section, config_class in _sections().items():
        lines = yaml.safe_dump(
            _plain(dataclasses.asdict(getattr(config, section))),
            sort_keys=False,
            allow_unicode=True,
        )
        blocks.append(f"# {(config_class.__doc__ or '').splitlines()[0]}\n{lines}")
    passed = {
        megatron_flags.option_of(section, field): value
        for section in (megatron_flags.TRANSFORMER, megatron_flags.OPTIMIZER, megatron_flags.DDP)
        for field, value in getattr(config, section).items()
    }
    if passed:
        blocks.append(
            f"# Passed on to megatron-core.\n{yaml.safe_dump(_plain(passed), allow_unicode=True)}"
        )
    return "\n".join(blocks)


def config_kwargs(overrides: Overrides, config_class: type) -> dict[str, Any]:
    """What a run passes on to one of megatron-core's config classes, in that class's own types.

    Args:
        overrides: `transformer_overrides`, `optimizer_overrides` or `ddp_overrides` of a RunConfig.
        config_class: TransformerConfig, OptimizerConfig or DistributedDataParallelConfig.

    Returns:
        Keyword arguments: words become torch dtypes and members of enums, tuples become lists.
    """
    kinds = {field.name: field.type for field in dataclasses.fields(config_class)}
    return {name: _megatron_value(value, kinds[name], name) for name, value in overrides.items()}


def help_text() -> str:
    """The help of every flag that `parse` takes; imports megatron.

    Returns:
        Text for the terminal.
    """
    parser = argparse.ArgumentParser(prog="", usage=argparse.SUPPRESS, add_help=False)
    group = parser.add_argument_group("recipe")
    group.add_argument(
        "--recipe", help="YAML file of options, with underscores; may `include` another"
    )
    for section, config_class in _sections().items():
        group = parser.add_argument_group(
            f"{section} options", (config_class.__doc__ or "").splitlines()[0]
        )
        for option in section_options(section, config_class).values():
            option.add_to(group)
    group = parser.add_argument_group(
        "Megatron's options", "Passed on to megatron-core's config classes."
    )
    for option in _passed_on().values():
        option.add_to(group)
    return parser.format_help()


@functools.cache
def own_options() -> dict[str, Option]:
    """The options of our own sections, by name."""
    found: dict[str, Option] = {}
    for section, config_class in _sections().items():
        options = section_options(section, config_class)
        assert not found.keys() & options.keys(), "two sections share an option"
        found |= options
    return found


def all_options() -> dict[str, Option]:
    """Every option, by name; imports megatron."""
    return own_options() | _passed_on()


def _passed_on() -> dict[str, Option]:
    return {
        name: option
        for name, option in megatron_flags.passed_on().items()
        if name not in own_options()
    }


def _sections() -> dict[str, type]:
    factories: dict[str, Any] = {
        field.name: field.default_factory for field in dataclasses.fields(RunConfig)
    }
    return {name: factory for name, factory in factories.items() if isinstance(factory, type)}


def _recipe_parser() -> argparse.ArgumentParser:
    parser = _Parser(add_help=False, allow_abbrev=False)
    parser.add_argument("--recipe")
    return parser


@functools.cache
def _own_parser() -> argparse.ArgumentParser:
    return _parser_of(own_options().values())


@functools.cache
def _passed_on_parser() -> argparse.ArgumentParser:
    return _parser_of(_passed_on().values())


def _parser_of(options: Iterable[Option]) -> argparse.ArgumentParser:
    parser = _Parser(add_help=False, allow_abbrev=False)
    for option in options:
        option.add_to(parser)
    return parser


def _check_names(flags: Iterable[str], *, origin: str) -> None:
    """Raises for the first flag that is refused or unknown."""
    for flag in flags:
        name = flag.removeprefix("--").replace("-", "_")
        if _takes(own_options(), name) or _takes(all_options(), name):
            continue
        reason = megatron_flags.refusal(name)
        if reason is not None:
            raise ConfigError(f"{origin}: {flag} is refused: {reason}")
        if name == "trace_step":
            raise ConfigError(
                f"{origin}: {flag} N is now --profile --profile-step-start N-1 --profile-step-end N"
            )
        close = nearest(flag, [option.flag for option in all_options().values()])
        raise ConfigError(f"{origin}: unknown option {flag}{close}")


def _takes(options: Mapping[str, Option], name: str) -> bool:
    """Whether a flag is one of these options, or the --no- or --disable- form of a boolean one."""
    bare = name.removeprefix("no_").removeprefix("disable_")
    return name in options or (bare in options and options[bare].kind is bool)


def _chain(path: Path, seen: tuple[Path, ...]) -> list[tuple[Path, dict[str, Any]]]:
    """A recipe and those it includes, the innermost last."""
    if path.resolve() in seen:
        raise ConfigError(f"{path}: recipe includes itself")
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{path}: cannot read the recipe ({error.strerror})") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: not YAML: {' '.join(str(error).split())}") from error
    content = {} if content is None else content
    if not isinstance(content, dict) or not all(isinstance(key, str) for key in content):
        raise ConfigError(f"{path}: a recipe is a flat mapping of option names to values")
    base = content.pop(INCLUDE, None)
    chain = [(path, content)]
    if base is None:
        return chain
    if not isinstance(base, str):
        raise ConfigError(f"{path}: {INCLUDE} is {base!r}, expected the path of one recipe")
    return chain + _chain(path.parent / base, (*seen, path.resolve()))


def _run_config(values: Mapping[str, OptionValue]) -> RunConfig:
    options = own_options() if values.keys() <= own_options().keys() else all_options()
    placed: dict[str, dict[str, OptionValue]] = {}
    for name, value in values.items():
        for section, field in options[name].targets:
            placed.setdefault(section, {})[field] = value
    sections = _sections()
    built: dict[str, Any] = {
        section: sections[section](**fields)
        if section in sections
        else Overrides(tuple(sorted(fields.items())))
        for section, fields in placed.items()
    }
    return RunConfig(**built)


def _plain(values: Mapping[str, Any]) -> dict[str, Any]:
    return {
        name: list(value) if isinstance(value, tuple) else value for name, value in values.items()
    }


def _megatron_value(value: OptionValue, kind: Any, name: str) -> Any:
    if isinstance(value, str) and name.endswith("_dtype"):
        import torch

        names = {
            "fp32": torch.float32,
            "bf16": torch.bfloat16,
            "fp16": torch.float16,
            "fp8": torch.uint8,
        }
        return names[value]  # uint8: what megatron-core's optimizer takes for FP8 moments
    if isinstance(value, str) and isinstance(kind, enum.EnumMeta):
        return kind[value]
    return (
        list(value)
        if isinstance(value, tuple) and name != "param_name_patterns_for_fp32_local_accumulation"
        else value
    )
