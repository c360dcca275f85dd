"benchmarks/gpu.py without a GPU: what is measured, what a failure costs, what a budget does, what the record holds."
import json, sys
from argparse import Namespace
from pathlib import Path
import pytest, torch

HERE = Path(__file__).resolve().parents[1]/'benchmarks'
sys.path.insert(0, str(HERE))
import _harness, gpu
sys.path.remove(str(HERE))

@pytest.fixture
def args(tmp_path)->Namespace:
    "The command line of `gpu.py --quick --device cpu`, begun now"
    return Namespace(quick=True, repeats=3, seed=0, device='cpu', out=tmp_path, budget=100., only='', resume=False, started=gpu.time.time(), compile=None)

def stored(args)->dict: return json.loads(_harness.place('gpu', args).read_text())
def fails(e:BaseException):
    def f(*_): raise e
    return f

FEW = [gpu.Case('path', m, T, 1, 2, 16) for m, T in (('check', 64), ('forward', 64), ('backward', 64), ('forward', 128))]
NAMES = list(gpu.CONTENDERS['path'])

@pytest.fixture
def stub(monkeypatch)->list:
    "Measures that measure nothing; the cases they were asked for"
    asked = []
    def measure(case, args, known):
        asked.append(case)
        return {n: dict(status=known.get(n, 'right' if case.measure == 'check' else 'measured')) for n in NAMES}
    monkeypatch.setattr(gpu, 'MEASURES', dict.fromkeys(gpu.MEASURES, measure))
    return asked

# ---- the table ---------------------------------------------------------------------------------------------------------
def test_the_table_is_covered():
    rows = gpu.cases(False, 'cuda')
    assert len(rows) == len(set(rows))
    for family in ('log_linear', 'log_linear_delta'):
        for m in ('forward', 'backward'):
            mine = [c for c in rows if (c.family, c.measure) == (family, m)]
            assert {c.T for c in mine} == {2**n for n in range(11, 17)} and max(c.B*c.H for c in mine) == 64
    for m in ('forward', 'backward'): assert {c.T for c in rows if (c.family, c.measure) == ('path', m)} == {2**n for n in range(13, 17)}
    assert gpu.Case('path', 'training', 65536, 1, 32, 128) in rows and any(c.measure == 'decode' for c in rows)
    assert 'fla' in gpu.CONTENDERS['log_linear'] and 'fla' in gpu.CONTENDERS['path'] and 'fla' in gpu.DECODERS

def test_every_timed_shape_was_checked_before():
    rows = gpu.cases(False, 'cuda')
    for i, c in enumerate(rows):
        if c.measure.startswith('check'): continue
        before = [b for b in rows[:i] if b.family == c.family and b.measure == ('check decode' if c.measure == 'decode' else 'check')]
        assert any((b.H, b.D, b.gate) == (c.H, c.D, c.gate) for b in before), c

def test_the_budget_leaves_room_within_nine_minutes(): assert gpu.BUDGET + gpu.GRACE <= 9*60 - 15

# ---- one contender -----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize('error, status', [
    (_harness.NotMeasured('needs a GPU'), 'not measured: needs a GPU'), (torch.OutOfMemoryError('CUDA out of memory. Tried'), 'failed: out of memory'),
    (ValueError('only head_dim 64\nand more'), 'failed: ValueError: only head_dim 64'), (AssertionError(), 'failed: AssertionError')])
def test_a_failure_is_a_status(error, status): assert _harness.guarded('x', fails(error), 'cpu') == (None, status)

def test_a_success_has_no_status(): assert _harness.guarded('x', lambda: 3, 'cpu') == (3, '')

def test_a_lost_gpu_is_told_by_the_name_of_who_lost_it(monkeypatch):
    monkeypatch.setattr(_harness, '_wait', fails(RuntimeError('CUDA error: an illegal memory access was encountered')))
    with pytest.raises(_harness.Lost) as e: _harness.guarded('outer', lambda: _harness.guarded('fla', lambda: None, 'cpu'), 'cpu')
    assert e.value.args == ('fla', 'failed: RuntimeError: CUDA error: an illegal memory access was encountered')

def test_failures_cost_the_others_nothing(args):
    runs = {'a': lambda: dict(status='measured'), 'b': fails(RuntimeError('no kernel')), 'c': fails(KeyError('never run')), 'd': lambda: dict(status='right')}
    found = gpu.in_order(runs, args, {'c': 'not timed'})
    assert [e['status'] for e in found.values()] == ['measured', 'failed: RuntimeError: no kernel', 'not timed', 'right']

def test_who_fails_while_timed_keeps_what_was_measured_but_gets_no_ratio(args):
    calls = dict(a=0, b=0)
    def run(name):
        calls[name] += 1
        if name == 'b' and calls[name] == 5: raise RuntimeError('second timed run')   # after two untimed ones and one that is for the estimate
    args.repeats = 4
    found = gpu.timed({gpu.OURS: lambda: run('a'), 'b': lambda: run('b')}, args, {})
    assert calls == dict(a=7, b=5) and found['b']['status'] == 'failed: RuntimeError: second timed run' and found['b']['seconds']['low'] > 0
    assert found[gpu.OURS]['status'] == 'measured' and gpu.ratios(found) == {}

def test_slow_runs_are_repeated_less_often(args, monkeypatch):
    monkeypatch.setattr(gpu.Clock, '__call__', lambda self, f, queued=False: f() or 3.)
    args.repeats = 7
    assert gpu.timed({gpu.OURS: lambda: None}, args, {}, per=2) == {gpu.OURS: dict(status='measured', peak_bytes=None, repeats=2,
                                                                                 seconds=dict(median=1.5, low=1.5, high=1.5))}

def test_ratios(): assert gpu.ratios({n: dict(status='measured', seconds=dict(median=t)) for n, t in ((gpu.OURS, 2.), ('fla', 5.))}) == dict(fla=2.5)

# ---- right or wrong ----------------------------------------------------------------------------------------------------
def wrong_gradient(x):
    o = gpu.ours_path(x)
    return o + .1*(x['beta'] - x['beta'].detach()).sum()      # the same output, another gradient

@pytest.mark.parametrize('f, name', [(lambda x: 1.01*gpu.ours_path(x), 'o'), (wrong_gradient, 'dbeta'), (lambda x: gpu.ours_path(x)/0, 'o')])
def test_a_wrong_contender_is_not_timed(args, monkeypatch, f, name):
    ran = []
    monkeypatch.setitem(gpu.CONTENDERS, 'path', {gpu.OURS: gpu.ours_path, 'wrong': lambda x: ran.append(1) or f(x)})
    record = gpu.Record(args)
    gpu.measured(record, FEW[:1], args)
    entries = record.rows[0]['contenders']
    assert entries[gpu.OURS]['status'] == 'right' and entries[gpu.OURS]['deterministic'] is True
    assert entries['wrong']['status'].startswith('wrong: relative error') and (entries['wrong']['error'][name] or 1.) > 1e-3
    json.dumps(stored(args), allow_nan=False)
    n = len(ran)
    gpu.measured(record, FEW[:2], args)
    assert len(ran) == n and record.rows[1]['contenders']['wrong']['status'].startswith('not timed, its check says wrong')
    assert 'seconds' in record.rows[1]['contenders'][gpu.OURS]

@pytest.mark.parametrize('gate', [False, True])
def test_the_truth_of_some_heads_is_that_of_all(gate):
    case = gpu.Case('path', 'check', 20, 2, 3, 8, gate)
    x = gpu.inputs(case, 0, 'cpu')
    every, two = gpu.truth(case, x, [0, 1, 2]), gpu.truth(case, x, [0, 2])
    assert set(two) == {'o', 'dq', 'dk', 'dv', 'dw', 'dbeta'} | ({'dgate'} if gate else set())
    for n in two: assert torch.equal(two[n], every[n][:, :, [0, 2]])

def test_the_peers_way_of_decoding_is_path_attention():
    "Keys rewritten at every token, then plain attention"
    x = {n: y.double() for n, y in gpu.inputs(gpu.Case('path', 'decode', 9, 2, 2, 8), 1, 'cpu').items()}
    keys, out = x['k'][:, :0], []
    for t in range(9):
        new = gpu.tokens(x, t, t + 1)
        keys = torch.cat([gpu._rewritten(keys.double(), new['w'], new['beta']), new['k']], 1)
        out.append(gpu.sdpa_decode(dict(k=keys, v=x['v'][:, :t + 1]))(new))
    assert torch.allclose(torch.cat(out, 1), gpu.ours_path(x, 'naive'), atol=1e-6)       # keys pass through float32

# ---- the rows ----------------------------------------------------------------------------------------------------------
def test_every_row_is_on_disk_before_the_next_begins(args, monkeypatch):
    seen = []
    def measure(case, args, known):
        seen.append(len(stored(args)['results']) if _harness.place('gpu', args).exists() else 0)
        if case.measure == 'backward': raise MemoryError('inputs')
        return {n: dict(status='right') for n in NAMES}
    monkeypatch.setattr(gpu, 'MEASURES', dict.fromkeys(gpu.MEASURES, measure))
    gpu.measured(gpu.Record(args), FEW, args)
    statuses = [{e['status'] for e in r['contenders'].values()} for r in stored(args)['results']]
    assert seen == [0, 1, 2, 3] and statuses == [{'right'}, {'right'}, {'not measured: failed: MemoryError: inputs'}, {'right'}]

def test_when_the_budget_is_spent_the_rest_says_so(args, stub):
    args.started -= 99.9                                      # a tenth of a second is left
    record = gpu.Record(args)
    gpu.measured(record, FEW[:1], args)
    args.started -= 1
    gpu.measured(record, FEW, args)
    assert stub == FEW[:1] and len(stored(args)['results']) == 4
    for r in stored(args)['results'][1:]: assert {e['status'] for e in r['contenders'].values()} == {'not measured: out of time'}

def test_what_hangs_is_given_up(args, stub, monkeypatch):
    monkeypatch.setattr(gpu.os, '_exit', fails(SystemExit(0)))
    record = gpu.Record(args)
    gpu.measured(record, FEW[:1], args)
    args.current = {gpu.OURS: dict(status='measured', seconds=dict(median=1.)), 'fla': dict(status='measured')}   # the one was timed, the other not yet
    with pytest.raises(SystemExit): record.give_up(FEW)
    rows = stored(args)['results']
    assert rows[1]['contenders'][gpu.OURS]['seconds'] == dict(median=1.) and rows[1]['contenders']['fla'] == dict(status='not measured: took too long')
    assert {e['status'] for r in rows[2:] for e in r['contenders'].values()} == {'not measured: out of time'} and len(rows) == 4

def test_after_a_lost_gpu_a_new_process_goes_on_without_the_culprit(args, stub, monkeypatch):
    lost = dict(gpu.MEASURES) | dict(backward=fails(_harness.Lost('fla', 'failed: illegal access')))
    monkeypatch.setattr(gpu.os, 'execv', lambda program, argv: fails(SystemExit(argv))())
    monkeypatch.setattr(gpu.sys, 'argv', ['gpu.py', '--quick', '--started=1'])
    with monkeypatch.context() as m, pytest.raises(SystemExit) as e:
        m.setattr(gpu, 'MEASURES', lost)
        gpu.measured(gpu.Record(args), FEW, args)
    assert e.value.code[2:] == ['--quick', '--resume', f'--started={args.started}'] and len(stored(args)['results']) == 2
    args.resume = True
    gpu.measured(gpu.Record(args), FEW, args)
    rows = stored(args)['results']
    assert [gpu.Case(**{k: v for k, v in r['case'].items() if k != 'dtype'}) for r in rows] == FEW
    statuses = {n: e['status'] for n, e in rows[2]['contenders'].items()}
    assert statuses.pop('fla') == 'failed: illegal access (and the GPU was lost, T 64)' and set(statuses.values()) == {'measured'}
    assert rows[3]['contenders']['fla']['status'] == 'measured', 'another measure: it may try'

def test_who_lost_the_gpu_when_checked_is_never_timed(args):
    rows = [gpu.row(FEW[0], {'fla': dict(status='failed: illegal access'), gpu.OURS: dict(status='right')}, 'bfloat16')]
    assert gpu.excluded(FEW[1], rows, {}) == {'fla': 'not timed, its check says failed: illegal access'}
    assert gpu.excluded(gpu.Case('path', 'forward', 64, 1, 2, 32), rows, {}) == {}, 'another width has its own check'

@pytest.mark.parametrize('ours, fla, want', [(1., 2., True), (1., 1.9, True), (1., 1.6, False), (1., None, None), (None, 2., None), ('failed: out of memory', 2., False)])
def test_the_bar_of_a_row(ours, fla, want):
    def entry(x):
        if isinstance(x, str): return dict(status=x)
        return dict(status='measured', seconds=dict(median=x)) if x else dict(status='not measured: needs a GPU')
    r = gpu.row(gpu.Case('path', 'forward', 8192, 1, 2, 16), {gpu.OURS: entry(ours), 'fla': entry(fla)}, 'bfloat16')
    assert (r['bar'], r['aim'], r['met']) == (1.7, 2.5, want) and ('bar 1.7' in gpu.shown(r)) == (want is not None)

def test_the_bar_of_training():
    case = gpu.Case('path', 'training', 64, 1, 2, 16)
    for entry, want in ((dict(status='measured', deterministic=True), True), (dict(status='measured', deterministic=False), False), (dict(status='failed: out of memory'), False),
                        (dict(status='not measured: out of time'), None)):
        assert gpu.met(case, {gpu.OURS: entry})['met'] is want
    assert gpu.met(gpu.Case('log_linear_delta', 'forward', 64, 1, 2, 16), {}) == {}

# ---- the CPU benchmarks ------------------------------------------------------------------------------------------------
def test_the_scan_is_timed_at_its_fastest_block(args, monkeypatch):
    sys.path.insert(0, str(HERE))
    import path_attention as bench, log_linear as levels
    sys.path.remove(str(HERE))
    x, want = bench.inputs(512, 0, 'cpu'), None
    for C in bench.BLOCKS:
        found = bench.scan(*x, C=C)
        want = bench.tree(*x) if want is None else want
        assert float((found - want).norm()/want.norm()) < 1e-5, C
    seconds = {64: .02, 128: .01, 256: 0., 512: .01}
    monkeypatch.setattr(bench, 'scan', lambda *x, C: gpu.time.sleep(seconds[C]))
    assert bench.best_block(x, 'cpu') == 256
    x = levels.inputs(64, 0, 'cpu')
    assert set(levels.CONTENDERS) == {'log_linear', 'log_linear_delta', 'sdpa', 'naive'} and not torch.allclose(levels.delta(*x), levels.CONTENDERS['log_linear'](*x))

def test_an_exponent_counts_from_2k():
    rows = [dict(T=T, seconds=dict(forward=dict(ours=dict(median=T**1.5 if T >= 2048 else 1.)))) for T in (512, 2048, 8192)]
    assert _harness.exponent(rows, 'forward', 'ours') == 1.5 and _harness.exponent(rows[:2], 'forward', 'ours') is None

# ---- the command -------------------------------------------------------------------------------------------------------
def test_the_record(args, monkeypatch, capsys):
    monkeypatch.setattr(gpu.sys, 'argv', ['gpu.py', '--quick', '--device', 'cpu', '--only', 'path', '--out', str(args.out)])
    threads, before = torch.get_num_threads(), set(sys.modules)
    try: gpu.main()
    finally: torch.set_num_threads(threads)
    record = stored(args)
    assert {'device', 'hardware', 'versions', 'seed', 'repeats', 'seconds', 'results'} <= record.keys()
    assert {'torch', 'triton', 'fla-core', 'python'} <= record['versions'].keys() and capsys.readouterr().out.count(' ms') > 5
    names = [r['name'] for r in record['results']]
    assert {f'path {m}' for m in gpu.MEASURES} <= set(names)
    for r in record['results']:
        ours = r['contenders'][gpu.OURS]
        assert ours['status'] == ('right' if 'error' in ours else 'measured'), r
        assert r['case']['dtype'] == 'float32' and r['contenders'].get('fla', {'status': 'not measured: needs a GPU'}) == {'status': 'not measured: needs a GPU'}
        for e in r['contenders'].values():
            if 'seconds' in e: assert 0 < e['seconds']['low'] <= e['seconds']['median'] <= e['seconds']['high']
    assert record['results'][names.index('path training')]['contenders'][gpu.OURS]['deterministic'] is True
    forward = record['results'][names.index('path forward')]
    assert (forward['bar'], forward['aim'], forward['met']) == (1.7, 2.5, None) and record['results'][names.index('path training')]['met'] is True
    assert record['results'][names.index('path forward')]['times_faster'].keys() == {'sdpa'}
    assert not any(m.split('.')[0] == 'fla' for m in set(sys.modules) - before), 'the peer is imported only where it runs'

def test_without_a_gpu_it_says_so(args, monkeypatch, capsys):
    monkeypatch.setattr(gpu.sys, 'argv', ['gpu.py', '--device', 'cpu', '--out', str(args.out)])
    gpu.main()
    assert 'needs a GPU' in capsys.readouterr().out and not list(args.out.iterdir())

def test_a_library_that_is_not_there_has_no_version(): assert _harness.version('no-such-library-anywhere') is None
