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
from torch.utils._python_dispatch import TorchDispatchMode

LIB = torch.library.Library("fused_ops", "DEF")
REFERENCES = {}  # op -> the undecorated reference that defines it


def define(reference, mutates_args=()):
    """Declare `reference` as the op `torch.ops.fused_ops.<its name>` and return that op.

    The reference must not look at the values in its tensors (no `.item()`, no branch on data): fake tensors have none.
    `mutates_args` names the arguments it writes to.
    """
    name = reference.__name__
    schema = torch.library.infer_schema(reference, mutates_args=mutates_args)
    LIB.define(name + schema, tags=torch.Tag.pt2_compliant_tag)
    LIB.impl(name, reference, "CompositeExplicitAutograd")
    op = getattr(torch.ops.fused_ops, name).default
    REFERENCES[op] = reference
    return op


def accumulate_dtype(dtype):
    """The dtype that sums over `dtype` are kept in: float32 for the 16-bit types, else `dtype` itself."""
    return torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype


def once_differentiable(backward):
    """Decorate an `autograd.Function`'s backward whose own derivative is not implemented: using that is an error.

    `torch.autograd.function.once_differentiable` does so only where an incoming gradient requires grad. Under
    `loss.backward(create_graph=True)` none does, and what comes back is silently detached; here it never is.
    """

    @functools.wraps(backward)
    def wrapper(ctx, *grads):
        with torch.no_grad():
            outputs = backward(ctx, *grads)
        if not torch.is_grad_enabled():
            return outputs
        message = f"{type(ctx).__name__}: double backward is not implemented"
        delayed_error = torch._C._functions.DelayedError(message.encode(), len(outputs))
        return delayed_error(*[None if out is None else out.detach().requires_grad_() for out in outputs])

    return staticmethod(wrapper)


class reference_mode(TorchDispatchMode):  # lower case: used as a context manager, like torch.inference_mode
    """Context manager: run every fused op's reference although compiled kernels are loaded.

    >>> with fused_ops.reference_mode():
    ...     loss = fused_ops.functional.cross_entropy(logits, target)
    """

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return REFERENCES.get(func, func)(*args, **(kwargs or {}))


def has_kernels(device_type):
    """Whether compiled kernels are loaded for `device_type` ("cpu" or "cuda"); if not, its ops run their references."""
    key = torch.device(device_type).type.upper()
    return any(torch._C._dispatch_has_kernel_for_dispatch_key(op.name(), key) for op in REFERENCES)


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
