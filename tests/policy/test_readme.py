"""The README's tree names every folder of the package once, and nothing that is not there."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_the_tree_is_complete_and_true() -> None:
    text = (ROOT / "README.md").read_text()
    block = text.split("## Reading the code")[1].split("```")[1]
    listed = re.findall(r"^  (\w+)/ ", block.split("\nexamples/")[0], re.MULTILINE)
    package = ROOT / "megatron_vico"
    there = {path.parent.name for path in package.glob("*/__init__.py")}
    assert len(listed) == len(set(listed))
    assert set(listed) == there
