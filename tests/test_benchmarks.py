"""The benchmark harness: its arithmetic, its error rule; a wrong result has no speed. No timing is asserted."""

import dataclasses
import itertools
import json
import math
import sys
from pathlib import Path

import pytest
import torch

ROOT = str(Path(__file__).resolve().parent.parent)
if ROOT not in sys.path:
    sys.path.append(ROOT)

import pyext  # noqa: E402
from benchmarks import (  # noqa: E402
    attention_cases,
    compare,
    every_case,
    glu_cases,
    harness,
    length_cases,
    long_context,
    mask_cases,
    moe_cases,
    peers,
    report,
    report_page,
    rotary_cases,
    systems_cases,
)  # fmt: skip
from benchmarks.harness import Case, Contender, Measured, Work  # noqa: E402
from pyext._primitives import Sizes  # noqa: E402

MEASURED = Measured({"pyext": 0.5, "SDPA": 2.0}, flops=100.0, bytes=40.0, peak=400.0, bandwidth=160.0)


@pytest.mark.parametrize(
    ("figure", "value", "met"),
    [
        (harness.percent_of_peak(50), 50.0, True),
        (harness.percent_of_peak(50.1), 50.0, False),
        (harness.percent_of_bandwidth(40), 50.0, True),
        (harness.speedup("SDPA", 4.0), 4.0, True),
        (harness.speedup("flex_attention", 1.0), None, None),
        (harness.speedup("SDPA"), 4.0, None),
        (harness.slowdown("SDPA", 3), -75.0, True),
        (harness.time_ratio("SDPA", 0.2), 0.25, False),
        (harness.microseconds(15), 5e5, False),
    ],
)
def test_figures(figure, value, met):
    result = figure.result(MEASURED)
    assert result["value"] == pytest.approx(value)
    assert result["met"] is met
    assert figure.result(None)["value"] is None
    assert figure.result(None)["met"] is None


def test_no_probe_no_share():
    bare = Measured({"pyext": 0.5}, flops=100.0, bytes=40.0)
    assert harness.percent_of_peak(50).result(bare)["met"] is None
    assert harness.percent_of_bandwidth(50).result(bare)["value"] is None


def test_compare_follows_the_tolerance_rule():
    truth = {"out": torch.linspace(-1, 1, 101, dtype=torch.float64)}
    eager = {"out": truth["out"].float() + 1e-3}
    entry = harness.compare({"out": truth["out"].float() + 1e-3}, truth, eager)
    rounding = ((truth["out"].float() + 0.3 - 0.3).double() - truth["out"]).abs().max().item()
    assert entry["ok"]
    assert entry["tensors"]["out"]["allowed"] == pytest.approx(2 * 1e-3 + 2 * rounding, rel=1e-3)
    one_off = truth["out"].clone()
    one_off[7] += 2.1e-3  # within the mean, beyond the maximum
    assert not harness.compare({"out": one_off}, truth, eager)["ok"]
    assert not harness.compare({"out": truth["out"] + 1.8e-3}, truth, eager)["ok"]  # the reverse


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_compare_sees_what_is_not_finite(bad):
    truth = {"out": torch.zeros(4, dtype=torch.float64), "grad": torch.zeros(4, dtype=torch.float64)}
    got = {"out": torch.zeros(4), "grad": torch.tensor([0, bad, 0, 0])}
    entry = harness.compare(got, truth, {name: t.float() for name, t in truth.items()})
    assert not entry["ok"]
    assert entry["worst"] == "grad"


def test_compare_wants_the_same_infinities():
    truth = {"lse": torch.tensor([0.0, -math.inf], dtype=torch.float64)}
    eager = {"lse": truth["lse"].float()}
    assert harness.compare({"lse": truth["lse"].float()}, truth, eager)["ok"]
    assert not harness.compare({"lse": torch.tensor([0.0, -1e30])}, truth, eager)["ok"]


def small_case(name="small", wrong=0.0):
    """A case whose pyext entry is off by `wrong`."""

    def setup(seed):
        work = attention_cases.work_of("forward+backward", attention_cases.plain(), (1, 2, 9, 8), "fp32", seed)
        got = work.got
        work.got = lambda: {key: tensor + wrong for key, tensor in got().items()}
        return work

    figures = harness.speedup("SDPA", 1.0), harness.percent_of_peak(1)
    return Case(name, "test", "a small case", "fp32", figures, setup, peak="fp32")


def test_a_right_result_is_measured():
    entry = harness.run_case(small_case(), budget=0.01)
    assert entry["status"] == "ok"
    assert set(entry["times"]) == {"pyext", "SDPA"}
    assert all(figure["value"] > 0 for figure in entry["figures"] if figure["name"].startswith("speed-up"))
    assert set(entry["error"]["tensors"]) == {"out", "grad_query", "grad_key", "grad_value"}
    json.dumps(entry)


def test_a_case_in_processes_of_its_own():
    """Checked in one, timed in another; the numbers of threads are the case's there, too."""
    entry = every_case.run_apart("overhead/1x1x4x8/fp32", threads=2, budget=0.01, seed=3)
    assert entry["status"] == "ok" and entry["error"]["ok"] and entry["threads"] == 2
    assert set(entry["times"]) == {"pyext", "SDPA"}


def test_a_wrong_result_has_no_speed():
    entry = harness.run_case(small_case(wrong=1e-2), budget=0.01)
    assert entry["status"] == "wrong"
    assert entry["times"] is None
    assert all(figure["value"] is None and figure["met"] is None for figure in entry["figures"])
    data = {"schema": report.SCHEMA, "machine": harness.machine_facts(1), "results": [entry]}
    assert "**wrong: " in report.table(data)
    assert "Targets met: 0 of 2" in report.page(data)


def test_contenders_take_turns():
    order = []
    work = Work([Contender(name, lambda name=name: order.append(name)) for name in ("pyext", "a", "b")])
    rotation = harness.Rotation(small_case(), work)
    harness.plain_repeat(rotation, 3)
    assert order == ["a", "b", "pyext"] * 3
    assert {name: len(times) for name, times in rotation.seconds.items()} == {"pyext": 3, "a": 3, "b": 3}


@pytest.mark.parametrize(("seconds", "rounds"), [(1.0, 5), (0.4, 7), (1e-9, 25)])
def test_rounds_are_odd_and_bounded(seconds, rounds):
    assert harness.rounds_for(seconds, budget=3.0) == rounds


def test_machine_state_is_put_back():
    before = torch.get_num_threads()
    with harness.machine_state(1 if before != 1 else 2, None):
        assert torch.get_num_threads() != before
    assert torch.get_num_threads() == before


def test_case_names_are_unique_and_drawn():
    names = [case.name for case in every_case.selected("", threads=1)]
    assert len(names) == len(set(names))
    assert {f"{name}/{dtype}" for name, _ in report.BARS for dtype in ("fp32", "bf16")} <= set(names)


@pytest.mark.parametrize("scheme", [attention_cases.t5(3, 37), attention_cases.alibi(3, 37)], ids=["t5", "alibi"])
def test_schemes_say_the_same_to_everyone(scheme):
    """pyext's object, SDPA's mask and the eager formula are three spellings of one function."""
    inputs = scheme.inputs((2, 3, 37, 8), "fp32", 5)
    outputs = [attention_cases.both_ways(inputs, way) for way in (scheme.eager, scheme.pyext, scheme.sdpa)]
    for other in outputs[1:]:
        for name, tensor in outputs[0].items():
            torch.testing.assert_close(other[name], tensor, rtol=2e-4, atol=2e-5)


def test_gated_cases_are_right(monkeypatch):
    for name, shape in (("UNIT", (5, 33)), ("LAYER", (11, 12, 20, 9)), ("ONE_ROW", (1, 12, 20, 9))):
        monkeypatch.setattr(glu_cases, name, shape)
    for case in glu_cases.all_cases():
        if "forward+backward" in case.name:  # torch.compile takes long
            continue
        work = case.setup(case.seed)
        assert harness.check(work)["ok"], case.name
        for contender in work.contenders:
            contender.call()


def test_cases_of_whole_layers_are_right():
    pytest.importorskip("transformers", minversion="5")
    sizes = dict(vocab_size=128, d_model=32, d_kv=8, d_ff=48, num_layers=1, num_heads=4, dropout_rate=0.0)
    options = dict(sizes, feed_forward_proj="gated-gelu")
    work = systems_cases.work_of(systems_cases.System("t5", "T5EncoderModel", "T5Config", options), (2, 37), "fp32", 3)
    assert [contender.name for contender in work.contenders] == ["pyext", "eager", "SDPA"]
    assert harness.check(work)["ok"]
    for contender in work.contenders:
        contender.call()


def test_cases_of_mixtures_are_right(monkeypatch):
    layers = (40, 64, 96, 5, 2), (24, 64, 96, 12, 3)
    small = {"ROUTED": (50, 24, 3), "MOVED": (40, 33, 5, 2), "LAYERS": layers, "ONE_TOKEN": (1, 64, 96, 5, 2)}
    for name, shape in small.items():
        monkeypatch.setattr(moe_cases, name, shape)
    targets = dict.fromkeys(itertools.product(layers, ("fp32", "bf16")), (1.0, 1.0))
    monkeypatch.setattr(moe_cases, "TIMES", targets)
    for case in moe_cases.all_cases():
        work = case.setup(case.seed)
        assert harness.check(work)["ok"], case.name
        for contender in work.contenders:
            contender.call()
        if work.bandwidth_probe:
            work.bandwidth_probe()


def test_rotary_says_the_same_to_everyone(monkeypatch):
    """pyext, Transformers' function (or the formula without it) and the formula, alone and inside attention."""
    x = torch.randn(2, 3, 37, 8)
    cos, sin = rotary_cases.tables(x.shape)
    for interleaved in (False, True):
        formula = rotary_cases.turned(x, interleaved)
        torch.testing.assert_close(pyext.rotary(x, cos, sin, interleaved=interleaved), formula, rtol=1e-5, atol=1e-6)
    theirs = rotary_cases.transformers_eager(x)
    if theirs is not None:
        torch.testing.assert_close(theirs(x), rotary_cases.turned(x), rtol=1e-5, atol=1e-6)
    monkeypatch.setattr(rotary_cases, "FULL", (1, 2, 19, 8))
    monkeypatch.setattr(rotary_cases, "LLAMA", (1, 2, 19, 8))
    for case in rotary_cases.all_cases():
        assert case.op == "rotary"
        assert harness.run_case(case, budget=0.01)["status"] == "ok"


def test_t5_buckets_at_known_distances():
    buckets = peers.t5_buckets(200, 32, 128)
    assert buckets[0, [0, 1, 7, 8, 127, 199]].tolist() == [0, 17, 23, 24, 31, 31]
    assert buckets[[1, 7, 8, 127, 199], 0].tolist() == [1, 7, 8, 15, 15]


def test_report_from_both_kinds_of_json(tmp_path, capsys):
    entry = harness.run_case(small_case("forward/full/1x8x2048x64/fp32"), budget=0.01)
    machine = harness.machine_facts(1)
    ours, theirs = tmp_path / "ours.json", tmp_path / "pytest.json"
    ours.write_text(json.dumps({"schema": 1, "machine": machine, "results": [entry]}))
    theirs.write_text(json.dumps({"benchmarks": [{"extra_info": {**entry, "machine": machine}}]}))
    assert report.load(ours)["results"] == report.load(theirs)["results"]
    pytest.importorskip("matplotlib")
    assert report.main([str(theirs), "--docs", str(tmp_path)]) == 0
    assert "a small case" in capsys.readouterr().out
    assert "a small case" in (tmp_path / "benchmarks.md").read_text(encoding="utf-8")
    assert 0 < (tmp_path / "speed.png").stat().st_size < 100_000


def test_partial_runs_keep_the_rest():
    machine = {"cpu": "x"}
    old = {"schema": 1, "machine": machine, "results": [{"name": "a", "v": 1}, {"name": "b", "v": 1}]}
    new = {"schema": 1, "machine": machine, "results": [{"name": "c", "v": 2}, {"name": "b", "v": 2}]}
    values = [(r["name"], r["v"]) for r in report.merged(old, new)["results"]]
    assert values == [("a", 1), ("b", 2), ("c", 2)]
    assert report.merged({**old, "machine": {"cpu": "y"}}, new) == new
    assert report.merged(None, new) == new


def test_a_busy_machine_is_noted():
    rotation = harness.Rotation(small_case(), Work([Contender("pyext", lambda: None)]))
    rotation.peaks = [100.0, 101.0, 102.0]
    assert rotation.disturbances() == []
    rotation.peaks = [60.0, 80.0, 100.0]
    assert "1.25 of its median" in rotation.disturbances()[0]


def test_live_tiles():
    """Counted by stripes as counted at once; the formulas say what the masks show."""
    lower = mask_cases.Pattern("causal", (1, 1, 2048, 8), pyext.masks.causal(), lambda i, j: j <= i)
    assert mask_cases.live_tiles(lower) == mask_cases.causal_tiles(2048) == sum(n // 4 + 1 for n in range(256))
    length = 600
    index = torch.arange(length)
    sizes = Sizes((1,), 1, length, length, torch.device("cpu"), torch.float32)
    for pattern in mask_cases.patterns():
        shown = pattern.mask.visible(0, 0, index[:, None], index, sizes)
        assert torch.equal(shown, pattern.shows(index[:, None], index)), pattern.name


def test_masks_are_compared_with_the_truth_in_stripes(monkeypatch):
    monkeypatch.setattr(mask_cases, "CHUNK", 64)
    pattern = dataclasses.replace(mask_cases.patterns()[0], shape=(1, 2, 288, 8))
    work = mask_cases.mask_work(pattern, "forward+backward", "fp32", 3)
    assert harness.check(work)["ok"]
    whole = work.truth(torch.float64)
    monkeypatch.setattr(mask_cases, "CHUNK", 288)
    for name, value in work.truth(torch.float64).items():
        torch.testing.assert_close(value, whole[name])


# --- The report and the gate ---


def result(name, status="ok", **figures):
    """A result with these figures; names with _ for a space."""
    values = [
        {"name": key.replace("_", " "), "value": value, "unit": "%", "sign": None, "target": None, "met": None}
        for key, value in figures.items()
    ]
    times = {
        who: {"median_ms": ms, "min_ms": ms, "rounds": 5, "gflops": 1.0} for who, ms in (("pyext", 1), ("SDPA", 3))
    }
    dtype = name.rpartition("/")[2]
    return {
        "name": name, "op": "attention", "group": "length", "title": name, "dtype": dtype, "threads": 1, "isa": "avx2",
        "status": status, "times": times, "peak_gflops": 100.0, "bandwidth_gbs": None, "figures": values,
        "error": None, "notes": [],
    }  # fmt: skip


def results(*entries, cpu="x"):
    return {
        "schema": report.SCHEMA,
        "machine": {**harness.machine_facts(1), "cpu": cpu, "isa": "avx2"},
        "results": entries,
    }


def verdicts(old, new, tolerance=0.1):
    found = compare.differences(results(*old), results(*new), tolerance)
    return {change.figure or change.case: change.verdict for change in found}


def test_figures_get_worse_in_their_own_direction():
    old = result(
        "a", share_of_peak=80.0, speed_up=1.0, time_against_no_bias=1.0, slower_than_no_bias=2.0, one_call=10.0
    )
    old["figures"][1]["name"] = "speed-up over SDPA"
    same = {figure["name"]: "same" for figure in old["figures"]}
    assert verdicts([old], [old]) == same
    for index, (name, better, worse) in enumerate(
        [
            ("share of peak", 90.0, 72.0),
            ("speed-up over SDPA", 1.2, 0.9),
            ("time against no bias", 0.9, 1.11),
            ("slower than no bias", -8.0, 12.5),
            ("one call", 9.0, 11.5),
        ]
    ):
        for value, verdict in ((better, "better"), (worse, "worse")):
            new = json.loads(json.dumps(old))
            new["figures"][index]["value"] = value
            assert verdicts([old], [new]) == {**same, name: verdict}, name
            assert verdicts([old], [new], tolerance=0.3)[name] == "same"


def test_what_is_gone_or_wrong_fails():
    old = [result("a", share_of_peak=80.0), result("b", share_of_peak=80.0), result("c", share_of_peak=80.0)]
    new = [result("a", status="wrong"), result("c", share_of_peak=None), result("d", share_of_peak=1.0)]
    assert verdicts(old, new) == {"a": "wrong", "b": "gone", "share of peak": "gone"}
    found = compare.differences(results(*old), results(*new), 0.1)
    assert all(change.fails for change in found) and len(found) == 3


def test_the_gate_on_the_command_line(tmp_path, capsys):
    paths = [tmp_path / name for name in ("old.json", "new.json", "other.json")]
    old, new = results(result("a", share_of_peak=80.0)), results(result("a", share_of_peak=60.0), result("b"))
    for path, data in zip(paths, (old, new, results(cpu="y"))):
        path.write_text(json.dumps(data))
    old_path, new_path, other = map(str, paths)
    assert report.main(["--compare", old_path, new_path]) == 1
    printed = capsys.readouterr().out.splitlines()
    assert printed[1].split() == ["a", "share", "of", "peak", "80.0", "%", "60.0", "%", "33", "%", "worse"]
    assert printed[-1] == "1 figures: 1 failed, 0 better, 0 within 10%; 1 new cases"
    assert report.main(["--compare", old_path, new_path, "--tolerance", "0.4"]) == 0
    assert report.main(["--compare", old_path, other]) == 2
    assert "different machines" in capsys.readouterr().out


def test_report_page(tmp_path):
    pytest.importorskip("matplotlib")
    entries = [
        result(f"length/t5/1x4x{n}x64/{dtype}", **{"speed-up_over_SDPA": 3.0, "share_of_peak": n / 16})
        for n in (256, 1024)
        for dtype in ("fp32", "bf16")
    ]
    memory = {"memory_above_the_inputs": 10.0, "memory_of_SDPA": 70.0}
    entries += [result("length/memory/1x8x512x64/bf16", **memory)]
    entries += [result("memory/1x8x16384x64/bf16", memory_above_the_inputs=99.0)]
    entries += [result(f"systems/t5/2x512/{dtype}") for dtype in ("fp32", "bf16")]
    entries[-1]["times"]["eager"] = {**entries[-1]["times"]["SDPA"], "median_ms": 4.0}
    entries[-2]["times"]["eager"] = entries[-2]["times"].pop("SDPA")
    report_page.write(results(*entries), tmp_path)
    text = (tmp_path / "report.md").read_text(encoding="utf-8")
    for row in (
        "| t5 2 x 512 | fp32 | 1,024,000 | 341,333 | - | 3.00 | - |",
        "| t5 2 x 512 | bf16 | 1,024,000 | 256,000 | 341,333 | 4.00 | 3.00 |",
        "| 1024 | bf16 | 1.00 | 3.00 | 3.00 |",
        "| 512 | 10 | 70 |",
        "| 16384 | 99 | - |",
        "| attention: length | fp32 | 2 | 40 % | 16 to 64 % |",
        "| attention: length | SDPA | bf16 | 2 | 3.00 | 3.00 to 3.00 |",
    ):
        assert row in text
    for name in ("families", "speed", "memory", "floor"):
        assert 0 < (tmp_path / f"report_{name}.png").stat().st_size < 100_000 and f"(report_{name}.png)" in text
    report_page.write(results(), tmp_path)
    assert (tmp_path / "report.md").read_text(encoding="utf-8").count("hold no case of it yet") == 5


def test_length_cases_are_right(monkeypatch):
    monkeypatch.setattr(length_cases, "LENGTHS", (40,))
    monkeypatch.setattr(length_cases, "MEMORY_LENGTHS", (64,))
    monkeypatch.setattr(long_context, "CHECKED_LENGTH", 32)
    cases = length_cases.all_cases()
    assert len(cases) == 3
    for case in cases:
        entry = harness.run_case(case, budget=0.01)
        assert entry["status"] == "ok" and all(figure["value"] is not None for figure in entry["figures"])
        assert set(entry["times"]) == {"pyext", "SDPA"}
