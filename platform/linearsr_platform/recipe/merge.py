"""Layers of settings on top of each other: the recipe, a profile, then each `--set`, remembering where each value came from."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from linearsr_platform.errors import RecipeProblem
from linearsr_platform.recipe.document import KeyPath, parse_document


@dataclass(frozen=True)
class Layer:
    """Settings from one place."""

    file: str
    """How errors name the place."""
    settings: dict[str, object]
    lines: dict[KeyPath, int] = field(default_factory=dict)
    """Line of each key; empty for a `--set`."""
    assigned: KeyPath | None = None
    """Key that a `--set` assigns: a mapping given for it takes the place of what was there."""

    def origin(self, path: KeyPath) -> str:
        """Name the place of a key in this layer."""
        return f"{self.file}:{self.lines[path]}" if path in self.lines else self.file


@dataclass
class Merged:
    """Layers merged into one tree."""

    settings: dict[str, object] = field(default_factory=dict)
    origins: dict[KeyPath, str] = field(default_factory=dict)
    """Where each value was written; a section belongs to the first layer that has it."""

    def add(self, layer: Layer) -> None:
        """Put a layer on top: sections merge key by key, everything else is replaced, and so is the section a `--set` assigns."""
        self.origins.setdefault((), layer.file)
        self._merge(self.settings, layer.settings, (), layer)

    def origin(self, path: KeyPath) -> str:
        """Name where the value at a path, or the nearest section around it, was written."""
        while path not in self.origins:
            path = path[:-1]
        return self.origins[path]

    def value(self, path: KeyPath) -> object:
        """Return the value at a path; None if there is none."""
        found: object = self.settings
        for part in path:
            if isinstance(found, dict):
                found = found.get(part)
            elif isinstance(found, list) and isinstance(part, int) and part < len(found):
                found = found[part]
            else:
                return None
        return found

    def _merge(self, target: dict[str, object], source: dict[str, object], path: KeyPath, layer: Layer) -> None:
        for key, value in source.items():
            inner = (*path, key)
            present = target.get(key)
            if not isinstance(value, dict):
                self._forget(inner)
                target[key] = value
                self._note(value, inner, layer)
                continue
            if not isinstance(present, dict) or inner == layer.assigned:
                self._forget(inner)
                present = target[key] = {}
                self.origins[inner] = layer.origin(inner)
            self._merge(present, value, inner, layer)

    def _note(self, value: object, path: KeyPath, layer: Layer) -> None:
        self.origins[path] = layer.origin(path)
        for index, entry in enumerate(value if isinstance(value, list) else ()):
            self._note(entry, (*path, index), layer)

    def _forget(self, path: KeyPath) -> None:
        for known in [known for known in self.origins if known[: len(path)] == path]:
            del self.origins[known]


def override_layers(overrides: Sequence[str]) -> tuple[list[Layer], list[RecipeProblem]]:
    """Turn `a.b=c` texts, `c` being YAML, into layers; what cannot be read comes back as problems."""
    layers: list[Layer] = []
    problems: list[RecipeProblem] = []
    for override in overrides:
        file = f"--set {override}"
        key, equals, text = override.partition("=")
        parts = key.strip().split(".")
        if not equals or not all(parts):
            problems.append(RecipeProblem(file=file, key="", value="", rule="expected KEY=VALUE with a dotted key, as in pretrain.lr=1e-4"))
            continue
        document = parse_document(text, file)
        if document.problems:
            problem = document.problems[0]
            rule = problem.rule if problem.value == "" else f"the value must be {problem.rule}"
            problems.append(RecipeProblem(file=file, key=key, value="", rule=rule, fix="put quotes around the value"))
            continue
        settings: object = document.value
        for part in reversed(parts):
            settings = {part: settings}
        if isinstance(settings, dict):
            layers.append(Layer(file, settings, assigned=tuple(parts)))
    return layers, problems
