"""Everything public says what it does and what it takes."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

Function = ast.FunctionDef | ast.AsyncFunctionDef
LOGIC = (ast.If, ast.For, ast.While, ast.With, ast.Try, ast.Raise, ast.Match)


def _is_public(node: Function) -> bool:
    if node.name == "__init__":
        return any(isinstance(part, LOGIC) for part in ast.walk(node))
    return not node.name.startswith("_")


def _is_overload(node: Function) -> bool:
    return any(ast.unparse(decorator).rsplit(".", 1)[-1] == "overload" for decorator in node.decorator_list)


def _public(body: list[ast.stmt], prefix: str = "") -> Iterator[tuple[str, ast.ClassDef | Function]]:
    for node in body:
        if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
            yield prefix + node.name, node
            yield from _public(node.body, f"{prefix}{node.name}.")
        elif isinstance(node, Function) and _is_public(node) and not _is_overload(node):
            yield prefix + node.name, node


def _undocumented(tree: ast.Module) -> list[str]:
    found = [] if ast.get_docstring(tree) else ["module"]
    return found + [name for name, node in _public(tree.body) if not ast.get_docstring(node)]


def _untyped(tree: ast.Module) -> list[str]:
    found = []
    for name, node in _public(tree.body):
        if isinstance(node, ast.ClassDef):
            continue
        arguments = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs, node.args.vararg, node.args.kwarg]
        missing = [one.arg for one in arguments if one is not None and one.annotation is None and one.arg not in ("self", "cls")]
        if missing or node.returns is None:
            found.append(f"{name}({', '.join(missing)}) -> {'typed' if node.returns else 'untyped'}")
    return found


def test_everything_public_has_a_docstring(modules: dict[Path, ast.Module]) -> None:
    assert [f"{name}: {what}" for name, tree in modules.items() for what in _undocumented(tree)] == []


def test_everything_public_is_annotated(modules: dict[Path, ast.Module]) -> None:
    assert [f"{name}: {what}" for name, tree in modules.items() for what in _untyped(tree)] == []


@pytest.mark.parametrize(
    ("source", "undocumented"),
    [
        ("def f(): ...", ["module", "f"]),
        ('"""M."""\nclass A:\n    def g(self): ...\n    def _h(self): ...', ["A", "A.g"]),
        ('"""M."""\nclass A:\n    """A."""\n    def __init__(self):\n        self.x = 1', []),
        ('"""M."""\nclass A:\n    """A."""\n    def __init__(self, x):\n        if x: raise ValueError(x)', ["A.__init__"]),
    ],
)
def test_the_measure_sees_what_is_missing(source: str, undocumented: list[str]) -> None:
    assert _undocumented(ast.parse(source)) == undocumented
