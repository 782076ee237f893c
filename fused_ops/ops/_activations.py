"""The functions that batch norm can apply to its output, each with its first and second derivative.

Written in PyTorch's differentiable ops, so that autograd finds those of higher order.
"""

import math

import torch


class Relu:
    """a(z) = z where z > 0, else 0: a' is 1 or 0 and a'' = 0. At 0, where it has no derivative, a' = 0."""

    @staticmethod
    def value(z):
        return torch.relu(z)

    @staticmethod
    def derivative(z):
        return torch.where(z <= 0, 0.0, 1.0).to(z.dtype)

    @staticmethod
    def second_derivative(z):
        return torch.zeros_like(z)


class LeakyRelu:
    """a(z) = z where z > 0, else z/100: a' is 1 or 1/100 and a'' = 0. At 0, where it has no derivative, a' = 1/100."""

    SLOPE = 0.01

    @staticmethod
    def value(z):
        return torch.where(z > 0, z, LeakyRelu.SLOPE * z)

    @staticmethod
    def derivative(z):
        return z.new_ones(()).where(z > 0, LeakyRelu.SLOPE)  # of z's dtype: float32 would round it

    @staticmethod
    def second_derivative(z):
        return torch.zeros_like(z)


class Tanh:
    """y = tanh z = s/c, with s = sinh z and c = cosh z, each the derivative of the other.

    By the quotient rule y' = (c·c − s·s)/c² = 1 − y². By the chain rule y'' = −2y·y' = −2y·(1 − y²).
    """

    @staticmethod
    def value(z):
        return torch.tanh(z)

    @staticmethod
    def derivative(z):
        return 1 - torch.tanh(z).square()

    @staticmethod
    def second_derivative(z):
        y = torch.tanh(z)
        return -2 * y * (1 - y.square())


class Gelu:
    """a(z) = z·Φ(z), with the normal distribution's Φ(z) = ½(1 + erf(z/√2)) and density φ(z) = exp(−z²/2)/√(2π).

    Φ' = φ, and the chain rule on the exponent gives φ' = −z·φ. By the product rule, twice,

        a' = Φ + z·φ        a'' = φ + (φ − z²·φ) = φ·(2 − z²)
    """

    @staticmethod
    def value(z):
        return z * Gelu._distribution(z)

    @staticmethod
    def derivative(z):
        return Gelu._distribution(z) + z * Gelu._density(z)

    @staticmethod
    def second_derivative(z):
        return Gelu._density(z) * (2 - z.square())

    @staticmethod
    def _distribution(z):
        return 0.5 * (1 + torch.erf(z * math.sqrt(0.5)))

    @staticmethod
    def _density(z):
        return torch.exp(-0.5 * z.square()) * (1 / math.sqrt(2 * math.pi))


class Silu:
    """a(z) = z·σ, with the sigmoid σ = 1/(1 + exp(−z)).

    The chain rule on the fraction gives σ' = exp(−z)·σ² = σ·(1 − σ), since exp(−z)·σ = 1 − σ; and so
    (1 − σ)' = −σ·(1 − σ). By the product rule, twice,

        a' = σ + z·σ·(1 − σ) = σ·(1 + z·(1 − σ))
        a'' = σ·(1 − σ)·(1 + z·(1 − σ)) + σ·((1 − σ) − z·σ·(1 − σ)) = σ·(1 − σ)·(2 + z·(1 − 2σ))
    """

    @staticmethod
    def value(z):
        return z * torch.sigmoid(z)

    @staticmethod
    def derivative(z):
        s = torch.sigmoid(z)
        return s * (1 + z * (1 - s))

    @staticmethod
    def second_derivative(z):
        s = torch.sigmoid(z)
        return s * (1 - s) * (2 + z * (1 - 2 * s))


ACTIVATIONS = {"relu": Relu, "leaky_relu": LeakyRelu, "tanh": Tanh, "gelu": Gelu, "silu": Silu}


def check_activation(activation):
    if activation is not None and activation not in ACTIVATIONS:
        raise ValueError(f"activation must be None or one of {', '.join(ACTIVATIONS)}, but got {activation!r}")
