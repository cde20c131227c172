"""Quantization simulated on every model of benchmarks/timm_models.txt, beside torch.ao's FX conversion.

Each model is made by timm with a seed and random weights made fair (see benchmarks/zoo.py). Ours: simulate_ with the profile
(per channel, W8A8), calibrate_ on 4 batches, logits SQNR of the simulated against the float model on another batch; then one forward and
backward in training mode, loss and gradients finite. FX (torch.ao.quantization, qnnpack's default qconfig mapping) with the same weights and
the same data: prepare_fx, calibrate, convert_fx, run the converted model.

    OMP_NUM_THREADS=1 python benchmarks/simulate_sweep.py --out benchmarks/results/simulate_sweep.md
"""
import copy, statistics, sys, time, warnings
from collections import Counter
from functools import partial
warnings.filterwarnings('ignore')
import torch
from fastcompress.measure.quality import sqnr
from fastcompress.quantize.simulate import calibrate_, simulate_, simulation
from zoo import Late, attempt, chosen, cpu_limit, logits, options, prepared, publish, sweep, tensors

def ours(model, batches, x, want, profile):
    t0 = time.process_time(); simulate_(model, x, profile)
    t1 = time.process_time(); calibrate_(model, batches, show=False)
    t2 = time.process_time()
    sim,got = simulation(model),logits(model, x)
    row = dict(db=min(float(sqnr(a, b)) for a,b in zip(want, got)), acts=len(sim.placement.acts), weights=len(sim.placement.weights), floats=dict(Counter(n.rpartition(':')[2].partition('.')[0] for n in sim.placement.floats)),
               place=t1-t0, calibrate=t2-t1)
    loss = sum(t.float().square().mean() for t in tensors(model.train()(x)))
    loss.backward()
    grads = [p.grad for p in model.parameters() if p.grad is not None]
    with_grad = sum(p.grad is not None for p in model.parameters())/len(list(model.parameters()))
    return dict(row, problem=None if loss.isfinite() and all(g.isfinite().all() for g in grads) and with_grad>.5 else f'loss {loss.item():.3g}, gradients finite {all(g.isfinite().all() for g in grads)}, {with_grad:.0%} have one')

def fx(model, batches, x, want, limit, save=None):
    from torch.ao.quantization import get_default_qconfig_mapping
    from torch.ao.quantization.quantize_fx import convert_fx, prepare_fx
    was,torch.backends.quantized.engine = torch.backends.quantized.engine,'qnnpack'
    try:
        with cpu_limit(limit), torch.no_grad():
            m = prepare_fx(model.eval(), get_default_qconfig_mapping('qnnpack'), (x,))
            for b in batches: m(b)
            m = convert_fx(m)
            got = tensors(m(x))
        return dict(db=min(float(sqnr(a, b)) for a,b in zip(want, got)), **(save(m) if save else {}))
    except Late: return dict(error=f'not done in {limit:g} s')
    except Exception as e: return dict(error=type(e).__name__)
    finally: torch.backends.quantized.engine = was

def one(name, size, profiles, limit, peer):
    model,g = prepared(name, size)
    batches = [torch.randn(2, 3, size, size, generator=g) for _ in range(4)]
    x = torch.randn(4, 3, size, size, generator=g)
    want = logits(model, x)
    mine = {p: attempt(ours, copy.deepcopy(model), batches, x, want, p) for p in profiles}
    return dict(name=name, size=size, ours=mine, fx=fx(model, batches, x, want, limit) if peer else {})

def summary(rows, profiles):
    lines = []
    for p in profiles:
        ok = [r for r in rows if 'error' not in r['ours'][p] and not r['ours'][p]['problem']]
        lines.append(f"- Profile {p}: {len(ok)} of {len(rows)} models observe, calibrate, run forward and train with finite loss and gradients. SQNR of the logits, median {statistics.median(r['ours'][p]['db'] for r in ok):.1f} dB, lowest {min(r['ours'][p]['db'] for r in ok):.1f}. CPU seconds, one thread: placement median {statistics.median(r['ours'][p]['place'] for r in ok):.2f}, calibration on 8 images {statistics.median(r['ours'][p]['calibrate'] for r in ok):.2f}.")
        both = [r for r in ok if 'db' in r['fx']]
        if both:
            d = sorted(r['ours'][p]['db']-r['fx']['db'] for r in both)
            low = [r['name'] for r in both if r['ours'][p]['db']<r['fx']['db']]
            lines.append(f"  FX converts and runs {sum('db' in r['fx'] for r in rows)} of {len(rows)} ({', '.join(f'{k} {v}' for k,v in Counter(r['fx'].get('error') for r in rows if 'error' in r['fx']).most_common())}). On the {len(both)} both do: ours minus FX median {statistics.median(d):+.1f} dB, lowest {d[0]:+.1f}; below FX: {', '.join(low) or 'none'}.")
    return lines

def table(rows, profiles):
    lines = ['| model | ' + ' | '.join(f'{p}: dB | grids, weights | problem' for p in profiles) + ' | FX: dB |', '|'+'---|'*(3*len(profiles)+2)]
    for r in rows:
        cells = [f"{o['db']:.1f} | {o['acts']}, {o['weights']} | {o['problem'] or ''}" if 'error' not in (o := r['ours'][p]) else f"  |  | **{o['error']}**" for p in profiles]
        peer = r['fx'].get('error') or format(r['fx'].get('db', float('nan')), '.1f')
        lines.append(f"| {r['name']} | {' | '.join(cells)} | {peer} |")
    return lines

def main():
    p = options(__doc__)
    p.add_argument('--profiles', default='qnnpack'); p.add_argument('--limit', type=float, default=60., help='CPU seconds that FX may take')
    a = p.parse_args()
    profiles = a.profiles.split(',')
    def show(r): return {p: {k: v for k,v in o.items() if k in ('db','problem','error')} for p,o in r['ours'].items()}, r['fx']
    rows = sweep(partial(one, profiles=profiles, limit=a.limit, peer=not a.no_peer), chosen(a), a.rows, a.jobs, show=show)
    publish(a.out, f'Quantization simulated on {len(rows)} timm models', 'simulate_sweep', [*summary(rows, profiles), '', *table(rows, profiles)])

if __name__=='__main__': main()
