"Tokens per second of `core.lm.generate` beside `model.generate` of transformers: same model, same prompts, same work."
from __future__ import annotations
from dataclasses import asdict, dataclass

import numpy as np
import torch

from _harness import arguments, in_turns, spread, write
from rlcr_suite.core.lm import generate, num_parameters, tiny_lm, word_tokenizer

@dataclass(frozen=True)
class Case:
    "One use of sampling"
    name:str     # what it is like
    prompts:int  # distinct prompts
    n:int        # completions of each prompt
    new:int      # longest completion, in tokens
    hidden:int   # width of the model
    layers:int   # its depth

CASES = (Case('training: groups of 8', 32, 8, 48, 128, 2), Case('evaluation: one each', 128, 1, 48, 128, 2),
         Case('votes: 32 each', 8, 32, 48, 128, 2), Case('a wider model', 8, 8, 48, 512, 6))
QUICK = (Case('quick', 4, 4, 8, 64, 2),)
WORDS = [a + b for a in ('ba', 'de', 'ki', 'lo', 'mu', 'na', 'po', 'ri', 'su', 'to') for b in ('l', 'm', 'n', 'r', 's', 't', 'v', 'x', 'z', 'k')]

def made(tok, texts:list[str])->int:
    "Tokens in the completions, counted alike for every contender"
    return sum(map(len, tok(texts, add_special_tokens=False)['input_ids']))

def transformers_generate(model, tok, prompts:list[str], n:int, new:int, seed:int)->list[str]:
    "What a user of transformers writes: pad on the left, sample without truncating the distribution, decode"
    torch.manual_seed(seed)
    x = tok(prompts, return_tensors='pt', padding=True, return_token_type_ids=False).to(model.device)
    out = model.generate(**x, do_sample=True, temperature=1.0, top_k=0, top_p=1.0, num_return_sequences=n, max_new_tokens=new)
    return tok.batch_decode(out[:, x['input_ids'].shape[1]:], skip_special_tokens=True)

def measure(case:Case, args)->dict:
    "One row of the result"
    tok = word_tokenizer(WORDS)
    model = tiny_lm(tok, hidden_size=case.hidden, layers=case.layers, heads=case.hidden//32, intermediate_size=2*case.hidden, seed=args.seed).to(args.device)
    rng = np.random.default_rng(args.seed)
    prompts = [' '.join(rng.choice(WORDS, size)) for size in rng.integers(12, 32, case.prompts)]
    def ours(i:int)->int: return made(tok, sum(generate(model, tok, prompts, n=case.n, max_new_tokens=case.new, seed=i), []))
    def theirs(i:int)->int: return made(tok, transformers_generate(model, tok, prompts, case.n, case.new, i))
    rates = in_turns({'core.lm': ours, 'transformers': theirs}, args.repeats, args.device)
    ratio = rates['core.lm'] / rates['transformers']
    return dict(case=asdict(case), parameters=num_parameters(model), tokens_per_s={k: spread(v) for k, v in rates.items()},
                ratio=spread(ratio)['median'], ratio_range=[spread(ratio)['low'], spread(ratio)['high']])

def main()->None:
    args, rows = arguments(__doc__), []
    for case in QUICK if args.quick else CASES:
        rows.append(measure(case, args))
        ours, theirs = (rows[-1]['tokens_per_s'][k]['median'] for k in ('core.lm', 'transformers'))
        print(f"{case.name:24} core.lm {ours:>9,.0f} tokens/s   transformers {theirs:>9,.0f} tokens/s   ratio {rows[-1]['ratio']:.2f}", flush=True)
    print(write('core_lm', args, rows, ('torch', 'transformers', 'numpy')))

if __name__ == '__main__': main()
