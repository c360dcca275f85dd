"Where a kernel can run: a process that compiles, one that interprets, and one that was told to interpret too late."
import os, subprocess, sys
import pytest

ASK = '''
import os
{first}
import torch
from rlcr_suite.kernels.log_linear import why_not
x = torch.ones(1, 1, 1, 1)
print(why_not(x, x, x))
'''

@pytest.mark.parametrize('interpret, first, why', [
    ('0', '', 'the kernels need a GPU, or TRITON_INTERPRET=1 before Python starts; the tensors are on cpu'), ('1', '', ''),
    ('0', 'import triton; os.environ["TRITON_INTERPRET"] = "1"', 'TRITON_INTERPRET was set after')])
def test_the_interpreter_is_chosen_before_triton_is_imported(interpret, first, why):
    done = subprocess.run([sys.executable, '-c', ASK.format(first=first)], env=os.environ | dict(TRITON_INTERPRET=interpret), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip().startswith(why) and bool(done.stdout.strip()) == bool(why)
