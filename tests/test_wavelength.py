"""The game of Wavelength: what is read and what is refused, pragmatic layers against loops, models through a real chat and a server that counts, measures by hand, play."""
from collections import Counter
import json, math
import numpy as np
import pytest
from hypothesis import example, given, settings, strategies as st
from rlcr_suite.core.chat import LocalChat, ScriptedServer, ServerChat
from rlcr_suite.core.lm import tiny_lm, word_tokenizer
from rlcr_suite.wavelength.game import STATES, Item, Replay, Scale, bin_of, check_clue, clean_clue, load_items, parse_number, smooth
from rlcr_suite.wavelength.measures import agreement, argmax_errors, baselines, expected_errors, judge_clues, split_half
from rlcr_suite.wavelength.models import ModelListener, ModelSpeaker, Wording, read_clue
from rlcr_suite.wavelength.pragmatics import NULL, RSAListener, RSASpeaker, comprehend, distinct, fit_people, produce, sampled

HEAT = Scale('cold', 'hot', synonyms=('warm', 'chilly'))
quick = settings(deadline=None, max_examples=60)

# ---------------------------------------------------------------------------------------------------------------- answers

@quick
@given(st.integers(0, 1000).map(lambda i: i/10), st.sampled_from(['{}', ' {}\n', 'about {}', '{}/100', '{} out of 100', '{}%', '**{}**', 'on a scale from 0 to 100: {}', 'not 3, not 97. Answer: {}', 'The answer is {} out of 100.']))
def test_a_number_is_read_however_it_is_said(x, form):
    for text in {f'{x:g}', f'{x:.1f}', f'{x:.2f}'}: assert parse_number(form.format(text)) == pytest.approx(x)

@quick
@given(st.text())
@example('1'*500)
@example('answer '*50 + '.')
@example('٨٥')
def test_whatever_is_said_is_a_number_on_the_scale_or_nothing(text):
    x = parse_number(text)
    assert x is None or (0 <= x <= 100 and 0 <= bin_of(x) <= 20)
    read_clue(text), clean_clue(text), check_clue(text, HEAT)

@pytest.mark.parametrize('text', ('70 or 80', '70-80', '-5', '101', '1e2', '8,5', 'v85', 'answer: 185'))
def test_no_answer(text): assert parse_number(text) is None

# ---------------------------------------------------------------------------------------------------------------- clues

@pytest.mark.parametrize('clue,scale,why', (
    ('Hottest', HEAT, 'form of the pole'), ('hot-dog', HEAT, 'form of the pole'), ('a WARM bath', HEAT, 'too close'), ('warmth', HEAT, 'too close'), ('unhappiness', Scale('sad', 'happy'), 'form of the pole'), ('commonness', Scale('rare', 'uncommon'), 'form of the pole'),
    ('bad deed', Scale('bad for you', 'good for you'), 'form of the pole'), ('one two many words are here', HEAT, 'may have 5'), ('tea; coffee', HEAT, 'joins'), ('tea\ncoffee', HEAT, 'joins'), ('tea and coffee', HEAT, 'joins'),
    ('sort of tea', HEAT, 'modifier'), ('Almost lava', HEAT, 'modifier'), ('forty degrees', HEAT, 'number'), ('R2D2', HEAT, 'number'), ('...', HEAT, 'no words')))
def test_rules(clue, scale, why): assert any(why in w for w in check_clue(clue, scale)), check_clue(clue, scale)

@pytest.mark.parametrize('clue,scale', (('hotel lobby', HEAT), ('scolding', HEAT), ("baker's oven in the morning", HEAT), ('sandwich', Scale('dry', 'wet')), ('party', Scale('art', 'science')), ('Übergangsjacke', HEAT), ('this is for you', Scale('bad for you', 'good for you'))))
def test_what_may_be_said(clue, scale): assert not check_clue(clue, scale)

# ---------------------------------------------------------------------------------------------------------------- people's data

def test_files(tmp_path):
    rows = [dict(left='cold', right='hot', clue='sauna', target=85, guess=g) for g in (80, '90.5')] + [dict(left='cold', right='hot', clue='tea, green', target='70', guess=60)]
    (csv := tmp_path/'a.csv').write_text('\ufeffleft,right,clue,target,guess\n' + ''.join(','.join(f'"{v}"' for v in r.values()) + '\n' for r in rows), encoding='utf-8')
    (lines := tmp_path/'a.jsonl').write_text('\n'.join(map(json.dumps, rows)) + '\n\n')
    items = load_items(csv, synonyms={('cold', 'hot'): ['warm']})
    assert items == [Item(Scale('cold', 'hot', ('warm',)), 'sauna', 85, (80., 90.5)), Item(Scale('cold', 'hot', ('warm',)), 'tea, green', 70, (60.,))]
    assert [(i.clue, i.guesses) for i in load_items(lines)] == [(i.clue, i.guesses) for i in items]
    for row, why in ((dict(guess=None), "row 1: no 'guess'"), (dict(guess=True), 'got True'), (dict(guess=math.nan), 'row 1, guess'), (dict(target=-1), 'row 1, target'), (dict(guess=[50, 'x']), "got 'x'")):
        (bad := tmp_path/'bad.json').write_text(json.dumps([rows[0] | row]))
        with pytest.raises(ValueError, match=why): load_items(bad)
    with pytest.raises(ValueError, match='may rename'): load_items(csv, columns=dict(pole='left'))
    with pytest.raises(FileNotFoundError): load_items(tmp_path/'none.csv')

@quick
@given(st.lists(st.floats(0, 100), min_size=1, max_size=8), st.one_of(st.just(0.), st.floats(1e-3, 1e3)))
def test_every_guess_counts_as_one(guesses, h):
    p = smooth(guesses, h)
    assert p.min() >= 0 and p.sum() == pytest.approx(1)
    np.testing.assert_allclose(p, np.mean([smooth([g], h) for g in guesses], 0), atol=1e-12)

# ---------------------------------------------------------------------------------------------------------------- pragmatic layers

def random_rows(n, seed, holes=.3):
    rng = np.random.default_rng(seed)
    p = rng.random((n, 21))*(rng.random((n, 21)) > holes)
    return p/p.sum(1, keepdims=True)

@pytest.mark.parametrize('depth,alpha,null', ((1, 1., True), (1, 2.5, False), (3, .6, True)))
def test_comprehension_is_its_formula(depth, alpha, null):
    rows = random_rows(4, depth)
    L = np.vstack([rows, np.full(21, 1/21)]) if null else rows.copy()
    for _ in range(depth):
        S = np.where(L > 0, L, 1)**alpha*(L > 0)
        S = np.divide(S, S.sum(0), out=np.zeros_like(S), where=S.sum(0) > 0)
        L = S/S.sum(1, keepdims=True)
    heard = comprehend(rows, list('abcd'), null, alpha, depth)
    np.testing.assert_allclose(heard.beliefs, L[0], atol=1e-12)
    assert heard.utterances == list('abcd') + [NULL]*null and not heard.fell_back

def test_clues_without_mass_have_outcomes():
    nothing, prior = np.zeros(21), np.arange(21.)
    heard = comprehend(np.vstack([nothing, random_rows(1, 0)]), ['a', 'b'], prior=prior)
    assert heard.fell_back
    np.testing.assert_allclose(heard.beliefs, prior/prior.sum())                   # nothing literal either: what was believed before
    impossible = comprehend(np.eye(21)[[0, 1]], ['a', 'b'], null=False, prior=np.eye(21)[1])
    assert impossible.fell_back and impossible.beliefs[0] == 1                      # said of what cannot be: taken literally
    with pytest.raises(ValueError, match='shape'): comprehend(np.eye(20), ['a']*20)

def test_production_weighs_draws():
    rows = dict(a=.1, b=.3, c=0.)
    listener = lambda clues: np.stack([np.eye(21)[10]*rows[c] + np.eye(21)[0]*(1 - rows[c]) for c in clues])
    said = produce(['a', 'b', ' A', 'c'], listener, 50, alpha=2.)
    np.testing.assert_allclose(said.probabilities, np.array([2*.01, .09, 0])/(.02 + .09))
    np.testing.assert_allclose(produce(['a', 'b', 'a'], listener, 50, alpha=0.).probabilities, [2/3, 1/3])
    assert produce(['c', 'c'], listener, 50).fell_back and not said.fell_back

def test_alternatives_are_drawn_once_and_include_the_clue():
    asked = []
    def speaker(scale, target, n=1, seed=0):
        asked.append((target, seed))
        return [f'clue {target:.0f}', 'Tea'][:n]
    def literal(scale, clues): return np.stack([smooth([len(c)*5], 10) for c in clues])
    L = RSAListener(literal, sampled(speaker, draws=2))
    heard = L.heard(HEAT, 'tea')
    assert heard.utterances[0] == 'tea' and len(heard.utterances) == 1 + 21 + 1 and len(asked) == 21 == len({s for _, s in asked})
    np.testing.assert_array_equal(L(HEAT, ['tea', 'sauna'])[0], heard.beliefs)
    assert len(asked) == 21

def test_people_are_fitted_clue_by_clue():
    "Two scales, clues among the alternatives and beside them, in two orders: the likelihood is that of the listeners one at a time"
    rows = {c: r for c, r in zip('abcdef', random_rows(6, 0, holes=0))}
    literal = lambda scale, clues: np.stack([rows[c] for c in clues])
    alternatives = lambda scale: ['a', 'b', 'c'] if scale == HEAT else ['d', 'e']
    rng, other = np.random.default_rng(0), Scale('dry', 'wet')
    items = [Item(s, c, 50, tuple(rng.choice(STATES, 60, p=RSAListener(literal, alternatives, alpha=3.)(s, [c])[0]))) for s, c in ((HEAT, 'b'), (other, 'd'), (HEAT, 'f'), (other, 'e'), (HEAT, 'a'))]
    fit = fit_people(items, literal, alternatives)
    def loss(alpha): return -sum(np.log(.95*RSAListener(literal, alternatives, alpha=alpha)(i.scale, [i.clue])[0][[bin_of(g) for g in i.guesses]] + .05/21).sum() for i in items)
    assert all(loss(fit.value) < loss(fit.value*f) for f in (.99, 1.01)) and fit.n == 300
    assert loss(fit.low) - loss(fit.value) == pytest.approx(3.841/2, abs=.01)          # half of the quantile of chi squared
    assert fit_people(items[::-1], literal, alternatives).value == pytest.approx(fit.value, rel=1e-4)
    with pytest.raises(ValueError, match='depth'): fit_people(items, literal, alternatives, depth=0)

# ---------------------------------------------------------------------------------------------------------------- models

ONE = Wording(lambda scale, clue, cot: [dict(role='user', content=f'{clue} ?')], lambda scale, target, cot: [dict(role='user', content=f'{target:g} ?')])

@pytest.fixture(scope='module')
def chat():
    "An untrained transformer whose words are the 21 answers and three clues"
    tok = word_tokenizer(['sauna tea lava ?'], specials=[f'{s:.0f}' for s in STATES if s >= 10])
    return LocalChat(tiny_lm(tok, hidden_size=32, layers=1, heads=2, intermediate_size=32, initializer_range=.25, seed=3), tok)

def test_samples_and_logprobs_are_one_listener(chat):
    "Of a model whose answers are one token: a histogram of what could be read is the softmax, to four standard errors"
    exact, n = ModelListener(chat, wording=ONE, end='')(HEAT, ['sauna'])[0], 4000
    by_sample = ModelListener(chat, 'sample', samples=n, max_tokens=1, wording=ONE)
    got = by_sample(HEAT, ['sauna'])[0]
    others = [*'12346789', *(f' {d}' for d in range(10))]                                 # tokens that are read as numbers too, and belong to their nearest place
    digits = np.exp(chat.logprobs(ONE.guess(HEAT, 'sauna', False), others))
    full = exact*np.exp(chat.logprobs(ONE.guess(HEAT, 'sauna', False), [f'{s:.0f}' for s in STATES])).sum()
    for d, p in zip(others, digits): full[bin_of(int(d))] += p
    read = n - by_sample.lost['cold', 'hot', 'sauna']
    full /= full.sum()
    assert 0 < read < n and (abs(got - full) < 4*np.sqrt(full*(1 - full)/read) + 1e-9).all()

def test_clues_are_scored_side_by_side_as_one_at_a_time(chat):
    "In batches that end within a clue's answers, with repetitions, and beside a chat that has no batches"
    class Alone:
        def __init__(self, chat): self.tok, self.logprobs = chat.tok, chat.logprobs
    together = ModelListener(LocalChat(chat.model, chat.tok, batch_size=10), wording=ONE)(HEAT, ['sauna', 'tea', 'sauna', 'lava'])
    np.testing.assert_allclose(together, ModelListener(Alone(chat), wording=ONE)(HEAT, ['sauna', 'tea', 'sauna', 'lava']), atol=1e-6)
    np.testing.assert_array_equal(together[0], together[2])
    assert abs(together[0] - together[1]).max() > 1e-3

def test_a_thought_is_weighed_alike_in_a_batch(chat):
    "The mean over thoughts, each scored with what was said"
    asked = []
    class Thinks:
        def generate(self, messages, n=1, **kw): return [f'thought {i}' for i in range(n)]
        def logprobs(self, messages, options):
            asked.append(messages[1]['content'])
            return np.where(np.arange(21) == len(asked), 0., -np.inf)
    p = ModelListener(Thinks(), cot=True, thoughts=4, end='')(HEAT, ['tea'])[0]
    assert asked == [f'thought {i}' for i in range(4)]
    np.testing.assert_allclose(p, np.isin(np.arange(21), [1, 2, 3, 4])/4)

def test_draws_do_not_depend_on_what_else_is_asked(chat):
    def ask(clues, seed): return dict(zip(clues, ModelListener(chat, 'sample', samples=64, max_tokens=1, wording=ONE, seed=seed)(HEAT, clues)))
    a, b, c = ask(['sauna', 'tea'], 0), ask(['lava', 'tea', 'sauna'], 0), ask(['tea'], 1)
    np.testing.assert_array_equal(a['tea'], b['tea'])
    assert (a['tea'] != c['tea']).any()

def test_the_number_of_samples_reaches_a_server():
    answers = iter(['85', '85.0', 'about 84', 'no idea', '20']*2)
    with ScriptedServer(lambda request: next(answers)) as server, ServerChat('any', server.base_url, concurrency=1) as chat:
        listener = ModelListener(chat, 'sample', samples=10)
        p = listener(HEAT, ['sauna'])[0]
        assert len(server.requests) == 10 and len({r['seed'] for r in server.requests}) == 10
    assert p[17] == pytest.approx(6/8) and p[4] == pytest.approx(2/8) and listener.lost['cold', 'hot', 'sauna'] == 2

def test_what_no_model_could_say_is_uniform():
    class Mute:
        def generate(self, messages, n=1, **kw): return ['']*n
        def logprobs(self, messages, options): return np.full(len(options), -np.inf)
    for method in ('logprob', 'sample'): np.testing.assert_allclose(ModelListener(Mute(), method)(HEAT, ['tea'])[0], 1/21)
    speaker = ModelSpeaker(Mute())
    assert speaker(HEAT, 50., n=3) == [] and speaker.refused['', 'it has no words'] == 12

def test_a_speaker_asks_again_with_other_seeds():
    seeds = []
    class Stubborn:
        def generate(self, messages, n=1, seed=None, **kw): seeds.append(seed); return ['very hot', 'sauna'][:n]
    speaker = ModelSpeaker(Stubborn(), redraws=2)
    assert speaker(HEAT, 85., n=4) == ['sauna']*3 and len(set(seeds)) == 3 and sum(speaker.refused.values()) == 3
    assert ModelSpeaker(Stubborn(), check=None)(HEAT, 85., n=2) == ['very hot', 'sauna']
    rsa = RSASpeaker(speaker, lambda scale, clues: np.stack([smooth([85])]*len(clues)), draws=8)
    assert rsa(HEAT, 85., n=3) == ['sauna']*3

# ---------------------------------------------------------------------------------------------------------------- measures

def test_measures_by_hand():
    items = [Item(HEAT, 'tea', 70, (60, 70)), Item(HEAT, 'sauna', 90, (100, 90)), Item(HEAT, 'ice', 0, (10, 0))]
    b = baselines(items)
    assert (b.crowd.value, b.one.value, b.always_50.n) == (5, 5, 3) and b.always_50.value == pytest.approx(110/3)
    assert b.crowd.se == 0 and b.always_50.se == pytest.approx(np.std([20, 40, 50], ddof=1)/3**.5)
    assert b.full == pytest.approx(2*b.split_half/(1 + b.split_half))
    tied = np.zeros(21); tied[[0, 2, 20]] = 1/3
    assert argmax_errors([tied], [10])[0] == pytest.approx(100/3) and expected_errors([tied], [10])[0] == pytest.approx(110/3 - 10)
    assert np.isnan(agreement(np.full((3, 21), 1/21), items, n_boot=50).value)       # somebody without opinions correlates with nobody
    with pytest.raises(ValueError, match='fewer than two'): split_half([Item(HEAT, 'tea', 70, (60,))])
    judge = Replay(items)
    with pytest.raises(ValueError, match='had a part'): judge_clues(judge, HEAT, [70], ['tea'], [judge])
    with pytest.raises(ValueError, match='probabilities'): argmax_errors([-tied], [10])

def test_a_judge_shares_nobody_with_who_chose():
    "People are the same people in another object, and in part"
    from rlcr_suite.wavelength.lexicon import Judge, Population
    p, again, others = Population(people=20), Population(people=20), Population(people=20, seed=1)
    scale, clue = p.clues[0]
    for l in (Judge(again, slice(0, 10)), Judge(again, slice(9, 20))):
        with pytest.raises(ValueError, match='had a part'): judge_clues(Judge(p, slice(0, 10)), scale, [5], [clue], [l])
    for l in (Judge(p, slice(10, 20)), Judge(others, slice(0, 10))): assert judge_clues(Judge(p, slice(0, 10)), scale, [5], [clue], [l]).shape == (1,)

# ---------------------------------------------------------------------------------------------------------------- play

def test_a_model_behind_a_server_plays_pragmatically(tmp_path):
    "From the command line: the model answers numbers when it hears a clue and clues when it hears a number; the layer around it asks both"
    from typer.testing import CliRunner
    from rlcr_suite.wavelength.cli import app
    asked = Counter()
    def reply(request):
        text = request['messages'][-1]['content']
        asked['clue' if 'has to find' in text else 'number'] += 1
        return 'Clue: xylophone' if 'has to find' in text else '30'
    with ScriptedServer(reply) as server:
        r = CliRunner().invoke(app, ['play', '--as', 'clue-giver', '--listener', 'rsa', '--model', 'any', '--base-url', server.base_url, '--rounds', '1', '--save', str(tmp_path/'game.jsonl')], input='about 7\nzebra\n')
    assert r.exit_code == 0, (r.output, r.exception)
    row, = (json.loads(l) for l in (tmp_path/'game.jsonl').read_text().splitlines())
    assert row['clue'] == 'zebra' and "'7' is a number" in r.output and asked == {'clue': 21, 'number': 64}
    # 'zebra' and 'xylophone' are 30 for sure, silence is anything: still 30
    assert row['guess'] == pytest.approx(30)

def test_a_checkpoint_is_evaluated_on_games_with_a_column_a_guess(tmp_path, chat, monkeypatch):
    "From the command line, judged by the people of the file and by another model; the same seed finds the same"
    from contextlib import nullcontext
    from typer.testing import CliRunner
    from rlcr_suite.wavelength import cli
    class Speaks:
        "The answers of an untrained model, and two clues by turns, one of which nobody was asked about"
        logprobs, tok = chat.logprobs, chat.tok
        def generate(self, messages, n=1, **kw): return (['sauna', 'zebra']*n)[:n]
    monkeypatch.setattr(cli, 'named_chat', lambda model, base_url: nullcontext(Speaks() if model else None))
    (games := tmp_path/'games.csv').write_text('left,right,clue,target,g1,g2\nquick,slow,sauna,85,80,90\nquick,slow,tea,40,,45\n')
    def run(*more):
        r = CliRunner().invoke(cli.app, ['evaluate', str(games), '--column', 'guess=g*', '--model', 'any', '--draws', '8', '--out', str(tmp_path/'out.json'), *more])
        assert r.exit_code == 0, (r.output, r.exception)
        return json.loads((tmp_path/'out.json').read_text())
    first, again, judged = run('--rsa'), run('--rsa'), run('--judge', 'other')
    assert first['comprehension'] == again['comprehension'] and first['production'] == again['production']
    assert first['comprehension']['mean']['n'] == 2 and first['production']['rsa'] and judged['production']['rsa'] is None
    assert first['production']['unknown'] == .5 and judged['production']['unknown'] is None and first['production']['silent'] == 0
    sauna = float(smooth([80, 90]) @ STATES)
    assert first['production']['direct']['value'] == pytest.approx(np.mean([abs(x - t) for t in (85, 40) for x in (sauna, 50)]))
    with pytest.raises(ValueError, match='takes ours=theirs'): CliRunner().invoke(cli.app, ['evaluate', str(games), '--column', 'guess', '--model', 'any'], catch_exceptions=False)
    r = CliRunner().invoke(cli.app, ['evaluate', str(games), '--column', 'guess=g*', '--model', 'any', '--wording', 'terse', '--cot'])
    assert 'no chain of thought' in str(r.exception)
