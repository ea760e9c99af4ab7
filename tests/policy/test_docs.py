"""README and docs say what is so: commands parse, links lead somewhere, messages can be met."""

import ast
import functools
import importlib
import importlib.util
import re
import shlex
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
PAGES = sorted(
    [*ROOT.glob("*.md"), *DOCS.glob("*.md"), *ROOT.glob("examples/**/*.md")],
    key=lambda path: path.name,
)
FENCE = re.compile(r"^( *)```(\w*)[^\n]*\n(.*?)^\1```", re.MULTILINE | re.DOTALL)
READERS = ("read", "read_action", "parse")


class Parsed(Exception):
    """A command's words were read; what comes after would run it."""


def commands(page: Path) -> Iterator[tuple[list[str], bool]]:
    """The words of every command, and whether they are whole: those of blocks are, others name."""
    text = page.read_text()
    for _, language, block in FENCE.findall(text):
        for line in block.replace("\\\n", " ").splitlines() if language in ("", "bash") else ():
            yield shlex.split(line.strip().removeprefix("$ "), comments=True), True
    for span in re.findall(r"`([^`]+)`", FENCE.sub("", text)):
        if span.startswith(("vico ", "make ", "python ", "torchrun ", "pytest ", "examples/")):
            yield shlex.split(span, comments=True), False


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_commands_parse(
    page: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(ROOT)
    for words, is_whole in commands(page):
        words = words[next((i for i, word in enumerate(words) if "=" not in word), len(words)) :]
        program, *rest = [words[0].removeprefix(".venv/bin/"), *words[1:]] if words else [""]
        if program == "torchrun" or rest[:2] == ["-m", "torch.distributed.run"]:
            program, rest = "python", rest[rest.index("megatron_vico") - 1 :]
        if program == "python" and rest[:2] == ["-m", "megatron_vico"]:
            program, rest = "vico", rest[2:]
        if program == "vico":
            check_vico(rest, is_whole, monkeypatch, capsys)
        elif program == "make":
            targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
            assert {word for word in rest if "=" not in word} <= set(targets), words
        elif program == "pytest":
            assert all((ROOT / word.split("::")[0]).exists() for word in rest), words
        elif program == "python":
            check_script(rest)
        elif program.startswith("examples/"):
            assert (ROOT / program).exists(), words


def check_vico(
    words: list[str],
    is_whole: bool,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    from megatron_vico.cli import checkpoint_verify
    from megatron_vico.cli.main import COMMANDS, main

    if not words or words[0].startswith("-") or words[0] == "COMMAND":
        return
    assert words[0] in COMMANDS, words
    if is_whole and "--help" not in words:
        command = importlib.import_module(f"megatron_vico.cli.{words[0]}")
        with monkeypatch.context() as patched:
            for module in (command, checkpoint_verify):
                for name in READERS:
                    if hasattr(module, name):
                        patched.setattr(module, name, stopping(getattr(module, name)))
            if words[0] == "report":
                assert len([word for word in words[1:] if not word.startswith("-")]) == 1, words
                return
            with pytest.raises(Parsed):
                command.main(words[1:])
        return
    action = words[1:2] if words[0] in ("shards", "plot") or "verify" in words[1:2] else []
    flags = {word.partition("=")[0] for word in words if word.startswith("--")}
    if flags - {"--help"}:
        with pytest.MonkeyPatch.context() as patched:
            patched.setenv("COLUMNS", "1000")
            try:
                main([words[0], *action, "--help"])
            except SystemExit:
                pass
        assert {flag for flag in flags if flag not in capsys.readouterr().out} == set(), words


def stopping(read: Callable[..., Any]) -> Callable[..., Any]:
    def reading(*args: Any, **keywords: Any) -> None:
        read(*args, **keywords)
        raise Parsed

    return reading


def check_script(words: list[str]) -> None:
    if words[:1] == ["-m"]:
        stem = ROOT / words[1].replace(".", "/")
        files = [stem.with_suffix(".py"), stem / "__main__.py"]
        if words[1] in ("pip", "venv"):
            return
    else:
        files = [ROOT / word for word in words[:1]]
    found = [path for path in files if path.exists()]
    assert found, words
    for flag in (word.partition("=")[0] for word in words if word.startswith("--")):
        assert f'"{flag}"' in found[0].read_text(), f"{found[0]} takes no {flag}"


def anchors(page: Path) -> set[str]:
    """Of its headings, as GitHub and the site make them."""
    heads = re.findall(r"^#+ (.+)$", FENCE.sub("", page.read_text()), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", head.lower()).strip().replace(" ", "-") for head in heads}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    plain = re.sub(r"`[^`]*`", "", FENCE.sub("", page.read_text()))
    for target in re.findall(r"\]\(([^)\s]+)", plain):
        name, _, anchor = target.partition("#")
        if re.match(r"[a-z]+:", target):
            continue
        file = (page.parent / name).resolve() if name else page
        assert file.exists(), f"{page}: {target}"
        assert page.parent != DOCS or file.is_relative_to(DOCS), f"{target} is not on the site"
        assert not anchor or anchor in anchors(file), f"{page}: {target}"


def test_every_page_is_in_the_menu() -> None:
    nav = re.findall(r"[\w./]+\.md", yaml.safe_dump(yaml.safe_load(menu())["nav"]))
    assert sorted(nav) == sorted(path.name for path in DOCS.glob("*.md"))


def menu() -> str:
    return (ROOT / "mkdocs.yml").read_text()


def test_every_page_that_is_named_exists() -> None:
    files = [path for path in ROOT.rglob("*") if path.suffix in (".md", ".py", ".sh", ".yaml")]
    named = {
        name
        for path in files
        if not {".venv", ".venv-te", "runs", "build", ".git"} & set(path.parts)
        for name in re.findall(r"(?<![\w/-])docs/\w+\.md", path.read_text(errors="ignore"))
    }
    assert {name for name in named if not (ROOT / name).exists()} == set()


def test_the_options_are_those_of_the_code() -> None:
    spec = importlib.util.spec_from_file_location("page", ROOT / "tools" / "options_page.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    told = "python tools/options_page.py > docs/options.md"
    assert (DOCS / "options.md").read_text() == module.page(), told


@functools.cache
def tree(path: str) -> ast.Module:
    return ast.parse((ROOT / "megatron_vico" / path).read_text())


def test_every_cause_of_verify_has_its_row() -> None:
    text = (ROOT / "megatron_vico" / "shard_tools" / "shard_check.py").read_text()
    causes = re.findall(r'"(.+?)"', text.split("ProblemCause = Literal[")[1].split("]")[0])
    assert re.findall(r"^\| `([a-z ]+)` \|", (DOCS / "data.md").read_text(), re.MULTILINE) == causes


def test_every_figure_of_a_step_is_explained() -> None:
    (figures,) = [
        node
        for node in tree("training/metrics.py").body
        if isinstance(node, ast.ClassDef) and node.name == "StepFigures"
    ]
    names = [node.target.id for node in figures.body if isinstance(node, ast.AnnAssign)]
    page = (DOCS / "figures.md").read_text()
    tails = {name: f"`_{name.rpartition('_')[2]}`" for name in names}
    assert [name for name in names if f"`{name}`" not in page and tails[name] not in page] == []


def test_every_message_can_be_met() -> None:
    templates = []
    for path in (ROOT / "megatron_vico").rglob("*.py"):
        for node in ast.walk(tree(str(path.relative_to(ROOT / "megatron_vico")))):
            parts = node.values if isinstance(node, ast.JoinedStr) else [node]
            texts = [part.value if isinstance(part, ast.Constant) else None for part in parts]
            if sum(len(text) for text in texts if isinstance(text, str)) >= 25:
                templates.append([text for text in texts if text])
    blocks = [block for _, kind, block in FENCE.findall(troubles()) if kind == "text"]
    messages = [line for block in blocks for line in block.splitlines() if "Error: " in line]
    assert len(messages) > 10
    unknown = [message for message in messages if not any(fits(each, message) for each in templates)]
    assert unknown == []


def troubles() -> str:
    return (DOCS / "troubleshooting.md").read_text()


def fits(parts: list[Any], message: str) -> bool:
    """Whether the words of a message of the source stand in this one, in order."""
    at = 0
    for part in parts:
        found = message.find(str(part), at)
        if found < 0:
            return False
        at = found + len(str(part))
    return True
