"""Votes and consistency of paper 1: properties over arbitrary samples, brute force, bad input."""
from collections import defaultdict
from itertools import combinations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlcr_suite.rlcr.test_time import (
    METHODS, continued, cut_after_answer, encode, ensembled_confidence, inter_solution, intra_solution, majority_vote,
    resample_analyses, vote, votes_curve, votes_over_seeds, weighted_vote, win_probability,
)

GRID = [i / 20 for i in range(21)]  # verbalised confidences live on a grid of 0.05, where ties are common


@st.composite
def samples(draw, max_n=4, max_k=7):
    "(answers, confs): lists of lists, with missing answers"
    n, k = draw(st.integers(1, max_n)), draw(st.integers(1, max_k))
    row = lambda s: st.lists(s, min_size=k, max_size=k)
    table = lambda s: draw(st.lists(row(s), min_size=n, max_size=n))
    return table(st.sampled_from(["a", "b", "c", None])), np.array(table(st.sampled_from(GRID)))


def winners(ys, qs, method):
    "Distribution over winning answers of one question, straight from the definition"
    said = defaultdict(list)
    for y, q in zip(ys, qs):
        if y is not None: said[y].append(round(q * 20))  # integers: no rounding to worry about
    if not said: return {}
    if method == "max_confidence":
        top = max(max(v) for v in said.values()); hits = {y: v.count(top) for y, v in said.items() if top in v}
        return {y: h / sum(hits.values()) for y, h in hits.items()}
    from fractions import Fraction
    score = {"majority": len, "weighted": sum, "ensemble": lambda v: Fraction(sum(v), len(v))}[method]
    rank = {y: (score(v), len(v)) for y, v in said.items()}
    best = [y for y, r in rank.items() if r == max(rank.values())]
    return {y: 1 / len(best) for y in best}


@settings(max_examples=150, deadline=None)
@given(samples(), st.sampled_from(METHODS))
def test_win_probability_is_the_definition(data, method):
    answers, confs = data
    codes, names = encode(answers)
    win, _ = win_probability(codes, confs, method)
    for i, row in enumerate(answers):
        expected = winners(row, confs[i], method)
        np.testing.assert_allclose([win[i, c] for c in range(len(names[i]))], [expected.get(y, 0) for y in names[i]])
        assert win[i, len(names[i]):].sum() == 0


@settings(max_examples=100, deadline=None)
@given(samples(), st.sampled_from(METHODS), st.integers(0, 99))
def test_vote_returns_a_possible_winner_and_its_confidence(data, method, seed):
    answers, confs = data
    got, conf = vote(answers, confs, method, seed=seed)
    for i, row in enumerate(answers):
        possible = winners(row, confs[i], method)
        if not possible: assert got[i] is None and conf[i] == 0; continue
        assert got[i] in possible
        own = [q for y, q in zip(row, confs[i]) if y == got[i]]
        assert conf[i] == pytest.approx(max(own) if method == "max_confidence" else np.mean(own))


@settings(max_examples=100, deadline=None)
@given(samples(), st.sampled_from(GRID), st.integers(0, 99))
def test_equal_confidences_make_the_weighted_vote_the_majority(data, c, seed):
    answers, confs = data
    assert weighted_vote(answers, np.full(confs.shape, c), seed=seed)[0].tolist() == majority_vote(answers, seed=seed)[0].tolist()


@settings(max_examples=60, deadline=None)
@given(samples(), st.sampled_from(METHODS), st.randoms(use_true_random=False))
def test_order_of_samples_and_names_do_not_matter(data, method, random):
    answers, confs = data
    order = list(range(len(answers[0]))); random.shuffle(order)
    rename = {"a": "z", "b": "y", "c": "x", None: None}
    def distribution(ys, qs):
        codes, names = encode(ys)
        win, _ = win_probability(codes, qs, method)
        return [{y: pytest.approx(w) for y, w in zip(row, win[i])} for i, row in enumerate(names)]
    shuffled = distribution([[rename[row[k]] for k in order] for row in answers], confs[:, order])
    codes, names = encode(answers); win, _ = win_probability(codes, confs, method)
    assert [{rename[y]: w for y, w in zip(row, win[i])} for i, row in enumerate(names)] == shuffled


def test_ties_are_broken_at_random_and_by_seed():
    tie = [["a", "b"]] * 2000
    got = np.mean(majority_vote(tie, seed=1)[0] == "a")
    assert .45 < got < .55  # 4.5 standard errors of a fair coin
    assert majority_vote(tie, seed=1)[0].tolist() == majority_vote(tie, seed=1)[0].tolist() != majority_vote(tie, seed=2)[0].tolist()


@settings(max_examples=40, deadline=None)
@given(samples(max_k=5), st.data())
def test_curve_is_brute_force_over_subsets(data, more):
    answers, confs = data
    truth = {y: more.draw(st.sampled_from([0., .25, 1.])) for y in "abc"}
    P = len(answers[0]); K = more.draw(st.integers(1, P))
    curve = votes_curve(answers, confs, lambda i, y: truth[y], Ks=(K,), draws=10)  # comb(5, K) <= 10: all subsets
    assert curve.exact == (True,)
    for method in METHODS:
        for i, row in enumerate(answers):
            acc, brier, n = 0., 0., 0
            for s in combinations(range(P), K):
                sub = [row[k] for k in s], [confs[i][k] for k in s]; n += 1
                for y, w in winners(*sub, method).items():
                    own = [q for a, q in zip(*sub) if a == y]; c = max(own) if method == "max_confidence" else np.mean(own)
                    acc += w * truth[y]; brier += w * (truth[y] * (1 - c)**2 + (1 - truth[y]) * c**2)
            assert curve.of(method, K)[i] == pytest.approx(acc / n)
            assert curve.of(method, K, "brier")[i] == pytest.approx(brier / n)


def pool(n=60, P=24, seed=0):
    rng = np.random.default_rng(seed)
    answers = rng.choice(np.array(["a", "b", "c", None], dtype=object), (n, P), p=[.4, .3, .2, .1])
    return answers, rng.random((n, P)), (answers == "a") * 1.


def test_sampled_curve_agrees_with_the_exact_one_and_is_seeded():
    args = pool(n=40, P=10)
    exact, few = votes_curve(*args, Ks=(4,), draws=210), votes_curve(*args, Ks=(4,), draws=100)
    assert exact.exact == (True,) and few.exact == (False,)
    for m in METHODS:  # a mean of 4000 values of standard deviation below .5: five standard errors are .04
        assert few.mean(m)[0] == pytest.approx(exact.mean(m)[0], abs=.04)
    again, other = (votes_curve(*args, Ks=(4,), draws=100, seed=s) for s in (0, 1))
    assert (again.of("weighted", 4) == few.of("weighted", 4)).all() and (other.of("weighted", 4) != few.of("weighted", 4)).any()


def test_single_precision_does_not_break_ties():
    answers, confs = [["a", "a", "b"]] * 400, [[.1, .2, .3]] * 400
    for dtype in (np.float64, np.float32):
        win, _ = win_probability(encode(answers)[0], np.array(confs, dtype).astype(float), "weighted")
        assert (win == [1, 0]).all()  # .1 + .2 = .3: a tie, and a has more votes


def test_votes_see_the_same_subsets():
    answers, _, right = pool()
    curve = votes_curve(answers, np.full(answers.shape, .7), right, Ks=(1, 5, 24), draws=4)
    for K in (1, 5, 24): assert (curve.of("majority", K) == curve.of("weighted", K)).all()
    d = curve.difference("weighted", "majority", 5)
    assert d.value == d.low == d.high == 0


def test_difference_is_paired():
    answers, confs, right = pool(n=200)
    confs = np.where(right == 1, .6 + .4 * confs, .6 * confs)  # informative
    curve = votes_curve(answers, confs, right, Ks=(5,), draws=8)
    d, a = curve.difference("weighted", "majority", 5), curve.interval("weighted", 5)
    assert d.low > 0 and d.value == pytest.approx(np.mean(curve.of("weighted", 5) - curve.of("majority", 5)))
    assert a.low <= a.value <= a.high


def test_runs_and_questions_make_one_interval():
    curves = [votes_curve(*pool(seed=s), Ks=(5,), draws=8) for s in range(3)]
    v = votes_over_seeds(curves, "weighted", 5)
    assert v.seeds == 3 and v.n == 60 and v.value == pytest.approx(np.mean([c.mean("weighted")[0] for c in curves]))
    d = votes_over_seeds(curves, "weighted", 5, minus="majority", metric="brier")
    assert d.low <= d.value <= d.high and d.value == pytest.approx(np.mean([(c.of("weighted", 5, "brier") - c.of("majority", 5, "brier")).mean() for c in curves]))


@pytest.mark.parametrize("call, message", [
    (lambda a, q, r: votes_curve(a, q, r, Ks=(25,)), "1..24"),
    (lambda a, q, r: votes_curve(a, q, r, draws=0), "draws must be"),
    (lambda a, q, r: votes_curve(a, q, r[:, :3]), "correct must have shape"),
    (lambda a, q, r: votes_curve(a, q, r * 2), r"correct must lie in \[0, 1\]"),
    (lambda a, q, r: votes_curve(a, q, r, key=lambda y: 0), "two values"),
    (lambda a, q, r: votes_curve(a, q, r, methods=("best",)), "method must be"),
    (lambda a, q, r: votes_curve(a, q, r, Ks=(2,)).of("majority", 3), "K=3"),
    (lambda a, q, r: vote(a, q * 100), r"\[0, 1\]"),
    (lambda a, q, r: vote(a, q, confidence="loud"), "confidence must be"),
    (lambda a, q, r: encode([]), "n, K >= 1"),
    (lambda a, q, r: ensembled_confidence([.5, .6]), r"\(n, A\)"),
])
def test_bad_input_is_refused_with_a_reason(call, message):
    with pytest.raises(ValueError, match=message): call(*pool())


def test_unreadable_samples():
    nan = float("nan")
    answers, conf = weighted_vote([["a", "b", nan], [None, None, None]], [[nan, .1, .9], [nan, nan, nan]])
    assert answers.tolist() == ["b", None] and conf.tolist() == [.1, 0.]
    assert ensembled_confidence([[nan, .4], [nan, nan]]).tolist() == [.4, 0.]
    assert np.isnan(intra_solution([[nan, nan]]))[0] and intra_solution([[.2, .4]])[0] == pytest.approx(.1)


def test_calibrated_confidences_of_rivals_share_one_unit():
    rng = np.random.default_rng(0); p = rng.dirichlet(np.ones(3), 500); pick = rng.integers(0, 3, (500, 8))
    answers, confs = np.array(list("abc"), dtype=object)[pick], np.take_along_axis(p, pick, 1)
    assert (inter_solution(answers, confs) <= 1 + 1e-9).all()
    assert inter_solution(answers, (2 * confs).clip(max=1)).mean() > 1
    assert inter_solution([[None, "a"]], [[.9, .3]]).tolist() == [.3]


def test_cut_after_the_last_answer():
    assert cut_after_answer("<answer>a</answer> no, <answer>b</answer>\n<analysis>x") == "<answer>a</answer> no, <answer>b</answer>"
    assert cut_after_answer("<answer>a") is None
    big = "<answer>" * 100_000
    assert cut_after_answer(big) is None  # and in no time: no quadratic matching


def test_resampling_needs_no_model_to_refuse():
    assert resample_analyses(None, None, ["q"], ["no answer"], k=2) == [["no answer"] * 2]
    for bad in (dict(k=0), dict(temperature=0)):
        with pytest.raises(ValueError, match="k must be"): resample_analyses(None, None, ["q"], ["t"], **bad)
    with pytest.raises(ValueError, match="one text a prompt"): resample_analyses(None, None, ["q"], [])


@pytest.fixture(scope="module")
def lm():
    from rlcr_suite.core.lm import tiny_lm, word_tokenizer
    tags = [f"<{s}{t}>" for t in ("answer", "analysis", "confidence") for s in ("", "/")]
    tok = word_tokenizer(["red blue sure not which ?"], specials=tags)
    return tiny_lm(tok, hidden_size=16, layers=1, heads=2, intermediate_size=16), tok


def test_resampling_keeps_the_answer_and_varies_the_rest(lm):
    model, tok = lm
    chat = [{"role": "user", "content": "which?"}]
    texts = ["<answer>red</answer><analysis>sure</analysis>", "nothing"]
    got = resample_analyses(model, tok, [chat, "which?"], texts, k=6, max_new_tokens=8, seed=1)
    assert [len(g) for g in got] == [6, 6] and got[1] == ["nothing"] * 6
    assert all(t.startswith("<answer>red</answer>") for t in got[0]) and len(set(got[0])) > 1
    assert resample_analyses(model, tok, [chat, "which?"], texts, k=6, max_new_tokens=8, seed=1) == got
    assert resample_analyses(model, tok, [chat, "which?"], texts, k=6, max_new_tokens=8, seed=2) != got


def test_a_continuation_is_the_conversation_and_the_words(lm):
    from rlcr_suite.core.lm import prompt_ids
    model, tok = lm
    chat = [{"role": "user", "content": "which?"}]
    opened = tok.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    assert continued(tok, chat, "<answer>") == opened + "<answer>"
    assert continued(tok, "which?", " red") == "which? red"
    assert prompt_ids(tok, [continued(tok, chat, "<answer>red")])[0] == prompt_ids(tok, [chat])[0] + tok("<answer>red", add_special_tokens=False)["input_ids"]


class WithBos:
    "A tokenizer that opens every text with <s>, as does its chat template"
    bos_token, bos_token_id = "<s>", 1
    def __call__(self, text): return {"input_ids": [1, *map(ord, text)]}
    def apply_chat_template(self, messages, tokenize, add_generation_prompt): return "<s>[" + messages[0]["content"] + "]"


def test_a_start_token_is_not_doubled():
    assert continued(WithBos(), [{"role": "user", "content": "q"}], "a") == "[q]a"
