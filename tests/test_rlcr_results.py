"Experiment and results: jobs, evidence, and claims decided by their rules, on made-up answers whose truth is known."
from dataclasses import replace
from functools import partial

import numpy as np
import pandas as pd
import pytest

from rlcr_suite.rlcr import results
from rlcr_suite.rlcr.experiment import Evidence, Job, collect, jobs, read_evidence, write_evidence
from rlcr_suite.rlcr.results import CLAIMS, METRICS, Runs, decide, measure, publish, stored, summary, votes
from rlcr_suite.rlcr.experiment import TEST_SEED
from rlcr_suite.rlcr.world import COLOURS, draw

N, K = 120, 4


@pytest.fixture(autouse=True)
def few_resamples(monkeypatch):
    "200 resamples: the verdicts looked for here are not close"
    monkeypatch.setattr(results, 'measure', partial(measure, n_boot=200))


def made_up(confidence, arms=('base', 'rlvr', 'rlcr', 'bce'), seeds=(0, 1, 2)):
    "Evidence in which every arm gives the Bayes answer and states `confidence(arm, q_star, rng)`"
    rows, samples = [], []
    for split in ('id', 'ood'):
        d = draw(N, split, TEST_SEED)
        best, q = d.posterior.argmax(1), d.posterior.max(1)
        common = dict(question=np.arange(N), ok=True, answer=[COLOURS[b] for b in best], correct=(best == d.truth).astype(float), p_correct=q, q_star=q, split=split)
        for arm in arms:
            for s in (0,) if arm == 'base' else seeds:
                rng = np.random.default_rng([s, len(arm)])
                for t in (0., 1.):
                    rows.append(pd.DataFrame(common | dict(arm=arm, seed=s, temperature=t, confidence=np.clip(confidence(arm, q, rng), 0, 1))))
                if split == 'id' and arm in ('rlvr', 'rlcr'):
                    samples += [rows[-1].drop(columns=['split', 'temperature']).assign(sample=k) for k in range(K)]
    return Evidence(pd.concat(rows, ignore_index=True), pd.concat(samples, ignore_index=True), pd.DataFrame(),
                    dict(scale='test', hardware='h', versions={'python': '3'}, commit='abcdef0', date='2026-01-01'))


honest = made_up(lambda arm, q, rng: q + .02*rng.normal(size=len(q)) if arm == 'rlcr' else np.full(len(q), .97))
same = made_up(lambda arm, q, rng: q + .02*np.random.default_rng(0).normal(size=len(q)))


def verdicts(e): return {c.id: c.holds for c in decide(replace(e, about=e.about | {'scale': 'quick'}))}


def test_a_better_arm_is_found_better():
    v = verdicts(honest)
    for id in ('ece-id', 'brier-id', 'auroc-id', 'ece-ood', 'brier-ood', 'classifier-id', 'accuracy-id', 'accuracy-ood', 'vote', 'discrimination', 'optimum',
               'theorem-optimum', 'theorem-order', 'theorem-log'):
        assert v[id] is True, id
    assert v['rlvr-hurts'] is False


def test_equal_arms_are_not_found_different():
    v = verdicts(same)
    for id in ('ece-id', 'brier-id', 'ece-ood', 'brier-ood', 'auroc-id', 'classifier-id'): assert v[id] is False, id


def test_the_order_of_values_can_be_found_wrong(monkeypatch):
    "Were the value of the Brier reward p - 1/4, it would rise also where the gap forbids it"
    from rlcr_suite.rlcr import scoring
    exact = scoring.value
    monkeypatch.setattr(scoring, 'value', lambda rule, p, lam=1.: p - .25 if rule is scoring.brier else exact(rule, p, lam))
    assert results._theorem_order().value > 0


def test_averaged_confidences_are_compared_with_a_single_one():
    "Samples that scatter around the truth: their mean is nearer to it"
    s = honest.samples.copy()
    s['confidence'] = np.clip(s.q_star + .3*np.random.default_rng(0).choice([-1, 1], len(s)), 0, 1)
    i = results._vote_brier(replace(honest, samples=s))
    assert i.high < 0 and results._vote_brier(honest).value == pytest.approx(0, abs=1e-9) # equal samples: nothing to gain


def test_theorems_cite_no_experiment():
    for c in decide(replace(honest, about=honest.about | {'scale': 'quick'})):
        assert (c.evidence is None) == (c.kind == 'theorem' or c.ours is None), c.id


def test_evidence_on_other_questions_has_no_optimum_beside_it():
    t = honest.answers.copy()
    t['q_star'] = t.q_star.to_numpy()[::-1]
    assert 'Bayes' not in summary(replace(honest, answers=t)).index and 'Bayes' in summary(honest).index


def test_a_claim_without_its_arm_has_no_evidence_and_is_not_left_out():
    claims = {c.id: c for c in decide(replace(honest, about=honest.about | {'scale': 'quick'}))}
    assert list(claims) == [c.id for c in CLAIMS]
    assert claims['log-arm'].ours is None and claims['log-arm'].holds is None and claims['log-arm'].status == 'no evidence yet'


def test_measures_agree_with_direct_computation():
    r = Runs(honest, 'rlcr')
    assert r.confidence.shape == (3, N)
    assert measure(r, 'accuracy').value == pytest.approx(r.p_correct.mean())
    assert measure(r, 'brier').value == pytest.approx(((r.confidence - r.correct)**2).mean())
    assert measure(r, 'error').value == pytest.approx(abs(r.confidence - r.q_star).mean())
    base = measure(Runs(honest, 'rlvr'), 'brier', Runs(honest, 'base'))
    assert base.value == pytest.approx(0, abs=1e-12) # one base model against each of three equal runs
    with pytest.raises(ValueError, match='metric must be'): measure(r, 'f1')
    with pytest.raises(ValueError, match="no arm 'group'"): Runs(honest, 'group')


def test_unreadable_answers_count_as_confidence_zero():
    t = honest.answers.copy()
    t.loc[(t.arm == 'rlcr') & (t.question == 3), ['confidence', 'ok']] = [np.nan, False]
    r = Runs(replace(honest, answers=t), 'rlcr')
    assert (r.confidence[:, 3] == 0).all() and r.ok.mean() == pytest.approx(1 - 1/N)


def test_votes_of_equal_samples_are_the_sample():
    v = votes(honest, 'rlcr', Ks=(1, K))
    for m in v: np.testing.assert_allclose(v[m][0], v[m][1])
    with pytest.raises(ValueError, match='no samples'): votes(honest, 'base')


def test_summary_has_every_arm_and_the_optimum():
    s = summary(honest)
    assert list(s.index) == ['base', 'RLVR', 'RLCR', 'BCE classifier', 'Bayes'] and s.shape[1] == len(METRICS) + 2


def test_evidence_round_trip_and_record(tmp_path, monkeypatch):
    monkeypatch.setenv('RLCR_SUITE_RECORDS', str(tmp_path))
    e = replace(honest, curves=pd.DataFrame(dict(arm=['rlcr'], seed=[0], step=[1], reward=[.5])), about=honest.about | {'scale': 'quick'})
    back = read_evidence(write_evidence(e, tmp_path/'evidence'/'rlcr'/'quick'))
    assert verdicts(back) == verdicts(e)
    assert stored().about == e.about
    with pytest.raises(ValueError, match='no evidence in'): stored('full')
    publish(back, tmp_path/'rlcr.json')
    first = (tmp_path/'rlcr.json').read_bytes()
    publish(back, tmp_path/'rlcr.json')
    assert (tmp_path/'rlcr.json').read_bytes() == first
    (tmp_path/'evidence'/'rlcr'/'quick'/'curves.parquet').unlink()
    with pytest.raises(ValueError, match='curves.parquet missing'): stored()


def test_unfinished_experiment_is_said_to_be(tmp_path):
    with pytest.raises(ValueError, match='not finished: warm-up, RLVR seed 0'): collect('test', tmp_path)
    with pytest.raises(ValueError, match='scale must be'): jobs('huge', tmp_path)
    assert not Job('rlcr', 0, 'test', str(tmp_path)).done


def test_a_full_run_decides_what_a_quick_one_leaves_open(tmp_path, monkeypatch):
    monkeypatch.setenv('RLCR_SUITE_RECORDS', str(tmp_path))
    about = lambda e, scale: replace(e, curves=pd.DataFrame(dict(arm=['rlcr'])), about=e.about | {'scale': scale})
    quick = about(honest, 'quick')
    full = about(made_up(lambda arm, q, rng: q, arms=('base', 'rlvr', 'rlcr', 'bce', 'log')), 'full')
    write_evidence(full, tmp_path/'evidence'/'rlcr'/'full')
    claims = {c.id: c for c in publish(quick, tmp_path/'rlcr.json')}
    assert claims['log-arm'].scale == 'full' and claims['ece-id'].scale == 'quick'
    assert claims['group-std'].ours is None
    write_evidence(quick, tmp_path/'evidence'/'rlcr'/'quick')
    assert stored().about['scale'] == 'quick'  # what the ledger speaks of, though full is there
