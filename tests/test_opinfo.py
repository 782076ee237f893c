"""PyTorch's own cases of the functions that ours replace: the OpInfo entries of torch.testing._internal.

PyTorch's suite excludes cases that its own functions fail; ours run every one of them. What a suite of PyTorch
excludes, and why, is in `excluded`; it also shows in the table that the tests print.
"""

import contextlib
import warnings

import pytest
import torch
from checks import F64, NEEDS_CUDA, assert_as_near, differentiated, of_inputs, run, with_dtypes
from samples import Sample
from torch.autograd import gradcheck, gradgradcheck
from torch.testing._internal.common_methods_invocations import op_db
from torch.testing._internal.common_utils import noncontiguous_like

import fused_ops.functional

pytestmark = pytest.mark.usefixtures("one_thread")
NAMES = ("batch_norm", "cross_entropy", "linear_cross_entropy")


def entries(device):
    """One pytest parameter for each name, variant and device that the installed torch has an entry for."""
    for name in NAMES:
        found = [entry for entry in op_db if entry.name == f"nn.functional.{name}"]
        if not found:  # linear_cross_entropy came with torch 2.13
            reason = f"torch {torch.__version__} has no OpInfo entry nn.functional.{name}"
            yield pytest.param(None, device, marks=pytest.mark.skip(reason=reason), id=f"{name}-{device}")
        for entry in found:
            if entry.supported_dtypes(device):  # batch_norm's without_cudnn has none on the CPU
                marks = [NEEDS_CUDA] if device == "cuda" else []
                variant = f"-{entry.variant_test_name}" if entry.variant_test_name else ""
                yield pytest.param(entry, device, marks=marks, id=f"{name}{variant}-{device}")


def dtypes(entry, device):
    return entry.supported_dtypes(device) if entry else [F64]


ENTRIES = [*entries("cpu"), *entries("cuda")]
every_entry = pytest.mark.parametrize(("entry", "device"), ENTRIES)
every_entry_and_dtype = pytest.mark.parametrize(("entry", "device", "dtype"), with_dtypes(ENTRIES, dtypes))


def ours(entry):
    return getattr(fused_ops.functional, entry.name.removeprefix("nn.functional."))


def theirs(entry):
    def function(*args, **kwargs):
        # torch's chunked path cannot take every sample of its own entry, and says so when it falls back
        with warnings.catch_warnings(), without_cudnn(entry):
            warnings.filterwarnings("ignore", "linear_cross_entropy: ``options`` ignored", UserWarning)
            return entry.op(*args, **kwargs)

    return function


def truth(entry):
    def function(*args, options=None, **kwargs):
        """Without `options`: torch's chunked path computes the gradients otherwise, in the dtype that it names."""
        return entry.op(*args, **kwargs)

    return function


def without_cudnn(entry):
    excluded = entry.variant_test_name == "without_cudnn"
    return torch.backends.cudnn.flags(enabled=False) if excluded else contextlib.nullcontext()


def label(entry, device):
    variant = f" ({entry.variant_test_name})" if entry.variant_test_name else ""
    return f"{entry.name}{variant}{' on cuda' if device == 'cuda' else ''}"


def samples(entry, device, dtype, noncontiguous=False):
    """The entry's own samples, each with a name for the report."""
    for i, sample in enumerate(entry.sample_inputs(device, dtype, requires_grad=True)):
        name = f"sample {i}, {sample.summary()}"
        sample = sample.noncontiguous() if noncontiguous else sample
        yield name, Sample((sample.input, *sample.args), sample.kwargs)


def excluded(entry):
    """The checks that torch's own suite leaves out for this entry, each with its reason."""
    if not entry.supports_forward_ad:
        yield ("forward AD", "vmap forward"), "torch's chunked path computes its gradients in the forward pass: no jvp"
    if not entry.supports_fwgrad_bwgrad:
        yield ("fwd over rev",), "for the same reason torch's chunked path has no forward over reverse mode"
    if not entry.check_batched_grad:
        reason = "torch's chunked path without a reduction recomputes gradients in place, which vmap refuses"
        yield ("vmap",), reason
    if any(skip.test_name == "test_fn_gradgrad" for skip in entry.skips):
        yield ("gradgradcheck",), "torch expects its chunked path to fail: its gradient is not differentiable"
    if entry.error_inputs_func is None:
        yield ("errors",), "the entry has no error inputs (the module's entry has)"
    if entry.name == "nn.functional.linear_cross_entropy":
        yield (
            ("samples",),
            (
                "torch's samples have no empty targets, nor label smoothing (cross_entropy fails composite compliance "
                "there): tests/samples/ and the drawn cases have"
            ),
        )


@every_entry_and_dtype
@pytest.mark.parametrize("noncontiguous", [False, True], ids=["contiguous", "noncontiguous"])
def test_samples(entry, device, dtype, noncontiguous, tally):
    for checks, reason in excluded(entry):
        tally.note("OpInfo", label(entry, device), checks, reason)

    def check(sample):
        cotangent = noncontiguous_like if noncontiguous else lambda dout: dout
        outcomes = [run(function(entry), sample, cotangent=cotangent) for function in (ours, theirs)]
        assert_as_near(*outcomes, run(truth(entry), sample, F64))

    cases = samples(entry, device, dtype, noncontiguous)
    tally.try_all("OpInfo", label(entry, device), ["non-contiguous" if noncontiguous else "samples"], cases, check)


@every_entry
def test_gradcheck(entry, device, tally):
    def check(sample):
        assert gradcheck(
            of_inputs(ours(entry), sample),
            differentiated(sample),
            check_forward_ad=True,
            check_batched_grad=True,
            check_batched_forward_grad=True,
            check_grad_dtypes=True,
        )

    checks = ["gradcheck", "forward AD", "vmap", "vmap forward"]
    tally.try_all("OpInfo", label(entry, device), checks, samples(entry, device, F64), check)


@every_entry
def test_gradgradcheck(entry, device, tally):
    def check(sample):
        assert gradgradcheck(
            of_inputs(ours(entry), sample),
            differentiated(sample),
            check_fwd_over_rev=True,
            check_batched_grad=True,
            check_grad_dtypes=True,
            fast_mode=entry.name == "nn.functional.linear_cross_entropy",  # torch's default; else it takes minutes
        )

    tally.try_all("OpInfo", label(entry, device), ["gradgradcheck", "fwd over rev"], samples(entry, device, F64), check)


@pytest.mark.parametrize(
    ("entry", "device"), [p for p in ENTRIES if p.values[0] is None or p.values[0].error_inputs_func is not None]
)
def test_error_inputs(entry, device, tally):
    def check(error):
        sample = error.sample_input
        raised = []
        for function in (ours, theirs):
            with pytest.raises(error.error_type, match=error.error_regex) as caught:
                function(entry)(sample.input, *sample.args, **sample.kwargs)
            raised.append(caught.type)
        assert raised[0] is raised[1]

    cases = ((error.error_regex, error) for error in entry.error_inputs(device))
    tally.try_all("OpInfo", label(entry, device), ["errors"], cases, check)


@every_entry
def test_complex(entry, device, tally):
    def check(sample):
        with pytest.raises(RuntimeError):
            ours(entry)(sample.args[0].detach().to(torch.complex64), *sample.args[1:], **sample.kwargs)

    tally.try_all("OpInfo", label(entry, device), ["complex"], samples(entry, device, F64), check)
