"""`vico checkpoint inspect`: what a checkpoint folder holds, or how it differs from another.

`vico checkpoint verify` is in checkpoint_verify.py.
"""

import dataclasses
import json
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from tyro.conf import Positional, arg

from megatron_vico.cli import checkpoint_verify
from megatron_vico.cli.command_line import read
from megatron_vico.errors import CheckpointError, ConfigError
from megatron_vico.files import refuse_incomplete

if TYPE_CHECKING:
    from megatron_vico.convert.compare import Comparison, Difference
    from megatron_vico.convert.describe import StoredWeight
    from megatron_vico.convert.source import Contents, Source

DIFFERENT = 1
"""Exit status of --diff where the two are not equal, as of diff itself."""

_MAX_LISTED = 20
"""Differences of a kind that are printed unless --tensors asks for all."""


@dataclass(frozen=True, kw_only=True)
class Flags:
    """What a checkpoint folder holds; nothing but headers is read, unless --diff compares weights.

    `vico checkpoint verify FOLDER` reads all of it, and compares it with its checksums.

    Exit status of --diff: 0 if all weights are equal bit for bit, 1 if not, 2 after an error.
    """

    folder: Positional[Path]
    """A run's --save folder, one of its iter_ folders, or a Hugging Face one."""

    ckpt_step: int | None = None
    """Which step of a run; unset, the latest."""

    model_size: str | None = None
    """Refuse any other than this preset or config.json; unset, what the folder says it is."""

    tensors: bool = False
    """List every tensor; with --diff, every difference."""

    match: Annotated[str | None, arg(metavar="PATTERN")] = None
    """Only tensors in whose name this glob is found somewhere."""

    json: bool = False
    """Print JSON, with bytes and counts as plain numbers."""

    diff: Annotated[Path | None, arg(metavar="OTHER")] = None
    """Compare the weights, tensor by tensor, with those of a folder of any form; optimizers are
    left out."""

    diff_ckpt_step: Annotated[int | None, arg(metavar="STEP")] = None
    """Which step of OTHER; unset, the latest."""

    def __post_init__(self) -> None:
        """Raises: ConfigError: if a flag has no effect without another."""
        if self.match is not None and not (self.tensors or self.diff):
            raise ConfigError("--match chooses among tensors: give --tensors or --diff with it.")
        if self.diff_ckpt_step is not None and self.diff is None:
            raise ConfigError("--diff-ckpt-step is of the folder of --diff: give that with it.")


def main(arguments: Sequence[str]) -> int:
    """Print what a checkpoint is, or how two differ.

    Args:
        arguments: the words after `checkpoint`; the word `inspect` may be left out, `verify` goes
            to its own file.

    Returns:
        0; with --diff, 1 where the two differ.

    Raises:
        ConfigError: if a flag has no effect without another.
        CheckpointError: if a folder holds no finished checkpoint, or cannot be read.
    """
    if arguments[:1] == ["verify"]:
        return checkpoint_verify.main(arguments[1:])
    words = arguments[1:] if arguments[:1] == ["inspect"] else arguments
    options = read(Flags, words, prog="vico checkpoint inspect")
    for folder in filter(None, (options.folder, options.diff)):
        refuse_incomplete(folder)
    from megatron_vico import cpu_stand_in

    cpu_stand_in.install()
    from megatron_vico.convert.open import open_checkpoint

    first = open_checkpoint(
        options.folder, iteration=options.ckpt_step, model_size=options.model_size
    )
    if options.diff is None:
        shown = _description(first, with_tensors=options.tensors, match=options.match)
        print(json.dumps(shown, indent=2) if options.json else _as_text(shown))
        return 0
    second = open_checkpoint(
        options.diff, iteration=options.diff_ckpt_step, model_size=options.model_size
    )
    found = _compared(first, second, match=options.match)
    paths = [str(_contents(each).path) for each in (first, second)]
    if options.json:
        print(json.dumps(_comparison_json(paths, found), indent=2))
    else:
        print(_comparison_text(paths, found, everything=options.tensors))
    return DIFFERENT if found.differences else 0


def _contents(source: "Source") -> "Contents":
    assert source.contents is not None, "it was opened from a folder"
    return source.contents


def _description(source: "Source", *, with_tensors: bool, match: str | None) -> dict[str, Any]:
    """What --json prints, and the text is made of."""
    from megatron_vico.convert.describe import matching, stored_weights
    from megatron_vico.convert.source import dtype_name

    contents = _contents(source)
    weights = stored_weights(contents)
    shown: dict[str, Any] = {
        "path": str(contents.path),
        "form": "megatron" if source.layout is None else "hf",
        **contents.facts,
        "problems": list(source.problems),
        "modules": _modules(weights),
    }
    if with_tensors:
        wanted = set(matching((each.name for each in weights), match))
        if not wanted:
            raise CheckpointError(f"no tensor of {contents.path} matches {match!r}.")
        shown["tensors"] = [
            {
                "name": each.name,
                "module": each.module,
                "dtype": dtype_name(each.info.dtype),
                "shape": list(each.info.shape),
                "bytes": each.info.num_bytes,
            }
            for each in weights
            if each.name in wanted
        ]
    return shown


def _modules(weights: Sequence["StoredWeight"]) -> dict[str, dict[str, Any]]:
    """Sums over modules, the language model's parts, and all weights; then the optimizer's."""
    from megatron_vico.convert.describe import OPTIMIZER
    from megatron_vico.convert.source import dtype_name

    groups: dict[str, list[StoredWeight]] = {}
    for each in weights:
        name, _, part = each.module.partition(" ")
        groups.setdefault(name, []).append(each)
        if part:
            groups.setdefault(part, []).append(each)
    optimizer = groups.pop(OPTIMIZER, None)
    groups["weights"] = [each for each in weights if each.module != OPTIMIZER]
    if optimizer is not None:
        groups[OPTIMIZER] = optimizer
    return {
        name: {
            "tensors": len(members),
            "parameters": sum(each.info.num_parameters for each in members),
            "bytes": sum(each.info.num_bytes for each in members),
            "dtypes": sorted({dtype_name(each.info.dtype) for each in members}),
        }
        for name, members in groups.items()
    }


def _as_text(shown: dict[str, Any]) -> str:
    from megatron_vico.convert.describe import PARTS

    rest = dict(shown)
    path, form, problems = rest.pop("path"), rest.pop("form"), rest.pop("problems")
    modules, tensors = rest.pop("modules"), rest.pop("tensors", [])
    facts = {"form": {"megatron": "Megatron", "hf": "Hugging Face"}[form], **rest}
    lines = [path, *(f"  {name}: {value}" for name, value in facts.items())]
    lines += [f"  problem: {problem}" for problem in problems]
    sums = [
        [
            f"  {name}" if name in PARTS else name,
            *(f"{each[count]:,}" for count in ("tensors", "parameters", "bytes")),
            " ".join(each["dtypes"]),
        ]
        for name, each in modules.items()
    ]
    lines += ["", *_table(["module", "tensors", "parameters", "bytes", "dtypes"], sums)]
    if tensors:
        rows = [
            [each["name"], each["dtype"], "x".join(map(str, each["shape"])), f"{each['bytes']:,}"]
            for each in tensors
        ]
        lines += ["", *_table(["tensor", "dtype", "shape", "bytes"], rows)]
    return "\n".join(lines)


def _compared(first: "Source", second: "Source", *, match: str | None) -> "Comparison":
    from tqdm import tqdm

    from megatron_vico.convert.compare import bytes_to_compare, compare

    with tqdm(
        total=bytes_to_compare(first, second, match=match),
        unit="B",
        unit_scale=True,
        desc="comparing",
        disable=None,  # on a terminal only
        delay=1,
        file=sys.stderr,
    ) as bar:
        return compare(first, second, match=match, advance=bar.update)


def _comparison_text(paths: Sequence[str], found: "Comparison", *, everything: bool) -> str:
    lines = [f"first:  {paths[0]}", f"second: {paths[1]}", f"same: {found.num_same} tensors"]
    kinds: dict[str, list[Difference]] = {}
    for each in found.differences:
        kinds.setdefault(each.kind, []).append(each)
    for kind, members in kinds.items():
        limit = len(members) if everything else _MAX_LISTED
        lines += ["", f"{kind}: {len(members)} tensors"]
        lines += [f"  {line}" for line in _difference_table(members[:limit])]
        if len(members) > limit:
            lines.append(f"  and {len(members) - limit} more; --tensors lists all")
    return "\n".join(lines)


def _difference_table(members: Sequence["Difference"]) -> list[str]:
    """Of differences of one kind: the columns that say something about it."""
    columns = {"tensor": [each.name for each in members]}
    if members[0].max_difference is not None:
        columns["max difference"] = [f"{each.max_difference:.3e}" for each in members]
        columns["relative norm"] = [f"{each.relative_norm:.3e}" for each in members]
    if members[0].kind != "values differ":
        columns["first"] = [each.first for each in members]
        columns["second"] = [each.second for each in members]
    columns = {title: cells for title, cells in columns.items() if any(cells)}
    return _table(list(columns), list(zip(*columns.values(), strict=True)))


def _comparison_json(paths: Sequence[str], found: "Comparison") -> dict[str, Any]:
    return {
        "first": paths[0],
        "second": paths[1],
        "equal": not found.differences,
        "num_same": found.num_same,
        "differences": [
            {name: _plain(value) for name, value in dataclasses.asdict(each).items()}
            for each in found.differences
        ],
    }


def _plain(value: Any) -> Any:
    """JSON has no infinity and no NaN."""
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def _table(titles: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines of columns: names to the left, numbers to the right, words at the end as they are."""
    table = [titles, *rows]
    widths = [max(len(row[column]) for row in table) for column in range(len(titles))]
    lines = []
    for row in table:
        cells = [cell.rjust(width) for cell, width in zip(row, widths, strict=True)]
        cells[0] = row[0].ljust(widths[0])
        if titles[-1] in ("dtypes", "second"):
            cells[-1] = row[-1]
        lines.append("  ".join(cells).rstrip())
    return lines
