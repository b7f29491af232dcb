"""Models by name: small networks for small images, Inception, any torchvision or timm classifier."""

from __future__ import annotations

import difflib
import re
import warnings
from typing import Any

import torch
from torch import Tensor, nn

from bkn_core.engine.cifar_networks import CifarPlain, CifarResNet
from bkn_core.engine.inception import InceptionV2
from bkn_core.engine.unet import UNet
from bkn_core.errors import BknError, InputError, RecipeError
from bkn_core.layers.surgery import copied

_RESIDUAL = re.compile(r"cifar_(preact_)?resnet([0-9]{1,9})")
_DEEPEST = 1202  # of arXiv 1512.03385
_BUILTIN: dict[str, type[nn.Module]] = {"cifar_plain": CifarPlain, "inception_v2": InceptionV2, "unet": UNet}


def is_builtin(name: str) -> bool:
    """Whether a model is one of ours, which take images of any number of colours."""
    return name in _BUILTIN or _RESIDUAL.fullmatch(name) is not None


def build_network(
    name: str, *, classes: int, channels: int = 3, pretrained: bool = False, arguments: dict[str, Any] | None = None
) -> nn.Module:
    """Build a classifier by name, with its `nn.BatchNorm*` layers.

    Args:
        name: `cifar_plain`, `cifar_resnet{6n+2}`, `cifar_preact_resnet{6n+2}`, `inception_v2`, `unet`, a
            torchvision name, or `timm:NAME`.
        classes: number of logits.
        channels: colours of the images.
        pretrained: start from the library's weights (the head only where the number of classes agrees).
        arguments: further arguments of the model's builder.

    Raises:
        RecipeError: for a name or arguments that do not exist.
        InputError: for pretrained weights that cannot be read.
    """
    arguments = arguments or {}
    match = _RESIDUAL.fullmatch(name)
    if pretrained and is_builtin(name):
        raise RecipeError(f"model.pretrained is true, but {name!r} has no pretrained weights", "Set it to false.")
    try:
        if name in _BUILTIN:
            return _BUILTIN[name](classes=classes, channels=channels, **arguments)
        if match is not None:
            return _residual(name, int(match[2]), bool(match[1]), classes=classes, channels=channels, **arguments)
        if name.startswith("timm:"):
            return _timm(name.removeprefix("timm:"), pretrained, classes, channels, arguments)
        return _torchvision(name, pretrained, classes, arguments)
    except BknError:
        raise
    except Exception as error:  # arguments such as a divisor of 0 lead a library's builder to any of them
        raise RecipeError(f"model.args {arguments} do not fit model.name {name!r}: {_said(error)}") from error


def check_network(
    network: nn.Module, name: str, example: Tensor, shape: tuple[int, ...], wanted: str, advice: str
) -> None:
    """Run a copy of a network once as in training, so that what it cannot take is refused before anything begins.

    Raises:
        RecipeError: it fails, or gives something else than logits of that shape.
    """
    given = f"images of {example.shape[2]} x {example.shape[3]}"
    try:
        with torch.random.fork_rng(devices=[]), torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            logits = copied(network).train()(example)
    except BknError:
        raise
    except Exception as error:
        raise RecipeError(
            f"model.name {name!r} cannot take {given}: {_said(error)}",
            "Give data.image_size a value that it can take, or another model.",
        ) from error
    if not isinstance(logits, Tensor) or logits.shape != shape:
        what = f"the shape {tuple(logits.shape)}" if isinstance(logits, Tensor) else f"a {type(logits).__name__}"
        raise RecipeError(
            f"model.name {name!r} makes of {given} {what}, not {wanted}",
            advice,
        )


def _said(error: Exception) -> str:
    return (str(error).splitlines() or [""])[0] or type(error).__name__


def _residual(name: str, depth: int, preactivation: bool, **rest: Any) -> nn.Module:
    if not 8 <= depth <= _DEEPEST or (depth - 2) % 6:
        nearest = min(max(8, 6 * round((depth - 2) / 6) + 2), _DEEPEST)
        raise RecipeError(
            f"model.name is {name!r}: a depth of {depth}",
            f"The depth is 6 n + 2 with n >= 1: 8, 14, 20, 32 ... {_DEEPEST} (did you mean {nearest}?).",
        )
    return CifarResNet(depth, preactivation=preactivation, **rest)


def _torchvision(name: str, pretrained: bool, classes: int, arguments: dict[str, Any]) -> nn.Module:
    from torchvision import models

    known = models.list_models(module=models)
    if name not in known:
        ours = [*_BUILTIN, "cifar_resnet8", "cifar_resnet20", "cifar_preact_resnet14"]
        near = difflib.get_close_matches(name, known + ours, n=1)
        suggestion = f" (did you mean {near[0]!r}?)" if near else ""
        raise RecipeError(
            f"model.name is {name!r}{suggestion}",
            "Choose cifar_plain, cifar_resnet{8,14,20,...}, cifar_preact_resnet{8,14,20,...}, inception_v2, "
            "unet, a torchvision classification model such as resnet18, or timm:NAME.",
        )
    if name in ("googlenet", "inception_v3"):
        # Their auxiliary heads return tuples in training and their own initialization takes a minute.
        arguments = {"aux_logits": False, "init_weights": False, **arguments}
    network: nn.Module = models.get_model(name, weights=None, num_classes=classes, **arguments)
    if pretrained:
        _load_matching(network, _pretrained_state(name))
    return network


def _pretrained_state(name: str) -> dict[str, Tensor]:
    from torchvision import models

    try:
        state: dict[str, Tensor] = models.get_model_weights(name)["DEFAULT"].get_state_dict(check_hash=True)
    except OSError as error:
        raise _unreadable(name, error) from error
    return state


def _unreadable(name: str, error: Exception) -> InputError:
    return InputError(
        f"the pretrained weights of {name!r} cannot be read: {error}",
        "Connect once, or put the file into the cache of torch hub or timm, or set model.pretrained=false.",
    )


def _load_matching(network: nn.Module, state: dict[str, Tensor]) -> None:
    """Load, in place, every tensor whose shape agrees: all but the head where the classes differ."""
    own = network.state_dict()
    for name in [name for name in state if name not in own or own[name].shape != state[name].shape]:
        del state[name]  # a copy would lack the version of the network that goes with it
    network.load_state_dict(state, strict=False)


def _timm(name: str, pretrained: bool, classes: int, channels: int, arguments: dict[str, Any]) -> nn.Module:
    try:
        import timm
    except ImportError as error:
        raise RecipeError(f"model.name is 'timm:{name}', but timm is not installed", "pip install timm") from error
    if not timm.is_model(name):
        near = difflib.get_close_matches(name, timm.list_models(), n=1)
        raise RecipeError(f"timm has no model {name!r}", f"Did you mean 'timm:{near[0]}'?" if near else "")
    try:
        network: nn.Module = timm.create_model(
            name, pretrained=pretrained, num_classes=classes, in_chans=channels, **arguments
        )
    except (OSError, RuntimeError) as error:
        if not pretrained:
            raise
        raise _unreadable(f"timm:{name}", error) from error
    return network


def pretrained_colours(name: str) -> tuple[tuple[float, ...], tuple[float, ...]] | None:
    """Return mean and standard deviation of the colours, from 0 to 1, that a model's pretrained weights want.

    Args:
        name: as `build_network` takes it.
    """
    if name.startswith("timm:"):
        import timm

        known = timm.get_pretrained_cfg(name.removeprefix("timm:"))
    else:
        from torchvision import models

        known = models.get_model_weights(name)["DEFAULT"].transforms()
    mean, std = getattr(known, "mean", None), getattr(known, "std", None)
    return None if mean is None or std is None else (tuple(map(float, mean)), tuple(map(float, std)))


def count_parameters(model: nn.Module) -> int:
    """Return the number of trained values."""
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def example_images(channels: int, image_size: tuple[int, int], images: int = 2) -> Tensor:
    """Return a small batch of noise that a model can be traced with."""
    generator = torch.Generator().manual_seed(0)
    return torch.randn(images, channels, *image_size, generator=generator)
