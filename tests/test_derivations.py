"""The derivations: docs/derivations.md is made of the docstrings, and their formulas are proved and are the code's.

Every formula here is quoted from a docstring, which must hold it word for word (tests/formulas.py). Sympy builds the
forward formula, differentiates it, and proves each documented derivative equal to what it finds, for all values of the
symbols, by algebra: no proof is by numbers. Numbers, to 10 digits, then say that the references compute these formulas.
"""

import runpy
from pathlib import Path

import numpy as np
import pytest
import sympy as sp
import torch
from formulas import Formulas, Numbers, along, array, assert_proved, gradient, is_zero

from fused_ops.ops import batch_norm as bn
from fused_ops.ops import batch_norm_derivatives as bn2
from fused_ops.ops import cross_entropy as ce
from fused_ops.ops import cross_entropy_derivatives as ce2
from fused_ops.ops import linear_cross_entropy as lce
from fused_ops.ops import linear_cross_entropy_derivatives as lce2

DOCS = Path(__file__).resolve().parent.parent / "docs"
SMOOTHING, Z_LOSS, CAP = 0.3, 0.7, 1.9
ε, ζ, cap = sp.symbols("ε ζ cap", positive=True)
dloss = sp.Symbol("dloss", real=True)


def test_page_is_made_of_the_docstrings():
    page = runpy.run_path(str(DOCS / "make_derivations.py"))["page"]()
    assert (DOCS / "derivations.md").read_text(encoding="utf-8") == page, "run `make docs`"


def test_a_wrong_formula_is_not_proved():
    x = array("x", 2)
    lse, softmax = sp.log(sp.exp(x[0]) + sp.exp(x[1])), sp.exp(x[0]) / (sp.exp(x[0]) + sp.exp(x[1]))
    assert is_zero(sp.diff(lse, x[0]) - softmax)
    assert not is_zero(sp.diff(lse, x[0]) + softmax)
    with pytest.raises(AssertionError, match="no docstring states"):
        Formulas(ce, x=x).value("s = cap·tanh(x")


REPEATED = (  # formulas that stand in a second docstring, too
    (ce.cross_entropy_forward, "loss_n = Σ_c t_nc·(lse_n − s_nc) + ζ·lse_n²"),
    (ce.cross_entropy_backward, "dx_nc = g_n·(A_n·p_nc − t_nc)·k_nc"),
    (ce.cross_entropy_backward, "A_n = Σ_c t_nc + 2ζ·lse_n"),
    (ce.cross_entropy_backward, "dy_nc = g_n·(1−ε)·w_c·(lse_n − s_nc)"),
    (ce2.softcapped, "s = cap·tanh(x/cap)"),
    (lce2.linear_logits, "z = x·Wᵀ + b"),
    (lce.linear_cross_entropy_backward, "dx = dz·W"),
    (lce.linear_cross_entropy_backward, "dW = dzᵀ·x"),
    (lce.linear_cross_entropy_backward, "db = Σ_n dz_n"),
    (lce2, "dx = dz·W"),
    (lce2, "dW = dzᵀ·x"),
    (lce2, "db = Σ_n dz_n"),
    (bn.batch_norm_forward, "y = a(γ·(x − μ)·r + β + residual)"),
    (bn.batch_norm_forward, "r = (σ² + ε)^-½"),
    (bn.batch_norm_backward, "z = γ·x̂ + β + residual"),
    (bn.batch_norm_backward, "x̂ = (x − μ)·r"),
    (bn.batch_norm_backward, "r = (σ² + ε)^-½"),
    (bn2.pre_activation, "z = γ·x̂ + β + residual"),
    (bn2.gradients_along, "dz = dy·a'(z)"),
    (bn2.gradients_along, "dγ = Σ dz·x̂"),
    (bn2.gradients_along, "dβ = Σ dz"),
    (bn2.gradients_pulled_back, "z = γ·x̂ + β + residual"),
)


def test_formulas_that_stand_twice_agree():
    for documented, formula in REPEATED:
        Formulas(documented).quote(formula)


# ------------------------------------------------------------------------------------------------------ cross-entropy


def loss_formulas(x, y, w, capped=True, more=(), **values):
    """Cross-entropy as documented. y holds class indices, None where ignored, or probabilities, (N, C)."""
    values |= {"x": x, "w": w, "C": x.shape[1], "ε": ε, "ζ": ζ, "cap": cap}
    f = Formulas(ce, ce.cross_entropy_backward, *more, **values)
    if isinstance(y, list):
        kept = [0 if c is None else c for c in y]
        f.names |= {"w_y": w[kept][:, None], "is_y": np.eye(x.shape[1], dtype=int)[kept]}
        f.define("t_nc = (1−ε)·w_y·[c = y_n] + (ε/C)·w_c")
    else:
        f.names["y"] = y
        f.define("t_nc = w_c·((1−ε)·y_nc + ε/C)")
    if capped:
        f.define("s = cap·tanh(x/cap)", "k_nc = 1 − (s_nc/cap)²")
    else:
        f.names |= {"s": x, "k": 1}
    f.define("lse_n = log Σ_c exp(s_nc)", "loss_n = Σ_c t_nc·(lse_n − s_nc) + ζ·lse_n²")
    f.names["p"] = f.value("exp(s_c − lse)")
    f.define("A_n = Σ_c t_nc + 2ζ·lse_n")
    return f


def mean_gradient(f, y):
    """g_n, (N, 1), where the loss is the mean times dloss; 0 in the rows that are ignored."""
    if isinstance(y, list):
        kept = np.array([[int(c is not None)] for c in y])
        return dloss * kept / np.sum(f["w_y"] * kept)
    return np.full((len(y), 1), dloss / len(y), dtype=object)


class CodeOptions:
    """What the reference takes for the symbols above: numbers and tensors."""

    def __init__(self, capped=True):
        self.smooth = SMOOTHING, Z_LOSS, CAP if capped else None
        self.numbers = Numbers(low=0.1, ε=SMOOTHING, ζ=Z_LOSS, cap=CAP)

    def target(self, y):
        return torch.tensor([-100 if c is None else c for c in y]) if isinstance(y, list) else self.numbers.of(y)


TARGETS = [
    pytest.param([0, 2], id="indices"),
    pytest.param([None, 1], id="ignored"),
    pytest.param(array("y", 2, 3), id="probabilities"),
]


@pytest.mark.parametrize("capped", [False, True])
@pytest.mark.parametrize("y", TARGETS)
def test_cross_entropy_gradients(y, capped):
    x, w = array("x", 2, 3), array("w", 3)
    f = loss_formulas(x, y, w, capped)
    f.names["g"] = g = mean_gradient(f, y)
    loss = np.sum(g * f["loss"])
    f.define("dx_nc = g_n·(A_n·p_nc − t_nc)·k_nc")
    assert_proved(f["dx"], gradient(loss, x))
    if probabilities := not isinstance(y, list):
        f.define("dy_nc = g_n·(1−ε)·w_c·(lse_n − s_nc)")
        assert_proved(f["dy"], gradient(loss, y))

    code = CodeOptions(capped)
    n, target = code.numbers, code.target(y)
    options = -100, "mean", *code.smooth
    logits, weight = n.of(x), n.of(w)
    out, *saved = ce.cross_entropy_forward(logits, target, weight, *options)
    n.assert_close(out * n.of(dloss), loss)
    dx, dy = ce.cross_entropy_backward(n.of(dloss), logits, target, weight, *saved, *options, True, probabilities)
    n.assert_close(dx, f["dx"])
    if probabilities:
        n.assert_close(dy, f["dy"])


def test_plain_cross_entropy_is_softmax_less_one_at_the_target():
    x, w = array("x", 2, 3), np.array([sp.Integer(1)] * 3, dtype=object)
    f = loss_formulas(x, [0, 2], w, capped=False)
    plain = {ε: 0, ζ: 0}
    f.names["g"] = 1
    f.define("dx_nc = g_n·(A_n·p_nc − t_nc)·k_nc")
    assert_proved(np.vectorize(lambda e: e.subs(plain), otypes=[object])(f["dx"]), f["p"] - f["is_y"])


def define_changes(f):
    """The names of the directional derivatives, from those of the loss, with v and u; g does not move."""
    f.define("a = ∂t/∂y = (1−ε)·w", "q = A·p − t", "k·v =: v_s", "Σ_c p·v_s =: λ", "Σ_c a·u + 2ζ·λ =: α")
    f.define("d(loss_n) = Σ_c q·v_s + Σ_c a·u·(lse − s)")
    f.define("d(dx) = g·(k·(α·p + A·p·(v_s − λ) − a·u) − q·2·s·v_s/cap²)", "d(dy) = g·a·(λ − v_s)")


@pytest.mark.parametrize("y", TARGETS)
def test_cross_entropy_changes_along_a_direction(y):
    x, w, v, g = array("x", 2, 3), array("w", 3), array("v", 2, 3), array("g", 2, 1)
    probabilities = not isinstance(y, list)
    u = array("u", 2, 3) if probabilities else np.zeros((2, 3), dtype=int)
    if not probabilities:
        g = g * np.array([[int(c is not None)] for c in y])
    f = loss_formulas(x, y, w, more=(ce2,), v=v, u=u, g=g)
    define_changes(f)
    moved = [(x, v), (y, u)] if probabilities else [(x, v)]

    assert_proved(f["v_s"], along(f["s"], *moved))
    assert_proved(f.value("−2·s·v_s/cap²"), along(f["k"], *moved))
    assert_proved(f["λ"], along(f["lse"], *moved))
    assert_proved(f.value("p·(v_s − λ)"), along(f["p"], *moved))
    assert_proved(f.value("a·u"), along(f["t"], *moved))
    assert_proved(f["α"], along(f["A"], *moved))

    f.define("dx = g·q·k", "dy = g·a·(lse − s)")
    assert_proved(f["dx"], gradient(np.sum(g * f["loss"]), x))
    assert_proved(f["d_loss"], along(f["loss"], *moved))
    assert_proved(f["d_dx"], along(f["dx"], *moved))
    assert_proved(f["d_dy"], along(f["dy"], *moved))

    code = CodeOptions()
    n = code.numbers
    row = ce2.RowDerivatives(n.of(x), code.target(y), n.of(w), -100, *code.smooth)
    direction = n.of(v), n.of(u) if probabilities else None
    kept = torch.ones(2, 1, dtype=torch.float64) if probabilities else (code.target(y) >= 0)[:, None].double()
    torch.testing.assert_close(row.loss_along(*direction), (kept * n.of(f["d_loss"]))[:, 0], rtol=1e-10, atol=1e-12)
    d_dx, d_dy = row.gradients_along(*direction, n.of(g))
    n.assert_close(d_dx, f["d_dx"])
    if probabilities:
        n.assert_close(d_dy, f["d_dy"])


# ------------------------------------------------------------------------------------------------ linear cross-entropy


def test_linear_cross_entropy_gradients_and_their_changes():
    tensors = x, W, b, y = array("x", 1, 2), array("W", 2, 2), array("b", 2), array("y", 1, 2)
    tangents = x_t, W_t, b_t, u = array("xt", 1, 2), array("Wt", 2, 2), array("bt", 2), array("u", 1, 2)
    w = array("w", 2)
    names = {"x": x, "W": W, "b": b, "ẋ": x_t, "Ẇ": W_t, "ḃ": b_t}
    f = Formulas(lce, lce2, product="@", **names)
    f.define("z = x·Wᵀ + b", "v = ż = ẋ·Wᵀ + x·Ẇᵀ + ḃ")
    moved = list(zip(tensors, tangents, strict=True))
    assert_proved(f["v"], along(f["z"], *moved))

    z = array("z", 1, 2)  # cross-entropy's own symbols; the linear layer's formulas then take their place
    in_place = dict(zip(z.flat, f["z"].flat, strict=True))
    v = array("v", 1, 2)
    in_place |= dict(zip(v.flat, f["v"].flat, strict=True))
    inner = loss_formulas(z, y, w, more=(ce2,), v=v, u=u, g=dloss)
    define_changes(inner)
    inner.define("dx = g·q·k", "dy = g·a·(lse − s)")
    loss, dz, dy, d_loss, d_dz, d_dy = (
        np.vectorize(lambda e: e.xreplace(in_place), otypes=[object])(inner[name])
        for name in ("loss", "dx", "dy", "d_loss", "d_dx", "d_dy")
    )
    f.names |= {"dz": dz, "d_dz": d_dz}
    f.define("dx = dz·W", "dW = dzᵀ·x", "db = Σ_n dz_n")
    f.define("d(dx) = d(dz)·W + dz·Ẇ", "d(dW) = d(dz)ᵀ·x + dzᵀ·ẋ", "d(db) = Σ_n d(dz)_n")
    gradients, changes = (f["dx"], f["dW"], f["db"], dy), (f["d_dx"], f["d_dW"], f["d_db"], d_dy)
    for tensor, documented, change in zip(tensors, gradients, changes, strict=True):
        assert_proved(documented, gradient(dloss * loss[0, 0], tensor))
        assert_proved(change, along(documented, *moved))
    assert_proved(d_loss, along(loss, *moved))

    code = CodeOptions()
    n = code.numbers
    values, directions = [n.of(t) for t in tensors], [n.of(t) for t in tangents]
    options = -100, "mean", *code.smooth, 2, 128
    out, divisor, *_ = lce.linear_cross_entropy_forward(*values, n.of(w), *options, [False] * 4)
    n.assert_close(out, loss)
    made = lce.linear_cross_entropy_backward(n.of(dloss), *values, n.of(w), divisor, *options, [True] * 4)
    *tangents, target_t = directions
    n.assert_close(lce2.loss_along([*values, n.of(w)], divisor, tangents, target_t, options), d_loss)
    made_t = lce2.gradients_along(n.of(dloss), [*values, n.of(w)], divisor, tangents, target_t, options)
    for tensor, documented in zip((*made, *made_t), (*gradients, *changes), strict=True):
        n.assert_close(tensor, documented)
