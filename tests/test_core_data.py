"core.data: columns, loading, and files that survive a crash."
import gzip, json, os, warnings
import pytest
from datasets import Dataset, DatasetDict
from hypothesis import given, settings, strategies as st
from rlcr_suite.core.data import MESSAGES, atomic_write, check_columns, jsonl_append, jsonl_read, load

ROWS = [{"prompt": [{"role": "user", "content": f"q{i}"}], "answer": str(i), "level": i/2} for i in range(4)]
JSON = st.recursive(st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
                    lambda x: st.lists(x, max_size=3) | st.dictionaries(st.text(), x, max_size=3), max_leaves=6)


def read_quietly(path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return jsonl_read(path)


def dies(fn):
    "Whether a child process that runs `fn` ends by os._exit(9), as a kill would end it: no clean-up of any kind"
    pid = os.fork()
    if pid == 0:
        try: fn()
        finally: os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 9


class TestColumns:
    def test_a_dataset_and_a_list_are_alike(self):
        for ds in (ROWS, Dataset.from_list(ROWS)):
            assert check_columns(ds, {"prompt": MESSAGES, "answer": str, "level": float}) is ds

    @pytest.mark.parametrize("columns, says", [
        ({"question": str}, "missing column 'question'; the data has 'answer', 'level', 'prompt'"),
        ({"answer": int}, "column 'answer', row 0: expected int, got str '0'"),
        ({"prompt": str}, "column 'prompt', row 0: expected str, got list"),
        ({"level": (str, MESSAGES)}, "column 'level', row 0: expected str or messages, got float")])
    def test_errors_say_what_and_where(self, columns, says):
        with pytest.raises(ValueError, match=says): check_columns(ROWS, columns)

    def test_a_hole_is_found_in_a_selection(self):
        ds = Dataset.from_list([{"a": "x"}, {"a": None}, {"a": "y"}])
        check_columns(ds.select([0, 2]), {"a": str})
        with pytest.raises(ValueError, match="row 1: expected str, got NoneType"): check_columns(ds.select([2, 1]), {"a": str})

    @pytest.mark.parametrize("bad", [[], ["hello"], [{"role": "user"}], [{"role": "user", "content": None}], "hello", None])
    def test_what_is_not_a_conversation(self, bad):
        with pytest.raises(ValueError, match="expected messages"): check_columns([{"prompt": bad}], {"prompt": MESSAGES})

    def test_empty_data_has_no_columns(self):
        with pytest.raises(ValueError, match="the data has none"): check_columns([], {"a": str})


class TestLoad:
    @pytest.fixture
    def ds(self): return Dataset.from_list(ROWS)

    def test_every_kind_of_file(self, ds, tmp_path):
        ds.to_json(tmp_path/"a.jsonl"); ds.to_parquet(tmp_path/"a.parquet"); ds.save_to_disk(tmp_path/"folder")
        (tmp_path/"a.json").write_text(json.dumps(ROWS))
        (tmp_path/"a.jsonl.gz").write_bytes(gzip.compress((tmp_path/"a.jsonl").read_bytes()))
        for name in ("a.jsonl", "a.parquet", "folder", "a.json", "a.jsonl.gz"):
            assert load(tmp_path/name, cache_dir=tmp_path/"cache").to_list() == ROWS if name != "folder" else load(tmp_path/name).to_list() == ROWS

    def test_csv(self, tmp_path):
        (tmp_path/"a.csv").write_text("question,answer\nhow many?,12\n")
        ds = load(tmp_path/"a.csv", cache_dir=tmp_path/"cache")
        assert ds.to_list() == [{"question": "how many?", "answer": 12}]
        with pytest.raises(ValueError, match="expected str, got int"): check_columns(ds, {"answer": str})

    def test_splits(self, ds, tmp_path):
        DatasetDict(train=ds, test=ds.select([3])).save_to_disk(tmp_path/"both")
        assert load(tmp_path/"both", split="test").to_list() == ROWS[3:]
        with pytest.raises(ValueError, match="no split 'dev'; it has 'train', 'test'"): load(tmp_path/"both", split="dev")

    @pytest.mark.parametrize("name", ["missing.jsonl", "./missing", "/missing/folder", "~/missing"])
    def test_a_missing_path_is_not_looked_up_on_the_hub(self, name):
        with pytest.raises(ValueError, match="no file or folder"): load(name)

    @pytest.mark.parametrize("name, content", [("a.json", b'[{"a": 1}, {"a'), ("a.jsonl", b'{"a": 1}\n{"a'), ("a.parquet", b"PAR1"), ("a.txt", b"a")])
    def test_a_broken_file_is_named(self, tmp_path, name, content):
        (tmp_path/name).write_bytes(content)
        with pytest.raises(ValueError, match=name): load(tmp_path/name, cache_dir=tmp_path/"cache")

    def test_a_folder_of_something_else(self, tmp_path):
        with pytest.raises(ValueError, match=str(tmp_path)): load(tmp_path)


class TestJsonl:
    @settings(max_examples=40, deadline=None)
    @given(rows=st.lists(st.dictionaries(st.text(), JSON, max_size=3), min_size=1, max_size=4), data=st.data())
    def test_cut_anywhere_keeps_what_was_whole(self, tmp_path_factory, rows, data):
        path = tmp_path_factory.mktemp("cut")/"a.jsonl"
        for row in rows: jsonl_append(path, row)
        assert jsonl_read(path) == rows
        whole = path.read_bytes()
        cut = data.draw(st.integers(0, len(whole)))
        path.write_bytes(whole[:cut])
        lines = whole[:cut].count(b"\n")
        kept = read_quietly(path)
        assert kept[:lines] == rows[:lines] and kept == rows[:len(kept)] and len(kept) <= lines + 1
        jsonl_append(path, {"next": 1})
        assert jsonl_read(path) == [*kept, {"next": 1}]

    def test_a_torn_row_is_reported(self, tmp_path):
        (tmp_path/"a").write_bytes(b'{"a": 1}\n{"a": ')
        with pytest.warns(UserWarning, match="cut short"): assert jsonl_read(tmp_path/"a") == [{"a": 1}]

    def test_zeros_left_by_a_power_cut(self, tmp_path):
        (tmp_path/"a").write_bytes(b'{"a": 1}\n' + bytes(500))
        jsonl_append(tmp_path/"a", {"a": 2})
        assert jsonl_read(tmp_path/"a") == [{"a": 1}, {"a": 2}]

    @pytest.mark.parametrize("middle", [b'{"a": ', b"12", b'"text"', b"\xff\xfe", b"[1]"])
    def test_damage_elsewhere_is_an_error(self, tmp_path, middle):
        (tmp_path/"a").write_bytes(b'{"a": 1}\n' + middle + b'\n{"a": 2}\n')
        with pytest.raises(ValueError, match="line 2: not a JSON row"): jsonl_read(tmp_path/"a")

    def test_a_torn_row_longer_than_a_block(self, tmp_path):
        jsonl_append(tmp_path/"a", {"a": 1})
        with open(tmp_path/"a", "ab") as f: f.write(b'{"long": "' + b"x"*200_000)
        jsonl_append(tmp_path/"a", {"a": 2})
        assert jsonl_read(tmp_path/"a") == [{"a": 1}, {"a": 2}]

    def test_what_cannot_be_written_leaves_no_trace(self, tmp_path):
        for row in ({"a": float("nan")}, {"a": float("inf")}, {"a": {1}}, [1], "text", 3):
            with pytest.raises(ValueError): jsonl_append(tmp_path/"a", row)
        assert jsonl_read(tmp_path/"a") == []

    def test_on_the_disk_before_it_returns(self, tmp_path, monkeypatch):
        synced = []
        monkeypatch.setattr(os, "fsync", lambda fd: synced.append(os.fstat(fd).st_size))
        jsonl_append(tmp_path/"a", {"a": 1})
        assert synced == [len(b'{"a": 1}\n')]


class TestAtomicWrite:
    @pytest.mark.parametrize("step", ["fsync", "chmod", "replace"])
    def test_dying_before_any_step_keeps_the_old(self, tmp_path, monkeypatch, step):
        path = atomic_write(tmp_path/"a", "old")
        monkeypatch.setattr(os, step, lambda *a, **k: os._exit(9))
        assert dies(lambda: atomic_write(path, "new"*100_000))
        assert path.read_text() == "old"

    def test_an_error_leaves_nothing_behind(self, tmp_path, monkeypatch):
        path = atomic_write(tmp_path/"a", "old")
        def full(fd): raise OSError(28, "No space left on device")
        monkeypatch.setattr(os, "fsync", full)
        with pytest.raises(OSError): atomic_write(path, "new")
        assert path.read_text() == "old" and os.listdir(tmp_path) == ["a"]

    def test_permissions(self, tmp_path):
        path = atomic_write(tmp_path/"new"/"a", b"1")
        assert path.stat().st_mode & 0o777 == 0o644
        path.chmod(0o600)
        assert atomic_write(path, b"2").stat().st_mode & 0o777 == 0o600
