"""Shapes and checks that the losses over rows of logits share. Names as in `fused_ops.ops.cross_entropy`."""

import math

import torch
from torch import is_grad_enabled
from torch._C import _get_dispatch_mode, _TorchDispatchModeKey
from torch._C._functorch import is_functorch_wrapped_tensor, is_legacy_batchedtensor
from torch.autograd import forward_ad
from torch.compiler import is_compiling

from fused_ops._op import accumulate_dtype, is_autocast_enabled, refuse_derivative, transforms_active

REDUCTIONS = ("none", "mean", "sum")
INDICES = (torch.int64, torch.uint8)  # the dtypes of class indices
_TRACING = _TorchDispatchModeKey.PROXY


def as_rows(x):
    """(C,), (N, C) or (N, C, d1, d2, ...) as rows of classes, (rows, C)."""
    if x.dim() == 2:
        return x
    if x.dim() == 1:
        return x[None]
    N, C, *positions = x.shape
    return x.movedim(1, -1).reshape(N * math.prod(positions), C)


def as_batch(x):
    """(C,), (N, C) or (N, C, d1, d2, ...) as the ops take it without a copy: (N, C, D), or rows, which is how C lies in
    memory in channels_last."""
    if x.dim() == 2:
        return x
    return as_rows(x) if x.dim() == 1 or x.movedim(1, -1).is_contiguous() else x.flatten(2)


def like_logits(rows, logits):
    """Rows of classes, (N·D, C), in the shape of the logits, (N, C, D); the rows of (N, C) stay."""
    if logits.dim() == 2:
        return rows
    N, C, D = logits.shape
    return rows.view(N, D, C).movedim(1, 2)  # (N, C, D)


def target_rows(target):
    """Class probabilities as the rows of the logits, (rows, C); class indices, (rows,), are it already."""
    return as_rows(target) if target.is_floating_point() else target


def in_forward_pass(reduction, dtype):
    """Whether the gradients can be made in the forward pass: there will be one number to multiply them by, nothing that
    would differentiate or batch the pass itself, and no dtype in which they might vanish before a loss scale comes."""
    return reduction != "none" and dtype != torch.float16 and is_grad_enabled() and not transforms_active()


def is_final_backward(dloss):
    """Whether a backward pass with dloss may take, and write to, the gradients that the forward pass made: nothing
    differentiates or batches it (`is_grads_batched` does so in a way of its own), nor traces it, for any number of
    passes."""
    if is_compiling() or type(dloss) is not torch.Tensor or is_grad_enabled() or transforms_active():
        return False
    return not is_legacy_batchedtensor(dloss) and not in_make_fx()


def in_make_fx():
    """Whether `make_fx` traces what is called. Not to be asked where a compiler does, which cannot trace the call."""
    return _get_dispatch_mode(_TRACING) is not None


def is_one(dloss):
    """Whether dloss is known to be 1, as where the loss itself is differentiated: then there is nothing to multiply by.

    On the CPU to look takes less time than an op that would change nothing; elsewhere it would mean to wait.
    """
    return dloss.is_cpu and dloss.item() == 1


def takes_reference(target, weight):
    """Whether somebody may differentiate by the class weights, or batch them, in any mode, beside class probabilities:
    no op of ours is differentiable by them, but the references are."""
    if weight is None or not target.is_floating_point():
        return False
    if transforms_active():  # around one that is not concerned with them there may be another
        return is_compiling() or is_functorch_wrapped_tensor(weight)
    if forward_ad._current_level >= 0 and forward_ad.unpack_dual(weight).tangent is not None:
        return True
    return weight.requires_grad and is_grad_enabled()


def refuse_by_weight(asked):
    """The ops are not differentiable by the class weights."""
    by = "argument 'weight' (but for calls of fused_ops.functional beside class probabilities)"
    refuse_derivative(asked, "cross_entropy", by)


def without_classes(shape):
    """(C,), (N, C) or (N, C, d1, d2, ...) without its C."""
    if len(shape) < 2:
        return ()
    N, _, *positions = shape
    return N, *positions


def in_dtype(loss, dtype):
    """The loss in this dtype, or, under autocast, in that in which it was computed."""
    return loss if loss.dtype == dtype or is_autocast_enabled(loss.device) else loss.to(dtype)


def promoted(dtype, target, weight):
    """The dtype of a loss with class weights, and these in it or, under autocast, in that in which it is computed.

    As in PyTorch, class probabilities and their weights are promoted beside logits of `dtype`, and autocast casts.
    """
    if target.is_floating_point():
        dtype = torch.promote_types(torch.promote_types(dtype, target.dtype), weight.dtype)
    return dtype, weight if weight.dtype == dtype else weight.to(accumulate_dtype(dtype))


def check_loss(shape, dtype, target, weight, ignore_index, reduction, label_smoothing, softcap):
    """Refuse what PyTorch refuses, in its words, for logits of this shape and dtype."""
    if reduction not in REDUCTIONS:
        raise ValueError(f"{reduction} is not a valid value for reduction")
    if not 0 <= label_smoothing <= 1:
        raise RuntimeError(f"label_smoothing must be between 0.0 and 1.0. Got: {label_smoothing}")
    if softcap is not None and not softcap > 0:
        raise ValueError(f"softcap must be positive, but got {softcap}")

    target_shape = target.shape
    if target_shape == shape:  # as in PyTorch, these are probabilities
        if not target.is_floating_point():
            kind = str(target.dtype).removeprefix("torch.").replace("int64", "Long")
            raise RuntimeError(f"Expected floating point type for target with class probabilities, got {kind}")
        if ignore_index >= 0:
            raise RuntimeError("ignore_index is not supported for floating point target")
    elif (rows := without_classes(shape)) != target_shape or target.dtype not in INDICES:
        if rows and target_shape and target_shape[0] != rows[0]:
            raise ValueError(f"Expected input batch_size ({shape[0]}) to match target batch_size ({target_shape[0]}).")
        if target.dtype not in INDICES:
            kind = str(target.dtype).removeprefix("torch.").replace("float32", "Float")
            raise RuntimeError(f"expected target dtype to be Long or Byte, but got {kind}")
        raise RuntimeError(f"Expected target size {list(rows)}, got {list(target_shape)}")

    if weight is not None:
        classes = shape[len(shape) > 1]
        if weight.shape != (classes,):
            raise RuntimeError(
                f"weight tensor should be defined either for all {classes} classes or no classes "
                f"but got weight tensor of shape: {list(weight.shape)}"
            )
        cast = target_shape == shape or (is_autocast_enabled(target.device) and weight.dtype != torch.float64)
        if weight.dtype != dtype and not cast:
            raise RuntimeError(f"expected scalar type {dtype} but found {weight.dtype}")
        if target_shape != shape and weight.requires_grad and is_grad_enabled():
            raise RuntimeError(
                "cross_entropy is not differentiable with respect to argument 'weight'. "
                "This input cannot have requires_grad True."
            )
