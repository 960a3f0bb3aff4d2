"""No document says what is not so: command lines, make targets, extras, links and the tree are checked."""

import importlib
import re
import shlex
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
SHELL = {"sh", "bash", "shell", "console"}
LINK = re.compile(r"\]\((?!https?://|mailto:|#)([^)#\s]+)")
EXTRAS = re.compile(r"(?:linearsr|\.)\[([a-z,]+)\]")
VERB = re.compile(r"`linearsr ([a-z-]+)[ `]")
# Programs of others that are taken as they are; every other first word must be known below.
TRUSTED = re.compile(
    r"cd|cp|docker|export|git|helm|infra/images/build\.sh|kubectl|lint-imports|ls|mkdir|mypy|openssl|pip|pre-commit|promtool|pytest|python3?|ruff"
)
CLICK = {"ray": "ray.scripts.scripts:cli", "mlflow": "mlflow.cli:cli"}
FOLDERS = ("infra/", "pipelines/", "platform/", "tests/")


@pytest.fixture(scope="module")
def documents(texts: dict[Path, str]) -> dict[Path, str]:
    return {name: text for name, text in texts.items() if name.suffix == ".md"}


@pytest.fixture(scope="module")
def make_targets(root: Path) -> set[str]:
    return set(re.findall(r"^([a-z]+):.*## ", (root / "Makefile").read_text(), re.MULTILINE))


def _command_lines(text: str) -> Iterator[list[str]]:
    for language, block in FENCE.findall(text):
        if language not in SHELL:
            continue
        for line in block.replace("\\\n", " ").splitlines():
            words = shlex.split(line.removeprefix("$ "), comments=True)
            command: list[str] = []
            for word in [*words, "&&"]:
                if word in ("&&", "||", "|", ";", "&"):
                    yield from [command] if command else []
                    command = []
                elif command or not re.fullmatch(r"[A-Z_]+=.*", word):
                    command.append(word)


def _cli(program: str) -> Any:
    if program == "linearsr":
        main = importlib.import_module("typer.main")
        return main.get_command(importlib.import_module("linearsr_platform.cli.app").app)
    module, attribute = CLICK[program].split(":")
    return getattr(importlib.import_module(module), attribute)


def _parse(command: Any, words: list[str]) -> None:
    """Parse `words` as the command would and run nothing: unknown verbs and options, missing and extra arguments fail."""
    context = command.make_context(words[0], [], resilient_parsing=True)
    context.resilient_parsing = False
    values, rest, _ = command.make_parser(context).parse_args(words[1:])
    if hasattr(command, "get_command"):
        verb = command.get_command(context, rest[0]) if rest else None
        assert verb is not None or not rest, f"{words[0]} has no command {rest[0]!r}"
        if verb is not None:
            _parse(verb, rest)
        return
    given = {name for name, value in values.items() if isinstance(value, str | list | tuple) and value}
    assert {one.name for one in command.params if one.required} <= given, "missing arguments"
    assert rest == [], "extra arguments"


def _check(words: list[str], root: Path, make_targets: set[str]) -> None:
    program = words[0].removeprefix(".venv/bin/")
    if program == "make":
        assert {word for word in words[1:] if "=" not in word and not word.startswith("-")} <= make_targets
    elif program == "linearsr" or program in CLICK:
        _parse(_cli(program), [program, *words[1:]])
    else:
        assert TRUSTED.fullmatch(program), f"{program} is not checked by this test"
    ours = [word for word in words[1:] if word.startswith(FOLDERS) and "NAME" not in word]
    assert [word for word in ours if not (root / word).exists()] == []


def _tree(text: str) -> list[str]:
    """Paths in the first code block under `## Layout`: words before two spaces; indented ones are inside the folder above."""
    _, _, section = text.partition("\n## Layout\n")
    block = FENCE.search(section)
    assert block is not None, "README.md needs a code block under `## Layout`"
    paths, folder = [], ""
    for line in block.group(2).splitlines():
        names = re.split(r"\s{2,}", line.strip())[0].split()
        prefix = folder if line.startswith(" ") else ""
        if not prefix:
            folder = names[0] if names and names[0].endswith("/") else ""
        paths += [prefix + name for name in names]
    return paths


def test_every_command_line_parses(documents: dict[Path, str], root: Path, make_targets: set[str], subtests: pytest.Subtests) -> None:
    lines = [(name, words) for name, text in documents.items() for words in _command_lines(text)]
    assert {words[0] for name, words in lines if name == Path("README.md")} >= {"make", "linearsr"}
    for name, words in lines:
        with subtests.test(f"{name}: {shlex.join(words)}"):
            _check(words, root, make_targets)


@pytest.mark.parametrize("line", ["linearsr run", "linearsr run a b c d", "linearsr fly", "linearsr run --no-such-option a"])
def test_the_parser_refuses_what_the_command_line_would_refuse(line: str) -> None:
    usage_errors = (AssertionError, importlib.import_module("typer._click.exceptions").UsageError)
    with pytest.raises(usage_errors):
        _parse(_cli("linearsr"), line.split())


def test_the_readme_lists_every_verb_and_only_those(documents: dict[Path, str]) -> None:
    command = _cli("linearsr")
    verbs = set(command.list_commands(command.make_context("linearsr", [], resilient_parsing=True)))
    assert set(VERB.findall(documents[Path("README.md")])) == verbs


def test_the_readme_tree_is_the_real_one(documents: dict[Path, str], root: Path, files: list[Path]) -> None:
    paths = _tree(documents[Path("README.md")])
    assert [path for path in paths if not (root / path).exists()] == []
    folders = {f"{name.parts[0]}/" for name in files if len(name.parts) > 1 and not name.parts[0].startswith(".")}
    assert folders <= set(paths)


def test_the_platform_readme_maps_every_package(documents: dict[Path, str], files: list[Path]) -> None:
    packages = {name.parts[2] for name in files if name.parts[:2] == ("platform", "linearsr_platform") and len(name.parts) > 3}
    text = documents[Path("platform/README.md")]
    assert {name for name in packages if f"`{name}/`" not in text} == set()


def test_every_relative_link_leads_somewhere(documents: dict[Path, str], root: Path) -> None:
    links = [(name, link) for name, text in documents.items() for link in LINK.findall(text)]
    assert [f"{name}: {link}" for name, link in links if not (root / name.parent / link).exists()] == []


def test_every_extra_that_is_named_exists(texts: dict[Path, str], root: Path) -> None:
    extras = set(tomllib.loads((root / "pyproject.toml").read_text())["project"]["optional-dependencies"])
    named = {extra for text in texts.values() for group in EXTRAS.findall(text) for extra in group.split(",")}
    assert {"platform", "metrics"} <= named
    assert named - extras == set()
