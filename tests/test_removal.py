"Channel removal on small nets that are hard to cut: exact, or left whole with the reason"
import copy
import numpy as np, pytest, torch
from torch import nn
from torch.nn import functional as F
from torch.utils._pytree import tree_leaves
from fastcompress.core import call
from fastcompress.prune.channels import find_groups
from fastcompress.prune.labels import Dim
from fastcompress.prune.plan import plan_for, plan_from_json, plan_to_json
from fastcompress.prune.remove import cut_, mask_, plan_of, remove, remove_, speedup_, verify

pytestmark = pytest.mark.usefixtures('one_thread')

C=nn.Conv2d
Z={}
def z(f): Z[f.__name__]=f; return f
def mod(init, fwd):
    class M(nn.Module):
        def __init__(self): super().__init__(); init(self)
        def forward(self,*a,**k): return fwd(self,*a,**k)
    return M()
img=torch.randn(2,3,8,8)
@z
def shuffle(): 
    def i(s): s.a=C(3,24,1); s.b=C(24,24,3,groups=3); s.g=3; s.h=nn.Linear(24,5)
    def f(s,x):
        x=s.a(x).relu(); b,c,h,w=x.shape
        x=x.view(b,s.g,c//s.g,h,w).transpose(1,2).reshape(b,c,h,w)
        return s.h(s.b(x).relu().mean((2,3)))
    return mod(i,f),img
@z
def shuffle_native():
    def i(s): s.a=C(3,24,1); s.b=C(24,24,3,groups=3); s.h=nn.Linear(24,5)
    return mod(i,lambda s,x: s.h(s.b(F.channel_shuffle(s.a(x).relu(),3)).relu().mean((2,3)))),img
@z
def split_unequal():
    def i(s): s.a=C(3,24,1); s.sp=[8,16]; s.b=C(8,4,1); s.c=C(16,4,1)
    def f(s,x):
        p,q=s.a(x).relu().split(s.sp,1); return (s.b(p)+s.c(q)).mean((2,3))
    return mod(i,f),img
@z
def split_literal():
    def i(s): s.a=C(3,24,1); s.b=C(8,4,1); s.c=C(16,4,1)
    def f(s,x):
        p,q=s.a(x).relu().split([8,16],1); return (s.b(p)+s.c(q)).mean((2,3))
    return mod(i,f),img
@z
def catself():
    def i(s): s.a=C(3,8,1); s.b=C(16,4,1)
    return mod(i,lambda s,x:(lambda y: s.b(torch.cat([y,y],1)))(s.a(x).relu())),img
@z
def shared():
    def i(s): s.a=C(3,8,1); s.b=C(8,8,3,padding=1); s.c=C(8,4,1)
    return mod(i,lambda s,x: s.c(s.b(s.b(s.a(x)).relu()).relu())),img
@z
def flatlin():
    def i(s): s.a=C(3,8,3); s.b=nn.Linear(8*36,12); s.c=nn.Linear(12,3)
    return mod(i,lambda s,x: s.c(s.b(s.a(x).relu().flatten(1)).relu())),img
@z
def deconv():
    def i(s): s.a=C(3,8,1); s.t=nn.ConvTranspose2d(8,12,2,stride=2); s.u=nn.ConvTranspose2d(12,12,3,groups=3); s.c=C(12,2,1)
    return mod(i,lambda s,x: s.c(s.u(s.t(s.a(x).relu()).relu()).relu())),img
@z
def einsum_attn():
    def i(s): s.qkv=nn.Linear(12,36); s.h=3; s.o=nn.Linear(12,12); s.e=nn.Linear(6,12); s.c=nn.Linear(12,4)
    def f(s,x):
        x=s.e(x)
        q,k,v=s.qkv(x).unflatten(-1,(3,s.h,-1)).unbind(2)
        a=torch.einsum('bnhd,bmhd->bhnm',q,k).softmax(-1)
        o=torch.einsum('bhnm,bmhd->bnhd',a,v).flatten(2)
        return s.c(x+s.o(o))
    return mod(i,f),torch.randn(2,5,6)
@z
def einsum_ell():
    def i(s): s.e=nn.Linear(6,12); s.w=nn.Parameter(torch.randn(12,7)); s.c=nn.Linear(7,4)
    return mod(i,lambda s,x: s.c(torch.einsum('...i,ij->...j',s.e(x),s.w))),torch.randn(2,5,6)
@z
def twoin():
    def i(s): s.a=C(3,8,1); s.b=nn.Linear(4,8); s.c=nn.Linear(8,2)
    return mod(i,lambda s,x,y: s.c(s.a(x).mean((2,3))*s.b(y))),(img,torch.randn(2,4))
@z
def kw():
    def i(s): s.a=C(3,8,1); s.b=nn.Linear(4,8); s.c=nn.Linear(8,2)
    return mod(i,lambda s,x,y: dict(o=s.c(s.a(x).mean((2,3))*s.b(y)))),dict(x=img,y=torch.randn(2,4))
@z
def fpn():
    def i(s): s.a=C(3,8,3,2,1); s.b=C(8,16,3,2,1); s.la=C(8,12,1); s.lb=C(16,12,1); s.hc=C(12,6,3,padding=1); s.c=C(6,4,1); s.r=C(6,2,1)
    def f(s,x):
        a=s.a(x).relu(); b=s.b(a).relu(); q=s.lb(b); p=s.la(a)+F.interpolate(q,size=a.shape[-2:]) 
        return [dict(c=s.c(h),r=s.r(h)) for h in (s.hc(p).relu(),s.hc(q).relu())]
    return mod(i,f),img
@z
def ifshape():
    def i(s): s.a=C(3,8,1); s.b=C(8,8,1); s.c=C(8,4,1)
    def f(s,x):
        y=s.a(x)
        if y.shape[1]==8: y=s.b(y)
        return s.c(y)
    return mod(i,f),img
@z
def dwmult():
    def i(s): s.a=C(3,8,1); s.b=C(8,16,3,groups=8); s.c=C(16,4,1)
    return mod(i,lambda s,x: s.c(s.b(s.a(x).relu()).relu())),img
@z
def lcm():
    def i(s): s.a=C(3,24,1); s.b=C(24,24,1,groups=4); s.c=C(24,24,1,groups=6); s.d=C(24,4,1)
    return mod(i,lambda s,x: s.d(s.c(s.b(s.a(x).relu()).relu()).relu())),img
@z
def se():
    def i(s): s.a=C(3,16,1); s.f1=C(16,4,1); s.f2=C(4,16,1); s.c=C(16,4,1)
    return mod(i,lambda s,x:(lambda y: s.c(y*s.f2(s.f1(y.mean((2,3),keepdim=True)).relu()).sigmoid()))(s.a(x))),img
@z
def optionA():
    def i(s): s.a=C(3,8,1); s.b=C(8,16,1); s.c=C(16,4,1)
    return mod(i,lambda s,x:(lambda y: s.c((s.b(y)+F.pad(y,(0,0,0,0,4,4))).relu()))(s.a(x))),img
@z
def pixsh():
    def i(s): s.a=C(3,16,1); s.b=C(16,32,1); s.c=C(8,4,1)
    return mod(i,lambda s,x: s.c(F.pixel_shuffle(s.b(s.a(x).relu()),2).relu())),img
@z
def unsh():
    def i(s): s.a=C(3,8,1); s.c=C(32,4,1)
    return mod(i,lambda s,x: s.c(F.pixel_unshuffle(s.a(x).relu(),2))),img
@z
def gn(): return nn.Sequential(C(3,16,1),nn.GroupNorm(4,16),nn.ReLU(),C(16,16,1),nn.GroupNorm(8,16),C(16,16,1),nn.GroupNorm(16,16),C(16,8,1),nn.GroupNorm(1,8),C(8,2,1)),img
@z
def mha():
    def i(s): s.e=nn.Linear(6,12); s.m=nn.MultiheadAttention(12,3,batch_first=True); s.c=nn.Linear(12,4)
    return mod(i,lambda s,x:(lambda y: s.c(y+s.m(y,y,y)[0]))(s.e(x))),torch.randn(2,5,6)
@z
def tel():
    def i(s): s.e=nn.Linear(6,12); s.m=nn.TransformerEncoderLayer(12,3,16,batch_first=True); s.c=nn.Linear(12,4)
    return mod(i,lambda s,x: s.c(s.m(s.e(x)))),torch.randn(2,5,6)
@z
def lstm():
    def i(s): s.e=nn.Linear(6,12); s.m=nn.LSTM(12,8,batch_first=True); s.p=nn.Linear(8,10); s.c=nn.Linear(10,4)
    return mod(i,lambda s,x: s.c(s.p(s.m(s.e(x))[0]))),torch.randn(2,5,6)
@z
def tied():
    def i(s): s.e=nn.Embedding(20,12); s.f=nn.Linear(12,16); s.g=nn.Linear(16,12)
    return mod(i,lambda s,x: F.linear(s.g(s.f(s.e(x)).relu()),s.e.weight)),torch.randint(0,20,(2,5))
@z
def inpl():
    def i(s): s.a=C(3,8,1); s.b=C(3,4,1); s.c=C(8,4,1)
    def f(s,x):
        y=s.a(x).clone(); y[:, :4]+=s.b(x); return s.c(y.add_(1.))
    return mod(i,f),img
@z
def setzero():
    def i(s): s.a=C(3,8,1); s.c=C(8,4,1)
    def f(s,x):
        y=s.a(x); y[:,2]=0; return s.c(y)
    return mod(i,f),img
@z
def sel():
    def i(s): s.a=C(3,8,1); s.c=C(3,4,1)
    return mod(i,lambda s,x: s.c(s.a(x).index_select(1,torch.tensor([1,5,6])))),img
@z
def fft():
    def i(s): s.a=C(3,8,1); s.c=C(8,4,1)
    return mod(i,lambda s,x: s.c(torch.fft.fft2(s.a(x)).real)),img
@z
def wnorm():
    m=nn.Sequential(nn.utils.parametrizations.weight_norm(C(3,8,1)),nn.ReLU(),C(8,4,1)); return m,img
@z
def ckpt():
    from torch.utils.checkpoint import checkpoint
    def i(s): s.a=C(3,8,1); s.b=C(8,8,1); s.c=C(8,4,1)
    return mod(i,lambda s,x: s.c(checkpoint(s.b,s.a(x),use_reentrant=False))),img
class Sq(torch.autograd.Function):
    @staticmethod
    def forward(ctx,x): return x*x
    @staticmethod
    def backward(ctx,g): return g
@z
def custom():
    def i(s): s.a=C(3,8,1); s.c=C(8,4,1)
    return mod(i,lambda s,x: s.c(Sq.apply(s.a(x)))),img
@z
def custom_ip():
    def i(s): s.a=C(3,8,1); s.b=C(8,8,1); s.c=C(8,4,1)
    return mod(i,lambda s,x: s.c(Sq.apply(s.b(Sq.apply(s.a(x)))))),img
@z
def chansm():
    def i(s): s.a=C(3,8,1); s.c=C(8,4,1)
    return mod(i,lambda s,x: s.c(s.a(x).softmax(1))),img
@z
def conv1(): return nn.Sequential(nn.Conv1d(3,8,3),nn.BatchNorm1d(8),nn.ReLU(),nn.Conv1d(8,4,1),nn.AdaptiveAvgPool1d(1)),torch.randn(2,3,9)
@z
def conv3(): return nn.Sequential(nn.Conv3d(3,8,3),nn.BatchNorm3d(8),nn.PReLU(8),nn.Conv3d(8,4,1)),torch.randn(2,3,5,5,5)
@z
def glu():
    def i(s): s.a=C(3,16,1); s.c=C(8,4,1)
    return mod(i,lambda s,x: s.c(F.glu(s.a(x),1))),img
@z
def headlit():
    def i(s): s.e=nn.Linear(6,12); s.q=nn.Linear(12,36); s.o=nn.Linear(12,12); s.c=nn.Linear(12,4)
    def f(s,x):
        x=s.e(x); B,N,Cc=x.shape
        q,k,v=s.q(x).reshape(B,N,3,4,3).permute(2,0,3,1,4)
        o=F.scaled_dot_product_attention(q,k,v).transpose(1,2).reshape(B,N,Cc)
        return s.c(x+s.o(o))
    return mod(i,f),torch.randn(2,5,6)
@z
def oneh():
    def i(s): s.e=nn.Linear(6,12); s.q=nn.Linear(12,8); s.k=nn.Linear(12,8); s.v=nn.Linear(12,10); s.o=nn.Linear(10,12); s.c=nn.Linear(12,4)
    def f(s,x):
        x=s.e(x); return s.c(x+s.o(F.scaled_dot_product_attention(s.q(x),s.k(x),s.v(x))))
    return mod(i,f),torch.randn(2,5,6)
@z
def gqa():
    def i(s): s.e=nn.Linear(6,12); s.q=nn.Linear(12,16); s.k=nn.Linear(12,8); s.v=nn.Linear(12,8); s.h=4; s.kvh=2; s.o=nn.Linear(16,12); s.c=nn.Linear(12,4)
    def f(s,x):
        x=s.e(x); B,N,_=x.shape
        q=s.q(x).view(B,N,s.h,-1).transpose(1,2); k=s.k(x).view(B,N,s.kvh,-1).transpose(1,2).repeat_interleave(s.h//s.kvh,1); v=s.v(x).view(B,N,s.kvh,-1).transpose(1,2).repeat_interleave(s.h//s.kvh,1)
        return s.c(x+s.o(F.scaled_dot_product_attention(q,k,v).transpose(1,2).flatten(2)))
    return mod(i,f),torch.randn(2,5,6)
@z
def bnnostats(): return nn.Sequential(C(3,8,1),nn.BatchNorm2d(8,track_running_stats=False),nn.ReLU(),C(8,4,1)),img
@z
def half(): return nn.Sequential(C(3,8,1),nn.ReLU(),C(8,4,1)).bfloat16(),img.bfloat16()
@z
def unevenchunk():
    def i(s): s.a=C(3,10,1); s.b=C(4,4,1); s.c=C(2,4,1)
    def f(s,x):
        p,q,r=s.a(x).chunk(3,1); return s.b(p)+s.b(q)+s.c(r)
    return mod(i,f),img

STAYS = dict(shuffle=('a', 'hang together'), split_literal=('a', '16 is written in the code'), ifshape=('a', 'compares'), optionA=('b', 'no layer makes it'), lstm=('e', 'no rule for lstm'),
             setzero=('a', 'written to in places'), sel=('a', 'by the place of channels'), fft=('a', 'no rule for fft'), headlit=('q', '4 is written in the code'), unevenchunk=('a', 'unequal parts'))
UNITS = dict(split_unequal={'a':8, 'a#2':16}, catself={'a':8}, shared={'a':8}, flatlin={'a':8, 'b':12}, deconv={'a':8, 't':4, 'u':4}, einsum_attn={'qkv':3, 'o':12}, twoin={'a':8}, kw={'a':8},
             fpn={'a':8, 'b':16, 'la':12, 'hc':6}, dwmult={'a':8}, lcm={'a':6, 'b':2, 'c':4}, se={'a':16, 'f1':4}, pixsh={'a':16, 'b':8}, glu={'a':8}, mha={'e':3}, gn={'0':4, '3':8, '5':16, '7':8})

def build(name):
    torch.manual_seed(0)
    model,x = Z[name]()
    for m in model.modules():
        if isinstance(m, nn.modules.batchnorm._BatchNorm): nn.init.uniform_(m.weight, .5, 1.5); nn.init.uniform_(m.bias, -.5, .5)
    return model.eval(), x

def some(groups, seed):
    rng = np.random.default_rng(seed)
    return {g.name: rng.permutation(g.n)[:rng.integers(1, g.n)].tolist() for g in groups}

def outputs(model, x): return [t for t in tree_leaves(call(model, x)) if isinstance(t, torch.Tensor)]
def double(x): return torch.utils._pytree.tree_map(lambda t: t.double() if isinstance(t, torch.Tensor) and t.is_floating_point() else t, x)

@pytest.mark.parametrize('name', list(Z))
def test_removed_is_masked(name):
    model,x = build(name)
    state = {k: v.clone() for k,v in model.state_dict().items()}
    groups = find_groups(model, x)
    for seed in range(3):
        plan = plan_for(groups, some(groups, seed))
        assert verify(model, plan, x).problem == ''
        exact = plan_for(groups, {n: u for n,u in plan.removed.items() if groups[n].exact})
        if any(exact.removed.values()): # without the oracle's help
            masked,removed = (f(copy.deepcopy(model).double(), exact) for f in (mask_, cut_))
            for a,b in zip(outputs(masked, double(x)), outputs(removed, double(x))): assert (a-b).norm() <= 1e-9*a.norm()+1e-12
        small = remove(model, plan, x)
        assert plan_of(small).removed == plan.removed
        assert [t.shape for t in outputs(small, x)] == [t.shape for t in outputs(model, x)]
        sum(t.float().square().sum() for t in outputs(small.train(), x)).backward()
        assert all(p.grad is None or p.grad.shape==p.shape for p in small.parameters())
    assert all(v.equal(state[k]) for k,v in model.state_dict().items())
    assert not any(isinstance(v, Dim) for m in model.modules() for v in vars(m).values())

@pytest.mark.parametrize('name', list(STAYS))
def test_what_stays_says_why(name):
    layer,why = STAYS[name]
    assert why in find_groups(*build(name)).frozen[layer]

@pytest.mark.parametrize('name', list(UNITS))
def test_units(name): assert {g.name: g.n for g in find_groups(*build(name))} == UNITS[name]

def test_marks():
    marks = lambda name: {g.name: ' '.join(g.marks) for g in find_groups(*build(name))}
    assert 'softmax over channels' in marks('chansm')['a']
    assert 'layer norm' in marks('tel')['e']
    assert 'scale of attention' in marks('oneh')['q']
    assert 'group norm' in marks('gn')['0'] and not marks('gn')['3']

@pytest.mark.parametrize('make', [lambda ps: torch.optim.SGD(ps, .1, momentum=.9), lambda ps: torch.optim.AdamW(ps, 1e-3)], ids=['sgd','adamw'])
def test_optimizer_state_is_sliced(make):
    model,x = build('se')
    opt = make(model.parameters())
    sum(t.sum() for t in outputs(model.train(), x)).backward(); opt.step()
    params,before = list(model.parameters()),{n: {k: v.clone() for k,v in opt.state[p].items() if isinstance(v, torch.Tensor)} for n,p in model.named_parameters()}
    plan = plan_for(find_groups(model, x), {'a': [0,3,5], 'f1': [2]})
    remove_(model, plan, opt, x)
    assert [id(p) for p in model.parameters()] == [id(p) for p in params] == [id(p) for p in opt.param_groups[0]['params']]
    for n,p in model.named_parameters():
        for k,v in before[n].items():
            for a,keep in plan.keep.get(n, {}).items() if v.ndim else (): v = v.index_select(a, torch.tensor(keep))
            assert opt.state[p][k].equal(v), (n, k)
    sum(t.sum() for t in outputs(model, x)).backward(); opt.step()

def test_twice_is_one_plan():
    model,x = build('fpn')
    fresh = copy.deepcopy(model)
    for seed in range(2): remove_(model, plan_for(groups := find_groups(model, x), {g.name: [seed] for g in groups}), x=x)
    again = cut_(fresh, plan_from_json(plan_to_json(plan_of(model))))
    again.load_state_dict(model.state_dict())
    for a,b in zip(outputs(again, x), outputs(model, x)): assert a.equal(b)

def test_bad_input():
    model,x = build('se')
    groups = find_groups(model, x)
    plan = plan_for(groups, {'a': [1]})
    for f,words in [(lambda: plan_for(groups, {'a': range(16)}), 'at least one must stay'), (lambda: plan_for(groups, {'f11': [0]}), "Nearest: 'f1'"), (lambda: plan_for(groups, {'a': [16]}), 'units 0 to 15'),
                    (lambda: remove_(build('fpn')[0], plan), 'another'), (lambda: find_groups(model, x.to('meta')), 'meta'), (lambda: find_groups(model, x[:0]), 'empty'),
                    (lambda: remove_(remove(model, plan), plan), 'cut already'), (lambda: speedup_(model, {'aa': torch.ones(16, 3, 1, 1)}, x), "no layer 'aa'")]:
        with pytest.raises(ValueError, match=words): f()
    assert model.a.weight.shape == (16,3,1,1) and plan_of(model) is None

def test_what_a_sigmoid_leaves_is_folded():
    model = mod(lambda s: (setattr(s, 'a', C(3, 6, 1)), setattr(s, 'b', C(6, 4, 1, bias=False))), lambda s,x: s.b(s.a(x).sigmoid()))
    plan = plan_for(find_groups(model, img), {'a': [0, 3]})
    small = remove(model, plan, img)
    assert plan_of(small).biases == ['b']
    torch.testing.assert_close(small(img), mask_(copy.deepcopy(model), plan)(img))

def test_speedup_equals_the_masked_model():
    torch.manual_seed(0)
    model = nn.Sequential(C(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), C(8, 6, 1), nn.BatchNorm2d(6), nn.ReLU(), C(6, 4, 1)).eval()
    for m in (model[1], model[4]): nn.init.uniform_(m.bias, -1, 1)
    masks = {n: dict(weight=torch.ones_like(model[int(n)].weight)) for n in '03'}
    masks['0']['weight'][[1,4]] = 0; masks['3']['weight'][2] = 0
    want = copy.deepcopy(model)
    with torch.no_grad():
        for n,m in masks.items(): want[int(n)].weight.mul_(m['weight'])
    speedup_(model, masks, img)
    assert model[0].out_channels==6 and model[3].in_channels==6 and model[3].out_channels==5
    with torch.no_grad(): torch.testing.assert_close(model(img), want(img))
