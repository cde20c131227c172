"From model to file: a cross-section of timm and fastai models, the traps of the kernels, bundles under abuse"
import copy, json, shutil, subprocess, sys
from collections import Counter
from pathlib import Path
import numpy as np
import pytest, timm, torch
from torch import nn
import torch.nn.functional as F
from fastcompress.core import use_threads
from fastcompress.deploy.capture import capture, op_of
from fastcompress.deploy.engines import use_engine
from fastcompress.deploy.lower import check_ops, lower, to_integer
from fastcompress.deploy.mobile import export_float, export_mobile, load_mobile, predict_fresh
from fastcompress.measure.quality import sqnr
from fastcompress.quantize.simulate import calibrate_, place, record, release_, simulate_, simulation
from helpers import learned_scales, randomise_, timm_model

pytestmark = pytest.mark.filterwarnings('ignore:.*deprecated.*')


def lowered(model, x):
    "Simulate, lower and check every operation; returns simulated output, integer model, checks"
    simulate_(model, x)
    calibrate_(model, [x], show=False)
    im,ref,pairs = lower(capture(model, x))
    with torch.no_grad(): y = model(x)
    return y, im, check_ops(im, ref, pairs, x)


# operations that may stay in float in this release, by model
ISLANDS = dict(
    resnet18=set(), mobilenetv2_100=set(), repvgg_a0=set(), regnetx_002=set(),
    densenet121=set(),
    efficientnet_b0={'silu','mean','mul','adaptive_avg_pool2d','flatten'},
    convnext_atto={'layer_norm','gelu','add','permute','adaptive_avg_pool2d','flatten'},
    vit_tiny_patch16_224={'layer_norm','gelu','scaled_dot_product_attention','cat','add','expand','reshape','permute','unbind','transpose','select','slice','getitem','flatten','mean'})


@pytest.mark.parametrize('arch', ISLANDS)
def test_timm(arch):
    model,x = timm_model(arch, **(dict(img_size=64, class_token=False, global_pool='avg') if 'vit' in arch else {}))
    with torch.no_grad(): y_float = model(x)
    y,im,checks = lowered(model, x)
    assert {i.op for i in im.islands} <= ISLANDS[arch]
    assert not [c for c in checks if c.steps>1]
    assert sum(c.share for c in checks)/len(checks) < 0.002
    with torch.no_grad(): y_int = im(x)
    assert sqnr(y_float, y) > 12 and sqnr(y, y_int) > 12
    if arch not in ('densenet121','repvgg_a0'): assert torch.equal(y, y_int), 'the simulation is the engine, bit for bit' # cat and BatchNorm kernels compute in float
    assert im.int_share > 0.95
    assert all(i.reason for i in im.islands)
    with torch.no_grad(): assert im(x[:1]).shape == (1,10), 'the batch stays open'


MORE = ('botnet26t_256 coatnet_nano_rw_224 convmixer_768_32 cs3darknet_s dla34 dpn68 eca_nfnet_l0 edgenext_xx_small efficientformer_l1 '
        'efficientnet_b3 efficientnet_cc_b0_4e efficientnet_lite0 ese_vovnet19b_dw fasternet_t0 fastvit_t8 fbnetc_100 gcvit_xxtiny levit_128s '
        'res2net50_26w_4s resnet50 vgg11_bn').split()

@pytest.mark.slow
@pytest.mark.parametrize('arch', MORE)
def test_more_of_timm(arch, tmp_path):
    "At the size they were made for: every operation within a step, whatever stays in float is named, the file gives what the model gives"
    size = timm.get_pretrained_cfg(arch).input_size[-1]
    model,x = timm_model(arch, size, batch=2)
    y,im,checks = lowered(model, x)
    assert checks and max(c.steps for c in checks)<=1 and all(i.reason for i in im.islands)
    r = export_mobile(model, x, tmp_path/'p')
    with torch.no_grad(): assert torch.equal(load_mobile(tmp_path/'p')(x), im(x))
    assert r.how=='scripted' and r.fixed_batch is None


@pytest.mark.parametrize('make', ['vision_learner', 'xresnet', 'torchvision'])
def test_models_fastai_users_have(make):
    from fastai.vision.all import vision_learner, xresnet18
    from fastcompress.data import digits
    if make=='vision_learner': model = vision_learner(digits(n=60, bs=8), 'resnet18', pretrained=False).model
    elif make=='xresnet': model = xresnet18(n_out=10)
    else:
        import torchvision
        model = torchvision.models.mobilenet_v2(num_classes=10)
    x = torch.randn(4,3,64,64, generator=torch.Generator().manual_seed(1))
    torch.manual_seed(0)
    y,im,checks = lowered(randomise_(model, x), x)
    assert checks and max(c.steps for c in checks) <= 1
    with torch.no_grad(): assert sqnr(y, im(x)) > 15
    assert im.int_share > 0.95


# traps of the kernels

class Residual(nn.Module):
    "x + branch(x), the branch scaled by `gain`"
    def __init__(self, gain):
        super().__init__()
        self.stem,self.conv,self.bn,self.head = nn.Conv2d(3,8,3),nn.Conv2d(8,8,3,padding=1,bias=False),nn.BatchNorm2d(8),nn.Conv2d(8,4,1)
        self.bn.weight.data.fill_(gain)
    def forward(self, x):
        x = F.relu(self.stem(x))
        return self.head(F.relu(x + self.bn(self.conv(x))))


@pytest.mark.parametrize('gain', [0., 1e-12, 1e-6, 1e-4, 1., 1e3, 1e6])
def test_residual_scale_limit(gain):
    "qnnpack aborts when an add's operand-to-result scale ratio leaves [2^-14, 2^8); timm's residual branches start at 0"
    torch.manual_seed(0)
    x = torch.randn(4,3,16,16)
    y,im,checks = lowered(Residual(gain).eval(), x)
    assert max(c.steps for c in checks) <= 1
    with torch.no_grad(): assert sqnr(y, im(x)) > 25


def test_the_limit_is_real():
    "Without the adjustment qnnpack refuses"
    q = torch.quantize_per_tensor(torch.rand(1,4,4,4), 2.**-16, 0, torch.quint8)
    with use_engine('qnnpack'), pytest.raises(RuntimeError): torch.ops.quantized.add(q, torch.quantize_per_tensor(torch.rand(1,4,4,4), 1., 0, torch.quint8), 1., 0)


@pytest.mark.parametrize('layout', [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize('clamp', [F.relu, F.relu6, nn.Hardtanh(-.3, .3), nn.Hardtanh(0., .2)], ids=['relu','relu6','hardtanh','hardtanh0'])
@pytest.mark.parametrize('widen', [1., 3.])
def test_clamps_on_both_layouts(layout, clamp, widen):
    "Free where the grid ends at the clamp, explicit where it doesn't, right on channels_last"
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv,self.post = nn.Conv2d(3,8,3),nn.Conv2d(8,4,1)
        def forward(self, x): return self.post(clamp(self.conv(x)))
    torch.manual_seed(0)
    net,x = Net().eval(),torch.randn(4,3,16,16).contiguous(memory_format=layout)
    simulate_(net, x)
    calibrate_(net, [x], show=False)
    q = simulation(net)[simulation(net).placement.acts[1]]
    q.scale.mul_(widen)
    im,ref,pairs = lower(capture(net, x))
    assert max(c.steps for c in check_ops(im, ref, pairs, x)) <= 1
    if widen==1: assert not any(op_of(n)=='clamp' for n in im.body.graph.nodes) or clamp is not F.relu


def test_dead_channel_keeps_its_bias():
    "A BatchNorm gain of zero folds to a weight scale of zero; the channel's output is its beta, not garbage"
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3,4,3,bias=False), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4,4,1)).eval()
    net[1].weight.data[:2] = torch.tensor([0., 1e-20])
    net[1].bias.data.fill_(0.7)
    x = torch.randn(4,3,8,8)
    y,im,checks = lowered(net, x)
    assert max(c.steps for c in checks) <= 1
    with torch.no_grad(): assert sqnr(y, im(x)) > 25


def test_average_pooling_that_qnnpack_gets_wrong_stays_in_float():
    net = nn.Sequential(nn.Conv2d(3,4,3), nn.AvgPool2d(3, 1, 1, count_include_pad=False), nn.Conv2d(4,4,1)).eval()
    x = torch.randn(4,3,8,8)
    y,im,checks = lowered(net, x)
    assert [(i.op, 'wrongly' in i.reason) for i in im.islands] == [('avg_pool2d', True)]
    assert max(c.steps for c in checks) <= 1
    net[1] = nn.AvgPool2d(3, 1, 1)
    release_(net)
    assert lowered(net, x)[1].islands == []


def test_shared_and_repeated_modules():
    "One module called twice has two call sites, each with its own ranges"
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem,self.conv,self.relu = nn.Conv2d(3,4,1),nn.Conv2d(4,4,3,padding=1),nn.ReLU()
        def forward(self, x): return self.relu(self.conv(self.relu(self.conv(self.stem(x)))*3))
    torch.manual_seed(0)
    x = torch.randn(4,3,8,8)
    net = Twice().eval()
    sites = record(net, x)
    assert {'conv:conv2d','conv:conv2d.1','relu:relu','relu:relu.1'} <= set(sites)
    y,im,checks = lowered(net, x)
    assert max(c.steps for c in checks) <= 1 and im.islands == []


def test_two_inputs_and_two_outputs(tmp_path):
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.a,self.b,self.fc = nn.Conv2d(3,4,3),nn.Conv2d(1,4,3),nn.Linear(4,2)
        def forward(self, x, y):
            z = F.relu(self.a(x)+self.b(y))
            return z, self.fc(z.mean((2,3)))
    torch.manual_seed(0)
    net,args = Two().eval(),(torch.randn(4,3,8,8), torch.randn(4,1,8,8))
    r = export_mobile(net, args, tmp_path/'two', calibration=[args], show=False)
    assert r.islands==[] and r.max_steps<=1 and r.agree is None
    m = load_mobile(tmp_path/'two')
    with torch.no_grad(): want = net(*args)
    for y,w in zip(m(*args), want): assert y.shape==w.shape and sqnr(w, y)>25
    assert (tmp_path/'two'/'golden_input_1.npy').exists() and len(m.info['outputs'])==2


def test_placement_follows_two_readers():
    "A convolution read twice is written as bytes before its BatchNorm; nothing is folded across the second reader"
    class Fork(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv,self.bn = nn.Conv2d(3,4,1),nn.BatchNorm2d(4)
        def forward(self, x):
            y = self.conv(x)
            return y + self.bn(y)
    net,x = Fork().eval(),torch.randn(4,3,8,8)
    p = place(record(net, x), 'qnnpack')
    assert p.acts==['input','conv:conv2d','bn:batch_norm',':add']
    y,im,checks = lowered(net, x)
    assert im.islands==[] and max(c.steps for c in checks)<=1
    assert 'batch_norm2d' in [op_of(n) for n in im.body.graph.nodes], 'a kernel of its own'


@pytest.mark.parametrize('engine', ['qnnpack','x86'])
def test_scales_and_shifts_of_channels_run_on_integers(engine):
    "Sums that begin with 0, learned factors and addends, a BatchNorm behind a cat: no island"
    torch.manual_seed(0)
    net = learned_scales()
    x = torch.randn(4,3,10,10)
    simulate_(net, x, engine)
    calibrate_(net, [x], show=False)
    im,ref,pairs = lower(capture(net, x), engine)
    with torch.no_grad(): y = net(x)
    assert im.islands==[] and sum(op_of(n)=='batch_norm2d' for n in im.body.graph.nodes)==2
    assert max(c.steps for c in check_ops(im, ref, pairs, x))<=1
    with use_engine(engine): assert sqnr(y, im(x)) > 35


def test_arithmetic_on_the_batch_is_no_scale():
    class Halves(nn.Module):
        def __init__(self):
            super().__init__()
            self.a,self.bn,self.c = nn.Conv2d(3,4,1),nn.BatchNorm2d(2),nn.Conv2d(2,4,1)
        def forward(self, x):
            x = F.relu(self.a(x))
            return self.c(F.relu(self.bn(x.reshape(x.shape[0]*2, 2, *x.shape[2:]))))
    x = torch.randn(4,3,8,8)
    y,im,checks = lowered(Halves().eval(), x)
    assert im.islands==[] and max(c.steps for c in checks)<=1 and im(x[:1]).shape==(2,4,8,8)


def test_a_scale_read_in_float_stays_in_float():
    class Stream(nn.Module):
        def __init__(self):
            super().__init__()
            self.a,self.b,self.scale = nn.Conv2d(3,4,1),nn.Conv2d(4,4,1),nn.Parameter(torch.rand(4,1,1))
        def forward(self, x):
            x = F.relu(self.a(x))*self.scale
            return self.b(x) + F.silu(x)
    net,x = Stream().eval(),torch.randn(4,3,8,8)
    y,im,checks = lowered(net, x)
    assert ('mul', 'its result is not rounded otherwise: bytes would only add an error') in [(i.op, i.reason) for i in im.islands]
    assert max(c.steps for c in checks)<=1


def test_parameters_alone_are_not_activations():
    "An operand computed from parameters is a constant: the add stays in float, with the reason"
    class Biased(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv,self.table,self.post = nn.Conv2d(3,4,1),nn.Parameter(torch.randn(8,8)),nn.Conv2d(4,2,1)
        def forward(self, x): return self.post(self.conv(x) + (self.table*2).view(1,1,8,8))
    x = torch.randn(4,3,8,8)
    y,im,checks = lowered(Biased().eval(), x)
    assert [(i.op, 'computed from parameters' in i.reason) for i in im.islands]==[('add', True)]
    assert max(c.steps for c in checks)<=1


def test_standardised_weights_are_quantized_as_they_are_used():
    "The weight of a weight-standardised convolution is computed from parameters: its integers are the standardised ones"
    class WS(nn.Conv2d):
        def forward(self, x):
            w = self.weight
            return F.conv2d(x, (w-w.mean((1,2,3), keepdim=True))/w.std((1,2,3), keepdim=True), self.bias, self.stride, self.padding)
    x = torch.randn(4,3,8,8)
    y,im,checks = lowered(nn.Sequential(WS(3,4,3), nn.ReLU(), nn.Conv2d(4,2,1)).eval(), x)
    assert im.islands==[] and max(c.steps for c in checks)<=1


def test_weights_computed_from_the_input_stay_in_float():
    class Conditional(nn.Module):
        def __init__(self):
            super().__init__()
            self.route,self.weight,self.post = nn.Linear(3,1),nn.Parameter(torch.randn(4,3,1,1)),nn.Conv2d(4,2,1)
        def forward(self, x): return self.post(F.conv2d(x, self.weight*self.route(x.mean((2,3))).mean()))
    x = torch.randn(4,3,8,8)
    y,im,checks = lowered(Conditional().eval(), x)
    assert ('conv2d','its weight is computed from the input') in [(i.op, i.reason) for i in im.islands]
    assert max(c.steps for c in checks)<=1


# bundles

@pytest.fixture(scope='module')
def small():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3,8,3,2), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(8*7*7,5)).eval(), torch.randn(4,3,16,16)


@pytest.fixture
def bundle(small, tmp_path):
    model,x = small
    export_mobile(model, x, tmp_path/'phone', calibration=[x], labels='abcde', show=False)
    return tmp_path/'phone'


def test_bundle_is_complete(bundle, small):
    model,x = small
    assert {p.name for p in bundle.iterdir()} == {'model.ptl','labels.txt','input.json','golden_input.npy','golden_output.npy','report.json','report.html','README.md'}
    info,report = json.loads((bundle/'input.json').read_text()), json.loads((bundle/'report.json').read_text())
    assert info['inputs']==[dict(shape=[None,3,16,16], dtype='float32')] and info['engine']=='qnnpack'
    assert report['max_steps']<=1 and report['islands']==[] and report['path']=='phone'
    assert np.array_equal(np.load(bundle/'golden_input.npy'), x[:1].numpy())
    m = load_mobile(bundle)
    assert m.labels==list('abcde') and torch.equal(m(x[:1]), torch.from_numpy(np.load(bundle/'golden_output.npy')))
    assert torch.equal(predict_fresh(bundle, x), m(x))


@pytest.mark.parametrize('name', ['model.ptl','labels.txt','golden_input.npy','golden_output.npy','report.json'])
def test_tampering_is_noticed(bundle, name):
    b = bytearray((bundle/name).read_bytes())
    b[len(b)//2] ^= 1
    (bundle/name).write_bytes(b)
    with pytest.raises(ValueError, match='was changed'): load_mobile(bundle)
    (bundle/name).unlink()
    with pytest.raises(FileNotFoundError, match=f'lacks {name}'): load_mobile(bundle)


def test_golden_pair_is_a_test(bundle, small):
    "Checksums right, answer wrong: a file of other weights under the old golden pair"
    import hashlib
    model,x = copy.deepcopy(small)
    model[4].weight.data.mul_(-1)
    export_mobile(model, x, bundle.parent/'other', calibration=[x], show=False)
    shutil.copy(bundle.parent/'other'/'model.ptl', bundle/'model.ptl')
    info = json.loads((bundle/'input.json').read_text())
    info['sha256']['model.ptl'] = hashlib.sha256((bundle/'model.ptl').read_bytes()).hexdigest()
    (bundle/'input.json').write_text(json.dumps(info))
    with pytest.raises(RuntimeError, match='fails its own test'): load_mobile(bundle)


def test_failed_export_leaves_the_old_bundle(bundle, small, monkeypatch):
    import fastcompress.deploy.mobile as mobile
    model,x = small
    before = {p.name:p.read_bytes() for p in bundle.iterdir()}
    monkeypatch.setattr(mobile, '_save_golden', lambda *a: 1/0)
    with pytest.raises(ZeroDivisionError): export_mobile(model, x, bundle, calibration=[x], show=False)
    assert {p.name:p.read_bytes() for p in bundle.iterdir()} == before
    assert [p.name for p in bundle.parent.iterdir()] == ['phone']


def test_killed_export_leaves_the_old_bundle(bundle):
    before = {p.name:p.read_bytes() for p in bundle.iterdir()}
    code = f"""import os, torch, fastcompress.deploy.mobile as m
from torch import nn
m._save_golden = lambda *a: os._exit(9)
x = torch.randn(2,3,16,16)
m.export_mobile(nn.Sequential(nn.Conv2d(3,4,3)), x, {str(bundle)!r}, calibration=[x], show=False)"""
    assert subprocess.run([sys.executable, '-W', 'ignore', '-c', code], capture_output=True).returncode == 9
    assert {p.name:p.read_bytes() for p in bundle.iterdir()} == before
    load_mobile(bundle)


def test_somebody_elses_folder_is_not_replaced(small, tmp_path):
    model,x = small
    (tmp_path/'thesis.txt').write_text('x')
    with pytest.raises(FileExistsError, match='Give a new folder'): export_mobile(model, x, tmp_path, calibration=[x])
    (tmp_path/'file').write_text('x')
    with pytest.raises(NotADirectoryError): export_mobile(model, x, tmp_path/'file', calibration=[x])
    with pytest.raises((PermissionError, NotADirectoryError)): export_mobile(model, x, '/proc/nowhere/phone', calibration=[x])


def test_engine_missing_in_this_build(small, tmp_path, monkeypatch):
    model,x = small
    monkeypatch.setattr(type(torch.backends.quantized), 'supported_engines', ['none','fbgemm'])
    with pytest.raises(RuntimeError, match='this torch build has no qnnpack engine .*it has: fbgemm'): export_mobile(model, x, tmp_path/'p', calibration=[x])
    assert not (tmp_path/'p').exists()


def test_engine_is_put_back(small, tmp_path):
    model,x = small
    was = torch.backends.quantized.engine
    for e in torch.backends.quantized.supported_engines:
        if e in ('none',): continue
        torch.backends.quantized.engine = e
        try:
            export_mobile(model, x, tmp_path/'p', calibration=[x], show=False)
            load_mobile(tmp_path/'p')(x)
            assert torch.backends.quantized.engine==e
        finally: torch.backends.quantized.engine = was


def test_users_model_is_left_alone(small, tmp_path):
    model,x = copy.deepcopy(small)
    model.train(); model[1].eval()
    state,flags = copy.deepcopy(model.state_dict()), [m.training for m in model.modules()]
    export_mobile(model, x, tmp_path/'p', calibration=[x], show=False)
    export_float(model, x, tmp_path/'f.ptl')
    assert simulation(model) is None and [m.training for m in model.modules()]==flags
    for k,v in model.state_dict().items(): assert torch.equal(v, state[k]), k
    assert not model._forward_hooks and not model._forward_pre_hooks


def test_subnormals_are_flushed(small, tmp_path):
    model,x = copy.deepcopy(small)
    model[4].bias.data[0] = 1e-42
    r = export_mobile(model, x, tmp_path/'p', calibration=[x], show=False)
    assert r.flushed==1 and 'subnormal' in str(r)
