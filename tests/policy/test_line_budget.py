"""Each folder has a number of lines that it may have: what comes in says what goes out for it."""

from collections import Counter
from pathlib import Path

ROOT = Path(__file__).parents[2]
NOT_COUNTED = ROOT / "megatron_vico" / "convert" / "remote_code"  # travels with exports

# Lines of Python, docstrings and blank lines too. "." is what lies in no folder.
PACKAGE = {
    ".": 440,
    "checkpoint": 640,
    "cli": 1690,
    "config": 2590,
    "convert": 3190,
    "data": 4110,
    "evaluation": 860,
    "inference": 480,
    "models": 2270,
    "parallel": 720,
    "shard_tools": 2520,
    "training": 2480,
    "vico": 440,
}
TESTS = {
    ".": 1400,
    "distributed": 3230,
    "golden": 130,
    "gpu": 540,
    "parity": 1440,
    "policy": 310,
    "unit": 14470,
}


def test_the_package_keeps_to_its_budget() -> None:
    check("megatron_vico", PACKAGE)


def test_the_tests_keep_to_theirs() -> None:
    check("tests", TESTS)


def check(root: str, budget: dict[str, int]) -> None:
    lines = lines_by_folder(ROOT / root)
    assert lines.keys() == budget.keys(), f"{root}: each folder needs a budget in {__file__}"
    over = {
        f"{root}/{folder}: {found} lines of {budget[folder]}"
        for folder, found in lines.items()
        if found > budget[folder]
    }
    assert not over, (
        f"{'; '.join(sorted(over))}. Remove what is not needed any more and name it in the commit;"
        " raise the number only in a commit that says what comes in and what went out for it."
    )


def lines_by_folder(root: Path) -> Counter[str]:
    found: Counter[str] = Counter()
    for path in root.rglob("*.py"):
        if path.parent != NOT_COUNTED:
            parts = path.relative_to(root).parts
            found[parts[0] if len(parts) > 1 else "."] += len(path.read_text().splitlines())
    return found
