"""Decoding one text on a GPU: a barrier's cost and a soak of a hundred thousand of them, the stages, and tokens at three lengths of the cache, as a share of what a copy
moves and beside a compiled and graphed decoder of transformers on the same weights. A decoder that picks other tokens than the reference is not timed. The result is written after every row."""
import multiprocessing, os, threading, time
from collections.abc import Callable
from functools import partial

import numpy as np
import torch
import triton

from _harness import NotMeasured, arguments, guarded, place, spread, write
from rlcr_suite.flashformer import Decoder
from rlcr_suite.flashformer.bandwidth import MODELS
from rlcr_suite.flashformer.cli import copied, measure
from rlcr_suite.kernels.flashformer import Shape
from rlcr_suite.kernels.grid import grid_arrive, grid_wait

BUDGET, GRACE = 470, 50            # seconds: no row is begun after the first; what still runs when both are over is given up
CONTEXTS, TOKENS = (128, 2048, 7936), 256
SOAK, PATIENCE = 100_000, 60       # barriers; seconds until they are taken to hang
# Share of the tokens on which the kernel agrees with the reference, which computes with the same weights and the same rounding of the cache in float32. Weights that are
# random have near ties, of which rounding may turn one; a wrong mask, place or scale leaves one token of a hundred thousand.
RIGHT = .95
BARRIERS = 10_000                  # a measurement: a launch and its events are then lost in it
RUNS = [('Llama-3.1-8B', None), ('Llama-3.2-1B', None), ('Qwen2.5-1.5B', None), ('Llama-3.1-8B', 'int8'), ('Llama-3.1-8B', 'int4-g128')]
TINY = Shape(layers=2, hidden=128, heads=4, kv_heads=2, head_dim=32, ffn=256, vocab=300, max_len=256, eps=1e-5)

@triton.jit
def _meet(barrier, n):
    for _ in range(n): grid_wait(barrier, grid_arrive(barrier))

def meet(n:int, device:str)->float: # seconds a barrier
    "Nothing but barriers, one program a multiprocessor"
    programs, count = torch.cuda.get_device_properties(device).multi_processor_count, torch.zeros(1, dtype=torch.int32, device=device)
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    _meet[(programs,)](count, n, num_warps=8, launch_cooperative_grid=True)
    end.record()
    end.synchronize()
    return begin.elapsed_time(end)/1e3/n

def soak(device:str)->str:
    "Many barriers in a process of their own, which can be ended if they hang"
    p = multiprocessing.get_context('spawn').Process(target=meet, args=(SOAK, device))
    p.start()
    p.join(PATIENCE)
    if not p.is_alive(): return 'passed' if p.exitcode == 0 else f'failed with {p.exitcode}'
    p.kill()
    return f'hangs: not done after {PATIENCE} s'

def barriers(args)->dict:
    if args.device == 'cpu': raise NotMeasured('needs a GPU')
    found = soak(args.device)
    if found != 'passed': return dict(status=found)
    meet(10, args.device)
    return dict(status='measured', barriers=SOAK, seconds=spread(np.array([meet(BARRIERS, args.device) for _ in range(args.repeats)])))

# ---- a model, twice ----------------------------------------------------------------------------------------------------
def hugging_face(s:Shape, tied:bool, args):
    "A model of transformers with random weights, made where it is used"
    from transformers import AutoModelForCausalLM, LlamaConfig, Qwen2Config, Qwen3Config
    kind = Qwen3Config if s.qk_norm else Qwen2Config if s.qkv_bias else LlamaConfig
    config = kind(vocab_size=s.vocab, hidden_size=s.hidden, intermediate_size=s.ffn, num_hidden_layers=s.layers, num_attention_heads=s.heads, num_key_value_heads=s.kv_heads,
                  head_dim=s.head_dim, rms_norm_eps=s.eps, max_position_embeddings=s.max_len, tie_word_embeddings=tied, bos_token_id=None, eos_token_id=None)
    torch.manual_seed(args.seed)
    with torch.device(args.device): return AutoModelForCausalLM.from_config(config, dtype=torch.float32 if args.device == 'cpu' else torch.bfloat16).eval()

def graphed(model, length:int, compiled:bool)->Callable[[int, int], torch.Tensor]: # (context, n) -> (n,) tokens
    "Greedy decoding as transformers recommends it: a cache of fixed size, compiled, replayed as a graph. Its cache has just the room that is needed, since it reads all of it"
    from transformers import StaticCache
    torch._dynamo.reset()                            # all peers share the code below, and a function is compiled for no more than eight of them
    cache, mark = StaticCache(config=model.config, max_cache_len=length), torch.compiler.cudagraph_mark_step_begin
    def one(ids): return model(input_ids=ids, past_key_values=cache, use_cache=True).logits[:, -1].argmax(-1, keepdim=True)
    with torch.no_grad(): one(torch.ones(1, 1, dtype=torch.long, device=model.device))      # makes the cache, outside of any graph
    step = torch.compile(one, mode='reduce-overhead', fullgraph=True) if compiled else one
    @torch.no_grad()
    def run(context:int, n:int)->torch.Tensor:
        for layer in cache.layers: layer.cumulative_length.fill_(context)
        ids, found = torch.ones(1, 1, dtype=torch.long, device=model.device), []
        for _ in range(n):
            mark()
            ids = step(ids).clone()
            found.append(ids)
        return torch.cat(found)[:, 0]
    return run

def ready(model, length:int, compiled:bool, context:int)->Callable[[int, int], torch.Tensor]:
    "The same, compiled and recorded: it has written two tokens"
    run = graphed(model, length, compiled)
    run(context, 2)
    return run

def agreement(d:Decoder, ids:torch.Tensor, prompt:int)->float:
    "Share of the tokens behind a prompt that a decoder would write too, each after the text as it is"
    d.reset().prefill(ids[:prompt])
    right = 0
    for t in ids[prompt:]:
        right += int(d.step()[0] == t)
        d.rollback(d.length - 2).prefill(t[None])
    return right/len(ids[prompt:])

def race(contenders:dict[str, Callable[[], object]], tokens:int, args)->dict[str, np.ndarray]: # seconds a token, (repeats,)
    "In turns, after two untimed runs of each"
    wait = (lambda: None) if args.device == 'cpu' else torch.cuda.synchronize
    times = {name: [] for name in contenders}
    for i in range(args.repeats + 2):
        for name, f in contenders.items():
            wait()
            begin = time.perf_counter()
            f()
            wait()
            if i > 1: times[name].append((time.perf_counter() - begin)/tokens)
    return {name: np.array(t) for name, t in times.items()}

def raced(ours:Callable[[], object], peer:Callable[[], object]|None, tokens:int, args)->tuple[dict[str, np.ndarray], str]: # seconds a token; why there is no peer
    "Both in turns. A peer that fails on the way takes nothing with it: we then run alone"
    if peer is None: return race(dict(rlcr_suite=ours), tokens, args), ''
    failed = ''
    def attempt()->None:
        nonlocal failed
        if not failed: _, failed = guarded('transformers', peer, args.device)
    seconds = race(dict(rlcr_suite=ours, transformers=attempt), tokens, args)
    if failed: seconds.pop('transformers')
    return seconds, failed

def model_rows(name:str, quant:str|None, limit:float, args, add:Callable[[dict], None])->None:
    "Check, stages, and a row a context"
    cpu = args.device == 'cpu'
    s, tied = (TINY, False) if args.quick else MODELS[name]
    tokens, contexts = (8, (16, 64)) if args.quick else (TOKENS, CONTEXTS)
    model, what = hugging_face(s, tied, args), dict(model='tiny' if args.quick else name, quant=quant)
    d = Decoder.from_hf(model, quant, s.max_len, 'reference' if cpu else 'persistent')
    truth = Decoder(d.shape, d.weights, backend='reference')                                  # on the same weights, in the same memory
    text = truth.generate(torch.arange(1, 17, device=args.device), 16 if cpu else 48, eos=())
    share = agreement(d, text, 16)
    add(what | dict(case='check', agreement=share, status='right' if share >= RIGHT else 'wrong'))
    if share < RIGHT: return
    del truth
    add(what | dict(case='stages', status='measured', stages={k: dict(seconds=t.seconds, bytes=t.bytes) for k, t in d.reset().prefill(text).profile().items()}))
    for c in contexts:
        if time.time() - args.started > args.budget: add(what | dict(case='decode', context=c, status='not measured: out of time')); continue
        ours = measure(d, c, tokens, 1)                                                      # fills the cache; the race below times
        peer, why = guarded('transformers', partial(ready, model, c + tokens + 1, not cpu, c), args.device) if quant is None else (None, '')
        seconds, failed = raced(lambda: d.rollback(c).step(tokens), peer and partial(peer, c, tokens), tokens, args)
        row = dict(case='decode', context=c, tokens=tokens, status='measured', bytes=ours['bytes'], seconds={k: spread(t) for k, t in seconds.items()}, share=spread(ours['bytes']/seconds['rlcr_suite']/limit))
        if quant is None: row |= dict(faster=spread(seconds['transformers']/seconds['rlcr_suite'])) if 'transformers' in seconds else dict(peer=why or failed)
        add(what | row)

def options(p)->None:
    p.add_argument('--budget', type=float, default=BUDGET, help=f'seconds after which no row is begun (default {BUDGET})')

def main()->None:
    args = arguments(__doc__, options)
    args.started, rows = time.time(), []
    if args.device == 'cpu' and not args.quick:
        print('flashformer.py needs a GPU; nothing is measured (--quick runs a small shape on a CPU)')
        return
    if args.device == 'cpu': torch.set_num_threads(1)
    save = lambda: write('flashformer', args, rows, ('torch', 'triton', 'transformers', 'numpy'), dict(seconds=round(time.time() - args.started)))
    def add(row:dict)->None:
        rows.append(row)
        save()
        print(f'{time.time() - args.started:4.0f} s ', {k: v for k, v in row.items() if k not in ('bytes', 'stages')}, flush=True)
    def give_up()->None:
        add(dict(case='given up', status=f'a row took too long: {args.budget + GRACE:.0f} s are over'))
        os._exit(1)
    watch = threading.Timer(args.budget + GRACE, give_up)
    watch.daemon = True
    watch.start()
    limit = copied(torch.device(args.device), 2**24 if args.quick else None)
    add(dict(case='copy', status='measured', bytes_a_second=limit))
    found, why = guarded('barriers', partial(barriers, args), args.device)
    add(dict(case='barrier') | (found or dict(status=why)))
    for name, quant in RUNS[-3::2] if args.quick else RUNS:
        if time.time() - args.started > args.budget: add(dict(case='decode', model=name, quant=quant, status='not measured: out of time')); continue
        _, why = guarded(name, partial(model_rows, name, quant, limit, args, add), args.device)
        if why: add(dict(case='decode', model=name, quant=quant, status=why))
    watch.cancel()
    print(place('flashformer', args))

if __name__ == '__main__': main()
