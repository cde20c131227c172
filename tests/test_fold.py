"Folding: every pattern against its unfolded output in float64, the traps that must be declined, and a cross-section of timm"
import copy
import pytest, timm, torch
import torch.nn.functional as F
from hypothesis import given, settings, strategies as st
from torch import nn, tensor
from fastcompress.deploy import fold as fold_module
from fastcompress.deploy.capture import capture, get_tensor, op_of
from fastcompress.deploy.fold import (Normalised, affine_of, bn_to_affine_, fold_, fold_affine_, fold_bn_, fold_constants_, fold_input_norm, folded, reparameterise_)
from fastcompress.measure.count import n_subnormal
from fastcompress.measure.quality import sqnr
from fastcompress.quantize.simulate import calibrate_, simulate_
from helpers import timm_model

BNs = nn.modules.batchnorm._BatchNorm

def randomised(net):
    "BatchNorms with gains of both signs and zero, and statistics that are not their defaults"
    g = torch.Generator().manual_seed(0)
    for m in net.modules():
        if not isinstance(m, BNs): continue
        if m.affine:
            m.weight.data.uniform_(-1.5, 1.5, generator=g); m.weight.data[0] = 0
            m.bias.data.uniform_(-1, 1, generator=g)
        if m.running_mean is not None:
            m.running_mean.uniform_(-1, 1, generator=g); m.running_var.uniform_(.2, 2, generator=g)
    return net.eval()

class Fn(nn.Module):
    "Layers, and a function of them and the input"
    def __init__(self, f, **layers):
        super().__init__(); self.f = f
        for k,v in layers.items(): setattr(self, k, nn.Parameter(v) if isinstance(v, torch.Tensor) else v)
    def forward(self, x): return self.f(self, x)

def seq(*layers): return nn.Sequential(*layers)
def ops(g): return [op_of(n) for n in g.graph.nodes if n.op=='call_function']
def run(m, *x):
    with torch.no_grad(): return m(*x)

def exact(net, shape, bn=0, bn_affine=0, affine=0, other_shape=True):
    "`net` folds in so many places and its output stays, in float64, for another batch too"
    torch.manual_seed(1)
    net,x = randomised(net).double(),torch.randn(shape, dtype=torch.float64)
    for p in net.parameters():
        if not p.any(): p.data.uniform_(-1, 1)
    g = capture(net, x)
    r = fold_(g, x, db=200)
    assert (r.bn, r.bn_affine, r.affine)==(bn, bn_affine, affine), r
    for n in [len(x)] + ([5] if other_shape and g.meta['fixed_batch'] is None else []):
        y = torch.randn(n, *shape[1:], dtype=torch.float64)
        torch.testing.assert_close(run(g, y), run(net, y), rtol=1e-11, atol=1e-11)
    assert all(t.dtype==torch.float64 for t in g.state_dict().values() if t.is_floating_point())
    assert ops(g).count('batch_norm')==r.left
    return g

bn1,bn2,bn3,C1,C2,C3,T1,T2,T3 = nn.BatchNorm1d,nn.BatchNorm2d,nn.BatchNorm3d,nn.Conv1d,nn.Conv2d,nn.Conv3d,nn.ConvTranspose1d,nn.ConvTranspose2d,nn.ConvTranspose3d

after = dict(
    conv1d           = lambda: (seq(C1(3,4,3,padding=1), bn1(4)), (2,3,9)),
    conv2d           = lambda: (seq(C2(3,4,3,padding=1,bias=False), bn2(4)), (2,3,7,7)),
    conv3d           = lambda: (seq(C3(2,4,3,padding=1), bn3(4)), (2,2,5,5,5)),
    grouped          = lambda: (seq(C2(6,8,3,stride=2,dilation=2,padding=2,groups=2), bn2(8)), (2,6,9,9)),
    depthwise        = lambda: (seq(C2(6,6,3,groups=6,bias=False), bn2(6)), (2,6,7,7)),
    padded_same      = lambda: (seq(C2(3,4,3,padding='same'), bn2(4)), (2,3,7,7)),
    reflected        = lambda: (seq(C2(3,4,3,padding=1,padding_mode='reflect'), bn2(4)), (2,3,7,7)),
    transposed1d     = lambda: (seq(T1(4,6,3,stride=2,groups=2), bn1(6)), (2,4,5)),
    transposed2d     = lambda: (seq(T2(3,4,3,stride=2,padding=1,output_padding=1), bn2(4)), (2,3,5,5)),
    transposed_groups= lambda: (seq(T2(6,9,2,stride=2,groups=3,bias=False), bn2(9)), (2,6,5,5)),
    transposed3d     = lambda: (seq(T3(4,4,2,groups=4), bn3(4)), (2,4,3,3,3)),
    linear           = lambda: (seq(nn.Linear(5,4), bn1(4)), (3,5)),
    dropout_between  = lambda: (seq(C2(3,4,1), nn.Dropout(.5), nn.Identity(), bn2(4)), (2,3,4,4)),
    not_affine       = lambda: (seq(C2(3,4,3), bn2(4, affine=False)), (2,3,7,7)),
    levit            = lambda: (Fn(lambda s,x: s.bn((y := s.l(x)).flatten(0,1)).reshape_as(y), l=nn.Linear(5,4,bias=False), bn=bn1(4)), (2,6,5)),
    tokens_transposed= lambda: (Fn(lambda s,x: s.bn(s.l(x).transpose(1,2)).transpose(1,2), l=nn.Linear(5,4), bn=bn1(4)), (2,6,5)),
    tokens_to_image  = lambda: (Fn(lambda s,x: s.bn(s.l(x).permute(0,2,1).unflatten(2,(2,3))), l=nn.Linear(5,4), bn=bn2(4)), (2,6,5)),
    conv_flattened   = lambda: (Fn(lambda s,x: s.bn(s.c(x).flatten(2)), c=C2(3,4,1), bn=bn1(4)), (2,3,4,4)),
    heads_merged     = lambda: (Fn(lambda s,x: s.bn(s.c(x).reshape(x.shape[0],2,4,-1).flatten(1,2)), c=C2(3,8,1), bn=bn1(8)), (2,3,4,4)),
    concatenated     = lambda: (Fn(lambda s,x: s.bn(torch.cat([s.a(x[:,:2]), s.b(x[:,2:])],1)), a=C2(2,3,1), b=C2(1,4,3,padding=1), bn=bn2(7)), (2,3,5,5)),
    sliced_branches  = lambda: (Fn(lambda s,x: (lambda a,b: s.bn(a).sum(1)+b.relu().sum(1))(*s.c(x).split([3,5],1)), c=C2(3,8,1), bn=bn2(3)), (2,3,5,5)),
    shuffled         = lambda: (Fn(lambda s,x: s.bn(F.channel_shuffle(s.c(x),2)), c=C2(3,6,3), bn=bn2(6)), (2,3,5,5)),
)
@pytest.mark.parametrize('name', after)
def test_batchnorm_after_a_contraction(name):
    net,shape = after[name]()
    assert not {'mul','batch_norm'} & set(ops(exact(net, shape, bn=1)))

before = dict(
    conv2d      = lambda: (seq(bn2(3), C2(3,4,3)), (2,3,7,7)),
    conv1d      = lambda: (seq(bn1(3), C1(3,4,3,stride=2,bias=False)), (2,3,7)),
    grouped     = lambda: (seq(bn2(6), C2(6,4,3,groups=2)), (2,6,7,7)),
    depthwise   = lambda: (seq(bn2(6), C2(6,12,3,groups=6,bias=False)), (2,6,7,7)),
    valid       = lambda: (seq(bn2(3), C2(3,4,3,padding='valid')), (2,3,7,7)),
    through_drop= lambda: (seq(bn2(3), nn.Dropout(.3), nn.Identity(), C2(3,4,1)), (2,3,4,4)),
    linear      = lambda: (seq(bn1(5), nn.Linear(5,4)), (3,5)),
    flattened   = lambda: (seq(bn2(3), nn.Flatten(), nn.Linear(3*4*4,4,bias=False)), (2,3,4,4)),
    tokens      = lambda: (Fn(lambda s,x: s.l(s.bn(x).flatten(2).transpose(1,2)), bn=bn2(3), l=nn.Linear(3,4)), (2,3,4,4)),
    two_readers = lambda: (Fn(lambda s,x: s.a((y := s.bn(x.relu())))+s.b(y)+x.mean(), bn=bn2(3), a=C2(3,4,1), b=C2(3,4,1,bias=False)), (2,3,4,4)),
    sliced      = lambda: (Fn(lambda s,x: (y := s.bn(x), s.a(y[:,:2])+s.b(y[:,1:]))[1], bn=bn2(4), a=C2(2,4,1), b=C2(3,4,1)), (2,4,4,4)),
    unshuffled  = lambda: (seq(bn2(3), nn.PixelUnshuffle(2), C2(12,4,1)), (2,3,4,4)),
)
@pytest.mark.parametrize('name', before)
def test_batchnorm_before_a_contraction(name):
    net,shape = before[name]()
    exact(net, shape, bn=1)

declined = dict( # net, shape: nothing may be folded, the BatchNorm becomes a multiplication and an addition
    padded_after    = lambda: (seq(bn2(3), C2(3,4,3,padding=1)), (2,3,7,7)),
    same_after      = lambda: (seq(bn2(3), C2(3,4,3,padding='same')), (2,3,7,7)),
    pad_then_conv   = lambda: (seq(bn2(3), nn.ZeroPad2d(1), C2(3,4,3)), (2,3,7,7)),
    reflect_then_conv=lambda: (seq(bn2(3), nn.ReflectionPad2d(1), C2(3,4,3)), (2,3,7,7)),
    transposed_after= lambda: (seq(bn2(3), T2(3,4,3,stride=2)), (2,3,5,5)),
    relu_between    = lambda: (seq(C2(3,4,3), nn.ReLU(), bn2(4), nn.ReLU()), (2,3,7,7)),
    read_twice      = lambda: (Fn(lambda s,x: s.bn(y := s.c(x))+y.sigmoid(), c=C2(3,4,1), bn=bn2(4)), (2,3,4,4)),
    is_output_too   = lambda: (Fn(lambda s,x: (y := s.c(x), torch.cat([s.bn(y), y]))[1], c=C2(3,4,1), bn=bn2(4)), (2,3,4,4)),
    conv_and_other  = lambda: (Fn(lambda s,x: s.c(y := s.bn(x))+y, c=C2(3,3,1), bn=bn2(3)), (2,3,4,4)),
    over_tokens     = lambda: (Fn(lambda s,x: s.bn(s.l(x)).relu(), l=nn.Linear(5,4), bn=bn1(6)), (2,6,5)),
    over_places     = lambda: (Fn(lambda s,x: s.bn(s.c(x).flatten(2).transpose(1,2)).relu(), c=C2(3,4,1), bn=bn1(16)), (2,3,4,4)),
    cat_with_input  = lambda: (Fn(lambda s,x: s.bn(torch.cat([s.c(x), x],1)).relu(), c=C2(3,4,1), bn=bn2(7)), (2,3,4,4)),
    cat_twice       = lambda: (Fn(lambda s,x: (y := s.c(x), s.bn(torch.cat([y, y],1)).relu())[1], c=C2(3,4,1), bn=bn2(8)), (2,3,4,4)),
    overlap         = lambda: (Fn(lambda s,x: (y := s.c(x), s.bn(y[:,:3])+y[:,2:].relu())[1], c=C2(3,5,1), bn=bn2(3)), (2,3,4,4)),
    padded_result   = lambda: (seq(C2(3,4,3), nn.ZeroPad2d(1), bn2(4), nn.ReLU()), (2,3,7,7)),
    channels_moved  = lambda: (Fn(lambda s,x: s.c(s.bn(x).transpose(1,2)), bn=bn2(3), c=C2(5,4,1)), (2,3,5,5)),
    pooled          = lambda: (seq(C2(3,4,1), nn.MaxPool2d(2), bn2(4), nn.ReLU()), (2,3,4,4)),
)
@pytest.mark.parametrize('name', declined)
def test_declined_but_never_left_as_batchnorm(name):
    net,shape = declined[name]()
    g = exact(net, shape, bn_affine=1)
    assert {'mul','add'} <= set(ops(g))

def test_shift_of_zero_folds_through_padding():
    for tail,shape in (seq(C2(3,4,3,padding=1)), (2,3,5,5)), (seq(nn.ZeroPad2d(1), C2(3,4,3)), (2,3,5,5)), (T2(3,4,3,stride=2), (2,3,5,5)), (T2(6,4,3,groups=2), (2,6,5,5)):
        net = seq(bn2(shape[1], affine=False), tail)
        randomised(net)
        net[0].running_mean.zero_()
        x = torch.randn(shape)
        g = capture(net, x)
        assert fold_bn_(g)==1
        torch.testing.assert_close(run(g, x), run(net, x), rtol=1e-4, atol=1e-5)

def test_statistics_of_the_batch_stay():
    net = seq(C2(3,4,3), bn2(4, track_running_stats=False))
    x = torch.randn(2,3,7,7)
    g = capture(net.eval(), x)
    r = fold_(g, x)
    assert (r.bn, r.bn_affine, r.left)==(0, 0, 1) and ops(g).count('batch_norm')==1
    torch.testing.assert_close(run(g, x), run(net, x))

def test_a_whole_chain_disappears():
    net = Fn(lambda s,x: -((2-s.bn(s.c(x)*s.g[:,None,None]))/4).permute(0,2,3,1)*s.g+s.h, c=C2(3,4,3,padding=1), bn=bn2(4), g=tensor([0.,-1.,2.,.5]), h=torch.randn(4))
    g = exact(net, (2,3,5,5), bn=1, affine=6)
    assert ops(g)==['conv2d','permute']

gain = tensor([0.,-2.,.5,3.])
factors = dict( # (net, shape, folded): constant factors and addends
    layer_scale      = lambda: (Fn(lambda s,x: s.l(x)*s.g, l=nn.Linear(5,4), g=gain), (2,6,5), 1),
    conv_layer_scale = lambda: (Fn(lambda s,x: s.g[:,None,None]*s.c(x), c=C2(3,4,3,padding=1,bias=False), g=gain), (2,3,5,5), 1),
    permuted         = lambda: (Fn(lambda s,x: s.l(x).permute(0,3,1,2)*s.g.reshape(1,-1,1,1), l=nn.Linear(5,4), g=gain), (2,3,3,5), 1),
    gain             = lambda: (Fn(lambda s,x: s.c(x)*.3, c=C2(3,4,1)), (2,3,4,4), 1),
    learned_gain     = lambda: (Fn(lambda s,x: (s.c(x)*s.g).relu(), c=C2(3,4,1), g=tensor(1.7)), (2,3,4,4), 1),
    div_sub_neg      = lambda: (Fn(lambda s,x: -((s.c(x)/4)-s.g[:,None,None]), c=C2(3,4,1), g=gain), (2,3,4,4), 3),
    from_one         = lambda: (Fn(lambda s,x: 1-s.c(x), c=C2(3,4,1,bias=False)), (2,3,4,4), 1),
    const_minus      = lambda: (Fn(lambda s,x: torch.sub(s.g, s.l(x), alpha=3), l=nn.Linear(5,4), g=gain), (2,5), 1),
    minus_alpha      = lambda: (Fn(lambda s,x: torch.sub(s.l(x), s.g, alpha=3), l=nn.Linear(5,4), g=gain), (2,5), 1),
    rsub_alpha       = lambda: (Fn(lambda s,x: torch.rsub(s.l(x), 2., alpha=3), l=nn.Linear(5,4), g=gain), (2,5), 1),
    addcmul          = lambda: (Fn(lambda s,x: torch.addcmul(s.h, s.g, s.l(x), value=.5), l=nn.Linear(5,4), g=gain, h=torch.randn(4)), (2,5), 1),
    added_vector     = lambda: (Fn(lambda s,x: s.l(x)+s.g, l=nn.Linear(5,4,bias=False), g=gain), (2,6,5), 1),
    transposed       = lambda: (Fn(lambda s,x: s.c(x)*s.g[:,None,None], c=T2(4,4,2,groups=2), g=gain), (2,4,3,3), 1),
    queries          = lambda: (Fn(lambda s,x: (lambda q,k: (q*.25)@k.transpose(1,2))(*s.l(x).chunk(2,-1)), l=nn.Linear(5,8)), (2,6,5), 1),
    before_padded    = lambda: (Fn(lambda s,x: s.c(x.relu()*1.7), c=C2(3,4,3,padding=1)), (2,3,5,5), 1),
    before_scaled    = lambda: (Fn(lambda s,x: s.c(F.pad(x.relu()*s.g[:,None,None],(0,1,0,1))), c=C2(4,4,3), g=gain), (2,4,5,5), 1),
    pad_between      = lambda: (Fn(lambda s,x: F.pad(s.c(x),(1,1))*s.g[:,None,None], c=C2(3,4,1), g=gain), (2,3,4,4), 1),
    shift_after_pad  = lambda: (Fn(lambda s,x: F.pad(s.c(x),(1,1))+3, c=C2(3,4,1)), (2,3,4,4), 0),
    many_readers     = lambda: (Fn(lambda s,x: (y := x.relu()*.5, s.a(y)+s.b(y))[1], a=C2(3,4,1), b=C2(3,4,1)), (2,3,4,4), 1),
    no_shift_before_pad=lambda:(Fn(lambda s,x: s.c(x.relu()+.5), c=C2(3,4,3,padding=1)), (2,3,5,5), 0),
    along_width      = lambda: (Fn(lambda s,x: s.c(x)*s.g, c=C2(3,4,1), g=gain), (2,3,4,4), 0),
    positions        = lambda: (Fn(lambda s,x: s.l(x)+s.p, l=nn.Linear(5,4), p=torch.randn(1,6,4)), (2,6,5), 0),
    broadcast_up     = lambda: (Fn(lambda s,x: s.l(x)+s.p, l=nn.Linear(5,1), p=torch.randn(4)), (2,6,5), 0),
    relu_between     = lambda: (Fn(lambda s,x: (s.l(x).relu()*s.g).relu(), l=nn.Linear(5,4), g=gain), (2,5), 0),
    not_constant     = lambda: (Fn(lambda s,x: s.l(x)*x.sum(-1,keepdim=True), l=nn.Linear(5,4)), (2,6,5), 0),
    divided_by       = lambda: (Fn(lambda s,x: 2/(s.l(x)**2+1)**.5, l=nn.Linear(5,4)), (2,6,5), 0),
    floored          = lambda: (Fn(lambda s,x: torch.div(s.l(x), 2, rounding_mode='floor'), l=nn.Linear(5,4)), (2,6,5), 0),
    by_zero          = lambda: (Fn(lambda s,x: (s.l(x)/torch.zeros(1,dtype=x.dtype)).clamp(-1,1), l=nn.Linear(5,4)), (2,6,5), 0),
    two_readers      = lambda: (Fn(lambda s,x: (y := s.l(x), y*2+y.relu())[1], l=nn.Linear(5,4)), (2,5), 0),
    gated            = lambda: (Fn(lambda s,x: s.c(x)*x.mean(1,keepdim=True).sigmoid()*s.g[:,None,None]*.2, c=C2(3,4,3,padding=1), g=gain), (2,3,5,5), 0),
    gated_by_itself  = lambda: (Fn(lambda s,x: (y := s.c(x), y*y.sigmoid()*2)[1], c=C2(3,4,1)), (2,3,5,5), 0),
    squared          = lambda: (Fn(lambda s,x: (y := s.c(x), y*y*2)[1], c=C2(3,4,1)), (2,3,5,5), 0),
    shift_after_gate = lambda: (Fn(lambda s,x: s.c(x)*x.mean(1,keepdim=True)+3, c=C2(3,4,1)), (2,3,5,5), 0),
    pooled           = lambda: (Fn(lambda s,x: F.avg_pool2d(s.c(x),2,padding=1)*s.g[:,None,None], c=C2(3,4,1), g=gain), (2,3,4,4), 1),
    shift_after_pool = lambda: (Fn(lambda s,x: F.avg_pool2d(s.c(x),2,padding=1)+1, c=C2(3,4,1)), (2,3,4,4), 0),
    before_pooled    = lambda: (Fn(lambda s,x: (y := x.relu()*.5, s.a(F.avg_pool2d(y,2))+s.b(y))[1], a=C2(3,4,1), b=C2(3,4,1,stride=2)), (2,3,4,4), 1),
    pooled_channels  = lambda: (Fn(lambda s,x: (F.avg_pool1d(s.l(x),2)*2).relu(), l=nn.Linear(5,4)), (2,3,5), 0),
    all_queries      = lambda: (Fn(lambda s,x: (y := s.l(x), (y*.25).sum(-1)+y.chunk(2,-1)[1].sum(-1))[1], l=nn.Linear(5,8)), (2,8,5), 0),
)
@pytest.mark.parametrize('name', factors)
def test_constant_factors(name):
    net,shape,n = factors[name]()
    exact(net, shape, affine=n)

@given(st.data())
@settings(max_examples=25, deadline=None, derandomize=True)
def test_random_chains(data):
    "A convolution of any geometry between BatchNorms, factors and moves"
    groups = data.draw(st.sampled_from([1,2,4]))
    kind,pad,k = data.draw(st.sampled_from([C2,T2])),data.draw(st.integers(0,1)),data.draw(st.integers(1,3))
    conv = kind(4, 4*data.draw(st.integers(1,2)), k, stride=data.draw(st.integers(1,2)), padding=min(pad, k-1), groups=groups, bias=data.draw(st.booleans()))
    parts = dict(bn=lambda c: bn2(c), scale=lambda c: Fn(lambda s,x: x*s.g[:,None,None], g=torch.randn(c)), shift=lambda c: Fn(lambda s,x: x-s.g[:,None,None], g=torch.randn(c)),
                 relu=lambda c: nn.ReLU(), shuffle=lambda c: nn.ChannelShuffle(2), pad=lambda c: nn.ZeroPad2d(1), swap=lambda c: Fn(lambda s,x: x.transpose(2,3)))
    pick = lambda c: [parts[o](c) for o in data.draw(st.lists(st.sampled_from(sorted(parts)), max_size=3))]
    torch.manual_seed(data.draw(st.integers(0,99)))
    net,x = randomised(seq(*pick(4), conv, *pick(conv.out_channels), nn.Tanh())).double(),torch.randn(2,4,5,5,dtype=torch.float64)
    g = capture(net, x)
    fold_(g)
    assert 'batch_norm' not in ops(g)
    torch.testing.assert_close(run(g, x), run(net, x), rtol=1e-10, atol=1e-10)

# --- integer weights

class Ints(nn.Module):
    "A convolution with stored integers, as a reference graph has it, and a function of it"
    def __init__(self, f, conv, **layers):
        super().__init__()
        self.f,self.conv = f,conv
        for k,v in layers.items(): setattr(self, k, nn.Parameter(v) if isinstance(v, torch.Tensor) else v)
        axis = 1 if 'Transpose' in type(conv).__name__ else 0
        shape = [1]*conv.weight.ndim; shape[axis] = -1
        s = torch.rand(conv.weight.shape[axis])+.01
        self.register_buffer('q', torch.randint(-127, 128, conv.weight.shape, dtype=torch.int8)); self.register_buffer('s', s if axis==0 else s.view(shape))
        conv.weight = None
    def c(self, x):
        w,c = torch.ops.fastcompress.dequantize_channels(self.q, self.s),self.conv
        if isinstance(c, nn.Linear): return F.linear(x, w, c.bias)
        if 'Transpose' in type(c).__name__: return F.conv_transpose2d(x, w, c.bias, c.stride, c.padding, c.output_padding, c.groups, c.dilation)
        return F.conv2d(x, w, c.bias, c.stride, c.padding, c.dilation, c.groups)
    def forward(self, x): return self.f(self, x)

integers = dict( # net, input, BatchNorms folded, factors folded
    after      = lambda: (Ints(lambda s,x: s.bn(s.c(x)), C2(3,4,3,padding=1), bn=bn2(4)), (2,3,5,5), 1, 0),
    grouped    = lambda: (Ints(lambda s,x: s.bn(s.c(x)), C2(4,6,3,groups=2,bias=False), bn=bn2(6)), (2,4,5,5), 1, 0),
    linear     = lambda: (Ints(lambda s,x: s.bn(s.c(x)), nn.Linear(5,4), bn=bn1(4)), (2,5), 1, 0),
    transposed = lambda: (Ints(lambda s,x: s.bn(s.c(x)), T2(3,4,3), bn=bn2(4)), (2,3,5,5), 1, 0),
    transposed_groups = lambda: (Ints(lambda s,x: s.bn(s.c(x)), T2(4,6,3,groups=2), bn=bn2(6)), (2,4,5,5), 1, 0),
    factor     = lambda: (Ints(lambda s,x: -s.c(x)*s.g[:,None,None]+1, C2(3,4,1), g=gain), (2,3,5,5), 0, 3),
    number_before = lambda: (Ints(lambda s,x: s.c(x.relu()*-2), C2(3,4,3,padding=1), g=gain), (2,3,5,5), 0, 1),
    depthwise_before = lambda: (Ints(lambda s,x: s.c(s.bn(x)), C2(4,8,3,groups=4), bn=bn2(4)), (2,4,5,5), 1, 0),
    shift_before = lambda: (Ints(lambda s,x: s.c(x+s.g[:,None,None]), C2(4,8,3), g=gain), (2,4,5,5), 0, 1),
    channels_before = lambda: (Ints(lambda s,x: s.c(s.bn(x)), C2(4,8,3), bn=bn2(4)), (2,4,5,5), 0, 0),
)
@pytest.mark.parametrize('name', integers)
def test_integer_weights_change_sign_only(name):
    torch.manual_seed(0)
    net,shape,bn,affine = integers[name]()
    randomised(net)
    x = torch.randn(shape)
    g = fold_constants_(capture(net, x))
    assert (fold_bn_(g), fold_affine_(g))==(bn, affine)
    torch.testing.assert_close(run(g, x), run(net, x), rtol=1e-4, atol=1e-3*run(net, x).abs().max().item())
    assert sqnr(run(net, x), run(g, x))>110
    w = next(n for n in g.graph.nodes if op_of(n)=='dequantize_channels')
    q,s = (get_tensor(g, a) for a in w.args)
    assert q.dtype==torch.int8 and s.dtype==torch.float32 and (s>=0).all()
    assert ((q.abs()==net.q.abs()) | (q==0)).all()
    if 'ransposed' not in name: assert s.shape==(len(q),)
    if name=='transposed': assert s.shape==(1,4,1,1)

def test_nothing_crosses_a_quantize():
    o = torch.ops.fastcompress
    def rounded(y): return o.dequantize(o.quantize(y, .02, 128, 0, 255, 'y'), .02, 128)
    net,x = randomised(Fn(lambda s,x: s.d(rounded(s.bn(rounded(s.c(x))*s.g[:,None,None]))), c=C2(3,4,3), g=gain, bn=bn2(4), d=C2(4,4,1))),torch.randn(4,3,8,8)
    g = fold_constants_(capture(net, x))
    assert (fold_affine_(g), fold_bn_(g), ops(g).count('quantize'))==(0, 0, 2)
    torch.testing.assert_close(run(g, x), run(net, x))

def test_simulated_batchnorms_fold_to_the_same_integers():
    model,x = timm_model('mobilenetv2_100', size=32)
    randomised(model)
    simulate_(model, x); calibrate_(model, [x], show=False)
    g = fold_constants_(capture(model, x))
    was = sorted(t.abs().long().sum().item() for n,t in g.state_dict().items() if t.dtype==torch.int8)
    assert fold_bn_(g)==52 and 'batch_norm' not in ops(g)
    now = [t for n,t in g.state_dict().items() if t.dtype==torch.int8]
    assert len(now)==len(was) and sum(t.abs().long().sum().item() for t in now) <= sum(was)
    assert all(op_of(n.args[1])=='dequantize_channels' for n in g.graph.nodes if op_of(n) in ('conv2d','linear'))
    with torch.no_grad(): assert sqnr(model(x), g(x)) > 25

# --- constants

def test_constants_are_computed_once():
    def f(s, x):
        w = s.w.view(4,-1)
        w = ((w-w.mean(1,keepdim=True))/w.std(1,keepdim=True)).view(4,3,3,3)
        a,b = (s.g*2).chunk(2)
        return F.conv2d(x, w)*torch.cat([b,a])[:,None,None]+torch.arange(4)[:,None,None]
    net,x = Fn(f, w=torch.randn(4,3,3,3), g=gain),torch.randn(2,3,5,5)
    g = fold_constants_(capture(net, x))
    assert ops(g)==['conv2d','mul','add'] and len(g.state_dict())==3
    assert fold_affine_(g)==2 and ops(g)==['conv2d'] and len(g.state_dict())==2
    torch.testing.assert_close(run(g, x), run(net, x), rtol=1e-4, atol=1e-4)

def test_random_numbers_are_no_constants():
    net,x = Fn(lambda s,x: x+torch.rand_like(s.g), g=gain),torch.randn(2,4)
    g = fold_constants_(capture(net, x))
    assert not torch.equal(run(g, x), run(g, x))

# --- the call that checks itself

def test_fold_names_the_fold_that_is_wrong(monkeypatch):
    net,x = randomised(seq(C2(3,4,3), bn2(4))),torch.randn(2,3,5,5)
    right = fold_module.fold_bn_
    def wrong(gm):
        n = right(gm)
        if n: next(t for k,t in gm.state_dict().items() if k.endswith('bias_folded')).add_(.01)
        return n
    monkeypatch.setattr(fold_module, 'fold_bn_', wrong)
    with pytest.raises(RuntimeError, match='fold_bn_ changed the output'): fold_(capture(net, x), x)

def test_products_too_small_are_flushed():
    net,x = seq(C2(3,4,1), bn2(4)).eval(),torch.randn(2,3,5,5)
    net[0].weight.data.fill_(1e-20); net[1].weight.data.fill_(1e-20); net[1].bias.data.fill_(1.)
    g = capture(net, x)
    r = fold_(g, x)
    assert r.flushed==12 and n_subnormal(g)==0 and 'flushed' in str(r)

def test_folding_declines_what_overflows():
    net,x = Fn(lambda s,x: s.l(x)*1e30*1e-30, l=nn.Linear(2,2)),torch.randn(3,2)
    net.l.weight.data.fill_(1e15)
    g = fold_constants_(capture(net, x))
    assert fold_affine_(g)==0 and all(t.isfinite().all() for t in g.state_dict().values())
    torch.testing.assert_close(run(g, x), run(net, x))

archs = dict(resnet18=0, mobilenetv2_100=0, efficientnet_lite0=0, tf_efficientnet_lite0=0, mobilenetv3_small_100=0, regnetx_002=0, mixnet_s=0, densenet121=62) # BatchNorms after something else than a contraction
@pytest.mark.parametrize('arch', archs)
def test_timm(arch):
    model,x = timm_model(arch, size=64, batch=2)
    for m in model.modules():
        if isinstance(m, BNs): m.weight.data[0] = 0; m.weight.data[1::7] *= -1
    norms = sum(isinstance(m, BNs) for m in model.modules())
    g = capture(model, x)
    r = fold_(g, x, db=90)
    assert 'batch_norm' not in ops(g) and r.left==0 and r.bn+r.bn_affine==norms
    assert n_subnormal(g)==0
    assert r.bn_affine==archs[arch]

@pytest.mark.parametrize('arch', ['nf_resnet26','eca_nfnet_l0'])
def test_computed_weights(arch):
    model,x = timm_model(arch, size=64, batch=2)
    for p in model.parameters():
        if not p.any(): p.data.uniform_(.1, .2)
    g = capture(model, x)
    r = fold_(g, x, db=90)
    assert all(n.args[1].op=='get_attr' for n in g.graph.nodes if op_of(n)=='conv2d') and r.constants>100
    gates = [n for n in g.graph.nodes if affine_of(g, n)] # after a gate that is computed from what it gates
    assert r.affine>10 and len(gates)==(24 if arch=='eca_nfnet_l0' else 0) and 90<sqnr(run(model, x), run(g, x))<200

# --- blocks that collapse themselves

class Branches(nn.Module):
    "1×1 and 3×3 side by side; `fuse` makes one of them"
    def __init__(self, c=4, off=0.): super().__init__(); self.a,self.b,self.off = C2(c,c,3,padding=1),C2(c,c,1),off
    def forward(self, x): return self.a(x)+self.b(x)
    def fuse(self):
        self.a.weight.data += F.pad(self.b.weight, (1,1,1,1))+self.off
        self.a.bias.data += self.b.bias
        return self.a

class InPlace(Branches):
    def forward(self, x): return self.a(x)+self.b(x) if hasattr(self, 'b') else self.a(x)
    fuse = None
    def reparameterize(self):
        if hasattr(self, 'b'): Branches.fuse(self); del self.b

class Needs(Branches):
    def fuse(self, other): raise AssertionError('never to be called')
class Broken(Branches):
    def fuse(self): raise KeyError('conv7')
class Outer(nn.Module):
    def __init__(self): super().__init__(); self.inner = Branches()
    def forward(self, x): return self.inner(x)
    def fuse(self): self.inner = C2(4,4,1); return self

def test_collapsing_is_checked_block_by_block():
    shared = InPlace()
    net = Fn(lambda s,x: s.twice(s.also(s.outer(s.broken(s.needs(s.wrong(s.place(s.good(x)))))))), good=Branches(), place=InPlace(), wrong=Branches(off=.01), needs=Needs(), broken=Broken(), outer=Outer(),
             also=shared, twice=shared, idle=Branches()).train()
    net.good.eval()
    x = torch.randn(2,4,6,6)
    want = run(net, x)
    r = reparameterise_(net, x)
    torch.testing.assert_close(run(net, x), want, rtol=1e-4, atol=1e-4)
    assert sorted(r.done)==['also','good','outer.inner','place'] and isinstance(net.good, C2) and isinstance(net.outer.inner, C2) and net.outer.inner.kernel_size==(3,3)
    assert net.also is net.twice and not hasattr(net.also, 'b')
    assert set(r.left)=={'wrong','broken','outer','idle'}
    assert 'changes the output' in r.left['wrong'] and "KeyError: 'conv7'" in r.left['broken'] and 'does not call' in r.left['idle']
    assert net.training and net.place.training and not net.good.training
    assert isinstance(net.wrong, Branches) and not torch.equal(net.wrong.a.weight, F.pad(net.wrong.b.weight, (1,1,1,1)))
    assert reparameterise_(net, x).done==[]

def test_collapsing_comes_before_simulating():
    net,x = seq(Branches()),torch.randn(2,4,6,6)
    simulate_(net, x)
    with pytest.raises(ValueError, match='reparameterise_'): reparameterise_(net, x)

@pytest.mark.parametrize('arch,size,blocks', [('repvgg_a0',64,22), ('fastvit_t8',64,None)])
def test_collapsing_timm(arch, size, blocks):
    model,x = timm_model(arch, size=size, batch=2)
    want = run(model, x)
    g,r = folded(model, x)
    assert len(r.reparam)==blocks if blocks else r.reparam
    assert sum(isinstance(m, BNs) for m in model.modules())>20 # the model itself is as it was
    assert 'batch_norm' not in ops(g) and sqnr(want, run(g, x))>90
    plain = capture(model, x); fold_(plain)
    assert ops(g).count('conv2d') < ops(plain).count('conv2d')

# --- raw pixels

mean,std = (.485,.456,.406),(.229,.224,.225)
def check_input(net, shape=(2,3,12,12), peak=1., front=None, other=()):
    torch.manual_seed(0)
    net = net.double().eval()
    col = lambda o: tensor(o, dtype=torch.float64).view(3,*[1]*(len(shape)-2))
    p = torch.rand(shape, dtype=torch.float64)
    z = (p-col(mean))/col(std)
    was = copy.deepcopy(net.state_dict())
    raw = fold_input_norm(net, (z,*other) if other else z, mean, std, peak=peak, db=200)
    torch.testing.assert_close(run(raw, p*peak, *other), run(net, z, *other), rtol=1e-11, atol=1e-11)
    assert all(torch.equal(v, was[k]) for k,v in net.state_dict().items()) # a copy
    got = [k for k in ('mean','scale') if getattr(raw, k) is not None] if isinstance(raw, Normalised) else []
    assert got==front, got
    return raw

def test_input_norm():
    check_input(seq(C2(3,4,4,stride=4), nn.ReLU(), C2(4,4,1)), front=[])
    check_input(seq(C2(3,4,4,stride=4,bias=False), nn.ReLU()), front=[], peak=255)
    check_input(seq(C2(3,4,3,padding=1), nn.ReLU()), front=['mean'])
    check_input(seq(C2(3,4,3,padding=1), nn.ReLU()), front=['mean'], peak=255)
    check_input(seq(C2(3,6,3,groups=3), nn.ReLU()), front=[])
    check_input(seq(nn.PixelUnshuffle(2), C2(12,4,1)), front=[])
    check_input(seq(nn.ZeroPad2d(1), C2(3,4,3)), front=['mean'])
    check_input(seq(nn.ReflectionPad2d(1), C2(3,4,3)), front=['mean','scale'])
    check_input(Fn(lambda s,x: s.a(x)+s.b(x), a=C2(3,4,1), b=C2(3,4,1,bias=False)), front=[])
    check_input(Fn(lambda s,x: s.a(x)+x.mean(), a=C2(3,4,1)), front=['mean','scale'])
    check_input(Fn(lambda s,x: s.a(x)+s.a(x.flip(3)), a=C2(3,4,1)), front=['mean','scale']) # would be scaled once for two calls; one weight, two readers
    check_input(Fn(lambda s,x: F.conv2d(x, s.a.weight/s.a.weight.norm(), s.a.bias), a=C2(3,4,1)), front=['mean','scale'])
    check_input(seq(bn2(3), C2(3,4,1)), front=['mean','scale'])
    check_input(seq(nn.Flatten(), nn.Linear(3*16,4)), shape=(2,3,4,4), front=[])
    check_input(seq(C1(3,4,3), nn.ReLU()), shape=(2,3,9), front=[])

def test_input_norm_leaves_other_inputs_alone():
    class Two(nn.Module):
        def __init__(self): super().__init__(); self.c,self.d = C2(3,4,1),C2(2,4,1)
        def forward(self, x, y): return self.c(x)+self.d(y)
    check_input(Two(), front=[], other=(torch.randn(2,2,12,12,dtype=torch.float64),))

def test_input_norm_of_a_simulated_model_keeps_its_integers():
    net = seq(C2(3,4,3), nn.ReLU(), C2(4,4,1)).eval()
    p = torch.rand(2,3,12,12)
    z = (p-tensor(mean).view(3,1,1))/tensor(std).view(3,1,1)
    simulate_(net, z); calibrate_(net, [z], show=False)
    raw = fold_input_norm(net, z, mean, std)
    assert isinstance(raw, Normalised) and raw.scale is not None
    a,b = (fold_constants_(capture(*o)) for o in ((net, z), (raw, p)))
    ints = lambda g: [t for t in g.state_dict().values() if t.dtype==torch.int8]
    assert len(ints(a))==2 and all(torch.equal(u, v) for u,v in zip(ints(a), ints(b)))
    assert ops(b)==['sub','mul',*ops(a)] and sqnr(run(a, z), run(b, p))>40

@pytest.mark.parametrize('arch,front', [('tf_efficientnet_lite0',['mean']), ('nf_resnet26',['mean','scale'])])
def test_input_norm_timm(arch, front):
    model,_ = timm_model(arch, size=64, batch=2)
    p = torch.rand(2,3,64,64)
    z = (p-tensor(mean).view(3,1,1))/tensor(std).view(3,1,1)
    raw = fold_input_norm(model, z, mean, std)
    assert [k for k in ('mean','scale') if getattr(raw, k) is not None]==front and sqnr(run(model, z), run(raw, p))>90
