"""Do lottery tickets win? A timm model on digits: the dense network, tickets, and the same masks with fresh initial weights.

For every seed: train the dense network; then in each round prune, rewind, and train the ticket and its control. All
trainings run the same one-cycle fit; a ticket that was rewound to a later point has that many steps less of it. The
control's weights come from a newly made model. Two steps, so that the budget is not chosen by what it does to the tickets:

    python benchmarks/lottery.py --dense 2,4,8      accuracy of the dense network alone, for several budgets
    python benchmarks/lottery.py                    the comparison, written to benchmarks/results/lottery.{md,png}

Adequate training with room for a difference is the shortest budget from which twice as long brings less than one point.
A run that was killed goes on where it was if --path names a folder. With --swap the small part of digits (360 images)
trains and the large one (1,437) validates: lower accuracies, and four times as many images to measure them on.
"""
import argparse, platform, shlex, statistics, sys, time, warnings
warnings.filterwarnings('ignore')
from pathlib import Path
import timm, torch
from fastai.callback.schedule import fit_one_cycle
from fastai.data.core import DataLoaders
from fastai.learner import Learner
from fastai.metrics import accuracy
from fastai.torch_core import set_seed
from fastcompress.callback.lottery import evaluate, find_ticket
from fastcompress.data import digits
from fastcompress.study.lottery import lottery_table, plot_lottery

def rewind_of(s): return s if s.isalpha() else float(s) if '.' in s else int(s)

def parser():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--arch', default='resnet18', help='any timm model (resnet18)')
    p.add_argument('--sparsity', type=float, default=.8, help='part of the covered weights gone in the end (0.8)')
    p.add_argument('--rounds', type=int, default=5, help='rounds of pruning (5)')
    p.add_argument('--rewind', type=rewind_of, default=.5, help="'init', 'lr', a whole number of steps, or a decimal number of epochs (0.5)")
    p.add_argument('--seeds', type=int, default=3, help='searches (3)')
    p.add_argument('--epochs', type=int, default=4, help='epochs of every training (4)')
    p.add_argument('--lr', type=float, default=3e-3, help='highest learning rate of the one-cycle (3e-3)')
    p.add_argument('--n', type=int, default=None, help='how many images, train and valid together (all 1,797)')
    p.add_argument('--size', type=int, default=32, help='pixels (32)')
    p.add_argument('--bs', type=int, default=64, help='batch size (64)')
    p.add_argument('--swap', action='store_true', help='train on the fifth that otherwise validates')
    p.add_argument('--threads', type=int, default=0, help='torch threads (torch decides)')
    p.add_argument('--dense', default='', help='only train the dense network, for these numbers of epochs: 2,4,8')
    p.add_argument('--path', type=Path, default=None, help='folder for tickets; a killed run goes on from it')
    p.add_argument('--out', type=Path, default=Path(__file__).parent/'results'/'lottery', help='file name of the results, without ending')
    return p

def loaders(a):
    dls = digits(n=a.n, size=a.size, bs=a.bs)
    if not a.swap: return dls
    train = dls.valid.new(shuffle=True, drop_last=True, bs=min(a.bs, len(dls.valid_ds)))
    return DataLoaders(train, dls.train.new(shuffle=False, drop_last=False), device=dls.device)

def learner(a, seed):
    "The split of the data is the same for all seeds; weights and batches are not"
    set_seed(seed, reproducible=True)
    learn = Learner(loaders(a), timm.create_model(a.arch, num_classes=10), metrics=accuracy)
    learn.remove_cb(learn.progress); learn.logger = lambda o: None
    return learn

def dense(a):
    print(f'{"epochs":>6s} {"steps":>6s}  accuracy of the dense network, {a.seeds} seeds')
    for epochs in map(int, a.dense.split(',')):
        accs = []
        for seed in range(a.seeds):
            learn = learner(a, seed)
            learn.fit_one_cycle(epochs, a.lr)
            accs.append(evaluate(learn)['accuracy'])
        print(f'{epochs:6d} {epochs*len(learn.dls.train):6d}  {spread(accs)}  ({", ".join(f"{v:.3f}" for v in accs)})', flush=True)

def spread(vals): return f'{statistics.mean(vals):.4f}' + (f' ± {statistics.stdev(vals):.4f}' if len(vals)>1 else '')

def search(a, seed):
    learn,start = learner(a, seed),time.perf_counter()
    def fit(l):
        l.fit_one_cycle(a.epochs, a.lr)
        cb = l.lottery_ticket
        print(f'seed {seed}  round {cb.round}  {"fresh" if cb.control else "ticket" if cb.round else "dense"}  {l.recorder.values[-1][2]:.4f}  {time.perf_counter()-start:.0f} s', flush=True)
    return find_ticket(learn, fit, a.sparsity, a.rounds, a.rewind, new_model=lambda: timm.create_model(a.arch, num_classes=10), seed=seed,
                       path=None if a.path is None else a.path/f'seed{seed}'), learn

def differences(results, other):
    "Ticket minus `other` in the last round, one for each seed"
    def _last(r, arm): return list(r.values(arm).values())[-1]
    return [_last(r, 'ticket')-_last(r, other) for r in results]

def markdown(a, results, learn):
    table = lottery_table(results)
    cell = {(r['round'], r['arm']): f"{r['mean']:.4f}" + (f" ± {r['std']:.4f}" if r['n']>1 else '') for r in table}
    n_trn,n_val,steps = len(learn.dls.train_ds),len(learn.dls.valid_ds),a.epochs*len(learn.dls.train)
    lines = [f'# Lottery tickets: {a.arch} on digits', '',
        f'    python {shlex.join([Path(sys.argv[0]).as_posix(), *sys.argv[1:]])}', '',
        f'{a.seeds} seed{"s" if a.seeds>1 else ""} (weights and batches; the split is the same), {n_trn:,} images to train on and {n_val:,} to validate, {a.size}×{a.size} pixels, batches of {a.bs}. '
        f'Every training is `fit_one_cycle({a.epochs}, {a.lr:g})` with Adam: {steps} steps; {_where(a)}. '
        f'Accuracy on the validation images after the last epoch, mean ± standard deviation over seeds; no epoch was picked. '
        f'The share that remains is of the covered weights (all but the first convolution and the last layer).', '',
        '| weights that remain | ticket | same mask, fresh weights |', '|---:|---:|---:|', f"| 100% (dense) | {cell[0,'dense']} | |"]
    for r in range(1, a.rounds+1):
        left = next(t['remaining'] for t in table if t['round']==r)
        lines.append(f"| {left:.1%} | {cell[r,'ticket']} | {cell[r,'control']} |")
    lines += ['', f'In the last round, seed by seed: ticket minus dense {_signed(differences(results, "dense"))}; ticket minus fresh weights {_signed(differences(results, "control"))}.', '',
        f'![accuracy over weights that remain]({a.out.name}.png)', '', f'torch {torch.__version__}, timm {timm.__version__}, Python {platform.python_version()}, {platform.machine()}.']
    return '\n'.join(lines)+'\n'

def _where(a):
    if isinstance(a.rewind, str): return {'init': 'tickets go back to initialisation', 'lr': 'tickets keep their trained weights, the learning rate starts again'}.get(a.rewind, 'tickets keep their trained weights and the last learning rate')
    return f"tickets go back to {f'step {a.rewind}' if isinstance(a.rewind, int) else f'{a.rewind:g} epochs'} and train what is left of the schedule"

def _signed(vals): return f'{statistics.mean(vals):+.4f} ({", ".join(f"{v:+.4f}" for v in vals)})'

def main():
    a = parser().parse_args()
    if a.threads: torch.set_num_threads(a.threads)
    if a.dense: return dense(a)
    results = []
    for seed in range(a.seeds):
        lot,learn = search(a, seed)
        results.append(lot)
    a.out.parent.mkdir(parents=True, exist_ok=True)
    fig = plot_lottery(results)
    fig.savefig(a.out.with_suffix('.png'), dpi=80)
    text = markdown(a, results, learn)
    a.out.with_suffix('.md').write_text(text)
    print('\n'+text)

if __name__=='__main__': main()
