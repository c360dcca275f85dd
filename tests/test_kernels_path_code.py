"""PaTH's Triton kernels as machine code for GPUs that are not here: what spills, what fits, and which units multiply.

For three generations of GPUs, in bfloat16 at head dim 128: every kernel without a gate; with a gate, forward and decoding. AOT_ALL=1 compiles the gate's
backward and head dim 64 as well."""
import os
import pytest

pytest.importorskip('triton')
from machine_code import beyond, told
from rlcr_suite.kernels.aot import SHARED_LIMIT, report

NAME, CAPABILITIES = 'rlcr_suite.kernels.path_attention', [80, 90, 100]
FORWARD = ('prepare', 'leaf_node', 'query_prepare', 'compose', 'transport', 'forward', 'decode', 'merge')
#: bytes a thread that a backward kernel may store and load for want of registers: what Triton 3.7 makes, rounded up to 16
SPILLED = {('key_grad bf16 d128', 80): 64, ('inverse_grad bf16 d128', 80): 352, ('key_grad bf16 d128 gate', 80): 224,
           ('key_grad bf16 d64', 80): 48, ('inverse_grad bf16 d64', 80): 336, ('query_grad bf16 d64 gate', 80): 16,
           ('key_grad bf16 d128', 90): 32, ('key_grad bf16 d128 gate', 90): 32,
           ('key_grad bf16 d128', 100): 464, ('query_grad bf16 d128 gate', 100): 224, ('key_grad bf16 d128 gate', 100): 800,
           ('key_grad bf16 d64', 100): 32, ('key_grad bf16 d64 gate', 100): 80}
UNIT = {80: 'mma', 90: 'wgmma', 100: 'tcgen05'} # Ampere's, Hopper's and Blackwell's tensor-core instructions

def of(rows:list, sm:int, forward:bool)->list:
    return [r for r in rows if r['capability'] == sm and (r['label'].split()[0] in FORWARD) == forward]

@pytest.fixture(scope='module')
def rows()->list:
    only = '' if os.getenv('AOT_ALL') else r' d128$|^(query_prepare|forward|decode) .* d128 gate$'
    return report(NAME, CAPABILITIES, only=only)

@pytest.mark.parametrize('sm', CAPABILITIES)
def test_forward_and_decoding_do_not_spill(rows, sm):
    ours = of(rows, sm, forward=True)
    assert len(ours) == (22 if os.getenv('AOT_ALL') else 11) and beyond(ours, {}) == {}

@pytest.mark.parametrize('sm', CAPABILITIES)
def test_what_the_backward_spills(rows, sm, record_property):
    back = of(rows, sm, forward=False)
    record_property('told', told('PaTH backward', back))
    assert len(back) == (24 if os.getenv('AOT_ALL') else 9) and beyond(back, SPILLED) == {}

def test_every_kernel_fits_and_has_no_atomics(rows):
    for r in rows: assert r['shared'] <= SHARED_LIMIT[r['capability']] and r['resident'] >= 1 and r['atomics'] == 0, r

def test_rectangles_are_multiplied_on_tensor_cores(rows):
    ours = [r for r in rows if r['label'].split()[0] in ('forward', 'query_grad', 'key_grad')]
    assert len(ours) >= 12
    for r in ours: assert r['matmul'] == UNIT[r['capability']], r

def test_float32():
    "Wide operands still fit shared memory"
    rows = report(NAME, [90], only='^(forward|query_grad) ', dtypes=['fp32'], dims=[128], gates=[False])
    assert len(rows) == 2
    for r in rows: assert r['shared'] <= SHARED_LIMIT[90] and r['resident'] >= 1, r
