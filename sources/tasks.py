"""Five synthetic tasks that ask one thing: was it remembered? Each is a stream of short documents with a few
targets.

    python data.py --dataset=stack --depth=8 --length=32-64    # prepare one of them, with its options

A task draws whole documents until there are n_tokens tokens, and returns

    tokens   (N,) uint8    all documents, one after the other
    targets  (N,) uint8    what is asked after each token was read; NO_TARGET (255) where nothing is asked
    starts   (D,) uint64   where each document begins
    vocab_size

all drawn from `rng`: the same generator state gives the same documents. Symbols are tokens 0, 1, ..; a task's
marker, if it has one, is the token after the last symbol. `length` is a pair (low, high), drawn anew for each
document, both ends included. Options that make no sense raise UsageError. In the examples `.` stands for
NO_TARGET and a, b, c for symbols.
"""
import math
import string

import numpy as np

from lib.cli import UsageError

NO_TARGET = 255


def retrieval(rng, n_tokens, *, length=(32, 32), symbols=8, noise=0.0):
    """Which symbol followed the marker? Marker and needle are in the first half, the question is asked at the
    end.

        x  c a ? b d a c a d ?
        y  . . . . . . . . . b

    length: tokens. noise: the probability that the answer is replaced by a random symbol (which may be the
    right one).
    """
    check_symbols(symbols)
    check(0 <= noise <= 1, f"noise is a probability, not {noise}")
    size = draw_sizes(rng, n_tokens, length, shortest=4)
    documents, marker = np.arange(len(size)), symbols
    x = rng.integers(symbols, size=(len(size), size.max()), dtype=np.uint8)
    y = np.full_like(x, NO_TARGET)
    at = rng.integers(size // 2 - 1)  # 0 .. size // 2 - 2
    x[documents, at] = marker
    x[documents, size - 1] = marker
    noisy = rng.random(len(size)) < noise
    y[documents, size - 1] = np.where(noisy, rng.integers(symbols, size=len(size)), x[documents, at + 1])
    return *pack(x, y, size), symbols + 1


def copy(rng, n_tokens, *, length=(6, 6), symbols=8):
    """Say the string backwards.

        x  a c b b | b b c
        y  . . . . b b c a

    length: symbols in the string, so that a document has twice as many tokens.
    """
    check_symbols(symbols)
    n = draw_sizes(rng, n_tokens, length, shortest=1, tokens=lambda n: 2 * n)[:, None]        # (D, 1)
    strings = rng.integers(symbols, size=(len(n), n.max()), dtype=np.uint8)

    i = np.arange(2 * n.max())                                                          # places in a document
    x = np.take_along_axis(strings, np.where(i < n, i, 2 * n - i).clip(0, n - 1), 1)          # (D, 2 n)
    x[i == n] = symbols
    y = np.where(i < n, NO_TARGET, np.take_along_axis(strings, (2 * n - 1 - i).clip(0, n - 1), 1))
    return *pack(x, y, 2 * n[:, 0]), symbols + 1


def stack(rng, n_tokens, *, length=(32, 32), symbols=8, depth=4):
    """Push a symbol, or pop (^) and say which symbol came off the stack.

        x  a c ^ b ^ ^ c
        y  . . c . b a .

    length: operations. depth: the greatest height of the stack; below it and above 0 a coin decides between
    push and pop.
    """
    check_symbols(symbols)
    check(depth >= 1, f"depth must be at least 1, not {depth}")
    size = draw_sizes(rng, n_tokens, length, shortest=2)
    documents, pop = np.arange(len(size)), symbols
    x = rng.integers(symbols, size=(len(size), size.max()), dtype=np.uint8)
    y = np.full_like(x, NO_TARGET)
    stacks = np.zeros((len(size), min(depth, size.max())), np.uint8)
    height = np.zeros(len(size), int)
    for i in range(size.max()):
        pops = (height == depth) | ((height > 0) & (rng.random(len(size)) < 0.5))
        popping, pushing = documents[pops], documents[~pops]
        x[popping, i] = pop
        y[popping, i] = stacks[popping, height[popping] - 1]
        stacks[pushing, height[pushing]] = x[pushing, i]
        height += np.where(pops, -1, 1)
    return *pack(x, y, size), symbols + 1


def keyvalue(rng, n_tokens, *, symbols=8, keys=4, key_length=2, value_length=2):
    """Look up the value of a key. Keys are distinct; keys and values are made of the same symbols.

        x  ab cc  ba db  ca aa ? b a d        (two symbols a key and two a value; without the spaces)
        y  .. ..  .. ..  .. .. . . d b
    """
    check_symbols(symbols)
    for name, value in [("keys", keys), ("key_length", key_length), ("value_length", value_length)]:
        check(value >= 1, f"{name} must be at least 1, not {value}")
    check(key_length * math.log2(symbols) < 62, f"keys of {key_length} symbols out of {symbols} are too long")
    n_possible = symbols ** key_length
    check(keys <= n_possible, f"{symbols} symbols make {n_possible} keys of length {key_length}, not {keys}")
    tokens_each = (keys + 1) * (key_length + value_length)  # a marker more, the answer's last symbol less
    size = draw_sizes(rng, n_tokens, (tokens_each, tokens_each), shortest=tokens_each)

    key = np.zeros((len(size), keys), np.int64)  # as numbers; Floyd's sampling draws distinct ones
    for i, last in enumerate(range(n_possible - keys, n_possible)):
        drawn = rng.integers(last + 1, size=len(size))
        key[:, i] = np.where((key[:, :i] == drawn[:, None]).any(1), last, drawn)
    key = rng.permuted(key, axis=1)
    key = key[:, :, None] // symbols ** np.arange(key_length) % symbols                # (D, keys, key_length)
    value = rng.integers(symbols, size=(len(size), keys, value_length), dtype=np.uint8)
    key = key.astype(np.uint8)
    pairs = np.concatenate([key, value], 2).reshape(len(size), -1)
    asked = rng.integers(keys, size=len(size))
    asked_key, asked_value = (part[np.arange(len(size)), asked] for part in (key, value))
    x = np.concatenate([pairs, np.full((len(size), 1), symbols, np.uint8), asked_key, asked_value[:, :-1]], 1)
    y = np.full_like(x, NO_TARGET)
    y[:, -value_length:] = asked_value
    return *pack(x, y, size), symbols + 1


def modular(rng, n_tokens, *, length=(16, 16), modulus=7):
    """Find the rule r = (w a + b) mod p from pairs a, r, and apply it; each document has its own w (not 0)
    and b.

        x  3 4 1 5 3 4 6 6        (p = 7, w = 3, b = 2)
        y  . . . . 4 . 6 .

    length: pairs. A result is asked only where the pairs before determine it: this a was there, or two
    different ones were (enough because p is prime), so that the best accuracy is 1.
    """
    check_symbols(modulus, markers=0)
    check(all(modulus % i for i in range(2, modulus)), f"modulus must be a prime number, not {modulus}")
    pairs = draw_sizes(rng, n_tokens, length, shortest=3, tokens=lambda pairs: 2 * pairs)
    w = rng.integers(1, modulus, size=(len(pairs), 1))
    b = rng.integers(modulus, size=(len(pairs), 1))
    a = rng.integers(modulus, size=(len(pairs), pairs.max()))
    results = (w * a + b) % modulus
    documents, seen = np.arange(len(pairs)), np.zeros((len(pairs), modulus), bool)
    determined = np.zeros(a.shape, bool)
    for i in range(pairs.max()):
        determined[:, i] = seen[documents, a[:, i]] | (seen.sum(1) >= 2)
        seen[documents, a[:, i]] = True
    x = np.stack([a, results], 2).reshape(len(pairs), -1)
    y = np.stack([np.where(determined, results, NO_TARGET), np.full_like(a, NO_TARGET)], 2)
    y = y.reshape(len(pairs), -1)
    return *pack(x, y, 2 * pairs), modulus


TASKS = {"retrieval": retrieval, "copy": copy, "stack": stack, "keyvalue": keyvalue, "modular": modular}
OPTIONS = {name: dict(task.__kwdefaults__) for name, task in TASKS.items()}  # {task: {option: default}}
MARKERS = {"retrieval": "?", "copy": "|", "stack": "^", "keyvalue": "?", "modular": ""}


def to_text(name, tokens, meta):
    """A line to read: symbols as letters, the marker as a sign; numbers where the letters do not suffice."""
    n_symbols = meta["vocab_size"] - len(MARKERS[name])
    as_letters = name != "modular" and n_symbols <= len(string.ascii_letters)
    letters = string.ascii_letters if as_letters else range(n_symbols)
    signs = [str(letter) for letter in letters[:n_symbols]] + list(MARKERS[name])
    return " ".join(signs[token] for token in tokens)


# ---- what the tasks share

def check(condition, message):
    """UsageError with this message unless the condition holds."""
    if not condition:
        raise UsageError(message)


def check_symbols(symbols, markers=1):
    """UsageError unless so many symbols, and a task's markers, fit into a byte beside NO_TARGET."""
    most = NO_TARGET - markers
    check(2 <= symbols <= most, f"a task has 2 to {most} symbols, not {symbols}")


def draw_sizes(rng, n_tokens, length, shortest, tokens=lambda length: length):
    """(D,) lengths of the first documents that together have n_tokens tokens, where one of length n has
    tokens(n)."""
    low, high = length
    check(shortest <= low <= high, f"length is LOW-HIGH with {shortest} <= LOW <= HIGH, not {low}-{high}")
    check(n_tokens >= 1, f"at least one token is needed, not {n_tokens}")
    lengths = rng.integers(low, high + 1, size=-(-n_tokens // tokens(low)))
    enough = np.searchsorted(tokens(lengths).cumsum(), n_tokens)
    return lengths[:enough + 1]


def pack(x, y, size):
    """Rows (D, T) of which the first size[d] columns count -> tokens (N,), targets (N,), starts (D,)."""
    counts = np.arange(x.shape[1]) < size[:, None]
    starts = np.concatenate([[0], size.cumsum()[:-1]])
    return x[counts].astype(np.uint8), y[counts].astype(np.uint8), starts.astype(np.uint64)
