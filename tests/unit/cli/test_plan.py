"""`vico plan`: what bad input is told."""

import pytest

from megatron_vico.cli.main import main

RECIPES = "examples/recipes/internvl3_5_"


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ("--gpu h20", "--gpu h20: known are h100 (85.5 GB), h200 (150.8 GB); did you mean 'h200'?"),
        ("--world-size 100", "world size 100 is not a multiple of tensor 2 x pipeline 8 x context"),
        ("--world-size 128 --rank 128", "--rank 128 of 128: use 0 to 127."),
    ],
)
def test_bad_input_is_one_line(words: str, told: str, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = f"--recipe {RECIPES}241b_a28b/consistency.yaml"
    assert main(["plan", *words.split(), *recipe.split()]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert told in err
    assert err.count("\n") == 1
