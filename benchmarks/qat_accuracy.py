"""Digits at few bits: post-training quantization against quantization-aware training, from the same float networks.

    python benchmarks/qat_accuracy.py --threads 1 --out benchmarks/results/qat_accuracy.md

The demo's model (timm's resnet18 at 32 px, from random weights) on scikit-learn's digits, 1,437 to train on and 360 to validate. Each seed
trains one float network; every row starts from a copy of it. Accuracy is that of the simulation, in percent; a point is 3.6 images. All
layers are quantized, the first and the last too.
"""
import argparse, copy, random, statistics, sys, warnings
from pathlib import Path
warnings.filterwarnings('ignore')
import torch
from fastai.callback.schedule import fit_one_cycle
from fastai.learner import Learner
from fastai.metrics import accuracy
from fastai.torch_core import set_seed

from fastcompress.callback.qat import QATCallback
from fastcompress.cli import demo_model
from fastcompress.data import digits

PTQ = {'PTQ W8A8': (8, 8), 'PTQ W4A8': (4, 8), 'PTQ W4A4': (4, 4), 'PTQ W2A4': (2, 4), 'PTQ W2A8': (2, 8)}
QAT = {'QAT W4A4, ranges follow': dict(w_bits=4, a_bits=4), 'QAT W4A4, learned steps': dict(w_bits=4, a_bits=4, learned=True),
       'QAT W2A4, learned steps': dict(w_bits=2, a_bits=4, learned=True), 'QAT W2A8, learned steps': dict(w_bits=2, a_bits=8, learned=True)}

def learner(dls, model, seed):
    set_seed(seed); dls.train.rng = random.Random(seed)
    learn = Learner(dls, model, metrics=accuracy)
    learn.remove_cb(learn.progress); learn.logger = lambda o: None
    return learn

def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--arch', default='resnet18'); p.add_argument('--size', type=int, default=32); p.add_argument('--seeds', type=int, default=3)
    p.add_argument('--float-epochs', type=int, default=6); p.add_argument('--epochs', type=int, default=4); p.add_argument('--lr', type=float, default=1e-3)
    p.add_argument('--threads', type=int, default=0); p.add_argument('--only', default=''); p.add_argument('--out')
    a = p.parse_args()
    if a.threads: torch.set_num_threads(a.threads)
    dls = digits(size=a.size); rows = {}
    def note(k, acc): rows.setdefault(k, []).append(100*acc); print(f'{k}: {100*acc:.2f}', flush=True)
    for seed in range(a.seeds):
        set_seed(seed)
        learn = learner(dls, demo_model(a.arch, 10, a.size), seed)
        learn.fit_one_cycle(a.float_epochs, 3e-3)
        note('float', learn.validate()[1])
        state = copy.deepcopy(learn.model.state_dict())
        for k,(w,b) in PTQ.items():
            learn.quantize(w_bits=w, a_bits=b, observer='mse'); note(k, learn.validate()[1]); learn.dequantize()
        for k,kw in QAT.items():
            if a.only not in k: continue
            learn.model.load_state_dict(state)
            tuned = learner(dls, learn.model, seed)
            tuned.fit_one_cycle(a.epochs, a.lr, cbs=QATCallback(**kw))
            note(k, tuned.validate()[1]); tuned.dequantize()
    lines = [f'{a.arch}, {a.size} px, {a.float_epochs} epochs float, {a.epochs} of QAT at {a.lr:g}, {a.seeds} seeds\n', '| | accuracy, mean | below float, points | seeds |', '|---|---|---|---|']
    base = statistics.mean(rows['float'])
    lines += [f"| {k} | {statistics.mean(v):.2f} | {base-statistics.mean(v):.2f} | {', '.join(f'{o:.2f}' for o in v)} |" for k,v in rows.items()]
    print('\n'.join(lines))
    if a.out:
        Path(a.out).parent.mkdir(parents=True, exist_ok=True)
        cmd = ' '.join(['python benchmarks/qat_accuracy.py', *sys.argv[1:]])
        Path(a.out).write_text(f'# Digits at few bits\n\n    {cmd}\n\n' + '\n'.join(lines) + '\n')

if __name__=='__main__': main()
