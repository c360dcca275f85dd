"""The whole site: what `_quarto.yml` and settings.ini say about it, its navigation, and the files it is made of."""
from __future__ import annotations
import os, shutil, subprocess, sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
import jinja2, yaml
from markupsafe import Markup
import llms, names
from cells import Api, Name
from definitions import find, outline
from page import HERE, Context, Page, inline
from settings import settings

@dataclass
class Section:
    "A part of the navigation: pages under a title"
    text: str
    pages: list = field(default_factory=list)

class Website:
    "The site made of the processed notebooks in `proc`, for the checkout `root`"
    def __init__(self, root:Path, proc:Path, out:Path):
        self.root, self.proc, self.out, self.problems, self.missing = root, proc, out, [], []
        self.settings = settings(root)
        self.nbs = root/self.settings['nbs_path']
        self.config = yaml.safe_load((self.nbs/'_quarto.yml').read_text(encoding='utf-8'))
        self.web = self.config['website']
        self.title, self.description = self.web['title'], self.web.get('description', '')
        self.address = self.web['site-url'].rstrip('/') + '/'
        self.repository, self.branch = self.settings['git_url'].rstrip('/'), self.settings['branch']
        self.footer = self.web.get('page-footer', {}).get('center', '')
        self.pages = {p.rel: p for p in map(self._page, sorted(proc.rglob('*.ipynb')))}
        self.sections = self._sections()
        self.top = self._links(self.web.get('navbar', {}).get('left', []))
        self.order = [p for s in self.sections for p in s.pages]
        for before, after in zip(self.order, self.order[1:]): before.next, after.prev = after, before
        unlisted = [p for p in self.pages.values() if p not in self.order]
        self.missing += [f'{p.rel}: not in the sidebar of _quarto.yml' for p in unlisted]

    def _page(self, path:Path)->Page:
        page = Page(path, path.relative_to(self.proc).as_posix())
        module = names.module(names.code_cells(self.nbs/page.rel), self.settings['lib_name'])
        file = self.root/f"{module.replace('.', '/')}.py"
        text = file.read_text(encoding='utf-8') if module and file.is_file() else ''
        for box in (b for b in page.blocks if isinstance(b, Api)):
            for n in box.names: self._complete(n, text, file)
        return page

    def _complete(self, n:Name, text:str, file:Path):
        """The address of the source, and the signature as it was written. nbdev links to the first module that has the name;
        `show_doc` resolves the names of types, and shows a class as a call of its constructor"""
        node = find(text, n.name)
        if node is None: return  # documented here, but defined elsewhere
        n.source = f'{self.repository}/blob/{self.branch}/{file.relative_to(self.root).as_posix()}#L{node.lineno}'
        n.signature = outline(text, n.name)

    def _links(self, entries:list)->list:
        "Pages that `_quarto.yml` lists; one that is not there yet is noted and left out"
        found = []
        for e in entries:
            e = {'href': e} if isinstance(e, str) else e
            if e['href'] in self.pages: found.append((e.get('text'), self.pages[e['href']]))
            else: self.missing.append(f"_quarto.yml lists {e['href']}, which is not there")
        return found

    def _sections(self)->list[Section]:
        sections = []
        for entry in self.web['sidebar']['contents']:
            section = entry.get('section', '') if isinstance(entry, dict) else ''
            if section or not sections or sections[-1].text: sections.append(Section(section))
            for text, page in self._links(entry['contents'] if section else [entry]):
                page.text, page.section = text or page.title, section
                sections[-1].pages.append(page)
        return [s for s in sections if s.pages]

    # ---- addresses of a page elsewhere
    def source(self, p:Page)->str: return f"{self.repository}/blob/{self.branch}/{self.settings['nbs_path']}/{p.rel}"
    def colab(self, p:Page)->str:
        return self.source(p).replace('https://github.com/', 'https://colab.research.google.com/github/')

    # ---- building
    def build(self):
        "Write everything but the search index"
        self._clear()
        shutil.copytree(HERE/'static', self.out/'assets')
        self._render()
        self._copy_files()
        self._write_for_machines()

    def _clear(self):
        "Make way for the site: an older one is removed, a folder that holds something else is not"
        mark = self.out/'.nojekyll'  # GitHub Pages would hide files that begin with an underscore; also the sign of a built site
        ours = mark.exists() or self.out == self.root/self.settings['doc_path']
        if self.out.exists() and any(self.out.iterdir()) and not ours: sys.exit(f'{self.out} holds something that is not a site: choose another --out')
        shutil.rmtree(self.out, ignore_errors=True)
        self.out.mkdir(parents=True)
        mark.touch()

    def _context(self, p:Page, index:dict, documented:dict)->Context:
        meant = names.Names(index, self.nbs/p.rel, self.settings['lib_name']).targets(documented)
        return Context(self.address, p.folder, p.root, {r: q.url for r, q in self.pages.items()}, meant)

    def _render(self):
        index = names.load_index(self.root/self.settings['lib_path']/'_modidx.py')
        documented = {p.url: p.anchors for p in self.pages.values()}
        bibliography = self.config.get('bibliography', [])
        meta = {'bibliography': [str(self.nbs/b) for b in ([bibliography] if isinstance(bibliography, str) else bibliography)]}
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            results = pool.map(lambda p: p.render(self._context(p, index, documented), meta), self.pages.values())
        env = jinja2.Environment(loader=jinja2.FileSystemLoader(HERE/'templates'), autoescape=True, trim_blocks=True, lstrip_blocks=True)
        env.filters['inline'] = inline
        for p, (files, problems) in zip(self.pages.values(), results):
            self.problems += problems
            for name, data in files.items(): self._write(name, data)
            self._write(p.url, env.get_template('page.html').render(site=self, page=p, root=p.root, body=Markup(p.body), toc=Markup(p.toc)))
            self._write(p.rel, (self.nbs/p.rel).read_bytes())  # the notebook itself, to download
        self._write('404.html', env.get_template('404.html').render(site=self))

    def _copy_files(self):
        "Style sheet, images and other files that the notebooks refer to"
        for f in self.nbs.rglob('*'):
            rel = f.relative_to(self.nbs)
            if not f.is_file() or any(part[0] in '._' for part in rel.parts): continue
            if f.suffix not in ('.ipynb', '.yml', '.bib', '.py'): self._write(rel.as_posix(), f.read_bytes())

    def _write_for_machines(self):
        for p in self.pages.values(): self._write(p.markdown_url, llms.page_text(p))
        self._write('llms.txt', llms.index(self.title, self.description, self.address, self.order))
        self._write('llms-full.txt', llms.full(self.order))
        urls = '\n'.join(f"  <url><loc>{self.address}{p.url.removesuffix('index.html')}</loc></url>" for p in self.order)
        self._write('sitemap.xml', f'<?xml version="1.0" encoding="UTF-8"?>\n<urlset xmlns="http://www.sitemaps.org/schemas/sitemap/0.9">\n{urls}\n</urlset>\n')
        self._write('robots.txt', f'User-agent: *\nAllow: /\nSitemap: {self.address}sitemap.xml\n')

    def _write(self, name:str, data:str|bytes):
        path = self.out/name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data.encode() if isinstance(data, str) else data)

    def index_for_search(self):
        "Pagefind reads the pages and writes its index beside them"
        r = subprocess.run([sys.executable, '-m', 'pagefind', '--site', str(self.out), '--quiet'], capture_output=True, text=True)
        if r.returncode: self.problems.append(f'pagefind: {r.stderr or r.stdout}')
