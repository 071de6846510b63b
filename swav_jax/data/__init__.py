"""Input: which images there are (`sources`) and how they reach the step (`pipeline`)."""

import os

# TensorFlow only decodes and resizes here, which oneDNN does not do; with it, the first thing that
# a user reads is a page about rounding.
os.environ.setdefault('TF_ENABLE_ONEDNN_OPTS', '0')
os.environ.setdefault('TF_CPP_MIN_LOG_LEVEL', '3')
