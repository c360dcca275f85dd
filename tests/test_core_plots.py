"core.plots across processes: what one notebook cannot see"
import subprocess, sys
import numpy as np
import pytest
from hypothesis import given, settings, strategies as st
from rlcr_suite.core.plots import spread, color, COLORS, ROLES

DRAW = """
import io, sys
import matplotlib; matplotlib.use("Agg")
import matplotlib.pyplot as plt
from rlcr_suite.core.plots import style, save, fan, label_lines
with style():
    fig, ax = plt.subplots()
    for k in range(3): fan(ax, [0, 1, 2], [k, k, k], [k - 1] * 3, [k + 1] * 3, f"line {k}")
    label_lines(ax)
out = io.BytesIO(); save(fig, out); sys.stdout.buffer.write(out.getvalue())
"""

def draw(): return subprocess.run([sys.executable, '-c', DRAW], check=True, capture_output=True).stdout

def test_same_bytes_in_two_processes():
    svg = draw()
    assert svg == draw()
    assert b'line 2' in svg                                      # text stays text
    assert b'<dc:date>' not in svg and b'Matplotlib v' not in svg

def test_import_is_light():
    code = "import sys, rlcr_suite.core.plots as p; p.color('rlcr'); sys.exit(any(m in sys.modules for m in ('matplotlib', 'scipy', 'torch')))"
    assert subprocess.run([sys.executable, '-c', code]).returncode == 0

@settings(deadline=None)  # the first call imports SciPy
@given(st.lists(st.floats(-1e3, 1e3), max_size=30), st.floats(0, 50))
def test_spread_keeps_gap_order_and_mean(y, gap):
    z, order = spread(y, gap), np.argsort(y, kind='stable')
    assert (np.diff(z[order]) >= gap - 1e-9).all()
    if y: assert np.isclose(z.mean(), np.mean(y), atol=1e-6)     # blocks move about their mean

@settings(deadline=None)  # the first call imports SciPy
@given(st.lists(st.floats(-1e3, 1e3), max_size=30), st.floats(0, 50), st.floats(-100, 100))
def test_spread_stays_above_its_floor(y, gap, low):
    z = spread(y, gap, low=low)
    assert (z >= low).all() and (np.diff(z[np.argsort(y, kind='stable')]) >= gap - 1e-9).all()

@settings(deadline=None)
@given(st.lists(st.floats(0, 100), min_size=2, max_size=8), st.integers(0, 2**32 - 1))
def test_spread_is_the_closest(y, seed):
    "No other feasible positions are nearer in least squares"
    z = spread(y, 5.)
    order = np.argsort(y, kind='stable')
    other = np.empty(len(y))
    other[order] = np.cumsum(np.r_[np.random.default_rng(seed).uniform(-20, 100), 5 + np.random.default_rng(seed + 1).exponential(3, len(y) - 1)])
    assert ((z - y)**2).sum() <= ((other - y)**2).sum() + 1e-6

def test_every_role_has_a_colour():
    assert {color(r) for r in ROLES} - {'#6b7688'} <= set(COLORS.values())
    with pytest.raises(ValueError, match='known: '): color('nonesuch')
