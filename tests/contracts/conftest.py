"""What the contract tests look at: the files of the repository and the syntax trees of both packages."""

import ast
import subprocess
from pathlib import Path

import pytest

NOT_OURS = {".git", ".venv", "__pycache__", "build", "dist", "runs", "mlruns"}


@pytest.fixture(scope="session")
def files(root: Path) -> list[Path]:
    """Every file that git tracks or would track, relative to the root; without git, every file but caches."""
    git = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"], cwd=root, capture_output=True, text=True, check=False
    )
    names = [Path(name) for name in git.stdout.split("\0") if name] if git.returncode == 0 else []
    if not names:
        names = [path.relative_to(root) for path in root.rglob("*")]
        names = [name for name in names if not NOT_OURS & set(name.parts) and not any(part.endswith("_cache") for part in name.parts)]
    return sorted(name for name in names if (root / name).is_file())


@pytest.fixture(scope="session")
def texts(root: Path, files: list[Path]) -> dict[Path, str]:
    """Content of every text file, by path relative to the root."""
    found = {}
    for name in files:
        content = (root / name).read_bytes()
        if b"\0" not in content:
            found[name] = content.decode()
    return found


@pytest.fixture(scope="session")
def modules(texts: dict[Path, str]) -> dict[Path, ast.Module]:
    """Syntax tree of every module of both packages."""
    packages = ("linearsr", "platform")
    found = {name: ast.parse(text, str(name)) for name, text in texts.items() if name.suffix == ".py" and name.parts[0] in packages}
    assert found
    return found
