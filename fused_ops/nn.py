"""Drop-in layers: the parameters, buffers, options and state_dict of their `torch.nn` namesakes, on fused ops."""

import torch

from fused_ops import functional as F
from fused_ops.ops._activations import check_activation

__all__ = ["BatchNorm1d", "BatchNorm2d", "BatchNorm3d", "CrossEntropyLoss"]


class _BatchNorm(torch.nn.modules.batchnorm._BatchNorm):
    """What `BatchNorm1d/2d/3d` share: which statistics to use, and how far the running ones move.

    `activation` is that of `fused_ops.functional.batch_norm`, and so is the `residual` that `forward` takes.
    """

    def __init__(self, *args, activation=None, **kwargs):
        super().__init__(*args, **kwargs)
        check_activation(activation)
        self.activation = activation

    def extra_repr(self):
        return super().extra_repr() + (f", activation={self.activation!r}" if self.activation else "")

    def forward(self, input, residual=None):
        self._check_input_dim(input)
        tracks = self.track_running_stats or not self.training
        mean, var = (self.running_mean, self.running_var) if tracks else (None, None)
        momentum, averages = self.momentum or 0.0, False
        if self.training and self.track_running_stats and self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
            averages = self.momentum is None  # then the running statistics are the plain mean over all batches so far
        if averages:
            mean, var, momentum = mean.clone(), var.clone(), 1.0  # to take this batch's own
        y = F.batch_norm(
            input,
            mean,
            var,
            self.weight,
            self.bias,
            self.training or (self.running_mean is None and self.running_var is None),
            momentum,
            self.eps,
            activation=self.activation,
            residual=residual,
        )
        if averages:
            share = self.num_batches_tracked.to(mean.dtype).reciprocal()
            self.running_mean.lerp_(mean, share)
            self.running_var.lerp_(var, share)
        return y


class BatchNorm1d(_BatchNorm, torch.nn.BatchNorm1d):
    """`torch.nn.BatchNorm1d` (same arguments, and `activation`) on the fused op: input (N, C) or (N, C, L)."""


class BatchNorm2d(_BatchNorm, torch.nn.BatchNorm2d):
    """`torch.nn.BatchNorm2d` (same arguments, and `activation`) on the fused op: input (N, C, H, W)."""


class BatchNorm3d(_BatchNorm, torch.nn.BatchNorm3d):
    """`torch.nn.BatchNorm3d` (same arguments, and `activation`) on the fused op: input (N, C, D, H, W)."""


class CrossEntropyLoss(torch.nn.CrossEntropyLoss):
    """`torch.nn.CrossEntropyLoss` (same arguments) on the fused op: see `fused_ops.functional.cross_entropy`."""

    def forward(self, input, target):
        return F.cross_entropy(
            input,
            target,
            self.weight,
            ignore_index=self.ignore_index,
            reduction=self.reduction,
            label_smoothing=self.label_smoothing,
        )
