"Learned steps against the paper's formula, ranges that follow, noise, widths; on small nets, timm's gamma = 0, shared grids"
import copy, io, math
import pytest, timm, torch
from hypothesis import assume, given, settings, strategies as st
from torch import nn, tensor
from fastcompress.prune.remove import reestimate_norms_
from fastcompress.quantize.affine import QParams, affine_qparams, fake_quant, symmetric_qparams, zero_scale
from fastcompress.quantize.learned import (LSQ, MovingRange, Noise, WeightRange, adapt_, base, clip_step, fix_, fix_scale_, freeze_ranges_, grid_ends,
                                           keep_positive_, learn_scale_, learned, load_moving_, lsq, lsq_init, moving_state, newton_clip, set_bits_, set_range_, settle_)
from fastcompress.quantize.observe import mse_amax
from fastcompress.quantize.place import Weight
from fastcompress.quantize.simulate import Quantizer, calibrate_, sim_mode, simulate_, simulation

pytestmark = pytest.mark.usefixtures('one_thread')
def gen(seed=0): return torch.Generator().manual_seed(seed)
def randn(*shape, seed=0): return torch.randn(*shape, generator=gen(seed))
def act(lo, hi, bits=8, key='a'):
    q = Quantizer(key, bits); q.set_(affine_qparams(lo, hi, bits)); return q
def weight(amax, bits=4, axis=0):
    q = Quantizer('w', bits, Weight(len(amax), axis)); q.set_(symmetric_qparams(tensor(amax), bits, axis=axis)); return q

def paper(v, s, qn, qp):
    "LSQ eq. 3 and 5, number by number"
    u = v/s
    if u<=-qn: return -qn, 0.
    if u>=qp: return qp, 0.
    return round(u)-u, 1. # Python's round: ties to even

# ---- LSQ

@settings(max_examples=60, deadline=None)
@given(st.integers(2, 8), st.floats(0.01, 3.), st.integers(0, 1000), st.floats(0., 1.))
def test_gradients_are_the_papers(bits, s, seed, where):
    qmax = 2**bits-1
    z,v,g = round(where*qmax),randn(64, seed=seed)*s*qmax/2,randn(64, seed=seed+1)
    step,x = tensor(s, requires_grad=True),v.clone().requires_grad_()
    y = lsq(x, QParams(step, tensor(z, dtype=torch.int32), 0, qmax), 0.25)
    y.backward(g)
    assert torch.equal(y, fake_quant(v, QParams(tensor(s), tensor(z, dtype=torch.int32), 0, qmax)))
    s32 = tensor(s).item()
    rows = [paper(o.item(), s32, z, qmax-z) for o in v]
    near = torch.tensor([min(abs(o.item()/s32+z), abs(o.item()/s32-(qmax-z)), abs(o.item()/s32%1-.5))<1e-3 for o in v]) # float32 may fall on the other side
    g = g.masked_fill(near, 0); step.grad = x.grad = None
    lsq(x, QParams(step, tensor(z, dtype=torch.int32), 0, qmax), 0.25).backward(g)
    want = 0.25*sum(a*o.item() for (a,_),o in zip(rows, g))
    assert step.grad.item()==pytest.approx(want, rel=1e-3, abs=1e-3*qmax)
    assert torch.equal(x.grad, g*tensor([b for _,b in rows]))

def test_on_the_ends_of_the_grid():
    "v/s = Q_P and -Q_N count as outside, as the paper has it; zero on a grid that begins there too"
    s,x = tensor(.5, requires_grad=True),tensor([3.5, -3.5], requires_grad=True)
    lsq(x, QParams(s, tensor(0), -7, 7)).backward(tensor([1., -1.]))
    assert s.grad==14 and (x.grad==0).all()

@pytest.mark.parametrize('axis', [0, 1])
def test_each_channel_gets_its_own_gradient(axis):
    w,s = randn(3, 4, 5),tensor([.2, .1, .4, .3][:3 if axis==0 else 4])
    step = s.clone().requires_grad_()
    lsq(w, QParams(step, torch.zeros(len(s), dtype=torch.int32), -7, 7, axis)).square().sum().backward()
    for i in range(len(s)):
        one = s[i].clone().requires_grad_()
        lsq(w.select(axis, i), QParams(one, tensor(0), -7, 7)).square().sum().backward()
        assert torch.allclose(step.grad[i], one.grad, rtol=1e-5)

def test_inside_the_grid_it_is_torchs():
    x,s = randn(500).clamp(-1, 1),tensor([.1])
    a,b,xa,xb = s.clone().requires_grad_(),s.clone().requires_grad_(),x.clone().requires_grad_(),x.clone().requires_grad_()
    lsq(xa, QParams(a, tensor([0], dtype=torch.int32), -127, 127)).square().sum().backward()
    torch._fake_quantize_learnable_per_tensor_affine(xb, b, tensor([0.]), -127, 127, 1.).square().sum().backward()
    assert torch.allclose(a.grad, b.grad, rtol=1e-4) and torch.allclose(xa.grad, xb.grad)

@pytest.mark.parametrize('kind', ['weight','act'])
def test_the_gradients_factor(kind):
    "1/sqrt(N Q_P): N weights a step; N numbers of one sample"
    q = weight([1., 1.]) if kind=='weight' else act(0., 1., 4)
    q.how,x = LSQ(q),randn(2, 3, 5, 5, seed=1)
    q.how(q, x).sum().backward()
    ref = q.scale.detach().clone().requires_grad_()
    lsq(x, QParams(ref, q.zero_point, q.qmin, q.qmax, q.axis)).sum().backward()
    assert torch.allclose(q.scale.grad, ref.grad/math.sqrt(75*(7 if kind=='weight' else 15)), rtol=1e-5)

def test_the_longer_side_of_a_grid_with_a_zero_point():
    q = act(-3., 1., 8); assert LSQ(q).top==int(q.zero_point)==191

def test_first_step():
    v = randn(4, 10)
    assert torch.allclose(lsq_init(v, 7), 2*v.abs().mean()/7**.5)
    assert torch.allclose(lsq_init(v, 7, 1), 2*v.abs().mean(0)/7**.5)
    q = weight([9., 9., 9., 9.]); q.how = LSQ(q, 'lsq'); q.how(q, v)
    assert torch.allclose(q.scale, lsq_init(v, 7, 0)) and torch.allclose(q.how.floor, q.scale/64)
    before = q.scale.clone(); q.how(q, v*5); assert torch.equal(q.scale, before)
    q = weight([9., 9., 9., 9.]); q.how = LSQ(q, 'lsq'); q.how(q, v*float('nan')); assert torch.allclose(q.scale, tensor([9/7]*4))

def test_steps_stay_positive_and_zero_on_the_grid():
    q = act(-1., 3., 4); q.how = LSQ(q); z = q.zero_point.clone()
    opt = torch.optim.SGD([q.scale], 100.)
    for i in range(20):
        q.how(q, randn(200, seed=i)).mul(randn(200, seed=i+50)).sum().backward(); opt.step(); opt.zero_grad(); keep_positive_(q)
        assert q.scale>0 and torch.equal(q.zero_point, z) and fake_quant(tensor(0.), q.qparams).item()==0

def test_frozen_steps_get_zeros_not_nothing(): # DistributedDataParallel waits for every gradient
    q = weight([1.]); q.how = LSQ(q); q.how.frozen = True
    q.how(q, randn(1, 9)).sum().backward()
    assert torch.equal(q.scale.grad, tensor([0.]))

def test_float32_under_autocast():
    q,x = act(-1., 1.),randn(3, 3).bfloat16().requires_grad_()
    for how in LSQ(q), MovingRange(q):
        q.how = how
        with torch.autocast('cpu', torch.bfloat16): y = q.fake(x)
        assert y.dtype==torch.float32 and torch.equal(y, fake_quant(x.float(), q.qparams))
        y.sum().backward(); assert x.grad.dtype==torch.bfloat16 and q.scale.dtype==torch.float32

def test_the_scale_as_a_parameter():
    q = weight([1., 2.]); keys,state = list(q.state_dict()),copy.deepcopy(q.state_dict())
    p = learn_scale_(q)
    assert learn_scale_(q) is p and list(q.state_dict())==keys and isinstance(p, nn.Parameter)
    twin = copy.deepcopy(q); twin.scale.data.mul_(2)
    q.load_state_dict(twin.state_dict()); assert torch.equal(p, state['scale']*2) and q.scale is p
    q.set_(symmetric_qparams(tensor([7., 7.]), 4, axis=0)); assert torch.equal(p, tensor([1., 1.])) and p.requires_grad
    file = io.BytesIO(); torch.save(q.state_dict(), file); file.seek(0)
    fix_scale_(q)
    assert not list(q.parameters()) and list(q.state_dict())==keys
    twin = weight([3., 3.]); twin.load_state_dict(torch.load(file)); assert torch.equal(twin.scale, q.scale)

# ---- ranges

def test_the_average_is_a_moving_one():
    q = act(0., 1.); how = MovingRange(q, momentum=.25)
    his,mean = [1., 2., 4., 3., 9., 1., 5.],0.
    for n,hi in enumerate(his, 1):
        how(q, tensor([-hi/2, hi])); mean += max(.25, 1/n)*(hi-mean)
        assert how.mean[1].item()==pytest.approx(mean) and how.mean[0].item()==pytest.approx(-mean/2)
    part = q.how # not attached: the grid is ours alone
    assert part is None and q.scale.item()*255==pytest.approx(mean*how.part[1].item()+mean/2*how.part[0].item(), rel=1e-5)

@settings(max_examples=60, deadline=None)
@given(st.floats(-1e4, 0), st.floats(0, 1e4), st.integers(2, 8))
def test_the_quick_grid_is_the_careful_one(lo, hi, bits):
    assume(hi-lo==0 or hi-lo>1e-30) # the quick one computes in float32
    q,want = Quantizer('a', bits),affine_qparams(tensor(lo).item(), tensor(hi).item(), bits)
    set_range_(q, tensor(lo), tensor(hi))
    assert torch.allclose(q.scale, want.scale, rtol=1e-5) and abs(int(q.zero_point)-int(want.zero_point))<=1 and q.qmin<=int(q.zero_point)<=q.qmax

@pytest.mark.parametrize('how', [lambda q: MovingRange(q), lambda q: WeightRange('minmax', 1)])
def test_still_in_evaluation_and_frozen_and_unmoved_by_nan(how):
    q = act(0., 1.) if how(act(0., 1.)).__class__ is MovingRange else weight([1., 1.])
    q.how,x = how(q),randn(2, 8)
    for _ in range(20): q.fake(x)
    before = q.scale.clone()
    q.eval(); q.fake(x*9); assert torch.equal(q.scale, before)
    q.train(); q.fake(x*float('nan')); assert torch.allclose(q.scale, before)
    base(q).frozen = True; before = q.scale.clone(); q.fake(x*9); assert torch.equal(q.scale, before)
    base(q).frozen = False; q.fake(x*9); assert not torch.equal(q.scale, before)

def test_an_empty_batch_and_nan_first():
    q = act(0., 1.); q.how = MovingRange(q)
    q.fake(torch.zeros(0, 3)); q.fake(tensor([float('inf')])); assert q.how.n==0
    q.fake(tensor([0., 1.])); assert q.how.n==1 and q.scale.isfinite()

@pytest.mark.parametrize('bits', [2, 3, 4, 8])
@pytest.mark.parametrize('kind', ['gauss','laplace','sparse','few'])
def test_newton_finds_the_search_result(bits, kind):
    w = randn(6, 9 if kind=='few' else 800)
    if kind=='laplace': w = w.sign()*-torch.rand(w.shape, generator=gen(1)).clamp(min=1e-6).log()
    if kind=='sparse': w = w*(torch.rand(w.shape, generator=gen(1))<.2)
    qmax = 2**(bits-1)-1
    def err(c): return (w-fake_quant(w, symmetric_qparams(c, bits, axis=0))).square().sum()
    search = mse_amax(w, qmax)
    found = newton_clip(w, search, qmax, 8)
    slack = 1.35 if kind=='few' or (bits==2 and kind!='gauss') else 1.1 # with so few numbers or levels, the uniform error of the formula is a guess
    assert err(found)<slack*err(search) and err(newton_clip(w, w.abs().amax(1)*3, qmax, 15))<slack*err(search)

def test_one_newton_step_by_hand():
    c = clip_step(tensor([[1., 2., 4., 6., 0.]]), tensor([3.]), 1) # outside 4 and 6; inside 1 and 2; zero isn't counted
    assert c.item()==pytest.approx(10/(2/12+2))

def test_a_transposed_weight():
    q = weight([1., 1., 1.], axis=1); q.how = WeightRange('minmax'); w = randn(2, 3, 4)
    q.fake(w); assert torch.allclose(q.scale*7, w.abs().amax((0, 2)))
    q = weight([9., 9., 9.], axis=1); q.how = LSQ(q, 'lsq'); q.fake(w).sum().backward()
    assert torch.allclose(q.scale, 2*w.abs().mean((0, 2))/7**.5) and q.scale.grad.shape==(3,)

def test_zeros_of_a_weight_are_zeros():
    w = randn(4, 50); w[:, ::3] = 0; w[2] = 0
    for how in (lambda q: LSQ(q)), (lambda q: WeightRange()), (lambda q: Noise(WeightRange(), .5)):
        q = weight([1., 1., 0., 1.]); q.how = how(q)
        for _ in range(3): y = q.fake(w)
        assert (y[w==0]==0).all() and y.isfinite().all() and (y[0]!=0).any()

# ---- noise, widths

@pytest.mark.parametrize('block', [1, 7])
def test_noise(block):
    torch.manual_seed(0)
    q = weight([1.]*40, 2); noise = Noise(None, .3, block); x = (randn(40, 3, 9, 9)*.4).requires_grad_()
    y = noise(q, x); r,full = (y!=x).flatten(1),fake_quant(x, q.qparams)
    assert torch.equal(y.flatten(1)[r], full.flatten(1)[r]) and abs(r.float().mean()-.3)<.03
    y.sum().backward()
    assert torch.equal(x.grad.flatten(1)[~r], torch.ones_like(x.grad.flatten(1)[~r])) and (x.grad[(y!=x) & (x.abs()>1.5)]==0).all()
    if block>1: assert all(len(set(o.tolist()))==1 for o in r[0].split(block)) and len(set(r[0].tolist()))==2
    assert torch.equal(noise.eval()(q, x), full)

@settings(max_examples=50, deadline=None)
@given(st.floats(-50, 0), st.floats(0, 50), st.integers(2, 16), st.integers(2, 16))
def test_another_width_covers_the_same_range(lo, hi, a, b):
    q = act(lo, hi, a); before = grid_ends(q.qparams)
    set_bits_(q, b)
    assert (q.bits,q.qmin,q.qmax)==(b,0,2**b-1) and fake_quant(tensor(0.), q.qparams).item()==0
    assert (grid_ends(q.qparams)-before).abs().max()<=q.scale*.51+1e-5*before.abs().max()
    w = weight([1., 3.], a); set_bits_(w, b); assert torch.allclose(w.scale*w.qmax, tensor([1., 3.])) and (w.zero_point==0).all()

def test_a_known_range_keeps_its_grid():
    q = Quantizer('s', 8, fixed=(0., 1.)); set_bits_(q, 4); assert q.scale.item()==1/16 and q.bits==4

# ---- models

def small():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(32, 5))

def sim_of(m, x, **kw):
    sim = simulate_(m, x, **kw); calibrate_(m, [x], show=False); return sim

@pytest.mark.parametrize('kw', [dict(learned=True), dict(learned='acts'), dict(learned='weights', noise=.2), {}])
def test_adapting_changes_no_evaluation_and_leaves_nothing_behind(kw):
    m,x = small(),randn(8, 3, 8, 8); sim = sim_of(m, x, w_bits=4, a_bits=4)
    y,keys,names = m.eval()(x),list(m.state_dict()),[n for n,_ in m.named_parameters()]
    adapt_(sim, **kw)
    assert torch.equal(m.eval()(x), y) and list(m.state_dict())==keys and all(q.how is not None for q in sim.quantizers.values())
    assert {q.is_weight for q in learned(sim)}=={True:{True,False},'acts':{False},'weights':{True},None:set()}[kw.get('learned')]
    m.train()(x).sum().backward(); m(x*2)
    settle_(sim)
    assert [n for n,_ in m.named_parameters()]==names and list(m.state_dict())==keys and all(q.how is None for q in sim.quantizers.values())

def test_a_shared_grid_is_watched_where_the_tensor_is_made():
    m,x = small(),randn(8, 3, 8, 8); sim = sim_of(m, x); adapt_(sim)
    m.train()(x)
    relu = nn.functional.relu(nn.functional.batch_norm(nn.functional.conv2d(fake_quant(x, sim['input'].qparams), fake_quant(m[0].weight, sim['0:conv2d.weight'].qparams), m[0].bias), None, None, training=True))
    assert base(sim['2:relu']).n==1 and base(sim['2:relu']).mean[1].item()==pytest.approx(relu.max().item(), rel=.02)

def test_a_grid_with_several_makers_covers_them_all():
    class M(nn.Module):
        def __init__(self): super().__init__(); self.a,self.b,self.c = nn.Conv2d(3, 4, 1),nn.Conv2d(3, 4, 1),nn.Conv2d(8, 4, 1)
        def forward(self, x): return self.c(torch.cat([self.a(x), self.b(x)], 1))
    torch.manual_seed(0); m,x = M(),randn(8, 3, 4, 4); m.b.weight.data *= 5
    sim = sim_of(m, x, profile='xnnpack'); adapt_(sim)
    shared = sim['a:conv2d']; assert 'b:conv2d' not in sim.placement.acts
    m.train()(x)
    with sim_mode(m, 'off'): a,b = m.a(x),m.b(x)
    assert base(shared).n==1 and base(shared).mean[1].item()==pytest.approx(max(a.max(), b.max()).item(), rel=.05) and base(shared).mean[0].item()==pytest.approx(min(a.min(), b.min()).item(), rel=.05)

def test_known_and_dynamic_ranges_are_left_alone():
    class M(nn.Module):
        def __init__(self): super().__init__(); self.a = nn.Linear(4, 4)
        def forward(self, x): return torch.sigmoid(self.a(x))
    m,x = M(),randn(8, 4); sim = sim_of(m, x, profile='x86'); adapt_(sim, learned=True)
    fixed = [q for q in sim.quantizers.values() if q.fixed is not None]
    assert len(fixed)==1 and fixed[0].how is None
    m.train()(x*9); freeze_ranges_(sim); settle_(sim); assert fixed[0].scale.item()==1/2**fixed[0].bits
    sim = simulate_(m, x, mode='dynamic'); hows = [q.how for q in sim.quantizers.values()]
    adapt_(sim); settle_(sim)
    assert [q.how for q in sim.quantizers.values() if not q.is_weight]==[h for h in hows if h is not None]

@pytest.mark.parametrize('kw', [dict(learned=True), {}], ids=['lsq','moving'])
@pytest.mark.parametrize('per_channel', [True, False])
def test_residual_branches_that_begin_at_zero(kw, per_channel):
    "timm starts the last BatchNorm of a block at gamma = 0: no NaN, and the branch comes alive"
    torch.manual_seed(0); m = timm.create_model('resnet10t', num_classes=4, zero_init_last=True); x = randn(8, 3, 32, 32)
    y = torch.arange(8)%4
    last = m.layer1[0].bn2; assert (last.weight==0).all()
    names = list(m.parameters())
    reestimate_norms_(m, [x]*2) # fresh statistics say nothing of the activations
    sim = sim_of(m, x, w_bits=4, a_bits=8, per_channel=per_channel); adapt_(sim, **kw)
    blank = [q.key for q in sim.quantizers.values() if not q.is_weight and q.scale<=zero_scale]
    assert any('bn2' in k for k in blank) or not per_channel
    steps = torch.optim.Adam([q.scale for q in learned(sim)], 1e-4) if learned(sim) else None
    opt,losses = torch.optim.SGD(names, .05, momentum=.9),[]
    for _ in range(12):
        loss = nn.functional.cross_entropy(m.train()(x), y); loss.backward()
        assert all(p.grad.isfinite().all() for p in m.parameters() if p.grad is not None)
        opt.step(); opt.zero_grad()
        if steps: steps.step(); steps.zero_grad(); [keep_positive_(q) for q in learned(sim)]
        losses.append(loss.item())
    settle_(sim)
    assert losses[-1]<.7*losses[0] and (last.weight!=0).all() and all(q.scale.isfinite().all() and (q.scale>0).all() for q in sim.quantizers.values())
    assert all(sim[k].scale>zero_scale for k in blank) and m.eval()(x).isfinite().all()

def test_frozen_grids_of_additions_are_inside_the_engines_limits():
    class M(nn.Module):
        def __init__(self): super().__init__(); self.a,self.b = nn.Linear(4, 4),nn.Linear(4, 4)
        def forward(self, x): return self.a(x)+self.b(x)
    m,x = M(),randn(8, 4); sim = sim_of(m, x); adapt_(sim)
    lo,hi = sim.profile.add_ratio; (read,out), = sim.placement.adds
    sim[read[0]].scale.fill_(sim[out].scale.item()*lo/8)
    freeze_ranges_(sim)
    assert all(lo<=sim[k].scale/sim[out].scale<hi for k in read)

@pytest.mark.parametrize('learn', [True, False])
def test_state_of_what_moves_goes_elsewhere(learn):
    m,x = small(),randn(8, 3, 8, 8); sim = sim_of(m, x, a_bits=4); adapt_(sim, learned='acts' if learn else False, every=4)
    for i in range(13): m.train()(randn(8, 3, 8, 8, seed=i)*(1+i/5))
    twin = copy.deepcopy(m); other = simulation(twin); fix_(other); adapt_(other, learned='acts' if learn else False, every=4)
    load_moving_(other, moving_state(sim))
    for i in range(5):
        xs = randn(8, 3, 8, 8, seed=i+99)*6
        assert torch.equal(m(xs), twin(xs))
    assert all(torch.equal(a.scale, b.scale) for a,b in zip(sim.quantizers.values(), other.quantizers.values()))

def test_errors():
    m,x = small(),randn(8, 3, 8, 8); sim = simulate_(m, x)
    with pytest.raises(ValueError, match='not calibrated'): adapt_(sim)
    calibrate_(m, [x], show=False)
    for kw,msg in (dict(learned='x'),"'weights' or 'acts'"),(dict(learned=1.5),"'weights' or 'acts'"),(dict(noise=1),'left unrounded'),(dict(noise=-.1),'left unrounded'),(dict(momentum=0),'newest batch'),(dict(weight_range='mze'),'mse'),(dict(learned=True, init='x'),'calibrated step'):
        with pytest.raises(ValueError, match=msg): adapt_(sim, **kw)
        fix_(sim); assert all(q.how is None for q in sim.quantizers.values()) and not learned(sim)

@pytest.mark.parametrize('bits,axis', [(2, None), (4, 0), (8, None), (8, 0)])
def test_the_quick_backward_pass_is_the_written_one(bits, axis, monkeypatch):
    "At the ends of the grid too, where which side a value is on decides"
    import fastcompress.quantize.learned as mod
    qp = symmetric_qparams(tensor([1., 2., .5]), bits, axis=0) if axis==0 else affine_qparams(-1., 2., bits)
    s,z = qp.shaped(torch.empty(3, 9))
    steps = torch.cat([torch.arange(-3., 4.), tensor([-.5, .5])])
    x = torch.cat([*(((steps+end-z)*s).expand(3, 9) for end in (qp.qmin, qp.qmax)), randn(3, 40)*2], 1)
    def grads():
        a,scale = x.clone().requires_grad_(),qp.scale.clone().requires_grad_()
        y = mod._LSQ.apply(a, scale, qp, .3)
        return y, *torch.autograd.grad((y*torch.arange(y.numel()).view_as(y)).sum(), (a, scale))
    assert mod._ends(qp, qp.zero_point) is not None
    quick = grads()
    monkeypatch.setattr(mod, '_ends', lambda qp,z: None)
    assert all(torch.equal(a, b) for a,b in zip(quick, grads()))
