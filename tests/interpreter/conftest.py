"""Collects the tests of this folder only under TRITON_INTERPRET=1.

Triton decides at its import whether kernels are interpreted, and other tests compile them, so these tests run in
a process of their own: `TRITON_INTERPRET=1 pytest tests/interpreter`.
"""

import os

collect_ignore_glob = [] if os.environ.get("TRITON_INTERPRET") == "1" else ["test_*.py"]
