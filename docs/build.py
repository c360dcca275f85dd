"""Build the site from the notebooks: `python docs/build.py`.

Where Quarto is on the PATH this is nbdev's own `nbdev_docs`. Elsewhere the same `_quarto.yml` is rendered here, with pip
packages alone: nbdev's processors prepare the notebooks, pandoc renders them, Pagefind indexes them, and every link is
checked. What is shown is the outputs stored in the notebooks: nothing is computed but the boxes of documented names."""
from __future__ import annotations
import argparse, os, shutil, subprocess, sys, time
from pathlib import Path
from links import Checker
from process import process
from settings import settings
from website import Website

def arguments()->argparse.Namespace:
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument('--root', type=Path, default=Path(__file__).resolve().parents[1], help='folder of settings.ini')
    p.add_argument('--out', type=Path, help='where the site goes (default: _docs)')
    p.add_argument('--proc', type=Path, help='where processed notebooks are kept between builds (default: _proc)')
    p.add_argument('--force', action='store_true', help='process every notebook, changed or not')
    p.add_argument('--strict', action='store_true', help='fail if _quarto.yml and the notebooks disagree')
    p.add_argument('--no-quarto', action='store_true', help='never use Quarto')
    p.add_argument('--no-search', action='store_true', help='leave the search index out')
    return p.parse_args()

def quarto(root:Path, out:Path)->int:
    """nbdev's own way. It must not be called without Quarto: it would try to install it. Quarto's elements, ids and scripts are its own affair; that links and
    anchors lead somewhere is checked as on our own pages"""
    if code := subprocess.run([Path(sys.executable).parent/'nbdev_docs']).returncode: return code
    s = settings(root)
    made = root/s['doc_path']
    if out != made: shutil.copytree(made, out, dirs_exist_ok=True)
    address, repository = s['doc_host'].rstrip('/') + s['doc_baseurl'].rstrip('/') + '/', f"{s['git_url'].rstrip('/')}/blob/{s['branch']}/"
    return report(Checker(out, address, repository, root).links(), out)

def report(problems:list[str], out:Path)->int: # the exit code
    for p in problems: print(f'PROBLEM {p}', file=sys.stderr)
    if not problems: print(f'to read it: {sys.executable} -m http.server -d {out}   (search needs a server)')
    return 1 if problems else 0

def main()->int:
    args = arguments()
    root = args.root.resolve()
    out, proc = (args.out or root/'_docs').resolve(), (args.proc or root/'_proc').resolve()
    os.chdir(root)  # nbdev finds settings.ini from here
    if shutil.which('quarto') and not args.no_quarto: return quarto(root, out)
    clock = [time.perf_counter()]
    problems = process(proc, args.force)
    clock.append(time.perf_counter())
    site = Website(root, proc, out)
    site.build()
    clock.append(time.perf_counter())
    if not args.no_search: site.index_for_search()
    clock.append(time.perf_counter())
    problems += site.problems + Checker(out, site.address, f'{site.repository}/blob/{site.branch}/', root).check()
    clock.append(time.perf_counter())
    if args.strict: problems += site.missing
    for m in site.missing if not args.strict else (): print(f'note: {m}', file=sys.stderr)
    times = [f'{name} {b - a:.1f} s' for name, a, b in zip(('notebooks', 'pages', 'search', 'links'), clock, clock[1:])]
    print(f"{len(site.pages)} pages in {out} ({', '.join(times)})" + (f', {len(problems)} problems' if problems else ''))
    return report(problems, out)

if __name__ == '__main__': sys.exit(main())
