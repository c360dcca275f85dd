"""Put into every notebook the cell that makes it run on Colab: `python docs/colab.py`.

Colab opens a notebook from the repository without the rest of it. So the first code of each is one cell that fetches the project
into Colab's working folder, for pages read stored evidence, and installs what it needs. Elsewhere the cell does nothing: it is left
out of the site and of the tests, and a local kernel runs a shell's test of one variable."""
from __future__ import annotations
import argparse, json
from pathlib import Path
from settings import settings

ID = 'colab'

def source(url:str)->str: # of the cell
    return f"""#| hide
#| eval: false
# Google Colab only: the project into the working folder, and what its notebooks need
! [ -z "$COLAB_RELEASE_TAG" ] || {{ git clone -q --depth 1 {url} /tmp/suite && cp -rT /tmp/suite . && pip install -q '.[train,serve]'; }}"""

def with_cell(notebook:str, url:str)->str: # both as JSON
    "The notebook with the cell, below its title; a notebook that has it is brought up to date"
    nb = json.loads(notebook)
    cell = dict(cell_type='code', execution_count=None, id=ID, metadata={}, outputs=[], source=source(url).splitlines(True))
    cells = [c for c in nb['cells'] if c['id'] != ID]
    title = next(i for i, c in enumerate(cells) if c['cell_type'] == 'markdown')
    nb['cells'] = cells[:title + 1] + [cell] + cells[title + 1:]
    return json.dumps(nb, sort_keys=True, indent=1, ensure_ascii=False) + '\n' # as nbdev writes it

def main():
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument('--root', type=Path, default=Path(__file__).resolve().parents[1], help='folder of settings.ini')
    root = p.parse_args().root
    s = settings(root)
    for f in sorted((root/s['nbs_path']).rglob('*.ipynb')):
        if any(x.startswith(('.', '_')) for x in f.relative_to(root).parts): continue
        old = f.read_text(encoding='utf-8')
        if (new := with_cell(old, s['git_url'])) != old: f.write_text(new, encoding='utf-8')

if __name__ == '__main__': main()
