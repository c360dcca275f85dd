"""Log-linear attention beside the causal softmax attention of PyTorch: seconds of the forward pass, and of forward and backward, against the
length. float32, one row, 4 heads of width 64; on a CPU one thread, since the question is what the method costs and not how either is spread over cores."""
from __future__ import annotations
import time

import torch
import torch.nn.functional as F

from _harness import arguments, both, exponent, forward, in_turns, sdpa, spread, write
from rlcr_suite.log_linear import backend_for, log_linear_attention
from rlcr_suite.log_linear.fenwick import levels_of

H, D = 4, 64
LENGTHS = (1024, 2048, 4096, 8192, 16384, 32768, 65536)
QUICK = (512,)
# the delta form keeps O(T log T) numbers for its gradient
LONGEST = dict(log_linear=65536, log_linear_delta=16384, sdpa=16384, naive=2048)   # the last two grow with the square of the length: beyond this they cost minutes, or memory

def inputs(T:int, seed:int, device:str)->tuple[torch.Tensor, ...]:
    "q, k, v, g, lam as a layer makes them: (B, T, H, D)"
    rng = torch.Generator().manual_seed(seed)
    q, k, v = torch.randn(3, 1, T, H, D, generator=rng).unbind(0)
    g, lam = -.1*torch.rand(1, T, H, generator=rng), torch.rand(1, T, H, levels_of(T), generator=rng)
    return tuple(x.to(device).contiguous() for x in (q, F.normalize(k, dim=-1), v, g, lam))

def naive(*x)->torch.Tensor: return log_linear_attention(*x, backend='naive')

def delta(*x)->torch.Tensor:
    "The gated-delta form, at half strength"
    return log_linear_attention(*x, beta=torch.full_like(x[3], .5))

CONTENDERS = dict(log_linear=log_linear_attention, log_linear_delta=delta, sdpa=sdpa, naive=naive)

def measure(T:int, args)->dict:
    "One row of the result"
    x, row = inputs(T, args.seed, args.device), dict(T=T, seconds={}, ratio_to_sdpa={})
    names = [n for n in CONTENDERS if T <= LONGEST[n]]
    for what, make in (('forward', lambda f: forward(f, x)), ('both', lambda f: both(f, x, args.seed))):
        rates = in_turns({n: make(CONTENDERS[n]) for n in names}, args.repeats, args.device)
        row['seconds'][what] = {n: spread(1/r) for n, r in rates.items()}
        if 'sdpa' in rates: row['ratio_to_sdpa'][what] = spread(rates['log_linear']/rates['sdpa'])
    return row

def main()->None:
    args, rows = arguments(__doc__), []
    if args.device == 'cpu': torch.set_num_threads(1)
    start = time.time()
    for T in QUICK if args.quick else LENGTHS:
        rows.append(measure(T, args))
        shown = '   '.join(f'{what} {1e3*row["log_linear"]["median"]:9.1f} ms ({rows[-1]["ratio_to_sdpa"].get(what, {}).get("median", float("nan")):5.1f}x)'
                           for what, row in rows[-1]['seconds'].items())
        print(f'T {T:6}   {shown}   {time.time() - start:5.0f} s', flush=True)
    for what in ('forward', 'both'):
        print(f'growth, {what}: T to the power', {n: e for n in CONTENDERS if (e := exponent(rows, what, n)) is not None})
    print('backend', backend_for(*inputs(64, args.seed, args.device)[:3]))
    print(write('log_linear', args, rows, ('torch', 'numpy')))

if __name__ == '__main__': main()
