"Channels that hang together and their removal, on small nets that are hard: what is found, is it exact, is the model left as it was"
import copy, random, re, warnings
import numpy as np, pytest, torch
from torch import nn
from torch.utils._pytree import tree_map

from fastcompress.core import call
from fastcompress.prune.channels import find_groups
from fastcompress.prune.labels import Dim
from fastcompress.prune.plan import plan_for
from fastcompress.prune.remove import mask_, plan_of, remove, verify
from zoo import ZOO

pytestmark = pytest.mark.usefixtures('one_thread')

# ---- an own idea of what removal must equal

def tensors(o, seen=()):
    "All tensors in whatever a model returns"
    if isinstance(o, torch.Tensor): return [o]
    if isinstance(o, dict): o = list(o.values())
    if isinstance(o, (list, tuple)): return [t for v in o for t in tensors(v, seen)]
    return tensors(vars(o), (*seen, id(o))) if hasattr(o, '__dict__') and id(o) not in seen else []

def mapped(f, x): return tree_map(lambda t: f(t) if isinstance(t, torch.Tensor) and t.is_floating_point() else t, x)
def doubled(x): return mapped(torch.Tensor.double, x)
def another(x, seed=7):
    "Other values of the same shapes"
    g = torch.Generator().manual_seed(seed)
    return mapped(lambda t: torch.randn(t.shape, generator=g, dtype=t.dtype), x)

def fair_(model):
    "Biases, gains and running statistics that are neither zero nor one"
    g = torch.Generator().manual_seed(3)
    for n,t in [*model.named_parameters(), *model.named_buffers()]:
        if not t.is_floating_point(): continue
        if n.endswith('running_var'): t.data.uniform_(.5, 1.5, generator=g)
        elif n.endswith('running_mean'): t.data.normal_(0, .3, generator=g)
        elif t.ndim==1 and len(t)>1: t.data.add_(torch.empty_like(t).uniform_(-.3, .3, generator=g))
    return model

@torch.no_grad()
def zeroed(model, groups, removed):
    "A copy whose channels are zero where they are made: rows of a convolution or linear layer, norms, whatever isn't a reader. Independent of the roles given to layers that torch knows"
    model = copy.deepcopy(model)
    layers,params = dict(model.named_modules()),dict(model.named_parameters(remove_duplicate=False))
    for g in groups:
        for s in g.slices if len(removed.get(g.name, ())) else ():
            if s.name not in params: continue
            layer = layers[s.name.rpartition('.')[0]]
            if isinstance(layer, (nn.modules.conv._ConvNd, nn.Linear)) and s.name.endswith('.weight'): makes = s.axis==int(getattr(layer, 'transposed', False))
            else: makes = s.role!='in'
            if makes: params[s.name].index_fill_(s.axis, torch.as_tensor(s.index[np.asarray(removed[g.name])].ravel()), 0.)
    return model

def distance(got, want):
    "Largest relative difference of any tensor"
    assert [t.shape for t in got]==[t.shape for t in want]
    return max([float((a-b).norm()/b.norm().clamp(min=1e-12)) for a,b in zip(got, want) if a.is_floating_point()], default=0.)

@torch.no_grad()
def run(model, x): return tensors(call(model, mapped(torch.clone, x)))

def expected(why, words): return any(w and w in words for w in why.split('|'))

def kept_whole(plan): return {n: w for n,w in plan.notes.items() if 'kept whole' in w}

def some(groups, part, rng):
    "Units at random: a part of each group, at least one stays"
    return {g.name: rng.choice(g.n, min(g.n-1, max(1, int(g.n*part))), replace=False) for g in groups}

# ---- what must be as it was

def numbers_that_remember(o, path='', seen=None):
    "Places where a `Dim` was left"
    seen = set() if seen is None else seen
    if isinstance(o, Dim): return [path]
    if id(o) in seen or isinstance(o, (torch.Tensor, type)): return []
    seen.add(id(o))
    inside = o.items() if isinstance(o, dict) else enumerate(o) if isinstance(o, (list, tuple, set)) else vars(o).items() if hasattr(o, '__dict__') else ()
    return [p for k,v in list(inside) for p in numbers_that_remember(v, f'{path}.{k}', seen)]

def photo(model):
    "Everything about a model and the process that analysis must not change"
    M = nn.modules.module
    layers = dict(model.named_modules())
    return dict(values={n: t.detach().clone() for n,t in [*model.named_parameters(), *model.named_buffers()]}, ids={n: id(t) for n,t in [*model.named_parameters(), *model.named_buffers()]},
                grads={n: None if p.grad is None else p.grad.clone() for n,p in model.named_parameters()}, needs={n: p.requires_grad for n,p in model.named_parameters()},
                attrs={n: {k: (type(v), repr(v)) for k,v in vars(m).items() if not isinstance(v, (torch.Tensor, nn.Module)) and ' at 0x' not in repr(v) and not k.startswith('_')} for n,m in layers.items()}, types={n: type(m) for n,m in layers.items()},
                keys={n: list(vars(m)) for n,m in layers.items() if not isinstance(m, torch.jit.ScriptModule)}, training={n: m.training for n,m in layers.items()}, hooks={n: (list(m._forward_hooks), list(m._forward_pre_hooks), list(m._backward_hooks)) for n,m in layers.items()},
                dims=numbers_that_remember(model), rng=torch.get_rng_state(), numpy=np.random.get_state()[1], python=random.getstate(), dtype=torch.get_default_dtype(), modes=torch._C._len_torch_function_stack(), grad=torch.is_grad_enabled(),
                everywhere=[len(h) for h in (M._global_forward_hooks, M._global_forward_pre_hooks, M._global_backward_hooks, M._global_forward_hooks_always_called)])

def same(a, b):
    if isinstance(a, torch.Tensor): return isinstance(b, torch.Tensor) and a.dtype==b.dtype and a.shape==b.shape and bool(((a==b) | ((a!=a) & (b!=b))).all())
    if isinstance(a, np.ndarray): return np.array_equal(a, b)
    if isinstance(a, dict): return list(a)==list(b) and all(same(a[k], b[k]) for k in a)
    return a==b

def changed(before, model):
    "What differs from the photo"
    now = photo(model)
    return [(k, [n for n in {**v, **now[k]} if not same(v.get(n), now[k].get(n))] if isinstance(v, dict) else now[k]) for k,v in before.items() if not same(v, now[k])]

# ---- every net of the zoo

def parse(finds):
    groups,_,stays = finds.partition('|')
    found = {n: (int(k), mark or '') for n,k,mark in re.findall(r'(\S+) (\d+)(?: \((.*?)\))?(?:, |$)', groups.strip())}
    return found, dict(o.split(': ', 1) for o in stays.strip().split('; ')) if stays.strip() else {}

def made(name):
    torch.manual_seed(0)
    e = ZOO[name]
    return fair_(e.make()), e.x()

def check_found(groups, finds):
    found,stays = parse(finds)
    assert {g.name: g.n for g in groups}=={n: k for n,(k,_) in found.items()}
    for g in groups:
        assert bool(found[g.name][1])==bool(g.marks), (g.name, g.marks)
        assert any(found[g.name][1] in m for m in g.marks) or not g.marks, (g.name, g.marks)
    others = {n: w for n,w in groups.frozen.items() if n not in stays and 'the model returns it' not in w}
    assert not others, others
    for n,why in stays.items(): assert why in groups.frozen[n], (n, groups.frozen[n])

def check_exact(model, groups, removed, x, kept='', exact=True):
    "The removed model is the one with zeros, on `x` and on another input; without proof too unless constants are folded"
    plan = plan_for(groups, removed)
    small = remove(model, plan, x)
    done = plan_of(small)
    assert all(expected(kept, w) for w in kept_whole(done).values()), kept_whole(done)
    assert kept or set(done.removed)==set(removed)
    for x_ in (x, another(x)) if exact else ():
        want = run(zeroed(model, groups, done.removed), x_)
        assert distance(run(small, x_), want)<1e-9
        assert distance(run(mask_(copy.deepcopy(model), done), x_), want)<1e-9
    if exact and not kept and not verify(model, plan, x).folds: assert distance(run(remove(model, plan), x), run(mask_(copy.deepcopy(model), plan), x))<1e-9
    return small

def check_trains(model, x):
    "Forward and backward in training mode, each gradient of the shape of its parameter"
    out = tensors(call(model.train(), mapped(torch.clone, x)))
    sum(t.square().sum() for t in out if t.is_floating_point()).backward()
    with_grad = [p for p in model.parameters() if p.grad is not None]
    assert with_grad and all(p.grad.shape==p.shape for p in with_grad)

def check_zoo(name):
    e,(model,x) = ZOO[name],made(name)
    shapes = [t.shape for t in run(model.eval(), x)]
    single,x_ = copy.deepcopy(model),x
    if e.exact: model,x_ = model.double(),doubled(x)
    before = photo(model.train())
    groups = find_groups(model, x_)
    assert not changed(before, model)
    check_found(groups, e.finds)
    model.eval()
    rng,before = np.random.default_rng(0),photo(model)
    exact = [g for g in groups if not g.marks]
    if exact:
        check_exact(model, groups, some(exact, .5, rng), x_, e.kept, e.exact)
        check_exact(model, groups, some(exact, 1, rng), x_, e.kept, e.exact)
    assert not changed(before, model)
    small = remove(single, plan_for(groups, some(groups, .5, rng)), x)
    assert [t.shape for t in run(small, x)]==shapes
    why = e.inexact or e.kept
    assert all(expected(why, w) for w in kept_whole(plan_of(small)).values()), kept_whole(plan_of(small))
    if e.trains: check_trains(small, x)

@pytest.mark.parametrize('name', ZOO)
def test_zoo(name): check_zoo(name)
