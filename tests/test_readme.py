"""Tests of the README's table of operators, backends and dtypes."""

from __future__ import annotations

import pytest
import torch

from flmoe_kernels import BackendUnavailable
from flmoe_kernels.core.backend import BACKENDS, CAPABILITIES
from tests.support.readme_table import call, table


def test_table_is_the_capability_table() -> None:
    expected = {
        operator: {
            backend: tuple(str(d).removeprefix("torch.") for d in row.get(backend, ()))
            for backend in BACKENDS
        }
        for operator, row in CAPABILITIES.items()
    }
    assert table() == expected


DASHES = [(op, name) for op, row in CAPABILITIES.items() for name in BACKENDS if name not in row]


@pytest.mark.parametrize(("operator", "backend"), DASHES)
def test_every_dash_is_an_error(operator: str, backend: str) -> None:
    with pytest.raises(BackendUnavailable, match=f"{operator}.*{backend}"):
        call(operator, backend, torch.float32)
