"The renderer of the site, piece by piece and on the small site in fixtures/site."
import json, os, re, shutil, subprocess, sys
from pathlib import Path
import pytest
pytest.importorskip('pypandoc'), pytest.importorskip('bs4')
from bs4 import BeautifulSoup
from site_tools import DOCS, FIXTURE, ROOT, build, build_fixture
import cells, definitions, figures, llms, names, page
from cells import Api, Code, Float, Html, Name, Picture, Prose, Text
from links import Checker
from page import Context, Writer, pandoc

def render(markdown:str, **context)->BeautifulSoup:
    "Markdown as a page shows it; nothing may be left unresolved"
    body, _, problems = pandoc(markdown, Context(**context))
    assert problems == []
    return BeautifulSoup(body, 'lxml')

def problems(markdown:str, **context)->list[str]: return pandoc(markdown, Context(**context))[2]
def written(*blocks)->BeautifulSoup: return render(Writer('x').blocks(list(blocks)))
def text(element)->str: return element.get_text().replace('\u00a0', ' ').strip()

def test_what_quarto_makes_is_checked_and_goes_where_it_was_asked_for(tmp_path, monkeypatch, capsys):
    "With a stand-in for nbdev_docs, which writes to doc_path as the real one does"
    from importlib.util import module_from_spec, spec_from_file_location
    spec = spec_from_file_location('build_of_docs', DOCS/'build.py') # PyPI has a package of the name, too
    spec.loader.exec_module(command := module_from_spec(spec))
    root, out, program = tmp_path/'root', tmp_path/'out', tmp_path/'bin'/'nbdev_docs'
    root.mkdir(); program.parent.mkdir()
    shutil.copy(ROOT/'settings.ini', root/'settings.ini')
    program.write_text(f'#!/bin/sh\nmkdir -p {root}/_docs && echo "<p id=a><a href=\'$HREF\'>x</a><p id=a><script src=https://example.org/x.js></script>" > {root}/_docs/index.html\n')
    program.chmod(0o755)
    monkeypatch.setattr(command.sys, 'executable', str(program.parent/'python'))
    monkeypatch.setenv('HREF', '#a')
    assert command.quarto(root, out) == 0 and (out/'index.html').exists() and 'http.server' in capsys.readouterr().out
    monkeypatch.setenv('HREF', 'none.html')
    assert command.quarto(root, root/'_docs') == 1 and 'none.html leads nowhere' in capsys.readouterr().err

# ---- quarto.lua ------------------------------------------------------------------------------------------------------
def test_equations_are_numbered_in_order_and_referred_to():
    s = render('See @eq-b and [Eq. @eq-a], or [-@eq-b].\n\n$$ a $$ {#eq-a}\n\n$$\nb\n$$ {#eq-b}.\n\n$$ c $$\n')
    assert [text(n) for n in s.select('.eq-num')] == ['(1)', '(2)']
    assert [(a['href'], text(a)) for a in s.select('a.xref')] == [('#eq-b', 'Equation 2'), ('#eq-a', 'Eq. 1'), ('#eq-b', '2')]
    assert s.find(id='eq-a').math and s.find(id='eq-b').math, 'the label stands on the equation'
    assert len(s.select('.equation')) == 3 and '{#' not in s.text

def test_sections_are_called_by_their_titles():
    s = render('## When honesty pays {#sec-gap}\n\nAs @sec-gap says.\n')
    assert text(s.select_one('a.xref')) == '§ When honesty pays' and s.h2['id'] == 'sec-gap'

@pytest.mark.parametrize('label', ['eq-none', 'fig-none', 'tbl-none', 'sec-none'])
def test_an_unresolved_reference_is_a_problem(label): assert label in problems(f'See @{label}.')[0]

def test_other_things_that_are_problems():
    assert 'twice' in problems('$$a$$ {#eq-x}\n\n$$b$$ {#eq-x}\n')[0]
    assert 'nobody1900' in problems('As said [@nobody1900].')[0]
    assert 'none.ipynb' in problems('[text](none.ipynb)')[0]
    assert any('frac' in p for p in problems(r'$\frac{1$')), 'TeX that cannot be read'
    assert any('heading' in p for p in problems('::: {.panel-tabset}\nno heading\n:::\n'))
    assert 'TeX' in problems(r'\begin{align} a \end{align}')[0]
    for glued in ('- item', '* item', '### Heading', '1. item', '| a | b |'): assert 'blank line' in problems(f'text\n{glued}\n')[0]

def test_callouts():
    s = render('::: {.callout-tip title="Take $x<1$"}\nbody\n:::\n\n::: {.callout-note collapse="true"}\n## From a heading\nmore\n:::\n\n::: {.callout-warning}\nbare\n:::\n')
    tip, note, warning = s.select('.callout')
    assert tip.select_one('.callout-title math') and text(tip.select_one('.callout-body')) == 'body'
    assert note.name == 'details' and not note.has_attr('open') and text(note.summary) == 'From a heading' and not note.h2
    assert text(warning.select_one('.callout-title')) == 'Warning'

def test_tabs_work_without_a_script():
    s = render('::: {.panel-tabset}\n### One <b>\nfirst\n\n### Two\nsecond\n:::\n\n::: {.panel-tabset}\n### Three\nthird\n:::\n')
    assert [text(l) for l in s.select('.tabs > label')] == ['One', 'Two', 'Three'] and [text(t) for t in s.select('.tab')] == ['first', 'second', 'third']
    inputs = s.select('.tabs > input')
    assert len({i['id'] for i in inputs}) == 3 and [i.has_attr('checked') for i in inputs] == [True, False, True]
    assert [i['id'] for i in inputs] == [l['for'] for l in s.select('.tabs > label')] and inputs[0]['name'] != inputs[2]['name']

def test_links_between_notebooks():
    pages = {'01_a/02_b.ipynb': '01_a/b.html', 'index.ipynb': 'index.html'}
    s = render('[b](02_b.ipynb#sec-x) [home](../index.ipynb) [far](https://example.org/02_b.ipynb)', folder='01_a', root='../', pages=pages)
    assert [a['href'] for a in s.select('a')] == ['../01_a/b.html#sec-x', '../index.html', 'https://example.org/02_b.ipynb']

def test_links_of_names_follow_the_page():
    md = '[`f`](https://x.org/s/a.html#f) [`f()`](https://x.org/s/a.html#f) [`g`](https://x.org/s/a.html#g) [`h`](https://x.org/s/a.html#h)'
    s = render(md, site='https://x.org/s/', root='../', names={'f': 'b.html#f', 'g': ''})
    assert [a['href'] for a in s.select('a')] == ['../b.html#f', '../b.html#f', '../a.html#h']
    assert 'g' in [text(c) for c in s.select('code')], 'a name that means nothing here stays code'

def test_a_heading_gives_way_to_a_documented_name():
    s = written(Prose('## Brier\n'), Api([Name('brier', 'def brier(q):', 'The loss.', anchor='brier')]))
    assert s.find(id='brier').name == 'h3' and s.h2['id'] == 'section-brier'

def test_tables_scroll_and_set_their_own_widths():
    long = 'word '*30
    s = render(f'| a | b |\n|---|---|\n| {long} | $x$ |\n\n: Caption {{#tbl-t}}\n\nSee @tbl-t.\n')
    assert s.select_one('.scroll[tabindex="0"] > table') and not s.select('col') and text(s.caption).startswith('Table 1. Caption')

def test_punctuation_stays_with_its_formula():
    assert [text(t)[-1] for t in render('So $q = p$, and ($p$).').select('.tied')] == [',', '.']

def test_citations_and_footnotes(tmp_path):
    (tmp_path/'r.bib').write_text('@book{k1, author={Doe, Jane}, title={On Things}, year={1999}}')
    body, _, bad = pandoc('As [@k1] says.[^n]\n\n[^n]: A note.\n', meta={'bibliography': [str(tmp_path/'r.bib')]})
    s = BeautifulSoup(body, 'lxml')
    assert not bad and s.find('a', href='#ref-k1') and 'On Things' in s.find(id='ref-k1').text and text(s.h2) == 'References'
    assert 'A note.' in s.select_one('.footnotes').text

# ---- page.py: outputs, code, figures ---------------------------------------------------------------------------------
def test_what_is_printed_is_text_not_markup():
    nasty = '<script>alert(1)</script> & $x$ *y* ```\n::: {.callout-note}\n`````'
    for block in (Text(nasty), Text(nasty, 'stream'), Code(nasty)):
        s = written(block)
        assert text(s.pre).endswith(nasty[-20:]) and not s.script and not s.em and not s.math and not s.select('.callout')

def test_a_docstring_is_prose_but_never_markup():
    s = written(Api([Name('f', 'def f(x):', 'Reads <think> and `<answer>`; *kindly*.')]))
    assert text(s.select_one('.api-doc')) == 'Reads <think> and <answer>; kindly.' and s.select_one('.api-doc code') and not s.find('think')

def test_folded_code():
    closed, opened = written(Code('1 + 1', 'closed', 'Solution "A" <b>'), Code('2', 'open')).select('details.fold')
    assert text(closed.summary) == 'Solution "A" <b>' and not closed.has_attr('open') and opened.has_attr('open') and '1 + 1' in closed.pre.text

def test_boxes_of_names():
    s = written(Api([Name('g', 'def g(x):', 'Does g.', 'https://x.org/g.py#L1', 'g'), Name('h', 'def h():', '', '', 'h')], 'def g(x): return x\ndef h(): pass'))
    box, = s.select('.api')
    assert [h['id'] for h in box.select('h3')] == ['g', 'h'] and len(box.select('pre')) == 1 and box.select_one('.api-source')['href'].endswith('#L1')
    assert 'def g(x):' in written(Api([Name('g', 'def g(x):', '')])).pre.text

def test_figures_have_captions_numbers_and_alternatives():
    fig = Float('fig-a', 'A *wave* $x$', [Picture(SVG, 'svg')])
    body, _, bad = pandoc(Writer('x').blocks([fig, Float('fig-b', 'B', [Picture(b'\x89PNG', 'png', alt='A "b"')]), Prose('See @fig-b, @fig-a.')]))
    s = BeautifulSoup(body, 'lxml')
    assert not bad and [text(c) for c in s.select('.caption')][1] == 'Figure 2. B' and [text(a) for a in s.select('.xref')] == ['Figure 2', 'Figure 1']
    assert s.find(id='fig-a').svg['aria-label'] == 'A wave x' and s.find(id='fig-b').img['alt'] == 'A "b"'

def test_a_picture_becomes_a_file():
    w = Writer('stem')
    w.block(Picture(b'\x89PNG', 'png'))
    assert w.files == {'stem_files/figure-1.png': b'\x89PNG'}

def test_a_command_that_hangs_is_asked_again(tmp_path, monkeypatch):
    monkeypatch.setattr(page, 'PATIENCE', .5)
    slow = tmp_path/'slow'  # hangs when it is called for the first time
    slow.write_text(f'#!/bin/sh\ntest -e {tmp_path}/seen && exec cat\ntouch {tmp_path}/seen\nexec sleep 20\n')
    slow.chmod(0o755)
    assert page.run([str(slow)], 'text') == ('text', []) and page.run(['sh', '-c', 'echo why >&2; exit 3'], '') == ('', ['why', 'sh ended with 3'])
    with pytest.raises(subprocess.TimeoutExpired): page.run(['sleep', '20'], '')

def test_titles_keep_their_code_and_emphasis():
    assert page.inline('One `a<b*c*` *and* **two** 2 * 3 * 4 & <i>') == 'One <code>a&lt;b*c*</code> <em>and</em> <strong>two</strong> 2 * 3 * 4 &amp; &lt;i&gt;'

# ---- figures.py ------------------------------------------------------------------------------------------------------
SVG = '''<?xml version="1.0"?><!DOCTYPE svg PUBLIC "-//W3C//DTD SVG 1.1//EN" "http://www.w3.org/Graphics/SVG/1.1/DTD/svg11.dtd">
<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" width="72pt" height="36pt" viewBox="0 0 72 36">
<metadata>when</metadata><defs><style type="text/css">*{stroke-linejoin: round}</style><clipPath id="c"><rect width="9" height="9"/></clipPath>
<path id="m" style="stroke: #6B7688"/></defs><g clip-path="url(#c)"><use xlink:href="#m" style="fill: #0f62d4; stroke: #6b7688"/></g></svg>'''

def test_svg_becomes_part_of_the_page():
    out = figures.inline(SVG, 'f1-', 'A & B')
    s = BeautifulSoup(out, 'lxml').svg
    assert s['width'] == '96' and 'height' not in s.attrs and s['aria-label'] == 'A & B' and s['style'] == 'stroke-linejoin: round'
    assert '6b7688' not in out.lower() and out.count('currentColor') == 2 and '#0f62d4' in out, 'the ink alone follows the theme'
    assert {t['id'] for t in s.find_all(id=True)} == {'f1-c', 'f1-m'} and s.use['href'] == '#f1-m' and 'url(#f1-c)' in out
    assert not any(w in out for w in ('<style', 'metadata', 'DOCTYPE', 'xlink'))

def test_a_figure_may_not_restyle_the_page():
    with pytest.raises(ValueError, match='style sheet'): figures.inline(SVG.replace('*{', 'p{'), 'x-')

# ---- cells.py --------------------------------------------------------------------------------------------------------
def notebook(tmp_path, *cells_):
    path = tmp_path/'n.ipynb'
    path.write_text(json.dumps({'cells': list(cells_), 'metadata': {}, 'nbformat': 4, 'nbformat_minor': 5}))
    return path
def code(source, *outputs): return {'cell_type': 'code', 'source': source, 'outputs': list(outputs), 'metadata': {}, 'execution_count': None}
def shows(**data): return {'output_type': 'execute_result', 'data': {k.replace('_', '/'): v for k, v in data.items()}, 'metadata': {}}
def stream(t): return {'output_type': 'stream', 'name': 'stdout', 'text': t}

def test_reading_a_notebook(tmp_path):
    front, blocks = cells.read(notebook(tmp_path,
        {'cell_type': 'raw', 'source': ['---\n', 'title: T\n', 'output-file: t.html\n', '---\n'], 'metadata': {}},
        {'cell_type': 'markdown', 'source': '<!-- WARNING: THIS FILE WAS AUTOGENERATED! DO NOT EDIT! -->', 'metadata': {}},
        {'cell_type': 'markdown', 'source': ['one\n', 'two'], 'metadata': {}},
        code('#| echo: false\nprint(1)', stream('\x1b[31mred\x1b[0m\nwork: 10%\rwork: 100%\n')),
        code('#| output: false\nx', stream('unseen')), code('#| include: false\ny', stream('unseen')),
        code('#| label: tbl-t\n#| tbl-cap: "Cap: a"\nz', shows(text_html='<style scoped>x</style><b>t</b>', text_plain='t'))))
    assert front == {'title': 'T', 'output-file': 't.html'}
    assert blocks == [Prose('one\ntwo'), Text('red\nwork: 100%\n', 'stream'), Code('x'), Code('z'), Float('tbl-t', 'Cap: a', [Html('<b>t</b>')])]

def test_long_drawings_are_folded(tmp_path):
    picture = {'output_type': 'display_data', 'data': {'image/svg+xml': SVG}, 'metadata': {}}
    fold = lambda head, body: cells.read(notebook(tmp_path, {'cell_type': 'raw', 'source': '', 'metadata': {}}, code(f'#| label: {head}\n{body}', picture)))[1][0].fold
    assert fold('fig-a', 'draw()\n'*5) == 'closed' and fold('fig-a', 'draw()') is None and fold('x', 'draw()\n'*5) is None
    assert fold('fig-a\n#| code-fold: false', 'draw()\n'*5) is None and fold('fig-a\n#| code-fold: show', 'draw()') == 'open'

def test_show_doc_is_taken_apart(tmp_path):
    doc = '---\n\n[source](https://x.org/a.py#L3){target="_blank" style=""}\n\n### f\n\n```python\n\ndef f(\n    x:int, # a\n):\n\n\n```\n\n*First line*\nsecond *line*.'
    _, (box,) = cells.read(notebook(tmp_path, code('show_doc(f)', shows(text_markdown=doc))))
    assert box == Api([Name('f', 'def f(\n    x:int, # a\n):', 'First line\nsecond *line*.', 'https://x.org/a.py#L3', 'f')])

def test_names_that_differ_in_case_have_an_anchor_each():
    names_ = [Name(n, '', '') for n in ('Draw', 'draw', 'other')]
    cells.set_anchors(names_)
    assert [n.anchor for n in names_] == ['draw', 'draw-2', 'other']

def test_an_exported_source_joins_its_names(tmp_path):
    doc = lambda n: code(f'show_doc({n})', shows(text_markdown=f'---\n\n### {n}\n\n```python\n\ndef {n}()\n\n```\n\n*Does {n}.*'))
    source = '#| code-fold: show\n#| code-summary: "Exported source"\nK = 1\ndef a():\n    "Does a."\n    return K\n\ndef b():\n    "Does b."\n    return a()'
    _, blocks = cells.read(notebook(tmp_path, doc('other'), doc('a'), code(source), doc('b'), code('a()')))
    assert [type(b) for b in blocks] == [Api, Api, Code] and [n.name for n in blocks[1].names] == ['a', 'b']
    assert blocks[1].code == 'K = 1\ndef a():\n    return K\n\ndef b():\n    return a()'

# ---- definitions.py, names.py ----------------------------------------------------------------------------------------
def test_outlines():
    text = ('import x\n@dataclass\nclass C(B):\n    "Doc"\n    é: int = 1 # ünit\n    def f(self, by:int, # how much\n         )->"C":\n        "Does f"\n        return 1\n'
            '    def _g(self): pass\n    def __call__(self): return 2\n\ndef h(x, # the ü\n     ): return x\n')
    assert definitions.outline(text, 'C') == ('@dataclass\nclass C(B):\n    é: int = 1 # ünit\n    def f(self, by:int, # how much\n         )->"C":\n'
                                              '        "Does f"\n    def __call__(self):')
    assert definitions.outline(text, 'h') == 'def h(x, # the ü\n     ):' and definitions.outline(text, 'C.f').startswith('    def f(self')
    assert definitions.find(text, 'C.f').lineno == 6 and definitions.find(text, 'none') is None and definitions.find('not python', 'x') is None

def test_a_docstring_stays_where_it_is_all_there_is():
    assert definitions.without_docstrings('def f(): "only"', {'f'}) == 'def f(): "only"'
    assert definitions.without_docstrings('def f():\n    "doc"\n    return 1', {'g'}) == 'def f():\n    "doc"\n    return 1'

INDEX = {'lib.core.a': {'f': 'core/a.html#f', 'same': 'core/a.html#same', 'C': 'core/a.html#c', 'C.m': 'core/a.html#c.m'},
         'lib.p.b': {'same': 'p/b.html#same', 'near': 'p/b.html#near'}, 'lib.p.c': {'own': 'p/c.html#own'}, 'lib.q.d': {'near': 'q/d.html#near'}}
BOXES = {'core/a.html': {'f': 'f', 'same': 'same', 'C': 'c'}, 'p/b.html': {'same': 'same-2', 'near': 'near'}, 'p/c.html': {'own': 'own'}, 'q/d.html': {'near': 'near'}}
def meaning(tmp_path, name, *sources):
    return names.Names(INDEX, notebook(tmp_path, code('#| default_exp p.c'), *map(code, sources)), 'lib').target(name, BOXES)

def test_a_name_means_what_the_page_means(tmp_path):
    assert meaning(tmp_path, 'own') == 'p/c.html#own', 'its own'
    assert meaning(tmp_path, 'same', 'from lib.p.b import same') == 'p/b.html#same-2', 'what it imports'
    assert meaning(tmp_path, 'same', 'from ..core.a import same') == 'core/a.html#same', 'relative'
    assert meaning(tmp_path, 'same', 'from elsewhere import same') == '', "somebody else's"
    assert meaning(tmp_path, 'f') == 'core/a.html#f', 'the only one'
    assert meaning(tmp_path, 'near') == 'p/b.html#near', "the only one in the paper's folder"
    assert meaning(tmp_path, 'lib.q.d.near') == 'q/d.html#near', 'in full'
    assert meaning(tmp_path, 'C.m') == 'core/a.html#c', 'a method is found in the box of its class'

# ---- links.py --------------------------------------------------------------------------------------------------------
def check(tmp_path, body, **files):
    (tmp_path/'index.html').write_text(f'<html><body>{body}</body></html>')
    (tmp_path/'other.html').write_text('<h2 id="there">x</h2>')
    return Checker(tmp_path, 'https://x.org/s/', 'https://git.org/blob/main/', ROOT).check()

@pytest.mark.parametrize('body', ['<a href="other.html#there">a</a>', '<a href="https://far.org/x">a</a>', '<a href="https://x.org/s/other.html">a</a>',
    '<a href="/s/other.html">a</a>', '<a href="https://git.org/blob/main/settings.ini#L2">a</a>', '<a href="#i">a</a><b id="i">b</b>', '<img src="data:image/png;base64,">'])
def test_links_that_are_right(tmp_path, body): assert check(tmp_path, body) == []

@pytest.mark.parametrize('body, why', [('<a href="none.html">a</a>', 'leads nowhere'), ('<a href="other.html#none">a</a>', 'no such anchor'),
    ('<a href="../../etc/x">a</a>', 'out of the site'), ('<a href="https://x.org/s/none.html">a</a>', 'leads nowhere'), ('<b id="i"></b><b id="i"></b>', 'stands twice'),
    ('<script src="https://cdn.org/x.js"></script>', 'another host'), ('<img src="//cdn.org/x.png">', 'another host'), ('<think>hm</think>', 'unknown element'),
    ('<p style="background: url(https://cdn.org/x)">a</p>', 'another host'), ('<a href="https://git.org/blob/main/none.py">a</a>', 'no none.py'),
    ('<a href="https://git.org/blob/main/settings.ini#L99999">a</a>', 'no line')])
def test_links_that_are_wrong(tmp_path, body, why):
    found = check(tmp_path, body)
    assert len(found) == 1 and why in found[0]

# ---- the small site --------------------------------------------------------------------------------------------------
@pytest.fixture(scope='module')
def demo(tmp_path_factory):
    folder = tmp_path_factory.mktemp('demo')
    run = build_fixture(folder)
    assert run.returncode == 0, run.stderr
    return folder
@pytest.fixture
def copy(demo, tmp_path):
    "The small site with what was processed, to change"
    return shutil.copytree(demo, tmp_path/'copy')
def rebuild(folder, *args): return build('--root', folder, '--no-search', *args, env={'PYTHONPATH': str(folder)})

def soup(demo, name): return BeautifulSoup((demo/'_docs'/name).read_text(), 'lxml')

def test_everything_a_notebook_may_use(demo):
    s = soup(demo, '01_shapes/overview.html')
    assert [text(n) for n in s.select('.eq-num')] == ['(1)', '(2)', '(3)'] and len(s.select('.callout')) == 5
    assert [text(c).split('.')[0] for c in s.select('.caption, caption')] == ['Table 1', 'Figure 1', 'Figure 2', 'Table 2']
    assert s.find(id='ref-brier1950') and s.select_one('.tabs') and s.select_one('details.fold') and s.select_one('table.dataframe')
    assert 'nothing of this cell is shown' not in s.text and 'only the output' in s.text and "print('only the output" not in s.text

def test_names_are_linked_to_the_right_pages(demo):
    s = soup(demo, '01_shapes/area.html')
    links = {text(a.code): a['href'] for a in s.select('article p a') if a.code}
    assert links['area'] == '../01_shapes/area.html#area' and links['volume'] == '../01_shapes/volume.html#volume'
    assert links['Disc.scale'] == '../01_shapes/area.html#disc' and links['measure'] == '../01_shapes/area.html#measure'
    assert soup(demo, '01_shapes/volume.html').select_one('article p a[href="../01_shapes/volume.html#measure"]')
    sources = [a['href'] for a in s.select('.api-source')]
    lines = (demo/'demo'/'area.py').read_text().splitlines()
    assert [lines[int(u.partition('#L')[2]) - 1].split('(')[0].rstrip(':') for u in sources] == ['def area', 'class Disc', 'def measure']
    volume = soup(demo, '01_shapes/volume.html')
    assert volume.find(id='measure').find_previous('a')['href'].endswith('/demo/volume.py#L17') and 'def measure(r:float)' in volume.find(id='measure').find_next('pre').text, \
        'not the function of the same name in the other module'
    assert 'def scale' in s.find(id='disc').find_next('pre').text, 'a class is shown by its fields and methods'

def test_every_page_leads_on_and_back(demo):
    s = soup(demo, '01_shapes/area.html')
    assert s.select_one('[rel=prev]')['href'] == '../01_shapes/overview.html' and s.select_one('[rel=next]')['href'] == '../01_shapes/volume.html'
    assert [text(li) for li in s.select('.crumbs li')] == ['Home', '1 · Shapes', 'Area'] and text(s.select_one('.side [aria-current]')) == 'Area'
    download, colab, source = [a['href'] for a in s.select('.actions a')]
    assert json.loads((demo/'_docs'/'01_shapes'/download).resolve().read_text()) == json.loads((demo/'nbs/01_shapes/01_area.ipynb').read_text())
    assert colab == 'https://colab.research.google.com/github/someone/demo/blob/main/nbs/01_shapes/01_area.ipynb'
    assert source == 'https://github.com/someone/demo/blob/main/nbs/01_shapes/01_area.ipynb'

def test_machines_can_read_it(demo):
    index = (demo/'_docs/llms.txt').read_text()
    assert index.startswith('# Demo\n\n> ') and '## Start here' in index and '## 1 · Shapes' in index
    for url in re.findall(r'\]\((\S+)\)', index): assert (demo/'_docs'/url.removeprefix('https://demo.example.org/demo/')).exists()
    area = (demo/'_docs/01_shapes/area.md').read_text()
    assert area.startswith('# Area\n\n> Functions') and 'return math.pi' in area and '3.14159' in area
    assert area in (demo/'_docs/llms-full.txt').read_text() and '| 0 | Brier | 0.25 |' in (demo/'_docs/01_shapes/overview.md').read_text()
    assert '<loc>https://demo.example.org/demo/01_shapes/area.html</loc>' in (demo/'_docs/sitemap.xml').read_text()

def test_the_page_for_wrong_addresses_stands_alone(demo):
    s = soup(demo, '404.html')
    assert not s.select('link, script, img') and s.a['href'] == 'https://demo.example.org/demo/'

def test_a_second_build_processes_only_what_changed(copy):
    dates = lambda: {p.name: p.stat().st_mtime_ns for p in (copy/'_proc').rglob('*.ipynb')}
    before, path = dates(), copy/'nbs/01_shapes/02_volume.ipynb'
    path.write_text(path.read_text().replace('Here `measure`', 'On this page `measure`'))
    assert rebuild(copy).returncode == 0
    assert [n for n, date in dates().items() if date != before[n]] == ['02_volume.ipynb']
    assert 'On this page' in soup(copy, '01_shapes/volume.html').text

def test_strict_builds_want_navigation_and_notebooks_to_agree(copy):
    run = rebuild(copy, '--strict')
    assert run.returncode == 1 and '99_not_written_yet' in run.stderr
    (copy/'nbs/01_shapes/02_volume.ipynb').rename(copy/'nbs/01_shapes/03_moved.ipynb')
    run = rebuild(copy)
    assert 'lists 01_shapes/02_volume.ipynb' in run.stderr and '03_moved.ipynb: not in the sidebar' in run.stderr

def test_broken_notebooks_are_reported_together(copy):
    for name, source in {'01_area': 'import none_such', '02_volume': 'from demo import none_such'}.items():
        path = copy/f'nbs/01_shapes/{name}.ipynb'
        nb = json.loads(path.read_text())
        nb['cells'].insert(2, code(source) | {'id': 'broken'})
        path.write_text(json.dumps(nb))
    run = rebuild(copy)
    assert run.returncode == 1 and '01_area.ipynb: ModuleNotFoundError' in run.stderr and '02_volume.ipynb: ImportError' in run.stderr

def test_a_folder_that_holds_something_else_is_left_alone(copy, tmp_path):
    (tmp_path/'precious').mkdir()
    (tmp_path/'precious'/'thesis.txt').write_text('years of work')
    run = rebuild(copy, '--out', tmp_path/'precious')
    assert run.returncode == 1 and 'choose another --out' in run.stderr and (tmp_path/'precious'/'thesis.txt').exists()

def test_quarto_is_used_where_it_is(tmp_path):
    "nbdev's command is called in the project's folder, and nothing else is done"
    shutil.copytree(FIXTURE, tmp_path/'site')
    (tmp_path/'bin').mkdir()
    for name, does in {'quarto': 'true', 'nbdev_docs': f'pwd > {tmp_path}/called', 'python': f'exec {sys.executable} "$@"'}.items():
        (tmp_path/'bin'/name).write_text(f'#!/bin/sh\n{does}\n')
        (tmp_path/'bin'/name).chmod(0o755)
    program = f"import sys; sys.executable = {str(tmp_path/'bin'/'python')!r}; sys.argv = ['build.py', '--root', {str(tmp_path/'site')!r}]; sys.path.insert(0, {str(DOCS)!r}); import runpy; runpy.run_path({str(DOCS/'build.py')!r}, run_name='__main__')"
    run = subprocess.run([sys.executable, '-c', program], env=os.environ | {'PATH': f"{tmp_path/'bin'}:{os.environ['PATH']}"}, capture_output=True, text=True)
    assert run.returncode == 0 and (tmp_path/'called').read_text().strip() == str(tmp_path/'site') and not (tmp_path/'site'/'_docs').exists()

# ---- the notebooks ---------------------------------------------------------------------------------------------------
NOTEBOOKS = sorted(p for p in (ROOT/'nbs').rglob('*.ipynb') if not any(x.startswith(('.', '_')) for x in p.relative_to(ROOT/'nbs').parts))

@pytest.mark.parametrize('path', NOTEBOOKS, ids=lambda p: p.relative_to(ROOT/'nbs').as_posix())
def test_the_title_cell_holds_title_and_subtitle_alone(path:Path):
    "nbdev turns that cell into the front matter of the page, and drops whatever else stands in it"
    title = next(''.join(c['source']) for c in json.loads(path.read_text())['cells'] if c['cell_type'] == 'markdown')
    assert re.fullmatch(r'# \S.*\n+> \S.*\s*', title), title
