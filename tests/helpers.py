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


def timm_model(arch, size=64, batch=4, **kw):
    "A timm model with random weights made fair, and a batch"
    torch.manual_seed(0)
    model = timm.create_model(arch, num_classes=10, **kw)
    x = torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(1))
    return randomise_(model, x), x
