"core.chat: a real server, a misbehaving one, and evaluations that are killed."
import json, math, os, random, signal, socket, subprocess, sys, threading, time, urllib.request
import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from rlcr_suite.core.chat import (Chat, ChatError, LocalChat, Reply, ScriptedServer, ServerChat, backoff, item_key, map_jsonl, parse_json, retry_after,
                                  structured)
from rlcr_suite.core.data import jsonl_read
from rlcr_suite.core.lm import save, tiny_lm, word_tokenizer

ASK = [{"role": "user", "content": "Coin?"}]
QUICK = dict(backoff_base=.01, timeout=2., max_retries=3)


def user(text): return [{"role": "user", "content": text}]


@pytest.fixture(scope="module")
def local():
    "A small model that has learned to call a coin: heads 70 %, tails 30 %, after a thought"
    # abcdef: what transformers looks for when it is given stop texts
    tok = word_tokenizer(["Coin? heads tails. edge abcdef", " ".join(f"w{chr(97 + i)}" for i in range(26))], specials=["<think>", "</think>", "<answer>", "</answer>"])
    model = tiny_lm(tok, hidden_size=32, layers=1, heads=2, intermediate_size=64, seed=0)
    say = [f"<think>{c}</think><answer>{c}</answer>" for c in ("heads",)*7 + ("tails",)*3]
    x = torch.tensor([tok(tok.apply_chat_template(ASK, tokenize=False, add_generation_prompt=True) + s + "<eos>")["input_ids"] for s in say])
    opt = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for step in range(100):
        opt.param_groups[0]["lr"] = 1e-2*(1 - step/100)
        loss = torch.nn.functional.cross_entropy(model(x).logits[:, 3:-1].flatten(0, 1), x[:, 4:].flatten())
        opt.zero_grad(); loss.backward(); opt.step()
    return LocalChat(model, tok)


# ------------------------------------------------------------------------------------------------ transformers serve

@pytest.fixture(scope="module")
def served(local, tmp_path_factory):
    "`transformers serve` on a checkpoint on disk, on the loopback device, with no network"
    folder = tmp_path_factory.mktemp("serve")
    path = save(local.model, local.tok, folder/"coin")
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    env = os.environ | dict(HF_HUB_OFFLINE="1", HF_HOME=str(folder/"home"), OMP_NUM_THREADS="1", CUDA_VISIBLE_DEVICES="")
    log = open(folder/"log", "w+")
    command = [sys.executable, "-c", "from transformers.cli.transformers import main; main()", "serve", str(path), "--host", "127.0.0.1", "--port", str(port),
               "--device", "cpu"]
    process = subprocess.Popen(command, env=env, stdout=log, stderr=subprocess.STDOUT)
    try:
        for _ in range(3000):
            try:
                if urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=1).status == 200: break
            except OSError: time.sleep(.1)
            if process.poll() is not None: break
        else: pytest.fail("transformers serve did not start in five minutes")
        if process.poll() is not None: pytest.fail(f"transformers serve ended: {(folder/'log').read_text()[-2000:]}")
        yield str(path), f"http://127.0.0.1:{port}/v1"
    finally:
        process.terminate()
        try: process.wait(10)
        except subprocess.TimeoutExpired: process.kill()
        log.close()


class TestTransformersServe:
    def test_greedy_is_the_local_answer(self, local, served):
        with ServerChat(*served) as chat:
            assert isinstance(chat, Chat)
            want = "<think>heads</think><answer>heads</answer>"
            assert local.generate(ASK, max_tokens=12, temperature=0.) == chat.generate(ASK, max_tokens=12, temperature=0.) == [want]
            assert chat.generate(ASK, max_tokens=2, temperature=0.) == local.generate(ASK, max_tokens=2, temperature=0.) == ["<think>heads"]

    def test_stop_is_cut_alike(self, local, served):
        with ServerChat(*served) as chat:
            for stop in ("</think>", ["<answer>", "</think>"]):
                assert chat.generate(ASK, max_tokens=12, temperature=0., stop=stop) == local.generate(ASK, max_tokens=12, temperature=0., stop=stop) == ["<think>heads"]

    def test_samples(self, local, served):
        p = math.exp(local.logprobs(ASK, ["<think>heads"])[0])
        assert .5 < p < .9
        with ServerChat(*served) as chat: said = chat.generate(ASK, n=100, max_tokens=2, seed=0)
        share = np.mean([s == "<think>heads" for s in said])
        assert len(said) == 100 and abs(share - p) < 5*math.sqrt(p*(1 - p)/100)

    def test_many_conversations(self, local, served):
        many = [ASK, user("edge"), user("heads"), user("tails. heads")]
        with ServerChat(*served, concurrency=4) as chat:
            assert chat.generate_many(many, n=2, max_tokens=6, temperature=0.) == local.generate_many(many, n=2, max_tokens=6, temperature=0.)

    def test_what_it_does_not_know_is_said(self, served):
        with ServerChat(*served) as chat:
            with pytest.raises(ChatError, match="returns no log-probabilities.*use LocalChat"): chat.logprobs(ASK, ["heads"])
        with ServerChat(*served, batch_n=True) as chat:
            with pytest.raises(ChatError, match="asked for 3 choices in one request, got 1"): chat.generate(ASK, n=3, max_tokens=2)

    def test_our_mistakes_come_back_at_once(self, served):
        with ServerChat("another", served[1]) as chat:
            with pytest.raises(ChatError, match="after 1 attempt: BadRequestError.*pinned"): chat.generate(ASK)
        with ServerChat(*served, extra_body={"nonsense": 1}) as chat:
            with pytest.raises(ChatError, match="after 1 attempt: UnprocessableEntityError.*nonsense"): chat.generate(ASK)


# ------------------------------------------------------------------------------------------------ a misbehaving server

HALF = b'{"id": "0", "choices": [{"index": 0, "message": {"role": "assi'
PASSING = {
    "busy": Reply("busy", 429), "busy, in words": Reply({"error": {"message": "slow down", "code": "rate_limit_exceeded"}}, 429),
    "timeout": Reply("", 408), "conflict": Reply("", 409), "error": Reply("oops", 500), "gateway": Reply(b"<html>bad gateway</html>", 502, {"content-type": "text/html"}),
    "overloaded": Reply("", 529), "dropped": Reply("hello", cut=40), "dropped at once": Reply("hello", cut=0),
    "half a JSON": Reply(HALF), "not a JSON": Reply(b"<html>", headers={"content-type": "text/html"}), "empty": Reply(b""), "null": Reply(b"null"),
    "a list": Reply(b"[]"), "no choices": Reply({}), "empty choices": Reply({"choices": []}), "choices null": Reply({"choices": None}),
    "choice null": Reply({"choices": [None]}), "no message": Reply({"choices": [{"index": 0}]}), "message null": Reply({"choices": [{"index": 0, "message": None}]}),
    "content is a number": Reply({"choices": [{"index": 0, "message": {"role": "assistant", "content": 7}}]}),
    "not UTF-8": Reply(b'{"choices": "\xff\xfe"}'),
}
FINAL = {
    "bad request": (Reply({"error": {"message": "context too long"}}, 400), "context too long"), "unauthorised": (Reply("", 401), "401"),
    "forbidden": (Reply("", 403), "403"), "unknown model": (Reply({"error": {"message": "no such model"}}, 404), "no such model"),
    "invalid": (Reply({"detail": "bad field"}, 422), "bad field"),
    "quota": (Reply({"error": {"message": "quota exceeded", "code": "insufficient_quota"}}, 429), "quota exceeded"),
    "an hour": (Reply("", 429, {"retry-after": "3600"}), "429"),
}


class TestFaults:
    @pytest.mark.parametrize("name", PASSING)
    def test_what_passes_is_tried_again(self, name):
        with ScriptedServer(PASSING[name], PASSING[name], "hello") as server, ServerChat("m", server.base_url, **QUICK) as chat:
            assert chat.generate(ASK) == ["hello"]
            assert len(server.requests) == 3

    @pytest.mark.parametrize("name", FINAL)
    def test_what_does_not_is_not(self, name):
        reply, says = FINAL[name]
        with ScriptedServer(reply) as server, ServerChat("m", server.base_url, **QUICK) as chat:
            with pytest.raises(ChatError, match=f"chat completion at {server.base_url} failed after 1 attempt: .*{says}"): chat.generate(ASK)
            assert len(server.requests) == 1

    @pytest.mark.parametrize("name", ["busy", "dropped", "half a JSON", "no choices"])
    def test_patience_ends(self, name):
        with ScriptedServer(PASSING[name]) as server, ServerChat("m", server.base_url, **QUICK) as chat:
            with pytest.raises(ChatError, match=f"{server.base_url} failed after 4 attempts: ") as e: chat.generate(ASK)
            assert len(server.requests) == 4 and e.value.__cause__ is not None

    @pytest.mark.parametrize("reply", [Reply("late", delay=60), Reply("late", drip=.2)], ids=["stalls", "drips"])
    def test_a_stall_runs_out_of_time(self, reply):
        with ScriptedServer(reply) as server, ServerChat("m", server.base_url, timeout=.5, max_retries=1, backoff_base=.01) as chat:
            start = time.monotonic()
            with pytest.raises(ChatError, match="after 2 attempts: no reply within 0.5 s"): chat.generate(ASK)
            assert 1. <= time.monotonic() - start < 5.

    def test_nobody_there(self):
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))                 # bound but not listening: connections are refused
            url = f"http://user:secret@127.0.0.1:{s.getsockname()[1]}/v1"
            with ServerChat("m", url, api_key="sk-secret", **QUICK) as chat:
                with pytest.raises(ChatError, match="after 4 attempts: APIConnectionError") as e: chat.generate(ASK)
        assert "secret" not in str(e.value)

    @pytest.mark.parametrize("header", [{"retry-after": "1"}, {"retry-after-ms": "1000"}])
    def test_a_server_that_names_a_time_is_obeyed(self, header):
        with ScriptedServer(Reply("", 429, header), "hello") as server, ServerChat("m", server.base_url, **QUICK) as chat:
            chat.generate(ASK)
            assert 1. <= server.times[1] - server.times[0] < 2.5

    def test_and_by_every_request(self):
        "A 429 to one request pauses all that have not started"
        with ScriptedServer(Reply("", 429, {"retry-after-ms": "800"}), "hello") as server, ServerChat("m", server.base_url, concurrency=1, **QUICK) as chat:
            asking = [threading.Thread(target=chat.generate, args=(ASK,)) for _ in range(3)]
            for t in asking: t.start()
            for t in asking: t.join()
            first, *others = sorted(server.times)
            assert len(others) == 3 and min(others) - first >= .8

    def test_waits_double(self):
        "What the client decides to wait doubles, and that long it waits at least; how much longer is the machine's affair"
        with ScriptedServer(Reply("", 503)) as server, ServerChat("m", server.base_url, timeout=5., max_retries=3, backoff_base=.2) as chat:
            decided, wait = [], chat._wait
            chat._wait = lambda *a: decided.append(wait(*a)) or decided[-1]
            with pytest.raises(ChatError): chat.generate(ASK)
            gaps = np.diff(server.times)
        assert len(gaps) == 3 and len(decided) >= 3
        for gap, d, full in zip(gaps, decided, (.2, .4, .8)): assert full/2 <= d <= full and gap >= d - .01     # clocks tick in milliseconds

    def test_one_failure_keeps_what_is_finished(self):
        answer = lambda r: Reply("no", 400) if r["messages"][0]["content"] == "bad" else "fine " + r["messages"][0]["content"]
        with ScriptedServer(answer) as server, ServerChat("m", server.base_url, concurrency=1, **QUICK) as chat:
            with pytest.raises(ChatError) as e: chat.generate_many([user("a"), user("b"), user("bad"), user("c")], n=2)
            assert e.value.finished == {0: ["fine a"]*2, 1: ["fine b"]*2}
            assert len(server.requests) <= 6, "nothing is started after the failure"
            assert chat.generate(user("d")) == ["fine d"], "the client is still good"

    def test_an_error_in_the_request_is_ours(self):
        with ScriptedServer("hello") as server, ServerChat("m", server.base_url) as chat:
            for bad in ("Coin?", [], [{"role": "user"}], [{"role": "user", "content": None}], None):
                with pytest.raises(ValueError, match="messages must be"): chat.generate(bad)
            with pytest.raises(ValueError, match="the last message is the assistant's"): chat.generate([*ASK, {"role": "assistant", "content": "he"}])
            with pytest.raises(ValueError, match="n must be"): chat.generate(ASK, n=0)
            with pytest.raises(ValueError, match="options must be"): chat.logprobs(ASK, "yes")
            assert not server.requests
        for kw in (dict(timeout=0), dict(max_retries=-1), dict(concurrency=0), dict(rate_limit=0)):
            with pytest.raises(ValueError, match="must be positive"): ServerChat("m", "http://127.0.0.1:1/v1", **kw)

    def test_without_the_package_the_extra_is_named(self, monkeypatch):
        monkeypatch.setitem(sys.modules, "openai", None)
        with pytest.raises(ImportError, match=r"pip install 'rlcr-suite\[serve\]'"): ServerChat("m")


class TestClient:
    def test_what_is_sent(self):
        with ScriptedServer("hello") as server, ServerChat("m", server.base_url, extra_body={"top_k": 5}, **QUICK) as chat:
            chat.generate(ASK, max_tokens=7, temperature=.5, seed=3, stop="!")
            chat.generate(ASK)
        first, second = server.requests
        assert first.pop("seed") >= 0
        assert first == {"path": "/v1/chat/completions", "model": "m", "messages": ASK, "max_tokens": 7, "temperature": .5, "stop": ["!"], "top_k": 5}
        assert set(second) == {"path", "model", "messages", "max_tokens", "temperature", "top_k"}

    def test_seeds_differ_within_a_call_and_repeat_across_calls(self):
        with ScriptedServer("hello") as server, ServerChat("m", server.base_url, **QUICK) as chat:
            for _ in range(2): chat.generate_many([ASK, ASK], n=3, seed=1)
        seeds = [r["seed"] for r in server.requests]
        assert sorted(seeds[:6]) == sorted(seeds[6:]) and len(set(seeds)) == 6 and all(0 <= s < 2**31 for s in seeds)

    def test_batch_n(self):
        three = lambda r: {"choices": [{"index": i, "message": {"role": "assistant", "content": f"t{i}"}} for i in range(r["n"])]}
        with ScriptedServer(three) as server, ServerChat("m", server.base_url, batch_n=True, **QUICK) as chat:
            assert chat.generate_many([ASK, ASK], n=3) == [["t0", "t1", "t2"]]*2
            assert len(server.requests) == 2

    def test_empty_content_is_an_empty_text(self):
        with ScriptedServer({"choices": [{"index": 0, "message": {"role": "assistant", "content": None}}]}) as server, ServerChat("m", server.base_url, **QUICK) as chat:
            assert chat.generate(ASK) == [""]

    def test_concurrency_is_bounded(self):
        busy, most, lock = [0], [0], threading.Lock()
        def answer(_):
            with lock: busy[0] += 1; most[0] = max(most[0], busy[0])
            time.sleep(.05)
            with lock: busy[0] -= 1
            return "ok"
        with ScriptedServer(answer) as server, ServerChat("m", server.base_url, concurrency=3, timeout=20.) as chat: chat.generate(ASK, n=12)
        assert most[0] == 3

    def test_rate_limit(self):
        with ScriptedServer("ok") as server, ServerChat("m", server.base_url, rate_limit=20., concurrency=10, timeout=20.) as chat: chat.generate(ASK, n=11)
        assert max(server.times) - min(server.times) >= 10/20 - .05       # the first may reach the server a little late

    def test_from_a_running_loop_and_from_threads(self):
        import asyncio
        with ScriptedServer("ok") as server, ServerChat("m", server.base_url, **QUICK) as chat:
            async def notebook(): return chat.generate(ASK)
            assert asyncio.run(notebook()) == ["ok"]
            got = []
            threads = [threading.Thread(target=lambda: got.append(chat.generate(ASK))) for _ in range(8)]
            for t in threads: t.start()
            for t in threads: t.join()
            assert got == [["ok"]]*8

    def test_backoff(self):
        rng = random.Random(0)
        for k in range(1, 12):
            waits = [backoff(k, .5, 60., rng) for _ in range(200)]
            full = min(60., .5*2**(k - 1))
            assert full/2 <= min(waits) < .55*full and .95*full < max(waits) <= full
        assert backoff(10**9, longest=3.) <= 3.

    def test_retry_after(self):
        assert retry_after({"retry-after": "Wed, 21 Oct 2015 07:28:00 GMT"}, now=1445412470.) == 10.
        for bad in ("", "soon", "-1", "1e999", "nan", "Wed, 99 Oct 2015", "Wed, 21 Oct 2015 07:28:00 GMT"): assert retry_after({"retry-after": bad}) is None


class TestLogprobs:
    def test_local(self, local):
        lp = local.logprobs(ASK, ["<think>heads</think>", "<think>tails</think>", "<think>"])
        assert abs(math.exp(lp[0]) - .7) < .05 and abs(math.exp(lp[1]) - .3) < .05
        assert lp[2] - .1 < np.logaddexp(lp[0], lp[1]) < lp[2] + 1e-5     # two ways to go on: nearly all there are, and never more than all

    def answer(self, local, extra):
        "A server that scores with the local model; `extra` tokens are made up after the prompt"
        tok = local.tok
        def reply(request):
            ids = tok(request["prompt"])["input_ids"] + [tok.eos_token_id]*extra
            with torch.no_grad(): lp = torch.log_softmax(local.model(torch.tensor([ids])).logits[0], -1)
            scores = [None] + [lp[t, k].item() for t, k in enumerate(ids[1:])]
            return {"choices": [{"index": 0, "text": "", "finish_reason": "length", "logprobs": {"tokens": [tok.decode([i]) for i in ids], "token_logprobs": scores}}],
                    "usage": {"prompt_tokens": len(ids) - extra, "completion_tokens": extra, "total_tokens": len(ids)}}
        return reply

    @pytest.mark.parametrize("extra", [0, 1])
    def test_scored_by_echo(self, local, extra):
        options = ["heads", "<think>heads</think>", "tails heads"]
        with ScriptedServer(self.answer(local, extra)) as server, ServerChat("m", server.base_url, tokenizer=local.tok, **QUICK) as chat:
            np.testing.assert_allclose(chat.logprobs(ASK, options), local.logprobs(ASK, options), atol=1e-5)

    def test_a_server_that_does_not_echo(self, local):
        reply = {"choices": [{"index": 0, "text": "x", "finish_reason": "length", "logprobs": {"tokens": ["x"], "token_logprobs": [-1.]}}],
                 "usage": {"prompt_tokens": 4, "completion_tokens": 1, "total_tokens": 5}}
        with ScriptedServer(reply) as server, ServerChat("m", server.base_url, tokenizer=local.tok, **QUICK) as chat:
            with pytest.raises(ChatError, match="instead of 'heads': does it echo"): chat.logprobs(ASK, ["heads"])
            assert len(server.requests) == 1

    def test_read_from_the_likeliest(self):
        top = [{"token": t, "logprob": lp, "bytes": None} for t, lp in (("yes", -.1), ("no", -2.5))]
        reply = {"choices": [{"index": 0, "finish_reason": "length", "message": {"role": "assistant", "content": "yes"}, "logprobs": {"content": [top[0] | {"top_logprobs": top}]}}]}
        with ScriptedServer(reply) as server, ServerChat("m", server.base_url, **QUICK) as chat:
            assert chat.logprobs(ASK, ["no", "yes"]).tolist() == [-2.5, -.1]
            with pytest.raises(ChatError, match="'maybe' is not among the 2 likeliest"): chat.logprobs(ASK, ["yes", "maybe"])


# ------------------------------------------------------------------------------------------------ structured answers

SCHEMA = {"type": "object", "required": ["confidence"], "additionalProperties": False,
          "properties": {"confidence": {"type": "number", "minimum": 0, "maximum": 1}}}


class TestStructured:
    def test_asked_again_with_the_error(self):
        with ScriptedServer("about 85%", '```json\n{"confidence": 85}\n```', 'Then: {"confidence": 0.85}') as server, ServerChat("m", server.base_url, **QUICK) as chat:
            assert chat.structured(ASK, SCHEMA) == {"confidence": .85}
        first, second, third = (r["messages"] for r in server.requests)
        assert len(first) == 1 and json.dumps(SCHEMA) in first[0]["content"] and first[0]["content"].startswith("Coin?")
        assert second[:-2] == first and second[1] == {"role": "assistant", "content": "about 85%"} and "no JSON" in second[2]["content"]
        assert "85 is greater than the maximum of 1" in third[-1]["content"]
        assert all(r["temperature"] == 0 for r in server.requests)

    def test_gives_up(self):
        with ScriptedServer("{}") as server, ServerChat("m", server.base_url, **QUICK) as chat:
            with pytest.raises(ChatError, match="no answer fits the schema after 2 attempts.*'confidence' is a required property"): chat.structured(ASK, SCHEMA, retries=1)
            assert len(server.requests) == 2

    def test_local_models_too(self, local):
        with pytest.raises(ChatError, match="after 1 attempts"): local.structured(ASK, SCHEMA, retries=0, max_tokens=8)

    def test_a_bad_schema_is_our_mistake(self):
        with ScriptedServer("{}") as server, ServerChat("m", server.base_url) as chat:
            with pytest.raises(ValueError, match="not a JSON schema"): chat.structured(ASK, {"type": "novel"})
            assert not server.requests

    def test_references_to_other_hosts_are_not_followed(self):
        with ScriptedServer({"type": "object"}) as other, ScriptedServer("{}") as server, ServerChat("m", server.base_url, **QUICK) as chat:
            with pytest.raises(Exception, match="(?i)unresolvable|unretrievable"): chat.structured(ASK, {"$ref": other.base_url + "/schema.json"})
            assert not other.requests

    @settings(max_examples=100, deadline=None)
    @given(st.recursive(st.integers(-9, 9) | st.text(), lambda x: st.lists(x, max_size=3) | st.dictionaries(st.text(), x, max_size=3)).filter(lambda v: isinstance(v, (dict, list))),
           st.sampled_from(["{}", "Sure.\n```json\n{}\n```\nBye", "Sure: {} and so on", "\n {} \n"]))
    def test_json_is_found_wherever_it_stands(self, value, frame):
        assert parse_json(frame.replace("{}", json.dumps(value))) == value

    @settings(max_examples=200, deadline=None)
    @given(st.text(alphabet='{}[]",:01 \nx`'))
    def test_garbage_is_a_value_error_or_a_value(self, text):
        try: json.dumps(parse_json(text), allow_nan=False)
        except ValueError as e: assert "no JSON" in str(e)

    @pytest.mark.parametrize("text", ["["*1_000_000, "{"*1_000_000, '{"a":'*200_000, '{"a": "' + "x"*1_000_000, "[1,"*300_000, "```json\n"*100_000, "[" + "9"*1_000_000, "x"*1_000_000],
                             ids=["lists", "braces", "objects", "text", "numbers", "fences", "digits", "letters"])
    def test_a_megabyte_of_garbage_is_quick(self, text):
        start = time.process_time()
        with pytest.raises(ValueError, match="no JSON"): parse_json(text)
        assert time.process_time() - start < 2.

    def test_nan_is_not_json(self):
        for text in ('{"a": NaN}', "[Infinity]", "-Infinity"):
            with pytest.raises(ValueError, match="no JSON"): parse_json(text)


# ------------------------------------------------------------------------------------------------ evaluations that resume

WORKER = """
import sys
from rlcr_suite.core.chat import ServerChat, map_jsonl
url, path = sys.argv[1:]
with ServerChat("m", url, concurrency=2) as chat:
    ask = lambda i: chat.generate([{"role": "user", "content": str(i)}])[0]
    map_jsonl(range(40), ask, path, concurrency=2)
"""


class TestMapJsonl:
    def test_killed_and_resumed(self, tmp_path):
        "A real kill -9, twice, with a server that answers slowly: nothing finished is asked for again"
        path = tmp_path/"answers.jsonl"
        asked = []
        def answer(request):
            asked.append(int(request["messages"][0]["content"]))
            time.sleep(.03)
            return "answer " + request["messages"][0]["content"]
        with ScriptedServer(answer) as server:
            run = [sys.executable, "-c", WORKER, server.base_url, str(path)]
            for rows in (8, 20):
                process = subprocess.Popen(run)
                while (path.read_bytes().count(b"\n") if path.exists() else 0) < rows and process.poll() is None: time.sleep(.005)
                process.send_signal(signal.SIGKILL)
                assert process.wait() == -signal.SIGKILL, "the worker was to be killed in the middle"
            with open(path, "ab") as f: f.write(b'{"key": "torn')                  # and, at worst, half a row
            before = {r["key"]: r["value"] for r in [json.loads(l) for l in path.read_bytes().split(b"\n")[:-1]]}
            assert 20 <= len(before) < 40
            asked.clear()
            subprocess.run(run, check=True, stderr=subprocess.DEVNULL)
        assert sorted(asked) == sorted(i for i in range(40) if item_key(i) not in before)
        rows = jsonl_read(path)
        assert {r["key"]: r["value"] for r in rows} == {item_key(i): f"answer {i}" for i in range(40)} and len(rows) == 40

    @pytest.mark.parametrize("concurrency", [1, 4])
    def test_an_error_keeps_what_is_done(self, tmp_path, concurrency):
        fail, calls = [True], []
        def fn(x):
            calls.append(x)
            if x == 6 and fail[0]: raise RuntimeError("crash")
            return x*x
        with pytest.raises(RuntimeError, match="crash"): map_jsonl(range(12), fn, tmp_path/"a", concurrency=concurrency)
        done = {r["key"] for r in jsonl_read(tmp_path/"a")}
        assert done == {item_key(x) for x in calls if x != 6} and len(done) >= 6 - concurrency
        fail[0] = False
        assert map_jsonl(range(12), fn, tmp_path/"a", concurrency=concurrency) == [x*x for x in range(12)]
        assert sorted(calls) == sorted([*range(12), 6])

    def test_resumed_values_equal_fresh_ones(self, tmp_path):
        fn = lambda x: {"pair": (x, str(x)), 1: "key"}                 # JSON makes a list of the tuple and a text of the key
        fresh = map_jsonl([1, 2], fn, tmp_path/"a")
        assert fresh == map_jsonl([1, 2], fn, tmp_path/"a") == [{"pair": [x, str(x)], "1": "key"} for x in (1, 2)]

    def test_order_is_that_of_the_items(self, tmp_path):
        fn = lambda x: (time.sleep(.02*(5 - x)), x)[1]
        assert map_jsonl(range(5), fn, tmp_path/"a", concurrency=5) == list(range(5))
        assert map_jsonl([4, 0], fn, tmp_path/"a") == [4, 0]

    def test_more_items_later(self, tmp_path):
        calls = []
        fn = lambda x: calls.append(x) or x
        map_jsonl(["a", "b"], fn, tmp_path/"a")
        assert map_jsonl(["c", "a", "b"], fn, tmp_path/"a", progress=False) == ["c", "a", "b"] and calls == ["a", "b", "c"]

    def test_keys(self, tmp_path):
        with pytest.raises(ValueError, match="2 items but 1 keys"): map_jsonl(["a", "a"], str, tmp_path/"a")
        assert map_jsonl([("a", 1), ("a", 2)], list, tmp_path/"a", key=lambda x: f"{x[0]}-{x[1]}") == [["a", 1], ["a", 2]]
        assert item_key({"a": 1, "b": 2}) == item_key({"b": 2, "a": 1}) != item_key({"a": 1, "b": "2"})

    def test_what_json_cannot_hold(self, tmp_path):
        with pytest.raises(ValueError, match="not JSON"): map_jsonl([1, 2], lambda x: float("nan") if x == 2 else x, tmp_path/"a")
        assert [r["value"] for r in jsonl_read(tmp_path/"a")] == [1]

    def test_two_writers(self, tmp_path):
        with pytest.raises(ValueError, match="another process is writing"):
            map_jsonl([1], lambda x: map_jsonl([2], str, tmp_path/"a"), tmp_path/"a")
        assert map_jsonl([1], str, tmp_path/"a") == ["1"], "the lock ends with its owner"
