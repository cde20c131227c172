"What the measuring rooms claim, checked against nets counted by hand, tables of known limits and a clock that is not real"
import json, subprocess, sys
from math import inf

import pytest
import timm
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from torch import nn, tensor

from fastcompress.measure.count import (compressed_bytes, count_macs, file_bytes, flush_subnormals_, is_subnormal, mac_calls, macs_by_layer,
                                        n_nonzero, n_params, n_subnormal, sparsity_by_layer, subnormals)
from fastcompress.measure.latency import Latency, faster, ratio, time_interleaved
from fastcompress.measure.quality import agreement, max_steps, sqnr, steps_apart
from fastcompress.measure.report import Report, all_notes, columns, compare, headlines, measure, to_text
from fastcompress.study.plots import plot_schedule, plot_sparsity, plot_sqnr, plot_weights


class Fn(nn.Module):
    "A function as a model"
    def __init__(self, f): super().__init__(); self.f = f
    def forward(self, *xs): return self.f(*xs)

# ---- count

@pytest.mark.parametrize('layer, shape, macs', [
    (nn.Conv1d(2,4,3),                            (2,9),    4*7 * 2*3),
    (nn.Conv2d(2,4,3),                            (2,5,5),  4*3*3 * 2*9),
    (nn.Conv2d(2,4,3,bias=False,padding=1),       (2,5,5),  4*5*5 * 2*9),
    (nn.Conv2d(2,4,(3,1),stride=2,dilation=2),    (2,9,9),  4*3*5 * 2*3),
    (nn.Conv2d(4,8,3,groups=2),                   (4,5,5),  8*3*3 * 2*9),
    (nn.Conv2d(6,6,3,groups=6),                   (6,5,5),  6*3*3 * 9),
    (nn.Conv3d(1,2,2),                            (1,3,3,3), 2*8 * 8),
    (nn.ConvTranspose2d(2,4,3),                   (2,5,5),  2*25 * 4*9),
    (nn.ConvTranspose2d(4,6,2,stride=2,groups=2), (4,3,3),  4*9 * 3*4),
    (nn.Linear(7,3),                              (7,),     21),
    (nn.Linear(7,3),                              (5,7),    5*21),
    (nn.LSTM(8,4,2,bidirectional=True,batch_first=True), (5,8), 5*2*(16*8+16*4 + 16*8+16*4)),
    (nn.GRU(8,4,batch_first=True),                (5,8),    5*(12*8+12*4)),
    (nn.Sequential(nn.BatchNorm2d(3), nn.ReLU(), nn.AvgPool2d(2)), (3,4,4), 0)])
def test_macs_of_layers(layer, shape, macs):
    assert count_macs(layer, torch.randn(1,*shape)) == macs
    assert count_macs(layer, torch.randn(3,*shape)) == macs     # per sample


q5 = (5,8)
@pytest.mark.parametrize('f, macs', [
    (lambda x: x @ x.transpose(-2,-1),                             5*5*8),
    (lambda x: torch.matmul(x, x.new_ones(8,3)),                   5*8*3),
    (lambda x: torch.bmm(x, x.transpose(1,2)),                     5*5*8),
    (lambda x: torch.baddbmm(x.new_ones(1), x, x.transpose(1,2)),  5*5*8),
    (lambda x: torch.addmm(x.new_ones(3), x[0], x.new_ones(8,3)),  5*8*3),
    (lambda x: F.linear(input=x, weight=x.new_ones(3,8)),          5*8*3),
    (lambda x: torch.einsum('bij,bkj->bik', x, x),                 5*5*8),
    (lambda x: torch.tensordot(x, x.new_ones(8,2), dims=1),        5*8*2),
    (lambda x: F.scaled_dot_product_attention(x,x,x),              2*5*5*8),
    (lambda x: torch.ops.aten.linear.default(x, x.new_ones(3,8)),  5*8*3),
    (lambda x: x*x + x.exp().sum(),                                0)])
def test_macs_of_functions(f, macs): assert count_macs(Fn(f), torch.randn(4,*q5)) == macs


@pytest.mark.parametrize('weights', [True, False])
def test_macs_of_multihead_attention(weights):
    "Four projections, scores and mix, whichever way torch computes them"
    mha = nn.MultiheadAttention(8, 2, batch_first=True)
    net = Fn(lambda x: mha(x, x, x, need_weights=weights)[0])
    assert count_macs(net, torch.randn(2,*q5)) == 4*5*8*8 + 2*5*5*8


def test_macs_of_resnet18():
    "1.82 G, and the sum by hand: stem, four stages of 3x3 convolutions, three 1x1 shortcuts, classifier"
    by_hand = 112**2*64*3*49 + 4*56**2*64*64*9
    for s,c in ((28,128),(14,256),(7,512)): by_hand += s*s*(c*(c//2)*9 + 3*c*c*9 + c*(c//2))
    by_hand += 512*1000
    model = timm.create_model('resnet18', pretrained=False)
    by_layer = macs_by_layer(model, torch.randn(1,3,224,224))
    assert sum(by_layer.values()) == by_hand == 1_814_073_344
    assert by_layer['conv1'] == 112**2*64*147 and by_layer['fc'] == 512_000
    assert list(by_layer)[0]=='conv1' and list(by_layer)[-1]=='fc'


@pytest.mark.filterwarnings('ignore:torch.quantize_per_tensor', 'ignore:`torch.jit.script`')
def test_macs_of_integer_and_script_models():
    engine = next(e for e in ('x86','fbgemm','qnnpack') if e in torch.backends.quantized.supported_engines)
    old = torch.backends.quantized.engine
    torch.backends.quantized.engine = engine
    try:
        w = torch.quantize_per_tensor(torch.randn(4,3,3,3), .1, 0, torch.qint8)
        packed = torch.ops.quantized.conv2d_prepack(w, None, [1,1], [0,0], [1,1], 1)
        wt = torch.quantize_per_tensor(torch.randn(4,5,3,3), .1, 0, torch.qint8)
        packed_t = torch.ops.quantized.conv_transpose2d_prepack(wt, None, [1,1], [0,0], [0,0], [1,1], 1)
        net = Fn(lambda x: torch.ops.quantized.conv_transpose2d(
            torch.ops.quantized.conv2d_relu(torch.quantize_per_tensor(x,.1,128,torch.quint8), packed, .1, 128), packed_t, .1, 128))
        calls = mac_calls(net, torch.randn(1,3,8,8))
    finally: torch.backends.quantized.engine = old
    assert [(c['op'], c['macs'], c['dtype']) for c in calls] == [('quantized.conv2d_relu', 4*36*27, 'quint8'), ('quantized.conv_transpose2d', 4*36*5*9, 'quint8')]
    script = torch.jit.script(nn.Sequential(nn.Conv2d(3,4,3), nn.ReLU()))
    assert count_macs(script, torch.randn(1,3,8,8)) == 4*36*27


def test_counting_leaves_the_model_alone():
    net = nn.Sequential(nn.Conv2d(3,4,3), nn.BatchNorm2d(4))
    net[1].eval()
    before = {k:v.clone() for k,v in net.state_dict().items()}
    macs_by_layer(net, torch.randn(2,3,6,6))
    assert (net.training, net[0].training, net[1].training) == (True, True, False)
    assert all(torch.equal(v, before[k]) for k,v in net.state_dict().items())
    with pytest.raises(RuntimeError): count_macs(net, torch.randn(2,5,6,6))
    for hooks in (torch.nn.modules.module._global_forward_hooks, torch.nn.modules.module._global_forward_pre_hooks): assert not hooks


def test_nonzeros_of_a_masked_net():
    net = nn.Sequential(nn.Conv2d(2,4,3), nn.BatchNorm2d(4), nn.Linear(4,2))
    with torch.no_grad():
        for p in net.parameters(): p.fill_(1.)
        net[0].weight[0] = 0.; net[0].weight[1,0] = -0.
        net[2].bias[0] = 0.
    assert n_params(net) == 72+4 + 4+4 + 8+2
    assert n_nonzero(net) == n_params(net) - 18 - 9 - 1
    assert n_nonzero(net, weights_only=True) == 72-27 + 8
    assert sparsity_by_layer(net) == {'0':27/72, '2':0.}


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_subnormals(dtype):
    tiny = torch.finfo(dtype).tiny
    t = tensor([0., -0., tiny, -tiny, tiny/2, -tiny/4, 1., inf, -inf, float('nan')], dtype=dtype)
    assert is_subnormal(t).tolist() == [False]*4 + [True]*2 + [False]*4
    model = nn.Module()
    model.w = nn.Parameter(t.clone()[:8].view(2,4).t())    # not contiguous
    model.register_buffer('running', t.clone())
    model.register_buffer('count', tensor(3))
    assert subnormals(model) == {'w':2, 'running':2} and n_subnormal(model) == 4
    assert flush_subnormals_(model) == 4 and n_subnormal(model) == 0
    assert model.w.t().flatten().tolist() == [0.,0.,tiny,-tiny,0.,0.,1.,inf]
    assert model.w.requires_grad and flush_subnormals_(model) == 0


def test_subnormals_are_seen_while_the_thread_flushes_them():
    t = tensor([1e-40, 1.])
    if not torch.set_flush_denormal(True): pytest.skip('this CPU cannot flush subnormals')
    try: found = is_subnormal(t).tolist()
    finally: torch.set_flush_denormal(False)
    assert found == [True, False]


def test_bytes(tmp_path):
    (tmp_path/'sub').mkdir()
    (tmp_path/'zeros.bin').write_bytes(bytes(3_000_000))        # more than one chunk
    (tmp_path/'sub'/'noise.bin').write_bytes(torch.randint(0, 256, (5000,), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)).numpy().tobytes())
    assert file_bytes(tmp_path) == 3_005_000 and file_bytes(tmp_path/'zeros.bin') == 3_000_000
    assert compressed_bytes(tmp_path/'zeros.bin') < 4000
    assert 4990 < compressed_bytes(tmp_path/'sub') < 5020
    assert compressed_bytes(tmp_path) == compressed_bytes(tmp_path/'zeros.bin') + compressed_bytes(tmp_path/'sub')
    with pytest.raises(FileNotFoundError, match='no file or folder'): compressed_bytes(tmp_path/'none')

# ---- latency

class Machine:
    "A clock that moves only when a job runs"
    def __init__(self): self.now,self.calls = 0.,[]
    def clock(self): return self.now
    def job(self, name, ms):
        def f(x): self.calls.append((name, torch.get_num_threads(), torch.is_grad_enabled(), x)); self.now += ms(len(self.calls))/1000
        return f


def test_rounds_rotate_and_warmup_is_dropped():
    pc = Machine()
    jobs = {k:pc.job(k, lambda i, ms=ms: 1000. if i<=3 else ms) for k,ms in (('a',1),('b',2),('c',3))}
    res = time_interleaved(jobs, tensor([7.]), n=4, warmup=1, threads=1, clock=pc.clock)
    assert ''.join(c[0] for c in pc.calls) == 'abc' + 'abc' + 'bca' + 'cab' + 'abc'
    assert {(c[1], c[2]) for c in pc.calls} == {(1, False)}
    for k,ms in (('a',1),('b',2),('c',3)):
        assert res[k].n == 4 and res[k].median == pytest.approx(ms) and res[k].first == pytest.approx(1000)


def test_each_candidate_can_have_its_own_input():
    pc = Machine()
    time_interleaved({'a':pc.job('a', lambda i: 1), 'b':pc.job('b', lambda i: 1)}, {'a':tensor(1.), 'b':tensor(2.)}, n=2, warmup=0, clock=pc.clock)
    assert [(c[0], c[3].item()) for c in pc.calls] == [('a',1.),('b',2.),('b',2.),('a',1.)]


def test_threads_and_modes_come_back():
    net,before = nn.Sequential(nn.Linear(2,2), nn.Dropout()), torch.get_num_threads()
    seen = []
    net.register_forward_hook(lambda *_: seen.append((net.training, torch.get_num_threads())))
    time_interleaved({'net':net}, torch.ones(1,2), n=1, warmup=1, threads=before+1)
    assert seen == [(False, before+1)]*2 and net.training and torch.get_num_threads() == before


def test_statistics_and_ranking():
    a = Latency('a', (1.,2.,3.,4.,100.))
    assert (a.q1, a.median, a.q3, a.min) == (2.,3.,4.,1.)
    a = Latency('a', (1.,2.,3.,4.,5.,6.,7.,8.,100.)); b = Latency('b', tuple(2*t for t in a.times))
    assert ratio(a, b).median == .5 and faster(a, b) == faster(b, a) == 'a'
    wobble = Latency('c', (1.1,1.9,3.2,3.9,5.1,5.9,7.1,7.9,101.))
    assert faster(a, wobble) == 'same within noise'
    assert faster(Latency('a',(1.,)*7), Latency('b',(2.,)*7)) == 'same within noise'   # seven rounds rank nobody
    assert faster(Latency('a',(1.,)*8), Latency('b',(2.,)*8)) == 'a'
    assert faster(Latency('a',(1.,)*99), Latency('b',(1.015,)*99)) == 'same within noise'   # 1.5% may be where the weights lie
    assert faster(Latency('a',(.9,)*70+(1.1,)*30), Latency('b',(1.,)*100)) == 'same within noise'   # slower in more than a quarter of the rounds
    with pytest.raises(ValueError, match='met different rounds'): ratio(a, Latency('b', b.times, among=('b','x')))

@pytest.mark.parametrize('n', [10, 30])
def test_noise_is_hardly_ever_ranked(n):
    "Two candidates of the same speed with 20% of noise: named in at most 2% of 500 measurements"
    g = torch.Generator().manual_seed(0)
    draw = lambda name: Latency(name, tuple((1+.2*torch.randn(n, generator=g).abs()).tolist()))
    assert sum(faster(draw('a'), draw('b'))!='same within noise' for _ in range(500)) <= 10

# ---- quality

@pytest.mark.parametrize('bits, step, db', [(2,1.048385,8.2556), (3,.601824,13.9107), (4,.338608,19.2577), (8,.030766,40.5697)])
def test_sqnr_reaches_the_gaussian_limit(bits, step, db):
    x = torch.special.ndtri((torch.arange(1_000_000, dtype=torch.float64)+.5)/1_000_000)   # quantiles, free of sampling noise
    assert sqnr(x, (x/step).round().clamp(-2**(bits-1), 2**(bits-1)-1)*step) == pytest.approx(db, abs=.02)


def test_sqnr_values():
    assert sqnr(tensor([3.,4.]), tensor([3.,4.5])) == pytest.approx(20)
    assert sqnr(tensor([3.,4.]).half(), tensor([3.,4.5]).half()) == pytest.approx(20)
    x = torch.full((1000,), 300.).half()                 # its square overflows float16
    assert sqnr(x, x+1) == pytest.approx(49.5424, abs=1e-3)
    pooled = sqnr({'a':tensor([10.]), 'b':[tensor([1.])]}, {'a':tensor([10.]), 'b':[tensor([0.])]})
    assert pooled == pytest.approx(20.0432, abs=1e-3)     # 101 over 1, not a mean of inf and 0
    assert sqnr(torch.zeros(3), torch.zeros(3)) == inf and sqnr(torch.zeros(3), torch.ones(3)) == -inf
    with pytest.raises(ValueError, match='shapes differ'): sqnr(torch.ones(2,1), torch.ones(1,2))
    with pytest.raises(TypeError, match='got float'): sqnr(1., 1.)


@pytest.mark.filterwarnings('ignore:torch.quantize_per_tensor')
def test_agreement_and_steps():
    a = tensor([[1.,2.],[2.,1.],[0.,1.],[1.,0.]])
    assert agreement(a, a.flip(1)) == 0. and agreement(a, a*3) == 1.
    assert agreement(a, tensor([[1.,2.],[2.,1.],[0.,1.],[0.,1.]])) == .75
    assert agreement(torch.eye(2).expand(1,2,2), torch.eye(2).flip(0).expand(1,2,2)) == 0.
    q = torch.quantize_per_tensor(tensor([0.,.1,.2]), .1, 0, torch.quint8)
    assert steps_apart(q, torch.quantize_per_tensor(tensor([0.,.1,.5]), .1, 0, torch.quint8)) == (3, pytest.approx(1/3))
    assert max_steps(tensor([255], dtype=torch.uint8), tensor([0], dtype=torch.uint8)) == 255

# ---- report

@pytest.fixture
def report():
    turns = (1.,1.01,.99,1.02,.98,1.,1.01,.99)
    rep = Report('Net <1>', 'a "test" & more', env={'torch':'2'})
    rep.add('float', accuracy=.98, samples=1000, params=1000, nonzero=1000, macs=5000, bytes=4000, compressed=3900, subnormals=0,
            latency=Latency('float', tuple(2*t for t in turns)), sqnr=inf)
    rep.add('sparse', accuracy=.90, samples=1000, sparsity_requested=.9, sparsity_obtained=.8, params=1000, nonzero=250, macs=5000, bytes=4000,
            compressed=1000, latency=Latency('sparse', tuple(2*t for t in turns[1:]+turns[:1])), subnormals=3)
    rep.add('int8 file', accuracy=.977, samples=1000, accuracy_simulated=.99, params=1000, bytes=1000, compressed=800,
            latency=Latency('int8 file', tuple(3*t for t in turns)), sqnr=20.)
    rep.note('a note with <tags>').table('Left in float', [dict(layer='fc', why='no <kernel>')])
    fig = Figure(figsize=(2,1)); fig.subplots().plot([0,1])
    return rep.figure('A line', fig, 'rises & <falls>')


def test_report_text(report):
    lines = str(report).splitlines()
    assert max(map(len, lines)) <= 150
    line = lambda title: next(l for l in lines if l.startswith(title))
    assert line('Bytes on disk').split() == 'Bytes on disk 4.00 kB 4.00 kB same 1.00 kB 4.00× smaller'.split()
    assert line('MACs').split() == ['MACs','5.00k','5.00k','same','–']
    assert line('Zero weights, asked for').split()[-3:] == ['–','90.00%','–'] and line('Zero weights, obtained').split()[-3:] == ['–','80.00%','–']
    assert 'same within noise' in line('Latency') and '1.50× slower' in line('Latency')
    assert 'exact' in line('Signal to noise') and 'Engine' not in str(report)
    narrow = to_text(report, 70)
    assert max(map(len, narrow.splitlines())) <= 70 and narrow.count('\nBytes on disk') == 3


def test_report_says_it_in_words(report):
    assert headlines(report) == [('4.00× smaller','bytes on disk',True), ('1.50× slower','latency',False), ('−0.3 points','accuracy, 3 of 1,000 answers',None)]
    notes = ' '.join(all_notes(report))
    for words in ('they give no dense-kernel speed', 'sparse: 3 subnormal numbers', '90.00% zeros were asked for, 80.00% obtained', 'sparse: no faster and no slower than float',
                  'int8 file: 1.50× slower', 'the simulation promised 99.00%, the converted model reaches 97.70%', 'int8 file: −0.3 points of accuracy are 3 of 1,000'): assert words in notes
    assert 'sparse: −8.0 points' not in notes    # eighty answers are a difference, and so are 15 where chance moves 4
    assert headlines(Report().add('a', accuracy=.98).add('b', accuracy=.965, samples=1000)) == [('−1.5 points','accuracy',False)]


def test_report_round_trip(report):
    d = json.loads(report.to_json())
    assert d['rows']['float']['bytes'] == 4000 and d['rows']['float']['sqnr'] == 'inf'
    assert d['rows']['int8 file']['latency']['median'] == pytest.approx(3.) and d['rows']['int8 file']['latency']['n'] == 8
    back = Report.from_dict(d)
    assert back.rows == report.rows and back.tables == report.tables and back.notes == report.notes
    assert json.loads(back.to_json())['rows'] == d['rows']


def test_report_page(report, tmp_path):
    files = report.save(tmp_path/'out')
    page = (tmp_path/'out'/'report.html').read_text(encoding='utf-8')
    assert [f.name for f in files] == ['report.html','report.json','report.txt'] and len(list((tmp_path/'out').iterdir())) == 3
    assert '<title>Net &lt;1&gt;</title>' in page and 'name="viewport"' in page and 'prefers-color-scheme:dark' in page
    for outside in ('http', '<script', '<link', 'url(', '@import', '//'): assert outside not in page.split('data:image/png;base64,')[0], outside
    assert page.count('<img') == page.count('src="data:image/png;base64,') == 1
    for raw in ('<tags>', '<kernel>', '<falls>', 'Net <1>'): assert raw not in page
    for text in ('a note with &lt;tags&gt;', 'no &lt;kernel&gt;', '4.00× smaller', 'dense-kernel speed', 'rises &amp; &lt;falls&gt;'): assert text in page
    assert page.count('<td') == page.count('</td>') and page.count('<div') == page.count('</div>')
    with pytest.raises(ValueError, match="can't save a report as '.pdf'"): report.save(tmp_path/'a.pdf')


def test_report_refuses_typing_errors(report):
    with pytest.raises(ValueError, match="Nearest: 'latency'"): report.add('x', latencies=1)
    with pytest.raises(ValueError, match="no row 'floot' in the report. Nearest: 'float'"): str(Report(baseline='floot').add('float', params=1))


def test_every_column_can_be_written():
    vals = {'engine':'x', 'latency':Latency('a',(1.,))}
    rep = Report().add('a', **{k:vals.get(k, .5) for k in columns})
    assert all(c.title in str(rep) and c.note in rep.to_html() for c in columns.values())


def test_compare():
    a,b = nn.Linear(2,2,bias=False), nn.Linear(2,2,bias=False)
    with torch.no_grad(): a.weight.copy_(torch.eye(2)); b.weight.copy_(tensor([[1.,0.],[.5,0.]]))
    x,y = tensor([[1.,0.],[0.,1.],[2.,1.],[1.,3.]]), tensor([0,1,0,1])
    rep = compare({'a':a, 'b':b, 'fn':lambda t: t@a.weight.T}, x, dl=[(x[:3],y[:3]), (x[3:],y[3:])], n=5)
    assert [rep.rows[k]['accuracy'] for k in rep.rows] == [1.,.5,1.] and rep.rows['b']['agreement'] == .5
    assert rep.rows['fn']['sqnr'] == inf and rep.rows['b']['sparsity'] == .5 and 'params' not in rep.rows['fn']
    assert rep.rows['a']['latency'].n == 5 and measure(b, x)['macs'] == 4


def test_measuring_needs_neither_fastai_nor_matplotlib():
    code = "import sys, fastcompress.measure.report, fastcompress.measure.quality; print([m for m in ('fastai','matplotlib','timm') if m in sys.modules])"
    assert subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True).stdout.strip() == '[]'

# ---- plots

def test_plots_say_the_finding():
    assert 'quick has done 50%' in plot_schedule({'slow':lambda p: p**2, 'quick':lambda p: p**.5}).axes[0].get_title()
    assert plot_schedule(['linear','zhu_gupta']).axes[0].get_title() == 'After a quarter, zhu_gupta has done 58% of the way'
    with pytest.raises(ValueError, match="no schedule 'liner'"): plot_schedule('liner')
    hist = [dict(step=i, pos=i/2, target=.4*i, layers={'a':.3*i, 'b':.5*i}) for i in range(3)]
    fig = plot_sparsity(hist)
    assert fig.get_suptitle() == 'Asked for 80%: from 60% in a to 100% in b'
    assert fig.axes[0].lines[1].get_ydata().tolist() == [0.,.5,1.]
    assert plot_sqnr({'a':3.}, title='mine').axes[0].get_title() == 'mine'
    assert plot_sqnr({'a':30., 'b':-2., 'c':5.}).axes[0].get_title() == 'b is the noisiest layer: -2.0 dB'
    assert 'not shown: 1 cleaner' in plot_sqnr({'a':3., 'b':inf}).axes[0].get_xlabel()
    w = torch.cat([torch.zeros(50), torch.full((49,), .5), tensor([3.])])
    assert plot_weights(w, scale=.1, bits=4).axes[0].get_title() == '50% of 100 weights are zero, 2.00% of the others lie outside the grid'
