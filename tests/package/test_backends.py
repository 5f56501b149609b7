"""The choice of backends and its reasons. Each case is a process of its own, because fastshape chooses at import."""

import importlib.util
import json
import os
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import fastshape

WITHOUT_KERNELS = "import sys; sys.modules['fastshape._C'] = None\n"
WITHOUT_CUDA_KERNELS = "import sys; sys.modules['fastshape._C_cuda'] = None\n"
WITHOUT_TRITON = "import sys; sys.modules['triton'] = None\n"
WITHOUT_GPU = "import torch; torch.cuda.is_available = torch.xpu.is_available = lambda: False\n"
WITH_GPU = "import torch; torch.cuda.is_available = lambda: True\n"
INFO = "import fastshape; info = fastshape.backend_info()\n"


def run(
    code: str, backend: str | None = None, cwd: Path | None = None, **variables: str
) -> subprocess.CompletedProcess:
    ours = ("FASTSHAPE_BACKEND", "TRITON_INTERPRET")
    environment = {k: v for k, v in os.environ.items() if k not in ours} | variables
    if backend is not None:
        environment["FASTSHAPE_BACKEND"] = backend
    return subprocess.run(
        [sys.executable, "-c", code],
        env=environment,
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=120,
    )


SAME_BITS = """
import torch, fastshape
y = fastshape.shape(torch.ones(1000), p_zero=0.5, rng_state=fastshape.rng_state(5))
print(fastshape.backend_info()["cpu"], int((y * torch.arange(1000)).sum()))
"""


def test_same_bits_from_either_backend(kernels):
    native, reference = (
        run(SAME_BITS, "native").stdout.split(),
        run(SAME_BITS, "reference").stdout.split(),
    )
    assert native[0] == "native" and reference[0] == "reference"
    assert native[1] == reference[1]


def test_auto_falls_back_with_a_reason():
    process = run(WITHOUT_KERNELS + SAME_BITS + "print(fastshape.backend_info()['reason'])", "auto")
    assert process.stdout.startswith("reference"), process.stderr
    assert "pip install" in process.stdout


def test_an_explicit_choice_that_is_not_available_raises_with_a_reason():
    process = run(WITHOUT_KERNELS + "import fastshape", "native")
    assert process.returncode != 0
    assert "FASTSHAPE_BACKEND=native" in process.stderr and "pip install" in process.stderr


def test_unknown_choice():
    process = run("import fastshape", "gpu")
    assert (
        "ValueError: FASTSHAPE_BACKEND='gpu': allowed are auto, native, triton, reference"
        in process.stderr
    )


@pytest.mark.parametrize("backend", (None, "reference"))
def test_module_prints_what_is_chosen_and_why(backend):
    process = run("import runpy; runpy.run_module('fastshape', run_name='__main__')", backend)
    assert process.returncode == 0, process.stderr
    rows = dict(line.split(None, 1) for line in process.stdout.splitlines())
    assert rows["FASTSHAPE_BACKEND"] == (backend or "auto")
    for row in ("on the CPU", "on CUDA", "elsewhere", "kernels:", "CUDA kernels:", "Triton:"):
        assert f"\n{row}" in process.stdout


def test_fastshape_needs_only_torch():
    code = """
import sys
import torch
before = {name.split(".")[0] for name in sys.modules}
import fastshape
after = {name.split(".")[0] for name in sys.modules}
print(sorted(after - before - set(sys.stdlib_module_names)))
"""
    assert run(code).stdout.strip() == "['fastshape']"


needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="Triton is not installed"
)
torch_has_cuda = pytest.mark.skipif(
    not (torch.version.cuda or torch.version.hip), reason="this torch has neither CUDA nor ROCm"
)


@pytest.mark.parametrize("backend", ("auto", "native", "reference"))
def test_every_device_has_a_backend_and_a_reason(backend):
    process = run(INFO + "import json; print(json.dumps(info))", backend)
    assert process.returncode == 0, process.stderr
    info = json.loads(process.stdout)
    assert info["requested"] == backend
    assert {"cpu", "cuda", "other_devices"} <= info["reasons"].keys()
    for device, reason in info["reasons"].items():
        assert info[device] in ("native", "triton", "reference")
        assert reason and "\n" not in reason
    assert info["reason"] == info["reasons"]["cpu"] and info["other_devices"] == "reference"


@torch_has_cuda
@needs_triton
def test_triton_serves_cuda_without_compiled_kernels():
    code = "print(info['cuda'], info['reasons']['cuda'], sep='|')"
    backend, reason = run(WITHOUT_CUDA_KERNELS + INFO + code, "auto").stdout.strip().split("|")
    assert backend == "triton" and "CUDA" in reason
    process = run(WITHOUT_CUDA_KERNELS + WITHOUT_TRITON + INFO + code, "auto")
    backend, both_reasons = process.stdout.strip().split("|")
    assert (
        backend == "reference" and "pip install triton" in both_reasons and reason in both_reasons
    )


def test_a_torch_without_cuda_is_the_reason():
    without = "import torch; torch.version.cuda = torch.version.hip = None\n"
    process = run(without + INFO + "print(info['cuda'], info['reasons']['cuda'])", "auto")
    assert process.stdout.startswith("reference this torch has neither CUDA nor ROCm"), (
        process.stderr
    )


@needs_triton
def test_triton_needs_a_gpu_or_the_interpreter():
    process = run(WITHOUT_GPU + "import fastshape", "triton")
    assert process.returncode != 0
    assert "RuntimeError: FASTSHAPE_BACKEND=triton: no GPU is visible" in process.stderr
    assert "TRITON_INTERPRET=1" in process.stderr


def test_triton_that_is_not_installed():
    process = run(WITHOUT_TRITON + WITH_GPU + "import fastshape", "triton")
    assert process.returncode != 0
    assert "FASTSHAPE_BACKEND=triton: Triton is not installed" in process.stderr
    assert "pip install triton" in process.stderr


@needs_triton
def test_interpreted_triton_serves_the_cpu_on_request():
    interpreted = run(SAME_BITS, "triton", TRITON_INTERPRET="1")
    assert interpreted.returncode == 0, interpreted.stderr
    assert interpreted.stdout.split() == ["triton", run(SAME_BITS, "reference").stdout.split()[1]]
    process = run(INFO + "print(info['cpu'])", "auto", TRITON_INTERPRET="1")
    assert process.stdout.strip() in ("native", "reference"), process.stderr


@needs_triton
def test_triton_is_imported_by_the_first_op_that_needs_it():
    code = """
import sys, torch, fastshape
fastshape.backend_info()
before = "triton" in sys.modules
fastshape.shape(torch.ones(8))
print(before, "triton" in sys.modules)
"""
    assert run(code, "triton", TRITON_INTERPRET="1").stdout.split() == ["False", "True"]
    assert run(code, "auto").stdout.split() == ["False", "False"]


@torch_has_cuda
@pytest.mark.skipif(not torch.version.cuda, reason="there are no native kernels for ROCm")
def test_native_needs_the_cuda_kernels_only_if_a_gpu_is_visible(kernels):
    process = run(WITHOUT_CUDA_KERNELS + WITH_GPU + "import fastshape", "native")
    assert process.returncode != 0
    assert "RuntimeError: FASTSHAPE_BACKEND=native: " in process.stderr and "CUDA" in process.stderr
    process = run(
        WITHOUT_CUDA_KERNELS + WITHOUT_GPU + INFO + "print(info['cpu'], info['cuda'])", "native"
    )
    assert process.stdout.split() == ["native", "reference"], process.stderr


# ---- files that are damaged, of another fastshape, or of other sources ----

PACKAGE = Path(fastshape.__file__).parent


def copy_package(folder: Path) -> Path:
    """A copy of the package in `folder`, without anything that is built."""
    ignored = shutil.ignore_patterns("*.so", "_build_facts.json", "__pycache__")
    return Path(shutil.copytree(PACKAGE, folder / "fastshape", ignore=ignored))


def damaged(kind: str, file: Path) -> bytes:
    """The content of a compiled file that does not load."""
    if kind == "of another module":
        return Path(importlib.util.find_spec("_json").origin).read_bytes()
    content = file.read_bytes()
    return {
        "empty": b"", "text": b"kernels\n", "half": content[: len(content) // 2], "all but a byte": content[:-1]
    }[kind]  # fmt: skip


@pytest.mark.parametrize("kind", ("empty", "text", "half", "all but a byte", "of another module"))
def test_a_damaged_library_is_a_reason(kind, kernels, tmp_path):
    file = Path(kernels.__file__)
    (copy_package(tmp_path) / file.name).write_bytes(damaged(kind, file))
    process = run(SAME_BITS + "print(fastshape.backend_info()['reason'])", "auto", tmp_path)
    assert process.stdout.startswith("reference"), process.stderr
    assert "the compiled kernels did not load: " in process.stdout
    process = run("import fastshape", "native", tmp_path)
    assert "RuntimeError: FASTSHAPE_BACKEND=native: the compiled kernels did not" in process.stderr


def test_a_library_without_the_functions_of_fastshape_is_a_reason():
    code = "import sys, types; sys.modules['fastshape._C'] = types.ModuleType('fastshape._C')\n"
    process = run(code + INFO + "print(info['cpu'], info['reason'])", "auto")
    assert process.stdout.startswith("reference the compiled kernels did not load"), process.stderr
    assert "it has no build_facts, register_ops" in process.stdout


@pytest.mark.parametrize(
    "content",
    (
        b"", b"{", b"\xff", b"[]", b"{}", b'{"cuda": 3}', b'{"cuda": {"built": true}}',
        b'{"cuda": {"built": false}}', b'{"cuda": {"built": true, "version": 13}}',
    ),
)  # fmt: skip
def test_damaged_build_facts_are_a_reason(content, tmp_path):
    (copy_package(tmp_path) / "_build_facts.json").write_bytes(content)
    code = "import torch; torch.version.cuda = '13.0'\n" + INFO
    process = run(code + "print(info['native_cuda']['error'])", "auto", tmp_path)
    assert process.stdout.startswith("_build_facts.json is damaged ("), process.stderr
    assert process.stdout.count("\n") == 1 and "pip install" in process.stdout


def test_a_source_tree_does_not_take_the_kernels_of_another_fastshape(kernels, tmp_path):
    """The other one is installed: as a wheel, or as editable, where a finder serves its submodules too."""
    tree, site = copy_package(tmp_path / "tree"), copy_package(tmp_path / "site")
    file = Path(shutil.copy(kernels.__file__, site))
    finder = f"""
import importlib.util, sys
class Finder:
    def find_spec(name, path=None, target=None):
        if name == "fastshape._C":
            return importlib.util.spec_from_file_location(name, {str(file)!r})
sys.meta_path.append(Finder)
"""
    code = INFO + "print(info['cpu'], fastshape.__file__, info['reason'], sep='|')"
    process = run(finder + code, "auto", tree.parent, PYTHONPATH=str(site.parent))
    backend, taken, reason = process.stdout.strip().split("|")
    assert (backend, taken) == ("reference", str(tree / "__init__.py"))
    assert str(tree) in reason and str(site) in reason and "pip install" in reason
    assert process.stderr.count("Warning") == 1
    assert f"UserWarning: fastshape runs on its slow reference: {reason}" in process.stderr
    process = run("import fastshape", "reference", tree.parent, PYTHONPATH=str(site.parent))
    assert process.stderr == ""  # as requested


def test_module_prints_where_it_is(tmp_path):
    package = copy_package(tmp_path)
    process = run(
        "import runpy; runpy.run_module('fastshape', run_name='__main__')", "reference", tmp_path
    )
    assert process.stdout.splitlines()[0].endswith(f"{fastshape.__version__} in {package}")


LOADED = """
import sys, types
module = types.ModuleType("fastshape._C")
module.register_ops = lambda: None
module.build_facts = lambda: {}
sys.modules["fastshape._C"] = module
"""


def test_kernels_of_other_sources_are_warned_of(tmp_path):
    library = copy_package(tmp_path) / "backends" / "library.py"
    (tmp_path / "setup.py").touch()
    source = tmp_path / "csrc" / "cpu" / "kernels.cpp"
    source.parent.mkdir(parents=True)
    source.write_text("int one = 1;")
    digest = runpy.run_path(str(library))["source_digest"](tmp_path)
    ours = LOADED.replace("{}", str({"sources": digest})) + INFO + "print(info['reason'])"

    process = run(ours, "auto", tmp_path)
    assert (process.stdout, process.stderr) == ("compiled kernels are loaded\n", "")
    for changed in (ours.replace(digest, "0" * 16), LOADED + INFO + "print(info['reason'])"):
        process = run(changed, "auto", tmp_path)
        assert process.stdout.strip().endswith("but are not those of the sources in csrc")
        assert process.stderr.count("Warning") == 1 and str(tmp_path) in process.stderr
        assert "kernels for cpu are not those of the sources in csrc" in process.stderr
    source.write_text("int one = 2;")
    assert "Warning" in run(ours, "auto", tmp_path).stderr
    (tmp_path / "setup.py").unlink()  # an installed wheel has no sources to compare with
    assert run(ours, "auto", tmp_path).stderr == ""


def test_the_digest_is_that_of_names_and_contents(tmp_path):
    digest = runpy.run_path(str(PACKAGE / "backends" / "library.py"))["source_digest"]
    seen = set()
    for name, content in (("a.cpp", "1"), ("b.cpp", "1"), ("b.cpp", "2"), ("b/c.h", "2")):
        root = tmp_path / str(len(seen))
        (root / "csrc" / name).parent.mkdir(parents=True)
        (root / "csrc" / name).write_text(content)
        assert digest(root) is None
        (root / "setup.py").touch()
        digest.cache_clear()
        before = digest(root)
        (root / "csrc" / "notes.txt").touch()
        digest.cache_clear()
        assert digest(root) == before and len(before) == 16
        seen.add(before)
    assert len(seen) == 4
