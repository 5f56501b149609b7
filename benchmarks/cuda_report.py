"""Reads what nvcc made of the CUDA kernels from the compiled library. No GPU is needed.

    python benchmarks/cuda_report.py [LIBRARY] [--csv FILE]

Each row is one kernel for one architecture: registers, stack and local memory per thread, 16-byte loads and stores, and
instructions per element in the vectorised loop. LIBRARY is the installed fastshape._C_cuda by default.
"""

from __future__ import annotations

import argparse
import csv
import importlib.util
import re
import shutil
import subprocess
import sys
from dataclasses import asdict, dataclass, fields
from pathlib import Path

_SOURCES = ("none", "random", "bits")  # fastshape::MaskSource
_PATTERNS = ("planes", "rows", "any")  # fastshape::cuda::Pattern
_BITS = {"s": 16, "i": 32, "l": 64}


@dataclass
class Kernel:
    arch: str
    name: str
    registers: int = 0
    stack: int = 0  # bytes per thread, including spills
    local: int = 0
    loads_16: int = 0
    stores_16: int = 0
    table_loads_16: int = 0  # loads of channel tables, through the read-only path
    local_accesses: int = 0  # LDL, STL
    loop_instructions: int = 0  # in the loop with the most 16-byte loads (without loads: stores)
    per_element: float = 0.0


def tool(name: str) -> str | None:
    """The path of a CUDA binary utility: next to nvcc, on PATH, or in the copy that Triton ships."""
    nvcc = shutil.which("nvcc") or "/usr/local/cuda/bin/nvcc"
    candidates = [Path(nvcc).resolve().parent / name]
    if on_path := shutil.which(name):
        candidates.append(Path(on_path))
    triton = importlib.util.find_spec("triton")
    if triton is not None and triton.origin:
        candidates.append(Path(triton.origin).parent / "backends" / "nvidia" / "bin" / name)
    return next((str(path) for path in candidates if path.is_file()), None)


def library() -> Path | None:
    """The installed fastshape._C_cuda."""
    spec = importlib.util.find_spec("fastshape._C_cuda")
    return Path(spec.origin) if spec is not None and spec.origin else None


def _readable(symbol: str) -> str:
    """shape_kernel<Float16, binarize, within_one, random> from its mangled name."""
    match = re.search(r"\d+([a-z_]+)_kernel", symbol)
    if not match:
        return symbol
    name = match[1]
    rest = symbol[match.end() :]
    parts = re.findall(r"NS_\d+(Float\d+|BFloat\d+|Byte)E", rest)
    parts += [f"{_BITS[code]} bits" for code in re.findall(r"^I([sil])L", rest)]
    flags = [int(value) for value in re.findall(r"Lb([01])E", rest)]
    if name == "shape":
        parts += ["binarize"] * flags[0] + ["within_one"] * flags[1]
    elif name == "ones":
        parts += ["within_one"] * flags[0]
    elif name == "unpack":
        parts += ["aligned"] * flags[0]
    parts += [_SOURCES[int(value)] for value in re.findall(r"MaskSourceE(\d)E", rest)]
    parts += [_PATTERNS[int(value)] for value in re.findall(r"PatternE(\d)E", rest)]
    parts += [f"{lanes} lanes" for lanes in re.findall(r"Li(\d+)E", rest)]
    return f"{name}<{', '.join(parts)}>"


def _run(*command: str) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True, timeout=120).stdout


def _resources(cuobjdump: str, path: Path) -> dict[tuple[str, str], Kernel]:
    kernels, arch, symbol = {}, "", ""
    for line in _run(cuobjdump, "--dump-resource-usage", str(path)).splitlines():
        if match := re.search(r"arch = (sm_\w+)", line):
            arch = match[1]
        elif match := re.search(r"Function (\S+):", line):
            symbol = match[1]
        elif "REG:" in line:
            numbers = {
                key: int(value) for key, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", line)
            }
            kernels[arch, symbol] = Kernel(
                arch, _readable(symbol), numbers["REG"], numbers["STACK"], numbers["LOCAL"]
            )
    return kernels


def _read_code(kernel: Kernel, code: list[tuple[int, str]]) -> None:
    """Fill in the counts from the disassembly, a list of (address, instruction) in order."""
    loads = [a for a, text in code if re.search(r"\bLDG\.E\.128(?!\S*CONSTANT)", text)]
    kernel.table_loads_16 = sum(
        bool(re.search(r"\bLDG\.E\.128\S*CONSTANT", text)) for _, text in code
    )
    stores = [a for a, text in code if re.search(r"\bSTG\.E\S*\.128", text)]
    kernel.loads_16, kernel.stores_16 = len(loads), len(stores)
    kernel.local_accesses = sum(bool(re.search(r"\b(LDL|STL)\b", text)) for _, text in code)
    best = 0
    for address, text in code:
        branch = re.search(r"\bBRA\b.*?(0x[0-9a-f]+)", text)
        if not branch or int(branch[1], 16) > address:
            continue
        start = int(branch[1], 16)
        inside = sum(start <= a <= address for a in loads or stores)
        if inside > best:
            best = inside
            kernel.loop_instructions = sum(start <= a <= address for a, _ in code)
    if best and (bits := re.search(r"Float(\d+)|(?<=<)(\d+)(?= bits)", kernel.name)):
        kernel.per_element = round(
            kernel.loop_instructions / (best * 128 / int(bits[1] or bits[2])), 2
        )


def report(path: Path, cuobjdump: str) -> list[Kernel]:
    """All kernels of the library, sorted by architecture and name."""
    kernels = _resources(cuobjdump, path)
    arch, symbol, code = "", "", []

    def finish():
        if (arch, symbol) in kernels:
            _read_code(kernels[arch, symbol], code)

    for line in _run(cuobjdump, "-sass", str(path)).splitlines():
        if match := re.search(r"arch = (sm_\w+)", line):
            finish()
            arch, symbol, code = match[1], "", []
        elif match := re.search(r"Function : (\S+)", line):
            finish()
            symbol, code = match[1], []
        elif match := re.match(r"\s*/\*([0-9a-f]{4,})\*/\s+(.*?);", line):
            code.append((int(match[1], 16), match[2]))
    finish()
    return sorted(kernels.values(), key=lambda k: (k.arch, k.name))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("library", nargs="?", type=Path, default=None)
    parser.add_argument("--csv", type=Path)
    arguments = parser.parse_args()
    path, cuobjdump = arguments.library or library(), tool("cuobjdump")
    if path is None:
        sys.exit("fastshape._C_cuda is not built; python -m fastshape gives the reason")
    if cuobjdump is None:
        sys.exit("cuobjdump is neither next to nvcc nor on PATH")
    rows = [asdict(kernel) for kernel in report(path, cuobjdump)]
    names = [field.name for field in fields(Kernel)]
    widths = {name: max(len(name), *(len(str(row[name])) for row in rows)) for name in names}
    print("  ".join(f"{name:<{widths[name]}}" for name in names))
    for row in rows:
        print("  ".join(f"{row[name]:<{widths[name]}}" for name in names))
    if arguments.csv:
        with arguments.csv.open("w", newline="") as file:
            writer = csv.DictWriter(file, names)
            writer.writeheader()
            writer.writerows(rows)


if __name__ == "__main__":
    main()
