"""Runs CMake. CMakeLists.txt says what is compiled, pyproject.toml everything else about the package.

Also the build backend that pyproject.toml names: setuptools' own, and a torch only where there is none to build with.
"""

import contextlib
import re
import shutil
import subprocess
import sys
import sysconfig
from importlib.metadata import distributions
from pathlib import Path

from setuptools import Extension, build_meta, setup
from setuptools.build_meta import *  # noqa: F403  (the hooks of a build backend)
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()


class CMakeBuild(build_ext):
    """Configures, builds and installs the CMake project into the package's folder."""

    def run(self) -> None:
        build = Path(self.build_temp).resolve()
        package = ROOT / "equifast" if self.inplace else Path(self.build_lib).resolve() / "equifast"
        # An isolated build has its own cmake and pybind11, in another folder each time: nothing that was found before
        # holds. What was compiled does, where its command is the same: that of the kernels, which know no torch.
        (build / "CMakeCache.txt").unlink(missing_ok=True)
        for found in build.glob("CMakeFiles/[0-9]*"):
            shutil.rmtree(found)
        configure = ["cmake", "-S", ROOT, "-B", build, "-G", "Ninja", "-DEQUIFAST_TESTS=OFF"]
        self._cmake(*configure, f"-DPython_EXECUTABLE={sys.executable}")
        self._cmake("cmake", "--build", build)
        self._cmake("cmake", "--install", build, "--prefix", package)

    def _cmake(self, *command: object) -> None:
        words = [str(word) for word in command]
        try:
            process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        except FileNotFoundError:
            sys.exit("equifast: building needs CMake 3.24 or later (pip install cmake ninja).")
        assert process.stdout is not None
        sentence = "compiling failed; the first error above says where."
        for line in process.stdout:
            print(line, end="", flush=True)
            if found := re.match(r"\s*equifast: (.+)", line):
                sentence = found.group(1)
        if process.wait() != 0:
            sys.exit(f"equifast: {sentence}")

    def get_source_files(self) -> list[str]:
        return []  # MANIFEST.in names them

    def get_outputs(self) -> list[str]:
        return [str(path) for path in (Path(self.build_lib) / "equifast").glob("*.so")]

    def get_output_mapping(self) -> dict[str, str]:
        return {}  # an editable install builds into the package's folder: nothing to map


def _torch() -> list[str]:
    """What a build needs besides: torch, for its headers. One of 2.11 or later in the environment that is installed
    into serves, which pip's isolated build hides and CMake finds (`ask_torch`): gigabytes less to fetch and unpack.
    One that cannot be imported from there, such as a broken or an editable one, does not."""
    place = sysconfig.get_path("platlib")
    for found in distributions(name="torch", path=[place]):
        if tuple(int(number) for number in re.findall(r"\d+", found.version)[:2]) >= (2, 11):
            code = f"import sys; sys.path.append({place!r}); import torch.utils.cpp_extension"
            with contextlib.suppress(subprocess.CalledProcessError):
                subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
                return []
    return ["torch>=2.11"]


def get_requires_for_build_wheel(config_settings: dict | None = None) -> list[str]:
    return build_meta.get_requires_for_build_wheel(config_settings) + _torch()


def get_requires_for_build_editable(config_settings: dict | None = None) -> list[str]:
    return build_meta.get_requires_for_build_editable(config_settings) + _torch()


if __name__ == "__main__":  # as setuptools runs it, also for the hooks above
    # The extension only makes the wheel a platform wheel and build_ext run; CMake knows its sources.
    setup(ext_modules=[Extension("equifast._C", sources=[])], cmdclass={"build_ext": CMakeBuild})
