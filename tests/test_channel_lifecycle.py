"What a network that lost channels has to survive outside one fit: files, other processes, ranks, mixed precision, and every kind of Learner"
import copy, json, socket, warnings
import pytest, timm, torch
from torch import nn
from torchvision.models import resnet18
from fastai.callback.core import Callback
from fastai.callback.fp16 import MixedPrecision
from fastai.callback.schedule import fine_tune, fit_one_cycle, lr_find
from fastai.learner import Learner
from fastai.losses import CrossEntropyLossFlat
from fastai.metrics import accuracy
from fastai.torch_core import set_seed
from fastai.vision.learner import create_body, create_head, vision_learner
from fastai.vision.models.unet import DynamicUnet
from fastai.layers import ResBlock
from fastai.vision.models.xresnet import XResNet

import channel_worker as W
from channel_worker import DLS, GROUPS, learner, moments, widths
from helpers import forking, to_the_end
from learners import learner as made, quiet, table, tabular, text_learner, two_learner
from fastcompress.callback.channels import ChannelPenaltyCallback, ChannelPruneCallback, plan_file
from fastcompress.callback.hold import masks_file
from fastcompress.callback.sparsify import SparsifyCallback
from fastcompress.data import digits
from fastcompress.measure.count import n_params
from fastcompress.prune.plan import plan_from_json
from fastcompress.prune.remove import mask_, plan_of

pytestmark = pytest.mark.usefixtures('one_thread')
HALF = {'stem.0': 8, 'a.0': 16, 'wide.0': 16}

@pytest.fixture
def learn(tmp_path): return learner(tmp_path)

@pytest.fixture(scope='module')
def start():
    with forking('channel_worker') as f: yield f

@pytest.fixture
def run(start): return to_the_end(start, 240)

def fetched(file): return torch.load(file, weights_only=False)
def same(a, b): return a.keys()==b.keys() and all(a[k].shape==b[k].shape and torch.equal(a[k], b[k]) for k in a)
def same_moments(a, b): return len(a)==len(b) and all(same(x, y) for x,y in zip(a, b))
def complete(learn):
    ps = [p for o in learn.opt.param_lists for p in o]
    return len({id(p) for p in ps})==len(ps) and {id(p) for p in ps}=={id(p) for p in learn.model.parameters()} and all(
        s.shape==p.shape for p in ps for s in (learn.opt.state.get(p) or {}).values() if torch.is_tensor(s) and s.numel()>1)

# ---- files

@pytest.mark.parametrize('with_opt', [True, False])
def test_saved_here_loaded_there(learn, run, tmp_path, with_opt):
    learn.fit(2, 1e-2, cbs=ChannelPruneCallback(.5, 'iterative'))
    file = learn.save('small', with_opt=with_opt)
    assert plan_from_json(plan_file(file).read_text())==plan_of(learn.model) and plan_file(file).name=='small.plan.json'
    assert run(W.load_and_fit, tmp_path, 'small')==0
    out = fetched(tmp_path/'fresh.pt')
    assert torch.equal(out['preds'], learn.get_preds()[0]) and same(out['loaded']['state'], learn.model.state_dict()) and out['loaded']['plan']==plan_of(learn.model)
    assert (same_moments(out['loaded']['moments'], moments(learn)) and len(moments(learn)[0])==2)==with_opt
    assert out['after']['widths']==widths(learn.model) and not torch.equal(out['after']['state']['a.0.weight'], learn.model.a[0].weight)

def test_a_trained_learner_takes_a_small_checkpoint(learn, tmp_path):
    "Its optimizer follows: groups, hypers and frozen layers stay"
    learn.fit(1, 1e-2, cbs=ChannelPruneCallback(.5)); learn.save('small')
    split = lambda m: [[p for l in (m.stem, m.a, m.b, m.wide) for p in l.parameters()], list(m.head.parameters())]
    other = learner(tmp_path, 3, splitter=split); other.fit(1, slice(1e-3, 1e-2)); other.opt.freeze() # `learn.freeze` would clear its state
    before,hypers = copy.deepcopy(moments(other)),copy.deepcopy(other.opt.hypers)
    other.load('small', with_opt=False)
    keep = plan_of(learn.model).keep['wide.0.weight']
    assert same(other.model.state_dict(), learn.model.state_dict()) and complete(other) and other.opt.hypers==hypers and not other.model.a[0].weight.requires_grad
    i = [n for n,_ in other.model.named_parameters()].index('wide.0.weight')
    assert torch.equal(moments(other)[i]['grad_avg'], before[i]['grad_avg'][keep[0]][:, keep[1]])
    other.unfreeze(); other.fit(1, 1e-2); assert complete(other)

def test_a_whole_save_removes_the_stale_plan(learn, tmp_path):
    learn.fit(1, 1e-2); learn.save('m'); assert not (tmp_path/'models'/'m.plan.json').exists()
    learn.prune_channels(.5); file = learn.save('m'); assert plan_file(file).exists()
    other = learner(tmp_path, 2); other.save('m'); assert not plan_file(file).exists()
    learner(tmp_path, 3).load('m')

def refused(learn, name, match, **kw):
    before,plan,ids = {k: v.clone() for k,v in learn.model.state_dict().items()},plan_of(learn.model),[id(p) for p in learn.model.parameters()]
    with pytest.raises(ValueError, match=match): learn.load(name, **kw)
    assert same(before, learn.model.state_dict()) and plan_of(learn.model) is plan and [id(p) for p in learn.model.parameters()]==ids

def test_what_does_not_fit_is_refused_before_anything_changes(learn, tmp_path):
    learn.save('whole'); learn.prune_channels(.5); learn.save('small')
    other = learner(tmp_path, 2); other.prune_channels(.25, include='wide.0'); other.save('other')
    refused(learn, 'whole', r"whole.pth is of another model.*'stem.0.weight' has the shape \(16, 3, 3, 3\) there, \(8, 3, 3, 3\) here. There is no plan beside it. .*Learner\(dls, the code that makes it\).load\('whole'\)")
    refused(other, 'small', r"small.pth is of another model.*small.plan.json removes others")
    learn.load('small')
    side = tmp_path/'models'/'small.plan.json'
    text,fresh = side.read_text(),lambda: learner(tmp_path, 3)
    d = json.loads(text)
    def tampered(change, match):
        e = json.loads(text); change(e); side.write_text(json.dumps(e)); refused(fresh(), 'small', match)
    side.write_text(text[:len(text)//2]); refused(fresh(), 'small', r'small.plan.json is damaged \(not a plan')
    side.write_bytes(b'\xff\xfe\x00'); refused(fresh(), 'small', 'damaged')
    tampered(lambda e: e.pop('keep'), 'damaged')
    tampered(lambda e: e['keep']['wide.0.weight']['0'].pop(), r"small.plan.json is not the plan of small.pth: it leaves 'wide.0.weight' the shape \(15, 8, 3, 3\), the file has \(16, 8, 3, 3\). Nothing was loaded")
    tampered(lambda e: e['keep']['wide.0.weight'].update({'0': [99]}), 'damaged.*positions outside')
    tampered(lambda e: e['keep']['wide.0.weight'].update({'0': [-1]}), 'damaged')
    tampered(lambda e: (e['keep'].update({'nowhere.weight': {'0': [0]}}), e['shapes'].update({'nowhere.weight': [4]})), "doesn't fit this Learner's model: .*no 'nowhere.weight'.*Nothing was loaded")
    tampered(lambda e: e['shapes'].update({'wide.0.weight': [64, 16, 3, 3]}), "doesn't fit this Learner's model")
    tampered(lambda e: e['attrs'].update({'head': {'forward': 3}}), "doesn't fit this Learner's model.*numbers can only become other numbers")
    side.write_text(json.dumps(json.loads(text) | {'attrs': {'head': {'in_features': 12}}}))
    refused(learn, 'small', 'small.plan.json removes others') # the same shapes, read otherwise
    side.unlink()
    with pytest.raises(RuntimeError, match='size mismatch'): fresh().load('small') # no plan: fastai's own words
    side.write_text(text)
    assert same(fresh().load('small').model.state_dict(), learn.model.state_dict())

def test_same_widths_other_channels(learn, tmp_path):
    "Which channels stayed is only a record; shapes are what a load needs"
    learn.prune_channels(.5); learn.save('a')
    other = learner(tmp_path, 5); other.prune_channels(.5)
    assert widths(other.model)==widths(learn.model) and plan_of(other.model).keep!=plan_of(learn.model).keep
    other.load('a'); assert plan_of(other.model)==plan_of(learn.model) and torch.equal(other.get_preds()[0], learn.get_preds()[0])

def test_masks_and_plan_in_one_checkpoint(learn, tmp_path):
    learn.fit(2, 1e-2, cbs=[SparsifyCallback(.7), ChannelPruneCallback(.5)]); file = learn.save('both')
    assert masks_file(file).exists() and plan_file(file).exists()
    other = learner(tmp_path, 3).load('both')
    assert same(other.mask_keeper.masks, learn.mask_keeper.masks); other.fit(1, 1e-2)
    assert all(torch.equal(w!=0, learn.mask_keeper.masks[n]) for n,w in other.mask_keeper.weights.items())
    dense = learner(tmp_path, 4); dense.fit(1, 1e-2, cbs=SparsifyCallback(.5)); dense.load('both') # its masks are cut, then replaced
    assert same(dense.mask_keeper.masks, learn.mask_keeper.masks)

def test_lr_find_leaves_no_plan_behind(learn, tmp_path):
    learn.fit(1, 1e-2, cbs=ChannelPruneCallback(.5))
    learn.lr_find(num_it=10, show_plot=False)
    assert not list((tmp_path/'models').glob('*.json'))

@pytest.mark.parametrize('attached', ['during','always','mid_ramp'])
def test_exported_here_loaded_there(learn, run, tmp_path, attached):
    class Stop(Callback):
        run_valid = False
        def after_batch(self):
            if self.train_iter==9: raise KeyboardInterrupt
    cb = ChannelPruneCallback(.5, 'linear', every=2, round_to=1)
    if attached!='during': learn.add_cb(cb)
    if attached=='mid_ramp':
        with pytest.raises(KeyboardInterrupt): learn.fit(2, 1e-2, cbs=Stop())
    else: learn.fit(2, 1e-2, cbs=cb if attached=='during' else None)
    had = widths(learn.model)
    assert (sum(had.values())<=40)==(attached!='mid_ramp') and had!=GROUPS
    with warnings.catch_warnings():
        warnings.simplefilter('ignore'); learn.export('m.pkl')
    assert complete(learn)
    assert run(W.load_export, tmp_path, 'm.pkl', 2)==0
    out = fetched(tmp_path/'fresh.pt')
    assert out['loaded']==had and ('ChannelPruneCallback' in out['cbs'])==(attached!='during') and torch.equal(out['pred'], learn.predict(DLS.train_ds.items[0][0])[2])
    assert sum(out['widths'].values())<=40
    learn.fit(1, 1e-2); assert complete(learn)

def test_deepcopy(learn):
    learn.add_cb(ChannelPruneCallback(.5, 'iterative')); learn.fit(1, 1e-2)
    twin = copy.deepcopy(learn)
    a,b = learn.get_preds()[0],twin.get_preds()[0]
    assert torch.equal(a, b) and plan_of(twin.model)==plan_of(learn.model)
    twin.fit(1, 1e-2); assert torch.equal(learn.get_preds()[0], a) and complete(twin)
    m = copy.deepcopy(learn.model); assert plan_of(m)==plan_of(learn.model)

# ---- killed in mid-epoch, resumed from the last checkpoint in another process

RAMPS = dict(linear=(dict(ratio=.6, schedule='linear', every=3, round_to=1), 1, 4, (0,1,5)), iterative=(dict(ratio=.5, schedule='iterative', criterion='taylor'), 1, 4, (0,1,5)), 
             epochs_first=(dict(ratio=.6, schedule='linear', every=3, epochs=4, round_to=1), 2, 2, (0,1,5)), epochs_second=(dict(ratio=.6, schedule='linear', end=.9, every=3, epochs=4, round_to=1), 2, 2, (1,1,5)),
             steps_first=(dict(ratio=.6, schedule='linear', every=3, start=12, end=35, round_to=1), 2, 2, (0,1,3)), steps_second=(dict(ratio=.6, schedule='linear', every=3, start=5, end=35, round_to=1), 2, 2, (1,1,3)))

@pytest.mark.parametrize('name', [pytest.param(o, marks=pytest.mark.slow if o.endswith('first') else ()) for o in RAMPS])
def test_killed_and_resumed_as_if_nothing_had_happened(run, tmp_path, name):
    kw,fits,n,kill = RAMPS[name]
    assert run(W.through, tmp_path, kw, fits, n)==0
    for f in (tmp_path/'models').iterdir(): f.unlink()
    assert run(W.killed, tmp_path, kw, fits, n, kill)==-9
    assert run(W.resumed, tmp_path, kw, fits, n, (kill[0], kill[1]-1))==0
    a,b = fetched(tmp_path/'through.pt'),fetched(tmp_path/'resumed.pt')
    assert a['widths']==b['widths'] and a['plan'].keep==b['plan'].keep and same(a['state'], b['state']) and same_moments(a['moments'], b['moments'])
    assert b['history'] and a['history'][-len(b['history']):]==b['history'] and len(a['history'])>len(b['history'])-(name=='steps_first') # whose checkpoint is from before the first cut
    assert sum(a['widths'].values())<=40

# ---- two ranks

CONFIGS = dict(one_shot={}, linear=dict(schedule='linear', every=3, round_to=1), taylor=dict(criterion='taylor', schedule='iterative'), random=dict(criterion='random'), norms=dict(reestimate=True, criterion='bn_scale'), penalty=dict(schedule='iterative', penalty='group_lasso'))

@pytest.fixture(scope='module')
def ranks(start, tmp_path_factory):
    path = tmp_path_factory.mktemp('ranks')
    with socket.socket() as s: s.bind(('127.0.0.1', 0)); port = s.getsockname()[1]
    ps = [start(W.two_ranks, path, r, port, CONFIGS) for r in (0,1)]
    for p in ps: p.join(240)
    for p in ps: p.kill()
    return [fetched(path/f'rank{r}.pt') for r in (0,1)]

@pytest.mark.parametrize('name', CONFIGS)
def test_two_ranks_end_with_the_same_bytes(ranks, name):
    a,b = (r[name] for r in ranks)
    assert 'error' not in a and 'error' not in b, (a, b)
    assert a==b and a['type']=='Net' and sum(a['widths'].values())<=40 and len(a['history'])>=(2 if 'schedule' in CONFIGS[name] else 1) and a['n_opt']==14

# ---- mixed precision

@pytest.mark.filterwarnings('ignore:User provided device_type', 'ignore:torch.cuda.amp.GradScaler', 'ignore:.*CUDA is not available')
@pytest.mark.parametrize('verb', ['to_fp16','to_bf16'])
def test_fastai_mixed_precision(learn, verb):
    getattr(learn, verb)()
    learn.fit(2, 1e-2, cbs=[cb := ChannelPruneCallback(.5, 'iterative'), ChannelPenaltyCallback()])
    assert cb.step==20 and sum(widths(learn.model).values())<=40 and complete(learn)
    learn.fit(1, 1e-2)

class AMP(MixedPrecision):
    "fastai's, with autocast and scaler of the CPU; counts steps that were made and skipped"
    def __init__(self, dtype=torch.float16, init_scale=2.**24): super().__init__(); self.dtype,self.init_scale,self.made,self.lost = dtype,init_scale,0,0
    def before_fit(self): self.autocast,self.learn.scaler,self.scales = torch.autocast('cpu', self.dtype),torch.amp.GradScaler('cpu', init_scale=self.init_scale, enabled=self.dtype==torch.float16),[]
    def before_step(self):
        try: super().before_step()
        finally: self.lost += self.skipped; self.made += not self.skipped

@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
def test_skipped_steps_do_not_count(learn, dtype):
    cb,amp = ChannelPruneCallback(.6, 'linear', every=2, round_to=1, criterion='taylor'),AMP(dtype)
    learn.fit(4, 1e-2, cbs=[cb, amp, ChannelPenaltyCallback('group_lasso', 1e-3)])
    assert cb.step==amp.made and (amp.lost>=3)==(dtype==torch.float16) and amp.made+amp.lost==40 and complete(learn)
    assert cb.obtained==pytest.approx(.6, abs=.02) and all(p.dtype==torch.float32 and p.isfinite().all() for p in learn.model.parameters())

# ---- every kind of Learner

def twin(learn):
    "A copy of the model; dropped-out weights of an LSTM have a graph, which can't be copied"
    with torch.no_grad():
        if hasattr(learn.model, 'reset'): learn.model.reset()
        return copy.deepcopy(learn.model)

def check(learn, ratio=.5, lr=1e-3, least=.25, again=None, **kw):
    "Cut in two steps while it trains, then once more; what is left predicts what the masked model does, trains, and comes back from a file"
    n = n_params(learn.model)
    learn.fit(1, lr, cbs=(cb := ChannelPruneCallback(ratio, 'iterative', end=.6, **kw)))
    assert 1-n_params(learn.model)/n>least and complete(learn), n_params(learn.model)/n
    masked = twin(learn)
    last = learn.prune_channels(.2, round_to=4)
    mask_(masked, last)
    def preds(): return list(o) if isinstance(o := learn.get_preds()[0], (list, tuple)) else [o]
    small = preds()
    norms = any(plan_of(learn.model).marks.get(g) for g in last.removed) # statistics over channels: masked and removed differ by definition
    keep,learn.model = learn.model,masked
    assert norms or all(torch.allclose(a, b, atol=1e-4) for a,b in zip(small, preds()))
    learn.model = keep
    assert complete(learn)
    before = [p.detach().clone() for p in learn.model.parameters()]
    learn.fit(1, lr)
    assert sum(not torch.equal(a, b) for a,b in zip(before, learn.model.parameters()))>.8*len(before)
    if again is not None:
        learn.save('m'); other = again().load('m')
        assert same(other.model.state_dict(), learn.model.state_dict()) and complete(other)
        a,b = learn.get_preds()[0],other.get_preds()[0]
        assert all(torch.equal(x, y) for x,y in zip(a, b))
    return cb

def test_tabular(tmp_path):
    def learner(): return tabular(tmp_path, (64,32))
    learn = learner()
    check(learn, again=learner)
    assert len(learn.model.layers[0][0].weight)<=32 and learn.predict(table().iloc[0])[2].sum()==pytest.approx(1, abs=1e-4)

def test_text(tmp_path):
    def learner(): return text_learner(tmp_path)
    learn = learner()
    hidden = len(learn.model[1].layers[0][2].weight)
    check(learn, least=0., again=learner)
    assert len(learn.model[1].layers[0][2].weight)<=hidden//2 # the head; recurrent layers stay whole, and say why
    assert any('lstm' in w for w in plan_of(learn.model).notes.values())

def test_several_inputs_and_outputs(tmp_path):
    def learner(): return two_learner(tmp_path, 16)
    check(learner(), criterion='taylor', again=learner)

def test_xresnet(tmp_path):
    dls = digits(n=80, size=32, bs=32)
    def learner(): set_seed(0); return quiet(Learner(dls, XResNet(ResBlock, 1, [1,1,1,1], n_out=10, widen=.25), metrics=accuracy, path=tmp_path))
    check(learner(), least=.5, again=learner)

def test_vision_learner_fine_tunes(tmp_path):
    set_seed(0)
    learn = quiet(vision_learner(digits(n=80, size=32, bs=32), resnet18, pretrained=False, metrics=accuracy, path=tmp_path))
    n = n_params(learn.model)
    with warnings.catch_warnings():
        warnings.simplefilter('ignore', UserWarning); learn.fine_tune(1, 1e-3, cbs=(cb := ChannelPruneCallback(.5)))
    assert len(cb.history)==1 and n_params(learn.model)<.35*n and complete(learn) and len(learn.model[1][8].weight)==10
    learn.save('m')
    other = quiet(vision_learner(digits(n=80, size=32, bs=32), resnet18, pretrained=False, metrics=accuracy, path=tmp_path)).load('m')
    assert torch.equal(learn.get_preds()[0], other.get_preds()[0])

@pytest.mark.parametrize('arch', ['test_resnet','test_efficientnet', pytest.param('test_vit', marks=pytest.mark.slow), pytest.param('test_convnext', marks=pytest.mark.slow)])
def test_timm_body_and_head(tmp_path, arch):
    dls = digits(n=60, size=64, bs=24)
    kw = dict(img_size=64) if timm.get_pretrained_cfg(arch).fixed_input_size else {}
    def learner():
        set_seed(0)
        body = timm.create_model(arch, num_classes=0, global_pool='', **kw)
        with torch.no_grad(): nf = body.eval()(torch.randn(1,3,64,64)).shape[1]
        model = nn.Sequential(body, create_head(nf, 10)) if 'vit' not in arch else timm.create_model(arch, num_classes=10, **kw)
        return quiet(Learner(dls, model, metrics=accuracy, path=tmp_path))
    check(learner(), least=.3, again=learner)

def test_unet(tmp_path):
    g = torch.Generator().manual_seed(0)
    x = torch.randn(20, 3, 16, 16, generator=g); y = (x[:, 0]>0).long()
    def learner():
        set_seed(0)
        body = nn.Sequential(*list(create_body(resnet18(weights=None), n_in=3, pretrained=False).children())[:6])
        return made(DynamicUnet(body, 2, (16, 16)), (x,), y, tmp_path, loss_func=CrossEntropyLossFlat(axis=1))
    learn = learner()
    check(learn, least=.3, again=learner)
    assert learn.model(x[:2]).shape==(2, 2, 16, 16)
