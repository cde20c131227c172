"""Our ONNX files beside onnxruntime's own static quantizer and its float model: time, bytes and error, one thread, batch 1.

Each model is made by timm with a seed and random weights made fair (see benchmarks/zoo.py). Both quantizers see the same 16 calibration images. Theirs: torch's ONNX export,
quant_pre_process, quantize_static with QDQ, per_channel, uint8 activations and int8 weights, as its documentation recommends. All three files run in turns in
one process; a ratio is the median over the rounds of one round's times. SQNR is against the float file, on 16 images that neither quantizer saw: error, not accuracy, the weights being random.

    pip install fastcompress[onnx]
    OMP_NUM_THREADS=1 python benchmarks/onnx_speed.py --rounds 40 --out benchmarks/results/onnx_speed.md
"""
import argparse, contextlib, io, logging, os, sys, tempfile, warnings
from pathlib import Path
warnings.filterwarnings('ignore')
import onnxruntime as ort, timm, torch
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
from onnxruntime.quantization.shape_inference import quant_pre_process
from zoo import prepared
from fastcompress.deploy.capture import capture
from fastcompress.deploy.lower import fold_all_
from fastcompress.deploy.onnx import OnnxModel, check_onnx, ran_ops, save_onnx
from fastcompress.measure.latency import ratio, time_interleaved
from fastcompress.measure.quality import sqnr
from fastcompress.quantize.simulate import calibrate_, simulate_

MODELS = 'resnet18 resnet50 mobilenetv2_100 mobilenetv3_large_100 efficientnet_b0 regnety_002 convnext_atto vit_tiny_patch16_224'.split()

class Reader(CalibrationDataReader):
    def __init__(self, name, x): self.it = iter([{name: b.numpy()} for b in x.split(1)])
    def get_next(self): return next(self.it, None)

def theirs(model, calib, d):
    "Float file and the one that onnxruntime's quantizer makes of it"
    float_,pre,int8 = d/'float.onnx',d/'pre.onnx',d/'theirs.onnx'
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        torch.onnx.export(model, (calib[:2],), float_, dynamo=True, opset_version=21, dynamic_shapes=({0:torch.export.Dim('batch', min=1, max=64)},), external_data=False)
        quant_pre_process(float_, pre)
        quantize_static(pre, int8, Reader('x', calib), quant_format=QuantFormat.QDQ, per_channel=True, activation_type=QuantType.QUInt8, weight_type=QuantType.QInt8)
    return float_,int8

def ours(model, calib, d):
    simulate_(model, calib, 'onnx')
    calibrate_(model, calib.split(4), show=False)
    ref = fold_all_(capture(model, calib[:2]))
    save_onnx(ref, d/'ours.onnx', (calib[:1],), show=False)
    return d/'ours.onnx',ref

def row(arch, rounds, d):
    model,g = prepared(arch, 224)
    calib,fresh = torch.randn(16, 3, 224, 224, generator=g),torch.randn(16, 3, 224, 224, generator=g)
    float_,int8 = theirs(model, calib, d)
    mine,ref = ours(model, calib, d)
    files = dict(float=float_, theirs=int8, ours=mine)
    fs = {k:OnnxModel(p, threads=1) for k,p in files.items()}
    t = time_interleaved(fs, fresh[:1], n=rounds)
    y = {k:torch.cat([f(b) for b in fresh.split(1)]) for k,f in fs.items()}
    checks = check_onnx(mine, ref, fresh[:2])
    return dict(arch=arch, float=t['float'].median, o_f=ratio(t['ours'], t['float']), t_f=ratio(t['theirs'], t['float']), o_t=ratio(t['ours'], t['theirs']),
                so=sqnr(y['float'], y['ours']), st=sqnr(y['float'], y['theirs']), bytes={k:p.stat().st_size for k,p in files.items()},
                steps=max(c.steps for c in checks), ops=len(checks), ran=ran_ops(mine), theirs_ran=ran_ops(int8))

HEAD = '''| model | float ms | ours / float | theirs / float | ours / theirs | SQNR ours | SQNR theirs | MB float | MB ours | MB theirs | roundings checked | max steps |
|---|---|---|---|---|---|---|---|---|---|---|---|'''

def line(r):
    q = lambda o: f"{o.median:.2f} ({o.q1:.2f}–{o.q3:.2f})"
    mb = ' | '.join(f"{r['bytes'][k]/1e6:.2f}" for k in ('float','ours','theirs'))
    return f"| {r['arch']} | {r['float']:.1f} | {q(r['o_f'])} | {q(r['t_f'])} | {q(r['o_t'])} | {r['so']:.1f} | {r['st']:.1f} | {mb} | {r['ops']} | {r['steps']} |"

if __name__=='__main__':
    p = argparse.ArgumentParser()
    p.add_argument('models', nargs='*', default=MODELS)
    p.add_argument('--rounds', type=int, default=40)
    p.add_argument('--out')
    a = p.parse_args()
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    print(HEAD)
    rows = []
    for arch in a.models:
        with tempfile.TemporaryDirectory() as d: rows.append(row(arch, a.rounds, Path(d)))
        print(line(rows[-1]), dict(rows[-1]['ran']), 'theirs', dict(rows[-1]['theirs_ran']), flush=True)
        if not a.out: continue # written after each model
        ops = '\n'.join(f"- {r['arch']}: " + ', '.join(f'{n} {o}' for o,n in r['ran'].most_common()) for r in rows)
        Path(a.out).write_text(f"{__doc__}\nonnxruntime {ort.__version__}, torch {torch.__version__}, timm {timm.__version__}.\n\n{HEAD}\n" + '\n'.join(map(line, rows)) + f"\n\nWhat onnxruntime runs of our files after its own optimization:\n\n{ops}\n")
