"Pictures and tables of coupled channels: rows, rails and widths against the model, what is drawn, and what is refused"
import re
from collections import Counter

import matplotlib.pyplot as plt, pytest, timm, torch
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from torch import nn

from fastcompress.prune.channels import find_groups
from fastcompress.prune.plan import Plan, plan_for
from fastcompress.prune.remove import remove
from fastcompress.study.groups import (Picture, _share, fold_depth, frozen_counts, frozen_layers, group_chart, group_table, layers_by_role, plot_frozen, plot_groups,
                                       plot_widths)

pytestmark = pytest.mark.usefixtures('one_thread')


class Backwards(nn.Module):
    "A residual net whose layers are registered last to first, with a bare scale"
    def __init__(self):
        super().__init__()
        self.head,self.b,self.a,self.stem = nn.Linear(8, 5),nn.Conv2d(6, 8, 1),nn.Conv2d(8, 6, 1),nn.Conv2d(3, 8, 1)
        self.scale = nn.Parameter(torch.ones(8, 1, 1))
    def forward(self, x):
        x = self.stem(x)
        return self.head((x + self.scale*self.b(self.a(x).relu())).mean((2,3)))

class Half(nn.Module):
    "Half of what `a` makes is returned"
    def __init__(self): super().__init__(); self.a,self.b = nn.Conv2d(3, 8, 1),nn.Conv2d(8, 5, 1)
    def forward(self, x):
        h = self.a(x)
        return h[:,:4], self.b(h)

class Cat(nn.Module):
    "Two branches that the same layer reads"
    def __init__(self): super().__init__(); self.u,self.v,self.w,self.end = nn.Conv2d(3, 4, 1),nn.Conv2d(3, 6, 1),nn.Conv2d(10, 5, 1),nn.Conv2d(5, 2, 1)
    def forward(self, x): return self.end(self.w(torch.cat([self.u(x), self.v(x)], 1)))

class Together(nn.Module):
    "Each channel is added to its neighbours, so that all hang together"
    def __init__(self): super().__init__(); self.a,self.b = nn.Conv2d(3, 6, 1),nn.Conv2d(6, 2, 1)
    def forward(self, x):
        h = self.a(x)
        return self.b(h + h.flip(1) + h.roll(1, 1))

X = torch.randn(1, 3, 8, 8)
BACK = find_groups(Backwards(), X)
def half(groups): return plan_for(groups, {g.name: range(0, g.n, 2) for g in groups if g.n>1})

@pytest.fixture(scope='module')
def zoo():
    sizes = dict(resnet18=64, efficientnet_b0=64, mobilevit_xxs=64, densenet121=64, regnety_002=64)
    out = {a: find_groups(timm.create_model(a, num_classes=10), torch.randn(1, 3, s, s)) for a,s in sizes.items()}
    return out | {'vit': find_groups(timm.create_model('vit_tiny_patch16_224', img_size=32, depth=3, num_classes=10), torch.randn(1, 3, 32, 32))}

def dots(ax):
    "(x, y) of round markers, those that are filled and those that aren't"
    pts = [(l.get_xdata()[0], l.get_ydata()[0], l.get_markerfacecolor()=='white') for l in ax.lines if l.get_marker()=='o']
    return {p[:2] for p in pts if not p[2]}, {p[:2] for p in pts if p[2]}

# ---- the chart

def test_rows_are_in_the_order_in_which_they_run():
    chart = group_chart(BACK)
    assert chart.rows == ['stem','a','b','head'] and list(chart.widths) == chart.rows
    stream,inner = sorted(chart.rails, key=lambda r: -len(r.makes))
    assert (stream.makes, stream.reads, stream.carries, stream.channels) == (['stem','b'], ['a','head'], ['b'], 8) # the scale runs after b, or with it
    assert (inner.makes, inner.reads, inner.channels, inner.number) == (['a'], ['b'], 6, 0)

def test_roles_of_layers():
    roles = layers_by_role(BACK, next(g for g in BACK if g.n==8))
    assert {k: set(v) for k,v in roles.items()} == {'makes': {'stem','b'}, 'carries': {'scale'}, 'reads': {'a','head'}}

@pytest.mark.parametrize('arch', ['resnet18','efficientnet_b0','mobilevit_xxs','densenet121','regnety_002','vit'])
def test_widths_are_those_of_the_layers(zoo, arch):
    groups = zoo[arch]
    made = {n: m.weight.shape[0] for n,m in groups.model.named_modules() if isinstance(m, (nn.Conv2d, nn.Linear))}
    chart = group_chart(groups, max_rows=1000)
    assert {n: sum(k for _,k,_ in w) for n,w in chart.widths.items()} == made
    folded = group_chart(groups, max_rows=30)
    depth = fold_depth(chart.rows, 30)
    want = Counter()
    for n,k in made.items(): want['.'.join(n.split('.')[:depth])] += k
    assert {n: sum(k for _,k,_ in w) for n,w in folded.widths.items()} == want and len(folded.rows)<=30

@pytest.mark.parametrize('arch', ['resnet18','efficientnet_b0','vit'])
def test_kept_widths_are_those_of_the_removed_model(zoo, arch):
    groups = zoo[arch]
    plan = half(groups)
    small = remove(groups.model, plan)
    chart = group_chart(groups, plan, max_rows=1000)
    assert {n: sum(k-gone for _,k,gone in w) for n,w in chart.widths.items()} == {n: m.weight.shape[0] for n,m in small.named_modules() if isinstance(m, (nn.Conv2d, nn.Linear))}
    assert sum(r.gone for r in chart.rails) == sum(len(plan.removed[g.name])*g.size for g in groups if g.name in plan.removed)

@pytest.mark.parametrize('max_rows', [1000, 60, 20])
def test_no_two_rails_meet_in_a_lane(zoo, max_rows):
    for groups in zoo.values():
        chart = group_chart(groups, max_rows=max_rows)
        place = {n:i for i,n in enumerate(chart.rows)}
        taken = Counter((r.lane, y) for r in chart.rails if len({*r.makes, *r.reads})>1
                        for at in [[place[n] for n in (*r.makes, *r.reads) if n in place]] for y in range(min(at), max(at)+1))
        assert max(taken.values())==1
        assert not {r.lane for r in chart.rails if r.shared and len({*r.makes, *r.reads})>1} & {r.lane for r in chart.rails if not r.shared and len({*r.makes, *r.reads})>1}
        assert sum(r.channels for r in chart.rails) == sum(g.n*g.size for g in groups) or chart.hidden

def test_lanes_are_used_again(zoo):
    rails = group_chart(zoo['resnet18']).rails
    assert {r.groups[0]: r.lane for r in rails if r.shared} == {'conv1': 0, 'layer2.0.conv2': 1, 'layer3.0.conv2': 0, 'layer4.0.conv2': 1}
    assert {r.lane for r in rails if not r.shared} == {2}
    assert max(r.lane for r in group_chart(zoo['efficientnet_b0']).rails) == 3

def test_groups_that_join_the_same_rows_are_one_rail(zoo):
    chart = group_chart(find_groups(Cat(), X))
    assert [(r.groups, r.makes, r.reads) for r in chart.rails] == [(['u'],['u'],['w']), (['v'],['v'],['w']), (['w'],['w'],['end'])]
    dense = group_chart(zoo['densenet121'])
    rail = next(r for r in dense.rails if r.makes==['features.denseblock1'] and r.reads==['features.denseblock1','features.transition1'])
    assert rail.channels==5*32 and rail.groups==[f'features.denseblock1.denselayer{i}.conv2' for i in range(1, 6)] # the sixth is read by the transition alone

def test_a_part_is_coloured_as_in_the_whole(zoo):
    whole,part = group_chart(zoo['resnet18']),group_chart(zoo['resnet18'], only='layer3*')
    number = {r.groups[0]: r.number for r in whole.rails}
    assert {r.groups[0]: r.number for r in part.rails} == {k: number[k] for k in ('layer2.0.conv2','layer3.0.conv1','layer3.0.conv2','layer3.1.conv1')}
    ends = {r.groups[0]: (r.up, r.down) for r in part.rails}
    assert ends == {'layer2.0.conv2': (True, False), 'layer3.0.conv1': (False, False), 'layer3.0.conv2': (False, True), 'layer3.1.conv1': (False, False)}
    assert [number[k] for k in ('conv1','layer2.0.conv2','layer3.0.conv2','layer4.0.conv2','layer1.0.conv1')] == [1,2,3,4,0]

@pytest.mark.parametrize('only,rows', [('layer1.0*', ['layer1.0.conv1','layer1.0.conv2']), (['fc','conv1'], ['conv1','fc']), (nn.Linear, ['fc']),
                                       (lambda n, m: 'downsample' in n, [f'layer{i}.0.downsample.0' for i in (2,3,4)])])
def test_only(zoo, only, rows): assert group_chart(zoo['resnet18'], only=only).rows==rows

def test_only_of_one_group(zoo):
    groups = zoo['resnet18']
    assert group_chart(groups, only=groups['conv1']).rows == ['conv1','layer1.0.conv1','layer1.0.conv2','layer1.1.conv1','layer1.1.conv2','layer2.0.conv1','layer2.0.downsample.0']
    with pytest.raises(ValueError, match="group 'a' isn't one of these groups"): group_chart(groups, only=BACK['a'])

def test_folding_and_paging(zoo):
    chart = group_chart(zoo['efficientnet_b0'])
    assert len(chart.rows)==19 and chart.layers['blocks.1.0']==5 and chart.layers['conv_stem']==1 and chart.folded and not chart.hidden
    assert [(r.makes, r.reads) for r in chart.rails if r.number and 'blocks.1.0' in r.makes and len(r.makes)>1] == [(['blocks.1.0','blocks.1.1'], ['blocks.1.1','blocks.2.0'])]
    assert [bool(r.number) for r,_,_ in chart.widths['blocks.2.0']] == [True, False] and [k for _,k,_ in chart.widths['blocks.2.0']] == [40, 3*144+6] # the stream first
    flat = find_groups(nn.Sequential(*(nn.Conv2d(3, 3, 1) for _ in range(9))), X)
    chart = group_chart(flat, max_rows=4)
    assert (chart.rows, chart.hidden, chart.folded) == (['0','1','2','3'], 5, False) and [r.down for r in chart.rails] == [False, False, False, True]
    assert plot_groups(flat, max_rows=4).get_xlabel().endswith('5 more rows; only=… shows others')

def test_a_layer_of_which_half_stays():
    groups = find_groups(Half(), X)
    chart = group_chart(groups, plan_for(groups, {groups[0].name: [0]}))
    assert [(r and r.groups, k, gone) for r,k,gone in chart.widths['a']] == [(['a'], 4, 1), (None, 4, 0)]
    assert list(chart.stays)==['b'] and frozen_layers(groups) == {'a': (4, 'the model returns it'), 'b': (5, 'the model returns it')}

def test_channels_that_all_hang_together():
    groups = find_groups(Together(), X)
    assert not groups and frozen_layers(groups) == {'a': (6, 'all its 6 channels hang together'), 'b': (2, 'the model returns it')}
    assert plot_groups(groups).get_title()=='No two of these layers make the same channels'
    with pytest.raises(ValueError, match='no channel of this model can go'): plot_widths(groups)
    assert str(group_table(groups)).splitlines()[0]=='0 groups, 0 channels'

# ---- what is drawn

def test_dots_say_who_makes_and_who_reads(zoo):
    for groups in (BACK, zoo['resnet18'], zoo['vit']):
        chart,(full,empty) = group_chart(groups),dots(plot_groups(groups))
        place = {n:i for i,n in enumerate(chart.rows)}
        assert full == {(r.lane, place[n]) for r in chart.rails for n in r.makes}
        assert empty == {(r.lane, place[n]) for r in chart.rails for n in r.reads}

def test_bars_and_words(zoo):
    ax = plot_groups(BACK, plan_for(BACK, {g.name: [0,1] for g in BACK}))
    x0 = min(p.get_x() for p in ax.patches if p.get_height()<.7)
    bars = {}
    for p in (p for p in ax.patches if p.get_height()<.7): bars.setdefault(round(p.get_y()+p.get_height()/2), []).append((p.get_width(), p.get_alpha()))
    for y,(kept,gone) in ((y, [p for p in ax.patches if p.get_height()<.7 and round(p.get_y()+p.get_height()/2)==y]) for y in bars): assert (kept.get_x(), gone.get_x()) == (x0, x0+kept.get_width())
    unit = bars[0][0][0]/6 # six of the stem's eight stay
    assert {y: [(round(w/unit, 6), a) for w,a in b] for y,b in bars.items()} == {0: [(6,1),(2,.28)], 1: [(4,1),(2,.28)], 2: [(6,1),(2,.28)], 3: [(5,1),(0,.28)]}
    assert [t.get_text() for t in ax.texts] == ['8 → 6', '6 → 4', '8 → 6', '5  stays: the model returns it']
    assert all(t.get_position()[0]>x0 for t in ax.texts) and ax.get_title()=='4 of 14 channels go'
    assert [to_hex(l.get_color()) for l in ax.get_yticklabels()] == ['#000000']*3+['#999999']

def test_what_carries_and_what_changes(zoo):
    ax = plot_groups(BACK)
    chart = group_chart(BACK)
    ties = [(x, y) for l in ax.lines if l.get_marker()=='_' for x,y in zip(l.get_xdata(), l.get_ydata())]
    assert ties == [(next(r.lane for r in chart.rails if r.shared), 2.5)]
    texts = [t.get_text() for t in plot_groups(zoo['vit']).texts]
    assert texts[:5] == ['192 *','576','192 *','768','192 *'] and '* statistics change' in plot_groups(zoo['vit']).get_xlabel()
    assert not any('*' in t.get_text() for t in ax.texts) and 'statistics' not in ax.get_xlabel()

def test_titles(zoo):
    assert plot_groups(zoo['vit']).get_title().startswith('7 layers make the same 192 channels: patch_embed.proj, blocks.0.attn.proj')
    assert plot_groups(zoo['vit'], max_rows=8).get_title().startswith('7 blocks make the same 192 channels: patch_embed.proj, blocks.0.attn')
    assert plot_groups(zoo['vit'], max_rows=6).get_title()=='4 blocks make the same 192 channels: patch_embed.proj, blocks.0, blocks.1, blocks.2'
    assert plot_groups(zoo['densenet121']).get_title()=='No two of these blocks make the same channels'
    assert plot_groups(zoo['resnet18']).get_title().startswith('3 layers make the same 512 channels: layer4.0.conv2') # of three stages with three makers, the widest
    assert plot_groups(BACK, title='mine').get_title()=='mine'

def test_axes_given_and_axes_of_its_own(zoo):
    fig = Figure()
    ax = fig.subplots()
    for draw in (plot_groups, plot_widths, plot_frozen): assert draw(BACK, ax=ax) is ax
    own = plot_groups(zoo['resnet18'])
    assert type(own) is Picture and own.figure.axes==[own] and plt.get_fignums()==[]
    png = own._repr_png_()
    assert png[:4]==b'\x89PNG' and png==plot_groups(zoo['resnet18'])._repr_png_()
    for draw in (plot_groups, plot_widths, plot_frozen):
        with pytest.raises(TypeError, match='ax must be matplotlib Axes, got Figure'): draw(BACK, ax=fig)

# ---- widths and what stays

def test_widths_of_groups(zoo):
    groups = zoo['vit']
    plan = plan_for(groups, {'blocks.0.attn.qkv': [1], 'blocks.1.mlp.fc1': range(700)}, notes={'patch_embed.proj': 'left out'})
    ax = plot_widths(groups, plan)
    assert [t.get_text() for t in ax.get_yticklabels()] == [g.name for g in groups]
    assert [t.get_text() for t in ax.texts] == ['192  left out','576 → 384','768','576','768 → 68','576','768']
    assert [p.get_width() for p in ax.patches][:4] == [192, 0, 384, 192]
    assert ax.get_title() == '892 of 4,224 channels go: from 0% in patch_embed.proj to 91% in blocks.1.mlp.fc1'
    ax = plot_widths(groups, plan, max_bars=3)
    assert [t.get_text() for t in ax.get_yticklabels()] == ['patch_embed.proj','blocks.0.attn.qkv','blocks.1.mlp.fc1'] and ax.get_xlabel().endswith('the 3 extremes of 7 groups')
    assert plot_widths(groups).get_title()=='0 of 4,224 channels go'

def test_counts_add_up():
    a,b = find_groups(Half(), X),find_groups(Together(), X)
    assert frozen_counts(a) == {'the model returns it': 9} and frozen_counts(a, 'layers') == {'the model returns it': 2}
    both = frozen_counts(a)+frozen_counts(b)
    ax = plot_frozen(both)
    assert [p.get_width() for p in ax.patches]==[11, 6] and ax.get_title()=='17 channels stay; most: the model returns it'
    assert [p.get_width() for p in plot_frozen({f'r{i}': i for i in range(1, 21)}, per='layers').patches] == [*range(20, 9, -1), sum(range(1, 10))]

def test_reasons_without_their_place():
    class Rnn(nn.Module):
        def __init__(self): super().__init__(); self.a,self.rnn,self.b = nn.Linear(3, 4),nn.LSTM(4, 5),nn.Linear(5, 2)
        def forward(self, x): return self.b(self.rnn(self.a(x))[0])
    groups = find_groups(Rnn(), torch.randn(2, 7, 3))
    assert groups.frozen['a'].startswith('rnn: ') and frozen_layers(groups)['a'] == (4, groups.frozen['a'].removeprefix('rnn: '))

# ---- the table

def test_table_rows(zoo):
    table = group_table(zoo['vit'], half(zoo['vit']))
    assert table.rows[0] == {'group': 'patch_embed.proj', 'channels': '192', 'go': '96', 'made by': 'patch_embed.proj, blocks.0.attn.proj, blocks.0.mlp.fc2 and 4 more',
                             'carried by': 'cls_token, pos_embed, blocks.0.norm1 and 6 more', 'read by': 'blocks.0.attn.qkv, blocks.0.mlp.fc1, blocks.1.attn.qkv and 4 more',
                             'changes': 'layer norm (7)'}
    assert (table.rows[1]['channels'], table.rows[1]['go']) == ('3 x 192', '2 x 192') and table.title=='7 groups, 4,224 channels, 2,400 go'
    assert table.stays == [dict(layer='head', channels='10', why='the model returns it')]
    full = group_table(zoo['vit'], only='patch*', most=None)
    assert full.rows[0]['made by'].count(',')==6 and 'more' not in str(full) and full.stays==[]
    assert [r['group'] for r in group_table(zoo['vit'], only=['blocks.2*','patch*']).rows] == ['patch_embed.proj','blocks.2.attn.qkv','blocks.2.mlp.fc1']

@pytest.mark.parametrize('width', [100, 140, 200])
def test_table_as_text(zoo, width):
    text = group_table(zoo['resnet18'], half(zoo['resnet18'])).to_text(width)
    lines = text.splitlines()
    assert max(map(len, lines))<=width and lines[0]=='12 groups, 2,880 channels, 1,440 go'
    starts = [m.start() for m in re.finditer(r'(?<=  )\S|^\S', lines[2])]
    body = lines[4:lines.index('What stays')-1]
    assert all(l[i-1]==' ' for l in body for i in starts[1:] if len(l)>i) # columns are straight
    made = ' '.join(' '.join(l[starts[3]:starts[4]] for l in body).split())
    assert made.startswith('conv1, layer1.0.conv2, layer1.1.conv2 layer1.0.conv1 layer1.1.conv1') and 'fc' in lines[-1] and repr(group_table(zoo['resnet18'])).splitlines()[0]=='12 groups, 2,880 channels'

def test_columns_share_the_width():
    assert [_share([10, 30, 30], w) for w in (70, 69, 50)] == [30, 29, 20] and _share([50, 50], 10)==12

def test_table_as_html():
    html = group_table(BACK, plan_for(BACK, {}, notes={BACK[0].name: 'a<b & c'}))._repr_html_()
    assert '<td>a&lt;b &amp; c</td>' in html and 'a<b' not in html and '<h2>What stays</h2>' in html and html.count('<tr>')==2+3

def test_a_long_table_is_wrapped_but_names_are_whole(zoo):
    text = group_table(zoo['densenet121']).to_text(60)
    assert 'features.transition1.conv' in text and '…blockfeatures' not in text

# ---- what is refused

@pytest.mark.parametrize('draw', [plot_groups, plot_widths, plot_frozen, group_table, group_chart, frozen_counts])
def test_a_model_is_no_groups(draw):
    with pytest.raises(TypeError, match=r'find_groups\(model, x\) returns, got Backwards'): draw(Backwards())

@pytest.mark.parametrize('draw', [plot_groups, plot_widths, group_table])
def test_plans_of_other_models(zoo, draw):
    with pytest.raises(ValueError, match="no group 'conv1'"): draw(BACK, half(zoo['resnet18']))
    cut = Plan(units={g.name: g.n//2 for g in BACK})
    with pytest.raises(ValueError, match='units here, .* in the plan. Was the model cut already'): draw(BACK, cut)
    with pytest.raises(TypeError, match='plan must be a Plan, .* got dict'): draw(BACK, {'stem': [0]})

def test_wrong_words(zoo):
    with pytest.raises(ValueError, match="no layer matches 'layer1.0.conv'. Nearest: 'layer1.0.conv"): plot_groups(zoo['resnet18'], only='layer1.0.conv')
    with pytest.raises(ValueError, match="no group matches 'layer1.0.conv'. Nearest: 'layer1.0.conv1'"): group_table(zoo['resnet18'], only='layer1.0.conv')
    with pytest.raises(ValueError, match="per='channel' can't be counted. Nearest: 'channels'"): plot_frozen(BACK, per='channel')
    with pytest.raises(ValueError, match='nothing stays'): plot_frozen(Counter())
