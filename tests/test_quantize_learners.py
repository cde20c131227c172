"Post-training quantization and QAT on the Learners fastai makes: tables, text, pictures, segmentation, several inputs"
import pytest, torch
from torch import nn
from fastai.losses import CrossEntropyLossFlat
from fastai.torch_core import set_seed
from fastai.vision.learner import create_body, vision_learner
from fastai.vision.models.unet import DynamicUnet
from torchvision.models import resnet18
from fastcompress.callback.qat import QATCallback
from fastcompress.callback import quantize # learn.quantize
from fastcompress.data import digits
from fastcompress.measure.quality import sqnr
from fastcompress.quantize.simulate import simulation
from learners import learner, quiet, tabular, text_learner, two_learner

pytestmark = [pytest.mark.usefixtures('one_thread'), pytest.mark.filterwarnings('ignore')]

def unet(path):
    set_seed(0)
    g = torch.Generator().manual_seed(0)
    x = torch.randn(20, 3, 16, 16, generator=g); y = (x[:, 0]>0).long()
    body = nn.Sequential(*list(create_body(resnet18(weights=None), n_in=3, pretrained=False).children())[:6])
    return learner(DynamicUnet(body, 2, (16, 16)), (x,), y, path, loss_func=CrossEntropyLossFlat(axis=1))

def vision(path):
    set_seed(0)
    return quiet(vision_learner(digits(n=80, size=32, bs=32), resnet18, pretrained=False, path=path))

MAKERS = [tabular, text_learner, vision, unet, two_learner]

def answer(learn):
    if hasattr(learn.model, 'reset'): learn.model.reset()
    p = learn.get_preds()[0]
    return p[0] if isinstance(p, (tuple, list)) else p

@pytest.mark.parametrize('profile', ['qnnpack', 'onnx'])
@pytest.mark.parametrize('make', MAKERS, ids=[m.__name__ for m in MAKERS])
def test_after_training(make, profile, tmp_path):
    learn = make(tmp_path)
    learn.fit(1, 1e-3)
    want,keys = answer(learn),list(learn.model.state_dict())
    learn.quantize(profile=profile)
    got = answer(learn)
    assert got.shape==want.shape and 12<float(sqnr(want, got))<90
    assert len(simulation(learn.model).placement.weights)>=2 # of a text classifier only the head: no target here has an integer LSTM
    learn.validate()
    learn.dequantize()
    assert list(learn.model.state_dict())==keys and torch.equal(answer(learn), want)

@pytest.mark.parametrize('make', [tabular, vision, unet, two_learner], ids=lambda m: m.__name__)
def test_while_training(make, tmp_path):
    learn = make(tmp_path)
    learn.fit(1, 1e-3, cbs=QATCallback(w_bits=4, learned=True))
    sim = simulation(learn.model)
    assert sim.mode=='fake' and sim.calibrated and torch.isfinite(answer(learn)).all()
    for key,w in sim.placement.weights.items():
        if w.param is None: continue
        p,q = learn.model.get_parameter(w.param),sim[key]
        s,_ = q.qparams.shaped(p)
        assert len(torch.unique((q.fake(p)/s).round().detach()))<=15
