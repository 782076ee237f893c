"""How an op comes to be: its pure-PyTorch reference *is* its definition.

`define` takes a reference, reads the op's schema off its annotations and registers it for every device. The one
function is then the definition a student reads, the fallback where no kernel is built, the fake kernel that
`torch.compile` traces with, and the oracle the kernels are tested against. Compiled kernels (`csrc/`) only override
it on their own device, so no Python code ever asks which device it is on.
"""

import functools
import importlib.machinery
import os
import warnings
from pathlib import Path

import torch
from torch import is_grad_enabled
from torch._C import _are_functorch_transforms_active as transforms_active
from torch._C._functorch import TransformType
from torch._functorch.utils import enable_single_level_autograd_function
from torch.autograd import forward_ad
from torch.autograd.function import _SingleLevelFunction
from torch.compiler import is_compiling
from torch.overrides import handle_torch_function, has_torch_function
from torch.utils._python_dispatch import TorchDispatchMode

LIB = torch.library.Library("fused_ops", "DEF")
REFERENCES = {}  # op -> the undecorated reference that defines it


def define(reference, mutates_args=(), implementation=None):
    """Declare `reference` as the op `torch.ops.fused_ops.<its name>` and return that op.

    The reference must not look at the values in its tensors (no `.item()`, no branch on data): fake tensors have none.
    `mutates_args` names the arguments it writes to. `implementation` is for an op that is made of other ops in a way
    that no student should have to read first: it runs on every device, and the reference only on fake tensors.
    """
    name = reference.__name__
    schema = torch.library.infer_schema(reference, mutates_args=mutates_args)
    LIB.define(name + schema, tags=torch.Tag.pt2_compliant_tag)
    LIB.impl(name, implementation or reference, "CompositeExplicitAutograd")
    if implementation:
        LIB.impl(name, reference, "Meta")
    op = getattr(torch.ops.fused_ops, name).default
    REFERENCES[op] = reference
    return op


def accumulate_dtype(dtype):
    """The dtype that sums over `dtype` are kept in: float32 for the 16-bit types, else `dtype` itself."""
    return torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype


def is_autocast_enabled(device):
    """Whether autocast is on for the type of `device`. Meta tensors have none, and asking for theirs is an error."""
    return device.type != "meta" and torch.is_autocast_enabled(device.type)


def directly(op):
    """A callable that is `op`, but calls its kernel at once where no argument has a `__torch_function__` to ask first.

    The search for it that PyTorch's own call makes takes as long as a small kernel.
    """
    handle = op._handle

    def call(*args):
        return op(*args) if has_torch_function(args) else torch._C._dispatch_call_boxed(handle, *args)

    return call


def below_autograd(op):
    """The `forward` of an op's `autograd.Function`: runs its kernel, where a plain call would come back to autograd.

    As `directly` does, but without a Python frame for it: every op goes through here once or twice.
    """
    handle = op._handle

    def forward(*args):
        with torch._C._AutoDispatchBelowAutograd():
            return op(*args) if has_torch_function(args) else torch._C._dispatch_call_boxed(handle, *args)

    return staticmethod(forward)


def overridable(function):
    """A public function whose tensors' `__torch_function__`, if one has it, is asked first, as for PyTorch's own."""

    @functools.wraps(function)
    def call(*args, **kwargs):
        if has_torch_function(args) or (kwargs and has_torch_function(tuple(kwargs.values()))):
            return handle_torch_function(call, (*args, *kwargs.values()), *args, **kwargs)
        return function(*args, **kwargs)

    return call


def save(ctx, *tensors):
    """Keep what `backward` and, where forward mode is on, `jvp` find in `ctx.saved_tensors`."""
    ctx.save_for_backward(*tensors)
    if forward_ad._current_level >= 0:
        ctx.save_for_forward(*tensors)


def differentiable(op, function, results=None):
    """A callable that is `op`, differentiated by an `autograd.Function` with `setup_context`, `backward` and `jvp`.

    It returns the first `results` of the op's outputs, a tuple: the others, if any, are for the backward pass. (The
    function's `vmap` returns them all: it calls the function's own `apply`.)
    It works in every mode: under `torch.func.vmap`, by the function's own `vmap` if it has one, else op by op; and
    under `torch.compile` and `torch.export`, which see one op (but the reference, if they trace a transform of
    `torch.func`). For these the function is the op's autograd kernel, too, so that a direct call of the op, as exported
    programs have it, is differentiable, too.
    Forward mode within forward mode raises a RuntimeError: there PyTorch takes what a jvp returns for a constant, and
    the second derivative would silently lack a part.
    """
    function.generate_vmap_rule = function.vmap is torch.autograd.Function.vmap
    LIB.impl(op.name().removeprefix("fused_ops::"), applied(function, within_transform=True), "Autograd")
    apply = applied(function, results)

    def call(*args):
        transformed = transforms_active()
        if is_compiling():
            # a transform's: plain ops, which the compiler can differentiate and batch as it traces
            outputs = (REFERENCES[op] if transformed else op)(*args)
        elif transformed or is_grad_enabled() or forward_ad._current_level >= 0:
            return apply(*args)
        else:  # nobody differentiates this call: it need not pay for a graph
            outputs = function.forward(*args)
        return outputs[:results]

    return call


def applied(function, results=None, within_transform=False):
    """A callable that is `function.apply`, but returns the first `results` of the outputs, a tuple.

    Outside of `torch.func`'s transforms it has the function in PyTorch's other style, where `forward` has a ctx of its
    own: what only `backward` takes is no output there, which autograd would wrap. `within_transform` it is an op's
    autograd kernel, which PyTorch calls with the tensors of one transform. Others that differentiate, around that one,
    would not see what the op returns: they are refused.
    """

    def forward(ctx, *args):
        outputs = function.forward(*args)
        function.setup_context(ctx, args, outputs)
        return outputs[:results]

    def jvp(ctx, *tangents):
        return function.jvp(ctx, *tangents)[:results]

    members = {
        "forward": staticmethod(forward),
        "setup_context": torch.autograd.Function.setup_context,
        "jvp": staticmethod(jvp),
    }
    apply_outside = applied_outside_transforms(type(function.__name__, (function,), members))
    if within_transform:
        own = {name: staticmethod(getattr(function, name)) for name in ("forward", "setup_context", "backward", "jvp")}
        single_level = type(function.__name__, (_SingleLevelFunction,), own)

    def apply(*args):
        if not transforms_active():
            return apply_outside(*args)
        transforms = [i.key() for i in torch._C._functorch.get_interpreter_stack()]
        if transforms.count(TransformType.Jvp) > 1:
            raise RuntimeError(
                f"{function.__name__}: forward mode within forward mode is not supported; "
                "use reverse mode for one of the two, as torch.func.hessian does"
            )
        if not within_transform:
            return function.apply(*args)[:results]
        if transforms.count(TransformType.Jvp) + transforms.count(TransformType.Grad) > 1:
            raise RuntimeError(
                f"{function.__name__}: an op called by itself, as in an exported program, can be differentiated by one "
                "transform of torch.func at a time; call it through fused_ops.functional"
            )
        with enable_single_level_autograd_function():
            return single_level.apply(*args)

    return apply


def applied_outside_transforms(function):
    """A callable that is `function.apply`, for a function whose `forward` has a ctx, without what `torch.func`'s
    transforms need: that takes longer than a small op."""
    return super(torch.autograd.Function, function).apply


def refuse_derivative(asked, op, argument):
    """For the derivative by an argument that an op takes for a constant: who asks for it all the same, of an exported
    program, say, is not to get the None that autograd takes for a 0."""
    if asked:
        raise RuntimeError(f"{op} is not differentiable with respect to {argument}")


def batch_first(t, dim, B):
    """vmap's batch, of size B, as the first dimension of a tensor that has it at `dim`, or (None) does not have it."""
    return t.expand(B, *t.shape) if dim is None else t.movedim(dim, 0)


def looped(apply, info, in_dims, args):
    """What a function's `vmap` returns where there is no batched form: the samples one by one."""

    def sample(i):
        return apply(*(a.select(dim, i) if isinstance(dim, int) else a for a, dim in zip(args, in_dims, strict=True)))

    outputs = zip(*map(sample, range(info.batch_size)), strict=True)
    outputs = tuple(torch.stack(of_samples) for of_samples in outputs)
    return outputs, (0,) * len(outputs)


class reference_mode(TorchDispatchMode):  # lower case: used as a context manager, like torch.inference_mode
    """Context manager: run every fused op's reference although compiled kernels are loaded.

    >>> with fused_ops.reference_mode():
    ...     loss = fused_ops.functional.cross_entropy(logits, target)
    """

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        outputs = REFERENCES.get(func, func)(*args, **(kwargs or {}))
        if func in REFERENCES:  # within a mode PyTorch does not tell autograd what has been moved in place
            moved = (a for p, a in zip(func._schema.arguments, args, strict=False) if p.is_write and a is not None)
            torch.autograd.graph.increment_version(moved)
        return outputs


def has_kernels(device_type):
    """Whether compiled kernels of some op are loaded for `device_type`, "cpu" or "cuda"; else references run there."""
    return any(has_kernel(op.name(), device_type) for op in REFERENCES)


def has_kernel(name, device_type):
    """Whether the op of this name, one of PyTorch's or ours, has a kernel made for `device_type`."""
    key = torch.device(device_type).type.upper()
    return torch._C._dispatch_has_kernel_for_dispatch_key(name, key)


def load_kernels():
    """Load `_C` and, where torch has CUDA, `_C_cuda`: each registers its kernels with the dispatcher as it loads.

    A library that is missing or does not load costs speed, not correctness, so it is a warning and not an error.
    FUSED_OPS_BUILD=0, which keeps the installation from building the libraries, keeps this from loading them, too.
    """
    if os.environ.get("FUSED_OPS_BUILD") == "0":
        return
    libraries = {path.name.partition(".")[0]: path for path in _compiled_libraries()}
    if "_C" not in libraries:
        warnings.warn(
            "fused_ops was installed without compiled kernels (no C++ compiler was found): its ops run their PyTorch "
            "references, which give the same results more slowly. FUSED_OPS_BUILD=0 silences this warning.",
            stacklevel=3,
        )
    for name, path in libraries.items():
        if name == "_C" or torch.version.cuda:
            try:
                torch.ops.load_library(path)
            except OSError as error:
                warnings.warn(f"fused_ops could not load its kernels from {path.name}: {error}", stacklevel=3)


def _compiled_libraries():
    for suffix in importlib.machinery.EXTENSION_SUFFIXES:
        yield from Path(__file__).parent.glob("_C*" + suffix)
