"""`vico report RUN`: one HTML page about a run, or about all runs in a folder."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from megatron_vico import files


def main(arguments: Sequence[str]) -> None:
    """Write the page; ConfigError if there is no run that can be read."""
    parser = argparse.ArgumentParser(prog="vico report", description=__doc__)
    run_help = (
        "a run's --save folder, its metrics.jsonl, or a folder of such folders; plan.json (`vico"
        " plan --json`) and routing*.png (tools/visualize_routing.py) in it are shown too"
    )
    parser.add_argument("run", type=Path, help=run_help)
    out_help = "page to write; unset, report.html in the folder"
    parser.add_argument("--out", type=Path, help=out_help)
    options = parser.parse_args(arguments)
    from megatron_vico.evaluation.report import report_page

    page = report_page(options.run)
    folder = options.run if options.run.is_dir() else options.run.parent
    out = options.out or folder / "report.html"
    out.parent.mkdir(parents=True, exist_ok=True)
    files.write_text(out, page)
    print(out)
