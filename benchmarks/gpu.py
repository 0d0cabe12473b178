"""The benchmarks of a GPU: `python -m benchmarks.gpu [--cases REGEX] [--seconds N] [--out STEM]`.

Writes STEM.json (as `benchmarks.report` does) and STEM.txt, its table; by default benchmarks/results/gpu-<its name>.
Both are written after every case, and name those for which there was no time.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import re
import subprocess
import sys
import time
from pathlib import Path

import torch

from . import gpu_attention_cases, gpu_cases
from .harness import machine_facts, native, run_case
from .report import RESULTS, SCHEMA, summary, table


def missing() -> str | None:
    """Why nothing can be measured here, or None."""
    return None if torch.cuda.is_available() else f"no GPU that torch {torch.__version__} can use"


def gpu_facts() -> dict:
    """The GPU, its driver and what was compiled for it, beside what every benchmark says of its machine."""
    device = torch.cuda.get_device_properties(0)
    query = ["nvidia-smi", "--query-gpu=driver_version,clocks.max.sm,clocks.max.memory", "--format=csv,noheader"]
    found = subprocess.run(query, capture_output=True, text=True)
    packages = {}
    for name in ("triton", "liger-kernel"):
        try:
            packages[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            packages[name] = None
    return {
        **machine_facts(torch.get_num_threads()),
        "gpu": device.name,
        "capability": f"{device.major}.{device.minor}",
        "multiprocessors": device.multi_processor_count,
        "memory_gib": round(device.total_memory / 2**30, 1),
        "driver, clocks": found.stdout.strip().splitlines()[0] if found.returncode == 0 else None,
        "torch_cuda": torch.version.cuda,
        "kernels": native.build_info().get("cuda") if native else None,
        **packages,
    }


def default_stem() -> Path:
    return RESULTS / ("gpu-" + re.sub(r"[^a-z0-9]+", "-", torch.cuda.get_device_name(0).lower()).strip("-"))


def text(data: dict) -> str:
    """Machine and table, as plain text."""
    facts = "\n".join(f"{name}: {value}" for name, value in data["machine"].items())
    left = "".join(f"\nno time for {name}" for name in data.get("left_out", ()))
    return f"{facts}\n\n{table(data)}\n{left}"


def run(pattern: str, seconds: float, stem: Path) -> dict:
    """Attention first; no case begins after so many seconds."""
    start = time.monotonic()
    cases = [
        case for case in (*gpu_attention_cases.all_cases(), *gpu_cases.all_cases()) if re.search(pattern, case.name)
    ]
    data = {"schema": SCHEMA, "machine": gpu_facts(), "results": []}
    for n, case in enumerate(cases):
        data["left_out"] = [other.name for other in cases[n:]]
        if time.monotonic() - start > seconds:
            break
        data["results"].append(run_case(case))
        data["left_out"].pop(0)
        write(data, stem)
        print(summary(data["results"][-1]), flush=True)
        torch.cuda.empty_cache()
    return data


def write(data: dict, stem: Path) -> None:
    stem.parent.mkdir(parents=True, exist_ok=True)
    stem.with_suffix(".json").write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
    stem.with_suffix(".txt").write_text(text(data), encoding="utf-8")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser("python -m benchmarks.gpu", description=__doc__.splitlines()[0])
    parser.add_argument("--cases", default="", help="only cases whose name matches this regular expression")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="after which no case begins")
    parser.add_argument("--out", type=Path, help="where to write, without suffix")
    options = parser.parse_args(argv)
    if missing():
        print(missing())
        return 1
    stem = options.out or default_stem()
    data = run(options.cases, options.seconds, stem)
    write(data, stem)
    print("\n" + text(data))
    return int(any(result["status"] != "ok" for result in data["results"]))


if __name__ == "__main__":
    sys.exit(main())
