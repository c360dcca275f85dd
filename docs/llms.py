"""The site for language models: one markdown file a page, an index of them (llms.txt) and all in one (llms-full.txt)."""
from __future__ import annotations
import re
from bs4 import BeautifulSoup
from cells import Api, Code, Float, Html, Picture, Prose, Text
from page import Page, fence

def html_text(markup:str)->str:
    "The text of an HTML output; a table keeps its rows"
    soup = BeautifulSoup(markup, 'lxml')
    for row in soup.find_all('tr'):
        row.replace_with('| ' + ' | '.join(c.get_text(' ', strip=True) for c in row.find_all(['th', 'td'])) + ' |\n')
    return re.sub(r'\n\s*\n+', '\n', soup.get_text()).strip()

def write(b)->str:
    "One block as markdown"
    match b:
        case Prose(): return b.text.strip()
        case Code(): return fence(b.text, 'python')
        case Text(): return fence(b.text, 'text')
        case Html(): return html_text(b.text)
        case Picture(): return f'[figure: {b.alt}]' if b.alt else '[figure]'
        case Float(): return '\n\n'.join([*(write(x) for x in b.blocks if not isinstance(x, Picture)), f'[{b.label}] {b.caption}'])
        case Api():
            parts = [part for n in b.names for part in (f'### {n.name}', n.doc, '' if b.code else fence(n.signature, 'python'))]
            return '\n\n'.join(p for p in [*parts, fence(b.code, 'python') if b.code else ''] if p)
    raise TypeError(f'not a block: {b!r}')

def page_text(p:Page)->str:
    "A page as markdown"
    head = f'# {p.title}\n\n' + (f'> {p.lead}\n\n' if p.lead else '')
    return head + '\n\n'.join(t for t in map(write, p.blocks) if t) + '\n'

def index(title:str, description:str, address:str, pages:list[Page])->str:
    "llms.txt: what there is, and where, in the order of the navigation"
    lines, section = [f'# {title}', '', f'> {description}', ''], None
    for p in pages:
        if p.section != section:
            section = p.section
            lines += ['', f"## {section or 'Start here'}", '']
        elif not section and lines[-1] == '': lines += ['## Start here', '']
        lines.append(f'- [{p.title}]({address}{p.markdown_url})' + (f': {p.lead}' if p.lead else ''))
    lines += ['', '## Optional', '', f'- [Everything in one file]({address}llms-full.txt)']
    return re.sub(r'\n{3,}', '\n\n', '\n'.join(lines)) + '\n'

def full(pages:list[Page])->str:
    "llms-full.txt: every page, one after the other"
    return '\n\n---\n\n'.join(page_text(p) for p in pages)
