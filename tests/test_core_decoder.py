"core.decoder: the registry, shared parts, and a model that treats every mixer alike."
import copy, json, subprocess, sys
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers import (AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification, DynamicCache, LlamaConfig, LlamaForCausalLM, Trainer,
                          TrainingArguments)
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb
import rlcr_suite
from rlcr_suite.core.blocks import packed
from rlcr_suite.core.decoder import (Decoder, DecoderCache, DecoderConfig, Mixer, ShortConv, mixer_class, mixer_names, register_mixer, rope,
                                     tiny_decoder)
from rlcr_suite.core.lm import generate, load, save, sequence_logprobs, word_tokenizer
from mixer_checks import TOL, VOCAB, check_fresh_process, check_mixer, make, same, tokens


@register_mixer("test_decay")
class Decay(Mixer):
    "Linear attention with a decay: a matrix for a state, a counter, a convolution, a parameter of its own, an option"
    defaults = {"width": 3, "sign": 1.}

    def __init__(self, config, layer):
        super().__init__(config, layer)
        d = config.hidden_size
        self.conv, self.qkv, self.o = ShortConv(d, self.options["width"]), nn.Linear(d, 3*d, bias=False), nn.Linear(d, d, bias=False)
        self.log_decay = nn.Parameter(torch.empty(d))

    def init_parameters(self): nn.init.constant_(self.log_decay, -.2)

    def forward(self, x, state=None, cu_seqlens=None, return_state=False):
        conv, S, t = (None, None, None) if state is None else state
        x, conv = self.conv(x, conv, cu_seqlens, return_state)
        q, k, v = self.qkv(x).chunk(3, -1)
        if cu_seqlens is None: y, S = self.scan(q, k, v, S)
        else: y, S = packed(self.scan, cu_seqlens, q, k, v, return_state=True)
        n = torch.full((len(S),), x.shape[1]) if cu_seqlens is None else torch.as_tensor(cu_seqlens).diff()
        return self.o(self.options["sign"]*y), (conv, S, n if t is None else t + n) if return_state else None

    def scan(self, q, k, v, S=None):
        S, out = q.new_zeros(len(q), q.shape[2], q.shape[2]) if S is None else S, [q[:, :0]]
        for i in range(q.shape[1]):
            S = S*self.log_decay.exp()[:, None] + torch.tanh(k[:, i, :, None])*v[:, i, None, :]
            out.append((q[:, i, None] @ S)/8)
        return torch.cat(out, 1), S


class TestMixers:
    @pytest.mark.parametrize("config", [dict(name="softmax"), dict(name="softmax", num_key_value_heads=2, head_dim=6), dict(name="softmax", num_key_value_heads=1, layers=1),
                                        dict(name="test_decay"), dict(name="test_decay", mixer_kwargs={"width": 1, "sign": -1.}), dict(name=["test_decay", "softmax"])],
                             ids=["softmax", "grouped", "one key", "decay", "options", "hybrid"])
    def test_does_what_a_mixer_must(self, config): check_mixer(**config)

    def test_in_a_fresh_process(self): check_fresh_process({"softmax": dict(num_key_value_heads=2)})

    @pytest.mark.parametrize("broken, said", [
        ("ignores its state", "decoding step by step"), ("ignores the borders", "padded row|packed sequence"), ("changes its state in place", "again"),
        ("forgets", "is not seen"), ("looks ahead", "changes what came before")])
    def test_the_checks_see_what_is_wrong(self, broken, said, monkeypatch):
        "Each way of being wrong is caught: the checks are no formality"
        right, scan = Decay.forward, Decay.scan
        def forward(self, x, state=None, cu_seqlens=None, return_state=False):
            if broken == "ignores its state" and state is not None: state = tuple(torch.zeros_like(s) for s in state)
            if broken == "ignores the borders" and cu_seqlens is not None:
                y, _ = right(self, x)
                return y, right(self, x, None, cu_seqlens, True)[1] if return_state else None
            y, new = right(self, x, state, cu_seqlens, return_state)
            if broken == "changes its state in place" and state is not None: state[1].add_(1)
            if broken == "forgets": y = torch.zeros_like(y)
            if broken == "looks ahead": y = y + x.mean(1, keepdim=True)
            return y, new
        monkeypatch.setattr(Decay, "forward", forward)
        with pytest.raises(AssertionError, match=said): check_mixer("test_decay")


class TestRegistry:
    def test_unknown_names_list_what_there_is(self):
        with pytest.raises(ValueError, match=r"no mixer is called 'flash'; there are .*softmax.*test_decay"): mixer_class("flash")
        assert {"softmax", "test_decay"} <= set(mixer_names()) and mixer_names() == sorted(mixer_names())

    def test_a_name_is_never_imported(self, tmp_path, monkeypatch):
        (tmp_path/"evil_mixer.py").write_text("raise SystemExit('imported')")
        monkeypatch.syspath_prepend(tmp_path)
        for name in ("evil_mixer", "evil_mixer.Mixer", "../evil_mixer"):
            with pytest.raises(ValueError, match="no mixer is called"): Decoder(DecoderConfig(vocab_size=9, hidden_size=8, mixer=name))
        assert "evil_mixer" not in sys.modules

    def test_a_chapter_is_found_by_its_module_of_mixers(self, tmp_path, monkeypatch):
        for name, text in dict(chapter_a="", chapter_b="from rlcr_suite.core.decoder import Mixer, register_mixer\n@register_mixer('from_b')\nclass B(Mixer): pass\n").items():
            (tmp_path/name).mkdir()
            (tmp_path/name/"__init__.py").write_text("")
            if text: (tmp_path/name/"mixers.py").write_text(text)
        monkeypatch.setattr(rlcr_suite, "__path__", [*rlcr_suite.__path__, str(tmp_path)])
        assert mixer_class("from_b").__module__ == "rlcr_suite.chapter_b.mixers"

    def test_a_broken_chapter_is_not_passed_over(self, tmp_path, monkeypatch):
        (tmp_path/"chapter_c").mkdir()
        (tmp_path/"chapter_c"/"__init__.py").write_text("")
        (tmp_path/"chapter_c"/"mixers.py").write_text("import no_such_library")
        monkeypatch.setattr(rlcr_suite, "__path__", [*rlcr_suite.__path__, str(tmp_path)])
        with pytest.raises(ModuleNotFoundError, match="no_such_library"): mixer_class("unheard of")

    def test_names_are_not_taken_twice(self):
        with pytest.raises(ValueError, match="the mixer 'softmax' is rlcr_suite.core.decoder.Softmax already"): register_mixer("softmax")(Decay)
        assert register_mixer("test_decay")(Decay) is Decay
        with pytest.raises(TypeError, match="not a subclass of Mixer"): register_mixer("linear")(nn.Linear)

    def test_options(self):
        assert make("test_decay", mixer_kwargs={"width": 2}).model.layers[1].mixer.options == {"width": 2, "sign": 1.}
        assert make(["softmax", "test_decay"], mixer_kwargs={"width": 2}).model.layers[1].mixer.conv.width == 2
        with pytest.raises(ValueError, match=r"\['widht'\] are no options of \['test_decay'\], which have \['sign', 'width'\]"): make("test_decay", mixer_kwargs={"widht": 2})


class TestConfig:
    def test_round_trip(self, tmp_path):
        config = DecoderConfig(hidden_size=24, num_attention_heads=6, num_key_value_heads=3, num_hidden_layers=3, mixer=["softmax", "test_decay", "softmax"],
                               mixer_kwargs={"width": 4}, pad_token_id=0, eos_token_id=[1, 2])
        config.save_pretrained(tmp_path)
        again = AutoConfig.from_pretrained(tmp_path)
        assert type(again) is DecoderConfig and again.to_dict() | {'_name_or_path': ''} == config.to_dict() and again.mixers == config.mixer and again.head_dim == 4
        assert not {"auto_map", "architectures_module"} & set(json.loads((tmp_path/"config.json").read_text()))

    @pytest.mark.parametrize("fields, said", [(dict(hidden_size=30), "30 is no multiple of num_attention_heads 4"), (dict(num_key_value_heads=3), "no multiple of num_key_value_heads 3"),
                                              (dict(mixer=["softmax"]*3), "mixer names 3 layers of 2")])
    def test_nonsense(self, fields, said):
        with pytest.raises(ValueError, match=said): DecoderConfig(**fields)

    def test_head_dim_may_be_given(self):
        assert make("softmax", hidden_size=30, head_dim=8).model.layers[0].mixer.q_proj.weight.shape == (32, 30)


def llama(model):
    "transformers' Llama with the weights of a softmax decoder"
    c = model.config
    twin = LlamaForCausalLM(LlamaConfig(vocab_size=c.vocab_size, hidden_size=c.hidden_size, intermediate_size=c.intermediate_size, num_hidden_layers=c.num_hidden_layers,
                                        num_attention_heads=c.num_attention_heads, num_key_value_heads=c.num_key_value_heads, head_dim=c.head_dim,
                                        max_position_embeddings=c.max_position_embeddings, rms_norm_eps=c.rms_norm_eps, tie_word_embeddings=c.tie_word_embeddings,
                                        rope_theta=c.rope_theta, pad_token_id=None, bos_token_id=None, eos_token_id=None)).to(model.dtype).eval()
    twin.load_state_dict({in_llama(n): p for n, p in model.state_dict().items()})
    return twin

def in_llama(name):
    "What Llama calls a parameter"
    names = dict(mixer_norm="input_layernorm", mlp_norm="post_attention_layernorm", mixer="self_attn")
    return ".".join(names.get(part, part) for part in name.split("."))


class TestAgainstTransformers:
    @pytest.mark.parametrize("config", [dict(), dict(num_key_value_heads=2), dict(head_dim=10, rope_theta=500., tie_word_embeddings=False)])
    def test_softmax_is_llama(self, config):
        model = make("softmax", torch.float32, **config)
        twin, x = llama(model), tokens(3, 40)
        with torch.no_grad(): same(model(x).logits, twin(x).logits, 2e-5, "logits")
        for m in (model, twin): m(input_ids=x, labels=x).loss.backward()
        theirs = dict(twin.named_parameters())
        assert {in_llama(n) for n, _ in model.named_parameters()} == set(theirs)
        for name, p in model.named_parameters(): same(p.grad, theirs[in_llama(name)].grad, 2e-4, name)

    def test_generation_is_that_of_llama(self):
        model = make("softmax", torch.float64)
        twin, x, mask = llama(model), tokens(3, 7), torch.ones(3, 7, dtype=torch.long)
        mask[0, :4] = 0
        for kw in (dict(do_sample=False), dict(num_beams=3, do_sample=False), dict(do_sample=False, repetition_penalty=1.5)):
            torch.manual_seed(0)
            ours, theirs = (m.generate(x, attention_mask=mask, max_new_tokens=9, pad_token_id=0, **kw) for m in (model, twin))
            assert torch.equal(ours, theirs), kw

    def test_rope(self):
        x, t = torch.randn(2, 9, 3, 8), torch.stack([torch.arange(9), torch.arange(9) + 1000])
        cos, sin = LlamaRotaryEmbedding(LlamaConfig(hidden_size=24, num_attention_heads=3, rope_theta=500.))(x, t)
        want, _ = apply_rotary_pos_emb(x, x, cos, sin, unsqueeze_dim=2)
        assert torch.allclose(rope(x, t, 500.), want, atol=2e-4)        # angles near 1000 in float32
        assert torch.allclose(rope(x, t[0], 500.), rope(x, t[:1].expand(2, -1), 500.))
        assert rope(x.bfloat16(), t).dtype == torch.bfloat16
        with pytest.raises(ValueError, match="even head dimension, got 7"): rope(x[..., :7], t)


class TestShortConv:
    @pytest.mark.parametrize("width", [1, 2, 3, 4, 7])
    def test_is_a_causal_convolution(self, width):
        torch.manual_seed(0)
        conv, x = ShortConv(3, width).double(), torch.randn(2, 11, 3, dtype=torch.float64)
        y, end = conv(x, return_state=True)
        want = F.conv1d(F.pad(x.mT, (width - 1, 0)), conv.weight.flip(0).T[:, None], groups=3).mT
        assert torch.allclose(y, want, atol=1e-12) and end.shape == (2, width - 1, 3) and conv(x)[1] is None
        for cuts in ([0, 1, 2, 5, 11], [0, 11], [0, 0, 3, 11]):
            state, parts = None, []
            for a, b in zip(cuts, cuts[1:]):
                y, state = conv(x[:, a:b], state, return_state=True)
                parts.append(y)
            assert torch.allclose(torch.cat(parts, 1), want, atol=1e-12) and torch.equal(state, end)

    @pytest.mark.parametrize("width", [1, 2, 4, 7])
    def test_packed(self, width):
        torch.manual_seed(0)
        conv, x, cu = ShortConv(2, width).double(), torch.randn(1, 13, 2, dtype=torch.float64), torch.tensor([0, 0, 1, 4, 4, 11, 13, 13])
        y, ends = conv(x, cu_seqlens=cu, return_state=True)
        alone = [conv(x[:, a:b], return_state=True) for a, b in zip(cu, cu[1:])]
        assert torch.allclose(y, torch.cat([a for a, _ in alone], 1), atol=1e-12)
        assert torch.equal(ends, torch.cat([s for _, s in alone]))

    def test_gradients(self):
        torch.manual_seed(0)
        conv, x, s = ShortConv(2, 3).double(), torch.randn(2, 5, 2, dtype=torch.float64, requires_grad=True), torch.randn(2, 2, 2, dtype=torch.float64, requires_grad=True)
        f = lambda x, s, w: torch.func.functional_call(conv, dict(weight=w), (x, s), dict(return_state=True))
        assert torch.autograd.gradcheck(f, (x, s, conv.weight))
        g = lambda x, w: torch.func.functional_call(conv, dict(weight=w), (x,), dict(cu_seqlens=torch.tensor([0, 1, 5]), return_state=True))
        assert torch.autograd.gradcheck(g, (x[:1].detach().requires_grad_(), conv.weight))

    def test_width(self):
        with pytest.raises(ValueError, match="at least 1, got 0"): ShortConv(2, 0)


class TestInputs:
    @pytest.fixture(scope="class")
    @classmethod
    def model(cls): return make("test_decay")

    def test_padding_is_not_computed(self, model):
        seen, x, mask = [], tokens(3, 10), torch.ones(3, 10, dtype=torch.long)
        mask[0, 2:] = 0
        hook = model.model.layers[0].mlp.register_forward_hook(lambda m, args, out: seen.append(tuple(args[0].shape[:2])))
        logits = model(x, attention_mask=mask).logits
        hook.remove()
        assert seen == [(1, 22)] and not logits[0, 2:].any()

    def test_a_row_of_nothing_but_padding(self, model):
        x, mask = tokens(2, 6), torch.tensor([[0]*6, [1]*6])
        out = model(x, attention_mask=mask)
        same(out.logits[1], model(x[1:]).logits[0], TOL, "the other row")
        more = model(x[:, :2], past_key_values=out.past_key_values).logits
        same(more[0], model(x[:1, :2]).logits[0], TOL, "the row, once it has tokens")

    def test_positions_that_start_again_are_packed_sequences(self, model):
        x, cu = tokens(1, 12), torch.tensor([0, 5, 6, 12])
        where = torch.tensor([[0, 1, 2, 3, 4, 0, 0, 1, 2, 3, 4, 5]])
        same(model(x, position_ids=where).logits, model(x, cu_seqlens=cu).logits, TOL, "packed by positions")
        rows, pos = tokens(2, 6), torch.tensor([[0, 1, 2, 0, 1, 2], [0, 1, 2, 3, 0, 0]])
        mask = torch.tensor([[1]*6, [1, 1, 1, 1, 1, 0]])
        y = model(rows, position_ids=pos, attention_mask=mask).logits
        for i, a, b in ((0, 0, 3), (0, 3, 6), (1, 0, 4), (1, 4, 5)): same(y[i, a:b], model(rows[i:i + 1, a:b]).logits[0], TOL, (i, a, b))
        assert model(x, position_ids=where).past_key_values is None
        with pytest.raises(ValueError, match="use cu_seqlens"): model(x, position_ids=where, use_cache=True)
        with pytest.raises(ValueError, match="continues a cache"): model(x, position_ids=where, past_key_values=model(x).past_key_values)

    def test_positions_that_count_on_change_nothing(self, model):
        x = tokens(2, 6)
        for pos in (torch.arange(6)[None], torch.arange(6).expand(2, 6) + 7): assert torch.equal(model(x, position_ids=pos).logits, model(x).logits)
        left = torch.tensor([[0, 0, 1, 1, 1, 1], [1]*6])
        zeros = torch.tensor([[0, 0, 0, 1, 2, 3], [0, 1, 2, 3, 4, 5]])               # what `generate` and `core.lm` send
        assert torch.equal(model(x, attention_mask=left, position_ids=zeros).logits, model(x, attention_mask=left).logits)

    @pytest.mark.parametrize("kw, said", [
        (dict(attention_mask=torch.ones(2, 5)), r"shape \(B, past \+ T\) = \(2, 6\).*got \(2, 5\)"), (dict(attention_mask=torch.ones(2, 1, 6, 6)), "1 for real tokens"),
        (dict(cu_seqlens=torch.tensor([0, 6])), "one row, no padding and no cache"), (dict(past_key_values=DynamicCache()), "must be a DecoderCache"),
        (dict(inputs_embeds=torch.zeros(2, 6, 32)), "either input_ids or inputs_embeds"), (dict(labels=torch.zeros(2, 6, dtype=torch.long), logits_to_keep=2), "do not fit the logits")])
    def test_what_is_refused(self, model, kw, said):
        with pytest.raises(ValueError, match=said): model(tokens(2, 6), **kw)

    def test_boundaries_are_checked(self, model):
        for cu in ([0, 5], [1, 6], [0, 4, 2, 6]):
            with pytest.raises(ValueError, match="cu_seqlens must start with 0"): model(tokens(1, 6), cu_seqlens=torch.tensor(cu))
        with pytest.raises(ValueError, match="no padding"): model(tokens(1, 6), cu_seqlens=torch.tensor([0, 6]), attention_mask=torch.tensor([[1, 1, 1, 1, 1, 0]]))

    def test_embeddings_in_place_of_ids(self, model):
        x = tokens(2, 6)
        e = model.get_input_embeddings()(x)
        assert torch.equal(model(inputs_embeds=e).logits, model(x).logits)
        kw = dict(max_new_tokens=4, do_sample=False, pad_token_id=0, attention_mask=torch.ones_like(x))
        assert torch.equal(model.generate(inputs_embeds=e, **kw), model.generate(x, **kw)[:, 6:])

    def test_logits_to_keep_and_hidden_states(self, model):
        x = tokens(2, 6)
        out = model(x, output_hidden_states=True)
        assert torch.equal(model(x, logits_to_keep=2).logits, out.logits[:, -2:]) and torch.equal(model(x, logits_to_keep=torch.tensor([0, 3])).logits, out.logits[:, [0, 3]])
        assert len(out.hidden_states) == 3 and torch.equal(model.lm_head(out.hidden_states[-1]), out.logits) and torch.equal(out.hidden_states[0], model.get_input_embeddings()(x))
        assert model(x, use_cache=False, return_dict=False)[0].equal(out.logits)


class TestLoss:
    def test_counts_what_has_a_predecessor(self):
        model, x, mask = make("test_decay", torch.float32), tokens(3, 9), torch.ones(3, 9, dtype=torch.long)
        mask[0, :4], mask[1, 6:], mask[2, 3:5] = 0, 0, 0
        total, n = 0., 0
        for row, m in zip(x, mask.bool()):
            total = total + F.cross_entropy(model(row[None, m]).logits[0, :-1], row[m][1:], reduction="sum")
            n += m.sum() - 1
        assert torch.allclose(model(x, attention_mask=mask, labels=x).loss, total/n, rtol=1e-5)
        assert torch.allclose(model(x, attention_mask=mask, labels=x, num_items_in_batch=torch.tensor(7)).loss, total/7, rtol=1e-5)
        some = x.masked_fill(torch.arange(9) % 2 == 0, -100)
        want = [F.cross_entropy(model(r[None, m]).logits[0, :-1], s[m][1:], reduction="none")[s[m][1:] >= 0] for r, s, m in zip(x, some, mask.bool())]
        assert torch.allclose(model(x, attention_mask=mask, labels=some).loss, torch.cat(want).mean(), rtol=1e-5)

    def test_no_cache_while_training(self):
        model, x = make("softmax", torch.float32), tokens(2, 5)
        assert model(x).past_key_values is not None
        assert model.train()(x).past_key_values is None and model(x, use_cache=True).past_key_values is not None
        model.activation_checkpointing_enable()
        assert model(x, use_cache=True).past_key_values is None


class TestCache:
    @torch.no_grad()
    def test_rows_are_chosen_repeated_and_reordered(self):
        model, x, mask = make(["softmax", "test_decay"]), tokens(4, 7), torch.ones(4, 7, dtype=torch.long)
        mask[1, :3] = 0
        nxt, full = tokens(4, 1, seed=4), model(x, attention_mask=mask).past_key_values
        want = model(nxt, past_key_values=copy.deepcopy(full)).logits
        picks = dict(reorder_cache=torch.tensor([2, 2, 0, 1]), batch_select_indices=torch.tensor([3, 1]))
        for how, rows in picks.items():
            cache = copy.deepcopy(full)
            getattr(cache, how)(rows)
            same(model(nxt[rows], past_key_values=cache).logits, want[rows], TOL, how)
            assert cache.get_seq_length() == 8 and cache.rows == len(rows) and len(cache) == 2
        full.batch_repeat_interleave(3)
        same(model(nxt.repeat_interleave(3, 0), past_key_values=full).logits, want.repeat_interleave(3, 0), TOL, "repeat")
        with pytest.raises(ValueError, match="the cache has 12 rows and the batch 4"): model(nxt, past_key_values=full)
        with pytest.raises(ValueError, match="cannot be cropped"): full.crop(1)
        full.reset()
        same(model(nxt, past_key_values=full).logits, model(nxt).logits, TOL, "after a reset")

    def test_assisted_decoding_is_refused(self):
        model = make("test_decay", torch.float32)
        with pytest.raises(ValueError, match="stateful"): model.generate(tokens(1, 5), assistant_model=model, max_new_tokens=3, do_sample=False, pad_token_id=0)

    def test_a_conversation_goes_on_from_its_cache(self):
        model, x = make(["softmax", "test_decay"]), tokens(2, 12)
        out = model.generate(x[:, :6], max_new_tokens=3, do_sample=False, pad_token_id=0, attention_mask=torch.ones_like(x[:, :6]), return_dict_in_generate=True)
        longer = torch.cat([out.sequences, x[:, 6:]], 1)
        kw = dict(max_new_tokens=4, do_sample=False, pad_token_id=0, attention_mask=torch.ones_like(longer))
        assert torch.equal(model.generate(longer, past_key_values=out.past_key_values, **kw), model.generate(longer, **kw))


TOK = word_tokenizer(["red green blue. Which colour? none"])
PROMPTS = ["red", "red green blue. Which colour?", "none none none", [{"role": "user", "content": "Which colour?"}]]


class TestCoreLM:
    @pytest.fixture(scope="class", params=["softmax", "test_decay"])
    @classmethod
    def model(cls, request): return tiny_decoder(TOK, request.param, hidden_size=32, layers=2, heads=4, intermediate_size=48, initializer_range=.25, seed=2)

    def test_greedy_in_a_batch_is_greedy_alone(self, model):
        alone = [generate(model, TOK, [p], max_new_tokens=9, temperature=0)[0] for p in PROMPTS]
        assert generate(model, TOK, PROMPTS, max_new_tokens=9, temperature=0) == alone and len({a[0] for a in alone}) > 1

    def test_samples_do_not_depend_on_the_batch(self, model):
        runs = [generate(model, TOK, PROMPTS, n=3, max_new_tokens=9, seed=7, batch_size=b) for b in (1, 5, 100)]
        assert runs[0] == runs[1] == runs[2] != generate(model, TOK, PROMPTS, n=3, max_new_tokens=9, seed=8)

    def test_logprobs(self, model):
        said = [" red", " none none", " blue.", " green"]
        together, alone = sequence_logprobs(model, TOK, PROMPTS, said, eos=True), [sequence_logprobs(model, TOK, [p], [s], eos=True)[0] for p, s in zip(PROMPTS, said)]
        for a, b in zip(together, alone): assert abs(a - b).max() < 1e-4

    def test_saved_and_loaded_with_its_tokenizer(self, model, tmp_path):
        again, tok = load(save(model, TOK, tmp_path/"m"), device="cpu")
        assert generate(again, tok, PROMPTS, n=2, max_new_tokens=6, seed=1) == generate(model, TOK, PROMPTS, n=2, max_new_tokens=6, seed=1)

    def test_loaded_where_only_core_lm_was_imported(self, tmp_path):
        save(tiny_decoder(TOK, hidden_size=16, layers=1, heads=2, intermediate_size=16), TOK, tmp_path/"m")
        code = "import sys; from rlcr_suite.core.lm import load; print(type(load(sys.argv[1], device='cpu')[0]).__name__)"
        done = subprocess.run([sys.executable, "-c", code, tmp_path/"m"], capture_output=True, text=True, timeout=600)
        assert done.stdout.split() == ["Decoder"], done.stderr

    def test_seeds(self):
        a, b, c = (tiny_decoder(TOK, "test_decay", hidden_size=16, seed=s) for s in (0, 0, 1))
        assert all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters())) and not torch.equal(a.lm_head.weight, c.lm_head.weight)
        state = torch.random.get_rng_state()
        tiny_decoder(9)
        assert torch.equal(torch.random.get_rng_state(), state)


class TestTraining:
    def rows(self):
        "Repeats of a period of three, of unequal lengths"
        return [dict(input_ids=(torch.arange(6 + i % 5) % 3 + 1 + 3*(i % 2)).tolist()) for i in range(32)]

    def collate(self, rows):
        T = max(len(r["input_ids"]) for r in rows)
        ids = torch.tensor([r["input_ids"] + [0]*(T - len(r["input_ids"])) for r in rows])
        return dict(input_ids=ids, attention_mask=(ids > 0).long(), labels=ids.masked_fill(ids == 0, -100))

    @pytest.mark.parametrize("mixer, checkpointing", [("softmax", False), ("test_decay", True)])
    def test_trainer(self, mixer, checkpointing, tmp_path):
        pytest.importorskip("accelerate")
        model = tiny_decoder(VOCAB, mixer, hidden_size=32, intermediate_size=48, pad_token_id=0, initializer_range=.1, seed=0)
        args = TrainingArguments(str(tmp_path), max_steps=60, per_device_train_batch_size=8, learning_rate=1e-2, use_cpu=True, report_to=[], logging_steps=60, save_steps=60,
                                 disable_tqdm=True, activation_checkpointing=checkpointing, dataloader_pin_memory=False, seed=0)
        trainer = Trainer(model, args, train_dataset=self.rows(), eval_dataset=self.rows()[:9], data_collator=self.collate)
        before = trainer.evaluate()["eval_loss"]
        trainer.train()
        after = trainer.evaluate()["eval_loss"]
        assert before > 2.5 and after < .05, "the first token of a row tells all that follow"
        again = AutoModelForCausalLM.from_pretrained(tmp_path/"checkpoint-60")
        batch = self.collate(self.rows()[:9])
        assert torch.equal(again(**batch).logits, model.eval()(**batch).logits)

    def test_a_head_for_whole_sequences(self, tmp_path):
        config = DecoderConfig(vocab_size=VOCAB, hidden_size=16, intermediate_size=16, mixer="test_decay", num_labels=1, pad_token_id=0, initializer_range=.3)
        model = AutoModelForSequenceClassification.from_config(config).eval()
        x = tokens(2, 6).clamp(min=1)
        x[0, :2] = 0
        with torch.no_grad():
            same(model(x, attention_mask=(x > 0).long()).logits[0], model(x[:1, 2:]).logits[0], 1e-5, "score of a padded row")
            model.save_pretrained(tmp_path)
            assert torch.equal(AutoModelForSequenceClassification.from_pretrained(tmp_path)(x).logits, model(x).logits)

    @pytest.mark.parametrize("mixer", ["softmax", "test_decay"])
    def test_half_precision(self, mixer):
        model, x = make(mixer, torch.float32, initializer_range=.1), tokens(2, 20)
        want = model(x).logits
        half = copy.deepcopy(model).bfloat16()(x).logits
        assert half.dtype == torch.bfloat16 and (half.float() - want).norm() < .05*want.norm()
        with torch.autocast("cpu", torch.bfloat16): assert (model(x).logits.float() - want).norm() < .05*want.norm()
