"""The ops of csrc/cuda on the emulator: right and without alarm under every schedule; seeded defects."""

import ctypes

import pytest
import torch
from simt.build import build
from simt.mutants import DTYPE, MUTANTS, RUNS, SMALL, WIDE, check, source
from simt.ops import SOURCES, instead_of_cpu
from simt.problems import GluProblem, RotaryProblem
from simt.runtime import Found, machine

from support import layouts

STEMS = ("rotary", "glu", "moe_route", "moe_dispatch")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def name_of(run):
    return "-".join(map(str, run.values()))


@pytest.fixture(scope="module", autouse=True)
def built():
    changed = [source(stem, *SMALL[stem]) for stem in STEMS]
    build([*SOURCES.values(), *changed, source("moe_route", *WIDE), *(m.kernel for m in MUTANTS)])


@pytest.mark.parametrize("run", RUNS, ids=name_of)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("stem", STEMS)
def test_no_alarm(stem, dtype, run, seed):
    with instead_of_cpu(seed=seed % 2**31, **run):
        check(stem, dtype, seed)


@pytest.mark.parametrize("run", RUNS, ids=name_of)
@pytest.mark.parametrize("stem", STEMS)
def test_kernels_go_round_where_the_grid_ends(stem, run, seed):
    with instead_of_cpu({stem: source(stem, *SMALL[stem])}, seed=seed % 2**31, **run):
        check(stem, DTYPE, seed)


@pytest.mark.parametrize("run", RUNS[-2:], ids=name_of)
def test_more_experts_than_fit_into_shared_memory(run, seed):
    with instead_of_cpu({"moe_route": source("moe_route", *WIDE)}, seed=seed % 2**31, **run):
        check("moe_route", DTYPE, seed)


@pytest.mark.parametrize("mutant", MUTANTS, ids=str)
def test_defect_is_caught(mutant, seed):
    assert all(outcome != "missed" for outcome in mutant.outcomes(seed % 2**31))


def test_positions_outside_the_tables_read_nothing():
    """On a GPU nobody can raise: such a token becomes NaN, and no gradient of a table sees it."""
    x, grad = torch.randn(2, 1, 3, 5, 16)
    cos, sin = torch.randn(2, 4, 8)
    positions = torch.tensor([[3, -1, 0, 4, 2**62]])
    inside = torch.tensor([True, False, True, False, False])
    with instead_of_cpu():
        out = torch.ops.pyext.rotary_forward(x, cos, sin, positions, False, False)
        tables = torch.ops.pyext.rotary_backward(grad, x, positions, 1, 4, 8, False, False)
        kept = torch.ops.pyext.rotary_forward(x[:, :, inside], cos, sin, positions[:, inside], False, False)
    assert out[:, :, ~inside].isnan().all() and torch.equal(out[:, :, inside], kept)
    expected = torch.ops.pyext.rotary_backward(
        grad[:, :, inside], x[:, :, inside], positions[:, inside], 1, 4, 8, False, False
    )
    torch.testing.assert_close(tables, expected)


@pytest.mark.parametrize("dim", [0, 1, 2])
def test_offsets_beyond_2_to_the_31(dim, seed):
    generator = torch.Generator().manual_seed(seed)
    near = torch.randn(3, 3, 3, 16, generator=generator)
    far, grad = layouts.far_apart(near, dim), torch.randn(3, 3, 3, 16, generator=generator)
    cos, sin = torch.randn(2, 3, 8, generator=generator)
    calls = [
        lambda x: torch.ops.pyext.rotary_forward(x, cos, sin, None, False, False).contiguous(),
        lambda x: torch.ops.pyext.rotary_backward(grad, x, None, 1, 3, 8, True, False),
        lambda x: torch.ops.pyext.glu_forward(x, grad, 0, True, False),
        lambda x: torch.ops.pyext.glu_backward(grad, grad, x, 0, True, False)[0],
    ]
    with instead_of_cpu():
        for call in calls:
            torch.testing.assert_close(call(far), call(near), rtol=0, atol=0)


def test_no_kernels_for_fp64():
    with machine() as gpu:
        for problem, stem in ((RotaryProblem(), "rotary"), (GluProblem(), "glu")):
            problem.dtype, problem.batch, problem.heads, problem.length, problem.head_dim = 3, 1, 1, 1, 1
            problem.rows = problem.width = 1
            with pytest.raises(Found, match="launcher returned 1"):
                gpu.call(getattr(gpu.load(SOURCES[stem]), f"pyext_cuda_{stem}_forward"), ctypes.byref(problem), None)
