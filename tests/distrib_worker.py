"What tests/test_lifecycle.py runs in processes of its own: functions of a folder and plain arguments, which leave their results in that folder"
import os, random, signal, sys, types, warnings
warnings.filterwarnings('ignore', '.*torch.jit.script', FutureWarning)
import numpy as np, torch
from hashlib import sha256
from torch import nn
from fastai.callback.core import Callback
from fastai.callback.schedule import fine_tune, fit_one_cycle
from fastai.callback.tracker import SaveModelCallback
from fastai.learner import Learner, load_learner
from fastai.torch_core import set_seed

from fastcompress.callback.sparsify import SparsifyCallback
from fastcompress.data import digits
from fastcompress.prune.mask import covered_weights

torch.set_num_threads(1)
DLS = digits(n=200, size=8, bs=16) # 160 to train on: 10 batches
NAMES = ['1','3'] # what is covered by default in `net`
N = {'1': 8*16*9, '3': 16*16*9}
SUM = sum(N.values())

def net(): return nn.Sequential(nn.Conv2d(3,8,3,2,1), nn.Conv2d(8,16,3,1,1), nn.BatchNorm2d(16), nn.Conv2d(16,16,3,1,1), nn.ReLU(),
                                nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16,10))

class Order(Callback):
    "Makes the order of the data a function of the epoch"
    run_valid = False
    def before_train(self): self.dls.train.rng = random.Random(self.epoch)

def learner(path, seed=0, **kwargs):
    set_seed(seed); DLS.train.rng = random.Random(seed)
    learn = Learner(DLS, kwargs.pop('model', None) or net(), path=path, **kwargs)
    learn.remove_cb(learn.progress); learn.logger = lambda o: None
    return learn

def zeros(learn, names=NAMES): return sum(int((w==0).sum()) for w in covered_weights(learn.model, names).values())
def digest(ts): return sha256(b''.join(t.detach().cpu().contiguous().numpy().tobytes() for t in ts)).hexdigest()
def weights(learn): return {n: p.detach().clone() for n,p in learn.model.named_parameters()}
def result(learn, cb=None):
    return dict(weights=weights(learn), masks=dict(learn.mask_keeper.masks), zeros=zeros(learn), history=[tuple(h) for h in cb.history] if cb else None)

# ---- two processes, one model

class _Accelerator:
    "Stands in for Hugging Face's, which fastai.distributed imports: on a CPU all it does for `DistributedTrainer` is this"
    def __init__(self, **kwargs): pass
    def prepare(self, model): return nn.parallel.DistributedDataParallel(model)
    def backward(self, loss): loss.backward()

def join(rank, port):
    "Become one of two processes under gloo"
    os.environ.update(RANK=str(rank), WORLD_SIZE='2', LOCAL_RANK=str(rank), MASTER_ADDR='127.0.0.1', MASTER_PORT=str(port))
    torch.distributed.init_process_group('gloo')
    sys.modules['accelerate'] = mod = types.ModuleType('accelerate')
    mod.Accelerator = _Accelerator
    from fastai.distributed import DistributedDL
    def _broadcast(self, t, rank): # fastai's asks for CUDA
        t = torch.tensor(t)
        torch.distributed.broadcast(t, rank)
        return t.tolist()
    DistributedDL._broadcast = _broadcast

class Seen(Callback):
    "Digest of all training inputs of this rank; and of weights and masks after every epoch"
    order,run_valid = 101,False
    def before_fit(self): self.xs,self.each = [],[]
    def before_batch(self): self.xs.append(self.xb[0].clone())
    def after_train(self): self.each.append((digest(self.model.parameters()), digest(self.learn.mask_keeper.masks.values())))

def two_ranks(path, rank, port, configs):
    join(rank, port)
    out = {}
    for name,kw in configs.items():
        learn,cb,seen = learner(path, seed=rank),SparsifyCallback(.8, every=2, **kw),Seen() # another start on each rank: DDP gives both that of rank 0
        try:
            with learn.distrib_ctx(sync_bn=False): learn.fit(2, 1e-2, cbs=[cb, seen])
            out[name] = dict(data=digest(seen.xs), n=len(seen.xs), each=seen.each, history=cb.history, zeros=zeros(learn), type=type(learn.model).__name__,
                             weights=digest(learn.model.parameters()), masks=digest(learn.mask_keeper.masks.values()))
        except Exception as e: out[name] = dict(error=f'{type(e).__name__}: {e}')
    torch.save(out, path/f'rank{rank}.pt')
    torch.distributed.destroy_process_group()

# ---- killed and resumed

class Kill(Callback):
    "As if the power failed, in the middle of an epoch"
    order,run_valid = 120,False
    def __init__(self, fit, epoch, iter): self.fit,self.at = fit,(epoch, iter)
    def after_batch(self):
        if (self.epoch, self.iter)==self.at: os.kill(os.getpid(), signal.SIGKILL)

def _fits(learn, cb, fits, n, start=(0,0), kill=None):
    "`fits` fits of `n` epochs with the same callback, from `start` (fit, epoch) on"
    for i in range(start[0], fits):
        cbs = [cb, Order(), SaveModelCallback(every_epoch=True, with_opt=True, fname=f'fit{i}')]
        learn.fit_one_cycle(n, 1e-2, cbs=cbs+[kill] if kill and kill.fit==i else cbs, start_epoch=start[1] if i==start[0] else 0)

def through(path, kw, fits, n):
    learn,cb = learner(path),SparsifyCallback(**kw)
    _fits(learn, cb, fits, n)
    torch.save(result(learn, cb), path/'through.pt')

def killed(path, kw, fits, n, kill):
    _fits(learner(path), SparsifyCallback(**kw), fits, n, kill=Kill(*kill))

def resumed(path, kw, fits, n, at, kill=None, seed=7):
    "Load the checkpoint of fit `at[0]`, epoch `at[1]`, and go on; another seed, so that nothing comes from where it should not"
    learn,cb = learner(path, seed),SparsifyCallback(**kw)
    learn.load('fit%d_%d' % tuple(at))
    _fits(learn, cb, fits, n, (at[0], at[1]+1), kill and Kill(*kill))
    torch.save(result(learn, cb), path/'resumed.pt')

# ---- saved here, loaded there

def load_and_fit(path, name, seed=5):
    "A fresh process that knows the file only: what it holds after `load`, and after a plain fit"
    learn = learner(path, seed).load(name)
    out = dict(loaded=zeros(learn), keys=list(learn.model.state_dict()), weights=weights(learn))
    learn.fit(1, 1e-2, cbs=Order())
    torch.save(dict(out, **result(learn), column=learn.recorder.values[-1][-1], metrics=list(learn.recorder.metric_names)), path/'fresh.pt')

def load_export(path, name, n):
    "`load_learner` in a fresh process, a prediction, and `n` epochs of training"
    with warnings.catch_warnings():
        warnings.simplefilter('ignore'); learn = load_learner(path/name)
    learn.logger = lambda o: None
    for cb in [c for c in learn.cbs if type(c).__name__=='ProgressCallback']: learn.remove_cb(cb)
    set_seed(0)
    out = dict(pred=learn.predict(DLS.train_ds.items[0][0])[2], loaded=zeros(learn), cbs=[type(c).__name__ for c in learn.cbs], keys=list(learn.model.state_dict()))
    learn.dls = DLS; learn.create_opt()
    learn.fit(n, 1e-2, cbs=Order())
    torch.save(dict(out, **result(learn)), path/'fresh.pt')
