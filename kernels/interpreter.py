"Whether kernels run in Triton's interpreter, on the CPU, and why they cannot where they cannot."
import torch
import triton
import triton.language as tl

__all__ = ["interpreted", "sequential", "why_not_here"]

def interpreted(kernel:object, # made by `triton.jit`
               )->bool:
    "Whether `TRITON_INTERPRET=1` when the kernel's module was imported"
    return not isinstance(kernel, triton.JITFunction)

def sequential()->bool:
    "Whether the interpreter runs the programs of a launch one after the other, as Triton's own does: none of them can then wait for a later one"
    from triton.runtime import interpreter
    return interpreter.GridExecutor.__call__.__module__ == interpreter.__name__

def why_not_here(kernel:object, # made by `triton.jit`
                 x:torch.Tensor, # one of its inputs
                )->str: # the reason, or "" where the kernel runs
    "Why a kernel cannot run where `x` lies: it wants a GPU, or the interpreter, for its own code and for Triton's library alike."
    if not interpreted(kernel): return "" if x.is_cuda else f"the kernels need a GPU, or TRITON_INTERPRET=1 before Python starts; the tensors are on {x.device}"
    # `tl.sum` is itself written in Triton: imported before the variable was set, it is compiled code that the interpreter cannot call
    if interpreted(tl.sum): return ""
    return "TRITON_INTERPRET was set after something (torch, transformers) had imported Triton: set it before Python starts"
