"""Training the lecture's network: a step of each rung of the ladder, minibatch, gradients and update together.

The limit is that of the matrix products, 6·N·H·(F + V) FLOPs a step, at the rate measured beside it on one thread. All
rungs run on one: at these sizes a second one costs more than it does.
"""

from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch.utils.benchmark import timer

from benchmarks.measure import CaseRun, WrongResult, product
from fused_ops import ladder

EXAMPLES = 180_000  # to draw from, as the names have
STEPS = 100  # an iteration, as train.py takes them
SEED = 2147483647


def compiled(state):
    rung = ladder.RUNGS[BASELINE](state)
    rung.network.compile(dynamic=False)
    return rung


BASELINE = "autograd"  # with which the others are compared
IMPLEMENTATIONS = {BASELINE: ladder.RUNGS[BASELINE], "torch.compile": compiled, **ladder.RUNGS}


@dataclass(frozen=True)
class TrainingCase:
    batch_size: int
    block_size: int
    hidden: int
    vocab_size: int
    quick: bool = False
    op: str = "training"
    dtype_name: str = "float32"
    variant: str = "one thread"
    curve: bool = False
    product: tuple = (1024, 1024, 1024)

    @property
    def shape(self):
        return self.batch_size, self.block_size * ladder.EMBEDDING_SIZE, self.hidden, self.vocab_size

    @property
    def name(self):
        return f"{self.op} {'x'.join(map(str, self.shape))} {self.dtype_name} {self.variant}"

    @property
    def flops(self):
        N, F, H, V = self.shape
        return 2 * N * H * (F + V)

    @property
    def work(self):
        return {"both": 3}


class TrainingRun(CaseRun):
    """One step of training by each rung; the rungs have agreed on the first losses."""

    passes = ("both",)

    def __init__(self, case, device, seconds):
        self.case, self.device, self.seconds = case, device, seconds
        self.skipped, self.peaks, self.times, self.implementations = {}, {}, {}, {}
        torch.compiler.reset()
        generator = torch.Generator().manual_seed(SEED)
        sizes = case.vocab_size, case.block_size, case.hidden
        state = ladder.initial_state(ladder.initial_parameters(*sizes, generator, SEED))
        self.X = torch.randint(case.vocab_size, (EXAMPLES, case.block_size), generator=generator).to(device)
        self.Y = torch.randint(case.vocab_size, (EXAMPLES,), generator=generator).to(device)
        self.generator, expected = generator, None
        with one_thread():
            self.speed_probe = product(*case.product, torch.float32, device)
            for name, make in IMPLEMENTATIONS.items():
                try:
                    rung = make({key: values.clone().to(device) for key, values in state.items()})
                    losses = self._steps(rung, generator.clone_state())
                except Exception as error:  # as a compiler may be missing
                    if name != "torch.compile":
                        raise
                    self.skipped[name] = f"{type(error).__name__}: {str(error).strip().splitlines()[0]}"
                    continue
                expected = losses if expected is None else expected
                if not (losses - expected).abs().max() < 1e-3:
                    raise WrongResult(f"the losses of {name} are not those of autograd")
                self.implementations[name], self.peaks[name] = rung, None

    def _steps(self, rung, generator):
        return rung.train(self.X, self.Y, 0.1, self.case.batch_size, STEPS, generator)

    def block(self, name):
        with one_thread():
            super().block(name)

    def _iteration(self, name):
        rung = self.implementations[name]
        self._steps(rung, self.generator)  # as in CaseRun, the first is not counted
        for _ in self._iterations():
            start = timer()
            self._steps(rung, self.generator)
            yield ((timer() - start) / STEPS,)


@contextmanager
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
