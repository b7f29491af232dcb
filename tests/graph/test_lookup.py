"""Modules found by path at every forward: what has moved is noticed."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref

import pytest
from torch import nn

from bkn_core.errors import ConversionError
from bkn_core.graph.lookup import Lookup, modules_of

PATHS = ["0", "1.0", "1.1.inner"]


def model() -> nn.Module:
    return nn.Sequential(nn.ReLU(), nn.Sequential(nn.Linear(2, 2), nn.ModuleDict({"inner": nn.Tanh()})))


def test_modules_are_found_in_the_order_of_their_paths() -> None:
    net, lookup = model(), Lookup(PATHS)
    for _ in range(2):
        assert [id(module) for module in lookup(net)] == [id(net.get_submodule(path)) for path in PATHS]


@pytest.mark.parametrize("path", ["0", "1", "1.0", "1.1", "1.1.inner"])
def test_a_replaced_module_or_parent_is_noticed(path: str) -> None:
    net, lookup = model(), Lookup(PATHS)
    lookup(net)
    parent, _, name = path.rpartition(".")
    net.get_submodule(parent)._modules[name] = copy.deepcopy(net.get_submodule(path))
    assert [id(module) for module in lookup(net)] == [id(net.get_submodule(path)) for path in PATHS]


def test_a_removed_module_is_missed() -> None:
    net, lookup = model(), Lookup(PATHS)
    lookup(net)
    del net[1][0]
    with pytest.raises(ConversionError, match="not where it was at conversion: Sequential"):
        lookup(net)


def test_another_model_is_looked_through() -> None:
    first, second, lookup = model(), model(), Lookup(PATHS)
    for net in (first, second, first):
        assert lookup(net)[0] is net[0]


def test_a_model_may_be_its_own_layer() -> None:
    net = nn.ReLU()
    assert Lookup([""])(net) == [net]
    assert Lookup([])(net) == []


def test_the_model_is_not_kept_alive_and_copies_know_nothing() -> None:
    net, lookup = model(), Lookup(PATHS)
    lookup(net)
    for other in (copy.deepcopy(lookup), pickle.loads(pickle.dumps(lookup))):
        assert other.paths == lookup.paths and other._found is None
    alive = weakref.ref(net)
    del net
    gc.collect()
    assert alive() is None


def test_modules_are_those_of_pytorch_in_its_order() -> None:
    net = model()
    shared = nn.ReLU()
    net.append(nn.Sequential(shared, nn.Sequential(shared, nn.Linear(2, 2)), net[0]))
    net.register_module("nothing", None)
    assert modules_of(net) == list(net.modules())
