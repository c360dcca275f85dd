"""PaTH's Triton kernels: values and every gradient against the recurrence in float64, decoding against prefill.

Triton decides on import whether it interprets, so the cases run in a process of their own, `python tests/test_kernels_path.py`: interpreted
where there is no GPU, compiled where there is one. There every buffer is born full of NaN, and the inputs lie between NaNs."""
import json, math, os, subprocess, sys
from dataclasses import dataclass
from functools import partial
import pytest

@dataclass(frozen=True)
class Case:
    "One problem: sizes, options, and the leaf's length"
    T: int; B: int = 1; HQ: int = 1; H: int = 1; D: int = 16; chunk: int = 16
    gate: float | None = None # the smallest forget gate; the largest is .999
    scale_gate: bool = False
    scale: float | None = None
    beta: tuple[float, float] = (0., 2.)
    cu: tuple[int, ...] | None = None
    dtype: str = 'float32'

CASES = dict(
    one=Case(1, gate=.1), two=Case(17, gate=.5), whole=Case(32), ragged=Case(57, gate=.1), high=Case(75, D=24, gate=.1, scale_gate=True),
    batch=Case(18, B=2, HQ=2, H=1, D=20, gate=.1), mqa=Case(18, HQ=3, D=32, scale=.3), forgetful=Case(35, gate=1e-30),
    reflections=Case(50, beta=(1.9, 2.)), middle=Case(70, chunk=32), large=Case(200, D=64, chunk=64, gate=.5),
    packed=Case(60, gate=.1, cu=(0, 17, 17, 40, 41, 60)), half=Case(34, HQ=2, H=1, gate=.5, dtype='float16'),
    bfloat=Case(34, HQ=2, H=1, gate=.5, dtype='bfloat16'), wide=Case(20, D=128, gate=.5))
NAMES = ('q', 'k', 'v', 'w', 'beta', 'gate')

# ------------------------------------------------------------------------------------------------- in a process of its own

def poisoned(x):
    "The same numbers, contiguous, with NaNs before and after them"
    import torch
    room = torch.full((x.numel() + 2048,), math.nan, dtype=x.dtype, device=x.device)
    room[1024:-1024] = x.flatten()
    return room[1024:-1024].view(x.shape)

def draw(case, device, seed=0):
    "Inputs, and the gradient of the output"
    import torch
    import torch.nn.functional as F
    r = torch.Generator().manual_seed(seed)
    new = lambda *shape: torch.randn(shape, generator=r)
    B, T, HQ, H, D, dtype = case.B, case.T, case.HQ, case.H, case.D, getattr(torch, case.dtype)
    low, high = case.beta
    x = [new(B, T, HQ, D).to(dtype), new(B, T, H, D).to(dtype), new(B, T, H, D).to(dtype), F.normalize(new(B, T, H, D), dim=-1),
         torch.rand((B, T, H), generator=r)*(high - low) + low]
    if case.gate: x.append((torch.rand((B, T, HQ), generator=r)*(.999 - case.gate) + case.gate).log())
    return [t.to(device) for t in x], new(B, T, HQ, D).to(dtype).to(device)

def recurrence(q, k, v, w, beta, gate=None, *, scale=None, scale_gate=False, cu_seqlens=None):
    "The definition: every token multiplies all keys so far by its transform, then attends"
    import torch
    if cu_seqlens is not None:
        spans = [slice(a, b) for a, b in zip(cu_seqlens, cu_seqlens[1:]) if a < b]
        return torch.cat([recurrence(*(None if x is None else x[:, s] for x in (q, k, v, w, beta, gate)), scale=scale, scale_gate=scale_gate) for s in spans], 1)
    group = q.shape[2] // k.shape[2]
    k, v, w, beta = (x.repeat_interleave(group, 2).transpose(1, 2) for x in (k, v, w, beta))
    q, scale, seen, out = q.transpose(1, 2), scale or q.shape[-1]**-.5, k[:, :, :0], []
    c = 0*beta if gate is None else gate.transpose(1, 2).cumsum(-1)
    for t in range(q.shape[2]):
        seen = seen - beta[:, :, t, None, None]*(seen @ w[:, :, t, :, None])*w[:, :, t, None]
        seen = torch.cat([seen, k[:, :, t:t+1]], 2)
        logits = (seen @ q[:, :, t, :, None])[..., 0]*scale + (c[:, :, t:t+1] - c[:, :, :t+1])*(scale if scale_gate else 1)
        out.append((logits.softmax(-1)[:, :, None] @ v[:, :, :t+1])[:, :, 0])
    return torch.stack(out, 1)

def rel(a, b):
    "Relative error of a in the 2-norm; the error itself where b is zero"
    b = b.double()
    return ((a.double() - b).norm()/(b.norm() or 1)).item()

def graded(f, x, do, **kw):
    "Output and gradients"
    x = [t.detach().requires_grad_() for t in x]
    o = f(*x, **kw)
    o.backward(do.to(o.dtype))
    return [o.detach(), *(t.grad for t in x)]

def kernel(q, k, v, w, beta, gate=None, **kw):
    "The kernel under test, its gate by position"
    from rlcr_suite.kernels.path_attention import path_attention
    return path_attention(q, k, v, w, beta, gate=gate, **kw)

def options(case):
    import torch
    return dict(scale=case.scale, scale_gate=case.scale_gate, cu_seqlens=None if case.cu is None else torch.tensor(case.cu))

def against_recurrence(case, device):
    "Relative errors of the output and of every gradient"
    x, do = draw(case, device)
    ours = graded(kernel, [poisoned(t) for t in x], do, chunk=case.chunk, **options(case))
    true = graded(recurrence, [t.double() for t in x], do, **options(case))
    return dict(zip(('o', *NAMES), map(rel, ours, true)))

def against_fla(device):
    "Relative error of the output against the public naive function, which knows only the scaled gate"
    import warnings
    warnings.filterwarnings('ignore')
    from fla.ops.path_attn.naive import naive_path_attn
    case = Case(100, D=32, gate=.5, scale_gate=True)
    x, do = draw(case, device)
    ours = graded(kernel, x, do, chunk=16, scale_gate=True)
    true = graded(partial(naive_path_attn, scale=32**-.5), x, do)
    return dict(zip(('o', *NAMES), map(rel, ours, true)))

def packed_apart(device):
    "Packed sequences against each of them alone: the largest difference, without and with a gate"
    import torch
    def difference(gate):
        case = Case(27, gate=gate, cu=(0, 17, 17, 27))
        x, do = draw(case, device)
        together = graded(kernel, x, do, chunk=16, **options(case))
        spans = [slice(a, b) for a, b in zip(case.cu, case.cu[1:]) if a < b]
        alone = [graded(kernel, [t[:, s] for t in x], do[:, s], chunk=16) for s in spans]
        return max((a - torch.cat(b, 1)).abs().max().item() for a, b in zip(together, zip(*alone)))
    return dict(plain=difference(None), gate=difference(.5))

def far_decay(device):
    """A running sum of log f so large that its differences are lost in fp32: the error after it, and what fp32 would make of it"""
    import torch
    case = Case(60, gate=.5)
    x, do = draw(case, device)
    x[5][:, 20] = -1e7                                # forgets everything; what follows must not notice
    ours, true = graded(kernel, x, do, chunk=16), graded(recurrence, [t.double() for t in x], do)
    lost = recurrence(*x)
    return dict(o=rel(ours[0], true[0]), gate=rel(ours[6], true[6]), single=rel(lost, true[0]))

def repeats(device):
    "Twice the same, and with the heads in another order: whether every number is the same bit for bit"
    import torch
    case = Case(18, HQ=2, H=2, gate=.1)
    x, do = draw(case, device)
    a, b = (graded(kernel, x, do, chunk=16) for _ in range(2))
    order = torch.tensor([1, 0], device=device)
    c = graded(kernel, [t[:, :, order] for t in x], do[:, :, order], chunk=16)
    return dict(again=all(map(torch.equal, a, b)), permuted=all(torch.equal(s[:, :, order], t) for s, t in zip(a, c)))

def decoded(device, T=60, window=16, gate=True, dtype='float32', R=3, D=24):
    "A cache that prefill and steps have filled: the kernel against the definition and against the cache's own attention, a few slots masked"
    import torch
    from rlcr_suite.kernels.path_attention import path_attention_decode
    from rlcr_suite.path_attention.cache import PathCache, _attend, _parts
    case = Case(T, B=2, HQ=2*R, H=2, D=D, gate=.5 if gate else None, dtype=dtype)
    x, _ = draw(case, device)
    true = recurrence(*(t.double() for t in x))
    cache, start, worst, masked, parts = PathCache(window=window), 5, 0., 0., set()
    cache.prefill(*(t[:, :start] for t in x[:5]), gate=x[5][:, :start] if gate else None)
    for t in range(start, T):
        cache.step(*(z[:, t:t+1] for z in x[:5]), gate=x[5][:, t:t+1] if gate else None)
        if t % 11 and t < T - 1: continue
        state = cache.state
        queries, _, bounds = _parts(state, x[0][:, t].float().unflatten(1, (2, R))*D**-.5)
        ours = lambda valid: path_attention_decode(torch.stack(queries), state.k, state.v, bounds, recent=state.recent if window else None, valid=valid,
                                                   c=state.c if gate else None, total=state.total if gate else None, splits=3)
        worst = max(worst, rel(ours(state.valid).flatten(1, 2), true[:, t]))
        some = state.valid.clone()
        some[1, 2:7] = False
        theirs = _attend(state._replace(valid=some), x[0][:, t].float().unflatten(1, (2, R))*D**-.5)
        masked = max(masked, rel(ours(some), theirs))
        parts.add(len(queries))
    return dict(worst=worst, masked=masked, parts=sorted(parts))

def cached(device, T=9, window=3):
    "A cache that decodes by the kernel, against one that does not: prompt and steps"
    import torch
    from rlcr_suite.path_attention.cache import PathCache
    def run(backend, gate):
        x, _ = draw(Case(T, B=2, HQ=4, H=2, gate=.5 if gate else None), device)
        cache = PathCache(window=window, backend=backend)
        out = [cache.prefill(*(z[:, :3] for z in x))]
        return torch.cat(out + [cache.step(*(z[:, t:t + 1] for z in x)) for t in range(3, T)], 1)
    return {name: rel(run('triton', gate), run('torch', gate)) for name, gate in (('plain', False), ('gate', True))}

def refused(device):
    "The words of every refusal"
    import torch
    from rlcr_suite.kernels.path_attention import path_attention, path_attention_decode, supports, why_not
    x, _ = draw(Case(20, B=2, HQ=2), device)
    q, k, v, w, beta = x
    words = {}
    def attempt(name, f, *args, **kw):
        try: f(*args, **kw)
        except ValueError as e: words[name] = str(e)
    wide = [torch.zeros(1, 4, 1, 160, device=device)]*4
    attempt('shape', path_attention, q, k, v, w[..., :8], beta)
    attempt('group', path_attention, torch.cat([q, q[:, :, :1]], 2), *(torch.cat([t, t], 2) for t in (k, v, w, beta)))
    attempt('dtype', path_attention, q.double(), k, v, w, beta)
    attempt('chunk', path_attention, *x, chunk=48)
    attempt('width', path_attention, *wide, beta[:1, :4])
    attempt('packed', path_attention, *x, cu_seqlens=torch.tensor([0, 20]))
    attempt('lengths', path_attention, *(t[:1] for t in x), cu_seqlens=torch.tensor([0, 9]))
    look = dict(queries=torch.zeros(2, 1, 1, 2, 16, device=device), keys=k[:1], values=v[:1], bounds=[0, 10, 20])
    attempt('bounds', path_attention_decode, **look | dict(bounds=[0, 10]))
    attempt('room', path_attention_decode, **look, recent=torch.zeros(1, 8, 1, 16, device=device))
    attempt('total', path_attention_decode, **look, total=torch.zeros(1, 2, device=device))
    attempt('decode width', path_attention_decode, **look | dict(queries=torch.zeros(2, 1, 1, 2, 160, device=device), keys=wide[0]))
    attempt('decode types', path_attention_decode, **look | dict(values=v[:1].half()))
    def cached(D):
        from rlcr_suite.path_attention.cache import PathCache
        one = torch.zeros(1, 1, 1, D, device=device)
        PathCache(backend='triton').step(one, one, one, one, one[..., 0])
    attempt('cache width', cached, 160)
    words['narrow'] = why_not(q, k, v[..., :8], w, beta)
    return dict(words=words, wide=supports(*wide, beta[:1, :4]), fits=supports(*x), empty=path_attention(*(t[:, :0] for t in x)).shape == (2, 0, 2, 16))

def measure():
    "Everything, or what the command line names: a line of JSON each"
    import torch, traceback
    torch.use_deterministic_algorithms(True)           # fills what torch.empty returns with NaN
    assert torch.empty(3).isnan().all()
    device = 'cuda' if torch.cuda.is_available() else 'cpu'
    jobs = {name: partial(against_recurrence, case) for name, case in CASES.items()}
    jobs |= dict(cached=cached, fla=against_fla, apart=packed_apart, far=far_decay, repeats=repeats, refused=refused, decode=decoded, decode_half=partial(decoded, T=40, dtype='float16'),
                 decode_bfloat=partial(decoded, T=23, dtype='bfloat16'), decode_wide=partial(decoded, T=12, window=4, gate=False, R=1, D=128),
                 decode_rewriting=partial(decoded, gate=False, T=30, window=0))
    for name in sys.argv[1:] or jobs:
        try: found = jobs[name](device=device)
        except Exception: found = dict(failed=traceback.format_exc()[-1500:])
        print(json.dumps([name, found]), flush=True)

# --------------------------------------------------------------------------------------------------------------- the tests

@pytest.fixture(scope='module')
def measured()->dict:
    "What `measure` found, interpreted where there is no GPU"
    import torch
    env = dict(os.environ) | ({} if torch.cuda.is_available() else dict(TRITON_INTERPRET='1')) | dict(CUBLAS_WORKSPACE_CONFIG=':4096:8')
    done = subprocess.run([sys.executable, __file__], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return dict(map(json.loads, done.stdout.splitlines()))

def limit(name:str, what:str)->float:
    "Rounding of the inputs' dtype, a few times over (the interpreter truncates to bfloat16: 2^-8); gradients of fp32 are held to what the design asks"
    if CASES.get(name, Case(1)).dtype != 'float32': return dict(float16=5e-3, bfloat16=2e-2)[CASES[name].dtype]
    return 2e-6 if what == 'o' else 5e-6

@pytest.mark.parametrize('name', CASES)
def test_recurrence(measured, name):
    got = measured[name]
    assert 'failed' not in got, got['failed']
    assert len(got) == 6 + (CASES[name].gate is not None)
    for what, error in got.items(): assert error <= limit(name, what), (what, error)

def test_fla(measured):
    got = measured['fla']
    assert 'failed' not in got, got['failed']
    for what, error in got.items(): assert error <= limit('fla', what), (what, error)

def test_packed(measured):
    "A sequence does not notice its neighbours: the same bits; with a gate, whose running sum goes on over them, to rounding"
    got = measured['apart']
    assert 'failed' not in got, got['failed']
    assert got['plain'] == 0 and got['gate'] <= 2e-6, got

def test_far_decay(measured):
    "Differences of the running sum are kept where fp32's own would be lost"
    got = measured['far']
    assert 'failed' not in got, got['failed']
    assert got['o'] <= 2e-6 and got['gate'] <= 5e-6 and got['single'] > 1e-2, got

def test_repeats(measured):
    assert measured['repeats'] == dict(again=True, permuted=True)

@pytest.mark.parametrize('name, tolerance, parts', [('decode', 2e-6, [2, 3, 4]), ('decode_half', 2e-3, [2, 3]),
                                                    ('decode_bfloat', 1e-2, [2, 3]), ('decode_wide', 2e-6, [3]), ('decode_rewriting', 2e-6, [1])])
def test_decode(measured, name, tolerance, parts):
    "A step equals the whole at once, from caches of one to four parts, and skips slots that do not count"
    got = measured[name]
    assert 'failed' not in got, got['failed']
    assert got['worst'] <= tolerance and got['masked'] <= tolerance and got['parts'] == parts, got

@pytest.mark.parametrize('dtype', ['float32', 'float16', 'bfloat16'])
@pytest.mark.parametrize('T, D, HQ, gate', [(1, 64, 1, .5), (333, 64, 4, .5), (500, 128, 2, None), (200, 24, 2, .1)])
def test_on_a_gpu(T, D, HQ, gate, dtype):
    "The leaves that are shipped; float32 products run as three tf32 ones, which keep about 21 bits"
    import torch
    if not torch.cuda.is_available(): pytest.skip('needs a GPU')
    from rlcr_suite.kernels.path_attention import leaf_length
    got = against_recurrence(Case(T, B=2, HQ=HQ, D=D, gate=gate, dtype=dtype, chunk=leaf_length(getattr(torch, dtype))), 'cuda')
    for what, error in got.items(): assert error <= dict(float32=2e-5 if what == 'o' else 5e-5, float16=5e-3, bfloat16=2e-2)[dtype], (what, error)

def test_cache(measured):
    "`PathCache` decodes by the kernel where it is told to"
    got = measured['cached']
    assert 'failed' not in got, got['failed']
    assert max(got.values()) <= 2e-6, got

def test_refusals(measured):
    got = measured['refused']
    assert 'failed' not in got, got['failed']
    said = dict(shape='w must have the shape', group='multiple of the key heads', dtype='float64', chunk='chunk must be 16, 32 or 64, got 48',
                width='at most 128, got 160', packed='needs B = 1', lengths='end with T = 20', bounds='in 3 numbers, got [0, 10]',
                room='room for 8', total='together, or neither',
                **{'decode width': 'at most 128, got 160 and 16', 'decode types': 'one type, float16', 'cache width': 'at most 128, got 160'}, narrow='as wide as keys, got 8 and 16')
    assert set(got['words']) == set(said)
    for name, words in said.items(): assert words in got['words'][name], (name, got['words'][name])
    assert got['fits'] and got['empty'] and not got['wide']

if __name__ == '__main__': measure()
