"""Classes of a checkout of the published code.

    published = Checkout("path/to/FL-I2MoE_Decor")
    layer = published.InteractionMoE(2, published.Transformer(...), ...)

This imports and runs the code of the checkout, with the rights of the user: pass only a checkout that you trust.
Packages that the code imports and that are not installed are replaced during the import. FastMoE's replacement
computes on the CPU (`tests.support.fastmoe`); the others raise an error when they are used.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import mock

import torch
from torch import nn
from torch.utils import _pytree

from tests.support import fastmoe

FASTMOE = ("fmoe", "fmoe_cuda")
PACKAGES = (
    *FASTMOE,
    *("PIL", "fvcore", "h5py", "matplotlib", "nibabel", "pandas", "scanpy", "scipy", "seaborn"),
    *("sklearn", "torchvision", "tqdm", "transformers", "tree"),
)
PROVIDED: dict[str, dict[str, Any]] = {
    **fastmoe.MODULES,
    # The published code calls these two with a tensor or an int.
    "tree": {"map_structure": _pytree.tree_map, "flatten": _pytree.tree_leaves},
    # Called while a module is imported.
    "seaborn": {"set": lambda **style: None},
}


class Checkout:
    """The published classes, and further modules of the checkout by name.

    Args:
        path: checkout of dut0817/FL-I2MoE_Decor or Raina-Xin/I2MoE; its code is run.

    Attributes:
        compat: "fl_i2moe" or "i2moe".

    Raises:
        ValueError: the folder is neither.
    """

    def __init__(self, path: str | Path) -> None:
        self.root = Path(path).resolve()
        self._modules: dict[str, ModuleType] = {}
        if (self.root / "src/imoe/regularizers.py").is_file():
            self.compat = "fl_i2moe"
        elif (self.root / "src/imoe/InteractionMoERegression.py").is_file():
            self.compat = "i2moe"
            module = self.module("src.imoe.InteractionMoERegression")
            self.InteractionMoERegression: Any = module.InteractionMoERegression
        else:
            raise ValueError(f"path: expected a checkout of FL-I2MoE_Decor or I2MoE, got {path}")
        self.InteractionMoE: Any = self.module("src.imoe.InteractionMoE").InteractionMoE
        self.Transformer: Any = self.module("src.common.fusion_models.transformer").Transformer
        if not torch.cuda.is_available():
            self.Transformer.__init__ = _on_cpu(self.Transformer.__init__)

    def module(self, name: str) -> ModuleType:
        """Import a module of the checkout, for example "src.imoe.regularizers"."""
        with _replaced_packages(), self._own_modules():
            return importlib.import_module(name)

    @contextlib.contextmanager
    def _own_modules(self) -> Iterator[None]:
        """Import `src` from this checkout; other modules of this name, and settings, are kept."""
        others = _taken("src")
        sys.modules.update(self._modules)
        with (
            mock.patch.object(sys, "path", [str(self.root), *sys.path]),
            mock.patch.object(sys, "dont_write_bytecode", True),
            mock.patch.dict(os.environ),
            warnings.catch_warnings(),
        ):
            try:
                yield
            finally:
                self._modules = _taken("src")
                sys.modules.update(others)


def _taken(*packages: str) -> dict[str, ModuleType]:
    """Remove these packages from sys.modules and return their modules."""
    names = [name for name in sys.modules if name.split(".")[0] in packages]
    return {name: sys.modules.pop(name) for name in names}


def _on_cpu(construct: Callable[..., None]) -> Callable[..., None]:
    """I2MoE's fusion model moves its head to a GPU when it is constructed."""

    @functools.wraps(construct)
    def without_gpu(self: nn.Module, *args: Any, **kwargs: Any) -> None:
        with mock.patch.object(nn.Module, "cuda", lambda module, device=None: module):
            construct(self, *args, **kwargs)

    return without_gpu


@contextlib.contextmanager
def _replaced_packages() -> Iterator[None]:
    """Replace packages that are not installed. Without a GPU also replace FastMoE, which needs one."""
    missing = {name for name in PACKAGES if name not in sys.modules and find_spec(name) is None}
    if missing.intersection(FASTMOE) or not torch.cuda.is_available():
        missing.update(FASTMOE)
    installed = _taken(*missing)
    finder = _Finder(missing)
    sys.meta_path.insert(0, finder)
    try:
        yield
    finally:
        sys.meta_path.remove(finder)
        _taken(*missing)
        sys.modules.update(installed)


class _Replacement(ModuleType):
    """A stub module: a missing name is a class that raises an error when it is used."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)

        def refuse(*args: Any, **kwargs: Any) -> None:
            raise ModuleNotFoundError(f"{self.__name__} is not installed, so {name} cannot be used")

        # `swap` trusts such a class as one of the standard library: it computes nothing.
        return type(name, (), {"__init__": refuse, "__module__": "builtins"})


class _Finder(MetaPathFinder, Loader):
    def __init__(self, packages: set[str]) -> None:
        self.packages = packages

    def find_spec(self, name: str, path: Any, target: Any = None) -> ModuleSpec | None:
        if name.split(".")[0] not in self.packages:
            return None
        return ModuleSpec(name, self, is_package=True)

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        return _Replacement(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        vars(module).update(PROVIDED.get(module.__name__, {}))
