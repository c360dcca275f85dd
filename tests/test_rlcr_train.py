"Training: presets, resume after SIGKILL, several processes, and what the rows of supervised finetuning are."
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from rlcr_suite.core.jobs import MARKER, journal, last_checkpoint
from rlcr_suite.rlcr.train import PATIENCE, PRESETS, accumulation, grpo, grpo_config

STEPS = 6


@pytest.fixture(scope='module')
def base(tmp_path_factory) -> Path:
    "A model that writes the format most of the time: with none of it readable, every reward would be the same and nothing would be learnt"
    from rlcr_suite.core.lm import save, tiny_lm
    from rlcr_suite.core.sft import sft, tokenize
    from rlcr_suite.rlcr.world import demonstrations, tokenizer
    tok, out = tokenizer(), tmp_path_factory.mktemp('base')
    model = tiny_lm(tok, hidden_size=64, layers=2, heads=2, intermediate_size=128, seed=0)
    sft(model, tok, tokenize(demonstrations(32*80), tok), out/'sft', steps=80, batch=32, lr=6e-3, warmup_steps=10)
    return save(model, tok, out/'model')


def train(base: Path, out: Path) -> None:
    "Learn, or go on with it, and keep the model"
    import torch
    from rlcr_suite.core.lm import load, save
    from rlcr_suite.rlcr.verify import exact_match
    from rlcr_suite.rlcr.world import questions
    torch.set_num_threads(1)
    model, tok = load(base, device='cpu')
    grpo(model, tok, questions(64), exact_match, out, per_device_train_batch_size=16, gradient_accumulation_steps=2, max_steps=STEPS, save_steps=1)
    save(model, tok, Path(out)/'model')


def start(base: Path, out: Path) -> subprocess.Popen:
    "The same in a process of its own"
    env = os.environ | dict(OMP_NUM_THREADS='1', HF_HUB_OFFLINE='1')
    code = 'import sys; sys.path.insert(0, sys.argv[1]); from test_rlcr_train import train; train(*sys.argv[2:])'
    return subprocess.Popen([sys.executable, '-c', code, str(Path(__file__).parent), str(base), str(out)], env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def weights(model: Path) -> dict:
    from safetensors.numpy import load_file
    return load_file(model/'model.safetensors')


@pytest.fixture(scope='module')
def uninterrupted(base, tmp_path_factory):
    out = tmp_path_factory.mktemp('whole')
    train(base, out)
    return out


def test_sigkill_and_resume_give_the_same_weights(base, uninterrupted, tmp_path):
    p = start(base, tmp_path)
    try:
        deadline = time.time() + 600
        while not (tmp_path/'checkpoint-2'/MARKER).exists():
            assert p.poll() is None and time.time() < deadline
            time.sleep(.02)
    finally:
        p.send_signal(signal.SIGKILL)
        p.wait()
    assert not (tmp_path/'model').exists()
    assert last_checkpoint(tmp_path) is not None
    assert start(base, tmp_path).wait(600) == 0
    a, b, before = (weights(d) for d in (uninterrupted/'model', tmp_path/'model', base))
    assert all(np.array_equal(a[k], b[k]) for k in a)
    assert any(not np.array_equal(a[k], before[k]) for k in a)  # it did learn
    assert [r['step'] for r in journal(tmp_path)] == list(range(1, STEPS + 1))


def test_half_a_checkpoint_is_not_resumed_from(uninterrupted, tmp_path):
    whole = tmp_path/'checkpoint-4'
    whole.mkdir()
    (whole/MARKER).touch()
    (tmp_path/'checkpoint-5').mkdir() # what a kill while writing leaves
    (tmp_path/'checkpoint-5'/'optimizer.pt').write_bytes(b'\x00'*10)
    assert last_checkpoint(tmp_path) == whole
    assert last_checkpoint(tmp_path/'nothing') is None
    assert last_checkpoint(uninterrupted).name == f'checkpoint-{STEPS}'


def test_journal_measures_the_policy(base, tmp_path):
    "One step, whose completions are kept beside: its row is computed again from them, by hand"
    from rlcr_suite.core.lm import load
    from rlcr_suite.rlcr.reward import parse
    from rlcr_suite.rlcr.verify import exact_match
    from rlcr_suite.rlcr.world import questions
    seen = []
    def verify(pred, gold): seen.append((pred, gold)); return exact_match(pred, gold)
    model, tok = load(base, device='cpu')
    trainer = grpo(model, tok, questions(64), verify, tmp_path, per_device_train_batch_size=32, gradient_accumulation_steps=1, max_steps=1)
    graded, (row,) = trainer.reward_funcs[0].graded, journal(tmp_path)
    assert len(graded.parsed) == 32 and 0 < graded.ok.sum() < 32 and len(seen) == graded.ok.sum() # else the branches below are not tried
    right = iter(exact_match(a, g) for a, g in seen)
    rewards, hits, squares = [], 0, []
    for p in graded.parsed:
        o = next(right) if p.ok else 0
        hits += o
        if p.ok: squares.append((p.confidence - o)**2)
        rewards.append(o - squares[-1] if p.ok else -1)
    want = dict(reward=np.mean(rewards), accuracy=hits/32, format_rate=len(squares)/32, brier=np.mean(squares), confidence=np.mean([p.confidence for p in graded.parsed if p.ok]))
    for k, v in want.items(): assert row[k] == pytest.approx(v, abs=1e-6), k # float32 in between


@pytest.mark.parametrize('preset', ['paper-hotpot', 'paper-math'])
@pytest.mark.parametrize('processes', [1, 2, 4, 6])
def test_paper_batches_on_any_number_of_devices(preset, processes):
    p = PRESETS[preset]
    if p.completions % (p.per_device*processes):
        with pytest.raises(ValueError, match='cannot be spread'): accumulation(p.completions, p.per_device, processes)
    else: assert accumulation(p.completions, p.per_device, processes)*p.per_device*processes == p.completions


# the paper's table of settings: arXiv 2507.16806 and its released configuration
FACTS = {'paper-hotpot': dict(learning_rate=1e-6, lr_scheduler_type='constant_with_warmup', warmup_steps=.05, num_train_epochs=1, max_completion_length=1536,
                              mask_truncated_completions=False),
         'paper-math': dict(learning_rate=5e-6, lr_scheduler_type='linear', warmup_steps=.2, num_train_epochs=.5, max_completion_length=4096,
                            mask_truncated_completions=True)}
BOTH = dict(beta=0., num_generations=32, temperature=.7, epsilon=.2, scale_rewards='none', loss_type='bnpo', num_iterations=1, max_grad_norm=1., seed=43)


@pytest.mark.parametrize('preset, completions, devices', [('paper-hotpot', 2048, 4), ('paper-math', 2304, 6)])
def test_paper_presets_hold_the_facts(preset, completions, devices, tmp_path):
    "As TRL is given them, so that a default of its own cannot step in"
    args = grpo_config(preset, tmp_path)
    assert {k: getattr(args, k) for k in BOTH | FACTS[preset]} == BOTH | FACTS[preset]
    assert PRESETS[preset].completions == completions == args.per_device_train_batch_size*args.gradient_accumulation_steps
    assert accumulation(completions, args.per_device_train_batch_size, devices)*args.per_device_train_batch_size*devices == completions
    assert PRESETS[preset].reward == dict(style='paper')
    assert {r.__name__ for r in rewards_of(preset)} == {'format_reward', 'accuracy_reward', 'calibration_reward'}


def rewards_of(preset):
    from rlcr_suite.rlcr.reward import make_rewards
    return make_rewards(lambda a, b: a == b, 'rlcr', **PRESETS[preset].reward)


def test_mistakes_are_named_before_training(tmp_path):
    from datasets import Dataset
    from rlcr_suite.rlcr.verify import exact_match
    ds = Dataset.from_dict(dict(prompt=['a'], gold=['b']))
    with pytest.raises(ValueError, match="'answer'"): grpo(None, None, ds, exact_match, tmp_path)
    ds = ds.rename_column('gold', 'answer')
    with pytest.raises(ValueError, match='no preset'): grpo(None, None, ds, exact_match, tmp_path, preset='huge')
    with pytest.raises(ValueError, match='kind must be'): grpo(None, None, ds, exact_match, tmp_path, kind='rlhf')


def conversation(mode):
    from datasets import Dataset
    from rlcr_suite.rlcr.reward import system_prompt
    return Dataset.from_dict(dict(prompt=[[dict(role='system', content=system_prompt(mode)), dict(role='user', content='Two and two?')]]*64, answer=['4']*64))


@pytest.mark.parametrize('kind, asks, reads', [('rlvr', 'tabc', 'ta'), ('rlcr', 'ta', 'tabc'), ('rlcr', 'tac', 'tabc')])
def test_prompts_and_reward_speak_of_one_format(kind, asks, reads, tmp_path):
    from rlcr_suite.rlcr.verify import exact_match
    with pytest.raises(ValueError, match=f"row 0 asks for the format '{asks}', but the reward reads '{reads}'"):
        grpo(None, None, conversation(asks), exact_match, tmp_path, kind=kind, preset='paper-math')
    with pytest.raises(AttributeError): # nothing left to object to: the trainer is reached, and there is no model
        grpo(None, None, conversation(asks), exact_match, tmp_path, kind='rlvr', preset='paper-math', reward=dict(mode=asks), bf16=False, use_cpu=True)


def tiny(**config):
    from rlcr_suite.core.lm import tiny_lm
    from rlcr_suite.rlcr.world import tokenizer
    tok = tokenizer()
    return tiny_lm(tok, hidden_size=16, layers=1, heads=2, intermediate_size=16, **config), tok


def test_half_precision_weights_are_refused_and_adapters_on_them_are_not(tmp_path):
    import torch
    from peft import LoraConfig, get_peft_model
    from rlcr_suite.rlcr.train import _check_precision
    args = grpo_config('quick', tmp_path)
    for dtype in (torch.bfloat16, torch.float16):
        with pytest.raises(ValueError, match="half precision.*dtype='float32'"): _check_precision(tiny()[0].to(dtype), args)
    _check_precision(tiny()[0], args)
    adapted = get_peft_model(tiny()[0].to(torch.bfloat16), LoraConfig(r=2, target_modules=['q_proj']))
    _check_precision(adapted, args) # PEFT keeps what is trained in float32
    adapted = get_peft_model(tiny()[0].to(torch.bfloat16), LoraConfig(r=2, target_modules=['q_proj']), autocast_adapter_dtype=False)
    with pytest.raises(ValueError, match='half precision'): _check_precision(adapted, args)
    args.deepspeed_plugin = object() # it keeps a float32 copy
    _check_precision(tiny()[0].to(torch.bfloat16), args)


def test_a_model_that_never_keeps_the_format_is_stopped_and_told_why(tmp_path):
    from rlcr_suite.rlcr.verify import exact_match
    from rlcr_suite.rlcr.world import questions
    with pytest.raises(ValueError, match=f"first {PATIENCE} logged steps keeps the format 'tabc'.*is: no </confidence>"):
        grpo(*tiny(), questions(64), exact_match, tmp_path, per_device_train_batch_size=16, gradient_accumulation_steps=1, max_steps=PATIENCE + 3)
    assert [r['step'] for r in journal(tmp_path)] == list(range(1, PATIENCE + 1))


@pytest.mark.parametrize('conversational', [True, False])
def test_tokenize_makes_the_rows_that_trl_makes(conversational, tmp_path):
    import trl
    from rlcr_suite.core.lm import tiny_lm
    from rlcr_suite.core.sft import tokenize
    from rlcr_suite.rlcr.world import demonstrations, tokenizer
    tok, ds = tokenizer(), demonstrations(12).select_columns(['prompt', 'completion'])
    if not conversational: ds = ds.map(lambda r: {'prompt': r['prompt'][0]['content'], 'completion': r['completion'][0]['content']}, remove_columns=ds.column_names)
    model = tiny_lm(tok, hidden_size=16, layers=1, heads=2, intermediate_size=16)
    args = trl.SFTConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False, report_to='none')
    theirs = trl.SFTTrainer(model=model, args=args, train_dataset=ds, processing_class=tok).train_dataset
    ours = tokenize(ds, tok)
    assert ours['input_ids'][:] == theirs['input_ids'][:] and ours['labels'][:] == theirs['labels'][:]
