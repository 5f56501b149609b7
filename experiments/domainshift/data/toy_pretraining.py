"""Makes the initial weights of the toy's network, which are to it what ImageNet's are to PACS.

    cd experiments && python -m domainshift.data.toy_pretraining      (three minutes on one core)

The network learns to tell imaginary figures apart: a trunk with limbs and marks. A class is a plan
of such a figure, and its individuals differ in proportions. All are painted as photos. So the
network starts without any figure of the toy, and without any painting, cartoon or sketch.

The same seed gives the same weights on one machine. Another processor may round otherwise.
"""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional as F

from domainshift.data.drawing import SIDE, Figure, box, direction, ellipse, limb, paint
from domainshift.data.images import IMAGENET_MEAN, IMAGENET_STD
from domainshift.files import write_bytes
from domainshift.models import build_model

WEIGHTS = Path(__file__).with_name("toy_weights.pt")
MODEL = "resnet18-slim"

KINDS, EACH, EPOCHS, BATCH, LR = 64, 240, 8, 64, 0.1


def creature(kind: int, rng: np.random.Generator) -> Figure:
    """An individual of an imaginary kind. The kind decides the plan, `rng` the proportions."""
    plan = np.random.default_rng([7, kind]).uniform

    def vary(low: float, high: float, share: float = 0.1) -> float:
        return plan(low, high) + (high - low) * rng.uniform(-share, share)

    half, thick = vary(0.3, 0.8), vary(0.2, 0.6)
    trunk = [ellipse(0j, half, thick) if plan(0, 1) < 0.6 else box(0j, half, thick)]
    behind, marks = [], []
    for _ in range(int(plan(2, 7))):
        angle = vary(0, 360, 0.025)
        along = direction(angle)
        root = 0.8 * (half * along.real + 1j * thick * along.imag)
        tip = root + vary(0.3, 1.1) * direction(vary(angle - 40, angle + 40))
        bend = vary(-0.2, 0.2) + 1j * vary(-0.2, 0.2)
        shapes = [limb(root, tip, vary(0.1, 0.4), vary(0.05, 0.3), bend)]
        ending = plan(0, 1)
        if ending < 0.25:
            shapes.append(ellipse(tip, vary(0.1, 0.35), vary(0.1, 0.35), vary(0, 180)))
        elif ending < 0.4:
            shapes.append(box(tip, vary(0.1, 0.3), vary(0.1, 0.3)))
        if plan(0, 1) < 0.3:
            behind.append((int(plan(1, 4)), shapes))
        else:
            trunk += shapes
    for _ in range(int(plan(0, 4))):
        place = 0.6 * (vary(-half, half) + 1j * vary(-thick, thick))
        mark = ellipse(place, vary(0.04, 0.2), vary(0.04, 0.2), vary(0, 180))
        marks.append((int(plan(1, 4)), [mark]))
    return [*behind, (0, trunk), *marks]


def pictures(kinds: int, each: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Photos of imaginary kinds: uint8 (kinds * each, 3, SIDE, SIDE), and labels, int64."""
    images = np.empty((kinds, each, SIDE, SIDE, 3), np.uint8)
    for kind, number in np.ndindex(kinds, each):
        rng = np.random.default_rng([seed, kind, number])
        color = (rng.uniform(0, 1), rng.uniform(0.1, 0.8), rng.uniform(0.3, 0.9))
        images[kind, number] = paint("photo", creature(kind, rng), rng, color, tilt=8)
    flat = torch.from_numpy(images).flatten(0, 1).permute(0, 3, 1, 2).contiguous()
    return flat, torch.arange(kinds).repeat_interleave(each)


def normalized(images: torch.Tensor) -> torch.Tensor:
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (IMAGENET_MEAN, IMAGENET_STD))
    return (images.float() / 255 - mean) / std


def cropped(images: torch.Tensor) -> torch.Tensor:
    """Each image mirrored or not, and cut to 60 to 100 % of its area at a random place."""
    n = len(images)
    scale = (0.6 + 0.4 * torch.rand(n)).sqrt()
    maps = torch.zeros(n, 2, 3)
    maps[:, 0, 0] = scale * torch.where(torch.rand(n) < 0.5, -1.0, 1.0)
    maps[:, 1, 1] = scale
    maps[:, :, 2] = (2 * torch.rand(n, 2) - 1) * (1 - scale)[:, None]
    grid = F.affine_grid(maps, list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, padding_mode="reflection", align_corners=False)


def pretrain(
    kinds: int = KINDS, each: int = EACH, epochs: int = EPOCHS, seed: int = 0
) -> torch.nn.Module:
    """A network that tells `kinds` imaginary kinds apart; prints its accuracy on new pictures."""
    torch.manual_seed(seed)
    images, labels = pictures(kinds, each, seed)
    model, _ = build_model(MODEL, "none", kinds, seed)
    optimizer = torch.optim.SGD(
        model.parameters(), LR, momentum=0.9, nesterov=True, weight_decay=5e-4
    )
    steps = epochs * (len(images) // BATCH)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LR, total_steps=steps, pct_start=0.15)
    model.train()
    for _ in range(epochs):
        for batch in torch.randperm(len(images)).split(BATCH)[: len(images) // BATCH]:
            loss = F.cross_entropy(model(cropped(normalized(images[batch]))), labels[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    model.eval()
    with torch.no_grad():
        images, labels = pictures(kinds, 4, seed + 1)
        hits = torch.cat([model(normalized(b)).argmax(1) for b in images.split(256)]) == labels
    print(f"{kinds} imaginary kinds: {100 * hits.float().mean():.1f} % of new pictures right")
    return model


def main() -> None:
    torch.set_num_threads(1)
    state = {
        name: value.half() if value.is_floating_point() else value
        for name, value in pretrain().state_dict().items()
    }
    file = io.BytesIO()
    torch.save(state, file)
    write_bytes(WEIGHTS, file.getvalue())
    print(f"{WEIGHTS}: {len(file.getvalue()):,} bytes")


if __name__ == "__main__":
    main()
