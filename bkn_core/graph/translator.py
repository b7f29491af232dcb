"""What each function of a forward makes of the channels it reads: nodes of the graph, or a reason why not."""

from __future__ import annotations

from torch import Tensor, nn

from bkn_core.graph import expressions, names
from bkn_core.graph.builder import GraphBuilder
from bkn_core.graph.rules import attention, linear, pointwise, spatial
from bkn_core.graph.values import Running, Step, Value


class Translator:
    """Turns functions into nodes.

    Args:
        model: the model whose forward runs; its tensors are known by identity.
        stack: the modules that are running, by name, outermost first.
    """

    def __init__(self, model: nn.Module, stack: list[Running]) -> None:
        self.stack = stack
        self.builder = GraphBuilder()
        self.learned = {n for n, _ in model.named_parameters(remove_duplicate=False)}
        owned = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
        self.owned = {id(t): (expressions.Parameter(n), t._version) for n, t in owned}

    def parameter(self, tensor: Tensor) -> Value | None:
        """Return what is known of a parameter or buffer of the model; None for other tensors."""
        found = self.owned.get(id(tensor))
        if found is None:
            return None
        name, version = found
        if version != tensor._version:
            return Value(reason="a parameter or buffer written in the forward")
        return Value(parameter=name)

    def translate(self, step: Step) -> list[Value]:
        """Return the value of each result of a function."""
        features, count = step.features, len(step.outputs)
        if step.name in names.LINEAR and step.operands[0] in features:
            features = [v for v in step.operands[:1] if v is not None]
        special = attention.weights(step) or attention.average(self.builder, step) if features else None
        if special is not None:
            return [self._checked(step.name, special, step.outputs[0])] * count
        unknown = next((v for v in features if v.reason), None)
        if unknown is not None:
            return [Value(reason=unknown.reason)] * count
        if not features:
            return expressions.record(step)
        if step.name in names.LINEAR:
            results = [linear.linear_map(self.builder, step, self.stack)]
        elif all(v.is_input for v in features):
            plain = self.learned.isdisjoint(path for e in step.parameters for path in expressions.sources(e))
            reason = "" if plain else f"{step.name} of the network input with parameters"
            results = [Value(is_input=plain, reason=reason)] * count
        elif any(v.is_input for v in features):
            results = [
                Value(reason=f"{step.name} mixes features with the network input or numbers made in the forward")
            ] * count
        elif step.name in names.SHAPE_ONLY:
            results = spatial.moved(self.builder, step, features[0])
        else:
            results = [self._one_result(step, features)] * count
        return [self._checked(step.name, value, tensor) for value, tensor in zip(results, step.outputs, strict=True)]

    def _one_result(self, step: Step, features: list[Value]) -> Value:
        first = features[0]
        if step.name in names.IDENTITY:
            return first
        if step.name in names.ELEMENTWISE and len(step.tensors) == 1:
            return pointwise.function(self.builder, step, first)
        if any(v.numbers is not None for v in features):
            return Value(reason=f"{step.name} of channels that lie along several dimensions")
        if step.name in names.OVER_POSITIONS:
            return spatial.over_positions(self.builder, step, first)
        if step.name == "mean":
            return spatial.mean(self.builder, step, first)
        if step.name in names.CONCATENATING:
            return spatial.concatenate(self.builder, step, features)
        if step.name == "prelu":
            return pointwise.prelu(self.builder, step, first)
        if step.name == "glu":
            return pointwise.gated_linear_unit(self.builder, step, first)
        if step.name in names.NORMALIZING:
            return spatial.normalized(self.builder, step, first)
        if step.name in names.BINARY:
            return pointwise.binary(self.builder, step, features)
        return Value(reason=f"{step.name} has no rule")

    def _checked(self, name: str, value: Value, tensor: Tensor) -> Value:
        if value.node < 0 or value.numbers is not None:
            return value
        fits = value.dimension < tensor.dim() and tensor.shape[value.dimension] == self.builder.channels(value)
        return value if fits else Value(reason=f"{name} with a result of unexpected shape")
