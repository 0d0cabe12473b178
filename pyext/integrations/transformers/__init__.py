"""Transformers' models on pyext. Two lines:

    from pyext.integrations.transformers import patch
    print(patch(model))

or, for what Transformers' registries reach, `register()` and then `attn_implementation="pyext"`,
`experts_implementation="pyext"` where the model is made.
"""

import transformers

_OLDEST = (5, 4)  # the first whose mask functions are told where the queries stand, instead of the whole positions


def _check_release(version: str) -> None:
    if tuple(map(int, version.split(".")[:2])) < _OLDEST:
        oldest = ".".join(map(str, _OLDEST))
        raise ImportError(
            f"pyext.integrations.transformers needs transformers >= {oldest}, whose registries of masks and experts it "
            f"extends, found {version}: pip install 'transformers>={oldest}'; pyext.attention and pyext.nn work with "
            "any release"
        )


_check_release(transformers.__version__)

from ._attention import attention_forward  # noqa: E402
from ._feed_forward import experts_forward  # noqa: E402
from ._masks import model_mask  # noqa: E402
from ._patch import Report, patch, unpatch  # noqa: E402

__all__ = ["Report", "attention_forward", "experts_forward", "model_mask", "patch", "register", "unpatch"]


def register(name: str = "pyext") -> None:
    """Add pyext to Transformers' registries of attention, attention masks and experts, for all models.

    Models choose it: `from_pretrained(..., attn_implementation="pyext", experts_implementation="pyext")`, or later
    `model.set_attn_implementation("pyext")`, `model.set_experts_implementation("pyext")`.
    """
    from transformers.integrations.moe import ExpertsInterface
    from transformers.masking_utils import AttentionMaskInterface
    from transformers.modeling_utils import AttentionInterface

    AttentionInterface.register(name, attention_forward)
    AttentionMaskInterface.register(name, model_mask)
    ExpertsInterface.register(name, experts_forward)
