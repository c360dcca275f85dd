"""nbdev's part of the work: hide what is hidden, run `show_doc` for every exported name, link the names in backticks.

The same processors as `nbdev.serve.proc_nbs`. Here every notebook that fails is reported, not the first alone, and a
notebook is processed again when its text or the index of names has changed, whatever the dates of the files say."""
from __future__ import annotations
import hashlib, io, json, os, re, warnings
from concurrent.futures import ProcessPoolExecutor
from contextlib import redirect_stderr, redirect_stdout
from multiprocessing import get_context
from pathlib import Path

NEEDED = ['nbdev.processors', 'nbdev.showdoc']
LARGE = ['matplotlib.pyplot', 'pandas', 'scipy.stats', 'sympy', 'datasets', 'math_verify', 'torch', 'transformers.trainer', 'transformers.generation']
FEW = 8 # notebooks import for themselves
STAMPS = '.stamps.json'  # in the folder of processed notebooks: notebook -> digest of what it was made from

def work(src:Path, dst:Path)->str|None:
    "Process one notebook; returns what went wrong. Runs in a process of its own: what notebooks import and change stays there"
    from execnb.nbio import read_nb, write_nb
    from nbdev.processors import FilterDefaults
    os.environ['IN_TEST'] = '1'  # nbdev's sign that nothing is to be exported
    try:
        with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()), warnings.catch_warnings():
            warnings.simplefilter('ignore')
            nb = read_nb(src)
            FilterDefaults()(nb)
    except Exception as e:
        cause = f'{type(e.__cause__).__name__}: {e.__cause__}\n' if e.__cause__ else ''
        return re.sub(r'\x1b\[[0-9;]*m', '', f'{cause}{e}')
    dst.parent.mkdir(parents=True, exist_ok=True)
    write_nb(nb, dst)

def digest(notebook:Path, *others:Path)->str:
    "Of everything that a processed notebook depends on"
    h = hashlib.sha256()
    for f in (notebook, Path(__file__), *others): h.update(f.read_bytes() if f.exists() else b'')
    return h.hexdigest()

def process(proc:Path, force:bool=False)->list[str]:
    "Process the project's notebooks into `proc`, those that changed; returns the problems. The current folder must be the project's"
    from nbdev.config import get_config
    from nbdev.doclinks import nbglob
    cfg, stamps = get_config(), proc/STAMPS
    notebooks = {p.relative_to(cfg.nbs_path).as_posix(): p for p in sorted(nbglob(as_path=True))}
    now = {rel: digest(p, cfg.lib_path/'_modidx.py', cfg.config_file) for rel, p in notebooks.items()}
    then = json.loads(stamps.read_text()) if stamps.exists() and not force else {}
    todo = [rel for rel in notebooks if now[rel] != then.get(rel) or not (proc/rel).exists()]
    for old in proc.rglob('*.ipynb'):
        rel = old.relative_to(proc).as_posix()
        if rel not in notebooks or rel in todo: old.unlink()
    os.environ.setdefault('OMP_NUM_THREADS', '1')
    # forked from a process that has imported what is large; they end without IPython's own end, which collects garbage once a notebook
    forked = get_context('forkserver')
    forked.set_forkserver_preload(NEEDED + LARGE*(len(todo) > FEW))
    results = {}
    if todo:
        with ProcessPoolExecutor(min(4, os.cpu_count()), mp_context=forked) as pool:
            results = dict(zip(todo, pool.map(work, [notebooks[r] for r in todo], [proc/r for r in todo])))
    problems = {rel: why for rel, why in results.items() if why}
    proc.mkdir(parents=True, exist_ok=True)
    stamps.write_text(json.dumps({rel: d for rel, d in now.items() if rel not in problems}, indent=1))
    return [f'{rel}: {why}' for rel, why in problems.items()]
