"""The benchmark of the persistent decoder on a CPU, at a small shape: its rows, and what they say where a peer fails when it is made, when it is warmed up, or in the race."""
import sys
from pathlib import Path
from types import SimpleNamespace
import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1]/'benchmarks'))
import flashformer as bench

@pytest.fixture
def args(tmp_path): return SimpleNamespace(quick=True, repeats=2, seed=0, device='cpu', out=tmp_path, budget=400., started=bench.time.time())

def rows_of(args, quant=None):
    rows = []
    bench.model_rows('Llama-3.2-1B', quant, 1e10, args, rows.append)
    return rows

def failing(after):
    "A peer that writes some tokens and then fails, as a compiled one does that is compiled when it is called"
    real, calls = bench.graphed, []
    def made(model, length, compiled):
        if after is None: raise RuntimeError('cannot be made')
        run = real(model, length, compiled)
        def peer(context, n):
            calls.append(n)
            if len(calls) > after: raise torch._dynamo.exc.FailOnRecompileLimitHit('recompile limit reached')
            return run(context, n)
        return peer
    return made

def test_rows(args):
    rows = rows_of(args)
    assert [r['case'] for r in rows] == ['check', 'stages', 'decode', 'decode'] and rows[0]['agreement'] == 1. and rows[0]['status'] == 'right'
    for r in rows[2:]: assert r['status'] == 'measured' and r['faster']['low'] > 0 and set(r['seconds']) == {'rlcr_suite', 'transformers'} and 0 < r['share']['median'] < 1

@pytest.mark.parametrize('after, why', [(None, 'failed: RuntimeError: cannot be made'), (0, 'recompile limit reached'), (2, 'recompile limit reached')], ids=['made', 'warmed up', 'raced'])
def test_a_peer_that_fails_takes_no_row_of_ours_with_it(args, monkeypatch, after, why):
    monkeypatch.setattr(bench, 'graphed', failing(after))
    rows = rows_of(args)
    assert len(rows) == 4
    for r in rows[2:]: assert r['status'] == 'measured' and why in r['peer'] and 'faster' not in r and set(r['seconds']) == {'rlcr_suite'}
    assert rows[3]['seconds']['rlcr_suite']['median'] > 0

def test_another_text_is_not_timed(args, monkeypatch):
    monkeypatch.setattr(bench, 'agreement', lambda *a: .9)                       # right by the rule that once was, when rounding of bfloat16 stood between the two
    rows = rows_of(args, 'int8')
    assert [r['case'] for r in rows] == ['check'] and rows[0]['status'] == 'wrong'

def test_peers_are_compiled_afresh(monkeypatch):
    "More peers than a function may be compiled for: each begins with none"
    resets = []
    monkeypatch.setattr(torch._dynamo, 'reset', lambda: resets.append(1))
    model = bench.hugging_face(bench.TINY, False, SimpleNamespace(device='cpu', seed=0))
    for _ in range(2): bench.graphed(model, 8, False)
    assert len(resets) == 2
