"""Optimal step schedules for few-step diffusion and flow-matching samplers (OSS, arXiv 2503.21774).

All public names are attributes of this package, such as `oss_exp.OSSShared`. User code,
the `_target_` entries of configurations and saved schedules use these names, never the
paths of modules, so files can move. A name is imported when it is first used: importing
the package takes milliseconds and does not load torch.

`PUBLIC` (and `__all__`) has what users of the library need, `CONFIGURED` what
configurations use besides, and `BASES` what extensions subclass and functions return.
"""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

# For editors and type checkers: the same names as in PUBLIC below, which a test compares.
if TYPE_CHECKING:
    from oss_exp.api import compare as compare
    from oss_exp.api import sample as sample
    from oss_exp.api import search as search
    from oss_exp.distances import X0MSE as X0MSE
    from oss_exp.distances import Inception as Inception
    from oss_exp.distances import Perceptual as Perceptual
    from oss_exp.distances import Select as Select
    from oss_exp.distances import XtMSE as XtMSE
    from oss_exp.export.oss_scheduler import OSSScheduler as OSSScheduler
    from oss_exp.models.guidance import Guidance as Guidance
    from oss_exp.models.parameterization import DataPrediction as DataPrediction
    from oss_exp.models.parameterization import EDMPrediction as EDMPrediction
    from oss_exp.models.parameterization import FlowVelocity as FlowVelocity
    from oss_exp.models.parameterization import NoisePrediction as NoisePrediction
    from oss_exp.models.parameterization import ScorePrediction as ScorePrediction
    from oss_exp.models.parameterization import VPVelocity as VPVelocity
    from oss_exp.noise.community import BetaLevelsSchedule as BetaLevelsSchedule
    from oss_exp.noise.community import BongTangentSchedule as BongTangentSchedule
    from oss_exp.noise.community import SGMUniformSchedule as SGMUniformSchedule
    from oss_exp.noise.community import SimpleSchedule as SimpleSchedule
    from oss_exp.noise.heuristics import BetaSchedule as BetaSchedule
    from oss_exp.noise.heuristics import CosineSchedule as CosineSchedule
    from oss_exp.noise.heuristics import KLOptimalSchedule as KLOptimalSchedule
    from oss_exp.noise.heuristics import LinearQuadraticSchedule as LinearQuadraticSchedule
    from oss_exp.noise.paths import CosinePath as CosinePath
    from oss_exp.noise.paths import DDPMPath as DDPMPath
    from oss_exp.noise.paths import EDMPath as EDMPath
    from oss_exp.noise.paths import FlowPath as FlowPath
    from oss_exp.noise.paths import VPPath as VPPath
    from oss_exp.noise.published_tables import AlignYourSteps as AlignYourSteps
    from oss_exp.noise.published_tables import OSSComfyUI as OSSComfyUI
    from oss_exp.noise.schedules import DDIMSchedule as DDIMSchedule
    from oss_exp.noise.schedules import EDMSchedule as EDMSchedule
    from oss_exp.noise.schedules import FlowSchedule as FlowSchedule
    from oss_exp.noise.schedules import LogSNRSchedule as LogSNRSchedule
    from oss_exp.noise.schedules import QuadraticSchedule as QuadraticSchedule
    from oss_exp.noise.schedules import VPSchedule as VPSchedule
    from oss_exp.schedule import Analytic as Analytic
    from oss_exp.schedule import FittedSteps as FittedSteps
    from oss_exp.schedule import Free as Free
    from oss_exp.schedule import Pinned as Pinned
    from oss_exp.schedule import SolverSteps as SolverSteps
    from oss_exp.schedule import StepSchedule as StepSchedule
    from oss_exp.solvers.adams_bashforth import AdamsBashforth as AdamsBashforth
    from oss_exp.solvers.deis import DEIS as DEIS
    from oss_exp.solvers.dpm2 import DPM2 as DPM2
    from oss_exp.solvers.dpm_solver import DPMSolver as DPMSolver
    from oss_exp.solvers.dpm_solver_pp import DPMSolverPP as DPMSolverPP
    from oss_exp.solvers.euler import Euler as Euler
    from oss_exp.solvers.heun import Heun as Heun
    from oss_exp.solvers.ipndm import IPNDM as IPNDM
    from oss_exp.solvers.unipc import UniPC as UniPC
    from oss_exp.stepsize.baselines.bns import BNS as BNS
    from oss_exp.stepsize.baselines.closed_form import ClosedForm as ClosedForm
    from oss_exp.stepsize.baselines.dm import DM as DM
    from oss_exp.stepsize.baselines.dyweight import DyWeight as DyWeight
    from oss_exp.stepsize.baselines.gits import GITS as GITS
    from oss_exp.stepsize.baselines.gs import GS as GS
    from oss_exp.stepsize.baselines.ld3 import LD3 as LD3
    from oss_exp.stepsize.baselines.neural_solver import NeuralSolver as NeuralSolver
    from oss_exp.stepsize.baselines.olss import OLSS as OLSS
    from oss_exp.stepsize.baselines.profiles import TORS as TORS
    from oss_exp.stepsize.baselines.profiles import Entropic as Entropic
    from oss_exp.stepsize.baselines.profiles import SharpEuler as SharpEuler
    from oss_exp.stepsize.oss.band import Band as Band
    from oss_exp.stepsize.oss.best import OSSBest as OSSBest
    from oss_exp.stepsize.oss.strategies import OSS as OSS
    from oss_exp.stepsize.oss.strategies import OSSAve as OSSAve
    from oss_exp.stepsize.oss.strategies import OSSFit as OSSFit
    from oss_exp.stepsize.oss.strategies import OSSShared as OSSShared
    from oss_exp.stepsize.polish import polish as polish
    from oss_exp.stepsize.problem import Problem as Problem
    from oss_exp.velocity import BoundVelocity as BoundVelocity

__version__ = "0.2.0"
ASSETS = Path(__file__).parent / "assets"  # shipped networks, schedules, prompts

# Each of the three tables maps a name to its module below this package.
PUBLIC = {
    # Functions.
    "compare": "api",
    "sample": "api",
    "search": "api",
    # Step schedules and their search.
    "StepSchedule": "schedule",
    "Pinned": "schedule",
    "Free": "schedule",
    "Analytic": "schedule",
    "SolverSteps": "schedule",
    "FittedSteps": "schedule",
    "BoundVelocity": "velocity",
    "Problem": "stepsize.problem",
    "polish": "stepsize.polish",
    # Stepsize strategies.
    "OSS": "stepsize.oss.strategies",
    "OSSAve": "stepsize.oss.strategies",
    "OSSBest": "stepsize.oss.best",
    "OSSFit": "stepsize.oss.strategies",
    "OSSShared": "stepsize.oss.strategies",
    "Band": "stepsize.oss.band",
    "BNS": "stepsize.baselines.bns",
    "ClosedForm": "stepsize.baselines.closed_form",
    "DM": "stepsize.baselines.dm",
    "DyWeight": "stepsize.baselines.dyweight",
    "GITS": "stepsize.baselines.gits",
    "GS": "stepsize.baselines.gs",
    "LD3": "stepsize.baselines.ld3",
    "NeuralSolver": "stepsize.baselines.neural_solver",
    "OLSS": "stepsize.baselines.olss",
    "TORS": "stepsize.baselines.profiles",
    "Entropic": "stepsize.baselines.profiles",
    "SharpEuler": "stepsize.baselines.profiles",
    # Solvers.
    "AdamsBashforth": "solvers.adams_bashforth",
    "DEIS": "solvers.deis",
    "DPM2": "solvers.dpm2",
    "DPMSolver": "solvers.dpm_solver",
    "DPMSolverPP": "solvers.dpm_solver_pp",
    "Euler": "solvers.euler",
    "Heun": "solvers.heun",
    "IPNDM": "solvers.ipndm",
    "UniPC": "solvers.unipc",
    # Distances.
    "Inception": "distances",
    "Perceptual": "distances",
    "Select": "distances",
    "X0MSE": "distances",
    "XtMSE": "distances",
    # Noise schedules and paths.
    "DDIMSchedule": "noise.schedules",
    "EDMSchedule": "noise.schedules",
    "FlowSchedule": "noise.schedules",
    "LogSNRSchedule": "noise.schedules",
    "QuadraticSchedule": "noise.schedules",
    "VPSchedule": "noise.schedules",
    "BetaSchedule": "noise.heuristics",
    "CosineSchedule": "noise.heuristics",
    "KLOptimalSchedule": "noise.heuristics",
    "LinearQuadraticSchedule": "noise.heuristics",
    "BetaLevelsSchedule": "noise.community",
    "BongTangentSchedule": "noise.community",
    "SGMUniformSchedule": "noise.community",
    "SimpleSchedule": "noise.community",
    "AlignYourSteps": "noise.published_tables",
    "OSSComfyUI": "noise.published_tables",
    "CosinePath": "noise.paths",
    "DDPMPath": "noise.paths",
    "EDMPath": "noise.paths",
    "FlowPath": "noise.paths",
    "VPPath": "noise.paths",
    # Models.
    "DataPrediction": "models.parameterization",
    "EDMPrediction": "models.parameterization",
    "FlowVelocity": "models.parameterization",
    "NoisePrediction": "models.parameterization",
    "ScorePrediction": "models.parameterization",
    "VPVelocity": "models.parameterization",
    "Guidance": "models.guidance",
    # Export.
    "OSSScheduler": "export.oss_scheduler",
}

CONFIGURED = {
    "cosine_betas": "noise.paths",
    "linear_betas": "noise.paths",
    "scaled_linear_betas": "noise.paths",
    "GaussianMixture": "models.families.mixture",
    "Network": "models.network",
    "DiT": "models.families.backbones",
    "UNet": "models.families.backbones",
    "Published": "models.families.published",
    "ADM": "models.families.edm_networks",
    "Song": "models.families.edm_networks",
    "PublishedDiT": "models.families.dit",
    "SiT": "models.families.sit",
    "MAR": "models.families.mar",
    "MARNetwork": "models.families.mar",
    "STDiT3": "models.families.stdit3",
    "OpenSora": "models.families.open_sora",
    "PromptedSTDiT3": "models.families.open_sora",
    "public_t5": "models.families.open_sora",
    "random_t5": "models.families.open_sora",
    "time_shift": "models.families.open_sora",
    "PromptedFlux": "models.families.flux",
    "flux_shift": "noise.schedules",
    "PSDenoiser": "models.families.psdenoiser",
    "Worded": "models.text.words",
    "Words": "models.text.words",
    "FluxTextEncoders": "models.text.encoders",
    "Pixels": "models.decoders.image",
    "VAE": "models.decoders.image",
    "LDMVAE": "models.decoders.ldm_vae",
    "VideoVAE": "models.decoders.video_vae",
    "FashionFeatures": "evaluation.classifier",
    "InceptionV3": "evaluation.features",
    "RandomFeatures": "distances",
    "CLIPScore": "evaluation.metrics",
    "ClassAgreement": "evaluation.metrics",
    "FID": "evaluation.metrics",
    "KID": "evaluation.metrics",
    "LPIPS": "evaluation.metrics",
    "PrecisionRecall": "evaluation.metrics",
    "Reference": "evaluation.statistics",
    "ComfyUI": "export.comfyui",
    "ComfyUINodes": "export.numbers",
    "Diffusers": "export.diffusers",
    "KDiffusion": "export.k_diffusion",
    "OSSSchedulerFile": "export.numbers",
    "WebUI": "export.webui",
    "COCODetector": "geneval.coco",
    "FashionDetector": "geneval.detectors",
    "NoiseData": "data.noise",
    "ConditionedNoiseData": "data.conditions",
    "PromptData": "data.conditions",
    "cached_latents": "data.images",
    "digits": "data.images",
    "fashion_mnist": "data.images",
    "image_folder": "data.folder",
    "mixture_samples": "data.images",
    "cifar10": "data.cifar10",
    "ColouredFashion": "data.captioned",
    "MovingFashion": "data.captioned",
    "CaptionedLatents": "data.captioned",
    "FashionScenes": "data.scenes",
    "LogitNormalTimes": "tasks.pretrain",
    "UniformTimes": "tasks.pretrain",
    "wandb_logger": "report.logging",
    "Calibrate": "tasks.calibrate",
    "Certify": "tasks.certify",
    "Compare": "tasks.compare",
    "Convert": "tasks.convert",
    "Evaluate": "tasks.evaluate",
    "Export": "tasks.export",
    "Finetune": "tasks.finetune",
    "FitClassifier": "tasks.fit_classifier",
    "FitDetector": "tasks.fit_detector",
    "FitMixture": "tasks.fit_mixture",
    "GenEval": "tasks.geneval",
    "ImportSigmas": "tasks.import_sigmas",
    "Pretrain": "tasks.pretrain",
    "Search": "tasks.search",
    "Statistics": "tasks.statistics",
    "Reproduce": "reproduce.task",
    "Report": "report.page",
    # diffusers pipelines.
    "Pipeline": "models.pipeline",
    "PipelineSchedule": "models.pipeline",
}

# Classes that extensions subclass, and types of what functions return.
BASES = {
    "Calibration": "calibration",
    "Comparison": "api",
    "Distance": "distances",
    "Exporter": "export.base",
    "ImageMetric": "evaluation.metrics",
    "LinearMultistep": "solvers.base",
    "Model": "models.base",
    "NoiseSchedule": "noise.schedules",
    "Solver": "solvers.base",
    "State": "solvers.base",
    "StepsizeStrategy": "stepsize.base",
}

__all__ = [*PUBLIC]

_MODULES = {**PUBLIC, **CONFIGURED, **BASES}  # name -> module


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used."""
    module = _MODULES.get(name)
    if module is None:
        raise AttributeError(f"module 'oss_exp' has no attribute {name!r}{_suggestion(name)}")
    value = getattr(import_module(f"oss_exp.{module}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*_MODULES, "__version__", "__doc__", "__file__", "__path__"})


def _suggestion(name: str) -> str:
    """Return "; did you mean X?" with the public name most like `name`, or an empty string."""
    if name.startswith("_"):
        return ""
    from difflib import get_close_matches

    matches = get_close_matches(name, _MODULES, n=1)
    return f"; did you mean {matches[0]}?" if matches else ""
