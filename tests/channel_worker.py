"What tests/test_channel_callback.py and tests/test_channel_lifecycle.py train, and what the latter runs in processes of its own"
import random, warnings
warnings.filterwarnings('ignore', '.*torch.jit.script', FutureWarning)
import torch
from torch import nn
from fastai.learner import Learner, load_learner
from fastai.metrics import accuracy
from fastai.torch_core import set_seed

from distrib_worker import Kill, Order, _fits, digest, join
from fastcompress.callback.channels import ChannelPenaltyCallback, ChannelPruneCallback
from fastcompress.data import digits
from fastcompress.prune.remove import plan_of

torch.set_num_threads(1)
DLS = digits(n=200, size=8, bs=16) # 160 to train on: 10 batches
GROUPS = dict(zip(('stem.0','a.0','wide.0'), (16, 24, 32))) # what can be cut from `Net`

class Net(nn.Module):
    "Two convolutions write into one stream"
    def __init__(self):
        super().__init__()
        def conv(i, o, stride=1): return nn.Sequential(nn.Conv2d(i, o, 3, stride, 1, bias=False), nn.BatchNorm2d(o))
        self.stem,self.a,self.b,self.wide,self.head = conv(3,16,2),conv(16,24),conv(24,16),conv(16,32),nn.Linear(32,10)
    def forward(self, x):
        x = self.stem(x).relu()
        x = (x + self.b(self.a(x).relu())).relu()
        return self.head(self.wide(x).relu().mean((2,3)))

def learner(path, seed=0, **kwargs):
    set_seed(seed); DLS.train.rng = random.Random(seed)
    learn = Learner(DLS, kwargs.pop('model', None) or Net(), metrics=accuracy, path=path, **kwargs)
    learn.remove_cb(learn.progress); learn.logger = lambda o: None
    return learn

def widths(model): return {n: len(model.get_submodule(n).weight) for n in GROUPS}
def weights(learn): return {n: p.detach().clone() for n,p in learn.model.named_parameters()}
def moments(learn): return [{k: v.clone() for k,v in learn.opt.state[p].items() if torch.is_tensor(v)} for p in learn.model.parameters()]
def result(learn, cb=None):
    return dict(state={k: v.clone() for k,v in learn.model.state_dict().items()}, plan=plan_of(learn.model), widths=widths(learn.model), moments=moments(learn), history=cb and list(cb.history))

# ---- two processes, one model

def two_ranks(path, rank, port, configs):
    join(rank, port)
    out = {}
    for name,kw in configs.items():
        kw = dict(kw)
        kind = kw.pop('penalty', None)
        learn,cb = learner(path, seed=rank),ChannelPruneCallback(.5, **kw) # another start on each rank: DDP gives both that of rank 0
        try:
            with learn.distrib_ctx(sync_bn=False): learn.fit(2, 1e-2, cbs=[cb, *([ChannelPenaltyCallback(kind, 1e-3)] if kind else [])])
            out[name] = dict(weights=digest(learn.model.parameters()), widths=widths(learn.model), history=cb.history, type=type(learn.model).__name__, keep=plan_of(learn.model).keep,
                             n_opt=len(learn.opt.all_params()), moments=digest([t for m in moments(learn) for t in m.values()]))
            learn.fit(1, 1e-2) # alone again
        except Exception as e: out[name] = dict(error=f'{type(e).__name__}: {e}')
    torch.save(out, path/f'rank{rank}.pt')
    torch.distributed.destroy_process_group()

# ---- killed and resumed

def through(path, kw, fits, n):
    learn,cb = learner(path),ChannelPruneCallback(**kw)
    _fits(learn, cb, fits, n)
    torch.save(result(learn, cb), path/'through.pt')

def killed(path, kw, fits, n, kill): _fits(learner(path), ChannelPruneCallback(**kw), fits, n, kill=Kill(*kill))

def resumed(path, kw, fits, n, at):
    "Load the checkpoint of fit `at[0]`, epoch `at[1]`, and go on; another seed, so that nothing comes from where it should not"
    learn,cb = learner(path, 7),ChannelPruneCallback(**kw)
    learn.load('fit%d_%d' % tuple(at))
    _fits(learn, cb, fits, n, (at[0], at[1]+1))
    torch.save(result(learn, cb), path/'resumed.pt')

# ---- saved here, loaded there

def load_and_fit(path, name):
    "A fresh process that knows the code of the whole model only: what it has after `load`, and after a plain fit"
    learn = learner(path, 5).load(name)
    out = dict(preds=learn.get_preds()[0], loaded=result(learn), order=[p.shape for p in learn.opt.all_params().itemgot(0)])
    learn.fit(1, 1e-2, cbs=Order())
    torch.save(dict(out, after=result(learn)), path/'fresh.pt')

def load_export(path, name, n):
    with warnings.catch_warnings():
        warnings.simplefilter('ignore'); learn = load_learner(path/name)
    learn.logger = lambda o: None
    for cb in [c for c in learn.cbs if type(c).__name__=='ProgressCallback']: learn.remove_cb(cb)
    set_seed(0)
    out = dict(pred=learn.predict(DLS.train_ds.items[0][0])[2], loaded=widths(learn.model), cbs=[type(c).__name__ for c in learn.cbs])
    learn.dls = DLS; learn.create_opt()
    learn.fit(n, 1e-2, cbs=Order())
    torch.save(dict(out, **result(learn)), path/'fresh.pt')
