"Properties every schedule must have, and what is done with one that has not"
import math, pickle
from functools import partial
import pytest
from hypothesis import given, settings, strategies as st

from fastcompress.prune.schedule import check_schedule, exponential, iterative, one_cycle, schedules, sparsity_at
from fastcompress.study.plots import plot_schedule

NAMES = ['one_shot','iterative','linear','cosine','zhu_gupta','exponential','one_cycle','dsd']
UP = [n for n in NAMES if n!='dsd']
unit = st.floats(0, 1)
quick = settings(max_examples=100, deadline=None)


def test_all_are_registered(): assert list(schedules) == NAMES

@pytest.mark.parametrize('name', NAMES)
def test_ends_are_exact(name):
    f = schedules[name]
    assert f(0) == f(0.) == {'one_shot': 1, 'iterative': .25}.get(name, 0)
    assert f(1) == f(1.) == (name!='dsd')
    assert getattr(f, 'dense_again', False) == (name=='dsd')

@pytest.mark.parametrize('name', NAMES)
@given(pos=unit)
@quick
def test_stays_between_0_and_1(name, pos): assert 0 <= schedules[name](pos) <= 1

@pytest.mark.parametrize('name', UP)
@given(a=unit, b=unit)
@quick
def test_never_falls(name, a, b):
    a,b = sorted((a,b))
    assert schedules[name](a) <= schedules[name](b)+1e-15

@given(a=unit, b=unit)
@quick
def test_dsd_rises_holds_and_lets_go(a, b):
    f,(a,b) = schedules['dsd'],sorted((a,b))
    if b<2/3: assert f(a) <= f(b)+1e-15
    if 1/3<=b<2/3: assert f(b) == 1
    if b>=2/3: assert f(b) == 0

@given(n=st.integers(1, 500), data=st.data())
@quick
def test_iterative_cuts_at_equal_distances(n, data):
    f,k = iterative(n),data.draw(st.integers(0, n-1))
    assert f(k/n) == (k+1)/n
    if k: assert f((k-.001)/n) == k/n
    assert f(1) == 1 and len({f(i/(10*n)) for i in range(10*n+1)}) == n

@given(alpha=st.floats(1, 40), at=st.floats(.1, .9), pos=unit)
@quick
def test_one_cycle_is_the_papers_curve_stretched(alpha, at, pos):
    f,beta = partial(one_cycle, alpha=alpha, beta=at*alpha),at*alpha
    paper = lambda p: (1+math.exp(-alpha+beta))/(1+math.exp(-alpha*p+beta))
    assert f(0) == 0 and f(1) == 1
    assert f(pos) == pytest.approx((paper(pos)-paper(0))/(1-paper(0)), abs=1e-9)

@given(k=st.floats(.01, 20), pos=st.floats(0, .9))
@quick
def test_exponential_leaves_the_same_part_in_equal_stretches(k, pos):
    left = lambda p: math.exp(-k) + (1-math.exp(-k))*(1-exponential(p, k)) # the unstretched decay
    assert left(pos+.1) == pytest.approx(left(pos)*math.exp(-.1*k), rel=1e-6)

# ---- sparsity_at

@pytest.mark.parametrize('name', NAMES)
@given(pos=st.lists(unit, min_size=2, max_size=2), ramp=st.lists(unit, min_size=2, max_size=2), s=st.lists(unit, min_size=2, max_size=2))
@quick
def test_sparsity_runs_from_one_to_the_other(name, pos, ramp, s):
    (a,b),(start,end),(s_i,s_f) = map(sorted, (pos, ramp, s))
    at = lambda p: sparsity_at(name, p, start, end, s_i, s_f)
    last = s_i if name=='dsd' else s_f
    assert at(end) == at(1.) == last
    if a<start: assert at(a) == s_i
    assert s_i-1e-15 <= at(a) <= s_f+1e-15
    if name!='dsd': assert at(a) <= at(b)+1e-15

@pytest.mark.parametrize('name', NAMES)
@given(step=st.integers(0, 1000), s_f=unit)
@quick
def test_the_unit_of_position_does_not_matter(name, step, s_f):
    in_steps,in_parts = sparsity_at(name, step, 128, 640, .0, s_f), sparsity_at(name, step/1024, .125, .625, .0, s_f)
    assert in_steps == in_parts

@given(s=unit, pos=unit)
@quick
def test_no_way_to_go_is_no_change(s, pos):
    for name in NAMES: assert sparsity_at(name, pos, .2, .8, s, s) == s

def test_sparsity_can_go_down_by_request():
    at = [sparsity_at('linear', p, 0, 1, .9, .1) for p in (0, .5, 1)]
    assert at == [.9, pytest.approx(.5), .1]

def test_a_ramp_of_no_length(): assert [sparsity_at('linear', p, .5, .5, .1, .9) for p in (.4, .5, .6)] == [.1, .9, .9]

def test_a_ramp_that_ends_before_it_starts():
    with pytest.raises(ValueError, match='start=0.8, end=0.2'): sparsity_at('linear', .5, .8, .2)

def test_values_outside_are_cut_off():
    assert sparsity_at(lambda p: 2*p, .75, s_f=.9) == .9
    assert sparsity_at(lambda p: p-.5, .25, s_i=.1, s_f=.9) == .1

def test_a_user_may_say_dense_again():
    def hump(pos): return 1-abs(2*pos-1)
    assert sparsity_at(hump, 1, s_i=.1, s_f=.9) == .9
    hump.dense_again = True
    assert sparsity_at(hump, 1, s_i=.1, s_f=.9) == .1

@pytest.mark.parametrize('n', [0, -1, 2.5, '4'])
def test_iterative_refuses(n):
    with pytest.raises(ValueError, match='whole number of cuts'): iterative(n)

@pytest.mark.parametrize('name', NAMES)
def test_schedules_survive_pickling(name):
    f = pickle.loads(pickle.dumps(schedules[name]))
    assert [f(i/7) for i in range(8)] == [schedules[name](i/7) for i in range(8)] and f.__name__

# ---- check_schedule

@pytest.mark.parametrize('f', NAMES + [iterative(7), partial(exponential, k=8), lambda p: .9995*p, lambda p: p**.5])
def test_nothing_to_complain_about(f): assert check_schedule(f) is None

@pytest.mark.parametrize('f,words', [
    (lambda p: .9*p, 'ends at 0.9 instead of 1; sparsity will jump by the difference when the ramp ends'),
    (lambda p: .998*p, 'ends at 0.998 instead of 1'),
    (lambda p: 1.5*p, 'is 1.005 at pos=0.67, outside 0 to 1'),
    (lambda p: p-.1, 'is -0.1 at pos=0, outside'),
    (lambda p: float('nan'), 'is nan at pos=0, outside'),
    (lambda p: math.sin(math.pi*p), r'falls from 1 at pos=0.5 to 0.9999'),
    (lambda p: p if p<.5 else .5*p+.5-.3, 'set dense_again=True')])
def test_complaints(f, words): assert words in check_schedule(f)

def test_dense_again_must_come_back():
    def half(pos): return min(2*pos, 1.)-.5*(pos>.8)
    half.dense_again = True
    assert check_schedule(half) == "schedule 'half' ends at 0.5 instead of 0; sparsity will jump by the difference when the ramp ends."

def test_unknown_name():
    with pytest.raises(ValueError, match="no schedule 'liner'. Nearest: 'linear'"): check_schedule('liner')

# ---- fastai's schedules

def test_combine_scheds_is_a_schedule():
    from fastai.callback.schedule import SchedCos, SchedLin, combine_scheds
    f = combine_scheds([.25,.75], [SchedCos(0,.5), SchedLin(.5,1)])
    assert check_schedule(f) is None
    assert [sparsity_at(f, p, 0, .8, 0, .9) for p in (0, .1, .2, .5, .8, 1)] == [0, pytest.approx(.225), pytest.approx(.45), pytest.approx(.675), .9, .9]
    short = combine_scheds([.5,.5], [SchedCos(0,.5), SchedCos(.5,.8)])
    assert 'ends at 0.8 instead of 1' in check_schedule(short)

# ---- drawn

def test_pictures_of_all():
    fig = plot_schedule(NAMES + [iterative(7), partial(exponential, k=8)])
    assert [t.get_text() for t in fig.axes[0].get_legend().get_texts()] == NAMES + ['iterative(7)', 'exponential(k=8)']
    assert [l.get_ydata()[-1] for l in fig.axes[0].lines] == [1]*7+[0]+[1]*2
    assert fig.axes[0].get_title() == 'After a quarter, one_shot has done 100% of the way'
    assert plot_schedule('dsd').axes[0].get_title() == 'dsd goes 100% of the way and is dense again from 67% on'
    assert plot_schedule({'mine': 'cosine'}).axes[0].get_title() == 'After a quarter, mine has done 15% of the way'
