"""Synchronised batch normalisation on CPUs, where `torch.nn.SyncBatchNorm` does not run.

It is made of tensor operations around a differentiable sum over processes, so autograd carries the gradient
through the statistics of all processes' images. Axes: B images of this process, c channels, spatial axes.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm


class CpuSyncBatchNorm(_BatchNorm):
    """Replaces a BatchNorm layer and keeps its parameters and statistics.

    Args:
        layer: The layer, whose parameters and buffers become this one's.
        total: Sum over all processes, differentiable.
    """

    def __init__(self, layer: _BatchNorm, total: Callable[[Tensor], Tensor]) -> None:
        super().__init__(
            layer.num_features, layer.eps, layer.momentum, layer.affine, layer.track_running_stats
        )
        self.total = total
        # The same tensors and names, so state dicts fit one process as well as many.
        self.weight, self.bias = layer.weight, layer.bias
        for name, statistic in layer.named_buffers():
            setattr(self, name, statistic)
        self.train(layer.training)

    def forward(self, inputs: Tensor) -> Tensor:
        """Normalise (B, c, …) by the statistics of all processes' images; B may be 0 on some of them."""
        # Without sums over processes: in evaluation each may have another number of batches.
        if not self.training:
            return super().forward(inputs)
        # In float32 at least: sums over a batch lose too much in bfloat16.
        values = inputs.to(torch.promote_types(inputs.dtype, torch.float32))
        axes = (0, *range(2, values.ndim))
        shape = (1, -1, *[1] * (values.ndim - 2))
        count = values.numel() // values.shape[1]
        # One all-reduce for sums and count. Processes may have different numbers of images.
        totals = self.total(torch.cat((values.sum(axes), values.new_tensor([count]))))
        number = totals[-1].detach()
        mean = totals[:-1] / number
        # Centred first, at the price of a second sum: E[x^2] - mean^2 cancels where the mean is large.
        centred = values - mean.reshape(shape)
        variance = self.total(centred.square().sum(axes)) / number
        self._update_running(mean.detach(), variance.detach() * number / (number - 1.0))
        normalised = centred * torch.rsqrt(variance + self.eps).reshape(shape)
        if self.affine:
            normalised = normalised * self.weight.reshape(shape) + self.bias.reshape(shape)
        return normalised.to(inputs.dtype)

    def _update_running(self, mean: Tensor, variance: Tensor) -> None:
        """Update the running statistics; as in torch, with the unbiased variance."""
        if self.running_mean is None or self.running_var is None or self.num_batches_tracked is None:
            return
        self.num_batches_tracked.add_(1)
        weight = 1.0 / float(self.num_batches_tracked) if self.momentum is None else self.momentum
        self.running_mean.lerp_(mean.to(self.running_mean.dtype), weight)
        self.running_var.lerp_(variance.to(self.running_var.dtype), weight)

    def _check_input_dim(self, input: Tensor) -> None:
        """Accept any shape: this layer replaces those of every dimension."""


def convert_sync_batch_norm(module: nn.Module, total: Callable[[Tensor], Tensor]) -> None:
    """Replace every BatchNorm layer inside a module, under its own name."""
    for name, child in module.named_children():
        if isinstance(child, _BatchNorm):
            setattr(module, name, CpuSyncBatchNorm(child, total))
        else:
            convert_sync_batch_norm(child, total)
