"""YAML as recipes use it: the core schema of YAML 1.2 and the merge key `<<`, with the line of every key and without surprises.

PyYAML follows YAML 1.1, where `1e-4` is text, `no` is false, `2024-01-01` is a date and a repeated key silently wins.
"""

import math
import re
from collections.abc import Hashable
from dataclasses import dataclass, field

import yaml

from linearsr_platform.errors import RecipeProblem

KeyPath = tuple[str | int, ...]
"""Keys and list positions from the root of a document to a value."""

_TAG = "tag:yaml.org,2002:"
_MERGE = "<<"
"""Key whose mapping, or list of mappings, gives what its own mapping does not say (https://yaml.org/type/merge.html)."""
_DEEPEST = 50
"""Sections and lists around a value; the deepest setting has five."""
_MOST_VALUES = 100_000
"""Values of a document, aliases written out: a few lines of aliases of aliases would fill any memory."""


class _CoreLoader(yaml.SafeLoader):
    """Resolves plain scalars by the core schema of YAML 1.2, less infinity and NaN."""

    yaml_implicit_resolvers = {}  # noqa: RUF012 - PyYAML declares it on the instance, reads it from the class


_CoreLoader.add_implicit_resolver(f"{_TAG}null", re.compile(r"^(?:~|null|Null|NULL|)$"), ["~", "n", "N", ""])
_CoreLoader.add_implicit_resolver(f"{_TAG}bool", re.compile(r"^(?:true|True|TRUE|false|False|FALSE)$"), list("tTfF"))
_CoreLoader.add_implicit_resolver(f"{_TAG}int", re.compile(r"^[-+]?[0-9]+$"), list("-+0123456789"))
_CoreLoader.add_implicit_resolver(
    f"{_TAG}float", re.compile(r"^[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?$"), list("-+.0123456789")
)


class _CoreDumper(yaml.SafeDumper):
    """Quotes every text that the loader would take for something else: to PyYAML's own, `0801` is no number and needs no quotes."""

    yaml_implicit_resolvers = _CoreLoader.yaml_implicit_resolvers


def write_document(value: object) -> str:
    """Write plain values as YAML that `parse_document` reads back as they are."""
    # With what is not ASCII escaped: PyYAML folds the line breaks of Unicode away where it writes them as they are.
    return yaml.dump(value, Dumper=_CoreDumper, sort_keys=False)


@dataclass
class Document:
    """A parsed document."""

    value: object = None
    """Dicts, lists and scalars; keys are text."""
    lines: dict[KeyPath, int] = field(default_factory=dict)
    """Line, from 1, on which each key or list entry starts."""
    problems: list[RecipeProblem] = field(default_factory=list)
    """Syntax errors and repeated keys."""


def parse_document(text: str, file: str) -> Document:
    """Parse one YAML document; what is wrong with it is in `problems`, never raised.

    Args:
        text: the document.
        file: how problems name it.
    """
    document = Document()
    try:
        node = _CoreLoader(text).get_single_node()
        if node is not None:
            document.value = _Builder(file, document).build(node, (), ())
    except RecursionError:
        rule = f"this is not valid YAML: lists and mappings are nested too deep; expected at most {_DEEPEST} levels"
        document.problems.append(RecipeProblem(file=file, key="", value="", rule=rule))
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = f":{mark.line + 1}" if mark else ""
        reason = ", ".join(part for part in (error.context, error.problem) if part)
        document.problems.append(RecipeProblem(file=f"{file}{line}", key="", value="", rule=f"this is not valid YAML: {reason}"))
    except yaml.YAMLError as error:
        document.problems.append(RecipeProblem(file=file, key="", value="", rule=f"this is not valid YAML: {' '.join(str(error).split())}"))
    return document


def dotted(path: KeyPath) -> str:
    """Write a path as users do: `experts.boundaries[1]`."""
    text = ""
    for part in path:
        text += f"[{part}]" if isinstance(part, int) else f".{part}" if text else part
    return text


class _Builder:
    """Turns a node graph into plain values, noting lines and problems in the document."""

    def __init__(self, file: str, document: Document) -> None:
        self._file = file
        self._document = document
        self._inherited: dict[int, list[tuple[yaml.Node, yaml.Node]]] = {}
        self._num_inherited = 0

    def build(self, node: yaml.Node, path: KeyPath, parents: tuple[Hashable, ...]) -> object:
        """Build the value of a node; `parents` are the nodes around it, by identity.

        Raises:
            yaml.MarkedYAMLError: if values lie too deep, or are too many.
        """
        self._document.lines.setdefault(path, node.start_mark.line + 1)
        self._limit(node, len(parents), len(self._document.lines))
        if id(node) in parents:
            return self._refuse(node, path, "a value that does not contain itself")
        inside = (*parents, id(node))
        if isinstance(node, yaml.MappingNode):
            return self._mapping(node, path, inside)
        if isinstance(node, yaml.SequenceNode):
            return [self.build(child, (*path, index), inside) for index, child in enumerate(node.value)]
        return self._scalar(node, path)

    def _mapping(self, node: yaml.MappingNode, path: KeyPath, parents: tuple[Hashable, ...]) -> dict[str, object]:
        result: dict[str, object] = {}
        for key_node, child in self._entries(node, path, parents):
            if not isinstance(key_node, yaml.ScalarNode):
                self._refuse(key_node, path, "keys that are plain words")
                continue
            key = self._text(key_node, path)
            inner = (*path, key)
            line = key_node.start_mark.line + 1
            if key in result:
                rule = f"this key is already on line {self._document.lines[inner]}; keys may not repeat"
                self._document.problems.append(
                    RecipeProblem(file=f"{self._file}:{line}", key=dotted(inner), value="", rule=rule, fix="keep one of the two")
                )
                continue
            self._document.lines[inner] = line
            result[key] = self.build(child, inner, parents)
        return result

    def _entries(self, node: yaml.MappingNode, path: KeyPath, parents: tuple[Hashable, ...]) -> list[tuple[yaml.Node, yaml.Node]]:
        """List a mapping's keys and values: its own, then those of its merge keys that it lacks; of two mappings the first has them."""
        entries = [(key, value) for key, value in node.value if not _is_merge(key)]
        taken = {key.value for key, _ in entries if isinstance(key, yaml.ScalarNode)}
        for value in [value for key, value in node.value if _is_merge(key)]:
            for section in value.value if isinstance(value, yaml.SequenceNode) else [value]:
                inherited = self._inherit(section, path, parents)
                entries += [entry for entry in inherited if entry[0].value not in taken]
                taken |= {key.value for key, _ in inherited}
        return entries

    def _inherit(self, section: yaml.Node, path: KeyPath, parents: tuple[Hashable, ...]) -> list[tuple[yaml.Node, yaml.Node]]:
        if not isinstance(section, yaml.MappingNode) or id(section) in parents:
            self._refuse(section, (*path, _MERGE), "a mapping, or a list of mappings, that this one is no part of")
            return []
        self._limit(section, len(parents), self._num_inherited)
        if id(section) not in self._inherited:
            entries = self._entries(section, path, (*parents, id(section)))
            self._inherited[id(section)] = [(key, value) for key, value in entries if isinstance(key, yaml.ScalarNode)]
        inherited = self._inherited[id(section)]
        self._num_inherited += len(inherited)
        return inherited

    def _limit(self, node: yaml.Node, depth: int, values: int) -> None:
        if depth > _DEEPEST or values > _MOST_VALUES:
            rule = f"lists and mappings are nested too deep or repeated too often; expected {_DEEPEST} levels and {_MOST_VALUES} values"
            raise yaml.MarkedYAMLError(problem=f"{rule} at most", problem_mark=node.start_mark)

    def _scalar(self, node: yaml.Node, path: KeyPath) -> object:
        text, kind = str(node.value), node.tag.removeprefix(_TAG)
        if kind == "str":
            return self._text(node, path)
        if kind == "null":
            return None
        if kind == "bool" and text.lower() in ("true", "false"):
            return text.lower() == "true"
        if kind in ("int", "float"):
            try:
                number = int(text) if kind == "int" else float(text)
                finite = math.isfinite(number)
            except ValueError:
                return self._refuse(node, path, f"text that reads as {kind}")
            except OverflowError:
                finite = False
            return number if finite else self._refuse(node, path, "a finite number")
        return self._refuse(node, path, "a value without a YAML tag")

    def _text(self, node: yaml.Node, path: KeyPath) -> str:
        r"""Return the text of a scalar; `\ud800` and the like are halves of a character, and no file, JSON or screen takes them."""
        text = str(node.value)
        if any("\ud800" <= letter <= "\udfff" for letter in text):
            return self._refuse(node, path, "text of whole characters")
        return text

    def _refuse(self, node: yaml.Node, path: KeyPath, rule: str) -> str:
        """Note a problem and return the text that stands for the value."""
        file = f"{self._file}:{node.start_mark.line + 1}"
        value = str(node.value) if isinstance(node, yaml.ScalarNode) else "a list or mapping"
        value = value.encode("utf-8", "backslashreplace").decode("utf-8")
        self._document.problems.append(RecipeProblem(file=file, key=dotted(path), value=value, rule=rule))
        return value


def _is_merge(key: yaml.Node) -> bool:
    return isinstance(key, yaml.ScalarNode) and key.value == _MERGE and key.style is None
