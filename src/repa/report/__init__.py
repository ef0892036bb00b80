"""Report on runs as one self-contained HTML page: headline, curves, tables, samples, and the provenance of each number."""

from typing import TYPE_CHECKING

from repa.base.imports import exports

if TYPE_CHECKING:
    from repa.report.curves import curve_figure as curve_figure
    from repa.report.headline import verdict as verdict
    from repa.report.page import write_report as write_report
    from repa.report.pictures import save_figure as save_figure
    from repa.report.runs import RunRecord as RunRecord
    from repa.report.runs import read_run as read_run
    from repa.report.runs import read_runs as read_runs
    from repa.report.speedups import Speedup as Speedup
    from repa.report.speedups import group_seeds as group_seeds
    from repa.report.speedups import speedup as speedup
    from repa.report.speedups import speedups_of_groups as speedups_of_groups
    from repa.report.summary import config_differences as config_differences
    from repa.report.summary import machine_facts as machine_facts
    from repa.report.summary import summary_rows as summary_rows
    from repa.report.summary import summary_table as summary_table
else:
    __getattr__, __dir__, __all__ = exports(__name__)
