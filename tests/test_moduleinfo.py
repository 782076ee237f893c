"""PyTorch's own cases of the modules that ours replace: the ModuleInfo entries of torch.testing._internal.

Ours are built with the same arguments, load the state_dict of torch's, and then have to do the same. What PyTorch's
suite excludes, and why, is in `excluded`; it also shows in the table that the tests print.
"""

import copy
import io
import pickle
import random
import re
import warnings

import pytest
import torch
from checks import F64, NEEDS_CUDA, assert_as_near, copies, run, with_dtypes
from samples import Sample
from torch.autograd import gradcheck, gradgradcheck
from torch.func import functional_call
from torch.testing import assert_close
from torch.testing._internal.common_modules import ModuleErrorEnum, module_db
from torch.testing._internal.common_utils import noncontiguous_like
from torch.utils._pytree import tree_map

import fused_ops.nn

pytestmark = pytest.mark.usefixtures("one_thread")
NAMES = ("BatchNorm1d", "BatchNorm2d", "BatchNorm3d", "CrossEntropyLoss", "LinearCrossEntropyLoss")
GRADIENT_SAMPLES = 200  # at most, of one entry and mode: LinearCrossEntropyLoss has 857 (of which that is every fifth)


def entries(device):
    """One pytest parameter for each name, device and mode (training or not) where that makes a difference."""
    found = {entry.name: entry for entry in module_db}
    for name in NAMES:
        entry, marks = found.get(f"nn.{name}"), [NEEDS_CUDA] if device == "cuda" else []
        if entry is None:  # LinearCrossEntropyLoss came with torch 2.13
            reason = f"torch {torch.__version__} has no ModuleInfo entry nn.{name}"
            yield pytest.param(None, device, True, marks=pytest.mark.skip(reason=reason), id=f"{name}-{device}")
            continue
        for training in (True, False) if entry.train_and_eval_differ else (True,):
            mode = "" if not entry.train_and_eval_differ else "-training" if training else "-evaluation"
            yield pytest.param(entry, device, training, marks=marks, id=f"{name}{mode}-{device}")


def dtypes(entry, device, training):
    """BatchNorm's entries list float32 and float64 alone, CrossEntropyLoss's no bfloat16."""
    return entry.supported_dtypes(device) if entry else [F64]


ENTRIES = [*entries("cpu"), *entries("cuda")]
every_entry = pytest.mark.parametrize(("entry", "device", "training"), ENTRIES)
every_entry_and_dtype = pytest.mark.parametrize(("entry", "device", "training", "dtype"), with_dtypes(ENTRIES, dtypes))


def ours(entry):
    return getattr(fused_ops.nn, entry.name.removeprefix("nn."))


def label(entry, device):
    return f"{entry.name}{' on cuda' if device == 'cuda' else ''}"


class Case:
    """Our module and torch's with the same state, which is neither zeros nor ones, and a sample of inputs."""

    def __init__(self, entry, module_input, device, dtype, training, noncontiguous):
        args, kwargs = module_input.constructor_input.args, module_input.constructor_input.kwargs
        self.theirs = entry.module_cls(*args, **kwargs).to(device, dtype).train(training)
        for t in [*self.theirs.parameters(), *self.theirs.buffers()]:
            if t.is_floating_point():
                t.data.uniform_(0.3, 1.7)
        self.ours = ours(entry)(*args, **kwargs).to(device, dtype).train(training)
        self.ours.load_state_dict(self.theirs.state_dict(), strict=True)
        self.truth = copy.deepcopy(self.theirs).double()
        if getattr(self.truth, "options", None) is not None:
            self.truth.options = None  # torch's chunked path takes the gradients otherwise, in the dtype that it names

        def leaf(t):
            t = noncontiguous_like(t) if noncontiguous else t
            return t.detach().requires_grad_(t.requires_grad)

        forward = module_input.forward_input
        args, kwargs = tree_map(lambda t: leaf(t) if isinstance(t, torch.Tensor) else t, (forward.args, forward.kwargs))
        self.sample = Sample(args, kwargs)

    def inputs(self):
        """What the module is differentiated by: the inputs that require grad, then the parameters."""
        return [*(t for t in self.sample.args if t.requires_grad), *self.ours.parameters()]

    def function(self, *tensors):
        """Our module as a function of `inputs`; it moves copies of the buffers."""
        tensors = iter(tensors)
        args = [next(tensors) if t.requires_grad else t for t in self.sample.args]
        state = {name: next(tensors) for name, _ in self.ours.named_parameters()}
        state.update((name, t.clone()) for name, t in self.ours.named_buffers())
        return functional_call(self.ours, state, tuple(args), self.sample.kwargs)


def cases(entry, device, dtype, training, noncontiguous=False):
    """The entry's own cases, each with a name for the report."""
    torch.manual_seed(0)
    random.seed(0)
    module_inputs = entry.module_inputs_func(entry, device, dtype, requires_grad=True, training=training)
    for i, module_input in enumerate(module_inputs):
        constructor = module_input.constructor_input
        shapes = [tuple(t.shape) for t in module_input.forward_input.args]
        name = f"case {i} {module_input.desc}, {constructor.args} {constructor.kwargs} of {shapes}"
        yield name, Case(entry, module_input, device, dtype, training, noncontiguous)


def differentiable_cases(entry, device, training):
    """At most GRADIENT_SAMPLES cases, evenly chosen, in float64.

    Less those with a NaN, which has no derivative: among CrossEntropyLoss's targets, which are drawn, there may be one
    whose elements are all ignored, and whose mean is the mean of nothing.
    """
    every = list(cases(entry, device, F64, training))
    for name, case in every[:: -(-len(every) // GRADIENT_SAMPLES)]:
        if not copy.deepcopy(case.truth)(*case.sample.args).isnan().any():
            yield name, case


def outcome(module, sample, dtype=None, cotangent=lambda dout: dout):
    """Output, gradients by inputs and parameters, and the buffers afterwards."""
    with warnings.catch_warnings():
        # torch's chunked path cannot take every case of its own entry, and says so when it falls back
        if type(module).__module__.startswith("torch."):
            warnings.filterwarnings("ignore", "linear_cross_entropy: ``options`` ignored", UserWarning)
        parameters = list(module.parameters())
        return run(module, sample, dtype, parameters, cotangent), list(module.buffers())


def excluded(entry):
    """The checks that torch's own suite leaves out for this entry, each with its reason."""
    skipped = {getattr(decorator, "test_name", None) for decorator in entry.decorators}
    if "test_grad" in skipped:
        reason = "torch skips these: the gradients that its chunked path takes without a reduction refuse vmap"
        yield ("gradcheck", "forward AD", "vmap"), reason
    if "test_gradgrad" in skipped:
        yield ("gradgradcheck", "fwd over rev"), "torch skips these: its chunked path gets a wrong second derivative"
    if entry.name == "nn.CrossEntropyLoss":
        reason = "less the case, if drawn, whose targets are all ignored: the mean of nothing is NaN"
        yield ("gradcheck", "forward AD", "vmap", "gradgradcheck", "fwd over rev"), reason
    if entry.name == "nn.LinearCrossEntropyLoss":
        reason = f"at most {GRADIENT_SAMPLES} of the entry's cases, evenly chosen, for the time that all take"
        yield ("gradcheck", "forward AD", "vmap", "gradgradcheck", "fwd over rev"), reason


@every_entry_and_dtype
@pytest.mark.parametrize("noncontiguous", [False, True], ids=["contiguous", "noncontiguous"])
def test_samples(entry, device, training, dtype, noncontiguous, tally):
    for checks, reason in excluded(entry):
        tally.note("ModuleInfo", label(entry, device), checks, reason)

    def check(case):
        cotangent = noncontiguous_like if noncontiguous else lambda dout: dout
        outcomes = [outcome(module, case.sample, cotangent=cotangent) for module in (case.ours, case.theirs)]
        assert_as_near(*outcomes, outcome(case.truth, case.sample, F64))

    name = "non-contiguous" if noncontiguous else "samples"
    tried = cases(entry, device, dtype, training, noncontiguous)
    tally.try_all("ModuleInfo", label(entry, device), [name], tried, check)


@every_entry
def test_gradcheck(entry, device, training, tally):
    def check(case):
        options = {"check_forward_ad": True, "check_batched_grad": True, "check_grad_dtypes": True}
        assert gradcheck(case.function, case.inputs(), fast_mode=True, **options)

    checks, tried = ["gradcheck", "forward AD", "vmap"], differentiable_cases(entry, device, training)
    tally.try_all("ModuleInfo", label(entry, device), checks, tried, check)


@every_entry
def test_gradgradcheck(entry, device, training, tally):
    def check(case):
        options = {"check_fwd_over_rev": True, "check_grad_dtypes": True}
        assert gradgradcheck(case.function, case.inputs(), fast_mode=True, **options)

    checks, tried = ["gradgradcheck", "fwd over rev"], differentiable_cases(entry, device, training)
    tally.try_all("ModuleInfo", label(entry, device), checks, tried, check)


@every_entry
def test_pickle(entry, device, training, tally):
    def check(case):
        file = io.BytesIO()
        torch.save(case.ours, file)
        file.seek(0)
        for other in (pickle.loads(pickle.dumps(case.ours)), torch.load(file, weights_only=False)):
            assert type(other) is type(case.ours)
            assert_close(dict(other.state_dict()), dict(case.ours.state_dict()), rtol=0, atol=0)
            expected = copy.deepcopy(case.ours)(*copies(case.sample.args))
            assert_close(other(*copies(case.sample.args)), expected, rtol=0, atol=0, equal_nan=True)

    tried = cases(entry, device, torch.float32, training)
    tally.try_all("ModuleInfo", label(entry, device), ["pickle"], tried, check)


# torch's own suite runs the error inputs in training alone
@pytest.mark.parametrize(("entry", "device", "training"), [p for p in ENTRIES if p.values[2]])
def test_error_inputs(entry, device, training, tally):
    def check(error):
        construction, forward = error.module_error_input.constructor_input, error.module_error_input.forward_input
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Possible nested set", FutureWarning)  # in a pattern of torch's
            pattern = re.compile(error.error_regex)
        raised = []
        for cls in (ours(entry), entry.module_cls):
            if error.error_on is ModuleErrorEnum.CONSTRUCTION_ERROR:
                with pytest.raises(error.error_type, match=pattern) as caught:
                    cls(*construction.args, **construction.kwargs)
            else:
                module = cls(*construction.args, **construction.kwargs).to(device)
                with pytest.raises(error.error_type, match=pattern) as caught:
                    module(*forward.args, **forward.kwargs)
            raised.append(caught.type)
        assert raised[0] is raised[1]

    if entry.module_error_inputs_func is None:
        pytest.skip(f"torch {torch.__version__} has no error inputs of {entry.name}")
    errors = entry.module_error_inputs_func(entry, device, torch.float32, requires_grad=False, training=training)
    tally.try_all("ModuleInfo", label(entry, device), ["errors"], ((e.error_regex, e) for e in errors), check)
