"""torch's integer kernels against the float detour around them: dequantize, compute, quantize.

What `deploy.engines` decides by: a kernel whose ratio is about 1 or more is no reason to round once more. 96×56×56 numbers, channels last, one thread, in turns.

    OMP_NUM_THREADS=1 python benchmarks/kernels.py --out benchmarks/results/kernels.md
"""
import argparse, sys, warnings
from pathlib import Path
warnings.filterwarnings('ignore')
import torch, torch.nn.functional as F
from fastcompress.cli import cpu_flags, environment
from fastcompress.deploy.engines import has_kernel, use_engine
from fastcompress.measure.latency import ratio, time_interleaved

q,last = torch.ops.quantized,torch.channels_last
def bytes_of(x, scale=.03, zero=128): return torch.quantize_per_tensor(x, scale, zero, torch.quint8)
def back(y, scale=.03, zero=10): return torch.quantize_per_tensor(y, scale, zero, torch.quint8)

def pairs():
    "name -> (ways by kernels, way by float)"
    x = torch.randn(1, 96, 56, 56).to(memory_format=last)
    a,b,g = bytes_of(x),bytes_of(x.flip(1).contiguous(memory_format=last)),bytes_of(torch.rand(1, 96, 1, 1), 1/256, 0)
    t,w,z = a.permute(0, 2, 3, 1),torch.ones(96),torch.zeros(96)
    k,v = bytes_of(torch.randn(3, 197, 64)),bytes_of(torch.randn(3, 64, 197))
    table = torch.randint(0, 256, (256,), dtype=torch.uint8)
    f = lambda o: o.dequantize()
    return {
        'add': ({'kernel': lambda: q.add(a, b, .05, 128)}, lambda: back(f(a)+f(b))),
        'mul': ({'kernel': lambda: q.mul(a, b, .05, 128)}, lambda: back(f(a)*f(b))),
        'mul by a gate [N, C, 1, 1]': ({'kernel': lambda: q.mul(a, g, .03, 10), 'kernel, gate expanded': lambda: q.mul(a, g.expand_as(a).contiguous(memory_format=last), .03, 10)}, lambda: back(f(a)*f(g))),
        'cat': ({'kernel': lambda: q.cat([a, b], 1, .05, 128)}, lambda: back(torch.cat([f(a), f(b)], 1))),
        'batch norm': ({'kernel': lambda: q.batch_norm2d(a, w, z, z, w, 1e-5, .05, 128)}, lambda: back(torch.addcmul(z.view(1, -1, 1, 1), f(a), w.view(1, -1, 1, 1)))),
        'hardswish': ({'kernel': lambda: q.hardswish(a, .03, 10)}, lambda: back(F.hardswish(f(a)))),
        'sigmoid': ({'kernel': lambda: torch.sigmoid(a)}, lambda: back(torch.sigmoid(f(a)), 1/256, 0)),
        'silu': ({'sigmoid, mul': lambda: q.mul(a, torch.sigmoid(a), .03, 10), 'table of 256': lambda: torch._make_per_tensor_quantized_tensor(torch.take(table, a.int_repr().long()), .03, 10)}, lambda: back(F.silu(f(a)))),
        'gelu': ({'kernel': lambda: F.gelu(a)}, lambda: back(F.gelu(f(a)))),
        'layer norm': ({'kernel': lambda: q.layer_norm(t, [96], w, z, 1e-5, .03, 128)}, lambda: back(F.layer_norm(f(t), [96], w, z), .03, 128)),
        'softmax': ({'kernel': lambda: q.softmax(t, -1, 1/256, 0)}, lambda: back(f(t).softmax(-1), 1/256, 0)),
        'mean over positions': ({'kernel': lambda: a.mean((2,3))}, lambda: back(f(a).mean((2,3)))),
        'matmul [3, 197, 64]': ({'kernel': lambda: q.matmul(k, v, .03, 128)}, lambda: back(f(k)@f(v))),
    }

GROUPS = [(8,1,1,3), (12,1,1,3), (20,1,1,3), (24,1,1,3), (40,1,1,5), (100,1,1,5), (40,1,1,7), (64,1,1,9), (64,1,1,(1,11)), (64,1,1,3,2), (32,1,2,3), (12,1,2,3), (32,1,3,3), (8,2,2,3), (8,3,3,3), (8,4,4,3), (8,6,6,3), (8,8,8,3), (8,12,12,3), (8,16,16,3), (8,24,24,3), (8,32,32,3), (8,4,8,3), (4,15,15,1), (8,8,8,1)]

def grouped(g, i, o, k, dilation=1, n=28):
    "name, ways of each library, detour, of a convolution in `g` groups of `i` to `o` channels"
    k = (k, k) if isinstance(k, int) else k
    pad,w,b = [d//2*dilation for d in k],torch.randn(g*o, i, *k),torch.randn(g*o)
    qw = torch.quantize_per_channel(w, (w.abs().amax((1,2,3))/63).double(), torch.zeros(g*o, dtype=torch.long), 0, torch.qint8)
    x,ways = bytes_of(torch.randn(1, g*i, n, n)).contiguous(memory_format=last),{}
    for lib in 'fbgemm','onednn':
        with use_engine(lib): packed = q.conv2d_prepack(qw, b, [1,1], pad, [dilation]*2, g)
        ways[lib] = lambda _, p=packed: q.conv2d(x, p, .5, 128)
    name = f"{g} groups of {i} to {o} channels, {k[0]}×{k[1]}{', dilated' if dilation>1 else ''}"
    return name, {lib: has_kernel(lib, g, i, o, k, [dilation]*2) for lib in ways}, {**ways, 'detour':lambda _: back(F.conv2d(x.dequantize(), w, b, 1, pad, dilation, g), .5, 128)}

def groups(rounds):
    lines = ['', 'Convolutions in groups, 28×28, weights with room for pairs. Bold: taken to have no fast kernel there (`deploy.engines.has_kernel`), and left in float.', '', '| convolution | fbgemm | onednn | detour, µs |', '|---|---|---|---|']
    for case in GROUPS:
        name,fast,fs = grouped(*case)
        t = time_interleaved(fs, torch.zeros(1), n=rounds, warmup=3, threads=1)
        cell = lambda lib: (lambda r: f'{r:.2f}' if fast[lib] else f'**{r:.2f}**')(ratio(t[lib], t['detour']).median)
        lines.append(f"| {name} | {cell('fbgemm')} | {cell('onednn')} | {t['detour'].median*1000:.0f} |")
    return lines

def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--rounds', type=int, default=100); p.add_argument('--out')
    a = p.parse_args()
    env = environment()
    lines = ['# Integer kernels against the float detour', '', '    OMP_NUM_THREADS=1 ' + ' '.join(['python benchmarks/kernels.py', *sys.argv[1:]]), '', __doc__.split('\n\n')[1], '',
             f"{env['CPU']} ({', '.join(sorted(cpu_flags()))}), torch {env['torch']}. Time over that of the detour, median and quartiles of {a.rounds} rounds.", '', '| operation | by | qnnpack | x86 | detour, µs |', '|---|---|---|---|---|']
    cells = {}
    for engine in ('qnnpack','x86'):
        with use_engine(engine), torch.no_grad():
            for name,(ways,detour) in pairs().items():
                t = time_interleaved({'detour':(lambda d, f=detour: f()), **{k: (lambda d, f=f: f()) for k,f in ways.items()}}, torch.zeros(1), n=a.rounds, warmup=10, threads=1)
                for k in ways: cells.setdefault((name, k), []).append(f"{(r := ratio(t[k], t['detour'])).median:.2f} ({r.q1:.2f}–{r.q3:.2f})")
                cells.setdefault((name, 'us'), t['detour'].median*1000)
    lines += [f"| {n} | {k} | {' | '.join(v)} | {cells[n,'us']:.0f} |" for (n,k),v in cells.items() if k!='us']
    lines += groups(max(5, a.rounds//5))
    print('\n'.join(lines))
    if a.out: Path(a.out).write_text('\n'.join(lines)+'\n')

if __name__=='__main__': main()
