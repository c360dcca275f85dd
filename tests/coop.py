"""Programs of one launch that really take turns, for kernels whose programs wait for each other: on the CPU, in Triton's interpreter.

The interpreter runs the programs of a launch one after the other, so that the first to wait would wait for ever. `cooperative` gives each a thread, and lets one
of them run at a time: at every atomic operation, and at a share of all loads and stores, a seeded generator chooses who goes on. A program that polls is thus only slow, a
schedule can be repeated by its seed, and programs that all wait for nothing are noticed. Memory itself is that of the CPU: what a GPU's caches may show is not modelled.

`Trace` writes down who touches which address between two barriers: two programs that meet there, one of them writing, are a race in every schedule."""
import inspect, random, threading
from collections import defaultdict
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
import numpy as np
from triton.runtime import interpreter

_here = threading.local() # of a program: grid index, number, turns; barriers passed, and what it got when it arrived at one it has not passed

class Stuck(RuntimeError):
    "Every program waits"

class _Stopped(BaseException):
    "Another program failed"

class _Turns:
    "One program runs at a time, and hands over to another that a generator chooses"
    def __init__(self, programs:int, seed:int, share:float):
        self.alive, self.rng, self.share = list(range(programs)), random.Random(seed), share
        self.gates = [threading.Semaphore(0) for _ in self.alive]
        self.polls, self.limit, self.error = 0, 200*programs, None

    def _next(self)->int|None:
        return self.rng.choice(self.alive) if self.alive else None

    def give(self, me:int)->None:
        "Let another program go on; return when it is `me` again"
        other = self._next()
        if other != me:
            self.gates[other].release()
            self.gates[me].acquire()
        if self.error is not None: raise _Stopped

    def poll(self, me:int, progress:bool)->None:
        "An atomic operation, which may be a look at a barrier that is not there yet"
        self.polls = 0 if progress else self.polls + 1
        if self.polls > self.limit: raise Stuck(f'{len(self.alive)} programs wait for others that have gone, or for each other')
        self.give(me)

    def leave(self, me:int, error:BaseException|None)->None:
        if error is not None and self.error is None and not isinstance(error, _Stopped): self.error = error
        self.alive.remove(me)
        self.polls = 0
        if (other := self._next()) is not None: self.gates[other].release()

class _Together:
    "Stands for a kernel: called once, it runs all programs"
    def __init__(self, fn, grid:tuple[int], seed:int, share:float):
        self.fn, self.programs, self.seed, self.share = fn, grid[0], seed, share
        self.__globals__, self.__name__, self.__signature__ = fn.__globals__, fn.__name__, inspect.signature(fn)

    def __call__(self, **args):
        builder, turns = interpreter.interpreter_builder, _Turns(self.programs, self.seed, self.share)
        builder.set_grid_dim(self.programs, 1, 1)
        def program(i:int)->None:
            turns.gates[i].acquire()
            _here.grid, _here.turns, _here.me, _here.epoch, _here.token = (i, 0, 0), turns, i, 0, None
            error = None
            try:
                if turns.error is None: self.fn(**args)
            except BaseException as e: error = getattr(e, '__cause__', None) or e
            turns.leave(i, error)
        threads = [threading.Thread(target=program, args=(i,)) for i in range(self.programs)]
        for t in threads: t.start()
        turns.gates[turns._next()].release()
        for t in threads: t.join()
        if turns.error is not None: raise turns.error

@dataclass
class Trace:
    "Addresses touched, by launch and barriers passed so far, and by program"
    launches: int = 0
    writes: dict = field(default_factory=lambda: defaultdict(list))
    reads: dict = field(default_factory=lambda: defaultdict(list))

    def races(self)->list[tuple[tuple[int, int], int, int]]: # ((launch, barriers passed), writer, other program)
        "Pairs of programs that touch one address between two barriers, one of them writing"
        kept = {kind: {key: np.unique(np.concatenate(x)) for key, x in getattr(self, kind).items()} for kind in ('writes', 'reads')}
        return sorted({(epoch, a, b) for (epoch, a), x in kept['writes'].items() for other in kept.values() for (when, b), y in other.items()
                       if when == epoch and a != b and np.intersect1d(x, y, assume_unique=True).size})

@contextmanager
def cooperative(seed:int=0, # of the schedule
                share:float=0., # of loads and stores at which another program may go on
                trace:Trace|None=None, # filled
               ):
    "Launches inside run all their programs together. The grid has one axis"
    Executor, Builder = interpreter.GridExecutor, type(interpreter.interpreter_builder)
    kept = {(owner, name): getattr(owner, name) for owner, name in ((Executor, '__call__'), (Builder, 'create_atomic_rmw'), (Builder, 'create_masked_load'), (Builder, 'create_masked_store'))}
    run, atomic, load, store = kept.values()

    def call(executor, *args, **kwargs):
        if trace is not None: trace.launches += 1
        executor.fn, executor.grid = _Together(executor.fn, executor.grid, seed, share), (1,)
        return run(executor, *args, **kwargs)

    def rmw(self, op, ptr, value, *args):
        turns = getattr(_here, 'turns', None)
        if turns is not None: turns.poll(_here.me, progress=bool(np.any(value.data)))
        out = atomic(self, op, ptr, value, *args)
        if turns is not None:
            if np.any(value.data): _here.token = int(out.data[0])                 # arrived
            elif (int(out.data[0]) ^ _here.token) < 0: _here.epoch, _here.token = _here.epoch + 1, None # waited
        return out

    def touch(kind:str, ptrs, mask)->None:
        turns = getattr(_here, 'turns', None)
        if turns is None: return
        if trace is not None:
            for epoch in range(_here.epoch, _here.epoch + 1 + (_here.token is not None)): # between arrival and waiting: both before and behind the barrier
                getattr(trace, kind)[(trace.launches, epoch), _here.me].append(ptrs.data[mask.data.astype(bool)].ravel())
        if kind == 'writes': turns.polls = 0
        if turns.share and turns.rng.random() < turns.share: turns.give(_here.me)

    def traced_load(self, ptrs, mask, *args, **kwargs):
        touch('reads', ptrs, mask)
        return load(self, ptrs, mask, *args, **kwargs)

    def traced_store(self, ptrs, value, mask, *args, **kwargs):
        touch('writes', ptrs, mask)
        return store(self, ptrs, value, mask, *args, **kwargs)

    try:
        Executor.__call__, Builder.create_atomic_rmw, Builder.create_masked_load, Builder.create_masked_store = call, rmw, traced_load, traced_store
        Builder.grid_idx = property(lambda self: getattr(_here, 'grid', (0, 0, 0)), lambda self, grid: None)
        yield
    finally:
        del Builder.grid_idx
        for (owner, name), value in kept.items(): setattr(owner, name, value)

def hasten()->None:
    """For this process, leave out what the interpreter does at every operation and kernels here do not need: checks of integers for overflow, and patching
    Triton's language at each call of a function inside a kernel, rather than once for each module (the launch itself patches the kernel's)"""
    interpreter.interpreter_builder.options = replace(interpreter.interpreter_builder.options, sanitize_overflow=False)
    patched = set()
    def call(self, *args, **kwargs):
        if self.fn.__module__ not in patched:
            patched.add(self.fn.__module__)
            interpreter._patch_lang(self.fn)
        return self.rewrite()(*args, **kwargs)
    interpreter.InterpretedFunction.__call__ = call
