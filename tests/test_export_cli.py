"`fastcompress export` as a user types it, and learn.export_mobile's own arguments"
import contextlib, io, json, os, pickle, subprocess, sys, warnings
from pathlib import Path
import numpy as np
import pytest, timm, torch
from PIL import Image
from sklearn.datasets import load_digits
from torch import nn
from fastcompress.cli import commands, main
from fastcompress.deploy.checkpoint import save_compressed
from fastcompress.deploy.mobile import load_mobile
from fastcompress.quantize.simulate import calibrate_, simulate_, simulation

pytestmark = [pytest.mark.filterwarnings('ignore'), pytest.mark.usefixtures('one_thread')]
QUICK = '--calibration', 'digits', '--size', '32', '--n-batches', '2', '--bs', '8'


def run(*argv):
    "Exit status, what was printed, what was complained"
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(io.StringIO()) as err: status = main(['export', *map(str, argv)])
    return status, out.getvalue(), err.getvalue()

@pytest.fixture(scope='module')
def pictures(tmp_path_factory):
    "Forty digits as files, in a folder for each class"
    d,root = load_digits(),tmp_path_factory.mktemp('pictures')
    for i in range(40):
        (root/str(d.target[i])).mkdir(exist_ok=True)
        Image.fromarray((d.images[i]*255/16).round().astype('uint8')).resize((20,16)).convert('RGB').save(root/str(d.target[i])/f'{i}.png')
    (root/'readme.txt').write_text('no picture')
    return root

@pytest.fixture(scope='module')
def pickled(pictures, tmp_path_factory):
    "A Learner on those files, exported; its answers to ten of them"
    from fastai.learner import Learner
    from fastai.vision.all import CrossEntropyLossFlat, ImageDataLoaders, Normalize, Resize, ResizeMethod, get_image_files, parent_label
    torch.manual_seed(0)
    dls = ImageDataLoaders.from_path_func(pictures, sorted(get_image_files(pictures)), parent_label, bs=8, num_workers=0, valid_pct=.2, seed=0, item_tfms=Resize((16,24), ResizeMethod.Squish), batch_tfms=Normalize.from_stats([.3]*3, [.4]*3))
    model = nn.Sequential(nn.Conv2d(3,8,3,2), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8,len(dls.vocab)))
    learn = Learner(dls, model, loss_func=CrossEntropyLossFlat(), path=tmp_path_factory.mktemp('learner'))
    learn.remove_cb(learn.progress)
    files = sorted(get_image_files(pictures))[:10]
    x = torch.cat([b[0] for b in dls.test_dl(files, num_workers=0)]).as_subclass(torch.Tensor)
    learn.export('learner.pkl')
    with torch.no_grad(): y = model.eval()(x)
    return learn.path/'learner.pkl',x,y,list(dls.vocab),learn


# ---- sources

def test_a_timm_name(tmp_path):
    status,out,_ = run('test_resnet', '--out', tmp_path/'p', *QUICK)
    assert status==0 and 'RANDOM WEIGHTS: test_resnet' in out and f'bundle  {tmp_path/"p"}' in out and 'at most' in out
    m = load_mobile(tmp_path/'p')
    cfg = timm.get_pretrained_cfg('test_resnet')
    assert m.info['normalize']['mean']==pytest.approx(cfg.mean) and m.info['resize']['size']==[32,32] and m.info['inputs'][0]['shape']==[None,3,32,32] and m.labels is None
    again = run('test_resnet', '--out', tmp_path/'q', *QUICK)
    for n in 'golden_input.npy','golden_output.npy': assert (tmp_path/'p'/n).read_bytes()==(tmp_path/'q'/n).read_bytes(), 'the same every time'


def test_a_folder_of_pictures(pictures, tmp_path):
    "Prepared as timm prepares them for this model"
    from timm.data import create_transform, resolve_model_data_config
    assert run('test_resnet', '--out', tmp_path/'p', '--calibration', pictures, '--n-batches', 2, '--bs', 4)[0]==0
    cfg = resolve_model_data_config(timm.create_model('test_resnet'))
    x,tfm = np.load(tmp_path/'p'/'golden_input.npy')[0],create_transform(**cfg, is_training=False)
    assert any(np.allclose(x, tfm(Image.open(f).convert('RGB')).numpy(), atol=1e-6) for f in pictures.rglob('*.png'))
    info = load_mobile(tmp_path/'p').info
    assert info['resize']==dict(size=list(cfg['input_size'][1:]), method=cfg['crop_mode'], interpolation=cfg['interpolation'], crop_pct=cfg['crop_pct']) and info['channel_order']=='RGB'


def test_pretrained(tmp_path, monkeypatch):
    "With weights come ImageNet's names; without a network, words"
    make = timm.create_model
    monkeypatch.setattr(timm, 'create_model', lambda name, pretrained=False, **kw: make(name, pretrained=False, **kw))
    status,out,_ = run('test_resnet', '--pretrained', '--out', tmp_path/'p', *QUICK)
    assert status==0 and 'RANDOM' not in out
    m = load_mobile(tmp_path/'p')
    assert len(m.labels)==1000 and m.labels[0].startswith('tench')
    def _offline(name, pretrained=False, **kw):
        if pretrained: raise OSError('Connection refused')
        return make(name, **kw)
    monkeypatch.setattr(timm, 'create_model', _offline)
    status,_,err = run('test_resnet', '--pretrained', '--out', tmp_path/'q', *QUICK)
    assert status==2 and 'Is there a network?' in err and not (tmp_path/'q').exists()


def test_a_safe_checkpoint(tmp_path):
    torch.manual_seed(0)
    model = timm.create_model('test_resnet', num_classes=7).eval()
    save_compressed(model, tmp_path/'m.safetensors')
    (tmp_path/'names.txt').write_text('\n'.join('abcdefg')+'\n')
    status,out,_ = run(tmp_path/'m.safetensors', '--out', tmp_path/'p', '--labels', tmp_path/'names.txt', *QUICK)
    assert status==0 and 'RANDOM' not in out
    m = load_mobile(tmp_path/'p')
    x = torch.from_numpy(np.load(tmp_path/'p'/'golden_input.npy'))
    with torch.no_grad(): assert (model(x)-m(x)).norm() < .2*model(x).norm()
    assert m.labels==list('abcdefg')


def test_a_quantized_checkpoint_keeps_its_ranges(tmp_path):
    torch.manual_seed(0)
    model,x = timm.create_model('test_resnet', num_classes=7).eval(),torch.randn(4,3,32,32)
    simulate_(model, x); calibrate_(model, [x*3], show=False)
    (tmp_path/'d').mkdir()
    save_compressed(model, tmp_path/'d'/'m.safetensors')
    with torch.no_grad(): want = model(x)
    for args in (), QUICK:
        status,out,err = run(tmp_path/'d', '--out', tmp_path/'p', '--size', 32, *args)
        assert status==0, err
        assert ('the golden input is noise' in out)==(not args)
        assert (load_mobile(tmp_path/'p')(x)-want).abs().max() < .1*want.abs().max(), 'whatever is given, the ranges are its own'


def test_a_checkpoint_of_ones_own_code(tmp_path):
    save_compressed(nn.Sequential(nn.Conv2d(3,4,3)), tmp_path/'m.safetensors')
    status,_,err = run(tmp_path/'m.safetensors', '--out', tmp_path/'p', *QUICK)
    assert status==2 and 'load_compressed(' in err and 'arch=f' in err and not (tmp_path/'p').exists()


def test_a_learner(pickled, pictures, tmp_path):
    path,x,y,vocab,_ = pickled
    status,out,err = run(path, '--trust', '--out', tmp_path/'p', '--calibration', pictures, '--bs', 8)
    assert status==0, err
    assert 'the code in it is run' in out
    m = load_mobile(tmp_path/'p')
    assert m.labels==vocab and m.info['resize']['size']==[16,24] and m.info['normalize']==dict(mean=pytest.approx([.3]*3), std=pytest.approx([.4]*3))
    assert m.info['inputs'][0]['shape']==[None,3,16,24] and (m(x)-y).norm() < .1*y.norm()
    page = (tmp_path/'p'/'README.md').read_text()
    assert '24 wide and 16 high' in page and 'WIDTH = 24' in page and 'squeezed, without regard' in page
    status,_,err = run(path, '--trust', '--out', tmp_path/'q', '--calibration', 'digits', '--normalise')
    assert status==2 or load_mobile(tmp_path/'q').info['range']==[0,1]


def test_pixels_into_a_learners_file(pickled, pictures, tmp_path):
    path,x,y,*_ = pickled
    assert run(path, '--trust', '--out', tmp_path/'p', '--calibration', pictures, '--bs', 8, '--normalise', '--batch', 2)[0]==0
    m = load_mobile(tmp_path/'p')
    assert 'normalize' not in m.info and m.info['inputs'][0]['shape']==[2,3,16,24]
    assert (m((x*.4+.3)[:2])-y[:2]).norm() < .1*y[:2].norm()


def test_a_quantized_learner_keeps_its_ranges(pickled, pictures, tmp_path):
    import copy
    import fastcompress.callback.quantize
    path,x,_,_,learn = pickled
    learn.quantize()
    try:
        for q in simulation(learn.model).quantizers.values():
            if not q.is_weight: q.scale.mul_(1.5) # as if it had been trained so
        with torch.no_grad(): want = learn.model.eval()(x)
        learn.export('quantized.pkl')
    finally: learn.dequantize()
    file = path.parent/'quantized.pkl'
    status,_,err = run(file, '--trust', '--out', tmp_path/'p')
    assert status==2 and 'Add --calibration FOLDER' in err and not (tmp_path/'p').exists()
    assert run(file, '--trust', '--out', tmp_path/'p', '--calibration', pictures, '--bs', 8)[0]==0
    assert (load_mobile(tmp_path/'p')(x)-want).abs().max() < 1e-5


class Trap:
    def __init__(self, marker): self.marker = marker
    def __reduce__(self): return open, (str(self.marker), 'w')

def test_a_pickle_is_not_touched_without_trust(tmp_path):
    (tmp_path/'l.pkl').write_bytes(pickle.dumps(Trap(tmp_path/'ran')))
    status,_,err = run(tmp_path/'l.pkl', '--out', tmp_path/'p', *QUICK)
    assert status==2 and '--trust' in err and 'runs whatever code' in err and 'save_compressed(learn.model' in err
    assert not (tmp_path/'ran').exists() and not (tmp_path/'p').exists()
    (tmp_path/'l.pkl').rename(tmp_path/'l.safetensors') # another name doesn't get it in
    assert run(tmp_path/'l.safetensors', '--out', tmp_path/'p', *QUICK)[0]==2 and not (tmp_path/'ran').exists()


@pytest.mark.parametrize('format', [pytest.param('pte', marks=pytest.mark.slow), 'onnx']) # executorch takes most of a minute
def test_formats(format, tmp_path):
    pytest.importorskip(dict(pte='executorch', onnx='onnxruntime')[format])
    status,out,err = run('test_resnet', '--out', tmp_path/'p', '--format', format, *QUICK)
    assert status==0, err
    assert load_mobile(tmp_path/'p').info['file']==f'model.{format}'


# ---- mistakes

MISTAKES = [(['test_resnet'], 'Add --calibration FOLDER'), (['resnet81', *QUICK], "Nearest: 'resnet18'"), (['nowhere/learner.pkl', *QUICK], 'there is no nowhere/learner.pkl'), (['learner.pkl', *QUICK], 'there is no learner.pkl'),
            (['test_resnet', '--calibration', '/nowhere'], '--calibration /nowhere: no such folder'), (['test_resnet', '--calibration', 'EMPTY'], 'there are no images in it'), (['test_resnet', '--calibration', 'BROKEN'], "can't be read as an image"),
            (['test_resnet', '--format', 'plt', *QUICK], "no format 'plt'"), (['test_resnet', '--engine', 'qnpack', *QUICK], "Nearest: 'qnnpack'"), (['test_resnet', '--format', 'onnx', '--engine', 'qnnpack', *QUICK], 'Leave engine out'),
            (['test_resnet', *QUICK, '--bs', '0'], '--bs must be at least 1'), (['test_resnet', *QUICK, '--batch', '-1'], '--batch must be at least 1'), (['test_resnet', *QUICK, '--fallback', 'maybe'], 'yes, no or fastest'),
            (['test_resnet', *QUICK, '--labels', '/nowhere'], '/nowhere'), (['EMPTY', *QUICK], '0 models in it'), (['test_vit', *QUICK, '--strict'], 'strict: ')]

@pytest.mark.parametrize('argv,said', MISTAKES, ids=range(len(MISTAKES)))
def test_mistakes_write_nothing(argv, said, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path/'EMPTY').mkdir(); (tmp_path/'BROKEN').mkdir(); (tmp_path/'BROKEN'/'a.png').write_text('x')
    status,_,err = run(*argv)
    assert status==2 and said in err and err.startswith('fastcompress export: ') and 'Traceback' not in err
    assert sorted(p.name for p in tmp_path.iterdir())==['BROKEN','EMPTY']


def test_somebody_elses_folder(tmp_path):
    (tmp_path/'thesis.txt').write_text('x')
    status,_,err = run('test_resnet', '--out', tmp_path, *QUICK)
    assert status==2 and 'Give a new folder' in err and [p.name for p in tmp_path.iterdir()]==['thesis.txt']


def test_a_bundle_is_no_source(tmp_path):
    (tmp_path/'b').mkdir(); (tmp_path/'b'/'input.json').write_text('{}')
    assert 'is a bundle already' in run(tmp_path/'b', *QUICK)[2]


def test_no_source_and_help():
    r = subprocess.run([str(Path(sys.executable).parent/'fastcompress'), 'export'], capture_output=True, text=True)
    assert r.returncode==2 and 'SOURCE' in r.stderr
    r = subprocess.run([str(Path(sys.executable).parent/'fastcompress'), 'export', '--help'], capture_output=True, text=True)
    assert r.returncode==0 and '--n-batches' in r.stdout and '--trust' in r.stdout and 'save_compressed' in r.stdout
    assert '--trust TRUST' not in r.stdout, 'a switch takes no value'


def test_other_commands_are_as_they_were():
    from fastcompress.cli import _parser
    p = _parser()
    assert vars(p.parse_args(['demo']))==dict(command='demo', arch='resnet18', out='fastcompress_demo', epochs=6, seed=42, sparsity=.9) and vars(p.parse_args(['doctor']))==dict(command='doctor')
    a = vars(p.parse_args(['export', 'x', '--n_batches', '3', '--strict']))
    assert (a['source'],a['n_batches'],a['strict'],a['trust'],a['engine'])==('x',3,True,False,None)


# ---- learn.export_mobile

def test_learner_arguments(pickled, tmp_path):
    import fastcompress.callback.quantize
    path,x,y,_,learn = pickled
    with learn.no_bar():
        r = learn.export_mobile(tmp_path/'p', normalise=True, batch=3)
        assert r.fixed_batch==3 and load_mobile(tmp_path/'p').info['normalised_inside']
        with pytest.raises(ValueError, match="no format 'pkl'"): learn.export_mobile(tmp_path/'q', format='pkl')
        with pytest.raises(ValueError, match='no calibration data: `dl` gave no batch'): learn.export_mobile(tmp_path/'q', dl=[])
        r = learn.export_mobile(tmp_path/'p', dl=[(x,)])
        assert np.array_equal(np.load(tmp_path/'p'/'golden_input.npy'), x[:1].numpy())
    assert simulation(learn.model) is None and not (tmp_path/'q').exists()
    assert r._repr_html_().startswith('<style>')


def test_what_is_no_picture_is_not_called_one(tmp_path):
    "A table has no channels to swap and no bytes to divide"
    from learners import tabular, two_learner
    import fastcompress.callback.quantize
    from fastcompress.callback.quantize import preprocessing
    learn = two_learner(tmp_path)
    assert preprocessing(learn.dls)=={} and preprocessing(tabular(tmp_path).dls)=={}
    learn.export_mobile(tmp_path/'p')
    info = load_mobile(tmp_path/'p').info
    assert not {'range','channel_order','normalize','layout'} & set(info) and len(info['inputs'])==2
    assert "It isn't known here how inputs are prepared" in (tmp_path/'p'/'README.md').read_text()
    with pytest.raises(ValueError, match='no Normalize'): learn.export_mobile(tmp_path/'q', normalise=True)
