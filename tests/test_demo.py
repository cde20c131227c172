"The main job as a user starts it: the default demo and what it must reach, repeatability, mistakes"
from importlib.metadata import version
from importlib.util import find_spec
import contextlib, io, json, os, subprocess, sys
from pathlib import Path
import pytest, torch
from fastcompress.cli import main

pytestmark = pytest.mark.filterwarnings('ignore')
COMMAND = str(Path(sys.executable).parent/'fastcompress')


def demo(*args): return subprocess.run([COMMAND, 'demo', *map(str, args)], capture_output=True, text=True)


@pytest.fixture(scope='module')
def default(tmp_path_factory):
    out = tmp_path_factory.mktemp('demo')/'out'
    r = demo('--out', out)
    assert r.returncode==0, r.stderr
    return out, json.loads((out/'report.json').read_text()), json.loads((out/'phone'/'report.json').read_text()), r.stdout


def test_accuracy(default):
    _,report,_,_ = default
    rows = report['rows']
    assert list(rows)==['float','sparse','int8 file']
    assert rows['float']['accuracy']>0.95 and rows['sparse']['accuracy']>=rows['float']['accuracy']-0.02
    assert abs(rows['int8 file']['accuracy']-rows['sparse']['accuracy'])<=0.01
    assert rows['int8 file']['samples']==360


def test_size(default):
    out,report,_,_ = default
    rows = report['rows']
    assert rows['float']['bytes'] >= 3.8*rows['int8 file']['bytes'] == 3.8*(out/'phone'/'model.ptl').stat().st_size
    assert rows['sparse']['compressed'] < rows['float']['compressed']/4


def test_sparsity(default):
    "0.9 of the covered weights to within one weight, and as many zeros in the integers"
    _,report,_,_ = default
    import timm
    from fastcompress.core import weight_layers
    from fastcompress.prune.mask import covered_layers
    model = timm.create_model('resnet18', num_classes=10)
    n = sum(weight_layers(model)[o].weight.numel() for o in covered_layers(model))
    rows = report['rows']
    assert abs(rows['sparse']['sparsity_obtained']*n - 0.9*n) <= 1
    assert rows['sparse']['params']-rows['sparse']['nonzero'] >= 0.9*n-1
    assert rows['int8 file']['nonzero'] <= rows['sparse']['nonzero']


def test_integers_are_what_was_simulated(default):
    _,_,export,_ = default
    assert export['max_steps']<=1 and export['ops']>=31 and export['islands']==[] and export['int_share']==1
    assert export['sqnr_sim'] == float('inf') or export['sqnr_sim']>=25


def test_page(default):
    out,report,_,stdout = default
    html = (out/'report.html').read_text()
    assert html.count('data:image/png;base64,')==3 and 'http' not in html.replace('http-equiv', '')
    for words in 'Latency','Signal to noise','Bytes compressed','What stayed in float, and why': assert words in html and words in stdout
    assert sorted(p.name for p in out.iterdir())==['phone','report.html','report.json','report.txt']
    assert len(report['figures'])==3


def test_the_bundle_answers(default):
    out,*_ = default
    from fastcompress.data import digits
    from fastcompress.deploy.mobile import load_mobile
    phone,dls = load_mobile(out/'phone'), digits()
    x,y = dls.valid.one_batch()
    assert phone.labels==list(dls.vocab) and (phone(x).argmax(1)==y).float().mean()>0.9
    assert phone.info['normalize']['mean'] and phone.info['resize']['size']==[32,32]


def test_same_seed_same_numbers(tmp_path):
    found = []
    for i,seed in enumerate([1,1,2]):
        r = demo('--arch', 'test_resnet', '--epochs', 1, '--seed', seed, '--out', tmp_path/str(i))
        assert r.returncode==0, r.stderr
        rows = json.loads((tmp_path/str(i)/'report.json').read_text())['rows']
        for v in rows.values(): v.pop('latency')
        found.append((rows, (tmp_path/str(i)/'phone'/'golden_output.npy').read_bytes()))
    assert found[0]==found[1] and found[0]!=found[2]


def test_again_replaces_only_our_own_folder(tmp_path):
    out = tmp_path/'out'
    args = '--arch', 'test_resnet', '--epochs', 1, '--out', out
    assert demo(*args).returncode==0
    first = (out/'report.html').stat().st_mtime_ns
    assert demo(*args).returncode==0 and (out/'report.html').stat().st_mtime_ns>first
    (tmp_path/'mine').mkdir(); (tmp_path/'mine'/'thesis.txt').write_text('x')
    r = demo('--arch', 'test_resnet', '--out', tmp_path/'mine')
    assert r.returncode==2 and 'Give a new folder' in r.stderr and 'Traceback' not in r.stderr
    assert [p.name for p in (tmp_path/'mine').iterdir()]==['thesis.txt']
    assert sorted(p.name for p in tmp_path.iterdir())==['mine','out'], 'nothing left beside'


@pytest.mark.parametrize('argv,said', [
    (['--arch','resnet81'], "timm has no model 'resnet81'. Nearest: 'resnet18'"),
    (['--sparsity','90'], 'Percent? Type 0.9.'), (['--sparsity','-0.1'], 'outside 0 to 1'),
    (['--epochs','0'], 'epochs must be at least 1'),
    (['--out','/proc/nowhere'], 'Give another folder')])
def test_mistakes(argv, said, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with contextlib.redirect_stderr(io.StringIO()) as err: assert main(['demo', *argv])==2
    assert said in err.getvalue()
    assert list(tmp_path.iterdir())==[]


def test_no_qnnpack(tmp_path, monkeypatch):
    monkeypatch.setattr(type(torch.backends.quantized), 'supported_engines', ['none','onednn'])
    with contextlib.redirect_stderr(io.StringIO()) as err: assert main(['demo','--out',str(tmp_path/'x')])==2
    assert 'this torch build has no qnnpack engine' in err.getvalue() and not (tmp_path/'x').exists()


def test_unknown_command_and_doctor():
    with contextlib.redirect_stderr(io.StringIO()) as err: assert main(['demmo'])==2
    assert "Nearest: 'demo'" in err.getvalue()
    with contextlib.redirect_stdout(io.StringIO()) as out: assert main(['doctor'])==0
    assert 'qnnpack' in out.getvalue() and torch.__version__ in out.getvalue()
    lines = dict(l.split(None, 1) for l in out.getvalue().replace('sums of bytes', 'sums').splitlines())
    assert ('bits' in lines['sums']) and all(lines[p]==version(p) if find_spec(p) else 'pip install' in lines[p] for p in ('executorch','onnxruntime'))
