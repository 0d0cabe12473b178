"""`python -m tests.gpu` and the benchmarks of a GPU, as far as they go without one: their logic, and small cases."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = str(Path(__file__).resolve().parent.parent)
if ROOT not in sys.path:
    sys.path.append(ROOT)

from gpu import __main__ as runner  # noqa: E402

from benchmarks import gpu, gpu_attention_cases, gpu_cases  # noqa: E402
from benchmarks.harness import check  # noqa: E402

SMALL = gpu_cases.Sizes(tokens=33, hidden=48, inner=40, heads=(2, 3, 17, 16))


ATTENTION = gpu_attention_cases.Sizes(
    plain=(2, 2, 40, 16),
    lengths=(20,),
    biased=(1, 8, 40, 16),
    sparse=(1, 1, 300, 16),
    stride=16,
    caches=(2, 4, 2, 70, 16),
)


@pytest.mark.parametrize(
    "case",
    gpu_cases.all_cases("cpu", SMALL) + gpu_attention_cases.all_cases("cpu", ATTENTION),
    ids=lambda case: case.name,
)
def test_cases_are_right(case):
    work = case.setup(case.seed)
    assert check(work)["ok"]
    for contender in work.contenders:
        if contender.name != "torch.compile":
            contender.call()
    work.bandwidth_probe()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("module", ["tests.gpu", "benchmarks.gpu"])
def test_says_that_there_is_no_gpu(module):
    done = subprocess.run([sys.executable, "-m", module], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1 and "no GPU that torch" in done.stdout


@pytest.mark.parametrize("fails", [False, True])
def test_every_step_runs_and_is_written(fails, tmp_path, monkeypatch, capsys):
    def steps(measured, cases):
        assert cases == "attention"
        measure = (
            f"import json; json.dump({{'machine': {{'gpu': 'none'}}, 'results': []}}, open('{measured}.json', 'w'))"
        )
        return [
            runner.Step("first", [sys.executable, "-c", f"print('hello'); raise SystemExit({int(fails)})"], 60),
            runner.Step("slow", [sys.executable, "-c", "import time; time.sleep(60)"], 1 if fails else 0),
            runner.Step("last", [sys.executable, "-c", measure], 60),
        ][:: 1 if fails else 2]

    monkeypatch.setattr(gpu, "missing", lambda: None)
    monkeypatch.setattr(gpu, "gpu_facts", lambda: {"gpu": "unmeasured"})
    monkeypatch.setattr(runner, "steps", steps)
    assert runner.main(["--cases", "attention", "--out", str(tmp_path / "out")]) == int(fails)
    data = json.loads((tmp_path / "out.json").read_text())
    assert data["machine"] == {"gpu": "none"}
    expected = {"first": 1, "slow": "stopped: too slow", "last": 0} if fails else {"first": 0, "last": 0}
    assert {step["name"]: step["status"] for step in data["steps"]} == expected
    assert data["steps"][0]["said"] == "hello" and "hello" in capsys.readouterr().out
    written = (tmp_path / "out.txt").read_text()
    assert "gpu: none" in written and all(name in written for name in expected)
