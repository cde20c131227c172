"LotteryTicketCallback and find_ticket: exact sparsity, exact rewinding, controls, searches that are broken off and go on"
import json, pickle, random
import pytest, torch
from torch import nn
from fastai.callback.core import Callback, CancelFitException, CancelStepException
from fastai.callback.schedule import fine_tune, fit_one_cycle, lr_find
from fastai.callback.training import GradientAccumulation
from fastai.callback.progress import no_bar
from fastai.learner import Learner, load_learner
from fastai.metrics import accuracy
from fastai.optimizer import OptimWrapper, SGD, ranger
from fastai.torch_core import params, set_seed

from fastcompress.callback.hold import hold_masks, release_masks
from fastcompress.callback.lottery import Lottery, LotteryTicketCallback, find_ticket, load_lottery, load_ticket, save_ticket, shuffled, snapshot, ticket_sparsity
from fastcompress.data import digits
from fastcompress.prune.mask import covered_weights, sparsity_of
from fastcompress.study.lottery import lottery_table, plot_lottery

DLS = digits(n=200, size=8, bs=16) # 160 to train on: 10 batches
NAMES = ['1','3']                  # what is covered by default in `net`
N = {'1': 8*16*9, '3': 16*16*9}
SUM = sum(N.values())

def net(width=16):
    return nn.Sequential(nn.Conv2d(3,8,3,2,1), nn.Conv2d(8,width,3,1,1), nn.BatchNorm2d(width), nn.Conv2d(width,16,3,1,1), nn.Dropout(.1), nn.ReLU(),
                         nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16,10))

def learner(tmp_path='.', seed=0, model=None, **kwargs):
    set_seed(seed); DLS.train.rng = random.Random(seed)
    learn = Learner(DLS, model or net(), metrics=accuracy, path=tmp_path, **kwargs)
    learn.remove_cb(learn.progress); learn.logger = lambda o: None
    return learn

pytestmark = pytest.mark.usefixtures('one_thread')

def same(a, b): return a.keys()==b.keys() and all(torch.equal(a[k], b[k]) for k in a)
def keys(masks): return {f'{n}.weight': m for n,m in masks.items()}
def fit(learn): learn.fit_one_cycle(2, 1e-2)

class Starts(Callback):
    "The model as each fit's first trained batch finds it, the position and learning rate there; and states after chosen steps of the first fit"
    order = 70
    def __init__(self, steps=()): self.starts,self.pos,self.lrs,self.at,self.steps,self.n,self.real = [],[],[],{},steps,0,False
    def before_fit(self): self.new = True
    def before_batch(self):
        if not self.training: return
        if self.new: self.starts.append(snapshot(self.model)); self.pos.append(self.pct_train)
        self.new = False
    def before_step(self): self.real = True; self.lrs.append(self.opt.hypers[-1]['lr'])
    def after_batch(self):
        if not self.training or len(self.starts)>1: return
        self.n += self.real; self.real = False
        if self.n in self.steps and self.n not in self.at: self.at[self.n] = snapshot(self.model)

# the callback alone

@pytest.mark.parametrize('scope', ['global','local'])
def test_sparsity_is_exact_in_every_round(tmp_path, scope):
    learn,cb,spy = learner(tmp_path),LotteryTicketCallback(.9, 3, scope=scope),Starts()
    gone = []
    for _ in range(5):
        learn.fit(1, 1e-2, cbs=[cb,spy])
        gone.append([int((w==0).sum()) for w in covered_weights(learn.model, NAMES).values()])
        assert learn.recorder.values[-1][-1]==sparsity_of(learn.model, NAMES)
    for r,g in enumerate(gone):
        s = ticket_sparsity(.9, 3, min(r, 3))
        if scope=='global': assert sum(g)==round(s*SUM)
        else: assert g==[round(s*N[n]) for n in NAMES]
    assert cb.finished and cb.point is None and len(spy.starts)==5

def test_each_round_removes_the_same_part_of_what_is_left():
    left = [1-ticket_sparsity(.87, 6, r) for r in range(7)]
    assert left[0]==1 and ticket_sparsity(.87, 6, 6)==.87
    assert all(abs(b/a-.13**(1/6))<1e-12 for a,b in zip(left, left[1:]))

@pytest.mark.parametrize('rewind,step', [('init',0), (3,3), (13,13), (.5,5), (1.,10), (1.3,13)])
def test_survivors_are_the_snapshot_bit_for_bit(tmp_path, rewind, step):
    learn,cb,spy = learner(tmp_path),LotteryTicketCallback(.8, 2, rewind),Starts([step])
    init,masks = snapshot(learn.model),[]
    for _ in range(3):
        learn.fit_one_cycle(2, 1e-2, cbs=[cb,spy])
        masks.append(dict(cb.masks))
    want = init if step==0 else spy.at[step]
    for s,m in zip(spy.starts[1:], masks[1:]):
        for k,v in s.items():
            if k in keys(m): assert torch.equal(v[keys(m)[k]], want[k][keys(m)[k]]) and not v[~keys(m)[k]].any()
            else: assert torch.equal(v, want[k]), k # BatchNorm statistics and the number of batches they saw among them
    assert all((masks[2][n] & ~masks[1][n]).sum()==0 for n in NAMES)
    assert cb.steps==20-step # what is left of the schedule
    assert [round(p, 6) for p in spy.pos]==[0, *[round(step/20, 6)]*2]

def test_masks_come_from_the_trained_weights(tmp_path):
    learn,cb = learner(tmp_path),LotteryTicketCallback(.5, 1)
    learn.fit(1, 1e-2, cbs=cb)
    trained = torch.cat([w.detach().abs().flatten() for w in covered_weights(learn.model, NAMES).values()])
    learn.fit(1, 1e-2, cbs=cb)
    kept = torch.cat([cb.masks[n].flatten() for n in NAMES])
    assert trained[kept].min()>=trained[~kept].max()

def test_lr_rewinding_keeps_trained_weights_and_none_keeps_the_lr(tmp_path):
    for rewind in 'lr','none':
        learn,cb,spy = learner(tmp_path),LotteryTicketCallback(.8, 2, rewind),Starts()
        learn.fit_one_cycle(2, 1e-2, div_final=10, cbs=[cb,spy])
        trained = snapshot(learn.model)
        learn.fit_one_cycle(2, 1e-2, div_final=10, cbs=[cb,spy])
        for k,v in spy.starts[1].items(): assert torch.equal(v, trained[k]*keys(cb.masks).get(k, 1)), k
        first,second = spy.lrs[:20],spy.lrs[20:]
        assert second==(first if rewind=='lr' else [first[-1]]*20)

def test_optimizer_forgets_between_rounds(tmp_path):
    class Sees(Callback):
        seen = []
        def before_step(self): self.seen.append(self.train_iter==0 and any('grad_avg' in s for s in self.opt.state.values()))
    learn = learner(tmp_path)
    learn.fit(1, 1e-2); assert any('grad_avg' in s for s in learn.opt.state.values())
    cb,sees = LotteryTicketCallback(.8, 2),Sees()
    for _ in range(3): learn.fit(1, 1e-2, cbs=[cb,sees])
    assert len(sees.seen)==30 and not any(sees.seen)

def test_iterations_are_real_optimizer_steps(tmp_path):
    learn,cb,spy = learner(tmp_path),LotteryTicketCallback(.8, 1, 4),Starts([4])
    for _ in range(2): learn.fit(2, 1e-2, cbs=[cb,spy,GradientAccumulation(32)])
    assert cb.skip==8 and cb.steps==6
    assert torch.equal(spy.starts[1]['0.weight'], spy.at[4]['0.weight'])

class Skips(Callback):
    "Calls off every second step, as AMP does after an overflow"
    def __init__(self, order): self.order = order
    def before_step(self):
        if self.train_iter%2: raise CancelStepException()

@pytest.mark.parametrize('order', [10, 90])
def test_steps_that_are_called_off_do_not_count(tmp_path, order):
    learn,cb = learner(tmp_path),LotteryTicketCallback(.8, 1, 4)
    for _ in range(2): learn.fit(2, 1e-2, cbs=[cb,Skips(order)])
    assert cb.skip==7 and cb.steps==6

def test_a_step_never_reached_is_an_error_that_loses_nothing(tmp_path):
    learn,cb = learner(tmp_path),LotteryTicketCallback(.8, 1, 15)
    acc = GradientAccumulation(32)
    learn.fit(2, 1e-2, cbs=[cb,acc])
    trained = snapshot(learn.model)
    with pytest.raises(ValueError, match='took 10 optimizer steps .20 batches. and never came to rewind=15'): learn.fit(2, 1e-2, cbs=[cb,acc])
    assert same(snapshot(learn.model), trained)

@pytest.mark.parametrize('rewind', [20, 2., 25])
def test_a_point_past_the_end_is_refused_before_training(tmp_path, rewind):
    learn = learner(tmp_path); before = snapshot(learn.model)
    with pytest.raises(ValueError, match='Nothing was trained'): learn.fit(2, cbs=LotteryTicketCallback(.8, 1, rewind))
    assert same(snapshot(learn.model), before)

def test_lr_find_validate_and_predictions_are_no_rounds(tmp_path):
    learn = learner(tmp_path, cbs=LotteryTicketCallback(.8, 2, 3)); cb = learn.lottery_ticket
    for r in range(3):
        before = snapshot(learn.model)
        with learn.no_logging(): learn.lr_find(num_it=8, show_plot=False)
        learn.validate(); learn.get_preds(); learn.predict(DLS.train_ds[0][0])
        assert same(snapshot(learn.model), before)
        learn.fit(1, 1e-2)
        assert cb.round==r and sparsity_of(learn.model, NAMES)==round(ticket_sparsity(.8, 2, r)*SUM)/SUM

class Breaks(Callback):
    "Raises at one batch of training"
    order = 80
    def __init__(self, at, exc=KeyboardInterrupt): self.at,self.exc,self.n = at,exc,0
    def after_batch(self):
        if not self.training: return
        self.n += 1
        if self.n==self.at: raise self.exc()

def test_a_broken_fit_is_no_round_and_starts_again(tmp_path):
    for rewind in 'init',3,'lr':
        for broken in 0,1:
            learn,cb,spy = learner(tmp_path),LotteryTicketCallback(.8, 2, rewind),Starts()
            for r in range(3):
                if r==broken:
                    with pytest.raises(KeyboardInterrupt): learn.fit(2, 1e-2, cbs=[cb,spy,Breaks(7)])
                learn.fit(2, 1e-2, cbs=[cb,spy])
                assert cb.round==r
            assert same(spy.starts[broken], spy.starts[broken+1])
            assert sparsity_of(learn.model, NAMES)==round(.8*SUM)/SUM

def test_a_cancelled_fit_is_a_round(tmp_path):
    learn,cb = learner(tmp_path),LotteryTicketCallback(.8, 1)
    learn.fit(2, 1e-2, cbs=[cb,Breaks(7, CancelFitException)])
    learn.fit(1, 1e-2, cbs=cb)
    assert cb.round==1 and sparsity_of(learn.model, NAMES)==round(.8*SUM)/SUM

@pytest.mark.parametrize('opt', [SGD, ranger, lambda p, lr: OptimWrapper(p, torch.optim.AdamW, lr=lr)])
def test_optimizers(tmp_path, opt):
    learn,cb,spy = learner(tmp_path, opt_func=opt),LotteryTicketCallback(.8, 1),Starts()
    init = snapshot(learn.model)
    for _ in range(2): learn.fit_one_cycle(1, 1e-2, cbs=[cb,spy])
    assert same(spy.starts[1], {k: v*keys(cb.masks).get(k, 1) for k,v in init.items()})
    assert sparsity_of(learn.model, NAMES)==round(.8*SUM)/SUM

def test_learner_is_exported_with_the_callback_and_goes_on(tmp_path):
    learn = learner(tmp_path, cbs=LotteryTicketCallback(.8, 2, 3))
    learn.logger = print
    with learn.no_logging():
        for _ in range(2): learn.fit(1, 1e-2)
    learn.export(tmp_path/'l.pkl')
    again = load_learner(tmp_path/'l.pkl')
    again.dls = DLS
    with again.no_logging(): again.fit(1, 1e-2)
    assert again.lottery_ticket.round==2 and sparsity_of(again.model, NAMES)==round(.8*SUM)/SUM

def test_masks_that_are_held_already_are_refused(tmp_path):
    learn = learner(tmp_path)
    hold_masks(learn, {'1': torch.zeros(16,8,3,3)==1})
    before = snapshot(learn.model)
    with pytest.raises(ValueError, match='release_masks'): learn.fit(1, cbs=LotteryTicketCallback(.8, 1))
    with pytest.raises(ValueError, match='release_masks'): find_ticket(learn, fit, .8, 1)
    assert same(snapshot(learn.model), before)
    release_masks(learn)
    learn.fit(1, cbs=LotteryTicketCallback(.8, 1))

@pytest.mark.parametrize('kw,says', [(dict(sparsity=80), 'Type 0.8'), (dict(sparsity=0), 'between 0 and 1'), (dict(rounds=0), 'rounds=0'), (dict(rounds=2.5), 'rounds=2.5'),
    (dict(rewind='epoch'), "no rewind 'epoch'"), (dict(rewind=-3), 'rewind=-3'), (dict(rewind=True), 'rewind=True'), (dict(rewind=float('nan')), 'rewind=nan'),
    (dict(criterion='magnitud'), "Nearest: 'magnitude'"), (dict(criterion='snip'), "criterion 'snip' asks for")])
def test_bad_arguments(kw, says):
    with pytest.raises(ValueError, match=says): LotteryTicketCallback(**{**dict(sparsity=.8, rounds=2), **kw})

@pytest.mark.parametrize('kw,says', [(dict(include='conv*'), "no layer matches 'conv"), (dict(granularity='weigth'), 'no granularity'), (dict(granularity='2:4'), 'at most 0.5'), (dict(scope='globl'), 'no scope')])
def test_arguments_that_the_model_refuses(tmp_path, kw, says):
    learn = learner(tmp_path); before = snapshot(learn.model)
    with pytest.raises(ValueError, match=says): find_ticket(learn, fit, .8, 2, path=tmp_path/'t', **kw)
    with pytest.raises(ValueError, match=says): learn.fit(1, cbs=LotteryTicketCallback(.8, 2, **kw))
    assert same(snapshot(learn.model), before) and not (tmp_path/'t').exists()

def test_criteria_that_compare_with_the_start(tmp_path):
    learn = learner(tmp_path); init = snapshot(learn.model)
    lot = find_ticket(learn, fit, .5, 1, criterion='large_init', control=False)
    w = torch.cat([init[f'{n}.weight'].abs().flatten() for n in NAMES])
    kept = torch.cat([lot.ticket()[1][n].flatten() for n in NAMES])
    assert w[kept].min()>=w[~kept].max()

def test_what_is_gone_stays_gone_whatever_the_criterion(tmp_path):
    "A removed weight is far from where it began: by `distance` alone it would come back"
    lot = find_ticket(learner(tmp_path), fit, .8, 3, criterion='distance', control=False)
    masks = [lot.ticket(r)[1] for r in (1,2,3)]
    assert all((b[n] & ~a[n]).sum()==0 for a,b in zip(masks, masks[1:]) for n in NAMES)
    assert sum(int((~m).sum()) for m in masks[2].values())==round(.8*SUM)

# the search

def test_search_equals_the_callback(tmp_path):
    "The same seeds by hand, a fit per round"
    from fastcompress.callback.lottery import _seed, _seed_all
    a,b = learner(tmp_path),learner(tmp_path)
    lot = find_ticket(a, fit, .8, 2, 3, control=False)
    cb = LotteryTicketCallback(.8, 2, 3)
    for r in range(3):
        _seed_all(b, _seed(42, r))
        b.fit_one_cycle(2, 1e-2, cbs=cb)
    assert same(snapshot(a.model), snapshot(b.model))
    assert [r['arm'] for r in lot.rows]==['dense','ticket','ticket'] and [r['steps'] for r in lot.rows]==[20,17,17]

def test_control_has_the_ticket_s_mask_and_other_weights(tmp_path):
    for new_model in None,net:
        learn = learner(tmp_path); init = snapshot(learn.model)
        spy = Starts(); learn.add_cb(spy)
        lot = find_ticket(learn, fit, .8, 2, 3, new_model=new_model)
        dense,*arms = spy.starts
        assert [r['arm'] for r in lot.rows]==['dense','control','ticket','control','ticket']
        for r,(control,ticket) in enumerate([arms[:2], arms[2:]], 1):
            for k,m in keys(lot.ticket(r)[1]).items():
                assert not control[k][~m].any() and not ticket[k][~m].any()
                assert (control[k][m]!=ticket[k][m]).float().mean()>.99 and (control[k][m]!=init[k][m]).float().mean()>.99
            assert torch.equal(control['2.running_mean'], torch.zeros(16)) and ticket['2.running_mean'].any()
            if new_model is None: assert torch.equal(control['8.weight'].flatten().sort()[0], init['8.weight'].flatten().sort()[0])
        assert (arms[0]['8.weight']!=arms[2]['8.weight']).any() # another draw each round
        assert [round(p, 4) for p in spy.pos]==[0, 0, .15, 0, .15]
        assert [r['steps'] for r in lot.rows]==[20,20,17,20,17]

def test_shuffled_keeps_the_values_of_each_tensor():
    s = snapshot(net()); t = shuffled(s, {n for n,_ in net().named_parameters()}, 3)
    for k in s: assert torch.equal(s[k].flatten().sort()[0], t[k].flatten().sort()[0])
    assert not torch.equal(s['1.weight'], t['1.weight']) and torch.equal(s['2.running_var'], t['2.running_var'])

@pytest.mark.parametrize('rewind', ['init', 3, 'lr', 'none'])
def test_a_search_that_went_on_is_the_same_bit_for_bit(tmp_path, rewind):
    def _fit(l): l.fit(1, 1e-2); l.fit_one_cycle(2, 1e-2, div_final=5) # leaves momentum changed, which the next plain fit would see
    args = dict(sparsity=.8, rounds=2, rewind=rewind)
    a = learner(tmp_path); whole = find_ticket(a, _fit, **args)
    for at in (1, 3, 4): # dense, control, ticket of the first round after the dense
        path = tmp_path/f'{rewind}{at}'
        b,n = learner(tmp_path),[0]
        def _breaks(l):
            n[0] += 1
            if n[0]==at: l.fit(3, 1e-2, cbs=Breaks(7))
            _fit(l)
        with pytest.raises(KeyboardInterrupt): find_ticket(b, _breaks, path=path, **args)
        assert not hasattr(b, 'lottery_ticket')
        b.fit(1, 1e-3); b.validate() # usable
        for c in (b, learner(tmp_path, seed=7)): # the same learner, and a fresh one with other weights
            again = find_ticket(c, _fit, path=path, **args)
            assert again.rows==whole.rows
            assert same(snapshot(c.model), snapshot(a.model))
        for r in range(3): assert same(again.ticket(r)[0], whole.ticket(r)[0]) and same(again.ticket(r)[1], whole.ticket(r)[1])
        assert load_lottery(path).rows==whole.rows

def test_tickets_in_a_folder_are_those_in_memory_and_hold(tmp_path):
    a = learner(tmp_path); lot = find_ticket(a, fit, .8, 2, 1., path=tmp_path/'t')
    memory = find_ticket(learner(tmp_path), fit, .8, 2, 1.)
    assert lot.rows==memory.rows
    b = learner(tmp_path, seed=3)
    for r in (-1, 1, 0, 2):
        load_lottery(tmp_path/'t').apply_(b, r)
        assert same(snapshot(b.model), lot.ticket(r)[0]) and same(lot.ticket(r)[0], memory.ticket(r)[0])
        assert sparsity_of(b.model, NAMES)==round(ticket_sparsity(.8, 2, r%3)*SUM)/SUM
    b.fit(2, 1e-2)
    assert sparsity_of(b.model, NAMES)==round(.8*SUM)/SUM and same(b.mask_keeper.masks, lot.ticket()[1])
    with pytest.raises(ValueError, match='rounds 0 to 2'): lot.ticket(3)
    assert not [p for p in (tmp_path/'t').iterdir() if p.suffix=='.tmp']

def test_a_folder_of_something_else_is_refused(tmp_path):
    find_ticket(learner(tmp_path), fit, .8, 1, path=tmp_path/'t', control=False)
    before = {p.name: p.read_bytes() for p in (tmp_path/'t').iterdir()}
    for model,says in [(net(12), "'1.weight' has shape .16, 8, 3, 3. there and .12, 8, 3, 3. here"), (nn.Sequential(*net(), nn.Linear(10,10)), "lacks '9.weight'"),
                       (nn.Sequential(nn.Flatten(), nn.Linear(192,10), nn.Linear(10,10), nn.Linear(10,10)), "is of another model")]:
        with pytest.raises(ValueError, match=says): find_ticket(learner(tmp_path, model=model), fit, .8, 1, path=tmp_path/'t', control=False)
    for kw,says in [(dict(rounds=2), 'rounds=1, this one has 2'), (dict(seed=1), 'seed=42'), (dict(rewind=3), "rewind='init'"), (dict(criterion='random'), "criterion='magnitude'"), (dict(exclude='3'), 'layers=')]:
        with pytest.raises(ValueError, match=says): find_ticket(learner(tmp_path), fit, **{**dict(sparsity=.8, rounds=1, path=tmp_path/'t', control=False), **kw})
    assert before=={p.name: p.read_bytes() for p in (tmp_path/'t').iterdir()}
    (tmp_path/'u').mkdir(); (tmp_path/'u'/'thesis.txt').write_text('x')
    with pytest.raises(FileExistsError, match='Give a new folder'): find_ticket(learner(tmp_path), fit, .8, 1, path=tmp_path/'u')
    with pytest.raises(FileNotFoundError, match='no lottery in'): load_lottery(tmp_path/'u')
    with pytest.raises(ValueError, match='of another model'): load_lottery(tmp_path/'t').apply_(learner(tmp_path, model=net(12)))

def test_ticket_file(tmp_path):
    m = nn.Linear(7,3); mask = torch.rand(3,7)>.5
    save_ticket(tmp_path/'t', m.state_dict(), {'': mask}, round=3)
    w,masks,info = load_ticket(tmp_path/'t')
    assert torch.equal(w['weight'], torch.where(mask, m.weight, 0.)) and torch.equal(masks[''], mask) and info=={'round': 3}
    assert set(w)=={'weight','bias'}

def test_a_fit_of_several_fits(tmp_path):
    def _tune(l): l.fine_tune(1, 1e-2, freeze_epochs=1)
    spy = Starts()
    learn = learner(tmp_path, splitter=lambda m: [params(m[:4]), params(m[4:])], cbs=spy)
    init = snapshot(learn.model)
    lot = find_ticket(learn, _tune, .8, 2, 4)
    assert [r['steps'] for r in lot.rows]==[20,20,16,20,16]
    frozen = [(spy.starts[i], lot.ticket(r)[1]) for i,r in ((4,1), (8,2))] # fits come in pairs: dense, control, ticket, control, ticket
    for s,m in frozen: assert torch.equal(s['1.weight'], init['1.weight']*m['1']) and not torch.equal(s['8.weight'], init['8.weight'])
    assert all(p.requires_grad for p in learn.model.parameters())

def test_recorder_bars_and_hypers_are_left_alone(tmp_path):
    learn = Learner(DLS, net(), metrics=accuracy, path=tmp_path)
    learn.create_opt(); learn.opt.set_hypers(mom=.5, eps=1e-4)
    hypers = [dict(h) for h in learn.opt.hypers]
    with learn.no_bar(), learn.no_logging():
        find_ticket(learn, fit, .8, 1)
        rec = learn.recorder
        assert len(rec.values)==2 and len(rec.losses)==20 and len(rec.lrs)==20 and rec.metric_names[-2]=='sparsity'
        assert rec.values[-1][1]==pytest.approx(learn.validate()[0])
    assert [dict(h) for h in learn.opt.hypers]==hypers and hasattr(learn, 'progress')

def test_a_function_that_does_not_train_is_an_error(tmp_path):
    learn = learner(tmp_path)
    with pytest.raises(ValueError, match='ran to its end'): find_ticket(learn, lambda l: None, .8, 1)
    assert not hasattr(learn, 'lottery_ticket')
    learn.add_cb(LotteryTicketCallback(.8, 1))
    with pytest.raises(ValueError, match='brings its own'): find_ticket(learn, fit, .8, 1)

def test_granularity_and_pickle(tmp_path):
    learn = learner(tmp_path)
    lot = find_ticket(learn, fit, .5, 2, granularity='kernel', control=False)
    for r in (1,2):
        n = sum(int((~m.flatten(2).any(2)).sum()) for m in lot.ticket(r)[1].values())
        assert n==round(ticket_sparsity(.5, 2, r)*(SUM//9))
    again = pickle.loads(pickle.dumps(lot))
    assert again.rows==lot.rows and repr(again)==repr(lot) and same(again.ticket()[0], lot.ticket()[0])

# the picture

def test_table_and_picture(tmp_path):
    lots = [find_ticket(learner(tmp_path, seed=s), fit, .8, 2, seed=s) for s in range(2)]
    t = lottery_table(lots, 'valid_loss')
    for i,row in enumerate(t): assert row['mean']==pytest.approx((lots[0].rows[i]['valid_loss']+lots[1].rows[i]['valid_loss'])/2)
    ax = plot_lottery(lots).axes[0]
    assert [list(l.get_xdata()) for l in ax.lines[1:]]==[list(lots[0].values('ticket'))]*2
    assert json.loads(json.dumps(t))==t
