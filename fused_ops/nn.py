"""Drop-in layers: the parameters, buffers, options and state_dict of their `torch.nn` namesakes, on fused ops."""

import math

import torch

from fused_ops import functional as F
from fused_ops.ops._activations import check_activation

__all__ = ["MLP", "BatchNorm1d", "BatchNorm2d", "BatchNorm3d", "CrossEntropyLoss", "LinearCrossEntropyLoss"]


class _BatchNorm(torch.nn.modules.batchnorm._BatchNorm):
    """What `BatchNorm1d/2d/3d` share: which statistics to use, and how far the running ones move.

    `activation` is that of `fused_ops.functional.batch_norm`, and so is the `residual` that `forward` takes. (What
    makes another layer of one, as `SyncBatchNorm.convert_sync_batchnorm` does, knows nothing of it, and drops it.)
    """

    activation = None  # of a layer that `convert` has made ours

    def __init__(
        self,
        num_features,
        eps=1e-5,
        momentum=0.1,
        affine=True,
        track_running_stats=True,
        device=None,
        dtype=None,
        *,
        activation=None,
        **kwargs,  # such as `bias`, which torch has from 2.13 on
    ):
        super().__init__(num_features, eps, momentum, affine, track_running_stats, device, dtype, **kwargs)
        check_activation(activation)
        self.activation = activation

    def extra_repr(self):
        return super().extra_repr() + (f", activation={self.activation!r}" if self.activation else "")

    def forward(self, input, residual=None):
        traced = isinstance(input, torch.fx.Proxy)  # which has no shape, and would not record that a batch is counted
        if not traced:
            self._check_input_dim(input)
        tracks = self.track_running_stats or not self.training
        mean, var = (self.running_mean, self.running_var) if tracks else (None, None)
        momentum, averages, batches = self.momentum or 0.0, False, self.num_batches_tracked
        if self.training and self.track_running_stats and batches is not None:
            if traced and self.momentum is None:
                raise NotImplementedError("torch.fx cannot trace batch norm with momentum=None in training")
            if not traced:
                batches.add_(1)
            # without a momentum the running statistics are the plain mean over all batches so far
            averages = self.momentum is None and mean is not None
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
            share = batches.to(mean.dtype).reciprocal()
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
    """`torch.nn.CrossEntropyLoss` (same arguments) on the fused op: see `fused_ops.functional.cross_entropy`.

    `z_loss`, `softcap` and `inplace_grad` are its further options.
    """

    z_loss, softcap, inplace_grad = 0.0, None, False  # of a loss that `convert` has made ours

    def __init__(self, *args, z_loss=0.0, softcap=None, inplace_grad=False, **kwargs):
        super().__init__(*args, **kwargs)
        self.z_loss, self.softcap, self.inplace_grad = z_loss, softcap, inplace_grad

    def forward(self, input, target):
        return F.cross_entropy(
            input,
            target,
            self.weight,
            ignore_index=self.ignore_index,
            reduction=self.reduction,
            label_smoothing=self.label_smoothing,
            z_loss=self.z_loss,
            softcap=self.softcap,
            inplace_grad=self.inplace_grad,
        )


class LinearCrossEntropyLoss(torch.nn.modules.loss._WeightedLoss):
    """`torch.nn.LinearCrossEntropyLoss` (torch 2.13; same arguments and state_dict) on the fused op.

    A linear layer to `num_classes` logits (for each of `out_features` losses an example, if given) and their
    cross-entropy: see `fused_ops.functional.linear_cross_entropy`, which has the further options `chunk_size`, `z_loss`
    and `softcap`, too. Input (N, in_features) or (in_features,).
    """

    chunk_size, z_loss, softcap = None, 0.0, None  # of a loss that `convert` has made ours

    def __init__(
        self,
        in_features,
        num_classes,
        *,
        out_features=(),
        bias=False,
        device=None,
        dtype=None,
        reduction="mean",
        weight=None,
        ignore_index=None,
        label_smoothing=0.0,
        options=None,
        chunk_size=None,
        z_loss=0.0,
        softcap=None,
    ):
        if weight is not None and weight.shape != (num_classes,):
            raise RuntimeError(f"expected weight shape to be {(num_classes,)}, got {tuple(weight.shape)}")
        if not 0 <= label_smoothing <= 1:
            raise RuntimeError(f"expected label_smoothing to be in range [0, 1], got {label_smoothing}")
        super().__init__(weight=weight, reduction=reduction)
        self.num_classes, self.out_features = num_classes, tuple(out_features)
        self.ignore_index, self.label_smoothing = ignore_index, label_smoothing
        self.options, self.chunk_size = options, chunk_size
        self.z_loss, self.softcap = z_loss, softcap
        outputs = math.prod(self.out_features, start=num_classes)
        self.linear = torch.nn.Linear(in_features, outputs, bias=bias, device=device, dtype=dtype)

    def forward(self, input, target):
        shape, bias = (self.num_classes, *self.out_features), self.linear.bias
        return F.linear_cross_entropy(
            input,
            self.linear.weight.reshape(*shape, self.linear.in_features),
            target,
            linear_bias=None if bias is None else bias.reshape(shape),
            weight=self.weight,
            reduction=self.reduction,
            ignore_index=self.ignore_index,
            label_smoothing=self.label_smoothing,
            options=self.options,
            chunk_size=self.chunk_size,
            z_loss=self.z_loss,
            softcap=self.softcap,
        )

    def extra_repr(self):
        shown = ("num_classes", "out_features", "reduction", "ignore_index", "label_smoothing", "options", "chunk_size")
        settings = ", ".join(f"{name}={getattr(self, name)}" for name in (*shown, "z_loss", "softcap"))
        return f"in_features={self.linear.in_features}, bias={self.linear.bias is not None}, {settings}"


class MLP(torch.nn.Module):
    """The lecture's network, whose loss is one op: see `fused_ops.functional.mlp`.

    An embedding of `block_size` characters, a linear layer to `hidden_features`, batch norm, tanh and a linear layer to
    `num_embeddings` classes. Its parameters, for any optimiser, are those of the modules `embedding`, `linear`, `norm`
    and `output`. These run where the logits are asked for; the loss takes their tensors alone, so no hook sees it.
    With another layer in the place of one of these (a parametrized one is another), or another kind of norm than it was
    made with, the loss is that of the logits, and there is no `sgd_steps`.
    """

    def __init__(
        self,
        num_embeddings,
        embedding_dim,
        block_size,
        hidden_features,
        eps=1e-5,
        momentum=0.1,
        device=None,
        dtype=None,
    ):
        super().__init__()
        made = {"device": device, "dtype": dtype}
        self.embedding = torch.nn.Embedding(num_embeddings, embedding_dim, **made)
        self.linear = torch.nn.Linear(block_size * embedding_dim, hidden_features, **made)
        self.norm = BatchNorm1d(hidden_features, eps=eps, momentum=momentum, activation="tanh", **made)
        self.output = torch.nn.Linear(hidden_features, num_embeddings, **made)

    def forward(self, input, target=None):
        """The logits of contexts (N, block_size), (N, num_embeddings); or with targets, (N,), their mean loss, ()."""
        if target is None:
            return self.output(self.norm(self.linear(self.embedding(input).flatten(1))))
        if not self._is_one_op():
            return F.cross_entropy(self(input), target)
        if self.norm.training:
            self.norm.num_batches_tracked.add_(1)
        return F.mlp(input, target, *self._tensors(), self.norm.training, self.norm.momentum, self.norm.eps)

    def sgd_steps(self, input, target, *, lr, steps, batch_size, generator=None):
        """Train by plain gradient descent, all steps in one call: see `fused_ops.functional.mlp_sgd_steps`.

        Each step normalises by its minibatch, whether the module is in training or in evaluation.
        """
        if not self._is_one_op():
            raise RuntimeError(f"MLP.sgd_steps is made for the layers that MLP makes, but got {self}")
        self.norm.num_batches_tracked.add_(steps)
        norm = {"momentum": self.norm.momentum, "eps": self.norm.eps}
        draw = {"steps": steps, "batch_size": batch_size, "generator": generator}
        return F.mlp_sgd_steps(input, target, *self._tensors(), lr=lr, **draw, **norm)

    def _is_one_op(self):
        norm = self.norm
        layers = tuple(map(type, (self.embedding, self.linear, norm, self.output)))
        if layers != (torch.nn.Embedding, torch.nn.Linear, BatchNorm1d, torch.nn.Linear) or norm.momentum is None:
            return False
        kind = norm.activation, norm.affine, norm.bias is not None, norm.track_running_stats
        return kind == ("tanh", True, True, True) and norm.running_mean is not None

    def _tensors(self):
        linear, norm, output = self.linear, self.norm, self.output
        parameters = linear.weight, linear.bias, norm.weight, norm.bias, output.weight, output.bias
        return self.embedding.weight, *parameters, norm.running_mean, norm.running_var


def convert(model):
    """Make a model's `torch.nn.BatchNorm1d/2d/3d`, `CrossEntropyLoss` and `LinearCrossEntropyLoss` ours, in place.

    A layer stays the object that it is, with its parameters, buffers, options and hooks; its class alone becomes that
    of its namesake here. So an optimiser that has the parameters goes on, and checkpoints load both ways.

    Args:
        model: a `torch.nn.Module`, which may itself be such a layer. Convert it before `torch.compile`.

    Returns:
        The model. Layers of other classes are left alone, those derived from these among them (and lazy ones until
        their first batch): what they do may be something else.
    """
    for module in model.modules():
        if ours := _NAMESAKES.get(type(module)):
            module.__class__ = ours
    return model


_OURS = BatchNorm1d, BatchNorm2d, BatchNorm3d, CrossEntropyLoss, LinearCrossEntropyLoss  # the last from torch 2.13 on
_NAMESAKES = {getattr(torch.nn, ours.__name__): ours for ours in _OURS if hasattr(torch.nn, ours.__name__)}
