"""Compiles every csrc/cuda/*.cu to cubins and reads what the compiler made of each kernel.

No GPU is needed: nvcc's ptxas reports registers, stack and spills, cuobjdump prints the instructions.
"""

from __future__ import annotations

import fcntl
import functools
import importlib.util
import os
import re
import shutil
import subprocess
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SOURCES = sorted((ROOT / "csrc" / "cuda").glob("*.cu"))
ARCHITECTURES = ("sm_80", "sm_90a", "sm_100")
#: Those of CMakeLists.txt for Hopper alone are compiled for nothing else.
ONLY = dict.fromkeys(("attention_sm90", "attention_sm90_backward", "attention_sm90_relative_backward"), ("sm_90a",))
BUILDS = [(source, name) for source in SOURCES for name in ONLY.get(source.stem, ARCHITECTURES)]
CEILINGS = Path(__file__).with_name("ceilings.txt")
OUT = ROOT / "build" / "cuda_resources"
JOBS = 2
# What an instruction of the table looks like in SASS, with all its modifiers.
INSTRUCTIONS = {
    "LDG.128": r"\bLDG\.E(\.\w+)*\.128\b",
    "STG.128": r"\bSTG\.E(\.\w+)*\.128\b",
    "LDGSTS.128": r"\bLDGSTS\.E(\.\w+)*\.128\b",
    "LDSM": r"\bLDSM\b",
    "HMMA": r"\bHMMA\.16816\b",
    "HGMMA": r"\bHGMMA\.64x\d+x16\b",
    "UTMALDG": r"\bUTMALDG\.4D\b",
    "USETMAXREG": r"\bUSETMAXREG\b",
}


@functools.cache
def find_nvcc() -> str | None:
    return shutil.which("nvcc") or shutil.which("/usr/local/cuda/bin/nvcc")


@functools.cache
def find_cuobjdump() -> str | None:
    """CUDA's, or the copy that Triton brings."""
    triton = importlib.util.find_spec("triton")
    places = [Path(find_nvcc() or "nvcc").resolve().parent]
    if triton is not None and triton.submodule_search_locations:
        places.append(Path(triton.submodule_search_locations[0]) / "backends/nvidia/bin")
    return shutil.which("cuobjdump") or shutil.which("cuobjdump", path=os.pathsep.join(map(str, places)))


def missing() -> str | None:
    """Why nothing can be compiled here, or None."""
    if find_nvcc() is None:
        return "no nvcc on this machine: the CUDA sources are not compiled"
    if find_cuobjdump() is None:
        return "no cuobjdump on this machine, neither CUDA's nor Triton's: the SASS cannot be read"
    return None


@dataclass
class Kernel:
    """name: as in the source, with its template arguments, e.g. "rotary_forward<bf16, 8, false>"."""

    name: str
    registers: int = 0
    stack: int = 0
    spills: int = 0
    sass: str = ""

    def uses(self, instruction: str) -> bool:
        return re.search(INSTRUCTIONS[instruction], self.sass) is not None


@functools.cache
def kernels(source: Path, architecture: str) -> list[Kernel]:
    """What is compiled of a source."""
    path = cubin(source, architecture)
    found = _read_log(path.with_suffix(".log").read_text())
    _add_sass(found, _run(find_cuobjdump(), "--dump-sass", path))
    for kernel, name in zip(found.values(), _demangle(found)):
        kernel.name = name
    return sorted(found.values(), key=lambda kernel: kernel.name)


@functools.cache
def cubin(source: Path, architecture: str) -> Path:
    """Beside its log; compiled anew if any header is newer. Of several processes that ask at once, one compiles."""
    OUT.mkdir(parents=True, exist_ok=True)
    path = OUT / f"{source.stem}.{architecture}.cubin"
    inputs = [source, *(ROOT / "csrc").glob("*.h"), *(ROOT / "csrc" / "cuda").glob("*.h"), Path(__file__)]
    with open(path.with_suffix(".lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not path.is_file() or path.stat().st_mtime <= max(file.stat().st_mtime for file in inputs):
            options = ("-std=c++17", "-O3", "-DNDEBUG", "-cubin", f"-arch={architecture}", "-Xptxas=-v")
            log = _run(find_nvcc(), *options, source, "-o", path, error_stream=True)
            path.with_suffix(".log").write_text(log)
    return path


def compile_all() -> None:
    with ThreadPoolExecutor(JOBS) as pool:
        list(pool.map(cubin, *zip(*BUILDS)))


def _run(*command: object, error_stream: bool = False, text: str | None = None) -> str:
    done = subprocess.run([str(word) for word in command], input=text, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(map(str, command))} failed:\n{done.stdout}{done.stderr}")
    return done.stderr if error_stream else done.stdout


def _read_log(log: str) -> dict[str, Kernel]:
    """By mangled name, from ptxas -v."""
    found: dict[str, Kernel] = {}
    name = ""
    for line in log.splitlines():
        if match := re.search(r"(?:Function properties for|Compiling entry function) '?(\w+)", line):
            name = match[1]
        elif match := re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", line):
            kernel = found.setdefault(name, Kernel(name))
            kernel.stack, kernel.spills = int(match[1]), int(match[2]) + int(match[3])
        elif match := re.search(r"Used (\d+) registers", line):
            found.setdefault(name, Kernel(name)).registers = int(match[1])
    return {name: kernel for name, kernel in found.items() if kernel.registers}


def _add_sass(found: dict[str, Kernel], dump: str) -> None:
    for part in dump.split("Function : ")[1:]:
        name, _, code = part.partition("\n")
        if name.strip() in found:
            found[name.strip()].sass = code


def _demangle(names: Iterable[str]) -> list[str]:
    """Without namespaces, casts of template arguments, result and parameters."""
    long = _run("c++filt", text="\n".join(names)).splitlines()
    return [
        re.sub(r"\(anonymous namespace\)::|\w+::|\([\w:]+\)(?=\d)|^void ", "", name).partition("(")[0] for name in long
    ]


# --- The table ---


@dataclass(frozen=True)
class Row:
    """pattern: of names of kernels, as in a shell. The first row that matches a kernel counts."""

    pattern: str
    registers: dict[str, int]  # the most that each architecture may take
    instructions: tuple[str, ...]


@functools.cache
def table() -> list[Row]:
    rows = []
    for line in CEILINGS.read_text().splitlines():
        if line.strip() and not line.startswith("#"):
            pattern, registers, instructions = (part.strip() for part in line.split("|"))
            rows.append(
                Row(pattern, dict(zip(ARCHITECTURES, map(int, registers.split()))), tuple(instructions.split()))
            )
    return rows


def warnings(source: Path, architecture: str) -> list[str]:
    """What the assembler says of asynchronous products that it had to wait for, and of registers it did not move."""
    return re.findall(r".*\bC75\d\d\b.*", cubin(source, architecture).with_suffix(".log").read_text())


def row_of(kernel: Kernel) -> Row | None:
    return next((row for row in table() if fnmatchcase(kernel.name, row.pattern)), None)


def complaints(source: Path, architecture: str) -> list[str]:
    """What is wrong with the kernels of a source; nothing, if all is well."""
    found = []
    for kernel in kernels(source, architecture):
        row = row_of(kernel)
        if row is None:
            found.append(f"{kernel.name}: no row of {CEILINGS.name} matches it")
            continue
        if kernel.spills or kernel.stack:
            found.append(f"{kernel.name}: {kernel.spills} bytes of spills, {kernel.stack} bytes of stack")
        if kernel.registers > row.registers[architecture]:
            found.append(f"{kernel.name}: {kernel.registers} registers, the ceiling is {row.registers[architecture]}")
        found += [f"{kernel.name}: no {name} in its SASS" for name in row.instructions if not kernel.uses(name)]
    found += [f"{line}: wgmma serialised, or setmaxnreg ignored" for line in warnings(source, architecture)]
    return found


def write(most: dict[str, dict[str, int]]) -> None:
    """Put these registers into the table."""
    lines = []
    for line in CEILINGS.read_text().splitlines():
        pattern, *rest = line.split("|")
        registers = most.get(pattern.strip())
        if registers is not None and not line.startswith("#"):
            line = "|".join([pattern, f" {' '.join(f'{n:>5}' for n in registers.values()):<19} ", rest[1]])
        lines.append(line.rstrip())
    CEILINGS.write_text("\n".join(lines) + "\n")
