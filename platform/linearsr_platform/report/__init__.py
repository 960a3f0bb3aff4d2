"""The run report: one self-contained HTML page with pictures, curves and numbers."""
