"""What a call must not do: write its inputs, touch global random state, keep what it need not, alias its inputs."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch

import pyext
from support.cases import arguments, case, draw, run
from support.parts import (
    Shape,
    alibi,
    bool_attn_mask,
    causal,
    dense,
    documents,
    float_attn_mask,
    padding,
    prefix,
    t5,
)

CASES = [
    case(Shape(2, 4, 2, 20, 30, 16, 16), causal(), t5(), sinks=True),
    case(Shape(2, 4, 4, 20, 30, 16, 16), dense("1hqk"), alibi(), padding(), prefix()),
    case(Shape(2, 4, 4, 30, 30, 16, 16), float_attn_mask("b11k"), documents(batched=True)),
    case(Shape(1, 4, 1, 1, 300, 16, 16), bool_attn_mask("111k"), layout="every_second"),
]


def tensors_of(drawn):
    """Every tensor of a call: leaves, cotangents, and what hides in bias and mask objects."""
    tensors = [*drawn.leaves.values(), drawn.grad_out, drawn.grad_lse]
    for term in drawn.terms:
        made = term.build({key: drawn.leaves[new] for key, new in term.rename.items()})
        tensors += [made, *getattr(made, "__dict__", {}).values()]
    return [x for x in tensors if isinstance(x, torch.Tensor)]


def bytes_of(tensor):
    return torch.tensor(tensor.untyped_storage().tolist(), dtype=torch.uint8)


@pytest.mark.parametrize("which", CASES, ids=str)
def test_inputs_are_not_written(which, backend, seed):
    drawn = draw(which, torch.float32, seed)
    tensors = tensors_of(drawn)
    before = [(bytes_of(t), t._version) for t in tensors]
    run(drawn, backend.impl)
    for tensor, (content, version) in zip(tensors, before):
        assert tensor._version == version
        assert torch.equal(bytes_of(tensor), content)


@pytest.mark.parametrize("which", CASES, ids=str)
def test_random_state_is_not_touched(which, backend, seed):
    drawn = draw(which, torch.float32, seed)
    generator = torch.Generator().manual_seed(3)
    before = torch.get_rng_state(), generator.get_state()
    q, k, v = (drawn.leaves[name] for name in ("query", "key", "value"))
    out = pyext.attention(q, k, v, generator=generator, impl=backend.impl, **arguments(drawn))
    out.sum().backward()
    pyext.attention(q, k, v, dropout_p=0.3, generator=torch.Generator(), impl=backend.impl, **arguments(drawn))
    assert torch.equal(torch.get_rng_state(), before[0])
    assert torch.equal(generator.get_state(), before[1])
    pyext.attention(q, k, v, dropout_p=0.3, impl=backend.impl, **arguments(drawn))
    assert not torch.equal(torch.get_rng_state(), before[0])


def test_result_does_not_alias_inputs(backend):
    """Even one key, where the output equals the value, is a copy; so are the gradients."""
    q, k, v = (torch.randn(1, 2, n, 8, requires_grad=True) for n in (4, 1, 1))
    out = pyext.attention(q, k, v, impl=backend.impl)
    out.sum().backward()
    storages_in = {x.untyped_storage().data_ptr() for x in (q, k, v)}
    assert out.untyped_storage().data_ptr() not in storages_in
    assert not {x.grad.untyped_storage().data_ptr() for x in (q, k, v)} & storages_in


def test_in_place_change_before_backward_is_noticed(backend):
    """Autograd refuses to differentiate with inputs that changed after forward, rather than using the new ones."""
    q, k, v = (torch.randn(1, 2, 9, 8, requires_grad=True) for _ in range(3))
    k2 = k * 1.0
    out = pyext.attention(q, k2, v, impl=backend.impl)
    with torch.no_grad():
        k2.add_(1.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


def test_graph_is_freed(cpu):
    """Nothing keeps the inputs alive after the result and its graph are gone."""
    x = torch.randn(1, 2, 9, 8, requires_grad=True)
    hidden = x * 2.0
    watch = weakref.ref(hidden)
    out = pyext.attention(hidden, hidden, hidden, impl=cpu.impl)
    out.sum().backward()
    del hidden, out
    gc.collect()
    assert watch() is None


def test_threads_setting_is_left_alone(cpu):
    torch.set_num_threads(2)
    q = torch.randn(1, 2, 300, 16)
    pyext.attention(q, q, q, impl=cpu.impl)
    assert torch.get_num_threads() == 2
