"""Put other normalizations than ours in a model, with what they want of the layers around them."""

from __future__ import annotations

import itertools
from collections.abc import Collection, Mapping
from typing import Any, TypeVar

from torch import Tensor, nn

from bkn_core.errors import ConversionError
from bkn_core.graph.neighbours import neighbours
from bkn_core.layers.factory import baseline_layer
from bkn_core.layers.rivals.build import ACTIVATING, BUILDERS, WEIGHTS, Surroundings, rival_layer
from bkn_core.layers.rivals.reference import attach_reference_
from bkn_core.layers.rivals.weights import reparametrize_
from bkn_core.layers.surgery import replaced

Model = TypeVar("Model", bound=nn.Module)


def with_baselines(
    model: Model, chosen: Collection[str], kind: str, example_input: Any, options: tuple[int | None, Any]
) -> Model:
    """Return a copy of a model with layers of a kind in the place of the chosen ones.

    Args:
        model: left as it is.
        chosen: paths of its batch normalization layers.
        kind: of `kinds.KINDS`, but bkn.
        example_input: for one forward that finds what stands around each layer.
        options: images per statistics group (None is the whole batch), and training images or None.

    Raises:
        ConversionError: the forward fails on the example, or there is nothing to make a reference of.
    """
    statistics_batch_size, images = options
    if kind not in BUILDERS:
        return replaced(model, set(chosen), lambda _, norm: baseline_layer(norm, kind, statistics_batch_size))
    near = neighbours(model, example_input)
    behind = {norm: relu for norm, relu in near.behind.items() if norm in chosen and kind in ACTIVATING}

    def build(name: str, norm: Any) -> nn.Module:
        return rival_layer(norm, kind, Surroundings(statistics_batch_size, near.positions.get(name, 0), name in behind))

    replica = replaced(model, set(chosen), build)
    for relu in behind.values():
        parent, _, child = relu.rpartition(".")
        setattr(replica.get_submodule(parent), child, nn.Identity())
    order = [name for name in near.order if name in chosen]
    for norm in order if kind in WEIGHTS else ():
        if norm in near.before:
            reparametrize_(replica.get_submodule(near.before[norm]), WEIGHTS[kind])
    if kind == "cbn":
        for norm in near.before.keys() & set(chosen):
            _layer(replica, norm).follow_(replica.get_submodule(near.before[norm]))
    if kind in ("reference", "fixed"):
        attach_reference_(replica, _first_images(example_input if images is None else images))
    if kind == "gkn":
        for previous, norm in itertools.pairwise(order):
            _layer(replica, norm).follow_(_layer(replica, previous))
    return replica


def _first_images(given: Any) -> Tensor:
    """Return the tensor of images at the beginning of a batch, or of batches."""
    first = given if isinstance(given, Tensor | Mapping) else next(iter(given), None)
    first = first[0] if isinstance(first, list | tuple) and first else first
    if not isinstance(first, Tensor) or len(first) == 0:
        raise ConversionError(
            f"the reference images are a {type(first).__name__}", "Give input_prior=images, a tensor of some of them."
        )
    return first


def _layer(model: nn.Module, name: str) -> Any:
    """Return a new layer, inside the activation that it may have been dressed with."""
    layer = model.get_submodule(name)
    return layer[0] if isinstance(layer, nn.Sequential) else layer
