"""Builds the native module ``pyext/_C*.so`` by CMake and ninja. All else about the package is in pyproject.toml.

Environment: ``CXX``, ``CXXFLAGS`` and ``CMAKE_ARGS`` reach CMake as usual, ``MAX_JOBS`` limits how many compilers run
at a time, ``PYEXT_NO_NATIVE=1`` installs the Python part alone, where every call runs on the PyTorch reference.

CUDA kernels (csrc/cuda) are built and linked if torch is a CUDA build and nvcc is found (``CUDACXX``, ``CUDA_HOME``,
PATH, /usr/local/cuda); else there are none, and the build says so. ``PYEXT_CUDA=0`` leaves them out. ``PYEXT_CUDA=1``
demands them: without nvcc the build fails, and with a CPU build of torch they are compiled as a check, but not linked.
That is not the default, because it doubles the time of an install that cannot use them: the test-suite compiles them
wherever it finds nvcc (tests/test_cuda_resources.py).
"""

import importlib.util
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

ROOT = Path(__file__).resolve().parent
HINT = "To install without native kernels, on the PyTorch reference alone, set PYEXT_NO_NATIVE=1."


def package_folder(name: str) -> Path:
    """The folder of an installed package, found without importing it: only its headers and libraries are needed."""
    spec = importlib.util.find_spec(name)
    if spec is None or not spec.submodule_search_locations:
        raise CompileError(
            f"{name} is not installed where pyext is built. pip provides it, except with --no-build-isolation: "
            f"then install the build requirements of pyproject.toml first. {HINT}"
        )
    return Path(spec.submodule_search_locations[0])


def find_tool(name: str) -> str:
    """Path of a program; looks beside this Python first, where pip puts it and where PATH need not lead."""
    path = shutil.which(name, path=os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")]))
    if path is None:
        raise CompileError(f"{name} not found: pip install {name}. {HINT}")
    return path


def find_nvcc() -> str | None:
    """Path of the CUDA compiler, or None."""
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH")]
    named = [os.environ.get("CUDACXX"), *(f"{home}/bin/nvcc" for home in homes if home), "nvcc"]
    paths = map(shutil.which, filter(None, [*named, "/usr/local/cuda/bin/nvcc"]))
    return next(filter(None, paths), None)


def cuda_options(torch_root: Path) -> list[str]:
    """What CMake is told of CUDA; see the top of this file."""
    wanted, nvcc = os.environ.get("PYEXT_CUDA", ""), find_nvcc()
    version = re.search(r"^cuda\b.*?= *'([0-9.]+)'", (torch_root / "version.py").read_text(), re.MULTILINE)
    if wanted not in ("", "0", "1"):
        raise CompileError(f"PYEXT_CUDA must be 0, 1 or empty, got {wanted}")
    if wanted == "1" and nvcc is None:
        raise CompileError("PYEXT_CUDA=1, but there is no nvcc: set CUDA_HOME, or install CUDA >= 12.4")
    if wanted == "0" or nvcc is None or (version is None and wanted != "1"):
        why = {"0": "PYEXT_CUDA=0"}.get(wanted) or ("no nvcc" if version else "torch is a CPU build")
        print(f"pyext: no CUDA kernels: {why}")
        return ["-DPYEXT_CUDA=OFF"]
    print(f"pyext: CUDA kernels by {nvcc}, {'linked' if version else 'as a check only: torch is a CPU build'}")
    return [f"-DPYEXT_CUDA={'LINK' if version else 'CHECK'}", f"-DCMAKE_CUDA_COMPILER={nvcc}"]


class CMakeBuild(build_ext):
    """Configures and builds CMakeLists.txt, then copies the module to where setuptools wants it."""

    def build_extension(self, ext: Extension) -> None:
        build = ROOT / "build" / f"cmake-{sys.implementation.cache_tag}"
        self._forget_moved_tree(build)
        self._run(self._configure_command(build), "configuring the native module failed")
        jobs = os.environ.get("MAX_JOBS") or str(os.cpu_count() or 1)
        self._run([find_tool("cmake"), "--build", str(build), "--parallel", jobs], "compiling the native module failed")
        (module,) = (build / "out").glob("_C.*")
        target = Path(self.get_ext_fullpath(ext.name))
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(module, target)

    def copy_extensions_to_source(self) -> None:
        """Where the tree is used as it stands, `pyext.kernels` (see pyproject.toml) is to be found in it."""
        super().copy_extensions_to_source()
        link = ROOT / "pyext/kernels"
        if not link.exists():
            link.symlink_to("../kernels/triton")

    def _configure_command(self, build: Path) -> list[str]:
        torch_root = package_folder("torch")
        if not (torch_root / "include/torch/csrc/stable/library.h").is_file():
            raise CompileError(f"{torch_root} has no torch/csrc/stable/library.h: pyext needs torch >= 2.10. {HINT}")
        compiler = shlex.split(os.environ.get("CXX", "")) or ["c++"]
        if not any(shutil.which(name) for name in (compiler[0], "g++", "clang++")):
            raise CompileError(f"no C++ compiler: install g++ (>= 11 for all kernels) or name one in CXX. {HINT}")
        return [
            find_tool("cmake"),
            f"-S{ROOT}",
            f"-B{build}",
            "-GNinja",
            f"-DCMAKE_MAKE_PROGRAM={find_tool('ninja')}",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={package_folder('pybind11') / 'share/cmake/pybind11'}",
            f"-DPYEXT_TORCH_ROOT={torch_root}",
            f"-DPYEXT_VERSION={self.distribution.get_version()}",
            *cuda_options(torch_root),
            *shlex.split(os.environ.get("CMAKE_ARGS", "")),
        ]

    @staticmethod
    def _forget_moved_tree(build: Path) -> None:
        """CMake refuses a cache that was made for another source folder, which a copied checkout brings along."""
        cache = build / "CMakeCache.txt"
        if cache.is_file() and f"CMAKE_HOME_DIRECTORY:INTERNAL={ROOT}\n" not in cache.read_text():
            shutil.rmtree(build)

    @staticmethod
    def _run(command: list[str], failure: str) -> None:
        try:
            subprocess.run(command, check=True)
        except subprocess.CalledProcessError as error:
            raise CompileError(f"{failure}, see above (exit status {error.returncode}). {HINT}") from None


native = os.environ.get("PYEXT_NO_NATIVE", "") in ("", "0")
setup(
    ext_modules=[Extension("pyext._C", sources=[])] if native else [],
    cmdclass={"build_ext": CMakeBuild},
)
