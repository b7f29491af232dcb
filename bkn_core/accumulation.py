"""Gradients of one optimizer step from several forwards: the priors are computed once for all of them."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from bkn_core.convert import find_messenger
from bkn_core.errors import ConversionError
from bkn_core.norm.kalman import Gaussian
from bkn_core.wiring.messenger import Held, Messenger


@contextlib.contextmanager
def accumulation(model: nn.Module) -> Iterator[None]:
    """Compute the priors of a converted model once for all forwards of an optimizer step.

        with bkn.accumulation(model):
            for images, labels in parts:
                (loss(model(images), labels) / len(parts)).backward()
        optimizer.step()

    The parameters do not change between these forwards, so neither do the priors: the forwards use them as constants,
    whose gradients are added up and sent through the priors' own computation when the block ends. The gradients are the
    same, and the priors cost what they cost in one forward. Innovations move inside the block and act after it.
    Where priors depend on the activations (raw messages, learned transitions) and in compiled models nothing is saved.

    Args:
        model: a converted model, not wrapped by `DistributedDataParallel`, which counts the gradients of each backward.

    Raises:
        ConversionError: the model was not converted, is wrapped, or its parameters changed inside the block.
    """
    if isinstance(model, nn.parallel.DistributedDataParallel):
        raise ConversionError(
            "DistributedDataParallel needs the gradients of every parameter from every backward pass",
            "Leave bkn.accumulation out there: no_sync() alone is correct.",
        )
    owner, messenger = find_messenger(model)
    if not messenger.is_static or messenger.held is not None:
        yield
        return
    outputs, messenger.held = _hold(messenger, owner)
    leaves = messenger.held.tensors()
    versions = [parameter._version for parameter in owner.parameters()]
    try:
        yield
    finally:
        messenger.held = None
    if versions != [parameter._version for parameter in owner.parameters()]:
        raise ConversionError("parameters changed inside bkn.accumulation", "Step the optimizer after the block.")
    reached = [(o, leaf.grad) for o, leaf in zip(outputs, leaves, strict=True) if leaf.grad is not None]
    if reached:
        torch.autograd.backward([output for output, _ in reached], [gradient for _, gradient in reached])


def _hold(messenger: Messenger, owner: nn.Module) -> tuple[list[Tensor], Held]:
    """Return the priors and gains as they depend on the parameters, and the constants that stand for them."""
    layers = messenger.layers(owner)
    priors, gains = messenger.predictions(owner, layers)
    outputs = [*(tensor for prior in priors.values() for tensor in prior), *gains]
    constants = iter([tensor.detach().requires_grad_(tensor.requires_grad) for tensor in outputs])
    held = {name: Gaussian(next(constants), next(constants)) for name in priors}
    innovations = [None if layer.innovation is None else layer.innovation.clone() for layer in layers]
    return outputs, Held(held, list(constants), innovations)
