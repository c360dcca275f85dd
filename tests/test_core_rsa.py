"""Rational speech acts against loops over Python's fractions, against memo where it is installed, and against themselves: holes, permutations, gradients, extremes."""
from fractions import Fraction
from itertools import product
import math
import pytest
import torch
from hypothesis import given, settings, strategies as st
from rlcr_suite.core.rsa import NEVER, defined, fit_alpha, layers, listener, literal, log, normalise, or_else, speaker, with_null

F = Fraction
# float64: a dozen additions and exponentials a layer, each rounded to 1e-16
EXACT = 1e-12

def by_fractions(meaning, depth, prior=None, said=None, alpha=1):
    "All layers in exact arithmetic, for whole alpha and no cost: (listeners, speakers) as lists of rows"
    U, S = len(meaning), len(meaning[0])
    prior, said = prior or [F(1)]*S, said or [F(1)]*U
    def normal(x):
        total = sum(x)
        return [v/total if total else F(0) for v in x]
    L = [normal([F(m)*p for m, p in zip(row, prior)]) for row in meaning]
    out = [L], []
    for _ in range(depth):
        columns = [normal([said[u]*L[u][s]**alpha for u in range(U)]) for s in range(S)]
        L = [normal([columns[s][u]*prior[s] for s in range(S)]) for u in range(U)]
        out[0].append(L)
        out[1].append([[columns[s][u] for s in range(S)] for u in range(U)])
    return out

def close(got, want): torch.testing.assert_close(got.exp(), torch.tensor([[float(x) for x in row] for row in want], dtype=torch.float64), rtol=0, atol=EXACT)

# ---------------------------------------------------------------------------------------------------------------- against others

small = st.integers(0, 3)
@settings(max_examples=60, deadline=None)
@given(st.data(), st.integers(1, 4), st.integers(1, 4), st.integers(0, 3), st.integers(1, 3))
def test_exact_arithmetic(data, U, S, depth, alpha):
    "Whatever is zero: meanings, some priors, whole rows and columns"
    meaning = data.draw(st.lists(st.lists(small, min_size=S, max_size=S), min_size=U, max_size=U))
    prior, said = (data.draw(st.lists(small, min_size=n, max_size=n).filter(any)) for n in (S, U))
    want = by_fractions(meaning, depth, [F(x) for x in prior], [F(x) for x in said], alpha)
    got = layers(meaning, depth, alpha, None, prior, said)
    for g, w in zip((*got.listeners, *got.speakers), (*want[0], *want[1])):
        assert not g.isnan().any()
        close(g, w)

GAMES = {'objects': ([[1, 1, 0], [0, 0, 1], [1, 0, 1], [0, 1, 0]], 0, [F(3, 5), F(2, 5), 0]),       # Frank & Goodman (2012): 'blue'
         'some': ([[1, 0, 0, 0], [0, 1, 1, 1], [0, 0, 0, 1]], 1, [0, F(4, 9), F(4, 9), F(1, 9)])}     # 'some' of three
@pytest.mark.parametrize('game', GAMES)
def test_games_worked_by_hand(game):
    meaning, heard, want = GAMES[game]
    close(layers(meaning).listeners[1][heard:heard + 1], [want])

def test_memo():
    "The reference game in a probabilistic programming language that shares nothing with this module (memo-lang asks for Python 3.12)"
    pytest.importorskip('memo')
    import memo_game as memo
    for alpha, dear, even in ((1., 0, True), (2.5, 1, False)):
        got = layers(memo.MEANING, 1, alpha, [dear*c for c in memo.COST], None if even else memo.PRIOR)
        for mine, theirs in ((got.speakers[0], memo.speaker), (got.listeners[1], memo.pragmatic)):
            torch.testing.assert_close(mine.exp(), torch.tensor(theirs(alpha, dear, even).tolist(), dtype=torch.float64), rtol=0, atol=1e-6)       # memo computes in float32

# ---------------------------------------------------------------------------------------------------------------- against itself

def game(U=5, S=4, seed=0, batch=()): return torch.rand(*batch, U, S, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)

def test_order_does_not_matter():
    m, prior, u, s = game(), torch.tensor([.1, .2, .3, .4]), torch.tensor([4, 2, 0, 1, 3]), torch.tensor([1, 3, 0, 2])
    a, b = layers(m, 3, 1.4, prior=prior).listeners[3], layers(m[u][:, s], 3, 1.4, prior=prior[s]).listeners[3]
    torch.testing.assert_close(a[u][:, s], b, rtol=0, atol=EXACT)

def test_weights_need_no_normalising():
    "Meanings scale row by row, priors and costs as a whole"
    m, prior, said, cost = game(), torch.rand(4).double(), torch.rand(5).double(), torch.rand(5).double()
    a = layers(m, 2, 1.3, cost, prior, said).listeners[2]
    b = layers(m*torch.tensor([1., 7., .1, 3., 2.])[:, None], 2, 1.3, cost + 5, 3*prior, .2*said).listeners[2]
    torch.testing.assert_close(a, b, rtol=0, atol=EXACT)

def test_cost_is_a_prior_of_utterances():
    "exp(-alpha C) may stand in either place"
    m, cost = game(), torch.rand(5).double()
    torch.testing.assert_close(layers(m, 3, 1.7, cost).listeners[3], layers(m, 3, 1.7, utterance_prior=(-1.7*cost).exp()).listeners[3], rtol=0, atol=EXACT)

def test_batches_broadcast():
    m, alpha = game(batch=(6, 1)), torch.linspace(0, 3, 4, dtype=torch.float64)
    together = layers(m, 2, alpha).listeners[2]
    assert together.shape == (6, 4, 5, 4)
    for i, j in product(range(6), range(4)): torch.testing.assert_close(together[i, j], layers(m[i, 0], 2, alpha[j]).listeners[2], rtol=0, atol=EXACT)

def test_float32_stays_float32():
    assert layers(game().float(), 2, torch.tensor(1.5, dtype=torch.float64), [1.]*5).listeners[2].dtype == torch.float32

@pytest.mark.parametrize('alpha', (0., 1e-6, 1., 30., 1e4))
def test_extremes_are_finite(alpha):
    "Beliefs down to e^-700, the most and the least rational speakers: sums are one, gradients are numbers"
    m = (-700*game()).exp().requires_grad_()
    a = torch.tensor(alpha, dtype=torch.float64, requires_grad=True)
    got = layers(m, 3, a)
    for t, dim in ((got.listeners[3], -1), (got.speakers[2], -2)):
        total = t.exp().sum(dim)
        torch.testing.assert_close(total, torch.ones_like(total), rtol=0, atol=1e-9)
    g, = torch.autograd.grad(got.listeners[3].exp()[0, 0], a)
    assert g.isfinite()

def test_gradients_with_holes():
    m = game(4, 3)*torch.tensor([[1, 0, 1], [0, 0, 0], [1, 1, 0], [0, 1, 0]])
    x = [m, torch.tensor(.7), torch.rand(4), torch.tensor([.3, 0., .7]), torch.rand(4) + .1]
    x = [y.double().requires_grad_() for y in x]
    mask = m > 0
    def f(m, alpha, cost, prior, said): return layers(m*mask, 2, alpha, cost, prior*torch.tensor([1., 0., 1.]).double(), said).listeners[2].exp()
    assert torch.autograd.gradcheck(f, x)

# ---------------------------------------------------------------------------------------------------------------- stated outcomes

def test_what_has_no_mass():
    x = torch.tensor([[NEVER, NEVER], [0., NEVER]])
    assert defined(normalise(x)).tolist() == [False, True]
    assert or_else(normalise(x), torch.tensor([.5, .5]).log()).exp().tolist() == [[.5, .5], [1., 0.]]
    impossible = listener(literal([[1, 0], [0, 1]]), prior=[1, 0])
    assert defined(impossible).tolist() == [True, False]                       # the second word speaks of what cannot be
    with_silence = layers(with_null([[1., 0], [1, 0]]), 1)
    assert defined(with_silence.speakers[0], dim=-2).all() and with_silence.listeners[1][2].exp()[1] > .5

@pytest.mark.parametrize('bad,says', ((lambda: layers([1, 2]), 'table'), (lambda: layers([[-1, 1]]), 'at least 0'), (lambda: layers([[math.nan, 1]]), 'finite'), (lambda: layers([[1, 1]], depth=-1), 'depth'),
                                      (lambda: layers([[1, 1]], alpha=-1), 'alpha'), (lambda: layers([[1, 1]], alpha=math.inf), 'finite'), (lambda: layers([[1, 1]], prior=[1, 1, 1]), '2 numbers'), (lambda: layers([[1, 1]], prior=[0, 0]), 'somewhere above'),
                                      (lambda: layers([[1, 1]], cost=[1, 1]), '1 numbers'), (lambda: layers([[1, 1]], cost=[math.inf]), 'finite'), (lambda: fit_alpha([[0, 0]], lambda a: layers([[1, 1]], 1, a).listeners[1]), 'counts'),
                                      (lambda: fit_alpha([[1, 0]], lambda a: layers([[1, 1]], 1, a).listeners[1], lapse=1.), 'lapse')))
def test_refusals(bad, says):
    with pytest.raises(ValueError, match=says): bad()

# ---------------------------------------------------------------------------------------------------------------- fitting

@pytest.mark.parametrize('truth', (.6, 2.5))
def test_fit_recovers(truth):
    "Ten thousand choices of speakers in three games at once: the truth lies in the interval, which is narrow, and the fit is where a fine grid says"
    m = game(batch=(3,))
    predict = lambda a: layers(m, 1, a).speakers[0]
    p = predict(torch.tensor(truth)).exp()
    counts = torch.stack([torch.stack([torch.multinomial(p[g, :, s], 800, True, generator=torch.Generator().manual_seed(10*g + s)).bincount(minlength=5) for s in range(4)], -1) for g in range(3)])
    fit = fit_alpha(counts, predict, dim=-2)
    grid = torch.linspace(.8, 1.2, 401, dtype=torch.float64)*fit.value
    height = torch.stack([(counts*predict(a)).sum() for a in grid])
    assert abs(grid[height.argmax()] - fit.value) < .002*fit.value
    assert fit.low < truth < fit.high and fit.high - fit.low < .3*truth and fit.n == counts.sum()

def test_fit_of_data_that_say_nothing():
    "Words that are all alike: any rationality explains them, and the interval says so"
    fit = fit_alpha([[5, 5], [5, 5]], lambda a: layers([[1, 1], [1, 1]], 1, a).listeners[1])
    assert (fit.low, fit.high) == (0., math.inf)
