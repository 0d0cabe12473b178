"""Seeded defects of csrc/cuda/attention_sm90*.cu, as in mutants.py: copies with one text changed, and who finds them.

A copy is cut down to fp16 and to the tiles for 64 and 128 features. Groups of heads are small in it, as of long keys.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from support.backends import Backend
from support.cases import check as check_case

from .attention_sm90_probes import PROBES
from .build import Kernel
from .mutants import source
from .ops import instead_of_cpu
from .runtime import COMPLETIONS, SCHEDULES, Found

RUNS = [
    dict(schedule=schedule, completion=completion, preempt=20 * (n % 2))
    for n, (schedule, completion) in enumerate(itertools.product(SCHEDULES, COMPLETIONS))
]
_REFUSED = "return cudaErrorInvalidValue;"
_CUTS = {
    "attention_sm90": (
        ("if (width <= 96) return with_bias<T, HopperTile<96, 2, 128, true>>(p, w, stream);", ""),
        ("return with_bias<T, HopperTile<256, 2, 80, false>>(p, w, stream);", _REFUSED),
        ("kCacheBytes = 32 << 20", "kCacheBytes = 200000"),
    ),
    "attention_sm90_backward": (
        ("if (width <= 96) return launch_backward<T, 96>(p, w, stream);", ""),
        ("kStrips = 512", "kStrips = 4"),
    ),
    "attention_sm90_relative_backward": (("kSlots = 132", "kSlots = 4"),),
}


def cut_down(stem: str, *changes: tuple[str, str]) -> Kernel:
    return source(stem, *_CUTS[stem], *changes)


def check(name: str, dtype: torch.dtype, seed: int) -> None:
    """Result and LSE against the oracle; gradients too, which the kernels of the CPU make of these."""
    check_case(PROBES[name], dtype, Backend("cpu"), seed)


@dataclass(frozen=True)
class Mutant:
    title: str
    probe: str
    old: str
    new: str = ""
    stem: str = "attention_sm90"

    def __str__(self) -> str:
        return self.title.replace(" ", "-")

    @property
    def kernel(self) -> Kernel:
        return cut_down(self.stem, (self.old, self.new))

    def outcomes(self, seed: int) -> Iterator[str]:
        """One word per run: "missed", "values" (a wrong result), or what the emulator said."""
        for i, run in enumerate(RUNS[seed % 2 :: 2]):
            try:
                with instead_of_cpu({self.stem: self.kernel}, seed=seed + i, **run):
                    check(self.probe, torch.float16, seed)
                yield "missed"
            except Found as found:
                yield str(found)
            except AssertionError:
                yield "values"


_SUMS = "ptx::wgmma_wait<0>();\n      ptx::wgmma_pin(flat(out));\n      value_ring.release(count - 1);"
MUTANTS = [
    Mutant("scores read while their product runs", "causal", "ptx::wgmma_wait<1>();", "ptx::wgmma_wait<2>();"),
    Mutant("sums touched while their product runs", "causal", _SUMS, "value_ring.release(count - 1);"),
    Mutant(
        "values released before they are read",
        "many tiles",
        _SUMS,
        "value_ring.release(count - 1);\n ptx::wgmma_wait<0>();\n ptx::wgmma_pin(flat(out));",
    ),
    Mutant(
        "no fence before the products of a tile",
        "causal",
        "ptx::wgmma_fence();\n      issue_scores(count);\n      issue_product(out, weights, shared.values(count - 1));",
        "issue_scores(count);\n      issue_product(out, weights, shared.values(count - 1));",
    ),
    Mutant("sums keep their old base", "causal", "scale_rows(out, factor);"),
    Mutant("turns are not handed on", "causal", "ptx::bar_arrive(1 + (group + 1) % Tile::consumers, 256);"),
    Mutant("keys overwritten while they are read", "many tiles", "keys.wait_empty(count + i);"),
    Mutant("values overwritten while they are read", "many tiles", "values.wait_empty(count + i - 1);"),
    Mutant("strips overwritten while they are read", "many tiles", "ring.wait_empty(count + i);"),
    Mutant("queries overwritten while they are read", "plain", "shared.items().wait_empty(n);"),
    Mutant(
        "queries released before all lanes have them",
        "wide, causal",
        "load_left<Tile::rows>(queries, shared.queries());\n        __syncwarp();",
        "load_left<Tile::rows>(queries, shared.queries());",
    ),
    Mutant(
        "strip released before all lanes have it",
        "buckets",
        "__syncwarp();\n      shared.strip_ring().release(count);",
        "shared.strip_ring().release(count);",
    ),
    Mutant("strip not shifted to where it begins", "buckets", "shared.strip(count) + start % 4", "shared.strip(count)"),
    Mutant(
        "strips without margins",
        "buckets",
        "AttentionWorkspace w(p, p.workspace, false, 0, 0, kMargin)",
        "AttentionWorkspace w(p, p.workspace, false, 0, 0, 4)",
    ),
    Mutant(
        "biased scores scaled twice",
        "slopes",
        "softmax(biased ? 1 : float(p.scale) * kLog2e)",
        "softmax(float(p.scale) * kLog2e)",
    ),
    Mutant("second row sees all", "causal", "hide_unseen(s[0], 1, keys[1], tile * columns);"),
    Mutant(
        "second row sees what the first does", "causal", "visible(p, batch, int64_t(row) + 8)", "visible(p, batch, row)"
    ),
    Mutant("the last tile left out", "causal", "(seen.end - 1) / columns + 1", "seen.end / columns"),
    Mutant(
        "another head's keys",
        "causal",
        "kv_head = head / (heads / int(p.kv_heads))",
        "kv_head = head % int(p.kv_heads)",
    ),
    Mutant("queries not swizzled", "wide, causal", "(chunk % 8 ^ row % 8) * 8", "chunk % 8 * 8"),
    Mutant(
        "the second panel of values", "wide, causal", "kAtomBytes, 16 * K * kPanelBytes)", "kAtomBytes, kAtomBytes)"
    ),
    Mutant("a smaller last group of heads", "three warpgroups", "size = min(group, pairs - begin)", "size = group"),
    Mutant("items left out", "causal", "atomicAdd(next_item, 1)", "atomicAdd(next_item, 2)"),
    Mutant("no fence after mbarrier.init", "plain", "ptx::fence_mbarrier_init();"),
    Mutant(
        "only one warpgroup releases",
        "many tiles",
        "constexpr int warps = 4 * Tile::consumers;",
        "constexpr int warps = 4;",
    ),
    Mutant(
        "too few bytes expected",
        "plain",
        "ptx::mbarrier_expect(keys.barrier(count + i), Tile::key_bytes);",
        "ptx::mbarrier_expect(keys.barrier(count + i), Tile::key_bytes - 16);",
    ),
]

MUTANTS += [
    Mutant("bands overwritten while they are read", "relative, clipped", "bands.wait_empty(n);"),
    Mutant("relative queries over queries", "relative, clipped", "shared.items().wait_empty(++n);", "++n;"),
    Mutant(
        "bands released before they are read",
        "relative, clipped",
        "ptx::wgmma_wait<0>();\n    ptx::wgmma_pin(flat(s));\n    ring.release(n);",
        "ring.release(n);\n ptx::wgmma_wait<0>();\n ptx::wgmma_pin(flat(s));",
    ),
    Mutant(
        "products of bands overwritten while lanes read them",
        "relative",
        "__syncwarp();  // all lanes have read what is overwritten",
    ),
    Mutant(
        "products of bands read before all lanes have stored them",
        "relative",
        "store(s[0], count);\n    __syncwarp();",
        "store(s[0], count);",
    ),
    Mutant("products of the other tile", "relative", "tile % 2 ? 0 : kBand", "tile % 2 ? kBand : 0"),
    Mutant(
        "the first warpgroup keeps the last band",
        "relative, clipped",
        "if (Tile::relative && group == 0)",
        "if (Tile::relative && group == 2)",
    ),
    Mutant("distances off by one", "relative", "all.origin + p.q_len - 1", "all.origin + p.q_len"),
    Mutant("the first head's rows", "relative, clipped", "p.rel_q_heads == 1 ? 0 : head", "0"),
]


def _backward(title: str, probe: str, old: str, new: str = "") -> Mutant:
    return Mutant(title, probe, old, new, "attention_sm90_backward")


_QUERY_WAIT = "ptx::wgmma_wait<0>();\n        ptx::wgmma_pin(flat(grad_query));\n        "
_RELEASE = "__syncwarp();  // all lanes are done with the strip\n        key_ring.release(count);"
MUTANTS += [
    _backward(
        "dP read while its product runs",
        "causal",
        "ptx::wgmma_wait<0>();\n        ptx::wgmma_pin(flat(ds));",
        "ptx::wgmma_wait<1>();\n        ptx::wgmma_pin(flat(ds));",
    ),
    _backward(
        "keys released before dQ has read them",
        "many tiles",
        _QUERY_WAIT + _RELEASE,
        _RELEASE + _QUERY_WAIT,
    ),
    _backward("the first row's delta for both", "causal", "row_delta[e / 2]", "row_delta[0]"),
    _backward("second row sees all, backward", "causal", "hide_unseen(s[0], 1, keys[1], first_key, 0);"),
    _backward("all queries see all keys", "causal", "if (all) return;  // in", "return;  // in"),
    _backward("sums of diagonals overwritten while they are read", "slopes", "shared.sums_ring().wait_empty(at);"),
    _backward("sums of diagonals read too early", "slopes", "shared.sums_ring().wait_full(count);"),
    _backward(
        "sums of diagonals handed on before all lanes have them",
        "slopes",
        "write(Diagonals(shared.other().sums[at % kStages]));\n      __syncwarp();",
        "write(Diagonals(shared.other().sums[at % kStages]));",
    ),
    _backward("entries of strips change hands", "slopes", "(thread - start) % kSummingThreads", "thread"),
    _backward("carried diagonals forgotten", "slopes", "term + carried[o][e]", "term"),
    _backward("diagonals of lower rows to the right", "slopes", "(upper ? -bit : bit)", "bit"),
    _backward(
        "steps of heads that share keys left out",
        "causal",
        "for (; head < heads_end; ++head, block = -1)",
        "for (; head < heads_end; ++head)",
    ),
    _backward("stage filled before it is empty", "causal", "ring.wait_empty(n);\n      if (more) {", "if (more) {"),
    _backward(
        "vectors released before all lanes have them",
        "causal",
        "__syncwarp();  // all lanes are done with the stage's vectors",
    ),
    _backward(
        "dK without the scale",
        "causal",
        "scaled[1][2] = {{float(p.scale), float(p.scale)}}, plain",
        "scaled[1][2] = {{1, 1}}, plain",
    ),
    _backward(
        "delta of queries that do not exist", "plain", "exists ? delta[row + query] : 0.0f", "delta[row + query]"
    ),
    _backward(
        "keys in the place of values", "wide, causal", "shared.block(1), from.value", "shared.block(1), from.key"
    ),
]


def _relative(title: str, probe: str, old: str, new: str = "") -> Mutant:
    return Mutant(title, f"relative{probe}", old, new, "attention_sm90_relative_backward")


MUTANTS += [
    _relative("tiles of products read too early", "", "ptx::bar_sync(1 + group, 128);  // all have stored theirs"),
    _relative(
        "tiles of products overwritten while they are read",
        ", clipped",
        "ptx::bar_sync(1 + group, 128);  // all have read what is overwritten",
    ),
    _relative(
        "products of the other band",
        "",
        "place < kBand ? upper[j][e] : lower[j][e]",
        "place < kBand ? lower[j][e] : upper[j][e]",
    ),
    _relative("bands of the step before", ", in turns", "head == of_head && lowest == distance", "head == of_head"),
    _relative("bands overwritten while they are read, backward", ", more queries", "bands.wait_empty(n);"),
    _relative(
        "a band released before its product",
        ", more queries",
        "ptx::wgmma_wait<0>();\n    ptx::wgmma_pin(flat(lower)), ptx::wgmma_pin(flat(upper));\n    __syncwarp();",
        "__syncwarp();",
    ),
    _relative(
        "dS' read before all have stored theirs",
        "",
        "ptx::bar_sync(1 + group, 128);  // all of the warpgroup have stored theirs",
    ),
    _relative("no proxy fence before the products of dS'", "", "ptx::fence_proxy_async();"),
    _relative(
        "sums of a band out of turn",
        ", more queries",
        "ptx::bar_sync(3, kThreads);\n    if constexpr (Tile::of_rows)",
        "if constexpr (Tile::of_rows)",
    ),
    _relative("the first tile's lower band keeps what was there", ", in turns", "gradients.store(left[0], count - 1);"),
    _relative("dS' of the other band", "", "return bands + tile % 2", "return bands + (tile + 1) % 2"),
    _relative(
        "the first warpgroup a band too low", "", "if (group == 0) leave_band();", "if (group == 2) leave_band();"
    ),
    _relative("sums a band too high", "", "(group + 1) * kBand", "group * kBand"),
    _relative("sums that nobody cleared", "", "store_sums(nothing, row, panel);", ";"),
    _relative(
        "sums by distance in another order",
        "",
        "distance_of_row<kBackwardOrder>(int(row % 32))",
        "distance_of_row<RowOrder::natural>(int(row % 32))",
    ),
    _relative("sums of one head for all", ", one table", "n < heads * per_head", "n < per_head"),
    _relative("dR without the scale", ", clipped", "p.head_dim, p.scale}", "p.head_dim, 1}"),
    _relative(
        "gradients over queries that lanes still load",
        ", wide",
        "__syncwarp();\n      shared.blocks().release(n);\n      shared.blocks().wait_full(++n);",
        "shared.blocks().release(n);\n      shared.blocks().wait_full(++n);",
    ),
    _relative(
        "keys released before S has read them",
        ", more queries",
        "ptx::wgmma_wait<1>();\n    ptx::wgmma_pin(flat(s));\n    products()",
        "if (!Tile::of_queries) key_ring.release(count);\n ptx::wgmma_wait<1>();\n products()",
    ),
]
