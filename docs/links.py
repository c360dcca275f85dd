"""Check a built site: every link and anchor leads somewhere on it, ids are unique, no page asks another host for anything."""
from __future__ import annotations
import re
from collections import Counter
from pathlib import Path
from urllib.parse import unquote, urlsplit
from lxml import html

LOADING = {'script': 'src', 'img': 'src', 'link': 'href', 'source': 'src', 'iframe': 'src', 'audio': 'src', 'video': 'src', 'use': 'href', 'image': 'href'}
HTML = '''html head meta title link script style body header nav main aside footer section article div span p a b i u s em strong small sub sup
mark del ins q blockquote cite abbr code pre kbd samp var hr br wbr img picture figure figcaption ul ol li dl dt dd table caption colgroup col
thead tbody tfoot tr th td h1 h2 h3 h4 h5 h6 details summary dialog form input label button select option progress output time address'''
MATH = '''math semantics annotation mrow mi mo mn mtext mspace ms mfrac msqrt mroot mstyle merror mpadded mphantom menclose msub msup
msubsup munder mover munderover mmultiscripts mprescripts none mtable mtr mtd'''
SVG = '''svg g defs path rect circle ellipse line polyline polygon text tspan use clippath mask pattern lineargradient radialgradient
stop marker symbol image desc filter title'''
ELEMENTS = set(f'{HTML} {MATH} {SVG}'.split())

class Doc:
    "One HTML file: its elements, its ids and what it points to"
    def __init__(self, path:Path):
        text = path.read_text(encoding='utf-8')
        self.elements = [e for e in html.document_fromstring(text).iter() if isinstance(e.tag, str)] if text.strip() else []
        self.ids = Counter(e.get('id') for e in self.elements if e.get('id'))

    def problems(self)->list[str]:
        "What is wrong with the file on its own"
        found = [f'the id {i} stands twice' for i, n in self.ids.items() if n > 1]
        found += [f'unknown element <{t}>: is it text that lacks backticks?' for t in sorted({e.tag.lower() for e in self.elements} - ELEMENTS)]
        for e in self.elements:
            url = e.get(LOADING.get(e.tag, 'no-attribute'), '')
            if re.match(r'(https?:)?//', url) and e.get('rel') != 'canonical': found.append(f'loads {url} from another host')
            if re.search(r'url\(\s*["\']?(https?:)?//', e.get('style', '')): found.append('a style loads from another host')
        return found

    def targets(self)->set[str]:
        "Every address that the file links to or loads"
        return {e.get(key) for e in self.elements for key in ('href', LOADING.get(e.tag, 'href')) if e.get(key)}

def style_sheets(out:Path)->list[str]:
    "Addresses in style sheets: files that exist, on this host"
    bad = []
    for css in out.rglob('*.css'):
        if 'pagefind' in css.parts: continue
        for url in re.findall(r'url\(\s*["\']?([^"\')]+)', css.read_text(encoding='utf-8')):
            if url.startswith('data:'): continue
            if re.match(r'(https?:)?//', url) or not (css.parent/url).exists(): bad.append(f'{css.relative_to(out)}: {url}')
    return bad

class Checker:
    """Links of the site in `out`. Addresses under `address` (where it will be served) are on the site as well; those under
    `repository` (…/blob/main/) must be files of the checkout `root`, with as many lines as the link names."""
    def __init__(self, out:Path, address:str='', repository:str='', root:Path|None=None):
        self.out, self.address, self.repository, self.root = out.resolve(), address, repository, root
        self.docs = {p.resolve(): Doc(p) for p in sorted(out.rglob('*.html'))}

    def check(self)->list[str]:
        bad = style_sheets(self.out)
        for path, doc in self.docs.items():
            name = path.relative_to(self.out).as_posix()
            bad += [f'{name}: {p}' for p in doc.problems()]
        return bad + self.links()

    def links(self)->list[str]:
        "Links and anchors that lead nowhere"
        return [f'{path.relative_to(self.out).as_posix()}: {why}' for path, doc in self.docs.items()
                for url in sorted(doc.targets()) if (why := self.broken(path, url))]

    def broken(self, page:Path, url:str)->str|None:
        "Why `url`, found on `page`, leads nowhere"
        if self.repository and url.startswith(self.repository): return self.not_in_checkout(url)
        base = urlsplit(self.address).path
        if self.address and url.startswith(self.address): url, page = url[len(self.address):] or '.', self.out/'index.html'
        elif base and url.startswith(base): url, page = url[len(base):] or '.', self.out/'index.html'
        elif re.match(r'([a-z][a-z+.-]*:|//)', url): return None  # another host: not ours to check
        path, _, anchor = url.partition('#')
        target = (page.parent/unquote(path)).resolve() if path else page
        if target.is_dir(): target = target/'index.html'
        if not target.is_relative_to(self.out): return f'{url} leads out of the site'
        if not target.exists(): return f'{url} leads nowhere'
        if anchor and target in self.docs and unquote(anchor) not in self.docs[target].ids: return f'{url} has no such anchor'

    def not_in_checkout(self, url:str)->str|None:
        path, _, line = url[len(self.repository):].partition('#L')
        file = self.root/path if self.root else None
        if file is None: return None
        if not file.is_file(): return f'{url}: the checkout has no {path}'
        if line and not (line.isdigit() and int(line) <= len(file.read_text(encoding='utf-8').splitlines())):
            return f'{url}: {path} has no line {line}'
