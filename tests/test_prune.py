"Properties of exact selection that a page wouldn't show"
import math
import pytest, torch
from hypothesis import given, settings, strategies as st
from hypothesis.extra import numpy as hnp
from torch import nn

from fastcompress.prune.mask import apply_masks_, covered_layers, kth_smallest, n_removed, select_masks, sparsity_of
from fastcompress.prune.score import Scores

unit = st.floats(0, 1)
quick = settings(max_examples=60, deadline=None)

# ---- selection

hostile = st.one_of(st.floats(width=32, allow_nan=False),
                    st.sampled_from([0., -0., 1., -1., 1e-45, -1e-45, 1.1754942e-38, 1.1754944e-38, float('inf'), -float('inf'), 3.4028235e38]))
arrays = st.lists(hnp.arrays('float32', hnp.array_shapes(min_dims=1, max_dims=3, max_side=6), elements=hostile), min_size=1, max_size=4)

def by_sorting(scores, k):
    flat = torch.cat([s.flatten() for s in scores.values()])
    keep = torch.ones(len(flat), dtype=torch.bool)
    keep[flat.sort(stable=True).indices[:k]] = False
    return {n: m.view_as(s) for (n,s),m in zip(scores.items(), keep.split([s.numel() for s in scores.values()]))}

@given(arrays=arrays, frac=unit)
@settings(max_examples=300, deadline=None)
def test_global_selection_agrees_with_a_stable_sort(arrays, frac):
    scores = {str(i): torch.tensor(a) for i,a in enumerate(arrays)}
    n = sum(s.numel() for s in scores.values())
    masks = select_masks(scores, frac)
    ref = by_sorting(scores, round(frac*n))
    for o in scores: assert torch.equal(masks[o], ref[o])

@given(arrays=arrays, frac=unit)
@quick
def test_local_selection_agrees_with_a_stable_sort(arrays, frac):
    scores = {str(i): torch.tensor(a) for i,a in enumerate(arrays)}
    for masks in select_masks(scores, frac, 'local'), select_masks(scores, dict.fromkeys(scores, frac)):
        for o,s in scores.items(): assert torch.equal(masks[o], by_sorting({o:s}, round(frac*s.numel()))[o])

@given(arrays=arrays, data=st.data())
@quick
def test_kth_smallest_counts(arrays, data):
    scores = {str(i): torch.tensor(a) for i,a in enumerate(arrays)}
    flat = torch.cat([s.flatten() for s in scores.values()]).sort().values
    k = data.draw(st.integers(1, len(flat)))
    _,below,equal = kth_smallest(scores, k)
    assert (below, equal) == (int((flat<flat[k-1]).sum()), int((flat==flat[k-1]).sum()))

@pytest.mark.parametrize('value', [0., 1., -1., float('inf'), 1e-45])
@pytest.mark.parametrize('frac', [0, .25, 1/3, .5, .99, 1])
def test_constant_scores_give_exact_counts(value, frac):
    masks = select_masks({'a': torch.full((7,3), value), 'b': torch.full((5,), value)}, frac)
    assert sum(int((~m).sum()) for m in masks.values()) == round(frac*26)

@pytest.mark.parametrize('n', [4, 8, 16, 1000, 11_678_912])
def test_one_half_is_one_half(n): assert n_removed(.5, n) == n//2

def test_large_and_low_precision():
    torch.manual_seed(0)
    w = torch.randn(300, 1000)
    for s in w.abs(), w.abs().half(), w.abs().bfloat16(), w.abs().double(), w.abs().t():
        assert int((~select_masks({'w':s}, .9)['w']).sum()) == 270_000
    m = w.abs().t()
    assert torch.equal(select_masks({'w':m}, .9)['w'], by_sorting({'w':m}, 270_000)['w'])

def test_channels_last_weights():
    w = torch.randn(8,4,3,3).to(memory_format=torch.channels_last)
    masks = select_masks(Scores({'w':w}), .75)
    assert torch.equal(masks['w'], by_sorting({'w':w.abs().contiguous()}, 216)['w'])
    assert sparsity_of(apply_masks_({'w':w}, masks)) == .75

@pytest.mark.parametrize('nan', [float('nan'), -float('nan')])
@pytest.mark.parametrize('frac', [.1, .5, 1])
def test_nan_is_refused_by_name(nan, frac):
    scores = {'good': torch.tensor([1.,float('inf'),-float('inf')]), 'layer4.conv1': torch.tensor([1., nan, 2.])}
    with pytest.raises(ValueError, match="'layer4.conv1' has NaN"): select_masks(scores, frac)

def test_only_one_layer_of_scores_lives_at_a_time():
    import weakref
    alive = []
    def criterion(w):
        assert not [r for r in alive if r() is not None]
        s = w.abs().clone(); alive.append(weakref.ref(s)); return s
    ws = {str(i): torch.randn(50) for i in range(4)}
    masks = select_masks(Scores(ws, criterion), .5)
    assert sum(int(m.sum()) for m in masks.values()) == 100 and len(alive) >= 8

# ---- layers and application

def net(): return nn.Sequential(nn.Conv2d(3,4,3), nn.Conv2d(4,4,3), nn.Conv2d(4,4,3), nn.Linear(4,2))

def test_apply_checks_before_it_changes():
    m = net(); before = [p.clone() for p in m.parameters()]
    masks = {'1': torch.zeros(4,4,3,3, dtype=torch.bool), '3': torch.zeros(3,3, dtype=torch.bool)}
    with pytest.raises(ValueError, match="layer '3'"): apply_masks_(m, masks)
    assert all(torch.equal(a,b) for a,b in zip(before, m.parameters()))

def test_zeros_are_positive_zeros():
    ws = {'w': torch.tensor([-1., float('-inf'), float('nan'), 2.])}
    apply_masks_(ws, {'w': torch.tensor([False, False, False, True])})
    assert ws['w'].view(torch.int32).tolist()[:3] == [0,0,0] and ws['w'][3] == 2

def test_exclude_is_subtracted_from_include():
    assert covered_layers(net(), include='*', exclude=['0', nn.Linear]) == ['1','2']
    with pytest.raises(ValueError, match="no layer matches 'head'"): covered_layers(net(), exclude='head')
