"""The CUDA sources compiled for every architecture: no spills, few enough registers, the intended instructions."""

import pytest
from cuda_resources import compiled

pytestmark = pytest.mark.skipif(compiled.missing() is not None, reason=str(compiled.missing()))


@pytest.mark.parametrize("architecture", compiled.ARCHITECTURES)
@pytest.mark.parametrize("source", compiled.SOURCES, ids=lambda path: path.name)
def test_resources(source, architecture):
    assert not compiled.complaints(source, architecture)


def test_every_row_is_used():
    names = [kernel.name for source in compiled.SOURCES for kernel in compiled.kernels(source, "sm_80")]
    rows = {row.pattern for row in compiled.table()}
    assert rows == {compiled.row_of(compiled.Kernel(name)).pattern for name in names}
