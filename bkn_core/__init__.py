"""Batch Kalman Normalization: train networks on one or two images per statistics group (arXiv 1802.03133)."""

from importlib.metadata import version as _version

from bkn_core.centred_weights import keep_weights_centred_
from bkn_core.compare.matrix import compare
from bkn_core.compare.report import CompareResult
from bkn_core.convert import LayerReport, conversion_report, convert, fold, to_batch_norm
from bkn_core.engine.build import build_model
from bkn_core.engine.checkpoint import load_run
from bkn_core.engine.loop import TrainResult, train
from bkn_core.engine.priors import plot_prior_quality
from bkn_core.errors import BknError
from bkn_core.evaluate import EvaluationResult, evaluate
from bkn_core.export.from_run import export_onnx
from bkn_core.export.onnx_file import ExportResult
from bkn_core.filter.kalman import Gaussian
from bkn_core.layers.batch_kalman import BatchKalmanNorm, BatchKalmanNorm1d, BatchKalmanNorm2d, BatchKalmanNorm3d
from bkn_core.layers.schedule import anneal_gain_
from bkn_core.population import estimate_population, statistics
from bkn_core.predict import Prediction, PredictionResult, predict
from bkn_core.priors.accumulation import accumulation
from bkn_core.priors.calibration import calibrate_priors_
from bkn_core.priors.quality import PriorError, PriorQuality, prior_quality
from bkn_core.recipe import Recipe, dump_recipe, load_recipe, shipped_recipes

__version__ = _version("bkn")

__all__ = [
    "BatchKalmanNorm",
    "BatchKalmanNorm1d",
    "BatchKalmanNorm2d",
    "BatchKalmanNorm3d",
    "BknError",
    "CompareResult",
    "EvaluationResult",
    "ExportResult",
    "Gaussian",
    "LayerReport",
    "Prediction",
    "PredictionResult",
    "PriorError",
    "PriorQuality",
    "Recipe",
    "TrainResult",
    "accumulation",
    "anneal_gain_",
    "build_model",
    "calibrate_priors_",
    "compare",
    "conversion_report",
    "convert",
    "dump_recipe",
    "estimate_population",
    "evaluate",
    "export_onnx",
    "fold",
    "keep_weights_centred_",
    "load_recipe",
    "load_run",
    "plot_prior_quality",
    "predict",
    "prior_quality",
    "shipped_recipes",
    "statistics",
    "to_batch_norm",
    "train",
]
