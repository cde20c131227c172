"Low-rank factors: exact at full rank, the cheapest ranks that keep what is asked for, nothing half done, timm models"
import itertools, json, math, pickle
from collections import Counter
from copy import deepcopy
from functools import partial

import pytest, timm, torch
import torch.nn.functional as F
from hypothesis import given, settings, strategies as st
from timm.layers import Conv2dSame, ScaledStdConv2d, StdConv2d, StdConv2dSame
from timm.models.resnetv2 import ResNetV2
from torch import nn

from fastcompress.measure.count import count_macs, n_params
from fastcompress.prune.lowrank import (Ranks, chain_cost, factor_error, factor_ranks, factorise_, factors, full_ranks, grouped_weight, kept_energy,
                                        kinds, methods, multiply_out, rebuild_factors_, refusals, split_matrix, tucker2)
from fastcompress.prune.mask import covered_layers, prunable

pytestmark = pytest.mark.usefixtures('one_thread')

def seeded(f, seed=0):
    "What `f` makes, with seeded weights and biases of double precision"
    m,g = f().double(),torch.Generator().manual_seed(seed)
    for p in m.parameters(): p.data.copy_(torch.randn(p.shape, generator=g, dtype=p.dtype))
    return m

def inputs(*shape, seed=1): return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.double)
def entry(kind, *ranks): return dict(kind=kind, ranks=[*ranks])
def factored(m, kind, ranks=None):
    "`m` as a chain"
    return factorise_(nn.Sequential(deepcopy(m)), {'0': entry(kind, *(ranks or full_ranks(m, kind)))})[0]
def close(a, b, tol=1e-9): assert a.shape==b.shape and (a-b).abs().max()<=tol*max(1, b.abs().max()), (a-b).abs().max()
def same(a, b): return a.keys()==b.keys() and all(torch.equal(a[k], b[k]) for k in a)

def low(shape, r_in, r_out, seed=0):
    "A weight [out, in, *kernel] of exactly these multilinear ranks"
    g = torch.Generator().manual_seed(seed)
    a,c,b = (torch.randn(s, generator=g, dtype=torch.double) for s in ((r_in,shape[1]), (r_out,r_in,*shape[2:]), (shape[0],r_out)))
    return torch.einsum('or,rs...,si->oi...', b, c, a)

def net(): # every kind of layer that matters, weights of low rank with a little noise
    m = seeded(lambda: nn.Sequential(nn.Conv2d(3,16,3,padding=1), nn.ReLU(), nn.Conv2d(16,24,3,stride=2,padding=1), nn.ReLU(), nn.Conv2d(24,24,3,padding=1,groups=24),
                                     nn.Conv2d(24,32,1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32,32), nn.ReLU(), nn.Linear(32,5)))
    for n,(r_in,r_out) in {2:(4,5), 5:(4,4), 9:(3,3)}.items():
        w = low(m[n].weight.shape, r_in, r_out, n)
        m[n].weight.data = w + .02*w.std()*inputs(*w.shape, seed=n)
    return m.eval()

# the chain does what the layer did

CASES = {
    'linear':      (lambda: nn.Linear(7,5), (2,3,7)),
    'no bias':     (lambda: nn.Linear(5,7,bias=False), (2,5)),
    'conv1d':      (lambda: nn.Conv1d(4,6,3,2,1), (2,4,11)),
    'conv2d':      (lambda: nn.Conv2d(4,6,3,padding=1), (2,4,9,8)),
    'oblong':      (lambda: nn.Conv2d(4,6,(3,5),(2,1),(1,2),(1,2)), (2,4,11,12)),
    'same':        (lambda: nn.Conv2d(4,6,(4,3),padding='same',dilation=(1,2)), (2,4,9,8)),
    'valid':       (lambda: nn.Conv2d(4,6,3,padding='valid',bias=False), (2,4,9,8)),
    'reflect':     (lambda: nn.Conv2d(4,6,3,2,padding=2,padding_mode='reflect'), (2,4,9,8)),
    'replicate':   (lambda: nn.Conv2d(4,6,(5,3),padding=(2,1),padding_mode='replicate'), (2,4,9,8)),
    'circular':    (lambda: nn.Conv2d(4,6,3,padding='same',padding_mode='circular'), (2,4,9,8)),
    'groups':      (lambda: nn.Conv2d(8,12,3,2,1,groups=4), (2,8,9,8)),
    'depthwise':   (lambda: nn.Conv2d(6,12,3,padding=1,groups=6), (2,6,9,8)),
    'point':       (lambda: nn.Conv2d(6,4,1,2,padding=1), (2,6,9,8)),
    'conv3d':      (lambda: nn.Conv3d(4,6,(1,3,2),(1,2,1),(0,1,1)), (2,4,5,6,7)),
    'transposed1': (lambda: nn.ConvTranspose1d(4,6,3,2,1,1), (2,4,7)),
    'transposed2': (lambda: nn.ConvTranspose2d(4,6,(3,4),(2,3),(1,0),(1,2),dilation=(2,1)), (2,4,5,6)),
    'transposed g':(lambda: nn.ConvTranspose2d(8,12,3,2,groups=4,bias=False), (2,8,5,6)),
    'transposed3': (lambda: nn.ConvTranspose3d(4,3,2,2), (2,4,3,3,3)),
    'timm same':   (lambda: Conv2dSame(4,6,(3,5),(2,1),dilation=(1,2)), (2,4,9,8)),
    'timm same g': (lambda: Conv2dSame(8,4,3,2,groups=2,bias=False), (2,8,10,7)),
}

def kinds_for(m): return [k for k in kinds if k!='spatial' or (isinstance(m, nn.modules.conv._ConvNd) and len(m.kernel_size)==2)]

@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")
@pytest.mark.parametrize('case', CASES)
def test_full_rank_changes_nothing(case):
    make,shape = CASES[case]
    m,x = seeded(make),inputs(*shape)
    for kind in kinds_for(m): close(factored(m, kind)(x), m(x))

@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")
@pytest.mark.parametrize('case', CASES)
def test_a_chain_computes_what_its_product_computes(case):
    make,shape = CASES[case]
    m,x = seeded(make),inputs(*shape)
    for kind in kinds_for(m):
        ranks = [max(1, r//2) for r in full_ranks(m, kind)]
        w = multiply_out(factors(grouped_weight(m), kind, ranks))
        one = deepcopy(m)
        one.weight.data = w[0] if isinstance(m, nn.Linear) else (w.transpose(1, 2) if m.transposed else w).flatten(0, 1)
        chain = factored(m, kind, ranks)
        close(chain(x), one(x))
        assert sum(l.weight.numel() for l in chain)==chain_cost(m, kind, *ranks)[0]
        assert math.isclose(factor_error(nn.Sequential(m), {'0': entry(kind, *ranks)})['0']['error'], ((one.weight-m.weight).norm()/m.weight.norm()).item(), abs_tol=1e-12)

@settings(max_examples=60, deadline=None)
@given(st.data())
def test_any_convolution(data):
    pick = lambda *a: data.draw(st.sampled_from(a))
    d,g,transposed = pick(1,2,3),pick(1,1,2,3),pick(False,False,True)
    k,s,p,dil = ([data.draw(st.integers(lo, hi)) for _ in range(d)] for lo,hi in ((1,3),(1,2),(0,1),(1,2)))
    mode = 'zeros' if transposed else pick('zeros','reflect','replicate','circular')
    make = getattr(nn, f"Conv{'Transpose' if transposed else ''}{d}d")
    m = seeded(partial(make, g*pick(1,2,3), g*pick(1,2,4), k, s, p, dilation=dil, groups=g, bias=pick(True,False), padding_mode=mode))
    x = inputs(2, m.in_channels, *[6]*d)
    for kind in kinds_for(m): close(factored(m, kind)(x), m(x))

def test_pieces_of_a_conv2dsame_pad_as_it_did():
    m = seeded(lambda: Conv2dSame(4,6,3,2))
    chain = factored(m, 'tucker', [2,3])
    assert [type(l) for l in chain]==[nn.Conv2d, Conv2dSame, nn.Conv2d] and [l.stride for l in chain]==[(1,1),(2,2),(1,1)]
    assert [type(l) for l in factored(m, 'spatial', [2])]==[Conv2dSame]*2

def test_subclasses_that_compute_the_same_become_plain_layers():
    class Mine(nn.Conv2d): pass
    assert [type(l) for l in factored(seeded(lambda: Mine(4,6,3)), 'tucker', [2,2])]==[nn.Conv2d]*3
    assert [type(l) for l in factored(seeded(lambda: timm.layers.Linear(4,6)), 'svd', [2])]==[nn.Linear]*2

# the mathematics

def test_split_matrix_is_the_truncated_svd():
    for shape in (9,6),(6,9),(7,7):
        m = inputs(3, *shape)
        u,s,v = torch.linalg.svd(m, full_matrices=False)
        for r in 1,3,6:
            a,b = split_matrix(m, r)
            close(a @ b, u[...,:r]*s[:,None,:r] @ v[:,:r])
            close(a.norm(dim=1), s[:,:r].sqrt()); close(b.norm(dim=2), s[:,:r].sqrt()) # shared alike

def test_split_of_zeros():
    a,b = split_matrix(torch.zeros(1,3,4), 2)
    assert torch.equal(a @ b, torch.zeros(1,3,4)) and a.isfinite().all() and b.isfinite().all()

def test_energy_is_that_of_the_singular_values():
    w = inputs(1,6,5,3,3)
    for kind,m in dict(svd=w.reshape(6,45), spatial=w[0].permute(0,3,1,2).reshape(18,15)).items():
        s = torch.linalg.svdvals(m)
        close(kept_energy(w, kind), s.square().cumsum(0)/s.square().sum())

def test_tucker_table_is_what_the_hosvd_keeps_and_hooi_keeps_more():
    w = inputs(2,6,5,3,2)
    table = kept_energy(w, 'tucker')
    kept = lambda links: 1-((multiply_out(links)-w).norm()/w.norm()).item()**2
    for a,b in itertools.product(range(1,6), range(1,7)):
        assert math.isclose(kept(tucker2(w, a, b, 0)), table[a-1,b-1].item(), abs_tol=1e-10)
        assert kept(tucker2(w, a, b))>=table[a-1,b-1]-1e-10
    assert (table.diff(dim=0)>=-1e-12).all() and (table.diff(dim=1)>=-1e-12).all()
    assert kept(tucker2(w, 2, 2))>table[1,1]+1e-3

def test_tucker_factors_are_orthonormal():
    a,_,b = tucker2(inputs(1,6,5,3,3), 2, 3)
    close(a[0,:,:,0,0] @ a[0,:,:,0,0].T, torch.eye(2).double()); close(b[0,:,:,0,0].T @ b[0,:,:,0,0], torch.eye(3).double())

def test_a_weight_of_low_rank_is_found_exactly():
    m = seeded(lambda: nn.Conv2d(20,24,3))
    m.weight.data = low(m.weight.shape, 3, 5)
    for kw in dict(energy=1.), dict(ratio=.5):
        assert factor_ranks(nn.Sequential(m), include='0', **kw)=={'0': entry('tucker', 3, 5)}
    x = inputs(1,20,6,6)
    close(factored(m, 'tucker', [3,5])(x), m(x))

@pytest.mark.parametrize('dtype', [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_rounding_of_the_dtype_is_no_rank(dtype):
    m = nn.Linear(64, 48)
    m.weight.data = low((48,64), 5, 5).to(dtype)
    assert factor_ranks(nn.Sequential(m), 1., include='0')=={'0': entry('svd', 5)}

def test_zero_weights():
    m = nn.Sequential(nn.Linear(8,8))
    m[0].weight.data.zero_()
    r = factor_ranks(m, include='0')
    assert r=={'0': entry('svd', 1)}
    x = torch.ones(2,8)
    assert torch.equal(factorise_(deepcopy(m), r)(x), m(x)) and factor_error(m, r)['0']['error']==0

# which ranks

def offers(m, kind):
    "(ranks, energy, weights) of everything cheaper than `m`"
    table = kept_energy(grouped_weight(m), kind)
    for ranks in itertools.product(*(range(1, n+1) for n in table.shape)):
        weights,macs = chain_cost(m, kind, *ranks)
        if weights<m.weight.numel() and macs<m.weight.numel(): yield list(ranks), table[tuple(r-1 for r in ranks)].item(), weights

LAYERS = {'conv': (lambda: nn.Conv2d(12,10,3), 'auto', 'tucker'), 'strided': (lambda: nn.Conv2d(8,14,3,stride=2), 'auto', 'tucker'), 'grouped': (lambda: nn.Conv2d(24,16,3,groups=2), 'auto', 'tucker'),
          'linear': (lambda: nn.Linear(20,30), 'auto', 'svd'), 'svd': (lambda: nn.Conv2d(12,10,3), 'svd', 'svd'), 'spatial': (lambda: nn.Conv2d(12,10,(3,5),2), 'spatial', 'spatial')}

@pytest.mark.parametrize('case', LAYERS)
def test_energy_takes_the_cheapest_ranks_that_keep_it(case):
    make,method,kind = LAYERS[case]
    m = seeded(make)
    model,all_of = nn.Sequential(m),[*offers(m, kind)]
    for energy in .2,.4,.5,.6:
        got = factor_ranks(model, energy, method, include='0')['0']
        assert got['kind']==kind and chain_cost(m, kind, *got['ranks'])[0]==min(w for _,e,w in all_of if e>=energy)
        assert factor_error(model, {'0': got})['0']['energy']>=energy-1e-12
    most = max(e for _,e,_ in all_of)
    why = factor_ranks(model, (1+most)/2, method, include='0').unfactored['0']
    assert f'keeps at most {most:.3g} of its energy' in why

@pytest.mark.parametrize('case', LAYERS)
def test_ratio_takes_the_ranks_that_keep_most(case):
    make,method,kind = LAYERS[case]
    m = seeded(make)
    model,all_of = nn.Sequential(m),[*offers(m, kind)]
    for ratio in .3,.5,.75,.8:
        got = factor_ranks(model, ratio=ratio, method=method, include='0')['0']
        best = max((o for o in all_of if o[2]<=(1-ratio)*m.weight.numel()+1e-6), key=lambda o: o[1])
        assert got==entry(kind, *best[0])
        assert factor_error(model, {'0': got})['0']['frac']>=ratio-1e-9
    least = min(w for *_,w in all_of)
    assert f'loses at most {1-least/m.weight.numel():.3g} of its weights' in factor_ranks(model, ratio=.999, method=method, include='0').unfactored['0']

def test_a_layer_that_a_stride_makes_dearer_is_left_alone():
    m = seeded(lambda: nn.Conv2d(16,1,2,stride=2))
    x = inputs(1,16,8,8)
    small = factored(m, 'tucker', [1,1])
    assert n_params(small)<n_params(m)/2 and count_macs(small, x)>count_macs(m, x)
    assert factor_ranks(nn.Sequential(m), ratio=.5, include='0').unfactored['0'].startswith("has no ranks as 'tucker' that save both weights and MACs")
    m = seeded(lambda: nn.Conv2d(64,32,3,stride=4))
    got = factor_ranks(nn.Sequential(m), .1, include='0', min_rank=15)['0']['ranks']
    assert got[0]==15 and chain_cost(m, 'tucker', *got)[1]<m.weight.numel()
    assert '0' in factor_ranks(nn.Sequential(m), .1, include='0', min_rank=16).unfactored and chain_cost(m, 'tucker', 16, 16)[0]<m.weight.numel()/4

@pytest.mark.parametrize('case', ['conv2d','circular','groups','transposed2','linear','strided'])
def test_costs_are_those_of_the_counter(case):
    make,shape = {**CASES, 'strided': (lambda: nn.Conv2d(4,6,2,stride=2), (1,4,8,8)), 'groups': (lambda: nn.Conv2d(8,12,3,2,1,groups=4), (1,8,8,8)),
                  'transposed2': (lambda: nn.ConvTranspose2d(4,6,2,2), (1,4,5,6))}[case]
    m,x = seeded(make),inputs(*shape)
    for kind in kinds_for(m):
        ranks = [max(1, r//2) for r in full_ranks(m, kind)]
        macs = chain_cost(m, kind, *ranks)[1]
        assert count_macs(factored(m, kind, ranks), x)*m.weight.numel()==macs*count_macs(nn.Sequential(m), x)

def test_round_to_and_min_rank():
    m = net()
    for o in factor_ranks(m, ratio=.3, round_to=8).values(): assert all(r%8==0 for r in o['ranks']), o
    assert factor_ranks(m, .5, round_to=4)['2']['ranks']==[4,4]
    for n,o in factor_ranks(m, .3, min_rank=6).items(): assert min(o['ranks'])>=6, o
    assert factor_ranks(m, .3, min_rank=100)=={} # the full rank alone is left, which saves nothing
    full = factor_ranks(nn.Sequential(seeded(lambda: nn.Conv2d(64,6,3,padding=1))), ratio=.1, round_to=8, include='0')['0']['ranks']
    assert full[0]%8==0 and full[1]==6 # fewer than 8 there are

def product(model, ranks): return math.prod(kept_energy(grouped_weight(model[int(n)]), o['kind'])[tuple(r-1 for r in o['ranks'])].item() for n,o in ranks.items())
def weights_of(model, ranks, names): return sum(chain_cost(model[int(n)], ranks[n]['kind'], *ranks[n]['ranks'])[0] if n in ranks else model[int(n)].weight.numel() for n in names)

@pytest.mark.parametrize('ratio', [.1,.25,.4,.5,.6,.7,.8,.85])
def test_global_ranks_are_close_to_the_best_split(ratio):
    m,names = seeded(lambda: nn.Sequential(nn.Linear(20,16), nn.Linear(16,12), nn.Linear(12,20))),['0','1','2']
    m[0].weight.data = low((16,20), 3, 3) + .3*inputs(16,20)
    got = factor_ranks(m, ratio=ratio, scope='global', include=names)
    size = sum(l.weight.numel() for l in m)
    assert weights_of(m, got, names)<=(1-ratio)*size
    options = [[*offers(l, 'svd'), (None,1.,l.weight.numel())] for l in m]
    best = max(math.prod(o[1] for o in c) for c in itertools.product(*options) if sum(o[2] for o in c)<=(1-ratio)*size)
    assert best*.93<=product(m, got)<=best+1e-9
    local = factor_ranks(m, ratio=ratio, include=names)
    assert len(local)<3 or product(m, got)>=product(m, local)-1e-9
    assert set(got.unfactored)==set(names)-set(got) and all('stays as it is' in o for o in got.unfactored.values())

def test_what_the_price_leaves_over_is_spent():
    m = seeded(lambda: nn.Sequential(nn.Linear(40,40), nn.Linear(40,40), nn.Linear(40,40)))
    for ratio in .2,.35,.5,.65,.8:
        left = round((1-ratio)*3*1600)-weights_of(m, factor_ranks(m, ratio=ratio, scope='global', include='*'), '012')
        assert 0<=left<80 # one rank more of any would be 80

def test_no_global_choice_is_worse_and_dearer_than_another():
    m = seeded(lambda: nn.Sequential(nn.Conv2d(12,10,3), nn.Conv2d(10,14,3), nn.Conv2d(14,12,3,stride=2)))
    every = {str(i): [*offers(l, 'tucker')] for i,l in enumerate(m)}
    for ratio in .2,.3,.4,.5,.6,.7,.8,.9:
        for n,o in factor_ranks(m, ratio=ratio, scope='global', include='*').items():
            e,w = next((e,w) for ranks,e,w in every[n] if ranks==o['ranks'])
            assert not [ranks for ranks,e2,w2 in every[n] if w2<=w and e2>e+1e-12]

def test_global_beyond_the_lowest_ranks():
    with pytest.raises(ValueError, match=r"ratio=0.99 is more than the lowest ranks remove, which is 0.968 of the 3 layers"): factor_ranks(net(), ratio=.99, scope='global')

def test_methods():
    m = net()
    assert {n: o['kind'] for n,o in factor_ranks(m, ratio=.3, include='*').items()}=={'0':'tucker','2':'tucker','5':'svd','9':'svd','11':'svd'}
    assert {n: o['kind'] for n,o in factor_ranks(m, ratio=.3, method='spatial', include='*').items()}=={'0':'spatial','2':'spatial','4':'spatial','5':'svd','9':'svd','11':'svd'}
    assert {n: o['kind'] for n,o in factor_ranks(m, ratio=.3, method=lambda l: 'svd', include='*').items()}=={'0':'svd','2':'svd','5':'svd','9':'svd','11':'svd'}

def test_layers_and_reasons_together_are_all_layers():
    m = net()
    for kw in {}, dict(ratio=.5), dict(ratio=.5, scope='global'), dict(include=['2','11']), dict(exclude='5'):
        r = factor_ranks(m, **kw)
        assert {*r, *r.unfactored}=={*prunable(m)} and not {*r} & {*r.unfactored} and all(r.unfactored.values())
    r = factor_ranks(m)
    assert set(r)=={'2','5','9'} and 'exclude=' in r.unfactored['0'] and 'both weights and MACs' in r.unfactored['4'] and 'exclude=' in r.unfactored['11']
    assert set(factor_ranks(m, exclude='5'))=={'2','9'} and set(factor_ranks(m, include=['2','9']))=={'2','9'}

def test_deciding_changes_nothing():
    m = net().train()
    state,rng = deepcopy(m.state_dict()),torch.get_rng_state()
    r = factor_ranks(m); factor_error(m, r)
    assert same(state, m.state_dict()) and m.training and torch.equal(rng, torch.get_rng_state())

def test_ranks_are_data():
    r = factor_ranks(net())
    back = json.loads(json.dumps(r))
    assert back==r and type(r) is Ranks
    for o in (deepcopy(r), pickle.loads(pickle.dumps(r))): assert o==r and o.unfactored==r.unfactored

# replacing

def test_what_a_chain_takes_over():
    m = net()
    m[2].eval(); m[5].train(); m[9].weight.requires_grad_(False); m[2].bias.requires_grad_(False)
    biases = {n: m[n].bias for n in (2,5,9)}
    rng = torch.get_rng_state()
    assert factorise_(m, factor_ranks(m)) is m
    assert torch.equal(rng, torch.get_rng_state())
    for n,b in biases.items(): assert m[n][-1].bias is b and all(l.bias is None for l in m[n][:-1])
    assert not any(o.training for o in m[2].modules()) and all(o.training for o in m[5].modules())
    assert not any(l.weight.requires_grad for l in m[9]) and all(l.weight.requires_grad for l in m[2]) and not m[2][-1].bias.requires_grad
    assert all(type(l.weight) is nn.Parameter and l.weight.is_leaf and l.weight.is_contiguous() and l.weight.device.type=='cpu' for n in (2,5,9) for l in m[n])

@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16, torch.float16])
def test_dtype_stays(dtype):
    m = net().to(dtype)
    factorise_(m, factor_ranks(m, .5))
    assert {p.dtype for p in m.parameters()}=={dtype}
    if dtype is torch.float32: assert m(torch.ones(1,3,8,8)).isfinite().all()

def test_every_factor_learns():
    m = net().train()
    factorise_(m, factor_ranks(m, .9))
    assert len([n for n,_ in m.named_parameters()])==len({id(p) for p in m.parameters()})
    F.cross_entropy(m(inputs(4,3,8,8)), torch.arange(4)).backward()
    for n,p in m.named_parameters(): assert p.grad is not None and p.grad.abs().sum()>0, n

def test_nested_layers_and_wrappers():
    m = nn.DataParallel(nn.Sequential(nn.ModuleDict({'a.b'.replace('.','_'): net()})['a_b'], nn.Identity()))
    r = factor_ranks(m, .9)
    assert set(r)=={'module.0.2','module.0.5','module.0.9'}
    factorise_(m, r)
    assert isinstance(m.module[0][2], nn.Sequential)

def test_twice():
    "A 1x1 link can be factored once more"
    m = seeded(lambda: nn.Sequential(nn.Linear(32,32)))
    factorise_(m, {'0': entry('svd', 16)}); factorise_(m, {'0.1': entry('svd', 4)})
    assert [tuple(p.shape) for p in m.parameters()]==[(16,32),(4,16),(32,4),(32,)]

def test_checkpoint(tmp_path):
    m,x = net(),inputs(2,3,8,8)
    r = factor_ranks(m, .9)
    small = factorise_(deepcopy(m), r)
    (tmp_path/'ranks.json').write_text(json.dumps(r)); torch.save(small.state_dict(), tmp_path/'w.pth')
    again = rebuild_factors_(net(), json.loads((tmp_path/'ranks.json').read_text()))
    assert all(not l.weight.any() for n in (2,5,9) for l in again[n])
    assert [(n,p.shape,p.dtype,p.requires_grad) for n,p in again.named_parameters()]==[(n,p.shape,p.dtype,p.requires_grad) for n,p in small.named_parameters()]
    again.load_state_dict(torch.load(tmp_path/'w.pth'))
    assert torch.equal(again(x), small(x))
    for other in deepcopy(small), pickle.loads(pickle.dumps(small)): assert torch.equal(other(x), small(x))

def test_rebuilding_decomposes_nothing(monkeypatch):
    def no(*args, **kwargs): raise AssertionError('decomposed')
    monkeypatch.setattr(torch.linalg, 'eigh', no); monkeypatch.setattr(torch.linalg, 'svd', no)
    rebuild_factors_(net(), {'2': entry('tucker', 3, 4)})
    with torch.device('meta'): m = nn.Sequential(nn.Conv2d(16,24,3))
    assert rebuild_factors_(m, {'0': entry('tucker', 3, 4)})[0][1].weight.device.type=='meta'

GOOD = entry('tucker', 4, 5)
WRONG = {
    'no such layer':   ({'22': GOOD}, "no layer '22' with a weight. Nearest: '2'"),
    'no weight':       ({'1': GOOD}, "no layer '1' with a weight"),
    'kind':            ({'2': entry('tukker', 4, 5)}, "layer '2': no kind 'tukker'. Nearest: 'tucker'."),
    'kind and kernel': ({'9': entry('spatial', 3)}, "layer '9': 'spatial' splits a kernel of two axes, this one has 0"),
    'too few ranks':   ({'2': entry('tucker', 4)}, r"layer '2': ranks \[4\] don't fit 'tucker'; whole numbers from 1 to \[16, 24\] do."),
    'too many ranks':  ({'9': entry('svd', 4, 4)}, "don't fit 'svd'"),
    'rank 0':          ({'2': entry('tucker', 0, 4)}, "don't fit"),
    'too high':        ({'2': entry('tucker', 4, 25)}, r"ranks \[4, 25\]"),
    'not whole':       ({'2': entry('tucker', 4., 4)}, "don't fit"),
    'a list':          ({'2': [4,5]}, r"expected dict\(kind=..., ranks=\[...\]\), got \[4, 5\]"),
    'no ranks':        ({'2': dict(kind='svd')}, "expected dict"),
    'ranks no list':   ({'2': dict(kind='svd', ranks=4)}, "expected dict"),
}

@pytest.mark.parametrize('case', WRONG)
@pytest.mark.parametrize('f', [factorise_, rebuild_factors_, factor_error])
def test_nothing_is_half_done(case, f):
    bad,message = WRONG[case]
    m = net()
    mods,state = [*m.named_modules()],deepcopy(m.state_dict())
    with pytest.raises(ValueError, match=message): f(m, {'5': entry('svd', 4), **bad})
    assert [*m.named_modules()]==mods and same(state, m.state_dict())

def test_a_failure_in_the_middle_leaves_the_model(monkeypatch):
    m,r = net(),factor_ranks(net())
    mods,calls,eigh = [*m.named_modules()],[],torch.linalg.eigh
    def counted(a):
        calls.append(a)
        if len(calls)==last: raise torch.linalg.LinAlgError('no convergence')
        return eigh(a)
    last = 0
    monkeypatch.setattr(torch.linalg, 'eigh', counted)
    factorise_(deepcopy(m), r)
    last,calls = len(calls),[]
    with pytest.raises(torch.linalg.LinAlgError): factorise_(m, r)
    assert [*m.named_modules()]==mods

@pytest.mark.parametrize('v', [math.nan, math.inf])
def test_broken_weights_are_named(v):
    m = net()
    m[9].weight.data[0,0] = v
    for f in factor_ranks, partial(factorise_, ranks={'5': entry('svd', 4), '9': entry('svd', 4)}), partial(factor_error, ranks={'9': entry('svd', 4)}):
        with pytest.raises(ValueError, match="layer '9' has NaN or infinite weights"): f(m)
    assert isinstance(m[5], nn.Conv2d) and set(factor_ranks(m, exclude='9'))=={'2','5'}

@pytest.mark.parametrize('kw,message', [
    (dict(energy=0), 'energy=0 must be above 0'), (dict(energy=1.01), 'at most 1'), (dict(energy=90), r'Percent\? Type 0.9.'), (dict(energy='much'), "energy='much' must be"),
    (dict(energy=math.nan), 'energy=nan'), (dict(ratio=-.1), 'outside 0 to 1'), (dict(ratio=50), r'Percent\? Type 0.5.'), (dict(ratio='half'), 'must be a number'),
    (dict(method='tuck'), "no method 'tuck'. Nearest: 'tucker'. A callable works too."), (dict(method=lambda m: 'cp'), "layer '2': no kind 'cp'"),
    (dict(method=lambda m: 'spatial'), "layer '9': 'spatial' splits a kernel of two axes, this one has 0"),
    (dict(round_to=0), 'round_to=0'), (dict(round_to=8.), 'round_to=8.0 must be a whole number'), (dict(min_rank=-1), 'min_rank=-1'), (dict(scope='all', ratio=.5), "no scope 'all'"),
    (dict(scope='global'), 'give ratio='), (dict(include='conv'), "no layer matches 'conv'"), (dict(include='2', exclude='2'), 'no layer is left')])
def test_malformed_requests(kw, message):
    with pytest.raises(ValueError, match=message): factor_ranks(net(), **kw)

def test_a_kind_must_use_each_axis_once():
    try:
        for n,links in enumerate([((0,),()), ((0,1),(1,)), ((0,),(1,),()), ((),(0,1),(),()), ((0,1),)]):
            kinds[f'bad{n}'] = lambda d: links
            with pytest.raises(ValueError, match="must share 2 kernel axes between them"): kept_energy(inputs(1,4,4,3,3), f'bad{n}')
    finally:
        for n in range(5): kinds.pop(f'bad{n}', None)

# what can't be replaced

class Reads(nn.Module):
    "Layers that its forward reads in several ways, and layers that it only calls"
    def __init__(self):
        super().__init__()
        for n in 'direct method prop nested item static unread called init'.split(): setattr(self, n, nn.Linear(8,8))
        self.item,self.inner = nn.ModuleList([nn.Linear(8,8), nn.Linear(8,8)]),nn.Sequential(nn.Linear(8,8))
        self.inner.deep,self.deeper = nn.Linear(8,8),nn.ModuleList([nn.ModuleList([nn.Linear(8,8)])])
    def forward(self, x):
        x = F.linear(x, self.direct.weight) + self.deeper[-1][0].weight[0] + self._go(x) + self.width + self.add(self, x)
        f = lambda o: o + self.nested.bias
        return self.called(f(x)) + self.item[1].in_features + self.inner.deep.out_features
    def _go(self, x): return F.linear(x, self.method.weight)
    @property
    def width(self): return self.prop.in_features
    @staticmethod
    def add(m, x): return x + m.static.bias
    def other(self): return self.unread.weight
    def init_weights(self): self.init.weight.data.zero_()

def test_reads_are_found():
    m = nn.Sequential(nn.Conv2d(3,8,3), Reads(), nn.Linear(8,8))
    why = refusals(m, prunable(m))
    assert {n.removeprefix('1.') for n in why}=={'direct','method','prop','nested','static','item.0','item.1','inner.deep','deeper.0.0'}
    assert why['1.direct']=="Reads.forward reads direct.weight, which a chain doesn't have" and why['1.prop']=="Reads.forward reads prop.in_features, which a chain doesn't have"
    for n in why:
        with pytest.raises(ValueError, match=f"layer '{n}' Reads.forward reads"): factorise_(m, {n: entry('svd', 2)})

def test_reads_through_inheritance_and_own_forward():
    class Child(Reads):
        def forward(self, x): return super().forward(x) + self.unread.weight.sum()
    m = Child()
    assert 'unread' in refusals(m, ['unread']) and 'direct' in refusals(m, ['direct'])
    m = nn.Sequential(nn.Linear(4,4))
    m.proj = nn.Linear(4,4)
    assert not refusals(m, ['proj'])
    m.forward = lambda x: F.linear(x, m.proj.weight)
    assert 'proj' in refusals(m, ['proj'])
    two = nn.Sequential(nn.Sequential(), m) # another of its class comes first
    assert '1.proj' in refusals(two, ['1.proj'])

def test_attention_of_torch():
    for m in nn.MultiheadAttention(8,2), nn.TransformerEncoderLayer(8,2,16):
        assert {n.split('.')[-1] for n in refusals(m, prunable(m))} >= {'in_proj_weight','out_proj'}
    assert {'linear1','linear2'} <= set(refusals(m, prunable(m))) # its fast path reads them

class Own(nn.Conv2d):
    def forward(self, x): return super().forward(x)**2
class OwnConv(nn.Conv2d):
    def _conv_forward(self, x, w, b): return super()._conv_forward(x, w/w.norm(), b)
def with_hook(kind):
    m = nn.Linear(8,8)
    getattr(m, kind)(lambda *a: None)
    return m
def with_forward():
    m = nn.Linear(8,8)
    m.forward = lambda x: x
    return m
def with_(name, v):
    m = nn.Linear(8,8)
    m.register_buffer(name, v) if not isinstance(v, nn.Module) else m.add_module(name, v)
    return m

REFUSED = {
    'forward': (lambda: Own(8,8,3), 'is a Own with a forward of its own'), 'conv_forward': (lambda: OwnConv(8,8,3), 'forward of its own'), 'instance': (with_forward, 'forward of its own'),
    'std': (lambda: StdConv2d(8,8,3), 'standardises'), 'std same': (lambda: StdConv2dSame(8,8,3), 'standardises'), 'scaled': (lambda: ScaledStdConv2d(8,8,3), 'standardises'),
    'weight norm': (lambda: nn.utils.weight_norm(nn.Linear(8,8)), 'holds weight_g, weight_v'), 'spectral': (lambda: nn.utils.spectral_norm(nn.Linear(8,8)), 'holds weight_orig'),
    'buffer': (lambda: with_('mask', torch.ones(8)), 'holds mask'), 'child': (lambda: with_('lora', nn.Linear(8,8)), 'holds lora'),
    'hook': (lambda: with_hook('register_forward_hook'), 'has hooks'), 'pre-hook': (lambda: with_hook('register_forward_pre_hook'), 'has hooks'),
    'backward': (lambda: with_hook('register_full_backward_hook'), 'has hooks'), 'backward pre': (lambda: with_hook('register_full_backward_pre_hook'), 'has hooks'),
    'embedding': (lambda: nn.Embedding(8,8), 'is a Embedding'), 'bilinear': (lambda: nn.Bilinear(8,8,8), 'is a Bilinear'), 'gru': (lambda: nn.GRU(8,8), 'is a GRU'), 'empty': (lambda: nn.Linear(0,8), 'has no weights'),
}

@pytest.mark.filterwarnings('ignore')
@pytest.mark.parametrize('case', REFUSED)
def test_refused_layers(case):
    make,message = REFUSED[case]
    m = nn.Sequential(make(), nn.Linear(8,8))
    names = [n for n in prunable(m) if n.startswith('0') and n!='0.lora']
    r = factor_ranks(m, .1, include='*')
    for n in names:
        assert message in r.unfactored[n] and n not in r
        with pytest.raises(ValueError, match=f"layer '{n}' .*Take it out of the ranks"): factorise_(m, {n: entry('svd', 2)})

def test_parametrised_layers_are_not_offered():
    m = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(8,8)), nn.Linear(8,8))
    assert not any(n.startswith('0') for n in factor_ranks(m, .1, include='*'))
    with pytest.raises(ValueError): factorise_(m, {'0': entry('svd', 2)})

def test_shared_weights():
    m = nn.Sequential(nn.Linear(8,8), nn.Linear(8,8), nn.Linear(8,8), nn.Embedding(8,8), nn.Linear(8,8))
    m[1].weight = m[0].weight          # one weight, two layers
    m.add_module('5', m[2])            # one layer, two places
    m[4].weight = m[3].weight          # an embedding and its decoder
    r = factor_ranks(m, .1, include=['0','2'])
    assert r=={} and r.unfactored['0']=="shares its weight: '0.weight', '1.weight'" and r.unfactored['2']=="shares its weight: '2.weight', '5.weight'"
    assert set(refusals(m, prunable(m)))==set(prunable(m))
    for n in '02':
        with pytest.raises(ValueError, match='shares its weight'): factorise_(m, {n: entry('svd', 2)})

def test_the_model_itself():
    m = nn.Linear(8,8)
    assert factor_ranks(m, .1, include='').unfactored=={'': 'is the model itself; wrap it: nn.Sequential(model)'}
    with pytest.raises(ValueError, match='wrap it'): factorise_(m, {'': entry('svd', 2)})

# timm

def resnetv2(**kw): return ResNetV2(layers=(1,1), channels=(128,256), num_classes=10, stem_type='fixed', conv_layer=StdConv2d)

MODELS = {
    'resnet18': (partial(timm.create_model, 'resnet18', num_classes=10), 32, 19),
    'vit_tiny': (partial(timm.create_model, 'vit_tiny_patch16_224', num_classes=10, img_size=32, depth=3), 32, 12),
    'mobilenetv2_100': (partial(timm.create_model, 'mobilenetv2_100', num_classes=10), 32, 34),
    'tf_efficientnet_b0': (partial(timm.create_model, 'tf_efficientnet_b0', num_classes=10), 32, 64),
    'test_vit': (partial(timm.create_model, 'test_vit', num_classes=10), 160, 24),
}

def made(arch):
    torch.manual_seed(0)
    make,size,n = MODELS[arch]
    return make(), inputs(2,3,size,size).float(), n

@pytest.mark.parametrize('arch', MODELS)
def test_timm_models(arch):
    m,x,n = made(arch)
    r = factor_ranks(m, ratio=.5)
    assert len(r)==n, (len(r), Counter(r.unfactored.values()))
    small = factorise_(deepcopy(m), r)
    before,after = (sum(p.numel() for k,p in o.named_parameters() if p.ndim>1) for o in (m,small))
    assert after<.75*before and count_macs(small, x)<count_macs(m, x) and n_params(small)<n_params(m)
    small.train()(x).square().mean().backward()
    assert all(p.grad is not None for p in small.parameters())
    again = rebuild_factors_(MODELS[arch][0](), json.loads(json.dumps(r))).eval()
    again.load_state_dict(small.state_dict())
    copies = deepcopy(small.eval()),pickle.loads(pickle.dumps(small)),again
    with torch.no_grad():
        y = small(x)
        assert y.isfinite().all() and all(torch.equal(o(x), y) for o in copies)

@pytest.mark.parametrize('arch', MODELS)
def test_timm_models_at_full_rank(arch):
    m,x,_ = made(arch)
    m,x = m.double().eval(),x.double()
    names = covered_layers(m, [nn.Linear, nn.Conv2d])
    r = {n: entry(k, *full_ranks(l, k)) for n in names for l in [m.get_submodule(n)] for k in [methods['auto'](l)] if l.weight.numel()<3e5}
    assert len(r)>10 and not refusals(m, names)
    with torch.no_grad():
        y = m(x)
        close(factorise_(m, r)(x), y)

def test_timm_standardised_weights_are_left_alone():
    m = resnetv2()
    r = factor_ranks(m, ratio=.5, include='*')
    std = [n for n,l in m.named_modules() if isinstance(l, StdConv2d)]
    assert len(std)>5 and not set(r) & set(std) and all('standardises' in r.unfactored[n] for n in std)
    with pytest.raises(ValueError, match='standardises its weight'): factorise_(m, {std[1]: entry('svd', 2)})
    y = m.eval()(inputs(1,3,32,32).float())
    assert torch.equal(factorise_(m, r)(inputs(1,3,32,32).float()), y) or set(r)=={'head.fc'}

def lowest(model):
    "Rank 1 for every layer that may be replaced, without a decomposition; and the names of those that may not because they are read"
    layers = prunable(model)
    why = refusals(model, layers)
    todo = {n: entry(k, *[1]*len(full_ranks(m, k))) for n,(m,_) in layers.items() if n not in why for k in [methods['auto'](m)]}
    return todo, {n for n,o in why.items() if 'reads' in o}

READERS = {'convit_tiny': 'attn.qk', 'eva02_tiny_patch14_224': 'attn.qkv', 'swinv2_tiny_window8_256': 'attn.qkv', 'edgenext_xx_small': 'token_projection', 'resnet18': None, 'vit_tiny_patch16_224': None, 'repvit_m0_9': None}

@pytest.mark.parametrize('arch', READERS)
def test_timm_layers_that_are_read(arch):
    "Those and no others; and the model runs when all the rest is replaced"
    m = timm.create_model(arch, num_classes=3).eval()
    todo,read = lowest(m)
    assert {n[-len(READERS[arch] or ''):] for n in read}==({READERS[arch]} if READERS[arch] else set())
    size = m.default_cfg['input_size'][-1]
    with torch.no_grad(): assert rebuild_factors_(m, todo)(torch.zeros(1,3,size,size)).shape==(1,3)

SWEEP = '''botnet26t_256 cait_xxs24_224 coat_lite_tiny coatnet_nano_rw_224 convnext_atto crossvit_tiny_240 cs3darknet_s densenet121 dla34 dpn68 eca_nfnet_l0
efficientformer_l1 efficientnet_cc_b0_4e ese_vovnet19b_dw fastvit_t8 gcvit_xxtiny ghostnet_100 halonet26t hiera_tiny_224 hrnet_w18_small inception_v3 levit_128s
mixnet_s mobileone_s0 mobilevitv2_050 mvitv2_tiny nf_regnet_b0 pit_ti_224 poolformer_s12 regnetz_005 res2net50_26w_4s resnest14d skresnet18 swin_tiny_patch4_window7_224
tnt_s_patch16_224 vgg11_bn visformer_tiny vit_relpos_small_patch16_224 volo_d1_224 xcit_nano_12_p16_224'''.split()

@pytest.mark.slow
@pytest.mark.parametrize('arch', SWEEP)
def test_timm_sweep(arch):
    "All that isn't refused can be replaced, first and last layers too, and the model runs"
    m = timm.create_model(arch, num_classes=3).eval()
    n,(todo,_) = n_params(m),lowest(m)
    assert todo
    size = m.default_cfg['input_size'][-1]
    with torch.no_grad(): assert rebuild_factors_(m, todo)(torch.zeros(1,3,size,size)).shape==(1,3)
    assert n_params(m)<n
