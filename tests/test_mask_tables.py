"""Block tables: what they hold, when they are made, and that a finished one may be handed to any call."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from torch._subclasses import FakeTensorMode
from torch.nn.attention.flex_attention import BlockMask, create_block_mask

import pyext
from pyext import _dispatch, masks
from pyext._primitives import BLOCK, UNBOUNDED, AttentionProblem, Sizes
from pyext.masks import _base, _tables
from pyext.ops import _passes
from pyext.reference.attention import visibility

LENGTHS = [(128, 128), (127, 129), (300, 300), (130, 400), (400, 130), (1, 700), (256, 512), (0, 130), (130, 0)]


def lower(mask, lq, lk, batch=1, heads=1):
    query, key = torch.zeros(batch, heads, lq, 4), torch.zeros(batch, heads, lk, 4)
    bias = pyext.bias.alibi(torch.zeros(heads))  # with a bias nothing is reordered
    return _dispatch.lower(pyext.attention, query, key, key, mask=mask, bias=bias)


def seen(mask, lq, lk, batch=1, heads=1):
    return visibility(lower(mask, lq, lk, batch, heads)).expand(batch, heads, lq, lk)


def positions(lq, lk):
    return torch.arange(lq)[:, None] + lk - lq, torch.arange(lk)[None]


def image(i, j, text, side, near):
    t, u = i - text, j - text
    rows = torch.div(t, side, rounding_mode="floor") - torch.div(u, side, rounding_mode="floor")
    return (j < text) | ((t >= 0) & (u >= 0) & (u <= t) & near(rows.abs(), (t % side - u % side).abs()))


def drawn(lq, lk):
    """name -> (mask, its dense bool tensor), with parameters that differ in every run."""

    def number(low, high):
        return int(torch.randint(low, high + 1, ()))

    i, j = positions(lq, lk)
    s, f, side, text, kernel = number(1, 200), number(1, 200), number(1, 60), number(0, 300), number(1, 9)
    c = number(1, f)
    order = torch.randperm(lk)
    rank = torch.empty_like(order)
    rank[order] = torch.arange(lk)
    ids_q, ids_k = torch.randint(0, 5, (lq,)), torch.randint(0, 5, (lk,))
    table = torch.rand(lq, lk) < 0.01
    made = {
        f"strided({s})": (masks.strided(s), (i - j < s) | ((i - j) % s == 0)),
        f"fixed({f},{c})": (masks.fixed(f, c), (i // f == j // f) | (j % f >= f - c)),
        f"rows({text},{side})": (masks.image_rows(text, side), image(i, j, text, side, lambda r, c: r == 0)),
        f"columns({text},{side})": (masks.image_columns(text, side), image(i, j, text, side, lambda r, c: c == 0)),
        f"conv({text},{side},{kernel})": (
            masks.image_conv(text, side, kernel),
            image(i, j, text, side, lambda r, c: torch.maximum(r, c) <= kernel // 2),
        ),
        "documents": (masks.documents(ids_q, ids_k), ids_q[:, None] == ids_k),
        "function": (masks.from_function(lambda b, h, i, j: table[i, j], lq, lk), table),
        "causal": (masks.causal(), j <= i),
        f"window({s})": (masks.window(s, 3), (j >= i - s) & (j <= i + 3)),
    }
    if lq <= lk:
        made["permutation"] = masks.permutation(order), rank[j] <= rank[i]
        made["query stream"] = masks.permutation(order, exclude_self=True), rank[j] < rank[i]
    return made


@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
def test_shows(lengths):
    for name, (mask, allowed) in drawn(*lengths).items():
        assert torch.equal(seen(mask, *lengths)[0, 0], allowed), name
        assert torch.equal(seen(mask & masks.causal(), *lengths)[0, 0], allowed & drawn(*lengths)["causal"][1]), name


@pytest.mark.parametrize("lengths", LENGTHS[:6], ids=str)
def test_combinations(lengths):
    made = list(drawn(*lengths).items())
    for n, (name, (mask, allowed)) in enumerate(made):
        for other, (second, more) in made[n + 1 :]:
            assert torch.equal(seen(mask | second, *lengths)[0, 0], allowed | more), (name, other)
            assert torch.equal(seen(mask & second, *lengths)[0, 0], allowed & more), (name, other)
            third, most = made[0][1]
            assert torch.equal(seen((mask & second) | third, *lengths)[0, 0], (allowed & more) | most), (name, other)


def counted(passes, lq, lk, batch):
    """How often each pair is visible in the passes of a mask, put back in order."""
    count = torch.zeros(batch, lq, lk, dtype=torch.int64)
    query, key = torch.zeros(batch, 1, lq, 4), torch.zeros(batch, 1, lk, 4)
    for step in passes:
        for limits in step.limits:
            part = visibility(AttentionProblem(query, key, key, **limits._asdict())).expand(batch, 1, lq, lk)[:, 0]
            if step.queries is not None:
                part = torch.stack([p[r] for p, r in zip(part, step.queries.inverse.expand(batch, -1))])
            if step.keys is not None:
                part = torch.stack([p[:, c] for p, c in zip(part, step.keys.inverse.expand(batch, -1))])
            count += part
    return count


@pytest.mark.parametrize("lengths", [pair for pair in LENGTHS if pair[1]], ids=str)
def test_parts_are_the_mask(lengths):
    """Disjoint, and all of it: every visible pair is in one part, alone and within the ranges of others."""
    lq, lk = lengths
    i, j = positions(lq, lk)
    sizes = Sizes((2,), 1, lq, lk, torch.device("cpu"), torch.float32)
    ends = torch.tensor([lk // 2 + 3, lk])
    for name, (mask, allowed) in drawn(lq, lk).items():
        for combined, within in (
            (mask, torch.ones(1, 1, dtype=torch.bool)),
            (mask & masks.padding(ends), (j < ends[:, None, None])),
            (masks.window(70, 9) & mask, (j >= i - 70) & (j <= i + 9)),
        ):
            for right in (0, UNBOUNDED):
                passes = combined.passes(sizes, right)
                reorders = name.startswith(("strided", "fixed", "columns"))
                reorders = reorders or (name in ("permutation", "query stream") and combined is mask and right != 0)
                assert (passes is not None) == reorders, name
                if reorders:
                    wanted = (allowed & within & (j - i <= right)).expand(2, lq, lk).long()
                    assert torch.equal(counted(passes, lq, lk, 2), wanted), name


def check_table(problem, lq, lk):
    """The invariants that kernels rely on."""
    offsets, index, bits = problem.block_offsets, problem.block_index, problem.block_bits
    rows, columns = -(-lq // BLOCK), -(-lk // BLOCK)
    assert offsets.dtype == index.dtype == torch.int32 and bits.dtype == torch.uint8
    assert offsets.shape[2] == rows + 1 and index.shape[1] == 2 and bits.shape[1:] == (BLOCK, BLOCK // 8)
    assert offsets.is_contiguous() and index.is_contiguous() and bits.is_contiguous()
    shown = (bits[..., None] >> torch.arange(8, dtype=torch.uint8) & 1).flatten(-2).bool()
    used = set()
    for b, h, r in torch.cartesian_prod(*map(torch.arange, (*offsets.shape[:2], rows))).tolist():
        first, last = offsets[b, h, r].item(), offsets[b, h, r + 1].item()
        listed = index[first:last, 0]
        assert (listed.diff() > 0).all() and ((listed >= 0) & (listed < columns)).all()
        for column, bitmap in index[first:last].tolist():
            exists = torch.zeros(BLOCK, BLOCK, dtype=torch.bool)
            exists[: lq - r * BLOCK, : lk - column * BLOCK] = True
            assert bitmap >= -1
            if bitmap >= 0:
                used.add(bitmap)
                block = shown[bitmap]
                assert block.any() and not (block & ~exists).any() and not torch.equal(block, exists)
    assert used == set(range(len(bits)))
    assert len(torch.unique(bits, dim=0)) == len(bits)


@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
def test_invariants(lengths):
    for mask, _ in drawn(*lengths).values():
        for combined in (mask | masks.window(0, 0), mask & masks.fixed(7, 2), mask & masks.strided(150)):
            check_table(lower(combined, *lengths), *lengths)


def test_by_batch_and_head():
    for which in ((2, 3), (1, 3), (2, 1)):
        table = torch.rand(*which, 200, 300) < 0.3
        table[-1, -1, :128] = False
        table[-1, -1, 128:, :128] = True
        mask = masks.from_function(lambda b, h, i, j, t=table: t[b % len(t), h % t.shape[1], i, j], 200, 300)
        problem = lower(mask, 200, 300, 2, 3)
        check_table(problem, 200, 300)
        assert torch.equal(visibility(problem).expand(2, 3, 200, 300), table.expand(2, 3, 200, 300))


def size_of(problem):
    return sum(t.numel() * t.element_size() for t in (problem.block_offsets, problem.block_index, problem.block_bits))


@pytest.mark.parametrize(
    "mask",
    [
        masks.strided(128),
        masks.fixed(128, 8),
        masks.image_rows(77, 90),
        masks.image_columns(77, 90),
        masks.image_conv(77, 90, 11),
        masks.window(1000, 0) | masks.strided(64),
    ],
    ids=repr,
)
def test_closed_forms_are_small(mask):
    length = 2**13
    assert size_of(lower(mask, length, length)) < length**2 / 8 / 8


def test_edges_count_as_full():
    """A block that is cut off by the end is full where all that exists of it is visible."""
    problem = lower(masks.causal() | masks.window(None, None), 200, 200)
    assert problem.block_bits.shape[0] == 0 and (problem.block_index[:, 1] == -1).all()


# --- Kept -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def built(monkeypatch):
    """How many tables are built."""
    count = []
    build = _tables.build
    monkeypatch.setattr(_tables, "build", lambda *args: count.append(1) or build(*args))
    _base._closed.cache_clear()
    yield count
    _base._closed.cache_clear()


def test_closed_forms_are_built_once_by_value(built):
    first = lower(masks.strided(9) & masks.padding(torch.tensor([100])), 150, 150)
    for mask in (
        masks.strided(9),
        masks.strided(9) & masks.causal(),
        masks.padding(torch.tensor([7])) & masks.strided(9),
    ):
        assert lower(mask, 150, 150, heads=3).block_bits is first.block_bits
    assert len(built) == 1
    lower(masks.strided(9), 150, 151), lower(masks.strided(8), 150, 150), lower(masks.fixed(9), 150, 150)
    assert len(built) == 4
    lower(masks.strided(9) | masks.window(3, 0), 150, 150), lower(masks.strided(9) | masks.window(3, 0), 150, 150)
    assert len(built) == 5


def test_tensors_keep_their_table_until_written_to(built):
    ids = torch.tensor([0, 1, 0, 1, 2, 2])
    mask = masks.documents(ids)
    first = seen(mask, 6, 6)
    assert torch.equal(seen(mask, 6, 6), first) and len(built) == 1
    ids[1] = 2
    assert not torch.equal(seen(mask, 6, 6), first) and len(built) == 2
    either = mask | masks.causal()
    seen(either, 6, 6), seen(either, 6, 6)
    assert len(built) == 3
    ids[1] = 1
    seen(either, 6, 6)
    assert len(built) == 4
    function = masks.from_function(lambda b, h, i, j: (i + j + h) % 2 == 0, 6, 6)
    seen(function, 6, 6), seen(function, 6, 6), seen(function, 6, 6, heads=2)
    assert len(built) == 6


def test_nothing_is_kept_in_inference_mode(built):
    with torch.inference_mode():
        ids = torch.tensor([0, 1, 0, 1])
        mask = masks.documents(ids)
        before = seen(mask, 4, 4)
        ids[0] = 1
        assert not torch.equal(seen(mask, 4, 4), before)
        table = lower(masks.strided(5), 140, 140)
    assert not table.block_bits.is_inference()
    assert lower(masks.strided(5), 140, 140).block_bits is table.block_bits


def test_nothing_outlives_its_mask():
    table = torch.rand(5, 5) < 0.5
    mask = masks.from_function(lambda b, h, i, j: table[i, j], 5, 5) | masks.causal()
    kept, gone = lower(mask, 5, 5), weakref.ref(mask)
    assert mask.kept() and kept is not None
    del mask, kept
    gc.collect()
    assert gone() is None


def test_passes_are_made_once(cpu_best, monkeypatch):
    monkeypatch.setattr(_passes, "LEAST_QUERIES", 9)
    mask, found = masks.image_columns(20, 7) & masks.causal(), []
    attend = _passes.attend
    monkeypatch.setattr(
        _passes, "attend", lambda problem, passes, backend: found.append(passes) or attend(problem, passes, backend)
    )
    q = torch.randn(1, 2, 90, 8)
    pyext.attention(q, q, q, mask=mask), pyext.attention(q, q, q, mask=masks.image_columns(20, 7) & masks.causal())
    assert found[0] is found[1]


# --- build() --------------------------------------------------------------------------------------------------------


def test_built_masks_are_the_masks():
    for lq, lk in ((150, 150), (130, 400)):
        for name, (mask, allowed) in drawn(lq, lk).items():
            made = mask.build(lq, lk)
            assert torch.equal(seen(made, lq, lk, 2, 3)[1, 2], allowed), name
            lengths = torch.tensor([lk, 9])
            got = seen(made & masks.padding(lengths), lq, lk, 2, 3)
            assert torch.equal(got, (allowed & (torch.arange(lk) < lengths[:, None, None, None])).expand_as(got)), name
            assert torch.equal(seen(made | masks.window(2, 0), lq, lk), seen(mask | masks.window(2, 0), lq, lk)), name


def test_build_refuses():
    made = masks.strided(3).build(5, 6)
    with pytest.raises(ValueError, match=r"was built for \(Lq, Lk\) = \(5, 6\), got query and key with \(6, 6\)"):
        lower(made, 6, 6)
    by_head = masks.from_function(lambda b, h, i, j: (i + j + h + b) % 2 == 0, 5, 6).build(5, 6, batch=2, heads=3)
    assert seen(by_head, 5, 6, 2, 3).any()
    with pytest.raises(ValueError, match=r"was built for \(batch, heads\) = \(2, 3\), got a query with \(2, 4\)"):
        lower(by_head, 5, 6, 2, 4)
    with pytest.raises(TypeError, match="build Lq must be an int"):
        masks.strided(3).build(5.0, 6)
    with pytest.raises(ValueError, match="build heads must be a non-negative int"):
        masks.strided(3).build(5, 6, heads=-1)
    with pytest.raises(ValueError, match="a built mask: not available in varlen_attention"):
        q, offsets = torch.zeros(5, 1, 4), torch.tensor([0, 5])
        pyext.varlen_attention(q, q, q, offsets, offsets, mask=masks.strided(3).build(5, 5))


# --- FlexAttention --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [16, 64, 128, 200, (32, 96), (128, 1024)], ids=str)
def test_block_masks_of_any_size(size):
    def fn(b, h, i, j):
        return (j <= i) & ((i - j) // 40 % 2 == 0) | (j < 30 * h)

    for lq, lk in ((128, 128), (200, 333)):
        made = create_block_mask(fn, None, 2, lq, lk, "cpu", size)
        h, i, j = torch.arange(2).view(2, 1, 1), torch.arange(lq)[:, None], torch.arange(lk)
        problem = lower(made, lq, lk, 3, 2)
        check_table(problem, lq, lk)
        assert torch.equal(visibility(problem)[0], fn(0, h, i, j))
        assert torch.equal(seen(masks.causal() & made, lq, lk, 1, 2), seen(made & masks.causal(), lq, lk, 1, 2))
        union = seen(made | masks.window(3, 3), lq, lk, 1, 2)
        assert torch.equal(union, seen(masks.window(3, 3) | made, lq, lk, 1, 2))
        assert torch.equal(union, seen(made, lq, lk, 1, 2) | seen(masks.window(3, 3), lq, lk))


def test_block_lists_decide_before_mask_mod():
    """Full blocks are full and absent ones empty, whatever mask_mod says; it speaks in partial ones only."""
    made = BlockMask.from_kv_blocks(
        torch.tensor([[[1, 0]]]), torch.tensor([[[[1, 0, 0], [0, 0, 0]]]]), torch.tensor([[[1, 2]]]),
        torch.tensor([[[[2, 0, 0], [0, 1, 0]]]]), BLOCK_SIZE=100, mask_mod=lambda b, h, i, j: (i + j) % 2 == 0,
        seq_lengths=(150, 250),
    )  # fmt: skip
    i, j = torch.arange(150)[:, None], torch.arange(250)
    odd = (i + j) % 2 == 0
    first = torch.where(j < 100, False, torch.where(j < 200, odd, True))
    assert torch.equal(seen(made, 150, 250)[0, 0], torch.where(i < 100, first, j < 200))


def test_block_masks_keep_their_table(built):
    made = create_block_mask(lambda b, h, i, j: i >= j, None, None, 150, 150, "cpu")
    first = lower(made, 150, 150)
    assert lower(made, 150, 150).block_bits is first.block_bits and len(built) == 1
    gone = weakref.ref(made)
    del made
    gc.collect()
    assert gone() is None


def test_block_masks_refused():
    made = create_block_mask(lambda b, h, i, j: i >= j, 2, 3, 150, 150, "cpu")
    with pytest.raises(ValueError, match=r"a FlexAttention BlockMask was made for \(Lq, Lk\) = \(150, 150\), got"):
        lower(made, 150, 151, 2, 3)
    with pytest.raises(ValueError, match=r"must be made for \(batch, heads\) = \(2, 4\) \(or 1\), got \(2, 3\)"):
        lower(made, 150, 150, 2, 4)


# --- Where no table can be built ------------------------------------------------------------------------------------


def test_fake_and_meta_tensors_get_the_dense_form():
    with FakeTensorMode():
        assert lower(masks.strided(3), 6, 6).mask.shape == (1, 1, 6, 6)
    q = torch.zeros(1, 2, 300, 4, device="meta")
    assert pyext.attention(q, q, q, mask=masks.strided(3) & masks.causal()).shape == q.shape
    problem = _dispatch.lower(pyext.attention, q, q, q, mask=masks.fixed(3) | masks.causal())
    assert problem.mask.device.type == "meta" and problem.block_offsets is None


REFUSED = {
    "strided 0": (lambda: masks.strided(0), ValueError, r"masks\.strided stride must be a positive int, got 0"),
    "strided float": (lambda: masks.strided(1.0), TypeError, r"masks\.strided stride must be an int, got float"),
    "fixed": (lambda: masks.fixed(4, 5), ValueError, r"masks\.fixed summary must be at most stride = 4, got 5"),
    "image": (lambda: masks.image_rows(-1, 5), ValueError, r"masks\.image_rows text_len must be a non-negative int"),
    "side": (lambda: masks.image_conv(0, 0, 3), ValueError, r"masks\.image_conv side must be a positive int, got 0"),
    "kernel": (lambda: masks.image_conv(0, 3, True), TypeError, r"masks\.image_conv kernel must be an int, got bool"),
    "order": (
        lambda: masks.permutation(torch.tensor([0, 2, 2])),
        ValueError,
        r"masks\.permutation order must list each of the positions 0 to L - 1 once",
    ),
    "order float": (lambda: masks.permutation(torch.ones(3)), TypeError, "order must be an integer tensor"),
    "order 3-D": (
        lambda: masks.permutation(torch.zeros(1, 1, 1).long()),
        ValueError,
        r"order must have shape \(L,\) or \(B, L\), got \(1, 1, 1\)",
    ),
    "order length": (
        lambda: lower(masks.permutation(torch.arange(5)), 6, 6),
        ValueError,
        r"order must have shape \(6,\) or \(1, 6\) to match key, got \(5,\)",
    ),
    "order queries": (lambda: lower(masks.permutation(torch.arange(5)), 6, 5), ValueError, "no more queries than keys"),
    "exclude_self": (lambda: masks.permutation(torch.arange(5), "yes"), TypeError, "exclude_self must be a bool"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refuses(name):
    call, error, message = REFUSED[name]
    with pytest.raises(error, match=message):
        call()


def test_plot():
    pyplot = pytest.importorskip("matplotlib.pyplot")
    axes = (masks.strided(4) & masks.causal()).plot(12)
    shown = torch.tensor(axes.images[0].get_array().tolist()) != 0
    assert torch.equal(shown, seen(masks.strided(4) & masks.causal(), 12, 12)[0, 0])
    assert masks.causal().plot(3, 5, ax=axes) is axes
    pyplot.close("all")
