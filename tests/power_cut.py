"""What a disk may hold after a power cut: a folder is watched at work, then the states that a cut could leave are made.

The model is that of a file system that keeps its names in order and promises nothing else: names that were changed last may
be lost, but for what `fsync` of their folder has reached; and of what was written to a file and not synced, all, half, nothing
or only the length may be there.
"""

from __future__ import annotations

import os
import random
import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

OPERATIONS = ("fsync", "replace", "rename", "unlink", "remove", "mkdir", "rmdir")
LOSSES: tuple[Callable[[bytes], bytes], ...] = (
    lambda content: content,
    lambda content: b"",
    lambda content: bytes(len(content)),
    lambda content: content[: len(content) // 2],
)
# Path -> content; None for a folder.
Tree = dict[str, bytes | None]


@dataclass
class Moment:
    """The folder after one operation: path -> which file it names, its content now, what of it is on the disk for certain."""

    names: dict[str, int]
    contents: dict[int, bytes | None]
    synced: dict[int, bytes | None]
    # The last moment whose names are on the disk for certain.
    least: int


@dataclass
class Journal:
    """Everything that happened to a folder."""

    root: Path
    moments: list[Moment] = field(default_factory=list)
    # Number of a file system's file or folder -> ours: theirs are used again.
    numbers: dict[int, int] = field(default_factory=dict)
    files: int = 0

    def look(self) -> None:
        """Add moments for what has changed since the last look, one for each new file in the order of their writing."""
        names, contents, new = dict[str, int](), dict[int, bytes | None](), list[tuple[int, str]]()
        before = self.moments[-1] if self.moments else Moment({}, {}, {}, 0)
        found = {str(path.relative_to(self.root)): path for path in sorted(self.root.rglob("*"))}
        stats = {name: path.stat() for name, path in found.items()}
        present = {one.st_ino for one in stats.values()}
        self.numbers = {theirs: ours for theirs, ours in self.numbers.items() if theirs in present}
        for name, stat in stats.items():
            if stat.st_ino not in self.numbers:
                self.files += 1
                self.numbers[stat.st_ino] = self.files
                new.append((stat.st_mtime_ns, name))
            names[name] = self.numbers[stat.st_ino]
            contents[names[name]] = None if found[name].is_dir() else found[name].read_bytes()
        contents = before.contents | contents
        if names == before.names and contents == before.contents:
            return
        shown = {name: number for name, number in names.items() if name not in {name for _, name in new}}
        for _, name in sorted(new)[:-1]:
            shown = shown | {name: names[name]}
            self.moments.append(Moment(shown, contents, before.synced, before.least))
        self.moments.append(Moment(names, contents, before.synced, before.least))

    def sync(self, descriptor: int) -> None:
        """Note that a file or folder was synced."""
        path = Path(os.readlink(f"/proc/self/fd/{descriptor}"))
        if not self.moments or path != self.root and self.root not in path.parents:
            return
        now = self.moments[-1]
        if not path.is_dir():
            number = now.names[str(path.relative_to(self.root))]
            synced = now.synced | {number: now.contents[number]}
            self.moments.append(Moment(now.names, now.contents, synced, now.least))
            return
        inside = [self._inside(moment, path) for moment in self.moments]
        least = max([now.least, *(i for i in range(1, len(inside)) if inside[i] != inside[i - 1])])
        self.moments.append(Moment(now.names, now.contents, now.synced, least))

    def _inside(self, moment: Moment, folder: Path) -> dict[str, int]:
        return {name: number for name, number in moment.names.items() if (self.root / name).parent == folder}

    def states(self) -> Iterator[tuple[int, Tree]]:
        """What a cut can leave, every tree once: after how many moments at the earliest, and the tree."""
        seen = set()
        for at in range(len(self.moments)):
            for tree in self.after(at):
                key = hash(frozenset(tree.items()))
                if key not in seen:
                    seen.add(key)
                    yield at, tree

    def after(self, at: int) -> Iterator[Tree]:
        """What a cut after so many moments can leave."""
        now = self.moments[at]
        for names in (moment.names for moment in self.moments[now.least : at + 1]):
            for loss in LOSSES:
                yield {name: self._content(now, number, loss) for name, number in names.items()}

    @property
    def last(self) -> list[Tree]:
        """What a cut can leave once everything is done."""
        return list(self.after(len(self.moments) - 1))

    @staticmethod
    def _content(now: Moment, number: int, loss: Callable[[bytes], bytes]) -> bytes | None:
        content = now.contents[number]
        return content if content is None or now.synced.get(number) == content else loss(content)


@contextmanager
def watched(root: Path) -> Iterator[Journal]:
    """Write down what the block does to a folder."""
    journal = Journal(root)
    journal.look()
    if journal.moments:
        # What was there before is on the disk.
        first = journal.moments[-1]
        journal.moments = [Moment(first.names, first.contents, dict(first.contents), 0)]
    else:
        journal.moments = [Moment({}, {}, {}, 0)]

    def watching(name: str) -> Callable[..., Any]:
        real = getattr(os, name)

        def run(*arguments: Any, **options: Any) -> Any:
            journal.look()
            if name == "fsync":
                journal.sync(arguments[0])
            result = real(*arguments, **options)
            journal.look()
            return result

        return run

    with ExitStack() as stack:
        for name in OPERATIONS:
            stack.enter_context(mock.patch.object(os, name, watching(name)))
        yield journal
        journal.look()


def some(states: Iterator[tuple[int, Tree]], count: int, seed: int = 0) -> list[tuple[int, Tree]]:
    """So many of the states, drawn at random, in order."""
    found = list(states)
    drawn = random.Random(seed).sample(range(len(found)), min(count, len(found)))
    return [found[index] for index in sorted(drawn)]


def make(tree: Tree, folder: Path) -> Path:
    """Write a tree to a folder, in place of what is there."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    for name, content in sorted(tree.items()):
        if content is None:
            (folder / name).mkdir(exist_ok=True)
        else:
            (folder / name).write_bytes(content)
    return folder
