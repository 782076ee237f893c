"""`make bench` runs, writes what it promises, and its ratios are those of its times. Not how fast anything is."""

import csv
import dataclasses
import io
import json
import re
import subprocess
import sys
import textwrap
import types
from pathlib import Path

import pytest
import torch
from rich.console import Console

from benchmarks import cases, measure, peers, plots, report, training
from benchmarks.__main__ import measure as measure_all
from benchmarks.measure import CaseRun
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


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_names_of_cases_are_unique(device):
    names = [case.name for case in cases.all_cases(device)]
    assert len(set(names)) == len(names)


def test_cuda_cases_have_the_sizes_that_are_worth_a_card():
    names = {case.name for case in cases.all_cases("cuda")}
    assert names >= {f"cross_entropy 8192x{2**k} bfloat16" for k in (15, 16, 17, 18)}
    shapes = "32x64x112x112", "128x256x56x56", "256x1024x14x14"
    variants = [f"{layout} {then}".strip() for layout in ("", "channels_last") for then in ("", "relu", "add relu")]
    for dtype in ("float32", "bfloat16"):
        assert names >= {f"batch_norm {shape} {dtype} {variant}".strip() for shape in shapes for variant in variants}
    assert "linear_cross_entropy 8192x4096x128256 bfloat16" in names


def shrunken_cuda_cases(monkeypatch):
    """The cases of CUDA at sizes for any machine, without peers, and without torch.compile, which takes long."""

    def smaller(make):
        def shrink(value):
            return min(value, 16 + value % 13) if isinstance(value, int) else value  # not all equal

        def make_smaller(*args, **options):
            args = [tuple(map(shrink, arg)) if isinstance(arg, tuple) else arg for arg in args]
            return make(*map(shrink, args), **options)

        return make_smaller

    for make in (cases.cross_entropy, cases.linear_cross_entropy, cases.batch_norm):
        monkeypatch.setattr(cases, make.__name__, smaller(make))
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    monkeypatch.setattr(peers, "PEERS", {})
    return list(cases.all_cases("cuda"))


def test_cuda_cases_agree_with_eager_when_small(monkeypatch):
    shrunken = shrunken_cuda_cases(monkeypatch)
    assert len(shrunken) > 40
    for case in shrunken:
        run = CaseRun(case, "cpu", seconds=0)  # raises where an implementation gives something else
        assert run.skipped.keys() <= {cases.CHUNKED}
        assert not any(reason.startswith("WrongResult") for reason in run.skipped.values())
        for name in (None, *run.implementations):
            run.block(name)
        assert {row["implementation"] for row in run.rows()} == run.implementations.keys()


def test_only_an_implementation_that_overwrites_its_inputs_has_its_own(monkeypatch):
    case = next(case for case in shrunken_cuda_cases(monkeypatch) if case.op == "cross_entropy")
    run = CaseRun(case, "cpu", seconds=0)
    before = run.sets[0].args[0].clone()
    for name in run.implementations:
        run.block(name)
    assert torch.equal(run.sets[0].args[0], before)
    assert run.own_sets.keys() == {cases.IN_PLACE}
    assert not torch.equal(run.own_sets[cases.IN_PLACE][0].args[0], before)


def test_sets_of_inputs_fill_the_cache_of_a_card_twice(monkeypatch):
    card = types.SimpleNamespace(L2_cache_size=50 * 2**20)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: card)

    def sets(mib, device="cuda"):
        values = torch.empty(mib, 2**20, dtype=torch.uint8, device="meta")
        return measure.number_of_sets(cases.Tensors((values,)), device)

    assert [sets(mib) for mib in (1000, 101, 100, 49)] == [1, 1, 2, 3]
    assert sets(1) == measure.MOST_SETS
    assert sets(1, "cpu") == 1


def test_an_iteration_goes_through_all_sets(monkeypatch):
    monkeypatch.setattr(measure, "number_of_sets", lambda *_: 3)
    case = next(case for case in shrunken_cuda_cases(monkeypatch) if case.op == "cross_entropy")
    inputs = []

    def seen(input, target):
        inputs.append(input)
        return case.fused(input, target)

    run = CaseRun(dataclasses.replace(case, fused=seen), "cpu", seconds=0)
    inputs.clear()
    run.block(cases.FUSED)
    first, *timed = [[x is tensors.args[0] for tensors in run.sets].index(True) for x in inputs]
    assert (first, timed) == (0, [0, 1, 2, 0, 1, 2])  # not counted; forward, then both again
    monkeypatch.setattr(measure, "seconds", lambda start, end: 6.0)
    run.times.clear()
    run.block(cases.FUSED)
    run.block(None)
    assert run.times == {**{(cases.FUSED, of_pass): [2.0] for of_pass in PASSES}, "speed": [6.0]}


def test_memory_may_not_suffice_for_one_but_must_for_eager(monkeypatch):
    def out_of_memory(*_):
        raise torch.OutOfMemoryError("not enough")

    case = next(case for case in shrunken_cuda_cases(monkeypatch) if case.op == "cross_entropy")
    run = CaseRun(dataclasses.replace(case, fused=out_of_memory), "cpu", seconds=0)
    assert run.skipped[cases.FUSED] == "OutOfMemoryError: not enough"
    assert cases.FUSED not in run.implementations
    with pytest.raises(torch.OutOfMemoryError):
        CaseRun(dataclasses.replace(case, eager=out_of_memory), "cpu", seconds=0)


# As a machine may have them: peers that work (Liger's overwrites its input, apex's takes target 0 for padding unless it
# is told), one that is wrong, one that fails without a word, and one installed without its op.
FAKE_PEERS = {
    "liger_kernel.transformers.functional": """
        def liger_cross_entropy(input, target):
            loss = cross_entropy(input.clone(), target)
            input.data.zero_()
            return loss
        def liger_fused_linear_cross_entropy(input, weight, target):
            return cross_entropy(linear(input, weight), target)
        """,
    "apex.contrib.xentropy": """
        class SoftmaxCrossEntropyLoss:
            def apply(logits, labels, smoothing=0.0, padding_idx=0):
                return cross_entropy(logits, labels, reduction="none").masked_fill(labels == padding_idx, 0)
        """,
    "quack.cross_entropy": """
        def cross_entropy(x, target):
            return 2 * torch.nn.functional.cross_entropy(x, target)
        """,
    "flash_attn.losses.cross_entropy": """
        class CrossEntropyLoss:
            def __call__(self, input, target):
                assert input.is_cuda
        """,
    "cut_cross_entropy": "",
}


@pytest.fixture
def fake_peers(tmp_path, monkeypatch):
    for name, source in FAKE_PEERS.items():
        folder = tmp_path
        for part in name.split("."):
            folder /= part
            folder.mkdir(exist_ok=True)
            (folder / "__init__.py").touch()
        head = "import torch\nfrom torch.nn.functional import cross_entropy, linear\n"
        (folder / "__init__.py").write_text(head + textwrap.dedent(source), encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    yield
    packages = {name.partition(".")[0] for name in FAKE_PEERS}
    for name in [name for name in sys.modules if name.partition(".")[0] in packages]:
        del sys.modules[name]


@pytest.mark.usefixtures("fake_peers")
def test_peers_are_measured_and_one_that_fails_does_not_end_the_run(tmp_path):
    quick = [case for case in cases.all_cases("cuda") if case.quick and case.op in peers.PEERS]
    args = types.SimpleNamespace(device="cpu", quick=True, blocks=1)
    rows, skipped = measure_all(quick, args, Console(file=io.StringIO()))
    measured = {(row["op"], row["implementation"]) for row in rows}
    assert {(op, name) for op in peers.PEERS for name in ("eager", "Liger", cases.FUSED)} <= measured
    assert ("cross_entropy", "apex") in measured
    reasons = {
        "cross_entropy 32x27 float32, quack": "WrongResult: quack is off by",
        "cross_entropy 32x27 float32, flash-attention": "AssertionError$",
        "linear_cross_entropy 256x128x4096 float32, quack": "ModuleNotFoundError: No module named",
        "linear_cross_entropy 256x128x4096 float32, Cut Cross-Entropy": "ImportError: cannot import name",
    }
    assert skipped.keys() - {f"linear_cross_entropy 256x128x4096 float32, {cases.CHUNKED}"} == reasons.keys()
    for name, reason in reasons.items():
        assert re.match(reason, skipped[name])

    report.write(tmp_path / "out", report.machine("cpu"), rows, skipped)
    written = (tmp_path / "out" / "results.md").read_text(encoding="utf-8")
    assert len(re.findall(r"^\| (quack|flash-attention|Cut Cross-Entropy) +\| +failed \|", written, re.M)) == len(
        reasons
    )
    assert all(f"- {name}: {reason}" in written for name, reason in skipped.items())


@pytest.mark.usefixtures("fake_peers")
def test_only_a_peer_that_overwrites_its_inputs_has_its_own():
    case = next(case for case in cases.all_cases("cuda") if case.op == "cross_entropy")
    run = CaseRun(case, "cpu", seconds=0)
    assert run.own_sets.keys() == {"Liger", cases.IN_PLACE}
    assert run.sets[0].args[0].any()
    assert not run.own_sets["Liger"][0].args[0].any()


def test_peers_are_for_cuda_and_where_they_are_installed(fake_peers, monkeypatch):
    assert peers.versions() == "liger_kernel, quack, flash_attn, apex, cut_cross_entropy"  # the fakes have no metadata
    assert not any(case.others.keys() - {cases.CHUNKED, cases.IN_PLACE} for case in cases.all_cases("cpu"))
    monkeypatch.setattr(peers.util, "find_spec", lambda package: None)
    assert not any(case.others.keys() - {cases.CHUNKED, cases.IN_PLACE} for case in cases.all_cases("cuda"))
    assert peers.versions() == ""


def test_every_peer_is_drawn():
    assert plots.COLORS.keys() >= {name for op in peers.PEERS.values() for name in op}


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA")
def test_training_in_a_cuda_graph():
    run = training.TrainingRun(training.TrainingCase(32, 3, 200, 27), "cuda", seconds=0)  # compares the losses
    for name in (None, *run.implementations):
        run.block(name)
    assert {row["implementation"] for row in run.rows()} > {training.GRAPH, *ladder.RUNGS}
