"""Duplicates: exact, near, and their chains; figures against the exact Jaccard similarity."""

from __future__ import annotations

import random

import numpy as np
import pytest

from equilibrium_mcore.corpus.filters.comparable import comparable_words
from equilibrium_mcore.corpus.filters.hash_set import HashSet64
from equilibrium_mcore.corpus.filters.ngram_hashes import hash_ngrams, hash_text, hash_words


def vocabulary(size: int, generator: random.Random) -> list[str]:
    """Made-up words of letters."""
    letters = "abcdefghijklmnopqrstuvwxyz"
    return sorted({"".join(generator.choices(letters, k=8)) for _ in range(size)})


def changed(
    words: list[str], share: float, generator: random.Random, others: list[str]
) -> list[str]:
    """A copy in which about `share` of the words are others."""
    return [generator.choice(others) if generator.random() < share else word for word in words]


def jaccard(first: str, second: str, n: int = 5) -> float:
    """Of the sets of n words in a row, exactly."""
    sets = []
    for text in (first, second):
        words = comparable_words(text, ["case", "punctuation", "accents"], wanted_by="test")
        sets.append({tuple(words[i : i + n]) for i in range(len(words) - n + 1)})
    return len(sets[0] & sets[1]) / len(sets[0] | sets[1])


@pytest.mark.parametrize(
    ("settings", "stay"),
    [
        ({"normalize": "none"}, [0, 1, 2, 3, 5]),
        ({"normalize": "whitespace"}, [0, 2, 3, 5]),
        ({"normalize": "simplified"}, [0, 3, 5]),
        ({"normalize": "simplified", "ignore": ["punctuation"]}, [0, 2, 3, 5]),
        (
            {"normalize": "simplified", "ignore": ["case", "punctuation", "numbers"]},
            [0, 5],
        ),
    ],
)
def test_exact(settings, stay, chain, kept):
    texts = ["One text, 12.", "One  text,\n12. ", "one text, 12.", "One text: 34", "One text, 12."]
    texts.append("Another text, 12.")
    filters = chain(type="deduplication", **settings)
    assert kept(filters, texts) == stay


def sums(seed: int) -> str:
    """Twenty lines of arithmetic with numbers of their own."""
    draw = random.Random(seed).randrange
    return "\n".join(f"{draw(10, 99)} + {draw(10, 99)} = {draw(100, 200)}" for _ in range(20))


@pytest.mark.parametrize("method", ["exact", "minhash", "simhash"])
def test_numbers_count_unless_a_setting_ignores_them(method, chain, kept):
    texts = [sums(seed) for seed in range(12)]
    settings = dict(type="deduplication", method=method, normalize="simplified")
    assert kept(chain(**settings), [*texts, texts[3]]) == list(range(12))
    prose = dict(ignore=["case", "numbers", "punctuation", "accents"])
    assert kept(chain(**settings, **prose), texts) == [0]
    fullwidth = ["\uff11\uff10 + \uff12 = \uff13", "\uff10 + \uff12 = \uff13"]
    assert kept(chain(**settings), fullwidth) == [0, 1]


@pytest.mark.parametrize("method", ["exact", "minhash", "simhash"])
def test_punctuation_alone_is_not_all_the_same(method, chain, kept):
    settings = dict(type="deduplication", method=method, normalize="simplified")
    assert kept(chain(**settings), ["(((((", "-----", "?!?!", "((((("]) == [0, 1, 2]


@pytest.mark.parametrize("method", ["minhash", "simhash"])
def test_text_without_spaces_is_compared_by_its_characters(method, chain, kept):
    generator = random.Random(4)
    draw = lambda: "".join(chr(0x4E00 + generator.randrange(3000)) for _ in range(400))  # noqa: E731
    texts = [draw() for _ in range(5)]
    changed_in_one = [f"{text[:200]}\u6c34{text[201:]}" for text in texts]
    filters = chain(type="deduplication", method=method)
    assert kept(filters, [*texts, *changed_in_one]) == list(range(5))


def test_the_first_in_reading_order_stays_whoever_computed_it(chain):
    filters = chain(type="deduplication")
    texts = ["a", "b", "a", "c", "b"]
    outcomes = {n: filters.process(texts[n], {}) for n in (4, 2, 0, 3, 1)}
    final = list(filters.resolve(outcomes[n] for n in range(5)))
    assert [o.dropped is None for o in final] == [True, True, False, True, False]
    assert [o.stage for o in final] == [None, None, 0, None, 0]
    again = list(filters.resolve(outcomes[n] for n in range(5)))
    assert again == final  # no index is left from the first pass


def test_order_of_filters_decides_what_counts_as_seen(chain, kept):
    short = dict(type="length", min_length=4)
    texts = ["abc", "abc ", "abc"]
    duplicates = dict(type="deduplication")
    assert kept(chain(short, duplicates), texts) == [1]
    # The first stays for the deduplication and comes after it: its copies are still copies.
    assert kept(chain(duplicates, short), texts) == []


def test_two_deduplications_in_one_chain(chain):
    """Each decides by its own signatures, on what the one before it let through."""
    exact, near = dict(type="deduplication"), dict(type="deduplication", method="minhash")
    line = "the river rises in the hills to the north of the town and it turns west"
    texts = [line, line, f"{line.upper()}!", "another text", "short", f"{line.upper()}!"]
    length = dict(type="length", min_length=6)
    for filters, stages in (
        (chain(exact, length, near), [None, 0, 2, None, 1, 0]),
        (chain(near, length, exact), [None, 0, 0, None, 1, 0]),
    ):
        final = list(filters.resolve([filters.process(text, {}) for text in texts]))
        assert [outcome.stage for outcome in final] == stages
    reasons = [o.dropped.reason for o in final if o.dropped]
    assert reasons.count("near duplicate of an earlier document") == 3


@pytest.mark.parametrize("method", ["minhash", "simhash"])
def test_near_duplicates_of_real_text(method, chain, kept, stdlib_texts):
    texts = [text for text in stdlib_texts["prose"] if len(text.split()) > 300][:10]
    copies = [text.replace(" the ", " THE  ") + " Copied." for text in texts]
    filters = chain(type="deduplication", method=method)
    assert kept(filters, texts) == list(range(len(texts)))
    assert kept(filters, [*texts, *copies]) == list(range(len(texts)))
    assert kept(filters, [*copies, *texts]) == list(range(len(texts)))


def test_minhash_finds_what_its_formula_says(chain):
    """Recall by the exact similarity, against 1 - (1 - s^rows)^bands."""
    generator = random.Random(0)
    words = vocabulary(5000, generator)
    filters = chain(type="deduplication", method="minhash")
    step = filters.filters[0]
    expected, found, unlike = [], [], 0
    for number in range(100):
        original = generator.choices(words, k=150)
        share = (0.005, 0.03, 0.06, 0.3)[number % 4]
        texts = [" ".join(original), " ".join(changed(original, share, generator, words))]
        similarity = jaccard(*texts)
        match = bool((step.signature(texts[0]) == step.signature(texts[1])).any())
        expected.append(1 - (1 - similarity**8) ** 14)
        found.append(match)
        if similarity < 0.3:
            unlike += match
    expected, found = np.array(expected), np.array(found)
    assert unlike == 0
    for low, high in ((0.0, 0.3), (0.3, 0.9), (0.9, 1.0)):
        group = (expected >= low) & (expected <= high)
        assert group.sum() >= 10
        # Three standard errors of a mean of that many coin tosses.
        error = 3 * (expected[group] * (1 - expected[group])).sum() ** 0.5 / group.sum()
        assert abs(found[group].mean() - expected[group].mean()) <= error + 0.01


def test_a_chain_of_small_changes_does_not_carry_everything_off(chain, kept):
    generator = random.Random(1)
    words = vocabulary(5000, generator)
    texts = [generator.choices(words, k=200)]
    for step in range(1, 12):  # each has 18 of 200 words of its own in place of the one before
        start = 18 * (step - 1)
        texts.append(texts[-1][:start] + generator.choices(words, k=18) + texts[-1][start + 18 :])
    lines = [" ".join(text) for text in texts]
    stay = kept(chain(type="deduplication", method="minhash"), lines)
    assert len(stay) >= 3 and stay[0] == 0
    assert all(jaccard(lines[a], lines[b]) < 0.8 for a in stay for b in stay if a < b)


@pytest.mark.parametrize("method", ["exact", "minhash", "simhash"])
def test_texts_without_words(method, chain, kept):
    texts = ["", "one", "one two", "one two", "", "日本語", "half \ud83d pair"]
    assert kept(chain(type="deduplication", method=method), texts) == [0, 1, 2, 5, 6]


def test_signatures_are_the_same_everywhere(chain):
    """They may be computed on other machines: the values are fixed."""
    text = "The quick brown fox jumps over the lazy dog again."

    def first(method: str) -> int:
        return int(chain(type="deduplication", method=method).filters[0].signature(text)[0])

    assert first("exact") == 0xC0692E069A72A3B3 == hash_text(text)
    assert first("minhash") == 0x693C0155D857D566
    assert first("simhash") == 0x709B1C4688C8A8EF


def test_long_documents_take_bounded_memory(chain):
    """The signature in chunks is that of the whole."""
    generator = random.Random(2)
    text = " ".join(generator.choices(vocabulary(3000, generator), k=10_000))
    step = chain(type="deduplication", method="minhash").filters[0]
    shingles = step._step.get_shingles(text)
    whole = np.array(step._step.get_signature(shingles), np.uint64)
    total = step._band_numbers.copy()
    from equilibrium_mcore.corpus.filters.ngram_hashes import mix

    for row in whole.T:
        total = mix(total ^ row)
    assert np.array_equal(step.signature(text), total)


def test_simhash_distance(chain):
    generator = random.Random(3)
    index = chain(type="deduplication", method="simhash", max_distance_bits=3).filters[0].start()
    base = generator.getrandbits(64)
    assert index.decide(np.array([base], np.uint64)) is None
    for bits, dropped in ((1, True), (2, True), (3, True), (4, False)):
        for _ in range(20):
            fresh = (
                chain(type="deduplication", method="simhash", max_distance_bits=3)
                .filters[0]
                .start()
            )
            fresh.decide(np.array([base], np.uint64))
            other = base
            for place in generator.sample(range(64), bits):
                other ^= 1 << place
            assert (fresh.decide(np.array([other], np.uint64)) is not None) == dropped


def test_hash_set_against_pythons():
    generator = np.random.default_rng(0)
    ours, theirs = HashSet64(), set()
    for _ in range(25):
        batch = generator.integers(0, 1 << 64, 400, dtype=np.uint64)
        batch[:50] = batch[50:100]  # the same twice in one batch
        old = generator.choice(np.fromiter(theirs, np.uint64), 100) if theirs else batch[:0]
        asked = np.concatenate([batch, old])
        assert ours.contains(asked).tolist() == [int(h) in theirs for h in asked]
        ours.add(asked)
        theirs.update(map(int, asked))
        assert len(ours) == len(theirs)
    assert ours.contains(np.fromiter(theirs, np.uint64)).all()
    assert 8 * len(ours) < ours.memory_bytes < 28 * len(ours)
    # Hashes that all want one slot.
    crowded = np.arange(1, 2000, dtype=np.uint64) << np.uint64(40)
    ours.add(crowded)
    assert ours.contains(crowded).all() and not ours.contains(crowded + np.uint64(1)).any()
    zero = HashSet64()
    zero.add(np.array([0], np.uint64))
    assert zero.contains(np.array([0], np.uint64)).all()


def test_ngram_hashes_are_of_words_in_order():
    a, b = (hash_ngrams(hash_words(text.split()), 3) for text in ("x y z x y z", "z y x"))
    assert a.size == 4 and a[0] == a[3] and len({*a.tolist(), *b.tolist()}) == 4
    assert hash_ngrams(hash_words(["x"]), 3).size == 0


@pytest.mark.slow
def test_near_duplicates_planted_in_real_text(chain, stdlib_texts, capsys):
    """Shares caught by exact similarity, for docs/reference/filters.md. Run with -s to see them."""
    generator = random.Random(0)
    texts = [text.split()[:1500] for text in stdlib_texts["prose"]]
    texts = [words for words in texts if len(words) >= 100]
    caught: dict[tuple[str, str], list[bool]] = {}
    steps = {m: chain(type="deduplication", method=m).filters[0] for m in ("minhash", "simhash")}
    for number, words in enumerate(texts * 8):
        share = (0.002, 0.01, 0.02, 0.03, 0.05, 0.08, 0.15)[number % 7]
        copy = changed(words, share, generator, generator.choice(texts))
        pair = [" ".join(words), " ".join(copy)]
        similarity = jaccard(*pair)
        band = next(top for top in ("0.5", "0.7", "0.8", "0.9", "1.0") if similarity <= float(top))
        for method, step in steps.items():
            first, second = step.keep(map(step.signature, pair))
            assert first is None
            caught.setdefault((method, band), []).append(second is not None)
    false = dict.fromkeys(steps, 0)
    for method, step in steps.items():
        decisions = step.keep(step.signature(" ".join(words)) for words in texts)
        false[method] = sum(decision is not None for decision in decisions)
    with capsys.disabled():
        print(f"\nof {len(texts)} documents with no copy, dropped: {false}")
        for (method, band), hits in sorted(caught.items()):
            print(f"{method}: similarity up to {band}: {np.mean(hits):.2f} of {len(hits)}")
    assert np.mean(caught["minhash", "1.0"]) > 0.98 and np.mean(caught["simhash", "1.0"]) > 0.95
    assert np.mean(caught["minhash", "0.5"]) < 0.1 and max(false.values()) <= 2
