"Sensitivity and the views of a Learner: values against counting and masking by hand, and nothing left behind"
import copy, json, random
import numpy as np, pytest, torch
import torch.nn.functional as F
from torch import nn
from fastai.callback.core import Callback
from fastai.callback.schedule import fit_one_cycle
from fastai.learner import Learner, ValueMetric
from fastai.metrics import F1Score, accuracy, error_rate
from fastai.torch_core import set_seed
from sklearn.metrics import f1_score

import fastcompress.study.sensitivity as module
from fastcompress.callback.hold import hold_masks, release_masks
from fastcompress.callback.sparsify import SparsifyCallback
from fastcompress.data import digits
from fastcompress.prune.mask import apply_masks_, sparse_masks, sparsity_of
from fastcompress.study.sensitivity import Batches, Sensitivity, masked, plot_sensitivity, sensitivity
from fastcompress.study.views import pattern_of, sparsity_history, sparsity_rows

DLS = digits(n=200, size=8, bs=16) # 40 to validate on: 16, 16 and 8
NAMES = ['1','3']                  # covered by default in `net`
N = {'1': 8*16*9, '3': 16*16*9}

def net(): return nn.Sequential(nn.Conv2d(3,8,3,2,1), nn.Conv2d(8,16,3,1,1), nn.BatchNorm2d(16), nn.Conv2d(16,16,3,1,1), nn.ReLU(),
                                nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16,10))

def learner(seed=0, metrics=accuracy, model=None, **kwargs):
    set_seed(seed); DLS.train.rng = random.Random(seed)
    learn = Learner(DLS, model or net(), metrics=metrics, **kwargs)
    learn.remove_cb(learn.progress); learn.logger = lambda o: None
    return learn

pytestmark = pytest.mark.usefixtures('one_thread')

@pytest.fixture(scope='module')
def trained():
    learn = learner()
    learn.fit_one_cycle(6, 1e-2)
    return learn

@pytest.fixture
def learn(trained):
    new = learner()
    new.model.load_state_dict(copy.deepcopy(trained.model.state_dict()))
    return new

def bits(model): return {k: v.detach().clone().reshape(-1).view(torch.uint8) for k,v in model.state_dict().items()}
def same_bits(model, before): return all(torch.equal(v, before[k]) for k,v in bits(model).items())

def by_hand(model, dl=DLS.valid, n=None):
    "Mean loss and accuracy in plain torch"
    bs = [b for b in dl][:n]
    x,y = (torch.cat([torch.as_tensor(b[i]).as_subclass(torch.Tensor) for b in bs]) for i in (0,1))
    with torch.no_grad(): p = copy.deepcopy(model).eval()(x)
    return float(F.cross_entropy(p, y)), float((p.argmax(1)==y).float().mean())

class Calls:
    "A loss function that counts its calls, and raises at one of them"
    def __init__(self, stop=None, exc=KeyboardInterrupt): self.n,self.stop,self.exc = 0,stop,exc
    def __call__(self, p, y):
        self.n += 1
        if self.n==self.stop: raise self.exc()
        return F.cross_entropy(p, y)

# ---- sensitivity

@pytest.mark.parametrize('n_batches', [None, 2])
def test_values_are_those_of_masking_by_hand(learn, n_batches):
    s = sensitivity(learn, (.9,.5), n_batches=n_batches)
    assert [(r['layer'], r['sparsity']) for r in s.rows] == [('1',.5), ('1',.9), ('3',.5), ('3',.9)]
    assert (s.base['loss'], s.base['accuracy']) == pytest.approx(by_hand(learn.model, n=n_batches), abs=1e-6)
    for r in s.rows:
        model = copy.deepcopy(learn.model)
        w = model[int(r['layer'])].weight.data
        gone = w.abs().flatten().argsort(stable=True)[:round(r['sparsity']*w.numel())]
        w.view(-1)[gone] = 0
        assert (r['loss'], r['accuracy']) == pytest.approx(by_hand(model, n=n_batches), abs=1e-6)
        assert r['removed'] == len(gone)/w.numel()
    assert s.settings['samples'] == (40 if n_batches is None else 32)
    assert len({r['loss'] for r in s.rows}) == 4

def test_nothing_masked_is_the_base(learn): assert all(r['loss']==s.base['loss'] for s in [sensitivity(learn, 0)] for r in s.rows)

class Watcher(Callback):
    "Would notice any event"
    def __init__(self): self.seen = []
    def __call__(self, event_name): self.seen.append(event_name)

def state(learn):
    return (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist(), learn.dls.valid.rng.getstate(), learn.dls.train.rng.getstate(),
            [m.training for m in learn.model.modules()], [p.requires_grad for p in learn.model.parameters()], [id(cb) for cb in learn.cbs], learn.recorder.values, learn.recorder.losses,
            [id(p) for p in learn.model.parameters()], [id(p.grad) for p in learn.model.parameters()], [vars(m).copy() for m in learn.metrics])

@pytest.mark.parametrize('stop,exc', [(None, None), (1, ValueError), (5, KeyboardInterrupt), (11, RuntimeError)])
def test_the_learner_is_left_as_it_was(learn, stop, exc):
    learn.fit(1, 1e-3)
    random.random(); np.random.rand(); torch.rand(1) # away from where `set_seed` left them
    learn.model[1].train(); learn.model[2].eval(); learn.model[0].requires_grad_(False)
    with torch.no_grad():
        learn.model[1].weight[0,0] = -0.
        learn.model[3].weight[0,0,0,0] = 1e-42
    learn.add_cb(watcher := Watcher())
    watcher.seen.clear()
    before,was = bits(learn.model),state(learn)
    learn.loss_func = Calls(stop, exc)
    if stop is None: sensitivity(learn)
    else:
        with pytest.raises(exc): sensitivity(learn)
    assert same_bits(learn.model, before)
    assert state(learn) == was
    assert watcher.seen == []
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in learn.model.modules())

def test_training_goes_on_as_if_nothing_had_been():
    ends = []
    for look in False,True:
        learn = learner()
        learn.fit(1, 1e-3)
        if look: sensitivity(learn, (.5,.9))
        learn.fit(1, 1e-3)
        ends.append(learn)
    assert same_bits(ends[1].model, bits(ends[0].model))
    assert [v[:3] for v in ends[0].recorder.values] == [v[:3] for v in ends[1].recorder.values]

def test_masked_zeros_come_back_whatever_happens(learn):
    w = learn.model[3].weight
    w.data[0] = float('nan')
    before = bits(learn.model)
    with pytest.raises(ZeroDivisionError):
        with masked(learn.model, '3', torch.zeros_like(w, dtype=torch.bool)):
            assert not w.any()
            1/0
    assert same_bits(learn.model, before)

def test_a_standardised_convolution_is_centred_so_that_zeros_count():
    from timm.layers import StdConv2d
    torch.manual_seed(0)
    model = nn.Sequential(StdConv2d(4, 8, 3))
    w,keep = model[0].weight,sparse_masks(model, .8, include='*')['0']
    w.data += .1
    was = w.detach().clone()
    with masked(model, '0', keep):
        assert not w[~keep].any() and w.flatten(1).mean(1).abs().max() < 1e-6
    assert torch.equal(w, was)

@pytest.mark.parametrize('stop', [7, 12, 15])
def test_an_interrupted_run_goes_on(learn, tmp_path, stop):
    path,whole = tmp_path/'new'/'s.json',sensitivity(learn, (.5,.9))
    learn.loss_func = Calls(stop)
    with pytest.raises(KeyboardInterrupt): sensitivity(learn, (.5,.9), path=path)
    n_done = (stop-1)//3-1 # three batches a point, the base first
    assert len(Sensitivity.load(path).rows) == n_done
    learn.loss_func = Calls()
    again = sensitivity(learn, (.5,.9), path=path)
    assert again == whole == Sensitivity.load(path)
    assert learn.loss_func.n == 3*(1+4-n_done)
    assert [p.name for p in path.parent.iterdir()] == ['s.json']

def test_more_points_are_added(learn, tmp_path):
    path = tmp_path/'s.json'
    sensitivity(learn, .5, include='3', path=path)
    learn.loss_func = Calls()
    s = sensitivity(learn, (.5,.8), path=path)
    assert learn.loss_func.n == 3*(1+3) and len(s.rows) == 4 and len(Sensitivity.load(path).rows) == 4
    assert [r['layer'] for r in s.rows] == ['1','1','3','3']
    assert len(sensitivity(learn, .8, include='1', path=path).rows) == 1 and len(Sensitivity.load(path).rows) == 4

@pytest.mark.parametrize('change,words', [
    (dict(criterion='random'), "criterion is 'magnitude' there and 'random' here"), (dict(granularity='channel'), "granularity is 'weight' there"),
    (dict(n_batches=1), 'samples is 40 there and 16 here'), (dict(metric=error_rate), "metric is 'accuracy' there and 'error_rate' here"), ('weights', 'weights is '),
    ('buffers', 'weights is '), ('model', "model is 'Sequential' there and 'Net' here"), ('data', 'loss of the whole network is')])
def test_a_file_of_another_run_is_refused(learn, tmp_path, change, words):
    path = tmp_path/'s.json'
    sensitivity(learn, .5, path=path)
    before = path.read_bytes()
    if change=='weights': learn.model[7].weight.data[0,0] += 1e-6
    if change=='buffers': learn.model[2].running_mean[0] += .1
    if change=='model':
        class Net(nn.Sequential): pass
        learn.model = Net(*learn.model)
    if change=='data': learn.dls = digits(n=200, size=8, bs=16, seed=7)
    with pytest.raises(ValueError, match='s.json holds points of another run: '+words): sensitivity(learn, .5, path=path, **(change if isinstance(change, dict) else {}))
    assert path.read_bytes() == before

@pytest.mark.parametrize('text,words', [('{"a": ', 'is not JSON'), ('[1]', 'was not written by'), ('{"rows": []}', 'was not written by')])
def test_a_file_of_something_else_is_refused(learn, tmp_path, text, words):
    (tmp_path/'s.json').write_text(text)
    with pytest.raises(ValueError, match='s.json '+words): sensitivity(learn, .5, path=tmp_path/'s.json')
    assert (tmp_path/'s.json').read_text() == text

def test_a_shuffled_and_a_large_validation_set_give_the_same_batches(learn, monkeypatch):
    dls = copy.copy(learn.dls); dls.loaders = [DLS.train, DLS.valid.new(shuffle=True)]
    learn.dls = dls
    a = sensitivity(learn, (0,.8), n_batches=2)
    monkeypatch.setattr(module.Batches.__init__, '__defaults__', (None, 1.))
    b = sensitivity(learn, (0,.8), n_batches=2)
    assert a == b and a.rows[0]['loss'] == a.base['loss']

def test_batches_are_kept_whole_or_not_at_all():
    dl = DLS.valid
    size = sum(t.nbytes for t in next(iter(dl)))
    for limit,kept in ((10*size, True), (1.5*size, False)):
        b = Batches(dl, limit=limit)
        assert len(list(b)) == len(list(b)) == 3 and (b.kept is not None)==kept
    part = Batches(dl)
    next(iter(part))
    assert part.kept is None and len(list(part)) == 3 # given up after one batch

@pytest.mark.parametrize('metrics,asked,name', [(None, None, None), ([accuracy, error_rate], None, 'accuracy'), ([accuracy, error_rate], 'error_rate', 'error_rate'),
                                                ([accuracy], 'loss', None), ([accuracy], error_rate, 'error_rate'), ([ValueMetric(lambda: 3., 'three'), accuracy], None, 'accuracy')])
def test_which_metric(learn, metrics, asked, name):
    learn = learner(metrics=metrics, model=learn.model)
    s = sensitivity(learn, .8, metric=asked)
    assert s.settings['metric'] == name and s.metric == (name or 'loss')
    assert list(s.base) == ['loss'] + ([name] if name else [])
    if name=='error_rate': assert s.base[name] == pytest.approx(1-by_hand(learn.model)[1])

def test_a_metric_that_collects_predictions(learn):
    s = sensitivity(learn, .8, metric=F1Score(average='macro'), include='3')
    x,y = (torch.cat([b[i].as_subclass(torch.Tensor) for b in DLS.valid]) for i in (0,1))
    model = copy.deepcopy(learn.model).eval()
    apply_masks_(model, sparse_masks(model, .8, include='3'))
    assert s.rows[0]['f1_score'] == pytest.approx(f1_score(y, model(x).argmax(1), average='macro'))

@pytest.mark.parametrize('kwargs,words', [
    (dict(sparsities=(.5,90)), 'Type 0.9'), (dict(metric='acc'), "no metric 'acc' in learn.metrics. Nearest: 'accuracy'"), (dict(criterion='magnitud'), "Nearest: 'magnitude'"),
    (dict(include='conv*'), "no layer matches 'conv\\*'"), (dict(granularity='2:4'), 'removes at most 0.5'), (dict(granularity='chanel'), "Nearest: 'channel'"),
    (dict(metric=ValueMetric(lambda: 3., 'three')), "'three' is computed by a callback"), (dict(n_batches=0), 'no batch to evaluate on')])
def test_refused_before_anything_is_masked(learn, kwargs, words):
    before = bits(learn.model)
    with pytest.raises(ValueError, match=words): sensitivity(learn, **kwargs)
    assert same_bits(learn.model, before)

def test_coarse_pieces_and_other_criteria(learn):
    s = sensitivity(learn, .5, granularity='channel', include='3')
    with masked(learn.model, '3', sparse_masks(learn.model, .5, granularity='channel', include='3')['3']):
        assert (learn.model[3].weight.flatten(1)==0).all(1).sum() == 8
        assert (s.rows[0]['loss'], s.rows[0]['accuracy']) == pytest.approx(by_hand(learn.model), abs=1e-6)
    r = sensitivity(learn, .5, criterion=lambda w: -w.abs(), include='3')
    assert r.rows[0]['loss'] > sensitivity(learn, .5, include='3').rows[0]['loss'] and r.settings['criterion'] == '<lambda>'

@pytest.mark.parametrize('bar,show,want', [(True, True, True), (False, True, False), (True, False, False)])
def test_a_progress_bar_if_the_learner_has_one(learn, monkeypatch, capsys, bar, show, want):
    seen = []
    monkeypatch.setattr(module, 'progress', lambda it, label, show: (seen.append((label, len(it), show)), it)[1])
    if bar: learn = Learner(DLS, learn.model, metrics=accuracy)
    sensitivity(learn, (.5,.9), show=show)
    assert seen == [('sensitivity', 4, want)] and capsys.readouterr().out == ''

def made(metric='accuracy', base=.9, **points):
    rows = [dict(layer=o, sparsity=f, removed=f, loss=1-v, **{metric: v}) for o,d in points.items() for f,v in d.items()]
    return Sensitivity(dict(metric=metric), {'loss': 1-base, metric: base}, rows)

def test_suggest():
    s = made(a={.5:.9, .7:.895, .9:.7}, b={.5:.88, .7:.92, .9:.89}, c={.5:.5, .7:.4, .9:.3})
    assert s.suggest(.01) == {'a': .7} # b failed at .5 already: what came after was luck
    assert s.suggest(.02) == {'a': .7, 'b': .9}
    assert s.suggest(.2) == {'a': .9, 'b': .9} and s.suggest(.4) == {'a': .9, 'b': .9, 'c': .5}
    assert s.suggest(0) == {'a': .5}
    assert s.suggest(-1) == {} and s.most_sensitive() == 'c'
    e = made('error_rate', .1, a={.5:.1, .9:.3}, b={.5:.12, .9:.05})
    assert e.suggest(.01) == {'a': .5} and e.most_sensitive() == 'a'
    assert e.suggest(.01, lower_better=False) == {'a': .9, 'b': .5}

def test_a_suggestion_can_be_trained(learn):
    s = sensitivity(learn, (.5,.7,.9))
    want = s.suggest(.1)
    assert want
    learn.fit(2, 1e-3, cbs=SparsifyCallback(want))
    for o in NAMES: assert sparsity_of(learn.model, [o]) == (round(want[o]*N[o])/N[o] if o in want else 0)

def test_json_round_trip(learn, tmp_path):
    s = sensitivity(learn, (.5,.9))
    s.rows[0]['loss'],s.rows[1]['loss'] = float('inf'),1/3
    back = Sensitivity.load(s.save(tmp_path/'s.json'))
    assert back == s and back.suggest() == s.suggest() and repr(back) == repr(s)
    assert json.loads((tmp_path/'s.json').read_text())['fastcompress'] == 'sensitivity'

def test_the_table_has_every_point():
    s = made(conv={.5:.9, .9:.7}, fc={.5:.88})
    assert [l.split() for l in s.table().splitlines()] == [['accuracy','0.5','0.9'], ['conv','0.9000','0.7000'], ['fc','0.8800'], 'all weights in place: 0.9000'.split()]
    with pytest.raises(ValueError, match="no metric 'f1'"): s.table('f1')

def test_lines_and_map():
    s = made(a={.5:.9, .9:.6}, b={.5:.8, .9:.5})
    fig = plot_sensitivity(s)
    assert fig.axes[0].get_title() == 'b is the most sensitive: accuracy 0.9 → 0.5 at 90%'
    assert [list(l.get_ydata()) for l in fig.axes[0].lines[:2]] == [[.9,.6], [.8,.5]]
    assert fig.axes[0].lines[2].get_ydata()[0] == .9
    many = made(**{f'l{i}': {.5:.9-i/100, .9:.9-i/50} for i in range(20)})
    fig = plot_sensitivity(many)
    assert np.allclose(fig.axes[0].images[0].get_array(), [[i/100, i/50] for i in range(20)])
    assert [t.get_text() for t in fig.axes[0].get_yticklabels()] == many.layers and fig.axes[0].get_title(loc='right').startswith('l19 is the most sensitive')
    assert len(plot_sensitivity(many, max_lines=20).axes[0].lines) == 21
    assert plot_sensitivity(s, 'loss').axes[0].get_title() == 'b is the most sensitive: loss 0.1 → 0.5 at 90%'

# ---- views

class Mixed(nn.Module):
    "Weights of all sorts: embedding, recurrent, transposed, tied, frozen"
    def __init__(self):
        super().__init__()
        self.emb,self.rnn,self.up,self.a,self.b = nn.Embedding(9,4), nn.LSTM(4,4), nn.ConvTranspose2d(6,4,3), nn.Linear(4,4), nn.Linear(4,4)
        self.b.weight = self.a.weight

def test_rows_are_counted_in_the_model():
    model = Mixed()
    with torch.no_grad():
        model.emb.weight[:3] = 0; model.rnn.weight_hh_l0[:,0] = 0; model.up.weight[:,1] = 0; model.a.weight.view(-1)[:5] = 0
    model.up.requires_grad_(False)
    learn = Learner(DLS, model, loss_func=F.cross_entropy)
    rows = {r['name']: r for r in sparsity_rows(learn)}
    assert list(rows) == ['emb','rnn.weight_ih_l0','rnn.weight_hh_l0','up','a']
    assert {o: (r['elements'], r['zeros'], r['channels']) for o,r in rows.items()} == {'emb': (36,12,3), 'rnn.weight_ih_l0': (64,0,0), 'rnn.weight_hh_l0': (64,16,0), 'up': (216,54,1), 'a': (16,5,1)}
    assert [o for o,r in rows.items() if not r['trainable']] == ['up'] and all(r['held']==0 for r in rows.values())
    assert {o: r['pattern'] for o,r in rows.items()} == {'emb': 'channel', 'rnn.weight_ih_l0': '', 'rnn.weight_hh_l0': 'input', 'up': 'channel', 'a': 'weight'}
    text = learn.sparsity_summary()
    n = sum(p.numel() for p in model.parameters())
    nonzero = sum(int((p!=0).sum()) for p in model.parameters())
    assert f'Total params: {n:,}\n' in text and f'Non-zero params: {nonzero:,}\n' in text and f'Sparsity of all params: {(n-nonzero)/n:.2%}\n' in text

def test_held_and_not_held(learn):
    masks = sparse_masks(learn.model, .5, include='3')
    hold_masks(learn, masks)
    with torch.no_grad(): learn.model[1].weight.view(-1)[:100] = 0
    rows = {r['name']: r for r in sparsity_rows(learn)}
    assert (rows['3']['zeros'], rows['3']['held'], rows['1']['zeros'], rows['1']['held']) == (N['3']//2, N['3']//2, 100, 0)
    with torch.no_grad(): learn.model[3].weight[masks['3']] = 0
    assert (lambda r: (r['zeros'], r['held']))({r['name']: r for r in sparsity_rows(learn)}['3']) == (N['3'], N['3']//2)
    cells = {l.split(' (')[0]: l.split() for l in learn.sparsity_summary().splitlines() if '(Conv2d)' in l}
    assert 'no' in cells['1'] and f"{N['3']//2:,}" in cells['3'] and '100.00%' in cells['3']
    assert f"Sparsity of 1 layer held: 100.00% ({N['3']:,} of {N['3']:,} weights)" in learn.sparsity_summary()

def test_summary_before_any_pruning_and_of_a_tiny_model(learn):
    text = learn.sparsity_summary()
    assert f'Sparsity of 2 layers covered by default: 0.00% (0 of {sum(N.values()):,} weights)' in text
    small = Learner(DLS, nn.Sequential(nn.Flatten(), nn.Linear(192,10)))
    assert 'Total params: 1,930' in small.sparsity_summary() and 'covered' not in small.sparsity_summary()

def test_summary_leaves_the_learner_alone(learn):
    learn.fit(1, 1e-3)
    before,was = bits(learn.model),state(learn)
    learn.sparsity_summary()
    assert same_bits(learn.model, before) and state(learn) == was

@pytest.mark.parametrize('spec', ['weight','channel','input','kernel','row','column','4x4','1x16','2:4','1:4','4:8'])
def test_patterns_are_told_from_masks(spec):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(32,32,3))
    frac = dict([('1:4', .75)]).get(spec, .5)
    keep = sparse_masks(model, frac, granularity=spec, include='*')['0']
    assert pattern_of(keep) == spec
    keep[5,7,1,1] = ~keep[5,7,1,1]
    assert pattern_of(keep) == 'weight'

def test_history_counts_steps_through_all_fits(learn):
    learn.fit(2, 1e-3, cbs=SparsifyCallback(.5, every=2))
    first = sparsity_history(learn)
    learn.fit(2, 1e-3, cbs=SparsifyCallback(.8, include='3', every=2))
    both = sparsity_history(learn)
    steps = [h[0] for h in both]
    assert both[:len(first)] == first and steps == sorted(steps) and steps[-1] > steps[len(first)-1] >= 10
    assert both[-1][3] == {'1': sparsity_of(learn.model, ['1']), '3': round(.8*N['3'])/N['3']}
    fig = learn.plot_sparsity()
    assert [b.get_width() for b in fig.axes[1].patches] == [both[-1][3][o] for o in NAMES]
    assert list(fig.axes[0].lines[0].get_ydata()) == [h[3]['1'] for h in both] and list(fig.axes[0].lines[0].get_xdata()) == steps
    assert fig.get_suptitle().startswith('Asked for 80%')

def test_bars_show_what_is_held_now(learn):
    learn.fit(1, 1e-3, cbs=SparsifyCallback(.5))
    hold_masks(learn, sparse_masks(learn.model, .9, scope='local', include=NAMES))
    assert sparsity_history(learn)[-1][3] == {o: round(.9*N[o])/N[o] for o in NAMES}

def test_nothing_to_plot(learn):
    with pytest.raises(ValueError, match='nothing was pruned: this Learner holds no masks'): learn.plot_sparsity()
    hold_masks(learn, sparse_masks(learn.model, .5))
    with pytest.raises(ValueError, match='set by hand'): learn.plot_sparsity()
    release_masks(learn)
    with pytest.raises(ValueError, match='nothing was pruned'): learn.plot_sparsity()
