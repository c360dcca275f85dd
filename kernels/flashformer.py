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
from typing import NamedTuple
from dataclasses import dataclass
import torch
import triton
import triton.language as tl

__all__ = ["Shape", "Quantised", "Weights", "Buffers", "Sampler", "ROWS", "allocate", "decode", "why_not", "aot_cases"]

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
    own: torch.Tensor # (programs, D + ROWS H HD) fp32: what a program keeps to itself
    act: torch.Tensor # (ROWS, F) fp32
    best: torch.Tensor # (programs, ROWS) fp32 best logit that a program has seen
    best_id: torch.Tensor # (programs, ROWS) int32 whose it is
    picked: torch.Tensor # (ROWS,) int32 successors of rows that were fed at once
    barrier: torch.Tensor # (1,) int32

class Sampler(NamedTuple):
    "Sampling by the Gumbel-max trick: the same seed and position give the same noise, whatever the grid. Without one, greedy."
    temperature: float = 1.0
    seed: int = 0

def allocate(shape: Shape, # of the model
             *, device: torch.device | str = "cpu", # where
             dtype: torch.dtype = torch.float32, # of the cache
             programs: int | None = None, # most programs that a launch will have; None is one a multiprocessor, 8 on a CPU
             splits: int = 16, # most parts that a head's cache is cut into
            ) -> Buffers: # uninitialised, but for the barrier
    "Buffers for one sequence."
    raise NotImplementedError

def decode(shape: Shape, # of the model
           weights: Weights,
           buffers: Buffers,
           tokens: torch.Tensor, # (max_len + 1,) int32: tokens[pos] is fed; successors are written behind it
           pos: int, # place of the first token fed; the cache holds all places before it
           n: int = 1, # tokens to feed one after the other, each but the first being what was picked
           *, rows: int = 1, # tokens fed at once, tokens[pos:pos + rows], in one pass over the weights; with rows > 1, n is 1
           head: bool = True, # False leaves out the head and picks nothing (prompts); with n = 1
           programs: int | None = None, # of the launch; None is as many as `buffers` allow (1 where the interpreter runs a persistent launch)
           stages: tuple[int, int] | None = None, # run these stages only, of n(5L + 1) + 1, or 5L without the head, in one launch
           reverse: bool = False, # the last program does the first's work: a test of hidden dependences
           sampler: Sampler | None = None, # None is greedy, the lowest index winning ties
           backend: str = "auto", # "persistent": one launch; "staged": a launch a stage, no barrier; "auto": persistent on a GPU, else staged
          ) -> torch.Tensor: # int32 successors: (n,) written to `tokens` too, or (rows,) if rows > 1
    """Run `n` tokens, or `rows` at once, through the whole decoder. Nothing is copied to the host. Raises `ValueError` if shapes do not fit, or
    if the cache would overflow."""
    raise NotImplementedError
