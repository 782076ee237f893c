"""How it is measured: all implementations of a case in turn, in several blocks, with the machine's speed beside them.

An iteration is what a training loop does. It runs forward and then backward through the graph just built, timing each,
and both once more in one go; gradients are new tensors each time, as after `zero_grad(set_to_none=True)`. A graph is
never used twice: `torch.utils.benchmark.Timer`, which repeats one statement, could not time its backward pass. Hence
its clock, `timer()`, which waits for CUDA, and its `Measurement`s, but a loop of our own.
"""

import ctypes
import gc
import math
import time
from contextlib import contextmanager

import torch
from torch.utils.benchmark import Measurement, timer
from torch.utils.benchmark.utils.common import TaskSpec

from benchmarks.cases import PASSES, Case, Tensors

MIB = 2**20
COPIES = {"cpu": 1, "cuda": 8}  # sets of inputs an iteration goes through: CUDA needs several in its queue to be busy
LEAST_FOR_PEAK = 4 * MIB  # of input: below, the resident set tells more of the allocator than of the op
TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 5e-2}  # of the norm of what eager gives


class WrongResult(Exception):
    """An implementation does not give what PyTorch's eager mode gives."""


class CaseRun:
    """One case on one device: its implementations, warmed up and compared, and the times of the blocks so far."""

    passes = PASSES

    def __init__(self, case: Case, device, seconds):
        self.case, self.device, self.seconds = case, device, seconds
        self.skipped = {}  # implementation -> why
        self.peaks = {}  # implementation -> bytes beyond the inputs, or None
        self.times = {}  # (implementation, pass) -> the median of each block, in seconds
        self.tensors = {}  # implementation -> its sets of inputs, its own since inplace_grad overwrites them
        self.implementations = {}
        torch.compiler.reset()
        torch.manual_seed(0)
        original, expected = case.tensors(device), None
        self.speed_probe = self._speed_probe(original)
        for name, implementation in case.implementations().items():
            copies = [_copy(original) for _ in range(COPIES[device])]
            try:
                with implementation.context():
                    results = _results(implementation, copies[0])
                    expected = expected or results
                    _check(name, results, expected, TOLERANCE[case.dtype])
                    del results
                    self.peaks[name] = peak(lambda: _results(implementation, copies[-1]), original, device)  # noqa: B023
            except WrongResult:
                raise
            except Exception as error:
                if not implementation.optional:
                    raise
                self.skipped[name] = f"{type(error).__name__}: {str(error).strip().splitlines()[0]}"
                continue
            self.implementations[name], self.tensors[name] = implementation, copies

    def block(self, name):
        """Measure one implementation for one block; the name None is the machine's speed."""
        if name is None:
            self._add("speed", [_timed(self.speed_probe) for _ in self._iterations()])
            return
        rows = list(self._iteration(name))
        for of_pass, times in zip(self.passes, zip(*rows, strict=True), strict=True):
            self._add((name, of_pass), times)

    def _iteration(self, name):
        implementation, copies = self.implementations[name], self.tensors[name]
        # The first iteration after another implementation finds caches and free pages as that one left them, which
        # took some backward passes five times as long: it is not counted.
        with implementation.context():
            _results(implementation, copies[0])
        for _ in self._iterations():
            with implementation.context():
                start = timer()
                outputs = [implementation.function(*tensors.args) for tensors in copies]
                middle = timer()
                for tensors in copies:
                    _gradients(outputs.pop(0), tensors)
                end = timer()
                for tensors in copies:
                    _gradients(implementation.function(*tensors.args), tensors)
                yield middle - start, end - middle, timer() - end

    def _iterations(self):
        with _no_garbage_collection():
            end = time.perf_counter() + self.seconds
            yield
            while time.perf_counter() < end:
                yield

    def _add(self, key, times):
        number = 1 if key == "speed" else COPIES[self.device]
        self.times.setdefault(key, []).append(_measurement(times, number).median)

    def _speed_probe(self, tensors):
        """A copy of this case's size, or its matrix product, into memory that is there already."""
        if self.case.flops:
            return product(*self.case.product, self.case.dtype, self.device)
        source, copy = tensors.args[0].detach(), tensors.args[0].detach().clone()
        return lambda: copy.copy_(source)

    def rows(self):
        """A dictionary for each implementation: the table's row."""
        probe = _measurement(self.times["speed"]).median  # seconds
        flops = self.case.flops
        # of one unit of work; a copy moves 2 bytes a byte of input: it reads and it writes
        unit = probe * flops / product_flops(self.case.product) if flops else probe / 2
        for name in self.implementations:
            row = {
                "op": self.case.op,
                "shape": list(self.case.shape),
                "dtype": self.case.dtype_name,
                "variant": self.case.variant,
                "implementation": name,
                "curve": self.case.curve,
                "blocks": len(self.times["speed"]),
                "copy_gb_per_s": None if flops else 2 * self.nbytes / probe / 1e9,
                "gemm_gflop_per_s": product_flops(self.case.product) / probe / 1e9 if flops else None,
            }
            for of_pass in PASSES:
                row |= self._columns(name, of_pass, unit) if of_pass in self.passes else dict.fromkeys(columns(of_pass))
            row["peak_mib"] = None if self.peaks[name] is None else self.peaks[name] / MIB
            yield row

    def _columns(self, name, of_pass, unit):
        measured, limit = _measurement(self.times[name, of_pass]), unit * self.case.work[of_pass]
        eager = _measurement(self.times[next(iter(self.implementations)), of_pass])
        values = measured.median * 1e3, measured.iqr * 1e3, limit * 1e3
        return dict(
            zip(columns(of_pass), (*values, measured.median / eager.median, measured.median / limit), strict=True)
        )

    @property
    def nbytes(self):
        return self.tensors["eager"][0].nbytes()


def columns(of_pass):
    """The names of a pass's columns: median, interquartile range and limit in milliseconds, and its ratios."""
    return [f"{of_pass}_{column}" for column in ("ms", "iqr_ms", "limit_ms", "to_eager", "to_limit")]


def product(rows, inner, columns, dtype, device):
    """A function that multiplies two matrices of this size."""
    a, b = (torch.randn(size, inner, dtype=dtype, device=device) for size in (rows, columns))
    out = torch.empty(rows, columns, dtype=dtype, device=device)
    return lambda: torch.mm(a, b.t(), out=out)


def product_flops(shape):
    return 2 * math.prod(shape)


def _copy(tensors: Tensors):
    args = (t.detach().clone().requires_grad_(t.requires_grad) for t in tensors.args)
    return Tensors(tuple(args), tensors.upstream)


def _gradients(output, tensors):
    return torch.autograd.grad(output, tensors.inputs(), tensors.upstream)


def _results(implementation, tensors):
    output = implementation.function(*tensors.args)
    return output.detach(), *_gradients(output, tensors)


def _check(name, results, expected, tolerance):
    """All implementations must do the same: a benchmark of a wrong result says nothing."""
    for result, of_eager in zip(results, expected, strict=True):
        error = torch.dist(result.float(), of_eager.float()) / of_eager.float().norm()
        if not error <= tolerance:  # also if it is NaN
            raise WrongResult(f"{name} is off by {error:.1e} of the norm of PyTorch's result")


def _timed(function):
    start = timer()
    function()
    return timer() - start


def _measurement(times, number=1):
    return Measurement(number, list(times), TaskSpec("", "", num_threads=torch.get_num_threads()))


@contextmanager
def _no_garbage_collection():
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def peak(function, tensors, device):
    """The most memory that `function` holds at a time beyond what was there before, in bytes; None if that is unknown.

    Its results count, too: with inplace_grad the gradient costs nothing. On CPU this is the resident set, whose record
    Linux lets a process reset: the measurement needs no process of its own, in which torch.compile would start anew.
    """
    if device == "cuda":
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        function()
        return torch.cuda.max_memory_allocated() - before
    if tensors.nbytes() < LEAST_FOR_PEAK:
        return None
    try:
        ctypes.CDLL(None).malloc_trim(0)  # glibc's: memory that is free but still resident would go unnoticed
        with open("/proc/self/clear_refs", "w") as file:
            file.write("5")
        before = _status("VmRSS")
        function()
        return _status("VmHWM") - before
    except (OSError, AttributeError):  # not Linux, or not glibc
        return None


def _status(name):
    with open("/proc/self/status") as file:
        (kib,) = (line.split()[1] for line in file if line.startswith(name))
    return int(kib) * 1024
