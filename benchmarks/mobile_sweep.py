"""Every model of benchmarks/timm_models.txt to a qnnpack file, beside torch.ao's FX conversion.

Each model is made by timm with a seed and random weights made fair (see benchmarks/zoo.py). Ours: export_mobile with 4 batches
to calibrate on (every operation compared with its simulation on the file's own bytes), then the file is loaded in a new process and run there with batches
of 4 and 1. FX (torch.ao.quantization, qnnpack's default
qconfig mapping): the same weights and data, converted, scripted (traced if that fails) and saved in the same format.

Columns: dB float to file (of the logits), simulation to file, the same for FX; share of files' answers (highest logit) that agree with the float
model; bytes of the float file over bytes of the integer file; MACs on integers; BatchNorms left in the graph; operations compared, most steps
apart, share of elements that differ; operations left in float.

    OMP_NUM_THREADS=1 python benchmarks/mobile_sweep.py --out benchmarks/results/mobile_sweep.md
"""
import copy, math, os, statistics, subprocess, sys, tempfile, time, warnings
from collections import Counter
from functools import partial
from pathlib import Path
warnings.filterwarnings('ignore')
import numpy as np, torch
from fastcompress.deploy.mobile import export_float, export_mobile
from fastcompress.measure.quality import agreement, sqnr
from simulate_sweep import fx
from zoo import attempt, chosen, logits, options, prepared, publish, read_rows, sweep

FRESH = '''import sys, warnings; warnings.filterwarnings('ignore')
import numpy as np, torch
from torch.jit.mobile import _load_for_lite_interpreter
torch.set_num_threads(1); torch.backends.quantized.engine = 'qnnpack'
m,x = _load_for_lite_interpreter(sys.argv[1]),torch.from_numpy(np.load(sys.argv[2]))
flat = lambda o: [o] if isinstance(o, torch.Tensor) else [t for p in o for t in flat(p)]
np.savez(sys.argv[3], *[t.numpy() for t in flat(m(x))], one=flat(m(x[:1]))[0].numpy())'''

def fresh(path, x, folder):
    "Outputs for a batch and for its first sample alone, computed in a new process"
    np.save(folder/'x.npy', x.numpy())
    r = subprocess.run([sys.executable, '-c', FRESH, path, folder/'x.npy', folder/'y.npz'], capture_output=True, text=True, env={**os.environ, 'PYTHONPATH':''})
    if r.returncode: raise RuntimeError('fresh process: '+r.stderr.strip().splitlines()[-1][:200])
    with np.load(folder/'y.npz') as z: return [torch.from_numpy(z[k]) for k in z.files if k.startswith('arr_')], torch.from_numpy(z['one'])

def top(a, b): return agreement(a, b) if a.ndim==2 and a.shape==b.shape else None

def ours(model, batches, x, want, folder):
    t0 = time.process_time()
    r = export_mobile(model, x, folder/'phone', calibration=batches, show=False)
    seconds = time.process_time()-t0
    float_bytes = export_float(model, x, folder/'f.ptl').stat().st_size
    got,one = fresh(folder/'phone'/'model.ptl', x, folder)
    db = min(sqnr(s, t) for s,t in zip(want, got))
    return dict(form=r.details.get('form', 'integer'), how=r.how, db=db, db_sim=r.sqnr_sim, db_one=sqnr(got[0][:1], one), exact=math.isinf(r.sqnr_sim), top=top(want[0], got[0]), float_bytes=float_bytes, bytes=r.bytes, int_share=r.int_share,
        fixed=r.fixed_batch, norms=sum(i.op=='batch_norm' for i in r.islands), ops=r.ops, steps=r.max_steps, share=r.differing, floats=Counter(f'{i.op}: {i.reason}' for i in r.islands), notes=r.notes, seconds=seconds)

def save_fx(folder, x):
    def _save(m):
        try: s = torch.jit.script(m)
        except Exception: s = torch.jit.trace(m, x, check_trace=False)
        s._save_for_lite_interpreter(str(folder/'fx.ptl'))
        return dict(bytes=(folder/'fx.ptl').stat().st_size)
    return _save

def one(name, size, limit, peer, known):
    model,g = prepared(name, size)
    batches = [torch.randn(2, 3, size, size, generator=g) for _ in range(4)]
    x = torch.randn(4, 3, size, size, generator=g)
    want = logits(model, x)
    with tempfile.TemporaryDirectory() as d:
        mine = attempt(ours, copy.deepcopy(model), batches, x, want, Path(d), seconds=600)
        return dict(name=name, size=size, ours=mine, fx=known.get(name) or (fx(model, batches, x, want, limit, save_fx(Path(d), x)) if peer else {}))

def median(xs): return statistics.median(xs) if (xs := list(xs)) else float('nan')

def summary(rows):
    ok = [r for r in rows if 'error' not in r['ours']]
    o = [r['ours'] for r in ok]
    gap = sorted(x['db_sim']-x['db'] for x in o)
    lines = [f"- {len(ok)} of {len(rows)} models give a file that loads in a new process under qnnpack and runs batches of 1 and 4 ({sum(x['fixed'] is None and x['how']=='scripted' for x in o)} with an open batch); form: {', '.join(f'{k} {v}' for k,v in Counter(x['form'] for x in o).most_common())}.",
        f"- Operation by operation, on the file's own bytes: {sum(x['ops'] for x in o):,} compared, at most {max(x['steps'] for x in o)} step apart; share of elements that differ, median {median(x['share'] for x in o):.4%}, highest {max(x['share'] for x in o):.4%}.",
        f"- The file equals the simulation bit for bit at the logits in {sum(x['exact'] for x in o)} models. dB(simulation, file) minus dB(float, file): median {median(gap):.1f}, lowest {gap[0]:+.1f}; below 0: {', '.join(r['name'] for r in ok if r['ours']['db_sim']<r['ours']['db']) or 'none'}.",
        f"- dB(float, file): median {median(x['db'] for x in o):.1f}, lowest {min(x['db'] for x in o):.1f}. Same highest logit as float on {sum(x['top']*4 for x in o if x['top'] is not None)/sum(4 for x in o if x['top'] is not None):.1%} of the inputs (random ones, to random weights).",
        f"- Bytes, float file over integer file: median {median(x['float_bytes']/x['bytes'] for x in o):.2f}, lowest {min(x['float_bytes']/x['bytes'] for x in o):.2f}. MACs on integers: median {median(x['int_share'] for x in o):.1%}. BatchNorms left in a graph: none; as scale and shift in float: {sum(x['norms'] for x in o)}.",
        f"- CPU seconds, one thread, from the model to the verified bundle: median {median(x['seconds'] for x in o):.0f}, most {max(x['seconds'] for x in o):.0f}."]
    both = [r for r in ok if 'db' in r['fx']]
    if both:
        d,b = sorted(r['ours']['db']-r['fx']['db'] for r in both),[(r['fx']['bytes']/r['ours']['bytes'], r['name']) for r in both if 'bytes' in r['fx']]
        lines.append(f"- FX converts and runs {sum('db' in r['fx'] for r in rows)} of {len(rows)} ({', '.join(f'{k} {v}' for k,v in Counter(r['fx'].get('error') for r in rows if 'error' in r['fx']).most_common())}). On the {len(both)} that both do, ours minus FX: median {median(d):+.1f} dB, lowest {d[0]:+.1f}; below FX: {', '.join(r['name'] for r in both if r['ours']['db']<r['fx']['db']) or 'none'}. FX's ratio of bytes: median {median(r['ours']['float_bytes']/r['fx']['bytes'] for r in both if 'bytes' in r['fx']):.2f}; files larger than FX's: {', '.join(f'{n} ({1/v-1:+.1%})' for v,n in sorted(b) if v<1) or 'none'}.")
    floats,macs = Counter(),Counter()
    for x in o: floats.update(x['floats']); macs.update({k:1 for k in x['floats']})
    lines += ['- Most frequent in float:'] + [f'    - {n} in {macs[k]} models: {k}' for k,n in floats.most_common(14)]
    return lines

def table(rows):
    def fx(r): return f"{r['fx']['db']:.1f}" if 'db' in r['fx'] else r['fx'].get('error', '')
    lines = ['| model | dB file | dB simulation to file | FX dB | top-1 | bytes ratio | FX | MACs int | compared | steps | differ | in float |', '|'+'---|'*12]
    for r in rows:
        if 'error' in (x := r['ours']): lines.append(f"| {r['name']} | **{x['error']}** | | {fx(r)} |||||||||"); continue
        pct = lambda v: '' if v is None else f'{v:.0%}'
        lines.append(f"| {r['name']} | {x['db']:.1f} | {'exact' if x['exact'] else format(x['db_sim'], '.1f')} | {fx(r)} | {pct(x['top'])} | {x['float_bytes']/x['bytes']:.2f} | {format(x['float_bytes']/r['fx']['bytes'], '.2f') if 'bytes' in r['fx'] else ''} | {x['int_share']:.1%} | {x['ops']} | {x['steps']} | {x['share']:.4%} | {sum(x['floats'].values())} |")
    return lines

def main():
    p = options(__doc__)
    p.add_argument('--limit', type=float, default=60., help='CPU seconds that FX may take')
    p.add_argument('--fx-rows', nargs='*', default=[], help="rows of earlier runs, whose FX results (which don't depend on this code) are taken over")
    a = p.parse_args()
    known = {r['name']: r['fx'] for f in a.fx_rows for r in read_rows(f) if r['fx']}
    def show(r): return {k: v for k,v in r['ours'].items() if k!='floats'}, r['fx']
    rows = sweep(partial(one, limit=a.limit, peer=not a.no_peer, known=known), chosen(a), a.rows, a.jobs, gib=12, show=show)
    publish(a.out, f'{len(rows)} timm models to qnnpack files', 'mobile_sweep', [*__doc__.split('\n\n')[1:3], '', *summary(rows), '', *table(rows)])

if __name__=='__main__': main()
