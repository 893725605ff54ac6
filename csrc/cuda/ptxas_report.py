#!/usr/bin/env python3
"""Runs nvcc, prints what each kernel takes on each architecture, and fails where one spills registers.

ptxas_report.py NVCC ARGUMENT...  one compilation; CMake puts this script before its own. The table also goes beside
                                  the object, as NAME.o.txt
ptxas_report.py [NVCC]            all kernels, for the architectures that are built for; needs no torch
"""

import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
ARCHITECTURES = (80, 90, 100)
ENTRY = re.compile(r"Compiling entry function '(?P<name>\S+)' for '(?P<architecture>\S+)'")
MEMORY = re.compile(r"(?P<stack>\d+) bytes stack frame, (?P<stores>\d+) bytes spill stores, (?P<loads>\d+) bytes spill")
USED = re.compile(r"Used (?P<registers>\d+) registers")
SHARED = re.compile(r"(?P<shared>\d+) bytes smem")


def readable(names: list[str]) -> list[str]:
    """Kernels' names as one reads them, without namespaces and arguments."""
    if shutil.which("c++filt") is None:
        return names
    plain = subprocess.run(["c++filt"], input="\n".join(names), capture_output=True, text=True, check=True).stdout
    return [
        re.sub(r"\(.*", "", re.sub(r"\w+::|\(anonymous namespace\)::|^void ", "", line)) for line in plain.split("\n")
    ]


def compile_and_report(command: list[str]) -> int:
    """One compilation, with ptxas's own report turned into a table."""
    done = subprocess.run([*command, "-Xptxas", "-v"], stdout=sys.stdout, stderr=subprocess.PIPE, text=True)
    kernels: list[dict[str, str]] = []
    rest = []
    for line in done.stderr.splitlines():
        if found := ENTRY.search(line):
            kernels.append({**found.groupdict(), "shared": "0"})
        elif kernels and (found := MEMORY.search(line) or USED.search(line)):
            kernels[-1] |= found.groupdict()
            if shared := SHARED.search(line):
                kernels[-1] |= shared.groupdict()
        elif not line.startswith("ptxas info"):
            rest.append(line)
    print("\n".join(rest), end="\n" if rest else "", file=sys.stderr)
    if done.returncode != 0 or not kernels:  # a preprocessing or linking step has none
        return done.returncode
    columns = ("architecture", "registers", "shared", "stack", "stores", "loads")
    head = ("sm", "registers", "shared B", "stack B", "spill st B", "spill ld B")
    table = [" ".join(f"{title:>10}" for title in head) + "  kernel"]
    spilled = []
    for name, kernel in sorted(
        zip(readable([kernel["name"] for kernel in kernels]), kernels, strict=False),
        key=lambda k: (k[0], int(k[1]["architecture"][3:])),
    ):
        kernel["architecture"] = kernel["architecture"].removeprefix("sm_")
        table.append(" ".join(f"{kernel[column]:>10}" for column in columns) + f"  {name}")
        if any(kernel[column] != "0" for column in ("stack", "stores", "loads")):
            spilled.append(f"{name} on sm_{kernel['architecture']}")
    print("\n".join(table))
    Path(command[command.index("-o") + 1] + ".txt").write_text("\n".join(table) + "\n")
    if spilled:
        print(f"equifast: registers spill, or arrays lie in local memory: {', '.join(spilled)}", file=sys.stderr)
    return 1 if spilled else 0


def main(arguments: list[str]) -> int:
    """With arguments one compilation, else all kernels."""
    if len(arguments) > 1:
        return compile_and_report(arguments)
    nvcc = arguments[0] if arguments else "nvcc"
    generate = [f"-gencode=arch=compute_{a},code=sm_{a}" for a in ARCHITECTURES]
    status = 0
    with tempfile.TemporaryDirectory() as folder:
        for source in sorted(HERE.glob("*.cu")):
            print(source.name)
            command = [nvcc, "-std=c++17", "-O3", *generate, "-c", str(source), "-o", str(Path(folder) / "kernels.o")]
            status |= compile_and_report(command)
    return status


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
