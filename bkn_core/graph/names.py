"""Which PyTorch functions the converter understands, by their names."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch.overrides import resolve_name


def _names(text: str) -> frozenset[str]:
    return frozenset(text.split())


# Elementwise functions of one tensor. Those with a closed form are named in `interpret.CLOSED_FORMS`.
ELEMENTWISE = _names(
    """abs absolute atan celu clamp clamp_min clamp_max clip cos elu erf exp gelu hardshrink hardsigmoid hardswish
    hardtanh leaky_relu log1p logsigmoid mish neg negative pow relu relu6 rrelu selu sigmoid silu sin softplus
    softshrink softsign sqrt square tanh tanhshrink threshold"""
)

# Functions that only move values. They are replayed on channel numbers, so no table of layouts is needed.
SHAPE_ONLY = _names(
    """view reshape flatten unflatten permute transpose swapaxes movedim unsqueeze squeeze chunk split unbind select
    narrow getitem expand expand_as view_as reshape_as tensor_split channel_shuffle pixel_shuffle pixel_unshuffle
    t mT T"""
)

# Those of them that keep every value, so that two results still hold the same values at the same positions.
REARRANGING = _names(
    """view reshape flatten unflatten permute transpose swapaxes movedim unsqueeze squeeze view_as reshape_as t mT T"""
)

# Functions that return their values as they are.
IDENTITY = _names(
    """contiguous clone detach to float half bfloat16 double type requires_grad alias identity dropout dropout1d
    dropout2d dropout3d alpha_dropout feature_alpha_dropout stochastic_depth"""
)

# Functions over positions. Pooling has rules. Padding and resizing pass the moments on: padding lowers both at the
# border, resizing mixes neighbours; that is left to the layer's correction and inflation. The number is how many
# trailing dimensions they act on.
OVER_POSITIONS = {
    **{f"{kind}_pool{n}d": n for kind in ("avg", "max", "adaptive_avg", "adaptive_max") for n in (1, 2, 3)},
    "interpolate": None,
    "upsample": None,
    "pad": None,
}

# Functions that lay a tensor's memory open. What is written there leaves no version behind.
MEMORY = _names("data numpy array dlpack cuda_array_interface storage untyped_storage data_ptr")

# Functions that make a tensor of numbers alone. What is computed of the input and of those is as good as the input.
CONSTANT = _names("tensor as_tensor zeros ones full arange linspace eye")

TRANSPOSED = _names("conv_transpose1d conv_transpose2d conv_transpose3d")
LINEAR = _names("conv1d conv2d conv3d linear") | TRANSPOSED
MATRIX_PRODUCTS = _names("matmul bmm einsum")
NORMALIZING = _names("layer_norm group_norm instance_norm")
CONCATENATING = _names("cat concat concatenate")

# Functions of two tensors, or of a tensor and a number, and what each computes of its left and right operand (those
# that begin with r exchange them).
BINARY = {
    **{name: name for name in ("add", "sub", "mul", "div")},
    **{"multiply": "mul", "subtract": "sub", "divide": "div", "truediv": "div", "true_divide": "div"},
    **{"rsub": "sub", "reversed_sub": "sub", "reversed_truediv": "div", "reversed_div": "div"},
}


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
