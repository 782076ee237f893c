"""Train a character-level model of names on one rung of the ladder, and sample names from it.

Writes to --out: loss.png (the loss curve), losses.csv (the loss of every minibatch) and checkpoint.pt, which --resume
continues exactly. Ctrl-C stops after the step at hand and leaves the same files.
"""

import argparse
import contextlib
import csv
import math
import os
import signal
import sys
from pathlib import Path

import matplotlib
import torch
from tqdm import tqdm

import fused_ops
from fused_ops import data, ladder

DEFAULTS = {
    "backward": "fused",
    "steps": 200_000,
    "hidden": 200,
    "batch_size": 32,
    "block_size": 3,
    "lr": 0.1,
    "seed": 2147483647,
    "data": str(data.DEFAULT_PATH),
    "out": "out",
}
FIXED = ("hidden", "batch_size", "block_size", "lr", "seed")  # what a checkpoint can only be continued with
LOG_EVERY = 100  # steps: how often the running loss is read and shown, and Ctrl-C looked for
SAMPLES = 20
LONGEST_SAMPLE = 100  # characters: a badly trained model may never end a name


class Refused(Exception):
    """The run cannot start or go on; the message says why in one line."""


# ------------------------------------------------------------------------------------------------------------- options


class Parser(argparse.ArgumentParser):
    def error(self, message):
        self.exit(2, f"{self.prog}: error: {message}\n")


def number(kind, least, name):
    """An argparse type: a number of this kind of at least `least` (for floats: above it) and below 2^32."""

    def parse(text):
        try:
            value = kind(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is not {name}") from None
        if not least <= value < 2**32 or (kind is float and value == least):
            raise argparse.ArgumentTypeError(f"{text} is not {name}")
        return value

    return parse


def parse_args(argv):
    parser = Parser(prog="train.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    positive = number(int, 1, "a positive integer")

    def option(name, help, **kwargs):
        default = DEFAULTS[name.replace("-", "_")]
        parser.add_argument(f"--{name}", help=f"{help} (default: {default})", **kwargs)

    option("backward", "who works out the gradients", choices=list(ladder.RUNGS))
    option("steps", "minibatches to train on; the learning rate drops to a tenth at half-way", type=positive)
    option("hidden", "hidden units", type=positive)
    at_least_2 = number(int, 2, "an integer of at least 2, as batch norm needs")
    option("batch-size", "examples a minibatch, at least 2", type=at_least_2)
    option("block-size", "characters of context", type=positive)
    option("lr", "learning rate of the first half", type=number(float, 0, "a positive number"))
    option("seed", "of the parameters and the minibatches", type=number(int, 0, "an integer of at least 0"))
    option("data", "names, one a line, as UTF-8 text")
    option("out", "folder for what the run writes")
    parser.add_argument("--device", default="cpu", help="where to train: cpu, cuda, cuda:1, ... (default: cpu)")
    parser.add_argument(
        "--resume",
        metavar="CHECKPOINT",
        help="continue this run, with its options; only --backward, --steps, --data, --out and --device may differ",
    )
    return parser, parser.parse_args(argv)


# ----------------------------------------------------------------------------------------------------------------- run


class Run:
    """A training run, new or resumed: everything that can be refused is refused here, before anything is written."""

    def __init__(self, args):
        checkpoint = load_checkpoint(args.resume) if args.resume else None
        self.options = resolve_options(args, checkpoint)
        self.out = Path(self.options["out"])
        self.device = find_device(args.device)
        existing = next(path for path in (self.out, *self.out.absolute().parents) if path.exists())
        if not existing.is_dir() or not os.access(existing, os.W_OK):
            raise Refused(f"cannot write to --out {self.out}")

        names = data.read_names(self.options["data"])
        self.characters = checkpoint["characters"] if checkpoint else data.vocabulary(names)
        self.splits = {
            split: [t.to(self.device) for t in data.contexts(part, self.characters, self.options["block_size"])]
            for split, part in zip(("train", "dev", "test"), data.split_names(names), strict=True)
        }
        self.generator = torch.Generator().manual_seed(self.options["seed"])
        if checkpoint:
            state = checkpoint["state"]
            self.generator.set_state(checkpoint["generator"])
            self.losses = checkpoint["losses"].tolist()
        else:
            sizes = len(self.characters), self.options["block_size"], self.options["hidden"]
            parameters = ladder.initial_parameters(*sizes, self.generator, self.options["seed"])
            state = ladder.initial_state(parameters)
            self.losses = []
        if len(self.losses) >= self.options["steps"]:
            raise Refused(f"the checkpoint has run all its {len(self.losses)} steps: ask for more with --steps")
        state = {name: values.to(self.device) for name, values in state.items()}
        self.rung = ladder.RUNGS[self.options["backward"]](state)

    def describe(self):
        rows = " / ".join(f"{len(Y):,}" for _, Y in self.splits.values())
        count = sum(self.rung.state[name].numel() for name in fused_ops.steps.PARAMETERS)
        kernels = "with kernels" if fused_ops.has_kernels(self.device.type) else "by the references: no kernels"
        return (
            f"data        {self.options['data']}: {rows} train / dev / test rows, {len(self.characters)} characters\n"
            f"parameters  {count:,}\n"
            f"backward    {self.options['backward']} on {self.device} (fused ops run {kernels})"
        )

    def train(self, interrupts):
        """Train until the last step, or until there are `interrupts`; says whether the run is complete."""
        total, (X, Y) = self.options["steps"], self.splits["train"]
        half = (total + 1) // 2
        with tqdm(total=total, initial=len(self.losses), unit="step") as bar:
            while len(self.losses) < total and not interrupts:
                done = len(self.losses)
                lr, end = (self.options["lr"], half) if done < half else (self.options["lr"] * 0.1, total)
                steps = min(LOG_EVERY - done % LOG_EVERY, end - done)
                losses = self.rung.train(X, Y, lr, self.options["batch_size"], steps, self.generator)
                bar.set_postfix_str(f"loss {self.read_losses(losses):.4f}", refresh=False)
                bar.update(steps)
        return len(self.losses) == total

    def read_losses(self, losses):
        losses = losses.tolist()
        mean = sum(losses) / len(losses)
        if not math.isfinite(mean) or not all(values.isfinite().all() for values in self.rung.state.values()):
            raise Refused(f"the loss is no longer finite after {len(self.losses)} steps: try a smaller --lr")
        self.losses += losses
        return mean

    @torch.no_grad()
    def evaluate(self, split):
        """The mean cross-entropy, in nats, over a whole split, with batch norm on its running statistics."""
        X, Y = self.splits[split]
        rows = zip(X.split(65536), Y.split(65536), strict=True)
        losses = [
            fused_ops.functional.cross_entropy(ladder.predict(self.rung.state, x), y, reduction="sum") for x, y in rows
        ]
        return (sum(losses) / len(Y)).item()

    @torch.no_grad()
    def sample(self):
        """Names, drawn a character at a time; the same ones for the same model."""
        g = torch.Generator().manual_seed(self.options["seed"] + 10)
        for _ in range(SAMPLES):
            context, name = [0] * self.options["block_size"], []
            while len(name) < LONGEST_SAMPLE:
                logits = ladder.predict(self.rung.state, torch.tensor([context], device=self.device))
                ix = torch.multinomial(torch.softmax(logits, 1).cpu(), 1, generator=g).item()
                if ix == 0:
                    break
                context = context[1:] + [ix]
                name.append(self.characters[ix])
            yield "".join(name)

    def save(self):
        """Write the checkpoint, the losses and their plot; each appears whole or not at all."""
        state = {name: values.cpu().contiguous() for name, values in self.rung.state.items()}
        checkpoint = {
            "options": {**self.options, "data": str(Path(self.options["data"]).resolve())},
            "characters": self.characters,
            "state": state,
            "generator": self.generator.get_state(),
            "losses": torch.tensor(self.losses, dtype=torch.float64),
        }
        try:
            self.out.mkdir(parents=True, exist_ok=True)
            write_whole(self.out / "losses.csv", lambda path: write_losses(path, self.losses))
            write_whole(self.out / "loss.png", lambda path: plot_losses(path, self.losses, self.options))
            write_whole(self.out / "checkpoint.pt", lambda path: torch.save(checkpoint, path))
        except OSError as error:
            raise Refused(f"cannot write to --out {self.out}: {error.strerror}") from error


def find_device(name):
    try:
        torch.zeros(1, device=name).cpu()
        return torch.device(name)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise Refused(f"--device {name} cannot be used: {str(error).splitlines()[0]}") from error


def load_checkpoint(path):
    keys = {"options", "characters", "state", "generator", "losses"}
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise Refused(f"cannot read the checkpoint {path}: {error.strerror}") from error
    except Exception as error:  # what torch.load raises on a file that isn't its own is not documented
        raise Refused(f"{path} is not a checkpoint of train.py") from error
    if not isinstance(checkpoint, dict) or checkpoint.keys() != keys:
        raise Refused(f"{path} is not a checkpoint of train.py")
    return checkpoint


def resolve_options(args, checkpoint):
    """What was asked for, else what the checkpoint was trained with, else the default."""
    asked = {name: getattr(args, name) for name in DEFAULTS if getattr(args, name) is not None}
    if not checkpoint:
        return {**DEFAULTS, **asked}
    trained = {**checkpoint["options"], "out": str(Path(args.resume).parent)}
    for name in FIXED:
        if asked.get(name, trained[name]) != trained[name]:
            option = "--" + name.replace("_", "-")
            raise Refused(f"{option} {asked[name]} does not fit the checkpoint, which has {trained[name]}")
    return {**trained, **asked}


# ------------------------------------------------------------------------------------------------------------- outputs


def write_whole(path, write):
    """Let `write` fill a file beside `path`, then move it there in one step."""
    temporary = path.with_name(f".{path.name}.tmp{path.suffix}")
    try:
        write(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_losses(path, losses):
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["step", "loss"])
        writer.writerows(enumerate(losses))


def plot_losses(path, losses, options):
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    window = max(1, len(losses) // 200)  # steps a point: enough of them to see through the noise of a minibatch
    means = torch.tensor(losses)[: len(losses) // window * window].view(-1, window).mean(1)
    figure, axes = plt.subplots(figsize=(8, 4.5), layout="constrained")
    axes.plot([window * (i + 0.5) for i in range(len(means))], means, linewidth=1.2)
    axes.set(xlabel="step", ylabel="cross-entropy (nats a character)", xlim=(0, options["steps"]))
    axes.set_title(f"training loss, mean of {window} minibatches, --backward {options['backward']}")
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=120)
    plt.close(figure)


@contextlib.contextmanager
def delayed_interrupts():
    """Ctrl-C adds to the list that this yields instead of raising: a step, or a file, is never left half done."""
    interrupts = []
    previous = signal.signal(signal.SIGINT, lambda *_: interrupts.append(True))
    try:
        yield interrupts
    finally:
        signal.signal(signal.SIGINT, previous)


def main(argv=None):
    parser, args = parse_args(argv)
    try:
        run = Run(args)
        print(run.describe(), flush=True)
        with delayed_interrupts() as interrupts:
            complete = run.train(interrupts)
            run.save()
        checkpoint = run.out / "checkpoint.pt"
        if not complete:
            print(f"interrupted after {len(run.losses)} steps; continue with: train.py --resume {checkpoint}")
            sys.exit(130)
        for split in run.splits:
            print(f"{split:5s} loss  {run.evaluate(split):.4f}")
        print(*run.sample(), sep="\n")
        print(f"wrote {run.out / 'loss.png'}, {run.out / 'losses.csv'} and {checkpoint}")
    except (Refused, data.DataError) as error:
        parser.error(str(error))
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
