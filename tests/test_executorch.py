"ExecuTorch files: the reference graph in XNNPACK's words, operation by operation within a step"
import logging, subprocess, sys
import pytest, torch
from torch import nn
import torch.nn.functional as F
from fastcompress.deploy.capture import capture, layer_of, op_of
from fastcompress.deploy.lower import fold_all_
from fastcompress.measure.quality import sqnr
from fastcompress.quantize.simulate import calibrate_, simulate_, simulation
from helpers import learned_scales, timm_model

pytest.importorskip('executorch')
from fastcompress.deploy.executorch import PteModel, Translation, _executorch, check_pte, save_pte
from dataclasses import replace
from fastcompress.quantize.place import profiles

EAGER = replace(profiles['xnnpack'], eager=True) # every kernel that XNNPACK has, also behind float operations

pytestmark = pytest.mark.filterwarnings('ignore')


class Net(nn.Module):
    "Modules by keyword, forward by function"
    def __init__(self, run, **modules):
        super().__init__()
        self.run = run
        for k,m in modules.items(): setattr(self, k, m)
    def forward(self, x): return self.run(self, x)

class Two(Net):
    def forward(self, x, z): return self.run(self, x, z)

def conv(i, o, k=3, **kw): return nn.Conv2d(i, o, k, padding=k//2, **kw)
def rand(*shape): return torch.randn(*shape, generator=torch.Generator().manual_seed(1))

def reference(net, args, tweak=None, **kw):
    simulate_(net.eval(), args, kw.pop('profile', EAGER), **kw)
    calibrate_(net, [args], n_inp=len(args), show=False)
    if tweak: tweak(simulation(net))
    return fold_all_(capture(net, args))

def shipped(net, args, path, tweak=None, **kw):
    "Report, loaded file, simulated output; every operation checked"
    ref = reference(net, args, tweak, **kw)
    checks = check_pte(ref, args, show=False)
    assert len(checks)==sum(op_of(n)=='quantize' for n in ref.graph.nodes)
    assert max(c.steps for c in checks)<=1 and max(c.share for c in checks)<.05
    report = save_pte(ref, path/'m.pte', args, show=False)
    with torch.no_grad(): want = net(*args)
    return report, PteModel(path/'m.pte'), want


def residual(m, x):
    x = F.relu(m.bn(m.a(x)))
    x = F.max_pool2d(F.relu(m.b(x)+x), 2)
    return m.head(m.d(x).flatten(1))

def test_residual_net_in_one_int8_partition(tmp_path):
    torch.manual_seed(0)
    net,x = Net(residual, a=conv(3, 8, bias=False), bn=nn.BatchNorm2d(8), b=conv(8, 8), d=conv(8, 4, 1), head=nn.Linear(4*16, 5)),rand(4,3,8,8)
    net.bn.weight.data[:3] = torch.tensor([0., -1., 1e-20])
    net.bn.bias.data.fill_(.5)
    r,pte,want = shipped(net, (x,), tmp_path)
    assert (r['partitions'], r['int8_partitions'], r['int8'], r['float'], r['portable'], r['roundings'])==(1, 1, 7, 0, 0, 2)
    assert r['floats']==[] and r['open_batch'] and r['batch']==8 and r['arena']>0
    assert r['bytes']==(tmp_path/'m.pte').stat().st_size
    assert [a['layer'] for a in r['adjusted']]==['a'] or [a['layer'] for a in r['adjusted']]==['bn'], 'the dead channel got a scale'
    y = pte(x)
    assert sqnr(want, y)>28
    for n in 1, 3: torch.testing.assert_close(pte(x[:n]), y[:n], atol=0, rtol=0)
    assert torch.equal(pte(torch.cat([x]*5)), torch.cat([y]*5)), 'batches beyond the largest run in parts'
    with pytest.raises(ValueError, match=r'takes \[8, 3, 8, 8\], got \[1, 3, 9, 9\]'): pte(rand(1,3,9,9))


def test_scales_and_shifts_of_channels_in_one_int8_partition(tmp_path):
    torch.manual_seed(0)
    r,pte,want = shipped(learned_scales(), (x := rand(4,3,10,10),), tmp_path)
    assert (r['partitions'], r['float'], r['portable'])==(1, 0, 0) and r['floats']==[]
    assert sqnr(want, pte(x))>28


def test_an_image_read_by_several_in_float(tmp_path):
    "ExecuTorch turns a dequantized image channels last for all its readers, the permutation before a layer norm too"
    torch.manual_seed(0)
    def run(m, x):
        y = m.a(x)+m.b(x)
        return m.c(F.avg_pool2d(m.n(y.permute(0,2,3,1)).permute(0,3,1,2), 2)) + m.d(F.avg_pool2d(y, 2))
    r,pte,want = shipped(Net(run, a=conv(3, 8), b=conv(3, 8), c=conv(8, 4), d=conv(8, 4), n=nn.LayerNorm(8)), (x := rand(4,3,10,12),), tmp_path)
    assert sqnr(want, pte(x))>40


@pytest.mark.parametrize('pool', [dict(kernel_size=3, stride=2), dict(kernel_size=3, stride=2, padding=1), dict(kernel_size=2), dict(kernel_size=3, stride=3, padding=(0,1)), dict(kernel_size=2, stride=3, dilation=2)], ids=str)
def test_max_pooling_that_rounds_its_size_up(pool, tmp_path):
    "XNNPACK pools with `ceil_mode` too, on grids that reach below zero and on those that don't"
    torch.manual_seed(0)
    pool = nn.MaxPool2d(**pool, ceil_mode=True)
    r,pte,want = shipped(Net(lambda m, x: m.c(m.p((y := m.a(x)).relu()))+m.d(m.p(y-3)), a=conv(3, 8), c=conv(8, 4), d=conv(8, 4), p=pool), (x := rand(4,3,10,11),), tmp_path)
    assert (r['portable']==0)==(pool.dilation==1) and sqnr(want, pte(x))>25


def test_max_pooling_in_float_that_rounds_its_size_up(tmp_path):
    torch.manual_seed(0)
    net = Net(lambda m, x: m.c(F.max_pool2d(F.silu(m.a(x)), 3, 2, ceil_mode=True)), a=conv(3, 8), c=conv(8, 4))
    r,pte,want = shipped(net, (x := rand(4,3,10,11),), tmp_path)
    assert r['portable']==0 and r['partitions']==1 and sqnr(want, pte(x))>25


def many(m, x, z):
    a = torch.cat([F.relu(m.a(x)), m.g(F.pad(z, (1,0,1,0)))], 1)
    b = F.relu6(m.up(a))*m.gate(m.up2(a))
    c = F.hardtanh(m.c(b), -.2, .3)-m.e(b)
    return m.head(c.mean((2,3))), F.hardsigmoid(m.c(b))

def test_many_kernels_two_inputs_two_outputs(tmp_path):
    "Concatenation, padding, transposed convolutions, products, differences, clamps that fuse and clamps that don't, a mean without its dimensions"
    torch.manual_seed(0)
    net = Two(many, a=conv(3, 4), g=nn.Conv2d(2, 4, 3), up=nn.ConvTranspose2d(8, 6, 2, 2), up2=nn.ConvTranspose2d(8, 6, 2, 2, groups=2), gate=conv(6, 6, groups=6), c=conv(6, 5, 1), e=conv(6, 5, 1, bias=False), head=nn.Linear(5, 3))
    args = rand(4,3,8,8),rand(4,2,9,9)
    r,pte,want = shipped(net, args, tmp_path)
    assert r['int8_partitions']==1 and r['int8']>=10 and r['portable']==0
    assert ('up2','conv_transpose2d') in {(f['layer'], f['op']) for f in r['floats']}, 'a scale for each channel of a grouped transposed convolution is beyond XNNPACK'
    assert all(f['reason'] and f['where'] in ('xnnpack','portable') for f in r['floats'])
    assert all(f['where']=='xnnpack' for f in r['floats'] if f['op']=='hardsigmoid')
    for w,y in zip(want, pte(*args)): assert w.shape==y.shape and sqnr(w, y)>25
    assert pte(*(a[:1] for a in args))[0].shape==(1,3)


def attend(m, x):
    t = m.patch(x).flatten(2).transpose(1, 2)
    q,k,v = m.qkv(m.norm(t)).reshape(x.shape[0], -1, 3, 2, 4).permute(2, 0, 3, 1, 4).unbind(0)
    t = t+m.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(x.shape[0], -1, 8))
    a = ((q*.5)@k.transpose(-2, -1)).softmax(-1)@v
    return m.head((t+a.transpose(1, 2).flatten(2)).mean(1))

def test_attention_leaves_little_to_portable_kernels(tmp_path):
    torch.manual_seed(0)
    net,x = Net(attend, patch=nn.Conv2d(3, 8, 4, 4), norm=nn.LayerNorm(8), qkv=nn.Linear(8, 24), proj=nn.Linear(8, 8), head=nn.Linear(8, 3)),rand(3,3,16,16)
    r,pte,want = shipped(net, (x,), tmp_path)
    where = {(f['op'], f['where']) for f in r['floats']}
    assert {('scaled_dot_product_attention','xnnpack'),('matmul','xnnpack'),('softmax','xnnpack'),('layer_norm','portable')} <= where
    assert r['int8']>=4 and sqnr(want, pte(x))>25
    assert torch.equal(pte(x[:1]), pte(x)[:1])


def products(m, x):
    t = m.patch(x).flatten(2).transpose(1, 2)
    q,k,v = m.qkv(t).chunk(3, -1)
    a = (1-(2*(q@k.mT)+.5).softmax(-1)/3)@v                               # three dimensions, numbers on either side
    b = (F.gelu(t)@m.table.mT)@m.table                                    # a stored matrix
    five = [F.gelu(o).reshape(x.shape[0], 2, 8, 2, 4).transpose(2, 3) for o in (q,k,v)]
    c = F.scaled_dot_product_attention(*five).transpose(2, 3).reshape(x.shape[0], 16, 8)
    return m.head((a+b+c-1).mean(1))

def test_numbers_and_products_of_any_dimensions_go_to_xnnpack(tmp_path):
    torch.manual_seed(0)
    net,x = Net(products, patch=nn.Conv2d(3, 8, 4, 4), qkv=nn.Linear(8, 24), head=nn.Linear(8, 3)),rand(3,3,16,16)
    net.table = nn.Parameter(rand(5,8))
    r,pte,want = shipped(net, (x,), tmp_path)
    portable = {f['op'] for f in r['floats'] if f['where']=='portable'}
    assert not portable&{'add','sub','rsub','mul','div','matmul','scaled_dot_product_attention','softmax','gelu'}, portable
    assert sqnr(want, pte(x))>25 and torch.allclose(pte(x[:1]), pte(x)[:1], atol=1e-5)


def pools(m, x):
    x = F.relu(m.a(x))
    x = F.max_pool2d(x, 2, 2, ceil_mode=True)+F.avg_pool2d(x, 2, 2, ceil_mode=True, count_include_pad=False)
    return m.b(F.avg_pool2d(x, 3, 1, 1)+F.avg_pool2d(x, 3, 1, 1, count_include_pad=False))+m.c(F.max_pool2d(F.avg_pool2d(x, 3, 1, 1), 3, 1, 1))

def test_poolings_are_delegated(tmp_path):
    "With `ceil_mode` where sizes divide, with padding counted and not counted"
    torch.manual_seed(0)
    r,pte,want = shipped(Net(pools, a=conv(3, 4), b=conv(4, 3), c=conv(4, 3)), (rand(2,3,8,8),), tmp_path)
    assert r['portable']==0 and r['partitions']==1 and sqnr(want, pte(rand(2,3,8,8)))>25


@pytest.mark.parametrize('cut', [lambda x: x.split(4, 1), lambda x: x.chunk(3, 1), lambda x: x.split([2, 4, 6], dim=1), lambda x: x.unbind(3)[:3], lambda x: torch.split(x, 4, -1)[-2:]], ids=['split','chunk','sizes','unbind','last'])
def test_parts_stay_on_integers_with_an_open_batch(cut, tmp_path):
    torch.manual_seed(0)
    x = rand(4, 3, 8, 8)
    def run(m, x):
        ps = cut(m.a(x))
        return sum((m.e(p) if p.ndim==3 else getattr(m, f'c{p.shape[1]}')(p)).mean((-1, -2)) for p in ps)
    net = Net(run, a=conv(3, 12), e=nn.Conv1d(12, 5, 3), **{f'c{i}': conv(i, 5) for i in (2, 4, 6, 12)})
    r,f,want = shipped(net, (x,), tmp_path)
    assert r['open_batch'] and sqnr(want, f(x))>25 and sqnr(f(x)[:1], f(x[:1]))>60 # other batches than the example's
    assert r['int8']>=3 # what reads the parts, too

def test_a_batch_that_executorch_binds_is_one(monkeypatch, tmp_path):
    "Its verifier binds an open batch to the example's at a list of tensors"
    import fastcompress.deploy.executorch as module
    monkeypatch.setattr(module, 'split_up', lambda ref: ref)
    x = rand(4, 3, 8, 8)
    r,f,want = shipped(Net(lambda m, x: sum(p.mean((2, 3)) for p in m.a(x).split(4, 1)), a=conv(3, 12)), (x,), tmp_path)
    assert (r['batch'],r['open_batch'])==(1,False) and sqnr(want, f(x))>40

@pytest.mark.parametrize('arch', ['test_resnet', pytest.param('test_efficientnet', marks=pytest.mark.slow)])
def test_timm(arch, tmp_path):
    model,x = timm_model(arch, 64)
    r,pte,want = shipped(model, (x,), tmp_path)
    assert r['int8']>=10 and r['int8_partitions']>=1 and r['open_batch']
    assert sqnr(want, pte(x))>15
    assert torch.equal(pte(x[:1]), pte(x)[:1])
    if arch=='test_resnet': assert r['portable']==0 and r['partitions']==1


@pytest.mark.parametrize('bits', [4, 6])
def test_narrow_grids_are_clamped(bits):
    "XNNPACK knows int8 alone: what has fewer bits saturates by a clamp"
    _executorch()
    torch.manual_seed(0)
    net,x = Net(lambda m,x: m.c(F.relu(m.a(x))+m.b(x)), a=conv(3, 4), b=conv(3, 4), c=conv(4, 2)),rand(4,3,8,8)
    ref = reference(net, (x,), a_bits=bits, observer='mse')
    with torch.no_grad(): assert sqnr(net(10*x), Translation(ref).run()(10*x))>40, 'far outside of the calibrated range'
    checks = check_pte(ref, (10*x,), show=False)
    assert max(c.steps for c in checks)<=1


def test_result_finer_than_the_accumulator_stays_in_float(tmp_path):
    "XNNPACK refuses to load such a convolution"
    torch.manual_seed(0)
    net,x = Net(lambda m,x: m.b(m.a(x)), a=conv(3, 4), b=conv(4, 2)),rand(2,3,8,8)
    def tweak(sim): sim[sim.placement.acts[1]].scale.mul_(2.**-20)
    r,pte,want = shipped(net, (x,), tmp_path, tweak)
    assert [(f['layer'], f['op'], '256th' in f['reason']) for f in r['floats']]==[('a','conv2d',True)]


def test_bound_batch(tmp_path):
    torch.manual_seed(0)
    net,x = Net(lambda m,x: m.b(F.relu(m.a(x)).reshape(2, 4*64)), a=conv(3, 4), b=nn.Linear(256, 3)),rand(2,3,8,8)
    ref = reference(net, (x,))
    assert ref.meta['fixed_batch']==2
    r = save_pte(ref, tmp_path/'m.pte', (x,), show=False)
    pte = PteModel(tmp_path/'m.pte')
    assert not r['open_batch'] and r['batch']==2 and '2' in repr(pte)
    assert torch.equal(pte(torch.cat([x, x]))[2:], pte(x))
    with pytest.raises(ValueError, match='bound to batches of 2, got 3'): pte(rand(3,3,8,8))


def test_wide_grids_are_refused(tmp_path):
    net,x = Net(lambda m,x: m.a(x), a=conv(3, 4)),rand(2,3,8,8)
    with pytest.raises(ValueError, match="8 bits.*profile='xnnpack'"): save_pte(reference(net, (x,), profile='onnx', a_bits=12), tmp_path/'m.pte', (x,), show=False)
    assert list(tmp_path.iterdir())==[]


def test_what_cannot_be_lowered_is_named(tmp_path):
    net,x = Net(lambda m,x: m.b(torch.special.bessel_j0(m.a(x))), a=conv(3, 4), b=conv(4, 2)),rand(2,3,8,8)
    with pytest.raises(RuntimeError, match="(?s)bessel_j0.*format='ptl'"): save_pte(reference(net, (x,)), tmp_path/'m.pte', (x,), show=False)
    assert list(tmp_path.iterdir())==[]


def test_absent_extra(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, 'executorch.exir', None)
    with pytest.raises(ImportError, match=r'pip install fastcompress\[executorch\]'): _executorch()
    with pytest.raises(FileNotFoundError): PteModel(tmp_path/'none.pte')


def test_import_is_light_and_quiet():
    "The module is imported without executorch; loading executorch leaves the root logger as it was and prints nothing"
    code = ("import sys, logging\nimport fastcompress.deploy.executorch as E\nassert not [m for m in sys.modules if m.split('.')[0] in ('executorch','torchao')]\n"
            "E._executorch()\nprint(logging.getLogger().handlers, logging.getLogger().level==logging.WARNING)")
    r = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True)
    assert (r.returncode, r.stdout, r.stderr)==(0, '[] True\n', '')
