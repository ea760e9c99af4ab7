"""From flags and recipes to a RunConfig and back: default < recipe < command line.

A flag is a field of one of RunConfig's dataclasses, and so is a key of a recipe: tyro reads the
words of both. Nothing here imports torch or megatron.
"""

import contextlib
import dataclasses
import functools
import importlib.util
import io
import re
import shutil
import textwrap
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro
import yaml

from megatron_vico.config.schema import RunConfig, flag_of
from megatron_vico.errors import ConfigError, nearest
from megatron_vico.files import read_plain

READING = (tyro.conf.OmitArgPrefixes, tyro.conf.DisallowNone)
"""How tyro makes flags of dataclasses: one of a nested class has no prefix; `None` is no value."""

INCLUDE = "include"
"""Key of a recipe that names another one, relative to itself, whose values this one adds to."""

UNSET = "none"
"""Takes back a recipe's value of an option that may be unset."""

COMMAND_LINE = "command line"
PASSED_ON = ("transformer", "optimizer_state", "ddp")
"""Sections of which only what is set is printed; the rest is megatron-core's."""

ADVICE: Mapping[str, str] = {
    # Flags that users of Megatron look for first, and what to use here.
    "batch_size": "use --global-batch-size",
    "eval_interval_samples": "use --eval-interval",
    "finetune": "use --pretrained-checkpoint, which loads weights only",
    "fp16": "loss scaling is not part of the loop; use --bf16",
    "fp8": "use --fp8-format",
    "hidden_size": "fixed by --model-size",
    "micro_batch_size": "a microbatch is one pack; its size is --seq-length",
    "num_experts": "fixed by --model-size",
    "num_layers": "fixed by --model-size",
    "num_virtual_stages_per_pipeline_rank": "use --num-layers-per-virtual-pipeline-stage",
    "optimizer": "the optimizer is AdamW, as in the paper (section 4.1)",
    "recompute_activations": "use --recompute-granularity selective",
    "split": "validation is --valid-data-path with --eval-interval and --eval-iters",
    "tokenizer_type": "use --tokenizer-model",
    "train_samples": "runs are counted in optimizer steps; use --train-iters",
    "trace_step": "for step N use --profile --profile-step-start N-1 --profile-step-end N",
}


@dataclass(frozen=True, kw_only=True)
class Option:
    """One flag and one key of a recipe."""

    name: str
    """The key; the flag is the same with dashes."""

    section: str
    """Field of RunConfig whose dataclass has it."""

    type: Any
    """Of one of its values: bool, int, float, str or a Literal."""

    many: bool
    optional: bool

    @property
    def flag(self) -> str:
        """As written on the command line."""
        return flag_of(self.name)

    @property
    def choices(self) -> tuple[Any, ...]:
        """The values it may have, where they are listed."""
        return typing.get_args(self.type)

    def wrong(self, value: object, origin: str) -> ConfigError:
        """The error for a value that is not of its type."""
        names = {bool: "true or false", int: "a whole number", float: "a number", str: "text"}
        if self.choices:
            expected = f"one of {', '.join(map(str, self.choices))}"
        else:
            expected = names[self.type]
        return ConfigError(f"{origin}: {self.flag} is {value!r}, expected {expected}")


@dataclass(frozen=True, kw_only=True)
class _Given:
    """What a user wrote for an option."""

    option: Option
    values: tuple[Any, ...]
    """Words of the command line, values of a recipe; of a switch True or False."""

    origin: str

    @property
    def is_unset(self) -> bool:
        names_unset = self.values == (UNSET,) and UNSET not in self.option.choices
        return self.option.optional and (names_unset or self.values == (None,))

    @property
    def words(self) -> list[str]:
        """As tyro reads them."""
        name = self.option.name.replace("_", "-")
        if self.option.type is bool:
            return [f"--{name}" if self.values == (True,) else f"--no-{name}"]
        if self.option.many:
            return [f"--{name}", *map(str, self.values)]
        return [f"--{name}={self.values[0]}"]


def parse(argv: Sequence[str]) -> RunConfig:
    """The run that a command line asks for.

    Args:
        argv: `--recipe R.yaml` and flags, in any order; the command line wins. Where the recipe has
            one folder for save and load, a --save without --load is both.

    Raises:
        ConfigError: for an unknown flag or recipe key, naming the nearest known one, and for a
            value of the wrong type.
    """
    recipe, given = _command_line(argv)
    if recipe is not None:
        of_recipe = _recipe(Path(recipe))
        folders = [of_recipe[name].values for name in ("save", "load") if name in of_recipe]
        if "save" in given and len(folders) == 2 and folders[0] == folders[1]:
            # Else the run would not resume itself, but what is in the recipe's folder.
            given.setdefault("load", dataclasses.replace(given["save"], option=options()["load"]))
        given = of_recipe | given
    return _read([each for each in given.values() if not each.is_unset])


def to_yaml(config: RunConfig) -> str:
    """The complete run as a recipe that gives the same run again, one section after another."""
    blocks: list[str] = []
    passed: dict[str, Any] = {}
    for section, config_class in sections().items():
        values = {
            name: list(value) if isinstance(value, tuple) else value
            for name, value in vars(getattr(config, section)).items()
        }
        if section in PASSED_ON:
            passed |= {name: value for name, value in values.items() if value is not None}
        else:
            text = yaml.safe_dump(values, sort_keys=False, allow_unicode=True)
            blocks.append(f"# {(config_class.__doc__ or '').splitlines()[0]}\n{text}")
    if passed:
        blocks.append(
            f"# Passed on to megatron-core.\n{yaml.safe_dump(passed, allow_unicode=True)}"
        )
    return "\n".join(blocks)


def help_text() -> str:
    """The help of every flag that `parse` takes."""
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        _cli(["--help"])
    text = printed.getvalue()
    return filled(text[text.index(" model options") :])  # tyro's own usage and --help come before


def filled(text: str) -> str:
    """tyro's help without the line breaks of the docstrings, which it keeps."""

    def fill(found: re.Match[str]) -> str:
        indent, width = found[1], shutil.get_terminal_size().columns
        words = " ".join(found[0].split())
        return textwrap.fill(words, width, initial_indent=indent, subsequent_indent=indent) + "\n"

    return re.sub(r"(?m)^( {8,})\S.*\n(?:\1\S.*\n)*", fill, text)


@functools.cache
def options() -> dict[str, Option]:
    """Every option, by name."""
    found: dict[str, Option] = {}
    for section, config_class in sections().items():
        for field in dataclasses.fields(config_class):
            assert field.name not in found, f"two sections have {field.name}"
            found[field.name] = _option(field, section)
    return found


def sections() -> dict[str, Any]:
    """The dataclass of each field of RunConfig."""
    return {field.name: field.type for field in dataclasses.fields(RunConfig)}


def _option(field: dataclasses.Field[Any], section: str) -> Option:
    kind, args = field.type, typing.get_args(field.type)
    optional = typing.get_origin(kind) is types.UnionType or type(None) in args
    if optional:
        (kind,) = (arg for arg in args if arg is not type(None))
    many = typing.get_origin(kind) is tuple
    if many:
        kind = typing.get_args(kind)[0]
    return Option(name=field.name, section=section, type=kind, many=many, optional=optional)


def _read(given: Sequence[_Given]) -> RunConfig:
    """The run with what was given of it."""
    for each in given:
        for value in each.values if each.option.many and each.option.type is str else ():
            if str(value).startswith("-"):
                raise ConfigError(
                    f"{each.origin}: {each.option.flag} holds {value!r}, expected no dash at its"
                    f" start; for a path write ./{value}"
                )
    config = _cli([word for each in given for word in each.words])
    if config is not None:
        return config
    for each in given:  # tyro says which one it cannot read to the terminal only
        for value in each.values:
            if _cli([f"{each.option.flag}={value}"]) is None:
                raise each.option.wrong(value, each.origin)
    raise AssertionError(f"tyro reads {given} one by one, but not together")


def _cli(words: list[str]) -> RunConfig | None:
    """The run that tyro reads, or None."""
    with contextlib.redirect_stderr(io.StringIO()), contextlib.suppress(SystemExit):
        return tyro.cli(RunConfig, args=words, config=READING)
    return None


def _command_line(argv: Sequence[str]) -> tuple[str | None, dict[str, _Given]]:
    """The recipe of a command line, and its options by name; of one given twice the last counts."""
    written: list[tuple[str, list[str]]] = []
    for word in argv:
        flag, equals, value = word.partition("=")
        if word.startswith("--"):
            written.append((flag, [value] if equals else []))
        elif not written:
            raise ConfigError(f"{COMMAND_LINE}: {word!r} belongs to no flag")
        else:
            written[-1][1].append(word)
    recipe, given = None, {}
    for flag, words in written:
        if flag == "--recipe":
            recipe = _one(flag, words)
            continue
        option, is_on = _known(flag)
        if option.type is bool:
            if words:
                raise ConfigError(f"{COMMAND_LINE}: {' '.join(words)!r} belongs to no flag")
            values: tuple[Any, ...] = (is_on,)
        else:
            values = tuple(words) if option.many else (_one(flag, words),)
        given[option.name] = _Given(option=option, values=values, origin=COMMAND_LINE)
    return recipe, given


def _one(flag: str, words: list[str]) -> str:
    if len(words) != 1:
        found = f"the {len(words)} values {' '.join(words)!r}" if words else "no value"
        raise ConfigError(f"{COMMAND_LINE}: {flag} is given {found}, expected one")
    return words[0]


def _known(flag: str) -> tuple[Option, bool]:
    """The option of a flag, and False where it is the --no- or --disable- form of a switch."""
    name = flag.removeprefix("--").replace("-", "_")
    if name in options():
        return options()[name], True
    for prefix in ("no_", "disable_"):
        option = options().get(name.removeprefix(prefix))
        if name.startswith(prefix) and option is not None and option.type is bool:
            return option, False
    raise _unknown(flag, COMMAND_LINE)


def _unknown(flag: str, origin: str) -> ConfigError:
    name = flag.removeprefix("--").replace("-", "_")
    if name in ADVICE:
        return ConfigError(f"{origin}: {flag} is not an option here: {ADVICE[name]}")
    if _is_megatrons(name):
        return ConfigError(
            f"{origin}: {flag} is an option of Megatron that this trainer does not pass through;"
            " `vico train --help` lists those that it does"
        )
    known = [option.flag for option in options().values()]
    return ConfigError(f"{origin}: unknown option {flag}{nearest(flag, known)}")


def _is_megatrons(name: str) -> bool:
    """Whether Megatron's parser has this flag; read off its text, importing it takes seconds."""
    found = importlib.util.find_spec("megatron")
    assert found is not None
    root = Path(next(iter(found.submodule_search_locations or ())))
    files = [*root.glob("training/**/*.py"), *root.glob("core/**/*config*.py")]
    text = "\n".join(file.read_text(encoding="utf-8") for file in files)
    names = {name, name.removeprefix("no_").removeprefix("disable_")} - options().keys()
    forms = [form for each in names for form in (f"'{flag_of(each)}'", f'"{flag_of(each)}"')]
    return any(form in text for form in [*forms, *(f"\n    {each}: " for each in names)])


def _recipe(path: Path) -> dict[str, _Given]:
    """The options that a recipe and those it includes set, by name."""
    given: dict[str, _Given] = {}
    for file, content in reversed(_chain(path, ())):
        for key, value in content.items():
            if key not in options():
                raise _unknown(flag_of(key), str(file))
            given[key] = _of_recipe(options()[key], value, str(file))
    return given


def _of_recipe(option: Option, value: Any, origin: str) -> _Given:
    """A recipe's value; YAML has types of its own, of which numbers may come as text (4e-6)."""
    values = tuple(value) if option.many and isinstance(value, list) else (value,)
    given = _Given(option=option, values=values, origin=origin)
    for item in () if given.is_unset else values:
        scalar = bool if option.type is bool else str | int | float
        if not isinstance(item, scalar) or isinstance(item, bool) != (option.type is bool):
            raise option.wrong(item, origin)
    return given


def _chain(path: Path, seen: tuple[Path, ...]) -> list[tuple[Path, dict[str, Any]]]:
    """A recipe and those it includes, the innermost last."""
    if path.resolve() in seen:
        raise ConfigError(f"{path}: recipe includes itself")
    try:
        content = yaml.safe_load(read_plain(path).decode())
    except OSError as error:
        raise ConfigError(f"{path}: cannot read the recipe ({error.strerror})") from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:
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
