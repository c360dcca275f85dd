"Experiments and results of log-linear and PaTH attention: claims decided by their rules, on made-up scores whose truth is known."
import json
from functools import cache, partial
from itertools import product

import numpy as np
import pandas as pd
import pytest

from rlcr_suite.core import records, trials
from rlcr_suite.core.trials import Evidence, generator, read_evidence, write_evidence
from rlcr_suite.log_linear import experiment as lle, results as llr
from rlcr_suite.path_attention import experiment as pae, results as par

CHAPTERS = {'log_linear': (lle, llr), 'path_attention': (pae, par)}
N = 40 # sequences of every test


@pytest.fixture(autouse=True)
def quick_decisions(monkeypatch):
    "100 resamples, for the verdicts looked for here are not close; and what does not depend on the evidence is computed once"
    real = trials.seed_bootstrap
    monkeypatch.setattr(trials, 'seed_bootstrap', lambda *a, **k: real(*a, **(k | dict(n_boot=100))))
    for results in (llr, par):
        exact = {c.id for c in results.CLAIMS if c.kind == 'theorem'}
        monkeypatch.setattr(results, 'OURS', {id: partial(proved, f) if id in exact else f for id, f in results.OURS.items()})

@cache
def _proved(number): return number(None)

def proved(number, e): return _proved(number)


def made_up(experiment, plan, accuracy, loss, seeds=(0, 1, 2), scale='quick'):
    "Evidence in which `accuracy(mixer, task, test, place)` of the answers are right and `loss(mixer, task, test, place)` is lost above an optimum of 1; place in [0, 1)"
    out = []
    for m in experiment.MIXERS:
        for task, p in ((t, p) for t, p in plan.items() if m in p.get('only', experiment.MIXERS)):
            for test, spec in p['tests'].items():
                bins = spec.get('bins', 1)
                for s in seeds:
                    rng = np.random.default_rng([s, len(m), len(task)])
                    place = np.tile(np.arange(bins)/bins, N)
                    asked = np.full(N*bins, 20)
                    at = lambda f: np.array([f(m, task, test, x) for x in place])
                    out.append(pd.DataFrame(dict(mixer=m, task=task, test=test, seed=s, sequence=np.repeat(np.arange(N), bins), bin=np.tile(np.arange(bins), N), asked=asked,
                                                 right=rng.binomial(asked, at(accuracy)), optimum=20., loss=20*(1 + at(loss)) + rng.normal(size=N*bins))))
    about = dict(scale=scale, plan=plan, seconds=1., hardware='h', versions={'python': '3'}, commit='abcdef0', date='2026-01-01')
    return Evidence(pd.concat(out, ignore_index=True), pd.DataFrame(dict(mixer=['x'], seed=[0], task=['t'], step=[1], loss=[1.], seconds=[1.])), about)


def verdicts(results, e): return {c.id: c.holds for c in results.decide(e)}


def levelled(m): return m.startswith('log_linear')
LL_GOOD = lambda **k: made_up(lle, k.pop('plan', lle.FULL), lambda m, task, test, x: .8 if levelled(m) else .5, lambda m, task, test, x: (.2 if levelled(m) else .5 + .3*x) - .5*x, **k)
LL_SAME = lambda: made_up(lle, lle.FULL, lambda *a: .5, lambda *a: .5)


def test_a_better_log_linear_form_is_found_better():
    v = verdicts(llr, LL_GOOD())
    for what in ('mqar', 'mqrar', 'as-of', 'text', 'falls', 'follows'):
        for name in ('mamba2', 'gdn'): assert v[f'{what}-{name}'] is True, (what, name)
    assert v['forms'] is v['state'] is v['special-case'] is True and v['niah'] is None


def test_equal_forms_are_not_found_different():
    v = verdicts(llr, LL_SAME())
    for what in ('mqar', 'mqrar', 'as-of', 'text', 'falls', 'follows'):
        for name in ('mamba2', 'gdn'): assert v[f'{what}-{name}'] is False, (what, name)


def test_quarters_are_quarters():
    "A loss that falls in the first half only has stopped falling by the last quarter"
    e = made_up(lle, lle.FULL, lambda *a: .5, lambda m, task, test, x: 1 - min(x, .5))
    assert verdicts(llr, e)['falls-mamba2'] is False
    i = llr.change(trials.Measured(e.scores, 'mamba2', 'text', 'same'), 'loss', llr.QUARTERS[0], llr.QUARTERS[1])
    assert i.value == pytest.approx(-.25, abs=.02) and i.high < 0


def test_recall_is_the_mean_over_sizes():
    plan = {t: lle.FULL[t] for t in ('mqar-8', 'mqar-16')}
    e = made_up(lle, plan, lambda m, task, test, x: (.9 if task == 'mqar-8' else .5) if levelled(m) else .5, lambda *a: .5)
    i = llr.gained(e, 'mamba2', 'mqar')
    assert i.value == pytest.approx(.2, abs=.03) and i.low < .2 < i.high


PATH = lambda m: m.startswith('path')
PA_GOOD = lambda plan=pae.QUICK, **k: made_up(pae, plan, lambda m, *a: 1. if PATH(m) else .6, lambda m, task, test, x: .2 if PATH(m) else .6 + x, **k)


def test_a_size_that_neither_learned_is_left_out():
    "Guessing is right once in eight: such a pair says nothing, and does not count"
    e = made_up(lle, lle.FULL, lambda m, task, *a: .125 if task != 'mqar-8' else .9 if levelled(m) else .5, lambda *a: .5)
    i = llr.gained(e, 'mamba2', 'mqar')
    assert i.value == pytest.approx(.4, abs=.03) and i.n == N
    assert llr.gained(e, 'mamba2', 'mqrar') is None
    one = made_up(lle, lle.FULL, lambda m, task, *a: .25 if task == 'mqar-8' and levelled(m) else .125, lambda *a: .5)
    assert llr.gained(one, 'mamba2', 'mqar').value == pytest.approx(.125, abs=.03) # enough that one of them does better


def test_a_mixer_that_solves_everything_is_found_to():
    v = verdicts(par, PA_GOOD())
    assert v['rope-sparse'] is v['fox-sparse'] is None # they guess as in training, too
    for id in ('flip-flop-id', 'flip-flop-sparse', 'flip-flop-dense', 's5', 's5-rope', 's5-fox', 's5-longer', 'text-path', 'text-path-fox', 'longer-rope', 'wy', 'blocks',
               'decode'): assert v[id] is True, id
    for id in ('s3', 'a5', 'a5-layers', 's5-layers', 'rope-two', 'fox-two', 'mqrar', 'ruler'): assert v[id] is None, id


def test_mixers_that_solve_nothing_are_not_found_to():
    v = verdicts(par, made_up(pae, pae.QUICK, lambda *a: .6, lambda *a: .5))
    for id in ('flip-flop-id', 'flip-flop-sparse', 'flip-flop-dense', 's5', 's5-rope', 's5-fox', 'text-path', 'text-path-fox', 'longer-rope'): assert v[id] is False, id


@pytest.mark.parametrize('known, sparse, status', [(.95, .6, 'holds'), (.95, .95, 'does not hold'), (1., 1., 'does not hold'), (.7, .5, 'undecided'), (.85, .2, 'undecided')])
def test_who_has_not_learned_a_task_cannot_fail_at_another(known, sparse, status):
    e = made_up(pae, pae.QUICK, lambda m, task, test, x: sparse if test == 'sparse' else known, lambda *a: .5)
    for c in (c for c in par.CLAIMS if c.id in ('rope-sparse', 'fox-sparse')):
        c = c.decide(par.OURS[c.id](e))
        assert c.status == status and c.ours.value == pytest.approx(known - sparse, abs=.03)


@pytest.mark.parametrize('known, sparse, rope, fox', [(1., .9, True, False), (1., 1., False, True), (.7, .7, None, False)])
def test_a_second_layer(known, sparse, rope, fox):
    "RoPE with two layers is compared to PaTH with one, once it has learned the task; FoX has to solve it"
    v = verdicts(par, made_up(pae, pae.FULL, lambda m, task, test, x: 1. if task != 'flip-flop-2' else sparse if test == 'sparse' else known, lambda *a: .5))
    assert (v['rope-two'], v['fox-two']) == (rope, fox)


@pytest.mark.parametrize('four, holds', [(.5, True), (1., False)])
def test_layers_are_counted_against_one(four, holds):
    v = verdicts(par, made_up(pae, pae.FULL, lambda m, task, *a: 1. if PATH(m) else four if task.endswith('-4') else .1, lambda *a: .5))
    assert v['a5'] is True and v['s5-layers'] is v['a5-layers'] is holds


def test_the_worse_end_of_an_interval_decides():
    "One seed of three that fails is enough to leave a claim open; and a share lies between 0 and 1"
    e = PA_GOOD()
    lost = (e.scores.seed == 1) & (e.scores.mixer == 'path') & (e.scores.task == 'S5') & (e.scores.test == 'longer')
    e.scores.loc[lost, 'right'] = e.scores.loc[lost, 'right']//2
    i = par.products(e, 'path', 'S5', test='longer')
    assert .5 < i.value < 1 and i.low < .5 and i.high == 1 and next(c for c in par.CLAIMS if c.id == 's5-longer').decide(i).holds is False
    assert par.error(e, 'path', 'id').low == 0


def test_an_error_is_what_accuracy_is_not():
    i = par.error(PA_GOOD(), 'softmax', 'sparse')
    assert i.low < .4 < i.high and i.low <= i.value <= i.high and i.seeds == 3


def test_the_last_product_is_read_and_no_other():
    e = made_up(pae, pae.QUICK, lambda m, task, test, x: .9 if x >= 9/10 else .1, lambda *a: .5)
    assert par.products(e, 'path', 'S5').value == pytest.approx(.9, abs=.03)


def test_the_full_scale_decides_what_the_quick_one_leaves_open(tmp_path, monkeypatch):
    monkeypatch.setenv('RLCR_SUITE_RECORDS', str(tmp_path))
    write_evidence(PA_GOOD(pae.FULL, scale='full', seeds=(0, 1)), tmp_path/'evidence'/'path_attention'/'full')
    claims = {c.id: c for c in par.publish(PA_GOOD(), tmp_path/'path_attention.json')}
    assert claims['a5-layers'].scale == claims['mqrar'].scale == 'full' and claims['a5-layers'].holds and claims['mqrar'].holds
    assert claims['s5'].scale == 'quick' and claims['ruler'].status == 'no evidence yet'


def test_the_small_language_is_left_to_the_full_scale():
    v, whole = verdicts(llr, LL_GOOD(plan=lle.QUICK)), verdicts(llr, LL_GOOD())
    open_ = {f'{what}-{name}' for what in ('text', 'falls', 'follows') for name in ('mamba2', 'gdn')}
    assert {id for id in v if v[id] is None and whole[id] is not None} == open_


@pytest.mark.parametrize('paper', CHAPTERS)
def test_claims(paper, tmp_path, monkeypatch):
    experiment, results = CHAPTERS[paper]
    monkeypatch.setenv('RLCR_SUITE_RECORDS', str(tmp_path))
    e = (LL_GOOD if paper == 'log_linear' else PA_GOOD)()
    with pytest.raises(ValueError, match=f'PAPER={paper}'): trials.stored(paper)
    back = read_evidence(write_evidence(e, tmp_path/'evidence'/paper/'quick'))
    assert verdicts(results, back) == verdicts(results, e) and trials.stored(paper).about == e.about
    claims = results.publish(back, tmp_path/f'{paper}.json')
    first = (tmp_path/f'{paper}.json').read_bytes()
    results.publish(back, tmp_path/f'{paper}.json')
    assert (tmp_path/f'{paper}.json').read_bytes() == first
    assert [c.id for c in claims] == [c.id for c in results.CLAIMS] and set(results.OURS) <= {c.id for c in claims}
    assert all(c.paper == paper for c in claims)


@pytest.mark.parametrize('paper', CHAPTERS)
def test_plans_can_be_run(paper, tmp_path):
    "Every task and every test of every scale can be drawn, and what the results page reads is there"
    experiment, _ = CHAPTERS[paper]
    every = (*experiment.MIXERS, *getattr(experiment, 'RECURRENT', ()), *getattr(experiment, 'ATTENTION', ())) # and those of other chapters
    for scale, s in experiment.SCALES.items():
        json.dumps(s.plan) # plans go to processes as JSON
        assert scale == 'test' or len(s.seeds) >= 3
        assert set(s.mixers) <= set(every) and (scale != 'full' or s.mixers == every)
        assert all(set(p.get('only', ())) <= set(every) for p in s.plan.values())
        for p in s.plan.values():
            for test in p['tests'].values():
                more = {k: v for k, v in test.items() if k not in ('n', 'bins', 'batch')}
                t = generator(p['make'] | more)(n=2, seed=0)
                assert t.input_ids.shape[1] <= p['model'].get('max_length', 128) and t.asked.any()
    with pytest.raises(ValueError, match='scale must be one of quick, full, test'): experiment.jobs('huge', tmp_path)
    with pytest.raises(ValueError, match='not finished'): experiment.collect('test', tmp_path)


def test_one_trial_of_each_chapter(tmp_path):
    "The smallest plan, trained and scored with a mixer that the chapter brings"
    from rlcr_suite.core import jobs
    for experiment, mixer in ((lle, 'log_linear_gdn'), (pae, 'path_fox')):
        (t,) = [t for t in experiment.jobs('test', tmp_path/mixer) if t.mixer == mixer]
        jobs.here(t)
        assert t.done and t.progress()['step'] == t.progress()['total'] > 0


STAMP = dict(hardware='a chip, 1 thread', versions={'torch': '2'}, commit='abcdef0', date='2026-01-01')
SPREAD = lambda x: dict(median=x, low=.9*x, high=1.1*x)

def bench(ratio, at=lambda T: T**1.1):
    "A stored benchmark, as `trials.benchmark` returns it"
    return dict(device='cpu', repeats=7, stamp=STAMP, evidence='benchmarks/results/cpu/x.json',
                results=[dict(T=T, seconds=dict(forward=dict(log_linear=SPREAD(at(T)))), ratio_to_sdpa=ratio if T <= 16384 else {}) for T in (1024, 2048, 16384, 65536)])

def test_speeds_come_from_stored_benchmarks(monkeypatch):
    v = lambda results, e: {c.id: c for c in results.decide(e)}
    monkeypatch.setattr(llr, 'benchmark', lambda: bench(dict(forward=SPREAD(14.5), both=SPREAD(9.))))
    monkeypatch.setattr(par, 'benchmark', lambda: bench(dict(forward=dict(path=dict(median=1.1, low=1.05, high=1.12)), both=dict(path=dict(median=1.2, low=1.1, high=1.3)))))
    c = v(llr, LL_SAME())
    assert c['growth'].ours.value == pytest.approx(1.1, abs=1e-5) and c['growth'].holds and c['crossover'].holds
    assert c['speed-forward'].holds is True and c['speed-both'].holds is False and c['speed-short'].holds is True
    assert (c['growth'].hardware, c['growth'].evidence) == ('a chip, 1 thread', 'benchmarks/results/cpu/x.json')
    c = v(par, PA_GOOD())
    assert c['speed-forward'].holds is True and c['speed-both'].holds is False
    for results in (llr, par): monkeypatch.setattr(results, 'benchmark', lambda: None)
    assert v(llr, LL_SAME())['growth'].ours is None and v(par, PA_GOOD())['speed-both'].ours is None

def test_the_ends_of_an_exponent_are_those_of_any_choice_of_repeats():
    "Every corner of the ranges, fitted one by one; and what is shorter than 2k does not count"
    b = bench({}, at=lambda T: 1. if T < 2048 else T**1.1)
    rows = [r['seconds']['forward']['log_linear'] for r in b['results'][1:]]
    corners = [np.polyfit(np.log([2048, 16384, 65536]), np.log([r[k] for r, k in zip(rows, ks)]), 1)[0] for ks in product(('low', 'high'), repeat=3)]
    assert llr.slope(b) == pytest.approx((1.1, min(corners), max(corners)))

def gpu_record(paper, fla, ours='measured', deterministic=True):
    "Rows as benchmarks/gpu.py writes them; `fla`: times faster, by measure"
    rows = [dict(name=f'{paper} {m}', case=dict(T=65536), contenders=dict(rlcr_suite=dict(status=ours)),
                 times_faster={'fla': x, 'sdpa': .1} if x else {'sdpa': .1}) for m, xs in fla.items() for x in xs]
    rows.append(dict(name=f'{paper} training', case=dict(T=65536), times_faster={}, contenders=dict(rlcr_suite=dict(status=ours, deterministic=deterministic))))
    return dict(device='a-gpu', repeats=7, stamp=STAMP, evidence='benchmarks/results/a-gpu/gpu.json', results=rows)

def test_speeds_of_a_gpu(monkeypatch):
    "The worst row decides; a kernel that failed counts as zero, and what nobody ran is no evidence"
    def found(results, record):
        monkeypatch.setattr(trials, 'gpu_benchmark', lambda: record)
        return {k: results.OURS[k](None) for k in results.OURS if k.startswith('gpu')}
    assert set(found(llr, None).values()) == set(found(par, None).values()) == {None}
    f = found(llr, gpu_record('log_linear', dict(forward=(3., 1.9, None), backward=(6., 7.))))
    assert (f['gpu-forward']['ours'].value, f['gpu-forward']['ours'].high, f['gpu-backward']['ours'].value, f['gpu-forward']['scale']) == (1.9, 3., 6., 'gpu')
    f = found(par, gpu_record('path', dict(forward=(2.,), decode=(4., 3.5)), deterministic=False))
    assert f['gpu-backward'] is None and f['gpu-decode']['ours'].value == 3.5 and f['gpu-training']['ours'].value == 0
    assert found(par, gpu_record('path', {}))['gpu-training']['ours'].value == 1
    assert found(par, gpu_record('path', {}, ours='not measured: out of time'))['gpu-training'] is None
    f = found(par, gpu_record('path', dict(forward=(2.,)), ours='failed: out of memory'))
    assert f['gpu-forward']['ours'].value == f['gpu-training']['ours'].value == 0

def test_a_gpus_record_is_found(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(trials, 'benchmark', lambda name, device: asked.append((name, device)) or {'device': device})
    monkeypatch.setattr(records, 'checkout', lambda: None)
    assert trials.gpu_benchmark() is None
    monkeypatch.setattr(records, 'checkout', lambda: tmp_path)
    for device in ('cpu', 'nvidia-h200'):
        (tmp_path/'benchmarks/results'/device).mkdir(parents=True)
        (tmp_path/f'benchmarks/results/{device}/gpu.json').write_text('{}')
    assert trials.gpu_benchmark() == {'device': 'nvidia-h200'} and set(asked) == {('gpu', 'nvidia-h200')}
