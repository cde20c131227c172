"Integer arithmetic written from scratch against torch's kernels: at most one step apart, over a zoo of operations"
import warnings
import pytest, torch, torch.nn.functional as F
from hypothesis import given, settings, strategies as st
from fastcompress.deploy.engines import QConv2d, QLinear, use_engine
from fastcompress.quantize.affine import affine_qparams, dequantize, quantize, quantize_bias, quantize_multiplier, requantize, requantize_fixed, symmetric_qparams

pytestmark = pytest.mark.usefixtures('one_thread')

# name, input shape, weight shape, arguments of the convolution
CONVS = [('3x3', (2,8,9,9), (16,8,3,3), {}), ('1x1', (2,8,7,7), (12,8,1,1), {}), ('stem', (1,3,17,17), (8,3,7,7), dict(stride=2, padding=3)), ('strided', (2,8,9,9), (8,8,3,3), dict(stride=2, padding=1)),
         ('depthwise', (2,16,9,9), (16,1,3,3), dict(groups=16, padding=1)), ('depthwise 5x5', (1,13,9,9), (13,1,5,5), dict(groups=13, padding=2, stride=2)), ('multiplier', (1,8,9,9), (16,1,3,3), dict(groups=8, padding=1)),
         ('grouped', (2,16,8,8), (24,4,3,3), dict(groups=4, padding=1)), ('dilated', (1,8,11,11), (8,8,3,3), dict(dilation=2, padding=2)), ('1x7', (1,8,9,9), (8,8,1,7), dict(padding=(0,3))), ('one channel', (1,1,5,5), (1,1,3,3), {})]

def grids(x, w, per_channel):
    qx = affine_qparams(x.min(), x.max())
    qw = symmetric_qparams(w.flatten(1).abs().amax(1), axis=0) if per_channel else symmetric_qparams(w.abs().max())
    return qx,qw

def by_hand(x, w, b, qx, qw, qy, op, fixed=False):
    "Integers in, integers out: products summed exactly, bias at s_x*s_w, one multiplication back to bytes"
    acc = op((quantize(x, qx).double()-qx.zero_point), quantize(w, qw).double())
    c = [1,-1,*[1]*(acc.ndim-2)]
    if b is not None: acc = acc+quantize_bias(b, qx.scale, qw.scale).double().view(c)
    assert acc.abs().max()<2**31
    m = (qx.scale.double()*qw.scale.double()/qy.scale.double()).expand(w.shape[0]).view(c)
    if fixed:
        out = torch.stack([requantize_fixed(a.int(), *quantize_multiplier(float(k)), qy) for a,k in zip(acc.unbind(1), m.flatten())], 1)
        return out
    return requantize(acc.int(), m.float(), qy)

def kernel(cls, x, w, b, qx, qw, qy, *geometry):
    with use_engine('qnnpack'), warnings.catch_warnings():
        warnings.simplefilter('ignore')
        layer = cls(quantize(w, qw), qw.scale.expand(w.shape[0]).clone(), b, float(qy.scale), int(qy.zero_point), 'qnnpack', *geometry)
        return layer(torch.quantize_per_tensor(x, float(qx.scale), int(qx.zero_point), torch.quint8)).int_repr()

def pair(v): return [v, v] if isinstance(v, int) else list(v)

@pytest.mark.parametrize('per_channel', [True, False])
@pytest.mark.parametrize('name,xs,ws,kw', CONVS, ids=[c[0] for c in CONVS])
def test_convolution(name, xs, ws, kw, per_channel):
    g = torch.Generator().manual_seed(0)
    x,w,b = torch.randn(xs, generator=g)+.5,torch.randn(ws, generator=g)*torch.logspace(0, -2, ws[0]).view(-1,1,1,1),torch.randn(ws[0], generator=g)
    op = lambda x,w: F.conv2d(x, w, None, **kw)
    y = op(x, w)+b.view(1,-1,1,1)
    qx,qw = grids(x, w, per_channel)
    qy = affine_qparams(y.min()*.8, y.max()*.8) # something saturates
    want = by_hand(x, w, b, qx, qw, qy, op)
    assert ws[0]==1 or (want==0).any() and (want==255).any()
    got = kernel(QConv2d, x, w, b, qx, qw, qy, (pair(kw.get('stride', 1)), pair(kw.get('padding', 0)), pair(kw.get('dilation', 1)), kw.get('groups', 1)))
    d = (got.int()-want.int()).abs()
    assert d.max()<=1 and (d>0).float().mean()<.01
    assert (by_hand(x, w, b, qx, qw, qy, op, fixed=True).int()-want.int()).abs().max()<=1
    y_hat = dequantize(want, qy)
    inside = (y>=dequantize(torch.tensor(0), qy)) & (y<=dequantize(torch.tensor(255), qy))
    assert ((y_hat-y)[inside]).square().mean()<.01*y.square().mean()

@pytest.mark.parametrize('per_channel', [True, False])
@pytest.mark.parametrize('rows,k,n', [(4,64,10), (1,7,1), (3,513,17)])
def test_linear(rows, k, n, per_channel):
    g = torch.Generator().manual_seed(1)
    x,w,b = torch.randn(rows, k, generator=g),torch.randn(n, k, generator=g),torch.randn(n, generator=g)
    y = F.linear(x, w, b)
    qx,qw = grids(x, w, per_channel)
    qy = affine_qparams(y.min(), y.max())
    want,got = by_hand(x, w, b, qx, qw, qy, F.linear),kernel(QLinear, x, w, b, qx, qw, qy)
    assert (got.int()-want.int()).abs().max()<=1

def bytes_of(x, qp): return torch.quantize_per_tensor(x, float(qp.scale), int(qp.zero_point), torch.quint8)

@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10**6), st.floats(-3, 3), st.floats(-2, 2))
def test_add(seed, a, b):
    g = torch.Generator().manual_seed(seed)
    x,y = torch.randn(2,3,5, generator=g)*10**a,torch.randn(2,3,5, generator=g)*10**(a+b)
    qx,qy = affine_qparams(x.min(), x.max()),affine_qparams(y.min(), y.max())
    s = dequantize(quantize(x, qx), qx).double()+dequantize(quantize(y, qy), qy).double()
    qs = affine_qparams(s.min(), s.max())
    want = (torch.round(s/qs.scale.double())+qs.zero_point).clamp(0, 255)
    with use_engine('qnnpack'), warnings.catch_warnings():
        warnings.simplefilter('ignore')
        got = torch.ops.quantized.add(bytes_of(x, qx), bytes_of(y, qy), float(qs.scale), int(qs.zero_point)).int_repr()
    assert (got.double()-want).abs().max()<=1

OPS = dict(max_pool=lambda x: F.max_pool2d(x, 3, 2, 1), global_mean=lambda x: x.mean((2,3)), adaptive=lambda x: F.adaptive_avg_pool2d(x, 1), adaptive_3=lambda x: F.adaptive_avg_pool2d(x, 3), avg_pool=lambda x: F.avg_pool2d(x, 2),
           relu=F.relu, flatten=lambda x: x.flatten(1), permute=lambda x: x.permute(0,2,3,1), transpose=lambda x: x.transpose(1,2))

@pytest.mark.parametrize('name', OPS)
def test_on_the_grid_of_its_input(name):
    "The operation on the reals that the bytes stand for, rounded to the same grid"
    x = torch.randn(2, 6, 8, 8, generator=torch.Generator().manual_seed(2))+.3
    qx = affine_qparams(x.min(), x.max())
    with use_engine('qnnpack'), warnings.catch_warnings():
        warnings.simplefilter('ignore')
        got = OPS[name](bytes_of(x, qx)).int_repr()
    want = quantize(OPS[name](dequantize(quantize(x, qx), qx)), qx)
    d = (got.int()-want.int()).abs()
    assert d.max()<=(1 if 'a' in name and name not in ('flatten','max_pool','transpose') else 0)
