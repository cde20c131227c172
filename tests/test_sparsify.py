"SparsifyCallback and MaskKeeper through every verb of a Learner"
import pickle, random, warnings
from functools import partial
import numpy as np, pytest, torch
from torch import nn
from fastai.callback.core import CancelBatchException, CancelFitException, CancelStepException
from fastai.callback.schedule import fine_tune, fit_one_cycle, lr_find
from fastai.callback.tracker import EarlyStoppingCallback, ReduceLROnPlateau, SaveModelCallback
from fastai.callback.training import GradientAccumulation, GradientClip
from fastai.learner import Callback, Learner, load_learner
from fastai.metrics import accuracy
from fastai.optimizer import Adam, OptimWrapper, RMSProp, SGD, ranger
from fastai.torch_core import params, set_seed

from fastcompress.callback.hold import hold_masks, release_masks
from fastcompress.callback.sparsify import SparsifyCallback, default_every
from fastcompress.data import digits
from fastcompress.prune.mask import covered_layers, covered_weights, sparsity_of

DLS = digits(n=200, size=8, bs=16) # 160 to train on: 10 batches
NAMES = ['1','3'] # what is covered by default in `net`

def net(): return nn.Sequential(nn.Conv2d(3,8,3,2,1), nn.Conv2d(8,16,3,1,1), nn.BatchNorm2d(16), nn.Conv2d(16,16,3,1,1), nn.ReLU(),
                                nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16,10))
N = {'1': 8*16*9, '3': 16*16*9}
SUM = sum(N.values())

def learner(tmp_path, seed=0, **kwargs):
    set_seed(seed); DLS.train.rng = random.Random(seed)
    learn = Learner(DLS, kwargs.pop('model', None) or net(), metrics=accuracy, path=tmp_path, **kwargs)
    learn.remove_cb(learn.progress); learn.logger = lambda o: None
    return learn

pytestmark = pytest.mark.usefixtures('one_thread')

@pytest.fixture
def learn(tmp_path): return learner(tmp_path)

def zeros(learn, names=NAMES): return sum(int((w==0).sum()) for w in covered_weights(learn.model, names).values())
def column(learn): return [v[learn.recorder.metric_names.index('sparsity')-1] for v in learn.recorder.values]
def snapshot(learn): return {k:v.clone() for k,v in learn.model.state_dict().items()}
def same(learn, before): return all(torch.equal(v.view(torch.int32) if v.dtype==torch.float32 else v, before[k].view(torch.int32) if v.dtype==torch.float32 else before[k])
                                    for k,v in learn.model.state_dict().items())
def states(learn):
    opt = learn.opt
    while hasattr(opt, 'opt'): opt = opt.opt
    return opt.state

class Spy(Callback):
    "What weight, gradient and optimizer state look like where the masks are False"
    order,run_valid = 101,False
    def __init__(self): self.bad,self.seen = [],0
    def _where(self): return [(n, w, ~self.learn.mask_keeper.masks[n]) for n,w in covered_weights(self.model, NAMES).items()]
    def after_backward(self): self.bad += [('grad', n) for n,w,gone in self._where() if w.grad[gone].any()]
    def after_step(self):
        for n,w,gone in self._where():
            self.seen += int(gone.sum())
            if w[gone].any(): self.bad.append(('weight', n))
            for k,s in (states(self.learn).get(w) or {}).items():
                if torch.is_tensor(s) and s.shape==w.shape and s[gone].any(): self.bad.append((k, n))

OPTS = dict(sgd=partial(SGD, mom=.9, wd=.01), sgd_l2=partial(SGD, mom=.9, wd=.01, decouple_wd=False), adam=partial(Adam, wd=.1), adam_l2=partial(Adam, wd=.1, decouple_wd=False),
            rmsprop=partial(RMSProp, mom=.9, wd=.01), torch_adamw=partial(OptimWrapper, opt=torch.optim.AdamW), torch_sgd=partial(OptimWrapper, opt=partial(torch.optim.SGD, momentum=.9)))

@pytest.mark.parametrize('scope', ['global','local'])
@pytest.mark.parametrize('s', [.5, .9, .777])
def test_target_is_exact(learn, scope, s):
    cb = SparsifyCallback(s, scope=scope)
    learn.fit(2, 1e-3, cbs=cb)
    if scope=='global': assert zeros(learn) == round(s*SUM)
    else: assert [zeros(learn, [n]) for n in NAMES] == [round(s*N[n]) for n in NAMES]
    assert column(learn)[-1] == pytest.approx(s, abs=1/SUM+1e-6 if scope=='global' else 1/N['1'])
    assert cb.obtained == {g: pytest.approx(s, abs=1/N['1']) for g in cb.requested} and set(cb.requested.values()) == {s}
    assert sparsity_of(learn.model, ['0','7']) == 0

@pytest.mark.parametrize('schedule', ['zhu_gupta','linear','cosine','one_shot', lambda p: p**2])
def test_history_follows_the_schedule(learn, schedule):
    from fastcompress.prune.schedule import sparsity_at
    cb = SparsifyCallback(.8, schedule, start=.1, end=.6, every=2)
    learn.fit(3, 1e-3, cbs=cb) # 30 steps
    assert cb.step == 30
    assert [h[0] for h in cb.history] == ([3] if schedule=="one_shot" else [*range(3,18,2), 18])
    for step,pos,target,per_layer in cb.history:
        assert pos == pytest.approx(step/30)
        assert target == pytest.approx(sparsity_at(schedule, pos, .1, .6, 0, .8))
        assert sum(per_layer[n]*N[n] for n in NAMES) == pytest.approx(round(target*SUM))

def test_default_every_bounds_the_updates(learn):
    cb = SparsifyCallback(.8)
    learn.fit(8, 1e-3, cbs=cb) # a ramp of 60 steps
    assert 8 <= len(cb.history) <= 10 and cb._every == 8 and zeros(learn) == round(.8*SUM)

@pytest.mark.parametrize('n', [1, 7.5, 8, 60, 79, 81, 320, 321, 5000])
def test_default_every(n):
    e = default_every(n)
    assert e >= 1 and n/e <= 32 and (n < 8 or n/e > 7) and (e >= 10 or n < 80)

def test_cooldown_false_stretches_the_ramp(learn):
    cb = SparsifyCallback(.8, cooldown=False, every=1)
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        learn.fit(2, 1e-3, cbs=cb)
    assert cb.history[-1][:2] == (20, 1.) and cb.history[-2][2] < .8 and zeros(learn) == round(.8*SUM)

@pytest.mark.parametrize('opt', OPTS)
def test_weight_gradient_and_state_are_held(tmp_path, opt):
    learn,spy = learner(tmp_path, opt_func=OPTS[opt]),Spy()
    learn.fit(2, 1e-2, cbs=[SparsifyCallback(.8, every=2), spy])
    assert spy.seen and not spy.bad
    live = covered_weights(learn.model, NAMES)['3']
    assert zeros(learn) == round(.8*SUM)
    spy.bad,spy.seen = [],0
    learn.fit(2, 1e-2, wd=.1, cbs=spy)
    assert spy.seen and not spy.bad and zeros(learn) == round(.8*SUM)

@pytest.mark.parametrize('opt', [ranger, partial(OptimWrapper, opt=torch.optim.Adafactor)])
def test_optimizers_that_move_zeros_are_held_too(tmp_path, opt):
    learn,spy = learner(tmp_path, opt_func=opt),Spy()
    learn.fit(2, 1e-2, cbs=[SparsifyCallback(.8, every=2), spy])
    assert spy.seen and not [b for b in spy.bad if b[0] in ('weight','grad')] and zeros(learn) == round(.8*SUM)

def test_live_weights_go_on_training(learn):
    learn.fit(1, 1e-2, cbs=SparsifyCallback(.8))
    w = learn.model[3].weight; before,alive = w.detach().clone(), (w!=0)
    learn.fit(1, 1e-2)
    assert (w[alive]!=before[alive]).float().mean() > .9

def test_second_fit_keeps_zeros_and_shows_them(learn):
    learn.fit(1, 1e-2, cbs=SparsifyCallback(.8))
    pattern = learn.model[3].weight==0
    learn.fit_one_cycle(2, 1e-2)
    assert torch.equal(learn.model[3].weight==0, pattern) and column(learn) == [zeros(learn)/SUM]*2
    names,rec = learn.recorder.metric_names,learn.recorder.values[-1]
    assert list(names) == ['epoch','train_loss','valid_loss','accuracy','sparsity','time'] and len(rec) == 4

def test_column_with_train_metrics_and_without_time(learn):
    learn.recorder.train_metrics,learn.recorder.add_time = True,False
    learn.fit(1, 1e-2, cbs=SparsifyCallback(.8))
    assert learn.recorder.metric_names[-1]=='sparsity' and len(learn.recorder.values[-1]) == len(learn.recorder.metric_names)-1
    assert column(learn) == [zeros(learn)/SUM]

def test_release(learn):
    learn.fit(1, 1e-2, cbs=SparsifyCallback(.8))
    masks = release_masks(learn)
    assert not hasattr(learn, 'mask_keeper') and not hasattr(learn, 'sparsity_column') and set(masks) == set(NAMES)
    learn.fit(1, 1e-2)
    assert zeros(learn) < 100 and 'sparsity' not in learn.recorder.metric_names
    hold_masks(learn, masks)
    assert zeros(learn) == round(.8*SUM)

# ---- verbs

@pytest.mark.parametrize('where', ['callback','keeper','both'])
@pytest.mark.parametrize('opt', ['adam','torch_adamw'])
def test_lr_find_changes_nothing(tmp_path, where, opt):
    learn,cb = learner(tmp_path, opt_func=OPTS[opt]),SparsifyCallback(.8, every=1)
    if where!='callback': learn.fit(1, 1e-3, cbs=SparsifyCallback(.6))
    else: learn.fit(1, 1e-3)
    if where!='keeper': learn.add_cb(cb)
    before,masks = snapshot(learn),{n:m.clone() for n,m in learn.mask_keeper.masks.items()} if where!='callback' else {}
    state = pickle.loads(pickle.dumps([states(learn)[w] for w in covered_weights(learn.model, NAMES).values()]))
    spy = Spy()
    if where!='callback': learn.add_cb(spy)
    learn.lr_find(num_it=15, show_plot=False)
    assert same(learn, before) and not cb.history and cb.step==0 and not spy.bad
    for a,w in zip(state, covered_weights(learn.model, NAMES).values()):
        b = states(learn)[w]
        for k in a: assert torch.equal(a[k], b[k]) if torch.is_tensor(a[k]) else a[k]==b[k]
    if where!='callback': assert all(torch.equal(m, masks[n]) for n,m in learn.mask_keeper.masks.items())
    if where!='keeper':
        learn.fit(1, 1e-3)
        assert zeros(learn) == round(.8*SUM)

def body_head(m): return [params(m[:2])+params(m[2:4]), params(m[4:])]

def test_fine_tune_never_falls_and_cuts_once(tmp_path):
    learn = learner(tmp_path, splitter=body_head)
    cb,seen = SparsifyCallback(.9, every=1),[]
    class Watch(Callback):
        order,run_valid = 101,False
        def after_step(self): seen.append(zeros(self.learn))
    learn.fine_tune(3, freeze_epochs=1, cbs=[cb, Watch()])
    assert seen == sorted(seen) and seen[-1] == round(.9*SUM) and len(seen) == 40
    n = len(cb.history)
    learn.fit(1, cbs=cb)
    assert len(cb.history) == n and zeros(learn) == round(.9*SUM)

def test_next_callback_starts_from_what_is_held(learn):
    learn.fit(1, 1e-3, cbs=SparsifyCallback(.5))
    cb = SparsifyCallback(.8, every=1)
    learn.fit(1, 1e-3, cbs=cb)
    assert all(sum(h[3][n]*N[n] for n in NAMES) >= round(.5*SUM)-1e-6 for h in cb.history) and zeros(learn) == round(.8*SUM)
    assert cb.history[0][2] == pytest.approx(.5, abs=1/SUM)
    with pytest.warns(UserWarning, match='already and never falls'): learn.fit(1, 1e-3, cbs=SparsifyCallback(.3))
    assert zeros(learn) == round(.8*SUM)

def test_a_schedule_that_falls_does_not_bring_weights_back(learn):
    cb = SparsifyCallback(.8, lambda p: .9-.5*p, every=1)
    learn.fit(1, 1e-3, cbs=cb)
    gone = [sum(h[3][n]*N[n] for n in NAMES) for h in cb.history]
    assert gone == sorted(gone) and zeros(learn) == round(.8*SUM)

@pytest.mark.parametrize('regrow', [True, False])
def test_zeros_are_positive_zeros(learn, regrow):
    learn.fit(1, 1e-3, cbs=[SparsifyCallback(.8, regrow=regrow, end=.3), Peek()])
    assert Peek.bits == {0}

class Peek(Callback):
    "Bit patterns of the zeros while the fit is running"
    order,run_valid,bits = 101,False,set()
    def after_step(self):
        for w in covered_weights(self.model, NAMES).values(): Peek.bits |= set(w.detach()[w==0].view(torch.int32).tolist())

def test_two_callbacks_cover_different_layers(learn):
    learn.fit(1, 1e-3, cbs=SparsifyCallback(.5, include='1'))
    learn.fit(1, 1e-3, cbs=SparsifyCallback(.8, include='3'))
    assert [zeros(learn, [n]) for n in NAMES] == [round(.5*N['1']), round(.8*N['3'])]
    assert column(learn)[-1] == (round(.5*N['1'])+round(.8*N['3']))/SUM

def test_gradient_accumulation_counts_steps(learn):
    cb,spy = SparsifyCallback(.8, every=1),Spy()
    learn.fit(2, 1e-3, cbs=[cb, spy, GradientAccumulation(64), GradientClip(1.)]) # 20 batches, a step after every 4th
    assert cb.step == 5 and zeros(learn) == round(.8*SUM) and not spy.bad
    assert [(h[0], round(h[1]*20)) for h in cb.history] == [(0,0),(1,4),(2,8),(3,12),(4,16)]

def test_accumulation_that_never_steps_still_ends_at_target(learn):
    cb = SparsifyCallback(.8, every=1)
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        learn.fit(1, 1e-3, cbs=[cb, GradientAccumulation(10**6)])
    assert cb.step == 0 and zeros(learn) == round(.8*SUM)

class Skip(Callback):
    "AMP's way of skipping a step: the event order of fastai's MixedPrecision"
    run_valid = False
    def __init__(self, when, order=10): self.when,self.order,self.i = when,order,-1
    def before_step(self):
        self.i += 1
        if self.i in self.when: raise CancelStepException()

@pytest.mark.parametrize('order', [10, 80])
def test_skipped_steps_do_not_count(learn, order):
    cb = SparsifyCallback(.8, every=1)
    learn.fit(2, 1e-3, cbs=[cb, Skip({0,1,2,9,19}, order)])
    assert cb.step == 15 and zeros(learn) == round(.8*SUM)
    batches = [b for b in range(1,21) if b-1 not in {0,1,2,9,19}] # after which a step was made
    assert [h[:2] for h in cb.history] == [(0,0.)] + [(k, pytest.approx(k/(k+20-b))) for k,b in enumerate(batches, 1)][:len(cb.history)-1]
    assert cb.history[-1][2] == .8 and cb.history[-2][1] < .75 <= cb.history[-1][1]

def test_bf16_autocast(tmp_path):
    class Auto(Callback):
        order,run_valid = 10,False
        def before_batch(self): self.ctx = torch.autocast('cpu', torch.bfloat16); self.ctx.__enter__()
        def after_pred(self): self.learn.pred = self.pred.float()
        def after_loss(self): self.ctx.__exit__(None, None, None)
    learn,spy = learner(tmp_path),Spy()
    learn.fit(1, 1e-3, cbs=[SparsifyCallback(.8, every=1), Auto(), spy])
    assert zeros(learn) == round(.8*SUM) and not spy.bad

# ---- callbacks that compare epochs, stop and reload

class Worse(Callback):
    "Epochs get worse and worse: the first, dense one is the best"
    order,run_train = 49,False
    def after_loss(self): self.learn.loss = self.learn.loss*0 + self.epoch

def test_save_model_reload_keeps_the_target(learn, capsys):
    learn.fit(4, 1e-3, cbs=[SparsifyCallback(.8), Worse(), SaveModelCallback()])
    assert zeros(learn) == round(.8*SUM)
    saved = torch.load(learn.path/'models'/'model.pth', weights_only=True)
    assert sum(int((saved[f'{n}.weight']==0).sum()) for n in NAMES) == round(.8*SUM) # the epoch that was chosen had reached the target

def test_reload_of_a_dense_epoch_is_masked_again(learn):
    class Dense(Callback):
        order = 61 # as SaveModelCallback
        def before_fit(self): self.learn.save('dense')
        def after_fit(self): self.learn.load('dense', with_opt=False)
    learn.fit(2, 1e-3, cbs=[SparsifyCallback(.8), Dense()])
    masks = learn.mask_keeper.masks
    assert zeros(learn) == round(.8*SUM) and all(torch.equal(w!=0, masks[n]) for n,w in covered_weights(learn.model, NAMES).items())
    learn.load('dense', with_opt=False)
    learn.fit(1, 1e-3)
    assert zeros(learn) == round(.8*SUM)

def test_early_stopping_waits_for_the_ramp(learn, capsys):
    cb = SparsifyCallback(.8, end=.5, every=3)
    learn.fit(8, 1e-3, cbs=[cb, Worse(), EarlyStoppingCallback(patience=1), ReduceLROnPlateau(patience=1)])
    assert len(learn.recorder.values) == 5 and zeros(learn) == round(.8*SUM) # 4 epochs of ramp, the first after it is worse

def test_a_fit_stopped_in_mid_ramp_is_brought_to_target(learn):
    class Stop(Callback):
        def after_batch(self):
            if self.training and self.train_iter==12: raise CancelFitException()
    cb = SparsifyCallback(.8)
    with pytest.warns(UserWarning, match='before the end of the ramp'): learn.fit(4, 1e-3, cbs=[cb, Stop()])
    assert zeros(learn) == round(.8*SUM) and cb.history[-1][2] == .8 and cb.history[-2][2] < .8

@pytest.mark.parametrize('event', ['before_batch','after_pred','after_backward','before_step','after_step','after_batch'])
def test_exception_in_mid_fit_leaves_a_usable_model(learn, event):
    class Boom(Callback):
        run_valid = False
    def boom(self):
        if self.train_iter==8: raise KeyboardInterrupt
    setattr(Boom, event, boom)
    cb = SparsifyCallback(.8, every=1)
    with pytest.raises(KeyboardInterrupt): learn.fit(2, 1e-2, cbs=[cb, Boom()])
    learn.opt.zero_grad()
    some = zeros(learn); masks = learn.mask_keeper.masks
    assert 0 < some < round(.8*SUM) and all(torch.equal(w!=0, masks[n]) for n,w in covered_weights(learn.model, NAMES).items())
    assert not any(isinstance(c, SparsifyCallback) for c in learn.cbs)
    learn.validate(); assert zeros(learn) == some
    learn.fit(1, 1e-2); assert zeros(learn) == some
    learn.fit(1, 1e-2, cbs=cb); assert zeros(learn) == round(.8*SUM)

@pytest.mark.parametrize('attached', [True, False])
def test_validate_and_predictions_change_nothing(learn, attached):
    cb = SparsifyCallback(.8, 'one_shot')
    if attached: learn.add_cb(cb)
    else: learn.fit(1, 1e-3, cbs=cb)
    before,n = snapshot(learn),len(cb.history)
    res = learn.validate()
    assert len(res) == 2
    learn.get_preds(); learn.predict(DLS.train_ds.items[0][0])
    assert same(learn, before) and len(cb.history) == n
    if attached:
        learn.fit(1, 1e-3)
        assert zeros(learn) == round(.8*SUM)

# ---- files

def reload(learn, name):
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        learn.export(name); out = load_learner(learn.path/name)
    out.logger = lambda o: None
    return out

@pytest.mark.parametrize('attached', [True, False])
def test_export_and_load_learner(learn, attached):
    cb = SparsifyCallback(.8)
    if attached: learn.add_cb(cb); learn.fit(1, 1e-3)
    else: learn.fit(1, 1e-3, cbs=cb)
    keys = set(learn.model.state_dict())
    out = reload(learn, 'x.pkl')
    assert len(learn.dls.train_ds) == 160
    im = DLS.train_ds.items[0][0]
    assert torch.equal(out.predict(im)[2], learn.predict(im)[2])
    assert type(out.model) is nn.Sequential and set(out.model.state_dict()) == keys == set(net().state_dict())
    assert all(torch.equal(m, learn.mask_keeper.masks[n]) for n,m in out.mask_keeper.masks.items())
    out.dls = DLS; out.create_opt(); out.fit(1, 1e-2)
    assert zeros(out) == round(.8*SUM) and column(out)[-1] == round(.8*SUM)/SUM
    learn.fit(1, 1e-2)
    assert zeros(learn) == round(.8*SUM)

def test_export_before_any_fit(learn):
    learn.add_cb(SparsifyCallback(.8))
    out = reload(learn, 'x.pkl'); out.dls = DLS; out.create_opt()
    out.fit(1, 1e-3)
    assert zeros(out) == round(.8*SUM)

def test_save_and_load(learn, tmp_path):
    learn.fit(1, 1e-3, cbs=SparsifyCallback(.8))
    learn.save('sparse'); before = snapshot(learn)
    learn.fit(1, 1e-2); learn.load('sparse')
    assert same(learn, before)
    learn.fit(1, 1e-2)
    assert zeros(learn) == round(.8*SUM)
    other = learner(tmp_path, seed=5); other.load('sparse')
    assert same(other, before)
    hold_masks(other); other.fit(1, 1e-2)
    assert zeros(other) == round(.8*SUM)

def test_nothing_is_left_on_the_model(learn):
    learn.fit(1, 1e-3, cbs=SparsifyCallback(.8))
    m = learn.model
    assert set(m.state_dict()) == set(net().state_dict())
    assert not any(o._forward_hooks or o._forward_pre_hooks or o._backward_hooks or o._backward_pre_hooks for o in m.modules())
    assert not any(p._backward_hooks for p in m.parameters()) and not any(hasattr(o, 'parametrizations') for o in m.modules())
    assert [type(o) for o in m.modules()] == [type(o) for o in net().modules()]

# ---- regrow

def grow_back(tmp_path, regrow):
    "Cut half of a layer, then shrink what lives below what was cut, then cut a little more"
    learn,log = learner(tmp_path),{}
    class Shrink(Callback):
        order,run_valid = 102,False
        def after_step(self):
            w,m = self.model[3].weight,self.learn.mask_keeper.masks['3']
            log[self.train_iter] = m.clone()
            if self.train_iter==2: log['cut'] = ~m; w.data[m] = 1e-6*torch.sign(w.data[m])
    cut = [0.,.5,.5,.5,.6,.6,.6,.6,.6,.6]
    cb = SparsifyCallback(.6, lambda p: {0:0,1:.5/.6}.get(int(p*10>=1), 1.), include='3', every=1, end=.5, regrow=regrow)
    learn.fit(1, 0., wd=0., cbs=[cb, Shrink()])
    return learn, log['cut'], log[9]

def test_regrow_brings_back_what_was_set_aside(tmp_path):
    learn,cut,final = grow_back(tmp_path, True)
    w = learn.model[3].weight
    assert cut.sum() == round(.5*N['3']) and (~final).sum() == round(.6*N['3'])
    assert (cut & final).sum() > .3*N['3'] and (w[cut & final].abs()>1e-5).all() # they return with their old values

def test_without_regrow_gone_is_gone(tmp_path):
    learn,cut,final = grow_back(tmp_path, False)
    assert cut.sum() == round(.5*N['3']) and (~final).sum() == round(.6*N['3']) and not (cut & final).any()

# ---- what is asked for

def test_dictionary_of_sparsities(learn):
    cb = SparsifyCallback({'*': .5, '3': .9, '7': .2}, exclude='0')
    learn.fit(1, 1e-3, cbs=cb)
    assert [zeros(learn, [n]) for n in ['0','1','3','7']] == [0, round(.5*N['1']), round(.9*N['3']), round(.2*160)]
    assert cb.requested == {'1': .5, '3': .9, '7': .2} and cb.obtained['7'] == .2

@pytest.mark.parametrize('s', [0, 1])
def test_extremes(learn, s):
    learn.fit(1, 1e-3, cbs=SparsifyCallback(s))
    assert zeros(learn) == s*SUM

def test_criteria_by_name_and_as_callable(learn):
    learn.fit(1, 1e-3, cbs=SparsifyCallback(.8, criterion='random', include='1'))
    learn.fit(1, 1e-3, cbs=SparsifyCallback(.8, criterion=lambda w: -w.abs(), include='3', schedule='one_shot', start=.74))
    assert [zeros(learn, [n]) for n in NAMES] == [round(.8*N[n]) for n in NAMES]

@pytest.mark.parametrize('kwargs,words', [
    (dict(sparsity=90), 'Percent\\? Type 0.9'), (dict(sparsity='much'), 'a number from 0 to 1'), (dict(sparsity={}), 'names no layer'),
    (dict(sparsity={'1': 50}), 'Type 0.5'), (dict(schedule='zhu'), "no schedule 'zhu'"), (dict(criterion='magnitud'), "Nearest: 'magnitude'"),
    (dict(scope='globl'), "Nearest: 'global'"), (dict(granularity='weights'), "Nearest: 'weight'"), (dict(granularity='4:2'), '0 < n < m'), (dict(granularity='2:4', sparsity=.6), 'removes at most 0.5'),
    (dict(start=.5, end=.5), 'must end after it starts'), (dict(end=75.), 'Type 0.75'), (dict(start=.1, end=75), 'both as'), (dict(end=75, epochs=3), 'not with optimizer steps'), (dict(end=75, cooldown=False), 'Leave one'), (dict(swap=30), 'Type 0.3'), (dict(every=0), '1 or more'), (dict(every=1.5), '1 or more')])
def test_errors_at_construction(kwargs, words):
    with pytest.raises(ValueError, match=words): SparsifyCallback(**{**dict(sparsity=.5), **kwargs})

@pytest.mark.parametrize('kwargs,words', [
    (dict(include='conv*'), "no layer matches 'conv\\*'"), (dict(exclude='33'), "no layer matches '33'. Nearest: '3'"),
    (dict(sparsity={'1': .5, '33': .5}), "no layer matches '33'. Nearest: '3'"), (dict(include='1', exclude='1'), 'leaves none')])
def test_errors_before_any_weight_changes(learn, kwargs, words):
    before = snapshot(learn)
    with pytest.raises(ValueError, match=words): learn.fit(1, 1e-3, cbs=SparsifyCallback(**{**dict(sparsity=.5, schedule='one_shot'), **kwargs}))
    assert same(learn, before)
    learn.fit(1, 1e-3); assert zeros(learn) < 100

def test_nan_weights_are_refused_and_nothing_is_cut(learn):
    learn.model[3].weight.data[0] = float('nan')
    with pytest.raises(ValueError, match="layer '3' has NaN"): learn.fit(1, 1e-3, cbs=SparsifyCallback(.5, 'one_shot'))
    assert zeros(learn) < 10

def test_replaced_layers_are_named(learn):
    learn.fit(1, 1e-3, cbs=SparsifyCallback(.5))
    learn.model[3] = nn.Conv2d(16,24,3); learn.model[7] = nn.Linear(24,10); learn.opt = None
    with pytest.raises(ValueError, match="layer '3'.*release_masks"): learn.fit(1, 1e-3)
    release_masks(learn); learn.fit(1, 1e-3)

# ---- shapes, criteria, growth

from fastai.callback.schedule import SchedCos, SchedLin, combine_scheds
from fastcompress.prune.mask import covered_modules, n_pieces, prunable
from fastcompress.prune.score import criteria, needs

@pytest.mark.parametrize('name', [n for n,f in criteria.items()])
def test_every_criterion_ends_at_its_target(learn, name):
    spy,channels = Spy(),name in ('bn_scale','fpgm','apoz','mean_activation')
    model = nn.Sequential(*[l for c in [nn.Conv2d(3,8,3,2,1), nn.Conv2d(8,16,3,1,1), nn.Conv2d(16,16,3,1,1)] for l in (c, nn.BatchNorm2d(c.out_channels), nn.ReLU())],
                          nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16,10))
    learn.model = model; learn.create_opt()
    before = model[1].num_batches_tracked.clone()
    cb = SparsifyCallback(.5, criterion=name, granularity='channel' if channels else 'weight', every=3)
    learn.fit(1, 1e-2, cbs=cb)
    ws = covered_weights(model, ['3','6'])
    gone = sum(int((w.flatten(1)==0).all(1).sum()) for w in ws.values()) if channels else sum(int((w==0).sum()) for w in ws.values())
    assert gone == (16 if channels else round(.5*(8*16*9+16*16*9)))
    assert model[1].num_batches_tracked-before == 10 # asking the network is not training it

def test_a_fit_that_asks_the_network_draws_the_same_batches(tmp_path):
    seen = []
    class Watch(Callback):
        run_valid = False
        def before_batch(self): seen[-1].append((self.yb[0].tolist(), torch.initial_seed(), random.random()))
    for criterion in 'magnitude','wanda':
        seen.append([]); learn = learner(tmp_path)
        learn.fit(1, 1e-3, cbs=[SparsifyCallback(.5, criterion=criterion, every=2), Watch()])
    assert seen[0] == seen[1]

@pytest.mark.parametrize('g', ['row','column','kernel','channel','input','4x4','1x16','2:4'])
@pytest.mark.parametrize('regrow', [True, False])
def test_every_granularity_ends_at_its_target(learn, g, regrow):
    cb = SparsifyCallback(.5, granularity=g, every=2, regrow=regrow)
    learn.fit(1, 1e-2, cbs=cb)
    ws,ms = covered_weights(learn.model, NAMES),covered_modules(learn.model, NAMES)
    n = n_pieces(ws, ms, g)
    assert cb.obtained == {'all covered layers': round(.5*sum(n.values()))/sum(n.values())}
    assert zeros(learn) == sum(int((~m).sum()) for m in learn.mask_keeper.masks.values())
    if g=='2:4': assert all((w.reshape(w.shape[0],-1,4,3,3)==0).sum(2).eq(2).all() for w in ws.values())

def test_growing_keeps_the_count_and_moves_the_pattern(tmp_path):
    learn,patterns = learner(tmp_path),[]
    class Watch(Callback):
        order,run_valid = 102,False
        def after_step(self): patterns.append({n: m.clone() for n,m in self.learn.mask_keeper.masks.items()})
    spy = Spy()
    learn.fit(3, 1e-2, cbs=[SparsifyCallback(.8, 'one_shot', regrow='gradient', scope='local', every=3), Watch(), spy])
    assert all(int((~p[n]).sum())==round(.8*N[n]) for p in patterns for n in NAMES) and not spy.bad
    moved = [int((a['3'] & ~b['3']).sum()) for a,b in zip(patterns[1:], patterns)]
    assert moved[1] > moved[16] > 0 and not any(moved[23:]) # falls to nothing at three quarters
    live = N['3']-round(.8*N['3'])
    assert max(moved) <= round(.3*live)

def test_grown_weights_are_those_of_largest_gradient(tmp_path):
    learn,log = learner(tmp_path),{}
    class Before(Callback):
        order,run_valid = 55,False
        def after_backward(self):
            if self.train_iter==2: log['grad'] = self.model[3].weight.grad.clone() # before the mask
            if self.train_iter==2: log['was'] = self.learn.mask_keeper.masks['3'].clone()
    class After(Callback):
        order,run_valid = 102,False
        def after_step(self):
            if self.train_iter==2: log['now'],log['w'] = self.learn.mask_keeper.masks['3'].clone(),self.model[3].weight.detach().clone()
    learn.fit(1, 1e-2, cbs=[SparsifyCallback(.8, 'one_shot', regrow='gradient', scope='local', every=3), Before(), After()])
    grown = log['now'] & ~log['was']
    stayed_out = ~log['now'] & ~log['was']
    assert grown.any() and log['grad'][grown].abs().min() >= log['grad'][stayed_out].abs().max()
    assert not log['w'][grown].any() # from zero

def test_dsd_lets_go_and_starts_from_zero(learn):
    log = []
    class Watch(Callback):
        order,run_valid = 102,False
        def after_step(self): log.append(zeros(self.learn))
    cb = SparsifyCallback(.6, 'dsd', every=1, end=.9)
    learn.fit(3, 1e-2, cbs=[cb, Watch()])
    free = next(i for i,(a,b) in enumerate(zip(log, log[1:])) if b<a)
    assert max(log) == round(.6*SUM) == log[free] and log[-1] < .05*SUM and cb.history[-1][2] == 0
    assert not learn.mask_keeper.gone['3']

@pytest.mark.parametrize('sched', [combine_scheds([.4,.6], [SchedCos(0,.5), SchedLin(.5,1)]), SchedCos(0,1)])
def test_fastai_schedules(learn, sched):
    cb = SparsifyCallback(.8, sched, every=1)
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        learn.fit(2, 1e-3, cbs=cb)
    assert zeros(learn) == round(.8*SUM)
    for step,pos,target,_ in cb.history[:-1]: assert target == pytest.approx(.8*sched(pos/.75))

@pytest.mark.parametrize('criterion', ['taylor','gradient','snip','movement'])
def test_gradients_of_frozen_layers_are_measured(tmp_path, criterion):
    learn = learner(tmp_path, splitter=lambda m: [params(m[:2]), params(m[2:])]); learn.freeze()
    learn.fit(1, 1e-3, cbs=SparsifyCallback(.5, criterion=criterion, scope='local', every=3))
    assert [zeros(learn, [n]) for n in NAMES] == [round(.5*N[n]) for n in NAMES]
    assert not learn.model[1].weight.requires_grad

def test_waiting_is_said_once_and_epochs_overrule_it(tmp_path):
    learn = learner(tmp_path, splitter=lambda m: [params(m[:4]), params(m[4:])]); learn.freeze()
    cb = SparsifyCallback(.8)
    with pytest.warns(UserWarning, match='all 2 covered layers are frozen'): learn.fit(1, 1e-3, cbs=cb)
    assert zeros(learn) == 0 and cb.step == 0
    with warnings.catch_warnings():
        warnings.simplefilter('error'); learn.fit(1, 1e-3, cbs=cb)
        learn.fit(2, 1e-3, cbs=SparsifyCallback(.8, epochs=2))
    assert zeros(learn) == round(.8*SUM)

def test_n_m_that_does_not_divide_is_refused_with_what_to_leave_out(learn):
    before = snapshot(learn)
    with pytest.raises(ValueError, match="layer '0' has 3 elements along axis 1.*exclude=\\['0'\\]"): learn.fit(1, 1e-3, cbs=SparsifyCallback(.5, granularity='2:4', include='*'))
    assert same(learn, before)
    learn.fit(1, 1e-3, cbs=SparsifyCallback(.5, granularity='2:4', include='*', exclude=['0','7']))
    assert zeros(learn) == SUM//2

def test_channel_criteria_refuse_finer_pieces(learn):
    with pytest.raises(ValueError, match="Type granularity='channel'"): learn.fit(1, 1e-3, cbs=SparsifyCallback(.5, criterion='fpgm', schedule='one_shot'))
    assert zeros(learn) < 10

def test_nothing_is_held_beyond_one_byte_a_weight(learn):
    learn.fit(1, 1e-3, cbs=SparsifyCallback(.8))
    k = learn.mask_keeper
    assert sum(m.element_size()*m.numel() for m in k.masks.values()) == SUM and k._ws is None and k._ints is None
    cb = SparsifyCallback(.9); learn.fit(1, 1e-3, cbs=cb)
    assert cb._aside is None and cb._gather is None and cb._ws is None
