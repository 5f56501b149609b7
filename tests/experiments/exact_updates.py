"""Updates in float64 on a network without BatchNorm, in one process or in several of torchrun.

    torchrun --nproc-per-node 2 exact_updates.py FOLDER

In float64 a rounding error does not carry a value over the 0 at which it is binarized, so that a test
can ask for equality. The network has no BatchNorm, because CPUs have none that processes share.
"""

import sys
from pathlib import Path
from unittest import mock

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[2] / "experiments"))

import torch
from domainshift import distributed
from domainshift.config import Config, Test
from domainshift.methods import domain_head, method_named
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook

ARMS = {
    "baseline": {},
    "random": {"mode": "random", "layers": (1, 2)},
    "random-zero": {"mode": "random", "layers": (2,), "gradient": "zero"},
    "random-block": {"mode": "random", "layers": (1,), "mask_unit": "block", "block_size": 3},
    "da": {"mode": "da", "layers": (1, 2)},
    "da-domains": {"mode": "da", "layers": (1,), "mask_sources": ("photo", "cartoon")},
    "dropout2d": {"mode": "dropout2d", "layers": (1,)},
    "mixstyle": {"mode": "mixstyle", "layers": (1, 2), "mix_probability": 0.7},
    "dann": {"mode": "dann"},
}
ACCUMULATE = 2
BATCHES = (7, 5, 8, 3)  # passes of 4 + 3, 3 + 2, 4 + 4, 2 + 1 images


def net(norm=nn.Identity):
    torch.manual_seed(0)
    parts = [nn.Conv2d(3, 8, 3, padding=1), norm(8), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU()]
    return nn.Sequential(*parts, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 7)).double()


def head(features, seed):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        parts = nn.Linear(features, 16), nn.ReLU(), nn.Linear(16, 1)
        return nn.Sequential(*parts).double()


def images(n, seed, *domains):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, *domains, 3, 8, 8, generator=generator, dtype=torch.float64)


def mine(batch):
    """The part of a batch that this process takes, pass after pass."""
    return torch.cat([batch[part.images] for part in distributed.parts(len(batch), ACCUMULATE)])


def trained(arm, norm=nn.Identity, batches=BATCHES):
    """The method after an update on each batch, and what its updates gave."""
    values = {"batch_size": 8, "accumulate": ACCUMULATE, "lr": 0.1, "amp": "off", "device": "cpu"}
    values |= ARMS[arm]
    kind = method_named(values.get("mode", "baseline"))
    options = {n: values.pop(n) for n in kind.Options.names() if n in values}
    config = Config(**values, options=kind.Options(**options))
    with mock.patch.object(domain_head, "DomainHead", head):
        method = kind(net(norm), config, torch.device("cpu"))
    torch.manual_seed(1)
    losses, correct = [], []
    for number, n in enumerate(batches):
        method.progress = number / len(batches)
        target = None
        if kind.uses_target:
            domains = (2,) if arm == "da-domains" else ()
            target = mine(images(n, 100 + number, *domains))
        labels = torch.arange(n) % 7
        step = method.update(mine(images(n, number)), mine(labels), target, whole=n)
        losses.append(distributed.summed(step.loss_sum))
        correct.append(distributed.summed(step.correct))
        assert step.images == n
    return method, torch.stack(losses), torch.stack(correct)


def tested(method):
    """Logits of a batch of 5 images, whose parts every process predicts, shaped if there is shaping."""
    test = Test(domain="sketch", at_eval=method.at_eval_choices[-1])
    batch = images(5, 9)
    (part,) = distributed.parts(len(batch))
    logits = torch.zeros(len(batch), 7)
    with method.testing(test):
        torch.manual_seed(2)
        logits[part.images] = method.predict(batch[part.images], part.start).logits
    return distributed.summed(logits)


def averages(batch):
    """How often the processes average gradients in one update on a batch."""
    calls = []

    def counted(group, bucket):
        calls.append(bucket)
        return allreduce_hook(group, bucket)

    method, *_ = trained("baseline")
    method.training_pass.register_comm_hook(None, counted)
    method.update(mine(images(batch, 0)), mine(torch.arange(batch) % 7), whole=batch)
    return len(calls)


def results(arm):
    method, losses, correct = trained(arm)
    state = method.state_dict()
    return {
        "losses": losses,
        "correct": correct,
        "passes": torch.tensor(method.passes),
        "fired": torch.tensor(list(method.fired().values())),
        "random stream": torch.get_rng_state(),
        "logits": tested(method),
        **{
            f"{part}.{name}": t
            for part in ("model", "head")
            for name, t in state.get(part, {}).items()
        },
    }


if __name__ == "__main__":
    torch.set_num_threads(1)
    distributed.join()
    everything = {arm: results(arm) for arm in ARMS}
    method, *_ = trained("baseline", nn.BatchNorm2d)
    everything["with BatchNorm"] = {"statistics": method.statistics()}
    tensors = [torch.full((2,), 1.0 + distributed.rank()), torch.zeros(3, 2)]
    distributed.average(tensors)
    numbers = {"size": distributed.size(), "averages": averages(batch=8)}
    everything["functions"] = {n: torch.tensor(v) for n, v in numbers.items()}
    everything["functions"]["average"] = tensors[0]
    torch.save(everything, Path(sys.argv[1]) / f"{distributed.rank()}.pt")
    distributed.leave()
