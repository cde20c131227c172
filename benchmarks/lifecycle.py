"""What each fastai verb does to a sparse model: SparsifyCallback and fasterai 0.4.1 through the same small fits.

Every row trains a tiny network on 160 digits towards 80% zeros, does what the row says, and states what is found in the model
afterwards (zeros among the weights that the callback covers). "pass" means what docs and tests promise; the tests themselves (tests/test_sparsify.py, test_lifecycle.py, test_learners.py) ask
for much more. The two-process run is in tests/test_lifecycle.py.

    pip install fasterai==0.4.1
    python benchmarks/lifecycle.py --out benchmarks/results/lifecycle.md
"""
import argparse, contextlib, io, random, sys, tempfile, warnings
from pathlib import Path
warnings.filterwarnings('ignore')
import pandas as pd, torch
from fastai.callback.all import *
from fastai.learner import Callback, Learner, load_learner
from fastai.metrics import accuracy
from fastai.tabular.all import Categorify, FillMissing, TabularDataLoaders, Normalize, tabular_learner
from fastai.torch_core import params, set_seed
from torch import nn
import fastcompress.callback.quantize
from fastcompress.callback.sparsify import SparsifyCallback
from fastcompress.data import digits
from fastcompress.prune.mask import prunable, sparsity_of
from fastcompress.quantize.simulate import simulation
from peers import fasterai_callback

torch.set_num_threads(1)
S,DLS,COVERED = .8,digits(n=200, size=8, bs=16),['1','3']
OURS   = lambda s=S, **kw: SparsifyCallback(s, include=nn.Conv2d, exclude='0', **kw)
THEIRS = lambda s=S, **kw: fasterai_callback(s, 'global')

def net(): return nn.Sequential(nn.Conv2d(3,8,3,2,1), nn.Conv2d(8,16,3,1,1), nn.BatchNorm2d(16), nn.Conv2d(16,16,3,1,1), nn.ReLU(),
                                nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16,10))
def learner(path, **kw):
    set_seed(0); DLS.train.rng = random.Random(0)
    learn = Learner(DLS, net(), metrics=accuracy, path=path, **kw)
    learn.remove_cb(learn.progress); learn.logger = lambda o: None
    return learn
def zeros(learn): return sparsity_of(learn.model, COVERED)
def state(learn): return {k: v.clone() for k,v in learn.model.state_dict().items()}
def equal(a, b): return set(a)==set(b) and all(torch.equal(a[k], b[k]) for k in a)
def hit(z): return abs(z-S)<.003, f'{z:.4f} zero'

class Worse(Callback):
    order,run_train = 49,False
    def after_loss(self): self.learn.loss = self.learn.loss*0 + self.epoch
class Trace(Callback):
    order,run_valid = 102,False
    def __init__(self): self.zeros = []
    def after_step(self): self.zeros.append(zeros(self.learn))
    def falls(self): return any(b<a-1e-6 for a,b in zip(self.zeros, self.zeros[1:]))

def plain(cb, d):
    learn = learner(d); learn.fit(4, 1e-3, cbs=cb())
    return hit(zeros(learn))
def lr_find_(cb, d):
    learn = learner(d, cbs=cb()); before = state(learn)
    learn.lr_find(num_it=15, show_plot=False)
    same = equal(before, state(learn))
    return same, 'model bit-identical' if same else 'the model changed'
def fine_tune_(cb, d):
    learn,t = learner(d, splitter=lambda m: [params(m[:4]), params(m[4:])]),Trace()
    learn.fine_tune(3, cbs=[cb(), t])
    return hit(zeros(learn))[0] and not t.falls(), f'{zeros(learn):.4f} zero, on the way ' + ('it fell' if t.falls() else 'it never fell')
def save_model(cb, d):
    learn = learner(d); learn.fit(4, 1e-3, cbs=[cb(), Worse(), SaveModelCallback()])
    return hit(zeros(learn))
def early_stop(cb, d):
    learn = learner(d); learn.fit(6, 1e-3, cbs=[cb(), Worse(), EarlyStoppingCallback(patience=1), ReduceLROnPlateau(patience=1)])
    return hit(zeros(learn))[0], f'{zeros(learn):.4f} zero after {len(learn.recorder.values)} of 6 epochs'
def accumulate(cb, d):
    learn,t,c = learner(d),Trace(),cb(every=1) if cb is OURS else cb()
    changes = [zeros(learn)]
    class Changes(Callback):
        order,run_valid = 103,False
        def after_batch(self): changes.append(zeros(self.learn))
    learn.fit(4, 1e-3, cbs=[c, t, Changes(), GradientAccumulation(64)])
    n,steps = sum(a!=b for a,b in zip(changes, changes[1:])),len(t.zeros)
    return hit(zeros(learn))[0] and n<=steps+1, f'{zeros(learn):.4f} zero, {n} changes in {steps} optimizer steps'
def second_fit(cb, d):
    learn = learner(d); learn.fit(3, 1e-3, cbs=cb()); learn.fit(2, 1e-2)
    return hit(zeros(learn))
def quantize(cb, d):
    learn = learner(d); learn.fit(3, 1e-3, cbs=cb()); learn.quantize()
    learn.fit(1, 1e-3)
    return hit(zeros(learn))
def save_load(cb, d):
    learn = learner(d); learn.fit(3, 1e-3, cbs=cb()); learn.save('m')
    other = learner(d); other.load('m'); same = equal(state(learn), state(other)); other.fit(1, 1e-2)
    return same and hit(zeros(other))[0], f'loads {"identically" if same else "differently"}; after one more fit {zeros(other):.4f} zero'
def export(cb, d):
    learn = learner(d, cbs=cb()); learn.fit(3, 1e-3); learn.export('x.pkl')
    other = load_learner(Path(d)/'x.pkl'); im = DLS.train_ds.items[0][0]
    same = torch.equal(other.predict(im)[2], learn.predict(im)[2])
    return same and len(learn.dls.train_ds)==160, 'same prediction, dls intact' if same else 'another prediction'
def predictions(cb, d):
    learn = learner(d, cbs=cb()); before = state(learn)
    learn.validate(); learn.get_preds(); learn.predict(DLS.train_ds.items[0][0])
    same = equal(before, state(learn))
    return same, 'nothing changed' if same else 'the model changed'
def half(cb, d):
    learn = learner(d).to_bf16(); learn.fit(3, 1e-3, cbs=cb())
    return hit(zeros(learn))
def ctrl_c(cb, d):
    learn = learner(d); keys = set(learn.model.state_dict())
    class Boom(Callback):
        def after_batch(self):
            if self.training and self.train_iter==18: raise KeyboardInterrupt
    try: learn.fit(4, 1e-3, cbs=[cb(), Boom()])
    except KeyboardInterrupt: pass
    left = set(learn.model.state_dict())-keys
    at = zeros(learn); learn.fit(1, 1e-2)
    held = abs(zeros(learn)-at)<1e-6
    return held and not left, (f'{len(left)} buffers left behind' if left else 'nothing left behind') + f', then a plain fit: {at:.4f} zero becomes {zeros(learn):.4f}'
def silent(cb, d):
    learn,out = learner(d),io.StringIO()
    c = cb() if cb is OURS else type(cb()).__mro__[1](S, 'weight', 'global', *_criteria())
    with contextlib.redirect_stdout(out), learn.no_logging(): learn.fit(2, 1e-3, cbs=c)
    n = len(out.getvalue().splitlines())
    return n==0, f'{n} lines printed'
def _criteria():
    from fasterai.core.criteria import large_final
    from fasterai.core.schedule import Schedule, sched_agp
    return large_final, Schedule(sched_agp, start_pct=0., end_pct=.75)
def tabular(cb, d):
    set_seed(0); r = random.Random(0)
    df = pd.DataFrame(dict(kind=[r.choice('abc') for _ in range(200)], x=[r.random() for _ in range(200)])); df['y'] = ['yes' if x>.5 else 'no' for x in df.x]
    dls = TabularDataLoaders.from_df(df, d, procs=[Categorify, FillMissing, Normalize], cat_names=['kind'], cont_names=['x'], y_names='y', bs=32, num_workers=0, valid_idx=list(range(40)))
    learn = tabular_learner(dls, layers=[40,20], metrics=accuracy, path=d); learn.remove_cb(learn.progress); learn.logger = lambda o: None
    if cb is OURS: c = SparsifyCallback(S)
    else:
        c = fasterai_callback(S, 'global'); c.layer_type = nn.Linear
    learn.fit(3, 1e-2, cbs=c)
    names = [n for n in prunable(learn.model) if n.startswith('layers')]
    z = sparsity_of(learn.model, names[:-1] if cb is OURS else names) # the last layer is the classifier
    return abs(z-S)<.005, f'{z:.4f} zero'

ROWS = {'a plain fit': plain, '`lr_find` with the callback attached': lr_find_, '`fine_tune`': fine_tune_, '`SaveModelCallback`': save_model, '`EarlyStopping` and `ReduceLROnPlateau`': early_stop,
        '`GradientAccumulation`': accumulate, 'a second, plain `fit`': second_fit, '`learn.quantize()` and a further fit': quantize, '`save`, `load` in a new Learner, fit': save_load,
        '`export`, `load_learner`': export, '`validate`, `get_preds`, `predict`': predictions, '`to_bf16`': half, 'Ctrl-C in mid-fit': ctrl_c, '`no_logging`': silent, 'a tabular learner': tabular}

def run(f, cb):
    COVERED[:] = ['1','3'] if cb is OURS else ['0','1','3'] # fasterai covers every convolution
    with tempfile.TemporaryDirectory() as d:
        try:
            with contextlib.redirect_stdout(io.StringIO()): ok,what = f(cb, d)
        except Exception as e: ok,what = False,f'{type(e).__name__}: {str(e).strip().splitlines()[-1].strip()[:90]}'
    return f"{'pass' if ok else '**fail**'}: {what}"

def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter); p.add_argument('--out')
    a = p.parse_args()
    lines = ['| verb | fastcompress | fasterai 0.4.1 |', '|---|---|---|']
    for name,f in ROWS.items():
        lines.append(f'| {name} | {run(f, OURS)} | {run(f, THEIRS)} |'); print(lines[-1], flush=True)
    if a.out:
        Path(a.out).parent.mkdir(parents=True, exist_ok=True)
        Path(a.out).write_text('# Sparsity through the verbs of a Learner\n\n    ' + ' '.join(['python benchmarks/lifecycle.py', *sys.argv[1:]]) + '\n\n' + '\n'.join(lines) + '\n')

if __name__=='__main__': main()
