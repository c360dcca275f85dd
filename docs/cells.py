"""From a processed notebook to blocks: the cells and their outputs, as far as a reader is meant to see them.

nbdev has already dropped hidden cells, turned the title cell into front matter, run `show_doc` for every exported name
and linked the names in backticks. What is left is read here into a few plain types, which `page.py` writes as HTML and
`llms.py` as markdown."""
from __future__ import annotations
import base64, json, re
from dataclasses import dataclass, field
from pathlib import Path
import yaml
from definitions import defined, without_docstrings

PICTURES = {'image/svg+xml': 'svg', 'image/png': 'png', 'image/jpeg': 'jpg', 'image/gif': 'gif'}
LONG_DRAWING = 4  # lines: the code of a figure that is longer is folded, unless the cell says otherwise
ANSI = re.compile(r'\x1b\[[0-9;]*[A-Za-z]')
OPTION = re.compile(r'^#\|[ \t]*([\w-]+):[ \t]*(.*)$', re.M)
SHOW_DOC = re.compile(r'\A(?:---\s*)?(?:\[source\]\((?P<source>[^)]*)\)\{[^}]*\}\s*)?(?P<level>#+)\s+(?P<name>[^\n]+)\n+'
                 r'(?P<fence>`{3,})python\n(?P<signature>.*?)\n(?P=fence)\s*(?P<doc>.*)\Z', re.S)

@dataclass
class Prose:
    "Markdown, of a cell or of an output"
    text: str

@dataclass
class Code:
    "What was typed; `fold` is None (never folded), 'open' or 'closed'"
    text: str
    fold: str|None = None
    summary: str = 'Code'

@dataclass
class Text:
    "Plain text that came out; `kind` is 'value', 'stream' or 'error'"
    text: str
    kind: str = 'value'

@dataclass
class Html:
    "Markup that came out, such as the table of a data frame"
    text: str

@dataclass
class Picture:
    "An image that came out; `data` is the text of an SVG, or the bytes of anything else"
    data: str|bytes
    suffix: str
    alt: str = ''
    width: int|None = None

@dataclass
class Float:
    "A labelled output with its caption: a figure or a table"
    label: str
    caption: str
    blocks: list = field(default_factory=list)

@dataclass
class Name:
    "A documented name: what `show_doc` made of it"
    name: str
    signature: str
    doc: str
    source: str = ''  # address of its source
    anchor: str = ''  # of its heading: see `set_anchors`

@dataclass
class Api:
    "A box: documented names, and the code that defines them where the notebook shows it (`#| exports`)"
    names: list[Name]
    code: str = ''

def joined(text:str|list)->str:
    "Notebooks hold text as a string or as a list of lines"
    return text if isinstance(text, str) else ''.join(text)

def options(source:str)->tuple[dict, str]:
    "Split the `#| key: value` lines off a code cell"
    opts = {k: yaml.safe_load(v) if v.strip() else '' for k, v in OPTION.findall(source)}
    return opts, re.sub(r'^#\|.*\n?', '', source, flags=re.M).strip('\n')

def front_matter(nb:dict)->dict:
    "What nbdev wrote into the first cell: title, description, name of the page"
    cell = nb['cells'][0] if nb['cells'] else {'cell_type': ''}
    text = joined(cell.get('source', ''))
    return yaml.safe_load(text.strip().strip('-')) if cell['cell_type'] == 'raw' and text.startswith('---') else {}

def terminal(text:str)->str:
    "What a terminal would show: no colours, and only the last state of a line that was overwritten"
    return '\n'.join(line.rstrip('\r').rsplit('\r', 1)[-1] for line in ANSI.sub('', text).split('\n'))

def output(out:dict, opts:dict)->Prose|Text|Html|Picture|None:
    "One output of a cell, in the richest form that it was stored in"
    if out['output_type'] == 'stream':
        text = terminal(joined(out['text']))
        return Text(text, 'stream') if text.strip() else None
    if out['output_type'] == 'error': return Text(terminal('\n'.join(out['traceback'])), 'error')
    data = {mime: joined(v) if mime != 'application/json' else v for mime, v in out.get('data', {}).items()}
    if 'text/markdown' in data: return Prose(data['text/markdown'])
    for mime, suffix in PICTURES.items():
        if mime not in data: continue
        width = out.get('metadata', {}).get(mime, {}).get('width')
        body = data[mime] if suffix == 'svg' else base64.b64decode(data[mime])
        return Picture(body, suffix, alt=opts.get('fig-alt', ''), width=width)
    if 'text/html' in data: return Html(re.sub(r'<style scoped>.*?</style>', '', data['text/html'], flags=re.S).strip())
    if 'text/latex' in data: return Prose(data['text/latex'])
    text = terminal(data.get('text/plain', ''))
    return Text(text) if text.strip() else None

def api(markdown:str)->Api:
    "Take the markdown of `show_doc` apart"
    m = SHOW_DOC.match(markdown)
    if not m: raise ValueError(f'show_doc wrote something unexpected:\n{markdown[:300]}')
    doc = re.sub(r'\A\*(.+)\*$', r'\1', m['doc'].strip(), flags=re.M)  # its first line comes in italics
    return Api([Name(m['name'].strip(), m['signature'].strip('\n'), doc, m['source'] or '')])

def code_cell(cell:dict)->list:
    "The blocks of one code cell: its source unless hidden, then its outputs"
    opts, source = options(joined(cell['source']))
    if opts.get('include') is False: return []
    outs = [] if opts.get('output') is False else [o for o in (output(x, opts) for x in cell['outputs']) if o]
    label = str(opts.get('label', ''))
    if source.startswith('show_doc('): return [api(o.text) for o in outs if isinstance(o, Prose)]
    blocks = []
    if source and opts.get('echo') is not False:
        drawing = label.startswith('fig-') and source.count('\n') >= LONG_DRAWING
        fold = {True: 'closed', False: None, 'true': 'closed', 'show': 'open'}.get(opts.get('code-fold', drawing))
        blocks.append(Code(source, fold, str(opts.get('code-summary', 'Code of the figure' if drawing else 'Code'))))
    if outs and label.startswith(('fig-', 'tbl-')): outs = [Float(label, str(opts.get(label[:3] + '-cap', '')), outs)]
    return blocks + outs

def is_source(b)->bool:
    "Is this the source of an exported cell, which nbdev puts after the first of its names?"
    return isinstance(b, Code) and b.summary == 'Exported source'

def join_definitions(blocks:list)->list:
    "Bring an exported source and the names that it defines, which stand before and after it, into one box"
    out, rest = [], list(blocks)
    while rest:
        b = rest.pop(0)
        if not is_source(b):
            out.append(b)
            continue
        order = [d.name for d in defined(b.text)]
        mine = lambda x: isinstance(x, Api) and not x.code and x.names[0].name in order
        found = []
        while out and mine(out[-1]): found += out.pop().names
        while rest and mine(rest[0]): found += rest.pop(0).names
        found.sort(key=lambda n: order.index(n.name))
        out.append(Api(found, without_docstrings(b.text, {n.name for n in found})) if found else Code(b.text))
    return out

def set_anchors(names:list[Name]):
    "Anchors are lower case, as nbdev's links expect; `Draw` and `draw` on one page get one each"
    taken = set()
    for n in names:
        n.anchor, again = n.name.lower(), 1
        while n.anchor in taken: n.anchor, again = f'{n.name.lower()}-{again + 1}', again + 1
        taken.add(n.anchor)

def read(path:Path)->tuple[dict, list]:
    "The front matter and the blocks of a processed notebook"
    nb = json.loads(Path(path).read_text(encoding='utf-8'))
    blocks = []
    for cell in nb['cells']:
        source = joined(cell.get('source', ''))
        if cell['cell_type'] == 'code': blocks += code_cell(cell)
        elif cell['cell_type'] == 'markdown' and source.strip() and 'THIS FILE WAS AUTOGENERATED' not in source:
            blocks.append(Prose(source))
    blocks = join_definitions(blocks)
    set_anchors([n for b in blocks if isinstance(b, Api) for n in b.names])
    return front_matter(nb), blocks
