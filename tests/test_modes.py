"""The losses under PyTorch's modes, compilers and transforms: the same numbers and dtypes, and no silent detaching."""

import itertools

import pytest
import torch
from torch._functorch import config as functorch_config
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

import fused_ops.functional as F

N, H, C = 6, 4, 5
GENERATOR = torch.Generator().manual_seed(0)
INPUT = torch.randn(N, H, generator=GENERATOR, requires_grad=True)
LINEAR_WEIGHT = torch.randn(C, H, generator=GENERATOR, requires_grad=True)
LINEAR_BIAS = torch.randn(C, generator=GENERATOR, requires_grad=True)
CLASSES = torch.randint(C, (N,), generator=GENERATOR)
PROBABILITIES = torch.rand(N, C, generator=GENERATOR, requires_grad=True)
W = torch.rand(C, generator=GENERATOR) + 0.5
PARAMETERS = INPUT, LINEAR_WEIGHT, LINEAR_BIAS


def torch_linear_cross_entropy(input, linear_weight, target, linear_bias, **options):
    """PyTorch's, in any version."""
    return torch.nn.functional.cross_entropy(
        torch.nn.functional.linear(input, linear_weight, linear_bias), target, **options
    )


def cross_entropy(input, linear_weight, target, linear_bias, **options):
    return F.cross_entropy(torch.nn.functional.linear(input, linear_weight, linear_bias), target, **options)


def linear_cross_entropy(input, linear_weight, target, linear_bias, **options):
    return F.linear_cross_entropy(input, linear_weight, target, linear_bias=linear_bias, chunk_size=4, **options)


every_loss = pytest.mark.parametrize("loss", [cross_entropy, linear_cross_entropy], ids=lambda f: f.__name__)
every_target = pytest.mark.parametrize("target", [CLASSES, PROBABILITIES], ids=["classes", "probabilities"])
every_reduction = pytest.mark.parametrize("reduction", ["mean", "none"])
slow_vmap = pytest.mark.filterwarnings("ignore:There is a performance drop")  # PyTorch's own, where it vmaps in a loop


def differentiated(target):
    return (*PARAMETERS, target) if target.requires_grad else PARAMETERS


def value_and_gradients(loss, target, **options):
    inputs = differentiated(target)
    out = loss(INPUT, LINEAR_WEIGHT, target, LINEAR_BIAS, **options)
    return out, *torch.autograd.grad(out, inputs, torch.arange(1.0, 1.0 + out.numel()).view(out.shape).to(out))


def assert_like_torch(loss, target, **options):
    ours, theirs = (value_and_gradients(f, target, **options) for f in (loss, torch_linear_cross_entropy))
    assert_close(ours, theirs)
    assert [t.dtype for t in ours] == [t.dtype for t in theirs]


class Recording(torch.Tensor):
    """Keeps what is called with it."""

    called = []

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        cls.called.append(func)
        return super().__torch_function__(func, types, args, kwargs)


@every_loss
def test_a_subclass_is_asked_and_returned(loss):
    """Its `__torch_function__` sees our functions, as it sees PyTorch's."""
    Recording.called.clear()
    out = loss(INPUT.as_subclass(Recording), LINEAR_WEIGHT, CLASSES, LINEAR_BIAS)
    assert type(out) is Recording
    assert getattr(F, loss.__name__) in Recording.called


def test_a_subclass_sees_ops_that_are_called_by_themselves():
    Recording.called.clear()
    logits = INPUT.as_subclass(Recording)
    torch.ops.fused_ops.cross_entropy_forward(logits, CLASSES % H, None, -100, "mean", 0.0, 0.0, None)
    assert Recording.called == [torch.ops.fused_ops.cross_entropy_forward]


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@every_reduction
@every_target
@every_loss
def test_compiles_without_graph_breaks(loss, target, reduction, dynamic):
    torch.compiler.reset()
    compiled = torch.compile(loss, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    assert_like_torch(compiled, target, reduction=reduction)


@functorch_config.patch(donated_buffer=False)  # with donated buffers, PyTorch refuses retain_graph
@every_loss
def test_compiled_for_one_batch_size_runs_on_others_and_twice_backward(loss):
    torch.compiler.reset()
    compiled = torch.compile(loss, fullgraph=True, dynamic=True)  # by Inductor, PyTorch's default
    for rows in (6, 5, 3):
        inputs = [INPUT[:rows].detach().requires_grad_(), LINEAR_WEIGHT, LINEAR_BIAS]
        with torch._dynamo.config.patch(error_on_recompile=rows < 6):
            ours, theirs = (
                f(inputs[0], LINEAR_WEIGHT, CLASSES[:rows].clone(), LINEAR_BIAS)
                for f in (compiled, torch_linear_cross_entropy)
            )
        for _ in range(2):
            first, second = (
                torch.autograd.grad(f, inputs, torch.tensor(3.0), retain_graph=True) for f in (ours, theirs)
            )
            assert_close(first, second)


@every_reduction
@every_target
@every_loss
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_computes_the_loss_in_float32(loss, target, reduction, dtype):
    """As torch does, or, where no logits are rounded to 16 bits, nearer to the loss of the rounded inputs."""

    def of_rounded(input, linear_weight, target, linear_bias, **options):
        input, linear_weight, linear_bias = (t.to(dtype).float() for t in (input, linear_weight, linear_bias))
        return torch_linear_cross_entropy(input, linear_weight, target, linear_bias, **options)

    options = {"reduction": reduction, "weight": torch.arange(1.0, 1.0 + C)}
    with torch.autocast("cpu", dtype=dtype):
        ours, theirs = (value_and_gradients(f, target, **options) for f in (loss, torch_linear_cross_entropy))
    assert [t.dtype for t in ours] == [t.dtype for t in theirs] == [torch.float32] * len(ours)
    if loss is cross_entropy:
        return assert_close(ours, theirs)
    expected = value_and_gradients(of_rounded, target, **options)
    assert_close(ours[0], expected[0])
    return assert_close(ours, expected, rtol=2 * torch.finfo(dtype).eps, atol=1e-3)


@every_loss
def test_a_loss_scale_keeps_float16_gradients_from_vanishing(loss):
    """Gradients of 1e-7, which float16 cannot hold, times a loss scale, as torch.amp.GradScaler has it."""
    inputs = [t.detach().half().requires_grad_() for t in (INPUT * 1e-4, LINEAR_WEIGHT * 1e-4)]
    target = CLASSES.expand(100, N).reshape(-1)

    def scaled_gradients(f):
        input, linear_weight = inputs
        loss = f(input.repeat(100, 1), linear_weight, target, None)
        return torch.autograd.grad(loss * 2.0**15, inputs)

    ours, theirs = scaled_gradients(loss), scaled_gradients(torch_linear_cross_entropy)
    assert all(t.count_nonzero() > 0.9 * t.numel() for t in theirs)
    assert_close(ours, theirs, rtol=0.02, atol=1e-3)


@every_loss
def test_inference_mode(loss):
    with torch.inference_mode():
        ours, theirs = (f(INPUT, LINEAR_WEIGHT, CLASSES, LINEAR_BIAS) for f in (loss, torch_linear_cross_entropy))
    assert_close(ours, theirs)
    assert ours.is_inference()


@every_target
@every_loss
def test_deterministic_algorithms(loss, target):
    torch.use_deterministic_algorithms(True)
    try:
        first, second = (value_and_gradients(loss, target) for _ in range(2))
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@every_reduction
@every_target
@every_loss
def test_meta_and_fake_tensors(loss, target, reduction):
    expected = value_and_gradients(loss, target, reduction=reduction)
    detached = [(t.detach(), t.requires_grad) for t in (*PARAMETERS, target)]

    def shapes(convert):
        inputs = [convert(t).requires_grad_(needs) for t, needs in detached]
        input, linear_weight, linear_bias, y = inputs
        out = loss(input, linear_weight, y, linear_bias, reduction=reduction)
        gradients = torch.autograd.grad(out, [t for t in inputs if t.requires_grad], torch.ones_like(out))
        return [(t.shape, t.dtype, t.stride()) for t in (out, *gradients)]

    described = [(t.shape, t.dtype, t.stride()) for t in expected]
    assert shapes(lambda t: t.to("meta")) == described
    with FakeTensorMode() as mode:
        assert shapes(mode.from_tensor) == described


@every_reduction
@every_loss
def test_checkpoint(loss, reduction):
    def checkpointed(*args, **options):
        return checkpoint(loss, *args, use_reentrant=False, **options)

    assert_like_torch(checkpointed, CLASSES, reduction=reduction)


@every_reduction
@every_target
@every_loss
def test_second_backward_pass_gives_the_same_gradient(loss, target, reduction):
    out = loss(INPUT, LINEAR_WEIGHT, target, LINEAR_BIAS, reduction=reduction).sum()
    inputs = differentiated(target)
    passes = [torch.autograd.grad(out, inputs, torch.tensor(3.0), retain_graph=True) for _ in range(3)]
    assert_close(passes[0], passes[1])
    assert_close(passes[0], passes[2])


@slow_vmap
@every_target
@every_loss
def test_per_sample_gradients(loss, target):
    def per_sample(f):
        one = lambda W, b, x, y: f(x[None], W, y[None], b)  # noqa: E731
        batched = torch.func.vmap(torch.func.grad(one, argnums=(0, 1, 2)), in_dims=(None, None, 0, 0))
        return batched(LINEAR_WEIGHT, LINEAR_BIAS, INPUT, target)

    assert_close(per_sample(loss), per_sample(torch_linear_cross_entropy))


@slow_vmap
@every_reduction
@every_target
@every_loss
def test_vmap_and_its_gradient(loss, target, reduction):
    """Over every input in turn, class weights too: the batched rules, and the one that takes sample by sample."""
    weights = torch.rand(2, C, generator=torch.Generator().manual_seed(1))
    inputs = [torch.stack([t, t.flip(0)]).detach() for t in (INPUT, LINEAR_WEIGHT, target, LINEAR_BIAS)] + [weights]

    def results(f, batched):
        def g(input, linear_weight, y, linear_bias, weight):
            return f(input, linear_weight, y, linear_bias, weight=weight, reduction=reduction)

        args = [t if i in batched else t[0] for i, t in enumerate(inputs)]
        in_dims = tuple(0 if i in batched else None for i in range(len(args)))
        total = lambda *args: torch.func.vmap(g, in_dims)(*args).sin().sum()  # noqa: E731
        return torch.func.vmap(g, in_dims)(*args), torch.func.grad(total, argnums=(0, 1, 3))(*args)

    for batched in ({0}, {1}, {0, 2}, {4}, {0, 1, 2, 3, 4}):
        assert_close(results(loss, batched), results(torch_linear_cross_entropy, batched))


@slow_vmap
@every_target
@every_loss
def test_hessian(loss, target):
    """Forward over reverse mode, by input and weight at once, against PyTorch's."""

    def hessian(f):
        of = lambda x, W: f(x, W, target.detach().double(), LINEAR_BIAS.detach().double())  # noqa: E731
        of = of if target.is_floating_point() else lambda x, W: f(x, W, target, LINEAR_BIAS.detach().double())
        return torch.func.hessian(of, argnums=(0, 1))(INPUT.detach().double(), LINEAR_WEIGHT.detach().double())

    assert_close(hessian(loss), hessian(torch_linear_cross_entropy))


@pytest.mark.parametrize("frozen", range(3), ids=["input", "linear_weight", "linear_bias"])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_a_frozen_input_saves_its_gradient(frozen, reduction):
    """What isn't needed isn't computed: neither in the forward pass nor in the backward pass is there room for it."""
    inputs = [t.detach().requires_grad_(i != frozen) for i, t in enumerate(PARAMETERS)]
    input, linear_weight, linear_bias = inputs
    ops = torch.ops.fused_ops
    needs = [i != frozen for i in range(3)] + [False]
    options = -100, reduction, 0.0, 0.0, None, C, 4
    if reduction == "mean":
        _, _, *made = ops.linear_cross_entropy_forward(*(t.detach() for t in inputs), CLASSES, None, *options, needs)
    else:
        dloss, divisor = torch.ones(N), torch.tensor(float(N))
        made = ops.linear_cross_entropy_backward(
            dloss, *(t.detach() for t in inputs), CLASSES, None, divisor, *options, needs
        )
    assert [t.numel() > 0 for t in made] == needs

    out = F.linear_cross_entropy(input, linear_weight, CLASSES, linear_bias=linear_bias, reduction=reduction)
    out.sum().backward()
    assert [t.grad is not None for t in inputs] == needs[:3]


def test_inplace_grad_takes_the_storage_of_the_logits():
    logits = torch.nn.functional.linear(INPUT, LINEAR_WEIGHT)
    loss = F.cross_entropy(logits, CLASSES, label_smoothing=0.1, inplace_grad=True)
    before = logits.detach().clone()
    (gradient,) = torch.autograd.grad(loss, logits, retain_graph=True)
    assert gradient.data_ptr() == logits.data_ptr()
    expected = before.requires_grad_()
    reference = torch.nn.functional.cross_entropy(expected, CLASSES, label_smoothing=0.1)
    assert_close(gradient, torch.autograd.grad(reference, expected)[0])
    with pytest.raises(RuntimeError, match="second backward pass is not possible"):
        torch.autograd.grad(loss, logits)


def test_inplace_grad_tells_whoever_needs_the_logits():
    logits = torch.nn.functional.linear(INPUT, LINEAR_WEIGHT)
    square = logits.square().sum()
    loss = F.cross_entropy(logits, CLASSES, inplace_grad=True)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        square.backward()


def test_inplace_grad_of_strided_logits_leaves_them_alone():
    logits = torch.nn.functional.linear(INPUT, LINEAR_WEIGHT).t().contiguous().t().detach().requires_grad_()
    before = logits.detach().clone()
    F.cross_entropy(logits, CLASSES, inplace_grad=True).backward()
    assert torch.equal(logits, before)


def test_inplace_grad_leaves_logits_that_need_none():
    logits, target = INPUT.detach().clone(), PROBABILITIES[:, :H].detach().requires_grad_()
    F.cross_entropy(logits, target, inplace_grad=True).backward()
    assert torch.equal(logits, INPUT)
    expected = target.detach().requires_grad_()
    torch.nn.functional.cross_entropy(INPUT.detach(), expected).backward()
    assert_close(target.grad, expected.grad)


@pytest.mark.parametrize(
    ("transform", "message"),
    [
        (lambda f: torch.func.grad(f)(INPUT.detach()), "no second derivative"),
        (lambda f: torch.autograd.grad(f(INPUT), INPUT, create_graph=True), "no second derivative"),
        (lambda f: torch.func.jvp(f, (INPUT,), (INPUT,)), "no forward mode"),
        (lambda f: torch.func.vmap(f)(INPUT.expand(2, N, H)), "cannot be vmapped"),
    ],
    ids=["grad", "create_graph", "jvp", "vmap"],
)
def test_inplace_grad_refuses_what_it_cannot_do(transform, message):
    with pytest.raises(RuntimeError, match=message):
        transform(lambda x: F.cross_entropy(x, CLASSES % H, inplace_grad=True))


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("frozen", [(), (0,), (1,)], ids=["all", "frozen input", "frozen weight"])
def test_flops_of_linear_cross_entropy(frozen, reduction):
    """Those of PyTorch's ops; and of one product more, where the backward pass works the logits out again."""

    def flops(loss):
        tensors = [t.detach().requires_grad_(i not in frozen) for i, t in enumerate((INPUT, LINEAR_WEIGHT))]
        with FlopCounterMode(display=False) as counter:
            loss(*tensors, CLASSES, None, reduction=reduction).sum().backward()
        return counter.get_total_flops()

    again = 2 * N * H * C if reduction == "none" else 0
    assert flops(linear_cross_entropy) == flops(torch_linear_cross_entropy) + again


@pytest.mark.parametrize("dtypes", list(itertools.product([torch.float32, torch.float64], repeat=3)), ids=str)
def test_probabilities_and_their_weights_are_promoted(dtypes):
    tensors = zip((PROBABILITIES.sin(), PROBABILITIES, W), dtypes, strict=True)
    logits, target, weight = (t.detach().to(dtype) for t, dtype in tensors)
    assert_close(*(f(logits, target, weight) for f in (F.cross_entropy, torch.nn.functional.cross_entropy)))
    linear = F.linear_cross_entropy(logits, torch.eye(C).to(logits), target, weight=weight)
    assert_close(linear, F.cross_entropy(logits, target, weight))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_autocast_casts_class_weights(dtype):
    with torch.autocast("cpu", torch.bfloat16):
        arguments = PROBABILITIES.sin(), CLASSES, W.to(dtype)
        assert_close(*(f(*arguments) for f in (F.cross_entropy, torch.nn.functional.cross_entropy)))
        with pytest.raises(RuntimeError, match="expected scalar type"):
            F.cross_entropy(PROBABILITIES, CLASSES, W.double())
        with pytest.raises(RuntimeError, match="the same dtype"):
            F.linear_cross_entropy(INPUT.double(), LINEAR_WEIGHT, CLASSES)


def test_linear_cross_entropy_without_features():
    """Only the bias is left."""
    loss = F.linear_cross_entropy(torch.zeros(N, 0), torch.zeros(C, 0), CLASSES, linear_bias=LINEAR_BIAS)
    assert_close(loss, torch.nn.functional.cross_entropy(LINEAR_BIAS.expand(N, C), CLASSES))


def test_no_input_is_changed():
    inputs = [*PARAMETERS, PROBABILITIES, CLASSES]
    before = [t.detach().clone() for t in inputs]
    for loss in (cross_entropy, linear_cross_entropy):
        for target in (CLASSES, PROBABILITIES):
            value_and_gradients(loss, target, z_loss=0.1, softcap=2.0)
    assert all(torch.equal(a, b) for a, b in zip(inputs, before, strict=True))
    assert all(t._version == 0 for t in inputs)
