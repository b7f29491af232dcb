"""Training with several processes, as torchrun starts them: one model replica each, gradients averaged.

Statistics groups never cross a process: a step exchanges gradients, the loss, innovations, sensitivities and moving
statistics only. So all processes remember the same, and what the main one saves is what each of them goes on from.
Checked with gloo on the CPU; not run on several GPUs.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import re
from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch import Tensor, nn

from bkn_core.engine.device import choose_device
from bkn_core.errors import DeviceError, RecipeError
from bkn_core.recipe import BatchConfig

_START = "Start several processes with `bkn train --nproc N` or torchrun; for one, unset WORLD_SIZE."


@dataclasses.dataclass(frozen=True)
class World:
    """This process among all that train together."""

    device: torch.device
    rank: int = 0
    size: int = 1

    @property
    def is_main(self) -> bool:
        """Whether this process writes files and reports."""
        return self.rank == 0

    def wrap(self, model: nn.Module) -> nn.Module:
        """Return the model that averages its gradients over the processes."""
        if self.size == 1:
            return model
        devices = [self.device] if self.device.type == "cuda" else None
        return nn.parallel.DistributedDataParallel(model, device_ids=devices, broadcast_buffers=False)

    def average_(self, tensors: list[Tensor]) -> None:
        """Average tensors in place over the processes, in one exchange."""
        if self.size == 1 or not tensors:
            return
        joint = torch.cat([tensor.flatten() for tensor in tensors])
        dist.all_reduce(joint)
        means = torch.split(joint.div_(self.size), [tensor.numel() for tensor in tensors])
        for tensor, mean in zip(tensors, means, strict=True):
            tensor.copy_(mean.view_as(tensor))

    def follow_(self, tensors: list[Tensor]) -> None:
        """Take over, in place, the main process's tensors."""
        if self.size > 1:
            for tensor in tensors:
                dist.broadcast(tensor, 0)

    def total(self, value: Tensor) -> Tensor:
        """Return the sum of a value over the processes."""
        if self.size > 1:
            dist.all_reduce(value)
        return value

    def images_per_pass(self, batch: BatchConfig) -> int:
        """Return the images of one forward pass of this process: fewer where all together would exceed the gradient's.

        Raises:
            RecipeError: the processes cannot share the gradient batch in whole statistics groups.
        """
        images = min(batch.per_device, batch.gradient // self.size)
        if images == 0 or images % batch.statistics or batch.gradient % (images * self.size):
            raise RecipeError(
                f"batch.gradient is {batch.gradient}, which {self.size} processes cannot share by {images} images each",
                f"Give a multiple of {self.size} processes times batch.per_device, in groups of {batch.statistics}.",
            )
        return images

    def barrier(self) -> None:
        """Wait for all processes."""
        if self.size > 1:
            dist.barrier()

    def any(self, flag: bool) -> bool:
        """Whether the flag is set in any process, so that all stop at the same step."""
        if self.size == 1:
            return flag
        shared = torch.tensor(float(flag), device=self.device)
        dist.all_reduce(shared, op=dist.ReduceOp.MAX)
        return bool(shared.item())


def process_place() -> tuple[int, int, int]:
    """Return what the environment says of this process: how many there are, its rank, its rank on this machine.

    Raises:
        RecipeError: WORLD_SIZE, RANK, LOCAL_RANK or MASTER_PORT is no number in its range, or one that is needed lacks.
    """
    size = _number("WORLD_SIZE", 1, 2**16, default="1")
    if size == 1:
        return 1, 0, 0
    if "BKN_RENDEZVOUS" not in os.environ:
        _number("MASTER_PORT", 0, 2**16 - 1)
        if not os.environ.get("MASTER_ADDR"):
            raise RecipeError("the environment has a WORLD_SIZE, but no MASTER_ADDR", _START)
    return size, _number("RANK", 0, size - 1), _number("LOCAL_RANK", 0, size - 1, default="0")


def _number(name: str, lowest: int, highest: int, *, default: str = "") -> int:
    text = os.environ.get(name, default)
    if not re.fullmatch("[0-9]{1,9}", text) or not lowest <= int(text) <= highest:
        raise RecipeError(f"the environment's {name} is {text!r}; it is a number from {lowest} to {highest}", _START)
    return int(text)


@contextlib.contextmanager
def join_world(device: str) -> Iterator[World]:
    """Join the processes that torchrun started, or be alone; leave them at the end.

    Raises:
        RecipeError: the environment's words for this process make no sense.
        DeviceError: the device is not there, or the processes do not find each other.
    """
    size, rank, local = process_place()
    chosen = choose_device(device)
    if size == 1:
        yield World(chosen)
        return
    if chosen.type == "cuda":
        chosen = choose_device(f"cuda:{local}")
        torch.cuda.set_device(chosen)
    backend, file = "nccl" if chosen.type == "cuda" else "gloo", os.environ.get("BKN_RENDEZVOUS")
    try:
        if file is None:
            dist.init_process_group(backend)
        else:  # a port, as of torchrun, would be open to the network
            store = dist.FileStore(file, size)  # type: ignore[attr-defined]
            dist.init_process_group(backend, store=store, rank=rank, world_size=size)
    except (RuntimeError, ValueError) as error:
        raise DeviceError(f"the {size} processes do not find each other: {error}", _START) from error
    try:
        yield World(chosen, dist.get_rank(), dist.get_world_size())
    finally:
        dist.destroy_process_group()
