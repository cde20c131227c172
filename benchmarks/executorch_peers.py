"""ExecuTorch files delegated to XNNPACK: our reference graph beside ExecuTorch's own quantization flow.

Each model is made by timm with a seed and random weights made fair (as in benchmarks/channels_sweep.py). Both calibrate on the same 8 images and
are judged on 4 others. Ours: simulate_ (profile xnnpack), calibrate_, capture, fold, save_pte with an open batch. Theirs: torchao's pt2e with
XNNPACKQuantizer (symmetric, per channel), to_edge_transform_and_lower with XnnpackPartitioner, batch 1. SQNR is of the file's outputs against
the float model's. Latency: batch 1, two files in turn, median of each; below 1 ours is faster. Seconds are CPU seconds.

    pip install fastcompress[executorch] torchao
    OMP_NUM_THREADS=1 python benchmarks/executorch_peers.py --rows rows.jsonl --out benchmarks/results/executorch_peers.md
"""
import argparse, copy, gc, json, logging, statistics, sys, tempfile, time, warnings
from collections import Counter
from pathlib import Path
warnings.filterwarnings('ignore')
import timm, torch
from fastcompress.deploy.capture import capture
from fastcompress.deploy.executorch import PteModel, check_pte, count_calls, save_pte
from fastcompress.deploy.lower import fold_all_
from fastcompress.measure.quality import sqnr
from fastcompress.quantize.simulate import calibrate_, simulate_
from channels_sweep import fair

MODELS = '''resnet18 resnet50 mobilenetv2_100 mobilenetv3_large_100 efficientnet_b0 regnety_002 convnext_atto vit_tiny_patch16_224 repvgg_a0 densenet121
regnetx_002 efficientnet_lite0 ghostnet_100 vgg11_bn dla34 ese_vovnet19b_dw lcnet_050 edgenext_xx_small'''.split()

def message(e): return f'{type(e).__name__}: {str(e).strip().splitlines()[0] if str(e).strip() else ""}'[:160]

def ours(model, batches, x, path):
    simulate_(model, x, 'xnnpack')
    calibrate_(model, batches, show=False)
    t0 = time.process_time()
    ref = fold_all_(capture(model, x))
    t1 = time.process_time()
    r = save_pte(ref, path, (x,), show=False)
    return dict({k: r[k] for k in ('partitions','int8_partitions','int8','float','portable','roundings','bytes','open_batch')}, s=time.process_time()-t0, lower_s=time.process_time()-t1,
                floats=dict(Counter(f"{f['op']} ({f['where']})" for f in r['floats']))), ref

def theirs(model, batches, x, path):
    import executorch.exir as exir
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
    from executorch.backends.xnnpack.quantizer.xnnpack_quantizer import XNNPACKQuantizer, get_symmetric_quantization_config
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e
    args = (x[:1],)
    m = prepare_pt2e(torch.export.export(model, args).module(), XNNPACKQuantizer().set_global(get_symmetric_quantization_config(is_per_channel=True)))
    with torch.no_grad():
        for b in batches:
            for i in range(len(b)): m(b[i:i+1])
    t0 = time.process_time()
    ep = torch.export.export(convert_pt2e(m), args)
    t1 = time.process_time()
    edge = exir.to_edge_transform_and_lower(ep, partitioner=[XnnpackPartitioner()])
    path.write_bytes(edge.to_executorch().buffer)
    return dict(count_calls(edge), bytes=path.stat().st_size, s=time.process_time()-t0, lower_s=time.process_time()-t1)

def latency(files, x, n):
    "Median seconds of each, in turn"
    ts = [[] for _ in files]
    for i in range(n+3):
        for f,t in zip(files, ts):
            t0 = time.perf_counter(); f(x); t.append(time.perf_counter()-t0)
    return [statistics.median(t[3:]) for t in ts]

def one(name, size, check, n):
    torch.manual_seed(0)
    model,g = fair(timm.create_model(name, **(dict(img_size=size) if name.startswith(('vit','deit')) else {})), size),torch.Generator().manual_seed(1)
    for p in model.parameters():
        if p.ndim>1 and not p.any(): p.data.normal_(0, .02, generator=g) # heads that start at zero
    batches = [torch.randn(2, 3, size, size, generator=g) for _ in range(4)]
    x,row,files = torch.randn(4, 3, size, size, generator=g),dict(name=name, size=size),{}
    with torch.no_grad(): want = model(x)
    with tempfile.TemporaryDirectory() as d:
        for who,f in ('ours',ours),('theirs',theirs):
            path = Path(d)/f'{who}.pte'
            try:
                r = f(copy.deepcopy(model), batches, x, path)
                row[who],ref = r if isinstance(r, tuple) else (r,None)
                files[who] = PteModel(path)
                row[who]['db'] = float(sqnr(want, torch.cat([files[who](x[i:i+1]) for i in range(len(x))])))
                if ref is not None and check:
                    c = check_pte(ref, (x,), show=False)
                    row[who].update(checks=len(c), steps=max(o.steps for o in c), share=sum(o.share for o in c)/len(c))
            except Exception as e: row[who] = dict(error=message(e))
            gc.collect()
        if len(files)==2 and all('error' not in row[k] for k in files):
            a,b = latency([files['ours'], files['theirs']], x[:1], n)
            row['ratio'],row['ms'] = a/b,1e3*a
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
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--models', help='comma-separated names'); p.add_argument('--size', type=int, default=96); p.add_argument('--runs', type=int, default=40, help='timed runs of each file')
    p.add_argument('--no-check', action='store_true', help='skip the comparison node by node'); p.add_argument('--out'); p.add_argument('--rows', help='JSON lines, one a model, written as they come; a second run goes on')
    a = p.parse_args()
    torch.set_num_threads(1)
    logging.disable(logging.WARNING)
    rows = [json.loads(l) for l in Path(a.rows).read_text().splitlines()] if a.rows and Path(a.rows).exists() else []
    for name in (a.models.split(',') if a.models else MODELS):
        if name in {r['name'] for r in rows}: continue
        rows.append(one(name, a.size, not a.no_check, a.runs))
        gc.collect()
        if a.rows: Path(a.rows).open('a').write(json.dumps(rows[-1])+'\n')
        r = rows[-1]
        print(name, {k: {q: v for q,v in r[k].items() if q!='floats'} for k in ('ours','theirs')}, r.get('ratio'), file=sys.stderr, flush=True)
    lines = [*summary(rows), '', *table(rows)]
    print('\n'.join(lines))
    if a.out: Path(a.out).write_text('# ExecuTorch files, beside ExecuTorch\'s own flow\n\n    OMP_NUM_THREADS=1 python benchmarks/executorch_peers.py --out benchmarks/results/executorch_peers.md\n\n' + '\n'.join(lines) + '\n')

if __name__=='__main__': main()
