"""Compile Triton kernels ahead of time, without a GPU, and read what came out: registers, spills, shared memory, instructions.

A kernel that was never compiled is a guess. Triton's compiler and NVIDIA's assembler both run on any x86 or Arm machine, so the
machine code for a GPU that is not there can be made and measured. Everything is read from that machine code (the cubin), never
from a compiler's log, so that the figures are the same whether Triton compiled just now or took the code from its cache.

    python -m rlcr_suite.kernels.aot rlcr_suite.kernels.log_linear 80 90 100      # a table of every kernel of a module

A module joins in by a function `aot_cases()` that returns a list of `Case`. Triton decides on import whether it interprets or
compiles (`TRITON_INTERPRET`); `report` therefore compiles in a process of its own and can be called under the interpreter too.
"""
import importlib, json, os, re, subprocess, sys, tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

__all__ = ["Case", "Compiled", "compile_for", "compile_cases", "report", "table", "SHARED_LIMIT"]

#: shared memory that one program may use, in bytes, by compute capability (CUDA C programming guide, table of limits)
SHARED_LIMIT = {80: 163 << 10, 86: 99 << 10, 89: 99 << 10, 90: 227 << 10, 100: 227 << 10, 103: 227 << 10, 120: 99 << 10}
_WIDTH = {"U8": 1, "S8": 1, "U16": 2, "S16": 2, "64": 8, "128": 16} # bytes of a local load or store; 4 where none is named

def _tool(name:str)->str:
    "Path of a CUDA tool that Triton bundles (the same lookup as Triton's own, so `TRITON_CUOBJDUMP_PATH` and its kin work)"
    return getattr(triton.knobs.nvidia, name).path

def _on_cubin(command:Sequence[str], cubin:bytes)->str:
    "Standard output of a tool that wants the machine code as a file"
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder)/"kernel.cubin"
        path.write_bytes(cubin)
        return subprocess.run([*command, str(path)], check=True, capture_output=True, text=True).stdout

@dataclass(frozen=True)
class Case:
    "One kernel with the types and constants of one launch, ready to be compiled."
    label: str # what the table calls it
    kernel: object # a `@triton.jit` function
    signature: Mapping[str, str] # argument -> "*bf16", "*fp32", "i32", "fp32", …; what is in `constexprs` may be left out
    constexprs: Mapping[str, object] # argument -> value
    num_warps: int = 4
    num_stages: int = 2
    aligned: tuple[str, ...] = () # integer arguments that are multiples of 16 (pointers always count as aligned to 16 bytes)
    options: Mapping[str, object] = field(default_factory=dict) # further options of the backend, e.g. launch_cooperative_grid
    capabilities: tuple[int, ...] = () # of the GPUs on which it is launched like this; () is all

@dataclass(frozen=True)
class Compiled:
    "Machine code of one kernel for one GPU, and what it costs."
    label: str
    capability: int # 80 for sm_80 (A100), 90 for sm_90a (H100, H200), 100 for sm_100a (B200)
    num_warps: int
    num_stages: int
    registers: int # a thread
    spill_stores: int # bytes a thread that local stores in the code write
    spill_loads: int # bytes a thread that local loads in the code read
    stack: int # bytes a thread
    shared: int # bytes a program, static and dynamic
    tensor_memory: int # columns (Blackwell only)
    ttgir: str = field(repr=False)
    ptx: str = field(repr=False)
    cubin: bytes = field(repr=False)
    sass: str = field(repr=False) # the machine code as text, by `nvdisasm`

    @property
    def spills(self)->int:
        "Bytes a thread that the code stores to and loads from local memory because registers ran out."
        return self.spill_stores + self.spill_loads

    def count(self, pattern:str, # regular expression, matched against every line
              where:str="ptx", # "ptx", "sass" or "ttgir"
             )->int: # how many lines match
        "How often an instruction stands in the code."
        return sum(bool(re.search(pattern, line)) for line in getattr(self, where).splitlines())

    @property
    def matmul(self)->str:
        "Which tensor-core instructions the code uses: `tcgen05` (Blackwell), `wgmma` (Hopper), `mma` (Ampere), or none."
        names = dict(tcgen05=r"\btcgen05\.mma", wgmma=r"\bwgmma\.mma_async", mma=r"\bmma\.sync")
        return "+".join(name for name, pattern in names.items() if self.count(pattern)) or "-"

    @property
    def atomics(self)->int:
        "Atomic operations on memory in the code. Sums by atomics have no fixed order: a deterministic kernel has none."
        return self.count(r"^\s*(@%?\w+\s+)?(atom|red)(\.async)?\.", "ptx")

    @cached_property
    def loops(self)->list[list[str]]:
        "Instructions of every innermost loop of the machine code, by name with suffixes."
        lines = re.findall(r"^(\.L_\w+:)|^\s*/\*[0-9a-f]{4,}\*/\s+(.*?);", self.sass, re.M)
        label, code, spans = {}, [], []
        for name, instruction in lines:
            if name: label[name[:-1]] = len(code); continue
            to = re.search(r"\bBRA\b.*`\((\.L_\w+)\)", instruction)
            if to and label.get(to[1], len(code)) < len(code): spans.append((label[to[1]], len(code) + 1))
            code.append(re.sub(r"^@!?U?P\w+\s+", "", instruction).split()[0])
        inner = [a for a in spans if not any(b != a and a[0] <= b[0] and b[1] <= a[1] for b in spans)]
        return [code[first:last] for first, last in inner]

    @property
    def streams(self)->list[tuple[int, int]]:
        "Innermost loops that read what is read once (`eviction_policy='evict_first'`): instructions, and bytes so read by a thread."
        sizes = [(len(loop), sum(int(m[1] or 32)//8 for op in loop if (m := re.match(r"LDG\.E\.EF(?:\.CONSTANT)?(?:\.(64|128))?", op)))) for loop in self.loops]
        return [(n, size) for n, size in sizes if size]

    @property
    def polls(self)->int:
        "Loads that look at what another program writes (relaxed, at the scope of the GPU): a spin that was not deleted."
        return self.count(r"LDG\.E\S*\.STRONG\.GPU", "sass")

    @property
    def invalidates(self)->int:
        "Instructions that empty the L1 cache, as every acquire at the scope of the GPU does."
        return self.count(r"\bCCTL\.IVALL", "sass")

    @property
    def resident(self)->int:
        "Programs that fit on one multiprocessor at once, by registers, shared memory and threads."
        per_warp = -(-self.registers*32 // 256)*256 # registers are handed out in units of 256 a warp
        by_registers = 65536//max(per_warp*self.num_warps, 1)
        by_shared = (SHARED_LIMIT[self.capability] + 1024)//(self.shared + 1024) # each program reserves 1 KiB more
        threads = 1536 if self.capability in (86, 89, 120) else 2048
        return min(by_registers, by_shared, threads//(32*self.num_warps), 32)

    def row(self)->dict:
        "The figures without the code, as plain types."
        names = ("label", "capability", "num_warps", "num_stages", "registers", "spill_stores", "spill_loads", "stack", "shared",
                 "tensor_memory", "matmul", "atomics", "resident", "streams", "polls", "invalidates")
        return {name: getattr(self, name) for name in names}

def _local_bytes(sass:str, op:str)->int:
    "Bytes that all `LDL` or `STL` instructions in the code move, each counted once as ptxas does"
    found = re.findall(rf"\b{op}((?:\.\w+)*)\s", sass)
    return sum(next((_WIDTH[part] for part in suffix.split(".") if part in _WIDTH), 4) for suffix in found)

def _usage(cubin:bytes)->dict[str, int]:
    "Registers, stack and static shared memory, as `cuobjdump` reads them from the machine code"
    text = _on_cubin([_tool("cuobjdump"), "--dump-resource-usage"], cubin)
    return {name: int(value) for name, value in re.findall(r"\b(REG|STACK|SHARED|LOCAL):(\d+)", text)}

def compile_for(kernel, # a `@triton.jit` function
                signature:Mapping[str, str], # argument -> "*bf16", "*fp32", "i32", "fp32", …; constants may be left out
                constexprs:Mapping[str, object], # argument -> value
                capability:int=90, # 80 for sm_80, 90 for sm_90a, 100 for sm_100a
                num_warps:int=4, # warps a program
                num_stages:int=2, # depth of software pipelining
                aligned:Sequence[str]=(), # integer arguments that are multiples of 16
                label:str|None=None, # a name for tables; the kernel's own if None
                **options, # further options of Triton's CUDA backend, e.g. `maxnreg=128`
               )->Compiled:
    """Machine code for a GPU that need not be there, as a launch with these types would make it.

    Raises `ValueError` if an argument of the kernel has neither type nor value, and `RuntimeError` under the interpreter."""
    if not isinstance(kernel, triton.JITFunction):
        raise RuntimeError("a kernel imported under TRITON_INTERPRET=1 cannot be compiled: use `report`, or unset it and start anew")
    names = kernel.arg_names
    unknown, missing = (set(signature) | set(constexprs)) - set(names), set(names) - set(signature) - set(constexprs)
    if unknown or missing:
        raise ValueError(f"{kernel.__name__}: no such argument: {sorted(unknown)}; neither type nor value for: {sorted(missing)}")
    types = {name: "constexpr" if name in constexprs else signature[name] for name in names}
    attrs = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(names) if types[name].startswith("*") or name in aligned}
    source = ASTSource(kernel, types, {(names.index(name),): value for name, value in constexprs.items()}, attrs)
    made = triton.compile(source, target=GPUTarget("cuda", capability, 32),
                          options=dict(num_warps=num_warps, num_stages=num_stages, enable_fp_fusion=True) | options)
    cubin, meta = made.asm["cubin"], made.metadata
    usage, sass = _usage(cubin), _on_cubin([_tool("nvdisasm"), "-c"], cubin)
    return Compiled(label or kernel.__name__.strip("_"), capability, meta.num_warps, num_stages, usage["REG"],
                    _local_bytes(sass, "STL"), _local_bytes(sass, "LDL"), usage["STACK"], meta.shared,
                    getattr(meta, "tmem_size", None) or 0, made.asm["ttgir"], made.asm["ptx"], cubin, sass)

def compile_cases(cases:Sequence[Case], # what to compile
                  capabilities:Sequence[int]=(80, 90, 100), # for which GPUs
                 )->list[Compiled]: # in the order cases x capabilities
    "Every case for every GPU on which it is launched so."
    return [compile_for(c.kernel, c.signature, c.constexprs, cap, c.num_warps, c.num_stages, c.aligned, c.label, **c.options)
            for c in cases for cap in capabilities if not c.capabilities or cap in c.capabilities]

def report(module:str, # name of a module that has `aot_cases()`
           capabilities:Sequence[int]=(80, 90, 100), # for which GPUs
           only:str="", # regular expression: compile the cases whose label matches
           **arguments, # handed to `aot_cases`; must survive JSON
          )->list[dict]: # `Compiled.row()` of every case
    "Compile a module's cases in a fresh process that does not interpret. Raises `RuntimeError` with the compiler's own words."
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    job = json.dumps(dict(module=module, capabilities=list(capabilities), only=only, arguments=arguments))
    done = subprocess.run([sys.executable, "-m", __spec__.name, "--json", job], env=env, capture_output=True, text=True)
    if done.returncode: raise RuntimeError(f"{module} did not compile:\n{done.stderr[-4000:]}")
    return json.loads(done.stdout.splitlines()[-1])

def table(rows:Sequence[Mapping], # from `report` or `Compiled.row`
         )->str: # Markdown
    "The figures as a table."
    head = "kernel | sm | warps | registers | spilled bytes | shared KiB | programs/SM | matmul"
    lines = [f"{r['label']} | {r['capability']} | {r['num_warps']} | {r['registers']} | {r['spill_stores'] + r['spill_loads']} | "
             f"{r['shared']/1024:.1f} | {r['resident']} | {r['matmul']}" for r in rows]
    return "\n".join(f"| {line} |" for line in [head, "|".join([":--"] + ["--:"]*6 + [":--"]), *lines])

def _rows(module:str, capabilities:Sequence[int], only:str="", arguments:Mapping|None=None)->list[dict]:
    "What `report` asks of the fresh process"
    cases = importlib.import_module(module).aot_cases(**(arguments or {}))
    return [c.row() for c in compile_cases([c for c in cases if re.search(only, c.label)], capabilities)]

def main(argv:Sequence[str])->None:
    "`python -m rlcr_suite.kernels.aot MODULE [CAPABILITY …]`"
    if argv[0] == "--json": print(json.dumps(_rows(**json.loads(argv[1]))))
    else: print(table(_rows(argv[0], [int(a) for a in argv[1:]] or [80, 90, 100])))

if __name__ == "__main__": main(sys.argv[1:])
