"""Settings of every test: Hypothesis judges results, not a busy machine's speed; no GPU means Triton's interpreter.

Triton decides at its import whether its own functions are interpreted, and tests of other packages load it first (torch
and transformers do), so the choice stands here, before any test module.
"""

import os
import sys

import torch
from hypothesis import settings

# CI tries the same cases each time, so that it judges the change; everybody else's runs look for new ones.
settings.register_profile("threadweaver", deadline=None, derandomize=bool(os.environ.get("CI")))
settings.load_profile("threadweaver")

if not torch.cuda.is_available() and "TRITON_INTERPRET" not in os.environ:
    assert "triton" not in sys.modules, "a pytest plugin loaded triton; set TRITON_INTERPRET=1 before pytest"
    os.environ["TRITON_INTERPRET"] = "1"
