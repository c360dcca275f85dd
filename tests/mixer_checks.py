"""What every mixer of `core.decoder` must do, as checks that a chapter's tests call with the names of its mixers:
`check_mixer(name, **config)` runs them all in this process; `check_fresh_process({name: options, ...})` loads checkpoints where no chapter was imported."""
import json, subprocess, sys, tempfile
from pathlib import Path
import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM
from rlcr_suite.core.decoder import Decoder, tiny_decoder

VOCAB = 29
# double precision: a term forgotten or counted twice cannot hide behind rounding
TOL = 1e-8


def make(name, dtype=torch.float64, **config) -> Decoder:
    "A decoder of two layers with weights so large that every token changes what follows it"
    fields = dict(hidden_size=32, heads=4, intermediate_size=48, layers=2, max_length=256, initializer_range=.25, seed=3) | config
    model, r = tiny_decoder(VOCAB, mixer=name, **fields), torch.Generator().manual_seed(4)
    with torch.no_grad():
        for p in model.parameters(): # what begins as all zeros or all ones would hide what stands behind it
            if (p == p.flatten()[0]).all(): p += fields["initializer_range"]*torch.randn(p.shape, generator=r)
    return model.to(dtype)

def tokens(B, T, seed=0): return torch.randint(VOCAB, (B, T), generator=torch.Generator().manual_seed(seed))

def same(a, b, tol, what):
    "Relative to the largest entry; says what differs and where"
    assert a.shape == b.shape, f"{what}: {tuple(a.shape)} against {tuple(b.shape)}"
    assert torch.isfinite(a).all() and torch.isfinite(b).all(), f"{what}: not finite"
    gap = (a - b).abs()
    assert gap.max() <= tol*b.abs().max(), f"{what}: off by {gap.max():.1e} at {tuple(x.item() for x in torch.unravel_index(gap.argmax(), gap.shape))}"


@torch.no_grad()
def check_causal(model, T=37, tol=TOL, reach=None):
    "A token changes the logits from its place on, up to `reach` tokens later (None: however far), and none before"
    x = tokens(2, T)
    y = model(x).logits
    for at in (0, 1, T//2, T - 1):
        z = x.clone()
        z[:, at] = (z[:, at] + 1) % VOCAB
        change = (model(z).logits - y).abs().amax((0, 2))
        assert change[:at].max() <= tol if at else True, f"the token at {at} changes what came before it"
        seen = change[at:][:reach] > 100*tol
        assert seen.all(), f"the token at {at} is not seen at {at + (~seen).nonzero()[:, 0]}"

@torch.no_grad()
def check_decode(model, T=37, tol=TOL):
    "Step by step from the start, and from every cut, are the logits of one pass; a state can be continued twice"
    x = tokens(3, T)
    want = model(x).logits
    out, got = None, []
    for t in range(T):
        out = model(x[:, t:t + 1], past_key_values=out and out.past_key_values)
        got.append(out.logits)
    same(torch.cat(got, 1), want, tol, "decoding step by step")
    for cut in sorted({1, 2, 7, 16, T - 1}):
        cache = model(x[:, :cut]).past_key_values
        before = list(cache.states)
        same(model(x[:, cut:], past_key_values=cache).logits, want[:, cut:], tol, f"continuing after {cut} tokens")
        cache.states, cache.columns = before, cut
        other = tokens(3, 3, seed=9)
        same(model(other, past_key_values=cache).logits, model(torch.cat([x[:, :cut], other], 1)).logits[:, cut:], tol, f"continuing the state after {cut} tokens again")

@torch.no_grad()
def check_padding(model, T=23, tol=TOL):
    "Rows of a batch padded on the left, on the right or within equal the rows alone, and go on as they would alone"
    x, mask = tokens(4, T), torch.ones(4, T, dtype=torch.long)
    mask[0, :9], mask[1, T - 5:], mask[2, 3:6] = 0, 0, 0
    out = model(x, attention_mask=mask)
    more = tokens(4, 5, seed=1)
    grown = torch.ones(4, 5, dtype=torch.long)
    grown[1, 2:], grown[3, :] = 0, 0                         # rows that grow by unequal numbers of tokens, one by none
    after = model(more, attention_mask=torch.cat([mask, grown], 1), past_key_values=out.past_key_values)
    last = model(more[:, :1], past_key_values=after.past_key_values)
    for i in range(4):
        real, new = mask[i].bool(), grown[i].bool()
        row = torch.cat([x[i, real], more[i, new], more[i, :1]])[None]
        want, n, m = model(row).logits[0], real.sum(), new.sum()
        same(out.logits[i, real], want[:n], tol, f"padded row {i}")
        if m: same(after.logits[i, new], want[n:n + m], tol, f"continued padded row {i}")
        same(last.logits[i], want[-1:], tol, f"padded row {i}, one token more")

@torch.no_grad()
def check_packed(model, tol=TOL):
    "Sequences packed in one row equal the sequences alone, and their states go on as rows"
    lengths = [5, 1, 0, 12, 5, 17]
    cu = F.pad(torch.tensor(lengths).cumsum(0), (1, 0))
    x = tokens(1, sum(lengths))
    out = model(x, cu_seqlens=cu, use_cache=True)
    more = tokens(len(lengths), 2, seed=1)
    after = model(more, past_key_values=out.past_key_values)
    for i, (a, b) in enumerate(zip(cu, cu[1:])):
        want = model(torch.cat([x[:, a:b], more[i:i + 1]], 1)).logits[0]
        if b > a: same(out.logits[0, a:b], want[:b - a], tol, f"packed sequence {i} of {b - a} tokens")
        same(after.logits[i], want[b - a:], tol, f"the state of packed sequence {i} of {b - a} tokens")

def check_gradients(model, T=21, tol=TOL):
    "Every parameter has a gradient; packed, padded and checkpointed training have the gradients of separate sequences"
    x, mask = tokens(3, T), torch.ones(3, T, dtype=torch.long)
    mask[0, :8], mask[1, 15:] = 0, 0
    rows, n = [x[i:i + 1, m.bool()] for i, m in enumerate(mask)], mask.sum().item() - 3
    cu = F.pad(mask.sum(1).cumsum(0), (1, 0))

    def grads(*calls):
        model.zero_grad()
        for kw in calls:
            y, ids = model(use_cache=False, **kw).logits, kw["input_ids"]
            at = [(0, t) for t in range(ids.shape[1] - 1)] if "attention_mask" not in kw else [(i, t) for i in range(3) for t in kw["attention_mask"][i].nonzero()[:-1, 0]]
            if "cu_seqlens" in kw: at = [(0, t) for _, t in at if t + 1 not in cu.tolist()]
            r, c = (torch.tensor(z) for z in zip(*at))
            F.cross_entropy(y[r, c], ids[r, c + 1], reduction="sum").div(n).backward()
        return {name: p.grad.clone() if p.grad is not None else None for name, p in model.named_parameters()}

    want = grads(*(dict(input_ids=r) for r in rows))
    for name, g in want.items(): assert g is not None and torch.isfinite(g).all() and g.abs().max() > 0, f"{name} has no gradient"
    ways = dict(padded=dict(input_ids=x, attention_mask=mask), packed=dict(input_ids=torch.cat(rows, 1), cu_seqlens=cu))
    for way, kw in ways.items():
        for name, g in grads(kw).items(): same(g, want[name], 10*tol, f"gradient of {name}, {way}")
    model.train()
    model.activation_checkpointing_enable()
    for name, g in grads(ways["padded"]).items(): same(g, want[name], 10*tol, f"gradient of {name}, checkpointed")
    model.activation_checkpointing_disable()
    model.eval()

@torch.no_grad()
def check_generate(model, new=9):
    "Greedy search is the loop of whole passes; beam search is itself without a cache; prompts may be padded"
    x, mask = tokens(3, 8, seed=5), torch.ones(3, 8, dtype=torch.long)
    mask[1, :5] = 0
    kw = dict(attention_mask=mask, max_new_tokens=new, do_sample=False, pad_token_id=0)
    ids, m = x, mask
    for _ in range(new):
        ids = torch.cat([ids, model(ids, attention_mask=m, use_cache=False).logits[:, -1:].argmax(-1)], 1)
        m = F.pad(m, (0, 1), value=1)
    assert torch.equal(model.generate(x, **kw), ids), "greedy search"
    beams = [model.generate(x, num_beams=3, use_cache=cached, **kw) for cached in (True, False)]
    assert torch.equal(*beams), "beam search with a cache"
    chunks = model.generate(x, prefill_chunk_size=3, past_key_values=_empty(), **kw)
    assert torch.equal(chunks, ids), "a prefill in parts"

def _empty():
    from rlcr_suite.core.decoder import DecoderCache
    return DecoderCache()

@torch.no_grad()
def check_saved(model):
    "What is loaded has the same parameters and the same logits, bit for bit"
    x = tokens(2, 19)
    with tempfile.TemporaryDirectory() as tmp:
        model.save_pretrained(tmp)
        again = aligned(AutoModelForCausalLM.from_pretrained(tmp).eval())
    assert isinstance(again, Decoder) and again.config.to_dict() == model.config.to_dict() | {"_name_or_path": again.config._name_or_path}
    for (name, p), (_, q) in zip(model.named_parameters(), again.named_parameters(), strict=True): assert p.dtype == q.dtype and torch.equal(p, q), name
    assert torch.equal(model(x).logits, again(x).logits)

def aligned(model):
    "The model with its parameters copied: a file is mapped to wherever its header ends, and on some processors the sums of a product are ordered by the alignment of its factors"
    for p in model.parameters(): p.data = p.data.clone()
    return model

def check_mixer(name, dtype=torch.float64, tol=TOL, reach=None, **config):
    "All of the above for one mixer; `config` are arguments of `tiny_decoder` and fields of `DecoderConfig`. A mixer that forgets is asked about `reach` tokens only"
    model = make(name, dtype, **config)
    check_causal(model, tol=tol, reach=reach)
    for check in (check_decode, check_padding, check_packed, check_gradients): check(model, tol=tol)
    for check in (check_generate, check_saved): check(model)


def check_fresh_process(mixers):
    "Checkpoints of {name: fields of the configuration} load and agree in a process that imported `core.decoder` only"
    code = """
import json, sys, torch
import rlcr_suite.core.decoder
from transformers import AutoModelForCausalLM
torch.set_grad_enabled(False)
x = torch.arange(40).view(2, 20) % 29
def logits(path):
    model = AutoModelForCausalLM.from_pretrained(path)
    for p in model.parameters(): p.data = p.data.clone() # see `aligned`
    return model(x).logits
print(json.dumps([logits(p).flatten().tolist() for p in sys.argv[1:]]))
"""
    with tempfile.TemporaryDirectory() as tmp, torch.no_grad():
        paths, want = [], []
        for name, config in mixers.items():
            model = make(name, torch.float32, **config)
            paths.append(str(Path(tmp)/name))
            model.save_pretrained(paths[-1])
            want.append(model(torch.arange(40).view(2, 20) % VOCAB).logits.flatten().tolist())
        done = subprocess.run([sys.executable, "-c", code, *paths], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    for name, a, b in zip(mixers, json.loads(done.stdout.splitlines()[-1]), want): assert a == b, f"{name}: other logits in a fresh process"
