"Packing is bit-for-bit reversible, for every width, shape and grid; what doesn't fit is refused"
import json, math
import pytest, torch
from hypothesis import given, settings, strategies as st
from torch import tensor
from fastcompress.quantize.affine import QParams, affine_qparams, fake_quant, quantize, shift, symmetric_qparams, to_groups
from fastcompress.quantize.pack import describe, grid_bits, grid_of, pack, pack_weight, packed_bytes, slot, unpack, unpack_weight

def many(n): return lambda f: settings(max_examples=n, deadline=None)(f)
def span(bits, signed): return (-2**(bits-1), 2**(bits-1)-1) if signed else (0, 2**bits-1)
shapes = st.lists(st.integers(0, 5), max_size=4)


@many(200)
@given(st.integers(2, 16), st.booleans(), shapes, st.sampled_from([torch.int32, torch.int64, torch.int16, torch.int8, torch.uint8]), st.integers(0, 999))
def test_round_trip(bits, signed, shape, dtype, seed):
    lo,hi = span(bits, signed)
    info = torch.iinfo(dtype)
    q = torch.randint(max(lo, info.min), min(hi, info.max)+1, shape, generator=torch.Generator().manual_seed(seed)).to(dtype)
    p = pack(q, bits, signed)
    assert p.ndim==1 and p.numel()*p.element_size()==packed_bytes(q.numel(), bits) and p.dtype==(torch.uint8 if bits<=8 else torch.int16)
    back = unpack(p, bits, q.shape, signed)
    assert back.shape==q.shape and torch.equal(back.long(), q.long())
    assert back.dtype==((torch.int8 if signed else torch.uint8) if bits<=8 else torch.int16 if signed else torch.int32)


@many(60)
@given(st.sampled_from([2, 4]), st.booleans(), st.integers(0, 40), st.integers(0, 999))
def test_bytes_are_what_a_loop_makes_of_them(bits, signed, n, seed):
    lo,hi = span(bits, signed)
    q = torch.randint(lo, hi+1, (n,), generator=torch.Generator().manual_seed(seed)).tolist()
    want = [sum((v%2**bits)*2**(bits*i) for i,v in enumerate(q[j:j+8//bits])) for j in range(0, n, 8//bits)]
    assert pack(tensor(q, dtype=torch.int64), bits, signed).tolist()==want


def test_every_byte_means_something():
    every = torch.arange(256, dtype=torch.uint8)
    for bits in (2, 4, 8):
        for signed in (False, True): assert torch.equal(pack(unpack(every, bits, (256*8//bits,), signed), bits), every)


def test_strided_input():
    q = torch.arange(-8, 8).view(4, 4)
    assert torch.equal(unpack(pack(q.T, 4), 4, (4,4)).long(), q.T) and torch.equal(unpack(pack(q[:,::3], 4), 4, (4,2)).long(), q[:,::3])


def test_sizes():
    assert [packed_bytes(n, 4) for n in range(5)]==[0, 1, 1, 2, 2] and [packed_bytes(n, 2) for n in range(6)]==[0, 1, 1, 1, 1, 2]
    assert packed_bytes(7, 3)==packed_bytes(7, 4) and packed_bytes(7, 6)==7 and packed_bytes(7, 9)==14
    for bits in (0, 1, 17, 4., '4'):
        with pytest.raises(ValueError, match='from 2 to 16'): slot(bits)


@many(100)
@given(st.integers(2, 15), st.booleans(), st.booleans())
def test_what_does_not_fit_is_refused(bits, signed, below):
    lo,hi = span(bits, signed)
    assert unpack(pack(tensor([lo, hi]), bits, signed), bits, (2,), signed).tolist()==[lo, hi]
    with pytest.raises(ValueError, match=f"don't fit into {bits} {'signed' if signed else 'unsigned'}"): pack(tensor([0, lo-1 if below else hi+1]), bits, signed)


def test_the_type_says_the_sign_unless_told():
    with pytest.raises(ValueError, match='signed bits'): pack(tensor([9]), 4)
    assert pack(tensor([9], dtype=torch.uint8), 4).tolist()==pack(tensor([9]), 4, signed=False).tolist()==[9]
    with pytest.raises(ValueError, match='8 signed'): pack(tensor([200], dtype=torch.uint8), 8, signed=True)
    for bad in (torch.ones(3), torch.ones(3, dtype=torch.bool), torch.ones(3, dtype=torch.complex64)):
        with pytest.raises(TypeError, match='pack takes integers'): pack(bad, 4)
    with pytest.raises(ValueError, match='from 2 to 16'): pack(tensor([0]), 1)


@pytest.mark.parametrize('bits,good', [(2, 2), (4, 3), (8, 5)])
def test_wrong_size_is_refused(bits, good):
    for size in (good-1, good+1):
        with pytest.raises(ValueError, match=rf'packed as torch.uint8 \[{good}\]'): unpack(torch.zeros(size, dtype=torch.uint8), bits, (5,))
    with pytest.raises(ValueError, match='got torch.int32'): unpack(torch.zeros(good, dtype=torch.int32), bits, (5,))
    with pytest.raises(ValueError, match='packed as'): unpack(torch.zeros(1, good, dtype=torch.uint8), bits, (5,))


# weights

def grids(w, bits):
    flat = w.flatten(1)
    yield symmetric_qparams(w.abs().max(), bits)
    yield symmetric_qparams(w.abs().max()*0.5, bits, narrow=False, pow2=True)
    yield symmetric_qparams(w.abs().max(), bits, signed=False)
    yield affine_qparams(-w.abs().max(), w.abs().max()*0.7, bits)
    yield affine_qparams(w.min(), w.max(), bits, signed=True)
    yield symmetric_qparams(flat.abs().amax(1), bits, axis=0)
    yield affine_qparams(flat.amin(1), flat.amax(1), bits, axis=0)
    yield symmetric_qparams(w.movedim(1, 0).flatten(1).abs().amax(1), bits, axis=1)
    for g in (3, 4, 100):
        x = to_groups(w, g)
        yield symmetric_qparams(x.abs().amax(2), bits, axis=0, group=g)
        yield affine_qparams(x.amin(2), x.amax(2), bits, axis=0, group=g)


@pytest.mark.parametrize('bits', range(2, 17))
def test_weight_comes_back_as_fake_quant(bits):
    torch.manual_seed(bits)
    for shape in (5, 3, 2, 2), (4, 7), (1, 1):
        w = torch.randn(shape)
        for qp in grids(w, bits):
            d,about = pack_weight(w, qp),json.loads(json.dumps(describe(qp)))
            y = unpack_weight(d, about, w.shape)
            assert torch.equal(y.view(torch.int32), fake_quant(w, qp).view(torch.int32)), 'the same bits'
            assert grid_bits(qp)==about['bits']==bits and about['signed']==(qp.qmin<0)
            assert ('zero_point' in d)==bool(qp.zero_point.any()) and d['scale'].dtype==torch.float32
            assert all(type(v) is torch.Tensor and v.is_contiguous() and not v.requires_grad for v in d.values())
            assert d['packed'].numel()*d['packed'].element_size()==packed_bytes(w.numel(), bits)


def test_training_state_does_not_leak():
    "A parameter and the quantizer's own buffers: what is stored is a copy"
    w,scale = torch.nn.Parameter(torch.randn(4, 6)), torch.full((4,), 0.3)
    qp = QParams(scale, torch.ones(4, dtype=torch.int32), -8, 7, axis=0)
    d = pack_weight(w, qp)
    before = unpack_weight(d, describe(qp), w.shape)
    scale.mul_(2); qp.zero_point.add_(1); w.data.zero_()
    assert torch.equal(unpack_weight(d, describe(qp), w.shape), before) and not before.requires_grad


def test_half_and_odd_grids():
    w = torch.randn(6, 5)
    for v in w.half(), w.bfloat16(), w.double():
        qp = symmetric_qparams(v.float().abs().max(), 4)
        assert torch.equal(unpack_weight(pack_weight(v, qp), describe(qp), v.shape), fake_quant(v, qp))
    for qp,bits in (QParams(tensor(0.1), tensor(0, dtype=torch.int32), -5, 100), 8), (QParams(tensor(0.1), tensor(0, dtype=torch.int32), 0, 5), 3), (shift(affine_qparams(-1., 1.), -128), 8):
        assert grid_bits(qp)==bits and torch.equal(unpack_weight(pack_weight(w, qp), describe(qp), w.shape), fake_quant(w, qp))


def test_damage_is_noticed():
    w = torch.randn(4, 6)
    qp = symmetric_qparams(w.abs().amax(1), 4, axis=0)
    d,about = pack_weight(w, qp), describe(qp)
    def fails(match, d=d, about=about, shape=(4,6), err=ValueError):
        with pytest.raises(err, match=match): unpack_weight(d, about, shape)
    fails('packed as', shape=(4,7))
    fails('has 4 channels', shape=(6,4))
    fails('leave the grid', dict(d, packed=torch.full_like(d['packed'], 0x88))) # -8 on a narrow grid
    fails('finite and above 0', dict(d, scale=-d['scale']))
    fails('finite and above 0', dict(d, scale=d['scale'].double()))
    fails('finite and above 0', dict(d, scale=d['scale']*float('nan')))
    fails('zero points must be', dict(d, zero_point=torch.full((4,), 99)))
    fails('zero points must be', dict(d, zero_point=torch.zeros(3)))
    fails('wider than 16', about=dict(about, qmax=2**20))
    fails("lacks \\['axis'\\]", about={k:v for k,v in about.items() if k!='axis'})
    for k,v in dict(qmin=None, qmax=7., axis='0', group=True).items(): fails('whole numbers', about=dict(about, **{k:v}))
    for bad in (float('nan'), float('inf')):
        with pytest.raises(ValueError, match='nan or inf'): pack_weight(w*bad, qp)
    with pytest.raises(ValueError, match='wider than 16'): pack_weight(w, QParams(tensor(1.), tensor(0), -2**20, 2**20))
