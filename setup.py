"""Runs CMake. CMakeLists.txt says what is compiled, pyproject.toml everything else about the package."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
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


# The extension only makes the wheel a platform wheel and build_ext run; CMake knows its sources.
setup(ext_modules=[Extension("equifast._C", sources=[])], cmdclass={"build_ext": CMakeBuild})
