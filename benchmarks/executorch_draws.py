"""Our ranges beside those of ExecuTorch's own quantizer, over several draws of weights and images.

executorch_peers judges one draw of random weights, and two equally good quantizers differ there by half a dB and more: the rounding errors of a network's weights are drawn once. Here the models in which
ours came out lower, and one beside them, are drawn anew several times. Both sides are judged before they are lowered (ours by its simulation, theirs by the graph of `convert_pt2e`), on 4 images that neither
saw; both calibrate on the same 8. Random weights made fair, see benchmarks/zoo.py.

    pip install fastcompress[executorch] torchao
    OMP_NUM_THREADS=1 python benchmarks/executorch_draws.py --out benchmarks/results/executorch_draws.md
"""
import copy, logging, statistics, warnings
from functools import partial
warnings.filterwarnings('ignore')
import torch
from executorch_peers import quantized
from fastcompress.measure.quality import sqnr
from fastcompress.quantize.simulate import calibrate_, simulate_
from zoo import attempt, chosen, logits, options, prepared, publish, sweep

MODELS = 'fbnetc_100','botnet26t_256','densenet121','dla34','convmixer_768_32','inception_v3','mobilenetv3_large_100','mnasnet_100','resnet18'

def draw(name, size, seed):
    model,g = prepared(name, size, seed)
    batches = [torch.randn(2, 3, size, size, generator=g) for _ in range(4)]
    x = torch.randn(4, 3, size, size, generator=g)
    want,ours = logits(model, x)[0],copy.deepcopy(model)
    simulate_(ours, x, 'xnnpack')
    calibrate_(ours, batches, show=False)
    theirs = quantized(model, batches, x[:1])
    with torch.no_grad(): return float(sqnr(want, ours(x))), float(sqnr(want, torch.cat([theirs(o) for o in x.split(1)])))

def one(name, size, draws):
    logging.disable(logging.WARNING)
    rows = [attempt(draw, name, size, s) for s in range(draws)]
    return dict(name=name, size=size, ours=[r[0] for r in rows if isinstance(r, tuple)], theirs=[r[1] for r in rows if isinstance(r, tuple)], errors=[r['error'] for r in rows if isinstance(r, dict)])

def main():
    p = options(__doc__)
    p.add_argument('--draws', type=int, default=6)
    a = p.parse_args()
    sizes = chosen(a) if a.models else {n: s for n,s in chosen(a).items() if n in MODELS}
    rows = sweep(partial(one, draws=a.draws), sizes, a.rows, a.jobs)
    lines = ['| model | draws | ours, dB | theirs, dB | ours minus theirs: mean | of the mean, standard error | each |', '|'+'---|'*7]
    for r in rows:
        d = [o-t for o,t in zip(r['ours'], r['theirs'])]
        se = statistics.stdev(d)/len(d)**.5 if len(d)>1 else float('nan')
        lines.append(f"| {r['name']} | {len(d)} | {statistics.mean(r['ours']):.1f} | {statistics.mean(r['theirs']):.1f} | {statistics.mean(d):+.2f} | {se:.2f} | {', '.join(f'{v:+.1f}' for v in d)} |" if d else f"| {r['name']} | 0 | {r['errors'][0]} |"+' |'*4)
    publish(a.out, "Ours beside ExecuTorch's quantizer, draw by draw", 'executorch_draws', [__doc__.split('\n\n')[1], '', *lines])

if __name__=='__main__': main()
