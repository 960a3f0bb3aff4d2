"""What neither package may contain, also where a linter's rule was switched off for a line."""

import ast
import re
from pathlib import Path

import pytest

BROAD = {"Exception", "BaseException"}
UNFINISHED = re.compile(r"\b(?:TODO|FIXME|XXX|HACK)\b")
BARE_IGNORE = re.compile(r"#\s*(?:type:\s*ignore|noqa)(?!\s*[\[:])")
CLI = Path("platform/linearsr_platform/cli")
SESSION = Path("platform/linearsr_platform/cluster/session.py")


def _broad_except(node: ast.AST) -> bool:
    if not isinstance(node, ast.ExceptHandler):
        return False
    if node.type is None:
        return True
    caught = node.type.elts if isinstance(node.type, ast.Tuple) else [node.type]
    return any(ast.unparse(one).rsplit(".", 1)[-1] in BROAD for one in caught)


def _environment(node: ast.AST) -> bool:
    return isinstance(node, ast.Attribute) and ast.unparse(node) in ("os.environ", "os.getenv", "os.putenv")


def _call_of(node: ast.AST, *names: str) -> bool:
    return isinstance(node, ast.Call) and ast.unparse(node.func) in names


def _not_implemented(node: ast.AST) -> bool:
    return isinstance(node, ast.Name) and node.id == "NotImplementedError"


def _forbidden(name: Path, tree: ast.Module) -> list[str]:
    in_cli = CLI in name.parents
    found = []
    for node in ast.walk(tree):
        rules = {
            "changes a global": isinstance(node, ast.Global),
            "catches everything": _broad_except(node),
            "is not implemented": _not_implemented(node),
            "prints outside cli/": _call_of(node, "print") and not in_cli,
            "ends the process outside cli/": _call_of(node, "exit", "quit", "sys.exit", "os._exit") and not in_cli,
            "touches the environment outside cli/ and cluster/session.py": _environment(node) and not in_cli and name != SESSION,
        }
        found += [f"{name}:{getattr(node, 'lineno', 0)}: {rule}" for rule, broken in rules.items() if broken]
    return found


def test_no_forbidden_construct(modules: dict[Path, ast.Module]) -> None:
    assert [line for name, tree in modules.items() for line in _forbidden(name, tree)] == []


def test_nothing_is_unfinished_or_silenced_without_a_code(modules: dict[Path, ast.Module], texts: dict[Path, str]) -> None:
    found = [
        f"{name}:{number}: {line.strip()}"
        for name in modules
        for number, line in enumerate(texts[name].splitlines(), start=1)
        if UNFINISHED.search(line) or BARE_IGNORE.search(line)
    ]
    assert found == []


def test_modules_are_named_after_a_concern(modules: dict[Path, ast.Module]) -> None:
    assert [str(name) for name in modules if name.stem in {"utils", "util", "common", "helpers", "misc"}] == []


@pytest.mark.parametrize(
    "source",
    [
        "try:\n    f()\nexcept:\n    pass",
        "try:\n    f()\nexcept (ValueError, Exception):\n    pass",
        "def f():\n    global x",
        "print(1)",
        "import os\nx = os.environ.get('A')",
        "def f():\n    raise NotImplementedError",
        "import sys\nsys.exit(1)",
    ],
)
def test_the_measure_sees_each_construct(source: str) -> None:
    assert len(_forbidden(Path("linearsr/some.py"), ast.parse(source))) == 1
