"ONNX files: every operation within a step of its simulation, integers really stored as integers, onnxruntime's integer kernels really found"
import copy, subprocess, sys
import numpy as np
import pytest, torch
from torch import nn
import torch.nn.functional as F
onnx,ort,_ = (pytest.importorskip(m) for m in ('onnx','onnxruntime','onnxscript'))
from fastcompress.deploy.capture import capture, op_of
from fastcompress.deploy.lower import fold_all_
from fastcompress.deploy.onnx import OnnxModel, check_onnx, qdq_, ran_ops, save_onnx
from fastcompress.measure.quality import sqnr
from fastcompress.quantize.simulate import calibrate_, simulate_, simulation
from helpers import learned_scales, timm_model

pytestmark = pytest.mark.filterwarnings('ignore:.*deprecated.*')


class Fn(nn.Module):
    "Layers, and a function of them and the input"
    def __init__(self, f, **layers):
        super().__init__()
        for k,m in layers.items(): self.add_module(k, m)
        self.f = f
    def forward(self, x): return self.f(self, x)
    def with_mask(self, mask): self.register_buffer('mask', mask); return self

class Fn2(Fn):
    def forward(self, x, y): return self.f(self, x, y)

def gains(*bns):
    for b in bns: b.weight.data.uniform_(-.5, 1.5); b.bias.data.uniform_(-.5, .5); b.running_mean.uniform_(-.3, .3); b.running_var.uniform_(.5, 1.5)
    return bns[0]

C = lambda i=8, o=8, k=3, **kw: nn.Conv2d(i, o, k, **{'padding':k//2, **kw})
def zero_gain():
    b = gains(nn.BatchNorm2d(8)); b.weight.data[:3] = 0
    return b
def big_bias():
    c = C(); c.weight.data[0] *= 1e-12; c.bias.data[0] = 3.
    return c

# name: (model, shapes of the inputs without the batch, operations that onnxruntime must run, operations that it must not)
NETS = dict(
    conv_bn_relu=lambda: (nn.Sequential(C(3), gains(nn.BatchNorm2d(8)), nn.ReLU(), C()), [(3,12,12)], dict(QLinearConv=2), 'Conv Relu BatchNormalization'),
    residual=lambda: (Fn(lambda m,x: F.relu(m.b(F.relu(m.a(x)))+m.a(x)), a=C(3), b=C()), [(3,12,12)], dict(QLinearConv=3, QLinearAdd=1), 'Conv Add Relu'),
    relu6_pool=lambda: (nn.Sequential(C(3), nn.ReLU6(), nn.MaxPool2d(2), C(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8,5)), [(3,12,12)], dict(QLinearConv=2, QGemm=1, QLinearGlobalAveragePool=1), 'Conv Gemm Clip ReduceMean Shape'),
    narrow_clamp=lambda: (Fn(lambda m,x: m.b(m.a(x).clamp(-.1,.2)), a=C(3), b=C()), [(3,12,12)], dict(QLinearConv=2), 'Conv'),
    silu=lambda: (nn.Sequential(C(3), nn.SiLU(), C()), [(3,12,12)], dict(QLinearConv=2, QLinearSigmoid=1, QLinearMul=1), 'Conv Sigmoid'),
    hardswish=lambda: (nn.Sequential(C(3), nn.Hardswish(), C()), [(3,12,12)], dict(QLinearConv=2), 'Conv'),
    gate=lambda: (Fn(lambda m,x: (y := m.a(x))*torch.sigmoid(m.c(F.relu(m.b(y.mean((2,3), keepdim=True))))), a=C(3), b=C(k=1), c=C(k=1)), [(3,12,12)], dict(QLinearConv=3, QLinearMul=1, QLinearSigmoid=1, QLinearGlobalAveragePool=1), 'Conv Mul Sigmoid ReduceMean'),
    gate_as=lambda: (Fn(lambda m,x: (y := m.a(x))*torch.sigmoid(m.c(F.relu(m.b(y.mean((2,3), keepdim=True))))).expand_as(y), a=C(3), b=C(k=1), c=C(k=1)), [(3,12,12)], dict(QLinearConv=3, QLinearMul=1, QLinearSigmoid=1), 'Conv Mul Sigmoid ReduceMean Expand'),
    zero_gain=lambda: (nn.Sequential(C(3, bias=False), zero_gain(), nn.ReLU(), C()), [(3,12,12)], dict(QLinearConv=2), 'Conv'),
    big_bias=lambda: (nn.Sequential(C(3), nn.ReLU(), big_bias()), [(3,12,12)], dict(QLinearConv=2), 'Conv'),
    no_bias=lambda: (nn.Sequential(C(3, bias=False), nn.ReLU(), nn.Flatten(), nn.Linear(8*36, 5, bias=False)), [(3,6,6)], dict(QLinearConv=1, QGemm=1), 'Conv Gemm'),
    grouped_same=lambda: (nn.Sequential(C(4), C(groups=8), C(groups=2, stride=2)), [(4,11,11)], dict(QLinearConv=3), 'Conv'),
    rows=lambda: (nn.Sequential(nn.Linear(6,16), nn.ReLU(), nn.LayerNorm(16), nn.Linear(16,7)), [(5,6)], dict(QGemm=2), 'Gemm MatMul'),
    gelu=lambda: (nn.Sequential(nn.Linear(6,16), nn.GELU(), nn.Linear(16,7)), [(6,)], dict(QGemm=2), 'Gemm MatMul'),
    attention=lambda: (Fn(lambda m,x: m.o(F.scaled_dot_product_attention(*m.qkv(x).view(x.shape[0],9,3,2,8).permute(2,0,3,1,4).unbind(0)).transpose(1,2).reshape(x.shape[0],9,16)), qkv=nn.Linear(16,48), o=nn.Linear(16,16)), [(9,16)], dict(QGemm=2, MatMulIntegerToFloat=1), 'Gemm'),
    causal=lambda: (Fn(lambda m,x: m.o(F.scaled_dot_product_attention(m.q(x), m.k(x), m.v(x), is_causal=True, scale=.2)), q=nn.Linear(16,8), k=nn.Linear(16,8), v=nn.Linear(16,8), o=nn.Linear(8,4)), [(9,16)], dict(QGemm=4, MatMulIntegerToFloat=1), 'Gemm'),
    masked=lambda: (Fn(lambda m,x: m.o(F.scaled_dot_product_attention(m.q(x), m.k(x), m.v(x), m.mask) + F.scaled_dot_product_attention(m.q(x), m.k(x), m.v(x), 3.*m.mask)), q=nn.Linear(16,8), k=nn.Linear(16,8), v=nn.Linear(16,8), o=nn.Linear(8,4)).with_mask(torch.arange(9)[:,None]%4!=torch.arange(9)%3), [(9,16)], dict(MatMulIntegerToFloat=2), 'Gemm'),
    products=lambda: (Fn(lambda m,x: m.a(x)@m.b(x).transpose(-1,-2), a=nn.Linear(8,6), b=nn.Linear(8,6)), [(5,8)], dict(QGemm=2, QLinearMatMul=1), 'Gemm MatMul'),
    cat_split=lambda: (Fn(lambda m,x: m.b(torch.cat([m.a(x), *m.c(x).chunk(2, 1)], 1)), a=C(3,4), c=C(3,4), b=C()), [(3,10,10)], dict(QLinearConv=3, QLinearConcat=1), 'Conv Concat'),
    up_pad=lambda: (Fn(lambda m,x: m.b(F.pad(F.interpolate(m.a(x), scale_factor=2), (1,0,1,0))), a=C(3), b=C()), [(3,6,6)], dict(QLinearConv=2), 'Conv'),
    transposed=lambda: (nn.Sequential(C(3), nn.ConvTranspose2d(8,6,2,stride=2), nn.ReLU(), C(6)), [(3,6,6)], dict(QLinearConv=2), ''),
    transposed_groups=lambda: (nn.Sequential(C(3), nn.ConvTranspose2d(8,6,3,stride=2,groups=2), C(6)), [(3,6,6)], dict(QLinearConv=2), ''),
    one_channel=lambda: (nn.Sequential(C(3), nn.ConvTranspose2d(8,1,2,stride=2), C(1,1)), [(3,6,6)], dict(QLinearConv=2), ''),
    branches=lambda: (Fn(lambda m,x: (m.a(x).view(x.shape[0],2,4,12,12).softmax(1)*m.b(x).view(x.shape[0],2,4,12,12)).sum(1), a=C(3), b=C(3)), [(3,12,12)], dict(QLinearConv=2), 'Conv QLinearSoftmax'),
    permuted=lambda: (Fn(lambda m,x: m.o(m.p((m.a(x)@m.b(x).transpose(-1,-2)).view(-1,1,9,9).expand(-1,4,9,9).permute(0,2,3,1)).permute(0,3,1,2).softmax(-1).sum(1)), a=nn.Linear(8,6), b=nn.Linear(8,6), p=nn.Linear(4,4), o=nn.Linear(9,3)), [(9,8)], {}, 'QLinearSoftmax'),
    conv1d=lambda: (nn.Sequential(nn.Conv1d(3,8,3), nn.ReLU(), nn.Conv1d(8,4,3)), [(3,20)], dict(QLinearConv=2), 'Conv'),
    two_in_two_out=lambda: (Fn2(lambda m,x,y: (m.a(x)+(z := m.b(y)), z), a=C(3), b=C(2)), [(3,8,8),(2,8,8)], dict(QLinearConv=2, QLinearAdd=1), 'Conv Add'),
)

def made(model, shapes, batch=4, **kw):
    "Simulated model, folded reference, inputs"
    g = torch.Generator().manual_seed(1)
    x = tuple(torch.randn(batch, *s, generator=g) for s in shapes)
    simulate_(model.eval(), x, 'onnx', **kw)
    calibrate_(model, [x], n_inp=len(x), show=False)
    return model, fold_all_(capture(model, x)), x

def written(tmp_path, model, ref, x, **kw):
    save_onnx(ref, tmp_path/'m.onnx', x, show=False, **kw)
    onnx.checker.check_model(str(tmp_path/'m.onnx'), full_check=True)
    return tmp_path/'m.onnx'

def as_tuple(o): return o if isinstance(o, tuple) else (o,)

def integers_stored(path, model):
    "Every simulated weight is stored in bytes, once for each call that reads it, and nothing as large is stored in float"
    inits = onnx.load(path).graph.initializer
    params = dict(model.named_parameters())
    want = sorted(params[w.param].numel() for w in simulation(model).placement.weights.values() if w.param)
    have = sorted(int(np.prod(i.dims)) for i in inits if i.data_type==onnx.TensorProto.INT8 and 'zero' not in i.name)
    return want==have


@pytest.mark.parametrize('name', NETS)
def test_small_nets(name, tmp_path):
    torch.manual_seed(0)
    model,shapes,must,never = NETS[name]()
    model,ref,x = made(model, shapes)
    was = ref.code
    p = written(tmp_path, model, ref, x)
    assert ref.code==was, 'the reference is left as it is'
    checks = check_onnx(p, ref, x)
    assert len(checks)==sum(op_of(n)=='quantize' for n in ref.graph.nodes)
    assert max(c.steps for c in checks)<=1 and sum(c.share for c in checks)/len(checks)<0.03
    ran = ran_ops(p)
    assert {k:ran[k] for k in must}==must and not set(never.split()) & set(ran), ran
    assert integers_stored(p, model)
    m = OnnxModel(p)
    with torch.no_grad(): y = as_tuple(model(*x))
    for a,b in zip(y, as_tuple(m(*x)), strict=True): assert sqnr(a, b) > 25
    for n in 1,3: # the batch is open, and samples don't see each other
        for a,b in zip(as_tuple(m(*x)), as_tuple(m(*(o[:n] for o in x)))): assert b.shape==a[:n].shape and sqnr(a[:n], b) > 30


def test_scales_and_shifts_of_channels_are_convolutions(tmp_path):
    torch.manual_seed(0)
    model,ref,x = made(learned_scales(), [(3,10,10)])
    assert [op_of(n) for n in ref.graph.nodes].count('batch_norm')==2
    p = written(tmp_path, model, ref, x)
    assert max(c.steps for c in check_onnx(p, ref, x))<=1
    ran = ran_ops(p)
    assert ran['QLinearConv']==6 and not set(ran)&{'BatchNormalization','Mul','Add','Conv'}, ran
    with torch.no_grad(): assert sqnr(model(*x), OnnxModel(p)(*x)) > 30


def test_attention_over_five_dimensions(tmp_path):
    "Hiera's, within windows; what it reads is in float, and torch's converter has no words for it"
    torch.manual_seed(0)
    def run(m, x):
        q,k,v = m.qkv(x).view(x.shape[0], 2, 6, 3, 2, 4).permute(3, 0, 4, 1, 2, 5).unbind(0)
        return m.o(F.scaled_dot_product_attention(q.unflatten(-2, (3, 2)).amax(-2), k, v).transpose(1, 2).reshape(x.shape[0], 2, 3, 8))
    model,ref,x = made(Fn(run, qkv=nn.Linear(8,24), o=nn.Linear(8,5)), [(2,6,8)])
    p = written(tmp_path, model, ref, x)
    assert max(c.steps for c in check_onnx(p, ref, x))<=1
    with torch.no_grad(): assert sqnr(model(*x), OnnxModel(p)(*x)) > 30


def test_what_needs_to_know_the_batch_is_bound_to_one(tmp_path):
    "A kernel for each sample (CondConv) is a convolution in as many groups as there are samples, and ONNX has only numbers for groups"
    from fastcompress.deploy.mobile import export_mobile, load_mobile
    torch.manual_seed(0)
    def run(m, x):
        x = m.a(x)
        w = torch.softmax(m.route(x.mean((2, 3))), 1)@m.bank
        return m.b(F.conv2d(x.reshape(1, -1, *x.shape[2:]), w.reshape(-1, 8, 3, 3), padding=1, groups=x.shape[0]).reshape(x.shape).relu())
    net = Fn(run, a=C(3), route=nn.Linear(8,2), b=C())
    net.bank = nn.Parameter(torch.randn(2, 8*8*9)*.1)
    x = torch.randn(4,3,10,10)
    r = export_mobile(net, x, tmp_path/'b', [x], format='onnx', show=False)
    assert r.fixed_batch==1 and any('batch of 1' in n and 'conv2d' in n for n in r.notes)
    m = load_mobile(tmp_path/'b')
    with torch.no_grad(): assert sqnr(net(x[:1]), m(x[:1])) > 25
    with pytest.raises(ValueError, match=r'it takes float32\[1, 3, 10, 10\]'): m(x)


def test_a_factor_goes_into_the_scale(tmp_path):
    torch.manual_seed(0)
    model,ref,x = made(Fn(lambda m,x: m.b(F.relu(m.a(x))*.7)+m.c(F.relu(m.a(x))*-.7), a=C(3), b=C(), c=C()), [(3,10,10)])
    p = written(tmp_path, model, ref, x)
    assert max(c.steps for c in check_onnx(p, ref, x))<=1
    ran = ran_ops(p)
    assert ran['QLinearConv']==5 and not set(ran)&{'BatchNormalization','Mul'}, ran # the negative one is a convolution
    with torch.no_grad(): assert sqnr(model(*x), OnnxModel(p)(*x)) > 30


@pytest.mark.parametrize('arch,kw,must', [('resnet18', {}, dict(QLinearConv=20, QLinearAdd=8, QGemm=1, Conv=0, Gemm=0, Add=0, Relu=0)),
                                          ('mobilenetv3_small_050', {}, dict(QLinearConv=53, QGemm=1, Conv=0, Gemm=0, Add=0)),
                                          ('vit_tiny_patch16_224', dict(img_size=64, depth=2), dict(QLinearConv=1, QGemm=9, QLinearAdd=0, MatMulIntegerToFloat=2, Gemm=0, Conv=0))])
def test_timm(arch, kw, must, tmp_path):
    model,x = timm_model(arch, **kw)
    simulate_(model, x, 'onnx')
    calibrate_(model, [x], show=False)
    ref = fold_all_(capture(model, x))
    p = written(tmp_path, model, ref, (x,))
    checks = check_onnx(p, ref, x)
    assert max(c.steps for c in checks)<=1 and sum(c.share for c in checks)/len(checks)<0.005
    ran = ran_ops(p)
    assert {k:ran[k] for k in must}==must
    weights = sum(q.axis is not None for q in simulation(model).quantizers.values() if q.is_weight)
    assert sum(i.data_type==onnx.TensorProto.INT8 and 'zero' not in i.name for i in onnx.load(p).graph.initializer)==weights
    assert p.stat().st_size < 1.35*sum(t.numel() for t in model.parameters())+150_000
    with torch.no_grad(): y = model(x)
    assert sqnr(y, OnnxModel(p)(x)) > 15 and OnnxModel(p)(x[:1]).shape==(1,10)


@pytest.mark.parametrize('w,a', [(2,8),(4,8),(8,6),(4,16),(16,16),(9,12)])
@pytest.mark.parametrize('net', ['relu6_pool','rows','transposed'])
def test_widths(w, a, net, tmp_path):
    torch.manual_seed(0)
    model,shapes,_,_ = NETS[net]()
    model,ref,x = made(model, shapes, w_bits=w, a_bits=a)
    p = written(tmp_path, model, ref, x)
    assert max(c.steps for c in check_onnx(p, ref, x))<=1
    inits = onnx.load(p).graph.initializer
    stored = {(i.data_type, int(np.abs(onnx.numpy_helper.to_array(i)).max())) for i in inits if 'weight_int' in i.name}
    assert {t for t,_ in stored}=={onnx.TensorProto.INT8 if w<=8 else onnx.TensorProto.INT16} and max(v for _,v in stored) <= 2**(w-1)-1
    if a<=8: # the integer kernels are found whatever the width
        assert ran_ops(p)['Gemm']==0
    outs = ref.graph.find_nodes(op='output')[0].args[0]
    with torch.no_grad(): y = model(*x)
    assert sqnr(y, OnnxModel(p)(*x)) > (15 if a<=8 else 30)


def test_per_channel_axes(tmp_path):
    "One scale for each output channel, on the dimension where these are"
    torch.manual_seed(0)
    model,ref,x = made(nn.Sequential(nn.ConvTranspose2d(3,6,2), nn.Conv2d(6,5,1), nn.Flatten(), nn.Linear(5*49,4)), [(3,6,6)])
    p = written(tmp_path, model, ref, x)
    m = onnx.load(p)
    dims = {i.name: tuple(i.dims) for i in m.graph.initializer}
    found = {dims[n.input[0]]: (dims[n.input[1]], next(a.i for a in n.attribute if a.name=='axis')) for n in m.graph.node if n.op_type=='DequantizeLinear' and 'weight' in n.input[0]}
    assert found == {(3,6,2,2): ((6,),1), (5,6,1,1): ((5,),0), (4,245): ((4,),0)}


def test_one_scale_per_tensor(tmp_path):
    torch.manual_seed(0)
    model,ref,x = made(nn.Sequential(C(3), gains(nn.BatchNorm2d(8)), nn.ReLU(), nn.ConvTranspose2d(8,6,2)), [(3,6,6)], per_channel=False)
    assert max(c.steps for c in check_onnx(written(tmp_path, model, ref, x), ref, x))<=1


def test_a_wrong_file_is_found_out(tmp_path):
    torch.manual_seed(0)
    model,ref,x = made(*NETS['residual']()[:2])
    p = written(tmp_path, model, ref, x)
    m = onnx.load(p)
    b = next(i for i in m.graph.initializer if i.name.startswith('b.bias_int'))
    b.raw_data = (np.frombuffer(b.raw_data, np.int32)+5000).tobytes()
    onnx.save(m, p)
    bad = [c for c in check_onnx(p, ref, x) if c.steps>1]
    assert [c.layer for c in bad]==['b'] or {c.key for c in bad} <= {c.key for c in check_onnx(p, ref, x)} and len(bad)==1, 'only the one operation, as all others are fed the same integers'
    other = made(nn.Sequential(*[C(3,3) for _ in range(12)]), [(3,8,8)])[1]
    with pytest.raises(ValueError, match='not written from this graph'): check_onnx(p, other, x)


def test_fixed_batch(tmp_path):
    "A graph bound to a batch gives a file bound to it; so does dynamic_batch=False"
    torch.manual_seed(0)
    model,ref,x = made(nn.Sequential(C(3), nn.ReLU(), C()), [(3,8,8)])
    p = written(tmp_path, model, ref, x, dynamic_batch=False)
    shape = [d.dim_value for d in onnx.load(p).graph.input[0].type.tensor_type.shape.dim]
    assert shape==[4,3,8,8] and OnnxModel(p)(*x).shape[0]==4
    model,ref,x = made(Fn(lambda m,x: m.a(x).reshape(4,-1), a=C(3)), [(3,8,8)])
    assert ref.meta['fixed_batch']==4
    p = written(tmp_path, model, ref, x)
    assert max(c.steps for c in check_onnx(p, ref, x))<=1


def test_open_batch_from_one_sample(tmp_path):
    torch.manual_seed(0)
    model,ref,x = made(*NETS['attention']()[:2])
    p = written(tmp_path, model, ref, (x[0][:1],))
    shape = onnx.load(p).graph.input[0].type.tensor_type.shape.dim
    assert shape[0].dim_param=='batch' and OnnxModel(p)(*x).shape[0]==4


def test_file_is_clean(tmp_path):
    "No paths of this machine, no constant twice but zero points, names to refer to"
    torch.manual_seed(0)
    model,ref,x = made(*NETS['two_in_two_out']()[:2])
    p = written(tmp_path, model, ref, x)
    raw,m = p.read_bytes(),onnx.load(p)
    assert b'.py' not in raw and b'site-packages' not in raw
    assert [o.name for o in m.graph.output]==['output','output_1'] and len(m.graph.input)==2
    tensors = [(i.data_type, tuple(i.dims), onnx.numpy_helper.to_array(i).tobytes()) for i in m.graph.initializer if '_zero' not in i.name]
    assert len(tensors)==len(set(tensors))
    assert next(o.version for o in m.opset_import if o.domain in ('','ai.onnx'))==21 and {o.domain for o in m.opset_import} <= {'','ai.onnx'}


def test_weights_and_zero_points_are_not_shared(tmp_path):
    "onnxruntime 1.32 refuses to load a file in which two nodes read one int8 tensor, where it has to turn these into uint8: on x86 without VNNI"
    torch.manual_seed(0)
    model,ref,x = made(Fn(lambda m,x: m.b(m.b(m.a(x))), a=C(3), b=C()), [(3,8,8)])
    p = written(tmp_path, model, ref, x)
    int8 = {i.name for i in onnx.load(p).graph.initializer if i.data_type==onnx.TensorProto.INT8}
    read = [i for n in onnx.load(p).graph.node for i in n.input if i in int8]
    assert len(read)==len(set(read))==6 # three weights, three zero points
    assert max(c.steps for c in check_onnx(p, ref, x))<=1


PAIRS = dict(conv=lambda: C(6, 8), three=lambda: C(3, 8, 7), odd=lambda: C(5, 8), depthwise=lambda: C(16, 16, groups=16), grouped=lambda: C(12, 12, groups=4), grouped_odd=lambda: C(9, 9, groups=3), pointwise=lambda: C(7, 9, 1), rows=lambda: nn.Linear(33, 40), transposed=lambda: nn.ConvTranspose2d(6, 5, 2))

@pytest.mark.parametrize('name', PAIRS)
def test_files_for_any_x86_processor(name, tmp_path):
    "onnx_avx2: the largest bytes there are, against weights of mostly one sign, loaded without the option that makes sums exact"
    from fastcompress.deploy.onnx import _may_overflow
    torch.manual_seed(0)
    net = nn.Sequential(PAIRS[name]()).eval()
    w = net[0].weight
    with torch.no_grad(): w.copy_(torch.where(torch.rand_like(w)<.8, 1., -1.)*(.5+torch.rand_like(w)/2))
    shape = (4,20,33) if name=='rows' else (4, w.shape[0] if name=='transposed' else w.shape[1]*getattr(net[0], 'groups', 1), 10, 10)
    x = torch.where(torch.rand(shape)<.8, 1., 0.)
    x[0] = 1
    simulate_(net, x, 'onnx_avx2'); calibrate_(net, [x], show=False)
    ref = fold_all_(capture(net, x))
    p = written(tmp_path, net, ref, (x,))
    assert not _may_overflow(p) and max(c.steps for c in check_onnx(p, ref, x))<=1
    s = ort.InferenceSession(str(p), providers=['CPUExecutionProvider'])
    assert np.array_equal(s.run(None, {s.get_inputs()[0].name: x.numpy()})[0], OnnxModel(p)(x).numpy())
    simulate_(net, x, 'onnx'); calibrate_(net, [x], show=False)
    assert _may_overflow(written(tmp_path, net, fold_all_(capture(net, x)), (x,)))


def test_bundle_for_any_x86_processor(tmp_path):
    from fastcompress.deploy.mobile import export_mobile, load_mobile
    torch.manual_seed(0)
    net,x = nn.Sequential(C(3), nn.ReLU(), C()).eval(),torch.randn(4,3,8,8)
    r = export_mobile(net, x, tmp_path/'b', [x], format='onnx', engine='onnxruntime_avx2', show=False)
    assert r.profile=='onnx_avx2' and r.max_steps<=1 and 'x64quantprecision' not in (tmp_path/'b'/'README.md').read_text()
    assert load_mobile(tmp_path/'b')(x).shape==(4,8,8,8)
    export_mobile(net, x, tmp_path/'c', [x], format='onnx', show=False)
    assert 'x64quantprecision' in (tmp_path/'c'/'README.md').read_text()
    with pytest.raises(ValueError, match='run on onnxruntime or onnxruntime_avx2'): export_mobile(net, x, tmp_path/'d', [x], format='onnx', engine='qnnpack', show=False)


def test_reads_without_our_library(tmp_path):
    torch.manual_seed(0)
    model,ref,x = made(*NETS['gate']()[:2])
    p = written(tmp_path, model, ref, x)
    np.save(tmp_path/'x.npy', x[0].numpy())
    code = "import sys, numpy as np, onnxruntime as o; k = o.SessionOptions(); k.add_session_config_entry('session.x64quantprecision', '1'); s = o.InferenceSession(sys.argv[1], k, providers=['CPUExecutionProvider']); np.save(sys.argv[3], s.run(None, {s.get_inputs()[0].name: np.load(sys.argv[2])})[0])"
    subprocess.run([sys.executable, '-c', code, str(p), str(tmp_path/'x.npy'), str(tmp_path/'y.npy')], check=True)
    assert torch.equal(torch.from_numpy(np.load(tmp_path/'y.npy')), OnnxModel(p)(*x))


class Bessel(nn.Module):
    def forward(self, x): return torch.special.bessel_j0(x)

def test_what_cannot_be_written_is_named(tmp_path):
    model,ref,x = made(nn.Sequential(nn.Linear(4,4), Bessel()), [(4,)])
    with pytest.raises(RuntimeError, match=r'bessel_j0 \(in 1\)'): save_onnx(ref, tmp_path/'m.onnx', x, show=False)
    assert not (tmp_path/'m.onnx').exists()


def test_missing_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, 'onnxscript', None)
    model,ref,x = made(nn.Sequential(nn.Linear(4,4)), [(4,)])
    with pytest.raises(ImportError, match=r'onnxscript.*pip install fastcompress\[onnx\]'): save_onnx(ref, tmp_path/'m.onnx', x)
    with pytest.raises(ImportError, match=r'fastcompress\[onnx\]'): OnnxModel(tmp_path/'m.onnx')


def test_no_extra_needed_to_import():
    code = "import sys; sys.modules.update(dict.fromkeys(['onnx','onnxruntime','onnxscript','onnx_ir'])); import fastcompress.deploy.onnx"
    subprocess.run([sys.executable, '-c', code], check=True)
