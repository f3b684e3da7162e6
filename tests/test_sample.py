"""Generating: seeds, greedy choices, prompts, pictures, and answers."""
import os
import shutil

import numpy as np
import pytest
import torch
from conftest import BPTT_SIZES, QUICK, ROLL_OUTS, call, randomise, refused, trained
from PIL import Image

import data
import sample
import train_bptt
import train_dmt
from lib.checkpoints import load, restore
from model import ModelConfig, build
from sample import generate, seeded, uniform


@pytest.fixture
def ask(smt_run, data_dir):
    """ask(dataset, *flags): what sample.py prints for the run on that data set."""
    def say(dataset, *flags):
        result = call(sample, f"--ckpt={smt_run(dataset)}", f"--data_dir={data_dir}", *flags)
        assert result.status == 0, result.err
        return result.out
    return say


# ----------------------------------------------------------------------------------------------------------
# Choosing a token

def choose(logits, temperature, top_k, generators):
    return sample.choose(logits, temperature, top_k, next(uniform(generators, "cpu")))


def test_choice_follows_the_distribution_and_the_temperature():
    logits = torch.tensor([[0.0, 1.0, 2.0]]).expand(2_000, 3)
    generators = [torch.Generator().manual_seed(1)] * 2_000
    for temperature in (0.5, 1.0, 3.0):
        share = torch.bincount(choose(logits, temperature, 0, generators), minlength=3) / 2_000
        torch.testing.assert_close(share, (logits[0] / temperature).softmax(-1), rtol=0, atol=0.03)
    share = torch.bincount(choose(logits, 1.0, 2, generators), minlength=3) / 2_000
    expected = torch.tensor([0, *torch.tensor([1.0, 2.0]).softmax(-1)])
    torch.testing.assert_close(share, expected, rtol=0, atol=0.03)


def test_greedy_choices_are_the_likeliest_however_they_are_asked_for():
    logits = torch.randn(50, 9)
    for temperature, top_k in ((0.0, 0), (0.0, 3), (1.0, 1), (5.0, 1), (1e-6, 0), (1e-30, 4), (1e-300, 0)):
        drawn = choose(logits, temperature, top_k, seeded(0, 50))
        assert torch.equal(drawn, logits.argmax(-1)), (temperature, top_k)
    assert torch.equal(choose(logits, 1.0, 100, seeded(0, 50)), choose(logits, 1.0, 0, seeded(0, 50)))


def test_the_least_and_the_greatest_number_draw_the_first_and_the_last_token_that_can_be():
    logits = torch.randn(1000, 9)
    logits[:, [0, 4, 8]] = -torch.inf
    least, greatest = torch.zeros(1000), torch.full((1000,), 1 - 2 ** -24)
    assert (sample.choose(logits, 1.0, 0, least) == 1).all()
    assert (sample.choose(logits, 1.0, 0, greatest) == 7).all()


def test_each_row_has_its_own_random_numbers():
    logits = torch.zeros(5, 200)
    together = choose(logits, 1.0, 0, seeded(7, 5))
    for i in range(5):
        assert choose(logits[:1], 1.0, 0, seeded(7 + i, 1)) == together[i]
    assert len(set(together.tolist())) > 1


def small_rnn():
    """Updater and readout with random weights, and a memory for three rows."""
    networks = randomise(build(ModelConfig(d_model=8, n_heads=2, memory_tokens=2), 9))
    return networks, torch.randn(3, 2, 8, dtype=torch.float64)


def drawn(networks, memory, temperature, seed=0, count=10):
    tokens = generate(networks, memory, temperature, 0, seeded(seed, len(memory)))
    return torch.stack([token.cpu() for _, token in zip(range(count), tokens)], dim=1)


def test_a_row_does_not_depend_on_the_rows_beside_it():
    networks, memory = small_rnn()
    together = drawn(networks, memory, 2.0)
    for i in range(3):
        assert torch.equal(drawn(networks, memory[i:i + 1], 2.0, seed=i)[0], together[i])
    assert not torch.equal(together, drawn(networks, memory, 0.0))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs")
def test_cuda_generates_what_the_cpu_does():
    networks, memory = small_rnn()
    tokens = drawn(networks, memory, 0.0)
    assert torch.equal(drawn(networks.cuda(), memory.cuda(), 0.0), tokens)


def test_a_prompt_read_in_parts_gives_the_same_memory(monkeypatch):
    networks, memory = small_rnn()
    tokens = torch.randint(9, (3, 10))
    whole = sample.read(networks, memory, tokens)
    monkeypatch.setattr(sample, "READ", 3)
    assert torch.equal(sample.read(networks, memory, tokens), whole)
    assert sample.read(networks, memory, tokens[:, :0]) is memory


# ----------------------------------------------------------------------------------------------------------
# Text

def test_same_seed_same_text_and_another_seed_another(ask):
    first = ask("fables", "--max_new_tokens=40", "--seed=1")
    assert first == ask("fables", "--max_new_tokens=40", "--seed=1") and len(first) > 10
    assert first != ask("fables", "--max_new_tokens=40", "--seed=2")


def test_greedy_text_does_not_depend_on_the_seed_and_equals_top_k_of_1(ask):
    greedy = [ask("fables", "--max_new_tokens=30", "--temperature=0", f"--seed={seed}") for seed in (1, 2)]
    assert greedy[0] == greedy[1] == ask("fables", "--max_new_tokens=30", "--top_k=1", "--temperature=2")


def test_a_text_does_not_depend_on_how_many_there_are(ask):
    three = ask("fables", "--max_new_tokens=30", "--seed=5", "--num_samples=3", "--prompt=The ")
    alone = [ask("fables", "--max_new_tokens=30", f"--seed={seed}", "--prompt=The ") for seed in (5, 6, 7)]
    assert three == "\n".join(alone) and len(set(alone)) == 3
    assert all(text.startswith("The ") and text.endswith("\n") for text in alone)


def test_a_prompt_is_read_and_gone_on_from(smt_run, ask):
    """The greedy text after a prompt, by hand."""
    _, networks, memory = restore(load(smt_run("fables")))
    memory, text = memory[None], "One "
    with torch.no_grad():
        for token in [0, *text.encode()]:
            memory = networks["updater"](memory, torch.tensor([token]))
        for _ in range(12):
            token = networks["readout"](memory).argmax(-1)
            if token == 0:
                break
            text += chr(token)
            memory = networks["updater"](memory, token)
    assert ask("fables", "--prompt=One ", "--temperature=0", "--max_new_tokens=12") == text + "\n"


def test_a_prompt_with_characters_that_the_data_set_lacks_is_refused(smt_run):
    for prompt in ("naïve", "\0", "x\x01"):
        refused(call(sample, f"--ckpt={smt_run('fables')}", f"--prompt={prompt}"), 2)


def test_a_story_ends_where_the_model_ends_it(ask, monkeypatch):
    tokens = iter([*b"The end.", 0, *b"never read"])
    monkeypatch.setattr(sample, "choose", lambda *_: torch.tensor([next(tokens)]))
    assert ask("fables") == "The end.\n"


def test_the_most_finished_run_is_found_and_named(tmp_path, monkeypatch, smt_run):
    monkeypatch.chdir(tmp_path)
    refused(call(sample), 1, "runs/fables-dmt")
    for stage in ("bptt", "smt", "dmt"):
        shutil.copytree(smt_run("fables"), tmp_path / "runs" / f"fables-{stage}")
        result = call(sample, "--max_new_tokens=5")
        assert result.status == 0 and result.err.startswith(f"runs/fables-{stage}: smt, step 4, ")
        assert len(result.err.splitlines()) == 1 and len(result.out) > 1
    (tmp_path / "runs" / "fables-dmt" / "ckpt.pt").write_text("broken: it is this one that is read")
    refused(call(sample), 1, "fables-dmt")


@pytest.mark.parametrize("given", [True, False])
def test_a_run_of_dmt_that_began_with_an_smt_run_trained_anew_since_is_warned_of(
        tmp_path, monkeypatch, data_dir, smt_run, given):
    """Given with --init_from, or found as runs/<dataset>-smt."""
    monkeypatch.chdir(tmp_path)
    source = tmp_path / "runs" / "fables-smt"
    shutil.copytree(smt_run("fables"), source)
    flags = [f"--init_from={source}"] if given else []
    trained(train_dmt, *QUICK, *ROLL_OUTS, f"--data_dir={data_dir}", *flags, "--max_iters=1")
    saved = load("runs/fables-dmt")["time"]
    for later, warned in ((-60, False), (60, True)):
        os.utime(source / "ckpt.pt", (saved + later, saved + later))
        result = call(sample, "--max_new_tokens=5")
        warnings = [line for line in result.err.splitlines() if line.startswith("warning: ")]
        assert result.status == 0 and len(warnings) == warned
        assert not warned or "fables-smt" in warnings[0]


def test_a_run_without_encoder_can_speak(tmp_path, data_dir):
    trained(train_bptt, *QUICK, *BPTT_SIZES, "--dataset=fables", f"--data_dir={data_dir}",
            f"--out_dir={tmp_path}", "--seq_len=8")
    assert len(call(sample, f"--ckpt={tmp_path}", "--max_new_tokens=5").out) > 1


# ----------------------------------------------------------------------------------------------------------
# Pictures

def cells(path, columns):
    """The pictures (28, 28) of a grid, 0..255, line by line; the border between them is two grey pixels."""
    grid = np.asarray(Image.open(path))
    lines = (grid.shape[0] - 2) // 30
    assert grid.shape == (2 + 30 * lines, 2 + 30 * columns)
    assert (grid[:2] == 96).all() and (grid[:, :2] == 96).all()
    corners = [(2 + 30 * i, 2 + 30 * j) for i in range(lines) for j in range(columns)]
    return [grid[top:top + 28, left:left + 28] for top, left in corners]


def test_pictures_are_written_as_a_grid_and_picture_i_does_not_depend_on_their_number(tmp_path, ask):
    out = ask("mnist", "--num_samples=5", f"--out={tmp_path / 'five.png'}", "--seed=2")
    assert out == f"{tmp_path / 'five.png'}\n" and [p.name for p in tmp_path.iterdir()] == ["five.png"]
    ask("mnist", "--num_samples=1", f"--out={tmp_path / 'one.png'}", "--seed=3")
    pictures, (one,) = cells(tmp_path / "five.png", 3), cells(tmp_path / "one.png", 1)
    assert len(pictures) == 6 and (pictures[5] == 96).all()     # as square as may be, with an empty place
    assert np.array_equal(pictures[1], one) and len(np.unique(one)) > 50
    assert not np.array_equal(pictures[0], pictures[1])


@pytest.mark.parametrize("keep", [0.25, 1.0])
def test_completion_keeps_the_given_part_of_a_held_out_picture(tmp_path, ask, data_dir, keep):
    ask("mnist", "--prompt=held-out", "--num_samples=2", f"--keep={keep}", f"--out={tmp_path / 'a.png'}")
    given, completed, truth = (cells(tmp_path / "a.png", 2)[i:i + 2] for i in (0, 2, 4))
    held_out = data.load("mnist", data_dir).val.tokens.view(-1, 28, 28).numpy()
    rows = int(28 * keep)
    for i in range(2):
        assert any(np.array_equal(truth[i], picture) for picture in held_out)
        assert np.array_equal(completed[i][:rows], truth[i][:rows])
        assert np.array_equal(given[i][:rows], truth[i][:rows])
        assert (given[i][rows:] == 128).all()
        assert keep == 1 or not np.array_equal(completed[i][rows:], truth[i][rows:])


def test_a_picture_file_is_completed(tmp_path, ask, smt_run, data_dir, monkeypatch):
    pixels = np.random.default_rng(0).integers(256, size=(28, 28), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "digit.png")
    ask("mnist", f"--prompt={tmp_path / 'digit.png'}", "--num_samples=2", "--keep=0.75",
        f"--out={tmp_path / 'a.png'}")
    pictures = cells(tmp_path / "a.png", 2)
    assert all(np.array_equal(picture[:21], pixels[:21]) for picture in pictures)
    assert np.array_equal(pictures[4], pixels) and not np.array_equal(pictures[2], pictures[3])
    monkeypatch.setenv("HOME", str(tmp_path))
    ask("mnist", "--prompt=~/digit.png", "--num_samples=1", f"--out={tmp_path / 'home.png'}")
    refused(call(sample, f"--ckpt={smt_run('mnist')}", "--prompt=nowhere.png"), 2, "nowhere.png")
    Image.fromarray(pixels[1:]).save(tmp_path / "small.png")
    refused(call(sample, f"--ckpt={smt_run('mnist')}", f"--prompt={tmp_path / 'small.png'}"), 2, "small.png")
    out = tmp_path / "no" / "a.png"
    refused(call(sample, f"--ckpt={smt_run('mnist')}", "--num_samples=1", f"--out={out}"), 1, out)


# ----------------------------------------------------------------------------------------------------------
# Questions

def test_synthetic_questions_are_asked_and_the_right_answers_counted(ask, data_dir):
    out = ask("retrieval", "--num_samples=6")
    *blocks, score = out.strip().split("\n\n")
    retrieval = data.load("retrieval", data_dir)
    x, y = data.held_out(retrieval, 6, 8, seed=0)
    right = 0
    for block, document, targets in zip(blocks, x, y, strict=True):
        question, answer, truth = (line.split(maxsplit=1) for line in block.splitlines())
        assert [question[0], answer[0], truth[0]] == ["question", "answer", "truth"]
        assert question[1] == data.decode(document, retrieval.meta)
        assert truth[1] == data.decode(targets[-1:], retrieval.meta)
        right += answer[1] == truth[1]
    assert score == f"{right} of 6 answers are right"
    assert out == ask("retrieval", "--num_samples=6", "--seed=0", "--temperature=5")


def test_synthetic_tasks_take_no_prompt_and_need_their_data_set(tmp_path, smt_run):
    refused(call(sample, f"--ckpt={smt_run('retrieval')}", "--prompt=abc"), 2, "--prompt")
    refused(call(sample, f"--ckpt={smt_run('retrieval')}", f"--data_dir={tmp_path}"), 1, tmp_path)
