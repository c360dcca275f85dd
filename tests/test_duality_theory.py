"""The duality of gradient transformations and adapters in float64: every equality of the theorem over 60 steps, and every way it breaks, by how much.

The gradient side differentiates by the weights and the adapter side by lambda, so an equality is never one of a formula with itself."""
import math
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings, strategies as st
from rlcr_suite.duality.theory import (EQUAL, Map, adam, dense, gap, left, matrix, regression, right, run_adapter, run_gradient, sgd_momentum,
                                       transfer, two_sided)

f64, STEPS = torch.float64, 60
BROKEN = 1e-2       # of the distance trained: ten orders of magnitude above EQUAL, where rounding cannot get in 60 steps
ROUNDING = 1e-13    # one product of matrices of order 1 in float64: some hundred roundings of 1e-16
M, N, R = 12, 20, 4

def normal(*shape, seed=0): return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=f64)
def basis(m, r, seed=0): return torch.linalg.qr(normal(m, r, seed=seed))[0]

def by_torch(cls, **kw):
    "An optimizer of PyTorch as a function of a gradient and a state: it steps a parameter that is always zero"
    def step(g, state=None):
        if state is None:
            p = torch.nn.Parameter(torch.zeros_like(g))
            state = {"p": p, "opt": cls([p], **kw)}
        p = state["p"]
        with torch.no_grad(): p.zero_()
        p.grad = g.clone(); state["opt"].step()
        return -p.detach().clone(), state
    return step

MAPS = {"dense": dense(normal(30, M*N)/math.sqrt(M*N), (M, N)), "dense, dependent rows": dense(normal(30, 5, seed=1) @ normal(5, M*N, seed=2)/30, (M, N)),
        "left": left(basis(M, R)), "left, gaussian": left(normal(M, R)/2), "right": right(basis(N, R)), "right, gaussian": right(normal(N, R)/2),
        "two-sided": two_sided(basis(M, R), basis(N, 5)), "kron": two_sided(normal(M, 3)/2, normal(N, 7)/2)}
OPTIMIZERS = {"adam": adam(), "sgd": sgd_momentum(momentum=0), "sgd_momentum": sgd_momentum()} | {
    "".join([cls.__name__, *kw]): by_torch(cls, lr=.01, **kw) for cls, kw in ((torch.optim.Adam, {}), (torch.optim.Adam, {"amsgrad": True}), (torch.optim.RMSprop, {}), (torch.optim.Adagrad, {}), (torch.optim.Adamax, {}),
                                                              (torch.optim.NAdam, {}), (torch.optim.RAdam, {}), (torch.optim.Rprop, {}))}

@pytest.fixture(scope="module")
def problem(): return regression(M, N)

def sides(problem, maps, opt, steps=STEPS, **kw): return [run(*problem, maps, opt, steps, **kw) for run in (run_adapter, run_gradient)]

# ------------------------------------------------------------------------------------------------------------ the theorem

@pytest.mark.parametrize("kind", MAPS)
@pytest.mark.parametrize("name", ["adam", "sgd_momentum"])
def test_every_map(problem, kind, name):
    a, g = sides(problem, MAPS[kind], OPTIMIZERS[name])
    assert gap(a, g) <= EQUAL
    assert (g[-1] - g[0]).abs().max() > .05                                     # it went somewhere

@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_optimizer(problem, name):
    "Whatever sees gradients only; Rprop looks at their signs, RAdam changes its rule on the way"
    for kind in ("dense", "left", "right, gaussian"): assert gap(*sides(problem, MAPS[kind], OPTIMIZERS[name])) <= EQUAL

@pytest.mark.parametrize("seed", range(3))
def test_other_problems(seed):
    for shape in ((5, 31), (16, 16), (23, 4)):
        problem, r = regression(*shape, seed=seed), 2 + seed
        for S in (left(normal(shape[0], r, seed=seed)), right(normal(shape[1], r, seed=seed))): assert gap(*sides(problem, S, adam())) <= EQUAL

def test_schedules_and_noise_of_its_own(problem):
    "A learning rate that changes and random numbers are part of the optimizer, if both sides have the same"
    def noisy(seed):
        inner = adam(1.)
        def step(g, state=None):
            u, s = inner(g, state)
            t = s["t"]
            return .01*math.cos(t/STEPS)*(u + .3*normal(*u.shape, seed=1000*seed + t)), s
        return step
    assert gap(*sides(problem, MAPS["left"], noisy(1))) <= EQUAL
    assert gap(run_adapter(*problem, MAPS["left"], noisy(1), STEPS), run_gradient(*problem, MAPS["left"], noisy(2), STEPS)) > BROKEN

def test_two_layers_are_one_vector():
    "Several weights: a block-diagonal map of all of them, one side each"
    X, Y, w0 = normal(64, 6), normal(64, 3, seed=1), .3*normal(1, 6*8 + 8*3, seed=2)
    P, Q = basis(8, 2, seed=3), normal(8, 3, seed=4)
    def parts(w): return w[0, :48].view(8, 6), w[0, 48:].view(3, 8)
    def loss(w, t):
        a, b = parts(w)
        return (F.gelu(X @ a.T) @ b.T - Y).square().mean()
    def down(g):
        a, b = parts(g)
        return torch.cat([(P.T @ a).reshape(-1), (b @ Q).reshape(-1)])
    def up(lam): return torch.cat([(P @ lam[:12].view(2, 6)).reshape(-1), (lam[12:].view(3, 3) @ Q.T).reshape(-1)])[None]
    assert gap(*sides((loss, w0), Map(down, up), adam())) <= EQUAL

def test_the_way_back_has_to_be_the_transpose(problem):
    A = normal(30, M*N)/math.sqrt(M*N)
    back = torch.linalg.pinv(A)
    assert gap(*sides(problem, Map(lambda g: A @ g.reshape(-1), lambda lam: (back @ lam).reshape(M, N)), adam())) > BROKEN
    P = basis(M, R)
    assert gap(*sides(problem, Map(left(P).down, left(P).up), adam())) <= EQUAL       # where the pseudo-inverse is the transpose

def test_reference_optimizers_are_pytorchs(problem):
    for mine, theirs in ((adam(.02, (.8, .99), 1e-3), by_torch(torch.optim.Adam, lr=.02, betas=(.8, .99), eps=1e-3)), (sgd_momentum(.02, .7), by_torch(torch.optim.SGD, lr=.02, momentum=.7))):
        assert gap(*(run_gradient(*problem, MAPS["left"], o, STEPS) for o in (mine, theirs))) <= EQUAL

# ------------------------------------------------------------------------------------------------------------ maps

@settings(max_examples=50, deadline=None)
@given(st.integers(1, 7), st.integers(1, 7), st.integers(1, 5), st.integers(1, 5), st.integers(0, 10**6))
def test_maps_are_kronecker_products_and_up_is_down_transposed(m, n, r, s, seed):
    P, Q, g = normal(m, r, seed=seed), normal(n, s, seed=seed + 1), normal(m, n, seed=seed + 2)
    def kron(a, b): return torch.einsum("ij,kl->ikjl", a, b).reshape(a.shape[0]*b.shape[0], -1)
    eye = lambda k: torch.eye(k, dtype=f64)
    for S, K in ((left(P), kron(P.T, eye(n))), (right(Q), kron(eye(m), Q.T)), (two_sided(P, Q), kron(P.T, Q.T)), (dense(K := normal(r, m*n), (m, n)), K)):
        torch.testing.assert_close(matrix(S, (m, n)), K, rtol=0, atol=ROUNDING)
        lam = normal(*S.down(g).shape, seed=seed + 3)
        torch.testing.assert_close(S.up(lam).reshape(-1), K.T @ lam.reshape(-1), rtol=0, atol=ROUNDING)
        torch.testing.assert_close(S.down(g).reshape(-1), K @ g.reshape(-1), rtol=0, atol=ROUNDING)

def test_adam_depends_on_the_basis_gradient_descent_does_not(problem):
    P = basis(M, R)
    turned = P @ basis(R, R, seed=9)
    for opt, same in ((sgd_momentum(), True), (adam(), False)):
        d = gap(*(run_gradient(*problem, left(x), opt, STEPS) for x in (turned, P)))
        assert d <= EQUAL if same else d > BROKEN

# ------------------------------------------------------------------------------------------------------------ new projections

def by_svd(period, g): return left(torch.linalg.svd(g, full_matrices=False)[0][:, :R])
def by_seed(period, g): return left(basis(M, R, seed=period))
CHOICES = {"svd": by_svd, "random": by_seed, "right gaussian": lambda p, g: right(normal(N, 3, seed=p)/3**.5), "two-sided": lambda p, g: two_sided(basis(M, R, seed=p), basis(N, 5, seed=p + 50)),
           "another rank": lambda p, g: left(basis(M, 2 + p, seed=p))}

@pytest.mark.parametrize("choice", CHOICES)
@pytest.mark.parametrize("policy", ["carry", "reset", "rotate"])
def test_new_projections(problem, choice, policy):
    if (choice, policy) == ("another rank", "carry"):
        with pytest.raises(ValueError, match="carry"): run_gradient(*problem, CHOICES[choice], adam(), STEPS, every=20)
        return
    for opt in (adam(), sgd_momentum()): assert gap(*sides(problem, CHOICES[choice], opt, every=20, policy=policy)) <= EQUAL

@pytest.mark.parametrize("a,b", [("reset", "carry"), ("rotate", "carry"), ("rotate", "reset")])
def test_both_sides_have_to_treat_the_state_alike(problem, a, b):
    x, y = run_adapter(*problem, by_svd, adam(), STEPS, every=20, policy=a), run_gradient(*problem, by_svd, adam(), STEPS, every=20, policy=b)
    assert gap(x[:21], y[:21]) <= EQUAL and gap(x, y) > BROKEN                   # until the first new projection they cannot differ

def test_merging_does_not_move_the_weights(problem):
    path = run_adapter(*problem, by_seed, adam(), 41, every=20)
    steps = path.diff(dim=0).flatten(1).norm(dim=1)
    assert steps.max() < 3*steps.median()
    assert [int(torch.linalg.matrix_rank(path[t] - path[0])) for t in (20, 21, 40, 41)] == [4, 8, 8, 12]

def test_choices_are_given_the_period_and_the_gradient(problem):
    loss, w0 = problem
    for run in (run_gradient, run_adapter):
        seen = []
        path = run(loss, w0, lambda p, g: seen.append((p, g)) or by_seed(p, g), adam(), 30, every=10)
        assert [p for p, _ in seen] == [0, 1, 2]
        for (p, g) in seen:
            w = path[10*p].clone().requires_grad_()
            torch.testing.assert_close(g, torch.autograd.grad(loss(w, 10*p), w)[0], rtol=0, atol=ROUNDING)

def test_transfer():
    g = normal(R, N)
    _, state = adam()(g, None)
    P, same, other = left(basis(M, R)), left(basis(M, R)[:, [2, 0, 3, 1]]), left(basis(M, R, seed=5))
    assert transfer(state, P, other, "carry", (M, N)) is state and transfer(state, P, other, "reset", (M, N)) is None and transfer(None, None, P, "rotate", (M, N)) is None
    for key in "mv": torch.testing.assert_close(transfer(state, P, same, "rotate", (M, N))[key], state[key][[2, 0, 3, 1]], rtol=0, atol=ROUNDING)      # a permutation is one
    new = transfer(state, P, other, "rotate", (M, N))
    torch.testing.assert_close(new["m"], other.down(P.up(state["m"])), rtol=0, atol=ROUNDING)
    assert new["v"].min() >= 0 and new["t"] == state["t"]
    with pytest.raises(ValueError, match="'keep'"): transfer(state, P, other, "keep", (M, N))

def test_rotated_mean_square_is_right_for_uncorrelated_coordinates():
    "E[(D g)^2] = (D o D) E[g^2], by 400 000 draws; standard errors of about 0.3%"
    scale, old, new = torch.tensor([2., .5, 1., 3.], dtype=f64), left(basis(M, R)), left(basis(M, R, seed=3))
    g = scale[:, None]*normal(R, 400_000)
    state = {"t": 1, "m": torch.zeros(R, 1, dtype=f64), "v": scale[:, None]**2}
    want = transfer(state, old, new, "rotate", (M, 1))["v"]
    torch.testing.assert_close(new.down(old.up(g)).square().mean(1, keepdim=True), want, rtol=.02, atol=0)

@pytest.mark.parametrize("option", ["policy", "decay_of", "clip"])
def test_unknown_options(problem, option):
    for run in (run_gradient, run_adapter):
        with pytest.raises(ValueError, match=f"{option} has to be one of .* not 'other'"): run(*problem, MAPS["left"], adam(), 1, **{option: "other"})

# ------------------------------------------------------------------------------------------------------------ decay

D = .01*.1          # learning rate times weight decay

def test_decoupled_decay(problem):
    S, opt = MAPS["left"], adam()
    g = run_gradient(*problem, S, opt, STEPS, decay=D)
    assert gap(run_adapter(*problem, S, opt, STEPS, decay=D, decay_of="delta"), g) > BROKEN            # what AdamW does to an adapter
    assert gap(run_adapter(*problem, S, opt, STEPS, decay=D), g) <= EQUAL                              # plus one factor for the base

@pytest.mark.parametrize("of", ["weight", "delta"])
@pytest.mark.parametrize("policy", ["carry", "reset", "rotate"])
def test_decay_over_new_projections(problem, of, policy): assert gap(*sides(problem, by_svd, adam(), every=20, policy=policy, decay=.02, decay_of=of)) <= EQUAL

def test_decay_is_adamws(problem):
    "With all directions kept, both sides are torch.optim.AdamW on the weight"
    loss, w0 = problem
    p = torch.nn.Parameter(w0.clone())
    opt = torch.optim.AdamW([p], lr=.01, weight_decay=.5)
    for t in range(STEPS):
        opt.zero_grad(); loss(p, t).backward(); opt.step()
    for path in sides(problem, left(torch.eye(M, dtype=f64)), adam(), decay=.005): assert ((path[-1] - p).abs().max()/(p - w0).abs().max()) <= EQUAL

def test_adapter_decay_is_adamws_on_lambda(problem):
    "decay_of='delta' is what torch.optim.AdamW does to a trained lambda beside a frozen weight"
    loss, w0 = problem
    P = basis(M, R)
    lam = torch.nn.Parameter(torch.zeros(R, N, dtype=f64))
    opt = torch.optim.AdamW([lam], lr=.01, weight_decay=.5)
    for t in range(STEPS):
        opt.zero_grad(); loss(w0 + P @ lam, t).backward(); opt.step()
    path = run_adapter(loss, w0, left(P), adam(), STEPS, decay=.005, decay_of="delta")
    assert ((path[-1] - w0 - P @ lam).abs().max()/(path[-1] - w0).abs().max()) <= EQUAL

def test_l2_belongs_to_the_loss(problem):
    loss, w0 = problem
    penalised = (lambda w, t: loss(w, t) + .05*w.square().sum()), w0
    g = run_gradient(*penalised, MAPS["left"], adam(), STEPS)
    assert gap(run_adapter(*penalised, MAPS["left"], adam(), STEPS), g) <= EQUAL
    inner = adam()
    assert gap(run_adapter(*problem, MAPS["left"], lambda g, s, lam: inner(g + .1*lam, s), STEPS, watch="lam"), g) > BROKEN

# ------------------------------------------------------------------------------------------------------------ clipping

@pytest.mark.parametrize("kind", ["left", "two-sided"])
@pytest.mark.parametrize("name", ["adam", "sgd_momentum"])
def test_clipping(problem, kind, name):
    loss, w0 = problem
    S, opt = MAPS[kind], OPTIMIZERS[name]
    w = w0.clone().requires_grad_()
    c = .5*float(S.down(torch.autograd.grad(loss(w, 0), w)[0]).norm())
    full = run_gradient(loss, w0, S, opt, STEPS, max_norm=c, clip="full")
    projected = run_adapter(loss, w0, S, opt, STEPS, max_norm=c)
    assert gap(projected, full) > BROKEN
    assert gap(projected, run_gradient(loss, w0, S, opt, STEPS, max_norm=c)) <= EQUAL
    assert gap(run_adapter(loss, w0, S, opt, STEPS, max_norm=c, clip="full"), full) <= EQUAL           # the norm handed over
    assert gap(projected, run_gradient(loss, w0, S, opt, STEPS)) > BROKEN                              # it did bind

def test_clipping_that_does_not_bind(problem):
    for clip in ("full", "projected"):
        for x, y in zip(sides(problem, MAPS["left"], adam(), 20, max_norm=1e9, clip=clip), sides(problem, MAPS["left"], adam(), 20)): assert torch.equal(x, y)

def test_norm_from_gram_matrices():
    X, Dy = normal(7, N), normal(7, M, seed=1)
    torch.testing.assert_close((Dy.T @ X).norm()**2, ((X @ X.T)*(Dy @ Dy.T)).sum(), rtol=ROUNDING, atol=0)

# ------------------------------------------------------------------------------------------------------------ optimizers that look

def lamb(g, s, w, inner=adam(1.)):
    u, s = inner(g, s)
    return .02*(w.norm()/u.norm() if w.norm() > 0 else 1.)*u, s

def lars(g, s, w):
    m = .9*s["m"] + g if s else g
    return .02*(w.norm()/m.norm() if w.norm() > 0 else 1.)*m, {"m": m}

def parameter_scaled(g, s, w, inner=by_torch(torch.optim.RMSprop, lr=.03)):
    u, s = inner(g, s)
    return max(1e-3, float(w.square().mean().sqrt()))*u, s

@pytest.mark.parametrize("opt", [lamb, lars, parameter_scaled], ids=lambda f: f.__name__)
def test_optimizers_that_look_at_the_weights(problem, opt):
    g = run_gradient(*problem, MAPS["left"], opt, STEPS, watch=True)
    alone = run_adapter(*problem, MAPS["left"], opt, STEPS, watch="lam")
    assert gap(alone, g) > .5                                                   # an adapter starts at zero and hardly moves
    assert gap(run_adapter(*problem, MAPS["left"], opt, STEPS, watch="weight"), g) <= EQUAL

def test_scaling_the_full_gradient_leaves_the_range_of_the_map(problem):
    loss, w0 = problem
    P = basis(M, R)
    w = w0.clone().requires_grad_()
    g, = torch.autograd.grad(loss(w, 0), w)
    u, _ = adam()(P.T @ g, None)
    update = g*(u.norm(dim=0)/(P.T @ g).norm(dim=0))
    assert (update - P @ (P.T @ update)).norm() > .5*update.norm()

# ------------------------------------------------------------------------------------------------------------ a factor in front

def scaled(alpha, P): return Map(lambda g: P.T @ g, lambda lam: alpha*(P @ lam))       # run_adapter differentiates through up: its gradient has alpha

@pytest.mark.parametrize("alpha", [.25, 8.])
def test_epsilon_under_a_factor(problem, alpha):
    S = scaled(alpha, basis(M, R))
    g = run_gradient(*problem, S, adam(eps=1e-3), STEPS)
    assert gap(run_adapter(*problem, S, adam(eps=1e-3), STEPS), g) > BROKEN
    assert gap(run_adapter(*problem, S, adam(eps=1e-3*alpha), STEPS), g) <= EQUAL

def test_step_length_under_a_factor(problem):
    S = scaled(.25, basis(M, R))
    g = run_gradient(*problem, S, sgd_momentum(.1), STEPS)
    assert gap(run_adapter(*problem, S, sgd_momentum(.1), STEPS), g) > BROKEN
    assert gap(run_adapter(*problem, S, sgd_momentum(.1/.25), STEPS), g) <= EQUAL

# ------------------------------------------------------------------------------------------------------------ accumulation, memory, rounding

@pytest.mark.parametrize("kind", MAPS)
def test_accumulation_behind_the_map(problem, kind):
    (loss, w0), S = problem, MAPS[kind]
    w = w0.clone().requires_grad_()
    parts = [torch.autograd.grad(loss(w, t), w)[0] for t in range(4)]
    total = S.down(sum(parts))
    torch.testing.assert_close(sum(map(S.down, parts)), total, rtol=0, atol=ROUNDING)
    lam = torch.zeros_like(total).requires_grad_()
    for t in range(4): loss(w0 + S.up(lam), t).backward()
    torch.testing.assert_close(lam.grad, total, rtol=0, atol=ROUNDING)

def test_a_step_for_every_microbatch_is_another_training(problem):
    loss, w0 = problem
    once = run_gradient(lambda w, t: sum(loss(w, 4*t + i) for i in range(4))/4, w0, MAPS["left"], adam(), 15)
    assert gap(run_gradient(loss, w0, MAPS["left"], adam(), 60)[::4], once) > .5

@pytest.mark.parametrize("m,n,r", [(24, 40, 5), (40, 24, 5), (7, 7, 1)])
def test_memory(m, n, r):
    "Counted in torch.optim.Adam: full 2mn; left 2rn and a projector mr; right 2mr and nr; two-sided 2r^2 and (m + n)r"
    def moments(x):
        p = torch.nn.Parameter(torch.zeros_like(x)); p.grad = x
        opt = torch.optim.Adam([p]); opt.step()
        return sum(s.numel() for s in opt.state[p].values() if s.ndim)
    P, Q, g = normal(m, r), normal(n, r), normal(m, n)
    assert moments(g) == 2*m*n
    assert moments(left(P).down(g)) + P.numel() == 2*r*n + m*r
    assert moments(right(Q).down(g)) + Q.numel() == 2*m*r + n*r
    assert moments(two_sided(P, Q).down(g)) + P.numel() + Q.numel() == 2*r*r + (m + n)*r
    for S in (left(P), right(Q), two_sided(P, Q)):                                       # the reference keeps no more
        _, state = adam()(S.down(g), None)
        assert sum(x.numel() for x in state.values() if torch.is_tensor(x)) == 2*S.down(g).numel()

def test_bfloat16_weights_lose_steps_that_an_adapter_keeps(problem):
    (loss, w0), S = problem, MAPS["left"]
    w0 = w0.bfloat16().double()
    exact = run_gradient(loss, w0, S, adam(5e-4), 100)
    opt, w, s = adam(5e-4), w0, None
    lam, z = torch.zeros(R, N, dtype=f64), None
    for t in range(100):
        x = w.clone().requires_grad_(); y = lam.clone().requires_grad_()
        u, s = opt(S.down(torch.autograd.grad(loss(x, t), x)[0]), s)
        v, z = opt(torch.autograd.grad(loss(w0 + S.up(y), t), y)[0], z)
        w, lam = (w - S.up(u)).bfloat16().double(), (lam - v).bfloat16().double()
    moved = (exact[-1] - w0).abs().max()
    assert (w == w0).double().mean() > .5 and (w - exact[-1]).abs().max() > .5*moved
    assert (w0 + S.up(lam) - exact[-1]).abs().max() < .1*moved

# ------------------------------------------------------------------------------------------------------------ the instruments

def test_gap():
    a = torch.stack([torch.zeros(2, 2), torch.ones(2, 2), torch.full((2, 2), 2.)])
    assert gap(a, a) == 0 and gap(a + torch.tensor([0., 1, 0])[:, None, None], a) == .5        # measured by what was trained, at any step

def test_the_problem_is_seeded_and_changes_its_batch():
    (f, w), (g, v), (h, u) = regression(seed=1), regression(seed=1), regression(seed=2)
    assert torch.equal(w, v) and f(w, 3) == g(v, 3) and not torch.equal(w, u)
    assert f(w, 0) != f(w, 1) and f(w, 0) == f(w, 4)                                       # four batches of 32
