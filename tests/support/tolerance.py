"""The one tolerance rule of the project.

    max|err| <= 2.0 * max|eager err| + 2.0 * max|rounding|
    rms(err) <= 1.5 * rms(eager err) + 1.5 * rms(rounding)

err is the distance from the fp64 oracle, eager err the same distance of plain PyTorch run in the dtype under test, and
rounding is (x + 0.3) - 0.3 - x evaluated in that dtype: about half a unit in the last place. There is no hand-picked
rtol or atol in it, so a kernel that loses accuracy, or whole rows, cannot hide behind a loose constant.

Some details keep the rule sharp where it would be blunt, and fair where it would be a lottery:

* rounding is evaluated on x / s with s a power of two near rms(x) when that is below 1, so that a gradient of size
  1e-5 is not compared with half a unit at 0.3;
* a kernel recomputes the probabilities from an lse that was rounded to fp32, eager keeps them; and a result that is
  zero by cancellation (score gradients when one key is visible) has an eager error of exactly 0. So the limits grow by
  four epsilons of the fp32 accumulator times the largest `magnitude`, the sum of the absolute values of the terms
  behind each result, and by 1.5 epsilons times its rms. In bf16 and fp16 that is next to nothing; in fp32 a query that
  sees one key has an exact P in eager and exp(s - lse) with two roundings here, and the largest of ten thousand errors
  varies by a factor of two from draw to draw;
* a kernel takes the softmax's inner product <dO, out> from the saved, rounded out. Where eager's error is smaller than
  that (few visible keys, dropout), the limits are at least `floor`: the epsilon of out's dtype times the sum of the
  absolute values of the terms it enters;
* with few independent elements both errors are single draws of a random variable, so the limits widen by
  1 + 4/sqrt(n) - 1/4 for n < 256 and not at all from there on.
"""

from __future__ import annotations

import math

import torch

PEAK_FACTOR, RMS_FACTOR = 2.0, 1.5
PEAK_EPSILONS, RMS_EPSILONS = 4.0, 1.5
FP64_RELATIVE = 1e-12


def rounding(reference: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """|(x + 0.3 - 0.3) - x| in `dtype`, evaluated at the scale of x when x is small."""
    rms = _rms(reference)
    scale = 1.0 if rms == 0.0 or rms >= 1.0 else 2.0 ** math.floor(math.log2(rms))
    x = (reference / scale).to(dtype)
    return ((x + 0.3 - 0.3) - x).abs().double() * scale


def decisive(reference: torch.Tensor) -> int:
    """How many results are within a factor of two of the largest, for `independent`: where each error is about a unit
    in the last place of its result (elementwise ops, results rounded from fp32 sums), these alone have the largest unit
    and decide the largest error. Of products of normal numbers they are only a few."""
    return int((reference.abs() > reference.abs().max() / 2).sum()) if reference.numel() else 0


def slack(count: int) -> float:
    """How much the limits widen when only `count` independent elements are compared."""
    return max(1.0, 0.75 + 4.0 / math.sqrt(max(count, 1)))


def assert_close_to_reference(
    got: torch.Tensor,
    reference: torch.Tensor,
    eager: torch.Tensor,
    *,
    name: str = "result",
    magnitude: torch.Tensor | None = None,
    floor: torch.Tensor | None = None,
    independent: int | None = None,
    dtype: torch.dtype | None = None,
) -> None:
    """Apply the rule to one tensor. `reference` is fp64, `eager` the same mathematics in the dtype under test.

    `independent`: how many of the errors can be independent at most (a query's normaliser enters all that it touches).
    Infinities must sit at the same places with the same sign; NaN is never accepted. `dtype` is the dtype whose epsilon
    counts, by default that of `got`.
    """
    dtype = got.dtype if dtype is None else dtype
    assert got.shape == reference.shape, f"{name}: shape {tuple(got.shape)}, expected {tuple(reference.shape)}"
    got, eager = got.detach().double(), eager.detach().double()
    reference = reference.detach()
    if got.numel() == 0:
        return
    assert not got.isnan().any(), (
        f"{name}: {int(got.isnan().sum())} of {got.numel()} values are NaN, first at {_first(got.isnan())}"
    )
    infinite = reference.isinf()
    wrong = (got.isinf() | infinite) & (got != reference)
    assert not wrong.any(), f"{name}: infinities differ from the oracle, first at {_first(wrong)}: {got[wrong][0]}"
    if infinite.all():
        return
    finite = ~infinite
    error, got_finite = (got - reference)[finite].abs(), got[finite]
    reference_finite = reference[finite]
    if dtype == torch.float64:
        largest = 0.0 if magnitude is None else float(magnitude.max())
        limit = FP64_RELATIVE * max(1.0, float(reference_finite.abs().max()), largest)
        _check(name, "max", float(error.max()), limit, got, reference)
        return
    eager_error = (eager - reference)[finite].nan_to_num(0.0, 0.0, 0.0).abs()
    unit = rounding(reference_finite, dtype)
    rows = reference.numel() // reference.shape[-1] if reference.dim() >= 4 else reference.numel()
    widen = slack(rows if independent is None else min(rows, independent))
    peak = PEAK_FACTOR * float(eager_error.max() + unit.max())
    rms = RMS_FACTOR * (_rms(eager_error) + _rms(unit))
    if magnitude is not None:
        eps = torch.finfo(torch.float32).eps
        peak += PEAK_EPSILONS * eps * float(magnitude.max())
        rms += RMS_EPSILONS * eps * _rms(magnitude)
    if floor is not None:
        peak, rms = max(peak, float(floor.max())), max(rms, 0.5 * _rms(floor))
    peak, rms = peak * widen, rms * widen
    detail = (
        f"(eager max {float(eager_error.max()):.3g}, rounding max {float(unit.max()):.3g}, {got_finite.numel()} values)"
    )
    _check(name, "max", float(error.max()), peak, got, reference, detail)
    _check(name, "rms", _rms(error), rms, got, reference, detail)


def _check(name, what, error, limit, got, reference, detail=""):
    if error <= limit:
        return
    distance = torch.where(reference.isinf(), torch.zeros_like(got), (got - reference).abs())
    where = _first(distance == distance.max())
    raise AssertionError(
        f"{name}: {what} error {error:.4g} exceeds {limit:.4g} {detail}; worst at {where}: "
        f"got {float(got[where]):.9g}, oracle {float(reference[where]):.9g}"
    )


def _first(condition: torch.Tensor) -> tuple[int, ...]:
    return tuple(int(i) for i in condition.nonzero()[0])


def _rms(x: torch.Tensor) -> float:
    return float(x.double().square().mean().sqrt()) if x.numel() else 0.0
