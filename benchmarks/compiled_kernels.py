"""How many kernels `torch.compile` generates for one layer, forward and backward: what a GPU would launch, about.

    python benchmarks/compiled_kernels.py

Counted on the CPU; the groups, the prior, the inflation and the moving statistics are inside. Not run on a GPU.
"""

from __future__ import annotations

import torch
from torch import nn
from torch._inductor import metrics

from bkn_core.filter.kalman import Gaussian
from bkn_core.layers.batch_kalman import BatchKalmanNorm2d


def kernels(kind: str, layout: torch.memory_format) -> tuple[int, int]:
    """Compile a layer in one graph and return its kernels of the forward and of the backward."""
    torch._dynamo.reset()
    metrics.reset()
    x = torch.randn(8, 16, 12, 12).contiguous(memory_format=layout).requires_grad_()
    prior = Gaussian(torch.zeros(16, requires_grad=True), torch.ones(16, requires_grad=True))
    kalman, batch = BatchKalmanNorm2d(16, statistics_batch_size=2, innovation=True), nn.BatchNorm2d(16)
    layer = torch.compile(lambda x: kalman(x, prior) if kind == "BKN" else batch(x), fullgraph=True)
    y = layer(x)
    forward = metrics.generated_kernel_count
    y.backward(torch.randn_like(y))
    return forward, metrics.generated_kernel_count - forward


def main() -> None:
    """Print the table."""
    print("| layout | layer | kernels forward | backward |\n|---|---|---|---|")
    for name, layout in (("channels last", torch.channels_last), ("channels first", torch.contiguous_format)):
        for kind in ("BKN", "BN"):
            print(f"| {name} | {kind} | " + " | ".join(map(str, kernels(kind, layout))) + " |", flush=True)


if __name__ == "__main__":
    main()
