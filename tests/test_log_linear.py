"log_linear: the operation against independent definitions, values and every gradient; states, packing, precision, faults."
import warnings
from functools import partial
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings, strategies as st
import rlcr_suite.log_linear.attention as attention
import rlcr_suite.log_linear.forms as forms
from fixed_order import fixed_order
from rlcr_suite.core import blocks
from rlcr_suite.log_linear import LogLinearState, backend_for, fenwick_level, level_mask, linear_attention, log_linear_attention, step
from rlcr_suite.log_linear.fenwick import bit_length, buckets, levels_of, lowest_set_bit
from rlcr_suite.log_linear.forms import chunkwise_attention, masked_attention, recurrent_attention, tree_attention

FORWARD, GRADIENT = 2e-6, 5e-6      # float32 against float64, norm of the error over the norm: some tens of roundings of 6e-8
EXACT = 1e-11                       # float64 sums in another order: at most some thousands of roundings of 1e-16 on numbers of order 10
BOTH = pytest.mark.parametrize("delta", [False, True], ids=["mamba2", "delta"])


def inputs(T, delta=False, B=1, G=2, H=2, K=8, V=6, L=None, dtype=torch.float64, seed=0, decay=.2):
    "(q, k, v, g, lam) and beta or None, as (B, T, heads, width)"
    rng = torch.Generator().manual_seed(seed)
    normal, uniform = (partial(f, generator=rng, dtype=torch.float64) for f in (torch.randn, torch.rand))
    q, k, v = normal(B, T, G, K), normal(B, T, G, K), normal(B, T, H, V)
    if delta: k = F.normalize(k, dim=-1)
    x = [q, k, v, -decay*uniform(B, T, H), uniform(B, T, H, L or levels_of(max(T, 1))), uniform(B, T, H) if delta else None]
    return [y if y is None else y.to(dtype) for y in x]

def run(x, **kw): return log_linear_attention(*x[:5], beta=x[5], **kw)
def rel(a, b): return ((a.double() - b.double()).norm() / b.double().norm().clamp(min=1e-30)).item()

def close(a, b, eps=EXACT):
    assert a.shape == b.shape and torch.isfinite(a).all()
    assert (a - b).abs().max() <= eps*max(1, b.abs().max()) if a.numel() else True

def with_gradients(f, x):
    "Output and the gradient of a fixed weighted sum of it for every input"
    x = [None if y is None else y.detach().clone().requires_grad_() for y in x]
    o = f(x)
    weight = torch.linspace(-7, 9, o.numel(), dtype=torch.float64).sin().to(o).view(o.shape)
    return [o.detach(), *torch.autograd.grad((o*weight).sum(), [y for y in x if y is not None])]

def by_hand(q, k, v, g, lam, beta):
    "One head by the sum over all keys; each key is carried on token by token"
    out = []
    for t in range(len(q)):
        o = torch.zeros_like(v[0])
        for s in range(t + 1):
            x = k[s] if beta is None else beta[s]*k[s]
            for r in range(s + 1, t + 1): x = g[r].exp()*(x if beta is None else x - beta[r]*(k[r] @ x)*k[r])
            o = o + lam[t, (t ^ s).bit_length()]*(q[t] @ x)*v[s]
        out.append(o)
    return torch.stack(out)

@pytest.fixture(scope="module")
def fla():
    "The public naive functions (fla-core), which import Triton and talk about it. They are pinned for the tests: where Triton can be had, their absence is a failure"
    pytest.importorskip("triton")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import fla.ops.log_linear_attn.naive as mamba, fla.ops.gated_delta_rule.naive as delta
    return mamba, delta


class TestFenwick:
    @given(st.integers(0, 2**50), st.data())
    def test_level(self, t, data):
        s = data.draw(st.integers(0, t))
        level = fenwick_level(t, s)
        assert level == next(l for l, a, b in buckets(t) if a <= s < b) == fenwick_level(torch.tensor(t), torch.tensor(s)).item()
        assert lowest_set_bit(torch.tensor(t)).item() == lowest_set_bit(t)

    @pytest.mark.parametrize("T", [1, 2, 3, 5, 8, 31, 64, 100])
    def test_mask_against_public_code(self, fla, T):
        "Entry by entry; their function makes one level at a time"
        lam = torch.rand(1, levels_of(T), T, dtype=torch.float64)
        mask = level_mask(T)
        for l in range(levels_of(T)): assert torch.equal(fla[0].construct_level_mask(l, lam)[0], mask[l]*lam[0, l, :, None])

    @pytest.mark.parametrize("t, s", [(3, 4), (-1, -1), (0, -1)])
    def test_refuses(self, t, s):
        for f in (lambda x: x, torch.tensor):
            with pytest.raises(ValueError, match="0 <= s <= t"): fenwick_level(f(t), f(s))
        with pytest.raises(ValueError, match="at least one"): levels_of(0)

    def test_bit_length_is_exact_at_every_power(self):
        x = torch.tensor([n for e in range(1, 53) for n in (2**e - 1, 2**e)] + [2**53 - 1])
        assert bit_length(x).tolist() == [n.bit_length() for n in x.tolist()]


class TestOracles:
    @BOTH
    @pytest.mark.parametrize("T", [1, 2, 3, 6, 13])
    def test_by_hand(self, T, delta):
        x = inputs(T, delta, G=1)
        for backend in ("naive", "torch"):
            o = run(x, backend=backend)
            for h in range(2): close(o[0, :, h], by_hand(*(None if y is None else y[0, :, 0 if i < 2 else h] for i, y in enumerate(x))))

    @pytest.mark.parametrize("T", [1, 2, 7, 64, 65, 100, 128, 193])
    @pytest.mark.parametrize("G, H", [(2, 2), (1, 3)])
    def test_public_log_linear_attention(self, fla, T, G, H):
        "float32 against the public definition in float64, which wants as many levels as it has"
        x = inputs(T, B=2, G=G, H=H, K=16, V=12, dtype=torch.float32)
        ours = with_gradients(run, x)
        want = with_gradients(lambda y: fla[0].naive_log_linear_attn(*y[:5]), [y if y is None else y.double() for y in x])
        for name, tol, a, b in zip(("o", *"qkvgλ"), (FORWARD, *[GRADIENT]*5), ours, want):
            if T == 1 and name == "g": assert a.abs().max() <= 1e-6 and b.abs().max() <= 1e-6      # exactly zero in theory: nothing precedes
            else: assert rel(a, b) <= tol, name

    @pytest.mark.parametrize("T", [1, 7, 64, 100, 193])
    def test_public_gated_delta_rule(self, fla, T):
        "Levels that all weigh 1 are Gated DeltaNet; the public recurrence computes in float32"
        x = inputs(T, True, B=2, K=16, V=12, dtype=torch.float32)
        x[4] = torch.ones_like(x[4])
        theirs = lambda y: fla[1].naive_recurrent_gated_delta_rule(*y[:3], y[5], y[3], scale=1.)[0] + 0*y[4].sum()
        linear = lambda y: linear_attention(*y[:4], beta=y[5]) + 0*y[4].sum()
        want = with_gradients(theirs, x)
        for f in (run, linear):
            for i, (a, b) in enumerate(zip(with_gradients(f, x), want)):
                if i == 5 or T == 1 and i == 4: continue                                            # the weights of the levels are not theirs
                assert rel(a, b) <= (FORWARD if i == 0 else GRADIENT), i


class TestForms:
    @BOTH
    def test_all_lengths(self, delta):
        "Four forms and the fast one in float64: values. (The pages do it at every length from 1 to 130)"
        x = inputs(130, delta, G=1, H=2, K=5, V=3)
        want, _ = recurrent_attention(*x)
        for T in (1, 2, 3, 4, 5, 31, 64, 65, 100, 127, 130):
            y = [z if z is None else z[:, :T] for z in x]
            close(masked_attention(*y)[0], want[:, :T])
            for C in (1, 4, 64): close(chunkwise_attention(*y, C=C), want[:, :T])
            for C in (1, 4, 64): close(tree_attention(*y, C=C)[0], want[:, :T])
            close(run(y), want[:, :T])

    @pytest.mark.parametrize("group", [2, 4, 16])
    @pytest.mark.parametrize("B", [1, 3])
    def test_every_schedule(self, monkeypatch, group, B):
        "Small groups and blocks: many groups, ragged ones, many rows; values and gradients"
        monkeypatch.setattr(attention, "GROUP", group)
        fast = lambda x: attention._scalar_tree(*x[:5], C=4)
        for T in (1, 3, 4, 9, 15, 16, 17, 24, 31, 33, 47, 64, 65, 70, 97, 128, 131):
            x = inputs(T, B=B, K=3, V=2, decay=.1)[:5]
            for a, b in zip(with_gradients(fast, x), with_gradients(lambda x: masked_attention(*x)[0], x)): close(a, b)

    @settings(max_examples=40, deadline=None)
    @given(st.booleans(), st.integers(1, 300), st.integers(1, 3), st.sampled_from([(1, 1), (1, 2), (2, 4)]), st.integers(1, 9), st.integers(1, 9), st.integers(0, 3))
    def test_any_shape(self, delta, T, B, heads, K, V, more):
        x = inputs(T, delta, B=B, G=heads[0], H=heads[1], K=K, V=V, L=levels_of(T) + more)
        for a, b in zip(with_gradients(run, x), with_gradients(partial(run, backend="naive"), x)): close(a, b)

    @BOTH
    def test_differences(self, delta):
        "gradcheck: every input, grouped heads, and the state continued from 5 tokens, in pieces of 1, 2 and 5"
        x = inputs(8, delta, G=1, H=2, K=2, V=2, L=5)
        S = torch.randn(1, 2, 5, 2, 2, dtype=torch.float64) * torch.tensor([1., 0, 0, 1, 0]).double()[:, None, None]       # token 4 = 100b found levels 0 and 3
        def f(S, *x):
            o, new = run([*x, *[None]*(6 - len(x))], initial_state=LogLinearState(S, torch.tensor([5])), return_state=True)
            return o, new.S
        assert torch.autograd.gradcheck(f, [y.requires_grad_() for y in (S, *x) if y is not None])

    def test_differences_of_the_fast_form(self, monkeypatch):
        "gradcheck over several groups of several blocks, the last one ragged"
        monkeypatch.setattr(attention, "GROUP", 2)
        x = [y.requires_grad_() for y in inputs(21, B=1, K=2, V=2)[:5]]
        assert torch.autograd.gradcheck(lambda *x: attention._scalar_tree(*x, C=4), x)

    def test_second_derivatives_are_refused(self):
        x = inputs(9)
        q = x[0].requires_grad_()
        d, = torch.autograd.grad(run([q, *x[1:]]).square().sum(), q, create_graph=True)
        with pytest.raises(RuntimeError, match="once_differentiable"): d.sum().backward()


class TestLayout:
    @BOTH
    def test_heads_in_another_order(self, delta):
        x, order = inputs(150, delta, B=2, G=4, H=4), torch.tensor([2, 0, 3, 1])
        moved = [y if y is None else y[:, :, order] for y in x]
        for i, (a, b) in enumerate(zip(with_gradients(lambda y: run(y), moved), with_gradients(lambda y: run([z if z is None else z[:, :, order] for z in y]), x))):
            close(a, b if i == 0 else b[:, :, order])
        close(run(moved), run(x)[:, :, order])

    @BOTH
    @pytest.mark.parametrize("T", [70, 1100])
    def test_strides(self, delta, T):
        "Heads first, widths not contiguous, expanded: the layout in memory does not matter, also of the incoming gradient"
        x = inputs(T, delta, B=2, dtype=torch.float32)
        want = with_gradients(run, x)
        strange = [y if y is None else y.transpose(1, 2).contiguous().transpose(1, 2) for y in x]
        strange[0], strange[2] = (F.pad(y[..., None], (1, 1))[..., 1] for y in (x[0], x[2]))
        assert strange[0].stride(-1) != 1
        for a, b in zip(with_gradients(run, strange), want): assert rel(a, b) <= 1e-6
        v = x[2].clone().requires_grad_()
        run([*x[:2], v, *x[3:]]).sum().backward()                     # an expanded gradient
        w = x[2].clone().requires_grad_()
        (run([*x[:2], w, *x[3:]])*torch.ones_like(w)).sum().backward()
        assert torch.equal(v.grad, w.grad)

    @BOTH
    def test_grouped_heads_are_repeated_heads(self, delta):
        x = inputs(90, delta, G=2, H=6)
        wide = [y.repeat_interleave(3, 2) for y in x[:2]] + x[2:]
        a, b = with_gradients(run, x), with_gradients(run, wide)
        for i, (p, q) in enumerate(zip(a, b)): close(p, q if i not in (1, 2) else q.unflatten(2, (2, 3)).sum(3))

    @BOTH
    def test_packed_rows_are_separate_rows(self, delta):
        "Values, gradients and states; an empty sequence, one token, equal lengths, one longer than a block"
        lengths = [5, 0, 130, 1, 64, 5]
        cu = F.pad(torch.tensor(lengths).cumsum(0), (1, 0))
        x = inputs(sum(lengths), delta, G=1, L=9)
        def alone(x): return torch.cat([run([y if y is None else y[:, a:b] for y in x]) for a, b in zip(cu, cu[1:])], 1)
        for backend in ("naive", "torch"):
            for a, b in zip(with_gradients(partial(run, cu_seqlens=cu, backend=backend), x), with_gradients(alone, x)): close(a, b)
            _, S = run(x, cu_seqlens=cu, return_state=True, backend=backend)
            assert S.t.tolist() == lengths
            for i, (a, b) in enumerate(zip(cu, cu[1:])): close(S.S[i:i + 1], run([y if y is None else y[:, a:b] for y in x], return_state=True)[1].S)
            more = inputs(12, delta, G=1, L=9, seed=1)
            o, S2 = run(more, cu_seqlens=torch.arange(0, 13, 2), initial_state=S, return_state=True, backend=backend)
            for i in range(6):
                one = LogLinearState(S.S[i:i + 1], S.t[i:i + 1])
                p, Si = run([y if y is None else y[:, 2*i:2*i + 2] for y in more], initial_state=one, return_state=True)
                close(o[:, 2*i:2*i + 2], p)
                close(S2.S[i:i + 1], Si.S)

    def test_one_long_row_and_many_short_ones(self):
        "Batch sizes at which the fast form changes its way of working"
        for B, T in ((1, 1025), (2, 1024), (2, 1025), (40, 65)):
            x = inputs(T, B=B, G=1, H=1, K=4, V=4)
            o = run(x)
            for i in (0, B - 1): close(o[i:i + 1], run([y if y is None else y[i:i + 1] for y in x], backend="naive"))

    @BOTH
    def test_no_tokens(self, delta):
        x = inputs(0, delta, B=2, L=3)
        o, S = run(x, return_state=True)
        assert o.shape == x[2].shape and S.t.tolist() == [0, 0] and not S.S.any()


class TestStates:
    @BOTH
    @pytest.mark.parametrize("backend", ["naive", "torch"])
    def test_continued_anywhere(self, delta, backend):
        x = inputs(150, delta, B=2, G=1)
        want, S = run(x, return_state=True, backend="naive")
        for t in (1, 2, 3, 31, 64, 65, 128, 149):
            a, b = ([y if y is None else y[:, s] for y in x] for s in (slice(t), slice(t, None)))
            o1, S1 = run(a, return_state=True, backend=backend)
            o2, S2 = run(b, initial_state=S1, return_state=True, backend=backend)
            close(torch.cat([o1, o2], 1), want)
            close(S2.S, S.S)
            assert S2.t.tolist() == [150, 150]

    @BOTH
    def test_gradients_through_the_state(self, delta):
        "Cut in three, the gradients of all inputs are those of the whole"
        def cut(x):
            o, S = [], None
            for s in (slice(0, 37), slice(37, 38), slice(38, 100)):
                y, S = run([z if z is None else z[:, s] for z in x], initial_state=S, return_state=True)
                o.append(y)
            return torch.cat(o, 1)
        x = inputs(100, delta, G=1)
        for a, b in zip(with_gradients(cut, x), with_gradients(run, x)): close(a, b)

    @BOTH
    def test_gradients_through_steps(self, delta):
        x = inputs(20, delta, B=2, G=1)
        for a, b in zip(with_gradients(lambda x: recurrent_attention(*x)[0], x), with_gradients(run, x)): close(a, b)

    @BOTH
    def test_rows_at_different_positions(self, delta):
        x = inputs(40, delta, B=3, L=8)
        seen = (7, 32, 7)
        S = [run([y if y is None else y[i:i + 1, :t] for y in x], return_state=True)[1] for i, t in enumerate(seen)]
        S = LogLinearState(*(torch.cat(y) for y in zip(*S)))
        y = [z if z is None else torch.stack([z[i, t:t + 6] for i, t in enumerate(seen)]) for z in x]
        o, new = run(y, initial_state=S, return_state=True)
        s, (p, stepped) = S, (None, S)
        for t in range(6): p, stepped = step(stepped, *(z[:, t] for z in y[:5]), beta=None if y[5] is None else y[5][:, t])
        close(new.S, stepped.S)
        close(o[:, -1], p)
        for i, t in enumerate(seen): close(o[i], run([z if z is None else z[i:i + 1, :t + 6] for z in x])[0, t:])
        close(run(y, initial_state=S), o)

    def test_a_state_is_never_changed(self):
        x = inputs(20)
        _, S = run(x, return_state=True)
        before = S.S.clone()
        a, b = (step(LogLinearState(S.S, S.t), *(y[:, 0] for y in inputs(1, L=6)[:5])) if i < 2 else None for i in range(2))
        run(inputs(12, L=6), initial_state=LogLinearState(S.S, S.t))
        assert torch.equal(S.S, before) and torch.equal(a[0], b[0])

    @BOTH
    def test_decoding_5000_steps_equals_prefill(self, delta):
        "float32, almost no decay, so that the oldest level counts as much as the newest: the outputs after thousands of steps, and every level of the state"
        T = 5000
        x = inputs(T, delta, G=1, H=2, K=8, V=8, dtype=torch.float32, decay=1e-5)
        if delta: x[5] = .05*x[5]                                     # else the delta rule itself would forget
        want, S = run(x, return_state=True)
        state, late = None, []
        with torch.no_grad():
            for t in range(T):
                o, state = step(state, *(y[:, t] for y in x[:5]), beta=None if x[5] is None else x[5][:, t])
                if t >= T - 100: late.append(o)
        assert rel(torch.stack(late, 1), want[:, -100:]) <= 1e-5
        held = [l for l, *_ in buckets(T - 1)]
        for l in held: assert rel(state.S[:, :, l], S.S[:, :, l]) <= 1e-5, l
        assert state.S[:, :, held[-1]].norm() > .1*state.S[:, :, 1].norm()
        assert [l for l in range(14) if state.S[:, :, l].any()] == [l for l, *_ in buckets(T - 1)]


class TestPrecision:
    @BOTH
    def test_float32_at_length(self, delta):
        "Ragged, several groups: the error does not grow with the length"
        x = inputs(3000, delta, G=1, K=16, V=16, decay=.1)
        want = with_gradients(run, x)
        for i, (a, b) in enumerate(zip(with_gradients(run, [y if y is None else y.float() for y in x]), want)):
            assert rel(a, b) <= (FORWARD if i == 0 else GRADIENT), i

    @BOTH
    def test_strong_decay(self, delta):
        "exp(-2000) within a block: nothing overflows, and what survives is right"
        x = inputs(200, delta, dtype=torch.float32)
        x[3] = x[3]*0 - torch.where(torch.arange(200) % 3 == 0, 90., .01)[None, :, None]
        want = with_gradients(partial(run, backend="naive"), [y if y is None else y.double() for y in x])
        for a, b in zip(with_gradients(run, x), want):
            assert torch.isfinite(a).all()
            assert rel(a, b) <= GRADIENT

    @BOTH
    def test_half_precision(self, delta):
        "bfloat16 in and out, float32 between: the error is that of rounding the inputs once and the output once, 2^-9 each"
        x = inputs(700, delta, B=2, G=1, K=16, V=16)
        half = [y if y is None else y.bfloat16() if i in (0, 1, 2) else y.float() for i, y in enumerate(x)]
        if delta: half[1] = F.normalize(x[1].bfloat16().float(), dim=-1).bfloat16()
        want = run([y if y is None else y.double() for y in half])
        o, S = run(half, return_state=True)
        assert o.dtype == torch.bfloat16 and S.S.dtype == torch.float32
        assert rel(o, want) <= 2**-8
        one, _ = step(None, *(y[:, 0] for y in half[:5]), beta=None if half[5] is None else half[5][:, 0])
        assert one.dtype == torch.bfloat16

    @BOTH
    def test_the_same_bits_at_every_run(self, delta):
        x = inputs(1100, delta, B=2, G=1, dtype=torch.float32)
        for a, b in zip(with_gradients(run, x), with_gradients(run, x)): assert torch.equal(a, b)

    @BOTH
    @pytest.mark.parametrize("backend", ["torch", "naive"])
    def test_a_gpu_would_add_in_a_fixed_order(self, delta, backend, monkeypatch):
        "Every operation of forward and backward, continued from a state and not, with running sums as a GPU makes them"
        x, start = inputs(1100 if backend == "torch" else 96, delta, B=2, G=1), 64
        _, S = run(inputs(start, delta, B=2, G=1, L=x[4].shape[-1]), return_state=True)
        def whole(y):
            o, end = run(y, return_state=True, backend=backend)
            more, _ = run([None if z is None else z[:, :start] for z in y], initial_state=LogLinearState(end.S, S.t), return_state=True, backend=backend)
            return torch.cat([o, more], 1)
        want = with_gradients(whole, x)
        for module in (attention, forms): monkeypatch.setattr(module, "prefix_sum", blocks._doubled)
        with fixed_order(): got = with_gradients(whole, x)
        for a, b in zip(got, want): close(a, b)

    @pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
    @BOTH
    @pytest.mark.parametrize("backend, T", [("torch", 5000), ("naive", 500)])
    def test_the_same_bits_on_a_gpu(self, delta, backend, T):
        x = [None if y is None else y.cuda() for y in inputs(T, delta, B=2, G=2, H=4, K=64, V=64, dtype=torch.float32)]
        first = with_gradients(lambda y: run(y, backend=backend), x)
        for _ in range(5):
            for a, b in zip(with_gradients(lambda y: run(y, backend=backend), x), first): assert torch.equal(a, b)

    @BOTH
    @pytest.mark.parametrize("T", [1, 63, 200, 2100])
    def test_nothing_reads_what_was_not_written(self, delta, T):
        "torch fills all new memory with NaN here, whoever asks for it"
        x = inputs(T, delta, B=2, G=1, dtype=torch.float32)
        want = with_gradients(lambda y: run(y, return_state=True)[0], x)
        was = torch.are_deterministic_algorithms_enabled()
        torch.use_deterministic_algorithms(True)
        try:
            assert inputs(1)[0].new_empty(2).isnan().all() and torch.empty_like(x[0]).isnan().all()
            got = with_gradients(lambda y: run(y, return_state=True)[0], x)
        finally: torch.use_deterministic_algorithms(was)
        for a, b in zip(got, want): assert torch.equal(a, b)

    @pytest.mark.parametrize("K, V", [(16, 16), (32, 16)])
    def test_memory_of_the_delta_form(self, K, V):
        """Its plain operations keep O(T log T) numbers: at each level, for every token, its query once more (K); and for the half of them whose block is right-hand
        there, that query again (K/2), what is read and what it adds (V), and a few scalars"""
        def kept(T):
            x, found = [y.requires_grad_() for y in inputs(T, True, G=1, H=1, K=K, V=V, L=12, dtype=torch.float32)], {}
            def keep(y):
                found[y.untyped_storage().data_ptr()] = y.untyped_storage().nbytes()//4, y     # held, so that no address is used twice
                return y
            with torch.autograd.graph.saved_tensors_hooks(keep, lambda y: y): run(x)
            return sum(n for n, _ in found.values())
        a_level = (kept(2048) - 3*kept(1024) + 2*kept(512))/1024 # a constant and what is linear in T drop out; T log2(T) becomes 1024
        assert .75*(1.5*K + V) <= a_level <= 1.5*K + V + 4

    def test_memory_is_linear(self):
        "What the backward pass keeps besides the inputs: one K x V state a block of 64, and a few for groups"
        def kept(T):
            x, found = [y.requires_grad_() for y in inputs(T, G=1, H=1, K=16, V=16, dtype=torch.float32)[:5]], {}
            with torch.autograd.graph.saved_tensors_hooks(lambda y: found.setdefault(y.data_ptr(), y), lambda y: y): run([*x, None])
            return sum(y.numel() for p, y in found.items() if p not in {z.data_ptr() for z in x})
        assert kept(2048) <= 2048/64*256*1.15 and kept(16384) <= 16384/64*256*1.15


class TestFaults:
    @BOTH
    @pytest.mark.parametrize("backend", ["naive", "torch", "auto"])
    def test_more_tokens_than_levels(self, delta, backend):
        x = inputs(65, delta, L=7)
        with pytest.raises(ValueError, match="7 levels hold 64 tokens, but the sequence has 65: lam needs 8 levels"): run(x, backend=backend)
        _, S = run([y if y is None else y[:, :64] for y in x], return_state=True, backend=backend)
        last = [y if y is None else y[:, 64:] for y in x]
        with pytest.raises(ValueError, match="has 65"): run(last, initial_state=S, backend=backend)
        with pytest.raises(ValueError, match="has 65"): step(S, *(y[:, 0] for y in last[:5]), beta=None if last[5] is None else last[5][:, 0])
        with pytest.raises(ValueError, match="2 levels hold 2 tokens"): run(inputs(7, delta, L=2), cu_seqlens=torch.tensor([0, 2, 5, 7]), backend=backend)

    @BOTH
    def test_too_few_levels_are_an_error_on_any_device(self, delta):
        "The length is known to the host, so that no assertion of the device is needed; the meta device stands for a GPU"
        x = [y if y is None else y.to("meta") for y in inputs(65, delta, L=7)]
        with pytest.raises(ValueError, match="7 levels hold 64 tokens, but the sequence has 65"): run(x, backend="torch")

    @BOTH
    def test_what_is_not_alike(self, delta):
        "Types and devices; of the step too, and of the linear form"
        x = inputs(8, delta, L=5)
        def one(x): return step(None, *(y[:, 0] for y in x[:5]), beta=None if x[5] is None else x[5][:, 0])
        def linear(x): return linear_attention(*x[:4], beta=x[5])
        for change, said in (((0, torch.float32), "one floating-point type; got torch.float32, torch.float64 and torch.float64"), ((3, torch.long), "g must have a floating-point type"),
                             ((2, "meta"), "must be on one device; got q on cpu, k on cpu, v on meta")):
            y = list(x)
            y[change[0]] = y[change[0]].to(change[1])
            for f in (run, one, linear):
                with pytest.raises(ValueError, match=said): f(y)
        _, S = run(x, return_state=True)
        with pytest.raises(ValueError, match="initial_state on meta"): run(x, initial_state=LogLinearState(S.S.to("meta"), S.t))

    def test_no_heads(self):
        for G, H in ((0, 2), (1, 0)):
            with pytest.raises(ValueError, match=f"G = {G}, H = {H}"): run(inputs(4, G=G, H=H))
        with pytest.raises(ValueError, match="multiple of the 0 heads"): step(None, *(y[:, 0] for y in inputs(4, G=0)[:5]))

    @pytest.mark.parametrize("change, said", [
        (dict(q=(1, 8, 2, 4)), "k must have the shape"), (dict(v=(1, 7, 2, 6)), "v must have the shape"), (dict(v=(1, 8, 3, 6)), "multiple of the 2 heads"),
        (dict(g=(1, 8, 1)), "g must have the shape"), (dict(lam=(1, 8, 2)), "lam must have the shape"), (dict(beta=(1, 8, 2, 1)), "beta must have the shape"),
        (dict(backend="cuda"), "backend must be"), (dict(cu_seqlens=[0, 3]), "end with T"), (dict(cu_seqlens=[0, 5, 3, 8]), "never fall"),
        (dict(S=(2, 2, 4, 8, 6)), "initial_state must have"), (dict(lam=(1, 8, 2, 0)), "at least 1"), (dict(backend="triton"), "need a GPU")])
    def test_what_does_not_fit(self, change, said):
        shapes = dict(q=(1, 8, 2, 8), k=(1, 8, 2, 8), v=(1, 8, 2, 6), g=(1, 8, 2), lam=(1, 8, 2, 4))
        kw = {n: torch.zeros(change.get(n, s)) for n, s in shapes.items()}
        if "v" in change and change["v"][2] == 3: kw |= dict(g=torch.zeros(1, 8, 3), lam=torch.zeros(1, 8, 3, 4))
        if "beta" in change: kw["beta"] = torch.zeros(change["beta"])
        if "S" in change: kw["initial_state"] = LogLinearState(torch.zeros(change["S"]), torch.zeros(2, dtype=torch.long))
        if "cu_seqlens" in change: kw["cu_seqlens"] = torch.tensor(change["cu_seqlens"])
        if "backend" in change: kw["backend"] = change["backend"]
        with pytest.raises(ValueError, match=said): log_linear_attention(**kw)

    def test_packing_needs_one_row(self):
        with pytest.raises(ValueError, match="B must be 1, got 2"): run(inputs(8, B=2), cu_seqlens=torch.tensor([0, 8]))

    def test_auto_on_a_cpu(self):
        x = inputs(4)
        assert backend_for(*x[:3]) == "torch" and torch.equal(run(x), run(x, backend="torch"))

    @BOTH
    def test_scale(self, delta):
        x = inputs(70, delta)
        for backend in ("naive", "torch"): close(run(x, scale=.3, backend=backend), .3*run(x))
        close(step(None, *(y[:, 0] for y in x[:5]), beta=None if x[5] is None else x[5][:, 0], scale=.3)[0], .3*run(x)[:, 0])


class TestLinear:
    @BOTH
    def test_is_log_linear_attention_without_levels(self, delta):
        for T in (1, 63, 64, 200):
            x = inputs(T, delta, B=2, G=1)
            x[4] = torch.ones_like(x[4])
            o, S = linear_attention(*x[:4], beta=x[5], return_state=True)
            want, levels = run(x, return_state=True)
            close(o, want)
            close(S, levels.S.sum(2))

    @BOTH
    def test_continued_and_packed(self, delta):
        x = inputs(90, delta, G=1)
        x = [*x[:4], x[5]]
        f = lambda x, **kw: linear_attention(*x[:4], beta=x[4], **kw)
        part = lambda a, b: [y if y is None else y[:, a:b] for y in x]
        o1, S = f(part(0, 33), return_state=True)
        o2, S = f(part(33, 90), initial_state=S, return_state=True)
        want, end = f(x, return_state=True)
        close(torch.cat([o1, o2], 1), want)
        close(S, end)
        cu = torch.tensor([0, 33, 33, 90])
        o, S = f(x, cu_seqlens=cu, return_state=True)
        for i, (a, b) in enumerate(zip(cu, cu[1:])):
            if b > a: close(o[:, a:b], f(part(a, b)))
            close(S[i:i + 1], f(part(a, b), return_state=True)[1])
        with pytest.raises(ValueError, match="initial_state must have 1 rows"): f(x, initial_state=torch.zeros(2, *S.shape[1:]))
