"Grids against their definition and torch's kernels, on random and hostile input; gradients; integer requantization"
import math, warnings
import pytest, torch
from hypothesis import given, settings, strategies as st
from torch import tensor
from fastcompress.quantize import affine
from fastcompress.quantize.affine import (QParams, affine_qparams, dequantize, fake_quant, fake_quant_formula, int_range, pow2_up, quantize,
                                          quantize_bias, quantize_multiplier, requantize, requantize_fixed, shift, symmetric_qparams, to_groups)

pytestmark = pytest.mark.filterwarnings('ignore:.*quantized tensor creation.*')
floats = st.floats(-1e6, 1e6, width=32)
bits_ = st.integers(2, 16)
def many(n, **kw): return lambda f: settings(max_examples=n, deadline=None, **kw)(f)
def bits_of(t): return t.detach().contiguous().view(torch.int32)
def same(a, b): return a.dtype==b.dtype and a.shape==b.shape and torch.equal(bits_of(a), bits_of(b))


# grids

@pytest.mark.parametrize('bits', range(2, 17))
def test_the_grid_holds_what_it_says(bits):
    "Every integer comes back as itself, nothing lies between or beyond"
    for qp,(lo,hi) in [(affine_qparams(-1., 2., bits), (0, 2**bits-1)), (affine_qparams(-1., 2., bits, signed=True), (-2**(bits-1), 2**(bits-1)-1)),
                       (symmetric_qparams(1., bits), (1-2**(bits-1), 2**(bits-1)-1)), (symmetric_qparams(1., bits, narrow=False), (-2**(bits-1), 2**(bits-1)-1)),
                       (symmetric_qparams(1., bits, signed=False), (1, 2**bits-1)), (symmetric_qparams(1., bits, signed=False, narrow=False), (0, 2**bits-1))]:
        assert (qp.qmin, qp.qmax)==(lo, hi)
        q = torch.arange(lo, hi+1, dtype=torch.int32)
        real = dequantize(q, qp)
        assert torch.equal(quantize(real, qp).int(), q) and real.unique().numel()==len(q)
        assert torch.equal(quantize(tensor([-1e30, 1e30]), qp).int(), tensor([lo, hi], dtype=torch.int32))
        assert dequantize(qp.zero_point.view(1), qp)==0 and quantize(torch.zeros(1), qp).int()==qp.zero_point


@many(150)
@given(bits_, floats, floats, st.booleans(), st.booleans())
def test_properties(bits, a, b, signed, pow2):
    lo,hi = min(a, b, 0.), max(a, b, 0.)
    qp = affine_qparams(lo, hi, bits, signed, pow2=pow2)
    x = torch.linspace(lo, hi, 97)
    y = dequantize(quantize(x, qp), qp)
    assert same(dequantize(quantize(y, qp), qp), y), 'idempotent'
    assert ((x-y).abs() <= qp.scale*0.5 + 1e-6*x.abs() + 1e-30).all(), 'within half a step'
    assert (y.diff()>=0).all() and (quantize(x, qp).int().diff()>=0).all(), 'monotone'
    assert dequantize(quantize(torch.zeros(1), qp), qp)==0, 'zero is exact'
    assert qp.qmin<=qp.zero_point<=qp.qmax
    assert same(fake_quant(x, qp), y)


@many(100)
@given(bits_, st.floats(2**-30, 1e6, width=32), st.booleans(), st.booleans(), st.booleans())
def test_symmetric_properties(bits, amax, narrow, signed, pow2):
    qp = symmetric_qparams(amax, bits, narrow, pow2=pow2, signed=signed)
    x = torch.linspace(-amax, amax, 97)
    y = dequantize(quantize(x, qp), qp)
    assert ((x-y).abs() <= qp.scale*0.5 + 1e-6*x.abs()).all()
    assert torch.equal(y, -y.flip(0)) or not narrow
    assert qp.zero_point==(0 if signed else 2**(bits-1))


def test_signs_are_names_for_the_same_reals():
    x = torch.randn(1000)*2
    u,s = affine_qparams(-1., 3.), affine_qparams(-1., 3., signed=True)
    assert torch.equal(dequantize(quantize(x, u), u), dequantize(quantize(x, s), s))
    moved = shift(u, -128)
    assert (moved.qmin, moved.qmax, moved.zero_point)==(s.qmin, s.qmax, s.zero_point) and moved.dtype==torch.int8
    assert torch.equal(quantize(x, moved).int()+128, quantize(x, u).int())


@many(200)
@given(st.floats(2.**-60, 1e30))
def test_power_of_two_is_the_smallest_that_covers(s):
    up = pow2_up(tensor(s, dtype=torch.float64)).item()
    assert math.frexp(up)[0]==0.5 and up/2<s<=up
    qp = symmetric_qparams(s, 4, pow2=True)
    assert math.frexp(qp.scale.item())[0]==0.5
    assert (quantize(tensor([s, -s]), qp).abs()<=7).all() and qp.scale.double()*7>=s, 'nothing clips'
    assert qp.scale<=2*symmetric_qparams(s, 4).scale*(1+1e-6)


def test_power_of_two_leaves_powers_alone():
    p = 2.**torch.arange(-60, 100, dtype=torch.float64)
    assert torch.equal(pow2_up(p), p)
    assert torch.equal(pow2_up(p*(1+2**-50)), p*2)


# groups

def grouped(w, g, bits, axis=0, sym=True):
    x = to_groups(w, g, axis)
    if sym: return symmetric_qparams(x.abs().amax(2), bits, axis=axis, group=g)
    return affine_qparams(x.amin(2), x.amax(2), bits, axis=axis, group=g)


@many(80)
@given(st.lists(st.integers(1, 5), min_size=1, max_size=4), st.integers(1, 9), bits_, st.booleans(), st.integers(0, 3), st.integers(0, 999))
def test_groups_equal_a_loop(shape, g, bits, sym, axis, seed):
    "Whatever the shape, the axis and the remainder: each group as if it were a tensor of its own"
    axis %= len(shape)
    w = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    qp = grouped(w, g, bits, axis, sym)
    q,y,f = quantize(w, qp), dequantize(quantize(w, qp), qp), fake_quant(w, qp)
    assert q.shape==y.shape==w.shape and same(f, y) and same(fake_quant_formula(w, qp), y)
    rows = w.movedim(axis, 0).reshape(w.shape[axis], -1)
    assert qp.scale.shape==(len(rows), -(-rows.shape[1]//g))
    for c,row in enumerate(rows):
        for j,part in enumerate(row.split(g)):
            one = symmetric_qparams(part.abs().max(), bits) if sym else affine_qparams(part.min(), part.max(), bits)
            at = slice(j*g, j*g+len(part))
            assert one.scale==qp.scale[c,j] and one.zero_point==qp.zero_point[c,j]
            assert torch.equal(q.movedim(axis, 0).reshape(rows.shape)[c,at], quantize(part, one))
            assert torch.equal(y.movedim(axis, 0).reshape(rows.shape)[c,at], dequantize(quantize(part, one), one))


def test_one_group_is_a_channel():
    w = torch.randn(4, 3, 2, 2)
    c,g = symmetric_qparams(w.abs().amax((1,2,3)), 4, axis=0), grouped(w, 12, 4)
    assert torch.equal(quantize(w, c), quantize(w, g)) and torch.equal(quantize(w, c), quantize(w, grouped(w, 999, 4)))


def test_groups_carry_the_gradient():
    w = (torch.randn(4, 10)*2).requires_grad_()
    qp = symmetric_qparams(to_groups(w.detach(), 4).abs().amax(2)*0.5, 4, axis=0, group=4)
    g, = torch.autograd.grad(fake_quant(w, qp).sum(), w)
    s,_ = qp.shaped(w)
    assert torch.equal(g, ((w/s).round().abs()<=7).float()) and 0<g.sum()<40


@pytest.mark.parametrize('axis', [0, 1, 2, -1])
def test_channels_on_any_axis(axis):
    x = torch.randn(3, 4, 5)
    hi = x.movedim(axis, 0).flatten(1).amax(1)
    qp = affine_qparams(-hi, hi, axis=axis)
    for c in range(x.shape[axis]):
        one = QParams(qp.scale[c], qp.zero_point[c], 0, 255)
        assert torch.equal(quantize(x, qp).select(axis, c), quantize(x.select(axis, c), one))


# torch

shapes = st.sampled_from([(1,), (7,), (64,), (3,5), (2,3,4,4), (0,), (2,0)])

@many(120)
@given(shapes, st.floats(1e-6, 1e6), floats, floats, st.integers(0, 999))
def test_fake_quant_equals_formula_and_kernel(shape, size, a, b, seed):
    "Bit for bit, gradients too"
    gen = torch.Generator().manual_seed(seed)
    x,g = (torch.randn(shape, generator=gen)*size).requires_grad_(), torch.randn(shape, generator=gen)
    qp = affine_qparams(min(a, b), max(a, b))
    def both(f):
        y = f(x)
        return y.detach(), torch.autograd.grad(y, x, g)[0]
    want = both(lambda x: fake_quant_formula(x, qp))
    got = [both(lambda x: fake_quant(x, qp)), both(lambda x: torch.fake_quantize_per_tensor_affine(x, qp.scale, qp.zero_point, 0, 255))]
    if x.numel(): got.append(both(lambda x: affine._kernel(x, qp)))
    for y,d in got: assert same(y, want[0]) and torch.equal(d, want[1])
    with torch.no_grad(): assert same(fake_quant(x, qp), want[0])
    assert same(fake_quant(x.detach(), qp), want[0])


@many(60)
@given(bits_, st.booleans(), st.integers(0, 999))
def test_per_channel_equals_kernel(bits, narrow, seed):
    gen = torch.Generator().manual_seed(seed)
    w = (torch.randn(5, 3, 3, 3, generator=gen)*torch.rand(5, 1, 1, 1, generator=gen)).requires_grad_()
    qp = symmetric_qparams(w.detach().abs().amax((1,2,3))*0.7, bits, narrow, axis=0)
    want = torch.fake_quantize_per_channel_affine(w, qp.scale, qp.zero_point, 0, qp.qmin, qp.qmax)
    for f in fake_quant, fake_quant_formula:
        assert same(f(w, qp), want)
        assert torch.equal(torch.autograd.grad(f(w, qp).sum(), w)[0], torch.autograd.grad(want.sum(), w, retain_graph=True)[0])
    if bits==8 and not narrow:
        t = torch.quantize_per_channel(w.detach(), qp.scale.double(), qp.zero_point.long(), 0, torch.qint8)
        assert torch.equal(quantize(w, qp), t.int_repr()) and same(dequantize(quantize(w, qp), qp), t.dequantize())


hostile = dict(zeros=torch.zeros(5), equal=torch.full((5,), 3.7), subnormal=tensor([1e-45, -1e-40, 1e-38]), huge=tensor([3e38, -3e38, 1e30, -1e30]), mixed=tensor([1e30, 1e-30, 0., -1.]),
               minus_zero=tensor([-0.]), single=tensor([2.5]), empty=torch.zeros(0), infinite=tensor([float('inf'), -float('inf'), 1.]))

@pytest.mark.parametrize('name', hostile)
@pytest.mark.parametrize('grid', ['own','unit','tiny','symmetric'])
def test_hostile_input(name, grid):
    x = hostile[name].clone().requires_grad_()
    v = x.detach().clamp(-1e30, 1e30)
    lo,hi = (v.min(), v.max()) if v.numel() else (0., 0.)
    qp = dict(own=lambda: affine_qparams(lo, hi), unit=lambda: affine_qparams(-1., 1.), tiny=lambda: affine_qparams(-1e-30, 1e-30),
              symmetric=lambda: symmetric_qparams(max(abs(lo), abs(hi)), 4))[grid]()
    want = dequantize(quantize(x, qp), qp)
    routes = [fake_quant, fake_quant_formula] + ([affine._kernel] if x.numel() else [])
    for f in routes:
        y = f(x, qp)
        assert same(y, want) and torch.equal(torch.autograd.grad(y.sum(), x)[0], torch.autograd.grad(fake_quant_formula(x, qp).sum(), x)[0])
    assert torch.equal(quantize(x, qp)==qp.qmax, want==dequantize(tensor([qp.qmax]), qp))


def test_far_outside_saturates_where_torch_wraps():
    "2^63 steps above the grid torch's per-channel kernel gives the lowest integer"
    x = torch.full((2, 1), 1e30)
    qp = affine_qparams(tensor([-1., -1.]), tensor([1., 1.]), axis=0)
    assert torch.equal(quantize(x, qp), torch.full((2, 1), 255, dtype=torch.uint8)) and (fake_quant(x, qp)>0.99).all() and (fake_quant(-x, qp)<-0.99).all()
    assert (torch.fake_quantize_per_channel_affine(x, qp.scale, qp.zero_point, 0, 0, 255)<0).all(), 'torch has mended its kernel: say so in the notebook'


def test_nan_stays_visible():
    x,qp = tensor([1., float('nan')], requires_grad=True), affine_qparams(-1., 1.)
    for f in fake_quant, fake_quant_formula, affine._kernel: assert f(x, qp).sum().isnan()
    assert fake_quant(x, qp)[0]==dequantize(quantize(tensor([1.]), qp), qp)
    assert torch.equal(torch.autograd.grad(fake_quant(x, qp).nansum(), x)[0], tensor([1., 0.]))
    for bad in (float('nan'), float('inf')):
        with pytest.raises(ValueError, match='inf or nan'): symmetric_qparams(bad)
        with pytest.raises(ValueError, match='inf or nan'): affine_qparams(0., bad)


def test_input_is_left_alone_in_any_layout():
    qp,c = affine_qparams(-1., 1.), affine_qparams(-torch.ones(4), torch.ones(4), axis=1)
    x = torch.randn(2, 4, 6, 6)
    for v in x, x.to(memory_format=torch.channels_last), x[:,:,::2], x.transpose(2, 3), x[:1].expand(3, 4, 6, 6):
        before = v.clone()
        for g in qp, c: assert torch.equal(fake_quant(v, g), fake_quant_formula(v.contiguous(), g))
        assert torch.equal(v, before)
    assert fake_quant(x.to(memory_format=torch.channels_last), qp).is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16, torch.float64])
def test_arithmetic_is_float32(dtype):
    x = (torch.randn(300)*2).to(dtype).requires_grad_()
    for qp in affine_qparams(-1., 1.), affine_qparams(-torch.ones(300), torch.ones(300), axis=0):
        y = fake_quant(x, qp)
        assert same(y, fake_quant(x.detach().float(), qp)) and y.dtype==torch.float32
        g, = torch.autograd.grad(y.sum(), x)
        f = x.detach().float().requires_grad_()
        assert g.dtype==dtype and torch.equal(g.float(), torch.autograd.grad(fake_quant_formula(f, qp).sum(), f)[0]) and 0<g.sum()<300
    assert torch.autograd.grad(affine._kernel(x.float(), affine_qparams(-1., 1.)).sum(), x)[0].dtype==dtype


def test_autocast_changes_nothing():
    x,qp = torch.randn(50, requires_grad=True), affine_qparams(-1., 1.)
    with torch.autocast('cpu', torch.bfloat16):
        y,h = fake_quant(x, qp), fake_quant(x.bfloat16(), qp)
    assert same(y, fake_quant(x, qp)) and h.dtype==torch.float32
    assert torch.equal(torch.autograd.grad(y.sum(), x)[0], torch.autograd.grad(fake_quant(x, qp).sum(), x)[0])


def test_plain_straight_through():
    x,g = (torch.randn(100)*5).requires_grad_(), torch.randn(100)
    for qp in affine_qparams(-1., 1.), affine_qparams(-torch.ones(100), torch.ones(100), axis=0):
        for f in fake_quant, fake_quant_formula:
            assert torch.equal(torch.autograd.grad(f(x, qp, clip_grad=False), x, g)[0], g)
            assert not torch.equal(torch.autograd.grad(f(x, qp), x, g)[0], g)
        assert same(fake_quant(x, qp, clip_grad=False), fake_quant(x, qp))


@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a GPU')
def test_gpu_equals_cpu():
    for x in [torch.randn(10_000)*3, *hostile.values()]:
        for qp in affine_qparams(-1., 1.), affine_qparams(-torch.ones(len(x)), torch.ones(len(x)), axis=0):
            on = QParams(qp.scale.cuda(), qp.zero_point.cuda(), qp.qmin, qp.qmax, qp.axis)
            for clip in True, False:
                a,b = x.clone().requires_grad_(), x.cuda().requires_grad_()
                y,z = fake_quant(a, qp, clip), fake_quant(b, on, clip)
                assert same(y, z.cpu())
                assert torch.equal(torch.autograd.grad(y.sum(), a)[0], torch.autograd.grad(z.sum(), b)[0].cpu())


# integers alone

def exact(acc, m): return acc.double()*m
def from_tie(v): return (v.abs().frac()-0.5).abs()
wide = QParams(tensor(1.), tensor(0, dtype=torch.int32), -2**31, 2**31-1)


@many(200)
@given(st.floats(2.**-30, 2.**29))
def test_multiplier_is_exact_to_31_bits(m):
    M,e = quantize_multiplier(m)
    assert M.dtype==e.dtype==torch.int32 and 2**30<=int(M)<2**31
    assert abs(math.ldexp(int(M), int(e)-31)-m) <= m*2.**-31


def test_multiplier_edges():
    M,e = quantize_multiplier(tensor([0., 2.**-33, 2.**-32, 0.5, 1., 1-2.**-40], dtype=torch.float64))
    assert M.tolist()==[0, 0, 2**30, 2**30, 2**30, 2**30] and e.tolist()==[0, 0, -31, 0, 1, 1]
    for bad in (-0.1, 2.**30, float('nan'), float('inf')):
        with pytest.raises(ValueError, match='multiplier'): quantize_multiplier(bad)


def gemmlowp(acc, M, e, zero, lo, hi):
    "gemmlowp's fixedpoint.h in Python's own integers"
    a = max(-2**31, min(2**31-1, acc << max(e, 0)))
    ab = a*M
    nudge = 2**30 if ab>=0 else 1-2**30
    x = abs(ab+nudge)//2**31*(1 if ab+nudge>=0 else -1) # C divides towards zero
    n = max(-e, 0)
    mask = (1<<n)-1
    y = (x>>n) + ((x&mask) > (mask>>1)+(x<0))
    return max(lo, min(hi, y+zero))


@many(300)
@given(st.lists(st.integers(-2**31, 2**31-1), min_size=1, max_size=20), st.floats(2.**-32, 2.**20), st.sampled_from([0, 3, 128]))
def test_fixed_equals_gemmlowp(accs, m, zero):
    M,e = quantize_multiplier(m)
    for qp in QParams(tensor(1.), tensor(zero, dtype=torch.int32), 0, 255), QParams(tensor(1.), tensor(0, dtype=torch.int32), -2**31, 2**31-1):
        want = [gemmlowp(a, int(M), int(e), int(qp.zero_point), qp.qmin, qp.qmax) for a in accs]
        assert requantize_fixed(tensor(accs), M, e, qp).tolist()==want


@many(200)
@given(st.floats(2.**-20, 0.999), st.integers(0, 999))
def test_fixed_is_the_float_formula_except_at_ties(m, seed):
    "Rounding once: equal further than |v|*2^-31 from a tie. Twice: than half a unit before the shift. Never more than 1 apart"
    gen = torch.Generator().manual_seed(seed)
    acc = torch.randint(-2**31, 2**31, (500,), generator=gen) >> torch.randint(0, 24, (500,), generator=gen)
    M,e = quantize_multiplier(m)
    v = exact(acc, m)
    want,err = torch.round(v).long(), v.abs()*2.**-31 + 1e-9
    for single,far in (True, err), (False, err + (2.**(e-1) if e<0 else 0)):
        got = requantize_fixed(acc, M, e, wide, single).long()
        assert ((got-want).abs()<=1 + (v.abs()>2**29)).all() # from 2^29 on the multiplier's own 31 bits show
        clear = (from_tie(v)>far) & (v.abs()<2**29)
        assert torch.equal(got[clear], want[clear])
        if single: assert clear.float().mean()>0.3 # says something (at m=0.5 every other is a tie)
    small = v.abs()<2**11 # a byte's range: 2^-20 from a tie is far enough
    clear = small & (from_tie(v)>2.**-20+1e-9)
    assert torch.equal(requantize_fixed(acc, M, e, wide, single=True).long()[clear], want[clear])


def test_the_high_half_saturates():
    assert affine._high_mul(tensor([-2**31, -2**31, 2**31-1]), tensor([-2**31, 2**31-1, 2**31-1])).tolist()==[2**31-1, -2**31+1, 2**31-2]


def test_fixed_per_channel_and_saturated():
    acc,m = torch.randint(-10**6, 10**6, (6, 4, 5)), tensor([0.001, 0.02, 0.3, 0.00007], dtype=torch.float64).view(4, 1)
    qp = QParams(tensor(0.1), tensor(7, dtype=torch.int32), -128, 127)
    for single in (False, True):
        y = requantize_fixed(acc, *quantize_multiplier(m), qp, single)
        assert y.dtype==torch.int8 and y.min()==-128 and y.max()==127
        want = (torch.round(acc*m)+7).clamp(-128, 127)
        assert (y-want).abs().max()<=1 and (y!=want).float().mean()<0.05
    assert torch.equal(requantize_fixed(acc.int(), *quantize_multiplier(m), qp), requantize_fixed(acc, *quantize_multiplier(m), qp))
    assert requantize_fixed(tensor([2**31-1, -2**31]), *quantize_multiplier(1000.), qp).tolist()==[127, -128]
    assert requantize_fixed(tensor([2**31-1, -2**31]), *quantize_multiplier(1000.), wide, single=True).tolist()==[2**31-1, -2**31]
    assert requantize_fixed(tensor([5, -5]), *quantize_multiplier(0.), qp).tolist()==[7, 7]


def test_float_and_fixed_requantization_agree():
    acc,m = torch.randint(-30000, 30000, (5000,)), 0.0041
    qp = QParams(tensor(0.1), tensor(128, dtype=torch.int32), 0, 255)
    a,b = requantize(acc, m, qp).int(), requantize_fixed(acc, *quantize_multiplier(m), qp, single=True).int()
    assert torch.equal(a[from_tie(exact(acc, m))>1e-3], b[from_tie(exact(acc, m))>1e-3])


@many(60)
@given(st.lists(floats, min_size=1, max_size=8), st.floats(1e-4, 1.), st.floats(1e-4, 1.))
def test_bias_within_half_a_step(bs, sx, sw):
    b = tensor(bs)
    with warnings.catch_warnings(record=True) as ws:
        warnings.simplefilter('always')
        q = quantize_bias(b, sx, sw)
    v = torch.round(b.double()/(sx*sw))
    fits = (v>=-2**31) & (v<=2**31-1)
    assert q.dtype==torch.int32 and ((q.double()*sx*sw - b.double()).abs()[fits] <= sx*sw*0.500001 + 1e-9).all()
    assert bool(ws)==(not fits.all())
    assert q[~fits].tolist()==[2**31-1 if o>0 else -2**31 for o in b[~fits]]


def test_bias_per_channel_equals_torch():
    b,sx,sw = torch.randn(16), 0.02, torch.rand(16)*0.01+1e-3
    t = torch.quantize_per_channel(b, sx*sw.double(), torch.zeros(16).long(), 0, torch.qint32).int_repr()
    q = quantize_bias(b, sx, sw)
    v = b.double()/(sx*sw.double())
    assert (q-t).abs().max()<=1 and torch.equal(q[from_tie(v)>1e-2], t[from_tie(v)>1e-2])
    with pytest.raises(ValueError, match='inf or nan'): quantize_bias(tensor([float('nan')]), sx, sw[:1])


# refused

@pytest.mark.parametrize('bits', [1, 17, 0, -8, 8., '8', None])
def test_bits_outside_are_refused(bits):
    for f in lambda: int_range(bits), lambda: affine_qparams(0., 1., bits=bits), lambda: symmetric_qparams(1., bits=bits):
        with pytest.raises(ValueError, match='from 2 to 16'): f()


@pytest.mark.parametrize('dtype', [torch.int32, torch.int64, torch.uint8, torch.bool, torch.complex64])
def test_only_reals_are_quantized(dtype):
    x,qp = torch.ones(3).to(dtype), affine_qparams(0., 1.)
    for f in quantize, fake_quant, fake_quant_formula:
        with pytest.raises(TypeError, match=f'got {dtype}'): f(x, qp)


def test_grids_that_do_not_fit_are_refused():
    qp = symmetric_qparams(torch.ones(4), axis=0)
    with pytest.raises(ValueError, match='has 4 channels on dimension 0'): quantize(torch.ones(3, 2), qp)
    with pytest.raises(ValueError, match='has 4 channels'): fake_quant(torch.ones(()), qp)
    g = symmetric_qparams(torch.ones(4, 3), axis=0, group=2)
    for n in (4, 7):
        with pytest.raises(ValueError, match='groups of 2 need scales'): fake_quant(torch.ones(4, n), g)
    for n in (5, 6): assert fake_quant(torch.ones(4, n), g).shape==(4, n)
    with pytest.raises(ValueError, match='needs an axis'): symmetric_qparams(torch.ones(4, 3), group=2)
    for bad in (0, -1):
        with pytest.raises(ValueError, match='at least 1'): symmetric_qparams(torch.ones(4, 3), axis=0, group=bad)
    for bad in (0, -1, 2.):
        with pytest.raises(ValueError, match='whole number from 1'): to_groups(torch.ones(4, 3), bad)
    with pytest.raises(ValueError, match='too wide'): symmetric_qparams(1e39*127*4)
    with pytest.raises(ValueError, match='too wide'): symmetric_qparams(3e38, 2, pow2=True)
    with pytest.raises(ValueError, match='negative'): symmetric_qparams(tensor([1., -1.]), axis=0)
    with pytest.raises(TypeError, match='must be integers'): requantize_fixed(torch.ones(2), *quantize_multiplier(0.5), wide)
