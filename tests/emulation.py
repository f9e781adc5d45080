"""Whether the extension emulates CUDA: its CPU tensors then take a GPU's way (docs/kernels.md)."""

from __future__ import annotations

import pytest

from fastvae._extension import raw

EMULATED: bool = raw.build_info()["cuda_emulated"]

of_cpu_kernels = pytest.mark.skipif(
    EMULATED, reason="of the CPU's kernels, which no tensor reaches where CUDA is emulated"
)
