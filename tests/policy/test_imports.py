"""Imports go one way: a part of the package may use those before it, never those after it."""

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

PACKAGE = Path(__file__).parents[2] / "megatron_vico"

# Each folder, lowest first: it may import those before it. Folders of one line do not know each
# other.
ORDER: tuple[tuple[str, ...], ...] = (
    ("errors", "vico"),
    ("files", "cpu_stand_in"),
    ("config",),
    ("models", "data"),
    ("parallel",),
    ("checkpoint",),
    ("convert",),
    ("inference", "training"),
    ("evaluation", "planning", "shard_tools"),
    ("cli",),
    ("__main__", "api", "lmms_plugin"),
    ("",),  # the package's own names
)
LEVELS = {part: level for level, parts in enumerate(ORDER) for part in parts}
MEGATRON_FREE = ("vico", "data")
# Travels with exports: nothing of the package is there when it runs, and transformers finds its
# files by relative imports.
REMOTE_CODE = PACKAGE / "convert" / "remote_code"


def files() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


def part_of(module: str) -> str:
    """The folder of a module, or its own name at the top: `megatron_vico.data.order` -> data."""
    return module.removeprefix("megatron_vico").strip(".").split(".")[0]


def module_of(path: Path) -> str:
    return ".".join(
        ("megatron_vico", *path.relative_to(PACKAGE).with_suffix("").parts)
    ).removesuffix(".__init__")


def imports(path: Path) -> Iterator[str]:
    """Every module that a file imports, also inside functions."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0 or path.parent == REMOTE_CODE, f"{path}: relative import"
            assert node.module is not None
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def test_imports_go_one_way() -> None:
    wrong = []
    for path in files():
        here = part_of(module_of(path))
        for module in imports(path):
            there = part_of(module) if module.startswith("megatron_vico.") else here
            if there == here or module == "megatron_vico.__version__":
                continue
            assert {here, there} <= LEVELS.keys(), (
                f"{path}: {module}: give the part a level in this test"
            )
            if LEVELS[there] >= LEVELS[here]:
                wrong.append(f"{module_of(path)} imports {module}")
    assert wrong == []


def test_data_and_equations_need_no_megatron() -> None:
    paths = [path for path in files() if part_of(module_of(path)) in MEGATRON_FREE]
    assert len(paths) > 8
    assert [
        path for path in paths for module in imports(path) if module.split(".")[0] == "megatron"
    ] == []


def test_equations_import_torch_only() -> None:
    for path in sorted((PACKAGE / "vico").glob("*.py")):
        roots = {module.split(".")[0] for module in imports(path)}
        assert roots - {"torch", "megatron_vico"} <= sys.stdlib_module_names, path


def test_remote_code_needs_nothing_of_ours() -> None:
    """It runs where only an export is, with torch and transformers; Pillow for images."""
    paths = [path for path in REMOTE_CODE.glob("*.py") if path.name != "__init__.py"]
    own = {path.stem for path in paths}
    assert len(own) > 1
    assert (REMOTE_CODE / "__init__.py").exists()  # so that an installation has the folder
    for path in paths:
        roots = {module.split(".")[0] for module in imports(path)}
        assert roots - {"torch", "transformers", "PIL"} - own <= sys.stdlib_module_names, path


def test_nothing_imports_the_commands() -> None:
    for path in files():
        if part_of(module_of(path)) not in ("cli", "__main__", "api", "lmms_plugin"):
            assert not [
                module for module in imports(path) if module.startswith("megatron_vico.cli")
            ], path


def test_the_cpu_stand_in_is_installed_by_entry_points_only() -> None:
    callers = [module_of(path) for path in files() if "cpu_stand_in.install(" in path.read_text()]
    assert all(part_of(module) in ("cli", "api") for module in callers)
    assert callers


def test_the_walk_sees_imports_inside_functions() -> None:
    assert "megatron_vico.training.trainer.train" in set(imports(PACKAGE / "cli" / "train.py"))
