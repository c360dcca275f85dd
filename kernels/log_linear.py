"""Log-linear attention (arXiv 2506.04761) in Triton: forward, deterministic backward, decoding. Derived in nbs/03_log_linear.

    o_t = sum_{s<=t} lam_t[level(t,s)] * exp(g_{s+1}+...+g_t) * (q_t . k_s) v_s                        level(t,s) = bit_length(t xor s)

and, with `beta`, the gated-delta form, where (q_t . k_s) becomes  q_t' (I - beta_t k_t k_t') ... (I - beta_{s+1} k_{s+1} k_{s+1}') k_s beta_s.

    q, k (B,T,G,K)   v, o (B,T,H,V)   bfloat16 or float32       g, beta (B,T,H)   lam (B,T,H,L)   any float, computed in float32

A sequence is cut into chunks of C tokens. Chunk n looks back at one *node* for every set bit l of n: the 2^l chunks before
(n >> l) << l. A node holds a state Z (K,V), its log-decay and, in the delta form, its transition P (K,K); two neighbours merge into
their parent by  Z = exp(D_right) P_right Z_left + Z_right,  P = P_right P_left.  So

    forward    _solve, _join (delta: a triangular inverse a chunk) -> _state (leaves) -> _merge (a launch a level) -> _output
    backward   _transport (delta: q seen from every node) -> _query_grad -> _node_grad -> _split (_merge reversed)
               -> _value_grad -> _leave_grad, _solve_grad (delta) -> _key_grad

where every launch runs all chunks or all nodes of a level at once: nothing is serial over T. There are no atomics and every sum has
a fixed order, so gradients repeat bit for bit. Memory is O(T), and O(T log T) in the delta form's backward. Nodes are merged in
float32 and read in the inputs' type. Tables made on the host say which node is where (`Schedule`), so that T, batch and packed
sequences (`cu_seqlens`) of any lengths are the same code.
"""
from collections.abc import Sequence
from contextlib import contextmanager, nullcontext
from functools import lru_cache
from typing import NamedTuple
import numpy as np
import torch
import triton
import triton.language as tl
from torch.autograd.function import once_differentiable
from ..core.blocks import check_shapes, sequences
from .interpreter import dot, why_not_here

__all__ = ["log_linear_attention", "log_linear_step", "supports", "why_not", "aot_cases"]

CHUNK = 64 # tokens a chunk: the tensor cores' tile
SEGMENT = 8 # chunks whose part of a node's gradient is summed by one program; the parts are then added in order
MAX_K = 256 # widest key that one program holds

# ---------------------------------------------------------------------------------------------------------------- parts of kernels

@triton.jit
def _tokens(chunks, c, C: tl.constexpr):
    "Rows of chunk c in the flattened (B*T) order, and which of them exist: both (C,)"
    rows = tl.load(chunks + c*4).to(tl.int64) + tl.arange(0, C)
    return rows, rows < tl.load(chunks + c*4 + 1)

@triton.jit
def _tile(ptr, rows, ok, head, heads, first, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    "A (C, BLOCK) tile of a (rows, heads, WIDTH) tensor from column `first`; zero where there is nothing"
    cols = first + tl.arange(0, BLOCK)
    return tl.load(ptr + (rows*heads + head)[:, None]*WIDTH + cols[None, :], mask=ok[:, None] & (cols < WIDTH)[None, :], other=0.)

@triton.jit
def _put(ptr, x, rows, ok, head, heads, first, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    "The inverse of `_tile`"
    cols = first + tl.arange(0, BLOCK)
    tl.store(ptr + (rows*heads + head)[:, None]*WIDTH + cols[None, :], x.to(ptr.dtype.element_ty),
             mask=ok[:, None] & (cols < WIDTH)[None, :])

@triton.jit
def _matrix(ptr, index, row, col, ROWS: tl.constexpr, COLS: tl.constexpr, BR: tl.constexpr, BC: tl.constexpr, keep=True):
    "A (BR, BC) tile from (row, col) of matrix `index` in a stack of (ROWS, COLS) matrices"
    r, c = row + tl.arange(0, BR), col + tl.arange(0, BC)
    mask = (r < ROWS)[:, None] & (c < COLS)[None, :] & keep
    return tl.load(ptr + index.to(tl.int64)*(ROWS*COLS) + r[:, None]*COLS + c[None, :], mask=mask, other=0.)

@triton.jit
def _put_matrix(ptr, x, index, row, col, ROWS: tl.constexpr, COLS: tl.constexpr, BR: tl.constexpr, BC: tl.constexpr):
    "The inverse of `_matrix`"
    r, c = row + tl.arange(0, BR), col + tl.arange(0, BC)
    tl.store(ptr + index.to(tl.int64)*(ROWS*COLS) + r[:, None]*COLS + c[None, :], x.to(ptr.dtype.element_ty),
             mask=(r < ROWS)[:, None] & (c < COLS)[None, :])

@triton.jit
def _level(C: tl.constexpr, LOG: tl.constexpr):
    "level(i, j) = bit_length(i xor j) inside a chunk: (C, C)"
    i = tl.arange(0, C)
    x = i[:, None] ^ i[None, :]
    level = tl.zeros([C, C], tl.int32)
    for b in tl.static_range(LOG): level += (x >= (1 << b)).to(tl.int32)
    return level

@triton.jit
def _decay(a, C: tl.constexpr):
    "exp(a_i - a_j) for i >= j, else 0: (C, C). The mask comes first, so that nothing overflows"
    i = tl.arange(0, C)
    return tl.exp(tl.where(i[:, None] >= i[None, :], a[:, None] - a[None, :], float("-inf")))

@triton.jit
def _level_weights(lam, rows, ok, head, heads, L, level, C: tl.constexpr, LOG: tl.constexpr):
    "lam_i[level(i, j)]: (C, C)"
    out = tl.zeros([C, C], tl.float32)
    for l in tl.static_range(LOG + 1):
        column = tl.load(lam + (rows*heads + head)*L + l, mask=ok & (l < L), other=0.)
        out = tl.where(level == l, column[:, None], out)
    return out

# -------------------------------------------------------------------------------------------------------------------------- forward

@triton.jit
def _solve_kernel(k, beta, inverse, chunks, R, G, H, K: tl.constexpr, C: tl.constexpr, SIDE: tl.constexpr, LOG: tl.constexpr,
                  BK: tl.constexpr, PRECISION: tl.constexpr):
    """Diagonal blocks of inverse (chunks,H,C,C) = (I + N)^-1, N = stril(diag(beta) K K'), each (SIDE,SIDE), SIDE = 2^LOG.

    The same tree once more: inv([[X,0],[B,Y]]) = [[X^-1,0],[-Y^-1 B X^-1, Y^-1]], and the blocks B of one size are the entries of
    one level. Unlike powers of N, no intermediate is larger than the inverses of blocks, whatever the keys."""
    c, h, n = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    i = tl.arange(0, SIDE)
    rows, ok = _tokens(chunks, c, SIDE)
    rows += n*SIDE
    ok = rows < tl.load(chunks + c*4 + 1)
    key = _tile(k, rows, ok, h//R, G, 0, K, BK)
    b = tl.load(beta + rows*H + h, mask=ok, other=0.)
    level = _level(SIDE, LOG)
    below = tl.where(i[:, None] > i[None, :], dot(key, tl.trans(key), input_precision=PRECISION)*b[:, None], 0.)
    x = tl.where(level == 0, 1., 0.) - tl.where(level == 1, below, 0.)
    for l in range(2, LOG + 1):
        step = dot(tl.where(level == l, below, 0.), x, input_precision="tf32x3")
        x -= dot(x, step, input_precision="tf32x3")
    _put_matrix(inverse, x, c*H + h, n*SIDE, n*SIDE, C, C, SIDE, SIDE)

@triton.jit
def _join_kernel(k, beta, inverse, chunks, R, G, H, K: tl.constexpr, SIDE: tl.constexpr, BK: tl.constexpr, PRECISION: tl.constexpr):
    "The last level of the inverse, where a chunk is two blocks: -Y^-1 B X^-1 and, above the diagonal, zeros"
    c, h = tl.program_id(0), tl.program_id(1)
    rows, ok = _tokens(chunks, c, SIDE)
    early = _tile(k, rows, ok, h//R, G, 0, K, BK)
    rows += SIDE
    ok = rows < tl.load(chunks + c*4 + 1)
    late, b = _tile(k, rows, ok, h//R, G, 0, K, BK), tl.load(beta + rows*H + h, mask=ok, other=0.)
    x = dot(late, tl.trans(early), input_precision=PRECISION)*b[:, None]
    x = dot(x, _matrix(inverse, c*H + h, 0, 0, 2*SIDE, 2*SIDE, SIDE, SIDE), input_precision="tf32x3")
    x = dot(_matrix(inverse, c*H + h, SIDE, SIDE, 2*SIDE, 2*SIDE, SIDE, SIDE), x, input_precision="tf32x3")
    _put_matrix(inverse, -x, c*H + h, SIDE, 0, 2*SIDE, 2*SIDE, SIDE, SIDE)
    _put_matrix(inverse, tl.zeros([SIDE, SIDE], tl.float32), c*H + h, 0, SIDE, 2*SIDE, 2*SIDE, SIDE, SIDE)

@triton.jit
def _state_kernel(k, v, g, beta, inverse, z32, p32, z, p, total, chunks, leaf, R, G, H, K: tl.constexpr, V: tl.constexpr,
                  C: tl.constexpr, BK: tl.constexpr, BN: tl.constexpr, DELTA: tl.constexpr, PRECISION: tl.constexpr):
    "Leaves of the tree: Z = (e * Kh)' V and, in the delta form, P = I - Kh' K, where Kh = inverse' diag(beta) ... K (else K)"
    c, h, n = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    node = tl.load(leaf + c)
    if node >= 0:
        slot = node*H + h
        rows, ok = _tokens(chunks, c, C)
        a = tl.load(g + rows*H + h, mask=ok, other=0.)
        last = tl.sum(a, 0)
        a = tl.cumsum(a, 0)
        key = _tile(k, rows, ok, h//R, G, 0, K, BK)
        if DELTA:
            b = tl.load(beta + rows*H + h, mask=ok, other=0.)
            t = _matrix(inverse, c*H + h, 0, 0, C, C, C, C)*b[None, :]
            hat = dot(tl.trans(t.to(key.dtype)), key, input_precision=PRECISION)
        else:
            hat = key.to(tl.float32)
        tiles: tl.constexpr = (V + BN - 1)//BN
        if n < tiles:
            value = _tile(v, rows, ok, h, H, n*BN, V, BN)
            late = (hat*tl.exp(last - a)[:, None]).to(key.dtype)
            state = dot(tl.trans(late), value, input_precision=PRECISION)
            _put_matrix(z32, state, slot, 0, n*BN, K, V, BK, BN)
            _put_matrix(z, state, slot, 0, n*BN, K, V, BK, BN)
        elif DELTA:
            first = (n - tiles)*BN
            right = _tile(k, rows, ok, h//R, G, first, K, BN)
            eye = tl.where(tl.arange(0, BK)[:, None] == first + tl.arange(0, BN)[None, :], 1., 0.)
            transition = eye - dot(tl.trans(hat.to(key.dtype)), right, input_precision=PRECISION)
            _put_matrix(p32, transition, slot, 0, first, K, K, BK, BN)
            _put_matrix(p, transition, slot, 0, first, K, K, BK, BN)
        if n == 0: tl.store(total + slot, last)

@triton.jit
def _merge_kernel(z32, p32, z, p, total, merges, H, K: tl.constexpr, V: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
                  BLOCK: tl.constexpr, DELTA: tl.constexpr, PRECISION: tl.constexpr):
    "One level up: Z = exp(D_right) P_right Z_left + Z_right and P = P_right P_left (P = I without `DELTA`)"
    i, h, n = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    parent, left, right = tl.load(merges + i*3)*H + h, tl.load(merges + i*3 + 1)*H + h, tl.load(merges + i*3 + 2)*H + h
    late = tl.load(total + right)
    if DELTA:
        up: tl.constexpr = (K + BM - 1)//BM
        row, col = (n % up)*BM, (n//up)*BN
        acc = tl.zeros([BM, BN], tl.float32)
        wide: tl.constexpr = ((V + BN - 1)//BN)*BN
        if col < wide:
            for s in range(0, K, BM):
                a = _matrix(p32, right, row, s, K, K, BM, BM)
                acc += dot(a, _matrix(z32, left, s, col, K, V, BM, BN), input_precision=PRECISION)
            acc = acc*tl.exp(late) + _matrix(z32, right, row, col, K, V, BM, BN)
            _put_matrix(z32, acc, parent, row, col, K, V, BM, BN)
            _put_matrix(z, acc, parent, row, col, K, V, BM, BN)
        else:
            for s in range(0, K, BM):
                a = _matrix(p32, right, row, s, K, K, BM, BM)
                acc += dot(a, _matrix(p32, left, s, col - wide, K, K, BM, BN), input_precision=PRECISION)
            _put_matrix(p32, acc, parent, row, col - wide, K, K, BM, BN)
            _put_matrix(p, acc, parent, row, col - wide, K, K, BM, BN)
    else:
        at = n*BLOCK + tl.arange(0, BLOCK)
        ok = at < K*V
        x = tl.load(z32 + left.to(tl.int64)*(K*V) + at, mask=ok, other=0.)*tl.exp(late)
        x += tl.load(z32 + right.to(tl.int64)*(K*V) + at, mask=ok, other=0.)
        tl.store(z32 + parent.to(tl.int64)*(K*V) + at, x, mask=ok)
        tl.store(z + parent.to(tl.int64)*(K*V) + at, x.to(z.dtype.element_ty), mask=ok)
    if n == 0: tl.store(total + parent, tl.load(total + left) + late)

@triton.jit
def _output_kernel(q, k, v, g, lam, beta, inverse, z, p, total, o, chunks, nodes, levels, R, G, H, L, K: tl.constexpr,
                   V: tl.constexpr, C: tl.constexpr, LOG: tl.constexpr, BK: tl.constexpr, BN: tl.constexpr, DELTA: tl.constexpr,
                   PRECISION: tl.constexpr):
    "o = (A * decay * lam) V  inside the chunk  +  sum over its nodes of  lam * decay * (q Z);  q then passes the node: q <- q P"
    c, h, n = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    rows, ok = _tokens(chunks, c, C)
    i = tl.arange(0, C)
    a = tl.cumsum(tl.load(g + rows*H + h, mask=ok, other=0.), 0)
    query, key = _tile(q, rows, ok, h//R, G, 0, K, BK), _tile(k, rows, ok, h//R, G, 0, K, BK)
    s = dot(query, tl.trans(key), input_precision=PRECISION)
    if DELTA:
        b = tl.load(beta + rows*H + h, mask=ok, other=0.)
        t = (_matrix(inverse, c*H + h, 0, 0, C, C, C, C)*b[None, :]).to(key.dtype)
        s = tl.where(i[:, None] >= i[None, :], s, 0.)
        s = dot(s.to(key.dtype), t, input_precision=PRECISION)
        query = (query.to(tl.float32) - dot(s.to(key.dtype), key, input_precision=PRECISION)).to(key.dtype)
    s *= _decay(a, C)*_level_weights(lam, rows, ok, h, H, L, _level(C, LOG), C, LOG)
    out = dot(s.to(key.dtype), _tile(v, rows, ok, h, H, n*BN, V, BN), input_precision=PRECISION)
    before = 0.
    for e in range(tl.load(chunks + c*4 + 2), tl.load(chunks + c*4 + 3)):
        slot = tl.load(nodes + e)*H + h
        weight = tl.load(lam + (rows*H + h)*L + tl.load(levels + e), mask=ok, other=0.)*tl.exp(a + before)
        out += weight[:, None]*dot(query, _matrix(z, slot, 0, n*BN, K, V, BK, BN), input_precision=PRECISION)
        if DELTA: query = dot(query, _matrix(p, slot, 0, 0, K, K, BK, BK), input_precision=PRECISION).to(key.dtype)
        before += tl.load(total + slot)
    _put(o, out, rows, ok, h, H, n*BN, V, BN)

# ------------------------------------------------------------------------------------------------------------------------- backward

@triton.jit
def _transport_kernel(q, k, beta, inverse, p, seen, chunks, nodes, R, G, H, K: tl.constexpr, C: tl.constexpr, BK: tl.constexpr,
                      PRECISION: tl.constexpr):
    "seen (entries,H,C,K): the chunk's queries as each of its nodes sees them (delta form)"
    c, h = tl.program_id(0), tl.program_id(1)
    first, last = tl.load(chunks + c*4 + 2), tl.load(chunks + c*4 + 3)
    if first < last:
        rows, ok = _tokens(chunks, c, C)
        i = tl.arange(0, C)
        query, key = _tile(q, rows, ok, h//R, G, 0, K, BK), _tile(k, rows, ok, h//R, G, 0, K, BK)
        b = tl.load(beta + rows*H + h, mask=ok, other=0.)
        t = (_matrix(inverse, c*H + h, 0, 0, C, C, C, C)*b[None, :]).to(key.dtype)
        s = tl.where(i[:, None] >= i[None, :], dot(query, tl.trans(key), input_precision=PRECISION), 0.)
        s = dot(s.to(key.dtype), t, input_precision=PRECISION)
        query = (query.to(tl.float32) - dot(s.to(key.dtype), key, input_precision=PRECISION)).to(key.dtype)
        for e in range(first, last):
            _put_matrix(seen, query, e*H + h, 0, 0, C, K, C, BK)
            slot = tl.load(nodes + e)*H + h
            query = dot(query, _matrix(p, slot, 0, 0, K, K, BK, BK), input_precision=PRECISION).to(key.dtype)

@triton.jit
def _query_grad_kernel(q, g, lam, do, z, p, total, seen, dseen, weights, after, dq, dlam, row_sum, chunks, nodes, levels, R, G, H, L,
                       K: tl.constexpr, V: tl.constexpr, C: tl.constexpr, BK: tl.constexpr, BN: tl.constexpr, BE: tl.constexpr,
                       DELTA: tl.constexpr, PRECISION: tl.constexpr):
    """Back through the nodes of a chunk, from the farthest. dq (T,H,K): gradient of the queries as they leave the chunk; dseen
    (entries,H,C,K): of the queries behind each node; weights (entries,H,C) = lam * decay; row_sum (T,H) = sum of weight * dweight, which
    is what the decays before each token get; after (entries,H,C): that of all farther nodes alone, what the node's own decay gets. (Its sum over
    the chunk is left to `_node_grad`: for Blackwell, Triton 3.7 cannot compile a sum to one number behind a product.)"""
    c, h = tl.program_id(0), tl.program_id(1)
    rows, ok = _tokens(chunks, c, C)
    i = tl.arange(0, C)
    a = tl.cumsum(tl.load(g + rows*H + h, mask=ok, other=0.), 0)
    first, last = tl.load(chunks + c*4 + 2), tl.load(chunks + c*4 + 3)
    ids = tl.arange(0, BE)
    slots = tl.load(nodes + first + ids, mask=ids < last - first, other=0)*H + h
    totals = tl.load(total + slots, mask=ids < last - first, other=0.)
    query = _tile(q, rows, ok, h//R, G, 0, K, BK)
    grad = tl.zeros([C, BK], tl.float32)
    sums = tl.zeros([C], tl.float32)
    for back in range(last - first):
        e = last - 1 - back
        slot, l = tl.load(nodes + e)*H + h, tl.load(levels + e)
        decay = tl.exp(a + tl.sum(tl.where(ids < e - first, totals, 0.), 0))
        weight = tl.load(lam + (rows*H + h)*L + l, mask=ok, other=0.)*decay
        part = tl.zeros([C, BK], tl.float32)
        for col in range(0, V, BN):
            right = _tile(do, rows, ok, h, H, col, V, BN)
            part += dot(right, tl.trans(_matrix(z, slot, 0, col, K, V, BK, BN)), input_precision=PRECISION)
        if DELTA:
            there = _matrix(seen, e*H + h, 0, 0, C, K, C, BK)
            _put_matrix(dseen, grad, e*H + h, 0, 0, C, K, C, BK)
            grad = dot(grad.to(query.dtype), tl.trans(_matrix(p, slot, 0, 0, K, K, BK, BK)), input_precision=PRECISION)
        else:
            there = query
        inner = tl.sum(there.to(tl.float32)*part, 1)
        tl.store(dlam + (rows*H + h)*L + l, decay*inner, mask=ok)
        tl.store(weights + (e*H + h).to(tl.int64)*C + i, weight)
        tl.store(after + (e*H + h).to(tl.int64)*C + i, sums)
        sums += weight*inner
        grad += weight[:, None]*part
    _put(dq, grad, rows, ok, h, H, 0, K, BK)
    tl.store(row_sum + rows*H + h, sums, mask=ok)

@triton.jit
def _weighted(do, weights, rows, ok, h, H, e, first, V: tl.constexpr, C: tl.constexpr, BN: tl.constexpr):
    "weight * do for the tokens of one entry: (C, BN)"
    return _tile(do, rows, ok, h, H, first, V, BN)*tl.load(weights + e.to(tl.int64)*C + tl.arange(0, C))[:, None]

@triton.jit
def _node_grad_kernel(q, do, seen, dseen, weights, after, dz_part, dp_part, dd_part, chunks, segments, pairs, R, G, H,
                      K: tl.constexpr, V: tl.constexpr, C: tl.constexpr, BK: tl.constexpr, BN: tl.constexpr, DELTA: tl.constexpr,
                      PRECISION: tl.constexpr):
    "What a node gets from up to `SEGMENT` of the chunks that look at it: dZ += q' (weight * do), dP += q' dq_behind"
    i, h, n = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    acc = tl.zeros([BK, BN], tl.float32)
    far = 0.
    tiles: tl.constexpr = (V + BN - 1)//BN
    for j in range(tl.load(segments + i*2), tl.load(segments + i*2 + 1)):
        c, e = tl.load(pairs + j*2), tl.load(pairs + j*2 + 1)*H + h
        rows, ok = _tokens(chunks, c, C)
        if DELTA:
            left = _matrix(seen, e, 0, 0, C, K, C, BK)
            if n < tiles: right = _weighted(do, weights, rows, ok, h, H, e, n*BN, V, C, BN).to(left.dtype)
            else: right = _matrix(dseen, e, 0, (n - tiles)*BN, C, K, C, BN)
        else:
            left = _tile(q, rows, ok, h//R, G, 0, K, BK)
            right = _weighted(do, weights, rows, ok, h, H, e, n*BN, V, C, BN).to(left.dtype)
        acc += dot(tl.trans(left), right, input_precision=PRECISION)
        far += tl.sum(tl.load(after + e.to(tl.int64)*C + tl.arange(0, C)), 0)
    if n < tiles: _put_matrix(dz_part, acc, i*H + h, 0, n*BN, K, V, BK, BN)
    elif DELTA: _put_matrix(dp_part, acc, i*H + h, 0, (n - tiles)*BN, K, K, BK, BN)
    if n == 0: tl.store(dd_part + i*H + h, far)

@triton.jit
def _split_kernel(z, p, total, dz, dp, dd, dz_part, dp_part, dd_part, splits, H, PARTS, K: tl.constexpr, V: tl.constexpr,
                  BM: tl.constexpr, BN: tl.constexpr, BLOCK: tl.constexpr, DELTA: tl.constexpr, PRECISION: tl.constexpr):
    """`_merge` reversed, one level down. A left node gets exp(D) P_right' dZ_parent and P_right' dP_parent, and what its readers gave;
    a right one dZ_parent and exp(D) dZ_parent Z_left' + dP_parent P_left'. dd (nodes,H,PARTS+1): parts of the decay's gradient."""
    i, h, n = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    node, parent, sibling = tl.load(splits + i*6), tl.load(splits + i*6 + 1), tl.load(splits + i*6 + 2)
    is_left, first, last = tl.load(splits + i*6 + 3), tl.load(splits + i*6 + 4), tl.load(splits + i*6 + 5)
    me, up, other = node*H + h, parent*H + h, sibling*H + h
    if DELTA:
        high: tl.constexpr = (K + BM - 1)//BM
        row, col = (n % high)*BM, (n//high)*BN
        wide: tl.constexpr = ((V + BN - 1)//BN)*BN
        acc = tl.zeros([BM, BN], tl.float32)
        if col < wide:
            if parent >= 0:
                if is_left:
                    for s in range(0, K, BM):
                        a = _matrix(p, other, s, row, K, K, BM, BM).to(tl.float32)
                        acc += dot(tl.trans(a), _matrix(dz, up, s, col, K, V, BM, BN), input_precision=PRECISION)
                    acc *= tl.exp(tl.load(total + other))
                    mine = _matrix(z, me, row, col, K, V, BM, BN).to(tl.float32)
                    tl.store(dd + other.to(tl.int64)*(PARTS + 1) + n*BM + tl.arange(0, BM), tl.sum(acc*mine, 1)) # not further: see `_query_grad`
                else:
                    acc = _matrix(dz, up, row, col, K, V, BM, BN)
            for s in range(first, last): acc += _matrix(dz_part, s*H + h, row, col, K, V, BM, BN)
            _put_matrix(dz, acc, me, row, col, K, V, BM, BN)
        else:
            col -= wide
            if parent >= 0:
                if is_left:
                    for s in range(0, K, BM):
                        a = _matrix(p, other, s, row, K, K, BM, BM).to(tl.float32)
                        acc += dot(tl.trans(a), _matrix(dp, up, s, col, K, K, BM, BN), input_precision=PRECISION)
                else:
                    for s in range(0, V, BM):
                        b = _matrix(z, other, col, s, K, V, BN, BM).to(tl.float32)
                        acc += dot(_matrix(dz, up, row, s, K, V, BM, BM), tl.trans(b), input_precision=PRECISION)
                    acc *= tl.exp(tl.load(total + me))
                    for s in range(0, K, BM):
                        b = _matrix(p, other, col, s, K, K, BN, BM).to(tl.float32)
                        acc += dot(_matrix(dp, up, row, s, K, K, BM, BM), tl.trans(b), input_precision=PRECISION)
            for s in range(first, last): acc += _matrix(dp_part, s*H + h, row, col, K, K, BM, BN)
            _put_matrix(dp, acc, me, row, col, K, K, BM, BN)
    else:
        at = n*BLOCK + tl.arange(0, BLOCK)
        ok = at < K*V
        acc = tl.zeros([BLOCK], tl.float32)
        if parent >= 0:
            acc = tl.load(dz + up.to(tl.int64)*(K*V) + at, mask=ok, other=0.)
            if is_left:
                acc *= tl.exp(tl.load(total + other))
                mine = tl.load(z + me.to(tl.int64)*(K*V) + at, mask=ok, other=0.).to(tl.float32)
                tl.store(dd + other.to(tl.int64)*(PARTS + 1) + n, tl.sum(acc*mine, 0))
        for s in range(first, last): acc += tl.load(dz_part + (s*H + h).to(tl.int64)*(K*V) + at, mask=ok, other=0.)
        tl.store(dz + me.to(tl.int64)*(K*V) + at, acc, mask=ok)
    if n == 0:
        far = 0.
        for s in range(first, last): far += tl.load(dd_part + s*H + h)
        tl.store(dd + me.to(tl.int64)*(PARTS + 1) + PARTS, far)

@triton.jit
def _value_grad_kernel(q, k, v, g, lam, beta, inverse, do, dz, dd, row_sum, dv, dg, dlam, dhat, dattention, attention_out, chunks, leaf,
                       ancestors, LEVELS, R, G, H, L, K: tl.constexpr, V: tl.constexpr, C: tl.constexpr, LOG: tl.constexpr,
                       BK: tl.constexpr, BN: tl.constexpr, DELTA: tl.constexpr, PRECISION: tl.constexpr):
    """Inside a chunk, what runs over the values: dv, dg, dlam, and the gradients of the attention matrix A (chunks,H,C,C) and of the
    (transported) keys that the leaf is made of, dhat (T,H,K). The delta form's A is kept for the last kernel."""
    c, h = tl.program_id(0), tl.program_id(1)
    rows, ok = _tokens(chunks, c, C)
    i = tl.arange(0, C)
    gate = tl.load(g + rows*H + h, mask=ok, other=0.)
    a, last = tl.cumsum(gate, 0), tl.sum(gate, 0)
    till_end = tl.exp(last - a)
    node = tl.load(leaf + c)
    slot = tl.maximum(node, 0)*H + h
    query, key = _tile(q, rows, ok, h//R, G, 0, K, BK), _tile(k, rows, ok, h//R, G, 0, K, BK)
    attention = dot(query, tl.trans(key), input_precision=PRECISION)
    if DELTA:
        b = tl.load(beta + rows*H + h, mask=ok, other=0.)
        t = (_matrix(inverse, c*H + h, 0, 0, C, C, C, C)*b[None, :]).to(key.dtype)
        attention = tl.where(i[:, None] >= i[None, :], attention, 0.).to(key.dtype)
        attention = dot(attention, t, input_precision=PRECISION)
        _put_matrix(attention_out, attention, c*H + h, 0, 0, C, C, C, C)
        hat = dot(tl.trans(t), key, input_precision=PRECISION).to(key.dtype)
    else:
        hat = key
    level = _level(C, LOG)
    decay = _decay(a, C)
    chosen = _level_weights(lam, rows, ok, h, H, L, level, C, LOG)
    mixed = (attention*decay*chosen).to(key.dtype)
    grad = tl.zeros([C, C], tl.float32)
    back = tl.zeros([C, BK], tl.float32)
    column = tl.zeros([C], tl.float32)
    for col in range(0, V, BN):
        value, right = _tile(v, rows, ok, h, H, col, V, BN), _tile(do, rows, ok, h, H, col, V, BN)
        grad += dot(right, tl.trans(value), input_precision=PRECISION)
        dstate = _matrix(dz, slot, 0, col, K, V, BK, BN, node >= 0).to(key.dtype)
        back += dot(value, tl.trans(dstate), input_precision=PRECISION)
        later = dot(hat, dstate, input_precision=PRECISION)*till_end[:, None]
        column += tl.sum(value.to(tl.float32)*later, 1)
        later += dot(tl.trans(mixed), right, input_precision=PRECISION)
        _put(dv, later, rows, ok, h, H, col, V, BN)
    _put(dhat, back*till_end[:, None], rows, ok, h, H, 0, K, BK)
    grad *= decay
    products = grad*attention
    for l in tl.static_range(LOG + 1):
        tl.store(dlam + (rows*H + h)*L + l, tl.sum(tl.where(level == l, products, 0.), 1), mask=ok & (l < L))
    products *= chosen
    da = tl.sum(products, 1) - tl.sum(products, 0) + tl.load(row_sum + rows*H + h, mask=ok, other=0.)
    across = 0. # pairs whose tokens lie on either side of the chunk
    for l in range(LEVELS):
        ancestor = tl.load(ancestors + c*LEVELS + l)
        if ancestor >= 0: across += tl.load(dd + ancestor*H + h)
    tl.store(dg + rows*H + h, tl.cumsum(da, 0, reverse=True) + tl.cumsum(column, 0) - column + across, mask=ok)
    _put_matrix(dattention, grad*chosen, c*H + h, 0, 0, C, C, C, C)

@triton.jit
def _leave_grad_kernel(k, dp, leaving, dhat, dattention, dt, chunks, leaf, R, G, H, K: tl.constexpr, C: tl.constexpr, BK: tl.constexpr,
                       BN: tl.constexpr, PRECISION: tl.constexpr):
    """What leaves a chunk of the delta form: Q - A K towards the past, Kh = T' K and P = I - Kh' K towards the future. dhat gets what P gives,
    dattention what the queries give, and dt (chunks,H,C,C) is the part of T's gradient that comes by Kh."""
    c, h = tl.program_id(0), tl.program_id(1)
    rows, ok = _tokens(chunks, c, C)
    node = tl.load(leaf + c)
    slot = tl.maximum(node, 0)*H + h
    key = _tile(k, rows, ok, h//R, G, 0, K, BK)
    da, grad = tl.zeros([C, C], tl.float32), tl.zeros([C, C], tl.float32)
    for col in range(0, K, BN):
        right = tl.trans(_tile(k, rows, ok, h//R, G, col, K, BN))
        da += dot(_tile(leaving, rows, ok, h, H, col, K, BN), right, input_precision=PRECISION)
        dtransition = _matrix(dp, slot, col, 0, K, K, BN, BK, node >= 0).to(key.dtype)
        back = _tile(dhat, rows, ok, h, H, col, K, BN).to(tl.float32)
        back = (back - dot(key, tl.trans(dtransition), input_precision=PRECISION)).to(key.dtype)
        _put(dhat, back, rows, ok, h, H, col, K, BN)
        grad += dot(tl.trans(right), tl.trans(back), input_precision=PRECISION)
    _put_matrix(dt, grad, c*H + h, 0, 0, C, C, C, C)
    _put_matrix(dattention, _matrix(dattention, c*H + h, 0, 0, C, C, C, C).to(tl.float32) - da, c*H + h, 0, 0, C, C, C, C)

@triton.jit
def _solve_grad_kernel(q, k, beta, inverse, dt, dattention, dsolve, dbeta, chunks, R, G, H, K: tl.constexpr, C: tl.constexpr,
                       BK: tl.constexpr, PRECISION: tl.constexpr):
    """Back through A = tril(Q K') T and T = (I + N)^-1 diag(beta), dN = -inverse' (dT diag(beta)) inverse'. dattention turns from the gradient of
    A into that of Q K'; dsolve is that of N, times beta."""
    c, h = tl.program_id(0), tl.program_id(1)
    rows, ok = _tokens(chunks, c, C)
    i = tl.arange(0, C)
    lower = i[:, None] >= i[None, :]
    key = _tile(k, rows, ok, h//R, G, 0, K, BK)
    s = tl.where(lower, dot(_tile(q, rows, ok, h//R, G, 0, K, BK), tl.trans(key), input_precision=PRECISION), 0.).to(key.dtype)
    da = _matrix(dattention, c*H + h, 0, 0, C, C, C, C)
    grad = _matrix(dt, c*H + h, 0, 0, C, C, C, C) + dot(tl.trans(s), da, input_precision=PRECISION)
    grad = tl.where(lower, grad, 0.)
    b = tl.load(beta + rows*H + h, mask=ok, other=0.)
    x = _matrix(inverse, c*H + h, 0, 0, C, C, C, C)
    db = tl.sum(grad*x, 0)
    ds = dot(da, tl.trans((x*b[None, :]).to(key.dtype)), input_precision=PRECISION)
    _put_matrix(dattention, tl.where(lower, ds, 0.), c*H + h, 0, 0, C, C, C, C)
    x = tl.trans(_matrix(inverse, c*H + h, 0, 0, C, C, C, C)) # read again, here and below: kept, it would cost an A100 registers that it lacks
    grad = dot(grad*b[None, :], x, input_precision=PRECISION)
    grad = tl.where(i[:, None] > i[None, :], -dot(x, grad, input_precision=PRECISION), 0.)
    _put_matrix(dsolve, grad*b[:, None], c*H + h, 0, 0, C, C, C, C)
    key = _tile(k, rows, ok, h//R, G, 0, K, BK)
    db += tl.sum(grad*dot(key, tl.trans(key), input_precision=PRECISION), 1)
    tl.store(dbeta + rows*H + h, db, mask=ok)

@triton.jit
def _key_grad_kernel(q, k, beta, inverse, attention, dp, leaving, dhat, ds, dsolve, dq, dk, chunks, leaf, R, G, H, K: tl.constexpr,
                     C: tl.constexpr, BK: tl.constexpr, BN: tl.constexpr, DELTA: tl.constexpr, PRECISION: tl.constexpr):
    "The last step: dq and dk, one tile of columns a program"
    c, h, n = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    rows, ok = _tokens(chunks, c, C)
    query, key = _tile(q, rows, ok, h//R, G, n*BN, K, BN), _tile(k, rows, ok, h//R, G, n*BN, K, BN)
    grad = _matrix(ds, c*H + h, 0, 0, C, C, C, C)
    out, back = _tile(leaving, rows, ok, h, H, n*BN, K, BN), _tile(dhat, rows, ok, h, H, n*BN, K, BN)
    if DELTA:
        node = tl.load(leaf + c)
        t = (_matrix(inverse, c*H + h, 0, 0, C, C, C, C)*tl.load(beta + rows*H + h, mask=ok, other=0.)[None, :]).to(key.dtype)
        dtransition = _matrix(dp, tl.maximum(node, 0)*H + h, 0, n*BN, K, K, BK, BN, node >= 0).to(key.dtype)
        seen = dot(_tile(k, rows, ok, h//R, G, 0, K, BK), dtransition, input_precision=PRECISION).to(key.dtype)
        dkey = dot(t, back, input_precision=PRECISION) - dot(tl.trans(t), seen, input_precision=PRECISION)
        dkey -= dot(tl.trans(_matrix(attention, c*H + h, 0, 0, C, C, C, C)), out, input_precision=PRECISION)
        step = _matrix(dsolve, c*H + h, 0, 0, C, C, C, C)
        dkey += dot(step, key, input_precision=PRECISION)
        dkey += dot(tl.trans(step), key, input_precision=PRECISION)
    else:
        dkey = back.to(tl.float32)
    dkey += dot(tl.trans(grad), query, input_precision=PRECISION)
    _put(dk, dkey, rows, ok, h, H, n*BN, K, BN)
    _put(dq, out.to(tl.float32) + dot(grad, key, input_precision=PRECISION), rows, ok, h, H, n*BN, K, BN)

# ------------------------------------------------------------------------------------------------------------------------- decoding

@triton.jit
def _step_kernel(state, time, q, k, v, g, lam, beta, o, N, R, G, H, L, K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr,
                 BN: tl.constexpr, DELTA: tl.constexpr):
    """N tokens one after the other. At time t with lowest set bit r, levels 0..r+1 join into level r+1, and the new pair is level 0.
    Only the levels that hold something are read: those of t's set bits. Past 2^(L-1) tokens the output is NaN, not a wrong number."""
    row, h, n = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    kc, vc = tl.arange(0, BK), n*BN + tl.arange(0, BN)
    ok = (kc < K)[:, None] & (vc < V)[None, :]
    base = state + (row*H + h).to(tl.int64)*L*(K*V) + kc[:, None]*V + vc[None, :]
    start = tl.load(time + row)
    for j in range(N):
        now = start + j
        at = (row*N + j).to(tl.int64)
        query = tl.load(q + (at*G + h//R)*K + kc, mask=kc < K, other=0.).to(tl.float32)
        key = tl.load(k + (at*G + h//R)*K + kc, mask=kc < K, other=0.).to(tl.float32)
        value = tl.load(v + (at*H + h)*V + vc, mask=vc < V, other=0.).to(tl.float32)
        alpha = tl.exp(tl.load(g + at*H + h))
        weights = lam + (at*H + h)*L
        if DELTA:
            b = tl.load(beta + at*H + h)
            value *= b
        lowest = now & -now
        joined = tl.zeros([BK, BN], tl.float32)
        out = tl.zeros([BN], tl.float32)
        top = 0
        for l in range(L):
            bit = (now*0 + 1) << tl.maximum(l - 1, 0)
            if (l == 0) | (bit <= lowest):
                joined += tl.load(base + l*(K*V), mask=ok, other=0.)
                top = l
                tl.store(base + l*(K*V), tl.zeros([BK, BN], tl.float32), mask=ok)
            elif (now & bit) != 0:
                old = tl.load(base + l*(K*V), mask=ok, other=0.)*alpha
                if DELTA: old -= (b*key)[:, None]*tl.sum(old*key[:, None], 0)[None, :]
                out += tl.load(weights + l)*tl.sum(old*query[:, None], 0)
                tl.store(base + l*(K*V), old, mask=ok)
        joined *= alpha
        if DELTA: joined -= (b*key)[:, None]*tl.sum(joined*key[:, None], 0)[None, :]
        new = key[:, None]*value[None, :]
        tl.debug_barrier() # the stores of zeros above come before those below
        if top > 0:
            out += tl.load(weights + top)*tl.sum(joined*query[:, None], 0)
            tl.store(base + top*(K*V), joined, mask=ok)
        tl.store(base, new, mask=ok)
        out += tl.load(weights)*tl.sum(new*query[:, None], 0)
        out = tl.where((now >> (L - 1)) > 0, float("nan"), out)
        tl.store(o + (at*H + h)*V + vc, out.to(o.dtype.element_ty), mask=vc < V)
        tl.debug_barrier() # the next token reads what this one stored

# ----------------------------------------------------------------------------------------------------------------------- the schedule

class Schedule(NamedTuple):
    "Which chunk reads which node, and how nodes merge: int32 tables. Nodes of all levels and sequences are numbered from 0."
    chunks: torch.Tensor # (chunks,4): first token, end of its sequence, first and last+1 of its entries
    leaf: torch.Tensor # (chunks,) the node that is this chunk; -1 where the sequence is one chunk
    nodes: torch.Tensor # (entries,) an entry is one node that one chunk reads; a chunk's are sorted from near to far
    levels: torch.Tensor # (entries,) its level, as `lam` counts
    ancestors: torch.Tensor # (chunks,depth) the node of each level that holds the chunk, or -1
    merges: tuple[torch.Tensor, ...] # a level: (parents,3): parent, left, right
    splits: tuple[torch.Tensor, ...] # a level: (nodes,6): node, parent or -1, sibling or -1, is left, first and last+1 of its segments
    segments: torch.Tensor # (segments,2): first and last+1 of its pairs
    pairs: torch.Tensor # (entries,2): chunk, entry; sorted by the node that is read
    n_nodes: int

def _tree(N:int, # chunks of one sequence
          log:int, # log2 of the tokens a chunk
         )->dict[str, np.ndarray|list]:
    "The tables of one sequence, numbered from 0"
    depth, n = max(N - 1, 0).bit_length(), np.arange(N)
    counts = [N >> l for l in range(depth)]
    base = np.cumsum([0, *counts])[:-1].astype(np.int64) if depth else np.zeros(0, np.int64)
    bits = (n[:, None] >> np.arange(depth)) & 1
    chunk, level = np.nonzero(bits)
    ends = np.cumsum(bits.sum(1)) if N else np.zeros(0, np.int64)
    nodes = base[level] + (chunk >> level) - 1
    order = np.lexsort((chunk, level)) # by the node that is read: its readers are the chunks of its right sibling
    part = (chunk[order] & ((1 << level[order]) - 1))//SEGMENT
    new = np.ones(len(order), bool)
    new[1:] = (nodes[order][1:] != nodes[order][:-1]) | (part[1:] != part[:-1])
    begins = np.nonzero(new)[0]
    owner = nodes[order][begins] # ascending: nodes are numbered level by level
    n_nodes = int(sum(counts))
    seg_first, seg_last = np.searchsorted(owner, np.arange(n_nodes)), np.searchsorted(owner, np.arange(n_nodes), "right")
    merges, splits = [], []
    for l, count in enumerate(counts):
        m = np.arange(count)
        above = counts[l + 1] if l + 1 < depth else 0
        has = (m >> 1) < above
        up = base[l + 1] + (m >> 1) if above else np.zeros(count, np.int64)
        node = base[l] + m
        splits.append(np.stack([node, np.where(has, up, -1), np.where(has, base[l] + (m ^ 1), -1), 1 - (m & 1),
                                seg_first[node], seg_last[node]], 1))
        if l: merges.append(np.stack([node, base[l - 1] + 2*m, base[l - 1] + 2*m + 1], 1))
    ancestors = np.stack([np.where((n >> l) < counts[l], base[l] + (n >> l), -1) for l in range(depth)], 1) if depth else np.zeros((N, 0), int)
    return dict(begin=n << log, entries=np.stack([ends - bits.sum(1), ends], 1) if N else np.zeros((0, 2), int), nodes=nodes,
                levels=level + log + 1, ancestors=ancestors, merges=merges, splits=splits, n_nodes=n_nodes,
                segments=np.stack([begins, np.append(begins[1:], len(order))], 1) if len(begins) else np.zeros((0, 2), int),
                pairs=np.stack([chunk[order], order], 1))

def _shift(table:np.ndarray, by:Sequence[int])->np.ndarray:
    "Add to each column its own number, and leave -1 alone"
    return np.where(table < 0, table, table + np.asarray(by))

@lru_cache(maxsize=64)
def schedule(lengths:tuple[int, ...], # tokens of each sequence, in the order in which they are packed
             chunk:int, # tokens a chunk, a power of two
             device:torch.device, # where the tables are wanted
            )->Schedule:
    "The tables for sequences of these lengths (kept for the last 64 different batches)."
    log = chunk.bit_length() - 1
    trees = {N: _tree(N, log) for N in {-(-T//chunk) for T in lengths}}
    depth = max((t["ancestors"].shape[1] for t in trees.values()), default=0)
    out = dict(chunks=[], leaf=[], nodes=[], levels=[], ancestors=[], segments=[], pairs=[])
    merges, splits = [[] for _ in range(max(depth - 1, 0))], [[] for _ in range(depth)]
    token = chunks = entries = nodes = segments = 0
    for T in lengths:
        t = trees[-(-T//chunk)]
        N = len(t["begin"])
        ends = np.full(N, token + T)
        out["chunks"].append(np.stack([t["begin"] + token, ends, *(t["entries"] + entries).T], 1))
        wide = np.full((N, depth), -1)
        wide[:, :t["ancestors"].shape[1]] = _shift(t["ancestors"], nodes)
        out["ancestors"].append(wide)
        out["leaf"].append(wide[:, 0] if depth else np.full(N, -1))
        out["nodes"].append(t["nodes"] + nodes)
        out["levels"].append(t["levels"])
        out["segments"].append(t["segments"] + entries)
        out["pairs"].append(t["pairs"] + np.array([chunks, entries]))
        for l, table in enumerate(t["merges"]): merges[l].append(table + nodes)
        for l, table in enumerate(t["splits"]): splits[l].append(_shift(table, [nodes, nodes, nodes, 0, segments, segments]))
        token, chunks, entries, nodes, segments = (token + T, chunks + N, entries + len(t["nodes"]), nodes + t["n_nodes"],
                                                   segments + len(t["segments"]))
    to = lambda parts: torch.from_numpy(np.ascontiguousarray(np.concatenate(parts), dtype=np.int32)).to(device)
    return Schedule(**{name: to(parts) for name, parts in out.items()}, merges=tuple(map(to, merges)), splits=tuple(map(to, splits)),
                    n_nodes=nodes)

# ----------------------------------------------------------------------------------------------------------------------------- host

_recorded: list|None = None # while `aot_cases` runs: the launches, instead of launching

def _launch(kernel, grid:tuple[int, ...], args:Sequence, warps:int, stages:int=2, **constexprs)->None:
    "Launch a kernel (nothing where the grid is empty). FP fusion is stated, because its default differs between versions of Triton"
    if 0 in grid: return
    if _recorded is not None: _recorded.append((kernel, args, constexprs, warps, stages))
    else: kernel[grid](*args, **constexprs, num_warps=warps, num_stages=stages, enable_fp_fusion=True)

def _on(x:torch.Tensor):
    "Launches go to the device of x, which need not be the current one"
    return torch.cuda.device(x.device) if x.is_cuda else nullcontext()

class _Sizes(NamedTuple):
    "Sizes and tiles of one call"
    R: int; G: int; H: int; L: int; K: int; V: int; C: int; delta: bool; dtype: torch.dtype

    @property
    def LOG(self)->int: return self.C.bit_length() - 1
    @property
    def BK(self)->int: return max(16, triton.next_power_of_2(self.K))
    @property
    def BN(self)->int: return min(64, max(16, triton.next_power_of_2(self.V)))
    @property
    def BM(self)->int: return min(64, self.BK)
    @property
    def BLOCK(self)->int: return min(2048, triton.next_power_of_2(self.K*self.V))
    @property
    def precision(self)->str: return "tf32x3" if self.dtype == torch.float32 else "tf32"
    @property
    def warps(self)->int: return 4 if self.BK <= 64 else 8

    def tiles(self, delta:bool)->int:
        "Column tiles of Z and, in the delta form, of P"
        return triton.cdiv(self.V, self.BN) + (triton.cdiv(self.K, self.BN) if delta else 0)

def _forward(z:_Sizes, plan:Schedule, q, k, v, g, lam, beta)->tuple:
    "Output, the nodes in float32, and what the backward needs"
    n, new = len(plan.leaf), lambda *size, dtype=torch.float32: torch.empty(size, dtype=dtype, device=q.device)
    none = g # stands where a kernel never looks
    inverse = new(n, z.H, z.C, z.C) if z.delta else none
    state, total = new(plan.n_nodes, z.H, z.K, z.V), new(plan.n_nodes, z.H)
    transition = new(plan.n_nodes, z.H, z.K, z.K) if z.delta else none
    exact = z.dtype == torch.float32 # then nodes are read as they are merged; else a copy in the inputs' type is read
    state_r = state if exact else torch.empty_like(state, dtype=z.dtype)
    transition_r = transition if exact or not z.delta else torch.empty_like(transition, dtype=z.dtype)
    common = dict(K=z.K, V=z.V, BN=z.BN, DELTA=z.delta, PRECISION=z.precision)
    if z.delta:
        side = min(z.C, 32)
        solve = dict(K=z.K, SIDE=side, BK=z.BK, PRECISION=z.precision)
        _launch(_solve_kernel, (n, z.H, z.C//side), (k, beta, inverse, plan.chunks, z.R, z.G, z.H), 4, C=z.C, LOG=side.bit_length() - 1, **solve)
        if z.C > side: _launch(_join_kernel, (n, z.H), (k, beta, inverse, plan.chunks, z.R, z.G, z.H), 4, **solve)
    if plan.n_nodes: _launch(_state_kernel, (n, z.H, z.tiles(z.delta)), (k, v, g, beta, inverse, state, transition, state_r, transition_r,
                             total, plan.chunks, plan.leaf, z.R, z.G, z.H), 4, C=z.C, BK=z.BK, **common)
    rows = triton.cdiv(z.K, z.BM)*z.tiles(True) if z.delta else triton.cdiv(z.K*z.V, z.BLOCK)
    for level in plan.merges:
        _launch(_merge_kernel, (len(level), z.H, rows), (state, transition, state_r, transition_r, total, level, z.H), 4, BM=z.BM,
                BLOCK=z.BLOCK, **common)
    o = torch.empty_like(v)
    _launch(_output_kernel, (n, z.H, triton.cdiv(z.V, z.BN)), (q, k, v, g, lam, beta, inverse, state_r, transition_r, total, o, plan.chunks,
            plan.nodes, plan.levels, z.R, z.G, z.H, z.L), 8 if z.delta and z.BK > 64 else 4, C=z.C, LOG=z.LOG, BK=z.BK, **common)
    return o, (state, transition, total), (inverse, state_r, transition_r, total)

def _backward(z:_Sizes, plan:Schedule, q, k, v, g, lam, beta, inverse, state, transition, total, do)->tuple:
    "Gradients of q, k, v, g, lam, beta; those of q and k for every head of v"
    n, entries, segments = len(plan.leaf), len(plan.nodes), len(plan.segments)
    new, none = lambda *size, dtype=torch.float32: torch.empty(size, dtype=dtype, device=q.device), g
    wide = (*v.shape[:2], z.H, z.K)
    common = dict(K=z.K, V=z.V, C=z.C, BK=z.BK, BN=z.BN, DELTA=z.delta, PRECISION=z.precision)
    seen, dseen = (new(entries, z.H, z.C, z.K, dtype=z.dtype) for _ in range(2)) if z.delta else (none, none)
    if z.delta and entries: _launch(_transport_kernel, (n, z.H), (q, k, beta, inverse, transition, seen, plan.chunks, plan.nodes, z.R, z.G, z.H), z.warps,
                        K=z.K, C=z.C, BK=z.BK, PRECISION=z.precision)
    weights, after = new(entries, z.H, z.C), new(entries, z.H, z.C)
    leaving, row_sum, dlam = new(*wide, dtype=z.dtype), torch.empty_like(g), torch.zeros_like(lam)
    _launch(_query_grad_kernel, (n, z.H), (q, g, lam, do, state, transition, total, seen, dseen, weights, after, leaving, dlam, row_sum,
            plan.chunks, plan.nodes, plan.levels, z.R, z.G, z.H, z.L), z.warps, BE=max(16, triton.next_power_of_2(len(plan.splits))), **common)
    dz_part, dd_part = new(segments, z.H, z.K, z.V), new(segments, z.H)
    dp_part = new(segments, z.H, z.K, z.K) if z.delta else none
    _launch(_node_grad_kernel, (segments, z.H, z.tiles(z.delta)), (q, do, seen, dseen, weights, after, dz_part, dp_part, dd_part, plan.chunks,
            plan.segments, plan.pairs, z.R, z.G, z.H), z.warps, **common)
    rows = triton.cdiv(z.K, z.BM)*z.tiles(True) if z.delta else triton.cdiv(z.K*z.V, z.BLOCK)
    parts = triton.cdiv(z.K, z.BM)*triton.cdiv(z.V, z.BN)*z.BM if z.delta else rows
    dz, dp = new(plan.n_nodes, z.H, z.K, z.V), new(plan.n_nodes, z.H, z.K, z.K) if z.delta else none
    dd = torch.zeros(plan.n_nodes, z.H, parts + 1, device=q.device)
    for level in reversed(plan.splits):
        _launch(_split_kernel, (len(level), z.H, rows), (state, transition, total, dz, dp, dd, dz_part, dp_part, dd_part, level, z.H, parts), 4,
                K=z.K, V=z.V, BM=z.BM, BN=z.BN, BLOCK=z.BLOCK, DELTA=z.delta, PRECISION=z.precision)
    del seen, dseen, weights, after, dz_part, dp_part, dd_part
    dv, dg, dbeta = torch.empty_like(v), torch.empty_like(g), torch.empty_like(g)
    dhat, dattention = new(*wide, dtype=z.dtype), new(n, z.H, z.C, z.C, dtype=z.dtype)
    attention, dsolve = (new(n, z.H, z.C, z.C, dtype=z.dtype) for _ in range(2)) if z.delta else (none, none)
    _launch(_value_grad_kernel, (n, z.H), (q, k, v, g, lam, beta, inverse, do, dz, dd.sum(-1), row_sum, dv, dg, dlam, dhat, dattention, attention,
            plan.chunks, plan.leaf, plan.ancestors, plan.ancestors.shape[1], z.R, z.G, z.H, z.L), 8, LOG=z.LOG, **(common | dict(BN=min(z.BN, 32)))) # narrow: at 64 it spills more
    tiles = dict(K=z.K, C=z.C, BK=z.BK, BN=min(z.BN, z.BK), PRECISION=z.precision)
    if z.delta:
        dt = new(n, z.H, z.C, z.C)
        _launch(_leave_grad_kernel, (n, z.H), (k, dp, leaving, dhat, dattention, dt, plan.chunks, plan.leaf, z.R, z.G, z.H), 8, **tiles)
        _launch(_solve_grad_kernel, (n, z.H), (q, k, beta, inverse, dt, dattention, dsolve, dbeta, plan.chunks, z.R, z.G, z.H), 8, K=z.K, C=z.C,
                BK=z.BK, PRECISION=z.precision)
    dtype = z.dtype if z.R == 1 else torch.float32 # summed over the heads that share q and k
    dq, dk = new(*wide, dtype=dtype), new(*wide, dtype=dtype)
    _launch(_key_grad_kernel, (n, z.H, triton.cdiv(z.K, tiles["BN"])), (q, k, beta, inverse, attention, dp, leaving, dhat, dattention, dsolve, dq, dk,
            plan.chunks, plan.leaf, z.R, z.G, z.H), 4, DELTA=z.delta, **tiles)
    return dq, dk, dv, dg, dlam, dbeta

class _LogLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, g, lam, beta, lengths, chunk, keep):
        H, G = v.shape[2], k.shape[2]
        ctx.sizes = _Sizes(H//G, G, H, lam.shape[-1], k.shape[-1], v.shape[-1], chunk, beta is not None, v.dtype)
        ctx.plan = schedule(lengths, chunk, q.device)
        with _on(q): o, exact, kept = _forward(ctx.sizes, ctx.plan, q, k, v, g, lam, g if beta is None else beta)
        ctx.save_for_backward(q, k, v, g, lam, beta, *kept)
        ctx.mark_non_differentiable(*(exact := tuple(x.detach() for x in exact) if keep else ()))
        return o, *exact

    @staticmethod
    @once_differentiable
    def backward(ctx, do, *_):
        q, k, v, g, lam, beta, *kept = ctx.saved_tensors
        z = ctx.sizes
        with _on(q): dq, dk, dv, dg, dlam, dbeta = _backward(z, ctx.plan, q, k, v, g, lam, g if beta is None else beta, *kept, do.contiguous())
        if z.R > 1: dq, dk = (x.unflatten(2, (z.G, z.R)).sum(3).to(z.dtype) for x in (dq, dk))
        return dq, dk, dv, dg, dlam, dbeta if z.delta else None, None, None, None

def why_not(q:torch.Tensor, # (B,T,G,K)
            k:torch.Tensor, # (B,T,G,K)
            v:torch.Tensor, # (B,T,H,V)
           )->str: # the reason, or "" where the kernels do it
    "Why these inputs cannot be handed to the kernels (shapes that no backend takes are the business of `log_linear_attention`)."
    if reason := why_not_here(_output_kernel, v): return reason
    if not q.dtype == k.dtype == v.dtype: return f"q, k and v must have one type, got {q.dtype}, {k.dtype}, {v.dtype}"
    if v.dtype not in (torch.bfloat16, torch.float32): return f"bfloat16 or float32 wanted, got {v.dtype}: states outgrow float16, and tensor cores lack float64"
    if k.shape[-1] > MAX_K: return f"keys of at most {MAX_K} numbers, got {k.shape[-1]}"
    if v.shape[2] > 65535: return f"at most 65535 heads, got {v.shape[2]}"
    return ""

def supports(q:torch.Tensor, # (B,T,G,K)
             k:torch.Tensor, # (B,T,G,K)
             v:torch.Tensor, # (B,T,H,V)
            )->bool:
    "Whether the kernels take these inputs; `why_not` says why they do not."
    return not why_not(q, k, v)

def _check(q, k, v, g, lam, beta)->None:
    "Shapes that fit one another"
    n = check_shapes(q=(q, "B T G K"), k=(k, "B T G K"), v=(v, "B T H V"), g=(g, "B T H"), lam=(lam, "B T H L"), beta=(beta, "B T H"))
    if 0 in (n["G"], n["K"], n["H"], n["V"]): raise ValueError(f"heads and widths must be at least 1, got G = {n['G']}, K = {n['K']}, H = {n['H']}, V = {n['V']}")
    if n["H"] % n["G"]: raise ValueError(f"the {n['H']} heads of v must be a multiple of the {n['G']} of q and k")

def log_linear_attention(q:torch.Tensor, # (B,T,G,K) queries
                         k:torch.Tensor, # (B,T,G,K) keys; of length one in the delta form
                         v:torch.Tensor, # (B,T,H,V) values; H a multiple of G
                         g:torch.Tensor, # (B,T,H) log of the decay before each token, at most 0
                         lam:torch.Tensor, # (B,T,H,L) weight of each level for each query; 2^(L-1) >= T
                         beta:torch.Tensor|None=None, # (B,T,H) given: the gated-delta form
                         *,
                         scale:float|None=None, # factor of the output; None is 1
                         cu_seqlens:torch.Tensor|None=None, # (N+1,) bounds of N sequences packed in one row
                         return_state:bool=False, # also return the state after the last token, for `log_linear_step`
                         chunk:int=CHUNK, # tokens a chunk: 16, 32 or 64
                        )->torch.Tensor|tuple[torch.Tensor, tuple[torch.Tensor, torch.Tensor]]: # (B,T,H,V), and (state, tokens seen)
    """Log-linear attention on a GPU (equation at the top of this file), with gradients for every input.

    Decays that are not negative work as long as their exponentials do. Gradients do not flow through the returned state. Raises
    `ValueError` for shapes that do not fit, for more tokens than `lam` has levels for, and for what `why_not` names."""
    _check(q, k, v, g, lam, beta)
    if reason := why_not(q, k, v): raise ValueError(reason)
    if chunk not in (16, 32, 64): raise ValueError(f"chunk must be 16, 32 or 64, got {chunk}")
    (B, T), L = v.shape[:2], lam.shape[-1]
    if cu_seqlens is not None and B != 1: raise ValueError(f"cu_seqlens needs B = 1, got B = {B}")
    lengths = (T,)*B if cu_seqlens is None else tuple(s.stop - s.start for s in sequences(cu_seqlens, T))
    if L < 1 or max(lengths, default=0) > 1 << (L - 1):
        raise ValueError(f"{L} levels reach {(1 << L) >> 1} tokens, but a sequence has {max(lengths)}: lam needs more levels")
    q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
    g, beta = g.float().contiguous(), None if beta is None else beta.float().contiguous()
    lam = (lam.float() if scale is None else lam.float()*scale).contiguous()
    o, *nodes = _LogLinear.apply(q, k, v, g, lam, beta, lengths, chunk, return_state)
    if not return_state: return o
    with torch.no_grad(): return o, _final_state(q, k, v, g, lam, beta, nodes, lengths, chunk)

def _blocks(nodes:Sequence[torch.Tensor], ids:Sequence[torch.Tensor], delta:bool):
    "States that a chunk sees at its start, from its nodes near to far: what lies behind a node has passed through it"
    state, transition, total = nodes
    before, through = torch.zeros((), device=total.device), None
    for at in ids:
        seen = state[at] if through is None else through @ state[at]
        yield seen*before.exp().expand(total[at].shape)[..., None, None]
        before = before + total[at]
        if delta: through = transition[at] if through is None else through @ transition[at]

def _final_state(q, k, v, g, lam, beta, nodes, lengths:tuple[int, ...], chunk:int)->tuple[torch.Tensor, torch.Tensor]:
    "State and tokens of each sequence: the nodes that the last chunk sees, then its tokens one by one"
    log, first = chunk.bit_length() - 1, np.cumsum([0, *lengths])
    sizes = [sum(N >> l for l in range((N - 1).bit_length())) if N else 0 for N in (-(-T//chunk) for T in lengths)]
    offset, device = np.cumsum([0, *sizes]), v.device
    S = torch.zeros(len(lengths), v.shape[2], lam.shape[-1], k.shape[-1], v.shape[-1], device=device)
    for T in set(lengths) - {0}: # sequences of one length go together
        who, last = [i for i, length in enumerate(lengths) if length == T], (T - 1)//chunk
        bits = [l for l in range(last.bit_length()) if last >> l & 1]
        local = lambda l: sum((last + 1) >> below for below in range(l)) + (last >> l) - 1
        ids = [torch.tensor([int(offset[i]) + local(l) for i in who], device=device) for l in bits]
        part = torch.zeros(len(who), *S.shape[1:], device=device)
        for l, seen in zip(bits, _blocks(nodes, ids, beta is not None)): part[:, :, l + log + 1] = seen
        rows = torch.tensor([[*range(int(first[i]) + last*chunk, int(first[i]) + T)] for i in who], device=device)
        tail = [None if x is None else x.flatten(0, 1)[rows] for x in (q, k, v, g, lam, beta)]
        _steps(part, torch.full((len(who),), last*chunk, device=device), *tail)
        S[torch.tensor(who, device=device)] = part
    return S, torch.tensor(lengths, device=device)

def _steps(S, time, q, k, v, g, lam, beta)->torch.Tensor:
    "Outputs of tokens taken one by one; S is changed in place"
    (B, N, G, K), (H, V) = q.shape, v.shape[2:]
    BK, BN = max(16, triton.next_power_of_2(K)), min(32, max(16, triton.next_power_of_2(V)))
    o = torch.empty_like(v)
    with _on(v): _launch(_step_kernel, (B, H, triton.cdiv(V, BN)), (S, time, q, k, v, g, lam, g if beta is None else beta, o, N, H//G, G, H,
                         lam.shape[-1]), 4, K=K, V=V, BK=BK, BN=BN, DELTA=beta is not None)
    return o

def log_linear_step(state:tuple[torch.Tensor, torch.Tensor]|None, # (B,H,L,K,V) float32 and tokens seen (B,) int64; None at the start
                    q:torch.Tensor, # (B,N,G,K) queries of N tokens, usually one
                    k:torch.Tensor, # (B,N,G,K)
                    v:torch.Tensor, # (B,N,H,V)
                    g:torch.Tensor, # (B,N,H)
                    lam:torch.Tensor, # (B,N,H,L)
                    beta:torch.Tensor|None=None, # (B,N,H)
                    *,
                    scale:float|None=None, # factor of the output; None is 1
                    inplace:bool=False, # change the state instead of copying it: L*K*V numbers a head
                   )->tuple[torch.Tensor, tuple[torch.Tensor, torch.Tensor]]: # (B,N,H,V), and the next state
    """Decode: the recurrence of Algorithm 1, without gradients, each row at its own position, O(log T) states read a token.

    A row that outgrows its levels (2^(L-1) tokens) gives NaN: finding it here would wait for the GPU at every token. Raises
    `ValueError` for shapes that do not fit and for what `why_not` names."""
    _check(q, k, v, g, lam, beta)
    if reason := why_not(q, k, v): raise ValueError(reason)
    (B, N, H, V), L, K = v.shape, lam.shape[-1], k.shape[-1]
    with torch.no_grad():
        if state is None: S, time = v.new_zeros(B, H, L, K, V, dtype=torch.float32), torch.zeros(B, dtype=torch.int64, device=v.device)
        else: S, time = state
        if S.shape != (B, H, L, K, V) or S.dtype != torch.float32: raise ValueError(f"the state must be float32 {(B, H, L, K, V)}, got {S.dtype} {tuple(S.shape)}")
        if time.shape != (B,): raise ValueError(f"tokens seen must be ({B},), got {tuple(time.shape)}")
        if not inplace and state is not None: S = S.clone(memory_format=torch.contiguous_format)
        if not S.is_contiguous(): raise ValueError("a state that is changed in place must be contiguous")
        weights = lam.float() if scale is None else lam.float()*scale
        rest = [None if x is None else x.float().contiguous() for x in (g, weights, beta)]
        o = _steps(S, time.long().contiguous(), q.contiguous(), k.contiguous(), v.contiguous(), *rest)
        return o, (S, time + N)

# ----------------------------------------------------------------------------------------------------- compiling ahead of time

_TYPES = {torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.int32: "*i32", torch.int64: "*i64"}

@contextmanager
def _recording():
    "Launches are noted down instead of made"
    global _recorded
    _recorded, old = [], _recorded
    try: yield _recorded
    finally: _recorded = old

def aot_cases(K:int=128, # width of keys
              V:int=128, # width of values
              dtype:str="bfloat16", # of q, k and v
             )->list: # of `aot.Case`
    "Every kernel as a real call launches it: forward, backward and decoding of both forms run on tensors without data."
    from rlcr_suite.kernels.aot import Case
    B, T, H, L = 2, 2048, 16, 17
    x = lambda *size, dtype=torch.float32: torch.empty(size, dtype=dtype, device="meta")
    wide = dict(dtype=getattr(torch, dtype))
    q, k, v, g, lam = x(B, T, H, K, **wide), x(B, T, H, K, **wide), x(B, T, H, V, **wide), x(B, T, H), x(B, T, H, L)
    found = {}
    for form, beta in (("scalar", g), ("delta", x(B, T, H))):
        sizes = _Sizes(1, H, H, L, K, V, CHUNK, form == "delta", v.dtype)
        plan = schedule((T,)*B, CHUNK, torch.device("meta"))
        with _recording() as launches:
            _, _, kept = _forward(sizes, plan, q, k, v, g, lam, beta)
            _backward(sizes, plan, q, k, v, g, lam, beta, *kept, v)
            _steps(x(B, H, L, K, V), x(B, dtype=torch.int64), *(t[:, :1] for t in (q, k, v, g, lam)), beta[:, :1] if form == "delta" else None)
        for kernel, args, constexprs, warps, stages in launches:
            label = f"{form} {kernel.__name__.strip('_').removesuffix('_kernel')}"
            named = dict(zip(kernel.arg_names, args))
            signature = {name: _TYPES[a.dtype] if torch.is_tensor(a) else "i32" for name, a in named.items()}
            ones = {name: 1 for name, a in named.items() if not torch.is_tensor(a) and a == 1} # Triton makes ones constants
            aligned = tuple(name for name, a in named.items() if not torch.is_tensor(a) and a % 16 == 0)
            found.setdefault(label, Case(label, kernel, signature, constexprs | ones, warps, stages, aligned))
    return list(found.values())
