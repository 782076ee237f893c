"""Cross-entropy, from logits to loss in one op and back in another.

    N  rows (examples)          x   logits, (N, C)
    C  classes                  y   target classes, (N,), or target probabilities, (N, C)
    w  class weights, (C,)      ε   label_smoothing

Every form of the loss is a weighted sum of −log-probabilities,

    loss_n = Σ_c t_nc · (lse_n − x_nc)           lse_n = log Σ_c exp(x_nc)

and only the weights t differ:

    class indices            t_nc = (1−ε)·w_y·[c = y_n] + (ε/C)·w_c
    class probabilities      t_nc = w_c·((1−ε)·y_nc + ε/C)

Softmax is the gradient of lse: ∂lse/∂x_c = exp(x_c − lse) = p_c. So one line serves every form,

    dx_nc = g_n · (T_n·p_nc − t_nc)              T_n = Σ_c t_nc,  g_n = ∂L/∂loss_n

With plain class indices t is one-hot, T = 1, and this is the `p − 1 at the target` of a first course. The seven steps
between the logits and the loss (max, subtract, exp, sum, reciprocal, multiply, log) all cancel into it.

lse is kept in two parts, the row's maximum m and log_z = log Σ exp(x − m), because their sum would round: beside
logits of 1e4 a float32 has no digits left for a log_z of 0.7. Always lse − x = log_z − (x − m).

Reductions: "none" returns loss_n; "sum" adds them; "mean" divides the sum by Σ w_y over the rows kept (class indices)
or by N (class probabilities), as `torch.nn.functional.cross_entropy` does.
"""

from typing import Optional, Tuple

import torch
from torch import Tensor
from torch.nn import _reduction as legacy_reduction

from fused_ops._op import accumulate_dtype, define, once_differentiable

# ---------------------------------------------------------------------------------------------------- class indices


def cross_entropy_forward(
    logits: Tensor,
    target: Tensor,
    weight: Optional[Tensor],
    ignore_index: int,
    reduction: str,
    label_smoothing: float,
) -> Tuple[Tensor, Tensor, Tensor]:
    """Loss of class indices: loss_n = (1−ε)·w_y·(lse − x_y) + (ε/C)·Σ_c w_c·(lse − x_c), 0 where y = ignore_index.

    Returns loss, () or (N,), in the dtype of the logits; stats = (m, log_z), (2, N), and weight_sum = Σ w_y, (), both
    in the accumulate dtype.
    """
    x = logits.to(accumulate_dtype(logits.dtype))  # (N, C)
    w, y, kept, w_y = _class_weights(x, target, weight, ignore_index)

    m, log_z, neg_logp = _neg_log_softmax(x)  # (N, 1), (N, 1), (N, C)
    nll = w_y * neg_logp.gather(1, y[:, None])[:, 0]  # (N)
    if label_smoothing > 0:
        smooth = (w * neg_logp).sum(1)  # (N)
        losses = (1 - label_smoothing) * nll + label_smoothing / x.shape[1] * smooth  # (N)
    else:  # not the same as ε = 0 above: 0·inf, where a logit is -inf, is not 0
        losses = nll
    losses = losses.where(kept, 0)  # (N)

    weight_sum = w_y.sum()  # ()
    loss = _reduce(losses, reduction, weight_sum)
    return loss.to(logits.dtype), torch.cat((m, log_z), 1).t().contiguous(), weight_sum


def cross_entropy_backward(
    dloss: Tensor,
    logits: Tensor,
    target: Tensor,
    weight: Optional[Tensor],
    stats: Tensor,
    weight_sum: Tensor,
    ignore_index: int,
    reduction: str,
    label_smoothing: float,
) -> Tensor:
    """dx_nc = g_n·(T_n·p_nc − t_nc), with t_nc = (1−ε)·w_y·[c = y_n] + (ε/C)·w_c and T_n = (1−ε)·w_y + (ε/C)·Σ_c w_c.

    g_n is dloss_n ("none"), dloss ("sum") or dloss / Σ w_y ("mean"), and 0 in the rows that are ignored: so a batch
    of ignored rows has the loss 0/0 = NaN and the gradient 0. Returns dlogits, (N, C), contiguous.
    """
    x = logits.to(stats.dtype)  # (N, C)
    w, y, kept, w_y = _class_weights(x, target, weight, ignore_index)
    m, log_z = stats.unsqueeze(2)  # (N, 1) each

    p = (x - m - log_z).exp()  # (N, C)
    nll_t = (1 - label_smoothing) * w_y  # (N): what t has at the target alone
    smooth_t = label_smoothing / max(x.shape[1], 1) * w  # (C): what t has at every class
    T = nll_t + smooth_t.sum()  # (N)
    g = _row_gradient(dloss, reduction, weight_sum).to(x.dtype)  # () or (N)

    dx = T[:, None] * p - smooth_t  # (N, C)
    dx = dx.scatter_add(1, y[:, None], -nll_t[:, None])  # (N, C)
    dx = torch.where(kept[:, None], g.expand(len(x))[:, None] * dx, 0)  # (N, C)
    return dx.to(logits.dtype).contiguous()


_forward, _backward = define(cross_entropy_forward), define(cross_entropy_backward)


class CrossEntropy(torch.autograd.Function):
    """Differentiable by the logits alone. Its second and third outputs are what the backward pass needs."""

    @staticmethod
    def forward(logits, target, weight, ignore_index, reduction, label_smoothing):
        return _forward(logits, target, weight, ignore_index, reduction, label_smoothing)

    @staticmethod
    def setup_context(ctx, inputs, output):
        logits, target, weight, *ctx.options = inputs
        _, stats, weight_sum = output
        ctx.mark_non_differentiable(stats, weight_sum)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(logits, target, weight, stats, weight_sum)

    @once_differentiable
    def backward(ctx, dloss, _dstats, _dweight_sum):
        dlogits = None if dloss is None else _backward(dloss, *ctx.saved_tensors, *ctx.options)
        return dlogits, None, None, None, None, None


# ----------------------------------------------------------------------------------------------- class probabilities


def cross_entropy_probabilities_forward(
    logits: Tensor, target: Tensor, weight: Optional[Tensor], reduction: str, label_smoothing: float
) -> Tuple[Tensor, Tensor]:
    """Loss of class probabilities: loss_n = Σ_c t_nc·(lse_n − x_nc), t_nc = w_c·((1−ε)·y_nc + ε/C).

    Returns loss, () or (N,), in the promoted dtype of logits and target, and stats = (m, log_z), (2, N).
    """
    dtype = torch.promote_types(logits.dtype, target.dtype)
    x = logits.to(accumulate_dtype(dtype))  # (N, C)
    t = _smoothed(target.to(x.dtype), weight, label_smoothing)  # (N, C)
    m, log_z, neg_logp = _neg_log_softmax(x)  # (N, 1), (N, 1), (N, C)
    losses = (t * neg_logp).sum(1)  # (N)
    loss = _reduce(losses, reduction, len(x))
    return loss.to(dtype), torch.cat((m, log_z), 1).t().contiguous()


def cross_entropy_probabilities_backward(
    dloss: Tensor,
    logits: Tensor,
    target: Tensor,
    weight: Optional[Tensor],
    stats: Tensor,
    reduction: str,
    label_smoothing: float,
) -> Tuple[Tensor, Tensor]:
    """dx_nc = g_n·(T_n·p_nc − t_nc); and, since the loss is linear in y, dy_nc = g_n·(1−ε)·w_c·(lse_n − x_nc).

    g_n is dloss_n ("none"), dloss ("sum") or dloss / N ("mean"). Returns dlogits and dtarget, (N, C), contiguous.
    """
    x = logits.to(stats.dtype)  # (N, C)
    t = _smoothed(target.to(x.dtype), weight, label_smoothing)  # (N, C)
    m, log_z = stats.unsqueeze(2)  # (N, 1) each
    g = _row_gradient(dloss, reduction, len(x)).to(x.dtype).expand(len(x))[:, None]  # (N, 1)

    neg_logp = log_z - (x - m)  # (N, C)
    p = (-neg_logp).exp()  # (N, C)
    dx = g * (t.sum(1, keepdim=True) * p - t)  # (N, C)
    dy = g * (1 - label_smoothing) * neg_logp  # (N, C)
    if weight is not None:
        dy = weight.to(x.dtype) * dy  # (N, C)
    return dx.to(logits.dtype).contiguous(), dy.to(target.dtype).contiguous()


_probabilities_forward = define(cross_entropy_probabilities_forward)
_probabilities_backward = define(cross_entropy_probabilities_backward)


class CrossEntropyProbabilities(torch.autograd.Function):
    """Differentiable by the logits and by the target. Its second output is what the backward pass needs."""

    @staticmethod
    def forward(logits, target, weight, reduction, label_smoothing):
        return _probabilities_forward(logits, target, weight, reduction, label_smoothing)

    @staticmethod
    def setup_context(ctx, inputs, output):
        logits, target, weight, *ctx.options = inputs
        _, stats = output
        ctx.mark_non_differentiable(stats)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(logits, target, weight, stats)

    @once_differentiable
    def backward(ctx, dloss, _dstats):
        if dloss is None:
            return None, None, None, None, None
        dlogits, dtarget = _probabilities_backward(dloss, *ctx.saved_tensors, *ctx.options)
        return dlogits, dtarget, None, None, None


# ------------------------------------------------------------------------------------------------ what they share


def _neg_log_softmax(x):
    """The two parts of lse, m (N, 1) and log_z (N, 1), and −log p = log_z − (x − m), (N, C)."""
    m = x.amax(1, keepdim=True) if x.shape[1] else x.new_zeros(len(x), 1)  # (N, 1)
    log_z = (x - m).exp().sum(1, keepdim=True).log()  # (N, 1)
    return m, log_z, log_z - (x - m)


def _class_weights(x, target, weight, ignore_index):
    """w (C,), or ones; y (N,) with a harmless 0 where ignored; which rows are kept (N,); w_y (N,), 0 where ignored."""
    w = x.new_ones(x.shape[1]) if weight is None else weight.to(x.dtype)  # (C)
    kept = target != ignore_index  # (N)
    y = target.where(kept, 0)  # (N)
    return w, y, kept, w.gather(0, y).where(kept, 0)  # gather, unlike w[y], refuses a negative index


def _smoothed(y, weight, label_smoothing):
    """t_nc = w_c·((1−ε)·y_nc + ε/C), (N, C)."""
    t = (1 - label_smoothing) * y + label_smoothing / max(y.shape[1], 1)  # (N, C)
    return t if weight is None else weight.to(y.dtype) * t


def _reduce(losses, reduction, divisor):
    if reduction == "none":
        return losses
    return losses.sum() / divisor if reduction == "mean" else losses.sum()


def _row_gradient(dloss, reduction, divisor):
    """g_n, the gradient of the whole by one row's loss: () or (N,)."""
    return dloss / divisor if reduction == "mean" else dloss


# ------------------------------------------------------------------------------------------------ public function


def cross_entropy(
    input,
    target,
    weight=None,
    size_average=None,
    ignore_index=-100,
    reduce=None,
    reduction="mean",
    label_smoothing=0.0,
):
    """Cross-entropy between logits and targets: a drop-in for `torch.nn.functional.cross_entropy`.

    Args:
        input: logits, (C,), (N, C) or (N, C, d1, d2, ...); float32, float64, float16 or bfloat16 (16-bit types are
            summed in float32).
        target: class indices, int64 or uint8, of the shape of `input` without C, each in [0, C) or `ignore_index`;
            or class probabilities, floating point, of the shape of `input`.
        weight: a weight for each class, (C,), of the dtype of `input`. Not differentiable.
        size_average, reduce: PyTorch's deprecated spellings of `reduction`.
        ignore_index: the class index whose rows add nothing to the loss and get a zero gradient.
        reduction: "mean" (over the weights of the targets; over the rows for probabilities), "sum" or "none".
        label_smoothing: ε in [0, 1], the share of each target that is spread evenly over the classes.

    Returns:
        The loss, in nats: () or, for "none", of the shape of `input` without C; dtype of `input`.

    Raises:
        IndexError: a class index out of range (RuntimeError where the reference runs).
        ValueError: batch sizes that differ, or an unknown reduction.
        RuntimeError: other shapes or dtypes that don't fit together, a weight that requires a gradient, and a
            second backward pass through the gradient (double backward), which is not implemented.

    Source: derived at the head of `fused_ops/ops/cross_entropy.py`; label smoothing after Szegedy et al. 2016.
    """
    if size_average is not None or reduce is not None:
        reduction = legacy_reduction.legacy_get_string(size_average, reduce)
    _check(input, target, weight, ignore_index, reduction, label_smoothing)

    logits = _rows(input)
    if target.is_floating_point():
        loss, _ = CrossEntropyProbabilities.apply(logits, _rows(target), weight, reduction, label_smoothing)
    else:
        y = target.reshape(-1).long()  # (N)
        loss, _, _ = CrossEntropy.apply(logits, y, weight, ignore_index, reduction, label_smoothing)
    return loss.reshape(_without_classes(input)) if reduction == "none" else loss


def _rows(x):
    """(C,), (N, C) or (N, C, d1, d2, ...) as rows of classes, (rows, C)."""
    if x.dim() == 2:
        return x
    return x[None] if x.dim() == 1 else x.movedim(1, -1).flatten(0, -2)


def _without_classes(x):
    """The shape of (C,), (N, C) or (N, C, d1, d2, ...) without its C."""
    return x.shape[:1] + x.shape[2:] if x.dim() > 1 else ()


def _check(input, target, weight, ignore_index, reduction, label_smoothing):
    """Refuse what PyTorch refuses, in its words."""
    if input.dim() == 0 or not input.is_floating_point():
        raise RuntimeError(
            f"expected floating point logits of shape (C,), (N, C) or (N, C, d1, ...), "
            f"got {input.dtype} of shape {tuple(input.shape)}"
        )
    if reduction not in ("none", "mean", "sum"):
        raise ValueError(f"{reduction} is not a valid value for reduction")
    if not 0 <= label_smoothing <= 1:
        raise RuntimeError(f"label_smoothing must be between 0.0 and 1.0. Got: {label_smoothing}")

    classes = input.shape[input.dim() > 1]
    if target.is_floating_point():
        if ignore_index >= 0:
            raise RuntimeError("ignore_index is not supported for floating point target")
        expected = input.shape
    else:
        if target.dtype not in (torch.int64, torch.uint8):
            raise RuntimeError(f"expected target dtype to be Long or Byte, but got {target.dtype}")
        expected = _without_classes(input)
    if target.shape != expected:
        if input.dim() > 1 and target.dim() > 0 and target.shape[0] != input.shape[0]:
            raise ValueError(
                f"Expected input batch_size ({input.shape[0]}) to match target batch_size ({target.shape[0]})."
            )
        raise RuntimeError(f"Expected target size {list(expected)}, got {list(target.shape)}")

    if weight is not None:
        if weight.shape != (classes,):
            raise RuntimeError(
                f"weight tensor should be defined either for all {classes} classes or no classes "
                f"but got weight tensor of shape: {list(weight.shape)}"
            )
        if weight.dtype != input.dtype:
            raise RuntimeError(f"expected scalar type {input.dtype} but found {weight.dtype}")
        if weight.requires_grad and torch.is_grad_enabled():
            raise RuntimeError(
                "cross_entropy is not differentiable with respect to argument 'weight'. "
                "This input cannot have requires_grad True."
            )
