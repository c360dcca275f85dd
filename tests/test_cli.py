"The program: help, mistakes, exit codes, and commands that are killed and given again."
import json, os, signal, socket, subprocess, sys, time
from pathlib import Path
import pytest
from typer.testing import CliRunner
from rlcr_suite import cli
from rlcr_suite.core.chat import ScriptedServer
from rlcr_suite.core.data import jsonl_read
from rlcr_suite.core.stats import Interval

QUIET = dict(OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1", CUDA_VISIBLE_DEVICES="", COLUMNS="120", NO_COLOR="1", PYTHONWARNINGS="ignore")
SAID = "<think>hm</think><answer>red</answer><analysis>weak</analysis><confidence>0.6</confidence>"
COMMANDS = ([], ["claims"], ["reproduce"], ["rlcr"], ["rlcr", "train"], ["rlcr", "eval"], ["rlcr", "report"])


@pytest.fixture
def call():
    "Run the program in this process"
    def run(*args, code=0):
        result = CliRunner(env=QUIET).invoke(cli.app, list(map(str, args)))
        assert result.exit_code == code, (result.output, result.exception)
        return result
    return run


def start(*args, **kwargs):
    "Start the program as a process"
    return subprocess.Popen([sys.executable, "-m", "rlcr_suite.cli", *map(str, args)], env=os.environ | QUIET | kwargs.pop("env", {}), text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE, **kwargs)


def wait_for(condition, process, seconds=120):
    "Wait until something is so, while the process lives"
    end = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < end, "it took too long"
        time.sleep(.05)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    "A folder with questions and a small checkpoint that mostly keeps the format: where none is kept, all rewards are equal and nothing is learnt"
    from rlcr_suite.core.lm import save, tiny_lm
    from rlcr_suite.core.sft import sft, tokenize
    from rlcr_suite.rlcr.world import demonstrations, questions, tokenizer
    folder, tok = tmp_path_factory.mktemp("cli"), tokenizer()
    model = tiny_lm(tok, hidden_size=64, layers=2, heads=2, intermediate_size=128, max_length=160)
    sft(model, tok, tokenize(demonstrations(32*80), tok), folder/"sft", steps=80, batch=32, lr=6e-3, warmup_steps=10)
    save(model, tok, folder/"base")
    rows = [dict(prompt=p, answer=a) for p, a in zip(*(questions(40, "id", 3)[c] for c in ("prompt", "answer")))]
    (folder/"data.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    (folder/"wrong.jsonl").write_text('{"prompt": "Why?", "solution": "so"}\n')
    return folder


# ------------------------------------------------------------------------------------------------ help and mistakes

@pytest.mark.parametrize("command", COMMANDS, ids=lambda c: " ".join(c) or "rlcr-suite")
def test_every_help_has_an_example(call, command):
    text = call(*command, "--help").output
    assert "Examples" in text and " ".join(["rlcr-suite", *command]) in text.split("Examples")[1]


def test_help_imports_nothing_heavy():
    code = "import sys; from rlcr_suite.cli import app\ntry: app(['--help'])\nexcept SystemExit: pass\nprint(sorted({m.split('.')[0] for m in sys.modules} & " \
           "{'torch', 'transformers', 'trl', 'datasets', 'numpy', 'scipy', 'matplotlib', 'pandas'}))"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=os.environ | QUIET).stdout
    assert out.splitlines()[-1] == "[]"


def test_version(call):
    from rlcr_suite import __version__
    assert call("--version").output == f"rlcr-suite {__version__}\n"


def test_options_name_what_the_library_has():
    from typing import get_args
    from rlcr_suite.rlcr import reward, train, verify
    assert set(get_args(cli.PresetName)) == set(train.PRESETS)
    assert set(get_args(cli.Kind)) == set(reward._KINDS) and set(get_args(cli.Mode)) == set(reward.MODES)
    assert set(get_args(cli.Verify)) == set(cli.VERIFIERS) and all(callable(getattr(verify, f)) for f in cli.VERIFIERS.values())


class TestMistakes:
    "One line on stderr, exit code 2, no traceback"
    def told(self, call, *args, code=2):
        result = call(*args, code=code)
        assert "Traceback" not in result.output
        return result.stderr

    def test_missing_file(self, call, made, tmp_path):
        line = self.told(call, "rlcr", "eval", "--model", made/"base", "--data", "nowhere.jsonl", "--out", tmp_path/"a.jsonl")
        assert line == "rlcr-suite: no file or folder at nowhere.jsonl\n" and not list(tmp_path.iterdir())

    @pytest.mark.parametrize("verb", ["train", "eval"])
    def test_wrong_column(self, call, made, tmp_path, verb):
        line = self.told(call, "rlcr", verb, "--model", made/"base", "--data", made/"wrong.jsonl", "--out", tmp_path/"a.jsonl")
        assert "missing column 'answer'" in line and line.count("\n") == 1

    def test_unknown_preset(self, call, made, tmp_path):
        line = self.told(call, "rlcr", "train", "--model", made/"base", "--data", made/"data.jsonl", "--out", tmp_path, "--preset", "paper")
        assert "paper-hotpot" in line

    def test_no_model(self, call, made, tmp_path):
        line = self.told(call, "rlcr", "eval", "--model", tmp_path/"no", "--data", made/"data.jsonl", "--out", tmp_path/"a.jsonl")
        assert line.startswith("rlcr-suite: no checkpoint at") and line.count("\n") == 1

    @pytest.mark.parametrize("setting, says", [("learning_rte=1", "did you mean learning_rate"), ("learning_rate", "KEY=VALUE"), ("output_dir=x", "no setting")])
    def test_settings(self, call, made, tmp_path, setting, says):
        assert says in self.told(call, "rlcr", "train", "--model", made/"base", "--data", made/"data.jsonl", "--out", tmp_path, "--set", setting)

    def test_eval_needs_one_source(self, call, made, tmp_path):
        rest = ["--data", made/"data.jsonl", "--out", tmp_path/"a.jsonl"]
        assert "either --model or --server" in self.told(call, "rlcr", "eval", *rest)
        assert "--served-model" in self.told(call, "rlcr", "eval", "--server", "http://127.0.0.1:1/v1", *rest)
        assert "greedy" in self.told(call, "rlcr", "eval", "--model", made/"base", "--n", 2, *rest)

    def test_unreachable_server_is_a_failure(self, call, made, tmp_path):
        with socket.socket() as s:      # a port on which nobody listens
            s.bind(("127.0.0.1", 0))
            line = self.told(call, "rlcr", "eval", "--server", f"http://127.0.0.1:{s.getsockname()[1]}/v1", "--served-model", "m", "--retries", 0,
                             "--data", made/"data.jsonl", "--out", tmp_path/"a.jsonl", code=1)
        assert "failed after 1 attempt" in line and line.count("\n") == 1

    def test_report(self, call, made, tmp_path):
        assert "no file at" in self.told(call, "rlcr", "report", tmp_path/"no.jsonl")
        assert "row 1: expected samples" in self.told(call, "rlcr", "report", made/"data.jsonl")
        assert ".html, .png, .svg" in self.told(call, "rlcr", "report", made/"data.jsonl", "--out", "a.pdf")

    def test_unknown_paper(self, call):
        assert "there are rlcr" in self.told(call, "reproduce", "attention")
        assert "no paper 'attention'" in self.told(call, "claims", "attention")

    def test_unknown_scale_makes_nothing(self, call, tmp_path):
        assert "quick, full" in self.told(call, "reproduce", "rlcr", "--scale", "huge", "--out", tmp_path/"run")
        assert not list(tmp_path.iterdir())

    def test_debug_shows_the_traceback(self, call, made):
        result = CliRunner(env=QUIET).invoke(cli.app, ["--debug", "rlcr", "report", "no.jsonl"])
        assert isinstance(result.exception, ValueError)

    def test_a_bug_keeps_its_traceback(self, monkeypatch):
        monkeypatch.setattr(cli, "_named", lambda files: {}["bug"])
        assert isinstance(CliRunner().invoke(cli.app, ["rlcr", "report", "a.jsonl"]).exception, KeyError)

    def test_of_a_real_process(self):
        p = start("rlcr", "report", "no.jsonl")
        out, err = p.communicate(timeout=300)
        assert (p.returncode, out, err) == (2, "", "rlcr-suite: no file at no.jsonl\n")


# ------------------------------------------------------------------------------------------------ claims

class TestClaims:
    @pytest.fixture
    def records(self, tmp_path, monkeypatch):
        monkeypatch.setenv("RLCR_SUITE_RECORDS", str(tmp_path))
        return tmp_path

    def claim(self, **kwargs):
        from rlcr_suite.core.records import Claim, Rule
        return Claim(**(dict(id="ece", paper="rlcr", claim="RLCR is better calibrated than RLVR", source="Table 1", kind="measurement",
                             rule=Rule("<", 0., on="high"), notebook="01_rlcr/10_results.ipynb") | kwargs))

    def test_without_a_record(self, call, records):
        assert "reproduce rlcr" in call("claims").output
        assert "no evidence yet" in call("claims", "rlcr").output
        assert json.loads(call("claims", "--json").output) == {}

    def test_table_and_json(self, call, records):
        from rlcr_suite.core.records import write
        write("rlcr", [self.claim().decide(Interval(-.2, -.3, -.1, 1000, 3)), self.claim(id="other")])
        text = call("claims", "rlcr").output
        assert "1 of 2 claims hold" in text and "-0.200 [-0.300, -0.100]" in text and "no evidence yet" in text
        first, second = json.loads(call("claims", "--json").output)["rlcr"]
        assert first["holds"] is True and first["ours"]["high"] == -.1 and second["ours"] is None

    def test_a_broken_record_is_one_line(self, call, records):
        (records/"rlcr.json").write_text("{")
        assert "not valid JSON" in call("claims", code=2).stderr


# ------------------------------------------------------------------------------------------------ train, eval, report

SMALL = ["--set", "per_device_train_batch_size=8", "--set", "gradient_accumulation_steps=1", "--set", "max_completion_length=28", "--set", "save_steps=1"]

class TestTrain:
    def test_train_eval_report(self, call, made, tmp_path):
        from rlcr_suite.core.lm import load
        train = ["rlcr", "train", "--model", made/"base", "--data", made/"data.jsonl", "--preset", "quick", "--out", tmp_path/"run", *SMALL]
        assert "trained for 2 steps" in call(*train, "--max-steps", 2).output
        before, after = load(made/"base")[0], load(tmp_path/"run"/"model")[0]
        assert any((a != b).any() for a, b in zip(before.parameters(), after.parameters()))
        # the same command with more steps goes on: the journal has each step once
        assert "trained for 3 steps" in call(*train, "--max-steps", 3).output
        assert [r["step"] for r in jsonl_read(tmp_path/"run"/"log.jsonl") if "reward" in r] == [1, 2, 3]
        text = call("rlcr", "eval", "--model", tmp_path/"run"/"model", "--data", made/"data.jsonl", "--max-tokens", 28, "--out", tmp_path/"a.jsonl").output
        assert "ECE null" in text and "40 questions" in text
        for end in ("html", "png", "svg"):
            call("rlcr", "report", tmp_path/"a.jsonl", "--out", tmp_path/f"r.{end}")
        page = (tmp_path/"r.html").read_text()
        assert "<svg" in page and "src=" not in page and "@import" not in page

    def test_lora_changes_the_merged_model(self, call, made, tmp_path):
        from rlcr_suite.core.lm import load
        call("rlcr", "train", "--model", made/"base", "--data", made/"data.jsonl", "--preset", "quick", "--out", tmp_path/"run", "--lora", 2, "--max-steps", 1, *SMALL)
        names = lambda m: sorted(n for n, _ in m.named_parameters())
        assert names(load(tmp_path/"run"/"model")[0]) == names(load(made/"base")[0])

    @pytest.mark.parametrize("given, seed", [([], None), (["--seed", 0], 0), (["--seed", 7], 7)])
    def test_the_preset_decides_what_is_not_given(self, call, made, tmp_path, monkeypatch, given, seed):
        "The paper's presets have a seed of their own, 43"
        from types import SimpleNamespace
        from rlcr_suite.rlcr import train
        asked = {}
        done = SimpleNamespace(state=SimpleNamespace(global_step=0), is_world_process_zero=lambda: True)
        monkeypatch.setattr(train, "grpo", lambda *args, **kwargs: asked.update(kwargs) or done)
        monkeypatch.setattr(cli, "_keep", lambda *args: None)
        call("rlcr", "train", "--model", made/"base", "--data", made/"data.jsonl", "--preset", "paper-math", "--out", tmp_path, *given)
        assert asked.get("seed") == seed and "max_steps" not in asked
        options = {k: v for k, v in asked.items() if k not in ("kind", "preset", "reward", "callbacks")}
        assert train.grpo_config("paper-math", tmp_path, **options).seed == (43 if seed is None else seed)

    def test_two_processes(self, made, tmp_path):
        "`accelerate launch` on two CPU processes: one of them prints, and the model is written once"
        command = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "2", "--num_machines", "1", "--mixed_precision", "no",
                   "--dynamo_backend", "no", "--main_process_port", "0", "-m", "rlcr_suite.cli", "rlcr", "train", "--model", made/"base", "--data", made/"data.jsonl",
                   "--preset", "quick", "--out", tmp_path/"run", "--max-steps", "1", *SMALL]
        done = subprocess.run(list(map(str, command)), env=os.environ | QUIET | dict(ACCELERATE_USE_CPU="true"), capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr[-3000:]
        assert done.stdout.count("trained for 1 steps") == 1 and (tmp_path/"run"/"model"/"config.json").exists()


class TestEval:
    def test_a_server(self, call, made, tmp_path):
        replies = lambda request: SAID if "camera" in request["messages"][-1]["content"] else "I do not know"
        with ScriptedServer(replies) as server:
            args = ["rlcr", "eval", "--server", server.base_url, "--served-model", "m", "--data", made/"data.jsonl", "--out", tmp_path/"a.jsonl", "--instruct"]
            text = call(*args).output
            assert "state no confidence; they count as 0" in text
            assert all(r["messages"][0]["role"] == "system" for r in server.requests) and len(server.requests) == 40
            call(*args)
            assert len(server.requests) == 40      # all was on the disk
        for row in jsonl_read(tmp_path/"a.jsonl"):
            (s,) = row["value"]["samples"]
            assert (s["answer"], s["confidence"], s["ok"]) == (("red", .6, True) if s["text"] == SAID else (None, None, False))
        gold = [r["answer"] for r in jsonl_read(made/"data.jsonl")]
        for row in jsonl_read(tmp_path/"a.jsonl"):
            (s,) = row["value"]["samples"]
            assert s["correct"] == (s["answer"] == gold[row["value"]["item"]])

    def test_other_settings_are_refused(self, call, made, tmp_path):
        args = ["rlcr", "eval", "--model", made/"base", "--data", made/"data.jsonl", "--max-tokens", 8, "--out", tmp_path/"a.jsonl"]
        call(*args)
        before = (tmp_path/"a.jsonl").read_bytes()
        assert "mode was 'tabc', now 'ta'" in call(*args, "--mode", "ta", code=2).stderr
        assert "something else" in call(*args[:-1], made/"data.jsonl", code=2).stderr
        assert (tmp_path/"a.jsonl").read_bytes() == before

    def test_killed_and_given_again(self, call, made, tmp_path):
        "No row is lost, none is there twice, and sampled rows are those of a run that was not killed"
        args = ["rlcr", "eval", "--model", made/"base", "--data", made/"data.jsonl", "--max-tokens", 28, "--temperature", "1", "--n", "2", "--batch-size", "3"]
        whole, cut = tmp_path/"whole.jsonl", tmp_path/"cut.jsonl"
        p = start(*args, "--out", cut)
        try: wait_for(lambda: cut.exists() and cut.read_bytes().count(b"\n") >= 4, p)
        finally:
            p.kill()
            p.communicate()
        had = jsonl_read(cut)
        assert 4 <= len(had) < 40
        with open(cut, "ab") as f: f.write(b'{"key": "torn')      # and the disk had begun another
        call(*args, "--out", cut)
        call(*args, "--out", whole)
        assert jsonl_read(cut)[:len(had)] == had
        assert cut.read_bytes() == whole.read_bytes() and len(jsonl_read(cut)) == 40


class TestScores:
    def test_a_missing_confidence_is_zero(self):
        from rlcr_suite.core.calibration import brier
        flat = cli._flat([dict(item=0, samples=[dict(correct=True, confidence=None), dict(correct=False, confidence=.5)])], "x")
        assert flat == dict(item=[0, 0], correct=[1., 0.], confidence=[None, .5])
        scores = cli._scores(dict(item=[0, 1, 2, 3], correct=[1., 0., 1., 0.], confidence=[None, .5, .9, .1]))
        assert scores["brier"].value == pytest.approx(brier([0, .5, .9, .1], [1, 0, 1, 0]))

    def test_without_any_confidence_only_accuracy(self):
        assert list(cli._scores(dict(item=[0, 1, 2], correct=[1., 0., 1.], confidence=[None]*3))) == ["accuracy"]

    def test_samples_of_a_question_stay_together(self):
        "Eight copies of each answer are no more evidence than one"
        once = dict(item=list(range(30)), correct=[float(i % 3 == 0) for i in range(30)], confidence=[.3 + i/100 for i in range(30)])
        copies = {k: [x for x in v for _ in range(8)] for k, v in once.items()}
        a, b = cli._scores(once)["brier"], cli._scores(copies)["brier"]
        assert b.n == 30 and (b.high - b.low) == pytest.approx(a.high - a.low, rel=.15)


# ------------------------------------------------------------------------------------------------ reproduce

class TestReproduce:
    def test_interrupted_killed_and_given_again(self, tmp_path):
        "The smallest experiment, interrupted in its first job and killed in a later one; what was finished is not done again"
        args, root = ["reproduce", "rlcr", "--scale", "test", "--workers", "2", "--out", tmp_path/"run"], tmp_path/"run"
        def stopped(sign, when, seconds):
            p = start(*args, cwd=tmp_path)
            try:
                wait_for(when, p, seconds)
                p.send_signal(sign)
                return p.communicate(timeout=120)[1], p.returncode
            finally: p.kill()
        err, code = stopped(signal.SIGINT, (root/"warm-up"/"output.txt").exists, 120)
        assert code == 130 and "the same command goes on" in err and "Traceback" not in err
        finished = lambda: [*root.glob("*-0/answers.parquet")]
        stopped(signal.SIGKILL, finished, 240)
        stamps = {f: f.stat().st_mtime_ns for f in [root/"warm-up"/"model"/"model.safetensors", *finished()]}
        p = start(*args, cwd=tmp_path)
        out, err = p.communicate(timeout=400)
        assert p.returncode == 0, err
        assert "going on in" in out and "RLCR seed 1: step 2/2" in out
        assert {f: f.stat().st_mtime_ns for f in stamps} == stamps and len(stamps) > 1
        from rlcr_suite.rlcr.experiment import read_evidence
        e = read_evidence(root/"evidence"/"rlcr"/"test")
        assert set(e.answers.arm) >= {"base", "rlvr", "rlcr"} and set(e.answers.seed) == {0, 1}
        assert e.about["seconds"] is None      # a run that was stopped has no duration

    def test_fresh_deletes_runs_only(self, tmp_path):
        (tmp_path/"thesis.tex").write_text("ten years of work")
        with pytest.raises(ValueError, match="not a run"): cli._open_run(tmp_path, "rlcr", "test", True)
        assert (tmp_path/"thesis.tex").exists()
        cli._open_run(tmp_path/"run", "rlcr", "test", False)
        (tmp_path/"run"/"old").write_text("")
        assert "went_on" in cli._open_run(tmp_path/"run", "rlcr", "test", False) and (tmp_path/"run"/"old").exists()
        with pytest.raises(ValueError, match="scale test"): cli._open_run(tmp_path/"run", "rlcr", "quick", False)
        assert "went_on" not in cli._open_run(tmp_path/"run", "rlcr", "quick", True) and not (tmp_path/"run"/"old").exists()


    def test_what_could_not_be_published_is_not_run(self, call, tmp_path, monkeypatch):
        "The ledger of a checkout takes numbers of committed code: that is said before anything is trained, not after"
        from rlcr_suite.core import records
        root = tmp_path/"checkout"
        (root/"records").mkdir(parents=True)
        (root/"settings.ini").write_text("[DEFAULT]\nlib_name = rlcr_suite\n")
        monkeypatch.delenv("RLCR_SUITE_RECORDS", raising=False)
        monkeypatch.chdir(root)
        monkeypatch.setattr(records, "stamp", lambda: dict(hardware="x", versions={"python": "3"}, commit="a"*40 + "-dirty", date="2030-01-01"))
        monkeypatch.setattr(cli, "_evidence", lambda *args: pytest.fail("something was run"))
        assert "not committed" in call("reproduce", "rlcr", "--out", tmp_path/"run", code=2).stderr and not (tmp_path/"run").exists()

    def test_outside_a_checkout_claims_go_to_the_working_folder(self, call, tmp_path, monkeypatch):
        from types import SimpleNamespace
        from rlcr_suite.core import records
        monkeypatch.delenv("RLCR_SUITE_RECORDS", raising=False)
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(records.rlcr_suite, "__file__", str(tmp_path/"site"/"rlcr_suite"/"__init__.py"))
        written = []
        chapter = SimpleNamespace(write_evidence=lambda e, path: written.append(path), publish=lambda e: [])
        monkeypatch.setattr(cli, "_evidence", lambda *args: None)
        monkeypatch.setattr(cli, "_chapter", lambda *args: chapter)
        call("reproduce", "rlcr", "--out", "run")
        assert written == [Path("records/evidence/rlcr/quick")]


class TestExecute:
    def notebook(self, path, source):
        import nbformat
        nb = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(source, id="a")])
        nbformat.write(nb, path)
        return path

    def test_a_page(self, tmp_path):
        page = self.notebook(tmp_path/"a.ipynb", "import os; print(sorted(os.listdir()))")
        assert cli.execute(page)
        (cell,) = json.loads(page.read_text())["cells"]
        assert "".join(cell["outputs"][0]["text"]) == "['a.ipynb']\n" and cell["execution_count"] is None and "execution" not in cell["metadata"]
        assert not cli.execute(page)      # the same results leave the same file

    def test_a_page_that_fails_stays_as_it_was(self, tmp_path):
        page = self.notebook(tmp_path/"a.ipynb", "1/0")
        before = page.read_bytes()
        with pytest.raises(cli.PageFailed, match="ZeroDivisionError"): cli.execute(page)
        assert page.read_bytes() == before


# ------------------------------------------------------------------------------------------------ progress

class TestBoard:
    def test_sparse_lines(self, capsys):
        from rich.console import Console
        with cli.Board(Console(force_terminal=False), every=30.) as board:
            for step in range(0, 6): board.update([("a", dict(step=step, total=5, reward=.5)), ("b", dict(step=0, total=5))])
        assert capsys.readouterr().out.splitlines() == ["a: step 1/5, reward 0.500", "a: step 5/5, reward 0.500"]

    def test_a_table_on_a_terminal(self):
        import io
        from rich.console import Console
        out = Console(file=io.StringIO(), force_terminal=True, width=100)
        with cli.Board(out) as board: board.update([("RLCR [seed 0]", dict(step=3, total=5, accuracy=.25))])
        assert "RLCR [seed 0]" in out.file.getvalue() and "3/5" in out.file.getvalue() and "0.250" in out.file.getvalue()
