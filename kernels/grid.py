"""A barrier over all programs of a launch, in two halves, and a prefetch to put between them. Explained in nbs/04_flashformer/02_barrier.

    token = grid_arrive(barrier)        # what this program has written is released to the others
    prefetch(weights, bytes)            # whatever depends on nobody
    grid_wait(barrier, token)           # what the others had written before they arrived can now be read

`barrier` points to one int32 that is zero before its first use and is never reset: of P programs the first adds 2^31 - (P - 1) and every other
adds 1, so that bit 31 flips when all have come, whatever the count has been (the scheme of CUDA's cooperative groups). Grids of any size may use
it one after the other. All programs of the launch must be on the GPU at once: launch no more than fit, with `launch_cooperative_grid=True`, and let all
of them meet every barrier.
"""
import triton
import triton.language as tl

__all__ = ["grid_arrive", "grid_wait", "prefetch"]

_INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)
_FLIP = tl.constexpr(-2**31)

# bar.sync: all threads of the program have written. One thread then releases their writes (release is cumulative) and counts the program in.
_ARRIVE = tl.constexpr("""{
    .reg .pred first; .reg .b32 thread;
    bar.sync 0;
    mov.u32 thread, %tid.x;
    setp.eq.u32 first, thread, 0;
    mov.u32 $0, 0;
    @first atom.add.release.gpu.global.u32 $0, [$1], $2;
}""")

# One thread polls, relaxed, so that a poll invalidates nothing; a single fence then makes it an acquire, for all threads behind the second bar.sync.
_WAIT = tl.constexpr("""{
    .reg .pred others, more; .reg .b32 thread, seen;
    mov.u32 thread, %tid.x;
    setp.ne.u32 others, thread, 0;
    @others bra ALL;
SPIN:
    ld.relaxed.gpu.global.u32 seen, [$1];
    xor.b32 seen, seen, $2;
    setp.ge.s32 more, seen, 0;
    @more bra SPIN;
    fence.acq_rel.gpu;
ALL:
    bar.sync 0;
    mov.u32 $0, 0;
}""")

_PREFETCH = tl.constexpr("""{
    .reg .pred first; .reg .b32 thread;
    mov.u32 thread, %tid.x;
    setp.eq.u32 first, thread, 0;
    @first cp.async.bulk.prefetch.L2.global [$1], $2;
    mov.u32 $0, 0;
}""")

@triton.jit
def grid_arrive(barrier, # pointer to one int32, the same for all programs
               ): # the token that `grid_wait` wants
    "Count this program in and release what it has written. Does not wait. The launch has one axis."
    count = tl.where(tl.program_id(0) == 0, (1 - tl.num_programs(0)) ^ _FLIP, 1)
    if _INTERPRETED: return tl.atomic_add(barrier, count, sem="release", scope="gpu")
    else: return tl.inline_asm_elementwise(_ARRIVE, "=&r,l,r", [barrier, count], dtype=tl.int32, is_pure=False, pack=1)

@triton.jit
def grid_wait(barrier, # as given to `grid_arrive`
              token, # what it returned
             ):
    "Wait until all programs have arrived; everything that they wrote before is visible from here on."
    if _INTERPRETED:
        while (tl.atomic_add(barrier, 0, sem="acquire", scope="gpu") ^ token) >= 0: pass
    else: tl.inline_asm_elementwise(_WAIT, "=r,l,r", [barrier, token], dtype=tl.int32, is_pure=False, pack=1)

@triton.jit
def prefetch(start, # pointer, aligned to 16 bytes
             size, # bytes, a multiple of 16
            ):
    "Ask for bytes to be brought into the L2 cache: one instruction, nothing to wait for. Needs compute capability 9.0."
    if not _INTERPRETED: tl.inline_asm_elementwise(_PREFETCH, "=r,l,r", [start, size], dtype=tl.int32, is_pure=False, pack=1)
