"""What SparsifyCallback costs: epoch time with it over epoch time without, and under held masks over without.

Each round trains one fit of every kind, in rotating order, and divides inside the round; the table shows the ratios
of all rounds (median, minimum, maximum). A first round is thrown away. Validation is left out of the fits. On a busy
machine --cpu divides processor time instead of elapsed time.

    python benchmarks/sparsify_cost.py [--rounds 5] [--epochs 2] [--models small,resnet18] [--size 32] [--threads 0] [--cpu]
"""
import argparse, random, statistics, time, warnings
warnings.filterwarnings('ignore')
import timm, torch
from fastai.callback.core import Callback, CancelValidException
from fastai.learner import Learner
from fastai.torch_core import set_seed
from torch import nn
from fastcompress.callback.sparsify import SparsifyCallback
from fastcompress.data import digits

class NoValid(Callback):
    order = -20
    def before_validate(self): raise CancelValidException()

def small():
    def conv(i, o, s): return nn.Sequential(nn.Conv2d(i, o, 3, s, 1, bias=False), nn.BatchNorm2d(o), nn.ReLU())
    return nn.Sequential(conv(3,32,1), conv(32,64,2), conv(64,64,1), conv(64,128,2), conv(128,128,1), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(128,10))

MODELS = dict(small=small, resnet18=lambda: timm.create_model('resnet18', num_classes=10))
KINDS = dict(none=lambda: None, glob=lambda: SparsifyCallback(.8), local=lambda: SparsifyCallback(.8, scope='local'), held=lambda: SparsifyCallback(.8))

def fit(model, dls, kind, epochs, clock=time.perf_counter):
    "Seconds of one fit; for 'held', of a plain fit after a sparse one"
    set_seed(0); dls.train.rng = random.Random(0)
    learn = Learner(dls, MODELS[model](), cbs=NoValid)
    learn.remove_cb(learn.progress); learn.logger = lambda o: None
    cb = KINDS[kind]()
    if kind=='held': learn.fit(1, 1e-3, cbs=SparsifyCallback(.8, 'one_shot')); cb = None
    start = clock()
    learn.fit(epochs, 1e-3, cbs=cb)
    return clock()-start, len(cb.history) if cb else 0

def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--rounds', type=int, default=5); p.add_argument('--epochs', type=int, default=2)
    p.add_argument('--models', default='small,resnet18'); p.add_argument('--size', type=int, default=32)
    p.add_argument('--bs', type=int, default=64); p.add_argument('--threads', type=int, default=0)
    p.add_argument('--cpu', action='store_true')
    a = p.parse_args()
    if a.threads: torch.set_num_threads(a.threads)
    dls = digits(size=a.size, bs=a.bs)
    print(f'{torch.get_num_threads()} threads, {a.epochs} epochs of {len(dls.train)} steps, batch {a.bs}, {a.size} px, {a.rounds} rounds, {"processor" if a.cpu else "elapsed"} time')
    print(f"{'model':10s}{'kind':8s}{'median':>8s}{'min':>8s}{'max':>8s}{'updates':>9s}{'s/step without':>16s}")
    for model in a.models.split(','):
        times,updates = {k:[] for k in KINDS},{}
        for r in range(a.rounds+1):
            kinds = list(KINDS); kinds = kinds[r%4:]+kinds[:r%4]
            for k in kinds:
                t,updates[k] = fit(model, dls, k, a.epochs, time.process_time if a.cpu else time.perf_counter)
                if r: times[k].append(t)
        base = statistics.median(times['none'])/(a.epochs*len(dls.train))
        for k in list(KINDS)[1:]:
            ratios = [t/b for t,b in zip(times[k], times['none'])]
            print(f"{model:10s}{dict(glob='global').get(k,k):8s}{statistics.median(ratios):8.3f}{min(ratios):8.3f}{max(ratios):8.3f}{updates[k]:9d}{base:16.4f}", flush=True)

if __name__=='__main__': main()
