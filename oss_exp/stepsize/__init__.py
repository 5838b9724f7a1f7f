"""Step-size strategies: the search and the schedules that it is compared with."""

from oss_exp.stepsize.base import Collective, Problem, StepsizeStrategy, Teacher
from oss_exp.stepsize.closed_form import ClosedForm
from oss_exp.stepsize.oss import OSS, Band, OSSAve, OSSFit, OSSShared

__all__ = [
    "OSS",
    "Band",
    "ClosedForm",
    "Collective",
    "OSSAve",
    "OSSFit",
    "OSSShared",
    "Problem",
    "StepsizeStrategy",
    "Teacher",
]
