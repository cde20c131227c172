"The bundle under abuse: every format, other targets' ranges, wrong inputs, killed writers, tampered folders, the code in README"
import copy, json, os, re, shutil, subprocess, sys, warnings
from pathlib import Path
import numpy as np
import pytest, torch
from torch import nn
import torch.nn.functional as F
import fastcompress.core as core, fastcompress.deploy.mobile as mobile
from fastcompress.core import atomic_dir, sweep_
from fastcompress.deploy.bundle import check_bundle, digest, seal, sha
from fastcompress.deploy.mobile import ExportReport, export_float, export_mobile, formats, load_mobile, predict_fresh, unfit
from fastcompress.deploy.snippets import languages, readme
from fastcompress.measure.quality import sqnr
from fastcompress.quantize.simulate import calibrate_, simulate_, simulation
from helpers import forking

pytestmark = [pytest.mark.filterwarnings('ignore:.*deprecated.*'), pytest.mark.usefixtures('one_thread')]
HAVE = dict(ptl=True, pte=bool(__import__('importlib.util', fromlist='x').find_spec('executorch')), onnx=bool(__import__('importlib.util', fromlist='x').find_spec('onnxruntime')))
FORMATS = [pytest.param(f, marks=pytest.mark.skipif(not HAVE[f], reason=f'the extra for {f} is not installed')) for f in HAVE]
PREP = dict(channel_order='RGB', range=[0, 1], normalize=dict(mean=[.48,.45,.4], std=[.22,.21,.2]), resize=dict(size=[16,16], method='squish'))


def net():
    torch.manual_seed(0)
    m = nn.Sequential(nn.Conv2d(3,8,3,2,padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8,8,3,padding=1), nn.SiLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(32,5))
    m[1].running_mean.normal_(); m[1].running_var.uniform_(.5, 2)
    return m.eval()

def batch(n=4, seed=0): return torch.randn(n,3,16,16, generator=torch.Generator().manual_seed(seed))

@pytest.fixture(scope='module')
def made(tmp_path_factory):
    "One bundle of each format, made once: path, model, x, report"
    found = {}
    def _made(format):
        if format not in found:
            path,x = tmp_path_factory.mktemp(format)/'phone',batch()
            found[format] = path,net(),x,export_mobile(net(), x, path, [x, batch(seed=1)], format=format, labels='abcde', preprocess=PREP, show=False)
        return found[format]
    return _made

@pytest.fixture
def phone(made, tmp_path):
    "A copy of a ptl bundle to be mistreated"
    shutil.copytree(made('ptl')[0], tmp_path/'phone')
    return tmp_path/'phone'

def contents(folder): return {p.name:p.read_bytes() for p in Path(folder).iterdir()}


# ---- every format

@pytest.mark.parametrize('format', FORMATS)
def test_the_folder(made, format):
    path,model,x,r = made(format)
    file = f'model.{format}'
    assert {p.name for p in path.iterdir()}=={file,'labels.txt','input.json','golden_input.npy','golden_output.npy','report.json','report.html','README.md'}
    info = json.loads((path/'input.json').read_text())
    assert set(info['sha256'])=={p.name for p in path.iterdir()}-{'input.json'} and info['digest']==digest(info)
    assert info['inputs']==[dict(shape=[None,3,16,16], dtype='float32')] and info['outputs']==[dict(shape=[None,5], dtype='float32')]
    assert (info['format'],info['file'],info['layout'])==(format,file,'NCHW') and info['normalize']==PREP['normalize']
    assert info['engine']==dict(ptl='qnnpack', pte='xnnpack', onnx='onnxruntime')[format] and info['versions']['torch']==torch.__version__
    assert np.array_equal(np.load(path/'golden_input.npy'), x[:1].numpy())
    assert isinstance(r, ExportReport) and r.format==format and r.bytes==(path/file).stat().st_size
    assert json.loads((path/'report.json').read_text(), parse_constant=lambda c: pytest.fail(f'{c} is no JSON'))['path']=='phone'


@pytest.mark.parametrize('format', FORMATS)
def test_the_file_is_the_model(made, format):
    path,model,x,r = made(format)
    with torch.no_grad(): want = model(x)
    assert sqnr(want, load_mobile(path)(x))>20 and r.sqnr_float>20 and r.sqnr_sim>25
    assert r.ops>=3 and r.max_steps<=1, 'operations are compared one by one'
    other = batch(7, seed=5)
    assert torch.equal(predict_fresh(path, other, bs=3), torch.cat([load_mobile(path)(b) for b in other.split(3)])), 'any batch, any process'


@pytest.mark.parametrize('format', FORMATS)
def test_python_of_the_readme_runs(made, format, tmp_path):
    "In a process that can't import this library"
    path,*_ = made(format)
    code, = re.findall(r'```python\n(.*?)```', (path/'README.md').read_text(), re.S)
    block = "import sys\nsys.modules['fastcompress'] = None\n"
    r = subprocess.run([sys.executable, '-W', 'ignore', '-c', block+code], cwd=path, capture_output=True, text=True)
    assert r.returncode==0, r.stderr
    assert r.stdout.strip()=='abcde'[np.load(path/'golden_output.npy').argmax()]
    shutil.copytree(path, tmp_path/'p')
    np.save(tmp_path/'p'/'golden_output.npy', np.load(path/'golden_output.npy')+1)
    r = subprocess.run([sys.executable, '-W', 'ignore', '-c', block+code], cwd=tmp_path/'p', capture_output=True, text=True)
    assert 'the golden input gives another output here' in r.stderr


@pytest.mark.parametrize('format', FORMATS)
def test_pixels_of_the_readme(made, format, tmp_path):
    "The code's preparation of a picture is what the model was given"
    from PIL import Image
    path,*_ = made(format)
    code, = re.findall(r'```python\n(.*?)```', (path/'README.md').read_text(), re.S)
    code = code[code.index('def pixels'):code.index('got =')]
    scope = dict(np=np)
    exec(code, scope)
    im = Image.fromarray(np.random.RandomState(0).randint(0, 256, (16,16,3), dtype='uint8'))
    want = (torch.tensor(np.asarray(im)).permute(2,0,1)[None]/255-torch.tensor(PREP['normalize']['mean']).view(3,1,1))/torch.tensor(PREP['normalize']['std']).view(3,1,1)
    assert torch.allclose(torch.from_numpy(scope['pixels'](im)), want.float(), atol=1e-5)
    page = (path/'README.md').read_text()
    kt,sw = page[page.index('```kotlin'):page.index('## Swift')],page[page.index('```swift'):page.index('## Python')]
    for code in kt,sw: # all numbers, in order
        for v in 'mean','std': assert re.search(r',? '.join(f"{n}f?" for n in PREP['normalize'][v]), code, re.I), v
    assert 'longArrayOf(1, 3, 16, 16)' in kt and '1, 3, 16, 16' in sw and f'model.{format}' in kt and f'model.{format}' in sw
    assert dict(ptl='LiteModuleLoader', pte='org.pytorch.executorch.Module', onnx='OrtEnvironment')[format] in kt


@pytest.mark.parametrize('format', FORMATS)
def test_pages_say_what_stayed_in_float(made, format):
    path,_,_,r = made(format)
    html = (path/'report.html').read_text()
    assert html.startswith('<!doctype html>') and 'What stayed in float, and why' in html and 'http' not in html
    for i in r.islands: assert i.op in html and i.reason
    if format=='ptl': assert 'silu' in {i.op for i in r.islands}
    assert r._repr_html_() in html and r.path in str(r)


@pytest.mark.parametrize('format', FORMATS)
@pytest.mark.parametrize('what', ['model','golden_output.npy'])
def test_damage_in_every_format(made, format, what, tmp_path):
    shutil.copytree(made(format)[0], tmp_path/'p')
    file = tmp_path/'p'/(f'model.{format}' if what=='model' else what)
    whole = file.read_bytes()
    for b in whole[:len(whole)//2], whole[:-1], b'', whole[:40]+bytes([whole[40]^1])+whole[41:]:
        file.write_bytes(b)
        with pytest.raises(ValueError, match='was changed after it was written'): load_mobile(tmp_path/'p')


@pytest.mark.parametrize('format', FORMATS)
def test_a_fixed_batch(format, tmp_path):
    x = batch(2)
    r = export_mobile(net(), x, tmp_path/'p', [x], format=format, batch=3, show=False)
    m = load_mobile(tmp_path/'p')
    assert r.fixed_batch==3 and m.info['inputs'][0]['shape']==m.info['inputs'][0]['shape'][:0]+[3,3,16,16] and m.info['outputs'][0]['shape']==[3,5]
    assert torch.equal(m(batch(3, seed=4)), predict_fresh(tmp_path/'p', batch(3, seed=4)))
    with pytest.raises(ValueError, match=r'it takes float32\[3, 3, 16, 16\]'): m(batch(2))
    assert 'longArrayOf(3, 3, 16, 16)' in (tmp_path/'p'/'README.md').read_text()


@pytest.mark.parametrize('format', FORMATS)
def test_normalisation_inside(format, tmp_path):
    "Plain pixels in, the same answers out; the padding is that of the normalised picture"
    x,mean,std = batch(),[.48,.45,.4],[.22,.21,.2]
    norm = [torch.tensor(v).view(-1,1,1) for v in (mean, std)]
    r = export_mobile(net(), x, tmp_path/'p', [x], format=format, normalise=(mean, std), preprocess=PREP, show=False)
    m = load_mobile(tmp_path/'p')
    with torch.no_grad(): want = net()(x)
    assert sqnr(want, m(x*norm[1]+norm[0]))>20 and r.sqnr_float>20
    assert 'normalize' not in m.info and m.info['range']==[0,1] and m.info['normalised_inside'] and any('normalisation is in the file' in n for n in r.notes)
    page = (tmp_path/'p'/'README.md').read_text()
    assert 'the model normalises by itself' in page and 'MEAN' not in page
    assert np.allclose(np.load(tmp_path/'p'/'golden_input.npy'), (x*norm[1]+norm[0])[:1].numpy(), atol=1e-6)


def test_normalisation_inside_a_calibrated_model(tmp_path):
    "Ranges that are there stay; what can't be folded any more is in float in front"
    x,model = batch(),net()
    simulate_(model, x); calibrate_(model, [x], show=False)
    r = export_mobile(model, x, tmp_path/'p', normalise=([.5]*3, [.25]*3))
    with torch.no_grad(): want = model(x)
    assert sqnr(want, load_mobile(tmp_path/'p')(x*.25+.5))>30 and any('in float' in n for n in r.notes)


@pytest.mark.parametrize('bad,said', [(True, 'learn.export_mobile'), (([.5],[.5]), '1 means and 1 deviations, x has 3'), (([.5]*3,[0.,1.,1.]), 'above 0'), ('imagenet', 'give \\(mean, std\\)')])
def test_wrong_normalisation(bad, said, tmp_path):
    with pytest.raises(ValueError, match=said): export_mobile(net(), batch(), tmp_path/'p', [batch()], normalise=bad)
    assert not (tmp_path/'p').exists()


# ---- whose ranges

@pytest.mark.parametrize('format', FORMATS)
@pytest.mark.parametrize('profile', ['qnnpack','xnnpack','onnx'])
def test_ranges_of_another_target(format, profile, tmp_path):
    "uint8 grids are shared: what was simulated ships as it is, with a note where it was simulated for somebody else"
    x,model = batch(),net()
    simulate_(model, x, profile); calibrate_(model, [x], show=False)
    scales = {k:q.scale.clone() for k,q in simulation(model).quantizers.items()}
    r = export_mobile(model, x, tmp_path/'p', format=format, show=False)
    own = dict(ptl='qnnpack', pte='xnnpack', onnx='onnx')[format]
    assert r.profile==profile and bool(r.notes)==(profile!=own) and r.sqnr_sim>25
    if profile!=own: assert f"profile '{profile}'" in r.notes[0]
    if (profile,format)==('qnnpack','onnx'): assert 'silu' in r.notes[0] and 'silu' in {i.op for i in r.islands}
    if (profile,format)==('onnx','onnx'): assert not r.islands
    assert all(torch.equal(q.scale, scales[k]) for k,q in simulation(model).quantizers.items()), 'the model is left alone'


def test_calibration_that_is_given_is_used(tmp_path):
    x,model = batch(),net()
    simulate_(model, x, 'onnx'); calibrate_(model, [x*100], show=False)
    r = export_mobile(model, x, tmp_path/'p', calibration=[x], show=False)
    assert r.profile=='qnnpack' and 'calibrated anew' in r.notes[0] and r.sqnr_float>20


def test_widths_survive_a_new_calibration(tmp_path):
    x,model = batch(),net()
    simulate_(model, x, w_bits={'0':4, '*':8}); calibrate_(model, [x], show=False)
    export_mobile(model, x, tmp_path/'a')
    export_mobile(model, x, tmp_path/'b', calibration=[x], show=False)
    assert torch.equal(load_mobile(tmp_path/'a')(x), load_mobile(tmp_path/'b')(x))


def test_ranges_that_do_not_fit_are_refused(tmp_path):
    x,model = batch(),net()
    simulate_(model, x, 'onnx', a_bits=16); calibrate_(model, [x], show=False)
    with pytest.raises(ValueError, match=r"simulated for onnx, and qnnpack can't hold that: .* has 16 bits.*learn.quantize\(profile='qnnpack'\)"): export_mobile(model, x, tmp_path/'p')
    assert not (tmp_path/'p').exists()


def test_adds_out_of_reach_are_refused():
    class Res(nn.Module):
        def __init__(self):
            super().__init__()
            self.a,self.b = nn.Conv2d(3,4,1),nn.Conv2d(3,4,1)
            self.b.weight.data.mul_(1e-9); self.b.bias.data.zero_()
        def forward(self, x): return self.a(x)+self.b(x)
    x,model = batch(),Res().eval()
    simulate_(model, x, 'onnx'); calibrate_(model, [x], show=False)
    from fastcompress.quantize.place import profiles
    assert 'very different size' in unfit(simulation(model), profiles['qnnpack']) and unfit(simulation(model), profiles['onnx'])==''


# ---- what goes in

class Gate(nn.Module):
    def __init__(self):
        super().__init__()
        self.a,self.b = nn.Conv2d(3,4,3),nn.Conv2d(3,4,3)
    def forward(self, x):
        if x.mean()>0: return self.a(x) # decided here
        return self.b(x)


def test_control_flow_that_depends_on_data(tmp_path, capfd):
    torch.manual_seed(0)
    x,gate = batch(),Gate().eval()
    with pytest.raises(RuntimeError, match=r"Gate can't be recorded.*test_bundle.py:\d+: `if x.mean\(\)>0: return self.a\(x\) # decided here`.*torch.where.*export_float"): export_mobile(gate, x, tmp_path/'p', [x], show=False)
    assert not list(tmp_path.iterdir()) and 'def forward' not in capfd.readouterr().err
    m = torch.jit.mobile._load_for_lite_interpreter(str(export_float(gate, x, tmp_path/'gate.ptl')))
    with torch.no_grad():
        for o in x.abs(),-x.abs(): assert torch.allclose(m(o), gate(o), atol=1e-5), 'both branches are in the file'
    assert not torch.allclose(gate.a(x), gate.b(x), atol=1e-2)


def test_what_can_neither_be_recorded_nor_compiled(tmp_path):
    class Odd(nn.Module):
        def __init__(self): super().__init__(); self.c = nn.Conv2d(3,4,3)
        def forward(self, x): return self.c(x) if x.mean().item()>0 else {len(self.__dict__): eval('x')}
    with pytest.raises(RuntimeError, match="can't be recorded.*Nor can it be compiled"): export_float(Odd().eval(), batch().abs(), tmp_path/'f.ptl')
    assert not (tmp_path/'f.ptl').exists()


WRONG = [(dict(x=batch().double()), ValueError, 'x is torch.float64, the model computes in float32: give x.float()'), (dict(x=batch().half()), ValueError, 'x is torch.float16'),
         (dict(x=batch()[:0]), ValueError, r'x has the shape \[0, 3, 16, 16\]: give a batch'), (dict(x=torch.tensor(1.)), ValueError, 'give a batch'), (dict(x=dict(x=batch())), TypeError, 'x is a dict'),
         (dict(x=batch()/0), ValueError, 'x holds nan or infinity'), (dict(calibration=[batch(), batch().double()]), ValueError, 'calibration batch 1 is torch.float64'),
         (dict(calibration=[batch()[0]]), ValueError, 'calibration batch 0 has the shape'), (dict(calibration=[batch(), batch()/0]), ValueError, 'calibration batch 1 holds nan'),
         (dict(calibration=[()]), ValueError, 'calibration batch 0 has 0 inputs, x has 1'), (dict(calibration=['cat']), TypeError, 'calibration batch 0 is a str'),
         (dict(calibration=[]), ValueError, 'no calibration data'), (dict(calibration=iter(())), ValueError, 'no calibration data'), (dict(calibration=None), ValueError, r'no calibration data.*learn.quantize\(\)'),
         (dict(model=net().half()), ValueError, r"'0.weight' is torch.float16.*model.float\(\)"), (dict(model=net().double()), ValueError, 'torch.float64'), (dict(model=net().to('meta')), ValueError, 'has no values'),
         (dict(model='resnet18'), TypeError, 'expected a model, got str'), (dict(format='plt'), ValueError, "no format 'plt'. Nearest: 'ptl'"), (dict(engine='qnpack'), ValueError, "Nearest: 'qnnpack'"),
         (dict(format='onnx', engine='qnnpack'), ValueError, 'run on onnxruntime.*Leave engine out'), (dict(batch=0), ValueError, 'whole number from 1'), (dict(batch=True), ValueError, 'whole number from 1'),
         (dict(labels=['a\nb']), ValueError, "can't stand in a line"), (dict(labels=['a','']), ValueError, "can't stand in a line")]

@pytest.mark.parametrize('kw,exc,said', WRONG, ids=range(len(WRONG)))
def test_wrong_requests_write_nothing(kw, exc, said, phone):
    before = contents(phone)
    kw = dict(dict(model=net(), x=batch(), path=phone, calibration=[batch()], show=False), **kw)
    with pytest.raises(exc, match=said): export_mobile(**kw)
    assert contents(phone)==before and [p.name for p in phone.parent.iterdir()]==['phone']


def test_one_tensor_is_one_batch(tmp_path):
    x = batch()
    export_mobile(net(), x, tmp_path/'a', x, show=False); export_mobile(net(), x, tmp_path/'b', [x], show=False)
    assert torch.equal(load_mobile(tmp_path/'a')(x), load_mobile(tmp_path/'b')(x))


def test_two_inputs_of_two_types_in_a_fresh_process(tmp_path):
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv,self.emb,self.fc = nn.Conv2d(3,4,3),nn.Embedding(9,4),nn.Linear(4,2)
        def forward(self, x, i): return self.fc(F.relu(self.conv(x)).mean((2,3))), self.fc(self.emb(i).mean(1))
    torch.manual_seed(0)
    args = batch(),torch.randint(9, (4,6), generator=torch.Generator().manual_seed(0))
    export_mobile(Two().eval(), args, tmp_path/'p', [args], show=False)
    m = load_mobile(tmp_path/'p')
    for a,b in zip(predict_fresh(tmp_path/'p', args, bs=3), m(*args)): assert torch.allclose(a, b)
    assert m.info['inputs'][1]==dict(shape=[None,6], dtype='int64') and len(m.info['outputs'])==2
    page = (tmp_path/'p'/'README.md').read_text()
    assert 'input1: LongArray' in page and 'golden_input_1.npy' in page and 'readLongs' in page
    code, = re.findall(r'```python\n(.*?)```', page, re.S)
    assert subprocess.run([sys.executable, '-W', 'ignore', '-c', code], cwd=tmp_path/'p').returncode==0
    with pytest.raises(ValueError, match='takes 2 inputs, got 1'): m(args[0])
    with pytest.raises(ValueError, match=r'input 1 is float32\[4, 6\], it takes int64'): m(args[0], args[1].float())


def test_labels_of_another_number_are_noted(tmp_path):
    r = export_mobile(net(), batch(), tmp_path/'p', [batch()], labels='abc', show=False)
    assert 'labels.txt names 3 classes, the output has 5 columns.' in r.notes


def test_strict_in_every_target(tmp_path):
    with pytest.raises(RuntimeError, match='strict: silu in 4 stays in float'): export_mobile(net(), batch(), tmp_path/'p', [batch()], strict=True, show=False)
    assert list(tmp_path.iterdir())==[]


@pytest.mark.parametrize('format,module,extra', [('pte','executorch','executorch'), ('onnx','onnxruntime','onnx')])
def test_a_missing_extra_is_named(format, module, extra, tmp_path):
    code = f"""import sys
sys.modules['{module}'] = None
import torch, fastcompress.all
from fastcompress.deploy.mobile import export_mobile
try: export_mobile(torch.nn.Conv2d(3,4,3), torch.randn(2,3,8,8), {str(tmp_path/'p')!r}, [torch.randn(2,3,8,8)], format='{format}')
except ImportError as e: print(e)"""
    r = subprocess.run([sys.executable, '-W', 'ignore', '-c', code], capture_output=True, text=True)
    assert f'pip install fastcompress[{extra}]' in r.stdout, r.stderr
    assert not (tmp_path/'p').exists()


# ---- tampering

def edit(folder, f):
    info = json.loads((folder/'input.json').read_text())
    f(info)
    (folder/'input.json').write_text(json.dumps(info))

TAMPERED = dict(mean=(lambda i: i['normalize']['mean'].__setitem__(0, .5), 'input.json was changed'), shape=(lambda i: i['inputs'][0]['shape'].__setitem__(2, 17), 'input.json was changed'),
                tolerance=(lambda i: i.update(golden_tolerance=1e9), 'input.json was changed'), added=(lambda i: i.update(channel_order='BGR'), 'input.json was changed'),
                no_sum=(lambda i: i['sha256'].pop('model.ptl'), 'no checksum for model.ptl'), no_golden=(lambda i: i['sha256'].pop('golden_output.npy'), 'no checksum for golden_output.npy'),
                outside=(lambda i: i['sha256'].update({'../x':'0'}), 'no file of this folder'), absolute=(lambda i: i['sha256'].update({'/etc/passwd':'0'}), 'no file of this folder'),
                other_file=(lambda i: i.update(file='../other/model.ptl'), 'no checksum for'), no_digest=(lambda i: i.pop('digest'), 'lacks digest'), type_=(lambda i: i.update(inputs={}), 'lacks inputs'),
                no_inputs=(lambda i: i.update(inputs=[]), 'malformed inputs'), bad_shape=(lambda i: i['inputs'][0].update(shape=['a']), 'malformed inputs'))

@pytest.mark.parametrize('how', TAMPERED)
def test_tampered_input_json(phone, how):
    f,said = TAMPERED[how]
    edit(phone, f)
    with pytest.raises(ValueError, match=said): load_mobile(phone)


@pytest.mark.parametrize('cut', [0, 1, 10, 200, -30, -2])
def test_truncated_input_json(phone, cut):
    (phone/'input.json').write_bytes((phone/'input.json').read_bytes()[:cut])
    with pytest.raises(ValueError, match="is damaged"): load_mobile(phone)


@pytest.mark.parametrize('text', ['[]', 'null', '{"a": 1}', '\x00'*50, '{'*5000])
def test_input_json_of_somebody_else(phone, text):
    (phone/'input.json').write_text(text)
    with pytest.raises(ValueError, match='is damaged|lacks format'): load_mobile(phone)


def test_resealed_with_an_unknown_format(phone):
    def f(i): i['format'] = 'pkl'; i['digest'] = digest(i)
    edit(phone, f)
    with pytest.raises(ValueError, match="no format 'pkl'"): load_mobile(phone)


def test_resealed_with_another_golden_shape(phone):
    def f(i): i['inputs'][0]['shape'] = [None,3,16,17]; i['digest'] = digest(i)
    edit(phone, f)
    with pytest.raises(ValueError, match=r'holds float32\[1, 3, 16, 16\]'): load_mobile(phone)


def test_a_model_file_that_is_none(phone):
    "Checksums right, contents nonsense"
    (phone/'model.ptl').write_bytes(b'no model'*100)
    def f(i): i['sha256']['model.ptl'] = sha(phone/'model.ptl')
    edit(phone, f)
    with pytest.raises(RuntimeError, match="model.ptl can't be loaded here"): load_mobile(phone)


def test_a_pickle_among_the_arrays(phone):
    "np.load would run it"
    np.save(phone/'golden_input.npy', np.array([print], dtype=object), allow_pickle=True)
    def f(i): i['sha256']['golden_input.npy'] = sha(phone/'golden_input.npy')
    edit(phone, f)
    with pytest.raises(ValueError, match='golden_input.npy is damaged'): load_mobile(phone)


@pytest.mark.parametrize('name', ['model2.ptl','x.onnx','y.pte','golden_input_1.npy','report.txt'])
def test_files_that_do_not_belong(phone, name):
    (phone/name).write_bytes(b'x')
    with pytest.raises(ValueError, match=f"{name}, which isn't of this bundle"): load_mobile(phone)
    (phone/name).rename(phone/'notes.md') # what means nothing may lie there
    load_mobile(phone)


def test_labels_that_are_not_listed(tmp_path):
    export_mobile(net(), batch(), tmp_path/'p', [batch()], show=False)
    (tmp_path/'p'/'labels.txt').write_text('a\nb\n')
    with pytest.raises(ValueError, match="labels.txt, which isn't of this bundle"): load_mobile(tmp_path/'p')


def test_every_byte_of_small_files_counts(phone):
    for name in 'labels.txt','golden_output.npy':
        whole = (phone/name).read_bytes()
        for i in range(len(whole)):
            (phone/name).write_bytes(whole[:i]+bytes([whole[i]^0x55])+whole[i+1:])
            with pytest.raises(ValueError, match='was changed'): check_bundle(phone)
        (phone/name).write_bytes(whole)
    check_bundle(phone)


# ---- killed in the middle

POINTS = ['write','golden','report','texts','seal','before_exchange','after_exchange']

def killed_export(path, point):
    "An export in a process of its own that dies at `point` without a chance to clean up"
    import signal
    def die(*a, **k): os.kill(os.getpid(), signal.SIGKILL)
    def dies_after(f):
        def _f(*a, **k): f(*a, **k); die()
        return _f
    torch.set_num_threads(1)
    if point=='write': mobile.save_ptl = dies_after(mobile.save_ptl)
    if point=='golden': mobile._save_golden = die
    if point=='report': ExportReport.page = die
    if point=='texts': mobile._save_texts = dies_after(mobile._save_texts)
    if point=='seal': mobile.seal = dies_after(mobile.seal)
    if point=='before_exchange': core._exchange = die
    if point=='after_exchange': core._exchange = dies_after(core._exchange)
    x = batch(seed=9)
    export_mobile(net(), x, path, [x], show=False)

@pytest.fixture(scope='module')
def start():
    with forking('test_bundle') as f: yield f

@pytest.mark.parametrize('point', POINTS)
def test_killed(start, phone, point):
    "There is a whole bundle at every moment, the old one until the exchange; the next export takes the rest away"
    before = contents(phone)
    p = start(killed_export, str(phone), point); p.join(120)
    assert p.exitcode==-9
    load_mobile(phone)
    assert (contents(phone)==before)==(point!='after_exchange')
    left = [o.name for o in phone.parent.iterdir() if o.name!='phone']
    assert len(left)==1 and left[0].startswith('.phone.new.')
    export_mobile(net(), batch(), phone, [batch()], show=False)
    assert [o.name for o in phone.parent.iterdir()]==['phone'] and sorted(contents(phone))==sorted({*before}-{'labels.txt'})
    load_mobile(phone)


def killed_set_aside(path):
    core._exchange = lambda a, b: False
    rename = Path.rename
    def _rename(self, to):
        rename(self, to)
        if str(to).endswith('.was'): os._exit(9)
    Path.rename = _rename
    with atomic_dir(path, 'input.json') as d: (d/'input.json').write_text('{}')

def test_killed_where_folders_cannot_be_exchanged(start, phone):
    before = contents(phone)
    p = start(killed_set_aside, str(phone)); p.join(120)
    assert p.exitcode==9 and not phone.exists()
    sweep_(phone, 'input.json')
    assert contents(phone)==before and [o.name for o in phone.parent.iterdir()]==['phone']


def writing(path, started, go_on):
    with atomic_dir(path, 'input.json') as d:
        (d/'input.json').write_text('{}')
        started.touch()
        while not go_on.exists(): __import__('time').sleep(.01)

def test_two_writers(start, tmp_path):
    "One that is still writing isn't swept away by another; the last one wins, whole"
    p = start(writing, tmp_path/'phone', tmp_path/'started', tmp_path/'go')
    while not (tmp_path/'started').exists(): __import__('time').sleep(.01)
    export_mobile(net(), batch(), tmp_path/'phone', [batch()], show=False)
    assert len([o for o in tmp_path.iterdir() if o.name.startswith('.phone.new.')])==1
    load_mobile(tmp_path/'phone')
    (tmp_path/'go').touch(); p.join(60)
    assert p.exitcode==0 and (tmp_path/'phone'/'input.json').read_text()=='{}'
    assert sorted(o.name for o in tmp_path.iterdir())==['go','phone','started']


def test_folders_of_others_are_left(tmp_path):
    (tmp_path/'.phone.new.mine').mkdir(); (tmp_path/'.phone.new.mine'/'thesis.txt').write_text('x')
    export_mobile(net(), batch(), tmp_path/'phone', [batch()], show=False)
    assert (tmp_path/'.phone.new.mine'/'thesis.txt').exists()


@pytest.mark.skipif(os.geteuid()==0 if hasattr(os, 'geteuid') else True, reason='root may write everywhere')
def test_unwritable(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(PermissionError, match='Give another folder'): export_mobile(net(), batch(), tmp_path/'p', [batch()])


def test_nothing_is_said_silently():
    "Every registered format has code for every language"
    info = dict(versions=dict(fastcompress='0'), file='m', engine='qnnpack', inputs=[dict(shape=[None,3,4,4], dtype='float32')], outputs=[dict(shape=[None,2], dtype='float32')], golden_tolerance=.1)
    for f in formats:
        page = readme({**info, 'format':f}, {})
        for l in languages: assert f'```{l.lower()}\n' in page


def test_ranges_too_wide_for_an_engine(tmp_path):
    "torch's x86 engine hands many groups to a kernel that adds in pairs, in 16 bits: a model simulated for qnnpack is not shipped to it as it is"
    from fastcompress.deploy.engines import engines
    if 'x86' not in torch.backends.quantized.supported_engines: pytest.skip('no x86 engine')
    net,x = nn.Sequential(nn.Conv2d(3, 128, 1), nn.ReLU(), nn.Conv2d(128, 128, 3, groups=128), nn.Conv2d(128, 4, 1)).eval(),torch.randn(2, 3, 8, 8)
    from fastcompress.quantize.simulate import calibrate_, simulate_
    simulate_(net, x); calibrate_(net, [x], show=False)
    with pytest.raises(ValueError, match='in pairs here, in 16 bits'): export_mobile(net, x, tmp_path/'p', engine='x86', show=False)
    assert not (tmp_path/'p').exists()
    r = export_mobile(net, x, tmp_path/'p', engine='x86', calibration=[x], show=False)
    assert r.max_steps<=1 and r.islands==[]


# ---- an engine that computes something else

def test_what_an_engine_computes_differently_is_said(tmp_path, monkeypatch):
    "As onnxruntime 1.31 did with an integer softmax over channels; here the file is made to differ, by a tenth"
    pytest.importorskip('onnxruntime'); pytest.importorskip('onnxscript')
    import fastcompress.deploy.onnx as onnx
    from fastcompress.deploy.capture import op_of
    class Gate(nn.Module):
        def __init__(self): super().__init__(); self.c,self.g = nn.Conv2d(3, 8, 3, padding=1),nn.Conv2d(8, 16, 1)
        def forward(self, x):
            y = self.c(x)
            return (self.g(y.mean((2, 3), keepdim=True)).view(len(x), 2, 8, 1, 1).softmax(1)[:, 0]*y)
    x = batch()
    how = dict(calibration=[x], format='onnx', show=False)
    with warnings.catch_warnings():
        warnings.simplefilter('error', UserWarning)
        assert export_mobile(Gate().eval(), x, tmp_path/'right', **how).max_steps<=1
    def other(gm):
        for q in [n for n in gm.graph.nodes if op_of(n)=='quantize' and op_of(n.args[0])=='softmax']:
            with gm.graph.inserting_before(q): q.args = (gm.graph.call_function(torch.ops.aten.mul.Tensor, (q.args[0], 1.1)), *q.args[1:])
        return gm
    monkeypatch.setattr(onnx, 'softmaxes_', other)
    with pytest.warns(UserWarning, match='differently from its simulation'): r = export_mobile(Gate().eval(), x, tmp_path/'wrong', **how)
    assert r.max_steps>1 and any('softmax' in n for n in r.notes)
    with pytest.raises(RuntimeError, match='strict: .*softmax'): export_mobile(Gate().eval(), x, tmp_path/'strict', strict=True, **how)
    assert not (tmp_path/'strict').exists()


# ---- float where it is faster

@pytest.mark.parametrize('format,engine', [('ptl','qnnpack'), ('onnx',None), ('pte',None)])
def test_fastest_in_every_format(format, engine, tmp_path, monkeypatch):
    "One kind of operation measured to be faster in float; then the whole model"
    if format!='ptl': pytest.importorskip(dict(onnx='onnxruntime', pte='executorch')[format])
    from fastcompress.deploy import fallback
    net = nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 16, 3, groups=16), nn.ReLU(), nn.Conv2d(16, 16, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 4)).eval()
    x = batch()
    how = dict(calibration=[x], engine=engine, format=format, fallback='fastest', show=False)
    plain = export_mobile(net, x, tmp_path/'plain', **{**how, 'fallback':True})
    def race(won): return lambda a, b, args, n, threads: (a(*args) is not None and b(*args) is not None and next(won), 1.)
    monkeypatch.setattr(fallback, '_race', race(iter([False, True, *[False]*9])))
    r = export_mobile(net, x, tmp_path/'depthwise', **how)
    kept = [t['what'] for t in r.details['timings'] if t['kept']]
    assert kept==['conv2d, depthwise in float'] and r.details['timings'][-1]['what']=='the whole model in float'
    assert [(i.layer, i.op) for i in r.islands if 'measured: faster in float on this machine (conv2d, depthwise)' in i.reason]==[('2','conv2d')]
    assert r.max_steps<=1 and r.ops>=plain.ops-1 and 'form' not in r.details and 0<r.int_share<1
    assert load_mobile(tmp_path/'depthwise')(x).shape==(len(x), 4)
    monkeypatch.setattr(fallback, '_race', race(iter([*[False]*len(r.details['timings'][:-1]), True])))
    r = export_mobile(net, x, tmp_path/'float', **how)
    assert r.details['form']=='float' and [i.layer for i in r.islands]==[''] and r.sqnr_float>80 and r.int_share==0 and r.ops==0
    assert load_mobile(tmp_path/'float')(x).shape==(len(x), 4)
    with pytest.raises((RuntimeError, ValueError)): export_mobile(net, x, tmp_path/'odd', **{**how, 'fallback':'fast'})
    assert not (tmp_path/'odd').exists()
    with pytest.raises(RuntimeError, match='strict: '): export_mobile(nn.Sequential(net[0], nn.SELU(), nn.Conv2d(16, 4, 1)).eval(), x, tmp_path/'odd', **{**how, 'fallback':False})
