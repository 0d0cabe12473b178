"""`python -m tests.simt`: builds the kernels with every seeded defect, runs them, prints who catches what."""

from __future__ import annotations

import time

from .build import build
from .defects import DEFECTS, RUNS, outcomes


def main() -> None:
    start = time.perf_counter()
    build(defect.kernel for defect in DEFECTS)
    built = time.perf_counter()
    width = max(len(defect.title) for defect in DEFECTS)
    print(f"Runs, of {len(RUNS)}, in which a defect showed: as a wrong result, by a rule of the machine, with hooks.\n")
    print(f"|  n | kernel      | {'defect':{width}} | values | machine | hooks |")
    print(f"| -: | ----------- | {'':-<{width}} | -----: | ------: | ----: |")
    for defect in DEFECTS:
        plain, checked = list(outcomes(defect, hooks=False)), list(outcomes(defect, hooks=True))
        values, missed = plain.count("values"), plain.count("missed")
        machine, hooks = len(plain) - values - missed, len(checked) - checked.count("missed")
        said = next((outcome for outcome in checked if outcome not in ("missed", "values")), "")
        row = (
            f"| {defect.number:2} | {defect.case:11} | {defect.title:{width}} | {values:6} | {machine:7} | {hooks:5} |"
        )
        print(row, said)
    print(f"\nBuilt in {built - start:.0f} s, ran for {time.perf_counter() - built:.0f} s.")


if __name__ == "__main__":
    main()
