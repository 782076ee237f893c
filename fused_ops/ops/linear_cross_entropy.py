"""A linear layer and the cross-entropy of its outputs in one op, which never holds all the logits.

    N  examples         x  input, (N, H)                     z  logits, (N, D·C): D rows of C classes an example
    H  in_features      W  linear_weight, (D·C, H)           y, w, ε, ζ, cap  as in `fused_ops.ops.cross_entropy`
                        b  linear_bias, (D·C,)

    z = x·Wᵀ + b        loss = cross_entropy(z, y)

With dz = ∂L/∂z, the gradient that cross-entropy hands back, the linear layer's own gradients are those of any product,

    dx = dz·W           dW = dzᵀ·x           db = Σ_n dz_n

What makes it cheap in memory: each row of z meets only its own row of x and y, and of the other rows it needs nothing
but the mean's divisor, which depends on the targets alone. So a chunk of rows is enough at a time. Its logits are
computed, turned into their gradient where they lie, multiplied into dx, added into dW and db, and forgotten.

And in time: if the loss is reduced to one number, its gradients are those for dloss = 1 times dloss. They can be worked
out in the forward pass, while the chunk's logits are there, and the backward pass only multiplies. Otherwise (reduction
"none", float16, a second backward pass, second derivatives) it computes the logits once more.

The first two functions below define the op, and hold all the logits; what runs is `linear_cross_entropy_chunks.py`.
"""

import math
from typing import List, Optional, Tuple

import torch
from torch import Tensor, is_grad_enabled

from fused_ops._op import (
    below_autograd,
    define,
    differentiable,
    is_autocast_enabled,
    looped,
    overridable,
    save,
    transforms_active,
)
from fused_ops.ops import cross_entropy as ce
from fused_ops.ops._logits import (
    as_rows,
    check_loss,
    in_dtype,
    in_forward_pass,
    is_final_backward,
    is_one,
    promoted,
    refuse_by_weight,
    takes_reference,
    without_classes,
)
from fused_ops.ops.linear_cross_entropy_chunks import backward_in_chunks, forward_in_chunks
from fused_ops.ops.linear_cross_entropy_derivatives import accumulated, gradients_along, linear_logits, loss_along


def linear_cross_entropy_forward(
    input: Tensor,
    linear_weight: Tensor,
    linear_bias: Optional[Tensor],
    target: Tensor,
    weight: Optional[Tensor],
    ignore_index: int,
    reduction: str,
    label_smoothing: float,
    z_loss: float,
    softcap: Optional[float],
    classes: int,
    chunk_size: Optional[int],
    needs: List[bool],
) -> Tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """loss = cross_entropy(x·Wᵀ + b, y), and its gradients for dloss = 1.

    Returns loss, () or (N·D,), and the mean's divisor, (), in the accumulate dtype; then dinput, dlinear_weight,
    dlinear_bias and dtarget, of the shapes and dtypes of their tensors, or (0,) for one that isn't among the needs.
    """
    options = ignore_index, reduction, label_smoothing, z_loss, softcap
    logits = linear_logits(*accumulated((input, linear_weight, linear_bias)), classes)  # (N·D, C)
    loss, _, divisor = ce.cross_entropy_forward(logits, target, weight, *options)
    saved = input, linear_weight, linear_bias, target, weight, divisor
    gradients = linear_cross_entropy_backward(torch.ones_like(loss), *saved, *options, classes, chunk_size, needs)
    return loss, divisor, *gradients


def linear_cross_entropy_backward(
    dloss: Tensor,
    input: Tensor,
    linear_weight: Tensor,
    linear_bias: Optional[Tensor],
    target: Tensor,
    weight: Optional[Tensor],
    divisor: Tensor,
    ignore_index: int,
    reduction: str,
    label_smoothing: float,
    z_loss: float,
    softcap: Optional[float],
    classes: int,
    chunk_size: Optional[int],
    needs: List[bool],
) -> Tuple[Tensor, Tensor, Tensor, Tensor]:
    """dz = ∂L/∂z of cross-entropy; then dx = dz·W, dW = dzᵀ·x and db = Σ_n dz_n, summed in the accumulate dtype.

    Returns dinput, dlinear_weight, dlinear_bias and dtarget as the forward pass does.
    """
    options = ignore_index, reduction, label_smoothing, z_loss, softcap
    x, W, b = accumulated((input, linear_weight, linear_bias))
    logits = linear_logits(x, W, b, classes)  # (N·D, C)
    _, stats, _ = ce.cross_entropy_forward(logits, target, weight, *options)
    saved = logits, target, weight, stats, divisor
    dlogits, dtarget = ce.cross_entropy_backward(dloss, *saved, *options, True, needs[3])
    dz = dlogits.view(-1, W.shape[0])  # (N, D·C)
    made = (
        dz @ W if needs[0] else dz.new_empty(0),
        dz.t() @ x if needs[1] else dz.new_empty(0),
        dz.sum(0) if needs[2] else dz.new_empty(0),
    )
    return *(t.to(input.dtype) for t in made), dtarget.to(target.dtype if needs[3] else input.dtype)


_forward = define(linear_cross_entropy_forward, implementation=forward_in_chunks)
_backward = define(linear_cross_entropy_backward, implementation=backward_in_chunks)


class LinearCrossEntropy(torch.autograd.Function):
    """Differentiable by input, linear weight, linear bias and class probabilities.

    The second output is the mean's divisor; the others are the gradients for dloss = 1, of whatever `needs` names.
    """

    forward = below_autograd(_forward)

    @staticmethod
    def setup_context(ctx, inputs, output):
        tensors, ctx.options, ctx.made = inputs[:5], inputs[5:12], inputs[12]
        _, divisor, *gradients = output
        ctx.gradients = gradients
        ctx.mark_non_differentiable(divisor, *gradients)
        ctx.set_materialize_grads(False)
        save(ctx, *tensors, divisor)

    @staticmethod
    def backward(ctx, dloss, *_):
        refuse_by_weight(ctx.needs_input_grad[4])
        needs = ctx.needs_input_grad[:4]
        if dloss is None:
            return (None,) * 13
        made = ctx.gradients is not None and all(m or not n for m, n in zip(ctx.made, needs, strict=True))
        if made and is_final_backward(dloss):  # takes what the forward pass made, and multiplies in place
            gradients, ctx.gradients = ctx.gradients, None
            if not is_one(dloss):
                gradients = [g.mul_(dloss) for g in gradients]
        elif not made or is_grad_enabled() or transforms_active():
            gradients = _linear_cross_entropy_backward(dloss, *ctx.saved_tensors, *ctx.options, list(needs))
        else:  # a compiler traces this, for any number of backward passes
            gradients = [g * dloss for g in ctx.gradients]
        return *(g if needed else None for g, needed in zip(gradients, needs, strict=True)), *[None] * 9

    @staticmethod
    def jvp(ctx, input_t, linear_weight_t, linear_bias_t, target_t, weight_t, *_):
        refuse_by_weight(weight_t is not None)
        *tensors, divisor = ctx.saved_tensors
        tangents = input_t, linear_weight_t, linear_bias_t
        return loss_along(tensors, divisor, tangents, target_t, ctx.options), *[None] * 5

    @staticmethod
    def vmap(info, in_dims, *args):
        return looped(LinearCrossEntropy.apply, info, in_dims, args)


class LinearCrossEntropyBackward(torch.autograd.Function):
    """dinput, dlinear_weight, dlinear_bias and dtarget, differentiable by dloss and by what they are gradients by."""

    forward = below_autograd(_backward)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.options, ctx.needs = inputs[7:14], inputs[14]
        ctx.set_materialize_grads(False)
        save(ctx, *inputs[:7])

    @staticmethod
    def backward(ctx, *v):
        """By symmetry, as in `CrossEntropyBackward`: what comes back is the change along v."""
        refuse_by_weight(ctx.needs_input_grad[5])
        dloss, *tensors, divisor = ctx.saved_tensors
        *tangents, target_t = (t if needed else None for t, needed in zip(v, ctx.needs, strict=True))
        to_dloss, to_inputs = None, (None,) * 4
        if ctx.needs_input_grad[0]:
            to_dloss = loss_along(tensors, divisor, tangents, target_t, ctx.options)
        if any(ctx.needs_input_grad[1:5]):
            to_inputs = gradients_along(dloss, tensors, divisor, tangents, target_t, ctx.options)
        to_inputs = (t if needed else None for t, needed in zip(to_inputs, ctx.needs_input_grad[1:5], strict=True))
        return to_dloss, *to_inputs, *[None] * 10

    @staticmethod
    def jvp(ctx, dloss_t, input_t, linear_weight_t, linear_bias_t, target_t, weight_t, *_):
        refuse_by_weight(weight_t is not None)
        dloss, *tensors, divisor = ctx.saved_tensors
        tangents = input_t, linear_weight_t, linear_bias_t
        changes = gradients_along(dloss, tensors, divisor, tangents, target_t, ctx.options)
        if dloss_t is not None:
            more = _linear_cross_entropy_backward(dloss_t, *tensors, divisor, *ctx.options, ctx.needs)
            changes = [t + m if needed else t for t, m, needed in zip(changes, more, ctx.needs, strict=True)]
        return tuple(t if needed else tensors[0].new_zeros(0) for t, needed in zip(changes, ctx.needs, strict=True))

    @staticmethod
    def vmap(info, in_dims, *args):
        return looped(_linear_cross_entropy_backward, info, in_dims, args)


_linear_cross_entropy = differentiable(_forward, LinearCrossEntropy, results=1)
_linear_cross_entropy_backward = differentiable(_backward, LinearCrossEntropyBackward)


@overridable
def linear_cross_entropy(
    input,
    linear_weight,
    target,
    *,
    linear_bias=None,
    weight=None,
    reduction="mean",
    ignore_index=None,
    label_smoothing=0.0,
    options=None,
    chunk_size=None,
    z_loss=0.0,
    softcap=None,
):
    """`cross_entropy(linear(input, linear_weight, linear_bias), target)` without holding all the logits: a drop-in for
    `torch.nn.functional.linear_cross_entropy` (torch 2.13), exact, with every derivative.

    Args:
        input: (H,) or (N, H); float32, float64, float16 or bfloat16.
        linear_weight: (C, H) or, for D = d1·d2·... losses an example, (C, d1, ..., H). Its gradient is summed in
            float32 for 16-bit types.
        target: class indices, (), (N,) or (N, d1, ...); or class probabilities, (C,), (N, C) or (N, C, d1, ...).
        linear_bias: (C,) or (C, d1, ...).
        weight, reduction, label_smoothing, z_loss, softcap: as in `cross_entropy`. Where it is differentiated by
            `weight`, all logits are held.
        ignore_index: as in `cross_entropy`; None is -100. Refused beside class probabilities.
        options: PyTorch's `LinearCrossEntropyOptions`. Its `batch_chunk_size` serves as `chunk_size`; its other fields
            choose what PyTorch's own op gives up, and change nothing here.
        chunk_size: how many rows of `input` have their logits in memory at a time. The default, a half of H and at
            least 128 or, where 16-bit types are multiplied as such (CUDA), 1,024, makes them small beside all logits
            and still keeps the matrix products efficient.

    Returns:
        The loss, in nats: () or, for "none", of the shape of class indices; of the dtype of `input` or, under autocast
        (which casts input, linear_weight and linear_bias), float32.

    Raises:
        IndexError, ValueError, RuntimeError: as `cross_entropy`; RuntimeError for shapes of the linear layer that don't
            fit together; ValueError for a chunk_size below 1.

    Source: derived at the head of `fused_ops/ops/linear_cross_entropy.py`.
    """
    if chunk_size is None and options is not None:
        chunk_size = options.batch_chunk_size
    if is_autocast_enabled(input.device):
        input, linear_weight, linear_bias = map(_autocast, (input, linear_weight, linear_bias))
    shape = _check(input, linear_weight, target, linear_bias, ignore_index, chunk_size)
    ignore_index = -100 if ignore_index is None else ignore_index
    check_loss(shape, input.dtype, target, weight, ignore_index, reduction, label_smoothing, softcap)

    C, *losses, H = linear_weight.shape
    D = math.prod(losses)
    W = linear_weight.reshape(C, D, H).transpose(0, 1).reshape(D * C, H)  # the C classes of a loss side by side
    b = None if linear_bias is None else linear_bias.reshape(C, D).t().reshape(D * C)  # (D·C)
    dtype = torch.promote_types(input.dtype, target.dtype) if target.is_floating_point() else input.dtype
    if weight is not None:
        dtype, weight = promoted(dtype, target, weight)
    y = as_rows(target) if target.is_floating_point() else target.reshape(-1).long()  # (N·D, C) or (N·D)
    x = input if input.dim() == 2 else input[None]  # (N, H)
    settings = ignore_index, reduction, label_smoothing, z_loss, softcap
    if takes_reference(target, weight):
        loss, *_ = ce.cross_entropy_forward(linear_logits(*accumulated((x, W, b)), C), y, weight, *settings)
    else:
        now = in_forward_pass(reduction, x.dtype)
        needs = [now and t is not None and t.requires_grad for t in (x, W, b, y)]
        (loss,) = _linear_cross_entropy(x, W, b, y, weight, *settings, C, chunk_size, needs)
    loss = in_dtype(loss, dtype)
    return loss.reshape(without_classes(shape)) if reduction == "none" else loss


def _autocast(t):
    if t is None or t.dtype == torch.float64:
        return t
    return t.to(torch.get_autocast_dtype(t.device.type))


def _check(input, linear_weight, target, linear_bias, ignore_index, chunk_size):
    """Refuse what PyTorch refuses, in its words. Returns the shape of the logits, (C,), (N, C) or (N, C, d1, ...)."""
    if input.dim() not in (1, 2):
        raise RuntimeError(f"expected input with dimensionality 1 or 2, got {input.dim()}")
    if linear_weight.dim() < 2:
        raise RuntimeError(f"expected linear_weight with dimensionality at least 2, got {linear_weight.dim()}")
    if not input.is_floating_point():
        raise RuntimeError(f"expected floating point input, got {input.dtype}")
    for name, t in {"linear_weight": linear_weight, "linear_bias": linear_bias}.items():
        if t is not None and t.dtype != input.dtype:
            raise RuntimeError(f"expected input and {name} to have the same dtype, got {input.dtype} and {t.dtype}")
    if input.shape[-1] != linear_weight.shape[-1]:
        raise RuntimeError(
            "expected equal input and linear_weight last dimensions (in_features), "
            f"got {input.shape[-1]} and {linear_weight.shape[-1]}, respectively"
        )
    if linear_weight.shape[0] == 0:
        raise RuntimeError(f"expected linear_weight of at least one class, got shape {tuple(linear_weight.shape)}")
    if linear_bias is not None and linear_bias.shape != linear_weight.shape[:-1]:
        raise RuntimeError(
            f"expected linear_bias shape {tuple(linear_weight.shape[:-1])}, got {tuple(linear_bias.shape)}"
        )
    if linear_weight.dim() > 2 and input.dim() == 1:
        raise RuntimeError(
            f"K-dimensional loss defined by linear_weight shape {tuple(linear_weight.shape)} requires batched input, "
            f"(N, {input.shape[-1]}), got unbatched input with shape {tuple(input.shape)}"
        )
    shape = input.shape[:-1] + linear_weight.shape[:-1]
    if target.shape == shape and ignore_index is not None:
        raise RuntimeError("ignore_index cannot be specified when target contains probabilities")
    if chunk_size is not None and chunk_size < 1:
        raise ValueError(f"chunk_size must be at least 1, but got {chunk_size}")
    return shape
