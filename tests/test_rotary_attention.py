"""attention(..., rotary=pyext.Rotary(...)): every path, forward and gradients, positions by default and given."""

from __future__ import annotations

import pytest
import torch
import torch.autograd.forward_ad as forward_ad

import pyext
from support import oracle
from support.cases import DTYPES, dtype_name


def leaves_of(b, hq, hkv, lq, lk, d, r, dtype, batch=False, seed=0):
    """query, key, value, cos, sin."""
    generator = torch.Generator().manual_seed(seed)
    tables = ((b, lk, r // 2) if batch else (lk + 3, r // 2),) * 2
    table_dtype = torch.float64 if dtype == torch.float64 else torch.float32
    sizes = ((b, hq, lq, d), (b, hkv, lk, d), (b, hkv, lk, 24), *tables)
    kinds = (dtype, dtype, dtype, table_dtype, table_dtype)
    return [torch.randn(s, generator=generator).to(t).requires_grad_() for s, t in zip(sizes, kinds)]


def gradients(out, leaves):
    weight = torch.linspace(-1, 1, out.numel(), dtype=torch.float64).view(out.shape).to(out.dtype)
    return [out, *torch.autograd.grad(out, leaves, weight)]


def close(backend, tight: float) -> dict[str, float]:
    """Tolerances of the widest dtype; `tight` those of fp64."""
    return {"rtol": tight, "atol": tight} if backend.widest == torch.float64 else {"rtol": 1e-4, "atol": 2e-5}


SHAPES = {  # b, hq, hkv, lq, lk, d, r
    "self": (2, 4, 4, 40, 40, 32, 32),
    "grouped, partial": (2, 6, 2, 70, 70, 40, 24),
    "cross": (1, 4, 4, 33, 80, 16, 16),
    "decode": (2, 8, 2, 1, 700, 64, 64),
    "few queries": (1, 4, 1, 5, 300, 64, 16),
    "no keys rotated": (1, 2, 2, 9, 9, 8, 0),
    "empty": (0, 2, 2, 9, 9, 8, 4),
    "no queries": (1, 2, 2, 0, 9, 8, 4),
}


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
@pytest.mark.parametrize("name", SHAPES)
def test_is_attention_of_rotated_query_and_key(name, dtype, interleaved, backend):
    """The same bits as rotating first, in every gradient; the last query stands at the last key."""
    lq, lk = SHAPES[name][3:5]
    for batch in (False, True):
        q, k, v, cos, sin = leaves = leaves_of(*SHAPES[name], dtype, batch)
        options = dict(mask=pyext.masks.causal(), enable_gqa=True, impl=backend.impl)
        turn = dict(interleaved=interleaved, impl=backend.impl)
        turned_q = pyext.rotary(q, cos[..., lk - lq : lk, :], sin[..., lk - lq : lk, :], **turn)
        wanted = pyext.attention(turned_q, pyext.rotary(k, cos, sin, **turn), v, **options)
        rotation = pyext.Rotary(cos, sin, interleaved=interleaved)
        got = pyext.attention(q, k, v, rotary=rotation, **options)
        for a, b in zip(gradients(got, leaves), gradients(wanted, leaves)):
            assert a.dtype == b.dtype and torch.equal(a, b)
        with torch.no_grad():  # where the kernel rotates itself
            assert torch.equal(pyext.attention(q, k, v, rotary=rotation, **options), wanted)


@pytest.mark.parametrize("name", ["self", "grouped, partial", "decode"])
def test_against_the_dense_formula(name, backend):
    """Complex rotation, explicit scores, in the widest dtype."""
    b, hq, hkv, lq, lk, d, r = SHAPES[name]
    q, k, v, angle, _ = leaves_of(*SHAPES[name], backend.widest)
    cos, sin = (f(angle).detach().requires_grad_() for f in (torch.cos, torch.sin))
    positions_q, positions_k = torch.randint(0, lk, (b, lq)), torch.randperm(lk)

    def turned(x, positions):
        turn = torch.complex(cos[positions], sin[positions])
        turn = turn[:, None] if positions.dim() == 2 else turn
        pair = torch.complex(x[..., : r // 2], x[..., r // 2 : r]) * turn
        return torch.cat([pair.real, pair.imag, x[..., r:]], -1)

    leaves = [q, k, v, cos, sin]
    wanted, _ = oracle.attention(turned(q, positions_q), turned(k, positions_k), v, scale=0.3)
    rotation = pyext.Rotary(cos, sin, positions_q=positions_q, positions_k=positions_k)
    got = pyext.attention(q, k, v, scale=0.3, rotary=rotation, enable_gqa=True, impl=backend.impl)
    for a, b in zip(gradients(got, leaves), gradients(wanted, leaves)):
        torch.testing.assert_close(a, b, **close(backend, 1e-10))
    with torch.no_grad():
        again = pyext.attention(q, k, v, scale=0.3, rotary=rotation, enable_gqa=True, impl=backend.impl)
    assert torch.equal(again, got)


@pytest.mark.parametrize("given", [False, True], ids=["by default", "given"])
def test_packed_sequences(given, backend):
    """Positions are those of the sequence: as attention, one sequence after the other."""
    lengths = ((3, 5), (0, 4), (9, 9), (1, 30))
    cu_q, cu_k = (torch.tensor([0, *sizes]).cumsum(0) for sizes in zip(*lengths))
    q, k, v = (torch.randn(n, h, 16, dtype=backend.widest) for n, h in ((13, 4), (48, 2), (48, 2)))
    cos, sin = (torch.randn(40, 6, dtype=backend.widest) for _ in range(2))
    leaves = [x.requires_grad_() for x in (q, k, v, cos, sin)]
    positions = {}
    if given:
        positions = {"positions_q": torch.randint(0, 40, (13,)), "positions_k": torch.randint(0, 40, (48,))}
    options = dict(enable_gqa=True, impl=backend.impl)
    got = pyext.varlen_attention(q, k, v, cu_q, cu_k, rotary=pyext.Rotary(cos, sin, **positions), **options)
    parts = []
    for n in range(len(lengths)):
        rows, columns = slice(cu_q[n], cu_q[n + 1]), slice(cu_k[n], cu_k[n + 1])
        local = {name: p[rows if name == "positions_q" else columns] for name, p in positions.items()}
        one = (x[part].transpose(0, 1)[None] for x, part in ((q, rows), (k, columns), (v, columns)))
        part = pyext.attention(*one, rotary=pyext.Rotary(cos, sin, **local), **options)
        parts.append(part[0].transpose(0, 1))
    for a, b in zip(gradients(got, leaves), gradients(torch.cat(parts), leaves)):
        torch.testing.assert_close(a, b, **close(backend, 1e-11))
    with torch.no_grad():
        again = pyext.varlen_attention(q, k, v, cu_q, cu_k, rotary=pyext.Rotary(cos, sin, **positions), **options)
    assert torch.equal(again, got)


@pytest.mark.parametrize("name", ["strided", "permutation"])
def test_masks_that_reorder_the_sequence(name, backend):
    """A token is rotated by its own position, wherever a mask in several passes moves it."""
    masks = pyext.masks
    mask = masks.strided(5) & masks.causal() if name == "strided" else masks.permutation(torch.randperm(40))
    q, k, v, cos, sin = leaves = leaves_of(*SHAPES["self"], backend.widest)
    got = pyext.attention(q, k, v, mask=mask, rotary=pyext.Rotary(cos, sin), impl=backend.impl)
    turned = (pyext.rotary(x, cos, sin, impl=backend.impl) for x in (q, k))
    wanted = pyext.attention(*turned, v, mask=mask, impl=backend.impl)
    for a, b in zip(gradients(got, leaves), gradients(wanted, leaves)):
        assert torch.equal(a, b)


def test_token_by_token_equals_all_at_once(backend):
    """Causal decoding, one query at a time against the keys so far."""
    q, k, v, cos, sin = (x.detach() for x in leaves_of(1, 4, 2, 20, 20, 32, 32, backend.widest))
    options = dict(rotary=pyext.Rotary(cos, sin), enable_gqa=True, impl=backend.impl)
    whole = pyext.attention(q, k, v, mask=pyext.masks.causal(), **options)
    for n in range(20):
        step = pyext.attention(q[:, :, n : n + 1], k[:, :, : n + 1], v[:, :, : n + 1], **options)
        torch.testing.assert_close(step[:, :, 0], whole[:, :, n], **close(backend, 1e-12))


def test_leading_dimensions_and_one_key_head(backend):
    """SDPA's shapes: several batch dimensions, no heads, broadcast keys."""
    cos, sin = torch.randn(7, 4), torch.randn(7, 4)
    for sizes in (((7, 8),) * 3, ((3, 7, 8),) * 3, ((2, 3, 4, 7, 8),) * 3, ((2, 4, 7, 8), (2, 1, 7, 8), (2, 1, 7, 8))):
        q, k, v = (torch.randn(size) for size in sizes)
        got = pyext.attention(q, k, v, rotary=pyext.Rotary(cos, sin), impl=backend.impl)
        q, k = (pyext.rotary(x.reshape(-1, 1, 7, 8), cos, sin, impl=backend.impl).view(x.shape) for x in (q, k))
        torch.testing.assert_close(got, pyext.attention(q, k, v, impl=backend.impl), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("table_dtype", DTYPES, ids=dtype_name)
@pytest.mark.parametrize("layout", ["heads first", "rows first", "strided"])
def test_layouts_and_tables_of_other_dtypes(table_dtype, layout, backend):
    """Keys and tables of any strides; tables whose rows are shorter than a vector, or are converted."""
    for d, r in ((72, 72), (40, 20), (16, 6)):
        q, k, v, cos, sin = (x.detach() for x in leaves_of(2, 4, 2, 3, 300, d, r, torch.bfloat16))
        cos, sin = (torch.stack([x, x], -2).to(table_dtype)[:, 0] for x in (cos, sin))
        if layout == "rows first":
            k = k.transpose(1, 2).contiguous().transpose(1, 2)
        elif layout == "strided":
            k = torch.stack([k, k], -1)[..., 0]
        options = dict(enable_gqa=True, impl=backend.impl)
        got = pyext.attention(q, k, v, rotary=pyext.Rotary(cos, sin), **options)
        turned_q = pyext.rotary(q, cos[297:300], sin[297:300], impl=backend.impl)
        wanted = pyext.attention(turned_q, pyext.rotary(k, cos, sin, impl=backend.impl), v, **options)
        assert torch.equal(got, wanted)


def test_kernels_rotate_what_they_read(backend, monkeypatch):
    """The CPU kernels make no rotated copies; the reference rotates each key head of grouped heads once."""
    from pyext.ops import rotary

    calls, rotate = [], rotary.rotate
    monkeypatch.setattr(
        rotary, "rotate", lambda problem, name: calls.append((name, problem.x.shape[1])) or rotate(problem, name)
    )
    q, k, v, cos, sin = leaves_of(*SHAPES["grouped, partial"], torch.float32)
    pyext.attention(q, k, v, rotary=pyext.Rotary(cos, sin), enable_gqa=True, impl=backend.impl)
    assert calls == ([] if backend.impl == "cpu" else [(backend.impl, 6), (backend.impl, 2)])


def test_explain_rotates_nothing(monkeypatch, cpu):
    monkeypatch.setattr("pyext.ops.rotary.rotate", None)
    q, k, v, cos, sin = leaves_of(*SHAPES["self"], torch.float32)
    assert pyext.explain(pyext.attention, q, k, v, rotary=pyext.Rotary(cos, sin)).auto == "cpu"


def test_forward_mode_through_the_tables(cpu):
    q, k, v, cos, sin = (x.detach() for x in leaves_of(*SHAPES["self"], torch.float64))
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(cos, torch.ones_like(cos))
        out = pyext.attention(q, k, v, rotary=pyext.Rotary(dual, sin))
        assert forward_ad.unpack_dual(out).tangent.abs().max() > 0
        assert forward_ad.unpack_dual(pyext.rotary(k, dual, sin)).tangent.abs().max() > 0
        with pytest.raises(NotImplementedError, match="no forward-mode derivative"):
            pyext.attention(q, k, v, rotary=pyext.Rotary(dual, sin), impl="cpu")


# --- Bad input ---

Q, K = torch.randn(2, 4, 5, 8), torch.randn(2, 4, 7, 8)
TABLE, NARROW = torch.randn(9, 4), torch.randn(6, 4)
REFUSED = {
    "tensor": (lambda: (Q, K, TABLE), TypeError, r"rotary must be a pyext\.Rotary, got Tensor"),
    "wide": (
        lambda: (Q, K, pyext.Rotary(torch.randn(9, 5), torch.randn(9, 5))),
        ValueError,
        r"Rotary cos must have shape .* with R/2 <= 4 to match the 8 features of key, got \(9, 5\)",
    ),
    "short": (
        lambda: (Q, K, pyext.Rotary(NARROW, NARROW)),
        ValueError,
        r"Rotary cos must have shape \(L_max, R/2\) with L_max >= 7 without positions, got \(6, 4\)",
    ),
    "more queries than keys": (
        lambda: (K, Q, pyext.Rotary(TABLE, TABLE)),
        ValueError,
        r"Rotary positions_q must be given for more queries \(7\) than keys \(5\), got None",
    ),
    "positions_q, length": (
        lambda: (Q, K, pyext.Rotary(TABLE, TABLE, positions_q=torch.arange(4))),
        ValueError,
        r"Rotary positions_q must have shape \(5,\) or \(2, 5\) to match query, got \(4,\)",
    ),
    "positions_k, range": (
        lambda: (Q, K, pyext.Rotary(TABLE, TABLE, positions_k=torch.arange(7) + 3)),
        ValueError,
        r"Rotary positions_k must lie in \[0, 9\), the rows of cos and sin, got 9",
    ),
    "batch": (
        lambda: (Q, K, pyext.Rotary(torch.randn(3, 7, 4), torch.randn(3, 7, 4))),
        ValueError,
        r"Rotary cos must have shape \(2, L, R/2\) \(or 1 in batch\) to match key, got \(3, 7, 4\)",
    ),
    "cos, list": (lambda: (Q, K, pyext.Rotary([1.0], TABLE)), TypeError, r"Rotary cos must be a torch\.Tensor"),
    "sin, shape": (lambda: (Q, K, pyext.Rotary(TABLE, NARROW)), ValueError, r"Rotary sin must have shape \(9, 4\)"),
    "interleaved": (
        lambda: (Q, K, pyext.Rotary(TABLE, TABLE, interleaved="no")),
        TypeError,
        r"Rotary interleaved must be a bool, got str",
    ),
    "positions_k, float": (
        lambda: (Q, K, pyext.Rotary(TABLE, TABLE, positions_k=torch.randn(7))),
        TypeError,
        r"Rotary positions_k must be an integer tensor",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_bad_input(name):
    make, error, message = REFUSED[name]
    with pytest.raises(error, match=message):
        q, k, rotation = make()
        pyext.attention(q, k, k, rotary=rotation)


def test_bad_packed_input():
    x, cu_q, cu_k = torch.randn(6, 2, 8), torch.tensor([0, 4, 6]), torch.tensor([0, 3, 6])
    with pytest.raises(TypeError, match=r"rotary must be a pyext\.Rotary, got int"):
        pyext.varlen_attention(x, x, x, cu_q, cu_k, rotary=1)
    with pytest.raises(ValueError, match=r"Rotary positions_q \(by default the last query .*\) must lie in .* got -1"):
        pyext.varlen_attention(x, x, x, cu_q, cu_k, rotary=pyext.Rotary(TABLE, TABLE))
    with pytest.raises(ValueError, match=r"Rotary positions_k must have shape \(6,\).* to match k, got \(7,\)"):
        rotation = pyext.Rotary(TABLE, TABLE, positions_q=torch.arange(6), positions_k=torch.arange(7))
        pyext.varlen_attention(x, x, x, cu_q, cu_k, rotary=rotation)
