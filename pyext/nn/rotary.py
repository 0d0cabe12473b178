"""`RotaryEmbedding`: the cos and sin tables that `pyext.rotary` and `pyext.Rotary` take.

Sources, all as Transformers computes them (`modeling_rope_utils.py`):
    default: Su et al., "RoFormer" (2021), section 3.2.2: frequency of pair k is base^(-2k / R)
    linear: Chen et al., "Extending context window of large language models via position interpolation" (2023)
    dynamic: NTK-aware scaling of the base with the length (Peng et al., YaRN, 2023, appendix B.2)
    yarn: Peng et al., "YaRN: efficient context window extension of large language models" (2023), section 3
    llama3: Grattafiori et al., "The Llama 3 herd of models" (2024), and the code of Llama 3.1
"""

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from .. import _checks

_COMMON = {"rope_type", "type", "rope_theta", "partial_rotary_factor"}
#: Keys of a scaling dict: (required, optional), besides the common ones.
_KEYS = {
    "default": (set(), set()),
    "linear": ({"factor"}, set()),
    "dynamic": ({"factor"}, {"original_max_position_embeddings"}),
    "yarn": (
        {"factor"},
        {
            "original_max_position_embeddings", "attention_factor", "beta_fast", "beta_slow", "mscale",
            "mscale_all_dim", "truncate",
        },
    ),
    "llama3": ({"factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"}, set()),
}  # fmt: skip


class RotaryEmbedding(nn.Module):
    """cos and sin of position * frequency, for `pyext.rotary`: fp32 tables with one column per pair of features.

    Args:
        dim: features of a head, D.
        max_position: length of the cached tables, and the context length the model was configured for
            (Transformers' `max_position_embeddings`); longer calls are computed, not cached.
        base: the frequency of pair k is base^(-2k / R).
        partial_rotary_factor: share of the features that is rotated, R = int(dim * partial_rotary_factor).
        scaling: None, or a dict with the keys of Transformers' `rope_scaling` / `rope_parameters`: rope_type
            "default", "linear", "dynamic", "yarn" or "llama3", and that type's parameters. Its `rope_theta` and
            `partial_rotary_factor` take precedence over the arguments.
        device: where the tables lie; None = torch's default device.
    Attributes:
        inv_freq: (R/2,) fp32, the frequencies (of a call no longer than max_position). A buffer, as are the cached
            tables, but not part of the state_dict; they follow the module to other devices and always stay fp32.
        attention_scaling: YaRN's factor on cos and sin (which scales query and key alike), else 1.
    Raises:
        TypeError, ValueError naming the argument or the key of scaling.
    """

    def __init__(
        self,
        dim: int,
        max_position: int = 2048,
        base: float = 10000.0,
        *,
        partial_rotary_factor: float = 1.0,
        scaling: Mapping | None = None,
        device: torch.device | str | None = None,
    ):
        super().__init__()
        self.max_position = _positive("max_position", _checks.length("max_position", max_position))
        self.scaling = _scaling(scaling)
        self.base = float(_positive("base", self.scaling.get("rope_theta", base)))
        share = self.scaling.get("partial_rotary_factor", partial_rotary_factor)
        self.dim = int(_checks.length("dim", dim) * _checks.probability("partial_rotary_factor", share))
        if self.dim % 2:
            raise ValueError(f"dim * partial_rotary_factor must be even, got {self.dim}")
        if self.scaling["rope_type"] == "dynamic" and self.dim == 2:
            raise ValueError("dim * partial_rotary_factor must be more than 2 with rope_type 'dynamic', got 2")
        self.attention_scaling = _attention_scaling(self.scaling, self.max_position)
        self._cache(torch.get_default_device() if device is None else torch.device(device))

    def forward(self, positions: int | Tensor) -> tuple[Tensor, Tensor]:
        """(cos, sin), fp32.

        Args:
            positions: a length L, for tables (L, R/2) of the positions 0 to L - 1; or integer positions (L,) or (B, L),
                for tables (L, R/2) or (B, L, R/2) whose row i is that of the i-th token.
        Dynamic scaling follows the length of the call (the largest position + 1), not that of former calls.
        """
        if not isinstance(positions, Tensor):
            length = _checks.length("positions", positions)
            if length <= self.max_position:
                return self.cos[:length], self.sin[:length]
            positions = torch.arange(length, device=self.inv_freq.device)
        elif _checks.integer("positions", positions).dim() not in (1, 2):
            raise _checks.shape_error("positions", "(L,) or (B, L)", "", positions)
        return self._tables(positions.to(self.inv_freq.device))

    @torch.no_grad()
    def _tables(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        frequencies = self.inv_freq
        if self.scaling["rope_type"] == "dynamic" and positions.numel():
            frequencies = self._dynamic(positions.amax() + 1)
        angles = positions[..., None].float() * frequencies
        return angles.cos() * self.attention_scaling, angles.sin() * self.attention_scaling

    def _dynamic(self, length: Tensor) -> Tensor:
        """The base grows so that the lowest frequency interpolates `factor` times at `factor` times max_position."""
        ratio = length.double().clamp(min=self.max_position) / self.max_position
        factor = self.scaling["factor"]
        base = self.base * (factor * ratio - (factor - 1)) ** (self.dim / (self.dim - 2))
        return _frequencies(base.float(), self.dim)

    def _cache(self, device: torch.device) -> None:
        """Make the buffers. Computed on the CPU, so that they are the same bits on every device."""
        cpu = torch.device("cpu")
        self.register_buffer(
            "inv_freq", _scaled_frequencies(self.dim, self.base, self.scaling, self.max_position), False
        )
        cos, sin = self._tables(torch.arange(self.max_position, device=cpu))
        for name, value in (("inv_freq", self.inv_freq), ("cos", cos), ("sin", sin)):
            self.register_buffer(name, value.to(device), False)

    def _apply(self, fn, recurse: bool = True):
        """Moves to other devices; other dtypes would lose the positions, and `to_empty` the contents."""
        super()._apply(fn, recurse)
        self._cache(self.inv_freq.device)
        return self

    def extra_repr(self) -> str:
        kind = self.scaling["rope_type"]
        return f"rotated={self.dim}, max_position={self.max_position}, base={self.base}, rope_type={kind!r}"


def _positive(name: str, value) -> float:
    if _checks.real(name, value) <= 0:
        raise ValueError(f"{name} must be positive, got {value}")
    return value


def _scaling(value) -> dict:
    """A copy of the dict with its type under "rope_type" and without entries that are None."""
    if value is None:
        return {"rope_type": "default"}
    if not isinstance(value, Mapping):
        raise TypeError(f"scaling must be a dict (or None), got {type(value).__name__}")
    scaling = {key: entry for key, entry in value.items() if entry is not None}
    scaling["rope_type"] = kind = scaling.get("rope_type", scaling.pop("type", "default"))
    if kind not in _KEYS:
        raise ValueError(f"scaling['rope_type'] must be one of {', '.join(map(repr, _KEYS))}, got {kind!r}")
    required, optional = _KEYS[kind]
    # Transformers gives YaRN's factor as None where the ratio of the two lengths stands for it.
    if kind == "yarn" and "original_max_position_embeddings" in scaling:
        required = set()
        optional = optional | {"factor"}
    for key in sorted(required - scaling.keys()):
        raise ValueError(f"scaling must have {key!r} with rope_type {kind!r}, got {dict(value)}")
    for key in sorted(scaling.keys() - required - optional - _COMMON):
        raise ValueError(f"scaling has no {key!r} with rope_type {kind!r}, got {dict(value)}")
    for key in scaling.keys() - {"rope_type", "type", "truncate"}:
        check = _checks.real if key.startswith("mscale") else _positive  # mscale 0 counts as absent
        check(f"scaling[{key!r}]", scaling[key])
    return scaling


def _powers(base: float | Tensor, dim: int) -> Tensor:
    """base^(2k / dim), (dim / 2,) fp32, on the CPU unless base is a tensor elsewhere."""
    device = base.device if isinstance(base, Tensor) else "cpu"
    return base ** (torch.arange(0, dim, 2, dtype=torch.int64, device=device).float() / dim)


def _frequencies(base: float | Tensor, dim: int) -> Tensor:
    """base^(-2k / dim), (dim / 2,) fp32."""
    return 1.0 / _powers(base, dim)


def _scaled_frequencies(dim: int, base: float, scaling: dict, max_position: int) -> Tensor:
    """inv_freq of each type; that of "dynamic" up to max_position."""
    kind = scaling["rope_type"]
    if kind == "yarn":
        return _yarn(dim, base, scaling, max_position)
    frequencies = _frequencies(base, dim)
    if kind == "linear":
        return frequencies / scaling["factor"]
    return _llama3(frequencies, scaling) if kind == "llama3" else frequencies


def _yarn_factor(scaling: dict, max_position: int) -> tuple[float, int]:
    """(factor, original context length)."""
    original = scaling.get("original_max_position_embeddings", max_position)
    return scaling.get("factor", max_position / original), original


def _yarn(dim: int, base: float, scaling: dict, max_position: int) -> Tensor:
    """Frequencies that turn often within the original context stay, those that hardly turn are interpolated."""
    factor, original = _yarn_factor(scaling, max_position)

    def pair_of(rotations: float) -> float:
        """The (fractional) pair that makes so many rotations over the original context."""
        return dim * math.log(original / (rotations * 2 * math.pi)) / (2 * math.log(base))

    low, high = pair_of(scaling.get("beta_fast", 32)), pair_of(scaling.get("beta_slow", 1))
    if scaling.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    if low == high:
        high += 0.001  # keeps the ramp finite
    pair = torch.arange(dim // 2, dtype=torch.float32, device="cpu")
    keep = 1 - ((pair - low) / (high - low)).clamp(0, 1)
    powers = _powers(base, dim)
    return 1.0 / (factor * powers) * (1 - keep) + 1.0 / powers * keep


def _llama3(frequencies: Tensor, scaling: dict) -> Tensor:
    """Long wavelengths are interpolated, short ones stay, a linear ramp in 1 / wavelength lies between."""
    factor, original = scaling["factor"], scaling["original_max_position_embeddings"]
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    wavelength = 2 * math.pi / frequencies
    keep = ((original / wavelength - low) / (high - low)).clamp(0, 1)
    return (1 - keep) * frequencies / factor + keep * frequencies


def _attention_scaling(scaling: dict, max_position: int) -> float:
    """YaRN's temperature as a factor on the tables (section 3.4; with mscale as in DeepSeek-V2's code)."""
    if scaling["rope_type"] != "yarn":
        return 1.0
    factor, _ = _yarn_factor(scaling, max_position)

    def magnitude(mscale: float) -> float:
        return 0.1 * mscale * math.log(factor) + 1.0 if factor > 1 else 1.0

    if "attention_factor" in scaling:
        return float(scaling["attention_factor"])
    if scaling.get("mscale") and scaling.get("mscale_all_dim"):
        return magnitude(scaling["mscale"]) / magnitude(scaling["mscale_all_dim"])
    return magnitude(1.0)
