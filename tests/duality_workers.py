"""What each of two processes does in tests/test_duality_distributed.py: every scenario in turn, the results of rank 0 into a file."""
import sys
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from rlcr_suite.duality import DualOptimizer, Left, OneSided, Right, TwoSided, attach, per_worker_map

f64, STEPS, REFRESH = torch.float64, 8, 3

def network():
    "16, 13: sizes that two processes cannot share evenly are among them"
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(10, 16), nn.GELU(), nn.Linear(16, 13), nn.GELU(), nn.Linear(13, 3)).double()

def batches():
    "Of both workers: (steps, worker, rows, features)"
    return torch.randn(STEPS, 2, 6, 10, generator=torch.Generator().manual_seed(1), dtype=f64)

def loss_of(model, x): return (model(x) - torch.stack([x[:, :4].prod(1), x[:, 0].sin(), x[:, 1]*x[:, 2]], 1)).square().mean()

def train(model, d, data, max_norm=None):
    "A step for each batch; the model may be wrapped"
    optimizer = DualOptimizer(torch.optim.AdamW, d, lr=1e-2, weight_decay=.1, max_norm=max_norm)
    for x in data:
        optimizer.zero_grad()
        loss_of(model, x).backward()
        optimizer.step()
    return optimizer

def flat(model): return torch.cat([(p.full_tensor() if hasattr(p, "full_tensor") else p).detach().reshape(-1) for p in model.parameters()])

MAPS = {"random": Left(3), "columns": Right(3, "gaussian"), "sketch": TwoSided(3, "randomized-svd"), "svd": OneSided(3, "svd")}
MODES = [(mode, kind) for mode in ("gradient", "adapter", "fused") for kind in MAPS if (mode, kind) != ("fused", "svd")]

def ddp(mode, kind, mine):
    "Weights, and how many numbers were sent around in each step"
    model = network()
    d, sent = attach(model, "[02]", MAPS[kind], mode=mode, refresh=REFRESH), []
    wrapped = DistributedDataParallel(model)
    def count(state, bucket):
        sent.append(bucket.buffer().numel())
        return dist.all_reduce(bucket.buffer().div_(2), async_op=True).get_future().then(lambda f: f.value()[0])
    wrapped.register_comm_hook(None, count)
    train(wrapped, d, mine)
    d.merge()
    return flat(model), sum(sent)/STEPS

def fsdp(mode, kind, state, mine):
    "Weights of a model that is sharded layer by layer; clipped"
    model = network()
    d = attach(model, "[02]", MAPS[kind], mode=mode, refresh=REFRESH, state=state)
    mesh = init_device_mesh("cpu", (2,))
    for layer in model:
        if isinstance(layer, nn.Linear): fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    train(model, d, mine, max_norm=.5)
    weights = {n: p.full_tensor().detach() for n, p in model.named_parameters() if not n.endswith("dual")}
    lam = d.state_dict()["lam"]
    return torch.cat([w.reshape(-1) for w in weights.values()]), {n: (x, d.targets[i].projection) for i, (n, x) in enumerate(lam.items())}

def workers(mode, mine, rank):
    "Each with a map of its own"
    model = network()
    d = attach(model, "[02]", per_worker_map(rank, 2, Left(3)), mode=mode, refresh=STEPS//2)
    train(model, d, mine)
    d.merge()
    return flat(model)

def main(rank, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    mine, results = batches()[:, rank], {}
    for mode, kind in MODES: results["ddp", mode, kind] = ddp(mode, kind, mine)
    for mode in ("adapter", "fused"):
        for kind, state in (("random", "carry"), ("columns", "rotate"), ("sketch", "reset")):
            w, lam = fsdp(mode, kind, state, mine)
            results["fsdp", mode, kind, state] = w, {n: p.up(x) for n, (x, p) in lam.items()}
        results["workers", mode] = workers(mode, mine, rank)
    both = [torch.zeros_like(results["ddp", "fused", "random"][0]) for _ in range(2)]
    dist.all_gather(both, results["ddp", "fused", "random"][0])
    results["apart"] = (both[0] - both[1]).abs().max().item()
    if rank == 0: torch.save(results, f"{folder}/results.pt")
    dist.destroy_process_group()

if __name__ == "__main__": main(int(sys.argv[1]), sys.argv[2])
