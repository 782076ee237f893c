"""How it is measured: all implementations of a case in turn, in several blocks, with the machine's speed beside them.

An iteration is what a training loop does. It runs forward and then backward through the graph just built, timing each,
and both once more in one go; gradients are new tensors each time, as after `zero_grad(set_to_none=True)`. A graph is
never used twice: `torch.utils.benchmark.Timer`, which repeats one statement, could not time its backward pass. Hence
its `Measurement`s, but a loop of our own.

On CUDA the times are those between events on the card. Within a block nothing waits for it, so that its queue is full
wherever the host is the faster of the two; and an iteration goes through several sets of inputs, forward through all of
them and then backward, so that none is still in the card's cache from the iteration before.
"""

import ctypes
import functools
import gc
import itertools
import math
import time
from contextlib import contextmanager

import torch
from torch.utils.benchmark import Measurement
from torch.utils.benchmark.utils.common import TaskSpec

from benchmarks.cases import PASSES, Case, Tensors

KIB, MIB = 2**10, 2**20
MOST_SETS = 8  # of small inputs, which stay in the cache
LEAST_FOR_PEAK = 4 * MIB  # of input: below, the resident set tells more of the allocator than of the op
TOLERANCE = {torch.float32: 1e-3, torch.float16: 1e-2, torch.bfloat16: 5e-2}  # of the norm of what eager gives


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
        self.implementations = {}
        torch.compiler.reset()
        torch.manual_seed(0)
        original, expected = case.tensors(device), None
        self.sets = [original, *(original.copy() for _ in range(number_of_sets(original, device) - 1))]
        self.own_sets = {}  # of an implementation that overwrites its inputs
        self.speed_probes = self._speed_probes()
        for name, implementation in case.implementations().items():
            try:
                if implementation.overwrites:
                    self.own_sets[name] = [tensors.copy() for tensors in self.sets]
                tensors = self._sets_of(name)[0]
                with implementation.context():
                    results = _results(implementation, tensors)
                    expected = expected or results
                    _check(name, results, expected, case.tolerance or TOLERANCE[case.dtype])
                    del results
                    self.peaks[name] = peak(lambda: _results(implementation, tensors), tensors, device)  # noqa: B023
            except Exception as error:
                # The memory may not suffice for one that PyTorch's eager mode, the first, needs less than.
                if not implementation.optional and not (expected and isinstance(error, torch.OutOfMemoryError)):
                    raise
                self.skipped[name] = reason(error)
                self.own_sets.pop(name, None)
                continue
            self.implementations[name] = implementation

    def block(self, name):
        """Measure one implementation for one block; the name None is the machine's speed."""
        rows = list(self._probe() if name is None else self._iteration(name))
        keys = ["speed"] if name is None else [(name, of_pass) for of_pass in self.passes]
        number = 1 if name is None else self.number
        for key, spans in zip(keys, zip(*rows, strict=True), strict=True):
            times = [seconds(start, end) for start, end in spans]
            self.times.setdefault(key, []).append(_measurement(times, number).median)

    def _probe(self):
        for probe, _ in zip(itertools.cycle(self.speed_probes), self._iterations(), strict=False):
            start = moment(self.device)
            probe()
            yield ((start, moment(self.device)),)

    def _iteration(self, name):
        implementation, sets = self.implementations[name], self._sets_of(name)
        # The first iteration after another implementation finds caches and free pages as that one left them, which
        # took some backward passes five times as long: it is not counted.
        with implementation.context():
            _results(implementation, sets[0])
        for _ in self._iterations():
            with implementation.context():
                start = moment(self.device)
                outputs = [implementation.function(*tensors.args) for tensors in sets]
                middle = moment(self.device)
                for tensors in sets:
                    _gradients(outputs.pop(0), tensors)
                end = moment(self.device)
                for tensors in sets:
                    _gradients(implementation.function(*tensors.args), tensors)
                yield (start, middle), (middle, end), (end, moment(self.device))

    def _iterations(self):
        with _no_garbage_collection():
            end = time.perf_counter() + self.seconds
            yield
            while time.perf_counter() < end:
                yield

    def _sets_of(self, name):
        return self.own_sets.get(name, self.sets)

    @property
    def number(self):
        """How often an iteration does what it measures."""
        return len(self.sets)

    def _speed_probes(self):
        """Copies of each set's input, or the matrix product, into memory that is there already."""
        if self.case.flops:
            return [product(*self.case.product, self.case.dtype, self.device)]
        sources = [tensors.args[0].detach() for tensors in self.sets]
        copy = sources[0].clone()
        return [functools.partial(copy.copy_, source) for source in sources]

    def rows(self):
        """A dictionary for each implementation: the table's row."""
        probe = _measurement(self.times["speed"]).median  # seconds
        flops = self.case.flops
        # of one unit of work, over that of the probe; a copy moves 2 bytes a byte of input: it reads and it writes
        unit = flops / product_flops(self.case.product) if flops else 1 / 2
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
        """The medians over the blocks, of the ratios, too: the machine may be slow for the length of some blocks."""
        times, of_eager = (self.times[key, of_pass] for key in (name, next(iter(self.implementations))))
        limits = [unit * self.case.work[of_pass] * probe for probe in self.times["speed"]]
        measured, limit = _measurement(times), _measurement(limits)
        to_eager, to_limit = (
            _measurement(time / other for time, other in zip(times, others, strict=True)).median
            for others in (of_eager, limits)
        )
        values = measured.median * 1e3, measured.iqr * 1e3, limit.median * 1e3, to_eager, to_limit
        return dict(zip(columns(of_pass), values, strict=True))

    @property
    def nbytes(self):
        return self.sets[0].nbytes()


def reason(error):
    """In one line; a bare `assert`, as other libraries have them, says nothing but its type."""
    return ": ".join([type(error).__name__, *str(error).strip().splitlines()[:1]])


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


def number_of_sets(tensors: Tensors, device):
    """How many sets of inputs an iteration goes through: on CUDA, where they can, more than fill the L2 cache twice."""
    if device == "cpu":
        return 1
    cache = torch.cuda.get_device_properties(device).L2_cache_size
    return min(MOST_SETS, 2 * cache // sum(t.nbytes for t in tensors.args) + 1)


def moment(device):
    """Now, in the work of the device. On CUDA that is an event in its queue, which nobody waits for here."""
    if device == "cpu":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def seconds(start, end):
    """Between two moments, once the later one has come."""
    if isinstance(end, float):
        return end - start
    end.synchronize()
    return start.elapsed_time(end) / 1e3


def _measurement(times, number=1):
    return Measurement(number, list(times), TaskSpec("", "", num_threads=torch.get_num_threads()))


def settle_allocator():
    """Lead glibc to hand out memory as it does in a program that has run for a while; elsewhere, this does nothing.

    From the largest block up to 32 MiB that it has freed, glibc concludes which blocks to get from the system, and how
    much free memory to keep. Otherwise a case would fault its outputs in anew or not as those before it have it.
    """
    torch.empty(32 * MIB - 64 * KIB, dtype=torch.uint8)


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
    return int(kib) * KIB
