"""Time kept over MACs kept after half the channels are gone, batch 16, one thread.

Half of each group's channels, widths rounded to multiples of 8 (the default) and not rounded, in three forms: as PyTorch runs the model
(eager), the same in channels_last, and frozen (traced, BatchNorm folded, activations fused: torch.jit.optimize_for_inference), which is
nearest to how a model is deployed. The original and the smaller model, in the same form, run in turns with all others, so that what else
happens on the machine meets all alike. Random weights: only shapes matter for time.

    OMP_NUM_THREADS=1 python benchmarks/channels_speed.py --out benchmarks/results/channels_speed.md
"""
import argparse, copy, statistics, sys, warnings
from pathlib import Path
warnings.filterwarnings('ignore')
import timm, torch
from torch import nn
from fastcompress.measure.count import count_macs, n_params
from fastcompress.measure.latency import time_interleaved
from fastcompress.prune.channels import find_groups
from fastcompress.prune.remove import remove
from fastcompress.prune.select import select

AIMS = dict(resnet18=1.15, resnet50=1.15, mobilenetv2_100=1.15, vgg11_bn=1.2)

class ChannelsLast(nn.Module):
    def __init__(self, m): super().__init__(); self.m = copy.deepcopy(m).to(memory_format=torch.channels_last)
    def forward(self, x): return self.m(x.contiguous(memory_format=torch.channels_last))

def frozen(m, x):
    with torch.no_grad(): run = torch.jit.optimize_for_inference(torch.jit.freeze(torch.jit.trace(copy.deepcopy(m), x)))
    return lambda x: run(x)

FORMS = {'eager': lambda m,x: m, 'channels_last': lambda m,x: ChannelsLast(m), 'frozen': frozen}

def rows(name, bs, rounds, repeats):
    torch.manual_seed(0)
    model,x = timm.create_model(name).eval(),torch.randn(bs, 3, 224, 224)
    groups = find_groups(model, x[:1])
    arms = {'dense': model, 'rounded to 8': remove(model, select(groups, 'l2', .5, scope='local')), 'not rounded': remove(model, select(groups, 'l2', .5, scope='local', round_to=1, min_channels=1))}
    models = {f'{form}, {arm}': make(m, x) for form,make in FORMS.items() for arm,m in arms.items()}
    times = [time_interleaved(models, x, n=rounds, warmup=2) for _ in range(repeats)]
    for form in FORMS:
        for arm in list(arms)[1:]:
            kept = [t[f'{form}, {arm}'].median/t[f'{form}, dense'].median for t in times]
            yield dict(name=name, form=form, arm=arm, macs=count_macs(arms[arm], x)/count_macs(model, x), params=n_params(arms[arm])/n_params(model), kept=statistics.median(kept), lo=min(kept), hi=max(kept),
                       dense=statistics.median(t[f'{form}, dense'].median/t['eager, dense'].median for t in times))

def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--models', default=','.join(AIMS)); p.add_argument('--bs', type=int, default=16)
    p.add_argument('--rounds', type=int, default=5); p.add_argument('--repeats', type=int, default=3); p.add_argument('--out')
    a = p.parse_args()
    torch.set_num_threads(1)
    lines = [f'Batch {a.bs}, 224 px, one thread; medians of {a.rounds} rounds in turns, {a.repeats} times (lowest and highest in brackets). Time kept: of the original in the same form; the last column is the time of the original in that form over its eager time.\n',
             '| model | form | widths | MACs kept | parameters kept | time kept | time kept / MACs kept | aim | original over eager |', '|'+'---|'*9]
    for name in a.models.split(','):
        for r in rows(name, a.bs, a.rounds, a.repeats):
            lines.append(f"| {r['name']} | {r['form']} | {r['arm']} | {r['macs']:.3f} | {r['params']:.3f} | {r['kept']:.3f} ({r['lo']:.3f} to {r['hi']:.3f}) | {r['kept']/r['macs']:.2f} | {AIMS.get(name, '')} | {r['dense']:.2f} |")
            print(lines[-1], file=sys.stderr, flush=True)
    print('\n'.join(lines))
    if a.out: Path(a.out).write_text('# Time after channel removal\n\n    OMP_NUM_THREADS=1 ' + ' '.join(['python benchmarks/channels_speed.py', *sys.argv[1:]]) + '\n\n' + '\n'.join(lines) + '\n')

if __name__=='__main__': main()
