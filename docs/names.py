"""What a name in backticks means on a page.

nbdev links every name that the package defines, and where two modules define the same name it takes the first it finds.
Here the page decides: its own definition, else what it imports, else the only one there is (in the paper's folder, or at all)."""
from __future__ import annotations
import ast, json
from pathlib import Path
from cells import joined

def load_index(modidx:Path)->dict[str, dict[str, str]]:
    "From nbdev's index: module -> name in the module -> address of its documentation"
    if not modidx.exists(): return {}
    assign = next(n for n in ast.parse(modidx.read_text(encoding='utf-8')).body if isinstance(n, ast.Assign))
    syms = ast.literal_eval(assign.value)['syms']
    return {mod: {name.removeprefix(mod + '.'): doc for name, (doc, _) in entries.items()} for mod, entries in syms.items()}

def imports(tree:ast.AST, module:str)->dict[str, tuple[str, str]]:
    "The names that `from x import y` brings: name -> (module, name there)"
    found = {}
    for node in ast.walk(tree):
        if not isinstance(node, ast.ImportFrom): continue
        base = module.split('.')[:-node.level] if node.level else []
        source = '.'.join(base + (node.module.split('.') if node.module else []))
        found |= {a.asname or a.name: (source, a.name) for a in node.names}
    return found

def code_cells(notebook:Path)->list[str]:
    nb = json.loads(Path(notebook).read_text(encoding='utf-8'))
    return [joined(c['source']) for c in nb['cells'] if c['cell_type'] == 'code']

def module(code:list[str], lib:str)->str:
    "The module that a notebook is exported to, '' if none"
    exp = [line.split()[2] for c in code for line in c.splitlines() if line.startswith('#| default_exp ')]
    return f'{lib}.{exp[0]}' if exp else ''

class Names:
    "The names of one page"
    def __init__(self, index:dict, notebook:Path, lib:str):
        code = code_cells(notebook)
        self.index, self.module, self.imported = index, module(code, lib), {}
        for c in code:
            try: self.imported |= imports(ast.parse(c), self.module)
            except SyntaxError: pass  # a cell with a magic
        self.package = self.module.rpartition('.')[0]

    def module_of(self, name:str)->tuple[str, str]|None:
        "The module in which `name` is meant to be looked up, and its name there"
        head, dot, rest = name.partition('.')
        if name in self.index.get(self.module, ()): return self.module, name
        if head in self.imported:
            mod, there = self.imported[head]
            return mod, there + dot + rest
        mods = [m for m, names in self.index.items() if name in names]
        for m in self.index:
            if name.startswith(m + '.') and name.removeprefix(m + '.') in self.index[m]: return m, name.removeprefix(m + '.')
        near = [m for m in mods if m.rpartition('.')[0] == self.package]
        return next(((ms[0], name) for ms in (mods, near) if len(ms) == 1), None)

    def target(self, name:str, documented:dict[str, dict[str, str]])->str:
        "Address of the documentation of `name`, '' where it means nothing here; `documented`: page -> name -> anchor of its box"
        mod, name = self.module_of(name) or ('', '')
        page = self.index.get(mod, {}).get(name, '').partition('#')[0]
        if not page: return ''
        boxes = documented.get(page, {})
        anchor = boxes.get(name) or boxes.get(name.rpartition('.')[0])  # a method without a box is found in its class's
        return f'{page}#{anchor}' if anchor else page

    def targets(self, documented:dict[str, dict[str, str]])->dict[str, str]:
        "Every name of the package, as this page means it"
        known = {n for names in self.index.values() for n in names} | {f'{m}.{n}' for m, names in self.index.items() for n in names}
        return {n: self.target(n, documented) for n in sorted(known)}
