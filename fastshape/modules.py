"""fastshape.shape as a module."""

from __future__ import annotations

from typing import Any, Literal, cast, get_args

from torch import Tensor, fx, nn

from .bitmask import BitMask
from .functional import shape
from .rng import brief, checked_p_zero

Gradient = Literal["straight_through", "clipped", "zero"]
AtEval = Literal["off", "binarize", "on"]
AT_EVAL = get_args(AtEval)
_CHOICES = {"gradient": get_args(Gradient), "at_eval": AT_EVAL}


def checked_setting(name: str, value: Any) -> Any:
    """The value of a setting of a module, if it is allowed.

    Args:
        name: ``"p_zero"``, ``"gradient"`` or ``"at_eval"``; any other setting is True or False.

    Raises:
        TypeError: the value has a wrong type.
        ValueError: the value is not allowed.
    """
    if name == "p_zero":
        return None if value is None else checked_p_zero(value)
    if name in _CHOICES:
        if not isinstance(value, str) or value not in _CHOICES[name]:
            raise ValueError(f"{name}={brief(value)}: allowed are {', '.join(_CHOICES[name])}")
        return str(value)
    if not isinstance(value, bool) and str(getattr(value, "dtype", "")) != "bool":  # of numpy
        raise TypeError(f"{name}={brief(value)}: must be True or False")
    return bool(value)


def fx_node(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """What torch.fx records for a call of `module` with these arguments: one node, as for the modules of torch.nn.

    torch.fx asks only about modules of torch.nn whether they are one node, and runs the forward of any other.

    Args:
        args, kwargs: the arguments; at least one is a Proxy. A keyword argument that is None is left out.

    Raises:
        RuntimeError: the model that is traced is `module` itself.
    """
    tracer = next(a.tracer for a in (*args, *kwargs.values()) if isinstance(a, fx.Proxy))
    path = cast(fx.Tracer, tracer).path_of_module(module)
    if not path:
        raise RuntimeError(
            f"torch.fx can trace a model that contains {type(module).__name__}, but not {type(module).__name__} alone: "
            "it has no code to trace; put it into an nn.Sequential"
        )
    given = {name: value for name, value in kwargs.items() if value is not None}
    return tracer.create_proxy("call_module", path, args, given)


class ActivationShaping(nn.Module):
    """Shapes its input: ``B(x) * M``; see `fastshape.shape`.

    The arguments are attributes, which may be set at any time; each is then checked as here. torch.fx traces the module as one
    node.

    Args:
        p_zero: probability of a zero in the mask that each call draws, in [0, 1); None draws no mask. It is rounded to a
            multiple of 1/65536, which `fastshape.realised_rate` returns. A probability that this would make 0 or 1 is
            refused.
        binarize, gradient, inplace: as in `fastshape.shape`.
        at_eval: what happens in evaluation mode. ``"off"`` returns the input, ``"binarize"`` binarizes without a mask, ``"on"``
            shapes as in training.

    Shape:
        Input and output: any shape, float16, bfloat16, float32 or float64.

    Raises:
        TypeError: an argument has a wrong type.
        ValueError: p_zero, gradient or at_eval is not allowed.

    Example:
        >>> block = nn.Sequential(nn.Conv2d(3, 8, 3), fastshape.ActivationShaping(p_zero=0.3), nn.ReLU())
    """

    p_zero: float | None
    binarize: bool
    gradient: Gradient
    at_eval: AtEval
    inplace: bool

    def __init__(
        self,
        p_zero: float | None = None,
        *,
        binarize: bool = True,
        gradient: Gradient = "straight_through",
        at_eval: AtEval = "off",
        inplace: bool = False,
    ):
        super().__init__()
        self.p_zero = p_zero
        self.binarize = binarize
        self.gradient = gradient
        self.at_eval = at_eval
        self.inplace = inplace

    def __setattr__(self, name: str, value: Any) -> None:
        if name in ("p_zero", "binarize", "gradient", "at_eval", "inplace"):
            value = checked_setting(name, value)
        super().__setattr__(name, value)

    def forward(self, x: Tensor, mask: BitMask | Tensor | None = None) -> Tensor:
        """Shape `x`. A `mask` replaces the random mask.

        Raises:
            TypeError, ValueError, RuntimeError: as in `fastshape.shape`.
        """
        if isinstance(x, fx.Proxy) or isinstance(mask, fx.Proxy):
            return fx_node(self, x, mask=mask)
        if not self.training and self.at_eval == "off":
            return x
        masked = self.training or self.at_eval == "on"
        return shape(
            x,
            p_zero=self.p_zero if masked and mask is None else None,
            mask=mask if masked else None,
            binarize=self.binarize,
            gradient=self.gradient,
            inplace=self.inplace,
        )

    def extra_repr(self) -> str:
        return (
            f"p_zero={self.p_zero}, binarize={self.binarize}, gradient={self.gradient!r}, "
            f"at_eval={self.at_eval!r}, inplace={self.inplace}"
        )
