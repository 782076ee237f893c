"""train.py as its users run it."""

import csv
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from fused_ops import data, ladder

ROOT = Path(__file__).parents[1]
QUICK = ["--hidden", "16", "--steps", "240"]


@pytest.fixture(scope="module", autouse=True)
def one_thread_a_run():
    """Tests run side by side: threads of products as small as these would wait for each other's processors."""
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("OMP_NUM_THREADS", "1")
        yield


def train(*args, **kwargs):
    command = [sys.executable, str(ROOT / "train.py"), *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True, check=False, **kwargs)


def losses(out):
    with open(out / "losses.csv", encoding="utf-8") as file:
        return [float(row["loss"]) for row in csv.DictReader(file)]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run that nothing interrupted: its result and its folder."""
    out = tmp_path_factory.mktemp("finished")
    return train(*QUICK, "--out", out), out


def test_shipped_names():
    names = data.read_names(data.DEFAULT_PATH)
    assert len(names) == 32469
    assert names[:5] == ["emma", "olivia", "ava", "isabella", "sophia"]
    assert data.vocabulary(names) == ".abcdefghijklmnopqrstuvwxyz"


def test_contexts_slide_over_a_name():
    X, Y = data.contexts(["ab"], ".ab", block_size=3)
    assert X.tolist() == [[0, 0, 0], [0, 0, 1], [0, 1, 2]]
    assert Y.tolist() == [1, 2, 0]


def test_a_run_reports_and_writes_what_it_says(finished):
    result, out = finished
    assert result.returncode == 0, result.stderr
    lines = result.stdout.splitlines()
    train_loss, dev_loss, test_loss = (
        float(next(line for line in lines if line.startswith(split)).split()[-1])
        for split in ("train loss", "dev   loss", "test  loss")
    )
    assert all(2 < loss < 3 for loss in (train_loss, dev_loss, test_loss))
    names = lines[lines.index(next(line for line in lines if line.startswith("test  loss"))) + 1 : -1]
    assert len(names) == 20
    assert (out / "loss.png").read_bytes()[:4] == b"\x89PNG"
    assert sorted(path.name for path in out.iterdir()) == ["checkpoint.pt", "loss.png", "losses.csv"]
    assert len(losses(out)) == 240
    assert sum(losses(out)[-40:]) < 0.9 * sum(losses(out)[:40])
    assert "loss" in result.stderr  # the progress bar


def test_every_rung_has_the_same_losses():
    """Same seed, same 1,000 minibatches, whoever works out the gradients."""
    names = data.read_names(data.DEFAULT_PATH)
    characters = data.vocabulary(names)
    X, Y = data.contexts(data.split_names(names)[0], characters, block_size=3)

    def run(rung):
        g = torch.Generator().manual_seed(1)
        parameters = ladder.initial_parameters(len(characters), 3, 200, g, 1)
        rung = ladder.RUNGS[rung](ladder.initial_state(parameters))
        return rung.train(X, Y, 0.1, 32, 1000, g), rung.state

    (autograd, state), *others = (run(rung) for rung in ladder.RUNGS)
    assert autograd[-100:].mean() < 2.6 < autograd[:10].mean()
    for history, other_state in others:
        assert (history - autograd).abs().max() < 1e-4
        for name, values in state.items():
            torch.testing.assert_close(other_state[name], values, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("backward", list(ladder.RUNGS))
def test_resume_continues_exactly_after_ctrl_c(backward, tmp_path):
    steps = 40_000 if backward == "network" else 3000  # enough not to be done before the signal comes
    options = ["--hidden", "200", "--steps", str(steps), "--backward", backward]
    command = [sys.executable, str(ROOT / "train.py"), *options, "--out", str(tmp_path / "cut")]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    process.stdout.readline()  # it says what it trains on just before it begins
    time.sleep(0.3)
    process.send_signal(signal.SIGINT)
    stdout, stderr = process.communicate(timeout=60)
    assert process.returncode == 130, stderr
    assert "Traceback" not in stderr
    cut = losses(tmp_path / "cut")
    assert 0 < len(cut) < steps

    resumed = train("--resume", tmp_path / "cut" / "checkpoint.pt")
    assert resumed.returncode == 0, resumed.stderr
    whole = train(*options, "--out", tmp_path / "whole")
    assert losses(tmp_path / "cut") == losses(tmp_path / "whole")
    assert cut == losses(tmp_path / "whole")[: len(cut)]
    end = "wrote"  # then come the paths, which differ
    assert resumed.stdout.split(end)[0].split("train loss")[1] == whole.stdout.split(end)[0].split("train loss")[1]


def test_resume_takes_another_rung(finished, tmp_path):
    _, out = finished
    result = train("--resume", out / "checkpoint.pt", "--backward", "steps", "--steps", "260", "--out", tmp_path)
    assert result.returncode == 0, result.stderr
    assert losses(tmp_path)[:240] == losses(out)
    assert len(losses(tmp_path)) == 260


def file_of(tmp_path, text):
    path = tmp_path / "names.txt"
    path.write_bytes(text)
    return path


BAD = {
    "missing data": lambda tmp, ck: ["--data", tmp / "nothing"],
    "a folder as data": lambda tmp, ck: ["--data", tmp],
    "empty data": lambda tmp, ck: ["--data", file_of(tmp, b"")],
    "blank data": lambda tmp, ck: ["--data", file_of(tmp, b"\n \n\n")],
    "three names": lambda tmp, ck: ["--data", file_of(tmp, b"a\nb\nc\n")],
    "not text": lambda tmp, ck: ["--data", file_of(tmp, b"\xff\xfe\x00\n" * 30)],
    "a name with a dot": lambda tmp, ck: ["--data", file_of(tmp, b"anna\n" * 30 + b"j.r.\n")],
    "unknown characters": lambda tmp, ck: [
        "--resume",
        ck,
        "--steps",
        300,
        "--data",
        file_of(tmp, b"zo\xc3\xab\n" * 30),
    ],
    "batch of one": lambda tmp, ck: ["--batch-size", 1],
    "no steps": lambda tmp, ck: ["--steps", 0],
    "steps in words": lambda tmp, ck: ["--steps", "many"],
    "negative learning rate": lambda tmp, ck: ["--lr", -0.1],
    "learning rate nan": lambda tmp, ck: ["--lr", "nan"],
    "divergence": lambda tmp, ck: ["--lr", 1e30, "--steps", 100],
    "unknown option": lambda tmp, ck: ["--hiden", 64],
    "unknown rung": lambda tmp, ck: ["--backward", "magic"],
    "unknown device": lambda tmp, ck: ["--device", "abacus"],
    "a device without data": lambda tmp, ck: ["--device", "meta"],
    "missing checkpoint": lambda tmp, ck: ["--resume", tmp / "nothing.pt"],
    "not a checkpoint": lambda tmp, ck: ["--resume", ROOT / "train.py"],
    "another torch.save": lambda tmp, ck: ["--resume", torch.save([1], tmp / "a.pt") or tmp / "a.pt"],
    "other size than the checkpoint": lambda tmp, ck: ["--resume", ck, "--steps", 300, "--hidden", 64],
    "a checkpoint that is done": lambda tmp, ck: ["--resume", ck],
    "a file as out": lambda tmp, ck: ["--out", file_of(tmp, b"")],
    "a folder inside a file": lambda tmp, ck: ["--out", file_of(tmp, b"") / "out"],
}


@pytest.mark.parametrize("make", BAD.values(), ids=BAD)
def test_bad_input_ends_in_one_line_and_status_2(make, finished, tmp_path):
    out = tmp_path / "out"
    result = train("--out", out, *make(tmp_path, finished[1] / "checkpoint.pt"))
    assert result.returncode == 2, result.stderr
    assert "Traceback" not in result.stderr
    errors = result.stderr.splitlines()
    assert errors[-1].startswith("train.py: error: ")
    assert len(errors) == 1 or "step/s" in result.stderr  # only divergence comes after a progress bar
    assert not out.exists()


def test_nothing_half_done_is_left_where_writing_fails(tmp_path):
    """The checkpoint's place is taken by a folder: what was there before stays, and no temporary file does."""
    (tmp_path / "checkpoint.pt").mkdir()
    result = train(*QUICK, "--out", tmp_path)
    assert (result.returncode, result.stderr.splitlines()[-1][:16]) == (2, "train.py: error:")
    assert not [path for path in tmp_path.iterdir() if "tmp" in path.name]


def test_references_give_the_same_run(finished, tmp_path):
    """FUSED_OPS_BUILD=0 loads no kernels; the losses agree to rounding."""
    result = train(*QUICK, "--out", tmp_path, env={**os.environ, "FUSED_OPS_BUILD": "0"})
    assert result.returncode == 0, result.stderr
    assert "no kernels" in result.stdout
    assert losses(tmp_path) == pytest.approx(losses(finished[1]), abs=1e-4)
