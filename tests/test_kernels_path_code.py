"""PaTH's Triton kernels as machine code for GPUs that are not here: what spills, what fits, and which units multiply."""
import pytest

pytest.importorskip('triton')
from rlcr_suite.kernels.aot import SHARED_LIMIT, report

FORWARD = '^(prepare|leaf_node|query_prepare|compose|transport|forward|decode|merge) '
#: bytes a thread that a backward kernel may store and load for want of registers; what was measured, and some room for other releases of Triton
SPILLED = dict(key_grad=64, query_prepare_grad=64)
UNIT = {80: 'mma', 90: 'wgmma', 100: 'tcgen05'} # Ampere's, Hopper's and Blackwell's tensor-core instructions

def check(row:dict, sm:int)->None:
    "What every kernel is held to"
    kernel, spilled = row['label'].split()[0], row['spill_stores'] + row['spill_loads']
    print(f"{row['label']:36} sm_{sm}: {row['registers']} registers, {spilled} bytes spilled, {row['shared']} bytes shared")
    assert row['shared'] <= SHARED_LIMIT[sm] and row['resident'] >= 1, row
    assert spilled <= SPILLED.get(kernel, 0), row
    if kernel in ('forward', 'query_grad', 'key_grad'): assert row['matmul'] == UNIT[sm], row

@pytest.mark.parametrize('sm', [80, 90, 100])
def test_forward(sm):
    "Forward and decoding at head dim 128: no spill"
    rows = report('rlcr_suite.kernels.path_attention', [sm], only=FORWARD, dims=[128], gates=[False], sm=sm)
    assert len(rows) == 8
    for row in rows: check(row, sm)

def test_gate():
    "A gate needs registers, and there are enough"
    rows = report('rlcr_suite.kernels.path_attention', [90], only='^(forward|query_prepare|decode) ', dims=[128], gates=[True], sm=90)
    assert len(rows) == 3
    for row in rows: check(row, 90)

def test_backward():
    "The backward pass on an H100 or H200: the spilled bytes are few"
    rows = report('rlcr_suite.kernels.path_attention', [90], only='grad|split', dims=[128], gates=[False], sm=90)
    assert len(rows) == 9
    for row in rows: check(row, 90)

def test_float32():
    "Wide operands still fit shared memory"
    for row in report('rlcr_suite.kernels.path_attention', [90], only='^(forward|query_grad) ', dtypes=['fp32'], dims=[128], gates=[False], sm=90):
        assert row['shared'] <= SHARED_LIMIT[90] and row['resident'] >= 1, row
