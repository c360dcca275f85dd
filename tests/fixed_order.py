"Operations whose sums a GPU makes in no fixed order, found on a CPU: by what is asked of torch, not by the luck of two equal runs."
from contextlib import contextmanager
import torch
from torch.utils._python_dispatch import TorchDispatchMode

# of the list in `torch.use_deterministic_algorithms`, what sums of floating-point numbers could come to; indexing and gathering are here by what their gradients call
NEVER = {"cumsum", "cumprod", "logcumsumexp", "scatter_add", "scatter_reduce", "put", "bincount", "histc", "embedding_dense_backward"}

def repeated(index)->bool:
    "Whether a place is named twice by an index tensor, or by several together"
    given = [i for i in index if i is not None]
    if not given or any(i.dtype == torch.bool for i in given): return False # a mask names no place twice
    places = torch.stack([i.flatten() for i in torch.broadcast_tensors(*given)], 1)
    return len(places.unique(dim=0)) < len(places)

class FixedOrder(TorchDispatchMode):
    "Refuses them, in forward and backward: running sums and scattered sums, and writing to one place twice"
    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        name = op._schema.name.removeprefix("aten::").rstrip("_")
        floating = any(isinstance(x, torch.Tensor) and x.is_floating_point() for x in args)
        assert not (floating and name in NEVER), f"{name} has no fixed order on a GPU"
        if name in ("index_add", "index_copy"): assert not repeated([args[2]]), f"{name} to one place twice"
        if name in ("index_put", "_index_put_impl", "_unsafe_index_put"): assert not repeated(args[1]), f"{name} to one place twice"
        return op(*args, **(kwargs or {}))

@contextmanager
def fixed_order():
    "`FixedOrder`, and torch's own deterministic mode, which knows of some operations on a CPU"
    was = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        with FixedOrder(): yield
    finally: torch.use_deterministic_algorithms(was)
