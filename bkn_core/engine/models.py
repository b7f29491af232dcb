"""Models by name: small residual and plain networks for small images, any torchvision or timm classifier."""

from __future__ import annotations

import difflib
import re
import warnings
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bkn_core.errors import BknError, InputError, RecipeError
from bkn_core.norm.replacement import copied

_RESIDUAL = re.compile(r"cifar_(preact_)?resnet([0-9]{1,9})")
_DEEPEST = 1202  # of arXiv 1512.03385


class Block(nn.Module):
    """Two 3×3 convolutions with a shortcut, normalized after each convolution."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.shortcut = nn.Sequential()
        if stride > 1 or inputs != outputs:
            self.shortcut = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        """Add the block to its input."""
        y = F.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y)) + self.shortcut(x)
        return F.relu(y)


class PreActivationBlock(nn.Module):
    """Two 3×3 convolutions with a shortcut, normalized before each convolution (arXiv 1603.05027)."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(inputs)
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        changes = stride > 1 or inputs != outputs
        self.shortcut = nn.Conv2d(inputs, outputs, 1, stride, bias=False) if changes else None

    def forward(self, x: Tensor) -> Tensor:
        """Add the block to its input."""
        z = F.relu(self.bn1(x))
        kept: Tensor = x if self.shortcut is None else self.shortcut(z)
        y: Tensor = self.conv2(F.relu(self.bn2(self.conv1(z))))
        return y + kept


class CifarResNet(nn.Module):
    """The residual network for 32×32 images: three stages of 16, 32 and 64 channels (arXiv 1512.03385, section 4.2).

    Args:
        depth: 6 n + 2 for n blocks a stage.
        classes: number of logits.
        channels: colours of the images.
        preactivation: normalize before each convolution instead of after it.
    """

    def __init__(self, depth: int, *, classes: int = 10, channels: int = 3, preactivation: bool = False) -> None:
        super().__init__()
        block = PreActivationBlock if preactivation else Block
        self.conv1 = nn.Conv2d(channels, 16, 3, 1, 1, bias=False)
        self.bn1 = nn.Identity() if preactivation else nn.BatchNorm2d(16)
        widths, stages = [16, 16, 32, 64], []
        for i in range(3):
            blocks = [block(widths[i], widths[i + 1], 1 if i == 0 else 2)]
            blocks += [block(widths[i + 1], widths[i + 1], 1) for _ in range((depth - 2) // 6 - 1)]
            stages.append(nn.Sequential(*blocks))
        self.stages = nn.Sequential(*stages)
        self.final = nn.BatchNorm2d(64) if preactivation else nn.Identity()
        self.head = nn.Linear(64, classes)
        initialize(self)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits."""
        x = self.conv1(x)
        x = x if isinstance(self.bn1, nn.Identity) else F.relu(self.bn1(x))
        x = self.stages(x)
        x = x if isinstance(self.final, nn.Identity) else F.relu(self.final(x))
        return self.head(x.mean((2, 3)))  # type: ignore[no-any-return]


class CifarPlain(nn.Module):
    """Six 3×3 convolutions without shortcuts, in the spirit of the paper's small network for 32×32 images."""

    def __init__(self, *, classes: int = 10, channels: int = 3) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        widths = [channels, 32, 32, 64, 64, 128, 128]
        for i in range(6):
            stride = 2 if i in (2, 4) else 1
            layers += [nn.Conv2d(widths[i], widths[i + 1], 3, stride, 1, bias=False)]
            layers += [nn.BatchNorm2d(widths[i + 1]), nn.ReLU()]
        self.features = nn.Sequential(*layers)
        self.head = nn.Linear(widths[-1], classes)
        initialize(self)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits."""
        return self.head(self.features(x).mean((2, 3)))  # type: ignore[no-any-return]


def initialize(model: nn.Module) -> None:
    """Draw convolution weights from He's normal distribution, in place."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")


def is_builtin(name: str) -> bool:
    """Whether a model is one of ours, which take images of any number of colours."""
    return name == "cifar_plain" or _RESIDUAL.fullmatch(name) is not None


def build_network(
    name: str, *, classes: int, channels: int = 3, pretrained: bool = False, arguments: dict[str, Any] | None = None
) -> nn.Module:
    """Build a classifier by name, with its `nn.BatchNorm*` layers.

    Args:
        name: `cifar_plain`, `cifar_resnet{6n+2}`, `cifar_preact_resnet{6n+2}`, a torchvision name, or `timm:NAME`.
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
        if name == "cifar_plain":
            return CifarPlain(classes=classes, channels=channels, **arguments)
        if match is not None:
            return _residual(name, int(match[2]), bool(match[1]), classes=classes, channels=channels, **arguments)
        if name.startswith("timm:"):
            return _timm(name.removeprefix("timm:"), pretrained, classes, channels, arguments)
        return _torchvision(name, pretrained, classes, arguments)
    except BknError:
        raise
    except Exception as error:  # arguments such as a divisor of 0 lead a library's builder to any of them
        raise RecipeError(f"model.args {arguments} do not fit model.name {name!r}: {_said(error)}") from error


def check_network(network: nn.Module, name: str, example: Tensor, classes: int) -> None:
    """Run a copy of a network once as in training, so that what it cannot take is refused before anything begins.

    Raises:
        RecipeError: it fails, or gives something else than logits.
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
    if not isinstance(logits, Tensor) or logits.shape != (len(example), classes):
        what = f"the shape {tuple(logits.shape)}" if isinstance(logits, Tensor) else f"a {type(logits).__name__}"
        raise RecipeError(
            f"model.name {name!r} makes of {given} {what}, not one logit for each of {classes} classes",
            "Choose a classifier, without auxiliary heads.",
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
        ours = ["cifar_plain", "cifar_resnet8", "cifar_resnet20", "cifar_preact_resnet14"]
        near = difflib.get_close_matches(name, known + ours, n=1)
        suggestion = f" (did you mean {near[0]!r}?)" if near else ""
        raise RecipeError(
            f"model.name is {name!r}{suggestion}",
            "Choose cifar_plain, cifar_resnet{8,14,20,...}, cifar_preact_resnet{8,14,20,...}, "
            "a torchvision classification model such as resnet18, or timm:NAME.",
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
