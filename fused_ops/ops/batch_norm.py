"""Batch normalisation of each channel over the batch, forward in one op and backward in another.

    N  elements a channel (batch times positions)       γ, β  weight and bias, (C,)
    C  channels                                         μ, σ²  mean and biased variance, (C,)
    x  input, (N, C) or (N, C, d1, ...)                 ε  eps
    a  activation, or a(z) = z                          residual, of the shape of x, or 0

    y = a(z)        z = γ·x̂ + β + residual        x̂ = (x − μ)·r        r = (σ² + ε)^-½ (`rstd`)

In training μ and σ² are the batch's own; in evaluation they are the running statistics, which are constants. The
running statistics follow the batch's, running ← (1 − momentum)·running + momentum·batch, where the variance that
enters is the unbiased one, σ²·N/(N − 1), although the batch itself is normalised by the biased one: this is
PyTorch's convention. (The lecture's network normalises by the unbiased one; `fused_ops.steps` has both.)
"""

import math
from typing import Optional, Tuple

import torch
from torch import Tensor, is_grad_enabled

from fused_ops._op import accumulate_dtype, below_autograd, define, differentiable, overridable, refuse_derivative, save
from fused_ops.ops._activations import ACTIVATIONS, check_activation
from fused_ops.ops._channels import all_but_channels, dense, folded, in_layout_of, per_channel, unfolded
from fused_ops.ops.batch_norm_derivatives import (
    Point,
    gradients_along,
    gradients_pulled_back,
    output_along,
    pre_activation,
)


def batch_norm_forward(
    input: Tensor,
    running_mean: Optional[Tensor],
    running_var: Optional[Tensor],
    weight: Optional[Tensor],
    bias: Optional[Tensor],
    training: bool,
    momentum: float,
    eps: float,
    activation: Optional[str],
    residual: Optional[Tensor],
) -> Tuple[Tensor, Tensor]:
    """y = a(γ·(x − μ)·r + β + residual), r = (σ² + ε)^-½; in training running statistics move to μ and σ²·N/(N−1).

    Returns y, of the shape and dtype of the input, contiguous (or channels_last where the input is); and
    stats = (μ, r), (2, C), in the accumulate dtype. An empty batch leaves the running statistics as they are.
    """
    x = dense(input).to(accumulate_dtype(input.dtype))  # (N, C, ...)
    N = x.numel() // max(x.shape[1], 1)
    if training:
        mean = x.mean(all_but_channels(x))  # (C)
        var = (x - per_channel(mean, x)).square().mean(all_but_channels(x))  # (C), biased
        if N > 0 and running_mean is not None:
            running_mean.copy_((1 - momentum) * running_mean.to(x.dtype) + momentum * mean)
        if N > 0 and running_var is not None:
            unbiased_var = var * (N / (N - 1)) if N > 1 else var * float("nan")  # (C)
            running_var.copy_((1 - momentum) * running_var.to(x.dtype) + momentum * unbiased_var)
    else:
        mean, var = running_mean.to(x.dtype), running_var.to(x.dtype)  # (C)
    rstd = (var + eps) ** -0.5  # (C)

    x_hat = (x - per_channel(mean, x)) * per_channel(rstd, x)  # (N, C, ...)
    z = pre_activation(x_hat, weight, bias, None if residual is None else in_layout_of(x, residual))  # (N, C, ...)
    y = z if activation is None else ACTIVATIONS[activation].value(z)  # (N, C, ...)
    return y.to(input.dtype), torch.stack((mean, rstd))  # (N, C, ...), (2, C)


def batch_norm_backward(
    dy: Tensor,
    input: Tensor,
    weight: Optional[Tensor],
    bias: Optional[Tensor],
    residual: Optional[Tensor],
    stats: Tensor,
    training: bool,
    eps: float,
    activation: Optional[str],
    needs_input: bool,
    needs_parameters: bool,
    needs_residual: bool,
) -> Tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradient of y = a(z), with z = γ·x̂ + β + residual, x̂ = (x − μ)·r and r = (σ² + ε)^-½ (σ² biased).

    z is worked out again rather than kept. It passes dz = dy·a'(z) on: to the residual as it is, and

        dβ = Σ dz        dγ = Σ dz·x̂        sums over N

    μ and r depend on every row, so dx is dz less its mean and less its part along x̂ (just that if ε = 0: mean(x̂²) = 1):

        dx = γ·r·( dz − mean(dz) − x̂·mean(dz·x̂) )      means over N

    The two sums are dβ and dγ: one reduction serves all three gradients. In evaluation μ and r are constants, and
    dx = γ·r·dz alone.

    The step that is not obvious: r = (σ² + ε)^-½ gives ∂r/∂x_i = −r³·(x_i − μ)/N = −r²·x̂_i/N, the share of μ in σ²
    dropping out because Σ (x − μ) = 0. Every x̂_j = (x_j − μ)·r uses r, so Σ γdz·(x − μ) = Σ γdz·x̂/r comes back to r.
    So dx_i = r·γdz_i, less its mean (through μ), less r·x̂_i·mean(γdz·x̂) (through r: that sum times ∂r/∂x_i).

    Returns dx, of the shape, dtype and layout of y; dweight and dbias, (C,), in the accumulate dtype; and dresidual,
    like dx. What isn't needed comes back empty, (0,), and so does dresidual without an activation, which is dy.
    """
    mean, rstd = stats  # (C), (C)
    x = dense(input).to(mean.dtype)  # (N, C, ...)
    dz = in_layout_of(x, dy).to(mean.dtype)  # (N, C, ...)
    sums = needs_parameters or (needs_input and training)
    if sums or activation is not None:
        x_hat = (x - per_channel(mean, x)) * per_channel(rstd, x)  # (N, C, ...)
    if activation is not None:
        z = pre_activation(x_hat, weight, bias, None if residual is None else in_layout_of(x, residual))  # (N, C, ...)
        dz = dz * ACTIVATIONS[activation].derivative(z)  # (N, C, ...)
    if sums:
        dz_x_hat_sum = (dz * x_hat).sum(all_but_channels(x))  # (C)
        dz_sum = dz.sum(all_but_channels(x))  # (C)

    dx, dweight, dbias, dresidual = (t.new_empty(0) for t in (input, mean, mean, input))
    if needs_parameters:
        dweight, dbias = dz_x_hat_sum, dz_sum  # (C), (C)
    if needs_residual and activation is not None:
        dresidual = dz.to(input.dtype)  # (N, C, ...)
    if needs_input:
        scale = rstd if weight is None else weight.to(x.dtype) * rstd  # (C): γ·r
        left = dz  # (N, C, ...)
        if training:
            N = max(x.numel() // max(x.shape[1], 1), 1)
            left = dz - per_channel(dz_sum / N, x) - x_hat * per_channel(dz_x_hat_sum / N, x)  # (N, C, ...)
        dx = (per_channel(scale, x) * left).to(input.dtype)  # (N, C, ...)
    return dx, dweight, dbias, dresidual


_forward = define(batch_norm_forward, mutates_args=("running_mean", "running_var"))
_backward = define(batch_norm_backward)


class BatchNorm(torch.autograd.Function):
    """Differentiable by input, weight, bias and residual. Its second output is for the backward pass."""

    forward = below_autograd(_forward)

    @staticmethod
    def setup_context(ctx, inputs, output):
        input, _, _, weight, bias, training, _, eps, activation, residual = inputs
        _, stats = output
        ctx.options = training, eps, activation
        ctx.mark_non_differentiable(stats)
        ctx.set_materialize_grads(False)
        if activation is None:
            bias = residual = None  # only a'(z) would need them
        save(ctx, input, weight, bias, residual, stats)

    @staticmethod
    def backward(ctx, dy, *_):
        needs_input, needs_mean, needs_var, needs_weight, needs_bias, *_, needs_residual = ctx.needs_input_grad
        refuse_derivative(needs_mean or needs_var, "batch_norm", "running_mean or running_var")
        needs_parameters = needs_weight or needs_bias
        _, _, activation = ctx.options
        dx = dweight = dbias = None
        dresidual = dy
        if dy is not None and (needs_input or needs_parameters or activation is not None):
            needs = needs_input, needs_parameters, needs_residual and activation is not None
            dx, dweight, dbias, dz = _batch_norm_backward(dy, *ctx.saved_tensors, *ctx.options, *needs)
            dresidual = dy if activation is None else dz
        dx, dresidual = dx if needs_input else None, dresidual if needs_residual else None
        dweight, dbias = dweight if needs_weight else None, dbias if needs_bias else None
        return dx, None, None, dweight, dbias, None, None, None, None, dresidual

    @staticmethod
    def jvp(ctx, input_t, mean_t, var_t, weight_t, bias_t, _training, _momentum, _eps, _activation, residual_t):
        refuse_derivative(mean_t is not None or var_t is not None, "batch_norm", "running_mean or running_var")
        point = Point(*ctx.saved_tensors, *ctx.options)
        return output_along(point, input_t, weight_t, bias_t, residual_t), None

    @staticmethod
    def vmap(info, in_dims, input, running_mean, running_var, weight, bias, training, *args):
        """The channels of a batch of batches are all normalised apart: one batch with B·C channels."""
        if training and running_mean is not None:
            raise RuntimeError(
                "batch_norm under vmap cannot move running statistics: a batch of batches has no one mean. "
                "Use track_running_stats=False, or evaluation mode"
            )
        args = input, running_mean, running_var, weight, bias, training, *args
        outputs = BatchNorm.apply(*(folded(t, dim, info.batch_size) for t, dim in zip(args, in_dims, strict=True)))
        return unfolded(outputs, info.batch_size)


class BatchNormBackward(torch.autograd.Function):
    """dx, dweight, dbias and dresidual, differentiable by dy, input, weight, bias and residual.

    Its derivatives are derived in `batch_norm_derivatives`.
    """

    forward = below_autograd(_backward)

    @staticmethod
    def setup_context(ctx, inputs, output):
        *tensors, training, eps, activation, needs_input, needs_parameters, needs_residual = inputs
        ctx.options = training, eps, activation
        ctx.needed = needs_input, needs_parameters, needs_parameters, needs_residual
        ctx.set_materialize_grads(False)
        save(ctx, *tensors)

    @staticmethod
    def backward(ctx, *cotangents):
        dy, *saved = ctx.saved_tensors
        gradients = gradients_pulled_back(Point(*saved, *ctx.options), dy, *cotangents)
        asked = zip(gradients, ctx.needs_input_grad, strict=False)
        return *(g if needed else None for g, needed in asked), *[None] * 8

    @staticmethod
    def jvp(ctx, *tangents):
        dy, *saved = ctx.saved_tensors
        moved = gradients_along(Point(*saved, *ctx.options), dy, *tangents[:5])
        return tuple(t if needed else t.new_zeros(0) for t, needed in zip(moved, ctx.needed, strict=True))

    @staticmethod
    def vmap(info, in_dims, *args):
        gradients = _batch_norm_backward(
            *(folded(t, dim, info.batch_size) for t, dim in zip(args, in_dims, strict=True))
        )
        return unfolded(gradients, info.batch_size)


_batch_norm = differentiable(_forward, BatchNorm, results=1)
_batch_norm_backward = differentiable(_backward, BatchNormBackward)


@overridable
def batch_norm(
    input,
    running_mean,
    running_var,
    weight=None,
    bias=None,
    training=False,
    momentum=0.1,
    eps=1e-5,
    *,
    activation=None,
    residual=None,
):
    """Batch normalisation, with what often follows it: a drop-in for `torch.nn.functional.batch_norm`.

    Args:
        input: (N, C) or (N, C, d1, ...), contiguous or channels_last (other strides are copied); float32, float64,
            float16 or bfloat16 (the statistics of 16-bit types are float32).
        running_mean, running_var: (C,), both or neither; read in evaluation, moved in place in training. They and
            the parameters are all of one dtype, that of `input` or, for a 16-bit input, float32.
        weight, bias: γ and β, (C,).
        training: normalise by the batch's statistics (True) or by the running ones (False).
        momentum: the share of the batch in the moved running statistics.
        eps: ε, added to the variance; above 0 in training, at least 0 in evaluation.
        activation: a, applied to the normalised and scaled input: "relu", "leaky_relu" (slope 0.01), "tanh", "gelu"
            (the exact one), "silu" or None.
        residual: added before the activation; of the shape and dtype of `input`, with any strides.

    Returns:
        y, of the shape and dtype of `input`.

    Raises:
        ValueError: one value a channel in training, one running statistic without the other, an eps that is too
            small, an unknown activation.
        RuntimeError: no running statistics in evaluation, running statistics that require grad, parameters that are
            not of size C, a residual of another shape, or dtypes that don't fit together.

    Source: Ioffe and Szegedy 2015; the gradient is derived in `batch_norm_backward`.
    """
    _check(input, running_mean, running_var, weight, bias, training, momentum, eps, activation, residual)
    if input.dim() == 1:  # empty, or it would have been refused
        return input.clone() if residual is None else input + residual
    training = training or running_mean is None or running_var is None  # in evaluation, of an empty input
    (y,) = _batch_norm(input, running_mean, running_var, weight, bias, training, momentum, eps, activation, residual)
    return y


_VECTORS = ("running_mean", "running_var", "weight", "bias")


def _check(input, running_mean, running_var, weight, bias, training, momentum, eps, activation, residual):
    """Refuse what PyTorch refuses, in its words. Of an empty input it takes even one without channels, (0,).

    Whatever it asks of a tensor it asks once: at small sizes that takes a good part of the whole time.
    """
    shape, dtype = input.shape, input.dtype
    C = shape[1] if len(shape) > 1 else 0
    if not dtype.is_floating_point:
        raise NotImplementedError(f"batch_norm: expected a floating point input, got {dtype}")
    if len(shape) < 2 and shape != (0,):
        raise RuntimeError(f"expected an input of shape (N, C) or (N, C, d1, ...), got {tuple(shape)}")
    if momentum is None:
        raise TypeError("batch_norm: momentum must be a float, not None")
    check_activation(activation)
    if residual is not None and (residual.shape, residual.dtype) != (shape, dtype):
        raise RuntimeError(
            f"residual should have the shape and dtype of the input, {tuple(shape)} and {dtype}, "
            f"but got {tuple(residual.shape)} and {residual.dtype}"
        )
    if training:
        if (running_mean is None) != (running_var is None):
            raise ValueError("running_mean and running_var must either both be None or neither be None")
        if shape[0] == 1 and math.prod(shape[2:]) == 1:
            raise ValueError(f"Expected more than 1 value per channel when training, got input size {shape}")
        if eps <= 0:
            raise ValueError(f"batch_norm eps must be positive during training, but got {eps}")
    elif eps < 0:
        raise ValueError(f"batch_norm eps must be non-negative, but got {eps}")
    elif (running_mean is None or running_var is None) and input.numel() > 0:
        raise RuntimeError(
            f"{'running_mean' if running_mean is None else 'running_var'} must be defined in evaluation mode"
        )
    size, dtypes = (C,), (dtype, accumulate_dtype(dtype))
    for i, v in enumerate((running_mean, running_var, weight, bias)):
        if v is None:
            continue
        if v.shape != size:
            raise RuntimeError(f"{_VECTORS[i]} should contain {C} elements not {v.numel()}")
        if (v_dtype := v.dtype) not in dtypes:
            raise RuntimeError(f"{_VECTORS[i]}: expected scalar type {dtypes[0]} but found {v_dtype}")
        dtypes = (v_dtype,)  # of all that follow, too
        if i < 2 and v.requires_grad and is_grad_enabled():
            raise RuntimeError(f"batch_norm is not differentiable with respect to {_VECTORS[i]}, which requires grad")
