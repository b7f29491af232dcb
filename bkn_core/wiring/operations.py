"""Which PyTorch functions the converter understands, by their names, and what it makes of each."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch.overrides import resolve_name

# Elementwise functions of one tensor. Those with a closed form are named in `evaluate.CLOSED_FORMS`.
ELEMENTWISE = frozenset(
    [
        "abs",
        "celu",
        "clamp",
        "clamp_min",
        "clamp_max",
        "clip",
        "elu",
        "erf",
        "exp",
        "gelu",
        "hardshrink",
        "hardsigmoid",
        "hardswish",
        "hardtanh",
        "leaky_relu",
        "logsigmoid",
        "mish",
        "relu",
        "relu6",
        "selu",
        "sigmoid",
        "silu",
        "softplus",
        "softshrink",
        "softsign",
        "sqrt",
        "square",
        "tanh",
        "tanhshrink",
        "threshold",
    ]
)

# Functions that only move values. They are replayed on channel numbers, so no table of layouts is needed.
SHAPE_ONLY = frozenset(
    [
        "view",
        "reshape",
        "flatten",
        "unflatten",
        "permute",
        "transpose",
        "swapaxes",
        "movedim",
        "unsqueeze",
        "squeeze",
        "chunk",
        "split",
        "unbind",
        "select",
        "narrow",
        "getitem",
        "expand",
        "expand_as",
        "view_as",
        "reshape_as",
        "tensor_split",
        "channel_shuffle",
        "pixel_shuffle",
        "pixel_unshuffle",
        "t",
        "mT",
        "T",
    ]
)

# Functions whose result keeps the channels and, approximately, their moments. Average pooling keeps the mean and lowers
# the variance, max pooling raises the mean; both errors are left to the layer's correction and innovation.
PASS = frozenset(
    [
        "avg_pool1d",
        "avg_pool2d",
        "avg_pool3d",
        "adaptive_avg_pool1d",
        "adaptive_avg_pool2d",
        "adaptive_avg_pool3d",
        "max_pool1d",
        "max_pool2d",
        "max_pool3d",
        "adaptive_max_pool1d",
        "adaptive_max_pool2d",
        "adaptive_max_pool3d",
        "dropout",
        "dropout1d",
        "dropout2d",
        "dropout3d",
        "alpha_dropout",
        "feature_alpha_dropout",
        "stochastic_depth",
        "interpolate",
        "upsample",
        "pad",
        "identity",
        "contiguous",
        "clone",
        "detach",
        "data",
        "to",
        "float",
        "half",
        "bfloat16",
        "double",
        "type",
        "requires_grad",
        "alias",
    ]
)

CONVOLUTIONS = frozenset(["conv1d", "conv2d", "conv3d"])


def name_of(function: Callable[..., Any]) -> str:
    """Return the bare name of a function that PyTorch reports: "add" for `torch.Tensor.__iadd__` and `torch.add`."""
    name = str(resolve_name(function) or getattr(function, "__name__", function)).split(".")
    bare = name[-2] if name[-1] in ("__get__", "__set__") else name[-1]
    if bare.startswith("__") and bare.endswith("__"):
        bare = bare.strip("_")
        for prefix in ("i", "r"):
            if bare[:1] == prefix and bare[1:] in ("add", "mul", "sub", "truediv", "div"):
                bare = ("reversed_" if prefix == "r" else "") + bare[1:]
        return bare
    return bare.strip("_").removesuffix("_with_indices")
