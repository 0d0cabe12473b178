"""`python -m tests.cuda_resources`: what the compiler made of the CUDA kernels, against the table of ceilings.

`--write` puts the registers found into the table, whose patterns and instructions stay.
"""

from __future__ import annotations

import sys
import time

from . import compiled


def main() -> int:
    why = compiled.missing()
    if why:
        print(why)
        return 1
    start = time.perf_counter()
    compiled.compile_all()
    most: dict[str, dict[str, int]] = {}
    wrong = []
    for source, architecture in compiled.BUILDS:
        found = compiled.kernels(source, architecture)
        size = compiled.cubin(source, architecture).stat().st_size
        print(f"{source.name:<12} {architecture:<7} {len(found):>3} kernels, {size / 1024:5.0f} KiB")
        for kernel in found:
            row = compiled.row_of(kernel)
            if row is not None:
                registers = most.setdefault(row.pattern, dict.fromkeys(compiled.ARCHITECTURES, 0))
                registers[architecture] = max(registers[architecture], kernel.registers)
        if "--write" not in sys.argv[1:]:
            wrong += [f"{architecture} {line}" for line in compiled.complaints(source, architecture)]
    print(f"\n{'registers, at most':<28}" + "".join(f"{name:>8}" for name in compiled.ARCHITECTURES))
    for pattern, registers in most.items():
        print(f"{pattern:<28}" + "".join(f"{count:>8}" for count in registers.values()))
    if "--write" in sys.argv[1:]:
        compiled.write(most)
    print("".join(f"\n{line}" for line in wrong))
    print(f"\n{len(wrong)} complaints, {time.perf_counter() - start:.0f} s")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
