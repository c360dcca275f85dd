"""The decoder of FlashFormer against an independent float64 decoder and `model.generate`, on small Llama, Qwen2 and Qwen3 checkpoints; drafts, going back, end tokens,
sampling, packed weights, memory and refusals. The kernel itself has tests of its own; here it is seen to be what the library calls."""
import contextlib, copy, json, math, os, subprocess, sys
from types import SimpleNamespace
import numpy as np
import pytest
import torch
from scipy.stats import chisquare
from torch import nn
from transformers import (GPT2Config, LlamaConfig, LlamaForCausalLM, MistralConfig, Qwen2Config, Qwen2ForCausalLM, Qwen3Config, Qwen3ForCausalLM)

from rlcr_suite.core.lm import byte_tokenizer, num_parameters, save
from rlcr_suite.flashformer import GPUS, MODELS, Decoder, Sampler, cli, decoder as decoder_module, dequantise, plan as plan_module, quant as quant_module, quantise
from rlcr_suite.flashformer.bandwidth import traffic
from rlcr_suite.flashformer.plan import Plan
from rlcr_suite.kernels.flashformer import Quantised

LLAMA3 = dict(rope_type="llama3", rope_theta=1e4, factor=8., low_freq_factor=1., high_freq_factor=4., original_max_position_embeddings=64)
SIZES = dict(vocab_size=131, num_hidden_layers=2, max_position_embeddings=96, bos_token_id=None, eos_token_id=None, pad_token_id=0, initializer_range=.15)
KINDS = {"llama": (LlamaForCausalLM, LlamaConfig, dict(hidden_size=128, intermediate_size=256, num_attention_heads=8, num_key_value_heads=2, rope_parameters=LLAMA3)),
         "qwen2": (Qwen2ForCausalLM, Qwen2Config, dict(hidden_size=96, intermediate_size=160, num_attention_heads=6, num_key_value_heads=1, tie_word_embeddings=True)),
         "qwen3": (Qwen3ForCausalLM, Qwen3Config, dict(hidden_size=64, intermediate_size=96, num_attention_heads=4, num_key_value_heads=4, head_dim=32))}
each = pytest.mark.parametrize("kind", KINDS)

def made(kind, seed=0, **more):
    "A model whose gains and biases are not ones and zeros"
    cls, config, sizes = KINDS[kind]
    torch.manual_seed(seed)
    m = cls(config(**SIZES | sizes | more)).eval()
    with torch.no_grad():
        for name, p in m.named_parameters():
            if p.dim() == 1: p.add_(.3*torch.randn_like(p))
    return m

@pytest.fixture(scope="module")
def models(): return {kind: made(kind) for kind in KINDS}

def text(n, seed=1, vocab=131): return torch.randint(0, vocab, (n,), generator=torch.Generator().manual_seed(seed))

# ---------------------------------------------------------------------------------------------- an independent decoder in float64

def frequencies(c, dim):
    "Inverse wavelengths of the rotation, with the rule of Llama 3 where it is asked for"
    rope, found = c.rope_parameters, []
    for i in range(0, dim, 2):
        f = rope["rope_theta"]**(-i/dim)
        if rope["rope_type"] == "llama3":
            turns = rope["original_max_position_embeddings"]*f/(2*math.pi)      # in the length it was first trained on
            smooth = min(1, max(0, (turns - rope["low_freq_factor"])/(rope["high_freq_factor"] - rope["low_freq_factor"])))
            f *= smooth + (1 - smooth)/rope["factor"]
        found.append(f)
    return torch.tensor(found, dtype=torch.float64)

def logits_of(m, ids):
    "All logits of a text: no cache, no stacked matrices, no function of the package"
    c, p = m.config, {k: v.double() for k, v in m.state_dict().items()}
    H, KV = c.num_attention_heads, c.num_key_value_heads
    hd, T = getattr(c, "head_dim", None) or c.hidden_size//H, len(ids)
    angle = torch.arange(T, dtype=torch.float64)[:, None]*frequencies(c, hd)
    turn = torch.polar(torch.ones_like(angle), angle)[:, None]                  # rotations as complex numbers
    def rms(x, g): return x/(x.square().mean(-1, keepdim=True) + c.rms_norm_eps).sqrt()*g
    def linear(x, name): return nn.functional.linear(x, p[name + ".weight"], p.get(name + ".bias"))
    def rotated(x):
        a, b = x.unflatten(-1, (2, -1)).unbind(-2)
        z = torch.complex(a, b)*turn
        return torch.cat([z.real, z.imag], -1)
    x = p["model.embed_tokens.weight"][ids]
    for l in range(c.num_hidden_layers):
        at = f"model.layers.{l}."
        y = rms(x, p[at + "input_layernorm.weight"])
        q, k, v = (linear(y, at + f"self_attn.{n}_proj").view(T, -1, hd) for n in "qkv")
        if c.model_type == "qwen3": q, k = rms(q, p[at + "self_attn.q_norm.weight"]), rms(k, p[at + "self_attn.k_norm.weight"])
        q, k = rotated(q), rotated(k)
        out = []
        for h in range(H):
            s = (q[:, h] @ k[:, h*KV//H].T/hd**.5).masked_fill(torch.ones(T, T).triu(1).bool(), -math.inf)
            out.append(s.softmax(-1) @ v[:, h*KV//H])
        x = x + linear(torch.cat(out, -1), at + "self_attn.o_proj")
        y = rms(x, p[at + "post_attention_layernorm.weight"])
        g = linear(y, at + "mlp.gate_proj")
        x = x + linear(g/(1 + (-g).exp())*linear(y, at + "mlp.up_proj"), at + "mlp.down_proj")
    return rms(x, p["model.norm.weight"]) @ p["lm_head.weight"].T

def greedy(m, ids, n):
    "Greedy continuation, and the least distance between the two best logits"
    ids, margin = ids.clone(), math.inf
    for _ in range(n):
        best = logits_of(m, ids)[-1].topk(2)
        margin, ids = min(margin, float(best.values[0] - best.values[1])), torch.cat([ids, best.indices[:1]])
    return ids, margin

@each
def test_greedy_tokens_are_those_of_float64_and_of_transformers(models, kind):
    m, ids = models[kind], text(23)
    want, margin = greedy(m, ids, 40)
    assert margin > 1e-4 and len(set(want[23:].tolist())) > 8                   # no near tie, and no text of one token
    got = Decoder.from_hf(m).generate(ids, 40)
    assert torch.equal(got, want)
    assert torch.equal(got[None], m.generate(ids[None], max_new_tokens=40, do_sample=False))
    assert torch.equal(Decoder.from_hf(m.double()).generate(ids[None], 40), want[None])   # computed in float64, given as (1, n)
    m.float()

@each
def test_a_saved_checkpoint_decodes_as_the_model(models, kind, tmp_path):
    save(models[kind], byte_tokenizer(), tmp_path/"m")
    for quant in (None, "int8") if kind == "llama" else (None,):
        a, b = Decoder.from_hf(tmp_path/"m", quant), Decoder.from_hf(models[kind], quant)
        for x, y in zip(a.weights, b.weights):
            assert x is y is None or all(map(torch.equal, x[:2], y[:2])) if isinstance(x, Quantised) or x is None else torch.equal(x, y)
        assert (a.weights.head is a.weights.emb) == (kind == "qwen2" and quant is None)
        assert torch.equal(a.generate(text(9), 10), b.generate(text(9), 10))

def test_end_tokens(models):
    m, ids = made("llama"), text(23)
    whole = Decoder.from_hf(m).generate(ids, 40)
    ends = whole[[30, 26]].tolist()
    first = min(whole.tolist().index(e, 23) for e in ends)
    m.generation_config.eos_token_id = ends                                     # as chat models have it: several
    d = Decoder.from_hf(m)
    assert d.eos == tuple(ends)
    assert torch.equal(d.generate(ids, 40), whole[:first + 1])
    assert torch.equal(d.generate(ids, 40)[None], m.generate(ids[None], max_new_tokens=40, do_sample=False))
    assert torch.equal(d.generate(ids, 40, eos=()), whole)
    for ahead in (1, 3, 16):
        assert list(d.stream(ids, 40, ahead=ahead)) == whole[23:first + 1].tolist() and d.length == first + 1
    assert torch.equal(d.step(4), whole[first + 1:first + 5])                   # and it can go on from there

@pytest.mark.parametrize("sampler", (None, Sampler(.9, 11)))
def test_any_draft_gives_the_text_that_stepping_gives(models, sampler):
    d, ids = Decoder.from_hf(models["qwen2"]), text(17)
    want, rng = d.generate(ids, 60, sampler=sampler), np.random.default_rng(0)
    d.reset().prefill(ids)
    sizes = []
    while d.length + 16 <= 77:
        k = int(rng.integers(1, 17))
        draft = want[d.length:d.length + k].clone()
        wrong = rng.random(k) < .15
        draft[wrong] = (draft[wrong] + 1 + torch.from_numpy(rng.integers(0, 129, wrong.sum()))) % 131
        at = d.length
        got = d.verify(draft, sampler)
        right = next((i for i in range(k) if wrong[i]), k)
        assert len(got) == min(right + 1, k) and torch.equal(got, want[at:at + len(got)]) and d.length == at + len(got)
        sizes.append(len(got))
    assert max(sizes) > 4 and torch.equal(d.tokens[:d.length].long(), want[:d.length])

def test_nothing_behind_the_position_is_read(models):
    d, ids = Decoder.from_hf(models["llama"]), text(20)
    a = d.prefill(ids).step(30)
    d.rollback(24)
    for x in (d.buffers.keys, d.buffers.values): x[:, :, 24:] = torch.nan
    d.tokens[25:] = -1
    assert torch.equal(d.step(25), a[5:])
    assert torch.equal(torch.tensor(list(d.stream(torch.cat([ids, a[:3]]), 10, keep=True))), a[3:13])   # the beginning is kept, not read again

def test_sampled_tokens_follow_the_softmax(models):
    "1500 seeds at one place, against the float64 distribution: chi-square over the tokens that are expected five times and more"
    m, ids, n, tau = models["qwen3"], text(12), 1500, 1.
    p = (logits_of(m, ids)[-1]/tau).softmax(-1).numpy()
    d = Decoder.from_hf(m).prefill(ids)
    drawn = np.bincount([int(d.rollback(11).step(1, Sampler(tau, seed))) for seed in range(n)], minlength=131)
    often = n*p >= 5
    counts, expected = (np.append(x[often], x[~often].sum()) for x in (drawn, n*p))
    assert often.sum() > 10 and chisquare(counts, expected).pvalue > 1e-3
    flat = (logits_of(m, ids)[-1]/(1.5*tau)).softmax(-1).numpy()                # a temperature that is off by a half would be seen
    assert chisquare(counts, np.append(n*flat[often], n*flat[~often].sum())).pvalue < 1e-6

# --------------------------------------------------------------------------------------------------------------- packed weights

@pytest.mark.parametrize("kind,bits", (("int8", 8), ("int4-g128", 4)))
def test_packed_bits_lie_where_the_kernel_looks(kind, bits):
    "Column by column, in whole numbers of Python: part i of word b W + j of a row is column 128 b + i W + j"
    w = torch.randn(3, 5, 256, generator=torch.Generator().manual_seed(0))
    q, W = quantise(w, kind), 128*bits//32
    values = dequantise(q, torch.float64)
    for l, n, c in ((0, 0, 0), (0, 4, 127), (1, 2, 128), (2, 3, 77), (2, 4, 255), (1, 1, 200)):
        b, i, j = c//128, c % 128//W, c % W
        number = (int(q.packed[l, n, b*W + j]) >> bits*i & 2**bits - 1) - 2**(bits - 1)
        scale = q.scales[l, n] if kind == "int8" else q.scales[l, n, b]
        assert values[l, n, c] == number*float(scale)
    assert (values - w).norm()/w.norm() < (.01 if kind == "int8" else .12)

@pytest.mark.parametrize("quant", ("int8", "int4-g128"))
def test_quantised_text_is_that_of_the_dequantised_model(models, quant):
    "transformers, with the matrices that the packed ones stand for"
    d, m, w = Decoder.from_hf(models["llama"], quant), copy.deepcopy(models["llama"]), None
    w, kv = d.weights, 2*16
    with torch.no_grad():
        m.lm_head.weight.copy_(dequantise(w.head))
        for l, layer in enumerate(m.model.layers):
            cut = lambda q, sizes: dequantise(Quantised(q.packed[l], q.scales[l], q.kind)).split(sizes)
            a, f = layer.self_attn, layer.mlp
            parts = [*zip((a.q_proj, a.k_proj, a.v_proj), cut(w.wqkv, [128, kv, kv])), *zip((f.gate_proj, f.up_proj), cut(w.wgu, [256, 256])), (a.o_proj, *cut(w.wo, [128])), (f.down_proj, *cut(w.wd, [128]))]
            for to, x in parts: to.weight.copy_(x)
    ids, got = text(15), d.generate(text(15), 40)
    assert torch.equal(got[None], m.generate(ids[None], max_new_tokens=40, do_sample=False))
    assert not torch.equal(got, Decoder.from_hf(models["llama"]).generate(ids, 40))   # and that is another text than the model's own
    assert {k for k, x in d.weights._asdict().items() if isinstance(x, Quantised)} == {"wqkv", "wo", "wgu", "wd", "head"}

# ----------------------------------------------------------------------------------------------------------------- plans, memory

@each
def test_a_token_reads_every_parameter_once(models, kind):
    m = models[kind]
    s = Decoder.from_hf(m).shape
    unread = 0 if m.config.tie_word_embeddings else s.vocab*s.hidden            # of the embedding table one row is read
    assert sum(traffic(s, itemsize=4).values()) == 4*(num_parameters(m) - unread + s.hidden)
    p = Plan(s, itemsize=4, context=10)
    assert p.bytes - Plan(s, itemsize=4).bytes == 4*10*2*s.layers*s.kv_heads*s.head_dim and p.barriers == 5*s.layers + 1

def test_slices_of_a_matrix_are_quantised_as_the_whole(monkeypatch):
    w = torch.randn(3, 40, 256, generator=torch.Generator().manual_seed(0))
    for kind in ("int8", "int4-g128"):
        whole = quantise(w, kind)
        with monkeypatch.context() as m:
            m.setattr(quant_module, "SLICE", 7*256)                             # seven rows, and a last slice of one
            assert all(map(torch.equal, quantise(w, kind)[:2], whole[:2]))

def test_memory_while_weights_are_read(models, tmp_path, monkeypatch):
    "The copy of a matrix and a slice's integers; of a checkpoint, all of it on the CPU, also where the decoder will be elsewhere"
    s, free, none = Decoder.from_hf(models["llama"]).shape, 10**15, torch.device("cuda")
    big = MODELS["Llama-3.1-8B"].shape
    assert plan_module.working(big, "int8") == 2*128256*4096 + 40*quant_module.SLICE and plan_module.working(big) == 2*2*14336*4096
    held = plan_module.footprint(s, "int8", 4, False)
    monkeypatch.setattr(plan_module, "free_memory", lambda device: sum(held.values()) + 1000)
    with pytest.raises(ValueError, match="while weights are read"): Decoder.from_hf(models["llama"], "int8")
    need = plan_module.loading(big, None, 2, False, none)
    assert need["work"] == 0 and abs(need["checkpoint"] - 16.06e9) < 1e7
    assert plan_module.loading(big, None, 2, False, torch.device("cpu"))["work"] > 32*2*14336*4096*2
    save(models["llama"], byte_tokenizer(), tmp_path/"m")
    plain = plan_module.footprint(s, None, 4, False)
    monkeypatch.setattr(plan_module, "free_memory", lambda device: sum(plain.values()) + plan_module.working(s, None, 4) + 1000)
    monkeypatch.setattr(decoder_module, "weights_of", lambda *a, **k: pytest.fail("weights were read"))
    with pytest.raises(ValueError, match="for the checkpoint, which is read whole"): Decoder.from_hf(tmp_path/"m", device="cpu")

def test_stages_are_timed_without_python():
    "On a GPU: called once to compile and once to record; what is timed is the recording"
    calls, replays = [], []
    class Graph:
        def replay(self): replays.append(1)
    with pytest.MonkeyPatch.context() as m:
        for name, x in dict(CUDAGraph=Graph, graph=lambda g: contextlib.nullcontext(), synchronize=lambda d: None).items(): m.setattr(torch.cuda, name, x)
        on = SimpleNamespace(tokens=SimpleNamespace(is_cuda=True, device="cuda"), backend="persistent")
        f = decoder_module._recorded(on, lambda: calls.append(1))
        for _ in range(6): f()
    assert len(calls) == 2 and len(replays) == 6
    g = lambda: None
    assert decoder_module._recorded(SimpleNamespace(tokens=SimpleNamespace(is_cuda=False), backend="reference"), g) is g

def test_ten_copies_are_timed_at_once_on_a_gpu(monkeypatch):
    timed = []
    monkeypatch.setattr(cli, "_timed", lambda f, device: timed.append(len(f() or ())) or 1e-2)
    monkeypatch.setattr(torch, "empty", lambda size, dtype, device: torch.zeros(4, dtype=dtype))
    assert cli.copied(torch.device("cuda"), 1000, 3) == 2*1000*10/1e-2 and timed == [10]*4
    assert cli.copied(torch.device("cpu"), 1000, 3) == 2*1000/1e-2

def test_numbers_that_the_kernel_does_not_take_fall_back(models, monkeypatch):
    d = Decoder.from_hf(models["llama"])
    on_gpu = SimpleNamespace(emb=SimpleNamespace(is_cuda=True))
    monkeypatch.setattr(decoder_module, "why_not", lambda s, w: "emb: numbers of torch.float32 wanted")
    assert decoder_module.backend_for(d.shape, on_gpu) == "reference"
    with pytest.raises(ValueError, match="cannot run here: emb: numbers"): decoder_module.backend_for(d.shape, on_gpu, "persistent")

def test_help_names_what_there_is():
    assert cli._MODELS == ", ".join(MODELS) and cli._GPUS == ", ".join(GPUS)

def test_too_little_memory_is_said_before_anything_is_copied(models, monkeypatch):
    monkeypatch.setattr(plan_module, "free_memory", lambda device: 100_000)
    monkeypatch.setattr(decoder_module, "weights_of", lambda *a, **k: pytest.fail("weights were copied"))
    with pytest.raises(ValueError, match=r"too little memory on cpu: 0.00 GB needed .* a smaller max_len"): Decoder.from_hf(models["llama"])

# -------------------------------------------------------------------------------------------------------------------- refusals

class Fake(nn.Module):
    def __init__(self, config): super().__init__(); self.config, self.device = config, torch.device("cpu")

@pytest.mark.parametrize("config,why", (
    (GPT2Config(), "not 'gpt2'"), (MistralConfig(), "not 'mistral'"), (LlamaConfig(hidden_act="relu"), "activation 'relu'"), (LlamaConfig(mlp_bias=True), "biases"),
    (Qwen2Config(use_sliding_window=True, sliding_window=512, max_window_layers=2), "sliding window of 512"), (LlamaConfig(rope_parameters=dict(rope_type="dynamic", rope_theta=1e4, factor=2.)), "rope type"),
    (LlamaConfig(max_position_embeddings=64), "more than the model's 64 positions")), ids=lambda x: x if isinstance(x, str) else x.model_type)
def test_models_that_are_not_understood(config, why):
    with pytest.raises(ValueError, match=why): Decoder.from_hf(Fake(config), max_len=1024)

def test_adapters_are_not_overlooked():
    peft = pytest.importorskip("peft")
    m = peft.get_peft_model(made("llama"), peft.LoraConfig(r=2, target_modules=["v_proj"])).base_model.model
    with pytest.raises(ValueError, match="layer 0's v_proj is a Linear, not a plain nn.Linear: merge adapters"): Decoder.from_hf(m)

@pytest.mark.parametrize("call,why", (
    (lambda d: d.generate([1, 2], 96), "97 places of a cache of 96"), (lambda d: d.stream([1, 2], 0), "at least 1"), (lambda d: d.generate([[1], [2]], 3), "one text"), (lambda d: d.generate([131], 3), "0..130"),
    (lambda d: d.generate([1.5], 3), "whole numbers"), (lambda d: d.reset().step(), "no text yet"), (lambda d: d.reset().verify([1]), "no text yet"), (lambda d: d.verify([1]*17), "at most 16"),
    (lambda d: d.rollback(3), "0 to 2"), (lambda d: d.step(3, Sampler(1., -1)), "seed must lie"), (lambda d: d.step(3, Sampler(float("nan"), 0)), "temperature"), (lambda d: d.plan(gpu="H300"), "gpu must be")))
def test_wrong_use_is_refused_and_changes_nothing(models, call, why):
    d = Decoder.from_hf(models["qwen3"]).prefill([1, 2, 3])
    with pytest.raises(ValueError, match=why): call(d)
    if d.length: assert d.length == 3 and torch.equal(d.step(5), Decoder.from_hf(models["qwen3"]).prefill([1, 2, 3]).step(5))

@pytest.mark.parametrize("max_len", (0, -5))
def test_a_cache_of_no_places_is_refused(models, max_len, tmp_path):
    with pytest.raises(ValueError, match=f"max_len must be at least 1, got {max_len}"): Decoder.from_hf(models["llama"], max_len=max_len)

def test_the_last_place_of_the_cache_can_be_used(models):
    d = Decoder.from_hf(models["llama"], max_len=24)
    assert torch.equal(d.generate(text(20), 5), Decoder.from_hf(models["llama"]).generate(text(20), 5))
    with pytest.raises(ValueError, match="25 places"): d.step(1)

# ------------------------------------------------------------------------------------------------------------ terminal, kernel

def test_letters_of_several_tokens_are_said_whole():
    tok = byte_tokenizer()
    ids = tok("naïve 日本 ✓", add_special_tokens=False).input_ids
    pieces = list(cli._spoken(tok, iter(ids)))
    assert "".join(pieces) == "naïve 日本 ✓" and len(pieces) == len("naïve 日本 ✓")
    assert "".join(cli._spoken(tok, iter(ids[:-1]))).startswith("naïve 日本 ")      # cut within a letter: nothing is lost but the letter

def test_random_weights_of_a_shape_can_be_timed():
    from rlcr_suite.kernels.flashformer import Shape
    s = Shape(layers=2, hidden=128, heads=4, kv_heads=1, head_dim=32, ffn=256, vocab=50, max_len=64, qkv_bias=True, qk_norm=True)
    for quant in (None, "int8", "int4-g128"):
        d = Decoder(s, cli.random_weights(s, quant, tied=quant is None))
        r = cli.measure(d, context=40, tokens=8, repeats=1)
        assert r["bytes"] == Plan(s, quant, 2, True, 44).bytes and 0 < r["seconds"]["low"] <= r["seconds"]["median"]
        assert d.buffers.keys[:, :, :48].isfinite().all()

KERNEL = """
import json, sys, traceback; sys.path.insert(0, {here!r})
import torch
from coop import hasten
hasten()
from test_flashformer import made, text
from rlcr_suite.flashformer import Decoder, Sampler

def pair(width, quant, backend):
    m = made('llama', hidden_size=width, intermediate_size=width, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1,
             max_position_embeddings=16, vocab_size=40, rope_parameters=dict(rope_type='default', rope_theta=1e4))
    d, r = (Decoder.from_hf(m, quant, backend=b).prefill(text(5, vocab=40)) for b in (backend, 'reference'))
    assert d.backend == backend
    return d, r

def library():
    d, r = pair(32, None, 'staged')
    want, warm = r.step(3), Sampler(.8, 3)
    draft = (want + torch.tensor([0, 1, 0])) % 40
    assert torch.equal(d.verify(draft), want[:2]) and torch.equal(d.step(1), want[2:])
    assert torch.equal(d.rollback(5).step(1, warm), r.rollback(5).step(1, warm))
    d, r = pair(128, 'int4-g128', 'persistent')
    assert torch.equal(d.step(2), r.step(2))

def generate():
    for kind, heads in (('llama', (4, 2)), ('qwen2', (6, 1)), ('qwen3', (2, 2))):
        m = made(kind, hidden_size=64, intermediate_size=96, vocab_size=60, num_attention_heads=heads[0], num_key_value_heads=heads[1], head_dim=16)
        ids = text(9, vocab=60)
        d = Decoder.from_hf(m, max_len=16, backend='persistent')
        got = d.generate(ids, 7)
        assert d.backend == 'persistent' and len(set(got[9:].tolist())) > 2, kind
        assert torch.equal(got[None], m.generate(ids[None], max_new_tokens=7, do_sample=False)), kind

for f in (library, generate):
    try: f(); wrong = ''
    except Exception: wrong = traceback.format_exc()
    print(json.dumps([f.__name__, wrong]))
"""

@pytest.fixture(scope="module")
def interpreted():
    "What went wrong in a process of its own where Triton interprets, which it decides on import"
    code = KERNEL.format(here=os.path.dirname(__file__))
    done = subprocess.run([sys.executable, "-c", code], env=os.environ | dict(TRITON_INTERPRET="1"), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return dict(map(json.loads, done.stdout.splitlines()))

def test_the_kernel_is_what_the_library_calls(interpreted):
    "Prompt, steps, a draft, sampling and packed weights through the kernel, interpreted, against the reference"
    assert interpreted["library"] == ""

def test_the_kernel_writes_what_transformers_generates(interpreted):
    "Prompt and tokens of two layers of each family through the kernel, interpreted, against `model.generate`"
    assert interpreted["generate"] == ""

def test_without_a_gpu_the_kernel_says_what_it_wants(models):
    if torch.cuda.is_available() or os.getenv("TRITON_INTERPRET"): pytest.skip("kernels run here")
    with pytest.raises(ValueError, match="the kernel cannot run here: .*GPU"): Decoder.from_hf(models["llama"], backend="staged")
    assert Decoder.from_hf(models["llama"]).backend == "reference"

def test_the_ledger_says_what_the_checks_found():
    from rlcr_suite.core.records import read, records_dir
    from rlcr_suite.flashformer import experiment, results
    written = {c.id: c for c in read("flashformer")}
    e = experiment.read_evidence(records_dir()/"evidence"/"flashformer"/written["generate"].scale)
    found = {c.id: c for c in results.decide(e)}
    assert {i: (c.ours, c.rule, c.holds) for i, c in written.items()} == {i: (c.ours, c.rule, c.holds) for i, c in found.items()}
    assert set(results.OURS) <= {i for i, c in found.items() if c.ours} and set(found) == {*results.OURS, *results.SPEEDS}

def test_a_speed_is_that_of_the_slowest_context_and_open_where_one_is_missing(monkeypatch):
    from rlcr_suite.flashformer import results
    row = lambda context, share: dict(case="decode", model="Llama-3.1-8B", quant="int8", context=context, share=dict(median=share, low=share - .01, high=share + .01))
    def decided(*rows):
        monkeypatch.setattr(results, "benchmark", lambda: dict(device="nvidia-h200", repeats=7, evidence="b.json", stamp=dict(hardware="h", versions={}, commit="abcdef0", date="2026-01-01"), results=rows))
        found = results.speed("share", "Llama-3.1-8B", "int8", None)
        return found and next(c for c in results.CLAIMS if c.id == "bandwidth-int8").decide(**found)
    claim = decided(row(128, .9), row(2048, .85), row(7936, .83))
    assert (claim.holds, claim.ours.value, claim.scale) == (True, .83, "gpu")
    assert not decided(row(128, .9), row(2048, .7), row(7936, .83)).holds
    assert decided(row(128, .9), row(2048, .85)) is None

def test_importing_the_commands_imports_nothing_large():
    code = "import sys, rlcr_suite.flashformer.cli; print(sorted({m.split('.')[0] for m in sys.modules} & {'torch', 'triton', 'transformers', 'numpy', 'pandas'}))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "[]\n"
