"What the tests of the kernels' machine code share: the bytes that a kernel spills, held to a bound each and told at the end of the run."

def spilled(row:dict)->int:
    "Bytes a thread that are stored and loaded because registers ran out"
    return row["spill_stores"] + row["spill_loads"]

def beyond(rows:list, bounds:dict)->dict:
    "Kernels that spill more than their bound, by (label, capability); one without a bound may spill nothing, nor use the stack"
    found = {(r["label"], r["capability"]): (spilled(r), r["stack"]) for r in rows}
    return {k: (n, stack) for k, (n, stack) in found.items() if n > bounds.get(k, 0) or stack and k not in bounds}

def told(chapter:str, rows:list)->str:
    "A line for people; `conftest.py` prints it after the tests"
    by = {c: [r for r in rows if r["capability"] == c] for c in sorted({r["capability"] for r in rows})}
    return "; ".join(f"{chapter}, sm_{c}: " + (", ".join(f"{r['label']} {spilled(r)}" for r in mine if spilled(r)) or "none") + f", of {len(mine)} kernels" for c, mine in by.items())
