"""What runs did, on one self-contained HTML page: verdict, curves, tables, samples, how each number was made."""

from repa.base.lazy import exports

__getattr__, __dir__, __all__ = exports(
    __name__,
    {
        "RunRecord": "records",
        "read_run": "records",
        "read_runs": "records",
        "Speedup": "summary",
        "speedup": "summary",
        "grouped": "seeds",
        "group_speedups": "seeds",
        "summary_rows": "summary",
        "summary_table": "summary",
        "config_differences": "configs",
        "verdict": "findings",
        "curve_figure": "curves",
        "save_figure": "overview",
        "machine_facts": "facts",
        "write_report": "page",
    },
)
