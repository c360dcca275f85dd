"core.stats: properties over random data, edge cases and errors"
import itertools, subprocess, sys
import numpy as np
import pytest
from hypothesis import given, settings, strategies as st
from hypothesis.extra.numpy import arrays
from scipy import stats as scipy_stats
from rlcr_suite.core.stats import Interval, bootstrap, middle, paired_bootstrap, paired_permutation, seed_bootstrap, stream

CLOSE = 1e-9                                                     # float64 sums of up to 100 numbers below 1e3
quick = settings(deadline=None, max_examples=25)                 # every example draws resamples in Python
samples = arrays(float, st.integers(3, 25), elements=st.integers(-100, 100).map(lambda i: i/10))

def ends(iv): return np.array([iv.value, iv.low, iv.high])
def accuracy(answer, gold): return float(np.mean(answer == gold))

# --- Interval

@pytest.mark.parametrize('x, out', [(0., True), (.1, False), (.2, False), (.15, False), (.21, True)])
def test_excludes_is_strict(x, out): assert Interval(.15, .1, .2, 10).excludes(x) is out

def test_nan_interval_excludes_nothing(): assert not Interval(.1, np.nan, np.nan, 3).excludes(5.)

@pytest.mark.parametrize('kwargs, why', [(dict(low=.3, high=.2), 'above'), (dict(low=0, high=1, level=1.), 'level'), (dict(low=0, high=1, level=95), 'level')])
def test_interval_rejects(kwargs, why):
    with pytest.raises(ValueError, match=why): Interval(value=.25, n=5, **kwargs)

def test_interval_is_frozen_and_formats():
    iv = Interval(-.05, -.123, .02, 7, seeds=3)
    assert str(iv) == '-0.05 [-0.12, 0.02]' and f'{iv:+.3f}' == '-0.050 [-0.123, +0.020]'
    with pytest.raises(AttributeError): iv.value = 1.

# --- bootstrap

@quick
@given(samples, st.integers(0, 5), st.sampled_from(['bca', 'percentile']))
def test_bootstrap_is_ordered_and_within_range(x, seed, method):
    iv = bootstrap(np.mean, x, n_boot=60, seed=seed, method=method)
    assert x.min() - CLOSE <= iv.low <= iv.high <= x.max() + CLOSE
    assert np.isclose(iv.value, x.mean()) and iv.n == len(x) and iv.seeds is None

@quick
@given(samples, st.floats(-50, 50), st.floats(.1, 20))
def test_bootstrap_follows_the_units(x, shift, scale):
    "An interval in other units is the interval, converted"
    a, b = (bootstrap(np.mean, v, n_boot=60, method='percentile') for v in (x, shift + scale*x))
    assert np.allclose(shift + scale*ends(a), ends(b), atol=1e-8)

@quick
@given(samples)
def test_wider_level_contains_narrower(x):
    narrow, wide = (bootstrap(np.mean, x, n_boot=100, level=l, method='percentile') for l in (.8, .99))
    assert wide.low <= narrow.low + CLOSE and narrow.high <= wide.high + CLOSE

@quick
@given(samples)
def test_singleton_clusters_are_rows(x):
    a, b = bootstrap(np.mean, x, n_boot=60), bootstrap(np.mean, x, n_boot=60, cluster=np.arange(len(x)))
    assert np.allclose(ends(a), ends(b), atol=CLOSE)

def test_clusters_of_strings_and_unequal_sizes():
    x, names = np.array([1., 1, 1, 0, 0, 1]), ['a', 'b', 'a', 'c', 'c', 'c']
    iv = bootstrap(np.mean, x, cluster=names, n_boot=500, method='percentile')
    assert iv.n == 3 and iv.low < iv.value < iv.high
    drawn = {np.mean(np.concatenate(c)) for c in itertools.product([x[[0, 2]], x[[1]], x[[3, 4, 5]]], repeat=3)}
    assert any(np.isclose(iv.low, d) for d in drawn)             # every resample is made of whole clusters

def test_strings_can_be_resampled():
    iv = bootstrap(accuracy, np.array(['a', 'b', 'c', 'd']*5), np.array(['a', 'b', 'x', 'd']*5), n_boot=200)
    assert iv.value == .75 and 0 < iv.low < .75 < iv.high <= 1

def test_bca_agrees_with_scipy():
    x = np.random.default_rng(0).exponential(size=40)
    ci = scipy_stats.bootstrap((x,), np.mean, n_resamples=20_000, method='BCa', rng=np.random.default_rng(1)).confidence_interval
    ours = bootstrap(np.mean, x, n_boot=5000)
    assert np.allclose([ours.low, ours.high], ci, atol=.04)      # six standard errors of a 2.5% quantile at 5,000

def test_constant_score_has_no_width(): assert ends(bootstrap(np.mean, np.ones(9), n_boot=50)).tolist() == [1, 1, 1]

def test_equal_values_that_rounding_tells_apart():
    "A mean of equal numbers may differ in the last bit; the interval must not turn round"
    for k in range(2, 40): bootstrap(lambda x: np.mean((x - 1)**2), np.full(k, .9), n_boot=40)
    low, high = middle(np.full(40, .1)*(1 + 2**-52), .95)
    assert low <= high

def test_streams_are_independent_of_the_data():
    "Data made by default_rng(seed) must not meet the same numbers again"
    for seed in range(3):
        x = np.random.default_rng(seed).random(500)
        for name in ('bootstrap', 'ece_null'): assert abs(np.corrcoef(x, stream(seed, name).random(500))[0, 1]) < 5/500**.5
    with pytest.raises(ValueError, match='negative'): stream(-1, 'x')

def test_score_undefined_everywhere_has_no_interval():
    iv = bootstrap(lambda x: np.nan, np.arange(5.), n_boot=50)
    assert np.isnan(ends(iv)).all()

def test_same_seed_same_interval_whatever_the_global_state():
    x = np.random.default_rng(0).normal(size=30)
    np.random.seed(0); a = bootstrap(np.mean, x, n_boot=50, seed=4); before = np.random.get_state()[1].copy()
    np.random.seed(1); b = bootstrap(np.mean, x, n_boot=50, seed=4)
    np.random.seed(0); bootstrap(np.mean, x, n_boot=50)
    assert a == b and (np.random.get_state()[1] == before).all()  # neither reads nor moves numpy's global generator

@pytest.mark.parametrize('call, why', [
    (lambda: bootstrap(np.mean), 'at least one array'), (lambda: bootstrap(np.mean, 3.), 'scalar'), (lambda: bootstrap(np.mean, []), 'at least 2 rows'),
    (lambda: bootstrap(np.mean, [1.]), 'at least 2 rows'), (lambda: bootstrap(np.mean, [1, 2], [1, 2, 3]), 'one length'),
    (lambda: bootstrap(np.mean, [1, 2], level=0.), 'level'), (lambda: bootstrap(np.mean, [1, 2], n_boot=0), 'n_boot'),
    (lambda: bootstrap(np.mean, [1, 2], method='BC'), 'method'), (lambda: bootstrap(np.mean, [1, 2], cluster=[0]), 'one label a row'),
    (lambda: bootstrap(np.mean, [1, 2], cluster=['a', 'a']), '2 clusters')])
def test_bootstrap_says_what_is_wrong(call, why):
    with pytest.raises(ValueError, match=why): call()

# --- paired

@quick
@given(samples, st.integers(0, 3))
def test_paired_difference_of_means_is_mean_of_differences(x, seed):
    y = np.random.default_rng(seed).normal(size=len(x))
    kw = dict(n_boot=60, seed=seed, method='percentile')         # BCa counts ties, which rounding breaks one way or the other
    a, b = paired_bootstrap(np.mean, x, y, **kw), bootstrap(np.mean, x - y, **kw)
    assert np.allclose(ends(a), ends(b), atol=1e-8)

def test_paired_with_itself_is_nothing():
    x, y = np.random.default_rng(0).normal(size=(2, 20))
    corr = lambda u, v: np.corrcoef(u, v)[0, 1]
    assert ends(paired_bootstrap(corr, (x, y), (x, y), n_boot=50)).tolist() == [0, 0, 0]

def test_paired_needs_the_same_questions():
    with pytest.raises(ValueError, match='one length'): paired_bootstrap(np.mean, np.ones(4), np.ones(5))

# --- seeds

@quick
@given(st.integers(2, 4), st.integers(3, 12), st.integers(0, 3), st.sampled_from(['t', 'resample']))
def test_seed_difference_of_means_is_mean_of_differences(S, n, seed, method):
    a, b = np.random.default_rng(seed).normal(size=(2, S, n))
    x, y = seed_bootstrap(np.mean, a, b, n_boot=40, method=method), seed_bootstrap(np.mean, a - b, n_boot=40, method=method)
    assert np.allclose(ends(x), ends(y), atol=1e-8) and (x.n, x.seeds) == (n, S)

def test_two_array_scores_over_seeds():
    rng = np.random.default_rng(0)
    gold = rng.integers(0, 2, (3, 200)); good = np.where(rng.random((3, 200)) < .9, gold, 1 - gold); poor = rng.integers(0, 2, (3, 200))
    iv = seed_bootstrap(accuracy, (good, gold), (poor, gold), n_boot=200)
    assert iv.excludes(0) and abs(iv.value - .4) < .12

def test_runs_that_differ_widen_the_interval():
    x = np.random.default_rng(0).normal(size=(3, 100))
    apart = x + np.array([[-1.], [0.], [1.]])
    width = lambda iv: iv.high - iv.low
    assert width(seed_bootstrap(np.mean, apart, n_boot=200)) > 3*width(seed_bootstrap(np.mean, x, n_boot=200))

def test_unpaired_seeds_may_differ_in_number_and_are_wider():
    rng = np.random.default_rng(0)
    start = rng.normal(size=(4, 1)); a, b = start + rng.normal(0, .1, (2, 4, 80))
    iv = seed_bootstrap(np.mean, a, b[:3], n_boot=100, paired_seeds=False)
    assert iv.seeds == 3
    width = lambda **kw: (lambda i: i.high - i.low)(seed_bootstrap(np.mean, a, b, n_boot=100, **kw))
    for method in ('t', 'resample'): assert width(paired_seeds=False, method=method) > 2*width(method=method)

def test_equal_scores_have_no_width():
    for method in ('t', 'resample'): assert ends(seed_bootstrap(np.mean, np.ones((3, 9)), n_boot=20, method=method)).tolist() == [1, 1, 1]

def test_undefined_score_of_one_run_gives_no_interval():
    x = np.ones((3, 9)); x[1] = np.nan
    assert np.isnan(ends(seed_bootstrap(np.mean, x, n_boot=20))).all()

@pytest.mark.parametrize('call, why', [
    (lambda: seed_bootstrap(np.mean, np.ones(5)), 'shape'), (lambda: seed_bootstrap(np.mean, np.ones((1, 5))), 'use `bootstrap`'),
    (lambda: seed_bootstrap(np.mean, np.ones((3, 1))), '2 questions'), (lambda: seed_bootstrap(np.mean, (np.ones((3, 5)), np.ones((3, 4)))), 'one shape'),
    (lambda: seed_bootstrap(np.mean, np.ones((3, 5)), np.ones((3, 4))), 'same questions'),
    (lambda: seed_bootstrap(np.mean, np.ones((3, 5)), np.ones((2, 5))), 'as many runs'),
    (lambda: seed_bootstrap(np.mean, np.ones((3, 5)), method='z'), 'method')])
def test_seed_bootstrap_says_what_is_wrong(call, why):
    with pytest.raises(ValueError, match=why): call()

# --- permutation

@quick
@given(st.lists(st.integers(-5, 5), min_size=2, max_size=7))
def test_permutation_is_exact_for_few_questions(d):
    "All 2^n swaps by brute force; two-sided as twice the smaller tail"
    d = np.array(d, dtype=float)
    sums = np.array([d @ s for s in itertools.product([1, -1], repeat=len(d))])
    tail = min((sums >= d.sum()).mean(), (sums <= d.sum()).mean())
    assert np.isclose(paired_permutation(d, np.zeros(len(d))), min(1, 2*tail))

def test_permutation_swaps_rows_of_all_arrays_together():
    rng = np.random.default_rng(0)
    gold = rng.integers(0, 3, 60); good = np.where(rng.random(60) < .9, gold, 0); poor = rng.integers(0, 3, 60)
    assert paired_permutation((good, gold), (poor, gold), accuracy, n_perm=500) < .01
    assert paired_permutation((good, gold), (good, gold), accuracy, n_perm=100) == 1

def test_p_is_never_zero():
    assert paired_permutation(np.ones(40), np.zeros(40), n_perm=99) >= 1/100

def test_permutation_says_what_is_wrong():
    with pytest.raises(ValueError, match='as many arrays'): paired_permutation((np.ones(3), np.ones(3)), np.ones(3))
    with pytest.raises(ValueError, match='one length'): paired_permutation(np.ones(3), np.ones(4))

def test_import_is_light():
    code = "import sys, rlcr_suite.core.stats; sys.exit(any(m in sys.modules for m in ('scipy', 'matplotlib', 'torch', 'sklearn')))"
    assert subprocess.run([sys.executable, '-c', code]).returncode == 0
