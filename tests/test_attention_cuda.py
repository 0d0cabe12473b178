"""Attention by csrc/cuda/attention_*.cu, on a GPU or the emulator: every call that the kernels take against the fp64
oracle, and who takes the calls that they refuse."""

from __future__ import annotations

import itertools

import pytest
import torch
from simt import attention_mutants, attention_probes
from simt.build import build
from simt.mutants import SMALL, source
from simt.ops import SOURCES, instead_of_cpu
from simt.runtime import COMPLETIONS, SCHEDULES, shared_bytes

import pyext
from pyext import _native
from pyext.ops import _cuda_attention
from support import backends, layouts
from support.cases import arguments, case, check, compare, draw, dtype_name, expected, run
from support.parts import (
    Shape,
    alibi,
    causal,
    diagonal,
    disentangled,
    documents,
    is_causal,
    padding,
    prefix,
    segment,
    shaw,
    t5,
    transformer_xl,
    window,
)

DTYPES = (torch.bfloat16, torch.float16)
STEMS = tuple(stem for stem in SOURCES if stem.startswith("attention_sm80"))
pytestmark = pytest.mark.skipif(not backends.CUDA, reason="neither a GPU with CUDA kernels nor the emulator")
emulated = pytest.mark.skipif(backends.HAS_GPU, reason="the emulator has no place beside a GPU")


@pytest.fixture(params=backends.as_parameters(backends.CUDA))
def cuda(request):
    with request.param.selected():
        yield request.param


@pytest.fixture(scope="module", autouse=True)
def built():
    if not backends.HAS_GPU:
        small = [source(stem, *SMALL[stem]) for stem in STEMS]
        build([*(SOURCES[stem] for stem in STEMS), *small, *(m.kernel for m in attention_mutants.MUTANTS)])


# --- Right ---

#: Past the corners of tiles of 128 queries and 64 keys (backward 128 of either by 64 of the other).
SELF = Shape(1, 2, 2, 140, 140, 64, 64)
LONGER = Shape(2, 2, 1, 70, 170, 64, 64)
SHORTER = Shape(2, 1, 1, 201, 70, 64, 64)
GROUPED = Shape(1, 6, 2, 37, 131, 32, 64)
CASES = [
    case(SELF, is_causal()),
    case(SHORTER, is_causal()),
    case(LONGER, causal()),
    case(SHORTER, causal()),  # the first rows see nothing
    case(GROUPED, causal(), scale=0.3),
    case(LONGER, window(50, None)),
    case(SELF, window(0, 0)),
    case(SELF, padding(queries="random")),
    case(LONGER, padding([0, 0])),
    case(LONGER, padding([1, 169]), causal()),
    case(SHORTER, prefix()),
    case(SELF, documents(count=9)),
    case(LONGER, documents(batched=True, cross=True)),
    case(SELF, documents(), causal(), t5()),
    case(GROUPED, alibi(symmetric=True)),
    case(LONGER, diagonal("1"), padding()),
    case(SHORTER, t5(bidirectional=False), alibi(), window(90, 2), lse=False),
    case(Shape(1, 1, 1, 129, 65, 8, 16), diagonal()),
    case(Shape(1, 1, 1, 63, 64, 72, 96), causal(), diagonal()),
    case(Shape(1, 2, 1, 66, 67, 80, 80), padding()),
    case(Shape(1, 1, 1, 130, 66, 128, 104), alibi(), causal()),
    case(SELF, causal(), q_scale=30.0),
    case(Shape(2, 3, 1, 1, 150, 64, 64), diagonal()),
    case(Shape(1, 1, 1, 1, 1, 64, 64), diagonal()),
]


@pytest.mark.parametrize("number", range(len(CASES)), ids=lambda n: str(CASES[n]))
def test_against_the_oracle(number, cuda, session_seed):
    """Result, LSE and every gradient; the dtypes take turns, in an order of the session."""
    check(CASES[number], DTYPES[(number + session_seed) % 2], cuda, session_seed)


@pytest.mark.parametrize("kind", layouts.VARIED)
def test_layouts(kind, cuda, session_seed):
    """Views of storage that is NaN elsewhere; the incoming gradient is one, too."""
    check(case(Shape(2, 2, 2, 20, 67, 24, 40), diagonal(), layout=kind, grad_layout=kind), *args_of(cuda, session_seed))


def args_of(backend, seed):
    return DTYPES[seed % 2], backend, seed


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
@pytest.mark.parametrize("width, value_width", [(256, 256), (136, 64), (64, 200)])
def test_wide_rows_without_gradient(width, value_width, dtype, cuda, session_seed):
    check_forward(case(Shape(1, 2, 1, 130, 45, width, value_width), causal(), t5()), dtype, session_seed)


def check_forward(which, dtype, seed):
    """Result and LSE of a call without gradients."""
    drawn, reference, eager = expected(which, dtype, seed)
    with torch.no_grad():
        q, k, v = list(drawn.leaves.values())[:3]
        out, lse = pyext.attention(q, k, v, return_lse=True, impl="cuda", **arguments(drawn))
    compare(drawn, {"out": out, "lse": lse}, reference, eager)


#: Tiles are of 64 queries and 32 keys, or (of dK and dV) of 64 keys and 32 queries.
RELATIVE = [
    case(Shape(1, 2, 2, 130, 130, 64, 64), transformer_xl()),
    case(Shape(2, 2, 1, 65, 140, 64, 64), transformer_xl("past"), causal()),
    case(Shape(1, 2, 2, 100, 33, 32, 40), transformer_xl("xlnet", batched=True), padding()),
    case(Shape(1, 2, 2, 70, 70, 96, 80), transformer_xl("few", heads="1"), documents()),
    case(Shape(1, 2, 2, 64, 97, 128, 128), transformer_xl(u=False, v=False), alibi(), window(60, 5)),
    case(Shape(2, 1, 1, 40, 170, 104, 128), shaw(7, heads="h")),
    case(Shape(1, 2, 2, 97, 50, 16, 16), shaw(200), t5(), causal(), layout="padded_rows"),
    case(Shape(1, 1, 1, 130, 60, 64, 64), disentangled("c2p", buckets=16, max_position=60), causal()),
    case(Shape(1, 2, 2, 70, 130, 64, 64), disentangled(buckets=16, max_position=60)),
    case(Shape(2, 2, 1, 97, 60, 72, 64), disentangled(batched=True), padding(), t5()),
    case(Shape(1, 2, 1, 400, 300, 64, 64), shaw(30), documents(cross=True, rolled=True, count=3)),
    case(Shape(2, 2, 2, 70, 97, 64, 64), transformer_xl("xlnet"), segment()),
    case(Shape(1, 2, 2, 65, 40, 128, 128), transformer_xl("xlnet", batched=True), segment(batched=False), causal()),
    case(Shape(1, 3, 3, 33, 90, 64, 32), disentangled(), segment(count=3), diagonal("1"), padding()),
    case(Shape(1, 2, 2, 33, 33, 128, 128), disentangled(heads="1"), causal(), layout="padded_rows"),
    case(Shape(1, 2, 2, 1, 77, 64, 64), transformer_xl()),
    case(Shape(1, 1, 1, 1, 1, 64, 64), transformer_xl()),
    case(Shape(1, 1, 1, 5, 0, 64, 64), transformer_xl()),
]


@pytest.mark.parametrize("number", range(len(RELATIVE)), ids=lambda n: str(RELATIVE[n]))
def test_relative_rows(number, cuda, session_seed):
    check(RELATIVE[number], DTYPES[(number + session_seed) % 2], cuda, session_seed)


@pytest.mark.parametrize("biased", [False, True], ids=["", "diag"])
@pytest.mark.parametrize("empty", ["b", "lq", "lk", "heads", "lq and lk"])
def test_nothing_to_do(empty, biased, cuda, session_seed):
    """Zeros where a sum is empty, and nothing else changes."""
    sizes = dict(b=2, hq=4, hkv=2, lq=5, lk=9, d=16, dv=16)
    names = {"heads": ("hq", "hkv"), "lq and lk": ("lq", "lk")}.get(empty, (empty,))
    sizes.update(dict.fromkeys(names, 0))
    parts = [diagonal()] if biased else [causal()]
    drawn = draw(case(Shape(**sizes), *parts), torch.float16, session_seed)
    got = run(drawn, "cuda")
    for name, wanted in run(drawn, "reference").items():
        torch.testing.assert_close(got[name], wanted, rtol=4e-3, atol=4e-3, msg=lambda m, n=name: f"{n}: {m}")


def test_rows_that_see_nothing(cuda, session_seed):
    """Output 0, LSE -inf and gradients 0, exactly."""
    drawn, reference, eager = expected(case(SHORTER, causal(), t5(dtype=torch.float32)), torch.bfloat16, session_seed)
    got, dead = run(drawn, "cuda"), reference["lse"] == -torch.inf
    assert dead.any() and (got["lse"][dead] == -torch.inf).all()
    assert (got["out"][dead] == 0).all() and (got["grad query"][dead] == 0).all()
    compare(drawn, got, reference, eager)


PACKED = ((5, 9), (0, 4), (70, 70), (30, 0), (1, 40), (35, 90))
WINDOWS = {
    "all": {},
    "causal": dict(is_causal=True),
    "window": dict(mask=lambda lengths: pyext.masks.window(9, 3)),
    "prefix": dict(mask=lambda lengths: pyext.masks.prefix(lengths), is_causal=True),
}


@pytest.mark.parametrize("name", WINDOWS)
def test_packed_sequences(name, cuda):
    """Each sequence as it would be alone, forward and backward, to the bit."""
    q_lengths, k_lengths = (torch.tensor(sizes) for sizes in zip(*PACKED))
    cu_q, cu_k = (torch.cat([x.new_zeros(1), x.cumsum(0)]) for x in (q_lengths, k_lengths))
    q, k, v = (torch.randn(n, h, 64).half() for n, h in ((cu_q[-1], 4), (cu_k[-1], 2), (cu_k[-1], 2)))
    leaves = [x.requires_grad_() for x in (q, k, v)]
    options = dict(WINDOWS[name])
    mask = options.pop("mask", lambda lengths: None)
    lengths = (k_lengths / 2).long()
    out = pyext.varlen_attention(*leaves, cu_q, cu_k, mask=mask(lengths), enable_gqa=True, impl="cuda", **options)
    grad = torch.randn(out.shape).half()
    grads = torch.autograd.grad(out, leaves, grad)
    causal = pyext.masks.causal() if options.get("is_causal") else None
    for n, (rows, columns) in enumerate(zip(*(cu.unfold(0, 2, 1).tolist() for cu in (cu_q, cu_k)))):
        own = [x[slice(*at)].transpose(0, 1)[None] for x, at in zip(leaves, (rows, columns, columns))]
        masks = [m for m in (mask(lengths[n : n + 1]), causal) if m is not None]
        masks = masks[0] & masks[1] if len(masks) == 2 else masks[0] if masks else None
        alone = pyext.attention(*own, mask=masks, enable_gqa=True, impl="reference")
        torch.testing.assert_close(out[slice(*rows)].transpose(0, 1)[None], alone, rtol=2e-3, atol=2e-3)
        wanted = torch.autograd.grad(alone, leaves, grad[slice(*rows)].transpose(0, 1)[None])
        for got, other, at in zip(grads, wanted, (rows, columns, columns)):
            torch.testing.assert_close(got[slice(*at)], other[slice(*at)], rtol=1e-2, atol=1e-2)


def test_no_sequences(cuda):
    q, none = torch.randn(0, 2, 16).half(), torch.zeros(1, dtype=torch.int32)
    assert pyext.varlen_attention(q, q, q, none, none, impl="cuda").shape == (0, 2, 16)


def test_rotary(cuda, session_seed):
    q, k, v = torch.randn(3, 1, 2, 40, 64).bfloat16()
    angle = torch.randn(40, 16)
    rotary = pyext.Rotary(angle.cos(), angle.sin())
    turned = (pyext.rotary(x, angle.cos(), angle.sin(), impl="cuda") for x in (q, k))
    options = dict(is_causal=True, impl="cuda")
    assert torch.equal(pyext.attention(q, k, v, rotary=rotary, **options), pyext.attention(*turned, v, **options))


@pytest.mark.parametrize("dim", [0, 1, 2])
def test_offsets_beyond_2_to_the_31(dim, cuda):
    """Of query, key, value and the incoming gradient."""
    near, results = [torch.randn(2, 2, 2, 16).half() for _ in range(4)], []
    for tensors in (near, [layouts.far_apart(x, dim) for x in near]):
        leaves = [x.detach().requires_grad_() for x in tensors[:3]]
        out = pyext.attention(*leaves, impl="cuda")
        results.append([out, *torch.autograd.grad(out, leaves, tensors[3])])
    for a, b in zip(*results):
        assert torch.equal(a, b)


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("packed", [False, True], ids=["", "packed"])
def test_compiled(packed, dynamic, cuda):
    """In one graph, choice of the backend and lowering included."""
    torch._dynamo.reset()
    q, k, v = (torch.randn(n, 2, 16).half().requires_grad_() for n in (20, 37, 37))
    at_q, at_k = torch.tensor([0, 9, 20]), torch.tensor([0, 1, 37])

    def call(q, k, v):
        if packed:
            return pyext.varlen_attention(q, k, v, at_q, at_k, is_causal=True, impl="cuda")
        q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
        return pyext.attention(q, k, v, mask=pyext.masks.causal(), bias=pyext.bias.alibi(slopes), impl="cuda")

    slopes = torch.randn(2)
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    results = [[out, *torch.autograd.grad(out.sum(), (q, k, v))] for out in (call(q, k, v), compiled(q, k, v))]
    assert all(map(torch.equal, *results))


# --- Without alarm, and the same bits, however threads are scheduled ---


@emulated
@pytest.mark.parametrize("small", [False, True], ids=["tiles", "small tiles"])
@pytest.mark.parametrize("name", ["slopes", "many queries", "relative", "shared"])
def test_same_bits_in_every_schedule(name, small, seed):
    """Races, missing waits and the order of blocks would show; small tiles make many of a few queries and keys."""
    sources = {stem: source(stem, *SMALL[stem]) if small else SOURCES[stem] for stem in STEMS}
    drawn, first = draw(attention_probes.FORWARD[name], torch.float16, seed), None
    every = small and name == "many queries"
    runs = list(itertools.product(SCHEDULES, COMPLETIONS)) if every else list(zip(SCHEDULES, COMPLETIONS))
    for n, (schedule, completion) in enumerate(runs):
        with instead_of_cpu(
            sources, schedule=schedule, completion=completion, preempt=20 * (n % 2), seed=(seed + n) % 2**31
        ):
            got = run(drawn, "cpu")
        first = got if first is None else first
        assert all(torch.equal(got[key], first[key]) for key in first)


@emulated
@pytest.mark.parametrize("mutant", attention_mutants.MUTANTS, ids=str)
def test_defect_is_caught(mutant, seed):
    assert all(outcome != "missed" for outcome in mutant.outcomes(seed % 2**31, attention_mutants.RUNS))


@emulated
@pytest.mark.parametrize("name", attention_probes.FORWARD)
def test_small_tiles(name, seed):
    """Of every probe many tiles, forward and backward."""
    with instead_of_cpu({stem: source(stem, *SMALL[stem]) for stem in STEMS}, seed=seed % 2**31):
        attention_probes.check(name, torch.float16, seed)


# --- Refused ---

REFUSED = {
    "dtype torch.float32 is not supported": dict(dtype=torch.float32),
    "dtype torch.float64 is not supported": dict(dtype=torch.float64),
    "do not know a dense bias": dict(bias=lambda: pyext.bias.dense(torch.randn(5, 9))),
    "do not know a bias of relative rows of keys alone": dict(
        bias=lambda: pyext.bias.disentangled(None, torch.randn(2, 4, 16), buckets=None, max_position=2, scale=1.0)
    ),
    "do not know a segment bias without one of relative rows": dict(
        bias=lambda: pyext.bias.segment(
            torch.randn(1, 2, 5, 2), torch.zeros(5, dtype=torch.int64), torch.zeros(9, dtype=torch.int64)
        )
    ),
    "do not know a dense mask": dict(mask=lambda: pyext.masks.dense(torch.rand(5, 9) < 0.5)),
    "do not know a mask of several ranges of keys per query": dict(mask=lambda: pyext.masks.fixed(3)),
    "do not know sinks": dict(sinks=lambda: torch.zeros(2)),
    "do not know a softcap": dict(softcap=lambda: 3.0),
    "do not know dropout": dict(dropout_p=lambda: 0.1),
    "the head dimension is 20, no positive multiple of 8": dict(d=20),
    "the head dimension of value is 9, no positive multiple of 8": dict(dv=9),
    "the head dimension is 0, no positive multiple of 8": dict(d=0),
    "the head dimension is 264, more than 256": dict(dv=264),
    "the head dimension is 136, more than 128 with a gradient": dict(d=136, gradient=True),
    "the head dimension is 136, more than 128 with relative rows": dict(
        d=136, bias=lambda: pyext.bias.shaw(torch.randn(5, 136), 2)
    ),
}


@pytest.mark.parametrize("why", REFUSED)
def test_refused(why, cuda):
    """`explain` and the error say why; what would be taken without it is."""
    options = dict(REFUSED[why])
    dtype, gradient = options.pop("dtype", torch.bfloat16), options.pop("gradient", False)
    d, dv = options.pop("d", 16), options.pop("dv", 16)
    q, k, v = (torch.randn(1, 2, n, w).to(dtype) for n, w in ((5, d), (9, d), (9, dv)))
    q.requires_grad_(gradient)
    options = {name: make() for name, make in options.items()}
    table = pyext.explain(pyext.attention, q, k, v, **options)
    assert why in table["cuda"] and table.auto != "cuda"
    with pytest.raises(NotImplementedError, match=f"cuda: .*{why}"):
        pyext.attention(q, k, v, impl="cuda", **options)
    plain = [torch.zeros(1, 2, n, 16, dtype=torch.bfloat16) for n in (5, 9, 9)]
    assert pyext.explain(pyext.attention, *plain)["cuda"] == "accepts"


def test_refused_for_packed_sequences(cuda):
    q, at = torch.randn(9, 2, 16).half(), torch.tensor([0, 4, 9])
    table = pyext.explain(pyext.varlen_attention, q, q, q, at, at, bias=pyext.bias.alibi(torch.ones(2)))
    assert table["cuda"] == "its kernels do not know a bias over packed sequences"


def test_masks_in_several_passes(cuda):
    """Ranges in another order of the keys are what the kernels take; tables of blocks are not."""
    q = torch.randn(1, 1, 300, 16).half()
    order = pyext.masks.permutation(torch.randperm(300))
    assert pyext.explain(pyext.attention, q, q, q, mask=order)["cuda"] == "accepts"
    got = pyext.attention(q, q, q, mask=order, impl="cuda")
    torch.testing.assert_close(got, pyext.attention(q, q, q, mask=order, impl="reference"), rtol=2e-3, atol=2e-3)
    fixed = pyext.masks.fixed(9) & pyext.masks.causal()
    assert "several ranges" in pyext.explain(pyext.attention, q, q, q, mask=fixed)["cuda"]


@emulated
@pytest.mark.parametrize("width", _cuda_attention.TILES)
def test_shared_memory_is_what_the_launchers_ask_for(width):
    tiles = _cuda_attention.TILES[width]
    for strip in (False, True):
        q = torch.randn(1, 1, 9, width).half().requires_grad_(tiles.backward is not None)
        values = torch.zeros(1, 17, requires_grad=q.requires_grad)
        with backends.CUDA[0].selected():
            out = pyext.attention(q, q, q, bias=pyext.bias.diagonal(values) if strip else None, impl="cuda")
            assert shared_bytes() == tiles.forward
            if tiles.backward is not None:
                out.sum().backward()
                assert shared_bytes() == (tiles.strip_gradient if strip else tiles.backward)


@emulated
@pytest.mark.parametrize("both", [False, True], ids=["rows of queries", "rows of both"])
@pytest.mark.parametrize("width", [64, 96, 128])
def test_shared_memory_with_relative_rows(width, both):
    tiles, q = _cuda_attention.TILES[width], torch.randn(1, 1, 9, width).half().requires_grad_()
    table = torch.zeros(1, 2, width, dtype=q.dtype)
    rows = pyext.bias.disentangled(table, table if both else None, buckets=None, max_position=1, scale=1.0)
    with backends.CUDA[0].selected():
        out = pyext.attention(q, q, q, bias=rows, impl="cuda")
        assert shared_bytes() == (tiles.relative_both if both else tiles.relative)
        out.sum().backward()
        assert shared_bytes() == (tiles.relative_both_backward if both else tiles.relative_backward)


def test_gpus_with_less_shared_memory(monkeypatch):
    """sm_86 and sm_89 have 99 KiB for a block."""
    monkeypatch.setattr(_native, "shared_memory", lambda device: 99 << 10)
    q = torch.empty(1, 1, 3, 128, dtype=torch.float16, device="meta")

    def refusal(width, gradient, forward_only_on=None):
        x = q[..., :width].detach().requires_grad_(gradient)
        problem = pyext._primitives.AttentionProblem(x, x, x)
        return _cuda_attention._limit_of_memory(problem, width, gradient)

    assert [width for width in (64, 96, 128) if refusal(width, False) is None] == [64, 96, 128]
    assert [width for width in (64, 96, 128) if refusal(width, True) is None] == [64]
    assert refusal(128, True) == "a block of the GPU has 101376 bytes of shared memory, and its kernels need 161336"


def test_not_in_the_tests_of_all_calls():
    """What takes some calls only does not run where any call may come."""
    assert not any(b.impl == "cuda" for b in backends.of("attention"))
