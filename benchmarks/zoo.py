"""Attaches to the models of torchvision and timm, and compares replacement with hooks.

    python benchmarks/zoo.py [--packages torchvision timm] [--models PATTERN ...] [--save FILE.csv]

Each model has every convolution shaped with random maps, and takes one training step in float64, once with hooks and once with
method="replace", from the same state. A line a model says how many layers one op served together with their BatchNorm, how many
hooks served, and the largest difference of outputs and gradients, relative to the largest value. A package that is not
installed is skipped with a line. The exit status is 1 where a model differs or raises.
"""

from __future__ import annotations

import argparse
import copy
import csv
import fnmatch
import sys
import time
from collections.abc import Iterator

import torch
from torch import Tensor, nn

import fastshape

TOLERANCE = 1e-6
COLUMNS = ("package", "model", "layers", "fused", "hooks", "difference", "attach ms", "refused")
# Small enough for a CPU, and of every kind that has convolutions.
TORCHVISION = (
    "alexnet", "convnext_tiny", "densenet121", "efficientnet_b0", "efficientnet_v2_s", "googlenet", "inception_v3",
    "mnasnet1_0", "mobilenet_v2", "mobilenet_v3_small", "regnet_y_400mf", "resnet18", "resnet50", "resnext50_32x4d",
    "shufflenet_v2_x1_0", "squeezenet1_1", "swin_t", "vgg11_bn", "vit_b_16", "wide_resnet50_2",
    "deeplabv3_mobilenet_v3_large", "fasterrcnn_mobilenet_v3_large_320_fpn", "fcn_resnet50", "lraspp_mobilenet_v3_large", "r3d_18",
)  # fmt: skip
TIMM = (
    "resnet18", "resnet50d", "resnest14d", "seresnet18", "skresnet18", "res2net50_26w_4s", "densenet121", "dla34", "dpn48b",
    "efficientnet_b0", "efficientnetv2_rw_t", "mobilenetv3_small_100", "mobilenetv4_conv_small", "mixnet_s", "regnety_002",
    "regnetx_002", "ghostnet_100", "hardcorenas_a", "hrnet_w18_small", "inception_v3", "legacy_xception", "repvgg_a0",
    "rexnet_100", "selecsls42b", "tf_efficientnet_lite0", "vgg11_bn", "vovnet39a", "ese_vovnet19b_dw", "convnext_atto",
    "cspresnet50", "cspdarknet53", "darknet53", "eca_resnet33ts", "gernet_s", "lcnet_050", "nf_regnet_b0", "mobileone_s0",
    "fastvit_t8", "levit_128s", "edgenext_xx_small", "mobilevit_xxs", "coatnet_pico_rw_224", "efficientformer_l1",
    "poolformer_s12", "vit_tiny_patch16_224", "visformer_tiny",
)  # fmt: skip


def models(packages: list[str], patterns: list[str]) -> Iterator[tuple[str, str, nn.Module | str]]:
    """Package, name and model, or why there is none."""
    for package in packages:
        try:
            if package == "torchvision":
                from torchvision.models import get_model

                names, build = (
                    TORCHVISION,
                    lambda name: get_model(name, weights=None, weights_backbone=None),
                )
            else:
                import timm

                names, build = TIMM, lambda name: timm.create_model(name, num_classes=10)
        except ImportError as error:
            print(f"{package} is skipped: {error}")
            continue
        for name in names:
            if any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns):
                try:
                    yield package, name, _built(build, name)
                except Exception as error:
                    yield package, name, _line(error)


def _built(build, name: str) -> nn.Module:
    torch.manual_seed(0)
    try:
        model = build(name)
    except TypeError:  # it has no weights_backbone
        from torchvision.models import get_model

        model = get_model(name, weights=None)
    for module in model.modules():
        if isinstance(module, (nn.Dropout, nn.Dropout2d)) or type(module).__name__ == "DropPath":
            for rate in ("p", "drop_prob"):
                if hasattr(module, rate):
                    setattr(module, rate, 0.0)
        if type(module).__name__ == "StochasticDepth":
            module.p = 0.0
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.affine:
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.uniform_(module.bias, -0.5, 0.5)
    return model.double().train()


def _line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0][:100]


def tensors(output) -> list[Tensor]:
    if isinstance(output, Tensor):
        return [output]
    values = output.values() if isinstance(output, dict) else output
    return [t for value in values if value is not None for t in tensors(value)]


def inputs_of(name: str) -> tuple:
    """Arguments of a forward in training."""
    shapes = {"r3d_18": (2, 3, 4, 32, 32), "inception_v3": (2, 3, 299, 299)}
    large = any(part in name for part in ("224", "vit", "swin", "former", "coatnet"))
    size = 224 if large else 64
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(shapes.get(name, (2, 3, size, size)), generator=generator).double()
    if not name.startswith("fasterrcnn"):
        return (x,)
    box = torch.tensor([[4.0, 4.0, 40.0, 40.0]], dtype=torch.double)
    return list(x), [{"boxes": box, "labels": torch.tensor([1])} for _ in x]


def step(model: nn.Module, method: str, inputs: tuple):
    """One step on a copy: outputs and gradients, the attachment, and seconds to attach."""
    model = copy.deepcopy(model)
    start = time.perf_counter()
    attachment = fastshape.attach(model, "all", p_zero=0.3, method=method, seed=1)
    seconds = time.perf_counter() - start
    torch.manual_seed(0)
    outputs = tensors(model(*inputs))
    sum((y * torch.arange(1.0, y.numel() + 1).sin().view_as(y)).sum() for y in outputs).backward()
    gradients = [p.grad for p in model.parameters()]
    return [*(y.detach() for y in outputs), *gradients], attachment, seconds


def difference(ours: list[Tensor | None], theirs: list[Tensor | None]) -> float:
    """The largest, relative to the largest value; inf where only one has a gradient."""
    largest = max((t.abs().max().item() for t in theirs if t is not None and t.numel()), default=0)
    worst = 0.0
    for a, b in zip(ours, theirs, strict=True):
        if (a is None) != (b is None):
            return float("inf")
        if a is not None and a.numel():
            worst = max(worst, (a - b).abs().max().item())
    return worst / largest if largest else worst


def row_of(package: str, name: str, model: nn.Module | str) -> dict:
    row = dict.fromkeys(COLUMNS, "") | {"package": package, "model": name}
    if isinstance(model, str):
        return row | {"refused": model}
    try:
        theirs, _, _ = step(model, "hooks", inputs_of(name))
        ours, attachment, seconds = step(model, "auto", inputs_of(name))
    except Exception as error:
        return row | {"refused": _line(error)}
    fused = sum(method == "replace" for method in attachment.method_of.values())
    return row | {
        "layers": len(attachment.names),
        "fused": fused,
        "hooks": len(attachment.names) - fused,
        "difference": f"{difference(ours, theirs):.1e}",
        "attach ms": f"{1e3 * seconds:.1f}",
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--packages", nargs="+", default=["torchvision", "timm"], choices=["torchvision", "timm"]
    )
    parser.add_argument("--models", nargs="+", default=["*"], help="shell patterns for names")
    parser.add_argument("--save", help="file for the rows as CSV")
    flags = parser.parse_args()
    rows = []
    print(f"{'model':44}{'layers':>8}{'fused':>8}{'hooks':>8}{'difference':>12}")
    for package, name, model in models(flags.packages, flags.models):
        row = row_of(package, name, model)
        rows.append(row)
        figures = "".join(
            f"{row[c]:>{w}}"
            for c, w in (("layers", 8), ("fused", 8), ("hooks", 8), ("difference", 12))
        )
        print(f"{package + ' ' + name:44}{row['refused'] or figures}", flush=True)
    if flags.save:
        with open(flags.save, "w", newline="") as file:
            writer = csv.DictWriter(file, COLUMNS)
            writer.writeheader()
            writer.writerows(rows)
    compared = [row for row in rows if row["difference"]]
    whole = sum(row["fused"] > 0 for row in compared)
    print(f"{len(compared)} of {len(rows)} models compared; replacement served layers of {whole}")
    return any(float(row["difference"]) > TOLERANCE for row in compared)


if __name__ == "__main__":
    sys.exit(main())
