"""The build: its C++ compiler, the decision about CUDA, its reasons, and the code that nvcc generates. No GPU is needed."""

import json
import os
import re
import resource
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import cuda_report
import pytest
import torch

from fastshape.backends import cuda

ROOT = Path(__file__).parents[2]
SETUP = ROOT / "setup.py"


@pytest.fixture(scope="module")
def setup():
    """The functions of setup.py. Nothing is installed."""
    pytest.importorskip("setuptools")
    return runpy.run_path(str(SETUP))


# ---- the C++ compiler ----


@pytest.fixture
def build(tmp_path):
    """``build(**variables)`` builds the CPU kernels in a copy of the source tree."""
    pytest.importorskip("setuptools")
    pytest.importorskip("pybind11")
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path)
    for name in ("csrc", "fastshape"):
        ignored = shutil.ignore_patterns("*.so", "_build_facts.json", "__pycache__")
        shutil.copytree(ROOT / name, tmp_path / name, ignore=ignored)
    ours = ("CC", "CXX", "FASTSHAPE_BACKEND", "FASTSHAPE_SKIP_EXT")
    clean = {name: value for name, value in os.environ.items() if name not in ours}

    def build(**variables):
        return subprocess.run(
            [sys.executable, "setup.py", "-q", "build_ext", "--inplace"], cwd=tmp_path,
            env=clean | {"FASTSHAPE_CUDA": "0"} | variables, capture_output=True, text=True, timeout=600,
        )  # fmt: skip

    return build


@pytest.mark.parametrize(
    ("variables", "reason"),
    (
        ({"CXX": "no-such-compiler -m64"}, "no C++ compiler: CXX='no-such-compiler -m64' is not there"),
        ({"CXX": " "}, "no C++ compiler: CXX=' ' is not there"),
        ({"PATH": "/nowhere"}, "no C++ compiler: c++ is not on PATH"),
        ({"CXX": "false"}, "the kernels were not built, see above ("),
    ),
)  # fmt: skip
def test_a_build_without_a_compiler_names_the_ways_out(build, tmp_path, variables, reason):
    process = build(**variables)
    assert process.returncode == 1
    assert "Traceback" not in process.stdout + process.stderr
    assert process.stderr.splitlines()[-1].startswith(reason)
    assert "FASTSHAPE_SKIP_EXT=1" in process.stderr.splitlines()[-1]
    assert not list((tmp_path / "fastshape").glob("_*.so"))


@pytest.mark.parametrize("missing", ("torch", "pybind11"))
def test_a_missing_package_is_named(missing):
    code = f"""
import sys; sys.modules[{missing!r}] = None; sys.argv = ["setup.py", "--version"]
import importlib.util
find = importlib.util.find_spec
importlib.util.find_spec = lambda name, *more: None if name == {missing!r} else find(name, *more)
import runpy; runpy.run_path({str(SETUP)!r}, run_name="__main__")
"""
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert process.returncode == 1 and "Traceback" not in process.stderr
    assert f"{missing} is missing: pip install {missing}. FASTSHAPE_SKIP_EXT=1" in process.stderr


def test_an_old_setuptools_is_named_in_one_line(tmp_path):
    code = f"""
import sys, setuptools; setuptools.__version__ = "65.5.0"; sys.argv = ["setup.py", "--version"]
import runpy; runpy.run_path({str(SETUP)!r}, run_name="__main__")
"""
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert process.returncode == 1 and process.stdout == ""
    assert process.stderr == (
        'setuptools 65.5.0 is too old: 77 or newer is needed: pip install "setuptools>=77"\n'
    )


@pytest.mark.parametrize(
    ("version", "enough"),
    (("65.5.0", False), ("76.1", False), ("77", True), ("77.0.3", True), ("84.2.1.post1", True)),
)
def test_setuptools_is_as_new_as_pyproject_asks(setup, version, enough):
    oldest = ".".join(map(str, setup["OLDEST_SETUPTOOLS"]))
    assert f'"setuptools>={oldest}"' in (ROOT / "pyproject.toml").read_text()
    if enough:
        setup["require_setuptools"](version)
    else:
        with pytest.raises(SystemExit, match=f"setuptools {version} is too old: 77 or newer"):
            setup["require_setuptools"](version)


def test_a_compiler_of_one_word_stays(setup, monkeypatch, tmp_path):
    for name in ("CC", "CXX", "TORCH_NO_COMPILER_WRAPPER"):
        monkeypatch.setenv(name, "")  # restored after the test
        monkeypatch.delenv(name)
    compiler = tmp_path / "c++"
    compiler.touch(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    setup["use_compiler"](str(tmp_path))
    assert os.environ["CXX"] == "c++" and "CC" not in os.environ
    monkeypatch.setenv("CXX", str(compiler))
    setup["use_compiler"](str(tmp_path))
    assert os.environ["CXX"] == str(compiler)
    assert "TORCH_NO_COMPILER_WRAPPER" not in os.environ


@pytest.mark.slow
def test_a_compiler_of_two_words_builds_kernels_that_know_their_sources(build, tmp_path):
    log = tmp_path / "log"
    launcher = tmp_path / "launcher"
    launcher.write_text(f'#!/bin/sh\necho "$@" >> {log}\nexec "$@"\n')
    launcher.chmod(0o755)
    process = build(CXX=f"{launcher} c++ -DWORD='\"a b\"'", CC=f"{launcher} cc")
    assert process.returncode == 0, process.stderr[-3000:]
    commands = log.read_text().splitlines()
    assert sum(" -shared " in command for command in commands) == 1
    assert sum(" -c " in command for command in commands) == len(list(tmp_path.glob("csrc/cpu/*.cpp"))) + 1  # fmt: skip
    code = "import json, fastshape; print(json.dumps(fastshape.backend_info()))"
    process = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True
    )
    info = json.loads(process.stdout)
    assert process.stderr == "" and info["reasons"]["cpu"] == "compiled kernels are loaded"
    library = runpy.run_path(str(tmp_path / "fastshape" / "backends" / "library.py"))
    assert info["native"]["sources"] == library["source_digest"](tmp_path)


# ---- the decision ----


@pytest.mark.parametrize("torch_cuda", (None, "13.2", "12.8"))
@pytest.mark.parametrize("nvcc", (None, "13.0", "12.6"))
@pytest.mark.parametrize("requested", (None, "1", "0"))
def test_decision(setup, requested, torch_cuda, nvcc):
    possible = (torch_cuda, nvcc) in (("13.2", "13.0"), ("12.8", "12.6"))
    if requested == "1" and not possible:
        with pytest.raises(SystemExit) as error:
            setup["decide_cuda"](requested, torch_cuda, nvcc)
        reason = str(error.value)
        assert "FASTSHAPE_CUDA=1" in reason
    else:
        build, reason = setup["decide_cuda"](requested, torch_cuda, nvcc)
        assert build == (possible and requested != "0")
    if requested == "0":
        assert reason == "FASTSHAPE_CUDA=0"
    else:
        assert (f"torch has CUDA {torch_cuda}" if torch_cuda else "torch has no CUDA") in reason
        assert (f"nvcc is of CUDA {nvcc}" if nvcc else "no nvcc") in reason
        assert ("majors must be equal" in reason) == bool(torch_cuda and nvcc and not possible)


@pytest.mark.parametrize("requested", ("", "yes", "2", "true"))
def test_any_other_value_is_refused(setup, requested):
    with pytest.raises(SystemExit, match=f"FASTSHAPE_CUDA='{requested}': allowed are"):
        setup["decide_cuda"](requested, "13.0", "13.0")


def test_architectures(setup):
    choose, flags = setup["choose_architectures"], setup["architecture_flags"]
    supported = ["compute_75", "compute_80", "compute_90", "compute_100", "compute_120"]
    assert choose(None, supported) == ["7.5", "8.0", "9.0", "10.0", "12.0+PTX"]
    assert choose(None, supported[:3]) == ["7.5", "8.0", "9.0+PTX"]
    assert choose("8.0;9.0a+PTX", supported) == ["8.0", "9.0a+PTX"]
    assert choose("8.6 12.0", supported) == ["8.6", "12.0"]
    for wrong in ("Fermi", "Hoper", "8", "9.0+ptx", "Ampere+PTX", " ", ";", " ; ", "8.0;sm_90"):
        with pytest.raises(
            SystemExit, match=re.escape(f"TORCH_CUDA_ARCH_LIST={wrong!r}: ") + ".* no compute cap"
        ):
            choose(wrong, supported)
    assert choose("", supported) == choose(None, supported)
    for unknown in ([], ["compute_50", "compute_60"]):
        with pytest.raises(SystemExit, match="nvcc knows none of the default .* TORCH_CUDA_ARCH_L"):
            choose(None, unknown)
        assert choose("6.0", unknown) == ["6.0"]
    assert flags(["8.0", "9.0+PTX"]) == [
        "-gencode=arch=compute_80,code=sm_80",
        "-gencode=arch=compute_90,code=sm_90",
        "-gencode=arch=compute_90,code=compute_90",
    ]
    assert flags(["8.6", "8.6+PTX"]) == [
        "-gencode=arch=compute_86,code=sm_86",
        "-gencode=arch=compute_86,code=compute_86",
    ]


TORCH_NAMES = (
    "Maxwell", "Maxwell+Tegra", "Pascal", "Volta", "Volta+Tegra", "Turing", "Ampere", "Ampere+Tegra", "Ada", "Hopper",
)  # fmt: skip


@pytest.mark.parametrize(
    "requested", (*TORCH_NAMES, "Turing;Ampere", "7.5 Ampere Hopper", "8.0;9.0+PTX", "8.6 Ampere")
)
def test_architectures_are_those_of_torch(setup, monkeypatch, requested):
    cpp_extension = pytest.importorskip("torch.utils.cpp_extension")
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", requested)
    flags = setup["architecture_flags"](setup["choose_architectures"](requested, []))
    assert sorted(flags) == sorted(set(cpp_extension._get_cuda_arch_flags()))


def test_native_architectures_are_those_of_the_visible_gpus(setup, monkeypatch):
    capabilities = [(12, 0), (9, 0), (12, 0)]
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(capabilities))
    monkeypatch.setattr(torch.cuda, "get_device_capability", capabilities.__getitem__)
    assert setup["visible_architectures"]() == "9.0;12.0+PTX"
    capabilities.clear()
    with pytest.raises(SystemExit, match="TORCH_CUDA_ARCH_LIST=native: no GPU is visible"):
        setup["visible_architectures"]()


# ---- the decision with nvcc on PATH, elsewhere and nowhere ----


def fake_nvcc(home: Path, release: str) -> Path:
    """A script that answers the questions of setup.py as nvcc would."""
    path = home / "bin" / "nvcc"
    path.parent.mkdir(parents=True)
    path.write_text(f"""#!/bin/sh
case "$1" in
  --version) echo "Cuda compilation tools, release {release}, V{release}.1" ;;
  --list-gpu-arch) echo compute_80; echo compute_90 ;;
esac
""")
    path.chmod(0o755)
    return path


@pytest.fixture
def without_nvcc(monkeypatch, tmp_path):
    """An environment without nvcc and without settings for the build."""
    for name in ("CUDA_HOME", "FASTSHAPE_CUDA", "TORCH_CUDA_ARCH_LIST"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PATH", str(tmp_path / "empty"))
    may_run = os.access
    monkeypatch.setattr(
        os, "access", lambda path, mode: not str(path).startswith("/usr/local/cuda") and may_run(path, mode)
    )  # fmt: skip


def test_nvcc_is_looked_for_in_CUDA_HOME_then_on_PATH(setup, without_nvcc, monkeypatch, tmp_path):
    assert setup["find_nvcc"]() is None
    on_path = fake_nvcc(tmp_path / "path", "13.0")
    monkeypatch.setenv("PATH", f"{tmp_path / 'empty'}:{on_path.parent}")
    assert setup["find_nvcc"]() == str(on_path)
    at_home = fake_nvcc(tmp_path / "home", "12.9")
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "home"))
    assert setup["find_nvcc"]() == str(at_home)
    at_home.chmod(0o644)  # a file that cannot be executed
    assert setup["find_nvcc"]() == str(on_path)


@pytest.mark.parametrize("release", (None, "13.0", "12.9"))
def test_nvcc_on_path_decides(setup, without_nvcc, monkeypatch, tmp_path, release):
    monkeypatch.setattr(torch.version, "cuda", "13.2")
    if release:
        monkeypatch.setenv("PATH", str(fake_nvcc(tmp_path, release).parent))
    facts = setup["cuda_facts"]()
    assert facts["built"] is (release == "13.0")
    if release == "13.0":
        assert facts["reason"] == "torch has CUDA 13.2, nvcc is of CUDA 13.0"
        assert facts["nvcc"] == str(tmp_path / "bin" / "nvcc")
        assert facts["architectures"] == [
            "8.0",
            "9.0+PTX",
        ]  # the part of the default list that this nvcc knows
        monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "8.6")
        assert setup["cuda_facts"]()["architectures"] == ["8.6"]
        monkeypatch.setenv("FASTSHAPE_CUDA", "0")
        assert setup["cuda_facts"]() == {"built": False, "reason": "FASTSHAPE_CUDA=0"}
        return
    reason = "no nvcc in CUDA_HOME, on PATH" if release is None else "the majors must be equal"
    assert reason in facts["reason"]
    monkeypatch.setenv("FASTSHAPE_CUDA", "1")
    with pytest.raises(SystemExit, match=f"cannot be built: .*{reason}"):
        setup["cuda_facts"]()


@pytest.mark.slow
def test_the_default_architectures_compile_in_under_a_minute_and_a_half(
    setup, monkeypatch, tmp_path
):
    nvcc = setup["find_nvcc"]()
    if nvcc is None:
        pytest.skip("no nvcc in CUDA_HOME, on PATH or in /usr/local/cuda")
    monkeypatch.chdir(ROOT)
    # Each takes about as long. Two of them stand for all.
    cuda_of = {"nvcc": nvcc, "architectures": ["8.0", "9.0+PTX"]}
    share = 2 / len(setup["DEFAULT_ARCHITECTURES"])
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    built = [Path(path) for path in setup["compile_kernels"](cuda_of, str(tmp_path))]
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert built and all(path.stat().st_size > 100_000 for path in built)
    # Processor time does not depend on the load of the machine. The files are compiled in parallel on two cores.
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 2 * 90 * share


# ---- messages when the kernels are not available ----


def test_mismatch_names_both_versions_and_the_remedy():
    built = {"built": True, "reason": "", "version": "13.0"}
    assert cuda.mismatch("13.2", built) is None
    problem = cuda.mismatch("12.8", built)
    assert "built for CUDA 13.0" in problem and "this torch has CUDA 12.8" in problem
    assert "pip install" in problem
    left_out = {"built": False, "reason": "torch has CUDA 13.2, no nvcc in CUDA_HOME"}
    assert "no nvcc in CUDA_HOME" in cuda.mismatch("13.2", left_out)
    assert "not built" in cuda.mismatch("13.2", {})
    assert cuda.mismatch(None, built) == "this torch has no CUDA"


def test_the_error_of_a_file_that_does_not_load_is_kept():
    code = """
import sys; sys.modules["fastshape._C_cuda"] = None
import torch, fastshape
from fastshape.backends import cuda
torch.version.cuda = "13.0"
cuda._build_facts = lambda: {"built": True, "version": "13.0"}
cuda._load.cache_clear()
print(cuda.error())
print(cuda.facts())
"""
    process = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120
    )
    assert "did not load" in process.stdout and "pip install" in process.stdout, process.stderr


# ---- the code that nvcc generates ----


@pytest.fixture(scope="module")
def kernels():
    if cuda.error() is not None:
        pytest.skip(cuda.error())
    cuobjdump = cuda_report.tool("cuobjdump")
    if cuobjdump is None:
        pytest.skip("no cuobjdump next to nvcc, on PATH or in Triton")
    return cuda_report.report(cuda_report.library(), cuobjdump)


def test_all_kernels_exist(kernels):
    for arch in {kernel.arch for kernel in kernels}:
        names = [kernel.name for kernel in kernels if kernel.arch == arch]
        # shape: 4 dtypes x binarize x within_one x 3 mask sources; ones: 4 x within_one x 3, and one for bytes; pack_random: 3;
        # unpack: 2; pack_top: 4 dtypes.
        shaping = 48 + 25 + 3 + 2 + 4
        # count: 3; look_up: 2 widths x 3 patterns, and 64 bits; sums: 4 dtypes x (2 groups of lanes, and rows); grad_input:
        # (3 dtypes x 3 patterns, and float64) x 3 mask sources; normalize and differentiate: 4 dtypes each.
        batch_norm = 3 + 7 + 12 + 30 + 8
        assert len(names) == len(set(names)) == shaping + batch_norm


def test_no_local_memory_and_no_spills(kernels):
    for kernel in kernels:
        assert (kernel.stack, kernel.local, kernel.local_accesses) == (0, 0, 0), kernel


# The least number of 16-byte loads and stores of maps. Bits and counts are read and written in other widths.
MAPS = {"shape": (4, 4), "ones": (4, 0), "look_up": (0, 4), "sum_": (4, 0), "grad_input": (2, 2)}


def test_maps_are_read_and_written_16_bytes_at_a_time(kernels):
    for kernel in kernels:
        for name, (loads, stores) in MAPS.items():
            if kernel.name.startswith(name) and "Byte" not in kernel.name:
                assert kernel.loads_16 >= loads and kernel.stores_16 >= stores, kernel


def test_tables_are_read_16_bytes_at_a_time(kernels):
    for kernel in kernels:
        assert (kernel.table_loads_16 > 0) == kernel.name.endswith(" rows>"), kernel


# These have one thread per channel and one warp per block. They need no room for others.
PER_CHANNEL = ("normalize", "differentiate")


def test_registers_leave_room_for_a_thousand_threads(kernels):
    for kernel in kernels:
        most = 128 if kernel.name.startswith(PER_CHANNEL) else 64
        assert kernel.registers <= most, kernel
