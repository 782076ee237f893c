"""Shapes and checks that the losses over rows of logits share. Names as in `fused_ops.ops.cross_entropy`."""

import torch

from fused_ops._op import accumulate_dtype, is_autocast_enabled


def as_rows(x):
    """(C,), (N, C) or (N, C, d1, d2, ...) as rows of classes, (rows, C)."""
    if x.dim() == 2:
        return x
    return x[None] if x.dim() == 1 else x.movedim(1, -1).flatten(0, -2)


def without_classes(shape):
    """(C,), (N, C) or (N, C, d1, d2, ...) without its C."""
    return (*shape[:1], *shape[2:]) if len(shape) > 1 else ()


def check_loss(shape, dtype, target, weight, ignore_index, reduction, label_smoothing, softcap):
    """Refuse what PyTorch refuses, in its words, for logits of this shape and dtype."""
    if reduction not in ("none", "mean", "sum"):
        raise ValueError(f"{reduction} is not a valid value for reduction")
    if not 0 <= label_smoothing <= 1:
        raise RuntimeError(f"label_smoothing must be between 0.0 and 1.0. Got: {label_smoothing}")
    if softcap is not None and not softcap > 0:
        raise ValueError(f"softcap must be positive, but got {softcap}")

    if target.shape == shape:  # as in PyTorch, these are probabilities
        if not target.is_floating_point():
            kind = str(target.dtype).removeprefix("torch.").replace("int64", "Long")
            raise RuntimeError(f"Expected floating point type for target with class probabilities, got {kind}")
        if ignore_index >= 0:
            raise RuntimeError("ignore_index is not supported for floating point target")
    else:
        if len(shape) > 1 and target.dim() > 0 and target.shape[0] != shape[0]:
            raise ValueError(f"Expected input batch_size ({shape[0]}) to match target batch_size ({target.shape[0]}).")
        if target.dtype not in (torch.int64, torch.uint8):
            kind = str(target.dtype).removeprefix("torch.").replace("float32", "Float")
            raise RuntimeError(f"expected target dtype to be Long or Byte, but got {kind}")
        if tuple(target.shape) != without_classes(shape):
            raise RuntimeError(f"Expected target size {list(without_classes(shape))}, got {list(target.shape)}")

    if weight is not None:
        classes = shape[len(shape) > 1]
        if weight.shape != (classes,):
            raise RuntimeError(
                f"weight tensor should be defined either for all {classes} classes or no classes "
                f"but got weight tensor of shape: {list(weight.shape)}"
            )
        autocast = is_autocast_enabled(target.device)
        if weight.dtype != dtype and not (autocast and weight.dtype == accumulate_dtype(dtype)):
            raise RuntimeError(f"expected scalar type {dtype} but found {weight.dtype}")
        if weight.requires_grad and torch.is_grad_enabled():
            raise RuntimeError(
                "cross_entropy is not differentiable with respect to argument 'weight'. "
                "This input cannot have requires_grad True."
            )
