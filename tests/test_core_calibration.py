"core.calibration against scikit-learn and torchmetrics, its identities, and its edges"
import subprocess, sys
import numpy as np
import pytest
from hypothesis import assume, given, settings, strategies as st
from hypothesis.extra.numpy import arrays
from sklearn.calibration import calibration_curve
from sklearn.metrics import brier_score_loss, roc_auc_score
from rlcr_suite.core.calibration import (auroc, bin_index, brier, ece, ece_null, murphy, reliability, reliability_diagram, summary)

EXACT = dict(rtol=0, atol=1e-12)                                  # float64 sums of at most 300 terms in [0, 1]
quick = settings(deadline=None, max_examples=40)
ways = st.tuples(st.sampled_from([1, 2, 3, 7, 10, 20]), st.sampled_from(['width', 'mass']))

@st.composite
def answers(draw, digits=st.sampled_from([1, 2, 12]), max_size=60):
    "A pair (conf, correct); few digits make ties and put confidences on the edges of bins"
    n, d = draw(st.integers(1, max_size)), draw(digits)
    conf = draw(arrays(float, n, elements=st.integers(0, 10**d).map(lambda k: k/10**d)))
    return conf, draw(arrays(int, n, elements=st.integers(0, 1)))

def honest(n, seed=0):
    rng = np.random.default_rng(seed); p = rng.random(n)
    return p, (rng.random(n) < p).astype(int)

# --- against the field's own

@quick
@given(answers())
def test_brier_is_sklearns(pair):
    conf, correct = pair
    assert np.isclose(brier(conf, correct), brier_score_loss(correct, conf, pos_label=1), **EXACT)

@quick
@given(answers())
def test_auroc_is_sklearns(pair):
    conf, correct = pair
    if len(set(correct)) < 2: assert np.isnan(auroc(conf, correct))
    else: assert np.isclose(auroc(conf, correct), roc_auc_score(correct, conf), **EXACT)

@pytest.mark.parametrize('bins', [1, 5, 10, 15])
@pytest.mark.parametrize('by, strategy', [('width', 'uniform'), ('mass', 'quantile')])
def test_curve_is_sklearns(bins, by, strategy):
    conf, correct = honest(998)                                   # 997 steps, a prime: no quantile falls on a confidence, where conventions differ
    acc, mean = calibration_curve(correct, conf, n_bins=bins, strategy=strategy)
    r = reliability(conf, correct, bins, by)
    assert np.allclose(r.acc, acc, **EXACT) and np.allclose(r.conf, mean, **EXACT) and r.n.sum() == 998

@pytest.mark.parametrize('bins', [1, 5, 10, 15])
@pytest.mark.parametrize('digits', [1, 2, 12])
def test_ece_is_torchmetrics(bins, digits):
    torch, metrics = pytest.importorskip('torch'), pytest.importorskip('torchmetrics.functional.classification')
    conf, correct = honest(500)
    conf = conf.round(digits)
    edges = np.arange(1, bins + 1)/bins                           # conventions differ on them: torchmetrics has linspace's, and a bin of its own for 1
    off = ~np.isclose(conf[:, None], edges).any(1)
    conf, correct = conf[off], correct[off]
    theirs = metrics.binary_calibration_error(torch.tensor(conf), torch.tensor(correct), n_bins=bins, norm='l1').item()
    assert np.isclose(ece(conf, correct, bins), theirs, atol=1e-6)  # torchmetrics computes in float32

# --- edges

@pytest.mark.parametrize('dtype', ['float64', 'float32'])
@pytest.mark.parametrize('bins', [2, 3, 5, 7, 10, 15, 20, 30, 100])
def test_a_stated_edge_opens_its_bin(bins, dtype):
    edges = (np.arange(bins + 1)/bins).astype(dtype)
    assert bin_index(edges, bins).tolist() == [*range(bins), bins - 1]

@pytest.mark.parametrize('text, k', [('0.3', 3), ('0.6', 6), ('0.7', 7), ('0.29', 2), ('0.59', 5), ('0.69', 6), ('0', 0), ('1', 9), ('0.0999999', 0)])
def test_confidences_as_text(text, k): assert bin_index([float(text)]) == k

@pytest.mark.parametrize('q', [1 - .7, 1 - .4, .1*3, .1 + .2, .1*6, .1*7, 1 - .3])
def test_arithmetic_does_not_move_a_confidence(q): assert bin_index([q]) == round(q*10)

def test_naive_edges_go_wrong():
    "What this guards against: bins of linspace and digitize"
    q = np.arange(10)/10
    assert q[np.digitize(q, np.linspace(0, 1, 11)) - 1 != np.arange(10)].tolist() == [.3, .6, .7]

def test_edges_decide_the_ece():
    "0.3 and 0.35 share a bin and their errors cancel; 0.25 and 0.3 do not"
    correct = np.array([1]*5 + [0]*5)
    assert np.isclose(ece([.3]*5 + [.35]*5, correct), abs(.3*5 + .35*5 - 5)/10, **EXACT)
    assert np.isclose(ece([.3]*5 + [.25]*5, correct), (.7*5 + .25*5)/10, **EXACT)

@quick
@given(answers(), ways)
def test_bins_are_ordered_and_ties_share_one(pair, way):
    conf, _ = pair
    k = bin_index(conf, *way)
    order = np.argsort(conf, kind='stable')
    assert (np.diff(k[order]) >= 0).all() and 0 <= k.min() and k.max() < way[0]
    assert all(len(set(k[conf == q])) == 1 for q in conf)

def test_mass_means_equal_numbers():
    assert np.bincount(bin_index(np.random.default_rng(0).random(1000), 8, 'mass')).tolist() == [125]*8

# --- Brier score and its parts

@quick
@given(answers())
def test_murphy_is_exact_on_distinct_values(pair):
    m = murphy(*pair)
    assert np.isclose(m.reliability - m.resolution + m.uncertainty, brier(*pair), **EXACT)
    assert m.brier == pytest.approx(brier(*pair), abs=1e-12)

@quick
@given(answers(), ways)
def test_murphy_is_exact_with_the_terms_within_bins(pair, way):
    m = murphy(*pair, *way)
    assert np.isclose(m.brier, brier(*pair), **EXACT)
    assert m.reliability >= 0 and -1e-12 <= m.resolution <= m.uncertainty + 1e-12 and m.within_variance >= 0

@quick
@given(answers(), ways)
def test_ece_is_bounded_by_its_neighbours(pair, way):
    "|mean gap| <= ECE <= root of the reliability (Jensen), and ECE <= mean absolute error"
    conf, correct = pair
    e = ece(conf, correct, *way)
    assert abs(conf.mean() - correct.mean()) - 1e-12 <= e <= np.sqrt(murphy(conf, correct, *way).reliability) + 1e-9
    assert e <= abs(conf - correct).mean() + 1e-12

@quick
@given(answers(), st.integers(0, 2**32 - 1))
def test_scores_do_not_depend_on_the_order(pair, seed):
    i = np.random.default_rng(seed).permutation(len(pair[0]))
    for f in (brier, ece, auroc): assert np.isclose(f(*pair), f(pair[0][i], pair[1][i]), equal_nan=True, **EXACT)

@quick
@given(answers(), ways)
def test_repeating_every_answer_changes_nothing(pair, way):
    twice = [np.repeat(v, 3) for v in pair]
    for f in (brier, auroc, lambda q, o: ece(q, o, way[0]), lambda q, o: murphy(q, o).reliability):
        assert np.isclose(f(*pair), f(*twice), equal_nan=True, **EXACT)

@quick
@given(answers())
def test_auroc_is_antisymmetric_and_ignores_scale(pair):
    conf, correct = pair
    assume(len(set(correct)) == 2)
    assert np.isclose(auroc(conf, correct), 1 - auroc(conf, 1 - correct), **EXACT)
    assert auroc(conf/2, correct) == auroc(conf, correct)

def test_accepts_booleans_lists_and_tensors():
    torch = pytest.importorskip('torch')
    q, o = [.2, .9, .6], [False, True, True]
    for pair in ((q, o), (tuple(q), np.array(o)), (torch.tensor(q), torch.tensor(o))):
        assert brier(*pair) == pytest.approx((.04 + .01 + .16)/3, abs=1e-7) and auroc(*pair) == 1

# --- the null

@pytest.mark.parametrize('n, stated', [(100, .10), (300, .06), (1000, .03)])
def test_null_of_confidences_spread_evenly(n, stated):
    "Even over [0, 1], 10 bins: the figures that are quoted for a calibrated model, and the closed form"
    null = ece_null((np.arange(n) + .5)/n)
    assert round(null.value, 2) == stated and null.low < null.value < null.high and null.n == n
    assert null.value == pytest.approx((np.pi/32*10/n)**.5, rel=.08)  # a normal for ten answers a bin is that coarse

def test_null_of_a_constant_is_half_normal():
    q, n = .8, 400                                                # one bin: |binomial - mean| / n
    assert ece_null(np.full(n, q), n_sim=20_000).value == pytest.approx((2/np.pi*q*(1 - q)/n)**.5, rel=.03)  # five standard errors

def test_null_of_certainty_is_zero(): assert ece_null(np.r_[np.zeros(5), np.ones(5)]).high == 0

def test_null_covers_calibrated_models():
    p = honest(200)[0]
    null = ece_null(p, by='mass')
    hits = [not null.excludes(ece(p, np.random.default_rng(s).random(200) < p, by='mass')) for s in range(300)]
    assert abs(np.mean(hits) - .95) < 3*(.95*.05/300)**.5

def test_null_is_a_function_of_its_seed_and_not_of_the_batch():
    p = honest(3000)[0]                                           # drawn by default_rng(0): the null must not draw the same numbers again
    assert ece_null(p, n_sim=50, seed=1) == ece_null(p, n_sim=50, seed=1) != ece_null(p, n_sim=50, seed=2)
    assert ece_null(p, n_sim=1500).value == pytest.approx(ece_null(p, n_sim=50).value, rel=.1)   # 1500 cross two batches; five standard errors of 50

# --- summary and diagram

def test_summary_holds_every_score_and_its_point_value():
    conf, correct = honest(150)
    s = summary(conf, correct, n_boot=60)
    assert list(s) == ['accuracy', 'confidence', 'brier', 'reliability', 'resolution', 'uncertainty', 'ece', 'ece_null', 'auroc']
    assert s['brier'].value == brier(conf, correct) and s['ece'].value == ece(conf, correct) and s['auroc'].value == auroc(conf, correct)
    assert s['reliability'].value == murphy(conf, correct, 10).reliability
    assert all(i.low <= i.high and i.n == 150 for i in s.values())
    assert summary(conf, correct, n_boot=60) == s

def test_summary_of_a_model_that_is_always_right():
    s = summary(np.full(30, .9), np.ones(30), n_boot=40)
    assert s['accuracy'].low == 1 and np.isnan(s['auroc'].value) and not s['auroc'].excludes(.5)

def test_summary_by_cluster_is_wider():
    conf, correct = honest(60)
    eight = [np.repeat(v, 8) for v in (conf, correct)]
    width = lambda s: s['brier'].high - s['brier'].low
    assert width(summary(*eight, n_boot=100, cluster=np.repeat(np.arange(60), 8))) > 2*width(summary(*eight, n_boot=100))

def test_diagram_draws_what_reliability_says():
    import matplotlib; matplotlib.use('Agg')
    import matplotlib.pyplot as plt
    conf, correct = honest(200)
    ax = reliability_diagram(conf, correct, label='toy', color='rlcr')
    r = reliability(conf, correct)
    assert any(np.array_equal(l.get_ydata(), r.acc) and np.array_equal(l.get_xdata(), r.conf) for l in ax.get_lines())
    assert ax.get_title(loc='left') == 'toy' or ax.get_title() == 'toy'
    assert f'ECE {ece(conf, correct):.3f}' in ax.texts[0].get_text()
    reliability_diagram([.5], [1], ax, color='#123456')           # one answer is enough
    plt.close('all')

# --- bad input

@pytest.mark.parametrize('conf, correct, why', [
    ([], [], 'empty'), ([.5, np.nan], [1, 0], 'NaN.*row 1'), ([.5, 1.01], [1, 0], r'\[0, 1\].*1.01 at row 1'), ([-.1], [0], 'row 0'), ([np.inf], [0], 'inf'),
    ([95.], [1], 'divided by 100'), ([.5], [1, 0], 'one shape'), ([[.5]], [[1]], 'one-dimensional'), (.5, 1, 'one-dimensional'),
    ([.5], [.5], '0 or 1'), ([.5], [2], '0 or 1'), ([.5], [np.nan], '0 or 1')])
def test_every_score_says_what_is_wrong(conf, correct, why):
    for f in (brier, murphy, ece, auroc, summary, reliability, reliability_diagram):
        with pytest.raises(ValueError, match=why): f(conf, correct)

@pytest.mark.parametrize('call, why', [
    (lambda: ece([.5], [1], bins=0), 'positive integer'), (lambda: ece([.5], [1], bins=2.5), 'positive integer'), (lambda: ece([.5], [1], by='size'), 'width'),
    (lambda: ece_null([.5], level=1), 'level'), (lambda: ece_null([.5], n_sim=0), 'n_sim'), (lambda: ece_null([np.nan]), 'NaN')])
def test_bad_settings(call, why):
    with pytest.raises(ValueError, match=why): call()

def test_import_is_light():
    code = "import sys, rlcr_suite.core.calibration; sys.exit(any(m in sys.modules for m in ('scipy', 'matplotlib', 'torch', 'sklearn')))"
    assert subprocess.run([sys.executable, '-c', code]).returncode == 0
