"""What the saved state of a run must be before a training goes on from it: every key, type, shape and range."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Literal

import torch
from pydantic import AliasChoices, BaseModel, ConfigDict, Field, ValidationError
from torch import Tensor

from bkn_core.engine.checkpoint import check_recipe, tensor_faults
from bkn_core.errors import InputError

if TYPE_CHECKING:
    from bkn_core.engine.training import Training

_MOMENTS = {torch.optim.SGD: ("momentum_buffer",), torch.optim.AdamW: ("step", "exp_avg", "exp_avg_sq")}
Count = Annotated[int, Field(ge=0)]
Tensors = dict[str, Tensor]


class _Part(BaseModel):
    model_config = ConfigDict(
        extra="forbid", strict=True, allow_inf_nan=False, arbitrary_types_allowed=True, populate_by_name=True
    )


class _Data(_Part):
    model_config = ConfigDict(extra="allow")
    __pydantic_extra__: dict[str, dict[str, int | str]]  # by part, such as "training"
    classes: list[str]


class _Best(_Part):
    figure: Annotated[float, Field(ge=-1, le=1, validation_alias=AliasChoices("top1", "mean_iou"))]
    epoch: Count


class _Group(_Part):
    model_config = ConfigDict(extra="ignore")  # all else that a group is trained with stands in the recipe
    params: list[int]
    lr: Annotated[float, Field(ge=0)]


class _Optimizer(_Part):
    state: dict[Annotated[int, Field(strict=False)], Tensors]  # files have texts for keys
    param_groups: list[_Group]


class _Scaler(_Part):
    scale: Annotated[float, Field(gt=0)]
    growth_factor: Annotated[float, Field(gt=1)]
    backoff_factor: Annotated[float, Field(gt=0, lt=1)]
    growth_interval: Annotated[int, Field(ge=1)]
    growth_tracker: Annotated[int, Field(ge=0, alias="_growth_tracker")]


class _Empty(_Part):
    pass


class _State(_Part):
    kind: Annotated[Literal["bkn.state/1"], Field(alias="schema")]
    recipe: dict[str, dict[str, Any]]
    data: _Data
    step: Count
    measured: Count
    skipped: Count
    seconds: Annotated[float, Field(ge=0)]
    images: Count
    best: _Best
    losses: Tensor
    epoch_loss: Tensor
    model: Tensors
    average: Tensors
    optimizer: _Optimizer
    scaler: _Scaler | _Empty
    random: Tensor
    random_cuda: Tensor


def checked_state(saved: dict[str, Any], training: Training) -> dict[str, Any]:
    """Return a saved state in the form that a training goes on from.

    Args:
        saved: what `load_state` gave.
        training: the run at its beginning.

    Raises:
        InputError: naming every key that a state of this run cannot have so.
    """
    try:
        state = _State.model_validate(saved)
    except (ValidationError, RecursionError) as error:
        details = error.errors(include_url=False) if isinstance(error, ValidationError) else []
        faults = [f"{'.'.join(map(str, detail['loc']))}: {detail['msg']}" for detail in details[:10]]
        raise _error(faults or ["it is nested too deep"]) from error
    check_recipe(state.recipe, training.recipe)
    model, average = training.model, training.average
    faults = _counter_faults(state, training) + _loss_faults(state, training) + _random_faults(state)
    faults += tensor_faults(model.state_dict(), state.model)
    faults += tensor_faults({} if average is None else average.state_dict(), state.average)
    faults += _moment_faults(state.optimizer, training.optimizer)
    if faults:
        raise _error(faults)
    return saved | {"optimizer": _own_layout(state.optimizer, training.optimizer)}


def _counter_faults(state: _State, training: Training) -> list[str]:
    """Compare the counters with each other and with the length of the run."""
    epochs, length = divmod(state.step, training.epoch_steps)
    measured = {epochs, epochs - 1} if length == 0 else {epochs}  # an epoch is saved before and after its measurement
    limits = {
        "step": (state.step, training.steps),
        "skipped": (state.skipped, state.step),
        "images": (state.images, training.plan.images * training.recipe.train.epochs),
        "best.epoch": (state.best.epoch, state.measured),
    }
    faults = [f"{name}: {value} is above {limit}" for name, (value, limit) in limits.items() if value > limit]
    if state.measured not in measured:
        faults.append(f"measured: {state.measured} epochs do not fit {state.step} steps")
    if (state.best.epoch == 0) != (state.best.figure < 0):
        faults.append(f"best: {state.best.figure} is no {training.task.word} of epoch {state.best.epoch}")
    return faults


def _loss_faults(state: _State, training: Training) -> list[str]:
    own = {"losses": torch.zeros(len(state.losses) if state.losses.dim() == 1 else 0)}
    own["epoch_loss"] = training.epoch_loss.cpu()
    if training.scaler.is_enabled():  # which may have seen an infinite loss
        own = {name: tensor + torch.inf for name, tensor in own.items()}
    faults = tensor_faults(own, {"losses": state.losses, "epoch_loss": state.epoch_loss})
    return faults if len(own["losses"]) <= state.step else [*faults, "losses: there are more than steps"]


def _random_faults(state: _State) -> list[str]:
    try:
        torch.Generator().set_state(state.random)
    except (RuntimeError, TypeError) as error:
        return [f"random: {str(error).splitlines()[0]}"]
    on_gpu = state.random_cuda.dtype == torch.uint8 and state.random_cuda.shape == (16,)
    return [] if on_gpu or state.random_cuda.shape == (0,) else ["random_cuda: it is no state of a generator"]


def _moment_faults(saved: _Optimizer, optimizer: torch.optim.Optimizer) -> list[str]:
    """Compare what the optimizer remembers of each parameter with the parameter: a step believes its shape and type."""
    if [group.params for group in saved.param_groups] != [g["params"] for g in optimizer.state_dict()["param_groups"]]:
        return ["optimizer.param_groups: they are not those of the recipe's model"]
    own: Tensors = {}
    for index, parameter in enumerate(_parameters(optimizer)):
        if index in saved.state:  # a parameter without a gradient has nothing to remember
            for name in _MOMENTS[type(optimizer)]:
                own[f"optimizer.state.{index}.{name}"] = torch.zeros(()) if name == "step" else parameter
    found = {f"optimizer.state.{i}.{name}": t for i, moments in saved.state.items() for name, t in moments.items()}
    return tensor_faults(own, found)


def _own_layout(saved: _Optimizer, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Return the optimizer's state, each moment with the strides of its parameter, and the run's own groups."""
    parameters = _parameters(optimizer)
    state = {
        index: {
            name: tensor if name == "step" else torch.empty_like(parameters[index]).copy_(tensor)
            for name, tensor in moments.items()
        }
        for index, moments in saved.state.items()
    }
    own = optimizer.state_dict()["param_groups"]
    groups = [{**group, "lr": other.lr} for group, other in zip(own, saved.param_groups, strict=True)]
    return {"state": state, "param_groups": groups}


def _parameters(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def _error(faults: list[str]) -> InputError:
    return InputError(f"the saved state does not fit this run: {'; '.join(faults)}", "Resume from another run.")
