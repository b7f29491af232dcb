"""What a training minimizes: from the images of a pass to the model's input, and from its logits to the loss."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional as F
from torchvision.transforms import v2

from bkn_core.data.batches import augment, normalize
from bkn_core.data.splits import DataSplits
from bkn_core.errors import RecipeError
from bkn_core.recipe import DataConfig, Recipe

# The process's own generator, which networks and torchvision draw from: one run at a time sets it.
RANDOM_STATE = threading.Lock()


@contextlib.contextmanager
def drawing_from(generator: torch.Generator) -> Iterator[None]:
    """Let what draws from the process's own generator draw from this one for a while, and move it on."""
    own = torch.default_generator
    with RANDOM_STATE:
        before = own.get_state()
        own.set_state(generator.get_state())
        try:
            yield
        finally:
            generator.set_state(own.get_state())
            own.set_state(before)


class ClassificationObjective:
    """The images and the loss of a training as its recipe asks.

    loss = -Σ_c w_c p_c log softmax(logits)_c, summed over the images, where p is the label, with a share moved to all
    classes by `train.label_smoothing` and mixed with another label as its image is; w are the class weights.

    Args:
        recipe: what to do.
        splits: the data.
        images: images of one pass of one process.
        device: where the loss is computed.

    Raises:
        RecipeError: keys that do not fit each other or the data.
    """

    def __init__(self, recipe: Recipe, splits: DataSplits, images: int, device: torch.device) -> None:
        self.data, self.preprocess = recipe.data, splits.preprocess
        self.smoothing = recipe.train.label_smoothing
        weights = class_weights(recipe.train.class_weights, splits.train.labels, len(splits.classes))
        self.weights = None if weights is None else weights.to(device)
        self.mixing = _mixing(recipe.data, len(splits.classes), images)

    def inputs(
        self, images: Tensor, labels: Tensor, generator: torch.Generator, layout: torch.memory_format
    ) -> tuple[Tensor, Tensor]:
        """Return the model's input and what it is to say: labels (N,), or shares of the classes (N, classes).

        Args:
            images: uint8 (N, C, H, W).
            labels: int64 (N,).
            generator: source of every random choice.
            layout: memory format of the input.
        """
        images = augment(images, self.data.augment, generator)
        if self.data.rand_augment is not None:
            with drawing_from(generator):
                images = rand_augment(images, self.data.rand_augment)
        inputs = normalize(images, self.preprocess, memory_format=layout)
        if self.mixing is None:
            return inputs, labels
        with drawing_from(generator):
            inputs, targets = self.mixing(inputs, labels)
        return inputs.contiguous(memory_format=layout), targets

    def loss(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Return the summed loss of labels (N,) or of shares of the classes (N, classes)."""
        return F.cross_entropy(logits, targets, weight=self.weights, label_smoothing=self.smoothing, reduction="sum")


def rand_augment(images: Tensor, magnitude: int) -> Tensor:
    """Change each uint8 image by two operations of torchvision's RandAugment, drawn for it alone."""
    change = v2.RandAugment(magnitude=magnitude)
    return torch.stack([change(image) for image in images])


def class_weights(wanted: tuple[float, ...] | str | None, labels: Tensor, classes: int) -> Tensor | None:
    """Return the weight of each class, float32 (classes,), 1 on average over the training images.

    So the loss, divided by the number of images, keeps its size, and an image counts the same in any batch.

    Args:
        wanted: one positive number a class; "balanced" for the inverse of the number of its images; None for none.
        labels: of the training images.
        classes: how many there are.

    Raises:
        RecipeError: another number of weights than classes.
    """
    if wanted is None:
        return None
    counts = labels.bincount(minlength=classes).double()
    if isinstance(wanted, str):
        weights = 1 / counts.clamp(min=1)
    elif len(wanted) == classes:
        weights = torch.tensor(wanted, dtype=torch.float64)
    else:
        raise RecipeError(
            f"train.class_weights holds {len(wanted)} numbers, but there are {classes} classes",
            "Give one for each class, in the order of their names, or 'balanced'.",
        )
    return (weights * len(labels) / (weights @ counts)).float()


def _mixing(data: DataConfig, classes: int, images: int) -> v2.Transform | None:
    """Return what mixes the images of a pass with each other, if the recipe has it."""
    wanted = {"data.mixup": data.mixup, "data.cutmix": data.cutmix}
    names = [name for name, alpha in wanted.items() if alpha is not None]
    if names and images < 2:
        raise RecipeError(
            f"{names[0]} is {wanted[names[0]]}, but a forward holds one image, so there is none to mix it with",
            f"Raise batch.per_device (and batch.gradient) to 2 or more for each process, or set {names[0]}=null.",
        )
    kinds: list[v2.Transform] = []
    if data.mixup is not None:
        kinds.append(v2.MixUp(alpha=data.mixup, num_classes=classes))
    if data.cutmix is not None:
        kinds.append(v2.CutMix(alpha=data.cutmix, num_classes=classes))
    return v2.RandomChoice(kinds) if len(kinds) > 1 else next(iter(kinds), None)
