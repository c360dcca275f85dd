"""The persistent decoder as machine code for an H100 or H200: the barrier that is left of it, what spills, and how many instructions a weight costs."""
import pytest

pytest.importorskip('triton')
from rlcr_suite.kernels.aot import SHARED_LIMIT, compile_cases
from rlcr_suite.kernels.flashformer import MODELS, NOMINAL, _constants, aot_cases

BITS = dict(bf16=16, int8=8, int4=4)
#: instructions a weight of an innermost loop, as the best loops of each kind cost when written by themselves
BUDGET = dict(bf16=3.7, int8=4.2, int4=4.3)
ISSUE = 132*128*1.755e9 # instructions a second, all lanes of an H200
COPY = 4.3e12 # bytes a second, measured on an H200

@pytest.fixture(scope='module', params=[('1B', 'int8', 1), ('1.5B', 'bf16', 1), ('8B', 'bf16', 1), ('8B', 'int4-g128', 1), ('8B', 'bf16', 16)], ids=lambda p: '-'.join(map(str, p)))
def compiled(request):
    model, kind, rows = request.param
    return compile_cases(aot_cases([model], [kind], [rows]), [90])[0]

def test_machine_code(compiled):
    "One spin and one invalidation for all barriers of all layers, one atomic, no register spilled, and as many instructions a weight as there is time for"
    c, kind = compiled, compiled.label.split()[1].split('-')[0]
    print(f'{c.label}: {c.registers} registers, {c.shared} bytes shared, instructions a weight:', *(f'{n/(size*8/BITS[kind]):.2f}' for n, size in c.streams))
    assert c.polls == 1 and c.invalidates == 1 and c.atomics == 1
    assert c.spills == 0 and c.stack == 0 and c.shared <= SHARED_LIMIT[90] and c.resident >= 1
    assert c.count('UBLKPF', 'sass') >= 5                                         # prefetches of tiles: a bulk instruction each
    if c.label.endswith('rows'): assert c.count('HMMA', 'sass') and not c.streams; return
    assert len(c.streams) == 5 and max(size for _, size in c.streams) >= 64        # four loads of 16 bytes a thread in flight
    costs = sorted(n/(size*8/BITS[kind]) for n, size in c.streams)                # of the int4 model's head, which has 8 bits, as if it had 4: twice too low
    assert (costs[-1] if c.label.startswith('8B') else costs[0]) <= BUDGET[kind], costs # short rows: a loop ends with the sum over threads, counted in
    if kind != 'int4': assert ISSUE/costs[-1]*BITS[kind]/8 > COPY, costs          # memory, not issue, is the limit, even where rows are shortest

@pytest.mark.parametrize('model', MODELS)
def test_tiles(model):
    "Two tiles a program, the one at work and the one prefetched, fit an H200's L2 for all programs; every thread has 16 bytes of a tile to read; four rows where one alone is long"
    s = MODELS[model]
    columns = dict(QKV=s.hidden, O=s.heads*s.head_dim, GU=s.hidden, D=s.ffn, HEAD=s.hidden)
    for bits, head_bits in ((16, 16), (8, 8), (4, 8)):
        constants = _constants(s, bits, head_bits, 1, 16, NOMINAL)
        for name, K in columns.items():
            size = constants[f'BN_{name}']*K*(head_bits if name == 'HEAD' else bits)//8
            assert 2*NOMINAL*size <= 50 << 20, (name, bits, size)
            assert size >= 256*16 or constants[f'BN_{name}'] == 16, (name, bits, size)
