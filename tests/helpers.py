"What several test files need"
import multiprocessing, os
from contextlib import contextmanager
import timm, torch
from torch import nn


@contextmanager
def forking(module):
    "A function that starts a function of test module `module` in a new process, forked off one that has done nothing but import it"
    here,was = os.path.dirname(__file__),os.environ.get('PYTHONPATH')
    os.environ['PYTHONPATH'] = os.pathsep.join(o for o in (here, was) if o) # where the server finds what to import
    ctx = multiprocessing.get_context('forkserver')
    ctx.set_forkserver_preload([module])
    def _start(f, *args):
        p = ctx.Process(target=f, args=args); p.start()
        return p
    try: yield _start
    finally: os.environ.pop('PYTHONPATH') if was is None else os.environ.__setitem__('PYTHONPATH', was)


def to_the_end(start, seconds):
    "Run what `start` starts to its end, `seconds` at most; returns the exit code"
    def _run(*args):
        p = start(*args); p.join(seconds)
        if p.is_alive(): p.kill()
        return p.exitcode
    return _run


def randomise_(model, x):
    "BatchNorm gains and layer scales that are not their defaults, running statistics from two batches; seeded"
    g = torch.Generator().manual_seed(0)
    for m in model.modules():
        if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.affine: m.weight.data.uniform_(.5, 1.5, generator=g)
    for n,p in model.named_parameters():
        if n.endswith('.gamma') or '.ls' in n: p.data.uniform_(.1, .5, generator=g)
    model.train()
    with torch.no_grad():
        for _ in range(2): model(torch.randn(x.shape, generator=g))
    return model.eval()


class Scales(nn.Module):
    "A sum that begins with the number 0, PP-HGNetV2's learned factor and addend, a BatchNorm that has no contraction to fold into"
    def __init__(self):
        super().__init__()
        self.a,self.b,self.c,self.d = (nn.Conv2d(i, 8, k, padding=(k-1)//2) for i,k in ((3,3),(3,1),(8,2),(16,3)))
        self.factor,self.addend,self.bn = nn.Parameter(torch.tensor([-1.3])),nn.Parameter(torch.randn(8,1,1)),nn.BatchNorm2d(16)
    def forward(self, x):
        x = self.factor*sum([self.a(x), self.b(x)]).relu() + self.addend
        y = self.c(nn.functional.pad(x, (0,1,0,1)))
        return self.d(self.bn(torch.cat([x, y], 1)).relu())

def learned_scales():
    "`Scales` with a dead channel, a negative one and a tiny one in its BatchNorm"
    net = Scales().eval()
    net.bn.weight.data.uniform_(.5, 1.5); net.bn.running_mean.uniform_(-.3, .3); net.bn.bias.data.uniform_(.1, .5)
    net.bn.weight.data[:3] = torch.tensor([0., -1., 1e-20])
    return net


def timm_model(arch, size=64, batch=4, **kw):
    "A timm model with random weights made fair, and a batch"
    torch.manual_seed(0)
    model = timm.create_model(arch, num_classes=10, **kw)
    x = torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(1))
    return randomise_(model, x), x
