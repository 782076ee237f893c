"""The table, in the terminal and as Markdown, and the files: results.json, results.csv, results.md."""

import csv
import io
import itertools
import json
import os
import subprocess
from datetime import datetime, timezone
from pathlib import Path

import torch
from rich import box
from rich.console import Console
from rich.table import Table

from benchmarks import peers
from benchmarks.cases import FUSED, PASSES
from benchmarks.memory import processor

ROOT = Path(__file__).parent.parent


def machine(device):
    """What the times depend on, and can't be told from them."""
    return {
        "processor": processor(),
        "cores": os.cpu_count(),
        "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "load_average": round(os.getloadavg()[0], 2),  # before the run: whether the machine had something else to do
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "commit": _commit(),
        "peers": peers.versions() if device == "cuda" else "",
    }


def _commit():
    command = ["git", "describe", "--always", "--dirty", "--exclude=*"]
    try:
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):  # not a checkout
        return None


def description(machine):
    on = machine["processor"] if machine["device"] == "cpu" else f"{machine['device']}, {machine['processor']}"
    threads = f"{machine['threads']} threads on {machine['cores']} cores"
    return ", ".join(filter(None, (f"torch {machine['torch']}", machine["peers"], threads, on, machine["date"])))


def tables(rows, skipped, style=box.SIMPLE_HEAD):
    """A table for each op."""
    for op in dict.fromkeys(row["op"] for row in rows):
        table = Table(title=f"{op}: milliseconds, ratios, peak memory", title_justify="left", box=style)
        table.add_column("", no_wrap=True)
        for header in (*PASSES, "÷ eager", "÷ limit", "MiB"):
            table.add_column(header, justify="right", min_width=8)
        for name, of_case in itertools.groupby((row for row in rows if row["op"] == op), key=_name):
            first, *_ = of_case = list(of_case)
            if style != box.MARKDOWN:  # which would show a row of dashes
                table.add_section()
            limits = [_number(first[f"{of_pass}_limit_ms"]) for of_pass in PASSES]
            table.add_row(f"{_case(first)}: limit", *limits, "", "1.00", "", style="italic")
            for row in of_case:
                table.add_row(
                    row["implementation"],
                    *(_number(row[f"{of_pass}_ms"]) for of_pass in PASSES),
                    _number(row["both_to_eager"]),
                    _number(row["both_to_limit"]),
                    "" if row["peak_mib"] is None else f"{max(0, row['peak_mib']):.0f}",
                    style="bold" if row["implementation"] in (FUSED, "network") else None,
                )
            for of_skipped in skipped:
                if of_skipped.startswith(f"{name}, "):
                    table.add_row(of_skipped.removeprefix(f"{name}, "), "failed")
        yield table


def _name(row):
    """The case's, as in `skipped`, which has the reasons by the names of case and implementation."""
    return " ".join(filter(None, (row["op"], "x".join(map(str, row["shape"])), row["dtype"], row["variant"])))


def _case(row):
    dtype = "" if row["dtype"] == "float32" else row["dtype"]
    return " ".join(filter(None, ("x".join(map(str, row["shape"])), dtype, row["variant"])))


def _number(value):
    """Three figures; nothing for a pass that a case does not have."""
    if value is None:
        return ""
    return f"{value:.0f}" if value >= 100 else f"{value:#.3g}"


def write(output, machine, rows, skipped):
    output.mkdir(parents=True, exist_ok=True)
    results = {"machine": machine, "skipped": skipped, "rows": rows}
    (output / "results.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    with open(output / "results.csv", "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, [*rows[0], *machine])
        writer.writeheader()
        writer.writerows({**row, "shape": "x".join(map(str, row["shape"])), **machine} for row in rows)
    (output / "results.md").write_text(_markdown(machine, rows, skipped), encoding="utf-8")


def _markdown(machine, rows, skipped):
    console = Console(file=io.StringIO(), width=200)
    console.print(f"{description(machine)}, commit {machine['commit']}.", soft_wrap=True)
    for table in tables(rows, skipped, box.MARKDOWN):
        console.print(f"\n## {table.title}")
        table.title = None
        console.print(table)
    if skipped:
        console.print("\n## Failed\n")
    for name, reason in skipped.items():
        console.print(f"- {name}: {reason}", markup=False, soft_wrap=True)
    return "".join(f"{line.rstrip()}\n" for line in console.file.getvalue().splitlines())
