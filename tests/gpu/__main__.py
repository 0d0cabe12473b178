"""Everything that needs a GPU, in less than ten minutes: `python -m tests.gpu [--cases REGEX] [--out STEM]`.

Builds the module in place with CUDA, compares the wrappers of csrc/cuda/ptx.h with the emulator on the same random
inputs, runs `pytest -m gpu`, measures; then writes STEM.json and STEM.txt with the machine, the versions and what every
step said (by default benchmarks/results/gpu-<its name>). Exit code 0 if every step succeeded. A step that fails does
not keep the next ones from running; what overruns its time is stopped. The benchmarks are more than fit into it, for
what they compare with is compiled first: they leave out, by name, what they have no time for, and another call with
`--cases` can measure that.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from benchmarks import gpu

ROOT = Path(__file__).resolve().parents[2]
SECONDS = 570  # of all steps together
TAIL = 15  # lines of a step's output that are kept


@dataclass
class Step:
    name: str
    command: list[str]
    most: float  # seconds
    seconds: float = 0.0
    status: int | str = "not run"
    said: str = ""

    def run(self, left: float) -> None:
        print(f"\n=== {self.name}: {' '.join(self.command)}", flush=True)
        start = time.monotonic()
        environment = {**os.environ, "PYEXT_CUDA": "1"}
        process = subprocess.Popen(
            self.command,
            cwd=ROOT,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,  # so that what it started can be stopped with it
        )
        try:
            output, _ = process.communicate(timeout=max(1.0, min(self.most, left)))
            self.status = process.returncode
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            output, _ = process.communicate()
            self.status = "stopped: too slow"
        self.seconds = round(time.monotonic() - start, 1)
        self.said = "\n".join(output.splitlines()[-TAIL:])
        print(self.said, flush=True)

    @property
    def succeeded(self) -> bool:
        return self.status == 0


def steps(measured: Path, cases: str) -> list[Step]:
    python = [sys.executable, "-m"]
    parallel = ["-n", "8"] if importlib.util.find_spec("xdist") else []
    return [
        Step("build", [sys.executable, "setup.py", "build_ext", "--inplace"], 240),
        Step("conformance of the emulator", [*python, "tests.simt.conformance"], 120),
        Step("tests", [*python, "pytest", "-m", "gpu", "-q", "-p", "no:cacheprovider", *parallel, "tests"], 300),
        Step(
            "benchmarks", [*python, "benchmarks.gpu", "--cases", cases, "--seconds", "200", "--out", str(measured)], 240
        ),
    ]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser("python -m tests.gpu", description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="where to write, without suffix")
    parser.add_argument("--cases", default="", help="only benchmarks whose name matches this regular expression")
    options = parser.parse_args(argv)
    if gpu.missing():
        print(f"tests.gpu: {gpu.missing()}; nothing was run")
        return 1
    with tempfile.TemporaryDirectory() as folder:
        measured = Path(folder) / "measured"
        start, done = time.monotonic(), steps(measured, options.cases)
        for step in done:
            step.run(SECONDS - (time.monotonic() - start))
        data = {"machine": gpu.gpu_facts(), "results": []}
        if measured.with_suffix(".json").is_file():
            data = json.loads(measured.with_suffix(".json").read_text(encoding="utf-8"))
    data["steps"] = [asdict(step) for step in done]
    stem = options.out or gpu.default_stem()
    gpu.write(data, stem)
    lines = [f"{step.name:<30} {step.seconds:>6} s  {step.status}" for step in done]
    with open(stem.with_suffix(".txt"), "a", encoding="utf-8") as table:
        table.write("\n" + "\n".join(lines) + "\n")
    print("\n" + "\n".join(lines) + f"\n{stem}.json, {stem}.txt")
    return int(not all(step.succeeded for step in done))


if __name__ == "__main__":
    sys.exit(main())
