"""The ops of csrc/cuda on the emulator: right and without alarm under every schedule; seeded defects."""

import ctypes

import pytest
import torch
from simt.build import build
from simt.mutants import DTYPE, MUTANTS, RUNS, SMALL, WIDE, check, source
from simt.ops import OPERATORS, SOURCES, instead_of_cpu
from simt.problems import CombineProblem, DispatchProblem, GluProblem, RotaryProblem, RouteProblem
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


@pytest.mark.parametrize("name", ["x", "ys", "grad"])
def test_rows_beyond_2_to_the_31(name, seed):
    generator = torch.Generator().manual_seed(seed)
    near = torch.randn(1, 1, 3, 16, generator=generator)
    far, other = layouts.far_apart(near, 2)[0, 0], torch.randn(3, 16, generator=generator)
    source, weights = torch.tensor([2, 0, 1]).int(), torch.rand(3, 1, generator=generator)
    position = torch.tensor([[1], [2], [0]]).int()
    ops = torch.ops.pyext
    call = {
        "x": lambda x: ops.moe_dispatch_forward(x, source, position),
        "ys": lambda x: (ops.moe_combine_forward(x, weights, position), backward(other, x)[1]),
        "grad": lambda x: backward(x, other),
    }[name]

    def backward(grad, ys):
        return ops.moe_combine_backward(grad, ys, weights, position, True, True)

    with instead_of_cpu():
        torch.testing.assert_close(call(far), call(near[0, 0]))  # far rows are not aligned: sums in another order


def test_rows_that_do_not_exist_are_left_out():
    """On a GPU nobody can raise: they count like -1."""
    x, ys, grad, weights = torch.randn(2, 8), torch.randn(3, 8), torch.randn(2, 8), torch.rand(2, 2)
    ops, results = torch.ops.pyext, []
    with instead_of_cpu():
        for none in (-1, 3, -7, 2**31 - 1):
            source, position = torch.tensor([1, none, 0]).int(), torch.tensor([[2, none], [none, 0]]).int()
            results.append(
                (
                    ops.moe_dispatch_forward(x, source, position),
                    ops.moe_combine_forward(ys, weights, position),
                    *ops.moe_combine_backward(grad, ys, weights, position, True, True),
                )
            )
    for other in results[1:]:
        torch.testing.assert_close(results[0], other, rtol=0, atol=0)


SIZES = ("batch", "heads", "length", "head_dim", "rows", "width", "groups", "tokens", "experts", "columns", "choices")


@pytest.mark.parametrize(
    ("name", "problem"),
    [
        ("rotary_forward", RotaryProblem),
        ("glu_forward", GluProblem),
        ("moe_route_forward", RouteProblem),
        ("moe_dispatch_forward", DispatchProblem),
        ("moe_combine_forward", CombineProblem),
        ("moe_combine_backward", CombineProblem),
    ],
)
def test_no_kernels_for_fp64(name, problem):
    call = problem(dtype=3)
    for size in (*SIZES, "expert_groups", "top_groups"):
        setattr(call, size, 1)
    with machine() as gpu, pytest.raises(Found, match="launcher returned 1"):
        gpu.call(getattr(gpu.load(SOURCES[OPERATORS[name][0]]), f"pyext_cuda_{name}"), ctypes.byref(call), None)
