"DistillationCallback through every verb of a Learner; its losses against formulas written out"
import copy, pickle, random, warnings
import numpy as np, pytest, torch
from torch import nn, tensor
from torch.nn import functional as F
from fastai.callback.core import CancelBatchException, CancelFitException
from fastai.callback.fp16 import MixedPrecision
from fastai.callback.hook import ActivationStats
from fastai.callback.mixup import CutMix, MixUp
from fastai.callback.schedule import fine_tune, fit_one_cycle, lr_find
from fastai.callback.training import GradientAccumulation
from fastai.data.core import DataLoaders
from fastai.data.load import DataLoader
from fastai.learner import Callback, Learner, ValueMetric, load_learner
from fastai.losses import BCEWithLogitsLossFlat, CrossEntropyLossFlat
from fastai.metrics import accuracy
from fastai.optimizer import SGD
from fastai.torch_core import set_seed

from fastcompress.callback.distill import (DistillationCallback, OutputTap, attention_loss, bce_loss, distill_losses, feature_losses,
                                           hint_loss, kl_loss, mse_loss)
from fastcompress.callback.sparsify import SparsifyCallback
from fastcompress.data import digits
from fastcompress.prune.mask import sparsity_of

DLS = digits(n=200, size=8, bs=16) # 160 to train on: 10 batches

def net(n_out=10, mid=16): return nn.Sequential(nn.Conv2d(3,8,3,2,1), nn.ReLU(), nn.Conv2d(8,mid,3,1,1), nn.BatchNorm2d(mid), nn.ReLU(),
                                                nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(mid,n_out))
def learner(path='.', model=None, seed=0, dls=DLS, **kwargs):
    set_seed(seed)
    if dls is DLS: DLS.train.rng = random.Random(seed)
    model = net() if model is None else model if isinstance(model, nn.Module) else model()
    learn = Learner(dls, model, path=path, **dict(dict(metrics=accuracy), **kwargs))
    learn.remove_cb(learn.progress); learn.logger = lambda o: None
    return learn

pytestmark = pytest.mark.usefixtures('one_thread')

@pytest.fixture
def learn(tmp_path): return learner(tmp_path)
@pytest.fixture
def teacher():
    set_seed(7)
    return net()

def snapshot(m): return {k:v.clone() for k,v in m.state_dict().items()}
def same(m, before): return m.state_dict().keys()==before.keys() and all(torch.equal(v, before[k]) for k,v in m.state_dict().items())
def n_hooks(m): return sum(len(o._forward_hooks)+len(o._forward_pre_hooks)+len(o._backward_hooks) for o in m.modules())
def random_dls(n_inp, make_y, n=32, bs=8):
    g = torch.Generator().manual_seed(0)
    x = [torch.randn(n, 4, generator=g) for _ in range(n_inp)]
    items = list(zip(*x, make_y(x[0])))
    dls = DataLoaders(DataLoader(items, bs=bs), DataLoader(items, bs=bs))
    for dl in dls.loaders: dl.n_inp = n_inp
    dls.n_inp = n_inp
    return dls

class See(Callback):
    "Runs `f(learn)` in `event`, behind everybody else by default"
    def __init__(self, event, f, order=200): setattr(self, event, lambda: f(self.learn)); self.order = order

# losses

def test_kl_is_the_formula():
    s,t = np.random.RandomState(0).randn(2,6,5)
    for T in (1.,3.,8.):
        def soft(z): e = np.exp(z/T); return e/e.sum(1, keepdims=True)
        p,q = soft(t),soft(s)
        assert float(kl_loss(tensor(s), tensor(t), T=T))==pytest.approx(T**2*(p*np.log(p/q)).sum(1).mean(), rel=1e-9)

def test_kl_gradient_holds_its_size_over_temperature():
    set_seed(0)
    s,t = torch.randn(2,4,6, dtype=torch.float64)
    s,t = (s-s.mean(1,keepdim=True)).requires_grad_(), t-t.mean(1,keepdim=True)
    def grad(T): return torch.autograd.grad(kl_loss(s, t, T=T), s)[0]*4
    assert torch.allclose(grad(1.), (s.softmax(1)-t.softmax(1)), atol=1e-12)
    assert torch.allclose(grad(1e4), (s-t)/6, atol=1e-4)

def test_kl_takes_the_class_axis():
    set_seed(0)
    s,t = torch.randn(2,2,5,3,3)
    flat = [o.permute(0,2,3,1).reshape(-1,5) for o in (s,t)]
    assert torch.allclose(kl_loss(s, t, axis=1), kl_loss(*flat))
    assert torch.allclose(kl_loss(s.movedim(1,-1), t.movedim(1,-1), axis=-1), kl_loss(*flat))

def test_bce_is_kl_of_two_way_choices():
    set_seed(0)
    s,t = torch.randn(2,7,3, dtype=torch.float64)
    two = [torch.stack([o, torch.zeros_like(o)], -1).view(-1,2) for o in (s,t)]
    for T in (1.,5.): assert torch.allclose(bce_loss(s, t, T=T), kl_loss(*two, T=T))
    assert bce_loss(s*1e4, t*1e4, T=1.).isfinite()

def test_attention_is_the_formula():
    s,t = np.random.RandomState(0).randn(2,4,3,5,5)
    t = t[:,:2]
    def unit(a): q = (a**2).sum(1).reshape(4,-1); return q/np.sqrt((q**2).sum(1, keepdims=True))
    assert float(attention_loss(tensor(s), tensor(t)))==pytest.approx(((unit(s)-unit(t))**2).sum(1).mean())
    assert float(attention_loss(torch.zeros(1,2,2,2), torch.zeros(1,2,2,2)))==0

# what is optimised

def test_loss_value_by_hand(learn, teacher):
    seen = {}
    def look(l):
        if l.training and not seen: seen.update(x=l.xb[0].clone(), y=l.yb[0].clone(), pred=l.pred.detach().clone(), loss=l.loss.item(), grad=l.loss_grad.item(),
                                                feats=copy.deepcopy(l.model)[:3](l.xb[0]).detach())
    learn.fit(1, cbs=[See('after_loss', look), DistillationCallback(teacher, .3, 2., ['2'], .7)])
    teacher.eval()
    with torch.no_grad(): t,tf = teacher(seen['x']),teacher[:3](seen['x'])
    p,logq = (t/2).softmax(1),(seen['pred']/2).log_softmax(1)
    soft = 4*(p*(p.log()-logq)).sum(1).mean()
    def unit(a): q = a.pow(2).sum(1).flatten(1); return q/q.norm(dim=1, keepdim=True)
    feature = (unit(seen['feats'])-unit(tf)).pow(2).sum(1).mean()
    want = .7*F.cross_entropy(seen['pred'], seen['y']) + .3*soft + .7*feature
    assert seen['loss']==pytest.approx(float(want), rel=1e-5)
    assert seen['grad']==pytest.approx(seen['loss'])

def test_parts_in_history(tmp_path, teacher):
    plain_losses = []
    learn = learner(tmp_path, lambda: nn.Sequential(nn.Flatten(), nn.Linear(192,10)))
    learn.fit(1, 0., cbs=See('after_loss', lambda l: plain_losses.append(l.loss.item()) if l.training else None))
    mixed = []
    cb = DistillationCallback(teacher, .25)
    learn = learner(tmp_path, lambda: nn.Sequential(nn.Flatten(), nn.Linear(192,10)), metrics=ValueMetric(cb.task_loss))
    learn.fit(1, 0., cbs=[cb, See('after_loss', lambda l: mixed.append(l.loss.item()) if l.training else None)])
    assert cb.history[0]['task']==pytest.approx(np.mean(plain_losses), rel=1e-5)
    assert .75*cb.history[0]['task']+.25*cb.history[0]['soft']==pytest.approx(np.mean(mixed), rel=1e-5)
    assert learn.recorder.metric_names[3]=='task_loss' and learn.recorder.values[0][2]==cb.task_loss()

def test_weight_0_is_training_without(tmp_path, teacher):
    a,b = learner(tmp_path),learner(tmp_path)
    a.fit(1, 1e-2)
    DLS.train.rng = random.Random(0)
    b.fit(1, 1e-2, cbs=DistillationCallback(teacher, 0.))
    for p,q in zip(a.model.parameters(), b.model.parameters()): assert torch.allclose(p, q, atol=1e-6)

def test_it_pulls_towards_the_teacher(tmp_path, teacher):
    def apart(args):
        learn = learner(tmp_path)
        learn.fit(4, 1e-2, cbs=args and DistillationCallback(teacher, **args))
        x = DLS.valid.one_batch()[0]
        with torch.no_grad(): return kl_loss(learn.model.eval()(x), teacher.eval()(x)).item()
    assert apart(dict(weight=1.))<.5*apart(None)

def test_accumulation_is_a_big_batch(tmp_path, teacher):
    def plain(): return nn.Sequential(nn.Conv2d(3,8,3,2), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8,10))
    def fit(bs, *cbs):
        learn = learner(tmp_path, dls=digits(n=50, size=8, bs=bs), model=plain, opt_func=SGD)
        learn.fit(1, .1, wd=0., cbs=list(cbs))
        return torch.cat([p.detach().flatten() for p in learn.model.parameters()])
    def ours(): return DistillationCallback(teacher, .5, features={'1':'1'}, feature_loss=lambda s,t: (s.mean()-t.mean())**2*0+s.pow(2).mean())
    whole = fit(40, ours())
    assert torch.allclose(fit(10, GradientAccumulation(40), ours()), whole, atol=1e-5)
    assert torch.allclose(fit(10, ours(), GradientAccumulation(40)), whole, atol=1e-5)
    assert not torch.allclose(fit(40), whole, atol=1e-3)

def test_order():
    assert MixUp.order<DistillationCallback.order<GradientAccumulation.order<MixedPrecision.order

# the teacher

def test_teacher_unchanged(learn, teacher):
    teacher.train(); teacher[3].eval()
    before = snapshot(teacher)
    keys = learn.model.state_dict().keys()
    learn.fit(2, 1e-2, cbs=DistillationCallback(teacher, features=['2','4']))
    assert same(teacher, before)
    assert all(p.grad is None and p.requires_grad for p in teacher.parameters())
    assert teacher.training and teacher[0].training and not teacher[3].training
    assert learn.model.state_dict().keys()==keys
    assert {id(p) for p in learn.opt.all_params().itemgot(0)}=={id(p) for p in learn.model.parameters()}

def test_teacher_is_asked_in_eval_mode_without_gradients_in_training_only(learn, teacher):
    seen = []
    teacher.register_forward_hook(lambda m,i,o: seen.append((m.training, m[3].training, torch.is_grad_enabled(), o.requires_grad, learn.training)))
    cb = DistillationCallback(teacher.train())
    learn.fit(2, cbs=cb)
    assert seen==[(False,False,False,False,True)]*20
    with learn.added_cbs(cb):
        learn.validate(); learn.get_preds(); learn.predict(DLS.valid_ds[0][0]); learn.get_preds(ds_idx=0)
    assert len(seen)==20

def test_teacher_may_be_a_learner(learn, tmp_path):
    other = learner(tmp_path, seed=3)
    cb = DistillationCallback(other)
    assert cb.teacher is other.model
    learn.fit(1, cbs=cb)
    assert DistillationCallback(nn.DataParallel(other.model)).teacher is other.model

def test_self_is_copied_at_the_first_fit_only(learn):
    learn.fit(1, 1e-2)
    before = snapshot(learn.model)
    cb = DistillationCallback()
    learn.add_cb(cb)
    learn.validate(); learn.get_preds()
    assert cb.teacher is None
    learn.fine_tune(1, 1e-2)
    assert same(cb.teacher, before) and not same(learn.model, before)
    first = cb.teacher
    learn.fit(1, 1e-2)
    assert cb.teacher is first and same(cb.teacher, before)
    assert not any(p.requires_grad for p in cb.teacher.parameters()) and all(p.requires_grad for p in learn.model.parameters())

def test_self_is_copied_before_anything_is_pruned(learn):
    before = snapshot(learn.model)
    cb = DistillationCallback()
    learn.fit(1, cbs=[SparsifyCallback(.9, lambda pos: 1.), cb])
    assert same(cb.teacher, before)

def test_copy_leaves_the_learner_behind_other_hooks(learn):
    class Grumpy:
        def __deepcopy__(self, memo): raise AssertionError('the Learner was copied')
    learn.something = Grumpy()
    cb = DistillationCallback()
    learn.fit(1, cbs=[ActivationStats(), cb])
    assert len(learn.cbs)==len({type(o) for o in learn.cbs})

def test_shared_weights_are_refused(learn):
    for m in (learn.model, nn.Sequential(*learn.model[:4], nn.Flatten(), nn.Linear(16*16,10))):
        with pytest.raises(ValueError, match='the teacher shares weights with the model'): learn.fit(1, cbs=DistillationCallback(m))

# validation

def test_validation_is_bit_identical(learn, teacher):
    plain = learn.validate()[:2]
    preds = learn.get_preds(with_loss=True)
    learn.add_cb(DistillationCallback(teacher, .9, features=['2']))
    assert learn.validate()[:2]==plain
    for a,b in zip(learn.get_preds(with_loss=True), preds): assert torch.equal(a, b)
    learn.fit(1, 0., wd=0.)
    in_fit = learn.recorder.values[0][1]
    learn.remove_cb(learn.distillation)
    assert learn.validate()[0]==in_fit

def test_valid_loss_of_a_fit_is_the_task_loss(learn, teacher):
    losses = []
    learn.fit(2, 1e-2, cbs=[DistillationCallback(teacher, .9), See('after_loss', lambda l: None if l.training else losses.append((l.loss.item(), l.loss_func(l.pred, *l.yb).item())))])
    assert len(losses)==2*len(DLS.valid) and all(a==b for a,b in losses)

def test_silent(learn, teacher, capsys):
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        learn.fit(2, cbs=DistillationCallback(teacher, features=['2']))
    assert capsys.readouterr()==('','')

# hooks

class Boom(Callback):
    "Raises `error` in the third training batch (or validation) when `at` happens"
    def __init__(self, at, error, order=200): setattr(self, at, self._raise); self.error,self.order = error,order
    def _raise(self):
        if not self.training and hasattr(self, 'before_validate') or self.training and self.iter==2: raise self.error

@pytest.mark.parametrize('at', 'before_batch after_pred after_loss after_backward after_step after_batch before_validate'.split())
@pytest.mark.parametrize('error', [KeyboardInterrupt, RuntimeError('x'), CancelFitException, CancelBatchException])
def test_no_hook_survives_a_fit(tmp_path, teacher, at, error):
    learn = learner(tmp_path)
    def fit():
        try: learn.fit(1, cbs=[DistillationCallback(teacher, features=['2','4']), Boom(at, error)])
        except (KeyboardInterrupt, RuntimeError, CancelBatchException): pass
    fit()
    assert n_hooks(learn.model)==n_hooks(teacher)==0

class Stops(nn.Module):
    "Interrupts in the middle of a forward pass"
    def __init__(self, error): super().__init__(); self.error = error
    def forward(self, x):
        if self.error: raise self.error
        return x

@pytest.mark.parametrize('who', ['student','teacher'])
def test_interrupted_inside_forward(tmp_path, who):
    def model(error): return nn.Sequential(nn.Conv2d(3,8,3,2,1), Stops(error), nn.Conv2d(8,8,3,1,1), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8,10))
    s,t = (model(KeyboardInterrupt if who==o else None) for o in ('student','teacher'))
    learn = learner(tmp_path, s)
    with pytest.raises(KeyboardInterrupt): learn.fit(1, cbs=DistillationCallback(t, features=['0','2']))
    assert n_hooks(s)==n_hooks(t)==0
    learn.add_cb(DistillationCallback(t, features=['0','2']))
    with pytest.raises(KeyboardInterrupt): learn.fit(1)
    if who=='student': # attached for good: nothing of fastai's tells us; what is left does nothing in a copy, and goes with the next event
        assert n_hooks(s)==1
        s[1].error = None
        x = torch.randn(2,3,8,8)
        for twin in (copy.deepcopy(s), pickle.loads(pickle.dumps(s))): assert torch.equal(twin(x), twin(x))
    t[1].error = s[1].error = None
    learn.validate()
    assert n_hooks(s)==n_hooks(t)==0
    learn.fit(1)
    assert n_hooks(s)==n_hooks(t)==0

def test_a_hook_left_goes_when_the_model_is_called():
    m = net()
    tap = OutputTap(m, ['2'])
    m(torch.randn(2,3,8,8))
    assert n_hooks(m)==0 and tap.out['2'].shape==(2,16,4,4)
    with pytest.raises(AttributeError): OutputTap(m, ['9'])

# verbs

def test_lr_find_changes_nothing(learn, tmp_path):
    cb = DistillationCallback(features=['2'])
    learn.add_cb(cb)
    learn.fit(1, 1e-3)
    before,state,taught,history = snapshot(learn.model),copy.deepcopy(learn.opt.state_dict()),snapshot(cb.teacher),list(cb.history)
    learn.lr_find(num_it=15, show_plot=False)
    assert same(learn.model, before) and same(cb.teacher, taught) and cb.history==history and n_hooks(learn.model)==0
    for a,b in zip(learn.opt.state_dict()['state'], state['state']):
        for k in b: assert torch.equal(torch.as_tensor(a[k]), torch.as_tensor(b[k]))

def test_lr_find_first(learn):
    cb = DistillationCallback()
    learn.add_cb(cb)
    before = snapshot(learn.model)
    losses = []
    learn.add_cb(See('after_loss', lambda l: losses.append(l.loss.item())))
    learn.lr_find(num_it=15, show_plot=False)
    assert len(losses)>=10 and same(learn.model, before) and cb.teacher is None and cb.history==[]
    learn.remove_cb(cb); learn.fit(1, 1e-2)
    trained = snapshot(learn.model)
    learn.add_cb(cb); learn.fit(1, 1e-2)
    assert same(cb.teacher, trained)

def test_export_and_load(learn, teacher, tmp_path):
    class Heavy(nn.Module):
        def __init__(self): super().__init__(); self.m = teacher
        def forward(self, x): return self.m(x)
        def __reduce__(self): raise AssertionError('the teacher was pickled')
    learn.add_cb(DistillationCallback(Heavy()))
    learn.fit(1, 1e-2)
    preds = learn.get_preds()[0]
    learn.export('a.pkl')
    assert learn.distillation.teacher is not None
    learn.fit(1, 1e-2)
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        new = load_learner(tmp_path/'a.pkl')
    assert new.distillation.teacher is None
    new.logger = lambda o: None
    assert torch.allclose(new.get_preds(dl=DLS.valid)[0], preds, atol=1e-6)
    new.predict(DLS.valid_ds[0][0])
    new.dls = DLS
    before = snapshot(new.model)
    with pytest.raises(ValueError, match='the teacher isn\'t saved or copied with a Learner'): new.fit(1)
    assert same(new.model, before)
    assert copy.deepcopy(new).distillation._lost
    new.distillation.teacher = teacher
    new.fit(1)

def test_export_of_a_copy_not_yet_made(learn, tmp_path):
    learn.add_cb(DistillationCallback())
    learn.export('a.pkl')
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        new = load_learner(tmp_path/'a.pkl')
    new.dls,new.logger = DLS,lambda o: None
    before = snapshot(new.model)
    new.fit(1, 1e-2)
    assert same(new.distillation.teacher, before)

def test_save_and_load(learn, teacher):
    learn.add_cb(DistillationCallback(teacher, features=['2']))
    learn.fit(1, 1e-2)
    before = snapshot(learn.model)
    learn.save('m'); learn.fit(1, 1e-2); learn.load('m')
    assert same(learn.model, before)

@pytest.mark.parametrize('mix', [MixUp, CutMix])
def test_teacher_sees_the_mixed_batch(learn, teacher, mix):
    student,taught = [],[]
    learn.model.register_forward_pre_hook(lambda m,x: student.append(x[0].clone()) if m.training else None)
    teacher.register_forward_pre_hook(lambda m,x: taught.append(x[0].clone()))
    learn.fit(1, cbs=[DistillationCallback(teacher), mix()])
    assert len(taught)==10 and all(torch.equal(a,b) for a,b in zip(student, taught, strict=True))
    assert learn.loss_func is DLS.train_ds.loss_func or type(learn.loss_func) is type(learner().loss_func)

class CpuAutocast(Callback):
    "What MixedPrecision does, event by event, on a CPU"
    order = MixedPrecision.order
    def before_batch(self): self.cast = torch.autocast('cpu', torch.bfloat16); self.cast.__enter__()
    def after_pred(self): self.learn.pred = self.learn.pred.float()
    def after_loss(self): self.cast.__exit__(None, None, None)

def test_autocast(learn, teacher):
    seen,losses = [],[]
    def spy(s, t): losses.append((s.dtype, t.dtype, torch.is_autocast_enabled('cpu'))); return kl_loss(s, t)
    teacher.register_forward_hook(lambda m,i,o: seen.append((o.dtype, torch.is_autocast_enabled('cpu'))))
    feats = lambda s,t: (losses.append((s.dtype, t.dtype, torch.is_autocast_enabled('cpu'))), attention_loss(s,t))[1]
    learn.fit(1, cbs=[DistillationCallback(teacher, features=['2'], loss=spy, feature_loss=feats), CpuAutocast()])
    assert seen==[(torch.bfloat16, True)]*10
    assert losses==[(torch.float32, torch.float32, False)]*20
    assert not torch.is_autocast_enabled('cpu') and all(p.dtype==torch.float32 for p in learn.model.parameters())

def test_half_precision_student_of_a_float_teacher(tmp_path, teacher):
    learn = learner(tmp_path, net().bfloat16())
    learn.add_cbs([See('before_batch', lambda l: setattr(l, 'xb', tuple(x.bfloat16() for x in l.xb)), 5),
                   See('after_pred', lambda l: setattr(l, 'pred', l.pred.float()), 5)])
    cb = DistillationCallback(teacher, features=['2'])
    learn.fit(1, cbs=cb)
    assert np.isfinite(cb.history[0]['soft']) and teacher[0].weight.dtype==torch.float32

# models and tasks

class Two(nn.Module):
    def __init__(self, kind='tensor'): super().__init__(); self.a,self.kind = nn.Linear(4,3),kind
    def forward(self, x, z):
        y = self.a(x-z)
        return dict(tensor=y, tuple=(y,x), dict=dict(out=y))[self.kind]

def test_several_inputs_and_outputs():
    dls = random_dls(2, lambda x: (x.sum(1)>0).long())
    def ce(o, y): return F.cross_entropy(o if isinstance(o, torch.Tensor) else o[0] if isinstance(o, tuple) else o['out'], y)
    def fit(s, t, **kwargs):
        set_seed(0)
        learn = learner(dls=dls, model=Two(s), loss_func=ce, metrics=[])
        set_seed(1)
        cb = DistillationCallback(Two(t), **kwargs)
        learn.fit(1, cbs=cb)
        return cb.history[0]['soft']
    plain = fit('tensor','tensor')
    assert fit('tuple','tuple', output=0)==plain==fit('tensor','tuple', output=0)==fit('dict','dict', output='out')
    assert fit('tuple','tuple', output=lambda o: o[0])==plain
    with pytest.raises(ValueError, match='the student gives a tuple, and a tensor is needed. Say what to compare: output=0'): fit('tuple','tuple')
    with pytest.raises(ValueError, match='the teacher gives a dict'): fit('tensor','dict')

def test_regression_and_multilabel():
    lin = lambda n: nn.Linear(4,n)
    dls = random_dls(1, lambda x: x.sum(1, keepdim=True))
    def fit(dls, n, loss_func, **kwargs):
        learn = learner(dls=dls, model=lin(n), loss_func=loss_func, metrics=[])
        cb = DistillationCallback(lin(n), **kwargs)
        learn.fit(5, .05, cbs=cb)
        return [h['soft'] for h in cb.history]
    soft = fit(dls, 1, nn.MSELoss(), loss='mse', weight=1.)
    assert soft[-1]<.7*soft[0]
    with pytest.raises(ValueError, match="trained with MSELoss doesn't give them. Type loss='mse'"): fit(dls, 1, nn.MSELoss())
    with pytest.raises(ValueError, match="holds one number. Type loss='mse' for regression"): fit(dls, 1, lambda o,y: F.mse_loss(o,y))
    dls = random_dls(1, lambda x: (x[:,:2]>0).float())
    soft = fit(dls, 2, BCEWithLogitsLossFlat(), loss='bce', weight=1.)
    assert soft[-1]<.7*soft[0]
    with pytest.raises(ValueError, match="BCEWithLogitsLoss doesn't give them. Type loss='bce'"): fit(dls, 2, BCEWithLogitsLossFlat())

def test_class_axis_comes_from_the_loss_function():
    dls = random_dls(1, lambda x: torch.stack([x[:,0]>0, x[:,1]>0], 1).long())
    class Seg(nn.Module): # [N, 2 positions, 3 classes]
        def __init__(self): super().__init__(); self.a = nn.Linear(4,6)
        def forward(self, x): return self.a(x).view(-1,2,3)
    seen = []
    learn = learner(dls=dls, model=Seg(), loss_func=CrossEntropyLossFlat(), metrics=[]) # fastai's default is the last axis
    t = Seg()
    cb = DistillationCallback(t)
    learn.fit(1, 0., cbs=[cb, See('after_loss', lambda l: seen.append(kl_loss(l.pred, t(*l.xb), axis=-1).item()) if l.training else None)])
    assert cb.history[0]['soft']==pytest.approx(np.mean(seen), rel=1e-5)

def test_features_only_with_other_classes(learn):
    cb = DistillationCallback(net(n_out=3, mid=24), 0., features=['0','2'])
    learn.fit(2, 1e-2, cbs=cb)
    assert set(cb.history[0])=={'task','features'} and cb.history[1]['features']<cb.history[0]['features']

def test_features_are_averaged(tmp_path, teacher):
    def first(features):
        cb = DistillationCallback(teacher, features=features)
        learner(tmp_path).fit(1, 0., cbs=cb)
        return cb.history[0]['features']
    one,other,both = first('2'),first('4'),first(['2','4'])
    assert one!=other and both==pytest.approx((one+other)/2, rel=1e-5)

def test_a_broken_first_batch_changes_nothing(learn):
    before = snapshot(learn.model)
    for args,says in ((dict(teacher=net(3)), r'the student gives \[16, 10\], the teacher \[16, 3\]'),
                      (dict(teacher=net(mid=4), features=['2'], feature_loss='mse'), "Type feature_loss='attention'"),
                      (dict(features=['7']), "Type feature_loss='mse'"),
                      (dict(features=['zz']), "no layer 'zz' in the student. Known:"),
                      (dict(teacher=net(), features={'2':'8'}), "no layer '8' in the teacher")):
        with pytest.raises(ValueError, match=says): learn.fit(1, 1e-1, cbs=DistillationCallback(**args))
        assert same(learn.model, before) and n_hooks(learn.model)==0
    learn.fit(1, 1e-1, cbs=DistillationCallback())
    assert not same(learn.model, before)

def test_layers_that_do_not_run(tmp_path):
    class Lazy(nn.Module):
        def __init__(self): super().__init__(); self.m,self.unused = net(),nn.Linear(2,2)
        def forward(self, x): return self.m(x)
    learn = learner(tmp_path, Lazy())
    with pytest.raises(ValueError, match="layer 'unused' of the student didn't run"): learn.fit(1, cbs=DistillationCallback(features=['unused']))
    assert n_hooks(learn.model)==0

@pytest.mark.parametrize('args,says', [(dict(weight=1.1), 'weight=1.1'), (dict(weight='a'), "weight='a'"), (dict(temperature=-1), 'temperature=-1'),
                                       (dict(temperature=float('nan')), 'temperature=nan'), (dict(feature_weight=-1), 'feature_weight=-1'),
                                       (dict(loss='mes'), "no distillation loss 'mes'. Nearest: 'mse'"), (dict(feature_loss='kl'), "no feature loss 'kl'")])
def test_arguments(args, says):
    with pytest.raises(ValueError, match=says): DistillationCallback(**args)

def test_own_losses(learn, teacher):
    calls = []
    @distill_losses('first_logit')
    def first_logit(s, t, T, axis): calls.append((T, axis)); return (s-t)[:,0].pow(2).mean()
    try: learn.fit(1, cbs=DistillationCallback(teacher, loss='first_logit', temperature=3., features=['2'], feature_loss=hint_loss))
    finally: del distill_losses['first_logit']
    assert calls[0]==(3., learn.loss_func.axis) and set(distill_losses)=={'kl','mse','bce'} and set(feature_losses)=={'attention','mse'}

# with SparsifyCallback

@pytest.mark.parametrize('order', [1,-1])
def test_sparse_and_distilled(learn, order):
    learn.fit(2, 1e-2)
    before = snapshot(learn.model)
    cb = DistillationCallback(features=['2','4'], feature_loss='mse')
    learn.fit_one_cycle(4, 1e-2, cbs=[SparsifyCallback(.8, include='2'), cb][::order])
    w = learn.model[2].weight
    assert int((w==0).sum())==round(.8*w.numel())
    assert same(cb.teacher, before)
    assert all(h['features']>0 and h['soft']>=0 for h in cb.history[1:]) and len(cb.history)==4
    learn.fit(1, 1e-2, cbs=cb)
    assert int((w==0).sum())==round(.8*w.numel()) and same(cb.teacher, before)
