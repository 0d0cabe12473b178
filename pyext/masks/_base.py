"""What every mask has: a predicate, a lowering to primitives, `&` and `|`, and what is made of it once and kept."""

import functools
import sys
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from .. import _checks
from .._primitives import UNBOUNDED, Sizes
from . import _tables
from ._parts import Part, Pass, resolve
from ._tables import BlockTable

_KEPT_CLOSED, _KEPT = 32, 8  # tables kept of all closed forms together, and of each mask that holds tensors


class Lowered(NamedTuple):
    """The primitives a mask lowers to, all of which must allow a key; see `AttentionProblem` for their shapes."""

    left: int = UNBOUNDED
    right: int = UNBOUNDED
    intervals: Tensor | None = None
    mask: Tensor | None = None
    block_offsets: Tensor | None = None
    block_index: Tensor | None = None
    block_bits: Tensor | None = None

    @property
    def table(self) -> BlockTable | None:
        return None if self.block_offsets is None else BlockTable(*self[4:])

    @property
    def is_range(self) -> bool:
        """Whether each query sees one range of positions: what `left`, `right` and `intervals` express."""
        return self.mask is None and self.block_offsets is None

    def meet(self, other: "Lowered") -> "Lowered":
        """What both allow."""
        table = _meet(self.table, other.table, _tables.intersect)
        return Lowered(
            min(self.left, other.left),
            min(self.right, other.right),
            _meet(self.intervals, other.intervals, _intersect),
            _meet(self.mask, other.mask, torch.logical_and),
            **({} if table is None else table._asdict()),
        )


def _meet(a, b, both: Callable[[Any, Any], Any]):
    if a is None or b is None:
        return b if a is None else a
    return both(a, b)


def _intersect(a: Tensor, b: Tensor) -> Tensor:
    low = torch.maximum(a[..., 0], b[..., 0])
    return torch.stack((low, torch.minimum(a[..., 1], b[..., 1])), dim=-1)


class Mask:
    """Base of all masks. `a & b`: keys that both allow. `a | b`: keys that either allows.

    A FlexAttention `BlockMask` may stand on either side.
    """

    label: ClassVar[str] = "mask"  # how error messages call it
    closed: ClassVar[bool] = False  # a closed form: hashable, holds neither tensors nor functions, alike for all heads
    reorders: ClassVar[bool] = False  # whether `parts` may give something

    def __and__(self, other: "Mask") -> "Mask":
        return And(self, as_mask(other)) if as_mask(other) is not None else NotImplemented

    def __rand__(self, other) -> "Mask":
        return And(as_mask(other), self) if as_mask(other) is not None else NotImplemented

    def __or__(self, other: "Mask") -> "Mask":
        """Lowers to a block table: a union of intervals is not an interval."""
        return Or(self, as_mask(other)) if as_mask(other) is not None else NotImplemented

    def __ror__(self, other) -> "Mask":
        return Or(as_mask(other), self) if as_mask(other) is not None else NotImplemented

    def visible(self, b: Tensor, h: Tensor, i: Tensor, j: Tensor, sizes: Sizes) -> Tensor:
        """Whether query i of head h of batch row b may attend to key j.

        Elementwise over index tensors that broadcast; bool. In a packed call b is the sequence, and i, j, sizes.queries
        and sizes.keys are local to it.
        """
        raise TypeError(f"{type(self).__name__} does not define visible()")

    def kinds(self, sizes: Sizes) -> Tensor | None:
        """(rows of blocks, columns of blocks) int64 on the CPU: blocks of equal numbers show the same pattern.

        What lies beyond the last query or key does not count. None: nothing is known, every block is looked at.
        """
        return None

    def patterns(self, sizes: Sizes) -> _tables.Patterns:
        """What blocks show: `visible`, packed into bits."""
        return _tables.evaluated(self, sizes)

    def parts(self, sizes: Sizes) -> tuple[Part, ...] | None:
        """Disjoint parts that together are the mask, or None where no reordering makes ranges of it. See `Part`."""
        return None

    def lower(self, sizes: Sizes) -> Lowered:
        """The primitives of this mask for a call of these sizes; raises ValueError where its tensors do not fit them.

        Here: the block table of `visible`, or where none can be built (in a trace, on the meta device) the dense bool
        tensor.
        """
        if sizes.varlen:
            raise ValueError(not_packed(self.label))
        if _checks.is_eager() and sizes.device.type != "meta":
            return Lowered(**once(_tables.build, self, sizes)._asdict())
        return Lowered(mask=materialize(self, sizes))

    def passes(self, sizes: Sizes, right: int = UNBOUNDED) -> tuple[Pass, ...] | None:
        """The parts of this mask with distance <= right, as calls of the op on reordered queries and keys; or None."""
        if _checks.is_eager():
            return once(_passes, self, sizes, right)
        return _passes(self, sizes, right)

    def build(
        self, Lq: int, Lk: int, batch: int = 1, heads: int = 1, device: torch.device | str | None = None
    ) -> "Mask":
        """This mask with its block table (or intervals) finished, for calls with these lengths.

        Masks keep their tables anyway, so that the layers and steps of a model share them; what this adds is the time
        (now instead of in the first call) and `torch.compile`, in which no table can be built.

        Args:
            Lq, Lk: the lengths of the calls.
            batch, heads: those of the calls; only masks that differ between batch rows or heads look at them.
            device: of the calls; None = torch's default device.
        Raises:
            ValueError where tensors in the mask do not fit these sizes, and at a call of other sizes.
        """
        named = {"Lq": Lq, "Lk": Lk, "batch": batch, "heads": heads}
        Lq, Lk, batch, heads = (_checks.length(f"build {name}", value) for name, value in named.items())
        device = torch.get_default_device() if device is None else torch.device(device)
        sizes = Sizes((batch,), heads, Lq, Lk, device, torch.float32)
        return Built(self, sizes, self.lower(sizes), self.passes(sizes))

    def kept(self) -> dict:
        """Where `once` keeps what it made of this mask."""
        return self.__dict__.setdefault("_kept", {})

    def plot(self, Lq: int, Lk: int | None = None, batch: int = 0, head: int = 0, ax=None):
        """Draw the mask: a dark cell where query i (downwards) may attend to key j. Needs matplotlib.

        Args:
            Lq, Lk: the lengths; Lk=None means Lq.
            batch, head: which of them to draw.
            ax: matplotlib axes to draw into; None = new ones.
        Returns:
            the axes.
        """
        from ._plot import draw

        return draw(self, Lq, Lq if Lk is None else Lk, batch, head, ax)


def as_mask(value) -> Mask | None:
    """The mask that value is or stands for, None if neither."""
    if isinstance(value, Mask):
        return value
    # FlexAttention's slow module is imported wherever a BlockMask exists.
    module = None if isinstance(value, Tensor) else sys.modules.get("torch.nn.attention.flex_attention")
    if module is None or not isinstance(value, module.BlockMask):
        return None
    from ._functions import Flex

    return Flex(value)


def materialize(mask: Mask, sizes: Sizes) -> Tensor:
    """The predicate as bool (B|1, Hq|1, Lq|1, Lk)."""
    lengths = (sizes.batch, sizes.heads, sizes.queries, sizes.keys)
    index = [
        torch.arange(length, device=sizes.device).view([-1 if d == dim else 1 for d in range(4)])
        for dim, length in enumerate(lengths)
    ]
    visible = mask.visible(*index, sizes)
    return _checks.broadcastable(mask.label, visible, (sizes.batch,), *lengths[1:])


def not_packed(name: str) -> str:
    return (
        f"{name}: not available in varlen_attention, whose cu_seqlens already separate the sequences and leave no "
        "padding: use masks.causal, masks.window and masks.prefix there, or pyext.attention on padded tensors"
    )


def _passes(mask: Mask, sizes: Sizes, right: int) -> tuple[Pass, ...] | None:
    parts = _within(mask.parts(sizes), Lowered(right=right))
    if parts is None:
        return None
    as_table = mask.closed and _checks.is_eager()  # what is made once may take its time
    return tuple(resolve(part, sizes, as_table) for part in parts)


def _within(parts: tuple[Part, ...] | None, limits: Lowered) -> tuple[Part, ...] | None:
    """What these limits allow of the parts; None where that is no range, as with ranks, which are no positions."""
    if parts is None or not limits.is_range:
        return None
    limited = limits.left != UNBOUNDED or limits.right != UNBOUNDED or limits.intervals is not None
    if limited and any(part.ranks is not None for part in parts):
        return None
    return tuple(part.within(limits) for part in parts)


# --- What is made once ----------------------------------------------------------------------------------------------


def once(make: Callable, mask: Mask, sizes: Sizes, *options):
    """make(mask, sizes, *options), kept for the next call: for closed forms by value, for others on the mask.

    A mask whose tensors were written to since is made again.
    """
    if mask.closed:
        sizes = Sizes((1,), 1, sizes.queries, sizes.keys, sizes.device, torch.float32)
        return _closed(make, mask, sizes, *options)
    contents = _contents(mask)
    if contents is None:
        return _made(make, mask, sizes, *options)
    kept = mask.kept()
    key = (make, sizes.lead, sizes.heads, sizes.queries, sizes.keys, sizes.device, contents, *options)
    if key not in kept:
        while len(kept) >= _KEPT:
            kept.pop(next(iter(kept)), None)
        kept[key] = _made(make, mask, sizes, *options)
    return kept[key]


def _made(make: Callable, mask: Mask, sizes: Sizes, *options):
    with torch.inference_mode(False):  # a later call, with gradients, may want to save it for backward
        return make(mask, sizes, *options)


_closed = functools.lru_cache(maxsize=_KEPT_CLOSED)(_made)


def _contents(mask: Mask) -> tuple | None:
    """What changes when a tensor of the mask is written to; None where torch does not count that (inference mode)."""
    versions = []
    for field in fields(mask):
        value = getattr(mask, field.name)
        if isinstance(value, Tensor):
            version = None if value.is_inference() else value._version
        elif isinstance(value, Mask):
            version = _contents(value)
        else:
            continue
        if version is None:
            return None
        versions.append(version)
    return tuple(versions)


# --- Masks made of masks --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Pair(Mask):
    both: ClassVar[Callable[[Tensor, Tensor], Tensor]]  # of bools, or of bits
    first: Mask
    second: Mask

    def visible(self, b, h, i, j, sizes):
        return self.both(self.first.visible(b, h, i, j, sizes), self.second.visible(b, h, i, j, sizes))

    @property
    def closed(self):
        return self.first.closed and self.second.closed

    def kinds(self, sizes):
        first, second = self.first.kinds(sizes), self.second.kinds(sizes)
        return None if first is None or second is None else _tables.joint(first, second)

    def patterns(self, sizes):
        first, second = self.first.patterns(sizes), self.second.patterns(sizes)
        return lambda row, columns: self.both(first(row, columns), second(row, columns))


@dataclass(frozen=True)
class And(_Pair):
    """See `Mask.__and__`."""

    label = "masks combined with &"
    both = staticmethod(torch.bitwise_and)

    @property
    def reorders(self):
        return self.first.reorders != self.second.reorders

    def parts(self, sizes):
        """Those of one side, within the ranges of the other."""
        if not self.reorders:
            return None
        one, other = (self.first, self.second) if self.first.reorders else (self.second, self.first)
        return _within(one.parts(sizes), other.lower(sizes))

    def lower(self, sizes):
        first, second = self.first.lower(sizes), self.second.lower(sizes)
        if first.table is None or second.table is None or not _checks.is_eager():
            return first.meet(second)
        return once(_meet_lowered, self, sizes)


def _meet_lowered(mask: And, sizes: Sizes) -> Lowered:
    return mask.first.lower(sizes).meet(mask.second.lower(sizes))


@dataclass(frozen=True)
class Or(_Pair):
    """See `Mask.__or__`."""

    label = "masks combined with |"
    both = staticmethod(torch.bitwise_or)


@dataclass(frozen=True, eq=False)
class Built(Mask):
    """See `Mask.build`."""

    label = "a built mask"
    source: Mask
    sizes: Sizes
    lowered: Lowered
    ready: tuple[Pass, ...] | None

    @property
    def reorders(self):
        return self.source.reorders

    def _check(self, sizes):
        if sizes.varlen:
            raise ValueError(not_packed(self.label))
        made, came = (self.sizes.queries, self.sizes.keys), (sizes.queries, sizes.keys)
        if made != came:
            raise ValueError(f"a mask was built for (Lq, Lk) = {made}, got query and key with {came}")

    def visible(self, b, h, i, j, sizes):
        return self.source.visible(b, h, i, j, sizes)

    def parts(self, sizes):
        return self.source.parts(sizes)

    def passes(self, sizes, right=UNBOUNDED):
        return self.ready if right == UNBOUNDED else super().passes(sizes, right)

    def lower(self, sizes):
        self._check(sizes)
        for field, tensor in self.lowered._asdict().items():
            if not isinstance(tensor, Tensor):
                continue
            _checks.same_device(self.label, tensor, sizes.device)
            own = {"intervals": 1, "mask": 2, "block_offsets": 2}.get(field, 0)  # dimensions of batch and heads
            for size, wanted in zip(tensor.shape[:own], (sizes.batch, sizes.heads), strict=False):
                if size != 1 and size != wanted:
                    made, came = (self.sizes.batch, self.sizes.heads), (sizes.batch, sizes.heads)
                    raise ValueError(f"a mask was built for (batch, heads) = {made}, got a query with {came}")
        return self.lowered
