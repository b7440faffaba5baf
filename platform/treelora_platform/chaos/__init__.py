"""Random schedules of faults against an experiment, and whether anything was lost: `treelora chaos`."""
