"""`make bench` runs, writes what it promises, and its ratios are those of its times. Not how fast anything is."""

import csv
import json
import subprocess
import sys
from pathlib import Path

import pytest

from fused_ops import ladder

ROOT = Path(__file__).parents[1]
PASSES = "forward", "backward", "both"
COLUMNS = {"op", "shape", "dtype", "variant", "implementation", "blocks", "copy_gb_per_s", "gemm_gflop_per_s"}
COLUMNS |= {f"{p}_{c}" for p in PASSES for c in ("ms", "iqr_ms", "limit_ms", "to_eager", "to_limit")} | {"peak_mib"}
OPS = ("cross_entropy", "batch_norm", "linear_cross_entropy", "mlp")
NAMES = {"eager", "torch.compile", "reference", "fused_ops"}


def bench(*options):
    command = [sys.executable, "-m", "benchmarks", *options]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def output(tmp_path_factory):
    output = tmp_path_factory.mktemp("bench")
    only = "cross_entropy (32x27|256x128x4096) |batch_norm 32x200 float32 add|mlp|training"
    run = bench("--quick", "--blocks", "1", "--threads", "1", "--only", only, "--output", str(output))
    assert run.returncode == 0, run.stderr
    return output


@pytest.fixture(scope="module")
def results(output):
    return json.loads((output / "results.json").read_text(encoding="utf-8"))


def test_rows_are_complete(results):
    assert {row["op"] for row in results["rows"]} == {*OPS, "training"}
    assert {row["implementation"] for row in results["rows"] if row["op"] == "training"} >= set(ladder.RUNGS)
    for op in OPS:
        measured = {row["implementation"] for row in results["rows"] if row["op"] == op}
        skipped = {name.rpartition(", ")[2] for name in results["skipped"]}
        assert measured | skipped >= NAMES
    for row in results["rows"]:
        assert row.keys() >= COLUMNS
    assert results["machine"].keys() >= {"processor", "cores", "torch", "threads", "date", "commit"}
    assert results["machine"]["threads"] == 1


@pytest.mark.parametrize("of_pass", PASSES)
def test_ratios_are_those_of_the_times(results, of_pass):
    eager = {row["op"]: row for row in results["rows"] if row["implementation"] in ("eager", "autograd")}
    for row in results["rows"]:
        time = row[f"{of_pass}_ms"]
        if row["op"] == "training" and of_pass != "both":
            assert time is None  # a step is one pass
            continue
        assert time > 0
        assert row[f"{of_pass}_to_limit"] == pytest.approx(time / row[f"{of_pass}_limit_ms"])
        assert row[f"{of_pass}_to_eager"] == pytest.approx(time / eager[row["op"]][f"{of_pass}_ms"])


def test_limits_are_bytes_over_bandwidth_and_flops_over_rate(results):
    rows = {row["op"]: row for row in results["rows"] if row["implementation"] == "eager"}
    row = rows["cross_entropy"]  # both passes: the logits read once, and their gradient written
    assert row["both_limit_ms"] == pytest.approx(2 * 32 * 27 * 4 / row["copy_gb_per_s"] / 1e6)
    row = rows["batch_norm"]  # with add and relu: backward reads x and dy and writes the gradients of x and residual
    assert row["backward_limit_ms"] == pytest.approx(4 * 32 * 200 * 4 / row["copy_gb_per_s"] / 1e6)
    row = rows["linear_cross_entropy"]
    assert row["both_limit_ms"] == pytest.approx(3 * 2 * 256 * 128 * 4096 / row["gemm_gflop_per_s"] / 1e6)
    rows["training"] = next(row for row in results["rows"] if row["op"] == "training")
    for row in (rows["mlp"], rows["training"]):
        flops = 3 * 2 * 32 * 200 * (30 + 27)
        assert row["both_limit_ms"] == pytest.approx(flops / row["gemm_gflop_per_s"] / 1e6)


def test_files(output, results):
    with open(output / "results.csv", newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [row["implementation"] for row in rows] == [row["implementation"] for row in results["rows"]]
    assert (output / "results.md").read_text(encoding="utf-8").count("| fused_ops ") == len(OPS)
    plots = {path.name for path in output.glob("*.png")}
    assert plots == {f"{op}_bars.png" for op in (*OPS, "training")}


def test_a_pattern_that_finds_nothing_is_an_error():
    run = bench("--only", "no such case")
    assert run.returncode != 0
    assert "no case" in run.stderr
