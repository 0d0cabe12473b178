"""The regression gate: two results of `report.py` side by side.

    python -m benchmarks.report --compare old.json new.json --tolerance 0.1

Compared are the figures, which are ratios within one run (shares of a peak measured beside it, speed-ups over peers),
not times, which differ with the load of the machine. A figure is worse by its change as a factor: a share of 72 % after
80 % is 10 % worse. Fails (exit status 1): a figure worse than the tolerance allows, a result that became wrong, a case
or a figure that is gone. Machines that differ cannot be compared (exit status 2).
"""

from __future__ import annotations

from dataclasses import dataclass

#: A figure whose name begins so is better when it is larger; others (times, memory) when they are smaller.
LARGER_IS_BETTER = ("share of", "speed-up over")


@dataclass(frozen=True)
class Change:
    """One figure of one case in both results. `worse`: the factor by which it is worse, 1 = as before."""

    case: str
    figure: str
    old: str
    new: str
    worse: float
    verdict: str

    @property
    def fails(self) -> bool:
        return self.verdict not in ("better", "same")


def differences(old: dict, new: dict, tolerance: float) -> list[Change]:
    """All figures of the old results, those that fail first, then by how much they are worse."""
    from .report import figure_text

    found = []
    results = {result["name"]: result for result in new["results"]}
    for before in old["results"]:
        after = results.get(before["name"])
        if after is None:
            found.append(Change(before["name"], "", "", "", 1.0, "gone"))
        elif after["status"] != "ok" == before["status"]:
            found.append(Change(before["name"], "", "right", "wrong", 1.0, "wrong"))
        else:
            figures = {figure["name"]: figure for figure in after["figures"]}
            for figure in before["figures"]:
                if figure["value"] is not None:
                    found.append(_change(before["name"], figure, figures.get(figure["name"]), tolerance, figure_text))
    return sorted(found, key=lambda change: (not change.fails, -change.worse))


def _change(case: str, old: dict, new: dict | None, tolerance: float, text) -> Change:
    if new is None or new["value"] is None:
        return Change(case, old["name"], text(old)[0], "-", 1.0, "gone")
    worse = _factor(new) / _factor(old)
    if old["name"].startswith(LARGER_IS_BETTER):
        worse = 1 / worse
    verdict = "worse" if worse > 1 + tolerance else "better" if worse < 1 / (1 + tolerance) else "same"
    return Change(case, old["name"], text(old)[0], text(new)[0], worse, verdict)


def _factor(figure: dict) -> float:
    """The figure as a positive factor: `3 % slower than no bias` is 1.03."""
    value = 1 + figure["value"] / 100 if figure["name"].startswith("slower than") else figure["value"]
    return max(value, 1e-9)


def report(old: dict, new: dict, tolerance: float) -> tuple[str, int]:
    """(the text to print, the exit status)."""
    machines = [data["machine"]["cpu"] + (f" ({data['machine']['isa']})") for data in (old, new)]
    if machines[0] != machines[1]:
        return f"these results are of different machines and cannot be compared: {' and '.join(machines)}", 2
    found = differences(old, new, tolerance)
    shown = [change for change in found if change.verdict != "same"]
    lines = _columns([("case", "figure", "old", "new", "change", ""), *map(_row, shown)]) if shown else []
    failed = sum(change.fails for change in found)
    added = len({result["name"] for result in new["results"]} - {result["name"] for result in old["results"]})
    counts = f"{len(found)} figures: {failed} failed, {sum(c.verdict == 'better' for c in found)} better, "
    counts += f"{sum(c.verdict == 'same' for c in found)} within {tolerance:.0%}; {added} new cases"
    return "\n".join([*lines, counts]), 1 if failed else 0


def _row(change: Change) -> tuple[str, ...]:
    measured = change.verdict in ("better", "worse")
    amount = f"{100 * (max(change.worse, 1 / change.worse) - 1):.0f} %" if measured else ""
    return change.case, change.figure, change.old, change.new, amount, change.verdict


def _columns(rows: list[tuple[str, ...]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
