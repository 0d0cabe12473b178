"""The CUDA sources compiled for every architecture: no spills, few enough registers, the intended instructions."""

from dataclasses import replace

import pytest
from cuda_resources import compiled, loops

pytestmark = pytest.mark.skipif(compiled.missing() is not None, reason=str(compiled.missing()))


@pytest.mark.parametrize(("source", "architecture"), compiled.BUILDS, ids=lambda value: getattr(value, "name", value))
def test_resources(source, architecture):
    assert not compiled.complaints(source, architecture)


@pytest.mark.parametrize("architecture", compiled.ARCHITECTURES)
def test_products_of_attention(architecture):
    """In the loop over tiles: as many as the arithmetic needs, and nothing in local memory."""
    sources = [source for source in compiled.SOURCES if source.stem.startswith("attention_sm80")]
    kernels = [kernel for source in sources for kernel in compiled.kernels(source, architecture)]
    assert sum(kernel.uses("HMMA") for kernel in kernels) == 78
    assert not [line for line in map(loops.complaint, kernels) if line]


def test_loops_are_read():
    """One product too many or too few, and a load of local memory, are seen."""
    source = compiled.ROOT / "csrc" / "cuda" / "attention_sm80.cu"
    kernel = next(kernel for kernel in compiled.kernels(source, "sm_80") if kernel.uses("HMMA"))
    lines = kernel.sass.splitlines()
    at = next(n for n, line in enumerate(lines) if "HMMA" in line)
    for changed in (lines[:at] + lines[at + 1 :], [*lines[:at], lines[at], *lines[at:]]):
        assert "HMMA per tile" in loops.complaint(replace(kernel, sass="\n".join(changed)))
    assert "local memory" in loops.complaint(replace(kernel, sass=kernel.sass + "LDL R0"))


def test_every_row_is_used():
    names = [kernel.name for build in compiled.BUILDS for kernel in compiled.kernels(*build)]
    rows = {row.pattern for row in compiled.table()}
    assert rows == {compiled.row_of(compiled.Kernel(name)).pattern for name in names}
