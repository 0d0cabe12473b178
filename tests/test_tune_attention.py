"""`python -m benchmarks.tune_attention`: what passes, what is timed, what is printed."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from support import backends

pytestmark = pytest.mark.skipif(not backends.TRITON, reason="Triton is not installed")
ROOT = Path(__file__).resolve().parent.parent
if str(ROOT) not in sys.path:
    sys.path.append(str(ROOT))

if backends.TRITON:
    from benchmarks import tune_attention as tune
    from benchmarks.tune_attention import Config, Entry
    from pyext.kernels import _attention_autotune as autotune


def test_what_spills_does_not_pass():
    """128 x 128 sums of 128 threads' 255 registers and as many products spill."""
    program = """
from benchmarks import tune_attention as tune
tune.candidates = lambda entry: [tune.Config(128, 128, 4, 2), tune.Config(64, 64, 4, 2), tune.Config(16, 16, 4, 1)]
print(tune.survivors(tune.Entry("forward", "plain", 2, 90, 128), 1))
"""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    environment.pop("TRITON_INTERPRET", None)
    command = [sys.executable, "-c", program]
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert result.stdout.strip() == f"[{Config(64, 64, 4, 2)}]", result.stdout + result.stderr


def test_candidates():
    """Large tiles first, none twice, none whose sums cannot be held."""
    for kernel, kind, size in tune.TABLES:
        for width in tune.WIDTHS:
            entry = Entry(kernel, kind, size, 90, width)
            found = tune.candidates(entry)
            assert len(set(found)) == len(found) > 20 - 10 * (kernel == "sums")
            assert found[0].rows * found[0].columns >= found[-1].rows * found[-1].columns
            assert all(tune.accumulated(entry, c) <= 255 * 32 * c.warps for c in found)
    assert tune.candidates(Entry("keys", "plain", 2, 90, 128))[0][:3] == (64, 128, 8)


BF16 = [key for key in tune.TABLES if key[2] == 2] if backends.TRITON else []


@pytest.mark.parametrize("key", BF16, ids=lambda key: "-".join(map(str, key)))
def test_the_fastest_is_taken(key, monkeypatch):
    """Each kernel of each kind runs, with numbers that are finite, with the tiles that are timed."""
    tiles, tried = [Config(64, 64, 4, 1), Config(32, 32, 4, 1)], []

    def milliseconds(launch):
        tried.append(*autotune._given.get().items())
        assert all(torch.isfinite(part).all() for results in launch() for part in results)
        return -len(tried)

    monkeypatch.setattr(autotune, "milliseconds", milliseconds)
    with backends.TRITON[0].selected():
        fastest = tune.timed(Entry(*key, 90, 64), tiles, torch.device(backends.TRITON[0].device), [(1, 1, 40)])
    assert tried == [(key[0], tile) for tile in tiles] and fastest == tiles[1]


def test_the_source_is_a_table():
    """What was found is in it, the rest is as it was."""
    found, names = Config(16, 128, 4, 3), {}
    text = tune.source({Entry("keys", "strip", 2, 90, 128): (found, "timed")})
    exec(text, {"Config": Config}, names)
    assert list(names) == ["BACKWARD_CONFIGS"] and "# as it was, timed, as it was" in text
    table, key = names["BACKWARD_CONFIGS"], ("keys", "strip", 2)
    present = tune.TABLES[key]
    assert table == {key: {**present, 90: (present[90][0], found, present[90][2])}}
