"""Training the lecture's network: a step of each rung of the ladder, minibatch, gradients and update together.

The limit is that of the matrix products, 6·N·H·(F + V) FLOPs a step, at the rate measured beside it on one thread. All
rungs run on one: at these sizes a second one costs more than it does. (On CUDA the product has the whole card.)
"""

from contextlib import contextmanager
from dataclasses import dataclass

import torch

from benchmarks.measure import CaseRun, WrongResult, moment, product, reason
from fused_ops import ladder

EXAMPLES = 180_000  # to draw from, as the names have
STEPS = 100  # an iteration, as train.py takes them
SEED = 2147483647
GRAPH = "autograd, CUDA graph"


def compiled(state):
    rung = ladder.RUNGS[BASELINE](state)
    rung.network.compile(dynamic=False)
    return rung


class GraphRung(ladder.LayersRung):
    """What PyTorch's eager mode does in a step, recorded once as a CUDA graph: the host launches it as a whole."""

    def __init__(self, state):
        super().__init__(torch.nn, state)
        self.graph, self.steps_before = None, 3  # on a stream of their own, as PyTorch asks before a recording

    def step(self, Xb, Yb, lr):
        if self.steps_before:
            self.steps_before -= 1
            return self._step_aside(Xb, Yb, lr)
        if not self.graph:
            self._record(Xb, Yb, lr)
        self.Xb.copy_(Xb)
        self.Yb.copy_(Yb)
        self.graph.replay()
        return self.loss.clone()

    def _step_aside(self, *args):
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            loss = super().step(*args)
        torch.cuda.current_stream().wait_stream(stream)
        return loss

    def _record(self, Xb, Yb, lr):
        """With this learning rate for good; `loss` and the gradients are the graph's own memory."""
        self.Xb, self.Yb = Xb.clone(), Yb.clone()
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.loss = super().step(self.Xb, self.Yb, lr)


BASELINE = "autograd"  # with which the others are compared


def implementations(device):
    graph = {GRAPH: GraphRung} if device == "cuda" else {}
    return {BASELINE: ladder.RUNGS[BASELINE], "torch.compile": compiled, **graph, **ladder.RUNGS}


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
    number = STEPS

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
            self.speed_probes = [product(*case.product, torch.float32, device)]
            for name, make in implementations(device).items():
                try:
                    rung = make({key: values.clone().to(device) for key, values in state.items()})
                    losses = self._steps(rung, generator.clone_state())
                except Exception as error:  # as a compiler may be missing
                    if name != "torch.compile":
                        raise
                    self.skipped[name] = reason(error)
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
            start = moment(self.device)
            self._steps(rung, self.generator)
            yield ((start, moment(self.device)),)


@contextmanager
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
