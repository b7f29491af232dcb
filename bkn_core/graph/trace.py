"""Find what precedes each normalization layer: one example forward under a `TorchFunctionMode`, the model untouched.

Every tensor that comes from the model's own layers carries a value: the node that describes its channels, or
why there is none. Two guards keep this honest: a tensor written behind the trace's back (its version moved) and a
tensor with no history (scripted code, NumPy) are both "unknown", never a guess.
"""

from __future__ import annotations

import contextlib
import dataclasses
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from bkn_core.graph import expressions
from bkn_core.graph.entry import entered
from bkn_core.graph.graph import REPEATED, Graph, GraphBuilder
from bkn_core.graph.operations import FUNCTIONS
from bkn_core.graph.rules import attention
from bkn_core.graph.rules.linear import linear_map
from bkn_core.graph.rules.moving import moved
from bkn_core.graph.rules.pointwise import function
from bkn_core.graph.rules.rule import Trace
from bkn_core.graph.values import CONSTANT, IDENTITY, MEMORY, Arguments, Running, Step, Value, argument, name_of
from bkn_core.layers.surgery import copied

_PLAIN = (int, float, str, torch.dtype, torch.device, torch.Size, type(None))


@torch.inference_mode(mode=False)  # whose tensors keep no version
def trace(model: nn.Module, example_input: Any) -> Graph:
    """Run one forward on a copy of the model in training mode, dropout off, and return its graph.

    Args:
        model: a model with `nn.BatchNorm*` layers.
        example_input: a tensor, or a tuple or dict of the forward's arguments.

    Returns:
        The graph with a prior or a reason for every batch normalization layer.

    Raises:
        ConversionError: the forward fails on the example.
    """
    replica = copied(model).train()
    for module in replica.modules():
        kind = type(module).__name__.lower()
        if "drop" in kind or "stochasticdepth" in kind or isinstance(module, nn.SyncBatchNorm):
            module.eval()  # a synchronized layer would wait for other processes
    recorder = Tracer(replica)
    devices = sorted({p.device.index or 0 for p in replica.parameters() if p.device.type == "cuda"})
    with torch.random.fork_rng(devices=devices), torch.no_grad(), _module_names(replica, recorder.stack):
        example_input = pytree.tree_map(lambda a: a.clone() if isinstance(a, Tensor) else a, example_input)
        for tensor in pytree.tree_leaves(example_input):
            if isinstance(tensor, Tensor):
                recorder.keep(tensor, Value(is_input=True))
        with recorder, _uncompiled(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what the forward has to say, such as a checkpoint without gradients
            entered(replica, example_input, "example_input")
    return recorder.graph()


def _uncompiled() -> contextlib.AbstractContextManager[Any]:
    """Run compiled models as they were written; their compiler is not imported where nothing else has done so."""
    if "torch._dynamo" not in sys.modules:
        return contextlib.nullcontext()
    stance: contextlib.AbstractContextManager[Any] = torch.compiler.set_stance("force_eager")
    return stance


class Tracer(TorchFunctionMode):
    """Follow every PyTorch function of one forward and build the graph."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.stack: list[Running] = []
        self.builder = GraphBuilder(self.stack)
        self.learned = {n for n, _ in model.named_parameters(remove_duplicate=False)}
        owned = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
        self.owned = {id(t): (expressions.Parameter(n), t._version) for n, t in owned}
        self.values: dict[int, Value] = {}
        self.calls: dict[str, list[int | str]] = {n: [] for n, m in model.named_modules() if isinstance(m, _BatchNorm)}

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Run the function and note what it did."""
        arguments: Arguments = (args, kwargs or {})
        name = name_of(func)
        if name == "batch_norm" and not self._is_parameter(argument(arguments, 0, "input")):
            return self._norm(arguments)
        tensors = [t for t in pytree.tree_leaves(arguments) if isinstance(t, Tensor)]
        operands = [self.value(t) for t in tensors]
        kept = self._inputs_of_a_write(func, tensors, operands)
        result = func(*args, **arguments[1])
        for known in kept:
            self.keep(known, Value(is_input=True))
        if name in MEMORY:
            self._give_up(tensors[0])
        outputs = [t for t in pytree.tree_leaves(result) if isinstance(t, Tensor)]
        if isinstance(result, float) and any(operand is not None for operand in operands):
            self.builder.read_numbers.add(result)
        if outputs and any(operand is not None for operand in operands):
            results = self._translated(Step(name, func, arguments, operands, outputs))
            for tensor, value in zip(outputs, results, strict=True):
                self.keep(tensor, value)
        elif outputs and name in CONSTANT and self._is_of_numbers(arguments):
            self.keep(outputs[0], Value(is_input=True))
        return result

    def _is_of_numbers(self, arguments: Arguments) -> bool:
        """Whether a function was given numbers alone, and none that was read from a tensor."""
        leaves = pytree.tree_leaves(arguments)
        known = self.builder.read_numbers
        return all(isinstance(leaf, _PLAIN) and not (isinstance(leaf, float) and leaf in known) for leaf in leaves)

    def _translated(self, step: Step) -> list[Value]:
        """Translate a function; one that is called in a way nobody foresaw costs a prior, not the conversion."""
        try:
            return self._translate(step)
        except (TypeError, ValueError, IndexError, KeyError, RuntimeError) as error:
            reason = f"{step.name} in a form that is not understood ({type(error).__name__})"
            return [Value(reason=reason)] * len(step.outputs)

    def _translate(self, step: Step) -> list[Value]:
        """Return the value of each result of a function."""
        make, features, count = FUNCTIONS.get(step.name), step.features, len(step.outputs)
        if make is linear_map and step.operands[0] in features:
            features = [v for v in step.operands[:1] if v is not None]
        special = attention.weights(step) or attention.average(self.builder, step) if features else None
        if special is not None:
            return [self._checked(step.name, special, step.outputs[0])] * count
        unknown = next((v for v in features if v.reason), None)
        if unknown is not None:
            return [Value(reason=unknown.reason)] * count
        if not features:
            return expressions.record(step)
        if make is not linear_map and any(v.is_input for v in features):
            return [self._of_input(step, features)] * count
        results = self._made(make, step, features)
        results = results if isinstance(results, list) else [results] * count
        return [self._checked(step.name, value, tensor) for value, tensor in zip(results, step.outputs, strict=True)]

    def _of_input(self, step: Step, features: list[Value]) -> Value:
        if not all(v.is_input for v in features):
            return Value(reason=f"{step.name} mixes features with the network input or numbers made in the forward")
        plain = self.learned.isdisjoint(path for e in step.parameters for path in expressions.sources(e))
        return Value(is_input=plain, reason="" if plain else f"{step.name} of the network input with parameters")

    def _made(self, make: Trace | None, step: Step, features: list[Value]) -> Value | list[Value]:
        if step.name in IDENTITY:
            return features[0]
        if make is function and len(step.tensors) > 1:
            make = None
        if make not in (linear_map, moved, function) and any(v.numbers is not None for v in features):
            return Value(reason=f"{step.name} of channels that lie along several dimensions")
        if make is None:
            return Value(reason=f"{step.name} has no rule")
        return make(self.builder, step, *features)

    def _checked(self, name: str, value: Value, tensor: Tensor) -> Value:
        if value.node < 0 or value.numbers is not None:
            return value
        fits = value.dimension < tensor.dim() and tensor.shape[value.dimension] == self.builder.channels(value)
        return value if fits else Value(reason=f"{name} with a result of unexpected shape")

    def keep(self, tensor: Tensor, value: Value) -> None:
        """Attach a value to a tensor and keep it alive, so that its identity stays its own."""
        if tensor.is_inference():
            self.values[id(tensor)] = Value(reason="a tensor made under torch.inference_mode", tensor=tensor)
        else:
            self.values[id(tensor)] = dataclasses.replace(value, tensor=tensor, version=tensor._version)

    def _inputs_of_a_write(
        self, func: Callable[..., Any], tensors: list[Tensor], operands: Sequence[Value | None]
    ) -> list[Tensor]:
        """Return the inputs that are still inputs when a function has written one in place: into a batch, say."""
        name = getattr(func, "__name__", "")
        if not ((name.endswith("_") and not name.endswith("__")) or name == "__setitem__"):
            return []
        if not operands or not all(v is None or v.is_input for v in operands) or operands[0] is None:
            return []
        return [t for t in self._sharing(tensors[0]) if (found := self.value(t)) is not None and found.is_input]

    def _sharing(self, tensor: Tensor) -> list[Tensor]:
        """Return the known tensors that share their memory with one."""
        storage = tensor.untyped_storage()._cdata
        known = [v.tensor for v in self.values.values() if v.tensor is not None]
        return [t for t in known if t.untyped_storage()._cdata == storage]

    def _give_up(self, tensor: Tensor) -> None:
        """Forget all tensors that share their memory with one whose memory the model asked for."""
        for known in self._sharing(tensor):
            self.keep(known, Value(reason="a tensor that may be written in place through its .data or memory"))

    def value(self, tensor: Tensor) -> Value | None:
        """Return what is known of a tensor; None for a number that was made in the forward."""
        found = self.values.get(id(tensor))
        if found is None:
            known = self._parameter(tensor)
            if known is not None or tensor.dim() == 0:
                return known
            return Value(reason="a tensor without history (scripted code, NumPy, or made in the forward)")
        if not tensor.is_inference() and found.version != tensor._version:
            return Value(reason="a tensor written in place through a view")
        return found

    def _parameter(self, tensor: Tensor) -> Value | None:
        """Return what is known of a parameter or buffer of the model; None for other tensors."""
        found = self.owned.get(id(tensor))
        if found is None:
            return None
        name, version = found
        if version != tensor._version:
            return Value(reason="a parameter or buffer written in the forward")
        return Value(parameter=name)

    def _is_parameter(self, tensor: Tensor) -> bool:
        value = self.value(tensor)
        return value is not None and value.parameter is not None  # a weight that is being standardized

    def graph(self) -> Graph:
        """Return the graph, cleared of nodes that no prior needs."""
        priors: dict[str, int] = {}
        reasons: dict[str, str] = {}
        for name, calls in self.calls.items():
            if len(calls) == 1 and isinstance(calls[0], int):
                priors[name] = calls[0]
            elif len(calls) == 1:
                reasons[name] = str(calls[0])
            else:
                reasons[name] = REPEATED if calls else "not reached by the example forward"
        return Graph(tuple(self.builder.nodes), priors, reasons).only(priors, reasons)

    def _norm(self, arguments: Arguments) -> Tensor:
        x: Tensor = argument(arguments, 0, "input")
        name = next((r.name for r in reversed(self.stack) if isinstance(r.module, _BatchNorm)), None)
        output = x.clone()  # the values do not matter, and the layer's own batch may be too small to normalize
        if name is None:
            self.keep(output, Value(reason="batch_norm outside a normalization layer"))
            return output
        value = self.value(x) or Value()
        if value.is_input:
            value = self.builder.write("measured", [], x.shape[1], dimension=1, name=name, words="input")
        if value.node >= 0 and value.dimension == 1:
            self.calls[name].append(value.node)
        else:
            self.calls[name].append(value.reason or "its channels are not in dimension 1")
        self.keep(output, self.builder.write("norm", [], x.shape[1], dimension=1, name=name, words=name))
        return output


@contextlib.contextmanager
def _module_names(model: nn.Module, stack: list[Running]) -> Iterator[None]:
    """Keep the stack of the modules that are running, by name, while a model's forward runs."""

    def entering(name: str) -> Callable[[nn.Module, Any], None]:
        def enter(module: nn.Module, arguments: Any) -> None:
            given = next((a for a in arguments if isinstance(a, Tensor)), None)
            stack.append(Running(name, module, given))

        return enter

    def leave(*_: Any) -> None:
        stack.pop()

    handles: list[Any] = []
    for name, module in model.named_modules():
        handles.append(module.register_forward_pre_hook(entering(name)))
        handles.append(module.register_forward_hook(leave, always_call=True))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
