"ChannelPruneCallback, prune_channels and ChannelPenaltyCallback through every verb of a Learner"
import copy, math, pickle, random, warnings
from functools import partial
import numpy as np, pytest, torch
from torch import nn
from fastai.callback.core import Callback, CancelBatchException, CancelFitException, CancelStepException
from fastai.callback.fp16 import NonNativeMixedPrecision
from fastai.callback.schedule import fine_tune, fit_one_cycle, lr_find
from fastai.callback.tracker import EarlyStoppingCallback, ReduceLROnPlateau, SaveModelCallback
from fastai.callback.training import GradientAccumulation, GradientClip
from fastai.optimizer import Adam, OptimWrapper, RMSProp, SGD, ranger

from channel_worker import DLS, GROUPS, Net, Order, learner, moments, weights, widths
from fastcompress.callback.channels import (ChannelPenaltyCallback, ChannelPruneCallback, slimming, group_lasso)
from fastcompress.callback.distill import DistillationCallback
from fastcompress.callback.lottery import LotteryTicketCallback
from fastcompress.callback.quantize import PTQCallback, calibration_batches
from fastcompress.callback.sparsify import SparsifyCallback
from fastcompress.measure.count import count_macs, n_params
from fastcompress.prune import remove as removal
from fastcompress.prune.channels import find_groups
from fastcompress.prune.mask import covered_weights
from fastcompress.prune.plan import Plan
from fastcompress.prune.remove import mask_, plan_of, remove_
from fastcompress.prune.schedule import iterative, sparsity_at
from fastcompress.prune.select import select
from fastcompress.quantize.simulate import simulation

pytestmark = pytest.mark.usefixtures('one_thread')

@pytest.fixture
def learn(tmp_path): return learner(tmp_path)

HALF = {'stem.0': 8, 'a.0': 16, 'wide.0': 16} # what 0.5 leaves with `round_to=8`
X = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
def snapshot(learn): return {k: v.clone() for k,v in learn.model.state_dict().items()}
def same(a, b): return a.keys()==b.keys() and all(a[k].shape==b[k].shape and torch.equal(a[k], b[k]) for k in a)
def column(learn, name): return [v[list(learn.recorder.metric_names).index(name)-1] for v in learn.recorder.values]
def bodysplit(m): return [[p for l in (m.stem, m.a, m.b, m.wide) for p in l.parameters()], list(m.head.parameters())]
def inner(opt):
    while hasattr(opt, 'opt'): opt = opt.opt
    return opt
def clean(model): return not any(m._forward_hooks or m._forward_pre_hooks or m._backward_hooks for m in model.modules())
def complete(learn):
    "Every parameter once in the optimizer, in the order of the model, and its memory of its own shape"
    ps = [p for o in learn.opt.param_lists for p in o]
    assert len({id(p) for p in ps})==len(ps) and {id(p) for p in ps}=={id(p) for p in learn.model.parameters()}
    for p in ps:
        for k,s in (inner(learn.opt).state.get(p) or {}).items():
            assert not torch.is_tensor(s) or s.numel()==1 or s.shape==p.shape, k
    return True

class Stop(Callback):
    run_valid = False
    def __init__(self, n, ex): self.n,self.ex = n,ex
    def after_batch(self):
        if self.train_iter==self.n: raise self.ex

# ---- one cut

def test_one_shot_is_what_select_says_of_the_first_weights(learn):
    expected = select(find_groups(copy.deepcopy(learn.model), X), ratio=.5)
    cb = ChannelPruneCallback(.5)
    learn.fit(2, 1e-2, cbs=cb)
    assert plan_of(learn.model).removed==expected.removed and widths(learn.model)==HALF
    assert [h[:3] for h in cb.history]==[(0, 0., .5)] and cb.history[0][3]==cb.obtained==1-40/72 and cb.requested==.5
    assert type(learn.model) is Net and complete(learn) and clean(learn.model)

def test_predictions_are_those_of_the_masked_model(learn):
    learn.fit(2, 1e-2)
    masked = copy.deepcopy(learn.model)
    plan = learn.prune_channels(.5)
    assert isinstance(plan, Plan) and 'wide.0     32    16   32 → 16' in repr(plan)
    mask_(masked, plan)
    small = learn.get_preds()[0]
    learn.model = masked
    assert torch.allclose(small, learn.get_preds()[0], atol=1e-5) and small.std()>.01

OPTS = dict(sgd=partial(SGD, mom=.9), adam=Adam, rmsprop=partial(RMSProp, mom=.9), adamw=partial(OptimWrapper, opt=torch.optim.AdamW),
            torch_sgd=partial(OptimWrapper, opt=partial(torch.optim.SGD, momentum=.9)), ranger=ranger)
def follows(plan, name, t):
    for a,keep in plan.keep.get(name, {}).items(): t = t.index_select(a, torch.tensor(keep))
    return t

@pytest.mark.parametrize('opt', OPTS)
def test_moments_are_those_of_the_channels_that_stay(tmp_path, opt):
    learn = learner(tmp_path, opt_func=OPTS[opt])
    learn.fit(1, 1e-2)
    names = {p: n for n,p in learn.model.named_parameters()}
    was = {n: {k: v.clone() for k,v in inner(learn.opt).state[p].items() if torch.is_tensor(v)} for p,n in names.items()}
    slow = [[s.clone() for s in ss] for ss in learn.opt.slow_weights] if opt=='ranger' else None
    ids = [id(p) for ps in learn.opt.param_lists for p in ps]
    plan = learn.prune_channels(.5)
    assert complete(learn) and [id(p) for ps in learn.opt.param_lists for p in ps]==ids
    n = 0
    for p,name in names.items():
        for k,v in was[name].items(): assert torch.equal(inner(learn.opt).state[p][k], follows(plan, name, v) if v.ndim else v); n += v.numel()>1
    assert n>=14
    if slow: assert all(torch.equal(a, follows(plan, names[p], b)) for ps,ss,bs in zip(learn.opt.param_lists, learn.opt.slow_weights, slow) for p,a,b in zip(ps, ss, bs))
    before = weights(learn)
    learn.fit(2, 1e-2)
    assert all(not torch.equal(p, before[n]) for n,p in learn.model.named_parameters()) and complete(learn)

def test_groups_and_hypers_are_kept(tmp_path):
    learn = learner(tmp_path, splitter=bodysplit)
    learn.fit(1, slice(1e-3,1e-2), wd=.1)
    hypers = copy.deepcopy(learn.opt.hypers)
    learn.prune_channels(.5)
    assert learn.opt.hypers==hypers and hypers[0]['lr']==pytest.approx(1e-3) and [len(p) for p in learn.opt.param_lists]==[12, 2]
    assert all(learn.opt.state[p].get('do_wd', True)==('weight' in n and p.ndim>1) for n,p in learn.model.named_parameters())

def test_prune_before_any_fit_and_what_now_means(learn):
    learn.prune_channels(.5)
    assert learn.opt is None and widths(learn.model)==HALF
    plan = learn.prune_channels(.5, round_to=1, min_channels=1) # half of what is left
    assert sum(widths(learn.model).values())==20 and plan.asked['counts']['channels']==[40, 20] and plan_of(learn.model).asked['counts']['channels']==[72, 20]
    learn.fit(1, 1e-2); assert complete(learn)

def test_counts_are_of_the_original(learn):
    full = n_params(learn.model),count_macs(learn.model, X)
    learn.prune_channels(.3); learn.prune_channels(.4, round_to=4, min_channels=4)
    counts = plan_of(learn.model).asked['counts']
    assert counts['params']==[full[0], n_params(learn.model)] and counts['macs']==[full[1], count_macs(learn.model, X)] and counts['channels'][1]==sum(widths(learn.model).values())

def test_a_plan_carried_out_by_hand_counts(learn):
    full = n_params(learn.model),count_macs(learn.model, X)
    remove_(learn.model, select(find_groups(learn.model, X), ratio={'wide.0': .5}), x=X)
    cb = ChannelPruneCallback(.5)
    learn.fit(1, 1e-2, cbs=cb)
    assert cb.counts['channels']==[72, sum(widths(learn.model).values())]==[72, 32] and cb.counts['params'][0]==full[0] and cb.counts['macs'][0]==full[1]
    assert column(learn, 'macs_kept')==[count_macs(learn.model, X)/full[1]]

# ---- along a schedule

@pytest.mark.parametrize('schedule', ['linear','cosine','zhu_gupta', lambda p: p**2])
def test_history_follows_the_schedule(learn, schedule):
    cb = ChannelPruneCallback(.6, schedule, start=.1, end=.8, every=3, round_to=1, min_channels=1)
    learn.fit(4, 1e-3, cbs=cb) # 40 steps
    assert cb.step==40 and [h[0] for h in cb.history][-1]==32 and set(h[0] for h in cb.history)<={*range(4, 33, 3), 32} and len(cb.history)>=8
    for step,pos,want,got in cb.history:
        assert pos==pytest.approx(step/40) and want==pytest.approx(sparsity_at(schedule, pos, .1, .8, 0, .6))
        assert abs(got-want)<=.5/72+1e-9
    assert cb.obtained==pytest.approx(.6, abs=.5/72) and cb.counts['channels']==[72, sum(widths(learn.model).values())]

def test_by_default_a_cut_is_an_eighth(learn):
    cb = ChannelPruneCallback(.8, 'linear', end=.8, round_to=1, min_channels=1)
    learn.fit(6, 1e-3, cbs=cb)
    assert [h[0] for h in cb.history]==[*range(6, 49, 6)]

@pytest.mark.parametrize('n', [1, 3, 4])
def test_iterative(learn, n):
    cb = ChannelPruneCallback(.6, iterative(n), end=.6, round_to=1)
    learn.fit(4, 1e-3, cbs=cb)
    assert [h[0] for h in cb.history]==[math.ceil(24*i/n) for i in range(n)] and [h[2] for h in cb.history]==pytest.approx([.6*(i+1)/n for i in range(n)])

def test_start_late_and_end_with_the_fit(learn):
    cb = ChannelPruneCallback(.5, start=.5, end=1.)
    learn.fit(2, 1e-2, cbs=cb)
    assert [h[:3] for h in cb.history]==[(10, .5, .5)] and widths(learn.model)==HALF
    cb = ChannelPruneCallback(.6, 'linear', end=1., every=5, round_to=1)
    learn.fit(2, 1e-2, cbs=cb)
    assert cb.history[-1][:2]==(20, 1.) and cb.obtained==pytest.approx(.6, abs=.01)

def test_steps_count_on_over_fits(learn):
    cb = ChannelPruneCallback(.6, 'linear', start=5, end=25, every=5, round_to=1)
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        for _ in range(3): learn.fit(1, 1e-2, cbs=cb)
    assert [(h[0], round(h[2], 6)) for h in cb.history]==[(10,.15),(15,.3),(20,.45),(25,.6)]

def test_epochs_lay_the_ramp_over_fits(tmp_path):
    learn,cb = learner(tmp_path, splitter=bodysplit),ChannelPruneCallback(.6, 'linear', epochs=4, every=4, round_to=1)
    with warnings.catch_warnings():
        warnings.simplefilter('error'); learn.fine_tune(3, 1e-2, freeze_epochs=1, cbs=cb)
    assert [h[0] for h in cb.history]==[4, 8, 12, 16, 20] and [h[2] for h in cb.history]==pytest.approx([.12,.24,.36,.48,.6])

def test_accumulation_counts_steps(learn):
    cb = ChannelPruneCallback(.6, 'linear', every=1, round_to=1, end=1.)
    learn.fit(4, 1e-2, cbs=[cb, GradientAccumulation(64)]) # 40 batches, a step after every 4th
    assert cb.step==10 and [h[0] for h in cb.history]==[*range(1, 11)] and complete(learn)
    for h in cb.history: assert h[1]==pytest.approx(h[0]/10, abs=.05)

@pytest.mark.parametrize('order', [0, 60])
@pytest.mark.parametrize('ex', [CancelStepException, CancelBatchException])
def test_steps_that_are_called_off_do_not_count(learn, order, ex):
    class Off(Callback):
        run_valid = False
        def before_step(self):
            if self.train_iter%2: raise ex
    off = Off(); off.order = order
    cb = ChannelPruneCallback(.5, 'linear', every=2, end=1.)
    learn.fit(2, 1e-2, cbs=[cb, off])
    assert cb.step==10 and [h[0] for h in cb.history]==[2, 4, 6, 8, 10, 10] # the last batch made no step; the fit ends at its target
    assert widths(learn.model)==HALF

def test_nothing_disturbs_the_random_generators(tmp_path):
    a,b = learner(tmp_path),learner(tmp_path)
    a.fit(2, 1e-2, cbs=Order())
    after = torch.get_rng_state(),random.getstate(),np.random.get_state()[1].copy()
    b = learner(tmp_path); b.fit(2, 1e-2, cbs=[Order(), ChannelPruneCallback(.5, start=.99, end=1., criterion='taylor', reestimate=True)])
    assert torch.equal(after[0], torch.get_rng_state()) and after[1]==random.getstate() and (after[2]==np.random.get_state()[1]).all()
    c = learner(tmp_path); c.fit(2, 1e-2, cbs=[Order(), ChannelPruneCallback(0.)])
    assert same(snapshot(a), snapshot(c)) and widths(b.model)==HALF

def test_one_step_after_a_cut_is_that_of_a_network_that_was_always_small(learn, tmp_path):
    "Training after the cut is plain training: another Learner, given the small model, takes the same steps"
    learn.fit(1, 1e-2); learn.prune_channels(.5)
    other = learner(tmp_path, model=copy.deepcopy(learn.model))
    learn.create_opt()
    for l in (learn, other):
        torch.manual_seed(0); l.fit(1, 1e-2, cbs=Order())
    assert same(snapshot(learn), snapshot(other))

# ---- again

def test_two_fits_and_two_callbacks_cut_once(learn):
    cb = ChannelPruneCallback(.5)
    learn.fit(1, 1e-2, cbs=cb); learn.fit(1, 1e-2, cbs=cb); learn.fit(1, 1e-2, cbs=ChannelPruneCallback(.5))
    with pytest.warns(UserWarning, match='ratio=0.3 asks for less'): learn.fit(1, 1e-2, cbs=ChannelPruneCallback(.3))
    assert widths(learn.model)==HALF and len(cb.history)==1 and column(learn, 'params_kept')==[n_params(learn.model)/12458]
    learn.fit(1, 1e-2); assert widths(learn.model)==HALF and 'params_kept' not in learn.recorder.metric_names

def test_a_larger_ratio_takes_the_difference(learn):
    for r in (.25, .5, .75): learn.fit(1, 1e-2, cbs=ChannelPruneCallback(r, round_to=1, min_channels=1)); assert sum(widths(learn.model).values())==72*(1-r)
    learn.fit(1, 1e-2, cbs=(cb := ChannelPruneCallback(.5, 'linear', round_to=1)))
    assert sum(widths(learn.model).values())==18 and not cb.history

def test_what_is_gone_does_not_come_back(learn):
    learn.prune_channels(.5, include='wide.0')
    with pytest.warns(UserWarning, match=r"50.0% of the original channels are gone already, and channels don't come back; ratio=0.25 asks for less"):
        learn.fit(1, 1e-2, cbs=ChannelPruneCallback(.25, include='wide.0', round_to=4))
    assert widths(learn.model)['wide.0']==16

def test_prune_channels_reaches_the_target_of_a_callback(learn):
    learn.prune_channels(.5)
    learn.fit(1, 1e-2, cbs=(cb := ChannelPruneCallback(.5)))
    assert widths(learn.model)==HALF and not cb.history

def test_nothing_can_be_removed(learn):
    with pytest.warns(UserWarning, match='nothing was removed, though ratio=0.5 was asked for: .*asked to keep'): learn.fit(1, 1e-2, cbs=(cb := ChannelPruneCallback(.5, min_channels=64)))
    assert widths(learn.model)==GROUPS and column(learn, 'params_kept')==[1.] and len(cb.history)==1
    with warnings.catch_warnings():
        warnings.simplefilter('error'); learn.fit(1, 1e-2, cbs=ChannelPruneCallback(.5, min_channels=64))
    assert plan_of(learn.model).empty

# ---- targets and criteria

@pytest.mark.parametrize('target', ['params','macs'])
def test_targets_of_the_original_in_two_stages(learn, target):
    count = lambda: n_params(learn.model) if target=='params' else count_macs(learn.model, X)
    full = count()
    for r in (.3, .6):
        learn.fit(1, 1e-2, cbs=ChannelPruneCallback(r, target=target, round_to=1, min_channels=1))
        assert .9*(1-r) < count()/full <= 1-r

@pytest.mark.parametrize('text', ['0.5x macs', '5000 params', 'half the params'])
def test_what_is_to_be_left(learn, text):
    full = dict(macs=count_macs(learn.model, X), params=n_params(learn.model))
    cb = ChannelPruneCallback(text, 'iterative', round_to=1)
    learn.fit(2, 1e-2, cbs=cb)
    if text=='5000 params': assert 4500<n_params(learn.model)<=5000
    else: assert .45<dict(macs=count_macs(learn.model, X), params=n_params(learn.model))[text.split()[-1]]/full[text.split()[-1]]<=.5
    n,w = len(cb.history),widths(learn.model)
    with warnings.catch_warnings():
        warnings.simplefilter('error'); learn.fit(1, 1e-2, cbs=(again := ChannelPruneCallback(text, round_to=1)))
    assert widths(learn.model)==w and n>=3 and not again.history
    other = learner(learn.path); other.prune_channels(text, round_to=1); assert n_params(other.model)<12458

def test_parts_group_by_group(learn):
    cb = ChannelPruneCallback({'wide.0': .75, 'b.0': .5}, 'linear', every=2, round_to=4, min_channels=4)
    learn.fit(2, 1e-2, cbs=cb)
    assert widths(learn.model)=={'stem.0': 8, 'a.0': 24, 'wide.0': 8} and len(cb.history)>=4
    learn.fit(1, 1e-2, cbs=ChannelPruneCallback({'wide.0': .75, 'b.0': .5}, round_to=4, min_channels=4)); assert widths(learn.model)['wide.0']==8
    learn.fit(1, 1e-2, cbs=ChannelPruneCallback({'wide.0': .875, 'a.0': .5}, round_to=4, min_channels=4)); assert widths(learn.model)=={'stem.0': 8, 'a.0': 12, 'wide.0': 4}

def test_include_and_exclude(learn):
    learn.fit(1, 1e-2, cbs=ChannelPruneCallback(.5, exclude='b.0')); assert widths(learn.model)==HALF | {'stem.0': 16, 'a.0': 16}
    learn.prune_channels(.5, include=['stem.0','b.0']); assert widths(learn.model)==HALF

@pytest.mark.parametrize('criterion', ['taylor','bn_scale','apoz','random','l1', lambda w: w.abs().amax((1,2,3))])
def test_criteria(learn, criterion):
    cb = ChannelPruneCallback(.5, 'iterative', criterion)
    learn.fit(2, 1e-2, cbs=cb)
    assert sum(widths(learn.model).values()) in (32, 40) and complete(learn)

def test_criterion_sees_trained_weights(learn):
    learn.fit(1, 1e-2)
    with torch.no_grad(): learn.model.wide[0].weight[5:21] *= .01
    learn.fit(1, 1e-3, cbs=ChannelPruneCallback({'wide.0': .5}))
    assert plan_of(learn.model).removed=={'wide.0': [*range(5, 21)]}

def test_latency_with_a_table(learn):
    class Table:
        def predict(self, removed=None): return 10-sum(map(len, (removed or {}).values()))/9
    calls = []
    def table(groups, x): calls.append(x); return Table()
    learn.fit(1, 1e-2, cbs=ChannelPruneCallback(.2, target='latency', table=table, round_to=1))
    assert sum(widths(learn.model).values())==54 and len(calls)==1 and len(calls[0][0])==2
    with pytest.raises(ValueError, match='needs table='): learn.fit(1, 1e-2, cbs=ChannelPruneCallback(.5, target='latency'))
    with pytest.raises(ValueError, match='belongs to one model'): ChannelPruneCallback(.5, 'linear', target='latency', table=Table())
    old = Table(); old.groups = find_groups(Net(), X)
    with pytest.raises(ValueError, match='of other shapes'): learn.prune_channels(.5, target='latency', table=old)

def test_reestimate(tmp_path):
    learn = learner(tmp_path); learn.fit(3, 1e-2)
    twin = copy.deepcopy(learn.model)
    plan = learn.prune_channels(.5, reestimate=True)
    remove_(twin, select(find_groups(twin, X), ratio=.5), x=X)
    x = calibration_batches(learn.dls, 4)
    assert same(weights(learn), dict(twin.named_parameters())) and not torch.equal(twin.stem[1].running_mean, learn.model.stem[1].running_mean)
    means = torch.stack([learn.model.stem[0](b[0]).mean((0,2,3)) for b in x]).mean(0)
    assert torch.allclose(learn.model.stem[1].running_mean, means, atol=1e-5) and learn.model.stem[1].momentum==.1

# ---- who compares epochs

class Worse(Callback):
    "A validation loss that rises with every epoch"
    order,run_train = 49,False
    def after_loss(self): self.learn.loss = self.learn.loss*0 + self.epoch

def test_save_model_across_a_change_of_shape(learn, capsys):
    cb = ChannelPruneCallback(.5, 'iterative', end=.5)
    learn.fit(8, 1e-2, cbs=[cb, Worse(), SaveModelCallback(fname='best')])
    best = torch.load(learn.path/'models'/'best.pth', weights_only=True)
    assert sum(widths(learn.model).values())==40 and best['wide.0.weight'].shape==learn.model.wide[0].weight.shape and torch.equal(best['wide.0.weight'], learn.model.wide[0].weight)
    assert learn.path.joinpath('models/best.plan.json').exists() and plan_of(learn.model).asked['counts']['channels']==[72, 40]
    assert [h[0] for h in cb.history]==[0, 10, 20, 30] and capsys.readouterr().out.count('Better model')==3 # at the end of each epoch that cut
    learn.fit(1, 1e-2, cbs=cb); assert complete(learn) and sum(widths(learn.model).values())==40

def test_early_stopping_waits_for_the_end_of_the_ramp(learn, capsys):
    cb = ChannelPruneCallback(.5, iterative(2), start=.3, end=.7) # cuts at 30% and 50%; epochs between them get worse
    learn.fit(10, 1e-2, cbs=[cb, Worse(), EarlyStoppingCallback(patience=2), ReduceLROnPlateau(patience=1, factor=10)])
    assert [h[0] for h in cb.history]==[30, 50] and widths(learn.model)==HALF
    assert len(learn.recorder.values)==7 and capsys.readouterr().out.count('reducing lr')==2 # the last cut is at the end of epoch 4; epochs 5 and 6 are worse

def test_trackers_are_left_alone_where_nothing_is_cut(tmp_path, capsys):
    learn = learner(tmp_path, splitter=bodysplit)
    learn.create_opt(); learn.freeze()
    with pytest.warns(UserWarning, match='frozen'): learn.fit(5, 1e-2, cbs=[ChannelPruneCallback(.5), Worse(), EarlyStoppingCallback(patience=2)])
    assert len(learn.recorder.values)==3

# ---- frozen layers

def test_fine_tune_waits(tmp_path):
    learn,cb = learner(tmp_path, splitter=bodysplit),ChannelPruneCallback(.5)
    seen = []
    class Look(Callback):
        def after_train(self): seen.append(widths(self.model))
    with warnings.catch_warnings(record=True) as w:
        warnings.simplefilter('always'); learn.fine_tune(2, 1e-2, freeze_epochs=1, cbs=[cb, Look()])
    assert seen==[GROUPS, HALF, HALF] and len(cb.history)==1 and cb.history[0][0]==0
    assert [str(o.message) for o in w if 'frozen' in str(o.message)]==["3 of 3 groups are made by frozen layers (stem.0, a.0, wide.0): nothing is cut in this fit, but in the next that trains them. wait=False cuts frozen layers too, exclude= leaves them whole."]
    assert complete(learn) and [len(p) for p in learn.opt.param_lists]==[12,2]

def test_a_frozen_body_is_cut_and_stays_frozen(tmp_path):
    learn = learner(tmp_path, splitter=bodysplit)
    learn.create_opt(); learn.freeze()
    flags = {n: p.requires_grad for n,p in learn.model.named_parameters()}
    assert flags['a.1.weight'] and not flags['a.0.weight']
    class Check(Callback):
        def before_batch(self):
            if not hasattr(self, 'w'): self.w = weights(self.learn)
    check = Check()
    with warnings.catch_warnings():
        warnings.simplefilter('error'); learn.fit(1, 1e-2, cbs=[ChannelPruneCallback(.5, wait=False), check])
    assert widths(learn.model)==HALF and complete(learn) and {n: p.requires_grad for n,p in learn.model.named_parameters()}==flags
    assert all(torch.equal(p, check.w[n])!=flags[n] for n,p in learn.model.named_parameters()) # what is frozen hasn't moved, what isn't has
    learn.unfreeze(); assert all(p.requires_grad for p in learn.model.parameters())
    before = weights(learn); learn.fit(1, 1e-2); assert not any(torch.equal(p, before[n]) for n,p in learn.model.named_parameters())

def test_frozen_layers_that_are_left_out_make_nobody_wait(tmp_path):
    learn = learner(tmp_path, splitter=lambda m: [list(m.stem.parameters())+list(m.b.parameters()), [p for l in (m.a, m.wide, m.head) for p in l.parameters()]])
    learn.create_opt(); learn.freeze()
    with warnings.catch_warnings():
        warnings.simplefilter('error'); learn.fit(1, 1e-2, cbs=ChannelPruneCallback(.5, exclude='stem.0'))
    assert widths(learn.model)==HALF | {'stem.0': 16}

# ---- lr_find, validate, get_preds, predict

def test_lr_find_changes_nothing(tmp_path):
    for attach in 'learner','pruned':
        learn = learner(tmp_path, cbs=ChannelPruneCallback(.5, 'linear'))
        learn.fit(1, 1e-2) if attach=='pruned' else learn.create_opt()
        before,m,w,h = snapshot(learn),copy.deepcopy(moments(learn)),widths(learn.model),list(learn.channel_prune.history)
        learn.lr_find(num_it=15, show_plot=False)
        assert same(snapshot(learn), before) and widths(learn.model)==w==(GROUPS if attach=='learner' else w) and learn.channel_prune.history==h and complete(learn)
        assert all(torch.equal(a[k], b[k]) for a,b in zip(m, moments(learn)) for k in a)
        assert (plan_of(learn.model) is None)==(attach=='learner') and not list((tmp_path/'models').glob('*'))

def test_validate_get_preds_predict(tmp_path):
    learn = learner(tmp_path, cbs=ChannelPruneCallback(.5))
    before = snapshot(learn)
    learn.validate(); learn.get_preds(); learn.predict(DLS.train_ds.items[0][0])
    assert same(snapshot(learn), before)
    learn.fit(1, 1e-2)
    in_fit = learn.recorder.values[-1][1]
    val,preds = learn.validate(),learn.get_preds()[0]
    assert val[0]==pytest.approx(in_fit, rel=1e-5) and torch.allclose(preds.sum(1), torch.ones(len(preds)), atol=1e-5)
    assert torch.allclose(learn.predict(DLS.valid_ds.items[0][0])[2], preds[0], atol=1e-5)

def test_columns(learn):
    learn.recorder.train_metrics,learn.recorder.add_time = True,False
    learn.fit(2, 1e-2, cbs=[SparsifyCallback(.5), ChannelPruneCallback(.5, start=.6, end=.9)])
    assert list(learn.recorder.metric_names)[-3:]==['params_kept','macs_kept','sparsity'] and len(learn.recorder.values[-1])==len(learn.recorder.metric_names)-1
    assert column(learn, 'params_kept')==[1., n_params(learn.model)/12458] and column(learn, 'macs_kept')[1]==pytest.approx(count_macs(learn.model, X)/191552)
    assert .4<column(learn, 'sparsity')[-1]<.6

def test_silent(tmp_path, capsys):
    from fastai.learner import Learner
    learn = Learner(DLS, Net(), path=tmp_path)
    with warnings.catch_warnings(), learn.no_bar(), learn.no_logging():
        warnings.simplefilter('error'); warnings.filterwarnings('ignore', 'numpy.core is deprecated') # fastai's
        learn.fit(2, 1e-2, cbs=[ChannelPruneCallback(.5, 'iterative', criterion='taylor', reestimate=True), ChannelPenaltyCallback()])
        learn.save('m'); learn.load('m'); learn.fit(1, 1e-2); learn.prune_channels(.5, min_channels=4, round_to=4)
    assert capsys.readouterr()==('', '')

# ---- cut short

@pytest.mark.parametrize('ex', [KeyboardInterrupt(), RuntimeError('loop'), CancelFitException()])
def test_cut_short_in_mid_ramp(learn, ex):
    cb,go = ChannelPruneCallback(.6, 'linear', end=.8, every=4, round_to=1, min_channels=1),lambda: learn.fit(4, 1e-2, cbs=[cb, Stop(17, ex)])
    if isinstance(ex, CancelFitException):
        with pytest.warns(UserWarning, match=r'the fit ended at 40% of its length, before the end of the ramp \(80%\): 30.6% instead of 60.0% of the channels are gone.*prune_channels'): go()
    else:
        with pytest.raises(type(ex)): go()
    mid = widths(learn.model)
    assert [h[0] for h in cb.history]==[4, 8, 12, 16] and 0<1-sum(mid.values())/72<.4 and complete(learn) and clean(learn.model)
    assert learn.get_preds()[0].isfinite().all()
    learn.fit(1, 1e-2); assert widths(learn.model)==mid and complete(learn)
    learn.fit(2, 1e-2, cbs=cb) # goes on from there
    assert cb.obtained==pytest.approx(.6, abs=.01) and min(h[2] for h in cb.history[4:])>.3

def test_a_failing_selection_leaves_all_as_it_was(learn):
    learn.fit(1, 1e-2)
    before,m = snapshot(learn),copy.deepcopy(moments(learn))
    for kw in (dict(include='stam.0'), dict(exclude=nn.Conv2d), dict(target='mac'), dict(ratio='1% macs'), dict(scope='globl'), dict(round_to=0), dict(normalise='men')):
        with pytest.raises(ValueError): learn.fit(1, 1e-2, cbs=ChannelPruneCallback(**dict(ratio=.5, schedule='linear') | kw))
    assert same(snapshot(learn), before) and all(torch.equal(a[k], b[k]) for a,b in zip(m, moments(learn)) for k in a) and complete(learn)

def test_a_group_that_is_not_exact_is_left_whole(learn, monkeypatch):
    real = removal.verify
    def verify(model, plan, x, *args, **kw):
        res = real(model, plan, x, *args, **kw)
        if plan.removed.get('wide.0'): res.problem,res.first = 'it is haunted','wide.0'
        return res
    monkeypatch.setattr(removal, 'verify', verify)
    cb = ChannelPruneCallback(.5, 'iterative', round_to=1)
    learn.fit(2, 1e-2, cbs=cb)
    assert list(cb.whole)==['stem.0','wide.0'] and all('haunted' in plan_of(learn.model).notes[n] for n in cb.whole) # one makes, one reads the channels that haunt the layer
    assert widths(learn.model)==GROUPS | {'a.0': 12} and complete(learn) # half of the others
    other = learner(learn.path)
    with pytest.raises(RuntimeError, match='haunted'): other.fit(1, 1e-2, cbs=ChannelPruneCallback(.5, strict=True))
    assert widths(other.model)==GROUPS and plan_of(other.model) is None
    other.prune_channels(.5, include='a.0'); plan,w = plan_of(other.model),widths(other.model)
    with pytest.raises(RuntimeError, match='haunted'): other.prune_channels(.5, strict=True)
    assert plan_of(other.model) is plan and widths(other.model)==w

# ---- with other callbacks

def test_sparse_then_small(learn):
    learn.fit(2, 1e-2, cbs=SparsifyCallback(.8))
    masks = dict(learn.mask_keeper.masks)
    plan = learn.prune_channels(.5)
    for n,m in learn.mask_keeper.masks.items():
        assert torch.equal(m, follows(plan, f'{n}.weight', masks[n])) and m.shape==covered_weights(learn.model, [n])[n].shape
        assert learn.mask_keeper.gone[n]==int((~m).sum())
    learn.fit(1, 1e-2)
    assert all(torch.equal(w!=0, learn.mask_keeper.masks[n]) for n,w in covered_weights(learn.model, masks).items()) and complete(learn)

def test_small_then_sparse(learn):
    learn.fit(1, 1e-2, cbs=ChannelPruneCallback(.5))
    learn.fit(2, 1e-2, cbs=SparsifyCallback(.8))
    ws = covered_weights(learn.model, ['a.0','b.0','wide.0'])
    assert sum(int((w==0).sum()) for w in ws.values())==round(.8*sum(w.numel() for w in ws.values()))

@pytest.mark.parametrize('kw', [dict(), dict(regrow=False), dict(criterion='movement'), dict(regrow='gradient', schedule='one_shot'), dict(granularity='channel')])
def test_both_at_once(learn, kw):
    sp,cb = SparsifyCallback(.7, every=2, **kw),ChannelPruneCallback(.5, 'iterative')
    bad = []
    class Watch(Callback):
        order,run_valid = 101,False
        def after_batch(self): bad.extend(n for n,w in self.learn.mask_keeper.weights.items() if w.shape!=self.learn.mask_keeper.masks[n].shape or w.detach()[~self.learn.mask_keeper.masks[n]].any())
    learn.fit(4, 1e-2, cbs=[sp, cb, Watch()])
    assert sum(widths(learn.model).values()) in (32, 40) and not bad and complete(learn)
    r = sp._ramps['all covered layers']
    assert sp.reached and r['gone']==round(.7*r['n'])
    if 'granularity' not in kw: assert r['n']==sum(w.numel() for w in learn.mask_keeper.weights.values()) and r['gone']==sum(int((~m).sum()) for m in learn.mask_keeper.masks.values())
    learn.fit(1, 1e-2); assert not any(w.detach()[~learn.mask_keeper.masks[n]].any() for n,w in learn.mask_keeper.weights.items())

def test_the_dense_network_teaches_the_small_one(learn):
    learn.fit(2, 1e-2)
    learn.fit(2, 1e-2, cbs=[ChannelPruneCallback(.5, 'iterative'), DistillationCallback()])
    assert sum(widths(learn.model).values())==40 and complete(learn)

def test_quantize_the_small_one(learn):
    learn.fit(2, 1e-2, cbs=ChannelPruneCallback(.5))
    preds = learn.get_preds()[0]
    with learn.no_bar(): learn.quantize(n_batches=2)
    assert simulation(learn.model).calibrated and (learn.get_preds()[0]-preds).abs().max()<.1
    with pytest.raises(ValueError, match='the model is quantized.*learn.dequantize'): learn.prune_channels(.5)
    with pytest.raises(ValueError, match='learn.dequantize'): learn.fit(1, 1e-2, cbs=ChannelPruneCallback(.7))
    learn.dequantize(); learn.prune_channels(.5, round_to=4, min_channels=4)

def test_ptq_in_the_same_fit(learn):
    learn.fit(2, 1e-2, cbs=[PTQCallback(n_batches=2), ChannelPruneCallback(.5, 'iterative')])
    assert simulation(learn.model).calibrated and sum(widths(learn.model).values())==40 and learn.validate()[0]<3

def test_clip_and_distinct_learning_rates(tmp_path):
    learn = learner(tmp_path, splitter=bodysplit)
    learn.fit_one_cycle(3, slice(1e-4, 1e-2), cbs=[ChannelPruneCallback(.5, 'iterative'), GradientClip(.1)])
    assert widths(learn.model)['wide.0']<32 and complete(learn)

def test_old_mixed_precision_is_refused(learn, monkeypatch):
    monkeypatch.setattr(NonNativeMixedPrecision, 'before_fit', lambda self: None) # it asks for CUDA first
    learn.add_cb(NonNativeMixedPrecision())
    with pytest.raises(ValueError, match=r'learn.to_fp16\(\)'): learn.fit(1, 1e-2, cbs=ChannelPruneCallback(.5))
    assert widths(learn.model)==GROUPS

def test_a_lottery_is_refused(tmp_path):
    learn = learner(tmp_path, cbs=LotteryTicketCallback(.5, 2))
    with pytest.raises(ValueError, match='a lottery rewinds to weights of the whole network'): learn.prune_channels(.5)

def test_a_sparse_ramp_over_two_fits_with_a_cut_between(tmp_path):
    learn = learner(tmp_path, cbs=(sp := SparsifyCallback(.7, epochs=4, every=2)))
    learn.fit(1, 1e-2); plan = learn.prune_channels(.5); assert all(t.shape==w.shape for t,w in zip(sp._aside.values(), covered_weights(learn.model, sp._aside).values()))
    learn.fit(3, 1e-2)
    r = sp._ramps['all covered layers']
    assert sp.reached and r['gone']==round(.7*r['n'])==sum(int((w==0).sum()) for w in learn.mask_keeper.weights.values())

# ---- a layer that gets a bias

class Lifted(nn.Module):
    "Of zero the sigmoid is one half: what a removed channel brings is constant, and goes into a bias that wasn't there"
    def __init__(self):
        super().__init__()
        self.first,self.second,self.head = nn.Conv2d(3, 32, 3, 2, 1, bias=False),nn.Conv2d(32, 16, 1, bias=False),nn.Linear(16, 10)
    def forward(self, x): return self.head(self.second(self.first(x).sigmoid()).relu().mean((2,3)))

@pytest.mark.parametrize('opt', ['adam','adamw','ranger'])
def test_a_new_bias_is_trained_and_in_its_place(tmp_path, opt):
    learn = learner(tmp_path, model=Lifted(), opt_func=OPTS[opt])
    learn.fit(1, 1e-2)
    before = learn.get_preds()[0]
    learn.opt.load_state_dict(copy.deepcopy(learn.opt.state_dict())) # what export does; fastai's state is a plain dict then
    masked = mask_(copy.deepcopy(learn.model), learn.prune_channels(.5, include='first'))
    b = learn.model.second.bias
    assert plan_of(learn.model).biases==['second'] and b is not None and b.abs().sum()>0
    assert torch.allclose(learn.model(X), masked(X), atol=1e-5)
    assert [id(p) for p in learn.opt.param_lists[0]]==[id(p) for p in learn.model.parameters()] and complete(learn)
    if opt=='adam': assert learn.opt.state[b]=={'do_wd': False}
    was = b.detach().clone(); learn.fit(2, 1e-2); assert not torch.equal(was, b)
    learn.save('m')
    other = learner(tmp_path, 3, model=Lifted(), opt_func=OPTS[opt]).load('m')
    assert torch.equal(other.get_preds()[0], learn.get_preds()[0])
    for p,q in zip(learn.model.parameters(), other.model.parameters()):
        for k,v in inner(learn.opt).state[p].items(): assert not torch.is_tensor(v) or torch.equal(v, inner(other.opt).state[q][k])
    other.fit(1, 1e-2)

def test_a_layer_that_got_a_bias_loses_channels_later(tmp_path):
    learn = learner(tmp_path, model=Lifted())
    learn.prune_channels(.5, include='first'); learn.fit(1, 1e-2); learn.prune_channels(.5, include='second'); learn.fit(1, 1e-2)
    assert len(learn.model.second.bias)==8 and complete(learn) and plan_of(learn.model).asked['counts']['params']==[n_params(Lifted()), n_params(learn.model)]
    learn.save('m')
    for fit in (False, True):
        other = learner(tmp_path, 3, model=Lifted())
        if fit: other.fit(1, 1e-2)
        other.load('m')
        assert torch.equal(other.get_preds()[0], learn.get_preds()[0]) and complete(other) and n_params(other.model)==plan_of(other.model).asked['counts']['params'][1]
        other.fit(1, 1e-2)

# ---- bad input

@pytest.mark.parametrize('kw,text', [(dict(ratio=50), 'Percent'), (dict(ratio=-.1), 'outside 0 to 1'), (dict(ratio='lots'), "can't read the budget"), (dict(ratio={}), 'names no group'),
    (dict(ratio=None), 'must be a number'), (dict(schedule='linaer'), "Nearest: 'linear'"), (dict(schedule='dsd'), "don't come back"), (dict(criterion='l22'), "Nearest: 'l2'"), (dict(start=.6), 'must end after'),
    (dict(start=10), 'both as optimizer steps'), (dict(every=0), '1 or more'), (dict(epochs=1.5), 'a whole number'), (dict(n_batches=0), '1 or more'), (dict(start=5, end=9, epochs=2), 'goes with parts')])
def test_refused_when_made(kw, text):
    with pytest.raises(ValueError, match=text): ChannelPruneCallback(**dict(ratio=.5) | kw)

def test_unknown_arguments(learn):
    with pytest.raises(TypeError, match="no argument 'min_channel'. Nearest: 'min_channels'"): ChannelPruneCallback(.5, min_channel=4)
    with pytest.raises(TypeError, match="no argument 'criterium'. Nearest: 'criterion'"): learn.prune_channels(.5, criterium='l1')
    with pytest.raises(ValueError, match="no layer matches 'wide'.*Nearest: 'wide.0'"): learn.prune_channels(.5, include='wide')
    with pytest.warns(UserWarning, match='ends at 0.5'): ChannelPruneCallback(.5, lambda p: p/2)

def test_no_data(tmp_path):
    learn = learner(tmp_path); learn.export('e.pkl')
    from fastai.learner import load_learner
    with warnings.catch_warnings(): warnings.simplefilter('ignore'); empty = load_learner(tmp_path/'e.pkl')
    with pytest.raises(ValueError, match='no example input.*x='): empty.prune_channels(.5)
    empty.prune_channels(.5, x=X); assert widths(empty.model)==HALF

# ---- penalties

def test_penalties_are_the_formulas(learn):
    groups = find_groups(learn.model, X)
    with torch.no_grad():
        for m in learn.model.modules():
            if isinstance(m, nn.BatchNorm2d): m.weight.normal_()
    m = learn.model
    assert float(sum(f() for f in slimming(groups, list(GROUPS))))==pytest.approx(sum(float(l[1].weight.abs().sum()) for l in (m.stem, m.a, m.b, m.wide)), rel=1e-5)
    n = lambda *ws: sum(w.flatten(1).square().sum(1) for w in ws).sqrt().sum().item()*sum(w[0].numel() for w in ws)**.5
    want = n(m.stem[0].weight, m.b[0].weight)+n(m.a[0].weight)+n(m.wide[0].weight)
    assert float(sum(f() for f in group_lasso(groups, list(GROUPS))))==pytest.approx(want, rel=1e-5)

def grads(tmp_path, *cbs, kind='slimming', weight=.1, n=1):
    "Gradients that the first step sees"
    learn,out = learner(tmp_path),{}
    class Grab(Callback):
        order,run_valid = 90,False
        def before_step(self):
            out.update({k: p.grad.clone() for k,p in self.model.named_parameters()}); out['loss'] = self.learn.loss.detach().clone()
            raise CancelFitException
    learn.fit(1, 1e-2, cbs=[Order(), Grab(), *cbs, *([ChannelPenaltyCallback(kind, weight)] if weight is not None else [])])
    return out, learn

@pytest.mark.parametrize('extra', [(), (GradientAccumulation(64),)])
def test_slimming_adds_its_sign_once(tmp_path, extra):
    a,learn = grads(tmp_path, *extra, weight=None); b,_ = grads(tmp_path, *extra)
    for n,p in learn.model.named_parameters():
        want = a[n]+.1*p.sign() if '.1.weight' in n else a[n]
        assert torch.allclose(b[n], want, atol=1e-6), n
    assert torch.equal(a['loss'], b['loss']) # what is logged is the loss of the task

class Scaled(Callback):
    "What a loss scaler does"
    order,run_valid = 10,False
    def before_backward(self): self.learn.loss_grad = self.learn.loss_grad*1024
    def before_step(self): [p.grad.div_(1024) for p in self.model.parameters()]

@pytest.mark.parametrize('kind', ['slimming','group_lasso'])
def test_a_loss_scale_changes_nothing(tmp_path, kind):
    a,_ = grads(tmp_path, kind=kind); b,_ = grads(tmp_path, Scaled(), kind=kind); c,_ = grads(tmp_path, weight=None)
    assert all(torch.allclose(a[n], b[n], atol=1e-6) for n in a) and not torch.allclose(a['wide.1.weight' if kind=='slimming' else 'wide.0.weight'], c['wide.1.weight' if kind=='slimming' else 'wide.0.weight'])

def test_group_lasso_of_a_dead_channel_has_no_gradient(learn):
    with torch.no_grad(): learn.model.wide[0].weight[3] = 0
    sum(f() for f in group_lasso(find_groups(learn.model, X), ['wide.0'])).backward()
    g = learn.model.wide[0].weight.grad
    assert g.isfinite().all() and not g[3].any() and g[4].any()

def test_penalty_leaves_validation_alone_and_is_kept_per_epoch(learn):
    cb = ChannelPenaltyCallback('group_lasso', 1e-3)
    learn.fit(2, 1e-3, cbs=cb)
    in_fit = learn.recorder.values[-1][1]
    assert learn.validate()[0]==pytest.approx(in_fit, rel=1e-5) and len(cb.values)==2 and cb.values[0]>cb.values[1]>0
    learn.lr_find(num_it=10, show_plot=False); assert len(cb.values)==2

def test_weight_zero_is_no_penalty(tmp_path):
    a,b = learner(tmp_path),None
    a.fit(1, 1e-2, cbs=Order())
    b = learner(tmp_path); b.fit(1, 1e-2, cbs=[Order(), ChannelPenaltyCallback(weight=0.)])
    assert same(snapshot(a), snapshot(b))

def test_penalty_makes_scales_small_where_they_can_go(learn, tmp_path):
    learn.fit(6, 1e-2, cbs=[Order(), ChannelPenaltyCallback(weight=.05, exclude='wide.0')])
    other = learner(tmp_path); other.fit(6, 1e-2, cbs=Order())
    mean = lambda l, n: l.model.get_submodule(n)[1].weight.abs().mean()
    assert all(mean(learn, n)<.8*mean(other, n) for n in ('stem','a','b')) and mean(learn, 'wide')>.9*mean(other, 'wide')

@pytest.mark.parametrize('kind', ['slimming','group_lasso'])
def test_penalty_and_cuts_in_one_fit(learn, kind):
    cb = ChannelPenaltyCallback(kind, 1e-3)
    learn.fit(2, 1e-2, cbs=[ChannelPruneCallback(.5, 'linear', every=2, round_to=1), cb])
    assert sum(widths(learn.model).values())==36 and complete(learn) and len(cb.values)==2
    pickle.loads(pickle.dumps(cb))

def test_slimming_needs_norms(tmp_path):
    learn = learner(tmp_path, model=Lifted())
    with pytest.raises(ValueError, match="no norm layer scales the channels of 'first', 'second'.*group_lasso"): learn.fit(1, 1e-2, cbs=ChannelPenaltyCallback())
    learn.fit(1, 1e-2, cbs=ChannelPenaltyCallback('group_lasso'))
    for w in (-1, math.inf, 'x', True):
        with pytest.raises(ValueError, match='a factor, 0 or more'): ChannelPenaltyCallback(weight=w)

def test_own_penalty(learn):
    def sharp(groups, names): return [lambda: groups.model.wide[0].weight.square().sum()]
    learn.fit(1, 1e-2, cbs=(cb := ChannelPenaltyCallback(sharp, .1)))
    assert cb.values[0]>0
