"""The same inputs give the same bits: at any thread count, in every repetition, whatever memory held before."""

from __future__ import annotations

import pytest
import torch

from support.cases import case, draw, run
from support.parts import (
    Shape,
    alibi,
    causal,
    dense,
    dense_mask,
    diagonal,
    disentangled,
    function,
    image,
    padding,
    permutation,
    segment,
    shaw,
    strided,
    t5,
    transformer_xl,
    union,
    window,
)

LONG = Shape(1, 1, 1, 700, 900, 40, 40)  # one head: the work is split over blocks of it
CASES = [
    case(LONG),
    case(LONG, causal(), t5()),
    case(Shape(1, 1, 1, 1000, 64, 64, 64), diagonal()),
    case(Shape(1, 1, 1, 5, 3000, 64, 64), alibi()),
    case(Shape(1, 1, 1, 1, 3000, 64, 64)),
    case(Shape(1, 8, 1, 3, 2000, 64, 64), t5(), padding(), sinks=True),
    case(Shape(1, 8, 2, 1, 2000, 72, 72), dropout=0.2),
    case(Shape(1, 2, 1, 300, 300, 40, 24), causal(), dense("1hqk"), dropout=0.3),
    case(Shape(1, 3, 3, 260, 300, 40, 40), dense("11qk"), dense_mask("1hqk"), sinks=True, softcap=3.0),
    case(Shape(3, 5, 5, 100, 130, 24, 24), t5(), dense("b11k"), window(20, 20), sinks=True),
    case(Shape(2, 16, 4, 65, 65, 16, 16), alibi(symmetric=True), dense("b1qk")),
    case(Shape(2, 2, 2, 400, 400, 32, 32), dense("111k"), padding()),
    case(LONG, transformer_xl("past"), causal()),
    case(Shape(1, 2, 1, 300, 333, 40, 24), disentangled(buckets=32, max_position=128), segment(), sinks=True),
    case(Shape(2, 4, 2, 3, 700, 64, 64), shaw(20), padding(), dropout=0.2),
    case(Shape(1, 1, 1, 600, 600, 32, 32), strided(40), causal(), sinks=True),  # two passes
    case(Shape(1, 4, 2, 300, 420, 24, 24), image("columns", 70, 19), padding()),
    case(Shape(2, 2, 2, 300, 300, 16, 16), permutation(batched=True)),
    case(Shape(1, 2, 1, 400, 500, 32, 32), function("1hqk", 0.01), t5(), sinks=True),
    case(Shape(1, 1, 1, 500, 500, 40, 24), union(strided(30), image("conv", 50, 20)), causal(), dropout=0.2),
]


def same_bits(a, b):
    return all(torch.equal(value, b[name]) for name, value in a.items())


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=lambda d: str(d)[6:]
)
@pytest.mark.parametrize("which", CASES, ids=str)
def test_thread_count_changes_no_bit(which, dtype, cpu, seed):
    drawn = draw(which, dtype, seed)
    once = run(drawn, cpu.impl, threads=1)
    for threads in (2, 3, 4, 8, 2):
        assert same_bits(once, run(drawn, cpu.impl, threads)), f"{threads} threads differ from one"


@pytest.mark.parametrize("which", CASES[1::3], ids=str)
def test_repetition_changes_no_bit(which, cpu, seed):
    drawn = draw(which, torch.bfloat16, seed)
    once = run(drawn, cpu.impl)
    for _ in range(5):
        assert same_bits(once, run(drawn, cpu.impl))


def test_former_calls_leave_nothing_behind(cpu, seed):
    """Scratch that an earlier, larger or NaN-ridden call left behind does not reach a later result."""
    drawn = draw(case(Shape(2, 4, 2, 33, 70, 24, 24), t5(), causal(), sinks=True), torch.float32, seed)
    once = run(drawn, cpu.impl)
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        dirty = draw(case(Shape(1, 4, 2, 300, 300, 128, 128), diagonal(), dense("1hqk")), dtype, seed)
        with torch.no_grad():
            for leaf in dirty.leaves.values():
                leaf.fill_(float("nan"))
        run(dirty, cpu.impl)
        assert same_bits(once, run(drawn, cpu.impl))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_batch_entries_and_heads_do_not_mix(dtype, cpu, seed):
    """NaN in one (batch, head) leaves every other one as it was, to the bit."""
    drawn = draw(case(Shape(3, 4, 4, 70, 90, 24, 24), causal(), t5()), dtype, seed)
    clean = run(drawn, cpu.impl)
    with torch.no_grad():
        for name in ("query", "key", "value"):
            drawn.leaves[name][1, 2] = float("nan")
    dirty = run(drawn, cpu.impl)
    others = torch.ones(3, 4, dtype=torch.bool)
    others[1, 2] = False
    for name in ("out", "lse", "grad query", "grad key", "grad value"):
        assert dirty[name][1, 2].isnan().all(), name
        assert torch.equal(dirty[name][others], clean[name][others]), name
    table = [n for n in dirty if n.startswith("grad table")][0]
    assert torch.equal(dirty[table][:, [0, 1, 3]], clean[table][:, [0, 1, 3]])


def test_concurrent_python_threads(cpu, seed):
    """Two Python threads calling at once get the bits they get alone."""
    import threading

    drawns = [draw(which, torch.float32, seed) for which in CASES[:2]]
    wanted = [run(drawn, cpu.impl) for drawn in drawns]
    failures = []

    def work(n):
        for _ in range(4):
            if not same_bits(wanted[n], run(drawns[n], cpu.impl)):
                failures.append(n)

    threads = [threading.Thread(target=work, args=(n,)) for n in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
