"""What the others need: materialised positions, compiled flex_attention, and the fastest way to read memory."""

from __future__ import annotations

import contextlib
import math
import signal
import statistics
import threading
import time
from collections.abc import Callable, Iterator

import torch

COMPILE_SECONDS = 120


def distances(length: int) -> torch.Tensor:
    """(L, L): key position minus query position."""
    position = torch.arange(length)
    return position[None, :] - position[:, None]


def causal_keep(length: int) -> torch.Tensor:
    return torch.ones(length, length, dtype=torch.bool).tril()


def t5_buckets(length: int, buckets: int, max_distance: int) -> torch.Tensor:
    """(L, L) bucket of each distance, bidirectional: T5's rule (Raffel et al., 2020; mesh-tensorflow's code).

    Half of the buckets for each sign; half of those for exact small distances, the rest logarithmic up to
    max_distance, everything beyond in the last one.
    """
    distance = distances(length)
    half = buckets // 2
    exact = half // 2
    magnitude = distance.abs()
    log_ratio = torch.log(magnitude.clamp(min=1).float() / exact) / math.log(max_distance / exact)
    large = (exact + (log_ratio * (half - exact)).long()).clamp(max=half - 1)
    return torch.where(distance > 0, half, 0) + torch.where(magnitude < exact, magnitude, large)


class CompileTimeout(Exception):
    pass


@contextlib.contextmanager
def time_limit(seconds: int) -> Iterator[None]:
    """Raises CompileTimeout when the block takes longer. Without SIGALRM or off the main thread: no limit."""
    if not hasattr(signal, "SIGALRM") or threading.current_thread() is not threading.main_thread():
        yield
        return

    def expire(signum, frame):
        raise CompileTimeout(f"torch.compile took more than {seconds} s")

    previous = signal.signal(signal.SIGALRM, expire)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, previous)


def flex_attention(
    kind: str, query, key, value, bias, max_distance: int
) -> tuple[Callable[[], torch.Tensor] | None, str]:
    """(call, "") with flex_attention compiled for this bias, or (None, why there is none).

    kind "t5": a table of distances built from the buckets beforehand, one load per score (quicker than computing
    buckets inside). kind "alibi": causal, by a block mask.
    """
    length = query.shape[2]
    if kind == "t5":
        strip = bias[t5_buckets(length, bias.shape[0], max_distance)[:, 0].flip(0)]  # distances -(L-1) .. 0
        ahead = bias[t5_buckets(length, bias.shape[0], max_distance)[0, 1:]]  # 1 .. L-1
        by_distance = torch.cat([strip, ahead]).T.contiguous()

        def score_mod(score, b, h, i, j):
            return score + by_distance[h, j - i + length - 1]
    else:

        def score_mod(score, b, h, i, j):
            return score + bias[h] * (j - i)

    causal = None if kind == "t5" else lambda b, h, i, j: i >= j
    return _compiled_flex(query, key, value, score_mod, causal)


def masked_flex_attention(query, key, value, mask_mod) -> tuple[Callable[[], torch.Tensor] | None, str]:
    """The same without a bias, for the pairs that mask_mod(b, h, i, j) shows."""
    return _compiled_flex(query, key, value, None, mask_mod)


def _compiled_flex(query, key, value, score_mod, mask_mod) -> tuple[Callable[[], torch.Tensor] | None, str]:
    try:
        from torch.nn.attention.flex_attention import create_block_mask
        from torch.nn.attention.flex_attention import flex_attention as flex

        with time_limit(COMPILE_SECONDS), torch.no_grad():
            block_mask = None
            if mask_mod is not None:
                block_mask = create_block_mask(mask_mod, None, None, query.shape[2], key.shape[2], device="cpu")
            compiled = torch.compile(flex)
            compiled(query, key, value, score_mod=score_mod, block_mask=block_mask)
    except Exception as error:  # no compiler, an unsupported CPU, a bug in there: the peer is missing, we go on
        return None, f"{type(error).__name__}: {error}".splitlines()[0][:200]

    def call():
        with torch.no_grad():
            return compiled(query, key, value, score_mod=score_mod, block_mask=block_mask)

    return call, ""


def fastest_reader(caches: list[tuple[torch.Tensor, torch.Tensor]]) -> Callable[[object], None]:
    """The quickest of a few ways to read a (key, value) pair once, as a function of that pair (or what has both).

    Each is tried over all the pairs in turn, so that what is read comes from memory. Sums and dot products of 32-bit
    words are the quickest full reads that PyTorch offers.
    """

    def words(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.view(-1).view(torch.float32)

    def total(key, value):
        words(key).sum()
        words(value).sum()

    def largest(key, value):
        words(key).amax()
        words(value).amax()

    def dot(key, value):
        torch.dot(words(key), words(value))

    def integers(key, value):
        key.view(-1).view(torch.int32).amax()
        value.view(-1).view(torch.int32).amax()

    def seconds(read):
        times = []
        for key, value in caches * 2:
            start = time.perf_counter()
            read(key, value)
            times.append(time.perf_counter() - start)
        return statistics.median(times)

    best = min((total, largest, dot, integers), key=seconds)

    def reader(cache):
        best(cache.key, cache.value)

    return reader
