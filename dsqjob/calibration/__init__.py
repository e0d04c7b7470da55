"""Calibration: the vendor's model under ModelOpt's quantizers, by a gang of ranks."""
