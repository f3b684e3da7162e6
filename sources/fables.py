"""Fables: short stories from a grammar whose every probability is known, so that the best possible loss is
known too.

    python data.py --dataset=fables                        # prepare the data set that training uses
    python -c "from sources import fables; print(fables.examples(3))"   # read a few stories
    python -c "from sources import fables; print(fables.statistics())"  # the floor: no model can beat it

A grammar maps names to choices. A choice is {text: weight}, or Given(another choice, {its text: {text:
weight}}). A text may mention choices as {name}: the first mention in a story draws the choice, every later
one repeats it. That is all, and it makes stories that have to be remembered: the hero drawn in the first
sentence comes back in the last.

Two rules, which the tests check for the whole grammar, make the probability of a story exact and easy:
  1. every choice between several texts is mentioned in every story, and drawn after the choice it depends on;
  2. wherever a choice is drawn, its texts differ before any of them ends or draws a further choice.
A story is read from left to right without ever going back, its choices are certain, its log-probability is
the sum of theirs.
"""
import functools
import math
import re
from typing import NamedTuple

import numpy as np

SEPARATOR = 0     # the token before and after every story
VOCAB_SIZE = 128  # ASCII


class Given(NamedTuple):
    """A choice that depends on another: `table` gives {text: weight} for each text of the choice `parent`."""
    parent: str
    table: dict


def follows(parent, **words):
    """A choice with nothing left to choose: one word for each text of the choice `parent`."""
    return Given(parent, {text: {word: 1} for text, word in words.items()})


GIRLS = {"Mila": 5, "Nora": 4, "Ruby": 3, "Lily": 3}
BOYS = {"Tom": 5, "Ben": 4, "Finn": 3, "Hugo": 3}
ANIMALS = {"fox": 7, "mouse": 6, "bear": 5, "hare": 5, "frog": 4, "duck": 4, "cat": 3, "goat": 3}


def pronoun(girl, boy):
    """One word if the hero is a girl, another if a boy."""
    return Given("hero", {**{name: {girl: 1} for name in GIRLS}, **{name: {boy: 1} for name in BOYS}})


USES = dict(kite="fly", ball="throw", drum="beat", boat="sail", bell="ring", hat="wear", lamp="light",
            book="read", flute="play", scarf="wear", sled="ride", ring="wear")

GRAMMAR = {
    "story": {"{opening} {trouble} {rescue} {ending}": 1},

    "opening": {"Once little {hero} the {animal} lived {home}.": 5,
                "Far away {home} lived little {hero} the {animal}.": 3,
                "A {animal}, little {hero}, had a {den} {home}.": 2},
    "animal": ANIMALS,
    "hero": GIRLS | BOYS,
    "home": {"by the lake": 6, "in the woods": 5, "on the hill": 5, "near the sea": 4, "at the farm": 4,
             "in the mill": 3, "by the bridge": 3, "in the barn": 2},
    "den": follows("animal", fox="den", mouse="nest", bear="cave", hare="hole", frog="pool", duck="nest",
                   cat="bed", goat="shed"),
    "his": pronoun("her", "his"),

    "trouble": {"One day little {hero} lost a {colour} {thing} {spot}.": 5,
                "One night little {hero} dropped {his} {colour} {thing} {spot}.": 3,
                "But little {hero} let {his} {colour} {thing} fall {spot}.": 3},
    "colour": {"red": 6, "blue": 5, "green": 4, "white": 3, "gold": 2, "pink": 2},
    "thing": {"kite": 6, "ball": 6, "drum": 5, "boat": 5, "bell": 4, "hat": 4, "lamp": 4, "book": 3,
              "flute": 3, "scarf": 3, "sled": 2, "ring": 2},
    "use": follows("thing", **USES),
    "spot": {"in the river": 5, "down a well": 4, "into a hole": 4, "over a wall": 3, "under a rock": 3,
             "in the mud": 2},

    "rescue": {"Soon old {friend} the {pal} {fetch} for {hero}.": 5,
               "Then old {friend} the {pal} {fetch} for {hero}.": 4,
               "A {pal}, old {friend}, {fetch} for {hero}.": 2},
    "friend": {"Otto": 5, "Pip": 5, "Gus": 4, "Dora": 4, "Walt": 3, "Una": 3, "Vera": 2, "Kira": 2},
    "pal": Given("animal", {mine: {other: weight for other, weight in ANIMALS.items() if other != mine}
                            for mine in ANIMALS}),
    "fetch": Given("spot", {"in the river": {"swam after it": 3, "caught it": 2, "dived in": 1},
                            "down a well": {"pulled it up": 3, "hooked it": 2},
                            "into a hole": {"dug it out": 4, "crawled in": 2},
                            "over a wall": {"threw it back": 3, "went after it": 2},
                            "under a rock": {"dragged it out": 3, "moved the rock": 2},
                            "in the mud": {"fished it out": 3, "wiped it clean": 1}}),

    "ending": {"Now little {hero} and old {friend} {use} the {thing} {home}.": 4,
               "So old {friend} and little {hero} {use} the {thing} {home}.": 3,
               "Back {home} little {hero} let old {friend} {use} the {thing}.": 3,
               "In the {den} {home} little {hero} kept the {thing}.": 2},
}
FACTS = ("hero", "animal", "home", "thing", "friend")  # what can come back later


def options(grammar, name, known):
    """{text: probability} of a choice, given the text of the choice that it depends on."""
    choice = grammar[name]
    weights = choice.table[known[choice.parent]] if isinstance(choice, Given) else choice
    total = sum(weights.values())
    return {text: weight / total for text, weight in weights.items()}


@functools.cache
def pieces(text):
    """'a {b} c' -> (('a ', 'b'), (' c', None)): the literal parts, each with the name mentioned after it."""
    parts = re.split(r"\{(\w+)\}", text) + [None]
    return tuple(zip(parts[::2], parts[1::2]))


# ---- writing stories

def draw(rng, n_stories, grammar=GRAMMAR):
    """A list of stories. All stories draw a choice at once, then each fills in its texts."""
    drawn = {}  # name -> (index of the text drawn for each story, all texts)
    for name, choice in grammar.items():
        parent, table = choice if isinstance(choice, Given) else (None, {None: choice})
        texts = list(dict.fromkeys(text for weights in table.values() for text in weights))
        rows, row_texts = drawn[parent] if parent else (np.zeros(n_stories, int), [None])
        weights = np.array([[table[row].get(text, 0) for text in texts] for row in row_texts], float)
        cumulative = weights.cumsum(1)                                      # (texts of the parent, texts)
        cumulative /= cumulative[:, -1:]
        drawn[name] = ((rng.random((n_stories, 1)) >= cumulative[rows]).sum(1), texts)
    columns = [np.array(texts, object)[index] for index, texts in drawn.values()]
    stories = []
    for row in zip(*columns):
        values, story = dict(zip(drawn, row)), "{story}"
        while "{" in story:
            story = story.format_map(values)
        stories.append(story)
    return stories


def examples(n_stories, seed=0):
    """A few stories, one a line."""
    return "\n".join(draw(np.random.default_rng(seed), n_stories))


def generate(rng, n_tokens, grammar=GRAMMAR):
    """The stream 0 story 0 story 0 ... story 0 with at least n_tokens tokens, cut after a whole story.

    Returns tokens (N,) uint8 and starts (D,) uint64, the places of the separators that open a story. With the
    same rng a longer stream begins with the shorter one.
    """
    stories, enough = [], 1
    while enough < n_tokens or not stories:
        for story in draw(rng, 4096, grammar):
            stories.append(story)
            enough += len(story) + 1
            if enough >= n_tokens:
                break
    text = "\0" + "\0".join(stories) + "\0"
    tokens = np.frombuffer(text.encode("ascii"), np.uint8).copy()
    return tokens, np.flatnonzero(tokens == SEPARATOR)[:-1].astype(np.uint64)


# ---- reading stories

def head(grammar, text, known):
    """The start of a text, filled in with what is known, up to the first choice that is still open."""
    while mention := re.search(r"\{(\w+)\}", text):
        name = mention[1]
        texts = [known[name]] if name in known else list(options(grammar, name, known))
        if len(texts) > 1:
            return text[:mention.start()]
        text = text[:mention.start()] + texts[0] + text[mention.end():]
    return text


def read(story, grammar=GRAMMAR):
    """The choices of a story, {name: text}, and its log-probability; ValueError if the grammar cannot make
    it."""
    known, log_p, at = {}, 0.0, 0

    def follow(text):
        nonlocal log_p, at
        for literal, name in pieces(text):
            if not story.startswith(literal, at):
                raise ValueError(f"no story goes on from {story[:at]!r} with {story[at:at + 20]!r}")
            at += len(literal)
            if name is None:
                break
            if name not in known:
                fits = [(option, p) for option, p in options(grammar, name, known).items()
                        if story.startswith(head(grammar, option, known), at)]
                if not fits:
                    raise ValueError(f"no {name} goes on from {story[:at]!r} with {story[at:at + 20]!r}")
                (known[name], p), = fits  # one at most: rule 2
                log_p += math.log(p)
            follow(known[name])

    follow("{story}")
    if at < len(story):
        raise ValueError(f"the story should have ended before {story[at:at + 20]!r}")
    return known, log_p


def log_prob(story, grammar=GRAMMAR):
    """Log-probability in nats of a story's characters and of its end; ValueError if the grammar cannot make
    it."""
    return read(story, grammar)[1]


def facts(story):
    """The story's hero, home, friend and so on, {name: text}; None if the grammar cannot make the story."""
    try:
        known, _ = read(story)
    except ValueError:
        return None
    return {name: known[name] for name in FACTS}


# Of each fact that comes back: the sentence that tells it, what it looks like there, and in the end.
HOME = r"\b((?:by|in|on|near|at) the \w+)"
COLOURS, VERBS = "|".join(GRAMMAR["colour"]), "|".join(dict.fromkeys([*USES.values(), "kept"]))
RETURNING = {
    "hero": (0, r"\blittle ([A-Z]\w*)", r"\blittle ([A-Z]\w*)"),
    "animal": (0, rf"\b({'|'.join(ANIMALS)})\b", r"\bIn the (\w+)"),       # the last sentence names its den
    "friend": (2, r"\bold ([A-Z]\w*)", r"\bold ([A-Z]\w*)"),
    "thing": (1, rf"\b(?:{COLOURS}) (\w+)", rf"\b(?:{VERBS}) the (\w+)"),
    "home": (0, HOME, HOME),
}


def sentences(story):
    """The sentences of a text, each with its full stop."""
    return re.split(r"(?<=\.) ", story)


def returns(story):
    """{fact: (told, begin, end)} of a story that the grammar has made, for the facts that its last sentence
    mentions: the place after the fact where it is told, and where it comes back, story[begin:end]."""
    *before, last = sentences(story)
    found = {}
    for fact, (i, first_pattern, pattern) in RETURNING.items():
        if back := re.search(pattern, last):
            start = sum(len(sentence) + 1 for sentence in before[:i])
            told = start + re.search(first_pattern, before[i]).end(1)
            found[fact] = told, *(len(story) - len(last) + place for place in back.span(1))
    return found


def kept(story):
    """{fact: bool} of the facts that the last sentence mentions: whether all mentions are what the story has
    told. Takes any text, a model's failures too; one of less than two sentences, or whose last one is not
    finished, mentions nothing."""
    *told, last = sentences(story)
    result = {}
    for fact, (i, first_pattern, pattern) in RETURNING.items():
        mentions = set(re.findall(pattern, last)) if told and last.endswith(".") else set()
        first = re.search(first_pattern, told[i]) if i < len(told) else None
        word = first and first[1]
        if fact == "animal" and word:
            word, = GRAMMAR["den"].table[word]
        if mentions:
            result[fact] = mentions == {word}
    return result


# ---- what is known about all stories

def outcomes(grammar, name, known):
    """All texts that a choice can have, given the known choices: pairs (probability, known and what was
    drawn)."""
    if name in known:
        yield 1.0, known
        return
    parent = getattr(grammar[name], "parent", None)
    for p, now in outcomes(grammar, parent, known) if parent else [(1.0, known)]:
        for text, q in options(grammar, name, now).items():
            yield p * q, {**now, name: text}


def expected(grammar, measure, name="story", known=None):
    """The expectation of the sum of measure(name, text) over all mentions in a story (the first and the later
    ones).

    An expectation of a sum is the sum of expectations, so each mention is followed by itself: stories need
    not be enumerated. What is known is all that a choice and its parents can depend on, so each probability
    is exact.
    """
    total = 0.0
    for p, now in outcomes(grammar, name, known or {}):
        inner = sum(expected(grammar, measure, mention, now) for _, mention in pieces(now[name]) if mention)
        total += p * (measure(name, now[name]) + inner)
    return total


def statistics(grammar=GRAMMAR, facts=FACTS):
    """What no model can beat, and what memory is worth. Exact, from the grammar alone. All in nats and
    characters.

    entropy_per_character  entropy_per_story / mean_length: the lowest possible loss, the end token's included
    entropy_per_story      the sum of the entropies of the choices
    mean_length            characters of a story + 1 for its end
    fact_share             the part of the entropy that is spent on the choices that come back, `facts`
    forgetting_cost        what a model pays per character on top of the floor if it knows the
                           grammar, but guesses each fact from its overall frequencies when it comes back
    """
    entropy = {name: sum(-p * math.log(options(grammar, name, now)[now[name]])
                         for p, now in outcomes(grammar, name, {})) for name in grammar}
    frequency = {name: {} for name in facts}
    for name, table in frequency.items():
        for p, now in outcomes(grammar, name, {}):
            table[now[name]] = table.get(now[name], 0.0) + p
    mean_length = 1 + expected(grammar, lambda _, text: sum(len(literal) for literal, _ in pieces(text)))
    def cost(name, text):
        return -math.log(frequency[name][text]) if name in facts else 0.0
    mentions = expected(grammar, cost)
    first_mentions = sum(-p * math.log(p) for table in frequency.values() for p in table.values())
    per_story = sum(entropy.values())
    return {"entropy_per_character": per_story / mean_length,
            "entropy_per_story": per_story,
            "mean_length": mean_length,
            "fact_share": sum(entropy[name] for name in facts) / per_story,
            "forgetting_cost": (mentions - first_mentions) / mean_length}
