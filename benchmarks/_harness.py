"What every benchmark shares: the arguments, timing in turns, and a result file that says where it was measured."
from __future__ import annotations
import argparse, gc, importlib.metadata, json, os, platform, re, time
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import torch

from rlcr_suite.core.data import atomic_write

def arguments(about:str, # one line for --help
              more:Callable[[argparse.ArgumentParser], object]=lambda p: None, # adds what only this benchmark takes
             )->argparse.Namespace:
    "The command line of a benchmark"
    p = argparse.ArgumentParser(description=about)
    p.add_argument('--quick', action='store_true', help='one small case, to see that it works')
    p.add_argument('--repeats', type=int, help='timed runs of each contender (default 7, or 2 with --quick)')
    p.add_argument('--seed', type=int, default=0)
    p.add_argument('--device', default='cuda' if torch.cuda.is_available() else 'cpu')
    p.add_argument('--out', type=Path, default=Path(__file__).parent/'results', help='where <device>/<name>.json goes')
    more(p)
    args = p.parse_args()
    args.repeats = args.repeats or (2 if args.quick else 7)
    return args

def hardware(device:str)->str:
    "The processor's name as its maker writes it"
    if device != 'cpu': return torch.cuda.get_device_name(device)
    try: found = re.search(r'model name\s*: (.+)', Path('/proc/cpuinfo').read_text())
    except OSError: found = None
    return found[1] if found else platform.processor() or platform.machine()

def in_turns(contenders:dict[str, Callable[[int], int]], # each takes the number of the repeat and returns the units it made
             repeats:int, # timed runs of each, after one untimed
             device:str
            )->dict[str, np.ndarray]: # units per second, (repeats,)
    "Time the contenders alternately, so that whatever else the machine does in the meantime hits them alike"
    for f in contenders.values(): f(0)
    rates = {name: [] for name in contenders}
    for i in range(1, repeats + 1):
        for name, f in contenders.items():
            _wait(device)
            start = time.perf_counter()
            made = f(i)
            _wait(device)
            rates[name].append(made / (time.perf_counter() - start))
    return {name: np.array(r) for name, r in rates.items()}

def _wait(device:str)->None:
    if device != 'cpu': torch.cuda.synchronize(device)

def spread(x:np.ndarray # (repeats,)
          )->dict[str, float]: # median, lowest and highest
    "What is reported of repeated timings; with few repeats their range says more than an interval would"
    return {k: float(f'{v:.4g}') for k, v in dict(median=np.median(x), low=x.min(), high=x.max()).items()}

def sdpa(q, k, v, *rest)->torch.Tensor:
    "PyTorch's causal softmax attention of (B, T, H, D); it takes heads first, and strided views are what its users pass"
    return torch.nn.functional.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v)), is_causal=True).transpose(1, 2)

LEAST = .05 # seconds of a turn on a CPU: a call of a few milliseconds, timed alone, would be a timing of the cold cache that the contender before it left

def _again(call:Callable[[], object], device:str)->Callable[[int], int]:
    "Calls until a turn has lasted `LEAST` (on a GPU, where a call returns before its work is done: one), and how many they were"
    least = LEAST if device == 'cpu' else 0.
    def run(i:int)->int:
        start, made = time.perf_counter(), 0
        while not made or time.perf_counter() - start < least:
            call()
            made += 1
        return made
    return run

def forward(f:Callable, x:tuple[torch.Tensor, ...])->Callable[[int], int]:
    return _again(torch.no_grad()(lambda: f(*x)), x[0].device.type)

def both(f:Callable, x:tuple[torch.Tensor, ...], seed:int)->Callable[[int], int]:
    "Forward and backward, with a gradient for every input that the contender reads"
    x = [y.detach().clone().requires_grad_() for y in x]
    do = torch.randn(x[2].shape, generator=torch.Generator().manual_seed(seed + 1)).to(x[2])
    used = x[:3] if f is sdpa else x
    return _again(lambda: torch.autograd.grad(f(*x), used, do), x[0].device.type)

class NotMeasured(Exception):
    "Why a contender cannot take part here; no fault of its own"

class Lost(Exception):
    "The GPU refuses this process from now on, as after an access to memory that is not there; says whose run it was, and the failure"

def failure(e:Exception)->str:
    "One line that says what went wrong"
    if isinstance(e, NotMeasured): return f'not measured: {e}'
    if isinstance(e, torch.OutOfMemoryError): return 'failed: out of memory'
    first = next(iter(str(e).strip().splitlines()), '')
    return f'failed: {type(e).__name__}: {first[:200]}'.rstrip(': ')

def guarded(name:str, f:Callable[[], object], device:str)->tuple[object, str]:
    "What f returns and '', or None and why it failed; what it allocated is free again. Raises `Lost` where nothing more can run"
    try:
        result = f()
        _wait(device)
        return result, ''
    except Lost: raise                               # of a contender inside f
    except Exception as e: why = failure(e)          # outside this clause its traceback no longer holds the tensors
    gc.collect()
    try:
        if device != 'cpu': torch.cuda.empty_cache()
        _wait(device)
    except Exception: raise Lost(name, why) from None
    return None, why

class Clock:
    "Seconds of one run: CUDA events on a GPU, whose second-level cache is emptied before"
    def __init__(self, device:str):
        self.device = device
        self.other = None if device == 'cpu' else torch.empty(2**28, dtype=torch.uint8, device=device)   # several times any L2

    def __call__(self, f:Callable[[], object], queued:bool=False # the GPU is kept busy while the launches of f are queued
                )->float:
        if self.device == 'cpu':
            start = time.perf_counter()
            f()
            return time.perf_counter() - start
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        self.other.zero_()
        if queued: torch.cuda._sleep(20_000_000)     # cycles, about 10 ms
        start.record()
        f()
        end.record()
        end.synchronize()
        return start.elapsed_time(end)/1e3

def exponent(rows:list[dict], # of a result
             what:str, # forward or both
             name:str, # a contender
             low:int=2048, # the shortest length that counts
            )->float|None: # None for fewer than two lengths
    "Slope of log time against log length"
    points = [(r['T'], r['seconds'][what][name]['median']) for r in rows if r['T'] >= low and name in r['seconds'][what]]
    return None if len(points) < 2 else float(f'{np.polyfit(*np.log(points).T, 1)[0]:.3f}')

def version(library:str)->str|None:
    "None where it is not installed"
    try: return importlib.metadata.version(library)
    except importlib.metadata.PackageNotFoundError: return None

def place(name:str, args:argparse.Namespace)->Path:
    "Where a benchmark's result goes"
    device = 'cpu' if args.device == 'cpu' else re.sub(r'[^a-z0-9]+', '-', hardware(args.device).lower()).strip('-')
    return args.out/device/f'{name}.json'

def write(name:str, args:argparse.Namespace, results:list[dict], libraries:tuple[str, ...], more:Mapping={})->Path:
    "Write one benchmark's result beside what it depends on"
    path = place(name, args)
    versions = {'python': platform.python_version()} | {l: version(l) for l in libraries}
    if args.device != 'cpu': versions['cuda'] = torch.version.cuda
    record = dict(benchmark=name, device=path.parent.name, hardware=hardware(args.device), cores=os.cpu_count(), threads=torch.get_num_threads(),
                  versions=versions, seed=args.seed, repeats=args.repeats, **more, results=results)
    path.parent.mkdir(parents=True, exist_ok=True)
    atomic_write(path, json.dumps(record, indent=1) + '\n')
    return path
