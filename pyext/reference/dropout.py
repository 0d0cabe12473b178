"""The dropout mask of every backend: counter-based, so that it does not depend on tiling, threads or device.

Philox 4x32-10 of Salmon et al., "Parallel random numbers: as easy as 1, 2, 3" (SC 2011), section 3.3, in int64
arithmetic.
"""

import torch
from torch import Tensor

_WORD = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)


def _multiply(constant: int, word: Tensor) -> tuple[Tensor, Tensor]:
    """High and low 32 bits of constant * word. The high half goes through 16-bit limbs: int64 cannot hold 2^64."""
    high = ((word >> 16) * constant + (((word & 0xFFFF) * constant) >> 16)) >> 16
    return high, (word * constant) & _WORD


def philox(counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
    """Four 32-bit random words from a 128-bit counter and a 64-bit key.

    Args:
        counter: four int64 tensors with values in [0, 2^32), of shapes that broadcast together.
        key: two int64 tensors with values in [0, 2^32).
    Returns:
        four int64 tensors with values in [0, 2^32).
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        high0, low0 = _multiply(_MULTIPLIERS[0], c0)
        high1, low1 = _multiply(_MULTIPLIERS[1], c2)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + _WEYL[0]) & _WORD, (k1 + _WEYL[1]) & _WORD
    return c0, c1, c2, c3


def keep_mask(seed: Tensor, p: float, shape: tuple[int, int, int, int], first_batch: int = 0) -> Tensor:
    """Which probabilities dropout keeps.

    The word for (b, h, i, j) is word j & 3 of Philox at counter (j >> 2, i, h, b) under the seed's two halves as
    key; it is kept iff word >= floor(p * 2^32).

    Args:
        seed: (1,) int64.
        p: probability of dropping, in [0, 1].
        shape: (B, Hq, Lq, Lk).
        first_batch: index of the first batch row (in a packed call: the number of the sequence).
    Returns:
        bool tensor of that shape, True = keep.
    """
    batch, heads, queries, keys = shape

    def axis(size: int, dim: int, first: int = 0) -> Tensor:
        index = torch.arange(first, first + size, device=seed.device, dtype=torch.int64)
        return index.view([-1 if d == dim else 1 for d in range(4)])

    counter = (axis((keys + 3) // 4, 3), axis(queries, 2), axis(heads, 1), axis(batch, 0, first_batch))
    words = torch.stack(torch.broadcast_tensors(*philox(counter, (seed & _WORD, (seed >> 32) & _WORD))), dim=-1)
    return words.flatten(-2)[..., :keys] >= int(p * 2**32)
