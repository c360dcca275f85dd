"""The reference game of Frank and Goodman in memo (memo-lang), for `test_core_rsa`. memo reads the source of its models and wants them at the top of a module, so they stand in a file of their own."""
import jax
import jax.numpy as np
from memo import memo

MEANING = [[1, 1, 0], [0, 0, 1], [1, 0, 1], [0, 1, 0]] # blue, green, square, circle
COST, PRIOR = [.3, 0., 1., .2], [.5, .2, .3]
U, S = range(4), range(3)

@jax.jit
def true(u, s): return np.array(MEANING, float)[u, s]
@jax.jit
def effort(u): return np.array(COST)[u]
@jax.jit
def weight(s, even): return np.where(even, 1., np.array(PRIOR)[s])

@memo
def literal[u: U, s: S](even):
    listener: knows(u)
    listener: chooses(s in S, wpp=true(u, s)*weight(s, even))
    return Pr[listener.s == s]

@memo
def speaker[u: U, s: S](alpha, dear, even):
    speaker: knows(s)
    speaker: chooses(u in U, wpp=literal[u, s](even)**alpha*exp(-alpha*dear*effort(u)))
    return Pr[speaker.u == u]

@memo
def pragmatic[u: U, s: S](alpha, dear, even):
    listener: thinks[speaker: given(s in S, wpp=weight(s, even)), speaker: chooses(u in U, wpp=speaker[u, s](alpha, dear, even))]
    listener: observes [speaker.u] is u
    listener: chooses(s in S, wpp=Pr[speaker.s == s])
    return Pr[listener.s == s]
