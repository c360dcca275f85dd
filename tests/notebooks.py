"""Run every notebook as `nbdev_test` does, each in a process of its own as its readers have, the slowest first: `python tests/notebooks.py`.

A process is forked from one that has imported the large libraries, which would else cost every notebook some seconds. Nothing of this project is imported there: a
notebook would meet what another registered. Those on kernels start from nothing, since Triton remembers from its first import whether it interprets."""
import argparse, multiprocessing, os, subprocess, sys, time
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path

LARGE = ['nbdev.test', 'matplotlib.pyplot', 'pandas', 'scipy.stats', 'sympy', 'datasets', 'math_verify', 'torch', 'transformers', 'transformers.trainer', 'transformers.generation', 'trl']
SLOW = ('06_kernel', '07_experiment', '07_baselines', 'cli', '10_results') # half a minute and more

def place(path:Path)->tuple[int, str]:
    "Where a notebook stands in the queue: started last, a slow one would keep one process busy while the others have nothing left to do"
    return SLOW.index(path.stem) if path.stem in SLOW else len(SLOW), str(path)

def run(path:Path, fresh:bool=False)->tuple[bool, float]: # passed, seconds
    "One notebook, in this process or in a fresh one; what fails is printed"
    if fresh:
        begin = time.time()
        return subprocess.run([sys.executable, __file__, '--here', path]).returncode == 0, time.time() - begin
    from nbdev.config import get_config
    from nbdev.test import test_nb
    return test_nb(path, skip_flags=get_config().tst_flags.split(), basepath=get_config().config_path)

def main()->int:
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument('paths', nargs='*', type=Path, help='notebooks (default: all)')
    p.add_argument('--workers', type=int, default=os.cpu_count(), help='notebooks at a time')
    p.add_argument('--here', action='store_true', help='in this process, one after the other')
    args = p.parse_args()
    if args.here: return int(not all(run(q.resolve())[0] for q in args.paths))
    from nbdev.doclinks import nbglob
    paths = sorted((q.resolve() for q in args.paths or nbglob(as_path=True)), key=place)
    warm = multiprocessing.get_context('forkserver')
    warm.set_forkserver_preload(LARGE)
    failed, begin = [], time.time()
    with ProcessPoolExecutor(args.workers, mp_context=warm, max_tasks_per_child=1) as pool:
        under_way = {pool.submit(run, q, q.stem == '06_kernel'): q for q in paths}
        for f in as_completed(under_way):
            passed, seconds = f.result()
            if not passed: failed.append(under_way[f])
            print(f"{'passed' if passed else 'FAILED'} {seconds:4.0f} s  {os.path.relpath(under_way[f])}", flush=True)
    print(f'{len(paths)} notebooks, {len(failed)} failed, {time.time() - begin:.0f} s')
    return int(bool(failed))

if __name__ == '__main__': sys.exit(main())
