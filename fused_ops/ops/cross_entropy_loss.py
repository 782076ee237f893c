"""The public function, and two forms of cross-entropy whose backward pass is meant to come once.

One makes its gradient in the forward pass, the other lets it take the storage of the logits.
"""

from typing import Optional, Tuple

import torch
from torch import Tensor, is_grad_enabled
from torch.autograd import forward_ad
from torch.compiler import is_compiling
from torch.nn import _reduction as legacy_reduction

from fused_ops._op import (
    LIB,
    applied,
    applied_outside_transforms,
    below_autograd,
    define,
    directly,
    is_autocast_enabled,
    overridable,
)
from fused_ops.ops._logits import (
    as_batch,
    as_rows,
    check_loss,
    in_dtype,
    in_forward_pass,
    in_make_fx,
    is_final_backward,
    is_one,
    like_logits,
    promoted,
    takes_reference,
    without_classes,
)
from fused_ops.ops.cross_entropy import (
    CrossEntropy,
    backward_op_,
    cross_entropy_backward,
    cross_entropy_forward,
    forward_op,
    gradients_of_rows,
    loss_of_rows,
)


def cross_entropy_with_gradient(
    logits: Tensor,
    target: Tensor,
    weight: Optional[Tensor],
    ignore_index: int,
    reduction: str,
    label_smoothing: float,
    z_loss: float,
    softcap: Optional[float],
    narrowed: bool,
) -> Tuple[Tensor, Tensor]:
    """The loss of `cross_entropy_forward`, in the dtype of the logits if it is to be narrowed to it; and the dlogits of
    `cross_entropy_backward` for dloss = 1."""
    options = ignore_index, reduction, label_smoothing, z_loss, softcap
    loss, *saved = cross_entropy_forward(logits, target, weight, *options)
    one = torch.ones_like(loss)  # () or (N)
    dlogits, _ = cross_entropy_backward(one, logits, target, weight, *saved, *options, True, False)
    return loss.to(logits.dtype) if narrowed else loss, dlogits


def cross_entropy_scale_(dlogits: Tensor, dloss: Tensor, target: Tensor, ignore_index: int) -> None:
    """dlogits for dloss from those for dloss = 1, in place; the rows that are ignored stay 0, whatever dloss is."""
    dx = as_rows(dlogits) * dloss.to(dlogits.dtype)  # (N, C)
    if not target.is_floating_point():
        dx = dx.where((target != ignore_index)[:, None], 0)  # (N, C)
    dlogits.copy_(like_logits(dx, dlogits))


_scale_ = directly(define(cross_entropy_scale_, mutates_args=("dlogits",)))
_with_gradient = below_autograd(define(cross_entropy_with_gradient))


def _with_gradient_by_itself(*args):
    if is_grad_enabled() and any(isinstance(a, Tensor) and a.requires_grad for a in args):
        raise RuntimeError("cross_entropy_with_gradient has no derivative of its own: use cross_entropy_forward")
    return _with_gradient(*args)


LIB.impl("cross_entropy_with_gradient", _with_gradient_by_itself, "Autograd")


class CrossEntropyWithGradient(torch.autograd.Function):
    """Cross-entropy that holds its gradient for dloss = 1 from the forward pass to the first backward pass.

    For calls that nothing but reverse mode differentiates. A loss that is `narrowed` within takes less time than one
    whose conversion autograd sees.
    """

    @staticmethod
    def forward(ctx, logits, target, weight, options, narrowed):
        loss, ctx.dlogits = _with_gradient(logits, target, weight, *options, narrowed)
        ctx.options = options
        ctx.save_for_backward(logits, target, weight)
        return loss

    @staticmethod
    def backward(ctx, dloss):
        logits, target, weight = ctx.saved_tensors  # raises if somebody has changed the logits
        if ctx.dlogits is not None and is_final_backward(dloss):
            dlogits, ctx.dlogits = ctx.dlogits, None  # taken by the first backward pass alone
            if not is_one(dloss):
                _scale_(dlogits, dloss, target, ctx.options[0])
        else:
            _, *saved = forward_op(logits, target, weight, *ctx.options)
            dlogits, _ = gradients_of_rows(dloss, logits, target, weight, *saved, *ctx.options, True, False)
        return dlogits, None, None, None, None


class InplaceCrossEntropy(CrossEntropy):
    """Cross-entropy whose backward pass writes the gradient over the logits."""

    @staticmethod
    def setup_context(ctx, inputs, output):
        CrossEntropy.setup_context(ctx, inputs, output)
        ctx.spent = False

    @staticmethod
    def backward(ctx, dloss, *_):
        if not ctx.needs_input_grad[0]:  # there is no gradient to take the place of the logits
            return CrossEntropy.backward(ctx, dloss)
        if is_grad_enabled():
            raise RuntimeError("cross_entropy(inplace_grad=True) has no second derivative: use inplace_grad=False")
        if ctx.spent:
            raise RuntimeError(
                "cross_entropy(inplace_grad=True): a second backward pass is not possible, "
                "because the first one has written the gradient over the logits. Use inplace_grad=False"
            )
        if dloss is None:
            return (None,) * 8
        logits, *saved = ctx.saved_tensors  # raises if somebody else has changed the logits
        ctx.spent = True
        dtarget = backward_op_(dloss, logits, *saved, *ctx.options, ctx.needs_input_grad[1])
        torch.autograd.graph.increment_version(logits)  # so that whoever needs the logits as they were is told
        return logits.detach(), dtarget if ctx.needs_input_grad[1] else None, *(None,) * 6

    @staticmethod
    def jvp(ctx, *_):
        raise RuntimeError("cross_entropy(inplace_grad=True) has no forward mode: use inplace_grad=False")

    @staticmethod
    def vmap(info, in_dims, *_):
        raise RuntimeError("cross_entropy(inplace_grad=True) cannot be vmapped: use inplace_grad=False")


_cross_entropy_with_gradient = applied_outside_transforms(CrossEntropyWithGradient)
_inplace = applied(InplaceCrossEntropy, results=1)


@overridable
def cross_entropy(
    input,
    target,
    weight=None,
    size_average=None,
    ignore_index=-100,
    reduce=None,
    reduction="mean",
    label_smoothing=0.0,
    *,
    z_loss=0.0,
    softcap=None,
    inplace_grad=False,
):
    """Cross-entropy between logits and targets: a drop-in for `torch.nn.functional.cross_entropy`.

    Args:
        input: logits, (C,), (N, C) or (N, C, d1, d2, ...); float32, float64, float16 or bfloat16 (16-bit types are
            summed in float32).
        target: class indices, int64 or uint8, of the shape of `input` without C, each in [0, C) or `ignore_index`;
            or class probabilities, floating point, of the shape of `input`, differentiable.
        weight: a weight for each class, (C,), of the dtype of `input`, beside probabilities or under autocast of any.
            Differentiable beside probabilities (where the reference runs then, by PyTorch's autograd).
        size_average, reduce: PyTorch's deprecated spellings of `reduction`.
        ignore_index: the class index whose rows add nothing to the loss and get a zero gradient.
        reduction: "mean" (over the weights of the targets; over the rows for probabilities), "sum" or "none".
        label_smoothing: ε in [0, 1], the share of each target that is spread evenly over the classes.
        z_loss: ζ; adds ζ·lse² to the loss of each row that is kept, before the reduction.
        softcap: cap > 0; replaces the logits x by cap·tanh(x/cap).
        inplace_grad: let the gradient take the storage of the logits in the backward pass, which saves its memory (a
            copy of the logits does, where they are not contiguous rows of classes). There are no second derivatives
            then, and the logits are gone. torch.compile, which plans memory itself, ignores it, and so do calls that
            are differentiated by class weights. Otherwise, where the logits require a gradient and the reduction is not
            "none", the loss holds it, too, as large as the logits, until its backward pass hands it on; under
            `torch.no_grad` it is not made.

    Returns:
        The loss, in nats: () or, for "none", of the shape of `input` without C; of the dtype of `input` or, under
        autocast, float32.

    Raises:
        IndexError: a class index out of range (RuntimeError where the reference runs).
        ValueError: batch sizes that differ, an unknown reduction, or a softcap that is not positive.
        RuntimeError: other shapes or dtypes that don't fit together, and a weight that is differentiated beside class
            indices. With inplace_grad: a second backward pass, a second derivative, forward mode or vmap, and a
            backward pass of whoever else needed the logits.

    Source: derived at the head of `fused_ops/ops/cross_entropy.py`; label smoothing after Szegedy et al. 2016, z-loss
    after Chowdhery et al. 2022 (PaLM), softcap after Gemma Team 2024.
    """
    if size_average is not None or reduce is not None:
        reduction = legacy_reduction.legacy_get_string(size_average, reduce)
    shape, dtype = input.shape, input.dtype
    if not shape or not dtype.is_floating_point:
        raise RuntimeError(
            f"expected floating point logits of shape (C,), (N, C) or (N, C, d1, ...), "
            f"got {dtype} of shape {tuple(shape)}"
        )
    check_loss(shape, dtype, target, weight, ignore_index, reduction, label_smoothing, softcap)

    logits = as_batch(input)  # (N, C) or (N, C, D)
    if weight is not None:
        dtype, weight = promoted(dtype, target, weight)
    if target.is_floating_point():
        dtype = torch.promote_types(dtype, target.dtype)
        y = as_rows(target) if logits.dim() == 2 else target.flatten(2)  # as logits
        logits, y = logits.to(dtype), y.to(dtype)
    else:
        y = target if target.dim() == 1 and target.dtype == torch.int64 else target.reshape(-1).long()  # (N) or (N·D)
    options = ignore_index, reduction, label_smoothing, z_loss, softcap
    if takes_reference(target, weight):
        loss, *_ = cross_entropy_forward(logits, y, weight, *options)
    elif inplace_grad and not is_compiling():
        (loss,) = _inplace(logits.contiguous(), y, weight, *options)
    elif (
        logits.requires_grad
        and not y.requires_grad
        and not is_compiling()
        and not in_make_fx()
        and forward_ad._current_level < 0
        and in_forward_pass(reduction, dtype)
    ):
        narrowed = dtype == torch.bfloat16 and not is_autocast_enabled(logits.device)
        return _cross_entropy_with_gradient(logits, y, weight, options, narrowed)
    else:
        (loss,) = loss_of_rows(logits, y, weight, *options)
    loss = in_dtype(loss, dtype)
    return loss.reshape(without_classes(shape)) if reduction == "none" else loss
