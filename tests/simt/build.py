"""Builds the emulator and kernels for it as shared libraries, with g++ and ninja only: no CUDA, no Python headers.

`libsimt.so` is the emulator; every kernel source becomes a library of its own that is linked with it. Kernels are
compiled with the sanitizer's access hooks, which libsimt.so answers. Only what changed is compiled.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import subprocess
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
HERE = ROOT / "tests" / "simt"
OUT = ROOT / "build" / "simt"
RUNTIME = ("scheduler", "memory", "asynchronous", "matrix")

NINJA = f"""\
common = -std=c++17 -g1 -fPIC -Wall -Wextra -Wno-unknown-pragmas -fno-strict-aliasing -fno-gnu-unique -U_FORTIFY_SOURCE
includes = -I{HERE} -I{ROOT}/csrc/cuda -I{ROOT}/csrc
rule runtime
  command = g++ $common -O2 $includes -MD -MF $out.d -c $in -o $out
  depfile = $out.d
rule kernel
  command = g++ $common -O1 -fsanitize=thread,alignment $includes $defines -x c++ -MD -MF $out.d -c $in -o $out
  depfile = $out.d
rule link
  command = g++ -shared $in -o $out $libraries
"""


@dataclass(frozen=True)
class Kernel:
    """One library: a source (relative to the root) compiled with -Dname=value for each of `defines`."""

    source: str
    defines: tuple[tuple[str, int], ...] = ()

    @property
    def name(self) -> str:
        return "_".join([Path(self.source).stem, *(f"{name.lower()}{value}" for name, value in self.defines)])

    @property
    def library(self) -> Path:
        return OUT / f"lib{self.name}.so"


def _rules(kernels: Iterable[Kernel]) -> str:
    lines = [NINJA]
    for unit in RUNTIME:
        lines.append(f"build {OUT}/{unit}.o: runtime {HERE}/{unit}.cpp\n")
    lines.append(f"build {OUT}/libsimt.so: link {' '.join(f'{OUT}/{unit}.o' for unit in RUNTIME)}\n")
    for kernel in kernels:
        lines.append(f"build {OUT}/{kernel.name}.o: kernel {ROOT / kernel.source}\n")
        lines.append("  defines = " + " ".join(f"-D{name}={value}" for name, value in kernel.defines) + "\n")
        # addr2line and rpath find the libraries beside each other
        lines.append(f"build {kernel.library}: link {OUT}/{kernel.name}.o | {OUT}/libsimt.so\n")
        lines.append(f"  libraries = -L{OUT} -lsimt '-Wl,-rpath,$$ORIGIN'\n")
    return "".join(lines)


def _ninja() -> str:
    """Looks beside this Python first, where pip puts it and where PATH need not lead."""
    path = shutil.which("ninja", path=os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")]))
    if path is None:
        raise RuntimeError("ninja not found: pip install ninja")
    return path


def build(kernels: Iterable[Kernel]) -> None:
    """Compiles what is missing or older than its source. Several processes may ask at once."""
    kernels = sorted(set(kernels), key=lambda kernel: kernel.name)
    OUT.mkdir(parents=True, exist_ok=True)
    with open(OUT / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        rules = OUT / "build.ninja"
        rules.write_text(_rules(kernels))
        command = [_ninja(), "-f", str(rules), "-C", str(OUT), "-j", str(os.cpu_count())]
        made = subprocess.run(command, capture_output=True, text=True)
        if made.returncode:
            raise RuntimeError(f"the emulated kernels do not compile:\n{made.stdout}{made.stderr}")


def nvcc(source: Path, arch: str, output: Path, *options: str) -> str:
    """Compiles a kernel source for one GPU architecture ("90a"); the assembler's report on registers and spills."""
    includes = [f"-I{folder}" for folder in (HERE, ROOT / "csrc" / "cuda", ROOT / "csrc")]
    code = f"-gencode=arch=compute_{arch},code=sm_{arch}"
    command = ["nvcc", "-std=c++17", "-O3", "-lineinfo", code, "-Xptxas", "-v", *includes, *options]
    made = subprocess.run([*command, str(source), "-o", str(output)], capture_output=True, text=True)
    if made.returncode:
        raise RuntimeError(f"nvcc cannot compile {source} for sm_{arch}:\n{made.stdout}{made.stderr}")
    return made.stderr
