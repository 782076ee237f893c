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

from fused_ops._op import accumulate_dtype, below_autograd, define, differentiable


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
    dy: Tensor, input: Tensor, weight: Optional[Tensor], mean: Tensor, rstd: Tensor, training: bool, eps: float
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


def _normalised(input, mean, rstd, training, eps):
    """x̂, (N, C, ...), and r, (C, 1, ...), as differentiable functions of the input: μ and r, too, in training."""
    x = input.to(mean.dtype)  # (N, C, ...)
    if not training:
        return (x - _per_channel(mean, x)) * _per_channel(rstd, x), _per_channel(rstd, x)
    centred = x - _mean(x)  # (N, C, ...)
    r = (_mean(centred.square()) + eps) ** -0.5  # (C, 1, ...)
    return centred * r, r


def _projected(a, x_hat, training):
    """P(a) = a − mean(a) − x̂·mean(a·x̂), what is left of a without its parts along 1 and along x̂; in evaluation a."""
    return a - _mean(a) - x_hat * _mean(a * x_hat) if training else a


def _output_along(v, input, weight, mean, rstd, dweight, dbias, training, eps):
    """How fast y changes as x moves along v, γ along dγ and β along dβ: γ·r·P(v) + dγ·x̂ + dβ, (N, C, ...).

    x̂ changes by r·P(v): that is the matrix of the backward pass, which is symmetric. None is no movement.
    """
    x_hat, r = _normalised(input, mean, rstd, training, eps)
    y_t = torch.zeros_like(x_hat)
    if v is not None:
        y_t = y_t + _gain(weight, x_hat) * r * _projected(v.to(x_hat.dtype), x_hat, training)
    if dweight is not None:
        y_t = y_t + _gain(dweight, x_hat) * x_hat
    if dbias is not None:
        y_t = y_t + _gain(dbias, x_hat)
    return y_t.to(input.dtype)


def _pulled_back(v, u, dy, input, weight, mean, rstd, training, eps):
    """What comes back to x and to γ from a gradient v of dx and u of dγ: the second derivatives.

    In training ψ = Σ v·dx + Σ u·dγ = γ·r·Σ v·P(dy) + u·Σ dy·x̂ depends on x through x̂ and through r:

        e = ∂ψ/∂x̂ = u·dy − γ·r·(v·mean(dy·x̂) + dy·mean(v·x̂))        ∂ψ/∂r = γ·Σ v·P(dy)

    x̂ passes e back as r·P(e), the backward pass once more; and dr/dx = −r²·x̂/N. So

        r·P(e) − γ·r²·x̂·mean(v·P(dy))    comes back to x,     r·Σ v·P(dy)    to γ

    In evaluation x̂ is linear in x and r a constant: u·dy·r comes back to x, r·Σ v·dy to γ.
    """
    x_hat, r = _normalised(input, mean, rstd, training, eps)
    v, dy = v.to(x_hat.dtype), dy.to(x_hat.dtype)  # (N, C, ...)
    u, gain = _gain(u, x_hat), _gain(weight, x_hat)  # (C, 1, ...)
    P_dy = _projected(dy, x_hat, training)  # (N, C, ...)
    e = u * dy  # (N, C, ...)
    if training:
        e = e - gain * r * (v * _mean(dy * x_hat) + dy * _mean(v * x_hat))  # (N, C, ...)
    to_x = r * _projected(e, x_hat, training)  # (N, C, ...)
    if training:
        to_x = to_x - gain * r.square() * x_hat * _mean(v * P_dy)  # (N, C, ...)
    to_weight = (r * v * P_dy).sum(_all_but_channels(x_hat))  # (C)
    return to_x.to(input.dtype), to_weight


class BatchNorm(torch.autograd.Function):
    """Differentiable by input, weight and bias. Its second and third outputs are what the backward pass needs."""

    forward = below_autograd(_forward)

    @staticmethod
    def setup_context(ctx, inputs, output):
        input, _, _, weight, bias, training, _, eps = inputs
        _, mean, rstd = output
        ctx.options = training, eps
        ctx.has_weight, ctx.has_bias = weight is not None, bias is not None
        ctx.mark_non_differentiable(mean, rstd)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(input, weight, mean, rstd)
        ctx.save_for_forward(input, weight, mean, rstd)

    @staticmethod
    def backward(ctx, dy, _dmean, _drstd):
        if dy is None:
            return None, None, None, None, None, None, None, None
        dx, dweight, dbias = _batch_norm_backward(dy, *ctx.saved_tensors, *ctx.options)
        return dx, None, None, dweight if ctx.has_weight else None, dbias if ctx.has_bias else None, None, None, None

    @staticmethod
    def jvp(ctx, input_t, _mean_t, _var_t, weight_t, bias_t, *_):
        return _output_along(input_t, *ctx.saved_tensors, weight_t, bias_t, *ctx.options), None, None

    @staticmethod
    def vmap(info, in_dims, input, running_mean, running_var, weight, bias, training, momentum, eps):
        """The channels of a batch of batches are all normalised apart: one batch with B·C channels."""
        if training and running_mean is not None:
            raise RuntimeError(
                "batch_norm under vmap cannot move running statistics: a batch of batches has no one mean. "
                "Use track_running_stats=False, or evaluation mode"
            )
        tensors = (input, running_mean, running_var, weight, bias)
        folded = (_folded(t, dim, info.batch_size) for t, dim in zip(tensors, in_dims, strict=False))
        y, *statistics = _batch_norm(*folded, training, momentum, eps)
        return tuple(_unfolded(t, info.batch_size) for t in (y, *statistics)), (1, 0, 0)


class BatchNormBackward(torch.autograd.Function):
    """dx, dweight and dbias, differentiable by dy, input and weight.

    The second derivatives are written in PyTorch's differentiable ops, which gives those of higher order.
    """

    forward = below_autograd(_backward)

    @staticmethod
    def setup_context(ctx, inputs, output):
        dy, input, weight, mean, rstd, *ctx.options = inputs
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(dy, input, weight, mean, rstd)
        ctx.save_for_forward(dy, input, weight, mean, rstd)

    @staticmethod
    def backward(ctx, v, dweight_v, dbias_v):
        dy, *saved = ctx.saved_tensors
        input, weight, mean, _ = saved
        to_dy = to_x = to_weight = None
        if ctx.needs_input_grad[0]:
            to_dy = _output_along(v, *saved, dweight_v, dbias_v, *ctx.options)
        if any(ctx.needs_input_grad[1:3]):
            v = torch.zeros_like(input) if v is None else v
            u = torch.zeros_like(mean) if dweight_v is None else dweight_v
            to_x, to_weight = _pulled_back(v, u, dy, *saved, *ctx.options)
        return to_dy, to_x, None if weight is None else to_weight, None, None, None, None

    @staticmethod
    def jvp(ctx, dy_t, input_t, weight_t, *_):
        """The product rule on dx = γ·r·P(dy), dγ = Σ dy·x̂ and dβ = Σ dy."""
        dy, input, weight, mean, rstd = ctx.saved_tensors
        training, eps = ctx.options
        x_hat, r = _normalised(input, mean, rstd, training, eps)
        dy, gain = dy.to(x_hat.dtype), _gain(weight, x_hat)  # (N, C, ...), (C, 1, ...)
        dy_t, x_t = (torch.zeros_like(x_hat) if t is None else t.to(x_hat.dtype) for t in (dy_t, input_t))
        x_hat_t = r * _projected(x_t, x_hat, training)  # (N, C, ...)
        dx_t = gain * r * _projected(dy_t, x_hat, training)  # (N, C, ...)
        if weight_t is not None:
            dx_t = dx_t + _gain(weight_t, x_hat) * r * _projected(dy, x_hat, training)  # (N, C, ...)
        if training:
            r_t = -r.square() * _mean(x_hat * x_t)  # (C, 1, ...)
            through_x_hat = x_hat_t * _mean(dy * x_hat) + x_hat * _mean(dy * x_hat_t)  # (N, C, ...)
            dx_t = dx_t + gain * (r_t * _projected(dy, x_hat, training) - r * through_x_hat)  # (N, C, ...)
        dweight_t = (dy_t * x_hat + dy * x_hat_t).sum(_all_but_channels(x_hat))  # (C)
        return dx_t.to(input.dtype), dweight_t, dy_t.sum(_all_but_channels(x_hat))

    @staticmethod
    def vmap(info, in_dims, *args):
        *tensors, training, eps = args
        folded = (_folded(t, dim, info.batch_size) for t, dim in zip(tensors, in_dims, strict=False))
        gradients = _batch_norm_backward(*folded, training, eps)
        return tuple(_unfolded(t, info.batch_size) for t in gradients), (1, 0, 0)


_batch_norm = differentiable(_forward, BatchNorm)
_batch_norm_backward = differentiable(_backward, BatchNormBackward)


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
        RuntimeError: no running statistics in evaluation, parameters that are not of size C, or dtypes that
            don't fit together.

    Source: Ioffe and Szegedy 2015; the gradient is derived in `batch_norm_backward`.
    """
    _check(input, running_mean, running_var, weight, bias, training, eps)
    y, _, _ = _batch_norm(input, running_mean, running_var, weight, bias, training, momentum, eps)
    return y


def _dense(x):
    """x itself where it is contiguous or channels_last, else a contiguous copy: the layouts that outputs can have."""
    formats = {4: torch.channels_last, 5: torch.channels_last_3d}
    channels_last = x.dim() in formats and x.is_contiguous(memory_format=formats[x.dim()])
    return x if channels_last else x.contiguous()


def _mean(x):
    """Of each channel, (C, 1, ...)."""
    return x.mean(_all_but_channels(x))[(...,) + (None,) * (x.dim() - 2)]


def _gain(weight, x):
    """γ in a shape that broadcasts against x, (C, 1, ...), in its dtype; 1 where there is none."""
    return x.new_ones(()) if weight is None else _per_channel(weight.to(x.dtype), x)


def _folded(t, dim, B):
    """vmap's batch as channels: (N, B·C, ...) of an input, (B·C,) of a vector of channels."""
    if t is None:
        return None
    t = t.expand(B, *t.shape) if dim is None else t.movedim(dim, 0)  # (B, N, C, ...) or (B, C)
    return t.flatten() if t.dim() == 2 else t.movedim(0, 1).flatten(1, 2)


def _unfolded(t, B):
    """(N, B, C, ...) or (B, C) again."""
    channels = 0 if t.dim() == 1 else 1
    return t.unflatten(channels, (B, t.shape[channels] // B))


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
