"Properties of scoring rules, over all named families and over random concave entropies."
import pickle, subprocess, sys, warnings
from dataclasses import FrozenInstanceError
import numpy as np
import pytest
from hypothesis import assume, given, settings, strategies as st
from hypothesis.extra import numpy as hnp
from numpy.polynomial import Polynomial
from rlcr_suite.rlcr.scoring import (ScoringRule, admissible_lam, brier, from_entropy, is_admissible, log, optimal_confidence, power,
                                     spherical, value)

settings.register_profile("suite", deadline=None, max_examples=60, derandomize=True)  # deadline off: shared machines stall; derandomized: CI repeats
settings.load_profile("suite")

P = np.linspace(0, 1, 101)
INSIDE = P[1:-1]
probability = st.floats(0, 1)
inside = st.floats(1e-3, 1 - 1e-3)
exponent = st.one_of(st.floats(.2, .95), st.floats(1.05, 6.))  # next to 1 the limit has a test of its own


@st.composite
def polynomial_entropies(draw):
    "A strictly concave polynomial G with G'' = -(0.3 + r(p)²), a random r, and a random line added; returns G and its exact derivative"
    r = Polynomial(draw(st.lists(st.floats(-2, 2), min_size=1, max_size=4)))
    bend = -(Polynomial([.3]) + r*r)
    tilt, base = draw(st.floats(-2, 2)), draw(st.floats(-2, 2))
    dG = bend.integ() + tilt
    return dG.integ() + base, dG


@st.composite
def mixed_entropies(draw):
    "A positive mixture of cost-weighted errors min((1-c)p, c(1-p)), of which every proper rule is made (Schervish 1989): concave with kinks"
    costs = np.array(draw(st.lists(st.floats(.05, .95), min_size=1, max_size=5, unique=True)))
    weights = np.array(draw(st.lists(st.floats(.1, 2), min_size=len(costs), max_size=len(costs))))
    G = lambda p: (weights*np.minimum((1 - costs)*np.asarray(p)[..., None], costs*(1 - np.asarray(p)[..., None]))).sum(-1)
    dG = lambda p: (weights*np.where(np.asarray(p)[..., None] < costs, 1 - costs, -costs)).sum(-1)
    return G, dG


named = st.one_of(st.sampled_from([brier, spherical, log]), exponent.map(power))
drawn = polynomial_entropies().map(lambda e: from_entropy(*e))
kinked = mixed_entropies().map(lambda e: from_entropy(*e))
strict_rules = st.one_of(named, drawn, st.tuples(named, st.floats(.01, 50)).map(lambda t: t[0].scaled(t[1])))
rules = st.one_of(strict_rules, kinked)


def scale(rule, *points):
    "The size of a rule's finite losses at some points: rounding is relative to it"
    losses = np.concatenate([np.ravel(rule.loss(np.asarray(q), o)) for q in points for o in (0, 1)])
    return 1 + np.abs(losses[np.isfinite(losses)]).max(initial=0)


# --- propriety

@given(rules, probability, probability)
def test_no_statement_beats_the_truth(rule, p, q):
    assert rule.expected_loss(q, p) >= rule.entropy(p) - 1e-12*scale(rule, p, q)  # rounding


@given(strict_rules, inside, inside)
def test_strictly_proper_rules_punish_every_lie(rule, p, q):
    assume(abs(p - q) > 1e-2)
    assert rule.expected_loss(q, p) > rule.entropy(p)


@given(strict_rules, hnp.arrays(float, st.integers(1, 5), elements=probability))
def test_search_finds_the_truth(rule, p):
    # a minimum is located to the square root of the error of its value: sqrt(1e-16 size / curvature)
    tol = 1e-5*np.sqrt(scale(rule, p))
    assert np.abs(optimal_confidence(rule, p) - p).max() <= tol


def test_search_is_not_told_the_answer():
    absolute = ScoringRule("absolute", hit=lambda q: 1 - q, miss=lambda q: q)
    np.testing.assert_array_equal(optimal_confidence(absolute, [.2, .8]), [0, 1])
    shifted = ScoringRule("biased", hit=lambda q: (np.minimum(q + .1, 1) - 1)**2, miss=lambda q: np.minimum(q + .1, 1)**2)
    np.testing.assert_allclose(optimal_confidence(shifted, [.3, .6]), [.2, .5], atol=1e-6)  # sqrt of rounding


@given(rules, probability)
def test_a_rule_is_the_tangent_of_its_entropy(rule, q):
    # Savage: S(q, o) = G(q) + gap(q) (o - q); an infinite gap is met only at the ends
    gap = rule.gap(q)
    assume(np.isfinite(gap))
    for o in (0, 1):
        np.testing.assert_allclose(rule.loss(q, o), rule.entropy(q) + gap*(o - q), atol=1e-12*scale(rule, q), rtol=1e-12)


@given(rules)
def test_entropy_is_concave_and_the_gap_never_rises(rule):
    G = rule.entropy(P)
    assert (G[1:-1] >= (G[:-2] + G[2:])/2 - 1e-12*(1 + np.abs(G).max())).all()
    gap = rule.gap(INSIDE)
    assert (np.diff(gap) <= 1e-12*(1 + np.abs(gap).max())).all()


@given(strict_rules, inside)
def test_gap_is_the_slope_of_entropy(rule, p):
    h = 1e-4*min(p, 1 - p)
    slope = (rule.entropy(p + h) - rule.entropy(p - h))/(2*h)
    # the difference quotient's own error: h² G''', with G''' p² bounded by 10 curvatures of the family, and rounding 1e-16/h
    assert abs(slope - rule.gap(p)) <= (1e-6 + 1e-15/h)*scale(rule, p)


# --- the theorem

visible = st.one_of(drawn, st.sampled_from([brier, spherical, log]), st.floats(.2, .95).map(power), st.floats(1.5, 6).map(power))

@given(visible, st.floats(.05, 3))
def test_value_rises_exactly_when_the_gap_stays_below_lam(rule, ratio):
    bound = admissible_lam(rule)
    lam = ratio*bound if 0 < bound < np.inf else ratio
    assume(not np.isfinite(bound) or abs(lam - bound) > .01*(1 + abs(bound)))  # at the bound itself rounding decides; other tests go there
    p = np.r_[0, np.geomspace(1e-7, .5, 200), np.linspace(.5, 1, 50)[1:]]  # the gap is largest at 0, so look there closely
    rises = bool((np.diff(value(rule, p, lam)) > 0).all())
    below = bool((rule.gap(p[1:-1]) < lam).all())
    assert rises == below == is_admissible(rule, lam)


def test_a_violation_too_close_to_zero_to_see():
    rule = power(1.05)  # its gap, 21 (1 - p^0.05) at small p, passes 20.9 only below 1e-46
    assert not is_admissible(rule, 20.9) and is_admissible(rule, 21)
    p = np.geomspace(1e-90, 1e-50, 50)
    assert (np.diff(value(rule, p, 20.9)) < 0).all() and (np.diff(value(rule, p, 21)) > 0).all()


@given(strict_rules, inside)
def test_where_the_gap_reaches_lam_value_falls(rule, p0):
    lam = float(rule.gap(p0))
    assume(lam >= 0)
    assert not is_admissible(rule, lam)
    p = np.linspace(0, p0, 12)
    assert (np.diff(value(rule, p, lam)) < 0).all()              # before p0
    after = np.linspace(p0, 1, 12)
    assert (np.diff(value(rule, after, lam)) > 0).all()          # and the one minimum is p0


@given(strict_rules, st.lists(st.floats(0, 1), min_size=2, max_size=6))
def test_the_best_answer_is_the_most_probable_one(rule, answers):
    answers = np.array(answers)
    rest = np.sort(answers)[-2]
    assume(answers.max() - rest > 1e-3)
    lam = admissible_lam(rule)
    assume(np.isfinite(lam))
    assert value(rule, answers, max(lam, 0)).argmax() == answers.argmax()


@given(st.one_of(drawn, st.sampled_from([brier, spherical]), st.floats(1.05, 6).map(power)), st.floats(.1, 10))
def test_bounded_rules_scale_to_any_lam(rule, lam):
    bound = admissible_lam(rule)
    assume(bound > 1e-3)
    fitted = rule.scaled(lam/bound)
    assert is_admissible(fitted, lam)
    assert not is_admissible(fitted, .999*lam)
    assert is_admissible(rule, bound)


@given(st.one_of(st.just(log), st.floats(.1, 1).map(power)), st.floats(1e-6, 1e6), st.floats(0, 1e6))
def test_no_scale_and_no_lam_saves_an_unbounded_gap(rule, c, lam):
    assert admissible_lam(rule.scaled(c)) == np.inf
    assert not is_admissible(rule.scaled(c), lam)


@given(st.one_of(st.sampled_from([brier, spherical]), st.floats(1.05, 6).map(power)), inside)
def test_being_right_pays_at_any_stated_confidence(rule, q):
    lam = admissible_lam(rule)
    assert lam - rule.loss(q, 1) > -rule.loss(q, 0)


@given(kinked)
def test_flat_values_are_not_admissible(rule):
    bound = admissible_lam(rule)  # reached on a whole interval, up to the first kink at 0.05 or later
    assume(bound > 0)
    assert not is_admissible(rule, bound)
    assert is_admissible(rule, bound*1.001)
    np.testing.assert_allclose(value(rule, [0, .01, .02, .04], bound), value(rule, 0, bound), atol=1e-12)


def test_the_numbers_of_the_theorem():
    assert (admissible_lam(brier), admissible_lam(spherical), admissible_lam(log)) == (1, 1, np.inf)
    assert is_admissible(brier) and is_admissible(spherical) and not is_admissible(log) and not is_admissible(power(2))
    p = np.linspace(0, 1, 100001)
    v = value(log, p)
    assert (round(v.min(), 3), round(p[v.argmin()], 3)) == (-.313, .269)
    assert round(p[np.flatnonzero(v < 0).max()], 3) == .648
    np.testing.assert_allclose(value(brier, p), p**2, atol=1e-15)


def test_unbounded_on_the_harmless_side():
    from scipy.special import xlog1py
    rule = from_entropy(lambda p: -xlog1py(1 - p, -p), lambda p: 1 + np.log1p(-p))
    assert rule.loss(1, 0) == np.inf and rule.loss(0, 1) == 1
    assert admissible_lam(rule) == 1 and is_admissible(rule)


# --- families

@given(st.floats(.2, 6).filter(lambda a: abs(a - 1) > .05), inside)
def test_power_entropy_is_tsallis(a, p):
    np.testing.assert_allclose(power(a).entropy(p), (1 - p**a - (1 - p)**a)/(a - 1), rtol=1e-10, atol=1e-13)
    if a > 1: assert admissible_lam(power(a)) == pytest.approx(a/(a - 1), rel=1e-12)


@pytest.mark.parametrize("step", [1e-4, -1e-4, 1e-8, -1e-8, 1e-12, -1e-12, 3e-16])
def test_power_approaches_log(step):
    q = np.geomspace(1e-6, .999, 50)
    for o in (0, 1):  # the first-order difference is at most |a - 1| times log²q + |log q| < 300
        np.testing.assert_allclose(power(1 + step).loss(q, o), log.loss(q, o), atol=300*abs(step) + 1e-13)
    np.testing.assert_array_equal(power(1).loss(q, 1), log.loss(q, 1))


def test_power_multiples_of_brier():
    for a, c in ((2, 2), (3, 1.5)):
        for o in (0, 1): np.testing.assert_allclose(power(a).loss(P, o), c*brier.loss(P, o), atol=1e-14)


@given(st.sampled_from([brier, spherical, log]) | exponent.map(power), inside)
def test_symmetry(rule, q):
    assert rule.loss(q, 1) == pytest.approx(rule.loss(1 - q, 0), rel=1e-9, abs=1e-12)  # 1 - q rounds


@pytest.mark.parametrize("a", [0, -1, np.inf, -np.inf, np.nan])
def test_power_refuses(a):
    with pytest.raises(ValueError, match="strictly proper"): power(a)


# --- from_entropy

@given(polynomial_entropies(), hnp.arrays(float, st.integers(1, 8), elements=probability))
def test_numerical_slope(entropy, q):
    G, dG = entropy
    exact, numeric = from_entropy(G, dG), from_entropy(G)
    for o in (0, 1):
        np.testing.assert_allclose(numeric.loss(q, o), exact.loss(q, o), atol=1e-5*scale(exact, q))  # 1e-6 of the slope, and 1e-6 of an end
    assert numeric.gap(0) == pytest.approx(admissible_lam(exact), rel=1e-5, abs=1e-5)


@pytest.mark.parametrize("rule", [brier, spherical, log, power(.5), power(1.2), power(3)], ids=lambda r: r.name)
def test_a_rule_comes_back_from_its_entropy(rule):
    back = from_entropy(rule.entropy)
    q = np.r_[0, np.geomspace(1e-6, .5, 40), 1 - np.geomspace(1e-6, .5, 40), 1]
    for o in (0, 1): np.testing.assert_allclose(back.loss(q, o), rule.loss(q, o), rtol=1e-6, atol=1e-6)  # what from_entropy promises
    assert np.isinf(admissible_lam(back)) == np.isinf(admissible_lam(rule))
    if np.isfinite(admissible_lam(rule)): assert is_admissible(back, admissible_lam(rule))


def test_the_end_next_to_the_end_is_sane():
    tiny = [0, 5e-324, 1e-300, 1e-17, 1e-9, 1e-6]
    losses = from_entropy(lambda p: p*(1 - p)).loss(tiny, 1)
    np.testing.assert_allclose(losses, 1, atol=1e-5)
    held = from_entropy(log.entropy).loss(tiny, 1)  # infinite at 0; then the slope of 1e-6, where -log q is 13.8
    assert held[0] == np.inf
    np.testing.assert_allclose(held[1:], -np.log(1e-6), atol=1e-5)


@pytest.mark.parametrize("G, message", [
    (lambda p: p**2, "concave"), (lambda p: np.abs(p - .5), "concave"), (lambda p: 1., "shape"), (lambda p: p[:3], "shape"),
    (lambda p: np.log(p), "finite"), (lambda p: np.where(p > .5, np.nan, 0), "finite")])
def test_from_entropy_refuses(G, message):
    with pytest.raises(ValueError, match=message): from_entropy(G)


# --- input and output

METHODS = [lambda r, x: r.loss(x, 1), lambda r, x: r.expected_loss(x, .5), lambda r, x: r.expected_loss(.5, x), lambda r, x: r.entropy(x),
           lambda r, x: r.gap(x), value, optimal_confidence]

@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("bad", [np.nan, -1e-9, 1 + 1e-9, 95, np.inf, -np.inf, [.2, np.nan], None, "0.5", [.5, None], ["0.5"], 1j])
def test_bad_probabilities_are_refused(method, bad):
    for rule in (brier, log):
        with pytest.raises(ValueError, match=r"\[0, 1\]"): method(rule, bad)


@pytest.mark.parametrize("o", [.5, 2, -1, np.nan, [0, .1], "1", None])
def test_bad_outcomes_are_refused(o):
    with pytest.raises(ValueError, match="^o must"): brier.loss(.5, o)


@pytest.mark.parametrize("lam", [-1, np.nan, np.inf, "1", None, [1.]])
def test_bad_lam_is_refused(lam):
    for f in (lambda: value(brier, .5, lam), lambda: is_admissible(brier, lam)):
        with pytest.raises(ValueError, match="lam"): f()


@pytest.mark.parametrize("c", [0, -1, np.nan, np.inf])
def test_bad_scale_is_refused(c):
    with pytest.raises(ValueError, match="scaled"): brier.scaled(c)


@given(rules, hnp.mutually_broadcastable_shapes(num_shapes=2, max_dims=3, max_side=3), st.integers(0, 99))
def test_everything_broadcasts(rule, shapes, seed):
    rng = np.random.default_rng(seed)
    q, p = (rng.uniform(.01, .99, s) for s in shapes.input_shapes)
    o = rng.integers(0, 2, p.shape)
    assert np.shape(rule.loss(q, o)) == np.shape(rule.expected_loss(q, p)) == shapes.result_shape
    Q, O = np.broadcast_arrays(q, o)
    each = [rule.loss(float(a), int(b)) for a, b in zip(Q.ravel(), O.ravel())]
    np.testing.assert_allclose(np.ravel(rule.loss(q, o)), each, rtol=1e-13, atol=1e-15)  # vector and scalar powers may differ by an ulp
    for f in (rule.entropy, rule.gap, lambda x: value(rule, x), lambda x: optimal_confidence(rule, x)): assert np.shape(f(q)) == q.shape


def test_scalars_lists_and_dtypes():
    assert isinstance(brier.loss(.5, True), float) and isinstance(value(log, 0), float)
    assert brier.loss([0, 1], [True, False]).tolist() == [1, 1]
    assert brier.loss(np.float32(.5), np.int8(1)).dtype == np.float64
    assert brier.loss([], []).shape == (0,)


def test_infinite_losses_are_quiet():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for rule in (log, power(.5), from_entropy(log.entropy), log.scaled(2)):
            assert rule.loss([0, 1, 0, 1], [1, 0, 0, 1]).tolist() == [np.inf, np.inf, 0, 0]
            assert rule.entropy([0, 1]).tolist() == [0, 0]
            assert (rule.gap(0), rule.gap(1)) == (np.inf, -np.inf)
            assert rule.expected_loss([0, 0, 1], [0, .5, 1]).tolist() == [0, np.inf, 0]
            np.testing.assert_allclose(optimal_confidence(rule, [0, .3, 1]), [0, .3, 1], atol=1e-4)  # the numerical slope is part of it


def test_rules_are_frozen_named_and_picklable():
    with pytest.raises(FrozenInstanceError): brier.name = "other"
    assert [r.name for r in (brier, spherical, log, power(1.5), brier.scaled(2))] == ["Brier", "spherical", "log", "power(1.5)", "2·Brier"]
    for rule in (brier, spherical, log, power(1.5), power(1), log.scaled(3), brier.scaled(2).scaled(.5)):
        again = pickle.loads(pickle.dumps(rule))
        np.testing.assert_array_equal(again.loss(P, 1), rule.loss(P, 1))


def test_import_is_light():
    heavy = "torch transformers trl scipy sympy sklearn matplotlib datasets openai pandas fastcore".split()
    code = f"import sys, rlcr_suite.rlcr.scoring; print([m for m in {heavy} if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"
