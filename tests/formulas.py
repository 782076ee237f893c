"""Formulas of the docstrings, read into sympy: so that what is proved is what the student reads.

Symbols are named as in the docstrings. Those with several elements are numpy arrays of sympy expressions, which
broadcast as tensors do. This is what a formula may hold, and how it is read:

    a·b                     element by element, or the product of matrices, as `Formulas` is told
    2ζ, ½x, x², x³, x^-½    products and powers
    √2, √(x), xᵀ            roots, the transpose
    exp(x), erf(x)          and log(x), tanh(x); without brackets these two are of all that follows
    x_n, x_c, x_nc, x_i     x: indices of elements are dropped, these four
    Σ_n x·y                 sums down the columns, (N, C) to (C), of what comes before the next + or −
    Σ_c x·y, Σ x·y          along the rows, (N, C) to (N, 1); and of all elements
    mean(x)                 of all elements
    [c = y_n]               an array that the test names is_y
    a'(z), a''(z)           functions that it names a1 and a2
    d(dx)                   a name of its own, d_dx, as x_t is
    f(v) = x·v              a function, once it is defined

Of `name = expression = ... = expression` the last is the value. The name may be anything that no other formula needs,
such as ∂r/∂x_i.
"""

import inspect
import re
import unicodedata

import numpy as np
import sympy as sp
import torch

WRITTEN = (  # how the docstrings write it, and how Python does; the first that fits comes first
    (r"σ²", "σ2"),
    (r"\[c = y_n\]", "is_y"),
    (r"\^-½", "**(-half)"),
    (r"½", "half*"),
    (r"²", "**2"),
    (r"³", "**3"),
    (r"√2", "sqrt(2)"),
    (r"√", "sqrt"),
    (r"ᵀ", ".T"),
    (r"−", "-"),
    (r"a''\(", "a2("),
    (r"a'\(", "a1("),
    (r"\bd\((\w+)\)", r"d_\1"),  # d(dx), the change of dx, is a name
    (r"(?<!Σ)_(nc|n|c|i)\b", ""),  # indices of elements, which arrays go without
    (r"(\d)(?=[^\W\d])", r"\1*"),  # 2ζ
    (r"(?<![\w)])(tanh|log) (.*)", r"\1(\2)"),
)

KNOWN = {name: np.vectorize(getattr(sp, name), otypes=[object]) for name in ("exp", "log", "tanh", "erf", "sqrt")}
KNOWN |= {
    "half": sp.Rational(1, 2),
    "mean": lambda v: np.sum(v) / np.size(v),
    "total": np.sum,  # Σ
    "rows": lambda v: np.sum(v, axis=1, keepdims=True),  # Σ_c
    "columns": lambda v: np.sum(v, axis=0),  # Σ_n
}


class Formulas:
    """The names that some docstrings define, and the values they have here.

    `product` is what a raised dot means: `*`, element by element, or `@`, of matrices.
    """

    def __init__(self, *documented, product="*", **values):
        texts = (unicodedata.normalize("NFC", inspect.getdoc(documented)) for documented in documented)
        self.text, self.product = " ".join(" ".join(texts).split()), product
        self.names = {**KNOWN, **values}

    def __getitem__(self, name):
        return self.names[name]

    def quote(self, formula):
        """The formula, which must stand in the docstrings, word for word and whole."""
        formula = unicodedata.normalize("NFC", formula)
        whole = r"(?<![\w·/])(?<![+−] )" + re.escape(formula) + r"(?![·/²^'(\w]| [+−·/])"
        assert re.search(whole, self.text), f"no docstring states {formula!r} any more"
        return formula

    def value(self, formula):
        """What a documented formula comes to."""
        return self._evaluated(_parted(self.quote(formula))[-1])

    def steps(self, formula):
        """What every expression of `name = expression = ... = expression` comes to."""
        return [self._evaluated(expression) for expression in _parted(self.quote(formula))[1:]]

    def _evaluated(self, expression):
        return eval(python(expression, self.product), self.names)

    def define(self, *formulas):
        """Name the values of formulas `name = ... = expression`, `expression =: name` or `P(v) = expression`."""
        for formula in formulas:
            name = python(_parted(unicodedata.normalize("NFC", formula))[0], self.product)
            if function := re.fullmatch(r"(\w+)\((\w+)\)", name):
                self._define_function(*function.groups(), formula)
            else:
                self.names[unicodedata.normalize("NFKC", name)] = self.value(formula)

    def _define_function(self, name, argument, formula):
        def function(v):
            outer, self.names = self.names, {**self.names, argument: v}
            try:
                return self.value(formula)
            finally:
                self.names = outer

        self.names[name] = function


def _parted(formula):
    """The name that a formula defines, if any, and its expressions."""
    parts = re.split(r"(?<!\[c) =:? ", formula)  # not at the = of [c = y_n]
    return parts[::-1] if " =: " in formula else parts


def python(formula, product):
    """The formula as a Python expression."""
    for written, meant in WRITTEN:
        formula = re.sub(written, meant, formula)
    while "Σ" in formula:  # the last sum first, in case another holds it
        head, _, rest = formula.rpartition("Σ")
        axis, _, rest = rest.partition(" ")
        end = _end_of_term(rest)
        total = {"_c": "rows", "_n": "columns", "": "total"}[axis]
        formula = f"{head}{total}({rest[:end]}){rest[end:]}"
    return formula.replace("·", product)


def _end_of_term(text):
    """Where the product that begins the text ends: before a plus or minus, or the bracket it stands in closes."""
    depth = 0
    for i, character in enumerate(text):
        depth += (character == "(") - (character == ")")
        if depth < 0 or (depth == 0 and text[i : i + 3] in (" + ", " - ")):
            return i
    return len(text)


# ------------------------------------------------------------------------------------------------- symbols and proofs


def array(name, *shape):
    """An array of real symbols."""
    out = np.empty(shape, dtype=object)
    for index in np.ndindex(*shape):
        out[index] = sp.Symbol(name + "".join(map(str, index)), real=True)
    return out


def gradient(of, by):
    """The derivatives of one expression by the elements of an array (or one symbol), as sympy finds them."""
    return np.vectorize(lambda symbol: sp.diff(of, symbol), otypes=[object])(by)


def along(expressions, *moved):
    """How fast the expressions change as each symbol of an array x moves along that of x_t, for pairs (x, x_t)."""

    def change(expression):
        pairs = (pair for x, x_t in moved for pair in zip(np.ravel(x), np.ravel(x_t), strict=True))
        return sum(sp.diff(expression, x) * x_t for x, x_t in pairs)

    return np.vectorize(change, otypes=[object])(expressions)


def assert_proved(documented, found):
    """Each element of one array is that of the other, for whatever values of the symbols."""
    documented, found = np.broadcast_arrays(documented, found)
    for a, b in zip(documented.flat, found.flat, strict=True):
        assert is_zero(a - b), f"{a} is not {b}"


def is_zero(expression):
    """Whether an expression is zero because the numerator of a fraction of polynomials is.

    Each function's value (exp, log, tanh, ...) and each root counts as a symbol of its own, so this proves no identity
    between them, but no other than exp(a + b) = exp(a)·exp(b) is needed.
    """
    expression = sp.sympify(expression)
    exponential = sp.Function("exponential")

    def split(sum_of):
        coefficients = (term.as_coeff_Mul() for term in sp.Add.make_args(sp.expand(sum_of)))
        return sp.Mul(*(exponential(term) ** c if c.is_Integer else exponential(c * term) for c, term in coefficients))

    expression = expression.replace(sp.exp, split)
    bases = {
        power.base
        for power in expression.atoms(sp.Pow)
        if power.exp.is_Rational and power.exp.q == 2 and power.free_symbols
    }
    roots = {base: sp.Dummy(positive=True) for base in bases}
    expression = expression.replace(
        lambda e: e.is_Pow and e.base in roots and e.exp.is_Rational, lambda e: roots[e.base] ** (2 * e.exp)
    )
    values = {function: sp.Dummy() for function in expression.atoms(sp.Function)}
    numerator, _ = sp.fraction(sp.together(expression.xreplace(values)))
    return sp.expand(numerator) == 0


# ------------------------------------------------------------------------------------------------------------- numbers


class Numbers:
    """A number for every symbol, drawn from `low` to `high`; and tensors of the values that expressions then have."""

    def __init__(self, functions=None, low=-1.5, high=1.5, **known):
        self.functions, self.known, self.low, self.high = functions or {}, known, low, high
        self.random, self.drawn = np.random.default_rng(0), {}

    def of(self, expressions):
        expressions = np.asarray(expressions, dtype=object)
        symbols = sorted(sp.Tuple(*expressions.flat).free_symbols, key=str)
        for symbol in symbols:
            known = self.known.get(str(symbol))
            self.drawn.setdefault(symbol, self.random.uniform(self.low, self.high) if known is None else known)
        arguments = [sp.Dummy() for _ in symbols]  # lambdify's own names cannot be among these
        unnamed = [sp.sympify(e).xreplace(dict(zip(symbols, arguments, strict=True))) for e in expressions.flat]
        function = sp.lambdify(arguments, unnamed, [self.functions, "math"], cse=True)
        values = function(*(self.drawn[symbol] for symbol in symbols))
        return torch.tensor(values, dtype=torch.float64).view(expressions.shape)

    def assert_close(self, actual, expressions):
        """The code's float64 is the expressions' value to 10 digits."""
        torch.testing.assert_close(actual, self.of(expressions).view(actual.shape), rtol=1e-10, atol=1e-12)
