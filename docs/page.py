"""One page: blocks to pandoc's markdown, pandoc to HTML, HTML into the template."""
from __future__ import annotations
import html, json, re, subprocess, tempfile
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
import pypandoc, yaml
from markupsafe import Markup
import cells, figures
from cells import Api, Code, Float, Html, Picture, Prose, Text
from highlight import highlight

HERE = Path(__file__).parent
READER = 'markdown+autolink_bare_uris-latex_macros'
DEPTH = 3       # of the table of contents
PATIENCE = 120  # seconds for one page; it takes one or two

def inline(text:str)->Markup:
    "A title or subtitle, which nbdev keeps as one line of text: code and emphasis"
    parts = re.split(r'`([^`]+)`', html.escape(text, quote=False))  # text, code, text, code, ...
    for i in range(0, len(parts), 2):
        for mark, tag in ((r'\*\*', 'strong'), (r'\*', 'em')):
            parts[i] = re.sub(rf'{mark}(\S(?:.*?\S)?){mark}', rf'<{tag}>\1</{tag}>', parts[i])
    return Markup(''.join(f'<code>{p}</code>' if i % 2 else p for i, p in enumerate(parts)))

def fence(text:str, attrs:str)->str:
    "A fenced block around `text`, with more backticks than any line of it starts with"
    n = max([2, *(len(m) for m in re.findall(r'^\s*(`{3,})', text, flags=re.M))]) + 1
    return f"{'`'*n}{attrs}\n{text.rstrip()}\n{'`'*n}"

def plain_markup(text:str)->str:
    "Prose of a docstring: a `<tag>` outside backticks is text, not markup"
    parts = re.split(r'(`+[^`]*`+)', text)
    return ''.join(p if p.startswith('`') else p.replace('<', r'\<') for p in parts)

def div(attrs:str, *blocks:str)->str:
    "A fenced div; the fence is longer than any inside it"
    body = '\n\n'.join(blocks)
    n = max([2, *(len(m) for m in re.findall(r'^(:{3,})', body, flags=re.M))]) + 1
    return f"{':'*n} {{{attrs}}}\n{body}\n{':'*n}"

def quoted(text:str)->str: return '"' + text.replace('\\', r'\\').replace('"', r'\"') + '"'

class Writer:
    "Blocks as the markdown that quarto.lua understands; pictures that are not SVG become files, kept in `files`"
    def __init__(self, stem:str=''): self.stem, self.files, self.count = stem, {}, 0

    def blocks(self, blocks:list)->str: return '\n\n'.join(self.block(b) for b in blocks) + '\n'

    def block(self, b)->str:
        match b:
            case Prose(): return b.text
            case Code(): return self.code(b)
            case Text(): return fence(b.text, '{.output .%s}' % b.kind)
            case Html(): return div('.output-html', fence(b.text, '{=html}'))
            case Picture(): return self.picture(b)
            case Float(): return self.labelled(b)
            case Api(): return self.api(b)
        raise TypeError(f'not a block: {b!r}')

    def code(self, b:Code)->str:
        text = fence(b.text, '{.python .cell-code}')
        return div(f".fold open={'true' if b.fold == 'open' else 'false'} summary={quoted(b.summary)}", text) if b.fold else text

    def picture(self, b:Picture)->str:
        self.count += 1
        if b.suffix == 'svg':
            return fence(f"<div class=\"picture\">{figures.inline(b.data, f'f{self.count}-', b.alt)}</div>", '{=html}')
        name = f'{self.stem}_files/figure-{self.count}.{b.suffix}'
        self.files[name] = b.data
        width = f' width="{b.width}"' if b.width else ''
        return fence(f'<div class="picture"><img src="{name}" alt="{html.escape(b.alt or "Figure")}"{width}></div>', '{=html}')

    def labelled(self, b:Float)->str:
        for p in b.blocks:
            if isinstance(p, Picture) and not p.alt: p.alt = re.sub(r'[`$*\\]', '', b.caption)
        body, caption = [self.block(x) for x in b.blocks], div('.caption', b.caption)
        return div(f'#{b.label} .float .{b.label[:3]}', *([*body, caption] if b.label.startswith('fig') else [caption, *body]))

    def api(self, b:Api)->str:
        parts = []
        for n in b.names:
            if n.source: parts.append(f'[source]({n.source}){{.api-source}}')
            parts.append(f'### `{n.name}` {{.api-name anchor={quoted(n.anchor)}}}')
            if n.doc: parts.append(div('.api-doc', plain_markup(n.doc)))
            if not b.code: parts.append(fence(n.signature, '{.python .cell-code}'))
        if b.code: parts.append(fence(b.code, '{.python .cell-code}'))
        return div(f'.api names={quoted(" ".join(n.anchor for n in b.names))}', *parts)

@dataclass
class Context:
    "What the filter needs to know to resolve links: see quarto.lua"
    site: str = 'https://example.invalid/'
    folder: str = ''
    root: str = ''
    pages: dict = None
    names: dict = None

def run(cmd:list[str], text:str, tries:int=2)->tuple[str, list[str]]:
    "What a command makes of `text`, and what it complains of. On a machine that is overwhelmed pandoc was seen to hang: it is asked again"
    try: r = subprocess.run(cmd, input=text, capture_output=True, text=True, encoding='utf-8', timeout=PATIENCE)
    except subprocess.TimeoutExpired:
        if tries == 1: raise
        return run(cmd, text, tries - 1)
    problems = [line for line in r.stderr.splitlines() if line.strip()]
    return r.stdout, problems + [f'{Path(cmd[0]).name} ended with {r.returncode}']*(r.returncode != 0)

def pandoc(markdown:str, context:Context|None=None, meta:dict|None=None)->tuple[str, str, list[str]]:
    "Body, table of contents, and what could not be resolved"
    context, meta = context or Context(), dict(meta or {})
    if not re.search(r'^#+ References\b', markdown, flags=re.M): meta['reference-section-title'] = 'References'
    with tempfile.TemporaryDirectory() as tmp:
        t = Path(tmp)
        (t/'context.json').write_text(json.dumps(vars(context) | {'pages': context.pages or {}, 'names': context.names or {}}))
        (t/'meta.yml').write_text(yaml.safe_dump(meta | {'context': str(t/'context.json'), 'link-citations': True, 'pagetitle': 'page'}))
        cmd = [pypandoc.get_pandoc_path(), '--from', READER, '--to', 'html5', '--template', HERE/'templates/fragment.html',
               '--metadata-file', t/'meta.yml', '--lua-filter', HERE/'quarto.lua', '--citeproc', '--mathml', '--wrap=none', '--syntax-highlighting=none',
               '--toc', f'--toc-depth={DEPTH}']
        try: out, problems = run([str(c) for c in cmd], markdown)
        except subprocess.TimeoutExpired: return '', '', [f'pandoc gave no answer within {PATIENCE} s, twice']
    body, _, toc = out.partition('<!--TABLE-OF-CONTENTS-->')
    return tidy(highlight(body)), re.sub(r' id="toc-[^"]*"', '', toc).strip(), problems

def tidy(body:str)->str:
    "Small repairs of pandoc's HTML"
    body = re.sub(r'<pre class="output', '<pre data-pagefind-ignore class="output', body)
    body = re.sub(r'<h1([^>]*id="bibliography"[^>]*)>(.*?)</h1>', r'<h2\1>\2</h2>', body)
    return body.replace('<annotation ', '<annotation data-pagefind-ignore ')  # else an excerpt says every formula twice

class Page:
    "One notebook's page"
    def __init__(self, path:Path, rel:str):
        self.rel = rel                                  # of the notebook, from the folder of the notebooks
        self.front, self.blocks = cells.read(path)
        self.title, self.lead = str(self.front.get('title', Path(rel).stem)), str(self.front.get('description', ''))
        self.url = Path(rel).with_name(self.front.get('output-file', Path(rel).stem + '.html')).as_posix()
        self.text = self.title                          # in the navigation, which may call it by a shorter name
        self.section = ''                               # of the navigation
        self.toc, self.body = '', ''
        self.prev = self.next = None

    @cached_property
    def root(self)->str: return '../'*self.url.count('/')
    @property
    def folder(self)->str: return Path(self.rel).parent.as_posix()
    @property
    def markdown_url(self)->str: return self.url.removesuffix('.html') + '.md'
    @property
    def anchors(self)->dict[str, str]: return {n.name: n.anchor for b in self.blocks if isinstance(b, Api) for n in b.names}

    def render(self, context:Context, meta:dict)->tuple[dict[str, bytes], list[str]]:
        "Fill `body` and `toc`; return the files that the page needs beside it, and the problems met"
        w = Writer(Path(self.url).stem)
        try: text = w.blocks(self.blocks)
        except ValueError as e: return {}, [f'{self.rel}: {e}']
        self.body, self.toc, problems = pandoc(text, context, meta)
        home = Path(self.url).parent
        return {(home/name).as_posix(): data for name, data in w.files.items()}, [f'{self.rel}: {p}' for p in problems]
