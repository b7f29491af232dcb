"""States that lie with a digest that fits: refused before anything is believed, or the run goes on as it would have."""

from __future__ import annotations

import copy
import dataclasses
import functools
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_runs import STEPS, assert_same_bits, stop_at, tiny, training
from torch import Tensor

from bkn_core.engine.checkpoint import Weights, load_state, save_state
from bkn_core.engine.loop import train
from bkn_core.errors import InputError, InterruptedRun

WORDS = {"sgd": ("train.ema=0.9",), "adamw": ("optim.name=adamw", "optim.nesterov=false")}


class Run:
    """A run after its first step: its state then, and the state a step later."""

    def __init__(self, name: str) -> None:
        self.training = training(*WORDS[name])
        self.steps = list(self.training.epoch(0))
        self.training.take_step(0, self.steps[0])
        self.before = copy.deepcopy(self.training.state())
        self.after = self.step_from(self.before)

    def step_from(self, state: dict[str, Any]) -> dict[str, Any]:
        self.training.restore(copy.deepcopy(state))
        self.training.take_step(0, self.steps[1])
        return copy.deepcopy(self.training.state())


@functools.cache
def run_of(name: str) -> Run:
    return Run(name)


def leaves(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The paths of all that a state holds, containers included."""
    keys = list(value) if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ()
    return [found for key in keys for found in ((*path, key), *leaves(value[key], (*path, key)))]


def of_another_type(tensor: Tensor) -> list[Any]:
    strange = [torch.int8, torch.float64, torch.float16, torch.bool, torch.complex64]
    return [tensor.to(kind) for kind in strange if kind != tensor.dtype]


def lies(value: Any) -> list[Any]:
    """What could stand in a value's place and must not."""
    if isinstance(value, Tensor):
        shapes = [
            tensor
            for tensor in (value[..., None], value.flatten()[:1], torch.zeros(1000))
            if tensor.shape != value.shape
        ]
        wrong = (
            [torch.full_like(value, math.nan), torch.full_like(value, -math.inf)] if value.is_floating_point() else []
        )
        return [*shapes, *of_another_type(value), *wrong, 7, None, "text", {}, []]
    if isinstance(value, (dict, list)):
        return [None, 7, "text", torch.zeros(3)]
    return [10**12, -7, math.nan, math.inf, "text", [], {}, torch.zeros(2)]


def at(state: Any, path: tuple[Any, ...]) -> Any:
    for key in path:
        state = state[key]
    return state


def lied(state: dict[str, Any], draw: Callable[..., Any]) -> str:
    """Replace, remove or add something, in place, in a part of the state that is drawn first."""
    section = draw(st.sampled_from(list(state)))
    path = draw(st.sampled_from([(section,), *leaves(state[section], (section,))]))
    holder, key = at(state, path[:-1]), path[-1]
    kind = draw(st.sampled_from(["replace", "replace", "replace", "remove", "add"]))
    if kind == "replace":
        holder[key] = draw(st.sampled_from(lies(holder[key])))
    elif kind == "add":
        holder.append(torch.zeros(3)) if isinstance(holder, list) else holder.update(stranger=torch.zeros(3))
    elif path[:2] != ("optimizer", "state") or len(path) != 3:  # a parameter without a gradient has no moments
        del holder[key]
    return f"{kind} {path}"


def refused_or_the_same(name: str, draw: Callable[..., Any]) -> None:
    run = run_of(name)
    state = copy.deepcopy(run.before)
    what = lied(state, draw)
    try:
        after = run.step_from(state)
    except InputError as error:
        assert re.match(
            "the saved state does not fit|the saved state is of other parts|the data is not", error.message
        ), what
    else:
        assert_same_bits(after, run.after, what)


@pytest.mark.parametrize("name", WORDS)
@settings(max_examples=10)
@given(data=st.data())
def test_a_state_that_lies_is_refused_or_does_not_count(name: str, data: st.DataObject) -> None:
    refused_or_the_same(name, data.draw)


@pytest.mark.slow
@pytest.mark.parametrize("name", WORDS)
@settings(max_examples=300)
@given(data=st.data())
def test_many_states_that_lie_are_refused_or_do_not_count(name: str, data: st.DataObject) -> None:
    refused_or_the_same(name, data.draw)


def replace(path: str, value: Any) -> Callable[[dict[str, Any]], None]:
    *keys, last = (int(key) if key.isdecimal() else key for key in path.split("/"))
    return lambda state: at(state, tuple(keys)).update({last: value})


LIES = {
    "no schema": lambda state: state.pop("schema"),
    "another schema": replace("schema", "bkn.state/2"),
    "a step without end": replace("step", 10**12),
    "a step before the first": replace("step", -1),
    "a step that is a truth": replace("step", True),
    "an epoch of other steps": replace("measured", 1),
    "a best that was not measured": replace("best", {"top1": 0.5, "epoch": 0}),
    "an average that is no number": lambda state: state["average"]["module.head.bias"].fill_(math.nan),
    "a negative moving variance": lambda state: state["model"]["features.1.running_var"].neg_(),
    "weights of another type": replace("model/head.weight", torch.zeros(10, 128, dtype=torch.int8)),
    "a gain above 1": lambda state: state["model"]["features.1.fixed_gain"].fill_(1.5),
    "a moment of another shape": replace("optimizer/state/1/momentum_buffer", torch.zeros(1)),
    "a moment of another type": replace("optimizer/state/1/momentum_buffer", torch.zeros(32, 32, 3, 3).double()),
    "a moment of another optimizer": replace("optimizer/state/1/exp_avg", torch.zeros(32, 32, 3, 3)),
    "moments of a stranger": replace("optimizer/state/99", {"momentum_buffer": torch.zeros(3)}),
    "data without classes": lambda state: state["data"].pop("classes"),
    "classes that are a number": replace("data/classes", 7),
    "a part of the data that is a text": replace("data/training", "text"),
    "a recipe without a section": lambda state: state["recipe"].pop("optim"),
    "more losses than steps": replace("losses", torch.zeros(100)),
    "no generator": replace("random", torch.zeros(5056, dtype=torch.uint8)),
    "a generator of one byte": replace("random", torch.zeros(1, dtype=torch.uint8)),
}


@pytest.mark.parametrize("name", LIES)
def test_a_lie_is_refused_and_nothing_is_taken_up(name: str) -> None:
    run = run_of("sgd")
    state = copy.deepcopy(run.before)
    LIES[name](state)
    run.training.restore(copy.deepcopy(run.before))
    with pytest.raises(InputError, match="the saved state does not fit"):
        run.training.restore(state)
    assert_same_bits(run.training.state(), run.before)


def test_a_moment_with_other_strides_is_laid_out_as_its_parameter() -> None:
    run = run_of("sgd")
    state = copy.deepcopy(run.before)
    for moments in state["optimizer"]["state"].values():
        if (moment := moments["momentum_buffer"]).dim() > 1:
            moments["momentum_buffer"] = moment.transpose(0, 1).contiguous().transpose(0, 1)
    assert_same_bits(run.step_from(state), run.after)


def test_a_lying_state_in_a_run_folder_ends_its_resumption(tmp_path: Path) -> None:
    with pytest.raises(InterruptedRun):
        train(tiny(), out=tmp_path / "run", should_stop=stop_at(1))
    path = tmp_path / "run" / "checkpoints" / "last.state.pt"
    save_state(path, load_state(path) | {"step": STEPS + 1})
    with pytest.raises(InputError, match=f"step: {STEPS + 1} is above {STEPS}"):
        train(tiny(), resume=tmp_path / "run")


@pytest.mark.parametrize(
    ("name", "lie", "words"),
    [
        ("head.bias", torch.full((10,), math.nan), "not finite"),
        ("head.weight", torch.zeros(10, 128, dtype=torch.int8), "type torch.int8"),
        ("features.1.running_var", -torch.ones(32), "values outside 0.0 to inf"),
        ("features.1.num_batches_tracked", torch.tensor(-1), "values outside 0"),
    ],
)
def test_weights_that_lie_are_not_measured(name: str, lie: Tensor, words: str) -> None:
    run = run_of("sgd").training
    weights = Weights(run.model.state_dict(), run.recipe, run.splits.classes, run.splits.preprocess, "")
    weights.model()
    with pytest.raises(InputError, match=rf"the recipe's model: {name} has .*{words}"):
        dataclasses.replace(weights, tensors={**weights.tensors, name: lie}).model()
