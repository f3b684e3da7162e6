"""The held-out numbers against a reference written one document and one position at a time."""
import math
import shutil

import numpy as np
import pytest
import torch
from conftest import call, randomise, refused

import evaluate as evaluation
from evaluate import evaluate, measure, ratio, standard_error
from model import IGNORE, ModelConfig, build, empty_memory

V, PAD = 5, 5


def networks_for(encoder="window", names=("encoder", "decoder", "updater", "readout")):
    sizes = ModelConfig(encoder=encoder, d_model=8, n_heads=2, memory_tokens=2, encoder_layers=1,
                        updater_layers=1, context_len=4, future_len=3)
    return randomise(build(sizes, V, names))


def documents(ends=(9, 4, 6, 9, 7)):
    """Documents of different lengths, with targets at some places; none at place 2."""
    x, y = torch.randint(V, (len(ends), 9)), torch.randint(V, (len(ends), 9))
    y[torch.rand(y.shape) < 0.3] = IGNORE
    y[:, 2] = IGNORE
    for row, end in enumerate(ends):
        x[row, end:], y[row, end:] = PAD, IGNORE
    return x, y


def reference(networks, empty, x, y):
    losses, right, teacher, taught, memories = [], [], [], [], {}
    for row in range(len(x)):
        memory = empty[None]
        for t in range(x.shape[1]):
            memory = networks["updater"](memory, x[row, t:t + 1])
            memories[row, t] = memory[0]
            if y[row, t] != IGNORE:
                logits = networks["readout"](memory)[0].float()
                losses.append(-logits.log_softmax(0)[y[row, t]].item())
                right.append(float(logits.argmax() == y[row, t]))
    error = variance = 0
    for t in [t for t in range(x.shape[1]) if (y[:, t] != IGNORE).any()]:
        rows = [row for row in range(len(x)) if x[row, t] != PAD]
        labels = {row: networks["encoder"](x[row:row + 1], torch.tensor([t]))[0, 0] for row in rows}
        mean = sum(labels.values()) / len(rows)
        for row, label in labels.items():
            error += (memories[row, t] - label).square().sum().item()
            variance += (label - mean).square().sum().item()
            if y[row, t] != IGNORE:
                logits = networks["decoder"](label[None], x.new_empty(1, 0))[0, 0].float()
                teacher.append(-logits.log_softmax(0)[y[row, t]].item())
                taught.append(float(logits.argmax() == y[row, t]))
    means = {"rnn_loss": losses, "rnn_accuracy": right, "teacher_loss": teacher, "teacher_accuracy": taught}
    numbers = {f"val_{name}": sum(values) / len(values) for name, values in means.items()}
    return numbers | {"val_drift": error / variance} | reference_held(networks, x, y)


def reference_held(networks, x, y):
    """The decoder from the memory of n tokens earlier and the tokens since, for the same targets; trunk."""
    losses, distances = {}, [0, 2]
    for row in range(len(x)):
        for t in [t for t in range(1, x.shape[1]) if (y[:, t] != IGNORE).any()]:
            if y[row, t] == IGNORE:
                continue
            here = x[row:row + 1]
            for n in distances:
                memory = networks["encoder"](here, torch.tensor([t - n]))[:, 0]
                logits = networks["decoder"](memory, here[:, t - n + 1:t + 1])[0, -1].float()
                losses.setdefault(f"val_held_{n}", []).append(-logits.log_softmax(0)[y[row, t]].item())
            if hasattr(networks["encoder"], "trunk"):
                state = networks["encoder"].trunk(here[:, :t + 1])[1]
                logits = networks["decoder"].predict(state)[0, -1].float()
                losses.setdefault("val_held_full", []).append(-logits.log_softmax(0)[y[row, t]].item())
    return {name: sum(values) / len(values) for name, values in losses.items()}


@pytest.mark.parametrize("encoder", ["window", "causal"])
@pytest.mark.parametrize("rows", [2, 16])
def test_numbers_equal_a_reference_on_documents_of_different_lengths(encoder, rows, monkeypatch):
    monkeypatch.setattr(evaluation, "DISTANCES", (0, 2, 3))       # 3 is not below future_len
    networks, (x, y) = networks_for(encoder), documents()
    empty = empty_memory(networks["encoder"]).detach()
    numbers = evaluate(networks, empty, x, y, {}, rows=rows)
    expected = reference(networks, empty, x, y)
    assert numbers.keys() == expected.keys() and 0 < numbers["val_rnn_accuracy"] < 1
    for name, value in expected.items():
        assert numbers[name] == pytest.approx(value, rel=1e-5), name


def test_held_losses_say_where_a_memory_does_not_hold_what_comes_back():
    """The first token comes back at the end. One encoder writes it into the memory, the other forgets it at
    once; the decoder is the same: it knows the token if its memory or its own tokens do."""
    x = torch.randint(1, V, (64, 80))
    x[:, 1:] = 0
    y = torch.full_like(x, IGNORE)
    y[:, -10:] = x[:, :1]

    class Memory(torch.nn.Module):
        pad = PAD

        def __init__(self, holds):
            super().__init__()
            self.holds = holds

        def forward(self, x, t):
            known = x[:, :1] if self.holds else torch.where(t[None] == 0, x[:, :1], 0)
            return torch.nn.functional.one_hot(known.expand(-1, len(t)), 8).float()[:, :, None]

    class Reader(torch.nn.Module):
        future_len = 65

        def forward(self, memory, x):
            known = memory[:, 0, :V] + torch.nn.functional.one_hot(x, V).sum(1)
            return (100.0 * known[:, 1:] - 50)[:, None].expand(-1, x.shape[1] + 1, -1)

    class Still(torch.nn.Module):
        def forward(self, memory, x):
            return memory

    for holds in (True, False):
        networks = networks_for()
        networks["encoder"], networks["decoder"], networks["updater"] = Memory(holds), Reader(), Still()
        networks["readout"] = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(8, V))
        numbers = evaluate(networks, torch.zeros(1, 8), x, y - 1 * (y != IGNORE), {})
        for n in (0, 16, 64):
            expected = 0 if holds else math.log(V - 1)
            assert numbers[f"val_held_{n}"] == pytest.approx(expected, abs=1e-5), (holds, n)
        assert "val_held_full" not in numbers


@pytest.mark.parametrize("drift", [0, 1])
def test_drift_is_0_for_the_encoders_own_memories_and_1_for_their_mean(drift):
    networks, (x, y) = networks_for(), documents((9, 9, 9, 9))
    labels = networks["encoder"](x, torch.arange(9)).detach()
    memories, step = labels.mean(0, keepdim=True).expand_as(labels) if drift else labels, iter(range(9))

    class Given(torch.nn.Module):
        def forward(self, memory, token):
            return memories[:, next(step)]

    networks["updater"] = Given()
    assert evaluate(networks, labels[0, 0], x, y, {})["val_drift"] == pytest.approx(drift, abs=1e-9)


def test_no_network_gets_more_documents_at_once_than_asked_for():
    """CUDA's attention refuses large batches, and memory would grow with the number of documents."""
    networks, (x, y), sizes = networks_for(), documents((9,) * 7), {}
    for name, network in networks.items():
        network.register_forward_pre_hook(lambda _, given, name=name: sizes.setdefault(name, []).append(
            len(given[0])))
    evaluate(networks, empty_memory(networks["encoder"]).detach(), x, y, {}, rows=2)
    assert sizes.keys() == networks.keys()
    assert max(sizes["encoder"] + sizes["updater"]) == 2
    assert max(sizes["decoder"] + sizes["readout"]) <= 2 * x.shape[1]


def test_the_readout_reads_long_documents_in_parts(monkeypatch):
    """CUDA's attention refuses large batches."""
    networks, (x, y), sizes = networks_for(), documents((9,) * 7), []
    empty = empty_memory(networks["encoder"]).detach()
    expected = evaluate(networks, empty, x, y, {})
    monkeypatch.setattr(evaluation, "CHUNK_ROWS", 10)
    networks["readout"].register_forward_pre_hook(lambda _, given: sizes.append(len(given[0])))
    assert evaluate(networks, empty, x, y, {}) == pytest.approx(expected) and max(sizes) == 10


def test_positions_are_spread_over_those_with_targets():
    networks, (x, y) = networks_for(), documents((9, 9))
    places = (y != IGNORE).any(0).nonzero().flatten().tolist()
    seen = []
    networks["encoder"].register_forward_pre_hook(lambda _, arguments: seen.append(arguments[1].tolist()))
    empty = empty_memory(networks["encoder"]).detach()
    for most in (64, 3, 1):
        seen.clear()
        t = evaluation.targets_of(y, most).tolist()
        assert len(t) == len(set(t)) == min(most, len(places)) and set(t) <= set(places) and t[0] == places[0]
        assert most == 1 or t[-1] == places[-1]
    x, y = torch.randint(V, (2, 500)), torch.randint(V, (2, 500))
    seen.clear()
    evaluate(networks, empty, x, y, {})
    assert len(set(seen[0])) == 64 and seen[0] == sorted(seen[0]) and (seen[0][0], seen[0][-1]) == (0, 499)


def test_a_network_without_encoder_is_judged_by_its_own_losses_only():
    networks, (x, y) = networks_for(names=("updater", "readout")), documents()
    empty = torch.randn(2, 8, dtype=torch.float64)
    assert evaluate(networks, empty, x, y, {}).keys() == {"val_rnn_loss", "val_rnn_accuracy"}
    numbers = evaluate(networks, empty, x, y, {"statistics": {"entropy_per_character": 0.25}})
    assert numbers["val_gap_to_floor"] == numbers["val_rnn_loss"] - 0.25


def test_evaluating_touches_no_random_state_no_parameter_and_no_gradient():
    networks, (x, y) = networks_for(), documents()
    empty = empty_memory(networks["encoder"]).detach()
    before = {name: value.clone() for name, value in networks.state_dict().items()}
    state = torch.get_rng_state()
    first = evaluate(networks, empty, x, y, {})
    assert torch.equal(state, torch.get_rng_state()) and evaluate(networks, empty, x, y, {}) == first
    assert all(torch.equal(value, before[name]) for name, value in networks.state_dict().items())
    assert all(p.grad is None for p in networks.parameters()) and torch.is_grad_enabled()


def test_numbers_are_finite_without_targets_or_where_all_memories_are_the_same():
    networks, (x, y) = networks_for(), documents()
    empty = empty_memory(networks["encoder"]).detach()
    numbers = evaluate(networks, empty, x, torch.full_like(y, IGNORE), {})
    assert numbers == {"val_rnn_loss": 0.0, "val_rnn_accuracy": 0.0}
    numbers = evaluate(networks, empty, x[:1], y[:1], {})     # one document: no variance
    assert all(value == value for value in numbers.values())


def test_standard_error_is_that_of_the_documents_means_where_all_have_as_many_targets():
    amounts, weights = torch.rand(7, 5), torch.ones(7, 5, dtype=torch.bool)
    expected = amounts.mean(1).numpy().std(ddof=1) / math.sqrt(7)
    assert standard_error(amounts, weights) == pytest.approx(expected, rel=1e-5)
    assert standard_error(amounts[:1], weights[:1]) is None


def test_standard_error_is_how_much_the_ratio_varies_from_sample_to_sample():
    """Documents of 1 to 9 targets, long ones with larger losses: the spread over many samples of them."""
    rng = np.random.default_rng(0)

    def sample():
        weights = torch.arange(9) < torch.from_numpy(rng.integers(1, 10, size=(200, 1)))
        level = weights.sum(1, keepdim=True) / 9 + torch.from_numpy(rng.normal(size=(200, 1)))
        return (level + torch.from_numpy(rng.normal(size=(200, 9)))) * weights, weights

    ratios, errors = zip(*[(ratio(*pair), standard_error(*pair)) for pair in (sample() for _ in range(400))])
    assert np.mean(errors) == pytest.approx(np.std(ratios), rel=0.1)


def test_errors_come_with_the_numbers_that_they_belong_to():
    networks, (x, y) = networks_for(), documents()
    empty = empty_memory(networks["encoder"]).detach()
    plain, both = evaluate(networks, empty, x, y, {}), evaluate(networks, empty, x, y, {}, errors=True)
    places = (y != IGNORE).any(0).nonzero().flatten()
    measured = measure(networks, empty, x, y, places)
    assert {name: both[name] for name in plain} == plain and len(both) == 2 * len(plain)
    for name, pair in measured.items():
        assert both[f"val_{name}_error"] == standard_error(*pair) > 0


# ----------------------------------------------------------------------------------------------------------
# The script

def test_checkpoints_stand_side_by_side(data_dir, smt_run, tmp_path):
    shutil.copytree(smt_run("retrieval"), tmp_path / "other")
    result = call(evaluation, f"--ckpt={smt_run('retrieval')},{tmp_path / 'other'}", f"--data_dir={data_dir}",
                  "--eval_docs=10000", "--device=cpu")
    assert result.status == 0 and not result.err
    assert "50 held-out documents, 50 targets" in result.out        # 400 held-out tokens: no document twice
    rows = {line.split()[0]: line.split()[1:] for line in result.out.splitlines()[1:]}
    assert rows[smt_run("retrieval").name] == ["other"] and rows["steps"] == ["4", "4"]
    for name in ("rnn_loss", "rnn_accuracy", "teacher_loss", "teacher_accuracy", "drift"):
        first, second = rows[f"val_{name}"][:3], rows[f"val_{name}"][3:]
        assert first == second and first[1] == "+-" and float(first[2]) >= 0, name


def test_fables_are_compared_with_their_floor(data_dir, smt_run):
    flags = [f"--ckpt={smt_run('fables')}", f"--data_dir={data_dir}", "--eval_docs=4", "--device=cpu"]
    rows = {line[:24].strip(): line[24:].split() for line in call(evaluation, *flags).out.splitlines()}
    assert rows["val_gap_to_floor"][1:] == rows["val_rnn_loss"][1:] and rows["val_rnn_loss"][1] == "+-"


def test_checkpoints_of_two_data_sets_are_refused(data_dir, smt_run):
    both = f"--ckpt={smt_run('retrieval')},{smt_run('fables')}"
    refused(call(evaluation, both, f"--data_dir={data_dir}"), 2, "--ckpt")


def test_a_tilde_is_the_home_folder_in_each_of_several_checkpoints(data_dir, smt_run, monkeypatch):
    monkeypatch.setenv("HOME", str(smt_run("retrieval").parent))
    name = smt_run("retrieval").name
    result = call(evaluation, f"--ckpt=~/{name},~/{name}/ckpt.pt", f"--data_dir={data_dir}", "--eval_docs=4")
    assert result.status == 0, result.err
