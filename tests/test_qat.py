"QATCallback under fastai's verbs: lr_find, fine_tune, accumulation, mixed precision, checkpoints, export, interrupts, sparsity, two ranks"
import json, socket, warnings
import pytest, torch
from torch import nn
from fastai.callback.core import Callback, CancelFitException
from fastai.callback.fp16 import NonNativeMixedPrecision
from fastai.callback.schedule import fine_tune
from fastai.callback.tracker import EarlyStoppingCallback, SaveModelCallback
from fastai.callback.training import GradientAccumulation, GradientClip
from fastai.learner import load_learner
from fastai.torch_core import params

import distrib_worker as W
from distrib_worker import DLS, NAMES, SUM, Order, digest, learner, net, zeros
from helpers import forking
from test_lifecycle import AMP
from fastcompress.callback.distill import DistillationCallback
from fastcompress.callback.qat import QATCallback, quant_file, read_quant
from fastcompress.callback.quantize import PTQCallback
from fastcompress.callback.sparsify import SparsifyCallback
from fastcompress.deploy.capture import capture
from fastcompress.deploy.lower import check_ops, lower
from fastcompress.quantize.affine import quantize
from fastcompress.quantize.learned import learned
from fastcompress.quantize.simulate import simulation

pytestmark = [pytest.mark.usefixtures('one_thread'), pytest.mark.filterwarnings('ignore:.*quantized tensor creation.*')]
X = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))

@pytest.fixture
def learn(tmp_path): return learner(tmp_path)

def sim(learn): return simulation(learn.model)
def answer(learn):
    with torch.no_grad(): return learn.model.eval()(X)
def state(learn): return {k: v.detach().clone() for k,v in learn.model.state_dict().items()}
def same(a, b): return a.keys()==b.keys() and all(torch.equal(a[k], b[k]) for k in a)
def scales(learn): return {q.key: q.scale.detach().clone() for q in sim(learn).quantizers.values()}
def clean(learn):
    "Nothing of a fit is left on the Learner"
    s = sim(learn)
    return (all(q.how is None for q in s.quantizers.values()) if s is not None else True) and not [c for c in learn.cbs if type(c).__name__=='QATEnd' or vars(c).get('of_qat')] and \
           not [n for n,_ in learn.model.named_parameters() if 'fastcompress' in n] and len(learn.model._forward_pre_hooks)==len(learn.model._forward_hooks)==(s is not None)

class Watch(Callback):
    "Scales after each batch, and what is going on in the callback"
    order,run_valid = 101,False
    def __init__(self, cb=None): self.cb,self.scales,self.bn,self.bits,self.pos = cb,[],[],[],[]
    def after_batch(self):
        self.scales.append(torch.cat([q.scale.detach().flatten() for q in simulation(self.learn.model).quantizers.values()]))
        self.bn.append(self.learn.model.get_submodule('2').training); self.bits.append(simulation(self.learn.model)['input'].bits)
        if self.cb: self.pos.append(self.cb.pos)

KW = dict(moving={}, lsq=dict(learned=True), noise=dict(noise=.3), tensor=dict(per_channel=False), tensor_lsq=dict(per_channel=False, learned=True), narrow=dict(w_bits=2, a_bits=8, learned='weights'),
          layers=dict(w_bits={'1':4, '*':8}, a_bits={'7':5}), minmax=dict(observer='minmax'), percentile=dict(observer='percentile'))

@pytest.mark.parametrize('name', KW)
def test_a_fit(learn, name):
    keys,cls = list(learn.model.state_dict()),type(learn.model)
    learn.fit(2, 1e-2); loss = learn.validate()[0]
    learn.fit(2, 1e-3, cbs=QATCallback(**KW[name]))
    assert clean(learn) and sim(learn).mode=='fake' and sim(learn).calibrated and type(learn.model) is cls
    assert [k for k in learn.model.state_dict() if 'fastcompress_quant' not in k]==keys and len(learn.opt.all_params())==len(list(net().parameters()))
    assert learn.validate()[0]<loss+.1 and learn.get_preds()[0].shape==(40,10) and learn.predict(DLS.train_ds.items[0][0])[0] in DLS.vocab
    learn.dequantize(); assert clean(learn) and list(learn.model.state_dict())==keys and learn.validate()[0]<loss+.1

@pytest.mark.parametrize('name', ['moving','lsq','tensor','layers'])
def test_what_was_trained_ships(learn, name):
    learn.fit(1, 1e-2, cbs=QATCallback(**KW[name]))
    y,before = answer(learn),state(learn)
    phone,ref,pairs = lower(capture(learn.model, X))
    assert (phone(X)-y).abs().max()<=.1*y.abs().max() and same(before, state(learn))
    assert max(c.steps for c in check_ops(phone, ref, pairs, X))<=1 and len(pairs)>=len(sim(learn).placement.acts)

@pytest.mark.filterwarnings('ignore:.*deprecated.*')
def test_the_file_for_the_phone_is_what_was_trained(learn, tmp_path):
    from fastcompress.deploy.mobile import load_mobile
    learn.fit(1, 1e-2, cbs=QATCallback(w_bits=4, learned=True)); before = state(learn)
    with learn.no_bar(): learn.export_mobile(tmp_path/'phone', strict=True)
    assert (load_mobile(tmp_path/'phone')(X)-answer(learn)).abs().max()<=.05*answer(learn).abs().max() and same(before, state(learn))

def test_bits_of_weights_and_activations_apart(learn):
    learn.fit(1, 1e-2, cbs=QATCallback(w_bits=3, a_bits={'7':4, '*':7}))
    s = sim(learn)
    assert {q.bits for q in s.quantizers.values() if q.is_weight}=={3} and s['7:linear'].bits==4 and s['input'].bits==7
    w = learn.model[1].weight; q = next(s[k] for k in s.placement.weights if k.startswith('1:'))
    assert all(len(r.unique())<=7 for r in quantize(w.detach(), q.qparams).flatten(1))

def test_steps_are_learned_and_move_apart_from_the_learners_optimizer(learn):
    learn.fit(1, 1e-2)
    cb,watch = QATCallback(4, 4, learned=True, freeze_ranges=.5, lr_quant=1e-3),Watch()
    class Eye(Callback):
        order = 102
        def before_train(self):
            self.seen = [(g['lr'], g['weight_decay']) for g in cb._opt.param_groups]; self.ids = {id(p) for p in self.learn.opt.all_params().itemgot(0)}; self.q = {id(q.scale) for q in learned(sim(self.learn))}
    o = Eye()
    learn.fit(2, 1e-3, wd=.1, cbs=[cb, watch, o])
    assert o.seen[0][1]==0 and len(o.q)==len(sim(learn).quantizers) and not o.ids&o.q and len(learn.opt.param_lists)==1
    moved = [not torch.equal(a, b) for a,b in zip(watch.scales, watch.scales[1:])]
    assert all(moved[:9]) and not any(moved[10:]) # 20 steps, frozen after half of them

def test_fit_with_a_new_optimizer_has_no_scale_in_it(learn):
    learn.fit(1, 1e-2, cbs=QATCallback(learned=True)); learn.fit(1, 1e-2, cbs=QATCallback(learned=True), reset_opt=True)
    assert len(learn.opt.all_params())==len(list(net().parameters()))

def test_ranges_follow_until_frozen_and_norms_freeze(learn):
    learn.fit(1, 1e-2)
    cb = QATCallback(4, 4, freeze_bn=.5, freeze_ranges=.75); watch = Watch(cb)
    learn.fit(2, 1e-2, cbs=[cb, watch])
    assert watch.pos==pytest.approx([i/20 for i in range(1, 21)])
    assert watch.bn==[p<.5 for p in watch.pos]
    moved = [not torch.equal(a, b) for a,b in zip(watch.scales, watch.scales[1:])]
    assert any(moved[:10]) and any(moved[10:14]) and not any(moved[15:])
    assert torch.equal(watch.scales[-1], torch.cat([s.flatten() for s in scales(learn).values()]))
    watch = Watch(); learn.fit(1, 1e-2, cbs=[QATCallback(4, 4, freeze_bn=1., freeze_ranges=1.), watch]); assert all(watch.bn)

@pytest.mark.parametrize('again', [True, False])
def test_norms_are_estimated_again(learn, again):
    learn.fit(1, 1e-2, cbs=QATCallback(reestimate_bn=again, freeze_bn=.5))
    bn = learn.model[2]; got = bn.running_mean.clone()
    from fastcompress.callback.quantize import calibration_batches
    from fastcompress.prune.remove import reestimate_norms_
    reestimate_norms_(learn.model, calibration_batches(DLS, 16))
    assert torch.equal(bn.running_mean, got)==again

def test_from_a_quantized_learner(learn):
    learn.fit(1, 1e-2)
    still = dict(freeze_bn=0., reestimate_bn=False)
    learn.quantize(observer='minmax'); before = scales(learn); placed = sim(learn)
    watch = Watch(); learn.fit(1, 0., cbs=[QATCallback(observer='minmax', freeze_ranges=0., **still), watch])
    assert sim(learn) is placed and same(before, scales(learn)) # went on with those ranges
    learn.fit(1, 0., cbs=QATCallback(w_bits=4, observer='minmax', freeze_ranges=0., **still))
    assert sim(learn) is placed and all(torch.equal(s, before[k])==(not placed[k].is_weight) for k,s in scales(learn).items())
    learn.fit(1, 0., cbs=QATCallback(per_channel=False)); assert sim(learn) is not placed and clean(learn)
    learn.quantize(mode='dynamic')
    learn.fit(1, 0., cbs=QATCallback()); assert all(q.how is None for q in sim(learn).quantizers.values())

def test_progressive(learn):
    learn.fit(1, 1e-2)
    cb = QATCallback(4, 6, progressive=(8, 5)); watch = Watch()
    save = SaveModelCallback(fname='best')
    learn.fit(2, 1e-3, cbs=[cb, watch, save])
    assert watch.bits==[8]*4+[6]*16 # phases end at a quarter and a half: 8, then max(6, 5), then 6
    assert {q.bits for q in sim(learn).quantizers.values() if q.is_weight}=={4} and clean(learn)
    assert read_quant(quant_file(learn.path/'models'/'best.pth'))[0]['quantizers']['input']['bits']==6

# ---- what is left out, what can't be

def test_include_and_exclude(learn):
    learn.fit(1, 1e-2, cbs=QATCallback(exclude='7')); assert sim(learn).placement.weights.keys()=={'0:conv2d.weight','1:conv2d.weight','3:conv2d.weight'}
    learn.fit(1, 1e-2, cbs=QATCallback(include=nn.Linear)); assert sim(learn).placement.weights.keys()=={'7:linear.weight'} or len(sim(learn).placement.weights)==1
    before = state(learn)
    with pytest.raises(ValueError, match="no layer matches 'conv'"): learn.fit(1, 1e-2, cbs=QATCallback(exclude='conv'))
    assert same(before, state(learn)) and clean(learn)

@pytest.mark.parametrize('kw', [dict(w_bits=1), dict(a_bits=17), dict(w_bits=8.), dict(a_bits=9), dict(w_bits=16), dict(w_bits={'1':1}), dict(progressive=(4,6)), dict(profile='arm'), dict(observer='no'), dict(freeze_bn=2),
                                dict(freeze_ranges=True), dict(learned='w'), dict(noise=1.), dict(lr_quant=-1), dict(distill=0), dict(n_batches=0), dict(epochs=1.5), dict(momentum=2)], ids=str)
def test_bad_settings(kw):
    with pytest.raises(ValueError): QATCallback(**kw)
    assert QATCallback(a_bits=16, profile='onnx').a_bits==16

class Strange(nn.Module):
    def __init__(self): super().__init__(); self.w = nn.Parameter(torch.randn(3*8*8, 10)*.01)
    def forward(self, x): return (x.flatten(1)[:,:,None]*self.w).sum(1)

@pytest.mark.parametrize('what', ['no op','no data','no match','old amp','ptq','name'])
def test_errors_leave_the_model_as_it_was(tmp_path, what, monkeypatch):
    learn = learner(tmp_path, model=Strange() if what=='no op' else net()); cb,match = QATCallback(),None
    if what=='no op': match = 'nothing to quantize'
    if what=='no data': monkeypatch.setattr('fastcompress.callback.qat.calibration_batches', lambda *a: (_ for _ in ()).throw(ValueError('no calibration data: none'))); match = 'no calibration data'
    if what=='no match': cb,match = QATCallback(w_bits={'conv9': 4}),"no layer matches 'conv9'"
    if what=='old amp': monkeypatch.setattr(NonNativeMixedPrecision, 'before_fit', lambda self: None); learn.add_cb(NonNativeMixedPrecision()); match = 'to_non_native_fp16'
    if what=='ptq': learn.add_cb(PTQCallback()); match = 'PTQCallback'
    if what=='name': cb,match = QATCallback(include='zz'),'no layer matches'
    keys,before = list(learn.model.state_dict()),{n: p.detach().clone() for n,p in learn.model.named_parameters()}
    with pytest.raises(ValueError, match=match): learn.fit(1, 1e-2, cbs=cb)
    assert list(learn.model.state_dict())==keys and sim(learn) is None and clean(learn) and all(torch.equal(p, before[n]) for n,p in learn.model.named_parameters())

def test_nan_while_calibrating(learn):
    learn.fit(1, 1e-2); learn.model[1].weight.data[0] = float('nan')
    with pytest.raises(ValueError, match='nan'): learn.fit(1, 1e-2, cbs=QATCallback())
    assert sim(learn) is None and clean(learn)

# ---- verbs

@pytest.mark.parametrize('first', ['float','quantized'])
@pytest.mark.parametrize('learned', [True, False])
def test_lr_find_changes_nothing(learn, first, learned):
    learn.fit(1, 1e-2, cbs=QATCallback(4, 4, learned=learned) if first=='quantized' else None)
    learn.add_cb(QATCallback(4, 4, learned=learned)); before = state(learn)
    learn.lr_find(num_it=8, show_plot=False)
    assert same(before, state(learn)) and clean(learn) and (sim(learn) is not None)==(first=='quantized')
    assert not list((learn.path/learn.model_dir).glob('*'))
    learn.fit(1, 1e-3); assert sim(learn).mode=='fake' and clean(learn)

def body_head(m): return [params(m[:4]), params(m[4:])]

@pytest.mark.parametrize('epochs', [None, 4])
@pytest.mark.parametrize('learned', [True, False])
def test_fine_tune(tmp_path, epochs, learned):
    learn = learner(tmp_path, splitter=body_head); cb = QATCallback(4, 4, learned=learned, epochs=epochs); watch = Watch(cb)
    learn.fine_tune(3, 1e-2, freeze_epochs=1, cbs=[cb, watch])
    want = [i/10 for i in range(1, 11)]+[i/30 for i in range(1, 31)] if epochs is None else [i/40 for i in range(1, 41)]
    assert watch.pos==pytest.approx(want) and watch.bn==[p<.8 for p in watch.pos]
    assert len(learn.opt.param_lists)==2 and clean(learn) and cb.step==40

def test_accumulation(learn):
    cb = QATCallback(4, 4, learned=True); watch = Watch(cb)
    learn.fit(2, 1e-2, cbs=[cb, watch, GradientAccumulation(32)])
    moved = [not torch.equal(a, b) for a,b in zip(watch.scales, watch.scales[1:])]
    assert cb.step==10 and sum(moved)==9 and watch.pos[-1]==1. and moved[0] and not moved[1] # a step after every second batch; none in the last tenth

def test_skipped_steps_do_not_count(learn):
    cb,amp = QATCallback(4, 4, learned=True),AMP()
    learn.fit(3, 1e-2, cbs=[cb, amp])
    assert amp.lost>=3 and cb.step==amp.made and all(q.scale.dtype==torch.float32 and q.scale.isfinite().all() and (q.scale>0).all() for q in sim(learn).quantizers.values())

def test_the_scale_of_the_loss_is_divided_out(tmp_path):
    "Adam's moments, which remember the size of gradients, are the same under a scale of 1024"
    got = []
    class Moments(Callback):
        order,run_valid = 102,False
        def after_train(self): got.append(torch.cat([cb._opt.state[g['params'][0]]['exp_avg_sq'].flatten() for g in cb._opt.param_groups]))
    for s in 1.,1024.:
        learn,cb = learner(tmp_path),QATCallback(4, 4, learned=True)
        learn.fit(1, 1e-4, cbs=[cb, AMP(torch.float16, s), Moments(), Order()])
    assert .8<(got[1]/got[0]).median()<1.25 and got[0].min()>0

def test_clipping_does_not_see_the_steps(tmp_path, monkeypatch):
    seen,real = [],nn.utils.clip_grad_norm_
    def count(ps, *args):
        ps = list(ps); seen.append(sum(p.grad is not None for p in ps))
        return real(ps, *args)
    monkeypatch.setattr(nn.utils, 'clip_grad_norm_', count)
    learn = learner(tmp_path); learn.fit(1, 1e-2, cbs=[QATCallback(learned=True), GradientClip(.1)])
    assert set(seen)=={len(list(net().parameters()))}

@pytest.mark.filterwarnings('ignore:User provided device_type', 'ignore:torch.cuda.amp.GradScaler', 'ignore:.*CUDA is not available')
@pytest.mark.parametrize('verb', ['to_fp16','to_bf16','cpu_bf16'])
def test_mixed_precision(learn, verb):
    if verb!='cpu_bf16': getattr(learn, verb)()
    learn.fit(2, 1e-2, cbs=[QATCallback(4, 4, learned=True), *([AMP(torch.bfloat16)] if verb=='cpu_bf16' else [])])
    assert all(q.scale.dtype==torch.float32 for q in sim(learn).quantizers.values()) and clean(learn) and answer(learn).isfinite().all()

def test_the_best_epoch_comes_back_as_it_was(learn):
    class Worse(Callback):
        order,run_train = 49,False
        def after_loss(self): self.learn.loss = self.learn.loss*0 + abs(self.epoch-1)
    cb = QATCallback(4, 4, learned=True, reestimate_bn=False); seen = {}
    class Take(Callback):
        order = 102
        def after_epoch(self): seen[self.epoch] = scales(self.learn)
    learn.fit(4, 1e-2, cbs=[cb, Worse(), SaveModelCallback(fname='best'), Take()])
    assert same(scales(learn), seen[1]) and not same(seen[1], seen[3]) and clean(learn)
    fresh = learner(learn.path, 3).load('best', with_opt=False); assert torch.equal(answer(fresh), answer(learn))

def test_early_stopping(learn):
    class Worse(Callback):
        order,run_train = 49,False
        def after_loss(self): self.learn.loss = self.learn.loss*0 + self.epoch
    learn.fit(6, 1e-2, cbs=[QATCallback(), Worse(), EarlyStoppingCallback(patience=2)])
    assert len(learn.recorder.values)==3 and clean(learn) and sim(learn).mode=='fake'

def stop_at(n, what=KeyboardInterrupt):
    class Stop(Callback):
        run_valid = False
        def after_batch(self):
            if self.train_iter==n: raise what
    return Stop()

@pytest.mark.parametrize('how', [KeyboardInterrupt, RuntimeError('no'), CancelFitException])
@pytest.mark.parametrize('attached', [True, False])
def test_interrupted(learn, how, attached):
    cb = QATCallback(4, 4, learned=True, distill=.5)
    if attached: learn.add_cb(cb)
    try: learn.fit(2, 1e-2, cbs=[stop_at(7, how), *([] if attached else [cb])])
    except (KeyboardInterrupt, RuntimeError): pass
    assert clean(learn) and answer(learn).isfinite().all() and learn.get_preds()[0].isfinite().all()
    if attached: learn.remove_cb(cb)
    learn.fit(1, 1e-2); learn.fit(1, 1e-2, cbs=QATCallback(4, 4)); assert clean(learn)

def test_a_plain_fit_afterwards_trains_through_the_same_grids(learn):
    learn.fit(1, 1e-2, cbs=QATCallback(4, 4)); before,ws = scales(learn),W.weights(learn)
    learn.fit(1, 1e-2)
    assert same(before, scales(learn)) and not torch.equal(ws['1.weight'], learn.model[1].weight)

@pytest.mark.parametrize('kw', [dict(learned=True), {}], ids=['lsq','moving'])
def test_zeros_hold(learn, kw):
    learn.fit(2, 1e-2, cbs=SparsifyCallback(.8))
    learn.fit(1, 1e-2, cbs=QATCallback(4, 4, **kw))
    s,masks = sim(learn),learn.mask_keeper.masks
    ints = {n: quantize(learn.model.get_submodule(n).weight.detach(), next(s[k] for k in s.placement.weights if k.startswith(f'{n}:')).qparams) for n in NAMES}
    assert zeros(learn)==round(.8*SUM) and all((q[~masks[n]]==0).all() and (q!=0).any() for n,q in ints.items())
    learn.dequantize(); learn.fit(1, 1e-2, cbs=[SparsifyCallback(.9), QATCallback(**kw)]); assert zeros(learn)==round(.9*SUM) and clean(learn)

def test_distillation_from_the_float_model(learn):
    learn.fit(2, 1e-2); y = answer(learn); heard = []
    class Ear(Callback):
        order,run_valid = 102,False
        def before_batch(self):
            cb = next(c for c in self.learn.cbs if isinstance(c, DistillationCallback))
            with torch.no_grad(): heard.append((simulation(cb.teacher), cb.teacher.eval()(X)))
    learn.fit(1, 1e-2, cbs=[QATCallback(4, 4, distill=.7), Ear()])
    assert all(s is None and torch.equal(o, y) for s,o in heard) and heard and clean(learn)
    learn.dequantize(); y = answer(learn); learn.quantize(w_bits=4, a_bits=4); heard[:] = [] # quantized already: the teacher is not
    own = DistillationCallback(weight=.3)
    learn.fit(1, 1e-2, cbs=[QATCallback(4, 4), own, Ear()]) # the user's own, without a teacher
    assert all(s is None and torch.equal(o, y) for s,o in heard) and heard and clean(learn)

def test_silent(tmp_path, capsys):
    learn = W.Learner(DLS, net(), path=tmp_path)
    with warnings.catch_warnings(), learn.no_bar(), learn.no_logging():
        warnings.simplefilter('error'); warnings.filterwarnings('ignore', 'numpy.core is deprecated') # fastai's
        learn.fit(1, 1e-2, cbs=QATCallback(4, 4, learned=True, progressive=8, distill=.5)); learn.save('m'); learn.load('m'); learn.fit(1, 1e-2, cbs=QATCallback())
    assert capsys.readouterr()==('', '')

# ---- files

@pytest.fixture(scope='module')
def start():
    with forking('test_qat') as f: yield f

def finish(*ps):
    for p in ps: p.join(120)
    for p in ps: p.kill()
    return [p.exitcode for p in ps]

def load_fresh(path, name):
    learn = learner(path, 5).load(name)
    out = dict(y=answer(learn), state=state(learn), bits={q.key: q.bits for q in sim(learn).quantizers.values()})
    learn.fit(1, 1e-2, cbs=Order()); torch.save(dict(out, after=answer(learn).isfinite().all()), path/'fresh.pt')

@pytest.mark.parametrize('kw', [dict(w_bits=4, a_bits={'*':6}, learned=True), dict(exclude='0', per_channel=False), 'ptq'], ids=str)
def test_saved_here_loaded_there(learn, start, tmp_path, kw):
    learn.fit(1, 1e-2, cbs=PTQCallback() if kw=='ptq' else QATCallback(**kw))
    learn.save('q'); json.dumps(read_quant(quant_file(tmp_path/'models'/'q.pth'))[0])
    assert finish(start(load_fresh, tmp_path, 'q'))==[0]
    out = torch.load(tmp_path/'fresh.pt')
    assert torch.equal(out['y'], answer(learn)) and same(out['state'], state(learn)) and out['bits']=={q.key: q.bits for q in sim(learn).quantizers.values()} and out['after']

def test_float_checkpoints_still_load(learn):
    learn.fit(1, 1e-2); learn.save('float'); y = answer(learn); keys = list(learn.model.state_dict())
    learn.fit(1, 1e-2, cbs=QATCallback()); learn.save('int'); z = answer(learn)
    learn.load('float'); assert torch.equal(answer(learn), y) and list(learn.model.state_dict())==keys and clean(learn)
    learn.load('int'); assert torch.equal(answer(learn), z)
    learn.dequantize(); learn.save('int'); assert not quant_file(learn.path/'models'/'int.pth').exists()
    quant = learner(learn.path, 3); quant.fit(1, 1e-2, cbs=QATCallback()); quant.model.load_state_dict(torch.load(learn.path/'models'/'int.pth', weights_only=False)['model'], strict=False)

def test_what_cannot_be_written_down_is_said(learn, tmp_path):
    from fastcompress.quantize.observe import MinMax
    class Mine(MinMax): pass
    learn.fit(1, 1e-2, cbs=QATCallback(observer=Mine))
    with pytest.warns(UserWarning, match='q.quant.safetensors was not written'): learn.save('q')
    assert QATCallback(observer=MinMax).observer=='minmax' and not quant_file(tmp_path/'models'/'q.pth').exists()
    y = answer(learn); next(iter(sim(learn).quantizers.values())).scale.mul_(2); learn.load('q'); assert torch.equal(answer(learn), y)

def test_exported_after_an_interrupt(learn):
    learn.add_cb(QATCallback(4, 4, learned=True, distill=.5))
    with pytest.raises(KeyboardInterrupt): learn.fit(2, 1e-2, cbs=stop_at(7))
    with warnings.catch_warnings():
        warnings.simplefilter('ignore'); learn.export('m.pkl'); other = load_learner(learn.path/'m.pkl')
    assert torch.equal(answer(other), answer(learn))
    other.dls = DLS; other.logger = lambda o: None; other.create_opt(); other.fit(1, 1e-3); assert clean(other) and sim(other).mode=='fake'

def test_trained_statistics_are_not_replaced_at_the_start(tmp_path):
    seen = {}
    class See(Callback):
        order = 102
        def before_fit(self): seen[self.learn.name_] = self.model[2].running_mean.clone()
    for name in 'fresh','pretrained':
        learn = learner(tmp_path); learn.name_ = name
        if name=='pretrained': learn.model[2].running_mean.fill_(.5); learn.model[2].num_batches_tracked.zero_() # as in many published checkpoints
        learn.fit(1, 1e-2, cbs=[QATCallback(), See()])
    assert (seen['pretrained']==.5).all() and (seen['fresh']!=0).any()

def test_layers_that_are_never_called(learn):
    class Spare(nn.Module):
        def __init__(self): super().__init__(); self.body,self.spare = net(),nn.Linear(3, 3)
        def forward(self, x): return self.body(x)
    learn.model = Spare(); learn.create_opt()
    learn.fit(1, 1e-3, cbs=QATCallback(exclude='spare')); first = sim(learn)
    learn.fit(1, 1e-3, cbs=QATCallback(exclude='spare')); assert sim(learn) is first
    learn.fit(1, 1e-3, cbs=QATCallback(exclude='body.7')); assert sim(learn) is not first
    second = sim(learn); learn.fit(1, 1e-3, cbs=QATCallback(exclude='body.7')); assert sim(learn) is second

def test_files_of_others(learn, tmp_path):
    learn.fit(1, 1e-2, cbs=QATCallback()); learn.save('q')
    other = learner(tmp_path, model=nn.Sequential(nn.Conv2d(3,4,3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4,10))); before = state(other)
    with pytest.raises(ValueError, match='q.quant.safetensors is of another model'): other.load('q')
    assert same(before, state(other)) and clean(other)
    quant_file(tmp_path/'models'/'q.pth').write_bytes(b'no')
    with pytest.raises(ValueError, match='is damaged'): learner(tmp_path).load('q')

@pytest.mark.parametrize('attached', [True, False])
def test_export(learn, attached):
    cb = QATCallback(4, 4, learned=True, distill=.5)
    learn.fit(1, 1e-2, cbs=None if attached and learn.add_cb(cb) else cb)
    with warnings.catch_warnings():
        warnings.simplefilter('ignore'); learn.export('m.pkl'); other = load_learner(learn.path/'m.pkl')
    assert torch.equal(answer(other), answer(learn)) and len(learn.dls.train_ds)==160 and any(isinstance(c, QATCallback) for c in other.cbs)==attached
    other.dls = DLS; other.logger = lambda o: None; other.remove_cb(other.progress) if hasattr(other, 'progress') else None
    other.create_opt(); other.fit(1, 1e-3); assert clean(other) and answer(other).isfinite().all()

@pytest.mark.parametrize('kw', [dict(learned=True), {}, dict(learned='acts', freeze_bn=.3, freeze_ranges=.6), dict(progressive=(8,6,5), learned=True)], ids=['lsq','moving','both','progressive'])
def test_interrupted_and_resumed(tmp_path, kw):
    a = learner(tmp_path); a.fit(4, 1e-2, cbs=[QATCallback(4, 4, **kw), Order()])
    b = learner(tmp_path)
    with pytest.raises(KeyboardInterrupt): b.fit(4, 1e-2, cbs=[QATCallback(4, 4, **kw), Order(), SaveModelCallback(every_epoch=True, with_opt=True), stop_at(27)])
    c = learner(tmp_path, 9).load('model_1'); c.fit(4, 1e-2, cbs=[QATCallback(4, 4, **kw), Order()], start_epoch=2)
    assert same(state(a), state(c)) and clean(c)

# ---- two ranks

def two_ranks(path, rank, port, configs):
    W.join(rank, port); out = {}
    for name,kw in configs.items():
        learn,each = learner(path, seed=rank),[] # another start on each rank
        class Seen(Callback):
            order,run_valid = 103,False
            def after_batch(self): each.append((digest(self.learn.model.parameters()), digest([q.scale for q in simulation(self.learn.model).quantizers.values()])))
        try:
            with learn.distrib_ctx(sync_bn=False): learn.fit(2, 1e-2, cbs=[QATCallback(4, 4, **kw), Seen()])
            out[name] = dict(each=each, state=digest(learn.model.state_dict().values()), clean=clean(learn), type=type(learn.model).__name__)
        except Exception as e: out[name] = dict(error=f'{type(e).__name__}: {e}')
    torch.save(out, path/f'rank{rank}.pt')
    torch.distributed.destroy_process_group()

RANKS = dict(moving={}, lsq=dict(learned=True), tensor=dict(per_channel=False, learned='acts'))

@pytest.fixture(scope='module')
def ranks(start, tmp_path_factory):
    path = tmp_path_factory.mktemp('ranks')
    with socket.socket() as s: s.bind(('127.0.0.1', 0)); port = s.getsockname()[1]
    assert finish(*[start(two_ranks, path, r, port, RANKS) for r in (0,1)])==[0,0]
    return [torch.load(path/f'rank{r}.pt') for r in (0,1)]

@pytest.mark.parametrize('name', RANKS)
def test_two_ranks_have_the_same_bytes(ranks, name):
    a,b = (r[name] for r in ranks)
    assert 'error' not in a, a['error']
    assert a['each']==b['each'] and len(set(a['each']))>=9 and a['clean'] and b['clean'] and a['type']=='Sequential' # grids and weights after each batch
    assert a['state']==b['state']
