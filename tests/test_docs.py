"""The documentation: links lead somewhere, examples run, and the API reference builds."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import pyext

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted(path for folder in ("", "docs", "examples", "tests") for path in (ROOT / folder).glob("*.md"))
PAGES += sorted((ROOT / "docs" / "contributing").glob("*.md"))
# What the pages of these names show is code as one writes it, not a fragment.
RUNNABLE = ("docs/contributing/bias.md", "docs/contributing/mask.md")


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def anchor(heading: str) -> str:
    """GitHub's name for a heading."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links(page):
    text = re.sub(r"```.*?```|`[^`]*`", "", page.read_text(encoding="utf-8"), flags=re.S)
    dead = []
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"[a-z]+:", link):
            continue
        path, _, fragment = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        headings = re.findall(r"^#+ (.*)$", target.read_text(encoding="utf-8"), re.M) if target.suffix == ".md" else []
        if not target.exists() or (fragment and fragment not in map(anchor, headings)):
            dead.append(link)
    assert not dead


@pytest.mark.parametrize("page", RUNNABLE)
def test_examples_run(page):
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(encoding="utf-8"), re.S)
    path = os.pathsep.join([str(Path(pyext.__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


def test_every_way_to_contribute_has_one_page():
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    for subject in ("bias", "mask", "op", "backend"):
        page = ROOT / "docs" / "contributing" / f"{subject}.md"
        assert f"docs/contributing/{subject}.md" in text and len(page.read_text(encoding="utf-8").splitlines()) < 100


def test_the_changelog_knows_this_version():
    text = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert "## [Unreleased]" in text or f"## [{pyext.__version__}]" in text


def test_api_reference(tmp_path):
    """It builds without a warning, has a page of each module, and none of its links is dead."""
    command = [sys.executable, "-W", "error::UserWarning", "docs/build_api.py", "--out", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    page = (tmp_path / "pyext.html").read_text(encoding="utf-8")
    for name in set(pyext.__all__) - {"__version__"}:
        assert f'id="{name}"' in page or (tmp_path / "pyext" / f"{name}.html").exists(), name
    broken = tmp_path / "pyext" / "bias.html"
    broken.write_text(broken.read_text(encoding="utf-8") + '<a href="masks.html#nothing">', encoding="utf-8")
    sys.path.insert(0, str(ROOT / "docs"))
    try:
        from build_api import dead_links
    finally:
        sys.path.pop(0)
    assert dead_links(tmp_path) == ["pyext/bias.html: masks.html#nothing"]
