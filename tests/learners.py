"Learners of every kind that several test files train: tables, text, several inputs"
import random
import numpy as np, pandas as pd, torch, torch.nn.functional as F
from torch import nn
from fastai.callback.rnn import rnn_cbs
from fastai.data.core import DataLoaders, TfmdDL
from fastai.learner import Learner
from fastai.losses import CrossEntropyLossFlat
from fastai.metrics import accuracy
from fastai.tabular.all import Categorify, FillMissing, Normalize, TabularDataLoaders, tabular_learner
from fastai.text.models.awdlstm import AWD_LSTM, awd_lstm_clas_split
from fastai.text.models.core import get_text_classifier
from fastai.torch_core import set_seed

def quiet(learn):
    learn.remove_cb(learn.progress); learn.logger = lambda o: None
    return learn

class Items(list): pass

def dls_of(xs, y, bs=16):
    "DataLoaders of tensors: `xs` a tuple of inputs, `y` a target or a tuple of them"
    ys = y if isinstance(y, tuple) else (y,)
    ds,n = list(tuple(o[i] for o in (*xs, *ys)) for i in range(len(xs[0]))),len(xs[0])*4//5
    parts = [Items(ds[:n]), Items(ds[n:])]
    for o in parts: o.n_inp = len(xs)
    return DataLoaders(TfmdDL(parts[0], bs=bs, shuffle=True, num_workers=0), TfmdDL(parts[1], bs=bs, num_workers=0))

def learner(model, xs, y, path, loss_func=None, **kw):
    set_seed(0); random.seed(0)
    return quiet(Learner(dls_of(xs, y), model, loss_func=loss_func or CrossEntropyLossFlat(), path=path, **kw))

def table(n=240):
    g = np.random.RandomState(0)
    df = pd.DataFrame(dict(a=g.choice(list('uvwxyz'), n), b=g.choice(['p','q','r'], n), c=g.randn(n), d=g.randn(n)))
    df['y'] = np.where((df.a.isin(['u','v'])) ^ (df.c>0), 'yes', 'no')
    return df

def tabular(path, layers=(32,16)):
    set_seed(0)
    dls = TabularDataLoaders.from_df(table(), path, procs=[Categorify, FillMissing, Normalize], cat_names=['a','b'], cont_names=['c','d'], y_names='y', bs=32, num_workers=0, valid_idx=list(range(48)))
    return quiet(tabular_learner(dls, layers=list(layers), metrics=accuracy, path=path))

CONFIG = dict(emb_sz=20, n_hid=24, n_layers=2, pad_token=1, bidir=False, output_p=.1, hidden_p=.1, input_p=.1, embed_p=.05, weight_p=.3)

def words(n=96, length=12, vocab=30):
    g = torch.Generator().manual_seed(0)
    x = torch.randint(2, vocab, (n, length), generator=g)
    return x, ((x==5).sum(1)+(x==7).sum(1)>0).long()

def text_learner(path):
    set_seed(0)
    model = get_text_classifier(AWD_LSTM, 30, 2, seq_len=6, config=dict(CONFIG), max_len=12)
    x,y = words()
    return learner(model, (x,), y, path, cbs=rnn_cbs(), splitter=awd_lstm_clas_split)

class Two(nn.Module):
    "A picture and a row in, a class and a number out"
    def __init__(self, width=8):
        super().__init__()
        self.im,self.tab = nn.Sequential(nn.Conv2d(3,width,3,2,1), nn.ReLU(), nn.Conv2d(width,16,3,2,1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()),nn.Linear(5,16)
        self.both,self.cls,self.reg = nn.Linear(32,24),nn.Linear(24,3),nn.Linear(24,1)
    def forward(self, im, tab):
        h = self.both(torch.cat([self.im(im), self.tab(tab)], 1)).relu()
        return self.cls(h), self.reg(h)

def two_learner(path, width=8):
    g = torch.Generator().manual_seed(0)
    im,tab = torch.randn(64,3,12,12, generator=g),torch.randn(64,5, generator=g)
    y1,y2 = torch.randint(0,3,(64,), generator=g),tab.sum(1, keepdim=True)
    set_seed(0)
    return learner(Two(width), (im, tab), (y1, y2), path, loss_func=lambda p, a, b: F.cross_entropy(p[0], a) + F.mse_loss(p[1], b))
