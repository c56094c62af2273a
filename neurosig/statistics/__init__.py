"""Statistics of majority voting: accuracy, calibration, intervals, significance tests, AUROC."""
