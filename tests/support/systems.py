"""Whole models, patched, against themselves as published: one driver for tests/systems.

The oracle is the published model in fp64 (what it casts to fp32 stays fp64), the yardstick the published model in the
dtype under test with its eager attention, both unpatched. Every check leaves a `Record`, from which
`python -m tests.systems` writes docs/systems.md.
"""

from __future__ import annotations

import contextlib
import copy
import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from unittest import mock

import pytest
import torch
from torch.overrides import TorchFunctionMode

import pyext
from pyext import _dispatch
from support.tolerance import assert_close_to_reference

transformers = pytest.importorskip("transformers", minversion="5")
transformers.logging.set_verbosity_error()

BATCH, LENGTH, VOCABULARY = 3, 37, 61  # an odd length; beyond one tile only where a test says so
PADDED = (37, 22, 9)  # tokens of each sequence


@dataclass
class Record:
    """What one check found: the ops that ran and where, and the errors of ours and of eager against fp64."""

    family: str
    model: str
    dtype: torch.dtype
    ops: dict[str, str] = field(default_factory=dict)
    error: float = 0.0  # largest error of the outputs
    eager: float = 0.0
    gradient: float = 0.0  # largest ratio, over the parameters, of the rms errors of ours and of eager
    generated: list[str] = field(default_factory=list)


RECORDS: list[Record] = []


class Wide(TorchFunctionMode):
    """Computes in fp64 what a model casts to fp32. Integers become fp32 as published, as buckets depend on rounding."""

    def __init__(self, integers: bool = False):
        super().__init__()
        self.integers = integers

    def __torch_function__(self, func, types, args=(), kwargs=None):
        wide = {torch.float32: torch.float64}
        args = tuple(wide.get(a, a) if isinstance(a, torch.dtype) else a for a in args)
        kwargs = {k: wide.get(v, v) if isinstance(v, torch.dtype) else v for k, v in (kwargs or {}).items()}
        if func is torch.Tensor.float and (self.integers or args[0].is_floating_point()):
            func = torch.Tensor.double
        return func(*args, **kwargs)


class Watch:
    """Notes every op that chooses a backend, and whether attention was handed a matrix of all pairs."""

    def __init__(self):
        self.ops: dict[str, str] = {}
        self.square = False

    def __call__(self, op, impl, problem):
        backend = self._choose(op, impl, problem)
        self.ops[op] = backend
        for name in ("mask", "dense"):
            value = getattr(problem, name, None)
            self.square |= value is not None and min(value.shape[2:]) > 1
        return backend

    def __enter__(self):
        self._choose = _dispatch.choose
        self._patch = mock.patch.object(_dispatch, "choose", self)
        self._patch.start()
        return self

    def __exit__(self, *_):
        self._patch.stop()


# --- Models ---


def tiny(cls, config, **options) -> torch.nn.Module:
    """A random model in evaluation mode, with eager attention, in which every parameter matters."""
    model = cls(config, **options).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    for name in ("attn", "experts"):
        if getattr(model, f"_can_set_{name}_implementation", lambda: False)():
            getattr(model, f"set_{name}_implementation")("eager")
    return model


def patched(model: torch.nn.Module) -> torch.nn.Module:
    twin = copy.deepcopy(model)
    pyext.integrations.transformers.patch(twin)
    return twin


def tokens(length: int = LENGTH, batch: int = BATCH, low: int = 3, high: int = VOCABULARY) -> torch.Tensor:
    return torch.randint(low, high, (batch, length))


def padding(length: int = LENGTH, lengths=PADDED, left: bool = False) -> torch.Tensor:
    """A padding mask, 1 = a token."""
    mask = (torch.arange(length) < torch.tensor(lengths)[:, None]).long()
    return mask.flip(1) if left else mask


# --- The check ---


def first_tensor(result):
    for name in ("logits", "last_hidden_state"):
        if getattr(result, name, None) is not None:
            return getattr(result, name)
    return result[0] if not isinstance(result, torch.Tensor) else result


def agree(
    model: torch.nn.Module,
    inputs: dict,
    *,
    family: str,
    name: str,
    ops: tuple[str, ...] = ("attention",),
    keep: torch.Tensor | None = None,
    dtype: torch.dtype = torch.float32,
    square: bool = False,
    output: Callable = first_tensor,
    train: bool = False,
    buckets: bool = True,
) -> Record:
    """Output and all parameter gradients of the patched model, against fp64 and eager, under the tolerance rule.

    Args:
        model: unpatched, fp32.
        inputs: keywords of its forward.
        family, name: the row of docs/systems.md, and the model in it.
        ops: those that must run on a kernel of ours.
        keep: (B, L) which positions of the output mean something; None = all.
        square: whether a mask or bias of all pairs is to be expected.
        output: what to compare of what the model returns.
        train: run in training mode (of a model without dropout), as gradient checkpointing asks.
        buckets: whether the oracle converts integers to fp32, as those who count buckets must.
    """
    model = model.to(dtype).train(train)
    ours = patched(model).train(train)
    wide = copy.deepcopy(model).double()
    if train:
        wide.eval()  # without checkpoints, whose second run would not be in fp64

    def call(net, kind):
        cast = {
            key: value.to(kind) if isinstance(value, torch.Tensor) and value.is_floating_point() else value
            for key, value in inputs.items()
        }
        return output(net(**cast))

    runs = [
        (wide, functools.partial(call, wide, torch.float64), Wide(not buckets)),
        (model, functools.partial(call, model, dtype), contextlib.nullcontext()),
        (ours, functools.partial(call, ours, dtype), Watch()),
    ]
    record = compare(runs, family=family, name=name, keep=keep, dtype=dtype)
    watch = runs[2][2]
    for op in ops:
        assert op in watch.ops, f"{name}: pyext.{op} did not run, only {sorted(watch.ops)}"
    assert watch.square <= square, f"{name}: attention was handed a matrix of all pairs"
    return record


def compare(runs, *, family: str, name: str, keep=None, dtype=torch.float32) -> Record:
    """The rule for three runs (module, call, context): fp64, eager, ours. Their parameters have the same names."""
    results, gradients = [], []
    weight = None
    for module, call, context in runs:
        with context:
            out = call()
            if keep is not None:
                out = out[keep]
            if weight is None:
                weight = torch.randn_like(out)
            module.zero_grad(set_to_none=True)
            out.backward(weight.to(out.dtype))
        results.append(out.detach())
        gradients.append({key: p.grad for key, p in module.named_parameters()})
    reference, eager, got = results
    assert_close_to_reference(got, reference, eager, name=f"{name} output", independent=64)
    record = Record(family, name, dtype, dict(getattr(runs[2][2], "ops", {})))
    record.error, record.eager = (float((x.double() - reference).abs().max()) for x in (got, eager))
    sizes = _sizes(gradients[0])
    for key, wide in gradients[0].items():
        near, ours = gradients[1][key], gradients[2][key]
        if near is None:  # nothing flows through it, such as an expert that no token chose
            assert ours is None or not ours.any(), f"{name}: gradient of {key}: eager has none"
            continue
        assert ours is not None, f"{name}: gradient of {key}: ours has none"
        # what cancels (the bias of keys) is as exact as the gradients around it are large
        cancels = float(wide.abs().max()) < 1e-6 * float(sizes[key].max())
        floor = sizes[key] * torch.finfo(dtype).eps if cancels else None
        assert_close_to_reference(
            ours, wide, near, name=f"{name} gradient of {key}", magnitude=sizes[key], floor=floor, independent=16
        )
        errors = [float((x.double() - wide).square().mean().sqrt()) for x in (ours, near)]
        if errors[1] > 0 and not cancels:
            record.gradient = max(record.gradient, errors[0] / errors[1])
    RECORDS.append(record)
    return record


def _sizes(gradients: dict) -> dict:
    """For each parameter the largest gradient of the parameters around it."""
    parents: dict = {}
    for key, gradient in gradients.items():
        if gradient is not None:
            parent = key.rpartition(".")[0].rpartition(".")[0]
            parents[parent] = max(parents.get(parent, 0.0), float(gradient.abs().max()))
    return {key: torch.full((1,), parents.get(key.rpartition(".")[0].rpartition(".")[0], 0.0)) for key in gradients}


def generates_alike(
    model: torch.nn.Module, inputs: dict, record: Record, *, new_tokens: int = 9, kinds: tuple[str, ...] = ("dynamic",)
) -> None:
    """Greedy generation of the patched and the published model is equal token by token, with each kind of cache."""
    options = {
        "dynamic": {},
        "static": {"cache_implementation": "static"},
        "none": {"use_cache": False},
        "beams": {"num_beams": 3},
    }
    ours = patched(model)
    for kind in kinds:
        asked = dict(max_new_tokens=new_tokens, min_new_tokens=new_tokens, do_sample=False, **options[kind])
        wanted = model.generate(**inputs, **asked)
        got = ours.generate(**inputs, **asked)
        assert torch.equal(got, wanted), f"{record.model}, cache {kind}: {got.tolist()} instead of {wanted.tolist()}"
        record.generated.append(kind)


# --- Masks and blocks ---


def attend_by_the_book(query, key, value, visible):
    """softmax(q k^T / sqrt(D)) v over the visible keys, (B, H, L, D)."""
    score = (query @ key.transpose(-1, -2) / query.shape[-1] ** 0.5).masked_fill(~visible, -torch.inf)
    return torch.softmax(score, -1) @ value


class _Attention(torch.nn.Module):
    """Query, key and value as parameters, so that `compare` sees their gradients."""

    def __init__(self, length: int, attend: Callable, heads: int = 2, width: int = 16):
        super().__init__()
        generator = torch.Generator().manual_seed(torch.initial_seed() % 2**31)
        for name in ("query", "key", "value"):
            setattr(self, name, torch.nn.Parameter(torch.randn(2, heads, length, width, generator=generator)))
        self.attend = attend

    def forward(self):
        return self.attend(self.query, self.key, self.value)


def mask_agrees(mask, visible: torch.Tensor, *, family: str, name: str) -> Record:
    """Attention under a `pyext.masks` object, against the same under a dense bool tensor (L, L)."""
    length = visible.shape[-1]

    def dense(query, key, value):
        return attend_by_the_book(query, key, value, visible)

    def ours(query, key, value):
        return pyext.attention(query, key, value, mask=mask)

    nets = _Attention(length, dense).double(), _Attention(length, dense), _Attention(length, ours)
    contexts = torch.enable_grad(), torch.enable_grad(), Watch()
    return compare([(net, net, context) for net, context in zip(nets, contexts)], family=family, name=name)


def mask_rows_agree(mask, rows: torch.Tensor, visible: torch.Tensor, length: int, *, family: str, name: str) -> None:
    """Some queries of a long sequence: visible (rows, L). Their gradients reach exactly the keys that they see."""
    query, key, value = (torch.randn(1, 1, length, 8, requires_grad=True) for _ in range(3))
    with Watch() as watch:
        out = pyext.attention(query, key, value, mask=mask)[:, :, rows]
        weight = torch.randn_like(out)
        got = torch.autograd.grad(out, (key, value), weight)
    leaves = [x.detach().double().requires_grad_() for x in (query, key, value)]
    wanted = attend_by_the_book(leaves[0][:, :, rows], *leaves[1:], visible)
    torch.testing.assert_close(out.double(), wanted, rtol=1e-4, atol=1e-5)
    for a, b in zip(got, torch.autograd.grad(wanted, leaves[1:], weight.double())):
        torch.testing.assert_close(a.double(), b, rtol=1e-3, atol=1e-5)
    error = float((out.detach().double() - wanted.detach()).abs().max())
    RECORDS.append(Record(family, name, torch.float32, dict(watch.ops), error))


def block_agrees(block: torch.nn.Module, inputs: tuple, *, family: str, name: str, dtype=torch.float32) -> Record:
    """A block of `support.blocks` on pyext, against itself by the book. Floating inputs get gradients, too."""

    class Given(torch.nn.Module):
        def __init__(self, fused: bool):
            super().__init__()
            self.block = copy.deepcopy(block)
            self.block.fused = fused
            floating = [x.clone() for x in inputs if x.is_floating_point()]
            self.floating = torch.nn.ParameterList(map(torch.nn.Parameter, floating))

        def forward(self):
            floating = iter(self.floating)
            return self.block(*(next(floating) if x.is_floating_point() else x for x in inputs))

    nets = Given(False).to(dtype).double(), Given(False).to(dtype), Given(True).to(dtype)
    contexts = torch.enable_grad(), torch.enable_grad(), Watch()
    return compare([(net, net, c) for net, c in zip(nets, contexts)], family=family, name=name, dtype=dtype)
