"""The README's tree names every file of the package once, and nothing that is not there."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]


def tree_files() -> list[str]:
    """Paths in the README's tree, which gives each folder a line and its files, indented, a line
    each."""
    text = (ROOT / "README.md").read_text()
    block = text.split("## Reading the code")[1].split("```")[1]
    folder, files = "", []
    for line in block.splitlines():
        folder_line = re.match(r"(\S+)/ ", line)
        file_line = re.match(r"  (\S+\.py) ", line)
        if folder_line:
            folder = folder_line[1]
        elif file_line:
            files.append(f"{folder}/{file_line[1]}")
    return files


def test_the_tree_is_complete_and_true() -> None:
    there = {
        path.relative_to(ROOT).as_posix()
        for path in (ROOT / "megatron_vico").rglob("*.py")
        if path.name not in ("__init__.py", "__main__.py")
    }
    listed = tree_files()
    assert len(listed) == len(set(listed))
    assert set(listed) == there
