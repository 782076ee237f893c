"""Batch norm's derivations, with a residual and any activation: proved, and the code's, as in test_derivations.py.

The proofs are by algebra, for three rows of a channel and an a whose values, slopes and curvatures are symbols.
"""

import functools

import numpy as np
import pytest
import sympy as sp
import torch
from formulas import Formulas, Numbers, along, array, assert_proved, gradient, is_zero

from fused_ops.ops import _activations as activations
from fused_ops.ops import batch_norm as bn
from fused_ops.ops import batch_norm_derivatives as bn2

F64 = torch.float64


class a2(sp.Function):
    """a'', of whatever activation a is."""


class a1(sp.Function):
    """a'."""

    def fdiff(self, argindex=1):
        return a2(self.args[0])


class a(sp.Function):
    """Any activation."""

    def fdiff(self, argindex=1):
        return a1(self.args[0])


z = sp.Symbol("z", real=True)


def documented_activation(name):
    """a, a' and a'' as expressions of z."""
    documented = activations.ACTIVATIONS[name]
    f = Formulas(documented, z=z, exp=sp.exp, erf=sp.erf, tanh=sp.tanh, sqrt=sp.sqrt, π=sp.pi)
    if name == "relu":
        f.quote("a(z) = z where z > 0, else 0: a' is 1 or 0 and a'' = 0")
        return sp.Piecewise((z, z > 0), (0, True)), sp.Piecewise((1, z > 0), (0, True)), sp.Integer(0)
    if name == "leaky_relu":
        f.quote("a(z) = z where z > 0, else z/100: a' is 1 or 1/100 and a'' = 0")
        return (
            sp.Piecewise((z, z > 0), (z / 100, True)),
            sp.Piecewise((1, z > 0), (sp.Rational(1, 100), True)),
            sp.Integer(0),
        )
    if name == "tanh":
        f.define("y = tanh z")
        return f["y"], f.value("y' = (c·c − s·s)/c² = 1 − y²"), f.value("y'' = −2y·y' = −2y·(1 − y²)")
    if name == "gelu":
        f.names["φ"] = f.value("φ(z) = exp(−z²/2)/√(2π)")
        f.names["Φ"] = f.value("Φ(z) = ½(1 + erf(z/√2))")
        return z * f["Φ"], f.value("a' = Φ + z·φ"), f.value("a'' = φ + (φ − z²·φ) = φ·(2 − z²)")
    f.define("σ = 1/(1 + exp(−z))")
    second = "a'' = σ·(1 − σ)·(1 + z·(1 − σ)) + σ·((1 − σ) − z·σ·(1 − σ)) = σ·(1 − σ)·(2 + z·(1 − 2σ))"
    return f.value("a(z) = z·σ"), f.value("a' = σ + z·σ·(1 − σ) = σ·(1 + z·(1 − σ))"), f.value(second)


@pytest.mark.parametrize("name", activations.ACTIVATIONS)
def test_activations(name):
    value, slope, curvature = documented_activation(name)
    assert is_zero(sp.diff(value, z) - slope)
    assert is_zero(sp.diff(slope, z) - curvature)
    code, points = activations.ACTIVATIONS[name], torch.tensor([-2.1, -0.4, 0.3, 1.7], dtype=F64)
    for function, expression in zip(
        (code.value, code.derivative, code.second_derivative), (value, slope, curvature), strict=True
    ):
        for point in points:
            Numbers(z=point.item()).assert_close(function(point), expression)


def test_steps_of_the_activations():
    def formulas(documented):
        return Formulas(documented, z=z, s=sp.sinh(z), c=sp.cosh(z), exp=sp.exp, erf=sp.erf, sqrt=sp.sqrt, π=sp.pi)

    f = formulas(activations.Tanh)
    f.define("y = tanh z = s/c")
    assert all(sp.simplify(step - sp.diff(f["y"], z)) == 0 for step in f.steps("y' = (c·c − s·s)/c² = 1 − y²"))
    f = formulas(activations.Gelu)
    f.names["φ"], f.names["Φ"] = f.value("φ(z) = exp(−z²/2)/√(2π)"), f.value("Φ(z) = ½(1 + erf(z/√2))")
    assert is_zero(sp.diff(f["Φ"], z) - f["φ"])
    assert is_zero(sp.diff(f["φ"], z) - f.value("φ' = −z·φ"))
    first, *_ = f.steps("a'' = φ + (φ − z²·φ) = φ·(2 − z²)")
    assert is_zero(first - f.value("a'' = φ + (φ − z²·φ) = φ·(2 − z²)"))
    f = formulas(activations.Silu)
    f.define("σ = 1/(1 + exp(−z))")
    f.names["σ2"] = f["σ"] ** 2
    assert all(is_zero(step - sp.diff(f["σ"], z)) for step in f.steps("σ' = exp(−z)·σ² = σ·(1 − σ)"))
    assert is_zero(sp.diff(1 - f["σ"], z) - f.value("(1 − σ)' = −σ·(1 − σ)"))
    for formula in (
        "a' = σ + z·σ·(1 − σ) = σ·(1 + z·(1 − σ))",
        "a'' = σ·(1 − σ)·(1 + z·(1 − σ)) + σ·((1 − σ) − z·σ·(1 − σ)) = σ·(1 − σ)·(2 + z·(1 − 2σ))",
    ):
        first, last = f.steps(formula)
        assert is_zero(first - last)


# ------------------------------------------------------------------------------------------------------- batch norm


x, dy, residual = array("x", 3), array("dy", 3), array("residual", 3)
γ, β, ε = sp.symbols("γ β ε", real=True)
MOVES = {"dy_t": array("dyt", 3), "x_t": array("xt", 3), "residual_t": array("rest", 3)}
MOVES |= {"γ_t": sp.Symbol("γt", real=True), "β_t": sp.Symbol("βt", real=True)}
BACK = {"v": array("v", 3), "s": array("s", 3), "u": sp.Symbol("u", real=True), "w": sp.Symbol("w", real=True)}


def batch_norm_names(training, **values):
    """The names that the formulas begin with, and P."""
    documented = bn, bn.batch_norm_backward, bn2, bn2.Point.along, bn2.output_along, bn2.gradients_along
    functions = {f.__name__: np.vectorize(f, otypes=[object]) for f in (a, a1, a2)}
    values |= {"γ": γ, "β": β, "ε": ε, "residual": residual, "N": 3, **functions}
    f = Formulas(*documented, bn2.gradients_pulled_back, **values)
    f.define("P(v) = v − mean(v) − x̂·mean(v·x̂)" if training else "P(v) = v")
    return f


@functools.cache
def batch_norm(training):
    """Batch norm as documented: y and the first derivatives, dx, dγ, dβ and dresidual."""
    f = batch_norm_names(training, x=x, dy=dy, **MOVES, **BACK)
    if training:
        f.names["μ"] = f["mean"](x)
        f.names["σ2"] = f["mean"]((x - f["μ"]) ** 2)
    else:
        f.names |= {"μ": sp.Symbol("μ", real=True), "σ2": sp.Symbol("σ2", positive=True)}
        f.names["mean"] = lambda v: 0  # every mean in a derivative is there because the batch makes μ and r
    f.define("r = (σ² + ε)^-½", "x̂ = (x − μ)·r", "z = γ·x̂ + β + residual", "y = a(z)")
    f.define("dz = dy·a'(z)", "dβ = Σ dz", "dγ = Σ dz·x̂")
    f.define("dx = γ·r·( dz − mean(dz) − x̂·mean(dz·x̂) )" if training else "dx = γ·r·dz")
    f.names["dresidual"] = f["dz"]
    return f


TRAINING = pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])


@TRAINING
def test_gradients(training):
    f = batch_norm(training)
    loss = np.sum(dy * f["y"])
    assert_proved(f["dx"], gradient(loss, x))
    assert_proved(f["dγ"], gradient(loss, γ))
    assert_proved(f["dβ"], gradient(loss, β))
    assert_proved(f["dresidual"], gradient(loss, residual))
    if training:
        for step in f.steps("∂r/∂x_i = −r³·(x_i − μ)/N = −r²·x̂_i/N"):
            assert_proved(step, gradient(f["r"], x))


def test_what_is_left_without_two_parts_is_symmetric():
    f = batch_norm_names(True, x̂=array("x̂", 3))
    f.names |= {"a": array("a", 3), "b": array("b", 3)}
    assert_proved(f.value("Σ a·P(b)"), f.value("Σ a·P(b) = Σ b·P(a)"))


@functools.cache
def batch_norm_along(training):
    """How fast y and the gradients move, as documented."""
    f = batch_norm(training)
    f.names["z_t"] = f.value("γ·r·P(x_t) + γ_t·x̂ + β_t + residual_t")
    f.names["y_t"] = f.value("a'(z)·z_t")
    f.define("x̂_t = r·P(x_t)", "r_t = −r²·mean(x̂·x_t)", "dz_t = dy_t·a'(z) + dy·a''(z)·z_t")
    f.define("dx_t = γ·r·P(dz_t) + γ_t·r·P(dz) + γ·r_t·P(dz) − γ·r·(x̂_t·mean(dz·x̂) + x̂·mean(dz·x̂_t))")
    f.define("dγ_t = Σ (dz_t·x̂ + dz·x̂_t)", "dβ_t = Σ dz_t")
    return f


@TRAINING
def test_changes_along_a_direction(training):
    f = batch_norm_along(training)
    inputs = {"dy_t": dy, "x_t": x, "γ_t": γ, "β_t": β, "residual_t": residual}
    moved = [(inputs[name], moves) for name, moves in MOVES.items()]
    for name in ("x̂", "z", "y", "dz", "dx", "dγ", "dβ"):
        assert_proved(f[name + "_t"], along(f[name], *moved))
    if training:
        assert_proved(f["r_t"], along(f["r"], *moved))


@functools.cache
def batch_norm_pulled_back(training):
    """What comes back to dy, x, γ, β and the residual, as documented; ψ, whose gradients these are."""
    f = batch_norm(training)
    f.define("ψ = Σ v·dx + Σ u·dγ + Σ w·dβ + Σ s·dresidual", "to_dz = γ·r·P(v) + u·x̂ + w + s")
    f.define("e = ∂ψ/∂x̂ = u·dz − γ·r·(v·mean(dz·x̂) + dz·mean(v·x̂))", "to_z = to_dz·dy·a''(z)")
    if training:
        to_x, to_γ = f.value("r·P(e) − γ·r²·x̂·mean(v·P(dz))"), f.value("r·Σ v·P(dz)")
    else:
        to_x, to_γ = f.value("u·dz·r"), f.value("r·Σ v·dz")
    to_x, to_γ = to_x + f.value("γ·r·P(to_z)"), to_γ + f.value("Σ to_z·x̂")
    return f["ψ"], (f.value("to_dz·a'(z)"), to_x, to_γ, f.value("Σ to_z"), f["to_z"])


@TRAINING
def test_second_derivatives(training):
    ψ, documented = batch_norm_pulled_back(training)
    for back, by in zip(documented, (dy, x, γ, β, residual), strict=True):
        assert_proved(back, gradient(ψ, by))


def test_steps_of_the_second_derivative():
    """ψ's derivatives by dz, x̂ and r, each a symbol of its own."""
    dz, r = array("dz", 3), sp.Symbol("r", real=True)
    f = batch_norm_names(True, x̂=array("x̂", 3), dz=dz, dresidual=dz, r=r, **BACK)
    f.define("dx = γ·r·P(dz)", "dγ = Σ dz·x̂", "dβ = Σ dz")
    f.define("ψ = Σ v·dx + Σ u·dγ + Σ w·dβ + Σ s·dresidual")
    assert_proved(f.value("to_dz = γ·r·P(v) + u·x̂ + w + s"), gradient(f["ψ"], dz))
    e = f.value("e = ∂ψ/∂x̂ = u·dz − γ·r·(v·mean(dz·x̂) + dz·mean(v·x̂))")
    assert_proved(e, gradient(f["ψ"], f["x̂"]))
    assert_proved(f.value("∂ψ/∂r = γ·Σ v·P(dz)"), gradient(f["ψ"], r))
    assert_proved(f.value("r·Σ v·P(dz)"), gradient(f["ψ"], γ))


@TRAINING
@pytest.mark.parametrize("activation", [None, *activations.ACTIVATIONS])
def test_code(activation, training):
    """The references compute what was proved, in float64."""
    expressions = (z, sp.Integer(1), sp.Integer(0)) if activation is None else documented_activation(activation)
    functions = {name: sp.lambdify(z, e, "math") for name, e in zip(("a", "a1", "a2"), expressions, strict=True)}
    n, f = Numbers(functions, ε=1e-3, σ2=0.8), batch_norm_along(training)

    def rows(symbols):
        return n.of(symbols).view(-1, 1)

    def vector(symbol):
        return n.of(symbol).view(1)

    saved = rows(x), vector(γ), vector(β), rows(residual)
    running = (None, None) if training else (vector(f["μ"]), vector(f["σ2"]))
    forward = saved[0], *running, *saved[1:3], training, 0.1, n.of(ε).item(), activation, saved[3]
    y, stats = bn.batch_norm_forward(*forward)
    n.assert_close(y, f["y"])

    options = training, n.of(ε).item(), activation
    dx, dγ, dβ, dresidual = bn.batch_norm_backward(rows(dy), *saved, stats, *options, True, True, True)
    for actual, name in zip((dx, dγ, dβ), ("dx", "dγ", "dβ"), strict=True):
        n.assert_close(actual, f[name])
    n.assert_close(rows(dy) if activation is None else dresidual, f["dresidual"])

    point = bn2.Point(*saved, stats, *options)
    dy_t, *moves = rows(MOVES["dy_t"]), rows(MOVES["x_t"]), vector(MOVES["γ_t"]), vector(MOVES["β_t"])
    moves.append(rows(MOVES["residual_t"]))
    n.assert_close(bn2.output_along(point, *moves), f["y_t"])
    changes = bn2.gradients_along(point, rows(dy), dy_t, *moves)
    for actual, name in zip(changes, ("dx_t", "dγ_t", "dβ_t", "dz_t"), strict=True):
        n.assert_close(actual, f[name])

    _, documented = batch_norm_pulled_back(training)
    cotangents = rows(BACK["v"]), vector(BACK["u"]), vector(BACK["w"]), rows(BACK["s"])
    back = bn2.gradients_pulled_back(point, rows(dy), *cotangents)
    for actual, expected in zip(back, documented, strict=True):
        n.assert_close(torch.zeros_like(n.of(expected)) if actual is None else actual, expected)
