"""Measure the fused ops beside PyTorch's, and both beside what the machine allows (docs/benchmarks.md)."""

import argparse
import re
import sys
import time
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from benchmarks import plots, report
from benchmarks.cases import all_cases
from benchmarks.measure import CaseRun, settle_allocator
from benchmarks.training import TrainingCase, TrainingRun

SECONDS_A_CASE = 10  # after which a case gets no further block, but it always gets
LEAST_BLOCKS = 3


def arguments():
    parser = argparse.ArgumentParser(prog="make bench", description=__doc__)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"], help="(default: %(default)s)")
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], help="measure only this one")
    parser.add_argument("--only", default="", metavar="PATTERN", help="cases whose name this regular expression finds")
    parser.add_argument("--quick", action="store_true", help="a small case or two of each op, to see that all is well")
    parser.add_argument("--blocks", type=int, help="median over so many; slow cases get fewer (default: 15, quick: 2)")
    parser.add_argument("--output", type=Path, default=Path("out/bench"), help="directory (default: %(default)s)")
    parser.add_argument("--threads", type=int, help="(default: PyTorch's own choice)")
    args = parser.parse_args()
    if args.blocks is not None and args.blocks < 1:
        parser.error("--blocks must be at least 1")
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("torch finds no CUDA device")
    args.blocks = args.blocks or (2 if args.quick else 15)
    return args


def chosen(args):
    for case in (*all_cases(args.device), TrainingCase(32, 3, 200, 27, quick=True)):
        if args.dtype in (None, case.dtype_name) and re.search(args.only, case.name) and (case.quick or not args.quick):
            yield case


def measure(cases, args, console):
    """The rows of all cases, and what was skipped and why."""
    rows, skipped = [], {}
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("", total=len(cases) * args.blocks)
        for i, case in enumerate(cases):
            progress.update(task, description=f"{case.name}: compiling, warming up")
            kind = TrainingRun if isinstance(case, TrainingCase) else CaseRun
            run = kind(case, args.device, seconds=0.03)
            for name, reason in run.skipped.items():
                progress.print(f"{case.name}: no {name}: {reason}", markup=False)
            end = time.perf_counter() + SECONDS_A_CASE
            for block in range(args.blocks):
                if block >= LEAST_BLOCKS and time.perf_counter() > end:
                    break
                for name in (None, *run.implementations):
                    progress.update(task, description=f"{case.name}: {name or 'the machine'}")
                    run.block(name)
                progress.advance(task)
            progress.update(task, completed=(i + 1) * args.blocks)
            rows += run.rows()
            skipped |= {f"{case.name}, {name}": reason for name, reason in run.skipped.items()}
    return rows, skipped


def main():
    args = arguments()
    if args.threads:
        torch.set_num_threads(args.threads)
    console = Console()
    console.width = max(console.width, 90)  # a narrower table cuts its numbers
    cases = list(chosen(args))
    if not cases:
        sys.exit("no case has such a name")
    machine = report.machine(args.device)
    console.print(report.description(machine), soft_wrap=True)
    settle_allocator()
    rows, skipped = measure(cases, args, console)
    for table in report.tables(rows, skipped):
        console.print(table)
    console.print("÷ eager, ÷ limit: of both passes together; what a limit is, docs/benchmarks.md says.")
    report.write(args.output, machine, rows, skipped)
    plots.write(args.output, rows)
    console.print(f"Wrote results.json, results.csv, results.md and the plots to {args.output}")


if __name__ == "__main__":
    main()
