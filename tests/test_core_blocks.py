"core.blocks: the tree over any length, products of reflections, packed sequences."
from typing import NamedTuple
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings, strategies as st
from fixed_order import fixed_order
from rlcr_suite.core.blocks import Level, _doubled, check_shapes, halves, levels, packed, prefix_sum, rectangles, sequences, ut_inverse

LENGTHS = st.integers(0, 300)
BLOCKS = st.sampled_from([1, 2, 3, 16, 64])


class TestLevels:
    @settings(max_examples=150, deadline=None)
    @given(LENGTHS, BLOCKS)
    def test_every_pair_once_and_at_the_level_of_the_fenwick_tree(self, n, block):
        count, level = torch.zeros(n, n), torch.full((n, n), -1)
        for a in range(0, n, block): count[a:a + block, a:a + block].add_(torch.ones(block, block).tril()[:n - a, :n - a])
        for l, left, right in rectangles(n, block):
            count[right, left] += 1
            level[right, left] = l
        assert torch.equal(count, torch.ones(n, n).tril())
        b = torch.arange(n)//block
        far = (b[:, None] ^ b[None, :]).float()
        want = torch.where(far > 0, far.clamp(min=1).log2().floor().long(), -1).tril() - torch.ones(n, n).triu(1).long()
        assert torch.equal(level, want)

    @settings(max_examples=150, deadline=None)
    @given(LENGTHS, BLOCKS)
    def test_schedule_and_rectangles_agree(self, n, block):
        plan, found = levels(n, block), rectangles(n, block)
        assert [s.size for s in plan] == [block*2**l for l in range(len(plan))]
        assert len(found) == sum(p.pairs + (p.right > 0) for p in plan) == max(0, -(-n//block) - 1)
        assert all(0 <= p.right < p.size and p.pairs >= 0 and p.pairs + (p.right > 0) > 0 for p in plan)
        for l, left, right in found: assert left.stop == right.start and left.start % (2*plan[l].size) == 0 and right.stop <= n

    def test_by_hand(self):
        assert levels(0) == levels(1) == levels(64, 64) == []
        assert levels(65, 64) == [Level(64, 0, 1)]
        assert levels(7) == [Level(1, 3, 0), Level(2, 1, 1), Level(4, 0, 3)]
        assert rectangles(3) == [(0, slice(0, 1), slice(1, 2)), (1, slice(0, 2), slice(2, 3))]

    @pytest.mark.parametrize("n, block", [(-1, 1), (4, 0), (4, -2)])
    def test_nonsense(self, n, block):
        with pytest.raises(ValueError, match="n >= 0 and block >= 1"): levels(n, block)

    @pytest.mark.parametrize("dim", [0, 1, 2, -1, -2])
    @pytest.mark.parametrize("n", [1, 2, 3, 4, 5, 6, 7, 8, 12, 23])
    def test_halves_are_views_of_the_rectangles(self, n, dim):
        "Each entry holds its own position, so a view shows what it covers; writing through the views reaches the tensor"
        shape = [2, 3, 4]
        shape[dim] = n
        x = torch.arange(float(n)).view([n if i == dim % 3 else 1 for i in range(3)]).expand(shape).clone()
        axis, writes = dim % 3, torch.zeros(n)
        for l, p in enumerate(levels(n, 2)):
            rows = lambda t: t.movedim((axis, axis + 1), (0, 1)).flatten(2)       # (pairs, length, all the rest)
            seen = [(a, b) for L, R in halves(x, p, dim) for a, b in zip(rows(L), rows(R))]
            want = [(left, right) for m, left, right in rectangles(n, 2) if m == l]
            assert len(seen) == len(want)
            for (a, b), (left, right) in zip(seen, want):
                for got, span in ((a, left), (b, right)): assert torch.equal(got, torch.arange(float(n))[span, None].expand_as(got))
        for p in levels(n, 2):
            y = torch.zeros(shape)
            for _, R in halves(y, p, dim): R.add_(1)
            writes += y.movedim(axis, 0).flatten(1)[:, 0]
        assert torch.equal(writes, sum((torch.zeros(n).index_fill(0, torch.arange(n)[right], 1) for _, _, right in rectangles(n, 2)), torch.zeros(n)))

    def test_halves_take_part_in_gradients(self):
        x = torch.randn(1, 7, 2, requires_grad=True)
        sum((L.square().sum() + 3*R.sum()) for p in levels(7) for L, R in halves(x, p)).backward()
        want = torch.zeros_like(x)
        for _, left, right in rectangles(7):
            want[:, left] += 2*x.detach()[:, left]
            want[:, right] += 3
        assert torch.allclose(x.grad, want)


class TestShapes:
    def test_sizes(self):
        x = torch.zeros(2, 3, 4)
        assert check_shapes(x=(x, "B T D"), y=(None, "B T"), z=(x[..., 0], "B T")) == dict(B=2, T=3, D=4)

    @pytest.mark.parametrize("shape, said", [((2, 3), r"v must have the shape \(B, T, D\), B = 2, T = 3, D = 4; got \(2, 3\)"),
                                             ((2, 5, 4), r"T = 3.*got \(2, 5, 4\)"), ((3, 3, 4), "B = 2")])
    def test_what_does_not_fit_is_named(self, shape, said):
        with pytest.raises(ValueError, match=said): check_shapes(q=(torch.zeros(2, 3, 4), "B T D"), v=(torch.zeros(shape), "B T D"))

    def test_equal_names_within_one_layout(self):
        with pytest.raises(ValueError, match="P must have the shape"): check_shapes(P=(torch.zeros(3, 4), "D D"))


def product(w, beta):
    "H_C ... H_1, one factor at a time"
    P = torch.eye(w.shape[-1], dtype=w.dtype).expand(*w.shape[:-2], -1, -1)
    for i in range(w.shape[-2]): P = P - beta[..., i, None, None]*w[..., i, :, None]*(w[..., i, None, :] @ P)
    return P


class TestUT:
    @pytest.mark.parametrize("C, D", [(1, 1), (1, 5), (2, 3), (5, 2), (64, 16), (64, 64)])
    def test_both_orders_of_the_product(self, C, D):
        torch.manual_seed(0)
        w, beta = F.normalize(torch.randn(3, 2, C, D, dtype=torch.float64), dim=-1), 2*torch.rand(3, 2, C, dtype=torch.float64)
        U, I = ut_inverse(w, beta), torch.eye(D, dtype=torch.float64)
        assert U.shape == (3, 2, C, C) and torch.equal(U, U.tril())
        assert (I - w.mT @ U @ w - product(w, beta)).abs().max() < 1e-12
        assert (I - w.mT @ U.mT @ w - product(w.flip(-2), beta.flip(-1))).abs().max() < 1e-12
        assert U.abs().max() <= 4 + 1e-12

    def test_any_directions(self):
        "Not unit, not positive: still the same identity"
        torch.manual_seed(1)
        w, beta = torch.randn(8, 5, dtype=torch.float64), torch.randn(8, dtype=torch.float64)
        assert torch.allclose(torch.eye(5, dtype=torch.float64) - w.T @ ut_inverse(w, beta) @ w, product(w, beta), rtol=1e-9)

    def test_beta_zero_does_nothing(self):
        assert not ut_inverse(torch.randn(4, 3), torch.zeros(4)).any()

    def test_gradients(self):
        torch.manual_seed(0)
        args = [torch.randn(2, 5, 3, dtype=torch.float64, requires_grad=True), torch.rand(2, 5, dtype=torch.float64, requires_grad=True)]
        assert torch.autograd.gradcheck(ut_inverse, args) and torch.autograd.gradgradcheck(ut_inverse, args)

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_half_precision_is_solved_in_float32(self, dtype):
        torch.manual_seed(0)
        w, beta = F.normalize(torch.randn(64, 16), dim=-1).to(dtype), (2*torch.rand(64)).to(dtype)
        U = ut_inverse(w, beta)
        assert U.dtype == torch.float32
        exact = ut_inverse(w.double(), beta.double())
        assert (U - exact).norm() < 1e-5*exact.norm()

    def test_shapes(self):
        with pytest.raises(ValueError, match=r"\(4, 3\) and \(3,\)"): ut_inverse(torch.zeros(4, 3), torch.zeros(3))
        with pytest.raises(ValueError, match="must have the shape"): ut_inverse(torch.zeros(4), torch.zeros(()))


class TestFixedOrder:
    @settings(max_examples=50, deadline=None)
    @given(LENGTHS, st.integers(-3, 2))
    def test_doubling_gives_the_running_sum(self, n, dim):
        size = [2, 3, 4]
        size[dim] = n
        x = torch.randn(size, generator=torch.Generator().manual_seed(n), dtype=torch.float64, requires_grad=True)
        with fixed_order():
            y = _doubled(x, dim)
            g, = torch.autograd.grad(y.square().sum(), x)
        want = x.cumsum(dim)
        torch.testing.assert_close(y, want, rtol=0, atol=1e-12)
        torch.testing.assert_close(g, torch.autograd.grad(want.square().sum(), x)[0], rtol=1e-12, atol=1e-9) # sums of 300 sums

    def test_the_device_decides(self):
        "A device that is no CPU, and holds nothing"
        x = torch.ones(5, device="meta")
        with fixed_order(): assert prefix_sum(x).shape == (5,)
        with pytest.raises(AssertionError, match="cumsum"), fixed_order(): prefix_sum(torch.ones(5))

    @pytest.mark.parametrize("f", [lambda x: x.cumsum(0), lambda x: x[[0, 1, 0]], lambda x: x.gather(0, torch.tensor([0, 0])), lambda x: x.index_select(0, torch.tensor([1, 1])),
                                   lambda x: x.index_add(0, torch.tensor([1, 1]), torch.ones(2))])
    def test_what_the_other_tests_look_for_is_found(self, f):
        x = torch.ones(3, requires_grad=True)
        with pytest.raises(AssertionError, match="fixed order|twice"), fixed_order(): torch.autograd.grad(f(x).sum(), x)

    @pytest.mark.parametrize("f", [lambda x: x.repeat_interleave(3, 0), lambda x: x[[2, 0]], lambda x: x[x > 0], lambda x: x[:2].expand(4, 2)])
    def test_what_is_in_order_is_let_pass(self, f):
        x = torch.ones(3, requires_grad=True)
        with fixed_order(): torch.autograd.grad(f(x).sum(), x)


class State(NamedTuple):
    total: torch.Tensor   # (N, D)
    seen: torch.Tensor    # (N, longest, D), zeros after each row's own
    t: torch.Tensor       # (N,)


def accumulate(x, y, state=None):
    "A scan with a state of every kind of leaf: a sum, a growing memory, a counter"
    if state is None: state = State(x.new_zeros(len(x), x.shape[-1]), x[:, :0], torch.zeros(len(x), dtype=torch.long))
    out = state.total[:, None] + (x*y).cumsum(1)
    return (out, 2*y), State(state.total + (x*y).sum(1), torch.cat([state.seen, x], 1), state.t + x.shape[1])


class TestPacked:
    CU = [0, 3, 3, 7, 10, 11, 11]

    def tensors(self):
        torch.manual_seed(0)
        return [torch.randn(1, 11, 2, dtype=torch.float64, requires_grad=True) for _ in range(2)]

    def alone(self, f, x, y, cu, **kw): return [f(x[:, a:b], y[:, a:b], **kw) for a, b in zip(cu, cu[1:])]

    def test_equals_separate_values_and_gradients(self):
        x, y = self.tensors()
        f = lambda x, y: accumulate(x, y)[0]
        got = packed(f, torch.tensor(self.CU), x, y)
        want = [torch.cat(c, 1) for c in zip(*self.alone(f, x, y, self.CU))]
        assert isinstance(got, tuple) and all(torch.equal(a, b) for a, b in zip(got, want))
        grads = [torch.autograd.grad(sum(o.square().sum() for o in outs), (x, y)) for outs in (got, want)]
        for a, b in zip(*grads): assert torch.allclose(a, b, rtol=1e-12)

    def test_states_come_back_in_order_and_grow(self):
        x, y = self.tensors()
        (out, twice), state = packed(accumulate, self.CU, x, y, return_state=True)
        assert out.shape == twice.shape == (1, 11, 2)
        for i, (_, want) in enumerate(self.alone(accumulate, x, y, self.CU)):
            n = want.t.item()
            assert isinstance(state, State) and state.t[i] == n == self.CU[i + 1] - self.CU[i]
            assert torch.allclose(state.total[i], want.total[0]) and torch.equal(state.seen[i, :n], want.seen[0]) and not state.seen[i, n:].any()

    def test_a_state_goes_in_and_gradients_come_back_to_it(self):
        x, y = self.tensors()
        total = torch.randn(6, 2, dtype=torch.float64, requires_grad=True)
        start = State(total, x.new_zeros(6, 0, 2), torch.arange(6))
        (out, _), end = packed(accumulate, self.CU, x, y, state=start, return_state=True)
        assert end.t.tolist() == [3, 1, 6, 6, 5, 5] and torch.equal(end.total[1], total[1])
        out.sum().backward()
        assert torch.equal(total.grad[:, 0], torch.tensor([3., 0, 4, 3, 1, 0], dtype=torch.float64))

    def test_equal_lengths_are_one_call(self):
        sizes = []
        def f(x):
            sizes.append(tuple(x.shape))
            return x
        x = torch.randn(1, 12, 2)
        assert torch.equal(packed(f, [0, 3, 6, 9, 12], x), x) and torch.equal(packed(f, [0, 2, 5, 7, 10, 12], x), x)
        assert sizes == [(4, 3, 2), (3, 2, 2), (2, 3, 2)]
        packed(lambda x: sizes.append(x.data_ptr()) or x, [0, 6, 12], x)
        assert sizes[-1] == x.data_ptr(), "sequences of one length are not copied"

    @pytest.mark.parametrize("cu", [[0, 0], [0, 0, 0]])
    def test_nothing_but_empty_sequences(self, cu):
        assert packed(lambda x: x[..., :1], cu, torch.zeros(1, 0, 3)).shape == (1, 0, 1)
        out, t = packed(lambda x: (x, torch.full((len(x),), 7)), cu, torch.zeros(1, 0, 3), return_state=True)
        assert out.shape == (1, 0, 3) and t.tolist() == [7]*(len(cu) - 1)

    @pytest.mark.parametrize("cu, said", [([0, 3, 2, 11], "never fall"), ([1, 11], "start with 0"), ([0, 3, 10], "end with T = 11"), ([0], "N >= 1"), ([[0, 11]], "N >= 1"),
                                          ([0., 11.], "integers"), ([], "integers"), (list(range(0, 10)) + [12], r"\[0, 1, 2, 3, '...', 7, 8, 9, 12\]")])
    def test_bad_boundaries(self, cu, said):
        with pytest.raises(ValueError, match=said): sequences(torch.tensor(cu), 11)
        with pytest.raises(ValueError, match=said): packed(lambda x: x, cu, torch.zeros(1, 11, 2))

    def test_bad_rows(self):
        with pytest.raises(ValueError, match=r"shape \(1, T, ...\), T = 11; got \(2, 11\)"): packed(lambda x: x, [0, 11], torch.zeros(2, 11))
        with pytest.raises(ValueError, match=r"got \(1, 10\)"): packed(lambda x, y: x, [0, 11], torch.zeros(1, 11), torch.zeros(1, 10))
