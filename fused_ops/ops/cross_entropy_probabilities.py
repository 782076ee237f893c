"""Cross-entropy with class probabilities as targets. Derivation and names: `fused_ops.ops.cross_entropy`.

The loss is linear in the target y, so this form is differentiable by y, too.
"""

from typing import Optional, Tuple

import torch
from torch import Tensor

from fused_ops._op import accumulate_dtype, define, differentiable
from fused_ops.ops._logits import neg_log_softmax, reduced, row_gradient


def cross_entropy_probabilities_forward(
    logits: Tensor, target: Tensor, weight: Optional[Tensor], reduction: str, label_smoothing: float
) -> Tuple[Tensor, Tensor]:
    """Loss of class probabilities: loss_n = Σ_c t_nc·(lse_n − x_nc), t_nc = w_c·((1−ε)·y_nc + ε/C).

    Returns loss, () or (N,), in the promoted dtype of logits and target, and stats = (m, log_z), (2, N).
    """
    dtype = torch.promote_types(logits.dtype, target.dtype)
    x = logits.to(accumulate_dtype(dtype))  # (N, C)
    t = _smoothed(target.to(x.dtype), weight, label_smoothing)  # (N, C)
    m, log_z, neg_logp = neg_log_softmax(x)  # (N, 1), (N, 1), (N, C)
    losses = (t * neg_logp).sum(1)  # (N)
    loss = reduced(losses, reduction, len(x))
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
    g = row_gradient(dloss, reduction, len(x), x)  # (N, 1)

    neg_logp = log_z - (x - m)  # (N, C)
    p = (-neg_logp).exp()  # (N, C)
    dx = g * (t.sum(1, keepdim=True) * p - t)  # (N, C)
    dy = g * (1 - label_smoothing) * neg_logp  # (N, C)
    if weight is not None:
        dy = weight.to(x.dtype) * dy  # (N, C)
    return dx.to(logits.dtype).contiguous(), dy.to(target.dtype).contiguous()


_forward = define(cross_entropy_probabilities_forward)
_backward = define(cross_entropy_probabilities_backward)


def _loss_along(v, u, logits, target, weight, reduction, label_smoothing):
    """How fast the loss changes as x moves along v and y along u: Σ_c v·(T·p − t) + u·a·(lse − x), then reduced."""
    x, y, a, p, neg_logp, T, t = _parts(logits, target, weight, label_smoothing)
    along = (v * (T * p - t)).sum(1) + (u * a * neg_logp).sum(1)  # (N)
    return reduced(along, reduction, len(x)).to(torch.promote_types(logits.dtype, target.dtype))


def _gradients_along(v, u, dloss, logits, target, weight, reduction, label_smoothing):
    """How fast dx and dy change as x moves along v and y along u. With a = (1−ε)·w, which is dt/dy, dT/dy, and

    d(dx) = g·(T·p·(v − Σ p·v) + p·Σ a·u − a·u)
    d(dy) = g·a·(Σ p·v − v)                         since lse − x changes by Σ p·v − v
    """
    x, y, a, p, _, T, _ = _parts(logits, target, weight, label_smoothing)
    g = row_gradient(dloss, reduction, len(x), x)  # (N, 1)
    centred = v - (p * v).sum(1, keepdim=True)  # (N, C)
    dx = g * (T * p * centred + p * (a * u).sum(1, keepdim=True) - a * u)  # (N, C)
    dy = -g * a * centred  # (N, C)
    return dx.to(logits.dtype), dy.to(target.dtype)


def _parts(logits, target, weight, label_smoothing):
    """x, y, (N, C); a = (1−ε)·w, (C,) or (); p and −log p, (N, C); T, (N, 1); t, (N, C)."""
    dtype = accumulate_dtype(torch.promote_types(logits.dtype, target.dtype))
    x, y = logits.to(dtype), target.to(dtype)  # (N, C)
    a = (1 - label_smoothing) * (x.new_ones(()) if weight is None else weight.to(dtype))  # (C) or ()
    t = _smoothed(y, weight, label_smoothing)  # (N, C)
    neg_logp = -x.log_softmax(1)  # (N, C)
    return x, y, a, (-neg_logp).exp(), neg_logp, t.sum(1, keepdim=True), t


def _zeros_for(t, like):
    """t, or zeros of the shape of `like` for a tangent or gradient that there isn't."""
    return torch.zeros_like(like) if t is None else t


class CrossEntropyProbabilities(torch.autograd.Function):
    """Differentiable by the logits and by the target. Its second output is what the backward pass needs."""

    @staticmethod
    def forward(logits, target, weight, reduction, label_smoothing):
        return _forward(logits, target, weight, reduction, label_smoothing)

    @staticmethod
    def setup_context(ctx, inputs, output):
        logits, target, weight, *ctx.options = inputs
        _, stats = output
        ctx.mark_non_differentiable(stats)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(logits, target, weight, stats)
        ctx.save_for_forward(logits, target, weight, stats)

    @staticmethod
    def backward(ctx, dloss, _dstats):
        if dloss is None:
            return None, None, None, None, None
        dlogits, dtarget = _probabilities_backward(dloss, *ctx.saved_tensors, *ctx.options)
        return dlogits, dtarget, None, None, None

    @staticmethod
    def jvp(ctx, logits_t, target_t, *_):
        logits, target, weight, _ = ctx.saved_tensors
        v, u = _zeros_for(logits_t, logits), _zeros_for(target_t, target)
        return _loss_along(v, u, logits, target, weight, *ctx.options), None


class CrossEntropyProbabilitiesBackward(torch.autograd.Function):
    """dlogits and dtarget, differentiable by dloss, logits and target: as `CrossEntropyBackward` is, by symmetry."""

    @staticmethod
    def forward(dloss, logits, target, weight, stats, reduction, label_smoothing):
        return _backward(dloss, logits, target, weight, stats, reduction, label_smoothing)

    @staticmethod
    def setup_context(ctx, inputs, output):
        *tensors, reduction, label_smoothing = inputs
        ctx.options = reduction, label_smoothing
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*tensors)
        ctx.save_for_forward(*tensors)

    @staticmethod
    def backward(ctx, v, u):
        dloss, logits, target, weight, _ = ctx.saved_tensors
        v, u = _zeros_for(v, logits), _zeros_for(u, target)
        ddloss = dlogits = dtarget = None
        if ctx.needs_input_grad[0]:
            ddloss = _loss_along(v, u, logits, target, weight, *ctx.options)
        if any(ctx.needs_input_grad[1:3]):
            dlogits, dtarget = _gradients_along(v, u, dloss, logits, target, weight, *ctx.options)
        return ddloss, dlogits, dtarget, None, None, None, None

    @staticmethod
    def jvp(ctx, dloss_t, logits_t, target_t, *_):
        dloss, logits, target, weight, stats = ctx.saved_tensors
        v, u = _zeros_for(logits_t, logits), _zeros_for(target_t, target)
        dlogits_t, dtarget_t = _gradients_along(v, u, dloss, logits, target, weight, *ctx.options)
        if dloss_t is not None:
            more = _probabilities_backward(dloss_t, logits, target, weight, stats, *ctx.options)
            dlogits_t, dtarget_t = dlogits_t + more[0], dtarget_t + more[1]
        return dlogits_t, dtarget_t


cross_entropy_probabilities, _probabilities_backward = (
    differentiable(CrossEntropyProbabilities),
    differentiable(CrossEntropyProbabilitiesBackward),
)


def _smoothed(y, weight, label_smoothing):
    """t_nc = w_c·((1−ε)·y_nc + ε/C), (N, C)."""
    t = (1 - label_smoothing) * y + label_smoothing / max(y.shape[1], 1)  # (N, C)
    return t if weight is None else weight.to(y.dtype) * t
