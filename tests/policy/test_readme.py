"""What text says of the tree is true: the README's folders, and every Python file that is named."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
FOLDERS = ("megatron_vico", "examples", "tools", "benchmarks", "tests")


def test_the_tree_is_complete_and_true() -> None:
    text = (ROOT / "README.md").read_text()
    block = text.split("## Reading the code")[1].split("```")[1]
    listed = re.findall(r"^  (\w+)/ ", block.split("\nexamples/")[0], re.MULTILINE)
    package = ROOT / "megatron_vico"
    there = {path.parent.name for path in package.glob("*/__init__.py")}
    assert len(listed) == len(set(listed))
    assert set(listed) == there


def test_every_file_that_is_named_exists() -> None:
    there = {str(path) for folder in FOLDERS for path in (ROOT / folder).rglob("*.py")}
    texts = [*ROOT.glob("*.md"), *map(Path, there)]
    texts += [path for path in (ROOT / "examples").rglob("*") if path.suffix in (".md", ".yaml")]
    gone = {
        f"{text.relative_to(ROOT)}: {named}"
        for text in texts
        for named in re.findall(r"(?<![\w.{}*])(?:\w+/)*\w+\.py\b", text.read_text())
        if not any(path.endswith(f"/{named}") for path in there) and named != "setup.py"
    }
    assert gone == set()
