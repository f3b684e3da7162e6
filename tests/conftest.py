"""What the tests share: scripts called in this process, three tiny data sets, a short SMT run on each."""
import contextlib
import gzip
import io
import os
import signal
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import runtime
import train_smt
from lib.cli import run_main
from sources.prepare import prepare

signal.signal(signal.SIGINT, signal.default_int_handler)    # a shell's background job ignores it
signal.signal(signal.SIGHUP, signal.SIG_DFL)                # nohup ignores it
os.environ.pop("TORCHELASTIC_RESTART_COUNT", None)

BPTT_SIZES = ["--updater=transformer", "--d_model=8", "--n_heads=2", "--memory_tokens=2",
              "--updater_layers=1", "--decoder_layers=1"]
SIZES = [*BPTT_SIZES, "--encoder=window", "--encoder_layers=1", "--conv_width=1", "--context_len=8",
         "--future_len=3"]
PAIRS = ["--seq_len=8", "--positions=2", "--trunk_iters=0"]
ROLL_OUTS = ["--label_stride=1"]
QUICK = ["--device=cpu", "--preset=tiny", "--batch_size=16", "--max_iters=4",
         "--eval_interval=100", "--eval_docs=4", "--lr=0.01", "--optimizer=adamw"]


def call(script, *arguments):
    """What `python <script>.py <arguments>` does, in this process: status, out, err."""
    out, err = io.TextIOWrapper(io.BytesIO()), io.TextIOWrapper(io.BytesIO())
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    status, argv, start, runs = 0, sys.argv, runtime.start, []
    sys.argv = [script.__file__, *map(str, arguments)]
    runtime.start = lambda *given: runs.append(start(*given)) or runs[-1]
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            run_main(script.main)
    except SystemExit as stop:
        status = stop.code or 0
    finally:
        sys.argv, runtime.start = argv, start
        for run in runs:
            if run.lock is not None:                        # of the run's folder, as if the process had ended
                os.close(run.lock)
                run.lock = None                             # a call within a call sees it, too
        for number, handler in handlers.items():
            signal.signal(number, handler)
    text = []
    for stream in (out, err):
        stream.flush()
        text.append(stream.buffer.getvalue().decode())
    return SimpleNamespace(status=status, out=text[0], err=text[1])


def trained(script, *arguments):
    """call(), which must succeed."""
    result = call(script, *arguments)
    assert result.status == 0 and not result.err, result.err
    return result


def refused(result, status, *names):
    """One line on stderr, no traceback; it names the file or flag. sample.py names its checkpoint before."""
    lines = [line for line in result.err.splitlines() if not line.endswith(" ago")]
    assert result.status == status and len(lines) == 1 and lines[0].startswith("error: "), result
    for name in names:
        assert str(name) in result.err, result.err


def randomise(module, seed=0, std=0.3):
    """Large random weights, in float64: what is the identity or nearly 0 at the start would hide a leak."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            noise = torch.randn(parameter.shape, generator=generator) * std
            parameter.copy_(parameter + noise if parameter.dim() == 1 else noise)
    return module.double()


@pytest.fixture(autouse=True)
def fixed_seed():
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def data_dir(tmp_path_factory):
    """Three tiny data sets, one of each kind: fables, retrieval and mnist."""
    folder = tmp_path_factory.mktemp("data")
    rng = np.random.default_rng(0)
    for split, n in (("train", 12), ("t10k", 5)):
        images = rng.integers(256, size=(n, 28, 28), dtype=np.uint8)
        content = np.array([0x803, *images.shape], ">u4").tobytes() + images.tobytes()
        (folder / f"{split}-images-idx3-ubyte.gz").write_bytes(gzip.compress(content))
    with contextlib.redirect_stdout(io.StringIO()):
        prepare("mnist", folder, folder)
        prepare("fables", folder, train_tokens=6000, val_tokens=2000)
        prepare("retrieval", folder, train_tokens=4000, val_tokens=400, length="8", symbols=4)
    return folder


@pytest.fixture(scope="session")
def smt_run(data_dir, tmp_path_factory):
    """smt_run(dataset): the folder of a short SMT run on it, made once."""
    runs = {}

    def folder(dataset):
        if dataset not in runs:
            runs[dataset] = tmp_path_factory.mktemp("runs") / f"{dataset}-smt"
            trained(train_smt, *QUICK, *SIZES, *PAIRS, f"--dataset={dataset}", f"--data_dir={data_dir}",
                    f"--out_dir={runs[dataset]}")
        return runs[dataset]
    return folder
