"core.lm: round trips, exact generation, log-probabilities, checkpoints that survive a crash."
import math, os, pickle
from pathlib import Path
import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from transformers import (AutoModelForCausalLM, Gemma2Config, GPT2Config, LlamaConfig, MistralConfig, OPTConfig, Qwen2Config)
from rlcr_suite.core.lm import (byte_tokenizer, generate, left_pad, load, num_parameters, pick, prompt_ids, save, sequence_logprobs, tiny_lm,
                                word_tokenizer)

TAGS = ["<think>", "</think>", "<answer>", "</answer>", "<confidence>", "</confidence>"]
TOK = word_tokenizer(["Sensors: red red green. Which colour? none blue", "Größe 水"], specials=TAGS)
ASK = [{"role": "user", "content": "Sensors: red green. Which colour?"}]
PROMPTS = ["red", "Sensors: red red green blue. Which colour?", ASK, "none none none", [{"role": "system", "content": "none"}, *ASK]]
ATOL = 2e-5      # float32 sums in another order: batched against alone, cached against uncached


@pytest.fixture(scope="module")
def model(): return tiny_lm(TOK, hidden_size=48, layers=2, heads=4, intermediate_size=64, seed=1)


def spiced(model, scale=6.):
    "Make the logits of a fresh model far from uniform, so that no greedy choice is a near tie"
    with torch.no_grad(): model.get_output_embeddings().weight.mul_(scale)
    return model


def of(config, **kw):
    "A fresh small model of another architecture, with this file's tokenizer"
    torch.manual_seed(0)
    fields = dict(vocab_size=len(TOK), hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48, max_position_embeddings=128,
                  pad_token_id=TOK.pad_token_id, eos_token_id=TOK.eos_token_id, bos_token_id=None)
    return spiced(AutoModelForCausalLM.from_config(config(**(fields | kw))).eval())


ARCHITECTURES = {
    "llama, grouped heads": lambda: of(LlamaConfig, num_key_value_heads=2),
    "gpt2, learned positions": lambda: of(GPT2Config, n_positions=128),
    "opt, shifted positions": lambda: of(OPTConfig, ffn_dim=48, word_embed_proj_dim=32),
    "qwen2": lambda: of(Qwen2Config, num_key_value_heads=4),
    "mistral, sliding window": lambda: of(MistralConfig, num_key_value_heads=2, sliding_window=6),
    "gemma2, mixed windows": lambda: of(Gemma2Config, num_key_value_heads=2, head_dim=8, sliding_window=6),
}


class TestTokenizer:
    @settings(max_examples=200, deadline=None)
    @given(st.lists(st.sampled_from(["red", "green", "Sensors", "Größe", "水", " ", "  ", "\n", ".", ":", "?", "0", "42", *TAGS])).map("".join))
    def test_round_trip_of_known_text(self, text):
        ids = TOK(text)["input_ids"]
        # words that run together, "redgreen", are one unknown word: the only way such a text is lost
        if TOK.unk_token_id in ids: return
        assert TOK.decode(ids) == TOK.decode(ids, skip_special_tokens=True) == text

    @settings(max_examples=200, deadline=None)
    @given(st.lists(st.sampled_from(["red", "Sensors", "水", "0", "42", *TAGS, ".", ":"])), st.sampled_from([" ", "  ", "\n", " \n "]))
    def test_nothing_known_is_unknown(self, words, space):
        assert TOK.unk_token_id not in TOK(space.join(words))["input_ids"]

    @settings(max_examples=300, deadline=None)
    @given(st.text(alphabet=st.characters(exclude_categories=["Cs"])))
    def test_bytes_hold_any_text(self, text):
        tok = byte_tokenizer(TAGS)
        if any(t in text for t in tok.all_special_tokens): return
        assert tok.decode(tok(text)["input_ids"], skip_special_tokens=True) == text

    def test_tags_are_single_and_kept_control_tokens_are_dropped(self):
        text = "<user>red<assistant><think> red</think><confidence>0.85</confidence><eos><pad>"
        ids = TOK(text)["input_ids"]
        assert TOK.convert_ids_to_tokens(ids) == ["<user>", "red", "<assistant>", "<think>", " red", "</think>", "<confidence>", "0", ".", "8", "5",
                                                  "</confidence>", "<eos>", "<pad>"]
        assert TOK.decode(ids, skip_special_tokens=True) == "red<think> red</think><confidence>0.85</confidence>"

    def test_unknown_words(self):
        assert TOK.convert_ids_to_tokens(TOK("red purple.")["input_ids"]) == ["red", "<unk>", "."]

    def test_the_vocabulary_does_not_depend_on_repetition(self):
        assert word_tokenizer(["a b", "b a b"]).get_vocab() == word_tokenizer(["a b"]).get_vocab()
        assert len(set(TOK.get_vocab().values())) == len(TOK) == max(TOK.get_vocab().values()) + 1

    def test_template(self):
        talk = [{"role": "system", "content": "none"}, *ASK, {"role": "assistant", "content": "red"}, {"role": "user", "content": "blue"}]
        assert TOK.apply_chat_template(talk, tokenize=False) == "<system>none<user>Sensors: red green. Which colour?<assistant>red<eos><user>blue"
        prompt = TOK.apply_chat_template(ASK, tokenize=False, add_generation_prompt=True)
        assert TOK.apply_chat_template(talk[1:3], tokenize=False) == prompt + "red<eos>"
        with pytest.raises(Exception, match="unknown role: oracle"): TOK.apply_chat_template([{"role": "oracle", "content": ""}])

    def test_no_merging_across_the_prompt(self):
        "Prompt and completion tokenized apart are the conversation tokenized at once, which finetuning relies on"
        for said in ("red", " red", "<answer>red</answer>", "42"):
            whole = TOK.apply_chat_template([*ASK, {"role": "assistant", "content": said}], return_dict=True)["input_ids"]
            assert prompt_ids(TOK, [ASK])[0] + TOK(said)["input_ids"] + [TOK.eos_token_id] == whole

    def test_saved_and_loaded(self, model, tmp_path):
        _, tok = load(save(model, TOK, tmp_path/"m"), device="cpu")
        text = "<think>red 水</think>\n 0.85"
        assert tok(text)["input_ids"] == TOK(text)["input_ids"] and tok.decode(tok(text)["input_ids"]) == text
        assert tok.chat_template == TOK.chat_template and tok.padding_side == "left"
        assert (tok.pad_token, tok.eos_token, tok.unk_token) == ("<pad>", "<eos>", "<unk>")


class TestModel:
    def test_seeds(self):
        a, b, c = (tiny_lm(TOK, seed=s).lm_head.weight for s in (0, 0, 1))
        assert torch.equal(a, b) and not torch.equal(a, c)

    def test_the_global_random_state_is_left_alone(self, model):
        state, npstate = torch.random.get_rng_state(), np.random.get_state()[1].copy()
        tiny_lm(TOK, seed=5)
        generate(model, TOK, ["red"], n=3, max_new_tokens=4, seed=5)
        assert torch.equal(torch.random.get_rng_state(), state) and (np.random.get_state()[1] == npstate).all()

    def test_impossible_heads(self):
        with pytest.raises(ValueError, match="hidden_size/heads must be an even whole number"): tiny_lm(TOK, hidden_size=50, heads=4)
        with pytest.raises(ValueError, match="even whole"): tiny_lm(TOK, hidden_size=12, heads=4)

    def test_the_server_samples_the_whole_distribution(self, model):
        assert model.generation_config.top_k == 0 and model.generation_config.do_sample

    def test_parameters(self, model):
        total = num_parameters(model)
        assert total == sum(p.numel() for p in {id(p): p for p in model.parameters()}.values())
        frozen = tiny_lm(TOK)
        frozen.model.embed_tokens.weight.requires_grad_(False)
        assert num_parameters(frozen) - num_parameters(frozen, trainable=True) == frozen.model.embed_tokens.weight.numel()


def reference(model, p, **kw):
    "transformers' own generation of one prompt alone"
    x = torch.tensor(prompt_ids(TOK, [p]))
    y = model.generate(x, attention_mask=torch.ones_like(x), do_sample=False, pad_token_id=TOK.pad_token_id, max_new_tokens=14, **kw)
    return TOK.decode(y[0, x.shape[1]:], skip_special_tokens=True)


class TestGenerate:
    @pytest.mark.parametrize("name", ARCHITECTURES)
    def test_greedy_is_that_of_transformers(self, name):
        model = ARCHITECTURES[name]()
        want = [[reference(model, p)] for p in PROMPTS]
        assert len({w[0] for w in want}) > 1, "the prompts must matter for this to test anything"
        assert generate(model, TOK, PROMPTS, max_new_tokens=14, temperature=0) == want

    def test_neither_batch_nor_order_changes_greedy(self, model):
        alone = [generate(model, TOK, [p], max_new_tokens=14, temperature=0)[0] for p in PROMPTS]
        assert generate(model, TOK, PROMPTS, max_new_tokens=14, temperature=0) == alone
        assert generate(model, TOK, PROMPTS[::-1], max_new_tokens=14, temperature=0) == alone[::-1]

    @pytest.mark.parametrize("batch_size", [1, 2, 3, 7, 100])
    def test_the_batch_size_changes_no_sample(self, model, batch_size):
        want = generate(model, TOK, PROMPTS, n=5, max_new_tokens=14, seed=3)
        assert generate(model, TOK, PROMPTS, n=5, max_new_tokens=14, seed=3, batch_size=batch_size) == want

    def test_seed_and_shape(self, model):
        a, b, c = (generate(model, TOK, PROMPTS, n=4, max_new_tokens=9, seed=s) for s in (1, 1, 2))
        assert a == b != c
        assert len(a) == len(PROMPTS) and all(len(r) == 4 for r in a)
        assert len({t for r in a for t in r}) > 10

    def test_rows_end_on_their_own(self):
        "Ends at different steps, so that rows leave the batch; each row as if it were alone, its own position included"
        model = ARCHITECTURES["gpt2, learned positions"]()
        with torch.no_grad(): model.transformer.wpe.weight.mul_(20)                # every position matters
        model.generation_config.eos_token_id = [TOK.eos_token_id, *range(20, 30)]  # about a sixth of the vocabulary ends a text
        rows = generate(model, TOK, PROMPTS, n=40, max_new_tokens=30, seed=0)
        lengths = [len(TOK(t)["input_ids"]) for r in rows for t in r]
        assert max(lengths) > 3*np.median(lengths) > 0
        assert generate(model, TOK, PROMPTS, n=40, max_new_tokens=30, seed=0, batch_size=1) == rows

    def test_every_end_token_counts(self, model):
        first = TOK(generate(model, TOK, ["red"], max_new_tokens=1, temperature=0)[0][0])["input_ids"]
        model.generation_config.eos_token_id = [TOK.eos_token_id, *first]
        try: assert len(TOK(generate(model, TOK, ["red"], max_new_tokens=14, temperature=0)[0][0])["input_ids"]) <= 1
        finally: model.generation_config.eos_token_id = TOK.eos_token_id

    @pytest.mark.parametrize("temperature", [.5, 1., 2.])
    def test_samples_follow_the_softmax(self, temperature):
        from scipy.stats import chisquare
        model = spiced(tiny_lm(TOK, hidden_size=48, seed=1))
        with torch.no_grad(): p = torch.softmax(model(torch.tensor(prompt_ids(TOK, ["red"]))).logits[0, -1].double()/temperature, -1).numpy()
        N, keep = 4000, p*4000 > 5
        said = generate(model, TOK, ["red"], n=N, max_new_tokens=1, temperature=temperature, seed=0)[0]
        names = [TOK.decode([i], skip_special_tokens=True) for i in range(len(TOK))]
        count = np.array([sum(t == names[i] for t in said) for i in np.flatnonzero(keep) if names[i]])
        want = np.array([p[i]*N for i in np.flatnonzero(keep) if names[i]])
        assert len(count) > 4
        # one seeded draw; a right sampler fails with probability 10^-4, once and for all
        assert chisquare([*count, N - count.sum()], [*want, N - want.sum()]).pvalue > 1e-4

    def test_an_open_assistant_turn_is_continued(self, model):
        open_turn = [*ASK, {"role": "assistant", "content": "<think>red"}]
        text = TOK.apply_chat_template(ASK, tokenize=False, add_generation_prompt=True) + "<think>red"
        assert generate(model, TOK, [open_turn], n=3, seed=1, max_new_tokens=8) == generate(model, TOK, [text], n=3, seed=1, max_new_tokens=8)

    def test_the_mode_of_the_model_is_restored(self):
        model = tiny_lm(TOK, attention_dropout=.5).train()
        a = generate(model, TOK, ["red"], n=4, seed=0)
        assert model.training and a == generate(model, TOK, ["red"], n=4, seed=0)
        with pytest.raises(ValueError): generate(model, TOK, ["red"], max_new_tokens=1000)
        assert model.training

    @pytest.mark.parametrize("kw, says", [
        (dict(prompts="red"), "list of prompts, got one string"), (dict(prompts=["red", ""]), "prompt 1 has no tokens"),
        (dict(prompts=[[]]), "prompt 0 has no tokens"), (dict(n=0), "at least 1"), (dict(temperature=-1.), "temperature"),
        (dict(temperature=float("nan")), "temperature"), (dict(max_new_tokens=128), "a prompt of 1 tokens and 128 new ones exceed the model's 128 positions")])
    def test_errors(self, model, kw, says):
        with pytest.raises(ValueError, match=says): generate(model, TOK, **(dict(prompts=["red"]) | kw))

    def test_no_template(self, model):
        with pytest.raises(ValueError, match="no chat_template"): generate(model, word_tokenizer(["red"], chat_template=None), [ASK])

    def test_no_prompts(self, model): assert generate(model, TOK, []) == []

    @settings(max_examples=100, deadline=None)
    @given(st.lists(st.floats(-30, 30), min_size=1, max_size=30), st.floats(0, 1, exclude_max=True), st.sampled_from([.1, 1., 5.]))
    def test_inversion(self, logits, u, t):
        p = torch.softmax(torch.tensor([logits], dtype=torch.float64)/t, -1)[0]
        k = pick(torch.tensor([logits]), torch.tensor([u], dtype=torch.float64), t).item()
        c = np.concatenate([[0.], np.cumsum(p.numpy())])
        assert c[k] - 1e-6 <= u <= c[k + 1] + 1e-6           # logits arrive as float32

    def test_left_pad(self):
        x, m, p = left_pad([[5], [6, 7, 8]], pad=0)
        assert x.tolist() == [[0, 0, 5], [6, 7, 8]] and m.tolist() == [[0, 0, 1], [1, 1, 1]] and p.tolist() == [[0, 0, 0], [0, 1, 2]]


class TestLogprobs:
    TEXTS = ["red", "<answer>green</answer>", "", "none none.", "42 red red red red"]

    @pytest.mark.parametrize("name", ARCHITECTURES)
    def test_against_one_plain_forward_pass_each(self, name):
        model = ARCHITECTURES[name]()
        got = sequence_logprobs(model, TOK, PROMPTS, self.TEXTS, eos=True, batch_size=3)
        for p, c, lp in zip(PROMPTS, self.TEXTS, got):
            x, y = prompt_ids(TOK, [p])[0], TOK(c)["input_ids"] + [TOK.eos_token_id]
            with torch.no_grad(): want = torch.log_softmax(model(torch.tensor([x + y])).logits[0], -1)
            np.testing.assert_allclose(lp, [want[len(x) + t - 1, k].item() for t, k in enumerate(y)], atol=ATOL)

    def test_lengths(self, model):
        got = sequence_logprobs(model, TOK, PROMPTS, self.TEXTS)
        assert [len(l) for l in got] == [len(TOK(c)["input_ids"]) for c in self.TEXTS]
        with pytest.raises(ValueError, match="5 prompts but 1 completions"): sequence_logprobs(model, TOK, PROMPTS, ["red"])
        with pytest.raises(ValueError, match="exceed"): sequence_logprobs(model, TOK, ["red"], ["red"*1 + " red"*200])
        assert sequence_logprobs(model, TOK, [], []) == []

    def test_it_is_the_distribution_generate_draws_from(self):
        model = spiced(tiny_lm(TOK, hidden_size=48, seed=1))
        texts, count = np.unique(generate(model, TOK, ["red"], n=3000, max_new_tokens=2, seed=0)[0], return_counts=True)
        top = [(t, c) for t, c in sorted(zip(texts, count), key=lambda z: -z[1]) if len(TOK(t)["input_ids"]) == 2][:5]
        for (t, c), lp in zip(top, sequence_logprobs(model, TOK, ["red"]*len(top), [t for t, _ in top])):
            p = math.exp(lp.sum())
            assert abs(c/3000 - p) < 5*math.sqrt(p*(1 - p)/3000)


def dies(fn):
    "Whether a child process that runs `fn` ends by os._exit(9): as abrupt as a kill, at a known place"
    pid = os.fork()
    if pid == 0:
        try: fn()
        finally: os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 9


class TestCheckpoint:
    def test_same_numbers(self, model, tmp_path):
        again, _ = load(save(model, TOK, tmp_path/"deep"/"m"), device="cpu")
        assert not again.training
        assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), again.state_dict().values()))

    @pytest.mark.parametrize("renames", [0, 1])
    def test_killed_while_replacing(self, model, tmp_path, monkeypatch, renames):
        "Die before the first rename, or between the two: what was there is there"
        path, real, calls = save(model, TOK, tmp_path/"m"), Path.rename, []
        def rename(self, to):
            if len(calls) == renames: os._exit(9)
            calls.append(to)
            return real(self, to)
        monkeypatch.setattr(Path, "rename", rename)
        assert dies(lambda: save(tiny_lm(TOK, seed=9), TOK, path))
        monkeypatch.undo()
        again, _ = load(path, device="cpu")
        assert torch.equal(again.lm_head.weight, model.lm_head.weight)
        other = tiny_lm(TOK, seed=9)                                    # and the next save goes through
        assert torch.equal(load(save(other, TOK, path), device="cpu")[0].lm_head.weight, other.lm_head.weight)

    def test_killed_while_writing(self, model, tmp_path, monkeypatch):
        path = save(model, TOK, tmp_path/"m")
        monkeypatch.setattr(type(TOK), "save_pretrained", lambda *a, **k: os._exit(9))
        assert dies(lambda: save(tiny_lm(TOK, seed=9), TOK, path))
        assert torch.equal(load(path, device="cpu")[0].lm_head.weight, model.lm_head.weight)

    def test_an_error_leaves_the_old_one_and_no_rubbish(self, model, tmp_path, monkeypatch):
        path = save(model, TOK, tmp_path/"m")
        def full(*a, **k): raise OSError(28, "No space left on device")
        monkeypatch.setattr(type(TOK), "save_pretrained", full)
        with pytest.raises(OSError): save(tiny_lm(TOK, seed=9), TOK, path)
        assert os.listdir(tmp_path) == ["m"] and load(path, device="cpu")

    def test_not_a_checkpoint(self, tmp_path):
        with pytest.raises(ValueError, match="no config.json"): load(tmp_path)
        with pytest.raises(ValueError, match="no checkpoint at"): load(tmp_path/"missing")

    def test_a_pickle_is_not_executed(self, model, tmp_path):
        path, trace = save(model, TOK, tmp_path/"m"), tmp_path/"executed"
        class Evil:
            def __reduce__(self): return (os.mkdir, (str(trace),))
        (path/"model.safetensors").unlink()
        (path/"pytorch_model.bin").write_bytes(pickle.dumps(Evil()))
        with pytest.raises(Exception): load(path, device="cpu")
        assert not trace.exists()
        torch.save({"lm_head.weight": Evil()}, path/"pytorch_model.bin")
        with pytest.raises(Exception): load(path, device="cpu")
        assert not trace.exists()

    def test_cut_short(self, model, tmp_path):
        path = save(model, TOK, tmp_path/"m")
        weights = path/"model.safetensors"
        weights.write_bytes(weights.read_bytes()[:-100])
        with pytest.raises(Exception, match="(?i)safetensors|incomplete|deserializing|header"): load(path, device="cpu")


class TestTrainers:
    "TRL's trainers take the tokenizer's template as it is"
    ARGS = dict(use_cpu=True, bf16=False, max_steps=1, report_to="none", disable_tqdm=True, save_strategy="no", gradient_checkpointing=False)

    def test_sft_learns_the_completion_only(self, tmp_path):
        from datasets import Dataset
        from trl import SFTConfig, SFTTrainer
        said = "<answer>red</answer>"
        ds = Dataset.from_list([dict(prompt=ASK, completion=[{"role": "assistant", "content": said}])]*4)
        trainer = SFTTrainer(tiny_lm(TOK, hidden_size=16, layers=1, heads=2), SFTConfig(output_dir=str(tmp_path), per_device_train_batch_size=4, **self.ARGS),
                             train_dataset=ds, processing_class=TOK)
        batch = next(iter(trainer.get_train_dataloader()))
        labels = batch["labels"][0]
        assert labels[labels >= 0].tolist() == TOK(said)["input_ids"] + [TOK.eos_token_id]
        ids = batch["input_ids"][0][batch["attention_mask"][0].bool()].tolist()
        assert ids[:len(ids) - int((labels >= 0).sum())] == prompt_ids(TOK, [ASK])[0]

    def test_grpo_rewards_see_tags_and_no_control_tokens(self, tmp_path):
        from datasets import Dataset
        from trl import GRPOConfig, GRPOTrainer
        seen = []
        def reward(prompts, completions, answer, **kwargs):
            seen.extend(zip(prompts, completions, answer))
            return [float(len(c[0]["content"])) for c in completions]
        ds = Dataset.from_list([dict(prompt=ASK, answer="red"), dict(prompt=[{"role": "user", "content": "red"}], answer="blue")])
        model = tiny_lm(TOK, hidden_size=16, layers=1, heads=2)
        before = model.lm_head.weight.detach().clone()
        args = GRPOConfig(output_dir=str(tmp_path), per_device_train_batch_size=8, num_generations=4, max_completion_length=12, beta=0., learning_rate=.1, **self.ARGS)
        GRPOTrainer(model, reward, args=args, train_dataset=ds, processing_class=TOK).train()
        assert len(seen) == 8 and {a for *_, a in seen} == {"red", "blue"}
        texts = [c[0]["content"] for _, c, _ in seen]
        assert all(c[0]["role"] == "assistant" for _, c, _ in seen) and not any(t in x for x in texts for t in TOK.all_special_tokens)
        assert any(tag in x for x in texts for tag in TAGS)
        assert not torch.equal(model.lm_head.weight, before)
