"""The GPU rows of the speed table: log-linear attention and PaTH beside the kernels of fla-core and the flash attention of PyTorch, in bfloat16. Every
contender is first held against the equation in float64; one that is wrong there is not timed. The result is written after every row."""
from __future__ import annotations
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from functools import partial
import json, os, subprocess, sys, threading, time

import numpy as np
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from _harness import Clock, Lost, NotMeasured, arguments, guarded, place, spread, write
from rlcr_suite.log_linear import log_linear_attention
from rlcr_suite.log_linear.fenwick import levels_of
from rlcr_suite.path_attention import path_attention
from rlcr_suite.path_attention.cache import PathCache

Inputs = dict[str, torch.Tensor]

BUDGET, GRACE = 470, 50           # seconds: no row is begun after the first; what still runs when both are over is given up
CHECKED = 1024                    # tokens of a check: two of the largest blocks of any contender
# Relative root mean square error. bfloat16 rounds by 2^-8 at most and the peer's own tests allow .02 for gradients; a wrong mask, decay or
# level shows as .1 and more. In float32 nothing but the order of the sums differs.
WRONG = {torch.bfloat16: .03, torch.float32: 1e-3}
WINDOW = 64                       # tokens of a timed stretch of decoding: with each, PathCache's pending transforms are flushed once
OURS = 'rlcr_suite'
LIBRARIES = ('torch', 'triton', 'fla-core', 'numpy')

@dataclass(frozen=True)
class Case:
    "One row of the result"
    family:str         # what is computed
    measure:str        # check, forward, backward, decode or training
    T:int              # tokens
    B:int              # sequences
    H:int              # heads
    D:int              # width of each
    gate:bool = False  # with a forget gate (PaTH)

    @property
    def name(self)->str: return f'{self.family} {self.measure}'

# (family, measure) -> times faster than the peer: what decides, and what is hoped for. Training has a bar without a peer: it fits, and its gradients are the same bits twice
BARS = {('log_linear', 'forward'): 2., ('log_linear', 'backward'): 5., ('path', 'forward'): 1.7, ('path', 'backward'): 2., ('path', 'decode'): 3.}
AIMS = {('path', 'forward'): 2.5}
SHAPES = {'log_linear': ((1, 32, 64), (2, 32, 128)), 'log_linear_delta': ((1, 32, 64), (2, 32, 128)), 'path': ((1, 32, 128), (2, 32, 64))}
LENGTHS = (16384, 65536, 2048, 8192, 32768, 4096)     # what matters most comes first, in case time runs out
SHORTEST = {'path': 8192}

def cases(quick:bool, device:str)->list[Case]:
    "All rows, in the order in which they are measured"
    if quick:
        T, shape = (128, (1, 2, 16)) if device == 'cpu' else (2048, (1, 8, 64))
        measures = dict(log_linear=('check', 'forward', 'backward'), log_linear_delta=('check', 'forward', 'backward'),
                        path=('check', 'check decode', 'forward', 'backward', 'decode', 'training'))
        return [Case(f, m, T, *shape) for f in SHAPES for m in measures[f]]
    rows = [Case(f, 'check', CHECKED, *shape) for f in SHAPES for shape in SHAPES[f]] + [Case('path', 'check', CHECKED, 1, 32, 128, gate=True)]
    rows += [Case('path', 'check decode', 256, 1, 32, 128)]
    for T in LENGTHS:
        rows += [Case(f, m, T, *shape) for f in SHAPES if T >= SHORTEST.get(f, 0) for shape in SHAPES[f] for m in ('forward', 'backward')]
        if T == LENGTHS[0]:
            rows += [Case('path', 'decode', 8192, 8, 32, 128), Case('path', 'decode', 32768, 8, 32, 128), Case('path', 'decode', 32768, 1, 32, 128)]
            rows += [Case('path', 'training', 65536, 1, 32, 128)] + [Case('path', m, T, 1, 32, 128, gate=True) for m in ('forward', 'backward')]
    return rows

# ---- inputs and contenders ---------------------------------------------------------------------------------------------
def inputs(case:Case, seed:int, device:str, extra:int=0)->Inputs:
    "What a layer would pass, (B, T, H, D): q, k, v in half precision on a GPU, all else in float32; do is a gradient of the output"
    rng, shape = torch.Generator(device).manual_seed(seed), (case.B, case.T + extra, case.H)
    normal, uniform = (partial(f, generator=rng, device=device) for f in (torch.randn, torch.rand))
    half = torch.float32 if device == 'cpu' else torch.bfloat16
    x = dict(q=normal(*shape, case.D), k=normal(*shape, case.D), v=normal(*shape, case.D), do=normal(*shape, case.D))
    if case.family != 'path': x['k'] = F.normalize(x['k'], dim=-1)
    x = {name: y.to(half) for name, y in x.items()}
    if case.family == 'path':
        x |= dict(w=F.normalize(normal(*shape, case.D), dim=-1), beta=2*normal(*shape).sigmoid())
        return x | (dict(gate=.1*F.logsigmoid(2 + normal(*shape))) if case.gate else {})
    x |= dict(g=-.1*uniform(*shape), lam=uniform(*shape, levels_of(case.T)))
    return x | (dict(beta=uniform(*shape)) if case.family == 'log_linear_delta' else {})

def need_gpu(x:Inputs)->None:
    if not x['q'].is_cuda: raise NotMeasured('needs a GPU')

def ours_log_linear(x:Inputs, backend:str='')->torch.Tensor:
    backend = backend or ('triton' if x['q'].is_cuda else 'torch')
    return log_linear_attention(x['q'], x['k'], x['v'], x['g'], x['lam'], beta=x.get('beta'), backend=backend)

def fla_log_linear(x:Inputs)->torch.Tensor:
    need_gpu(x)
    from fla.ops.log_linear_attn import chunk_log_linear_attn
    return chunk_log_linear_attn(x['q'], x['k'], x['v'], x['g'], x['lam'])[0]

def ours_path(x:Inputs, backend:str='')->torch.Tensor:
    backend = backend or ('triton' if x['q'].is_cuda else 'torch')
    return path_attention(x['q'], x['k'], x['v'], x['w'], x['beta'], gate=x.get('gate'), scale_gate=True, backend=backend)

def stock_path(x:Inputs)->torch.Tensor:
    "The tree on kernels that come with PyTorch"
    need_gpu(x)
    return ours_path(x, 'torch')

def fla_path(x:Inputs, **kwargs)->torch.Tensor:
    need_gpu(x)
    from fla.ops.path_attn.parallel import parallel_path_attn
    o, keys = parallel_path_attn(x['q'], x['k'], x['v'], x['w'], x['beta'], x.get('gate'), **kwargs)
    return (o, keys) if kwargs else o

def sdpa(x:Inputs)->torch.Tensor:
    "Causal softmax attention, which computes something else: a yardstick"
    heads_first = (x[n].transpose(1, 2) for n in 'qkv')
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION): return F.scaled_dot_product_attention(*heads_first, is_causal=True).transpose(1, 2)

CONTENDERS = dict(log_linear={OURS: ours_log_linear, 'fla': fla_log_linear, 'sdpa': sdpa}, log_linear_delta={OURS: ours_log_linear, 'sdpa': sdpa},
                  path={OURS: ours_path, 'rlcr_suite torch': stock_path, 'fla': fla_path, 'sdpa': sdpa})

# ---- decoding ----------------------------------------------------------------------------------------------------------
Step = Callable[[Inputs], torch.Tensor]   # one token, (B, 1, ...), to its output

def tokens(x:Inputs, first:int, end:int)->Inputs: return {n: y[:, first:end] for n, y in x.items()}

def ours_decode(prompt:Inputs)->Step:
    cache = PathCache(scale_gate=True)
    part = lambda x: (x['q'], x['k'], x['v'], x['w'], x['beta'], x.get('gate'))
    cache.prefill(*part(prompt))
    return lambda x: cache.step(*part(x))

def _rewritten(k:torch.Tensor, w:torch.Tensor, beta:torch.Tensor)->torch.Tensor:
    "As the peer's layer does it: all keys, at every token"
    wide = k.float()
    return (wide - beta[..., None]*(wide*w).sum(-1, keepdim=True)*w).to(k.dtype)

def fla_decode(prompt:Inputs, compiled:bool=True)->Step:
    "What fla.layers.PaTHAttention does at a token, without the projections, norms and unpadding around it"
    if 'gate' in prompt: raise NotMeasured('no row of the table decodes with a gate')
    keys = fla_path(prompt, use_cache=True)[1]
    from fla.ops.attn.decoding import attn_decoding_one_step
    if compiled: torch.compiler.reset()                      # the limit of recompilations is one for all rows
    values, update = prompt['v'], torch.compile(_rewritten) if compiled else _rewritten
    def step(x:Inputs)->torch.Tensor:
        nonlocal keys, values
        keys, values = torch.cat([update(keys, x['w'], x['beta']), x['k']], 1), torch.cat([values, x['v']], 1)
        ends = torch.arange(len(keys) + 1, device=keys.device, dtype=torch.int32)*keys.shape[1]
        flat = (y.flatten(0, 1)[None] for y in (x['q'], keys, values))
        return attn_decoding_one_step(*flat, cu_seqlens=ends, do_gate_scale=True).transpose(0, 1)
    return step

def sdpa_decode(prompt:Inputs)->Step:
    "Reads a cache that does not grow"
    k, v = (prompt[n].transpose(1, 2) for n in 'kv')
    return lambda x: F.scaled_dot_product_attention(x['q'].transpose(1, 2), k, v).transpose(1, 2)

DECODERS = {OURS: ours_decode, 'fla': fla_decode, 'fla, not compiled': partial(fla_decode, compiled=False), 'sdpa': sdpa_decode}

# ---- right or wrong ----------------------------------------------------------------------------------------------------
def leaves(x:Inputs)->Inputs:
    "The inputs that get gradients"
    return {n: y.detach().clone().requires_grad_() for n, y in x.items() if n != 'do'}

def gradients(f:Callable[[Inputs], torch.Tensor], x:Inputs)->Inputs:
    "Output and gradients by name"
    own = leaves(x)
    o = f(own)
    return dict(o=o.detach()) | {f'd{n}': g for n, g in zip(own, torch.autograd.grad(o, [*own.values()], x['do'], allow_unused=True)) if g is not None}

def truth(case:Case, x:Inputs, heads:list[int])->Inputs:
    "Output and gradients of some heads by the equation in float64; heads do not see each other"
    f = ours_path if case.family == 'path' else ours_log_linear
    return gradients(partial(f, backend='naive'), {n: y[:, :, heads].double() for n, y in x.items()})

def errors(found:Inputs, true:Inputs, heads:list[int])->dict[str, float]:
    "Relative root mean square error of the output and of every gradient; infinite where something is not finite"
    def one(a:torch.Tensor, b:torch.Tensor)->float:
        e = float((a[:, :, heads].double() - b).norm()/b.norm())
        return float(f'{e:.3g}') if np.isfinite(e) else float('inf')
    return {n: one(found[n], true[n]) for n in true if n in found}

def verdict(error:dict[str, float], dtype:torch.dtype)->str:
    worst = max(error, key=error.get)
    return 'right' if error[worst] <= WRONG[dtype] else f'wrong: relative error {error[worst]:.3g} of {worst}'

def judged(error:dict[str, float], dtype:torch.dtype)->dict:
    "An entry of a check; JSON has no infinity"
    return dict(status=verdict(error, dtype), error={n: e if np.isfinite(e) else None for n, e in error.items()})

def same(a:Inputs, b:Inputs)->bool:
    "Bit by bit"
    return all(torch.equal(a[n], b[n]) for n in a)

def tune(f:Callable, case:Case, args)->None:
    "An autotuner chooses once for heads and widths, at the length that it meets first: let that be one of the table, not the short one of a check"
    if args.device != 'cpu' and not args.quick: gradients(f, inputs(replace(case, T=LENGTHS[0]), args.seed, args.device))

def check(case:Case, args, known:dict[str, str])->dict:
    "Every contender's error, and whether its gradients are the same bits when computed again"
    x = inputs(case, args.seed, args.device)
    heads = [0, case.H - 1]
    def one(f:Callable)->dict:
        tune(f, case, args)
        found = gradients(f, x)
        return judged(errors(found, true, heads), x['q'].dtype) | dict(deterministic=same(found, gradients(f, x)))
    true = truth(case, x, heads)
    return in_order({n: partial(one, f) for n, f in CONTENDERS[case.family].items() if f is not sdpa}, args, known)

def check_decode(case:Case, args, known:dict[str, str])->dict:
    "The last tokens, one by one after the others as a prompt"
    x, heads, T = inputs(case, args.seed, args.device), [0, case.H - 1], case.T - min(WINDOW, case.T//2)
    true = ours_path({n: y[:, :, heads].double() for n, y in x.items()}, 'naive')[:, T:]
    @torch.no_grad()
    def one(f:Callable[[Inputs], Step])->dict:
        step = f(tokens(x, 0, T))
        found = torch.cat([step(tokens(x, t, t + 1)) for t in range(T, case.T)], 1)
        return judged(errors(dict(o=found), dict(o=true), heads), x['q'].dtype)
    return in_order({n: partial(one, f) for n, f in DECODERS.items() if f is not sdpa_decode}, args, known)

# ---- time and memory ---------------------------------------------------------------------------------------------------
def in_order(runs:dict[str, Callable[[], dict]], args, known:dict[str, str])->dict:
    "One entry a contender, whatever becomes of the others"
    args.current = found = {}                                  # for who has to give up in the middle of a row
    for name, run in runs.items():
        entry, why = (None, known[name]) if name in known else guarded(name, run, args.device)
        found[name] = entry or dict(status=why)
    return found

def peak(device:str, f:Callable[[], object])->tuple[object, int|None]:
    "What f returns, and the most memory it took beyond what was there before"
    if device == 'cpu': return f(), None
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    result = f()
    torch.cuda.synchronize()
    return result, torch.cuda.max_memory_allocated() - before

LONG, SHORT = 8., .003   # seconds: what one contender may take of a row; below this the launches may weigh more than the work

def timed(runs:dict[str, Callable[[], object]], args, known:dict[str, str], per:int=1, queued:bool=True)->dict:
    "Contenders in turns, after two untimed runs; `per` units of work in a run"
    clock, found, times, repeats = Clock(args.device), {}, {}, {}
    def warm(f:Callable)->dict:
        f()                                                    # compiles, and chooses among configurations
        _, memory = peak(args.device, f)
        seconds = clock(f)
        return dict(status='measured', peak_bytes=memory, repeats=max(1, min(args.repeats, int(LONG/max(seconds, 1e-9)))), once=seconds)
    found = in_order({n: partial(warm, f) for n, f in runs.items()}, args, known)
    alive = [n for n in found if found[n]['status'] == 'measured']
    for kind, hide in (('seconds', False), ('queued_seconds', True)):
        chosen = [n for n in alive if not hide or (queued and args.device != 'cpu' and found[n]['once']*per < SHORT)]
        times = {n: [] for n in chosen}
        for i in range(max((found[n]['repeats'] for n in chosen), default=0)):
            for n in [n for n in chosen if i < found[n]['repeats'] and found[n]['status'] == 'measured']:
                seconds, why = guarded(n, partial(clock, runs[n], hide), args.device)
                if why: found[n]['status'] = why
                else: times[n].append(seconds/per)
        for n in chosen:
            if times[n]: found[n][kind] = spread(np.array(times[n]))
    for n in alive: del found[n]['once']
    return found

def forward(case:Case, args, known:dict[str, str])->dict:
    x = inputs(case, args.seed, args.device)
    @torch.no_grad()
    def run(f:Callable)->torch.Tensor: return f(x)
    return timed({n: partial(run, f) for n, f in CONTENDERS[case.family].items()}, args, known)

def backward(case:Case, args, known:dict[str, str])->dict:
    "The backward pass alone: the forward pass is kept"
    x, own, kept = inputs(case, args.seed, args.device), {}, {}
    def run(name:str, f:Callable)->None:
        if name not in kept:
            own[name] = leaves(x)
            kept[name] = f(own[name])
        torch.autograd.grad(kept[name], [*own[name].values()], x['do'], retain_graph=True, allow_unused=True)
    return timed({n: partial(run, n, f) for n, f in CONTENDERS[case.family].items()}, args, known)

@torch.no_grad()
def decode(case:Case, args, known:dict[str, str])->dict:
    "Seconds a token, all sequences together; the mean of a window, since some tokens do more than others"
    x, steps = inputs(case, args.seed, args.device, extra=WINDOW), {}
    new = [tokens(x, t, t + 1) for t in range(case.T, case.T + WINDOW)]
    def run(name:str, f:Callable[[Inputs], Step])->None:
        if name not in steps: steps[name] = f(tokens(x, 0, case.T))
        for token in new: steps[name](token)
    return timed({n: partial(run, n, f) for n, f in DECODERS.items()}, args, known, WINDOW, queued=False)

def training(case:Case, args, known:dict[str, str])->dict:
    "Forward and backward, twice: does it fit, what does it take, are the gradients the same bits?"
    x = inputs(case, args.seed, args.device)
    def one(f:Callable)->dict:
        clock, found, seconds = Clock(args.device), [], []
        def run()->None: found.append(gradients(f, x))
        for _ in range(2):
            took, memory = peak(args.device, partial(clock, run))
            seconds.append(took)
        finite = all(bool(y.isfinite().all()) for y in found[0].values())
        return dict(status='measured' if finite else 'wrong: something is not finite', deterministic=same(*found), peak_bytes=memory,
                    seconds=spread(np.array(seconds[1:])), repeats=1)
    return in_order({n: partial(one, f) for n, f in CONTENDERS[case.family].items()}, args, known)

MEASURES = {'check': check, 'check decode': check_decode, 'forward': forward, 'backward': backward, 'decode': decode, 'training': training}

# ---- the rows ----------------------------------------------------------------------------------------------------------
def ratios(contenders:dict)->dict[str, float]:
    "How many times as long as ours each takes"
    median = {n: c['seconds']['median'] for n, c in contenders.items() if c['status'] == 'measured' and 'seconds' in c}
    return {n: float(f'{t/median[OURS]:.4g}') for n, t in median.items() if n != OURS} if OURS in median else {}

def met(case:Case, contenders:dict)->dict:
    "The bar of a row and whether it is met; None where it cannot be said"
    key, ours, peer = (case.family, case.measure), contenders.get(OURS, {}), contenders.get('fla', {})
    known = not ours.get('status', 'not measured').startswith('not measured')
    if case.measure == 'training': return dict(bar='fits, the same bits twice', met=ours['status'] == 'measured' and ours['deterministic'] is True if known else None)
    if key not in BARS: return {}
    found = dict(bar=BARS[key]) | (dict(aim=AIMS[key]) if key in AIMS else {})
    if known and ours['status'] != 'measured': return found | dict(met=False)
    return found | dict(met=ratios(contenders)['fla'] >= BARS[key] if 'seconds' in ours and 'seconds' in peer else None)

def row(case:Case, contenders:dict, dtype:str)->dict:
    found = dict(name=case.name, case=asdict(case) | dict(dtype=dtype), contenders=contenders)
    if not case.measure.startswith('check'): found['times_faster'] = ratios(contenders)
    return found | met(case, contenders)

def skipped(case:Case, why:str, dtype:str)->dict:
    "A row that nobody ran"
    names = DECODERS if 'decode' in case.measure else CONTENDERS[case.family]
    return row(case, {n: dict(status=f'not measured: {why}') for n in names}, dtype)

def excluded(case:Case, rows:list[dict], lost:dict[str, str])->dict[str, str]:
    "Contenders that do not run: wrong, or failed, where they were checked, or fatal to the process before"
    out = {n.split('/')[1]: why for n, why in lost.items() if n.split('/')[0] == case.name}
    if case.measure.startswith('check'): return out
    want = dict(name=f'{case.family} check decode' if case.measure == 'decode' else f'{case.family} check')
    alike = lambda c: case.measure == 'decode' or (c['D'], c['gate']) == (case.D, case.gate)
    for r in rows:
        if r['name'] == want['name'] and alike(r['case']):
            out = {n: c['status'] if c['status'].startswith('not measured') else f"not timed, its check says {c['status']}"
                   for n, c in r['contenders'].items() if c['status'] != 'right'} | out
    return out

def shown(r:dict)->str:
    "A row on one line"
    c, parts = r['case'], []
    for n, e in r['contenders'].items():
        if 'seconds' in e: parts.append(f"{n} {1e3*e['seconds']['median']:.3g} ms")
        elif e['status'] == 'right' and e.get('error'): parts.append(f"{n} right ({max(e['error'].values()):.2g})")
        else: parts.append(f"{n} {e['status']}")
    times = ', '.join(f'{n} {t:.2f}x' for n, t in r.get('times_faster', {}).items())
    if r.get('met') is not None: times += f"{', ' if times else ''}bar {r['bar']} {'met' if r['met'] else 'missed'}"
    return f"{r['name']:26} T {c['T']:5} B {c['B']} H {c['H']} D {c['D']:3}{' gate' if c['gate'] else ''}   {'; '.join(parts)}" + (f'   [{times}]' if times else '')

class Record:
    "Rows so far, on disk after each; continued by a new process where the GPU refused the old one"
    def __init__(self, args):
        self.args, self.rows, self.lost, self.lock = args, [], {}, threading.Lock()
        self.dtype = 'float32' if args.device == 'cpu' else 'bfloat16'
        if args.resume:
            old = json.loads(place('gpu', args).read_text())
            self.rows, self.lost = old['results'], old['lost']

    def save(self)->None:
        self.path = write('gpu', self.args, self.rows, LIBRARIES, dict(seconds=round(time.time() - self.args.started), lost=self.lost))

    def add(self, r:dict)->None:
        with self.lock:
            self.rows.append(r)
            self.save()
        print(f'{time.time() - self.args.started:4.0f} s  {shown(r)}', flush=True)

    def left(self, todo:list[Case])->list[Case]:
        done = [{k: v for k, v in r['case'].items() if k != 'dtype'} for r in self.rows]
        return [c for c in todo if asdict(c) not in done]

    def give_up(self, todo:list[Case])->None:
        "What is not there by now is written as such, and the process ends, whatever it is in"
        self.lock.acquire()
        for i, c in enumerate(self.left(todo)):
            r = skipped(c, 'out of time' if i else 'took too long', self.dtype)
            if not i: r['contenders'] |= {n: e for n, e in getattr(self.args, 'current', {}).items() if e['status'] != 'measured' or 'seconds' in e}
            self.rows.append(r)
        self.save()
        print(f'given up after {time.time() - self.args.started:.0f} s; {self.path}', flush=True)
        os._exit(0)

def again(args)->None:
    "Replace this process, whose GPU context is lost, by one that goes on"
    keep = [a for a in sys.argv[1:] if a != '--resume' and not a.startswith('--started')]
    sys.stdout.flush()
    os.execv(sys.executable, [sys.executable, __file__, *keep, '--resume', f'--started={args.started}'])

def measured(record:Record, todo:list[Case], args)->None:
    "Row by row"
    for case in record.left(todo):
        if time.time() - args.started > args.budget:
            record.add(skipped(case, 'out of time', record.dtype))
            continue
        measure = partial(MEASURES[case.measure], case, args, excluded(case, record.rows, record.lost))
        try: contenders, why = guarded('', measure, args.device)
        except Lost as e:
            name, why = e.args
            record.lost[f'{case.name}/{name}'] = f'{why} (and the GPU was lost, T {case.T})'
            if name: record.save()
            else: record.add(skipped(case, why, record.dtype))
            again(args)
        args.current = {}
        record.add(row(case, contenders, record.dtype) if contenders is not None else skipped(case, why, record.dtype))

# ---- compiling beforehand ----------------------------------------------------------------------------------------------
def compilations(todo:list[Case])->Iterator[tuple[str, str]]:
    "(family, contender) of the kernels that have to be compiled"
    for family in dict.fromkeys(c.family for c in todo):
        yield from ((family, n) for n, f in CONTENDERS[family].items() if f not in (sdpa, stock_path))

def compile_only(family:str, contender:str, todo:list[Case], args)->None:
    "Run one contender once in every shape for which it compiles anew: forward and backward, memory permitting"
    longest = 8192 if family == 'path' else max(LENGTHS)     # the kernels of PaTH do not depend on the length
    wanted = [c for c in todo if c.family == family and c.measure in ('forward', 'backward', 'check')]
    wanted.sort(key=lambda c: c.measure == 'check')          # last, since autotuners choose at the first
    for case in dict.fromkeys(replace(c, measure='', T=min(c.T, longest)) for c in wanted):
        x = inputs(case, args.seed, args.device)
        guarded(contender, partial(gradients, CONTENDERS[family][contender], x), args.device)

def compile_all(todo:list[Case], args)->None:
    "Side by side, since a compiler keeps one core busy and the kernels are many; what is compiled lies in Triton's cache on disk"
    command = [sys.executable, __file__, *sys.argv[1:], f'--started={args.started}']
    apart = os.environ | {'FLA_CACHE_RESULTS': '0'}          # what an autotuner finds while others use the GPU is not kept
    running = [subprocess.Popen([*command, f'--compile={f}/{n}'], env=apart, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
               for f, n in compilations(todo)]
    for p in running:
        try: p.wait(max(1, args.started + args.budget*.4 - time.time()))
        except subprocess.TimeoutExpired: p.kill()
    print(f'{time.time() - args.started:4.0f} s  compiled', flush=True)

def options(p)->None:
    p.add_argument('--budget', type=float, default=BUDGET, help=f'seconds after which no row is begun (default {BUDGET})')
    p.add_argument('--only', default='', help='only rows whose name holds this, and the checks')
    p.add_argument('--resume', action='store_true', help='keep the rows of a result that is there, and measure the others')
    for hidden, kind in (('--started', float), ('--compile', str)): p.add_argument(hidden, type=kind, help='(used by the script itself)')

def main()->None:
    args = arguments(__doc__, options)
    args.started = args.started or time.time()
    if args.device == 'cpu' and not args.quick:
        print('gpu.py needs a GPU; nothing is measured (--quick runs small shapes on a CPU)')
        return
    if args.device == 'cpu': torch.set_num_threads(1)
    todo = [c for c in cases(args.quick, args.device) if args.only in c.name or c.measure.startswith('check')]
    if args.compile:
        compile_only(*args.compile.split('/'), todo, args)
        return
    record = Record(args)
    if args.device != 'cpu' and not args.resume: compile_all(todo, args)
    watch = threading.Timer(max(0, args.started + args.budget + GRACE - time.time()), record.give_up, [todo])
    watch.daemon = True
    watch.start()
    measured(record, todo, args)
    watch.cancel()
    record.save()
    print(record.path)

if __name__ == '__main__': main()
