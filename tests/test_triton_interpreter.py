"""The interpreter of the tests itself: seeded defects must be seen, right kernels must pass, bfloat16 must be exact."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

from support import backends

pytestmark = pytest.mark.skipif(
    backends.HAS_GPU or not backends.TRITON,
    reason="Triton does not interpret kernels here: a GPU is there, or no Triton",
)
if backends.TRITON and not backends.HAS_GPU:
    import triton
    import triton.language as tl
    from triton.runtime.errors import InterpreterError

    @triton.jit
    def scale(x, out, n, BLOCK: tl.constexpr, DEFECT: tl.constexpr):
        """out = 2 x. Each defect is one that looks right when programs run in order on well-chosen sizes."""
        at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
        mask = at < n
        if DEFECT == "load past the end":
            value = tl.load(x + at)
        elif DEFECT == "load before the start":
            value = tl.load(x + at - 1, mask=mask)
        elif DEFECT == "lanes that no load has filled":
            value = tl.load(x + at, mask=at < n - 1)
        else:
            value = tl.load(x + at, mask=mask, other=0)
        value += value
        if DEFECT == "store past the end":
            tl.store(out + at, value)
        elif DEFECT == "two programs store one element":
            tl.store(out + at, value, mask=mask)
            tl.store(out + at + BLOCK, value, mask=at + BLOCK < n)
        elif DEFECT == "one program reads what another stores":
            tl.store(out + at, value, mask=mask)
            tl.store(out + at, value + 0 * tl.load(out + at + BLOCK, mask=at + BLOCK < n, other=0), mask=mask)
        elif DEFECT == "two programs add without atomics":
            tl.store(out + at, value, mask=mask)
            tl.store(out + n, tl.load(out + n) + 1)
        elif DEFECT == "atomic and plain store":
            tl.store(out + at, value, mask=mask)
            tl.atomic_add(out + at + BLOCK, value, mask=at + BLOCK < n)
        elif DEFECT == "two lanes store one element":
            tl.store(out + at // 2, value, mask=mask)
        elif DEFECT == "tail left out":
            tl.store(out + at, value, mask=at < n // BLOCK * BLOCK)
        else:
            tl.store(out + at, value, mask=mask)

    @triton.jit
    def count(x, bins, n, BLOCK: tl.constexpr):
        at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
        tl.atomic_add(bins + tl.load(x + at, mask=at < n, other=0), 1, mask=at < n)

    @triton.jit
    def arithmetic(a, b, out, n, WHAT: tl.constexpr, BLOCK: tl.constexpr):
        """One operation in the dtype of the tensors."""
        at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
        x, y = tl.load(a + at, mask=at < n, other=1.0), tl.load(b + at, mask=at < n, other=1.0)
        if WHAT == "sum":
            result = x + y
        elif WHAT == "product":
            result = x * y
        elif WHAT == "quotient":
            result = x / y
        elif WHAT == "negation":
            result = -x
        elif WHAT == "maximum":
            result = tl.maximum(x, y)
        elif WHAT == "choice":
            result = tl.where(x < y, x, y)
        elif WHAT == "constant":
            result = x * 3.140625
        elif WHAT == "from fp32":
            result = (x.to(tl.float32) * 1.2345678).to(a.dtype.element_ty)
        elif WHAT == "row maximum":
            result = x - tl.max(x, 0)
        tl.store(out + at, result, mask=at < n)

    @triton.jit
    def product(a, b, out, PRECISION: tl.constexpr, N: tl.constexpr):
        at = tl.arange(0, N)[:, None] * N + tl.arange(0, N)[None, :]
        tl.store(out + at, tl.dot(tl.load(a + at), tl.load(b + at), input_precision=PRECISION))

    @triton.jit
    def order(out, counter):
        tl.store(out + tl.program_id(0), tl.atomic_add(counter, 1))


FAULTS = {
    "load past the end": "load by program .* out of bounds",
    "load before the start": "load by program .* out of bounds",
    "store past the end": "store by program .* out of bounds",
    "two programs store one element": "race: store by program .* touched by store",
    "one program reads what another stores": "race: (load|store) by program .* touched by (load|store)",
    "two programs add without atomics": "race: (load|store) by program .* touched by (load|store)",
    "atomic and plain store": "race: (atomic|store) by program .* touched by (atomic|store)",
    "two lanes store one element": "race: store by program .* of different values to one element",
}
BLOCK = 16


def launch(defect: str | None, dtype=torch.float32, n=61) -> tuple[torch.Tensor, torch.Tensor]:
    x = torch.arange(n + 8).to(dtype)[4 : 4 + n]  # what lies around belongs to the storage, not to the tensor
    out = torch.empty(n + (1 if defect == "two programs add without atomics" else 0), dtype=dtype)
    scale[(-(-n // BLOCK),)](x, out, n, BLOCK=BLOCK, DEFECT=defect)
    return x, out


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64])
def test_right_kernels_pass(dtype):
    x, out = launch(None, dtype)
    assert torch.equal(out, 2 * x)


@pytest.mark.parametrize("defect", FAULTS)
def test_defect_is_seen(defect):
    with pytest.raises(InterpreterError, match=FAULTS[defect]):
        launch(defect)


@pytest.mark.parametrize("defect", ["lanes that no load has filled", "tail left out"])
def test_what_was_never_written_is_nan(defect):
    """Fresh tensors, and lanes that a load leaves out, are NaN in the tests: what uses them cannot pass."""
    assert launch(defect)[1][-1].isnan()


def test_atomics_are_no_race():
    x = torch.randint(0, 5, (100,), dtype=torch.int32)
    bins = torch.zeros(5, dtype=torch.int32)
    count[(7,)](x, bins, 100, BLOCK=16)
    assert torch.equal(bins.long(), torch.bincount(x, minlength=5))


def test_programs_run_in_random_order():
    from support import triton_interpreter

    seen = []
    for seed in (1, 2, 1):
        triton_interpreter.shuffle_programs(seed)
        out, counter = torch.empty(40, dtype=torch.int32), torch.zeros(1, dtype=torch.int32)
        order[(40,)](out, counter)
        seen.append(out.tolist())
    assert seen[0] == seen[2] != seen[1] and sorted(seen[0]) == list(range(40)) != seen[0]


OPERATIONS = {
    "sum": lambda a, b: a + b,
    "product": lambda a, b: a * b,
    "quotient": lambda a, b: a / b,
    "negation": lambda a, b: -a,
    "maximum": torch.maximum,
    "choice": torch.minimum,
    "constant": lambda a, b: a * 3.140625,
    "from fp32": lambda a, b: (a.float() * 1.2345678).to(a.dtype),
    "row maximum": lambda a, b: a - a.max(),
}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("what", OPERATIONS)
def test_arithmetic_is_exact(what, dtype):
    """Every operation rounds to nearest even, as PyTorch's do."""
    a, b = torch.randn(4096).to(dtype), torch.randn(4096).to(dtype)
    a[:3] = torch.tensor([0.0, float("inf"), -float("inf")], dtype=dtype)
    out = torch.empty_like(a)
    arithmetic[(1,)](a, b, out, 4096, WHAT=what, BLOCK=4096)
    assert torch.equal(out.nan_to_num(7.0), OPERATIONS[what](a, b).nan_to_num(7.0))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_dot(dtype):
    a, b = torch.randn(32, 32).to(dtype), torch.randn(32, 32).to(dtype)
    out = torch.empty(32, 32)
    product[(1,)](a, b, out, PRECISION="ieee", N=32)
    torch.testing.assert_close(out.double(), a.double() @ b.double(), rtol=1e-5, atol=1e-5)


def test_dot_of_a_part():
    """An element of a product is the same to the last bit in a smaller tile, in which numpy's own differs."""
    a, b = torch.randn(64, 64), torch.randn(64, 64)
    whole, part = torch.empty(64, 64), torch.empty(32, 32)
    a[:, 32:] = 0.0
    product[(1,)](a, b, whole, PRECISION="ieee", N=64)
    product[(1,)](a[:32, :32].contiguous(), b[:32, :32].contiguous(), part, PRECISION="ieee", N=32)
    assert torch.equal(whole[:32, :32], part)


def test_tf32_is_seen():
    """The default precision of `tl.dot` on fp32 is not fp32's."""
    a, b, out = torch.randn(64, 64), torch.randn(64, 64), torch.empty(64, 64)
    product[(1,)](a, b, out, PRECISION=None, N=64)
    error = (out.double() - a.double() @ b.double()).norm() / out.norm()
    assert 1e-4 < error < 1e-3


def test_stock_interpreter_is_refused_bfloat16():
    """Without the changes above it is silently wrong, so pyext does not run on it."""
    program = (
        "import torch, pyext\n"
        "x, table = torch.ones(1, 1, 2, 4), torch.ones(2, 2)\n"
        "for x in (x, x.bfloat16()):\n"
        "    print(pyext.explain(pyext.rotary, x, table, table)['triton'])\n"
    )
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    out = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True)
    assert out.stdout.splitlines() == ["accepts", "Triton's interpreter computes bfloat16 wrongly"]
