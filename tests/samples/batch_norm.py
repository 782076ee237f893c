"""The cases of batch norm."""

import itertools

import torch

from fused_ops._op import accumulate_dtype
from samples.making import Case, Maker, Sample, leaf


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
    # unlike all others: the first row; and the first rows
    case("far-first-row", (64, 3), view=lambda x: torch.cat((x[:1] + 1e4, x[1:])), gradcheck=False)
    case("far-first-rows", (200, 3), view=lambda x: torch.cat((x[:25] + 300, x[25:])), gradcheck=False)
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
    # outputs that are written past the caches, at places of every alignment: see csrc/cpu/stream.h
    case("streamed-rows", (1500, 1467), gradcheck=False)
    case("streamed-planes", (7, 18, 131, 133), activation="relu", residual=lambda r: r, gradcheck=False)
    case("streamed-channels-last", (7, 18, 131, 133), view=lambda x: x.to(memory_format=last), gradcheck=False)
    # several blocks to a channel, which read 16 bytes at once: see Split in csrc/cuda/channels.cuh
    case("blocks-planes", (2, 3, 256, 136), gradcheck=False)
    case("blocks-small-planes", (90, 2, 14, 14), activation="relu", residual=lambda r: r, gradcheck=False)  # or 8 bytes

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
