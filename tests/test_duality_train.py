"""The duality with other people's tools: PEFT loads what was trained, transformers' Trainer trains and resumes it."""
import copy
import pytest
import torch
from torch.utils.data import Dataset
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainerCallback, TrainingArguments
from rlcr_suite.duality import DualOptimizer, Left, OneSided, Right, TwoSided, attach

pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing")      # peft asks transformers by an old name
TARGETS = r".*\.(q_proj|v_proj|down_proj)"

def llama():
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(vocab_size=50, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, max_position_embeddings=32))

class Text(Dataset):
    "Random tokens, each twice, so that there is something to learn"
    def __init__(self, n=48):
        x = torch.randint(0, 50, (n, 8), generator=torch.Generator().manual_seed(1))
        self.rows = x.repeat_interleave(2, 1)
    def __len__(self): return len(self.rows)
    def __getitem__(self, i): return dict(input_ids=self.rows[i], labels=self.rows[i])

# ---------------------------------------------------------------------------------------------------------------- PEFT

@pytest.mark.parametrize("mode,M,refresh,dtype", (("gradient", TwoSided(3), None, torch.float64), ("adapter", Right(3), None, torch.float64), ("fused", Left(3), None, torch.float64),
                                                  ("fused", OneSided(3), 2, torch.float64), ("adapter", TwoSided(3), 2, torch.float64), ("fused", Left(3), None, torch.float32)))
def test_peft_gives_equal_logits(tmp_path, mode, M, refresh, dtype):
    peft = pytest.importorskip("peft")
    origin = llama().to(dtype).requires_grad_(False)
    model, ids = copy.deepcopy(origin), Text()[0]["input_ids"][None]
    d = attach(model, TARGETS, M, mode=mode, refresh=refresh)
    opt = DualOptimizer(torch.optim.Adam, d, lr=1e-2)
    for _ in range(5):
        opt.zero_grad(); model(ids, labels=ids).loss.backward(); opt.step()
    d.to_peft(tmp_path/"adapter", origin.state_dict() if refresh else None)
    loaded = peft.PeftModel.from_pretrained(copy.deepcopy(origin), tmp_path/"adapter", autocast_adapter_dtype=False)
    with torch.no_grad():
        want, got, before = model(ids).logits, loaded(ids).logits, origin(ids).logits
        merged = loaded.merge_and_unload()(ids).logits
    assert (want - before).abs().max() > .05
    for x in (got, merged): assert (x - want).abs().max() < (1e-11 if dtype == torch.float64 else 1e-5)      # rounding, relative to logits of about one

def test_peft_refuses_what_an_adapter_cannot_say(tmp_path):
    pytest.importorskip("peft")
    model, ids = llama(), Text()[0]["input_ids"][None]
    d = attach(model, TARGETS, Left(3), mode="fused", refresh=2)
    with pytest.raises(ValueError, match="freeze them"): d.to_peft(tmp_path)
    for p in d.others(): p.requires_grad_(False)
    opt = DualOptimizer(torch.optim.AdamW, d, lr=1e-2, weight_decay=0.)
    for _ in range(2):
        opt.zero_grad(); model(ids, labels=ids).loss.backward(); opt.step()
    with pytest.raises(ValueError, match="maps have changed"): d.to_peft(tmp_path)
    with pytest.raises(ValueError, match="base has no"): d.to_peft(tmp_path, {})
    opt.param_groups[0]["weight_decay"] = .1
    model(ids, labels=ids).loss.backward(); opt.step()
    with pytest.raises(ValueError, match="decayed"): d.to_peft(tmp_path, llama().state_dict())
    assert not list(tmp_path.iterdir())

# ---------------------------------------------------------------------------------------------------------------- Trainer

class StopAt(TrainerCallback):
    "As if killed after a checkpoint"
    def __init__(self, step): self.step = step
    def on_step_end(self, args, state, control, **kw):
        control.should_training_stop = state.global_step >= self.step
        return control

def trainer(folder, mode, M, stop=None):
    "The recipe: attach, optimizer, schedule, Trainer(optimizers=...)"
    model = llama()
    d = attach(model, TARGETS, M, mode=mode, refresh=3)
    opt = DualOptimizer(torch.optim.AdamW, d, lr=1e-2, weight_decay=.1)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(opt, 6)
    args = TrainingArguments(str(folder), max_steps=6, per_device_train_batch_size=2, gradient_accumulation_steps=2, save_steps=2, logging_steps=1, max_grad_norm=1., seed=0,
                             report_to="none", use_cpu=True, disable_tqdm=True)
    return Trainer(model, args, train_dataset=Text(), optimizers=(opt, schedule), callbacks=[StopAt(stop)] if stop else []), d

@pytest.mark.parametrize("mode,M", (("fused", Left(3)), ("fused", OneSided(3, "randomized-svd")), ("adapter", Right(3)), ("gradient", OneSided(3, "svd"))), ids=lambda x: str(x))
def test_trainer_trains_and_resumes(tmp_path, mode, M):
    "Six steps with accumulation, a schedule and clipping; stopped after four, in the middle of a period, and resumed by a new Trainer from its own checkpoint"
    pytest.importorskip("accelerate")
    whole, d = trainer(tmp_path/"whole", mode, M)
    before = whole.model(**{k: v[None] for k, v in Text()[0].items()}).loss.item()
    whole.train()
    assert d.step == 6 and whole.state.log_history[-2]["loss"] < before
    trainer(tmp_path/"parts", mode, M, stop=4)[0].train()
    second, d2 = trainer(tmp_path/"parts", mode, M)
    second.train(resume_from_checkpoint=str(tmp_path/"parts"/"checkpoint-4"))
    assert d2.step == 6
    for a, b in zip(d.merge().parameters(), d2.merge().parameters()): assert torch.equal(a, b)
