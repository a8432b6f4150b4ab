"""A YAML file together with the line every key stands on, so that errors can point at it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from qsearch.bounded import read_file, shortened
from qsearch.errors import SpaceError

__all__ = ["YamlSource", "read_yaml"]

Location = tuple[str | int, ...]
# PyYAML reads some hundred thousand bytes in a second.
MOST_BYTES = 1 << 18
# With every alias written out: they multiply.
MOST_NODES, MOST_DEPTH = 50_000, 20
# Of a key or a value; a number that is written 1:1:1:... takes long to add up.
MOST_TEXT = 1000


@dataclass(frozen=True)
class YamlSource:
    """What a YAML file holds.

    Attributes:
        path: The file.
        data: Its content as plain types.
        lines: Location of a key or list entry -> line, counted from 1.
    """

    path: Path
    data: dict[str, Any]
    lines: dict[Location, int] = field(default_factory=dict)

    def error(self, location: Sequence[str | int], message: str) -> SpaceError:
        """A SpaceError that names the file and the nearest line known for `location`."""
        return SpaceError(f"{self.place(location)}: {message}")

    def place(self, location: Sequence[str | int]) -> str:
        """'file, line n' of the deepest part of `location` that the file holds."""
        for depth in range(len(location), 0, -1):
            line = self.lines.get(tuple(location[:depth]))
            if line is not None:
                return f"{self.path}, line {line}"
        return str(self.path)


def read_yaml(path: Path) -> YamlSource:
    """Read a YAML file whose top level is a mapping.

    Args:
        path: The file.

    Returns:
        Its content and the lines of its keys.

    Raises:
        SpaceError: The file cannot be read, is not YAML, holds a key twice, is not a mapping, or is too large.
    """
    try:
        loader = yaml.SafeLoader(read_file(path, MOST_BYTES).decode("utf-8"))
        root = loader.get_single_node()
        _count_nodes(root, 0, 0)
        # Before it is constructed, which writes merged mappings into the nodes.
        lines = _lines(path, root)
        data = None if root is None else loader.construct_document(root)
    except OSError as error:
        raise SpaceError(
            f"cannot read search space {path}: {error.strerror}; give --space a file or the name of a preset"
        ) from error
    except UnicodeDecodeError as error:
        raise SpaceError(f"{path} is not a text file in UTF-8; a search space is a YAML file") from error
    except (yaml.YAMLError, RecursionError) as error:
        raise SpaceError(f"{path}{_mark(error)}: not valid YAML: {_problem(error)}") from error
    except ValueError as error:  # also what is written like a date or a number and is none
        raise SpaceError(f"{path}: {error}; a search space is a YAML file of a few hundred lines") from error
    if not isinstance(data, dict):
        raise SpaceError(f"{path}: expected a mapping of keys such as 'version: 1', got {type(data).__name__}")
    return YamlSource(path, data, lines)


def _count_nodes(node: yaml.Node | None, depth: int, counted: int) -> int:
    """How many nodes there are with those below this one, aliases written out.

    Raises:
        ValueError: They are too many, or nested too deeply.
    """
    inner = [] if node is None else node.value
    if isinstance(node, yaml.MappingNode):
        inner = [one for pair in inner for one in pair]
    counted += 1
    if counted > MOST_NODES or depth > MOST_DEPTH:
        raise ValueError(f"it holds more than {MOST_NODES:,} values, or nests them more than {MOST_DEPTH} deep")
    if isinstance(node, yaml.ScalarNode) and len(node.value) > MOST_TEXT:
        raise ValueError(
            f"line {node.start_mark.line + 1} holds a text of {len(node.value):,} characters, at most {MOST_TEXT:,} are read"
        )
    for one in inner if isinstance(node, yaml.CollectionNode) else ():
        counted = _count_nodes(one, depth + 1, counted)
    return counted


def _lines(path: Path, root: yaml.Node | None) -> dict[Location, int]:
    """The line of every key and list entry."""
    lines: dict[Location, int] = {}

    def record(node: yaml.Node | None, location: Location) -> None:
        if isinstance(node, yaml.MappingNode):
            for key, value in node.value:
                line = key.start_mark.line + 1
                if not isinstance(key, yaml.ScalarNode):
                    raise SpaceError(f"{path}, line {line}: a key must be a word")
                here = (*location, key.value)
                # YAML keeps the last of two equal keys without a word; the first would be lost.
                if here in lines:
                    name = shortened(key.value)
                    raise SpaceError(f"{path}, line {line}: key {name} was given on line {lines[here]} already; remove one")
                lines[here] = line
                record(value, here)
        elif isinstance(node, yaml.SequenceNode):
            for index, value in enumerate(node.value):
                lines[(*location, index)] = value.start_mark.line + 1
                record(value, (*location, index))

    record(root, ())
    return lines


def _mark(error: Exception) -> str:
    mark = getattr(error, "problem_mark", None)
    return "" if mark is None else f", line {mark.line + 1}, column {mark.column + 1}"


def _problem(error: Exception) -> str:
    return getattr(error, "problem", None) or type(error).__name__
