"""Batch normalisation of each channel over the batch, forward in one op and backward in another.

    N  elements a channel (batch times positions)       γ, β  weight and bias, (C,)
    C  channels                                         μ, σ²  mean and biased variance, (C,)
    x  input, (N, C) or (N, C, d1, ...)                 ε  eps

    y = γ·x̂ + β        x̂ = (x − μ)·r        r = (σ² + ε)^-½ (`rstd`)

In training μ and σ² are the batch's own; in evaluation they are the running statistics, which are constants. The
running statistics follow the batch's, running ← (1 − momentum)·running + momentum·batch, where the variance that
enters is the unbiased one, σ²·N/(N − 1), although the batch itself is normalised by the biased one: this is
PyTorch's convention. (The lecture's network normalises by the unbiased one; `fused_ops.steps` has both.)
"""

import math
from typing import Optional, Tuple

import torch
from torch import Tensor

from fused_ops._op import accumulate_dtype, define, once_differentiable


def batch_norm_forward(
    input: Tensor,
    running_mean: Optional[Tensor],
    running_var: Optional[Tensor],
    weight: Optional[Tensor],
    bias: Optional[Tensor],
    training: bool,
    momentum: float,
    eps: float,
) -> Tuple[Tensor, Tensor, Tensor]:
    """y = γ·(x − μ)·r + β with r = (σ² + ε)^-½; in training the running statistics move towards μ and σ²·N/(N−1).

    Returns y, of the shape and dtype of the input, contiguous (or channels_last where the input is); the mean μ and
    rstd r, (C,), in the accumulate dtype. An empty batch leaves the running statistics as they are.
    """
    x = _dense(input).to(accumulate_dtype(input.dtype))  # (N, C, ...)
    N = x.numel() // max(x.shape[1], 1)
    if training:
        mean = x.mean(_all_but_channels(x))  # (C)
        var = (x - _per_channel(mean, x)).square().mean(_all_but_channels(x))  # (C), biased
        if N > 0 and running_mean is not None:
            running_mean.copy_((1 - momentum) * running_mean.to(x.dtype) + momentum * mean)
        if N > 0 and running_var is not None:
            unbiased_var = var * (N / (N - 1)) if N > 1 else var * float("nan")  # (C)
            running_var.copy_((1 - momentum) * running_var.to(x.dtype) + momentum * unbiased_var)
    else:
        mean, var = running_mean.to(x.dtype, copy=True), running_var.to(x.dtype)  # (C)
    rstd = (var + eps) ** -0.5  # (C)

    y = (x - _per_channel(mean, x)) * _per_channel(rstd, x)  # (N, C, ...)
    if weight is not None:
        y = _per_channel(weight.to(x.dtype), x) * y  # (N, C, ...)
    if bias is not None:
        y = y + _per_channel(bias.to(x.dtype), x)  # (N, C, ...)
    return y.to(input.dtype), mean, rstd


def batch_norm_backward(
    dy: Tensor, input: Tensor, weight: Optional[Tensor], mean: Tensor, rstd: Tensor, training: bool
) -> Tuple[Tensor, Tensor, Tensor]:
    """Gradient of y = γ·x̂ + β, with x̂ = (x − μ)·r and r = (σ² + ε)^-½ (σ² biased).

    μ and r depend on every row, so dx is dy less its parts along 1 and along x̂:

        dx = γ·r·( dy − mean(dy) − x̂·mean(dy·x̂) )      means over N

    The two sums are dβ and dγ: one reduction serves all three gradients. In evaluation μ and r are constants, and
    dx = γ·r·dy alone.

    The step that is not obvious: r = (σ² + ε)^-½ gives dr/dx_i = −r³·(x_i − μ)/N = −r²·x̂_i/N, the share of μ in σ²
    dropping out because Σ (x − μ) = 0. So dx_i = r·γdy_i, less its mean (through μ), less r·x̂_i·mean(γdy·x̂)
    (through r).

    Returns dx, of the shape, dtype and layout of y; dweight and dbias, (C,), in the accumulate dtype.
    """
    x = _dense(input).to(mean.dtype)  # (N, C, ...)
    dy = dy.to(mean.dtype)  # (N, C, ...)
    x_hat = (x - _per_channel(mean, x)) * _per_channel(rstd, x)  # (N, C, ...)
    dweight = (dy * x_hat).sum(_all_but_channels(x))  # (C)
    dbias = dy.sum(_all_but_channels(x))  # (C)

    scale = rstd if weight is None else weight.to(x.dtype) * rstd  # (C): γ·r
    if training:
        N = max(x.numel() // max(x.shape[1], 1), 1)
        dx = dy - _per_channel(dbias / N, x) - x_hat * _per_channel(dweight / N, x)  # (N, C, ...)
    else:
        dx = dy
    dx = _per_channel(scale, x) * dx  # (N, C, ...)
    dx = torch.empty_like(x, dtype=input.dtype).copy_(dx)  # in the layout of x, whatever that of dy
    return dx, dweight, dbias


_forward = define(batch_norm_forward, mutates_args=("running_mean", "running_var"))
_backward = define(batch_norm_backward)


class BatchNorm(torch.autograd.Function):
    """Differentiable by input, weight and bias. Its second and third outputs are what the backward pass needs."""

    @staticmethod
    def forward(input, running_mean, running_var, weight, bias, training, momentum, eps):
        return _forward(input, running_mean, running_var, weight, bias, training, momentum, eps)

    @staticmethod
    def setup_context(ctx, inputs, output):
        input, _, _, weight, bias, ctx.training, _, _ = inputs
        _, mean, rstd = output
        ctx.has_weight, ctx.has_bias = weight is not None, bias is not None
        ctx.mark_non_differentiable(mean, rstd)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(input, weight, mean, rstd)

    @once_differentiable
    def backward(ctx, dy, _dmean, _drstd):
        if dy is None:
            return None, None, None, None, None, None, None, None
        dx, dweight, dbias = _backward(dy, *ctx.saved_tensors, ctx.training)
        return dx, None, None, dweight if ctx.has_weight else None, dbias if ctx.has_bias else None, None, None, None


def batch_norm(input, running_mean, running_var, weight=None, bias=None, training=False, momentum=0.1, eps=1e-5):
    """Batch normalisation: a drop-in for `torch.nn.functional.batch_norm`.

    Args:
        input: (N, C) or (N, C, d1, ...), contiguous or channels_last (other strides are copied); float32, float64,
            float16 or bfloat16 (the statistics of 16-bit types are float32).
        running_mean, running_var: (C,), both or neither; read in evaluation, moved in place in training. They and
            the parameters have the dtype of `input` or, for a 16-bit input, float32.
        weight, bias: γ and β, (C,).
        training: normalise by the batch's statistics (True) or by the running ones (False).
        momentum: the share of the batch in the moved running statistics, in [0, 1].
        eps: ε > 0, added to the variance.

    Returns:
        y, of the shape and dtype of `input`.

    Raises:
        ValueError: one value a channel in training, one running statistic without the other, eps of 0 in training.
        RuntimeError: no running statistics in evaluation, parameters that are not of size C, dtypes that don't fit
            together, and a second backward pass through the gradient (double backward), which is not implemented.

    Source: Ioffe and Szegedy 2015; the gradient is derived in `batch_norm_backward`.
    """
    _check(input, running_mean, running_var, weight, bias, training, eps)
    y, _, _ = BatchNorm.apply(input, running_mean, running_var, weight, bias, training, momentum, eps)
    return y


def _dense(x):
    """x itself where it is contiguous or channels_last, else a contiguous copy: the layouts that outputs can have."""
    formats = {4: torch.channels_last, 5: torch.channels_last_3d}
    channels_last = x.dim() in formats and x.is_contiguous(memory_format=formats[x.dim()])
    return x if channels_last else x.contiguous()


def _all_but_channels(x):
    return [0, *range(2, x.dim())]


def _per_channel(v, x):
    """v, (C,), in a shape that broadcasts against x: (C, 1, ...)."""
    return v.view(-1, *[1] * (x.dim() - 2))


def _check(input, running_mean, running_var, weight, bias, training, eps):
    """Refuse what PyTorch refuses, in its words."""
    if input.dim() < 2 or not input.is_floating_point():
        raise RuntimeError(
            f"expected a floating point input of shape (N, C) or (N, C, d1, ...), "
            f"got {input.dtype} of shape {tuple(input.shape)}"
        )
    C = input.shape[1]
    if training:
        if (running_mean is None) != (running_var is None):
            raise ValueError("running_mean and running_var must either both be None or neither be None")
        if math.prod(input.shape[:1] + input.shape[2:]) == 1:
            raise ValueError(f"Expected more than 1 value per channel when training, got input size {input.shape}")
        if eps <= 0:
            raise ValueError(f"batch_norm eps must be positive during training, but got {eps}")
    vectors = {"running_mean": running_mean, "running_var": running_var, "weight": weight, "bias": bias}
    for name, v in vectors.items():
        if v is None:
            if not training and name.startswith("running"):
                raise RuntimeError(f"{name} must be defined in evaluation mode")
        elif v.shape != (C,):
            raise RuntimeError(f"{name} should contain {C} elements not {v.numel()}")
        elif v.dtype not in (input.dtype, accumulate_dtype(input.dtype)):
            raise RuntimeError(f"{name}: expected scalar type {input.dtype} but found {v.dtype}")
