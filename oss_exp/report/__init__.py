"""Reports of run folders: tables, pictures and one HTML page. No model runs here."""

from oss_exp.report.logging import log_run
from oss_exp.report.page import write
from oss_exp.report.results import mean_psnr

__all__ = ["log_run", "mean_psnr", "write"]
