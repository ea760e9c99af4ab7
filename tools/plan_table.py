#!/usr/bin/env python3
"""What every recipe takes, as `vico plan` says, in one Markdown table: docs/scaling.md.

    python tools/plan_table.py --output runs/plans            # all; what is there is not run again
    python tools/plan_table.py --output runs/plans --only 8b  # those whose path has these letters
    python tools/plan_table.py --output runs/plans --no-run   # the table of what is there
    python tools/plan_table.py --output runs/plans --write docs/scaling.md    # put it there

A file for each plan stays in the folder, so that a run that is ended goes on where it was.
"""

import argparse
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
RECIPES = Path("examples/recipes")
LARGEST, COUNTS = "internvl3_5_241b_a28b", (64, 128, 256, 512)
STATE = ("policy", "gradients", "optimizer", "reference", "encoder")
NAMES = ("GPUs", *STATE, "a step adds", "peak", "free", "TFLOP", "GB moved", "floor s", "s")
MARKS = ("<!-- tools/plan_table.py -->\n", "<!-- end -->\n")


@dataclass(frozen=True, kw_only=True)
class Case:
    """A recipe on a number of GPUs."""

    recipe: Path
    gpus: int
    kind: str

    @property
    def words(self) -> list[str]:
        """Of the command, behind `vico`."""
        flags = ("--world-size", str(self.gpus), "--gpu", self.kind)
        return ["plan", "--quick", "--recipe", str(self.recipe), *flags]

    @property
    def name(self) -> str:
        return f"{self.recipe.parent.name}-{self.recipe.stem}-{self.gpus}-{self.kind}"


def made_for(recipe: Path) -> Case:
    """A recipe on what its first line says that it is for."""
    words = re.match(r"# For (\d+) GPUs \(\d+ nodes? of 8 (H\d+)\)", (ROOT / recipe).read_text())
    assert words is not None, f"{recipe}: the first line says for how many GPUs"
    return Case(recipe=recipe, gpus=int(words[1]), kind=words[2].lower())


def all_cases() -> Iterator[Case]:
    """Recipes of each size, the smallest first; the largest size's also on other numbers."""
    sizes = sorted(
        (ROOT / RECIPES).glob("internvl3_5_*"),
        key=lambda folder: int(re.findall(r"_(\d+)b", folder.name)[0]),
    )
    for folder in sizes:
        for path in sorted(folder.glob("*.yaml")):
            yield made_for(path.relative_to(ROOT))
    own = made_for(RECIPES / LARGEST / "consistency.yaml")
    for gpus in COUNTS:
        if gpus != own.gpus:
            yield Case(recipe=own.recipe, gpus=gpus, kind=own.kind)


def play(case: Case, file: Path) -> None:
    """Run the plan, which leaves its file whether it fits or not."""
    command = [sys.executable, "-W", "ignore", "-m", "megatron_vico", *case.words, "--json", file]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if not file.exists():
        sys.exit(f"plan_table.py: {' '.join(case.words)}: {done.stderr.splitlines()[-1]}")


def row(plan: dict[str, Any], case: Case) -> list[str]:
    """Of the rank that takes most."""
    rank = max(plan["ranks"].values(), key=lambda each: each["peak_bytes"])
    static = sum(rank["static"].values())
    parts = [rank["static"].get(part, 0) for part in STATE]
    memory = [*parts, rank["peak_bytes"] - static, rank["peak_bytes"], plan["room_bytes"]]
    memory[-1] -= rank["peak_bytes"]
    moved = sum(each["num_bytes"] for each in rank["traffic"]) / 1e9
    return [
        f"`{case.recipe.relative_to(RECIPES)}`",
        f"{case.gpus} {case.kind}",
        *(f"{size / 1e9:.1f}" for size in memory),
        f"{sum(rank['flops'].values()) / 1e12:,.0f}",
        f"{moved:,.0f}",
        f"{plan['floor_s']:.1f}",
        f"{plan['expected_s']:.1f}",
    ]


def main() -> None:
    """Run what is missing, then print the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--output", type=Path, required=True, help="folder of the plans' files")
    parser.add_argument("--only", default="", help="letters that a plan's name must have")
    parser.add_argument("--no-run", action="store_true", help="print what is there")
    parser.add_argument("--write", type=Path, help="file whose table between the marks it becomes")
    options = parser.parse_args()
    folder = options.output.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    lines = []
    for case in all_cases():
        file = folder / f"{case.name}.json"
        if options.only not in case.name:
            continue
        if not file.exists() and not options.no_run:
            print(f"vico {' '.join(case.words)}", file=sys.stderr, flush=True)
            play(case, file)
        if file.exists():
            lines.append(row(json.loads(file.read_text()), case))
    rows = (["recipe", *NAMES], ["---"] * (len(NAMES) + 1), *lines)
    table = "".join(f"| {' | '.join(cells)} |\n" for cells in rows)
    print(table, end="")
    if options.write is not None:
        before, _, rest = options.write.read_text().partition(MARKS[0])
        _, end, after = rest.partition(MARKS[1])
        assert end, f"{options.write} lacks the marks {MARKS}"
        options.write.write_text(f"{before}{MARKS[0]}{table}{MARKS[1]}{after}")


if __name__ == "__main__":
    main()
