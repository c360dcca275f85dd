"Shared by the tests of the renderer: its folder on the path, and the build of the small site in fixtures/site."
import os, shutil, subprocess, sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
DOCS, FIXTURE = ROOT/'docs', ROOT/'tests'/'fixtures'/'site'
if str(DOCS) not in sys.path: sys.path.append(str(DOCS))  # at the end: its modules have plain names

def build(*args:object, env:dict|None=None)->subprocess.CompletedProcess:
    "Run docs/build.py as the Makefile does"
    return subprocess.run([sys.executable, DOCS/'build.py', '--no-quarto', *map(str, args)], capture_output=True, text=True,
                          env=os.environ | (env or {}), timeout=600)

def build_fixture(folder:Path, *args:object)->subprocess.CompletedProcess:
    "Build a copy of the small site in `folder`. It counts as installed there, so that nbdev finds its index of names"
    shutil.copytree(FIXTURE, folder, dirs_exist_ok=True)
    info = folder/'demo-0.1.0.dist-info'
    info.mkdir(exist_ok=True)
    (info/'METADATA').write_text('Metadata-Version: 2.1\nName: demo\nVersion: 0.1.0\n')
    (info/'entry_points.txt').write_text('[nbdev]\ndemo = demo._modidx:d\n')
    return build('--root', folder, *args, env={'PYTHONPATH': str(folder)})
