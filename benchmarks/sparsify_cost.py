"""What SparsifyCallback costs: epoch time with it over epoch time without, held masks over none, and fasterai 0.4.1 beside it.

Each round trains one fit of every kind, all of them in lockstep: a batch of the first, the same batch of the second, and so on in
rotating order, so that whatever else the machine does falls on all alike. Times are divided inside the round; the table shows the ratios of
all rounds (median, minimum, maximum). A warm-up is thrown away. Validation is left out. Peak memory
is the most that torch had allocated for tensors at any time, in a fresh process that trains one epoch, less that of a plain fit; it
doesn't mind a busy machine.

    pip install fasterai==0.4.1
    python benchmarks/sparsify_cost.py --no-memory --out benchmarks/results/sparsify_cost.md
    python benchmarks/sparsify_cost.py --rounds 0 --out benchmarks/results/sparsify_memory.md
"""
import argparse, json, random, statistics, subprocess, sys, tempfile, time, warnings
from pathlib import Path
warnings.filterwarnings('ignore')
import timm, torch
from fastai.callback.core import Callback, CancelValidException
from fastai.learner import Learner
from fastai.torch_core import set_seed
from torch import nn
from torch.profiler import ProfilerActivity, profile
from fastcompress.callback.sparsify import SparsifyCallback
from fastcompress.data import digits
from peers import fasterai_callback

class NoValid(Callback):
    order = -20
    def before_validate(self): raise CancelValidException()

def small():
    def conv(i, o, s): return nn.Sequential(nn.Conv2d(i, o, 3, s, 1, bias=False), nn.BatchNorm2d(o), nn.ReLU())
    return nn.Sequential(conv(3,32,1), conv(32,64,2), conv(64,64,1), conv(64,128,2), conv(128,128,1), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(128,10))

MODELS = {'small': small, 'resnet18': lambda: timm.create_model('resnet18', num_classes=10)}
KINDS = {'none': lambda: None, 'global': lambda: SparsifyCallback(.8), 'local': lambda: SparsifyCallback(.8, scope='local'),
         'global, no regrow': lambda: SparsifyCallback(.8, regrow=False), 'held': lambda: None,
         'fasterai global': lambda: fasterai_callback(.8, 'global'), 'fasterai local': lambda: fasterai_callback(.8, 'local')}

def learner(model, dls, kind):
    set_seed(0)
    learn = Learner(dls, MODELS[model](), cbs=NoValid)
    learn.remove_cb(learn.progress); learn.logger = lambda o: None
    if kind=='held': learn.fit(1, 1e-3, cbs=SparsifyCallback(.8, 'one_shot'))
    return learn

def steps(learn, cb, batches, epochs):
    "`Learner.fit` as a generator that stops after each batch; no validation"
    with learn.added_cbs(cb):
        if learn.opt is None: learn.create_opt()
        learn.opt.set_hypers(lr=1e-3); learn.n_epoch = epochs; learn('before_fit')
        for learn.epoch in range(epochs):
            learn('before_epoch'); learn.dl = learn.dls.train; learn.n_iter = len(batches); learn('before_train')
            for o in enumerate(batches):
                learn.one_batch(*o)
                yield
            learn('after_train'); learn('after_epoch')
        learn('after_fit')

def together(model, dls, epochs, turn):
    "Seconds of a fit of each kind, all of them in lockstep: one batch each, in rotating order; and changes of masks"
    dls.train.rng = random.Random(0); batches = list(dls.train)
    cbs = {k: f() for k,f in KINDS.items()}
    runs = {k: steps(learner(model, dls, k), cbs[k], batches, epochs) for k in KINDS}
    secs,kinds = dict.fromkeys(KINDS, 0.),list(KINDS)
    for i in range(epochs*len(batches)+1): # the last turn is what happens after the last batch
        at = (i+turn)%len(kinds)
        for k in kinds[at:]+kinds[:at]:
            start = time.perf_counter()
            next(runs[k], None)
            secs[k] += time.perf_counter()-start
    return secs, {k: len(getattr(c, 'history', ())) for k,c in cbs.items()}

def peak(model, kind, a):
    "Most bytes of tensors at any time in a fresh process, MB"
    out = subprocess.run([sys.executable, __file__, '--peak', model, kind, '--size', str(a.size), '--bs', str(a.bs), '--threads', '1'], capture_output=True, text=True, check=True)
    return json.loads(out.stdout.splitlines()[-1])

def trace_peak(model, dls, kind):
    learn,cb = learner(model, dls, kind),KINDS[kind]()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as p: learn.fit(1, 1e-3, cbs=cb)
    with tempfile.TemporaryDirectory() as d:
        p.export_chrome_trace(f'{d}/trace.json')
        events = json.loads(Path(f'{d}/trace.json').read_text())['traceEvents']
    return max(e['args']['Total Allocated'] for e in events if e.get('name')=='[memory]')/2**20

def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--rounds', type=int, default=5); p.add_argument('--epochs', type=int, default=8)
    p.add_argument('--models', default='small,resnet18'); p.add_argument('--size', type=int, default=32)
    p.add_argument('--bs', type=int, default=64); p.add_argument('--threads', type=int, default=0)
    p.add_argument('--no-memory', action='store_true')
    p.add_argument('--peak', nargs=2, help=argparse.SUPPRESS); p.add_argument('--out')
    a = p.parse_args()
    if a.threads: torch.set_num_threads(a.threads)
    dls = digits(size=a.size, bs=a.bs)
    if a.peak:
        return print(json.dumps(trace_peak(a.peak[0], dls, a.peak[1])))
    lines = []
    def say(s): print(s, flush=True); lines.append(s)
    if a.rounds: say(f'{torch.get_num_threads()} threads, {a.epochs} epochs of {len(dls.train)} steps, batch {a.bs}, {a.size} px, {a.rounds} rounds, 80% of the weights\n')
    if a.rounds: say('| model | callback | time / none: median | min | max | changes of masks | none, ms a step |\n|---|---|---|---|---|---|---|')
    for model in a.models.split(',') if a.rounds else []:
        times = {k:[] for k in KINDS}
        together(model, dls, 1, 0) # warms up
        for r in range(a.rounds):
            secs,updates = together(model, dls, a.epochs, r)
            for k,t in secs.items(): times[k].append(t)
        base = statistics.median(times['none'])/(a.epochs*len(dls.train))*1e3
        for k in list(KINDS)[1:]:
            q = [t/b for t,b in zip(times[k], times['none'])]
            say(f"| {model} | {k} | {statistics.median(q):.3f} | {min(q):.3f} | {max(q):.3f} | {updates[k] or ('none' if k=='held' else 'every step')} | {base:.1f} |")
    if not a.no_memory: say('| model | callback | peak memory above none, MB | one byte a weight, MB |\n|---|---|---|---|')
    for model in [] if a.no_memory else a.models.split(','):
        n,none = sum(q.numel() for q in MODELS[model]().parameters())/2**20,peak(model, 'none', a)
        for k in [o for o in KINDS if o not in ('none','held')]: say(f'| {model} | {k} | {peak(model, k, a)-none:.1f} | {n:.1f} |')
    if a.out:
        Path(a.out).parent.mkdir(parents=True, exist_ok=True)
        cmd = ' '.join(o for o in ['python benchmarks/sparsify_cost.py', *sys.argv[1:]])
        Path(a.out).write_text(f'# What SparsifyCallback costs\n\n    {cmd}\n\n' + '\n'.join(lines) + '\n')

if __name__=='__main__': main()
