"Training: presets, resume after SIGKILL, several processes, and what the rows of supervised finetuning are."
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from rlcr_suite.rlcr.train import MARKER, PRESETS, accumulation, advantages, confidence_game, grpo, journal, last_checkpoint

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


def test_journal_measures_the_policy(uninterrupted):
    for r in journal(uninterrupted):
        assert -1 <= r['reward'] <= 1 and 0 <= r['accuracy'] <= 1 and 0 <= r['format_rate'] <= 1


@pytest.mark.parametrize('preset', ['paper-hotpot', 'paper-math'])
@pytest.mark.parametrize('processes', [1, 2, 4, 6])
def test_paper_batches_on_any_number_of_devices(preset, processes):
    p = PRESETS[preset]
    if p.completions % (p.per_device*processes):
        with pytest.raises(ValueError, match='cannot be spread'): accumulation(p.completions, p.per_device, processes)
    else: assert accumulation(p.completions, p.per_device, processes)*p.per_device*processes == p.completions


def test_paper_presets_hold_the_facts():
    hotpot, math = (PRESETS[f'paper-{n}'].grpo for n in ('hotpot', 'math'))
    for p in (hotpot, math):
        assert (p['beta'], p['num_generations'], p['temperature'], p['epsilon'], p['scale_rewards'], p['loss_type'], p['max_grad_norm'], p['seed']) == \
               (0., 32, .7, .2, 'none', 'bnpo', 1., 43)
    assert (hotpot['learning_rate'], hotpot['max_completion_length']) == (1e-6, 1536)
    assert (math['learning_rate'], math['max_completion_length'], math['mask_truncated_completions']) == (5e-6, 4096, True)


def test_mistakes_are_named_before_training(tmp_path):
    from datasets import Dataset
    from rlcr_suite.rlcr.verify import exact_match
    ds = Dataset.from_dict(dict(prompt=['a'], gold=['b']))
    with pytest.raises(ValueError, match="'answer'"): grpo(None, None, ds, exact_match, tmp_path)
    ds = ds.rename_column('gold', 'answer')
    with pytest.raises(ValueError, match='no preset'): grpo(None, None, ds, exact_match, tmp_path, preset='huge')
    with pytest.raises(ValueError, match='kind must be'): grpo(None, None, ds, exact_match, tmp_path, kind='rlhf')


def test_advantages_are_what_trl_computes():
    r = np.random.default_rng(0).normal(size=(5, 8))
    assert np.allclose(advantages(r).sum(-1), 0)
    np.testing.assert_allclose(advantages(r, 'group'), (r - r.mean(-1, keepdims=True))/(r.std(-1, ddof=1, keepdims=True) + 1e-4))
    with pytest.raises(ValueError, match='scale must be'): advantages(r, 'batch')


def test_group_scaling_is_improper_and_plain_is_not():
    p = np.array([.3, .7])
    plain, scaled = confidence_game(p, 'none', lr=4., steps=400), confidence_game(p, 'group', steps=400)
    assert (abs(plain - p) < .06).all() and (abs(scaled - .5) > abs(p - .5) + .09).all()


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
