"""rlcr.reward: what the notebook cannot hold: fuzzing, time on large garbage, and a step of TRL's own trainer."""
import math
import operator
import pickle
import time
import numpy as np
import pytest
from hypothesis import given, settings, strategies as st
from rlcr_suite.rlcr.reward import MODES, Parsed, completion_text, make_rewards, parse, reward, system_prompt
from rlcr_suite.rlcr.scoring import brier, log, spherical

TAGS = [f"<{s}{n}>" for n in ("think", "answer", "analysis", "confidence") for s in ("", "/")]
GOOD = "<think>t</think><answer>red</answer><analysis>a</analysis><confidence>0.85</confidence>"
MEGABYTE = 1_000_000


def reply(answer="red", confidence="0.85", think="<think>t</think>"):
    return f"{think}<answer>{answer}</answer><analysis>a</analysis><confidence>{confidence}</confidence>"


def batch(completions, **columns):
    n = len(completions)
    return dict(prompts=["q"] * n, completions=completions, completion_ids=[[0]] * n, trainer_state=None) | columns


# ---------------------------------------------------------------- parse

pieces = st.one_of(st.sampled_from(TAGS), st.sampled_from(["0.5", "95%", "nan", " ", "\n", "red", "<", "</", "\0", "\ud800", "٠.٥"]), st.text(max_size=8))
texts = st.lists(pieces, max_size=24).map("".join)


@settings(max_examples=400, deadline=None)
@given(text=texts, mode=st.sampled_from(sorted(MODES)), percent=st.booleans())
def test_parse_never_raises_and_keeps_its_promises(text, mode, percent):
    p = parse(text, mode, percent)
    assert p.ok == (p.why == "")
    assert p.confidence is None or (math.isfinite(p.confidence) and 0 <= p.confidence <= 1)
    assert p.answer is None or (p.answer and p.answer == p.answer.strip())
    if p.ok:
        assert p.answer and (p.confidence is not None) == ("confidence" in MODES[mode])
        assert f"</{MODES[mode][-1]}>" == text.rstrip()[-len(f"</{MODES[mode][-1]}>"):]
    elif not percent:
        assert p == Parsed(why=p.why)


free = st.text(max_size=30).filter(lambda s: not any(t in s for t in TAGS))


@settings(max_examples=200, deadline=None)
@given(think=free, answer=free.filter(str.strip), analysis=free, q=st.floats(0, 1), gap=st.sampled_from(["", " ", "\n\n"]), prefilled=st.booleans())
def test_what_is_written_in_the_format_is_read_back(think, answer, analysis, q, gap, prefilled):
    written = f"{q:.6f}"
    text = gap.join(["" if prefilled else "<think>", think + "</think>", f"<answer>{answer}</answer>", f"<analysis>{analysis}</analysis>",
                     f"<confidence>{written}</confidence>"]) + gap
    assert parse(text) == Parsed(answer.strip(), float(written), True, "")


@settings(max_examples=200, deadline=None)
@given(text=texts)
def test_lenient_reading_extends_strict_reading(text):
    strict = parse(text)
    if strict.ok: assert parse(text, percent=True) == strict


@pytest.mark.parametrize("garbage", ["<think>", "</confidence>", "<answer>red</answer>", "<answer>", "</think><answer></answer><analysis></analysis>",
                                     GOOD, "<", "</", " ", "9", "0.", "\0", "é"])
@pytest.mark.parametrize("percent", [False, True])
def test_a_megabyte_of_garbage_takes_linear_time(garbage, percent):
    def seconds(size):
        text = garbage * (size // len(garbage)) + "<confidence>" + garbage[:3] * 9
        best = math.inf
        for _ in range(2):
            start = time.perf_counter()
            parse(text, percent=percent)
            best = min(best, time.perf_counter() - start)
        return best
    assert seconds(MEGABYTE) < 10          # measured: below 0.6 s; the slack is for a loaded machine, a quadratic reader takes minutes


def test_one_hundred_thousand_opening_tags_around_one_good_reply():
    assert parse("<think>" * 100_000 + GOOD).answer == "red"
    assert not parse(GOOD + "<think>" * 100_000).ok


@pytest.mark.parametrize("text", [None, 3, b"<think>", ["a"], {}])
def test_what_is_not_text_is_malformed_not_an_error(text):
    p = parse(text)
    assert not p.ok and type(text).__name__ in p.why


def test_unknown_mode_is_the_callers_mistake():
    with pytest.raises(ValueError, match="tabc, tac, ta"): parse(GOOD, mode="abc")


def test_modes_are_not_interchangeable():
    tac, ta = "</think><answer>x</answer><confidence>0.5</confidence>", "</think><answer>x</answer>"
    assert parse(tac, "tac").ok and parse(ta, "ta").ok and parse(ta, "ta").confidence is None
    assert not parse(ta, "tac").ok and not parse(tac, "ta").ok and not parse(tac, "tabc").ok


def test_evaluation_reads_what_is_there_even_when_the_format_is_broken():
    p = parse("<answer>red</answer> I am 85% sure <confidence>85%</confidence> or so", percent=True)
    assert (p.answer, p.confidence, p.ok) == ("red", .85, False)
    assert parse("<answer>red</answer>", percent=True).confidence is None      # nothing stated: to be asked for again
    assert parse("<answer>a</answer><answer>b</answer>", percent=True).answer == "b"


@pytest.mark.parametrize("mode", sorted(MODES))
def test_the_system_prompt_shows_a_reply_that_parses(mode):
    shape = system_prompt(mode).rsplit(": ", 1)[1]
    assert parse(shape, mode).ok


# ---------------------------------------------------------------- reward

@settings(max_examples=200, deadline=None)
@given(p=st.floats(0, 1), q=st.floats(0, 1))
def test_no_statement_beats_the_honest_one(p, q):
    expected = lambda s: p * reward(1, s) + (1 - p) * reward(0, s)
    assert expected(q) <= expected(p) + 1e-12      # float64 rounding
    assert math.isclose(expected(p), p * p, abs_tol=1e-12)


def test_reward_broadcasts_and_checks_its_domain():
    assert reward(np.array([[0], [1]]), np.array([0., .5, 1.])).shape == (2, 3)
    assert isinstance(reward(True, 1), float)
    for bad in (math.nan, math.inf, -.1, 1.1):
        with pytest.raises(ValueError, match="lie in"): reward(1, bad)
    with pytest.raises(ValueError, match="0 or 1"): reward(.3, .5)
    for bad in (math.nan, math.inf):
        with pytest.raises(ValueError, match="lam must be finite"): reward(1, .5, lam=bad)


@pytest.mark.parametrize("said, abstained", [("I don\u2019t know", True), ("i don't know!", True), ("\u201cUnknown\u201d.", True), ("IDK", True), ("know", False), ("unknown soldier", False)])
def test_abstaining_is_heard_whatever_its_typography(said, abstained):
    f, = make_rewards(operator.eq, "abstention", mode="tabc")
    b = batch([reply(said)], answer=["red"])
    assert f(**b) == [0. if abstained else -1.] and f.graded.abstained.tolist() == [abstained] and f.mode == "tabc"


def test_paper_style_equals_half_of_the_plain_one_plus_one():
    replies = [reply(), reply("blue"), reply(confidence="nan"), "garbage", reply(think="t</think>")]
    b = batch(replies, answer=["red"] * 5)
    for kind, invalid in (("rlcr", -2.), ("rlvr", -1.)):
        parts = [f(**b) for f in make_rewards(operator.eq, kind, mode="tabc", style="paper")]
        plain, = make_rewards(operator.eq, kind, mode="tabc", invalid=invalid)
        offset = 1. if kind == "rlcr" else .5
        np.testing.assert_allclose(np.sum(parts, axis=0), offset + np.array(plain(**b)) / 2, atol=1e-12)
        assert [p[2:4] for p in parts] == [[0., 0.]] * len(parts)      # a broken format zeroes every part


@settings(max_examples=100, deadline=None)
@given(completions=st.lists(st.one_of(texts, st.sampled_from([GOOD, reply(confidence="0"), reply("x", "1")])), min_size=1, max_size=6),
       kind=st.sampled_from(["rlcr", "rlvr", "calibration", "abstention"]), style=st.sampled_from(["plain", "paper"]),
       rule=st.sampled_from([brier, spherical, log]))
def test_every_reward_is_a_finite_float(completions, kind, style, rule):
    for f in make_rewards(operator.eq, kind, rule, mode="tabc", style=style):
        out = f(**batch(completions, answer=["red"] * len(completions)))
        assert len(out) == len(completions) and all(type(r) is float and math.isfinite(r) for r in out)


def test_conversational_completions_are_worth_the_same():
    f, = make_rewards(operator.eq)
    replies = [reply(), reply("blue"), "no"]
    talk = [[{"role": "assistant", "content": r}] for r in replies]
    split = [[{"role": "assistant", "reasoning_content": "t", "content": r.removeprefix("<think>t</think>")}] for r in replies]
    plain = f(**batch(replies, answer=["red"] * 3))
    assert f(**batch(talk, answer=["red"] * 3)) == f(**batch(split, answer=["red"] * 3)) == plain
    assert completion_text([]) == "" and completion_text(None) == ""


def test_missing_gold_answers_are_named():
    f, = make_rewards(operator.eq)
    with pytest.raises(ValueError, match=r"column 'answer'.*columns are: gold, level"): f(**batch([GOOD], gold=["red"], level=["easy"]))
    with pytest.raises(ValueError, match=r"rows \[1\]"): f(**batch([GOOD] * 2, answer=["red", None]))
    with pytest.raises(ValueError, match="2 completions but 1"): f(**batch([GOOD] * 2, answer=["red"]))


@pytest.mark.parametrize("kw, message", [
    (dict(kind="brier"), "kind must be"), (dict(style="released"), "style must be"), (dict(mode="ta"), "has none"), (dict(lam=math.nan), "lam must be finite"),
    (dict(invalid=-1, style="paper"), "takes format_weight"), (dict(format_weight=1.), "takes invalid"), (dict(rule="brier"), "ScoringRule"),
    (dict(invalid=math.inf), "invalid must be finite"), (dict(verify=3), "verify must be callable")])
def test_bad_arguments_are_named_at_construction(kw, message):
    with pytest.raises(ValueError, match=message): make_rewards(**(dict(verify=operator.eq) | kw))


def test_verifier_sees_the_question_once_and_its_errors_are_not_swallowed():
    seen = []
    def verify(pred, gold, question=None):
        seen.append((pred, gold, question))
        return np.bool_(pred == gold)
    fs = make_rewards(verify, style="paper")
    b = batch([GOOD, "junk"], answer=["red", "red"], question=["Which?", "What?"])
    assert [f(**b) for f in fs][1] == [.5, 0.]
    assert seen == [("red", "red", "Which?")]          # not the malformed one; once for three functions
    fs[0](**(b | dict(answer=["blue", "red"])))
    assert len(seen) == 2                              # another batch is not answered from memory

    def down(pred, gold): raise ConnectionError("judge is down")
    f, = make_rewards(down)
    for _ in range(2):
        with pytest.raises(ConnectionError): f(**b)


def test_metrics_are_finite_and_right():
    logged, extra = {}, {}
    f, = make_rewards(operator.eq)
    hooks = dict(log_metric=logged.__setitem__, log_extra=extra.__setitem__)
    f(**batch([reply(), reply("blue", "0.25"), "junk", "junk"], answer=["red"] * 4), **hooks)
    assert logged["accuracy"] == .25 and logged["format_rate"] == .5 and logged["confidence"] == pytest.approx(.55)
    assert logged["brier"] == pytest.approx((.15**2 + .25**2) / 2) and logged["ece"] == pytest.approx((.15 + .25) / 2)
    assert extra["stated_answer"] == ["red", "blue", None, None] and extra["format_fault"][:3] == ["", "", "no </confidence>"]
    logged.clear()
    f(**batch(["junk"], answer=["red"]), **hooks)      # nothing stated: calibration is undefined and left out, not NaN
    assert logged == {"accuracy": 0., "format_rate": 0., "abstention_rate": 0.}


def test_abstention_pays_between_right_and_wrong():
    f, = make_rewards(operator.eq, kind="abstention", cost=2.)
    says = [f"</think><answer>{a}</answer>" for a in ("red", "I don't know", "blue")] + ["junk"]
    assert f(**batch(says, answer=["red"] * 4)) == [1., 0., -2., -1.]


def test_reward_functions_survive_pickling():
    for f in make_rewards(operator.eq, style="paper"):
        g = pickle.loads(pickle.dumps(f))
        assert g.__name__ == f.__name__ and g(**batch([GOOD], answer=["red"])) == f(**batch([GOOD], answer=["red"]))


# ---------------------------------------------------------------- through TRL

WORDS = ["<pad>", "<eos>", "<unk>", "which", "t", "a", "red", "blue", "0.85", "nan", "user", "assistant", *TAGS]
TEMPLATE = "{% for m in messages %}{{ m['role'] + ' ' + m['content'] + ' ' }}{% endfor %}{% if add_generation_prompt %}{{ 'assistant <think>' }}{% endif %}"


@pytest.fixture(scope="module")
def tiny():
    "A one-layer Llama and a tokenizer whose template prefills the opening think tag (TRL issue 6966)"
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
    core = Tokenizer(models.WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tok = PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>", chat_template=TEMPLATE, padding_side="left")
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=len(WORDS), hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, max_position_embeddings=64,
                         pad_token_id=0, eos_token_id=1, bos_token_id=None)
    return LlamaForCausalLM(config), tok


REPLIES = ["t </think> <answer> red </answer> <analysis> a </analysis> <confidence> 0.85 </confidence>",      # right
           "t </think> <answer> blue </answer> <analysis> a </analysis> <confidence> 0.85 </confidence>",     # wrong
           "t </think> <answer> red </answer> <analysis> a </analysis> <confidence> nan </confidence>",       # malformed
           "t </think> <answer> red </answer>"]                                                               # cut off


def one_step(tiny, tmp_path, rewards, conversational, scripted=True, **columns):
    "One GRPO step; scripted completions stand in for the policy's own, which at initialisation are noise"
    pytest.importorskip("trl")
    import copy
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer
    model, tok = tiny
    prompt = [{"role": "user", "content": "which"}] if conversational else "user which assistant <think>"
    data = Dataset.from_dict({"prompt": [prompt] * 2, **{k: [v] * 2 for k, v in columns.items()}})
    config = GRPOConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False, per_device_train_batch_size=4, num_generations=4, max_completion_length=16,
                        max_steps=1, scale_rewards="none", beta=0., loss_type="bnpo", report_to="none", save_strategy="no", logging_steps=1, disable_tqdm=True)

    def rollout(prompts, trainer):
        ids = [tok(r)["input_ids"] + [1] for r in REPLIES]
        return dict(prompt_ids=[[10, 3, 11, WORDS.index("<think>")]] * len(prompts), completion_ids=ids, logprobs=[[-1.] * len(i) for i in ids])

    trainer = GRPOTrainer(model=copy.deepcopy(model), reward_funcs=rewards, args=config, train_dataset=data, processing_class=tok, rollout_func=rollout if scripted else None)
    trainer.train()
    return trainer.state.log_history[0]


@pytest.mark.parametrize("conversational", [False, True])
def test_a_real_trl_step_pays_and_logs_what_we_say(tiny, tmp_path, conversational):
    shown = one_step(tiny, tmp_path, make_rewards(operator.eq), conversational, answer="red")
    assert shown["rewards/rlcr_reward/mean"] == pytest.approx((1 - .15**2 - .85**2 - 1 - 1) / 4, abs=1e-6)      # TRL adds in float32
    assert shown["format_rate"] == .5 and shown["accuracy"] == .25 and shown["confidence"] == pytest.approx(.85)
    assert shown["reward"] == pytest.approx(shown["rewards/rlcr_reward/mean"]) and math.isfinite(shown["loss"])


def test_the_papers_parts_are_summed_by_trl(tiny, tmp_path):
    shown = one_step(tiny, tmp_path, make_rewards(operator.eq, style="paper"), True, answer="red")
    assert shown["rewards/format_reward/mean"] == pytest.approx(.25) and shown["rewards/accuracy_reward/mean"] == pytest.approx(.125)
    assert shown["reward"] == pytest.approx((1.5 - .5 * .15**2 + 1 - .5 * .85**2) / 4, abs=1e-6)


def test_the_policys_own_noise_is_scored_too(tiny, tmp_path):
    shown = one_step(tiny, tmp_path, make_rewards(operator.eq), False, scripted=False, answer="red")
    assert shown["reward"] == -1. and shown["format_rate"] == 0.


def test_trl_run_without_the_answer_column_fails_clearly(tiny, tmp_path):
    with pytest.raises(ValueError, match="column 'answer'"): one_step(tiny, tmp_path, make_rewards(operator.eq), False, gold="red")
