"""Step-size strategies: the search and the schedules that it is compared with."""

from oss_exp.stepsize.base import StepsizeStrategy
from oss_exp.stepsize.baselines.closed_form import ClosedForm
from oss_exp.stepsize.baselines.profiles import Profile
from oss_exp.stepsize.oss.band import Band
from oss_exp.stepsize.oss.best import OSSBest
from oss_exp.stepsize.oss.strategies import OSS, OSSAve, OSSFit, OSSShared
from oss_exp.stepsize.problem import Collective, Problem, Teacher

__all__ = [
    "OSS",
    "Band",
    "ClosedForm",
    "Collective",
    "OSSAve",
    "OSSBest",
    "OSSFit",
    "OSSShared",
    "Problem",
    "Profile",
    "StepsizeStrategy",
    "Teacher",
]
