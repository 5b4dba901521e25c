"""BLEU against sacreBLEU and fairseq's own scorer; its intervals, with a known truth."""

import math

import numpy as np
import pytest
import sacrebleu
from hypothesis import given, settings
from hypothesis import strategies as st
from sacrebleu.metrics.bleu import BLEU
from sacrebleu.significance import PairedTest

from lskd_study.stats import bleu
from lskd_study.stats.bootstrap import resampled_means
from lskd_study.stats.intervals import crossed_interval

pytestmark = pytest.mark.unit

WORDS = ["the", "cat", "sat", "on", "a", "mat", "dogs", "ran", "away", "quickly"]


def corpus(rng, sentences=40, length=9, right=0.75):
    """References and hypotheses of random words, a little shorter or longer than the reference."""
    references, hypotheses = [], []
    for _ in range(sentences):
        words = list(rng.choice(WORDS, rng.integers(3, 2 * length)))
        own = [w if rng.random() < right else str(rng.choice(WORDS)) for w in words]
        references.append(" ".join(words))
        hypotheses.append(" ".join(own[: len(own) - rng.integers(0, 2)]))
    return hypotheses, references


def test_bleu_is_sacrebleus_on_detokenised_text():
    hypotheses = ["The cat's on the mat, isn't it?", "", "Dogs ran away (quickly)."]
    references = ["The cat is on the mat, isn't it?", "Yes.", "The dogs ran away (quickly)."]
    found = bleu.score(hypotheses, references)
    assert found.value == pytest.approx(sacrebleu.corpus_bleu(hypotheses, [references]).score, abs=1e-12)
    assert found.signature == f"nrefs:1|case:mixed|eff:no|tok:13a|smooth:exp|version:{sacrebleu.__version__}"
    assert found.statistics.shape == (3, 10)
    assert bleu.score(hypotheses, references, tokenised=True).value != pytest.approx(found.value)
    assert "tok:none" in bleu.score(hypotheses, references, tokenised=True).signature
    for one, other in ((hypotheses[1:], references), (hypotheses, references[1:])):
        with pytest.raises(ValueError, match="argument 2 is"):
            bleu.score(one, other)


def test_tokenised_bleu_is_what_fairseq_generate_reports():
    from fairseq.data import Dictionary
    from fairseq.scoring.bleu import BleuConfig, Scorer

    hypotheses, references = corpus(np.random.default_rng(0))
    hypotheses[3] += " &apos;s @-@ <unk>"
    references[3] += " &apos;s @-@ <<unk>>"
    vocabulary = Dictionary()
    scorer = Scorer(BleuConfig(pad=vocabulary.pad(), eos=vocabulary.eos(), unk=vocabulary.unk()))
    for hypothesis, reference in zip(hypotheses, references, strict=True):
        # As fairseq_cli.generate does where subwords were joined.
        target = vocabulary.encode_line(reference, add_if_not_exist=True)
        scorer.add(target, vocabulary.encode_line(hypothesis, add_if_not_exist=True))
    found = bleu.score(hypotheses, references, tokenised=True)
    assert found.value == pytest.approx(scorer.score(), abs=1e-9)
    totals = found.statistics.sum(0)
    assert (totals[0], totals[1]) == (scorer.stat.predlen, scorer.stat.reflen)


@given(st.integers(1, 30), st.integers(1, 9), st.floats(0, 1), st.integers(0, 2**32 - 1))
@settings(max_examples=60, deadline=None)
def test_bleu_of_sums_is_sacrebleus_whatever_matches(sentences, length, right, seed):
    rng = np.random.default_rng(seed)
    references = [" ".join(rng.choice(WORDS, rng.integers(1, 2 * length))) for _ in range(sentences)]
    hypotheses = [
        " ".join(w for w in r.split() if rng.random() < right) for r in references
    ]  # empty ones included
    found = bleu.score(hypotheses, references, tokenised=True)
    totals = found.statistics.sum(0)[None]
    assert bleu.bleu_of_sums(totals)[0] == pytest.approx(found.value, abs=1e-12)
    reference = sacrebleu.corpus_bleu(hypotheses, [references], tokenize="none", force=True)
    assert found.value == pytest.approx(reference.score, abs=1e-12)


def test_pseudo_values_equal_the_jackknife_done_by_leaving_out():
    hypotheses, references = corpus(np.random.default_rng(1), sentences=12)
    whole = sacrebleu.corpus_bleu(hypotheses, [references]).score
    left = [
        sacrebleu.corpus_bleu(
            hypotheses[:i] + hypotheses[i + 1 :], [references[:i] + references[i + 1 :]]
        ).score
        for i in range(12)
    ]
    pseudo = 12 * whole - 11 * np.array(left)
    found = bleu.pseudo_values(bleu.score(hypotheses, references).statistics)
    assert found.mean() == pytest.approx(whole)
    np.testing.assert_allclose(found, pseudo - pseudo.mean() + whole, rtol=1e-9)
    one = bleu.score(hypotheses[:1], references[:1])
    assert bleu.pseudo_values(one.statistics) == pytest.approx(one.value)


@pytest.mark.parametrize(
    ("matching", "said"), [(5, ""), (4, "4-grams of the references in 4 of 30"), (0, "in 0 of 30")]
)
def test_too_few_matches_are_said(matching, said):
    references = ["the cat sat on a mat"] * 30
    hypotheses = ["the cat sat on a mat"] * matching + ["the cat sat"] * (30 - matching)
    found = bleu.too_few_matches(bleu.score(hypotheses, references).statistics)
    assert said in found
    assert bool(found) == bool(said)


@pytest.mark.parametrize("right", [0.68, 0.6, 0.5])
def test_the_bootstraps_p_value_is_two_sided_and_agrees_with_its_interval(right):
    rng = np.random.default_rng(2)
    references = corpus(rng, sentences=80)[1]
    first, second = (
        bleu.score(
            [
                " ".join(w if rng.random() < share else str(rng.choice(WORDS)) for w in line.split())
                for line in references
            ],
            references,
        )
        for share in (0.7, right)
    )
    found = bleu.paired_bootstrap(first, second)
    assert found.value == pytest.approx(second.value - first.value)
    both = np.concatenate([first.statistics, second.statistics], axis=1).astype(float)
    sums = np.rint(resampled_means(both, bleu.REPLICATES, bleu.SEED) * 80).astype(int)
    gaps = bleu.bleu_of_sums(sums[:, 10:]) - bleu.bleu_of_sums(sums[:, :10])
    assert (found.low, found.high) == pytest.approx(tuple(np.percentile(gaps, [2.5, 97.5])))
    one_sided = min((gaps <= 0).mean(), (gaps >= 0).mean())
    assert found.p_value == pytest.approx(2 * one_sided, abs=3e-3)
    assert (found.p_value < 0.05) == (not found.low <= 0 <= found.high)
    back = bleu.paired_bootstrap(second, first)
    assert (back.low, back.high, back.p_value) == pytest.approx((-found.high, -found.low, found.p_value))


def test_the_draws_are_as_many_as_sacrebleus():
    hypotheses, references = corpus(np.random.default_rng(3))
    systems = [("one", hypotheses), ("other", hypotheses[::-1])]
    theirs = PairedTest(systems, {"BLEU": BLEU(references=[references])}, None, test_type="bs")
    signatures, scores = theirs()
    assert f"bs:{bleu.REPLICATES}|seed:{bleu.SEED}|" in signatures["BLEU"].format()
    assert scores["BLEU"][0].score == pytest.approx(bleu.score(hypotheses, references).value)


def test_two_runs_that_translate_alike_are_not_significant():
    same = bleu.score(*corpus(np.random.default_rng(3)))
    found = bleu.paired_bootstrap(same, same)
    assert (found.value, math.isnan(found.low), math.isnan(found.p_value)) == (0.0, True, True)
    assert "no sentence differs" in found.note


def test_a_run_that_matches_nothing_has_no_bootstrap_interval():
    hypotheses, references = corpus(np.random.default_rng(3))
    first, nothing = (bleu.score(h, references) for h in (hypotheses, ["never"] * len(references)))
    found = bleu.paired_bootstrap(first, nothing)
    assert found.value == pytest.approx(-first.value)
    assert math.isnan(found.low)
    assert "1-grams" in found.note


# A simulation with a known truth: words are right or wrong, one after the other, with odds that a sentence, a
# seed and an arm share; n-grams match where n words in a row are right. Both arms are drawn alike: the true
# difference is zero, so what excludes it is a false alarm.

SEEDS = 3


def right_words(rng, lengths, odds):
    """Statistics ``(SEEDS, N, 10)`` of hypotheses whose words are right with the given odds (logarithms)."""
    own = np.maximum(lengths + rng.integers(-1, 2, odds.shape), 1)
    places = np.arange(own.max())
    right = (rng.random((*odds.shape, len(places))) < 1 / (1 + np.exp(-odds[..., None]))) & (
        places < own[..., None]
    )
    matches, run = [right.sum(-1)], right
    for n in (1, 2, 3):
        run = run[..., :-1] & right[..., n:]
        matches.append(run.sum(-1))
    totals = [np.maximum(own - n, 0) for n in range(4)]
    return np.stack([own, np.broadcast_to(lengths, own.shape), *matches, *totals], axis=-1)


def two_arms(rng, sentences, length, level, seed_noise, effect=0.0):
    lengths = 1 + rng.negative_binomial(3, 3 / (2 + length), sentences)
    easy = level + rng.standard_normal(sentences)
    arms = []
    for shift in (0.0, effect):
        odds = shift + easy + 0.2 * rng.standard_normal(sentences)
        odds = odds + seed_noise * rng.standard_normal((SEEDS, 1))
        arms.append(right_words(rng, lengths, odds + 0.7 * rng.standard_normal((SEEDS, sentences))))
    return arms


def interval_of(arms):
    values = [[bleu.pseudo_values(one) for one in arm] for arm in arms]
    return crossed_interval(np.subtract(values[1], values[0]))


@pytest.mark.parametrize(
    ("sentences", "length", "level", "seed_noise"),
    [(500, 15, 0.8, 0.0), (500, 15, 0.8, 0.1), (150, 5, -0.5, 0.05)],
)
def test_intervals_of_bleu_keep_their_coverage(sentences, length, level, seed_noise):
    rng = np.random.default_rng(21)
    tables, missed, kept = 120, 0, 0
    for _ in range(tables):
        arms = two_arms(rng, sentences, length, level, seed_noise)
        if any(bleu.too_few_matches(one) for arm in arms for one in arm):
            continue
        found = interval_of(arms)
        kept += 1
        missed += not found.low <= 0 <= found.high
    assert kept > 0.8 * tables
    # 5 % are expected; 120 tables have a standard error of 2 points.
    assert missed / kept <= 0.10


def test_a_real_difference_of_bleu_is_found_with_its_size():
    rng = np.random.default_rng(22)
    arms = two_arms(rng, 500, 15, 0.8, 0.02, effect=0.5)
    found = interval_of(arms)
    by_seed = bleu.bleu_of_sums(np.sum(arms, axis=2).reshape(-1, 10)).reshape(2, SEEDS)
    assert found.estimate == pytest.approx((by_seed[1] - by_seed[0]).mean())
    assert found.low > 0
