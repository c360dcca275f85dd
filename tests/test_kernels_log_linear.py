"""The Triton kernels of log-linear attention, interpreted, against the equation (what the compiler makes of them: test_kernels_log_linear_code.py).

Triton decides on import whether it interprets. The checks of values therefore run in one process of their own that interprets from
the start. Where a GPU is present, the last tests run the same comparisons on it."""
import itertools, multiprocessing, os
from concurrent.futures import ProcessPoolExecutor
import pytest
import torch
import torch.nn.functional as F

# float32 rounding: sums over at most 300 tokens and 130 channels, each rounded once on the way in and once on the way out
FORWARD, BACKWARD = 2e-6, 5e-6
# bfloat16 keeps 8 bits, and the interpreter truncates: 0.4% at every one of the some five roundings between an input and a gradient
BF16 = 2e-2
NAMES = ("q", "k", "v", "g", "lam", "beta")

@pytest.fixture(scope="module")
def interpreted():
    "Run a function of this file in a process where kernels are interpreted"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "1")
        with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
            assert pool.submit(os.getenv, "TRITON_INTERPRET").result() == "1" # and the process has started with it
            patch.delenv("TRITON_INTERPRET")
            yield lambda check, *args, **kw: pool.submit(check, *args, **kw).result(timeout=600)

# ---------------------------------------------------------------------------------------------------------------- the equation

def inputs(B, T, G, H, K, V, L, delta, seed=0, dtype=torch.float32, device="cpu"):
    "Random inputs: keys of length one, decays of up to 10% a token, betas in (0, 2)"
    rng = torch.Generator().manual_seed(seed)
    normal, uniform = (lambda *s: torch.randn(*s, generator=rng)), (lambda *s: torch.rand(*s, generator=rng))
    k = F.normalize(normal(B, T, G, K), dim=-1)
    out = [normal(B, T, G, K), k, normal(B, T, H, V)]
    out = [x.to(dtype) for x in out] + [-.1*uniform(B, T, H), uniform(B, T, H, L) + .1]
    return [x.to(device) for x in out + ([2*uniform(B, T, H)] if delta else [])]

def equation(q, k, v, g, lam, beta=None):
    "The masked form in float64, token by token: no chunks, no trees, no triangular inverse"
    B, T, H = v.shape[:3]
    q, k, v, g, lam = (x.double() for x in (q, k, v, g, lam))
    q, k = (x.repeat_interleave(H//x.shape[2], 2) for x in (q, k))
    out = []
    for t in range(T):
        see = q[:, t] # what the query has become on its way from t back to s
        total, log = torch.zeros_like(v[:, t]), torch.zeros_like(g[:, t])
        for s in range(t, -1, -1):
            weight = lam[:, t, :, (t ^ s).bit_length()]*log.exp()*(see*k[:, s]).sum(-1)
            if beta is not None:
                weight = weight*beta[:, s].double()
                see = see - beta[:, s, :, None].double()*(see*k[:, s]).sum(-1, keepdim=True)*k[:, s]
            total = total + weight[..., None]*v[:, s]
            log = log + g[:, s]
        out.append(total)
    return torch.stack(out, 1)

def masked(q, k, v, g, lam, beta=None):
    "The masked form in float64: `equation` for longer sequences"
    B, T, H = v.shape[:3]
    q, k, v, g, lam = (x.double().transpose(1, 2) for x in (q, k, v, g, lam))
    q, k = (x.repeat_interleave(H//x.shape[1], 1) for x in (q, k))
    t = torch.arange(T, device=v.device)
    level = sum(((t[:, None] ^ t) >= 1 << b).long() for b in range(20))
    A, c = (q @ k.mT).tril(), g.cumsum(-1)
    if beta is not None:
        b = beta.double().transpose(1, 2)
        N = (k @ k.mT).tril(-1)*b[..., None]
        A = torch.linalg.solve_triangular((torch.eye(T, device=v.device, dtype=A.dtype) + N).mT, A.mT, upper=True).mT*b[..., None, :]
    A = A*(c[..., :, None] - c[..., None, :]).tril().exp()*lam.gather(-1, level.clamp(max=lam.shape[-1] - 1).expand(B, H, T, T))
    return (A.tril() @ v).transpose(1, 2)

def relative(a, b):
    "Norm of the difference over the norm"
    return ((a.double() - b.double()).norm()/b.double().norm().clamp(min=1e-30)).item()

def gradients(f, args, do):
    "Value and gradients of all arguments"
    args = [x.detach().requires_grad_() for x in args]
    o = f(*args)
    return o.detach(), torch.autograd.grad(o, args, do.to(o.dtype), materialize_grads=True)

def compare(args, f, forward, backward, reference=equation, seed=7):
    "The kernel `f` beside the equation: value and every gradient"
    do = torch.randn(args[2].shape, generator=torch.Generator().manual_seed(seed)).to(args[2])
    o, grads = gradients(f, args, do)
    want, wants = gradients(reference, args, do)
    errors = dict(o=relative(o, want)) | {name: relative(a, b) for name, a, b in zip(NAMES, grads, wants)}
    assert all(x.isfinite().all() for x in (o, *grads))
    assert errors.pop("o") <= forward and max(errors.values()) <= backward, (relative(o, want), errors)
    return o, grads

def kernel(**options):
    from rlcr_suite.kernels.log_linear import log_linear_attention
    return lambda *args: log_linear_attention(*args[:5], beta=args[5] if len(args) > 5 else None, **options)

def test_the_two_references_agree():
    for delta in (False, True):
        args = inputs(2, 40, 1, 2, 16, 8, 7, delta)
        assert relative(masked(*args), equation(*args)) <= 1e-12

# ------------------------------------------------------------------------------------------------- interpreted, against the equation

def check_equation(T, G, H, K, V, delta, chunk, B=1, **options):
    args = inputs(B, T, G, H, K, V, max(T - 1, 0).bit_length() + 1, delta, seed=T)
    compare(args, kernel(chunk=chunk, **options), FORWARD, BACKWARD, equation if T <= 40 else masked)

@pytest.mark.parametrize("delta", [False, True], ids=["scalar", "delta"])
@pytest.mark.parametrize("T", [1, 17, 90])
def test_equals_the_equation_at_odd_lengths(interpreted, T, delta):
    "One token, one chunk, a ragged last chunk, and a tree whose top pair is ragged; exactly as many levels as T needs"
    interpreted(check_equation, T, 1, 1, 16, 16, delta, 16)

@pytest.mark.parametrize("G,H,K,V,delta", [(2, 4, 24, 40, False), (1, 3, 5, 1, True), (1, 1, 80, 70, True)])
def test_grouped_heads_and_any_width(interpreted, G, H, K, V, delta):
    "Heads that share keys; widths that are no power of two, narrower and wider than one tile"
    interpreted(check_equation, 21, G, H, K, V, delta, 16)

@pytest.mark.parametrize("delta", [False, True], ids=["scalar", "delta"])
def test_the_chunk_that_is_shipped(interpreted, delta): interpreted(check_equation, 70, 1, 1, 16, 16, delta, 64)

def check_many_segments():
    "More chunks behind a node than one program sums"
    from rlcr_suite.kernels import log_linear as module
    plan = module.schedule((16*41,), 16, torch.device("cpu"))
    tops = plan.splits[-1][0]
    assert tops[5] - tops[4] == 2 and plan.segments.shape[0] > len(plan.splits[-2])
    module.SEGMENT = 1
    module.schedule.cache_clear()
    try: check_equation(16*4 - 3, 1, 1, 16, 16, True, 16), check_equation(16*4 - 3, 1, 1, 16, 16, False, 16)
    finally:
        module.SEGMENT = 8
        module.schedule.cache_clear()

def test_parts_of_a_nodes_gradient(interpreted): interpreted(check_many_segments)

def check_scale():
    args = inputs(1, 20, 1, 1, 16, 16, 6, True)
    compare(args, kernel(chunk=16, scale=.25), FORWARD, BACKWARD, lambda *a: .25*equation(*a))

def test_scale(interpreted): interpreted(check_scale)

def check_unused_levels():
    "More levels than T needs: their weights are never read (NaN) and get exactly zero as gradient"
    args = inputs(1, 37, 1, 1, 16, 16, 9, False)
    args[4][..., 7:] = float("nan")
    o, grads = gradients(kernel(chunk=16), args, torch.ones_like(args[2]))
    assert o.isfinite().all() and all(x.isfinite().all() for x in grads) and (grads[4][..., 7:] == 0).all()
    assert relative(o, equation(*args)) <= FORWARD

def test_levels_that_are_not_reached(interpreted): interpreted(check_unused_levels)

# --------------------------------------------------------------------------------------------------------------- public oracles

def check_fla(T):
    "The public naive functions: log-linear attention, and the gated delta rule, which is the delta form with all weights one"
    import warnings
    warnings.filterwarnings("ignore")
    from fla.ops.gated_delta_rule.naive import naive_recurrent_gated_delta_rule
    from fla.ops.log_linear_attn.naive import naive_log_linear_attn
    args = inputs(1, T, 1, 2, 16, 16, 8, False)
    compare(args, kernel(chunk=16), FORWARD, BACKWARD, naive_log_linear_attn)
    q, k, v, g, lam, beta = inputs(1, T, 2, 2, 16, 16, 8, True)
    ones = torch.ones_like(lam)
    flat = lambda q, k, v, g, beta: naive_recurrent_gated_delta_rule(q, k, v, beta, g, scale=1.)[0]
    compare([q, k, v, g, beta], lambda q, k, v, g, beta: kernel(chunk=16)(q, k, v, g, ones, beta), FORWARD, BACKWARD, flat)

def test_equals_public_naive_functions(interpreted):
    interpreted(check_fla, 20)

# -------------------------------------------------------------------------------------------------------------- packed sequences

def check_packed(lengths, delta):
    "One row of several sequences against each by itself: bit for bit, since no sum crosses a border"
    T, ends = sum(lengths), torch.tensor([0, *itertools.accumulate(lengths)])
    args = inputs(1, T, 1, 2, 16, 16, 7, delta)
    do = torch.randn(args[2].shape, generator=torch.Generator().manual_seed(1))
    o, grads = gradients(kernel(chunk=16, cu_seqlens=ends), args, do)
    for a, b in itertools.pairwise(ends.tolist()):
        if a == b: continue
        one, ones = gradients(kernel(chunk=16), [x[:, a:b] for x in args], do[:, a:b])
        assert torch.equal(o[:, a:b], one) and all(torch.equal(x[:, a:b], y) for x, y in zip(grads, ones))

@pytest.mark.parametrize("delta", [False, True], ids=["scalar", "delta"])
@pytest.mark.parametrize("lengths", [(0, 1, 33, 0, 16)], ids=str)
def test_packed_sequences_equal_separate_ones(interpreted, lengths, delta): interpreted(check_packed, lengths, delta)

# ------------------------------------------------------------------------------------------------- what is not theirs is not touched

def check_poison(delta):
    "NaN in all memory that kernels are given to fill, and on both sides of every input: not one bit of a result changes"
    from rlcr_suite.kernels import log_linear as module
    args = inputs(1, 37, 1, 1, 24, 40, 7, delta)
    do = torch.randn(args[2].shape, generator=torch.Generator().manual_seed(1))
    clean = gradients(kernel(chunk=16), args, do)
    def guarded(x):
        store = torch.full((x.numel() + 4096,), float("nan"))
        store[2048:-2048] = x.flatten()
        return store[2048:-2048].view(x.shape)
    empty, like = torch.empty, torch.empty_like
    poison = lambda x: x.fill_(float("nan")) if x.is_floating_point() else x
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module.torch, "empty", lambda *a, **kw: poison(empty(*a, **kw)))
        patch.setattr(module.torch, "empty_like", lambda *a, **kw: poison(like(*a, **kw)))
        dirty = gradients(kernel(chunk=16), [guarded(x) for x in args], guarded(do))
    assert all(torch.equal(a, b) for a, b in zip((clean[0], *clean[1]), (dirty[0], *dirty[1])))
    assert all(x.isfinite().all() for x in (clean[0], *clean[1]))

@pytest.mark.parametrize("delta", [False, True], ids=["scalar", "delta"])
def test_poisoned_memory(interpreted, delta): interpreted(check_poison, delta)

def check_order(delta):
    "Heads in another order give the same numbers in that order, and a second run the same bits"
    args, perm = inputs(1, 18, 2, 2, 16, 16, 6, delta), torch.tensor([1, 0])
    do = torch.randn(args[2].shape, generator=torch.Generator().manual_seed(1))
    first, second = (gradients(kernel(chunk=16), args, do) for _ in range(2))
    moved = gradients(kernel(chunk=16), [x[:, :, perm] for x in args], do[:, :, perm])
    for a, b, c in zip(*((x[0], *x[1]) for x in (first, second, moved))): assert torch.equal(a, b) and torch.equal(a[:, :, perm], c)

@pytest.mark.parametrize("delta", [False, True], ids=["scalar", "delta"])
def test_deterministic_and_blind_to_the_order_of_heads(interpreted, delta): interpreted(check_order, delta)

def check_views(delta):
    "Inputs that are not contiguous, and types of gate and weights other than float32"
    args = inputs(1, 20, 1, 2, 16, 16, 6, delta)
    strided = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in args]
    assert torch.equal(kernel(chunk=16)(*args), kernel(chunk=16)(*strided))
    halves = [*args[:3], *(x.bfloat16() for x in args[3:])]
    _, grads = gradients(kernel(chunk=16), halves, torch.ones_like(args[2]))
    assert [x.dtype for x in grads] == [x.dtype for x in halves]
    assert torch.equal(kernel(chunk=16)(*halves), kernel(chunk=16)(*(x.float() for x in halves)))

@pytest.mark.parametrize("delta", [False, True], ids=["scalar", "delta"])
def test_strides_and_types(interpreted, delta): interpreted(check_views, delta)

# ---------------------------------------------------------------------------------------------------------------- hard numbers

def check_decays():
    "No decay at all, and decays that leave nothing: exp(-80) a token is 0 in float32 after two"
    for rate in (0., 80.):
        for delta in (False, True):
            args = inputs(1, 33, 1, 1, 16, 16, 7, delta)
            args[3] = torch.full_like(args[3], -rate)
            o, grads = gradients(kernel(chunk=16), args, torch.ones_like(args[2]))
            want, wants = gradients(equation, args, torch.ones_like(args[2]))
            assert relative(o, want) <= FORWARD and all(x.isfinite().all() for x in grads)
            assert max(relative(a, b) for name, a, b in zip(NAMES, grads, wants) if name != "g") <= BACKWARD
            # with exp(-80), dg is a sum of terms of 1e-35 beside rounding of terms of 1
            if rate == 0: assert relative(grads[3], wants[3]) <= BACKWARD

def test_no_decay_and_total_decay(interpreted): interpreted(check_decays)

def check_same_keys():
    """Equal keys and beta = 1: I + N is all ones below the diagonal. Its inverse is small, but N^32 is of 10^17, so that an inverse by
    powers of N is lost in float32; by blocks it is exact. Each token erases what came before, so the decays have no gradient at all."""
    args = inputs(1, 64, 1, 1, 16, 16, 7, True)
    args[1], args[5] = args[1][:, :1].expand(-1, 64, -1, -1), torch.ones_like(args[5])
    do = torch.randn(args[2].shape, generator=torch.Generator().manual_seed(7))
    (o, grads), (want, wants) = gradients(kernel(chunk=64), args, do), gradients(masked, args, do)
    assert relative(o, want) <= FORWARD and max(grads[3].abs().max(), wants[3].abs().max()) < 1e-5 # keys are of length one to 1e-7
    assert max(relative(a, b) for name, a, b in zip(NAMES, grads, wants) if name != "g") <= BACKWARD
    N = torch.ones(64, 64).tril(-1)
    powers, P = torch.eye(64) - N, N
    for _ in range(5): P = P @ P; powers = powers + powers @ P
    assert relative(powers, torch.linalg.inv(torch.eye(64, dtype=torch.float64) + N)) > 1 # the short way fails here

def test_keys_that_repeat(interpreted): interpreted(check_same_keys)

def check_bf16(delta):
    args = inputs(1, 40, 1, 1, 32, 32, 7, delta, dtype=torch.bfloat16)
    if delta: args[5] = args[5]/2
    o, grads = compare(args, kernel(chunk=16), BF16, BF16)
    assert o.dtype == grads[0].dtype == torch.bfloat16 and grads[3].dtype == torch.float32

@pytest.mark.parametrize("delta", [False, True], ids=["scalar", "delta"])
def test_bfloat16(interpreted, delta): interpreted(check_bf16, delta)

# -------------------------------------------------------------------------------------------------------------------- decoding

def check_decode(delta, T=40, chunk=16):
    "Token by token, several at once, from a state after any number of tokens, rows at different positions: the equation each time"
    from rlcr_suite.kernels.log_linear import log_linear_attention, log_linear_step
    call = lambda f, args, **kw: f(*args[:5], beta=args[5] if delta else None, **kw)
    step = lambda state, args, **kw: log_linear_step(state, *args[:5], beta=args[5] if delta else None, **kw)
    part = lambda args, a, b: [x[:, a:b] for x in args]
    args = inputs(2, T, 1, 1, 12, 20, 8, delta)
    want, state, out = masked(*args), None, []
    for t in range(T):
        o, state = step(state, part(args, t, t + 1), inplace=t % 2 == 1)
        out.append(o)
        used = (state[0] != 0).flatten(3).any(-1)[0, 0] # level 0, and the set bits of t
        assert used.sum() == t.bit_count() + 1 and (t == 0 or used.nonzero()[-1] == t.bit_length())
    assert relative(torch.cat(out, 1), want) <= FORWARD and state[1].tolist() == [T, T]
    for first in (1, 33):
        o, mid = call(log_linear_attention, part(args, 0, first), chunk=chunk, return_state=True)
        after, end = step(mid, part(args, first, T))
        assert relative(torch.cat([o, after], 1), want) <= FORWARD and relative(end[0], state[0]) <= FORWARD
    # a batch whose rows stand at 5 and at 34
    rows = [call(log_linear_attention, part([x[i:i + 1] for x in args], 0, n), chunk=chunk, return_state=True)[1] for i, n in ((0, 5), (1, 34))]
    state = tuple(torch.cat(x) for x in zip(*rows))
    nxt = [torch.cat([x[:1, 5:6], x[1:, 34:35]]) for x in args]
    o, state = step(state, nxt)
    assert relative(o, torch.cat([want[:1, 5:6], want[1:, 34:35]])) <= FORWARD and state[1].tolist() == [6, 35]

@pytest.mark.parametrize("delta", [False, True], ids=["scalar", "delta"])
def test_decoding_equals_prefill(interpreted, delta): interpreted(check_decode, delta)

def check_packed_state(delta):
    "States of packed sequences, one row a sequence, empty ones included"
    from rlcr_suite.kernels.log_linear import log_linear_attention
    lengths = (33, 0, 17)
    args, ends = inputs(1, sum(lengths), 1, 2, 16, 16, 7, delta), [0, *itertools.accumulate(lengths)]
    beta = args[5] if delta else None
    _, (S, n) = log_linear_attention(*args[:5], beta, cu_seqlens=torch.tensor(ends), return_state=True, chunk=16)
    assert n.tolist() == list(lengths) and (S[1] == 0).all()
    for i, (a, b) in enumerate(itertools.pairwise(ends)):
        if a < b:
            one = log_linear_attention(*(x[:, a:b] for x in args[:5]), beta[:, a:b] if delta else None, return_state=True, chunk=16)[1][0]
            assert torch.equal(S[i:i + 1], one)

@pytest.mark.parametrize("delta", [False, True], ids=["scalar", "delta"])
def test_states_of_packed_sequences(interpreted, delta): interpreted(check_packed_state, delta)

def check_outgrown():
    "Past its levels a row gives NaN, the other rows and memory are left alone; a state is changed only where asked"
    from rlcr_suite.kernels.log_linear import log_linear_step
    args = inputs(2, 6, 1, 1, 16, 16, 3, False) # three levels: four tokens
    store = torch.full((3, 1, 3, 16, 16), float("nan")) # the third row stands behind the state
    store[:2] = 0
    S, time = store[:2], torch.tensor([0, 2])
    for t in range(4):
        o, (S, time) = log_linear_step((S, time), *(x[:, t:t + 1] for x in args), inplace=True)
        assert o[0].isfinite().all() and o[1].isfinite().all() == (t < 2) # row 1 began at 2
    assert store[2].isnan().all()
    o, (S, time) = log_linear_step((S, time), *(x[:, 4:5] for x in args), inplace=True)
    assert o.isnan().all() and store[2].isnan().all()
    _, state = log_linear_step(None, *(x[:, :1] for x in args))
    before = state[0].clone()
    log_linear_step(state, *(x[:, 1:2] for x in args))
    assert torch.equal(before, state[0])

def test_decoding_past_the_levels(interpreted): interpreted(check_outgrown)

# ---------------------------------------------------------------------------------------------------------------------- refusals

def check_refusals():
    from rlcr_suite.kernels.log_linear import log_linear_attention, log_linear_step, supports
    args = inputs(1, 20, 2, 4, 16, 16, 6, True)
    assert supports(*args[:3])
    def refused(words, f=log_linear_attention, *, change=(), **options):
        new = list(args)
        for i, x in dict(change).items(): new[i] = x
        with pytest.raises(ValueError, match=words): f(*new, **options)
    refused("6 levels.*|5 levels reach 16 tokens", change={4: args[4][..., :5]})
    refused("multiple", change={0: args[0][:, :, :1].expand(-1, -1, 3, -1), 1: args[1][:, :, :1].expand(-1, -1, 3, -1)})
    refused(r"g must have the shape \(B, T, H\), B = 1, T = 20, H = 4", change={3: args[3][:, :19]})
    refused("lam must have the shape", change={4: args[4][..., 0]})
    refused("k must have the shape", change={0: args[0][..., :8]})
    refused("one type", change={0: args[0].bfloat16()})
    refused("float16", change={i: args[i].half() for i in range(3)})
    refused("at most 256", change={i: torch.zeros(1, 20, 2, 257) for i in range(2)})
    refused("16, 32 or 64", chunk=24)
    refused("cu_seqlens needs B = 1", change={i: torch.cat([x, x]) for i, x in enumerate(args)}, cu_seqlens=torch.tensor([0, 20]))
    for ends in ([0, 19], [1, 20], [0, 12, 8, 20], []): refused("cu_seqlens must", cu_seqlens=torch.tensor(ends, dtype=torch.int64))
    refused("cu_seqlens must be integers", cu_seqlens=torch.tensor([0., 20.]))
    state = (torch.zeros(1, 4, 6, 16, 16), torch.zeros(1, dtype=torch.int64))
    step = lambda *a, **kw: log_linear_step(kw.pop("state"), *a)
    refused("state must be float32", step, state=(state[0].double(), state[1]))
    refused("tokens seen", step, state=(state[0], torch.zeros(2, dtype=torch.int64)))
    assert log_linear_attention(*(x[:, :0] for x in args)).shape == (1, 0, 4, 16)

def test_refusals_say_why(interpreted): interpreted(check_refusals)

def test_a_cpu_without_the_interpreter_is_refused():
    "In this process kernels are compiled, and there is nothing to run them on"
    if torch.cuda.is_available() or os.getenv("TRITON_INTERPRET"): pytest.skip("kernels run here")
    from rlcr_suite.kernels.log_linear import supports, why_not
    args = inputs(1, 4, 1, 1, 16, 16, 3, False)[:3]
    assert not supports(*args) and "GPU" in why_not(*args)

# ------------------------------------------------------------------------------------------------------------ the public operation

def check_public(delta):
    """`rlcr_suite.log_linear` on its Triton backend: scale, packed rows, a state returned and continued, single steps; and what the delta form refuses.
    Against its torch backend, values and gradients"""
    from functools import partial
    from rlcr_suite.log_linear import LogLinearState, log_linear_attention, step
    args = inputs(1, 24, 1, 2, 16, 16, 6, delta)
    call = lambda *x, **kw: log_linear_attention(*x[:5], beta=x[5] if delta else None, **kw)
    part = lambda a, b: [x[:, a:b] for x in args]
    packed = dict(scale=.3, cu_seqlens=torch.tensor([0, 15, 15, 24]))
    compare(args, partial(call, backend="triton", **packed), FORWARD, BACKWARD, partial(call, backend="torch", **packed))
    def cut(*x, backend): # continued where the tree has to be cut in several pieces
        y, S = call(*(z[:, :13] for z in x), return_state=True, backend=backend)
        return torch.cat([y, call(*(z[:, 13:] for z in x), initial_state=S, backend=backend)], 1)
    if delta:
        with pytest.raises(ValueError, match="state without gradients"): call(*(x.requires_grad_() for x in part(0, 13)), return_state=True, backend="triton")
        with torch.no_grad(), pytest.raises(ValueError, match="cannot continue a state"): cut(*args, backend="triton")
    else: compare(args, partial(cut, backend="triton"), FORWARD, BACKWARD, partial(cut, backend="torch"))
    with torch.no_grad():
        (o, S), (want, S2) = (call(*part(0, 13), return_state=True, backend=b, scale=.3) for b in ("triton", "torch"))
        _, P = call(*args, return_state=True, backend="triton", cu_seqlens=packed["cu_seqlens"])
    assert relative(o, want) <= FORWARD and relative(S.S, S2.S) <= FORWARD and S.t.tolist() == [13] and P.t.tolist() == [15, 0, 9]
    # a step by the kernel, as on a GPU
    from rlcr_suite.kernels.log_linear import log_linear_step
    one = lambda: step(LogLinearState(*S), *(x[:, 13] for x in args[:5]), beta=args[5][:, 13] if delta else None, scale=.3)
    want, T = one()
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(step.__globals__, "_step_kernel", lambda *x: log_linear_step)
        o, new = one()
    assert not torch.equal(o, want) and relative(o, want) <= FORWARD and relative(new.S, T.S) <= FORWARD and new.t.tolist() == [14]

@pytest.mark.parametrize("delta", [False, True], ids=["scalar", "delta"])
def test_the_public_operation(interpreted, delta): interpreted(check_public, delta)

# --------------------------------------------------------------------------------------------------------------------- with a GPU

gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

@gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("delta", [False, True], ids=["scalar", "delta"])
@pytest.mark.parametrize("T,K,V", [(1, 64, 64), (777, 64, 128), (1500, 128, 128), (300, 256, 256)])
def test_on_a_gpu(T, K, V, delta, dtype):
    "float32 products run as three tf32 ones, which keep about 21 bits"
    args = inputs(2, T, 2, 4, K, V, 12, delta, dtype=dtype, device="cuda")
    if delta and dtype == torch.bfloat16: args[5] = args[5]/2
    compare(args, kernel(), *((2e-5, 5e-5) if dtype == torch.float32 else (BF16, BF16)), reference=masked)

@gpu
@pytest.mark.parametrize("delta", [False, True], ids=["scalar", "delta"])
def test_decoding_on_a_gpu(delta):
    from rlcr_suite.kernels.log_linear import log_linear_attention, log_linear_step
    args = inputs(2, 400, 2, 4, 128, 128, 10, delta, device="cuda")
    beta = args[5] if delta else None
    want = masked(*args)
    _, state = log_linear_attention(*(x[:, :137] for x in args[:5]), beta[:, :137] if delta else None, return_state=True)
    o, _ = log_linear_step(state, *(x[:, 137:] for x in args[:5]), beta[:, 137:] if delta else None)
    assert relative(o, want[:, 137:]) <= 2e-5
