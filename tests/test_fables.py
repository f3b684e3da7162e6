"""The grammar of the fables keeps its rules, and the floor it promises is exact."""
import math
import re
from collections import Counter
from itertools import combinations, product

import numpy as np
import pytest

from sources import fables
from sources.fables import FACTS, GRAMMAR, Given

TINY = {  # small enough to write out every story; texts, lengths and recalls depend on earlier choices
    "story": {"{first} {second}": 1},
    "first": {"A {beast} named {hero}.": 3, "{Hi} the {beast} {hero}!": 1},
    "Hi": {"See": 1},
    "hero": {"Al": 1, "Barbara": 2},
    "beast": {"cat": 2, "ox": 1},
    "second": Given("beast", {"cat": {"{hero} ate {food}, so {hero} slept.": 1, "The {beast} ate {food}.": 2},
                              "ox": {"Eat, ox! It is {food}.": 1}}),
    "food": Given("hero", {"Al": {"figs": 1, "an egg": 3}, "Barbara": {"mice": 1}}),
}
TINY_FACTS = ("hero", "beast")


def stories(n, seed=0, grammar=GRAMMAR):
    return fables.draw(np.random.default_rng(seed), n, grammar)


def names_in(text):
    return re.findall(r"\{(\w+)\}", text)


def tables_of(name, grammar=GRAMMAR):
    choice = grammar[name]
    return list(choice.table.values()) if isinstance(choice, Given) else [choice]


def texts_of(name, grammar=GRAMMAR):
    return list(dict.fromkeys(text for table in tables_of(name, grammar) for text in table))


def is_open(name):
    return any(len(table) > 1 for table in tables_of(name))


# ---- the rules of the grammar, each checked for every text in it

def walk(text, drawn, visit):
    """Follow a text in every way: visit(name, names drawn before) at each draw; all sets drawn after."""
    states = {drawn}
    for name in names_in(text):
        after = {state for state in states if name in state}
        for state in states - after:
            visit(name, state)
            for option in texts_of(name):
                after |= walk(option, state | {name}, visit)
        states = after
    return states


def clash(a, b, drawn):
    """Whether text a or b can end, or come to a draw, before the two differ, given any choices `drawn`."""
    (a_start, a_name), (b_start, b_name) = (fables.pieces(text)[0] for text in (a, b))
    if not (a_start.startswith(b_start) or b_start.startswith(a_start)):
        return False
    name = a_name if len(a_start) <= len(b_start) else b_name
    if name is None or (is_open(name) and name not in drawn):
        return True
    mention = f"{{{name}}}"
    return any(clash(a.replace(mention, value), b.replace(mention, value), drawn) for value in texts_of(name))


def test_every_open_choice_is_in_every_story_and_after_the_choice_it_depends_on():
    def visit(name, drawn):
        assert not isinstance(GRAMMAR[name], Given) or GRAMMAR[name].parent in drawn, name

    for drawn in walk("{story}", frozenset(), visit):
        assert drawn >= {name for name in GRAMMAR if is_open(name)}


def test_texts_of_a_choice_differ_before_one_ends_or_draws():
    def visit(name, drawn):
        for table in tables_of(name):
            for a, b in combinations(table, 2):
                assert not clash(a, b, drawn), (a, b)

    walk("{story}", frozenset(), visit)


def test_clash_sees_what_the_rule_forbids():
    for a, b in [("in", "in the"), ("{thing} in", "{animal} in"), ("{hero} ran", "{hero} ran off"),
                 ("", "x")]:
        assert clash(a, b, frozenset({"hero"})), (a, b)
    assert not clash("{hero} ran", "{hero} sat", frozenset({"hero"}))


def test_choices_that_depend_on_another_cover_all_its_texts_and_weights_are_positive():
    for name, choice in GRAMMAR.items():
        if isinstance(choice, Given):
            assert set(choice.table) == set(texts_of(choice.parent)), name
        assert all(weight > 0 for table in tables_of(name) for weight in table.values()), name


def test_no_story_can_be_longer_than_255_ascii_characters():
    def longest(name):
        return max(sum(len(literal) + (longest(mention) if mention else 0)
                       for literal, mention in fables.pieces(text)) for text in texts_of(name))

    assert longest("story") <= 255
    assert all(text.isascii() and text.isprintable() for name in GRAMMAR for text in texts_of(name))


# ---- the tiny grammar, by brute force

def write(text, values, mentioned):
    """A text filled in by recursion; adds to `mentioned` each name it comes by."""
    def fill(match):
        mentioned.append(match[1])
        return write(values[match[1]], values, mentioned)
    return re.sub(r"\{(\w+)\}", fill, text)


def all_tiny_stories():
    """[(story, probability, its choices, the names it mentions)]"""
    result = []
    for texts in product(*(texts_of(name, TINY) for name in TINY)):
        values, mentioned, p = dict(zip(TINY, texts)), [], 1.0
        for name, choice in TINY.items():
            weights = choice.table[values[choice.parent]] if isinstance(choice, Given) else choice
            p *= weights.get(values[name], 0) / sum(weights.values())
        if p:
            result.append((write("{story}", values, mentioned), p, values, mentioned))
    return result


def test_probabilities_of_all_tiny_stories_sum_to_one():
    tiny = all_tiny_stories()
    assert len({story for story, *_ in tiny}) == len(tiny) == 18
    assert math.isclose(sum(math.exp(fables.log_prob(story, TINY)) for story, *_ in tiny), 1)
    for story, p, *_ in tiny:
        assert math.isclose(fables.log_prob(story, TINY), math.log(p))


def test_statistics_of_the_tiny_grammar_are_those_of_all_its_stories():
    tiny = all_tiny_stories()
    length = sum(p * (len(story) + 1) for story, p, *_ in tiny)
    entropy = sum(-p * math.log(p) for _, p, *_ in tiny)
    frequency = Counter()
    for _, p, values, _ in tiny:
        frequency.update({(name, values[name]): p for name in TINY_FACTS})
    surprise = {fact: -math.log(p) for fact, p in frequency.items()}
    cost = sum(p * sum((mentioned.count(name) - 1) * surprise[name, values[name]] for name in TINY_FACTS)
               for _, p, values, mentioned in tiny)
    fact_entropy = sum(frequency[fact] * surprise[fact] for fact in frequency)
    expected = {"entropy_per_character": entropy / length, "entropy_per_story": entropy,
                "mean_length": length, "fact_share": fact_entropy / entropy, "forgetting_cost": cost / length}
    assert fables.statistics(TINY, TINY_FACTS) == pytest.approx(expected)


def test_drawn_tiny_stories_have_their_probabilities():
    n = 20000
    counts = Counter(stories(n, grammar=TINY))
    tiny = all_tiny_stories()
    assert set(counts) <= {story for story, *_ in tiny}
    for story, p, *_ in tiny:
        assert abs(counts[story] - n * p) < 4 * math.sqrt(n * p)


# ---- the big grammar

def test_floor_agrees_with_a_sample_of_stories():
    statistics, sample = fables.statistics(), stories(2000)
    lengths = np.array([len(story) + 1 for story in sample])
    surprises = np.array([-fables.log_prob(story) for story in sample])
    excess = surprises - statistics["entropy_per_character"] * lengths  # mean 0 where the ratio is right
    for values, mean in [(lengths, statistics["mean_length"]), (surprises, statistics["entropy_per_story"]),
                         (excess, 0)]:
        assert abs(values.mean() - mean) < 3 * values.std() / math.sqrt(len(sample))


def test_floor_and_worth_of_memory_are_known_numbers():
    statistics = fables.statistics()
    assert statistics["entropy_per_character"] == pytest.approx(0.1071, abs=5e-5)
    assert statistics["forgetting_cost"] == pytest.approx(0.0623, abs=5e-5)


def test_every_story_can_be_read_and_keeps_its_facts_to_the_end():
    for story in stories(500, seed=1):
        facts, sentences = fables.facts(story), re.split(r"(?<=\.) ", story)
        assert tuple(facts) == FACTS and fables.log_prob(story) < 0
        assert 130 <= len(story) <= 255 and len(sentences) == 4
        assert all(facts["hero"] in sentence for sentence in sentences)
        assert all(facts[name] in " ".join(sentences[-2:]) for name in ("home", "thing", "friend"))


@pytest.mark.parametrize("damage", [
    lambda s: "", lambda s: s[:-1], lambda s: s + " ", lambda s: s[:100], lambda s: s.lower(),
    lambda s: s + " " + s,
    lambda s: s.replace("little ", "tiny "), lambda s: "{story}",
    lambda s: s[:len(s) // 2] + s[len(s) // 2:].replace(fables.facts(s)["hero"], "Otto"),
    lambda s: s.replace(fables.facts(s)["home"], "in a hut")])
def test_text_that_the_grammar_cannot_make_has_no_probability(damage):
    story = damage(stories(1)[0])
    with pytest.raises(ValueError):
        fables.log_prob(story)
    assert fables.facts(story) is None


def word_of(fact, facts):
    """What the last sentence calls a fact: the animal by its den."""
    return next(iter(GRAMMAR["den"].table[facts["animal"]])) if fact == "animal" else facts[fact]


def test_facts_are_kept_in_every_story_and_lost_when_their_last_word_changes():
    seen = Counter()
    for story in stories(150, seed=2):
        facts, last, kept = fables.facts(story), fables.sentences(story)[-1], fables.kept(story)
        home = last.startswith("In the")                # an ending that names the den, and no friend
        assert all(kept.values()) and set(kept) == set(fables.RETURNING) - {"friend" if home else "animal"}
        for fact, (told, place, end) in fables.returns(story).items():
            word = word_of(fact, facts)
            assert story[place:end] == word and place >= len(story) - len(last) > told
            assert story[:told].endswith(facts[fact]) and facts[fact] not in story[:told - 1]
            for other in {word_of(fact, fables.facts(another)) for another in stories(20, seed=3)} - {word}:
                changed = story[:place] + other + story[place + len(word):]
                assert fables.kept(changed) == kept | {fact: False}, changed
        seen.update(kept)
    assert set(seen) == set(fables.RETURNING) and min(seen.values()) > 15


def test_kept_takes_any_text():
    story = ("A fix, little Mila, livd by the lake. She lst a red kite. Old Bob slept. "
             "Little Mila, little Mila fly the kite by the lke.")
    assert fables.kept(story) == dict(hero=True, thing=True, home=False)
    for text in ["", ".", "little", "Once little Mila.", "Once little Mila. Then Mila",
                 "Once little Mila. Then little Mila", "\0\n\x7f. x."]:
        assert fables.kept(text) == {}, text
    for text in ["A fox. Now little Mila sat.", "Once little Mila. Now little Tom and little Mila sat.",
                 "Once little Mila. Now little Milan sat."]:
        assert fables.kept(text) == dict(hero=False), text


def test_stream_is_stories_between_separators():
    tokens, starts = fables.generate(np.random.default_rng(0), 20000)
    assert tokens.dtype == np.uint8 and starts.dtype == np.uint64 and tokens.max() < fables.VOCAB_SIZE
    assert tokens[0] == tokens[-1] == fables.SEPARATOR and starts[0] == 0
    ends = np.append(starts[1:], np.uint64(len(tokens) - 1))
    texts = [tokens[a + 1:b].tobytes().decode("ascii") for a, b in zip(starts.astype(int), ends.astype(int))]
    assert all(fables.log_prob(text) < 0 for text in texts)
    assert len(tokens) - len(texts[-1]) - 1 < 20000 <= len(tokens)


def test_stream_depends_on_the_seed_and_a_longer_one_begins_with_the_shorter():
    short, again, longer, other = (fables.generate(np.random.default_rng(seed), n)[0]
                                   for seed, n in [(0, 3000), (0, 3000), (0, 2_000_000), (1, 3000)])
    assert np.array_equal(short, again) and np.array_equal(short, longer[:len(short)])
    assert not np.array_equal(short[:3000], other[:3000])
