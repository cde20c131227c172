"""Time of integer files over eager float, one thread, batch 1, 224 pixels, in turns.

Random weights made fair (see benchmarks/zoo.py), calibrated on one batch. What is timed are files, loaded by torch's mobile interpreter: `x86` is engine='x86' with the
default fallback, `fastest` the same with fallback='fastest' (which measures on its own, before), `float file` the float model captured and folded (`export_float`).
`called from Python` is the integer model before it is written, for which each operation costs some microseconds more. qnnpack is made for ARM phones: its column says
nothing about the time on one.

    OMP_NUM_THREADS=1 python benchmarks/mobile_speed.py --out benchmarks/results/mobile_speed.md
"""
import argparse, copy, sys, tempfile, warnings
from collections import Counter
from pathlib import Path
warnings.filterwarnings('ignore')
import timm, torch
from fastcompress.cli import cpu_flags, environment
from fastcompress.deploy.capture import capture
from fastcompress.deploy.engines import use_engine
from fastcompress.deploy.fallback import ladder
from fastcompress.deploy.fold import fold_
from fastcompress.deploy.mobile import export_float
from fastcompress.deploy.ptl import load_ptl, save_ptl
from fastcompress.measure.latency import ratio, time_interleaved
from fastcompress.quantize.simulate import calibrate_, simulate_
from zoo import prepared

AIMS = dict(resnet18=.45, resnet50=.45, mobilenetv2_100=.55, mobilenetv3_large_100=.75, efficientnet_b0=.80, densenet121=.50, convnext_atto=.65, vit_tiny_patch16_224=.75)

def one(name, rounds, folder):
    model,g = prepared(name, 224)
    x = torch.randn(1, 3, 224, 224, generator=g)
    def graph():
        gm = capture(model, x)
        fold_(gm)
        return gm
    fs,forms = {'eager':model, 'float file':load_ptl(export_float(model, x, folder/'float.ptl'))},{}
    for engine,fallback in (('x86',True),('x86','fastest'),('qnnpack',True)):
        m = copy.deepcopy(model)
        simulate_(m, x, engine); calibrate_(m, [torch.randn(4, 3, 224, 224, generator=torch.Generator().manual_seed(2))], show=False)
        done = ladder(capture(m, x), engine, (x,), fallback, float_graph=graph, show=False)
        k = engine if fallback is True else 'fastest'
        with use_engine(engine): save_ptl(done.model.body, folder/f'{k}.ptl', (x,))
        fs[k],forms[k] = load_ptl(folder/f'{k}.ptl', engine),done
        if k=='x86': fs['called from Python'] = done.model
    t = time_interleaved(fs, x, n=rounds, warmup=5, threads=1)
    return dict(name=name, ms=t['eager'].median, ratios={k: ratio(t[k], t['eager']) for k in fs if k!='eager'}, done=forms)

def line(r):
    def cell(k): return f"{r['ratios'][k].median:.3f} ({r['ratios'][k].q1:.3f}–{r['ratios'][k].q3:.3f})"
    kept = [t['what'].removesuffix(' in float') for t in r['done']['fastest'].timings if t['kept']]
    floats = Counter(i.op for i in r['done']['x86'].model.islands)
    return (f"| {r['name']} | {r['ms']:.1f} | {cell('float file')} | {cell('x86')} | {AIMS.get(r['name'], '')} | {cell('called from Python')} | {cell('fastest')} | {', '.join(kept) or 'nothing'} | {cell('qnnpack')} | "
            f"{', '.join(f'{v} {k}' for k,v in floats.most_common(4)) or 'nothing'} |")

def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--models', default=','.join([*AIMS, 'regnety_002','ghostnet_100','inception_v3','swin_tiny_patch4_window7_224'])); p.add_argument('--rounds', type=int, default=30); p.add_argument('--out')
    a = p.parse_args()
    env = environment()
    lines = ['# Time of integer files over eager float', '', '    OMP_NUM_THREADS=1 ' + ' '.join(['python benchmarks/mobile_speed.py', *sys.argv[1:]]), '', __doc__.split('\n\n')[1], '',
             f"{env['CPU']} ({', '.join(sorted(cpu_flags()))}), torch {env['torch']}; {a.rounds} rounds; median of the ratios round by round, and quartiles.", '',
             '| model | eager, ms | float file | x86 | aim | called from Python | fastest | it keeps in float | qnnpack | x86 in float |', '|'+'---|'*10]
    for name in a.models.split(','):
        with tempfile.TemporaryDirectory() as d: lines.append(line(one(name, a.rounds, Path(d))))
        print(lines[-1], flush=True)
        if a.out: Path(a.out).write_text('\n'.join(lines)+'\n')

if __name__=='__main__': main()
