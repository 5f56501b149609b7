"""Builds fastshape. This file decides whether to build the compiled kernels, and whether CUDA kernels are among them.

FASTSHAPE_SKIP_EXT=1 installs the Python files only; fastshape then runs on its PyTorch reference.
Without FASTSHAPE_CUDA, the CUDA kernels are built if torch has CUDA and there is an nvcc of the same CUDA major version. With
FASTSHAPE_CUDA=1 the installation fails if they cannot be built; with 0 they are not built. No GPU is needed.
TORCH_CUDA_ARCH_LIST ("8.0;9.0+PTX", "Ampere Hopper", "native") names the GPUs to build for, as it does for torch. The decision
and its reason are printed and written to fastshape/_build_facts.json, from which `python -m fastshape` reads them.
CXX names the C++ compiler and may have several words ("ccache g++").
"""

import glob
import importlib.util
import json
import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import setuptools
from setuptools import errors, setup

TORCH_ABI_TARGET = "2.10"
OLDEST_SETUPTOOLS = (77,)  # the first that reads the license of pyproject.toml
# Machine code for the architectures of this list that nvcc knows, and PTX of the last one for later GPUs. Code also runs on later
# GPUs of the same major: that for 8.0 on 8.6 and 8.9, that for 10.0 on 10.3, that for 12.0 on 12.1.
DEFAULT_ARCHITECTURES = ("7.5", "8.0", "9.0", "10.0", "12.0")
# The names that torch takes in TORCH_CUDA_ARCH_LIST, of the GPUs that CUDA 12 or later compiles for.
NAMED_ARCHITECTURES = {
    "Maxwell": ("5.0", "5.2+PTX"),
    "Maxwell+Tegra": ("5.3",),
    "Pascal": ("6.0", "6.1+PTX"),
    "Volta": ("7.0+PTX",),
    "Volta+Tegra": ("7.2",),
    "Turing": ("7.5+PTX",),
    "Ampere": ("8.0", "8.6+PTX"),
    "Ampere+Tegra": ("8.7",),
    "Ada": ("8.9+PTX",),
    "Hopper": ("9.0+PTX",),
    "Blackwell": ("10.0", "10.3", "12.0", "12.1+PTX"),
    "Blackwell+Tegra": ("11.0",),
    "Rubin": ("10.7+PTX",),
}
# What torch and setuptools raise where a compiler or linker fails.
BUILD_ERRORS = (
    RuntimeError,
    OSError,
    subprocess.SubprocessError,
    errors.BaseError,
    errors.CCompilerError,
)
SKIP = "FASTSHAPE_SKIP_EXT=1 installs fastshape without compiled kernels"


def skips_extension() -> bool:
    value = os.environ.get("FASTSHAPE_SKIP_EXT", "0")
    if value not in ("0", "1"):
        raise SystemExit(
            f"FASTSHAPE_SKIP_EXT={value!r}: allowed are 0 (build the kernels) and 1 (do not)"
        )
    return value == "1"


# ---- what a build needs ----


def require(package: str) -> None:
    if importlib.util.find_spec(package) is None:
        raise SystemExit(f"{package} is missing: pip install {package}. {SKIP}")


def require_setuptools(version: str) -> None:
    """Check the version before setuptools reads pyproject.toml and prints pages about its license."""
    numbers = tuple(int(number) for number in re.findall(r"\d+", version)[:2])
    if numbers < OLDEST_SETUPTOOLS:
        needed = ".".join(map(str, OLDEST_SETUPTOOLS))
        raise SystemExit(
            f'setuptools {version} is too old: {needed} or newer is needed: pip install "setuptools>={needed}"'
        )


def use_compiler(folder: str) -> None:
    """Check that there is a C++ compiler, and let CXX name it by one word, because torch takes no more.

    Args:
        folder: where a script is written that calls a compiler of several words, such as "ccache g++".
    """
    requested = os.environ.get("CXX")
    words = shlex.split(requested or "c++")
    if not words or shutil.which(words[0]) is None:
        raise SystemExit(
            f"no C++ compiler: {'c++ is not on PATH' if not requested else f'CXX={requested!r} is not there'}; install "
            f"one, such as g++, or name one with CXX. {SKIP}"
        )
    compiler = words[0]
    if len(words) > 1:
        script = Path(folder, "cxx").absolute()
        script.write_text(f'#!/bin/sh\nexec {shlex.join(words)} "$@"\n')
        script.chmod(0o755)
        compiler = str(script)
        os.environ["TORCH_NO_COMPILER_WRAPPER"] = "1"  # torch would put ccache before it
    os.environ["CXX"] = compiler
    if "CC" in os.environ:  # nothing is C, but torch reads its words too
        os.environ["CC"] = compiler


# ---- CUDA: the decision, nvcc, the architectures ----


def decide_cuda(
    requested: str | None, torch_cuda: str | None, nvcc: str | None
) -> tuple[bool, str]:
    """Whether to build the CUDA kernels, and the reason.

    Args:
        requested: the value of FASTSHAPE_CUDA, or None if it is not set.
        torch_cuda: the CUDA version of torch, such as "13.0", or None if torch has no CUDA.
        nvcc: the CUDA version of nvcc, or None if there is no nvcc.
    """
    if requested not in (None, "0", "1"):
        raise SystemExit(
            f"FASTSHAPE_CUDA={requested!r}: allowed are 1 (build the CUDA kernels or fail), 0 (do not) "
            "and unset (build them if torch has CUDA and there is an nvcc of the same major)"
        )
    if requested == "0":
        return False, "FASTSHAPE_CUDA=0"
    reason = ", ".join(
        (
            f"torch has CUDA {torch_cuda}" if torch_cuda else "torch has no CUDA",
            f"nvcc is of CUDA {nvcc}"
            if nvcc
            else "no nvcc in CUDA_HOME, on PATH or in /usr/local/cuda",
        )
    )
    possible = bool(torch_cuda and nvcc) and torch_cuda.split(".")[0] == nvcc.split(".")[0]
    if torch_cuda and nvcc and not possible:
        reason += ": the majors must be equal"
    if requested == "1" and not possible:
        raise SystemExit(f"FASTSHAPE_CUDA=1, but the CUDA kernels cannot be built: {reason}")
    return possible, reason


def find_nvcc() -> str | None:
    homes = [os.environ.get("CUDA_HOME"), "/usr/local/cuda"]
    candidates = [os.path.join(home, "bin", "nvcc") if home else None for home in homes]
    candidates.insert(1, shutil.which("nvcc"))
    return next((path for path in candidates if path and os.access(path, os.X_OK)), None)


def output_of(*command: str) -> str:
    process = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if process.returncode:
        raise SystemExit(f"{shlex.join(command)} failed:\n{process.stdout}")
    return process.stdout


def nvcc_version(nvcc: str) -> str:
    """The CUDA version of nvcc, such as "13.0"."""
    return re.search(r"release (\d+\.\d+)", output_of(nvcc, "--version"))[1]


def visible_architectures() -> str:
    """The architectures of the GPUs of this machine, as a list for TORCH_CUDA_ARCH_LIST."""
    import torch

    visible = {torch.cuda.get_device_capability(i) for i in range(torch.cuda.device_count())}
    if not visible:
        raise SystemExit(
            "TORCH_CUDA_ARCH_LIST=native: no GPU is visible; name architectures such as 8.0"
        )
    return ";".join(f"{major}.{minor}" for major, minor in sorted(visible)) + "+PTX"


def choose_architectures(requested: str | None, supported: list[str]) -> list[str]:
    """The architectures to build for. "8.0" means machine code for compute capability 8.0, "8.0+PTX" also PTX.

    Args:
        requested: the value of TORCH_CUDA_ARCH_LIST, or None.
        supported: the architectures that nvcc knows, such as "compute_80".
    """
    if requested:
        architectures = []
        for word in re.split(r"[\s;,]+", requested.strip(" ;,")):
            for name in NAMED_ARCHITECTURES.get(word, (word,)):
                if not re.fullmatch(r"\d+\.\d[af]?(\+PTX)?", name):
                    raise SystemExit(
                        f"TORCH_CUDA_ARCH_LIST={requested!r}: {name!r} is no compute capability such as 8.0 or 9.0+PTX; "
                        f"allowed are also native and the names {', '.join(NAMED_ARCHITECTURES)}"
                    )
                architectures.append(name)
        return list(dict.fromkeys(architectures))
    architectures = [
        a for a in DEFAULT_ARCHITECTURES if f"compute_{a.replace('.', '')}" in supported
    ]
    if not architectures:
        raise SystemExit(
            f"nvcc knows none of the default architectures {', '.join(DEFAULT_ARCHITECTURES)}, but "
            f"{', '.join(supported) or 'none at all'}; name one in TORCH_CUDA_ARCH_LIST, or leave the CUDA kernels out "
            "with FASTSHAPE_CUDA=0"
        )
    return [*architectures[:-1], f"{architectures[-1]}+PTX"]


def architecture_flags(architectures: list[str]) -> list[str]:
    flags = []
    for name in architectures:
        number = name.removesuffix("+PTX").replace(".", "")
        flags.append(f"-gencode=arch=compute_{number},code=sm_{number}")
        if name.endswith("+PTX"):
            flags.append(f"-gencode=arch=compute_{number},code=compute_{number}")
    return list(dict.fromkeys(flags))


def cuda_facts() -> dict:
    """The decision as it is stored for run time. It includes the path of nvcc if the kernels will be built."""
    import torch

    nvcc = find_nvcc()
    version = nvcc_version(nvcc) if nvcc else None
    build, reason = decide_cuda(os.environ.get("FASTSHAPE_CUDA"), torch.version.cuda, version)
    facts = {"built": build, "reason": reason}
    if build:
        supported = output_of(nvcc, "--list-gpu-arch").split()
        requested = os.environ.get("TORCH_CUDA_ARCH_LIST")
        if requested == "native":
            requested = visible_architectures()
        architectures = choose_architectures(requested, supported)
        facts |= {"version": version, "architectures": architectures, "nvcc": nvcc}
    return facts


# ---- the two libraries ----


def extension(name: str, sources: list[str], defines=(), **arguments):
    import pybind11
    import torch
    from torch.utils.cpp_extension import CppExtension

    major, minor = (int(part) for part in TORCH_ABI_TARGET.split("."))
    compile_args = [
        "-O3",
        "-g0",  # Python's flags include debugging information, which is a third of the compile time
        "-Wall",
        "-Wextra",
        "-fvisibility=hidden",
        # The bits of a result must not depend on the compiler: no -march=native, no -ffast-math, and no fused multiply-add.
        "-ffp-contract=off",
        f"-DTORCH_TARGET_VERSION=0x{major:02x}{minor:02x}000000000000",
        f'-DFASTSHAPE_TORCH_ABI_TARGET="{TORCH_ABI_TARGET}"',
        f'-DFASTSHAPE_BUILT_WITH_TORCH="{torch.__version__}"',
        *defines,
    ]
    folders = ("csrc", os.path.dirname(sources[-1]), "csrc/include")
    return CppExtension(
        name,
        sources,
        include_dirs=[
            *map(os.path.abspath, folders),
            pybind11.get_include(),
            *arguments.pop("include_dirs", ()),
        ],
        extra_compile_args={"cxx": compile_args},
        **arguments,
    )


def cpu_extension():
    return extension(
        "fastshape._C",
        [
            "csrc/module.cpp",
            "csrc/cpu/glue.cpp",
            "csrc/cpu/kernels.cpp",
            "csrc/cpu/plain.cpp",
            "csrc/cpu/avx2.cpp",
            "csrc/cpu/avx512.cpp",
            "csrc/cpu/batch_norm_plain.cpp",
            "csrc/cpu/batch_norm_avx2.cpp",
        ],
    )


def cuda_extension(cuda: dict):
    # Ask nvcc for the folders of its headers and libraries, because layouts differ between installers.
    plan = output_of(cuda["nvcc"], "--dryrun", "-x", "cu", os.devnull)
    folders = {
        name: re.findall(rf'"?-{flag}([^"\s]+)', " ".join(re.findall(rf"#\$ {name}=(.*)", plan)))
        for name, flag in (("INCLUDES", "I"), ("LIBRARIES", "L"))
    }
    major = cuda["version"].split(".")[0]
    return extension(
        "fastshape._C_cuda",
        ["csrc/cuda/module.cpp", "csrc/cuda/glue.cpp"],
        defines=[
            "-DUSE_CUDA",  # enables the CUDA part of torch's stable headers
            f'-DFASTSHAPE_CUDA_VERSION="{cuda["version"]}"',
            f'-DFASTSHAPE_CUDA_ARCHITECTURES="{" ".join(cuda["architectures"])}"',
        ],
        include_dirs=folders["INCLUDES"],
        library_dirs=[f for f in folders["LIBRARIES"] if not f.endswith("stubs")],
        libraries=["torch_cuda"],
        # Use the shared runtime that torch has loaded, so that both have one current device and one error state.
        extra_link_args=[f"-l:libcudart.so.{major}"],
    )


def compile_kernels(cuda: dict, folder: str) -> list[str]:
    """Compile the CUDA kernels with nvcc directly, one process per file, all at once.

    The kernels do not use torch, and torch's own way to call nvcc needs parts of CUDA that they do not need.

    Returns:
        Paths of the object files.
    """
    os.makedirs(folder, exist_ok=True)
    targets, compilers = [], []
    for source in sorted(glob.glob("csrc/cuda/*.cu")):
        targets.append(os.path.join(folder, os.path.basename(source) + ".o"))
        command = [
            cuda["nvcc"],
            "-std=c++17",
            "-O3",
            "-Icsrc/include",
            "-Xcompiler=-fPIC,-Wall,-Wextra,-fvisibility=hidden",
            f"--threads={min(len(cuda['architectures']), os.cpu_count() or 1)}",
            *architecture_flags(cuda["architectures"]),
            "-c",
            source,
            "-o",
            targets[-1],
        ]
        print(shlex.join(command), flush=True)
        compilers.append(subprocess.Popen(command))
    if any([compiler.wait() for compiler in compilers]):
        raise SystemExit("nvcc failed; FASTSHAPE_CUDA=0 builds fastshape without CUDA kernels")
    return targets


def write_sources_header(folder: str) -> None:
    """Write fastshape_sources.h, which tells the compiled files the digest of their sources.

    A file that is right is left alone, so that ninja does not compile what includes it again.
    """
    library = runpy.run_path("fastshape/backends/library.py")
    path = Path(folder, "fastshape_sources.h")
    text = f'#define FASTSHAPE_SOURCES "{library["source_digest"](Path())}"\n'
    if not path.is_file() or path.read_text() != text:
        path.write_text(text)


def extension_arguments() -> dict:
    if skips_extension():
        if os.environ.get("FASTSHAPE_CUDA") == "1":
            raise SystemExit("FASTSHAPE_SKIP_EXT=1 and FASTSHAPE_CUDA=1 exclude each other")
        return {}
    for package in ("torch", "pybind11"):
        require(package)
    import torch
    from torch.utils.cpp_extension import BuildExtension

    cuda = cuda_facts()
    print(f"fastshape: CUDA kernels: {'yes' if cuda['built'] else 'no'} ({cuda['reason']})")
    extensions = [cpu_extension()]
    if cuda["built"]:
        extensions.append(cuda_extension(cuda))

    class Build(BuildExtension):
        def run(self):
            self.force = True  # ninja knows what is up to date, headers and options included
            os.makedirs(self.build_temp, exist_ok=True)
            use_compiler(self.build_temp)
            if not cuda["built"]:
                self.remove_cuda_kernels()
            super().run()
            facts = {"torch": torch.__version__, "torch_abi_target": TORCH_ABI_TARGET, "cuda": cuda}
            folder = os.path.dirname(self.get_ext_fullpath("fastshape._C"))
            target = os.path.join(folder, "_build_facts.json")
            with open(target + ".part", "w") as file:
                json.dump(facts, file, indent=2)
            os.replace(target + ".part", target)

        def remove_cuda_kernels(self):
            """Remove those of an earlier build, because a wheel packs all that lies in the folder of the build."""
            name = "fastshape._C_cuda"
            Path(self.build_lib, self.get_ext_filename(name)).unlink(missing_ok=True)
            Path(self.get_ext_fullpath(name)).unlink(missing_ok=True)  # of an editable installation

        def build_extensions(self):
            write_sources_header(self.build_temp)
            for extension in extensions:
                extension.include_dirs.append(os.path.abspath(self.build_temp))
            if cuda["built"]:
                folder = os.path.join(self.build_temp, "csrc", "cuda")
                extensions[1].extra_objects = compile_kernels(cuda, folder)
            try:
                super().build_extensions()
            except BUILD_ERRORS as error:
                raise SystemExit(
                    f"the kernels were not built, see above ({error}). {SKIP}"
                ) from None

    return {"ext_modules": extensions, "cmdclass": {"build_ext": Build}}


if __name__ == "__main__":
    sys.stdout.reconfigure(line_buffering=True)
    require_setuptools(setuptools.__version__)
    setup(**extension_arguments())
