"""Every synthetic task against a plain solver that sees the tokens alone: what is asked can be known."""
import itertools

import numpy as np
import pytest

from lib.cli import UsageError
from sources.tasks import NO_TARGET, OPTIONS, TASKS, to_text


def make(name, n_tokens=3000, seed=0, **options):
    return TASKS[name](np.random.default_rng(seed), n_tokens, **options)


def documents(tokens, targets, starts, _vocab_size):
    """[(x, y)] as lists of Python numbers."""
    ends = [*starts[1:].tolist(), len(tokens)]
    return [(tokens[a:b].tolist(), targets[a:b].tolist()) for a, b in zip(starts.tolist(), ends)]


# ---- solvers: a document's tokens -> what should be asked at each of them, None where nothing should

def solve_retrieval(x, symbols=8, **_):
    first = x.index(symbols)
    assert first + 1 < len(x) // 2 and x[-1] == symbols and x.count(symbols) == 2
    return [None] * (len(x) - 1) + [x[first + 1]]


def solve_copy(x, symbols=8, **_):
    n = x.index(symbols)
    assert x.count(symbols) == 1 and x[n + 1:] == x[1:n][::-1]
    return [None] * n + x[:n][::-1]


def solve_stack(x, symbols=8, depth=4, **_):
    pile, y = [], []
    for token in x:
        if token == symbols:
            y.append(pile.pop())
        else:
            pile.append(token)
            y.append(None)
        assert len(pile) <= depth
    return y


def solve_keyvalue(x, symbols=8, keys=4, key_length=2, value_length=2):
    record, question = key_length + value_length, x.index(symbols)
    assert question == keys * record and x.count(symbols) == 1
    table = {tuple(x[i:i + key_length]): x[i + key_length:i + record] for i in range(0, question, record)}
    assert len(table) == keys
    value = table[tuple(x[question + 1:question + 1 + key_length])]
    assert x[question + 1 + key_length:] == value[:-1]
    return [None] * (question + key_length) + value


def solve_modular(x, modulus=7, **_):
    """Keeps all rules that agree with the pairs so far."""
    rules, pairs, y = list(itertools.product(range(1, modulus), range(modulus))), [], []
    for a, result in zip(x[::2], x[1::2]):
        answers = {(w * a + b) % modulus for w, b in rules}
        known = a in dict(pairs) or len(dict(pairs)) >= 2
        assert result in answers and (not known or len(answers) == 1)
        y += [result if known else None, None]
        pairs.append((a, result))
        rules = [(w, b) for w, b in rules if (w * a + b) % modulus == result]
    return y


SOLVERS = {"retrieval": solve_retrieval, "copy": solve_copy, "stack": solve_stack, "keyvalue": solve_keyvalue,
           "modular": solve_modular}
CASES = [*((name, {}) for name in TASKS),
         ("retrieval", {"length": (4, 4), "symbols": 2}), ("retrieval", {"length": (5, 90), "symbols": 254}),
         ("copy", {"length": (1, 1), "symbols": 2}), ("copy", {"length": (1, 30), "symbols": 100}),
         ("stack", {"length": (2, 50), "depth": 1}),
         ("stack", {"length": (64, 64), "depth": 20, "symbols": 3}),
         ("keyvalue", {"keys": 1, "key_length": 1, "value_length": 1}),
         ("keyvalue", {"keys": 8, "key_length": 1, "value_length": 3}),
         ("keyvalue", {"symbols": 3, "keys": 9, "key_length": 2, "value_length": 1}),
         ("keyvalue", {"key_length": 20, "keys": 2}),
         ("modular", {"length": (3, 3), "modulus": 2}), ("modular", {"length": (3, 40), "modulus": 31}),
         ("modular", {"modulus": 251, "n_tokens": 100})]


@pytest.mark.parametrize("name, options", CASES)
def test_answers_follow_from_the_tokens_alone(name, options):
    options = dict(options)
    tokens, targets, starts, vocab_size = make(name, options.pop("n_tokens", 3000), **options)
    assert tokens.dtype == targets.dtype == np.uint8 and starts.dtype == np.uint64
    assert tokens.max() < vocab_size <= NO_TARGET and len(tokens) == len(targets)
    for x, y in documents(tokens, targets, starts, vocab_size):
        assert y == [NO_TARGET if answer is None else answer for answer in SOLVERS[name](x, **options)]


@pytest.mark.parametrize("name", TASKS)
def test_the_stream_is_the_first_whole_number_of_documents_with_enough_tokens(name):
    for n_tokens in [1, 100, 3001]:
        tokens, _, starts, _ = make(name, n_tokens)
        assert starts[0] == 0 and starts[-1] < n_tokens <= len(tokens)


@pytest.mark.parametrize("name, low, high, tokens_each", [
    ("retrieval", 4, 9, 1), ("copy", 1, 5, 2), ("stack", 2, 6, 1), ("modular", 3, 8, 2)])
def test_lengths_fill_their_range_evenly(name, low, high, tokens_each):
    lengths = [len(x) / tokens_each for x, _ in documents(*make(name, 12000, length=(low, high)))]
    share = [lengths.count(n) / len(lengths) for n in range(low, high + 1)]
    assert sum(share) == pytest.approx(1) and np.ptp(share) < 0.08


@pytest.mark.parametrize("name", TASKS)
def test_documents_depend_on_the_seed_alone(name):
    first, again, other = make(name), make(name), make(name, seed=1)
    assert all(np.array_equal(a, b) for a, b in zip(first, again))
    assert not np.array_equal(first[0], other[0])


def test_needles_and_markers_reach_every_place_of_the_first_half():
    places = {x.index(8) for x, _ in documents(*make("retrieval", 6000, length=(12, 12)))}
    assert places == set(range(5))


def test_noise_replaces_answers_by_random_symbols():
    noisy = documents(*make("retrieval", 40000, length=(8, 8), noise=0.5))
    wrong = [y[-1] != solve_retrieval(x)[-1] for x, y in noisy]
    assert np.mean(wrong) == pytest.approx(0.5 * 7 / 8, abs=0.03)


def test_stack_decides_by_a_coin_between_its_bounds():
    xs = [x for x, _ in documents(*make("stack", 20000, depth=3, length=(40, 40)))]
    pops = {height: [] for height in range(4)}
    for x in xs:
        height = 0
        for token in x:
            pops[height].append(token == 8)
            height += -1 if token == 8 else 1
    assert not any(pops[0]) and all(pops[3])
    assert [np.mean(pops[height]) for height in (1, 2)] == pytest.approx([0.5, 0.5], abs=0.03)


def test_keyvalue_asks_for_each_of_its_keys_and_all_keys_occur():
    asked, first = [], []
    for x, _ in documents(*make("keyvalue", 20000, symbols=4, key_length=1, value_length=1, keys=3)):
        keys = x[:6:2]
        asked.append(keys.index(x[7]))
        first.append(keys[0])
    for drawn, n in [(asked, 3), (first, 4)]:
        assert np.bincount(drawn) / len(drawn) == pytest.approx(np.full(n, 1 / n), abs=0.04)


@pytest.mark.parametrize("name, options", [
    ("retrieval", {"length": (3, 3)}), ("retrieval", {"length": (9, 8)}), ("retrieval", {"symbols": 1}),
    ("retrieval", {"symbols": 255}), ("retrieval", {"noise": -0.1}), ("retrieval", {"noise": 1.1}),
    ("retrieval", {"noise": float("nan")}), ("copy", {"length": (0, 4)}), ("copy", {"symbols": 300}),
    ("stack", {"depth": 0}), ("stack", {"length": (1, 1)}), ("keyvalue", {"keys": 0}),
    ("keyvalue", {"keys": 9, "key_length": 1}), ("keyvalue", {"key_length": 0}),
    ("keyvalue", {"value_length": 0}), ("keyvalue", {"key_length": 10 ** 9}), ("modular", {"modulus": 6}),
    ("modular", {"modulus": 1}), ("modular", {"modulus": 257}), ("modular", {"length": (2, 5)}),
    *((name, {"n_tokens": 0}) for name in TASKS)])
def test_options_that_make_no_sense_are_refused_in_one_line(name, options):
    with pytest.raises(UsageError) as error:
        make(name, **options)
    assert str(error.value) and "\n" not in str(error.value)


def test_options_are_the_defaults_of_the_tasks():
    assert OPTIONS["retrieval"] == {"length": (32, 32), "symbols": 8, "noise": 0.0}
    assert OPTIONS["keyvalue"] == {"symbols": 8, "keys": 4, "key_length": 2, "value_length": 2}
    assert set(OPTIONS) == set(TASKS)


def test_tokens_can_be_read():
    assert to_text("copy", [0, 2, 8, 2], {"vocab_size": 9}) == "a c | c"
    assert to_text("modular", [3, 6], {"vocab_size": 7}) == "3 6"
    assert to_text("stack", np.array([99, 100], np.uint8), {"vocab_size": 101}) == "99 ^"
