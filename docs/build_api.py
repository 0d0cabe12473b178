"""HTML of all docstrings, and a check that none of its links is dead: `python docs/build_api.py [--out build/api]`.

Needs the extra `docs`. Exit code 0 if every link within the pages leads somewhere.
"""

from __future__ import annotations

import argparse
import ast
import importlib
import inspect
import pkgutil
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

ROOT = Path(__file__).resolve().parents[1]
#: What users import, besides what is in `pyext.integrations`.
MODULES = (
    "pyext", "pyext.bias", "pyext.masks", "pyext.moe", "pyext.nn", "pyext.distributed", "pyext.flash_attn_interface",
    "pyext.bert_padding", "pyext.integrations",
)  # fmt: skip


def build(out: Path) -> None:
    """Write the pages."""
    import pdoc

    modules = [importlib.import_module(name) for name in MODULES]
    inside = pkgutil.iter_modules(modules[-1].__path__, f"{modules[-1].__name__}.")
    modules += [importlib.import_module(found.name) for found in inside]
    for module in modules:
        if not hasattr(module, "__all__"):
            module.__all__ = public_names(module)
    pdoc.render.configure(docformat="google", show_source=False, footer_text=f"pyext {modules[0].__version__}")
    listed = {f"{module.__name__}.{name}" for module in modules for name in module.__all__}  # pdoc goes there by itself
    names = (module.__name__ for module in modules)
    pdoc.pdoc(*(name for name in names if name not in listed), output_directory=out)


def public_names(module) -> list[str]:
    """What a module without `__all__` offers: what it defines, and what it imports `as` the same name."""
    imports = [node for node in ast.parse(inspect.getsource(module)).body if isinstance(node, ast.ImportFrom)]
    exported = [alias.name for node in imports for alias in node.names if alias.asname == alias.name]
    defined = [name for name, value in vars(module).items() if getattr(value, "__module__", None) == module.__name__]
    return [name for name in (*exported, *defined) if not name.startswith("_")]


class _Page(HTMLParser):
    """The links and anchors of a page."""

    def __init__(self, text: str):
        super().__init__()
        self.links, self.anchors = [], set()
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        values = dict(attrs)
        if values.get("id"):
            self.anchors.add(values["id"])
        if tag == "a" and values.get("href"):
            self.links.append(values["href"])


def dead_links(folder: Path) -> list[str]:
    """The links within the pages that lead nowhere, as `page: link`."""
    pages = {path: _Page(path.read_text(encoding="utf-8")) for path in sorted(folder.rglob("*.html"))}
    dead = []
    for path, page in pages.items():
        for link in page.links:
            parts = urlsplit(link)
            if parts.scheme or parts.netloc:
                continue
            target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            known = target in pages and (not parts.fragment or unquote(parts.fragment) in pages[target].anchors)
            if not known:
                dead.append(f"{path.relative_to(folder)}: {link}")
    return dead


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser("python docs/build_api.py", description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "api", help="where the pages go")
    out = parser.parse_args(argv).out.resolve()
    build(out)
    dead = dead_links(out)
    print(f"{len(list(out.rglob('*.html')))} pages in {out}, {len(dead)} dead links")
    for line in dead:
        print(f"  {line}", file=sys.stderr)
    return 1 if dead else 0


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    sys.exit(main())
