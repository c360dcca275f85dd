"""SVG figures, made fit to stand inside a page: the ink follows the theme, and ids do not meet those of another figure."""
from __future__ import annotations
import re
from lxml import etree

INK = '#6b7688'  # the colour in which rlcr_suite.core.plots draws text and axes
SVG, XLINK = 'http://www.w3.org/2000/svg', 'http://www.w3.org/1999/xlink'
POINT = 4/3      # CSS pixels

def _pixels(length:str|None)->float|None:
    "A length such as '320pt' in CSS pixels"
    m = re.fullmatch(r'\s*([\d.]+)\s*(pt|px)?\s*', length or '')
    return float(m[1])*(POINT if m[2] == 'pt' else 1) if m else None

def _rename(root:etree._Element, prefix:str):
    "Put `prefix` before every id, and before every reference to one"
    known = {e.get('id') for e in root.iter() if e.get('id')}
    for e in root.iter(etree.Element):
        for key, value in list(e.attrib.items()):
            if key == 'id': e.set(key, prefix + value)
            elif key in ('href', f'{{{XLINK}}}href'):
                del e.attrib[key]
                e.set('href', f'#{prefix}{value[1:]}' if value.startswith('#') and value[1:] in known else value)
            elif 'url(#' in value: e.set(key, re.sub(r'url\(#([^)]+)\)', rf'url(#{prefix}\1)', value))

def _no_style_sheet(root:etree._Element):
    "A style sheet inside an SVG would rule the whole page. Matplotlib's sets inherited properties of `*`: the root takes them"
    for style in list(root.iter(f'{{{SVG}}}style')):
        m = re.fullmatch(r'\s*\*\s*\{([^}]*)\}\s*', style.text or '')
        if not m: raise ValueError(f'a figure brings its own style sheet: {style.text!r}')
        root.set('style', m[1].strip())
        style.getparent().remove(style)

def inline(svg:str, prefix:str, alt:str='')->str:
    "The text of an SVG file as markup for a page; `prefix` must be the figure's own"
    root = etree.fromstring(svg.encode(), etree.XMLParser(resolve_entities=False, no_network=True, remove_comments=True, remove_pis=True))
    for e in list(root.iter(f'{{{SVG}}}metadata', f'{{{SVG}}}script')): e.getparent().remove(e)
    _no_style_sheet(root)
    _rename(root, prefix)
    width, height = _pixels(root.get('width')), _pixels(root.get('height'))
    if 'viewBox' not in root.attrib and width and height: root.set('viewBox', f'0 0 {width:g} {height:g}')
    for key in ('width', 'height'): root.attrib.pop(key, None)
    if width: root.set('width', f'{width:.0f}')  # the height follows from the view box
    root.set('role', 'img')
    root.set('aria-label', alt or 'Figure')
    etree.cleanup_namespaces(root)
    text = etree.tostring(root, encoding='unicode')
    return re.sub(INK, 'currentColor', text, flags=re.I)
