"""What watching activations costs: time of a forward under `simulate_` in 'observe' mode over the plain forward, one row per observer.

All candidates of a model take turns, one forward each per round in rotating order, and a ratio is formed inside each round. The clock is
the processor time of this process, so that a busy machine disturbs less. 'nothing' is an observer that doesn't look: what remains is the
cost of seeing every operation. Weights are observed in the first forward alone, which is not counted.

    python benchmarks/observe_cost.py --out benchmarks/results/observe_cost.md
"""
import argparse, sys, time, warnings
from pathlib import Path
warnings.filterwarnings('ignore')
import timm, torch
from fastcompress.measure.latency import ratio, time_interleaved
from fastcompress.quantize.observe import observers
from fastcompress.quantize.simulate import sim_mode, simulate_

class Nothing:
    "An observer that doesn't look"
    def update_(self, x): pass

KINDS = ['nothing','minmax','moving_average','mse','percentile','lp','kl','aciq'] # from 'mse' on they watch alike and differ in the answer

def watched(name, x, observer, layout):
    "A function that runs the model `name` with its activations under observation; and how many are"
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=10).eval().to(memory_format=layout)
    sim = simulate_(model, x, observer=observer)
    def _f(x):
        with sim_mode(model, 'observe'): return model(x)
    return _f, sum(not q.is_weight for q in sim.quantizers.values())

def measure(name, args, layout):
    "Rows of the table for one model"
    torch.manual_seed(0)
    x = torch.randn(args.batch, 3, args.size, args.size).contiguous(memory_format=layout)
    fs = {'plain': timm.create_model(name, num_classes=10).eval().to(memory_format=layout)}
    for k in KINDS: fs[k],n = watched(name, x, Nothing if k=='nothing' else observers[k], layout)
    times = time_interleaved(fs, x, n=args.rounds, warmup=3, threads=args.threads, clock=time.process_time)
    how = 'channels_last' if layout is torch.channels_last else 'contiguous'
    for k in KINDS:
        r = ratio(times[k], times['plain'])
        yield f'| {name} | {how} | {n} | {k} | {r.median:.3f} | {r.q1:.3f} – {r.q3:.3f} | {times[k].median:.1f} | {times["plain"].median:.1f} |'

def main():
    p = argparse.ArgumentParser()
    p.add_argument('--models', default='resnet18,mobilenetv2_100')
    p.add_argument('--batch', type=int, default=16)
    p.add_argument('--size', type=int, default=64)
    p.add_argument('--rounds', type=int, default=30)
    p.add_argument('--threads', type=int, default=1)
    p.add_argument('--out')
    args = p.parse_args()
    rows = [r for m in args.models.split(',') for layout in (torch.contiguous_format, torch.channels_last) for r in measure(m, args, layout)]
    text = '\n'.join(['# What watching activations costs', '', '    python benchmarks/observe_cost.py '+' '.join(sys.argv[1:]), '',
                      f'{args.threads} thread, batch {args.batch}, {args.size} px, {args.rounds} rounds, processor time. \'nothing\' sees every operation and looks at none.', '',
                      '| model | memory | activations watched | observer | time / plain: median | quartiles | ms | plain, ms |', '|---|---|---|---|---|---|---|---|', *rows, ''])
    print(text)
    if args.out: Path(args.out).write_text(text)

if __name__=='__main__': main()
