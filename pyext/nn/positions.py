"""Position biases as modules: T5's table, ALiBi's slopes; and the sinusoids of Transformer-XL and XLNet."""

import math

import torch
from torch import Tensor, nn

from .. import _checks
from .. import bias as _bias
from .._primitives import acc_dtype


class T5Bias(nn.Module):
    """The relative position table of a T5 stack: `attention(..., bias=module(), scale=1.0)` in each of its layers.

    Args:
        num_heads: H.
        num_buckets, max_distance, bidirectional: as in `pyext.bias.t5`; T5's decoder has bidirectional=False.
        device, dtype: of the table.
    Attributes:
        relative_attention_bias: Embedding (num_buckets, H), the name and layout of T5's own.
    Raises:
        TypeError, ValueError naming the argument.
    Source: Raffel et al., T5 (JMLR 2020), section 2.1.
    """

    def __init__(
        self,
        num_heads: int,
        num_buckets: int = 32,
        max_distance: int = 128,
        bidirectional: bool = True,
        device=None,
        dtype=None,
    ):
        super().__init__()
        self.max_distance = max_distance
        self.bidirectional = _checks.flag("bidirectional", bidirectional)
        sizes = _checks.length("num_buckets", num_buckets), _checks.length("num_heads", num_heads)
        self.relative_attention_bias = nn.Embedding(*sizes, device=device, dtype=dtype)
        self()  # raises where the numbers do not fit

    def forward(self) -> _bias.Bias:
        """The bias to pass to `pyext.attention`; one object may serve every layer of a step."""
        return _bias.t5(self.relative_attention_bias.weight, self.bidirectional, self.max_distance)


def alibi_slopes(num_heads: int, device=None) -> Tensor:
    """ALiBi's slopes, fp32 (H,): 2^(-8 (h + 1) / H) for a power of two.

    Other numbers of heads take the slopes of the largest power of two below, and then every second one of twice that
    power, as the paper's code and BLOOM do.
    """

    def powers(count: int, steps: Tensor) -> Tensor:
        return torch.pow(torch.tensor(2.0 ** (-8.0 / count), dtype=torch.float32, device=device), steps)

    power = 1 << (num_heads.bit_length() - 1) if num_heads else 0
    if power == 0:
        return torch.zeros(0, device=device)
    steps = torch.arange(1, 1 + power, device=device)
    odd = torch.arange(1, 1 + 2 * (num_heads - power), 2, device=device)
    return torch.cat([powers(power, steps), powers(2 * power, odd)])


class ALiBi(nn.Module):
    """Attention with linear biases: `attention(..., bias=module(), mask=pyext.masks.causal())`.

    Args:
        num_heads: H.
        learned: make the slopes a parameter; else they are a buffer outside of the state_dict, which stays fp32.
        symmetric: -slope * |distance|, for encoders.
        device: of the slopes.
    Attributes:
        slopes: (H,) fp32, `alibi_slopes(H)` at first.
    Raises:
        TypeError, ValueError naming the argument.
    Source: Press, Smith and Lewis, ALiBi (ICLR 2022), section 3.
    """

    def __init__(self, num_heads: int, learned: bool = False, symmetric: bool = False, device=None):
        super().__init__()
        self.num_heads = _checks.length("num_heads", num_heads)
        self.learned = _checks.flag("learned", learned)
        self.symmetric = _checks.flag("symmetric", symmetric)
        slopes = alibi_slopes(num_heads, device)
        if learned:
            self.slopes = nn.Parameter(slopes)
        else:
            self.register_buffer("slopes", slopes, persistent=False)

    def _apply(self, fn, recurse=True):
        super()._apply(fn, recurse)
        if not self.learned and self.slopes.dtype != torch.float32:  # rounded to half precision they would be others
            self.slopes = alibi_slopes(self.num_heads, self.slopes.device)
        return self

    def forward(self) -> _bias.Bias:
        """The bias to pass to `pyext.attention`."""
        return _bias.alibi(self.slopes, self.symmetric)


def sinusoids(positions: Tensor, width: int, dtype: torch.dtype) -> Tensor:
    """sin and cos of position / 10000^(2 k / width): (P,) -> (P, width), sines first, computed in fp32 or better.

    Source: Transformer-XL's `PositionalEmbedding`, XLNet's `positional_embedding`.
    """
    acc = acc_dtype(dtype)
    pairs = torch.arange(0, width, 2, device=positions.device, dtype=acc)
    angles = positions.to(acc)[:, None] * torch.exp(pairs * (-math.log(10000.0) / width))
    return torch.cat([angles.sin(), angles.cos()], dim=-1).to(dtype)
