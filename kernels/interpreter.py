"Whether kernels run in Triton's interpreter, on the CPU, and why they cannot where they cannot; and matrix products that are right there as well."
import torch
import triton
import triton.language as tl

__all__ = ["dot", "add_dot", "interpreted", "sequential", "why_not_here"]

_INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)

@triton.jit
def dot(a, b, input_precision: tl.constexpr):
    """a b, summed in float32; float32 operands by the tensor cores as `input_precision` says. The interpreter multiplies bfloat16 as the integers they are stored in:
    widen them there, which is exact"""
    if _INTERPRETED: return tl.dot(a.to(tl.float32), b.to(tl.float32), input_precision=input_precision)
    else: return tl.dot(a, b, input_precision=input_precision)

@triton.jit
def add_dot(acc, a, b, input_precision: tl.constexpr):
    "acc + a b, in the same way"
    if _INTERPRETED: return tl.dot(a.to(tl.float32), b.to(tl.float32), acc, input_precision=input_precision)
    else: return tl.dot(a, b, acc, input_precision=input_precision)

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
