"""The results of the Wavelength chapter: what a rule sees, what turns it, the people behind it, and a run from its beginning to its evidence."""
import json
import numpy as np
import pandas as pd
import pytest
from rlcr_suite.core import jobs as core
from rlcr_suite.core import trials
from rlcr_suite.core.stats import bootstrap, seed_bootstrap
from rlcr_suite.core.trials import Evidence, read_evidence, write_evidence
from rlcr_suite.wavelength import experiment as ex
from rlcr_suite.wavelength import results as res
from rlcr_suite.wavelength.game import STATES, Item, check_clue
from rlcr_suite.wavelength.lexicon import GIVE, GUESS, LEARN, Judge, Population, give, items, lexicon, parse_lexicon
from rlcr_suite.wavelength.pragmatics import NULL

ERROR = dict(small=14., medium=11.2, large=10.8, people=10.7)      # literal, comprehension
DIRECT = dict(small=17., medium=14., large=12., people=11.)        # one draw, production
SCALES = 45

def made_up(scale='quick', sizes=tuple(ERROR), runs=3, noise=.2, listen={}, speak={}, unknown=.3, mean={}):
    """Evidence with known means: `listen` and `speak` change what is added to ERROR and DIRECT by (size, depth or draws, alpha), or by (size, 'sample'); `mean` the spread of a listener around people's means"""
    rng, test, rows = np.random.default_rng(0), res.test_items(3), []
    hard, target, people = rng.normal(size=len(test)), np.array([i.target for i in test]), np.array([np.mean(i.guesses) for i in test])
    for size in sizes:
        for seed in range(1 if size == 'people' else runs):
            luck = 0 if size == 'people' else noise*rng.normal()
            place = people + mean.get(size, dict(small=15.).get(size, 3.))*rng.normal(size=len(test))
            for way, depth, alpha in [('literal', 0, 1.), *(('rsa', d, a) for d, a in ex.LISTENING if d), *([('sample', 0, 1.)]*(size != 'people'))]:
                added = listen.get((size, 'sample') if way == 'sample' else (size, depth, alpha), 0. if depth == 0 else -.5 if alpha < 8 else .5)
                rows.append(pd.DataFrame(dict(task='comprehension', way=way, depth=depth, alpha=alpha, draws=np.nan, size=size, seed=seed, unit=np.arange(len(test)), target=target, mean=place,
                                              error=ERROR[size] + added + 3*hard + luck, missed=12., unknown=np.nan, fell_back=np.nan)))
            for draws, alpha in ex.SPEAKING:
                added = speak.get((size, draws, alpha), 0. if alpha == 0 else -5. - alpha/2 + 8/draws)
                rows.append(pd.DataFrame(dict(task='production', way='rsa', depth=np.nan, alpha=alpha, draws=draws, size=size, seed=seed, unit=np.arange(SCALES), target=np.nan, mean=np.nan,
                                              error=DIRECT[size] + added + 2*hard[:SCALES] + luck, missed=np.nan, unknown=unknown if alpha == 0 else .05 + .001*hard[:SCALES], fell_back=0.)))
    curves = pd.DataFrame(dict(size='small', seed=0, step=[25], loss=[2.]))
    about = dict(scale=scale, plan=ex.SCALES[scale].plan, seconds=1., trials={}, hardware='h', versions={'python': '3'}, commit='abcdef0', date='2026-01-01')
    return Evidence(pd.concat(rows, ignore_index=True), curves, about)

@pytest.fixture(autouse=True)
def few_resamples(monkeypatch):
    "The interval of a made-up difference need not be known to three digits"
    monkeypatch.setattr(res, 'seed_bootstrap', lambda *a, n_boot=None, **k: seed_bootstrap(*a, n_boot=150, **k))
    monkeypatch.setattr(res, 'bootstrap', lambda *a, **k: bootstrap(*a, n_boot=300, **k))

CHEAP = [c for c in res.CLAIMS if c.kind not in ('theorem',)]

def verdicts(e, claims=CHEAP):
    return {c.id: c.holds for c in trials.decide(e, claims, {c.id: res.OURS[c.id] for c in claims if c.id in res.OURS})}

# ---------------------------------------------------------------------------------------------------------------- rules

def test_what_was_made_to_hold_holds_and_the_rest_is_open():
    v = verdicts(made_up())
    assert {id for id in v if v[id] is None} == {'real', 'real-cot', 'real-production'} and v.pop('forty') is False and all(x for x in v.values() if x is not None)

# claim -> evidence that turns it
TURNED = {'ceiling-small': dict(listen={('small', 0, 1.): -4.}), 'ceiling-large': dict(listen={('large', 0, 1.): 2.}), 'size': dict(listen={('large', 0, 1.): 3.2}),
          'correlation': dict(mean=dict(large=25.)), 'correlation-size': dict(mean=dict(small=3., large=3.)), 'sample': dict(listen={('large', 'sample'): 2.}),
          'production-small': dict(speak={('small', 32, 1.): .1}), 'production-medium': dict(speak={('medium', 32, 1.): .1}), 'production-large': dict(speak={('large', 32, 0.): -6.}),
          'production-people': dict(speak={('people', 32, 1.): 0.}), 'unknown': dict(unknown=.01), 'draws': dict(speak={('large', 4, 1.): -6.}), 'alpha-speaking': dict(speak={('large', 32, 4.): -5.}),
          'comprehension-small': dict(listen={('small', 1, 1.): .1}), 'comprehension-large': dict(listen={('large', 1, 1.): 0.}), 'comprehension-people': dict(listen={('people', 1, 1.): .2}),
          'depth': dict(listen={('people', 5, 1.): -1.}), 'alpha-listening': dict(listen={('people', 1, 8.): -.6})}

@pytest.mark.parametrize('id', TURNED)
def test_a_rule_turns_with_its_own_number(id):
    "Each claim reads the arm and the way that it speaks of: changed evidence turns it, and noise between runs leaves it undecided in the sense of its rule"
    claim = [c for c in res.CLAIMS if c.id == id]
    assert verdicts(made_up(**TURNED[id]), claim)[id] is False

def crowd(monkeypatch, guesses):
    "Other people: (items, 40) guesses from the items' targets"
    test = [Item(i.scale, i.clue, i.target, tuple(g)) for i, g in zip(res.test_items(3), guesses(np.array([i.target for i in res.test_items(3)])[:, None]).clip(0, 100))]
    monkeypatch.setattr(res, 'asked', lambda e: test)

def test_what_a_crowd_is_worth(monkeypatch):
    "Forty who err each on their own gain by averaging; forty who all are misled by the clue do not, and agree; forty who answer at random agree on nothing"
    rng, claims = np.random.default_rng(0), [c for c in res.CLAIMS if c.id in ('forty', 'halves')]
    crowd(monkeypatch, lambda t: t + 12*rng.normal(size=(len(t), 40)))
    assert verdicts(made_up(), claims) == dict(forty=True, halves=True)
    crowd(monkeypatch, lambda t: t + 12*rng.normal(size=(len(t), 1)) + 3*rng.normal(size=(len(t), 40)))
    assert verdicts(made_up(), claims) == dict(forty=False, halves=True)
    crowd(monkeypatch, lambda t: t*0 + rng.uniform(0, 100, (len(t), 40)))
    assert verdicts(made_up(), claims) == dict(forty=False, halves=False)

def test_runs_that_differ_widen_the_interval():
    quiet, loud = (res.listening(made_up(noise=n), 'large', ('small', {})) for n in (.01, 4.))
    assert quiet.value == pytest.approx(-3.2, abs=.1) and quiet.high - quiet.low < .3 < loud.high - loud.low and quiet.seeds == 3
    alone = res.listening(made_up(), 'people', ('people', {}), depth=1)           # one arm that has no runs: over items alone
    assert alone.value == pytest.approx(-.5) and alone.n == len(res.test_items(3)) and alone.seeds is None
    with pytest.raises(ValueError, match='no comprehension of large with depth 7'): res.arm(made_up(), 'comprehension', 'large', depth=7)

def test_what_is_computed_holds():
    e = made_up()
    assert res._halves(e).value > .9 and .5 < res._forty(e).low < res._forty(e).high < 1.
    assert res._no_division(e).value == 0 and res._no_division(e).n > 1000

def test_a_wrong_layer_would_be_seen(monkeypatch):
    "The listener that the theorem compares: right as it is, and found wrong when its rationality is off by a hundredth"
    from rlcr_suite.wavelength import pragmatics
    small = Population(entries=lexicon()[:2])
    monkeypatch.setattr(res, 'people', lambda: small)
    assert res._exact_listener(None).value < 1e-12 and res._exact_speaker(None).value < 1e-12
    right_c, right_p = pragmatics.comprehend, pragmatics.produce
    monkeypatch.setattr(pragmatics, 'comprehend', lambda *a, alpha=1., **k: right_c(*a, alpha=alpha*1.01, **k))
    monkeypatch.setattr(pragmatics, 'produce', lambda *a, alpha=1., **k: right_p(*a, alpha=alpha*1.01, **k))
    assert res._exact_listener(None).value > 1e-6 and res._exact_speaker(None).value > 1e-6

def test_the_record(tmp_path, monkeypatch):
    monkeypatch.setenv('RLCR_SUITE_RECORDS', str(tmp_path))
    few = [c for c in CHEAP if c.id in ('forty', 'halves', 'ceiling-small', 'size', 'real')]
    monkeypatch.setattr(res, 'CLAIMS', tuple(few))
    monkeypatch.setattr(res, 'OURS', {c.id: res.OURS[c.id] for c in few if c.id in res.OURS})
    e = made_up('full')
    back = read_evidence(write_evidence(e, tmp_path/'evidence'/'wavelength'/'full'))
    claims = res.publish(back, tmp_path/'wavelength.json')
    first = (tmp_path/'wavelength.json').read_bytes()
    res.publish(back, tmp_path/'wavelength.json')
    assert (tmp_path/'wavelength.json').read_bytes() == first and {c.id: c.holds for c in claims} == verdicts(e, few)
    assert {c.id for c in claims if c.paper_value} == {'forty', 'halves'}
    later = {c.id: c for c in res.publish(made_up('quick', sizes=('small', 'people')), tmp_path/'wavelength.json')}
    assert (later['size'].scale, later['ceiling-small'].scale, later['real'].status) == ('full', 'quick', 'no evidence yet')   # what a quick run leaves open, a stored full one decides

# ---------------------------------------------------------------------------------------------------------------- people

def test_every_clue_keeps_the_rules():
    assert len(lexicon()) >= 40 and all(len(e.clues) >= 8 for e in lexicon())
    assert not [(c, str(e.scale)) for e in lexicon() for c in e.clues if check_clue(c, e.scale)]
    with pytest.raises(ValueError, match="line 2: 'hotter soup' is no clue"): parse_lexicon('dry (arid) | wet (damp): sand 1\ncold (icy) | hot (warm): hotter soup 70')

def test_the_people_of_the_test_teach_nobody():
    "Models learn from 40, are judged by 40 others, on clues of a third 40"
    p = Population()
    assert not set(range(*LEARN.indices(120))) & set(range(*GUESS.indices(120))) | set(range(*GUESS.indices(120))) & set(range(*GIVE.indices(120)))
    for i in items(p)[::20]: assert list(i.guesses) == p.guesses[GUESS, p.at(i.scale, i.clue)].tolist()
    from rlcr_suite.wavelength.transformer import lessons
    d = lessons(p, scales=[0])
    said = sorted(int(m[0]['content']) for x, m in zip(d['prompt'], d['completion']) if x[0]['content'] == 'cold to hot : sauna ?')
    assert said == sorted(5*int(np.floor(g/5 + .5)) for g in p.guesses[LEARN, p.at(lexicon()[0].scale, 'sauna')])

def test_givers_say_what_is_closest_to_their_own_opinion():
    p, n = Population(), 63
    who, scale, target = np.arange(n) % 120, np.arange(n) % 45, 5.*(np.arange(n) % 21)
    said = give(p, who, scale, target, recall=99)
    for w, s, t, j in zip(who, scale, target, said): assert abs(p.opinions[w, j] - t) == abs(p.opinions[w, p.on(s)] - t).min()
    assert (give(p, who, scale, target, seed=1) != give(p, who, scale, target, seed=2)).any()

# ---------------------------------------------------------------------------------------------------------------- the experiment

def test_silence_costs_what_fifty_costs():
    p = Population(entries=lexicon()[:1])
    drawn = ex.drawn_clues(lambda *a: [], p, 4)
    t = ex.production(drawn, Judge(p, LEARN), Judge(p), ((4, 0.), (4, 1.)))
    assert t.error.tolist() == pytest.approx([np.abs(STATES - 50).mean()]*2) and (t.unknown == 1).all()
    heard = ex.comprehension(Judge(p), {lexicon()[0].scale: []}, [Item(lexicon()[0].scale, 'sauna', 85.)])
    assert heard[heard.depth == 0]['mean'].iloc[0] == pytest.approx(Judge(p)(lexicon()[0].scale, ['sauna'])[0] @ STATES)
    assert NULL not in ex.Table(Judge(p)).known

def test_plans_can_be_run():
    for name, s in ex.SCALES.items():
        json.dumps(s.plan)
        assert set(s.sizes) <= set(ex.SIZES) and (name == 'test' or len(s.seeds) >= 3)
        assert sorted((t.size, t.seed) for t in ex.jobs(name, 'x')) == sorted([(z, i) for z in s.sizes for i in s.seeds] + [('people', 0)])

def test_the_smallest_experiment(tmp_path):
    "Taught, played and collected; scores that were lost are made again from what was taught, and come out the same"
    todo = ex.jobs('test', tmp_path)
    for t in todo: core.here(t)
    e, plan = ex.collect('test', tmp_path), ex.SCALES['test'].plan
    assert set(e.scores['size']) == {*ex.SCALES['test'].sizes, 'people'} and e.curves.step.max() == plan['steps']
    assert e.scores.groupby(['size', 'task'], observed=True).size().to_dict()[('people', 'comprehension')] == 3*plan['scales']*len(ex.LISTENING)
    assert {'parameters', 'beliefs', 'said', 'refused'} <= set(e.about['trials']['small seed 0'])
    before = pd.read_parquet(todo[0].dir/'scores.parquet')
    (todo[0].dir/'scores.parquet').unlink()
    assert not todo[0].done and todo[0].progress()['step'] == plan['steps']
    todo[0].work()
    pd.testing.assert_frame_equal(pd.read_parquet(todo[0].dir/'scores.parquet'), before)
