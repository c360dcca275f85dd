"The mixers of the PaTH chapter do all that every mixer of `core.decoder` must."
import pytest
import torch
from mixer_checks import check_fresh_process, check_mixer, make
from rlcr_suite.path_attention.mixers import Fox, Path, PathFox

CASES = (("path", {}), ("path_fox", {}), ("fox", {}),
         ("path_fox", dict(num_key_value_heads=2, mixer_kwargs=dict(qk_norm=True, scale_gate=True, conv_silu=True, window=4))),
         ("fox", dict(num_key_value_heads=1, head_dim=6)))

@pytest.mark.parametrize("name,config", CASES)
def test_mixer(name, config):
    "A fresh forget gate halves what is seen at every token: after 16 of them 2^-16 is left, which is far above the bar of 1e-6, after 37 nothing is"
    check_mixer(name, reach=None if name == "path" else 16, **config)

def test_hybrid_of_layers(): check_mixer(["path", "fox", "softmax"], layers=3)

def test_checkpoints_find_their_mixer(): check_fresh_process({name: {} for name in ("path", "path_fox", "fox")})

@pytest.mark.parametrize("name,cls", (("path", Path), ("path_fox", PathFox), ("fox", Fox)))
def test_parameters(name, cls):
    "What a layer has: reflections of rank 32 and width 3 but for `fox`, a gate a query head but for `path`"
    model = make(name, hidden_size=64, heads=4, num_key_value_heads=2)
    mixer = model.model.layers[0].mixer
    assert isinstance(mixer, cls)
    shapes = {n: tuple(p.shape) for n, p in mixer.named_parameters()}
    want = {"q_proj.weight": (64, 64), "k_proj.weight": (32, 64), "v_proj.weight": (32, 64), "o_proj.weight": (64, 64)}
    if name != "fox": want |= {"w_proj.0.weight": (32, 64), "w_proj.1.weight": (32, 32), "w_conv.weight": (3, 32), "beta_proj.weight": (2, 64), "beta_proj.bias": (2,)}
    if name != "path": want |= {"gate_proj.weight": (4, 64), "gate_proj.bias": (4,)}
    assert shapes == want

def test_beta_and_w_are_in_range():
    mixer = make("path", hidden_size=64).model.layers[0].mixer
    x = 100*torch.randn(2, 9, 64, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    _, _, _, w, beta, gate = mixer.project(x, None, None, False)[0]
    assert gate is None and beta.min() >= 0 and beta.max() <= 2 and beta.max() > 1.9
    torch.testing.assert_close(w.norm(dim=-1), torch.ones(2, 9, 4, dtype=torch.float64))

def test_queries_are_normalised_in_decoding_too():
    "A public layer normalises them in training only"
    model = make("path", mixer_kwargs=dict(qk_norm=True))
    x = torch.arange(24).view(2, 12)
    with torch.no_grad():
        whole, out = model(x).logits, model(x[:, :11], use_cache=True)
        torch.testing.assert_close(model(x[:, 11:], past_key_values=out.past_key_values).logits[:, 0], whole[:, 11], rtol=1e-9, atol=1e-9)
        for p in (model.model.layers[0].mixer.q_norm.weight,): p.mul_(2)
        assert not torch.allclose(model(x).logits, whole)

def test_half_precision_model():
    x = torch.randint(0, 29, (2, 70), generator=torch.Generator().manual_seed(0))
    for name in ("path", "path_fox", "fox"):
        with torch.no_grad():
            low, high = (make(name, dtype, initializer_range=.05)(x).logits.double() for dtype in (torch.bfloat16, torch.float64))
        assert (low - high).norm() < .03*high.norm()
