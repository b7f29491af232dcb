"""A model with synchronized layers, and one process of several that train it: `python joint_batches.py RANK FOLDER`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bkn_core.convert import convert

CASES: dict[str, tuple[dict[str, Any], int]] = {  # what to convert with, and how many of 8 images the first process has
    "batch normalization": ({"gain": 1.0, "learn_gain": False}, 4),
    "network transition": ({"gain": 0.3}, 4),
    "unequal parts": ({"gain": 0.3}, 3),
    "an empty part": ({"gain": 0.3}, 8),
    "raw messages": ({"gain": 0.3, "message": "raw"}, 4),
    "full covariance": ({"gain": 0.3, "transition": "learned", "covariance": "full"}, 3),
    "groups of two": ({"gain": 0.3, "statistics_batch_size": 2, "innovation": False}, 4),
}


def build(norm: Any, name: str) -> nn.Module:
    """The converted model of a case, with drawn parameters."""
    torch.manual_seed(3)
    options = CASES[name][0]
    model = plain(norm)
    for layer in (model[1], model[4]):
        nn.init.uniform_(layer.weight, 0.5, 1.5)
        nn.init.normal_(layer.bias, 0.0, 0.3)
    return convert(model, torch.randn(2, 3, 4, 4), **{"statistics_batch_size": None, **options}).double().train()


def plain(norm: Any) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(3, 5, 3), norm(5), nn.ReLU(), nn.Conv2d(5, 4, 1), norm(4))


def joint_batch() -> tuple[Tensor, Tensor]:
    """Images, and what the sum of outputs is weighted with."""
    generator = torch.Generator().manual_seed(4)
    images = torch.randn(8, 3, 4, 4, generator=generator, dtype=torch.float64)
    return images + 2, torch.randn(8, 4, 2, 2, generator=generator, dtype=torch.float64)


def trained(model: nn.Module, part: slice = slice(None)) -> dict[str, Any]:
    """Two passes over part of the batch; outputs, gradients of the input, the gradients and the buffers."""
    images, weights = (t[part] for t in joint_batch())
    for _ in range(2):
        model.zero_grad()
        x = images.clone().requires_grad_()
        y = model(x)
        (y * weights).sum().backward()
    inner = model.module if isinstance(model, nn.parallel.DistributedDataParallel) else model
    gradients = {n: p.grad for n, p in inner.named_parameters() if p.grad is not None}
    return {"y": y.detach(), "x": x.grad, "gradients": gradients, "buffers": dict(inner.named_buffers())}


def main(rank: int, folder: Path) -> None:
    """Write what one process of two finds in every case."""
    torch.set_num_threads(1)
    store = torch.distributed.FileStore(str(folder / "store"), 2)
    torch.distributed.init_process_group("gloo", store=store, rank=rank, world_size=2)
    results = {}
    for name, (_, first) in CASES.items():
        model = nn.parallel.DistributedDataParallel(build(nn.SyncBatchNorm, name))
        results[name] = trained(model, slice(None, first) if rank == 0 else slice(first, None))
    torch.save(results, folder / f"{rank}.pt")
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]))
