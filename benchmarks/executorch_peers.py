"""ExecuTorch files delegated to XNNPACK: our reference graph beside ExecuTorch's own quantization flow.

Each model of benchmarks/timm_models.txt is made by timm with a seed and random weights made fair (see benchmarks/zoo.py). Both calibrate on the same 8 images and
are judged on 4 others. Ours: simulate_ (profile xnnpack), calibrate_, capture, fold, save_pte with an open batch. Theirs: torchao's pt2e with
XNNPACKQuantizer (symmetric, per channel), to_edge_transform_and_lower with XnnpackPartitioner, batch 1. SQNR is of the file's outputs against
the float model's. Latency: batch 1, two files in turn, median of the rounds' ratios; below 1 ours is faster. Seconds are CPU seconds.

    pip install fastcompress[executorch] torchao
    OMP_NUM_THREADS=1 python benchmarks/executorch_peers.py --out benchmarks/results/executorch_peers.md
"""
import copy, gc, logging, statistics, tempfile, time, warnings
from collections import Counter
from functools import partial
from pathlib import Path
warnings.filterwarnings('ignore')
import torch
from fastcompress.deploy.capture import capture
from fastcompress.deploy.executorch import PteModel, check_pte, count_calls, save_pte
from fastcompress.deploy.lower import fold_all_
from fastcompress.measure.latency import ratio, time_interleaved
from fastcompress.measure.quality import sqnr
from fastcompress.quantize.simulate import calibrate_, simulate_
from zoo import attempt, chosen, logits, options, prepared, publish, sweep, tensors

def ours(model, batches, x, path):
    simulate_(model, x, 'xnnpack')
    calibrate_(model, batches, show=False)
    t0 = time.process_time()
    ref = fold_all_(capture(model, x))
    t1 = time.process_time()
    r = save_pte(ref, path, (x,), show=False)
    return dict({k: r[k] for k in ('partitions','int8_partitions','int8','float','portable','roundings','bytes','open_batch')}, s=time.process_time()-t0, lower_s=time.process_time()-t1,
                floats=dict(Counter(f"{f['op']} ({f['where']})" for f in r['floats']))), ref

def quantized(model, batches, x):
    "What torchao's pt2e makes of `model` with ExecuTorch's quantizer: a graph for `x`, one image"
    from executorch.backends.xnnpack.quantizer.xnnpack_quantizer import XNNPACKQuantizer, get_symmetric_quantization_config
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e
    m = prepare_pt2e(torch.export.export(model, (x,)).module(), XNNPACKQuantizer().set_global(get_symmetric_quantization_config(is_per_channel=True)))
    with torch.no_grad():
        for b in batches:
            for i in range(len(b)): m(b[i:i+1])
    return convert_pt2e(m)

def theirs(model, batches, x, path):
    import executorch.exir as exir
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
    args = (x[:1],)
    m = quantized(model, batches, x[:1])
    t0 = time.process_time()
    ep = torch.export.export(m, args)
    t1 = time.process_time()
    edge = exir.to_edge_transform_and_lower(ep, partitioner=[XnnpackPartitioner()])
    path.write_bytes(edge.to_executorch().buffer)
    return dict(count_calls(edge), bytes=path.stat().st_size, s=time.process_time()-t0, lower_s=time.process_time()-t1)

def judged(make, model, batches, x, want, path, check):
    made = make(copy.deepcopy(model), batches, x, path)
    row,ref = made if isinstance(made, tuple) else (made,None)
    file = PteModel(path)
    got = [torch.cat(ts) for ts in zip(*(tensors(file(x[i:i+1])) for i in range(len(x))))]
    row['db'] = min(float(sqnr(a, b)) for a,b in zip(want, got))
    if ref is not None and check:
        c = check_pte(ref, (x,), show=False)
        row.update(checks=len(c), steps=max(o.steps for o in c), share=sum(o.share for o in c)/len(c))
    return row

def one(name, size, check, n, peer):
    logging.disable(logging.WARNING)
    model,g = prepared(name, size, **(dict(img_size=size) if size<224 and name.startswith(('vit','deit')) else {}))
    batches = [torch.randn(2, 3, size, size, generator=g) for _ in range(4)]
    x = torch.randn(4, 3, size, size, generator=g)
    want,row = logits(model, x),dict(name=name, size=size)
    with tempfile.TemporaryDirectory() as d:
        paths = {w: Path(d)/f'{w}.pte' for w in ('ours','theirs')}
        row['ours'] = attempt(judged, ours, model, batches, x, want, paths['ours'], check, seconds=600)
        gc.collect()
        row['theirs'] = attempt(judged, theirs, model, batches, x, want, paths['theirs'], False, seconds=600) if peer else dict(error='not tried')
        if all('error' not in row[w] for w in paths):
            t = time_interleaved({w: PteModel(p) for w,p in paths.items()}, x[:1], n=n)
            row['ratio'],row['ms'] = ratio(t['ours'], t['theirs']).median,t['ours'].median
    return row

def summary(rows):
    both = [r for r in rows if 'db' in r['ours'] and 'db' in r['theirs']]
    d = sorted((r['ours']['db']-r['theirs']['db'], r['name']) for r in both)
    lost = [r['name'] for r in rows if 'error' in r['ours'] and 'error' not in r['theirs']]
    lines = [f"- {sum('error' not in r['ours'] for r in rows)} of {len(rows)} models lower from our graph, {sum('error' not in r['theirs'] for r in rows)} by ExecuTorch's own flow; lowered by that alone: {', '.join(lost) or 'none'}."]
    if not both: return lines
    checked = [r['ours'] for r in rows if 'checks' in r['ours']]
    if checked: lines.append(f"- Node by node against our simulation: {sum(o['checks'] for o in checked):,} operations of {len(checked)} models, largest difference {max(o['steps'] for o in checked)} step, {100*statistics.mean(o['share'] for o in checked):.3f}% of elements differ.")
    lines.append(f"- SQNR of the outputs, ours minus theirs: median {statistics.median(v for v,_ in d):+.1f} dB, lowest {d[0][0]:+.1f} ({d[0][1]}), highest {d[-1][0]:+.1f} ({d[-1][1]}); lower than theirs: {', '.join(f'{n} {v:+.1f}' for v,n in d if v<0) or 'none'}.")
    lines.append(f"- Latency ours / theirs: median {statistics.median(r['ratio'] for r in both):.2f}, {min(r['ratio'] for r in both):.2f} to {max(r['ratio'] for r in both):.2f}. Bytes: median ratio {statistics.median(r['ours']['bytes']/r['theirs']['bytes'] for r in both):.2f}. Lowering CPU seconds: {statistics.median(r['ours']['lower_s'] for r in both):.0f} and {statistics.median(r['theirs']['lower_s'] for r in both):.0f}, median.")
    return lines

def table(rows):
    lines = ['| model, px | | dB | int8 | float | portable | roundings | partitions (int8) | MB | lowering, CPU s | ms, ours / theirs |', '|'+'---|'*11]
    for r in rows:
        for who in 'ours','theirs':
            o,last = r[who],f"{r['ms']:.1f}, {r['ratio']:.2f}" if who=='ours' and 'ratio' in r else ''
            lines.append(f"| {r['name']+', '+str(r['size']) if who=='ours' else ''} | {who} | " + (f"**{o['error']}** |  |  |  |  |  |  |  |  |" if 'error' in o else
                f"{o['db']:.1f} | {o['int8']} | {o['float']} | {o['portable']} | {o['roundings']} | {o['partitions']} ({o['int8_partitions']}) | {o['bytes']/2**20:.1f} | {o['lower_s']:.0f} | {last} |"))
    lines += ['', '**What stays in float in ours**', ''] + [f"- {r['name']}: " + (', '.join(f'{n} × {k}' for k,n in r['ours']['floats'].items()) or 'nothing') for r in rows if 'floats' in r['ours']]
    return lines

def main():
    p = options(__doc__)
    p.add_argument('--size', type=int, help="pixels; each model's own by default"); p.add_argument('--runs', type=int, default=20, help='timed runs of each file'); p.add_argument('--no-check', action='store_true', help='skip the comparison node by node')
    a = p.parse_args()
    sizes = {n: a.size or s for n,s in chosen(a).items()}
    def show(r): return {k: {q: v for q,v in r[k].items() if q!='floats'} for k in ('ours','theirs')}, r.get('ratio')
    rows = sweep(partial(one, check=not a.no_check, n=a.runs, peer=not a.no_peer), sizes, a.rows, a.jobs, show=show)
    publish(a.out, "ExecuTorch files, beside ExecuTorch's own flow", 'executorch_peers', [*summary(rows), '', *table(rows)])

if __name__=='__main__': main()
