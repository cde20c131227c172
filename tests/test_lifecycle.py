"What a sparse model has to survive outside one fit: two ranks, a kill, a reload elsewhere, mixed precision, quantization"
import socket, warnings
import pytest, torch
from torch import nn
from fastai.callback.core import Callback, CancelFitException
from fastai.callback.fp16 import MixedPrecision, NonNativeMixedPrecision, to_non_native_fp16
from fastai.callback.schedule import fine_tune, fit_one_cycle
from fastai.callback.tracker import EarlyStoppingCallback, ReduceLROnPlateau, SaveModelCallback
from fastai.callback.training import GradientAccumulation
from fastai.learner import load_model
from fastai.torch_core import params

import distrib_worker as W
from distrib_worker import DLS, N, NAMES, SUM, Order, learner, net, zeros
from helpers import forking, to_the_end
from fastcompress.callback.hold import hold_masks, masks_file, release_masks
from fastcompress.callback.quantize import PTQCallback
from fastcompress.callback.sparsify import SparsifyCallback
from fastcompress.prune.mask import covered_weights, sparse_masks
from fastcompress.quantize.affine import quantize
from fastcompress.quantize.simulate import simulation

pytestmark = pytest.mark.usefixtures('one_thread')

@pytest.fixture
def learn(tmp_path): return learner(tmp_path)

@pytest.fixture(scope='module')
def start():
    with forking('distrib_worker') as f: yield f

@pytest.fixture
def run(start): return to_the_end(start, 120)

def column(learn): return [v[list(learn.recorder.metric_names).index('sparsity')-1] for v in learn.recorder.values]
def fetched(file): return torch.load(file, weights_only=False)
def same(a, b): return a.keys()==b.keys() and all(torch.equal(a[k], b[k]) for k in a)
def n_gone(h): return sum(h[3][n]*N[n] for n in NAMES)

class Watch(Callback):
    "Zeros after every real step, and whether each weight obeys its mask"
    order,run_valid = 101,False
    def __init__(self): self.seen,self.bad = [],0
    def after_step(self):
        self.seen.append(zeros(self.learn))
        self.bad += sum(int(w.detach()[~self.learn.mask_keeper.masks[n]].count_nonzero()) for n,w in covered_weights(self.model, NAMES).items())

# ---- two ranks

CONFIGS = dict(magnitude={}, gone_is_gone=dict(regrow=False), rigl=dict(regrow='gradient', scope='erk', schedule='one_shot'), random=dict(criterion='random'), taylor=dict(criterion='taylor'),
               wanda=dict(criterion='wanda'), wanda_grown=dict(criterion='wanda', regrow='gradient'), grown_by_wanda=dict(regrow='wanda'))

@pytest.fixture(scope='module')
def ranks(start, tmp_path_factory):
    path = tmp_path_factory.mktemp('ranks')
    with socket.socket() as s: s.bind(('127.0.0.1', 0)); port = s.getsockname()[1]
    ps = [start(W.two_ranks, path, r, port, CONFIGS) for r in (0,1)]
    for p in ps: p.join(120)
    for p in ps: p.kill()
    return [fetched(path/f'rank{r}.pt') for r in (0,1)]

@pytest.mark.parametrize('name', CONFIGS)
def test_two_ranks_end_with_the_same_bytes(ranks, name):
    a,b = (r[name] for r in ranks)
    assert 'error' not in a, a['error']
    assert a['data']!=b['data'] and a['n']==b['n']==10 # each saw its own half: 5 of 10 batches, two epochs
    assert a['each']==b['each'] and len(set(a['each']))==2 # weights and masks after each epoch
    assert (a['weights'],a['masks'])==(b['weights'],b['masks']) and a['history']==b['history'] and len(a['history'])>=2
    assert a['zeros']==b['zeros']==round(.8*SUM) and a['type']=='Sequential'

# ---- mixed precision

@pytest.mark.filterwarnings('ignore:User provided device_type', 'ignore:torch.cuda.amp.GradScaler', 'ignore:.*CUDA is not available')
@pytest.mark.parametrize('verb', ['to_fp16','to_bf16'])
def test_fastai_mixed_precision(learn, verb):
    cb,watch = SparsifyCallback(.8, every=1),Watch()
    getattr(learn, verb)()
    learn.fit(2, 1e-2, cbs=[cb, watch])
    assert cb.step==20 and zeros(learn)==round(.8*SUM) and not watch.bad and watch.seen==sorted(watch.seen)
    learn.fit(1, 1e-2); assert zeros(learn)==round(.8*SUM)

class AMP(MixedPrecision):
    "fastai's, with autocast and scaler of the CPU; counts steps that were made and skipped"
    def __init__(self, dtype=torch.float16, init_scale=2.**24): super().__init__(); self.dtype,self.init_scale,self.made,self.lost = dtype,init_scale,0,0
    def before_fit(self): self.autocast,self.learn.scaler,self.scales = torch.autocast('cpu', self.dtype),torch.amp.GradScaler('cpu', init_scale=self.init_scale, enabled=self.dtype==torch.float16),[]
    def before_step(self):
        try: super().before_step()
        finally: self.lost += self.skipped; self.made += not self.skipped

@pytest.mark.parametrize('regrow', [True, False, 'gradient'])
def test_steps_that_overflow_do_not_count(learn, regrow):
    cb,amp,watch = SparsifyCallback(.8, every=1, regrow=regrow),AMP(),Watch()
    before = W.weights(learn)['1.weight']
    learn.fit(4, 1e-2, cbs=[cb, amp, watch])
    assert amp.lost>=3 and amp.made>=20 and amp.lost+amp.made==40
    assert cb.step==amp.made and zeros(learn)==round(.8*SUM) and not watch.bad
    assert [h[0] for h in cb.history]==sorted({h[0] for h in cb.history}) and cb.history[-1][1]<1
    live = learn.model[1].weight!=0
    assert (learn.model[1].weight[live]!=before[live]).float().mean()>.9 and learn.model[1].weight.isfinite().all()

def test_bf16_on_the_cpu(learn):
    cb,amp,watch = SparsifyCallback(.8, every=1, criterion='taylor'),AMP(torch.bfloat16),Watch()
    learn.fit(2, 1e-2, cbs=[cb, amp, watch])
    assert (amp.made,amp.lost,cb.step)==(20,0,20) and zeros(learn)==round(.8*SUM) and not watch.bad
    assert learn.model[1].weight.dtype==torch.float32

def test_accumulation_and_overflow_together(learn):
    cb,amp,watch = SparsifyCallback(.8, every=1),AMP(),Watch()
    learn.fit(8, 1e-2, cbs=[cb, amp, watch, GradientAccumulation(32)]) # 80 batches, a step after every 2nd
    assert amp.lost>=3 and amp.lost+amp.made==40 and cb.step==amp.made and zeros(learn)==round(.8*SUM) and not watch.bad

def test_old_mixed_precision_is_refused(learn, monkeypatch):
    monkeypatch.setattr(NonNativeMixedPrecision, 'before_fit', lambda self: None) # it asks for CUDA first
    before = W.weights(learn)
    learn.to_non_native_fp16()
    with pytest.raises(ValueError, match=r'to_non_native_fp16 trains a copy of the weights.*learn.to_fp16\(\)'): learn.fit(1, 1e-2, cbs=SparsifyCallback(.8, 'one_shot'))
    assert zeros(learn)<100 and all(torch.equal(p.half(), before[n].half()) for n,p in learn.model.named_parameters())
    learn.to_non_native_fp32(); learn.model.float(); learn.opt = None
    learn.fit(1, 1e-2, cbs=SparsifyCallback(.8))
    assert zeros(learn)==round(.8*SUM)

# ---- killed in mid-epoch, resumed from the last checkpoint in another process

RAMPS = dict(regrow=(dict(sparsity=.9, every=3), 1, 6, (0,3,4)), gone_is_gone=(dict(sparsity=.9, every=3, regrow=False), 1, 6, (0,2,7)),
             rigl=(dict(sparsity=.8, every=3, schedule='one_shot', regrow='gradient', scope='erk'), 1, 6, (0,3,5)),
             movement=(dict(sparsity=.8, every=3, criterion='movement'), 1, 6, (0,3,5)),
             epochs_first=(dict(sparsity=.9, every=3, epochs=6), 2, 3, (0,1,5)), epochs_second=(dict(sparsity=.9, every=3, epochs=6), 2, 3, (1,1,5)),
             steps_first=(dict(sparsity=.9, every=3, start=5, end=45), 2, 3, (0,2,3)), steps_second=(dict(sparsity=.9, every=3, start=5, end=45, regrow=False), 2, 3, (1,1,3)))

def agree(path, kw):
    a,b = fetched(path/'through.pt'),fetched(path/'resumed.pt')
    assert [h[:3] for h in b['history']]==[h[:3] for h in a['history']] and len(a['history'])>(1 if kw.get('schedule') else 5)
    assert [h[3] for h in b['history']]==[h[3] for h in a['history']]
    assert same(a['masks'], b['masks']) and a['zeros']==b['zeros']==round(kw['sparsity']*SUM) and same(a['weights'], b['weights'])

@pytest.mark.parametrize('name', RAMPS)
def test_killed_and_resumed_as_if_nothing_had_happened(run, tmp_path, name):
    kw,fits,n,kill = RAMPS[name]
    assert run(W.through, tmp_path, kw, fits, n)==0
    for f in (tmp_path/'models').iterdir(): f.unlink()
    assert run(W.killed, tmp_path, kw, fits, n, kill)==-9
    assert not (tmp_path/'models'/f'fit{kill[0]}_{kill[1]}.pth').exists() # it died before the end of that epoch
    assert run(W.resumed, tmp_path, kw, fits, n, (kill[0], kill[1]-1))==0
    agree(tmp_path, kw)

@pytest.mark.parametrize('name', ['regrow','steps_second'])
def test_killed_twice(run, tmp_path, name):
    "`start_epoch` makes fastai write the checkpoints of skipped epochs again; the one we came from must not lose its ramp"
    kw,fits,n,(fit,epoch,it) = RAMPS[name]
    assert run(W.through, tmp_path, kw, fits, n)==0
    for f in (tmp_path/'models').iterdir(): f.unlink()
    assert run(W.killed, tmp_path, kw, fits, n, (fit,epoch,it))==-9
    assert run(W.resumed, tmp_path, kw, fits, n, (fit,epoch-1), (fit,epoch,it))==-9
    assert run(W.resumed, tmp_path, kw, fits, n, (fit,epoch-1))==0
    agree(tmp_path, kw)

# ---- files

def body_head(m): return [params(m[:2])+params(m[2:4]), params(m[4:])]

@pytest.mark.parametrize('with_opt', [True, False])
def test_saved_here_held_there(learn, run, tmp_path, with_opt):
    learn.fit(1, 1e-2, cbs=SparsifyCallback(.8))
    file = learn.save('sparse', with_opt=with_opt)
    plain = net(); load_model(file, plain, None, with_opt=False, strict=True)
    state = torch.load(file, weights_only=not with_opt)
    bare = net(); bare.load_state_dict(state['model'] if with_opt else state, strict=True)
    for m in (plain, bare): assert all(torch.equal(a, b) for a,b in zip(m.state_dict().values(), learn.model.state_dict().values()))
    assert run(W.load_and_fit, tmp_path, 'sparse')==0
    out = fetched(tmp_path/'fresh.pt')
    assert out['loaded']==out['zeros']==round(.8*SUM) and same(out['masks'], learn.mask_keeper.masks)
    assert all(torch.equal(out['weights'][n]!=0, learn.model.get_parameter(n)!=0) for n in ('1.weight','3.weight'))
    assert not torch.equal(out['weights']['1.weight'], learn.model[1].weight) and out['keys']==list(net().state_dict())
    assert out['column']==round(.8*SUM)/SUM and 'sparsity' in out['metrics']

def stop_at(n):
    class Stop(Callback):
        run_valid = False
        def after_batch(self):
            if self.train_iter==n: raise KeyboardInterrupt
    return Stop()

@pytest.mark.parametrize('attached', ['during','always','mid_ramp'])
def test_exported_here_loaded_there(learn, run, tmp_path, attached):
    cb = SparsifyCallback(.8, every=2)
    if attached!='during': learn.add_cb(cb)
    if attached=='mid_ramp':
        with pytest.raises(KeyboardInterrupt): learn.fit(2, 1e-2, cbs=stop_at(9))
    else: learn.fit(2, 1e-2, cbs=cb if attached=='during' else None)
    held = zeros(learn)
    assert held==round(.8*SUM) if attached!='mid_ramp' else 0<held<round(.8*SUM)
    with warnings.catch_warnings():
        warnings.simplefilter('ignore'); learn.export('m.pkl')
    assert run(W.load_export, tmp_path, 'm.pkl', 2)==0
    out = fetched(tmp_path/'fresh.pt')
    assert out['loaded']==held and out['keys']==list(net().state_dict()) and ('SparsifyCallback' in out['cbs'])==(attached!='during')
    assert torch.equal(out['pred'], learn.predict(DLS.train_ds.items[0][0])[2])
    assert out['zeros']==round(.8*SUM)
    for n,m in learn.mask_keeper.masks.items(): assert attached=='mid_ramp' or torch.equal(out['masks'][n], m)
    assert len(learn.dls.train_ds)==160
    learn.fit(1, 1e-2); assert zeros(learn)==round(.8*SUM)

def test_a_dense_save_removes_the_stale_companion(learn, tmp_path):
    learn.fit(1, 1e-2, cbs=SparsifyCallback(.8))
    file = learn.save('m'); side = masks_file(file)
    assert side.name=='m.masks.safetensors' and SUM/8<=side.stat().st_size<SUM # a bit a weight
    release_masks(learn); learn.fit(1, 1e-2); learn.save('m')
    assert not side.exists() and file.exists()
    other = learner(tmp_path, 3).load('m'); other.fit(1, 1e-2)
    assert not hasattr(other, 'mask_keeper') and zeros(other)<100

def test_loading_replaces_masks_that_were_held(learn, tmp_path):
    learn.fit(1, 1e-2, cbs=SparsifyCallback(.5, include='1')); learn.save('a'); masks = dict(learn.mask_keeper.masks)
    other = learner(tmp_path, 3); other.fit(1, 1e-2, cbs=SparsifyCallback(.9))
    other.load('a')
    assert same(other.mask_keeper.masks, masks) and [zeros(other, [n]) for n in NAMES]==[round(.5*N['1']), 0]
    other.fit(1, 1e-2)
    assert zeros(other, ['1'])==round(.5*N['1']) and zeros(other, ['3'])<50 and len([c for c in other.cbs if c.name=='mask_keeper'])==1

def test_a_dense_checkpoint_leaves_masks_as_they_are(learn):
    learn.save('dense'); learn.fit(1, 1e-2, cbs=SparsifyCallback(.8)); masks = dict(learn.mask_keeper.masks)
    learn.load('dense')
    learn.fit(1, 1e-2)
    assert zeros(learn)==round(.8*SUM) and all(torch.equal(learn.model.get_parameter(f'{n}.weight')!=0, m) for n,m in masks.items())

def test_the_three_that_compare_epochs_together(learn, capsys):
    class Worse(Callback):
        order,run_train = 49,False
        def after_loss(self): self.learn.loss = self.learn.loss*0 + self.epoch
    cb,save = SparsifyCallback(.8, end=.5, every=3),SaveModelCallback(fname='best')
    learn.fit(10, 1e-2, cbs=[cb, Worse(), save, EarlyStoppingCallback(patience=3), ReduceLROnPlateau(patience=2, factor=10)])
    assert len(learn.recorder.values)==8 # 5 epochs of ramp, the last of which counts as best; then three worse
    assert zeros(learn)==round(.8*SUM) and learn.opt.hypers[-1]['lr']==pytest.approx(1e-3)
    best = torch.load(learn.path/'models'/'best.pth', weights_only=True)
    assert sum(int((best[f'{n}.weight']==0).sum()) for n in NAMES)==round(.8*SUM) and torch.equal(best['1.weight'], learn.model[1].weight)
    learn.fit(1, 1e-2); assert zeros(learn)==round(.8*SUM)

@pytest.mark.parametrize('epochs', [None, 4])
def test_fine_tune_with_a_frozen_body(tmp_path, epochs):
    learn = learner(tmp_path, splitter=body_head)
    cb,watch = SparsifyCallback(.8, every=1, epochs=epochs),Watch()
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter('always'); learn.fine_tune(3, 1e-2, freeze_epochs=1, cbs=[cb, watch])
    assert [('frozen: the ramp waits' in str(w.message)) for w in seen if 'frozen' in str(w.message)] == ([True] if epochs is None else [])
    assert watch.seen==sorted(watch.seen) and len(watch.seen)==40 and zeros(learn)==round(.8*SUM) and not watch.bad
    # without `epochs` the 10 frozen steps cut nothing and the ramp has 3/4 of 30; with it, 3/4 of all 40
    assert (watch.seen[9]<100)==(epochs is None)
    ramp,before = (22.5,10) if epochs is None else (30,0)
    cut = lambda k: round(.8*(1-(1-min(max(k-before, 0)/ramp, 1))**3)*SUM)
    assert [o-watch.seen[0] for o in watch.seen]==[cut(k)-cut(1) for k in range(1, 41)] and watch.seen[-1]==cut(40)
    learn.fit(1, 1e-2); assert zeros(learn)==round(.8*SUM)

def test_interrupted_then_a_checkpoint_then_another_fit(learn):
    cb = SparsifyCallback(.8, every=2)
    with pytest.raises(KeyboardInterrupt): learn.fit(4, 1e-2, cbs=[cb, SaveModelCallback(every_epoch=True, with_opt=True), stop_at(27)])
    late = zeros(learn)
    learn.load('model_1') # written at step 20
    early = zeros(learn)
    assert 0<early<late<round(.8*SUM) and all(torch.equal(w!=0, learn.mask_keeper.masks[n]) for n,w in covered_weights(learn.model, NAMES).items())
    watch = Watch(); learn.fit(1, 1e-2, cbs=watch)
    assert set(watch.seen)=={early} and not watch.bad
    again = SparsifyCallback(.8, every=2)
    learn.fit(2, 1e-2, cbs=again)
    assert zeros(learn)==round(.8*SUM) and n_gone(again.history[0])>=early-1e-6
    learn.fit(1, 1e-2, cbs=cb); assert zeros(learn)==round(.8*SUM)

@pytest.mark.parametrize('again', ['same','new'])
def test_interrupted_and_resumed_in_the_same_session(tmp_path, again):
    kw = dict(sparsity=.8, every=2)
    a = learner(tmp_path); cb = SparsifyCallback(**kw); a.fit(4, 1e-2, cbs=[cb, Order()])
    b = learner(tmp_path)
    with pytest.raises(KeyboardInterrupt): b.fit(4, 1e-2, cbs=[old := SparsifyCallback(**kw), Order(), SaveModelCallback(every_epoch=True, with_opt=True), stop_at(27)])
    b.load('model_1'); new = old if again=='same' else SparsifyCallback(**kw); b.fit(4, 1e-2, cbs=[new, Order()], start_epoch=2)
    assert [h[:3] for h in new.history]==[h[:3] for h in cb.history] and same(W.weights(a), W.weights(b)) and zeros(b)==round(.8*SUM)

# ---- silence

@pytest.mark.parametrize('kw', [{}, dict(regrow='gradient'), dict(criterion='wanda'), dict(criterion='snip', granularity='kernel')])
def test_silent(tmp_path, capsys, kw):
    learn = W.Learner(DLS, net(), path=tmp_path)
    with warnings.catch_warnings(), learn.no_bar(), learn.no_logging():
        warnings.simplefilter('error'); warnings.filterwarnings('ignore', 'numpy.core is deprecated') # fastai's
        learn.fit(2, 1e-2, cbs=SparsifyCallback(.8, **kw)); learn.save('m'); learn.load('m'); learn.fit(1, 1e-2)
    assert capsys.readouterr()==('', '')
    assert column(learn)[-1]==pytest.approx(.8, abs=1e-3) or kw.get('granularity')

# ---- ramps over several fits

def test_a_ramp_in_steps_over_three_fits(learn):
    cb,watch = SparsifyCallback(.8, start=10, end=50, every=5),Watch()
    with pytest.warns(UserWarning, match='the ramp ends at optimizer step 50, this fit at step 20'): learn.fit(2, 1e-2, cbs=[cb, watch])
    with pytest.warns(UserWarning, match='this fit at step 40'): learn.fit(2, 1e-2, cbs=[cb, watch])
    with warnings.catch_warnings():
        warnings.simplefilter('error'); learn.fit(2, 1e-2, cbs=[cb, watch])
    assert [h[0] for h in cb.history]==[*range(10, 51, 5)] and watch.seen==sorted(watch.seen) and not watch.bad
    assert [round(n_gone(h)) for h in cb.history]==[round(.8*(1-(1-(s-10)/40)**3)*SUM) for s in range(10, 51, 5)] # Zhu & Gupta
    assert watch.seen[48]<round(.8*SUM)==watch.seen[49]==zeros(learn) # the target at step 50, no earlier

def test_a_ramp_in_epochs_over_three_fits(learn):
    cb,watch = SparsifyCallback(.8, epochs=6, every=5),Watch()
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        for n in 1,2,3: learn.fit(n, 1e-2, cbs=[cb, watch])
    assert [h[0] for h in cb.history]==[*range(0, 46, 5)] and watch.seen==sorted(watch.seen) and not watch.bad
    for h in cb.history: assert h[1]==pytest.approx(h[0]/60) and round(n_gone(h))==round(.8*(1-(1-min(h[0]/45, 1))**3)*SUM)
    assert watch.seen[43]<round(.8*SUM)==watch.seen[44]==zeros(learn)
    n = len(cb.history); learn.fit(2, 1e-2, cbs=cb); assert len(cb.history)==n and zeros(learn)==round(.8*SUM)

def test_a_ramp_longer_than_all_fits_goes_on_where_it_stopped(learn):
    cb = SparsifyCallback(.8, start=0, end=400, every=4)
    with pytest.warns(UserWarning, match='ends at optimizer step 400, this fit at step 10: it stops on the way'): learn.fit(1, 1e-2, cbs=cb)
    mid = zeros(learn)
    assert mid==round(.8*(1-(1-8/400)**3)*SUM)
    learn.fit(1, 1e-2); assert zeros(learn)==mid
    with pytest.warns(UserWarning, match='this fit at step 20'): learn.fit(1, 1e-2, cbs=cb)
    assert zeros(learn)==round(.8*(1-(1-20/400)**3)*SUM)

# ---- zeros through quantization

def integers(learn):
    "Layer name -> integer weights as the simulation ships them"
    sim = simulation(learn.model)
    return {n: quantize(learn.model.get_submodule(n).weight.detach(), next(sim[k] for k in sim.placement.weights if k.startswith(f'{n}:')).qparams) for n in NAMES}

@pytest.mark.parametrize('bits', [8, 4])
@pytest.mark.parametrize('granularity', ['weight','2:4'])
def test_quantized_weights_have_the_same_zeros(learn, bits, granularity):
    learn.fit(2, 1e-2, cbs=SparsifyCallback(.5, granularity=granularity))
    before = W.weights(learn)
    with learn.no_bar(): learn.quantize(w_bits=bits, n_batches=2)
    for n,q in integers(learn).items():
        gone = before[f'{n}.weight']==0
        assert (q[gone]==0).all() and not torch.equal(q, torch.zeros_like(q)) and q.unique().numel()>4
        assert torch.equal(learn.model.get_submodule(n).weight, before[f'{n}.weight'])
    assert sum(int((q==0).sum()) for q in integers(learn).values())>=round(.5*SUM)
    learn.fit(1, 1e-2) # while the simulation is on
    assert zeros(learn)==round(.5*SUM) and not torch.equal(learn.model[1].weight, before['1.weight'])
    assert all(torch.equal(w!=0, learn.mask_keeper.masks[n]) for n,w in covered_weights(learn.model, NAMES).items())
    assert all((q[~learn.mask_keeper.masks[n]]==0).all() for n,q in integers(learn).items())
    learn.dequantize(); learn.fit(1, 1e-2); assert zeros(learn)==round(.5*SUM)

@pytest.mark.parametrize('first', ['sparsify','ptq'])
def test_ptq_in_the_same_fit(learn, first):
    cbs = [SparsifyCallback(.8), PTQCallback(n_batches=2)]
    learn.fit(2, 1e-2, cbs=cbs if first=='sparsify' else cbs[::-1])
    assert zeros(learn)==round(.8*SUM) and simulation(learn.model).calibrated
    got = integers(learn)
    assert all((q[~learn.mask_keeper.masks[n]]==0).all() and (q!=0).any() for n,q in got.items()) and sum(int((q==0).sum()) for q in got.values())>=round(.8*SUM)

def test_a_sparse_fit_of_a_quantized_model(learn):
    learn.fit(1, 1e-2)
    with learn.no_bar(): learn.quantize(n_batches=2)
    learn.fit(2, 1e-2, cbs=SparsifyCallback(.8))
    assert zeros(learn)==round(.8*SUM) and all((q[~learn.mask_keeper.masks[n]]==0).all() for n,q in integers(learn).items())

def test_lr_find_leaves_no_companion_behind(learn):
    learn.fit(1, 1e-3, cbs=SparsifyCallback(.8))
    learn.lr_find(num_it=10, show_plot=False)
    assert not list((learn.path/learn.model_dir).glob('*'))

def test_masks_of_another_architecture_are_not_held(learn, tmp_path):
    learn.fit(1, 1e-3, cbs=SparsifyCallback(.8)); learn.save('sparse')
    other = learner(tmp_path, model=nn.Sequential(*[l for l in net()][:3], nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16,10)))
    with pytest.warns(UserWarning, match='holds masks for other layers.*3'): other.load('sparse', strict=False, with_opt=False)
    assert torch.equal(other.model[1].weight, learn.model[1].weight) and not hasattr(other, 'mask_keeper')
