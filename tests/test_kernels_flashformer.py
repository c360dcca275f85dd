"""The persistent decoder, on the CPU: against an independent decoder in float64, and against itself in every way that a launch can be cut, ordered and scheduled.

Triton decides on import whether it interprets, so the cases run in a process of their own, `python tests/test_kernels_flashformer.py`, interpreted there. Every buffer
is born full of NaN. What an interpreter cannot show, how a GPU orders memory, is read from the machine code in test_kernels_flashformer_code.py."""
import json, math, os, subprocess, sys, time
from functools import partial
import pytest
import torch

PROMPT = [5, 17, 8, 3, 12]

# ------------------------------------------------------------------------------------------------- in a process of its own

def shape(**changes):
    from rlcr_suite.kernels.flashformer import Shape
    return Shape(**dict(layers=2, hidden=32, heads=4, kv_heads=2, head_dim=16, ffn=48, vocab=61, max_len=48) | changes)

def draw(s, dtype='float32', seed=0):
    "Random weights"
    from rlcr_suite.kernels.flashformer import Weights
    r, dtype = torch.Generator().manual_seed(seed), getattr(torch, dtype)
    matrix = lambda *n: (torch.randn(*n, generator=r)*n[-1]**-.5).to(dtype)
    gain = lambda *n: 1 + .2*torch.randn(*n, generator=r)
    L, D, A, NQ = s.layers, s.hidden, s.heads*s.head_dim, (s.heads + 2*s.kv_heads)*s.head_dim
    angle = torch.arange(s.max_len)[:, None]*10000.**(-torch.arange(0, s.head_dim, 2)/s.head_dim)
    return Weights(emb=torch.randn(s.vocab, D, generator=r).to(dtype), wqkv=matrix(L, NQ, D), bqkv=.3*gain(L, NQ) if s.qkv_bias else None,
                   qn=gain(L, s.head_dim) if s.qk_norm else None, kn=gain(L, s.head_dim) if s.qk_norm else None, wo=matrix(L, D, A), wgu=matrix(L, 2*s.ffn, D),
                   wd=matrix(L, D, s.ffn), n1=gain(L, D), n2=gain(L, D), nf=gain(D), head=matrix(s.vocab, D), cos=angle.cos(), sin=angle.sin())

def true(s, w, tokens):
    "The definition, in float64, over the whole sequence without a cache: residual stream, rotated keys of each layer, logits"
    import torch
    from torch.nn.functional import silu
    w = w._replace(**{name: x.double() for name, x in w._asdict().items() if x is not None})
    n, H, K, E, kept = len(tokens), s.heads, s.kv_heads, s.head_dim, []
    norm = lambda x, gain: x*torch.rsqrt((x*x).mean(-1, keepdim=True) + s.eps)*gain
    turn = lambda x: x*w.cos[:n, None].repeat(1, 1, 2) + torch.cat([-x[..., E//2:], x[..., :E//2]], -1)*w.sin[:n, None].repeat(1, 1, 2)
    x = w.emb[torch.tensor(tokens)]
    for l in range(s.layers):
        q, k, v = (norm(x, w.n1[l]) @ w.wqkv[l].T + (w.bqkv[l] if s.qkv_bias else 0)).view(n, -1, E).split([H, K, K], 1)
        if s.qk_norm: q, k = norm(q, w.qn[l]), norm(k, w.kn[l])
        q, k = turn(q), turn(k)
        kept.append(k.transpose(0, 1))
        logits = torch.einsum('qhd,khd->hqk', q, k.repeat_interleave(H//K, 1))*(s.scale or E**-.5)
        weight = logits.masked_fill(torch.ones(n, n).triu(1).bool(), -math.inf).softmax(-1)
        x = x + torch.einsum('hqk,khd->qhd', weight, v.repeat_interleave(H//K, 1)).reshape(n, -1) @ w.wo[l].T
        gate, up = (norm(x, w.n2[l]) @ w.wgu[l].T).chunk(2, -1)
        x = x + (silu(gate)*up) @ w.wd[l].T
    return x, torch.stack(kept), norm(x, w.nf) @ w.head.T

def greedy(s, w, tokens, n):
    tokens = list(tokens)
    for _ in range(n): tokens.append(int(true(s, w, tokens)[2][-1].argmax()))
    return tokens

def buffers(s, programs=4, splits=4, dtype=None):
    "Full of NaN, but for the barrier"
    from rlcr_suite.kernels.flashformer import allocate
    made = allocate(s, programs=programs, splits=splits, dtype=dtype or torch.float32)
    for x in made[:-1]: x.fill_(math.nan if x.is_floating_point() else -1)
    return made

def row_of(s, tokens):
    "The tokens' own tensor"
    import torch
    return torch.tensor(list(tokens) + [-1]*(s.max_len + 1 - len(tokens)), dtype=torch.int32)

def read(s, w, b, tokens, programs=1):
    "A prompt, but for its last token, 16 rows at once"
    from rlcr_suite.kernels.flashformer import decode
    t = row_of(s, tokens)
    for first in range(0, len(tokens) - 1, 16): decode(s, w, b, t, first, rows=min(16, len(tokens) - 1 - first), head=False, programs=programs, backend='staged')
    return t

def rel(a, b):
    return ((a.double() - b.double()).norm()/b.double().norm()).item()

def family(**changes):
    "Prompt at once, then token by token through every barrier by a single program: tokens, and relative errors of the stream and of the cache"
    from rlcr_suite.kernels.flashformer import decode
    s = shape(**changes)
    w, b = draw(s), buffers(s)
    want = greedy(s, w, PROMPT, 2)
    t = read(s, w, b, PROMPT, programs=3)
    decode(s, w, b, t, 4, 2, backend='persistent')
    x, keys, _ = true(s, w, want[:-1])
    return dict(tokens=t[:7].tolist(), want=want, stream=rel(b.h[0], x[-1]), keys=rel(b.keys[:, :, :6], keys), untouched=bool(b.keys[:, :, 6:].isnan().all()))

def precision(dtype):
    "Weights and cache of 16 bits: one row, and five at once, against float64"
    from rlcr_suite.kernels.flashformer import decode
    s = shape(layers=1)
    w, x = draw(s, dtype), {}
    for name in ('one', 'rows'):
        b = buffers(s, dtype=getattr(torch, dtype))
        if name == 'one': decode(s, w, b, read(s, w, b, PROMPT), 4)
        else: picked = decode(s, w, b, row_of(s, PROMPT), 0, rows=5)
        x[name] = b.h[0 if name == 'one' else 4]
    exact, _, logits = true(s, w, PROMPT)
    return dict(one=rel(x['one'], exact[-1]), rows=rel(x['rows'], exact[-1]), same=rel(x['one'], x['rows']), picked=picked.tolist(), want=logits.argmax(-1).tolist())

def state(b, t, places, rows=1):
    "Everything that outlasts a launch, as one tensor. What lies before the last place that was fed has been written: no NaN is there, nor in the stream"
    import torch
    assert not any(x.isnan().any() for x in (b.h[:rows], b.keys[:, :, :places], b.values[:, :, :places])) and (t[:places] >= 0).all()
    assert all(x[:, :, places:].isnan().all() for x in (b.keys, b.values))
    return torch.cat([x.flatten().nan_to_num(7.) for x in (b.h[:rows], b.keys, b.values, t.float())])

def filled(s, dtype=None, splits=4, places=40, seed=3):
    "Buffers with a cache of noise, and a text that may have made it"
    import torch
    b, r = buffers(s, splits=splits, dtype=dtype), torch.Generator().manual_seed(seed)
    for x in (b.keys, b.values): x[:, :, :places] = torch.randn(x[:, :, :places].shape, generator=r).to(x.dtype)
    return b, row_of(s, torch.randint(0, s.vocab, (places + 3,), generator=r).tolist())

FORMS = dict(bias=dict(qkv_bias=True, heads=6), norms=dict(qk_norm=True, sample=True), bf16=dict(dtype='bfloat16'), int8=dict(kind='int8'), int4=dict(kind='int4-g128'),
             rows=dict(rows=3), rows_int4=dict(rows=3, kind='int4-g128'), rows_sampled=dict(rows=3, qk_norm=True, sample=True))

def model_of(layers=1, dtype='float32', kind=None, **changes):
    "A shape, its weights and the type of its cache"
    import torch
    s = shape(layers=layers, **(dict(hidden=128, heads=8, head_dim=16, ffn=128) if kind else {}) | changes)
    w = draw(s, dtype)
    if kind: w = w._replace(**{n: quantise(getattr(w, n), 'int8' if n == 'head' else kind, i)[0] for i, n in enumerate(('wqkv', 'wo', 'wgu', 'wd', 'head'))})
    return s, w, getattr(torch, dtype)

def cut(layers=1, places=0, rows=1, sample=False, dtype='float32', kind=None, changes=(), wrong=False, **how):
    "Two tokens behind a short prompt or a cache of many places, or some rows at once, run in some way; what is left"
    from rlcr_suite.kernels.flashformer import Sampler, decode
    s, w, cache = model_of(layers, dtype, kind, **dict(changes))
    if places: b, t = filled(s, cache, places=places)
    else: b = buffers(s, dtype=cache); t = read(s, w, b, PROMPT[:3])
    pos, n = places or 2, 1 if rows > 1 else 2
    how = dict(backend='persistent', sampler=Sampler(.7, 3) if sample else None) | how
    if 'ranges' in how:
        ends = how.pop('ranges')
        for span in zip(ends, ends[1:]): decode(s, w, b, t, pos, n, rows=rows, stages=span, **how)
    elif how.pop('singly', False):
        for at in range(pos, pos + n): decode(s, w, b, t, at, **how)
    else: decode(s, w, b, t, pos, n, rows=rows, **how)
    if rows > 1: t[pos + rows:pos + 2*rows] = b.picked[:rows]
    return torch.cat([x.flatten().nan_to_num(7.) for x in (b.h[:1], b.keys, b.values, t.float())]) if wrong else state(b, t, pos + n*rows, rows)

def launches():
    "Whether every way to cut two tokens into launches leaves the same bits, behind two places and behind forty, which are cut into three"
    import torch
    ways = dict(singly=dict(singly=True), stages=dict(backend='staged', programs=3), reverse=dict(backend='staged', programs=3, reverse=True),
                ranges=dict(ranges=(0, 2, 5, 6, 13), programs=1))
    return dict(same={f'{name} {places}': torch.equal(whole, cut(places=places, **how)) for places in (0, 40) for whole in [cut(places=places)] for name, how in ways.items()})

def together():
    "Several programs at once, by several schedules: whether the bits are those of one program, and who met whom; then without waiting. Two layers, and every form of one"
    import torch
    from coop import Trace, cooperative
    from rlcr_suite.kernels import flashformer
    whole, found = cut(2), dict(same=[], races=[], barriers=[], forms={})
    def run(seed, want, **form):
        trace = Trace()
        with cooperative(seed, share=.02, trace=trace): same = torch.equal(want, cut(**form))
        return same, len(trace.races()), max(epoch for (_, epoch), _ in trace.writes)
    for seed in range(3):
        for kept, x in zip((found['same'], found['races'], found['barriers']), run(seed, whole, layers=2, programs=2 + seed % 3)): kept.append(x)
    for i, (name, form) in enumerate(FORMS.items()):
        form = {k: v for k, v in form.items() if k in ('rows', 'sample', 'dtype', 'kind')} | dict(places=40, changes={k: v for k, v in form.items() if k not in ('rows', 'sample', 'dtype', 'kind')})
        found['forms'][name] = run(4 + i, cut(**form), programs=3, **form)[:2]
    kept, flashformer.grid_wait = flashformer.grid_wait, _go_on()
    try:
        with cooperative(0): found['without'] = torch.equal(whole, cut(2, programs=3, wrong=True))
    finally: flashformer.grid_wait = kept
    return found

def _go_on():
    "In place of `grid_wait`: no wait"
    import triton
    @triton.jit
    def go_on(barrier, token): pass
    return go_on

def quantise(m, kind, seed):
    "A matrix of this size in few bits, packed here by the layout's definition, and the numbers it stands for"
    from rlcr_suite.kernels.flashformer import Quantised
    bits, r = {'int8': 8, 'int4-g128': 4}[kind], torch.Generator().manual_seed(seed)
    high, parts = 2**(bits - 1) - 1, 32//bits
    q = torch.randint(-high, high + 1, m.shape, generator=r)
    size = m.shape[:-1] if bits == 8 else (*m.shape[:-1], m.shape[-1]//128)
    scales = ((.5 + torch.rand(size, generator=r))*m.shape[-1]**-.5/high*1.7).to(torch.float32 if bits == 8 else torch.float16)
    u = (q + high + 1).view(*m.shape[:-1], -1, parts, 128//parts)                # block, part, word
    packed = sum(u[..., i, :] << bits*i for i in range(parts)).flatten(-2)
    packed = torch.where(packed >= 2**31, packed - 2**32, packed).to(torch.int32)
    wide = scales.double()[..., None] if bits == 8 else scales.double().repeat_interleave(128, -1)
    return Quantised(packed, scales, kind), q*wide

def quantised(kind):
    "A decoder of few bits against its own weights made wide: one row and three at once"
    from rlcr_suite.kernels.flashformer import decode
    s = shape(layers=1, hidden=128, heads=8, head_dim=16, ffn=128)
    w = draw(s)
    names = ('wqkv', 'wo', 'wgu', 'wd', 'head')
    narrow = {name: quantise(getattr(w, name), 'int8' if name == 'head' else kind, i) for i, name in enumerate(names)}
    packed, wide = w._replace(**{n: x[0] for n, x in narrow.items()}), w._replace(**{n: x[1] for n, x in narrow.items()})
    x, _, logits = true(s, wide, PROMPT)
    b, c = buffers(s), buffers(s)
    one = decode(s, packed, b, row_of(s, PROMPT), 0, backend='persistent')
    rows = decode(s, packed, c, row_of(s, PROMPT), 0, rows=5)
    return dict(one=rel(b.h[0], x[0]), rows=rel(c.h[:5], x), picked=one.tolist() + rows.tolist(), want=logits.argmax(-1)[[0, 0, 1, 2, 3, 4]].tolist())

def splits():
    "A cache long enough to be cut: the last of 41 tokens, in one row and as the last of some"
    from rlcr_suite.kernels.flashformer import decode
    s = shape(layers=1)
    tokens = torch.randint(0, s.vocab, (41,), generator=torch.Generator().manual_seed(1)).tolist()
    w, b = draw(s), buffers(s)
    t = read(s, w, b, tokens, programs=3)
    x, _, logits = true(s, w, tokens)
    used = lambda: int(b.high[0, 0].isfinite().sum())
    one = decode(s, w, b, t, 40, programs=3)
    found = dict(one=rel(b.h[0], x[-1]), splits=used(), picked=one.tolist(), want=[int(logits[-1].argmax())])
    return found | dict(again=decode(s, w, b, t, 38, rows=3, programs=2).tolist()[-1:], rows=rel(b.h[:3], x[-3:]))

def large():
    "float16 weights and a stream whose numbers, times the norm's gain, float16 does not hold: rows at once, as a single one"
    from rlcr_suite.kernels.flashformer import decode
    s = shape(layers=1)
    w = draw(s, 'float16')
    for x in (w.n1, w.n2, w.nf): x.mul_(100.)
    w.emb.mul_(2000.); w.wqkv.div_(100.); w.wgu.div_(100.); w.head.div_(100.)
    b, c = buffers(s, dtype=torch.float16), buffers(s, dtype=torch.float16)
    rows = decode(s, w, b, row_of(s, PROMPT), 0, rows=5)
    one = [int(decode(s, w, c, row_of(s, PROMPT), i)[0]) for i in range(5)]
    x, _, logits = true(s, w, PROMPT)
    return dict(largest=float((w.emb[PROMPT].float()*w.n1).abs().max()), rows=rel(b.h[:5], x), one=rel(c.h[0], x[-1]), picked=rows.tolist(), single=one, want=logits.argmax(-1).tolist())

def readers():
    "How many programs of four read the cache of one key head for two rows of two queries: one, since sixteen queries go at once"
    from coop import Trace, cooperative
    from rlcr_suite.kernels.flashformer import decode
    s = shape(layers=1, heads=2, kv_heads=1)
    w, (b, t), trace = draw(s), filled(s, places=8), Trace()
    with cooperative(0, trace=trace): decode(s, w, b, t, 8, rows=2, stages=(1, 2), programs=4)
    low, high = b.keys.data_ptr(), b.keys.data_ptr() + b.keys.numel()*4
    return dict(programs=sorted({who for (_, who), x in trace.reads.items() for y in x if ((y >= low) & (y < high)).any()}))

def sampled():
    "Drawn tokens against logits of the definition and the noise as numpy makes it, and what a grid or a seed changes"
    from rlcr_suite.kernels.flashformer import Sampler, decode, gumbel
    s = shape(layers=1)
    w = draw(s)
    logits = true(s, w, PROMPT)[2]
    def drawn(seed, **how):
        b = buffers(s)
        return decode(s, w, b, row_of(s, PROMPT), 0, rows=5, sampler=Sampler(.7, seed), **how).tolist()
    want = lambda seed: [int((logits[i]/.7 + torch.from_numpy(gumbel(seed, i, s.vocab))).argmax()) for i in range(5)]
    b = buffers(s)
    one = decode(s, w, b, read(s, w, b, PROMPT), 4, sampler=Sampler(.7, 3), backend='persistent')
    return dict(drawn=drawn(3), want=want(3), grid=drawn(3, programs=2), other=drawn(2**40 + 5), other_want=want(2**40 + 5), one=one.tolist())

def ties():
    "A head of zeros: all tokens are as good, on every program"
    from rlcr_suite.kernels.flashformer import decode
    s = shape(layers=1)
    w, b = draw(s), buffers(s)
    w.head.zero_()
    return dict(one=decode(s, w, b, row_of(s, PROMPT[:1]), 0, programs=3).tolist(), rows=decode(s, w, b, row_of(s, PROMPT), 0, rows=2, programs=3).tolist())

def barrier():
    "Neighbours exchange a number three times: right and without a race by every schedule; wrong, and a race, without waiting; and a program that leaves is noticed"
    import torch
    from coop import Trace, cooperative
    def run(kernel, seed, programs, counter):
        x, trace = torch.zeros(4, programs, dtype=torch.int32), Trace()
        x[0] = torch.arange(programs)
        with cooperative(seed, trace=trace): kernel[programs,](x, counter, programs)
        return torch.equal(x[3], (torch.arange(programs) + 3) % programs), len(trace.races())
    counter = torch.zeros(1, dtype=torch.int32)
    found = dict(right=[run(_ring, seed, programs, counter) for programs in (4, 2, 3) for seed in range(4)], wrong=[run(_hasty_ring, seed, 4, counter) for seed in range(4)])
    try: run(_leaving, 0, 3, torch.zeros(1, dtype=torch.int32))
    except Exception as e: found['stuck'] = str(e)
    return found

def refusals():
    "The words of every refusal"
    from rlcr_suite.kernels.flashformer import Sampler, decode, why_not
    s = shape(layers=1)
    w, b, t, said = draw(s), buffers(s), row_of(s, PROMPT), {}
    def attempt(name, *args, **kw):
        try: decode(*args, **kw)
        except ValueError as e: said[name] = str(e)
    attempt('full', s, w, b, t, 47, 2)
    attempt('both', s, w, b, t, 0, 2, rows=2)
    attempt('rows', s, w, b, t, 0, rows=17)
    attempt('backend', s, w, b, t, 0, backend='fast')
    attempt('stages', s, w, b, t, 0, stages=(3, 99))
    attempt('alone', s, w, b, t, 0, programs=2, backend='persistent')
    attempt('programs', s, w, b, t, 0, programs=9)
    attempt('tokens', s, w, b, t.long(), 0)
    attempt('cold', s, w, b, t, 0, sampler=Sampler(0.))
    attempt('seed', s, w, b, t, 0, sampler=Sampler(1., -1))
    attempt('weights', s, w._replace(wo=w.wo[:, :-1]), b, t, 0)
    attempt('strided', s, w._replace(wd=w.wd.mT.contiguous().mT), b, t, 0)
    attempt('bias', shape(layers=1, qkv_bias=True), w, b, t, 0)
    said |= dict(wide=why_not(s, w._replace(wd=w.wd.double())), wide_table=why_not(s, w._replace(emb=w.emb.double())))
    said |= dict(head=why_not(shape(head_dim=24), w), group=why_not(shape(heads=5), w), narrow=why_not(shape(hidden=40), w))
    return said

def measure():
    "Everything, or what the command line names: a line of JSON each"
    import traceback
    from coop import hasten
    hasten()
    jobs = dict(llama=family, qwen2=partial(family, qkv_bias=True, heads=6, scale=.3), qwen3=partial(family, qk_norm=True, heads=2, head_dim=32), group6=partial(family, heads=6, kv_heads=1, layers=1), group8=partial(family, heads=8, kv_heads=1, layers=1), bf16=partial(precision, 'bfloat16'),
                fp16=partial(precision, 'float16'), launches=launches, together=together, int8=partial(quantised, 'int8'), int4=partial(quantised, 'int4-g128'), splits=splits, large=large, readers=readers,
                sampled=sampled, ties=ties, barrier=barrier, refusals=refusals)
    for name in sys.argv[1:] or jobs:
        begin = time.process_time()
        try: found = jobs[name]()
        except Exception: found = dict(failed=traceback.format_exc()[-1500:])
        print(json.dumps([name, found | dict(seconds=round(time.process_time() - begin, 1))]), flush=True)

# --------------------------------------------------------------------------------------------------------------- the tests

@pytest.fixture(scope='module')
def measured()->dict:
    "What `measure` found"
    done = subprocess.run([sys.executable, __file__], env=dict(os.environ) | dict(TRITON_INTERPRET='1'), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return dict(map(json.loads, done.stdout.splitlines()))

def of(measured:dict, name:str)->dict:
    assert 'failed' not in measured[name], measured[name]['failed']
    return measured[name]

@pytest.mark.parametrize('name', ['llama', 'qwen2', 'qwen3', 'group6', 'group8'])
def test_definition(measured, name):
    "Greedy tokens are those of the float64 decoder; what remains is float32's rounding; nothing is written past the last token"
    got = of(measured, name)
    assert got['tokens'] == got['want'] and got['untouched']
    assert got['stream'] <= 2e-6 and got['keys'] <= 2e-6, got

@pytest.mark.parametrize('name, rounding', [('bf16', 2**-8), ('fp16', 2**-11)])
def test_narrow(measured, name, rounding):
    "Weights and cache of 16 bits: off by the rounding of the cache; rows at once differ from one row by what a product in two halves leaves over, far less"
    got = of(measured, name)
    assert got['one'] <= rounding and got['rows'] <= rounding and got['same'] <= rounding/64, got
    assert got['picked'] == got['want']

def test_launches(measured):
    "Two tokens in one launch, in two, in a launch a stage on three programs, those in reverse order, and in ranges of stages: the same bits, none of them NaN, with one split and with three"
    got = of(measured, 'launches')
    assert len(got['same']) == 8 and all(got['same'].values()), got

def test_together(measured):
    """Two to four programs that wait for each other: the bits of one program, by every schedule; no two touch one address between two barriers unless both read; without waiting,
    other bits. So too where the cache is split, for every form of weights, for rows at once, and for drawn tokens"""
    got = of(measured, 'together')
    assert got['same'] == [True]*3 and got['races'] == [0]*3 and got['without'] is False
    assert got['barriers'] == [2*(5*2 + 1)]*3
    assert got['forms'] == {name: [True, 0] for name in FORMS}

@pytest.mark.parametrize('name', ['int8', 'int4'])
def test_quantised(measured, name):
    """Weights of few bits equal the same numbers made wide: one row to float32's rounding, a few times over for the part that all mantissas have in common, rows at once to that
    of activations in two bfloat16 halves"""
    got = of(measured, name)
    assert got['one'] <= 1e-5 and got['rows'] <= 5e-5, got
    assert got['picked'] == got['want']

def test_splits(measured):
    "A cache of 40 places is attended to in three parts; rows at once continue it as single ones do"
    got = of(measured, 'splits')
    assert got['splits'] == 3 and got['one'] <= 2e-6 and got['rows'] <= 2e-6, got
    assert got['picked'] == got['want'] == got['again']

def test_float16_of_a_large_stream(measured):
    "A stream of tens of thousands, times a gain of hundred, is more than float16 holds: it is normed before it is made narrow. What is left is the rounding of the cache"
    got = of(measured, 'large')
    assert got['largest'] > 2*65504 and got['rows'] <= 2**-11 and got['one'] <= 2**-11, got
    assert got['picked'] == got['want'] == got['single']

def test_only_queries_that_are_there_read_the_cache(measured):
    assert of(measured, 'readers')['programs'] == [0]

def test_sampling(measured):
    "Gumbel-max: the noise is Philox as numpy computes it, whatever the grid; another seed, of more than 32 bits, draws other tokens"
    got = of(measured, 'sampled')
    assert got['drawn'] == got['want'] == got['grid'] and got['one'] == got['drawn'][-1:]
    assert got['other'] == got['other_want'] != got['drawn']

def test_ties(measured):
    got = of(measured, 'ties')
    assert got['one'] == [0] and got['rows'] == [0, 0]

def test_barrier(measured):
    "One counter serves grids of four, two and three, one after the other; without waiting, the harness finds the race and the wrong number; it notices who never comes"
    got = of(measured, 'barrier')
    assert got['right'] == [[True, 0]]*12
    assert all(not right and races for right, races in got['wrong'])
    assert '2 programs wait' in got['stuck']

def test_refusals(measured):
    got = dict(of(measured, 'refusals'))
    got.pop('seconds')
    said = dict(full='places 47 to 48 do not fit a cache of 48', both='n = 2, rows = 2', rows='up to 16 rows', backend="got 'fast'", stages='stages must lie in (0, 7), got (3, 99)',
                alone='one after the other', programs='allow 1 to 4 programs, got 9', tokens='got torch.int64', cold='must be positive, got 0.0', seed='0..2**63 - 1, got -1', weights='wo must be (1, 32, 64)',
                strided='wd must be contiguous', bias='bqkv must be (1, 128), got None', head='got 24', wide='wd: numbers of torch.float32, torch.bfloat16, torch.float16 wanted, got torch.float64', wide_table='emb: numbers of', group='got 5 and 2', narrow='multiple of 16 numbers wanted, got 40')
    assert set(got) == set(said)
    for name, words in said.items(): assert words in got[name], (name, got[name])

# ------------------------------------------------------------------------------------------------------------------------------ on a GPU

gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a GPU')

@gpu
@pytest.mark.parametrize('quant', [None, 'int8', 'int4-g128'])
@pytest.mark.parametrize('dtype', ['bfloat16', 'float16', 'float32'])
def test_on_a_gpu(quant, dtype):
    """The compiled kernel against the reference on the same weights and cache: persistent and staged, grids of one program and more, one row and sixteen, greedy and sampled.
    The stream is off by what a cache of this type rounds differently where float32 sums differ in their last bit; tokens may differ where two logits nearly tie"""
    from rlcr_suite.flashformer import Decoder, Sampler
    from rlcr_suite.flashformer.cli import random_weights
    from rlcr_suite.kernels.flashformer import Shape, decode
    s = Shape(layers=3, hidden=256, heads=12, kv_heads=2, head_dim=64, ffn=640, vocab=1000, max_len=512, qkv_bias=True, qk_norm=True)
    w = random_weights(s, quant, getattr(torch, dtype), 'cuda')
    ids = torch.randint(0, s.vocab, (300,), generator=torch.Generator().manual_seed(0)).tolist()
    truth, d = (Decoder(s, w, backend=b) for b in ('reference', 'persistent'))
    for sampler in (None, Sampler(.9, 5), Sampler(.9, 2**40 + 5)):
        want = truth.reset().prefill(ids).step(32, sampler)
        got = d.reset().prefill(ids).step(32, sampler)                              # sixteen rows at a time, then one
        assert (got == want).float().mean() >= .9, (got, want)
        assert torch.equal(d.rollback(299).verify(got[:16], sampler), got[:16])
        for programs in (1, 7):
            for backend in ('persistent', 'staged'):
                d.buffers.h.fill_(torch.nan)
                again = decode(s, w, d.buffers, d.tokens, 299, 32, programs=programs, sampler=sampler, backend=backend).clone()
                assert torch.equal(again.long(), got), (programs, backend)
                stream = d.buffers.h[0].clone() if programs == 1 and backend == 'persistent' else stream
                assert torch.equal(stream, d.buffers.h[0])                          # no sum depends on the grid
        assert all(x.seconds > 0 for x in d.profile(2).values())

if __name__ == '__main__':
    import triton, triton.language as tl
    from rlcr_suite.kernels.grid import grid_arrive, grid_wait

    @triton.jit
    def _ring(x, counter, n):
        i = tl.program_id(0)
        for step in range(3):
            token = grid_arrive(counter)
            grid_wait(counter, token)
            tl.store(x + (step + 1)*n + i, tl.load(x + step*n + (i + 1) % n))

    @triton.jit
    def _hasty_ring(x, counter, n):
        i = tl.program_id(0)
        for step in range(3):
            token = grid_arrive(counter)
            tl.store(x + (step + 1)*n + i, tl.load(x + step*n + (i + 1) % n))

    @triton.jit
    def _leaving(x, counter, n):
        if tl.program_id(0) > 0:
            token = grid_arrive(counter)
            grid_wait(counter, token)

    measure()
