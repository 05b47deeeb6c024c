"""Without a GPU the Triton kernels of these tests run in Triton's interpreter, to be chosen before triton loads."""

import os

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
