"""PaTH attention beside the causal softmax attention of PyTorch: seconds of the forward pass, of forward and backward, and of one decoded token, against
the length. float32, one row, 4 heads of width 64; on a CPU one thread, since the question is what the method costs and not how either is spread over cores."""
from __future__ import annotations
from collections.abc import Callable
from functools import partial
import time

import torch
import torch.nn.functional as F

from _harness import arguments, both, exponent, forward, in_turns, sdpa, spread, write
from rlcr_suite.path_attention import PathCache, backend_for, block_form, path_attention

H, D = 4, 64
LENGTHS = (1024, 2048, 4096, 8192, 16384)
QUICK = (512,)
LONGEST = dict(naive=1024, scan=16384)      # the definition keeps T^2 D numbers for its gradient; the scan is timed forward only
WINDOW = 64
BLOCKS = (64, 128, 256, 512)                # of the scan: the fastest is timed

def inputs(T:int, seed:int, device:str)->tuple[torch.Tensor, ...]:
    "q, k, v, w, beta as a layer makes them: (B, T, H, D), w of length one, beta in (0, 2)"
    rng = torch.Generator().manual_seed(seed)
    q, k, v, w = torch.randn(4, 1, T, H, D, generator=rng).unbind(0)
    return tuple(x.to(device).contiguous() for x in (q, k, v, F.normalize(w, dim=-1), 2*torch.rand(1, T, H, generator=rng)))

def tree(*x)->torch.Tensor: return path_attention(*x)

def naive(*x)->torch.Tensor: return path_attention(*x, backend='naive')

@torch.no_grad()
def scan(q, k, v, w, beta, C:int=64)->torch.Tensor:
    """The paper's order with the same stock kernel: blocks of queries go back through all earlier blocks of keys, all blocks of queries one step at a
    time. T must be a multiple of C."""
    q, k, v, w, beta = (x.transpose(1, 2).unflatten(2, (-1, C))[0] for x in (q*D**-.5, k, v, w, beta))                # H n C D
    block, flash = block_form(q, k, w, beta), torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    A = block.logits.masked_fill(torch.ones(C, C, dtype=torch.bool).triu(1), -torch.inf)
    o, lse, Q, n = A.softmax(-1) @ v, A.logsumexp(-1), block.q_start.clone(), q.shape[1]
    for off in range(1, n):
        new, l = (x.unflatten(0, (H, -1))[:, :, 0] for x in flash(*(x.flatten(0, 1)[:, None] for x in (Q[:, off:], block.k_end[:, :n - off], v[:, :n - off])), 0., False, scale=1.))
        m = torch.logaddexp(lse[:, off:], l)
        o[:, off:] = o[:, off:].lerp(new, (l - m).exp()[..., None])
        lse[:, off:], Q[:, off:] = m, Q[:, off:] @ block.product[:, :n - off]
    return o.flatten(1, 2)[None].transpose(1, 2)

def best_block(x:tuple[torch.Tensor, ...], device:str)->int:
    "The block size at which the scan is fastest here, of two runs each"
    sizes = [C for C in BLOCKS if x[0].shape[1] % C == 0]
    rates = in_turns({str(C): forward(partial(scan, C=C), x) for C in sizes}, 2, device)
    return max(sizes, key=lambda C: rates[str(C)].max())

CONTENDERS = dict(path=tree, sdpa=sdpa, scan=scan, naive=naive)

def decoding(x:tuple[torch.Tensor, ...], window:int)->Callable[[int], int]:
    "A window's worth of tokens after a prompt, so that every state of the window is met once"
    cache = PathCache(window)
    cache.prefill(*x)
    prompt, one = cache.state, [y[:, :1] for y in x]
    def run(i:int)->int:
        cache.state = prompt
        for _ in range(WINDOW): cache.step(*one)
        return WINDOW
    return run

def plain_decoding(x:tuple[torch.Tensor, ...])->Callable[[int], int]:
    "The same for softmax attention, in a buffer with room"
    q, k, v = (F.pad(y, (0, 0, 0, 0, 0, WINDOW)).transpose(1, 2) for y in x[:3])
    T = x[0].shape[1]
    @torch.no_grad()
    def run(i:int)->int:
        for t in range(T, T + WINDOW):
            for y in (k, v): y[:, :, t] = y[:, :, 0]
            F.scaled_dot_product_attention(q[:, :, :1], k[:, :, :t + 1], v[:, :, :t + 1])
        return WINDOW
    return run

def measure(T:int, args)->dict:
    "One row of the result"
    x, row = inputs(T, args.seed, args.device), dict(T=T, seconds={}, ratio_to_sdpa={})
    names = [n for n in CONTENDERS if T <= LONGEST.get(n, T) and not (n == 'scan' and args.device != 'cpu')]
    chosen = CONTENDERS
    if 'scan' in names:
        row['scan_block'] = best_block(x, args.device)
        chosen = CONTENDERS | dict(scan=partial(scan, C=row['scan_block']))
    work = dict(forward={n: forward(chosen[n], x) for n in names},
                both={n: both(CONTENDERS[n], x, args.seed) for n in names if n != 'scan'},
                decode={'path': decoding(x, WINDOW), 'rewriting': decoding(x, 0), 'sdpa': plain_decoding(x)})
    for what, contenders in work.items():
        rates = in_turns(contenders, args.repeats, args.device)
        row['seconds'][what] = {n: spread(1/r) for n, r in rates.items()}
        row['ratio_to_sdpa'][what] = {n: spread(rates['sdpa']/r) for n, r in rates.items() if n != 'sdpa'}
    return row

def main()->None:
    args, rows = arguments(__doc__), []
    if args.device == 'cpu': torch.set_num_threads(1)
    start = time.time()
    for T in QUICK if args.quick else LENGTHS:
        rows.append(measure(T, args))
        ratios = '   '.join(f'{what}: ' + ', '.join(f'{n} {r["median"]:.2f}' for n, r in of.items()) for what, of in rows[-1]['ratio_to_sdpa'].items())
        print(f'T {T:6}   time / SDPA   {ratios}   {time.time() - start:5.0f} s', flush=True)
    for what in ('forward', 'both'):
        print(f'growth, {what}: T to the power', {n: e for n in CONTENDERS if (e := exponent(rows, what, n)) is not None})
    print('backend', backend_for(*inputs(64, args.seed, args.device)))
    print(write('path_attention', args, rows, ('torch', 'numpy')))

if __name__ == '__main__': main()
