"""Triton's interpreter: import this before anything imports triton, and kernels run on CPU tensors.

Triton decides when a kernel is decorated, so a process that imported it without the variable cannot
test kernels on a CPU any more: the importing file is then skipped and says why.
"""

import os
import sys

import pytest

if "triton" in sys.modules and os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip(
        "triton was imported without TRITON_INTERPRET=1: run this file in its own process",
        allow_module_level=True,
    )
os.environ["TRITON_INTERPRET"] = "1"
