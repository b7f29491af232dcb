"""What each function of a forward makes of the channels it reads: lines of the program, or a reason why not."""

from __future__ import annotations

from torch import Tensor, nn

from bkn_core.wiring import attention, elementwise, linear, parameters, positions
from bkn_core.wiring.listing import Listing
from bkn_core.wiring.operations import (
    BINARY,
    CONCATENATING,
    ELEMENTWISE,
    IDENTITY,
    LINEAR,
    NORMALIZING,
    OVER_POSITIONS,
    SHAPE_ONLY,
)
from bkn_core.wiring.values import Running, Step, Value


class Interpreter:
    """Writes the program.

    Args:
        model: the model whose forward runs; its tensors are known by identity.
        stack: the modules that are running, by name, outermost first.
    """

    def __init__(self, model: nn.Module, stack: list[Running]) -> None:
        self.stack = stack
        self.listing = Listing()
        self.learned = {n for n, _ in model.named_parameters(remove_duplicate=False)}
        owned = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
        self.owned = {id(t): (parameters.Parameter(n), t._version) for n, t in owned}

    def parameter(self, tensor: Tensor) -> Value | None:
        """Return what is known of a parameter or buffer of the model; None for other tensors."""
        found = self.owned.get(id(tensor))
        if found is None:
            return None
        name, version = found
        if version != tensor._version:
            return Value(reason="a parameter or buffer written in the forward")
        return Value(parameter=name)

    def interpret(self, step: Step) -> list[Value]:
        """Return the value of each result of a function."""
        features, count = step.features, len(step.outputs)
        if step.name in LINEAR and step.operands[0] in features:
            features = [v for v in step.operands[:1] if v is not None]
        special = attention.weights(step) or attention.average(self.listing, step) if features else None
        if special is not None:
            return [self._checked(step.name, special, step.outputs[0])] * count
        unknown = next((v for v in features if v.reason), None)
        if unknown is not None:
            return [Value(reason=unknown.reason)] * count
        if not features:
            return parameters.record(step)
        if step.name in LINEAR:
            results = [linear.linear_map(self.listing, step, self.stack)]
        elif all(v.is_input for v in features):
            plain = self.learned.isdisjoint(path for e in step.parameters for path in parameters.sources(e))
            reason = "" if plain else f"{step.name} of the network input with parameters"
            results = [Value(is_input=plain, reason=reason)] * count
        elif any(v.is_input for v in features):
            results = [
                Value(reason=f"{step.name} mixes features with the network input or numbers made in the forward")
            ] * count
        elif step.name in SHAPE_ONLY:
            results = positions.moved(self.listing, step, features[0])
        else:
            results = [self._one_result(step, features)] * count
        return [self._checked(step.name, value, tensor) for value, tensor in zip(results, step.outputs, strict=True)]

    def _one_result(self, step: Step, features: list[Value]) -> Value:
        first = features[0]
        if step.name in IDENTITY:
            return first
        if step.name in ELEMENTWISE and len(step.tensors) == 1:
            return elementwise.function(self.listing, step, first)
        if any(v.numbers is not None for v in features):
            return Value(reason=f"{step.name} of channels that lie along several dimensions")
        if step.name in OVER_POSITIONS:
            return positions.over_positions(self.listing, step, first)
        if step.name == "mean":
            return positions.mean(self.listing, step, first)
        if step.name in CONCATENATING:
            return positions.concatenate(self.listing, step, features)
        if step.name == "prelu":
            return elementwise.prelu(self.listing, step, first)
        if step.name == "glu":
            return elementwise.gated_linear_unit(self.listing, step, first)
        if step.name in NORMALIZING:
            return positions.normalized(self.listing, step, first)
        if step.name in BINARY:
            return elementwise.binary(self.listing, step, features)
        return Value(reason=f"{step.name} has no rule")

    def _checked(self, name: str, value: Value, tensor: Tensor) -> Value:
        if value.line < 0 or value.numbers is not None:
            return value
        fits = value.dimension < tensor.dim() and tensor.shape[value.dimension] == self.listing.channels(value)
        return value if fits else Value(reason=f"{name} with a result of unexpected shape")
