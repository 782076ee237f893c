"""The second derivatives of batch norm, and how fast its output and gradients move with its inputs (forward mode).

The symbols are those of `fused_ops.ops.batch_norm`. Two facts carry all of it. μ and r depend on x, so as x moves along
v, x̂ moves not by r·v but by r·P(v), where

    P(v) = v − mean(v) − x̂·mean(v·x̂)

is what is left of v without its mean and its part along x̂. And P is symmetric, Σ a·P(b) = Σ b·P(a): what moves x̂ on
with x is also what brings a gradient back. In evaluation μ and r are constants, and P(v) = v.

q_t, the tangent of q, is how fast q moves where the inputs move so: x̂_t = r·P(x_t), for one. None is no motion.

All is written in PyTorch's differentiable ops, which gives the derivatives of third and higher order.
"""

import torch

from fused_ops.ops._activations import ACTIVATIONS
from fused_ops.ops._channels import all_but_channels, gain, mean_of_channels, per_channel


class Point:
    """Where the derivatives are taken: x̂, r, γ and, if there is an activation, a'(z) and a''(z).

    All are differentiable functions of the inputs: in training μ and r, too, are worked out anew from x.
    """

    def __init__(self, input, weight, bias, residual, stats, training, eps, activation):
        self.dtype, self.training, self.activation = input.dtype, training, activation
        x = input.to(stats.dtype)  # (N, C, ...)
        if training:
            centred = x - mean_of_channels(x)  # (N, C, ...)
            self.r = (mean_of_channels(centred.square()) + eps) ** -0.5  # (1, C, 1, ...)
        else:
            mean, rstd = stats  # (C), (C)
            centred = x - per_channel(mean, x)  # (N, C, ...)
            self.r = per_channel(rstd, x)  # (C, 1, ...)
        self.x_hat = centred * self.r  # (N, C, ...)
        self.gain = gain(weight, x)  # (C, 1, ...): γ
        if activation is not None:
            z = pre_activation(self.x_hat, weight, bias, residual)  # (N, C, ...)
            self.slope = ACTIVATIONS[activation].derivative(z)  # (N, C, ...): a'(z)
            self.curvature = ACTIVATIONS[activation].second_derivative(z)  # (N, C, ...): a''(z)

    def projected(self, a):
        """P(a), (N, C, ...)."""
        if not self.training:
            return a
        return a - mean_of_channels(a) - self.x_hat * mean_of_channels(a * self.x_hat)

    def along(self, x_t, weight_t, bias_t, residual_t):
        """How fast z moves with x, γ, β and the residual: γ·r·P(x_t) + γ_t·x̂ + β_t + residual_t."""
        z_t = torch.zeros_like(self.x_hat)
        if x_t is not None:
            z_t = z_t + self.gain * self.r * self.projected(x_t.to(z_t.dtype))
        if weight_t is not None:
            z_t = z_t + gain(weight_t, z_t) * self.x_hat
        if bias_t is not None:
            z_t = z_t + gain(bias_t, z_t)
        if residual_t is not None:
            z_t = z_t + residual_t.to(z_t.dtype)
        return z_t


def pre_activation(x_hat, weight, bias, residual):
    """z = γ·x̂ + β + residual, (N, C, ...)."""
    z = x_hat if weight is None else gain(weight, x_hat) * x_hat
    z = z if bias is None else z + gain(bias, x_hat)
    return z if residual is None else z + residual.to(x_hat.dtype)


def output_along(point, x_t, weight_t, bias_t, residual_t):
    """How fast y = a(z) moves with the inputs: a'(z)·z_t, (N, C, ...)."""
    y_t = point.along(x_t, weight_t, bias_t, residual_t)
    if point.activation is not None:
        y_t = point.slope * y_t
    return y_t.to(point.dtype)


def gradients_along(point, dy, dy_t, x_t, weight_t, bias_t, residual_t):
    """How fast dx, dγ, dβ and dresidual move with dy and the inputs.

    The product rule on dz = dy·a'(z), and then on dx = γ·r·P(dz), dγ = Σ dz·x̂ and dβ = Σ dz:

        dz_t = dy_t·a'(z) + dy·a''(z)·z_t
        dx_t = γ·r·P(dz_t) + γ_t·r·P(dz) + γ·r_t·P(dz) − γ·r·(x̂_t·mean(dz·x̂) + x̂·mean(dz·x̂_t))
        dγ_t = Σ (dz_t·x̂ + dz·x̂_t)        dβ_t = Σ dz_t

    with x̂_t = r·P(x_t) and r_t = −r²·mean(x̂·x_t). In evaluation r_t and the last bracket of dx_t are zero.
    """
    x_hat, r = point.x_hat, point.r
    dz = dy.to(x_hat.dtype)  # (N, C, ...)
    dz_t, x_t = (torch.zeros_like(x_hat) if t is None else t.to(x_hat.dtype) for t in (dy_t, x_t))  # (N, C, ...)
    if point.activation is not None:
        z_t = point.along(x_t, weight_t, bias_t, residual_t)  # (N, C, ...)
        dz_t = point.slope * dz_t + dz * point.curvature * z_t  # (N, C, ...)
        dz = point.slope * dz  # (N, C, ...)
    x_hat_t = r * point.projected(x_t)  # (N, C, ...)
    dx_t = point.gain * r * point.projected(dz_t)  # (N, C, ...)
    if weight_t is not None:
        dx_t = dx_t + gain(weight_t, x_hat) * r * point.projected(dz)  # (N, C, ...)
    if point.training:
        r_t = -r.square() * mean_of_channels(x_hat * x_t)  # (1, C, 1, ...)
        through_x_hat = x_hat_t * mean_of_channels(dz * x_hat) + x_hat * mean_of_channels(dz * x_hat_t)  # (N, C, ...)
        dx_t = dx_t + point.gain * (r_t * point.projected(dz) - r * through_x_hat)  # (N, C, ...)
    dweight_t = (dz_t * x_hat + dz * x_hat_t).sum(all_but_channels(x_hat))  # (C)
    dbias_t = dz_t.sum(all_but_channels(x_hat))  # (C)
    return dx_t.to(point.dtype), dweight_t, dbias_t, dz_t.to(point.dtype)


def gradients_pulled_back(point, dy, v, u, w, s):
    """What comes back to dy, x, γ, β and the residual from gradients v of dx, u of dγ, w of dβ and s of dresidual.

    First to dz. ψ = Σ v·dx + Σ u·dγ + Σ w·dβ + Σ s·dresidual is linear in dz, and since P is symmetric

        to_dz = γ·r·P(v) + u·x̂ + w + s

    is how fast z would move along (v, u, w, s). In training ψ depends on x through x̂ and through r, too:

        e = ∂ψ/∂x̂ = u·dz − γ·r·(v·mean(dz·x̂) + dz·mean(v·x̂))        ∂ψ/∂r = γ·Σ v·P(dz)

    x̂ passes e back as r·P(e), the backward pass once more; and ∂r/∂x = −r²·x̂/N. So

        r·P(e) − γ·r²·x̂·mean(v·P(dz))    comes back to x,     r·Σ v·P(dz)    to γ

    In evaluation x̂ is linear in x and r a constant: u·dz·r comes back to x, r·Σ v·dz to γ.

    Then from dz = dy·a'(z): to_dz·a'(z) comes back to dy and to_z = to_dz·dy·a''(z) to z = γ·x̂ + β + residual, which
    passes it on as it does dz in the backward pass: γ·r·P(to_z) more to x, Σ to_z·x̂ more to γ, Σ to_z to β, and to_z
    itself to the residual. Without an activation a' = 1 and a'' = 0.
    """
    x_hat, r = point.x_hat, point.r
    v = torch.zeros_like(x_hat) if v is None else v.to(x_hat.dtype)  # (N, C, ...)
    dy = dy.to(x_hat.dtype)  # (N, C, ...)
    to_dz = point.along(v, u, w, s)  # (N, C, ...)
    dz = dy if point.activation is None else point.slope * dy  # (N, C, ...)

    P_dz = point.projected(dz)  # (N, C, ...)
    e = torch.zeros_like(dz) if u is None else gain(u, x_hat) * dz  # (N, C, ...)
    if point.training:
        e = e - point.gain * r * (v * mean_of_channels(dz * x_hat) + dz * mean_of_channels(v * x_hat))  # (N, C, ...)
    to_x = r * point.projected(e)  # (N, C, ...)
    if point.training:
        to_x = to_x - point.gain * r.square() * x_hat * mean_of_channels(v * P_dz)  # (N, C, ...)
    to_weight = (r * v * P_dz).sum(all_but_channels(x_hat))  # (C)
    if point.activation is None:
        return to_dz.to(point.dtype), to_x.to(point.dtype), to_weight, None, None

    to_dy = to_dz * point.slope  # (N, C, ...)
    to_z = to_dz * dy * point.curvature  # (N, C, ...)
    to_x = to_x + point.gain * r * point.projected(to_z)  # (N, C, ...)
    to_weight = to_weight + (to_z * x_hat).sum(all_but_channels(x_hat))  # (C)
    to_bias = to_z.sum(all_but_channels(x_hat))  # (C)
    return to_dy.to(point.dtype), to_x.to(point.dtype), to_weight, to_bias, to_z.to(point.dtype)
