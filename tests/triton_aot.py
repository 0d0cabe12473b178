"""Compile every configuration of every Triton kernel for the GPUs it is meant for, without a GPU, and check the result.

    python -m tests.triton_aot [--all] [--jobs N] [--arch 90] [--only NAME]

The launchers run on meta tensors with Triton's launch replaced by a recorder: what is compiled is what they would
launch, with the specialisations Triton would make. For each kernel the table gives registers, stack, shared memory and
the instructions that matter; the exit status is 1 if any kernel

* spills or uses stack, or asks for more shared memory than the GPU has;
* should use matrix units and does not, or matrix units of an older kind than it could;
* computes less or more with matrix units than its tiles need (attention), see `triton_aot_attention.repeats`;
* should access memory in 16-byte pieces and does not;
* is a stub without loads and stores, which is what some oversized configurations compile to.

By default every configuration is compiled for every GPU, and the dtypes take turns over them; with --all every
configuration is compiled for every dtype and GPU. Must run in a process of its own: Triton either interprets or
compiles.
"""

from __future__ import annotations

import argparse
import importlib
import itertools
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

os.environ.pop("TRITON_INTERPRET", None)
os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")  # the default, which Triton 3.9 warns of

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

from pyext._primitives import POLICIES
from pyext.kernels import (
    _attention_configs,
    _attention_gradient_plan,
    _gemm,
    _launch,
    gated_linear,
    glu,
    moe_dispatch,
    moe_experts,
    moe_route,
    rotary,
)

from . import triton_aot_attention
from .cuda_resources.sass import matrix_flops

SHARED_LIMIT = {80: 163 << 10, 90: 227 << 10, 100: 227 << 10}  # bytes per block
TYPES = {
    torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16", torch.float64: "fp64", torch.int64: "i64",
    torch.int32: "i32", torch.uint8: "u8", torch.bool: "i1",
}  # fmt: skip
TABLES = {
    "gated_linear": gated_linear.CONFIGS, "moe_experts": moe_experts.CONFIGS, "attention": _attention_configs.CONFIGS,
    "attention_backward": _attention_gradient_plan.BACKWARD_CONFIGS,
}  # fmt: skip
BY_TURNS = ("attention_backward",)  # tables of which each GPU gets a part, but with --all
BY_ARCHITECTURE = (_gemm, _attention_configs, _attention_gradient_plan)  # the modules that choose configurations
CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
COUNTED = {
    "HMMA": r"\bHMMA", "HGMMA": r"\bHGMMA", "UTCMMA": r"\bUTC\w*MMA", "FFMA": r"\bFFMA", "spills": r"\b(?:STL|LDL)",
    "loads": r"\b(?:LDG|LDGSTS|UTMALDG)", "stores": r"\b(?:STG|UTMASTG)",
    "wide": r"\b(?:LDG|LDGSTS)\.\S*128\b|\bUTMALDG",
}  # fmt: skip


@dataclass(frozen=True)
class Kernel:
    """One kernel as it would be launched."""

    arch: int
    scenario: str
    module: str
    name: str
    signature: tuple
    constants: tuple
    divisible: tuple[tuple[int, ...], ...]
    options: tuple
    wide: bool  # whether its accesses should be 16 bytes wide, if it goes through columns

    @property
    def label(self) -> str:
        return f"{self.scenario}: {self.name.strip('_').removesuffix('_kernel')}"


@dataclass
class Report:
    kernel: Kernel
    registers: int = 0
    stack: int = 0
    shared: int = 0
    counts: dict = field(default_factory=dict)
    work: float | None = None  # of matrix units: flops of the instructions by those of the tiles in the source
    seconds: float = 0.0
    faults: list = field(default_factory=list)

    def __str__(self) -> str:
        constants, options = dict(self.kernel.constants), dict(self.kernel.options)
        shape = "x".join(str(constants[n]) for n in ("ROWS", "TOKENS", "PAIRS", "COLUMNS", "DEPTH") if n in constants)
        counts = " ".join(f"{name} {count}" for name, count in self.counts.items() if count)
        counts += "" if self.work is None else f" work {self.work:.2f}"
        return (
            f"sm_{self.kernel.arch:<4}{self.kernel.label:<48} {shape:<12} warps {options.get('num_warps', 4)} "
            f"stages {options.get('num_stages', 3)} registers {self.registers:3} shared {self.shared:6} {counts}"
            f" ({self.seconds:.1f} s)" + (f"  WRONG: {', '.join(self.faults)}" if self.faults else "")
        )


# --- What is launched ---


def meta(*shape, dtype) -> torch.Tensor:
    return torch.empty(*shape, dtype=dtype, device="meta")


def elementwise() -> Iterator[tuple[str, bool, Callable[[torch.dtype], object]]]:
    """(name, whether accesses should be wide, the call on a dtype) for every configuration."""
    for pairs in (16, 32, 64, 128):
        for interleaved in (False, True):

            def call(dtype, pairs=pairs, interleaved=interleaved):
                x = meta(2, 6, 512, 2 * pairs, dtype=dtype)
                table = meta(1024, pairs, dtype=torch.float32)
                positions = meta(2, 512, dtype=torch.int64) if interleaved else None
                rotary.rotary_forward(x, table, table, positions, interleaved, False)
                rotary.rotary_backward(x, x, positions, 1, 1024, pairs, interleaved, False)

            yield f"rotary {pairs} {'interleaved' if interleaved else 'halves'}", True, call
    for index, (_, columns) in enumerate(glu.COLUMNS):
        width = max(columns, glu.COLUMNS[index][0])
        for layout in ("packed", "interleaved", "strided"):

            def call(dtype, index=index, width=width, layout=layout):
                if layout == "strided":
                    gate = up = meta(3, 5, 7, 2, width, dtype=dtype).transpose(1, 3)
                else:
                    gate, up = meta(48, 2 * width, dtype=dtype), None
                grad = gate if up is not None else meta(48, width, dtype=dtype)
                activation = (index + len(layout)) % 4
                glu.glu_forward(gate, up, activation, True, layout == "interleaved")
                glu.glu_backward(grad, gate, up, activation, True, layout == "interleaved")

            yield f"glu {columns} {layout}", True, call


def unaligned(dtype) -> None:
    """Odd sizes and strides, which nothing can be assumed of; elementwise."""
    x, table = meta(2, 3, 37, 35, dtype=dtype), meta(3, 37, 17, dtype=torch.float64)[1:]
    rotary.rotary_forward(x, table, table, None, False, True)
    rotary.rotary_backward(x, x, None, 2, 37, 17, True, True)
    glu.glu_forward(meta(5, 74, dtype=dtype)[:, 1:73], None, 3, False, False)
    moved(dtype, 37, 35)


def linear(dtype, rows: int, columns=4096, depth=4096) -> None:
    """A layer of odd width or not, forward and backward, with all that it may have."""
    x, pre, bias = meta(rows, depth, dtype=dtype), meta(rows, 2 * columns, dtype=dtype), meta(columns, dtype=dtype)
    weight, down = meta(columns, depth, dtype=dtype), meta(depth, columns, dtype=dtype)
    activation = 1 if dtype == torch.float16 else 0
    gated_linear.gated_linear_forward(x, weight, weight, bias, bias, activation, True)
    gated_linear.gated_mlp_backward(x, x, pre, weight, weight, down, activation, True, True, True, True, True)


def experts(dtype, rows: int, columns=4096, depth=4096) -> None:
    """Eight experts with that many rows each, of odd width or not, forward and backward: gated ones with all that they
    may have; others, with little, of few rows."""
    count, (tokens, choices) = 8, (4 * rows, 2)
    x, weights = meta(tokens, depth, dtype=dtype), meta(tokens, choices, dtype=torch.float32)
    position, source, offsets = (
        meta(*s, dtype=torch.int32) for s in ((tokens, choices), (tokens * choices,), (count + 1,))
    )
    maps = weights, offsets, source, position
    down, of_down = meta(count, depth, columns, dtype=dtype), meta(count, depth, dtype=dtype)
    pre, up = meta(tokens * choices, 2 * columns, dtype=dtype), meta(count, 2 * columns, depth, dtype=dtype)
    activation, of_up = 1 if dtype == torch.float16 else 0, meta(count, 2 * columns, dtype=dtype)
    moe_experts.moe_forward(x, up, down, of_up, of_down, *maps, activation, True)
    moe_experts.moe_backward(x, x, pre, up, down, of_down, *maps, activation, *[True] * 6)
    if rows > _gemm.FEW_ROWS:
        return
    xs, up = meta(tokens * choices, depth, dtype=dtype), meta(count, columns, depth, dtype=dtype)
    pre = meta(tokens * choices, columns, dtype=dtype)
    moe_experts.moe_experts_forward(xs, up, down, None, None, offsets, 6, False)
    moe_experts.moe_experts_backward(xs, xs, pre, up, down, offsets, 6, True, True, False, False, False)


def moved(dtype, tokens=4096, columns=4096) -> None:
    """Rows of experts from tokens and back."""
    x, xs = meta(tokens, columns, dtype=dtype), meta(2 * tokens, columns, dtype=dtype)
    position, source = meta(tokens, 2, dtype=torch.int32), meta(2 * tokens, dtype=torch.int32)
    weights = meta(tokens, 2, dtype=torch.float32)
    moe_dispatch.moe_dispatch_forward(x, source, position)
    moe_dispatch.moe_combine_forward(xs, weights, position)
    moe_dispatch.moe_combine_backward(x, xs, weights, position, True, True)


def routed(dtype, count: int, choices: int, policies: tuple[str, ...]) -> None:
    """Tokens to that many experts, by each policy with an option or two."""
    logits, mask = meta(4, 512, count, dtype=dtype), meta(4, 512, dtype=torch.bool)
    bias, uniform = meta(count, dtype=torch.float32), meta(4, 512, dtype=torch.float32)
    for name in policies:
        policy = POLICIES.index(name)
        top_k = {"switch": 1, "gshard": 2}.get(name, choices)
        capacity, groups = (
            -1 if name == "topk_softmax" else 40,
            (4, 2) if name == "sigmoid" and count % 4 == 0 else (1, 1),
        )
        columns = count if name == "expert_choice" else top_k
        moe_route.moe_route_forward(
            logits, mask if policy % 2 else None, bias if name == "sigmoid" else None,
            uniform if name == "gshard" else None, policy, top_k, capacity, policy % 4 == 0, name == "switch", *groups,
        )  # fmt: skip
        weights, index = (meta(2048, columns, dtype=d) for d in (torch.float32, torch.int32))
        loss, load = meta(1, dtype=torch.float32), meta(4, count, dtype=torch.int32)
        moe_route.moe_route_backward(
            weights, loss, loss, logits, mask if policy % 2 else None, index, index, load, policy, policy % 4 == 0
        )


def scenarios(arch: int, everything: bool) -> Iterator[tuple[str, bool, Callable[[], object]]]:
    """(name, whether accesses should be wide, the call) for every configuration; see the top for the dtypes."""
    turn = itertools.count(_launch.ARCHITECTURES.index(arch))

    def dtypes(choices):
        return choices if everything else [choices[next(turn) % len(choices)]]

    for name, wide, call in elementwise():
        for dtype in dtypes(_launch.DTYPES):
            yield f"{name} {TYPES[dtype]}", wide, lambda call=call, dtype=dtype: call(dtype)
    for name, wide, sizes in (
        ("few rows", True, (_gemm.FEW_ROWS,)),
        ("many rows", True, (4096,)),
        ("odd sizes", False, (131, 133, 61)),
    ):
        for dtype in (torch.float32, *dtypes((torch.bfloat16, torch.float16))):
            yield f"{name} {TYPES[dtype]}", wide, lambda sizes=sizes, dtype=dtype: linear(dtype, *sizes)
            yield f"experts, {name} {TYPES[dtype]}", wide, lambda sizes=sizes, dtype=dtype: experts(dtype, *sizes)
    for columns in (64, 256, 1024):
        for dtype in dtypes(_launch.DTYPES):
            call = lambda columns=columns, dtype=dtype: moved(dtype, columns=columns)  # noqa: E731
            yield f"moved {columns} {TYPES[dtype]}", True, call
    for count, choices, policies in ((8, 2, POLICIES), (257, 8, ("sigmoid",)), (1024, 8, ("softmax_topk",))):
        for dtype in dtypes(_launch.DTYPES):
            how = count, choices, policies
            call = lambda dtype=dtype, how=how: routed(dtype, *how)  # noqa: E731
            yield f"routed to {count} {TYPES[dtype]}", False, call
    for dtype in dtypes(_launch.DTYPES):
        yield f"odd sizes {TYPES[dtype]}", False, lambda dtype=dtype: unaligned(dtype)
    yield from triton_aot_attention.scenarios(dtypes, everything)


def record(arch: int, calls: Iterable[tuple[str, bool, Callable[[], object]]]) -> list[Kernel]:
    """The kernels that these calls, see `scenarios`, would launch on this GPU, each once."""
    found: dict[tuple, Kernel] = {}
    scenario = wide = None

    def run(function, *args, grid, warmup=False, **options):
        kernel = specialised(function, args, options, arch, scenario, wide)
        key = (kernel.module, kernel.name, kernel.signature, kernel.constants, kernel.divisible, kernel.options)
        found.setdefault(key, kernel)

    stock, JITFunction.run = JITFunction.run, run
    of_device = _launch.architecture
    for module in BY_ARCHITECTURE:
        module.architecture = lambda device: arch
    try:
        for scenario, wide, call in calls:  # noqa: B007  (`run` reads them)
            call()
    finally:
        JITFunction.run = stock
        for module in BY_ARCHITECTURE:
            module.architecture = of_device
    return list(found.values())


def missing(arch: int, kernels: list[Kernel], everything: bool) -> list[str]:
    """The configurations of the tables that none of these kernels has; where they take turns, of all of them only."""
    used = {frozenset({**dict(k.constants), **dict(k.options)}.items()) for k in kernels}
    return [
        f"sm_{arch} {module} {kind}: {config}"
        for module, configurations in TABLES.items()
        if everything or module not in BY_TURNS
        for kind, table in configurations.items()
        for config in table[arch]
        if not any(config.options().items() <= items for items in used)
    ]


def specialised(function: JITFunction, args, options: dict, arch: int, scenario: str, wide: bool) -> Kernel:
    """What Triton would compile for these arguments: ones and None are constants, multiples of 16 are known as such."""
    names = function.arg_names
    values = {**dict(zip(names, args)), **{name: options[name] for name in names if name in options}}
    signature, constants, divisible = {}, {}, []

    def kind(value, path: tuple, constant: bool) -> str:
        """The type of an argument or of an element of a named tuple, which a path leads to."""
        if constant or value is None or (isinstance(value, int) and value == 1):
            constants[names[path[0]] if len(path) == 1 else path] = value
            return "constexpr"
        if isinstance(value, float):
            return "fp32"
        if isinstance(value, torch.Tensor):
            result, address = "*" + TYPES[value.dtype], value.storage_offset() * value.element_size()
        else:
            result, address = "i32" if -(2**31) <= value < 2**31 else "i64", value
        if address % 16 == 0:
            divisible.append(path)
        return result

    for position, name in enumerate(names):
        value = values[name]
        if isinstance(value, tuple):
            signature[name] = type(value)(*(kind(part, (position, n), False) for n, part in enumerate(value)))
        else:
            signature[name] = kind(value, (position,), function.params[position].is_constexpr)
    others = {name: value for name, value in options.items() if name not in names}
    return Kernel(
        arch, scenario, function.fn.__module__, function.fn.__name__, tuple(signature.items()),
        tuple(constants.items()), tuple(divisible), tuple(others.items()), wide,
    )  # fmt: skip


# --- What comes out ---


def compile_kernel(kernel: Kernel) -> Report:
    start = time.perf_counter()
    function = getattr(importlib.import_module(kernel.module), kernel.name)
    source = ASTSource(
        fn=function,
        signature=dict(kernel.signature),
        constexprs=dict(kernel.constants),
        attrs={path: [["tt.divisibility", 16]] for path in kernel.divisible},
    )
    report = Report(kernel)
    try:
        compiled = triton.compile(source, target=GPUTarget("cuda", kernel.arch, 32), options=dict(kernel.options))
    except Exception as error:  # the table names what does not compile, and goes on
        report.faults.append(f"{type(error).__name__}: {str(error).splitlines()[0][:200]}")
        return report
    assembly = cuobjdump(compiled.asm["cubin"])
    report.registers, report.stack, local = (
        int(re.search(rf"\b{name}:(\d+)", assembly)[1]) for name in ("REG", "STACK", "LOCAL")
    )
    report.shared = compiled.metadata.shared
    report.counts = {name: len(re.findall(pattern, assembly)) for name, pattern in COUNTED.items()}
    wanted = triton_aot_attention.tile_flops(kernel)
    flops = matrix_flops(assembly, dict(kernel.options).get("num_warps", 4))
    report.work = flops / wanted if wanted and flops else None
    report.seconds = time.perf_counter() - start
    report.faults = list(faults(report, local))
    return report


def cuobjdump(cubin: bytes) -> str:
    """What it uses, and its instructions."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [CUOBJDUMP, "--dump-resource-usage", "--dump-sass", file.name]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def faults(report: Report, local: int) -> Iterator[str]:
    kernel, counts = report.kernel, report.counts
    if counts["spills"] or report.stack or local:
        yield f"{counts['spills']} spills, {report.stack} bytes of stack, {local} local"
    if report.shared > SHARED_LIMIT[kernel.arch]:
        yield f"shared memory above {SHARED_LIMIT[kernel.arch]}"
    if not (counts["loads"] and counts["stores"]):
        yield "a stub: it loads or stores nothing"
    tiled = {"COLUMNS", "PAIRS"} & dict(kernel.constants).keys()
    unit = matrix_unit(kernel)
    few = unit == "FFMA" and "PADDED" in dict(kernel.constants)  # features at a time, one for each thread
    if kernel.wide and tiled and not few and not counts["wide"]:
        yield "no access of 16 bytes"
    if report.work is not None:
        most = triton_aot_attention.repeats(kernel)
        if not 1 <= report.work <= most:
            yield f"matrix units compute {report.work:.2f} times what the tiles need, not 1 to {most}"
    if unit and not counts[unit]:
        yield f"no {unit}"


def matrix_unit(kernel: Kernel) -> str | None:
    """What should compute the products: the units for whole warpgroups need 64 rows (of K Q^T, columns of a tile); fp32
    is exact on none."""
    constants = dict(kernel.constants)
    if "DEPTH" not in constants and not {"WIDTH", "ROWS", "COLUMNS"} <= constants.keys():
        return None
    types = {t for kind in dict(kernel.signature).values() for t in ([kind] if isinstance(kind, str) else kind)}
    if not {"*bf16", "*fp16"} & types:
        return "FFMA"
    rows = constants["COLUMNS" if kernel.name == "_keys_kernel" else "ROWS"]
    return {80: "HMMA", 90: "HGMMA", 100: "UTCMMA"}[kernel.arch] if rows >= 64 else "HMMA"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--all", action="store_true", help="every dtype of every configuration")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--arch", type=int, choices=_launch.ARCHITECTURES, help="one GPU only")
    parser.add_argument("--only", default="", help="only kernels whose label contains this")
    options = parser.parse_args()
    start = time.perf_counter()
    architectures = [options.arch] if options.arch else _launch.ARCHITECTURES
    recorded = {arch: record(arch, scenarios(arch, options.all)) for arch in architectures}
    left_out = [line for arch, kernels in recorded.items() for line in missing(arch, kernels, options.all)]
    kernels = [k for found in recorded.values() for k in found if options.only in k.label]
    wrong = len(left_out)
    for line in left_out:
        print(f"WRONG: no launcher uses {line}")
    with ProcessPoolExecutor(options.jobs) as pool:
        for report in pool.map(compile_kernel, kernels):
            wrong += bool(report.faults)
            print(report, flush=True)
    seconds = time.perf_counter() - start
    print(f"Triton {triton.__version__}: {len(kernels)} kernels, {wrong} wrong, {seconds:.0f} s")
    return 1 if wrong or not kernels else 0


if __name__ == "__main__":
    sys.exit(main())
