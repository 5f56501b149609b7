"""One run in several processes, as torchrun starts them: who takes which images, and what is added up.

    torchrun --nproc-per-node 2 experiments/run.py --target sketch --mode da --layers 4

Every process has the whole model and a part of each batch. Gradients and BatchNorm's sums are added over the processes,
random states are drawn alike in all, and a map is that of its images' place in the batch. So the numbers are those of
one process with the same batch, but for rounding. Where there is one process, nothing here communicates.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
import torch.distributed as dist
from config import ConfigError
from torch import Tensor, nn
from torch.nn import functional as F

LAST_WORDS = 60.0  # seconds: by then torchrun has ended the others of a process that stopped


class Lost(RuntimeError):
    """Another process is gone."""


# --- the processes ----------------------------------------------------------------------------


def join() -> None:
    """Become one of the processes that torchrun started, if it started several.

    CPU tensors are added through gloo, those on GPUs through NCCL.
    """
    # its own variable too: a WORLD_SIZE that a cluster left in the environment is not of this run
    if (
        dist.is_available()
        and dist.is_torchelastic_launched()
        and int(os.environ["WORLD_SIZE"]) > 1
    ):
        dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")


def leave() -> None:
    if size() > 1:
        dist.destroy_process_group()


def size() -> int:
    """How many processes take part in this run."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """This process's number. Process 0 alone writes files and speaks."""
    return dist.get_rank() if size() > 1 else 0


def first_here() -> bool:
    """Whether this is the first process of its machine."""
    return size() == 1 or int(os.environ.get("LOCAL_RANK", 0)) == 0


def take_device(device: str) -> None:
    """Have `cuda` mean a GPU of this process's own. Raises ConfigError where it cannot."""
    if size() == 1 or not device.startswith("cuda"):
        return
    if device != "cuda":
        raise ConfigError(
            f"device: {device!r} with {size()} processes, of which each takes a GPU of its own; "
            "allowed: auto | cpu | cuda"
        )
    local, gpus = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
    if local >= gpus:
        raise ConfigError(
            f"device: 'cuda' with process number {local} on a machine of {gpus} GPUs; start at most "
            f"{gpus} there (--nproc-per-node), or use cpu"
        )
    torch.cuda.set_device(local)


@contextmanager
def together() -> Iterator[None]:
    """What fails in here stops all processes, and the first of those in which it failed tells of it.

    That one raises its error. The others wait to be ended by torchrun: it ends them all as soon as
    one is gone, so whoever left before could cut off the words of the one that tells.
    """
    error = None
    try:
        yield
    except (Exception, SystemExit) as caught:
        if isinstance(caught, SystemExit) and not caught.code:  # --help, in all
            raise
        error = caught
    if size() > 1:
        failed = torch.zeros(size(), dtype=torch.int64)
        failed[rank()] = error is not None
        failed = summed(failed)
        if failed.any() and rank() != int(failed.argmax()):
            time.sleep(LAST_WORDS)
            raise SystemExit(1)
    if error is not None:
        raise error


# --- parts of a batch -------------------------------------------------------------------------


class Part(NamedTuple):
    """This process's images of one pass over a batch."""

    images: slice  # which of the batch's they are
    start: int  # number of the first of them in the pass
    whole: int  # images in the pass, of all processes
    counts: bool  # false where another process has the same images and counts them

    @property
    def count(self) -> int:
        return self.images.stop - self.images.start


def parts(images: int, passes: int = 1) -> list[Part]:
    """This process's part of each pass over a batch of `images` that at most `passes` passes share.

    The processes' parts of a pass follow one another and differ by one image at most. Where there
    are fewer images than processes, each takes them all, and those of process 0 count.
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
    """The sum of all processes' t, the same bits in each; t itself where there is one process."""
    if size() == 1 or t.numel() == 0:
        return t
    t = t.clone()
    try:
        dist.all_reduce(t)
    except RuntimeError as error:
        reason = str(error).split(". ")[0]
        raise Lost(f"lost one of {size()} processes, which may have said why ({reason})") from error
    return t


def add_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Replace each gradient by the sum over the processes, in one collective.

    Not DistributedDataParallel, which averages, wraps one module's `forward` and sums in each
    backward: here every process's loss has its share of the batch's weight, which differs where the
    parts do; DANN calls parts of its model; and the passes of an update need one sum, not one each.
    """
    if size() == 1:
        return
    gradients = [p.grad for p in parameters if p.grad is not None]
    flat = summed(torch.cat([gradient.flatten() for gradient in gradients]))
    for gradient, total in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
        gradient.copy_(total.view(gradient.shape))


# --- BatchNorm --------------------------------------------------------------------------------


class _Normalize(torch.autograd.Function):
    """x (n, C, ...) normalized by mean and biased variance of all processes' x, which are returned too.

    With N values a channel in all processes, d = x - mean and s = 1 / sqrt(var + eps):

        dL/dx = weight s (dL/dy - sum(dL/dy) / N - d s^2 sum(d dL/dy) / N)

    The sums over the processes are of float64, in one collective each way. dL/dweight and dL/dbias are
    this process's part, as every parameter's gradient is until `add_gradients`.
    """

    @staticmethod
    def forward(ctx, x, weight, bias, eps):
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        own = x.numel() // x.shape[1]
        var, mean = (t.double() for t in torch.var_mean(wide, _but_channels(x), correction=0))
        sums = summed(torch.cat([mean.new_full((1,), own), own * mean, own * (var + mean * mean)]))
        count, total, squares = sums.split([1, len(mean), len(mean)])
        mean = total / count
        var = (squares / count - mean * mean).clamp_(min=0)
        ctx.save_for_backward(x, weight, mean, (var + eps).rsqrt(), count)
        y = F.batch_norm(x, mean.to(wide.dtype), var.to(wide.dtype), weight, bias, eps=eps)
        ctx.mark_non_differentiable(mean, var, count)
        return y, mean, var, count

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad, *_):
        x, weight, mean, inverse, count = ctx.saved_tensors
        wide, dims = torch.promote_types(x.dtype, torch.float32), _but_channels(x)

        def of_channel(t: Tensor) -> Tensor:
            return t.to(wide).view(-1, *[1] * (x.dim() - 2))

        dy, d = grad.to(wide), x.to(wide) - of_channel(mean)
        own = torch.stack([t.sum(dims, dtype=torch.float64) for t in (dy, dy * d)])
        mean_dy, mean_dy_d = summed(own) / count
        dx = dy - of_channel(mean_dy) - d * of_channel(mean_dy_d * inverse**2)
        dx *= of_channel(inverse if weight is None else inverse * weight)
        if weight is None:
            return dx.to(x.dtype), None, None, None
        return dx.to(x.dtype), (own[1] * inverse).to(weight.dtype), own[0].to(weight.dtype), None


def _but_channels(x: Tensor) -> list[int]:
    return [dim for dim in range(x.dim()) if dim != 1]


class _Shared:
    """In training a BatchNorm by the statistics of all processes' images; else what it was.

    In place of torch's SyncBatchNorm, which takes no CPU tensors.
    """

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return super().forward(x)
        self._check_input_dim(x)
        y, mean, var, count = _Normalize.apply(x, self.weight, self.bias, self.eps)
        if self.track_running_stats:
            self.num_batches_tracked.add_(1)
            unbiased = var * (count / (count - 1))
            for running, now in ((self.running_mean, mean), (self.running_var, unbiased)):
                running.lerp_(now.to(running.dtype), self.momentum)
        return y


class SharedBatchNorm1d(_Shared, nn.BatchNorm1d):
    pass


class SharedBatchNorm2d(_Shared, nn.BatchNorm2d):
    pass


_SHARED = {nn.BatchNorm1d: SharedBatchNorm1d, nn.BatchNorm2d: SharedBatchNorm2d}
_PLAIN = {shared: plain for plain, shared in _SHARED.items()}


def share_statistics(model: nn.Module, shared: bool = True) -> None:
    """Have the model's BatchNorms share their statistics where there are several processes, or no more.

    The modules change their class alone: parameters, buffers, names and hooks stay. Being of another
    class than nn.BatchNorm2d they take no part in `fastshape.attach(method="replace")`, whose op has
    no form that shares: hooks serve there.
    """
    if size() > 1:
        classes = _SHARED if shared else _PLAIN
        for module in model.modules():
            module.__class__ = classes.get(type(module), type(module))


@contextmanager
def alone(model: nn.Module) -> Iterator[None]:
    """Within it the model's BatchNorms see this process's images only."""
    share_statistics(model, False)
    try:
        yield
    finally:
        share_statistics(model)
