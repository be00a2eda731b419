"""Recognition of published source code by fingerprints of syntax trees.

The structure of a model does not show what its methods compute. A method counts as published if its source has a
known fingerprint, which ignores comments, docstrings, formatting and type annotations.
"""

from __future__ import annotations

import ast
import functools
import hashlib
import inspect
import sys
import types
from collections.abc import Iterator
from typing import Any

from torch import nn

from .fingerprints import FINGERPRINTS
from .places import MODULE_STATE

TRUSTED = frozenset({"torch", "flmoe_kernels", "builtins"} | sys.stdlib_module_names)
# The structure of a layer is checked, so it does not matter how __init__ makes it.
IGNORED = {"__init__", "__dict__", "__weakref__", "__annotate__", "__annotate_func__"}
# They differ between releases of Python, or do not change what code computes.
_SKIPPED_FIELDS = {"ctx", "type_comment", "kind", "type_params", "annotation", "returns", "simple"}

# Names of attributes and local functions in the published classes.
_NAMES = """
activation all_gates attn attn_drop bias capacity capture_attn capture_topk_pre_mix d_model drop dropout
dropout1 dropout2 experts experts_fused fc fusion_model fusion_sparse gate gate_hook h4toh head_dim htoh4
in_feat indicates interaction_experts is_full_modality kv last_attn last_topk_indices last_topk_pre_mix
last_topk_scores last_tot_expert loss mask mask_dict mlp mlp_sparse moe_group n_router network noise_epsilon
norm1 norm2 num_expert num_heads num_modalities out_feat pos_embed proj proj_drop q random_routing rank
require_attn_grad reweight scale self_attn slice_group slice_rank slice_size softmax softplus switch_eps
temperature top_k topk_logits tot_expert w_gate w_noise weight world_size
"""
PUBLISHED = frozenset(_NAMES.split())

Known = dict[str, tuple[str, ...]]


def fingerprint(node: ast.AST) -> str:
    """The fingerprint of a syntax tree, the same on Python 3.10 to 3.14."""
    return hashlib.sha256(_text(node).encode()).hexdigest()[:32]


def _text(value: Any) -> str:
    if isinstance(value, list):
        return f"[{','.join(_text(x) for x in value if not _has_no_effect(x))}]"
    if not isinstance(value, ast.AST):
        return repr(value)
    fields = [
        f"{name}={_text(x)}"
        for name, x in ast.iter_fields(value)
        if x is not None and x != [] and name not in _SKIPPED_FIELDS
    ]
    kind = type(value).__name__
    if isinstance(value, ast.AnnAssign):
        kind, fields[0] = "Assign", f"targets=[{_text(value.target)}]"
    return f"{kind}({','.join(sorted(fields))})"


def _has_no_effect(statement: Any) -> bool:
    """Whether this is a docstring or an annotation without a value."""
    if isinstance(statement, ast.AnnAssign):
        return statement.value is None
    return isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant)


def known_methods(variant: str | None) -> Known:
    """Fingerprints by "Class.method" of the variant's code and FastMoE's; None: of all code."""
    known: Known = {}
    for repository, table in FINGERPRINTS.items():
        if variant is not None and repository not in (variant, "fastmoe"):
            continue
        for name, prints in table.items():
            known[name] = (*known.get(name, ()), *prints)
    return known


def unrecognised(layer: nn.Module, variant: str | None = None) -> tuple[str, ...]:
    """Methods of a layer's parts that are not published code.

    Classes of torch and of this package count as known, and so do added methods that no published method calls.

    Args:
        layer: the layer.
        variant: "fl_i2moe", "i2moe", or None for a sparse MLP alone.
    """
    known = known_methods(variant)
    bases = dict.fromkeys(base for part in layer.modules() for base in type(part).__mro__)
    classes = [base for base in bases if not is_trusted(base)]
    added: list[tuple[type, str]] = []
    # Names that published code reads from a module. A new property may also hide a part.
    read = {*dir(nn.Module), *(name.rpartition(".")[2] for name in known)}
    for base in classes:
        for name, value in vars(base).items():
            functions = functions_of(value)
            if name in IGNORED or not (functions or callable(value) or hasattr(value, "__get__")):
                continue
            if functions and all(
                _is_known(f, f"{base.__name__}.{name}", known, set()) for f in functions
            ):
                read |= {
                    x.attr for f in functions for x in nodes_of(f) if isinstance(x, ast.Attribute)
                }
            else:
                added.append((base, name))
    return tuple(
        f"{base.__module__}.{base.__qualname__}.{name}"
        for base, name in added
        if name in read or name.startswith("__")
    )


def is_trusted(item: Any) -> bool:
    return str(getattr(item, "__module__", None)).partition(".")[0] in TRUSTED


def functions_of(value: Any) -> list[types.FunctionType]:
    """The functions of a class attribute; empty if it is something else."""
    parts: list[Any] = [value.__func__ if isinstance(value, staticmethod | classmethod) else value]
    if isinstance(value, property):
        parts = [part for part in (value.fget, value.fset, value.fdel) if part is not None]
    return parts if all(isinstance(part, types.FunctionType) for part in parts) else []


def _is_known(function: types.FunctionType, key: str, known: Known, seen: set[str]) -> bool:
    """Whether a function, and every function that it refers to by a global name, is published code."""
    node = syntax_tree(function)
    if node is None or fingerprint(node) not in known.get(key, ()):
        return False
    seen.add(key)
    names = {x.id for x in ast.walk(node) if isinstance(x, ast.Name)}
    for value in (function.__globals__[name] for name in names if name in function.__globals__):
        if isinstance(value, types.ModuleType) or not callable(value):
            continue
        if isinstance(value, type | types.FunctionType) and is_trusted(value):
            continue
        members = {value.__name__: value} if isinstance(value, types.FunctionType) else {}
        if isinstance(value, type):
            members = {f"{value.__name__}.{name}": x for name, x in vars(value).items()}
            members = {name: x for name, x in members.items() if functions_of(x)}
        if not members:
            return False
        for name, member in members.items():
            if name not in seen and not all(
                _is_known(f, name, known, seen) for f in functions_of(member)
            ):
                return False
    return True


def nodes_of(function: types.FunctionType) -> Iterator[ast.AST]:
    node = syntax_tree(function)
    return ast.walk(node) if node is not None else iter(())


def syntax_tree(function: types.FunctionType) -> ast.FunctionDef | None:
    """The syntax tree of a function's source; None if it is not available or differs from the compiled code."""
    code = function.__code__
    # The source of a wrapper is not the source of what it wraps, and a closure may hold any value.
    if hasattr(function, "__wrapped__") or {*code.co_freevars} - {"__class__"}:
        return None
    try:
        lines, _ = inspect.findsource(code)
        nodes, compiled = _parsed("".join(lines))
    except (OSError, TypeError, ValueError, SyntaxError, IndexError):
        return None
    # A file may have changed since its import; equal code objects compute the same.
    return nodes.get((code.co_firstlineno, code.co_name)) if code in compiled else None


@functools.lru_cache(maxsize=64)
def _parsed(
    text: str,
) -> tuple[dict[tuple[int, str], ast.FunctionDef], frozenset[types.CodeType]]:
    """The functions of a source text by first line and name, and their code objects."""
    nodes = {
        (min([node.lineno, *(x.lineno for x in node.decorator_list)]), node.name): node
        for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.FunctionDef)
    }
    compiled = [compile(text, "<source>", "exec", dont_inherit=True)]
    for code in compiled:
        compiled += [x for x in code.co_consts if isinstance(x, types.CodeType)]
    return nodes, frozenset(compiled)


def lost_members(layer: nn.Module, fast: nn.Module) -> list[str]:
    """Methods, class attributes and plain attributes that users added and the fast layer does not have."""
    methods = {name.rpartition(".")[2] for name in known_methods(None)}
    known = {*PUBLISHED, *methods, *dir(nn.Module())}
    bases = {base for part in layer.modules() for base in type(part).__mro__}
    lost = {
        f"{base.__name__}.{name}"
        for base in bases
        if not is_trusted(base)
        for name in vars(base)
        if not (name in known or name in IGNORED or name.startswith("__"))
    }
    for path, part in layer.named_modules():
        if is_trusted(type(part)):
            continue
        for name in vars(part).keys() - MODULE_STATE - known:
            if part is not layer:
                lost.add(f"{path}.{name}")
            elif name.startswith("_") or hasattr(fast, name):
                lost.add(name)
    return sorted(lost)
