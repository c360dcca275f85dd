r"""A whole decoder in one persistent kernel (FlashFormer, arXiv 2505.22758): every layer of a token, and several tokens, a launch.
Explained in nbs/04_flashformer/06_kernel.

Every program stays on its multiprocessor and goes through the stages of all layers; between two stages stands a barrier over the whole grid.

    stage 0   x = norm(h);  qkv = Wqkv x (+ b)                        4   h += Wd act
          1   q, k norm and rotation; append k, v; attention, split   5L  logits = W norm(h); each program's best token
          2   combine the splits;  h += Wo o                              (the next token's stage 0 begins by picking the best of these)
          3   act = silu(Wg norm(h)) * (Wu norm(h))

so a token has 5L + 1 stages, and n tokens in one launch meet n(5L + 1) barriers. The order of every sum depends on the model's shape and on the
position alone, never on the number of programs or on which of them comes first: a launch repeats bit for bit, on any grid.
"""
import ast, re
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple
import numpy as np
import torch
import triton
import triton.language as tl
from .grid import grid_arrive, grid_wait, prefetch
from .interpreter import interpreted, sequential, why_not_here

__all__ = ["Shape", "Quantised", "Weights", "Buffers", "Sampler", "ROWS", "allocate", "decode", "gumbel", "why_not", "aot_cases", "weight_costs"]

ROWS = 16 # rows that one pass over the weights can serve

@dataclass(frozen=True)
class Shape:
    "What the kernel is compiled for: the sizes of a Llama-like decoder."
    layers: int
    hidden: int # D, width of the residual stream
    heads: int # H, query heads
    kv_heads: int # KVH, key and value heads; H is a multiple
    head_dim: int # HD
    ffn: int # F, width of the feed-forward
    vocab: int # V
    max_len: int # T, places of the cache
    eps: float = 1e-5 # of every norm
    qkv_bias: bool = False # Qwen2
    qk_norm: bool = False # Qwen3: a norm over each head's query and key
    scale: float | None = None # of the attention logits; None is head_dim**-0.5

@dataclass(frozen=True)
class Cut:
    "How the kernel goes through a matrix: what it is compiled for, beside `Shape`."
    N: int # rows
    K: int # columns
    bits: int # of a weight
    BN: int # rows a tile
    BK: int # words of 32 bits a step along a row; in the form for several rows, columns or words of a slice
    S: int # slices a step, each of BK columns or words, in the form for several rows; 1 in that for one

    @property
    def short(self) -> bool: # rows of so few words that a warp takes a whole one, and all its steps are written out
        return self.K*self.bits//32 <= 1024

    @property
    def width(self) -> int: # elements a row, as it is stored
        return self.K if self.bits >= 16 else self.K*self.bits//32

class Quantised(NamedTuple):
    """A matrix (..., N, K) in few bits, K a multiple of 128. With b = column // 128 and W words of 32 bits for each such block, part i of word
    b W + j is column 128 b + i W + j: so that consecutive words, which one thread reads at once, meet consecutive numbers of x.

    int8       packed (..., N, K/4): 4 parts of 8 bits, W = 32, each q + 128 with -127 <= q <= 127; scales (..., N) fp32
    int4-g128  packed (..., N, K/8): 8 parts of 4 bits, W = 16, each q + 8 with -8 <= q <= 7;       scales (..., N, K/128) fp16 or fp32

    Part i lies in bits i*bits and up; the matrix is q * scale."""
    packed: torch.Tensor # int32
    scales: torch.Tensor # floating
    kind: str # "int8" or "int4-g128"

class Weights(NamedTuple):
    "Parameters, layers stacked. Matrices are (out, in) as in `torch.nn.Linear`, of one dtype, or `Quantised`."
    emb: torch.Tensor # (V, D)
    wqkv: torch.Tensor | Quantised # (L, (H + 2 KVH) HD, D): queries, keys, values
    bqkv: torch.Tensor | None # (L, (H + 2 KVH) HD)
    qn: torch.Tensor | None # (L, HD) gain of the queries' norm
    kn: torch.Tensor | None # (L, HD) gain of the keys' norm
    wo: torch.Tensor | Quantised # (L, D, H HD)
    wgu: torch.Tensor | Quantised # (L, 2 F, D): gate, up
    wd: torch.Tensor | Quantised # (L, D, F)
    n1: torch.Tensor # (L, D) gain of the norm before attention
    n2: torch.Tensor # (L, D) gain of the norm before the feed-forward
    nf: torch.Tensor # (D,) gain of the last norm
    head: torch.Tensor | Quantised # (V, D); the same tensor as `emb` if tied
    cos: torch.Tensor # (T, HD/2) fp32, cosines of the rotation, scaled as the model wants
    sin: torch.Tensor # (T, HD/2) fp32

class Buffers(NamedTuple):
    "What a decoder writes. Made by `allocate`; nothing but the cache up to the position, and `barrier`, is read before it is written."
    keys: torch.Tensor # (L, KVH, T, HD) rotated
    values: torch.Tensor # (L, KVH, T, HD)
    h: torch.Tensor # (ROWS, D) fp32 residual stream
    qkv: torch.Tensor # (ROWS, (H + 2 KVH) HD) fp32
    part: torch.Tensor # (ROWS, H, splits, HD) fp32 attention of each split
    high: torch.Tensor # (ROWS, H, splits) fp32 largest logit
    low: torch.Tensor # (ROWS, H, splits) fp32 sum of exponentials
    own: torch.Tensor # (programs, …) fp32: what a program keeps to itself
    act: torch.Tensor # (ROWS, F) fp32, or of several rows two halves of half the size
    best: torch.Tensor # (programs, ROWS) fp32 best logit that a program has seen
    best_id: torch.Tensor # (programs, ROWS) int32 whose it is
    picked: torch.Tensor # (ROWS,) int32 successors of rows that were fed at once
    barrier: torch.Tensor # (1,) int32

class Sampler(NamedTuple):
    "Sampling by the Gumbel-max trick: the same seed and position give the same noise, whatever the grid. Without one, greedy."
    temperature: float = 1.0 # positive; logits are divided by it
    seed: int = 0 # 0 to 2**63 - 1

# ------------------------------------------------------------------------------------------------------- a matrix times activations

_INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)
_NONE = tl.constexpr(2**31 - 1) # no token

@triton.jit
def _multiply(a, b, acc):
    "acc + a b. The interpreter multiplies bfloat16 as the integers they are stored in: widen them there, which is exact"
    if _INTERPRETED: return tl.dot(a.to(tl.float32), b.to(tl.float32), acc)
    else: return tl.dot(a, b, acc, input_precision="ieee")

@triton.jit
def _halves(x, T: tl.constexpr):
    "x in fp32 as the sum of two numbers of a narrow type T, which loses 2^-17 of it at most for bfloat16"
    high = x.to(T)
    return high, (x - high.to(tl.float32)).to(T)

@triton.jit
def _dot(a, b, acc):
    "acc + a b in fp32. Where one of the two is narrow the other goes in as two halves: what is stored narrow is multiplied by tensor cores as it is"
    if a.dtype == b.dtype: return tl.dot(a, b, acc, input_precision="ieee")
    elif a.dtype == tl.float32:
        high, low = _halves(a, b.dtype)
        return _multiply(low, b, _multiply(high, b, acc))
    else:
        high, low = _halves(b, a.dtype)
        return _multiply(a, low, _multiply(a, high, acc))

@triton.jit
def _part(word, i: tl.constexpr, one, BITS: tl.constexpr, HALF: tl.constexpr):
    """Part i of 32-bit words, as fp32: a number of 32 or 16 bits as it is; of 8 or 4 bits as 1 + u 2^-BITS, where u = q + 2^(BITS-1) is what is stored: a
    shift and one three-way logical instruction, no conversion. So q = 2^BITS (part - 1.5), and the subtraction is left to the end of a sum. `one` holds
    the bits of 1.0: an argument, since of two constants known to the compiler one would take an instruction more"""
    if BITS == 32: return word.to(tl.float32, bitcast=True)
    elif BITS == 16:
        if HALF: return (word >> 16*i).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
        elif i == 0: return (word << 16).to(tl.float32, bitcast=True)
        else: return (word & -65536).to(tl.float32, bitcast=True)
    else:
        SHIFT: tl.constexpr = 23 - BITS - BITS*i
        if SHIFT > 0: word = word << SHIFT
        elif SHIFT < 0: word = word >> -SHIFT
        return ((word & (((1 << BITS) - 1) << (23 - BITS))) | one).to(tl.float32, bitcast=True)

def _pairs(bits: int) -> str: # PTX
    """Two neighbouring words of 32 bits -> for each of their parts, q as two bfloat16 in a register. Seven bits are the mantissa of 128 + u; of eight, the highest, turned,
    is the last of the exponent of what is to be subtracted: 128 where it is set, 256 where it is not"""
    parts, lines = 32//bits, []
    for i in range(parts):
        if bits == 4:
            word = ("low", "high")[i//4]                                          # both words' lower or upper halves
            lines += [f"shr.b32 part, {word}, {4*(i % 4)};", "lop3.b32 part, part, 0x000F000F, base, 0xEA;", f"fma.rn.bf16x2 ${i}, part, unit, less;"]
        else:
            lines += [f"prmt.b32 part, $4, $5, {0x4400 + 0x1111*i};", "lop3.b32 less, part, 0x00800080, minus, 0xAE;",
                      "lop3.b32 part, part, 0x007F007F, base, 0xEA;", f"fma.rn.bf16x2 ${i}, part, unit, less;"]
    first = ["prmt.b32 low, $8, $9, 0x5410;", "prmt.b32 high, $8, $9, 0x7632;", "mov.b32 less, 0xC308C308;"] if bits == 4 else ["mov.b32 minus, 0xC300C300;"] # less: -136
    return "\n".join(["{", ".reg .b32 low, high, part, base, unit, less, minus;", "mov.b32 base, 0x43004300;", "mov.b32 unit, 0x3F803F80;", *first, *lines, "}"])

_EIGHT, _EIGHT_REGISTERS = tl.constexpr(_pairs(8)), tl.constexpr("=&r,"*4 + "r,r")
_FOUR, _FOUR_REGISTERS = tl.constexpr(_pairs(4)), tl.constexpr("=&r,"*8 + "r,r")

@triton.jit
def _numbers(word, BITS: tl.constexpr):
    "All parts q of 32-bit words, as bfloat16, exactly: two of them an instruction, where a tensor core wants them"
    if _INTERPRETED:
        q = ()
        for i in tl.static_range(32//BITS): q += ((((word >> BITS*i) & ((1 << BITS) - 1)) - (1 << (BITS - 1))).to(tl.float32).to(tl.bfloat16),)
        return q
    elif BITS == 8: return tl.inline_asm_elementwise(_EIGHT, _EIGHT_REGISTERS, [word], dtype=(tl.bfloat16,)*4, is_pure=True, pack=2)
    else: return tl.inline_asm_elementwise(_FOUR, _FOUR_REGISTERS, [word], dtype=(tl.bfloat16,)*8, is_pure=True, pack=2)

@triton.jit
def _place(c, BITS: tl.constexpr, BK: tl.constexpr):
    """Where `_one_row` looks for number c of its activations: those that meet part i of consecutive words lie side by side. In a last step that is not full
    there are gaps, so that K numbers take up to 2K places"""
    if BITS == 16: return c//(2*BK)*(2*BK) + c % 2*BK + c % (2*BK)//2
    else: return c                                                                # quantised weights are packed so from the start

@triton.jit
def _step(acc, w, scales, x, r, k, one, M: tl.constexpr, FULL: tl.constexpr):
    "acc (BN, BK) + what words k to k + BK of rows r (BN, 1) add, or as many as there are"
    BITS: tl.constexpr = M.bits
    BN: tl.constexpr = M.BN
    BK: tl.constexpr = M.BK
    PARTS: tl.constexpr = 32//BITS
    COUNT: tl.constexpr = M.K//PARTS                                              # words a row
    WORDS: tl.constexpr = BK if BITS >= 16 else 128//PARTS                        # words whose parts i lie side by side
    HALF: tl.constexpr = w.dtype.element_ty == tl.float16
    if BITS >= 16: w = w.to(tl.pointer_type(tl.int32))
    j = tl.arange(0, BK)[None, :]
    column = j//WORDS*(WORDS*PARTS) + j % WORDS + 0*r                             # (BN, BK)
    ok = (k + j < COUNT) & (r >= 0)
    if FULL: ok = tl.full((BN, BK), 1, tl.int1)                                   # the compiler leaves such a mask out
    word = tl.load(w + (r*COUNT + k + j), mask=ok, other=0, eviction_policy="evict_first")
    part = tl.zeros((BN, BK), tl.float32) if BITS == 4 else acc                   # 4 bits have a scale for each block of columns
    for i in tl.static_range(PARTS):
        part += _part(word, i, one, BITS, HALF)*tl.load(x + (k*PARTS + column + i*WORDS), mask=ok, other=0.)
    if BITS == 4:
        at = r*(M.K//128) + (k//WORDS + j//WORDS)
        return acc + part*tl.load(scales + at, mask=ok, other=0.).to(tl.float32)
    else: return part

@triton.jit
def _one_row(w, scales, x, sums, r, one, M: tl.constexpr):
    """Rows r of a matrix (N, K), read as 32-bit words, times x (K,) as `_place` lays it out: (BN, 1). By fused multiply-adds; the sum over threads comes last.
    A thread reads four words of a row, and four numbers of x for each of their parts. x is read once for every row of the tile: so it is born in the layout of
    the weights, and the assembler keeps one load for all rows; read as a vector it would change threads through shared memory at every step. sums: for quantised
    weights, as `_sums` makes them"""
    BITS: tl.constexpr = M.bits
    K: tl.constexpr = M.K
    BN: tl.constexpr = M.BN
    BK: tl.constexpr = M.BK
    COUNT: tl.constexpr = K*BITS//32
    WHOLE: tl.constexpr = COUNT//BK*BK                                            # words in steps that are full; only the last may not be
    r = r[:, None]
    acc = tl.zeros((BN, BK), tl.float32)
    if M.short:
        for k in tl.static_range(0, WHOLE, BK): acc = _step(acc, w, scales, x, r, k, one, M, True)
    else:
        for k in range(0, WHOLE, BK): acc = _step(acc, w, scales, x, r, k, one, M, True)
    if WHOLE < COUNT: acc = _step(acc, w, scales, x, r, WHOLE, one, M, False)
    y = tl.sum(acc, 1)
    if BITS == 8: y = y*(1 << BITS) - tl.load(sums)                               # less what every part has too much: the same for all rows,
    if BITS == 4:                                                                 # or with a scale block by block
        BLOCKS: tl.constexpr = triton.next_power_of_2(K//128)
        b = tl.arange(0, BLOCKS)[None, :]
        ok = (b < K//128) & (r >= 0)
        total = tl.load(sums + b + 0*r, mask=ok, other=0.)*tl.load(scales + r*(K//128) + b, mask=ok, other=0.).to(tl.float32)
        y = y*(1 << BITS) - tl.sum(total, 1)
    y = y[:, None]
    if BITS == 8: y *= tl.load(scales + r).to(tl.float32)
    return y

@triton.jit
def _put(to, w, i, c, y, ok, M: tl.constexpr, R: tl.constexpr):
    """Numbers c of row i of the activations that meet a matrix w, where a product looks for them: one row as `_place` lays it out; of R rows the two halves, each (R, K), in
    the type that tensor cores multiply w in. What is made narrow here is made so once, not for every tile"""
    T: tl.constexpr = tl.bfloat16 if M.bits < 16 else w.dtype.element_ty
    if R == 1: tl.store(to + _place(c, M.bits, M.BK), y, mask=ok)
    elif T == tl.float32: tl.store(to + i*M.K + c, y, mask=ok)
    else:
        high, low = _halves(y, T)
        to = to.to(tl.pointer_type(T))
        tl.store(to + i*M.K + c, high, mask=ok)
        tl.store(to + R*M.K + i*M.K + c, low, mask=ok)

@triton.jit
def _times(q, x, k, at, ok, acc, M: tl.constexpr, R: tl.constexpr):
    "acc + q (S, BN, BK) times columns k + `at` (S, BK) of R rows as `_put` lays them out"
    T: tl.constexpr = q.dtype
    x = x.to(tl.pointer_type(T)) + k + (tl.arange(0, R)[None, None, :]*M.K + at[:, :, None])
    acc = _multiply(q, tl.load(x, mask=ok[:, :, None], other=0.), acc)
    if T == tl.float32: return acc
    else: return _multiply(q, tl.load(x + R*M.K, mask=ok[:, :, None], other=0.), acc)

@triton.jit
def _rows(w, scales, x, r, M: tl.constexpr, R: tl.constexpr):
    """Rows r of a matrix (N, K) times R rows of x as `_put` lays them out: (BN, R), by tensor cores. The columns are dealt to S slices, so that all warps multiply; of packed
    weights a slice is a block of 128. What changes from step to step is one number, k: so addresses are made once"""
    S: tl.constexpr = M.S
    BN: tl.constexpr = M.BN
    BK: tl.constexpr = M.BK
    BITS: tl.constexpr = M.bits
    PARTS: tl.constexpr = 1 if BITS >= 16 else 32//BITS
    FULL: tl.constexpr = M.width % (S*BK) == 0
    s, j, row = tl.arange(0, S)[:, None], tl.arange(0, BK)[None, :], r[None, :, None]
    at = s*BK + j                                                                 # (S, BK)
    acc = tl.zeros((S, BN, R), tl.float32)                                        # (slices, rows of the tile, rows of x)
    for k in range(0, M.width, S*BK):
        ok = k + at < M.width
        if FULL: ok = tl.full((S, BK), 1, tl.int1)
        word = tl.load(w + k + (row*M.width + at[:, None, :]), mask=ok[:, None, :], other=0, eviction_policy="evict_first")
        if BITS >= 16: acc = _times(word, x, k, at, ok, acc, M, R)
        else:
            q, part = _numbers(word, BITS), tl.zeros((S, BN, R), tl.float32)
            for n in tl.static_range(PARTS): part = _times(q[n], x, k*PARTS, s*128 + n*BK + j, ok, part, M, R)
            if BITS == 4:
                block = k//BK + s
                part *= tl.load(scales + row*(M.K//128) + block[:, :, None], mask=((block < M.K//128) | FULL)[:, :, None], other=0.).to(tl.float32)
            acc += part
    y = tl.sum(acc, 0)
    if BITS == 8: y *= tl.load(scales + r).to(tl.float32)[:, None]
    return y

@triton.jit
def _product(matrix, x, sums, r, one, M: tl.constexpr, R: tl.constexpr):
    "Rows r of a matrix times one row of activations, or times R: (BN, R)"
    w, scales = matrix
    if R == 1: return _one_row(w, scales, x, sums, r, one, M)
    else: return _rows(w, scales, x, r, M, R)

@triton.jit
def _from(matrix, row, M: tl.constexpr):
    "A matrix and its scales from a row on. Within a tile, offsets fit in 32 bits"
    PER_ROW: tl.constexpr = M.K//128 if M.bits == 4 else 1
    w, scales = matrix
    return w + tl.cast(row, tl.int64)*M.width, scales + tl.cast(row, tl.int64)*PER_ROW

@triton.jit
def _layer(w, scales, l, M: tl.constexpr):
    "Layer l of a stack: the matrix and its scales"
    return _from((w, scales), l.to(tl.int64)*M.N, M)

@triton.jit
def _there(r, first, N: tl.constexpr, BN: tl.constexpr):
    "Rows r of a tile of BN that begins with `first`, the last of N in place of those beyond it: nothing to do where tiles come out even"
    if N % BN: return tl.minimum(r, N - 1 - first)
    else: return r

@triton.jit
def _within(r, N: tl.constexpr, BN: tl.constexpr):
    "Which rows r of a tile are rows of the matrix"
    if N % BN: return r < N
    else: return tl.full(r.shape, 1, tl.int1)

@triton.jit
def _ahead(w, first, N: tl.constexpr, M: tl.constexpr, BN: tl.constexpr, AHEAD: tl.constexpr):
    "Prefetch the tile of BN rows, of N, that begins with `first`, if there is one"
    BYTES: tl.constexpr = M.K*M.bits//8                                           # a row
    if AHEAD:
        if first < N: prefetch(w + first.to(tl.int64)*M.width, (_there(BN - 1, first, N, BN) + 1)*BYTES)

@triton.jit
def _ahead_pair(w, first, M: tl.constexpr, AHEAD: tl.constexpr):
    "The same of gate and up, whose rows (2 F) a tile takes from both halves"
    F: tl.constexpr = M.N//2
    _ahead(w, first, F, M, M.BN//2, AHEAD)
    _ahead(w + F*M.width, first, F, M, M.BN//2, AHEAD)

# ------------------------------------------------------------------------------------------- activations, as a product wants them

@triton.jit
def _norm(x, gain, to, w, m, M: tl.constexpr, eps, R: tl.constexpr, BE: tl.constexpr):
    "RMS norm of m <= R rows of x (R, K) into this program's own memory, as a product with w wants it"
    i = tl.arange(0, R)[:, None]
    squares = tl.zeros((R, BE), tl.float32)
    for k in range(0, M.K, BE):
        xk = tl.load(x + i*M.K + (k + tl.arange(0, BE))[None, :], mask=i < m, other=0.)
        squares += xk*xk
    unit = tl.rsqrt(tl.sum(squares, 1)/M.K + eps)[:, None]
    for k in range(0, M.K, BE):
        c = k + tl.arange(0, BE)[None, :]
        xk = tl.load(x + i*M.K + c, mask=i < m, other=0.)
        _put(to, w, i, c, xk*unit*tl.load(gain + c).to(tl.float32), i < m, M, R)
    tl.debug_barrier()                                                            # other threads of this program read it

@triton.jit
def _sums(x, to, M: tl.constexpr):
    """For quantised weights, what the 1.5 in every `_part` adds to a product with x (K,): in each block of 128 for 4 bits, to (K/128,); in all of it for 8, to (1,)"""
    if M.bits < 16:
        EXCESS: tl.constexpr = 1.5*(1 << M.bits)
        total = tl.zeros((16,), tl.float32)
        for first in range(0, M.K//128, 16):
            b = first + tl.arange(0, 16)
            ok = b < M.K//128
            block = tl.sum(tl.load(x + b[:, None]*128 + tl.arange(0, 128)[None, :], mask=ok[:, None], other=0.), 1)
            if M.bits == 4: tl.store(to + b, EXCESS*block, mask=ok)
            else: total += block
        if M.bits == 8: tl.store(to, EXCESS*tl.sum(total, 0))
        tl.debug_barrier()

# ---------------------------------------------------------------------------------------------------------------------- attention

@triton.jit
def _turn(a, b, cos, sin):
    "Rotate pairs (a, b): the two halves of a head (Su et al. 2021, as Hugging Face lays it out)"
    return a*cos - b*sin, b*cos + a*sin

@triton.jit
def _head_norm(a, b, gain, l, d, eps, HD: tl.constexpr):
    "Qwen3's norm of a head given as its halves, each (rows, HD/2)"
    unit = tl.rsqrt((tl.sum(a*a, 1) + tl.sum(b*b, 1))/HD + eps)[:, None]
    gain += l*HD
    return a*unit*tl.load(gain + d).to(tl.float32)[None, :], b*unit*tl.load(gain + HD//2 + d).to(tl.float32)[None, :]

@triton.jit
def _online(acc, high, low, logits, v):
    "One step of the online softmax, base 2"
    top = tl.maximum(high, tl.max(logits, 1))
    shrink = tl.exp2(high - top)
    p = tl.exp2(logits - top[:, None])
    return _dot(p, v, acc*shrink[:, None]), top, low*shrink + tl.sum(p, 1)

@triton.jit
def _attend(qkv, norms, cache, rotation, found, l, kv, split, chunk, per, p, m, scale, A: tl.constexpr, SPLITS: tl.constexpr, BG: tl.constexpr, BT: tl.constexpr):
    """16 queries of one key head, heads within rows, against one split of the cache; the first split takes the new rows too, and the first program to take them
    appends them"""
    qn, kn = norms
    keys, values = cache
    cos, sin = rotation
    part, high_out, low_out = found
    H: tl.constexpr = A.heads
    KVH: tl.constexpr = A.kv_heads
    HD: tl.constexpr = A.head_dim
    BQ: tl.constexpr = 16                                                         # the least that a tensor core takes
    G: tl.constexpr = H//KVH
    WIDE: tl.constexpr = (H + 2*KVH)*HD
    NEW: tl.constexpr = 16                                                        # new rows, padded to what a tensor core takes
    d, e, row = tl.arange(0, HD//2), tl.arange(0, HD), chunk*BQ + tl.arange(0, BQ)
    i, g = row//BG, row % BG
    live = ((i < m) & (g < G))[:, None]
    at = qkv + (i*WIDE + (kv*G + g)*HD)[:, None] + d[None, :]
    a, b = tl.load(at, mask=live, other=0.), tl.load(at + HD//2, mask=live, other=0.)
    if A.qk_norm: a, b = _head_norm(a, b, qn, l, d, A.eps, HD)
    angle = (p + i)[:, None]*(HD//2) + d[None, :]
    a, b = _turn(a*scale, b*scale, tl.load(cos + angle, mask=live, other=0.), tl.load(sin + angle, mask=live, other=0.))
    base = (l*KVH + kv).to(tl.int64)*(A.max_len*HD)
    high, low = tl.full((BQ,), float("-inf"), tl.float32), tl.zeros((BQ,), tl.float32)
    acc = tl.zeros((BQ, HD), tl.float32)
    if split == 0:
        n = tl.arange(0, NEW)
        new = (n < m)[:, None]
        from_new = qkv + (n*WIDE + (H + kv)*HD)[:, None] + d[None, :]
        ka, kb = tl.load(from_new, mask=new, other=0.), tl.load(from_new + HD//2, mask=new, other=0.)
        if A.qk_norm: ka, kb = _head_norm(ka, kb, kn, l, d, A.eps, HD)
        turn = (p + n)[:, None]*(HD//2) + d[None, :]
        ka, kb = _turn(ka, kb, tl.load(cos + turn, mask=new, other=0.), tl.load(sin + turn, mask=new, other=0.))
        v = tl.load(qkv + (n*WIDE + (H + KVH + kv)*HD)[:, None] + e[None, :], mask=new, other=0.)
        ka, kb, v = ka.to(keys.dtype.element_ty), kb.to(keys.dtype.element_ty), v.to(keys.dtype.element_ty) # as they will be read later
        to = base + (p + n)[:, None]*HD
        tl.store(keys + to + d[None, :], ka, mask=new & (chunk == 0))
        tl.store(keys + to + HD//2 + d[None, :], kb, mask=new & (chunk == 0))
        tl.store(values + to + e[None, :], v, mask=new & (chunk == 0))
        logits = _dot(b, tl.trans(kb), _dot(a, tl.trans(ka), tl.zeros((BQ, NEW), tl.float32)))
        seen = (n[None, :] <= i[:, None]) & (n < m)[None, :]
        acc, high, low = _online(acc, high, low, tl.where(seen, logits, float("-inf")), v)
    for first in range(split*per, tl.minimum(split*per + per, p), BT):
        o = first + tl.arange(0, BT)
        old = (o < p)[:, None]
        from_ = base + o[:, None]*HD
        oa = tl.load(keys + from_ + d[None, :], mask=old, other=0.)
        ob = tl.load(keys + from_ + HD//2 + d[None, :], mask=old, other=0.)
        ov = tl.load(values + from_ + e[None, :], mask=old, other=0.)
        dots = _dot(b, tl.trans(ob), _dot(a, tl.trans(oa), tl.zeros((BQ, BT), tl.float32)))
        acc, high, low = _online(acc, high, low, tl.where((o < p)[None, :], dots, float("-inf")), ov)
    out = (i*H + kv*G + g)*SPLITS + split
    tl.store(part + out[:, None]*HD + e[None, :], acc, mask=live)
    mine = (i < m) & (g < G)
    tl.store(high_out + out, high, mask=mine)
    tl.store(low_out + out, low, mask=mine)

@triton.jit
def _parts(p, SPLITS: tl.constexpr, BT: tl.constexpr):
    "Places of the cache a split, and how many splits p places make"
    per = tl.maximum(tl.cdiv(tl.cdiv(p, SPLITS), BT), 1)*BT
    return per, tl.maximum(tl.cdiv(p, per), 1)

@triton.jit
def _combine(found, to, w, m, splits, H: tl.constexpr, HD: tl.constexpr, M: tl.constexpr, SPLITS: tl.constexpr, R: tl.constexpr, BC: tl.constexpr):
    """One softmax from the splits: m rows of H HD, as a product with w wants them. Eight splits at a time, whose loads wait for nothing but memory: one after the other,
    each would wait for what the last one made of the maximum. Four in the form for several rows, where registers are few"""
    MANY: tl.constexpr = 8 if R == 1 else 4
    part, high, low = found
    for i in range(m):
        for k in range(0, H*HD, BC):
            c = k + tl.arange(0, BC)
            head = (i*H + c//HD)*SPLITS
            top, below, acc = tl.full((BC,), float("-inf"), tl.float32), tl.zeros((BC,), tl.float32), tl.zeros((BC,), tl.float32)
            for first in range(0, splits, MANY):
                joint = top
                for s in tl.static_range(MANY): joint = tl.maximum(joint, tl.load(high + head + first + s, mask=(first + s < splits) & (c >= 0), other=float("-inf")))
                shrink = tl.exp2(top - joint)
                acc, below, top = acc*shrink, below*shrink, joint
                for s in tl.static_range(MANY):
                    ok, at = (first + s < splits) & (c >= 0), head + first + s
                    a = tl.exp2(tl.load(high + at, mask=ok, other=float("-inf")) - joint)
                    acc += tl.load(part + at*HD + c % HD, mask=ok, other=0.)*a
                    below += tl.load(low + at, mask=ok, other=0.)*a
            _put(to, w, i, c, acc/below, c >= 0, M, R)
    tl.debug_barrier()

# ---------------------------------------------------------------------------------------------------------------- choosing a token

@triton.jit
def _gumbel(seed, token, place):
    "Gumbel noise of a token at a place: Philox-4x32-10 with counter (token, place, 0, 0) and key `seed`"
    zero = tl.zeros_like(token)
    bits, _, _, _ = tl.philox(seed, token.to(tl.uint32), (place + zero).to(tl.uint32), zero.to(tl.uint32), zero.to(tl.uint32))
    return -tl.log(-tl.log(((bits >> 9).to(tl.float32) + .5)*1.1920928955078125e-07)) # 23 bits, never 0 or 1

@triton.jit
def _pick(best, best_id, row, programs, ROWS: tl.constexpr, BP: tl.constexpr, V: tl.constexpr):
    "The best of what all programs found; the lowest token wins ties"
    p = tl.arange(0, BP)
    x = tl.load(best + p*ROWS + row, mask=p < programs, other=float("-inf"))
    token = tl.load(best_id + p*ROWS + row, mask=p < programs, other=_NONE)
    return tl.minimum(tl.min(tl.where(x == tl.max(x, 0), token, _NONE), 0), V - 1)  # NaN logits: some token, no wild read

# --------------------------------------------------------------------------------------------------------------------- the stages

# Each takes the tiles that are this program's: pid, pid + programs, …

@triton.jit
def _tile(grid, tile, matrix, x, sums, one, M: tl.constexpr, R: tl.constexpr, AHEAD: tl.constexpr):
    "The rows of a tile, beyond the last too, and what they are times x: (BN,), (BN, R). Asks for the next tile first"
    _ahead(matrix[0], (tile + grid[1])*M.BN, M.N, M, M.BN, AHEAD)
    first, j = tile*M.BN, tl.arange(0, M.BN)
    return first + j, _product(_from(matrix, first, M), x, sums, _there(j, first, M.N, M.BN), one, M, R)

@triton.jit
def _qkv_stage(grid, matrix, x, sums, bias, to, m, one, M: tl.constexpr, BIAS: tl.constexpr, R: tl.constexpr, AHEAD: tl.constexpr):
    "to (R, N) = x W^T (+ b)"
    i = tl.arange(0, R)[None, :]
    for tile in range(grid[0], tl.cdiv(M.N, M.BN), grid[1]):
        r, y = _tile(grid, tile, matrix, x, sums, one, M, R, AHEAD)
        ok = _within(r, M.N, M.BN)[:, None]
        if BIAS: y += tl.load(bias + r[:, None], mask=ok, other=0.).to(tl.float32)
        tl.store(to + i*M.N + r[:, None], y, mask=ok & (i < m))

@triton.jit
def _attention_stage(grid, qkv, norms, cache, rotation, found, l, p, m, scale, A: tl.constexpr, SPLITS: tl.constexpr, BG: tl.constexpr, BT: tl.constexpr):
    "A unit is a key head, a split of its cache, and 16 of the queries that ask it: as many as there are"
    per, splits = _parts(p, SPLITS, BT)
    chunks = tl.cdiv(m*BG, 16)
    for u in range(grid[0], A.kv_heads*splits*chunks, grid[1]):
        _attend(qkv, norms, cache, rotation, found, l, u//chunks//splits, u//chunks % splits, u % chunks, per, p, m, scale, A, SPLITS, BG, BT)

@triton.jit
def _add(r, y, stream, h, m, M: tl.constexpr, R: tl.constexpr):
    "h (R, N) = stream + y (BN, R), at rows r of the matrix"
    i = tl.arange(0, R)[None, :]
    ok = _within(r, M.N, M.BN)[:, None] & (i < m)
    tl.store(h + i*M.N + r[:, None], y + tl.load(stream + i*M.N + r[:, None], mask=ok, other=0.), mask=ok)

@triton.jit
def _output_stage(grid, matrix, x, sums, stream, h, m, one, M: tl.constexpr, R: tl.constexpr, AHEAD: tl.constexpr):
    "h (R, N) = stream + x Wo^T"
    for tile in range(grid[0], tl.cdiv(M.N, M.BN), grid[1]):
        r, y = _tile(grid, tile, matrix, x, sums, one, M, R, AHEAD)
        _add(r, y, stream, h, m, M, R)

@triton.jit
def _down_stage(grid, matrix, x, sums, h, m, one, M: tl.constexpr, R: tl.constexpr, AHEAD: tl.constexpr):
    "h (R, N) += x Wd^T"
    for tile in range(grid[0], tl.cdiv(M.N, M.BN), grid[1]):
        r, y = _tile(grid, tile, matrix, x, sums, one, M, R, AHEAD)
        _add(r, y, h, h, m, M, R)

@triton.jit
def _gate_up_stage(grid, matrix, x, sums, act, m, one, M: tl.constexpr, DOWN: tl.constexpr, R: tl.constexpr, AHEAD: tl.constexpr):
    "act (R, F) = silu(x Wg^T) * (x Wu^T), as the product with Wd wants it. Of the rows (2 F) of the stack a tile takes gate and up in turn"
    F: tl.constexpr = M.N//2
    HALF: tl.constexpr = M.BN//2
    i, j = tl.arange(0, R)[None, :], tl.arange(0, M.BN)
    for tile in range(grid[0], tl.cdiv(F, HALF), grid[1]):
        _ahead_pair(matrix[0], (tile + grid[1])*HALF, M, AHEAD)
        first = tile*HALF
        y = _product(_from(matrix, first, M), x, sums, _there(j//2, first, F, HALF) + (j % 2)*F, one, M, R)
        gate, up = tl.split(tl.permute(tl.reshape(y, (HALF, 2, R)), (0, 2, 1)))
        r = first + tl.arange(0, HALF)
        _put(act, matrix[0], i, r[:, None], gate*tl.sigmoid(gate)*up, _within(r, F, HALF)[:, None] & (i < m), DOWN, R)

@triton.jit
def _head_stage(grid, matrix, x, sums, best, best_id, p, inverse_temperature, seed, one, M: tl.constexpr, SAMPLE: tl.constexpr,
                R: tl.constexpr, ROWS: tl.constexpr, AHEAD: tl.constexpr):
    "The best token that this program sees for each of the rows fed at places p, p + 1, …"
    BN: tl.constexpr = M.BN
    i = tl.arange(0, R)
    top, top_id = tl.full((BN, R), float("-inf"), tl.float32), tl.full((BN, R), _NONE, tl.int32)
    for tile in range(grid[0], tl.cdiv(M.N, M.BN), grid[1]):
        r, y = _tile(grid, tile, matrix, x, sums, one, M, R, AHEAD)
        if SAMPLE: y = y*inverse_temperature + _gumbel(seed, r[:, None] + 0*i[None, :], p + i[None, :])
        better = (y > top) & _within(r, M.N, BN)[:, None]
        top, top_id = tl.where(better, y, top), tl.where(better, r[:, None], top_id)
    most = tl.max(top, 0)
    tl.store(best + grid[0]*ROWS + i, most)
    tl.store(best_id + grid[0]*ROWS + i, tl.min(tl.where(top == most[None, :], top_id, _NONE), 0))

@triton.jit
def _begin(grid, tokens, emb, to, best, best_id, picked, p, t, m, A: tl.constexpr, R: tl.constexpr, ROWS: tl.constexpr, BE: tl.constexpr, BP: tl.constexpr):
    "Pick what token t - 1 is followed by; copy the embedding of what is fed at place p, everyone for itself: saves a barrier"
    pid, programs = grid
    D: tl.constexpr = A.hidden
    if R == 1:
        if t == 0: token = tl.load(tokens + p)
        else:
            token = _pick(best, best_id, 0, programs, ROWS, BP, A.vocab)
            if pid == 0: tl.store(tokens + p, token)
        for k in range(0, D, BE):
            c = k + tl.arange(0, BE)
            tl.store(to + c, tl.load(emb + token.to(tl.int64)*D + c).to(tl.float32))
        tl.debug_barrier()
    elif (t > 0) & (pid == 0):
        for row in range(m): tl.store(picked + row, _pick(best, best_id, row, programs, ROWS, BP, A.vocab))

@triton.jit
def _next_matrix(pid, wqkv, wo, wgu, wd, head, stage, l, A: tl.constexpr, QKV: tl.constexpr, O: tl.constexpr, GU: tl.constexpr, DOWN: tl.constexpr, HEAD: tl.constexpr):
    "Between arriving at a barrier and waiting: ask for the first tile of the next matrix that is not yet on its way. Stage 5 is the head"
    k = l.to(tl.int64)
    if stage == 5: _ahead(wqkv, pid*QKV.BN, QKV.N, QKV, QKV.BN, True)
    elif stage == 0: _ahead(wo + k*(O.N*O.width), pid*O.BN, O.N, O, O.BN, True)
    elif stage == 1: _ahead_pair(wgu + k*(GU.N*GU.width), pid*(GU.BN//2), GU, True)
    elif stage == 2: _ahead(wd + k*(DOWN.N*DOWN.width), pid*DOWN.BN, DOWN.N, DOWN, DOWN.BN, True)
    elif stage == 3:
        if l + 1 < A.layers: _ahead(wqkv + (k + 1)*(QKV.N*QKV.width), pid*QKV.BN, QKV.N, QKV, QKV.BN, True)
        else: _ahead(head, pid*HEAD.BN, HEAD.N, HEAD, HEAD.BN, True)

# --------------------------------------------------------------------------------------------------------------------- the kernel

@triton.jit(do_not_specialize=["pos", "n", "m", "lo", "hi", "seed", "one"])
def _decode_kernel(tokens, emb, wqkv, sqkv, bqkv, qn, kn, wo, so, wgu, sgu, wd, sd, n1, n2, nf, head, shead, cos, sin,
                   keys, values, h, qkv, part, high, low, own, act, best, best_id, picked, barrier,
                   pos, n, m, lo, hi, scale, inverse_temperature, seed, one,
                   A: tl.constexpr, QKV: tl.constexpr, O: tl.constexpr, GU: tl.constexpr, DOWN: tl.constexpr, HEAD: tl.constexpr, SAMPLE: tl.constexpr,
                   R: tl.constexpr, ROWS: tl.constexpr, OWN: tl.constexpr, SPLITS: tl.constexpr, BC: tl.constexpr, BE: tl.constexpr, BG: tl.constexpr,
                   BT: tl.constexpr, BP: tl.constexpr, AHEAD: tl.constexpr, REVERSE: tl.constexpr):
    "Stages lo..hi of n tokens fed one after the other (R = 1), or of m rows fed at once (R = ROWS, n = 1). A is the `Shape`, QKV, O, GU, DOWN, HEAD are `Cut`s"
    pid, programs = tl.program_id(0), tl.num_programs(0)
    if REVERSE: pid = programs - 1 - pid
    grid = (pid, programs)
    D: tl.constexpr = A.hidden
    eps: tl.constexpr = A.eps
    mine = own + pid*OWN                                                          # a private copy of the embedding's row (D,), …
    x = mine + D                                                                  # … of activations as `_put` lays them out …
    sums = x + ROWS*max(D, O.K)                                                   # … and of their sums
    found = (part, high, low)
    for s in range(lo, hi):
        t = s//(5*A.layers + 1)
        u = s - t*(5*A.layers + 1)
        l = u//5
        stage = u - l*5
        p = pos + t
        if u == 5*A.layers:
            _norm(h, nf, x, head, m, HEAD, eps, R, BE)
            if R == 1: _sums(x, sums, HEAD)
            _head_stage(grid, (head, shead), x, sums, best, best_id, p, inverse_temperature, seed, one, HEAD, SAMPLE, R, ROWS, AHEAD)
        elif stage == 0:
            if l == 0: _begin(grid, tokens, emb, mine, best, best_id, picked, p, t, m, A, R, ROWS, BE, BP)
            if t < n:
                before = h
                if (R == 1) & (l == 0): before = mine
                _norm(before, n1 + l*D, x, wqkv, m, QKV, eps, R, BE)
                if R == 1: _sums(x, sums, QKV)
                _qkv_stage(grid, _layer(wqkv, sqkv, l, QKV), x, sums, bqkv + l*QKV.N, qkv, m, one, QKV, A.qkv_bias, R, AHEAD)
        elif stage == 1: _attention_stage(grid, qkv, (qn, kn), (keys, values), (cos, sin), found, l, p, m, scale, A, SPLITS, BG, BT)
        elif stage == 2:
            _combine(found, x, wo, m, _parts(p, SPLITS, BT)[1], A.heads, A.head_dim, O, SPLITS, R, BC)
            if R == 1: _sums(x, sums, O)
            stream = h
            if (R == 1) & (l == 0): stream = mine
            _output_stage(grid, _layer(wo, so, l, O), x, sums, stream, h, m, one, O, R, AHEAD)
        elif stage == 3:
            _norm(h, n2 + l*D, x, wgu, m, GU, eps, R, BE)
            if R == 1: _sums(x, sums, GU)
            _gate_up_stage(grid, _layer(wgu, sgu, l, GU), x, sums, act, m, one, GU, DOWN, R, AHEAD)
        else:
            if R == 1: _sums(act, sums, DOWN)
            _down_stage(grid, _layer(wd, sd, l, DOWN), act, sums, h, m, one, DOWN, R, AHEAD)
        if s + 1 < hi:
            arrival = grid_arrive(barrier)
            if AHEAD: _next_matrix(pid, wqkv, wo, wgu, wd, head, 5 if u == 5*A.layers else stage, l, A, QKV, O, GU, DOWN, HEAD)
            grid_wait(barrier, arrival)

# ---------------------------------------------------------------------------------------------------------------------- the launch

NOMINAL = 132 if not interpreted(_decode_kernel) else 4 # multiprocessors that tiles are cut for (an H100 or H200), on every GPU: no sum depends on the grid
TILE = 160 << 10 # bytes of a matrix that a program works on at a time: for all, twice 20 of an H200's 50 MiB of L2
KINDS = {"int8": 8, "int4-g128": 4} # bits a weight
DTYPES = (torch.float32, torch.bfloat16, torch.float16) # of what is not quantised
WARPS = 8 # a program: one program fills a multiprocessor
#: of every launch, and of `aot_cases`. Also a launch of one stage is cooperative, so that one compilation serves both; fused multiply-adds do not hang on Triton's default
OPTIONS = dict(num_warps=WARPS, num_stages=2, launch_cooperative_grid=True, enable_fp_fusion=True)

def _own(s: Shape) -> int: # numbers that a program keeps to itself: a row of the embedding (D,), activations (ROWS, D) or (ROWS, H HD), their sums (K/128,); whole lines of 128 bytes
    A = s.heads*s.head_dim
    return triton.cdiv(s.hidden + ROWS*max(s.hidden, A) + triton.cdiv(max(s.hidden, A, s.ffn), 128), 32)*32

def _splits(s: Shape) -> int: # of a head's cache
    return max(NOMINAL//s.kv_heads, 1)

def _divisor(n: int, most: int) -> int: # the largest power of two that divides n, at most `most`
    return min(n & -n, most)

def _tile_rows(N: int, words: int) -> int: # rows; of 32-bit words
    """Rows a tile: what keeps a full grid busiest, where a tile's end, with the sum over threads, costs as much as 2048 words: half a row that is long, several that are
    short; the larger of equals. Not so few that a thread has no four words to read, nor so many that two tiles a program, the one at work and the one prefetched, crowd
    the L2 cache"""
    least, most = min(16, max(4, triton.next_power_of_2(triton.cdiv(1024, words)))), max(4, TILE//(4*words))
    return min((b for b in (16, 8, 4) if least <= b <= max(most, least)), key=lambda b: (triton.cdiv(triton.cdiv(N, b), NOMINAL)*(b + 2048/words), -b))

def _columns(K: int, bits: int, rows: int, tile: int) -> tuple[int, int]: # words (numbers for `_rows`) a step along a row; slices of `_rows`
    """One to four times four words a thread, so many that the least is left empty in the last step, the larger of equals; where rows are short, four words for each
    thread of a warp. With several rows a slice is a block of packed weights, or up to 256 bytes of a row of others"""
    if rows > 1: return 128*bits//32 if bits < 16 else min(2048//bits, max(16, triton.next_power_of_2(triton.cdiv(K, 8)))), 8
    words = K*bits//32
    sizes = (4096, 2048, 1024) if words > 1024 else (128*max(tile, 8),)
    return min((min(n//tile, triton.next_power_of_2(words)) for n in sizes), key=lambda b: (triton.cdiv(words, b)*b, -b)), 1

def _bits(w: torch.Tensor | Quantised) -> int:
    return KINDS[w.kind] if isinstance(w, Quantised) else 8*w.element_size()

@lru_cache(maxsize=64)
def _constants(shape: Shape, bits: int, head_bits: int, rows: int, splits: int, programs: int, *, sample: bool = False, ahead: bool = False, reverse: bool = False) -> dict:
    "What the kernel is compiled with. Not to be changed"
    s, R = shape, 1 if rows == 1 else ROWS
    cuts = {}
    for name, (N, K) in _sizes(s).items():
        b = head_bits if name == "head" else bits
        tile = _tile_rows(N, K*b//32) if R == 1 else 16
        cuts[name] = Cut(N, K, b, tile, *_columns(K, b, R, tile))
    return dict(zip(("QKV", "O", "GU", "DOWN", "HEAD"), cuts.values())) | dict(
        A=s, SAMPLE=sample, R=R, ROWS=ROWS, OWN=_own(s), SPLITS=splits, BC=_divisor(s.heads*s.head_dim, 1024), BE=_divisor(s.hidden, 1024 if R == 1 else 256),
        BG=triton.next_power_of_2(s.heads//s.kv_heads), BT=min(max(triton.next_power_of_2(s.max_len)//64, 16), 64), BP=max(2, triton.next_power_of_2(programs)),
        AHEAD=ahead, REVERSE=reverse)

def allocate(shape: Shape, # of the model
             *, device: torch.device | str = "cpu", # where
             dtype: torch.dtype = torch.float32, # of the cache
             programs: int | None = None, # most programs that a launch will have; None is one a multiprocessor, 8 on a CPU
             splits: int | None = None, # most parts that a head's cache is cut into; None is as many as give each of `NOMINAL` programs one
            ) -> Buffers: # uninitialised, but for the barrier
    """Buffers for one sequence.

    `allocate(shape, splits=1)` has each key head's cache read by one program, in one piece; `splits=4` by up to four, each a quarter of the places that are there,
    so that their sum is made in another order. All launches of a text want the same buffers."""
    s, device = shape, torch.device(device)
    if programs is None: programs = torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 8
    splits = _splits(s) if splits is None else splits
    new = lambda *size, dtype=torch.float32: torch.empty(size, dtype=dtype, device=device)
    cache = (s.layers, s.kv_heads, s.max_len, s.head_dim)
    return Buffers(keys=new(*cache, dtype=dtype), values=new(*cache, dtype=dtype), h=new(ROWS, s.hidden), qkv=new(ROWS, (s.heads + 2*s.kv_heads)*s.head_dim),
                   part=new(ROWS, s.heads, splits, s.head_dim), high=new(ROWS, s.heads, splits), low=new(ROWS, s.heads, splits),
                   own=new(programs, _own(s)), act=new(ROWS, s.ffn), best=new(programs, ROWS),
                   best_id=new(programs, ROWS, dtype=torch.int32), picked=new(ROWS, dtype=torch.int32), barrier=torch.zeros(1, dtype=torch.int32, device=device))

def _matrices(weights: Weights) -> dict: # name -> tensor or Quantised
    return {name: getattr(weights, name) for name in ("wqkv", "wo", "wgu", "wd", "head")}

def why_not(shape: Shape, # of the model
            weights: Weights,
           ) -> str: # "" where the kernel takes them
    "Why the kernel does not take this model, or cannot run where its weights lie"
    s, body = shape, [w for name, w in _matrices(weights).items() if name != "head"]
    if reason := why_not_here(_decode_kernel, weights.emb): return reason
    if s.heads % s.kv_heads or s.heads//s.kv_heads > 16: return f"1 to 16 query heads a key head wanted, got {s.heads} and {s.kv_heads}"
    least = 16 if interpreted(_decode_kernel) else 32                             # a tensor core takes 16 numbers of half a head
    if s.head_dim & (s.head_dim - 1) or not least <= s.head_dim <= 256: return f"the head dim must be a power of two from {least} to 256, got {s.head_dim}"
    for name, w in [("emb", weights.emb), *_matrices(weights).items()]:
        if not isinstance(w, Quantised) and w.dtype not in DTYPES: return f"{name}: numbers of {', '.join(map(str, DTYPES))} wanted, got {w.dtype}"
    if len({_bits(w) for w in body}) > 1 or len({isinstance(w, Quantised) for w in body}) > 1: return "the matrices of the layers must all be of one kind"
    for name, w in _matrices(weights).items():
        N, K = _sizes(s)[name]
        step = 128 if isinstance(w, Quantised) else 16
        if K % step: return f"{name}: rows of a multiple of {step} numbers wanted, got {K}"
        if isinstance(w, Quantised) and w.kind not in KINDS: return f"{name}: kind must be one of {', '.join(KINDS)}, got {w.kind!r}"
    return ""

def _sizes(s: Shape) -> dict: # name -> (rows, columns)
    A = s.heads*s.head_dim
    return dict(wqkv=(A + 2*s.kv_heads*s.head_dim, s.hidden), wo=(s.hidden, A), wgu=(2*s.ffn, s.hidden), wd=(s.hidden, s.ffn), head=(s.vocab, s.hidden))

def _check(s: Shape, weights: Weights) -> None:
    "Shapes of all that is read. Raises `ValueError` that names what does not fit"
    L, NQ = s.layers, (s.heads + 2*s.kv_heads)*s.head_dim
    wanted = dict(emb=(s.vocab, s.hidden), n1=(L, s.hidden), n2=(L, s.hidden), nf=(s.hidden,), cos=(s.max_len, s.head_dim//2), sin=(s.max_len, s.head_dim//2))
    wanted |= dict(bqkv=(L, NQ)) if s.qkv_bias else {}
    wanted |= dict(qn=(L, s.head_dim), kn=(L, s.head_dim)) if s.qk_norm else {}
    for name, w in _matrices(weights).items():
        N, K = _sizes(s)[name]
        lead = () if name == "head" else (L,)
        if not isinstance(w, Quantised): wanted[name] = (*lead, N, K); continue
        packed, scales = (*lead, N, K*KINDS[w.kind]//32), (*lead, N) if w.kind == "int8" else (*lead, N, K//128)
        if w.packed.shape != packed or w.packed.dtype != torch.int32: raise ValueError(f"{name}.packed must be int32 {packed}, got {w.packed.dtype} {tuple(w.packed.shape)}")
        if w.scales.shape != scales: raise ValueError(f"{name}.scales must be {scales}, got {tuple(w.scales.shape)}")
    for name, size in wanted.items():
        x = getattr(weights, name)
        if x is None or tuple(x.shape) != size: raise ValueError(f"{name} must be {size}, got {None if x is None else tuple(x.shape)}")
    for name, x in weights._asdict().items():
        for y in (x[:2] if isinstance(x, Quantised) else (x,)):
            if y is not None and not y.is_contiguous(): raise ValueError(f"{name} must be contiguous")

def _split(w: torch.Tensor | Quantised) -> tuple[torch.Tensor, torch.Tensor]: # the matrix, its scales (any tensor where there are none)
    return (w.packed, w.scales) if isinstance(w, Quantised) else (w, w)

def decode(shape: Shape, # of the model
           weights: Weights,
           buffers: Buffers,
           tokens: torch.Tensor, # (max_len + 1,) int32: tokens[pos] is fed; successors are written behind it
           pos: int, # place of the first token fed; the cache holds all places before it
           n: int = 1, # tokens to feed one after the other, each but the first being what was picked
           *, rows: int = 1, # tokens fed at once, tokens[pos:pos + rows], in one pass over the weights; with rows > 1, n is 1
           head: bool = True, # False leaves out the head and picks nothing (prompts); with n = 1
           programs: int | None = None, # of the launch; None is as many as `buffers` allow (1 where the interpreter runs a persistent launch)
           stages: tuple[int, int] | None = None, # run these stages only, of n(5L + 1) + 1, or 5L without the head, in one launch; with the same `programs` throughout a token
           reverse: bool = False, # the last program does the first's work: a test of hidden dependences
           sampler: Sampler | None = None, # None is greedy, the lowest index winning ties
           backend: str = "auto", # "persistent": one launch; "staged": a launch a stage, no barrier; "auto": persistent on a GPU, else staged
          ) -> torch.Tensor: # int32 successors: (n,) written to `tokens` too, or (rows,) if rows > 1
    """Run `n` tokens, or `rows` at once, through the whole decoder. Nothing is copied to the host. Raises `ValueError` if shapes do not fit, or
    if the cache would overflow.

    Stage 5l + u is stage u of layer l, 5L the head, 5L + 1 begins with the next token: `stages=(5*l, 5*l + 1)` runs norm and QKV of layer l alone, with what
    is in the buffers; `stages=(0, 5)` and then `stages=(5, 5*L + 2)` leave what one launch leaves."""
    if backend not in ("auto", "persistent", "staged"): raise ValueError(f"backend must be auto, persistent or staged, got {backend!r}")
    if reason := why_not(shape, weights): raise ValueError(reason)
    _check(shape, weights)
    if not 1 <= rows <= ROWS or n < 1 or (n > 1 and rows > 1) or (n > 1 and not head):
        raise ValueError(f"n tokens in turn, or up to {ROWS} rows at once, with or without the head, wanted; got n = {n}, rows = {rows}, head = {head}")
    if pos < 0 or pos + n*rows > shape.max_len: raise ValueError(f"places {pos} to {pos + n*rows - 1} do not fit a cache of {shape.max_len}")
    if tokens.shape != (shape.max_len + 1,) or tokens.dtype != torch.int32: raise ValueError(f"tokens must be int32 ({shape.max_len + 1},), got {tokens.dtype} {tuple(tokens.shape)}")
    if sampler is not None and not sampler.temperature > 0: raise ValueError(f"the temperature must be positive, got {sampler.temperature}; greedy is sampler=None")
    if sampler is not None and not 0 <= sampler.seed < 2**63: raise ValueError(f"the seed must lie in 0..2**63 - 1, got {sampler.seed}")
    if backend == "auto": backend = "persistent" if weights.emb.is_cuda else "staged"
    every = (0, n*(5*shape.layers + 1) + 1 if head else 5*shape.layers)
    first, last = stages or every
    if not 0 <= first < last <= every[1]: raise ValueError(f"stages must lie in {every}, got {stages}")
    most = len(buffers.best)
    alone = interpreted(_decode_kernel) and sequential() and backend == "persistent" and last - first > 1
    programs = (1 if alone else most) if programs is None else programs
    if not 1 <= programs <= most: raise ValueError(f"the buffers allow 1 to {most} programs, got {programs}")
    if alone and programs > 1: raise ValueError("the interpreter runs programs one after the other: with more than one, a launch of several stages would wait for ever")
    if rows > 1 and first == 0: buffers.h[:rows] = weights.emb.index_select(0, tokens[pos:pos + rows])
    launches = [(first, last)] if stages or backend == "persistent" else [(k, k + 1) for k in range(first, last)]
    for span in launches: _launch(shape, weights, buffers, tokens, pos, n, rows, programs, span, reverse, sampler)
    return buffers.picked[:rows] if rows > 1 else tokens[pos + 1:pos + 1 + n]

def _launch(shape: Shape, weights: Weights, buffers: Buffers, tokens: torch.Tensor, pos: int, n: int, rows: int, programs: int, span: tuple[int, int],
            reverse: bool, sampler: Sampler | None) -> None:
    "One launch of a range of stages"
    w, b, cuda = weights, buffers, weights.emb.is_cuda
    constants = _constants(shape, _bits(w.wqkv), _bits(w.head), rows, b.part.shape[2], len(b.best), sample=sampler is not None,
                           ahead=cuda and torch.cuda.get_device_capability(w.emb.device) >= (9, 0), reverse=reverse)
    sampler = sampler or Sampler()
    none = w.emb                                                                  # stands for what is not there
    (wqkv, sqkv), (wo, so), (wgu, sgu), (wd, sd), (head, shead) = map(_split, _matrices(w).values())
    given = lambda x: none if x is None else x
    with torch.cuda.device_of(w.emb):
        _decode_kernel[programs,](tokens, w.emb, wqkv, sqkv, given(w.bqkv), given(w.qn), given(w.kn), wo, so, wgu, sgu, wd, sd, w.n1, w.n2, w.nf, head, shead,
                                  w.cos, w.sin, b.keys, b.values, b.h, b.qkv, b.part, b.high, b.low, b.own, b.act, b.best, b.best_id, b.picked, b.barrier,
                                  pos, n, rows, *span, (shape.scale or shape.head_dim**-.5)*1.4426950408889634, 1/sampler.temperature, sampler.seed, 0x3F800000,
                                  **constants, **OPTIONS)

def gumbel(seed: int, # of the sampler
           place: int, # where the token was fed whose successor is drawn
           vocab: int, # how many tokens
          ) -> np.ndarray: # (vocab,) fp32
    "The noise that the kernel adds to logits divided by the temperature: Philox-4x32-10, counter (token, place, 0, 0), key `seed`"
    c = [np.arange(vocab, dtype=np.uint64), np.full(vocab, place, np.uint64), np.zeros(vocab, np.uint64), np.zeros(vocab, np.uint64)]
    key, low = [seed & 0xFFFFFFFF, seed >> 32 & 0xFFFFFFFF], np.uint64(0xFFFFFFFF)
    for _ in range(10):
        a, b = c[0]*np.uint64(0xD2511F53), c[2]*np.uint64(0xCD9E8D57)
        c = [(b >> np.uint64(32)) ^ c[1] ^ np.uint64(key[0]), b & low, (a >> np.uint64(32)) ^ c[3] ^ np.uint64(key[1]), a & low]
        key = [(key[0] + 0x9E3779B9) & 0xFFFFFFFF, (key[1] + 0xBB67AE85) & 0xFFFFFFFF]
    u = ((c[0] >> np.uint64(9)).astype(np.float32) + np.float32(.5))*np.float32(2**-23)
    return -np.log(-np.log(u))

# ------------------------------------------------------------------------------------------------ ahead-of-time compilation

def _published(layers: int, hidden: int, heads: int, kv_heads: int, head_dim: int, ffn: int, vocab: int, **more) -> Shape: # with room for 8192 tokens
    return Shape(layers, hidden, heads, kv_heads, head_dim, ffn, vocab, 8192, **more)

#: shapes of published models, under their names
MODELS = {"Llama-3.2-1B": _published(16, 2048, 32, 8, 64, 8192, 128256), "Qwen2.5-1.5B": _published(28, 1536, 12, 2, 128, 8960, 151936, eps=1e-6, qkv_bias=True),
          "Llama-3.1-8B": _published(32, 4096, 32, 8, 128, 14336, 128256), "Qwen3-8B": _published(36, 4096, 32, 8, 128, 12288, 151936, eps=1e-6, qk_norm=True)}

def aot_cases(models: tuple[str, ...] = ("Llama-3.2-1B", "Qwen2.5-1.5B", "Llama-3.1-8B"), # of `MODELS`
              kinds: tuple[str, ...] = ("bf16",), # "bf16", "fp16", "fp32", "int8", "int4-g128" (with an int8 head); what is not packed is bf16 there
              rows: tuple[int, ...] = (1,), # 1, or more for the form that verifies and reads prompts
              sm: int = 90, # compute capability times ten
              sample: bool = False, # the form that draws tokens
             ) -> list: # of `aot.Case`: the kernel as it is launched
    "What `rlcr_suite.kernels.aot` compiles"
    return [_case(model, kind, r, sm, sample) for model in models for kind in kinds for r in rows]

def _case(model: str, kind: str, rows: int, sm: int, sample: bool):
    "One of them"
    from .aot import Case
    s, dtype, fixed = MODELS[model], kind if kind in ("fp16", "fp32") else "bf16", ("num_warps", "num_stages")
    bits, head_bits = {"fp32": (32, 32), "int8": (8, 8), "int4-g128": (4, 8)}.get(kind, (16, 16))
    constants = _constants(s, bits, head_bits, rows, _splits(s), NOMINAL, sample=sample, ahead=sm >= 90)
    types = dict.fromkeys(("tokens", "best_id", "picked", "barrier"), "*i32") | dict.fromkeys(("emb", "bqkv", "qn", "kn", "n1", "n2", "nf", "keys", "values"), "*" + dtype)
    types |= dict.fromkeys(("wqkv", "wo", "wgu", "wd"), "*" + dtype if bits >= 16 else "*i32") | dict(head="*" + dtype if head_bits >= 16 else "*i32")
    types |= dict.fromkeys(("sqkv", "so", "sgu", "sd"), "*fp16" if bits == 4 else "*fp32") | dict(shead="*fp32")
    types |= dict.fromkeys(("pos", "n", "m", "lo", "hi", "seed", "one"), "i32") | dict.fromkeys(("scale", "inverse_temperature"), "fp32")
    signature = {a: types.get(a, "*fp32") for a in _decode_kernel.arg_names if a not in constants}
    return Case(f"{model} {kind}" + f" {rows} rows"*(rows > 1) + " sampled"*sample, _decode_kernel, signature, constants, *map(OPTIONS.get, fixed),
                options={k: v for k, v in OPTIONS.items() if k not in fixed})

#: instructions a weight of an innermost loop, by the bits of a weight: what the best loops of each kind cost when written by themselves
BUDGET = {16: 3.7, 8: 4.2, 4: 4.3}

@lru_cache(maxsize=1)
def _stage_lines() -> dict: # name -> first and last line, in this file, of each stage
    parts = ast.parse(Path(__file__).read_text(encoding="utf-8")).body
    return {f.name: (f.lineno, f.end_lineno) for f in parts if isinstance(f, ast.FunctionDef) and f.name.endswith("_stage")}

def _innermost(compiled) -> list: # of an `aot.Compiled`: instructions, and the stage whose code follows, of each innermost loop in the code's order
    from .aot import _on_cubin, _tool
    code, label, spans, line = [], {}, [], 0
    text = _on_cubin([_tool("nvdisasm"), "-c", "-g"], compiled.cubin)
    for name, number, instruction in re.findall(r"^(\.L_\w+:)|^\s*//## File.* line (\d+)|^\s*/\*[0-9a-f]{4,}\*/\s+(.*?);", text, re.M):
        if name: label[name[:-1]] = len(code)
        elif number: line = int(number)
        else:
            to = re.search(r"\bBRA\b.*`\((\.L_\w+)\)", instruction)
            if to and label.get(to[1], len(code)) < len(code): spans.append((label[to[1]], len(code) + 1))
            code.append((instruction, line))
    inner = [a for a in spans if not any(b != a and a[0] <= b[0] and b[1] <= a[1] for b in spans)]
    stage = lambda first: next((name for _, line in code[first:] for name, (a, b) in _stage_lines().items() if a <= line <= b), None)
    return [([x for x, _ in code[first:last]], stage(first)) for first, last in inner]

def weight_costs(compiled, # `aot.Compiled` of …
                 case, # … one of `aot_cases`
                ) -> dict[str, float]: # QKV, O, GU, DOWN, HEAD -> instructions a weight
    """What a thread issues for a weight in the innermost loop over each matrix. Weights are those that are there, not those that a last step is padded with. With one
    row these are the loops that read with *evict first*; with several, those that use tensor cores, but for that over the cache, which has exponentials.
    Raises `ValueError` where the machine code has not one such loop for each matrix."""
    rows, threads = case.constexprs["R"] > 1, 32*compiled.num_warps
    read = lambda loop: sum(int(m[1] or 32)//8 for x in loop if (m := re.search(r"LDG\.E\.EF(?:\.CONSTANT)?(?:\.(64|128))?", x))) # bytes a trip
    multiplies = lambda loop: any("HMMA" in x for x in loop) and not any("MUFU.EX2" in x for x in loop)
    loops = [(loop, stage) for loop, stage in _innermost(compiled) if (multiplies if rows else read)(loop)]
    of = dict(_qkv_stage="QKV", _output_stage="O", _gate_up_stage="GU", _down_stage="DOWN", _head_stage="HEAD")
    names = [of.get(stage) for _, stage in loops]
    cuts = {name: case.constexprs[name] for name in of.values()}
    if set(names) != set(cuts) or len(names) != len(cuts): raise ValueError(f"{compiled.label}: a loop for each of {', '.join(cuts)} wanted, found {names}")
    def weights(name, loop): # a trip, a thread
        m = cuts[name]
        if rows: return m.BN*m.K/threads/triton.cdiv(m.width, m.S*m.BK)
        tile, size = m.BN*m.K*m.bits/8/threads, read(loop)                        # bytes; a loop may go over a row, or, where rows are short, over tiles
        if size < tile and tile % size and not m.K*m.bits//32 % m.BK: raise ValueError(f"{compiled.label}: the loop over {name} reads {size} bytes of {tile:g}")
        return min(size, tile)*8/m.bits
    return {name: len(loop)/weights(name, loop) for name, (loop, _) in zip(names, loops)}
