"""`python -m tests.simt`: builds the kernels with every seeded defect, runs them, prints who catches what."""

from __future__ import annotations

import time

from .build import build
from .defects import DEFECTS, RUNS, outcomes


def main() -> None:
    start = time.perf_counter()
    build(defect.kernel for defect in DEFECTS)
    print(f"built in {time.perf_counter() - start:.0f} s; runs of {len(RUNS)} in which a defect showed:")
    print(f"{'':>50}  {'without hooks':^16}   hooks")
    print(f"{'defect':>50}  {'values':>7}  {'machine':>7}  {'on':>6}   what they say")
    start = time.perf_counter()
    for defect in DEFECTS:
        plain, checked = list(outcomes(defect, hooks=False)), list(outcomes(defect, hooks=True))
        values = plain.count("values")
        machine = len(plain) - values - plain.count("missed")
        said = [word for word in checked if word not in ("missed", "values")]
        found = len(checked) - checked.count("missed")
        line = f"{defect.number:>3} {defect.title:>46}  {values:>7}  {machine:>7}  {found:>6}"
        print(line, said[0] if said else "", sep="   ")
    print(f"ran for {time.perf_counter() - start:.0f} s")


if __name__ == "__main__":
    main()
