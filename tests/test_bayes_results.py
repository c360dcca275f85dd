"Bayesian teaching: claims decided by their rules on made-up answers whose truth is known, teachers and school by hand, the smallest experiment."
import json

import numpy as np
import pandas as pd
import pytest

from rlcr_suite.bayes_teaching import experiment as ex, results as res, teach as te
from rlcr_suite.bayes_teaching.assistant import Assistant
from rlcr_suite.bayes_teaching.world import FlightWorld, HotelWorld, ShopWorld
from rlcr_suite.core import jobs as core

U, K = 30, 20


@pytest.fixture(autouse=True)
def quick_decisions(monkeypatch):
    "100 resamples, for the verdicts looked for here are not close; what needs no evidence has pages of its own"
    real = {n: getattr(res, n) for n in ('seed_bootstrap', 'bootstrap')}
    for n, f in real.items(): monkeypatch.setattr(res, n, lambda *a, f=f, **k: f(*a, **(k | dict(n_boot=100))))
    monkeypatch.setattr(res, 'OURS', {k: f for k, f in res.OURS.items() if k not in ('golden', 'domains')})


def made_up(accuracy, agreement=lambda arm: .5, of_user=lambda arm: {}, chats=(256, 1024), scale='quick', seeds=(0, 1, 2)):
    "Evidence in which `accuracy(arm, chats, world, seen)` of the answers are right, `agreement(arm)` are the Assistant's, and columns of `users` are as `of_user(arm)` says, or .5"
    scores, users = [], []
    for arm, n, seed in [('untaught', 0, 0), *((a, n, s) for a in ('oracle', 'bayes') for n in chats for s in seeds)]:
        rng = np.random.default_rng([seed, n, len(arm)])
        for world in ex.WORLDS if n in (0, chats[-1]) else ['flight-4']:
            for seen in range(6):
                draw = lambda p: rng.binomial(K, p, U)
                scores.append(pd.DataFrame(dict(arm=arm, chats=n, seed=seed, world=world, user=np.arange(U), seen=seen, asked=K, right=draw(accuracy(arm, n, world, seen)), agree=draw(agreement(arm)))))
        columns = {c: of_user(arm).get(c, .5) + .02*rng.normal(size=U) for c in ('readable', 'implied', 'match', 'error', 'brier', 'confidence', 'correct', 'xy', 'xx', 'yy')}
        users.append(pd.DataFrame(dict(arm=arm, chats=n, seed=seed, user=np.arange(U)) | columns))
    about = dict(scale=scale, seconds=1., hardware='h', versions={'python': '3'}, commit='abcdef0', date='2026-01-01')
    return ex.Evidence(pd.concat(scores, ignore_index=True), pd.concat(users, ignore_index=True), pd.DataFrame(dict(arm=['bayes'], chats=[256], seed=[0], part=[0], step=[1], loss=[1.])), about)

def verdicts(e): return {c.id: c.holds for c in res.decide(e)}

LEVEL = dict(untaught=.4, oracle=.55, bayes=.75)
GOOD = lambda **k: made_up(lambda arm, n, world, seen: LEVEL[arm] if seen else .35, lambda arm: LEVEL[arm],
                           lambda arm: dict(implied=LEVEL[arm], match=LEVEL[arm], brier=1 - LEVEL[arm], error=1 - LEVEL[arm], xy=.4 if arm == 'oracle' else .8, xx=1.), **k)


def test_a_better_teacher_is_found_better():
    v = verdicts(GOOD())
    assert all(v[i] is True for i in ('untaught', 'taught', 'bayes-256', 'bayes-1024', 'agreement', 'beliefs', 'consistent', 'brier', 'error', 'slope', 'moves', 'gain-hotel', 'gain-shop', *(f'transfer-{w}' for w in res.ELSEWHERE)))
    assert v['bayes-4096'] is v['real'] is v['shop-taught'] is None         # not measured at this scale, or by nobody


def test_equal_teachers_are_not_found_different():
    v = verdicts(made_up(lambda arm, n, world, seen: .5 if seen else .35))
    assert not any(v[i] for i in ('taught', 'bayes-256', 'bayes-1024', 'agreement', 'beliefs', 'consistent', 'brier', 'error', 'slope', 'moves', 'gain-hotel', 'gain-shop', *(f'transfer-{w}' for w in res.ELSEWHERE)))


def test_an_untaught_model_that_learns_from_choices_is_seen():
    assert verdicts(made_up(lambda arm, n, world, seen: .4 + .08*seen))['untaught'] is False


def test_sizes_and_worlds_are_kept_apart():
    "Bayes is better at the larger size only, and in one world only"
    e = made_up(lambda arm, n, world, seen: .75 if arm == 'bayes' and n == 1024 and world in ('flight-4', 'hotel') else .5)
    v = verdicts(e)
    assert v['bayes-256'] is False and v['bayes-1024'] is True and v['transfer-hotel'] is True and v['transfer-flight-2'] is False
    i = res.over(res.right(e, 'bayes'), res.right(e, 'oracle'))
    assert i.value == pytest.approx(.25, abs=.03) and i.low < .25 < i.high and (i.seeds, i.n) == (3, U)


def test_what_was_not_looked_at_is_not_counted():
    e = GOOD()
    e.scores.loc[e.scores.world == 'hotel', 'agree'] = -1
    with pytest.raises(res.NotMeasured, match='no agree of bayes in hotel'): res.right(e, 'bayes', world='hotel', what='agree')
    assert res.right(e, 'bayes', world='hotel').shape == (3, U)


def test_the_ledger(tmp_path, monkeypatch):
    monkeypatch.setenv('RLCR_SUITE_RECORDS', str(tmp_path))
    with pytest.raises(ValueError, match='PAPER=bayes_teaching'): res.stored()
    e, full = GOOD(), GOOD(chats=(256, 1024, 4096), scale='full')
    back = ex.read_evidence(ex.write_evidence(e, tmp_path/'evidence'/'bayes_teaching'/'quick'))
    assert verdicts(back) == verdicts(e)
    ex.write_evidence(full, tmp_path/'evidence'/'bayes_teaching'/'full')
    claims = {c.id: c for c in res.publish(back)}
    assert claims['bayes-256'].scale == 'quick' and claims['bayes-4096'].scale == 'full' and claims['real'].status == 'no evidence yet'
    first = (tmp_path/'bayes_teaching.json').read_bytes()
    res.publish(back)
    assert (tmp_path/'bayes_teaching.json').read_bytes() == first and res.stored().about['scale'] == 'quick'
    assert set(res.OURS) <= {c.id for c in res.CLAIMS} and {f'bayes-{n}' for s in ('quick', 'full') for n in ex.SCALES[s].chats} <= {c.id for c in res.CLAIMS}


@pytest.mark.parametrize('world', [FlightWorld(2), FlightWorld(5), HotelWorld(), ShopWorld('tent')], ids=['two', 'five', 'hotel', 'shop'])
def test_both_teachers_in_every_world(world):
    "The oracle is always right; the Bayesian teacher says what one Assistant a user would"
    sets, choices = te.rounds_of(world, world.sample_users(12, 3), 4, 2)
    assert (te.guesses(world, sets, choices, 'oracle') == choices).all()
    said = te.guesses(world, sets, choices, 'bayes')
    for u in range(12):
        a = Assistant(world)
        for t in range(4):
            assert a.predict(sets[u, t, None])[0, 0] == said[u, t]
            a.update(sets[u, t], choices[u, t])
    ds = te.teaching_set(world, 'bayes', 6, rounds=3, seed=1)
    assert [len(m) for m in ds['messages']] == [6]*6 and len(te.prefixes(ds)) == 18


def test_school_teaches_no_inference():
    "Users in school state every taste before the first question; slips are not learned; every word is known"
    tok = te.tokenizer()
    ds = te.school_set(te.Lesson((2, 4), (2, 3), 40, 3, ends=True), tok, seed=5)
    learned = 0
    for ids, labels in zip(ds['input_ids'], ds['labels']):
        text = tok.decode(ids)
        first_line = text.split('\n')[0]
        assert tok.unk_token not in text
        shown = {next(f for f in te._features() if w.startswith(f)) for w in text.split('\n')[1].split('<')[0].split() if not w.isdigit()}
        assert all(any(f + t in first_line for t in te.TASTE_WORDS) for f in shown) and len(first_line.split()) == 5
        turns = text.split('<assistant>')[1:]
        verdicts_, kept, span = [t.split('<user>')[1].startswith('correct') for t in turns if '<user>' in t], [], []
        for i, (t, l) in enumerate(zip(ids, labels)):
            if t == tok.eos_token_id: kept.append(l != -100)
        assert all(k == v for k, v in zip(kept, verdicts_))                 # learned where the user then says "correct", and only there
        learned += sum(kept)
    assert learned > 0 and any('incorrect' in tok.decode(i) for i in ds['input_ids'])


def test_ends_are_learned_only_where_it_is_said():
    tok = te.tokenizer()
    ends = {e: any(t == tok.eos_token_id for y in te.school_set(te.Lesson((1, 1), (1, 1), 8, 2, ends=e), tok)['labels'] for t in y) for e in (True, False)}
    assert ends == {True: True, False: False}


def test_a_school_that_fails_says_so(tmp_path):
    "Three tries with other conversations, then an error; a lesson that is passed is given once"
    size, lesson = ex.SCALES['test'].size, lambda exam: te.Lesson((1, 1), (1, 1), 4, 2, exam=exam)
    with pytest.raises(RuntimeError, match='lesson 2 was given 3 times'): te.school(te.tokenizer(), tmp_path, (lesson(99.), lesson(.01)), **size)
    assert sorted(p.name for p in tmp_path.iterdir()) == ['lesson-0-0', 'lesson-1-0', 'lesson-1-1', 'lesson-1-2']


def test_number_sense():
    "Words of one value are alike across features, and nearer to their neighbours than to the other end"
    tok = te.tokenizer()
    E, v = te.newborn(tok, seed=1).model.embed_tokens.weight.detach(), tok.get_vocab()
    step = E[v['priceseven']] - E[v['pricethree']]
    assert np.allclose(step, E[v['durationseven']] - E[v['durationthree']], atol=1e-6) and np.allclose(E[v[' priceseven']], E[v['priceseven']])
    assert (E[v['priceten']] - E[v['pricezero']]).norm() > 2*step.norm()


def test_the_smallest_experiment(tmp_path):
    "Schooled, taught and tested by the jobs of scale `test`, here; the tables say what was asked, and nothing decides"
    todo = {(j.arm, j.chats, j.seed): j for j in ex.jobs('test', tmp_path)}
    s = ex.SCALES['test']
    for key in (('school', 0, 0), ('bayes', s.chats[-1], 0), ('oracle', s.chats[0], 1), ('untaught', 0, 0), ('assistant', 0, 0)):
        core.here(todo[key])
        assert todo[key].done and todo[key].progress()['step'] == todo[key].progress()['total'] > 0
    t = pd.read_parquet(todo['bayes', s.chats[-1], 0].dir/'scores.parquet')
    assert set(t.world) == set(ex.WORLDS) and len(t) == 6*(s.users[0] + s.users[1]*(len(ex.WORLDS) - 1)) and ((t.right >= 0) & (t.right <= t.asked)).all()
    assert set(pd.read_parquet(todo['oracle', s.chats[0], 1].dir/'scores.parquet').world) == {'flight-4'}
    a = pd.read_parquet(todo['assistant', 0, 0].dir/'scores.parquet')
    assert (a.agree == a.asked).all()
    with pytest.raises(ValueError, match='not finished'): ex.collect('test', tmp_path)
    with pytest.raises(ValueError, match='scale must be one of quick, full, test'): ex.jobs('huge', tmp_path)
    json.dumps([c.id for c in res.CLAIMS])
