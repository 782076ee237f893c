"""Cross-entropy's directional derivatives, which are its second derivatives and its forward mode.

Names and first derivative: `fused_ops.ops.cross_entropy`. Let the logits x move along v and the target y along u. With
the row's gradient by s, q = A·p − t, with k = ∂s/∂x and with a = ∂t/∂y = (1−ε)·w, what moves is

    s         k·v =: v_s                                      k        −2·s·v_s/cap²
    lse       Σ_c p·v_s =: λ  (softmax is lse's gradient)     p        p·(v_s − λ)
    t         a·u                                             A        Σ_c a·u + 2ζ·λ =: α

so along (v, u) the loss and the two gradients dx = g·q·k and dy = g·a·(lse − s) change by

    d(loss_n) = Σ_c q·v_s + Σ_c a·u·(lse − s)
    d(dx)     = g·(k·(α·p + A·p·(v_s − λ) − a·u) − q·2·s·v_s/cap²)
    d(dy)     = g·a·(λ − v_s)

A gradient's Jacobian is the matrix of second derivatives, which is symmetric: it maps directions to changes (forward
mode over reverse mode), and gradients of (dx, dy) to gradients of (x, y) (reverse over reverse), by the same formulas.
All is written in PyTorch's differentiable ops, which gives the derivatives of higher order.
"""

import torch

from fused_ops._op import accumulate_dtype
from fused_ops.ops._logits import as_rows, like_logits, target_rows


class RowDerivatives:
    """The pieces of every derivative, for rows of logits: the symbols above, (N, C) or (N, 1).

    In the rows that are ignored t, p, A and q are 0, and so is g, whatever is handed in: dloss over 0 is inf.
    """

    def __init__(self, logits, target, weight, ignore_index, label_smoothing, z_loss, softcap):
        x = as_rows(logits).to(accumulate_dtype(logits.dtype))  # (N, C)
        self.logits, self.z_loss, self.softcap = logits, z_loss, softcap
        self.t, self.kept = dense_targets(
            target_rows(target), weight, ignore_index, label_smoothing, x
        )  # (N, C), (N, 1)
        self.a = (1 - label_smoothing) * (x.new_ones(()) if weight is None else weight.to(x.dtype))  # (C) or ()
        self.s, self.k = softcapped(x, softcap)  # (N, C), (N, C) or 1
        self.neg_logp = -self.s.log_softmax(1)  # (N, C): lse − s
        self.p = (-self.neg_logp).exp().where(self.kept, 0)  # (N, C)
        self.A = self.t.sum(1, keepdim=True)  # (N, 1)
        if z_loss:
            lse = self.s.logsumexp(1, keepdim=True)  # (N, 1)
            self.A = self.A + 2 * z_loss * lse.where(self.kept, 0)  # (N, 1)
        self.q = self.A * self.p - self.t  # (N, C)

    def loss_along(self, v, u):
        """How fast each row's loss changes: (N,). None is no movement."""
        along = self.q.new_zeros(self.q.shape[0]) if v is None else (self.q * self._of_s(v)).sum(1)  # (N)
        return along if u is None else along + (self.a * self._like_x(u) * self.neg_logp).sum(1)

    def gradient(self, g):
        """dx, like the logits, for the gradient g, (N, 1), of each row's loss."""
        return self._like_logits(g.where(self.kept, 0) * self.q * self.k)

    def gradients_along(self, v, u, g):
        """How fast dx and dy change, like the logits; g, (N, 1), does not."""
        g = g.where(self.kept, 0)  # (N, 1)
        v_s = torch.zeros_like(self.q) if v is None else self._of_s(v)  # (N, C)
        lse_t = (self.p * v_s).sum(1, keepdim=True)  # (N, 1): λ
        q_t = self.A * self.p * (v_s - lse_t)  # (N, C)
        if self.z_loss:
            q_t = q_t + 2 * self.z_loss * lse_t * self.p  # (N, C)
        if u is not None:
            t_t = self.a * self._like_x(u)  # (N, C)
            q_t = q_t + t_t.sum(1, keepdim=True) * self.p - t_t  # (N, C)
        dx_t = self.k * q_t  # (N, C)
        if self.softcap is not None:
            dx_t = dx_t - self.q * 2 * self.s * v_s / self.softcap**2  # (N, C)
        return self._like_logits(g * dx_t), self._like_logits(g * self.a * (lse_t - v_s))

    def _of_s(self, v):
        return self.k * self._like_x(v)

    def _like_x(self, v):
        return as_rows(v).to(self.s.dtype)

    def _like_logits(self, rows):
        return like_logits(rows, self.logits).to(self.logits.dtype)


def softcapped(x, softcap):
    """s = cap·tanh(x/cap), or x itself where there is no cap, and k = ds/dx = 1 − (s/cap)²."""
    if softcap is None:
        return x, 1
    tanh = (x / softcap).tanh()  # (N, C)
    return softcap * tanh, 1 - tanh.square()


def dense_targets(target, weight, ignore_index, label_smoothing, x):
    """t, (N, C), with zeros in the rows that are ignored; and which rows are kept, (N, 1)."""
    share = label_smoothing / max(x.shape[1], 1)  # ε/C
    w = x.new_ones(x.shape[1]) if weight is None else weight.to(x.dtype)  # (C)
    if target.is_floating_point():
        t = w * ((1 - label_smoothing) * target.to(x.dtype) + share)  # (N, C)
        return t, x.new_ones(x.shape[0], 1, dtype=torch.bool)
    y, kept, w_y = class_targets(target, w, ignore_index)  # (N) each
    smooth = kept[:, None] * (share * w)  # (N, C)
    return smooth.scatter_add(1, y[:, None], (1 - label_smoothing) * w_y[:, None]), kept[:, None]


def class_targets(target, w, ignore_index):
    """y (N,), with a harmless 0 where ignored; which rows are kept (N,); w_y (N,), 0 where ignored."""
    kept = target != ignore_index  # (N)
    y = target.where(kept, 0)  # (N)
    return y, kept, w.gather(0, y).where(kept, 0)  # gather, unlike w[y], refuses a negative index


def mean_weights(target, weight, ignore_index, dtype):
    """Each row's weight in the mean, (N,): w_y, 0 where ignored (class indices), or 1 (class probabilities)."""
    if target.is_floating_point():
        return target.new_ones(target.shape[0], dtype=dtype)
    if weight is None:
        return (target != ignore_index).to(dtype)
    return class_targets(target, weight.to(dtype), ignore_index)[2]


def reduced(losses, reduction, divisor):
    """The rows' losses, (N,), or their sum or their mean, ()."""
    if reduction == "none":
        return losses
    return losses.sum() / divisor if reduction == "mean" else losses.sum()


def row_gradient(dloss, reduction, divisor, rows):
    """g_n, the gradient of the whole by one row's loss: (N, 1)."""
    g = dloss / divisor if reduction == "mean" else dloss
    return g.expand(rows)[:, None]
