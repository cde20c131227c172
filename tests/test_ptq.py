"`learn.quantize` and `PTQCallback` under fastai's verbs: all of it or nothing, and it can be taken back"
import copy, pickle, random, warnings
import numpy as np, pytest, torch
from torch import nn
import fastai.callback.schedule
from fastai.callback.core import Callback, CancelFitException
from fastai.callback.progress import ProgressCallback
from fastai.callback.tracker import EarlyStoppingCallback, SaveModelCallback
from fastai.callback.training import GradientAccumulation
from fastai.data.core import DataLoaders
from fastai.data.load import DataLoader
from fastai.learner import Learner, load_learner
from fastai.metrics import accuracy
from fastai.torch_core import set_seed

from fastcompress.callback.quantize import PTQCallback, calibration_batches
from fastcompress.callback.sparsify import SparsifyCallback
from fastcompress.data import digits
from fastcompress.prune.remove import reestimate_norms_
from fastcompress.quantize.repair import layer_sqnr
from fastcompress.quantize.simulate import simulation

pytestmark = pytest.mark.usefixtures('one_thread')
FAST = dict(adaround=dict(iters=15, patches=128), n_batches=2)


def conv(i, o, k=3, g=1): return nn.Sequential(nn.Conv2d(i, o, k, 2 if k==3 and g==1 else 1, k//2, groups=g, bias=False), nn.BatchNorm2d(o), nn.ReLU(inplace=True))
def net(): return nn.Sequential(conv(3,8), conv(8,8,3,8), conv(8,16,1), conv(16,16), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16,10))

def quiet(row): pass

def learner(path='.', dls=None, model=None):
    set_seed(0)
    learn = Learner(dls or DLS, model or net(), metrics=accuracy, path=path)
    learn.remove_cbs(ProgressCallback)
    learn.logger = quiet
    return learn

set_seed(0)
DLS = digits(n=160, bs=32)

@pytest.fixture(scope='module')
def trained():
    learn = learner(); learn.fit(3, 1e-2)
    reestimate_norms_(learn.model, calibration_batches(DLS)) # twelve steps are too few for running averages
    return copy.deepcopy(learn.model.state_dict())

@pytest.fixture
def learn(tmp_path, trained):
    learn = learner(tmp_path)
    learn.model.load_state_dict(trained)
    return learn

def state(learn): return {k:v.clone() for k,v in learn.model.state_dict().items()}
def same(a, b): return a.keys()==b.keys() and all(torch.equal(v, b[k]) for k,v in a.items())
def logits(learn, x=None):
    learn.model.eval()
    with torch.no_grad(): return learn.model(torch.ones(2,3,32,32) if x is None else x)


# ---- what is asked for is what is there

@pytest.mark.parametrize('mode', ['static','dynamic','weight_only'])
def test_modes(learn, mode):
    y = logits(learn)
    sim = learn.quantize(mode=mode, w_bits=4, n_batches=2)
    assert simulation(learn.model) is sim and not torch.equal(logits(learn), y)
    inputs = {k for s in sim.placement.spots.values() for k in s.inputs.values()}
    assert bool(inputs)==(mode!='weight_only') and len(sim.placement.weights)==5
    if mode=='dynamic': # each batch its own grid: scaling the input scales all it says of the range
        a,b = (sim['0.0:conv2d<0'].fake(x) for x in (torch.linspace(0, 1, 50), torch.linspace(0, 100, 50)))
        torch.testing.assert_close(a*100, b)
    learn.validate()
    learn.dequantize()
    assert torch.equal(logits(learn), y)

def test_widths_by_name_and_glob(learn):
    sim = learn.quantize(w_bits={'0.0':8, '?.0':3, '*':5}, a_bits={'input':6, '*':7}, n_batches=2)
    assert {k.split(':')[0]:sim[k].bits for k in sim.placement.weights}=={'0.0':8, '1.0':3, '2.0':3, '3.0':3, '6':5}
    assert sim['input'].bits==6 and all(sim[k].bits==7 for k in sim.placement.acts if k!='input')

def test_one_scale_or_many(learn):
    for per_channel in True, False:
        sim = learn.quantize(per_channel=per_channel, n_batches=1)
        assert [sim[k].scale.numel() for k in sim.placement.weights]==([8,8,16,16,10] if per_channel else [1]*5)

def test_searched_widths_fit_the_budget(learn):
    sim = learn.quantize(mixed=dict(budget='0.15x', bits=(2,3,4,6,8)), n_batches=2)
    size = {k:learn.model.get_parameter(k.split(':')[0]+'.weight').numel() for k in sim.placement.weights}
    assert sum(n*sim[k].bits/8 for k,n in size.items()) <= .15*4*sum(size.values()) and len({sim[k].bits for k in size})>1
    sim = learn.quantize(mixed='0.2x', w_bits={'6':8}, n_batches=2)
    assert sim['6:linear.weight'].bits==8

@pytest.mark.parametrize('kw,better', [(dict(adaround=True), 2.), (dict(bias_correct=True), 1.), (dict(reestimate_bn=True), 1.), (dict(adaround=True, bias_correct=True, equalize=True), 2.)],
                         ids=['adaround','bias','bn','all'])
def test_repairs_help(learn, kw, better):
    from fastcompress.measure.quality import sqnr
    x = torch.cat([b[0] for b in learn.dls.valid])
    y = logits(learn, x)
    learn.quantize(w_bits=3)
    plain = sqnr(y, logits(learn, x))
    learn.quantize(w_bits=3, **kw)
    assert sqnr(y, logits(learn, x)) > plain+better
    learn.dequantize()
    assert torch.equal(logits(learn, x), y)

def test_analytic_correction_is_a_step_of_its_own(learn):
    before = state(learn)
    learn.quantize(w_bits=3, bias_correct='analytic', n_batches=1)
    now = state(learn)
    assert not torch.equal(now['1.1.running_mean'], before['1.1.running_mean']) and torch.equal(now['0.1.running_mean'], before['0.1.running_mean'])


# ---- all or nothing

class Boom(Exception): pass

def broken(learn, what):
    "Arguments that make `learn.quantize` fail, and how"
    nan = [(torch.rand(4,3,32,32), None), (torch.full((4,3,32,32), float('nan')), None)]
    def bad_weights(w, qmax): raise Boom
    class Late:
        def __iter__(self):
            yield nan[0]
            raise KeyboardInterrupt
    return {'bits':(dict(w_bits=1), ValueError, '2 to 16'), 'wide':(dict(a_bits=17), ValueError, '2 to 16'), 'name':(dict(w_bits={'1.O':4}), ValueError, "1.0"),
            'glob bits':(dict(w_bits={'*':1}), ValueError, '2 to 16'), 'no number':(dict(w_bits='8'), ValueError, '2 to 16'),
            'mode':(dict(mode='dynamik'), ValueError, "'dynamic'"), 'observer':(dict(observer='histogramm'), ValueError, "'histogram'"),
            'correct':(dict(bias_correct='empirical'), ValueError, "'analytic'"), 'budget':(dict(mixed='10 B'), ValueError, 'fewest bits'),
            'both':(dict(mixed='0.2x', w_bits=4), ValueError, 'mixed alone'), 'no budget':(dict(mixed=dict(bits=(2,4))), ValueError, 'needs a budget'),
            'nan':(dict(dl=nan), ValueError, 'while calibrating'), 'empty':(dict(dl=[]), ValueError, 'no calibration data'),
            'adaround':(dict(adaround=dict(iterations=3)), TypeError, 'iterations'), 'ctrl-c':(dict(dl=Late()), KeyboardInterrupt, ''),
            'weights':(dict(weight_observer=bad_weights), Boom, '')}[what]

@pytest.mark.parametrize('was', ['float','quantized','repaired'])
@pytest.mark.parametrize('what', ['bits','wide','name','glob bits','no number','mode','observer','correct','budget','both','no budget','nan','empty','adaround','ctrl-c','weights'])
def test_a_failure_leaves_everything_as_it_was(learn, what, was):
    if was=='quantized': learn.quantize(w_bits=4, n_batches=1)
    if was=='repaired': learn.quantize(w_bits=4, equalize=True, **FAST)
    kw,error,match = broken(learn, what)
    sim,before,y,r = simulation(learn.model),state(learn),logits(learn),(random.getstate(), torch.get_rng_state())
    with pytest.raises(error, match=match): learn.quantize(**{'equalize':True, 'n_batches':2, **kw})
    assert simulation(learn.model) is sim and same(state(learn), before) and torch.equal(logits(learn), y)
    assert random.getstate()==r[0] and torch.equal(torch.get_rng_state(), r[1])
    assert len(learn.model._forward_hooks)==len(learn.model._forward_pre_hooks)==(was!='float')

def test_interrupted_in_each_late_step(learn, monkeypatch):
    import fastcompress.quantize.search as S
    before,y = state(learn),logits(learn)
    for step in 'calibrate_','adaround_','recalibrate_','correct_bias_','float_means':
        with monkeypatch.context() as m:
            def stop(*args, **kwargs): raise KeyboardInterrupt
            m.setattr(S, step, stop)
            with pytest.raises(KeyboardInterrupt): learn.quantize(w_bits=4, equalize=True, bias_correct=True, **FAST)
        assert simulation(learn.model) is None and same(state(learn), before) and torch.equal(logits(learn), y), step

def test_nan_activations_name_the_layer(learn):
    with torch.no_grad(): learn.model[2][1].bias[0] = float('nan')
    with pytest.raises(ValueError, match=r'while calibrating 2\.'): learn.quantize(n_batches=1)

def test_no_data_is_said_in_words(learn, tmp_path):
    learn.export('l.pkl')
    loaded = load_learner(tmp_path/'l.pkl')
    with pytest.raises(ValueError, match='no calibration data'): loaded.quantize()
    loaded.quantize(dl=learn.dls.train, n_batches=2)
    learn.quantize(n_batches=2, dl=learn.dls.train)
    assert simulation(loaded.model).calibrated


# ---- taking it back

def test_twice_is_once(learn):
    before = state(learn)
    learn.quantize(w_bits=4, equalize=True, bias_correct=True, **FAST)
    one = state(learn)
    learn.quantize(w_bits=4, equalize=True, bias_correct=True, **FAST)
    assert same(state(learn), one)
    learn.dequantize()
    assert same(state(learn), before)

def test_weights_trained_since_stay(learn):
    learn.quantize(w_bits=4, **FAST)
    learn.fit(1, 1e-3)
    trained = {n:p.clone() for n,p in learn.model.named_parameters()}
    learn.dequantize()
    assert all(torch.equal(p, trained[n]) for n,p in learn.model.named_parameters())

def test_class_keys_and_pickle(learn):
    keys,cls,size = list(learn.model.state_dict()),type(learn.model),len(pickle.dumps(learn.model))
    learn.quantize(w_bits=4, equalize=True, bias_correct=True, **FAST)
    assert type(learn.model) is cls and [k for k in learn.model.state_dict() if 'fastcompress_quant' not in k]==keys
    assert len(pickle.dumps(learn.model)) < size+60_000 # no copy of the weights travels with it

def test_repeatable_and_draws_no_random_numbers(learn):
    states = []
    for _ in range(2):
        r = random.getstate(),torch.get_rng_state(),np.random.get_state()[1].copy()
        learn.quantize(equalize=True, absorb=True, bias_correct=True, reestimate_bn=True, mixed='4 bits', **FAST)
        assert random.getstate()==r[0] and torch.equal(torch.get_rng_state(), r[1]) and (np.random.get_state()[1]==r[2]).all()
        states.append(state(learn))
    assert same(*states)

def test_pruned_zeros_hold(learn):
    learn.fit(1, 1e-3, cbs=SparsifyCallback(.5))
    gone = {n:m.clone() for n,m in learn.mask_keeper.masks.items()}
    learn.quantize(w_bits=3, equalize=True, **FAST)
    for n,m in gone.items(): assert (learn.model.get_submodule(n).weight[~m]==0).all() and (~m).any()


# ---- fastai's verbs with the callback

def test_after_the_fit(learn):
    learn.fit(1, 1e-3, cbs=PTQCallback(w_bits=4, **FAST))
    acc = learn.recorder.values[-1][-1]
    assert simulation(learn.model).calibrated and abs(learn.validate()[1]-acc)<.2

def test_settings_are_those_of_the_method():
    assert PTQCallback(4, per_channel=False).settings==dict(PTQCallback().settings, w_bits=4, per_channel=False)
    with pytest.raises(TypeError, match="'adaround'"): PTQCallback(ada_round=True)

@pytest.mark.parametrize('kw,match', [(dict(w_bits={'0.O':4}), "'0.0'"), (dict(w_bits=1), '2 to 16'), (dict(mode='x'), 'mode'), (dict(a_bits={'*':20}), '2 to 16')])
def test_a_typing_error_is_found_before_the_fit(learn, kw, match):
    before,steps = state(learn),[]
    class Count(Callback):
        def after_step(self): steps.append(1)
    with pytest.raises(ValueError, match=match): learn.fit(2, 1e-2, cbs=[PTQCallback(**kw), Count()])
    assert not steps and same(state(learn), before) and simulation(learn.model) is None

def test_lr_find_with_the_callback(learn):
    before = state(learn)
    learn.add_cb(PTQCallback(n_batches=1))
    learn.lr_find(num_it=4, show_plot=False)
    assert same(state(learn), before) and simulation(learn.model) is None
    learn.get_preds(); learn.validate(); learn.predict(learn.dls.train_ds[0][0])
    assert simulation(learn.model) is None
    learn.fit(1, 1e-3)
    sim,now = simulation(learn.model),state(learn)
    learn.get_preds(); learn.validate(); learn.lr_find(num_it=4, show_plot=False)
    assert sim is not None and simulation(learn.model) is sim and same(state(learn), now)

def test_fine_tune_trains_the_float_model_in_both_fits(tmp_path, trained):
    seen = []
    class Watch(Callback):
        def before_batch(self): seen.append(simulation(self.learn.model) is not None) if self.training else None
    def fresh(): set_seed(0); return learner(tmp_path, digits(n=160, bs=32))
    learn = fresh()
    learn.model.load_state_dict(trained)
    learn.fine_tune(1, 1e-3, freeze_epochs=1, cbs=[PTQCallback(w_bits=4, **FAST), Watch()])
    assert seen and not any(seen) and simulation(learn.model).mode=='fake'
    plain = fresh()
    plain.model.load_state_dict(trained)
    plain.fine_tune(1, 1e-3, freeze_epochs=1)
    learn.dequantize()
    torch.testing.assert_close(state(learn), state(plain)) # the callback left no trace in the training

def test_save_model_and_early_stopping(learn):
    learn.fit(3, 1e-2, cbs=[SaveModelCallback(monitor='valid_loss', fname='best'), EarlyStoppingCallback(patience=1), PTQCallback(n_batches=1)])
    best = torch.load(learn.path/'models'/'best.pth', weights_only=True)
    now = learn.model.state_dict()
    assert simulation(learn.model).calibrated and all(torch.equal(now[k], v) for k,v in best.items())

def test_gradient_accumulation(learn):
    learn.fit(1, 1e-3, cbs=[GradientAccumulation(64), PTQCallback(n_batches=1)])
    assert simulation(learn.model).calibrated

def stop(error):
    class Stop(Callback):
        order,calls = 90,0
        def after_step(self):
            self.calls += 1
            if self.calls==2: raise error
    return Stop()

def test_cancelled_and_interrupted_fits(learn):
    learn.fit(2, 1e-3, cbs=[PTQCallback(n_batches=1), stop(CancelFitException())])
    assert simulation(learn.model).calibrated
    learn.dequantize()
    for e in KeyboardInterrupt(), RuntimeError('x'):
        with pytest.raises(type(e)): learn.fit(1, 1e-3, cbs=[PTQCallback(n_batches=1), stop(e)])
        assert simulation(learn.model) is None and not learn.model._forward_hooks
        learn.validate()

def test_saved_and_loaded_elsewhere(learn, tmp_path):
    learn.quantize(w_bits={'0.0':8, '*':4}, equalize=True, bias_correct=True, **FAST)
    y = logits(learn)
    learn.save('q')
    other = learner(tmp_path)
    other.quantize(w_bits={'0.0':8, '*':4}, n_batches=1)
    other.load('q')
    assert torch.equal(logits(other), y)

@pytest.mark.parametrize('attached', [True, False])
def test_exported_and_loaded(learn, tmp_path, attached):
    cb = PTQCallback(w_bits=4, **FAST)
    learn.add_cb(cb); learn.fit(1, 1e-3)
    if not attached: learn.remove_cb(cb)
    y = logits(learn)
    learn.export('l.pkl')
    assert torch.equal(logits(load_learner(tmp_path/'l.pkl')), y) and len(learn.dls.train.items)>0

@pytest.mark.parametrize('kw', [{}, dict(adaround=True, bias_correct=True, equalize=True, mixed='4 bits', reestimate_bn=True)])
def test_silent(learn, capsys, kw):
    with warnings.catch_warnings(), learn.no_logging():
        warnings.simplefilter('error'); warnings.filterwarnings('ignore', 'numpy.core is deprecated') # fastai's
        learn.fit(1, 1e-3, cbs=PTQCallback(**{**kw, **(FAST if kw else dict(n_batches=1))}))
    assert capsys.readouterr()==('', '')

def test_scales_are_float32_under_autocast(learn):
    learn.quantize(n_batches=1, w_bits=4)
    with torch.autocast('cpu', torch.bfloat16): y = logits(learn)
    sim = simulation(learn.model)
    assert all(q.scale.dtype==torch.float32 for q in sim.quantizers.values()) and y.isfinite().all()

def test_several_inputs_and_outputs(tmp_path):
    class Two(nn.Module):
        def __init__(self): super().__init__(); self.a,self.b,self.mask,self.kind = nn.Conv2d(3,8,3,padding=1),nn.Conv2d(1,8,3,padding=1),nn.Conv2d(8,2,1),nn.Linear(8,4)
        def forward(self, u, v):
            z = torch.relu(self.a(u)+self.b(v))
            return self.mask(z), self.kind(z.mean((2,3)))
    g = torch.Generator().manual_seed(0)
    items = [(torch.randn(3,8,8,generator=g), torch.randn(1,8,8,generator=g), torch.randint(2, (8,8), generator=g), torch.tensor(1)) for _ in range(24)]
    dls = DataLoaders(DataLoader(items, bs=8), DataLoader(items, bs=8)); dls.n_inp = 2
    F = nn.functional.cross_entropy
    learn = Learner(dls, Two(), loss_func=lambda out, mask, kind: F(out[0], mask)+F(out[1], kind), path=tmp_path)
    learn.remove_cbs(ProgressCallback); learn.logger = quiet
    learn.fit(1, 1e-3, cbs=PTQCallback(w_bits=4, equalize=True, bias_correct=True, mixed=None, **FAST))
    assert len(simulation(learn.model).placement.weights)==4
    learn.validate()
    x = tuple(b[:2] for b in dls.train.one_batch()[:2])
    assert len(layer_sqnr(learn.model, x, show=False))==4

def test_pictures_and_tables(learn):
    import fastcompress.study.sqnr as S
    with pytest.raises(ValueError, match='learn.quantize'): learn.plot_sqnr()
    learn.quantize(w_bits={'1.0':2, '*':8})
    before = state(learn)
    rows = learn.layer_sqnr(2)
    assert rows.worst()=='1.0' and '1.0 costs the output most' in learn.plot_sqnr().axes[0].get_title() and same(state(learn), before)
    with pytest.raises(ValueError, match='empty'): S.plot_sqnr(type(rows)())
