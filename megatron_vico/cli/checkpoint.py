"""`vico checkpoint inspect`: what a checkpoint folder holds, and with --diff how it differs from
another."""

import argparse
import dataclasses
import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from megatron_vico.convert.compare import Comparison, Difference
    from megatron_vico.convert.describe import Checkpoint, TensorFacts

DIFFERENT = 1
"""Exit status of --diff where the two are not equal, as of diff itself."""

_FORMS = {"megatron": "Megatron", "hf": "Hugging Face"}

_MOST_LISTED = 20
"""Differences of a kind that are printed unless --tensors asks for all."""


def main(arguments: Sequence[str]) -> int:
    """Print what a checkpoint is, or how two differ.

    Args:
        arguments: the words after `checkpoint`; the word `inspect` may be left out.

    Returns:
        0; with --diff, 1 where the two differ.

    Raises:
        CheckpointError: if a folder holds no finished checkpoint, or cannot be read.
    """
    parser = _parser()
    words = list(arguments)
    options = parser.parse_args(words[1:] if words[:1] == ["inspect"] else words)
    if options.match is not None and not (options.tensors or options.diff):
        parser.error("--match chooses among tensors: give --tensors or --diff with it")
    if options.diff_ckpt_step is not None and options.diff is None:
        parser.error("--diff-ckpt-step is of the folder of --diff: give that with it")
    from megatron_vico.convert.describe import open_checkpoint

    first = open_checkpoint(
        options.folder, iteration=options.ckpt_step, model_size=options.model_size
    )
    if options.diff is None:
        shown = _listed(first, options.match) if options.tensors else []
        print(
            json.dumps(_as_json(first, shown), indent=2) if options.json else _as_text(first, shown)
        )
        return 0
    second = open_checkpoint(
        options.diff, iteration=options.diff_ckpt_step, model_size=options.model_size
    )
    found = _compared(first, second, match=options.match)
    if options.json:
        print(json.dumps(_comparison_json(first, second, found), indent=2))
    else:
        print(_comparison_text(first, second, found, everything=options.tensors))
    return DIFFERENT if found.differences else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="vico checkpoint inspect",
        description=(
            "What a checkpoint folder holds; nothing but headers is read, unless --diff compares"
            " the weights."
        ),
        epilog=(
            "Exit status of --diff: 0 if all weights are equal bit for bit, 1 if not, 2 after an"
            " error."
        ),
    )
    parser.add_argument(
        "folder",
        type=Path,
        help="a run's --save folder, one of its iter_ folders, or a Hugging Face one",
    )
    parser.add_argument("--ckpt-step", type=int, help="which step of a run; unset, the latest")
    parser.add_argument(
        "--model-size",
        help="refuse any other than this preset or config.json; unset, what the folder says it is",
    )
    parser.add_argument(
        "--tensors", action="store_true", help="list every tensor; with --diff, every difference"
    )
    parser.add_argument(
        "--match", metavar="PATTERN", help="only tensors in whose name this glob is found somewhere"
    )
    parser.add_argument(
        "--json", action="store_true", help="print JSON, with bytes and counts as plain numbers"
    )
    parser.add_argument(
        "--diff",
        type=Path,
        metavar="OTHER",
        help=(
            "compare the weights, tensor by tensor, with those of a folder of any form; optimizers"
            " are left out"
        ),
    )
    parser.add_argument(
        "--diff-ckpt-step", type=int, metavar="STEP", help="which step of OTHER; unset, the latest"
    )
    return parser


def _listed(checkpoint: "Checkpoint", pattern: str | None) -> list["TensorFacts"]:
    from megatron_vico.convert.describe import matching
    from megatron_vico.errors import CheckpointError

    wanted = set(matching((each.name for each in checkpoint.tensors), pattern))
    if not wanted:
        raise CheckpointError(f"no tensor of {checkpoint.path} matches {pattern!r}.")
    return [each for each in checkpoint.tensors if each.name in wanted]


def _compared(first: "Checkpoint", second: "Checkpoint", *, match: str | None) -> "Comparison":
    from tqdm import tqdm

    from megatron_vico.convert.compare import bytes_to_compare, compare

    total = bytes_to_compare(first, second, match=match)
    # Drawn on a terminal only, and not for what takes less than a second.
    with tqdm(
        total=total,
        unit="B",
        unit_scale=True,
        desc="comparing",
        disable=None,
        delay=1,
        file=sys.stderr,
    ) as bar:
        return compare(first, second, match=match, advance=bar.update)


def _as_text(checkpoint: "Checkpoint", shown: Sequence["TensorFacts"]) -> str:
    lines = [str(checkpoint.path), f"  form: {_FORMS[checkpoint.form]}"]
    lines += [f"  {name}: {value}" for name, value in checkpoint.facts.items()]
    lines += [f"  problem: {problem}" for problem in checkpoint.problems]
    lines += [
        "",
        *_table(["module", "tensors", "parameters", "bytes", "dtypes"], _module_rows(checkpoint)),
    ]
    if shown:
        rows = [
            [each.name, _dtype(each), "x".join(map(str, each.shape)), f"{each.num_bytes:,}"]
            for each in shown
        ]
        lines += ["", *_table(["tensor", "dtype", "shape", "bytes"], rows)]
    return "\n".join(lines)


def _module_rows(checkpoint: "Checkpoint") -> list[list[str]]:
    return [
        [
            name,
            f"{each['tensors']:,}",
            f"{each['parameters']:,}",
            f"{each['bytes']:,}",
            " ".join(each["dtypes"]),
        ]
        for name, each in _modules(checkpoint).items()
    ]


def _modules(checkpoint: "Checkpoint") -> dict[str, dict[str, Any]]:
    """Sums over modules, over the language model's parts, and over all weights; the optimizer comes
    after those."""
    from megatron_vico.convert.describe import OPTIMIZER

    groups: dict[str, list[TensorFacts]] = {}
    after: dict[str, list[TensorFacts]] = {}
    for each in checkpoint.tensors:
        name, _, part = each.module.partition(" ")
        if each.module == OPTIMIZER:
            after.setdefault(name, []).append(each)
            continue
        groups.setdefault(name, []).append(each)
        if part:
            groups.setdefault(f"  {part}", []).append(each)
    groups["weights"] = [each for each in checkpoint.tensors if each.module != OPTIMIZER]
    return {
        name: {
            "tensors": len(tensors),
            "parameters": sum(each.num_parameters for each in tensors),
            "bytes": sum(each.num_bytes for each in tensors),
            "dtypes": sorted({_dtype(each) for each in tensors}),
        }
        for name, tensors in (groups | after).items()
    }


def _as_json(checkpoint: "Checkpoint", shown: Sequence["TensorFacts"]) -> dict[str, Any]:
    contents: dict[str, Any] = {
        "path": str(checkpoint.path),
        "form": checkpoint.form,
        **checkpoint.facts,
        "problems": list(checkpoint.problems),
        "modules": {name.strip(): each for name, each in _modules(checkpoint).items()},
    }
    if shown:
        contents["tensors"] = [
            {
                "name": each.name,
                "module": each.module,
                "dtype": _dtype(each),
                "shape": list(each.shape),
                "bytes": each.num_bytes,
            }
            for each in shown
        ]
    return contents


def _comparison_text(
    first: "Checkpoint", second: "Checkpoint", found: "Comparison", *, everything: bool
) -> str:
    lines = [f"first:  {first.path}", f"second: {second.path}", f"same: {found.num_same} tensors"]
    kinds: dict[str, list[Difference]] = {}
    for each in found.differences:
        kinds.setdefault(each.kind, []).append(each)
    for kind, members in kinds.items():
        most = len(members) if everything else _MOST_LISTED
        lines += ["", f"{kind}: {len(members)} tensors"]
        lines += [f"  {line}" for line in _table(*_difference_rows(members[:most]))]
        if len(members) > most:
            lines.append(f"  and {len(members) - most} more; --tensors lists all")
    return "\n".join(lines)


def _difference_rows(members: Sequence["Difference"]) -> tuple[list[str], list[list[str]]]:
    kind = members[0].kind
    rows = [[each.name] for each in members]
    titles = ["tensor"]
    if kind in ("values differ", "dtype differs"):
        titles += ["max difference", "relative norm"]
        for row, each in zip(rows, members, strict=True):
            row += [f"{each.max_difference:.3e}", f"{each.relative_norm:.3e}"]
    if kind != "values differ":
        for title in ("first", "second"):
            if any(getattr(each, title) for each in members):
                titles.append(title)
                for row, each in zip(rows, members, strict=True):
                    row.append(getattr(each, title))
    return titles, rows


def _comparison_json(
    first: "Checkpoint", second: "Checkpoint", found: "Comparison"
) -> dict[str, Any]:
    return {
        "first": str(first.path),
        "second": str(second.path),
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
    """Lines of columns, the first and the last aligned to the left, numbers between them to the
    right."""
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


def _dtype(tensor: "TensorFacts") -> str:
    return str(tensor.dtype).removeprefix("torch.")
