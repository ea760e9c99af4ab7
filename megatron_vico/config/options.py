"""One option: its name, type and help, read from a field of a dataclass; from the command line and
from a recipe.

Megatron's own generator (megatron.training.argument_utils.ArgumentGroupFactory) is not used: it has
no tuples, gives a boolean only one of --flag and --no-flag, cannot tell a default from a value that
the user set, and importing it costs four seconds, which `--help` and `--print-config` of a recipe
need not pay.
"""

import argparse
import ast
import dataclasses
import enum
import functools
import inspect
import itertools
import textwrap
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from megatron_vico.config.schema import OptionValue
from megatron_vico.errors import ConfigError

UNSET = "none"
"""On the command line: take back a recipe's value of an option that may be unset."""


@dataclass(frozen=True, kw_only=True)
class Option:
    """One flag of the command line and one key of a recipe."""

    name: str
    """The key in a recipe; the flag is the same with dashes."""

    targets: tuple[tuple[str, str], ...]
    """(section, field) of each place that the value goes to."""

    kind: type
    """bool, int, float or str."""

    many: bool = False
    optional: bool = False
    choices: tuple[str | int, ...] = ()
    help: str = ""

    @property
    def flag(self) -> str:
        """As written on the command line."""
        return "--" + self.name.replace("_", "-")

    def add_to(self, group: argparse._ActionsContainer) -> None:
        """Adds the flag; what the user does not set does not appear among the parsed values."""
        text = self.help.replace("%", "%%")
        if self.kind is bool:
            aliases = ["--disable-" + self.name.replace("_", "-")]
            group.add_argument(
                self.flag,
                dest=self.name,
                action=argparse.BooleanOptionalAction,
                default=argparse.SUPPRESS,
                help=text,
            )
            group.add_argument(
                *aliases,
                dest=self.name,
                action="store_false",
                default=argparse.SUPPRESS,
                help=argparse.SUPPRESS,
            )
            return
        group.add_argument(
            self.flag,
            dest=self.name,
            nargs="*" if self.many else None,
            default=argparse.SUPPRESS,
            metavar="{" + ",".join(map(str, self.choices)) + "}"
            if self.choices
            else self.kind.__name__.upper(),
            help=text,
        )

    def value(self, given: Any, *, origin: str) -> OptionValue:
        """The typed value of what a user wrote.

        Args:
            given: a word or words of the command line, or a value of a recipe.
            origin: where it was written, for the error message.

        Returns:
            A value of this option's type.

        Raises:
            ConfigError: if it is not one.
        """
        if (
            self.optional
            and (given is None or given == UNSET or given == [UNSET])
            and UNSET not in self.choices
        ):
            return None
        if self.many:
            items = given if isinstance(given, list | tuple) else [given]
            return tuple(self._single(item, origin=origin) for item in items)
        return self._single(given, origin=origin)

    def _single(self, given: Any, *, origin: str) -> Any:
        value = _converted(given, self.kind)
        if value is None:
            raise ConfigError(
                f"{origin}: {self.flag} is {given!r}, expected {_KIND_NAMES[self.kind]}"
            )
        if self.choices and value not in self.choices:
            known = ", ".join(map(str, self.choices))
            raise ConfigError(f"{origin}: {self.flag} is {value!r}, expected one of {known}")
        return value


_KIND_NAMES = {bool: "true or false", int: "a whole number", float: "a number", str: "text"}


def _converted(given: Any, kind: type) -> Any:
    """`given` as `kind`, or None; text may hold a number, since YAML reads 4e-6 as text (it wants
    4.0e-6)."""
    if isinstance(given, bool) or kind is bool:
        return given if isinstance(given, bool) and kind is bool else None
    if kind is str:
        return str(given) if isinstance(given, str | int | float) else None
    if not isinstance(given, str | int | float) or (kind is int and isinstance(given, float)):
        return None
    try:
        return kind(given)
    except ValueError:
        return None


@functools.cache
def section_options(section: str, config_class: type) -> dict[str, Option]:
    """The options of one of the project's own sections, by name.

    Args:
        section: field of RunConfig that holds it.
        config_class: its dataclass; every field must be of a type that a flag can have.

    Returns:
        One option a field.
    """
    found = field_options(section, config_class)
    assert len(found) == len(dataclasses.fields(config_class)), (
        f"{config_class.__name__}: a field no flag can set"
    )
    return found


def field_options(
    section: str, config_class: type, kinds: Mapping[str, Any] | None = None
) -> dict[str, Option]:
    """The options of a dataclass, by field name; fields of a type that no flag can have are left
    out.

    Args:
        section: field of RunConfig that holds the values.
        config_class: the dataclass.
        kinds: annotations that replace a field's own.

    Returns:
        Field name -> option.
    """
    docs = field_docstrings(config_class)
    options = {}
    for item in dataclasses.fields(config_class):
        described = _described((kinds or {}).get(item.name, item.type))
        if described is not None and item.init:
            text = docs.get(item.name, "")
            if item.default not in (None, (), dataclasses.MISSING):
                text = f"{text} (default: {item.default})".strip()
            options[item.name] = Option(
                name=item.name, targets=((section, item.name),), help=text, **described
            )
    return options


def _described(kind: Any) -> dict[str, Any] | None:
    """An annotation as the type fields of Option, or None where no flag can have that type."""
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if origin in (types.UnionType, typing.Union):
        inner = [arg for arg in args if arg is not type(None)]
        described = _described(inner[0]) if len(inner) == 1 and len(args) == 2 else None
        return described and {**described, "optional": True}
    if origin is typing.Literal:
        return {"kind": type(args[0]), "choices": args}
    if origin is list or (origin is tuple and args[-1:] == (Ellipsis,)):
        described = _described(args[0])
        return described and {**described, "many": True}
    if isinstance(kind, enum.EnumMeta):
        return {"kind": str, "choices": tuple(kind.__members__)}
    return {"kind": kind} if kind in (bool, int, float, str) else None


def field_docstrings(config_class: type) -> dict[str, str]:
    """The string under each field of a dataclass and of its parents, on one line."""
    docs: dict[str, str] = {}
    for parent in reversed(config_class.__mro__[:-1]):
        body = ast.parse(textwrap.dedent(inspect.getsource(parent))).body[0]
        assert isinstance(body, ast.ClassDef)
        for above, below in itertools.pairwise(body.body):
            if (
                isinstance(above, ast.AnnAssign)
                and isinstance(above.target, ast.Name)
                and isinstance(below, ast.Expr)
                and isinstance(below.value, ast.Constant)
            ):
                docs[above.target.id] = " ".join(str(below.value.value).split())
    return docs
