"The world: its posterior against brute force, its domains, its text, its demonstrator."
import itertools

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from rlcr_suite.rlcr.reward import parse
from rlcr_suite.rlcr.world import (COLOURS, DOMAINS, GRID, HELD_OUT, INSTRUMENTS, SKIES, UNKNOWN, analyse, completion, demonstrations, draw, grade,
                                   posterior, question, questions, reliability, tokenizer)


def enumerated(reports, u):
    "Bayes' rule from the definition: the likelihood of every report under every colour"
    r = reliability(np.array(u, float))
    like = [np.prod([ri if c == said else (1 - ri)/3 for said, ri in zip(reports, r) if said >= 0]) for c in range(4)]
    return np.array(like)/np.sum(like)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(-1, 3), st.integers(0, 5)), min_size=1, max_size=9))
def test_posterior_is_bayes_rule(pairs):
    reports, u = zip(*pairs)
    # 1e-12: float64 sums of at most 9 logarithms
    np.testing.assert_allclose(posterior(np.array([reports]), np.array([u]))[0], enumerated(reports, u), rtol=1e-12)


def test_posterior_survives_overwhelming_evidence():
    p = posterior(np.zeros((1, 400), int), np.full((1, 400), 5))
    assert np.isfinite(p).all() and p[0, 0] == 1


@pytest.mark.parametrize('split', DOMAINS)
def test_domain_is_what_it_says(split):
    d, dom = draw(3000, split, seed=4), DOMAINS[split]
    count = (d.report >= 0).sum(1)
    assert set(count) == set(range(dom.fewest, dom.most + 1))
    seen = {(INSTRUMENTS[a], SKIES[s]) for s, row, rep in zip(d.sky, d.instrument, d.report) for a, c in zip(row, rep) if c >= 0}
    assert (HELD_OUT <= seen) if dom.held_out else not (HELD_OUT & seen)
    assert set(d.truth) == set(range(4))


def test_stated_reliabilities_are_met():
    d = draw(60_000, 'train', seed=5)
    said = d.report >= 0
    for u in np.unique(d.strength[said]):
        hits = (d.report == d.truth[:, None])[said & (d.strength == u)]
        # four standard errors: passes for a right generator, fails for one that is off by two points
        assert abs(hits.mean() - reliability(u)) < 4*np.sqrt(.25/len(hits))


def test_splits_and_seeds_are_independent_streams():
    a, b = draw(200, 'train', 0), draw(200, 'id', 0)
    assert (a.truth != b.truth).any() and (draw(200, 'train', 1).truth != a.truth).any()
    np.testing.assert_array_equal(draw(200, 'train', 0).report, a.report)


def test_the_right_confidence_spreads():
    q = draw(20_000, 'id').posterior.max(1)
    assert q.min() == .25 and q.max() > .99
    assert ((.3 < q) & (q < .9)).mean() > .5


def test_every_text_is_in_the_grammar():
    tok = tokenizer()
    for split in DOMAINS:
        for row in demonstrations(300, split, seed=2):
            text = row['prompt'][0]['content'] + row['completion'][0]['content']
            ids = tok(text)['input_ids']
            assert tok.decode(ids) == text and tok.unk_token_id not in ids
            said = parse(row['completion'][0]['content'])
            assert said.ok and said.answer in (*COLOURS, UNKNOWN) and f'{said.confidence:.2f}' in GRID


def test_demonstrations_are_competent_and_overconfident():
    ds = demonstrations(4000, 'id', seed=3)
    g = grade(ds, [c[0]['content'] for c in ds['completion']])
    best = np.mean(ds['q_star'])
    assert .25 + .1 < g.p_correct.mean() < best - .05
    assert g.confidence.mean() > g.p_correct.mean() + .2


def test_grade_reads_bad_text():
    ds = questions(3, 'id')
    g = grade(ds, ['', 'nonsense', completion({'red': 1}, UNKNOWN, '0 against 1', .5)])
    assert list(g.ok) == [False, False, True] and (g.correct == 0).all() and (g.p_correct == 0).all()
    assert np.isnan(g.confidence[:2]).all() and g.confidence[2] == .5
    with pytest.raises(ValueError, match='3 questions but 1'): grade(ds, [''])


def test_analysis_of_any_solution():
    for n in range(1, 4):
        for cs in itertools.combinations(COLOURS, n):
            support = {c: 3 + i for i, c in enumerate(cs)}
            text = completion(support, cs[0], '', .5).partition('<analysis>')[0]
            assert analyse('', text) == f'3 against {sum(support.values()) - 3}'
    assert analyse('', '<think>red 5<answer>red</answer>') == ''


def test_unknown_split():
    with pytest.raises(ValueError, match='train, id, ood'): questions(1, 'test')


def test_question_text():
    assert question('fog', []) == 'Sky fog: none.'
    assert question('clear', [('radar', 'gold')]) == 'Sky clear: radar gold.'
