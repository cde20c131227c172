"Criteria, what they are measured with, and how a total is split between layers"
import math
import pytest, torch, torch.nn.functional as F
from hypothesis import given, settings, strategies as st
from torch import nn
from torch.func import functional_call

from fastcompress.core import weight_layers
from fastcompress.prune.allocate import anneal, erk, masked_quality, uniform
from fastcompress.prune.probe import Gather, norm_params, probe
from fastcompress.prune.score import Scores, criteria, needs, out_first, out_first_back

def rand(*shape, seed=0): return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
def weights(model): return {n: m.weight for n,m in weight_layers(model).items()}
def close(a, b, tol=1e-4): torch.testing.assert_close(a, b, rtol=tol, atol=tol)

class Net(nn.Module):
    "A shortcut, a functional activation, in-place arithmetic, dropout and a linear layer"
    def __init__(self, seed=0):
        super().__init__()
        torch.manual_seed(seed)
        self.stem,self.bn = nn.Conv2d(3, 6, 3),nn.BatchNorm2d(6)
        self.a,self.bna = nn.Conv2d(6, 6, 3, padding=1, groups=2, bias=False),nn.BatchNorm2d(6)
        self.short,self.fc,self.drop = nn.Conv2d(6, 6, 1),nn.Linear(6, 4),nn.Dropout(.5)
        for b in self.bn,self.bna: nn.init.uniform_(b.weight, .5, 1.5); nn.init.normal_(b.bias)
    def forward(self, x):
        x = torch.relu_(self.bn(self.stem(x)))
        y = self.drop(self.bna(self.a(x)))
        y += self.short(x)
        return self.fc(F.gelu(y.relu()).mean((2,3)))

def batches(n=2, bs=4): return [((rand(bs, 3, 8, 8, seed=i),), (torch.arange(bs)%4,)) for i in range(n)]

# criteria

def test_lamp_against_its_definition():
    w = rand(3, 4, 2); w[0,0], w[1,1] = .7, -.7 # equal magnitudes
    flat = w.flatten().tolist()
    order = sorted(range(len(flat)), key=lambda i: (abs(flat[i]), i))
    want = torch.empty(len(flat))
    for r,i in enumerate(order): want[i] = flat[i]**2/sum(flat[j]**2 for j in order[r:])
    close(criteria['lamp'](w).flatten(), want, 1e-6)
    assert criteria['lamp'](w).max()==1 and (criteria['lamp'](w)==1).sum()==1

def test_lamp_leaves_every_layer_a_weight():
    ws = dict(tiny=rand(5, 5)*1e-6, big=rand(50, 50))
    top = sorted(((s, n) for n,v in Scores(ws, 'lamp').items() for s in v.flatten().tolist()), reverse=True)[:2]
    assert {n for _,n in top}=={'tiny','big'}

def test_lamp_is_accurate_on_many_small_weights():
    w = torch.full((10**6,), 1e-3)
    close(criteria['lamp'](w)[:1]*1e6, torch.ones(1), 1e-4)

def test_fpgm_against_loops():
    w = rand(5, 3, 2, 2)
    want = torch.stack([sum((w[i]-w[j]).square().sum().sqrt() for j in range(5)) for i in range(5)])
    close(criteria['fpgm'](w), want, 1e-5)
    w[3] = w[1] # equal filters are equally near to the others
    assert criteria['fpgm'](w)[3]==criteria['fpgm'](w)[1]

FORMULAS = dict(magnitude=lambda w: w.abs(), l1=lambda w: w.abs(), large_final=lambda w: w.abs(), l2=lambda w: w**2,
    taylor=lambda w, saliency: saliency, obd=lambda w, saliency: saliency/2, hessian_diag=lambda w, saliency: saliency/2, snip=lambda w, grad: (w*grad).abs(), gradient=lambda w, grad: grad.abs(), movement=lambda w, pull: pull,
    grasp=lambda w, hess_grad: w*hess_grad, wanda=lambda w, in_norm: w.abs()*in_norm[None,:,None], bn_scale=lambda w, norm_scale: norm_scale.abs(),
    apoz=lambda w, zeros: 1-zeros, mean_activation=lambda w, act: act, magnitude_increase=lambda w, w0: w.abs()-w0.abs(), distance=lambda w, w0: (w-w0).abs(),
    large_init=lambda w, w0: w0.abs(), small_init=lambda w, w0: -w0.abs(), small_final=lambda w: -w.abs(),
    large_init_large_final=lambda w, w0: torch.minimum(w.abs(), w0.abs()), small_init_small_final=lambda w, w0: -torch.maximum(w.abs(), w0.abs()))

@pytest.mark.parametrize('name', FORMULAS)
def test_formula(name):
    w = rand(4, 3, 2)
    kw = {k: rand(3, seed=1) if k=='in_norm' else rand(4, seed=1) if k in ('zeros','act','norm_scale') else rand(4, 3, 2, seed=1) for k in needs(name)}
    got = Scores({'l': w}, name, {k: {'l': v} for k,v in kw.items()})['l']
    assert torch.equal(got, FORMULAS[name](w, **kw))

def test_every_criterion_is_listed_here(): assert set(criteria)-{'random','lamp','fpgm'}==set(FORMULAS)

def test_needs_are_parameter_names():
    assert needs('magnitude')==set() and needs('grasp')=={'hess_grad'} and needs(lambda w, name, act, grad=None: w)=={'act','grad'}
    assert needs(lambda w, *args, lr=.1, **kwargs: w)==set()
    with pytest.raises(ValueError, match="asks for 'salience', which nobody measures. Nearest: 'saliency'"): needs(lambda w, salience: w)

def test_scores_name_what_is_missing():
    ws = dict(a=rand(2, 3))
    with pytest.raises(ValueError, match="needs the statistic 'saliency'.*probe"): Scores(ws, 'taylor')
    with pytest.raises(ValueError, match="'saliency' of layer 'a', there is none"): Scores(ws, 'taylor', dict(saliency={}))['a']
    for stat,shape in dict(grad=(3, 2), w0=(2,), act=(3,), in_norm=(2,), zeros=(2, 3)).items():
        with pytest.raises(ValueError, match=f"'{stat}' of layer 'a' has shape"):
            Scores(ws, dict(grad='snip', w0='distance', act='mean_activation', in_norm='wanda', zeros='apoz')[stat], {stat: dict(a=torch.zeros(shape))})['a']

def test_scores_are_computed_when_asked_for():
    asked = []
    def noting(w, name): asked.append(name); return w
    sc = Scores(dict(a=rand(2), b=rand(2)), noting)
    assert asked==[] and list(sc)==['a','b']
    sc['b'], sc['b']
    assert asked==['b','b']
    assert not Scores(dict(a=nn.Parameter(rand(2, 2))))['a'].requires_grad

# layout

@pytest.mark.parametrize('groups', [1, 2])
@pytest.mark.parametrize('nd', [1, 2, 3])
def test_transposed_convolutions_have_output_channels_first(nd, groups):
    m = getattr(nn, f'ConvTranspose{nd}d')(4, 6, 2, groups=groups, bias=False)
    w = m.weight.detach()
    f = out_first(w, m)
    assert f.shape==(6, 4//groups, *[2]*nd) and torch.equal(out_first_back(f, m), w)
    x = rand(1, 4, *[3]*nd)
    for o in range(6): # what is zero in row o of the common layout is zero in output o, and nowhere else
        g = f.clone(); g[o] = 0
        out = getattr(F, f'conv_transpose{nd}d')(x, out_first_back(g, m), groups=groups)
        assert [bool((c==0).all()) for c in out[0]]==[i==o for i in range(6)]

def test_statistics_are_turned_with_their_weight():
    m = nn.ConvTranspose2d(4, 4, 2, groups=2); w,g = m.weight.detach(),rand(4, 2, 2, 2)
    for c,stat,want in ('snip', 'grad', (w*g).abs()), ('movement', 'pull', g), ('distance', 'w0', (w-g).abs()):
        assert torch.equal(out_first_back(Scores(dict(l=w), c, {stat: dict(l=g)}, dict(l=m))['l'], m), want)

def test_other_layers_are_not_turned():
    m = nn.Conv2d(4, 6, 3, groups=2)
    assert out_first(m.weight, m) is m.weight and out_first(m.weight) is m.weight

# gradients

def test_gradients_of_two_layers_by_hand():
    net = nn.Sequential(nn.Linear(3, 4, bias=False), nn.Tanh(), nn.Linear(4, 2, bias=False)).double()
    data = [(rand(5, 3, seed=i).double(), rand(5, 2, seed=9+i).double()) for i in range(3)]
    V,W = [m.weight.detach() for m in (net[0], net[2])]
    gv,gw = [],[]
    for x,y in data:
        h = (x@V.T).tanh()
        d = 2*(h@W.T-y)/y.numel()
        gw.append(d.T@h); gv.append((d@W*(1-h**2)).T@x)
    got = probe(net, data, F.mse_loss, weights(net), {'grad','saliency','pull'})
    for n,w,g in ('0', V, torch.stack(gv)), ('2', W, torch.stack(gw)):
        close(got['grad'][n], g.mean(0).float(), 1e-6)
        close(got['saliency'][n], (w*g).square().mean(0).float(), 1e-6)
        close(got['pull'][n], -(w*g).sum(0).float(), 1e-6)

def test_gather_in_a_loop_is_what_probe_measures():
    net = Net().eval()
    ws,loop = weights(net),Gather(weights(net))
    for (x,),(y,) in batches(3):
        net.zero_grad(); F.cross_entropy(net(x), y).backward(); loop.step_()
    net.train()
    for m in net.modules(): m.eval()
    net.training = True # so that its batch norms count as frozen
    for s,got in probe(net, batches(3), F.cross_entropy, ws, {'grad','saliency','pull'}).items():
        for n in ws: close(got[n], loop.stats()[s][n], 1e-6)

def test_gather_skips_layers_without_gradient_and_forgets_its_window():
    a,b = nn.Parameter(rand(3)),nn.Parameter(rand(3))
    g = Gather(dict(a=a, b=b))
    a.grad = torch.ones(3); g.step_()
    assert set(g.stats()['grad'])=={'a'}
    a.grad,b.grad = None,torch.ones(3); g.step_()
    close(g.stats()['grad']['a'], torch.full((3,), .5)); close(g.stats()['grad']['b'], torch.full((3,), .5))
    g.reset_()
    assert g.count==0 and g.stats()['grad']=={} and g.stats()['saliency']=={}
    close(g.stats()['pull']['b'], -b.detach())

def test_half_precision_is_summed_in_float32():
    w = nn.Parameter(torch.ones(2, dtype=torch.bfloat16)); g = Gather(dict(a=w))
    for _ in range(512): w.grad = torch.full((2,), 1.0078125, dtype=torch.bfloat16); g.step_()
    assert g.stats()['grad']['a'].dtype==torch.float32
    close(g.stats()['grad']['a'], torch.full((2,), 1.0078125), 1e-6)

def test_hess_grad_is_torchs_hvp():
    net = nn.Sequential(nn.Conv2d(2, 3, 2), nn.Tanh(), nn.Flatten(), nn.Linear(12, 3)).double()
    data = [(rand(4, 2, 3, 3, seed=i).double(), torch.tensor([0, 1, 2, 0])) for i in range(2)]
    ws = weights(net)
    def loss(*vs): return sum(F.cross_entropy(functional_call(net, {f'{n}.weight': v for n,v in zip(ws, vs)}, (x,)), y) for x,y in data)/2
    at = tuple(w.detach() for w in ws.values())
    g = torch.autograd.functional.jacobian(loss, at)
    want = torch.autograd.functional.hvp(loss, at, g)[1]
    for got,h in zip(probe(net, data, F.cross_entropy, ws, {'hess_grad'})['hess_grad'].values(), want): close(got, h.float(), 1e-5)

def test_grasp_score_is_half_the_change_of_gradient_flow():
    net = nn.Linear(3, 1, bias=False); data = [(rand(8, 3), rand(8, 1, seed=1))]
    model = nn.Sequential(net); ws = weights(model)
    s = Scores(ws, 'grasp', probe(model, data, F.mse_loss, ws, {'hess_grad'}))['0']
    def flow(w): return torch.autograd.functional.jacobian(lambda v: F.mse_loss(data[0][0]@v.T, data[0][1]), w).square().sum()
    w,eps = ws['0'].detach(),1e-3
    for i in range(3):
        d = torch.zeros_like(w); d[0,i] = eps*w[0,i]
        close((flow(w+d)-flow(w-d))/(2*eps)/2, s[0,i], 1e-2)

def test_hess_grad_of_hard_sigmoid_and_attention():
    timm = pytest.importorskip('timm')
    for name,kw in ('mobilenetv3_small_050', {}), ('vit_tiny_patch16_224', dict(img_size=32)):
        torch.manual_seed(0)
        model = timm.create_model(name, num_classes=4, **kw)
        ws = dict(list(weights(model).items())[:5])
        h = probe(model, [(rand(2, 3, 32, 32), torch.tensor([0, 1]))], F.cross_entropy, ws, {'hess_grad'})['hess_grad']
        assert all(v.isfinite().all() and v.any() for v in h.values()), name

def test_gradients_use_batch_statistics_but_no_dropout():
    net = Net()
    a,b = [probe(net, batches(), F.cross_entropy, weights(net), {'grad'})['grad'] for _ in range(2)]
    assert all(torch.equal(a[n], b[n]) for n in a)
    net.eval()
    c = probe(net, batches(), F.cross_entropy, weights(net), {'grad'})['grad']
    assert all(torch.equal(a[n], c[n]) for n in a) # a model in evaluation mode is measured alike
    net.train(); net.bn.eval(); net.bna.eval()     # batch norms frozen within a model that trains stay so
    d = probe(net, batches(), F.cross_entropy, weights(net), {'grad'})['grad']
    ref = Net().eval(); gs = [torch.autograd.grad(F.cross_entropy(ref(x), y), ref.a.weight)[0] for (x,),(y,) in batches()]
    close(d['a'], sum(gs)/2, 1e-5)
    assert not torch.allclose(d['a'], a['a'], atol=1e-4)

def test_what_the_loss_does_not_reach_is_named():
    net = Net(); net.unused = nn.Linear(3, 3)
    for stat in 'grad','hess_grad':
        with pytest.raises(ValueError, match="doesn't depend on 'unused'"): probe(net, batches(), F.cross_entropy, weights(net), {stat})
    for stat in 'act','in_norm':
        with pytest.raises(ValueError, match="didn't call 'unused'"): probe(net, batches(), None, weights(net), {stat})

# the model is left alone

ALL = {'grad','saliency','pull','hess_grad','in_norm','zeros','act'}

def snapshot(net):
    return dict(state={k: v.clone() for k,v in net.state_dict().items()}, grads={n: p.grad if p.grad is None else p.grad.clone() for n,p in net.named_parameters()},
                req=[p.requires_grad for p in net.parameters()], flags=[m.training for m in net.modules()], rng=torch.get_rng_state().clone(),
                hooks=[(len(m._forward_hooks), len(m._forward_hooks_with_kwargs), len(m._forward_pre_hooks)) for m in net.modules()], ids=[id(b) for b in net.buffers()])

def same(a, b):
    for k in ('req','flags','hooks','ids'): assert a[k]==b[k], k
    assert torch.equal(a['rng'], b['rng'])
    for k in a['state']: assert torch.equal(a['state'][k], b['state'][k]), k
    for k,g in a['grads'].items(): assert (g is None)==(b['grads'][k] is None) and (g is None or torch.equal(g, b['grads'][k])), k

def used_net():
    net = Net().train()
    net.bna.eval(); net.a.weight.requires_grad_(False)
    (x,),(y,) = batches(1)[0]
    F.cross_entropy(net(x), y).backward()
    return net

def test_probe_leaves_the_model_as_it_was():
    net = used_net(); was = snapshot(net)
    ids = {n: id(p.grad) for n,p in net.named_parameters()}
    got = probe(net, batches(), F.cross_entropy, weights(net), ALL)
    same(was, snapshot(net))
    assert {n: id(p.grad) for n,p in net.named_parameters()}==ids and set(got)==ALL
    with torch.no_grad(): assert set(probe(net, batches(), F.cross_entropy, weights(net), {'grad'}))=={'grad'}

@pytest.mark.parametrize('wanted', ['grad', 'hess_grad', 'act', 'in_norm', 'norm_scale'])
def test_and_after_an_exception(wanted):
    net = used_net(); was = snapshot(net)
    def boom(x): torch.rand(3); raise RuntimeError('boom')
    net.drop.forward = boom
    with pytest.raises(RuntimeError, match='boom'): probe(net, batches(3), F.cross_entropy, weights(net), {wanted})
    same(was, snapshot(net))
    del net.drop.forward
    with pytest.raises(RuntimeError, match='boom'): probe(net, batches(3), lambda p,y: boom(p), weights(net), {wanted, 'grad'} - {'norm_scale'})
    same(was, snapshot(net))

def test_frozen_layers_are_measured():
    net,ref = Net(),Net()
    for p in net.parameters(): p.requires_grad_(False)
    a,b = [probe(m, batches(), F.cross_entropy, weights(m), {'grad','hess_grad'}) for m in (net, ref)]
    for s in a:
        for n in a[s]: assert torch.equal(a[s][n], b[s][n]) and a[s][n].any()
    assert not any(p.requires_grad for p in net.parameters())

# activations and inputs

def test_zeros_and_act_by_hand():
    net = Net().eval(); data = batches()
    with torch.no_grad():
        x = torch.cat([x for (x,),_ in data])
        h = F.relu(net.bn(net.stem(x)))
        y = F.relu(net.bna(net.a(h))+net.short(h))
        out = net.fc(F.gelu(y).mean((2,3)))
    want = dict(stem=h, a=y, short=y, fc=out[...,None,None])
    got = probe(net, data, None, weights(net), {'zeros','act'})
    for n,a in want.items():
        close(got['zeros'][n], (a==0).float().mean((0,2,3)))
        close(got['act'][n], a.abs().mean((0,2,3)))
    assert 0<got['zeros']['stem'].mean()<1

def test_the_normed_output_counts_where_no_activation_follows():
    net = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Conv2d(4, 2, 1)).eval()
    nn.init.constant_(net[1].bias, 3.)
    x = rand(2, 3, 4, 4)
    got = probe(net, [(x, ())], None, weights(net), {'act'})['act']
    close(got['0'], net[:2](x).detach().abs().mean((0,2,3))); close(got['2'], net(x).detach().abs().mean((0,2,3)))

def test_a_layer_called_twice_counts_both_calls():
    class Twice(nn.Module):
        def __init__(self): super().__init__(); self.l = nn.Linear(3, 3)
        def forward(self, x): return self.l(self.l(x).relu()).sigmoid()
    net = Twice(); x = rand(5, 3)
    a = net.l(x).relu(); b = net.l(a).sigmoid()
    got = probe(net, [(x, ())], None, weights(net), {'act','in_norm'})
    close(got['act']['l'], torch.cat([a, b]).mean(0).detach())
    close(got['in_norm']['l'], torch.cat([x, a]).square().sum(0).sqrt().detach())

@pytest.mark.parametrize('layer,shape', [(lambda: nn.Conv2d(4, 6, 1, groups=2), (4,3,3)), (lambda: nn.Conv2d(4, 4, 1, groups=4), (4,3,3)), (lambda: nn.Conv1d(4, 3, 1), (4,5)),
    (lambda: nn.ConvTranspose2d(4, 6, 1, groups=2), (4,3,3)), (lambda: nn.ConvTranspose2d(4, 4, 1), (4,3,3)), (lambda: nn.Linear(4, 3), (2,4))])
def test_wanda_is_what_a_weight_adds_to_the_output(layer, shape):
    m = layer(); nn.init.zeros_(m.bias)
    net = nn.Sequential(m); data = [(rand(2, *shape, seed=i)*torch.arange(1., 5).view(4, *[1]*(len(shape)-1)) if len(shape)>2 else rand(2, *shape, seed=i), ()) for i in range(2)]
    ws,mods = weights(net),{'0': m}
    s = out_first_back(Scores(ws, 'wanda', probe(net, data, None, ws, {'in_norm'}), mods)['0'], m)
    w = m.weight.detach().clone()
    for i in range(w.numel()):
        one = torch.zeros_like(w); one.view(-1)[i] = w.view(-1)[i]
        m.weight.data = one
        close(torch.cat([net(x).detach().flatten() for x,_ in data]).norm(), s.reshape(-1)[i])

def test_in_norm_refuses_what_has_no_input_features():
    class Emb(nn.Module):
        def __init__(self): super().__init__(); self.emb,self.l = nn.Embedding(3, 3),nn.Linear(3, 3)
        def forward(self, i): return self.l(self.emb(i))
    net = Emb(); data = [(torch.tensor([[0, 1]]), ())]
    with pytest.raises(ValueError, match="'emb' is an embedding.*exclude="): probe(net, data, None, dict(emb=net.emb.weight), {'in_norm'})
    close(probe(net, data, None, dict(l=net.l.weight), {'in_norm'})['in_norm']['l'], net.emb.weight[:2].detach().norm(dim=0))
    rnn = nn.Sequential(nn.LSTM(4, 4))
    with pytest.raises(ValueError, match='one of several weights of a LSTM'): probe(rnn, [(rand(2, 3, 4), ())], None, {'0.weight_hh_l0': rnn[0].weight_hh_l0}, {'in_norm'})

def test_norm_params_are_those_that_follow():
    net = Net()
    ws = {n: w for n,w in weights(net).items() if n in ('stem','a')}
    found = norm_params(net, batches(), ws)
    assert found['stem'] is net.bn.weight and found['a'] is net.bna.weight
    with torch.no_grad(): net.bn.weight.neg_()
    close(probe(net, batches(), None, ws, {'norm_scale'})['norm_scale']['stem'], net.bn.weight.detach().abs())
    with pytest.raises(ValueError, match="follows 'short', 'fc'. Leave them out with exclude="): norm_params(net, batches(), weights(net))

def test_the_first_norm_is_the_one_that_counts():
    net = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.Dropout(), nn.BatchNorm1d(4))
    assert norm_params(net, [(rand(5, 3), ())], weights(net))['0'] is net[1].weight

@pytest.mark.parametrize('name,kw,n_act,n_norm', [('resnet18', {}, 20, 20), ('mobilenetv3_small_050', {}, 42, 34), ('vit_tiny_patch16_224', dict(img_size=32), 12, 24)])
def test_timm_models(name, kw, n_act, n_norm):
    timm = pytest.importorskip('timm')
    torch.manual_seed(0)
    net = timm.create_model(name, num_classes=4, **kw)
    ws,data = weights(net),[(rand(2, 3, 32, 32), ())]
    was = snapshot(net)
    got = probe(net, data, None, ws, {'zeros','act','in_norm'})
    same(was, snapshot(net))
    assert all(set(v)==set(ws) for v in got.values())
    for c in 'apoz','mean_activation','wanda': assert all(s.isfinite().all() for s in Scores(ws, c, got).values())
    from fastcompress.prune.probe import _calls
    calls = _calls(net, data, ws, weight_layers(net))
    assert len({o.name for o in calls if o.done})==n_act and len({o.name for o in calls if o.scale is not None})==n_norm

def test_relu_of_a_timm_resnet_is_the_one_seen():
    timm = pytest.importorskip('timm')
    torch.manual_seed(0)
    net = timm.create_model('resnet18', num_classes=4).eval(); x = rand(2, 3, 32, 32)
    seen = {}
    for n in 'act1','layer1.0.act1','layer2.0.act2': net.get_submodule(n).register_forward_hook(lambda m,i,o,n=n: seen.__setitem__(n, o.detach().clone()))
    ws = {n: net.get_submodule(n).weight for n in ('conv1','layer1.0.conv1','layer2.0.conv2','layer2.0.downsample.0')}
    got = probe(net, [(x, ())], None, ws, {'zeros'})['zeros']
    for n,act in zip(ws, ['act1','layer1.0.act1','layer2.0.act2','layer2.0.act2']): close(got[n], (seen[act]==0).float().mean((0,2,3)))

# allocation

shapes = st.lists(st.tuples(st.integers(1, 40), st.integers(1, 40), st.integers(1, 3)), min_size=1, max_size=8)
def layers(shapes): return {f'l{i}': torch.zeros(o, n, k, k) for i,(o,n,k) in enumerate(shapes)}
def removed(fracs, ws): return {o: round(f*ws[o].numel()) for o,f in fracs.items()}
def size(ws): return sum(w.numel() for w in ws.values())

@settings(max_examples=100, deadline=None)
@given(shapes, st.floats(0, 1))
def test_allocations_are_exact_and_in_range(shapes, sparsity):
    ws = layers(shapes)
    for f in uniform,erk:
        fracs = f(ws, sparsity)
        assert set(fracs)==set(ws) and all(0<=v<=1 for v in fracs.values())
        assert sum(removed(fracs, ws).values())==round(sparsity*size(ws))
    for v,w in zip(uniform(ws, sparsity).values(), ws.values()): assert abs(v*w.numel()-sparsity*w.numel())<=1+1e-6

@settings(max_examples=100, deadline=None)
@given(shapes, st.floats(.05, .95))
def test_erk_keeps_in_proportion_to_the_sum_of_dimensions(shapes, sparsity):
    ws = layers(shapes); fracs = erk(ws, sparsity)
    kept = {o: ws[o].numel()-removed(fracs, ws)[o] for o in ws}
    eps = {o: kept[o]/sum(ws[o].shape) for o in ws}
    loose = [o for o in ws if kept[o]<ws[o].numel()]
    for a in loose:
        for b in ws: # among layers that give, the ratio is the same within a weight; dense layers would keep more if they could
            if b in loose: assert abs(eps[a]-eps[b]) <= 1.001*(1/sum(ws[a].shape)+1/sum(ws[b].shape))
            else: assert eps[b] <= eps[a]+1.001*(1/sum(ws[a].shape)+1/sum(ws[b].shape))

@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(1, 300), min_size=2, max_size=5), st.floats(0, .9), st.integers(0, 99), st.floats(.01, 1))
def test_anneal_keeps_total_and_bounds(sizes, sparsity, seed, step):
    ws = {f'l{i}': torch.zeros(n) for i,n in enumerate(sizes)}
    most = {o: math.floor(.95*w.numel()+1e-9) for o,w in ws.items()}
    if any(k>most[o] for o,k in removed(uniform(ws, sparsity), ws).items()): return
    seen = []
    def quality(f): seen.append(dict(f)); return -sum((i+1)*v for i,v in enumerate(f.values()))
    res = anneal(quality, ws, sparsity, n_iter=30, seed=seed, step=step, max_frac=.95, show=False)
    for f in [*seen, res.best]:
        n = removed(f, ws)
        assert sum(n.values())==round(sparsity*size(ws)) and all(0<=n[o]<=most[o] for o in n)
    assert res.quality>=res.start and res.quality==max(-sum((i+1)*v for i,v in enumerate(f.values())) for f in seen)
    assert len(res.history)==30 and [o['best'] for o in res.history]==sorted(o['best'] for o in res.history)

def test_anneal_finds_a_known_optimum_whatever_the_unit():
    ws = dict(a=torch.zeros(100), b=torch.zeros(100), c=torch.zeros(100))
    small,big = [anneal(lambda f: -unit*f['a']**2, ws, .5, n_iter=200, show=False) for unit in (2**-20, 2**20)]
    assert small.best['a']==0 and small.start==-2**-20*.25 # all of the cost is in 'a': nothing should go there
    assert small.best==big.best and [o['taken'] for o in small.history]==[o['taken'] for o in big.history]
    assert not all(o['taken'] for o in small.history)

def test_a_temperature_of_zero_never_takes_a_step_down():
    ws = dict(a=torch.zeros(50), b=torch.zeros(50))
    hills = lambda f: math.cos(40*f['a'])
    def path(res):
        q,out = res.start,[]
        for h in res.history:
            if h['taken']: out.append(h['quality']>=q); q = h['quality']
        return out
    assert all(path(anneal(hills, ws, .5, t0=0, show=False)))
    assert not all(path(anneal(hills, ws, .5, t0=1, show=False)))

def test_anneal_leaves_global_generators_alone():
    import random
    ws = dict(a=torch.zeros(50), b=torch.zeros(50)); was = random.getstate(),torch.get_rng_state()
    anneal(lambda f: f['a'], ws, .5, n_iter=5, show=False)
    assert random.getstate()==was[0] and torch.equal(torch.get_rng_state(), was[1])

def test_masked_quality_masks_and_restores():
    net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.ConvTranspose1d(8, 8, 3, groups=2)); was = snapshot(net)
    seen = {}
    def measure(m):
        seen.update({n: w.detach().clone() for n,w in weights(m).items()})
        return 1.
    assert masked_quality(net, measure)({'0': .5, '2': .25})==1.
    same(was, snapshot(net))
    for n,k in {'0': 16, '2': 24}.items():
        w = was['state'][f'{n}.weight'].flatten()
        want = w.clone(); want[w.abs().argsort()[:k]] = 0
        assert torch.equal(seen[n].flatten(), want)
    with pytest.raises(ZeroDivisionError): masked_quality(net, lambda m: 1/0)({'0': .5})
    same(was, snapshot(net))
