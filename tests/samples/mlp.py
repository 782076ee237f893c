"""The cases of the whole network."""

import torch

from samples.making import Case, Maker, Sample, leaf


def torch_mlp(input, target, C, W1, b1, bngain, bnbias, W2, b2, *norm, **options):
    """The network from PyTorch's functions."""
    F = torch.nn.functional
    hprebn = F.linear(F.embedding(input, C).flatten(1), W1, b1)
    running_mean, running_var, *rest = norm or (None, None)
    bngain = bngain.contiguous()  # of a strided weight, PyTorch's batch norm on CPU has a wrong gradient
    h = torch.tanh(F.batch_norm(hprebn, running_mean, running_var, bngain, bnbias, *rest, **options))
    return F.cross_entropy(F.linear(h, W2, b2), target)


def mlp_cases():
    cases = {}

    def case(name, N, T, V, E, H, gradcheck=True, training=True, statistics=True, view=None, **options):
        def build(dtype, device):
            make = Maker(name, dtype, device)
            C, W1, b1 = make(V, E, low=-1.0, high=1.0), make(H, T * E, low=-1.0, high=1.0), make(H)
            bngain, bnbias, W2, b2 = make.weights(H), make(H, low=-1.0, high=1.0), make(V, H), make(V)
            parameters = (C, W1, b1, bngain, bnbias, W2, b2)
            if view is not None:
                parameters = tuple(leaf(view(p)) for p in parameters)
            running = (
                (make(H, requires_grad=False), make.weights(H, requires_grad=False)) if statistics else (None, None)
            )
            indices = make.indices(N, T, classes=V), make.indices(N, classes=V)
            return Sample((*indices, *parameters, *running), {"training": training, **options})

        cases[name] = Case(build, gradcheck)

    case("training", 6, 2, 5, 3, 4)
    case("evaluation", 6, 2, 5, 3, 4, training=False)
    case("no-statistics", 6, 2, 5, 3, 4, statistics=False)
    case("momentum-eps", 6, 2, 5, 3, 4, momentum=0.7, eps=0.1)
    case("one-example-evaluation", 1, 2, 5, 3, 4, training=False)
    case("two-examples", 2, 3, 4, 2, 3)
    case("ones", 3, 1, 2, 1, 1)
    case("one-class", 4, 2, 1, 2, 3)
    strided = {"view": lambda p: p.t().contiguous().t() if p.dim() > 1 else p.repeat_interleave(2)[::2]}
    case("strided", 5, 2, 4, 3, 3, **strided)
    # several blocks of units and of examples, each with a remainder: see kUnits and kExamples in csrc/cpu/mlp.cpp
    case("seed-sizes", 32, 3, 27, 10, 200, gradcheck=False)
    case("blocks", 37, 3, 29, 5, 77, gradcheck=False)
    case("blocks-evaluation", 37, 3, 29, 5, 77, gradcheck=False, training=False)
    case("parallel", 300, 4, 70, 16, 333, gradcheck=False)
    return cases
