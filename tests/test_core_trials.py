"Trials: plans, rows, resumption in the middle of a plan, measures and their intervals."
import numpy as np
import pandas as pd
import pytest
import torch

from rlcr_suite.core import jobs
from rlcr_suite.core.tasks import Scores, flip_flop, score
from rlcr_suite.core.trials import Measured, Trial, collect, generator, interval, read_evidence, rows, write_evidence

SMALL = dict(hidden_size=16, layers=1, heads=2, intermediate_size=32)
PLAN = {'bit': dict(make=dict(task='flip_flop', T=16, ignore=.5), model=SMALL, train=dict(steps=8, batch=8, lr=5e-3), tests={'same': dict(n=12), 'long': dict(n=6, T=32, bins=4)}),
        'recall': dict(make=dict(task='mqar', T=20, pairs=2, keys=4, values=4), model=SMALL, train=dict(steps=6, batch=8), tests={'same': dict(n=12, batch=5)})}


def test_generator():
    t = generator(dict(task='flip_flop', T=8))(n=2, seed=3)
    assert torch.equal(t.input_ids, flip_flop(2, T=8, seed=3).input_ids)
    for wrong in (dict(task='os'), dict(T=8), {}):
        with pytest.raises(ValueError, match='task must be one of mqar'): generator(wrong)


@pytest.mark.parametrize('T, bins', [(7, 1), (7, 3), (7, 7), (8, 4)])
def test_rows_sum_up_what_scores_say(T, bins):
    rng = np.random.default_rng(T*bins)
    asked = rng.random((5, T)) < .4
    s = Scores(*(np.where(asked, rng.random((5, T)), np.nan).astype(np.float32) for _ in range(3)))
    s = s._replace(right=np.where(asked, (s.right > .5), np.nan).astype(np.float32))
    t = rows(s, bins)
    assert t.asked.sum() == asked.sum() and (t.asked > 0).all() and t.bin.max() < bins
    assert t.loss.sum() == pytest.approx(np.nansum(s.loss), rel=1e-5) and t.right.sum() == np.nansum(s.right) and t.optimum.sum() == pytest.approx(np.nansum(s.optimum), rel=1e-5)
    edge = np.linspace(0, T, bins + 1).round().astype(int)
    for r in t.itertuples():
        part = slice(edge[r.bin], edge[r.bin + 1])
        assert r.asked == asked[r.sequence, part].sum() and r.loss == pytest.approx(np.nansum(s.loss[r.sequence, part]), rel=1e-5)


@pytest.fixture(scope='module')
def trials(tmp_path_factory):
    root = str(tmp_path_factory.mktemp('trials'))
    made = [Trial('softmax', s, root, PLAN) for s in (0, 1)]
    assert made[0].progress() == dict(step=0, total=14) and not made[0].done
    for t in made: jobs.here(t)
    return made


def test_a_trial_is_its_parts(trials):
    "What a trial stores is what fit and score give by themselves"
    from rlcr_suite.core.decoder import tiny_decoder
    from rlcr_suite.core.tasks import fit
    from rlcr_suite.core.trials import TEST_SEED
    p, t = PLAN['bit'], pd.read_parquet(trials[1].dir/'bit.parquet')
    model = tiny_decoder(5, 'softmax', seed=1, **SMALL)
    fit(model, generator(p['make']), trials[1].dir/'again', seed=1, **p['train'])
    s = score(model, flip_flop(6, T=32, ignore=.5, seed=TEST_SEED))
    long = t[t.test == 'long']
    assert long.loss.sum() == pytest.approx(np.nansum(s.loss), rel=1e-4) and long.right.sum() == np.nansum(s.right)
    assert set(long.bin) <= {0, 1, 2, 3} and (t.seed == 1).all() and set(t.mixer) == {'softmax'} and set(t.task) == {'bit'}
    assert trials[1].progress() == dict(step=14, total=14)


def test_what_is_done_is_not_done_again(trials, tmp_path):
    "A trial killed between two tasks goes on with the second"
    import shutil
    shutil.copytree(trials[0].dir, tmp_path/'softmax-0')
    t = Trial('softmax', 0, str(tmp_path), PLAN)
    stamp, lost = (t.dir/'bit.parquet').stat().st_mtime_ns, (t.dir/'recall.parquet').read_bytes()
    (t.dir/'recall.parquet').unlink()
    shutil.rmtree(t.dir/'recall')
    assert not t.done and t.progress()['step'] == 8
    jobs.here(t)
    again = pd.read_parquet(t.dir/'recall.parquet')
    (tmp_path/'lost').write_bytes(lost)
    assert t.done and (t.dir/'bit.parquet').stat().st_mtime_ns == stamp
    pd.testing.assert_frame_equal(again.drop(columns='seconds'), pd.read_parquet(tmp_path/'lost').drop(columns='seconds'), rtol=1e-4)


def test_a_trial_runs_as_a_process(tmp_path):
    t = Trial('softmax', 3, str(tmp_path), {'bit': PLAN['bit']})
    jobs.run([[t]])
    assert t.done
    bad = Trial('no_such_mixer', 0, str(tmp_path), {'bit': PLAN['bit']})
    with pytest.raises(jobs.JobFailed, match='no mixer is called'): jobs.run([[bad]])


def test_evidence(trials, tmp_path):
    e = collect(trials, dict(scale='test'))
    assert set(e.scores.seed) == {0, 1} and set(e.scores.task) == {'bit', 'recall'} and e.about['scale'] == 'test' and e.about['plan'] == PLAN and 'versions' in e.about
    assert (e.curves.groupby(['seed', 'task']).step.max() == [8, 6, 8, 6]).all() and (e.curves.seconds > 0).all()
    back = read_evidence(write_evidence(e, tmp_path/'x'))
    for a, b in ((e, back),):
        m, n = (Measured(x.scores, 'softmax', 'bit', 'long') for x in (a, b))
        np.testing.assert_allclose(m.loss, n.loss, rtol=1e-6)
    m = Measured(e.scores, 'softmax', 'bit', 'long')
    assert m.loss.shape == (2, 6, 4) and m.seeds == 2
    np.testing.assert_allclose(interval(m, 'loss', n_boot=100).value, (m.loss.sum((1, 2))/m.asked.sum((1, 2))).mean())
    late = slice(2, None)
    np.testing.assert_allclose(interval(m, 'accuracy', bins=late, n_boot=100).value, (m.right[..., late].sum((1, 2))/m.asked[..., late].sum((1, 2))).mean())
    assert m.curve('excess').shape == (2, 4) and np.nanmax(abs(m.curve('excess') - m.curve('loss'))) == 0 # certain answers
    with pytest.raises(ValueError, match='not finished: softmax seed 7'): collect([Trial('softmax', 7, trials[0].root, PLAN)], {})
    with pytest.raises(ValueError, match='no path on bit, same'): Measured(e.scores, 'path', 'bit', 'same')
    with pytest.raises(ValueError, match='measure must be'): m.sums('f1')


def test_a_difference_of_equal_mixers_is_nothing():
    rng = np.random.default_rng(0)
    t = pd.concat([pd.DataFrame(dict(mixer=m, task='t', test='x', seed=s, sequence=np.arange(50), bin=0, asked=3, right=rng.integers(0, 4, 50), loss=rng.random(50), optimum=.1)) for s in range(3) for m in 'a'])
    t = pd.concat([t, t.assign(mixer='b')])
    i = interval(Measured(t, 'a', 't', 'x'), 'loss', Measured(t, 'b', 't', 'x'), n_boot=50)
    assert i.value == i.low == i.high == 0 and i.seeds == 3
    assert interval(Measured(t, 'a', 't', 'x'), 'excess', n_boot=50).value == pytest.approx((t[t.mixer == 'a'].loss.mean() - .1)/3)
