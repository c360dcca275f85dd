"What every benchmark shares: the arguments, timing in turns, and a result file that says where it was measured."
from __future__ import annotations
import argparse, importlib.metadata, json, os, platform, re, time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from rlcr_suite.core.data import atomic_write

def arguments(about:str # one line for --help
             )->argparse.Namespace:
    "The command line of a benchmark"
    p = argparse.ArgumentParser(description=about)
    p.add_argument('--quick', action='store_true', help='one small case, to see that it works')
    p.add_argument('--repeats', type=int, help='timed runs of each contender (default 7, or 2 with --quick)')
    p.add_argument('--seed', type=int, default=0)
    p.add_argument('--device', default='cuda' if torch.cuda.is_available() else 'cpu')
    p.add_argument('--out', type=Path, default=Path(__file__).parent/'results', help='where <device>/<name>.json goes')
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

def write(name:str, args:argparse.Namespace, results:list[dict], libraries:tuple[str, ...])->Path:
    "Write one benchmark's result beside what it depends on"
    chip = hardware(args.device)
    device = 'cpu' if args.device == 'cpu' else re.sub(r'[^a-z0-9]+', '-', chip.lower()).strip('-')
    versions = {'python': platform.python_version()} | {l: importlib.metadata.version(l) for l in libraries}
    record = dict(benchmark=name, device=device, hardware=chip, cores=os.cpu_count(), threads=torch.get_num_threads(), versions=versions,
                  seed=args.seed, repeats=args.repeats, results=results)
    path = args.out/device/f'{name}.json'
    path.parent.mkdir(parents=True, exist_ok=True)
    atomic_write(path, json.dumps(record, indent=1) + '\n')
    return path
