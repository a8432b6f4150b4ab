"""Find out whether a `.pt2` archive holds a program and its tensors, and nothing that loading it would run.

torch.export.load is not made for files of strangers: it hands texts of the file to sympy's parser, which evaluates them, makes
Python source of its names, looks operators up by attribute, imports modules that tree specifications name, unpickles objects
and loads compiled libraries. What reaches any of these is admitted here by the form that torch itself writes it in, and
all else is refused.
"""

from __future__ import annotations

import ast
import re
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from qsearch.bounded import check_archive, parse_json, shortened

__all__ = ["check_program", "check_program_archive"]

_MEMBER = re.compile(
    r"archive_format|archive_version|byteorder|version|\.\w+|\.data/\w+|data/weights/(weight_\d+|model_weights_config\.json)"
    r"|data/constants/(tensor_\d+|model_constants_config\.json)|data/sample_inputs/model\.pt|models/model\.json|extra/.*"
)
_PROGRAM = "models/model.json"
_PAYLOADS = ("data/weights/model_weights_config.json", "data/constants/model_constants_config.json")
_PAYLOAD = re.compile(r"(weight|tensor)_\d+")
# Of values, which become variables, and some of which have none; of parameters, which become attributes, and may come from keys
# of a ModuleDict.
_NAME, _PATH = re.compile(r"([A-Za-z_]\w*)?", re.ASCII), re.compile(r"[\w.\- ]*")
_SYMBOL = re.compile(r"[a-z]{1,4}\d{1,9}")
_SYMPY = ("Symbol", "Integer", "Add", "Mul", "Max", "Min", "FloorDiv", "CeilDiv", "CleanDiv", "Mod", "PythonMod")
_MOST_EXPRESSION, _FORMULA = 2000, re.compile(r"[A-Za-z0-9_'(),=\- ]*")
_PYTHON = ("getitem", "add", "sub", "mul", "floordiv", "truediv", "mod", "neg", "eq", "ne", "lt", "le", "gt", "ge")
_TREES = (None, "builtins.tuple", "builtins.list", "builtins.dict")
# Objects that are unpickled, types of a user's own.
_REFUSED = ("as_custom_obj", "custom_obj", "token", "custom_obj_values", "treespec_namedtuple_fields")
# What `with torch.no_grad()` becomes: it takes a graph, in which all this holds as well.
_NO_GRADIENTS = "torch.ops.higher_order.wrap_with_set_grad_enabled"
_OF_NAMES = ("tensor_values", "sym_int_values", "sym_bool_values", "sym_float_values", "range_constraints")


def check_program_archive(path: Path) -> None:
    """Refuse an archive that is more than a program and tensors.

    Args:
        path: The archive.

    Raises:
        ValueError: It is.
        RuntimeError: torch cannot read it.
    """
    with zipfile.ZipFile(path) as archive:
        # torch stores members as they are: nothing can be larger unpacked.
        check_archive(archive, path.stat().st_size)
    # The reader that torch loads it with, so that both see the same.
    reader = torch._C.PyTorchFileReader(str(path))
    members = reader.get_all_records()
    stray = next((name for name in members if not _MEMBER.fullmatch(name)), None)
    if stray is not None or len(set(members)) != len(members):
        raise ValueError(f"it holds {shortened(stray or 'a member twice')}, which is no part of a program of torch.export")
    for name in _PAYLOADS:
        _check_payloads(parse_json(reader.get_record(name)), path.stat().st_size)
    check_program(reader.get_record(_PROGRAM))


def check_program(document: str | bytes) -> None:
    """Refuse the document of a program that says more than torch.export.save does.

    Raises:
        ValueError: It does; also what a document that is none leads to, KeyError, TypeError and AttributeError.
    """
    _check(parse_json(document))


def _check_payloads(document: Any, most: int) -> None:
    """Tensors, each in a file of its own; none with more elements than the archive has bytes."""
    for name, one in document["config"].items():
        _require(_PATH, name, "the name of a tensor")
        _require(_PAYLOAD, one["path_name"], "the file of a tensor")
        count = 1
        for size in (one["tensor_meta"] or {"sizes": []})["sizes"]:
            count *= int(size["as_int"])
        if count > most:
            raise ValueError(f"tensor {shortened(name)} has {count:,} elements, more than the file has bytes")


def _check(value: Any) -> None:
    """Look at everything that a program's document says."""
    if isinstance(value, list):
        for one in value:
            _check(one)
    elif isinstance(value, dict):
        for key, inner in value.items():
            if key in _OF_NAMES:
                for name in inner:
                    _require(_NAME, name, "a name")
            if key in _REFUSED and inner:
                raise ValueError(f"it holds {key}, which is no part of a program of tensors")
            rule = _RULES.get(key) or (_check_path if key.endswith("_name") else None)
            if rule is not None and inner is not None:
                rule(inner)
            # What metadata says is never more than text.
            if key not in ("metadata", "guards_code"):
                _check(inner)


def _require(form: re.Pattern[str], text: Any, what: str) -> None:
    if not isinstance(text, str) or not form.fullmatch(text):
        raise ValueError(f"{shortened(text)} is not {what}")


def _check_name(text: Any) -> None:
    _require(_NAME, text, "a name")


def _check_path(text: Any) -> None:
    _require(_PATH, text, "a name")


def _check_names(names: Any) -> None:
    for name in names:
        _check_name(name)


def _check_operator(text: Any) -> None:
    """An operator of ATen that computes, or one of Python's for numbers."""
    home, _, rest = str(text).partition(".")
    if text == _NO_GRADIENTS or (home == "_operator" and rest in _PYTHON):
        return
    found = re.fullmatch(r"torch\.ops\.aten\.([A-Za-z_]\w*)\.([A-Za-z_]\w*)", str(text))
    operator = found and getattr(getattr(torch.ops.aten, found[1], None), found[2], None)
    schema = getattr(operator, "_schema", None)
    # What asserts something of a tensor computes nothing, and harms nobody; torch.export writes it beside conversions.
    asserts = text == "torch.ops.aten._assert_tensor_metadata.default"
    if schema is None or not (schema.returns or asserts) or any("file" in argument.name for argument in schema.arguments):
        raise ValueError(f"{shortened(text)} is no operator of ATen that computes something")


def _check_expression(text: Any) -> None:
    """A formula of sizes as sympy's representation, with nothing to call but its own classes."""
    # Without line breaks, comments and escapes, on which sympy and Python disagree.
    if not isinstance(text, str) or len(text) > _MOST_EXPRESSION or not _FORMULA.fullmatch(text):
        raise ValueError(f"{shortened(text)} is no formula of sizes")
    try:
        tree = ast.parse(text, mode="eval").body
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        raise ValueError(f"{shortened(text)} is no formula of sizes") from None
    if not _is_formula(tree):
        raise ValueError(f"{shortened(text)} is no formula of sizes")


def _is_formula(node: ast.AST) -> bool:
    if isinstance(node, ast.Constant):
        return isinstance(node.value, bool) or (isinstance(node.value, int) and abs(node.value) < 1 << 63)
    if isinstance(node, ast.UnaryOp):
        return isinstance(node.op, ast.USub) and _is_formula(node.operand)
    if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Name) or node.func.id not in _SYMPY:
        return False
    if node.func.id == "Symbol":
        name = node.args[0].value if len(node.args) == 1 and isinstance(node.args[0], ast.Constant) else None
        plain = all(
            one.arg and isinstance(one.value, ast.Constant) and isinstance(one.value.value, bool) for one in node.keywords
        )
        return isinstance(name, str) and _SYMBOL.fullmatch(name) is not None and plain
    return not node.keywords and all(map(_is_formula, node.args))


def _check_tree(text: Any) -> None:
    """How arguments and results are nested: tuples, lists and dictionaries, whose keys become names of arguments."""
    protocol, tree = parse_json(text)
    if protocol != 1:
        raise ValueError(f"a tree specification of version {shortened(protocol)}")
    pending = [tree]
    while pending:
        one = pending.pop()
        kind, context = one["type"], one["context"]
        if kind not in _TREES or not set(one) <= {"type", "context", "children_spec"}:
            raise ValueError(f"a tree specification holds {shortened(kind)}")
        keys = parse_json(context) if isinstance(context, str) else context
        if not isinstance(keys, list if kind == "builtins.dict" else type(None)):
            raise ValueError(f"a tree specification holds {shortened(keys)}")
        _check_names(keys or ())
        pending += one["children_spec"]


_RULES: Mapping[str, Callable[[Any], None]] = {
    "name": _check_name,
    "forward_arg_names": _check_names,
    "fqn": _check_path,
    "target": _check_operator,
    "as_operator": _check_operator,
    "expr_str": _check_expression,
    "in_spec": _check_tree,
    "out_spec": _check_tree,
}
