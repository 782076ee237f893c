"""The network in one op: its module, and its training in one call."""

import copy
import threading
import time

import pytest
import torch
from checks import NEEDS_CUDA, copies, every_device
from samples import torch_mlp
from torch.utils.flop_counter import FlopCounterMode

import fused_ops
import fused_ops.functional as F
from fused_ops import ladder, nn, steps
from fused_ops._op import REFERENCES

V, E, T, H = 7, 3, 2, 12
PARAMETERS = ("embedding_weight", "weight1", "bias1", "norm_weight", "norm_bias", "weight2", "bias2")


def network(dtype=torch.float32, device="cpu", hidden=H):
    torch.manual_seed(1)
    net = nn.MLP(V, E, T, hidden, dtype=dtype)
    with torch.no_grad():
        net.norm.weight.uniform_(0.5, 1.5)
        net.norm.bias.uniform_(-1, 1)
    return net.to(device)


def examples(count, device="cpu"):
    generator = torch.Generator().manual_seed(2)
    return tuple(torch.randint(V, size, generator=generator).to(device) for size in ((count, T), (count,)))


def tensors_of(net):
    """The nine tensors of `F.mlp`, in its order."""
    net.norm.num_batches_tracked = None
    norm = net.norm
    parameters = net.linear.weight, net.linear.bias, norm.weight, norm.bias, net.output.weight, net.output.bias
    return [net.embedding.weight, *parameters, norm.running_mean, norm.running_var]


def train_by_torch(net, X, Y, lr, steps, batch_size, seed):
    """The same minibatches, drawn one at a time, in PyTorch's own way."""
    generator = torch.Generator().manual_seed(seed)
    tensors, losses = tensors_of(net), []
    optimizer = torch.optim.SGD(net.parameters(), lr=lr)
    for _ in range(steps):
        ix = torch.randint(len(X), (batch_size,), generator=generator).to(X.device)
        loss = torch_mlp(X[ix], Y[ix], *tensors, training=True)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    return torch.stack(losses)


# ------------------------------------------------------------------------------------------------------------ training


@every_device
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_sgd_steps_are_those_of_torch(dtype, device):
    ours, theirs = network(dtype, device), network(dtype, device)
    X, Y = examples(50, device)
    options = {"lr": 0.1, "steps": 40, "batch_size": 9}
    losses = F.mlp_sgd_steps(X, Y, *tensors_of(ours), **options, generator=torch.Generator().manual_seed(3))
    torch.testing.assert_close(losses, train_by_torch(theirs, X, Y, **options, seed=3))
    assert losses[-1] < losses[0]
    torch.testing.assert_close(ours.state_dict(), theirs.state_dict())


def test_sgd_steps_by_the_reference():
    ours, theirs = network(), network()
    X, Y = examples(50)
    runs = []
    for net, mode in ((ours, torch.no_grad()), (theirs, fused_ops.reference_mode())):
        with mode:
            generator = torch.Generator().manual_seed(3)
            runs.append(net.sgd_steps(X, Y, lr=0.1, steps=20, batch_size=9, generator=generator))
    torch.testing.assert_close(*runs)
    torch.testing.assert_close(ours.state_dict(), theirs.state_dict())
    assert ours.norm.num_batches_tracked == 20


def test_sgd_steps_depend_on_the_seed_alone():
    """Not on the number of threads, even where there is work for several, nor on how many steps a call takes."""
    X, Y = torch.randint(30, (500, 4)), torch.randint(30, (500,))
    torch.manual_seed(0)
    net = nn.MLP(30, 16, 4, 400)

    def run(threads, calls):
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        trained, generator = copy.deepcopy(net), torch.Generator().manual_seed(5)
        for count in calls:
            trained.sgd_steps(X, Y, lr=0.1, steps=count, batch_size=300, generator=generator)
        torch.set_num_threads(before)
        return trained.state_dict()

    one, two, cut = run(1, [6]), run(2, [6]), run(1, [1, 3, 2])
    for name, values in one.items():
        assert torch.equal(values, two[name])
        assert torch.equal(values, cut[name])


@every_device
def test_sgd_steps_move_strided_and_16_bit_parameters(device):
    X, Y = examples(50, device)
    options = {"lr": 0.1, "steps": 5, "batch_size": 9}
    expected = tensors_of(network(device=device))
    expected_losses = F.mlp_sgd_steps(X, Y, *expected, **options, generator=torch.Generator().manual_seed(3))
    strided = [t.detach().t().contiguous().t() for t in tensors_of(network(device=device))]
    losses = F.mlp_sgd_steps(X, Y, *strided, **options, generator=torch.Generator().manual_seed(3))
    torch.testing.assert_close(losses, expected_losses)
    torch.testing.assert_close(strided, [t.detach() for t in expected])

    half = [t.detach().bfloat16() for t in tensors_of(network(device=device))]
    losses = F.mlp_sgd_steps(X, Y, *half, **options, generator=torch.Generator().manual_seed(3))
    assert losses.dtype == torch.float32
    torch.testing.assert_close(losses, expected_losses, rtol=0.02, atol=0.02)
    assert all(t.dtype == torch.bfloat16 for t in half)


def calls_of_both_ops(net, X, Y):
    """Each op, and arguments for it, some of which it moves."""
    tensors = [t.detach() for t in tensors_of(net)]
    ix = torch.arange(len(X), device=X.device).view(2, -1)
    return (
        ("mlp_loss_and_gradients", (X, Y, *tensors, True, 0.1, 1e-5, True)),
        ("mlp_sgd_steps_", (X, Y, ix, *tensors, 0.1, 0.1, 1e-5)),
    )


def outputs_and_moved(op, args):
    args = copies(args)
    return op(*args), args


def assert_both_ops_match_references(net, X, Y):
    for name, args in calls_of_both_ops(net, X, Y):
        op = getattr(torch.ops.fused_ops, name).default
        ours, theirs = (outputs_and_moved(f, args) for f in (op, REFERENCES[op]))
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_the_references_have_another_name():
    """By which the CUDA kernel finds them, for networks that don't fit into the memory of a block."""
    for name, args in calls_of_both_ops(network(), *examples(20)):
        reference = REFERENCES[getattr(torch.ops.fused_ops, name).default]
        by_name = getattr(torch.ops.fused_ops, name + "_by_reference")
        torch.testing.assert_close(*(outputs_and_moved(f, args) for f in (by_name, reference)), rtol=0, atol=0)


@NEEDS_CUDA
@pytest.mark.parametrize("hidden", [H, 3000], ids=["cuda-fits", "cuda-does-not-fit"])  # 3000 units: 0.5 MB
def test_networks_of_every_size(hidden):
    assert_both_ops_match_references(network(device="cuda", hidden=hidden), *examples(20, "cuda"))


@NEEDS_CUDA
def test_sgd_steps_in_a_cuda_graph():
    """Nothing is read back to the host: a call can be recorded, and a replay goes on from where the last one ended."""
    _, (name, args) = calls_of_both_ops(network(device="cuda"), *examples(20, "cuda"))
    op = getattr(torch.ops.fused_ops, name).default
    expected = copies(args)
    losses = [op(*expected) for _ in range(2)]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        recorded = op(*args)
    for of_call in losses:
        graph.replay()
        torch.testing.assert_close(recorded, of_call, rtol=0, atol=0)
    torch.testing.assert_close(args, expected, rtol=0, atol=0)


@every_device
def test_sgd_steps_tell_autograd_what_they_move(device):
    """A graph that needs the old values can say so, instead of giving a wrong gradient."""
    tensors = tensors_of(network(device=device))
    before = [t._version for t in tensors]
    F.mlp_sgd_steps(*examples(20, device), *tensors, lr=0.1, steps=1, batch_size=5)
    assert all(t._version > version for t, version in zip(tensors, before, strict=True))


def test_flops():
    net, (X, Y) = network(), examples(20)

    def flops(call):
        with FlopCounterMode(display=False) as counter:
            call()
        return counter.get_total_flops()

    with torch.no_grad():
        assert flops(lambda: net(X, Y)) == flops(lambda: net(X))
    step = flops(lambda: net(X, Y).backward())
    assert step == flops(lambda: torch.nn.functional.cross_entropy(net(X), Y).backward())
    assert flops(lambda: net.sgd_steps(X, Y, lr=0.1, steps=7, batch_size=20)) == 7 * step


@pytest.mark.parametrize("change", ["eval", "activation", "layer", "momentum", "affine", "statistics", "weight norm"])
def test_a_layer_that_has_been_changed(change):
    """The loss is that of the logits; and where it cannot be one op, there are no `sgd_steps`."""
    net, (X, Y) = nn.MLP(V, E, T, 8), examples(20)
    if change == "eval":
        net.norm.eval()
    elif change == "activation":
        net.norm.activation = "relu"
    elif change == "layer":
        net.norm = torch.nn.BatchNorm1d(8)
    elif change == "weight norm":
        torch.nn.utils.parametrizations.weight_norm(net.linear)
    elif change == "momentum":
        net.norm.momentum = None
    elif change == "affine":
        net.norm = nn.BatchNorm1d(8, affine=False, activation="tanh")
    else:
        net.norm = nn.BatchNorm1d(8, track_running_stats=False, activation="tanh")
    other = copy.deepcopy(net)
    loss, expected = net(X, Y), torch.nn.functional.cross_entropy(other(X), Y)
    torch.testing.assert_close(loss, expected)
    loss.backward(), expected.backward()
    torch.testing.assert_close([p.grad for p in net.parameters()], [p.grad for p in other.parameters()])
    torch.testing.assert_close(dict(net.named_buffers()), dict(other.named_buffers()))
    if change != "eval":
        with pytest.raises(RuntimeError, match="sgd_steps is made for"):
            net.sgd_steps(X, Y, lr=0.1, steps=1, batch_size=5)


def test_sgd_steps_let_other_threads_run():
    """Another thread of Python goes on counting while a call is under way: the call does not hold Python's lock."""
    net, (X, Y) = nn.MLP(V, E, T, 400), examples(50)
    count, running = 0, True

    def counting():
        nonlocal count
        while running:
            count += 1

    def counts_a_second(function):
        before, start = count, time.perf_counter()
        function()
        return (count - before) / (time.perf_counter() - start)

    thread = threading.Thread(target=counting)
    thread.start()
    idle = counts_a_second(lambda: time.sleep(0.3))
    during = counts_a_second(lambda: net.sgd_steps(X, Y, lr=0.1, steps=5000, batch_size=32))
    running = False
    thread.join()
    assert during > 0.2 * idle  # with the lock held it counts for some milliseconds of some hundreds


def test_sgd_steps_tell_autograd_what_they_moved():
    net, (X, Y) = network(), examples(20)
    losses = net(X, Y), net.linear.weight.square().sum()
    net.sgd_steps(X, Y, lr=0.1, steps=1, batch_size=5)
    for loss in losses:
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()


def test_gradients_are_those_of_the_elementary_steps():
    """All seven, to rounding, of one minibatch: `fused_ops.steps` takes them one elementary step at a time."""
    X, Y = examples(9)
    names = ("C", "W1", "b1", "bngain", "bnbias", "W2", "b2")
    parameters = dict(
        zip(names, (t.detach().double().requires_grad_() for t in tensors_of(network())[:7]), strict=True)
    )
    F.mlp(X, Y, *parameters.values(), training=True).backward()

    as_in_the_lecture = {name: p.detach() for name, p in parameters.items()}
    for name in ("W1", "W2"):
        as_in_the_lecture[name] = as_in_the_lecture[name].t()
    grads = steps.backward(steps.forward(as_in_the_lecture, X, Y, correction=0))
    for name, p in parameters.items():
        expected = grads[name].t() if name.startswith("W") else grads[name].flatten() if p.dim() == 1 else grads[name]
        torch.testing.assert_close(p.grad, expected, msg=lambda m, name=name: f"d{name}: {m}")


# ---------------------------------------------------------------------------------------------------------- the module


def test_module_is_a_drop_in_for_the_layers():
    """The state_dict, losses and gradients of the network of torch's layers, with any optimiser, in train and eval."""
    ours, theirs = network(), ladder.Network(torch.nn, V, T * E, H)
    theirs.embedding = torch.nn.Embedding(V, E)
    theirs.norm.momentum = 0.1
    theirs.load_state_dict(ours.state_dict())
    X, Y = examples(30)
    options = {"lr": 0.05, "momentum": 0.9, "nesterov": True, "weight_decay": 0.01}
    optimizers = [torch.optim.SGD(net.parameters(), **options) for net in (ours, theirs)]
    for _ in range(10):
        for net, optimizer in zip((ours, theirs), optimizers, strict=True):
            optimizer.zero_grad()
            net(X, Y).backward()
            optimizer.step()
    torch.testing.assert_close(ours.state_dict(), theirs.state_dict(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(ours.eval()(X, Y), theirs.eval()(X, Y), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(F.cross_entropy(ours(X), Y), ours(X, Y))


def test_gradients_accumulate_and_a_kept_graph_gives_them_again():
    net, (X, Y) = network(), examples(20)
    loss = net(X, Y)
    (3 * loss).backward(retain_graph=True)
    first = [p.grad.clone() for p in net.parameters()]
    loss.backward()
    for p, g in zip(net.parameters(), first, strict=True):
        torch.testing.assert_close(p.grad, g * 4 / 3)


def test_frozen_parameters_get_no_gradient():
    net, (X, Y) = network(), examples(20)
    net.embedding.requires_grad_(False)
    net(X, Y).backward()
    assert net.embedding.weight.grad is None
    assert all(p.grad is not None for name, p in net.named_parameters() if not name.startswith("embedding"))


def test_autocast_changes_nothing():
    net, (X, Y) = network(), examples(20)
    plain = net(X, Y)
    for mode in (torch.no_grad(), fused_ops.reference_mode()):
        with mode, torch.autocast("cpu", dtype=torch.bfloat16):
            torch.testing.assert_close(net(X, Y), plain.detach())


def test_compiles_and_exports_with_its_gradients():
    net, (X, Y) = network(), examples(20)
    compiled = torch.compile(copy.deepcopy(net), fullgraph=True, backend="aot_eager")
    loss, expected = compiled(X, Y), net(X, Y)
    loss.backward()
    expected.backward()
    torch.testing.assert_close(loss, expected)
    for p, q in zip(compiled.parameters(), net.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad)
    torch.testing.assert_close(compiled.state_dict()["_orig_mod.norm.running_var"], net.norm.running_var)

    exported = torch.export.export(copy.deepcopy(net), (X, Y)).module()
    again = exported(X, Y)
    again.backward()
    torch.testing.assert_close(again, net(X, Y))
    assert all(p.grad is not None for p in exported.parameters())


@pytest.mark.parametrize("training", [True, False])
def test_functorch_agrees_with_torch(training):
    X, Y = examples(8)
    *parameters, mean, var = (t.detach().double() for t in tensors_of(network()))
    statistics = (None, None) if training else (mean, var)

    def of_weight(mlp):
        return lambda W: mlp(X, Y, parameters[0], W, *parameters[2:], *statistics, training)

    W, direction = parameters[1], parameters[1].cos()
    transforms = {
        "grad": lambda f: torch.func.grad(f)(W),
        "jvp": lambda f: torch.func.jvp(f, (W,), (direction,))[1],
        "hvp": lambda f: torch.func.jvp(torch.func.grad(f), (W,), (direction,))[1],
        "jacrev of jacrev": lambda f: torch.func.jacrev(torch.func.jacrev(f))(W),
        "vmap of grad": lambda f: torch.func.vmap(torch.func.grad(f))(torch.stack([W, direction])),
    }
    for name, transform in transforms.items():
        ours, theirs = transform(of_weight(F.mlp)), transform(of_weight(torch_mlp))
        torch.testing.assert_close(ours, theirs, msg=lambda m, name=name: f"{name}: {m}")


# ----------------------------------------------------------------------------------------------------- what is refused


def test_indices_out_of_range():
    net, (X, Y) = network(), examples(20)
    for bad in (V, -1):
        wrong_X, wrong_Y = X.clone(), Y.clone()
        wrong_X[3, 1], wrong_Y[4] = bad, bad
        before = copy.deepcopy(net.state_dict())
        for examples_ in ((wrong_X, Y), (X, wrong_Y)):
            with pytest.raises((IndexError, RuntimeError), match="out of"):
                net.eval()(*examples_)
            with pytest.raises((IndexError, RuntimeError), match="out of"):
                net.sgd_steps(*examples_, lr=0.1, steps=40, batch_size=20)
        if fused_ops.has_kernels("cpu"):  # which look at all indices before the first step
            after = net.state_dict()
            assert all(torch.equal(after[k], v) for k, v in before.items() if k != "norm.num_batches_tracked")


REFUSED = {
    "a target of another length": lambda a: a | {"target": a["target"][1:]},
    "float contexts": lambda a: a | {"input": a["input"].float()},
    "a context that is too long": lambda a: a | {"input": a["input"].repeat(1, 2)},
    "half of the running statistics": lambda a: a | {"running_var": None},
    "evaluation without statistics": lambda a: a | {"running_mean": None, "running_var": None, "training": False},
    "one example": lambda a: a | {"input": a["input"][:1], "target": a["target"][:1]},
    "no examples": lambda a: a | {"input": a["input"][:0], "target": a["target"][:0], "training": False},
    "statistics of another size": lambda a: a | {"running_mean": a["running_mean"][1:]},
    **{f"{name} of another size": lambda a, name=name: a | {name: a[name][:-1]} for name in PARAMETERS[1:]},
    **{f"{name} of another dtype": lambda a, name=name: a | {name: a[name].double()} for name in PARAMETERS[1:]},
}


@pytest.mark.parametrize("change", REFUSED.values(), ids=REFUSED)
def test_refused(change):
    X, Y = examples(5)
    names = ("input", "target", *PARAMETERS, "running_mean", "running_var")
    arguments = dict(zip(names, (X, Y, *tensors_of(network())), strict=True)) | {"training": True}
    F.mlp(**arguments)
    with pytest.raises((RuntimeError, ValueError)):
        F.mlp(**change(arguments))


@pytest.mark.parametrize("change", [{"steps": 0}, {"batch_size": 1}], ids=str)
def test_refused_training(change):
    with pytest.raises(ValueError, match="expected at least"):
        network().sgd_steps(*examples(5), **{"lr": 0.1, "steps": 1, "batch_size": 2, **change})


def test_running_statistics_under_vmap_are_refused():
    X, Y = examples(5)
    tensors = [t.detach() for t in tensors_of(network())]
    with pytest.raises(RuntimeError, match="cannot move running statistics"):
        torch.func.vmap(lambda W: F.mlp(X, Y, tensors[0], W, *tensors[2:], training=True))(tensors[1].expand(2, -1, -1))
