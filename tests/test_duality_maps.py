"""Maps against their definitions: transposes, scale, seeds, singular vectors, sketches; and the linear layers that use them against autograd."""
import subprocess, sys
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint
from rlcr_suite.duality import DualOptimizer, Kron, Left, Map, OneSided, Projection, Right, TwoSided, attach, per_worker_map, rotate
from rlcr_suite.duality.fused import _Projected, _Sketch

f64 = torch.float64
SAME = 1e-12        # float64: the same sums in another order
RANDOM = ("semi-orthogonal", "gaussian", "rademacher")
SIDES = (Left, Right, OneSided, TwoSided)

def apart(a, b): return ((a - b).norm()/b.norm()).item()

# ---------------------------------------------------------------------------------------------------------------- maps

@pytest.mark.parametrize("shape", ((12, 20), (20, 12), (7, 7), (5, 1000)))
@pytest.mark.parametrize("kind", (*RANDOM, "svd", "randomized-svd"))
@pytest.mark.parametrize("side", SIDES)
def test_up_is_the_transpose_of_down(side, kind, shape):
    p = side(4, kind).bind(shape, "w", 3, f64)
    G, L = torch.randn(shape, dtype=f64), torch.randn(p.low(shape), dtype=f64)
    assert p.down(G).shape == L.shape and p.up(L).shape == G.shape
    assert torch.isclose((p.down(G)*L).sum(), (G*p.up(L)).sum(), rtol=SAME, atol=1e-9)

@pytest.mark.parametrize("kind", RANDOM)
@pytest.mark.parametrize("side", (Left, Right, TwoSided))
def test_random_maps_are_right_on_average(side, kind):
    "The mean of up(down(G)) over n maps has an error that falls like 1/√n"
    G = torch.randn(6, 8, generator=torch.Generator().manual_seed(0), dtype=f64)
    means = []
    for n in (250, 4000):
        mean = sum((lambda p: p.up(p.down(G)))(side(3, kind, seed=1).bind(G.shape, period=i, dtype=f64)) for i in range(n))/n
        means.append(apart(mean, G))
    assert means[1] < .1 and means[1] < .6*means[0]         # a quarter is expected

@pytest.mark.parametrize("shape", ((12, 20), (20, 12)))
def test_orthogonality(shape):
    for M, scale in ((Left(4), shape[0]/4), (Left(4, "svd"), 1.)):
        P = M.bind(shape, dtype=f64).P
        assert (P.T @ P - scale*torch.eye(4, dtype=f64)).abs().max() < SAME
    G = torch.randn(shape, dtype=f64)
    p = TwoSided(4, "svd").find(G)
    U, S, Vh = torch.linalg.svd(G, full_matrices=False)
    assert apart(p.up(p.down(G)), U[:, :4]*S[:4] @ Vh[:4]) < SAME      # the best approximation of rank 4

def test_seeds_name_and_period_make_the_map_in_any_process():
    "Another process, other calls before: the same numbers"
    here = torch.cat([Left(3, k, seed=5).bind((8, 6), "layers.0.q", 2, f64).P for k in RANDOM]).reshape(-1)
    code = ("import torch; from rlcr_suite.duality import Left; torch.randn(7); Left(2).bind((9, 9));"
            f"print(torch.cat([Left(3, k, seed=5).bind((8, 6), 'layers.0.q', 2, torch.float64).P for k in {RANDOM}]).reshape(-1).tolist())")
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert [float(x) for x in out.strip()[1:-1].split(",")] == here.tolist()

def test_global_random_state_is_left_alone():
    torch.manual_seed(0); a = torch.randn(3)
    torch.manual_seed(0); Left(3).bind((9, 9)); attach(nn.Sequential(nn.Identity()).append(nn.Linear(4, 4)), ["1"], Left(2)) ; b = torch.randn(3)
    torch.manual_seed(0); nn.Linear(4, 4); c = torch.randn(3)
    assert torch.equal(b, c) and not torch.equal(a, b)

def test_half_precision():
    p = TwoSided(4).bind((32, 16), dtype=torch.bfloat16)
    assert p.P.dtype == torch.bfloat16 and apart(p.P.float(), TwoSided(4).bind((32, 16)).P) < 2**-8
    q = Left(4, "svd").find(torch.randn(32, 16).bfloat16())
    assert q.P.dtype == torch.bfloat16 and (q.P.float().T @ q.P.float() - torch.eye(4)).abs().max() < .02

def test_errors():
    for f, message in ((lambda: Left(9).bind((8, 20), "layers.0.q"), "rank 9 is larger than the 8 rows of layers.0.q"), (lambda: Right(9).bind((20, 8)), "8 columns"),
                       (lambda: Left(4, "sketch"), "has to be one of"), (lambda: Left(-1), "at least 1"), (lambda: Left(2.), "at least 1"), (lambda: Left(2).bind((3, 3, 3)), "matrices"),
                       (lambda: Left(2, "gaussian").find(torch.randn(4, 4)), "svd"), (lambda: Kron(torch.randn(3), None), "has to be a matrix"),
                       (lambda: Kron(torch.randn(3, 2), None).bind((4, 4)), "left has 3 rows"), (lambda: per_worker_map(2, 2, Left(3)), "outside"),
                       (lambda: per_worker_map(0, 2, Left(3, "svd")), "random")):
        with pytest.raises(ValueError, match=message): f()
    with pytest.raises(TypeError, match="abstract"): Map(3)

def test_rotation_of_a_subspace_onto_itself():
    "The same subspace in other coordinates: a carried gradient is wrong, a turned one exact, for maps of any scale"
    torch.manual_seed(0)
    P = torch.randn(10, 3, dtype=f64)
    old, new = Projection(P), Projection(P @ torch.randn(3, 3, dtype=f64))
    G = old.up(torch.randn(3, 6, dtype=f64))
    assert apart(rotate(old.down(G), old, new), new.down(G)) < 1e-10
    assert apart(old.down(G), new.down(G)) > .3

# ---------------------------------------------------------------------------------------------------------------- layers

class Made(TorchDispatchMode):
    "Sizes of everything that operations allocate; what they write into `known` is no allocation"
    def __init__(self, *known): super().__init__(); self.shapes, self.known = [], {x.data_ptr() for x in known}
    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        out = op(*args, **(kwargs or {}))
        for x in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(x, torch.Tensor) and x._base is None and x.data_ptr() not in self.known: self.shapes.append(tuple(x.shape))
        return out

def pair(mode, M, bias=True, m=12, n=20):
    "A plain layer and the same one attached, λ ≠ 0"
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Linear(n, m, bias=bias, dtype=f64))
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(n, m, bias=bias, dtype=f64))
    d = attach(model, ["0"], M, mode=mode)
    with torch.no_grad():
        t = d.targets[0]
        t.lam.copy_(torch.randn(t.lam.shape, dtype=f64))
        plain[0].weight += t.projection.up(t.lam)
        if mode == "fused": t.weight.copy_(plain[0].weight)
    return plain, model, d

@pytest.mark.parametrize("lead", ((), (5,), (2, 5), (2, 3, 5), (0,)))
@pytest.mark.parametrize("mode", ("adapter", "fused"))
@pytest.mark.parametrize("side", SIDES)
def test_layers_against_autograd(side, mode, lead):
    "Output and every gradient, twice over: gradients add up"
    for bias, needs in ((True, True), (False, False)):
        plain, model, d = pair(mode, side(4), bias)
        x, dy = torch.randn(*lead, 20, dtype=f64), torch.randn(*lead, 12, dtype=f64)
        a, b = x.clone().requires_grad_(needs), x.clone().requires_grad_(needs)
        for _ in range(2):
            y, z = plain(a), model(b)
            torch.testing.assert_close(z, y, rtol=0, atol=SAME)
            y.backward(dy); z.backward(dy)
        t = d.targets[0]
        torch.testing.assert_close(t.lam.grad, t.projection.down(plain[0].weight.grad), rtol=0, atol=1e-11)
        assert t.weight.grad is None
        if needs: torch.testing.assert_close(b.grad, a.grad, rtol=0, atol=1e-11)
        if bias: torch.testing.assert_close(model[0].bias.grad, plain[0].bias.grad, rtol=0, atol=1e-11)

@pytest.mark.parametrize("side", (Left, Right, TwoSided))
def test_fused_forms_nothing_of_the_weights_shape(side):
    "Watched: every allocation of the backward pass, and everything that is kept for it; plain autograd does form it"
    m, n, T, r = 12, 20, 40, 4
    plain, model, d = pair("fused", side(r), bias=False)
    x, kept = torch.randn(T, n, dtype=f64), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (kept.append(t), t)[1], lambda t: t): y = model(x)
    own = {t.data_ptr() for t in (d.targets[0].weight, d.targets[0].projection.P, d.targets[0].projection.Q) if t is not None}
    activations = [t for t in kept if t.data_ptr() not in own]
    assert [tuple(t.shape) for t in activations] == [(T, n if side is Left else r)]
    with Made() as fused: y.sum().backward()
    with Made() as full: plain(x).sum().backward()
    big = {(m, n), (n, m)}
    assert not big & set(fused.shapes) and big & set(full.shapes)
    assert d.targets[0].weight.grad is None and d.targets[0].lam.grad is not None

@pytest.mark.parametrize("mode", ("adapter", "fused"))
def test_a_step_of_the_optimizer_forms_nothing_either(mode):
    m, n, T = 48, 60, 80
    _, model, d = pair(mode, TwoSided(4, "randomized-svd"), False, m, n)
    opt = DualOptimizer(torch.optim.Adam, d, lr=1e-2)
    for _ in range(3):                      # a sketched step is among them
        opt.zero_grad()
        x, t = torch.randn(T, n, dtype=f64), d.targets[0]
        with Made(t.weight) as made:
            model(x).square().sum().backward()
            opt.step()
        assert made.shapes and max(a*b for a, b in (s for s in made.shapes if len(s) == 2 and T not in s)) <= n*12      # a sketch of 4 + 8 columns

def test_sketches_add_up_over_microbatches():
    M, shape = TwoSided(4, "randomized-svd"), (12, 20)
    one, two = (_Sketch(M.omegas(shape, dtype=f64)) for _ in range(2))
    parts = [(torch.randn(30, 20, dtype=f64), torch.randn(30, 12, dtype=f64)) for _ in range(3)]
    for x, dy in parts: one(x, dy)
    two.add(sum(dy.T @ x for x, dy in parts))
    for a, b in zip(one.sums, two.sums): assert apart(a, b) < SAME

@pytest.mark.parametrize("mode", ("adapter", "fused"))
def test_gradient_checkpointing(mode):
    _, model, d = pair(mode, Right(4, "randomized-svd"))
    x, grads, sketches = torch.randn(6, 20, dtype=f64), [], []
    for f in (model, lambda x: checkpoint(model, x, use_reentrant=False), lambda x: checkpoint(model, x.clone().requires_grad_(), use_reentrant=True)):
        d.zero_grad()
        f(x).square().sum().backward()
        grads.append(d.targets[0].lam.grad); sketches.append(d.targets[0].seen.sums[0])
    for a, b in ((grads, grads[0]), (sketches, sketches[0])):
        for y in a: assert apart(y, b) < SAME

@pytest.mark.parametrize("mode", ("adapter", "fused"))
def test_autocast(mode):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(20, 16), nn.GELU(), nn.Linear(16, 4))
    d = attach(model, ["0", "2"], Left(4), mode=mode)
    x = torch.randn(64, 20)
    model(x).square().mean().backward()
    exact = [p.grad.clone() for p in d.lambdas()]
    d.zero_grad()
    with torch.autocast("cpu", torch.bfloat16): y = model(x)
    assert y.dtype == torch.bfloat16
    y.float().square().mean().backward()
    for p, g in zip(d.lambdas(), exact): assert p.grad.dtype == torch.float32 and apart(p.grad, g) < .03      # a few roundings of 2⁻⁹

@pytest.mark.parametrize("mode", ("adapter", "fused"))
def test_bfloat16_weights_have_float32_lambdas(mode):
    model = nn.Sequential(nn.Linear(20, 16)).bfloat16()
    d = attach(model, ["0"], TwoSided(4), mode=mode)
    model(torch.randn(8, 20).bfloat16()).sum().backward()
    t = d.targets[0]
    assert t.lam.dtype == t.lam.grad.dtype == torch.float32 and t.projection.P.dtype == torch.bfloat16

def test_second_derivatives_are_refused():
    _, model, d = pair("fused", Left(4))
    x = torch.randn(3, 20, dtype=f64, requires_grad=True)
    g, = torch.autograd.grad(model(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"): g.sum().backward()
