"""Put other normalizations than ours in a model, with what they want of the layers around them."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any, TypeVar

from torch import nn

from bkn_core.norm.replacement import replaced
from bkn_core.norm.rivals.build import ACTIVATING, BUILDERS, WEIGHTS, Place, rival_layer
from bkn_core.norm.rivals.weights import reparametrize_
from bkn_core.norm.successors import baseline_layer
from bkn_core.wiring.neighbours import neighbours

Model = TypeVar("Model", bound=nn.Module)


def with_baselines(
    model: Model, chosen: Collection[str], kind: str, example_input: Any, statistics_batch_size: int | None
) -> Model:
    """Return a copy of a model with layers of a kind in the place of the chosen ones.

    Args:
        model: left as it is.
        chosen: paths of its batch normalization layers.
        kind: of `norm.kinds.KINDS`, but bkn.
        example_input: for one forward that finds what stands around each layer.
        statistics_batch_size: images per statistics group; None is the whole batch.
    """
    if kind not in BUILDERS:
        return replaced(model, set(chosen), lambda _, norm: baseline_layer(norm, kind, statistics_batch_size))
    near = neighbours(model, example_input)
    behind = {norm: relu for norm, relu in near.behind.items() if norm in chosen and kind in ACTIVATING}

    def build(name: str, norm: Any) -> nn.Module:
        return rival_layer(norm, kind, Place(statistics_batch_size, near.positions.get(name, 0), name in behind))

    replica = replaced(model, set(chosen), build)
    for relu in behind.values():
        parent, _, child = relu.rpartition(".")
        setattr(replica.get_submodule(parent), child, nn.Identity())
    if kind in WEIGHTS:
        for norm in sorted(near.before.keys() & set(chosen)):
            reparametrize_(replica.get_submodule(near.before[norm]), WEIGHTS[kind])
    return replica
