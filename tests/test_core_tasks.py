"Tasks: every label and every optimum against a reader written from the description, at sizes that hypothesis chooses; scoring and training."
import math
from collections import Counter, defaultdict
from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from transformers import LlamaConfig, LlamaForCausalLM

from rlcr_suite.core import tasks
from rlcr_suite.core.jobs import journal, last_checkpoint
from rlcr_suite.core.tasks import FLIP_FLOP, Fresh, Task, earlier, fit, flip_flop, group, mqar, mqrar, score, text, word_problem

some = settings(max_examples=25, deadline=None)
seeds = st.integers(0, 2**31)
MAKERS = dict(mqar=mqar, mqrar=mqrar, flip_flop=flip_flop, word_problem=word_problem, text=text)


def rows(t): return zip(t.input_ids.tolist(), t.labels.tolist(), t.optimum.tolist())


@pytest.mark.parametrize('name', MAKERS)
def test_every_task_keeps_the_contract(name):
    make = MAKERS[name]
    a, b, c = make(5, seed=3), make(5, seed=3), make(5, seed=4)
    assert torch.equal(a.input_ids, b.input_ids) and torch.equal(a.labels, b.labels) and not torch.equal(a.input_ids, c.input_ids)
    assert a.input_ids.dtype == a.labels.dtype == torch.int64 and a.optimum.dtype == torch.float32
    assert a.input_ids.shape == a.labels.shape == a.optimum.shape and len(a) == 5
    assert 0 <= a.input_ids.min() and a.input_ids.max() < len(a.tokens) and len(set(a.tokens)) == len(a.tokens)
    assert (a.labels[:, 0] == -100).all() # nothing has been read before the first token
    assert a.asked.any() and a.labels[a.asked].min() >= 0 and a.labels.max() < len(a.tokens)
    assert (a.optimum[~a.asked] == 0).all() and (a.optimum >= 0).all() and a.optimum.isfinite().all()
    assert set(a[2]) == {'input_ids', 'labels'} and torch.equal(a[2]['labels'], a.labels[2])
    state = np.random.get_state()[1].copy()
    make(2)
    assert (np.random.get_state()[1] == state).all() # the global generator is left alone


@some
@given(st.lists(st.lists(st.integers(0, 3), min_size=6, max_size=6), min_size=1, max_size=4), st.integers(1, 7))
def test_earlier(x, back):
    for row, found in zip(x, earlier(np.array(x), back)):
        before = lambda i: [j for j in range(i) if row[j] == row[i]]
        assert found.tolist() == [before(i)[-back] if len(before(i)) >= back else -1 for i in range(6)]
        assert tasks._times(np.array(row)[None])[0].tolist() == [len(before(i)) for i in range(6)]


@some
@given(st.integers(1, 6), st.one_of(st.none(), st.integers(1, 15)), st.booleans(), st.integers(0, 9), st.integers(0, 5), st.integers(1, 4), seeds)
def test_mqar(pairs, queries, fewer, more, spare, noise, seed):
    n = queries or pairs
    T, keys = 2*(pairs + n) + more, pairs + spare
    t = mqar(4, T=T, pairs=pairs, queries=queries, fewer=fewer, keys=keys, values=3, noise=noise, seed=seed)
    assert len(t.tokens) == keys + 3 + noise
    for x, y, _ in rows(t):
        memory = {k: v for k, v in zip(x[:2*pairs:2], x[1:2*pairs:2]) if k < keys}
        assert (1 <= len(memory) <= pairs if fewer else len(memory) == pairs) and all(x[i] >= keys + 3 for i in range(2*len(memory), 2*pairs)) and all(k < keys for k in memory) and all(keys <= v < keys + 3 for v in memory.values())
        asked = [i for i in range(T) if y[i] != -100]
        times = Counter(x[i - 1] for i in asked)
        assert len(asked) == n and set(times) <= set(memory) and max(times.values()) - min(times[k] for k in memory) <= 1 # each key as often
        assert all(y[i] == memory[x[i - 1]] and i > 2*pairs for i in asked)
        assert all(x[i] >= keys + 3 for i in range(2*pairs, T) if i + 1 not in asked) # noise elsewhere


def test_mqar_refuses_what_does_not_fit():
    for wrong in (dict(T=31, pairs=8), dict(T=64, pairs=8, queries=25), dict(queries=-1), dict(pairs=9, keys=8, T=64), dict(pairs=0), dict(values=1), dict(noise=0)):
        with pytest.raises(ValueError, match='mqar'): mqar(1, **wrong)
    mqar(1, T=32, pairs=8)


@some
@given(st.integers(1, 20), st.integers(1, 4), st.integers(1, 4), seeds)
def test_mqrar(P, back, keys, seed):
    for x, y, _ in rows(mqrar(4, T=2*P, back=back, keys=keys, values=3, seed=seed)):
        had = defaultdict(list)
        for i in range(P):
            k, v = x[2*i], x[2*i + 1]
            assert k < keys <= v < keys + 3 and y[2*i] == -100
            assert y[2*i + 1] == (had[k][-back] if len(had[k]) >= back else -100)
            had[k].append(v)


@some
@given(st.integers(2, 40), st.sampled_from([0., .1, .8, .98]), st.booleans(), seeds)
def test_flip_flop(P, ignore, everything, seed):
    p = {'w': (1 - ignore)/2, 'r': (1 - ignore)/2, 'i': ignore}
    for x, y, best in rows(flip_flop(4, T=2*P, ignore=ignore, everything=everything, seed=seed)):
        words, memory = ['01wri'[i] for i in x], None
        assert words[0] == 'w' and words[-2] == 'r'
        for i in range(P):
            do, bit = words[2*i], words[2*i + 1]
            assert do in 'wri' and bit in '01'
            if do == 'r': assert bit == memory and y[2*i + 1] == int(bit) and best[2*i + 1] == 0
            elif not everything: assert y[2*i + 1] == -100
            if do == 'w': memory = bit
            if everything and i: assert y[2*i] == x[2*i] and y[2*i + 1] == x[2*i + 1]
            if everything and 0 < i < P - 1: assert best[2*i] == pytest.approx(-math.log(p[do]), abs=1e-5)
            if everything and do != 'r': assert best[2*i + 1] == pytest.approx(math.log(2), abs=1e-5)
        assert best[0] == best[2*P - 2] == 0


def test_flip_flop_refuses():
    for wrong in (dict(T=7), dict(T=2), dict(ignore=1.), dict(ignore=-.1)):
        with pytest.raises(ValueError, match='flip_flop'): flip_flop(1, **wrong)
    assert FLIP_FLOP == dict(id=.8, sparse=.98, dense=.1) # the three distributions of Liu et al.


@pytest.mark.parametrize('name, moves, tokens', [('A5', None, 60), ('S5', None, 120), ('S5', 2, 11), ('A5', 3, 21), ('S3', None, 6), ('A4', None, 12), ('Z7', None, 7)])
def test_word_problem(name, moves, tokens):
    t, (p, _) = word_problem(30, T=40, name=name, moves=moves, seed=7), group(name)
    used = set(t.input_ids[:, 1:-1].flatten().tolist())
    assert len(used) == tokens and {t.tokens[i] for i in t.input_ids[:, 0]} == {'begin'} and {t.tokens[i] for i in t.input_ids[:, -1]} == {'end'}
    for x, y, _ in rows(t):
        at = list(range(p.shape[1])) # where each point has gone
        assert y[:2] == [-100, -100]
        for g, said in zip(x[1:-1], y[2:]):
            at = [p[g][i] for i in at]
            assert p[said].tolist() == at


def test_word_problem_refuses():
    for wrong in (dict(name='A5', moves=2), dict(name='S6'), dict(name='Q8'), dict(name=''), dict(name='S'), dict(T=2), dict(name='A2')):
        with pytest.raises(ValueError): word_problem(1, **wrong)


@some
@given(st.integers(1, 40), st.integers(1, 5), st.integers(2, 4), st.sampled_from([.1, 1., 7.]), st.sampled_from([0., 1.]), st.booleans(), seeds)
def test_text(P, names, words, alpha, zipf, everything, seed):
    law = np.arange(1., names + 1)**-zipf
    law /= law.sum()
    for x, y, best in rows(text(3, T=2*P, names=names, words=words, alpha=alpha, zipf=zipf, everything=everything, seed=seed)):
        count = defaultdict(Counter)
        for i in range(P):
            n, w = x[2*i], x[2*i + 1]
            assert n < names <= w < names + words
            assert best[2*i + 1] == pytest.approx(-math.log((alpha/words + count[n][w])/(alpha + count[n].total())), abs=1e-5)
            assert y[2*i + 1] == w and y[2*i] == (n if everything and i else -100)
            if everything and i: assert best[2*i] == pytest.approx(-math.log(law[n]), abs=1e-5)
            count[n][w] += 1


def test_text_is_drawn_from_its_own_predictor():
    "A chi-square of repeats: the Bayes probability of 'the same word as last time' is met in every class of predictions"
    t, hit, said = text(600, T=200, names=3, words=4, alpha=.6, seed=5), [], []
    for x, _, _ in rows(t):
        count, last = np.full((3, 4), .15), {}
        for n, w in zip(x[::2], np.array(x[1::2]) - 3):
            if n in last:
                said.append(count[n, last[n]]/count[n].sum())
                hit.append(w == last[n])
            count[n, w] += 1
            last[n] = w
    hit, said = np.array(hit), np.array(said)
    classes = np.digitize(said, np.quantile(said, np.linspace(0, 1, 11)[1:-1]))
    z = np.array([(hit[classes == c] - said[classes == c]).sum()/np.sqrt((said*(1 - said))[classes == c].sum()) for c in np.unique(classes)])
    assert len(z) >= 8 and (z**2).sum() < len(z) + 5*math.sqrt(2*len(z)) # five standard deviations of a chi-square
    names = np.bincount(t.input_ids[:, ::2].flatten().numpy(), minlength=3)/t.input_ids[:, ::2].numel()
    assert abs(names - np.array([6, 3, 2])/11).max() < .01


def test_text_refuses():
    for wrong in (dict(T=5), dict(alpha=0.), dict(words=1), dict(names=0)):
        with pytest.raises(ValueError, match='text'): text(1, **wrong)


# ------------------------------------------------------------------------------------------------ scoring and training

def tiny(vocabulary, seed=0, **more):
    torch.manual_seed(seed)
    return LlamaForCausalLM(LlamaConfig(**(dict(vocab_size=vocabulary, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2, max_position_embeddings=64,
                                                bos_token_id=None, eos_token_id=None, pad_token_id=None) | more)))


def test_score_is_what_transformers_computes():
    t = mqar(7, T=40, pairs=4, keys=8, values=8)
    model = tiny(len(t.tokens)).train()
    s = score(model, t, batch=3)
    assert model.training
    model.eval()
    with torch.no_grad(): out = model(input_ids=t.input_ids, labels=t.labels)
    assert np.nanmean(s.loss) == pytest.approx(out.loss.item(), rel=1e-5)
    assert (np.isnan(s.loss) == ~t.asked.numpy()).all() and (np.isnan(s.right) == ~t.asked.numpy()).all() and (np.isnan(s.optimum) == ~t.asked.numpy()).all()
    for b, at in t.asked.nonzero().tolist():
        assert s.right[b, at] == (out.logits[b, at - 1].argmax() == t.labels[b, at])
    assert s.accuracy == pytest.approx(np.nanmean(s.right, 1))
    assert np.isnan(score(model, Task(t.input_ids, torch.full_like(t.labels, -100), t.optimum, t.tokens)).accuracy).all()


def test_fresh_batches_never_repeat_and_always_agree():
    f = Fresh(partial(text, T=16), batch=4, steps=50, seed=9)
    rows = [f[i]['input_ids'] for i in range(50)]
    assert len({r.numpy().tobytes() for b in rows for r in b}) == 200 and torch.equal(f[7]['input_ids'], rows[7])
    assert not torch.equal(Fresh(partial(text, T=16), 4, 50, seed=10)[7]['input_ids'], rows[7])


EASY = partial(flip_flop, T=16, ignore=.3)

def test_fit_learns_and_a_run_in_two_parts_is_the_same_run(tmp_path):
    kw = dict(steps=60, batch=16, lr=5e-3, seed=1)
    whole, parts = tiny(5), tiny(5)
    before = score(whole, EASY(64, seed=99))
    fit(whole, EASY, tmp_path/'whole', **kw)
    after = score(whole, EASY(64, seed=99))
    assert np.nanmean(after.loss) < .7*np.nanmean(before.loss) and not whole.training
    assert last_checkpoint(tmp_path/'whole') is None and journal(tmp_path/'whole')[-1]['step'] == 60

    from transformers import TrainerCallback
    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 25: raise KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt): fit(parts, EASY, tmp_path/'parts', save_steps=10, callbacks=[Stop()], **kw)
    assert last_checkpoint(tmp_path/'parts').name == 'checkpoint-20'
    again = tiny(5, seed=5) # other weights: everything has to come from the checkpoint
    fit(again, EASY, tmp_path/'parts', save_steps=10, **kw)
    for a, b in zip(whole.parameters(), again.parameters()): torch.testing.assert_close(a, b, rtol=0, atol=1e-6)
    assert [r['step'] for r in journal(tmp_path/'parts')] == [r['step'] for r in journal(tmp_path/'whole')]
