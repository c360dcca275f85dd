"Colours for code: Pygments' tokens under the short class names that pandoc uses, and the style sheet knows. Pandoc's own highlighter takes most of a second a page."
from __future__ import annotations
import html, re
from pygments import lex
from pygments.lexers import get_lexer_by_name
from pygments.token import Comment, Keyword, Name, Number, Operator, Punctuation, String, Token
from pygments.util import ClassNotFound

CLASSES = {Comment: 'co', String.Doc: 'co', String: 'st', String.Interpol: 'ss', String.Escape: 'ch', Number: 'dv', Number.Float: 'fl', Keyword: 'kw', Keyword.Namespace: 'im', Keyword.Constant: 'va',
           Operator: 'op', Operator.Word: 'op kw', Name.Builtin: 'bu', Name.Builtin.Pseudo: 'va', Name.Decorator: 'at', Name.Function: 'fu', Name.Function.Magic: 'fu', Name.Class: 'fu', Name.Variable: 'va', Punctuation: ''}

def _class(kind)->str:
    "Of a token, or of the kind that it is a case of"
    while kind not in CLASSES and kind is not Token: kind = kind.parent
    return CLASSES.get(kind, '')

def spans(code:str, language:str)->str:
    "Code as HTML. A token that goes over several lines becomes a span a line"
    try: lexer = get_lexer_by_name(language, stripnl=False, ensurenl=False)
    except ClassNotFound: return html.escape(code, quote=False)
    out = []
    for kind, text in lex(code, lexer):
        c, text = _class(kind), html.escape(text, quote=False)
        out.append('\n'.join(f'<span class="{c}">{line}</span>' if line.strip() else line for line in text.split('\n')) if c else text)
    return ''.join(out)

BLOCK = re.compile(r'<pre\s+class="(\w+)([^"]*)"([^>]*)><code>(.*?)</code></pre>', re.S) # what pandoc makes of a fenced block with a language

def highlight(body:str)->str:
    "The same HTML with its code blocks coloured, in the frame that pandoc's highlighter gives them"
    def block(m:re.Match)->str:
        language, more, attributes, code = m.groups()
        if language == 'output': return m[0]
        return (f'<div class="sourceCode" data-pagefind-ignore{attributes}><pre class="sourceCode {language}{more}"><code class="sourceCode {language}">'
                f'{spans(html.unescape(code), language)}</code></pre></div>')
    return BLOCK.sub(block, body)
