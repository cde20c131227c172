"Small nets, one idea each, that are hard to take channels out of"
import math
from collections import OrderedDict, namedtuple
from dataclasses import dataclass

import numpy as np, torch, torch.nn.functional as F
from timm.layers import BlurPool2d, ScaledStdConv2d, StdConv2d
from torch import nn
from torch.utils.checkpoint import checkpoint

ZOO = {}

@dataclass
class Entry:
    "A net and what must be found in it"
    finds:str       # 'a 8, b 4 (mean over) | c: written in the code': groups, units, part of a mark | layers that stay, part of the reason. Those that the model returns aren't listed
    make:object     # () -> model
    x:object        # () -> example input
    kept:str=''      # the oracle keeps groups whole, for one of these reasons (a | b)
    inexact:str=''   # the oracle keeps marked groups whole, for this reason
    trains:bool=True # runs in training mode with a gradient
    exact:bool=True  # can be run in float64 and compared on random input

def rand(*shape, seed=1): return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
def batch(*shape): return lambda: rand(*shape)
image = batch(2, 3, 8, 8)

def net(name, finds, make, x=image, **kw):
    assert name not in ZOO, name
    ZOO[name] = Entry(finds, make, x, **kw)

class Net(nn.Module):
    "Modules by keyword, forward by function"
    def __init__(self, run, **modules):
        super().__init__()
        self._run = run
        for k,m in modules.items(): setattr(self, k, m)
    def forward(self, *args, **kwargs): return self._run(self, *args, **kwargs)

def small(name, finds, f, modules=dict, **kw):
    "Two convolutions of 8 channels, `f(a, b, net)` between, and `c` with 4 that reads"
    def make():
        parts = dict(a=nn.Conv2d(3, 8, 3, padding=1), b=nn.Conv2d(3, 8, 3, padding=1), c=conv(8, 4), head=nn.Linear(4, 5))
        return Net(lambda m,x: m.head(m.c(f(m.a(x), m.b(x), m)).mean((2,3))), **{**parts, **modules()})
    net(name, with_c(finds), make, **kw)

def with_c(finds):
    groups,bar,stays = finds.partition('|')
    return f'{groups.strip()}, c 4'.removeprefix(', ') + (f' | {stays.strip()}' if bar else '')

def expect(prefix, table):
    "What must be found in nets that were made in a loop; `names: finds` in each line"
    for line in table.strip().split('\n'):
        names,_,finds = line.partition(':')
        for e in (ZOO[prefix+n] for n in names.split()): e.finds = with_c(finds.strip()) if e.finds=='c 4' else finds.strip()

def also(name, **kw):
    "More about a net that was made in a loop"
    for k,v in kw.items(): setattr(ZOO[name], k, v)

def conv(i, o, k=1, **kw): return nn.Conv2d(i, o, k, **kw)
def cbr(i, o, k=3, **kw): return nn.Sequential(nn.Conv2d(i, o, k, padding=k//2, bias=False, **kw), nn.BatchNorm2d(o), nn.ReLU())
def seq(*layers): return lambda: nn.Sequential(*(l() if isinstance(l, type(lambda: 0)) else l for l in layers))
def param(*shape, seed=1): return nn.Parameter(rand(*shape, seed=seed))

# ---- groups of convolutions, shuffles, splits

class Shuffle(nn.Module):
    def __init__(self, how):
        super().__init__()
        self.a,self.g1,self.g2,self.c,self.groups,self.how = conv(3, 12),conv(12, 12, 3, groups=3),conv(12, 6, groups=3),conv(6, 5),3,how
    def forward(self, x):
        x = self.g1(self.a(x))
        g = 3 if 'literal' in self.how else self.groups
        B,C,H,W = x.shape
        x = F.channel_shuffle(x, g) if 'F' in self.how else F.channel_shuffle(x, groups=g) if 'kw' in self.how else x.view(B, g, C//g, H, W).transpose(1, 2).reshape(B, C, H, W)
        return self.c(self.g2(x).relu())
for how in 'attr literal F F_literal kw'.split(): net(f'shuffle_{how}', '', lambda how=how: Shuffle(how))
expect('shuffle_', '''
attr literal F F_literal kw: a 4, g2 2 | g1: hang together''')
net('shuffle_module', '0 2, 2 4', lambda: nn.Sequential(conv(3, 8), nn.ChannelShuffle(2), conv(8, 8, 3, groups=2), nn.ReLU(), conv(8, 4)))

class Split(nn.Module):
    def __init__(self, sizes=None): super().__init__(); self.a,self.p,self.q,self.r,self.sizes = conv(3, 14),conv(2, 4),conv(8, 4),conv(4, 4),sizes
    def forward(self, x):
        u,v,w = self.a(x).relu().split(self.sizes or (2,8,4), 1)
        return self.p(u)*self.q(v)+self.r(w)
net('split_list', 'a 2, a#2 8, a#3 4', lambda: Split([2,8,4]))
net('split_tuple', 'a 2, a#2 8, a#3 4', lambda: Split((2,8,4)))
net('split_literal', ' | a: number 8', lambda: Split())
class MixedList(nn.Module):
    def __init__(self): super().__init__(); self.a,self.cfg,self.p,self.q = conv(3, 12),[4, None, 8, 'same', .5],conv(4, 3),conv(8, 3)
    def forward(self, x):
        u,v = self.a(x).split([self.cfg[0], self.cfg[2]], 1)
        return self.p(u)+self.q(v)*self.cfg[4]
net('split_mixed_list', 'a 4, a#2 8', MixedList)
class Nested(nn.Module):
    def __init__(self, cfg): super().__init__(); self.a,self.cfg,self.p,self.q = conv(3, 12),cfg,conv(4, 3),conv(8, 3)
    def forward(self, x):
        u,v = self.a(x).split(self.cfg[0], 1)
        return self.p(u)+self.q(v)
net('split_nested_list', ' | a: number 8', lambda: Nested([(4,8)]))
net('split_dict', ' | a: number 8', lambda: Nested({0: [4,8]}))
class ClassAttr(nn.Module):
    k = 4
    def __init__(self): super().__init__(); self.a,self.p,self.q = conv(3, 12),conv(4, 3),conv(8, 3)
    def forward(self, x):
        y = self.a(x)
        return self.p(y[:, :self.k])+self.q(y[:, self.k:])
net('class_attribute', 'a 8 | a: number 4', ClassAttr)
class Prop(ClassAttr):
    def __init__(self): super().__init__(); self._w = 8
    @property
    def k(self): return self._w//2
net('property', 'a 4, a#2 8', Prop)
class OwnAttr(ClassAttr):
    def __init__(self): super().__init__(); self.k = 4
net('slice_attr', 'a 4, a#2 8', OwnAttr)
small('chunk_glu', 'a 8, b 8', lambda a,b,m: (lambda u,v: u*v.sigmoid())(*m.d(a).chunk(2, 1))+b, lambda: dict(d=conv(8, 16)))
small('F_glu', 'a 8, b 8', lambda a,b,m: F.glu(m.d(a), 1)+b, lambda: dict(d=conv(8, 16)))
small('split_half', 'a 8, b 8, d 8', lambda a,b,m: (lambda u,v: u*v)(*m.d(a).split(m.half, 1)), lambda: dict(d=conv(8, 16), half=8))
small('chunk_uneven', 'a 8, b 8, p 8 | d: it is split into unequal parts', lambda a,b,m: (lambda u,v: m.p(u)+m.q(v))(*m.d(a).chunk(2, 1)), lambda: dict(d=conv(8, 15), p=conv(8, 8), q=conv(7, 8)))
small('tensor_split', 'a 8, b 8, d 8', lambda a,b,m: (lambda u,v: u*v)(*m.d(a).tensor_split(2, 1)), lambda: dict(d=conv(8, 16)))
small('tensor_split_at', 'a 8, b 8, d 5, p 8 | d: number 7', lambda a,b,m: (lambda u,v,w: m.p(u)+m.q(v)+m.r(w))(*m.d(a).tensor_split((3,7), 1)), lambda: dict(d=conv(8, 12), p=conv(3, 8), q=conv(4, 8), r=conv(5, 8)))
small('cat_self', 'a 8, b 8', lambda a,b,m: torch.cat([a, a], 1), lambda: dict(c=conv(16, 4)))
small('cat_aba', 'a 8, b 8', lambda a,b,m: torch.cat([a, b, a], 1), lambda: dict(c=conv(24, 4)))
small('hstack', ' | a: no rule for hstack; b: no rule for hstack', lambda a,b,m: torch.hstack([a, b]), lambda: dict(c=conv(16, 4)))
small('interleave_stack', 'a 8', lambda a,b,m: torch.stack([a, b], 2).flatten(1, 2), lambda: dict(c=conv(16, 4)))
small('shared', 'a 8', lambda a,b,m: m.d(m.d(a))+b, lambda: dict(d=conv(8, 8)))
small('shared_twice', 'a 8, d 6', lambda a,b,m: torch.cat([m.d(a), m.d(b)], 1), lambda: dict(d=conv(8, 6), c=conv(12, 4)))
net('grouped', '0.0 4, 1 6', lambda: nn.Sequential(cbr(3, 12), conv(12, 18, 3, groups=3), nn.BatchNorm2d(18), nn.ReLU(), conv(18, 3)))
net('grouped_to_one', '0.0 3 | 1: hang together', lambda: nn.Sequential(cbr(3, 12), conv(12, 4, 3, groups=4), nn.ReLU(), conv(4, 3)))
net('grouped_last', '0.0 3 | 1: hang together', lambda: nn.Sequential(cbr(3, 12), conv(12, 4, 3, groups=4)))
net('lcm', '0 6, 1 2, 2 4', lambda: nn.Sequential(conv(3, 24), conv(24, 24, groups=4), conv(24, 24, groups=6), nn.ReLU(), conv(24, 3)))
net('lcm_parallel', 'a 4, b 4, c 3', lambda: Net(lambda m,x: m.d(torch.cat([m.b(m.a(x)), m.c(m.a(x))], 1)), a=conv(3, 24), b=conv(24, 8, groups=2), c=conv(24, 9, groups=3), d=conv(17, 2)))
net('depthwise', '0.0 8', lambda: nn.Sequential(cbr(3, 8), conv(8, 8, 3, groups=8), nn.ReLU(), conv(8, 3)))
net('depthwise_multiplier', '0.0 8', lambda: nn.Sequential(cbr(3, 8), conv(8, 24, 3, groups=8), nn.BatchNorm2d(24), nn.ReLU(), conv(24, 3)))
net('depthwise_twice', '0.0 8', lambda: nn.Sequential(cbr(3, 8), conv(8, 16, 3, groups=8), nn.ReLU(), conv(16, 16, groups=16), nn.ReLU(), conv(16, 3)))
net('transposed', '0 8, 1 6', lambda: nn.Sequential(conv(3, 8), nn.ConvTranspose2d(8, 6, 2, stride=2), nn.BatchNorm2d(6), nn.ReLU(), conv(6, 3)))
net('transposed_grouped', '0 4, 1 6', lambda: nn.Sequential(conv(3, 8), nn.ConvTranspose2d(8, 12, 2, stride=2, groups=2), nn.BatchNorm2d(12), nn.ReLU(), conv(12, 3)))
net('transposed_depthwise', '0 8', lambda: nn.Sequential(conv(3, 8), nn.ConvTranspose2d(8, 8, 4, stride=2, groups=8), nn.ReLU(), conv(8, 3)))
net('transposed_multiplier', '1 2 | 0: hang together', lambda: nn.Sequential(conv(3, 8), nn.ConvTranspose2d(8, 16, 4, stride=2, groups=8), nn.ReLU(), conv(16, 3)))
net('conv1d', '0 2, 3 2', lambda: nn.Sequential(nn.Conv1d(3, 8, 3), nn.BatchNorm1d(8), nn.ReLU(), nn.Conv1d(8, 8, 3, groups=4), nn.MaxPool1d(2), nn.Conv1d(8, 3, 1)), batch(2, 3, 16))
net('conv3d', '0 8, 4 6', lambda: nn.Sequential(nn.Conv3d(3, 8, 3, padding=1), nn.BatchNorm3d(8), nn.ReLU(), nn.MaxPool3d(2), nn.ConvTranspose3d(8, 6, 2, stride=2), nn.Conv3d(6, 3, 1)), batch(2, 3, 4, 6, 6))

# ---- flatten, resample, pixel shuffle

class Flat(nn.Module):
    def __init__(self, how): super().__init__(); self.a,self.bn,self.l,self.h,self.how = conv(3, 8, 3, stride=2),nn.BatchNorm2d(8),nn.Linear(72, 10),nn.Linear(10, 4),how
    def forward(self, x):
        y = self.bn(self.a(x)).relu()
        b,c,h,w = y.shape
        y = dict(flatten=lambda: y.flatten(1), view=lambda: y.view(y.size(0), -1), literal=lambda: y.view(-1, 72), product=lambda: y.reshape(b, c*h*w), last=lambda: y.permute(0,2,3,1).reshape(len(y), -1),
                 sizes=lambda: y.view(b, math.prod(y.shape[1:])), module=lambda: nn.Flatten()(y))[self.how]()
        return self.h(self.l(y).relu())
for how in 'flatten view literal product last sizes module'.split(): net(f'flat_{how}', '', lambda how=how: Flat(how))
expect('flat_', '''
flatten view product last sizes module: a 8, l 10
literal: l 10 | a: number 72''')
net('superres', '0.0 8, 1 6', lambda: nn.Sequential(cbr(3, 8), conv(8, 24), nn.PixelShuffle(2), nn.ReLU(), conv(6, 12), nn.PixelShuffle(2)))
net('unshuffle', '0.0 4, 2 8', lambda: nn.Sequential(cbr(3, 4), nn.PixelUnshuffle(2), conv(16, 8), nn.BatchNorm2d(8), conv(8, 3)))
def up(x): return F.interpolate(x, scale_factor=2)
small('shuffle_cat', 'a 8, b 8, e 8', lambda a,b,m: torch.cat([F.pixel_shuffle(m.e(a), 2), up(b)], 1).relu(), lambda: dict(e=conv(8, 32), c=conv(16, 4, 3)))
small('shuffle_cat_bn', 'a 8, b 8, e 8', lambda a,b,m: m.n(torch.cat([up(b), F.pixel_shuffle(m.e(a), 2)], 1)), lambda: dict(e=conv(8, 32), n=nn.BatchNorm2d(16), c=conv(16, 4)))
small('shuffle_add', 'a 8, b 8', lambda a,b,m: F.pixel_shuffle(m.e(a), 2)+up(b), lambda: dict(e=conv(8, 32)))
class Orig(nn.Module):
    "The input again at the end, and a residual block over both"
    def __init__(self): super().__init__(); self.a,self.b,self.c,self.h = cbr(3, 8),cbr(11, 11),conv(11, 11),conv(11, 3)
    def forward(self, x):
        y = torch.cat([self.a(x), x], 1)
        return self.h(y+self.c(self.b(y)))
net('input_again', 'a.0 8, b.0 11 | c: no layer makes it', Orig)
small('unfold', 'a 8, b 8', lambda a,b,m: F.unfold(a, 3, padding=1).view(2, a.shape[1]*9, 8, 8), lambda: dict(c=conv(72, 4)), trains=False)
small('fold', 'a 8', lambda a,b,m: F.fold(F.unfold(a, 2, stride=2), (8,8), 2, stride=2)+b)
small('tensor_unfold', 'a 8', lambda a,b,m: a.unfold(2, 2, 2).mean(-1).repeat_interleave(2, 2)+b)
small('resample', 'a 8', lambda a,b,m: F.interpolate(a, scale_factor=2, mode='bilinear')+F.interpolate(b, size=(16,16), mode='bicubic', antialias=True))
small('resample_channels', 'b 8 | a: is resized along its channels', lambda a,b,m: F.interpolate(a.unsqueeze(1), scale_factor=(2,1,1)).squeeze(1), lambda: dict(c=conv(16, 4)))
small('pool_channels', ' | a: is resized along its channels; b: of that length', lambda a,b,m: F.max_pool3d(a.unsqueeze(1), 3, 1, 1).squeeze(1)+b)
net('blurpool', '0.0 8', lambda: nn.Sequential(cbr(3, 8), BlurPool2d(8), conv(8, 4)))
small('kernel_expand', 'a 8', lambda a,b,m: F.conv2d(a, m.v.expand(a.shape[1],1,3,3).to(a), groups=a.shape[1], padding=1)+b, lambda: dict(v=rand(1,1,3,3)))
small('kernel_repeat', ' | a: of that length; b: of that length', lambda a,b,m: F.conv2d(a, m.v.repeat(a.shape[1],1,1,1).to(a), groups=a.shape[1], padding=1)+b, lambda: dict(v=rand(1,1,3,3)))
small('kernel_literal', ' | a: of that length; b: of that length', lambda a,b,m: F.conv2d(a, m.v.expand(8,1,3,3).to(a), groups=8, padding=1)+b, lambda: dict(v=rand(1,1,3,3)))
small('pad_spatial', 'a 8', lambda a,b,m: F.pad(a, (1,1,1,1), mode='circular')+F.pad(b, (1,1,1,1), mode='reflect'))
small('pad_channels', 'a 8, b 8', lambda a,b,m: F.pad(a, (0,0,0,0,1,1), value=.5), lambda: dict(c=conv(10, 4)))
small('pad_replicate_channels', 'b 8 | a: channels are padded with copies of channels', lambda a,b,m: F.pad(a.transpose(1,3), (1,1,0,0), mode='replicate').transpose(1,3), lambda: dict(c=conv(10, 4)))
small('crop_channels', 'a 6, b 8 | a: number 2', lambda a,b,m: F.pad(a, (0,0,0,0,0,-2)), lambda: dict(c=conv(6, 4)))
small('crop_channels_front', 'a 6, b 8 | a: number 2', lambda a,b,m: F.pad(a, (0,0,0,0,-2,0)), lambda: dict(c=conv(6, 4)))
class OptionA(nn.Module):
    "ResNet's shortcut without parameters"
    def __init__(self, how): super().__init__(); self.s,self.a,self.b,self.c,self.how,self.out = cbr(3, 8),cbr(8, 12, stride=2),conv(12, 16),conv(16, 3),how,16
    def forward(self, x):
        x = self.s(x)
        r,n = x[:, :, ::2, ::2],self.out-x.shape[1]
        r = dict(literal=lambda: F.pad(r, (0,0,0,0,4,4)), half=lambda: F.pad(r, (0,0,0,0,n//2,n//2)), end=lambda: F.pad(r, (0,0,0,0,0,n)), cat=lambda: torch.cat([r, torch.zeros_like(r)], 1),
                 zeros=lambda: torch.cat([r, r.new_zeros(r.shape[0], n, *r.shape[2:])], 1))[self.how]()
        return self.c(F.relu(r+self.b(self.a(x))))
for how in 'literal half end cat zeros'.split(): net(f'option_a_{how}', '', lambda how=how: OptionA(how))
expect('option_a_', '''
literal half end: s.0 8, a.0 12 | b: no layer makes it
cat: s.0 8, a.0 12
zeros: s.0 8, a.0 12, b 8''')

# ---- blocks

class SE(nn.Module):
    def __init__(self, act=nn.Sigmoid, last=None): super().__init__(); self.a,self.bn,self.f1,self.f2,self.act,self.c = conv(3, 12, 3),nn.BatchNorm2d(12),conv(12, 4),conv(4, 12),act(),last or conv(12, 5)
    def forward(self, x):
        y = self.bn(self.a(x)).relu()
        return self.c(y*self.act(self.f2(self.f1(y.mean((2,3), keepdim=True)).relu()))).mean((2,3))
net('se', 'a 12, f1 4', SE)
net('se_hard', 'a 12, f1 4', lambda: SE(nn.Hardsigmoid))
net('se_padded', 'a 12, f1 4', lambda: SE(last=conv(12, 5, 3, padding=1)))
class SELinear(nn.Module):
    def __init__(self): super().__init__(); self.a,self.f1,self.f2,self.c = cbr(3, 12),nn.Linear(12, 4),nn.Linear(4, 12),conv(12, 5)
    def forward(self, x):
        y = self.a(x)
        b,c,_,_ = y.size()
        return self.c(y*self.f2(self.f1(F.adaptive_avg_pool2d(y, 1).view(b, c)).relu()).sigmoid().view(b, c, 1, 1)).mean((2,3))
net('se_linear', 'a.0 12, f1 4', SELinear)
class SK(nn.Module):
    def __init__(self, stacked):
        super().__init__()
        self.a,self.p,self.q,self.f,self.up,self.c,self.stacked = cbr(3, 8),cbr(8, 10),cbr(8, 10, 5),conv(10, 4),conv(4, 20),conv(10, 5),stacked
    def forward(self, x):
        x = self.a(x)
        y = torch.stack([self.p(x), self.q(x)], 1)
        s = self.up(self.f(y.sum(1).mean((2,3), keepdim=True)).relu())
        s = (s.view(s.shape[0], 2, s.shape[1]//2, 1, 1) if self.stacked else s.view(len(x), 2, -1, 1, 1)).softmax(1)
        return self.c((y*s).sum(1) if self.stacked else y[:,0]*s[:,0]+y[:,1]*s[:,1]).mean((2,3))
net('sk_stack', 'a.0 8, p.0 10, f 4', lambda: SK(True))
net('sk_index', 'a.0 8, p.0 10, f 4', lambda: SK(False))
class PreAct(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem,self.norm,self.head = conv(3, 8),nn.BatchNorm2d(8),nn.Linear(8, 4)
        self.blocks = nn.ModuleList(nn.Sequential(nn.BatchNorm2d(8), nn.ReLU(), conv(8, 12, 3, padding=1), nn.BatchNorm2d(12), nn.ReLU(), conv(12, 8)) for _ in range(2))
    def forward(self, x):
        x = self.stem(x)
        for b in self.blocks: x = x+b(x)
        return self.head(self.norm(x).relu().mean((2,3)))
net('preact', 'stem 8, blocks.0.2 12, blocks.1.2 12', PreAct)
class Dense(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem,self.t,self.head = conv(3, 8),conv(20, 6),nn.Linear(6, 3)
        self.n,self.k = nn.ModuleList(nn.BatchNorm2d(8+4*i) for i in range(3)),nn.ModuleList(conv(8+4*i, 4, 3, padding=1) for i in range(3))
    def forward(self, x):
        fs = [self.stem(x)]
        for n,k in zip(self.n, self.k): fs.append(k(n(torch.cat(fs, 1)).relu()))
        return self.head(self.t(torch.cat(fs, 1)).mean((2,3)))
net('dense', 'stem 8, t 6, k.0 4, k.1 4, k.2 4', Dense)
net('conv_head', '0.0 8, 1 12', lambda: nn.Sequential(cbr(3, 8), conv(8, 12), nn.ReLU(), conv(12, 5), nn.AdaptiveAvgPool2d(1), nn.Flatten()))
class FPN(nn.Module):
    def __init__(self):
        super().__init__()
        self.c = nn.ModuleList([cbr(3, 8, stride=2), cbr(8, 12, stride=2), cbr(12, 16, stride=2)])
        self.l,self.o = nn.ModuleList(conv(k, 8) for k in (8,12,16)),nn.ModuleList(conv(8, 8, 3, padding=1) for _ in range(3))
        self.cls,self.box,self.cls_out,self.box_out = cbr(8, 8),cbr(8, 8),conv(8, 15, 3, padding=1),conv(8, 12, 3, padding=1)
    def forward(self, x):
        fs = []
        for c in self.c: fs.append(x := c(x))
        ls = [l(f) for l,f in zip(self.l, fs)]
        for i in (1,0): ls[i] = ls[i]+F.interpolate(ls[i+1], size=ls[i].shape[-2:], mode='nearest')
        ls = [o(l) for o,l in zip(self.o, ls)]
        box,cls = ([out(f(l)).permute(0,2,3,1).reshape(len(x), -1, n) for l in ls] for f,out,n in ((self.box, self.box_out, 4), (self.cls, self.cls_out, 5)))
        return dict(cls=torch.cat(cls, 1), box=box, features=None)
net('fpn', 'c.0.0 8, c.1.0 12, c.2.0 16, l.0 8, o.0 8, cls.0 8, box.0 8', FPN, batch(2, 3, 32, 32))
small('eca', 'a 8 (convolution along channels)', lambda a,b,m: a*m.d(a.mean((2,3)).unsqueeze(-1).transpose(-1,-2)).transpose(-1,-2).unsqueeze(-1).sigmoid()+b, lambda: dict(d=nn.Conv1d(1,1,3,padding=1)))
small('eca_dilated', 'a 8 (convolution along channels), b 8', lambda a,b,m: a*m.d(a.mean((2,3))[:,None])[:,0,:,None,None].sigmoid(), lambda: dict(d=nn.Conv1d(1,1,3,padding=2,dilation=2)))
small('eca_two_filters', 'b 8 | a: is convolved along its channels; d: picked by number', lambda a,b,m: a*m.d(a.mean((2,3))[:,None])[:,0,:,None,None].sigmoid(), lambda: dict(d=nn.Conv1d(1,2,3,padding=1)))
small('eca_circular', 'b 8 | a: is convolved along its channels', lambda a,b,m: a*m.d(F.pad(a.mean((2,3))[:,None], (1,1), mode='circular'))[:,0,:,None,None].sigmoid(), lambda: dict(d=nn.Conv1d(1,1,3)))
small('cbam_spatial', 'a 8, b 8 (amax)', lambda a,b,m: a*m.d(torch.cat([b.mean(1, keepdim=True), b.amax(1, keepdim=True)], 1)).sigmoid(), lambda: dict(d=conv(2, 1, 3, padding=1)))
class CondConv(nn.Module):
    def __init__(self): super().__init__(); self.a,self.w,self.r,self.b = conv(3, 8),param(4, 6*8*9),nn.Linear(8, 4),conv(6, 3)
    def forward(self, x):
        y = self.a(x)
        B,C,H,W = y.shape
        w = (self.r(y.mean((2,3))).sigmoid()@self.w).view(B*6, C, 3, 3)
        return self.b(F.conv2d(y.reshape(1, B*C, H, W), w, groups=B, padding=1).view(B, 6, H, W))
net('condconv', 'a 8 | r: constant but not zero; w: number 6', CondConv)

# ---- norms

for g,c in ((1,8),(2,8),(4,12),(8,16),(16,32),(8,8),(16,16)):
    net(f'gn_{g}_{c}', '', lambda g=g,c=c: nn.Sequential(conv(3, c, 3), nn.GroupNorm(g, c), nn.ReLU(), conv(c, 4), nn.ReLU(), conv(4, 3)))
expect('gn_', '''
1_8: 0 8 (group norm), 3 4
2_8: 0 4 (group norm), 3 4
4_12: 0 3 (group norm), 3 4
8_16 8_8: 0 8, 3 4
16_32 16_16: 0 16, 3 4''')
net('gn_plain', '0 4 (group norm)', lambda: nn.Sequential(conv(3, 8, 3), nn.GroupNorm(2, 8, affine=False), nn.ReLU(), conv(8, 3)))
net('instance', '0 8, 3 6', lambda: nn.Sequential(conv(3, 8, 3), nn.InstanceNorm2d(8, affine=True), nn.ReLU(), conv(8, 6, 3), nn.InstanceNorm2d(6), nn.ReLU(), conv(6, 3)))
net('instance_tracked', '0 8', lambda: nn.Sequential(conv(3, 8, 3), nn.InstanceNorm2d(8, affine=True, track_running_stats=True), nn.ReLU(), conv(8, 3)))
net('bn_untracked', '0 8', lambda: nn.Sequential(conv(3, 8, 3), nn.BatchNorm2d(8, track_running_stats=False), nn.ReLU(), conv(8, 3)))
net('bn_plain', '0 8', lambda: nn.Sequential(conv(3, 8, 3), nn.BatchNorm2d(8, affine=False), nn.ReLU(), conv(8, 3)))
net('bn_plain_padded', '0 8', lambda: nn.Sequential(conv(3, 8, 3), nn.BatchNorm2d(8, affine=False), conv(8, 3, 3, padding=1)), kept="isn't constant")
net('sync_bn', '0 8', lambda: nn.Sequential(conv(3, 8, 3), nn.SyncBatchNorm(8), nn.ReLU(), conv(8, 3)), trains=False)
net('prelu', '0 8, 2 6', lambda: nn.Sequential(conv(3, 8), nn.PReLU(8), conv(8, 6), nn.PReLU(), conv(6, 3)))
class LN2d(nn.LayerNorm):
    def forward(self, x): return F.layer_norm(x.permute(0,2,3,1), self.normalized_shape, self.weight, self.bias, self.eps).permute(0,3,1,2)
net('ln2d', '0 8 (layer norm)', lambda: nn.Sequential(conv(3, 8), LN2d(8), nn.ReLU(), conv(8, 4)))
net('ln_chw', '0 8 (layer norm)', lambda: nn.Sequential(conv(3, 8), nn.LayerNorm((8,8,8)), nn.ReLU(), conv(8, 4)))
class Norm(nn.Module):
    "A norm over features, written in many ways"
    def __init__(self, how): super().__init__(); self.a,self.g,self.b,self.how,self.rms = nn.Linear(12, 8),param(8),nn.Linear(8, 4),how,nn.RMSNorm(8)
    def forward(self, x):
        y = self.a(x)
        def unit(): return (y-y.mean(-1, keepdim=True))/(y.var(-1, keepdim=True, unbiased=False)+1e-5).sqrt()
        return self.b(dict(rms=lambda: self.rms(y), rms_hand=lambda: y*torch.rsqrt(y.pow(2).mean(-1, keepdim=True)+1e-6)*self.g, normalize=lambda: F.normalize(y, dim=-1)*self.g,
                           rms_sum=lambda: y*torch.rsqrt(y.pow(2).sum(-1, keepdim=True)/y.shape[-1]+1e-6)*self.g, ln_hand=lambda: unit()*self.g, ln_bare=unit,
                           ln_literal=lambda: F.layer_norm(y, (8,)), ln_shape=lambda: F.layer_norm(y, y.shape[-1:]))[self.how]())
for how in 'rms rms_hand normalize rms_sum ln_hand ln_bare ln_literal ln_shape'.split(): net(f'norm_{how}', '', lambda how=how: Norm(how), batch(2, 5, 12))
expect('norm_', '''
rms: a 8 (rms norm)
rms_hand ln_hand ln_bare: a 8 (mean)
normalize rms_sum: a 8
ln_literal:  | a: number 8
ln_shape: a 8 (layer norm)''')
also('norm_ln_bare', inexact="isn't constant")
also('norm_rms_sum', finds='a 8 (number of channels)', inexact='differs')
class GRN(nn.Module):
    def __init__(self): super().__init__(); self.a,self.g,self.b,self.c = nn.Linear(12, 8),param(8),param(8, seed=2),nn.Linear(8, 4)
    def forward(self, x):
        x = F.gelu(self.a(x))
        n = x.norm(p=2, dim=1, keepdim=True)
        return self.c(x + self.g*(x*n/(n.mean(-1, keepdim=True)+1e-6))+self.b)
net('grn', 'a 8 (mean)', GRN, batch(2, 5, 12))
small('local_response', ' | a: is resized along its channels; b: of that length', lambda a,b,m: F.local_response_norm(a, 3)+b)
small('norm_of_map', 'a 8', lambda a,b,m: a/(a.flatten(1).norm(dim=1)[:,None,None,None]+1)+b)
small('standardised', 'a 8 (mean)', lambda a,b,m: (a-a.flatten(1).mean(1)[:,None,None,None])/a.flatten(1).std(1)[:,None,None,None]+b, inexact="isn't constant")
small('centred', 'a 8 (mean), b 8', lambda a,b,m: m.d((a-a.mean(1, keepdim=True)).mean((2,3)))[:,:,None,None]*b, lambda: dict(d=nn.Linear(8,8)), inexact="isn't constant")

# ---- weights that are computed

net('std_conv', '0 8 (statistics over weights), 2 6 (group norm)', lambda: nn.Sequential(conv(3, 8), nn.ReLU(), StdConv2d(8, 6, 3, padding=1), nn.GroupNorm(1, 6), nn.ReLU(), StdConv2d(6, 4, 1)))
net('scaled_std_conv', '0 4 (statistics over weights), 2 4 (statistics over weights)', lambda: nn.Sequential(ScaledStdConv2d(3, 8, 3), nn.ReLU(), ScaledStdConv2d(8, 8, 3, padding=1, groups=2), nn.ReLU(), ScaledStdConv2d(8, 4, 1)))
net('scaled_std_1x1', '0 8 (statistics over weights), 2 6', lambda: nn.Sequential(ScaledStdConv2d(3, 8, 3), nn.ReLU(), ScaledStdConv2d(8, 6, 1), nn.ReLU(), conv(6, 4)))
class WS(nn.Conv2d):
    def forward(self, x): return F.conv2d(x, (self.weight-self.weight.mean((1,2,3), keepdim=True))/(self.weight.std((1,2,3), keepdim=True)+1e-5), self.bias)
net('ws_hand', '0 8 (mean), 2 6 (mean)', lambda: nn.Sequential(conv(3, 8), nn.ReLU(), WS(8, 6, 3), nn.ReLU(), WS(6, 4, 1)))
class Weights(nn.Module):
    "Linear layers with a weight made from a weight"
    def __init__(self, f): super().__init__(); self.a,self.d,self.w,self.f = nn.Linear(6, 8),nn.Linear(8, 7),param(4, 7),f
    def forward(self, x): return F.linear(F.linear(self.a(x).relu(), self.f(self.d.weight)), self.w)
flat = batch(2, 6)
net('cosine_rows', 'a 8 (linalg_vector_norm), d 7', lambda: Weights(lambda w: F.normalize(w, dim=1)), flat)
net('cosine_columns', 'a 8, d 7 (linalg_vector_norm)', lambda: Weights(lambda w: F.normalize(w, dim=0)), flat)
net('weight_over_sum', 'a 8 (sum), d 7', lambda: Weights(lambda w: w/w.abs().sum(1, keepdim=True).clamp(min=1e-3)), flat)
net('weight_over_max', 'a 8 (max), d 7 (max)', lambda: Weights(lambda w: w/w.abs().max()), flat)
net('weight_softmax', 'a 8 (softmax), d 7 (softmax)', lambda: Weights(lambda w: w.softmax(1)), flat)
net('weight_squared', 'a 8, d 7', lambda: Weights(lambda w: w*w.abs()*2), flat)
net('weight_penalty', 'a 8 (sum), d 7 (sum)', lambda: Net(lambda m,x: (m.w(m.d(m.a(x).relu())), m.d.weight.pow(2).sum()), a=nn.Linear(6, 8), d=nn.Linear(8, 7), w=nn.Linear(7, 4)), flat)
net('weight_norm', '0.0 8 (norm of weights), 1.parametrizations.weight.original1 6', lambda: nn.Sequential(cbr(3, 8), nn.utils.parametrizations.weight_norm(conv(8, 6)), nn.ReLU(), conv(6, 3)), exact=False) # masked, 0/0
net('spectral_norm', '0.0 8 | 1.parametrizations.weight.original: no rule for vdot', lambda: nn.Sequential(cbr(3, 8), nn.utils.parametrizations.spectral_norm(conv(8, 6)), nn.ReLU(), conv(6, 3)), trains=False, kept='differs', inexact='differs')
net('orthogonal', ' | 0.0: of that length', lambda: nn.Sequential(cbr(3, 8), nn.utils.parametrizations.orthogonal(conv(8, 8)), nn.ReLU(), conv(8, 3)))

# ---- attention

class Attn(nn.Module):
    "Attention by hand, heads written in many ways"
    def __init__(self, how='attr', dim=12, heads=3):
        super().__init__()
        self.inp,self.qkv,self.proj,self.out = nn.Linear(12, dim),nn.Linear(dim, 3*dim),nn.Linear(dim, dim),nn.Linear(dim, 4)
        self.num_heads,self.head_dim,self.scale,self.how = heads,dim//heads,(dim//heads)**-.5,how
    def forward(self, x):
        x = self.inp(x)
        B,N,C = x.shape
        y,h,d = self.qkv(x),self.num_heads,self.head_dim
        def five(*to): return y.reshape(B, N, *to).permute(2,0,3,1,4).unbind(0)
        def three(*parts): return [t.view(B, N, h, -1).transpose(1,2) for t in parts]
        q,k,v = dict(attr=lambda: five(3, h, C//h), width=lambda: five(3, h, d), auto=lambda: five(3, h, -1), auto_heads=lambda: five(3, -1, d), literal=lambda: five(3, 3, 4), literal_auto=lambda: five(3, 3, -1),
                     chunk=lambda: three(*y.chunk(3, -1)), split=lambda: three(*y.split(C, -1)), slice=lambda: three(y[..., :C], y[..., C:2*C], y[..., 2*C:]))[self.how]()
        y = (((q*self.scale)@k.transpose(-2,-1)).softmax(-1)@v).transpose(1,2)
        return self.out(self.proj(y.flatten(2) if self.how=='auto' else y.reshape(B, N, C))).mean(1)
tokens = batch(2, 5, 12)
for how in 'attr width auto auto_heads literal literal_auto chunk split slice'.split(): net(f'attn_{how}', '', lambda how=how: Attn(how), tokens)
expect('attn_', '''
attr width auto_heads chunk split: inp 3, proj 12
auto: inp 12, qkv 3, proj 12
literal literal_auto: proj 12 | inp: number 3; qkv: number 3
slice: proj 12 | inp: compares 12%(len(12)-0) with 0; qkv: compares 12%(len(12)-0) with 0''')
also('attn_slice', finds='inp 3, proj 12')
class Sdpa(nn.Module):
    def __init__(self, heads, how='', kv=None):
        super().__init__()
        self.inp,self.q,self.k,self.v,self.proj,self.out = nn.Linear(12, 12),*(nn.Linear(12, 12) for _ in range(4)),nn.Linear(12, 4)
        self.heads,self.how = heads,how
    def forward(self, x):
        x = self.inp(x)
        B,N,C = x.shape
        q,k,v = self.q(x),self.k(x),self.v(x)
        if self.heads: q,k,v = (t.view(B, N, self.heads, C//self.heads).transpose(1,2) for t in (q, k, v))
        y = F.scaled_dot_product_attention(query=q, key=k, value=v) if 'kw' in self.how else F.scaled_dot_product_attention(q, k, v, attn_mask=torch.ones(N, N).tril().bool() if 'mask' in self.how else None)
        if self.heads: y = y.transpose(1,2).reshape(B, N, C)
        return self.out(self.proj(y) if 'plain' in self.how else x+self.proj(y)).mean(1)
for name,(h,how) in dict(sdpa=(3,''), sdpa_plain=(3,'plain'), sdpa_kw=(3,'kw'), sdpa_mask=(3,'mask'), sdpa_one_head=(1,''), sdpa_no_heads=(0,''), sdpa_no_heads_kw=(0,'kw')).items(): net(name, '', lambda h=h,how=how: Sdpa(h, how), tokens)
expect('', '''
sdpa sdpa_kw sdpa_mask: inp 3
sdpa_plain: inp 3, proj 12
sdpa_one_head: q 12 (scale of attention) | inp: two lengths; v: two lengths; proj: two lengths
sdpa_no_heads sdpa_no_heads_kw: inp 12, q 12 (scale of attention), v 12''')
class GQA(nn.Module):
    def __init__(self, kv, how):
        super().__init__()
        self.h,self.kv,self.hd,self.how = 4,kv,3,how
        self.q,self.k,self.v,self.o = nn.Linear(12, 12),nn.Linear(12, 3*kv),nn.Linear(12, 3*kv),nn.Linear(12, 4)
    def forward(self, x):
        B,N,_ = x.shape
        q = self.q(x).view(B, N, self.h, self.hd).transpose(1,2)
        k,v = (f(x).view(B, N, self.kv, self.hd).transpose(1,2) for f in (self.k, self.v))
        if self.how=='repeat': k,v = (t.repeat_interleave(self.h//self.kv, 1) for t in (k,v))
        if self.how=='expand': k,v = (t[:,:,None].expand(B, self.kv, self.h//self.kv, N, self.hd).reshape(B, self.h, N, self.hd) for t in (k,v))
        return self.o(F.scaled_dot_product_attention(q, k, v, enable_gqa=self.how=='flag').transpose(1,2).flatten(2)).mean(1)
for how in ('repeat','expand','flag'):
    for kv in (1,2): net(f'gqa_{how}_{kv}', '', lambda kv=kv,how=how: GQA(kv, how), tokens)
expect('gqa_', '''
repeat_1 flag_1:  | q: of that length; k: same numbers; v: of that length
repeat_2 flag_2:  | q: same numbers; k: same numbers; v: same numbers
expand_1:  | k: same numbers; q: hang together
expand_2: q 3 (scale of attention)''')
net('mqa', ' | k: same numbers; q: hang together', lambda: GQA(1, ''), tokens)
class Talking(nn.Module):
    def __init__(self): super().__init__(); self.qkv,self.l,self.w,self.proj,self.h = nn.Linear(12, 36),nn.Linear(3, 3),nn.Linear(3, 3),nn.Linear(12, 4),3
    def forward(self, x):
        B,N,C = x.shape
        q,k,v = self.qkv(x).reshape(B, N, 3, self.h, C//self.h).permute(2,0,3,1,4)
        a = self.l((q@k.transpose(-1,-2)).permute(0,2,3,1)).permute(0,3,1,2).softmax(-1)
        return self.proj((self.w(a.permute(0,2,3,1)).permute(0,3,1,2)@v).transpose(1,2).reshape(B,N,C)).mean(1)
net('talking_heads', 'l 3 | qkv: length as 12//h; w: length as 12//h', Talking, tokens)
def mha(x, m, kw):
    x = m.inp(x)
    if not m.m.batch_first: x = x.transpose(0,1)
    y = m.m(x, x, x, **kw)[0]
    return m.o(y if m.m.batch_first else y.transpose(0,1)).mean(1)
for name,first,kw in (('mha_batch_first',True,dict(need_weights=False)), ('mha_seq_first',False,dict(need_weights=False)), ('mha_weights',True,{})):
    net(name, '', lambda first=first,kw=kw: Net(lambda m,x: mha(x, m, kw), inp=nn.Linear(12, 12), m=nn.MultiheadAttention(12, 3, batch_first=first), o=nn.Linear(12, 4)), tokens)
expect('', '''
mha_batch_first mha_seq_first: inp 3, m.out_proj 12
mha_weights: inp 3 (mean), m.out_proj 12''')
net('mha_cross', 'i 3, k 10, m.out_proj 12', lambda: Net(lambda m,x: m.o(m.m(m.i(x), m.k(x), m.k(x), need_weights=False)[0]), i=nn.Linear(12, 12), k=nn.Linear(12, 10), m=nn.MultiheadAttention(12, 3, kdim=10, vdim=10, batch_first=True), o=nn.Linear(12, 3)), tokens)
for name,kw in dict(encoder_layer=dict(batch_first=True), encoder_layer_pre=dict(batch_first=True, norm_first=True, activation='gelu'), encoder_layer_seq_first={}).items():
    net(name, '', lambda kw=kw: nn.Sequential(nn.Linear(12, 12), nn.TransformerEncoderLayer(12, 3, 20, **kw), nn.Linear(12, 4)), tokens)
expect('', '''
encoder_layer encoder_layer_pre encoder_layer_seq_first: 0 3 (layer norm), 1.linear1 20''')
net('transformer', 'encoder.layers.0.linear1 16, decoder.layers.0.linear1 16 | encoder.layers.0.self_attn.in_proj_weight: number 12; encoder.layers.0.self_attn.out_proj: of that length; encoder.layers.0.linear2: of that length; decoder.layers.0.self_attn.in_proj_weight: number 12; decoder.layers.0.self_attn.out_proj: of that length; decoder.layers.0.multihead_attn.in_proj_weight: number 12; decoder.layers.0.multihead_attn.out_proj: of that length; decoder.layers.0.linear2: of that length', lambda: nn.Transformer(12, 3, 1, 1, 16, batch_first=True), lambda: (rand(2,5,12), rand(2,4,12,seed=2)))
class Einsum(nn.Module):
    def __init__(self, dots=False): super().__init__(); self.q,self.k,self.v,self.o,self.h,self.dots = *(nn.Linear(12, 12) for _ in range(3)),nn.Linear(12, 4),3,dots
    def forward(self, x):
        q,k,v = (f(x).view(*x.shape[:2], self.h, -1) for f in (self.q, self.k, self.v))
        if self.dots:
            q,k,v = (t.transpose(1,2) for t in (q,k,v))
            return self.o(torch.einsum('...ij,...jd->...id', torch.einsum('...id,...jd->...ij', q, k).softmax(-1), v).transpose(1,2).flatten(2)).mean(1)
        return self.o(torch.einsum('bhnm,bmhd->bnhd', torch.einsum('bnhd,bmhd->bhnm', q, k).softmax(-1), v).flatten(2)).mean(1)
net('einsum_attention', 'q 3', Einsum, tokens)
net('einsum_dots', 'q 3', lambda: Einsum(True), tokens)
class Mixer(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem,self.t1,self.t2,self.c1,self.c2,self.head = nn.Linear(12, 8),nn.Linear(5, 7),nn.Linear(7, 5),nn.Linear(8, 16),nn.Linear(16, 8),nn.Linear(8, 4)
        self.n1,self.n2,self.n = (nn.LayerNorm(8) for _ in range(3))
    def forward(self, x):
        x = self.stem(x)
        x = x + self.t2(F.gelu(self.t1(self.n1(x).transpose(1,2)))).transpose(1,2)
        return self.head(self.n(x + self.c2(F.gelu(self.c1(self.n2(x))))).mean(1))
net('token_mixer', 'stem 8 (layer norm), t1 7, c1 16 | t2: of that length', Mixer, tokens)
class Vit(nn.Module):
    "Class token, positions, layer scale: parameters used directly"
    def __init__(self):
        super().__init__()
        self.patch,self.cls,self.pos,self.qkv,self.proj,self.h = conv(3, 12, 4, stride=4),param(1,1,12),param(1,5,12,seed=3),nn.Linear(12, 36),nn.Linear(12, 12),3
        self.f1,self.f2,self.head,self.g1,self.g2 = nn.Linear(12, 20),nn.Linear(20, 12),nn.Linear(12, 4),param(12),param(12, seed=2)
        self.n1,self.n2,self.n = (nn.LayerNorm(12) for _ in range(3))
    def forward(self, x):
        x = self.patch(x).flatten(2).transpose(1,2)
        x = torch.cat([self.cls.expand(x.shape[0], -1, -1), x], 1) + self.pos
        B,N,C = x.shape
        q,k,v = self.qkv(self.n1(x)).reshape(B, N, 3, self.h, C//self.h).permute(2,0,3,1,4)
        x = x + self.g1*self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1,2).reshape(B, N, C))
        return self.head(self.n(x + self.g2*self.f2(F.gelu(self.f1(self.n2(x)))))[:,0])
net('vit', 'patch 3 (layer norm), f1 20', Vit)
class RelPos(nn.Module):
    def __init__(self):
        super().__init__()
        self.qkv,self.proj,self.h,self.table = nn.Linear(12, 36),nn.Linear(12, 4),3,param(9, 3)
        self.register_buffer('idx', torch.arange(5)[None]-torch.arange(5)[:,None]+4)
    def forward(self, x):
        B,N,C = x.shape
        q,k,v = self.qkv(x).reshape(B, N, 3, self.h, -1).permute(2,0,3,1,4)
        a = q@k.transpose(-1,-2) + self.table[self.idx.view(-1)].view(N, N, -1).permute(2,0,1)[None]
        return self.proj((a.softmax(-1)@v).transpose(1,2).reshape(B,N,-1)).mean(1)
net('relative_position', 'qkv 3', RelPos, tokens)

# ---- contractions with bare weights

small('matmul', 'd 6, a 8, b 8', lambda a,b,m: (a.transpose(1,3)@m.d+m.e).transpose(1,3), lambda: dict(d=param(8,6), e=param(6), c=conv(6,4)))
small('matmul_t', 'a 8, b 8', lambda a,b,m: (a.flatten(2).transpose(1,2)@m.d.weight.t()).transpose(1,2).unflatten(2,(8,8))+b, lambda: dict(d=nn.Linear(8,8)))
small('matmul_left', 'd 8, a 8', lambda a,b,m: (m.d@a.flatten(2)).unflatten(2,(8,8))+b, lambda: dict(d=param(8,8)))
small('matmul_vector', 'd 8, b 8', lambda a,b,m: (a.mean((2,3))@m.d)[:,None,None,None]*b, lambda: dict(d=param(8)))
small('mm', 'd 8, a 8', lambda a,b,m: torch.mm(a.mean((2,3)), m.d)[:,:,None,None]*b, lambda: dict(d=param(8,8)))
small('mv', 'd 8, b 8', lambda a,b,m: torch.mv(a.mean((2,3)), m.d)[:,None,None,None]*b, lambda: dict(d=param(8)))
small('addmm', 'a 8, b 8', lambda a,b,m: torch.addmm(m.d.bias, a.mean((2,3)), m.d.weight.t())[:,:,None,None]*b, lambda: dict(d=nn.Linear(8,8)))
small('addmm_kw', 'a 8, b 8', lambda a,b,m: torch.addmm(input=m.d.bias, mat1=a.mean((2,3)), mat2=m.d.weight.t())[:,:,None,None]*b, lambda: dict(d=nn.Linear(8,8)))
small('baddbmm', 'a 8 | b: of that length', lambda a,b,m: torch.baddbmm(a.flatten(2)[:,:,:8], a.flatten(2), b.flatten(2).transpose(1,2)).mean(2)[:,:,None,None]*a)
small('bmm', 'a 8, b 8 (mean)', lambda a,b,m: torch.bmm(input=a.flatten(2), mat2=b.flatten(2).transpose(1,2)).mean(2)[:,:,None,None]*a)
small('einsum_weight', 'd 6, a 8, b 8', lambda a,b,m: torch.einsum('bchw,oc->bohw', a, m.d), lambda: dict(d=param(6,8), c=conv(6,4)))
small('einsum_implicit', 'd 6, a 8, b 8', lambda a,b,m: torch.einsum('bchw,co', a, m.d).movedim(2,1), lambda: dict(d=param(8,6), c=conv(6,4)))
small('einsum_list', 'a 8', lambda a,b,m: torch.einsum('bchw,bchw->bhw', [a, b])[:,None]*a)
small('einsum_gram', 'a 8, b 8 (mean)', lambda a,b,m: torch.einsum('bchw,bdhw->bcd', a, b).mean(2)[:,:,None,None]*a)
small('einsum_scale', 'd 8', lambda a,b,m: torch.einsum('bchw,c->bchw', a, m.d)+b, lambda: dict(d=param(8)))
small('einsum_diagonal', ' | a: no rule for einsum; b: no rule for einsum', lambda a,b,m: torch.einsum('ii->i', (a.flatten(2)@b.flatten(2).transpose(1,2))[0])[None,:,None,None]*a)
small('tensordot', ' | a: no rule for tensordot; b: of that length', lambda a,b,m: torch.tensordot(a, m.d, dims=([1],[0])).permute(0,3,1,2)+b, lambda: dict(d=param(8,8)))
small('outer', ' | a: no rule for outer; b: no rule for outer', lambda a,b,m: torch.outer(a.mean((0,2,3)), b.mean((0,2,3))).mean(1)[None,:,None,None]*a)

# ---- channels that are constant, not zero, when they are masked

def fold(name, finds, f, d=None, **kw): small(name, finds, f, lambda: dict(d=d() if d else conv(8, 8), **({} if kw.get('c') is None else dict(c=kw['c']()))), **{k:v for k,v in kw.items() if k!='c'})
fold('fold_sigmoid', 'a 8, b 8', lambda a,b,m: m.d(a.sigmoid())+b)
fold('fold_one_minus', 'a 8, b 8, d 8', lambda a,b,m: m.d(1-a))
fold('fold_padded', 'a 8, b 8', lambda a,b,m: m.d(a.sigmoid())+b, lambda: conv(8, 8, 3, padding=1), kept="isn't constant")
fold('fold_circular', 'a 8, b 8, d 8', lambda a,b,m: m.d(a.sigmoid()), lambda: conv(8, 8, 3, padding=1, padding_mode='circular'))
fold('fold_bn', 'a 8, b 8', lambda a,b,m: m.d(a.sigmoid())+b, lambda: nn.Sequential(conv(8, 8, bias=False), nn.BatchNorm2d(8)))
fold('fold_grouped', 'a 4, b 4', lambda a,b,m: m.d(a.sigmoid())+b, lambda: conv(8, 8, groups=2, bias=False))
fold('fold_depthwise', 'a 8', lambda a,b,m: m.d(a.sigmoid())+b, lambda: conv(8, 8, 3, padding=1, groups=8, bias=False))
fold('fold_transposed', 'a 8, b 8, d 8', lambda a,b,m: m.d(a.sigmoid()), lambda: nn.ConvTranspose2d(8, 8, 2, stride=2, bias=False), kept="isn't constant")
fold('fold_border', 'a 8, b 8, d 8', lambda a,b,m: m.d(F.avg_pool2d(1-a, 3, 1, 1)), kept="isn't constant")
fold('fold_shared_same', 'a 8, d 8', lambda a,b,m: m.d(1-a)*m.d(1-b))
fold('fold_shared_once', 'a 8, d 8', lambda a,b,m: m.d(1-a)+m.d(b), kept='differs')
fold('fold_shared_other', 'a 8, d 8', lambda a,b,m: m.d(1-a)+m.d(2-b), kept='several times')
fold('fold_computed', 'a 8, b 8, d 8', lambda a,b,m: F.conv2d(1-a, m.d.weight*2, m.d.bias), kept='no bias can take')
fold('fold_functional', 'a 8, b 8, d 8', lambda a,b,m: F.conv2d(1-a, m.d.weight, m.d.bias))
small('fold_other_bias', 'a 8, b 8, d 8', lambda a,b,m: F.conv2d(1-a, m.d.weight, m.e), lambda: dict(d=conv(8, 8, bias=False), e=param(8)), kept='differs')
small('fold_matmul', 'd 6, a 8, b 8', lambda a,b,m: ((1-a).transpose(1,3)@m.d).transpose(1,3), lambda: dict(d=param(8,6), c=conv(6,4)), kept='differs')
small('fold_matmul_t', 'a 8, b 8', lambda a,b,m: (a.sigmoid().flatten(2).transpose(1,2)@m.d.weight.t()).transpose(1,2).unflatten(2,(8,8))+b, lambda: dict(d=nn.Linear(8,8)), kept='differs')
small('fold_einsum', 'd 6, a 8, b 8', lambda a,b,m: torch.einsum('bchw,cd->bdhw', 1-a, m.d), lambda: dict(d=param(8,6), c=conv(6,4)), kept='differs')
small('fold_cat', 'a 8, b 8', lambda a,b,m: torch.cat([a.sigmoid(), b], 1), lambda: dict(c=conv(16,4)))
fold('ones_like', 'a 8, d 8', lambda a,b,m: m.d(torch.ones_like(a)+b))
fold('gates', 'a 8, d 8', lambda a,b,m: m.d(a.mean((2,3), keepdim=True).sigmoid()*b.sigmoid()))
fold('gate_by_data', 'a 8, b 8 (mean)', lambda a,b,m: m.d((a.sigmoid()*b.mean((1,2,3), keepdim=True)).mean((2,3)))[:,:,None,None]*b, lambda: nn.Linear(8, 8), kept="isn't constant")
class ByInput(nn.Module):
    "What a removed channel brings depends on the input alone"
    def __init__(self, f): super().__init__(); self.a,self.d,self.h,self.f = nn.Linear(6,8),nn.Linear(8,7),nn.Linear(7,3),f
    def forward(self, x): return self.h(self.d(self.f(self.a(x), x)).relu())
net('gate_by_input', 'a 8, d 7', lambda: ByInput(lambda a,x: a.sigmoid()*x.mean(-1, keepdim=True)), flat, kept="isn't constant")
net('shift_by_input', 'a 8, d 7', lambda: ByInput(lambda a,x: a+x.mean(-1, keepdim=True)), flat, kept="isn't constant")
net('gate_by_input_1', 'a 8, d 7', lambda: ByInput(lambda a,x: a.sigmoid()*x.mean(-1, keepdim=True)), batch(1, 6), kept="isn't constant")
net('shift_by_input_1', 'a 8, d 7', lambda: ByInput(lambda a,x: a+x.mean(-1, keepdim=True)), batch(1, 6), kept="isn't constant")
net('shift_by_input_equal', 'a 8, d 7', lambda: ByInput(lambda a,x: a+x.mean(-1, keepdim=True)), lambda: rand(1, 6).expand(3, 6), kept="isn't constant")

# ---- reductions over channels

for name,f in dict(mean=lambda b: b.mean(1, keepdim=True), std=lambda b: b.std(1, keepdim=True), var_bool=lambda b: torch.var(b, 1, False, True), std_mean=lambda b: torch.std_mean(b, 1, keepdim=True)[0], amax=lambda b: b.amax(1, keepdim=True),
                   max=lambda b: b.max(1, keepdim=True)[0], min=lambda b: b.abs().min(1, keepdim=True)[0], sum=lambda b: b.sum(1, keepdim=True), sum_axis=lambda b: torch.sum(b, axis=1, keepdims=True), mean_kw=lambda b: torch.mean(input=b, dim=1, keepdim=True),
                   norm=lambda b: b.norm(dim=1, keepdim=True), norm0=lambda b: b.norm(p=0, dim=1, keepdim=True), linalg_norm=lambda b: torch.linalg.norm(b, dim=1, keepdim=True), lse=lambda b: b.logsumexp(1, keepdim=True), prod=lambda b: b.prod(1, keepdim=True),
                   any=lambda b: (b>=0).any(1, keepdim=True), share=lambda b: (b>0).to(b.dtype).mean(1, keepdim=True), mean_all=lambda b: b.mean(), sum_all=lambda b: b.sum(), max_all=lambda b: b.max(), mean_none=lambda b: b.mean(()), var_all=lambda b: b.var(False),
                   float_mean=lambda b: float(b.mean()), count=lambda b: (b>=0).to(b.dtype).sum(1, keepdim=True), sum_exp=lambda b: b.exp().sum(1, keepdim=True), sum_cos=lambda b: b.cos().sum(1, keepdim=True),
                   sum_one_minus=lambda b: (1-b).sum(1, keepdim=True), norm_sigmoid=lambda b: b.sigmoid().norm(dim=1, keepdim=True), mean_flat=lambda b: b.flatten(1).mean(1)[:,None,None,None]).items():
    small(f'over_{name}', '', lambda a,b,m,f=f: a*f(b))
expect('over_', '''
mean mean_kw share mean_all mean_none float_mean mean_flat: a 8, b 8 (mean)
std: a 8, b 8 (std)
var_bool var_all: a 8, b 8 (var)
std_mean: a 8, b 8 (std_mean)
amax: a 8, b 8 (amax)
max max_all: a 8, b 8 (max)
min: a 8, b 8 (min)
sum sum_axis norm norm0 sum_all count: a 8, b 8
linalg_norm: a 8 | b: no rule for linalg_norm
lse: a 8, b 8 (logsumexp)
prod: a 8, b 8 (prod)
any: a 8, b 8 (any)
sum_exp sum_cos sum_one_minus: a 8, b 8 (sum)
norm_sigmoid: a 8, b 8 (linalg_vector_norm)''')
also('over_count', finds='a 8, b 8 (sum), c 4')
small('softmax', 'a 8 (softmax)', lambda a,b,m: a.softmax(1)*b)
small('softmax_kw', 'a 8 (softmax)', lambda a,b,m: torch.softmax(input=a, dim=1)*b)
small('softmax_flat', 'a 8 (softmax)', lambda a,b,m: a*b.flatten(1).softmax(1).view_as(b))
small('softmax_spatial', 'a 8', lambda a,b,m: a.flatten(2).softmax(-1).view_as(a)*b)
small('cosine', ' | a: no rule for cosine_similarity; b: no rule for cosine_similarity', lambda a,b,m: F.cosine_similarity(a, b, dim=1).unsqueeze(1)*a)
small('cdist', ' | a: no rule for cdist; b: no rule for cdist', lambda a,b,m: torch.cdist(a.flatten(2).transpose(1,2), b.flatten(2).transpose(1,2)).mean((1,2))[:,None,None,None]*a)

# ---- numbers that leave the code's ints

for name,f in dict(sqrt=lambda a,b: a/math.sqrt(a.shape[1])+b, pow=lambda a,b: a*a.shape[1]**-.5+b, by_hand=lambda a,b: a.sum(1, keepdim=True)/a.shape[1]*b, tensor=lambda a,b: a.sum(1, keepdim=True)/torch.tensor(a.shape[1])*b,
                   new_tensor=lambda a,b: a.sum(1, keepdim=True)*a.new_tensor(1/a.size(1))*b, len=lambda a,b: a.sum(1, keepdim=True)/len(a[0])*b, numel=lambda a,b: a.sum(1, keepdim=True)/(a.numel()/a[:, :1].numel())*b, times=lambda a,b: a*a.shape[1]+b,
                   minus=lambda a,b: a*-a.shape[1]+b, float=lambda a,b: a*float(a.shape[1])+b, min=lambda a,b: a*min(a.shape[1], 4)+b, if_even=lambda a,b: a+b if a.shape[1]%2==0 else a-b, if_odd=lambda a,b: a-b if a.shape[1]%2 else a+b,
                   if_bit=lambda a,b: a-b if a.shape[1]&1 else a+b, if_dict=lambda a,b: {8: a+b}.get(a.shape[1], a-b), if_in=lambda a,b: a+b if a.shape[1] in (8, 16) else a-b, if_same=lambda a,b: a+b if a.shape==b.shape else a-b,
                   if_shape=lambda a,b: a+b if tuple(a.shape[1:])==(8,8,8) else a-b, if_size=lambda a,b: a+b if a.shape[1:]==(8,8,8) else a-b, if_large=lambda a,b: a+b if list(a.shape)[1]>4 else a-b, if_spatial=lambda a,b: a+b if a.ndim==4 and a.shape[-1]>4 else a-b, if_numel=lambda a,b: a+b if a.numel()>500 else a-b,
                   loop=lambda a,b: sum(a[:, i:i+1] for i in range(a.shape[1]))*b).items():
    small(f'number_{name}', '', lambda a,b,m,f=f: f(a, b))
expect('number_', '''
sqrt pow times float if_bit: a 8 (number of channels)
by_hand tensor len: a 8, b 8
new_tensor: b 8 | a: no rule for new_tensor
numel: a 7 (number of channels), b 8 | a: number 1
minus if_same if_spatial: a 8
min if_large:  | a: compares len(8) with 4; b: compares len(8) with 4
if_even if_odd:  | a: compares len(8)%2 with 0; b: compares len(8)%2 with 0
if_dict if_in if_shape if_size:  | a: compares len(8) with 8; b: compares len(8) with 8
if_numel:  | a: compares ((1*len(8))*8)*8 with 500; b: compares ((1*len(8))*8)*8 with 500
loop: b 8 | a: hang together''')
for name in 'pow times float'.split(): also(f'number_{name}', inexact='differs')
for name in 'by_hand tensor len minus'.split(): also(f'number_{name}', finds='a 8 (number of channels), b 8, c 4' if name!='minus' else 'a 8 (number of channels), c 4', inexact='differs')
also('number_len', finds='a 8, b 8, c 4', kept='differs') # len() is always a plain number
small('attr_elsewhere', 'a 8', lambda a,b,m: a*m.k+b, lambda: dict(k=3))
class Attr(nn.Module):
    "k parts of the channels, and k for something else"
    def __init__(self, how, k=3, n=12): super().__init__(); self.k,self.a,self.d,self.c,self.how = k,conv(3, n),conv(n, n),conv(n, 3),how
    def forward(self, x):
        y = self.a(x)
        B,C,H,W = y.shape
        y = y.view(B, self.k, -1, H, W).softmax(self.k if self.how=='dim' else 2).view(B, C, H, W)
        if self.how=='pool': y = F.avg_pool2d(y, self.k)
        if self.how=='scale': y = y/self.k
        if self.how=='loop':
            for _ in range(self.k): y = self.d(y).relu()
        return self.c(y)
for how in 'only pool scale loop'.split(): net(f'attr_{how}', '', lambda how=how: Attr(how))
expect('attr_', '''
only loop: a 3
pool scale:  | a: compares k with 3''')
also('attr_loop', kept='its forward fails|differs')
also('sdpa_one_head', kept='code computes a length', inexact='code computes a length')
net('attr_dim', ' | a: compares k with 2', lambda: Attr('dim', 2, 8))
class TypeIs(nn.Module):
    def __init__(self): super().__init__(); self.k,self.a,self.c = 4,conv(3, 12),conv(12, 3)
    def forward(self, x):
        if type(self.k) is not int: raise TypeError(f'k must be int, not {type(self.k)}')
        return self.c(self.a(x).view(x.shape[0], self.k, -1, 8, 8).flatten(1, 2))
net('type_is_int', 'a 3', TypeIs, kept='k must be int')
class Stateful(nn.Module):
    "Keeps shapes in all sorts of places"
    def __init__(self): super().__init__(); self.a,self.c,self.seen,self.shapes = conv(3, 12),conv(12, 3),0,[]
    def forward(self, x):
        y = self.a(x)
        self.hw,self.size,self.all,self.d,self.n,self.shape = y.shape[2:],y.size(1),list(y.shape),{'c': y.shape[1]},(y.shape[1], {'k': [y.shape[1]]}),y.shape
        self.seen += 1
        self.shapes.append(y.shape[1])
        return self.c(y.view(y.shape[0], self.size, *self.hw))
net('keeps_shapes', 'a 12', Stateful)

# ---- writing in place

def written(f):
    "`f` on copies"
    def g(a, b, m):
        a,b = a.clone(),b.clone()
        return f(a, b, m)
    return g
def into(a, b, m):
    y = a.new_zeros(a.shape[0], a.shape[1]+b.shape[1], 8, 8)
    y[:, :a.shape[1]],y[:, a.shape[1]:] = a,b
    return y
def narrowed(a, b, m):
    y = a.new_zeros(a.shape[0], a.shape[1]+b.shape[1], 8, 8)
    y.narrow(1, 0, a.shape[1]).copy_(a); y.narrow(1, a.shape[1], b.shape[1]).copy_(b)
    return y
def literal(a, b, m):
    y = torch.zeros(a.shape[0], 8, 8, 8, dtype=a.dtype)
    y[:, :4].copy_(a[:, :4]); y[:, 4:].copy_(b[:, 4:])
    return y
def every_second(a, b, m):
    y = torch.zeros(a.shape[0], 16, 8, 8, dtype=a.dtype)
    y[:, ::2],y[:, 1::2] = a,b
    return y
def put(*idx, value=None, add=False):
    def f(a, b, m):
        v = b[idx] if value is None else value
        if add: a[idx] += v
        else: a[idx] = v
        return a if value is None else a+b
    return written(f)
ALL = slice(None)
two = lambda: dict(c=conv(16, 4))
small('write_halves', ' | a: length as len(8)+len(8); b: length as len(8)+len(8)', into, two)
small('write_narrow', ' | a: picked by number; b: picked by number', narrowed, two)
small('write_views', 'a 4 | a: is written into a part of a tensor; b: number 4', literal)
small('write_every_second', ' | a: it is written to in places; b: it is written to in places', every_second, two)
small('write_add_slice', 'b 4 | a: number 4; b: number 4', put(ALL, slice(0, 4), add=True))
small('write_slice', 'b 4 | a: in places; b: number 4', put(ALL, slice(0, 4)))
small('write_channel', ' | a: is written to in places; b: picked by number', put(ALL, 2))
small('write_row', ' | a: hang together; b: hang together', put(Ellipsis, 0, ALL))
small('write_zero', ' | a: is written to in places; b: of that length', put(ALL, 2, value=0))
small('write_all', 'a 8', put(ALL, value=1.))
small('write_where', ' | a: is written to in places; b: of that length', written(lambda a,b,m: (a.__setitem__(a<0, 0), a+b)[1]))
small('add_view', 'a 4, b 4 | a: number 4; b: number 4', written(lambda a,b,m: (a[:, :4].add_(b[:, :4]), a)[1]))
small('zero_view', ' | a: picked by number; b: picked by number', written(lambda a,b,m: (a[:, 2].zero_(), a+b)[1]))
small('fill_view', ' | a: picked by number; b: picked by number', written(lambda a,b,m: (a[:, 2].fill_(3.), a+b)[1]))
small('scale_half', 'a 4', written(lambda a,b,m: (a.chunk(2, 1)[0].mul_(b.chunk(2, 1)[1]), a)[1]), trains=False)
small('copy_like', 'a 8', lambda a,b,m: torch.empty_like(a).copy_(a)+b)
small('fill', 'a 8', written(lambda a,b,m: a.fill_(1.)+b))
small('in_place', 'a 8', written(lambda a,b,m: a.relu_().add_(b).mul_(2)), trains=False)
small('index_add', 'b 6 | a: no rule for index_add; b: no rule for index_add', lambda a,b,m: a.index_add(1, torch.tensor([0,2]), b[:, :2]))
small('index_copy', 'b 6 | a: no rule for index_copy; b: no rule for index_copy', lambda a,b,m: a.index_copy(1, torch.tensor([0,2]), b[:, :2]))

# ---- masks and buffers

small('masked_fill', 'a 8', lambda a,b,m: a.masked_fill(b>0, 0.))
small('where', 'a 8', lambda a,b,m: torch.where(a>b, a, .5))
small('where_both', 'a 8', lambda a,b,m: torch.where(condition=a>b, input=a, other=b.sigmoid()))
small('mask_times', 'a 8', lambda a,b,m: a*(a>0)+b*(b<.5))
def buffered(v):
    m = nn.Module()
    m.register_buffer('v', v)
    return m
small('buffer_scale', 'a 8', lambda a,b,m: a*m.m.v.view(1,-1,1,1)+b, lambda: dict(m=buffered(rand(8))))
small('buffer_shift', 'a 8', lambda a,b,m: a+m.m.v[None,:,None,None]+b, lambda: dict(m=buffered(rand(8))))
small('tensor_attribute', ' | a: of that length; b: of that length', lambda a,b,m: a*m.v[None,:,None,None]+b, lambda: dict(v=rand(8)))
small('frozen_parameter', 'a 8', lambda a,b,m: a*m.v+b, lambda: dict(v=nn.Parameter(torch.ones(1,8,1,1), requires_grad=False)))
for name,v in dict(scalar=torch.tensor(1.5), one=torch.tensor([1.5]), one_4d=torch.full((1,1,1,1), 1.5)).items(): small(f'learned_{name}', '', lambda a,b,m: a*m.s+b, lambda v=v: dict(s=nn.Parameter(v.clone())))
expect('learned_', '''
scalar one one_4d: a 8''')
small('clamp_by_channel', 'a 8', lambda a,b,m: a.clamp(m.s)+b, lambda: dict(s=nn.Parameter(torch.full((1,8,1,1), -.1))))

# ---- by place

for name,f in dict(index_select=lambda a: a.index_select(1, torch.tensor([3,1,2])), index_list=lambda a: a[:, [3,1,2]], topk=lambda a: a.topk(3, 1)[0], negative_slice=lambda a: a[:, -3:], cross=lambda a: torch.cross(a[:, :3], a[:, 1:4], dim=1)).items():
    small(f'place_{name}', '', lambda a,b,m,f=f: f(a), lambda: dict(c=conv(3, 4)))
for name,f in dict(reverse=lambda a: a[:, torch.arange(7, -1, -1)], flip=lambda a: a.flip(1), roll=lambda a: a.roll(1, 1), roll_spatial=lambda a: a.roll((1,2), (2,3)), cumsum=lambda a: a.cumsum(1), cumsum_spatial=lambda a: a.cumsum(2), sort=lambda a: a.sort(1)[0],
                   topk_spatial=lambda a: a.topk(4, 2)[0].repeat(1,1,2,1), long_slice=lambda a: a[:, :100], gather=lambda a: a.gather(1, torch.zeros(a.shape[0],1,8,8,dtype=torch.long)), first=lambda a: a[:, :1], last=lambda a: a[:, -1:], first_int=lambda a: a[:, 0, None],
                   narrow=lambda a: a.narrow(dim=1, start=0, length=1), select=lambda a: a.select(dim=1, index=0)[:, None], unbind=lambda a: torch.cat(a.unbind(1)[::2]).mean(), diagonal=lambda a: torch.diagonal(a, dim1=2, dim2=3)[..., None],
                   diagonal_channels=lambda a: torch.diagonal(a, 0, 1, 2).unsqueeze(1), item=lambda a: a[0,0,0,0].item(), iterate=lambda a: torch.stack([r.relu() for r in a.transpose(0,1)], 1)).items():
    small(f'place_{name}', '', lambda a,b,m,f=f: f(a)*b)
expect('place_', '''
index_select: b 8 | a: index_select goes by the place of channels
index_list first_int narrow select item: b 8 | a: picked by number
topk: b 8 | a: topk goes by the place of channels
negative_slice: a 5, b 8 | a: number 3
cross: a 4, b 8 | a: no rule for cross
reverse:  | a: picked by number; b: picked by number
flip roll_spatial cumsum_spatial topk_spatial long_slice: a 8
roll:  | a: roll goes by the place of channels; b: roll goes by the place of channels
cumsum:  | a: cumsum goes by the place of channels; b: of that length
sort:  | a: sort goes by the place of channels; b: of that length
gather: b 8 | a: gather goes by the place of channels
first last: a 7, b 8 | a: number 1
unbind: b 8 | a: it is taken apart into single pieces
diagonal:  | a: no rule for diagonal; b: of that length
diagonal_channels: b 8 | a: no rule for diagonal
iterate:  | a: it is taken apart into single pieces; b: of that length''')
small('repeat', 'a 8, b 8', lambda a,b,m: a.repeat(1,2,1,1), two)
small('repeat_interleave', 'a 8, b 8', lambda a,b,m: a.repeat_interleave(repeats=2, dim=1), two)
small('repeat_by_tensor', 'b 8 | a: channels are repeated by number', lambda a,b,m: a.repeat_interleave(torch.tensor([1,2]*4), 1), lambda: dict(c=conv(12, 4)))
small('every_second', ' | a: channels are picked in steps; b: channels are picked in steps', lambda a,b,m: a[:, ::2]+b[:, 1::2], lambda: dict(c=conv(4, 4)))
small('middle', 'a 4, b 8 | a: number 2', lambda a,b,m: a[:, 2:-2], lambda: dict(c=conv(4, 4)))
small('squeeze', 'a 8', lambda a,b,m: a.squeeze()+b.squeeze(), kept='compares len(8) with 1')

# ---- arguments by keyword

for name,f in dict(add=lambda a,b: torch.add(input=a, other=b), maximum=lambda a,b: torch.maximum(input=a, other=b), matmul=lambda a,b: torch.matmul(input=a, other=b), permute=lambda a,b: a.permute(dims=(0,2,3,1)).transpose(dim0=1, dim1=3).transpose(2,3)+torch.permute(input=b, dims=(0,1,3,2)),
                   reshape=lambda a,b: torch.reshape(input=a, shape=(a.shape[0], -1, 64)).view(size=(a.shape[0], -1, 8, 8))+b, flatten=lambda a,b: torch.flatten(input=a, start_dim=2).unflatten(dim=2, sizes=(8,8))+b, squeeze=lambda a,b: torch.squeeze(input=a.unsqueeze(dim=1), dim=1)+b,
                   expand=lambda a,b: a.expand(size=(-1,-1,8,8))+b.expand_as(other=a), broadcast=lambda a,b: torch.broadcast_to(b.mean((2,3), keepdim=True), size=a.shape)*a, stack=lambda a,b: torch.stack(tensors=(a, b), dim=1).sum(dim=1), pool=lambda a,b: F.max_pool2d(input=a, kernel_size=2)+F.avg_pool2d(b, 2),
                   lerp=lambda a,b: torch.lerp(a, b, weight=a.sigmoid()), addcmul=lambda a,b: torch.addcmul(input=a, tensor1=b, tensor2=a), layer_norm=lambda a,b: F.layer_norm(input=a, normalized_shape=a.shape[2:])+b).items():
    small(f'kw_{name}', '', lambda a,b,m,f=f: f(a, b))
expect('kw_', '''
add maximum matmul permute reshape flatten squeeze expand broadcast stack pool lerp addcmul layer_norm: a 8''')
small('kw_cat', 'a 8, b 8', lambda a,b,m: torch.cat(tensors=[a, b], dim=1), two)
small('kw_cat_axis', 'a 8, b 8', lambda a,b,m: torch.cat((a, b), axis=1), two)
small('kw_split', ' | a: number 4; b: number 4', lambda a,b,m: torch.split(a, split_size_or_sections=4, dim=1)[0]+torch.split(tensor=b, split_size_or_sections=4, dim=1)[1], lambda: dict(c=conv(4,4)))
small('kw_chunk', 'a 4', lambda a,b,m: a.chunk(chunks=2, dim=1)[0]*torch.chunk(input=b, chunks=2, dim=1)[1], lambda: dict(c=conv(4,4)))
small('kw_conv', 'a 4, d 4', lambda a,b,m: F.conv2d(input=a, weight=m.d.weight, bias=m.d.bias, groups=2)+torch.conv2d(b, m.d.weight, m.d.bias, 1, 0, 1, 2), lambda: dict(d=conv(8, 8, groups=2)))
small('kw_linear', 'a 8, b 8', lambda a,b,m: F.linear(input=a.permute(0,2,3,1), weight=m.d.weight, bias=m.d.bias).permute(0,3,1,2)+b, lambda: dict(d=nn.Linear(8, 8)))
small('kw_batch_norm', 'a 8', lambda a,b,m: F.batch_norm(input=a, running_mean=m.d.running_mean, running_var=m.d.running_var, weight=m.d.weight, bias=m.d.bias)+torch.batch_norm(b, None, None, m.d.running_mean, m.d.running_var, False, .1, 1e-5, False), lambda: dict(d=nn.BatchNorm2d(8)), trains=False)
small('kw_pixel_shuffle', 'a 2, b 2', lambda a,b,m: F.pixel_shuffle(input=torch.cat([a,b],1), upscale_factor=2), lambda: dict(c=conv(4,4)))
small('kw_pixel_unshuffle', 'a 8, b 8', lambda a,b,m: F.pixel_unshuffle(a, downscale_factor=2), lambda: dict(c=conv(32,4)))
small('kw_prelu', 'a 8', lambda a,b,m: F.prelu(input=a, weight=m.d)+b, lambda: dict(d=param(8)))

# ---- operations that torch functions don't show, or nothing is known of

class Twice(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x): return x*2
    @staticmethod
    def backward(ctx, g): return g*2
class Flip(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x): return torch.from_numpy(np.flip(x.detach().numpy(), 1).copy())
    @staticmethod
    def backward(ctx, g): return g.flip(1)
@torch.jit.script
def scripted(x): return x*torch.sigmoid(x)
class AsClass(torch.Tensor): pass
for name,f in dict(function=lambda a,m: Twice.apply(a), function_numpy=lambda a,m: Flip.apply(a), fft=lambda a,m: torch.fft.fft2(a).real, qr=lambda a,m: torch.linalg.qr(a)[1], script=lambda a,m: scripted(a), vmap=lambda a,m: torch.func.vmap(torch.relu)(a),
                   tolist=lambda a,m: torch.tensor(a.tolist(), dtype=a.dtype), grid_sample=lambda a,m: F.grid_sample(a, torch.zeros(a.shape[0],8,8,2,dtype=a.dtype), align_corners=False), as_subclass=lambda a,m: a.as_subclass(AsClass),
                   tensor=lambda a,m: torch.Tensor(a) if a.dtype==torch.float32 else a.relu()).items():
    small(f'op_{name}', '', lambda a,b,m,f=f: f(a, m)+b, trains=name not in ('tolist',))
expect('op_', '''
function as_subclass tensor: a 8
function_numpy:  | a: no rule for numpy; b: of that length
fft:  | a: no rule for fft_fft2; b: of that length
qr:  | a: no rule for linalg_qr; b: of that length
script:  | a: not Python; b: of that length
vmap: | a: x
tolist: a 8 | b: of that length
grid_sample:  | a: no rule for grid_sampler; b: of that length''')
also('op_tolist', finds='c 4 | a: tolist; b: of that length')
also('op_vmap', finds='c 4 | a: vmap; b: of that length')
small('vmap_module', 'b 8 | a: vmap', lambda a,b,m: torch.func.vmap(m.d)(a.unsqueeze(1))[:,0], lambda: dict(d=conv(8, 8)), kept='masked model fails|its forward fails', inexact='masked model fails|its forward fails')
small('grid_by_channels', 'b 6 | a: no rule for grid_sampler; b: no rule for grid_sampler', lambda a,b,m: F.grid_sample(a, b.movedim(1,-1)[..., :2].tanh(), align_corners=False))
small('checkpoint', 'a 8, b 8', lambda a,b,m: checkpoint(m.d, a, use_reentrant=False)+b, lambda: dict(d=conv(8, 8)))
small('checkpoint_reentrant', 'a 8, b 8', lambda a,b,m: checkpoint(m.d, a, use_reentrant=True)+b, lambda: dict(d=conv(8, 8)))
small('script_module', ' | a: not Python; b: of that length', lambda a,b,m: m.t(a)+b, lambda: dict(t=torch.jit.script(nn.Sequential(conv(8, 8), nn.ReLU()))))
small('bilinear', ' | a: no rule for bilinear; b: no rule for bilinear', lambda a,b,m: m.d(a.mean((2,3)), b.mean((2,3)))[:,:,None,None], lambda: dict(d=nn.Bilinear(8, 8, 8)))
small('division', 'a 8', lambda a,b,m: a/(b.abs()+1e-3))
small('zero_division', 'a 8', lambda a,b,m: a/b, exact=False, kept="isn't constant")
small('noise', 'a 8', lambda a,b,m: a+.1*torch.randn_like(a)+b, exact=False, kept="isn't constant")
small('dropout_always', 'a 8', lambda a,b,m: F.dropout(a, .5, training=True)+b, exact=False, kept='differs')
small('random_scale', 'a 8', lambda a,b,m: a*torch.rand(1)+b, exact=False)
small('kernel_attribute', ' | a: of that length; b: of that length', lambda a,b,m: F.conv2d(a, m.v, groups=8, padding=1)+b, lambda: dict(v=rand(8,1,3,3)), exact=False)
small('kernel_made', ' | a: of that length; b: of that length', lambda a,b,m: F.conv2d(a, torch.ones(8,1,3,3), groups=8, padding=1)+b, exact=False)

# ---- recurrent nets, text

class Rnn(nn.Module):
    def __init__(self, cls, **kw): super().__init__(); self.a,self.r,self.h = nn.Conv1d(4, 8, 3, padding=1),cls(8, 6, batch_first=True, **kw),nn.Linear(12 if kw else 6, 3)
    def forward(self, x): return self.h(self.r(self.a(x).relu().transpose(1,2))[0][:, -1])
net('lstm', ' | a: no rule for lstm', lambda: Rnn(nn.LSTM), batch(2, 4, 10))
net('gru', ' | a: no rule for gru', lambda: Rnn(nn.GRU, bidirectional=True), batch(2, 4, 10))
net('rnn', ' | a: no rule for rnn_tanh', lambda: Rnn(nn.RNN), batch(2, 4, 10))
class Cell(nn.Module):
    def __init__(self): super().__init__(); self.a,self.r,self.h = nn.Linear(4, 8),nn.LSTMCell(8, 6),nn.Linear(6, 3)
    def forward(self, x):
        s = None
        for t in range(x.shape[1]): s = self.r(self.a(x[:, t]), s)
        return self.h(s[0])
net('lstm_cell', ' | a: no rule for lstm_cell', Cell, batch(2, 5, 4))
class ZeroState(nn.Module):
    def __init__(self): super().__init__(); self.a,self.r,self.o,self.h = nn.Linear(4, 8),nn.LSTM(8, 6, batch_first=True),nn.Linear(6, 9),nn.Linear(9, 2)
    def forward(self, x):
        h = torch.zeros(1, x.shape[0], 6)
        return self.h(self.o(self.r(self.a(x), (h, h))[0][:, -1]).relu())
net('lstm_zero_state', 'o 9 | a: no rule for lstm', ZeroState, batch(2, 5, 4), exact=False)
words = lambda: torch.randint(0, 20, (2, 7), generator=torch.Generator().manual_seed(0))
class Text(nn.Module):
    def __init__(self, tied=False):
        super().__init__()
        self.e,self.f1,self.f2,self.o = nn.Embedding(20, 8),nn.Linear(8, 12),nn.Linear(12, 8),nn.Linear(8, 20, bias=False)
        if tied: self.o.weight = self.e.weight
    def forward(self, x):
        y = self.e(x)
        return self.o(y+self.f2(self.f1(y).relu()))
net('text', 'e 8, f1 12', Text, words)
net('text_tied', 'e 8, f1 12', lambda: Text(True), words)
net('text_linear', 'e 8, l 6', lambda: Net(lambda m,x: m.h(m.l(m.e(x).mean(1)).relu()), e=nn.Embedding(20, 8, padding_idx=0), l=nn.Linear(8, 6), h=nn.Linear(6, 3)), words)
net('text_bag', '1 6', lambda: nn.Sequential(nn.EmbeddingBag(20, 8), nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 3)), words)
net('mlp', '0 12, 4 10', lambda: nn.Sequential(nn.Linear(6, 12), nn.BatchNorm1d(12), nn.ReLU(), nn.Dropout(.5), nn.Linear(12, 10), nn.GELU(), nn.Linear(10, 3)), flat)

# ---- what goes in and what comes out

class Two(nn.Module):
    def __init__(self): super().__init__(); self.a,self.b,self.f,self.h = conv(3, 8, 3),nn.Linear(6, 5),nn.Linear(13, 10),nn.Linear(10, 3)
    def forward(self, x, y): return self.h(self.f(torch.cat([self.a(x).relu().mean((2,3)), self.b(y).relu()], 1)).relu())
net('two_inputs', 'a 8, b 5, f 10', Two, lambda: (rand(2,3,8,8), rand(2,6)))
net('two_inputs_list', 'a 8, b 5, f 10', Two, lambda: [rand(2,3,8,8), rand(2,6)])
net('two_inputs_dict', 'a 8, b 5, f 10', Two, lambda: dict(y=rand(2,6), x=rand(2,3,8,8)))
class Film(nn.Module):
    def __init__(self): super().__init__(); self.a,self.s,self.c = cbr(3, 8),nn.Linear(6, 16),conv(8, 3)
    def forward(self, x, y):
        g,b = self.s(y)[..., None, None].chunk(2, 1)
        return self.c(self.a(x)*(1+g)+b)
net('film', 'a.0 8', Film, lambda: (rand(2,3,8,8), rand(2,6)))
class Masked(nn.Module):
    "The second input isn't a batch"
    def __init__(self): super().__init__(); self.i,self.q,self.o = nn.Linear(6, 8),nn.Linear(8, 24),nn.Linear(8, 3)
    def forward(self, x, mask):
        q,k,v = self.q(self.i(x)).chunk(3, -1)
        return self.o((q@k.transpose(1,2)).masked_fill(mask, -1e9).softmax(-1)@v)
net('mask_as_input', 'i 8, q 8', Masked, lambda: (rand(2,5,6), torch.ones(5,5).triu(1).bool()))
net('seq_first', 'i 8, l 9', lambda: Net(lambda m,x: m.o(m.l(m.i(x)+m.pos).relu()), i=nn.Linear(6, 8), pos=param(5,1,8), l=nn.Linear(8, 9), o=nn.Linear(9, 3)), batch(5, 4, 6))
net('batch_of_4_only', 'a 8', lambda: Net(lambda m,x: m.c(m.a(x).view(4, -1, 8, 8).relu()), a=conv(3, 8), c=conv(8, 3)), batch(4, 3, 8, 8))
def one_only(m, x):
    if x.shape[0]!=1: raise ValueError('one at a time')
    return m.c(m.a(x).relu())
net('batch_of_1_only', 'a 8', lambda: Net(one_only, a=conv(3, 8), c=conv(8, 3)), batch(1, 3, 8, 8))
net('batch_of_1', '0.0 8', lambda: nn.Sequential(cbr(3, 8), conv(8, 3)), batch(1, 3, 8, 8), trains=False)
net('unbatched', '0 8', lambda: nn.Sequential(conv(3, 8), nn.ReLU(), conv(8, 3)), batch(3, 8, 8))
net('dict_in', 'a 8', lambda: Net(lambda m,x: m.c(m.a(x['image']).relu()*x['mask']), a=conv(3, 8), c=conv(8, 3)), lambda: ({'image': rand(2,3,8,8), 'mask': rand(2,1,8,8)},))
class KwIn(nn.Module):
    def __init__(self): super().__init__(); self.a,self.c = conv(3, 8),conv(8, 3)
    def forward(self, *, image, mask=None): return self.c(self.a(image).relu()*mask)
net('keywords_in', 'a 8', KwIn, lambda: {'image': rand(2,3,8,8), 'mask': rand(2,1,8,8)})
Pair = namedtuple('Pair', 'p q')
@dataclass
class Out: p:object; q:object
class MyDict(OrderedDict): pass
class MyList(list): pass
class Obj:
    def __init__(self, p, q): self.p,self.q = p,q
class Outs(nn.Module):
    def __init__(self, f): super().__init__(); self.a,self.h1,self.h2,self.f = cbr(3, 8),conv(8, 4),conv(8, 5),f
    def forward(self, x):
        x = self.a(x)
        return self.f(x, self.h1(x), self.h2(x).mean((2,3)))
for name,f in dict(dict=lambda x,p,q: {'p': p, 'q': {'r': q}, 'none': None}, ordered=lambda x,p,q: OrderedDict(p=p, q=q), tuple=lambda x,p,q: (p, None, q), named=lambda x,p,q: Pair(p, q), dataclass=lambda x,p,q: Out(p, q), dict_subclass=lambda x,p,q: MyDict(p=p, q=q),
                   object=lambda x,p,q: Obj(p, q), list_subclass=lambda x,p,q: MyList([p, q]), features=lambda x,p,q: [x, p, q], nested=lambda x,p,q: [Out(p, [Obj(q, 3)])], subclass=lambda x,p,q: (p.as_subclass(AsClass), q)).items(): net(f'out_{name}', '', lambda f=f: Outs(f))
expect('out_', '''
dict ordered tuple named dataclass dict_subclass object list_subclass nested subclass: a.0 8
features: ''')
net('no_parameters', '', lambda: nn.Sequential(nn.ReLU()), trains=False)
net('one_layer', '', lambda: nn.Linear(6, 2), flat)
net('unused_layer', 'a 8', lambda: Net(lambda m,x: m.c(m.a(x).relu()), a=conv(3, 8), unused=nn.Linear(3, 3), c=conv(8, 3)))
