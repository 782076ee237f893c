"""The cases that every op is tested on. A new op adds an entry to `OPS`; the tests find it there.

A sample is built anew for each test, from a dtype and a device, with the same values every time. No weight is all
zeros or ones: those hide a wrong backward pass.
"""

import itertools
import zlib
from typing import Any, Callable, Dict, NamedTuple

import torch

import fused_ops
from fused_ops._op import accumulate_dtype


class Sample(NamedTuple):
    args: tuple  # of the public function; the tensors to differentiate by require grad
    kwargs: Dict[str, Any]


class Case(NamedTuple):
    """Builds one sample; `gradcheck` is False where there is no number to check (NaN) or too many are."""

    build: Callable[..., Sample]
    gradcheck: bool = True


class Op(NamedTuple):
    function: Callable  # ours
    torch_function: Callable  # the one it replaces
    cases: Dict[str, Case]


class Maker:
    """Makes the tensors of one case: by default of the dtype under test, requiring grad."""

    def __init__(self, name, dtype, device):
        self.dtype, self.device = dtype, device
        self.generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))

    def __call__(self, *shape, low=-3.0, high=3.0, dtype=None, requires_grad=True):
        values = torch.rand(shape, generator=self.generator, dtype=torch.float64) * (high - low) + low
        return values.to(self.device, dtype or self.dtype).requires_grad_(requires_grad)

    def weights(self, *shape, **kwargs):
        return self(*shape, low=0.2, high=2.0, **kwargs)

    def indices(self, *shape, classes):
        return torch.randint(0, max(classes, 1), shape, generator=self.generator).to(self.device)

    def probabilities(self, *shape):
        t = self(*shape, requires_grad=False)
        return torch.softmax(t.double(), 0 if len(shape) == 1 else 1).to(self.dtype).requires_grad_()


def leaf(t):
    """A tensor with the strides of `t`, cut off from its history."""
    return t.detach().requires_grad_()


# ------------------------------------------------------------------------------------------------------ cross-entropy


def torch_cross_entropy(input, target, *args, z_loss=0.0, softcap=None, **kwargs):
    """PyTorch's, with the two options that it does not have written out."""
    if softcap is not None:
        input = softcap * (input / softcap).tanh()
    loss = torch.nn.functional.cross_entropy(input, target, *args, **kwargs)
    if not z_loss:
        return loss
    penalty = z_loss * input.logsumexp(int(input.dim() > 1)).square()
    weights = torch.ones_like(penalty)
    if not target.is_floating_point():
        kept = target != kwargs.get("ignore_index", -100)
        penalty = penalty.where(kept, 0)
        weights = weights if kwargs.get("weight") is None else kwargs["weight"][target.where(kept, 0)]
        weights = weights.where(kept, 0)
    reduction = kwargs.get("reduction", "mean")
    if reduction == "none":
        return loss + penalty
    return loss + penalty.sum() / (weights.sum() if reduction == "mean" else 1)


def cross_entropy_cases():
    cases = {}

    def case(name, gradcheck=True):
        def add(build):
            cases[name] = Case(lambda dtype, device: Sample(*build(Maker(name, dtype, device))), gradcheck)

        return add

    # every option with every other
    options = itertools.product((False, True), (False, True), ("mean", "sum", "none"), (0.0, 0.3))
    for weighted, ignoring, reduction, label_smoothing in options:
        name = f"indices-{reduction}-smoothing{label_smoothing}{'-weight' * weighted}{'-ignore' * ignoring}"

        @case(name)
        def _(make, weighted=weighted, ignoring=ignoring, reduction=reduction, label_smoothing=label_smoothing):
            target = make.indices(6, classes=5)
            if ignoring:
                target[1::3] = 2
            kwargs = {"reduction": reduction, "label_smoothing": label_smoothing}
            kwargs["weight"] = make.weights(5, requires_grad=False) if weighted else None
            kwargs["ignore_index"] = 2 if ignoring else -100
            return (make(6, 5), target), kwargs

    for weighted, reduction, label_smoothing in itertools.product((False, True), ("mean", "sum", "none"), (0.0, 0.3)):

        @case(f"probabilities-{reduction}-smoothing{label_smoothing}{'-weight' * weighted}")
        def _(make, weighted=weighted, reduction=reduction, label_smoothing=label_smoothing):
            weight = make.weights(5, requires_grad=False) if weighted else None
            kwargs = {"reduction": reduction, "label_smoothing": label_smoothing, "weight": weight}
            return (make(6, 5), make.probabilities(6, 5)), kwargs

    extras = [(0.1, None), (0.0, 2.0), (0.05, 1.5)]
    for (z_loss, softcap), reduction, label_smoothing in itertools.product(extras, ("mean", "none"), (0.0, 0.3)):
        more = {"reduction": reduction, "label_smoothing": label_smoothing, "z_loss": z_loss, "softcap": softcap}
        name = f"{reduction}-smoothing{label_smoothing}-z{z_loss}-cap{softcap}"

        @case(f"indices-{name}")
        def _(make, more=more):
            return (make(6, 5), make.indices(6, classes=5)), {
                **more,
                "weight": make.weights(5, requires_grad=False),
                "ignore_index": 2,
            }

        @case(f"probabilities-{name}")
        def _(make, more=more):
            return (make(6, 5), make.probabilities(6, 5)), {**more, "weight": make.weights(5, requires_grad=False)}

    @case("indices-large-z-cap", gradcheck=False)
    def _(make):
        return (make(150, 1003, low=-30.0, high=30.0), make.indices(150, classes=1003)), {
            "z_loss": 0.01,
            "softcap": 9.0,
        }

    @case("probabilities-large", gradcheck=False)
    def _(make):
        return (make(20, 1003), make.probabilities(20, 1003)), {"label_smoothing": 0.1}

    @case("indices-4x5x3-z-cap")
    def _(make):
        return (make(4, 5, 3), make.indices(4, 3, classes=5)), {"z_loss": 0.1, "softcap": 2.0}

    shapes = [
        (7,),
        (1, 1),
        (1, 4),
        (6, 1),
        (3, 37),
        (0, 3),
        (0, 0),
        (4, 5, 3),
        (2, 5, 3, 2),
        (2, 5, 0),
        (2, 5, 1, 2, 3),
    ]
    for shape, reduction in itertools.product(shapes, ("mean", "none")):
        defined = 0 not in shape or reduction != "mean"  # the mean of no losses is NaN

        @case(f"indices-{'x'.join(map(str, shape))}-{reduction}", gradcheck=defined)
        def _(make, shape=shape, reduction=reduction):
            classes = shape[len(shape) > 1]
            target = make.indices(*(shape[:1] + shape[2:] if len(shape) > 1 else ()), classes=classes)
            return (make(*shape), target), {"reduction": reduction}

        @case(f"probabilities-{'x'.join(map(str, shape))}-{reduction}", gradcheck=defined)
        def _(make, shape=shape, reduction=reduction):
            return (make(*shape), make.probabilities(*shape)), {"reduction": reduction}

    @case("indices-large", gradcheck=False)  # several blocks of rows, rows of many vectors and a tail
    def _(make):
        return (make(150, 1003), make.indices(150, classes=1003)), {"label_smoothing": 0.1}

    @case("indices-transposed")
    def _(make):
        return (leaf(make(5, 6).t()), make.indices(6, classes=5)), {}

    @case("indices-strided")
    def _(make):
        return (leaf(make(12, 10)[::2, ::2]), make.indices(12, classes=5)[::2]), {"label_smoothing": 0.1}

    @case("indices-expanded", gradcheck=False)  # gradcheck does not take overlapping inputs
    def _(make):
        return (leaf(make(1, 5).expand(6, 5)), make.indices(1, classes=5).expand(6)), {"reduction": "none"}

    @case("indices-channels-last")
    def _(make):
        logits = leaf(make(2, 5, 3, 4).to(memory_format=torch.channels_last))
        return (logits, make.indices(2, 3, 4, classes=5)), {}

    @case("indices-uint8")
    def _(make):
        return (make(6, 5), make.indices(6, classes=5).to(torch.uint8)), {}

    @case("indices-strided-weight")
    def _(make):
        return (make(6, 5), make.indices(6, classes=5), make.weights(10, requires_grad=False)[::2]), {}

    @case("probabilities-transposed")
    def _(make):
        return (leaf(make(5, 6).t()), leaf(make.probabilities(5, 6).t())), {}

    @case("indices-legacy-arguments")
    def _(make):
        return (make(6, 5), make.indices(6, classes=5), None, None, -100, None, "sum", 0.1), {}

    for label_smoothing in (0.0, 0.2):

        @case(f"indices-extreme-smoothing{label_smoothing}")
        def _(make, label_smoothing=label_smoothing):
            logits = make(6, 5)
            with torch.no_grad():
                logits[:3] += torch.tensor([[1e4], [-1e4], [1e4]], device=make.device)
                logits[2, 1] = -1e4
                logits[3, 0] = 1e4
            return (logits, make.indices(6, classes=5)), {"label_smoothing": label_smoothing}

    @case("indices-minus-inf")  # beside the target, at a target that is ignored, and nowhere else
    def _(make):
        logits, target = make(6, 5), make.indices(6, classes=4)
        with torch.no_grad():
            logits[:, 4] = -torch.inf
            logits[2, 1:] = -torch.inf
        target[2], target[3] = 0, 4
        return (logits, target), {"ignore_index": 4}

    @case("indices-infinite-loss", gradcheck=False)
    def _(make):
        logits, target = make(6, 5), make.indices(6, classes=5)
        with torch.no_grad():
            logits[1, target[1]] = -torch.inf
        return (logits, target), {"reduction": "none"}

    @case("indices-nan", gradcheck=False)  # each makes its own row NaN
    def _(make):
        logits = make(6, 5)
        with torch.no_grad():
            logits[1, 2], logits[2, 2], logits[3] = torch.nan, torch.inf, -torch.inf
        return (logits, make.indices(6, classes=5)), {"reduction": "none"}

    for reduction, label_smoothing in itertools.product(("mean", "sum", "none"), (0.0, 0.2)):

        @case(f"indices-all-ignored-{reduction}-smoothing{label_smoothing}", gradcheck=reduction != "mean")
        def _(make, reduction=reduction, label_smoothing=label_smoothing):
            target = make.indices(6, classes=5).fill_(-100)
            return (make(6, 5), target), {"reduction": reduction, "label_smoothing": label_smoothing}

    return cases


# ----------------------------------------------------------------------------------------------- linear cross-entropy


def torch_linear_cross_entropy(input, linear_weight, target, *, linear_bias=None, chunk_size=None, **kwargs):
    bias = None if linear_bias is None else linear_bias.flatten()
    logits = torch.nn.functional.linear(input, linear_weight.flatten(0, -2), bias)
    return torch_cross_entropy(logits.unflatten(-1, linear_weight.shape[:-1]), target, **kwargs)


def linear_cross_entropy_cases():
    cases = {}

    def case(name, shape=(6, 4), out=(5,), probabilities=False, bias=True, gradcheck=True, view=None, **options):
        """A batch of this shape onto `out` = (C, d1, ...); `options` whose value is True are made here."""

        def build(dtype, device):
            make = Maker(name, dtype, device)
            input, linear_weight = make(*shape, low=-1.0, high=1.0), make(*out, shape[-1], low=-1.0, high=1.0)
            if view is not None:
                input, linear_weight = leaf(view(input)), leaf(view(linear_weight))
            target = (shape[:-1] + out) if probabilities else shape[:-1] + out[1:]
            target = make.probabilities(*target) if probabilities else make.indices(*target, classes=out[0])
            kwargs = {**options, "linear_bias": make(*out) if bias else None}
            if options.get("weight"):
                kwargs["weight"] = make.weights(out[0], requires_grad=False)
            return Sample((input, linear_weight, target), kwargs)

        cases[name] = Case(build, gradcheck)

    everything = {"weight": True, "label_smoothing": 0.2, "z_loss": 0.05, "softcap": 1.5}
    for reduction in ("mean", "sum", "none"):
        case(f"plain-{reduction}", bias=False, reduction=reduction)
        case(f"everything-{reduction}", reduction=reduction, chunk_size=4, ignore_index=2, **everything)
        case(f"probabilities-{reduction}", probabilities=True, reduction=reduction, chunk_size=4)
        case(
            f"probabilities-everything-{reduction}", probabilities=True, reduction=reduction, chunk_size=5, **everything
        )
        case(f"k-dim-{reduction}", out=(5, 3), reduction=reduction, chunk_size=4, ignore_index=1)
    case("k-dim-probabilities", out=(3, 2, 2), probabilities=True, chunk_size=4)
    case("unbatched", shape=(4,))
    case("unbatched-probabilities", shape=(4,), probabilities=True)
    case("one-row-chunks", chunk_size=1)
    case("strided", shape=(4, 8), view=lambda x: x[:, ::2], chunk_size=3)
    case("transposed", shape=(5, 5), view=lambda x: x.t())
    case("empty-sum", shape=(0, 4), reduction="sum")
    case("empty-none", shape=(0, 4), reduction="none")
    case("many-chunks", shape=(300, 24), out=(50,), gradcheck=False)
    return cases


# --------------------------------------------------------------------------------------------------------- batch norm


def composed_batch_norm(*args, activation=None, residual=None, **kwargs):
    """What PyTorch takes three functions for."""
    y = torch.nn.functional.batch_norm(*args, **kwargs)
    y = y if residual is None else y + residual
    return y if activation is None else getattr(torch.nn.functional, activation)(y)


def batch_norm_cases():
    cases = {}

    def case(name, shape, gradcheck=True, view=None, training=True, mixed=False, residual=None, **changed):
        """A batch norm of this shape; `view` changes the strides of the input, `changed` replaces arguments.

        `residual` makes the residual from a tensor that has the values of one and is contiguous.
        """

        def build(dtype, device):
            make = Maker(name, dtype, device)
            x = make(*shape)
            x = x if view is None else leaf(view(x))
            C = x.shape[1]
            learnt = {"dtype": accumulate_dtype(dtype) if mixed else dtype}
            fixed = {**learnt, "requires_grad": False}
            arguments = {
                "running_mean": make(C, **fixed),
                "running_var": make.weights(C, **fixed),
                "weight": make.weights(C, **learnt),
                "bias": make(C, **learnt),
                "training": training,
            }
            if residual is not None:
                arguments["residual"] = leaf(residual(make(*x.shape)))
            return Sample((x,), {**arguments, **changed})

        cases[name] = Case(build, gradcheck)

    no_statistics = {"running_mean": None, "running_var": None}
    shapes = [(5, 3), (2, 1), (4, 1), (9, 37), (4, 3, 5), (2, 3, 1), (2, 3, 4, 5), (1, 3, 2, 1), (2, 3, 2, 2, 3)]
    for shape, training in itertools.product(shapes, (True, False)):
        name = f"{'x'.join(map(str, shape))}-{'training' if training else 'evaluation'}"
        case(name, shape, training=training)
        case(f"{name}-no-affine", shape, training=training, weight=None, bias=None)
    case("weight-only", (5, 3), bias=None)
    case("bias-only", (5, 3), weight=None)
    case("no-statistics", (5, 3), **no_statistics)
    case("no-statistics-no-affine", (4, 3, 5), weight=None, bias=None, **no_statistics)
    case("momentum-0", (5, 3), momentum=0.0)
    case("momentum-1", (5, 3), momentum=1.0)
    case("momentum-0.7-eps-0.1", (5, 3), momentum=0.7, eps=0.1)
    case("one-row-evaluation", (1, 3), training=False)
    case("large-mean", (64, 3), view=lambda x: x + 300, gradcheck=False)
    for shape in [(0, 3), (2, 3, 0)]:
        case(f"empty-{'x'.join(map(str, shape))}-training", shape)
        case(f"empty-{'x'.join(map(str, shape))}-evaluation", shape, training=False)

    # strides
    last, last_3d = torch.channels_last, torch.channels_last_3d
    case("transposed", (3, 5), view=lambda x: x.t())
    case("transposed-3d", (4, 5, 3), view=lambda x: x.transpose(1, 2))
    case("sliced", (10, 6), view=lambda x: x[::2, ::2])
    case("expanded", (5, 3, 1), view=lambda x: x.expand(5, 3, 4), gradcheck=False)
    case("permuted-4d", (2, 4, 5, 3), view=lambda x: x.permute(1, 3, 0, 2))
    for training in (True, False):
        suffix = "training" if training else "evaluation"
        case(f"channels-last-{suffix}", (2, 3, 4, 5), view=lambda x: x.to(memory_format=last), training=training)
        case(
            f"channels-last-3d-{suffix}", (2, 3, 2, 2, 3), view=lambda x: x.to(memory_format=last_3d), training=training
        )
    case("channels-last-one-channel", (3, 1, 4, 5), view=lambda x: x.to(memory_format=last))
    case("channels-last-sliced", (2, 6, 4, 5), view=lambda x: x.to(memory_format=last)[:, ::2])

    # more than one tile each way: see Tiling in csrc/cpu/tiles.h
    case("tiles-rows", (70, 1100), gradcheck=False)
    case("tiles-many-rows", (20000, 3), gradcheck=False)
    case("tiles-planes", (3, 5, 150, 151), gradcheck=False)
    case("tiles-small-planes", (70, 600, 2), gradcheck=False)
    case("tiles-channels-last", (3, 40, 21, 20), view=lambda x: x.to(memory_format=last), gradcheck=False)

    # a 16-bit input with float32 parameters and statistics
    for training in (True, False):
        suffix = "training" if training else "evaluation"
        case(f"mixed-{suffix}", (9, 5), training=training, mixed=True, gradcheck=False)

    # what follows the affine part
    def same(r):
        return r

    activations = ("relu", "leaky_relu", "tanh", "gelu", "silu")
    for activation, adds, training in itertools.product((None, *activations), (False, True), (True, False)):
        name = f"{activation}{'-residual' * adds}-{'training' if training else 'evaluation'}"
        if activation or adds:
            case(name, (4, 3, 2), training=training, activation=activation, residual=same if adds else None)
    strided = {"residual": lambda r: r.transpose(0, 1).contiguous().transpose(0, 1)}
    case("tanh-residual-no-affine", (5, 3), activation="tanh", residual=same, weight=None, bias=None)
    case("silu-weight-only", (5, 3), activation="silu", bias=None)
    case("gelu-residual-bias-only-evaluation", (5, 3), False, activation="gelu", weight=None, training=False, **strided)
    case("residual-expanded", (5, 3, 4), gradcheck=False, residual=lambda r: r[:1].expand(5, 3, 4))
    case("tanh-residual-transposed", (5, 3), activation="tanh", **strided)
    case("silu-residual-transposed-input", (3, 5), view=lambda x: x.t(), activation="silu", residual=same)
    case("gelu-residual-channels-last", (2, 3, 4, 5), activation="gelu", residual=lambda r: r.to(memory_format=last))
    case(
        "tanh-channels-last-residual",
        (2, 3, 4, 5),
        view=lambda x: x.to(memory_format=last),
        activation="tanh",
        residual=same,
    )
    case("relu-residual-mixed", (9, 5), mixed=True, gradcheck=False, activation="relu", residual=same)
    case("silu-empty", (0, 3), activation="silu", residual=same)
    # several strips to a tile: see kStrip in csrc/cpu/tiles.h
    case("strips-rows", (70, 600), gradcheck=False, activation="tanh", **strided)
    case("strips-planes", (2, 3, 50, 51), gradcheck=False, activation="gelu", residual=same)
    case("strips-small-planes", (9, 300, 9), gradcheck=False, activation="silu", residual=same)
    return cases


OPS = {
    "cross_entropy": Op(fused_ops.functional.cross_entropy, torch_cross_entropy, cross_entropy_cases()),
    "linear_cross_entropy": Op(
        fused_ops.functional.linear_cross_entropy, torch_linear_cross_entropy, linear_cross_entropy_cases()
    ),
    "batch_norm": Op(fused_ops.functional.batch_norm, composed_batch_norm, batch_norm_cases()),
}
