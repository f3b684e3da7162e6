"""Sequential FLOPs of a step against counts by hand, on sizes small enough to count."""
import shutil

import pytest
import torch
from conftest import PAIRS, QUICK, SIZES, trained

import runtime
import train_bptt
import train_dmt
import train_smt
from experiments import flops, train_baseline
from experiments.flops import chain, lineage, spent, step_chain
from lib.checkpoints import load
from lib.cli import DataError
from model import ModelConfig, build

V, T, d, K = 7, 6, 8, 2
RNN = dict(updater="mlp", d_model=d, n_heads=2, memory_tokens=K, updater_layers=1, decoder_layers=1)
TEXT = {"name": "a", "kind": "text", "vocab_size": V}
UPDATER = 2 * (K * d + d) * 4 * d + 2 * 4 * d * K * d + 2 * d       # the two matrices of the MLP, the gate
HEAD, LAYER = 2 * d * V, 2 * 12 * d * d                             # a layer: qkv 3, out 1, up 4, down 4
READOUT = DECODER = LAYER + HEAD


def checkpoint(stage, config, networks):
    return dict(stage=stage, config=vars(config), data=TEXT, model=networks.state_dict())


def smt(encoder="window", **flags):
    config = train_smt.Config(**RNN, encoder=encoder, encoder_layers=1, context_len=4, future_len=3,
                              seq_len=T, **flags)
    return checkpoint("smt", config, build(config, V))


def test_a_chain_has_each_matrix_once_and_no_table():
    weights = build(ModelConfig(**RNN | dict(d_model=d), conv_width=3, encoder_layers=2), V).state_dict()
    assert chain(weights, "encoder.") == 2 * LAYER + 2 * 3 * d * d
    assert chain(weights, "decoder.", "readout.") == 3 * 2 * d * d + 2 * (LAYER + HEAD)
    gru = build(ModelConfig(**RNN | dict(updater="gru")), V).state_dict()
    assert chain(gru, "updater.") == 2 * 3 * K * d * (d + K * d)
    transformer = build(ModelConfig(**RNN | dict(updater="transformer", updater_layers=3)), V).state_dict()
    assert chain(transformer, "updater.") == 3 * LAYER


def test_smt_encodes_and_does_everything_else_side_by_side():
    assert step_chain(smt()) == 3 * (LAYER + max(DECODER, UPDATER, READOUT))
    causal = LAYER + 2 * (K - 1) * d + 2 * d * d                        # the gates of the slots, the present
    assert step_chain(smt("causal")) == 3 * (causal + max(DECODER, UPDATER, READOUT))


def test_smts_trunk_is_a_language_model():
    run = smt("causal", trunk_iters=1, conv_width=2)
    assert step_chain(run, trunk=True) == 3 * (2 * 2 * d * d + LAYER + HEAD)


@pytest.mark.parametrize("horizon, h", [(0, T), (3, 3), (100, T)])
def test_dmt_rolls_out_without_gradients_and_trains_at_once(horizon, h):
    run = smt() | {"stage": "dmt", "config": vars(train_dmt.Config(seq_len=T, horizon=horizon))}
    assert step_chain(run) == h * UPDATER + LAYER + 3 * max(UPDATER, READOUT)


@pytest.mark.parametrize("truncate, back", [(0, T), (2, 2), (100, T)])
def test_bptt_is_t_updates_forward_and_twice_as_much_back(truncate, back):
    config = train_bptt.Config(**RNN, seq_len=T, truncate=truncate)
    networks = build(config, V, ("updater", "readout"))
    networks.initial_memory = torch.nn.Parameter(torch.randn(K, d))
    assert step_chain(checkpoint("bptt", config, networks)) == (T + 2 * back) * UPDATER + 3 * READOUT


def test_rows_of_pictures_are_as_long_as_the_pictures():
    run = smt() | {"stage": "dmt", "config": vars(train_dmt.Config(seq_len=T))}
    run["data"] = TEXT | {"kind": "image", "longest_document": 9}
    assert step_chain(run) == 9 * UPDATER + LAYER + 3 * max(UPDATER, READOUT)


def test_the_transformer_is_its_layers_and_its_head():
    config = train_baseline.Config(seq_len=T, d_model=d, n_heads=2, layers=2)
    networks = train_baseline.build(config, V)
    assert step_chain(checkpoint("transformer", config, networks)) == 3 * (2 * LAYER + HEAD)


def test_only_the_state_of_the_lstm_is_sequential():
    H = 5
    inputs, state, head = 2 * d * 4 * H, 2 * H * 4 * H, 2 * H * V
    config = train_baseline.Config(seq_len=T, model="lstm", d_model=d, hidden=H)
    networks = train_baseline.build(config, V)
    assert step_chain(checkpoint("lstm", config, networks)) == 3 * (inputs + T * state + head)


def test_a_source_that_was_trained_anew_since_ends_the_lineage(runs, tmp_path):
    for name in "ab":
        shutil.copytree(runs / name, tmp_path / name)
    later = torch.load(tmp_path / "b" / "ckpt.pt", weights_only=True)
    later["config"]["init_from"] = str(tmp_path / "a")
    torch.save(later, tmp_path / "b" / "ckpt.pt")
    assert [folder.name for folder, _ in lineage(tmp_path / "b")] == ["a", "b"]
    first = load(tmp_path / "a")
    first["config"]["init_from"] = str(tmp_path / "b")                  # a is now a run that started from b
    torch.save(first, tmp_path / "a" / "ckpt.pt")
    with pytest.raises(DataError, match="trained anew"):
        lineage(tmp_path / "b")
    (tmp_path / "a" / "ckpt.pt").unlink()
    with pytest.raises(DataError, match="no checkpoint"):
        lineage(tmp_path / "b")


@pytest.fixture(scope="module")
def runs(data_dir, tmp_path_factory):
    """a: SMT, its first 2 of 4 steps of the trunk; b: DMT from a; c: BPTT from b; d: SMT from a."""
    root = tmp_path_factory.mktemp("runs")
    where = ["--dataset=fables", f"--data_dir={data_dir}"]
    causal = "--encoder=causal", "--trunk_iters=2"
    for name, source in ("a", ()), ("d", [f"--init_from={root / 'a'}"]):
        trained(train_smt, *QUICK, *SIZES, *PAIRS, *where, f"--out_dir={root / name}", *causal, *source)
    trained(train_dmt, *QUICK, *where, f"--out_dir={root / 'b'}", f"--init_from={root / 'a'}")
    sizes = [flag for flag in SIZES if flag.split("=")[0][2:] in train_bptt.Config.__dataclass_fields__]
    trained(train_bptt, *QUICK, *sizes, *where, f"--out_dir={root / 'c'}", "--seq_len=8",
            f"--init_from={root / 'b' / 'ckpt.pt'}")
    return root


def test_what_is_spent_begins_with_what_the_sources_cost(runs, monkeypatch):
    with monkeypatch.context() as patch:
        costs = {"smt": 1, "dmt": 2, "bptt": 3}
        patch.setattr(flops, "step_chain", lambda run, trunk=False: 5 if trunk else costs[run["stage"]])
        assert spent(runs / "a") == {0: 0, 1: 5, 2: 10, 3: 11, 4: 12}
        assert spent(runs / "b") == {0: 12, 1: 14, 2: 16, 3: 18, 4: 20}
        assert spent(runs / "c") == {0: 20, 1: 23, 2: 26, 3: 29, 4: 32}
        assert spent(runs / "d") == {0: 12, 1: 13, 2: 14, 3: 15, 4: 16}         # its trunk is trained already
    assert [folder.name for folder, _ in lineage(runs / "c")] == ["a", "b", "c"]
    log = runtime.read_log(runs / "a" / "metrics.jsonl")
    assert list(spent(runs / "a")) == sorted({line["step"] for line in log})
    first = load(runs / "a")
    assert spent(runs / "a")[4] == 2 * step_chain(first, trunk=True) + 2 * step_chain(first)
