"""What is shipped: the sdist holds all that a build and the tests need, and a wheel made from it all that runs."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
WITHOUT = (".ci", ".clang-format", ".gitignore")  # what only the repository needs


def run(*command: object, cwd: Path, **env: str) -> str:
    done = subprocess.run(list(map(str, command)), cwd=cwd, env={**os.environ, **env}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


def tracked() -> list[str]:
    """The files that git knows of."""
    if shutil.which("git") is None or not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    return [name for name in run("git", "ls-files", cwd=ROOT).splitlines() if (ROOT / name).is_file()]


@pytest.fixture(scope="module")
def sdist(tmp_path_factory):
    """(names of the files in the sdist, its folder unpacked), made from the tracked files in a folder of their own."""
    pytest.importorskip("build")
    pytest.importorskip("setuptools")
    tree = tmp_path_factory.mktemp("tree")
    for name in tracked():
        (tree / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, tree / name)
    made(tree, "--sdist", tree / "out")
    (archive,) = (tree / "out").glob("*.tar.gz")
    with tarfile.open(archive) as tar:
        names = [name.partition("/")[2] for name in tar.getnames()]
        tar.extractall(tree / "unpacked", **({"filter": "data"} if hasattr(tarfile, "data_filter") else {}))
    (folder,) = (tree / "unpacked").iterdir()
    return set(names), folder


def made(tree: Path, kind: str, out: Path) -> None:
    """`python -m build` in this environment, without compiling."""
    command = (sys.executable, "-m", "build", "--no-isolation", "--skip-dependency-check", kind, "--outdir", out, ".")
    run(*command, cwd=tree, PYEXT_NO_NATIVE="1")


def test_sdist_is_complete(sdist):
    names, _ = sdist
    missing = [name for name in tracked() if name not in names and not name.startswith(WITHOUT)]
    assert not missing
    assert not [name for name in names if name.endswith((".so", ".pyc"))]


def test_wheel_from_the_sdist_runs(sdist, tmp_path):
    """Without kernels here, which CI's wheel has: every module is there, and every op checks out on the reference."""
    names, folder = sdist
    made(folder, "--wheel", tmp_path)
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        packed = set(archive.namelist())
        archive.extractall(tmp_path / "site")
        (metadata,) = (archive.read(name).decode() for name in packed if name.endswith(".dist-info/METADATA"))
    modules = {name for name in names if name.startswith("pyext/") and name.endswith(".py")}
    kernels = {name for name in names if name.startswith("kernels/triton/") and name.endswith(".py")}
    expected = modules | {name.replace("kernels/triton", "pyext/kernels") for name in kernels}
    assert {name for name in packed if name.endswith(".py")} == expected
    assert re.search(r"^Requires-Dist: torch>=", metadata, re.M) and "License-Expression: Apache-2.0" in metadata
    report = run(sys.executable, "-W", "ignore", "-m", "pyext", cwd=tmp_path, PYTHONPATH=str(tmp_path / "site"))
    assert "all checks hold" in report
