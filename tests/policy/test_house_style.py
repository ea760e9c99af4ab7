"""The limits of the house style that a machine can hold; the width of 100 columns is ruff's."""

import ast
from pathlib import Path

ROOT = Path(__file__).parents[2]
MAX_FILE_LINES = 400
MAX_FUNCTION_LINES = 60
MAX_LOOP_LINES = 100
MAX_PARAMETERS = 8
# The official system message of InternVL is Chinese.
NOT_ASCII = {"conversation.py"}
# Travels with exports as transformers wants it: a model in one file.
REMOTE_CODE = ROOT / "megatron_vico" / "convert" / "remote_code"


def test_files_are_short() -> None:
    assert [shown(path) for path in files() if num_lines(path) > MAX_FILE_LINES] == []


def test_functions_are_short() -> None:
    long = []
    for path in files():
        for function in functions(path):
            is_the_loop = (path.name, function.name) == ("trainer.py", "_loop")
            if code_lines(function) > (MAX_LOOP_LINES if is_the_loop else MAX_FUNCTION_LINES):
                long.append(f"{shown(path)}: {function.name} has {code_lines(function)} lines")
    assert long == []


def test_functions_take_few_parameters() -> None:
    wide = []
    for path in files("megatron_vico"):
        for function in functions(path):
            given = function.args
            names = [
                arg.arg
                for arg in given.posonlyargs + given.args + given.kwonlyargs
                if arg.arg not in ("self", "cls")
            ]
            if len(names) > MAX_PARAMETERS and not is_given_by_a_library(path, function):
                wide.append(f"{shown(path)}: {function.name} has {len(names)} parameters")
    assert wide == []


def test_files_say_what_they_are() -> None:
    texts = {path: path.read_text() for path in files()}
    assert [
        shown(path)
        for path, text in texts.items()
        if text.strip() and not ast.get_docstring(ast.parse(text))
    ] == []


def test_text_is_plain_ascii() -> None:
    kept = [
        path for path in files("megatron_vico", "tools", "examples") if path.name not in NOT_ASCII
    ]
    assert [shown(path) for path in kept if not path.read_text(encoding="utf-8").isascii()] == []


def files(*folders: str) -> list[Path]:
    return [
        path
        for folder in folders or ("megatron_vico", "tools", "examples", "benchmarks", "tests")
        for path in sorted((ROOT / folder).rglob("*.py"))
        if path.parent != REMOTE_CODE
    ]


def num_lines(path: Path) -> int:
    return len(path.read_text(encoding="utf-8").splitlines())


def shown(path: Path) -> str:
    return str(path.relative_to(ROOT))


def functions(path: Path) -> list[ast.FunctionDef | ast.AsyncFunctionDef]:
    tree = ast.parse(path.read_text())
    return [
        node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    ]


def code_lines(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Lines of a function without its docstring, which does not make it long."""
    assert function.end_lineno is not None
    lines = function.end_lineno - function.lineno + 1
    if ast.get_docstring(function) is None:
        return lines
    docstring = function.body[0]
    assert docstring.end_lineno is not None
    return lines - (docstring.end_lineno - docstring.lineno + 1)


def is_given_by_a_library(path: Path, function: ast.FunctionDef | ast.AsyncFunctionDef) -> bool:
    """Modules that stand in for one of megatron-core's or torch's keep its signature."""
    stands_in = path.parent.name == "models" and function.name in ("__init__", "forward")
    return stands_in or path.name == "cpu_stand_in.py"
