"""Types for users: the package is typed, right code passes mypy and pyright, and wrong code is found before it runs."""

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import get_args

import pytest

import fastshape
from fastshape import functional, layout, modules
from fastshape.layout import MemoryFormat
from fastshape.sites import KINDS, Kind

PACKAGE = Path(fastshape.__file__).parent
CHECKED = (
    "attach.py", "batch_norm.py", "bitmask.py", "functional.py", "fusion.py", "layout.py", "masks.py", "modules.py", "rng.py",
    "sites.py", "tracing.py", "unfinished.py",
)  # fmt: skip

# Both checkers report a `type: ignore` that hides no error, so that each of them is an error that they must find.
SCRIPT = """
from typing_extensions import assert_type

import torch
from torch import Tensor, nn

import fastshape
from fastshape import ActivationShaping, BitMask, ShapedBatchNorm2d
from fastshape.modules import AtEval, Gradient
from fastshape.rng import realised_rate
from fastshape.sites import choose_layers


class Net(nn.Module):
    def __init__(self, gradient: Gradient = "clipped", at_eval: AtEval = "off") -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3)
        self.shape = ActivationShaping(0.3, gradient=gradient, at_eval=at_eval)
        self.norm = ShapedBatchNorm2d(8, p_zero=0.3, gradient="zero", relu=True)
        self.shape.p_zero = None
        self.norm.at_eval = "on"
        self.norm.relu = False

    def forward(self, x: Tensor, mask: BitMask | None = None) -> Tensor:
        y: Tensor = self.norm(self.shape(self.conv(x), mask))
        return y


mask = BitMask.from_tensor(torch.randn(4, 3, 5, 5), threshold=0.5)
mask = BitMask.random((4, 3, 5, 5), 0.5, memory_format="channels_last").cuda("cuda:0", True).cpu()
assert_type((mask & ~mask | mask ^ mask)[1:3], BitMask)
assert_type(mask[0], BitMask)
assert_type(mask[[0, 2]][torch.tensor([True, False])], BitMask)
assert_type([m.density() for m in mask], list[float])
assert_type(len(mask), int)
assert_type(mask.to(torch.device("cpu"), non_blocking=True).to_bool(), Tensor)
assert_type(realised_rate(0.7), float)
assert_type(ShapedBatchNorm2d.from_batch_norm(nn.BatchNorm2d(3), p_zero=0.1), ShapedBatchNorm2d)
net = Net()
assert_type(choose_layers(net, [1, "conv", net.shape], after="conv"), tuple[str, ...])
choose_layers(net, range(1, 4))
choose_layers(net, {net.conv: 0.5})
fastshape.shape(torch.randn(3), p_zero=0.5, gradient="clipped")
with fastshape.attach(net, {1: 0.5}, method="replace", seed=3, unit="channel") as attachment:
    assert_type(attachment, fastshape.Attachment)
    assert_type(attachment.density(), dict[str, float])
    attachment.record(torch.randn(2, 3, 8, 8))
    attachment.masks["conv"] = mask
    attachment.masks[1] = torch.ones(1, 8, 1, 1, dtype=torch.bool)
    attachment.p_zero = [0.5]
    assert_type(attachment.fired, dict[str, int])
fastshape.attach(net, "all", mode="target", to_mask=fastshape.top_k(0.5, "sample"))
assert_type(fastshape.majority([mask, ~mask]), BitMask)
assert_type(fastshape.random_blocks((4, 3, 5, 5), 0.5, None), BitMask)
fastshape.detach(net)

fastshape.attach(net, 1, mode="noise")  # type: ignore[arg-type]
fastshape.attach(net, 1, method="fx")  # type: ignore[arg-type]
fastshape.attach(net, 1, p_zero="0.5")  # type: ignore[arg-type]
fastshape.attach(net, 1, gradient="exact")  # type: ignore[arg-type]
fastshape.shape(torch.randn(3), gradient="exact")  # type: ignore[arg-type]
fastshape.top_k(0.5, by="row")  # type: ignore[arg-type]
ActivationShaping(gradient="exact")  # type: ignore[arg-type]
ActivationShaping(at_eval="maybe")  # type: ignore[arg-type]
ActivationShaping("0.5")  # type: ignore[arg-type]
ShapedBatchNorm2d(8, gradient="exact")  # type: ignore[arg-type]
ShapedBatchNorm2d(8, at_eval=True)  # type: ignore[arg-type]
net.shape.gradient = "exact"  # type: ignore[assignment]
net.norm.at_eval = "maybe"  # type: ignore[assignment]
net.norm.p_zero = "0.5"  # type: ignore[assignment]
BitMask.random((3,), 0.5, memory_format="nchw")  # type: ignore[arg-type]
mask[0.5]  # type: ignore[index]
mask & True  # type: ignore[operator]
choose_layers(net, 1, after="pool")  # type: ignore[arg-type]
choose_layers(net, 1.5)  # type: ignore[arg-type]
"""


def test_the_package_says_that_it_is_typed():
    assert (PACKAGE / "py.typed").read_bytes() == b""


def test_the_types_allow_what_the_checks_allow():
    assert get_args(modules.Gradient) == functional.GRADIENTS
    assert get_args(modules.AtEval) == modules.AT_EVAL
    assert get_args(MemoryFormat) == tuple(layout.MEMORY_FORMATS)
    assert get_args(Kind) == tuple(KINDS)


@pytest.mark.slow
@pytest.mark.skipif(find_spec("mypy") is None, reason="mypy is not installed")
def test_mypy_on_a_users_script_and_on_the_package(tmp_path, request):
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    result = subprocess.run(
        [
            *(sys.executable, "-m", "mypy", "--config-file=", "--follow-imports=silent"),
            *("--warn-unused-ignores", "--check-untyped-defs", "--warn-redundant-casts"),
            f"--cache-dir={request.config.cache.mkdir('mypy')}",
            *(script, *(PACKAGE / name for name in CHECKED)),
        ],
        env={**os.environ, "MYPYPATH": str(PACKAGE.parent)},
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stdout + result.stderr


@pytest.mark.slow
@pytest.mark.skipif(find_spec("pyright") is None, reason="pyright is not installed")
def test_pyright_on_a_users_script(tmp_path):
    (tmp_path / "script.py").write_text(SCRIPT)
    config = {
        "include": ["script.py"],
        "extraPaths": [str(PACKAGE.parent)],
        "reportUnnecessaryTypeIgnoreComment": "error",
    }
    (tmp_path / "pyrightconfig.json").write_text(json.dumps(config))
    result = subprocess.run(
        [
            *(sys.executable, "-m", "pyright"),
            *("--pythonpath", sys.executable, "--project", tmp_path),
        ],
        env=os.environ | {"PYRIGHT_PYTHON_IGNORE_WARNINGS": "1"},
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stdout + result.stderr
