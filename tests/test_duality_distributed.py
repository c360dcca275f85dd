"""Two gloo processes against one: data parallelism in every mode and kind of map, what it sends around, FSDP2, and workers with maps of their own."""
import subprocess, sys
from pathlib import Path
import pytest
import torch
from rlcr_suite.duality import DualOptimizer, Left, attach
from duality_workers import MAPS, MODES, REFRESH, STEPS, batches, flat, loss_of, network, train

SAME = 1e-12    # float64: sums of two halves instead of one sum, over 8 steps of Adam and 2 changes of the map

def apart(a, b): return ((a - b).norm()/b.norm()).item()

@pytest.fixture(scope="module")
def two(tmp_path_factory):
    "What rank 0 of two processes found"
    folder, script = tmp_path_factory.mktemp("two"), Path(__file__).with_name("duality_workers.py")
    processes = [subprocess.Popen([sys.executable, str(script), str(i), str(folder)], stderr=subprocess.PIPE, text=True) for i in range(2)]
    try: errors = [p.communicate(timeout=240)[1] for p in processes]
    finally:
        for p in processes: p.kill()
    assert all(p.returncode == 0 for p in processes), "\n".join(errors)[-3000:]
    return torch.load(folder/"results.pt", weights_only=False)

def one(mode, kind, **options):
    "The same training in one process, on both workers' batches"
    model = network()
    max_norm = options.pop("max_norm", None)
    d = attach(model, "[02]", MAPS[kind], mode=mode, refresh=REFRESH, **options)
    train(model, d, batches().flatten(1, 2), max_norm)
    return model, d

@pytest.mark.parametrize("mode,kind", MODES)
def test_ddp_equals_one_process(two, mode, kind):
    model, d = one(mode, kind)
    d.merge()
    assert apart(two["ddp", mode, kind][0], flat(model)) < SAME

def test_workers_have_the_same_weights(two): assert two["apart"] == 0

@pytest.mark.parametrize("mode,kind", [x for x in MODES if x[0] != "gradient"])
def test_ddp_sends_projected_gradients_only(two, mode, kind):
    d = attach(network(), "[02]", MAPS[kind], mode=mode)
    small = sum(p.numel() for p in d.parameters())
    assert two["ddp", mode, kind][1] == small < two["ddp", "gradient", kind][1] == sum(p.numel() for p in network().parameters())

@pytest.mark.parametrize("mode", ("adapter", "fused"))
@pytest.mark.parametrize("kind,state", (("random", "carry"), ("columns", "rotate"), ("sketch", "reset")))
def test_fsdp2_equals_one_process(two, mode, kind, state):
    "Sharded by rows, unevenly; clipped by the norm over all shards"
    model, d = one(mode, kind, state=state, max_norm=.5)
    weights, ups = two["fsdp", mode, kind, state]
    assert apart(weights, torch.cat([p.detach().reshape(-1) for n, p in model.named_parameters() if not n.endswith("dual")])) < SAME
    for t in d.targets: assert apart(ups[t.name], t.projection.up(t.lam.detach())) < 1e-11      # small sums of large terms

@pytest.mark.parametrize("mode", ("adapter", "fused"))
def test_workers_with_maps_of_their_own(two, mode):
    "Two models in one process, averaged by hand at the end of each period"
    models = [network(), network()]
    optimizers = [DualOptimizer(torch.optim.AdamW, attach(m, "[02]", Left(3, seed=i), refresh=STEPS//2), lr=1e-2, weight_decay=.1) for i, m in enumerate(models)]
    for t, both in enumerate(batches()):
        for m, opt, x in zip(models, optimizers, both):
            opt.zero_grad(); loss_of(m, x).backward(); opt.step()
        if (t + 1) % (STEPS//2) == 0:
            with torch.no_grad():
                for p, q in zip(*(m.parameters() for m in models)): p.copy_((p + q)/2); q.copy_(p)
    assert apart(two["workers", mode], flat(models[0])) < SAME
