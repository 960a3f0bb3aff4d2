"""Files and functions stay small enough to be read in one go."""

import ast
from pathlib import Path

MAX_FILE_LINES = 400
MAX_FUNCTION_LINES = 60
MAX_INIT_LINES = 40


def _too_long(name: Path, tree: ast.Module) -> list[str]:
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            lines = (node.end_lineno or node.lineno) - node.lineno + 1
            limit = MAX_INIT_LINES if node.name == "__init__" else MAX_FUNCTION_LINES
            if lines > limit:
                found.append(f"{name}:{node.lineno}: {node.name} has {lines} lines; at most {limit}")
    return found


def test_files_are_short(texts: dict[Path, str]) -> None:
    lines = {str(name): text.count("\n") for name, text in texts.items() if name.suffix == ".py"}
    assert {name: count for name, count in lines.items() if count > MAX_FILE_LINES} == {}


def test_functions_are_short(texts: dict[Path, str]) -> None:
    trees = {name: ast.parse(text) for name, text in texts.items() if name.suffix == ".py"}
    assert [line for name, tree in trees.items() for line in _too_long(name, tree)] == []


def test_the_measure_sees_a_long_function() -> None:
    body = "\n".join(["def f():", *["    x = 1"] * MAX_FUNCTION_LINES])
    assert len(_too_long(Path("long.py"), ast.parse(body))) == 1
