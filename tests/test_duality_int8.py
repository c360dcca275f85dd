'Weights of eight bits, mode "fused": rounding that is right on average, one step of the grid at most, state, merging, refusals. Small shapes, single and half precision.'
import io
import pytest
import torch
from torch import nn
from rlcr_suite.duality import AdapterLinear, DualOptimizer, Kron, Left, OneSided, ProjectedLinear, QuantisedLinear, Right, TwoSided, attach, fused, per_worker_map
from rlcr_suite.duality.fused import LEVELS

HALF = (torch.float32, torch.bfloat16, torch.float16)

def quantised(dtype=torch.float32, m=12, n=20):
    "A layer of eight bits, and its weight before"
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(n, m)).to(dtype)
    before = model[0].weight.detach().float().clone()
    attach(model, ["0"], Left(4), mode="fused", weights="int8")
    return model[0], before

def dice(seed=0): return torch.Generator().manual_seed(seed)

# ---------------------------------------------------------------------------------------------------------------- rounding

@pytest.mark.parametrize("dtype", HALF)
def test_merging_is_right_on_average(dtype):
    "The mean over n draws: an entry has a variance of at most 1/4 of a step, so 5 standard errors are 5/(2√n) steps. Rounding to the nearest is outside"
    layer, _ = quantised(dtype)
    Z, s, W, g, n = layer.weight.clone(), layer.scale[:, None].clone(), layer.dequantised(), dice(), 1000
    dW = s*torch.randn(W.shape, generator=dice(1))
    dW.clamp_(-LEVELS*s - W, LEVELS*s - W)                 # within the grid that there is
    total = torch.zeros_like(W)
    for _ in range(n):
        layer.weight.copy_(Z)
        layer.add(dW, g)
        total += layer.dequantised()
    error, bound = ((total/n - W - dW)/s).abs().max(), 5/(2*n**.5)
    nearest = (((W + dW)/s).round() - (W + dW)/s).abs().max()
    assert error < bound < nearest

@pytest.mark.parametrize("dtype", HALF)
def test_beginning_is_right_on_average_and_within_a_step(dtype):
    total, n = 0., 400
    layer, before = quantised(dtype)
    for i in range(n):
        twin = nn.Linear(20, 12).to(dtype)
        twin.__class__ = QuantisedLinear
        with torch.no_grad(): twin.weight.copy_(before)
        twin.quantise(dice(i))
        assert ((twin.dequantised() - before).abs() <= twin.scale[:, None]).all()
        total = total + twin.dequantised()
    assert twin.weight.dtype == torch.int8 and twin.scale.dtype == torch.float32
    assert ((total/n - before)/twin.scale[:, None]).abs().max() < 5/(2*n**.5)

@pytest.mark.parametrize("size", (.3, 30., 3000.))
def test_an_entry_is_off_by_one_step_at_most(size):
    "Steps of the grid as they are after the change: rows that no longer fit have coarser ones, the others keep theirs"
    layer, _ = quantised()
    for i in range(20):
        s, W = layer.scale.clone(), layer.dequantised()
        dW = size*s[:, None]*torch.randn(W.shape, generator=dice(i))*torch.arange(12)[:, None].remainder(2)      # every other row
        layer.add(dW, dice(i))
        new, fits = layer.scale, (W + dW).abs().amax(1) <= LEVELS*s
        assert ((layer.dequantised() - W - dW).abs() <= new[:, None]*(1 + 1e-4)).all()
        assert torch.equal(new[fits], s[fits]) and (new[~fits] > s[~fits]).all() and layer.weight.abs().max() <= LEVELS
        if size == 3000.: assert not fits[1::2].all() or i > 0
    assert fits[::2].all()

@pytest.mark.parametrize("dtype", HALF)
def test_what_does_not_change_stays(dtype):
    layer, _ = quantised(dtype)
    Z, s, g = layer.weight.clone(), layer.scale.clone(), dice()
    for _ in range(100): layer.add(torch.zeros(12, 20), g)
    assert torch.equal(layer.weight, Z) and torch.equal(layer.scale, s)

def test_rows_of_zeros_can_leave_zero():
    model = nn.Sequential(nn.Linear(20, 12, bias=False))
    nn.init.zeros_(model[0].weight)
    attach(model, ["0"], Left(4), mode="fused", weights="int8")
    assert not model[0].dequantised().any()
    dW = 1e3*torch.randn(12, 20, generator=dice())
    model[0].add(dW, dice())
    assert ((model[0].dequantised() - dW).abs() <= model[0].scale[:, None]).all()

# ---------------------------------------------------------------------------------------------------------------- the layer

@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("side", (Left, Right, TwoSided))
def test_it_computes_with_the_weight_that_it_stands_for(side, dtype):
    "Output, every gradient and the sketches of a `ProjectedLinear`, bit for bit; and keeps no floating-point matrix of the weight's shape"
    M, found = side(4, "randomized-svd"), []
    def attached(weights, weight=None):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(20, 12)).to(dtype)
        if weight is not None: model[0].weight.data.copy_(weight)
        return model, attach(model, ["0"], M, mode="fused", weights=weights)
    eight, d = attached("int8")
    for model, d in ((eight, d), attached("float", eight[0].dequantised())):
        x, kept = torch.randn(5, 20, generator=dice(3)).to(dtype).requires_grad_(), []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: (kept.append(t), t)[1], lambda t: t): y = model(x)
        with torch.no_grad(): assert torch.equal(model(x), y)
        y.square().sum().backward()
        found.append((y, x.grad, model[0].bias.grad, model[0].dual.grad, *model[0].seen.sums))
        if model is eight: assert [t.dtype for t in kept if t.shape == (12, 20)] == [torch.int8]
    assert len(found[0]) == len(found[1]) > 4
    for a, b in zip(*found): assert torch.equal(a, b)

def test_decay_is_one_number_a_row():
    model = nn.Sequential(nn.Linear(20, 12))
    d = attach(model, ["0"], Left(4), mode="fused", weights="int8")
    Z, W = model[0].weight.clone(), model[0].dequantised()
    d.shrink(d.targets[0], .75)
    assert torch.equal(model[0].weight, Z)
    torch.testing.assert_close(model[0].dequantised(), .75*W, rtol=1e-6, atol=0)       # two roundings

# ---------------------------------------------------------------------------------------------------------------- training

def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(10, 16), nn.GELU(), nn.Linear(16, 12), nn.GELU(), nn.Linear(12, 3))

def loss_of(model, x): return (model(x) - torch.stack([x[:, 0].sin(), x[:, 1]*x[:, 2], x[:, 3]], 1)).square().mean()

DATA = torch.randn(120, 16, 10, generator=dice(7))

def begin(M=OneSided(4), weights="int8", refresh=4, model=None, lr=1e-2, **more):
    model = model or network()
    return model, DualOptimizer(torch.optim.AdamW, attach(model, "[02]", M, mode="fused", refresh=refresh, weights=weights, **more), lr=lr)

def run(model, opt, data):
    for x in data:
        opt.zero_grad()
        loss_of(model, x).backward()
        opt.step()

def test_steps_smaller_than_the_grid_arrive(monkeypatch):
    "A step is a fiftieth of the grid. Rounded at random the weights learn what float32 ones do; rounded to the nearest, next to nothing"
    def learnt(weights):
        model = network()
        for p in (*model[4].parameters(), model[0].bias, model[2].bias): p.requires_grad_(False)
        model, opt = begin(OneSided(4), weights, 50, model, 1e-4)
        with torch.no_grad(): before = loss_of(model, DATA.reshape(-1, 10))
        run(model, opt, DATA)
        with torch.no_grad(): return (before - loss_of(model, DATA.reshape(-1, 10))).item()
    exact, eight = learnt("float"), learnt("int8")
    monkeypatch.setattr(fused, "_round", lambda y, generator: y.round())
    nearest = learnt("int8")
    assert exact > 0 and .7*exact < eight < 1.3*exact and abs(nearest) < .1*exact

@pytest.mark.parametrize("kind", ("semi-orthogonal", "randomized-svd"))
def test_resume_is_bit_exact_in_mid_period(kind):
    "Through torch.save and torch.load with its defaults, which unpickle tensors and containers only"
    options = dict(M=TwoSided(3, kind), state="rotate")
    whole, opt = begin(**options)
    run(whole, opt, DATA[:10])
    for stop in (2, 4, 5, 7):
        model, opt = begin(**options)
        run(model, opt, DATA[:stop])
        file = io.BytesIO()
        torch.save([model.state_dict(), opt.state_dict()], file); file.seek(0)
        states, (model, opt) = torch.load(file), begin(**options)
        assert states[0]["0.weight"].dtype == torch.int8 and set(states[0]) - set(network().state_dict()) == {"0.scale", "2.scale"}
        model.load_state_dict(states[0]); opt.load_state_dict(states[1])
        run(model, opt, DATA[stop:10])
        for a, b in zip(whole.state_dict().values(), model.state_dict().values(), strict=True): assert torch.equal(a, b)

@pytest.mark.parametrize("dtype,after", ((torch.float32, torch.float32), (torch.bfloat16, torch.bfloat16), (torch.float32, torch.float64), (torch.float32, torch.bfloat16)))
def test_merge_gives_a_plain_model(dtype, after):
    "In the dtype that the model has by then"
    model, opt = begin(model=network().to(dtype))
    run(model, opt, DATA[:6].to(dtype))
    model.to(after)
    x = DATA[10].to(after)
    with torch.no_grad(): y = model(x)
    assert opt.d.merge() is model and [type(m) for m in model] == [type(m) for m in network()]
    assert {p.dtype for p in model.parameters()} == {after} and all(p.requires_grad for p in model.parameters())
    plain = network().to(after)
    plain.load_state_dict(model.state_dict())                           # strictly
    assert not list(plain.buffers()) and not list(model.buffers())
    with torch.no_grad(): assert torch.equal(plain(x), y)

def test_refusals(tmp_path):
    for mode in ("gradient", "adapter"):
        with pytest.raises(ValueError, match=f'never differentiated, which mode {mode!r} would; use mode="fused"'): attach(network(), "[02]", Left(4), mode=mode, weights="int8")
    with pytest.raises(ValueError, match="cannot be averaged between workers"): attach(network(), "[02]", per_worker_map(0, 2, Left(4)), mode="fused", weights="int8")
    with pytest.raises(ValueError, match="weights is 'int4'; it has to be one of float, int8"): attach(network(), "[02]", Left(4), mode="fused", weights="int4")
    model, opt = begin()
    assert all(type(m) is QuantisedLinear and isinstance(m, ProjectedLinear) and not isinstance(m, AdapterLinear) for m in (model[0], model[2]))
    with pytest.raises(ValueError, match="another weights: 'int8', here 'float'"): begin(weights="float")[1].load_state_dict(opt.state_dict())
    with pytest.raises(RuntimeError, match="0.scale"): begin(weights="float")[0].load_state_dict(model.state_dict())
    with pytest.raises(RuntimeError, match="0.scale"): model.load_state_dict(network().state_dict())
    for p in opt.d.others(): p.requires_grad_(False)
    with pytest.raises(ValueError, match="rounded at every merge"): opt.d.to_peft(tmp_path, network().state_dict())
    with pytest.raises(ValueError, match="attached already"): attach(model, ["0"], Left(4), mode="fused")

def test_without_a_map_it_is_the_optimizer_itself_rounded():
    "Kron with identities: each weight within a step of what AdamW makes of the same gradients, after the first step"
    model, opt = begin(Kron(None, None), refresh=None)
    W, grid = [model[i].dequantised() for i in (0, 2)], [model[i].scale[:, None].clone() for i in (0, 2)]
    plain = network()
    with torch.no_grad():
        for i, w in zip((0, 2), W): plain[i].weight.copy_(w)
    run(model, opt, DATA[:1])
    run(plain, torch.optim.AdamW(plain.parameters(), lr=1e-2), DATA[:1])
    for i, w, s in zip((0, 2), W, grid):
        assert ((model[i].dequantised() - plain[i].weight).abs() <= s*(1 + 1e-4)).all() and not torch.equal(model[i].dequantised(), w)
