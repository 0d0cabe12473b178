"""What all biases share: the primitives they lower to, their sums, and tables of the row that a distance reads."""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from .. import _checks
from .._primitives import Sizes


class Rule(NamedTuple):
    """Which row of a table each distance reads: rows(distance - first, *parameters), all of it hashable.

    Equal rules read the same rows, of tables with equally many.
    """

    rows: Callable[..., Tensor]
    parameters: tuple = ()
    first: int = 0

    def index(self, sizes: Sizes) -> Tensor:
        """The row of every distance of a call, int32 (Lq + Lk - 1,)."""
        start = 1 - sizes.keys - self.first
        if _checks.is_eager():
            # One table per power of two: the calls of a growing KV cache read slices of the same one.
            reach = 1 << max(abs(start), abs(start + sizes.strip), 64).bit_length()
            if reach <= 8 * max(sizes.strip, 64):  # not where `first` lies far away
                table = row_table(self.rows, self.parameters, reach, sizes.device)
                return table[start + reach - 1 : start + reach - 1 + sizes.strip]
        distance = torch.arange(start, start + sizes.strip, device=sizes.device)
        return self.rows(distance, *self.parameters).to(torch.int32)


@functools.lru_cache(maxsize=16)
def row_table(rows: Callable[..., Tensor], parameters: tuple, reach: int, device: torch.device) -> Tensor:
    """Rows of the distances -(reach - 1) ... reach - 1 as int32. Not an inference tensor: autograd saves it."""
    with torch.inference_mode(False):
        return rows(torch.arange(1 - reach, reach, device=device), *parameters).to(torch.int32)


def one_row_each(distance: Tensor) -> Tensor:
    """The rule of a table that holds one row per distance."""
    return distance


class Lowered(NamedTuple):
    """The primitives a bias lowers to; see `AttentionProblem` for shapes not given here.

    Relative rows stay symbolic (which rule, which shift of the query) until all summands are known; `fields` makes
    the tensors of the problem.
    """

    dense: Tensor | None = None
    diag: Tensor | None = None
    diag_index: Tensor | None = None
    rel_q: Tensor | None = None
    rel_k: Tensor | None = None
    rel_rule: Rule | None = None  # of rel_q and rel_k alike
    rel_shift: Tensor | None = None  # (Hq|1, D), any float dtype: added to the queries that meet rel_q
    key_shift: Tensor | None = None  # (Hq|1, D), any float dtype: added to the queries that meet the keys
    segment: Tensor | None = None
    segment_q: Tensor | None = None
    segment_k: Tensor | None = None

    def fields(self, sizes: Sizes) -> dict[str, Tensor | None]:
        """The fields of the flat problem, among them `query` where this bias replaces it."""
        names = ("dense", "diag", "diag_index", "rel_q", "rel_k", "segment", "segment_q", "segment_k")
        fields = {name: getattr(self, name) for name in names}
        if self.key_shift is not None:
            fields["query"] = _shifted(sizes.query, self.key_shift)
        if self.rel_rule is not None:
            fields["rel_index"] = self.rel_rule.index(sizes)
            for name in ("rel_q", "rel_k"):
                if fields[name] is not None and fields[name].shape[2] == 0:
                    # of a call without distances: kernels know a table that is there by its address
                    fields[name] = torch.nn.functional.pad(fields[name], (0, 0, 0, 1))
        if self.rel_q is not None:
            shared = self.rel_shift is self.key_shift and self.rel_shift is not None
            fields["rel_query"] = fields["query"] if shared else _shifted(sizes.query, self.rel_shift)
        return fields


def _shifted(query: Tensor, shift: Tensor | None) -> Tensor:
    """query (B, H, L, D) + shift (H|1, D), in the query's dtype as in the published models."""
    return query if shift is None else query + shift.to(query.dtype)[:, None, :]


class Bias:
    """Base of all biases. `a + b` adds their scores."""

    def __add__(self, other: "Bias") -> "Bias":
        if not isinstance(other, Bias):
            return NotImplemented
        return Sum((*self.terms(), *other.terms()))

    def __radd__(self, other) -> "Bias":
        # sum([a, b]) starts from 0
        return self if isinstance(other, int) and other == 0 else NotImplemented

    def terms(self) -> tuple["Bias", ...]:
        """The summands."""
        return (self,)

    def lower(self, sizes: Sizes) -> Lowered:
        """The primitives of this bias in a call of these sizes; raises ValueError where its tensors do not fit."""
        raise TypeError(f"{type(self).__name__} does not define lower()")


@dataclass(frozen=True, eq=False)
class Sum(Bias):
    """The sum of several biases (made by `+`).

    Dense terms are added in the accumulation dtype, strips as one value per distance. Relative rows of one rule are
    added as they are, of several rules as one row per distance: O(L D). A second segment term becomes dense: O(L^2).
    """

    parts: tuple[Bias, ...]

    def terms(self) -> tuple[Bias, ...]:
        return self.parts

    def lower(self, sizes: Sizes) -> Lowered:
        return functools.reduce(functools.partial(_add, sizes), [part.lower(sizes) for part in self.parts])


def _add(sizes: Sizes, a: Lowered, b: Lowered) -> Lowered:
    """The primitives of the sum of two biases."""
    if a.segment is not None and b.segment is not None:
        b = _segment_as_dense(b)
    if a.rel_q is not None and b.rel_q is not None and a.rel_shift is not b.rel_shift:
        a, b = _share_shift(sizes, a, b)
    if a.rel_rule is not None and b.rel_rule is not None and a.rel_rule != b.rel_rule:
        a, b = _one_row_per_distance(sizes, a), _one_row_per_distance(sizes, b)
    if a.diag is not None and b.diag is not None:
        a, b = _one_value_per_distance(a), _one_value_per_distance(b)
    if a.dense is not None and b.dense is not None:
        # in the accumulation dtype: a sum of bf16 biases must not be rounded to bf16
        a, b = (x._replace(dense=x.dense.to(sizes.acc)) for x in (a, b))
    summed = ("dense", "diag", "rel_q", "rel_k", "key_shift")
    return Lowered(*(_either(x, y, name in summed) for name, x, y in zip(Lowered._fields, a, b, strict=True)))


def _either(x, y, add: bool):
    """What is there of x and y; of both their sum, or x where they are the same thing twice."""
    if x is None or y is None:
        return y if x is None else x
    return x + y if add else x


def _one_value_per_distance(low: Lowered) -> Lowered:
    if low.diag_index is None:
        return low
    return low._replace(diag=low.diag.index_select(1, low.diag_index), diag_index=None)


def _one_row_per_distance(sizes: Sizes, low: Lowered) -> Lowered:
    index = low.rel_rule.index(sizes)
    rel_q, rel_k = (None if rows is None else rows.index_select(2, index) for rows in (low.rel_q, low.rel_k))
    return low._replace(rel_q=rel_q, rel_k=rel_k, rel_rule=Rule(one_row_each, first=1 - sizes.keys))


def _share_shift(sizes: Sizes, a: Lowered, b: Lowered) -> tuple[Lowered, Lowered]:
    """The same two biases where rel_q meets queries of one shift: (q + v).r = (q + w).r + (v - w).r, the last a strip.

    A strip has no batch, so rows that have one keep their shift.
    """
    if b.rel_q.shape[0] != 1:
        a, b = b, a
    if b.rel_q.shape[0] != 1:
        raise ValueError("bias: at most one summand of different v may have relative rows with a batch")
    total = 0.0
    for shift, sign in ((b.rel_shift, sizes.scale), (a.rel_shift, -sizes.scale)):
        if shift is not None:
            total = total + sign * (shift.to(sizes.acc)[:, None, :] * b.rel_q[0].to(sizes.acc)).sum(-1)
    strip = Lowered(diag=total, diag_index=b.rel_rule.index(sizes))
    return a, _add(sizes, b._replace(rel_shift=a.rel_shift), strip)


def _segment_as_dense(low: Lowered) -> Lowered:
    same = low.segment_q[:, None, :, None] == low.segment_k[:, None, None, :]
    different_score, same_score = low.segment.unbind(-1)
    dense = torch.where(same, same_score[..., None], different_score[..., None])
    if low.dense is not None:
        dense = dense + low.dense
    return low._replace(dense=dense, segment=None, segment_q=None, segment_k=None)


def check_heads(name: str, value: Tensor, dim: int, expected: str, sizes: Sizes) -> None:
    """Raise unless dimension `dim` counts the query heads, or is 1 (the same for all heads)."""
    if value.shape[dim] != sizes.heads and value.shape[dim] != 1:
        raise _checks.shape_error(name, expected, "to match query", value)
    _checks.same_device(name, value, sizes.device)


def not_packed(name: str, kind: str) -> ValueError:
    """The refusal of what has no meaning in `varlen_attention`."""
    return ValueError(
        f"{name}: a {kind} has no meaning in varlen_attention, where every sequence has its own score matrix; use a "
        "bias of the distance there (bias.diagonal, bias.alibi, bias.t5, bias.transformer_xl, bias.shaw, "
        "bias.disentangled), or pyext.attention on padded tensors"
    )
