"log_linear.mixers: what every mixer must do, and what these say of themselves."
import pytest
import torch
from rlcr_suite.core.decoder import DecoderConfig, mixer_class, tiny_decoder
from rlcr_suite.log_linear.fenwick import levels_of
from rlcr_suite.log_linear.mixers import MixerState
from mixer_checks import check_fresh_process, check_mixer, make, tokens

NAMES = ("mamba2", "gated_deltanet", "log_linear_mamba2", "log_linear_gdn")
LIFTED = dict(mamba2="log_linear_mamba2", gated_deltanet="log_linear_gdn")


@pytest.mark.parametrize("name", NAMES)
def test_does_what_a_mixer_must(name): check_mixer(name)

@pytest.mark.parametrize("name, config", [
    ("mamba2", dict(num_key_value_heads=1, mixer_kwargs={"conv_width": 1, "state_dim": 5})), ("log_linear_gdn", dict(num_key_value_heads=2, mixer_kwargs={"negative": True, "state_dim": 12})),
    (["log_linear_gdn", "softmax"], {})], ids=["one key, no convolution", "grouped, negative eigenvalues", "hybrid"])
def test_with_options(name, config): check_mixer(name, **config)

def test_in_a_fresh_process(): check_fresh_process({name: {} for name in NAMES})

@pytest.mark.parametrize("linear", LIFTED)
def test_one_seed_gives_both_forms_the_same_weights(linear):
    "So a comparison of the two begins with one function: every level weighs ln 2"
    a, b = (tiny_decoder(9, name, seed=2, hidden_size=32).state_dict() for name in (linear, LIFTED[linear]))
    assert all(a[n].equal(b[n]) for n in a) and all(".levels." in n for n in b.keys() - a.keys())
    levels = tiny_decoder(9, LIFTED[linear], hidden_size=32).model.layers[0].mixer.levels
    assert torch.allclose(levels(torch.randn(1, 3, 32)), torch.tensor(2.).log())

@pytest.mark.parametrize("linear", LIFTED)
@torch.no_grad()
def test_levels_that_weigh_one_change_nothing(linear):
    "The lifted layer differs in the levels alone: with softplus(0) = ln 2 for all, it reads ln 2 times what the linear one reads"
    a, b = make(linear), make(LIFTED[linear])
    kept = b.load_state_dict(a.state_dict(), strict=False)
    assert not kept.unexpected_keys and all(".levels." in n for n in kept.missing_keys) and len(kept.missing_keys) == 4
    for layer in b.model.layers: layer.mixer.levels.forward = lambda x, H=4: x.new_ones(*x.shape[:2], H, levels_of(256))
    x = tokens(2, 70)
    assert (a(x).logits - b(x).logits).abs().max() <= 1e-9*a(x).logits.abs().max()
    del layer.mixer.levels.forward
    assert (a(x).logits - b(x).logits).abs().max() > 1e-3*a(x).logits.abs().max()

@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_what_a_row_remembers(name):
    "Its size does not depend on the length; only the buckets of the last token hold anything"
    config = DecoderConfig(hidden_size=32, num_attention_heads=4, max_position_embeddings=100)
    mixer = mixer_class(name)(config, 0)
    sizes = set()
    for T in (1, 13, 77):
        _, state = mixer(torch.randn(2, T, 32), return_state=True)
        assert isinstance(state, MixerState) and state.conv.shape[1] == 3
        if name.startswith("log_linear"):
            assert state.memory.S.shape == (2, 4, levels_of(100), 8, 8) and state.memory.t.tolist() == [T, T]
            assert int(state.memory.S.flatten(3).any(-1)[0, 0].sum()) == (T - 1).bit_count() + 1
            sizes.add(state.memory.S.shape)
        else: sizes.add(state.memory.shape)
    assert len(sizes) == 1

@pytest.mark.parametrize("name", ["log_linear_mamba2", "log_linear_gdn"])
def test_a_sequence_beyond_the_levels_is_refused(name):
    model = make(name, max_length=16)
    assert model(tokens(1, 16)).logits.shape[1] == 16
    with pytest.raises(ValueError, match="5 levels hold 16 tokens, but the sequence has 17"): model(tokens(1, 17))
    with pytest.raises(ValueError, match="levels hold 16 tokens"): model.generate(tokens(1, 10), max_new_tokens=9, do_sample=False, pad_token_id=0, eos_token_id=None)

@pytest.mark.parametrize("name", NAMES)
def test_decays_stay_in_float32_when_the_model_is_half(name):
    "A bfloat16 model is near its float32 original: a decay rounded to bfloat16 would be off by half a per cent a step"
    a = make(name, torch.float32, initializer_range=.05)
    b = make(name, torch.bfloat16, initializer_range=.05)
    seen = []
    mixer = b.model.layers[0].mixer
    attend = mixer.attend
    mixer.attend = lambda x, q, k, v, g, beta, *rest: seen.append((v.dtype, g.dtype)) or attend(x, q, k, v, g, beta, *rest)
    with torch.no_grad(): p, q = a(tokens(2, 60)).logits, b(tokens(2, 60)).logits
    assert seen == [(torch.bfloat16, torch.float32)] and q.dtype == torch.bfloat16
    assert (p - q).norm() <= .05*p.norm()

@pytest.mark.parametrize("options, said", [({"state_dim": -1}, "state_dim"), ({"conv_width": 0}, "conv_width"), ({"states": 4}, "states"), ({"dt_min": 0}, "dt_min"), ({"dt_min": 1.}, "dt_min"), ({"A_init_range": [2, 1]}, "A_init_range")])
def test_bad_options(options, said):
    with pytest.raises(ValueError, match=said): make("mamba2", mixer_kwargs=options)
