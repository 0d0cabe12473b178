"""pyext.nn.RotaryEmbedding: the tables of Transformers, to the bit where fp32 allows; devices, dtypes, state."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch

import pyext

LLAMA3 = dict(
    rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=512
)
YARN = dict(rope_type="yarn", factor=8.0, original_max_position_embeddings=256)
SCALINGS = {
    "none": None,
    "default": dict(rope_type="default"),
    "linear": dict(rope_type="linear", factor=4.0),
    "dynamic": dict(rope_type="dynamic", factor=2.5),
    "yarn": YARN,
    "yarn, betas": dict(YARN, beta_fast=20, beta_slow=2.5, truncate=False),
    "yarn, mscale": dict(YARN, mscale=1.0, mscale_all_dim=0.707),
    "yarn, mscale 0": dict(YARN, mscale=1.0, mscale_all_dim=0.0),
    "yarn, attention_factor": dict(YARN, attention_factor=0.7),
    "yarn, factor None": dict(YARN, factor=None),
    "yarn, singular ramp": dict(YARN, beta_fast=1e-3, beta_slow=1e-3),
    "llama3": LLAMA3,
    "llama3, smooth": dict(LLAMA3, factor=3.7, low_freq_factor=0.8, high_freq_factor=9.0),
}


def config(head_dim=96, max_position=2048, base=50000.0, scaling=None):
    transformers = pytest.importorskip("transformers")
    parameters = dict(rope_theta=base, **(scaling or {"rope_type": "default"}))
    return transformers.LlamaConfig(
        hidden_size=4 * head_dim,
        num_attention_heads=4,
        max_position_embeddings=max_position,
        rope_parameters=parameters,
    )


def llama_embedding(**options):
    module = pytest.importorskip("transformers.models.llama.modeling_llama")
    return module.LlamaRotaryEmbedding(config(**options))


@pytest.mark.parametrize("head_dim", [96, 64, 6])
@pytest.mark.parametrize("name", SCALINGS)
def test_frequencies_are_those_of_transformers(name, head_dim):
    """inv_freq and attention factor of ROPE_INIT_FUNCTIONS (and of LLaMA's default), bit for bit."""
    scaling = SCALINGS[name]
    theirs = llama_embedding(head_dim=head_dim, scaling=scaling)
    ours = pyext.nn.RotaryEmbedding(head_dim, 2048, base=50000.0, scaling=scaling)
    assert torch.equal(ours.inv_freq, theirs.inv_freq) and ours.inv_freq.dtype == torch.float32
    assert ours.attention_scaling == theirs.attention_scaling


@pytest.mark.parametrize("length", [1, 17, 2048, 2049, 5000])
@pytest.mark.parametrize("name", SCALINGS)
def test_tables_are_those_of_llama(name, length):
    scaling = SCALINGS[name]
    theirs = llama_embedding(scaling=scaling)  # a new one each time: its dynamic scaling remembers the longest call
    wanted = [table[0, :, :48] for table in theirs(torch.zeros(1), torch.arange(length)[None])]
    ours = pyext.nn.RotaryEmbedding(96, base=50000.0, scaling=scaling)
    # Transformers takes the dynamic base in fp32, here it is fp64: the angles differ by the rounding of the base.
    bound = 6e-7 * length if scaling and scaling["rope_type"] == "dynamic" and length > 2048 else 0.0
    for positions in (length, torch.arange(length), torch.arange(length, dtype=torch.int32)[None]):
        for got, table in zip(ours(positions), wanted):
            assert got.dtype == torch.float32 and got.shape[-2:] == (length, 48)
            torch.testing.assert_close(got.view(length, 48), table, rtol=0, atol=bound)


@pytest.mark.parametrize("seq_len", [100, 2048, 3000, 9001])
def test_dynamic_base_of_transformers(seq_len):
    """Against the function itself, which computes the base in fp64 when it is given a plain number."""
    utils = pytest.importorskip("transformers.modeling_rope_utils")
    scaling = SCALINGS["dynamic"]
    wanted, _ = utils.ROPE_INIT_FUNCTIONS["dynamic"](config(scaling=scaling), seq_len=seq_len)
    cos, sin = pyext.nn.RotaryEmbedding(96, base=50000.0, scaling=scaling)(seq_len)
    angles = torch.arange(seq_len)[:, None].float() * wanted
    torch.testing.assert_close(cos, angles.cos(), rtol=0, atol=1e-6)
    torch.testing.assert_close(sin, angles.sin(), rtol=0, atol=1e-6)


def test_dynamic_scaling_forgets():
    embedding = pyext.nn.RotaryEmbedding(32, 64, scaling=dict(rope_type="dynamic", factor=4.0))
    before = embedding(50)
    longer = embedding(200)
    assert all(torch.equal(a, b) for a, b in zip(before, embedding(50)))
    assert not torch.equal(longer[0][:50], before[0])
    assert all(torch.equal(a, b) for a, b in zip(longer, embedding(torch.arange(200))))


@pytest.mark.parametrize(
    ("share", "key"), [(0.25, "argument"), (0.25, "scaling"), (0.5, "argument")], ids=lambda x: str(x)
)
def test_partial(share, key):
    """GPT-NeoX: frequencies of the rotated features alone."""
    options = dict(scaling={"partial_rotary_factor": share}) if key == "scaling" else dict(partial_rotary_factor=share)
    partial = pyext.nn.RotaryEmbedding(96, **options)
    whole = pyext.nn.RotaryEmbedding(int(96 * share))
    for a, b in zip(partial(30), whole(30)):
        assert torch.equal(a, b)


def test_rope_theta_and_legacy_type():
    a = pyext.nn.RotaryEmbedding(64, base=123.0, scaling={"type": "linear", "factor": 2, "rope_theta": 500000.0})
    b = pyext.nn.RotaryEmbedding(64, base=500000.0, scaling={"rope_type": "linear", "factor": 2.0})
    assert torch.equal(a.inv_freq, b.inv_freq)


def test_positions_of_a_batch():
    embedding = pyext.nn.RotaryEmbedding(16, 50)
    positions = torch.randint(0, 100, (3, 7))
    cos, sin = embedding(positions)
    assert cos.shape == sin.shape == (3, 7, 8)
    whole_cos, whole_sin = embedding(100)
    assert torch.equal(cos, whole_cos[positions]) and torch.equal(sin, whole_sin[positions])


def test_nothing_to_compute():
    embedding = pyext.nn.RotaryEmbedding(16, 50, scaling=dict(rope_type="dynamic", factor=2.0))
    for positions, shape in ((0, (0, 8)), (torch.ones(0).long(), (0, 8)), (torch.ones(2, 0).long(), (2, 0, 8))):
        assert all(table.shape == shape for table in embedding(positions))
    assert pyext.nn.RotaryEmbedding(16, partial_rotary_factor=0.0)(5)[0].shape == (5, 0)


def test_no_state_and_no_gradient():
    embedding = pyext.nn.RotaryEmbedding(16)
    assert not embedding.state_dict() and not list(embedding.parameters())
    assert {name for name, _ in embedding.named_buffers()} == {"inv_freq", "cos", "sin"}
    assert not any(table.requires_grad for table in (*embedding(5), *embedding(torch.arange(5))))
    assert embedding(5)[0].data_ptr() == embedding.cos.data_ptr()  # cached, not copied


@pytest.mark.parametrize("change", [torch.nn.Module.half, torch.nn.Module.bfloat16, torch.nn.Module.double])
def test_other_dtypes_leave_the_tables(change):
    """A model in half precision still counts its positions in fp32."""
    embedding = pyext.nn.RotaryEmbedding(16, scaling=YARN)
    wanted = embedding(9)
    block = change(torch.nn.ModuleDict({"rotary": embedding, "linear": torch.nn.Linear(2, 2)}))
    assert block["linear"].weight.dtype != torch.float32
    for a, b in zip(wanted, block["rotary"](9)):
        assert b.dtype == torch.float32 and torch.equal(a, b)


def test_devices():
    """On the meta device there are shapes; to_empty brings the contents back, which no state_dict would."""
    wanted = pyext.nn.RotaryEmbedding(16, 40)
    with torch.device("meta"):
        embedding = pyext.nn.RotaryEmbedding(16, 40)
    assert embedding(9)[0].is_meta and embedding(90)[0].is_meta and embedding.inv_freq.is_meta
    embedding.to_empty(device="cpu")
    for length in (9, 90):
        assert all(torch.equal(a, b) for a, b in zip(embedding(length), wanted(length)))
    assert pyext.nn.RotaryEmbedding(16, device="meta").cos.is_meta
    assert wanted.to("meta")(9)[0].is_meta


def test_copies():
    embedding = pyext.nn.RotaryEmbedding(16, scaling=LLAMA3)
    for other in (copy.deepcopy(embedding), pickle.loads(pickle.dumps(embedding))):
        assert torch.equal(other(9)[1], embedding(9)[1])
    assert "llama3" in repr(embedding)


def test_tables_rotate():
    """End to end: what a model does with it."""
    cos, sin = pyext.nn.RotaryEmbedding(8)(7)
    q = torch.randn(2, 3, 7, 8)
    wanted = pyext.attention(pyext.rotary(q, cos, sin), pyext.rotary(q, cos, sin), q)
    assert torch.equal(pyext.attention(q, q, q, rotary=pyext.Rotary(cos, sin)), wanted)


REFUSED = {
    "dim": (lambda: pyext.nn.RotaryEmbedding(16.5), TypeError, "dim must be an int, got float"),
    "dim, odd": (lambda: pyext.nn.RotaryEmbedding(7), ValueError, "partial_rotary_factor must be even, got 7"),
    "max_position": (lambda: pyext.nn.RotaryEmbedding(8, 0), ValueError, "max_position must be positive, got 0"),
    "base": (lambda: pyext.nn.RotaryEmbedding(8, base=-1.0), ValueError, "base must be positive, got -1.0"),
    "share": (
        lambda: pyext.nn.RotaryEmbedding(8, partial_rotary_factor=1.5),
        ValueError,
        "partial_rotary_factor must be between 0 and 1, got 1.5",
    ),
    "scaling": (lambda: pyext.nn.RotaryEmbedding(8, scaling=2.0), TypeError, "scaling must be a dict .*got float"),
    "type": (
        lambda: pyext.nn.RotaryEmbedding(8, scaling={"rope_type": "longrope"}),
        ValueError,
        r"scaling\['rope_type'\] must be one of 'default', 'linear', 'dynamic', 'yarn', 'llama3', got 'longrope'",
    ),
    "missing": (
        lambda: pyext.nn.RotaryEmbedding(8, scaling={"rope_type": "linear"}),
        ValueError,
        "scaling must have 'factor' with rope_type 'linear'",
    ),
    "unknown": (
        lambda: pyext.nn.RotaryEmbedding(8, scaling={"rope_type": "linear", "factor": 2.0, "mrope_section": [1]}),
        ValueError,
        "scaling has no 'mrope_section' with rope_type 'linear'",
    ),
    "factor": (
        lambda: pyext.nn.RotaryEmbedding(8, scaling={"rope_type": "linear", "factor": "2"}),
        TypeError,
        r"scaling\['factor'\] must be a number, got str",
    ),
    "dynamic": (
        lambda: pyext.nn.RotaryEmbedding(2, scaling={"rope_type": "dynamic", "factor": 2}),
        ValueError,
        "must be more than 2 with rope_type 'dynamic'",
    ),
    "positions, negative": (lambda: pyext.nn.RotaryEmbedding(8)(-1), ValueError, "positions must be a non-negative"),
    "positions, float": (lambda: pyext.nn.RotaryEmbedding(8)(1.0), TypeError, "positions must be an int, got float"),
    "positions, tensor": (
        lambda: pyext.nn.RotaryEmbedding(8)(torch.ones(3)),
        TypeError,
        "positions must be an integer tensor",
    ),
    "positions, 3-D": (
        lambda: pyext.nn.RotaryEmbedding(8)(torch.ones(1, 2, 3).long()),
        ValueError,
        r"positions must have shape \(L,\) or \(B, L\), got \(1, 2, 3\)",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_bad_input(name):
    call, error, message = REFUSED[name]
    with pytest.raises(error, match=message):
        call()
