"""Hopper's attention: its source on the emulator, seeded defects of it, and the order of its machine code."""

import ctypes

import pytest
import torch
from cuda_resources import compiled, hopper
from simt.attention_sm90_mutants import MUTANTS, RUNS, check, cut_down
from simt.attention_sm90_probes import FORWARD, PROBES
from simt.build import build
from simt.ops import HOPPER, instead_of_cpu
from simt.problems import DTYPES, AttentionProblem, view
from simt.runtime import machine

import pyext

ONLY_FORWARD = {"attention_sm90": HOPPER["attention_sm90"]}


@pytest.fixture(scope="module")
def built():
    build([*HOPPER.values(), *map(cut_down, HOPPER), *(mutant.kernel for mutant in MUTANTS)])


@pytest.mark.usefixtures("built")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("probe", PROBES)
def test_agrees_with_the_oracle(probe, dtype, seed):
    run = RUNS[seed % len(RUNS)]
    with instead_of_cpu(ONLY_FORWARD if probe in FORWARD else HOPPER, seed=seed % 2**31, **run):
        check(probe, dtype, seed)


@pytest.mark.usefixtures("built")
@pytest.mark.parametrize("run", RUNS, ids=lambda run: "-".join(map(str, run.values())))
@pytest.mark.parametrize(
    "probe",
    [
        "causal",
        "buckets",
        "three warpgroups",
        "wide, causal",
        "wide, all visible",
        "relative, clipped",
        "relative, in turns",
    ],
)
def test_no_alarm(probe, run, seed):
    """In every schedule with every completion; heads in several groups."""
    stems = ONLY_FORWARD if probe in FORWARD else HOPPER
    with instead_of_cpu({stem: cut_down(stem) for stem in stems}, seed=seed % 2**31, **run):
        check(probe, torch.float16, seed)


@pytest.mark.usefixtures("built")
@pytest.mark.parametrize("mutant", MUTANTS, ids=str)
def test_defect_is_caught(mutant, seed):
    assert all(outcome != "missed" for outcome in mutant.outcomes(seed % 2**31))


@pytest.mark.usefixtures("built")
def test_the_same_bits_in_every_order(seed):
    generator = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(2, 3, 290, 64, generator=generator).half() for _ in range(3))
    results = []
    for run in RUNS[::4]:
        with instead_of_cpu(ONLY_FORWARD, seed=seed % 2**31, **run):
            results.append(pyext.attention(q, k, v, mask=pyext.masks.causal(), return_lse=True, impl="cpu"))
    assert all(torch.equal(x, y) for other in results[1:] for x, y in zip(results[0], other))


def _workspace(stem: str = "attention_sm90", launcher: str = "attention_forward_sm90", **changes) -> int:
    """What the launcher asks for; -1: it does not take the problem."""
    x = torch.zeros(2, 2, 40, 64, dtype=torch.float16)
    p = AttentionProblem(dtype=DTYPES.index(x.dtype), query=view(x), key=view(x), value=view(x), scale=1.0)
    p.batch, p.heads, p.kv_heads, p.q_len, p.k_len, p.head_dim, p.value_dim = 2, 2, 2, 40, 40, 64, 64
    for name, value in changes.items():
        setattr(p, name, value)
    with machine() as gpu:
        bytes_of = getattr(gpu.load(HOPPER[stem]), f"pyext_cuda_{launcher}_workspace")
        bytes_of.restype = ctypes.c_int64
        return bytes_of(ctypes.byref(p))


@pytest.mark.usefixtures("built")
def test_leaves_to_sm_80_what_it_cannot_do():
    x = torch.zeros(2, 2, 40, 64, dtype=torch.float16)
    assert _workspace() >= 0
    assert _workspace(key=view(x[:1].expand(2, 2, 40, 64))) == -1  # no stride for TMA
    assert _workspace(scale=0.0) == -1 and _workspace(scale=-1.0) == -1  # the largest product is not the highest score
    assert _workspace(k_len=0) == -1
    assert _workspace(head_dim=264) == -1 and _workspace(head_dim=60) == -1
    assert _workspace(softcap=3.0) == -1 and _workspace(rel_index=x.data_ptr()) == -1


@pytest.mark.usefixtures("built")
def test_leaves_other_relative_rows_to_sm_80():
    x, rows = torch.zeros(2, 2, 40, 64, dtype=torch.float16), torch.zeros(1, 2, 79, 64, dtype=torch.float16)
    same = dict.fromkeys(("out", "grad_out", "grad_query", "rel_query", "grad_rel_query"), view(x))
    same |= dict(rel_q=view(rows), rel_q_batch=1, rel_q_heads=2, rel_rows=79, rel_index=x.data_ptr())

    def of(**changes) -> int:
        names = ("attention_sm90_relative_backward", "attention_relative_backward_sm90")
        return _workspace(*names, **{**same, **changes})

    assert 0 <= of() < of(grad_rel_q=x.data_ptr())
    assert of(rel_k=view(rows), rel_k_batch=1, rel_k_heads=2) == -1 and of(diag=x.data_ptr()) == -1
    assert of(segment=x.data_ptr()) == -1 and of(head_dim=136) == -1 and of(k_len=0) == -1
    # Linear in the lengths, however many blocks of queries there are.
    short, long = (of(grad_rel_q=x.data_ptr(), q_len=n, k_len=n) for n in (2**14, 2**15))
    assert long < 2.01 * short


# --- Machine code ---


@pytest.mark.skipif(compiled.missing() is not None, reason=str(compiled.missing()))
@pytest.mark.parametrize(("stem", "count"), [("attention_sm90", 24), *zip(hopper.BACKWARD, (30, 14))])
def test_exponentials_run_beside_products(stem, count):
    """ptxas may move a wait in front of the exponentials, or add one, without a word: then nothing overlaps."""
    kernels = hopper.hopper_kernels(stem)
    assert len(kernels) == count
    wrong = {kernel.name: hopper.complaints(kernel) for kernel in kernels}
    assert not any(wrong.values()), wrong


@pytest.mark.skipif(compiled.missing() is not None, reason=str(compiled.missing()))
def test_the_gate_sees_what_would_undo_the_overlap():
    kernel = next(kernel for kernel in hopper.hopper_kernels() if "<bf16, HopperTile<128, 2, 176" in kernel.name)
    wait, lines = "WARPGROUP.DEPBAR.LE gsb0, 0x0", kernel.sass.splitlines()
    one = next(n for n, line in enumerate(lines) if "DEPBAR.LE gsb0, 0x1" in line)
    zero = next(n for n in range(one, len(lines)) if wait in lines[n])

    def moved(source: int, target: int) -> compiled.Kernel:
        """The text of one instruction at the address of another."""
        changed = list(lines)
        changed[target], changed[source] = (
            lines[target].split("*/")[0] + "*/" + lines[source].split("*/", 1)[1],
            lines[source].split("*/")[0] + "*/" + lines[target].split("*/", 1)[1],
        )
        return compiled.Kernel(kernel.name, sass="\n".join(changed))

    first = next(n for n in range(one, zero) if "MUFU.EX2" in lines[n])
    assert hopper.complaints(moved(zero, first - 2))
    products = [n for n, line in enumerate(lines) if "HGMMA" in line]
    in_loop = max(n for n in products if n < one)
    without = "\n".join(line for n, line in enumerate(lines) if n != in_loop)
    assert hopper.complaints(compiled.Kernel(kernel.name, sass=without))
    assert not hopper.complaints(kernel)
