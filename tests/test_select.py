"Which channels go: scores of groups, counts, rounding, costs; and the table that predicts milliseconds"
import json, math
import numpy as np, pytest, torch, torch.nn.functional as F
from copy import deepcopy
from dataclasses import replace
from hypothesis import given, settings, strategies as st
from math import prod
from torch import nn

from fastcompress.measure.count import count_macs, n_params
from fastcompress.measure.latency import Latency
from fastcompress.prune.budget import LatencyTable, fit_latency, grid_widths, latency_table, plot_table, record
from fastcompress.prune.channels import find_groups
from fastcompress.prune.plan import plan_for, plan_from_json, plan_to_json
from fastcompress.prune.remove import mask_, remove
from fastcompress.prune.select import (AnnealScope, Budget, allowed_widths, covered_groups, describe, first_step, fit_widths, gather, global_ladder, group_scores, kept_units,
                                       local_ladder, lowest, makers, named_parts, normalisers, parse_budget, select, zeroed)
from helpers import timm_model

pytestmark = pytest.mark.usefixtures('one_thread')
quick = settings(max_examples=80, deadline=None)

def rand(*shape, seed=0): return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
def close(a, b, tol=1e-5): torch.testing.assert_close(torch.as_tensor(a), torch.as_tensor(b), rtol=tol, atol=tol)

class Net(nn.Module):
    "A residual pair, norms, an odd width and a layer that nothing can cut"
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.stem,self.n0 = nn.Conv2d(3, 24, 3, padding=1),nn.BatchNorm2d(24)
        self.a,self.na = nn.Conv2d(24, 40, 3, padding=1),nn.BatchNorm2d(40)
        self.b,self.c,self.head = nn.Conv2d(40, 24, 1),nn.Conv2d(24, 30, 3, stride=2),nn.Linear(30, 16)
        for n in self.n0,self.na: nn.init.uniform_(n.weight, -1.5, 1.5); nn.init.normal_(n.bias)
    def forward(self, x):
        x = F.relu(self.n0(self.stem(x)))
        x = x + self.b(F.relu(self.na(self.a(x))))
        return self.head(F.relu(self.c(x)).mean((2,3)))

@pytest.fixture(scope='module')
def net():
    model = Net().eval()
    return find_groups(model, rand(1, 3, 8, 8))

def batches(n=2, size=8, classes=5): return [((rand(4, 3, size, size, seed=i),), (torch.arange(4)%classes,)) for i in range(n)]

_models = {}
def model_of(arch):
    if arch not in _models:
        size = dict(test_vit=160).get(arch, 64)
        model,x = timm_model(arch, size, 2)
        _models[arch] = find_groups(model, x[:1]),x
    return _models[arch]
ARCHS = 'resnet18','mobilenetv2_100','test_vit'

# scores

def test_groups_under_test_are_what_the_tests_assume(net):
    assert [(g.name, g.n, g.size) for g in net]==[('stem',24,1),('a',40,1),('c',30,1)]
    assert makers(net['stem'])==['stem','b']

@pytest.mark.parametrize('reduce', ['mean','sum','max'])
def test_scores_by_loops(net, reduce):
    m = net.model
    per = [[w[i].square().sum().item() for w in (m.stem.weight, m.b.weight)] for i in range(24)]
    want = [dict(mean=sum(p)/2, sum=sum(p), max=max(p))[reduce] for p in per]
    close(group_scores(net, 'l2', reduce=reduce, normalise='none')['stem'], want)
    close(group_scores(net, 'l2', reduce=reduce)['stem'], torch.tensor(want)/np.mean(want))

def test_readers_count_when_asked(net):
    m,got = net.model,{s: group_scores(net, 'l1', side=s, normalise='none')['a'] for s in ('out','in','both')}
    close(got['out'], m.a.weight.abs().sum((1,2,3)).detach())
    close(got['in'], m.b.weight.abs().sum((0,2,3)).detach())
    close(got['both'], (got['out']+got['in'])/2)

@pytest.mark.parametrize('groups', [1, 2])
@pytest.mark.parametrize('score', ['l2','fpgm'])
def test_transposed_convolutions_are_read_along_their_outputs(groups, score):
    torch.manual_seed(0)
    up = nn.ConvTranspose2d(8, 16, 2, groups=groups, bias=False)
    found = find_groups(nn.Sequential(nn.Conv2d(3, 8, 1), up, nn.Conv2d(16, 2, 1)), rand(1, 3, 4, 4))
    filters = [up.weight.detach()[8//groups*(o//(16//groups)):][:8//groups, o%(16//groups)] for o in range(16)] # what makes output o
    worth = [f.square().sum() if score=='l2' else sum((f-q).norm() for q in filters) for f in filters]
    want = torch.tensor([sum(worth[o::16//groups])/(1 if score=='l2' else groups) for o in range(16//groups)])
    assert found['1'].n==16//groups
    close(group_scores(found, score, normalise='none')['1'], want, 1e-4)

def test_a_matrix_multiplied_from_the_right_is_read_by_columns():
    class Bare(nn.Module):
        def __init__(self):
            super().__init__()
            self.w,self.fc = nn.Parameter(rand(6, 12)),nn.Linear(12, 3)
        def forward(self, x): return self.fc(F.relu(x@self.w))
    found = find_groups(Bare(), rand(2, 6))
    assert [(s.name, s.axis) for s in found[0].slices if s.role=='out']==[('w', 1)]
    w = found.model.w.detach()
    close(group_scores(found, 'l1', normalise='none')['w'], w.abs().sum(0))
    close(group_scores(found, 'fpgm', normalise='none')['w'], torch.cdist(w.T, w.T).sum(1), 1e-4)
    stats = gather(found, 'taylor', [(rand(4, 6), torch.arange(4)%3)], F.cross_entropy)
    close(group_scores(found, 'taylor', stats, normalise='none')['w'], stats['saliency']['w'].sum(0), 1e-6)

def test_heads_are_units():
    groups,x = model_of('test_vit')
    g = groups['blocks.0.attn.qkv']
    w = groups.model.blocks[0].attn.qkv.weight.detach() # [3*heads*dim, in]
    dim = w.shape[0]//3//g.n
    want = w.view(3, g.n, dim, -1).square().sum(3).mean((0,2))
    assert (g.n, g.size)==(2, 96)
    close(group_scores(groups, normalise='none')[g.name], want)

def test_taylor_and_obd_against_autograd(net):
    m,data = net.model,batches()
    stats = gather(net, 'taylor', data, F.cross_entropy)
    m.train() # the probe differentiates with batch statistics
    sal = [sum(torch.autograd.grad(F.cross_entropy(m(x[0]), y[0]), w)[0].square()*w.detach().square() for x,y in data)/2 for w in (m.stem.weight, m.b.weight)]
    m.eval()
    want = sum(s.flatten(1).sum(1) for s in sal)/2
    close(group_scores(net, 'taylor', stats, normalise='none')['stem']/want.mean(), want/want.mean(), 1e-3)
    close(group_scores(net, 'obd', stats, normalise='none')['stem']*2, group_scores(net, 'taylor', stats, normalise='none')['stem'], 1e-12)
    assert select(net, 'obd', stats=stats).removed==select(net, 'taylor', batches=data, loss_func=F.cross_entropy).removed

def test_activation_statistics_are_gathered_for_makers_only(net):
    stats = gather(net, 'apoz', batches(), names=['a'])
    assert set(stats['zeros'])=={'a'}
    m = net.model
    with torch.no_grad(): zero = torch.cat([(F.relu(m.na(m.a(F.relu(m.n0(m.stem(x[0]))))))==0).float() for x,_ in batches()]).mean((0,2,3))
    close(group_scores(net, 'apoz', stats, normalise='none', names=['a'])['a'], 1-zero)

def test_excluded_groups_are_not_measured(net, monkeypatch):
    import fastcompress.prune.select as module
    seen,real = [],module.probe
    monkeypatch.setattr(module, 'probe', lambda model, data, loss, weights, *args: seen.append(list(weights)) or real(model, data, loss, weights, *args))
    select(net, 'taylor', exclude='a', batches=batches(), loss_func=F.cross_entropy)
    assert seen==[['stem','b','c']]

def test_slimming_reads_every_norm_of_the_group():
    groups,x = model_of('resnet18')
    m = groups.model
    got = group_scores(groups, 'bn_scale', normalise='none')['conv1']
    close(got, (m.bn1.weight.abs()+m.layer1[0].bn2.weight.abs()+m.layer1[1].bn2.weight.abs()).detach()/3)

def test_slimming_without_norms_is_an_error_or_a_noted_fallback(net):
    with pytest.raises(ValueError, match=r"no norm layer scales the channels of 'c' \(1 of 3 groups\).*fallback='l2'"): select(net, 'bn_scale')
    plan = select(net, 'bn_scale', fallback='l1', scope='local')
    assert plan.notes['c'].startswith("scored by 'l1': no norm layer scales its channels")
    assert plan.removed['c']==sorted(net.model.c.weight.abs().sum((1,2,3)).sort(stable=True).indices[:30-16].tolist())
    assert 'c' not in select(net, 'bn_scale', exclude='c').removed

@given(st.lists(st.floats(0, 1e3, width=32), min_size=1, max_size=20), st.sampled_from(sorted(normalisers)), st.floats(.01, 100))
@quick
def test_normalising_keeps_the_order_and_forgets_the_level(values, how, factor):
    s = torch.tensor(values)
    f = normalisers[how]
    out = f(s)
    assert out.isfinite().all() and out.shape==s.shape
    i = s.sort(stable=True).indices
    assert (out[i].diff()>=-1e-6).all()
    if how!='none' and (s==0).logical_or(s>1e-3).all() and s.max()-s.min()>1e-2: close(f(s*factor), out, 1e-3)

def test_normalised_values():
    s = torch.tensor([1., 2., 5.])
    close(normalisers['mean'](s), s/(8/3)); close(normalisers['max'](s), s/5); close(normalisers['lamp'](s), [1/8, 2/7, 1.])
    close(normalisers['standard'](s).mean(), 0.); close(normalisers['standard'](s).square().mean(), 1.)
    close(normalisers['mean'](-s), -s/(8/3))
    for f in normalisers.values(): assert torch.equal(f(torch.zeros(4)), torch.zeros(4))
    for how in set(normalisers)-{'none'}: close(normalisers[how](s*7), normalisers[how](s))

def test_half_precision_does_not_underflow():
    m = nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 2))
    m[0].weight.data = torch.linspace(1e-4, 2e-4, 16)[:,None].expand(16, 4).clone()
    found = find_groups(m, rand(1, 4))
    m.half()
    assert (group_scores(found, 'l2', normalise='none')['0'].diff()>0).all()

def test_random_is_seeded_and_its_own(net):
    torch.manual_seed(1); a = select(net, 'random', seed=3).removed
    torch.manual_seed(2); b = select(net, 'random', seed=3).removed
    assert a==b!=select(net, 'random', seed=4).removed
    s = group_scores(net, 'random', normalise='none', seed=3)
    assert s['stem'][0]!=s['a'][0] and all(v.min()>=0 and v.max()<1 for v in s.values())

def test_scores_come_from_callables_and_dictionaries(net):
    close(group_scores(net, lambda w: w.flatten(1).amax(1), normalise='none')['a'], net.model.a.weight.detach().flatten(1).amax(1))
    ready = {g.name: -torch.arange(g.n).float() for g in net}
    assert select(net, ready, scope='local', round_to=1).removed['a']==list(range(20, 40))
    assert select(net, ready).asked['score']=='given'
    with pytest.raises(ValueError, match=r"no scores for group 'c'.*exclude=\['c'\]"): select(net, {k: v for k,v in ready.items() if k!='c'})
    assert 'c' not in select(net, {k: v for k,v in ready.items() if k!='c'}, exclude='c').removed

@pytest.mark.parametrize('how', [*sorted(normalisers), lambda s: s.nan_to_num()])
def test_broken_weights_are_named(net, how):
    was = net.model.a.weight.data.clone()
    net.model.a.weight.data[3,0,0,0] = float('nan')
    try:
        with pytest.raises(ValueError, match="group 'a' has NaN among its scores"): select(net, normalise=how)
    finally: net.model.a.weight.data = was

# rounding

sizes = st.integers(1, 12) | st.sampled_from([16, 32, 64, 96])

@given(st.integers(1, 70), sizes, st.integers(1, 20), st.integers(1, 40), st.data())
@settings(max_examples=300, deadline=None)
def test_rounding_rules(n, size, round_to, least, data):
    keep = data.draw(st.integers(0, n))
    got,note = kept_units(keep, n, size, round_to, least)
    assert 1<=got<=n and got*size>=min(least, n*size)
    assert got==n or size>=round_to or got*size%round_to==0
    ok = [k for k in range(1, n+1) if k*size>=min(least, n*size) and (k==n or size>=round_to or k*size%round_to==0)]
    assert ok==allowed_widths(n, size, round_to, least)
    assert abs(got-keep)==min(abs(k-keep) for k in ok)
    assert got==max(k for k in ok if abs(k-keep)==abs(got-keep)) # ties keep more
    assert (note is None)==(got==keep)
    if keep<n: assert got<=kept_units(keep+1, n, size, round_to, least)[0]

def test_rounding_by_example():
    assert kept_units(12, 24)==(16, 'asked to keep 12 of 24, rounding to 8 keeps 16')
    assert kept_units(2, 64, min_channels=24)==(24, 'asked to keep 2 of 64, min_channels=24 keeps 24')
    assert kept_units(1, 3, 64)==(1, None) and kept_units(0, 3, 64)==(1, 'asked to keep 0 of 3 (units of 64 channels), rounding to 8 keeps 1')
    assert kept_units(3, 6, 4, 8, 1)==(4, 'asked to keep 3 of 6 (units of 4 channels), rounding to 8 keeps 4')
    assert kept_units(5, 20, round_to=1, min_channels=1)==(5, None)

# counting

names = st.dictionaries(st.sampled_from('abcd'), st.lists(st.sampled_from([0., 1., 2., 2.5, 3.]), min_size=1, max_size=9), min_size=1, max_size=4)

@given(names, st.floats(0, 1))
@settings(max_examples=200, deadline=None)
def test_global_counts_by_sorting(scores, ratio):
    scores = {n: torch.tensor(s) for n,s in scores.items()}
    lad = global_ladder(scores, dict.fromkeys(scores, 1))
    line = sorted((s, i, n) for i,n in enumerate(scores) for s in scores[n].tolist())[:round(ratio*sum(map(len, scores.values())))]
    assert lad.exact(ratio)=={n: sum(o[2]==n for o in line) for n in scores}

@given(names, st.dictionaries(st.sampled_from('abcd'), st.sampled_from([1, 2, 64]), min_size=4), st.floats(0, 1))
@settings(max_examples=200, deadline=None)
def test_global_counts_come_nearest_in_channels(scores, size, ratio):
    scores = {n: torch.tensor(s) for n,s in scores.items()}
    lad = global_ladder(scores, size)
    def channels(c): return sum(k*size[n] for n,k in c.items())
    goal = round(ratio*channels({n: len(s) for n,s in scores.items()}))
    assert abs(channels(lad.exact(ratio))-goal)==min(abs(channels(lad.counts(i))-goal) for i in range(lad.n+1))

@given(names, st.floats(0, 1))
@settings(max_examples=200, deadline=None)
def test_local_counts_and_every_ladder_climbs(scores, ratio):
    scores = {n: torch.tensor(s) for n,s in scores.items()}
    lad = local_ladder(scores, {})
    assert lad.exact(ratio)=={n: round(ratio*len(s)) for n,s in scores.items()}
    if not any(ratio*len(s)%1==.5 for s in scores.values()): assert lad.exact(ratio) in [lad.counts(i) for i in range(lad.n+1)] # no ratio between the steps gives anything else
    for lad in (lad, global_ladder(scores, dict.fromkeys(scores, 1))):
        steps = [lad.counts(i) for i in range(lad.n+1)]
        assert all(a[n]<=b[n] for a,b in zip(steps, steps[1:]) for n in a)
        assert not any(steps[0].values()) and steps[-1]=={n: len(s) for n,s in scores.items()}

@given(st.floats(0, 1), st.sampled_from(['global','local']), st.sampled_from([1, 4, 8]), st.sampled_from([1, 8, 25]))
@settings(max_examples=40, deadline=None)
def test_selection_takes_the_lowest_of_each_group(net, ratio, scope, round_to, least):
    plan,scores = select(net, ratio=ratio, scope=scope, round_to=round_to, min_channels=least),group_scores(net)
    for g in net:
        gone = plan.removed.get(g.name, [])
        left = [i for i in range(g.n) if i not in gone]
        assert len(left)>=min(least, g.n) and (not gone or len(left)%round_to==0)
        assert not gone or scores[g.name][gone].max()<=scores[g.name][left].min()
    if round_to==least==1 and scope=='global' and ratio<.9: assert sum(map(len, plan.removed.values()))==round(ratio*94)
    if round_to==least==1 and scope=='local' and ratio<.9: assert [len(plan.removed.get(g.name, [])) for g in net]==[round(ratio*g.n) for g in net]

def test_ties_go_by_position(net):
    flat = {g.name: torch.ones(g.n) for g in net}
    assert select(net, flat, ratio=30/94, round_to=1, min_channels=1).removed=={'stem': list(range(23)), 'a': list(range(6))}
    assert 'asked to keep 0 of 24' in select(net, flat, ratio=30/94, round_to=1, min_channels=1).notes['stem']

def test_the_last_unit_stays(net):
    for scope in 'global','local':
        plan = select(net, ratio=1., scope=scope, round_to=1, min_channels=1)
        assert {n: len(u) for n,u in plan.removed.items()}=={g.name: g.n-1 for g in net}

def test_nothing_asked_nothing_gone(net):
    plan = select(net, ratio=0.)
    assert plan.removed=={} and plan.empty and set(plan.notes)=={'head'}

# who takes part

def test_layers_and_groups_by_name_glob_and_type(net):
    assert covered_groups(net, exclude=nn.Linear)==(['stem','a','c'], {})
    assert covered_groups(net, include=['a','c'])==(['a','c'], {'stem': 'not included'})
    assert covered_groups(net, include='[ab]')==(['a'], {'stem': "its channels are also made by 'stem'; name the group 'stem' to include it", 'c': 'not included'})
    assert covered_groups(net, include=['stem','a'], exclude=lambda n, m: getattr(m, 'out_channels', 0)==40)==(['stem'], {'a': 'excluded', 'c': 'not included'})
    plan = select(net, exclude='b')
    assert 'stem' not in plan.removed and plan.notes['stem']=="excluded: 'b'"
    assert "excluded: 'b'" in describe(plan)

def test_parts_by_name(net):
    plan = select(net, ratio={'stem': 1/3, '*': .2, 'c': 0.}, round_to=1)
    assert {n: len(u) for n,u in plan.removed.items()}=={'stem': 8, 'a': 8}
    assert select(net, scope={'stem': 1/3, '*': .2, 'c': 0.}, ratio=.9, round_to=1).removed==plan.removed
    assert named_parts(net, ['stem','a'], {'b': .5, '*': .1})=={'stem': .5, 'a': .1}

def test_two_layers_of_one_group_must_agree():
    groups,_ = model_of('resnet18')
    with pytest.raises(ValueError, match="'layer1.0.conv2' and 'layer1.1.conv2' belong to one group, 'conv1'"): named_parts(groups, ['conv1'], {'layer1.0.conv2': .5, 'layer1.1.conv2': .25})
    assert named_parts(groups, ['conv1'], {'layer1.0.conv2': .5, 'layer1.1.conv2': .25, 'conv1': .1})=={'conv1': .1}

BAD = [(dict(ratio=50), 'Percent'), (dict(ratio='half'), 'must be a number'), (dict(ratio={'stem': 1.5}), "ratio\\['stem'\\]"), (dict(ratio={'sten': .5}), "Nearest: 'stem'"),
       (dict(scope='locl'), "no scope 'locl'. Nearest: 'local'"), (dict(target='mac'), "no target 'mac'"), (dict(target='latency'), 'latency_table\\(groups, x\\)'), (dict(budget='fast'), "can't read the budget"),
       (dict(budget=7), "can't read the budget"), (dict(round_to=0), 'round_to=0'), (dict(round_to=2.5), 'round_to=2.5'), (dict(round_to=None), 'round_to=None'), (dict(round_to='8'), "round_to='8'"), (dict(scope='anneal', batches=[], loss_func=len), 'give batches'), (dict(min_channels=-1), 'min_channels=-1'), (dict(score='l3'), "no criterion 'l3'"),
       (dict(normalise='men'), "no normaliser 'men'. Nearest: 'mean'"), (dict(reduce='men'), "no reduce 'men'"), (dict(side='left'), "no side 'left'"), (dict(include='z'), "no layer matches 'z'"), (dict(exclude='*'), 'no group is left'),
       (dict(score='taylor'), "needs the statistic 'saliency'"), (dict(score='taylor', batches=[]), 'no batches'), (dict(scope='anneal'), 'give batches and loss_func'), (dict(scope=lambda s, r: {'x': .5}), "'x', which is no group"),
       (dict(ratio={'a': .5}, target='macs'), 'Give ratio=0.5'), (dict(ratio={'a': .5}, budget='half the macs'), 'Give ratio=0.5'), (dict(score='fpgm', side='in'), "Type side='out'"), (dict(budget='1 params'), 'is the least that can be'),
       (dict(score={'a': [1.]}, include='a'), 'has 40 units, its scores have the shape')]

@pytest.mark.parametrize('kw,match', BAD, ids=[f'{i}-{",".join(k)}' for i,(k,_) in enumerate(BAD)])
def test_malformed(net, kw, match):
    with pytest.raises(ValueError, match=match): select(net, **kw)

# costs

@pytest.mark.parametrize('arch', ARCHS)
@pytest.mark.parametrize('target', ['params','macs'])
def test_a_cost_is_met_and_is_that_of_the_removed_model(arch, target):
    groups,x = model_of(arch)
    for scope,ratio,round_to in (('global', .5, 8), ('local', .3, 1)):
        plan = select(groups, target=target, ratio=ratio, scope=scope, round_to=round_to)
        met = plan.asked['met']
        assert met['obtained']<=(1-ratio)*met['before']
        if scope=='global': assert met['obtained']>(.93-ratio)*met['before']
        small = remove(groups.model, plan)
        counted = dict(params=n_params, macs=lambda m: count_macs(m, x))[target]
        assert met['before']==counted(groups.model) and met['obtained']==counted(small)
        assert plan.asked['counts'][target]==[met['before'], met['obtained']]

@pytest.mark.parametrize('scope', ['global','local', lambda scores, ratio: {n: ratio**2 for n in scores}])
@pytest.mark.parametrize('target', ['params','macs','channels'])
def test_no_step_of_the_ladder_comes_closer(net, scope, target):
    from fastcompress.prune.select import _ladder, cost_of
    scores,sizes = group_scores(net),{g.name: g.size for g in net}
    cost,lad = cost_of(net, list(scores), target),_ladder(scope, scores, sizes)
    costs = sorted({cost(lowest(net, scores, lad.counts(i))[0]) for i in range(0, lad.n+1, 8 if lad.n>1000 else 1)})
    for want in (.3, .5, .77):
        b = Budget(target, at_most=want*cost({}))
        met = select(net, scope=scope, budget=b).asked['met']
        assert met['obtained']<=b.at_most and met['obtained']>=max(c for c in costs if c<=b.at_most)

@given(st.lists(st.integers(0, 9), min_size=1, max_size=30), st.integers(-1, 300))
@quick
def test_bisection(falls, limit):
    costs = [sum(falls)-c for c in np.cumsum([0]+falls).tolist()]
    got = first_step(costs.__getitem__, len(costs)-1, limit)
    assert got==next((i for i,c in enumerate(costs) if c<=limit), None)

def test_a_cost_of_your_own(net):
    def widest(removed): return max(g.n-len(removed.get(g.name, ())) for g in net)
    plan = select(net, target=widest, ratio=.6)
    assert plan.asked['met']['obtained']==16 and plan.asked['target']=='widest' and plan.asked['met']['target']=='widest'

def test_what_is_within_the_budget_already_stays(net): assert select(net, budget='100M params').removed=={} and select(net, budget='1x macs').removed=={}

@given(st.floats(0, 1), st.sampled_from(['channels','params','macs','latency']), st.sampled_from(['{:.4f}x {}','{:.4f} x of the {}']))
@quick
def test_relative_budgets(part, what, form):
    b = parse_budget(form.format(part, what))
    assert b.target==what and b.at_most is None and b.kept==float(f'{part:.4f}') and b.limit(200)==200*b.kept

@pytest.mark.parametrize('text,want', [('half the MACs', Budget('macs', .5)), ('a third of the params', Budget('params', 1/3)), ('25 % parameters', Budget('params', .25)), ('.5X Latency', Budget('latency', .5)),
    ('10ms', Budget('latency', at_most=10.)), ('1.5 s', Budget('latency', at_most=1500.)), ('250us', Budget('latency', at_most=.25)), ('300M macs', Budget('macs', at_most=3e8)), ('1.2g macs', Budget('macs', at_most=1.2e9)),
    ('2M params', Budget('params', at_most=2e6)), ('7b parameters', Budget('params', at_most=7e9)), ('512 channels', Budget('channels', at_most=512.)), ('  2K   Params ', Budget('params', at_most=2e3))])
def test_budgets(text, want):
    got = parse_budget(text)
    assert (got.target, got.kept)==(want.target, want.kept) and (got.at_most==want.at_most or math.isclose(got.at_most, want.at_most))

@pytest.mark.parametrize('text', ['', 'macs', '10', '10 mb', '-5 ms', '0.5 macs x', 'x macs', '1e3 macs', None, 3., '110% macs', '2x params', '3 GFLOPs', 'half the time flies', 'half the accuracy'])
def test_bad_budgets(text):
    with pytest.raises(ValueError): parse_budget(text)

# plans

@pytest.mark.parametrize('arch', ARCHS)
def test_a_plan_is_data_and_leaves_the_model_alone(arch):
    groups,x = model_of(arch)
    was = {k: v.clone() for k,v in groups.model.state_dict().items()}
    plan = select(groups, exclude=nn.Linear if arch!='test_vit' else 'head', target='macs', ratio=.3)
    assert plan_from_json(plan_to_json(plan))==plan and select(groups, exclude=nn.Linear if arch!='test_vit' else 'head', target='macs', ratio=.3)==plan
    assert all(torch.equal(v, was[k]) for k,v in groups.model.state_dict().items())
    assert plan.asked['exclude']==('Linear' if arch!='test_vit' else 'head')
    lines = describe(plan).splitlines()
    assert all(any(l.startswith(g.name+' ') and f'{g.n*g.size}' in l for l in lines) for g in groups)
    assert 'channels:' in lines[-3] and 'macs:' in lines[-1]

def test_the_record_is_complete(net):
    a = select(net, 'l1', .25, 'local', round_to=4, min_channels=2, include=['stem','a'], exclude=nn.Linear, seed=5, normalise='max', reduce='sum').asked
    want = dict(score='l1', ratio=.25, scope='local', target='channels', budget=None, round_to=4, min_channels=2, include=['stem','a'], exclude='Linear', seed=5, normalise='max', reduce='sum')
    assert {k: a[k] for k in want}==want
    assert a['counts']['channels']==[64, 52] and a['counts']['params']==[net.params(), net.params({'stem': range(4), 'a': range(8)})]
    assert json.loads(json.dumps(a))==a

def test_requested_and_obtained_are_both_told(net):
    plan = select(net, ratio=.45, scope='local')
    text = describe(plan)
    assert 'asked to remove 45.0% of the channels' in text and f"({1-plan.asked['counts']['channels'][1]/94:.1%} gone)" in text
    assert plan.notes=={'head': net.frozen['head'], 'stem': 'asked to keep 13 of 24, rounding to 8 keeps 16', 'a': 'asked to keep 22 of 40, rounding to 8 keeps 24'}

@pytest.mark.parametrize('arch', ARCHS)
def test_selected_plans_can_be_removed(arch):
    groups,x = model_of(arch)
    plan = select(groups, ratio=.5)
    with torch.no_grad(): out = remove(groups.model, plan, x, strict=True)(x)
    assert out.shape==(2, 10) and out.isfinite().all() and not plan.empty

# by trying

def test_zeroed_is_masked_and_put_back():
    groups,x = model_of('mobilenetv2_100')
    removed = select(groups, 'random', round_to=1).removed
    with torch.no_grad():
        before = groups.model(x)
        with zeroed(groups, removed) as m: inside = m(x)
        masked = mask_(deepcopy(groups.model), plan_for(groups, removed))(x)
        assert torch.equal(inside, masked) and not torch.equal(inside, before) and torch.equal(groups.model(x), before)
        with pytest.raises(ZeroDivisionError):
            with zeroed(groups, removed): 1/0
        assert torch.equal(groups.model(x), before)

def test_zeroed_leaves_what_reads_the_units_alone():
    "A sigmoid makes one half of nothing; that constant must still arrive"
    m = nn.Sequential(nn.Conv2d(3, 16, 1), nn.Sigmoid(), nn.Conv2d(16, 2, 1))
    groups,x = find_groups(m, rand(1, 3, 4, 4)),rand(2, 3, 4, 4)
    removed = {'0': list(range(8))}
    with torch.no_grad():
        masked = mask_(deepcopy(m), plan_for(groups, removed))(x)
        with zeroed(groups, removed): assert torch.equal(m(x), masked)

def test_annealing_measures_rounded_widths(net):
    seen = []
    def measure(m):
        seen.append(tuple(int((w.weight.flatten(1)==0).all(1).sum()) for w in (m.stem, m.a, m.c)))
        return float(len(seen))
    select(net, scope=AnnealScope(net, measure, n_iter=30, show=False), ratio=.4)
    assert len(set(seen))==len(seen)>3 # nothing is measured twice
    assert all(k==0 or (n-k)%8==0 for ks in seen for k,n in zip(ks, (24, 40, 30)))
    assert all(94*.4<=sum(ks)<94*.4+8 for ks in seen) # nobody wins by rounding up

@given(st.dictionaries(st.sampled_from('abcd'), st.tuples(st.integers(1, 40), st.sampled_from([1, 2, 8, 30]), st.floats(0, 1)), min_size=1), st.sampled_from([1, 4, 8]), st.integers(1, 20), st.floats(0, 1))
@settings(max_examples=200, deadline=None)
def test_fitted_widths_hold_the_total(groups, round_to, least, part):
    widths = {n: allowed_widths(k, size, round_to, least) for n,(k,size,_) in groups.items()}
    sizes = {n: size for n,(_,size,_) in groups.items()}
    goal = part*sum(k*size for k,size,_ in groups.values())
    keep = fit_widths({n: k*f for n,(k,_,f) in groups.items()}, widths, sizes, goal)
    left = sum(keep[n]*sizes[n] for n in keep)
    assert all(keep[n] in widths[n] for n in keep)
    assert left<=goal or all(keep[n]==widths[n][0] for n in keep)
    assert all(left+(k-keep[n])*sizes[n]>goal for n in keep for k in widths[n] if k>keep[n])

def test_annealing_finds_what_can_be_spared(net):
    "The measure punishes what `stem` loses; everything can be had from the others"
    stem = net['stem']
    def measure(m): return float(-(m.stem.weight.flatten(1).abs().sum(1)==0).sum())
    search = AnnealScope(net, measure, n_iter=60, show=False)
    plan = select(net, scope=search, ratio=.3)
    assert search.result.quality==0 and search.result.start<0 and 'stem' not in plan.removed
    assert plan.asked['scope']=='anneal'
    assert select(net, scope=AnnealScope(net, measure, n_iter=60, show=False), ratio=.3)==plan

def test_annealing_by_name_measures_the_loss(net):
    a = select(net, scope='anneal', ratio=.3, round_to=1, batches=batches(), loss_func=F.cross_entropy)
    assert a==select(net, scope='anneal', ratio=.3, round_to=1, batches=iter(batches()), loss_func=F.cross_entropy)
    def loss(plan):
        with torch.no_grad(), zeroed(net, plan.removed) as m: return sum(float(F.cross_entropy(m(x[0]), y[0])) for x,y in batches())/2
    assert loss(a)<loss(select(net, scope='local', ratio=.3, round_to=1))-.01

def test_widths_that_were_rounded_up_most_give_first():
    widths = dict(a=[8, 16, 24], b=[8, 16, 24])
    assert fit_widths(dict(a=14, b=20), widths, dict(a=1, b=1), 38)==dict(a=16, b=16)
    assert fit_widths(dict(a=11, b=9), widths, dict(a=1, b=1), 24)==dict(a=16, b=8)

def test_batches_may_be_an_iterator(net):
    def run(data): return select(net, 'taylor', scope='anneal', batches=data, loss_func=F.cross_entropy)
    assert run(iter(batches()))==run(batches())

def test_annealing_holds_channels_only(net):
    for kw in dict(target='macs'), dict(budget='300 channels'), dict(budget='half the params'):
        with pytest.raises(ValueError, match="annealing holds the number of channels"): select(net, scope='anneal', batches=batches(), loss_func=F.cross_entropy, **kw)
    search = AnnealScope(net, lambda m: 0., n_iter=2, show=False)
    assert select(net, scope=search, budget='70% channels').asked['counts']==select(net, scope=search, ratio=.3).asked['counts']

# the table of times

class Machine:
    "Time of a layer is bilinear in its widths, that of the rest a constant and so much per output; `bias` on whole models is what the table can't know"
    def __init__(self, const=.5, per_output=1e-6, bias=lambda ms: ms): self.const,self.per_output,self.bias,self.calls = const,per_output,bias,[]
    def layer(self, w, volume, groups, back):
        inputs = w[0]//groups if back else w[1]
        return .02 + 3e-4*w[0] + 2e-4*w[1] + volume*inputs*prod(w[2:])*1e-7
    def model(self, m, x):
        calls = record(m, x)
        return self.bias(sum(self.layer(c.w, c.volume, c.groups, c.back) for c in calls) + self.const + self.per_output*sum(c.volume for c in calls))
    def __call__(self, fs, x, n=30, warmup=5, threads=1):
        self.calls.append((list(fs), n, threads))
        def ms(k, f):
            args = x[k] if isinstance(x, dict) else x
            if isinstance(f, nn.Module): return self.model(f, args)
            func,more,named = f.args
            return self.layer(tuple(args[1].shape), f(*args).numel(), named.get('groups', more[3] if len(more)>3 else 1), 'transpose' in func.__name__)
        with torch.no_grad(): return {k: Latency(k, (ms(k, f),)*n, None, threads, tuple(fs)) for k,f in fs.items()}

def table_of(groups, x, machine=None, **kw):
    machine = machine or Machine()
    table = latency_table(groups, x, timer=machine, **kw)
    table.fixed = machine.const/table.rest
    return table,machine

@pytest.mark.parametrize('arch', ARCHS)
def test_a_bilinear_machine_is_predicted_exactly(arch):
    groups,x = model_of(arch)
    table,machine = table_of(groups, x)
    assert math.isclose(table.predict({}), machine.model(groups.model, x), rel_tol=1e-9)
    for kw in dict(ratio=.5), dict(ratio=.3, round_to=1, score='random'), dict(ratio=.8, scope='local', min_channels=1):
        plan = select(groups, **kw)
        assert math.isclose(table.predict(plan.removed), machine.model(remove(groups.model, plan), x), rel_tol=1e-6), (arch, kw)

@pytest.mark.parametrize('arch', ARCHS)
def test_every_multiplying_layer_is_recorded(arch):
    groups,x = model_of(arch)
    calls = record(groups.model, x)
    layers = {n for n,m in groups.model.named_modules() if isinstance(m, (nn.Conv2d, nn.Linear))}
    assert {c.weight.removesuffix('.weight') for c in calls}==layers
    macs = sum(c.volume*prod(c.w[1:]) for c in calls)/len(x)
    assert macs==count_macs(groups.model, x) if arch!='test_vit' else macs<count_macs(groups.model, x)

def test_a_standardised_weight_belongs_to_its_layer():
    from timm.layers import StdConv2d
    m = nn.Sequential(StdConv2d(3, 16, 3), nn.ReLU(), StdConv2d(16, 8, 3))
    assert [c.weight for c in record(m, rand(1, 3, 8, 8))]==['0.weight','2.weight']

def test_transposed_and_grouped_layers_are_timed_at_their_widths():
    torch.manual_seed(0)
    m = nn.Sequential(nn.Conv2d(3, 16, 1), nn.ConvTranspose2d(16, 32, 2, stride=2), nn.ReLU(), nn.ConvTranspose2d(32, 32, 2, groups=32), nn.ReLU(), nn.Conv2d(32, 64, 3, groups=4, padding=1), nn.ReLU(),
                      nn.ConvTranspose2d(64, 32, 1, groups=2), nn.Conv2d(32, 2, 1))
    x = rand(2, 3, 4, 4)
    groups = find_groups(m, x)
    table,machine = table_of(groups, x)
    assert [c.whole for c in record(m, x)]==[False, False, True, False, False, False]
    for ratio in .3, .5, .8:
        plan = select(groups, 'random', ratio=ratio, round_to=1, min_channels=1)
        assert len(plan.removed)==len(groups)>3
        assert math.isclose(table.predict(plan.removed), machine.model(remove(m, plan), x), rel_tol=1e-6)

def test_groups_that_do_not_divide_the_rounding():
    m = nn.Sequential(nn.Conv2d(3, 24, 1), nn.Conv2d(24, 96, 3, groups=3), nn.Conv2d(96, 2, 1))
    table,_ = table_of(find_groups(m, rand(1, 3, 8, 8)), rand(1, 3, 8, 8))
    k = table.kinds[table.calls[1]['kind']]
    assert (k['out'], k['in'])==([24, 48, 72, 96], [2, 4, 6, 8]) # of 96 rows, and of 8 inputs in each group

def test_channels_last_is_timed_channels_last():
    m = nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 8, 3)).to(memory_format=torch.channels_last)
    x,seen = rand(1, 3, 8, 8).to(memory_format=torch.channels_last),[]
    class Look(Machine):
        def __call__(self, fs, x, **kw):
            seen.extend((a[0].stride(), a[1].stride()) for k,a in x.items() if k!='model')
            return super().__call__(fs, x, **kw)
    groups = find_groups(m, x)
    latency_table(groups, x, timer=Look())
    assert seen and all(s[1]==1 for pair in seen for s in pair)

def test_only_what_can_change_is_measured(net):
    table,machine = table_of(net, rand(1, 3, 8, 8))
    by = {c['weight']: table.kinds[c['kind']] for c in table.calls}
    assert by['stem.weight']['in']==[3] and by['stem.weight']['out']==grid_widths(24)==[8, 16, 24]
    assert by['head.weight']['out']==[16] and by['head.weight']['in']==grid_widths(30)==[8, 16, 24, 30]
    assert len(machine.calls[0][0])==1+3+len(grid_widths(40))*3+3*len(grid_widths(40))+3*4+4
    assert machine.calls[0][1:]==(15, 1)

@given(st.integers(1, 600), st.integers(1, 8), st.sampled_from([1, 4, 8, 16]))
@quick
def test_grid(full, points, round_to):
    got = grid_widths(full, points, round_to)
    assert got==sorted(set(got)) and got[-1]==full and got[0]>=1 and len(got)<=points
    assert all(w%round_to==0 for w in got[:-1])

def test_layers_slower_alone_than_together_are_scaled(net):
    x = rand(1, 3, 8, 8)
    table,_ = table_of(net, x)
    tight = replace(table, total=table.layers/2)
    assert tight.rest==0 and math.isclose(tight.predict({}), tight.total)

def test_a_table_survives_the_disk(net, tmp_path):
    x = rand(1, 3, 8, 8)
    table,_ = table_of(net, x)
    table.save(tmp_path/'t.json')
    back = LatencyTable.load(tmp_path/'t.json', net)
    r = select(net).removed
    assert back.predict(r)==table.predict(r) and back==table
    other = find_groups(nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3)), x)
    with pytest.raises(ValueError, match="measured on another model: 'stem.weight' has the shape .* there, none here"): LatencyTable.load(tmp_path/'t.json', other)
    for bad in '{', '[]', '{"calls": []}':
        (tmp_path/'bad.json').write_text(bad)
        with pytest.raises(ValueError, match='holds no latency table'): LatencyTable.load(tmp_path/'bad.json', net)
    with pytest.raises(ValueError, match="doesn't know its groups"): replace(table, groups=None).predict({})

def test_the_plot_names_the_expensive_layers(net):
    table,_ = table_of(net, rand(1, 3, 8, 8))
    fig = plot_table(table, 2)
    share = {c['weight']: table.kinds[c['kind']]['ms'][-1][-1] for c in table.calls}
    assert len(fig.axes)==2 and f"'{max(share, key=share.get).removesuffix('.weight')}'" in fig.axes[0].get_title()
    assert fig.axes[0].lines[-1].get_ydata().tolist()==[row[-1] for row in table.kinds[next(c['kind'] for c in table.calls if c['weight']==max(share, key=share.get))]['ms']]

@pytest.mark.parametrize('arch', ['resnet18','mobilenetv2_100'])
def test_latency_as_a_target(arch):
    groups,x = model_of(arch)
    table,_ = table_of(groups, x)
    met = select(groups, target='latency', ratio=.4, table=table).asked['met']
    assert .5*table.total<met['obtained']<=.6*table.total and met['before']==table.total
    assert select(groups, budget=f'{.6*table.total} ms', table=table).asked['met']['obtained']==met['obtained']

BIASES = dict(honest=lambda ms: ms, slower=lambda ms: 1.3*ms, offset=lambda ms: ms+1.5, curved=lambda ms: ms**.8)

@pytest.mark.parametrize('bias', BIASES)
def test_measuring_corrects_what_the_table_believes(bias):
    "The table is an honest machine's; what is measured is another's"
    groups,x = model_of('resnet18')
    table,_ = table_of(groups, x)
    machine = Machine(bias=BIASES[bias])
    for kw in dict(ratio=.4), dict(budget=f'{.6*BIASES[bias](table.total)} ms'):
        plan = fit_latency(groups, x, table=table, timer=machine, steps=5, round_to=1, **kw)
        a,full = plan.asked['latency'],machine.model(groups.model, x)
        truth = machine.model(remove(groups.model, plan), x)
        assert math.isclose(a['ms'], truth) and math.isclose(a['original'], full) and math.isclose(a['predicted'], table.predict(plan.removed))
        assert .95*.6*full<truth<=.6*full, (bias, kw, truth/full)
        assert len(a['tries'])==1 or bias!='honest'
        assert a['relative']==('ratio' in kw) and plan.asked['budget']==kw.get('budget')
    assert 'latency' not in plan.notes and 'measured' in describe(plan)

def test_a_table_is_measured_if_none_is_given(net):
    machine = Machine()
    plan = fit_latency(net, rand(1, 3, 8, 8), ratio=.1, timer=machine, n=3, threads=2, round_to=4)
    assert machine.calls[0][0][0]=='model' and machine.calls[0][2]==2 and machine.calls[1]==(['original','removed'], 3, 2)
    assert plan.asked['round_to']==4 and plan.asked['ratio']==.1
    assert {k[1][0] for k in machine.calls[0][0][1:] if '(24, 3, 3, 3)' in k[0]}=={4, 8, 16, 24}==set(grid_widths(24, round_to=4))

def test_statistics_are_gathered_once(net, monkeypatch):
    import fastcompress.prune.select as module
    n = []
    real = module.probe
    monkeypatch.setattr(module, 'probe', lambda *args: n.append(1) or real(*args))
    plan = fit_latency(net, rand(1, 3, 8, 8), ratio=.1, timer=Machine(bias=lambda ms: ms+.3), score='taylor', batches=iter(batches()), loss_func=F.cross_entropy, round_to=1)
    assert len(n)==1 and len(plan.asked['latency']['tries'])>1 and plan.asked['score']=='taylor'

def test_what_cannot_be_had_is_said(net):
    x = rand(1, 3, 8, 8)
    with pytest.raises(ValueError, match='0.001 ms were to be left, but .* ms were measured with all gone that can go'): fit_latency(net, x, budget='0.001 ms', timer=Machine())
    with pytest.raises(ValueError, match='is about params; select'): fit_latency(net, x, budget='1M params', timer=Machine())
    table,_ = table_of(net, x)
    with pytest.raises(ValueError, match='100.0% of the original'): fit_latency(net, x, ratio=.2, table=table, timer=Machine(bias=lambda ms: 50.), n=3, steps=20)
    plan = fit_latency(net, x, ratio=.1, table=table, timer=Machine(bias=lambda ms: 50.), n=3, steps=0)
    assert plan.notes['latency']=='measured 50 ms after 1 tries, more than was asked for'
