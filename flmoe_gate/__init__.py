"""Pytest plugin, and clocks and facts of the machine that `flmoe_kernels.profile` uses without pytest."""

from importlib.util import find_spec

if find_spec("pytest") is not None:
    from .plugin import (
        benchmark_against as benchmark_against,
    )
    from .plugin import (
        pytest_addoption as pytest_addoption,
    )
    from .plugin import (
        pytest_configure as pytest_configure,
    )
    from .plugin import (
        pytest_sessionfinish as pytest_sessionfinish,
    )
    from .plugin import (
        pytest_terminal_summary as pytest_terminal_summary,
    )
