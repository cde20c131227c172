"Files of compressed models: the same bits in another process, and an error for every file that isn't what it says"
import copy, hashlib, io, json, os, pickle, struct, subprocess, sys
from dataclasses import asdict, replace
from pathlib import Path
import pytest, timm, torch
from hypothesis import HealthCheck, given, settings, strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from fastcompress.deploy import checkpoint
from fastcompress.deploy.checkpoint import (NoInit, check_arch, describe_compressed, difference, each_once, load_compressed, replay_, save_compressed,
                                            stages, timm_arch)
from fastcompress.prune.channels import find_groups
from fastcompress.prune.plan import Plan, plan_for, plan_from_json, plan_to_json
from fastcompress.prune.remove import plan_of, remove, remove_, speedup_, tensors_of
from fastcompress.quantize.simulate import simulate_
from helpers import timm_model

pytestmark = [pytest.mark.usefixtures('one_thread'), pytest.mark.filterwarnings('ignore:.*torch.jit.script')]


def half_plan(model, x, part=.5, **asked):
    groups = find_groups(model, x)
    return plan_for(groups, {g.name: range(int(g.n*part)) for g in groups}, asked)


def same_bits(a, b):
    "Names, types, shapes, bytes of all parameters and buffers"
    a,b = tensors_of(a),tensors_of(b)
    assert list(a) == list(b)
    for n in a:
        assert (a[n].dtype, a[n].shape, isinstance(a[n], nn.Parameter)) == (b[n].dtype, b[n].shape, isinstance(b[n], nn.Parameter)), n
        assert a[n].detach().contiguous().reshape(-1).view(torch.uint8).equal(b[n].detach().contiguous().reshape(-1).view(torch.uint8)) if a[n].dtype!=torch.complex128 else a[n].equal(b[n]), n
    return True


def run(model, x):
    with torch.no_grad(): return model(x)


class Net(nn.Module):
    "Convolutions in a row, two that add up, a linear layer"
    def __init__(self, width=8, bias=True):
        super().__init__()
        self.stem,self.bn,self.a,self.b,self.head = nn.Conv2d(3, width, 3), nn.BatchNorm2d(width), nn.Conv2d(width, 12, 1), nn.Conv2d(12, width, 1, bias=bias), nn.Linear(width, 5)
    def forward(self, x):
        x = self.bn(self.stem(x)).relu()
        return self.head((x + self.b(self.a(x).sigmoid())).mean((2,3)))


@pytest.fixture
def saved(tmp_path):
    "A cut net, its input, its file"
    torch.manual_seed(0)
    net,x = Net().eval(),torch.randn(2, 3, 8, 8)
    net.bn.running_mean.uniform_(-1, 1)
    remove_(net, half_plan(net, x, ratio=.5), x=x)
    return net, x, save_compressed(net, tmp_path/'net.safetensors', accuracy=.9)


# ---------------------------------------------------------------- round trips

TIMM = dict(resnet18=dict(size=64, num_classes=10),
            test_vit=dict(size=32, num_classes=7, img_size=32),
            vit_tiny_patch16_224=dict(size=32, num_classes=10, img_size=32, depth=2, class_token=False, global_pool='avg'),
            mobilenetv2_100=dict(size=32, num_classes=10),
            convnext_atto=dict(size=32, num_classes=10, in_chans=1),
            swin_tiny_patch4_window7_224=dict(size=64, num_classes=10, img_size=64, window_size=4, embed_dim=24, depths=(1, 2), num_heads=(2, 4)))


@pytest.fixture(scope='module')
def timm_files(tmp_path_factory):
    "One folder: a file and the outputs for each of the models, and what another process makes of them"
    folder = tmp_path_factory.mktemp('timm')
    for name,kw in TIMM.items():
        torch.manual_seed(0)
        kw = dict(kw)
        size = kw.pop('size')
        model = timm.create_model(name, **kw).eval()
        x = torch.randn(2, kw.get('in_chans', 3), size, size)
        model.train()(x)
        model.eval()
        remove_(model, half_plan(model, x, .4, ratio=.4), x=x)
        save_compressed(model, folder/f'{name}.safetensors')
        save_file(dict(x=x, y=run(model, x)), folder/f'{name}.pair')
        model.requires_grad_(False)
        torch.save(tensors_of(model), folder/f'{name}.state')
    code = f"""
import torch
from pathlib import Path
from safetensors.torch import load_file, save_file
from fastcompress.deploy.checkpoint import load_compressed
torch.set_num_threads(1)
for p in sorted(Path({str(folder)!r}).glob('*.safetensors')):
    model = load_compressed(p)
    with torch.no_grad(): save_file(dict(y=model(load_file(p.with_suffix('.pair'))['x'])), p.with_suffix('.again'))
"""
    r = subprocess.run([sys.executable, '-W', 'ignore', '-c', code], capture_output=True, text=True, env={**os.environ, 'OMP_NUM_THREADS': '1'})
    assert r.returncode == 0, r.stderr
    return folder


@pytest.mark.parametrize('name', TIMM)
def test_timm_in_another_process(timm_files, name):
    pair,again = load_file(timm_files/f'{name}.pair'),load_file(timm_files/f'{name}.again')
    assert again['y'].equal(pair['y'])
    model = load_compressed(timm_files/f'{name}.safetensors')
    state,kw = torch.load(timm_files/f'{name}.state'),TIMM[name]
    assert all(t.equal(state[n]) for n,t in tensors_of(model).items()) and len(state)==len(tensors_of(model))
    assert not any(m.training for m in model.modules())
    assert model.num_classes == kw['num_classes']
    assert plan_of(model).obtained > .3
    c = describe_compressed(timm_files/f'{name}.safetensors')
    assert c.params == sum(p.numel() for p in model.parameters()) < .8*c.params_before
    assert c.params_before == sum(p.numel() for p in timm.create_model(name, **{k: v for k,v in kw.items() if k!='size'}).parameters())
    assert c.asked == dict(ratio=.4)


def test_numbers_in_the_code(timm_files):
    "The loaded transformer works with fewer heads, and cuts on"
    model,x = load_compressed(timm_files/'vit_tiny_patch16_224.safetensors'),load_file(timm_files/'vit_tiny_patch16_224.pair')['x']
    assert [b.attn.num_heads for b in model.blocks] == [2, 2]
    assert model.blocks[0].norm1.normalized_shape == (116,)
    want = timm.create_model('vit_tiny_patch16_224', num_classes=10, img_size=32, depth=2, class_token=False, global_pool='avg')
    assert model.pretrained_cfg == want.pretrained_cfg
    remove_(model, half_plan(model, x), x=x)
    path = save_compressed(model, timm_files/'on.file')
    assert run(load_compressed(path), x).equal(run(model, x))


def test_constructor_in_another_process(tmp_path):
    (tmp_path/'mine.py').write_text('from torch import nn\ndef make(): return nn.Sequential(nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 4, 3))\n')
    code = """
import sys, torch
from pathlib import Path
from mine import make
from safetensors.torch import load_file
from fastcompress.deploy.checkpoint import load_compressed
torch.set_num_threads(1)
pair = load_file('pair')
for arch in make, make():
    with torch.no_grad(): assert load_compressed('net', arch=arch)(pair['x']).equal(pair['y'])
print('same')
"""
    sys.path.insert(0, str(tmp_path))
    try: from mine import make
    finally: sys.path.remove(str(tmp_path))
    torch.manual_seed(0)
    net,x = make().eval(),torch.randn(2, 3, 8, 8)
    remove_(net, half_plan(net, x), x=x)
    save_compressed(net, tmp_path/'net')
    save_file(dict(x=x, y=run(net, x)), tmp_path/'pair')
    r = subprocess.run([sys.executable, '-W', 'ignore', '-c', code], capture_output=True, text=True, cwd=tmp_path, env={**os.environ, 'PYTHONPATH': f"{tmp_path}{os.pathsep}{Path(checkpoint.__file__).parents[2]}"})
    assert r.stdout.strip() == 'same', r.stderr


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16, torch.float64])
def test_types_stay(saved, tmp_path, dtype):
    net,x,_ = saved
    net = net.to(dtype)
    again = load_compressed(save_compressed(net, tmp_path/'n'), arch=Net)
    assert same_bits(again, net) and again.stem.weight.dtype == dtype
    assert run(again, x.to(dtype)).equal(run(net, x.to(dtype)))


class Odd(nn.Module):
    "Every kind of tensor"
    def __init__(self, seed=1):
        super().__init__()
        g = torch.Generator().manual_seed(seed)
        self.w = nn.Parameter(torch.randn(4, 6, generator=g).T)
        self.z = nn.Parameter(torch.randn(2, 2, generator=g, dtype=torch.complex64))
        base = torch.randn(8, generator=g)
        for n,t in dict(c64=torch.randn(3, generator=g, dtype=torch.complex64).conj(), c128=torch.randn(2, 3, generator=g, dtype=torch.complex128), flags=torch.rand(5, generator=g)>.5,
                        count=torch.tensor(seed), empty=torch.zeros(0, 3), h16=torch.randn(3, generator=g).half(), b16=torch.randn(3, generator=g).bfloat16(), byte=torch.arange(seed, seed+4, dtype=torch.uint8),
                        left=base[:4], right=base[4:], whole=base, spread=torch.randn(1, generator=g).expand(5), neg=torch.randn(1, generator=g, dtype=torch.complex64).conj().imag).items(): self.register_buffer(n, t)
        self.register_buffer('gone', None)
        self.register_buffer('table', torch.randn(4, generator=g), persistent=False)


def test_every_kind_of_tensor(tmp_path):
    odd = Odd(1)
    again = load_compressed(save_compressed(odd, tmp_path/'odd', arch=lambda: Odd(2)), arch=lambda: Odd(2))
    want,got = tensors_of(odd),tensors_of(again)
    assert list(want) == list(got) and all(got[n].dtype==want[n].dtype and got[n].equal(want[n]) for n in want)
    assert all(t.is_contiguous() for t in got.values())
    assert again.gone is None and 'table' not in again.state_dict()
    with torch.no_grad(): again.left.zero_()
    assert again.whole.equal(odd.whole), 'views of one memory come back apart'


class Tied(nn.Module):
    def __init__(self, tie=True):
        super().__init__()
        self.words,self.mid,self.scores,self.again = nn.Embedding(7, 4),nn.Linear(4, 4),nn.Linear(4, 7, bias=False),nn.BatchNorm1d(7, affine=False)
        self.twin = self.mid
        self.other = nn.BatchNorm1d(7, affine=False)
        if tie:
            self.scores.weight = self.words.weight
            self.other.running_mean = self.again.running_mean
    def forward(self, i): return self.other(self.again(self.scores(self.twin(self.mid(self.words(i))))))


@pytest.mark.parametrize('tied_by_code', [True, False])
def test_shared_tensors(tmp_path, tied_by_code):
    torch.manual_seed(0)
    model,i = Tied().eval(),torch.arange(7)
    path = save_compressed(model, tmp_path/'tied')
    assert 'scores.weight' not in load_file(path) and 'twin.bias' not in load_file(path)
    again = load_compressed(path, arch=lambda: Tied(tied_by_code))
    assert again.scores.weight is again.words.weight and again.other.running_mean is again.again.running_mean and again.twin is again.mid
    assert run(again, i).equal(run(model, i))
    assert len(list(again.parameters())) == len(list(model.parameters()))


def test_untied_by_hand(tmp_path):
    model = Tied(tie=False).eval()
    again = load_compressed(save_compressed(model, tmp_path/'free'), arch=Tied)
    assert again.scores.weight is not again.words.weight
    assert same_bits(again, model)


def test_one_module_where_the_file_has_two(tmp_path):
    def make(twice):
        a,b = nn.Linear(3, 3),nn.Linear(3, 3)
        return nn.Sequential(a, a if twice else b)
    path = save_compressed(make(False), tmp_path/'two')
    with pytest.raises(ValueError, match="one module where the file has two: '0.bias', '0.weight'"): load_compressed(path, arch=lambda: make(True))
    assert load_compressed(save_compressed(make(True), tmp_path/'one'), arch=lambda: make(True))


@pytest.mark.parametrize('half', [False, True])
def test_weights_held_twice_inside_torch(tmp_path, half):
    "An LSTM keeps its weights in a list besides; a checkpoint must reach both"
    torch.manual_seed(0)
    a,x = nn.LSTM(3, 4, 2).eval(),torch.randn(5, 2, 3)
    if half: a,x = a.bfloat16(),x.bfloat16()
    b = load_compressed(save_compressed(a, tmp_path/'lstm'), arch=lambda: nn.LSTM(3, 4, 2))
    assert run(b, x)[0].equal(run(a, x)[0])


def test_built_on_meta(saved):
    net,x,path = saved
    def make():
        with torch.device('meta'): return Net()
    again = load_compressed(path, arch=make)
    assert same_bits(again, net) and run(again, x).equal(run(net, x))


def test_nothing_removed(tmp_path):
    model,x = timm_model('resnet18', 32)
    again = load_compressed(save_compressed(model, tmp_path/'r'))
    assert plan_of(again) is None and run(again, x).equal(run(model, x))
    assert 'nothing was removed' in repr(describe_compressed(tmp_path/'r'))


def test_fastai_body_and_head(tmp_path):
    "What vision_learner makes has no timm name of its own; the loader is given the code"
    from fastai.vision.learner import create_vision_model
    from fastai.vision.all import models
    def make(): return create_vision_model(models.resnet18, 3, pretrained=False)
    torch.manual_seed(0)
    model,x = make().eval(),torch.randn(2, 3, 32, 32)
    remove_(model, half_plan(model, x), x=x)
    path = save_compressed(model, tmp_path/'body')
    assert describe_compressed(path).arch is None
    with pytest.raises(ValueError, match='give arch=f'): load_compressed(path)
    assert run(load_compressed(path, arch=make), x).equal(run(model, x))


def test_loading_leaves_the_world_alone(saved, timm_files):
    net,x,path = saved
    given = Net()
    before,state = copy.deepcopy(given.state_dict()),torch.random.get_rng_state()
    a,b = load_compressed(path, arch=given),load_compressed(timm_files/'resnet18.safetensors')
    assert torch.random.get_rng_state().equal(state)
    assert all(t.equal(before[n]) for n,t in given.state_dict().items()) and plan_of(given) is None
    y = run(a, x)
    with open(path, 'r+b') as f:
        f.seek(-400, 2)
        f.write(b'\xff'*400)
    assert run(a, x).equal(y), 'the model is no window into the file'


def test_same_model_same_bytes(saved, tmp_path):
    net,_,path = saved
    assert save_compressed(net, tmp_path/'b', accuracy=.9).read_bytes() == path.read_bytes()
    again = load_compressed(path, arch=Net)
    assert save_compressed(again, tmp_path/'c', accuracy=.9).read_bytes() == path.read_bytes()


def test_parameters_stay_those_the_code_made(saved):
    made = []
    def make():
        made.append(Net())
        made[0].head.weight.requires_grad_(False)
        return made[0]
    ids = {}
    def noting():
        m = make()
        ids.update({n: id(p) for n,p in m.named_parameters()})
        return m
    again = load_compressed(saved[2], arch=noting)
    assert {n: id(p) for n,p in again.named_parameters()} == ids
    assert not again.head.weight.requires_grad and again.stem.weight.requires_grad


# ---------------------------------------------------------------- plans of several steps

def test_folded_bias(tmp_path):
    torch.manual_seed(0)
    make = lambda: Net(bias=False)
    net,x = make().eval(),torch.randn(2, 3, 8, 8)
    remove_(net, plan_for(find_groups(net, x), {'a': range(4)}), x=x)
    assert plan_of(net).biases == ['b']
    again = load_compressed(save_compressed(net, tmp_path/'n', arch=make), arch=make)
    assert run(again, x).equal(run(net, x)) and again.b.bias.abs().sum()>0


@pytest.mark.parametrize('second', ['channels', 'svd'])
def test_folded_bias_then_more(tmp_path, second):
    "The bias that one step added is cut, or handed to a factor, by the next"
    torch.manual_seed(0)
    make = lambda: Net(width=16, bias=False)
    net,x = make().eval(),torch.randn(2, 3, 8, 8)
    remove_(net, plan_for(find_groups(net, x), {'a': range(4)}), x=x)
    if second=='channels': remove_(net, plan_for(find_groups(net, x), {'stem': range(5), 'a': [1]}), x=x)
    else: remove_(net, Plan(factors={'b': dict(kind='svd', ranks=[3])}))
    assert plan_of(net).biases == ['b']
    again = load_compressed(save_compressed(net, tmp_path/'n', arch=make), arch=make)
    assert same_bits(again, net) and run(again, x).equal(run(net, x))


STEPS = ['cut','cut'], ['factor','cut'], ['cut','factor'], ['cut','factor','cut'], ['factor','cut','factor2','cut']

@pytest.mark.parametrize('steps', STEPS, ids='-'.join)
def test_channels_and_factors_in_any_order(tmp_path, steps):
    make = lambda: nn.Sequential(nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 24, 3, padding=1), nn.ReLU(), nn.Conv2d(24, 24, 3, groups=24, padding=1), nn.Conv2d(24, 16, 1), nn.Flatten(), nn.Linear(576, 10))
    torch.manual_seed(0)
    net,x = make().eval(),torch.randn(2, 3, 8, 8)
    net.train()(x)
    net.eval()
    for s in steps:
        if s=='cut': remove_(net, half_plan(net, x, .3), x=x)
        else: remove_(net, Plan(factors={'3': dict(kind='tucker', ranks=[6, 7]), '5': dict(kind='spatial', ranks=[2])} if s=='factor' else {'6': dict(kind='svd', ranks=[4])}))
    path = save_compressed(net, tmp_path/'n', arch=make)
    again = load_compressed(path, arch=make)
    assert same_bits(again, net) and run(again, x).equal(run(net, x))
    assert plan_of(again) == plan_from_json(plan_to_json(plan_of(net)))
    assert [m.extra_repr() for m in again.modules()] == [m.extra_repr() for m in net.modules()]


def test_low_rank_of_timm(tmp_path):
    from fastcompress.prune.lowrank import factor_ranks
    model,x = timm_model('resnet18', 32)
    remove_(model, half_plan(model, x, .25), x=x)
    remove_(model, Plan(factors=dict(factor_ranks(model, ratio=.5))))
    path = save_compressed(model, tmp_path/'r')
    again = load_compressed(path)
    assert same_bits(again, model) and run(again, x).equal(run(model, x))
    assert len(describe_compressed(path).plan.factors) > 5


def test_from_masks(tmp_path):
    make = lambda: nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 1, bias=False))
    torch.manual_seed(0)
    net,x = make().eval(),torch.randn(2, 3, 8, 8)
    net[1].bias.data.uniform_(0, 1)
    keep = torch.ones_like(net[0].weight)
    keep[[2, 6]] = 0
    speedup_(net, {'0': keep}, x)
    again = load_compressed(save_compressed(net, tmp_path/'n', arch=make), arch=make)
    assert run(again, x).equal(run(net, x)) and again[0].out_channels == 6


# ---------------------------------------------------------------- writing what can't be written

def refuses(match, *args, **kw):
    with pytest.raises(ValueError, match=match): save_compressed(*args, **kw)


def test_what_cannot_be_saved(tmp_path):
    p = tmp_path/'old'
    p.write_bytes(b'precious')
    class Stateful(nn.Linear):
        def get_extra_state(self): return object()
        def set_extra_state(self, s): pass
    model = timm.create_model('resnet18', num_classes=10)
    refuses('expected a model, got dict', {}, p)
    refuses('no values', nn.Linear(2, 2, device='meta'), p)
    refuses('run the model once', nn.LazyLinear(2), p)
    refuses('give model.module', nn.DataParallel(nn.Linear(2, 2)), p)
    refuses('give model._orig_mod', torch.compile(nn.Linear(2, 2)), p)
    refuses('1 .Stateful. keeps state beyond tensors', nn.Sequential(nn.ReLU(), Stateful(2, 2)), p)
    sparse = nn.Linear(2, 2)
    sparse.register_buffer('s', torch.eye(2).to_sparse())
    refuses("'s' is sparse", sparse, p)
    refuses('meta can.t be written as text: Tensor', nn.Linear(2, 2), p, loss=torch.zeros(3))
    refuses("arch=3 is no architecture", model, p, arch=3)
    refuses("no timm model 'resnet_18'. Nearest: 'resnet18'", model, p, arch='resnet_18')
    refuses("Leave it out", model, p, arch=('resnet18', dict(pretrained=True)))
    refuses("num_classes is 10 here, 1000 there", model, p, arch='resnet18')
    refuses("arch made a dict, not a model", model, p, arch=dict)
    refuses('the whole is a ResNet here, a Linear there', model, p, arch=lambda: nn.Linear(1, 1))
    simulate_(model, torch.randn(1, 3, 32, 32))
    refuses('have no ranges yet', model, p)
    assert p.read_bytes() == b'precious' and [f.name for f in tmp_path.iterdir()] == ['old']


def test_learner_is_told_apart(tmp_path):
    class Learner: model = nn.Linear(2, 2)
    refuses('give learn.model', Learner(), tmp_path/'l')


CHANGES = dict(head=lambda m: setattr(m, 'fc', nn.Identity()), activation=lambda m: setattr(m.layer1[0], 'act1', nn.SiLU()), eps=lambda m: setattr(m.bn1, 'eps', 1e-3),
               stride=lambda m: setattr(m.conv1, 'stride', (1, 1)), extra=lambda m: m.layer1.append(nn.Conv2d(64, 64, 1)), width=lambda m: setattr(m, 'conv1', nn.Conv2d(3, 64, 5, 2, 2, bias=False)),
               bias=lambda m: setattr(m.conv1, 'bias', nn.Parameter(torch.zeros(64))), pool=lambda m: setattr(m.maxpool, 'kernel_size', 2))

@pytest.mark.parametrize('change', CHANGES)
def test_a_model_changed_by_hand_is_noticed(tmp_path, change):
    model = timm.create_model('resnet18', num_classes=10)
    CHANGES[change](model)
    refuses("doesn't give this model: .*Give arch=", model, tmp_path/'n')
    def make():
        m = timm.create_model('resnet18', num_classes=10)
        CHANGES[change](m)
        return m
    path = save_compressed(model, tmp_path/'n', arch=make)
    assert same_bits(load_compressed(path, arch=make), model)


def test_what_only_training_sees_may_change(tmp_path):
    model = timm.create_model('resnet18', num_classes=10, drop_rate=.3)
    for m in model.modules():
        if isinstance(m, nn.BatchNorm2d): m.momentum = .01
    model.note,model.best = 'mine',7
    again = load_compressed(save_compressed(model, tmp_path/'n'))
    assert again.drop_rate == .3, 'dropout is read from the model'


def test_what_the_plan_does_not_know_is_noticed(saved, tmp_path):
    "A model that was factored or cut past remove_"
    from fastcompress.prune.lowrank import factorise_
    net = saved[0]
    factorise_(net, {'b': dict(kind='svd', ranks=[2])})
    refuses('b is a Sequential here, a Conv2d there', net, tmp_path/'n', arch=Net)
    model = timm.create_model('resnet18', num_classes=10)
    x = torch.randn(1, 3, 32, 32)
    remove_(model, half_plan(model, x))
    del model.fastcompress_plan
    refuses("doesn't give this model", model, tmp_path/'n')


def test_classes_in_the_arguments(tmp_path):
    model = timm.create_model('resnet18', num_classes=10, act_layer=nn.SiLU)
    refuses("act_layer=<class .*act_layer='silu'.*Give arch=", model, tmp_path/'n')
    path = save_compressed(model, tmp_path/'n', arch=('resnet18', dict(num_classes=10, act_layer='silu')))
    again = load_compressed(path)
    assert isinstance(again.act1, nn.SiLU) and same_bits(again, model)


def test_tensors_that_are_no_buffers(tmp_path):
    class Loose(nn.Linear):
        def __init__(self, v=1.): super().__init__(2, 2); self.shift = torch.full((2,), v)
    refuses('shift, a tensor that is neither parameter nor buffer', Loose(2.), tmp_path/'n', arch=Loose)
    assert load_compressed(save_compressed(Loose(2.), tmp_path/'n', arch=lambda: Loose(2.)), arch=lambda: Loose(2.)).shift[0] == 2


def test_head_replaced_by_timm(tmp_path):
    model = timm.create_model('vit_tiny_patch16_224', img_size=32, depth=1)
    model.reset_classifier(3, global_pool='avg')
    again = load_compressed(save_compressed(model, tmp_path/'n'))
    assert again.num_classes == 3 and again.global_pool == 'avg' and same_bits(again, model)


# ---------------------------------------------------------------- damaged files

def load_or_refuse(path, net):
    "A damaged file must be refused, or be harmless"
    try: again = load_compressed(path, arch=Net)
    except ValueError as e: return str(e)
    assert same_bits(again, net)
    return ''


def test_every_byte_of_the_start_and_many_others(saved, tmp_path):
    net,_,path = saved
    data,bad,refused = path.read_bytes(),tmp_path/'bad',0
    n = 8+struct.unpack('<Q', data[:8])[0]
    places = [*range(0, 40), *range(40, n, 37), *range(n, len(data), 5)]
    for i in places:
        for flip in (1, 0x80):
            bad.write_bytes(data[:i] + bytes([data[i]^flip]) + data[i+1:])
            refused += bool(load_or_refuse(bad, net))
    assert refused > 1.99*len(places)-20, 'hardly a byte is without meaning'


def test_every_byte_of_the_tensors_counts(saved, tmp_path):
    net,_,path = saved
    data = path.read_bytes()
    n = 8+struct.unpack('<Q', data[:8])[0]
    for i in range(n, len(data), 11):
        (tmp_path/'bad').write_bytes(data[:i] + bytes([data[i]^4]) + data[i+1:])
        assert 'was damaged after it was written' in load_or_refuse(tmp_path/'bad', net)


def test_cut_short_and_too_long(saved, tmp_path):
    net,_,path = saved
    data = path.read_bytes()
    for n in [*range(0, 20), *range(20, len(data), 97), len(data)-1]:
        (tmp_path/'bad').write_bytes(data[:n])
        assert load_or_refuse(tmp_path/'bad', net), n
    (tmp_path/'bad').write_bytes(data+b'\0')
    assert 'no safetensors file, or was cut short' in load_or_refuse(tmp_path/'bad', net)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_any_damage(saved, tmp_path, data):
    net,_,path = saved
    b = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        i,j = data.draw(st.integers(0, len(b)-1)),data.draw(st.integers(0, 16))
        b[i:i+j] = data.draw(st.binary(max_size=16))
    (tmp_path/'bad').write_bytes(b)
    load_or_refuse(tmp_path/'bad', net)


def rewrite(path, to, change=lambda head, tensors: None, seal=True, text=None):
    "A file by somebody who knows the format: header and tensors changed, checksums right again"
    with safe_open(path, 'pt') as f:
        head,tensors = json.loads(f.metadata()['fastcompress']),{}
        tensors.update({n: f.get_tensor(n) for n in head['tensors']})
    was = head.pop('sha256')
    head = change(head, tensors) or head
    if seal: head['tensors'] = {n: checkpoint.digest(t) for n,t in tensors.items()}
    sealed = checkpoint._sealed(head) if seal else json.dumps({**head, 'sha256': was})
    save_file(tensors, to, dict(fastcompress=sealed if text is None else text))
    return to


def refuses_load(match, path, arch=Net, **kw):
    with pytest.raises(ValueError, match=match): load_compressed(path, arch=arch, **kw)


def test_rewrite_is_fair(saved, tmp_path):
    assert rewrite(saved[2], tmp_path/'same').read_bytes() == saved[2].read_bytes()


def test_changed_and_not_sealed(saved, tmp_path):
    "Each entry of the header is under the checksum"
    head = json.loads(safe_open(saved[2], 'pt').metadata()['fastcompress'])
    changes = dict(made_with={}, model='x', arch=dict(name='resnet18', kwargs={}), plan=None, order='', params=1, tensors={}, aliases={'x': 'y'}, complex=['x'], buffers={}, meta=dict(accuracy=1), sections={'x': 1})
    assert {*changes, 'format', 'sha256'} == set(head)
    for k,v in changes.items():
        def change(h, t): h[k] = v
        refuses_load('header was changed', rewrite(saved[2], tmp_path/'bad', change, seal=False))


def test_type_is_under_the_checksum(saved, tmp_path):
    "The same bytes, said to be whole numbers"
    with safe_open(saved[2], 'pt') as f: text,tensors = f.metadata()['fastcompress'],{n: f.get_tensor(n) for n in f.keys()}
    tensors['bn.running_mean'] = tensors['bn.running_mean'].view(torch.int32)
    save_file(tensors, tmp_path/'bad', dict(fastcompress=text))
    refuses_load("'bn.running_mean' was damaged", tmp_path/'bad')


def test_swapped_plan(saved, tmp_path):
    "The plan of another removal of the same net: of other channels, as many; and of other shapes"
    torch.manual_seed(0)
    net,x = Net().eval(),torch.randn(2, 3, 8, 8)
    other = save_compressed(remove(net, half_plan(net, x, .25), x), tmp_path/'other')
    plan = json.loads(safe_open(other, 'pt').metadata()['fastcompress'])['plan']
    def swap(head, tensors): head['plan'] = plan
    refuses_load('header was changed', rewrite(saved[2], tmp_path/'bad', swap, seal=False))
    refuses_load(r"'a.bias' has the shape \(6,\) in the file, \(9,\) in the model|isn't of this Net", rewrite(saved[2], tmp_path/'bad', swap))


def _set(where, value):
    def change(head, tensors):
        d = head
        for k in where[:-1]: d = d[k]
        d[where[-1]] = value
    return change

def _drop(k):
    def change(head, tensors): del head[k]
    return change

def _tensor(name, t):
    def change(head, tensors):
        if t is None: del tensors[name]
        else: tensors[name] = t
    return change

def _said_to_be_a_table(head, tensors):
    head['buffers']['a.bias'] = False
    del tensors['a.bias']

P = 'plan'
FORGED = dict(
    newer=(_set(['format'], 2), 'format 2, this version .* reads 1. Update fastcompress'),
    older=(_set(['format'], 0), 'format 0, this version'),
    no_format=(_drop('format'), 'names no format'),
    format_word=(_set(['format'], 'one'), 'names no format'),
    lacks=(_drop('aliases'), 'malformed entries: aliases'),
    unknown=(_set(['code'], 'import os'), 'malformed entries: code'),
    wrong_type=(_set(['tensors_'], 1), 'malformed entries: tensors_'),
    section=(_set(['sections'], dict(codebooks={})), "can't read: codebooks. Update fastcompress"),
    order=(_set(['order'], 'factors, channels'), "can't read: factors, channels"),
    alias_to_nothing=(_set(['aliases'], {'x.weight': '../../etc/passwd'}), "tensors that don't exist: 'x.weight'"),
    alias_of_a_tensor=(_set(['aliases'], {'a.bias': 'stem.bias'}), "tensors that don't exist: 'a.bias'"),
    alias_extra=(_set(['aliases'], {'x.weight': 'a.weight'}), "the model has no 'x.weight'"),
    complex_of_nothing=(_set(['complex'], ['w']), "tensors that don't exist: 'w'"),
    alias_list=(_set(['aliases'], {'x.weight': ['a.weight']}), 'malformed aliases'),
    complex_list=(_set(['complex'], [{}]), 'malformed aliases or complex'),
    complex_no_pairs=(_set(['complex'], ['a.bias']), "'a.bias'.*pairs"),
    buffers=(_said_to_be_a_table, "the file has no 'a.bias'"),
    marks=(_set(['plan', 'marks'], {'a': 3}), 'marks holds more'),
    extra=(_tensor('../../evil', torch.zeros(2)), "the model has no '../../evil'"),
    missing=(_tensor('a.bias', None), "the file has no 'a.bias'"),
    shape=(_tensor('a.bias', torch.zeros(2)), r"'a.bias' has the shape \(2,\) in the file, \(6,\) in the model"),
    ints=(_tensor('a.bias', torch.zeros(6, dtype=torch.int64)), "'a.bias' holds torch.int64"),
    arch_list=(_set(['arch'], []), 'malformed entries: arch'),
    arch_keys=(_set(['arch'], dict(name='resnet18')), 'malformed arch'),
    plan_list=(_set([P], []), 'malformed entries: plan'),
    plan_empty=(_set([P], {}), 'not a plan'),
    plan_more=(_set([P, 'run'], 'x'), 'not a plan'),
    keep_list=(_set([P, 'keep'], []), 'keep has the type list'),
    keep_word=(_set([P, 'keep', 'a.bias'], 'all'), "has no attribute 'items'"),
    keep_axis_word=(_set([P, 'keep', 'a.bias'], {'first': [0]}), 'first'),
    keep_axis=(_set([P, 'keep', 'a.bias'], {'1': [0]}), r"keep\['a.bias'\]\[1\]"),
    keep_negative=(_set([P, 'keep', 'a.bias'], {'0': [-1, 0, 1, 2, 3, 4]}), 'outside 0 to 11'),
    keep_beyond=(_set([P, 'keep', 'a.bias'], {'0': [0, 1, 2, 3, 4, 12]}), 'outside 0 to 11'),
    keep_twice=(_set([P, 'keep', 'a.bias'], {'0': [0, 0, 1, 2, 3, 4]}), 'not in order'),
    keep_real=(_set([P, 'keep', 'a.bias'], {'0': [0.5]}), r"keep\['a.bias'\]"),
    keep_none=(_set([P, 'keep', 'a.bias'], {'0': []}), r"keep\['a.bias'\]"),
    keep_fewer=(_set([P, 'keep', 'a.bias'], {'0': [0]}), r"'a.bias' has the shape \(6,\) in the file, \(1,\)"),
    keep_unknown=(_set([P, 'keep', 'q'], {'0': [0]}), 'different tensors'),
    shapes=(_set([P, 'shapes', 'a.bias'], [13]), r"'a.bias' has the shape \(12,\) here, \(13,\)"),
    shapes_word=(_set([P, 'shapes', 'a.bias'], 'big'), "the shape of 'a.bias'"),
    removed=(_set([P, 'removed'], {'a': ['x']}), 'removed holds more than whole numbers'),
    units=(_set([P, 'units'], {'a': None}), 'units holds more'),
    attr_method=(_set([P, 'attrs'], {'': {'forward': 1}}), 'numbers can only become other numbers'),
    attr_class=(_set([P, 'attrs'], {'a': {'__class__': 1}}), 'numbers can only become other numbers'),
    attr_new=(_set([P, 'attrs'], {'a': {'evil': 1}}), 'numbers can only become other numbers'),
    attr_word=(_set([P, 'attrs'], {'a': {'out_channels': 'os.system'}}), 'numbers can only become other numbers'),
    attr_flag=(_set([P, 'attrs'], {'a': {'training': 1}}), 'numbers can only become other numbers'),
    attr_place=(_set([P, 'attrs'], {'a': {'stride': {'5': 1}}}), 'numbers can only become other numbers'),
    attr_place_word=(_set([P, 'attrs'], {'a': {'stride': {'0': 'x'}}}), 'numbers can only become other numbers'),
    attr_path=(_set([P, 'attrs'], {'z.q': {'n': 1}}), "no module 'z.q'"),
    attr_list=(_set([P, 'attrs'], {'a': [1]}), 'attrs holds more'),
    bias_number=(_set([P, 'biases'], [1]), 'biases are no names'),
    bias_has_one=(_set([P, 'biases'], ['a']), "gives 'a' a bias"),
    bias_nowhere=(_set([P, 'biases'], ['x']), "no module 'x'"),
    bias_norm=(_set([P, 'biases'], ['']), "gives '' a bias"),
    factor_unknown=(_set([P, 'factors'], {'x': dict(kind='svd', ranks=[1])}), "no layer 'x'"),
    factor_kind=(_set([P, 'factors'], {'b': dict(kind='magic', ranks=[1])}), "no kind 'magic'"),
    factor_rank=(_set([P, 'factors'], {'b': dict(kind='svd', ranks=[99])}), "ranks .99. don't fit"),
    factor_word=(_set([P, 'factors'], {'b': 'svd'}), 'factors holds more'),
    factor_not_done=(_set([P, 'factors'], {'b': dict(kind='svd', ranks=[2])}), "the file has no 'b.0.weight'"))

@pytest.mark.parametrize('case', FORGED)
def test_forged(saved, tmp_path, case):
    change,match = FORGED[case]
    bad = rewrite(saved[2], tmp_path/'bad', change)
    refuses_load(match, bad)


@pytest.mark.parametrize('text', ['', 'null', '[]', '{}', '{"format": 1', '"x"', '['*100000, '{"format": 1, "sha256": 3}', '{"format": true}', '{"format": 1e400}', '9'*5000], ids=range(11))
def test_header_that_is_no_header(saved, tmp_path, text):
    refuses_load('header (is damaged|was changed)', rewrite(saved[2], tmp_path/'bad', text=text))


ARCHS = dict(unknown=(dict(name='resnet81', kwargs={}), "no timm model 'resnet81'. Nearest: 'resnet18'"), hub=(dict(name='hf-hub:evil/model', kwargs={}), 'no timm model'), folder=(dict(name='local-dir:/tmp', kwargs={}), 'no timm model'),
             path=(dict(name='../../resnet18', kwargs={}), 'no timm model'), number=(dict(name=3, kwargs={}), 'no timm model'), tag=(dict(name='resnet18.nonesuch', kwargs={}), 'Invalid pretrained tag'),
             long=(dict(name='resnet18'*100000, kwargs={}), 'no timm model'), dots=(dict(name='resnet18.__class__.x', kwargs={}), 'no timm model'),
             checkpoint=(dict(name='resnet18', kwargs=dict(checkpoint_path='evil.pth')), "'checkpoint_path' is about where weights come from"), pretrained=(dict(name='resnet18', kwargs=dict(pretrained=True)), "'pretrained' is about"),
             cfg=(dict(name='resnet18', kwargs=dict(pretrained_cfg=dict(url='http://x'))), 'is about'), overlay=(dict(name='resnet18', kwargs=dict(pretrained_cfg_overlay={})), 'is about'), cache=(dict(name='resnet18', kwargs=dict(cache_dir='/')), 'is about'),
             device=(dict(name='resnet18', kwargs=dict(device='meta')), 'is about'), nested=(dict(name='resnet18', kwargs=dict(block_args=dict(a=1))), "can't be written down"), kwarg=(dict(name='resnet18', kwargs=dict(sesame=1)), 'sesame'),
             value=(dict(name='resnet18', kwargs=dict(layers='all')), "timm .* can't make 'resnet18'"), other=(dict(name='resnet34', kwargs=dict(num_classes=10)), 'another|isn.t of this'), classes=(dict(name='resnet18', kwargs=dict(num_classes=11)), r"'fc.weight' has the shape .11, 512. here, .10, 512."))

@pytest.mark.parametrize('case', ARCHS)
def test_forged_architecture(timm_files, tmp_path, case):
    arch,match = ARCHS[case]
    refuses_load(match, rewrite(timm_files/'resnet18.safetensors', tmp_path/'bad', _set(['arch'], arch)), arch=None)


def test_another_architecture(saved, timm_files):
    refuses_load(r"another model: 'stem.weight' has the shape .16, 3, 3, 3. here, .8, 3, 3, 3. in the plan", saved[2], arch=lambda: Net(16))
    refuses_load("another architecture: this model has no 'stem.weight'. Nearest", saved[2], arch=lambda: nn.Sequential(nn.Conv2d(3, 8, 3)))
    refuses_load("arch was cut itself", saved[2], arch=saved[0])
    refuses_load("arch made a int, not a model", saved[2], arch=lambda: 3)
    refuses_load("arch=7 is no architecture", saved[2], arch=7)
    refuses_load("map_location='gpu' is no device", saved[2], map_location='gpu')
    refuses_load('another', timm_files/'resnet18.safetensors', arch='mobilenetv2_100')
    assert load_compressed(timm_files/'resnet18.safetensors', arch=('resnet18', dict(num_classes=10))).num_classes == 10
    with pytest.raises(FileNotFoundError): load_compressed('nowhere.safetensors')


def test_version_hint(timm_files, tmp_path):
    def older(head, tensors):
        head['made_with']['timm'] = '0.0.1'
        del tensors['fc.bias']
    refuses_load(f"written with timm 0.0.1, this is {timm.__version__}", rewrite(timm_files/'resnet18.safetensors', tmp_path/'bad', older), arch=None)


def test_not_strict(saved, tmp_path):
    def change(head, tensors):
        del tensors['head.bias']
        tensors['spare'] = torch.ones(2)
    path = rewrite(saved[2], tmp_path/'other', change)
    with pytest.warns(UserWarning, match="the file has no 'head.bias'; the model has no 'spare'"): again = load_compressed(path, arch=Net, strict=False)
    assert again.stem.weight.equal(saved[0].stem.weight) and again.head.bias.isfinite().all()
    refuses_load('has the shape', rewrite(saved[2], tmp_path/'bad', _tensor('a.bias', torch.zeros(2))), strict=False)
    b = bytearray(saved[2].read_bytes())
    b[-1] ^= 1
    (tmp_path/'bad').write_bytes(b)
    refuses_load('damaged', tmp_path/'bad', strict=False)


def test_not_strict_draws_what_is_missing(timm_files, tmp_path):
    "Values that no file overwrites aren't left to chance"
    path = rewrite(timm_files/'resnet18.safetensors', tmp_path/'other', _tensor('fc.weight', None))
    with pytest.warns(UserWarning, match='fc.weight'): a = load_compressed(path, strict=False)
    with pytest.warns(UserWarning, match='fc.weight'): b = load_compressed(path, strict=False)
    assert a.fc.weight.equal(b.fc.weight) and .001 < a.fc.weight.std() < .5


class Table(nn.Module):
    def __init__(self, n=1):
        super().__init__()
        self.w = nn.Parameter(torch.ones(2))
        for i in range(n): self.register_buffer(f't{i}', torch.full((2,), float(i)), persistent=False)


def test_tables_come_and_go(tmp_path):
    model = Table(2)
    model.t0.fill_(5)
    path = save_compressed(model, tmp_path/'t')
    assert load_compressed(path, arch=lambda: Table(1)).t0.tolist() == [5., 5.]
    more = load_compressed(path, arch=lambda: Table(3))
    assert more.t2.tolist() == [2., 2.] and more.t0.tolist() == [5., 5.]


class Cached(nn.Module):
    "A table of the size of the last input, as convit keeps"
    def __init__(self): super().__init__(); self.f = nn.Linear(3, 3); self.register_buffer('at', torch.zeros(1), persistent=False)
    def forward(self, x):
        if len(self.at)!=len(x): self.at = torch.arange(float(len(x)))
        return self.f(x)+self.at[:,None]


def test_tables_that_follow_the_input(tmp_path):
    model,x = Cached().eval(),torch.randn(5, 3)
    y = run(model, x)
    again = load_compressed(save_compressed(model, tmp_path/'c', arch=Cached), arch=Cached)
    assert again.at.tolist() == [0, 1, 2, 3, 4] and run(again, x).equal(y)


def test_half_precision_tables(tmp_path):
    "Non-persistent buffers follow model.half(), and their code wouldn't"
    model = timm.create_model('swin_tiny_patch4_window7_224', num_classes=10, img_size=64, window_size=4, embed_dim=24, depths=(2,), num_heads=(2,)).eval().bfloat16()
    assert any(not n.endswith(('weight','bias')) and t.dtype==torch.bfloat16 for n,t in model.named_buffers())
    x = torch.randn(1, 3, 64, 64).bfloat16()
    assert run(load_compressed(save_compressed(model, tmp_path/'s')), x).equal(run(model, x))


# ---------------------------------------------------------------- nothing runs

class Payload:
    def __init__(self, path): self.path = str(path)
    def __reduce__(self): return os.mkdir, (self.path,)


@pytest.mark.parametrize('kind', [*range(pickle.HIGHEST_PROTOCOL+1), 'torch', 'legacy', 'long'])
def test_no_code_runs(tmp_path, kind):
    mark,path = tmp_path/'it_ran',tmp_path/'model.safetensors'
    if kind=='torch': torch.save(Payload(mark), path)
    elif kind=='legacy': torch.save(Payload(mark), path, _use_new_zipfile_serialization=False)
    elif kind=='long': path.write_bytes(pickle.dumps([Payload(mark), 'x'*70000], 4))
    else: path.write_bytes(pickle.dumps(Payload(mark), kind))
    for f in load_compressed, describe_compressed:
        with pytest.raises(ValueError, match='is a pickle' if kind not in (0, 1) else 'no safetensors file'): f(path)
    assert not mark.exists()
    data = path.read_bytes()
    if kind not in ('torch', 'legacy', 'long'):
        pickle.loads(data)
        assert mark.exists(), 'the payload is live'


def test_a_header_as_long_as_a_pickle_begins(tmp_path):
    "Lengths whose first byte is 0x80 are headers, not pickles"
    net,hit = nn.Linear(2, 2),0
    for n in range(256):
        path = save_compressed(net, tmp_path/'n', pad='x'*n)
        if path.read_bytes()[0]==0x80:
            hit += 1
            assert same_bits(load_compressed(path, arch=lambda: nn.Linear(2, 2)), net)
    assert hit


def test_torch_and_pickle_are_never_asked(saved, monkeypatch):
    def never(*args, **kw): raise AssertionError('a pickle was opened')
    for m,f in ((torch, 'load'), (pickle, 'load'), (pickle, 'loads'), (pickle, 'Unpickler')): monkeypatch.setattr(m, f, never)
    load_compressed(saved[2], arch=Net)


def test_plain_safetensors(tmp_path):
    save_file(dict(w=torch.zeros(2)), tmp_path/'w')
    refuses_load('tensors alone.*load_state_dict', tmp_path/'w')


# ---------------------------------------------------------------- looking inside

def test_describe(saved, monkeypatch):
    net,_,path = saved
    monkeypatch.setattr(checkpoint, 'build', lambda *a: pytest.fail('nothing is built'))
    monkeypatch.setattr(checkpoint, '_read', lambda *a: pytest.fail('no tensor is read'))
    c = describe_compressed(path)
    assert c.meta == dict(accuracy=.9) and c.asked == dict(ratio=.5) and c.plan == plan_of(net)
    assert c.obtained == plan_of(net).obtained and c.bytes == path.stat().st_size
    assert c.tensors['stem.weight'] == ('F32', (4, 3, 3, 3)) and c.tensors['bn.num_batches_tracked'] == ('I64', ())
    assert c.params == sum(p.numel() for p in net.parameters()) and c.arch is None
    text = repr(c)
    for part in ('Net, whose code the loader must give', f'{c.params:,} parameters', '13 tensors (12 F32, 1 I64)', 'ratio=0.5', '10 of 20 units', 'accuracy=0.9', 'head: the model returns it'): assert part in text, text
    assert set(c.made_with) == {'fastcompress', 'torch', 'timm'}


def test_describe_says_what_was_done(tmp_path):
    torch.manual_seed(0)
    make = lambda: Net(16, bias=False)
    net,x = make().eval(),torch.randn(2, 3, 8, 8)
    remove_(net, plan_for(find_groups(net, x), {'a': range(4)}), x=x)
    remove_(net, Plan(factors={'stem': dict(kind='spatial', ranks=[3])}))
    text = repr(describe_compressed(save_compressed(net, tmp_path/'n', arch=make)))
    for part in ('factored: stem', 'biases added: b', f'of {sum(p.numel() for p in make().parameters()):,} parameters'): assert part in text, text


def test_wide_meta(tmp_path):
    meta = dict(labels=['zebra', 'gnu'], mean=(.1, .2), history={'loss': [1, 2.5]}, name='Zoë', none=None)
    path = save_compressed(nn.Linear(2, 2), tmp_path/'n', **meta)
    assert describe_compressed(path).meta == {**meta, 'mean': [.1, .2]}


# ---------------------------------------------------------------- parts

def test_timm_arch():
    m = timm.create_model('resnet18.a1_in1k', num_classes=3, in_chans=1, drop_rate=.1)
    name,kw = timm_arch(m)
    assert name == 'resnet18.a1_in1k' and (kw['num_classes'], kw['in_chans'], kw['drop_rate']) == (3, 1, .1)
    assert timm_arch(nn.Linear(2, 2)) is None
    m.pretrained_cfg = {**m.pretrained_cfg, 'tag': 'of_another_time'}
    assert timm_arch(m)[0] == 'resnet18'


def test_values_that_are_not_drawn_dont_matter():
    torch.manual_seed(0)
    a = timm.create_model('resnet18', num_classes=10)
    state = torch.random.get_rng_state()
    with NoInit(): b = timm.create_model('resnet18', num_classes=10)
    assert torch.random.get_rng_state().equal(state), 'no random number was drawn'
    assert difference(a, b) == ''
    g = torch.Generator().manual_seed(0)
    with NoInit(): t = torch.zeros(3).normal_(generator=g)
    assert t.abs().sum()>0, 'what is drawn from a generator of its own may be a constant'


def test_stages_split_by_owner():
    p = Plan(keep={'a.weight': {0: [0]}, 'a.bias': {0: [0]}, 'f.0.weight': {0: [1]}, 'f2.weight': {1: [0]}}, shapes={'a.weight': [2, 2], 'a.bias': [2], 'f.0.weight': [2, 2], 'f2.weight': [2, 2]},
             attrs={'f.0': {'groups': 1}, 'f': {'groups': 2}, '': {'n': 3}}, factors={'f': dict(kind='svd', ranks=[1])}, biases=['a', 'f', 'f.0'])
    layers,factors,inner = stages(p)
    assert set(layers.keep) == {'a.weight', 'f2.weight'} and set(layers.attrs) == {'f', ''} and layers.biases == ['a', 'f'] and not layers.factors
    assert asdict(replace(factors, factors={})) == asdict(Plan()) and factors.factors == p.factors
    assert set(inner.keep) == {'f.0.weight'} and set(inner.attrs) == {'f.0'} and inner.biases == ['f.0']


def test_numbers_in_a_list():
    class Heads(nn.Module):
        def __init__(self): super().__init__(); self.widths,self.n = (4, 'x', 8),3
    m = replay_(Heads(), Plan(attrs={'': {'widths': {'2': 6}, 'n': 2}}))
    assert m.widths == (4, 'x', 6) and m.n == 2
    with pytest.raises(ValueError, match='numbers can only become'): replay_(Heads(), Plan(attrs={'': {'widths': {'1': 6}}}))


@pytest.mark.slow
@pytest.mark.parametrize('line', [l.split() for l in (Path(__file__).parent.parent/'benchmarks/timm_models.txt').read_text().splitlines() if l and not l.startswith('#')], ids=lambda l: l[0])
def test_timm_makes_it_again(line):
    "Name and arguments that are read from a model make the same one"
    torch.manual_seed(0)
    model = timm.create_model(line[0], num_classes=10)
    name,kw = check_arch(*timm_arch(model))
    assert difference(model, checkpoint.make_timm(name, kw)) == ''
