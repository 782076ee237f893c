"""What the samples don't show: errors, options of the package, and what is refused rather than got wrong."""

import itertools
import os
import subprocess
import sys
from contextlib import nullcontext

import pytest
import torch
from checks import FLOATS, every_device

import fused_ops
import fused_ops.functional as F
from fused_ops._op import REFERENCES

LOGITS = torch.tensor([[0.5, -1.0, 2.0], [1.5, 0.25, -0.75]])
TARGET = torch.tensor([2, 0])
X = torch.tensor([[0.5, -1.0, 2.0], [1.5, 0.25, -0.75], [2.5, 1.25, 0.75]])
STATISTICS = torch.tensor([0.1, 0.2, 0.3]), torch.tensor([0.9, 1.1, 1.2])
NAMED = {"input": LOGITS, "target": TARGET}
BATCH_STATISTICS = {"running_mean": None, "running_var": None, "training": True}

REFUSED = [
    ("cross_entropy", {**NAMED, "target": TARGET.int()}),
    ("cross_entropy", {**NAMED, "target": TARGET[:1]}),
    ("cross_entropy", {**NAMED, "target": torch.tensor([[2], [0]])}),
    ("cross_entropy", {**NAMED, "target": LOGITS[:, :2]}),
    ("cross_entropy", {"input": torch.tensor(1.0), "target": torch.tensor(2)}),
    ("cross_entropy", {**NAMED, "weight": torch.tensor([0.5, 0.25])}),
    ("cross_entropy", {**NAMED, "weight": torch.tensor([0.5, 0.25, 0.75]).double()}),
    ("cross_entropy", {**NAMED, "weight": torch.tensor([0.5, 0.25, 0.75], requires_grad=True)}),
    ("cross_entropy", {**NAMED, "reduction": "max"}),
    ("cross_entropy", {**NAMED, "label_smoothing": 1.5}),
    ("cross_entropy", {"input": LOGITS, "target": LOGITS.softmax(1), "ignore_index": 1}),
    ("cross_entropy", {"input": torch.randn(2, 3, 4), "target": torch.zeros(2, 5, dtype=torch.int64)}),
    ("batch_norm", {"input": X[0], "running_mean": STATISTICS[0], "running_var": STATISTICS[1]}),
    ("batch_norm", {"input": X, "running_mean": None, "running_var": None}),
    ("batch_norm", {"input": X, "running_mean": STATISTICS[0], "running_var": None, "training": True}),
    ("batch_norm", {"input": X[:1], "running_mean": None, "running_var": None, "training": True}),
    ("batch_norm", {"input": X, "running_mean": None, "running_var": None, "training": True, "eps": 0.0}),
    ("batch_norm", {"input": X, "running_mean": STATISTICS[0][:2], "running_var": STATISTICS[1]}),
    ("batch_norm", {"input": X, "running_mean": None, "running_var": None, "training": True, "weight": X[0, :2]}),
    ("batch_norm", {"input": X, "running_mean": None, "running_var": None, "training": True, "bias": X[0].double()}),
    ("batch_norm", {"input": X, **BATCH_STATISTICS, "momentum": None}),
    ("batch_norm", {"input": X, "running_mean": X[0], "running_var": X[0].clone().requires_grad_()}),
    ("batch_norm", {"input": X, "running_mean": X[0], "running_var": X[0], "eps": -1.0}),
    ("batch_norm", {"input": X[:1, :0], **BATCH_STATISTICS}),
    # float32 beside a 16-bit input: all or none
    ("batch_norm", {"input": X.bfloat16(), **BATCH_STATISTICS, "weight": X[0], "bias": X[0].bfloat16()}),
    ("batch_norm", {"input": X.half(), "running_mean": X[0].half(), "running_var": X[0].half(), "weight": X[0]}),
]


@pytest.mark.parametrize(("name", "arguments"), REFUSED)
def test_refuses_what_torch_refuses(name, arguments):
    with pytest.raises(Exception) as theirs:  # noqa: PT011 - whatever torch raises, ours is to be the same
        getattr(torch.nn.functional, name)(**arguments)
    with pytest.raises(type(theirs.value)):
        getattr(F, name)(**arguments)


INTEGERS = [
    ("cross_entropy", {**NAMED, "input": LOGITS.long()}),
    ("batch_norm", {"input": X.long(), "running_mean": X[0], "running_var": X[0]}),
]


@pytest.mark.parametrize(("name", "arguments"), INTEGERS)
def test_refuses_integers(name, arguments):
    with pytest.raises(RuntimeError, match="floating point"):
        getattr(F, name)(**arguments)


LINEAR = {"input": LOGITS, "linear_weight": X, "target": TARGET}
LINEAR_REFUSED = [
    ({**LINEAR, "input": LOGITS[None]}, "dimensionality 1 or 2, got 3"),
    ({**LINEAR, "input": LOGITS.long()}, "floating point input"),
    ({**LINEAR, "linear_weight": X[0]}, "dimensionality at least 2, got 1"),
    ({**LINEAR, "linear_weight": X[:, :2]}, "in_features.*got 3 and 2"),
    ({**LINEAR, "linear_weight": X.double()}, "input and linear_weight to have the same dtype"),
    ({**LINEAR, "linear_weight": X[:0]}, "at least one class"),
    ({**LINEAR, "linear_bias": X[0].double()}, "input and linear_bias to have the same dtype"),
    ({**LINEAR, "linear_bias": X[0, :2]}, "expected linear_bias shape"),
    ({**LINEAR, "input": LOGITS[0], "linear_weight": X[None]}, "requires batched input"),
    ({**LINEAR, "target": LOGITS.softmax(1), "ignore_index": -1}, "ignore_index cannot be specified"),
    ({**LINEAR, "chunk_size": 0}, "chunk_size must be at least 1"),
]


@pytest.mark.parametrize(("arguments", "message"), LINEAR_REFUSED, ids=[message for _, message in LINEAR_REFUSED])
def test_linear_cross_entropy_refuses_what_does_not_fit_together(arguments, message):
    """Torch's own function is too new to be asked what it refuses."""
    with pytest.raises((RuntimeError, ValueError), match=message):
        F.linear_cross_entropy(**arguments)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("shape", [(0,), (0, 3), (2, 0), (2, 3, 0)])
def test_batch_norm_takes_empty_inputs_as_torch_does(shape, training):
    """In evaluation even without statistics, and in training without a mean; even where there is no channel."""
    x = torch.empty(shape, requires_grad=True)
    ours, theirs = (f.batch_norm(x, None, None, training=training) for f in (F, torch.nn.functional))
    assert (ours.shape, ours.dtype) == (theirs.shape, theirs.dtype)
    (dx,) = torch.autograd.grad(ours, x, torch.empty(shape))
    assert dx.shape == shape
    assert F.batch_norm(x, None, None, training=training, activation="silu", residual=x).shape == shape


@pytest.mark.parametrize(
    "residual", [X[:2], X[0], X.double(), X[:, :, None]], ids=lambda r: f"{r.dtype}{list(r.shape)}"
)
def test_batch_norm_refuses_a_residual_unlike_the_input(residual):
    with pytest.raises(RuntimeError, match="residual should have the shape and dtype"):
        F.batch_norm(X, **BATCH_STATISTICS, residual=residual)


def test_batch_norm_refuses_an_unknown_activation():
    with pytest.raises(ValueError, match="one of relu, leaky_relu, tanh, gelu, silu, but got 'softplus'"):
        F.batch_norm(X, **BATCH_STATISTICS, activation="softplus")


@pytest.mark.parametrize("index", [3, -1, -101, 2**40])
@pytest.mark.parametrize("path", ["kernel", "reference"])
def test_out_of_range_target_names_the_index(index, path):
    target = torch.tensor([2, index])
    if path == "reference" or not fused_ops.has_kernels("cpu"):
        with fused_ops.reference_mode(), pytest.raises(RuntimeError, match=str(index)):
            F.cross_entropy(LOGITS, target)
    else:
        with pytest.raises(IndexError, match=f"Target {index} is out of bounds."):
            F.cross_entropy(LOGITS, target)


@every_device
def test_direct_calls_of_the_kernels_stay_in_bounds(device):
    """The ops can be called without the public functions' checks: what would read out of bounds raises there, too."""
    if not fused_ops.has_kernels(device):
        return  # the references are made of torch's ops, which check for themselves
    ops = torch.ops.fused_ops
    stats, of_channels, scalar = torch.zeros(2, 2), torch.zeros(2, 3), torch.tensor(1.0)
    options = -100, "mean", 0.0, 0.0, None
    backward, square = (*options, True, False), torch.tensor([0, 1, 0])
    needed = True, 1e-5, "tanh", True, True, True
    unfit = (
        (LOGITS, TARGET[:1], None),
        (LOGITS, TARGET, X[0, :2]),
        (LOGITS, TARGET.int(), None),
        (LOGITS[0], TARGET[:1], None),
        (LOGITS.long(), TARGET, None),
        (LOGITS, LOGITS[:, :2], None),
        (LOGITS, LOGITS.double(), None),
        (LOGITS[:, :, None].expand(2, 3, 4), TARGET, None),
        (LOGITS[:, :, None], LOGITS, None),
    )
    calls = [
        *((ops.cross_entropy_forward, (*args, *options)) for args in unfit),
        *((ops.cross_entropy_with_gradient, (*args, *options, False)) for args in unfit),
        (ops.cross_entropy_scale_, (LOGITS.clone(), scalar, TARGET[:1], -100)),
        (ops.cross_entropy_scale_, (LOGITS.clone(), X[0], TARGET, -100)),
        (ops.cross_entropy_scale_, (LOGITS.clone().t(), scalar, square, -100)),
        (
            ops.cross_entropy_backward_,
            (scalar, LOGITS.t(), square, None, X[:2], scalar, *options, False),
        ),
        (ops.cross_entropy_backward, (scalar, LOGITS, TARGET, None, stats[:1], scalar, *backward)),
        (ops.cross_entropy_backward, (scalar, LOGITS, TARGET, None, stats, X[0], *backward)),
        (ops.cross_entropy_backward, (X[0], LOGITS, TARGET, None, stats, scalar, *backward)),
        (ops.batch_norm_forward, (X[0], None, None, None, None, True, 0.1, 1e-5, None, None)),
        (ops.batch_norm_forward, (X, None, None, None, None, False, 0.1, 1e-5, None, None)),
        (ops.batch_norm_forward, (X, None, None, X[0, :2], None, True, 0.1, 1e-5, None, None)),
        (ops.batch_norm_forward, (X, X[0, :2], X[0], None, None, True, 0.1, 1e-5, None, None)),
        (ops.batch_norm_forward, (X, None, None, None, None, True, 0.1, 1e-5, "softplus", None)),
        (ops.batch_norm_forward, (X, None, None, None, None, True, 0.1, 1e-5, None, X[:2])),
        (ops.batch_norm_forward, (X, None, None, None, None, True, 0.1, 1e-5, None, X.double())),
        (ops.batch_norm_backward, (X[:2], X, None, None, None, of_channels, *needed)),
        (ops.batch_norm_backward, (X, X, None, None, None, of_channels[:, :2], *needed)),
        (ops.batch_norm_backward, (X.double(), X, None, None, None, of_channels, *needed)),
        (ops.batch_norm_backward, (X, X, None, X[0, :2], None, of_channels, *needed)),
        (ops.batch_norm_backward, (X, X, None, None, X[:2], of_channels, *needed)),
    ]
    for op, arguments in calls:
        with pytest.raises(RuntimeError):
            op(*(a.to(device) if isinstance(a, torch.Tensor) else a for a in arguments))


def test_direct_calls_name_the_index():
    if fused_ops.has_kernels("cpu"):
        stats, scalar = torch.zeros(2, 2), torch.tensor(1.0)
        options = None, stats, scalar, -100, "mean", 0.0, 0.0, None, True, False
        with pytest.raises(IndexError, match="Target 5"):
            torch.ops.fused_ops.cross_entropy_backward(scalar, LOGITS, torch.tensor([5, 0]), *options)


def test_only_asked_for_gradients_come_back():
    x, weight = X.clone(), torch.tensor([0.5, 1.5, 2.0], requires_grad=True)
    F.batch_norm(x, None, None, weight, None, training=True).square().sum().backward()
    assert weight.grad is not None
    assert x.grad is None
    assert not F.batch_norm(x, None, None, training=True).requires_grad


NEEDS = list(itertools.product((True, False), repeat=3))


@pytest.mark.parametrize("activation", [None, "silu"])
@pytest.mark.parametrize("training", [True, False])
def test_batch_norm_backward_does_what_is_asked_for(training, activation):
    """Each gradient is the same whatever else is asked for; what is not comes back empty, from kernel and reference."""
    op = torch.ops.fused_ops.batch_norm_backward.default
    args = X.cos(), X, X[0], X[1], X.sin(), torch.stack(STATISTICS), training, 1e-5, activation
    everything = op(*args, True, True, True)
    for run, needs in itertools.product((op, REFERENCES[op]), NEEDS):
        needs_input, needs_parameters, needs_residual = needs
        needs_residual = needs_residual and activation is not None  # it is dy otherwise, and the op need not copy it
        needed = needs_input, needs_parameters, needs_parameters, needs_residual
        for ours, expected, asked in zip(run(*args, *needs), everything, needed, strict=True):
            torch.testing.assert_close(ours, expected if asked else expected.new_empty(0))


@pytest.mark.parametrize("activation", [None, "tanh"])
@pytest.mark.parametrize("needs", NEEDS)
def test_batch_norm_asks_for_the_gradients_it_needs(needs, activation, monkeypatch):
    asked = []
    backward = torch.ops.fused_ops.batch_norm_backward.default
    reference = REFERENCES[backward]
    monkeypatch.setitem(REFERENCES, backward, lambda *args: asked.append(args[-3:]) or reference(*args))
    x, weight, residual = (t.clone().requires_grad_(n) for t, n in zip((X, X[0], X.sin()), needs, strict=True))
    out = F.batch_norm(x, *STATISTICS, weight, activation=activation, residual=residual)
    assert out.requires_grad == any(needs)
    if any(needs):
        with fused_ops.reference_mode():
            out.sum().backward()
    needs_op = any(needs) if activation else any(needs[:2])
    assert asked == ([(*needs[:2], needs[2] and activation is not None)] if needs_op else [])
    assert [t.grad is not None for t in (x, weight, residual)] == list(needs)


def saved_elements(function):
    sizes = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(t.numel()) or t, lambda t: t):
        function()
    return sum(sizes)


def test_batch_norm_keeps_only_what_its_backward_pass_needs():
    """The input, the weight, mean and rstd; for an activation bias and residual, too, but no tensor for z or y."""
    x, weight, bias, residual = (t.clone().requires_grad_() for t in (X, X[0], X[1], X.sin()))

    def saved(**kwargs):
        return saved_elements(lambda: F.batch_norm(x, None, None, weight, bias, True, **kwargs))

    N, C = x.numel(), len(weight)
    assert saved() == saved(residual=residual) == N + 3 * C
    assert saved(activation="relu") == N + 4 * C
    assert saved(activation="relu", residual=residual) == 2 * N + 4 * C


def norm(mean, var):
    F.batch_norm(X, mean, var, training=True)


def mlp(mean, var):
    parameters = (torch.ones(size) for size in ((5, 2), (3, 4), (3,), (3,), (3,), (5, 3), (5,)))
    F.mlp(torch.tensor([[0, 1], [2, 3], [4, 0]]), torch.tensor([1, 2, 3]), *parameters, mean, var, training=True)


@pytest.mark.parametrize("mode", [nullcontext, fused_ops.reference_mode])
@pytest.mark.parametrize("moves", [norm, mlp])
@pytest.mark.parametrize("which", [0, 1], ids=["mean", "var"])
def test_moving_the_running_statistics_tells_autograd(which, moves, mode):
    """A graph that still needs the statistics as they were must say so, not use the new ones."""
    statistics = [t.clone() for t in STATISTICS]
    w = torch.tensor(2.0, requires_grad=True)
    needs_old_statistic = (w * statistics[which]).sum()
    with mode():
        moves(*statistics)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        needs_old_statistic.backward()


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_results_do_not_depend_on_the_number_of_threads(threads):
    """Of these images batch norm takes channel by channel with one thread or two, and tile by tile with three. And the
    rows of cross-entropy are three more than what it takes in full blocks."""
    before = torch.get_num_threads()

    def results(count):
        torch.set_num_threads(count)
        x = torch.randn(303, 700, generator=torch.Generator().manual_seed(0), requires_grad=True)
        y = F.batch_norm(x, None, None, training=True)
        loss = F.cross_entropy(y, torch.arange(303))
        images = torch.randn(8, 8, 64, 64, generator=torch.Generator().manual_seed(0), requires_grad=True)
        z = F.batch_norm(images, None, None, training=True)
        pixels_loss = F.cross_entropy(images, torch.arange(8 * 64 * 64).view(8, 64, 64) % 8)
        of_images = (torch.autograd.grad(loss, images)[0] for loss in (z.cos().sum(), pixels_loss))
        return y, loss, *torch.autograd.grad(loss, x), z, pixels_loss, *of_images

    try:
        assert all(torch.equal(a, b) for a, b in zip(results(1), results(threads), strict=True))
    finally:
        torch.set_num_threads(before)


def test_16_bit_conversions_round_as_torch_does():
    """Through an identity batch norm, every 16-bit pattern; and float32 patterns through a weight."""
    one, zero = torch.ones(1), torch.zeros(1)
    for dtype in (torch.float16, torch.bfloat16):
        every = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(dtype)[:, None]
        torch.testing.assert_close(F.batch_norm(every, zero, one, eps=0.0), every, rtol=0, atol=0, equal_nan=True)

        bits = torch.randint(-(2**31), 2**31, (2**16,), generator=torch.Generator().manual_seed(0))
        weight = bits.int().view(torch.float32)
        rows = torch.ones(1, len(weight), dtype=dtype)
        mean, var = torch.zeros_like(weight), torch.ones_like(weight)
        narrowed = F.batch_norm(rows, mean, var, weight, eps=0.0)[0]
        torch.testing.assert_close(narrowed, weight.to(dtype), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("activation", ["relu", "leaky_relu", "tanh", "gelu", "silu"])
def test_activations_are_accurate_everywhere(activation):
    """Through an identity batch norm, from where they vanish to where they are the identity, and beyond."""
    z = torch.linspace(-20, 20, 400001)
    z = torch.cat((z, z * 1e-6, torch.tensor([-1e30, -1e4, -110.0, -88.5, 88.5, 110.0, 1e4, 1e30, torch.nan])))[:, None]
    z.requires_grad_()
    y = F.batch_norm(z, torch.zeros(1), torch.ones(1), eps=0.0, activation=activation)
    exact = z.detach().double().requires_grad_()
    expected = getattr(torch.nn.functional, activation)(exact)
    for ours, truth in (
        (y, expected),
        [torch.autograd.grad(out.sum(), x)[0] for out, x in ((y, z), (expected, exact))],
    ):
        torch.testing.assert_close(ours.double(), truth, rtol=4e-7, atol=1e-6, equal_nan=True)


def test_reference_mode_runs_the_references(monkeypatch):
    called = []
    for op, reference in REFERENCES.items():
        monkeypatch.setitem(REFERENCES, op, lambda *args, f=reference: called.append(f.__name__) or f(*args))
    x = LOGITS.clone().requires_grad_()
    with fused_ops.reference_mode():
        (2 * F.cross_entropy(x, TARGET)).backward()
    assert called == ["cross_entropy_with_gradient", "cross_entropy_scale_"]


def import_fused_ops(code, **environment):
    code = f"import warnings; warnings.simplefilter('error'); import fused_ops; {code}"
    return subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, **environment}, capture_output=True, text=True, check=True
    ).stdout.split()


def test_has_kernels_says_what_was_built():
    """Kernels are expected unless FUSED_OPS_BUILD=0 says otherwise: a build that fell through must not go unseen."""
    assert fused_ops.has_kernels("cpu") == (os.environ.get("FUSED_OPS_BUILD") != "0")
    assert import_fused_ops("print(fused_ops.has_kernels('cpu'))", FUSED_OPS_BUILD="0") == ["False"]
    with pytest.raises(RuntimeError):
        fused_ops.has_kernels("no such device")


@every_device
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("C", [50, 5003, 100003])
def test_a_row_has_the_same_loss_wherever_it_lies(C, dtype, device):
    """Where it begins in memory decides how a kernel reads it, and must not decide what is added to what."""
    row = (torch.randn(C, generator=torch.Generator().manual_seed(0)) * 5).to(device, dtype)
    target = torch.tensor([7], device=device)

    def at(offset):
        logits = torch.empty(offset + C, device=device, dtype=dtype)[offset:].copy_(row)[None].requires_grad_()
        loss = F.cross_entropy(logits, target, label_smoothing=0.1)
        return loss, *torch.autograd.grad(loss, logits)

    first = at(0)
    for offset in range(1, 9):
        assert all(map(torch.equal, at(offset), first))
