"""Training by projected gradients beside galore-torch, on a Llama of 21 million parameters in float32: bytes held when gradients are accumulated, seconds of a step, of a linear
layer forward and backward, and of a change of the maps; and whether the optimizer's state comes back through torch.load's defaults. On a CPU one thread."""
import importlib, io, time, warnings
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from _harness import arguments, in_turns, spread, write
from rlcr_suite.duality import DualOptimizer, Left, OneSided, Right, attach
from rlcr_suite.duality.experiment import footprint, galore_class

TARGETS, REFRESH, VOCAB = r'.*_proj', 200, 512   # a period of 200 steps, as in the paper and in GaLore
FULL = dict(hidden_size=512, intermediate_size=2048, num_hidden_layers=5, num_attention_heads=8)
SMALL = dict(hidden_size=64, intermediate_size=128, num_hidden_layers=1, num_attention_heads=2)
LAYERS = dict(full=((4096, 1024, 1024), (2048, 2048, 2048)), small=((64, 32, 32),))   # tokens, inputs, outputs

def llama(sizes:dict, seed:int)->LlamaForCausalLM:
    torch.manual_seed(seed)
    return LlamaForCausalLM(LlamaConfig(vocab_size=VOCAB, max_position_embeddings=128, tie_word_embeddings=False, **sizes))

def pair(name:str, sizes:dict, rank:int, args)->tuple[nn.Module, torch.optim.Optimizer]:
    'A model and its optimizer: "galore" by galore-torch; "fused" with random maps, "sketched" with sketched ones, "int8" on weights of eight bits by this library'
    model = llama(sizes, args.seed).to(args.device)
    if name == 'galore': return model, galore(model, rank)
    kind = 'randomized-svd' if name == 'sketched' else 'semi-orthogonal'
    d = attach(model, TARGETS, OneSided(rank, kind, args.seed), mode='fused', refresh=REFRESH, weights='int8' if name == 'int8' else 'float')
    return model, DualOptimizer(torch.optim.AdamW, d, lr=1e-3, fused=True)   # one pass over the state; galore-torch brings an AdamW of its own

def galore(model, rank:int)->torch.optim.Optimizer:
    "galore-torch over the same layers, as its authors use it"
    mine = [m.weight for n, m in model.named_modules() if n.endswith('_proj')]
    rest = [p for p in model.parameters() if all(p is not q for q in mine)]
    return galore_class()([dict(params=rest), dict(params=mine, rank=rank, update_proj_gap=REFRESH, scale=.25, proj_type='std')], lr=1e-3, no_deprecation_warning=True)

def batches(tokens:int, parts:int, args)->list[torch.Tensor]:
    g = torch.Generator().manual_seed(args.seed)
    return [torch.randint(VOCAB, (tokens//128, 128), generator=g).to(args.device) for _ in range(parts)]

def accumulated(model, opt, data:list[torch.Tensor])->None:
    "One step over several microbatches"
    opt.zero_grad()
    for ids in data: (model(input_ids=ids, labels=ids, use_cache=False).loss/len(data)).backward()
    opt.step()

def memory(sizes:dict, args)->list[dict]:
    """Bytes between the forward and the backward pass of a microbatch, beside the gradients of the one before: with a checkpoint at each block, as those train who are short of memory,
    and without. What a layer computes again in the backward pass is not counted"""
    rows = []
    for fraction, checkpointed, tokens in ((8, True, 128), (4, True, 128), (8, False, 1024)):
        found = {}
        for name in ('galore', 'fused', 'int8'):
            model, opt = pair(name, sizes, sizes['hidden_size']//fraction, args)
            if checkpointed: model.gradient_checkpointing_enable(dict(use_reentrant=False))
            model.train()
            data = batches(tokens, 1, args)
            accumulated(model, opt, data)
            opt.zero_grad()
            found[name] = footprint(model, opt, lambda: model(input_ids=data[0], labels=data[0], use_cache=False).loss)
            if name == 'galore': spare = unread(opt)
        total = {name: sum(f.values()) for name, f in found.items()}
        rows.append(dict(case='memory', rank=sizes['hidden_size']//fraction, fraction=fraction, checkpointed=checkpointed, tokens=tokens, bytes=found, total=total, ratio=total['fused']/total['galore'],
                         ratio_copied=total['fused']/(total['galore'] - spare)))
    return rows

def unread(opt)->int:
    "Bytes that galore-torch's projectors keep alive and never read: the r singular vectors of a float32 weight are a view of all of them"
    maps = [s['projector'].ortho_matrix for s in opt.state.values() if 'projector' in s]
    return sum(P.untyped_storage().nbytes() - P.numel()*P.element_size() for P in maps)

def layer(T:int, n:int, m:int, args)->dict:
    "Forward and backward of one layer at a rank of an eighth of its width: the full gradient, projected afterwards, and the fused form"
    torch.manual_seed(args.seed)
    x, dy, W = torch.randn(T, n), torch.randn(T, m), torch.randn(m, n)/n**.5
    rank, contenders = min(m, n)//8, {}
    def full(M):
        p, w, y = M.bind((m, n)), W.clone().requires_grad_(), x.clone().requires_grad_()
        def run(i):
            y.grad = w.grad = None
            F.linear(y, w).backward(dy)
            p.down(w.grad)
            return 1
        return run
    def fused(M):
        model, y = nn.Sequential(nn.Linear(n, m, bias=False)), x.clone().requires_grad_()
        d = attach(model, ['0'], M, mode='fused')
        def run(i):
            y.grad = d.targets[0].lam.grad = None
            model(y).backward(dy)
            return 1
        return run
    for M in (Left(rank), Right(rank)): contenders |= {f'full {type(M).__name__.lower()}': full(M), f'fused {type(M).__name__.lower()}': fused(M)}
    rates = in_turns(contenders, args.repeats, args.device)
    return dict(case='layer', tokens=T, inputs=n, outputs=m, rank=rank, seconds={k: spread(1/r) for k, r in rates.items()},
                faster={side: spread(rates[f'fused {side}']/rates[f'full {side}']) for side in ('left', 'right')})

def steps(sizes:dict, args)->dict:
    "A step over two microbatches between changes of the maps, by galore-torch and by this library"
    data, rank = batches(512, 2, args), sizes['hidden_size']//4
    def stepping(name):
        model, opt = pair(name, sizes, rank, args)
        def run(i):
            accumulated(model, opt, data)
            return 1
        return run
    rates = in_turns({name: stepping(name) for name in ('galore', 'fused')}, args.repeats, args.device)   # the untimed first step is galore's refresh
    return dict(case='step', rank=rank, tokens=1024, seconds={k: spread(1/r) for k, r in rates.items()}, faster=spread(rates['fused']/rates['galore']))

def refreshes(sizes:dict, step:float, args)->list[dict]:
    "What a change of all maps costs, as a share of the period it begins"
    rows, rank = [], sizes['hidden_size']//4
    for name in ('fused', 'sketched', 'galore'):
        model, opt = pair(name, sizes, rank, args)
        ids = batches(128, 1, args)
        if name == 'galore': run = _galores(model, rank)
        else:
            accumulated(model, opt, ids)
            run = _drawn(opt.d) if name == 'fused' else _sketched(opt.d)
        found = 1/in_turns({name: run}, 1 if name == 'galore' else args.repeats, args.device)[name]
        rows.append(dict(case='refresh', maps=name, seconds=spread(found), share=spread(found/(REFRESH*step + found))))
    return rows

def _drawn(d)->Callable[[int], int]:
    "Draw a random map for each layer"
    def run(i):
        for t in d.targets: t.bound(i)
        return 1
    return run

def _sketched(d)->Callable[[int], int]:
    "Draw the matrices of the sketches, multiply with what a backward pass of 1024 tokens shows, find singular vectors"
    shown = {t.name: (torch.randn(1024, t.shape[1]), torch.randn(1024, t.shape[0])) for t in d.targets}
    def run(i):
        for t in d.targets:
            t.watch(0, True)
            t.seen(*shown[t.name])
            t.map.find_in(t.seen.left, t.seen.right)
        return 1
    return run

def _galores(model, rank:int)->Callable[[int], int]:
    "The singular value decompositions of galore-torch's projector"
    GaLoreProjector = importlib.import_module(galore_class().__module__.replace('adamw', 'galore_projector')).GaLoreProjector
    gradients = [torch.randn_like(m.weight) for n, m in model.named_modules() if n.endswith('_proj')]
    def run(i):
        for G in gradients: GaLoreProjector(rank).project(G, 0)
        return 1
    return run

def loads(args)->dict:
    "Do optimizers' states come back through torch.load as it is called by default?"
    found = {}
    for name in ('galore', 'fused'):
        model, opt = pair(name, SMALL, 8, args)
        accumulated(model, opt, batches(128, 1, args))
        file = io.BytesIO()
        torch.save(opt.state_dict(), file)
        file.seek(0)
        try: opt.load_state_dict(torch.load(file)); found[name] = 'loads'
        except Exception as e: found[name] = f'refused: {type(e).__name__}'
    return dict(case='state', found=found)

def main()->None:
    args, start = arguments(__doc__), time.time()
    if args.device == 'cpu': torch.set_num_threads(1)
    warnings.simplefilter('ignore', FutureWarning)
    sizes, rows = SMALL if args.quick else FULL, []
    def add(*new):
        for row in new:
            rows.append(row)
            print(row['case'], {k: v for k, v in row.items() if k not in ('case', 'bytes', 'seconds')}, f'{time.time() - start:.0f} s', flush=True)
    add(loads(args))
    add(*memory(sizes, args))
    for shape in LAYERS['small' if args.quick else 'full']: add(layer(*shape, args))
    add(steps(sizes, args))
    add(*refreshes(sizes, rows[-1]['seconds']['fused']['median'], args))
    print(write('duality', args, rows, ('torch', 'transformers', 'galore-torch', 'numpy')))

if __name__ == '__main__': main()
