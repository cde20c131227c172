"Everything a notebook needs: `from fastcompress.all import *`, after `from fastai.vision.all import *`"
# Written by hand, like fastai's own `all` modules. It lists the public names one by one, so that a star import
# brings no helper of ours over a name of yours.

from .callback.quantize import PTQCallback, calibration_batches
from .callback.channels import ChannelPenaltyCallback, ChannelPruneCallback, channel_penalties # and learn.prune_channels
from .callback.distill import DistillationCallback, distill_losses, feature_losses
from .callback.hold import hold_masks, release_masks
from .callback.lottery import Lottery, LotteryTicketCallback, find_ticket, load_lottery
from .callback.qat import QATCallback
from .callback.sparsify import SparsifyCallback
from .core import layer_names, match_layers, weight_layers
from .data import digits
from .deploy.capture import capture
from .deploy.checkpoint import describe_compressed, load_compressed, save_compressed
from .deploy.emulate import compare_bits, emulate
from .deploy.engines import engines, use_engine
from .deploy.fallback import ladder
from .deploy.fold import fold_input_norm, folded, reparameterise_
from .deploy.lower import IntegerModel, check_ops, to_integer
from .deploy.mobile import ExportReport, MobileModel, export_float, export_mobile, load_mobile, predict_fresh
from .measure.count import (compressed_bytes, count_macs, file_bytes, flush_subnormals_, macs_by_layer, n_nonzero, n_params,
                            n_subnormal, sparsity_by_layer)
from .measure.latency import Latency, faster, ratio, time_interleaved
from .measure.quality import agreement, sqnr, steps_apart
from .measure.report import Report, column, compare, measure
from .prune.allocate import allocations, anneal, erk, masked_quality
from .prune.budget import LatencyTable, fit_latency, latency_table, plot_table
from .prune.channels import Group, Groups, find_groups
from .prune.labels import op_rules
from .prune.lowrank import factor_error, factor_ranks, factorise_
from .prune.mask import (apply_masks_, block, covered_layers, granularities, nm, prunable, select_masks, sparse_masks, sparsity_of)
from .prune.plan import Plan, plan_for, plan_from_json, plan_to_json
from .prune.probe import probe
from .prune.remove import mask_, plan_of, reestimate_norms_, remove, remove_, speedup_, verify
from .prune.schedule import check_schedule, exponential, iterative, one_cycle, schedules, sparsity_at
from .prune.score import Scores, criteria, needs
from .prune.select import AnnealScope, describe, gather, group_scores, parse_budget, select
from .quantize.affine import QParams, affine_qparams, dequantize, fake_quant, quantize, symmetric_qparams
from .quantize.learned import LSQ, MovingRange, Noise
from .quantize.observe import observers, weight_observers
from .quantize.pack import packed_bytes
from .quantize.place import Profile, profiles
from .quantize.repair import absorb_bias_, adaround_, correct_bias_, correct_bias_analytic_, equalise_, layer_sqnr
from .quantize.search import mixed_precision, ptq_
from .quantize.simulate import calibrate_, release_, sim_mode, simulate_, simulation, site_sqnr
from .study.anneal import anneal_sparsity, plot_anneal
from .study.groups import group_table, plot_frozen, plot_groups, plot_widths
from .study.lottery import lottery_table, plot_lottery
from .study.plots import plot_schedule, plot_sparsity, plot_weights
from .study.sensitivity import Sensitivity, plot_sensitivity, sensitivity
from .study.sqnr import plot_sqnr # and learn.layer_sqnr, learn.plot_sqnr
from .study.views import sparsity_rows # and learn.plot_sparsity, learn.sparsity_summary

__all__ = [n for n,o in list(globals().items()) if not n.startswith('_') and getattr(o, '__module__', '').startswith(__package__)]
