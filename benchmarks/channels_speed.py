"""Time kept over MACs kept after half the channels are gone, batch 16, one thread.

Half of each group's channels, widths rounded to multiples of 8 (the default) and not rounded; the original and the smaller models run in
turns, so that what else happens on the machine meets all alike. Random weights: only shapes matter for time.

    python benchmarks/channels_speed.py --out benchmarks/results/channels_speed.md
"""
import argparse, statistics, sys, warnings
from pathlib import Path
warnings.filterwarnings('ignore')
import timm, torch
from fastcompress.measure.count import count_macs, n_params
from fastcompress.measure.latency import time_interleaved
from fastcompress.prune.channels import find_groups
from fastcompress.prune.remove import remove
from fastcompress.prune.select import select

AIMS = dict(resnet18=1.15, resnet50=1.15, mobilenetv2_100=1.15, vgg11_bn=1.2)

def row(name, bs, rounds, repeats):
    torch.manual_seed(0)
    model,x = timm.create_model(name).eval(),torch.randn(bs, 3, 224, 224)
    groups = find_groups(model, x[:1])
    arms = {'rounded to 8': remove(model, select(groups, 'l2', .5, scope='local')), 'not rounded': remove(model, select(groups, 'l2', .5, scope='local', round_to=1, min_channels=1))}
    times = [time_interleaved({'dense': model, **arms}, x, n=rounds, warmup=2) for _ in range(repeats)]
    for arm,m in arms.items():
        macs = count_macs(m, x)/count_macs(model, x)
        kept = [t[arm].median/t['dense'].median for t in times]
        yield dict(name=name, arm=arm, macs=macs, params=n_params(m)/n_params(model), kept=statistics.median(kept), lo=min(kept), hi=max(kept))

def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--models', default=','.join(AIMS)); p.add_argument('--bs', type=int, default=16)
    p.add_argument('--rounds', type=int, default=7); p.add_argument('--repeats', type=int, default=3); p.add_argument('--out')
    a = p.parse_args()
    lines = [f'Batch {a.bs}, 224 px, one thread; medians of {a.rounds} rounds in turns, {a.repeats} times (lowest and highest in brackets).\n',
             '| model | widths | MACs kept | parameters kept | time kept | time kept / MACs kept | aim |', '|---|---|---|---|---|---|---|']
    for name in a.models.split(','):
        for r in row(name, a.bs, a.rounds, a.repeats):
            lines.append(f"| {r['name']} | {r['arm']} | {r['macs']:.3f} | {r['params']:.3f} | {r['kept']:.3f} ({r['lo']:.3f} to {r['hi']:.3f}) | {r['kept']/r['macs']:.2f} | {AIMS.get(name, '')} |")
            print(lines[-1], file=sys.stderr, flush=True)
    print('\n'.join(lines))
    if a.out: Path(a.out).write_text('# Time after channel removal\n\n    ' + ' '.join(['python benchmarks/channels_speed.py', *sys.argv[1:]]) + '\n\n' + '\n'.join(lines) + '\n')

if __name__=='__main__': main()
