"""rlcr.data on files in the public data sets' own columns: what is removed, what is left out, and that nothing but the seed decides it."""
import hashlib
import json
import os
import re
import subprocess
import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
import pytest
from datasets import Dataset, DatasetDict
from rlcr_suite.core import data as core_data
from rlcr_suite.rlcr.data import EVALUATION_SETS, KINDS, big_math_digits, evaluation_set, hotpot_modified
from rlcr_suite.rlcr.reward import make_rewards
from rlcr_suite.rlcr.verify import exact_match, math_or_exact

FIXTURES = Path(__file__).parent / "fixtures" / "rlcr"


def rows(name): return Dataset.from_list([json.loads(l) for l in (FIXTURES / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()])


@pytest.fixture(scope="module")
def raw(): return rows("hotpot_distractor")


@pytest.fixture(scope="module")
def hotpot(raw): return hotpot_modified(raw, n_train=20, n_test=8)


def every(dd): return [r for part in dd.values() for r in part]


def test_the_fixtures_are_what_their_script_writes():
    spec = spec_from_file_location("make_rlcr", FIXTURES.parent / "make_rlcr.py")
    make = module_from_spec(spec)
    spec.loader.exec_module(make)
    for name, r in make.files().items(): assert (FIXTURES / name).read_text(encoding="utf-8") == make.text(r), name


# ---------------------------------------------------------------- HotpotQA-Modified

def test_exactly_two_paragraphs_are_removed_and_they_are_the_recorded_ones(raw, hotpot):
    source = {r["id"]: r for r in raw}
    assert {r["kind"] for r in every(hotpot)} == set(KINDS)
    for r in every(hotpot):
        titles, gold = source[r["id"]]["context"]["title"], set(source[r["id"]]["supporting_facts"]["title"])
        left = re.findall(r"^\[\d\] (\w+):", r["prompt"][1]["content"], re.M)
        assert left == [t for t in titles if t not in r["dropped"]] and len(left) == 8
        assert len(gold & set(r["dropped"])) == KINDS.index(r["kind"]) == 2 - r["golds_left"]


def test_an_answer_is_in_the_text_only_if_its_paragraph_is(raw, hotpot):
    source = {r["id"]: r for r in raw}
    for r in every(hotpot):
        holder = source[r["id"]]["supporting_facts"]["title"][1]
        assert (r["answer"] + "." in r["prompt"][1]["content"]) == (holder not in r["dropped"])


def test_unfit_rows_are_left_out_and_counted(raw, hotpot):
    used = {r["id"] for r in every(hotpot)}
    assert len(used) == 28 and used <= {r["id"] for r in raw if len(r["context"]["title"]) == 10}
    assert all(len(r["prompt"][1]["content"]) < 6000 for r in every(hotpot))
    with pytest.raises(ValueError, match=r"only 28 are usable \(left out: .*1 repeated") as e: hotpot_modified(raw, n_train=30, n_test=8)
    assert all(f"1 {why}" in str(e.value) for why in ("not ten paragraphs", "not two gold paragraphs", "too long"))


def test_no_question_is_on_both_sides_even_in_other_letters(hotpot):
    train, test = ({r["question"].lower() for r in hotpot[k]} for k in ("train", "test"))
    assert not train & test and len(train) == 20 and len(test) == 8


def test_neither_order_nor_company_changes_a_row(raw, hotpot):
    assert every(hotpot_modified(raw.shuffle(seed=3), n_train=20, n_test=8)) == every(hotpot)
    few = hotpot_modified(raw.select(range(1, 13)), n_train=8, n_test=4)
    whole = {r["id"]: r for r in every(hotpot)}
    assert all(whole[r["id"]] == r for r in every(few))


def test_the_seed_changes_what_is_removed(raw, hotpot):
    kinds = {r["id"]: r["kind"] for r in every(hotpot)}
    assert any(kinds.get(r["id"]) not in (None, r["kind"]) for r in every(hotpot_modified(raw, n_train=20, n_test=8, seed=1)))


def test_the_same_rows_in_a_process_with_another_hash_salt(hotpot):
    "Sets of text have another order in every process: a builder that iterates one is not reproducible even when seeded"
    code = ("import hashlib, json, sys; from datasets import Dataset; from rlcr_suite.rlcr.data import hotpot_modified;"
            "d = hotpot_modified(Dataset.from_list([json.loads(l) for l in open(sys.argv[1], encoding='utf-8')]), n_train=20, n_test=8);"
            "print(hashlib.sha256(json.dumps([r for p in d.values() for r in p]).encode()).hexdigest())")
    env = os.environ | {"PYTHONHASHSEED": "12345", "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    out = subprocess.run([sys.executable, "-c", code, str(FIXTURES / "hotpot_distractor.jsonl")], env=env, capture_output=True, text=True, timeout=600, check=True)
    assert out.stdout.strip() == hashlib.sha256(json.dumps(every(hotpot)).encode()).hexdigest()


def test_contexts_as_lists_of_records_are_read_alike(raw, hotpot):
    def listed(r): return {"context": [dict(title=t, sentences=s) for t, s in zip(r["context"]["title"], r["context"]["sentences"])]}
    other = Dataset.from_list([dict(r) | listed(r) for r in raw])
    assert every(hotpot_modified(other, n_train=20, n_test=8)) == every(hotpot)


@pytest.mark.parametrize("column", ["id", "question", "answer", "context", "supporting_facts"])
def test_a_missing_column_is_named(raw, column):
    with pytest.raises(ValueError, match=f"missing column '{column}'"): hotpot_modified(raw.remove_columns(column), n_train=2, n_test=2)


@pytest.mark.parametrize("kw, message", [(dict(n_test=-1), "n_test must be a whole number"), (dict(n_train=2.5), "n_train must be a whole"), (dict(n_train=True), "True"),
                                        (dict(n_train=0, n_test=0), "nothing was asked for")])
def test_sizes_are_checked(raw, kw, message):
    with pytest.raises(ValueError, match=message): hotpot_modified(raw, **kw)


def test_one_part_only_and_which_part_it_was_given(raw, hotpot):
    only = hotpot_modified(raw, n_train=0, n_test=8)
    assert list(only) == ["test"] and only["test"].to_list() == hotpot["test"].to_list()
    with pytest.raises(ValueError, match="'train', 'validation'"): hotpot_modified(DatasetDict(train=raw, validation=raw))


def test_rows_feed_the_reward_functions_as_they_are(hotpot):
    part = hotpot["test"]
    says = [[{"role": "assistant", "content": f"</think><answer>the {r['answer']}!</answer><analysis>a</analysis><confidence>1</confidence>"}] for r in part]
    f, = make_rewards(exact_match)
    assert f(prompts=part["prompt"], completions=says, **{c: part[c] for c in part.column_names if c != "prompt"}) == [1.] * 8


# ---------------------------------------------------------------- Big-Math-Digits

def test_only_short_numbers_of_middling_difficulty_are_kept():
    raw = rows("big_math")
    kept = every(big_math_digits(raw, n_train=20, n_test=8))
    assert len(kept) == 28 and {"-0.5", "1e3"} <= {r["answer"] for r in kept}
    assert all(0 < r["solve_rate"] < .75 and len(r["answer"]) < 20 and float(r["answer"]) == float(r["answer"]) for r in kept)
    assert len({r["question"].lower() for r in kept}) == 28
    assert every(big_math_digits(raw.shuffle(seed=5), n_train=20, n_test=8)) == kept
    with pytest.raises(ValueError, match="only 28 are usable.*answer not a short number"): big_math_digits(raw, n_train=21, n_test=8)
    with pytest.raises(ValueError, match="'llama8b_solve_rate'"): big_math_digits(raw.remove_columns("llama8b_solve_rate"))


def test_problems_too_long_for_the_prompt_are_left_out():
    raw = rows("big_math")
    lengths = sorted(len(r["question"]) for r in every(big_math_digits(raw, n_train=20, n_test=8)))
    cut = lengths[-1] # as long as the longest: it goes, and whatever is as long
    left = sum(l < cut for l in lengths)
    assert 0 < left < 28
    assert max(len(r["question"]) for r in every(big_math_digits(raw, n_train=left, n_test=0, max_chars=cut))) < cut
    with pytest.raises(ValueError, match="too long"): big_math_digits(raw, n_train=left + 1, n_test=0, max_chars=cut)


# ---------------------------------------------------------------- evaluation sets

@pytest.mark.parametrize("name", sorted(EVALUATION_SETS))
def test_every_set_gets_the_common_columns(name):
    ds = evaluation_set(rows(name), name)
    core_data.check_columns(ds, {"prompt": core_data.MESSAGES, "question": str, "answer": (str, list)})
    assert ds.column_names == ["prompt", "answer", "question"] and len(ds) > 0
    assert all(m[0]["role"] == "system" and "<confidence>" in m[0]["content"] and m[1]["content"] == q for m, q in zip(ds["prompt"], ds["question"]))
    with pytest.raises(ValueError, match="missing column"): evaluation_set(Dataset.from_list([{"x": 1}]), name)


def test_answers_are_the_right_ones():
    trivia = evaluation_set(rows("trivia_qa"), "trivia_qa")
    assert len(trivia) == 3 and all(len(a) == len(set(a)) <= 6 for a in trivia["answer"])       # the row with six aliases is out
    assert evaluation_set(rows("gsm8k"), "gsm8k")["answer"] == ["500", "1000", "1500"]
    csqa = evaluation_set(rows("commonsense_qa"), "commonsense_qa")
    assert len(csqa) == 2 and csqa["answer"][0] == ["B", "harbour", "B. harbour"] and "\nB. harbour" in csqa["question"][0]
    assert math_or_exact("0.75", evaluation_set(rows("math_500"), "math_500")["answer"][0])


def test_gpqa_options_are_shuffled_by_row_and_seed():
    raw = rows("gpqa")
    ds = evaluation_set(raw, "gpqa")
    assert len({a[0] for a in ds["answer"]}) > 1
    for q, (letter, text, both) in zip(ds["question"], ds["answer"]): assert f"\n{both}\n" in q + "\n" and both == f"{letter}. {text}"
    assert evaluation_set(raw.select([3]), "gpqa")["question"][0] == ds["question"][3]
    assert evaluation_set(raw, "gpqa", seed=1)["answer"] != ds["answer"]


def test_a_draw_keeps_the_order_and_needs_enough_rows():
    raw = rows("gpqa")
    some = evaluation_set(raw, "gpqa", n=4)["question"]
    assert len(some) == 4 and list(some) == [q for q in evaluation_set(raw, "gpqa")["question"] if q in some]
    with pytest.raises(ValueError, match="9 rows were asked for, but only 8"): evaluation_set(raw, "gpqa", n=9)
