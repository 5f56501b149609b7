"""Builds fastshape. The one decision made here: with the compiled kernels, or without them.

FASTSHAPE_SKIP_EXT=1 installs the Python files alone; fastshape then runs on its PyTorch reference.
"""

import os

from setuptools import setup

TORCH_ABI_TARGET = "2.10"


def skips_extension() -> bool:
    value = os.environ.get("FASTSHAPE_SKIP_EXT", "0")
    if value not in ("0", "1"):
        raise SystemExit(
            f"FASTSHAPE_SKIP_EXT={value!r}: allowed are 0 (build the kernels) and 1 (do not)"
        )
    return value == "1"


def cpu_extension():
    import pybind11
    import torch
    from torch.utils.cpp_extension import CppExtension

    major, minor = (int(part) for part in TORCH_ABI_TARGET.split("."))
    compile_args = [
        "-O3",
        "-Wall",
        "-Wextra",
        "-fvisibility=hidden",
        # Bits must not depend on what the compiler may assume about numbers: no -march=native, no -ffast-math.
        f"-DTORCH_TARGET_VERSION=0x{major:02x}{minor:02x}000000000000",
        f'-DFASTSHAPE_TORCH_ABI_TARGET="{TORCH_ABI_TARGET}"',
        f'-DFASTSHAPE_BUILT_WITH_TORCH="{torch.__version__}"',
    ]
    return CppExtension(
        "fastshape._C",
        [
            "csrc/module.cpp",
            "csrc/cpu/glue.cpp",
            "csrc/cpu/kernels.cpp",
            "csrc/cpu/plain.cpp",
            "csrc/cpu/avx2.cpp",
        ],
        include_dirs=[
            *(os.path.abspath(folder) for folder in ("csrc", "csrc/cpu", "csrc/include")),
            pybind11.get_include(),
        ],
        extra_compile_args={"cxx": compile_args},
    )


def extension_arguments() -> dict:
    if skips_extension():
        return {}
    from torch.utils.cpp_extension import BuildExtension

    return {"ext_modules": [cpu_extension()], "cmdclass": {"build_ext": BuildExtension}}


setup(**extension_arguments())
