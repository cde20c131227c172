"Arithmetic against torch's kernels on random and hostile input; observers; a simulated Learner under fastai's verbs"
import copy, random
import numpy as np
import pytest, torch
from hypothesis import given, settings, strategies as st
from torch import nn, tensor
from fastcompress.quantize.affine import (QParams, affine_qparams, dequantize, fake_quant, int_range, quantize, requantize,
                                          symmetric_qparams)
from fastcompress.quantize.observe import Histogram, MinMax, weight_qparams

pytestmark = pytest.mark.filterwarnings('ignore:.*quantized tensor creation.*')
floats = st.floats(-1e6, 1e6, width=32)


def torch_q(x, qp): return torch.quantize_per_tensor(x, qp.scale.item(), qp.zero_point.item(), torch.quint8)


@settings(max_examples=200, deadline=None)
@given(st.lists(floats, min_size=1, max_size=70), floats, floats)
def test_per_tensor_equals_torch(xs, a, b):
    x,qp = tensor(xs), affine_qparams(min(a, b), max(a, b))
    x = x.clamp(-2**30*qp.scale, 2**30*qp.scale) # beyond 2^31 steps torch's kernel wraps around, see below
    q = quantize(x, qp)
    assert torch.equal(q, torch_q(x, qp).int_repr())
    assert torch.equal(dequantize(q, qp), torch_q(x, qp).dequantize())
    assert torch.equal(fake_quant(x, qp), dequantize(q, qp))


def test_far_outside_the_grid_saturates_where_torch_wraps():
    "2.1e9 steps above the grid: the highest integer, not the lowest"
    x,qp = tensor([65794.]), affine_qparams(-0.0078125, 0.)
    assert quantize(x, qp)==255 and quantize(-x, qp)==0
    assert fake_quant(x, qp)==0
    assert torch_q(x, qp).int_repr()==0, 'torch has mended its kernel: drop the clamp above'


@pytest.mark.parametrize('x', [torch.zeros(5), torch.full((5,), 3.7), tensor([1e-45, -1e-40, 1e-38]), tensor([3e38, -3e38, 1e30]),
                               tensor([-0.]), tensor([2.5])], ids=['zeros','equal','subnormal','huge','minus zero','single'])
def test_hostile_input(x):
    qp = affine_qparams(x.min().clamp(-1e30, 1e30), x.max().clamp(-1e30, 1e30))
    assert torch.equal(quantize(x, qp), torch_q(x, qp).int_repr())
    assert torch.equal(quantize(torch.zeros(1), qp).int(), qp.zero_point.view(1))


@settings(max_examples=100, deadline=None)
@given(st.integers(2, 16), floats, floats, st.booleans())
def test_properties(bits, a, b, signed):
    lo,hi = min(a, b, 0.), max(a, b, 0.)
    qp = affine_qparams(lo, hi, bits, signed)
    x = torch.linspace(lo, hi, 97)
    y = dequantize(quantize(x, qp), qp)
    assert torch.equal(dequantize(quantize(y, qp), qp), y), 'idempotent'
    assert ((x-y).abs() <= qp.scale*0.5 + 1e-5*x.abs() + 1e-30).all(), 'within half a step'
    assert (y.diff() >= 0).all(), 'monotone'
    assert dequantize(quantize(torch.zeros(1), qp), qp) == 0, 'zero is exact'
    assert qp.qmin <= qp.zero_point <= qp.qmax and (qp.qmin, qp.qmax) == int_range(bits, signed)


def test_requantize_equals_the_float_formula():
    g = torch.Generator().manual_seed(0)
    x,w = torch.randint(0, 256, (64, 300), generator=g), torch.randint(-127, 128, (300, 32), generator=g)
    sx,sw,sy = 0.02, 0.003, 0.11
    acc = ((x-7)@w).int()
    got = requantize(acc, sx*sw/sy, QParams(tensor(sy), tensor(128, dtype=torch.int32), 0, 255))
    want = (torch.round(acc.double()*(sx*sw/sy))+128).clamp(0, 255)
    assert (got.double()-want).abs().max() <= 1 and (got.double()!=want).float().mean() < 1e-3


@pytest.mark.parametrize('bad', [float('nan'), float('inf'), -float('inf')])
def test_observers_refuse_what_is_no_number(bad):
    for o in MinMax(), Histogram():
        with pytest.raises(ValueError, match='nan or inf'): o.update_(tensor([1., bad]))
    with pytest.raises(ValueError, match='nan or inf'): weight_qparams(tensor([[1., bad]]))
    if bad == bad:
        with pytest.raises(ValueError, match='inf or nan'): affine_qparams(0., abs(bad))


@settings(max_examples=30, deadline=None)
@given(st.lists(st.floats(1e-3, 1e4), min_size=1, max_size=6), st.integers(0, 1000))
def test_histogram_counts_every_number_once(sizes, seed):
    "Whatever order the ranges come in, widening loses and moves nothing out of its bin"
    g = torch.Generator().manual_seed(seed)
    parts = [torch.randn(500, generator=g)*s for s in sizes] + [torch.zeros(10)]
    h = Histogram(bins=256)
    for p in parts: h.update_(p)
    x = torch.cat(parts)
    assert h.counts.sum() == (x!=0).sum()
    edges = torch.linspace(-h.r, h.r, 257, dtype=torch.float64)
    want = torch.histogram(x[x!=0].double(), edges).hist
    assert torch.equal(h.counts, want)


def test_histogram_halves_equal_the_whole():
    x = torch.randn(4000, generator=torch.Generator().manual_seed(1))
    a,b = Histogram(), Histogram()
    a.update_(x)
    for p in x.split(100): b.update_(p)
    assert a.r==b.r and torch.equal(a.counts, b.counts) and a.range()==b.range()


def test_least_error_beats_minmax():
    torch.manual_seed(0)
    x = torch.cat([torch.randn(100_000), tensor([60.])])
    o = Histogram(); o.update_(x)
    def err(r, bits): return (x-fake_quant(x, affine_qparams(*r, bits=bits))).square().sum()
    for bits in 4, 8: assert err(o.range(0, 2**bits-1), bits) <= err(o.minmax.range(), bits)*1.001
    assert err(o.range(0, 15), 4) < err(o.minmax.range(), 4)/5


# a Learner

@pytest.fixture(scope='module')
def trained():
    from fastai.learner import Learner
    from fastai.metrics import accuracy
    from fastai.callback.progress import ProgressCallback
    import fastai.callback.schedule, fastcompress.callback.quantize
    from fastai.torch_core import set_seed
    from fastcompress.data import digits
    set_seed(0)
    def conv(i, o): return nn.Sequential(nn.Conv2d(i, o, 3, 2, 1, bias=False), nn.BatchNorm2d(o), nn.ReLU(inplace=True))
    net = nn.Sequential(conv(3,16), conv(16,32), conv(32,32), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(128,10))
    learn = Learner(digits(n=600, bs=32), net, metrics=accuracy)
    learn.remove_cbs(ProgressCallback)
    learn.logger = _quiet
    learn.fit_one_cycle(4, 1e-2)
    return learn


def _quiet(row): pass


@pytest.fixture
def learn(trained):
    trained.dequantize()
    state = copy.deepcopy(trained.model.state_dict())
    yield trained
    trained.dequantize()
    trained.model.load_state_dict(state)


def logits(model, x):
    with torch.no_grad(): return model.eval()(x)


def test_simulated_learner_answers(learn):
    loss,acc = learn.validate()
    learn.quantize()
    loss8,acc8 = learn.validate()
    assert loss8!=loss and abs(acc8-acc)<=0.02
    preds,targs = learn.get_preds()
    assert preds.shape==(120,10) and ((preds.argmax(1)==targs).float().mean()-acc8).abs()<1e-6
    assert learn.predict(learn.dls.valid_ds[0][0])[0] in learn.dls.vocab
    learn.dequantize()
    assert learn.validate()==[loss, acc]


def test_class_and_keys_stay(learn):
    keys,cls,n = list(learn.model.state_dict()), type(learn.model), len(learn.model)
    learn.quantize()
    assert type(learn.model) is cls and len(learn.model)==n
    new = [k for k in learn.model.state_dict() if 'fastcompress_quant' not in k]
    assert new==keys
    learn.model.load_state_dict({k:v for k,v in learn.model.state_dict().items() if 'fastcompress_quant' not in k}, strict=False)


def test_training_goes_on_through_the_rounding(learn):
    from fastcompress.quantize.simulate import simulation
    learn.quantize(w_bits=4, a_bits=4)
    before = learn.validate()[0]
    learn.fit(2, 1e-3)
    assert simulation(learn.model).mode=='fake' and learn.validate()[0] < before


def test_saved_and_loaded(learn, tmp_path):
    x = torch.randn(4,3,32,32)
    learn.quantize()
    y = logits(learn.model, x)
    learn.save(tmp_path/'q')
    simulation_scale = next(b for n,b in learn.model.named_buffers() if n.endswith('scale'))
    simulation_scale.mul_(2)
    assert not torch.equal(logits(learn.model, x), y)
    learn.load(tmp_path/'q')
    assert torch.equal(logits(learn.model, x), y)


def test_exported_and_loaded_learner(learn, tmp_path):
    from fastai.learner import load_learner
    x = torch.randn(4,3,32,32)
    learn.quantize()
    y = logits(learn.model, x)
    path,learn.path = learn.path, tmp_path
    try: learn.export('l.pkl')
    finally: learn.path = path
    assert torch.equal(logits(load_learner(tmp_path/'l.pkl').model, x), y)


def test_lr_find_changes_nothing(learn):
    learn.quantize()
    state = copy.deepcopy(learn.model.state_dict())
    learn.lr_find(num_it=4, show_plot=False)
    for k,v in learn.model.state_dict().items(): assert torch.equal(v, state[k]), k


def test_calibration_is_repeatable_and_draws_no_random_numbers(learn):
    scales = []
    for _ in range(2):
        r,t,n = random.getstate(), torch.get_rng_state(), np.random.get_state()[1].copy()
        learn.quantize()
        assert random.getstate()==r and torch.equal(torch.get_rng_state(), t) and (np.random.get_state()[1]==n).all()
        scales.append([b.clone() for k,b in learn.model.named_buffers() if k.endswith('scale')])
    assert all(map(torch.equal, *scales))


def test_mid_calibration_failure_leaves_the_old_ranges(learn):
    from fastcompress.quantize.simulate import calibrate_, simulation
    learn.quantize()
    x = torch.randn(4,3,32,32)
    y = logits(learn.model, x)
    with pytest.raises(ValueError, match='while calibrating input'): calibrate_(learn.model, [x, x*float('nan')], show=False)
    assert torch.equal(logits(learn.model, x), y) and simulation(learn.model).mode=='fake'


def test_integer_model_stands_in_a_learner(learn, tmp_path):
    from fastai.learner import Learner, load_learner
    from fastai.callback.progress import ProgressCallback
    from fastai.metrics import accuracy
    from fastcompress.deploy.lower import to_integer
    learn.quantize()
    phone = Learner(learn.dls, to_integer(learn.model, torch.randn(4,3,32,32)), metrics=accuracy, path=tmp_path)
    phone.remove_cbs(ProgressCallback)
    assert abs(phone.validate()[1]-learn.validate()[1])<=0.01
    assert phone.get_preds()[0].shape==(120,10)
    assert phone.predict(learn.dls.valid_ds[0][0])[0] in learn.dls.vocab
    y = phone.model(torch.ones(1,3,32,32))
    phone.export('i.pkl')
    assert torch.equal(load_learner(tmp_path/'i.pkl').model(torch.ones(1,3,32,32)), y)


def test_zeros_stay_zeros_in_the_integers(learn):
    from fastcompress.callback.hold import release_masks
    from fastcompress.callback.sparsify import SparsifyCallback
    from fastcompress.deploy.engines import Packed
    from fastcompress.deploy.lower import to_integer
    from fastcompress.prune.mask import covered_layers
    learn.fit(1, 1e-3, cbs=SparsifyCallback(0.8))
    assert learn.mask_keeper.masks
    names = covered_layers(learn.model)
    kept = {n:learn.model.get_submodule(n).weight.detach()!=0 for n in names}
    release_masks(learn)
    learn.quantize()
    im = to_integer(learn.model, torch.randn(4,3,32,32))
    packed = {n.removeprefix('body.'):m for n,m in im.named_modules() if isinstance(m, Packed)}
    for n in names:
        ints = packed[n].integers()[0]
        assert (ints[~kept[n]]==0).all()
    assert sum(int((~k).sum()) for k in kept.values())==round(0.8*sum(k.numel() for k in kept.values()))
