"""Our ONNX files beside onnxruntime's own static quantizer and its float model: time, bytes and error, one thread, batch 1.

Each model of benchmarks/timm_models.txt is made by timm with a seed and random weights made fair (see benchmarks/zoo.py). Both quantizers see the same 16 calibration images. Theirs: torch's ONNX export,
quant_pre_process, quantize_static with QDQ, per_channel, uint8 activations and int8 weights, as its documentation recommends. All three files run in turns in
one process; a ratio is the median over the rounds of one round's times. SQNR is against the float file, on 16 images that neither quantizer saw: error, not accuracy, the weights being random.

    pip install fastcompress[onnx]
    OMP_NUM_THREADS=1 python benchmarks/onnx_speed.py --out benchmarks/results/onnx_speed.md
"""
import contextlib, io, logging, statistics, tempfile, warnings
from collections import Counter
from functools import partial
from pathlib import Path
warnings.filterwarnings('ignore')
import onnxruntime as ort, torch
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
from onnxruntime.quantization.shape_inference import quant_pre_process
from fastcompress.cli import cpu_flags, environment
from zoo import attempt, chosen, options, prepared, publish, sweep, tensors
from fastcompress.deploy.capture import capture
from fastcompress.deploy.lower import fold_all_
from fastcompress.deploy.onnx import OnnxModel, check_onnx, ran_ops, save_onnx
from fastcompress.measure.latency import ratio, time_interleaved
from fastcompress.measure.quality import sqnr
from fastcompress.quantize.simulate import calibrate_, simulate_

class Reader(CalibrationDataReader):
    def __init__(self, name, x): self.it = iter([{name: b.numpy()} for b in x.split(1)])
    def get_next(self): return next(self.it, None)

def exported(model, calib, d):
    "Torch's ONNX export of the float model"
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        def write(x, shapes): torch.onnx.export(model, (x,), d/'float.onnx', dynamo=True, opset_version=21, dynamic_shapes=shapes, external_data=False)
        try: write(calib[:2], ({0:torch.export.Dim('batch', min=1, max=64)},))
        except torch.onnx.OnnxExporterError: write(calib[:1], None) # as ours: for a batch of 1, if not for any
    return dict(bytes=(d/'float.onnx').stat().st_size)

def theirs(calib, d):
    "What onnxruntime's quantizer makes of the float file"
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        quant_pre_process(d/'float.onnx', d/'pre.onnx')
        quantize_static(d/'pre.onnx', d/'theirs.onnx', Reader('x', calib), quant_format=QuantFormat.QDQ, per_channel=True, activation_type=QuantType.QUInt8, weight_type=QuantType.QInt8)
    return dict(bytes=(d/'theirs.onnx').stat().st_size, ran=ran_ops(d/'theirs.onnx'))

def ours(model, calib, fresh, d, profile):
    simulate_(model, calib, profile)
    calibrate_(model, calib.split(4), show=False)
    ref = fold_all_(capture(model, calib[:2]))
    bound,_ = save_onnx(ref, d/'ours.onnx', (calib[:1],), show=False)
    checks = check_onnx(d/'ours.onnx', ref, fresh[:bound or 2])
    return dict(bytes=(d/'ours.onnx').stat().st_size, ran=ran_ops(d/'ours.onnx'), ops=len(checks), steps=max(c.steps for c in checks), share=statistics.mean(c.share for c in checks))

def timed(files, fresh, rounds):
    "Time of each file, one image, in turns, and dB of the others to the float one"
    fs = {k: OnnxModel(p, threads=1) for k,p in files.items()}
    t = time_interleaved(fs, fresh[:1], n=rounds)
    y = {k: [torch.cat(ts) for ts in zip(*(tensors(f(b)) for b in fresh.split(1)))] for k,f in fs.items()}
    over = {f'{a}/{b}': vars(ratio(t[a], t[b])) for a,b in (('ours','float'),('theirs','float'),('ours','theirs')) if a in t and b in t}
    return dict(ms=t['ours'].median, over={k: {q: r[q] for q in ('median','q1','q3')} for k,r in over.items()}, db={k: min(float(sqnr(a, b)) for a,b in zip(y['float'], y[k])) for k in y if k!='float'})

def one(name, size, rounds, peer, profile):
    logging.disable(logging.WARNING)
    model,g = prepared(name, size)
    calib,fresh = (torch.randn(16, 3, size, size, generator=g) for _ in range(2))
    with tempfile.TemporaryDirectory() as d:
        d = Path(d)
        row = dict(name=name, size=size, float=attempt(exported, model, calib, d, seconds=600), theirs=dict(error='not tried'))
        if 'error' not in row['float'] and peer: row['theirs'] = attempt(theirs, calib, d, seconds=600)
        row['ours'] = attempt(ours, model, calib, fresh, d, profile, seconds=600)
        files = {k: d/f'{k}.onnx' for k in ('float','theirs','ours') if 'error' not in row[k]}
        if 'float' in files and 'ours' in files: row.update(attempt(timed, files, fresh, rounds, seconds=600))
    return row

def summary(rows):
    ok,both = [r for r in rows if 'error' not in r['ours']],[r for r in rows if 'ours/theirs' in r.get('over', {})]
    lines = [f"- {len(ok)} of {len(rows)} models give a file that onnxruntime runs; {sum(r['ours']['ops'] for r in ok):,} roundings compared with the simulation on the file's own integers, at most {max(r['ours']['steps'] for r in ok)} step apart, {statistics.mean(r['ours']['share'] for r in ok):.4%} of elements differ.",
             f"- torch exports {sum('error' not in r['float'] for r in rows)} float models; onnxruntime's quantizer gives {sum('error' not in r['theirs'] for r in rows)} files that it runs."]
    if not both: return lines
    t,d = sorted((r['over']['ours/theirs']['median'], r['name']) for r in both),sorted((r['db']['ours']-r['db']['theirs'], r['name']) for r in both)
    return lines + [f"- Time over theirs on {len(both)} models: median {statistics.median(v for v,_ in t):.2f}, {t[0][0]:.2f} to {t[-1][0]:.2f}; above 1: {', '.join(f'{n} {v:.2f}' for v,n in t if v>1) or 'none'}. Time over float: median {statistics.median(r['over']['ours/float']['median'] for r in both):.2f}, theirs {statistics.median(r['over']['theirs/float']['median'] for r in both):.2f}.",
                    f"- dB to float, ours minus theirs: median {statistics.median(v for v,_ in d):+.1f}, lowest {d[0][0]:+.1f}; below theirs: {', '.join(f'{n} {v:+.1f}' for v,n in d if v<0) or 'none'}. Bytes over theirs: median {statistics.median(r['ours']['bytes']/r['theirs']['bytes'] for r in both):.2f}, most {max(r['ours']['bytes']/r['theirs']['bytes'] for r in both):.2f}."]

def table(rows):
    def q(r, k): return f"{o['median']:.2f} ({o['q1']:.2f}–{o['q3']:.2f})" if (o := r.get('over', {}).get(k)) else ''
    def mb(o): return f"{o['bytes']/1e6:.2f}" if 'bytes' in o else ''
    lines = ['| model | ours, ms | ours / float | theirs / float | ours / theirs | dB ours | dB theirs | MB float | MB ours | MB theirs | roundings checked | max steps |', '|'+'---|'*12]
    for r in rows:
        o,db = r['ours'],r.get('db', {})
        if 'error' in o: lines.append(f"| {r['name']} | **{o['error']}** |"+' |'*10); continue
        why = next((f"{k}: {r[k]['error'][:60]}" for k in ('float','theirs') if 'error' in r[k]), r.get('error', ''))
        cells = [q(r, 'ours/float'), q(r, 'theirs/float'), q(r, 'ours/theirs') or why, *(format(db[k], '.1f') if k in db else '' for k in ('ours','theirs')), *(mb(r[k]) for k in ('float','ours','theirs'))]
        lines.append('| '+' | '.join([r['name'], f"{r['ms']:.1f}" if 'ms' in r else '', *cells, str(o['ops']), str(o['steps'])])+' |')
    return lines

def main():
    p = options(__doc__)
    p.add_argument('--rounds', type=int, default=20, help='timed runs of each file'); p.add_argument('--profile', default='onnx', help="ours is simulated for it: onnx, or onnx_avx2, whose files are exact without an option on x86 processors without VNNI")
    a = p.parse_args()
    def show(r): return r['ours'].get('error') or r['ours']['steps'], r['theirs'].get('error', ''), r.get('db'), r.get('over', {}).get('ours/theirs')
    rows = sweep(partial(one, rounds=a.rounds, peer=not a.no_peer, profile=a.profile), chosen(a), a.rows, a.jobs, show=show)
    ran = ['What onnxruntime runs of our files after its own optimization:', '', *(f"- {r['name']}: " + ', '.join(f'{n} {o}' for o,n in Counter(r['ours']['ran']).most_common()) for r in rows if 'ran' in r['ours'])]
    publish(a.out, 'ONNX files beside those of onnxruntime\'s own quantizer', 'onnx_speed', [f"onnxruntime {ort.__version__}, torch {torch.__version__}; {(e := environment())['CPU']} ({', '.join(sorted(cpu_flags()))}). Where a processor lacks VNNI, files run with `session.x64quantprecision`, but for ours of profile onnx_avx2.", '', *summary(rows), '', *table(rows), '', *ran])

if __name__=='__main__': main()
