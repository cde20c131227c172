"The simulation: every profile on real models, in training and under fastai's circumstances; nothing left behind"
import copy, json, pickle
from dataclasses import replace
import pytest, timm, torch, torch.nn.functional as F
from torch import nn
from fastcompress.core import call
from fastcompress.measure.quality import sqnr
from fastcompress.quantize.affine import fake_quant, quantize
from fastcompress.quantize.observe import pair_sums
from fastcompress.quantize.place import profiles
from fastcompress.quantize.simulate import attach_, calibrate_, release_, sim_mode, simulate_, simulation, simulation_from_dict, simulation_to_dict, site_sqnr

pytestmark = pytest.mark.usefixtures('one_thread')

MODELS = [('resnet18', {}), ('mobilenetv3_small_050', {}), ('efficientnet_lite0', {}), ('ghostnet_050', {}), ('regnety_002', {}), ('convnext_atto', {}), ('nf_regnet_b0', {}),
          ('vit_tiny_patch16_224', dict(img_size=64, depth=2)), ('swin_tiny_patch4_window7_224', dict(img_size=56, depths=(1,1,2,1), window_size=7)), ('xcit_nano_12_p16_224', dict(img_size=64, depth=2))]

def made(name, kwargs):
    torch.manual_seed(0)
    size = kwargs.get('img_size', 64)
    m = timm.create_model(name, num_classes=10, **kwargs)
    for n,p in m.named_parameters():
        if n.endswith('.gamma') or '.ls' in n: p.data.uniform_(.1, .5)
    m.train()
    with torch.no_grad():
        for _ in range(2): m(torch.randn(4, 3, size, size))
    return m.eval(), torch.randn(4, 3, size, size)

@pytest.mark.parametrize('profile', ['qnnpack', 'onnx'])
@pytest.mark.parametrize('name,kwargs', MODELS, ids=[m[0] for m in MODELS])
def test_models(name, kwargs, profile):
    model,x = made(name, kwargs)
    keys = list(model.state_dict())
    with torch.no_grad(): want = model(x)
    simulate_(model, x, profile)
    calibrate_(model, [x], show=False)
    sim = simulation(model)
    with torch.no_grad(): got = model(x)
    assert float(sqnr(want, got))>6 and not torch.equal(want, got)
    assert len(sim.placement.weights)>=sum(isinstance(m, (nn.Conv2d, nn.Linear)) for m in model.modules())*.8
    assert [k for k in model.state_dict() if 'fastcompress_quant' not in k]==keys
    loss = model.train()(x).square().mean()
    loss.backward()
    assert loss.isfinite() and all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)
    with sim_mode(model.eval(), 'off'), torch.no_grad(): assert model(x).shape==want.shape
    twin = copy.deepcopy(model)
    release_(model)
    assert list(model.state_dict())==keys
    attach_(model, simulation_from_dict(json.loads(json.dumps(simulation_to_dict(simulation(twin))))))
    model.load_state_dict(twin.state_dict())
    with torch.no_grad(): assert torch.equal(model(x), twin(x))

# ---- against a simulation by hand

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.a,self.bn,self.b,self.t,self.head = nn.Conv2d(3, 8, 3, padding=1),nn.BatchNorm2d(8),nn.Conv2d(8, 8, 1),nn.ConvTranspose2d(8, 6, 2, stride=2),nn.Linear(6, 4)
    def forward(self, x):
        x = F.relu(self.bn(self.a(x)))
        x = self.t(x+self.b(x))
        return self.head(F.adaptive_avg_pool2d(x, 1).flatten(1))

def ready(**kwargs):
    torch.manual_seed(0)
    net,x = Net().eval(),torch.randn(6, 3, 8, 8)
    for b in (net.bn.weight, net.bn.running_var): b.data.uniform_(.5, 1.5)
    simulate_(net, x, **kwargs)
    return calibrate_(net, [x], show=False) and net, x

@pytest.mark.parametrize('per_channel', [True, False])
def test_equals_by_hand(per_channel):
    net,x = ready(profile='onnx', per_channel=per_channel)
    sim = simulation(net)
    q = lambda key,t: fake_quant(t, sim[key].qparams)
    with torch.no_grad():
        h = q('input', x)
        if per_channel: h = F.conv2d(h, q('a:conv2d.weight', net.a.weight), net.a.bias, padding=1); h = net.bn(h)
        else:
            f = net.bn.weight*torch.rsqrt(net.bn.running_var+net.bn.eps)
            h = F.conv2d(h, q('a:conv2d.weight', net.a.weight*f.view(-1,1,1,1)), net.bn.bias+(net.a.bias-net.bn.running_mean)*f, padding=1)
        h = q(':relu', h.relu())
        h = q(':add', h+q('b:conv2d', F.conv2d(h, q('b:conv2d.weight', net.b.weight), net.b.bias)))
        h = q('t:conv_transpose2d', F.conv_transpose2d(h, q('t:conv_transpose2d.weight', net.t.weight), net.t.bias, stride=2))
        h = q('head:linear', F.linear(q(':adaptive_avg_pool2d', h.mean((2,3))), q('head:linear.weight', net.head.weight), net.head.bias))
        assert torch.allclose(net(x), h, atol=1e-6)
    shape = sim['t:conv_transpose2d.weight'].scale.shape
    assert shape==((6,) if per_channel else ())
    assert all(sim[k].scale.shape==() for k in sim.placement.acts)

def test_gradients_reach_weights_through_the_rounding():
    net,x = ready()
    net(x).sum().backward()
    g = net.head.weight.grad
    assert g.abs().sum()>0 and all(p.grad is not None for p in net.parameters())

def test_shared_grids_and_fixed_ones():
    class Cat(nn.Module):
        def __init__(self): super().__init__(); self.a,self.b,self.c = nn.Conv2d(3,4,1),nn.Conv2d(3,4,1),nn.Conv2d(12,2,1)
        def forward(self, x):
            a,b = self.a(x),100*self.b(x)
            return self.c(torch.cat([a, F.pad(b, (0,0,0,0)), self.a(x).sigmoid()], 1))
    torch.manual_seed(0)
    net,x = Cat().eval(),torch.randn(2,3,5,5)
    onnx = profiles['onnx']
    sim = simulate_(net, x, replace(onnx, roles={**onnx.roles, 'sigmoid':'fixed'}))
    calibrate_(net, [x], show=False)
    spot = sim.placement.spots[':cat']
    one = spot.output
    assert sim[':sigmoid'].scale==1/256 and sim[':sigmoid'].zero_point==0
    assert sim[one].scale>.1 # wide enough for what is a hundred times larger
    assert one not in sim.placement.fixed and sum(1 for s in sim.placement.spots.values() if s.output==one)>=2
    with torch.no_grad(): y = net(x)
    assert y.isfinite().all()

def test_weights_leave_room_for_sums_of_pairs():
    "Where kernels add two products in 16 bits, scales are raised until neighbours fit, however they are found, and in training too"
    from fastcompress.quantize.learned import adapt_
    net,x = Net().eval(),torch.randn(2,3,8,8)
    profile = profiles['fbgemm'] # whatever the processor
    def ints(): return {k: quantize(dict(net.named_parameters())[w.param].detach().movedim(w.axis, 0), replace(sim[k].qparams, axis=0 if w.channels else None)) for k,w in sim.placement.weights.items() if w.param}
    for kw in dict(), dict(weight_observer='minmax'), dict(per_channel=False):
        sim = simulate_(net, x, profile, **kw)
        calibrate_(net, [x], show=False)
        assert all(w.pairs for w in sim.placement.weights.values())
        assert all(pair_sums(q).max()<=128 for q in ints().values())
    assert sim['t:conv_transpose2d.weight'].scale.shape==() # no scale per channel for transposed convolutions there
    sim = simulate_(net, x, profile); calibrate_(net, [x], show=False)
    for learned in True, False:
        adapt_(sim, learned)
        net.train()
        for p in net.parameters(): p.data.mul_(1.3) # as if a step had been made
        net(x)
        net.eval()
        assert all(pair_sums(q).max()<=128 for q in ints().values())
    for bits in 4, 16: # fewer bits always fit, more are computed in float
        a,b = (simulate_(net, x, replace(profiles['onnx'], pairs=p), w_bits=bits) and calibrate_(net, [x], show=False) for p in (None, profile.pairs))
        assert all(torch.equal(a[k].scale, b[k].scale) for k in a.placement.weights)
    sim = simulate_(net, x, replace(profile, pairs=None)); calibrate_(net, [x], show=False)
    assert max(pair_sums(q).max() for q in ints().values())>128 # which is what all that is for

# ---- circumstances

def test_under_autocast_ranges_stay_float32():
    net,x = ready()
    with torch.autocast('cpu', dtype=torch.bfloat16): y = net(x)
    assert y.isfinite().all() and all(b.dtype in (torch.float32, torch.int32) for q in simulation(net).quantizers.values() for b in q.buffers())
    with torch.no_grad(): assert float(sqnr(net(x), y.float()))>20

def test_channels_last_batch_sizes_and_frozen_layers():
    net,x = ready()
    with torch.no_grad():
        y = net(x)
        assert torch.allclose(net(x.to(memory_format=torch.channels_last)), y, atol=1e-5)
        assert torch.allclose(net(x[:1]), y[:1], atol=1e-5) and net(torch.cat([x, x])).shape==(12, 4)
    for p in net.a.parameters(): p.requires_grad_(False)
    net.train()(x).sum().backward()
    assert net.a.weight.grad is None and net.b.weight.grad is not None

def test_dict_and_keyword_inputs():
    class Two(nn.Module):
        def __init__(self): super().__init__(); self.a,self.b = nn.Linear(4, 8),nn.Linear(3, 8)
        def forward(self, left, right): return dict(out=torch.add(input=self.a(left), other=F.linear(right, weight=self.b.weight, bias=self.b.bias)))
    net,x = Two().eval(),dict(left=torch.randn(5, 4), right=torch.randn(5, 3))
    sim = simulate_(net, x)
    calibrate_(net, [x], show=False)
    assert set(sim.placement.weights)=={'a:linear.weight', ':linear.weight'} and sim.placement.adds
    with torch.no_grad():
        got = net(**x)['out']
        with sim_mode(net, 'off'): want = call(net, x)['out']
    assert 25<float(sqnr(want, got))<70

def test_in_place_on_a_rounded_operand_is_not_lost():
    class InPlace(nn.Module):
        def __init__(self): super().__init__(); self.a,self.b = nn.Conv2d(3,4,1),nn.Conv2d(4,2,1)
        def forward(self, x):
            y = self.a(x).square()
            y.add_(self.a(x))       # its result is not bound again
            return self.b(y)
    torch.manual_seed(0)
    net,x = InPlace().eval(),torch.randn(3,3,6,6)
    with torch.no_grad(): want = net(x)
    simulate_(net, x); calibrate_(net, [x], show=False)
    with torch.no_grad(): assert float(sqnr(want, net(x)))>25

def test_pickle_and_exceptions():
    net,x = ready()
    with torch.no_grad(): y = net(x)
    twin = pickle.loads(pickle.dumps(net))
    with torch.no_grad(): assert torch.equal(twin(x), y)
    with pytest.raises(RuntimeError): net(torch.randn(1, 9, 8, 8))
    assert not simulation(net).active and not simulation(net).held
    with torch.no_grad(): assert torch.equal(net(x), y)

@pytest.mark.parametrize('kwargs,words', [(dict(w_bits=17), '2 to 16'), (dict(a_bits=1), '2 to 16'), (dict(w_bits=True), '2 to 16'), (dict(w_bits=10), 'at most 8 bits'), (dict(a_bits={'b': 4, 'zz': 3}), "matches 'zz'"),
                                          (dict(profile='qnpack'), "Nearest: 'qnnpack'"), (dict(observer='histogramm'), "Nearest: 'histogram'"), (dict(mode='dyn'), "Nearest: 'dynamic'"), (dict(weight_observer='mes'), "Nearest: 'mse'")])
def test_bad_input_leaves_the_model_alone(kwargs, words):
    net,x = Net().eval(),torch.randn(2,3,8,8)
    before = copy.deepcopy(net.state_dict())
    with pytest.raises(ValueError, match=words): simulate_(net, x, **kwargs); calibrate_(net, [x], show=False)
    if 'weight_observer' in kwargs: release_(net)
    assert list(net.state_dict())==list(before) and simulation(net) is None and not net._forward_hooks

def test_nothing_to_quantize():
    with pytest.raises(ValueError, match='nothing to quantize'): simulate_(nn.Sequential(nn.ReLU(), nn.Flatten()), torch.randn(2,3))

@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16, torch.float64, torch.complex64])
def test_other_types_are_refused_in_words(dtype):
    net = Net().eval().to(dtype)
    before = list(net.state_dict())
    with pytest.raises(ValueError, match=f"'a.weight' is {dtype}.*model.float"): simulate_(net, torch.randn(2,3,8,8))
    assert list(net.state_dict())==before and not net._forward_hooks

def test_nan_while_calibrating_names_the_layer():
    class Bad(nn.Module):
        def __init__(self): super().__init__(); self.a,self.b = nn.Linear(3, 3),nn.Linear(3, 3)
        def forward(self, x): return self.b((self.a(x)*0-1).log())
    net = Bad()
    simulate_(net, torch.rand(4, 3))
    with pytest.raises(ValueError, match='while calibrating :log>0'): calibrate_(net, [-torch.ones(4, 3)], show=False)

def test_weight_only_and_dynamic():
    net,x = Net().eval(),torch.randn(6,3,8,8)
    with torch.no_grad(): want = net(x)
    db = {}
    for mode in ('weight_only','dynamic'):
        n = copy.deepcopy(net)
        sim = simulate_(n, x, mode=mode)
        assert sim.calibrated and sim.mode=='fake' and len(sim.placement.acts)==(0 if mode=='weight_only' else 4)
        with torch.no_grad(): db[mode],big = float(sqnr(want, n(x))),float(sqnr(net(x*1000), n(x*1000)))
        assert db[mode]>30 and big>15
    assert db['weight_only']>db['dynamic']
    from fastcompress.deploy.lower import to_integer
    with pytest.raises(ValueError, match="mode='static'"): to_integer(n, x)

def test_weight_only_of_several_inputs():
    class Two(nn.Module):
        def __init__(self): super().__init__(); self.a,self.b = nn.Linear(4, 8),nn.Linear(3, 8)
        def forward(self, x, y): return self.a(x)*self.b(y)
    for mode in ('weight_only','dynamic'):
        net,x = Two(),(torch.randn(5, 4), torch.randn(5, 3))
        with torch.no_grad(): want = net(*x)
        simulate_(net, x, mode=mode)
        with torch.no_grad(): assert float(sqnr(want, net(*x)))>25

def test_site_sqnr_names_every_site():
    net,x = ready()
    assert set(site_sqnr(net, x))=={n for n,s in simulation(net).placement.spots.items() if s.output}
