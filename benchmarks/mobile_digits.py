"""efficientnet_b3 trained on the embedded digits through a Learner, then for a few epochs with QATCallback, and exported: accuracy of the float model, of its simulation and of the shipped file.

So large a network on 1,437 images has activations with very long tails: single images reach 20 times what the others do. The table shows what calibrating alone makes of that, with the default
observer and with one that lets outliers go ('kl', on all training images).

    OMP_NUM_THREADS=1 python benchmarks/mobile_digits.py --out benchmarks/results/mobile_digits.md
"""
import argparse, sys, tempfile, warnings
from pathlib import Path
warnings.filterwarnings('ignore')
import timm, torch
from fastai.vision.all import Learner, accuracy, set_seed
from fastcompress.all import QATCallback, digits, predict_fresh, sim_mode
import fastcompress.callback.quantize
from fastcompress.core import eval_mode, plain
from fastcompress.deploy.mobile import export_float
from fastcompress.measure.quality import agreement, sqnr

def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--arch', default='efficientnet_b3'); p.add_argument('--epochs', type=int, default=16); p.add_argument('--qat', type=int, default=6); p.add_argument('--size', type=int, default=64); p.add_argument('--seed', type=int, default=42); p.add_argument('--out')
    a = p.parse_args()
    set_seed(a.seed, reproducible=True)
    dls = digits(seed=a.seed, size=a.size)
    learn = Learner(dls, timm.create_model(a.arch, num_classes=10), metrics=accuracy)
    with learn.no_bar(): learn.fit_one_cycle(a.epochs, 3e-3)
    xs,ys = zip(*[(plain(x), plain(y)) for x,y in dls.valid])
    x,y = torch.cat(xs),torch.cat(ys)
    acc = lambda out: f'{(out.argmax(1)==y).float().mean().item():.2%}'
    def outputs(model):
        with eval_mode(model): return torch.cat([model(b) for b in x.split(64)])
    want = outputs(learn.model)
    lines = [f'# {a.arch} on digits: float, simulated, shipped', '', '    OMP_NUM_THREADS=1 ' + ' '.join(['python benchmarks/mobile_digits.py', *sys.argv[1:]]), '',
             f'{a.epochs} epochs in float from random weights at {a.size}×{a.size}, {a.qat} with QATCallback; {len(x)} images to validate, seed {a.seed}. The file is loaded in a new process.', '',
             '| | accuracy | dB to float | dB to the simulation | same answer as the simulation | bytes |', '|---|---|---|---|---|---|']
    with tempfile.TemporaryDirectory() as d:
        def shipped(name, want):
            sim = outputs(learn.model)
            r = learn.export_mobile(Path(d)/'phone')
            got = predict_fresh(Path(d)/'phone', x)
            return r, [f'| {name}, simulated | {acc(sim)} | {sqnr(want, sim):.1f} | | | |',
                       f"| {name}, shipped | {acc(got)} | {sqnr(want, got):.1f} | {'exact' if torch.equal(sim, got) else format(sqnr(sim, got), '.1f')} | {agreement(sim, got):.1%} | {r.bytes:,} |"]
        lines.append(f"| float | {acc(want)} | | | | {export_float(learn.model, x[:2], Path(d)/'f.ptl').stat().st_size:,} |")
        for name,kw in {'calibrated':{}, "calibrated, observer='kl'":dict(observer='kl', n_batches=len(dls.train)+1)}.items():
            learn.quantize(**kw)
            lines += shipped(name, want)[1]
            learn.dequantize()
        with learn.no_bar(): learn.fit_one_cycle(a.qat, 1e-3, cbs=QATCallback())
        with sim_mode(learn.model, 'off'): want = outputs(learn.model)
        lines.append(f'| float, after training with rounding | {acc(want)} | | | | |')
        r,rows = shipped('trained with rounding', want)
        lines += rows
        lines += ['', '```', str(r).replace(str(d), ''), '```']
    out = '\n'.join(lines)+'\n'
    print(out)
    if a.out: Path(a.out).write_text(out)

if __name__=='__main__': main()
