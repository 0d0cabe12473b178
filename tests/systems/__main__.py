"""`python -m tests.systems`: runs tests/systems and writes what they found to docs/systems.md.

`--speeds FILE` takes the speeds from a result of `python -m benchmarks.report` (default benchmarks/results/cpu.json).
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import pytest
import torch

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
PAGE, RESULTS = ROOT / "docs" / "systems.md", ROOT / "benchmarks" / "results" / "cpu.json"
#: The families in the order of the page, and which cases of benchmarks/systems_cases.py time them.
FAMILIES = {
    "Transformer (2017)": (),
    "GPT, GPT-2, InstructGPT": ("gpt2",),
    "GPT-3": (),
    "BERT, RoBERTa, XLM, XLM-R, LaBSE, ALBERT, DistilBERT, ELECTRA": ("bert",),
    "ERNIE (Tsinghua)": (),
    "Transformer-XL": (),
    "XLNet": ("xlnet",),
    "DeBERTa v1, v2/v3": ("deberta-v3",),
    "T5, mT5, Flan-T5, umT5": ("t5",),
    "prefix-LM (T5 study)": (),
    "BART": (),
    "CTRL": (),
    "GLaM": (),
    "Switch Transformer": ("switch",),
    "GShard": (),
    "Mixtral, DeepSeek-style": ("mixtral",),
    "LaMDA": (),
    "GPT-J": ("gptj",),
    "GPT-NeoX, Dolly-2": ("gpt-neox",),
    "BLOOM": ("bloom",),
    "PaLM": ("falcon",),
    "Chinchilla, Sparrow": (),
    "LLaMA, Alpaca, Koala": ("llama",),
    "SantaCoder": (),
    "DALL·E, ImageGPT": (),
    "GLIDE, Latent/Stable Diffusion, Imagen": (),
    "ViT, CLIP, CoCa, PaLM-E": (),
    "GPT-4 (as described in public)": (),
}
INTRODUCTION = """# Model families

Made by `python -m tests.systems` from what the tests in [tests/systems](../tests/systems) found; do not edit. Each row
compares small random models, patched by [`pyext.integrations.transformers.patch`](integrations.md), or blocks written
from a paper, with themselves as published: outputs and all parameter gradients, with padding and odd lengths, under the
project's tolerance rule, and greedy generation token by token.

- **fused**: pyext's ops that ran, each with the backend that `impl="auto"` chose on this machine.
- **error**: largest error of the outputs against fp64, pyext's / eager PyTorch's, over the models of the row in fp32.
- **gradients**: the largest ratio, over all parameters, of pyext's error to eager's (root mean squares, fp32).
- **generation**: the kinds of KV cache with which tokens are equal (beams: beam search).
- **speed**: against eager, one layer of base size, forward + backward, fp32 / bf16, at so many tokens per sequence, one
  core (`python -m benchmarks.report out.json --cases systems`).

"""


def speeds(path: Path) -> dict[str, dict[int, dict[str, float]]]:
    """How much faster than eager: of a case, at a number of tokens, in a dtype."""
    if not path.is_file():
        return {}
    found = {}
    for entry in json.loads(path.read_text())["results"]:
        group, *rest = entry["name"].split("/")
        if group == "systems" and entry["status"] == "ok":
            for figure in entry["figures"]:
                if figure["name"] == "speed-up over eager" and figure["value"]:
                    tokens = int(rest[1].partition("x")[2])
                    found.setdefault(rest[0], {}).setdefault(tokens, {})[entry["dtype"]] = figure["value"]
    return found


def row(family: str, records: list, timed: dict) -> str:
    ops: dict[str, str] = {}
    kinds: list[str] = []
    for record in records:
        ops |= record.ops
        kinds += [kind for kind in record.generated if kind not in kinds]
    fp32 = [record for record in records if record.dtype == torch.float32]
    worst = max(fp32, key=lambda record: record.error)
    error = f"{worst.error:.1e} / {worst.eager:.1e}" if worst.eager else f"{worst.error:.1e}"
    gradients = max(record.gradient for record in fp32)
    speed = []
    for case in FAMILIES[family]:
        for tokens, values in sorted(timed.get(case, {}).items()):
            ratios = (f"{values[dtype]:.1f}x" if dtype in values else "?" for dtype in ("fp32", "bf16"))
            speed.append(f"{case} {tokens}: {' / '.join(ratios)}")
    cells = (
        family,
        ", ".join(sorted({record.model.partition(",")[0] for record in records})),
        ", ".join(f"{op} ({backend})" for op, backend in sorted(ops.items())),
        error,
        f"{gradients:.1f}" if gradients else "",
        ", ".join(kinds),
        ", ".join(speed),
    )
    return "| " + " | ".join(cells) + " |"


def page(records: list, timed: dict) -> str:
    head = ("family", "checked on", "fused", "error", "gradients", "generation", "speed")
    lines = ["| " + " | ".join(head) + " |", "| " + " | ".join(["---"] * len(head)) + " |"]
    for family in FAMILIES:
        own = [record for record in records if record.family == family]
        if not own:
            raise SystemExit(f"no test in tests/systems records anything for {family!r}")
        lines.append(row(family, own, timed))
    return INTRODUCTION + "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.systems", description=__doc__.splitlines()[0])
    parser.add_argument("--speeds", type=Path, default=RESULTS, help="a result of python -m benchmarks.report")
    options = parser.parse_args()
    status = pytest.main([str(HERE), "-q", "-n", "0", "-p", "no:cacheprovider"])
    if status:
        return int(status)
    PAGE.write_text(page(sys.modules["support.systems"].RECORDS, speeds(options.speeds)))
    print(f"wrote {PAGE.relative_to(ROOT)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
