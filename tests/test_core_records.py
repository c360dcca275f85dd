"core.records: what a record refuses, and what survives a crash"
import copy, json, math, os, signal, subprocess, sys, textwrap, time
from dataclasses import fields, replace
from pathlib import Path
import pytest
from hypothesis import given, settings, strategies as st
import rlcr_suite.core.records as records
from rlcr_suite.core.records import (CLAIM_SCHEMA, Claim, Rule, check, checkout, from_json, read, records_dir, stamp, table, to_json, write)
from rlcr_suite.core.stats import Interval

# what design.md lists, plus where the evidence is, and the day
FIELDS = {'id', 'paper', 'claim', 'source', 'kind', 'paper_value', 'rule', 'ours', 'holds', 'notebook', 'scale', 'hardware', 'versions', 'commit', 'date', 'evidence'}
STAMP = {'hardware': '2 CPU cores', 'versions': {'python': '3.11.9'}, 'commit': 'a'*40, 'date': '2026-01-31'}

def claim(id='ece-id', rule=Rule('<', 0., on='high'), **kw):
    base = dict(id=id, paper='rlcr', claim='RLCR is better calibrated', source='abstract', kind='measurement', rule=rule, notebook='01_rlcr/10_results.ipynb',
                paper_value='0.03 against 0.37', trust='R')
    return Claim(**(base | kw))
def decided(value=-.2, low=-.3, high=-.1, **kw): return claim(**kw).decide(Interval(value, low, high, n=500, seeds=3), stamp=STAMP)
def record(*rows): return {'version': 1, 'paper': 'rlcr', 'claims': [to_json(c) for c in rows or (claim(), decided(id='brier-id'))]}

@pytest.fixture
def path(tmp_path): return tmp_path/'rlcr.json'
def put(path, r): path.write_text(r if isinstance(r, str) else json.dumps(r)); return path

# --- rules

numbers = st.floats(-1e6, 1e6)

@given(st.sampled_from(list(records.OPS)), numbers, st.sampled_from(['value', 'low', 'high']), st.tuples(numbers, numbers, numbers).map(sorted))
def test_rule_reads_one_number(op, bound, on, xs):
    low, value, high = xs
    x = {'value': value, 'low': low, 'high': high}[on]
    said = {'<': x < bound, '<=': x <= bound, '>': x > bound, '>=': x >= bound, 'abs<=': abs(x) <= bound}[op]
    assert Rule(op, bound, on)(Interval(value, low, high, n=9)) is said

@given(numbers, st.tuples(numbers, numbers, numbers).map(sorted))
def test_the_whole_interval_is_stricter_than_the_value(bound, xs):
    iv = Interval(xs[1], xs[0], xs[2], n=9)
    for op, end in (('<', 'high'), ('>', 'low')): assert Rule(op, bound)(iv) or not Rule(op, bound, end)(iv)

def test_rule_without_a_number_says_nothing():
    nan = Interval(.1, math.nan, math.nan, n=9)
    assert Rule('<', 0.)(None) is None and Rule('<', 0., on='high')(nan) is None and Rule('<', 1.)(nan) is True

@pytest.mark.parametrize('args, why', [(('==', 0.), 'op'), (('<', math.nan), 'finite'), (('<', math.inf), 'finite'), (('<', '0'), 'finite'), (('<', True), 'finite'), (('<', 0., 'mean'), 'on must be')])
def test_bad_rules(args, why):
    with pytest.raises(ValueError, match=why): Rule(*args)

# --- claims

def test_holds_is_computed_and_cannot_be_set():
    assert 'holds' not in {f.name for f in fields(Claim)}
    with pytest.raises(TypeError): claim(holds=True)
    with pytest.raises(AttributeError): decided().holds = False

@pytest.mark.parametrize('made, status', [(claim(), 'no evidence yet'), (decided(), 'holds'), (decided(.1, -.1, .2), 'does not hold'), (decided(-.1, math.nan, math.nan), 'undecided')])
def test_status(made, status): assert made.status == status

def test_evidence_can_be_withdrawn(): assert decided().decide(None, scale='full', evidence='x') == claim()

@pytest.mark.parametrize('change, why', [
    (dict(kind='opinion'), 'kind'), (dict(trust='S'), "is not the paper's"), (dict(trust='M'), "is not the paper's"), (dict(trust=None), 'come together'),
    (dict(paper_value=None), 'come together'), (dict(scale='quick'), 'come together')])
def test_bad_claims(change, why):
    with pytest.raises(ValueError, match=why): claim(**change)

def test_bad_numbers():
    for x in (math.nan, math.inf):
        with pytest.raises(ValueError, match='finite'): claim().decide(Interval(x, x, x, n=3))
    with pytest.raises(ValueError, match='scale'): claim().decide(Interval(0., 0., 0., n=3), scale='huge')

# --- the schema

def test_schema_names_every_field():
    assert set(CLAIM_SCHEMA['required']) == set(CLAIM_SCHEMA['properties']) == FIELDS
    assert set(to_json(claim())) == set(to_json(decided())) == FIELDS

@pytest.mark.parametrize('field', sorted(FIELDS))
def test_every_field_is_required(path, field):
    r = record(); del r['claims'][1][field]
    with pytest.raises(ValueError, match=f"claim '?[\\w-]+'?.*{field}"): check(put(path, r))

WRONG = {'id': 'Ece Id', 'paper': 'seal', 'claim': '', 'source': None, 'kind': 'fact', 'paper_value': '0.03', 'rule': 'better', 'ours': .5, 'holds': 'yes', 'notebook': 'results.py',
         'scale': 'huge', 'hardware': '', 'versions': ['3.11'], 'commit': 'HEAD', 'date': 'yesterday', 'evidence': '/home/somebody/run'}

@pytest.mark.parametrize('field', sorted(WRONG))
def test_every_field_is_checked(path, field):
    r = record(); r['claims'][1][field] = WRONG[field]
    with pytest.raises(ValueError, match=r'rlcr\.json: '): check(put(path, r))
def test_wrong_names_them_all(): assert set(WRONG) == FIELDS

@pytest.mark.parametrize('change, why', [
    (dict(holds=False), 'by its rule.*gives True'), (dict(holds=None), 'gives True'), (dict(ours=None), 'must be null'), (dict(hardware=None), 'needs scale, hardware'),
    (dict(versions=None), 'needs scale'), (dict(scale=None), 'needs scale'), (dict(extra=1), 'extra'), (dict(evidence='runs/../../x'), 'evidence'), (dict(evidence='C:/x'), 'evidence')])
def test_a_claim_that_contradicts_itself(path, change, why):
    r = record(); r['claims'][1] |= change
    with pytest.raises(ValueError, match=why): check(put(path, r))

@pytest.mark.parametrize('part, change, why', [
    ('rule', dict(text='value < 0'), "text says 'value < 0'"), ('rule', dict(bound=-.5), 'holds says True'), ('rule', dict(on='low', text='lower end of the interval < -1', bound=-1), 'holds says True'),
    ('rule', dict(op='='), 'op'), ('ours', dict(high=.1), 'holds says True'), ('ours', dict(low=0., high=-.1), 'above high'), ('ours', dict(n=0), 'n'), ('ours', dict(value=None), 'value'),
    ('ours', dict(level=95), 'level'), ('paper_value', dict(trust='S'), 'trust')])
def test_a_verdict_cannot_be_typed(path, part, change, why):
    r = record(); r['claims'][1][part] |= change
    with pytest.raises(ValueError, match=why): check(put(path, r))

def test_a_claim_without_a_number_cannot_hold(path):
    r = record(); r['claims'][0]['holds'] = True
    with pytest.raises(ValueError, match='must be null'): check(put(path, r))

@pytest.mark.parametrize('text, why', [
    ('', 'not valid JSON'), ('{"version": 1, "claims": [', 'not valid JSON'), ('[]', 'object'), ('null', 'object'), ('{"version": 2, "paper": "rlcr", "claims": []}', 'version'),
    ('{"version": 1, "paper": "rlcr", "claims": []}', 'claims'), ('{"version": 1, "paper": "rlcr", "claims": [3]}', 'claim 0'), ('{"version": NaN}', 'NaN is not JSON'), (b'\xff\xfe', 'not valid JSON')])
def test_broken_files(path, text, why):
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    for f in (check, lambda p: read('rlcr', p)):
        with pytest.raises(ValueError, match=why): f(path)

def test_all_errors_are_told_at_once(tmp_path):
    r = record(); r['claims'][0]['kind'] = 'fact'; r['claims'][1]['scale'] = 'huge'
    put(tmp_path/'rlcr.json', r); put(tmp_path/'seal.json', record())
    with pytest.raises(ValueError) as e: check(tmp_path)
    assert all(s in str(e.value) for s in ("'ece-id' / kind", "'brier-id' / scale", 'named after'))

def test_duplicates_and_strangers(path):
    for rows, why in [((claim(), claim()), '2 times'), ((claim(), claim('x', paper='seal')), "belongs to paper 'seal'")]:
        with pytest.raises(ValueError, match=why): check(put(path, record(*rows)))

def test_missing_places(tmp_path):
    with pytest.raises(ValueError, match='no such record'): check(tmp_path/'none')
    with pytest.raises(ValueError, match='cannot be read'): read('rlcr', tmp_path/'rlcr.json')
    with pytest.raises(ValueError, match='lower-case'): read('../secrets')

def test_a_checkout_has_what_its_records_name(tmp_path):
    (tmp_path/'settings.ini').write_text('[DEFAULT]\nlib_name = rlcr_suite\n')
    write('rlcr', [replace(decided(), evidence='records/evidence/rlcr')], tmp_path/'records'/'rlcr.json')
    with pytest.raises(ValueError) as e: check(tmp_path/'records')
    assert 'nbs/01_rlcr/10_results.ipynb is not there' in str(e.value) and 'records/evidence/rlcr is not there' in str(e.value)
    for f in ('nbs/01_rlcr/10_results.ipynb', 'records/evidence/rlcr/x'): (tmp_path/f).parent.mkdir(parents=True, exist_ok=True); (tmp_path/f).touch()
    assert len(check(tmp_path/'records')) == 1

# --- there and back

text = st.text(min_size=1, max_size=30).filter(lambda s: s.isprintable())
intervals = st.builds(lambda xs, n, seeds, level: Interval(xs[1], xs[0], xs[2], n, seeds, level), st.tuples(numbers, numbers, numbers).map(sorted), st.integers(1, 10**6),
                      st.none() | st.integers(1, 9), st.sampled_from([.8, .95]))
rules = st.builds(Rule, st.sampled_from(list(records.OPS)), numbers, st.sampled_from(['value', 'low', 'high']))
claims = st.builds(lambda i, t, v, r, iv, scale: claim(f'c{i}', r, claim=t, paper_value=v, trust=None if v is None else 'P').decide(iv, scale=scale, stamp=STAMP),
                   st.integers(0, 99), text, st.none() | text | numbers, rules, st.none() | intervals, st.sampled_from(records.SCALES))

@settings(deadline=None, max_examples=60)
@given(st.lists(claims, min_size=1, max_size=4, unique_by=lambda c: c.id))
def test_written_claims_are_read_as_they_were(tmp_path_factory, many):
    path = tmp_path_factory.mktemp('r')/'rlcr.json'
    write('rlcr', many, path)
    assert read('rlcr', path) == many == check(path) == [from_json(to_json(c)) for c in many]
    before = path.read_bytes(), path.stat().st_mtime_ns
    write('rlcr', read('rlcr', path), path)
    assert (path.read_bytes(), path.stat().st_mtime_ns) == before

def test_missing_ends_survive(path):
    write('rlcr', [decided(-.1, math.nan, math.nan)], path)
    assert 'NaN' not in path.read_text() and read('rlcr', path)[0].status == 'undecided'
    before = path.read_bytes()
    write('rlcr', [replace(decided(-.1, math.nan, math.nan), date='2030-01-01')], path)  # NaN is not NaN, yet nothing changed
    assert path.read_bytes() == before

# --- writing

def test_only_stamps_changed_leaves_the_file_alone(path):
    write('rlcr', [claim(), decided(id='x')], path); before = path.read_bytes(), path.stat().st_mtime_ns, path.stat().st_ino
    for change in (dict(commit='b'*40), dict(date='2030-01-01'), dict(hardware='1 GPU'), dict(versions={'python': '3.13'}), dict(commit=None)):
        write('rlcr', [claim(), replace(decided(id='x'), **change)], path)
        assert (path.read_bytes(), path.stat().st_mtime_ns, path.stat().st_ino) == before

@pytest.mark.parametrize('change', [dict(ours=Interval(-.2, -.3, -.15, 500, 3)), dict(scale='full'), dict(rule=Rule('<', .5, 'high')), dict(claim='Other words'), dict(evidence='records/evidence')])
def test_a_change_of_substance_is_stamped_anew(path, change):
    write('rlcr', [decided(id='a'), decided(id='b')], path)
    new = STAMP | {'date': '2030-01-01'}
    write('rlcr', [replace(decided(id='a'), **new), replace(decided(id='b'), **change, **new)], path)
    assert [c.date for c in read('rlcr', path)] == [STAMP['date'], '2030-01-01']

def test_unstamped_claims_get_the_present_stamp(path):
    write('rlcr', [claim().decide(Interval(-.2, -.3, -.1, n=5))], path)
    c, now = read('rlcr', path)[0], stamp()
    assert c.hardware == now['hardware'] and dict(c.versions) == now['versions'] and c.versions['numpy']

def test_a_refused_write_changes_nothing(path):
    write('rlcr', [decided()], path); before = path.read_bytes()
    for bad in ([], [decided(), decided()], [replace(decided(), id='No Good')], [replace(decided(), evidence='/abs')], [decided(paper='seal')]):
        with pytest.raises(ValueError): write('rlcr', bad, path)
        assert path.read_bytes() == before
    assert os.listdir(path.parent) == ['rlcr.json']

def test_a_broken_record_is_replaced(path):
    put(path, '{"version": 1, "pap')
    write('rlcr', [decided()], path)
    assert read('rlcr', path) == [decided()]

CHILD = textwrap.dedent('''
    import os, signal, sys
    import rlcr_suite.core.data as data
    from rlcr_suite.core.records import Claim, Rule, write
    from rlcr_suite.core.stats import Interval
    path, how = sys.argv[1:]
    stamp = {'hardware': 'h', 'versions': {}, 'commit': None, 'date': '2026-01-01'}
    def claims(i): return [Claim(id=f'c{k}', paper='rlcr', claim='x'*2000, source='s', kind='analysis', rule=Rule('<', 0.), notebook='a.ipynb').decide(
                           Interval(float(i), i - 1., i + 1., n=1), stamp=stamp) for k in range(8)]
    write('rlcr', claims(0), path)
    real = {'fsync': os.fsync, 'replace': os.replace}
    def die(*a): os.kill(os.getpid(), signal.SIGKILL)
    if how in real: setattr(os, how, die)  # killed when the new content is written but not yet safe, or safe but not yet in place
    print('ready', flush=True)
    for i in range(1, 10**6): write('rlcr', claims(i), path)
''')

def survivor(path):
    values = {c.ours.value for c in read('rlcr', path)}
    assert len(values) == 1                                      # all claims of one write: never half of one and half of another
    return values.pop()

@pytest.mark.skipif(os.name == 'nt', reason='needs SIGKILL')
@pytest.mark.parametrize('how', ['fsync', 'replace'])
def test_killed_before_the_rename_leaves_the_old_record(path, how):
    child = subprocess.run([sys.executable, '-c', CHILD, path, how], capture_output=True, text=True, timeout=300)
    assert child.returncode == -signal.SIGKILL and 'ready' in child.stdout, child.stderr
    assert survivor(path) == 0.
    write('rlcr', [decided()], path)                             # and what was left lying about hinders nobody
    assert read('rlcr', path) == [decided()] == check(path.parent)

@pytest.mark.skipif(os.name == 'nt', reason='needs SIGKILL')
def test_killed_at_any_moment_leaves_one_whole_record(path):
    child = subprocess.Popen([sys.executable, '-c', CHILD, path, 'anywhere'], stdout=subprocess.PIPE, text=True)
    try:
        assert child.stdout.readline() == 'ready\n'
        until = time.monotonic() + 1
        while time.monotonic() < until: survivor(path)           # a reader beside the writer sees whole records only
    finally: child.kill(); child.wait(); child.stdout.close()
    survivor(path)

def test_a_full_disk_leaves_the_old_record(path, monkeypatch):
    write('rlcr', [decided()], path)
    def full(fd): raise OSError(28, 'No space left on device')
    monkeypatch.setattr(os, 'fsync', full)
    with pytest.raises(OSError, match='No space'): write('rlcr', [decided(-.5, -.6, -.4)], path)
    assert read('rlcr', path) == [decided()] and os.listdir(path.parent) == ['rlcr.json']

# --- where records are

def test_records_dir(tmp_path, monkeypatch):
    monkeypatch.setenv('RLCR_SUITE_RECORDS', str(tmp_path/'mine')); assert records_dir() == tmp_path/'mine'
    write('rlcr', [claim()]); assert read('rlcr') == [claim()] == check() == list(table().claims)
    monkeypatch.delenv('RLCR_SUITE_RECORDS')
    root = tmp_path/'co'; (root/'a'/'b').mkdir(parents=True)
    (root/'settings.ini').write_text('[DEFAULT]\nlib_name = rlcr_suite\n')
    (root/'a'/'settings.ini').write_text('[DEFAULT]\nlib_name = another\n')  # another nbdev project inside is passed by
    monkeypatch.chdir(root/'a'/'b'); assert records_dir() == root/'records'

@pytest.fixture
def installed(tmp_path, monkeypatch):
    "The package as pip leaves it: no checkout around it, a ledger inside"
    monkeypatch.delenv('RLCR_SUITE_RECORDS', raising=False)
    package, here = tmp_path/'site'/'rlcr_suite', tmp_path/'here'
    package.mkdir(parents=True); here.mkdir()
    monkeypatch.chdir(here)
    monkeypatch.setattr(records.rlcr_suite, '__file__', str(package/'__init__.py'))
    return package

def test_without_a_checkout(installed):
    with pytest.raises(ValueError, match='RLCR_SUITE_RECORDS'): records_dir()
    assert records_dir(new=True) == Path('records')            # known before anything is run
    write('rlcr', [claim('packaged')], installed/'records'/'rlcr.json')
    assert records_dir() == installed/'records' and [c.id for c in read('rlcr')] == ['packaged']
    Path('records').mkdir()
    Path('records/somebody_elses.json').write_text('[]')       # a folder of that name need not be a ledger
    assert records_dir() == installed/'records'
    write('rlcr', [claim('own')])                              # goes to the working folder, and is read from there
    assert Path('records/rlcr.json').exists() and [c.id for c in read('rlcr')] == ['own'] and records_dir() == Path('records')
    assert [c.id for c in read('rlcr', installed/'records'/'rlcr.json')] == ['packaged']
    assert checkout() is None and stamp()['commit'] is None

@pytest.fixture
def git(tmp_path):
    return lambda *a: subprocess.run(['git', '-c', 'user.name=t', '-c', 'user.email=t@example.org', *a], cwd=tmp_path, check=True, capture_output=True)

def test_commit_of_a_checkout(tmp_path, git):
    assert records._git_commit(tmp_path) is None
    git('init', '-q'); assert records._git_commit(tmp_path) is None
    (tmp_path/'rlcr_suite').mkdir(); (tmp_path/'rlcr_suite'/'a.py').write_text('1'); (tmp_path/'page').write_text('1')
    git('add', '.'); git('commit', '-qm', 'x')
    clean = records._git_commit(tmp_path); assert len(clean) == 40
    (tmp_path/'page').write_text('2'); assert records._git_commit(tmp_path) == clean, 'a page that was run again changes no number'
    (tmp_path/'rlcr_suite'/'b.py').write_text('new'); assert records._git_commit(tmp_path) == clean + '-dirty'
    (tmp_path/'rlcr_suite'/'b.py').unlink(); (tmp_path/'rlcr_suite'/'a.py').write_text('2'); assert records._git_commit(tmp_path) == clean + '-dirty'

def test_the_checkouts_ledger_takes_only_committed_code(tmp_path, monkeypatch):
    monkeypatch.delenv('RLCR_SUITE_RECORDS', raising=False); monkeypatch.chdir(tmp_path)
    (tmp_path/'settings.ini').write_text('[DEFAULT]\nlib_name = rlcr_suite\n')
    dirty = STAMP | dict(commit='a'*40 + '-dirty')
    bad = claim().decide(Interval(-.2, -.3, -.1, 500, 3), stamp=dirty)
    with pytest.raises(ValueError, match='aaaaaaa with changes.*not committed.*--fresh.*RLCR_SUITE_RECORDS'): write('rlcr', [bad])
    assert not (tmp_path/'records').exists()
    own = tmp_path/'elsewhere'/'rlcr.json'
    write('rlcr', [bad], own); assert read('rlcr', own)[0].commit.endswith('-dirty')   # a ledger of one's own takes it, marked
    (tmp_path/'records').mkdir(); (tmp_path/'records'/'rlcr.json').write_bytes(own.read_bytes())
    assert read('rlcr') == [bad] and write('rlcr', [bad, claim('more')]) and len(read('rlcr')) == 2   # what is stored can be read, and is left alone
    with pytest.raises(ValueError, match='not committed'): write('rlcr', [bad, claim('more').decide(Interval(1., .5, 2., 5), stamp=dirty)])
    write('rlcr', [bad.decide(Interval(-.4, -.5, -.3, 500, 3), stamp=STAMP), claim('more')]); assert read('rlcr')[0].commit == STAMP['commit']

# --- showing

def test_table_shows_every_claim_in_every_form():
    t = table([claim(), decided(id='x', claim='a | b <c>'), decided(.1, -.1, .2, id='y'), replace(decided(id='z'), ours=Interval(0.00001, .00001, .00001, 7))])
    assert t.counts == {'holds': 1, 'does not hold': 2, 'undecided': 0, 'no evidence yet': 1}
    markdown = t._repr_markdown_().splitlines()
    assert len(markdown) == 6 and all(line.replace('\\|', '').count('|') == len(t.columns) + 1 for line in markdown)
    assert 'a \\| b &lt;c&gt;' in markdown[3]
    from rich.console import Console
    console = Console(width=200, record=True, file=open(os.devnull, 'w')); console.print(t)
    for shown in (str(t), console.export_text(), t._repr_markdown_()): assert 'no evidence yet' in shown and '-0.200 [-0.300, -0.100]' in shown.replace('\\', '') and '1e-05' in shown

def test_summary():
    speed = claim('fast', kind='speed')
    assert table([decided(), decided(id='b')]).summary == '2 of 2 claims hold'
    assert table([decided(), speed]).summary == '1 of 2 claims hold, 1 open (speed)'
    assert table([decided(.1, -.1, .2), speed, claim()]).summary == '0 of 3 claims hold, 1 do not, 2 open'

@pytest.mark.parametrize('width', [60, 80, 100, 132, 200])
def test_no_width_of_a_terminal_hides_a_claim(width):
    from rich.console import Console
    console = Console(width=width, file=open(os.devnull, 'w'), record=True)
    console.print(table([decided(), claim('x', claim='another thing'), decided(id='y', paper='seal')]))
    out = console.export_text()
    assert all(len(line) <= width for line in out.splitlines())
    words = ' '.join(out.replace('│', ' ').replace('┃', ' ').split())
    for shown in ('RLCR is better', 'another thing', '-0.200 [-0.300, -0.100]', '0.03', '500 × 3', 'seal', 'quick', 'upper end'): assert shown in words

def test_several_papers_have_a_column():
    assert table([claim()]).columns[0] == '' and table([claim(), claim(paper='seal')]).columns[0] == 'paper'
    assert table([claim(), claim(paper='seal')])._repr_markdown_().splitlines()[3].startswith('| seal |')

def test_rich_takes_claims_literally():
    from rich.console import Console
    console = Console(width=200, record=True, file=open(os.devnull, 'w')); console.print(table([claim(claim='[bold]not markup[/bold] [/x]')]))
    assert '[bold]not markup[/bold] [/x]' in console.export_text()

def test_import_is_light():
    code = "import sys, rlcr_suite.core.records; sys.exit(any(m in sys.modules for m in ('scipy', 'jsonschema', 'rich', 'torch', 'pandas', 'datasets')))"
    assert subprocess.run([sys.executable, '-c', code]).returncode == 0
