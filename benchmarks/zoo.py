"What the sweeps share: the list of timm's models, random weights made fair, a limit on CPU time, and a run over the list that can stop and go on"
import argparse, json, multiprocessing, resource, signal, sys
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from pathlib import Path
import timm, torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

HERE = Path(__file__).parent

def listed():
    "Names in timm_models.txt and the pixels of their inputs"
    rows = (l.split() for l in (HERE/'timm_models.txt').read_text().splitlines() if l.strip() and not l.startswith('#'))
    return {r[0]: int(r[1]) if len(r)>1 else 224 for r in rows}

def fair(model, size, seed=0):
    "BatchNorm gains and learned factors U(0.5, 1.5), learned addends U(-0.2, 0.2), layer scales U(0.1, 0.5), running statistics from three forwards in training mode"
    g = torch.Generator().manual_seed(seed)
    for m in model.modules():
        if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.affine: m.weight.data.uniform_(.5, 1.5, generator=g)
    for n,p in model.named_parameters():
        if n.endswith('.gamma') or '.ls' in n: p.data.uniform_(.1, .5, generator=g)
        if n.endswith('.lab.scale'): p.data.uniform_(.5, 1.5, generator=g)
        if n.endswith('.lab.bias'): p.data.uniform_(-.2, .2, generator=g)
    model.train()
    with torch.no_grad():
        for _ in range(3): model(torch.randn(2, 3, size, size, generator=g))
    return model.eval()

def prepared(name, size, seed=0, **kwargs):
    "A fair model whose heads don't start at zero, and the generator for its inputs; always the same for a seed"
    torch.manual_seed(seed)
    model,g = fair(timm.create_model(name, **kwargs), size, seed),torch.Generator().manual_seed(seed+1)
    for p in model.parameters():
        if p.ndim>1 and not p.any(): p.data.normal_(0, .02, generator=g)
    return model, g

def tensors(out): return [t for t in tree_leaves(out) if isinstance(t, Tensor)]

def logits(model, x):
    with torch.no_grad(): return tensors(model(x))

class Late(Exception): pass
def _late(*_): raise Late()

@contextmanager
def cpu_limit(seconds):
    "Raise `Late` in the body after so many CPU seconds"
    was = signal.signal(signal.SIGPROF, _late)
    signal.setitimer(signal.ITIMER_PROF, seconds)
    try: yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, was)

def attempt(f, *args, seconds=300.):
    "What `f` returns, or a dict whose `error` says why it doesn't"
    try:
        with cpu_limit(seconds): return f(*args)
    except Late: return dict(error=f'not done in {seconds:g} s')
    except Exception as e: return dict(error=f'{type(e).__name__}: {e}'[:300])

def _alone(f, gib, args):
    torch.set_num_threads(1)
    if gib: resource.setrlimit(resource.RLIMIT_AS, (gib<<30, gib<<30)) # a conversion that wants more has failed
    return f(*args)

def options(doc):
    "A parser with what every sweep takes"
    p = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--models', help='comma-separated names; by default the whole list'); p.add_argument('--jobs', type=int, default=1, help='models at a time'); p.add_argument('--no-peer', action='store_true')
    p.add_argument('--out'); p.add_argument('--rows', help='JSON lines, one a model, written as they come; a second run goes on')
    return p

def chosen(a):
    "Names and sizes that the options ask for"
    sizes = listed()
    return {n: sizes.get(n, 224) for n in a.models.split(',')} if a.models else sizes

def _asked():
    "This run's arguments, without where its rows are kept and how many it makes at a time"
    kept,on = [],True
    for a in sys.argv[1:]:
        if a.startswith('--'): on = a.partition('=')[0] not in ('--out','--rows','--jobs','--fx-rows','--peer-rows')
        if on: kept.append(a)
    return kept

def publish(out, title, script, lines):
    "Print the lines; write them, below the command that makes them, if `out` says where"
    print('\n'.join(lines))
    if out: Path(out).write_text('\n'.join([f'# {title}', '', '    '+' '.join([f'OMP_NUM_THREADS=1 python benchmarks/{script}.py', *_asked(), f'--out benchmarks/results/{script}.md']), '', *lines, '']))

def read_rows(path): return [json.loads(l) for l in Path(path).read_text().splitlines()] if path and Path(path).exists() else []

def sweep(one, sizes, path=None, jobs=1, gib=0, show=str):
    "Rows of `one(name, size)` by name, each computed in a process of its own, `jobs` at a time, and added to the JSON lines in `path` as they come; names that are there already are not done again"
    rows,ctx = read_rows(path),multiprocessing.get_context('forkserver')
    ctx.set_forkserver_preload([m for m in sys.modules if m=='timm' or m.startswith('fastcompress')]) # once for all, in the version that is there now
    todo = [n for n in sizes if n not in {r['name'] for r in rows}]
    def row(name):
        with ProcessPoolExecutor(1, mp_context=ctx) as pool:
            try: return pool.submit(_alone, one, gib, (name, sizes[name])).result()
            except BrokenProcessPool: return dict(name=name, size=sizes[name], killed=True)
    with ThreadPoolExecutor(jobs) as pool:
        for done in as_completed(pool.submit(row, n) for n in todo):
            rows.append(r := done.result())
            if path and not r.get('killed'):
                with open(path, 'a') as f: f.write(json.dumps(r)+'\n')
            print(r['name'], 'killed' if r.get('killed') else show(r), file=sys.stderr, flush=True)
    if killed := [r['name'] for r in rows if r.get('killed')]: raise SystemExit(f"killed: {', '.join(killed)}")
    return sorted(rows, key=lambda r: r['name'])
