"""The persistent decoder as machine code: the barrier that is left of it and its order, what spills, and how many instructions a weight costs, matrix by matrix."""
import ast, re
from pathlib import Path
import pytest

pytest.importorskip('triton')
from rlcr_suite.flashformer.bandwidth import GPUS
from rlcr_suite.kernels import flashformer
from rlcr_suite.kernels.aot import SHARED_LIMIT, _on_cubin, _tool, compile_cases
from rlcr_suite.kernels.flashformer import MODELS, NOMINAL, OPTIONS, Shape, _constants, aot_cases

BITS = dict(bf16=16, int8=8, int4=4)
#: instructions a weight of an innermost loop, as the best loops of each kind cost when written by themselves
BUDGET = dict(bf16=3.7, int8=4.2, int4=4.3)
#: what is beyond it: where rows are short a tile is a step or two, the loop over steps is gone, and the loop that is left holds the tile's end too
BEYOND = {('Llama-3.2-1B', 'bf16', 'QKV'): 4.5, ('Llama-3.2-1B', 'int8', 'QKV'): 5.5, ('Qwen2.5-1.5B', 'bf16', 'GU'): 4.1}
MEAN_BEYOND = {('Qwen2.5-1.5B', 'bf16'): 3.8} # half of its weights are gate and up
#: and with sixteen rows a pass, of the dearest loop: activations are made narrow twice and pass through shared memory, which is more than a token's share of time but serves sixteen
ROWS_COST = dict(bf16=11., fp16=12., int8=15.)
FAST = [('Llama-3.2-1B', 'bf16'), ('Llama-3.2-1B', 'int8'), ('Qwen2.5-1.5B', 'bf16'), ('Llama-3.1-8B', 'bf16'), ('Llama-3.1-8B', 'int8'), ('Llama-3.1-8B', 'int4-g128')] # all that carry a bar, and 1B int8
# the other forms: rows at once, drawn tokens, norms of queries and keys, float16 on an A100
FORMS = [('Llama-3.1-8B', 'bf16', 90, False), ('Qwen3-8B', 'int8', 90, True), ('Qwen3-8B', 'fp16', 80, False)]

def compiled(model, kind, rows, sm=90, sample=False): return compile_cases(aot_cases([model], [kind], [rows], sm, sample), [sm])[0]

def stages():
    "Lines of the source, first and last, of each stage"
    parts = ast.parse(Path(flashformer.__file__).read_text()).body
    return {f.name: (f.lineno, f.end_lineno) for f in parts if isinstance(f, ast.FunctionDef) and f.name.endswith('_stage')}

def innermost(c):
    "Innermost loops, in the code's order: instructions, and the stage whose code follows"
    code, label, spans, line, where = [], {}, [], 0, stages()
    text = _on_cubin([_tool('nvdisasm'), '-c', '-g'], c.cubin)
    for name, number, instruction in re.findall(r'^(\.L_\w+:)|^\s*//## File.* line (\d+)|^\s*/\*[0-9a-f]{4,}\*/\s+(.*?);', text, re.M):
        if name: label[name[:-1]] = len(code)
        elif number: line = int(number)
        else:
            to = re.search(r'\bBRA\b.*`\((\.L_\w+)\)', instruction)
            if to and label.get(to[1], len(code)) < len(code): spans.append((label[to[1]], len(code) + 1))
            code.append((instruction, line))
    inner = [a for a in spans if not any(b != a and a[0] <= b[0] and b[1] <= a[1] for b in spans)]
    of = lambda first: next((name for _, line in code[first:] for name, (a, b) in where.items() if a <= line <= b), None)
    return [([x for x, _ in code[first:last]], of(first)) for first, last in inner]

def costs(c, cuts):
    "Matrix -> instructions a weight of its loop. Weights that are there, not those that a last step is padded with"
    size = lambda loop: sum(int(m[1] or 32)//8 for x in loop if (m := re.search(r'LDG\.E\.EF(?:\.CONSTANT)?(?:\.(64|128))?', x)))
    found = [(loop, size(loop), stage) for loop, stage in innermost(c) if size(loop)]
    adds = iter(('O', 'DOWN'))
    names = [dict(_head_stage='HEAD', _qkv_stage='QKV', _gate_up_stage='GU').get(stage) or next(adds) for *_, stage in found]
    assert sorted(names) == sorted(cuts) and names.index('O') < names.index('DOWN')
    out = {}
    for name, (loop, bytes_, _) in zip(names, found):
        m = cuts[name]
        tile = m.BN*m.K*m.bits/8/(32*OPTIONS['num_warps'])                        # a thread's share of a tile
        assert bytes_ >= tile or tile % bytes_ == 0 or m.K*m.bits//32 % m.BK, (name, bytes_, tile)
        out[name] = len(loop)/(min(bytes_, tile)*8/m.bits)
    return out

@pytest.mark.parametrize('model, kind', FAST)
def test_machine_code(model, kind):
    "One spin and one invalidation for all barriers of all layers, one atomic, no register spilled, and for each matrix as many instructions a weight as there is time for"
    c, bits = compiled(model, kind, 1), kind.split('-')[0]
    cuts = {name: x for name, x in aot_cases([model], [kind])[0].constexprs.items() if name in ('QKV', 'O', 'GU', 'DOWN', 'HEAD')}
    cost, gpu = costs(c, cuts), GPUS['H200']
    print(f'{c.label}: {c.registers} registers, {c.shared} bytes shared, instructions a weight:', *(f'{name} {n:.2f}' for name, n in cost.items()))
    check_barrier(c)
    assert c.spills == 0 and c.stack == 0 and c.shared <= SHARED_LIMIT[90] and c.resident >= 1
    for name, n in cost.items():
        most = BEYOND.get((model, bits, name), BUDGET['int8' if cuts[name].bits == 8 else bits])
        assert n <= most, (name, n, most)
        if cuts[name].bits > 4: assert gpu.issue/n*cuts[name].bits/8 > gpu.copied, (name, n)                # memory, not issue, is the limit
    read = {name: m.N*m.K*m.bits*(1 if name == 'HEAD' else MODELS[model].layers) for name, m in cuts.items()}
    assert sum(cost[name]*n for name, n in read.items())/sum(read.values()) <= MEAN_BEYOND.get((model, bits), BUDGET[bits]), cost   # the mean over all that a token reads

def check_barrier(c):
    """All barriers are one place in the code. What was written is released before the program is counted in; then prefetches; the spin; what others wrote is acquired, and
    old copies of it in the first-level cache are thrown away"""
    assert c.polls == 1 and c.invalidates == 1 and c.atomics == 1
    lines = c.sass.splitlines()
    at = lambda pattern: [i for i, line in enumerate(lines) if re.search(pattern, line)]
    (arrive,), (spin,), (invalidate,), (release, acquire) = at(r'\bATOMG\.E\.ADD\.STRONG\.GPU'), at(r'\bLDG\.E\.STRONG\.GPU'), at(r'\bCCTL\.IVALL'), at(r'\bMEMBAR\.\S*\.GPU')
    assert release < arrive < spin < acquire < invalidate
    between = [i for i in at(r'\bUBLKPF') if arrive < i < spin]
    if c.capability >= 90: assert len(between) >= 5, between                      # the next matrix: a bulk instruction for each that it may be
    assert any('BAR.SYNC' in line for line in lines[release - 40:release]) and any('BAR.SYNC' in line for line in lines[invalidate:invalidate + 12])

@pytest.mark.parametrize('model, kind, sm, sample', FORMS)
def test_rows_at_once(model, kind, sm, sample):
    "Sixteen rows: tensor cores, the same barrier, no register spilled; instructions a weight are many, and stay what they are"
    c, bits = compiled(model, kind, 16, sm, sample), kind.split('-')[0]
    check_barrier(c)
    assert c.spills == 0 and c.stack == 0 and c.shared <= SHARED_LIMIT[sm] and c.resident >= 1
    cuts = aot_cases([model], [kind], [16], sm, sample)[0].constexprs
    each = [len(loop) for loop, _ in innermost(c) if any('HMMA' in x for x in loop) and not any('MUFU.EX2' in x for x in loop)]
    m = cuts['GU']
    weights = m.S*m.BK*m.BN/(32*OPTIONS['num_warps'])*(32/m.bits if m.bits < 16 else 1)                     # a step's, a thread
    print(f'{c.label}: {c.registers} registers, {c.shared} bytes shared, at most {max(each)/weights:.2f} instructions a weight')
    assert len(each) == 5 and max(each)/weights <= ROWS_COST[bits], (each, weights) # five matrices; the loop over the cache has exponentials

def test_float32_is_compiled():
    c = compiled('Llama-3.2-1B', 'fp32', 1, 80)
    check_barrier(c)
    assert c.resident >= 1 and c.shared <= SHARED_LIMIT[80]

def test_a_launch_is_what_is_compiled(monkeypatch):
    "Fused multiply-adds are asked for, not left to Triton's default; a launch of one stage is the same compilation as one of all"
    asked, case = [], aot_cases(['Llama-3.1-8B'])[0]
    class Kernel:
        def __getitem__(self, grid): return lambda *args, **options: asked.append((grid, options))
    monkeypatch.setattr(flashformer, '_decode_kernel', Kernel())
    from test_kernels_flashformer import draw, row_of, shape
    s = shape()
    w, b = draw(s), flashformer.allocate(s, programs=2)
    for span in ((0, 1), (0, 11)): flashformer._launch(s, w, b, row_of(s, [1]), 0, 1, 1, 2, span, False, None)
    (grid, one), (_, whole) = asked
    assert grid == (2,) and one == whole and {k: one[k] for k in OPTIONS} == OPTIONS
    assert dict(num_warps=case.num_warps, num_stages=case.num_stages) | case.options == OPTIONS
    assert OPTIONS['enable_fp_fusion'] is True and OPTIONS['launch_cooperative_grid'] is True
    assert set(case.constexprs) == set(one) - set(OPTIONS)

@pytest.mark.parametrize('model', MODELS)
def test_tiles(model):
    """Two tiles a program, the one at work and the one prefetched, fit an H200's L2 for all programs; every thread has 16 bytes of a tile to read; four rows where one alone is long;
    steps that leave less than a thirtieth of their words empty"""
    for bits, head_bits in ((16, 16), (8, 8), (4, 8)):
        constants = _constants(MODELS[model], bits, head_bits, 1, 16, NOMINAL)
        for name in ('QKV', 'O', 'GU', 'DOWN', 'HEAD'):
            m = constants[name]
            size, words = m.BN*m.K*m.bits//8, m.K*m.bits//32
            assert 2*NOMINAL*size <= 50 << 20, (name, bits, size)
            assert size >= 256*16 or m.BN == 16, (name, bits, size)
            if m.bits > 4: assert -(-words//m.BK)*m.BK <= words*31/30, (name, words, m.BK)

def test_every_program_has_a_part_of_the_cache():
    "Key heads times splits: as many as fit the multiprocessors"
    for s in MODELS.values():
        splits = flashformer.allocate(Shape(1, 64, s.heads, s.kv_heads, 32, 64, 10, 16), programs=1).part.shape[2]
        assert NOMINAL - s.kv_heads < splits*s.kv_heads <= NOMINAL
