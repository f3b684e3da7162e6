"""FLOPs of a step against counts by hand, on sizes small enough to count."""
import json

import pytest
import torch
from conftest import PAIRS, QUICK, SIZES, trained

import train_bptt
import train_dmt
import train_smt
from data import Data, Split
from experiments import flops, train_baseline
from experiments.flops import lineage, spent, step_flops
from lib.checkpoints import load
from model import ModelConfig, build

V, T, B, d, K = 7, 6, 3, 8, 2
RNN = dict(updater="mlp", d_model=d, n_heads=2, memory_tokens=K, updater_layers=1, decoder_layers=1)
ROWS = dict(batch_size=B, seq_len=T, p_start=1.0)
UPDATER = 2 * (K * d + d) * 4 * d + 2 * 4 * d * K * d       # FLOPs of a memory: its two matrices ..
GATE = 2 * d                                                # .. and of a memory token: the gate
HEAD = 2 * d * V


def text():
    """Rows that begin at the only document's start have a target at every token."""
    split = Split(torch.randint(V, (50,), dtype=torch.uint8), None, torch.tensor([0]))
    return Data({"name": "a", "kind": "text", "vocab_size": V, "first_token": 0}, split, split)


def block(n, outputs):
    """A layer on n tokens, of which so many outputs are used: qkv; scores and mixing; out, up, down."""
    return n * 2 * d * 3 * d + outputs * n * 2 * d * 2 + outputs * (2 * d * d + 2 * 2 * d * 4 * d)


MATRICES = 2 * 12 * d * d           # one token's way through a layer
READOUT = block(K, 1) + HEAD


@pytest.mark.parametrize("truncate", [0, 2, 100])
def test_bptt_is_t_updates_forward_and_twice_as_much_back(truncate):
    counted, longest = step_flops(train_bptt.Config(**RNN, **ROWS, truncate=truncate), text())
    assert counted == 3 * B * T * (UPDATER + K * GATE + READOUT)
    back = 2 if truncate == 2 else T
    assert longest == (T + 2 * back) * (UPDATER + GATE) + 3 * (MATRICES + HEAD)


@pytest.mark.parametrize("layers, context_len", [(1, T), (2, 3)])
def test_the_transformer_is_its_layers_and_its_head(layers, context_len):
    config = train_baseline.Config(**ROWS, d_model=d, n_heads=2, layers=layers, context_len=context_len)
    counted, longest = step_flops(config, text())
    assert counted == 3 * B * (layers * block(T, T) + T * HEAD)
    assert longest == 3 * (layers * MATRICES + HEAD)


def test_the_lstm_is_counted_and_only_its_state_is_sequential():
    H = 5
    inputs, state, head = 2 * d * 4 * H, 2 * H * 4 * H, 2 * H * V
    config = train_baseline.Config(**ROWS, model="lstm", d_model=d, hidden=H)
    counted, longest = step_flops(config, text())
    assert counted == B * (3 * T * (inputs + state + head) - state)     # the first state has no gradient
    assert longest == 3 * (inputs + T * state + head)


def smt(**flags):
    sizes = dict(encoder="window", encoder_layers=1, context_len=4, future_len=1, positions=2)
    return train_smt.Config(**RNN | sizes | ROWS | flags)


def test_smt_encodes_2s_contexts_and_does_everything_else_at_s_positions():
    S, n = 2, 4 + K
    encoder, decoder = 2 * S * block(n, K), S * READOUT         # future_len 1: of the memory alone
    uniformity = 2 * (B * S * K) ** 2 * d                       # of the whole batch
    counted, longest = step_flops(smt(), text())
    assert counted == 3 * (B * (encoder + decoder + S * (UPDATER + K * GATE + READOUT)) + uniformity)
    assert longest == 3 * (MATRICES + max(MATRICES + HEAD, UPDATER + GATE))


def test_smts_trunk_is_a_language_model():
    config = smt(encoder="causal", trunk_iters=1, context_len=T)
    counted, longest = step_flops(config, text(), trunk=True)
    assert counted == 3 * B * (block(T + 1, T + 1) + T * HEAD)          # PAD comes first
    assert longest == 3 * (MATRICES + HEAD)
    assert step_flops(config, text())[0] > counted


def checkpoint(stage, config, **more):
    return dict(stage=stage, config=vars(config), **more)


@pytest.mark.parametrize("horizon, stride", [(0, 1), (3, 1), (3, 2)])
def test_dmt_rolls_out_without_gradients_and_trains_on_labelled_steps(horizon, stride):
    sizes = {name: value for name, value in vars(smt()).items() if name in ModelConfig.__dataclass_fields__}
    config = train_dmt.Config(**ROWS, horizon=horizon, label_stride=stride)
    counted, longest = step_flops(checkpoint("dmt", config, model_config=sizes), text())
    h = horizon or T
    n, R = T // h, h // stride
    update = UPDATER + K * GATE
    assert counted == B * (n * (1 + R) * block(4 + K, K) + n * h * update + 3 * n * R * (update + READOUT))
    assert longest == h * (UPDATER + GATE) + MATRICES + 3 * max(UPDATER + GATE, MATRICES + HEAD)


def test_rows_beyond_those_that_are_counted_cost_as_much(monkeypatch):
    config = train_bptt.Config(**RNN, **ROWS | dict(batch_size=6))
    whole = step_flops(config, text())
    monkeypatch.setattr(flops, "ROWS", 2)
    assert step_flops(config, text()) == whole


def test_counting_changes_no_random_state():
    data, state = text(), torch.get_rng_state()
    step_flops(smt(), data)
    assert torch.equal(state, torch.get_rng_state())


def test_a_chain_has_each_matrix_once_and_no_table():
    networks = build(ModelConfig(d_model=d, n_heads=2, memory_tokens=K, conv_width=3, encoder_layers=2), V)
    assert flops.chain(networks["encoder"]) == 2 * MATRICES + 2 * 3 * d * d


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
    costs = {"smt": (10, 1), "dmt": (100, 2), "bptt": (1000, 3)}
    monkeypatch.setattr(flops, "step_flops",
                        lambda run, data, trunk=False: (7, 5) if trunk else costs[run["stage"]])
    assert spent(runs / "a") == [(0, 0, 0), (1, 7, 5), (2, 14, 10), (3, 24, 11), (4, 34, 12)]
    assert spent(runs / "b")[::4] == [(0, 34, 12), (4, 434, 20)]
    assert spent(runs / "c")[1:3] == [(1, 1434, 23), (2, 2434, 26)]
    assert spent(runs / "d")[::4] == [(0, 34, 12), (4, 74, 16)]         # its trunk is trained already
    assert [folder.name for folder, _ in lineage(runs / "c")] == ["a", "b", "c"]
    log = (runs / "a" / "metrics.jsonl").read_text().splitlines()
    assert [step for step, *_ in spent(runs / "a")] == sorted({json.loads(one)["step"] for one in log})


def test_a_checkpoint_costs_what_its_config_does(runs):
    data = train_smt.datasets.load("fables", load(runs / "a")["config"]["data_dir"])
    for name, Config in (("a", train_smt.Config), ("b", train_dmt.Config), ("c", train_bptt.Config)):
        saved = load(runs / name)
        assert step_flops(saved, data) == step_flops(Config(**saved["config"]), data) > (0, 0)
    total = 2 * step_flops(load(runs / "a"), data, trunk=True)[0] + 2 * step_flops(load(runs / "a"), data)[0]
    assert spent(runs / "a")[-1][1] == total
