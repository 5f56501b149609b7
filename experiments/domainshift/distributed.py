"""One run on several processes, as torchrun starts them.

    torchrun --nproc-per-node 2 experiments/run.py --target sketch --mode da --layers 4

Every process holds the whole model and takes a part of each batch. DistributedDataParallel sums the
gradients. On GPUs, SyncBatchNorm normalizes by the whole batch. All processes draw the same random
states, and a random map depends on the place of its image in the batch. So the numbers are those of
one process with the same batch, except for rounding. torch has no SyncBatchNorm for CPUs; `caveats`
says so. With one process, nothing here communicates.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING, NamedTuple

from domainshift.errors import ConfigError, Failure

if TYPE_CHECKING:  # --help asks for the rank, and needs no torch, which takes seconds to import
    import torch
    from torch import Tensor, nn

PATIENCE = 60.0  # seconds in which torchrun ends all processes after one has failed


class Lost(Failure):
    """Another process is gone."""


# --- the processes ----------------------------------------------------------------------------


def launched() -> bool:
    """Whether torchrun started this process, as one of several."""
    # torchelastic's own variable too: a cluster may leave a WORLD_SIZE of something else behind
    return "TORCHELASTIC_RUN_ID" in os.environ and int(os.environ.get("WORLD_SIZE", 1)) > 1


def join() -> None:
    """Become one of the processes that torchrun started, if it started several.

    gloo carries CPU tensors, NCCL those on GPUs.
    """
    if not launched():
        return
    import torch

    if torch.distributed.is_available():
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
        torch.distributed.init_process_group(backend)


def leave() -> None:
    if size() > 1:
        import torch

        torch.distributed.destroy_process_group()


def size() -> int:
    """The number of processes that share this run."""
    dist = sys.modules.get("torch.distributed")  # where nothing imported it, there is no group
    joined = dist is not None and dist.is_available() and dist.is_initialized()
    return dist.get_world_size() if joined else 1


def rank() -> int:
    """The number of this process, from 0. Only process 0 writes files and prints."""
    if size() == 1:
        return 0
    import torch

    return torch.distributed.get_rank()


def first_here() -> bool:
    """Whether this is the first process of its machine."""
    return size() == 1 or int(os.environ.get("LOCAL_RANK", 0)) == 0


def take_device(device: str) -> None:
    """Make `cuda` mean a GPU that no other process uses. Raises ConfigError where there is none."""
    if size() == 1 or not device.startswith("cuda"):
        return
    import torch

    if device != "cuda":
        raise ConfigError(
            f"device: {device!r} with {size()} processes, each of which needs its own GPU; allowed: "
            "auto | cpu | cuda"
        )
    local, gpus = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
    if local >= gpus:
        raise ConfigError(
            f"device: 'cuda' for process number {local} on a machine of {gpus} GPUs; start at most "
            f"{gpus} there (--nproc-per-node), or use cpu"
        )
    torch.cuda.set_device(local)


def caveats(device: str) -> list[str]:
    """What the record of a run on these processes must say."""
    if size() == 1 or device.startswith("cuda"):
        return []
    return [
        f"{size()} processes on CPUs: each normalizes with the BatchNorm statistics of its own part "
        "of a batch, so the figures are not those of one process"
    ]


@contextmanager
def together() -> Iterator[None]:
    """An error inside stops all processes, and the first one that has it reports it.

    That process raises its error. The others wait until torchrun ends them: torchrun ends all
    processes as soon as one exits, which would cut off a message that is still being printed.
    """
    error = None
    try:
        yield
    except (Exception, SystemExit) as caught:
        if isinstance(caught, SystemExit) and not caught.code:  # --help, in every process
            raise
        error = caught
    if size() > 1:
        import torch

        failed = torch.zeros(size(), dtype=torch.int64)
        failed[rank()] = error is not None
        failed = summed(failed)
        if failed.any() and rank() != int(failed.argmax()):
            time.sleep(PATIENCE)
            raise SystemExit(1)
    if error is not None:
        raise error


# --- parts of a batch -------------------------------------------------------------------------


class Part(NamedTuple):
    """The images of one pass over a batch that this process takes."""

    images: slice  # their places in the batch
    start: int  # place of the first one in the pass
    whole: int  # images in the pass, in all processes
    counts: bool  # false where another process has the same images and counts them

    @property
    def count(self) -> int:
        return self.images.stop - self.images.start


def parts(images: int, passes: int = 1) -> list[Part]:
    """This process's part of each pass over a batch of `images` that at most `passes` passes share.

    In a pass the parts of the processes follow one another and differ by at most one image. Where
    there are fewer images than processes, each process takes all of them, and process 0 counts them.
    """
    most = -(-images // passes)
    result = []
    for first in range(0, images, most):
        whole = min(most, images - first)
        enough = whole >= size()
        start, stop = (whole * (rank() + k) // size() if enough else whole * k for k in (0, 1))
        counts = enough or rank() == 0
        result.append(Part(slice(first + start, first + stop), start, whole, counts))
    return result


# --- sums over the processes ------------------------------------------------------------------


def summed(t: Tensor) -> Tensor:
    """The sum of t over the processes, with the same bits in each; t itself with one process.

    Raises Lost where another process is gone.
    """
    if size() == 1 or t.numel() == 0:
        return t
    import torch

    t = t.clone()
    try:
        torch.distributed.all_reduce(t)
    except RuntimeError as error:
        reason = str(error).split(". ")[0]
        raise Lost(
            f"lost one of {size()} processes, whose own message may say why ({reason})"
        ) from error
    return t


def average(tensors: Sequence[Tensor]) -> None:
    """Replace each tensor by its mean over the processes, in one collective."""
    if size() == 1 or not tensors:
        return
    import torch

    means = summed(torch.cat([t.flatten() for t in tensors])) / size()
    for t, mean in zip(tensors, means.split([t.numel() for t in tensors]), strict=True):
        t.copy_(mean.view_as(t))


Loss = Callable[..., tuple["Tensor", "Tensor"]]


def parallel(loss: Loss, trained: Iterable[nn.Module], *, some_unused: bool) -> Loss:
    """`loss`, whose backward pass also averages the gradients over the processes.

    Args:
        loss: takes this process's part of a batch; returns a loss and logits.
        trained: modules that hold all trained parameters. All processes begin with those of process 0.
        some_unused: whether the loss gives some parameters no gradient.
    """
    if size() == 1:
        return loss
    from torch.nn.parallel import DistributedDataParallel

    from domainshift.training_pass import TrainingPass

    return DistributedDataParallel(TrainingPass(loss, trained), find_unused_parameters=some_unused)


def unaveraged(loss: Loss) -> AbstractContextManager[None]:
    """Within it backward adds to this process's gradients. The next backward outside averages the sum."""
    from torch.nn.parallel import DistributedDataParallel

    return loss.no_sync() if isinstance(loss, DistributedDataParallel) else nullcontext()


# --- BatchNorm --------------------------------------------------------------------------------


def shares_batch_norm(device: torch.device) -> bool:
    """Whether the BatchNorms of all processes normalize by the whole batch."""
    return size() > 1 and device.type == "cuda"


def share_batch_norm(model: nn.Module, device: torch.device) -> dict[str, nn.Module]:
    """Put a SyncBatchNorm, with the same tensors, in the place of each BatchNorm, on GPUs.

    Returns the replaced modules by name, for `restore`. Hooks on them stay with them.
    """
    if not shares_batch_norm(device):
        return {}
    from torch import nn

    kind = nn.modules.batchnorm._BatchNorm
    replaced = {name: module for name, module in model.named_modules() if isinstance(module, kind)}
    nn.SyncBatchNorm.convert_sync_batchnorm(model)
    return replaced


def restore(model: nn.Module, modules: Mapping[str, nn.Module]) -> None:
    """Undo `share_batch_norm`."""
    for name, module in modules.items():
        model.set_submodule(name, module)
        module.train(model.training)
