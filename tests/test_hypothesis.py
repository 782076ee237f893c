"""Drawn shapes, strides, dtypes and options: value and gradients against torch's function in float64.

The draws are the same every time (`derandomize`). To add an option of an op, draw it in the op's strategy; if torch's
function lacks it, compute it in the op's `torch_function` (tests/samples/).
"""

import pytest
import torch
from checks import F64, FLOATS, assert_as_near, run
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from samples import OPS, Sample, leaf

pytestmark = pytest.mark.usefixtures("one_thread")
EXAMPLES = 150  # of each op
INDICES = (torch.int64, torch.uint8)
REDUCTIONS = ("mean", "sum", "none")

sizes = st.integers(0, 4)
mostly = st.sampled_from([True, True, True, False])


class Drawer:
    """Makes tensors whose values follow from one drawn seed, and whose strides are drawn, too."""

    def __init__(self, draw):
        self.draw = draw
        self.generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32), label="seed"))

    def floats(self, shape, dtype, low, high, requires_grad=False):
        t = torch.rand(self.stored(shape), generator=self.generator, dtype=F64) * (high - low) + low
        t = self.viewed(t.to(dtype), shape)
        return leaf(t) if requires_grad else t

    def indices(self, shape, dtype, classes):
        t = torch.randint(0, max(classes, 1), self.stored(shape), generator=self.generator)
        return self.viewed(t.to(dtype), shape)

    def stored(self, shape):
        """The shape of the memory behind a tensor of this shape: each dimension whole, stepped over or expanded."""
        self.steps = [self.draw(st.sampled_from([1, 1, 1, 2, 3, 0])) for _ in shape]
        self.order = self.draw(st.permutations(range(len(shape))))
        stored = [n * step if step else min(n, 1) for n, step in zip(shape, self.steps, strict=True)]
        return [stored[i] for i in self.order]

    def viewed(self, t, shape):
        """The tensor of this shape in the memory t: permuted, sliced and expanded."""
        t = t.permute([self.order.index(i) for i in range(len(shape))])
        return t[tuple(slice(None, None, step or 1) for step in self.steps)].expand(shape)


def loss_options(draw, make, dtype, classes):
    """What both losses have. A weight is None or positive: with other signs a mean may divide by almost nothing."""
    return {
        "weight": make.floats((classes,), dtype, 0.2, 2.0) if draw(st.booleans(), label="weight") else None,
        "reduction": draw(st.sampled_from(REDUCTIONS), label="reduction"),
        "label_smoothing": draw(st.sampled_from([0.0, 0.1, 0.7, 1.0]), label="label_smoothing"),
        "z_loss": draw(st.sampled_from([0.0, 0.0, 0.05]), label="z_loss"),
        "softcap": draw(st.sampled_from([None, None, 2.0, 20.0]), label="softcap"),
    }


def loss_target(draw, make, dtype, shape, classes, options):
    """Class probabilities, of this shape, or class indices, of this shape without its classes."""
    if draw(st.booleans(), label="probabilities"):
        return make.floats(shape, dtype, 0.0, 1.0, requires_grad=draw(mostly, label="differentiable target"))
    index_dtype = draw(st.sampled_from(INDICES), label="index dtype")
    target = make.indices(shape[:1] + shape[2:] if len(shape) > 1 else (), index_dtype, classes)
    ignored = draw(st.sampled_from([None, 0, classes - 1, classes + 3, 200]), label="ignore_index")
    if ignored is not None:
        options["ignore_index"] = ignored
        if draw(st.booleans(), label="ignoring"):  # some of the elements, whatever their strides
            drawn = torch.rand(target.shape, generator=make.generator) < 0.4
            target = target.masked_fill(drawn, ignored)
    return target


@st.composite
def cross_entropy(draw):
    make, dtype = Drawer(draw), draw(st.sampled_from(FLOATS), label="dtype")
    classes = draw(st.integers(1, 9), label="classes")
    batch = draw(st.lists(sizes, max_size=4), label="batch")  # none: not batched
    shape = (*batch[:1], classes, *batch[1:])
    scale = draw(st.sampled_from([0.1, 3.0, 30.0]), label="scale")
    options = loss_options(draw, make, dtype, classes)
    target = loss_target(draw, make, dtype, shape, classes, options)
    return Sample((make.floats(shape, dtype, -scale, scale, requires_grad=True), target), options)


@st.composite
def batch_norm(draw):
    make, dtype = Drawer(draw), draw(st.sampled_from(FLOATS), label="dtype")
    channels = draw(st.integers(1, 5), label="channels")  # with none torch raises an IndexError of its insides
    shape = (draw(sizes, label="N"), channels, *draw(st.lists(sizes, max_size=3), label="positions"))
    training = draw(st.booleans(), label="training")
    values = torch.Size(shape).numel() // max(channels, 1)
    training = training and values != 1  # torch refuses to train on one value a channel
    mixed = dtype.itemsize == 2 and draw(st.booleans(), label="mixed")
    vectors = torch.float32 if mixed else dtype  # the dtype of parameters and statistics
    tracked = not training or draw(mostly, label="running statistics")

    def vector(low, high, wanted, requires_grad=False):
        # moved in place, so not expanded
        return make.floats((channels,), vectors, low, high, requires_grad).contiguous() if wanted else None

    learnt = [
        make.floats((channels,), vectors, low, 2.0, requires_grad=True) if draw(mostly, label="affine") else None
        for low in (0.2, -2.0)
    ]
    options = {
        "training": training,
        "momentum": draw(st.sampled_from([0.0, 0.1, 0.9, 1.0]), label="momentum"),
        "eps": draw(st.sampled_from([1e-5, 1e-3, 0.5]), label="eps"),
    }
    x = make.floats(shape, dtype, -2.0, 3.0, requires_grad=True)
    # no relu: where a channel is constant z is 0 to rounding, and its slope either
    options["activation"] = draw(st.sampled_from([None, "tanh", "gelu", "silu"]), label="activation")
    if draw(st.booleans(), label="residual"):
        options["residual"] = make.floats(shape, dtype, -2.0, 2.0, requires_grad=True)
    return Sample((x, vector(-1.0, 1.0, tracked), vector(0.2, 2.0, tracked), *learnt), options)


@st.composite
def linear_cross_entropy(draw):
    make, dtype = Drawer(draw), draw(st.sampled_from(FLOATS), label="dtype")
    features, classes = draw(st.integers(1, 6), label="features"), draw(st.integers(1, 9), label="classes")
    batch = draw(st.lists(sizes, max_size=3), label="batch")  # none: not batched; more than one: K-dimensional
    options = loss_options(draw, make, dtype, classes)
    target = loss_target(draw, make, dtype, (*batch[:1], classes, *batch[1:]), classes, options)
    if draw(st.booleans(), label="bias"):
        options["linear_bias"] = make.floats((classes, *batch[1:]), dtype, -1.0, 1.0, requires_grad=True)
    options["chunk_size"] = draw(st.sampled_from([None, 1, 2, 3]), label="chunk_size")
    x = make.floats((*batch[:1], features), dtype, -2.0, 2.0, requires_grad=True)
    weight = make.floats((classes, *batch[1:], features), dtype, -2.0, 2.0, requires_grad=True)
    return Sample((x, weight, target), options)


@st.composite
def mlp(draw):
    make, dtype = Drawer(draw), draw(st.sampled_from(FLOATS), label="dtype")
    T, V, E, H = (draw(st.integers(1, most), label=name) for name, most in {"T": 3, "V": 9, "E": 4, "H": 20}.items())
    training = draw(st.booleans(), label="training")
    N = draw(st.integers(1 + training, 12), label="N")
    X, Y = make.indices((N, T), torch.int64, V), make.indices((N,), torch.int64, V)
    shapes = (V, E), (H, T * E), (H,), (H,), (H,), (V, H), (V,)
    parameters = [make.floats(shape, dtype, -2.0, 2.0, requires_grad=True) for shape in shapes]
    options = {
        "training": training,
        "momentum": draw(st.sampled_from([0.0, 0.1, 1.0]), label="momentum"),
        # not smaller: where all contexts are alike, 1/√eps multiplies the rounding of bias1's gradient, which is 0
        "eps": draw(st.sampled_from([0.1, 0.5]), label="eps"),
    }
    running = [make.floats((H,), dtype, low, 2.0).contiguous() for low in (-1.0, 0.2)]
    statistics = running if not training or draw(mostly, label="running statistics") else [None, None]
    return Sample((X, Y, *parameters, *statistics), options)


STRATEGIES = {
    "batch_norm": batch_norm,
    "cross_entropy": cross_entropy,
    "linear_cross_entropy": linear_cross_entropy,
    "mlp": mlp,
}


@pytest.mark.parametrize("name", STRATEGIES)
def test_drawn_samples(name, tally):
    op, tried = OPS[name], []

    @settings(
        max_examples=EXAMPLES,
        derandomize=True,
        deadline=None,
        database=None,
        suppress_health_check=[HealthCheck.too_slow],
    )
    @given(sample=STRATEGIES[name]())
    def check(sample):
        tried.append(name)
        ours, theirs = run(op.function, sample), run(op.torch_function, sample)
        assert_as_near(ours, theirs, run(op.torch_function, sample, F64))

    try:
        check()
    finally:
        tally.count("hypothesis", f"nn.functional.{name}", ["value and gradients"], len(tried))
