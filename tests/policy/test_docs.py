"""README and docs say what is so: commands parse, links lead somewhere, messages can be met."""

import ast
import contextlib
import importlib
import re
import runpy
import shlex
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[2]
DOCS, PACKAGE = ROOT / "docs", ROOT / "megatron_vico"
PAGES = sorted([*ROOT.glob("*.md"), *DOCS.glob("*.md"), *ROOT.glob("examples/**/*.md")])
each_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))

FENCE = re.compile(r"^( *)```(\w*)[^\n]*\n(.*?)^\1```", re.MULTILINE | re.DOTALL)
PROGRAMS = ("vico ", "make ", "python ", "torchrun ", "pytest ", "examples/")


class Parsed(Exception):
    """A command's words were read; what comes after would run it."""


def commands(page: Path) -> Iterator[tuple[list[str], bool]]:
    """The words of every command, and whether they are whole: those of blocks are, others name."""
    text = page.read_text()
    for _, language, block in FENCE.findall(text):
        for line in block.replace("\\\n", " ").splitlines() if language in ("", "bash") else ():
            plain = re.sub(r"^\s*(\$ )?([A-Z_]+=\S+ )*(\.venv/bin/)?", "", line)
            if plain.startswith(PROGRAMS):
                yield shlex.split(plain, comments=True), True
    for span in re.findall(r"`([^`]+)`", FENCE.sub("", text)):
        if span.startswith(PROGRAMS) and not re.search(r"[<*]", span):
            yield shlex.split(span, comments=True), False


@each_page
def test_commands_parse(
    page: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("COLUMNS", "1000")
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    for (program, *rest), is_whole in commands(page):
        if program == "torchrun" or rest[:2] == ["-m", "torch.distributed.run"]:
            program, rest = "python", rest[rest.index("megatron_vico") - 1 :]
        if program == "python" and rest[:2] == ["-m", "megatron_vico"]:
            program, rest = "vico", rest[2:]
        words = [word for word in rest if not word.startswith("-")]
        if program == "vico" and words and "COMMAND" not in words:
            check_vico(rest, is_whole, monkeypatch, capsys)
        elif program == "make":
            assert {word for word in words if "=" not in word} <= set(targets), rest
        elif program == "pytest":
            assert all((ROOT / word.split("::")[0]).exists() for word in words), rest
        elif program == "python":
            check_script(rest)
        elif program != "vico":
            assert (ROOT / program).exists(), program


def check_vico(
    words: list[str],
    is_whole: bool,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """A whole command is read as it would be; of one that is only named, flags are in the help."""
    from megatron_vico.cli import checkpoint_verify, main

    assert words[0] in main.COMMANDS, words
    command = importlib.import_module(f"megatron_vico.cli.{words[0]}")
    if is_whole and "--help" not in words and words[0] != "report":
        with monkeypatch.context() as patched:
            for module in (command, checkpoint_verify):
                for name in {"read", "read_action", "parse"} & vars(module).keys():
                    patched.setattr(module, name, stopping(getattr(module, name)))
            with pytest.raises(Parsed):
                command.main(words[1:])
        return
    has_actions = words[0] in ("shards", "plot") or words[:2] == ["checkpoint", "verify"]
    flags = {word.partition("=")[0] for word in words if word.startswith("--")}
    if flags - {"--help"}:
        for asked in (words[0], "train") if words[0] in ("plan", "status") else (words[0],):
            with contextlib.suppress(SystemExit):
                main.main([asked, *words[1 : 1 + has_actions], "--help"])
        shown = capsys.readouterr().out
        assert {flag for flag in flags if not re.search(rf"{flag}(?![\w-])", shown)} == set(), words


def stopping(read: Callable[..., Any]) -> Callable[..., Any]:
    def reading(*args: Any, **keywords: Any) -> None:
        read(*args, **keywords)
        raise Parsed

    return reading


def check_script(words: list[str]) -> None:
    module = ROOT / words[1].replace(".", "/") if words[0] == "-m" else ROOT / words[0]
    found = [path for path in (module, module.with_suffix(".py")) if path.exists()]
    assert found, words
    for flag in {word.partition("=")[0] for word in words if word.startswith("--")} - {"--help"}:
        file = found[0] / "__main__.py" if found[0].is_dir() else found[0]
        assert f'"{flag}"' in file.read_text(), f"{file} takes no {flag}"


def anchors(page: Path) -> set[str]:
    """Of its headings, as GitHub and the site make them."""
    heads = re.findall(r"^#+ (.+)$", FENCE.sub("", page.read_text()), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", head.lower()).strip().replace(" ", "-") for head in heads}


@each_page
def test_links_lead_somewhere(page: Path) -> None:
    plain = re.sub(r"`[^`]*`", "", FENCE.sub("", page.read_text()))
    for target in re.findall(r"\]\(([^)\s]+)", plain):
        name, _, anchor = target.partition("#")
        if not re.match(r"[a-z]+:", target):
            file = (page.parent / name).resolve() if name else page
            assert file.exists(), target
            assert page.parent != DOCS or file.is_relative_to(DOCS), f"{target} is not on the site"
            assert not anchor or anchor in anchors(file), target


def test_every_page_is_in_the_menu_and_those_that_are_named_exist() -> None:
    menu = yaml.safe_dump(yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"])
    pages = {path.name for path in DOCS.glob("*.md")}
    assert set(re.findall(r"[\w./]+\.md", menu)) == pages, "put each into nav of mkdocs.yml"
    folders = (ROOT, *(ROOT / name for name in ("megatron_vico", "examples", "tools", "tests")))
    files = [*DOCS.glob("*.md"), *(path for each in folders for path in each.glob("*.*"))]
    files += [path for each in folders[1:] for path in each.rglob("*.*")]
    texts = [path.read_text() for path in files if path.suffix in (".md", ".py", ".sh", ".yaml")]
    named = {name for text in texts for name in re.findall(r"(?<![\w/-])docs/(\w+\.md)", text)}
    assert named <= pages


def test_the_options_are_those_of_the_code() -> None:
    page = runpy.run_path(str(ROOT / "tools" / "options_page.py"))["page"]
    told = "run `python tools/options_page.py > docs/options.md`"
    assert (DOCS / "options.md").read_text() == page(), told


def test_every_cause_of_verify_has_its_row() -> None:
    text = (PACKAGE / "shard_tools" / "shard_check.py").read_text()
    causes = re.findall(r'"(.+?)"', text.split("ProblemCause = Literal[")[1].split("]")[0])
    assert re.findall(r"^\| `([a-z ]+)` \|", (DOCS / "data.md").read_text(), re.MULTILINE) == causes


def test_every_message_can_be_met() -> None:
    """Each is made by a string of the source that makes at least a fifth of it."""
    blocks = [block for _, kind, block in FENCE.findall((DOCS / "troubleshooting.md").read_text())]
    messages = [line for block in blocks for line in block.splitlines() if "Error: " in line]
    assert len(messages) > 15
    unknown = set(messages)
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            parts = node.values if isinstance(node, ast.JoinedStr) else [node]
            words = [
                str(part.value).rstrip("\n") for part in parts if isinstance(part, ast.Constant)
            ]
            pattern = ".*".join(map(re.escape, words))
            length = len(re.sub(r"--[a-z-]+", "", "".join(words)))  # a flag alone says nothing
            if length > 12:
                unknown -= {m for m in unknown if length > len(m) / 5 and re.search(pattern, m)}
    assert unknown == set()
