"Observers on hostile data, their merge laws, and the ranges they choose against optima that can be computed"
import math
import pytest, torch
from hypothesis import given, settings, strategies as st
from torch import tensor
from torch.distributions import Laplace as LaplaceDist, StudentT
from fastcompress.quantize.affine import affine_qparams, fake_quant, symmetric_qparams
from fastcompress.quantize import observe as ob
from fastcompress.quantize.observe import (Aciq, Entropy, Histogram, Lp, MinMax, MovingAverage, Percentile, aciq_clip, kl_cost, lp_range,
                                           mse_range, observers, weight_observers, weight_qparams, with_zero)

NAMES = ['minmax','moving_average','percentile','histogram','mse','lp','kl','entropy','aciq','gauss','laplace']
HISTOGRAMS = [n for n in NAMES if n not in ('minmax','moving_average')]
GRIDS = [(0,255,False), (-128,127,False), (0,15,False), (0,3,False), (-127,127,True), (-8,7,True), (-1,1,True), (0,255,True)]
FULL   = {2:8.2556, 3:13.9107, 4:19.2577, 5:24.5272, 6:29.8178, 7:35.1630, 8:40.5697}
NARROW = {2:7.2085, 3:13.2920, 4:18.8977, 5:24.3259, 6:29.7090, 7:35.1057, 8:40.5400}

def gen(seed): return torch.Generator().manual_seed(seed)
def watch(o, *xs):
    o = observers[o]() if isinstance(o, str) else o
    for x in xs: o.update_(x)
    return o
def sqnr(x, xq): return 10*math.log10((x.double()**2).sum()/((x.double()-xq.double())**2).sum())
def affine_err(x, rng, bits): return ((x.double()-fake_quant(x, affine_qparams(*rng, bits=bits)).double())**2).sum().item()
def same(a, b): return all(torch.equal(torch.as_tensor(v), torch.as_tensor(b[k])) for k,v in a.items()) and a.keys()==b.keys()

DATA = dict(constant=torch.full((50,), 3.7), negative_constant=torch.full((50,), -0.3), zeros=torch.zeros(40), minus_zero=tensor([-0.,-0.]), single=tensor([2.5]),
            scalar=tensor(-1.5), one_sided=torch.randn(500, generator=gen(0)).relu(), negative=-torch.rand(300, generator=gen(1))-1,
            subnormal=tensor([1e-45,-1e-40,1e-38,0.]), tiny=torch.randn(100, generator=gen(2))*1e-20, huge=torch.randn(100, generator=gen(3))*1e30,
            largest=tensor([torch.finfo(torch.float32).max, -1.]), outlier=torch.cat([torch.randn(200, generator=gen(4)), tensor([1e30])]),
            two_values=tensor([1.]*30+[-2.]*3), int=torch.arange(-5, 9), half=torch.randn(64, generator=gen(5)).half(), bf16=torch.randn(64, generator=gen(6)).bfloat16(),
            double=torch.tensor([1-1e-12, 0.25], dtype=torch.float64))
def heavy(): torch.manual_seed(0); return StudentT(1.5).sample((5000,))
DATA['heavy'] = heavy()


def test_all_names_are_there(): assert set(NAMES) <= set(observers) and {'minmax','mse','lp','percentile','aciq','gauss','laplace'} <= set(weight_observers)


@pytest.mark.parametrize('name', NAMES)
@pytest.mark.parametrize('data', DATA)
def test_any_data(name, data):
    "A finite range, zero inside, never wider than what was seen (and the grid's symmetry) asks for; a whole batch or pieces"
    x = DATA[data]
    o = watch(name, x)
    lo,hi = x.double().min().item(),x.double().max().item()
    for qmin,qmax,symmetric in GRIDS:
        a,b = o.range(qmin, qmax, symmetric)
        most = with_zero(lo, hi, qmin, qmax, symmetric)
        assert math.isfinite(a) and math.isfinite(b) and a<=0<=b, (a, b)
        assert a>=most[0]*(1+1e-6) and b<=most[1]*(1+1e-6)
        if most[0]<most[1]: assert a<b, 'nothing left of the range'
        else: assert (a, b)==(0, 0)
        if symmetric: assert a*qmax==pytest.approx(b*qmin, rel=1e-9)
        qp = affine_qparams(a, b)
        assert fake_quant(x.float(), qp).isfinite().all()


@pytest.mark.parametrize('name', NAMES)
def test_a_constant_is_kept(name):
    for c in 3.7, -0.3, 1e30, 6.:
        x = torch.full((50,), c)
        for bits in 2,4,8: assert torch.allclose(fake_quant(x, affine_qparams(*watch(name, x).range(0, 2**bits-1), bits=bits)), x, rtol=1e-6), (c, bits)


@pytest.mark.parametrize('name', NAMES)
def test_nothing_seen_and_empty_batches(name):
    with pytest.raises(ValueError, match='nothing was observed'): watch(name).range()
    with pytest.raises(ValueError, match='nothing was observed'): watch(name, torch.zeros(0, 3)).range()
    x = torch.randn(1000, generator=gen(0))
    a,b = watch(name, torch.zeros(0), x, torch.zeros(3, 0)), watch(name, x)
    assert same(a.state(), b.state()) and a.range()==b.range()


@pytest.mark.parametrize('name', NAMES)
@pytest.mark.parametrize('bad', [float('nan'), float('inf'), -float('inf')])
def test_refuses_nan_and_inf_and_forgets_them(name, bad):
    o = watch(name, tensor([1.,-2.]))
    was = o.state()
    with pytest.raises(ValueError, match=r'nan or inf \(range .* to .*\)'): o.update_(tensor([1., bad, 0.]))
    with pytest.raises(ValueError, match=r'nan or inf'): o.update_(tensor([bad]))
    assert same(o.state(), was)


@pytest.mark.parametrize('name', NAMES)
def test_layouts_and_gradients(name):
    x = torch.randn(2,3,8,8, generator=gen(0))
    want = watch(name, x).state()
    for y in x.contiguous(memory_format=torch.channels_last), x.transpose(1,2).contiguous().transpose(1,2), x.clone().requires_grad_(), x.double():
        got = watch(name, y).state()
        assert same(got, want)
        assert not any(isinstance(v, torch.Tensor) and v.requires_grad for v in got.values())
    expanded = watch(name, x[:1].expand(5,-1,-1,-1))
    assert same(expanded.state(), watch(name, x[:1].repeat(5,1,1,1)).state())


# merging

parts = st.lists(st.tuples(st.integers(0, 40), st.floats(1e-3, 1e5), st.floats(-3, 3)), min_size=0, max_size=6)

@settings(max_examples=60, deadline=None)
@given(parts, st.integers(0, 6), st.integers(0, 1000), st.sampled_from(['minmax', *HISTOGRAMS]))
def test_halves_merged_equal_the_whole(ps, cut, seed, name):
    g = gen(seed)
    xs = [(torch.randn(n, generator=g)+m)*s for n,s,m in ps]
    a,b,whole = watch(name, *xs[:cut]), watch(name, *xs[cut:]), watch(name, *xs)
    was = b.state()
    assert a.merge_(b) is a
    assert same(a.state(), whole.state()) and same(b.state(), was)
    if any(len(x) for x in xs):
        for grid in GRIDS[:5]: assert a.range(*grid)==whole.range(*grid)


@settings(max_examples=30, deadline=None)
@given(parts, st.randoms(use_true_random=False), st.sampled_from(['minmax', *HISTOGRAMS]))
def test_order_makes_no_difference(ps, rnd, name):
    xs = [(torch.randn(n, generator=gen(i))+m)*s for i,(n,s,m) in enumerate(ps)]
    ys = xs[:]; rnd.shuffle(ys)
    assert same(watch(name, *xs).state(), watch(name, *[y.flip(0) for y in ys]).state())


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.floats(-9, 0), st.floats(0, 9)), max_size=12), st.integers(0, 12), st.integers(0, 12), st.floats(0.01, 1))
def test_moving_average_merges_in_order(ends, i, j, momentum):
    i,j = sorted((i, j))
    xs = [tensor(e) for e in ends]
    a,b,c = (watch(MovingAverage(momentum), *p) for p in (xs[:i], xs[i:j], xs[j:]))
    whole = watch(MovingAverage(momentum), *xs)
    left = watch(MovingAverage(momentum)).merge_(a).merge_(b).merge_(c)
    right = MovingAverage(momentum).load_state_(a.state()).merge_(b.merge_(c))
    for got in left, right:
        for k,v in whole.state().items(): assert got.state()[k]==pytest.approx(v, abs=1e-9)


def test_moving_average_is_the_recurrence():
    xs = [torch.randn(50, generator=gen(i)) for i in range(30)]
    o = watch(MovingAverage(), *xs)
    lo,hi = xs[0].min().item(),xs[0].max().item()
    for x in xs[1:]: lo,hi = 0.99*lo+0.01*x.min().item(),0.99*hi+0.01*x.max().item()
    assert o.range()==pytest.approx((lo, hi), rel=1e-6) and o.momentum==0.01
    theirs = torch.ao.quantization.MovingAverageMinMaxObserver(averaging_constant=0.01)
    for x in xs: theirs(x)
    assert o.range()==pytest.approx((theirs.min_val.item(), theirs.max_val.item()), rel=1e-5)


@pytest.mark.parametrize('name', NAMES)
def test_state_round_trip(name, tmp_path):
    xs = [torch.randn(300, generator=gen(i))*2**i for i in range(4)]
    o = watch(name, *xs[:2])
    d = o.state()
    assert all(type(v) in (int,float) or type(v) is torch.Tensor for v in d.values())
    torch.save(d, tmp_path/'s'); d = torch.load(tmp_path/'s', weights_only=True)
    p = observers[name]().load_state_(d)
    frozen = {k:v.clone() if isinstance(v, torch.Tensor) else v for k,v in d.items()}
    for q in o, p:
        for x in xs[2:]: q.update_(x)
    assert same(o.state(), p.state()) and o.range()==p.range()
    assert same(d, frozen), 'the state is a copy'
    empty = observers[name]().load_state_(observers[name]().state())
    assert same(empty.merge_(o).state(), o.state()) and same(o.merge_(observers[name]()).state(), p.state())
    with pytest.raises(ValueError, match='expects a state of'): p.load_state_({})
    with pytest.raises(ValueError, match='expects a state of'): p.load_state_({**d, 'more':1})


def test_what_cant_be_merged():
    with pytest.raises(TypeError, match='can merge another'): Histogram().merge_(MinMax())
    with pytest.raises(TypeError, match='can merge another'): MinMax().merge_(MovingAverage())
    with pytest.raises(ValueError, match='bins'): Histogram(64).merge_(Histogram())
    with pytest.raises(ValueError, match='momentum'): MovingAverage(0.1).merge_(MovingAverage(0.2))


@pytest.mark.parametrize('f', [lambda: MovingAverage(0), lambda: MovingAverage(1.5), lambda: Percentile(0), lambda: Percentile(101), lambda: Lp(0), lambda: Lp(-1),
                               lambda: Lp(math.inf), lambda: Histogram(100), lambda: Histogram(2)])
def test_bad_settings(f):
    with pytest.raises(ValueError): f()


# what the ranges are worth

@pytest.fixture(scope='module')
def normal(): return torch.randn(1_000_000, generator=gen(0))
@pytest.fixture(scope='module')
def seen(normal): return watch('mse', *normal.split(100_000))

@pytest.mark.parametrize('bits', FULL)
def test_gaussian_histogram_reaches_the_optimum(normal, seen, bits):
    "Best uniform quantizers of N(0,1), numerical optima: as many levels on both sides, one more below zero, and affine"
    n = 2**(bits-1)-1
    lo,hi = seen.range(-n, n, symmetric=True)
    assert lo==-hi and abs(sqnr(normal, fake_quant(normal, symmetric_qparams(hi, bits))) - NARROW[bits]) < 0.05
    lo,hi = seen.range(-n-1, n, symmetric=True)
    assert abs(sqnr(normal, fake_quant(normal, symmetric_qparams(hi, bits, narrow=False))) - FULL[bits]) < 0.05
    assert abs(sqnr(normal, fake_quant(normal, affine_qparams(*seen.range(0, 2**bits-1), bits=bits))) - FULL[bits]) < 0.05


@pytest.mark.parametrize('bits', NARROW)
def test_gaussian_weights_reach_the_optimum(normal, bits):
    w = normal.view(4, -1)
    assert abs(sqnr(w, fake_quant(w, weight_qparams(w, bits, per_channel=False))) - NARROW[bits]) < 0.05
    assert abs(sqnr(w, fake_quant(w, weight_qparams(w, bits))) - NARROW[bits]) < 0.05
    rows = torch.special.ndtri((torch.arange(10**6, dtype=torch.float64)+0.5)/10**6).float()*tensor([[1e-3],[7e4]]) # random rows would stray by 0.2 dB
    for row,q in zip(rows, fake_quant(rows, weight_qparams(rows, bits))): assert abs(sqnr(row, q) - NARROW[bits]) < 0.05


def _brute(x, bits, n=1500):
    "Least squared error of symmetric grids by trying many"
    top,qmax = x.abs().max().item(),2**(bits-1)-1
    s = torch.logspace(-2.5, 0, n, dtype=torch.float64)*top/qmax
    return min(((torch.round(x/k).clamp(-qmax, qmax)*k-x)**2).sum().item() for k in s)

@pytest.mark.parametrize('bits', [2,4,8])
@pytest.mark.parametrize('kind', ['normal','laplace','student','uniform','outlier'])
def test_searches_against_brute_force(kind, bits):
    torch.manual_seed(1)
    x = dict(normal=torch.randn(4000), laplace=LaplaceDist(0., 1.).sample((4000,)), student=StudentT(2.).sample((4000,)), uniform=torch.rand(4000)*2-1,
             outlier=torch.cat([torch.randn(20000), tensor([90.])]))[kind]
    best,n = _brute(x.double(), bits),2**(bits-1)-1
    for amax in weight_observers['mse'](x[None], n).item(), watch('mse', x).range(-n, n, symmetric=True)[1]:
        err = ((x-fake_quant(x, symmetric_qparams(amax, bits))).double()**2).sum().item()
        assert 10*math.log10(err/best) < 0.1, amax


def test_a_far_outlier_among_many_weights_is_clipped():
    "The best range ends at a hundredth of the largest magnitude"
    w = torch.cat([torch.randn(300_000, generator=gen(0)), tensor([150.])])[None]
    amax = weight_observers['mse'](w, 1).item()
    assert 1 < amax < 3
    assert weight_observers['minmax'](w, 1).item()==150


@pytest.mark.parametrize('bits', [2,3,4,8])
@pytest.mark.parametrize('data', ['one_sided','negative','heavy','two_values','half','tiny','outlier','huge'])
def test_least_error_beats_minmax(data, bits):
    x = DATA[data].float()
    o = watch('mse', x)
    step = 2*o.r/len(o.counts)
    a,b = affine_err(x, o.range(0, 2**bits-1), bits),affine_err(x, watch('minmax', x).range(), bits)
    assert math.sqrt(a) <= math.sqrt(b)*1.001 + math.sqrt(len(x))*step/2


@settings(max_examples=25, deadline=None, derandomize=True) # a search: how near it comes is a measurement
@given(st.integers(0, 10**6), st.floats(0.3, 3), st.floats(-2, 2), st.integers(2, 8))
def test_each_power_is_best_at_its_own_error(seed, tail, shift, bits):
    g = gen(seed)
    x = torch.randn(3000, generator=g)
    x = x.sign()*x.abs()**tail+shift
    h = watch('mse', x)
    v,n = h.points()
    def err(rng, p):
        lo,hi = (torch.tensor([o], dtype=torch.float64) for o in rng)
        return ob._lp_errors(v, n, lo, hi, 2**bits-1, p).item()
    found = {p: lp_range(v, n, 0, 2**bits-1, p) for p in (1.,2.,4.)}
    for p,r in found.items():
        for other in *found.values(), h.minmax.range(): assert err(r, p) <= err(other, p)*1.06
    lo,hi = with_zero(v.min().item(), v.max().item())
    assert err(mse_range(v, n, lo, hi, 2**bits-1), 2.) <= err(found[2.], 2.)*1.01


@pytest.mark.parametrize('name', ['mse','lp','aciq','gauss','laplace'])
def test_more_bits_cover_more_and_err_less(name, seen, normal):
    x = normal[:100_000]
    o = watch(name, x)
    widths,errs = [],[]
    for bits in range(2, 9):
        lo,hi = o.range(0, 2**bits-1)
        widths.append(hi-lo); errs.append(affine_err(x, (lo, hi), bits))
    assert all(b > a*0.99 for a,b in zip(widths, widths[1:])) and widths[-1]>widths[0]*1.5
    assert all(b < a/2 for a,b in zip(errs, errs[1:]))


def test_higher_powers_clip_less(seen):
    ends = [Lp(p).load_state_(seen.state()).range(-7, 7, True)[1] for p in (1,1.5,2,2.4,3,4,8)]
    assert ends==sorted(ends) and ends[-1]>ends[0]*1.3
    assert Lp(2.).load_state_(seen.state()).range(0, 15)==seen.range(0, 15) and Lp().p==2.4


def test_the_outermost_bins_stand_for_the_ends():
    "After a ReLU6 much of the tensor is the largest value: it must lie on the grid"
    x = torch.cat([torch.full((900,), 5.9), torch.rand(100, generator=gen(0))*5, torch.full((400,), -0.377)])
    o = watch('mse', x)
    v,n = o.points()
    assert (v[0].item(), v[-1].item())==o.minmax.range()==(tensor(-0.377).item(), tensor(5.9).item()) and (v.diff()>0).all()
    assert n[0]==400 and n[-1]==900 and n.sum()==len(x)
    assert watch('mse', x[:900]).range()==(0, tensor(5.9).item())


# percentile

@pytest.mark.parametrize('q', [50, 90, 99, 99.9, 99.99])
def test_percentile_is_that_of_the_magnitudes(q, normal, seen):
    want = normal.abs().sort().values[math.ceil(q/100*len(normal))-1].item()
    lo,hi = Percentile(q).load_state_(seen.state()).range()
    assert hi==pytest.approx(want, abs=2*seen.r/len(seen.counts)) and lo==-hi


def test_percentile_counts_zeros():
    x = torch.cat([torch.zeros(900), torch.linspace(1, 2, 100)])
    step = 2*4/8192
    assert watch(Percentile(95), x).range()[1]==pytest.approx(1.5, abs=0.01+step)
    assert watch(Percentile(100), x).range()==(0, 2)
    assert watch(Percentile(80), x).range()[1]<=1.+step, 'among the zeros'
    assert Percentile().percent==99.99


# entropy

def test_kl_against_a_loop():
    "The textbook procedure on a dense histogram, element by element"
    g = gen(0)
    n = torch.randint(0, 20, (64,), generator=g).double()
    v = (torch.arange(64)+0.5).double()
    lo,hi,steps = 0.,48.,15
    p = [n[i].item() for i in range(64) if v[i]<=hi]
    groups = {}
    for i,c in enumerate(p):
        if c: groups.setdefault(round(v[i].item()/(hi/steps)), []).append(i)
    q = [0.]*len(p)
    for idx in groups.values():
        for i in idx: q[i] = sum(p[j] for j in idx)/len(idx)
    tail = sum(n[i].item() for i in range(64) if v[i]>hi)
    q = [o/sum(q) for o in q]
    last = max(i for i,c in enumerate(p) if c)
    p[last] += tail
    p = [o/sum(p) for o in p]
    want = sum(a*math.log(a/b) for a,b in zip(p, q) if a)
    used = n>0
    assert kl_cost(v[used], n[used], lo, hi, steps)==pytest.approx(want, rel=1e-9)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6), st.floats(0.05, 1), st.sampled_from([3,15,255]))
def test_kl_is_never_negative(seed, part, steps):
    h = watch('kl', torch.randn(2000, generator=gen(seed)))
    v,n = h.points()
    assert kl_cost(v, n, h.lo*part, h.hi*part, steps) >= -1e-12


def test_entropy_clips_the_outlier_and_keeps_the_bulk():
    x = torch.cat([torch.randn(100_000, generator=gen(0)), tensor([30.])])
    for y,low in (x, True), (x.relu(), False):
        lo,hi = watch('kl', y).range(0, 255)
        assert 3 < hi < 12 and (-12 < lo < -3 if low else lo==0)
    uniform = torch.rand(100_000, generator=gen(0))
    assert watch('kl', uniform).range(0, 255)[1] > 0.98, 'nothing of a uniform may go'
    assert watch('kl', x).range(0, 2**16-1)==watch('minmax', x).range(), 'more levels than bins: nothing is clipped'


def test_entropy_keeps_a_bin_for_each_level():
    o = watch('kl', torch.randn(20_000, generator=gen(0)))
    for bits in 4,8,10,12:
        lo,hi = o.range(0, 2**bits-1)
        assert hi-lo >= 2**bits*2*o.r/len(o.counts) or (lo,hi)==o.minmax.range()


# the formula

@pytest.mark.parametrize('dist,bits,known', [('laplace',2,2.83),('laplace',3,3.89),('laplace',4,5.03),('gauss',2,1.71),('gauss',3,2.15),('gauss',4,2.55)])
def test_clips_of_the_paper(dist, bits, known): assert aciq_clip(bits, dist)==pytest.approx(known, abs=0.01)


@pytest.mark.parametrize('bits', [2,3,4,5.5,8,16])
@pytest.mark.parametrize('dist', ['laplace','gauss'])
def test_clip_minimises_the_papers_error(dist, bits):
    "The expected error itself, by numerical integration of what is clipped"
    x = torch.linspace(0, 45, 2_000_001, dtype=torch.float64)
    density = torch.exp(-x)/2 if dist=='laplace' else torch.exp(-x*x/2)/math.sqrt(2*math.pi)
    def err(a): return 2*torch.trapezoid(density*(x-a).clamp(min=0)**2, x).item()+a*a/(3*4**bits)
    a = aciq_clip(bits, dist)
    assert err(a) <= min(err(a*0.99), err(a*1.01))
    assert abs(err(a*1.001)-err(a*0.999)) < 1e-3*err(a)


def test_aciq_knows_the_distribution():
    torch.manual_seed(0)
    spread = 3.
    for d,x in ('gauss',torch.randn(200_000)*spread), ('laplace',LaplaceDist(0., spread).sample((200_000,))):
        for shift in 0.,1.:
            lo,hi = watch('aciq', x+shift).range(0, 15)
            assert (hi-lo)/2==pytest.approx(aciq_clip(4, d)*spread, rel=0.02) and (hi+lo)/2==pytest.approx(shift, abs=0.05)
            assert watch(d, x+shift).range(0, 15)==(lo, hi)
        n = aciq_clip(4, d)*spread
        assert watch('aciq', x).range(-8, 7, True)[0]==pytest.approx(-n*8/7, rel=0.02)
        half = x.relu()
        assert watch('aciq', half).range(0, 15)==(0, pytest.approx(aciq_clip(5, d)*spread, rel=0.02)), 'all levels on one side'
        assert watch('aciq', -half).range(0, 15)==(pytest.approx(-aciq_clip(5, d)*spread, rel=0.02), 0)
        assert watch('aciq', half).range(-7, 7, True)[1]==pytest.approx(aciq_clip(math.log2(15), d)*spread, rel=0.02), 'half of the levels are lost'
    assert watch('gauss', x).range(0, 15)[1] < watch('laplace', x).range(0, 15)[1]


# weights

ROWS = dict(normal=torch.randn(6,300, generator=gen(0)), zeros=torch.zeros(2,5), one=tensor([[2.5],[-3.],[0.]]), constant=torch.full((3,20), -1.5),
            tiny=torch.randn(3,30, generator=gen(1))*1e-30, huge=torch.randn(3,30, generator=gen(2))*1e30, mixed=torch.randn(4,50, generator=gen(3))*tensor([[1e-20],[1.],[0.],[1e20]]),
            subnormal=torch.full((2,3), 1e-42), long=torch.randn(1,70_000, generator=gen(4)))

@pytest.mark.parametrize('name', weight_observers)
@pytest.mark.parametrize('data', ROWS)
def test_rows(name, data):
    w = ROWS[data]
    top = w.abs().amax(1)
    for qmax in 1,7,127:
        a = weight_observers[name](w, qmax)
        assert a.shape==(len(w),) and a.isfinite().all() and (a<=top*(1+1e-6)).all()
        if data!='subnormal': assert (a[top>0]>0).all()
        for i in range(len(w)): assert torch.allclose(a[i:i+1], weight_observers[name](w[i:i+1], qmax), rtol=1e-3), 'rows are independent'
    assert fake_quant(w, weight_qparams(w, 4, name)).isfinite().all()


@pytest.mark.parametrize('name', weight_observers)
def test_rows_permutation_and_scale(name):
    w = ROWS['normal']
    a = weight_observers[name](w, 7)
    assert torch.allclose(weight_observers[name](w[:, torch.randperm(300, generator=gen(0))], 7), a, rtol=1e-3)
    assert torch.allclose(weight_observers[name](-w*4, 7), a*4, rtol=1e-3)
    if name!='minmax': assert (weight_observers[name](ROWS['long'], 1) <= ROWS['long'].abs().max()).all()


@pytest.mark.parametrize('bits', [2,3,4,8])
def test_rows_least_error_beats_the_others(bits):
    w = torch.cat([ROWS['normal'], ROWS['normal']**3])
    def err(name): return ((w-fake_quant(w, weight_qparams(w, bits, name))).double()**2).sum(1)
    for name in weight_observers: assert (err('mse') <= err(name)*1.03).all(), name


@pytest.mark.parametrize('q', [0.1, 25, 50, 99, 99.99, 100])
def test_rows_percentile(q):
    for w in ROWS['normal'], ROWS['one'], ROWS['constant']:
        assert torch.allclose(ob.percentile_amax(w, 7, q), w.abs().double().quantile(q/100, dim=1).float(), rtol=1e-5)


def test_rows_formula_picks_per_row():
    torch.manual_seed(0)
    w = torch.stack([torch.randn(50_000), LaplaceDist(0., 1.).sample((50_000,))])
    got = weight_observers['aciq'](w, 7)
    assert torch.allclose(got, tensor([aciq_clip(4, 'gauss'), aciq_clip(4, 'laplace')]), rtol=0.02)
    assert got[0]==weight_observers['gauss'](w, 7)[0] and got[1]==weight_observers['laplace'](w, 7)[1]
