"""`vico plan`: what bad input is told, and what does not fit."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_vico.cli.main import main

RECIPES = "examples/recipes/internvl3_5_"


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ("--gpu h20", "--gpu h20: known are h100 (85.5 GB), h200 (150.8 GB); did you mean 'h200'?"),
        ("--world-size 100", "world size 100 is not a multiple of tensor 2 x pipeline 8 x context"),
        ("--world-size 128 --rank 128", "--rank 128 of 128: use 0 to 127."),
        ("--world-size 0", "--world-size 0: expected 1 or more."),
        ("--world-size -3 --search", "--world-size -3: expected 1 or more."),
    ],
)
def test_bad_input_is_one_line(words: str, told: str, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = f"--recipe {RECIPES}241b_a28b/consistency.yaml"
    assert main(["plan", *words.split(), *recipe.split()]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert told in err
    assert err.count("\n") == 1


# A card that the toy almost fits on: it takes 25.2 MB on 2 ranks, 16.3 of them between steps, of
# which 4 ranks would take 12.8 each.
SMALL_CARD = """
import sys
from megatron_vico.cli.main import main
from megatron_vico.planning.cards import CARDS
CARDS["h100"] = 26e6
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.slow
def test_a_run_that_does_not_fit_is_told_what_would() -> None:
    words = (
        "plan --quick --gpu h100 --world-size 2 --model-size toy --stage consistency --bf16"
        " --use-distributed-optimizer --seq-length 512 --global-batch-size 16"
        " --pretrained-checkpoint none"
    )
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", SMALL_CARD, *words.split()],
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[3])},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2, done.stderr[-2000:]
    *_, verdict, told = done.stdout.splitlines()
    assert verdict.startswith("does not fit: rank 0 lacks 0.0 GB")
    assert told == "would fit: --gpu h200 or --world-size 4 (about 0 GB)"
