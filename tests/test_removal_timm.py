"Half the channels of a cross-section of timm's models: runs, trains, exact. The whole list is benchmarks/channels_sweep.py"
import copy, warnings
import pytest, timm, torch
from fastcompress.measure.count import count_macs
from fastcompress.prune.channels import find_groups
from fastcompress.prune.plan import plan_from_json, plan_to_json
from fastcompress.prune.remove import plan_of, remove, remove_
from fastcompress.prune.select import select

pytestmark = pytest.mark.usefixtures('one_thread')

# name, size, arguments of create_model, at most so much of the multiplications stays
MODELS = [('resnet18', 64, {}, .3), ('mobilenetv3_small_050', 64, {}, .35), ('efficientnet_lite0', 64, {}, .3), ('densenet121', 64, {}, .3), ('ghostnet_050', 64, {}, .35),
          ('regnety_002', 64, {}, .3), ('repvgg_a0', 64, {}, .3), ('nf_regnet_b0', 64, {}, .3), ('hrnet_w18_small', 64, {}, .3), ('convnext_atto', 64, {}, .3), ('skresnet18', 64, {}, .3),
          ('vit_tiny_patch16_224', 64, dict(img_size=64), .4), ('deit3_small_patch16_224', 64, dict(img_size=64, depth=3), .4), ('swin_tiny_patch4_window7_224', 56, dict(img_size=56, depths=(1,1,2,1), window_size=7), .4),
          ('mixer_s32_224', 64, dict(img_size=64), .4), ('xcit_nano_12_p16_224', 64, dict(img_size=64, depth=3), .4), ('mobilevit_xxs', 64, {}, .4), ('cait_xxs24_224', 64, dict(img_size=64, depth=2), .4)]

def fair_(model):
    "Gains and biases neither zero nor one, layer scales that let their branch through"
    g = torch.Generator().manual_seed(0)
    for n,t in [*model.named_parameters(), *model.named_buffers()]:
        if not t.is_floating_point() or t.ndim!=1: continue
        if n.endswith(('weight','running_var')): t.data.uniform_(.5, 1.5, generator=g)
        elif n.endswith(('bias','running_mean')): t.data.uniform_(-.3, .3, generator=g)
        else: t.data.uniform_(.2, .5, generator=g)
    return model

def made(name, size, kwargs):
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        return fair_(timm.create_model(name, num_classes=10, **kwargs)).eval(), torch.randn(2, 3, size, size)

@pytest.mark.parametrize('name,size,kwargs,most', MODELS, ids=[m[0] for m in MODELS])
def test_half(name, size, kwargs, most):
    model,x = made(name, size, kwargs)
    before = copy.deepcopy(model.state_dict())
    with torch.no_grad(): shape = model(x).shape
    macs = count_macs(model, x[:1])
    groups = find_groups(model, x[:1])
    plan = select(groups, 'l2', .5, scope='local', round_to=1, min_channels=1)
    small = remove(model, plan, x=x)
    assert all(torch.equal(t, before[n]) for n,t in model.state_dict().items())
    done = plan_of(small)
    assert done.checked['worst']<=1e-9 and done.checked['outputs']>10
    assert not [w for w in done.notes.values() if 'kept whole' in w]
    assert abs(done.obtained-.5)<.03
    assert type(small) is type(model) and [n for n,_ in small.named_modules()]==[n for n,_ in model.named_modules()]
    assert count_macs(small, x[:1])<=most*macs
    out = small.train()(x)
    assert out.shape==shape
    out.square().mean().backward()
    assert all(p.grad.shape==p.shape and p.grad.isfinite().all() for p in small.parameters() if p.grad is not None)
    assert sum(p.grad is not None for p in small.parameters())>len(list(small.parameters()))*.8

def test_a_plan_through_json_does_the_same_to_another_copy():
    name,size,kwargs,_ = MODELS[1]
    model,x = made(name, size, kwargs)
    plan = select(find_groups(model, x[:1]), 'l2', .5, scope='local')
    again = plan_from_json(plan_to_json(plan))
    assert again==plan
    a,b = remove(model, plan, x=x),remove(made(name, size, kwargs)[0], again, x=x)
    assert all(torch.equal(s, t) for s,t in zip(a.state_dict().values(), b.state_dict().values()))

def test_twice_is_half_of_half():
    "What was cut once is analysed as it is now"
    model,x = made('resnet18', 64, {})
    macs = [count_macs(model, x[:1])]
    for _ in range(2):
        remove_(model, select(find_groups(model, x[:1]), 'l2', .5, scope='local', round_to=1), x=x)
        macs.append(count_macs(model, x[:1]))
    assert macs[2]<.1*macs[0] and plan_of(model).checked['worst']<=1e-9
