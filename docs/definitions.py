"Source code as a reader wants it: signatures without bodies, and no docstring twice."
from __future__ import annotations
import ast
from functools import lru_cache

FUNCTION = (ast.FunctionDef, ast.AsyncFunctionDef)

def _position(text:str, line:int, column:int)->int:
    "Where (line, column in UTF-8 bytes), as `ast` counts, is in `text`"
    lines = text.splitlines(keepends=True)
    return sum(map(len, lines[:line - 1])) + len(lines[line - 1].encode()[:column].decode())

def _start(text:str, node:ast.AST)->int:
    first = min([node, *getattr(node, 'decorator_list', [])], key=lambda n: n.lineno)
    return _position(text, first.lineno, 0)

def _docstring(node:ast.AST)->ast.Expr|None:
    "The statement that is the docstring of a class or function"
    first = node.body[0]
    return first if isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant) and isinstance(first.value.value, str) else None

@lru_cache(64) # a module is asked for each of its names
def defined(code:str)->list[ast.AST]:
    "Functions and classes that a piece of code defines at its top; none if it is not Python"
    try: return [n for n in ast.parse(code).body if isinstance(n, (*FUNCTION, ast.ClassDef))]
    except SyntaxError: return []

def _head(text:str, node:ast.AST)->str:
    "A definition up to its body, decorators and comments on the parameters included"
    return text[_start(text, node):_position(text, node.body[0].lineno, node.body[0].col_offset)].rstrip()

def _member(text:str, node:ast.AST)->str|None:
    "What an outline shows of one statement of a class: a field, or the head and docstring of a public method"
    if isinstance(node, ast.AnnAssign): return '\n'.join(text.splitlines()[node.lineno - 1:node.end_lineno])
    if not isinstance(node, FUNCTION) or (node.name.startswith('_') and node.name != '__call__'): return None
    doc = _docstring(node)
    indent = '\n' + ' '*(node.col_offset + 4)
    return _head(text, node) + (indent + ast.get_source_segment(text, doc) if doc else '')

def find(text:str, name:str)->ast.AST|None:
    "The definition of a function, a class, or a method (`Class.method`) at the top of a module"
    head, _, rest = name.partition('.')
    node = next((n for n in defined(text) if n.name == head), None)
    if not rest or node is None: return node
    return next((n for n in node.body if isinstance(n, FUNCTION) and n.name == rest), None)

def outline(text:str, name:str)->str:
    "A class of a module by its head, fields and public methods; a function by its head"
    node = find(text, name)
    members = [_member(text, n) for n in node.body] if isinstance(node, ast.ClassDef) else []
    return '\n'.join([_head(text, node), *(m for m in members if m)])

def without_docstrings(code:str, names:set[str])->str:
    "The code, less the docstrings of `names`: the box it stands in has already said them"
    lines = code.splitlines()
    for node in reversed(defined(code)):
        doc = _docstring(node) if node.name in names else None
        if doc and len(node.body) > 1 and doc.lineno != node.lineno: del lines[doc.lineno - 1:doc.end_lineno]
    return '\n'.join(lines)
