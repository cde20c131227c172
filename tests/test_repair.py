"Repairs leave the float function alone or improve the rounded one; the search finds the optimum; all of it can be taken back"
import copy, itertools, math, random
import numpy as np, pytest, torch, torch.nn.functional as F
from hypothesis import given, settings, strategies as st
from torch import nn

from fastcompress.measure.quality import sqnr
from fastcompress.quantize.affine import quantize
from fastcompress.quantize.repair import (Repaired, absorb_bias_, adaround_, clipped_normal_mean, correct_bias_, correct_bias_analytic_, equalise_,
                                          float_means, layer_sqnr, layers, learn_rounding, links, only, recalibrate_, turn_over)
from fastcompress.quantize.search import knapsack, mixed_precision, ptq_, size_budget
from fastcompress.quantize.simulate import calibrate_, simulate_, simulation
from helpers import timm_model

pytestmark = pytest.mark.usefixtures('one_thread')


def block(i, o, k=3, g=1, act=nn.ReLU): return nn.Sequential(nn.Conv2d(i, o, k, padding=k//2, groups=g, bias=False), nn.BatchNorm2d(o), act())

class Mobile(nn.Module):
    "Depthwise separable, relu"
    def __init__(self, c=16):
        super().__init__()
        self.stem = block(3, c)
        self.body = nn.Sequential(block(c, c, 3, c), block(c, 2*c, 1), block(2*c, 2*c, 3, 2*c), block(2*c, 2*c, 1))
        self.head = nn.Linear(2*c, 10)
    def forward(self, x): return self.head(self.body(self.stem(x)).mean((2,3)))

def data(seed, n=32, c=3, size=12): return torch.randn(n, c, size, size, generator=torch.Generator().manual_seed(seed))

def settle(model, x):
    "BatchNorm gains and biases that are not their defaults, statistics of `x`"
    g = torch.Generator().manual_seed(3)
    for m in model.modules():
        if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.affine:
            m.weight.data.uniform_(.5, 1.5, generator=g); m.bias.data.uniform_(-.5, .5, generator=g)
    for m in model.modules():
        if isinstance(m, nn.modules.batchnorm._BatchNorm): m.momentum = None
    model.train()
    with torch.no_grad(): model(x)
    return model.eval()

def spoil_(model, x, octaves=6., seed=0):
    "Channels of very different size between the layers, the same function"
    g,P = torch.Generator().manual_seed(seed),dict(model.named_parameters())
    with torch.no_grad():
        for k in links(model, x):
            s = 2**(torch.rand(len(P[k.first.weight]), generator=g)*2-1).mul(octaves)
            for n in filter(None, (k.first.norm['weight'], k.first.norm['bias']) if k.first.norm else (k.first.weight, k.first.bias)): P[n].mul_(s.view(-1, *[1]*(P[n].ndim-1)))
            w,groups = P[k.last.weight],k.last.groups
            per_in = s.repeat_interleave(k.repeat).view(groups, 1, -1, 1)
            w.copy_((w.view(groups, len(w)//groups, w.shape[1], -1)/per_in).view_as(w))
    return model

@pytest.fixture(scope='module')
def mobile():
    torch.manual_seed(0)
    return settle(Mobile(), data(0))

def out(model, x):
    with torch.no_grad(): return model(x)

def simulated(model, x, **kw):
    m = copy.deepcopy(model)
    simulate_(m, x, **kw)
    calibrate_(m, [x], show=False)
    return m

def state(model): return {k:v.clone() for k,v in model.state_dict().items()}
def same(model, was): return model.state_dict().keys()==was.keys() and all(torch.equal(v, was[k]) for k,v in model.state_dict().items())


# ---- equalisation: exact, converged, careful

class Functional(nn.Module):
    "Everything by hand: no module but the root knows what is called"
    def __init__(self):
        super().__init__()
        self.w1,self.b1 = nn.Parameter(torch.randn(6,3,3,3)),nn.Parameter(torch.randn(6))
        self.w2 = nn.Parameter(torch.randn(8,3,1,1))
    def forward(self, x): return F.conv2d(weight=self.w2, input=F.leaky_relu(F.conv2d(x, self.w1, self.b1, padding=1), .1), groups=2).mean((2,3))

def nets():
    c = nn.Conv2d
    yield 'mobile', Mobile(8), 5
    yield 'biases, no norm', nn.Sequential(c(3,6,3), nn.ReLU(), c(6,5,3), nn.LeakyReLU(.2), c(5,4,1)), 2
    yield 'nothing between', nn.Sequential(c(3,6,3), c(6,5,1)), 1
    yield 'grouped', nn.Sequential(c(3,8,3), nn.BatchNorm2d(8), nn.ReLU(), c(8,12,3,groups=4), nn.BatchNorm2d(12), nn.ReLU(), c(12,6,1,groups=2)), 2
    yield 'depthwise that multiplies', nn.Sequential(c(3,4,1), nn.ReLU(), c(4,12,3,groups=4), nn.ReLU(), c(12,4,1)), 2
    yield 'flattened', nn.Sequential(c(3,5,3,stride=3), nn.BatchNorm2d(5), nn.ReLU(), nn.Flatten(), nn.Linear(5*16,7), nn.ReLU(), nn.Linear(7,3)), 2
    yield 'pools', nn.Sequential(c(3,5,3), nn.ReLU(), nn.MaxPool2d(2), c(5,6,3), nn.PReLU(6), nn.AvgPool2d(2, 2, 1, count_include_pad=False), c(6,4,1), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4,3)), 3
    yield 'conv1d', nn.Sequential(nn.Flatten(2), nn.Conv1d(3,6,5), nn.BatchNorm1d(6), nn.ReLU(), nn.Conv1d(6,4,3)), 1
    yield 'tokens', nn.Sequential(nn.Flatten(2), nn.Linear(144,9), nn.ReLU(), nn.Linear(9,4)), 1
    yield 'norm of a linear', nn.Sequential(nn.Flatten(), nn.Linear(432,9), nn.BatchNorm1d(9), nn.ReLU(), nn.Linear(9,4)), 1
    yield 'functional', Functional(), 1

@pytest.mark.parametrize('net,n', [pytest.param(m, n, id=name) for name,m,n in nets()])
def test_equalisation_leaves_the_function(net, n):
    torch.manual_seed(1)
    x = data(1, 8)
    net = copy.deepcopy(net)
    spoil_(settle(net, x), x)
    net = net.double()
    y,keys = out(net, x.double()),list(net.state_dict())
    done = equalise_(net, x.double())
    assert (out(net, x.double())-y).abs().max() <= 1e-10*y.abs().max()
    assert len(done)==n==len(links(net, x.double())) and list(net.state_dict())==keys
    assert all((s>0).all() and (s!=1).any() for s in done.values())

@pytest.mark.parametrize('per_channel', [True, False])
def test_ranges_are_equal_afterwards(mobile, per_channel):
    "By a second way of computing them: fold, then look at rows and columns"
    x = data(0)
    net = spoil_(copy.deepcopy(mobile), x)
    equalise_(net, x, iters=200, tol=1e-6)
    fold = lambda c,b: (c.weight*(b.weight/(b.running_var+b.eps).sqrt()).view(-1,1,1,1)).abs().detach()
    ws = [fold(net.stem[0], net.stem[1]), *(fold(b[0], b[1]) for b in net.body), net.head.weight.abs().detach()]
    for a,b in itertools.pairwise(ws):
        written = a.flatten(1).amax(1)
        read = b.flatten(1).amax(1) if b.ndim==4 and b.shape[1]==1 else b.transpose(0, 1).flatten(1).amax(1)
        torch.testing.assert_close(written, read, rtol=1e-3, atol=0)

@pytest.mark.parametrize('seed', range(3))
def test_equalisation_regains_the_logits(mobile, seed):
    x = data(0)
    y,bad = out(mobile, x),spoil_(copy.deepcopy(mobile), x, seed=seed)
    assert sqnr(y, out(bad, x)) > 100
    before = sqnr(y, out(simulated(bad, x, per_channel=False), x))
    equalise_(bad, x)
    after = sqnr(y, out(simulated(bad, x, per_channel=False), x))
    assert after > before+15 and after > 25

class Odd(nn.Module):
    "One reason each why a layer must be left alone"
    def __init__(self):
        super().__init__()
        conv = lambda **k: nn.Conv2d(4, 4, 3, padding=1, **k)
        self.first,self.read_twice,self.tied,self.plain_norm,self.clipped,self.sigmoid,self.last = nn.Conv2d(3,4,1),conv(),conv(),conv(),conv(),conv(),conv()
        self.norm = nn.BatchNorm2d(4, affine=False)
        self.v = nn.Parameter(torch.randn(4,4,1,1))
    def forward(self, x):
        x = F.relu(self.read_twice(F.relu(self.first(x))))
        x = x + F.relu(self.tied(F.relu(self.tied(x))))
        x = F.conv2d(x, self.v-self.v.mean(1, keepdim=True))
        x = self.sigmoid(F.relu6(self.clipped(F.relu(self.norm(self.plain_norm(x))))))
        return self.last(torch.sigmoid(x))

def test_what_cannot_be_scaled_is_named():
    torch.manual_seed(0)
    net,x = Odd().eval(),data(2, 4)
    net.norm.running_mean.uniform_(); net.norm.running_var.uniform_(.5, 2)
    y = out(net.double(), x.double())
    done = equalise_(net, x.double())
    assert list(done)==['first > read_twice']
    for name,why in dict(read_twice='read by 2', tied='more than once', plain_norm='no gain', clipped='relu6', sigmoid='sigmoid', last='output of the model').items():
        assert why in done.skipped[name], (name, done.skipped)
    assert any('computed' in w or 'plain_norm' in w or 'between' in w for n,w in done.skipped.items() if n.startswith(':conv2d'))
    assert (out(net, x.double())-y).abs().max() <= 1e-10*y.abs().max()

def test_relu6_only_when_asked_for():
    net = settle(nn.Sequential(block(3, 8, act=nn.ReLU6), block(8, 8)), data(0))
    assert not equalise_(net, data(0)) and list(equalise_(net, data(0), relu6=True))==['0.0 > 1.0']

class Hidden(nn.Module):
    "A second reader that no operation shows"
    def __init__(self): super().__init__(); self.a,self.b = nn.Conv2d(3,4,1),nn.Conv2d(4,4,1)
    def forward(self, x):
        x = self.a(x)
        return self.b(x) + x.detach().mT.mT if self.training else self.b(x) + x.mT.mT

def test_a_reader_out_of_sight_is_found_by_the_output():
    torch.manual_seed(0)
    net = Hidden().eval()
    net.a.weight.data[0] *= 50
    was = state(net)
    if len(links(net, data(0))): # the net reads `x.mT` behind the recording's back
        with pytest.raises(RuntimeError, match='put back'): equalise_(net, data(0))
        assert same(net, was)
    else: assert not equalise_(net, data(0)) and same(net, was)

def test_dead_channels_and_signs():
    torch.manual_seed(0)
    net = settle(nn.Sequential(block(3, 6), block(6, 6), nn.Conv2d(6, 4, 1)), data(0))
    net[0][1].weight.data[:2] = torch.tensor([0., -2.]); net[1][0].weight.data[:,3] = 0; net[1][0].weight.data[4] = 0
    net = net.double()
    x = data(0).double()
    y = out(net, x)
    done = equalise_(net, x)
    assert (out(net, x)-y).abs().max() <= 1e-10*y.abs().max()
    assert all(s.isfinite().all() and (s>0).all() for s in done.values()) and done['0.0 > 1.0'][3]==1

@settings(max_examples=25, deadline=None)
@given(st.lists(st.tuples(st.sampled_from(['conv','dw','pw']), st.booleans(), st.sampled_from(['relu','leaky','none'])), min_size=2, max_size=5), st.integers(0, 99))
def test_random_chains(parts, seed):
    torch.manual_seed(seed)
    ms,c = [nn.Conv2d(3, 4, 1)],4
    for kind,norm,act in parts:
        ms += [nn.Conv2d(c, c, 1 if kind=='pw' else 3, padding=int(kind!='pw'), groups=c if kind=='dw' else 1)] + [nn.BatchNorm2d(c)]*norm
        ms += dict(relu=[nn.ReLU()], leaky=[nn.LeakyReLU(.3)], none=[])[act]
    ms = [copy.deepcopy(m) for m in ms] + [nn.Conv2d(4, 3, 1)]
    x = data(seed, 4, size=6)
    net = spoil_(settle(nn.Sequential(*ms), x), x, 3., seed).double()
    y = out(net, x.double())
    done = equalise_(net, x.double())
    assert len(done)==len(parts)+1 and (out(net, x.double())-y).abs().max() <= 1e-10*y.abs().max()

@pytest.mark.parametrize('arch', ['resnet18','mobilenetv3_small_100','vit_tiny_patch16_224'])
def test_timm_models_stay_what_they_are(arch):
    net,x = timm_model(arch, 64 if 'vit' not in arch else 224, 1)
    net,x = net.double(),x.double()
    y,keys = out(net, x),list(net.state_dict())
    done = equalise_(net, x)
    assert (out(net, x)-y).abs().max() <= 1e-10*y.abs().max() and list(net.state_dict())==keys
    assert arch!='resnet18' or len(done)==8 # inside each basic block
    done.restore(net)
    assert torch.equal(out(net, x), y)

def test_restore_is_bit_exact(mobile):
    net = spoil_(copy.deepcopy(mobile), data(0))
    was = state(net)
    done = equalise_(net, data(0))
    assert not same(net, was)
    done.restore(net)
    assert same(net, was)


# ---- biases

def with_large_biases(x):
    torch.manual_seed(0)
    net = settle(nn.Sequential(block(3, 16, 1), nn.Conv2d(16, 8, 1, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(8*144, 5)), x)
    net[0][1].weight.data.fill_(.5); net[0][1].bias.data.uniform_(3, 40)
    net.train()(x)
    return net.eval()

def test_absorbed_biases():
    x = data(0)
    net = with_large_biases(x)
    y = out(net, x)
    beta,gamma,w,mean = net[0][1].bias.clone(),net[0][1].weight.clone(),net[1].weight.clone(),net[2].running_mean.clone()
    before = sqnr(y, out(simulated(net, x), x))
    done = absorb_bias_(net, x)
    c = (beta-3*gamma.abs()).clamp(min=0)
    torch.testing.assert_close(done['0.0'], c.detach())
    torch.testing.assert_close(net[0][1].bias, beta-c)
    torch.testing.assert_close(net[2].running_mean, mean-(w.flatten(1)@c).detach())
    assert sqnr(y, out(net, x)) > 40 and sqnr(y, out(simulated(net, x), x)) > before+3
    done.restore(net)
    assert torch.equal(out(net, x), y)

def test_nothing_is_absorbed_into_padding():
    net = settle(nn.Sequential(block(3, 8), block(8, 8)), data(0))
    net[0][1].bias.data.fill_(20.)
    assert '1.0 pads' in absorb_bias_(net, data(0)).skipped['0.0'] and '0.0' in absorb_bias_(net, data(0), padded=True)

@pytest.mark.parametrize('lo,hi', [(0., math.inf), (0., 6.), (-math.inf, math.inf), (-1., 1.)])
def test_clipped_normal_by_sampling(lo, hi):
    g = torch.Generator().manual_seed(0)
    mean,std = torch.tensor([-3., -.5, 0., 2., 5.]),torch.tensor([1., 2., .1, 3., -2.])
    z = torch.randn(400_000, 5, generator=g, dtype=torch.float64)*std+mean
    torch.testing.assert_close(clipped_normal_mean(mean, std, lo, hi), z.clamp(lo, hi).mean(0), rtol=0, atol=.02)

@pytest.mark.parametrize('per_channel', [True, False])
def test_empirical_correction_removes_the_mean_error(mobile, per_channel):
    x = data(0)
    m = simulated(mobile, x, w_bits=4, per_channel=per_channel)
    y = out(mobile, x)
    before = sqnr(y, out(m, x))
    bias = (out(m, x)-y).mean(0)
    done = correct_bias_(m, [x[:16], x[16:]])
    after = (out(m, x)-y).mean(0)
    assert after.abs().max() < bias.abs().max()/5 and sqnr(y, out(m, x)) > before+3
    assert set(done)=={l.name for l in layers(mobile, x).values()} and not done.skipped
    assert [k for k in m.state_dict() if 'fastcompress_quant' not in k]==list(mobile.state_dict())
    assert all(torch.equal(a, b) for (n,a),(_,b) in zip(m.named_parameters(), mobile.named_parameters()) if n.endswith('.weight') and a.ndim>1)

@pytest.mark.parametrize('per_channel', [True, False])
def test_analytic_correction_needs_no_data(mobile, per_channel):
    x,new = data(0),data(7)
    m = simulated(mobile, x, w_bits=4, per_channel=per_channel)
    y = out(mobile, new)
    before = sqnr(y, out(m, new))
    done = correct_bias_analytic_(m, x[:1])
    assert sqnr(y, out(m, new)) > before+2
    assert 'no BatchNorm before' in done.skipped['stem.0'] and set(done)=={f'body.{i}.0' for i in range(4)}|{'head'}

def test_a_layer_without_bias_or_norm_is_named():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3,8,3,bias=False), nn.ReLU(), nn.Conv2d(8,8,3)).eval()
    m = simulated(net, data(0), w_bits=4)
    keys = list(m.state_dict())
    done = correct_bias_(m, [data(0)])
    assert 'neither a bias nor a BatchNorm' in done.skipped['0'] and list(done)==['2'] and list(m.state_dict())==keys

def test_correction_wants_data_and_a_simulation(mobile):
    with pytest.raises(ValueError, match='simulate_'): correct_bias_(mobile, [data(0)])
    m = simulated(mobile, data(0))
    with pytest.raises(ValueError, match='no calibration data'): correct_bias_(m, [])
    with pytest.raises(ValueError, match='no calibration data'): adaround_(m, [])

def test_an_interruption_leaves_everything(mobile):
    m = simulated(mobile, data(0), w_bits=4)
    was,sim = state(m),simulation(m)
    class Stop(nn.Module):
        def forward(self, q, x): raise KeyboardInterrupt
    sim['head:linear.weight'].how = Stop()
    with pytest.raises(KeyboardInterrupt): correct_bias_(m, [data(0)])
    sim['head:linear.weight'].how = None
    assert same(m, was) and sim.mode=='fake' and '_on_op' not in vars(sim)

def test_adaround_interrupted_at_its_fourth_layer(mobile, monkeypatch):
    import fastcompress.quantize.repair as R
    m,calls = simulated(mobile, data(0), w_bits=4),[]
    was = state(m)
    def learn(w, A, B, qmin, qmax, iters, **kw):
        calls.append(not same(m, was))
        if len(calls)==4: raise KeyboardInterrupt
        return w.floor().clamp(qmin, qmax)
    monkeypatch.setattr(R, 'learn_rounding', learn)
    with pytest.raises(KeyboardInterrupt): adaround_(m, [data(0)], show=False)
    assert calls==[False,True,True,True] and same(m, was)


# ---- AdaRound

@pytest.mark.parametrize('per_channel', [True, False])
def test_adaround_beats_nearest_on_new_data(mobile, per_channel):
    x,new = data(0, 64),data(9)
    m = simulated(mobile, x, w_bits=4, per_channel=per_channel)
    y = out(mobile, new)
    before = sqnr(y, out(m, new))
    done = adaround_(m, [x[:32], x[32:]], show=False)
    assert sqnr(y, out(m, new)) > before+4
    assert all(0<v<.6 for v in done.values()) and not done.skipped and len(done)==6

def test_learned_weights_stand_on_the_grid_one_step_from_where_they_were(mobile):
    x = data(0)
    m = simulated(mobile, x, w_bits=4)
    sim = simulation(m)
    adaround_(m, [x], iters=60, show=False)
    moved = 0
    for k in sim.placement.weights:
        n = k.split(':')[0]+'.weight'
        w,w0,q = m.get_parameter(n).detach(),mobile.get_parameter(n).detach(),sim[k]
        assert torch.equal(q.fake(w), w)
        lo,hi = quantize(w, q.qparams),(w0/q.qparams.shaped(w)[0]).clamp(q.qmin, q.qmax)
        assert ((lo-hi).abs()<1+1e-4).all()
        moved += int((quantize(w0, q.qparams)!=lo).sum())
    assert moved>100
    for k in sim.placement.weights: sim[k].scale.mul_(8) # grids that no observer would choose
    coarse = {k:sim[k].scale.clone() for k in sim.placement.weights}
    recalibrate_(m, [x], show=False)
    assert all(torch.equal(sim[k].scale, s) for k,s in coarse.items())
    for k,s in coarse.items(): sim[k].scale.copy_(s/8)
    for k in sim.placement.weights: assert torch.equal(sim[k].fake(w := m.get_parameter(k.split(':')[0]+'.weight')), w)

def test_the_integers_that_ship_are_the_learned_ones(mobile):
    from fastcompress.deploy.engines import Packed
    from fastcompress.deploy.lower import to_integer
    x = data(0)
    m = simulated(mobile, x, w_bits=4)
    adaround_(m, [x], iters=40, show=False)
    sim = simulation(m)
    want = {k.split(':')[0]: quantize(m.get_parameter(k.split(':')[0]+'.weight').detach(), sim[k].qparams) for k in sim.placement.weights}
    got = [o.integers()[0] for o in to_integer(m, x).modules() if isinstance(o, Packed)]
    assert len(got)==len(want) and all(torch.equal(a.flatten().int(), b.flatten().int()) for a,b in zip(got, want.values()))

def test_adaround_is_repeatable_and_draws_no_random_numbers(mobile):
    x,states = data(0),[]
    for _ in range(2):
        m,r = simulated(mobile, x, w_bits=3),torch.get_rng_state()
        done = adaround_(m, [x], iters=30, show=False)
        assert torch.equal(torch.get_rng_state(), r)
        states.append(state(m))
    assert states[0].keys()==states[1].keys() and all(torch.equal(v, states[1][k]) for k,v in states[0].items())
    before = simulated(mobile, x, w_bits=3)
    done.restore(m)
    assert same(m, state(before))

def test_pruned_weights_stay_zero(mobile):
    net = copy.deepcopy(mobile)
    for p in net.parameters():
        if p.ndim>1: p.data[p.abs()<p.abs().median()] = 0
    x = data(0)
    m = simulated(net, x, w_bits=3)
    adaround_(m, [x], iters=60, show=False)
    for a,b in zip(net.parameters(), m.parameters()):
        if a.ndim>1: assert (b[a==0]==0).all()

@settings(max_examples=20, deadline=None)
@given(st.integers(0, 999), st.integers(1, 2), st.integers(2, 6))
def test_no_single_turn_helps_any_more(seed, groups, k):
    g = torch.Generator().manual_seed(seed)
    A,w = torch.randn(groups, 30, k, generator=g, dtype=torch.float64)+1,torch.randn(groups, 3, k, generator=g, dtype=torch.float64)*3
    B = A@w.mT+torch.randn(groups, 30, 3, generator=g, dtype=torch.float64)
    start = torch.where(w.round().abs()<=7, w.round(), w.clamp(-7, 7))
    q = turn_over(start, w, A, B, -7, 7)
    err = lambda q: (A@q.mT-B).square().sum(1)
    assert (err(q) <= err(start)+1e-9).all()
    for i in range(k):
        other = q.clone()
        other[...,i] = torch.where(q[...,i]>w[...,i].floor(), q[...,i]-1, q[...,i]+1).clamp(-7, 7)
        assert (err(other) >= err(q)-1e-9).all()

def test_zeros_stay_whatever_the_output_would_like():
    A = torch.ones(1,20,3)
    w = torch.tensor([[[0.,.45,0.]]])
    assert learn_rounding(w, A, A@w.mT+1.5, -7, 7).tolist()==[[[0.,1.,0.]]]

def test_only_the_layers_asked_for(mobile):
    m = simulated(mobile, data(0), w_bits=4)
    done = adaround_(m, [data(0)], iters=10, include=['head'], show=False)
    assert list(done)==['head'] and torch.equal(m.stem[0].weight, mobile.stem[0].weight) and not torch.equal(m.head.weight, mobile.head.weight)

@settings(max_examples=20, deadline=None)
@given(st.integers(0, 999), st.integers(1, 3), st.integers(1, 4), st.integers(1, 9))
def test_learned_rounding_is_never_worse_than_nearest(seed, groups, rows, k):
    g = torch.Generator().manual_seed(seed)
    A,w = torch.randn(groups, 40, k, generator=g)+1,torch.randn(groups, rows, k, generator=g)*4
    w[torch.rand(w.shape, generator=g)<.2] = 0
    q = learn_rounding(w, A, A@w.mT, -7, 7, iters=40)
    err = lambda q: (A@(q-w).mT).square().sum(1)
    assert (err(q) <= err(w.round().clamp(-7, 7))+1e-4).all()
    assert ((q-w.clamp(-7, 7)).abs() < 1+1e-5).all() and (q==q.round()).all() and (q[w==0]==0).all()

def test_rounding_finds_what_exhaustion_finds():
    g,ratio = torch.Generator().manual_seed(1),[]
    for _ in range(8):
        A,w = torch.randn(1,64,8,generator=g)@torch.randn(8,8,generator=g),torch.randn(1,1,8,generator=g)*3
        ways = torch.cartesian_prod(*[torch.stack([o.floor(), o.floor()+1]) for o in w[0,0]])
        best = (A[0]@(ways-w[0]).T).square().sum(0).min()
        ratio.append(float((A@(learn_rounding(w, A, A@w.mT, -9, 9)-w).mT).square().sum()/best))
    assert min(ratio)>.999 and np.median(ratio)<1.01 and np.mean(ratio)<1.3

@pytest.mark.parametrize('net', [nn.Sequential(nn.Conv2d(3,8,3,stride=2,dilation=2,padding=1), nn.ReLU(), nn.Conv2d(8,8,3,groups=4), nn.ReLU(), nn.Flatten(), nn.Linear(72,5)),
                                 nn.Sequential(nn.Flatten(2), nn.Conv1d(3,6,5,stride=3,padding=2), nn.ReLU(), nn.Conv1d(6,4,3,groups=2), nn.Flatten(), nn.Linear(184,5))], ids=['conv2d','conv1d'])
def test_patches_are_what_the_layer_multiplies(net):
    "With all patches cut, the least squares problem is the layer's own: its result can be computed from them"
    from fastcompress.quantize.repair import _collect, _quantized
    torch.manual_seed(0)
    x = data(0, 4)
    if isinstance(net[0], nn.Conv2d): x = x[...,:12,:12]
    m = copy.deepcopy(net).eval()
    simulate_(m, x, 'onnx'); calibrate_(m, [x], show=False)
    ls = _quantized(simulation(m), layers(m, x))
    for l in ls.values(): l.args['kernel'] = tuple(m.get_parameter(l.weight).shape[2:])
    got = _collect(m, ls, [x], 1, 10**6)
    ins,hooks = {},[o.register_forward_hook(lambda o,a,y,n=n: ins.__setitem__(n, F.conv2d(a[0], o.weight, None, o.stride, o.padding, o.dilation, o.groups) if isinstance(o, nn.Conv2d) else
             F.conv1d(a[0], o.weight, None, o.stride, o.padding, o.dilation, o.groups) if isinstance(o, nn.Conv1d) else F.linear(a[0], o.weight))) for n,o in m.named_modules() if hasattr(o, 'weight')]
    from fastcompress.quantize.repair import sim_off
    with sim_off(m): out(m, x)
    for l in ls.values():
        w = m.get_parameter(l.weight).detach()
        y = (got[l.site]@w.reshape(l.groups, len(w)//l.groups, -1).mT).flatten()
        torch.testing.assert_close(y.sort()[0], ins[l.name].detach().flatten().sort()[0], rtol=1e-4, atol=1e-4)


# ---- which layer

def test_table_of_one_layer_by_hand():
    torch.manual_seed(0)
    net,x = nn.Sequential(nn.Linear(20,6), nn.ReLU()).eval(),torch.randn(50,20)
    m = simulated(net, x, w_bits=4)
    row, = layer_sqnr(m, x, show=False)
    sim = simulation(m)
    w,xq = sim['0:linear.weight'].fake(net[0].weight),sim['input'].fake(x)
    assert row['weight']==pytest.approx(sqnr(net[0].weight, w)) and row['alone']==pytest.approx(sqnr(net[0](x), F.linear(xq, w, net[0].bias)))
    assert row['output']==pytest.approx(sqnr(net(x), F.linear(xq, w, net[0].bias).relu())) and row['all']==pytest.approx(row['alone'])
    assert (row['bits'],row['macs'],row['params'])==(4,120,120)

@pytest.mark.parametrize('per_channel', [True, False])
def test_table_finds_the_bad_layer_and_leaves_the_model(mobile, per_channel):
    from fastcompress.measure.count import count_macs
    x = data(0)
    m = simulated(mobile, x, w_bits={'body.2.0':2, '*':8}, per_channel=per_channel)
    was,y = state(m),out(m, x)
    rows = layer_sqnr(m, x, show=False)
    assert [r['layer'] for r in rows]==[l.name for l in layers(mobile, x).values()]
    assert rows.worst('output')==rows.worst('weight')==rows.worst('alone')=='body.2.0'
    assert [r['bits'] for r in rows]==[8,8,8,2,8,8] and sum(r['macs'] for r in rows)==count_macs(mobile, x[:1])
    assert all(r['alone']>=r['all']-.5 for r in rows) and rows[0]['alone']==pytest.approx(rows[0]['all'], abs=1e-3)
    assert same(m, was) and torch.equal(out(m, x), y) and all(q.how is None for q in simulation(m).quantizers.values())
    assert len(repr(rows).splitlines())==7

def test_only_some_quantizers(mobile):
    x = data(0)
    m = simulated(mobile, x, w_bits=2)
    with only(simulation(m), set()): assert sqnr(out(mobile, x), out(m, x)) > 90
    assert sqnr(out(mobile, x), out(m, x)) < 20


# ---- search

@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 5), st.integers(1, 4), st.floats(0, 1))
def test_knapsack_is_exact(seed, layers, widths, part):
    rng = np.random.default_rng(seed)
    c,e = rng.integers(1, 40, (layers, widths)).tolist(),rng.random((layers, widths)).tolist()
    lo,hi = sum(map(min, c)),sum(map(max, c))
    budget = lo+part*(hi-lo)
    total = lambda t,ks: sum(t[i][k] for i,k in enumerate(ks))
    ks = knapsack(c, e, budget)
    assert total(c, ks) <= budget
    assert total(e, ks) == pytest.approx(min(total(e, k) for k in itertools.product(range(widths), repeat=layers) if total(c, k)<=budget))

def test_a_thinned_front_stays_within_the_budget():
    rng = np.random.default_rng(0)
    c,e = np.sort(rng.random((60,6))*1e6, 1),-np.sort(-rng.random((60,6)), 1)
    exact,thin = (knapsack(c.tolist(), e.tolist(), c[:,3].sum(), most=m) for m in (20_000, 500))
    err = lambda ks: sum(e[i][k] for i,k in enumerate(ks))
    assert sum(c[i][k] for i,k in enumerate(thin)) <= c[:,3].sum() and err(thin) <= err(exact)*1.02

@pytest.mark.parametrize('distance', ['mse','kl'])
@pytest.mark.parametrize('per_channel', [True, False])
def test_search_spends_where_it_matters(mobile, per_channel, distance):
    x = data(0)
    net = copy.deepcopy(mobile)
    was = state(net)
    found = mixed_precision(net, [x[:16], x[16:]], '4 bits', (2,3,4,6,8), distance, per_channel=per_channel, show=False)
    assert same(net, was) and simulation(net) is None and found.bytes<=found.budget==sum(r['weights'] for r in found.rows)/2
    for r in found.rows: assert r['errors'][8]<r['errors'][2] and r['bits']==found.bits[r['layer']]
    for b in 2,3,4:
        assert found.measured <= mixed_precision(net, [x[:16], x[16:]], f'{b} bits', (b,), distance, per_channel=per_channel, show=False).measured
    even = sum(r['errors'][4] for r in found.rows)
    assert (found.predicted <= even or found.measured < even) and len(set(found.bits.values()))>1
    assert mixed_precision(net, [x[:16], x[16:]], '4 bits', (2,3,4,6,8), distance, per_channel=per_channel, show=False)==found
    m = copy.deepcopy(net)
    sim = simulate_(m, x, w_bits=found.bits, per_channel=per_channel, mode='weight_only')
    assert {k.split(':')[0]:sim[k].bits for k in sim.placement.weights}==found.bits
    if distance=='mse': assert found.measured==pytest.approx(np.mean([10**(-sqnr(out(net, b), out(m, b))/10) for b in (x[:16], x[16:])]), rel=1e-3)

def test_never_worse_than_one_width_for_all(mobile):
    "Errors don't add up at three bits: here the sum of them misleads the knapsack"
    torch.manual_seed(0)
    x = data(0)
    net = spoil_(settle(Mobile(), x), x, 3., seed=2)
    found,even = (mixed_precision(net, [x], '3 bits', bits, show=False) for bits in ((2,3,4,5,6,8), (3,)))
    assert found.measured <= even.measured and found.bytes <= found.budget

class Tied(nn.Module):
    def __init__(self): super().__init__(); self.a,self.b,self.v = nn.Linear(8,8),nn.Linear(8,3),nn.Parameter(torch.randn(8,8))
    def forward(self, x): return self.b(F.linear(F.linear(self.a(self.a(x)), self.v), self.v.t().contiguous()))

def test_a_weight_used_twice_is_paid_once():
    torch.manual_seed(0)
    x = torch.randn(16,8)
    net = Tied().eval()
    found = mixed_precision(net, x, '1x', (2,8), show=False)
    assert [r['weights'] for r in found.rows if r['layer']=='a']==[64]
    assert simulate_(net, x, w_bits=found.bits) is simulation(net)

def test_given_widths_and_refusals(mobile):
    x = data(0)
    found = mixed_precision(mobile, x, '4 bits', keep={'stem.0':8, 'body.*':3}, show=False)
    assert found.bits['stem.0']==8 and all(found.bits[f'body.{i}.0']==3 for i in range(4))
    m = simulated(mobile, x)
    sim = simulation(m)
    for bad,match in ((dict(budget=3), 'fewest bits'), (dict(budget='4 bits', bits=(1,4)), '2 to 16'), (dict(budget='4 bits', keep={'steam':8}), 'stem'),
                      (dict(budget='4 bits', distance='msee'), "'mse'"), (dict(budget='much'), 'budget=')):
        with pytest.raises(ValueError, match=match): mixed_precision(m, x, show=False, **bad)
        assert simulation(m) is sim
    y = out(m, x)
    mixed_precision(m, x, '4 bits', show=False)
    assert simulation(m) is sim and torch.equal(out(m, x), y)

def test_budgets():
    assert [size_budget(o, 800) for o in (100, 1e3, '0.25x', '0.25X', '3.5 bits', '2kB', '1 KiB')]==[100, 1000, 800, 800, 350, 2000, 1024]
    for bad in (0, -1, True, '25%', 'x', None, '4 bytes'):
        with pytest.raises(ValueError, match='budget='): size_budget(bad, 10)


# ---- everything in one call

def test_steps_do_not_undo_each_other(mobile):
    x,new = data(0, 64),data(9)
    y = out(mobile, new)
    def db(**kw):
        m = spoil_(copy.deepcopy(mobile), x)
        ptq_(m, [x[:32], x[32:]], show=False, per_channel=False, **kw)
        return sqnr(y, out(m, new))
    plain,eq,more = db(w_bits=4),db(w_bits=4, equalize=True),db(w_bits=4, equalize=True, adaround=True, bias_correct=True)
    assert eq > plain+3 and more > eq+4

def test_inputs_of_any_form():
    class Two(nn.Module):
        def __init__(self): super().__init__(); self.a,self.b,self.c = nn.Linear(4,8),nn.Linear(4,8),nn.Linear(8,3)
        def forward(self, u, v): return dict(y=self.c(F.relu(self.a(u)+self.b(v))))
    torch.manual_seed(0)
    net,batches = Two().eval(),[(torch.randn(8,4), torch.randn(8,4), torch.zeros(8)) for _ in range(3)]
    done = ptq_(net, batches, w_bits=4, adaround=dict(iters=20), bias_correct=True, mixed=None, equalize=True, n_inp=2, show=False)
    assert set(done.steps)=={'equalize','adaround','bias_correct'}
    assert len(layer_sqnr(net, batches[0][:2], show=False))==3
    mixed_precision(net, batches, '4 bits', n_inp=2, show=False)

def test_all_steps_aim_at_the_model_that_was_given(mobile):
    "After AdaRound the float model lies on the grid; its means aren't those to be restored"
    x,m = data(0),copy.deepcopy(mobile)
    ptq_(m, [x], w_bits=3, adaround=dict(iters=1, asymmetric=False), bias_correct=True, show=False)
    y = out(mobile, x)
    plain = simulated(mobile, x, w_bits=3)
    assert (out(m, x)-y).mean(0).abs().max() < (out(plain, x)-y).mean(0).abs().max()/5

def test_means_of_the_float_model_are_those_before_the_repair(mobile):
    "After AdaRound the float model is on the grid; correction must aim at what it was"
    x = data(0)
    m = simulated(mobile, x, w_bits=3)
    means = float_means(m, [x])
    adaround_(m, [x], iters=40, show=False)
    correct_bias_(m, [x], means=means)
    y = out(mobile, x)
    assert (out(m, x).mean(0)-y.mean(0)).abs().max() < .05*y.abs().max()
