"""Input: which images there are (`sources`) and how they reach the step (`pipeline`)."""

import os

# TensorFlow reads it as it is imported; at its default it greets the user with pages of plug-ins.
os.environ.setdefault('TF_CPP_MIN_LOG_LEVEL', '3')
