"""BatchNorms and constant factors folded on every model of benchmarks/timm_models.txt, beside fasterai's BN_Folder.

Each model is made by timm with a seed and random weights made fair (see benchmarks/zoo.py); a tenth of the BatchNorm gains is
turned negative and the first of each set to zero. Columns: BatchNorms that the model calls; folded into a contraction; written as scale and
shift; left; the same after blocks were collapsed by their own method; other constant factors and addends folded; constant operations computed;
output of the folded against the unfolded model, dB. The peer folds a copy of the same model; what counts are the BatchNorms that its result has lost.

    pip install fasterai==0.4.1
    OMP_NUM_THREADS=1 python benchmarks/fold_sweep.py --out benchmarks/results/fold_sweep.md
"""
import copy, json, statistics, time, warnings
warnings.filterwarnings('ignore')
import torch
from torch import nn
from fastcompress.deploy.capture import capture, op_of
from fastcompress.deploy.fold import fold_, reparameterise_
from fastcompress.measure.count import n_subnormal
from fastcompress.measure.quality import sqnr
from zoo import attempt, chosen, logits, options, prepared, publish, sweep

def made(name, size):
    model,g = prepared(name, size)
    for m in model.modules():
        if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.affine:
            m.weight.data[torch.rand(m.weight.shape, generator=g)<.1] *= -1
            m.weight.data[0] = 0
    return model, torch.randn(2, 3, size, size, generator=g)

def agree(want, got): return min(float(sqnr(a, b)) for a,b in zip(want, got))

def folded(model, x, want):
    g = capture(model, x)
    norms = sum(op_of(n)=='batch_norm' for n in g.graph.nodes)
    t0 = time.process_time(); r = fold_(g, db=0)
    return dict(norms=norms, bn=r.bn, bn_affine=r.bn_affine, left=r.left, affine=r.affine, constants=r.constants, flushed=r.flushed, subnormal=n_subnormal(g), db=agree(want, logits(g, x)), s=time.process_time()-t0)

def one(name, size):
    model,x = made(name, size)
    want = logits(model, x)
    def both():
        row,done = dict(plain=folded(model, x, want)),reparameterise_(model, x)
        if done.done: row['reparam'] = folded(model, x, want)
        return {**row, 'blocks':len(done.done), 'not':done.left}
    return dict(name=name, size=size, **attempt(both))

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
    a = options(__doc__).parse_args()
    rows = sweep(one, chosen(a), a.rows, a.jobs, show=json.dumps)
    torch.set_num_threads(1)
    peers = [] if a.no_peer else [peer(n, 224) for n in ('mobilenetv3_large_100','repvgg_a0','efficientnet_lite0')]
    publish(a.out, f'Folded: {len(rows)} timm models', 'fold_sweep', [*summary(rows), '', *table(rows, peers)])

if __name__=='__main__': main()
