"""Builds fastshape. The decisions made here: with the compiled kernels or without them, and with CUDA's among them or not.

FASTSHAPE_SKIP_EXT=1 installs the Python files alone; fastshape then runs on its PyTorch reference.
FASTSHAPE_CUDA unset builds the CUDA kernels where torch has CUDA and an nvcc of the same CUDA major is found; 1 fails where
that is not so; 0 leaves them out. No GPU is asked for. TORCH_CUDA_ARCH_LIST ("8.0;9.0+PTX") says for which GPUs.
What was decided, and why, is printed, and kept for `python -m fastshape` in fastshape/_build_facts.json.
"""

import glob
import json
import os
import re
import shlex
import shutil
import subprocess
import sys

from setuptools import setup

TORCH_ABI_TARGET = "2.10"
# Machine code for these, as far as nvcc knows them, and PTX of the last for what comes later. Code for 8.0 also runs on
# 8.6 and 8.9. A short list: each entry costs ten seconds of building.
DEFAULT_ARCHITECTURES = ("7.5", "8.0", "9.0")


def skips_extension() -> bool:
    value = os.environ.get("FASTSHAPE_SKIP_EXT", "0")
    if value not in ("0", "1"):
        raise SystemExit(
            f"FASTSHAPE_SKIP_EXT={value!r}: allowed are 0 (build the kernels) and 1 (do not)"
        )
    return value == "1"


# ---- CUDA: whether, with what, for what ----


def decide_cuda(
    requested: str | None, torch_cuda: str | None, nvcc: str | None
) -> tuple[bool, str]:
    """Whether to build the CUDA kernels, and why.

    Args:
        requested: FASTSHAPE_CUDA, None where it is not set.
        torch_cuda: the CUDA version of torch, such as "13.0", or None.
        nvcc: the CUDA version of nvcc, or None where there is no nvcc.
    """
    if requested not in (None, "0", "1"):
        raise SystemExit(
            f"FASTSHAPE_CUDA={requested!r}: allowed are 1 (build the CUDA kernels or fail), 0 (do not) "
            "and unset (build them where torch has CUDA and an nvcc of the same major is found)"
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
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode:
        raise SystemExit(f"{shlex.join(command)} failed:\n{done.stdout}")
    return done.stdout


def nvcc_version(nvcc: str) -> str:
    """ "13.0" """
    return re.search(r"release (\d+\.\d+)", output_of(nvcc, "--version"))[1]


def choose_architectures(requested: str | None, known: list[str]) -> list[str]:
    """ "8.0" is machine code for compute capability 8.0, "8.0+PTX" that and PTX.

    Args:
        requested: TORCH_CUDA_ARCH_LIST, or None.
        known: what nvcc knows, such as "compute_80".
    """
    if requested:
        chosen = [name for name in re.split(r"[\s;,]+", requested) if name]
        for name in chosen:
            if not re.fullmatch(r"\d+\.\d[af]?(\+PTX)?", name):
                raise SystemExit(
                    f"TORCH_CUDA_ARCH_LIST={requested!r}: {name!r} is not a compute capability such as "
                    "8.0 or 9.0+PTX"
                )
        return chosen
    chosen = [a for a in DEFAULT_ARCHITECTURES if f"compute_{a.replace('.', '')}" in known]
    return [*chosen[:-1], f"{chosen[-1]}+PTX"]


def architecture_flags(architectures: list[str]) -> list[str]:
    flags = []
    for name in architectures:
        number = name.removesuffix("+PTX").replace(".", "")
        flags.append(f"-gencode=arch=compute_{number},code=sm_{number}")
        if name.endswith("+PTX"):
            flags.append(f"-gencode=arch=compute_{number},code=compute_{number}")
    return flags


def cuda_facts() -> dict:
    """The decision as kept at run time; with ``nvcc`` where the kernels are to be built."""
    import torch

    nvcc = find_nvcc()
    version = nvcc_version(nvcc) if nvcc else None
    build, reason = decide_cuda(os.environ.get("FASTSHAPE_CUDA"), torch.version.cuda, version)
    facts = {"built": build, "reason": reason}
    if build:
        known = output_of(nvcc, "--list-gpu-arch").split()
        architectures = choose_architectures(os.environ.get("TORCH_CUDA_ARCH_LIST"), known)
        facts |= {"version": version, "architectures": architectures, "nvcc": nvcc}
    return facts


# ---- the two libraries ----


def extension(name: str, sources: list[str], defines=(), **arguments):
    try:
        import pybind11
    except ModuleNotFoundError:
        raise SystemExit(
            "pybind11 is missing: pip install pybind11, or FASTSHAPE_SKIP_EXT=1 to install without compiled kernels"
        ) from None
    import torch
    from torch.utils.cpp_extension import CppExtension

    major, minor = (int(part) for part in TORCH_ABI_TARGET.split("."))
    compile_args = [
        "-O3",
        "-g0",  # Python's own flags ask for debugging information: a third of the compile time
        "-Wall",
        "-Wextra",
        "-fvisibility=hidden",
        # Bits must not depend on what the compiler may assume about numbers: no -march=native, no -ffast-math, and no
        # product joined with a sum.
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
    # nvcc itself says where its headers and libraries are: layouts differ between installers.
    plan = output_of(cuda["nvcc"], "--dryrun", "-x", "cu", os.devnull)
    folders = {
        name: re.findall(rf'"?-{flag}([^"\s]+)', " ".join(re.findall(rf"#\$ {name}=(.*)", plan)))
        for name, flag in (("INCLUDES", "I"), ("LIBRARIES", "L"))
    }
    major = cuda["version"].split(".")[0]
    result = extension(
        "fastshape._C_cuda",
        ["csrc/cuda/module.cpp", "csrc/cuda/glue.cpp"],
        defines=[
            "-DUSE_CUDA",  # shows the CUDA part of torch's stable headers
            f'-DFASTSHAPE_CUDA_VERSION="{cuda["version"]}"',
            f'-DFASTSHAPE_CUDA_ARCHITECTURES="{" ".join(cuda["architectures"])}"',
        ],
        include_dirs=folders["INCLUDES"],
        library_dirs=[f for f in folders["LIBRARIES"] if not f.endswith("stubs")],
        libraries=["torch_cuda"],
        # The shared runtime, that torch has loaded already: one current device and one error state for both. A static one
        # would keep its own.
        extra_link_args=[f"-l:libcudart.so.{major}"],
    )
    result.depends = [
        *glob.glob("csrc/*.h"),
        *glob.glob("csrc/cuda/*"),
        *glob.glob("csrc/include/*/*"),
    ]
    return result


def compile_kernels(cuda: dict, folder: str) -> list[str]:
    """nvcc's own step: the kernels know no torch, and torch's way of calling nvcc asks for more of CUDA than they need.

    One nvcc a file, all at once. Returns the object files.
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


def extension_arguments() -> dict:
    if skips_extension():
        if os.environ.get("FASTSHAPE_CUDA") == "1":
            raise SystemExit("FASTSHAPE_SKIP_EXT=1 and FASTSHAPE_CUDA=1 exclude each other")
        return {}
    import torch
    from torch.utils.cpp_extension import BuildExtension

    cuda = cuda_facts()
    print(f"fastshape: CUDA kernels: {'yes' if cuda['built'] else 'no'} ({cuda['reason']})")
    extensions = [cpu_extension()]
    if cuda["built"]:
        extensions.append(cuda_extension(cuda))

    class Build(BuildExtension):
        def build_extensions(self):
            if cuda["built"]:
                folder = os.path.join(self.build_temp, "csrc", "cuda")
                extensions[1].extra_objects = compile_kernels(cuda, folder)
            super().build_extensions()

        def run(self):
            super().run()
            facts = {"torch": torch.__version__, "torch_abi_target": TORCH_ABI_TARGET, "cuda": cuda}
            folder = os.path.dirname(self.get_ext_fullpath("fastshape._C"))
            target = os.path.join(folder, "_build_facts.json")
            with open(target + ".part", "w") as file:
                json.dump(facts, file, indent=2)
            os.replace(target + ".part", target)

    return {"ext_modules": extensions, "cmdclass": {"build_ext": Build}}


if __name__ == "__main__":
    sys.stdout.reconfigure(line_buffering=True)
    setup(**extension_arguments())
