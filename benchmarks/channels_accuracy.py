"""Accuracy on digits with half the channels removed and a short fine-tune, against dense training, fasterai and Torch-Pruning.

For each seed one resnet18 is trained densely. From that checkpoint every arm trains for the same short budget on the same batches, with the same
one-cycle: dense, ours (one shot, and along Zhu & Gupta's ramp), fasterai's PruneCallback (one shot and its gradual schedule), Torch-Pruning's
MagnitudePruner before the fit. All by L2 norm, half the channels of each group, no rounding, so that the networks have the same widths.

    pip install fasterai==0.4.1 torch-pruning
    python benchmarks/channels_accuracy.py --out benchmarks/results/channels_accuracy.md
"""
import argparse, contextlib, copy, io, statistics, sys, warnings
from pathlib import Path
warnings.filterwarnings('ignore')
import torch
from torch import nn
from fastai.callback.core import Callback
from fastai.callback.schedule import fit_one_cycle
from fastcompress.callback.channels import ChannelPruneCallback
from fastcompress.data import digits
from fastcompress.measure.count import count_macs
from sparsify_accuracy import learner

def fasterai(schedule):
    from fasterai.core import criteria as crit, schedule as sched
    from fasterai.prune.prune_callback import PruneCallback
    class Quiet(PruneCallback):
        name = 'fasterai'
        def __call__(self, event):
            with contextlib.redirect_stdout(io.StringIO()): return super().__call__(event)
    return lambda learn: Quiet(.5, getattr(sched, schedule), 'local', crit.large_final)

def torch_pruning(learn):
    import torch_pruning as tp
    x = learn.dls.one_batch()[0].as_subclass(torch.Tensor)[:1]
    keep = [m for m in learn.model.modules() if isinstance(m, nn.Linear)]
    tp.pruner.MagnitudePruner(learn.model, x, importance=tp.importance.MagnitudeImportance(p=2), pruning_ratio=.5, ignored_layers=keep).step()

def ours(schedule, **kw): return lambda learn: ChannelPruneCallback(.5, schedule, scope='local', round_to=1, min_channels=1, **kw)

ARMS = {'dense': lambda learn: None, 'ours, one shot': ours('one_shot'), 'ours, gradual': ours('zhu_gupta'), 'fasterai, one shot': fasterai('one_shot'),
        'fasterai, gradual': fasterai('agp'), 'Torch-Pruning, one shot': torch_pruning}

def arm(dls, a, seed, state, make, x):
    learn = learner(dls, a.arch, seed, state)
    macs = count_macs(learn.model, x)
    try:
        learn.fit_one_cycle(a.budget, a.lr, cbs=make(learn))
        return 100*float(learn.recorder.values[-1][2]), count_macs(learn.model, x)/macs, None
    except Exception as e: return float('nan'), float('nan'), f'{type(e).__name__}: {e}'[:120]

def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--arch', default='resnet18'); p.add_argument('--seeds', type=int, default=3); p.add_argument('--epochs', type=int, default=6)
    p.add_argument('--budget', type=int, default=4); p.add_argument('--lr', type=float, default=1e-3); p.add_argument('--n', type=int); p.add_argument('--arms', default=';'.join(ARMS)); p.add_argument('--out')
    a = p.parse_args()
    dls = digits(n=a.n)
    x,got = dls.one_batch()[0].as_subclass(torch.Tensor)[:1],{}
    for seed in range(a.seeds):
        learn = learner(dls, a.arch, seed); learn.fit_one_cycle(a.epochs, 3e-3)
        state = copy.deepcopy(learn.model.state_dict())
        for name in a.arms.split(';'): got.setdefault(name, []).append(arm(dls, a, seed, state, ARMS[name], x))
        print(f'seed {seed}', {k: v[-1] for k,v in got.items()}, file=sys.stderr, flush=True)
    n = len(dls.valid_ds)
    lines = [f'{a.arch}, digits at 32 px, {n} validation images (one image is {100/n:.2f} points), {a.seeds} seeds; {a.epochs} dense epochs before, {a.budget} epochs in each arm.\n',
             '| arm | MACs kept | accuracy %: mean | each seed | less dense, points: mean |', '|---|---|---|---|---|']
    for name,v in got.items():
        acc,macs,why = zip(*v)
        if any(why): lines.append(f"| {name} | – | – | {next(filter(None, why))} | – |"); continue
        less = statistics.mean(x-d for x,(d,*_) in zip(acc, got['dense'])) if 'dense' in got else float('nan')
        lines.append(f"| {name} | {statistics.mean(macs):.3f} | {statistics.mean(acc):.2f} | {', '.join(f'{x:.2f}' for x in acc)} | {less:+.2f} |")
    print('\n'.join(lines))
    if a.out: Path(a.out).write_text('# Accuracy with half the channels\n\n    ' + ' '.join(['python benchmarks/channels_accuracy.py', *sys.argv[1:]]) + '\n\n' + '\n'.join(lines) + '\n')

if __name__=='__main__': main()
