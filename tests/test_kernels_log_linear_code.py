"""What the compiler makes of the kernels of log-linear attention, for GPUs that are not here, and the tables that drive them.

Every kernel of both forms, in bfloat16 at K = V = 128, is compiled for three generations: A100 (sm_80), H100 and H200 (sm_90), B200 (sm_100)."""
import itertools, multiprocessing, os, re, subprocess
from concurrent.futures import ProcessPoolExecutor
import pytest
import torch
from machine_code import beyond, told

# ------------------------------------------------------------------------------------------------------------------- the schedule

def check_schedule(lengths, chunk):
    "Every pair of chunks of one sequence meets exactly once, at the level of the masked form; every node merges the chunks it says"
    from rlcr_suite.kernels.log_linear import schedule
    plan, log = schedule(lengths, chunk, torch.device("cpu")), chunk.bit_length() - 1
    chunks, holds = plan.chunks.tolist(), {}
    for c, node in enumerate(plan.leaf.tolist()):
        if node >= 0: holds[node] = [c]
    for level in plan.merges:
        for parent, left, right in level.tolist():
            assert holds[left][-1] + 1 == holds[right][0] and parent not in holds
            holds[parent] = holds[left] + holds[right]
    assert sorted(holds) == list(range(plan.n_nodes))
    starts = [0, *itertools.accumulate(lengths)]
    home = [max(i for i, s in enumerate(starts[:-1]) if s <= c[0] and lengths[i]) for c in chunks]
    place = [(c[0] - starts[home[i]])//chunk for i, c in enumerate(chunks)]
    readers = {}
    for c, (begin, end, e0, e1) in enumerate(chunks):
        assert end == starts[home[c] + 1] and begin < end
        seen = []
        for e in range(e0, e1):
            seen = holds[plan.nodes[e].item()] + seen
            readers.setdefault(plan.nodes[e].item(), []).append((c, e))
            for s in holds[plan.nodes[e].item()]: assert plan.levels[e] == (place[c] ^ place[s]).bit_length() + log
        assert seen == [s for s in range(c) if home[s] == home[c]]
        assert [a for a in plan.ancestors[c].tolist() if a >= 0] == sorted(n for n, members in holds.items() if c in members)
    visited = set()
    for level in plan.splits:
        for node, parent, sibling, is_left, first, last in level.tolist():
            visited.add(node)
            if parent >= 0: assert holds[parent] == sorted(holds[node] + holds[sibling]) and is_left == (holds[node][0] < holds[sibling][0])
            else: assert not any(set(holds[node]) < set(members) for members in holds.values())
            pairs = [tuple(p) for a, b in plan.segments[first:last].tolist() for p in plan.pairs[a:b].tolist()]
            assert pairs == readers.get(node, [])
    assert visited == set(holds)

@pytest.mark.parametrize("lengths", [*((16*n,) for n in range(0, 20)), (5, 0, 100, 16, 33, 250), (70, 70, 70)], ids=str)
def test_schedule(lengths): check_schedule(lengths, 16)

# ------------------------------------------------------------------------------------------------- compiled for GPUs not at hand

CAPABILITIES = (80, 90, 100)
FORWARD_KERNELS = ("solve", "join", "state", "merge", "output", "step")
#: bytes a thread that a backward kernel may store and load for want of registers: what Triton 3.7 makes, rounded up to 16
SPILLED = {("scalar value_grad", 80): 96, ("delta value_grad", 80): 128, ("delta solve_grad", 80): 192, ("delta key_grad", 80): 32,
           ("delta value_grad", 90): 128, ("scalar node_grad", 100): 16}

def of(rows, capability, forward): return [r for r in rows if r["capability"] == capability and (r["label"].split()[1] in FORWARD_KERNELS) == forward]

@pytest.fixture(scope="module")
def rows():
    "The kernels as a bfloat16 call at K = V = 128 launches them, compiled"
    from rlcr_suite.kernels.aot import report
    return report("rlcr_suite.kernels.log_linear", CAPABILITIES)

@pytest.mark.parametrize("capability", CAPABILITIES)
def test_forward_and_decoding_do_not_spill(rows, capability):
    ours = of(rows, capability, forward=True)
    assert len(ours) == 10 and beyond(ours, {}) == {} # the scalar form needs no triangular inverse

@pytest.mark.parametrize("capability", CAPABILITIES)
def test_what_the_backward_spills(rows, capability, record_property):
    back = of(rows, capability, forward=False)
    record_property("told", told("log-linear backward", back))
    assert len(back) == 13 and beyond(back, SPILLED) == {}

def test_every_kernel_fits_and_has_no_atomics(rows):
    from rlcr_suite.kernels.aot import SHARED_LIMIT
    for r in rows: assert r["shared"] <= SHARED_LIMIT[r["capability"]] and r["resident"] >= 1 and r["atomics"] == 0, r

def test_products_run_on_tensor_cores(rows):
    "On the newest instructions of each generation, except where a kernel has no products"
    for r in rows:
        if r["label"] in ("scalar merge", "scalar split", "scalar step", "delta step"): assert r["matmul"] == "-"
        elif r["label"] in ("delta solve", "delta join"): assert r["matmul"] == "mma" # 32 rows: too few for a warp group
        else: assert {80: "mma", 90: "wgmma", 100: "tcgen05"}[r["capability"]] in r["matmul"].split("+"), r

# ------------------------------------------------------------------------------------------------------------- the compiler itself

def elsewhere(check, interpret=False):
    "Run a function of this file in a process of its own, where kernels are compiled or interpreted"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", str(int(interpret)))
        with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool: pool.submit(check).result(timeout=600)

def check_spill_count():
    "Starved of registers a kernel spills, and the bytes read from the machine code are those that ptxas reports"
    import tempfile
    from rlcr_suite.kernels import aot, log_linear
    case = next(c for c in log_linear.aot_cases(K=64, V=64) if c.label == "scalar state")
    fine, starved = (aot.compile_for(case.kernel, case.signature, case.constexprs, 80, maxnreg=limit) for limit in (None, 40))
    assert fine.spills == fine.stack == 0 and starved.registers == 40 and starved.spill_stores > 0 and starved.spill_loads > 0
    assert fine.count(r"mma\.sync") > 0 and fine.count("HMMA", "sass") > 0 and fine.count("no such thing") == 0
    with tempfile.TemporaryDirectory() as folder:
        source = os.path.join(folder, "k.ptx")
        with open(source, "w") as file: file.write(starved.ptx)
        log = subprocess.run([aot._tool("ptxas"), "-v", "--regAllocOptLevel=2", "--gpu-name=sm_80", source, "-o", source + ".o"],
                             capture_output=True, text=True, check=True).stderr
    stores, loads = map(int, re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", log).groups())
    assert (starved.spill_stores, starved.spill_loads) == (stores, loads)
    assert int(re.search(r"Used (\d+) registers", log).group(1)) == starved.registers

def test_spills_are_counted_as_ptxas_does(): elsewhere(check_spill_count)

def check_compile_refusals():
    from rlcr_suite.kernels import aot, log_linear
    case = log_linear.aot_cases()[0]
    with pytest.raises(ValueError, match="neither type nor value.*'k'"):
        aot.compile_for(case.kernel, {a: t for a, t in case.signature.items() if a != "k"}, case.constexprs)
    with pytest.raises(ValueError, match="no such argument.*'wrong'"): aot.compile_for(case.kernel, case.signature, dict(case.constexprs, wrong=1))

def test_missing_and_unknown_arguments_are_refused(): elsewhere(check_compile_refusals)

def check_no_compiling_here():
    from rlcr_suite.kernels import aot, log_linear
    with pytest.raises(RuntimeError, match="TRITON_INTERPRET"): aot.compile_for(log_linear._merge_kernel, {}, {})
    with pytest.raises(RuntimeError, match="No module named 'nothing_of_this_name'"): aot.report("nothing_of_this_name")

def test_the_interpreter_cannot_compile(): elsewhere(check_no_compiling_here, interpret=True)
