"""Runs the benchmarks, prints their table, draws their picture.

    python -m benchmarks.report --run                 all cases -> benchmarks/results/cpu.json, table, docs/
    python -m benchmarks.report --run --cases t5      only cases whose name matches the regular expression
    python -m benchmarks.report                       docs/report.md, table and pictures from the stored results
    python -m benchmarks.report out.json              ... from `pytest benchmarks/ --benchmark-json out.json`
    python -m benchmarks.report --list                names of the cases
    python -m benchmarks.report --check               compares every case's result with fp64, times nothing
    python -m benchmarks.report --compare old.json new.json --tolerance 0.1
                                                      exit status 1 if a figure got worse by more than 10 %

A run over some of the cases replaces those in the stored results and keeps the rest; each is stored when it is done.
The JSON:
{"schema": 1, "machine": {...}, "results": [{name, op, group, title, dtype, threads, isa, status,
times: {contender: {median_ms, min_ms, rounds, gflops}}, peak_gflops, bandwidth_gbs,
figures: [{name, value, unit, sign, target, met}], error: {ok, worst, tensors}, notes}]}.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path

from tqdm import tqdm

SCHEMA = 1
ROOT = Path(__file__).resolve().parent.parent
TIMES = "\N{MULTIPLICATION SIGN}"
RESULTS = ROOT / "benchmarks" / "results"


# --- Running and reading --------------------------------------------------------------------------------------------


def run(pattern: str, threads: int, budget: float, seed: int | None) -> Iterator[dict]:
    """The results so far, after every case."""
    from . import every_case
    from .harness import machine_facts

    results = []
    with tqdm(every_case.selected(pattern, threads), unit="case", disable=None) as bar:
        for case in bar:
            bar.set_description(case.name)
            results.append(every_case.run_apart(case.name, threads, budget, seed))
            bar.write(summary(results[-1]), file=sys.stderr)
            yield {"schema": SCHEMA, "machine": machine_facts(threads), "results": results}


def check_only(pattern: str, threads: int, seed: int | None) -> int:
    """Prints the error of every case's tensors; returns how many cases are wrong."""
    from .every_case import selected
    from .harness import check_case

    wrong = 0
    for case in tqdm([c for c in selected(pattern, threads) if c.setup], unit="case", disable=None):
        _, error = check_case(case, seed)
        if error is None:
            continue
        wrong += not error["ok"]
        for name, t in error["tensors"].items():
            limits = f"max {t['max']:.2e} of {t['allowed']:.2e}, rms {t['rms']:.2e} of {t['allowed_rms']:.2e}"
            tqdm.write(f"{'ok   ' if t['ok'] else 'WRONG'} {case.name}: {name}: {limits}")
    return wrong


def merged(old: dict | None, new: dict) -> dict:
    """New results over old ones, in the order of the old list; a different machine or schema starts afresh."""
    same = old is not None and old.get("schema") == SCHEMA and old["machine"]["cpu"] == new["machine"]["cpu"]
    if not same:
        return new
    fresh = {r["name"]: r for r in new["results"]}
    kept = [fresh.pop(r["name"], r) for r in old["results"]]
    return {**new, "results": kept + list(fresh.values())}


def load(path: Path) -> dict:
    """Our own JSON, or pytest-benchmark's with our entries as extra_info."""
    data = json.loads(path.read_text(encoding="utf-8"))
    if "benchmarks" in data:
        entries = [dict(b["extra_info"]) for b in data["benchmarks"] if "figures" in b["extra_info"]]
        if not entries:
            raise SystemExit(f"{path} holds no benchmark of this project")
        machines = [entry.pop("machine") for entry in entries]
        data = {"schema": SCHEMA, "machine": {**machines[0], "threads": 1}, "results": entries}
    if data.get("schema") != SCHEMA:
        raise SystemExit(f"{path} has schema {data.get('schema')!r}, this report reads {SCHEMA}")
    return data


def save(path: Path, data: dict) -> None:
    path.write_text(json.dumps(data, indent=1, sort_keys=True) + "\n", encoding="utf-8")


# --- The table ------------------------------------------------------------------------------------------------------


def number(value: float | None, digits: int = 3) -> str:
    if value is None:
        return "-"
    if value and abs(value) < 0.1:
        return f"{value:.{digits}g}"
    return f"{value:.{max(0, digits - len(str(int(abs(value)))))}f}"


def figure_text(figure: dict) -> tuple[str, str, str]:
    """(value, target, met) as the table prints them."""
    unit = "" if figure["unit"] == "x" else f" {figure['unit']}"
    suffix = TIMES if figure["unit"] == "x" else unit
    value = "-" if figure["value"] is None else number(figure["value"]) + suffix
    if figure["target"] is None:
        return value, "", ""
    sign = "≤" if figure["sign"] == "<=" else "≥"
    met = {True: "yes", False: "**no**", None: "-"}[figure["met"]]
    return value, f"{sign} {figure['target']:g}{suffix}", met


def error_text(error: dict | None) -> str:
    if error is None:
        return "-"
    worst = error["tensors"][error["worst"]]
    text = f"{worst['max']:.1e} of {worst['allowed']:.1e}"
    return text if error["ok"] else f"**wrong: {error['worst']}** {text}"


def milliseconds(result: dict, own: bool) -> str:
    if result["times"] is None:
        return "-"
    items = [(n, t["median_ms"]) for n, t in result["times"].items() if (n == "pyext") == own]
    return ", ".join(number(ms) if own else f"{name} {number(ms)}" for name, ms in items) or "-"


def table(data: dict) -> str:
    """Markdown: one row per figure, a case's name and times on its first row."""
    head = ["case", "dtype", "pyext, ms", "others, ms", "figure", "value", "target", "met", "error (allowed)"]
    rows = []
    for result in data["results"]:
        front = [result["title"], result["dtype"], milliseconds(result, True), milliseconds(result, False)]
        figures = [f for f in result["figures"] if f["value"] is not None or f["target"] is not None]
        for i, figure in enumerate(figures):
            back = error_text(result["error"]) if i == 0 else ""
            rows.append([*(front if i == 0 else [""] * 4), figure["name"], *figure_text(figure), back])
        rows += [["", "", "", "", note, "", "", "", ""] for note in result["notes"]]
    lines = ["| " + " | ".join(r) + " |" for r in [head, ["---"] * len(head), *rows]]
    return "\n".join(lines)


def page(data: dict) -> str:
    """The text of docs/benchmarks.md."""
    machine = data["machine"]
    met = [f["met"] for r in data["results"] for f in r["figures"] if f["target"] is not None]
    peaks = {}
    for r in data["results"]:
        if r["peak_gflops"] and r["threads"] == 1 and r["isa"] == machine["isa"] and r["dtype"] in ("fp32", "bf16"):
            peaks.setdefault(r["dtype"], []).append(r["peak_gflops"])
    peak_text = ", ".join(f"{d} {sorted(p)[len(p) // 2]:.0f} Gflop/s" for d, p in peaks.items())
    return f"""# Benchmarks

Made by `python -m benchmarks.report --run` on {machine["cpu"]} ({machine["isa"] or "no native module"}), \
{machine["threads"]} thread(s), torch {machine["torch"]} (its CPU capability: {machine["torch_capability"]}), \
Python {machine["python"]}, {machine["created"]}.
Measured peak of one core: {peak_text or "not measured"}. Targets met: {sum(m is True for m in met)} of {len(met)}.

Every contender of a case takes its turn in one loop; times are medians. The share of peak is against a register-only
loop of the same unit, run in the same loop. Before anything is timed, the result and all gradients are compared with
fp64; the error column shows the tensor nearest to its limit (twice the error of PyTorch eager in the same dtype, plus
rounding). A wrong result has no speed. On CPUs where MKL takes its own AVX-512 path PyTorch's fp32 doubles, so read
the share of peak beside every ratio.

{table(data)}
"""


def summary(result: dict) -> str:
    parts = []
    for figure in result["figures"]:
        value, target, met = figure_text(figure)
        parts.append(f"{figure['name']} {value}" + (f" (target {target}: {met})" if target else ""))
    status = "" if result["status"] == "ok" else "WRONG RESULT "
    return f"{result['name']}: {status}{milliseconds(result, True)} ms; " + "; ".join(parts)


# --- The picture ----------------------------------------------------------------------------------------------------

BARS = (  # name without dtype, label
    ("forward/full/1x8x2048x64", "forward\nD=64"),
    ("forward/full/1x8x2048x128", "forward\nD=128"),
    ("forward/causal/1x8x2048x64", "forward\ncausal"),
    ("backward/full/1x8x2048x64", "backward\nD=64"),
    ("backward/causal/1x8x2048x64", "backward\ncausal"),
    ("t5/forward+backward/1x8x2048x64", "T5 bias\nfwd+bwd"),
    ("alibi/forward+backward/1x8x2048x64", "ALiBi causal\nfwd+bwd"),
)


def draw(data: dict, path: Path) -> bool:
    """Bars of pyext and SDPA, Gflop/s, one panel per dtype; False if there is nothing to draw."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    results = {r["name"]: r for r in data["results"] if r["times"] and "SDPA" in r["times"]}
    panels = [d for d in ("fp32", "bf16") if any(f"{name}/{d}" in results for name, _ in BARS)]
    if not panels:
        return False
    figure, axes = plt.subplots(1, len(panels), figsize=(6 * len(panels), 3.6), squeeze=False)
    for axis, dtype in zip(axes[0], panels, strict=True):
        _panel(axis, dtype, [(results[f"{n}/{dtype}"], label) for n, label in BARS if f"{n}/{dtype}" in results])
    machine = data["machine"]
    threads = f"{machine['threads']} thread" + ("s" if machine["threads"] != 1 else "")
    figure.suptitle(
        f"Attention at 2048 tokens, 8 heads: {machine['cpu']} ({machine['isa']}), {threads}, torch {machine['torch']}",
        fontsize=10,
    )
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    plt.close(figure)
    return True


def _panel(axis, dtype: str, bars: list[tuple[dict, str]]) -> None:
    width = 0.38
    peaks = [r["peak_gflops"] for r, _ in bars if r["peak_gflops"]]
    top = max([max(t["gflops"] for t in r["times"].values()) for r, _ in bars] + peaks)
    for x, (result, _) in enumerate(bars):
        mine, theirs = result["times"]["pyext"], result["times"]["SDPA"]
        label = x == 0
        axis.bar(x - width / 2, mine["gflops"], width, color="#1f6f8b", label="pyext" if label else None)
        sdpa_label = "PyTorch SDPA" if label else None
        axis.bar(x + width / 2, theirs["gflops"], width, color="#d9a05b", label=sdpa_label)
        text = f"{theirs['median_ms'] / mine['median_ms']:.1f}{TIMES}"
        if result["peak_gflops"]:
            text = f"{100 * mine['gflops'] / result['peak_gflops']:.0f} %\n{text}"
        blank = {"facecolor": "white", "edgecolor": "none", "pad": 0.5}  # where the text crosses the line of the peak
        height = mine["gflops"] + 0.015 * top
        axis.text(x - width / 2, height, text, ha="center", va="bottom", fontsize=7.5, bbox=blank)
    if peaks:
        peak = sorted(peaks)[len(peaks) // 2]
        axis.axhline(peak, color="grey", linestyle="--", linewidth=0.8, zorder=0.5)
        axis.text(len(bars) - 0.5, peak, "peak of the core ", ha="right", va="bottom", fontsize=7.5, color="grey")
    axis.set_xticks(range(len(bars)), [label for _, label in bars], fontsize=7.5)
    axis.set_ylim(0, 1.25 * top)
    axis.set_title(f"{dtype}: Gflop/s, with share of peak and times SDPA's speed", fontsize=9)
    axis.legend(fontsize=7.5, frameon=False, loc="upper left", ncols=2)
    axis.spines[["top", "right"]].set_visible(False)


# --- Command line ---------------------------------------------------------------------------------------------------


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser("python -m benchmarks.report", description=__doc__.splitlines()[0])
    parser.add_argument("results", nargs="?", type=Path, help="JSON to report on (default: the stored results)")
    parser.add_argument("--run", action="store_true", help="run the cases first")
    parser.add_argument("--cases", default="", metavar="REGEX", help="only cases whose name matches")
    parser.add_argument("--list", action="store_true", help="print the names of the cases")
    parser.add_argument("--check", action="store_true", help="only compare the results with fp64")
    parser.add_argument("--compare", nargs=2, type=Path, metavar=("OLD", "NEW"), help="the regression gate")
    parser.add_argument("--tolerance", type=float, default=0.1, help="how much worse a figure may be (default 0.1)")
    parser.add_argument("--threads", type=int, default=1, help="threads for the single-thread cases")
    parser.add_argument("--budget", type=float, default=3.0, metavar="S", help="seconds of timing per case")
    parser.add_argument("--seed", type=int, help="other inputs than the case's own")
    parser.add_argument("--name", help="name of the stored results (default: cpu, or cpu-N-threads)")
    parser.add_argument("--docs", type=Path, default=ROOT / "docs", help="where the pages and pictures go")
    parser.add_argument("--no-docs", action="store_true", help="print the table, write no docs")
    args = parser.parse_args(argv)
    if args.list:
        from .every_case import selected

        print("\n".join(case.name for case in selected(args.cases, 1)))
        return 0
    if args.compare:
        from . import compare

        text, status = compare.report(*map(load, args.compare), args.tolerance)
        print(text)
        return status
    if args.check:
        return 1 if check_only(args.cases, args.threads, args.seed) else 0
    name = args.name or ("cpu" if args.threads == 1 else f"cpu-{args.threads}-threads")
    stored = args.results or RESULTS / f"{name}.json"
    if args.run:
        before = load(stored) if stored.exists() else None
        stored.parent.mkdir(parents=True, exist_ok=True)
        for found in run(args.cases, args.threads, args.budget, args.seed):
            data = merged(before, found)
            save(stored, data)
        if not args.cases:  # what is no case any more goes
            save(stored, data := found)
    elif not stored.exists():
        raise SystemExit(f"{stored} does not exist; add --run to measure")
    else:
        data = load(stored)
    print(table(data))
    if not args.no_docs:
        from . import report_page

        args.docs.mkdir(parents=True, exist_ok=True)
        (args.docs / "benchmarks.md").write_text(page(data), encoding="utf-8")
        draw(data, args.docs / "speed.png")
        report_page.write(data, args.docs)
    wrong = [r["name"] for r in data["results"] if r["status"] != "ok"]
    if wrong:
        print(f"wrong results: {', '.join(wrong)}", file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
