"""Drop-in layers: the parameters, buffers, options and state_dict of their `torch.nn` namesakes, on fused ops."""

import torch

from fused_ops import functional as F

__all__ = ["BatchNorm1d", "BatchNorm2d", "BatchNorm3d", "CrossEntropyLoss"]


class _BatchNorm(torch.nn.modules.batchnorm._BatchNorm):
    """What `BatchNorm1d/2d/3d` share: which statistics to use, and how far the running ones move."""

    def forward(self, input):
        self._check_input_dim(input)
        momentum = self.momentum
        if self.training and self.track_running_stats and self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
            if momentum is None:  # then the running statistics are the plain mean over all batches so far
                momentum = 1 / self.num_batches_tracked.item()
        tracks = self.track_running_stats or not self.training
        return F.batch_norm(
            input,
            self.running_mean if tracks else None,
            self.running_var if tracks else None,
            self.weight,
            self.bias,
            self.training or self.running_mean is None,
            momentum or 0.0,
            self.eps,
        )


class BatchNorm1d(_BatchNorm, torch.nn.BatchNorm1d):
    """`torch.nn.BatchNorm1d` (same arguments) on the fused op: input (N, C) or (N, C, L)."""


class BatchNorm2d(_BatchNorm, torch.nn.BatchNorm2d):
    """`torch.nn.BatchNorm2d` (same arguments) on the fused op: input (N, C, H, W)."""


class BatchNorm3d(_BatchNorm, torch.nn.BatchNorm3d):
    """`torch.nn.BatchNorm3d` (same arguments) on the fused op: input (N, C, D, H, W)."""


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
