"""The held-out numbers against a reference written one document and one position at a time."""
import json
import math
import shutil

import numpy as np
import pytest
import torch
from conftest import call, randomise

import evaluate as evaluation
import fables
from data import IGNORE, Data, Split
from evaluate import evaluate, fact_losses, measure, ngram_losses, ratio, standard_error
from model import ModelConfig, build, empty_memory

V, PAD = 5, 5


def networks_for(encoder="window", names=("encoder", "decoder", "updater", "readout")):
    return randomise(build(ModelConfig(encoder=encoder, d_model=8, n_heads=2, memory_tokens=2, encoder_layers=1, updater_layers=1,
                                       context_len=4, future_len=3), V, names))


def documents(ends=(9, 4, 6, 9, 7)):
    """Documents of different lengths, with targets at some places; nobody asks anything at place 2."""
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
    return {"val_rnn_loss": sum(losses) / len(losses), "val_rnn_accuracy": sum(right) / len(right),
            "val_teacher_loss": sum(teacher) / len(teacher), "val_teacher_accuracy": sum(taught) / len(taught),
            "val_drift": error / variance} | reference_held(networks, x, y)


def reference_held(networks, x, y):
    """The decoder from the memory of n tokens earlier and the tokens since, at the same targets for each n; and the trunk."""
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
                logits = networks["decoder"].predict(networks["encoder"].trunk(here[:, :t + 1])[1])[0, -1].float()
                losses.setdefault("val_held_full", []).append(-logits.log_softmax(0)[y[row, t]].item())
    return {name: sum(values) / len(values) for name, values in losses.items()}


@pytest.mark.parametrize("encoder", ["window", "causal"])
@pytest.mark.parametrize("rows", [2, 16])
def test_numbers_equal_a_reference_on_documents_of_different_lengths(encoder, rows, monkeypatch):
    monkeypatch.setattr(evaluation, "DISTANCES", (0, 2, 3))                       # 3 is not below future_len
    networks, (x, y) = networks_for(encoder), documents()
    empty = empty_memory(networks["encoder"]).detach()
    numbers = evaluate(networks, empty, x, y, {}, rows=rows)
    expected = reference(networks, empty, x, y)
    assert numbers.keys() == expected.keys() and 0 < numbers["val_rnn_accuracy"] < 1
    for name, value in expected.items():
        assert numbers[name] == pytest.approx(value, rel=1e-5), name


def test_held_losses_say_where_a_memory_does_not_hold_what_comes_back():
    """The first token comes back at the end. One encoder writes it into the memory, the other forgets it at once; the decoder is the same:
    it knows the token if its memory or its own tokens do."""
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
            assert numbers[f"val_held_{n}"] < 1e-6 if holds else abs(numbers[f"val_held_{n}"] - math.log(V - 1)) < 1e-5, (holds, n)
        assert "val_held_full" not in numbers


def test_drift_is_0_for_the_encoders_own_memories_and_1_for_their_mean():
    networks, (x, y) = networks_for(), documents((9, 9, 9, 9))
    labels = networks["encoder"](x, torch.arange(9)).detach()
    for memories, drift in ((labels, 0), (labels.mean(0, keepdim=True).expand_as(labels), 1)):
        step = iter(range(9))

        class Told(torch.nn.Module):
            def forward(self, memory, token):
                return memories[:, next(step)]

        networks["updater"] = Told()
        assert evaluate(networks, labels[0, 0], x, y, {})["val_drift"] == pytest.approx(drift, abs=1e-9)


def test_positions_are_spread_over_those_with_targets():
    networks, (x, y) = networks_for(), documents((9, 9))
    asked = (y != IGNORE).any(0).nonzero().flatten().tolist()
    seen = []
    networks["encoder"].register_forward_pre_hook(lambda _, arguments: seen.append(arguments[1].tolist()))
    empty = empty_memory(networks["encoder"]).detach()
    for most in (64, 3, 1):
        seen.clear()
        evaluate(networks, empty, x, y, {}, most_positions=most)
        t = seen[0]
        assert len(t) == len(set(t)) == min(most, len(asked)) and set(t) <= set(asked) and t[0] == asked[0]
        assert most == 1 or t[-1] == asked[-1]
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


def test_numbers_are_finite_where_nothing_is_asked_or_all_memories_are_the_same():
    networks, (x, y) = networks_for(), documents()
    empty = empty_memory(networks["encoder"]).detach()
    numbers = evaluate(networks, empty, x, torch.full_like(y, IGNORE), {})
    assert numbers == {"val_rnn_loss": 0.0, "val_rnn_accuracy": 0.0}
    numbers = evaluate(networks, empty, x[:1], y[:1], {})                         # one document: no variance
    assert all(value == value for value in numbers.values())


def test_standard_error_is_that_of_the_documents_means_where_all_have_as_many_targets():
    amounts, weights = torch.rand(7, 5), torch.ones(7, 5, dtype=torch.bool)
    assert standard_error(amounts, weights) == pytest.approx(amounts.mean(1).numpy().std(ddof=1) / math.sqrt(7), rel=1e-5)
    assert standard_error(amounts[:1], weights[:1]) is None


def test_standard_error_is_how_much_the_ratio_varies_from_sample_to_sample():
    """Documents of 1 to 9 targets, long ones with larger losses: the spread of the ratio over many samples of 200 documents."""
    rng = np.random.default_rng(0)

    def sample():
        weights = torch.arange(9) < torch.from_numpy(rng.integers(1, 10, size=(200, 1)))
        level = weights.sum(1, keepdim=True) / 9 + torch.from_numpy(rng.normal(size=(200, 1)))      # shared by a document's targets
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


def test_ngram_losses_equal_plain_counting():
    torch.manual_seed(3)
    train = torch.randint(4, (60,), dtype=torch.uint8)                  # token 4 is never seen
    split = Split(train, None, torch.tensor([0]))
    x, y = documents()
    words = train.tolist()

    def probability(context, word):
        """Witten and Bell: the counts after this context, then those after the context without its first token."""
        lower = probability(context[1:], word) if context else 1 / V
        n = len(context)
        after = [words[i] for i in range(n, len(words)) if tuple(words[i - n:i]) == context]
        return (after.count(word) + len(set(after)) * lower) / (len(after) + len(set(after))) if after else lower

    expected = []
    for order in range(1, 5):
        losses = []
        for row, targets in zip(x.tolist(), y.tolist()):
            for place, target in enumerate(targets):
                if target != IGNORE:
                    context = tuple(([PAD] * order + row[:place + 1])[-(order - 1):]) if order > 1 else ()
                    losses.append(-math.log(probability(context, target)))
        expected.append(sum(losses) / len(losses))
    assert ngram_losses(Data({"vocab_size": V}, split, split), x, y, 4) == pytest.approx(expected, rel=1e-9)


def test_fact_losses_are_those_of_all_letters_read_from_a_memory_that_can_have_the_fact():
    networks, stories = randomise(build(ModelConfig(encoder="causal", d_model=8, n_heads=2, memory_tokens=2, encoder_layers=1, updater="mlp",
                                                    context_len=50, future_len=80), 128)), fables.draw(np.random.default_rng(0), 6)
    empty = empty_memory(networks["encoder"]).detach()
    rows = [[0, *story.encode()] for story in stories] + [[0, *stories[0].encode()][:90]]          # the last one is cut off
    x = torch.tensor([row + [128] * (255 - len(row)) for row in rows])
    found, expected = fact_losses(networks, empty, x), {}
    for row, story in zip(rows, stories):
        row = torch.tensor([row])
        for fact, (told, begin, end) in fables.returns(story).items():
            memory, losses = empty[None], {"rnn": 0}
            for i, token in enumerate(row[0, :end]):                              # character i is token i + 1
                memory = networks["updater"](memory, token[None])
                if i >= begin:
                    losses["rnn"] -= networks["readout"](memory)[0].float().log_softmax(0)[ord(story[i])].item()
            for n in (n for n in (0, 12, 60) if begin - n >= told):
                label = networks["encoder"](row[:, :begin - n + 1], torch.tensor([begin - n]))[:, 0]
                losses[f"{n} back"] = 0
                for i in range(begin, end):
                    logits = networks["decoder"](label, row[:, begin - n + 1:i + 1])[0, -1]
                    losses[f"{n} back"] -= logits.float().log_softmax(0)[ord(story[i])].item()
            for column, loss in losses.items():
                expected.setdefault(fact, {}).setdefault(column, []).append(loss)
    assert found.keys() == expected.keys() and {"hero", "friend", "thing", "home"} <= found.keys() and "60 back" in found["home"]
    for fact, columns in expected.items():
        assert found[fact] == pytest.approx({column: sum(values) / len(values) for column, values in columns.items()}, rel=1e-4)


def test_command_line_prints_the_numbers_the_ngrams_and_the_facts(data_dir, smt_run):
    flags = [f"--ckpt={smt_run('fables')}", f"--data_dir={data_dir}", "--eval_docs=4", "--num_samples=3", "--device=cpu"]
    result = call(evaluation, *flags, "--ngrams=2")
    assert result.status == 0
    for words in ("val_rnn_loss", "val_teacher_loss", "val_gap_to_floor", "1-gram loss", "2-gram loss", "of 3 generated stories",
                  "kept", "0 back", "rnn", "hero", "friend", "thing", "home"):
        assert words in result.out


def test_checkpoints_stand_side_by_side_and_in_the_json_file(data_dir, smt_run, tmp_path, monkeypatch):
    monkeypatch.setattr("figures.measure_all", lambda *_: {"drift": {"skipped": "for speed"}})
    shutil.copytree(smt_run("retrieval"), tmp_path / "other")
    flags = [f"--ckpt={smt_run('retrieval')},{tmp_path / 'other'}", f"--data_dir={data_dir}", "--eval_docs=10000", "--device=cpu"]
    result = call(evaluation, *flags, f"--json={tmp_path / 'a.json'}")
    content = json.loads((tmp_path / "a.json").read_text())
    names, n = [smt_run("retrieval").name, "other"], 50                 # 400 held-out tokens: no document twice
    assert result.status == 0 and list(content["checkpoints"]) == names and content["documents"] == n
    assert f"{n} held-out documents, {n} targets" in result.out
    rows = {line.split()[0]: line.split()[1:] for line in result.out.splitlines()[1:]}
    assert rows[names[0]] == ["other"] and rows["steps"] == ["4", "4"]
    for key in ("rnn_loss", "rnn_accuracy", "teacher_loss", "teacher_accuracy", "drift"):
        for i, name in enumerate(names):
            value, error = (content["checkpoints"][name][f"val_{key}{more}"] for more in ("", "_error"))
            assert rows[f"val_{key}"][3 * i:3 * i + 3] == [f"{value:.4f}", "+-", f"{error:.4f}"]
    assert content["figures"] == {"drift": {"skipped": "for speed"}}


def test_bad_flags_end_with_status_2_and_one_line(data_dir, smt_run, tmp_path):
    (tmp_path / "file").write_text("")
    ckpt = smt_run("retrieval")
    for flags, words in (([f"--ckpt={ckpt},"], "separated by commas"), ([f"--ckpt={ckpt},{smt_run('fables')}"], "two data sets"),
                         ([f"--json={tmp_path / 'none' / 'a.json'}"], "no folder"), ([f"--figures={tmp_path / 'file'}"], "not a folder")):
        result = call(evaluation, f"--ckpt={ckpt}", f"--data_dir={data_dir}", *flags)
        assert result.status == 2 and len(result.err.splitlines()) == 1 and words in result.err
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
