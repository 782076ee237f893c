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

from fused_ops._op import accumulate_dtype, define, differentiable
from fused_ops.ops._logits import as_rows, neg_log_softmax, reduced, row_gradient, without_classes
from fused_ops.ops.cross_entropy_probabilities import cross_entropy_probabilities


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

    m, log_z, neg_logp = neg_log_softmax(x)  # (N, 1), (N, 1), (N, C)
    nll = w_y * neg_logp.gather(1, y[:, None])[:, 0]  # (N)
    if label_smoothing > 0:
        smooth = (w * neg_logp).sum(1)  # (N)
        losses = (1 - label_smoothing) * nll + label_smoothing / x.shape[1] * smooth  # (N)
    else:  # not the same as ε = 0 above: 0·inf, where a logit is -inf, is not 0
        losses = nll
    losses = losses.where(kept, 0)  # (N)

    weight_sum = w_y.sum()  # ()
    loss = reduced(losses, reduction, weight_sum)
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
    g = row_gradient(dloss, reduction, weight_sum, x)  # (N, 1)

    dx = T[:, None] * p - smooth_t  # (N, C)
    dx = dx.scatter_add(1, y[:, None], -nll_t[:, None])  # (N, C)
    dx = torch.where(kept[:, None], g * dx, 0)  # (N, C)
    return dx.to(logits.dtype).contiguous()


_forward, _backward = define(cross_entropy_forward), define(cross_entropy_backward)


def _class_weights(x, target, weight, ignore_index):
    """w (C,), or ones; y (N,) with a harmless 0 where ignored; which rows are kept (N,); w_y (N,), 0 where ignored."""
    w = x.new_ones(x.shape[1]) if weight is None else weight.to(x.dtype)  # (C)
    kept = target != ignore_index  # (N)
    y = target.where(kept, 0)  # (N)
    return w, y, kept, w.gather(0, y).where(kept, 0)  # gather, unlike w[y], refuses a negative index


def _derivative(logits, target, weight, dtype, ignore_index, label_smoothing):
    """p, (N, C); T, (N, 1), and q = T·p − t = ∂loss_n/∂x_nc, (N, C), both 0 in the rows that are ignored."""
    x = logits.to(dtype)  # (N, C)
    w, y, kept, w_y = _class_weights(x, target, weight, ignore_index)
    nll_t = ((1 - label_smoothing) * w_y)[:, None]  # (N, 1)
    smooth_t = kept[:, None] * (label_smoothing / max(x.shape[1], 1) * w)  # (N, C)
    t = smooth_t.scatter_add(1, y[:, None], nll_t)  # (N, C)
    p, T = x.softmax(1), t.sum(1, keepdim=True)  # (N, C), (N, 1)
    return p, T, T * p - t


def _loss_along(v, logits, target, weight, weight_sum, ignore_index, reduction, label_smoothing):
    """How fast the loss changes as the logits move along v: Σ_c v_nc·q_nc, reduced as the losses are."""
    v = v.to(weight_sum.dtype)  # (N, C)
    _, _, q = _derivative(logits, target, weight, v.dtype, ignore_index, label_smoothing)
    return reduced((v * q).sum(1), reduction, weight_sum).to(logits.dtype)  # () or (N)


def _gradient_along(v, dloss, logits, target, weight, weight_sum, ignore_index, reduction, label_smoothing):
    """How fast dlogits changes as the logits move along v: g_n·T_n·p_nc·(v_nc − Σ_k p_nk·v_nk), (N, C)."""
    v = v.to(weight_sum.dtype)  # (N, C)
    p, T, _ = _derivative(logits, target, weight, v.dtype, ignore_index, label_smoothing)
    g = row_gradient(dloss, reduction, weight_sum, p)  # (N, 1)
    g = g.where(T != 0, 0)  # not g·0: in a batch of ignored rows g is infinite
    return (g * T * p * (v - (p * v).sum(1, keepdim=True))).to(logits.dtype)


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
        ctx.save_for_forward(logits, target, weight, stats, weight_sum)

    @staticmethod
    def backward(ctx, dloss, _dstats, _dweight_sum):
        dlogits = None if dloss is None else _cross_entropy_backward(dloss, *ctx.saved_tensors, *ctx.options)
        return dlogits, None, None, None, None, None

    @staticmethod
    def jvp(ctx, logits_t, *_):
        logits, target, weight, _, weight_sum = ctx.saved_tensors
        return _loss_along(logits_t, logits, target, weight, weight_sum, *ctx.options), None, None


class CrossEntropyBackward(torch.autograd.Function):
    """dlogits, differentiable by dloss and by the logits.

    dlogits = g·q is the loss's derivative in disguise, and the matrix of second derivatives is symmetric. So what
    comes back to dloss, from a gradient v of dlogits, is the loss's change along v, and what comes back to the logits
    is the change of dlogits along v: the two formulas that forward mode needs, too. Both are written in PyTorch's
    differentiable ops, which gives the derivatives of higher order.
    """

    @staticmethod
    def forward(dloss, logits, target, weight, stats, weight_sum, ignore_index, reduction, label_smoothing):
        return _backward(dloss, logits, target, weight, stats, weight_sum, ignore_index, reduction, label_smoothing)

    @staticmethod
    def setup_context(ctx, inputs, output):
        *tensors, ignore_index, reduction, label_smoothing = inputs
        ctx.options = ignore_index, reduction, label_smoothing
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*tensors)
        ctx.save_for_forward(*tensors)

    @staticmethod
    def backward(ctx, v):
        dloss, logits, target, weight, _, weight_sum = ctx.saved_tensors
        saved = logits, target, weight, weight_sum
        ddloss = dlogits = None
        if v is not None and ctx.needs_input_grad[0]:
            ddloss = _loss_along(v, *saved, *ctx.options)
        if v is not None and ctx.needs_input_grad[1]:
            dlogits = _gradient_along(v, dloss, *saved, *ctx.options)
        return ddloss, dlogits, None, None, None, None, None, None, None

    @staticmethod
    def jvp(ctx, dloss_t, logits_t, *_):
        dloss, logits, target, weight, stats, weight_sum = ctx.saved_tensors
        saved = logits, target, weight
        dlogits_t = torch.zeros_like(logits, memory_format=torch.contiguous_format)  # (N, C)
        if dloss_t is not None:
            dlogits_t = dlogits_t + _cross_entropy_backward(dloss_t, *saved, stats, weight_sum, *ctx.options)
        if logits_t is not None:
            dlogits_t = dlogits_t + _gradient_along(logits_t, dloss, *saved, weight_sum, *ctx.options)
        return dlogits_t


_cross_entropy, _cross_entropy_backward = differentiable(CrossEntropy), differentiable(CrossEntropyBackward)


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
        RuntimeError: other shapes or dtypes that don't fit together, and a weight that requires a gradient.

    Source: derived at the head of `fused_ops/ops/cross_entropy.py`; label smoothing after Szegedy et al. 2016.
    """
    if size_average is not None or reduce is not None:
        reduction = legacy_reduction.legacy_get_string(size_average, reduce)
    _check(input, target, weight, ignore_index, reduction, label_smoothing)

    logits = as_rows(input)
    if target.is_floating_point():
        loss, _ = cross_entropy_probabilities(logits, as_rows(target), weight, reduction, label_smoothing)
    else:
        y = target.reshape(-1).long()  # (N)
        loss, _, _ = _cross_entropy(logits, y, weight, ignore_index, reduction, label_smoothing)
    return loss.reshape(without_classes(input)) if reduction == "none" else loss


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
        expected = without_classes(input)
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
