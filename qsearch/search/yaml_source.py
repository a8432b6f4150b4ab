"""A YAML file together with the line every key stands on, so that errors can point at it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from qsearch.errors import SpaceError

__all__ = ["YamlSource", "read_yaml"]

Location = tuple[str | int, ...]


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
        SpaceError: The file cannot be read, is not YAML, holds a key twice or is not a mapping.
    """
    try:
        text = path.read_text(encoding="utf-8")
        root = yaml.compose(text, Loader=yaml.SafeLoader)
        data = yaml.safe_load(text)
    except OSError as error:
        raise SpaceError(
            f"cannot read search space {path}: {error.strerror}; give --space a file or the name of a preset"
        ) from error
    except UnicodeDecodeError as error:
        raise SpaceError(f"{path} is not a text file in UTF-8; a search space is a YAML file") from error
    except (yaml.YAMLError, RecursionError) as error:
        raise SpaceError(f"{path}{_mark(error)}: not valid YAML: {_problem(error)}") from error
    source = YamlSource(path, data if isinstance(data, dict) else {})
    if not isinstance(data, dict):
        raise SpaceError(f"{path}: expected a mapping of keys such as 'version: 1', got {type(data).__name__}")
    _record_lines(root, (), source)
    return source


def _record_lines(node: yaml.Node | None, location: Location, source: YamlSource) -> None:
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            here = (*location, key.value)
            line = key.start_mark.line + 1
            # YAML keeps the last of two equal keys without a word; the first would be lost.
            if here in source.lines:
                raise SpaceError(
                    f"{source.path}, line {line}: key {key.value!r} was given on line {source.lines[here]} already; remove one"
                )
            source.lines[here] = line
            _record_lines(value, here, source)
    elif isinstance(node, yaml.SequenceNode):
        for index, value in enumerate(node.value):
            source.lines[(*location, index)] = value.start_mark.line + 1
            _record_lines(value, (*location, index), source)


def _mark(error: Exception) -> str:
    mark = getattr(error, "problem_mark", None)
    return "" if mark is None else f", line {mark.line + 1}, column {mark.column + 1}"


def _problem(error: Exception) -> str:
    return getattr(error, "problem", None) or type(error).__name__
