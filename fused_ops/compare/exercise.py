"""Backward passes of a student's own, as `exercises/backprop.py` asks for them, beside autograd's gradients."""

import inspect
import runpy

from fused_ops import steps

ONE_SHOTS = ("dlogits_one_shot", "dhprebn_one_shot")


class ExerciseError(ValueError):
    """The file cannot be read, or asks for what the network has not; the message says why in one line."""


def gradients(path, values):
    """The gradients that a file's functions make, each of autograd's gradient of the value that it is named for.

    So a mistake in one function spoils no other's gradient.

    Args:
        path: the Python file.
        values: what `fused_ops.steps.forward` has returned, with autograd's gradients in their `.grad`.

    Returns:
        The gradients of the 19 intermediates and 7 parameters by name, and those of the functions `ONE_SHOTS`. `...`
        stands for one that is not written yet, in whole or in part.

    Raises:
        ExerciseError: there is no such file, or an argument of a function is no value of the network.
    """
    try:
        functions = runpy.run_path(path)
    except OSError as error:
        raise ExerciseError(f"cannot read the file {path}: {error.strerror}") from error
    grads = {}
    for step in reversed(steps.STEPS):
        back = _called(functions.get(step.name), values, step.name)
        back = back if isinstance(back, tuple) else (back,)
        for name, grad in zip(step.inputs, back, strict=False):  # inputs at the end may have no gradient
            before = grads.get(name, 0)
            grads[name] = ... if before is ... or grad is ... else before + grad
    dlogits, dhprebn = ONE_SHOTS
    return grads, (_called(functions.get(dlogits), values), _called(functions.get(dhprebn), values, "hpreact"))


def _called(function, values, output=None):
    """What a function returns for the values that its arguments name, d`output` among them; `...` if there is none."""
    if function is None:
        return ...
    known = {**values, "d" + output: values[output].grad} if output else values
    names = inspect.signature(function).parameters
    if unknown := [name for name in names if name not in known]:
        raise ExerciseError(f"{function.__name__}: the network has no {unknown[0]!r}, or it is not for this function")
    return function(*(known[name] for name in names))
