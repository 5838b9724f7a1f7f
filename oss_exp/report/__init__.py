"""From run folders to what people read: tables, pictures, one HTML page. Nothing here runs a model."""

from oss_exp.report.logging import log_run
from oss_exp.report.page import write
from oss_exp.report.results import mean_psnr

__all__ = ["log_run", "mean_psnr", "write"]
