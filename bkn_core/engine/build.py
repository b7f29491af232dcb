"""From a recipe to a model: the network by name, then its normalization layers converted."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from bkn_core.convert import convert
from bkn_core.data.batches import normalize
from bkn_core.data.preprocess import Preprocess
from bkn_core.data.sources import choose
from bkn_core.data.splits import DataSplits, Images
from bkn_core.engine.models import build_network, check_network, example_images, is_builtin, pretrained_colours
from bkn_core.engine.tasks.named import task_of
from bkn_core.errors import RecipeError, StatisticsError
from bkn_core.kinds import GROUPLESS, check_statistics
from bkn_core.layers.rivals.reference import REFERENCE_IMAGES
from bkn_core.layers.surgery import copied
from bkn_core.priors.calibration import calibrate_priors_
from bkn_core.recipe import NormConfig, Recipe

_PRIOR_IMAGES = 2000  # images that the moments of input patches are measured on
_PRIOR_BATCH, _PRIOR_BYTES = 250, 2**28  # and those of one forward, and what these may take


def load_splits(recipe: Recipe) -> DataSplits:
    """Load the recipe's data in the colour that its model takes, and with the mean and std of its pretrained weights.

    Raises:
        InputError, RecipeError: see `load_data`.
        RecipeError: keys that do not fit each other or the data.
    """
    name = check_recipe(recipe).model.name
    check_statistics(recipe.norm.kind, recipe.eval.stats, asked="eval.stats")
    task = task_of(recipe)
    splits = task.load(recipe, None if is_builtin(name) else "RGB")
    if recipe.train.patience is not None and splits.validation is None:
        raise RecipeError(
            f"train.patience is {recipe.train.patience}, but there are no validation images to judge epochs by",
            "Hold some out, such as data.validation=0.1: on the test images the end would be chosen by what it is "
            "measured on.",
        )
    task.objective(
        recipe, splits, recipe.batch.per_device, torch.device("cpu")
    )  # refused here, also by those who only look
    splits = dataclasses.replace(splits, notes=(*splits.notes, *_batch_notes(recipe, len(splits.train))))
    colours = pretrained_colours(name) if recipe.model.pretrained and not is_builtin(name) else None
    if colours is None:
        return splits
    mean, std = colours
    return dataclasses.replace(splits, preprocess=dataclasses.replace(splits.preprocess, mean=mean, std=std))


def _batch_notes(recipe: Recipe, images: int) -> Iterator[str]:
    """Say where training images are too few for the batches that the recipe asks for."""
    gradient, statistics = recipe.batch.gradient, recipe.batch.statistics
    rest = images if gradient > images else images % gradient
    group = f", fewer than batch.statistics ({statistics}): they are one group"
    group = group if 0 < rest < statistics and recipe.norm.kind not in GROUPLESS else ""
    if gradient > images:
        yield f"batch.gradient is {gradient}: each epoch is one step with all {images} training images{group}"
    elif group:
        yield f"the last step of each epoch has {rest} images{group}"


def check_recipe(recipe: Recipe) -> Recipe:
    """Return a recipe, refused where it is something else.

    Raises:
        RecipeError: a name or a dict, say, or keys that do not fit each other.
    """
    if not isinstance(recipe, Recipe):
        raise RecipeError(f"the recipe is {recipe!r}", "Give bkn.load_recipe(NAME or file).")
    if recipe.model.pretrained and recipe.norm.weights == "centred":
        raise RecipeError(
            "norm.weights is centred and model.pretrained is true: what those weights have learned would be lost",
            "Give norm.weights=plain, or train from scratch with model.pretrained=false.",
        )
    return recipe


def build_model(
    recipe: Recipe,
    preprocess: Preprocess,
    classes: int,
    *,
    images: Images | None = None,
    pretrained: bool = True,
) -> nn.Module:
    """Build the recipe's model on the CPU; the priors of pretrained weights begin at their population statistics.

    Args:
        recipe: model and normalization.
        preprocess: colours and size of its images.
        classes: number of logits.
        images: training images for the input prior; without them it holds placeholders for a checkpoint to fill.
        pretrained: False leaves out the weights that the recipe may ask for, where a checkpoint brings others.

    Raises:
        RecipeError, ConversionError: the recipe's model or normalization cannot be built.
        StatisticsError: a layer normalizes every value of an image by itself, so that nothing is left of it.
        InputError: pretrained weights cannot be read.
    """
    norm = check_recipe(recipe).norm
    pretrained = recipe.model.pretrained and pretrained
    network = _network(recipe, preprocess, classes, pretrained=pretrained)
    _set_constants_(network, norm)
    example = example_images(len(preprocess.mean), preprocess.image_size)
    check_network(network, recipe.model.name, example, *task_of(recipe).output(example, classes))
    model = convert(network, example, **_norm_options(recipe, preprocess, images, example))
    if pretrained and norm.kind == "bkn" and norm.transition == "network" and (norm.innovation or norm.correction):
        calibrate_priors_(model)
    _check_values(model, recipe, example)
    return model


def build_outline(recipe: Recipe, preprocess: Preprocess, classes: tuple[str, ...]) -> nn.Module:
    """Build the recipe's network before its conversion, without memory for its tensors.

    Raises:
        RecipeError: it cannot be built.
    """
    with torch.device("meta"):
        return _network(recipe, preprocess, len(classes), pretrained=False)


@torch.no_grad()
def _check_values(model: nn.Module, recipe: Recipe, example: Tensor) -> None:
    """Refuse groups of channels that hold one value in an image, from which its normalization leaves 0."""

    def check(layer: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        if isinstance(layer, nn.GroupNorm) and inputs[0][0].numel() == layer.num_groups:
            height, width = example.shape[2:]
            raise StatisticsError(
                f"norm.kind is {recipe.norm.kind}, but of images of {height} x {width} a layer of {recipe.model.name} "
                f"sees one value in each of its {layer.num_groups} groups of channels: normalized, nothing is left",
                "Raise data.image_size, or take another norm.kind or model.name.",
            )

    if any(isinstance(layer, nn.GroupNorm) for layer in model.modules()):
        replica = copied(model).eval()
        for layer in replica.modules():
            layer.register_forward_pre_hook(check)
        replica(example)


def _network(recipe: Recipe, preprocess: Preprocess, classes: int, *, pretrained: bool) -> nn.Module:
    return build_network(
        recipe.model.name,
        classes=classes,
        channels=len(preprocess.mean),
        pretrained=pretrained,
        arguments=dict(recipe.model.args),
    )


def _set_constants_(network: nn.Module, norm: NormConfig) -> None:
    """Give the network's normalization layers, which conversion takes them from, the recipe's ε and momentum."""
    for layer in network.modules():
        if isinstance(layer, _BatchNorm):
            layer.eps = layer.eps if norm.eps is None else norm.eps
            layer.momentum = layer.momentum if norm.momentum is None else norm.momentum


def _norm_options(recipe: Recipe, preprocess: Preprocess, images: Images | None, example: Tensor) -> dict[str, Any]:
    norm = recipe.norm
    options: dict[str, Any] = {"kind": norm.kind, "statistics_batch_size": recipe.batch.statistics}
    if norm.kind in ("reference", "fixed"):
        return options | {"input_prior": _reference(images, preprocess, example)}
    if norm.kind != "bkn":
        return options
    seen: Any = None
    if norm.input_prior:
        seen = [example] if images is None else _prior_batches(images, preprocess)
    return options | {
        "transition": norm.transition,
        "message": norm.message,
        "covariance": norm.covariance,
        "gain": recipe.resolved_gain,
        "learn_gain": norm.learn_gain,
        "correction": norm.correction,
        "innovation": norm.innovation,
        "input_prior": seen,
    }


def _reference(images: Images | None, preprocess: Preprocess, example: Tensor) -> Tensor:
    """Return as many training images as a reference has, some twice where there are fewer; without any, their room."""
    if images is None:
        return example.new_zeros(REFERENCE_IMAGES, *example.shape[1:])
    chosen = choose(images.labels, min(REFERENCE_IMAGES, len(images)))
    return normalize(images.sample(chosen[torch.arange(REFERENCE_IMAGES) % len(chosen)]), preprocess)


def _prior_batches(images: Images, preprocess: Preprocess) -> Iterator[Tensor]:
    chosen = choose(images.labels, min(_PRIOR_IMAGES, len(images)))
    size = 4 * len(preprocess.mean) * math.prod(preprocess.image_size)
    for part in torch.split(chosen, max(1, min(_PRIOR_BATCH, _PRIOR_BYTES // size))):
        yield normalize(images.sample(part), preprocess)
