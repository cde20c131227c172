"""BatchNorms and constant factors folded on every model of benchmarks/timm_models.txt, beside fasterai's BN_Folder.

Each model is made by timm with a seed and random weights made fair (as in benchmarks/channels_sweep.py); a tenth of the BatchNorm gains is
turned negative and the first of each set to zero. Columns: BatchNorms that the model calls; folded into a contraction; written as scale and
shift; left; the same after blocks were collapsed by their own method; other constant factors and addends folded; constant operations computed;
output of the folded against the unfolded model, dB. The peer folds a copy of the same model; what counts are the BatchNorms that its result has lost.

    pip install fasterai==0.4.1
    OMP_NUM_THREADS=1 python benchmarks/fold_sweep.py --out benchmarks/results/fold_sweep.md
"""
import argparse, copy, gc, json, signal, statistics, sys, time, warnings
from pathlib import Path
warnings.filterwarnings('ignore')
import timm, torch
from torch import nn
from fastcompress.deploy.capture import capture, op_of
from fastcompress.deploy.fold import fold_, reparameterise_
from fastcompress.measure.count import n_subnormal
from fastcompress.measure.quality import sqnr
from channels_sweep import HERE, Late, _late, fair, tensors

def made(name, size):
    torch.manual_seed(0)
    model,g = fair(timm.create_model(name), size),torch.Generator().manual_seed(1)
    for m in model.modules():
        if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.affine:
            m.weight.data[torch.rand(m.weight.shape, generator=g)<.1] *= -1
            m.weight.data[0] = 0
    for p in model.parameters():
        if p.ndim>1 and not p.any(): p.data.normal_(0, .02, generator=g) # heads that start at zero
    return model, torch.randn(2, 3, size, size, generator=g)

def logits(model, x):
    with torch.no_grad(): return tensors(model(x))

def agree(want, got): return min(float(sqnr(a, b)) for a,b in zip(want, got))

def folded(model, x, want):
    g = capture(model, x)
    norms = sum(op_of(n)=='batch_norm' for n in g.graph.nodes)
    t0 = time.process_time(); r = fold_(g, db=0)
    return dict(norms=norms, bn=r.bn, bn_affine=r.bn_affine, left=r.left, affine=r.affine, constants=r.constants, flushed=r.flushed, subnormal=n_subnormal(g), db=agree(want, logits(g, x)), s=time.process_time()-t0)

def one(name, size):
    model,x = made(name, size)
    want,row = logits(model, x),dict(name=name, size=size)
    signal.setitimer(signal.ITIMER_PROF, 300)
    try:
        row['plain'] = folded(model, x, want)
        done = reparameterise_(model, x)
        row['blocks'],row['not'] = len(done.done),done.left
        if done.done: row['reparam'] = folded(model, x, want)
    except Late: row['error'] = 'not done in 300 s'
    except Exception as e: row['error'] = f'{type(e).__name__}: {e}'[:200]
    finally: signal.setitimer(signal.ITIMER_PROF, 0)
    return row

def peer(name, size):
    "BatchNorms in the model, and how many fasterai's folder takes out"
    from fasterai.misc.all import BN_Folder
    def count(m): return sum(isinstance(o, nn.modules.batchnorm._BatchNorm) for o in m.modules())
    model,x = made(name, size)
    new = BN_Folder().fold(copy.deepcopy(model))
    return dict(name=name, norms=count(model), folded=count(model)-count(new.eval()), db=agree(logits(model, x), logits(new, x)))

def summary(rows):
    ok = [r for r in rows if 'error' not in r]
    tot = lambda k: sum(r['plain'][k] for r in ok)
    best = [r.get('reparam', r['plain']) for r in ok]
    return [f"- {len(ok)} of {len(rows)} models fold. {tot('norms')} BatchNorms: {tot('bn')} folded into a contraction, {tot('bn_affine')} written as scale and shift, {tot('left')} left. {tot('affine')} other constant factors and addends folded, {tot('constants')} operations on constants computed.",
            f"- {sum(r['blocks']>0 for r in ok)} models have blocks that collapse by their own method ({sum(r['blocks'] for r in ok)} blocks, {sum(len(r['not']) for r in ok)} refused); with those collapsed first {sum(b['bn_affine'] for b in best)} BatchNorms remain as scale and shift in all {len(ok)}.",
            f"- Output of the folded against the unfolded model, float32: median {statistics.median(b['db'] for b in best):.0f} dB, lowest {min(b['db'] for b in best):.0f} dB ({min(zip((b['db'] for b in best), (r['name'] for r in ok)))[1]}). Subnormal numbers after folding: {sum(b['subnormal'] for b in best)} ({sum(b['flushed'] for b in best)} flushed). CPU seconds to fold, median {statistics.median(b['s'] for b in best):.2f}, largest {max(b['s'] for b in best):.1f}."]

def table(rows, peers):
    lines = ['| model | BatchNorms | folded | scale and shift | left | blocks collapsed | then BatchNorms: folded, scale and shift | factors folded | constants | dB |', '|'+'---|'*10]
    for r in rows:
        if 'error' in r: lines.append(f"| {r['name']} | **{r['error']}** |" + ' |'*8); continue
        p,q = r['plain'],r.get('reparam')
        then,last = (f"{q['bn']}, {q['bn_affine']}", q) if q else ('', p)
        lines.append(f"| {r['name']} | {p['norms']} | {p['bn']} | {p['bn_affine'] or ''} | {p['left'] or ''} | {r['blocks'] or ''} | {then} | {last['affine'] or ''} | {last['constants'] or ''} | {last['db']:.0f} |")
    if peers: lines += ['', '| fasterai 0.4.1, BN_Folder | BatchNorms | folded | dB |', '|'+'---|'*4, *[f"| {p['name']} | {p['norms']} | {p['folded']} | {p['db']:.0f} |" for p in peers]]
    return lines

def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--models', help='comma-separated names; by default the whole list'); p.add_argument('--no-peer', action='store_true')
    p.add_argument('--out'); p.add_argument('--rows', help='JSON lines, one a model, written as they come; a second run goes on')
    a = p.parse_args()
    torch.set_num_threads(1)
    signal.signal(signal.SIGPROF, _late)
    listed = dict((l.split()+['224'])[:2] for l in (HERE/'timm_models.txt').read_text().splitlines() if l.strip() and not l.startswith('#'))
    rows = [json.loads(l) for l in Path(a.rows).read_text().splitlines()] if a.rows and Path(a.rows).exists() else []
    for name in (a.models.split(',') if a.models else listed):
        if name in {r['name'] for r in rows}: continue
        rows.append(one(name, int(listed.get(name, 224))))
        gc.collect()
        if a.rows: Path(a.rows).open('a').write(json.dumps(rows[-1])+'\n')
        print(json.dumps(rows[-1]), file=sys.stderr, flush=True)
    peers = [] if a.no_peer else [peer(n, 224) for n in ('mobilenetv3_large_100','repvgg_a0','efficientnet_lite0')]
    lines = [*summary(rows), '', *table(rows, peers)]
    print('\n'.join(lines))
    if a.out: Path(a.out).write_text(f'# Folded: {len(rows)} timm models\n\n    OMP_NUM_THREADS=1 python benchmarks/fold_sweep.py --out benchmarks/results/fold_sweep.md\n\n' + '\n'.join(lines) + '\n')

if __name__=='__main__': main()
