"""PaTH attention against the definition, against an independent public implementation, and against itself: every length, every gradient,
grouped heads, packed sequences, uninitialised memory, half precision, memory, and decoding over thousands of tokens."""
import subprocess, sys, warnings
import pytest
import torch
import torch.nn.functional as F
from fixed_order import fixed_order
from rlcr_suite.core import blocks
from rlcr_suite.core.blocks import levels
from rlcr_suite.path_attention import PathCache, backend_for, naive_path_attention, path_attention, wy
from rlcr_suite.path_attention import attention, cache as cache_module, transport

f64 = torch.float64
NAMES = ("q", "k", "v", "w", "beta", "gate")
# float32 sums of some hundred products in another order: 16 and 40 times its rounding unit of 1.2e-7, relative to the norm
FORWARD, GRADIENT = 2e-6, 5e-6

def relative(x, y): return ((x.double() - y.double()).norm()/y.double().norm().clamp_min(1e-30)).item()

def inputs(B, T, HQ, H, D, V=None, gate=True, transforms=True, dtype=f64, seed=0):
    "(q, k, v, w, beta, gate): unit w, beta in (0, 2), gates between 0.5 and 1"
    g = torch.Generator().manual_seed(seed)
    def normal(*s): return torch.randn(*s, generator=g, dtype=f64)
    x = [normal(B, T, HQ, D), normal(B, T, H, D), normal(B, T, H, V or D)]
    x += [F.normalize(normal(B, T, H, D), dim=-1), 2*torch.rand(B, T, H, generator=g, dtype=f64)] if transforms else [None, None]
    x.append(F.logsigmoid(normal(B, T, HQ) + 3) if gate else None)
    return [y if y is None else y.to(dtype) for y in x]

def call(x, **options): return path_attention(*x[:5], gate=x[5], **options)

def gradients(f, x, seed=1):
    "Output of f and the gradients of a random function of it"
    x = [y if y is None else y.detach().clone().requires_grad_() for y in x]
    o = f(x)
    do = torch.randn(o.shape, generator=torch.Generator().manual_seed(seed), dtype=f64).to(o)
    return [o.detach(), *torch.autograd.grad(o, [y for y in x if y is not None], do, materialize_grads=True)]

def by_rewriting(q, k, v, w, beta, gate, scale=None, scale_gate=False):
    "An independent definition in float64: token by token, all keys rewritten, one query at a time"
    (B, T, HQ, D), r = q.shape, q.shape[2]//k.shape[2]
    q, k, v, w, beta = (y.double().repeat_interleave(HQ//y.shape[2], 2) for y in (q, k, v, w, beta))
    c, scale, keys, out = 0 if gate is None else gate.double().cumsum(1), scale or D**-.5, torch.zeros_like(k), []
    for t in range(T):
        keys[:, :t] -= beta[:, t, None, :, None]*(keys[:, :t]*w[:, t:t+1]).sum(-1, keepdim=True)*w[:, t:t+1]
        keys[:, t] = k[:, t]
        S = torch.einsum("bshd,bhd->bsh", keys[:, :t+1], q[:, t])*scale
        if gate is not None: S = S + (c[:, t:t+1] - c[:, :t+1])*(scale if scale_gate else 1)
        out.append(torch.einsum("bsh,bshd->bhd", S.softmax(1), v[:, :t+1]))
    return torch.stack(out, 1)

@pytest.fixture
def blocks_of(monkeypatch):
    "Make the leaves of the tree small, so that short sequences have many levels"
    return lambda size: monkeypatch.setattr(attention, "BLOCK", size)

# ---------------------------------------------------------------------------------------------------------------- against others

@pytest.mark.parametrize("scale_gate", (False, True))
@pytest.mark.parametrize("backend", ("naive", "torch"))
def test_definition_at_every_length(backend, scale_gate):
    x = inputs(1, 130, 2, 1, 5, V=3)
    want = by_rewriting(*x, scale=.7, scale_gate=scale_gate)            # causal: shorter sequences are prefixes
    for T in range(1, 131) if backend == "torch" else (1, 2, 63, 64, 65, 130):
        got = call([y[:, :T] for y in x], scale=.7, scale_gate=scale_gate, backend=backend)
        torch.testing.assert_close(got, want[:, :T], rtol=0, atol=1e-12)

@pytest.mark.parametrize("T,HQ,H,D", ((1, 2, 2, 16), (64, 2, 2, 64), (100, 4, 2, 32), (200, 2, 1, 64)))
def test_public_implementation(T, HQ, H, D):
    "flash-linear-attention's naive function, which shares no line with this suite: output and every gradient in float32. Where Triton can be had, its absence is a failure"
    pytest.importorskip("triton")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from fla.ops.path_attn.naive import naive_path_attn as naive
    x = inputs(2, T, HQ, H, D, dtype=torch.float32)
    want = gradients(lambda x: naive(*x, D**-.5), x)
    got = gradients(lambda x: call(x, scale_gate=True), x)
    assert relative(got[0], want[0]) <= FORWARD
    for name, a, b in zip(NAMES, got[1:], want[1:]): assert relative(a, b) <= GRADIENT or (a - b).abs().max() < 1e-6, (name, relative(a, b))

def test_torch_attention_without_transforms():
    q, k, v, *_ = inputs(2, 150, 4, 2, 8)
    want = F.scaled_dot_product_attention(*(y.transpose(1, 2) for y in (q, k, v)), is_causal=True, enable_gqa=True).transpose(1, 2)
    for w, beta in ((None, None), (torch.ones_like(k), torch.zeros_like(k[..., 0]))):
        torch.testing.assert_close(path_attention(q, k, v, w, beta), want, rtol=0, atol=1e-12)

# ---------------------------------------------------------------------------------------------------------------- gradients

@pytest.mark.parametrize("gate,transforms,HQ", ((True, True, 2), (False, True, 1), (True, False, 2)))
def test_gradients_at_every_length(blocks_of, gate, transforms, HQ):
    blocks_of(4)
    for T in range(1, 37):
        x = inputs(1 + T % 2, T, HQ, 1 + (HQ == 1 and T % 3 == 0) if HQ > 1 else 1, 3, V=2, gate=gate, transforms=transforms, seed=T)
        for a, b in zip(gradients(call, x), gradients(lambda x: call(x, backend="naive"), x)): torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-10)

def test_gradcheck(blocks_of):
    blocks_of(2)
    x = [y.requires_grad_() for y in inputs(1, 7, 2, 1, 2)]
    assert torch.autograd.gradcheck(lambda *x: call(x, scale_gate=True), x)

def test_gradients_of_some_inputs_only(blocks_of):
    blocks_of(4)
    x = inputs(1, 21, 2, 2, 3)
    whole = gradients(call, x)[1:]
    for i, name in enumerate(NAMES):
        y = [z.clone().requires_grad_(i == j) for j, z in enumerate(x)]
        o = call(y)
        do = torch.randn(o.shape, generator=torch.Generator().manual_seed(1), dtype=f64)
        torch.testing.assert_close(torch.autograd.grad(o, y[i], do)[0], whole[i], msg=name)

def test_second_derivatives_are_refused():
    x = [y.requires_grad_() for y in inputs(1, 5, 1, 1, 2)]
    with pytest.raises(RuntimeError, match="differentiable once"): torch.autograd.grad(call(x).sum(), x[0], create_graph=True)
    g, = torch.autograd.grad(call(x, backend="naive").square().sum(), x[0], create_graph=True)
    assert torch.autograd.grad(g.square().sum(), x[3])[0].norm() > 0

# ---------------------------------------------------------------------------------------------------------------- layouts

@pytest.mark.parametrize("D,V", ((1, 1), (3, 7), (33, 8), (80, 80), (256, 256)))
def test_head_dimensions(D, V):
    x = inputs(1, 130, 2, 1, D, V=V, dtype=torch.float32)
    want = call([y.double() for y in x], backend="naive")
    assert relative(call(x), want) <= FORWARD

def test_grouped_heads_read_their_group():
    x = inputs(1, 70, 6, 3, 4)
    whole = call(x)
    for h in range(6):
        one = [x[0][:, :, h:h+1], *(y[:, :, h//2:h//2 + 1] for y in x[1:5]), x[5][:, :, h:h+1]]
        torch.testing.assert_close(call(one), whole[:, :, h:h+1])

def test_permuted_heads_are_permuted_heads(blocks_of):
    blocks_of(8)
    x, order = inputs(2, 50, 3, 3, 4, dtype=torch.float32), [2, 0, 1]
    do = torch.randn(2, 50, 3, 4, generator=torch.Generator().manual_seed(0))
    def run(x, do):
        x = [y.clone().requires_grad_() for y in x]
        o = call(x)
        return [o, *torch.autograd.grad(o, x, do)]
    for name, a, b in zip(("o", *NAMES), run([y[:, :, order] for y in x], do[:, :, order]), run(x, do)):
        assert relative(a, b[:, :, order]) <= GRADIENT, name

def test_packed_sequences_are_separate():
    x = inputs(1, 200, 2, 1, 4)
    cu = torch.tensor([0, 1, 1, 70, 135, 200])
    def separate(x): return torch.cat([call([y[:, a:b] for y in x]) for a, b in zip(cu, cu[1:]) if b > a], 1)
    for a, b in zip(gradients(lambda x: call(x, cu_seqlens=cu), x), gradients(separate, x)): torch.testing.assert_close(a, b)

@pytest.mark.parametrize("cu", ([0, 5], [1, 6], [0, 4, 3, 6], [[0, 6]]))
def test_bad_cu_seqlens(cu):
    with pytest.raises(ValueError, match="cu_seqlens"): call(inputs(1, 6, 1, 1, 2), cu_seqlens=torch.tensor(cu))

def test_packing_needs_one_row():
    with pytest.raises(ValueError): call(inputs(2, 6, 1, 1, 2), cu_seqlens=torch.tensor([0, 6]))

def test_batches_are_rows(blocks_of):
    "Every way of cutting the work into slabs: many short rows, few long ones"
    for B, T, H, size in ((9, 5, 2, 64), (2, 37, 3, 2), (1, 300, 1, 2), (5, 64, 7, 16)):
        blocks_of(size)
        x = inputs(B, T, H, H, 4, dtype=torch.float32)
        whole = gradients(call, x)
        for b in range(B):
            alone = gradients(lambda y: call(y), [y[b:b+1] for y in x])[0]
            torch.testing.assert_close(whole[0][b:b+1], alone, rtol=1e-5, atol=1e-6)

def test_empty_sequences():
    assert call(inputs(2, 0, 4, 2, 3, V=5)).shape == (2, 0, 4, 5)
    x = [y.requires_grad_() for y in inputs(1, 0, 1, 1, 3)]
    assert call(x).shape == (1, 0, 1, 3)

# ---------------------------------------------------------------------------------------------------------------- robustness

def test_nothing_uninitialised_is_read(blocks_of):
    "torch fills new memory with NaN here; inputs lie between NaNs; nothing may change"
    blocks_of(8)
    x = inputs(2, 45, 4, 2, 4, dtype=torch.float32)
    def between(y):
        room = torch.full((y.shape[0], y.shape[1] + 7, *y.shape[2:]), torch.nan)
        room[:, 3:-4] = y
        return room[:, 3:-4]
    want = gradients(call, x)
    was = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.empty(3).isnan().all()
        got = gradients(lambda x: call([between(y) if not y.requires_grad else y for y in x]), x)
        inside = call([between(y) for y in x])
    finally: torch.use_deterministic_algorithms(was)
    for a, b in zip(got, want): assert torch.equal(a, b)
    assert torch.equal(inside, want[0])

def test_the_future_changes_nothing(blocks_of):
    blocks_of(8)
    x = inputs(1, 60, 2, 2, 4, dtype=torch.float32)
    y = inputs(1, 60, 2, 2, 4, dtype=torch.float32, seed=1)
    for t in (1, 7, 8, 31, 59):
        mixed = [torch.cat([a[:, :t], b[:, t:]], 1) for a, b in zip(x, y)]
        torch.testing.assert_close(call(mixed)[:, :t], call(x)[:, :t], rtol=1e-6, atol=1e-6)

def test_deterministic():
    x = inputs(2, 300, 2, 1, 16, dtype=torch.float32)
    for a, b in zip(gradients(call, x), gradients(call, x)): assert torch.equal(a, b)

@pytest.mark.parametrize("kind", ("cpu", "exact", "naive"))
def test_a_gpu_would_add_in_a_fixed_order(blocks_of, monkeypatch, kind):
    "Every operation of forward and backward but torch's own kernel for rectangles, which is told to split no sum; running sums are made as on a GPU"
    blocks_of(8)
    x, backend = inputs(2, 75, 4, 2, 5, V=3), "naive" if kind == "naive" else "torch"
    want = gradients(lambda x: call(x, backend=backend), x)
    if kind == "exact": monkeypatch.setattr(attention, "_stock", lambda q, v: (kind, 0))
    for module in (attention, transport): monkeypatch.setattr(module, "prefix_sum", blocks._doubled)
    with fixed_order(): got = gradients(lambda x: call(x, backend=backend), x)
    for a, b in zip(got, want): torch.testing.assert_close(a, b, rtol=0, atol=1e-12*max(1, b.abs().max()))

@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, f64))
@pytest.mark.parametrize("backend, T", (("torch", 3000), ("naive", 200)))
def test_the_same_bits_on_a_gpu(backend, T, dtype):
    x = [y.cuda() for y in inputs(2, T, 4, 2, 64, dtype=dtype)]
    first = gradients(lambda x: call(x, backend=backend), x)
    for _ in range(5):
        for a, b in zip(gradients(lambda x: call(x, backend=backend), x), first): assert torch.equal(a, b)

@pytest.mark.parametrize("closing", (-1e-6, -5., -300.))
def test_gates_from_open_to_closed(blocks_of, closing):
    blocks_of(8)
    x = inputs(1, 70, 2, 1, 4, dtype=torch.float32)
    x[5] = torch.where(torch.rand(x[5].shape, generator=torch.Generator().manual_seed(0)) < .2, closing, -.01)
    got, want = gradients(call, x), gradients(lambda x: call(x, backend="naive"), [y.double() for y in x])
    for name, a, b in zip(("o", *NAMES), got, want): assert torch.isfinite(a).all() and relative(a, b) < 1e-5, (name, relative(a, b))

def test_long_gates_do_not_lose_digits():
    "After 4,096 tokens the running sum is near -2,000; a float32 sum from the start would be off by 1e-4 in every logit"
    x = inputs(1, 4096, 1, 1, 4, dtype=torch.float32)
    x[5] = torch.full_like(x[5], -.5)
    late = call(x)[:, -64:]
    near = call([y[:, -256:] for y in x])[:, -64:]                      # what is further away weighs less than e^-90
    assert relative(late, near) < 1e-5

def test_half_precision():
    x = inputs(1, 260, 2, 1, 64)
    want = gradients(lambda x: call(x), x)
    for dtype, bound in ((torch.bfloat16, 2e-2), (torch.float16, 3e-3)):
        low = [y.to(dtype) if i < 3 else y.float() for i, y in enumerate(x)]
        got = gradients(lambda x: call(x), low)
        assert got[0].dtype == dtype and got[4].dtype == torch.float32
        for name, a, b in zip(("o", *NAMES), got, want): assert relative(a, b) < bound, (name, dtype, relative(a, b))

def test_autocast_changes_nothing():
    x = inputs(1, 70, 2, 1, 8, dtype=torch.float32)
    want = gradients(call, x)
    with torch.autocast("cpu", torch.bfloat16): got = gradients(call, x)
    for a, b in zip(got, want): assert torch.equal(a, b)

def test_memory_grows_as_t_log_t():
    "Bytes that the graph keeps: linear parts, and T D numbers a level for queries and keys each half"
    def kept(T, D=16):
        total, seen = 0, set()
        def count(y):
            nonlocal total
            key = y.untyped_storage().data_ptr()
            if key not in seen: seen.add(key); total += y.untyped_storage().nbytes()
            return y
        x = [y.requires_grad_() for y in inputs(1, T, 1, 1, D, gate=False, dtype=torch.float32)[:5]]
        with torch.autograd.graph.saved_tensors_hooks(count, lambda y: y): call([*x, None])
        return total
    small, large = kept(512), kept(4096)
    per_level = 4*16
    assert large/4096 - small/512 <= 1.1*per_level*(len(levels(64)) - len(levels(8)))
    assert large < 4096*4096                                           # and nowhere near the square

def test_exact_fallback(monkeypatch):
    "The plain form that stands in where no stock kernel takes the tensors, in slices of rows"
    x = inputs(1, 150, 2, 1, 4)
    want = gradients(call, x)
    monkeypatch.setattr(attention, "_stock", lambda q, v: ("exact", 0))
    monkeypatch.setattr(attention, "_slices", lambda q, k: (slice(a, a + 5) for a in range(0, q.shape[2], 5)))
    for a, b in zip(gradients(call, x), want): torch.testing.assert_close(a, b)

def test_the_gpu_kernels_calls(monkeypatch, blocks_of):
    """What a GPU is asked, bound to the names of torch's own schema and answered by plain products: layout (B, M, H, K), width a multiple of 8,
    rows of the log-sum-exp padded to a multiple of 32"""
    def bound(op, args, kw): return dict(zip((a.name for a in op.default._schema.arguments), args)) | kw
    def rows(lse): return F.pad(lse, (0, -lse.shape[-1] % 32), value=torch.nan)
    real, flip, calls = torch.ops.aten, lambda x: x.transpose(1, 2), []
    class Fake:
        hardshrink = real.hardshrink
        def _efficient_attention_forward(self, *args, **kw):
            a = bound(real._efficient_attention_forward, args, kw)
            assert a["compute_log_sumexp"] and a["scale"] == 1 and a["dropout_p"] == 0 and a["custom_mask_type"] == 0 and a["bias"] is None
            assert a["query"].shape[3] % 8 == 0
            o, lse = attention._exact(*(flip(a[n]) for n in ("query", "key", "value")))
            calls.append("forward")
            return flip(o), rows(lse), None, None, 0, 0
        def _efficient_attention_backward(self, *args, **kw):
            a = bound(real._efficient_attention_backward, args, kw)
            M, N = a["query"].shape[1], a["key"].shape[1]
            assert a["scale"] == 1 and a["dropout_p"] == 0 and a["custom_mask_type"] == 0 and a["bias_requires_grad"] is False and a["num_splits_key"] == 1
            assert (a["max_seqlen_q"], a["max_seqlen_k"]) == (M, N) and a["logsumexp"].shape[-1] % 32 == 0 and a["cu_seqlens_q"] is a["cu_seqlens_k"] is None
            grads = attention._exact_backward(*(flip(a[n]) for n in ("grad_out_", "query", "key", "value", "out")), a["logsumexp"][..., :M])
            calls.append("backward")
            return *map(flip, grads), None
    x = inputs(1, 150, 2, 1, 5)
    blocks_of(20)
    want = gradients(call, x)
    monkeypatch.setattr(attention, "_aten", Fake())
    monkeypatch.setattr(attention, "_stock", lambda q, v: ("cuda", -(-max(q.shape[-1], v.shape[-1])//8)*8))
    for a, b in zip(gradients(call, x), want): torch.testing.assert_close(a, b)
    assert calls.count("forward") == calls.count("backward") == len(levels(8))

@pytest.mark.parametrize("change,message", (
    (lambda x: x.__setitem__(1, x[1][:, :3]), "k must have the shape"), (lambda x: x.__setitem__(4, None), "together"),
    (lambda x: x.__setitem__(2, x[2].float()), "one floating-point type"), (lambda x: [x.__setitem__(i, x[i][:, :, :3]) for i in (0, 5)], "multiple"),
    (lambda x: x.__setitem__(5, x[5][..., :1]), "gate must have the shape")))
def test_errors(change, message):
    x = inputs(1, 4, 4, 2, 3)
    change(x)
    with pytest.raises(ValueError, match=message): call(x)

def test_errors_of_options():
    with pytest.raises(ValueError, match="backend"): call(inputs(1, 4, 1, 1, 3), backend="flash")
    with pytest.raises(ValueError, match="256"): call(inputs(1, 4, 1, 1, 257))
    with pytest.raises(ValueError, match="triton backend needs w"): call(inputs(1, 4, 1, 1, 4, transforms=False), backend="triton")

def test_backend_for_a_cpu(): assert backend_for(*inputs(1, 4, 1, 1, 4)) == "torch"

def test_import_needs_neither_triton_nor_an_oracle():
    code = "import sys, rlcr_suite.path_attention as p; print([m for m in ('fla', 'einops', 'rlcr_suite.kernels.path_attention') if m in sys.modules], p.path_attention.__name__)"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=600)
    assert out.returncode == 0 and out.stdout.split("\n")[0] == "[] path_attention", out.stderr

# ---------------------------------------------------------------------------------------------------------------- the UT transform

def test_wy_is_the_product_in_order():
    w, beta = inputs(1, 40, 1, 1, 6)[3][0, :, 0], inputs(1, 40, 1, 1, 6)[4][0, :, 0]
    P = torch.eye(6, dtype=f64)
    for a, b in zip(w, beta): P = (torch.eye(6) - b*torch.outer(a, a)) @ P
    torch.testing.assert_close(wy(w, beta).product, P, rtol=0, atol=1e-13)
    assert relative(wy(w, beta).T.mT, wy(w, beta).T) > .1
    with pytest.raises(ValueError): wy(w, beta[:-1])

# ---------------------------------------------------------------------------------------------------------------- the cache

def part(x, i): return [y if y is None else y[:, i] for y in x]

def decode(cache, x, splits=()):
    T, out, at = x[0].shape[1], [], 0
    for z in splits: out, at = [*out, cache.prefill(*part(x, slice(at, z)))], z
    return torch.cat([*out, *(cache.step(*part(x, slice(t, t + 1))) for t in range(at, T))], 1)

@pytest.mark.parametrize("gate,transforms", ((True, True), (False, True), (True, False), (False, False)))
@pytest.mark.parametrize("window", (0, 1, 3, 64))
def test_decoding_is_the_parallel_form(gate, transforms, window):
    x = inputs(2, 50, 4, 2, 3, V=2, gate=gate, transforms=transforms)
    want = call(x, scale=.9)
    for splits in ((), (1,), (29,), (13, 13, 40), (50,)):
        torch.testing.assert_close(decode(PathCache(window, scale=.9), x, splits), want, rtol=0, atol=1e-12)

def test_decoding_after_5000_tokens():
    "float32, every token decoded: relative to the largest output. No gate and nearly pure reflections: the first keys count as much as the last"
    x = inputs(1, 5000, 2, 1, 8, gate=False)
    x[4] = 1.9 + .05*x[4]
    x = [y if y is None else y.float() for y in x]
    got, want = decode(PathCache(), x), call(x)
    y = [z if z is None else z.clone() for z in x]
    y[2][:, :1000] = 0
    assert relative(call(y)[:, -100:], want[:, -100:]) > .1                # and what the first thousand hold is seen
    assert (got - want).abs().max() <= 1e-5*want.abs().max()

def test_bfloat16_decoding_does_not_drift():
    "The first 64 keys after 4,096 more tokens, beta in [1.9, 2]: at most 1%, where rewriting at every token is off by about 10%"
    g = torch.Generator().manual_seed(0)
    D, T = 64, 4096
    keys = torch.randn(1, 64, 1, D, generator=g).bfloat16()
    w, beta = F.normalize(torch.randn(1, T, 1, D, generator=g), dim=-1), 1.9 + .1*torch.rand(1, T, 1, generator=g)
    exact, total = cache_module._carried(torch.zeros(1, T, 1, D, dtype=f64), w.double(), beta.double(), keys=True)
    exact = keys[0, :, 0].double() @ total[0, 0].T
    error, still = {}, torch.zeros(1, 64, 1, D)
    for window in (0, 64):
        cache = PathCache(window)
        cache.prefill(keys, keys, keys, still, still[..., 0])
        for t in range(T): cache.step(keys[:, :1], keys[:, :1], keys[:, :1], w[:, t:t+1], beta[:, t:t+1])
        assert cache.state.k.dtype == torch.bfloat16
        # a query that is a basis vector reads one coordinate of every key, as carried on to now
        queries, parts, _ = cache_module._parts(cache.state, torch.eye(D)[None, None])
        seen = (queries[0][0, 0] @ parts[0][0, :64, 0].float().T).T
        error[window] = relative(seen, exact)
    assert error[64] <= .01 and .05 < error[0], error

def test_segments_double():
    x = inputs(1, 3*4 + 8*4 + 1, 1, 1, 2)
    cache = PathCache(4)
    cache.prefill(*part(x, slice(0, 12)))
    for t in range(12, 12 + 31): cache.step(*part(x, slice(t, t + 1)))
    assert cache_module._bounds(cache.state) == [0, 12, 28, 36, 40] and cache.state.products.shape[1] == 3
    cache.step(*part(x, slice(43, 44)))
    assert cache_module._bounds(cache.state) == [0, 12, 44]

def test_rows_of_unequal_prompts():
    "As `core.blocks.packed` joins them: buffers padded with zeros, `valid` says what is real"
    x = inputs(3, 40, 2, 1, 3)
    lengths, out = (5, 17, 11), []
    states = []
    for b, n in enumerate(lengths):
        cache = PathCache(4)
        cache.prefill(*part([y[b:b+1] for y in x], slice(0, n)))
        states.append(cache.state)
    def join(*leaves):
        size = [max(s) for s in zip(*(y.shape[1:] for y in leaves))]
        return torch.cat([F.pad(y, [p for n, m in zip(size[::-1], y.shape[:0:-1]) for p in (0, n - m)]) for y in leaves])
    cache = PathCache(4, state=type(states[0])(*map(join, *states)))
    rows = [[y[b, n:n + 20] for b, n in enumerate(lengths)] for y in x]
    more = [torch.stack(y) for y in rows]
    got = torch.cat([decode(cache, part(more, slice(0, 9))), cache.prefill(*part(more, slice(9, 14))), decode(cache, part(more, slice(14, 20)))], 1)
    for b, n in enumerate(lengths): torch.testing.assert_close(got[b:b+1], call([y[b:b+1, :n + 20] for y in x])[:, n:], rtol=0, atol=1e-12)
    assert cache.lengths.tolist() == [n + 20 for n in lengths]

def test_a_state_can_be_continued_twice():
    x, other = inputs(1, 60, 2, 1, 3), inputs(1, 60, 2, 1, 3, seed=5)
    for start in (7, 31, 32, 47):                                      # before, at and after merges
        cache = PathCache(4)
        cache.prefill(*part(x, slice(0, 3)))
        for t in range(3, start): cache.step(*part(x, slice(t, t + 1)))
        kept = cache.state
        decode(cache, part(other, slice(0, 13)))
        again = decode(PathCache(4, state=kept), part(x, slice(start, 60)))
        torch.testing.assert_close(again, call(x)[:, start:], rtol=0, atol=1e-12)

def test_selected_rows():
    x = inputs(3, 30, 2, 1, 3)
    cache = PathCache(4)
    decode(cache, part(x, slice(0, 20)))
    chosen = cache.select(torch.tensor([2, 0, 0, 1]))
    got = decode(chosen, [y[[2, 0, 0, 1], 20:] for y in x])
    torch.testing.assert_close(got, call(x)[[2, 0, 0, 1], 20:], rtol=0, atol=1e-12)

def test_cache_errors():
    x = inputs(1, 3, 2, 1, 3)
    with pytest.raises(ValueError, match="empty"): PathCache().lengths
    with pytest.raises(ValueError, match="window"): PathCache(-1)
    cache = PathCache()
    cache.prefill(*x)
    with pytest.raises(ValueError, match="one token"): cache.step(*x)
    with pytest.raises(ValueError, match="begun with a gate"): cache.step(*part(x[:5], slice(0, 1)))
    with pytest.raises(ValueError, match="cache holds"): cache.step(*part(inputs(2, 1, 2, 1, 3), slice(0, 1)))
    with pytest.raises(ValueError, match="backend must be one of auto, naive, torch, triton; got 'flash'"): PathCache(backend="flash")
    with pytest.raises(ValueError, match="256"): PathCache().step(*inputs(1, 1, 1, 1, 257))
    y = inputs(1, 1, 2, 1, 3)
    with pytest.raises(ValueError, match="one floating-point type"): PathCache().step(y[0].float(), *y[1:])

class OnGPU(torch.Tensor):
    "A tensor that says it is on a GPU"
    is_cuda = True

def test_what_decodes(monkeypatch):
    "`auto` asks the kernels only for a cache on a GPU, and does without them where Triton is not installed"
    x, asked = part(inputs(1, 1, 2, 1, 3), slice(0, 1)), []
    cache = PathCache()
    cache.step(*x)
    there = cache.state._replace(k=cache.state.k.as_subclass(OnGPU))
    class Kernels:
        @staticmethod
        def supports_decode(k, v):
            asked.append((k, v))
            return len(asked) == 1
    def missing(): raise ImportError("no triton")
    plain, by_kernel = cache_module._attend, cache_module._attend_by_kernel
    monkeypatch.setattr(cache_module, "_kernels", Kernels)
    found = [cache_module._attend_for(s, b) for s, b in ((cache.state, "auto"), (there, "auto"), (there, "auto"), (there, "torch"), (there, "naive"), (cache.state, "triton"))]
    assert found == [plain, by_kernel, plain, plain, plain, by_kernel] and len(asked) == 2
    monkeypatch.setattr(cache_module, "_kernels", missing)
    assert cache_module._attend_for(there, "auto") is plain
