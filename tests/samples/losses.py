"""The cases of cross-entropy and of linear cross-entropy."""

import itertools

import torch

from samples.making import Case, Maker, Sample, leaf


def torch_cross_entropy(input, target, *args, z_loss=0.0, softcap=None, **kwargs):
    """PyTorch's, with the two options that it does not have written out."""
    # it takes uint8 indices, but fails with those of images: "expected scalar type Long but found Byte"
    target = target if target.is_floating_point() else target.long()
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

    for shape in ((3, 200), (3, 5)):  # the largest of negative values of 16 bits is found in another way

        @case(f"indices-{'x'.join(map(str, shape))}-negative", gradcheck=False)
        def _(make, shape=shape):
            return (make(*shape, low=-30.0, high=-20.0), make.indices(3, classes=shape[1])), {}

    @case("indices-150x203", gradcheck=False)  # several blocks of long rows
    def _(make):
        weight = make.weights(203, requires_grad=False)
        return (make(150, 203), make.indices(150, classes=203)), {"weight": weight, "ignore_index": 3}

    @case("indices-40000x3", gradcheck=False)  # so many rows that several blocks of a CUDA card add them up
    def _(make):
        return (make(40000, 3), make.indices(40000, classes=3)), {"ignore_index": 1}

    @case("indices-4099", gradcheck=False)  # a row for more threads than a block of a CUDA card has
    def _(make):
        return (make(3, 4099), make.indices(3, classes=4099)), {"label_smoothing": 0.1}

    @case("probabilities-3x0-none")
    def _(make):
        return (make(3, 0), make.probabilities(3, 0)), {"reduction": "none"}

    @case("probabilities-large", gradcheck=False)
    def _(make):
        return (make(20, 1003), make.probabilities(20, 1003)), {"label_smoothing": 0.1}

    @case("indices-4x5x3-z-cap")
    def _(make):
        return (make(4, 5, 3), make.indices(4, 3, classes=5)), {"z_loss": 0.1, "softcap": 2.0}

    # so many positions that they are taken side by side, some more than a block of them; and so few that they are not
    for size, kind in itertools.product(((9, 15), (130,), (7, 3), (3, 2)), ("indices", "probabilities")):

        @case(f"{kind}-2x5x{'x'.join(map(str, size))}-everything", gradcheck=False)
        def _(make, size=size, kind=kind):
            target = make.indices(2, *size, classes=5) if kind == "indices" else make.probabilities(2, 5, *size)
            kwargs = {
                "label_smoothing": 0.2,
                "z_loss": 0.05,
                "softcap": 3.0,
                "weight": make.weights(5, requires_grad=False),
            }
            kwargs["ignore_index"] = 2 if kind == "indices" else -100
            return (make(2, 5, *size), target), kwargs

    for reduction in ("mean", "none"):

        @case(f"indices-3x200x66-{reduction}", gradcheck=False)
        def _(make, reduction=reduction):
            return (make(3, 200, 66), make.indices(3, 66, classes=200)), {"reduction": reduction, "ignore_index": 7}

    @case("indices-3x1500x3", gradcheck=False)  # few positions, but too many classes for them to be gathered
    def _(make):
        return (make(3, 1500, 3), make.indices(3, 3, classes=1500)), {"ignore_index": 7}

    @case("probabilities-3x1500x3", gradcheck=False)
    def _(make):
        return (make(3, 1500, 3), make.probabilities(3, 1500, 3)), {"label_smoothing": 0.1}

    @case("indices-300x21", gradcheck=False)  # several blocks of gathered rows
    def _(make):
        return (make(300, 21), make.indices(300, classes=21)), {"ignore_index": 3}

    @case("probabilities-channels-last", gradcheck=False)
    def _(make):
        logits, target = (
            t.to(memory_format=torch.channels_last) for t in (make(2, 5, 9, 8), make.probabilities(2, 5, 9, 8))
        )
        return (leaf(logits), leaf(target)), {"label_smoothing": 0.1}

    @case("indices-strided-positions", gradcheck=False)
    def _(make):
        return (leaf(make(2, 5, 9, 16)[..., ::2]), make.indices(2, 9, 8, classes=5)), {}

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
    case("transposed", shape=(5, 5), view=lambda x: x.t(), chunk_size=3)
    case("one-class", out=(1,), chunk_size=3)
    case("empty-sum", shape=(0, 4), reduction="sum")
    case("empty-none", shape=(0, 4), reduction="none")
    case("many-chunks", shape=(300, 24), out=(50,), chunk_size=100, gradcheck=False)
    return cases
