#!/usr/bin/env python3
"""Writes docs/options.md: every option of `vico train`, as config/schema.py declares it.

Run: python tools/options_page.py > docs/options.md
"""

import dataclasses
import re
import textwrap
from typing import Any

from tyro._docstrings import get_field_docstring

from megatron_vico.config.flags import Option, options, sections
from megatron_vico.config.schema import flag_of

START = """\
# Options of vico train

Written by `python tools/options_page.py > docs/options.md` from the dataclasses of
`config/schema.py` and `config/megatron_options.py`; a test compares. Each is a flag
(`--seq-length 4096`) and a key of a recipe (`seq_length: 4096`). In brackets stand its values and,
last, its default. What counts is default < recipe < command line. A switch is taken back with
`--no-...`, an option that may be unset with the value `none`. `vico train --help` prints the same.
"""


def page() -> str:
    """The page as Markdown."""
    return "\n".join([START, *(_section(name, kind) for name, kind in sections().items())])


def _section(name: str, config_class: type[Any]) -> str:
    lines = [f"## {name.replace('_', ' ').capitalize()}", "", *_wrapped(config_class.__doc__), ""]
    for field in dataclasses.fields(config_class):
        found = get_field_docstring(config_class, field.name, ())
        assert found, f"{field.name} has no help text"
        what = _values(options()[field.name], field.default)
        lines += _wrapped(f"- **`{flag_of(field.name)}`** {what} {found}", indent="  ")
    return "\n".join([*lines, ""])


def _values(option: Option, default: Any) -> str:
    names = {bool: "", int: "INT", float: "FLOAT", str: "TEXT"}
    kind = " or ".join(map(str, option.choices)) or names[option.type]
    shown = " ".join(map(str, default)) if isinstance(default, tuple) else default
    if option.type is bool and default is not None:
        shown = "on" if default else "off"
    value = "unset" if shown in (None, "") else f"{shown}"
    kind += ", any number;" if option.many else ";" if kind else ""
    return f"({f'{kind} {value}'.strip()}):"


def _wrapped(text: str | None, *, indent: str = "") -> list[str]:
    """Lines of 100 columns that show <, > and * as they are written."""
    plain = " ".join((text or "").split()).replace("<", "&lt;").replace(">", "&gt;")
    shown = re.sub(r"(?<=\w)\*(?=\w)", r"\\*", plain)
    return textwrap.wrap(shown, 100, subsequent_indent=indent, break_on_hyphens=False)


if __name__ == "__main__":
    print(page(), end="")
