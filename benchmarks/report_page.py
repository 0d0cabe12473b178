"""docs/report.md: what the stored results say, with curves against the length and the share of the floor of every op.

The floor of a case is the time that the machine needs at least: its flops at the measured peak, or its bytes at the
measured bandwidth. `100 %` is a kernel that does nothing else.
"""

from __future__ import annotations

import math
import re
import statistics
from pathlib import Path

OWN, PEER = "#1f6f8b", "#d9a05b"
DTYPES = ("fp32", "bf16")


def write(data: dict, folder: Path) -> None:
    """report.md and its pictures."""
    sections = (_families, _lengths, _memory, _floors, _speedups)
    parts = [_head(data), *(section(data, folder) for section in sections)]
    (folder / "report.md").write_text("\n".join(parts), encoding="utf-8")


def figure_of(result: dict, prefix: str) -> float | None:
    """The first figure of that name that was measured."""
    values = (f["value"] for f in result["figures"] if f["name"].startswith(prefix))
    return next((value for value in values if value is not None), None)


def length_of(result: dict) -> int:
    """The number of tokens in a case's name, `.../1x8x2048x64/fp32`."""
    return int(re.search(r"/\d+x\d+x(\d+)x\d+", result["name"]).group(1))


def _head(data: dict) -> str:
    machine, results = data["machine"], data["results"]
    met = [f["met"] for r in results for f in r["figures"] if f["target"] is not None]
    wrong = sum(r["status"] != "ok" for r in results)
    where = f"{machine['cpu']} ({machine['isa'] or 'no native module'}), {machine['threads']} thread(s)"
    return f"""# Report

Made by `python -m benchmarks.report --run` on {where},
torch {machine["torch"]}, {machine["created"]}: {len(results)} cases, {wrong} of them wrong;
{sum(m is True for m in met)} of {len(met)} targets met. All cases with their errors: [benchmarks.md](benchmarks.md).

Contenders of a case take turns in one loop, in a process of their own; times are medians; every result was compared
with fp64 first, in another process.
`python -m benchmarks.report --compare old.json new.json --tolerance 0.1` compares two runs, and its exit status says
whether anything got worse.
"""


def _table(head: list[str], rows: list[list[str]]) -> str:
    return "\n".join("| " + " | ".join(row) + " |" for row in [head, ["---"] * len(head), *rows])


def _section(title: str, intro: str, table: str | None, picture: str | None = None) -> str:
    if table is None:
        return f"## {title}\n\n{intro}\n\nThe stored results hold no case of it yet.\n"
    image = f"![{title}]({picture})\n\n" if picture else ""
    return f"## {title}\n\n{intro}\n\n{image}{table}\n"


# --- Model families ---


def _families(data: dict, folder: Path) -> str:
    """Cases are named `systems/<family>/<batch>x<tokens>/<dtype>`."""
    title = "Model families"
    intro = "One layer of base size, forward and backward: tokens per second, patched and as published."
    cases = [(re.match(r"systems/(.+)/(\d+)x(\d+)/", r["name"]), r) for r in data["results"] if r["times"]]
    cases = [(found, r) for found, r in cases if found]
    families = list(dict.fromkeys(found[1] for found, _ in cases))
    cases.sort(key=lambda case: (families.index(case[0][1]), int(case[0][3])))
    speeds = {
        (f"{found[1]} {found[2]} x {found[3]}", r["dtype"]): {
            who: int(found[2]) * int(found[3]) / t["median_ms"] * 1e3 for who, t in r["times"].items()
        }
        for found, r in cases
    }
    if not speeds:
        return _section(title, intro, None)
    others = ("eager", "SDPA")
    rows = []
    for (family, dtype), speed in speeds.items():
        rates = [f"{speed[who]:,.0f}" if who in speed else "-" for who in ("pyext", *others)]
        ratios = [f"{speed['pyext'] / speed[who]:.2f}" if who in speed else "-" for who in others]
        rows.append([family, dtype, *rates, *ratios])

    def draw(axes):
        names = list(dict.fromkeys(family for family, _ in speeds))[::-1]
        for offset, dtype, colour in ((0.2, "fp32", OWN), (-0.2, "bf16", PEER)):
            shown = [(i, speeds[name, dtype]) for i, name in enumerate(names) if (name, dtype) in speeds]
            ratios = [speed["pyext"] / speed["eager"] for _, speed in shown]
            axes[0].barh([i + offset for i, _ in shown], ratios, 0.38, color=colour, label=dtype)
        _bars(axes[0], names, 1, "times as fast as eager")

    _picture(folder / "report_families.png", 1, draw, height=1 + 0.35 * len(speeds) / 2)
    head = ["family", "dtype", "pyext", "eager", "SDPA", "to eager", "to SDPA"]
    return _section(title, intro, _table(head, rows), "report_families.png")


# --- Against the length ---


def _lengths(data: dict, folder: Path) -> str:
    title, intro = "Speed against length", "T5's attention with a learned table, forward and backward, ms."
    timed = [r for r in data["results"] if r["name"].startswith("length/t5/") and r["times"]]
    if not timed:
        return _section(title, intro, None)
    rows = [
        [
            str(length_of(r)), r["dtype"], f"{r['times']['pyext']['median_ms']:.2f}",
            f"{r['times']['SDPA']['median_ms']:.2f}", f"{figure_of(r, 'speed-up'):.2f}",
        ]
        for r in timed
    ]  # fmt: skip

    def draw(axes):
        for axis, dtype in zip(axes, DTYPES, strict=True):
            for who, colour in (("pyext", OWN), ("SDPA", PEER)):
                points = [(length_of(r), r["times"][who]["median_ms"]) for r in timed if r["dtype"] == dtype]
                _curve(axis, points, who, colour)
            _axes(axis, dtype, "ms")

    _picture(folder / "report_speed.png", 2, draw)
    table = _table(["tokens", "dtype", "pyext", "SDPA", "times as fast"], rows)
    return _section(title, intro, table, "report_speed.png")


def _memory(data: dict, folder: Path) -> str:
    title = "Memory against length"
    intro = "Peak of resident memory above the inputs, one step with T5's positions in bf16, MiB."
    measured = [r for r in data["results"] if "memory/" in r["name"] and not r["name"].startswith("deberta")]
    points = {
        who: sorted((length_of(r), figure_of(r, name)) for r in measured if figure_of(r, name) is not None)
        for who, name in (("pyext", "memory above the inputs"), ("SDPA", "memory of SDPA"))
    }
    if not points["pyext"]:
        return _section(title, intro, None)
    theirs = dict(points["SDPA"])
    rows = [[str(n), f"{mib:.0f}", f"{theirs[n]:.0f}" if n in theirs else "-"] for n, mib in points["pyext"]]

    def draw(axes):
        for (who, curve), colour in zip(points.items(), (OWN, PEER), strict=True):
            _curve(axes[0], curve, who, colour)
        _axes(axes[0], "bf16", "MiB")

    _picture(folder / "report_memory.png", 1, draw)
    return _section(title, intro, _table(["tokens", "pyext", "SDPA"], rows), "report_memory.png")


# --- By op ---


def _floors(data: dict, folder: Path) -> str:
    title = "Share of the floor"
    intro = (
        "100 % is the least time that the machine needs: the flops at the measured peak of the core, or the bytes at "
        "the\nmeasured bandwidth. Median over the cases of a group, least and most."
    )
    shares: dict[tuple[str, str], list[float]] = {}
    for result in data["results"]:
        share = figure_of(result, "share of")
        if share is not None and result["dtype"] in DTYPES and result["isa"] == data["machine"]["isa"]:
            shares.setdefault((f"{result['op']}: {result['group']}", result["dtype"]), []).append(share)
    if not shares:
        return _section(title, intro, None)
    rows = [
        [name, dtype, str(len(found)), f"{statistics.median(found):.0f} %", f"{min(found):.0f} to {max(found):.0f} %"]
        for (name, dtype), found in shares.items()
    ]

    def draw(axes):
        names = list(dict.fromkeys(name for name, _ in shares))[::-1]
        for offset, dtype, colour in ((0.2, "fp32", OWN), (-0.2, "bf16", PEER)):
            found = [(i, shares[name, dtype]) for i, name in enumerate(names) if (name, dtype) in shares]
            places, heights = [i + offset for i, _ in found], [statistics.median(x) for _, x in found]
            axes[0].barh(places, heights, 0.38, color=colour, label=dtype)
        _bars(axes[0], names, 100, "% of the floor")

    _picture(folder / "report_floor.png", 1, draw, height=1 + 0.35 * len(shares) / 2)
    table = _table(["op: group", "dtype", "cases", "median", "from"], rows)
    return _section(title, intro, table, "report_floor.png")


def _speedups(data: dict, folder: Path) -> str:
    title, intro = "Against others", "Times as fast, geometric mean over the cases, least and most."
    ratios: dict[tuple[str, str, str], list[float]] = {}
    for result in data["results"]:
        for figure in result["figures"]:
            if figure["name"].startswith("speed-up over") and figure["value"] is not None:
                peer = figure["name"].removeprefix("speed-up over ")
                key = (f"{result['op']}: {result['group']}", peer, result["dtype"])
                ratios.setdefault(key, []).append(figure["value"])
    if not ratios:
        return _section(title, intro, None)
    rows = [
        [*key, str(len(x)), f"{math.exp(statistics.fmean(map(math.log, x))):.2f}", f"{min(x):.2f} to {max(x):.2f}"]
        for key, x in ratios.items()
    ]
    return _section(title, intro, _table(["op: group", "against", "dtype", "cases", "mean", "from"], rows))


# --- Pictures ---


def _picture(path: Path, panels: int, draw, height: float = 3.4) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, panels, figsize=(4.6 * panels + 1, height), squeeze=False)
    draw(axes[0])
    figure.tight_layout()
    figure.savefig(path, dpi=100)
    plt.close(figure)


def _curve(axis, points: list[tuple[int, float]], label: str, colour: str) -> None:
    if points:
        axis.plot(*zip(*points, strict=True), marker="o", markersize=4, color=colour, label=label)


def _axes(axis, title: str, unit: str) -> None:
    axis.set_xscale("log", base=2)
    axis.set_yscale("log")
    axis.set_xlabel("tokens", fontsize=8)
    axis.set_ylabel(unit, fontsize=8)
    axis.set_title(title, fontsize=9)
    axis.tick_params(labelsize=8)
    axis.grid(alpha=0.3)
    if axis.get_legend_handles_labels()[0]:
        axis.legend(fontsize=8, frameon=False)
    axis.spines[["top", "right"]].set_visible(False)


def _bars(axis, names: list[str], mark: float, unit: str) -> None:
    """The names of horizontal bars, and a line at the value that they are held against."""
    axis.set_yticks(range(len(names)), names, fontsize=8)
    axis.axvline(mark, color="grey", linestyle="--", linewidth=0.8)
    axis.set_xlabel(unit, fontsize=8)
    axis.legend(fontsize=8, frameon=False)
    axis.spines[["top", "right"]].set_visible(False)
