"""The kernels' own functions of floats (csrc/numeric.h), in vectorised loops, beside PyTorch's in float64; and those of
doubles, beside mpmath's.

Compiled twice, since a compiler may fuse a product and a sum into one rounding where the processor can: with that, and
without, as on processors that cannot.
"""

import ctypes
import math
import os
import re
import runpy
import shutil
import subprocess
from pathlib import Path

import mpmath
import pytest
import setuptools
import torch
from torch.utils import cpp_extension

import fused_ops.functional as F

ROOT = Path(__file__).parents[1]
COMPILER = os.environ.get("CXX", "c++").split()

# The largest error, in units in the last place of the result, over all floats, those between the tests' too.
ULPS = {"exp": 1.99, "exp_of_softmax": 1.99, "log": 0.83, "tanh": 1.71}
ULPS_OF_DOUBLES = {"exp": 1.26, "exp_of_softmax": 1.26, "tanh": 1.4}  # over some 20 million of them

# Where the functions, or their code, change: what they approximate, the first results that are denormal, 0 or inf, and
# the thresholds of their branches.
PLACES = [0.0, 0.25, 0.5, 0.625, math.sqrt(0.5), 1.0, math.sqrt(2), 10.0, 14.5, 20.0, 65504.0, 65520.0, math.inf]
PLACES += [2.0**n for n in range(-149, 128)]
PLACES += [87.33654, 88.722839, 89.0, 103.97208, 110.0]
DENORMAL = 2.0**-126  # the denormal floats are below this


def cxx_flags():
    """Those that setup.py compiles the kernels with."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FUSED_OPS_BUILD", "0")
        patch.setattr(setuptools, "setup", lambda **_: None)
        return runpy.run_path(str(ROOT / "setup.py"))["CXX"]


@pytest.fixture(scope="module", params=["fused", "unfused"])
def call(request, tmp_path_factory):
    """A call of a function of tests/numeric.cpp, by name."""
    if not shutil.which(COMPILER[0]):
        pytest.skip(f"needs a C++ compiler ({COMPILER[0]})")
    library = tmp_path_factory.mktemp("numeric") / "numeric.so"
    contract = [] if request.param == "fused" else ["-ffp-contract=off"]
    include = [f"-I{path}" for path in cpp_extension.include_paths()]
    command = [*COMPILER, *cxx_flags(), *contract, *include, "-fPIC", "-shared", ROOT / "tests" / "numeric.cpp"]
    subprocess.run([*command, "-o", library], check=True)
    functions = ctypes.CDLL(str(library))

    def call(name, x, dtype=torch.float32):
        y = torch.empty_like(x, dtype=dtype)
        function = getattr(functions, f"{name}_of_array")
        function(ctypes.c_void_p(x.data_ptr()), ctypes.c_void_p(y.data_ptr()), ctypes.c_int64(x.numel()))
        return y

    return call


@pytest.fixture(scope="module")
def floats():
    """One in 1021 of all floats, by their bits, and all floats near the places of either sign."""
    places = torch.tensor(PLACES)
    places = torch.cat([places, -places]).view(torch.int32).long()
    near = (places[:, None] + torch.arange(-1000, 1001)).flatten()
    return torch.cat([torch.arange(0, 2**32, 1021), near]).int().view(torch.float32)


def bits(x):
    return x.view(torch.int16 if x.itemsize == 2 else torch.int32)


def assert_same_floats(actual, expected):
    """The same to the bit, the sign of zero included. A NaN is like any other."""
    assert torch.equal(actual.isnan(), expected.isnan())
    assert torch.equal(bits(actual)[~actual.isnan()], bits(expected)[~actual.isnan()])


def error_in_ulps(actual, exact):
    """The largest. What is inf, NaN or 0 by the exact result, rounded, must be so."""
    rounded = exact.float()
    special = ~rounded.isfinite() | ~actual.isfinite() | (exact == 0)
    assert_same_floats(actual[special], rounded[special])
    actual, exact = actual[~special].double(), exact[~special]
    exponent = torch.frexp(exact).exponent - 24
    return (torch.ldexp((actual - exact).abs(), -exponent.clamp(min=-149))).max().item()


@pytest.mark.parametrize("function", [torch.exp, torch.log, torch.tanh], ids=lambda function: function.__name__)
def test_error_in_ulps(function, call, floats):
    actual, exact = call(function.__name__, floats), function(floats.double())
    assert error_in_ulps(actual, exact) < ULPS[function.__name__]
    assert ((actual.abs() > 0) & (actual.abs() < DENORMAL)).any() == (function is not torch.log)


def test_exp_of_softmax(call, floats):
    x = floats[~(floats < -88)]
    exact = (-x.double()).exp()
    exact = torch.where(exact < DENORMAL, 0.0, exact)
    assert error_in_ulps(call("exp_of_softmax", x), exact) < ULPS["exp_of_softmax"]
    short = call("exp_of_softmax_16", x).double()
    assert torch.equal(short.isnan(), exact.isnan())
    assert torch.equal(short == 0, exact == 0)
    assert ((short - exact) / exact).abs().nan_to_num(0).max() < 1e-5


@pytest.fixture(scope="module")
def doubles():
    """Of either sign and all sizes, as long as exp is finite, and near where the functions' code changes."""
    generator = torch.Generator().manual_seed(0)
    uniform = torch.rand(5000, dtype=torch.float64, generator=generator)
    magnitudes = [uniform, uniform * 709.78, torch.exp2(uniform * 1000 - 1000)]
    magnitudes += [place + (uniform[:50] - 0.5) * 1e-12 for place in (0.625, 20.0, 708.3964185322641)]
    x = torch.cat(magnitudes)
    return torch.cat([x, -x])


def exact_exp_of_softmax(x):
    e = mpmath.exp(-x)
    return e if e >= mpmath.ldexp(1, -1022) else 0


@pytest.mark.parametrize(
    ("name", "function"), [("exp", mpmath.exp), ("exp_of_softmax", exact_exp_of_softmax), ("tanh", mpmath.tanh)]
)
def test_error_of_doubles(name, function, call, doubles):
    x = doubles[doubles > -700] if name == "exp_of_softmax" else doubles
    actual = call(f"{name}_of_double", x, torch.float64)
    with mpmath.workprec(120):
        for x_i, y_i in zip(x.tolist(), actual.tolist(), strict=True):
            exact = function(x_i)
            ulp = mpmath.ldexp(1, max(mpmath.frexp(exact)[1] - 53, -1074))
            assert abs(y_i - exact) < ULPS_OF_DOUBLES[name] * ulp, x_i


def test_normal_distribution(call, floats):
    actual, z = call("normal_distribution", floats).double(), floats.double()
    exact = 0.5 * torch.erfc(-z * math.sqrt(0.5))
    assert torch.equal(actual.isnan(), z.isnan())
    error = (actual - exact).abs()
    assert error[~z.isnan()].max() < 1e-7
    assert (error / exact)[(z < 0) & (exact >= DENORMAL)].max() < 5e-6
    assert error[(z < 0) & (exact < DENORMAL)].max() < 6e-44
    assert actual[z == 0].unique().item() == 0.5
    assert actual[z == -math.inf].item() == 0
    assert actual[z == math.inf].item() == 1


@pytest.mark.parametrize(
    ("name", "x", "y"),
    [
        ("exp", [-math.inf, -104.0, -0.0, 0.0, 88.73, math.inf], [0.0, 0.0, 1.0, 1.0, math.inf, math.inf]),
        ("exp", [-103.2789, 2**-149], [2**-149, 1.0]),
        ("exp_of_softmax", [math.inf, 1e30, 87.4, -0.0, 0.0], [0.0, 0.0, 0.0, 1.0, 1.0]),
        ("exp_of_softmax_16", [math.inf, 1e30, 87.4, -0.0, 0.0], [0.0, 0.0, 0.0, 1.0, 1.0]),
        ("log", [-math.inf, -1.0, -(2**-149), math.inf], [math.nan, math.nan, math.nan, math.inf]),
        ("log", [-0.0, 0.0, 1.0, 2**-149, 2**-127], [-math.inf, -math.inf, 0.0, math.log(2**-149), math.log(2**-127)]),
        ("tanh", [-math.inf, -20.0, 20.0, math.inf], [-1.0, -1.0, 1.0, 1.0]),
        ("tanh", [-0.0, 0.0, 2**-149, -(2**-130)], [-0.0, 0.0, 2**-149, -(2**-130)]),
    ],
)
def test_special_values(name, x, y, call):
    assert_same_floats(call(name, torch.tensor(x)), torch.tensor(y))


@pytest.mark.parametrize(
    ("name", "x", "y"),
    [
        ("exp", [-math.inf, -746.0, -0.0, 0.0, 709.79, math.inf], [0.0, 0.0, 1.0, 1.0, math.inf, math.inf]),
        ("exp_of_softmax", [math.inf, 1e300, 708.4, -0.0, 0.0], [0.0, 0.0, 0.0, 1.0, 1.0]),
        ("tanh", [-math.inf, -30.0, 30.0, math.inf, -0.0, 2**-1074], [-1.0, -1.0, 1.0, 1.0, -0.0, 2**-1074]),
    ],
)
def test_special_doubles(name, x, y, call):
    arguments = torch.tensor([*x, math.nan], dtype=torch.float64)
    *actual, of_nan = call(f"{name}_of_double", arguments, torch.float64).tolist()
    assert [(v, math.copysign(1, v)) for v in actual] == [(v, math.copysign(1, v)) for v in y]
    assert math.isnan(of_nan)


@pytest.mark.parametrize("name", ULPS)
def test_the_code_states_the_same_error(name):
    code = (ROOT / "csrc" / "numeric.h").read_text()
    (comment,) = re.findall(rf"((?://.*\n)+)(?:template.*\n)?.*inline (?:float|Acc) {name}\((?:float|Acc) x\)", code)
    stated = re.search(r"[Ee]rror under ([\d.]+) ulp(?:, of doubles ([\d.]+))?", comment.replace("\n// ", " ")).groups()
    assert stated == (str(ULPS[name]), str(ULPS_OF_DOUBLES[name]) if name in ULPS_OF_DOUBLES else None)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
def test_conversions(dtype, call, floats):
    name = str(dtype).removeprefix("torch.")
    every = torch.arange(2**16).short().view(dtype)
    assert_same_floats(call(f"widen_{name}", every), every.float())
    assert_same_floats(call(f"narrow_{name}", every.float(), dtype), every)
    assert_same_floats(call(f"narrow_{name}", floats, dtype), floats.to(dtype))


def test_conversion_away_from_zero(call, floats):
    """It differs from the other one where a float is in the middle between two values and goes to the smaller there."""
    x = torch.where(floats.isnan(), math.nan, floats)
    x = torch.cat([x, (bits(x) // 2**16 * 2**16 + 2**15).view(torch.float32)])
    expected = x.bfloat16()
    smaller = (bits(x) % 2**16 == 2**15) & (expected.float().abs() < x.abs())
    assert smaller.any()
    bits(expected)[smaller] += 1
    assert_same_floats(call("narrow_away_bfloat16", x, torch.bfloat16), expected)


@pytest.mark.parametrize("nan", [0x7F800001, 0x7FC00001, 0x7FFFFFFF, -1])
def test_a_nan_of_any_bits_stays_nan_in_a_softmax(nan):
    logits = torch.randn(2, 40)
    bits(logits)[0, 3] = nan
    logits.requires_grad_()
    losses = F.cross_entropy(logits, torch.tensor([1, 2]), reduction="none")
    losses.sum().backward()
    assert losses.isnan().tolist() == [True, False]
    assert logits.grad.isnan().all(dim=1).tolist() == [True, False]


@pytest.mark.parametrize("of", ["dloss", "weight", "stats"])
@pytest.mark.parametrize("nan", [0x7F800001, 0x7FC00001, 0x7FFFFFFF, -1])
def test_a_nan_of_any_bits_stays_nan_in_gradients_of_16_bits(nan, of):
    logits, target = torch.randn(2, 200).bfloat16(), torch.tensor([3, 5])
    float32 = {"dloss": torch.ones(2), "weight": torch.ones(200), "stats": torch.ones(2, 2)}
    bits(float32[of])[..., 1 if of != "weight" else 5] = nan
    dloss, weight, stats = float32.values()
    args = dloss, logits, target, weight, stats, torch.ones(()), -100, "none", 0.0, 0.0, None, True, False
    dlogits, _ = torch.ops.fused_ops.cross_entropy_backward(*args)
    assert dlogits.isnan().all(dim=1).tolist() == [False, True]
