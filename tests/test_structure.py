"""The structure of the package: imports go one way, exports exist, files stay readable."""

import ast
import importlib
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent / "qsearch"
# A room may import itself and those before it.
ROOMS = [
    "__init__",
    "errors",
    "bounded",
    "seal",
    "whole_files",
    "qtype",
    "config",
    "data",
    "models",
    "calibrate",
    "quantize",
    "kernels",
    "build",
    "measure",
    "search",
    "export",
    "report",
    "adapt",
    "qat",
    "session",
    "commands",
]
# report and export both stand on search and may not know each other; report's documents are the search's records.
FILES = sorted(ROOT.rglob("*.py"))


def room_of(path: Path) -> str:
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


def imported_rooms(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom) and node.module:
            names = [node.module] if node.module != "qsearch" else [f"qsearch.{alias.name}" for alias in node.names]
        found |= {name.split(".")[1] for name in names if name.startswith("qsearch.")}
    return found & set(ROOMS)


# The built-in images are listed by the data room but belong to the demo model; the import is inside the function.
# The package's own names are imported for type checkers alone; else each when it is first used.
ALLOWED = {("data/dataset.py", "models"), ("data/box_listing.py", "models")}
ALLOWED |= {("__init__.py", room) for room in ("errors", "config", "session")}


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_go_one_way(path):
    own = ROOMS.index(room_of(path))
    late = {room for room in imported_rooms(path) if ROOMS.index(room) > own}
    late -= {room for file, room in ALLOWED if path == ROOT / file}
    assert not late, f"{path.relative_to(ROOT)} imports {late}, which stand after it"


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_exported_names_exist(path):
    module = importlib.import_module(
        "qsearch." + ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
    )
    for name in getattr(module, "__all__", ()):
        assert hasattr(module, name), f"{module.__name__}.__all__ names {name}"


# What stands alone in bundles and packs, and the one place of all others that renames and waits for the disk. `versions`
# moves what is on the disk already out of the way.
RENAMING = {"whole_files.py", "export/monitor.py", "measure/devices/pack_runner.py", "adapt/versions.py"}


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_files_are_put_in_place_in_one_way(path):
    if str(path.relative_to(ROOT)) in RENAMING:
        return
    found = [node for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if isinstance(node, ast.Attribute)]
    calls = {f"{node.value.id}.{node.attr}" for node in found if isinstance(node.value, ast.Name)}
    assert not calls & {"os.replace", "os.rename", "os.fsync", "shutil.move", "tempfile.NamedTemporaryFile"}


def test_the_check_sees_a_wrong_import(tmp_path):
    wrong = tmp_path / "wrong.py"
    wrong.write_text("from qsearch.commands.app import main\nimport qsearch.search.study\n")
    assert imported_rooms(wrong) == {"commands", "search"}


# What reads a study or a bundle, and what a command line that is refused has loaded by then.
WITHOUT_TORCH = (
    *("qsearch.commands.app", "qsearch.export.verify", "qsearch.measure.devices.run_pack", "qsearch.report.figures"),
    *("qsearch.report.page_document", "qsearch.session.comparison", "qsearch.session.search_request"),
)


def test_reading_a_study_or_a_bundle_loads_neither_torch_nor_tvm():
    """The two take seconds to start; a process of its own, as this one has loaded them."""
    code = f"import importlib, sys\nfor name in {WITHOUT_TORCH}: importlib.import_module(name)\n"
    code += "print(sorted({'torch', 'tvm'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT.parent, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
