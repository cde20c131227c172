"""Channel removal on every model of benchmarks/timm_models.txt, ratio 0.5, beside Torch-Pruning.

Each model is made by timm with a seed and random weights made fair: BatchNorm gains U(0.5, 1.5), layer scales U(0.1, 0.5), running
statistics from three forwards in training mode. Ours: find_groups, select (l2, each group loses half, no rounding), remove_ with the
float64 oracle; then a forward and a backward pass in training mode. Torch-Pruning in the same process, right after ours, on a fresh copy:
MagnitudePruner, L2, 0.5, the classifier left alone, with a limit on its time. Times are CPU seconds of one thread (other jobs on the machine do not count): trace + analysis + removal; the
oracle stands in its own column.

    pip install torch-pruning
    OMP_NUM_THREADS=1 python benchmarks/channels_sweep.py --out benchmarks/results/channels_sweep.md
"""
import copy, json, re, statistics, time, traceback, warnings
from collections import Counter
from functools import partial
warnings.filterwarnings('ignore')
import timm, torch
from torch import nn
from fastcompress.measure.count import count_macs, n_params
from fastcompress.prune.channels import find_groups
from fastcompress.prune.remove import plan_of, remove_
from fastcompress.prune.select import select

from zoo import Late, attempt, chosen, cpu_limit, fair, options, publish, read_rows, sweep, tensors

CONVS = '''botnet convmixer convnext cs3darknet cspdarknet cspresnet csp densenet dla dpn eca_ ecaresnet efficientnet ese_ fasternet fbnet ghostnet hgnet hrnet inception
lcnet mixnet mnasnet mobilenetv2 mobilenetv3 mobilenetv4_conv mobileone nf_ rdnet regnet repvgg res2net resnest resnet resnext rexnet selecsls seresnet skresnet starnet tinynet
vgg vovnet xception repvit'''.split()

def is_conv(name):
    "Convolutions alone (no attention between places)"
    return name.startswith(tuple(CONVS)) and not name.startswith('botnet')

def trains(model, x, shapes):
    "Forward in evaluation, forward and backward in training mode; None if all is well"
    with torch.no_grad(): got = [tuple(t.shape) for t in tensors(model.eval()(x))]
    if got!=shapes: return f'output {got}, was {shapes}'
    sum(t.float().square().mean() for t in tensors(model.train()(x))).backward()
    bad = [n for n,p in model.named_parameters() if p.grad is not None and (p.grad.shape!=p.shape or not p.grad.isfinite().all())]
    return f'gradients of {bad[:3]}' if bad else None

def ours(model, x, shapes, macs, params):
    t0 = time.process_time(); groups = find_groups(model, x[:1])
    t1 = time.process_time(); plan = select(groups, 'l2', .5, scope='local', round_to=1, min_channels=1)
    fast = copy.deepcopy(model)
    t2 = time.process_time(); remove_(fast, plan)
    t3 = time.process_time(); remove_(model, plan, x=x)
    t4 = time.process_time()
    done = plan_of(model)
    whole = {n: w for n,w in done.notes.items() if 'kept whole' in w}
    return dict(groups=len(groups), units=sum(g.n for g in groups), marked=sum(1 for g in groups if g.marks), obtained=done.obtained, whole=whole, frozen=groups.frozen,
                oracle=done.checked['worst'], outputs=done.checked['outputs'], find=t1-t0, cut=t3-t2, select=t2-t1, oracle_s=t4-t3-(t3-t2),
                macs=count_macs(model, x[:1])/macs, params=n_params(model)/params, problem=trains(model, x, shapes))

def theirs(model, x, shapes, macs, limit):
    import torch_pruning as tp
    keep = [m for n,m in model.named_modules() if isinstance(m, nn.Linear) and m.out_features==1000]
    try:
        with cpu_limit(limit):
            t0 = time.process_time()
            pruner = tp.pruner.MagnitudePruner(model, x[:1], importance=tp.importance.MagnitudeImportance(p=2), pruning_ratio=.5, ignored_layers=keep)
            pruner.step()
            t = time.process_time()-t0
        problem = trains(model, x, shapes)
        return dict(state='ok' if problem is None else 'broken: '+problem, s=t, macs=count_macs(model, x[:1])/macs)
    except Late: return dict(state=f'not done in {limit:g} s')
    except Exception as e:
        where = traceback.extract_tb(e.__traceback__)
        return dict(state=('raises' if any('torch_pruning' in f.filename for f in where) else 'broken') + f': {type(e).__name__}')

def one(name, size, limit, peer, known):
    torch.manual_seed(0)
    model = fair(timm.create_model(name), size)
    x = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(1))
    with torch.no_grad(): shapes = [tuple(t.shape) for t in tensors(model(x))]
    twin,macs,params = copy.deepcopy(model),count_macs(model, x[:1]),n_params(model)
    row = attempt(ours, model, x, shapes, macs, params)
    return dict(name=name, size=size, conv=is_conv(name), **row, peer=known.get(name) or (theirs(twin, x, shapes, macs, limit) if peer else {}))

def secs(row): return row['find']+row['select']+row['cut']

def table(rows):
    lines = ['| model | groups | units removed % of 50 | MACs kept | parameters kept | marked groups | oracle, worst | find + remove, s | oracle, s | Torch-Pruning: MACs, s |', '|'+'---|'*10]
    for r in rows:
        p = r['peer']
        peer = f"{p['macs']:.3f}, {p['s']:.2f}" if p.get('state')=='ok' else p.get('state', '–')
        if 'error' in r or r['problem']: lines.append(f"| {r['name']} | **{r.get('error') or r['problem']}** |  |  |  |  |  |  |  | {peer} |"); continue
        lines.append(f"| {r['name']} | {r['groups']} | {100*r['obtained']:.1f} | {r['macs']:.3f} | {r['params']:.3f} | {r['marked']} | {r['oracle']:.1e} | {secs(r):.2f} | {r['oracle_s']:.1f} | {peer} |")
    return lines

def summary(rows):
    ok = [r for r in rows if 'error' not in r and not r['problem']]
    conv,rest = [r for r in ok if r['conv']],[r for r in ok if not r['conv']]
    n = lambda rs, most: f"{sum(r['macs']<=most for r in rs)} of {len(rs)} ({100*sum(r['macs']<=most for r in rs)/max(len(rs), 1):.0f}%)"
    ts = sorted(secs(r) for r in ok)
    exact = sum(r['oracle']<=1e-9 for r in ok)
    lines = [f'- {len(ok)} of {len(rows)} models run forward and backward after removal, with the output shape they had; {sum("error" in r for r in rows)} exceptions or time-outs.',
             f'- Oracle at 1e-9 or better, groups with changing statistics included: {exact} of {len(ok)}; worst {max(r["oracle"] for r in ok):.1e}; {sum(r["outputs"] for r in ok):,} module outputs compared; groups kept whole by it: {sum(len(r["whole"]) for r in ok)}.',
             f'- MACs kept at most 0.30: {n(conv, .30)} of the convolutional nets, median {statistics.median(r["macs"] for r in conv):.3f}; at most 0.40: {n(rest, .40)} of the others, median {statistics.median([r["macs"] for r in rest] or [0]):.3f}.',
             f'- Trace + analysis + selection + removal, one thread: median {statistics.median(ts):.2f} s, slowest {ts[-1]:.2f} s; the oracle adds a median of {statistics.median(r["oracle_s"] for r in ok):.1f} s.']
    both = [r for r in ok if r['peer'].get('state')=='ok']
    if any(r['peer'] for r in rows):
        states = Counter(r['peer']['state'].split(':')[0] for r in rows)
        lines.append(f"- Torch-Pruning: {', '.join(f'{k} {v}' for k,v in states.most_common())}." + (f" On the {len(both)} it does: its time median {statistics.median(r['peer']['s'] for r in both):.2f} s, slowest {max(r['peer']['s'] for r in both):.2f} s, ours {statistics.median(secs(r) for r in both):.2f} and {max(secs(r) for r in both):.2f} s; MACs kept, median: its {statistics.median(r['peer']['macs'] for r in both):.3f}, ours {statistics.median(r['macs'] for r in both):.3f}." if both else ''))
    return lines

def reasons(rows):
    why = Counter()
    for r in rows:
        for w in r.get('frozen', {}).values(): why[re.sub(r'\d+', 'N', w.rpartition(': ')[2])] += 1
    lines = ['## What is frozen, and why', '', '| layers | reason |', '|---|---|', *(f'| {k} | {w} |' for w,k in why.most_common(20)), '', '| model | layers whose channels stay (besides the output) |', '|---|---|']
    for r in rows:
        per = Counter(r.get('frozen', {}).values())
        per.pop('the model returns it', None)
        if per: lines.append(f"| {r['name']} | {'; '.join(f'{k}: {w}' for w,k in per.most_common(3))}{'; ...' if len(per)>3 else ''} |")
    whole = [f"| {r['name']} | {n}: {w} |" for r in rows for n,w in r.get('whole', {}).items()]
    return lines + (['', '| model | kept whole by the oracle |', '|---|---|', *whole] if whole else [])

def main():
    p = options(__doc__)
    p.add_argument('--limit', type=float, default=40., help="CPU seconds that Torch-Pruning may take")
    p.add_argument('--peer-rows', help="rows of an earlier run, whose figures of Torch-Pruning are taken over")
    a = p.parse_args()
    known = {r['name']: r['peer'] for r in read_rows(a.peer_rows)}
    def show(r): return json.dumps({k:v for k,v in r.items() if k not in ('name','frozen','peer','whole')}), r['peer'].get('state')
    rows = sweep(partial(one, limit=a.limit, peer=not a.no_peer, known=known), chosen(a), a.rows, a.jobs, show=show)
    publish(a.out, f'Half the channels of {len(rows)} timm models', 'channels_sweep', [*summary(rows), '', *table(rows), '', *reasons(rows)])

if __name__=='__main__': main()
