"""Table 3 of the ViCO paper at toy size: the demo for several fresh seeds, and what holds of it.

Run: python examples/ablation/run.py            (three seeds; three times `make demo`)
     python examples/ablation/run.py --quick    (mechanics, not quality)

Data, initialisation, order and plans are fresh for each seed. An interrupted run goes on where it
stopped, and a seed that is done is not run again. The rows are those of the demo.
"""

import argparse
import itertools
import json
import math
import statistics
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from megatron_vico.evaluation import tables
from megatron_vico.evaluation.benchmarks import ABLATIONS
from megatron_vico.files import write_json

ROOT = Path(__file__).resolve().parents[2]
DEMO = ROOT / "examples" / "quickstart" / "run.py"
ORDER = ("vanilla_vir", "all_compress", "random_compress", "image_level", "vico")
"""The paper's, from the worst to the best."""
LEAST_RETENTION, LEAST_COMPRESSED = 0.99, 0.60
BEYOND = 2.0
"""Standard errors."""


@dataclass(frozen=True, kw_only=True)
class Measured:
    """A mean over seeds; fractions."""

    mean: float
    spread: float
    """Standard deviation from seed to seed."""

    standard_error: float
    """Of the mean: from the spread or from the questions, whichever is larger."""


@dataclass(frozen=True, kw_only=True)
class Claim:
    """Something that the paper says, as an amount that is above 0 if it is so."""

    text: str
    amount: Measured

    @property
    def holds(self) -> bool:
        """Beyond two standard errors."""
        return self.amount.mean > BEYOND * self.amount.standard_error


def measured(values: Sequence[float], errors: Sequence[float]) -> Measured:
    """The mean of one value a seed, each with the standard error that its questions give it."""
    count = len(values)
    spread = statistics.stdev(values) if count > 1 else 0.0
    by_questions = math.hypot(*errors) / count
    return Measured(
        mean=statistics.mean(values),
        spread=spread,
        standard_error=max(by_questions, spread / math.sqrt(count)),
    )


def claims(seeds: Sequence[dict[str, Any]]) -> Iterator[Claim]:
    """The paper's order of rows, and how much ViCO keeps; `seeds`: row -> its figures, each."""

    def above(better: str, worse: str, share: float = 1.0) -> Measured:
        return measured(
            [seed[better]["score"] - share * seed[worse]["score"] for seed in seeds],
            [
                math.hypot(seed[better]["standard_error"], share * seed[worse]["standard_error"])
                for seed in seeds
            ],
        )

    for worse, better in (*itertools.pairwise(ORDER), ("fastv", "vico"), ("sparsevlm", "vico")):
        text = f"{ABLATIONS[worse]} < {ABLATIONS[better]}"
        yield Claim(text=text, amount=above(better, worse))
    yield Claim(
        text=f"ViCO keeps {LEAST_RETENTION:.0%} of vanilla",
        amount=above("vico", "vanilla", LEAST_RETENTION),
    )
    compressed = [seed["vico"]["compressed_tiles"] - LEAST_COMPRESSED for seed in seeds]
    yield Claim(
        text=f"with {LEAST_COMPRESSED:.0%} of the tiles compressed",
        amount=measured(compressed, [0.0] * len(seeds)),
    )


def read_seed(run: Path) -> dict[str, Any]:
    """Row -> score, standard_error, retention, compressed_tiles of one demo."""
    errors = {
        each["row"]: each["standard_error"]
        for each in json.loads((run / "details.json").read_text())
    }
    rows = tables.read_results(run / "results.json")
    return {row.row: asdict(row) | {"standard_error": errors[row.row]} for row in rows}


def grid(seeds: Sequence[dict[str, Any]]) -> tables.Grid:
    """Means, with their spreads from seed to seed."""

    def cell(row: str, name: str) -> str:
        values = [seed[row][name] for seed in seeds]
        spread = statistics.stdev(values) if len(values) > 1 else 0.0
        return f"{100 * statistics.mean(values):.1f} +- {100 * spread:.1f}"

    names = ("score", "retention", "compressed_tiles", "visual_token_reduction")
    lines = [(ABLATIONS[row], *(cell(row, name) for name in names)) for row in seeds[0]]
    notes = [f"\nper cent, mean +- standard deviation over {len(seeds)} seeds\n"]
    for claim in claims(seeds):
        amount, error = 100 * claim.amount.mean, 100 * claim.amount.standard_error
        verdict = "holds" if claim.holds else "does not hold"
        notes.append(f"{verdict:13}  {claim.text}: {amount:+.1f} +- {error:.1f} points")
    notes.append(f"holds: beyond {BEYOND:g} standard errors")
    headings = ("", "score", "retention", "compressed tiles", "visual tokens saved")
    return tables.Grid(headings=headings, lines=tuple(lines), notes=tuple(notes))


def main() -> int:
    """Run the demo for each seed, then print the table; status: that of a demo that failed."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--seeds", type=int, nargs="+", default=[101, 102, 103])
    parser.add_argument("--quick", action="store_true", help="few steps: mechanics only")
    parser.add_argument("--processes", type=int, default=2, help="training processes")
    parser.add_argument("--out", type=Path, help="folder; unset, runs/ablation (-quick)")
    args = parser.parse_args()
    out = args.out or ROOT / "runs" / ("ablation-quick" if args.quick else "ablation")
    for seed in args.seeds:
        run = out / f"seed_{seed}"
        words = ["--seed", seed, "--out", run, "--processes", args.processes, "--resume"]
        words += ["--quick"] if args.quick else []
        print(f"seed {seed}: {run}", flush=True)
        done = subprocess.run([sys.executable, DEMO, *map(str, words)], check=False)
        if done.returncode:
            return done.returncode
    seeds = [read_seed(out / f"seed_{seed}") for seed in args.seeds]
    table = grid(seeds)
    write_json(out / "results.json", dict(zip(map(str, args.seeds), seeds, strict=True)))
    (out / "table.md").write_text(tables.as_markdown(table) + "\n", encoding="utf-8")
    print(f"\n{tables.as_text(table)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
