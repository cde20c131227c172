"""Accuracy after training to 80, 90 and 95% zeros on digits, against dense training and fasterai 0.4.1 under the same budget.

For each seed one model is trained densely (the demo's recipe). From that checkpoint every arm trains for as many epochs again, on the
same batches: dense, ours, fasterai's callback on the same Zhu & Gupta ramp from 0 to 0.75. A third of the budget shows where the methods
part. Sparsity is counted in the model, over all weights but the first convolution's and the
classifier's (fasterai prunes the first convolution too, and counts it).

    pip install fasterai==0.4.1
    python benchmarks/sparsify_accuracy.py --out benchmarks/results/sparsify_accuracy.md
"""
import argparse, copy, random, statistics, sys, time, warnings
from pathlib import Path
warnings.filterwarnings('ignore')
import timm, torch
from fastai.callback.schedule import fit_one_cycle
from fastai.learner import Learner
from fastai.metrics import accuracy
from fastai.torch_core import set_seed
from fastcompress.callback.sparsify import SparsifyCallback
from fastcompress.data import digits
from fastcompress.prune.mask import covered_layers, sparsity_of
from peers import fasterai_callback

SPARSITIES = .8, .9, .95
ARMS = {'ours, global': lambda s: SparsifyCallback(s), 'ours, local': lambda s: SparsifyCallback(s, scope='local'),
        'fasterai, global': lambda s: fasterai_callback(s, 'global'), 'fasterai, local': lambda s: fasterai_callback(s, 'local')}

def learner(dls, arch, seed, state=None):
    set_seed(seed); dls.train.rng = random.Random(seed)
    model = timm.create_model(arch, num_classes=10)
    if state is not None: model.load_state_dict(state)
    learn = Learner(dls, model, metrics=accuracy)
    learn.remove_cb(learn.progress); learn.logger = lambda o: None
    return learn

def arm(dls, a, seed, state, epochs, cb):
    learn = learner(dls, a.arch, seed, state)
    learn.fit_one_cycle(epochs, 1e-3, cbs=cb)
    return 100*float(learn.recorder.values[-1][2]), 100*sparsity_of(learn.model, covered_layers(learn.model))

def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--arch', default='resnet18'); p.add_argument('--seeds', type=int, default=3)
    p.add_argument('--epochs', type=int, default=6); p.add_argument('--budgets', default='6,2'); p.add_argument('--n', type=int)
    p.add_argument('--arms', default='ours, global;fasterai, global', help='of: ' + '; '.join(ARMS)); p.add_argument('--out')
    a = p.parse_args()
    dls,budgets = digits(n=a.n),[int(b) for b in a.budgets.split(',')]
    got,states = {},{}
    for seed in range(a.seeds):
        learn = learner(dls, a.arch, seed); learn.fit_one_cycle(a.epochs, 3e-3)
        states[seed] = copy.deepcopy(learn.model.state_dict())
        got.setdefault((0,'dense',0), []).append((100*float(learn.recorder.values[-1][2]), 0.))
        for b in budgets:
            got.setdefault((b,'dense',0), []).append(arm(dls, a, seed, states[seed], b, None))
            for s in SPARSITIES:
                for name in a.arms.split(';'): got.setdefault((b,name,s), []).append(arm(dls, a, seed, states[seed], b, ARMS[name](s)))
        print(f'seed {seed} done', file=sys.stderr, flush=True)
    n = len(dls.valid_ds)
    lines = [f'{a.arch}, digits at 32 px, {n} validation images (one image is {100/n:.2f} points), {a.seeds} seeds, {a.epochs} dense epochs before.\n',
             '| epochs | arm | asked % | zeros % | accuracy %: mean | each seed | less dense, points: mean |', '|---|---|---|---|---|---|---|']
    for (b,name,s),v in got.items():
        acc,zeros = zip(*v)
        less = statistics.mean(x-d for x,(d,_) in zip(acc, got[b,'dense',0]))
        lines.append(f"| {b} | {name} | {100*s:g} | {statistics.mean(zeros):.2f} | {statistics.mean(acc):.2f} | {', '.join(f'{x:.2f}' for x in acc)} | {less:+.2f} |")
    print('\n'.join(lines))
    if a.out:
        Path(a.out).parent.mkdir(parents=True, exist_ok=True)
        Path(a.out).write_text('# Accuracy at 80, 90 and 95% zeros\n\n    ' + ' '.join(['python benchmarks/sparsify_accuracy.py', *sys.argv[1:]]) + '\n\n' + '\n'.join(lines) + '\n')

if __name__=='__main__': main()
