"Jobs: order, failure, kills, locks, orphans, interrupts and what is left behind."
import json, os, signal, subprocess, sys, time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from rlcr_suite.core.jobs import JobFailed, Job, NOTE, digest, here, journal, last_checkpoint, made_with, need_done, read_tables, run, start, write_table, write_tables

MODULE = '''
import os, time
from dataclasses import dataclass
from pathlib import Path
from rlcr_suite.core.jobs import Job

@dataclass(frozen=True)
class Step(Job):
    root: str
    name: str
    needs: tuple = ()
    seconds: float = 0.
    then: str = ''

    @property
    def dir(self): return Path(self.root)/self.name
    @property
    def done(self): return (self.dir/'result').exists()
    @property
    def label(self): return f'step {self.name}'
    @property
    def spec(self): return super().spec | dict(seconds=None) # how long it takes changes no result
    def work(self):
        for n in self.needs: (Path(self.root)/n/'result').read_text()
        with open(Path(self.root)/'begun', 'a') as f: f.write(f'{self.name} {os.getpid()} {os.environ["OMP_NUM_THREADS"]}\\n')
        time.sleep(self.seconds)
        if self.then == 'raise': raise RuntimeError('the disk is on fire')
        if self.then == 'exit': os._exit(0)
        (self.dir/'result').write_text(str(os.getpid()))
'''


@pytest.fixture
def Step(tmp_path, monkeypatch):
    "A class of jobs in a module that processes can import"
    (tmp_path/'lib').mkdir()
    (tmp_path/'lib'/'stepping.py').write_text(MODULE)
    monkeypatch.syspath_prepend(tmp_path/'lib')
    sys.modules.pop('stepping', None)
    import stepping
    (tmp_path/'run').mkdir()
    return lambda name, **kw: stepping.Step(str(tmp_path/'run'), name, **kw)


def begun(job): # the words of each line; none as long as the file is not there, or still empty
    file = Path(job.root)/'begun'
    return [l.split() for l in file.read_text().splitlines()] if file.exists() else []
def alive(pid):
    try: os.kill(pid, 0)
    except ProcessLookupError: return False
    return 'State:\tZ' not in Path(f'/proc/{pid}/status').read_text() # a zombie has ended


def until(condition, seconds=30):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, 'it took too long'
        time.sleep(.02)


def test_stages_wait_and_reports_come(Step):
    a, b, c = Step('a'), Step('b', needs=('a',)), Step('c', needs=('a', 'b'))
    seen = []
    assert run([[a], [b], [c]], workers=2, watch=seen.append) > 0
    assert [l[0] for l in begun(a)] == ['a', 'b', 'c'] and len({l[1] for l in begun(a)} | {str(os.getpid())}) == 4
    assert {l[2] for l in begun(a)} == {str(os.cpu_count())} # a job alone in its stage has every core
    assert [(j.label, p) for j, p in seen[-1]] == [(f'step {n}', dict(step=1, total=1)) for n in 'abc']
    assert seen[0][-1][1]['step'] == 0
    assert run([[a], [b], [c]]) < .5 and len(begun(a)) == 3


def test_workers_bound_what_runs_at_once(Step):
    jobs = [Step(str(i), seconds=.7) for i in range(3)] # each is seen by a watch that looks twice a second
    most = [0]
    def watch(rows): most[0] = max(most[0], sum((Path(j.dir)/'output.txt').exists() and not j.done for j, _ in rows))
    run([jobs], workers=1, watch=watch)
    assert most[0] == 1 and all(j.done for j in jobs)


@pytest.mark.parametrize('then, says', [('raise', 'the disk is on fire'), ('exit', 'ended with code 0')])
def test_failure_is_raised_after_the_others_have_finished_and_stops_later_stages(Step, then, says):
    bad, good, later = Step('bad', then=then), Step('good', seconds=.5), Step('later')
    with pytest.raises(JobFailed, match=says) as e: run([[bad, good], [later]], workers=2)
    assert 'step bad' in str(e.value) and 'output.txt' in str(e.value)
    assert good.done and not bad.done and not later.dir.exists()
    assert 'JobFailed' == type(e.value).__name__ # the name by which the command line knows a failure


def test_interrupt_ends_what_runs(Step):
    slow, next_ = Step('slow', seconds=60), Step('next')
    def watch(rows):
        if begun(slow): raise KeyboardInterrupt
    t = time.monotonic()
    with pytest.raises(KeyboardInterrupt): run([[slow, next_]], workers=1, watch=watch)
    assert time.monotonic() - t < 30
    pid = int(begun(slow)[0][1])
    until(lambda: not alive(pid), 5)
    assert not slow.done and not next_.done and len(begun(slow)) == 1


def test_a_job_dies_with_its_parent(Step, tmp_path):
    job = Step('orphan', seconds=60)
    code = f"import sys; sys.path.insert(0, {str(tmp_path/'lib')!r}); from stepping import Step; from rlcr_suite.core.jobs import run; run([[Step({str(tmp_path/'run')!r}, 'orphan', seconds=60)]])"
    parent = subprocess.Popen([sys.executable, '-c', code])
    try:
        until(lambda: begun(job))
        pid = int(begun(job)[0][1])
        assert alive(pid)
    finally:
        parent.send_signal(signal.SIGKILL)
        parent.wait()
    until(lambda: not alive(pid), 10)


def test_two_processes_never_work_in_one_folder(Step):
    job = Step('one', seconds=.5)
    ps = [start(job) for _ in range(3)]
    for p in ps: p.join(60)
    assert [p.exitcode for p in ps] == [0]*3 and len(begun(job)) == 1


def test_a_killed_job_leaves_no_lock(Step):
    slow = Step('slow', seconds=60)
    p = start(slow)
    until(lambda: begun(slow))
    p.kill(); p.join()
    quick = Step('slow') # the same folder
    here(quick)
    assert quick.done


def test_what_a_process_could_not_make_is_refused(Step, tmp_path):
    @dataclass(frozen=True)
    class Local(Job):
        root: str
        dir = tmp_path/'local'
        done, label = False, 'local'
        def work(self): ...
    with pytest.raises(ValueError, match='top of a module'): start(Local('x'))
    with pytest.raises(ValueError, match='have to be JSON'): start(Step('x', seconds={1}))
    assert not (tmp_path/'local').exists()
    with pytest.raises(TypeError): Job()


def test_tables(tmp_path):
    t = pd.DataFrame(dict(arm=['a', 'b'], x=[.1, np.nan], n=[1, 2]))
    folder = write_tables(tmp_path/'evidence'/'some_paper'/'quick', dict(scores=t), dict(scale='quick', seconds=None))
    tables, about = read_tables(folder, ['scores'])
    assert about == dict(scale='quick', seconds=None)
    pd.testing.assert_frame_equal(tables['scores'], t.astype(dict(x='float32')))
    assert t.x.dtype == 'float64' and not list(folder.glob('*.tmp'))
    first = (folder/'scores.parquet').read_bytes()
    write_table(t.copy(), folder/'scores.parquet')
    assert (folder/'scores.parquet').read_bytes() == first # equal tables are equal files
    with pytest.raises(ValueError, match='scores.parquet, about.json missing; `make reproduce PAPER=other`'): read_tables(tmp_path/'other'/'quick', ['scores'])


def test_need_done(Step):
    a, b = Step('a'), Step('b')
    here_env = os.environ.get('OMP_NUM_THREADS')
    assert here_env
    here(a)
    need_done([a], 'x')
    with pytest.raises(ValueError, match='the experiment in x is not finished: step b'): need_done([a, b], 'x')


def stamped(monkeypatch, **what):
    "Let jobs of this process begin with another stamp"
    from rlcr_suite.core import records
    monkeypatch.setattr(records, 'stamp', lambda: dict(hardware='a machine', versions={'python': '3'}, commit='a'*40, date='2030-01-01') | what)


def test_what_was_made_by_another_plan_is_refused(Step):
    a, b = Step('a'), Step('b')
    run([[a, b]])
    changed = Step('a', needs=('b',))
    for act in (lambda: run([[b, changed]]), lambda: made_with([b, changed])):
        with pytest.raises(ValueError, match=r"step a: the plan is another.*needs was \[\], is \['b'\].*--fresh.*--out"): act()
    assert len(begun(a)) == 2                               # nothing was done
    assert digest([a, b]) == digest([b, a]) != digest([changed, b])
    (a.dir/NOTE).unlink()
    with pytest.raises(ValueError, match='does not say by which plan'): run([[a]])
    half = Step('half', then='raise')
    with pytest.raises(JobFailed): run([[half]])
    with pytest.raises(ValueError, match='then was'): here(Step('half'))  # half-done work counts as well


def test_the_stamp_is_that_of_the_beginning(Step, monkeypatch):
    "Gathering on another day, with other code, changes nothing; going on with other code is told"
    stamped(monkeypatch)
    a, b, c = Step('a'), Step('b'), Step('c', then='raise')
    here(a)
    stamped(monkeypatch, date='2030-01-02')
    here(b)
    stamped(monkeypatch, commit='b'*40)
    assert made_with([a, b]) == dict(hardware='a machine', versions={'python': '3'}, commit='a'*40, date='2030-01-01', digest=digest([a, b]))
    here(a)
    assert json.loads((a.dir/NOTE).read_text())['begun'][0]['commit'] == 'a'*40 and len(begun(a)) == 2   # done: not begun again
    for commit in ('b', 'b', 'c'):
        stamped(monkeypatch, commit=commit*40)
        with pytest.raises(RuntimeError): here(c)
    (c.dir/'result').touch()
    both = made_with([a, c])
    assert both['commit'] == 'a'*40 and [s['commit'][0] for s in both['begun']] == ['a', 'b', 'c']
    stamped(monkeypatch, commit='d'*40 + '-dirty')
    here(d := Step('d'))
    assert made_with([a, d])['commit'] == 'd'*40 + '-dirty', 'one job of code that was not committed marks them all'


def test_a_full_disk_leaves_the_old_table(tmp_path, monkeypatch):
    t = pd.DataFrame(dict(x=[1.]))
    write_tables(tmp_path, dict(t=t), dict(scale='old'))
    def full(fd): raise OSError(28, 'No space left on device')
    monkeypatch.setattr(os, 'fsync', full)
    before = {f: f.read_bytes() for f in tmp_path.iterdir()}
    with pytest.raises(OSError, match='No space'): write_table(pd.DataFrame(dict(x=[2.])), tmp_path/'t.parquet')
    with pytest.raises(OSError, match='No space'): write_tables(tmp_path, {}, dict(scale='new'))
    assert {f: f.read_bytes() for f in tmp_path.iterdir()} == before


def test_import_is_light():
    code = "import sys, rlcr_suite.core.jobs; print(sorted({'torch', 'transformers', 'pandas', 'matplotlib'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True).stdout.strip() == '[]'


def test_unmarked_checkpoints_do_not_count(tmp_path):
    for n in (3, 20): (tmp_path/f'checkpoint-{n}').mkdir()
    assert last_checkpoint(tmp_path) is None and journal(tmp_path) == []
    (tmp_path/'checkpoint-3'/'complete').touch()
    assert last_checkpoint(tmp_path).name == 'checkpoint-3'
    (tmp_path/'log.jsonl').write_text(''.join(json.dumps(r) + '\n' for r in ({'step': 1, 'loss': 2.}, {'step': 2, 'train_runtime': 1.}, {'step': 1, 'loss': 3.})) + '{"step": 9')
    with pytest.warns(UserWarning): assert journal(tmp_path) == [{'step': 1, 'loss': 3.}]
