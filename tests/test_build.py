"""The build itself: what the native module may contain, what it may need, and how the package behaves without it."""

import importlib.metadata
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import pyext

ROOT = Path(__file__).resolve().parent.parent
EDITABLE = Path(pyext.__file__).resolve().parent == ROOT / "pyext"
MAX_BYTES = 15 * 2**20


@pytest.fixture
def native():
    return pytest.importorskip("pyext._C", reason="no native module in this build")


def output(*command: object) -> str:
    return subprocess.run([str(part) for part in command], check=True, capture_output=True, text=True).stdout


def symbols(path: Path, *options: str) -> list[tuple[str, str]]:
    """(type, name) of each symbol, as nm prints them."""
    if shutil.which("nm") is None:
        pytest.skip("no nm on this machine")
    return [tuple(line.split()[-2:]) for line in output("nm", *options, path).splitlines()]


def run(code: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)


def test_kernels_export_one_table_and_leak_no_shared_code(native):
    """A weak function compiled with AVX-512 may be the copy that the linker keeps for everybody."""
    if not EDITABLE:
        pytest.skip("an installed wheel has no object files")
    for isa in native.build_info()["isas"]:
        (path,) = ROOT.glob(f"build/cmake-{sys.implementation.cache_tag}/**/isa_{isa}.cpp.o")
        visible = [(kind, name) for kind, name in symbols(path, "--defined-only") if kind not in "abdrtn"]
        assert [name for _, name in visible] == [f"_ZN5pyext{len('kernels_' + isa)}kernels_{isa}E"], visible


def test_needs_only_c_functions_of_torch(native):
    """C++ symbols of torch change from one version to the next; the C ones of the stable interface do not."""
    for kind, name in symbols(Path(native.__file__), "-D", "--undefined-only"):
        assert not any(part in name for part in ("3c10", "2at6", "5torch", "5caffe")), f"{kind} {name}"


def test_module_is_small_and_knows_no_build_folder(native):
    path = Path(native.__file__)
    assert path.stat().st_size <= MAX_BYTES
    if shutil.which("readelf"):
        dynamic = output("readelf", "-d", path)
        assert "RPATH" not in dynamic and "RUNPATH" not in dynamic


def test_one_version(native):
    assert pyext.__version__ == importlib.metadata.version("pyext-kernels") == native.build_info()["version"]


def test_every_package_is_installed():
    """Packages are listed by hand in pyproject.toml, because kernels/triton is not where its name says."""
    tomllib = pytest.importorskip("tomllib", reason="Python 3.10 has no tomllib")
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]
    found = {".".join(path.parent.relative_to(ROOT).parts) for path in (ROOT / "pyext").rglob("__init__.py")}
    assert set(settings["packages"]) == found | {"pyext.kernels"}
    from pyext import kernels

    assert [Path(folder).name for folder in kernels.__path__] in (["triton"], ["kernels"])


def test_isa_choice(native):
    usable, before = native.available_isas(), native.isa()
    assert set(usable) <= set(native.build_info()["isas"])
    assert before in (usable or [""])
    try:
        for name in usable:
            native.set_isa(name)
            assert native.isa() == name
            assert all(native.peak_flops(dtype, 0.001) > 1e8 for dtype in ("fp32", "bf16", "fp64"))
        native.set_isa("none")
        assert native.isa() == ""
        with pytest.raises(RuntimeError, match="peak_flops needs"):
            native.peak_flops("fp32", 0.001)
    finally:
        native.set_isa(before or "none")
    with pytest.raises(ValueError, match="name must be one of none.*got sse2"):
        native.set_isa("sse2")
    with pytest.raises(ValueError, match="dtype must be .*got 'int8'"):
        native.peak_flops("int8", 0.001)


def test_environment_chooses_the_isa(native, monkeypatch):
    for name in native.available_isas():
        monkeypatch.setenv("PYEXT_ISA", name)
        assert run("import pyext; from pyext import _C; print(_C.isa())").stdout.strip() == name


def test_works_without_the_native_module():
    """One warning says why, and every call runs on the reference."""
    code = """if True:
        import sys, warnings
        sys.modules["pyext._C"] = None
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            import pyext
        ours = [str(w.message) for w in caught if "pyext" in str(w.message)]
        assert len(ours) == 1 and "reference" in ours[0], ours
        import torch
        x = torch.randn(1, 2, 5, 4, requires_grad=True)
        pyext.attention(x, x, x, mask=pyext.masks.causal()).sum().backward()
        assert x.grad.isfinite().all()
    """
    result = run(code)
    assert result.returncode == 0, result.stderr


def test_command_line_self_check():
    result = subprocess.run([sys.executable, "-m", "pyext"], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    assert pyext.__version__ in result.stdout
