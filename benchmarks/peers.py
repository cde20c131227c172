"How the benchmarks call fasterai 0.4.1 (`pip install fasterai==0.4.1`), with the same ramp as ours"
import contextlib, io
from fastai.callback.core import Callback

def fasterai_callback(sparsity, context, start=0., end=.75, criteria='large_final'):
    "fasterai's SparsifyCallback on Zhu & Gupta's ramp; its prints are swallowed"
    from fasterai.core import criteria as crit
    from fasterai.core.schedule import Schedule, sched_agp
    from fasterai.sparse.sparsify_callback import SparsifyCallback as Theirs
    class Quiet(Theirs):
        name = 'fasterai'
        def __call__(self, event):
            with contextlib.redirect_stdout(io.StringIO()): return super().__call__(event)
    return Quiet(sparsity, 'weight', context, getattr(crit, criteria), Schedule(sched_agp, start_pct=start, end_pct=end))
