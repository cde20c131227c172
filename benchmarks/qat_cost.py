"""What a step of quantization-aware training costs over a float step: resnet18, interleaved with its baseline.

    python benchmarks/qat_cost.py --threads 1 --out benchmarks/results/qat_cost.md

Time is the CPU time of the process, so that a busy machine disturbs less. A step is forward, backward, the optimizer's step, and for learned steps Adam's and the check that they stay positive. Each round makes one
step of each kind in rotating order; the table has ratios to the float step of the same round. torch.ao's graph-mode QAT (FX) is timed
beside ours where this torch still has it. Memory is the most that torch had allocated at any time in a step, above what it had before
(activations, gradients, what is kept for the backward pass; weights and optimizer state aside).
"""
import argparse, json, statistics, sys, tempfile, time, warnings
from pathlib import Path
warnings.filterwarnings('ignore')
import timm, torch
from torch import nn
from torch.nn import functional as F
from torch.profiler import ProfilerActivity, profile

from fastcompress.quantize.learned import adapt_, keep_positive_, learned
from fastcompress.quantize.simulate import calibrate_, simulate_

def model(arch):
    torch.manual_seed(0)
    m = timm.create_model(arch, num_classes=10)
    for o in m.modules():
        if isinstance(o, nn.BatchNorm2d): o.weight.data.uniform_(.5, 1.5) # FX divides by gamma
    return m.train()

def ours(arch, x, per_channel=True, w_bits=8, a_bits=8, **kw):
    m = model(arch)
    params = list(m.parameters())
    sim = simulate_(m, x, w_bits=w_bits, a_bits=a_bits, per_channel=per_channel)
    calibrate_(m, [x], show=False)
    adapt_(sim, **kw)
    qs = learned(sim)
    adam = torch.optim.Adam([q.scale for q in qs], 1e-5) if qs else None
    def after():
        if adam is None: return
        adam.step(); adam.zero_grad()
        for q in qs: keep_positive_(q)
    return m, params, after

def fx(arch, x, backend):
    from torch.ao.quantization import get_default_qat_qconfig_mapping
    from torch.ao.quantization.quantize_fx import prepare_qat_fx
    m = prepare_qat_fx(model(arch), get_default_qat_qconfig_mapping(backend), (x,))
    return m.train(), list(m.parameters()), lambda: None

def plain(arch, x):
    m = model(arch)
    return m, list(m.parameters()), lambda: None

KINDS = {'float': plain,
         'per channel, ranges follow': ours,
         'per channel, learned steps': lambda a, x: ours(a, x, learned=True),
         'per channel, learned steps of weights': lambda a, x: ours(a, x, learned='weights'),
         'per tensor, BatchNorm folded, ranges follow': lambda a, x: ours(a, x, per_channel=False),
         'per tensor, BatchNorm folded, learned steps': lambda a, x: ours(a, x, per_channel=False, learned=True),
         'torch.ao FX, per channel': lambda a, x: fx(a, x, 'x86'),
         'torch.ao FX, per tensor': lambda a, x: fx(a, x, 'qnnpack')}

def stepper(make, arch, x, y):
    m,params,after = make(arch, x)
    opt = torch.optim.SGD(params, 1e-3, momentum=.9)
    def step():
        loss = F.cross_entropy(m(x), y)
        loss.backward(); opt.step(); opt.zero_grad(); after()
        return loss
    return step

def peak(step)->float: # MB
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as p: step()
    with tempfile.NamedTemporaryFile(suffix='.json') as f:
        p.export_chrome_trace(f.name)
        events = [(e['ts'], e['args']['Total Allocated'], e['args']['Bytes']) for e in json.load(open(f.name))['traceEvents'] if e.get('name')=='[memory]']
    events.sort()
    return (max(t for _,t,_ in events)-(events[0][1]-events[0][2]))/2**20

def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--arch', default='resnet18'); p.add_argument('--size', type=int, default=64); p.add_argument('--bs', type=int, default=16)
    p.add_argument('--rounds', type=int, default=15); p.add_argument('--threads', type=int, default=0); p.add_argument('--only', default=''); p.add_argument('--out')
    a = p.parse_args()
    if a.threads: torch.set_num_threads(a.threads)
    torch.manual_seed(0)
    x,y = torch.randn(a.bs, 3, a.size, a.size),torch.randint(0, 10, (a.bs,))
    steps,lines = {},[]
    def say(s): print(s, flush=True); lines.append(s)
    for k,make in KINDS.items():
        if a.only and k!='float' and a.only not in k: continue
        try: steps[k] = stepper(make, a.arch, x, y); steps[k](); steps[k]()
        except Exception as e: steps.pop(k, None); say(f'{k}: did not run ({type(e).__name__}: {e})')
    times,kinds = {k: [] for k in steps},list(steps)
    for r in range(a.rounds):
        at = r%len(kinds)
        for k in kinds[at:]+kinds[:at]:
            start = time.process_time(); loss = steps[k]()
            times[k].append(time.process_time()-start)
            assert loss.isfinite()
    say(f'{torch.get_num_threads()} threads, {a.arch}, {a.size} px, batch {a.bs}, {a.rounds} rounds; float step {statistics.median(times["float"])*1e3:.0f} ms\n')
    mb = {k: peak(steps[k]) for k in kinds}
    say(f'| step | CPU time / float: median | quartiles | peak memory, MB (float {mb["float"]:.0f}) |\n|---|---|---|---|')
    for k in kinds[1:]:
        q = statistics.quantiles([t/f for t,f in zip(times[k], times['float'])], n=4)
        say(f'| {k} | {q[1]:.2f} | {q[0]:.2f} to {q[2]:.2f} | {mb[k]:.0f} |')
    if a.out:
        Path(a.out).parent.mkdir(parents=True, exist_ok=True)
        cmd = ' '.join(['python benchmarks/qat_cost.py', *sys.argv[1:]])
        Path(a.out).write_text(f'# What a step of quantization-aware training costs\n\n    {cmd}\n\n' + '\n'.join(lines) + '\n')

if __name__=='__main__': main()
