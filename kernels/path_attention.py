r"""PaTH attention (arXiv 2505.16381) as a tree of rectangles: forward, deterministic backward, decoding. See nbs/05_path_attention/06_kernel.

    o_i = sum_{j<=i} softmax_j( scale q_i' H_i H_{i-1} .. H_{j+1} k_j + (c_i - c_j)(scale if scale_gate else 1) ) v_j,   H_t = I - beta_t w_t w_t'

Shapes: q (B,T,HQ,D), k, v, w (B,T,H,D), beta (B,T,H), gate (B,T,HQ) = log f, c its running sum. q, k, v in fp16, bf16 or fp32 (one dtype);
w, beta and gate are read as fp32. What happens, with C = 64 tokens a leaf and N leaves:

    prepare    a leaf: UT transform; its own logits (C,C); queries carried to its start, keys to its end; P = I - W'TW (D,D)
    compose    P of the inner nodes, level by level:  P = P_right P_left
    transport  a leaf: its queries through every Left node they meet, its keys through every Right node; one copy a level
    attend     two leaves of queries: plain softmax attention to the Left nodes they meet; no masks, since those are complete
    backward   the same rectangles with the global log-sum-exp: one kernel for queries, one for keys; then transport, compose
               and prepare in reverse. Every sum has a fixed order and no kernel uses atomics, so gradients are bitwise reproducible.

Saved for the backward pass: inputs, output and log-sum-exp, O(T). Alive during a pass: O(T log T) for the copies, N D^2 for the nodes.
"""
from functools import lru_cache
from itertools import product
from typing import NamedTuple
import math
import numpy as np
import torch
import triton
import triton.language as tl
from torch.autograd.function import once_differentiable
from ..core.blocks import check_shapes, prefix_sum, sequences
from .interpreter import add_dot, dot, why_not_here

__all__ = ['CHUNK', 'aot_cases', 'path_attention', 'path_attention_decode', 'supports', 'supports_decode', 'why_not', 'why_not_decode']

CHUNK = 64                 # tokens a leaf
LOG2E = math.log2(math.e)  # kernels work with exp2
DTYPES = (torch.float16, torch.bfloat16, torch.float32)

# ---------------------------------------------------------------------------------------------------------------- schedule

class Schedule(NamedTuple):
    "The tree as int32 tables on the device, so that kernels hold no arithmetic of levels. A slot holds one copy of a leaf; a slot has C rows."
    leaves: int             # N, leaves of all sequences
    levels: int             # height of the tree of the longest sequence
    q_slots: int            # copies of query leaves: half of all leaves have one at a level
    k_slots: int            # copies of key leaves
    nodes: int              # nodes that somebody may go through, level by level
    leaf: torch.Tensor      # (N, 3) first token, end of its sequence, its node (-1: incomplete)
    q_ptr: torch.Tensor     # (N+1,) the way of leaf n is q_steps[q_ptr[n]:q_ptr[n+1]]
    q_steps: torch.Tensor   # (., 2) slot to copy to, node to go through afterwards (-1: none)
    k_ptr: torch.Tensor     # the same for keys
    k_steps: torch.Tensor
    q_tiles: torch.Tensor   # (tiles, 7) a pair of leaves: token, end, leaf, row of its queries and of its keys at level 0 (-1: no pair), rects from, to
    q_rects: torch.Tensor   # (., 4) row of the tile's queries, row of Left's keys, token of Left's first key, number of keys
    k_tiles: torch.Tensor   # the same pairs as keys
    k_rects: torch.Tensor   # (., 4) row of the tile's keys, row of Right's queries, token of Right's first query, number of queries
    joins: tuple            # a level above the leaves: (nodes, 3) = parent, Left, Right
    sources: torch.Tensor   # (nodes, 4) who went through a node: row before, row after, leaves, 0 for queries and 1 for keys

def _steps(slot, through):
    "The way of every leaf (`q_ptr`, `q_steps`) from slots and nodes (L, N)"
    has = (slot >= 0).T
    return np.concatenate([[0], has.sum(1).cumsum()]), np.stack([slot.T, through.T], -1)[has]

def _tiles(pairs, rects, has):
    "Tiles and their rectangles above level 0, the longest tiles first: those that start first should not end last"
    has, rects = has[1:, pairs[:, 2]].T, rects[1:, pairs[:, 2]].swapaxes(0, 1)
    ptr = np.concatenate([[0], has.sum(1).cumsum()])
    order = np.argsort(-(rects[..., 3]*has).sum(1), kind='stable')
    return np.concatenate([pairs, ptr[:-1, None], ptr[1:, None]], 1)[order], rects[has]

def _later(slot):
    "The next slot of every copy (L, N), -1 for the last"
    after = np.full_like(slot, -1)
    for l in reversed(range(len(slot) - 1)): after[l] = np.where(slot[l + 1] >= 0, slot[l + 1], after[l + 1])
    return after

@lru_cache(maxsize=64)
def schedule(lengths: tuple[int, ...], # tokens of every sequence
             chunk: int, # tokens a leaf
             device: torch.device, # where the tables go
            ) -> Schedule:
    "The tree over every sequence. Bit l of a leaf's number n says whether it is Left or Right at level l; arrays here are (levels, leaves)."
    lengths = np.array(lengths)
    count, start = -(-lengths // chunk), np.cumsum(lengths) - lengths
    n = np.concatenate([np.arange(c) for c in count])
    total, end = np.repeat(count, count), np.repeat(start + lengths, count)
    token, leaf = np.repeat(start, count) + n*chunk, np.arange(len(n))
    L = max(1, int(count.max() - 1).bit_length())
    l = np.arange(L)[:, None]
    head = leaf - n % (1 << l)                                                   # first leaf of the node that holds a leaf
    right, left = n >> l & 1 == 1, (n >> l & 1 == 0) & ((n >> l) + 1 << l < total)
    whole = (token + (head + (1 << l) - leaf)*chunk <= end) & (l < L - 1)         # nobody goes through nodes of the last level
    made = whole & (head == leaf)
    number = lambda mask: np.where(mask, mask.cumsum().reshape(mask.shape) - 1, -1)
    at = lambda table, i: np.take_along_axis(np.broadcast_to(table, i.shape), i.clip(0, len(n) - 1), 1)
    q_slot, k_slot, node = number(right), number(left), np.where(whole, at(number(made), head), -1)
    before, after = head - (1 << l), head + (1 << l)                             # first leaves of a Right's Left and of a Left's Right
    q_next, k_next = _later(q_slot), _later(k_slot)
    through_q = np.where((q_slot >= 0) & (q_next >= 0), at(node, before), -1)
    through_k = np.where((k_slot >= 0) & (k_next >= 0), at(node, after), -1)
    # attention
    even = leaf[n % 2 == 0]
    two = n[even] + 1 < total[even]
    pairs = np.stack([token[even], end[even], even, np.where(two, q_slot[0].take(even + 1, mode='clip')*chunk, -1),
                      np.where(two, k_slot[0][even]*chunk, -1)], 1)
    key, query, full = at(token, before), at(token, after), np.broadcast_to(chunk << l, head.shape)
    q_rects = np.stack([q_slot*chunk, at(k_slot, before)*chunk, key, full], -1)
    k_rects = np.stack([k_slot*chunk, at(q_slot, after)*chunk, query, np.minimum(full, end - query)], -1)
    # nodes
    level, first = made.nonzero()
    odd = n[first] >> level & 1
    user = np.where(odd, first - (1 << level), first + (1 << level)).clip(0, len(n) - 1)
    pick = lambda q, k: np.where(odd, k[level, user], q[level, user])
    used = pick(through_q, through_k) == node[level, first]
    sources = np.stack([pick(q_slot, k_slot)*chunk, pick(q_next, k_next)*chunk, np.minimum(1 << level, total[user] - n[user]), odd], 1)
    joins = [np.stack([node[i, f], node[i - 1, f], node[i - 1, f + (1 << i - 1)]], 1) for i, f in ((i, first[level == i]) for i in range(1, L))]
    # nobody reads the row that stands for an empty table
    table = lambda x: torch.as_tensor(np.ascontiguousarray(x if len(x) else np.zeros((1, *x.shape[1:])), dtype=np.int32)).to(device)
    return Schedule(len(n), L, int(right.sum()), int(left.sum()), int(made.sum()), table(np.stack([token, end, node[0]], 1)),
                    *map(table, (*_steps(q_slot, through_q), *_steps(k_slot, through_k), *_tiles(pairs, q_rects, right), *_tiles(pairs, k_rects, left))),
                    tuple(table(j) for j in joins if len(j)), table(sources*used[:, None]))

# ------------------------------------------------------------------------------------------------------- leaves and nodes

@triton.jit
def _unit_lower_inverse(n, C: tl.constexpr):
    "(I + n)^-1 for strictly lower n (C, C): diagonal blocks by substitution, and [[A, 0], [E, B]]^-1 = [[A^-1, 0], [-B^-1 E A^-1, B^-1]]"
    S: tl.constexpr = C if C < 64 else 32
    G: tl.constexpr = C // S                                                     # diagonal blocks, 1 or 2
    g, i = tl.arange(0, G), tl.arange(0, S)
    n = tl.reshape(n, (G, S, G, S))
    own = (g[:, None] == g[None, :])[:, None, :, None]                           # (G, 1, G, 1)
    diag = tl.sum(tl.where(own, n, 0.), axis=2)                                  # (G, S, S)
    x = tl.zeros((G, S, S), tl.float32) + tl.where(i[:, None] == i[None, :], 1., 0.)[None, :, :]
    for r in range(1, S):
        here = (i == r)[None, :, None]
        row = tl.sum(tl.where(here, diag, 0.), axis=1)                           # (G, S), row r of every block
        x = tl.where(here, x - tl.sum(row[:, :, None]*x, axis=1)[:, None, :], x)
    full = tl.where(own, x[:, :, None, :], 0.)
    if G == 2:
        low = (g[:, None] > g[None, :])[:, None, :, None]
        e = tl.sum(tl.sum(tl.where(low, n, 0.), axis=2), axis=0)
        a = tl.sum(tl.where((g == 0)[:, None, None], x, 0.), axis=0)
        b = tl.sum(tl.where((g == 1)[:, None, None], x, 0.), axis=0)
        full -= tl.where(low, dot(dot(b, e, 'ieee'), a, 'ieee')[None, :, None, :], 0.)
    return tl.reshape(full, (C, C))

@triton.jit
def _tile(x, base, i, d, live, W: tl.constexpr, D: tl.constexpr):
    "Rows i of a tensor whose rows lie W apart, columns d < D of it; zero where not live"
    return tl.load(x + base + i[:, None]*W + d[None, :], mask=live[:, None] & (d < D)[None, :], other=0.)

@triton.jit
def _put(x, base, i, d, live, value, W: tl.constexpr, D: tl.constexpr):
    "Store where `_tile` loads"
    tl.store(x + base + i[:, None]*W + d[None, :], value.to(x.dtype.element_ty), mask=live[:, None] & (d < D)[None, :])

@triton.jit
def _square(x, base, i, j, W: tl.constexpr):
    "Pointers to a block of a matrix whose rows lie W apart"
    return x + base + i[:, None]*W + j[None, :]

@triton.jit
def _decay(c, base, plane, t, ref, live):
    "c_t - c_ref, 0 where not live, from the sum's high and low part, `plane` apart: exact to fp32 however large the sum has grown"
    hi = tl.load(c + base + t, mask=live, other=0.) - tl.load(c + base + ref)
    lo = tl.load(c + plane + base + t, mask=live, other=0.) - tl.load(c + plane + base + ref)
    return tl.where(live, hi + lo, 0.)

@triton.jit
def _prepare_kernel(k, w, beta, leaf, inv, u, y, kt, T, N, H: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, C: tl.constexpr,
                    SAVE: tl.constexpr, PREC: tl.constexpr):
    "A leaf of one key head: the inverse, U = T stril(W K') (C,C), Y = T W (C,BD), and keys carried to the leaf's end"
    n, bh = tl.program_id(0), tl.program_id(1).to(tl.int64)
    b, h = bh // H, bh % H
    first, end = tl.load(leaf + n*3), tl.load(leaf + n*3 + 1)
    S: tl.constexpr = 32 if BD > 32 else BD                                      # columns at a time, to save registers
    i, e, m = tl.arange(0, C), tl.arange(0, S), bh*N + n
    live, at = first + i < end, ((b*T + first)*H + h)*D
    below = i[:, None] > i[None, :]
    gram, mixed = tl.zeros((C, C), tl.float32), tl.zeros((C, C), tl.float32)
    for col in range(0, BD, S):
        x = _tile(w, at, i, col + e, live, H*D, D).to(tl.float32)
        gram += dot(x, tl.trans(x), 'tf32x3')
        mixed += dot(x, tl.trans(_tile(k, at, i, col + e, live, H*D, D).to(tl.float32)), PREC)
    bt = tl.load(beta + (b*T + first + i)*H + h, mask=live, other=0.).to(tl.float32)
    t = _unit_lower_inverse(tl.where(below, bt[:, None]*gram, 0.), C)
    if SAVE: tl.store(_square(inv, m*C*C, i, i, C), t)
    t *= bt[None, :]                                                             # T = (I + stril(diag(beta) W W'))^-1 diag(beta)
    uu = dot(t, tl.where(below, mixed, 0.), PREC)
    tl.store(_square(u, m*C*C, i, i, C), uu)
    for col in range(0, BD, S):
        x = _tile(w, at, i, col + e, live, H*D, D).to(tl.float32)
        tl.store(_square(y, m*C*BD, i, col + e, BD), dot(t, x, PREC))
        tl.store(_square(kt, m*C*BD, i, col + e, BD), _tile(k, at, i, col + e, live, H*D, D).to(tl.float32) - dot(tl.trans(uu), x, PREC))

@triton.jit
def _leaf_node_kernel(w, y, leaf, p, T, N, nodes, H: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, BN: tl.constexpr, C: tl.constexpr,
                      PREC: tl.constexpr):
    "P of a leaf, I - W'Y, BN columns a program"
    n, col, bh = tl.program_id(0), tl.program_id(1)*BN + tl.arange(0, BN), tl.program_id(2).to(tl.int64)
    first, end, node = tl.load(leaf + n*3), tl.load(leaf + n*3 + 1), tl.load(leaf + n*3 + 2)
    i, d = tl.arange(0, C), tl.arange(0, BD)
    if node >= 0:
        wt = _tile(w, ((bh // H*T + first)*H + bh % H)*D, i, d, first + i < end, H*D, D).to(tl.float32)
        yy = tl.load(_square(y, (bh*N + n)*C*BD, i, col, BD))
        tl.store(_square(p, (bh*nodes + node)*BD*BD, d, col, BD), tl.where(d[:, None] == col[None, :], 1., 0.) - dot(tl.trans(wt), yy, PREC))

@triton.jit
def _query_prepare_kernel(q, k, w, u, y, c, leaf, logits, qt, T, N, plane, scale, gscale, # scales times log2(e)
                          HQ: tl.constexpr, H: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, C: tl.constexpr,
                          GATE: tl.constexpr, PREC: tl.constexpr):
    "A leaf of one query head: with S = tril(Q W'), its own logits tril(Q K') - S U (C,C), and queries carried to its start, Q - S Y"
    n, bhq = tl.program_id(0), tl.program_id(1).to(tl.int64)
    b, hq = bhq // HQ, bhq % HQ
    h = hq // (HQ // H)
    first, end = tl.load(leaf + n*3), tl.load(leaf + n*3 + 1)
    S: tl.constexpr = 32 if BD > 32 else BD                                      # columns at a time, to save registers
    i, e, m, mq = tl.arange(0, C), tl.arange(0, S), (b*H + h)*N + n, bhq*N + n
    live, at, atq = first + i < end, ((b*T + first)*H + h)*D, ((b*T + first)*HQ + hq)*D
    causal = i[:, None] >= i[None, :]
    s, a = tl.zeros((C, C), tl.float32), tl.zeros((C, C), tl.float32)
    for col in range(0, BD, S):
        x = _tile(q, atq, i, col + e, live, HQ*D, D).to(tl.float32)
        s += dot(x, tl.trans(_tile(w, at, i, col + e, live, H*D, D).to(tl.float32)), PREC)
        a += dot(x, tl.trans(_tile(k, at, i, col + e, live, H*D, D).to(tl.float32)), PREC)
    s = tl.where(causal, s, 0.)
    a = (a - dot(s, tl.load(_square(u, m*C*C, i, i, C)), PREC))*scale
    if GATE:
        ptr = c + bhq*T + first + i
        hi, lo = tl.load(ptr, mask=live, other=0.), tl.load(ptr + plane, mask=live, other=0.)
        a += ((hi[:, None] - hi[None, :]) + (lo[:, None] - lo[None, :]))*gscale
    tl.store(_square(logits, mq*C*C, i, i, C), tl.where(causal, a, float('-inf')))
    for col in range(0, BD, S):
        x = _tile(q, atq, i, col + e, live, HQ*D, D).to(tl.float32)
        tl.store(_square(qt, mq*C*BD, i, col + e, BD), x - dot(s, tl.load(_square(y, m*C*BD, i, col + e, BD)), PREC))

@triton.jit
def _compose_kernel(p, joins, nodes, BD: tl.constexpr, BN: tl.constexpr, PREC: tl.constexpr):
    "P of inner nodes: P_parent = P_right P_left, BN columns a program"
    j, col, bh = tl.program_id(0), tl.program_id(1)*BN + tl.arange(0, BN), tl.program_id(2).to(tl.int64)
    d, base = tl.arange(0, BD), bh*nodes*BD*BD
    parent, left, right = tl.load(joins + j*3), tl.load(joins + j*3 + 1), tl.load(joins + j*3 + 2)
    l = tl.load(_square(p, base + left*BD*BD, d, col, BD))
    r = tl.load(_square(p, base + right*BD*BD, d, d, BD))
    tl.store(_square(p, base + parent*BD*BD, d, col, BD), dot(r, l, PREC))

@triton.jit
def _transport_kernel(x, p, ptr, steps, out, N, slots, nodes, R: tl.constexpr, BD: tl.constexpr, C: tl.constexpr,
                      KEYS: tl.constexpr, PREC: tl.constexpr):
    "A leaf of one head up the tree: a copy at every level that needs one; queries go on as x P_left, keys as x P_right'"
    n, bh = tl.program_id(0), tl.program_id(1).to(tl.int64)
    i, d = tl.arange(0, C), tl.arange(0, BD)
    e, stop = tl.load(ptr + n), tl.load(ptr + n + 1)
    if e < stop:
        tile = tl.load(_square(x, (bh*N + n)*C*BD, i, d, BD))
        while e < stop:
            slot, node = tl.load(steps + e*2), tl.load(steps + e*2 + 1)
            tl.store(_square(out, (bh*slots + slot)*C*BD, i, d, BD), tile.to(out.dtype.element_ty))
            if node >= 0:
                m = p + (bh // R*nodes + node)*BD*BD
                if KEYS: tile = dot(tile, tl.load(m + d[None, :]*BD + d[:, None]), PREC)
                else: tile = dot(tile, tl.load(m + d[:, None]*BD + d[None, :]), PREC)
            e += 1

# --------------------------------------------------------------------------------------------------------- the rectangles

@triton.jit
def _online(acc, m, l, s, v, PREC: tl.constexpr):
    "One step of the online softmax: logits s in log2 units, values v"
    high = tl.maximum(m, tl.max(s, 1))
    fade = tl.exp2(m - high)
    e = tl.exp2(s - high[:, None])
    return add_dot(acc*fade[:, None], e.to(v.dtype), v, PREC), high, l*fade + tl.sum(e, 1)

@triton.jit
def _forward_kernel(xq, xk, v, logits, c, tiles, rects, o, lse, T, N, q_slots, k_slots, plane, scale, gscale,
                    HQ: tl.constexpr, H: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, C: tl.constexpr, BN: tl.constexpr,
                    GATE: tl.constexpr, PREC: tl.constexpr):
    "Two leaves of queries of one head against every key they see"
    bhq = tl.program_id(1).to(tl.int64)
    b, hq = bhq // HQ, bhq % HQ
    h = hq // (HQ // H)
    tile = tiles + tl.program_id(0)*7
    first, end, n = tl.load(tile), tl.load(tile + 1), tl.load(tile + 2)
    q0, k0, e, stop = tl.load(tile + 3), tl.load(tile + 4), tl.load(tile + 5), tl.load(tile + 6)
    i, j, d = tl.arange(0, 2*C), tl.arange(0, BN), tl.arange(0, BD)
    live, upper = first + i < end, i >= C
    vbase, cbase = (b*T*H + h)*D, bhq*T
    qbase, kbase = bhq*q_slots*C*BD, (b*H + h)*k_slots*C*BD
    acc, m, l = tl.zeros((2*C, BD), tl.float32), tl.full((2*C,), float('-inf'), tl.float32), tl.zeros((2*C,), tl.float32)
    # own leaf: its logits are ready; row i of the tile is row i%C of leaf n + i//C, and sees its first key at once
    for at in range(0, C, BN):
        x = tl.load(_square(logits, (bhq*N + n)*C*C, i, at + j, C), mask=live[:, None], other=0.)
        high = tl.maximum(m, tl.max(x, 1))
        fade, x = tl.exp2(m - high), tl.exp2(x - high[:, None])
        m, l, acc = high, l*fade + tl.sum(x, 1), acc*fade[:, None]
        vv = _tile(v, vbase + (first + at).to(tl.int64)*H*D, j, d, first + at + j < end, H*D, D)
        acc = add_dot(acc, tl.where(upper[:, None], 0., x).to(vv.dtype), vv, PREC)
        vv = _tile(v, vbase + (first + C + at).to(tl.int64)*H*D, j, d, first + C + at + j < end, H*D, D)
        acc = add_dot(acc, tl.where(upper[:, None], x, 0.).to(vv.dtype), vv, PREC)
    if q0 >= 0:                                                                       # level 0: the upper leaf's queries, the lower one's keys
        qq = _tile(xq, qbase + (q0 - C).to(tl.int64)*BD, i, d, upper & live, BD, BD)
        if GATE: qc = _decay(c, cbase, plane, first + i, first + C - 1, upper & live)*gscale
        for at in range(0, C, BN):
            kk = tl.load(_square(xk, kbase + (k0 + at).to(tl.int64)*BD, j, d, BD))
            vv = _tile(v, vbase + (first + at).to(tl.int64)*H*D, j, d, j >= 0, H*D, D)
            x = dot(qq, tl.trans(kk), PREC)*scale
            if GATE: x += qc[:, None] - _decay(c, cbase, plane, first + at + j, first + C - 1, j >= 0)[None, :]*gscale
            acc, m, l = _online(acc, m, l, tl.where(upper[:, None], x, float('-inf')), vv, PREC)
    # all other levels: both leaves see the whole of the same Left nodes
    while e < stop:
        rect = rects + e*4
        qrow, krow, key, size = tl.load(rect), tl.load(rect + 1).to(tl.int64), tl.load(rect + 2).to(tl.int64), tl.load(rect + 3)
        qq = _tile(xq, qbase + qrow.to(tl.int64)*BD, i, d, live, BD, BD)
        if GATE: qc = _decay(c, cbase, plane, first + i, key + size - 1, live)*gscale
        for at in range(0, size, BN):
            kk = tl.load(_square(xk, kbase + (krow + at)*BD, j, d, BD))
            vv = _tile(v, vbase + (key + at)*H*D, j, d, j >= 0, H*D, D)
            x = dot(qq, tl.trans(kk), PREC)*scale
            if GATE: x += qc[:, None] - _decay(c, cbase, plane, key + at + j, key + size - 1, j >= 0)[None, :]*gscale
            acc, m, l = _online(acc, m, l, x, vv, PREC)
        e += 1
    _put(o, (b*T + first)*HQ*D + hq*D, i, d, live, acc/l[:, None], HQ*D, D)
    tl.store(lse + bhq*T + first + i, m + tl.log2(l), mask=live)

@triton.jit
def _query_grad_kernel(xq, xk, v, logits, c, tiles, rects, o, lse, do, delta, dlogits, dxq, dc, T, N, q_slots, k_slots, plane, scale, gscale,
                       HQ: tl.constexpr, H: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, C: tl.constexpr, BN: tl.constexpr,
                       GATE: tl.constexpr, PREC: tl.constexpr):
    "Gradients of two leaves of queries of one head: of their own logits, of their copy at every level, and (gate) of c as query"
    bhq = tl.program_id(1).to(tl.int64)
    b, hq = bhq // HQ, bhq % HQ
    h = hq // (HQ // H)
    tile = tiles + tl.program_id(0)*7
    first, end, n = tl.load(tile), tl.load(tile + 1), tl.load(tile + 2)
    q0, k0, e, stop = tl.load(tile + 3), tl.load(tile + 4), tl.load(tile + 5), tl.load(tile + 6)
    i, j, d = tl.arange(0, 2*C), tl.arange(0, BN), tl.arange(0, BD)
    live, upper = first + i < end, i >= C
    vbase, cbase = (b*T*H + h)*D, bhq*T
    qbase, kbase = bhq*q_slots*C*BD, (b*H + h)*k_slots*C*BD
    g = _tile(do, (b*T + first)*HQ*D + hq*D, i, d, live, HQ*D, D)
    dd = tl.sum(g.to(tl.float32)*_tile(o, (b*T + first)*HQ*D + hq*D, i, d, live, HQ*D, D).to(tl.float32), 1)
    tl.store(delta + bhq*T + first + i, dd, mask=live)
    z = tl.load(lse + bhq*T + first + i, mask=live, other=float('inf'))              # probabilities of rows beyond the end are 0
    dcq = tl.zeros((2*C,), tl.float32)
    for at in range(0, C, BN):                                                        # own leaf
        v0 = _tile(v, vbase + (first + at).to(tl.int64)*H*D, j, d, first + at + j < end, H*D, D)
        v1 = _tile(v, vbase + (first + C + at).to(tl.int64)*H*D, j, d, first + C + at + j < end, H*D, D)
        x = tl.where(upper[:, None], dot(g, tl.trans(v1), PREC), dot(g, tl.trans(v0), PREC)) - dd[:, None]
        x *= tl.exp2(tl.load(_square(logits, (bhq*N + n)*C*C, i, at + j, C), mask=live[:, None], other=0.) - z[:, None])
        # rows of a second leaf that does not exist belong to another leaf: leave them alone
        tl.store(_square(dlogits, (bhq*N + n)*C*C, i, at + j, C), x, mask=((i < C) | (q0 >= 0))[:, None])
        dcq += tl.sum(x, 1)
    if q0 >= 0:                                                                       # level 0
        qq = _tile(xq, qbase + (q0 - C).to(tl.int64)*BD, i, d, upper & live, BD, BD)
        if GATE: qc = _decay(c, cbase, plane, first + i, first + C - 1, upper & live)*gscale
        dq = tl.zeros((2*C, BD), tl.float32)
        for at in range(0, C, BN):
            kk = tl.load(_square(xk, kbase + (k0 + at).to(tl.int64)*BD, j, d, BD))
            vv = _tile(v, vbase + (first + at).to(tl.int64)*H*D, j, d, j >= 0, H*D, D)
            x = dot(qq, tl.trans(kk), PREC)*scale
            if GATE: x += qc[:, None] - _decay(c, cbase, plane, first + at + j, first + C - 1, j >= 0)[None, :]*gscale
            x = tl.where(upper[:, None], tl.exp2(x - z[:, None])*(dot(g, tl.trans(vv), PREC) - dd[:, None]), 0.)
            dcq += tl.sum(x, 1)
            dq = add_dot(dq, x.to(kk.dtype), kk, PREC)
        _put(dxq, qbase + (q0 - C).to(tl.int64)*BD, i, d, upper, dq, BD, BD)
    while e < stop:
        rect = rects + e*4
        qrow, krow, key, size = tl.load(rect).to(tl.int64), tl.load(rect + 1).to(tl.int64), tl.load(rect + 2).to(tl.int64), tl.load(rect + 3)
        qq = _tile(xq, qbase + qrow*BD, i, d, live, BD, BD)
        if GATE: qc = _decay(c, cbase, plane, first + i, key + size - 1, live)*gscale
        dq = tl.zeros((2*C, BD), tl.float32)
        for at in range(0, size, BN):
            kk = tl.load(_square(xk, kbase + (krow + at)*BD, j, d, BD))
            vv = _tile(v, vbase + (key + at)*H*D, j, d, j >= 0, H*D, D)
            x = dot(qq, tl.trans(kk), PREC)*scale
            if GATE: x += qc[:, None] - _decay(c, cbase, plane, key + at + j, key + size - 1, j >= 0)[None, :]*gscale
            dx = tl.exp2(x - z[:, None])*(dot(g, tl.trans(vv), PREC) - dd[:, None])
            if GATE: dcq += tl.sum(dx, 1)
            dq = add_dot(dq, dx.to(kk.dtype), kk, PREC)
        _put(dxq, qbase + qrow*BD, i, d, (i < C) | (q0 >= 0), dq, BD, BD)
        e += 1
    if GATE: tl.store(dc + bhq*T + first + i, dcq, mask=live)

@triton.jit
def _key_grad_kernel(xq, xk, v, logits, c, tiles, rects, lse, do, delta, dv, dxk, dc, T, N, q_slots, k_slots, plane, scale, gscale,
                     HQ: tl.constexpr, H: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, C: tl.constexpr, BM: tl.constexpr,
                     GATE: tl.constexpr, PREC: tl.constexpr):
    "Gradients of two leaves of keys as one query head sees them: of the values, of their copy at every level, and (gate) of c as key"
    bhq = tl.program_id(1).to(tl.int64)
    b, hq = bhq // HQ, bhq % HQ
    h = hq // (HQ // H)
    tile = tiles + tl.program_id(0)*7
    first, end, n = tl.load(tile), tl.load(tile + 1), tl.load(tile + 2)
    q0, k0, e, stop = tl.load(tile + 3), tl.load(tile + 4), tl.load(tile + 5), tl.load(tile + 6)
    j, i, d = tl.arange(0, 2*C), tl.arange(0, BM), tl.arange(0, BD)                   # j keys, i queries
    live, upper = first + j < end, j >= C
    gbase, row = (b*T*HQ + hq)*D, bhq*T
    qbase, kbase = bhq*q_slots*C*BD, bhq*k_slots*C*BD                                 # of the gradients: one a query head
    xbase = (b*H + h)*k_slots*C*BD
    vv = _tile(v, (b*T*H + h)*D + first.to(tl.int64)*H*D, j, d, live, H*D, D)
    dvv, dck = tl.zeros((2*C, BD), tl.float32), tl.zeros((2*C,), tl.float32)
    home = j//C*C                                                                     # key j is column j%C of the logits of leaf n + j//C
    for at in range(0, C, BM):                                                        # own leaf
        t = first + home[:, None] + at + i[None, :]
        there = live[:, None] & (t < end)
        x = tl.load(logits + (bhq*N + n)*C*C + home[:, None]*C + (at + i)[None, :]*C + (j - home)[:, None], mask=there, other=0.)
        x = tl.exp2(x - tl.load(lse + row + t, mask=there, other=float('inf')))
        gg = _tile(do, gbase + (first + at).to(tl.int64)*HQ*D, i, d, first + at + i < end, HQ*D, D)
        dvv = add_dot(dvv, tl.where(upper[:, None], 0., x).to(gg.dtype), gg, PREC)
        gg = _tile(do, gbase + (first + C + at).to(tl.int64)*HQ*D, i, d, first + C + at + i < end, HQ*D, D)
        dvv = add_dot(dvv, tl.where(upper[:, None], x, 0.).to(gg.dtype), gg, PREC)
    if q0 >= 0:                                                                       # level 0
        kk = _tile(xk, xbase + k0.to(tl.int64)*BD, j, d, j < C, BD, BD)
        if GATE: kc = _decay(c, row, plane, first + j, first + C - 1, j < C)*gscale
        dk = tl.zeros((2*C, BD), tl.float32)
        for at in range(0, C, BM):
            t = first + C + at + i
            there = t < end
            qq = tl.load(_square(xq, qbase + (q0 + at).to(tl.int64)*BD, i, d, BD))
            gg = _tile(do, gbase + (first + C + at).to(tl.int64)*HQ*D, i, d, there, HQ*D, D)
            x = dot(kk, tl.trans(qq), PREC)*scale
            if GATE: x += _decay(c, row, plane, t, first + C - 1, there)[None, :]*gscale - kc[:, None]
            x = tl.where(upper[:, None], 0., tl.exp2(x - tl.load(lse + row + t, mask=there, other=float('inf'))[None, :]))
            dvv = add_dot(dvv, x.to(gg.dtype), gg, PREC)
            x *= dot(vv, tl.trans(gg), PREC) - tl.load(delta + row + t, mask=there, other=0.)[None, :]
            dck += tl.sum(x, 1)
            dk = add_dot(dk, x.to(qq.dtype), qq, PREC)
        _put(dxk, kbase + k0.to(tl.int64)*BD, j, d, j < C, dk, BD, BD)
    while e < stop:
        rect = rects + e*4
        krow, qrow, query, size = tl.load(rect).to(tl.int64), tl.load(rect + 1).to(tl.int64), tl.load(rect + 2).to(tl.int64), tl.load(rect + 3)
        kk = tl.load(_square(xk, xbase + krow*BD, j, d, BD))
        if GATE: kc = _decay(c, row, plane, first + j, query - 1, j >= 0)*gscale
        dk = tl.zeros((2*C, BD), tl.float32)
        for at in range(0, size, BM):
            there = at + i < size
            qq = tl.load(_square(xq, qbase + (qrow + at)*BD, i, d, BD))
            gg = _tile(do, gbase + (query + at)*HQ*D, i, d, there, HQ*D, D)
            x = dot(kk, tl.trans(qq), PREC)*scale
            if GATE: x += _decay(c, row, plane, query + at + i, query - 1, there)[None, :]*gscale - kc[:, None]
            x = tl.exp2(x - tl.load(lse + row + query + at + i, mask=there, other=float('inf'))[None, :])
            dvv = add_dot(dvv, x.to(gg.dtype), gg, PREC)
            x *= dot(vv, tl.trans(gg), PREC) - tl.load(delta + row + query + at + i, mask=there, other=0.)[None, :]
            if GATE: dck += tl.sum(x, 1)
            dk = add_dot(dk, x.to(qq.dtype), qq, PREC)
        _put(dxk, kbase + krow*BD, j, d, j >= 0, dk, BD, BD)
        e += 1
    _put(dv, gbase + first.to(tl.int64)*HQ*D, j, d, live, dvv, HQ*D, D)
    if GATE: tl.store(dc + row + first + j, dck, mask=live)

# ------------------------------------------------------------------------------------------------- the way back to leaves

@triton.jit
def _transport_grad_kernel(dx, p, ptr, steps, dtile, N, slots, nodes, scale, HQ: tl.constexpr, H: tl.constexpr, BD: tl.constexpr,
                           C: tl.constexpr, KEYS: tl.constexpr, PREC: tl.constexpr):
    """A leaf of one head down the tree: the gradient of a copy is its own plus that of the next one, carried back; `dx` becomes the sum.
    Keys have one gradient a query head: these are added up, in the place of the group's first."""
    n, bh = tl.program_id(0), tl.program_id(1).to(tl.int64)
    R: tl.constexpr = HQ // H if KEYS else 1
    G: tl.constexpr = 1 if KEYS else HQ // H                                     # query heads that share this head's P
    i, d = tl.arange(0, C), tl.arange(0, BD)
    begin, e = tl.load(ptr + n), tl.load(ptr + n + 1) - 1
    sum = tl.zeros((C, BD), tl.float32)
    while e >= begin:
        slot, node = tl.load(steps + e*2), tl.load(steps + e*2 + 1)
        if node >= 0:
            m = p + (bh // G*nodes + node)*BD*BD
            if KEYS: sum = dot(sum, tl.load(m + d[:, None]*BD + d[None, :]), PREC)
            else: sum = dot(sum, tl.load(m + d[None, :]*BD + d[:, None]), PREC)
        for r in range(R): sum += scale*tl.load(_square(dx, ((bh*R + r)*slots + slot)*C*BD, i, d, BD))
        tl.store(_square(dx, (bh*R*slots + slot)*C*BD, i, d, BD), sum)
        e -= 1
    tl.store(_square(dtile, (bh*N + n)*C*BD, i, d, BD), sum)

@triton.jit
def _node_grad_kernel(xq, xk, dxq, dxk, sources, dp, q_slots, k_slots, nodes, HQ: tl.constexpr, H: tl.constexpr, BD: tl.constexpr,
                      BN: tl.constexpr, C: tl.constexpr, PREC: tl.constexpr):
    "Gradient of P of a node from what went through it, BN columns: y = x P gives x'dy, y = x P' gives dy'x; summed leaf by leaf"
    node, col, bh = tl.program_id(0), tl.program_id(1)*BN + tl.arange(0, BN), tl.program_id(2).to(tl.int64)
    before, after = tl.load(sources + node*4).to(tl.int64), tl.load(sources + node*4 + 1).to(tl.int64)
    leaves, kind = tl.load(sources + node*4 + 2), tl.load(sources + node*4 + 3)
    i, d = tl.arange(0, C), tl.arange(0, BD)
    sum = tl.zeros((BD, BN), tl.float32)
    if kind == 0:
        for r in range(HQ // H):
            base = (bh*(HQ // H) + r)*q_slots*C*BD
            for at in range(0, leaves*C, C):
                x = tl.load(_square(xq, base + (before + at)*BD, i, d, BD)).to(tl.float32)
                sum = add_dot(sum, tl.trans(x), tl.load(_square(dxq, base + (after + at)*BD, i, col, BD)), PREC)
    else:
        base, first = bh*k_slots*C*BD, bh*(HQ // H)*k_slots*C*BD
        for at in range(0, leaves*C, C):
            dy = tl.load(_square(dxk, first + (after + at)*BD, i, d, BD))
            sum = add_dot(sum, tl.trans(dy), tl.load(_square(xk, base + (before + at)*BD, i, col, BD)).to(tl.float32), PREC)
    tl.store(_square(dp, (bh*nodes + node)*BD*BD, d, col, BD), sum)

@triton.jit
def _split_kernel(p, dp, joins, nodes, BD: tl.constexpr, BN: tl.constexpr, PREC: tl.constexpr):
    "Gradients of inner nodes to their children, BN rows or columns a program: dP_left += P_right' dP, dP_right += dP P_left'"
    j, col, bh = tl.program_id(0), tl.program_id(1)*BN + tl.arange(0, BN), tl.program_id(2).to(tl.int64)
    d, base = tl.arange(0, BD), bh*nodes*BD*BD
    parent, left, right = tl.load(joins + j*3), tl.load(joins + j*3 + 1), tl.load(joins + j*3 + 2)
    at = _square(dp, base + left*BD*BD, d, col, BD)
    r = tl.load(p + base + right*BD*BD + d[None, :]*BD + d[:, None])
    tl.store(at, tl.load(at) + dot(r, tl.load(_square(dp, base + parent*BD*BD, d, col, BD)), PREC))
    at = _square(dp, base + right*BD*BD, col, d, BD)
    l = tl.load(p + base + left*BD*BD + d[None, :]*BD + d[:, None])
    tl.store(at, tl.load(at) + dot(tl.load(_square(dp, base + parent*BD*BD, col, d, BD)), l, PREC))

@triton.jit
def _query_prepare_grad_kernel(q, k, w, u, y, leaf, dlogits, dqt, dq, du, dy, dk, dw, dc, T, N, scale,
                               HQ: tl.constexpr, H: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, C: tl.constexpr,
                               GATE: tl.constexpr, PREC: tl.constexpr):
    "A leaf of one query head: dq, and its parts of the gradients of U, Y, k and w (`_query_prepare_kernel` says what depends on what)"
    n, bhq = tl.program_id(0), tl.program_id(1).to(tl.int64)
    b, hq = bhq // HQ, bhq % HQ
    h = hq // (HQ // H)
    first, end = tl.load(leaf + n*3), tl.load(leaf + n*3 + 1)
    S: tl.constexpr = 32 if BD > 32 else BD                                      # columns at a time, to save registers
    i, e, m, mk = tl.arange(0, C), tl.arange(0, S), bhq*N + n, (b*H + h)*N + n
    live, at, atq = first + i < end, ((b*T + first)*H + h)*D, ((b*T + first)*HQ + hq)*D
    causal = i[:, None] >= i[None, :]
    da = tl.load(_square(dlogits, m*C*C, i, i, C))
    if GATE:                                                                     # c as a key of its own leaf, beside c as a query
        ptr = dc + bhq*T + first + i
        tl.store(ptr, tl.load(ptr, mask=live, other=0.) - tl.sum(da, 0), mask=live)
    da *= scale
    s, ds = tl.zeros((C, C), tl.float32), dot(da, tl.trans(tl.load(_square(u, mk*C*C, i, i, C))), PREC)
    for col in range(0, BD, S):
        x = _tile(q, atq, i, col + e, live, HQ*D, D).to(tl.float32)
        s += dot(x, tl.trans(_tile(w, at, i, col + e, live, H*D, D).to(tl.float32)), PREC)
        x = tl.load(_square(dqt, m*C*BD, i, col + e, BD))
        ds += dot(x, tl.trans(tl.load(_square(y, mk*C*BD, i, col + e, BD))), PREC)
    s, ds = tl.where(causal, s, 0.), tl.where(causal, -ds, 0.)
    tl.store(_square(du, m*C*C, i, i, C), -dot(tl.trans(s), da, PREC))
    for col in range(0, BD, S):
        dt = tl.load(_square(dqt, m*C*BD, i, col + e, BD))
        tl.store(_square(dy, m*C*BD, i, col + e, BD), -dot(tl.trans(s), dt, PREC))
        dt += dot(da, _tile(k, at, i, col + e, live, H*D, D).to(tl.float32), PREC)
        dt += dot(ds, _tile(w, at, i, col + e, live, H*D, D).to(tl.float32), PREC)
        _put(dq, atq, i, col + e, live, dt, HQ*D, D)
        x = _tile(q, atq, i, col + e, live, HQ*D, D).to(tl.float32)
        tl.store(_square(dk, m*C*BD, i, col + e, BD), dot(tl.trans(da), x, PREC))
        tl.store(_square(dw, m*C*BD, i, col + e, BD), dot(tl.trans(ds), x, PREC))

@triton.jit
def _node_leaf_grad_kernel(w, y, leaf, dy, dw, dp, T, N, nodes, HQ: tl.constexpr, H: tl.constexpr, D: tl.constexpr, BD: tl.constexpr,
                           C: tl.constexpr, PREC: tl.constexpr):
    "A leaf of one key head: the parts of its query heads added up in the place of the first, and what P = I - W'Y gives to Y and w"
    n, bh = tl.program_id(0), tl.program_id(1).to(tl.int64)
    b, h, R = bh // H, bh % H, HQ // H
    first, end, node = tl.load(leaf + n*3), tl.load(leaf + n*3 + 1), tl.load(leaf + n*3 + 2)
    i, d, m = tl.arange(0, C), tl.arange(0, BD), ((b*HQ + h*R)*N + n)*C*BD
    at = _square(dy, m, i, d, BD)
    sum = tl.load(at)
    for r in range(1, R): sum += tl.load(at + r*N*C*BD)
    if node >= 0:
        wt = _tile(w, ((b*T + first)*H + h)*D, i, d, first + i < end, H*D, D).to(tl.float32)
        sum -= dot(wt, tl.load(_square(dp, (bh*nodes + node)*BD*BD, d, d, BD)), PREC)
    tl.store(at, sum)
    at = _square(dw, m, i, d, BD)
    sum = tl.load(at)
    for r in range(1, R): sum += tl.load(at + r*N*C*BD)
    if node >= 0:
        pp = tl.load(dp + (bh*nodes + node)*BD*BD + d[None, :]*BD + d[:, None])
        sum -= dot(tl.load(_square(y, (bh*N + n)*C*BD, i, d, BD)), pp, PREC)
    tl.store(at, sum)

@triton.jit
def _inverse_grad_kernel(k, w, beta, leaf, inv, du, dy, dkt, sym, dbeta, T, N, HQ: tl.constexpr, H: tl.constexpr, D: tl.constexpr,
                         BD: tl.constexpr, C: tl.constexpr, PREC: tl.constexpr):
    """A leaf of one key head: through U = T S, S = stril(W K'), and Y = T W to beta and the Gram matrix. The gradient of S goes to the
    place of the first query head's `du`, that of the Gram matrix, made symmetric, to `sym`."""
    n, bh = tl.program_id(0), tl.program_id(1).to(tl.int64)
    b, h, R = bh // H, bh % H, HQ // H
    first, end = tl.load(leaf + n*3), tl.load(leaf + n*3 + 1)
    S: tl.constexpr = 32 if BD > 32 else BD                                      # columns at a time, to save registers
    i, e, m, mk = tl.arange(0, C), tl.arange(0, S), (b*HQ + h*R)*N + n, bh*N + n
    live, at = first + i < end, ((b*T + first)*H + h)*D
    below = i[:, None] > i[None, :]
    uu = tl.load(_square(du, m*C*C, i, i, C))
    for r in range(1, R): uu += tl.load(_square(du, (m + r*N)*C*C, i, i, C))
    s, dt = tl.zeros((C, C), tl.float32), tl.zeros((C, C), tl.float32)
    for col in range(0, BD, S):
        x = _tile(w, at, i, col + e, live, H*D, D).to(tl.float32)
        s += dot(x, tl.trans(_tile(k, at, i, col + e, live, H*D, D).to(tl.float32)), PREC)
        uu -= dot(x, tl.trans(tl.load(_square(dkt, mk*C*BD, i, col + e, BD))), PREC)
        dt += dot(tl.load(_square(dy, m*C*BD, i, col + e, BD)), tl.trans(x), PREC)
    dt += dot(uu, tl.trans(tl.where(below, s, 0.)), PREC)
    bt = tl.load(beta + (b*T + first + i)*H + h, mask=live, other=0.).to(tl.float32)
    inverse = tl.load(_square(inv, mk*C*C, i, i, C))
    t = tl.trans(inverse*bt[None, :])
    tl.store(_square(du, m*C*C, i, i, C), tl.where(below, dot(t, uu, PREC), 0.))
    # T = X diag(beta), X = (I + M)^-1, M = stril(diag(beta) W W'): dX = dT diag(beta), dM = -stril(X' dX X') = -stril(X' dT T')
    db = tl.sum(inverse*dt, 0)
    dm = tl.where(below, -dot(dot(tl.trans(inverse), dt, PREC), t, PREC), 0.)
    gram = tl.zeros((C, C), tl.float32)
    for col in range(0, BD, S):
        x = _tile(w, at, i, col + e, live, H*D, D).to(tl.float32)
        gram += dot(x, tl.trans(x), PREC)
    tl.store(dbeta + (b*T + first + i)*H + h, db + tl.sum(dm*gram, 1), mask=live)
    dm *= bt[:, None]
    tl.store(_square(sym, m*C*C, i, i, C), dm + tl.trans(dm))

@triton.jit
def _key_prepare_grad_kernel(k, w, beta, leaf, inv, u, ds, sym, dy, dk_part, dw_part, dkt, dk, dw, T, N, HQ: tl.constexpr, H: tl.constexpr,
                             D: tl.constexpr, BD: tl.constexpr, BN: tl.constexpr, C: tl.constexpr, PREC: tl.constexpr):
    "BN columns of a leaf of one key head: dk and dw from K~ = K - U'W, S = stril(W K'), Y = T W and the Gram matrix"
    n, col, bh = tl.program_id(0), tl.program_id(1)*BN + tl.arange(0, BN), tl.program_id(2).to(tl.int64)
    b, h, R = bh // H, bh % H, HQ // H
    first, end = tl.load(leaf + n*3), tl.load(leaf + n*3 + 1)
    i, m, mk = tl.arange(0, C), (b*HQ + h*R)*N + n, bh*N + n
    live, at = first + i < end, ((b*T + first)*H + h)*D
    wt, kk = _tile(w, at, i, col, live, H*D, D).to(tl.float32), _tile(k, at, i, col, live, H*D, D).to(tl.float32)
    dss, dkk = tl.load(_square(ds, m*C*C, i, i, C)), tl.load(_square(dkt, mk*C*BD, i, col, BD))
    dww = tl.load(_square(dw_part, m*C*BD, i, col, BD)) - dot(tl.load(_square(u, mk*C*C, i, i, C)), dkk, PREC)
    dww += dot(tl.load(_square(sym, m*C*C, i, i, C)), wt, PREC) + dot(dss, kk, PREC)
    bt = tl.load(beta + (b*T + first + i)*H + h, mask=live, other=0.).to(tl.float32)
    t = tl.load(_square(inv, mk*C*C, i, i, C))*bt[None, :]
    dww += dot(tl.trans(t), tl.load(_square(dy, m*C*BD, i, col, BD)), PREC)
    _put(dw, at, i, col, live, dww, H*D, D)
    dkk += dot(tl.trans(dss), wt, PREC)
    for r in range(R): dkk += tl.load(_square(dk_part, (m + r*N)*C*BD, i, col, BD))
    _put(dk, at, i, col, live, dkk, H*D, D)

# ------------------------------------------------------------------------------------------------------------- launching

class Config(NamedTuple):
    "Block sizes and pipelining"
    forward: tuple[int, int, int]  # keys a step, warps, stages
    queries: tuple[int, int, int]  # the same, gradient of queries
    keys: tuple[int, int, int]     # queries a step, warps, stages
    warps: int                     # of the kernels over leaves and nodes
    prec: str                      # how fp32 operands are multiplied

def config(dtype: torch.dtype, # of q, k, v
           BD: int, # head dim, rounded up to a power of two
           sm: int = 90, # compute capability times ten
           gate: bool = False, # a gate needs registers
          ) -> Config: # what fits registers and shared memory
    "Chosen by compiling ahead of time for sm_80, 90 and 100, so that nothing spills in the forward pass of 16-bit data."
    if dtype == torch.float32: return Config((32, 8, 1), (32, 8, 1), (32, 8, 1), 8, 'tf32x3')
    if BD <= 64: return Config((64, 4 if sm == 90 else 8, 3), (64, 8, 2), (64, 8, 2), 4 if sm >= 90 else 8, 'tf32')
    return Config((32 if sm < 90 or sm >= 100 and gate else 64, 8, 3 if sm < 90 and gate else 2), (32, 8, 2), (32, 8, 2), 8, 'tf32')

def leaf_length(dtype: torch.dtype) -> int:
    "Tokens a leaf: a tile of two leaves has to fit shared memory, and fp32 is twice as wide"
    return CHUNK//2 if dtype == torch.float32 else CHUNK

def _query_warps(cfg: Config, sm: int) -> int: return 4 if sm >= 100 else cfg.warps # of `_query_prepare_kernel`: eight would spill there

def _inverse_stages(sm: int) -> int: return 2 if sm < 90 else 1 # of `_inverse_grad_kernel`: one would spill three times as much there

def _capability(x: torch.Tensor) -> int:
    "80, 90, 100, ...; the interpreter does as sm_90"
    return 10*torch.cuda.get_device_capability(x.device)[0] if x.is_cuda else 90

class _Pass:
    "What forward and backward share: sizes, tables and the launches from leaves to level copies"
    def __init__(self, q, k, gate, scale, scale_gate, lengths, chunk):
        self.B, self.T, self.HQ, self.D = q.shape
        self.H, self.C, self.BD = k.shape[2], chunk, max(16, triton.next_power_of_2(q.shape[-1]))
        self.s, self.cfg = schedule(lengths, chunk, q.device), config(q.dtype, self.BD, _capability(q), gate is not None)
        self.scale, self.coef = scale, scale if scale_gate else 1.
        self.plane, self.gate = self.B*self.HQ*self.T, gate is not None
        self.sizes = dict(HQ=self.HQ, H=self.H, BD=self.BD, C=chunk)
        self.node = dict(BD=self.BD, BN=min(64, self.BD), PREC=self.cfg.prec, num_warps=self.cfg.warps)
        self.leaf = dict(PREC=self.cfg.prec, num_warps=self.cfg.warps, num_stages=1)
        self.q, self.k = q, k

    def new(self, *shape, dtype=torch.float32): return torch.empty(shape, dtype=dtype, device=self.q.device)
    def tiles(self, H, n, dtype=torch.float32): return self.new(self.B, H, n, self.C, self.BD, dtype=dtype)

    def climb(self, w, beta, c, keep=False):
        "Leaves, nodes and level copies: logits, copies of queries and keys, P of all nodes, and the leaves' U, Y and (keep) inverses"
        s, B, H, HQ, C, N = self.s, self.B, self.H, self.HQ, self.C, self.s.leaves
        u, y, kt, qt = self.new(B, H, N, C, C), self.tiles(H, N), self.tiles(H, N), self.tiles(HQ, N)
        p, logits = self.new(B, H, max(s.nodes, 1), self.BD, self.BD), self.new(B, HQ, N, C, C)
        inv = self.new(B, H, N, C, C) if keep else u
        one = dict(D=self.D, BD=self.BD, C=C, H=H, **self.leaf)
        _prepare_kernel[N, B*H](self.k, w, beta, s.leaf, inv, u, y, kt, self.T, N, SAVE=keep, **one)
        wide = self.BD//self.node['BN']
        if s.nodes: _leaf_node_kernel[N, wide, B*H](w, y, s.leaf, p, self.T, N, s.nodes, BN=self.node['BN'], **one)
        _query_prepare_kernel[N, B*HQ](self.q, self.k, w, u, y, c, s.leaf, logits, qt, self.T, N, self.plane, self.scale*LOG2E, self.coef*LOG2E,
                                       HQ=HQ, GATE=self.gate, **one | dict(num_warps=_query_warps(self.cfg, _capability(w))))
        for j in s.joins: _compose_kernel[len(j), wide, B*H](p, j, s.nodes, num_stages=1, **self.node)
        xq, xk = self.tiles(HQ, max(s.q_slots, 1), self.q.dtype), self.tiles(H, max(s.k_slots, 1), self.q.dtype)
        one = dict(BD=self.BD, C=C, **self.leaf)
        _transport_kernel[N, B*HQ](qt, p, s.q_ptr, s.q_steps, xq, N, s.q_slots, s.nodes, R=HQ//H, KEYS=False, **one)
        _transport_kernel[N, B*H](kt, p, s.k_ptr, s.k_steps, xk, N, s.k_slots, s.nodes, R=1, KEYS=True, **one)
        return logits, xq, xk, p, u, y, inv

    def rects(self, block, name, gate_c):
        "Arguments that the three kernels over rectangles share"
        n, warps, stages = block
        return ((self.T, self.s.leaves, self.s.q_slots, self.s.k_slots, self.plane, self.scale*LOG2E, self.coef*LOG2E),
                dict(D=self.D, GATE=self.gate, PREC=self.cfg.prec, num_warps=warps, num_stages=stages, **{name: n}, **self.sizes))

class _PathAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, w, beta, gate, scale, scale_gate, lengths, chunk):
        run, c = _Pass(q, k, gate, scale, scale_gate, lengths, chunk), _running(gate, q)
        logits, xq, xk, *_ = run.climb(w, beta, c)
        o, lse, s = torch.empty_like(q), run.new(run.B, run.HQ, run.T), run.s
        n, warps, stages = run.cfg.forward
        args, kw = run.rects((min(n, chunk), warps, stages), 'BN', c)
        _forward_kernel[len(s.q_tiles), run.B*run.HQ](xq, xk, v, logits, c, s.q_tiles, s.q_rects, o, lse, *args, **kw)
        ctx.save_for_backward(q, k, v, w, beta, gate, o, lse)
        ctx.how = scale, scale_gate, lengths, chunk
        return o

    @staticmethod
    @once_differentiable
    def backward(ctx, do):
        q, k, v, w, beta, gate, o, lse = ctx.saved_tensors
        run, c, do = _Pass(q, k, gate, *ctx.how), _running(gate, q), do.contiguous()
        s, cfg, C, B, T, H, HQ = run.s, run.cfg, run.C, run.B, run.T, run.H, run.HQ
        logits, xq, xk, p, u, y, inv = run.climb(w, beta, c, keep=True)
        # rectangles
        delta, dc, dck = (run.new(B, HQ, T) for _ in range(3))
        dlogits, dxq, dxk = torch.empty_like(logits), run.tiles(HQ, max(s.q_slots, 1)), run.tiles(HQ, max(s.k_slots, 1))
        dv = run.new(B, T, HQ, run.D, dtype=v.dtype if H == HQ else torch.float32)
        n, warps, stages = cfg.queries
        args, kw = run.rects((min(n, C), warps, stages), 'BN', c)
        _query_grad_kernel[len(s.q_tiles), B*HQ](xq, xk, v, logits, c, s.q_tiles, s.q_rects, o, lse, do, delta, dlogits, dxq, dc, *args, **kw)
        n, warps, stages = cfg.keys
        args, kw = run.rects((min(n, C), warps, stages), 'BM', c)
        _key_grad_kernel[len(s.k_tiles), B*HQ](xq, xk, v, logits, c, s.k_tiles, s.k_rects, lse, do, delta, dv, dxk, dck, *args, **kw)
        del logits
        # copies back to leaves, nodes to leaves
        dqt, dkt, back = run.tiles(HQ, s.leaves), run.tiles(H, s.leaves), dict(HQ=HQ, H=H, BD=run.BD, C=C, **run.leaf)
        _transport_grad_kernel[s.leaves, B*HQ](dxq, p, s.q_ptr, s.q_steps, dqt, s.leaves, s.q_slots, s.nodes, run.scale, KEYS=False, **back)
        _transport_grad_kernel[s.leaves, B*H](dxk, p, s.k_ptr, s.k_steps, dkt, s.leaves, s.k_slots, s.nodes, run.scale, KEYS=True, **back)
        dp, wide = torch.empty_like(p), run.BD//run.node['BN']
        if s.nodes: _node_grad_kernel[s.nodes, wide, B*H](xq, xk, dxq, dxk, s.sources, dp, s.q_slots, s.k_slots, s.nodes, HQ=HQ, H=H, C=C,
                                                          num_stages=1, **run.node)
        for j in reversed(s.joins): _split_kernel[len(j), wide, B*H](p, dp, j, s.nodes, num_stages=1, **run.node)
        del xq, xk, dxq, dxk
        # leaves
        dq, dk, dw = torch.empty_like(q), torch.empty_like(k), torch.empty_like(w)
        dbeta = torch.empty_like(beta)
        du, dy, dk_part, dw_part = torch.empty_like(dlogits), *(run.tiles(HQ, s.leaves) for _ in range(3))
        back['D'] = run.D
        _query_prepare_grad_kernel[s.leaves, B*HQ](q, k, w, u, y, s.leaf, dlogits, dqt, dq, du, dy, dk_part, dw_part, dc, T, s.leaves,
                                                   run.scale, GATE=run.gate, **back)
        _node_leaf_grad_kernel[s.leaves, B*H](w, y, s.leaf, dy, dw_part, dp, T, s.leaves, s.nodes, **back)
        _inverse_grad_kernel[s.leaves, B*H](k, w, beta, s.leaf, inv, du, dy, dkt, dlogits, dbeta, T, s.leaves, **back | dict(num_warps=8, num_stages=_inverse_stages(_capability(w))))
        BN = min(32, run.BD)
        _key_prepare_grad_kernel[s.leaves, run.BD//BN, B*H](k, w, beta, s.leaf, inv, u, du, dlogits, dy, dk_part, dw_part, dkt, dk, dw, T,
                                                            s.leaves, BN=BN, **back)
        if H != HQ: dv = dv.view(B, T, H, HQ//H, run.D).sum(3).to(v.dtype)
        dgate = _running_grad(dc - dck, run.coef, ctx.how[2]).to(gate.dtype) if run.gate else None
        return dq, dk, dv, dw, dbeta, dgate, None, None, None, None

def _running(gate, q):
    "The running sum of log f as (2, B, HQ, T): what fp32 holds and what it leaves over; any tensor where there is no gate"
    if gate is None: return q
    c = prefix_sum(gate.double().transpose(1, 2))
    hi = c.float()
    return torch.stack([hi, (c - hi.double()).float()])

def _running_grad(dc, coef, lengths):
    "From gradients of c (B, HQ, T) to those of log f (B, T, HQ): sums over the rest of every sequence"
    rest = prefix_sum(coef*dc.double().flip(-1)).flip(-1)
    rest = torch.cat([rest, rest.new_zeros(*rest.shape[:2], 1)], -1)
    ends = np.repeat(np.cumsum(lengths), lengths)
    return (rest[..., :-1] - rest[..., torch.as_tensor(ends, device=dc.device)]).transpose(1, 2)

def why_not(q: torch.Tensor, # (B, T, HQ, D)
            k: torch.Tensor, # (B, T, H, D)
            v: torch.Tensor, # (B, T, H, D)
            w: torch.Tensor, # (B, T, H, D)
            beta: torch.Tensor, # (B, T, H)
            gate: torch.Tensor | None = None, # (B, T, HQ)
           ) -> str: # the reason, or "" where the kernels do it
    "Why the kernels do not take these tensors; shapes that no backend takes are the business of `path_attention`"
    given = [x for x in (q, k, v, w, beta, gate) if x is not None]
    if reason := why_not_here(_forward_kernel, q): return reason
    if len({x.device for x in given}) > 1: return f"all tensors must be on one device, got {sorted({str(x.device) for x in given})}"
    if not q.dtype == k.dtype == v.dtype: return f"q, k and v must have one dtype, got {q.dtype}, {k.dtype}, {v.dtype}"
    if any(x.dtype not in DTYPES for x in given): return f"float16, bfloat16 or float32 wanted, got {[x.dtype for x in given]}"
    if q.shape[-1] > 128: return f"the head dim must be at most 128, got {q.shape[-1]}"
    if v.shape[-1] != q.shape[-1]: return f"values must be as wide as keys, got {v.shape[-1]} and {q.shape[-1]}"
    if q.shape[0]*q.shape[2] > 65535: return f"at most 65535 rows times heads, got {q.shape[0]*q.shape[2]}"
    return ""

def supports(q: torch.Tensor, # (B, T, HQ, D)
             k: torch.Tensor, # (B, T, H, D)
             v: torch.Tensor, # (B, T, H, D)
             w: torch.Tensor, # (B, T, H, D)
             beta: torch.Tensor, # (B, T, H)
             gate: torch.Tensor | None = None, # (B, T, HQ)
            ) -> bool: # what is refused is for the torch backend
    "Whether the kernels take these tensors; `why_not` says why they do not"
    return not why_not(q, k, v, w, beta, gate)

def path_attention(q: torch.Tensor, # (B, T, HQ, D) queries; fp16, bf16 or fp32 as k and v
                   k: torch.Tensor, # (B, T, H, D) keys, HQ a multiple of H
                   v: torch.Tensor, # (B, T, H, D) values
                   w: torch.Tensor, # (B, T, H, D) unit directions, best in fp32
                   beta: torch.Tensor, # (B, T, H) strengths in (0, 2), best in fp32
                   *,
                   gate: torch.Tensor | None = None, # (B, T, HQ) log forget gates
                   scale: float | None = None, # of the logits; None is D**-0.5
                   scale_gate: bool = False, # multiply the gate's sums by `scale` too
                   cu_seqlens: torch.Tensor | None = None, # (N+1,) where packed sequences begin and end; needs B = 1
                   chunk: int | None = None, # tokens a leaf, 16, 32 or 64; None is 64, or 32 in fp32
                  ) -> torch.Tensor: # (B, T, HQ, D), dtype of q
    """PaTH attention by the Triton kernels (arXiv 2505.16381, Section 3). Gradients are bitwise reproducible. Raises `ValueError` if
    shapes do not fit, or if the kernels do not take the tensors (see `supports`)."""
    n = check_shapes(q=(q, "B T HQ D"), k=(k, "B T H D"), v=(v, "B T H D"), w=(w, "B T H D"), beta=(beta, "B T H"), gate=(gate, "B T HQ"))
    if n["HQ"] % n["H"]: raise ValueError(f"the query heads must be a multiple of the key heads, got HQ = {n['HQ']}, H = {n['H']}")
    chunk = leaf_length(q.dtype) if chunk is None else chunk
    if chunk not in (16, 32, 64): raise ValueError(f"chunk must be 16, 32 or 64, got {chunk}")
    if why := why_not(q, k, v, w, beta, gate): raise ValueError(why)
    if cu_seqlens is not None and n["B"] != 1: raise ValueError(f"cu_seqlens needs B = 1, got B = {n['B']}")
    lengths = (n["T"],) if cu_seqlens is None else tuple(s.stop - s.start for s in sequences(cu_seqlens, n["T"]))
    if not q.numel(): return torch.zeros_like(q)
    q, k, v, w, beta = (x.contiguous() for x in (q, k, v, w, beta))
    scale = n["D"]**-0.5 if scale is None else float(scale)
    with torch.cuda.device_of(q): return _PathAttention.apply(q, k, v, w, beta, gate, scale, scale_gate, lengths, chunk)

# --------------------------------------------------------------------------------------------------------------- decoding

@triton.jit
def _look_up(acc, m, l, q0, q1, keys, values, at, stop, key0, kbase, vbase, seen, c, now, cbase, i, j, d, e, mine,
             K: tl.constexpr, V: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, HQ: tl.constexpr, GATE: tl.constexpr, BN: tl.constexpr):
    "Queries of one key head (q0 + q1, the high and low half of fp32) against slots at..stop, whose keys lie key0 further on"
    while at < stop:
        n = at + i
        live = n < stop
        there = live & (tl.load(seen + n, mask=live, other=0) != 0)
        kk = _tile(keys, kbase, n + key0, d, there, K, D)
        vv = _tile(values, vbase, n, e, there, V, DV)
        s = dot(q0, tl.trans(kk).to(q0.dtype), 'tf32x3')
        if q0.dtype != tl.float32: s += dot(q1, tl.trans(kk).to(q0.dtype), 'tf32x3')
        if GATE: s += (now[:, None] - tl.load(c + cbase + n[None, :]*HQ + j[:, None], mask=there[None, :] & mine[:, None], other=0.)).to(tl.float32)
        acc, m, l = _online(acc, m, l, tl.where(there[None, :], s*1.4426950408889634, float('-inf')), vv, 'tf32x3')
        at += BN
    return acc, m, l

@triton.jit
def _decode_kernel(q, keys, recent, values, seen, c, total, bounds, part, high, low, B, S, W, P, slots, splits,
                   H: tl.constexpr, R: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, BD: tl.constexpr, BV: tl.constexpr,
                   BR: tl.constexpr, BN: tl.constexpr, GATE: tl.constexpr):
    "The query heads of one key head against one of the parts that the slots are split into; the last part is the window"
    k, b, h = tl.program_id(0), tl.program_id(1).to(tl.int64), tl.program_id(2)
    j, i, d, e = tl.arange(0, BR), tl.arange(0, BN).to(tl.int64), tl.arange(0, BD), tl.arange(0, BV)
    mine, head = j < R, (b*H + h)*R
    m, l = tl.full((BR,), -1e30, tl.float32), tl.zeros((BR,), tl.float32)         # finite: a part may hold nothing that counts
    acc, now = tl.zeros((BR, BV), tl.float32), 0.
    if GATE: now = tl.load(total + head + j, mask=mine, other=0.)
    vbase, cbase, seen = (b*S*H + h)*DV, b*S*H*R + h*R, seen + b*S
    flushed = tl.load(bounds + P)
    if k < splits - 1:
        size = tl.cdiv(tl.cdiv(flushed, splits - 1), BN)*BN
        for p in range(P):                                                        # a segment has queries of its own
            at, stop = tl.maximum(tl.load(bounds + p), k*size), tl.minimum(tl.load(bounds + p + 1), k*size + size)
            if at < stop:
                qq = _tile(q, (p*B*H*R + head)*D, j, d, mine, D, D)
                q0 = qq.to(keys.dtype.element_ty)
                q1 = (qq - q0.to(tl.float32)).to(q0.dtype)
                acc, m, l = _look_up(acc, m, l, q0, q1, keys, values, at, stop, 0, (b*S*H + h)*D, vbase, seen, c, now, cbase, i, j, d, e, mine,
                                     H*D, H*DV, D, DV, H*R, GATE, BN)
    elif W > 0:
        qq = _tile(q, (P*B*H*R + head)*D, j, d, mine, D, D)
        acc, m, l = _look_up(acc, m, l, qq, qq, recent, values, flushed, slots, -flushed, (b*W*H + h)*D, vbase, seen, c, now, cbase, i, j, d, e, mine,
                             H*D, H*DV, D, DV, H*R, GATE, BN)
    at = (head + j)*splits + k
    tl.store(part + at[:, None]*BV + e[None, :], acc, mask=mine[:, None])
    tl.store(high + at, m, mask=mine)
    tl.store(low + at, l, mask=mine)

@triton.jit
def _merge_kernel(part, high, low, o, splits, DV: tl.constexpr, BV: tl.constexpr, BS: tl.constexpr):
    "One softmax from its parts; a part without keys has weight 0"
    hq, k, e = tl.program_id(0).to(tl.int64), tl.arange(0, BS), tl.arange(0, BV)
    there = k < splits
    m = tl.load(high + hq*splits + k, mask=there, other=-1e30)
    weight = tl.exp2(m - tl.max(m, 0))
    l = tl.sum(weight*tl.load(low + hq*splits + k, mask=there, other=0.), 0)
    acc = tl.load(part + (hq*splits + k)[:, None]*BV + e[None, :], mask=there[:, None], other=0.)
    tl.store(o + hq*DV + e, tl.sum(weight[:, None]*acc, 0)/l, mask=e < DV)

def _decode_step(BD: int, BV: int) -> int: return 64 if max(BD, BV) <= 64 else 32 # slots at a time; more would spill

def _decode_warps(sm: int, gate: bool) -> int: return 8 if sm < 90 and gate else 4 # four would spill there

@lru_cache(maxsize=64)
def _on_device(numbers: tuple[int, ...], device: torch.device) -> torch.Tensor: return torch.tensor(numbers, dtype=torch.int32, device=device)

def why_not_decode(keys: torch.Tensor, # (B, S, H, D)
                   values: torch.Tensor, # (B, S, H, V)
                  ) -> str: # the reason, or "" where the kernel does it
    "Why the kernel does not decode from a cache of these tensors"
    if reason := why_not_here(_decode_kernel, keys): return reason
    if keys.dtype != values.dtype or keys.dtype not in DTYPES: return f"keys and values must be of one type, float16, bfloat16 or float32, got {keys.dtype} and {values.dtype}"
    if max(keys.shape[-1], values.shape[-1]) > 128: return f"head dims of at most 128, got {keys.shape[-1]} and {values.shape[-1]}"
    return ""

def supports_decode(keys: torch.Tensor, # (B, S, H, D)
                    values: torch.Tensor, # (B, S, H, V)
                   ) -> bool: # what is refused is for plain matrix products
    "Whether the kernel decodes from a cache of these tensors; `why_not_decode` says why it does not"
    return not why_not_decode(keys, values)

def path_attention_decode(queries: torch.Tensor, # (P, B, H, R, D) fp32, scaled, R query heads a key head: carried back to each of P parts, oldest first
                          keys: torch.Tensor, # (B, S, H, D) slots, each carried on to the end of its part
                          values: torch.Tensor, # (B, S, H, V)
                          bounds: list[int], # P + 1 slots where parts begin and end, the last being the number of slots in use
                          *,
                          recent: torch.Tensor | None = None, # (B, W, H, D) fp32: keys of the last part, if they are not in `keys`
                          valid: torch.Tensor | None = None, # (B, S) which slots count; None is all
                          c: torch.Tensor | None = None, # (B, S, H R) running sum of the gate at each key, float64
                          total: torch.Tensor | None = None, # (B, H R) running sum now, float64
                          splits: int | None = None, # programs that share a head's slots; None fills the GPU
                         ) -> torch.Tensor: # (B, H, R, V) fp32
    """Attention of one token: transforms still pending act on its queries, and the cache is read once, in its own dtype. What
    `rlcr_suite.path_attention.PathCache` holds fits as it is. Raises `ValueError` if shapes do not, and for what `why_not_decode` names."""
    if reason := why_not_decode(keys, values): raise ValueError(reason)
    if (c is None) != (total is None): raise ValueError("c and total are given together, or neither")
    n = check_shapes(queries=(queries, "P B H R D"), keys=(keys, "B S H D"), values=(values, "B S H V"), recent=(recent, "B W H D"),
                     valid=(valid, "B S"), c=(c, "B S HQ"), total=(total, "B HQ"))
    P, B, H, R, D, S, V = (n[x] for x in "PBHRDSV")
    HQ, W, slots = H*R, n.get("W", 0), bounds[-1]
    if c is not None and n["HQ"] != HQ: raise ValueError(f"c has {n['HQ']} heads, but queries have {H} x {R}")
    if len(bounds) != P + 1 or bounds[0] or any(a > b for a, b in zip(bounds, bounds[1:])) or not 0 < slots <= S:
        raise ValueError(f"bounds must rise from 0 to at most {S} in {P + 1} numbers, got {list(bounds)}")
    if recent is not None and slots - bounds[-2] > W: raise ValueError(f"the last part has {slots - bounds[-2]} tokens, but recent has room for {W}")
    queries, keys, values = queries.float().contiguous(), keys.contiguous(), values.contiguous()
    valid = torch.ones(1, dtype=torch.uint8, device=keys.device).expand(B, S).contiguous() if valid is None else valid.contiguous().view(torch.uint8)
    bounds, P = tuple(bounds) if recent is None else tuple(bounds[:-1]), P - (recent is not None)
    if splits is None:
        cores = torch.cuda.get_device_properties(keys.device).multi_processor_count if keys.is_cuda else 4
        splits = max(1, min(triton.cdiv(slots, 128), triton.cdiv(2*cores, B*H), 127))
    BD, BV = (max(16, triton.next_power_of_2(x)) for x in (D, V))
    new = lambda *shape: torch.empty(shape, dtype=torch.float32, device=keys.device)
    part, high, low, o = new(B, HQ, splits + 1, BV), new(B, HQ, splits + 1), new(B, HQ, splits + 1), new(B, H, R, V)
    recent = keys if recent is None else recent.float().contiguous()
    if c is not None: c, total = c.contiguous(), total.contiguous()
    with torch.cuda.device_of(keys):
        _decode_kernel[splits + 1, B, H](queries, keys, recent, values, valid, c, total, _on_device(bounds, keys.device), part, high, low,
                                         B, S, W, P, slots, splits + 1, H=H, R=R, D=D, DV=V, BD=BD, BV=BV, BR=max(16, triton.next_power_of_2(R)),
                                         BN=_decode_step(BD, BV), GATE=c is not None, num_warps=_decode_warps(_capability(keys), c is not None), num_stages=2)
        _merge_kernel[B*HQ,](part, high, low, o, splits + 1, DV=V, BV=BV, BS=triton.next_power_of_2(splits + 1), num_warps=4)
    return o

# ------------------------------------------------------------------------------------------------ ahead-of-time compilation

def aot_cases(dtypes: tuple[str, ...] = ('bf16',), # of q, k, v: 'bf16', 'fp16', 'fp32'
              dims: tuple[int, ...] = (64, 128), # head dims
              gates: tuple[bool, ...] = (False, True), # without and with a gate
              sms: tuple[int, ...] = (80, 90, 100), # compute capabilities times ten
             ) -> list: # of `aot.Case`: every kernel as it is launched there, with 32 query and 8 key heads
    "What `rlcr_suite.kernels.aot` compiles"
    from .aot import Case
    kernels = (_prepare_kernel, _leaf_node_kernel, _query_prepare_kernel, _compose_kernel, _transport_kernel, _forward_kernel,
               _query_grad_kernel, _key_grad_kernel, _transport_grad_kernel, _node_grad_kernel, _split_kernel, _query_prepare_grad_kernel,
               _node_leaf_grad_kernel, _inverse_grad_kernel, _key_prepare_grad_kernel, _decode_kernel, _merge_kernel)
    plain = dict.fromkeys(('leaf', 'joins', 'ptr', 'steps', 'tiles', 'rects', 'sources', 'bounds'), '*i32') | dict(seen='*u8')
    plain |= dict.fromkeys(('scale', 'gscale'), 'fp32')
    plain |= dict.fromkeys(('T', 'N', 'S', 'B', 'W', 'P', 'nodes', 'slots', 'q_slots', 'k_slots', 'plane', 'splits'), 'i32')
    found = []
    for dtype in dtypes:
        data = dict.fromkeys(('q', 'k', 'v', 'o', 'do', 'dq', 'xq', 'xk', 'keys', 'values'), f'*{dtype}')
        own = {'transport': dict(out=f'*{dtype}'), 'key_prepare_grad': dict(dk=f'*{dtype}'),
               'decode': dict(q='*fp32', c='*fp64', total='*fp64'), 'merge': dict(o='*fp32')}
        kind = dict(bf16=torch.bfloat16, fp16=torch.float16, fp32=torch.float32)[dtype]
        for sm, D, gate in product(sms, dims, gates):
            BD = max(16, triton.next_power_of_2(D))
            cfg = config(kind, BD, sm, gate)
            const = dict(HQ=32, H=8, R=4, D=D, BD=BD, DV=D, BV=BD, C=leaf_length(kind), BR=16, BS=64, SAVE=True, KEYS=True, GATE=gate, PREC=cfg.prec)
            how = {'forward': (cfg.forward, 'BN'), 'query_grad': (cfg.queries, 'BN'), 'key_grad': (cfg.keys, 'BM'), 'merge': ((64, 4, 3), 'BN'),
                   'decode': ((_decode_step(BD, BD), _decode_warps(sm, gate), 2), 'BN'), 'inverse_grad': ((64, 8, _inverse_stages(sm)), 'BN'), 'key_prepare_grad': ((min(32, BD), cfg.warps, 1), 'BN'),
                   'query_prepare': ((64, _query_warps(cfg, sm), 1), 'BN')}
            for kernel in kernels:
                name = kernel.__name__.strip('_').removesuffix('_kernel')
                if gate != gates[0] and 'GATE' not in kernel.arg_names: continue # compiled already
                (block, warps, stages), letter = how.get(name, ((min(64, BD), cfg.warps, 1), 'BN'))
                values = {a: x for a, x in (const | {letter: block}).items() if a in kernel.arg_names}
                types = {a: (plain | data | own.get(name, {})).get(a, '*fp32') for a in kernel.arg_names if a not in values}
                found.append(Case(f"{name} {dtype} d{D}" + ' gate'*gate, kernel, types, values, warps, stages, capabilities=(sm,)))
    return found
