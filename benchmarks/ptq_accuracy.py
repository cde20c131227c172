"""Post-training quantization of networks that suffer from it, and what helps, on digits.

MobileNetV3 and EfficientNet-B0 (random weights, small inputs), trained in float once per seed; each row quantizes a copy. Accuracy is that of
the simulation on 360 images, in percent. A point is 3.6 images.

    OMP_NUM_THREADS=1 python benchmarks/ptq_accuracy.py --out benchmarks/results/ptq_accuracy.md
"""
import argparse, statistics, sys, warnings
from pathlib import Path
warnings.filterwarnings('ignore')
import torch
from fastai.callback.schedule import fit_one_cycle
from fastai.torch_core import set_seed
from fastcompress.callback import quantize # learn.quantize
from fastcompress.cli import demo_model
from fastcompress.data import digits
from qat_accuracy import learner

plain = dict(observer='minmax', weight_observer='minmax')
ROWS = {'W8A8, one scale, min-max': dict(per_channel=False, **plain), 'W8A8, one scale, least error': dict(per_channel=False), 'W8A8, one scale, equalised, bias corrected': dict(per_channel=False, equalize=True, bias_correct=True),
        'W8A8, per channel': {}, 'W8A8, per channel, bias corrected': dict(bias_correct=True),
        'W4A8, per channel': dict(w_bits=4), 'W4A8, per channel, bias corrected': dict(w_bits=4, bias_correct=True), 'W4A8, per channel, AdaRound, bias corrected': dict(w_bits=4, adaround=True, bias_correct=True)}

def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--archs', default='mobilenetv3_small_100,efficientnet_b0'); p.add_argument('--size', type=int, default=32); p.add_argument('--seeds', type=int, default=3)
    p.add_argument('--epochs', type=int, default=8); p.add_argument('--out')
    a = p.parse_args()
    torch.set_num_threads(1)
    dls,lines = digits(size=a.size),[f'{a.size} px, {a.epochs} epochs float, {a.seeds} seeds\n', '| model | | accuracy, mean | below float, points | seeds |', '|---|---|---|---|---|']
    for arch in a.archs.split(','):
        rows = {}
        for seed in range(a.seeds):
            set_seed(seed)
            learn = learner(dls, demo_model(arch, 10, a.size), seed)
            learn.fit_one_cycle(a.epochs, 3e-3)
            rows.setdefault('float', []).append(100*learn.validate()[1])
            for k,kw in ROWS.items():
                learn.quantize(**kw)
                rows.setdefault(k, []).append(100*learn.validate()[1])
                learn.dequantize()
                print(arch, seed, k, f'{rows[k][-1]:.2f} of {rows["float"][-1]:.2f}', file=sys.stderr, flush=True)
        base = statistics.mean(rows['float'])
        lines += [f"| {arch} | {k} | {statistics.mean(v):.2f} | {base-statistics.mean(v):.2f} | {', '.join(f'{o:.2f}' for o in v)} |" for k,v in rows.items()]
    print('\n'.join(lines))
    if a.out: Path(a.out).write_text('# Post-training quantization on digits\n\n    OMP_NUM_THREADS=1 ' + ' '.join(['python benchmarks/ptq_accuracy.py', *sys.argv[1:]]) + '\n\n' + '\n'.join(lines) + '\n')

if __name__=='__main__': main()
