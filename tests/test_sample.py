"""Generating: seeds, greedy choices, prompts, pictures, and answers."""
import contextlib
import io

import numpy as np
import pytest
import torch
from conftest import BPTT_SIZES, QUICK, call, randomise, trained

import data
import sample
import train_bptt
from model import ModelConfig, build
from runtime import load
from sample import choose, draw, generate, generate_from_graph, pick, seeded

imread = pytest.importorskip("matplotlib.image").imread


@pytest.fixture
def ask(smt_run, data_dir):
    """ask(dataset, *flags): what sample.py prints for the run on that data set."""
    def say(dataset, *flags):
        return trained(sample, f"--ckpt={smt_run(dataset)}", f"--data_dir={data_dir}", *flags).out
    return say


def refused(result, status, *messages):
    assert result.status == status and len(result.err.splitlines()) == 1 and not result.out, result
    for message in messages:
        assert message in result.err


# ---------------------------------------------------------------------------------------------------------------------
# Choosing a token

def test_choice_follows_the_distribution_and_the_temperature():
    logits = torch.tensor([[0.0, 1.0, 2.0]]).expand(20_000, 3)
    generators = [torch.Generator().manual_seed(1)] * 20_000
    for temperature in (0.5, 1.0, 3.0):
        share = torch.bincount(choose(logits, temperature, 0, generators), minlength=3) / 20_000
        torch.testing.assert_close(share, (logits[0] / temperature).softmax(-1), rtol=0, atol=0.015)
    share = torch.bincount(choose(logits, 1.0, 2, generators), minlength=3) / 20_000
    torch.testing.assert_close(share, torch.tensor([0, *torch.tensor([1.0, 2.0]).softmax(-1)]), rtol=0, atol=0.015)


def test_greedy_choices_are_the_likeliest_however_they_are_asked_for():
    logits = torch.randn(50, 9)
    for temperature, top_k in ((0.0, 0), (0.0, 3), (1.0, 1), (5.0, 1), (1e-6, 0), (1e-30, 4), (1e-300, 0)):
        assert torch.equal(choose(logits, temperature, top_k, seeded(0, 50)), logits.argmax(-1)), (temperature, top_k)
    assert torch.equal(choose(logits, 1.0, 100, seeded(0, 50)), choose(logits, 1.0, 0, seeded(0, 50)))


def test_each_row_has_its_own_random_numbers():
    logits = torch.zeros(5, 200)
    together = choose(logits, 1.0, 0, seeded(7, 5))
    for i in range(5):
        assert choose(logits[:1], 1.0, 0, seeded(7 + i, 1)) == together[i]
    assert len(set(together.tolist())) > 1


def test_picks_by_given_numbers_follow_the_distribution_and_never_take_what_top_k_leaves_out():
    """Evenly spread numbers: each token as often as it is likely, the first and the last one, too."""
    logits, numbers = torch.tensor([2.0, 0.0, 1.0, -1.0]), torch.arange(10_000, dtype=torch.float64) / 10_000
    for temperature, top_k in ((0.5, 0), (1.0, 0), (3.0, 0), (1.0, 2), (1e-30, 3), (0.0, 0)):
        share = torch.bincount(pick(logits.expand(10_000, 4), temperature, top_k, numbers), minlength=4) / 10_000
        expected = (logits / max(temperature, 1e-3)).where(logits >= logits.sort(descending=True).values[(top_k or 4) - 1], -torch.inf).softmax(-1)
        torch.testing.assert_close(share, expected, rtol=0, atol=2e-4)
    ends = torch.tensor([0.0, 1 - 2**-53], dtype=torch.float64)
    assert pick(torch.tensor([[-torch.inf, 0.0, 0.0, -torch.inf]]).expand(2, 4), 1.0, 0, ends).tolist() == [1, 2]


def test_numbers_for_picks_are_those_of_each_rows_own_generator(monkeypatch):
    monkeypatch.setattr(sample, "NUMBERS", 5)
    together = [numbers for numbers, _ in zip(draw(seeded(7, 3), "cpu"), range(12))]
    for i in range(3):
        alone = [numbers for numbers, _ in zip(draw(seeded(7 + i, 1), "cpu"), range(12))]
        assert [numbers[i] for numbers in together] == [numbers[0] for numbers in alone]
    assert len({float(number) for numbers in together for number in numbers}) == 36


def greedy(networks, memory, step, count=10):
    """The next tokens (B, count) of generate or generate_from_graph, always the likeliest."""
    return torch.stack([token for token, _ in zip(step(networks, memory, 0.0, 0, seeded(0, len(memory))), range(count))], dim=1)


def test_generating_from_a_graph_equals_generating_token_by_token():
    networks = randomise(build(ModelConfig(d_model=8, n_heads=2, memory_tokens=2), 9))
    memory = torch.randn(3, 2, 8, dtype=torch.float64)
    tokens = greedy(networks, memory, generate)
    assert torch.equal(greedy(networks, memory, generate_from_graph), tokens) and len(tokens.unique()) > 2
    drawn = torch.stack([token for token, _ in zip(generate_from_graph(networks, memory, 2.0, 0, seeded(0, 3)), range(10))], dim=1)
    one = torch.stack([token for token, _ in zip(generate_from_graph(networks, memory[1:2], 2.0, 0, seeded(1, 1)), range(10))], dim=1)
    assert torch.equal(drawn[1:2], one) and not torch.equal(drawn, tokens)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs")
def test_cuda_generates_what_the_cpu_does():
    networks = randomise(build(ModelConfig(d_model=8, n_heads=2, memory_tokens=2), 9))
    memory = torch.randn(3, 2, 8, dtype=torch.float64)
    tokens = greedy(networks, memory, generate)
    assert torch.equal(greedy(networks.cuda(), memory.cuda(), generate).cpu(), tokens)


# ---------------------------------------------------------------------------------------------------------------------
# Text

def test_same_seed_same_text_and_another_seed_another(ask):
    first = ask("fables", "--max_new_tokens=40", "--seed=3")
    assert first == ask("fables", "--max_new_tokens=40", "--seed=3") and len(first) > 10
    assert first != ask("fables", "--max_new_tokens=40", "--seed=4")


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
    checkpoint = load(smt_run("fables"))
    _, networks, memory = sample.restore(checkpoint)
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
        refused(call(sample, f"--ckpt={smt_run('fables')}", f"--prompt={prompt}"), 2, "fables does not have the characters")


def test_a_story_ends_where_the_model_ends_it(ask, monkeypatch):
    tokens = iter([*b"The end.", 0, *b"never read"])
    monkeypatch.setattr(sample, "choose", lambda *_: torch.tensor([next(tokens)]))
    assert ask("fables") == "The end.\n"


def test_the_most_finished_run_is_found(tmp_path, monkeypatch, data_dir, smt_run):
    monkeypatch.chdir(tmp_path)
    refused(call(sample), 1, "there is no checkpoint runs/fables-dmt")
    (tmp_path / "runs" / "fables-transformer").mkdir(parents=True)
    (tmp_path / "runs" / "fables-transformer" / "ckpt.pt").write_bytes((smt_run("fables") / "ckpt.pt").read_bytes())
    assert len(trained(sample, "--max_new_tokens=5").out) > 1
    for stage in ("bptt", "smt", "dmt"):
        (tmp_path / "runs" / f"fables-{stage}").mkdir()
        (tmp_path / "runs" / f"fables-{stage}" / "ckpt.pt").write_text("broken: it is this one that is read")
        refused(call(sample), 1, f"fables-{stage}")


def test_a_run_without_encoder_can_speak(tmp_path, data_dir):
    trained(train_bptt, *QUICK, *BPTT_SIZES, "--dataset=fables", f"--data_dir={data_dir}", f"--out_dir={tmp_path}", "--seq_len=8")
    assert len(trained(sample, f"--ckpt={tmp_path}", "--max_new_tokens=5").out) > 1


# ---------------------------------------------------------------------------------------------------------------------
# Pictures

def cells(path, columns):
    """The pictures (28, 28) of a grid, 0..255, line by line; the border between them is two grey pixels."""
    grid = np.round(imread(path)[..., 0] * 255).astype(int)
    lines = (grid.shape[0] - 2) // 30
    assert grid.shape == (2 + 30 * lines, 2 + 30 * columns) and (grid[:2] == 96).all() and (grid[:, :2] == 96).all()
    return [grid[2 + 30 * i:30 + 30 * i, 2 + 30 * j:30 + 30 * j] for i in range(lines) for j in range(columns)]


def test_pictures_are_written_as_a_grid_and_picture_i_does_not_depend_on_their_number(tmp_path, ask):
    out = ask("mnist", "--num_samples=3", f"--out={tmp_path / 'three.png'}", "--seed=2")
    assert out == f"{tmp_path / 'three.png'}\n" and [p.name for p in tmp_path.iterdir()] == ["three.png"]
    ask("mnist", "--num_samples=1", f"--out={tmp_path / 'one.png'}", "--seed=3")
    pictures, (one,) = cells(tmp_path / "three.png", 2), cells(tmp_path / "one.png", 1)
    assert len(pictures) == 4 and (pictures[3] == 96).all()                      # an empty place
    ask("mnist", "--num_samples=5", f"--out={tmp_path / 'five.png'}")
    assert len(cells(tmp_path / "five.png", 3)) == 6                              # as square as may be
    assert np.array_equal(pictures[1], one) and not np.array_equal(pictures[0], pictures[1]) and len(np.unique(one)) > 50


@pytest.mark.parametrize("keep", [0.25, 1.0])
def test_completion_keeps_the_given_part_of_a_held_out_picture(tmp_path, ask, data_dir, keep):
    ask("mnist", "--prompt=held-out", "--num_samples=2", f"--keep={keep}", f"--out={tmp_path / 'a.png'}")
    given, completed, truth = (cells(tmp_path / "a.png", 2)[i:i + 2] for i in (0, 2, 4))
    held_out = data.load("mnist", data_dir).val.tokens.view(-1, 28, 28).numpy()
    rows = int(28 * keep)
    for i in range(2):
        assert any(np.array_equal(truth[i], picture) for picture in held_out)
        assert np.array_equal(completed[i][:rows], truth[i][:rows]) and np.array_equal(given[i][:rows], truth[i][:rows])
        assert (given[i][rows:] == 128).all()
        assert keep == 1 or not np.array_equal(completed[i][rows:], truth[i][rows:])


def test_a_picture_file_is_completed(tmp_path, ask, smt_run, data_dir):
    image = pytest.importorskip("PIL.Image")
    pixels = np.random.default_rng(0).integers(256, size=(28, 28), dtype=np.uint8)
    image.fromarray(pixels).save(tmp_path / "digit.png")
    ask("mnist", f"--prompt={tmp_path / 'digit.png'}", "--num_samples=2", "--keep=0.75", f"--out={tmp_path / 'a.png'}")
    pictures = cells(tmp_path / "a.png", 2)
    assert all(np.array_equal(picture[:21], pixels[:21]) for picture in pictures)
    assert np.array_equal(pictures[4], pixels) and not np.array_equal(pictures[2], pictures[3])
    refused(call(sample, f"--ckpt={smt_run('mnist')}", "--prompt=nowhere.png"), 2, "there is no picture nowhere.png")
    image.fromarray(pixels[1:]).save(tmp_path / "small.png")
    refused(call(sample, f"--ckpt={smt_run('mnist')}", f"--prompt={tmp_path / 'small.png'}"), 2, "27 x 28 pixels")
    refused(call(sample, f"--ckpt={smt_run('mnist')}", "--num_samples=1", f"--out={tmp_path / 'no' / 'a.png'}"), 1, "cannot write")


# ---------------------------------------------------------------------------------------------------------------------
# Questions

def test_synthetic_questions_are_asked_and_the_right_answers_counted(ask, data_dir):
    out = ask("retrieval", "--num_samples=6", "--temperature=0")
    *blocks, score = out.strip().split("\n\n")
    retrieval = data.load("retrieval", data_dir)
    x, y = data.held_out(retrieval, 6, 8, seed=0)
    right = 0
    for block, document, targets in zip(blocks, x, y, strict=True):
        question, answer, truth = (line.split(maxsplit=1) for line in block.splitlines())
        assert [question[0], answer[0], truth[0]] == ["question", "answer", "truth"]
        assert question[1] == data.decode(document, retrieval.meta) and truth[1] == data.decode(targets[-1:], retrieval.meta)
        right += answer[1] == truth[1]
    assert score == f"{right} of 6 answers are right"
    assert out == ask("retrieval", "--num_samples=6", "--temperature=0", "--seed=0")


def test_synthetic_tasks_take_no_prompt_and_need_their_data_set(tmp_path, smt_run):
    refused(call(sample, f"--ckpt={smt_run('retrieval')}", "--prompt=abc"), 2, "takes no --prompt")
    refused(call(sample, f"--ckpt={smt_run('retrieval')}", f"--data_dir={tmp_path}"), 1, "there is no data set")


def test_questions_of_a_data_set_with_another_vocabulary_are_refused(tmp_path, smt_run):
    with contextlib.redirect_stdout(io.StringIO()):
        data.prepare("retrieval", tmp_path, train_tokens=1000, val_tokens=200, length="8", symbols=20)
    refused(call(sample, f"--ckpt={smt_run('retrieval')}", f"--data_dir={tmp_path}"), 1, "vocabulary 5", "vocabulary 21")
