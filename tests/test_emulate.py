"qnnpack's kernels in plain arithmetic against qnnpack: random shapes and scales, extremes, whole nets as saved files; no element may differ"
import math
import pytest, torch
from hypothesis import HealthCheck, given, settings, strategies as st
from torch import fx, nn
from torch.jit.mobile import _load_for_lite_interpreter
import torch.nn.functional as F
from fastcompress.deploy import emulate as E
from fastcompress.deploy.capture import capture
from fastcompress.deploy.emulate import Ints, compare_bits, emulate, emulations
from fastcompress.deploy.engines import QConv1d, QConv2d, QConvTranspose2d, QLinear, use_engine
from fastcompress.deploy.lower import IntegerModel, lower
from fastcompress.deploy.ptl import save_ptl, scriptable_
from fastcompress.quantize.simulate import calibrate_, simulate_
from helpers import timm_model

pytestmark = [pytest.mark.filterwarnings('ignore:.*quantized tensor creation.*', 'ignore:.*deprecated.*'), pytest.mark.usefixtures('one_thread')]
Q = torch.ops.quantized
last = torch.channels_last


class Draw:
    "Random sizes, scales and bytes from one seed"
    def __init__(self, seed): self.g = torch.Generator().manual_seed(seed)
    def int(self, lo, hi): return int(torch.randint(lo, hi+1, (1,), generator=self.g))
    def real(self, lo, hi): return float(torch.rand((), generator=self.g, dtype=torch.float64)*(hi-lo)+lo)
    def of(self, *o): return o[self.int(0, len(o)-1)]
    def scale(self, lo=-8, hi=3): return math.exp(self.real(lo, hi))
    def zero(self): return self.of(0, 255, self.int(0, 255))
    def bytes(self, *shape, form=True):
        x = torch.randint(0, 256, shape, generator=self.g, dtype=torch.uint8)
        return x.contiguous(memory_format=last) if form and x.ndim==4 and self.int(0, 1) else x
    def normal(self, *shape): return torch.randn(shape, generator=self.g)

def many(n): return lambda f: settings(max_examples=n, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])(given(st.integers(0, 2**31).map(Draw))(f))

def quantized(x:Ints):
    "The quantized tensor that `x` stands for, laid out in memory as `x` is"
    return torch._make_per_tensor_quantized_tensor(x.ints, x.scale, x.zero_point)

def same(y, e, form=True):
    "Engine's tensor and arithmetic's, to the bit; grids and layouts too"
    assert (y.q_scale(),y.q_zero_point())==(e.scale,e.zero_point)
    assert y.shape==e.ints.shape and int((y.int_repr()!=e.ints).sum())==0
    assert not form or E.layout(y)==E.layout(e.ints)

def check(name, *args, form=True, **kw):
    "Call an operation on the engine and by the arithmetic"
    space,op = name.split('::')
    real = fx.node.map_aggregate(args, lambda a: quantized(a) if isinstance(a, Ints) else a)
    with use_engine('qnnpack'): y = getattr(getattr(torch.ops, space), op)(*real, **kw)
    same(y, emulations[name](*args, **kw), form)

def pair(d): return d.bytes(d.int(1, 3), d.int(1, 40), d.int(1, 9), d.int(1, 9))


# contractions

def layer(d, cls, w, n_out, x, geometry, per_channel, gain=None):
    "A packed layer whose output fills its grid, or bursts it, or is a few steps wide"
    x = Ints(x, d.scale(), d.zero())
    w_scale = torch.exp(d.normal(w.shape[cls.axis] if per_channel else 1)*d.of(0, 2)-5)
    wide = float(w_scale.mean()*x.scale*100*math.sqrt(w[0].numel()))
    bias = d.normal(n_out)*wide*d.of(0, .1, 10, 1e4, 1e9)
    m = cls(w, w_scale, bias, wide/(gain or d.of(1., 20., 100.)), d.zero(), 'qnnpack', geometry)
    with use_engine('qnnpack'): y = m(quantized(x))
    same(y, emulations[cls.__name__](m, x))

def conv(d, dims, cls):
    kind = d.of('depthwise', 'pointwise', 'grouped', 'any')
    groups = d.int(2, 20) if kind=='depthwise' else d.int(2, 3) if kind=='grouped' else 1
    ci,co = (groups,groups) if kind=='depthwise' else (groups*d.int(1, 12),groups*d.int(1, 12))
    k = [1]*dims if kind=='pointwise' else [d.of(3, 5)]*dims if kind=='depthwise' and dims==2 else [d.int(1, 4) for _ in range(dims)]
    s,p,l = ([d.int(*r) for _ in range(dims)] for r in ((1,3), (0,2), (1,2)))
    size = [max(1, b*(a-1)+1-2*c)+d.int(0, 6) for a,b,c in zip(k, l, p)]
    x,w = d.bytes(d.int(1, 3), ci, *size),torch.randint(-128, 128, (co, ci//groups, *k), generator=d.g, dtype=torch.int8)
    if d.int(0, 9)==0: x.fill_(255); w.fill_(-128)
    layer(d, cls, w, co, x, (s, p, l, groups), d.int(0, 1))

@many(250)
def test_conv2d(d): conv(d, 2, QConv2d)

@many(60)
def test_conv1d(d): conv(d, 1, QConv1d)

@many(80)
def test_conv_transpose2d(d):
    groups = d.of(1, 1, 2, 3)
    ci,co,k = groups*d.int(1, 8),groups*d.int(2, 8),[d.int(1, 4), d.int(1, 4)]
    s,l = [d.int(1, 3), d.int(1, 3)],[d.int(1, 2), d.int(1, 2)]
    p,o = [d.int(0, min(2, b*(a-1))) for a,b in zip(k, l)],[d.int(0, a-1) for a in s]
    size = [max(1, -(-(2*b-c*(a-1)-e)//f)+1)+d.int(1, 5) for a,b,c,e,f in zip(k, p, l, o, s)]
    w = torch.randint(-128, 128, (ci, co//groups, *k), generator=d.g, dtype=torch.int8)
    layer(d, QConvTranspose2d, w, co, d.bytes(d.int(1, 3), ci, *size), (s, p, o, l, groups), groups==1 and d.int(0, 1))

@many(150)
def test_linear(d):
    ci,co = d.int(1, 300),d.int(1, 40)
    w = torch.randint(-128, 128, (co, ci), generator=d.g, dtype=torch.int8)
    layer(d, QLinear, w, co, d.bytes(*d.of((3,), (1,), (2,5)), ci), (), d.int(0, 1))

@many(60)
def test_factors_that_burst_int32_and_tiny_ones(d):
    ci,co = d.int(1, 30),d.int(1, 20)
    w = torch.randint(-128, 128, (co, ci), generator=d.g, dtype=torch.int8)
    layer(d, QLinear, w, co, d.bytes(3, ci), (), True, gain=d.of(1e-6, 1e-3, 1e5, 1e8, 1e9, 1e10))

def test_the_accumulator_wraps():
    "66,000 products of 255 and -128 leave int32"
    x,w = Ints(torch.full((1,66500), 255, dtype=torch.uint8), .1, 0),torch.full((40,66500), -128, dtype=torch.int8)
    m = QLinear(w, torch.full((40,), .1), torch.zeros(40), 1e5, 0, 'qnnpack')
    with use_engine('qnnpack'): y = m(quantized(x)).int_repr()
    assert E.linear_int(x.ints, 0, w, torch.zeros(40, dtype=torch.int32)).unique().item()==255*-128*66500+2**32 and torch.equal(y, emulations['QLinear'](m, x).ints)
    assert (y>0).all(), 'the sum of negative products'

def test_biases_that_do_not_fit_are_clamped_and_then_wrap():
    x = Ints(torch.zeros(1, 1, dtype=torch.uint8), .1, 0)
    for b in 1e9, -1e9, 2**31*.001, 2**31*.001*.999:
        m = QLinear(torch.zeros(1, 1, dtype=torch.int8), torch.tensor([.01]), torch.tensor([float(b)]), 1e5, 100, 'qnnpack')
        with use_engine('qnnpack'): y = m(quantized(x)).int_repr()
        assert torch.equal(y, emulations['QLinear'](m, x).ints)
    assert E.bias_int(torch.tensor([1e9, -1e9]), .1, torch.tensor([.01]*2)).tolist()==[2**31-1, -2**31]
    ones = Ints(torch.ones(1, 40, dtype=torch.uint8), .1, 0)
    for sign in 1, -1:
        m = QLinear(torch.full((20,40), sign, dtype=torch.int8), torch.full((20,), .01), torch.full((20,), sign*1e9), 1e5, 100, 'qnnpack')
        with use_engine('qnnpack'): y = m(quantized(ones)).int_repr()
        assert torch.equal(y, emulations['QLinear'](m, ones).ints) and ((y.int()-100)*sign<0).all(), 'wrapped'

@many(60)
def test_biases_at_the_ends_of_int32(d):
    "Where the sum of products is zero the end itself is seen: a convolution's packing turns the upper one into the lower"
    kind,n = d.of('linear', 'matrix', 'stride', 'padding', 'wide', 'depthwise', 'transposed', '1d'),d.int(1, 20)
    b = torch.tensor([d.of(1e9, -1e9, 2.**31, 2.**31*.9999, 3e9) for _ in range(n)])
    k,dims = d.of(2, 3, 5) if kind in ('wide','depthwise') else 1,dict(linear=0).get(kind, {'1d':1}.get(kind, 2))
    cls = {0:QLinear, 1:QConv1d, 2:QConv2d}[dims] if kind!='transposed' else QConvTranspose2d
    w = torch.randint(-1, 2, (n, 1 if kind=='depthwise' else n, *[k]*dims), generator=d.g, dtype=torch.int8)
    each = lambda v: [v]*dims
    geometry = (each(2 if kind=='stride' else 1), each(int(kind=='padding')), *([each(0)] if kind=='transposed' else []), each(1), n if kind=='depthwise' else 1) if dims else ()
    x = Ints(torch.full((2, n, *each(k+2)), 5, dtype=torch.uint8), 1., d.of(5, 5, 4))
    m = cls(w, torch.ones(n), b, 1e8, 128, 'qnnpack', geometry)
    with use_engine('qnnpack'): y = m(quantized(x))
    same(y, emulations[cls.__name__](m, x))

def test_ties_everywhere():
    "Powers of two as scales: half of all products lie on a tie"
    x,w = torch.arange(256, dtype=torch.uint8)[:,None],torch.arange(-128, 128, dtype=torch.int8)[:,None]
    for z in 0, 7, 255:
        m = QLinear(w, torch.full((256,), 2.**-5), torch.full((256,), .25), 2.**-3, 128, 'qnnpack')
        i = Ints(x, .25, z)
        with use_engine('qnnpack'): y = m(quantized(i)).int_repr()
        assert torch.equal(y, emulations['QLinear'](m, i).ints)
        steps = ((x.double()-z)@w.double().T*2.**-7 + .25)/2.**-3
        assert ((steps%1)==.5).float().mean()>.05

def test_scales_of_grouped_transposed_convolutions_are_refused():
    m = QConvTranspose2d(torch.ones(4, 2, 1, 1, dtype=torch.int8), torch.ones(2), None, 1., 0, 'qnnpack', ([1,1], [0,0], [0,0], [1,1], 2))
    with pytest.raises(NotImplementedError, match='one scale for all'): emulations['QConvTranspose2d'](m, Ints(torch.zeros(1, 4, 2, 2, dtype=torch.uint8), 1., 0))


# what combines and what goes byte by byte

A = torch.arange(256, dtype=torch.uint8).repeat(256)
B = torch.arange(256, dtype=torch.uint8).repeat_interleave(256)

@many(150)
def test_add_all_pairs(d):
    "All 65,536 pairs, ratios from 2^-14 up to 2^8"
    s = d.scale()
    hi = d.of(8, 8, 1, -9)
    a,b = (s*2**d.real(-13.99, hi)*.9999 for _ in range(2))
    n = d.of(65536, d.int(1, 65536), 4096*d.int(0, 3)+d.int(1, 7))
    check('quantized::add', Ints(A[:n], a, d.zero()), Ints(B[-n:], b, d.zero()), s, d.zero())

@many(60)
def test_add_on_layouts(d):
    a = pair(d)
    b = d.bytes(*a.shape)
    check('quantized::add', Ints(a, d.scale(-1, 1), d.zero()), Ints(b, d.scale(-1, 1), d.zero()), d.scale(-1, 1), d.zero())

@pytest.mark.parametrize('ratios', [(2.**-14, 2.**-14), (2.**-14, 255.99), (2.**-10, 2.**-10), (2.**-10*.999, 2.**-11), (1., 1.), (.5, .5), (1., 2.**-14)])
def test_add_at_the_ends_of_its_range(ratios):
    for n in 65536, 4099, 3:
        for z in (0,0,0), (255,0,128), (0,255,255), (128,128,128): check('quantized::add', Ints(A[-n:], ratios[0], z[0]), Ints(B[-n:], ratios[1], z[1]), 1., z[2])

def test_add_beyond_its_range():
    for r in 2.**-14*.999, 256.:
        with pytest.raises(ValueError, match='2\\^-14 to 2\\^8'): emulations['quantized::add'](Ints(A, r, 0), Ints(B, 1., 0), 1., 0)
        with use_engine('qnnpack'), pytest.raises(RuntimeError): Q.add(quantized(Ints(A, r, 0)), quantized(Ints(B, 1., 0)), 1., 0)

@many(60)
def test_add_that_broadcasts(d):
    a = pair(d)
    x,y = Ints(a, d.scale(-1, 1), d.zero()),Ints(a[:,:,:1,:1].contiguous(), d.scale(-1, 1), d.zero())
    try: check('quantized::add', x, y, d.scale(-1, 1), d.zero())
    except NotImplementedError as e: assert 'lie on ties' in str(e)

@many(80)
def test_mul_all_pairs(d):
    a,b = d.scale(),d.scale()
    check('quantized::mul', Ints(A, a, d.zero()), Ints(B, b, d.zero()), a*b*2**d.real(0, 16), d.zero())

@many(60)
def test_mul_on_layouts(d):
    a = pair(d)
    b = d.of(d.bytes(*a.shape), a[:,:,:1,:1], a[:1,:,:1,:1].contiguous())
    check('quantized::mul', Ints(a, .1, d.zero()), Ints(b, .2, d.zero()), d.scale(-3, 1), d.zero(), form=False)

@many(150)
def test_cat(d):
    dim,shape,form = d.of(1, 1, 0, 2, 3),[d.int(1, 4), d.int(1, 70), d.int(1, 6), d.int(1, 6)],d.int(0, 1)
    s,z,xs = d.scale(-5, -3),d.zero(),[]
    for _ in range(d.int(1, 3)):
        x = d.bytes(*[d.int(1, 70 if dim==1 else 6) if i==dim else n for i,n in enumerate(shape)], form=False)
        grid = d.of((s,z), (d.scale(-5, -3),d.zero()), (s*d.of(.5, 1., 2.),d.zero()))
        xs.append(Ints(x.contiguous(memory_format=last) if form else x, *grid))
    check('quantized::cat', xs, dim, s, z)
    check('aten::cat', [Ints(x.ints, s, z) for x in xs], dim)

@many(100)
def test_batch_norm(d):
    x = Ints(d.bytes(d.int(1, 2), d.int(1, 60), d.int(1, 20), d.int(1, 20)), d.scale(-6, -2), d.zero())
    w,b,m,v = d.normal(4, x.ints.shape[1])
    check('quantized::batch_norm2d', x, w, b, m*.3, v.abs()+.01, 1e-5, d.scale(-6, -2), d.zero())

@many(150)
def test_layer_norm_and_softmax(d):
    n,lo = d.int(1, 300),d.int(0, 200)
    x = Ints(torch.randint(lo, d.int(lo, 255)+1, (d.int(1, 40), n), generator=d.g, dtype=torch.uint8), d.of(d.scale(-8, 0), 2.**-d.int(2, 8)), d.zero())
    w,b = d.of(d.normal(2, n), torch.round(d.normal(2, n)*4)/4)
    check('quantized::layer_norm', x, [n], *d.of((w,b), (None,None)), d.of(1e-5, 1e-6), *d.of((d.scale(-6, -2),d.zero()), (2.**-d.int(4, 14),128)))
    check('quantized::softmax', x, 1, *d.of((1/256,0), (d.scale(-8, -3),d.zero())))
    image = Ints(pair(d), d.scale(-5, -1), d.zero())
    check('quantized::softmax', image, d.int(0, 3), *d.of((1/256,0), (d.scale(-8, -3),d.zero())), form=False)
    check('quantized::layer_norm', image, list(image.ints.shape[-2:]), None, None, 1e-5, .03, 128)

@many(300)
def test_functions_of_one_byte(d):
    x,s,z = Ints(A[:256], d.scale(-9, 1), d.zero()),d.scale(-9, 1),d.zero()
    for op in 'sigmoid','hardsigmoid','tanh','relu': check(f'aten::{op}', x)
    check('quantized::hardswish', x, s, z)
    check('quantized::leaky_relu', x, d.real(.001, 1), False, x.scale*2**d.real(-7, 7), z)
    lo = d.real(-128, 100)*x.scale
    hi = lo+d.real(8, 200)*x.scale
    if int(E.quantize_int(torch.tensor(lo), x.scale, x.zero_point))<int(E.quantize_int(torch.tensor(hi), x.scale, x.zero_point)):
        check('aten::clamp', x, lo, hi)
        check('aten::hardtanh', x, lo, hi)

def test_sigmoid_of_every_tie_of_a_fine_grid():
    for k in range(1, 400): check('aten::sigmoid', Ints(A[:256], k*2.**-9, 128))

@many(80)
def test_byte_by_byte_on_layouts(d):
    x = Ints(pair(d), .05, 100)
    for op in 'sigmoid','hardsigmoid','tanh','relu': check(f'aten::{op}', x)
    check('quantized::hardswish', x, .03, 12)
    check('aten::clamp', x, -1., 2.) # scrambled on channels_last, here too


# windows

def window(d, shape):
    k = [min(d.int(1, 4), n) for n in shape[2:]]
    return k, [d.int(1, 3), d.int(1, 3)], [d.int(0, a//2) for a in k]

@many(150)
def test_averages(d):
    x = Ints(d.bytes(d.int(1, 3), d.int(1, 40), d.int(2, 12), d.int(2, 12)), d.scale(-9, 4), d.zero())
    k,s,p = window(d, x.ints.shape)
    if k!=[1,1]: check('aten::avg_pool2d', x, k, s, p)
    check('aten::avg_pool2d', x, k, s, p, True, bool(d.int(0, 1)))
    check('aten::adaptive_avg_pool2d', x, [1,1])
    check('aten::adaptive_avg_pool2d', x, [d.int(1, 5), d.int(1, 5)])
    check('aten::mean', x, [2,3], bool(d.int(0, 1)))
    check('aten::mean', x, [-2,-1], bool(d.int(0, 1)))
    check('aten::mean', x, [1], bool(d.int(0, 1)), form=False)

@many(120)
def test_maxima_padding_and_nearest(d):
    x = Ints(d.bytes(d.int(1, 3), d.int(1, 20), d.int(4, 12), d.int(4, 12)), d.scale(), d.zero())
    k,s,p = window(d, x.ints.shape)
    if k!=[1,1]: check('aten::max_pool2d', x, k, s, p)
    check('aten::max_pool2d', x, k, s, p, [1,1], True)
    check('aten::max_pool2d', x, [2,2], s, [1,1], [2,2])
    check('aten::constant_pad_nd', x, [d.int(0, 3) for _ in range(4)], d.of(0., (d.int(0, 255)-x.zero_point)*x.scale))
    check('aten::pad', x, [d.int(0, 3) for _ in range(4)], 'reflect', form=False)
    check('aten::pad', x, [d.int(0, 3) for _ in range(4)])

@many(150)
def test_in_and_out(d):
    s,z,n = d.scale(-12, 5),d.zero(),d.int(1, 300)
    x = torch.cat([d.normal(n)*s*100, (torch.arange(600)-300)*.5*s, torch.tensor([-math.inf, -3e38, .999*s*2**31])])
    q = torch.quantize_per_tensor(x, s, z, torch.quint8)
    assert torch.equal(q.int_repr(), E.quantize_int(x, s, z)) and torch.equal(q.dequantize(), E.dequantize_int(q.int_repr(), s, z))


# whole nets, as files

def integer(model, x):
    simulate_(model, x)
    calibrate_(model, [x], show=False)
    return lower(capture(model, x), 'qnnpack')[0]

def as_file(im, x, path):
    "What the file gives in torch's mobile interpreter"
    save_ptl(scriptable_(im.body), path, (x,))
    with use_engine('qnnpack'), torch.no_grad(): return _load_for_lite_interpreter(str(path))(x)

def everywhere(im, x, path):
    rows = compare_bits(im, x)
    assert not [r for r in rows if r.differ or not r.layout]
    with torch.no_grad(): assert torch.equal(emulate(im, x[:1]), im(x[:1]))
    y = emulate(im, x)
    assert torch.equal(as_file(im, x, path), y)
    return rows

NETS = 'resnet18 resnet26 mobilenetv2_100 regnetx_002 mobilenetv3_small_100'.split()
MORE = 'resnet26 resnet26d vgg11_bn efficientnet_lite0 efficientnet_b0 densenet121 ghostnet_100 mobilenetv2_100'.split()

@pytest.mark.parametrize('arch', NETS)
def test_nets_to_the_bit(arch, tmp_path):
    "Every node, the outputs for batches of one and more, and the saved file in torch's mobile interpreter"
    model,x = timm_model(arch, 32, batch=2)
    rows = everywhere(integer(model, x), x, tmp_path/'m.ptl')
    assert sum(r.op.startswith('QConv') for r in rows)>=16

@pytest.mark.slow
@pytest.mark.parametrize('arch', MORE)
def test_more_nets_to_the_bit(arch, tmp_path):
    model,x = timm_model(arch, 64, batch=4)
    everywhere(integer(model, x), x, tmp_path/'m.ptl')

class Small(nn.Module):
    "Several heads, a residual, a gate, a concatenation, a float island"
    def __init__(self):
        super().__init__()
        self.a,self.b,self.gate,self.head = nn.Conv2d(3,12,3,padding=1),nn.Conv2d(12,12,3,padding=1,groups=12),nn.Conv2d(12,12,1),nn.Linear(24*8*8,5)
        self.norm = nn.BatchNorm2d(24)
    def forward(self, x):
        x = F.max_pool2d(F.relu6(self.a(x)), 2)
        y = x + F.hardswish(self.b(x))
        y = y*F.hardsigmoid(self.gate(y.mean((2,3), keepdim=True)))
        z = self.norm(torch.cat([x, F.leaky_relu(y)], 1))
        return self.head(F.pad(torch.sin(z)[...,:6], (1,1)).flatten(1)), F.interpolate(z, scale_factor=2)

def test_small_net_with_islands(tmp_path):
    torch.manual_seed(0)
    x = torch.randn(4,3,16,16)
    im = integer(Small().eval(), x)
    assert 'sin' in {i.op for i in im.islands}
    rows = compare_bits(im, x)
    assert not [r for r in rows if r.differ or not r.layout] and {'aten::sin','quantized::add','QLinear'} <= {r.op for r in rows}
    for y,e,f in zip(im(x), emulate(im, x), as_file(im, x, tmp_path/'m.ptl')): assert torch.equal(y, e) and torch.equal(y, f)

@pytest.fixture(scope='module')
def small():
    torch.manual_seed(0)
    x = torch.randn(4,3,16,16)
    net = nn.Sequential(nn.Conv2d(3,8,3), nn.ReLU(), nn.Conv2d(8,8,3,groups=8), nn.Flatten(), nn.Linear(8*12*12,5)).eval()
    return integer(net, x), x

def test_channels_last_input(small):
    im,x = small[0],small[1].contiguous(memory_format=last)
    assert torch.equal(emulate(im, x), im(x)) and not [r for r in compare_bits(im, x) if r.differ or not r.layout]


# it can fail, and says why it can't go on

def test_one_weight_off_is_found(small):
    im,x = small
    conv = im.body.get_submodule('2')
    ints,s,b = conv.integers()
    seen = {}
    E._Emulator(im.body, seen).run(x)
    other = ints.clone()
    other[3,0,1,1] += 1 if ints[3,0,1,1]<100 else -1
    conv._pack(other, s, b)
    run = E._Engine(im.body, seen)
    with use_engine('qnnpack'), torch.no_grad(): run.run(x)
    conv._pack(ints, s, b)
    assert [r.layer for r in run.rows if r.differ][0]=='2' and not [r for r in compare_bits(im, x) if r.differ]

@pytest.mark.parametrize('wrong', ['bias cut off', 'factor in float64', 'zero point of the output'])
def test_wrong_arithmetic_is_found(small, monkeypatch, wrong):
    im,x = small
    right = E.requantize_int
    if wrong=='bias cut off': monkeypatch.setattr(E, 'bias_int', lambda b, xs, ws, by_float=False: (b/(ws*xs)).int())
    elif wrong=='factor in float64': monkeypatch.setattr(E, 'multipliers', lambda xs, ws, s: (ws.double()*xs/s*(1+2**-12)).float())
    else: monkeypatch.setattr(E, 'requantize_int', lambda acc, m, z, *a: right(acc, m, (z+1)%256, *a))
    assert [r for r in compare_bits(im, x) if r.differ]

class Call(nn.Module):
    def __init__(self, f): super().__init__(); self.f = f
    def forward(self, x): return self.f(torch.ops.aten.quantize_per_tensor(x, .1, 0, torch.quint8))

def test_the_unknown_is_named(small):
    made = lambda f: IntegerModel(fx.symbolic_trace(Call(f)), 'qnnpack', [], {})
    with pytest.raises(NotImplementedError, match='no emulation of quantized::celu on bytes.*@emulations'): emulate(made(lambda q: Q.celu(q, .1, 3, 1.)), torch.randn(4))
    m = made(lambda q: q)
    m.body.graph.find_nodes(op='call_function', target=torch.ops.aten.quantize_per_tensor)[0].target = torch.quantize_per_tensor
    m.body.recompile()
    with pytest.raises(NotImplementedError, match="torch's own kernel"): emulate(m, torch.randn(4))
    with pytest.raises(ValueError, match='lowered to x86'): emulate(IntegerModel(small[0].body, 'x86', [], {}), small[1])

def test_adding_an_operation():
    m = IntegerModel(fx.symbolic_trace(Call(lambda q: torch.ops.aten.dequantize(Q.celu(q, .1, 3, 1.)))), 'qnnpack', [], {})
    x = torch.randn(100).abs()
    emulations['quantized::celu'] = lambda x, s, z, alpha: Ints((x.ints.int()+z).clamp(0, 255).to(torch.uint8), s, z)
    try: assert torch.equal(emulate(m, x), m(x))
    finally: del emulations['quantized::celu']
