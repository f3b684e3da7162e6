"""N-gram models, facts and the baselines' numbers against plain loops; what report.py prints."""
import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import QUICK, call, randomise, refused, trained

import evaluate
import sample
from data import Data, Split
from experiments import figures, report, train_baseline
from experiments.report import Trained, fact_losses, facts_table, ngram_losses
from experiments.train_baseline import BaselineConfig
from model import IGNORE, ModelConfig, build, empty_memory
from sources import fables

V, PAD = 5, 5
META = {"name": "a", "vocab_size": V}


def documents(ends=(9, 4, 6, 9, 7)):
    """Documents of different lengths, with targets at some positions."""
    x, y = torch.randint(V, (len(ends), 9)), torch.randint(V, (len(ends), 9))
    y[torch.rand(y.shape) < 0.3] = IGNORE
    for row, end in enumerate(ends):
        x[row, end:], y[row, end:] = PAD, IGNORE
    return x, y


def baseline(model="transformer", vocab_size=V):
    """A baseline with random weights in float64, as a checkpoint that was loaded."""
    config = BaselineConfig(model=model, d_model=8, n_heads=2, layers=1, context_len=50, hidden=6)
    module = randomise(train_baseline.build(config, vocab_size))[model]
    checkpoint = {"stage": model, "step": 3, "data": META}
    return Trained("b", Path("none"), checkpoint, config, torch.nn.ModuleDict(), torch.empty(0), module)


# ------------------------------------------------------------------------------------------------------------
# N-gram models

def test_ngram_losses_equal_plain_counting():
    torch.manual_seed(3)
    train = torch.randint(4, (60,), dtype=torch.uint8)                  # token 4 is never seen
    split, words = Split(train, None, torch.tensor([0])), train.tolist()
    x, y = documents()

    def probability(context, word):
        """Witten and Bell: the counts after this context, then those after it without its first token."""
        lower = probability(context[1:], word) if context else 1 / V
        n = len(context)
        after = [words[i] for i in range(n, len(words)) if tuple(words[i - n:i]) == context]
        types = len(set(after))
        return (after.count(word) + types * lower) / (len(after) + types) if after else lower

    expected = []
    for order in range(1, 5):
        losses = []
        for row, targets in zip(x.tolist(), y.tolist()):
            for t, target in enumerate(targets):
                if target != IGNORE:
                    context = ([PAD] * order + row[:t + 1])[-(order - 1):] if order > 1 else ()
                    losses.append(-math.log(probability(tuple(context), target)))
        expected.append(sum(losses) / len(losses))
    assert ngram_losses(Data({"vocab_size": V}, split, split), x, y, 4) == pytest.approx(expected, rel=1e-9)


# ------------------------------------------------------------------------------------------------------------
# Baselines

@pytest.mark.parametrize("model", ["transformer", "lstm"])
def test_last_losses_are_those_of_the_text_after_the_cut(model):
    run, x, y, t = baseline(model), *documents(), torch.tensor([3, 6, 8])
    measured = figures.measure_last(run.baseline, x, y, t, (1, 2, 4), rows=2)
    for name, n in (("last_1", 1), ("last_2", 2), ("last_4", 4), ("last_all", 99)):
        amounts, weights = measured[name]
        for row in range(len(x)):
            for i, end in enumerate(t.tolist()):
                target = y[row, end]
                assert weights[row, i] == (target != IGNORE)
                logits = run.baseline(x[row:row + 1, max(0, end + 1 - n):end + 1])[0, -1]
                loss = -logits.log_softmax(0)[target] * (target != IGNORE)
                torch.testing.assert_close(amounts[row, i].double(), loss, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("length, future_len, distances", [(90, math.inf, [16, 64]), (90, 64, [16]),
                                                           (40, 65, [16]), (90, 3, []), (9, 65, [])])
def test_a_baselines_column_has_the_targets_of_the_held_losses_beside_it(length, future_len, distances,
                                                                         monkeypatch):
    run, x, y = baseline(), torch.randint(V, (4, length)), torch.randint(V, (4, length))
    column, asked = run.evaluate(x, y, META, future_len), []
    config = ModelConfig(d_model=8, n_heads=2, memory_tokens=2, future_len=min(future_len, 100))
    monkeypatch.setattr(evaluate, "measure_held", lambda networks, x, y, t, distances: asked.append(
        (t, distances)) or evaluate.loss_of("held", torch.zeros(*y[:, t].shape, V), y[:, t]))
    evaluate.evaluate(build(config, V), torch.zeros(2, 8), x, y, META)
    ((t, held),) = asked
    assert held == [0, *distances] and t[-1] == length - 1 and t[0] >= held[-1] - 1
    expected = figures.measure_last(run.baseline, x, y, t, distances)
    for name in expected:
        assert column[f"val_{name}"] == evaluate.ratio(*expected[name])
        assert column[f"val_{name}_error"] == evaluate.standard_error(*expected[name])
    plain = train_baseline.evaluate(run.baseline, x, y, META, errors=True)
    own = {f"val_last_{n}{error}" for n in (*distances, "all") for error in ("", "_error")}
    assert column.keys() == {"stage", "steps", *plain, *own}


def test_a_baseline_without_targets_has_no_last_losses():
    column = baseline().evaluate(torch.randint(V, (4, 20)), torch.full((4, 20), IGNORE), META)
    assert not any("last" in name for name in column)


def test_stories_of_a_baseline_are_drawn_token_by_token_from_the_whole_story(monkeypatch):
    class Script(torch.nn.Module):
        """Row i says "ab" i + 1 times and ends."""
        head = torch.nn.Linear(1, 1)

        def forward(self, x):
            rows, n = x.shape                           # those that have not ended: the last of the three
            ends = n > 2 * (torch.arange(3 - rows, 3) + 1)
            token = torch.where(ends, 0, 97 + (n - 1) % 2)
            return torch.nn.functional.one_hot(token, 128)[:, None].expand(-1, n, -1) * 100.0
    assert report.baseline_stories(Script(), 3, 0, 0) == ["ab", "abab", "ababab"]
    monkeypatch.setattr(report, "STORY_LENGTH", 3)
    assert report.baseline_stories(Script(), 3, 0, 0) == ["ab", "aba", "aba"]

    run = baseline(vocab_size=128)
    drawn = report.baseline_stories(run.baseline, 4, 1.0, 7)
    again = report.baseline_stories(run.baseline, 2, 1.0, 8)
    assert drawn[1:3] == again and len(set(drawn)) == 4                 # story i is drawn with seed + i


# ------------------------------------------------------------------------------------------------------------
# Facts

def stories_as_rows(n=6):
    """Stories, the last one cut off, as rows [0, characters] with PAD behind."""
    stories = fables.draw(np.random.default_rng(0), n)
    rows = [[0, *story.encode()] for story in stories] + [[0, *stories[0].encode()][:90]]
    return stories, rows, torch.tensor([row + [128] * (255 - len(row)) for row in rows])


def test_fact_losses_are_those_of_all_letters_read_from_a_memory_that_can_have_the_fact():
    config = ModelConfig(encoder="causal", updater="mlp", d_model=8, n_heads=2, memory_tokens=2,
                         encoder_layers=1, context_len=50, future_len=80)
    networks, (stories, rows, x) = randomise(build(config, 128)), stories_as_rows()
    empty = empty_memory(networks["encoder"]).detach()
    run = Trained("a", Path("none"), {"stage": "smt"}, config, networks, empty)
    found, expected = fact_losses(run, x), {}
    for row, story in zip(rows, stories):
        row = torch.tensor([row])
        for fact, (told, begin, end) in fables.returns(story).items():
            memory, losses = empty[None], {"rnn": 0}
            for i, token in enumerate(row[0, :end]):                    # character i is token i + 1
                memory = networks["updater"](memory, token[None])
                if i >= begin:
                    logits = networks["readout"](memory)[0].float()
                    losses["rnn"] -= logits.log_softmax(0)[ord(story[i])].item()
            for n in (n for n in (0, 12, 60) if begin - n >= told):
                label = networks["encoder"](row[:, :begin - n + 1], torch.tensor([begin - n]))[:, 0]
                losses[f"{n} back"] = 0
                for i in range(begin, end):
                    logits = networks["decoder"](label, row[:, begin - n + 1:i + 1])[0, -1]
                    losses[f"{n} back"] -= logits.float().log_softmax(0)[ord(story[i])].item()
            for column, loss in losses.items():
                expected.setdefault(fact, {}).setdefault(column, []).append(loss)
    assert found.keys() == expected.keys() and {"hero", "friend", "thing", "home"} <= found.keys()
    assert "60 back" in found["home"]
    for fact, columns in expected.items():
        means = {column: sum(values) / len(values) for column, values in columns.items()}
        assert found[fact] == pytest.approx(means, rel=1e-4)


@pytest.mark.parametrize("model", ["transformer", "lstm"])
def test_fact_losses_of_a_baseline_are_those_of_its_own_letters(model):
    run, (stories, rows, x), expected = baseline(model, 128), stories_as_rows(), {}
    for row, story in zip(rows, stories):
        for fact, (_, begin, end) in fables.returns(story).items():
            loss = 0
            for i in range(begin, end):
                logits = run.baseline(torch.tensor([row[:i + 1]]))[0, -1]
                loss -= logits.log_softmax(0)[ord(story[i])].item()
            expected.setdefault(fact, []).append(loss)
    found = fact_losses(run, x)
    assert found.keys() == expected.keys()
    for fact, losses in expected.items():
        assert found[fact] == pytest.approx({"rnn": sum(losses) / len(losses)}, rel=1e-4)


def test_a_story_of_the_rnn_ends_where_the_model_ends_it(monkeypatch):
    columns = iter(torch.tensor([[*b"One.", 0, 0, 0], [*b"Three", *b".", 0]]).T)
    monkeypatch.setattr(sample, "choose", lambda *_: next(columns))
    sizes = ModelConfig(d_model=8, n_heads=2, memory_tokens=2)
    networks = build(sizes, fables.VOCAB_SIZE, ("updater", "readout"))
    assert report.rnn_stories(networks, torch.randn(2, 8), 2, 1.0, 0) == ["One.", "Three."]


def test_stories_are_counted_by_what_they_come_back_to(monkeypatch):
    """One story is the grammar's own; one ends with another hero; one never comes to its end."""
    (story,) = fables.draw(np.random.default_rng(1), 1)
    (hero,) = {fables.facts(story)["hero"]}
    *before, last = fables.sentences(story)
    wrong = " ".join([*before, last.replace(hero, "Zoe")])
    monkeypatch.setattr(report, "rnn_stories", lambda *_: [story, wrong, story[:40]])
    monkeypatch.setattr(report, "fact_losses", lambda run, x: {"hero": {"0 back": 1.5, "rnn": 2.25}})
    run = Trained("a", Path("none"), {"stage": "smt"}, None, {}, None)
    facts = report.count_facts(run, torch.zeros(1, 1), report.Config())
    assert facts["hero"] == {"kept": 1, "mentioned": 2, "0 back": 1.5, "rnn": 2.25}
    for fact in fables.returns(story).keys() - {"hero"}:
        assert facts[fact] == {"kept": 2, "mentioned": 2}
    first, second, *_ = facts_table(facts).splitlines()
    assert first.split() == ["kept", "0", "back", "rnn"]
    assert second.split() == ["hero", "1", "of", "2", "1.500", "2.250"]


# ------------------------------------------------------------------------------------------------------------
# The command line

@pytest.fixture(scope="module")
def baseline_run(data_dir, tmp_path_factory):
    """baseline_run(model, dataset): the folder of a short run."""
    def folder(model, dataset):
        out = tmp_path_factory.mktemp("runs") / f"{dataset}-{model}"
        sizes = "--d_model=8", "--n_heads=2", "--layers=1", "--hidden=6", "--context_len=8", "--seq_len=8"
        where = f"--dataset={dataset}", f"--data_dir={data_dir}", f"--out_dir={out}"
        trained(train_baseline, *QUICK, *sizes, *where, f"--model={model}")
        return out
    return folder


def test_numbers_ngrams_and_facts_of_rnn_and_baselines_stand_side_by_side(data_dir, smt_run, baseline_run,
                                                                          monkeypatch):
    monkeypatch.setattr(report, "STORY_LENGTH", 30)
    folders = smt_run("fables"), baseline_run("transformer", "fables"), baseline_run("lstm", "fables")
    flags = "--eval_docs=4", "--num_samples=3", "--device=cpu", "--ngrams=2"
    result = trained(report, f"--ckpt={','.join(map(str, folders))}", f"--data_dir={data_dir}", *flags)
    rows = {line.split()[0]: line.split()[1:] for line in result.out.split("\n\n")[0].splitlines()[1:]}
    assert rows["fables-smt"] == ["fables-transformer", "fables-lstm"]
    assert rows["stage"] == ["smt", "transformer", "lstm"] and rows["steps"] == ["4"] * 3
    assert len(rows["val_rnn_loss"]) == 9 and rows["val_teacher_loss"][3:] == ["-", "-"]
    assert rows["val_last_all"][0] == "-" and len(rows["val_last_all"]) == 7 and "val_held_0" in rows
    assert "val_last_16" not in rows                        # the decoder beside them predicts three tokens
    assert rows["1-gram"][0] == rows["2-gram"][0] == "loss" and "val_gap_to_floor" in rows
    assert result.out.count("in 3 generated stories") == 3
    assert "0 back" in result.out.split("\n\n")[1] and "0 back" not in result.out.split("\n\n")[2]


def test_checkpoints_stand_side_by_side_and_in_the_json_file(data_dir, smt_run, tmp_path, monkeypatch):
    monkeypatch.setattr(figures, "measure_all", lambda *_: {"drift": {"skipped": "for speed"}})
    monkeypatch.setattr(report, "ngram_losses", None)               # unless --ngrams asks for them
    shutil.copytree(smt_run("retrieval"), tmp_path / "other")
    flags = f"--data_dir={data_dir}", "--eval_docs=10000", "--device=cpu", f"--json={tmp_path / 'a.json'}"
    result = trained(report, f"--ckpt={smt_run('retrieval')},{tmp_path / 'other'}", *flags)
    content = json.loads((tmp_path / "a.json").read_text())
    names, n = [smt_run("retrieval").name, "other"], 50             # 400 held-out tokens: no document twice
    assert list(content["checkpoints"]) == names and content["documents"] == n
    assert f"{n} held-out documents, {n} targets" in result.out
    rows = {line.split()[0]: line.split()[1:] for line in result.out.splitlines()[1:]}
    for key in ("rnn_loss", "rnn_accuracy", "teacher_loss", "drift"):
        for i, name in enumerate(names):
            value, error = (content["checkpoints"][name][f"val_{key}{more}"] for more in ("", "_error"))
            assert rows[f"val_{key}"][3 * i:3 * i + 3] == [f"{value:.4f}", "+-", f"{error:.4f}"]
    assert content["figures"] == {"drift": {"skipped": "for speed"}}
    assert content["checkpoints"]["other"]["steps"] == 4


@pytest.mark.parametrize("flags, status, words", [
    (["--ckpt={smt},"], 2, "separated by commas"), (["--ckpt={smt},{fables}"], 2, "mixes data sets"),
    (["--json={tmp}/none/a.json"], 2, "no folder"), (["--figures={tmp}/file"], 2, "not a folder"),
    (["--ngrams=8"], 2, "--ngrams"), (["--ngrams=2"], 2, "for text"), (["--num_samples=0"], 2, "samples"),
    (["--ckpt={tmp}"], 1, "no checkpoint")])
def test_bad_flags_end_with_one_line(flags, status, words, data_dir, smt_run, tmp_path):
    (tmp_path / "file").write_text("")
    names = dict(smt=smt_run("retrieval"), fables=smt_run("fables"), tmp=tmp_path)
    flags = [flag.format(**names) for flag in (["--ckpt={smt}"] if "--ckpt" not in flags[0] else []) + flags]
    refused(call(report, *flags, f"--data_dir={data_dir}", "--device=cpu"), status, words)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
