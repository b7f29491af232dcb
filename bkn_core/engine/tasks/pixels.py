"""What a segmentation minimizes: images and masks cut, scaled and turned together, and losses over pixels."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F
from torchvision import tv_tensors
from torchvision.transforms import v2

from bkn_core.data.batches import normalize
from bkn_core.data.mask_sets import IGNORED, MaskSet, inside
from bkn_core.data.splits import DataSplits
from bkn_core.engine.objective import drawing_from
from bkn_core.errors import RecipeError
from bkn_core.recipe import Recipe

_DICE_SMOOTHING = 1.0  # pixels


class SegmentationObjective:
    """The images and the loss of a training as its recipe asks.

    cross_entropy: the mean over an image's pixels of -w_c log softmax(logits)_c. dice: 1 - the mean over classes of
    (2 Σ p y + 1) / (Σ p + Σ y + 1), where p are the shares that softmax gives a class and y is 1 where the mask has it.

    Args:
        recipe: what to do.
        splits: the data.
        device: where the loss is computed.

    Raises:
        RecipeError: keys that do not fit each other or the data.
    """

    def __init__(self, recipe: Recipe, splits: DataSplits, device: torch.device) -> None:
        data, self.preprocess, self.kind = recipe.data, splits.preprocess, recipe.train.loss
        for key in ("rand_augment", "mixup", "cutmix"):
            if getattr(data, key) is not None:
                raise RecipeError(f"data.{key} is {getattr(data, key)}, but masks cannot follow it", "Set it to null.")
        assert isinstance(splits.train, MaskSet)
        weights = _class_weights(recipe.train.class_weights, splits.train.pixels)
        self.weights = None if weights is None else weights.to(device)
        self.smoothing, self.scale = recipe.train.label_smoothing, data.scale
        turning = [] if data.augment == "none" else [v2.RandomHorizontalFlip()]
        jitter = data.jitter
        changes = [v2.ColorJitter(jitter, jitter, jitter)] if jitter else []
        fill = {tv_tensors.Image: 0, tv_tensors.Mask: IGNORED}
        cut = v2.RandomCrop(splits.preprocess.image_size, pad_if_needed=True, fill=fill)
        self.change = v2.Compose([cut, *turning, *changes])

    def inputs(
        self, images: Tensor, masks: Tensor, generator: torch.Generator, layout: torch.memory_format
    ) -> tuple[Tensor, Tensor]:
        """Return the model's input and its masks (N, H, W), each pair cut out of its image at random.

        Args:
            images: uint8 (N, C, H, W).
            masks: int64 (N, H, W).
            generator: source of every random choice.
            layout: memory format of the input.
        """
        with drawing_from(generator):
            pairs = [self._changed(*inside(*pair)) for pair in zip(images, masks, strict=True)]
        inputs, targets = (torch.stack(side) for side in zip(*pairs, strict=True))
        return normalize(inputs, self.preprocess, memory_format=layout), targets

    def _changed(self, image: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        pair = tv_tensors.Image(image), tv_tensors.Mask(mask)
        if self.scale is not None:
            factor = float(torch.empty(()).uniform_(*self.scale))
            size = [max(1, round(factor * side)) for side in mask.shape]
            pair = v2.functional.resize(pair[0], size, antialias=True), v2.functional.resize(pair[1], size)
        image, mask = self.change(*pair)
        return image.as_subclass(Tensor), mask.as_subclass(Tensor)

    def loss(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Return the summed loss of masks (N, H, W)."""
        total = logits.new_zeros(())
        if self.kind != "dice":
            total = total + pixel_losses(logits, targets, self.weights, self.smoothing).sum()
        if self.kind != "cross_entropy":
            total = total + dice_losses(logits, targets).sum()
        return total


def pixel_losses(logits: Tensor, masks: Tensor, weights: Tensor | None, smoothing: float = 0.0) -> Tensor:
    """Return each image's mean cross entropy over the pixels that are not ignored, (N,); 0 where all are."""
    each = F.cross_entropy(
        logits, masks, weight=weights, ignore_index=IGNORED, label_smoothing=smoothing, reduction="none"
    )
    return each.flatten(1).sum(1) / (masks != IGNORED).flatten(1).sum(1).clamp(min=1)


def dice_losses(logits: Tensor, masks: Tensor) -> Tensor:
    """Return each image's 1 - soft Dice, averaged over classes, (N,)."""
    known = (masks != IGNORED)[:, None]
    shares = logits.softmax(1) * known
    labels = F.one_hot(masks.where(known[:, 0], 0), logits.shape[1]).movedim(-1, 1) * known
    both, either = (shares * labels).flatten(2).sum(2), (shares + labels).flatten(2).sum(2)
    return 1 - ((2 * both + _DICE_SMOOTHING) / (either + _DICE_SMOOTHING)).mean(1)


def _class_weights(wanted: tuple[float, ...] | str | None, pixels: Tensor) -> Tensor | None:
    """Return the weight of each class, 1 on average over the pixels of the training masks, float32 (classes,)."""
    if wanted is None:
        return None
    counts = pixels.double()
    if isinstance(wanted, str):
        weights = 1 / counts.clamp(min=1)
    elif len(wanted) == len(pixels):
        weights = torch.tensor(wanted, dtype=torch.float64)
    else:
        raise RecipeError(
            f"train.class_weights holds {len(wanted)} numbers, but there are {len(pixels)} classes",
            "Give one for each class, in the order of their names, or 'balanced'.",
        )
    return (weights * counts.sum() / (weights @ counts)).float()
